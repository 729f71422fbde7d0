"""Runs of a TFLite model of its own, beside a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options
from numpy.typing import NDArray

from mtp_runtime.backends.litert.quiet import native_log_held_back

Step = Callable[[], object]


def litert_steps(
    path: Path,
    threads: int,
    inputs: Mapping[str, Mapping[str, NDArray[Any]]],
    in_place: Mapping[str, str] | None = None,
) -> dict[str, Step]:
    """One run of each signature that `inputs` gives the inputs of, with its buffers bound; `in_place` maps outputs to
    the inputs whose buffers they are written to."""
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
    steps: dict[str, Step] = {}
    with native_log_held_back():
        model = CompiledModel.from_file(str(path), options=options)
        for name, values in inputs.items():
            index = model.get_signature_index(name)
            order = model.get_signature_by_index(index)
            buffers = {tensor: model.create_input_buffer_by_name(name, tensor) for tensor in order["inputs"]}
            for tensor, buffer in buffers.items():
                buffer.write(values[tensor])
            outputs = [
                buffers.get((in_place or {}).get(tensor, "")) or model.create_output_buffer_by_name(name, tensor)
                for tensor in order["outputs"]
            ]
            steps[name] = partial(model.run_by_index, index, [buffers[tensor] for tensor in order["inputs"]], outputs)
    return steps
