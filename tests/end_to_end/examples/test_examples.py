"""The examples run on the real pair as they are given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Export
from tests.support.places import ROOT

EXAMPLES = ROOT / "examples"

# What each says at the end, as a pattern; an example without one only has to succeed and to say something.
SAYS = {
    "stream.py": r"\[[^\]]+\][\s\S]*\n\d+ tokens, [1-9]\d* of \d+ drafts accepted\n",
    "chat.py": r"\(0 of \d+ prompt tokens [\s\S]*\([1-9]\d* of \d+ prompt tokens reused\)[\s\S]*: the same reply\n",
    "tools.py": r'"a": 231, "b": 84[\s\S]*: 231 plus 84 is 315\.\n[\s\S]*: The word for Monday is lighthouse: '
    r"a tower with a bright light that guides ships\.\n[\s\S]*model: 7 plus 5 is 12\.\n",
}


# What stock LiteRT-LM runs: a container, and lines of the native library's log on standard error.
OF_STOCK = "litert_lm_chat.py"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_runs(export_nano: Export, name: str) -> None:
    bundle = export_nano("int8")
    path = bundle / "nano.litertlm" if name == OF_STOCK else bundle
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert name == OF_STOCK or not done.stderr
    assert re.search(SAYS.get(name, r"\S"), done.stdout), done.stdout


@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_without_a_bundle_says_what_it_takes(name: str, tmp_path: Path) -> None:
    for arguments, expected in (([], "BUNDLE"), ([str(tmp_path / "nothing")], "error: no bundle at ")):
        done = refused(name, *arguments)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_the_example_of_stock_litert_lm_says_what_it_takes() -> None:
    assert refused(OF_STOCK).stderr == "usage: python examples/litert_lm_chat.py BUNDLE.litertlm\n"


def refused(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    return done
