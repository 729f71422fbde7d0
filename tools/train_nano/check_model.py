"""Compare `model.py` with transformers on the pair of a folder: hidden states, keys and values, logits, draft steps.

Exits non-zero if any difference exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM, Gemma4ForConditionalGeneration

from tools.train_nano.checkpoints import load_drafter, load_target

TOLERANCE = 2e-4  # float32, other order of sums; logits reach ± 30
LENGTH, ROUND_STARTS, CHAINED_STEPS = 300, (0, 5, 126, 127, 128, 129, 200, 298), 4


def worst(name: str, ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Print and return the largest difference."""
    difference = (ours.float() - reference.float()).abs().max().item()
    print(f"{name}: {difference:.2e}")
    return difference


@torch.inference_mode()
def main() -> int:
    """Run every comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[2] / "converter/mtp_export/nano"
    parser.add_argument("--nano", type=Path, default=default)
    folder = parser.parse_args().nano
    torch.manual_seed(0)
    target, drafter = load_target(folder / "target"), load_drafter(folder / "drafter")
    reference = Gemma4ForConditionalGeneration.from_pretrained(folder / "target", dtype=torch.float32)
    assistant = Gemma4AssistantForCausalLM.from_pretrained(folder / "drafter", dtype=torch.float32)
    AutoTokenizer.from_pretrained(folder / "target")

    ids = torch.randint(200, 4000, (2, LENGTH))
    out = reference(input_ids=ids, output_hidden_states=True, return_shared_kv_states=True)
    hidden, shared = target(ids)
    errors = [
        worst("post-norm hidden", hidden, out.hidden_states[-1]),
        worst("logits", target.logits(hidden), out.logits),
    ]
    for kind, pair in out.shared_kv_states.items():
        errors += [worst(f"{kind} {n}", a, b) for n, a, b in zip(("keys", "values"), shared[kind], pair, strict=True)]

    caches = target.new_caches(2, LENGTH, torch.float32)
    stepped = [target.step(ids[:, t : t + 1], torch.tensor([t]), caches) for t in range(LENGTH)]
    errors.append(worst("one token at a time", torch.cat(stepped, 1), hidden))

    embedder, state, tokens = reference.get_input_embeddings(), hidden, ids
    for step in range(CHAINED_STEPS):
        tokens = torch.roll(tokens, -1, 1)
        x, following = drafter(target.embed(tokens), state, shared)
        for t in ROUND_STARTS:
            short = {kind: (k[:, :, : t + 1], v[:, :, : t + 1]) for kind, (k, v) in shared.items()}
            single = assistant(
                inputs_embeds=torch.cat([embedder(tokens[:, t : t + 1]), state[:, t : t + 1]], -1),
                position_ids=torch.tensor([[t + 1]]),
                attention_mask=torch.ones(2, t + 2, dtype=torch.long),
                shared_kv_states=short,
            )
            errors.append(worst(f"step {step + 1} at {t}: hidden", following[:, t], single.last_hidden_state[:, 0]))
            ours = drafter.clustered_logits(x[:, t])
            chosen = ours.isfinite()
            errors.append(worst(f"step {step + 1} at {t}: logits", ours[chosen], single.logits[:, 0][chosen]))
        state = following
    return int(max(errors) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
