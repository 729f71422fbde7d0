"""The sample app on a phone (android_demo), started by an intent: it gets a request file and writes a report."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from mtp_export.device.adb import Adb, AdbError
from mtp_export.device.protocol import OfPlace, Processor, Request, StockAnswer, TextPrompt
from mtp_export.device.transfer import Sent, send, send_container

PACKAGE = "io.mtpexport.demo"
_FILES = f"/sdcard/Android/data/{PACKAGE}/files"
_ACTIVITY = f"{PACKAGE}/io.mtpexport.app"
_ENDED = 3  # exit code of the wait below


class AppRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `RunActivity` reads: `bundle` is a folder's name, and every prompt runs `repetitions` times."""

    bundle: str
    prompts: tuple[TextPrompt, ...]
    max_new_tokens: int
    repetitions: int
    backend: Processor
    threads: int
    context_length: int


class _Speed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    tokens_per_second_off: float
    tokens_per_second_on: float
    mtp_gain: float | None


class _Same(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    kind: str
    same_text: bool


class AppReport(OfPlace, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `RunActivity` writes. The outputs of a run are those of one prompt after the other, warm-up left out."""

    container_sha256: str
    backend: Processor
    runs: tuple[StockAnswer, ...]
    speed: tuple[_Speed, ...]
    prompts: tuple[_Same, ...]


class _Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    error: str


def run_with_app(
    adb: Adb,
    bundle: Path,
    request: Request,
    repetitions: int,
    on_line: Callable[[str], None] = lambda line: None,
) -> AppReport:
    """Have the app run LiteRT-LM, without MTP and with it, over the request's prompts, each `repetitions` times.

    Raises:
        MtpError: the device has no apps or not this one, the app failed or was killed, or the device went away.
    """
    _check_installed(adb)
    # Its first start makes its folder.
    adb.shell(f"am start -W -n {_ACTIVITY}.MainActivity")
    there = send_container(
        adb,
        bundle,
        f"{_FILES}/bundles",
        lambda sent, total: on_line(f"pushing: {sent / 1e6:.0f} of {total / 1e6:.0f} MB"),
    ).folder
    app_request = AppRequest(
        bundle=Path(there).name,
        prompts=request.prompts,
        max_new_tokens=request.max_new_tokens,
        repetitions=repetitions,
        backend=request.backend,
        threads=request.threads,
        context_length=request.context_length,
    )
    data = msgspec.json.encode(app_request)
    name = f"run-{hashlib.sha256(data).hexdigest()[:16]}"
    with tempfile.TemporaryDirectory(prefix="mtp-device-") as local:
        path, pulled = Path(local) / f"{name}.json", Path(local) / "answer.json"
        path.write_bytes(data)
        send(adb, [Sent.of(path)], _FILES)
        answer = f"{_FILES}/{name}.answer.json"
        adb.shell(f"rm -f {answer}; am start -W -n {_ACTIVITY}.RunActivity --es request {name}.json")
        _wait(adb, answer, on_line)
        adb.pull(answer, pulled)
        return read_report(pulled.read_bytes())


def read_report(data: bytes) -> AppReport:
    """Read the app's answer.

    Raises:
        AdbError: it reports a failure, or another version of the app wrote it.
    """
    try:
        document = msgspec.json.decode(data, type=dict)
        if "error" in document:
            raise AdbError(f"the app could not run it: {msgspec.convert(document, _Failure).error}")
        return msgspec.convert(document, AppReport)
    except msgspec.DecodeError as error:
        raise AdbError(
            f"the app's report is not this version's ({error}): build and install android_demo again"
        ) from error


def _check_installed(adb: Adb) -> None:
    if adb.try_shell("command -v am").code != 0:
        raise AdbError(f"{adb.serial} has no am and so no apps: --app needs an Android phone")
    if f"package:{PACKAGE}" not in adb.try_shell(f"pm list packages {PACKAGE}").output.splitlines():
        raise AdbError(f"{adb.serial} has no app {PACKAGE}: build and install it (android_demo/README.md)")


def _wait(adb: Adb, answer: str, on_line: Callable[[str], None]) -> None:
    """Wait for the app's answer; every second of it is a sign of life, and an app that is gone ends it."""
    loop = f"while [ ! -e {answer} ]; do pidof {PACKAGE} >/dev/null || exit {_ENDED}; sleep 1; echo running; done"
    ended = adb.try_shell(loop, on_line=on_line)
    if ended.code == _ENDED and adb.try_shell(f"[ -e {answer} ]").code != 0:
        raise AdbError(
            f"the app ended on {adb.serial} before it was done, as happens when memory runs low: close other apps, or "
            "take a smaller recipe; `adb logcat -b crash` tells of a crash"
        )
    if ended.code is None:
        adb.shell("true")  # fails with a remedy if the connection is not back
        _wait(adb, answer, on_line)
