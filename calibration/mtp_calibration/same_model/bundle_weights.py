"""The weights that lie in a bundle's graphs, by the names of the checkpoint's parameters, turned back into float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mtp_export.config import FormatConfig
from mtp_export.formats.format import format_of
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.stored import StoredWeight, stored_weight
from mtp_runtime import Bundle
from mtp_runtime.bundle.contract import GRAPH_ROLES

_TABLE, _ROW_SCALES = "masked_embedding.table", "masked_embedding.row_scales"


def stored_weights(bundle: Bundle) -> dict[str, dict[str, StoredWeight]]:
    """Return every weight of every graph, by role and name; rows are read from the files when they are needed."""
    format = format_of(FormatConfig(name=bundle.manifest.export_format))
    return {role: format.read_weights(bundle, role) for role in GRAPH_ROLES}


def as_values(stored: Mapping[str, StoredWeight]) -> dict[str, Parameter]:
    """Return the weights without the numbers of bits that they are stored in."""
    return {name: weight.parameter for name, weight in stored.items()}


def with_row_scales(stored: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Return a drafter's weights with the scales of the clustered table's rows, which lie apart, multiplied into it."""
    rest = dict(stored)
    scales = rest.pop(_ROW_SCALES, None)
    if scales is None:
        return rest
    table, factors = rest[_TABLE].parameter, scales.parameter

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        by_token = table.rows(start, stop).reshape(stop - start, factors.shape[1], -1)
        scaled: NDArray[np.float32] = by_token * factors.rows(start, stop)[..., None]
        return scaled.reshape(stop - start, -1)

    rest[_TABLE] = stored_weight(table.shape, rest[_TABLE].bits, rows)
    return rest
