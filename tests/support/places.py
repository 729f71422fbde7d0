"""Where things lie that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Files of the published models, beside the checkout and not in a clone: tests that need them are skipped without.
PUBLISHED = ROOT.parent / "shared" / "published"
PUBLISHED_TEMPLATE = PUBLISHED / "chat_template_e2b_hf.jinja"
