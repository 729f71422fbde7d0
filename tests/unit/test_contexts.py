"""The lengths of a bundle's caches: contexts, the prime that stands for the longest, rings, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_export.arch import published
from mtp_export.cli.plan import command
from mtp_export.config import ExportConfig, FormatConfig, GraphConfig, SourceConfig
from mtp_export.graph.static import GraphShape, Ring, trace_drafter, trace_embedder, trace_target
from mtp_export.pair_graphs import Contexts, contexts, graph_shape, prime_above
from mtp_runtime.errors import UserError

PRIMES = {n for n in range(2, 5000) if all(n % d for d in range(2, int(n**0.5) + 1))}
STOPS = (106, 1)
FORMATS = {
    "cpu": FormatConfig(),
    "gpu": FormatConfig(delegate="gpu"),
    "onnx": FormatConfig(name="onnx"),
}


def pair_of(model: str, stop_token_ids: tuple[int, ...] = STOPS) -> Any:
    spec = published.PAIRS[model]
    return types.SimpleNamespace(
        model=spec, target_spec=spec.target, drafter_spec=spec.drafter, stop_token_ids=stop_token_ids
    )


def config_of(model: str = "nano", format: str = "cpu", **graph: Any) -> ExportConfig:
    return ExportConfig(
        source=SourceConfig(model=model), output=Path(), format=FORMATS[format], graph=GraphConfig(**graph)
    )


def shape_of(model: str = "nano", format: str = "cpu", **graph: Any) -> GraphShape:
    return graph_shape(config_of(model, format, **graph), pair_of(model))


@given(st.integers(32, 4096))
@settings(max_examples=50)
def test_the_prime_is_the_smallest_that_is_no_factor_of_another_size(length: int) -> None:
    prime = prime_above(length, published.NANO.target, published.NANO.drafter)
    assert prime > length
    assert prime in PRIMES
    sizes = (4096, 256, 320, 512, 1024, 129)  # nano's; the drafter sees 129 = 3 · 43 positions
    assert all(size % prime for size in sizes)
    passed_over = PRIMES & set(range(length + 1, prime))
    assert all(any(size % other == 0 for size in sizes) for other in passed_over)


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the sizes of all tensors that operations take and give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                self.sizes.update(tensor.shape)
        return out


LONGER_THAN_ALL = 1_000_003  # a prime


@functools.cache
def other_sizes() -> set[int]:
    """Return the sizes in nano's graphs that are not made of the length of its caches."""
    nano = published.NANO
    with Sizes() as seen:
        for ring in (None, Ring(length=256, end_token=1), Ring(length=1024, end_token=1)):
            shape = GraphShape(cache_length=LONGER_THAN_ALL, num_draft_tokens=4, prefill_lengths=(16, 128), ring=ring)
            trace_target(nano.target, shape)
            trace_drafter(nano.drafter, nano.target, shape, position_offset=1, row_scales=True)
        for role in ("embedder", "per_layer_embedder"):
            trace_embedder(nano.target, role)
    assert {size % LONGER_THAN_ALL == 0 for size in seen.sizes} == {True, False}
    return {size for size in seen.sizes if size % LONGER_THAN_ALL}


def test_only_sizes_made_of_the_caches_length_are_multiples_of_the_prime() -> None:
    sizes = other_sizes()
    assert {129, 4096} <= sizes
    for length in (*range(32, 300), *range(512, 4097, 256)):
        prime = shape_of(cache_length=length).cache_length
        assert [size for size in sizes if size % prime == 0] == [], length


@pytest.mark.parametrize(("model", "length", "prime"), [("nano", 4096, 4099), ("e2b", 32768, 32771)])
def test_the_primes_of_what_ships(model: str, length: int, prime: int) -> None:
    assert prime_above(length, published.PAIRS[model].target, published.PAIRS[model].drafter) == prime


def test_a_prime_that_is_a_factor_of_another_size_is_left_out() -> None:
    """1201 is one: LiteRT-LM would put the context in the place of 2402, too."""
    layers = published.NANO.target.layers
    spec: Any = types.SimpleNamespace(
        vocab_size=2402, vocab_size_per_layer_input=2, hidden_size=2, num_layers=1, per_layer_size=2, num_heads=1,
        layers=layers,
    )  # fmt: skip
    assert prime_above(1200, spec, published.NANO.drafter) == 1213
    spec.vocab_size = 2
    assert prime_above(1200, spec, published.NANO.drafter) == 1201


@pytest.mark.parametrize(
    ("model", "format", "graph", "expected"),
    [
        ("nano", "cpu", {}, Contexts(longest=4096, default=1024)),
        ("nano", "gpu", {}, Contexts(longest=1024, default=1024)),
        ("nano", "onnx", {}, Contexts(longest=1024, default=1024)),
        ("e2b", "cpu", {}, Contexts(longest=32768, default=4096)),
        ("e4b", "onnx", {}, Contexts(longest=4096, default=4096)),
        ("nano", "cpu", {"cache_length": 500}, Contexts(longest=500, default=500)),
        ("nano", "cpu", {"cache_length": 2000}, Contexts(longest=2000, default=1024)),
        ("nano", "cpu", {"context_length": 300}, Contexts(longest=4096, default=300)),
        ("nano", "cpu", {"cache_length": 500, "context_length": 500}, Contexts(longest=500, default=500)),
    ],
    ids=str,
)
def test_contexts(model: str, format: str, graph: dict[str, int], expected: Contexts) -> None:
    assert contexts(config_of(model, format, **graph), pair_of(model)) == expected


def test_only_caches_whose_length_is_chosen_at_load_have_a_prime() -> None:
    assert {name: shape_of(format=name, cache_length=2000).cache_length for name in FORMATS} == {
        "cpu": 2053,  # above 2048, whole steps of full layers
        "gpu": 2000,
        "onnx": 2000,
    }


@pytest.mark.parametrize(
    ("model", "format", "graph", "length"),
    [
        ("nano", "cpu", {}, 1024),
        ("e2b", "cpu", {}, 4096),
        ("nano", "gpu", {}, None),
        ("nano", "onnx", {}, None),
        ("nano", "cpu", {"ring_length": 0}, None),
        ("nano", "cpu", {"ring_length": 512}, 512),
        ("nano", "cpu", {"ring_length": 256}, 256),  # the window and the longest prefill, and no slot more
        ("nano", "cpu", {"ring_length": 4096}, None),  # it would never be full
        ("nano", "cpu", {"cache_length": 1024}, None),
        ("nano", "cpu", {"cache_length": 1025}, 1024),
    ],
    ids=str,
)
def test_rings(model: str, format: str, graph: dict[str, int], length: int | None) -> None:
    ring = shape_of(model, format, **graph).ring
    assert ring == (None if length is None else Ring(length=length, end_token=STOPS[0]))


def test_a_pair_without_a_stop_token_has_no_ring() -> None:
    """None could end an answer whose rows are lost."""
    assert graph_shape(config_of(), pair_of("nano", ())).ring is None


@pytest.mark.parametrize("length", [1, 128, 255, 500, 513, 1000])
def test_a_ring_holds_the_window_and_a_pass(length: int) -> None:
    message = f"--rings is {length}, expected off or a power of two of at least 256, the window of sliding layers and"
    with pytest.raises(UserError, match=re.escape(message)):
        shape_of(ring_length=length)


def test_a_default_context_is_no_longer_than_the_longest() -> None:
    with pytest.raises(UserError, match=re.escape("--default-context is 501, expected at most the --cache-length of")):
        shape_of(cache_length=500, context_length=501)
    with pytest.raises(UserError, match=re.escape("--default-context is 31, expected 32 to 1048576")):
        config_of(context_length=31).check()


def test_prefills_are_shorter_than_the_longest_context() -> None:
    assert shape_of(cache_length=128).prefill_lengths == (16,)
    assert shape_of(cache_length=129).prefill_lengths == (16, 128)


@pytest.mark.parametrize("format", ["gpu", "onnx"])
@pytest.mark.parametrize(("field", "option"), [("context_length", "--default-context"), ("ring_length", "--rings")])
def test_what_is_chosen_at_load_is_for_graphs_that_allow_it(format: str, field: str, option: str) -> None:
    with pytest.raises(UserError, match=f"{option} is for --format tflite --delegate cpu"):
        dataclasses.replace(config_of(format=format), graph=GraphConfig(**{field: 512})).check()


@pytest.mark.parametrize("text", ["foo", "-1", "0", ""])
def test_rings_are_a_number_or_off(text: str) -> None:
    result = CliRunner().invoke(command, ["--rings", text, "--output", "/tmp/not/there"])
    assert str(result.exception) == f"--rings is {text!r}, expected a number or off"
