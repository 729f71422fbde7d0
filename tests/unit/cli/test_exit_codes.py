"""The table of exit codes holds what the code exits with."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mtp_export import errors as export_errors
from mtp_export.cli import exit_codes
from mtp_export.cli.exit_codes import EXIT_CODES
from mtp_export.cli.main import cli
from mtp_runtime import errors as runtime_errors

CLI = Path(exit_codes.__file__).parent
NAMES = {name: value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}


def exits(path: Path) -> Iterator[tuple[int, str | int]]:
    """Yield the line and the code, as its name or number, of every `sys.exit(…)` and `_fail(…, code)` of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "_fail"):
            last = node.args[-1]
            for value in (last.body, last.orelse) if isinstance(last, ast.IfExp) else (last,):
                if isinstance(value, ast.Constant) and isinstance(value.value, int):
                    yield node.lineno, value.value
                elif isinstance(value, ast.Name) and value.id.isupper():
                    yield node.lineno, value.id


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_a_command_exits_with_a_code_of_the_table(path: Path) -> None:
    codes = {entry.code for entry in EXIT_CODES}
    wrong = [f"{path}:{line}: {code}" for line, code in exits(path) if NAMES.get(str(code), code) not in codes]
    assert not wrong


def test_every_name_is_in_the_table_once() -> None:
    assert sorted(NAMES.values()) == [entry.code for entry in EXIT_CODES]


@pytest.mark.parametrize("module", [export_errors, runtime_errors], ids=lambda module: module.__name__)
def test_every_error_has_a_code_of_the_table(module: object) -> None:
    errors = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert errors
    for error in errors:
        expected = exit_codes.MISTAKE if issubclass(error, runtime_errors.UserError) else exit_codes.FAILED
        assert error.exit_code == expected  # type: ignore[attr-defined]  # every error here is an MtpError


def test_the_table_names_commands_that_exist() -> None:
    context = click.Context(cli)
    for entry in EXIT_CODES:
        for line in entry.by_command:
            name, *words = line.split()
            command = cli.get_command(context, name)
            assert command is not None, line
            for word in words:
                if isinstance(command, click.Group):
                    command = command.get_command(context, word)
                    assert command is not None, line
                else:
                    assert any(word in option.opts for option in command.params), line
