"""Runs of a TFLite model of its own, beside a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, HardwareAccelerator, Options

from mtp_runtime.quiet import native_log_held_back

Step = Callable[[], object]


def litert_steps(path: Path, threads: int, inputs: Mapping[str, Any]) -> dict[str, Step]:
    """One run of each signature that `inputs` gives the first input of, with its buffers bound."""
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
    steps: dict[str, Step] = {}
    with native_log_held_back():
        model = CompiledModel.from_file(str(path), options=options)
        for name, values in inputs.items():
            index = model.get_signature_index(name)
            order = model.get_signature_by_index(index)
            bound = [model.create_input_buffer_by_name(name, tensor) for tensor in order["inputs"]]
            outputs = [model.create_output_buffer_by_name(name, tensor) for tensor in order["outputs"]]
            bound[0].write(values)
            steps[name] = partial(model.run_by_index, index, bound, outputs)
    return steps
