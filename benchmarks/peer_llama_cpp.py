"""A GGUF in llama.cpp: a part of `benchmarks.peers`, run by a Python that has llama-cpp-python.

    python benchmarks/peer_llama_cpp.py MODEL.gguf THREADS NEW_TOKENS < prompts.json

Prompts are lists of token ids, so that no tokenizer takes part. Prints the version, and of each prompt the tokens
that follow greedily and the milliseconds that all but the first took, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import llama_cpp


def main() -> None:
    """Measure and print."""
    path, threads, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    outputs = []
    for prompt in json.load(sys.stdin):
        model.reset()
        tokens: list[int] = []
        started = 0.0
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            started = started or time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        outputs.append({"tokens": tokens, "ms": 1000.0 * (time.perf_counter() - started)})
    print(json.dumps({"version": f"llama-cpp-python {version('llama-cpp-python')}", "outputs": outputs}))


if __name__ == "__main__":
    main()
