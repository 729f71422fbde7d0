"""The command line: options become values, values become text, errors become one line.

Nothing heavy is imported here: a command's module is imported when it is called.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from mtp_export.arch.published import PAIRS
from mtp_export.cli.exit_codes import FAILED, INTERRUPTED, MISTAKE, OK
from mtp_export.cli.options import EMBEDDED_MODEL
from mtp_runtime.errors import MtpError

_COMMANDS = {
    "adapt": "mtp_export.cli.adapt",
    "bench": "mtp_export.cli.bench",
    "calibrate": "mtp_export.cli.calibrate",
    "cluster": "mtp_export.cli.cluster",
    "device": "mtp_export.cli.device",
    "export": "mtp_export.cli.export",
    "inspect": "mtp_export.cli.inspect",
    "parity": "mtp_export.cli.parity",
    "plan": "mtp_export.cli.plan",
    "report": "mtp_export.cli.report",
    "run": "mtp_export.cli.run",
}
_DEFAULT = "export"
_MAX_LINE = 1000  # characters of an error; names from damaged files can be of any length
_HELP = f"""Export Gemma 4 with its multi-token-prediction (MTP) drafter for LiteRT-LM and ONNX Runtime.

    Models: {", ".join(PAIRS)}. Without a command, the options are those of `export`:

        mtp-export --model {EMBEDDED_MODEL} --format tflite
    """


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
        args = args or ["--help"]
        own = {"--help", "-h", "--version"}
        if args[0].startswith("-") and args[0] not in own:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS:
            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_LazyGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="mtp-export")
def cli() -> None:
    pass


def main() -> NoReturn:
    """Run the command line and end the process with a code of `exit_codes.EXIT_CODES`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)  # a polite kill cleans up like Ctrl-C does
    try:
        code = _invoke()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be reported
        sys.exit(code)
    except MtpError as error:
        _fail(str(error), error.exit_code)
    except click.UsageError as error:
        message = error.format_message()
        see = f" See '{error.ctx.command_path} --help'." if error.ctx and "Did you mean" not in message else ""
        _fail(message + see, MISTAKE)
    except click.ClickException as error:
        _fail(error.format_message(), MISTAKE)
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C changes nothing
        _fail("interrupted; nothing half-written is left", INTERRUPTED)
    except BrokenPipeError:
        _give_up_output()  # the reader of the output has left
        sys.exit(FAILED)
    except Exception as error:  # noqa: BLE001  the last resort: a traceback is shown with --debug
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _give_up_output()  # a command answers for its files, so this is the output, or a temporary file
            _fail("no space left to write to: free some space", MISTAKE)
        _fail(f"internal error: {type(error).__name__}: {error} (run again with --debug and report it)", FAILED)


def _invoke() -> int:
    """Run the command and return its exit code."""
    try:
        result: Any = cli.main(standalone_mode=False)
    except SystemExit as ended:
        result = ended.code
    return result if isinstance(result, int) else OK


def _give_up_output() -> None:
    """Discard the rest of the output; else Python writes it once more at its end, and prints an error."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _fail(message: str, code: int) -> NoReturn:
    if "--debug" in sys.argv:
        traceback.print_exc()
    line = " ".join(message.split())
    if len(line) > _MAX_LINE:
        line = line[:_MAX_LINE] + "…"
    click.echo(f"mtp-export: error: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
