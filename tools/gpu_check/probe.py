"""Which operators does a GPU backend take? One of each form, cut out of real graphs, is compiled and run there.

Operators are run in processes of their own, many after another in one: a form that ends its process is a refusal too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mtp_export.check.stock_runtime import StockRequest, run_stock
from mtp_export.formats.tflite.gpu_table import COMPOSITE, Graph, Operator, open_graph
from mtp_runtime import Session
from mtp_runtime.errors import BackendError
from tools.gpu_check.cut import SIGNATURE, cut_out, inputs_for

BACKEND = "gpu"
_PROMPT, _TOKENS = "class Stack:\n    def push(self", 32
# Of the largest value. The CPU rounds activations to int8 where weights are quantised, the GPU does not: that makes a
# few hundredths.
TOLERANCE = 0.05


def collect(paths: Sequence[Path]) -> dict[str, tuple[Graph, Operator]]:
    """Return an operator of each form in some graphs, the smallest that there is of it."""
    forms: dict[str, tuple[int, Graph, Operator]] = {}
    for path in paths:
        graph = open_graph(path)
        for operator in graph.operators():
            size = _elements(graph, operator)
            if operator.form not in forms or size < forms[operator.form][0]:
                forms[operator.form] = (size, graph, operator)
    return {form: (graph, operator) for form, (_, graph, operator) in sorted(forms.items())}


def _elements(graph: Graph, place: Operator) -> int:
    subgraph = graph.model.subgraphs[place.subgraph]
    tensors = [subgraph.tensors[int(i)] for i in subgraph.operators[place.index].inputs if i >= 0]
    return sum(int(np.prod(tensor.shape)) if tensor.shape is not None else 1 for tensor in tensors)


def write_probes(forms: Mapping[str, tuple[Graph, Operator]], folder: Path) -> None:
    """A model, its inputs and its form for each, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (form, (graph, operator)) in enumerate(forms.items()):
        (folder / f"{number:04}.tflite").write_bytes(cut_out(graph, operator))
        np.savez(folder / f"{number:04}.npz", **cast(dict[str, Any], inputs_for(graph, operator)))
        (folder / f"{number:04}.txt").write_text(form, encoding="utf-8")


def run_probes(folder: Path) -> list[dict[str, Any]]:
    """Run the probes of a folder on the GPU; a row of the table for each."""
    names = sorted(path.stem for path in folder.glob("*.tflite"))
    rows: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in rows]:
        answers = folder / "answers.jsonl"  # the library has standard output for itself
        answers.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tools.gpu_check.probe", str(folder), *left]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if done.returncode > 0:  # not the backend's doing, which ends a process by a signal
            raise RuntimeError(done.stderr.decode(errors="replace")[-2000:])
        for line in answers.read_text(encoding="utf-8").splitlines() if answers.exists() else ():
            row = json.loads(line)
            rows[row.pop("name")] = row
        unfinished = [name for name in left if name not in rows]
        if unfinished:
            form = (folder / f"{unfinished[0]}.txt").read_text(encoding="utf-8")
            why = f"the process ended with code {done.returncode}"
            rows[unfinished[0]] = {"form": form, "delegated": False, "reason": why}
    return [rows[name] for name in names]


def try_composites(bundle: Path) -> dict[str, dict[str, Any]]:
    """A row for each form of a composite in a bundle at f32. LiteRT 2.3.0's own API ends on any, so they run where
    bundles do: LiteRT-LM takes them if it starts with a pair of them, which it does not where a graph is left to the
    CPU in part, and says in fp32 what the CPU says. All forms have that one verdict."""
    collected = collect(sorted(bundle.glob("*.tflite")))
    forms = [form for form, (_, operator) in collected.items() if operator.name == COMPOSITE]
    with Session.open(bundle) as session:
        expected = session.generate(_PROMPT, max_new_tokens=_TOKENS, num_draft_tokens=0).finish().tokens
        text = "".join(session.text_pieces(expected))
        path, length = session.bundle.path("litertlm"), session.manifest.context_length
    try:
        run = run_stock(
            StockRequest(
                model_path=str(path),
                prompts=[_PROMPT],
                max_new_tokens=_TOKENS,
                context_length=length,
                use_mtp=True,
                backend=BACKEND,
                activations="fp32",
            )
        )
        same = text and run.outputs[0].text.startswith(text)
        why = None if same else "accepted, and the text is another than the CPU's"
    except BackendError as error:
        why = str(error)
    verdict: dict[str, Any] = {"delegated": True} if why is None else {"delegated": False, "reason": why}
    return {form: {"form": form, **verdict} for form in forms}


def _main(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        path = folder / f"{name}.tflite"
        inputs = dict(np.load(folder / f"{name}.npz"))
        row = {"name": name, "form": path.with_suffix(".txt").read_text(encoding="utf-8"), **try_on_gpu(path, inputs)}
        with (folder / "answers.jsonl").open("a", encoding="utf-8") as answers:
            answers.write(json.dumps(row) + "\n")


def try_on_gpu(path: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Compile a model of one operator for the GPU alone, run it, and compare it with the CPU."""
    from ai_edge_litert.compiled_model import HardwareAccelerator

    with _log() as log:
        try:
            got = _run(path, inputs, HardwareAccelerator.GPU)
        except RuntimeError as error:
            return {"delegated": False, "reason": reason(log(), str(error))}
    expected = _run(path, inputs, HardwareAccelerator.CPU)
    off = max(_difference(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, expected, strict=True))
    if not off <= TOLERANCE:
        return {
            "delegated": False,
            "reason": f"accepted, and computed wrongly: off by {off:.2g} of the largest",
        }
    return {"delegated": True, "relative_difference": round(off, 9)}


def _difference(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Return the largest difference, in parts of the largest value."""
    largest = float(np.max(np.abs(expected), initial=0.0))
    return float(np.max(np.abs(actual - expected), initial=0.0)) / (largest or 1.0)


def reason(log: str, error: str) -> str:
    """Return the line of the delegate about the operator that it refuses."""
    _, _, after = log.partition("Following operations are not supported by GPU delegate:")
    lines = [line.strip() for line in after.splitlines() if line.strip()]
    return lines[0] if lines else (log.strip().splitlines() or [error])[-1][:300]


def _run(path: Path, inputs: Mapping[str, Any], accelerator: Any) -> list[Any]:
    from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, GpuOptions, HardwareAccelerator, Options

    options = Options(
        hardware_accelerators=accelerator,
        cpu_options=CpuOptions(num_threads=1),
        gpu_options=GpuOptions(enforce_f32=True),
    )
    model = CompiledModel.from_file(str(path), options=options)
    if accelerator == HardwareAccelerator.GPU and not model.is_fully_accelerated():
        raise RuntimeError("not wholly delegated")
    order = model.get_signature_by_index(0)
    ins = [model.create_input_buffer_by_name(SIGNATURE, name) for name in order["inputs"]]
    outs = [model.create_output_buffer_by_name(SIGNATURE, name) for name in order["outputs"]]
    for name, buffer in zip(order["inputs"], ins, strict=True):
        buffer.write(np.ascontiguousarray(inputs[name]))
    model.run_by_index(0, ins, outs)
    details = model.get_output_tensor_details(SIGNATURE)
    return [
        buffer.read(int(np.prod(details[name]["shape"])), np.dtype(details[name]["dtype"]))
        for name, buffer in zip(order["outputs"], outs, strict=True)
    ]


@contextlib.contextmanager
def _log() -> Iterator[Any]:
    """Keep what is written to file descriptor 2; gives a function that returns it."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.seek(0)
            return file.read().decode("utf-8", errors="replace")

        try:
            yield read
        finally:
            text = read()
            os.dup2(kept, 2)
            os.close(kept)
            sys.stderr.write(text)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
