"""What is squared is reshaped before, in every signature alike."""

from __future__ import annotations

import pytest

from mtp_export.formats.tflite.gpu_table import open_graph
from tests.conftest import Export


@pytest.mark.parametrize(("role", "fewest"), [("target", 60), ("drafter", 20)])
def test_a_mean_takes_the_squares_themselves(role: str, fewest: int, export_nano: Export) -> None:
    """XNNPACK makes one operator of the two where they are neighbours: so of all of them, or a row alone has other
    bits."""
    graph = open_graph(export_nano("int8") / f"{role}.tflite")
    seen = 0
    for subgraph in graph.model.subgraphs:
        makers = {int(i): operator for operator in subgraph.operators for i in operator.outputs}
        for operator in subgraph.operators:
            if graph.name_of(operator) == "MEAN":
                square = makers[int(operator.inputs[0])]
                assert graph.name_of(square) == "MUL"
                assert square.inputs[0] == square.inputs[1]
                seen += 1
    assert seen > fewest
