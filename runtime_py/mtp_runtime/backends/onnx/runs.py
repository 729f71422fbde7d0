"""Graphs with their buffers bound: one pass of the target, one step of the drafter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from mtp_runtime.backends.onnx.buffers import CPU, GraphBuffers, shared, sized
from mtp_runtime.backends.onnx.errors import REFUSED
from mtp_runtime.backends.onnx.opening import CPU_PROVIDER
from mtp_runtime.errors import BackendError
from mtp_runtime.generate.backend import Draft


class BoundGraph:
    """A graph with its buffers bound."""

    def __init__(
        self,
        session: ort.InferenceSession,
        role: str,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
    ) -> None:
        """Bind `session`, the graph `role`, to the buffers of its inputs and outputs."""
        self._session: ort.InferenceSession | None = session
        self._role = role
        self.binding = session.io_binding()
        # A provider with memory of its own copies an input when it is bound: what changes is bound for each pass again.
        copies = session.get_providers()[0] != CPU_PROVIDER
        self._copied = {name: value for name, value in inputs.items() if copies and value.device_name() == CPU}
        for name, value in inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run the graph on what its input buffers hold.

        Raises:
            BackendError: the bundle is closed, or ONNX Runtime refused.
        """
        if self._session is None:
            raise _closed(self._role)
        try:
            for name, value in self._copied.items():
                self.binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(self.binding)
        except REFUSED as error:
            raise BackendError(f"ONNX Runtime failed to run {self._role}: {error}") from error

    def release(self) -> None:
        """Let go of the session."""
        self._session = None


class OpenedGraphs:
    """The opened sessions of a bundle, by role, and the buffers that they are bound to."""

    def __init__(self, sessions: Mapping[str, ort.InferenceSession], buffers: GraphBuffers) -> None:
        """Take what `OnnxGraphs.open` opened and allocated."""
        self.buffers = buffers
        self._sessions = dict(sessions)

    def bind(self, role: str, inputs: Mapping[str, ort.OrtValue], outputs: Mapping[str, ort.OrtValue]) -> BoundGraph:
        """Bind a graph to its buffers.

        Raises:
            BackendError: the bundle is closed.
        """
        if role not in self._sessions:
            raise _closed(role)
        return BoundGraph(self._sessions[role], role, inputs, outputs)

    def close(self) -> None:
        """Release the sessions; closing twice is harmless."""
        self._sessions.clear()


class _Run:
    """A graph that attends, and those that look up its embeddings, with the buffers that are written and read."""

    def __init__(self, graphs: OpenedGraphs, role: str, sizes: Mapping[str, int], sequences: Collection[int]) -> None:
        buffers = graphs.buffers
        values, results = buffers.inputs(role, sizes, sequences), buffers.outputs(role, sizes, sequences)
        self.graph = graphs.bind(role, values, results)
        self.inputs, self.outputs = _at_hand(values), _at_hand(results)
        self.values = values
        self.look_ups: list[BoundGraph] = []

    def release(self) -> None:
        """Let go of the sessions."""
        for graph in (self.graph, *self.look_ups):
            graph.release()


class TargetRun(_Run):
    """The target over `num_tokens`, with logits of `num_rows` of them."""

    def __init__(self, graphs: OpenedGraphs, num_tokens: int, num_rows: int, sequences: Collection[int]) -> None:
        """Bind the target for passes of `sequences`, by their numbers."""
        super().__init__(graphs, "target", {"tokens": num_tokens, "rows": num_rows, "batch": 1}, sequences)
        tokens = shared(np.zeros((1, num_tokens), np.int32))
        self.tokens = tokens.numpy()
        self.look_ups = [
            graphs.bind(role, {"token_ids": tokens}, {"embeddings": self.values[name]})
            for role, name in (("embedder", "embeddings"), ("per_layer_embedder", "per_layer_embeddings"))
        ]


class DraftRun(_Run):
    """One step of the drafter."""

    def __init__(self, graphs: OpenedGraphs, sequences: Collection[int]) -> None:
        """Bind the drafter for steps of `sequences`, by their numbers."""
        count = graphs.buffers.sequences
        super().__init__(graphs, "drafter", {"batch": count}, sequences)
        tokens = shared(np.zeros((count, 1), np.int32))
        self.tokens = tokens.numpy()
        spec = graphs.buffers.output_spec("embedder", "embeddings")
        embeddings = shared(np.zeros(sized(spec.shape, {"batch": count, "tokens": 1}), np.float32))
        self.embeddings = embeddings.numpy()
        self.look_ups = [graphs.bind("embedder", {"token_ids": tokens}, {"embeddings": embeddings})]

    def draft(self, sequence: int, *, with_candidates: bool) -> Draft:
        """Return a copy of the draft of one sequence."""
        best, activations = int(self.outputs["best"][sequence, 0]), self.outputs["projected_activations"][sequence, 0]
        if not with_candidates:
            return Draft(best, activations.copy(), None, None)
        candidates, scores = (self.outputs[name][sequence].copy() for name in ("candidates", "scores"))
        return Draft(best, activations.copy(), candidates, scores)


def _at_hand(values: Mapping[str, ort.OrtValue]) -> dict[str, Any]:
    """Return the memory of those values that the CPU can write and read in place."""
    return {name: value.numpy() for name, value in values.items() if value.device_name() == CPU}


def _closed(role: str) -> BackendError:
    return BackendError(f"{role} cannot run: its bundle is closed")
