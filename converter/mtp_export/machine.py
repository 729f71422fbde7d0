"""Describe the machine that a result was measured on: its processor and the versions of the packages."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The architecture that /proc/cpuinfo's part numbers of Arm stand for, as far as an emulator can be set to it.
_ARM_PARTS = {"0xd03": "cortex-a53", "0xd0b": "cortex-a76"}
UNNAMED = "a processor without a name"


def cpu_name(cpuinfo: str) -> str:
    """Return the name of the processor that a text like Linux's /proc/cpuinfo describes, `UNNAMED` if it has none."""
    part = re.search(r"^CPU part\s*: (\S+)", cpuinfo, re.MULTILINE)
    if part:
        return _ARM_PARTS.get(part[1], f"Arm part {part[1]}")
    name = re.search(r"^model name\s*: (.+)", cpuinfo, re.MULTILINE)
    return name[1].strip() if name else UNNAMED


def processor() -> str:
    """Return the name of this machine's processor, or its architecture where the system does not know the name."""
    try:
        name = cpu_name(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        name = platform.processor() or UNNAMED
    return platform.machine() if name == UNNAMED else name


def usable_cores() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def system() -> str:
    """Return the operating system with its version."""
    return platform.platform()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of packages; "absent" for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
