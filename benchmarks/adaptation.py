"""A target is fine-tuned on a domain, its drafts are accepted less, and an adapted drafter wins that back: on nano.

    python -m benchmarks.adaptation [--tuning-steps 100 --steps 80 --threads 1]

The domain is bulletins of weather stations in a notation of their own, written by a seeded program. Acceptance is that
of the float pairs in rounds of 4 drafts, after every token of greedy answers to beginnings of bulletins that neither
training saw. Goal: the adapted drafter wins back 80 % of what the stock drafter lost.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import write_result
from mtp_calibration.choose.head import Rounds
from mtp_calibration.drafter.adapt import Adaptation, Watch, adapt
from mtp_calibration.drafter.models import load, save_like
from mtp_calibration.same_model.observe import Text
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.pair import open_made_from
from mtp_runtime import Session
from mtp_runtime.text.tokenizer import Tokenizer

GOAL = 0.8
LENGTH = 96  # tokens of a window that the target is tuned on
PROMPT, ANSWER = 24, 64  # tokens
JUDGED = 12  # bulletins


def bulletin(source: random.Random) -> str:
    """Return a station's report: much of it follows from the words before, and some does not."""
    station = source.choice(("KESTREL", "MARROW", "TANAGER", "OSPREY", "FULMAR", "PETREL"))
    force = source.randint(2, 9)
    knots = 4 * force + source.randint(0, 3)
    sea = ("smooth", "slight", "slight", "moderate", "moderate", "rough", "rough", "very rough", "high")[force - 1]
    falling = source.random() < 0.5
    lines = [
        f"<<{station}/{source.randint(10, 39)}>>",
        f"wnd={source.choice(('NNE', 'ESE', 'SSW', 'WNW'))}~{knots}kt gust~{knots + 8}kt bf~{force}",
        f"sea={sea}; vis={source.randint(1, 12)}nm; bar={source.randint(985, 1030)}hPa",
        "trend={falling slowly}; outlook={worse before dawn}" if falling else "trend={rising}; outlook={fair by noon}",
        "advise={small craft keep harbour}" if force > 5 else "advise={none}",
        f"<<end {station}>>",
    ]
    return "\n".join(lines) + "\n"


def windows(seed: int, count: int, length: int) -> list[list[int]]:
    """Token ids of bulletins one after another, cut into windows that begin as texts do."""
    source = random.Random(seed)
    tokenizer = Tokenizer.open(EMBEDDED / "target" / "tokenizer.json", 2)
    rows: list[list[int]] = []
    while len(rows) < count:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(bulletin(source))[1 if ids else 0 :]
        rows.append(ids[:length])
    return rows


def fine_tuned(folder: Path, steps: int, seed: int = 1) -> None:
    """Fine-tune nano's target on the domain and write it."""
    pair = open_made_from("nano", None, None, ())
    model = load(pair.target.folder, torch.device("cpu"))
    trained = [p.requires_grad_(True) for n, p in model.named_parameters() if "embed_tokens" not in n]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    texts = torch.tensor(windows(seed, 8 * steps, LENGTH))
    for number in range(steps):
        ids = texts[8 * number : 8 * number + 8]
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / 10) * (1 - number / steps)
        optimiser.step()
        optimiser.zero_grad()
        if number % 20 == 19:
            print(f"target: step {number + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    save_like(pair.target, model, folder)


def acceptance(target: Path | None, drafter: Path | None, prompts: Sequence[Sequence[int]]) -> float:
    """Accepted drafts a round of the float pair along its own greedy answers."""
    pair = open_made_from("nano", str(target) if target else None, str(drafter) if drafter else None, ())
    model = load(pair.target.folder, torch.device("cpu"))
    ids = torch.tensor(prompts)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    texts = [Text(str(i), "bulletin", tuple(row), PROMPT) for i, row in enumerate(generated.tolist())]
    rounds = Rounds(pair, texts)
    return float(np.mean(rounds.accepted(rounds.drafter.spec.head.top_k, 1)))


def outputs(target: Path, drafter: Path | None, folder: Path, prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Return the answers of the exported pair with drafts."""
    command = [str(Path(sys.executable).with_name("mtp-export")), "--model", "nano", "--recipe", "f32"]
    command += ["--checkpoint", str(target), "--output", str(folder), *(["--drafter", str(drafter)] if drafter else [])]
    subprocess.run(command, check=True, capture_output=True)
    with Session.open(folder, threads=1) as session:
        return [session.generate(ids, max_new_tokens=ANSWER).finish().tokens for ids in prompts]


def main() -> int:
    """Fine-tune, adapt, measure and write the result; return 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    judged, prompts = windows(2, JUDGED, PROMPT), windows(3, 48, PROMPT)
    with tempfile.TemporaryDirectory() as scratch:
        target, drafter = Path(scratch) / "target", Path(scratch) / "adapted"
        start = time.perf_counter()
        fine_tuned(target, options.tuning_steps)
        tuned_s = time.perf_counter() - start
        figures: dict[str, Any] = {"before": acceptance(None, None, judged), "tuned": acceptance(target, None, judged)}
        print(figures, flush=True)
        start = time.perf_counter()
        adapt(
            open_made_from("nano", str(target), None, ()),
            prompts,
            drafter,
            Adaptation(
                steps=options.steps, batch=6, learning_rate=1e-3, max_new_tokens=ANSWER, position_offset=1, seed=0
            ),
            watch=Watch(on_step=lambda step: print(step, flush=True) if step.number % 20 == 0 else None),
        )
        adapted_s = time.perf_counter() - start
        figures["adapted"] = acceptance(target, drafter, judged)
        stock = outputs(target, None, Path(scratch) / "stock", judged)
        adapted = outputs(target, drafter, Path(scratch) / "bundle", judged)
        lost, won = figures["before"] - figures["tuned"], figures["adapted"] - figures["tuned"]
        figures |= {
            "won_back": won / lost,
            "same_outputs": sum(a == b for a, b in zip(stock, adapted, strict=True)),
            "outputs": len(stock),
            "tuning": {"steps": options.tuning_steps, "seconds": round(tuned_s, 1)},
            "adapting": {"steps": options.steps, "prompts": len(prompts), "seconds": round(adapted_s, 1)},
            "threads": options.threads,
        }
    print(figures)
    print(f"written: {write_result('adaptation', figures)}")
    return 0 if figures["won_back"] >= GOAL and figures["same_outputs"] == figures["outputs"] else 1


if __name__ == "__main__":
    sys.exit(main())
