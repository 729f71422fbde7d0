"""Does an exported `…-ct` checkpoint compute what its stored integers mean? And which 2-bit products are fast?

    python -m benchmarks.stored_integers

nano's target as both published kinds store it (tools.synthesize), exported in both formats, over 40 random tokens in
passes of five, against transformers with the integers restored to floats. The runtimes round activations to int8, so
logits differ a little. Then ONNX Runtime's product of [512,1536] at 2 bits: time of one row, and whether a row has the
same bits among others, by the columns of a block.
"""

from __future__ import annotations

import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from benchmarks.machine import ROOT, write_result
from mtp_export.arch.published import NANO
from mtp_export.cli import main as cli
from mtp_export.source.checkpoint import Checkpoint
from mtp_runtime import Session
from tools.synthesize import layout, quantised
from tools.synthesize.__main__ import synthesize

FOLDER = ROOT / "build" / "stored_integers"
TOKENS, PASS = 40, 5
ROWS, COLUMNS = 512, 1536


def main() -> int:
    """Measure, print and write the result; return 1 if logits have little to do with transformers'."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    logits = [row for variant in quantised.VARIANTS for row in compare(variant)]
    products = [two_bits(size) for size in (32, 64, 128, 256)]
    for row in (*logits, *products):
        print(row)
    print(f"written: {write_result('stored_integers', {'logits': logits, 'products_of_2_bits': products})}")
    return 0 if all(row["least_correlation"] > 0.99 for row in logits) else 1


def compare(variant: str) -> list[dict[str, Any]]:
    """Both formats of one kind against transformers."""
    pair = FOLDER / variant
    if not pair.exists():
        synthesize("nano", pair, variant=variant, depth=Fraction(1), seed=0)
    ids = torch.randint(5, NANO.target.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = restored(pair / "target")(ids).logits[0].numpy()
    rows = []
    for export_format in ("tflite", "onnx"):
        logits = logits_of(exported(pair, export_format), ids[0].tolist())
        correlation = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(logits, expected, strict=True)]
        rows.append(
            {
                "variant": variant,
                "export_format": export_format,
                "least_correlation": round(min(correlation), 4),
                "mean_correlation": round(statistics.mean(correlation), 4),
                "same_first_choice": f"{int((logits.argmax(1) == expected.argmax(1)).sum())} of {TOKENS}",
            }
        )
    return rows


def restored(folder: Path) -> Gemma4ForCausalLM:
    """transformers' model with the floats that the stored integers mean."""
    target = Checkpoint(folder, "target")
    state = {}
    for tensor in layout.target_tensors(NANO.target, unused_caches=False):
        name = tensor.name.removeprefix(layout.TARGET_PREFIX)
        matrix = target.quantised(name, tensor.shape)
        if matrix is None:
            values = target.rows(name, 0, tensor.shape[0])
        else:
            integers, scales = target.quantised_rows(matrix, 0, tensor.shape[0])
            values = (integers.reshape(*scales.shape, -1) * scales[..., None]).reshape(tensor.shape)
        state[f"model.{name}"] = torch.from_numpy(values)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = Gemma4ForCausalLM(Gemma4TextConfig(**target.config["text_config"]))
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise AssertionError(f"no values for {missing}")
    model.train(False)
    return model


def exported(pair: Path, export_format: str) -> Path:
    """Return the bundle of a pair, exported if it is not there."""
    bundle = pair.with_name(f"{pair.name}-{export_format}")
    if not bundle.exists():
        options = ["--model", "nano", "--target", export_format, "--output", str(bundle)]
        arguments = ["export", *options, "--checkpoint", str(pair / "target"), "--drafter", str(pair / "drafter")]
        cli.cli.main(arguments, standalone_mode=False)
    return bundle


def logits_of(bundle: Path, ids: list[int]) -> NDArray[np.float32]:
    """Return logits of every token. Shapes: -> [T,V]"""
    logits = []
    with Session.open(bundle) as session:
        for start in range(0, len(ids), PASS):
            logits.append(session.backend.verify(ids[start : start + PASS]).logits)
            session.backend.kv_cache.advance(PASS)
    return np.concatenate(logits)


def two_bits(block: int) -> dict[str, Any]:
    """Return time of a row, and whether it has the same bits among 2, 3, 5 and 8."""
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, (ROWS, COLUMNS // block, block // 4), dtype=np.uint8)
    scales = generator.uniform(0.01, 0.02, (ROWS, COLUMNS // block)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "packed", "scales"],
        ["y"],
        domain="com.microsoft",
        bits=2,
        block_size=block,
        N=ROWS,
        K=COLUMNS,
        accuracy_level=4,
    )
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, "T", c]) for n, c in (("x", COLUMNS), ("y", ROWS))]
    weights = [numpy_helper.from_array(a, n) for a, n in ((packed, "packed"), (scales, "scales"))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # the runtime has set up the process's pool
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = generator.standard_normal((1, 8, COLUMNS)).astype(np.float32)
    rows = [session.run(None, {"x": x[:, :count]})[0][0, 0] for count in (1, 2, 3, 5, 8)]
    times = []
    for _ in range(200):
        started = time.perf_counter()
        session.run(None, {"x": x[:, :1]})
        times.append(1e6 * (time.perf_counter() - started))
    return {
        "block": block,
        "one_row_us": round(statistics.median(times)),
        "same_bits": all(np.array_equal(row, rows[0]) for row in rows),
    }


if __name__ == "__main__":
    sys.exit(main())
