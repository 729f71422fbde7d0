"""Debian packages of any release and architecture, downloaded and unpacked without installing them.

apt runs on a state of its own, so the machine's package lists and architectures stay as they are, and no root is
needed. The mirror is the one that the machine itself uses, and apt checks the archive's signatures as ever.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mtp_runtime.errors import UserError

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TIMEOUT_S = 900


class FetchError(UserError):
    """A package could not be fetched or unpacked."""


def mirror() -> str:
    """Return the Debian archive that this machine's apt is set up with, or `MTP_DEBIAN_MIRROR`.

    Raises:
        FetchError: there is none.
    """
    setting = os.environ.get("MTP_DEBIAN_MIRROR")
    if setting:
        return setting
    if shutil.which("apt-get") is None or not Path(_KEYRING).exists():
        raise FetchError("no apt with Debian's archive keyring here: run this on Debian 12 or newer")
    listed = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
    archives = [line for line in listed.splitlines() if line.rstrip("/").endswith("/debian")]
    if not archives:
        raise FetchError("apt has no Debian archive among its sources: name one with MTP_DEBIAN_MIRROR")
    return archives[0]


def fetch(release: str, architecture: str, packages: Sequence[str], folder: Path, *, alone: bool = False) -> None:
    """Download `packages` of a Debian release, with what they depend on unless `alone`, and unpack them in `folder`.

    Raises:
        FetchError: a package does not exist, the archive cannot be reached, or the disk is full.
    """
    state = folder.with_name(folder.name + ".apt")
    for name in ("lists/partial", "archives/partial", "etc", "parts"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    source = f"deb [arch={architecture} signed-by={_KEYRING}] {mirror()} {release} main\n"
    (state / "sources.list").write_text(source, encoding="utf-8")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Debug::NoLocking": "true",
        "Dir::Cache::archives": f"{state}/archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::parts": f"{state}/parts",
        "Dir::Etc::preferencesparts": f"{state}/parts",
        "Dir::Etc::sourcelist": f"{state}/sources.list",
        "Dir::Etc::sourceparts": f"{state}/parts",
        "Dir::State::lists": f"{state}/lists",
        "Dir::State::status": f"{state}/status",
    }
    apt = ["apt-get", "--quiet", "--quiet"]
    apt += [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run([*apt, "update"])
    if alone:
        _run([*apt, "download", *packages], cwd=state / "archives")
    else:
        _run([*apt, "--yes", "--download-only", "install", *packages])
    folder.mkdir(parents=True, exist_ok=True)
    for package in sorted((state / "archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(folder)])
    shutil.rmtree(state)


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not installed: run this on Debian 12 or newer") from None
    except subprocess.TimeoutExpired:
        raise FetchError(f"{command[0]} took longer than {_TIMEOUT_S} s: check the network and run it again") from None
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("E:")] or lines or ["?"]
        raise FetchError(f"{command[0]} failed: {errors[0]}: check the network and apt's sources, then run it again")
    return done.stdout
