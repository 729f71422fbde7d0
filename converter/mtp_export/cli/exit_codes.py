"""Exit codes: one table for every command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

OK = 0
FAILED = 1
MISTAKE = 2
INCONCLUSIVE = 3
INTERRUPTED = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitCode:
    """An exit code.

    meaning: what it says for every command. by_command: what it says for a command that adds a meaning of its own.
    """

    code: int
    meaning: str
    by_command: Mapping[str, str] = dataclasses.field(default_factory=dict)


EXIT_CODES = (
    ExitCode(code=OK, meaning="The command did its work. A check passed."),
    ExitCode(
        code=FAILED,
        meaning="A check failed. Or the program failed: an inference library refused a graph, a process died, or there "
        "was an internal error. Or the reader of standard output left early.",
        by_command={
            "calibrate": "a bar is missed, a stored weight is wrong, or a valid answer is lost",
            "device parity": "an output differs and the difference is not a stated near-tie",
            "export --dry-run": "the bundle does not fit on a disk",
            "export --gate": "`calibrate` does not pass; no bundle is kept",
            "inspect": "the backend does not take every operator of target and drafter",
            "parity": "an output differs and the difference is not a stated near-tie",
            "plan": "the bundle does not fit on a disk",
        },
    ),
    ExitCode(
        code=MISTAKE,
        meaning="The user can put it right: an option, a file, a checkpoint, a bundle, a device, a full disk or a "
        "missing permission. One line on standard error says what to do.",
    ),
    ExitCode(
        code=INCONCLUSIVE,
        meaning="A check could compare nothing, so it neither passed nor failed.",
        by_command={"device parity": "no token was compared"},
    ),
    ExitCode(
        code=INTERRUPTED,
        meaning="Ctrl-C, SIGTERM or SIGHUP ended the command. Nothing half-written is left.",
    ),
)
