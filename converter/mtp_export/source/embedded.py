"""Where the embedded pair lies; apart from the pipeline, so that knowing it costs no import of torch."""

from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "nano"
