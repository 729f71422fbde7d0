"""The description of a machine: the name of its processor, and versions."""

from __future__ import annotations

import platform

import pytest

from mtp_export.machine import UNNAMED, cpu_name, processor, versions


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz \nflags\t\t: fpu\n", "Some CPU @ 2.00GHz"),
        ("processor\t: 0\nCPU part\t: 0xd0b\n", "cortex-a76"),
        ("processor\t: 0\nCPU part\t: 0xd4f\n", "Arm part 0xd4f"),
        ("processor\t: 0\nflags\t\t: fpu\n", UNNAMED),
    ],
)
def test_a_processor_is_named_as_linux_describes_it(cpuinfo: str, name: str) -> None:
    assert cpu_name(cpuinfo) == name


def test_this_processor_has_a_name() -> None:
    assert processor() not in ("", UNNAMED)


def test_a_package_that_is_not_installed_is_absent() -> None:
    described = versions(("numpy", "no-such-package-at-all"))
    assert described["python"] == platform.python_version()
    assert described["no-such-package-at-all"] == "absent"
    assert described["numpy"][0].isdigit()
