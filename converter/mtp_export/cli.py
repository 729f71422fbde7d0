"""The command line: options → values, values → text, errors → one line. Nothing heavy is imported here."""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
from typing import Any, NoReturn

import click

from mtp_runtime.errors import MtpError

_COMMANDS = {
    "export": "mtp_export.commands.export",
    "parity": "mtp_export.commands.parity",
    "run": "mtp_export.commands.run",
}
_DEFAULT = "export"


class _LazyGroup(click.Group):
    """Commands are imported when they are called; without one, options go to the default command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[name]).command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS:
            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="mtp-export")
def cli() -> None:
    """Export Gemma 4 E2B/E4B with its multi-token-prediction drafter, run it, and prove it.

    Without a command, options are those of `export`:

        mtp-export --model nano --target tflite
    """


def main() -> NoReturn:
    """Run the command line; every outcome is an exit code: 2 for the user's mistake, 1 for ours, 130 for Ctrl-C."""
    # A polite kill cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: Any = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MtpError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing half-written is left", 130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has seen enough
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug and report it)", 1)


def _fail(message: str, code: int) -> NoReturn:
    first_line = " ".join(message.split())
    click.echo(f"mtp-export: error: {first_line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
