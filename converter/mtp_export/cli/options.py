"""Checks that commands share, made before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtp_runtime.errors import UserError


def check_bundle_options(bundle: Path, counts: Mapping[str, int]) -> None:
    """Check that `bundle` is a folder and that each count, by its option, is at least 1.

    Raises:
        UserError: with what was given and what to give.
    """
    for option, value in counts.items():
        if value < 1:
            raise UserError(f"{option} is {value}: give 1 or more")
    if not bundle.is_dir():
        raise UserError(f"{bundle} is no folder: give the folder that mtp-export wrote")


def check_torch_device(name: str) -> None:
    """Check that torch can compute on `cpu` or `cuda`, whichever is named.

    Raises:
        UserError: with what was given and what to give.
    """
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda, and torch finds none here: install its CUDA build, or take --device cpu")
