"""TensorFlow's own interpreter computes what LiteRT does: another build of the kernels, and the same graphs.

It needs the extra `tensorflow`: `python -m pytest -m tensorflow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mtp_runtime import read_manifest
from mtp_runtime.bundle.contract import GRAPH_ROLES, GraphSignature
from tests.conftest import Export

pytestmark = [pytest.mark.tensorflow, pytest.mark.slow]

# Of the largest value of an output. Sums in another order (XNNPACK of another version) differ in their last bits. In
# int8 such a bit may take an activation to the next of its 255 steps, here and there: what follows is off by up to a
# few steps of 1/127 then, and on average by nothing.
LARGEST = {"f32": 1e-4, "int8": 0.05, "int4": 0.05}
AVERAGE = {"f32": 1e-5, "int8": 1e-3, "int4": 1e-3}
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


def run(interpreter: Any, path: Path, signature: GraphSignature) -> Arrays:
    """Run a signature in one of the two interpreters."""
    runner = interpreter(model_path=str(path), num_threads=1).get_signature_runner(signature.name)
    outputs: Arrays = runner(**inputs_of(signature))
    return outputs


@pytest.mark.parametrize("role", GRAPH_ROLES)
@pytest.mark.parametrize("recipe", ["f32", "int8", "int4"])
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_every_signature_gives_the_same(recipe: str, role: str, export_nano: Export) -> None:
    lite = pytest.importorskip("tensorflow", reason="needs the extra `tensorflow`").lite
    folder = export_nano(recipe)
    manifest = read_manifest(folder)
    for signature in manifest.signatures[role]:
        path = folder / manifest.files[role].path
        ours, theirs = (run(interpreter, path, signature) for interpreter in (Interpreter, lite.Interpreter))
        assert set(ours) == set(theirs) == {tensor.name for tensor in signature.outputs}
        for name, expected in ours.items():
            difference = np.abs(expected - theirs[name])
            largest = np.abs(expected).max()
            assert difference.max() <= LARGEST[recipe] * largest, (signature.name, name)
            assert difference.mean() <= AVERAGE[recipe] * largest, (signature.name, name)
            if role.endswith("embedder"):
                assert np.array_equal(expected, theirs[name])
            if name == "logits":
                assert np.array_equal(expected.argmax(-1), theirs[name].argmax(-1)), signature.name
