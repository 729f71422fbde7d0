"""Errors of an export."""

from mtp_runtime.errors import MtpError, UserError


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another architecture, or does not fit its pair."""


class OutputError(UserError):
    """The output exists already, cannot be written, or the disk is full."""


class GateError(MtpError):
    """An exported bundle is not the model that it was made from any more, or not closely enough."""
