"""`mtp-export` for a pair of `tools.synthesize --depth`, which has fewer layers than the model that it is named after.

    python -m benchmarks.shallow export --model e2b --checkpoint DIR --drafter DIR …

The model's own specs are replaced by what the checkpoint's config says; all else is the command's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import cast

from mtp_export.arch import gemma4, published
from mtp_export.arch.spec import PairSpec
from mtp_export.cli import main as cli


def main() -> None:
    """Run the command on what is left of its model."""
    arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    path = Path(arguments["--checkpoint"]) / "config.json"
    target = gemma4.read_target_spec(json.loads(path.read_text(encoding="utf-8")), str(path))
    pairs = cast(dict[str, PairSpec], published.PAIRS)
    pairs[arguments["--model"]] = dataclasses.replace(pairs[arguments["--model"]], target=target)
    cli.main()


if __name__ == "__main__":
    main()
