"""Every weight that a bundle stores, against the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mtp_calibration.same_model.bundle_weights import as_values, with_row_scales
from mtp_calibration.same_model.float_pair import LOOKUPS, FloatDrafter, FloatTarget, lookup_name
from mtp_calibration.same_model.metrics import RelativeError
from mtp_calibration.same_model.quality import WeightError
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.stored import StoredWeight

_MOST_ROWS = 2048  # of a weight that are compared
_GAIN_OFF = 0.15  # a row whose scale differs by so much is wrong: rounding moves it by a fiftieth of that


def target_values(stored: Mapping[str, Mapping[str, StoredWeight]]) -> dict[str, Parameter]:
    """Return a bundle's weights under the names that a FloatTarget has for them."""
    tables = {lookup_name(role): next(iter(as_values(stored[role]).values())) for role in LOOKUPS}
    return as_values(stored["target"]) | tables


def weight_errors(
    target: FloatTarget, drafter: FloatDrafter, stored: Mapping[str, Mapping[str, StoredWeight]]
) -> tuple[WeightError, ...]:
    """Return the error of every stored weight against the checkpoint's, the worst first."""
    bits = {name: weight.bits for name, weight in stored["target"].items()}
    bits |= {lookup_name(role): next(iter(stored[role].values())).bits for role in LOOKUPS}
    errors = [
        _weight_error(name, bits[name], sample(target.values[name]), sample(parameter))
        for name, parameter in target_values(stored).items()
        if name in target.values
    ]
    for name, weight in with_row_scales(stored["drafter"]).items():
        reference = drafter.weight(name)
        rows = weight.parameter.rows(0, weight.parameter.shape[0]).astype(np.float32)
        errors.append(_weight_error(f"drafter: {name}", weight.bits, reference, rows))
    return tuple(sorted(errors, key=lambda error: -max(error.rows_off, error.error)))


def sample(parameter: Parameter) -> NDArray[np.float32]:
    """Return rows of a parameter, evenly over it. Shapes: -> [N, columns]"""
    count = parameter.shape[0]
    if count <= _MOST_ROWS:
        return np.asarray(parameter.rows(0, count)).reshape(count, -1)
    starts = np.linspace(0, count - 1, _MOST_ROWS).astype(int)
    return np.concatenate([parameter.rows(i, i + 1) for i in starts.tolist()]).reshape(_MOST_ROWS, -1)


def _weight_error(name: str, bits: int, reference: NDArray[np.float32], stored: NDArray[np.float32]) -> WeightError:
    rows, other = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, stored))
    error = RelativeError()
    error.add(reference.reshape(len(reference), -1), stored.reshape(len(stored), -1))
    squares = np.square(rows).sum(-1)
    gains = np.divide((rows * other).sum(-1), squares, out=np.ones(len(rows)), where=squares > 0)
    off = np.abs(gains - 1) > _GAIN_OFF
    gain = float(np.median(gains[off])) if off.any() else float((rows * other).sum() / max(squares.sum(), 1e-30))
    return WeightError(name=name, bits=bits, error=error.value, gain=gain, rows_off=float(off.mean()))
