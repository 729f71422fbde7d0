"""What a checkout always has: its five folders, its dependencies, and code behind every extra."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from tests.support.places import ROOT

FOLDERS = ("converter", "runtime_py", "android_demo", "calibration", "tests")
DEPENDENCIES = ("litert-torch", "torch", "onnx", "onnxruntime", "numpy", "click")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


def names_of(requirements: list[str]) -> set[str]:
    """Return the packages that requirements are of."""
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_something_in_it(folder: str) -> None:
    assert any((ROOT / folder).rglob("*.kt" if folder == "android_demo" else "*.py"))


def test_a_readme_is_there_and_is_the_projects(project: dict[str, Any]) -> None:
    assert project["readme"] == "README.md"
    assert (ROOT / "README.md").read_text(encoding="utf-8").startswith("# ")


def test_an_export_requires_its_libraries(project: dict[str, Any]) -> None:
    required = names_of(project["dependencies"]) | names_of(project["optional-dependencies"]["export"])
    assert set(DEPENDENCIES) <= required


@pytest.mark.parametrize(
    ("extra", "package", "place"),
    [
        ("tensorflow", "tensorflow", "tests/end_to_end/formats/test_tensorflow.py"),
        ("webgpu", "onnxruntime_ep_webgpu", "runtime_py/mtp_runtime/backends/onnx"),
        ("device", "adbutils", "converter/mtp_export/device/adb.py"),
    ],
)
def test_an_extra_has_code_that_uses_it(extra: str, package: str, place: str, project: dict[str, Any]) -> None:
    assert extra in project["optional-dependencies"]
    path = ROOT / place
    sources = [path] if path.is_file() else sorted(path.glob("*.py"))
    assert any(package in source.read_text(encoding="utf-8") for source in sources)
