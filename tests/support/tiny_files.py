"""Tiny checkpoints as files, and the real command over them.

    python -m tests.support.tiny_files FOLDER ARGUMENTS…

is `mtp-export ARGUMENTS…` that knows one model more: `tiny`, whose checkpoints lie in FOLDER/target and FOLDER/drafter.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import GraphSizes, PairSpec
from mtp_export.cli import main as cli

CACHE_LENGTH = 48


def save_pair(folder: Path) -> None:
    """Write a random pair as transformers saves it, with a tokenizer and a chat template."""
    from tests.support.tiny import Tiny, hf_drafter, hf_target
    from tests.support.toy_pair import tokenizer_json

    hf_target(Tiny()).save_pretrained(folder / "target")
    hf_drafter(Tiny()).save_pretrained(folder / "drafter")
    (folder / "target" / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (folder / "target" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")


MODELS = cast(dict[str, PairSpec], published.PAIRS)


def tiny_model(folder: Path) -> PairSpec:
    """Return the pair in `folder` as a model."""
    configs = [json.loads((folder / part / "config.json").read_text()) for part in ("target", "drafter")]
    return dataclasses.replace(
        published.NANO,
        name="tiny",
        target=gemma4.read_target_spec(configs[0], "target"),
        drafter=gemma4.read_drafter_spec(configs[1], "drafter"),
        sizes=GraphSizes(
            longest_context=CACHE_LENGTH,
            context_length=CACHE_LENGTH,
            num_draft_tokens=published.NANO.sizes.num_draft_tokens,
            prefill_lengths=(8,),
            ring_length=32,
        ),
    )


def pair_arguments(folder: Path) -> list[str]:
    return ["--model", "tiny", "--checkpoint", str(folder / "target"), "--drafter", str(folder / "drafter")]


def rewrite_json(path: Path, change: Callable[[Any], None] | Mapping[str, Any]) -> None:
    """Change a JSON file: by a function, or by keys whose new values are given (`...` deletes a key)."""
    document = json.loads(path.read_text(encoding="utf-8"))
    if callable(change):
        change(document)
    else:
        document |= change
        document = {key: value for key, value in document.items() if value is not ...}
    path.write_text(json.dumps(document), encoding="utf-8")


def rewrite_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a safetensors file, a dict of name → torch tensor."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def copy_pair(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


if __name__ == "__main__":
    MODELS["tiny"] = tiny_model(Path(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    cli.main()
