"""What a TFLite graph is made of."""

from __future__ import annotations

from collections import Counter

from mtp_export.formats.tflite.gpu_table import Graph


def operator_counts(graph: Graph, signature: str) -> Counter[str]:
    """How many operators of each kind a signature has; a composite goes by its name."""
    number = graph.signature_names().index(signature)
    return Counter(operator.form.partition("(")[0] for operator in graph.operators() if operator.subgraph == number)
