"""Contexts, rings and texts taken back in a version of LiteRT-LM, as further lines of its table."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LONGEST = 4096
CONTEXTS = (128, 200, 256, 300, 1000, 1024, 2040)
ROOMS = (16, 17, 19, 22, 25, 47, 100)  # tokens that are left for an answer; 16: the shortest prefill
RING = 512
OFFSETS = range(0, 136, 9)  # tokens before the end of a ring where passes begin
_LONGEST_S = 1200
Script = list[list[Any]]
Check = Callable[[str], Any]  # of a mode: its texts, or {"error": …}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs scripts with one version on two bundles, `without` and `with_rings` of 512."""

    python: Path
    without: Path
    with_rings: Path
    work: Path

    def results(self, bundle: Path, scripts: Sequence[Script], context: int, mode: str) -> list[list[Any]]:
        """Return the results of scripts.

        Raises:
            RuntimeError: the version fails, or does not end.
        """
        request_path, answer = self.work / "request.json", self.work / "answer.json"
        request = {"bundle": str(bundle), "context": context, "mode": mode, "scripts": list(scripts)}
        request_path.write_text(json.dumps(request), encoding="utf-8")
        command = [str(self.python), "-m", "tools.runtime_matrix.scripts", str(request_path), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False, cwd=ROOT)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no end within {_LONGEST_S} s") from error
        if done.returncode != 0:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-200:]}")
        results: list[list[Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return results

    def lines(self, modes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the results of each check by mode; of one that failed, its error."""
        checks: dict[str, Callable[[], Check]] = {
            f"a context of {context}, until full": partial(self._context, context) for context in CONTEXTS
        }
        checks |= {f"rings of {RING}": self._rings, "taken back too far": self._taken_back}
        lines = {}
        for name, prepared in checks.items():
            check = _or_error(prepared)
            lines[name] = {
                mode: check if isinstance(check, dict) else _or_error(partial(check, mode)) for mode in modes
            }
        return lines

    def _context(self, context: int) -> Check:
        prompts = [["prompt", context - room - 1, 331 * n] for n, room in enumerate(ROOMS)]
        cut: list[Script] = [[prompt, ["answer", room]] for prompt, room in zip(prompts, ROOMS, strict=True)]
        full: list[Script] = [[prompt, ["answer", LONGEST]] for prompt in prompts]
        expected = _texts(self.results(self.without, cut, LONGEST, "OFF"))
        return lambda mode: _equal(_texts(self.results(self.without, full, context, mode)), expected)

    def _rings(self) -> Check:
        scripts: list[Script] = [
            [["prompt", RING - offset, 13 * offset], ["prompt", tokens, 3000 + offset], ["answer", 40]]
            for offset in OFFSETS
            for tokens in (9, 150)
        ]
        expected = _texts(self.results(self.without, scripts, 1000, "OFF"))

        def check(mode: str) -> Any:
            texts = _texts(self.results(self.with_rings, scripts, 1000, mode))
            # With drafts all tokens of the last round are kept.
            return _equal([text[: len(short)] for text, short in zip(texts, expected, strict=True)], expected)

        return check

    def _taken_back(self) -> Check:
        before: Script = [["prompt", 300, 0], ["save", "here"]]
        behind: Script = [["prompt", 20, 3000], ["answer", 24], ["prompt", 180, 3300], ["answer", 24]]
        scripts: list[Script] = [
            [*before, ["prompt", further, 2000], ["answer", 24], ["rewind", "here"], *behind] for further in (400, 600)
        ]

        def check(mode: str) -> Any:
            results = self.results(self.with_rings, scripts, 2000, mode)
            return _equal([_all_answers(result[len(before) + 3 :]) for result in results], ["", ""])

        return check


def _or_error(run: Callable[[], Any]) -> Any:
    """Return what a function returns, or the error of a version that fails in it."""
    try:
        return run()
    except RuntimeError as error:
        return {"error": " ".join(str(error).split())}


def _all_answers(results: Sequence[Any]) -> str:
    """Return all answers in results; of an error, what it is."""
    errors = [result["error"] for result in results if isinstance(result, dict)]
    return errors[0] if errors else "".join("".join(result) for result in results if isinstance(result, list))


def _texts(results: Sequence[Sequence[Any]]) -> list[str]:
    return [_all_answers(one) for one in results]


def _equal(texts: list[str], expected: list[str]) -> Any:
    """Return the texts, or an error that counts those that are not what was expected."""
    wrong = [(text, other) for text, other in zip(texts, expected, strict=True) if text != other]
    if not wrong:
        return texts
    return {"error": f"{len(wrong)} of {len(texts)} differ: {wrong[0][0]!r} in place of {wrong[0][1]!r}"[:160]}
