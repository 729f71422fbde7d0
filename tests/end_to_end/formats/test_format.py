"""The seam `Format`: what every export format promises, held against bundles of nano that were written by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mtp_export.config import ExportConfig, FormatConfig, QuantisationConfig, SourceConfig
from mtp_export.errors import CheckpointError
from mtp_export.formats.format import Format, WriteRequest, format_of
from mtp_export.formats.roles import ROLES
from mtp_export.pair_graphs import Settings, TracedPair, trace_pair
from mtp_export.source.pair import open_pair
from mtp_export.weights.recipes import WeightFormat
from mtp_runtime import Bundle
from tests.conftest import Export

VARIANTS = {
    "tflite": FormatConfig(),
    "tflite-gpu": FormatConfig(delegate="gpu"),
    "tflite-composites": FormatConfig(delegate="gpu", composites=True),
    "onnx": FormatConfig(name="onnx", batch_size=8),
    "onnx-portable": FormatConfig(name="onnx", portable=True),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A format, what it traced of nano at int8, and the bundle that it wrote."""

    format: Format
    traced: TracedPair
    bundle: Bundle


@pytest.fixture(scope="module", params=VARIANTS)
def written(request: pytest.FixtureRequest, export_nano: Export) -> Iterator[Written]:
    config = ExportConfig(
        source=SourceConfig(model="nano"),
        format=VARIANTS[request.param],
        quantisation=QuantisationConfig(recipe="int8"),
        output=Path("nowhere"),
    )
    format = format_of(config.format)
    traced = trace_pair(Settings(config=config, pair=open_pair(config.source)), format)
    with Bundle.open(export_nano("int8", export_format=request.param)) as bundle:
        yield Written(format, traced, bundle)


class TestFormat:
    def test_graphs_are_those_of_all_roles_in_their_order(self, written: Written) -> None:
        assert [graph.role for graph in written.traced.graphs] == list(ROLES)
        assert set(written.bundle.manifest.signatures) == set(ROLES)

    def test_signatures_are_the_traced_ones(self, written: Written) -> None:
        for graph in written.traced.graphs:
            traced = tuple(signature.signature for signature in graph.signatures)
            assert written.bundle.exported.signatures[graph.role] == traced

    def test_files_have_the_planned_names_and_sizes(self, written: Written) -> None:
        sizes = written.format.file_sizes(written.traced.graphs, written.traced.values)
        files = written.bundle.manifest.files
        assert {role: files[role].path for role in sizes} == {role: written.format.file_name(role) for role in sizes}
        assert len({files[role].path for role in sizes}) == len(sizes)
        for role, size in sizes.items():  # what describes a graph is an estimate, what its weights take is not
            assert abs(files[role].size_bytes - size) <= max(0.08 * size, 512), role

    def test_weights_take_the_stored_bytes(self, written: Written) -> None:
        files = written.bundle.manifest.files
        for role, values in written.traced.values.items():
            of_role = sum(files[name].size_bytes for name in (role, f"{role}_data") if name in files)
            stored = written.format.stored_bytes(values)
            assert 0.6 * of_role <= stored <= of_role, role

    def test_weights_come_back(self, written: Written) -> None:
        """Each within half a step of its row's or block's scale: the tables and all matrices, at their bits."""
        for role, values in written.traced.values.items():
            weights = written.format.read_weights(written.bundle, role)
            assert values.keys() <= weights.keys(), role
            for name, parameter in values.items():
                assert weights[name].bits == written.format.stored_format(parameter).bits, name
                if parameter.unit_scale or parameter.format.bits == 32 or len(parameter.shape) != 2:
                    continue
                rows = min(parameter.shape[0], 64)
                expected = np.asarray(parameter.rows(0, rows), np.float32)
                step = np.abs(expected).max(-1, keepdims=True) / 127
                distance = np.abs(weights[name].parameter.rows(0, rows) - expected)
                assert (distance <= 0.51 * step + 1e-9).all(), (role, name)

    def test_a_graph_is_lowered_and_written_once(self, written: Written, tmp_path: Path) -> None:
        """Of the embedder alone, which is one segment; it has the bytes that it has among the others."""
        (graph,) = [graph for graph in written.traced.graphs if graph.role == "embedder"]
        (lowered,) = written.format.lower([graph], 1, lambda count: None)
        assert lowered.role == "embedder"
        blocks: list[tuple[int, str]] = []
        request = WriteRequest(
            values=written.traced.values,
            folder=tmp_path,
            reply_ends=None,
            on_block=lambda size, name: blocks.append((size, name)),
        )
        paths = written.format.write(lowered, request)
        assert sorted(paths) == sorted(tmp_path.iterdir())
        assert sum(size for size, _ in blocks) == written.format.stored_bytes(written.traced.values["embedder"])
        for path in paths:
            assert path.read_bytes() == written.bundle.path("embedder").with_name(path.name).read_bytes()

    def test_a_matrix_without_a_kernel_is_refused(self, written: Written) -> None:
        parameter = next(iter(written.traced.values["embedder"].values()))
        written.format.check("table", parameter)
        odd = dataclasses.replace(parameter, format=WeightFormat(bits=8, block_size=48))
        with pytest.raises(CheckpointError, match="table is stored at 8 bits"):
            written.format.check("table", odd)
