"""The Kotlin core, compiled with the Kotlin that the app needs, and its own tests on the JVM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden.files import FOLDER
from tools.android_build.toolchain import CompileError, Toolchain, toolchain
from tools.fetched.debian import FetchError

CORE = Path(__file__).resolve().parents[2] / "android_demo" / "core" / "src"
TESTS = ("GoldenTest", "JsonTest", "ManifestTest", "RunTest")


@pytest.fixture(scope="module")
def kotlin() -> Toolchain:
    try:
        return toolchain()
    except FetchError as error:
        pytest.skip(f"no Kotlin: {error}")


def test_core_compiles_and_passes_its_tests(kotlin: Toolchain, tmp_path: Path) -> None:
    main, tests = tmp_path / "main", tmp_path / "tests"
    kotlin.compile([CORE / "main"], main)
    kotlin.compile([CORE / "test"], tests, classpath=[main])
    names = [f"io.mtpexport.core.{name}" for name in TESTS]
    done = kotlin.run_tests(names, [main, tests], golden=str(FOLDER))
    assert done.returncode == 0, done.stdout
    passed = re.search(r"^OK \((\d+) tests\)", done.stdout, re.MULTILINE)
    assert passed, done.stdout
    written = sum(path.read_text(encoding="utf-8").count("@Test") for path in (CORE / "test").rglob("*.kt"))
    assert int(passed[1]) == written


def test_what_does_not_compile_is_noticed(kotlin: Toolchain, tmp_path: Path) -> None:
    source = tmp_path / "Wrong.kt"
    source.write_text('fun wrong(): Int = "text"', encoding="utf-8")
    with pytest.raises(CompileError, match=r"Wrong\.kt:1:\d+: error"):
        kotlin.compile([source], tmp_path / "out")
