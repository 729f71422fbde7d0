"""docs/cli.md, made from the help text of every command.

python -m tools.cli_page > docs/cli.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from mtp_export.cli.exit_codes import EXIT_CODES
from mtp_export.cli.main import cli

_WIDTH = 100  # of the help texts, whatever the terminal's
_HEAD = """# The command line

This page is made from the help text of every command, by `python -m tools.cli_page > docs/cli.md`. A test compares it.

Results go to standard output. Notes, errors and progress go to standard error, one line each: `mtp-export: note: …`,
`mtp-export: error: …`, and, where standard error is no terminal and the work takes more than two seconds,
`mtp-export: working: …`. With `--json` standard output holds one JSON document and nothing else.
"""


def page() -> str:
    """Return the text of docs/cli.md."""
    parts = [_HEAD, _exit_codes(), *_commands(cli, "mtp-export")]
    return "\n".join(parts)


def _exit_codes() -> str:
    rows = [f"| {entry.code} | {entry.meaning} |" for entry in EXIT_CODES]
    checks = sorted(
        f"| `{command}` | {entry.code} | {meaning} |"
        for entry in EXIT_CODES
        for command, meaning in entry.by_command.items()
    )
    return "\n".join(
        (
            *(
                "## Exit codes",
                "",
                "They are the same for every command.",
                "",
                "| code | meaning |",
                "|---|---|",
                *rows,
            ),
            *("", "Commands that check something:", "", "| command | code | when |", "|---|---|---|", *checks, ""),
        )
    )


def _commands(command: click.Command, path: str) -> Iterator[str]:
    context = click.Context(command, info_name=path, terminal_width=_WIDTH, max_content_width=_WIDTH)
    context.help_option_names = cli.context_settings["help_option_names"]
    lines = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"## {path}\n\n```text\n{lines}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from _commands(below, f"{path} {name}")


if __name__ == "__main__":
    sys.stdout.write(page())
