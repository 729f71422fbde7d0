"""The Python that is sent to a device: all that the module there imports, and nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mtp_export.device.places import MODULE
from mtp_export.device.transfer import code_archive, imported_modules


def test_the_module_runs_from_the_archive_alone(tmp_path: Path) -> None:
    archive = code_archive(tmp_path, MODULE).path
    code = f"import sys, {MODULE} as module; print(module.__file__, *sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(archive)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path, *modules = done.stdout.split()
    assert path.startswith(str(archive))
    assert not {"torch", "litert_torch", "transformers", "mtp_calibration"} & set(modules)


def test_the_archive_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = code_archive(tmp_path, MODULE), code_archive(tmp_path / "again", MODULE)
    assert first.sha256 == second.sha256
    assert not [name for name in zipfile.ZipFile(first.path).namelist() if "models" in name]


def test_imports_are_followed_within_a_package(tmp_path: Path) -> None:
    files = {
        "top/__init__.py": "",
        "top/a.py": "import json\nfrom top.inner import b\nfrom top.inner.c import value\n",
        "top/inner/__init__.py": "",
        "top/inner/b.py": "import top.d\n\ndef later():\n    import top.unused\n",
        "top/inner/c.py": "value = 1\n",
        "top/d.py": "from top import a\n",
        "top/unused.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    names = {path.as_posix() for path in imported_modules(tmp_path, "top.a")}
    assert names == files.keys() - {"top/unused.py"}
