"""The target of a portable ONNX bundle in OpenVINO: a part of `benchmarks.peers`, run by a Python that has OpenVINO.

    python benchmarks/peer_openvino.py TARGET.onnx INPUTS.npz… THREADS

Each file holds the inputs of one pass as the reference runtime gave them. Prints the version, and of each file the
median milliseconds and the first choices, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino

WARM_UP, REPEATS = 3, 20


def main() -> None:
    """Measure and print."""
    model_path, *files, threads = sys.argv[1:]
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model_path), "CPU", {"INFERENCE_NUM_THREADS": int(threads)})
    passes = {}
    for file in files:
        request = compiled.create_infer_request()
        for name, values in np.load(file).items():
            request.set_tensor(name, openvino.Tensor(np.array(values)))
        times = []
        for _ in range(WARM_UP + REPEATS):
            started = time.perf_counter()
            request.infer()
            times.append(1000.0 * (time.perf_counter() - started))
        choices = request.get_tensor("logits").data[0].argmax(-1).tolist()
        passes[Path(file).stem] = {"ms": float(np.median(times[WARM_UP:])), "first_choices": choices}
    print(json.dumps({"version": openvino.__version__, "passes": passes}))


if __name__ == "__main__":
    main()
