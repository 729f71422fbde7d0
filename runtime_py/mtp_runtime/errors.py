"""Errors of the runtime and the converter: every one is an `MtpError`.

A message says what was got, what was expected and what to do, on one line.
`exit_code` is what a command-line program ends with: 2 for the user's mistake, 1 for ours.
"""


class MtpError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        """Take the message; what it quotes from files may hold line breaks or control codes, and they become spaces."""
        printable = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(" ".join(printable.split()))


class UserError(MtpError):
    """The input, an option or the environment is wrong, and the user can put it right."""

    exit_code = 2


class BundleError(UserError):
    """A bundle is missing, damaged, of another kind or of a newer version."""


class ContextFullError(UserError):
    """A prompt or a generation does not fit the context that the bundle was opened at."""


class RowsLostError(UserError):
    """A text is taken back further than the rings of sliding layers reach."""


class BackendError(MtpError):
    """The inference library refused a graph or failed while it ran."""
