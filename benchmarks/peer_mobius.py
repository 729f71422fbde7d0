"""A text model that mobius-onnx built, in ONNX Runtime: a part of `benchmarks.peers`.

    python -m benchmarks.peer_mobius MODEL.onnx THREADS NEW_TOKENS < prompts.json

As `peer_llama_cpp.py`: greedy, prompts as token ids, milliseconds of all tokens but the first. Caches go in and come
out as the graph has it: outputs of a step are the inputs of the next, without a copy in between.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime as ort


def main() -> None:
    """Measure and print."""
    path, threads, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = []
    for prompt in json.load(sys.stdin):
        caches = {
            spec.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32))
            for spec in session.get_inputs()
            if spec.name.startswith("past_key_values.")
        }
        token, length = _step(session, prompt, 0, caches), len(prompt)
        tokens, started = [token], time.perf_counter()
        while len(tokens) < new_tokens:
            token, length = _step(session, [token], length, caches), length + 1
            tokens.append(token)
        outputs.append({"tokens": tokens, "ms": 1000.0 * (time.perf_counter() - started)})
    print(json.dumps({"version": f"mobius-onnx 0.1.0, onnxruntime {ort.__version__}", "outputs": outputs}))


def _step(session: ort.InferenceSession, tokens: list[int], position: int, caches: dict[str, Any]) -> int:
    """Process tokens, put their caches in place of those before, and return the first choice after them."""
    binding, count = session.io_binding(), len(tokens)
    binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, position + count), np.int64))
    binding.bind_cpu_input("position_ids", np.arange(position, position + count)[None])
    for name, value in caches.items():
        binding.bind_ortvalue_input(name, value)
    names = [spec.name for spec in session.get_outputs()]
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    outputs = dict(zip(names, binding.get_outputs(), strict=True))
    for name in caches:
        caches[name] = outputs[name.replace("past_key_values", "present")]
    return int(outputs["logits"].numpy()[0, -1].argmax())


if __name__ == "__main__":
    main()
