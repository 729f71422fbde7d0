"""What the emulated place is made of: an ARM64 root from Debian's packages, the runtimes' aarch64 wheels, and qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tools.fetched.cache import prepared
from tools.fetched.debian import FetchError, fetch

# adbd is packaged since trixie. Debian 12's qemu 7.2 shows programs the host's /proc/cpuinfo, and LiteRT crashes on it.
RELEASE = "trixie"
ROOT_PACKAGES = ("adbd", "libstdc++6", "mksh", "python3", "toybox", "zlib1g")
EMULATOR_PACKAGES = ("qemu-user",)
PYTHON = "3.13"  # trixie's

# What mtp_runtime and stock LiteRT-LM import on the device, in the versions that are installed here.
WHEELS = ("ai-edge-litert", "click", "litert-lm-api", "msgspec", "numpy", "onnxruntime", "tokenizers")
_LITERT_NEEDS = ("flatbuffers", "ml-dtypes")
_IMPORTED = (
    "ai_edge_litert.compiled_model",
    "litert_lm",
    "msgspec",
    "numpy",
    "onnxruntime",
    "tokenizers",
    # of the standard library
    "argparse",
    "contextlib",
    "importlib.metadata",
    "json",
    "subprocess",
    "tempfile",
    "zipfile",
)
# Of the LiteRT wheel, for GPUs only: loading it ends the process on a CPU without LSE atomics, as cortex-a53 is.
_NEEDS_LSE = ("ai_edge_litert/libLiteRtWebGpuAccelerator.so",)
_LAYOUT = "2"  # raise it when what `_build` makes of these packages changes


def build_root() -> Path:
    """Return the folder with `root` (the ARM64 file system) and `qemu-aarch64`, building it if it is not cached.

    Raises:
        FetchError: a package cannot be had.
    """
    parts = [_LAYOUT, RELEASE, *ROOT_PACKAGES, *EMULATOR_PACKAGES, *_pinned_wheels()]
    return prepared("arm64-device", parts, _build)


def _pinned_wheels() -> list[str]:
    try:
        return [f"{name}=={version(name)}" for name in (*WHEELS, *_LITERT_NEEDS)]
    except PackageNotFoundError as error:
        raise FetchError(f"{error.name} is not installed: run make test, or pip install '.[export,dev]'") from None


def _build(folder: Path) -> None:
    fetch(RELEASE, "amd64", EMULATOR_PACKAGES, folder / "emulator", alone=True)
    (folder / "emulator/usr/bin/qemu-aarch64").rename(folder / "qemu-aarch64")
    shutil.rmtree(folder / "emulator")
    root = folder / "root"
    fetch(RELEASE, "arm64", ROOT_PACKAGES, root)
    for name in ("bin", "sbin", "lib"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "system", "data/local/tmp", "run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "system/bin").symlink_to("../usr/bin")
    (root / "usr/bin/sh").unlink(missing_ok=True)
    (root / "usr/bin/sh").symlink_to("mksh")
    for name in _toybox_commands(folder):
        if not (root / "usr/bin" / name).exists():
            (root / "usr/bin" / name).symlink_to("toybox")
    _add_wheels(root / "opt/site")
    output = _emulated(folder, "--version")
    (folder / "emulator-version").write_text(output.splitlines()[0].split(" (")[0] + "\n", encoding="utf-8")
    _compile(folder)


def _toybox_commands(folder: Path) -> list[str]:
    return _emulated(folder, str(folder / "root/usr/bin/toybox")).split()


def _compile(folder: Path) -> None:
    """Have Python write the bytecode of what is imported on the device: compiling it there takes a quarter minute."""
    root = folder / "root"
    python = str(root / f"usr/bin/python{PYTHON}")
    settings = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(root / "opt/site"), "PYTHONHASHSEED": "0"}
    _emulated(folder, python, "-c", f"import {', '.join(_IMPORTED)}", environ=settings)


def _emulated(folder: Path, *command: str, environ: dict[str, str] | None = None) -> str:
    call = [str(folder / "qemu-aarch64"), "-L", str(folder / "root"), *command]
    done = subprocess.run(call, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise FetchError(f"an emulated program does not run: {' '.join(lines[-1:]) or f'exit {done.returncode}'}")
    return done.stdout


def _add_wheels(site: Path) -> None:
    wheels = site.with_name("wheels")
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28, 31, 34)] + ["manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--dest", str(wheels)]
    command += [part for platform in platforms for part in ("--platform", platform)]
    done = subprocess.run([*command, *_pinned_wheels()], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        raise FetchError(f"pip found no aarch64 wheels: {' '.join(errors[-1:])}: check the network and run it again")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for name in _NEEDS_LSE:
        (site / name).unlink()
    shutil.rmtree(wheels)
