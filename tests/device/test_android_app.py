"""The Kotlin core and the app, compiled with the Kotlin that LiteRT-LM's AAR needs: the core's own tests on the JVM,
and the app in an APK that is signed and opened again. Nothing here runs on Android."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

import msgspec
import pytest

from mtp_export.device.app import AppReport, AppRequest, read_report
from mtp_export.device.bench import Measurement, summarise
from tests.conftest import Export
from tests.end_to_end.golden.files import FOLDER
from tools.android_build.apk import DEMO, build_apk, packager
from tools.android_build.toolchain import CompileError, Toolchain, toolchain
from tools.fetched.debian import FetchError

CORE = DEMO / "core/src"
TESTS = ("BundlesTest", "GoldenTest", "JsonTest", "ManifestTest", "MemoryTest", "RunTest")


@pytest.fixture(scope="module")
def kotlin() -> Toolchain:
    try:
        return toolchain()
    except FetchError as error:
        pytest.skip(f"no Kotlin: {error}")


@pytest.fixture(scope="module")
def core(kotlin: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = tmp_path_factory.mktemp("core")
    kotlin.compile([CORE / "main"], classes)
    return classes


def test_the_core_passes_its_tests_and_python_reads_its_report(
    kotlin: Toolchain, core: Path, tmp_path: Path, export_nano: Export
) -> None:
    tests, report = tmp_path / "tests", tmp_path / "report.json"
    kotlin.compile([CORE / "test"], tests, classpath=[core])
    names = [f"io.mtpexport.core.{name}" for name in TESTS]
    done = kotlin.run_tests(names, [core, tests], golden=str(FOLDER), report=str(report))
    assert done.returncode == 0, done.stdout
    passed = re.search(r"^OK \((\d+) tests\)", done.stdout, re.MULTILINE)
    assert passed, done.stdout
    written = sum(path.read_text(encoding="utf-8").count("@Test") for path in (CORE / "test").rglob("*.kt"))
    assert int(passed[1]) == written
    _check_report(read_report(report.read_bytes()), export_nano("int8"))


def _check_report(report: AppReport, bundle: Path) -> None:
    """Both sides sum up the same runs in the same words."""
    golden = (FOLDER / "app_request.json").read_bytes().strip()
    request = msgspec.json.decode(golden, type=AppRequest)
    assert msgspec.json.encode(request) == golden, "the request has other fields than Kotlin is tested with"
    measurement = Measurement(
        place=report.place,
        prompts=request.prompts,
        runs=report.runs,
        repetitions=request.repetitions,
        max_new_tokens=request.max_new_tokens,
        backend="cpu",
        threads=request.threads,
        thermal=("0", "0"),
    )
    bench = summarise(bundle, measurement)
    for theirs, ours in zip(report.speed, bench.kinds, strict=True):
        assert theirs.kind == ours.kind
        assert theirs.mtp_gain == pytest.approx(ours.mtp_gain)
        assert theirs.tokens_per_second_on == pytest.approx(ours.tokens_per_second_on)
    assert [kind.same_text for kind in bench.kinds] == [2, 1, 1]
    # Of the test's generator: 10 ms a token without MTP, half its drafts kept, and twice as fast on one of two prompts.
    assert bench.passes["decode"].median_ms == pytest.approx(10.0)
    assert [(r.num_draft_tokens, r.committed_per_round) for r in bench.rounds] == [(0, 1.0), (4, 3.0)]
    assert bench.rounds[1].ms_per_token == pytest.approx(7.5)
    # A round takes 22.5 ms for 10 ms of a token: 1 + a + a² + a³ + a⁴ = 2.25.
    assert bench.break_even[4] == pytest.approx(0.586, abs=0.001)
    assert bench.variants[1].warnings == ("w",)


def test_what_does_not_compile_is_noticed(kotlin: Toolchain, tmp_path: Path) -> None:
    source = tmp_path / "Wrong.kt"
    source.write_text('fun wrong(): Int = "text"', encoding="utf-8")
    with pytest.raises(CompileError, match=r"Wrong\.kt:1:\d+: error"):
        kotlin.compile([source], tmp_path / "out")


def test_the_app_is_packaged_without_signatures_that_do_nothing(kotlin: Toolchain, core: Path, tmp_path: Path) -> None:
    try:
        tools = packager()
    except FetchError as error:
        pytest.skip(f"no packaging of Android apps: {error}")
    apk = build_apk(kotlin, tools, core, tmp_path)
    tools.apksigner("verify", "--min-sdk-version", "26", str(apk))
    with zipfile.ZipFile(apk) as archive:
        defined = {
            name for entry in archive.namelist() if entry.endswith(".dex") for name in classes_of(archive.read(entry))
        }
        assert "assets/heldout.jsonl" in archive.namelist()
        manifest = archive.read("AndroidManifest.xml").decode("utf-16-le", errors="replace")
    for name in ("app/MainActivity", "app/RunActivity", "app/LiteRtLm", "core/RunProtocol"):
        assert f"Lio/mtpexport/{name};" in defined
    assert "Lkotlin/Unit;" in defined
    assert not [name for name in defined if name.startswith(("Lcom/google/", "Lio/mtpexport/app/LiteRtLmTest"))]
    assert all(word in manifest for word in ("libOpenCL.so", "libvndksupport.so", "android.permission.DUMP"))
    damaged = bytearray(apk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    apk.write_bytes(damaged)
    with pytest.raises(CompileError, match="java ended with"):
        tools.apksigner("verify", "--min-sdk-version", "26", str(apk))


def classes_of(dex: bytes) -> set[str]:
    """The classes that a .dex file defines, which are not all that it speaks of."""
    assert dex.startswith(b"dex\n")
    strings, types, (count, start) = _word(dex, 60), _word(dex, 68), struct.unpack_from("<2I", dex, 96)
    names = set()
    for number in range(count):
        type_number = _word(dex, start + 32 * number)
        at = _word(dex, strings + 4 * _word(dex, types + 4 * type_number))
        while dex[at] & 0x80:  # the text's length, a number of variable size
            at += 1
        names.add(dex[at + 1 : dex.index(0, at + 1)].decode())
    return names


def _word(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", data, offset)[0])
