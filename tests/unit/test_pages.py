"""Pages name files, modules and programs that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "mtp_export": ROOT / "converter",
    "mtp_runtime": ROOT / "runtime_py",
    "mtp_calibration": ROOT / "calibration",
    **dict.fromkeys(("benchmarks", "tests", "tools"), ROOT),
}
FOLDERS = ("android_demo", "benchmarks", "calibration", "converter", "docs", "examples", "runtime_py", "tests", "tools")
PAGES = sorted(
    (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "android_demo" / "README.md",
    )
)
SOURCE_NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
# Files that CONTRIBUTING.md tells the reader to write.
TO_BE_WRITTEN = frozenset(
    {
        *(f"converter/mtp_export/{folder}/vision.py" for folder in ("arch", "graph", "models")),
        "tests/differential/test_vision.py",
    }
)

_LINK = re.compile(r"\]\(([^)#\s]+)")
_PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)")
_SOURCE = re.compile(r"(?<![\w./-])((?:[\w]+/)*\w+\.py)\b")
_PROGRAM = re.compile(r"python -m ((?:benchmarks|tests|tools)[\w.]*\w)")
_DOTTED = re.compile(r"\b(mtp_(?:export|runtime|calibration)(?:\.\w+)+)")


def module_exists(name: str) -> bool:
    """Return whether a dotted name is a module or a package of this repository."""
    path = PACKAGES[name.partition(".")[0]] / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def file_exists(page: Path, name: str) -> bool:
    """Return whether a path, or a beginning of one (`docs/decisions/0005`), exists from the root or from the page."""
    return name in TO_BE_WRITTEN or (page.parent / name).exists() or any(ROOT.glob(f"{name}*"))


def missing(page: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the position and the name of everything that the text names and that does not exist."""
    for match in _LINK.finditer(text):
        if "://" not in match[1] and not file_exists(page, match[1]):
            yield match.start(1), match[1]
    for match in _PATH.finditer(text):
        if not file_exists(page, match[1]):
            yield match.start(1), match[1]
    for match in _SOURCE.finditer(text):
        path = match[1]
        if path.partition("/")[0] not in FOLDERS and Path(path).name not in SOURCE_NAMES:
            yield match.start(1), path
    for match in _PROGRAM.finditer(text):
        if not module_exists(match[1]):
            yield match.start(1), match[1]
    for match in _DOTTED.finditer(text):
        if not module_exists(match[1]) and not module_exists(match[1].rpartition(".")[0]):
            yield match.start(1), match[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    lines = [f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}: {name}" for at, name in missing(page, text)]
    if lines:
        pytest.fail("\n".join(("no such file or module:", *lines)), pytrace=False)
