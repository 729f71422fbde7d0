"""The token that ended a reply, which LiteRT-LM 0.18 feeds as zeros.

In a chat the runtime keeps that token, the last one that it drew, for the next prefill, and gives its position zeros in
place of its embeddings (0.18.1, measured with graphs that write down what they are fed; 0.19's nightly looks it up).
So prefill puts the right embeddings into a first row of zeros: those of the token that ends a call, or, where what
follows is what the chat template writes behind a reply, that ends a reply. It is taken that no token of a prompt is
embedded as zeros. Decode and verify are never fed such a row, and stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from mtp_export.formats.format import ReplyEnds
from mtp_export.formats.tflite.chain import LoweredGraph
from mtp_export.formats.tflite.rewriting import CODES, Rewriting, rewrite
from mtp_runtime.backends.litert.quiet import native_log_held_back

_INPUTS = ("embeddings", "per_layer_embeddings")
_CLOSE = 1e-3  # embeddings of two tokens differ by far more in sum


def embedded(embedders: Sequence[Path], token_ids: Sequence[int]) -> list[list[NDArray[np.float32]]]:
    """The embeddings of tokens, as the exported embedders give them to a runtime: by embedder and token."""
    rows: list[list[NDArray[np.float32]]] = []
    for path in embedders:
        with native_log_held_back():
            model = Interpreter(model_path=str(path), num_threads=1)
            model.allocate_tensors()
        (ids,), (result,) = model.get_input_details(), model.get_output_details()
        rows.append([])
        for token_id in token_ids:
            model.set_tensor(ids["index"], np.array([[token_id]], np.int32))
            model.invoke()
            rows[-1].append(np.array(model.get_tensor(result["index"]), np.float32))
    return rows


def with_reply_ends(lowered: LoweredGraph, ends: ReplyEnds, embedders: Sequence[Path]) -> LoweredGraph:
    """Rewrite a target, in place; `embedders` are the files of tokens' and of per-layer embeddings."""
    rows = embedded(embedders, [ends.reply, ends.call, ends.behind_reply])
    return rewrite(lowered, functools.partial(_ReplyEnds, rows))


class _ReplyEnds(Rewriting):
    def __init__(self, rows: Sequence[Sequence[NDArray[np.float32]]], model: Any, entry: Any, shared: Any) -> None:
        super().__init__(model, entry, shared)
        self._rows = rows
        self._new: list[Any] = []

    def run(self) -> None:
        if not self.entry.signatureKey.decode().startswith("prefill"):
            return
        places = {item.name.decode(): int(item.tensorIndex) for item in self.entry.inputs}
        x = places[_INPUTS[0]]
        first, second = (self._slice(x, at, 1) for at in (0, 1))
        is_missing = self._compared(CODES.EQUAL, schema.EqualOptionsT(), first, 0.0)
        difference = self._added(
            CODES.SUB, [second, self.constant(self._rows[0][2])], self.tensor(second), schema.SubOptionsT()
        )
        is_reply = self._compared(CODES.LESS, schema.LessOptionsT(), difference, _CLOSE)
        before = list(self.subgraph.operators)
        mended = {}
        for name, (reply, call, _) in zip(_INPUTS, self._rows, strict=True):
            whole = places[name]
            row = self._slice(whole, 0, 1)
            end = self._selected(is_reply, self.constant(reply), self.constant(call), row)
            kept = self._slice(whole, 1, self.shape(whole)[1] - 1)
            options = schema.ConcatenationOptionsT()
            options.axis = 1
            parts = [self._selected(is_missing, end, row, row), kept]
            mended[whole] = self._added(CODES.CONCATENATION, parts, self.tensor(whole), options)
        for operator in before:
            operator.inputs = np.array([mended.get(int(i), int(i)) for i in operator.inputs], np.int32)
        self.subgraph.operators = [*self._new, *before]

    def _added(self, code: int, inputs: Sequence[int], output: int, options: Any = None) -> int:
        """Append an operator to those that come before all others; returns its output."""
        operator = self.operator(code, inputs, [output])
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
            operator.builtinOptions = options
        self._new.append(operator)
        return output

    def _slice(self, tensor: int, start: int, count: int) -> int:
        """So many rows of tokens, from one on."""
        shape = self.shape(tensor)
        begin = np.array([0, start] + [0] * (len(shape) - 2), np.int32)
        size = [1, count, *shape[2:]]
        inputs = [tensor, self.constant(begin), self.constant(np.array(size, np.int32))]
        return self._added(CODES.SLICE, inputs, self.tensor(tensor, size), schema.SliceOptionsT())

    def _compared(self, code: int, options: Any, row: int, bound: float) -> int:
        """Whether the sum of a row's sizes is equal to, or less than, a bound. Shapes: row [1,1,H] -> [1,1,1] bool"""
        sizes = self._added(CODES.ABS, [row], self.tensor(row))
        reducing = schema.ReducerOptionsT()
        reducing.keepDims = True
        total = self._added(
            CODES.SUM, [sizes, self.constant(np.array([2], np.int32))], self.tensor(row, [1, 1, 1]), reducing
        )
        result = self.tensor(total)
        self.subgraph.tensors[result].type = schema.TensorType.BOOL
        return self._added(code, [total, self.constant(np.array(bound, np.float32))], result, options)

    def _selected(self, condition: int, one: int, other: int, like: int) -> int:
        return self._added(CODES.SELECT_V2, [condition, one, other], self.tensor(like), schema.SelectV2OptionsT())
