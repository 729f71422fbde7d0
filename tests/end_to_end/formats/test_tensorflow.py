"""TensorFlow's own interpreter computes what LiteRT does: another build of the kernels, and the same graphs.

It needs the extra `tensorflow`: `python -m pytest -m tensorflow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mtp_runtime import read_manifest
from mtp_runtime.bundle.contract import GRAPH_ROLES, GraphSignature
from tests.conftest import Export

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

# Of the largest value of an output: sums in another order differ in their last bits. Where weights are quantised such
# a bit may take an activation to the next of its 255 steps. What follows is off by a fifth at worst then: as far as
# LiteRT's own outputs move when the last bits of its inputs do, and that is measured.
LAST_BITS = 1e-4
PERTURBATIONS = 12
POSITION = 100

Arrays = dict[str, NDArray[Any]]


def inputs_of(signature: GraphSignature) -> Arrays:
    """Return random values, with every slot of the cache filled and seen."""
    random = np.random.default_rng(1)
    values: Arrays = {}
    for tensor in sorted(signature.inputs, key=lambda tensor: tensor.name):
        if tensor.dtype == "int32":
            count = int(np.prod(tensor.fixed_shape))
            values[tensor.name] = np.arange(POSITION, POSITION + count, dtype=np.int32).reshape(tensor.fixed_shape)
        elif tensor.name == "mask":
            values[tensor.name] = np.zeros(tensor.fixed_shape, np.float32)
        else:
            values[tensor.name] = random.standard_normal(tensor.fixed_shape, dtype=np.float32)
    return values


def spread(run: Callable[..., Arrays], inputs: Arrays, outputs: Arrays) -> dict[str, float]:
    """Return how far each output moves when the last bits of the inputs do."""
    random = np.random.default_rng(2)
    moved = dict.fromkeys(outputs, 0.0)
    for _ in range(PERTURBATIONS):
        changed = {
            name: (value * (1 + 1e-7 * random.integers(-2, 3, value.shape))).astype(value.dtype)
            if value.dtype == np.float32
            else value
            for name, value in inputs.items()
        }
        for name, value in run(**changed).items():
            moved[name] = max(moved[name], float(np.abs(value - outputs[name]).max()))
    return moved


@pytest.mark.parametrize("role", GRAPH_ROLES)
@pytest.mark.parametrize("recipe", ["f32", "int8", "int4"])
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_every_signature_gives_the_same(recipe: str, role: str, export_nano: Export) -> None:
    lite = pytest.importorskip("tensorflow", reason="needs the extra `tensorflow`").lite
    folder = export_nano(recipe)
    manifest = read_manifest(folder)
    path = str(folder / manifest.files[role].path)
    ours, theirs = (interpreter(model_path=path, num_threads=1) for interpreter in (Interpreter, lite.Interpreter))
    for signature in manifest.signatures[role]:
        inputs, run = inputs_of(signature), ours.get_signature_runner(signature.name)
        expected = {name: value.copy() for name, value in run(**inputs).items()}
        outputs = theirs.get_signature_runner(signature.name)(**inputs)
        assert set(outputs) == set(expected) == {tensor.name for tensor in signature.outputs}
        moved = spread(run, inputs, expected)
        for name, value in expected.items():
            allowed = LAST_BITS * np.abs(value).max() + 1.5 * moved[name]
            assert np.abs(value - outputs[name]).max() <= allowed, (signature.name, name)
            if role.endswith("embedder"):
                assert np.array_equal(value, outputs[name])
            if name == "logits" and recipe == "f32":
                assert np.array_equal(value.argmax(-1), outputs[name].argmax(-1)), signature.name
