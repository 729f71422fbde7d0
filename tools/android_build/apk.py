"""An APK without Gradle or Android's SDK: packaged, dexed, aligned and signed with what Debian carries of them.

Which proves that the app is compiled and packaged, not that it runs: LiteRT-LM's AAR, with the runtime in it, is not
among what Debian carries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools.android_build.toolchain import KOTLIN, CompileError, Toolchain, toolchain
from tools.fetched.cache import prepared
from tools.fetched.debian import fetch

DEMO = Path(__file__).resolve().parents[2] / "android_demo"
_PLATFORM = ("sid", "libandroid-23-java")  # Android 6's API, the newest that any Debian has
_DEXER = ("bullseye", "dalvik-exchange")  # newer releases have none
_TOOLS = "bookworm"
_TOOL_PACKAGES = (
    *(
        "aapt",
        "android-libaapt",
        "android-libandroidfw",
        "android-libbacktrace",
        "android-libbase",
        "android-libcutils",
    ),
    *("android-liblog", "android-libutils", "android-libziparchive", "apksigner", "libapksig-java", "libbsd0"),
    *("libexpat1", "libmd0", "libpng16-16", "libprotobuf-lite32", "libzopfli1", "p7zip-full", "zipalign"),
)
_MIN_SDK, _TARGET_SDK = 26, 34  # from 35 on an app is drawn under the bars of the system
APPLICATION = "io.mtpexport.demo"  # Gradle, too, puts it into the manifest
_KEY = ("-storepass", "throwaway", "-keypass", "throwaway", "-alias", "throwaway")


class Packager:
    """Where the parts lie."""

    def __init__(self, folder: Path) -> None:
        """Take the prepared folder; `packager` gives it."""
        self._folder = folder
        self.android_jar = folder / "platform/usr/lib/android-sdk/platforms/android-23/android.jar"

    def dex(self, classes: Sequence[Path], output: Path) -> None:
        """Turn folders of classes, or a jar, into `output`, a .dex file."""
        dx = self._folder / "dexer/usr/share/java/com.android.dx.jar"
        command = ["java", "-Xmx1g", "-cp", str(dx), "com.android.dx.command.Main", "--dex"]
        _run([*command, f"--min-sdk-version={_MIN_SDK}", f"--output={output}", *map(str, classes)])

    def package(self, manifest: Path, assets: Path, dexes: Sequence[Path], output: Path) -> None:
        """Write an APK with the manifest, the assets, `dexes` and Kotlin's library, signed with a key of its own."""
        work = output.parent
        unaligned, aligned, keys = work / "unaligned.apk", work / "aligned.apk", work / "throwaway.jks"
        named = work / manifest.name
        text = manifest.read_text(encoding="utf-8")
        named.write_text(text.replace("<manifest ", f'<manifest package="{APPLICATION}" ', 1), encoding="utf-8")
        command = [
            self._tool("aapt"),
            "package",
            "-f",
            "-M",
            str(named),
            "-I",
            str(self.android_jar),
            "-A",
            str(assets),
        ]
        command += ["--min-sdk-version", str(_MIN_SDK), "--target-sdk-version", str(_TARGET_SDK), "-F", str(unaligned)]
        self._call(command)
        with zipfile.ZipFile(unaligned, "a", zipfile.ZIP_DEFLATED) as apk:
            for number, dex in enumerate([*dexes, self._folder / "kotlin.dex"], 1):
                apk.write(dex, f"classes{number if number > 1 else ''}.dex")
        self._call([self._tool("zipalign"), "-f", "4", str(unaligned), str(aligned)])
        keytool = ["keytool", "-genkeypair", "-keystore", str(keys), *_KEY, "-dname", "CN=throwaway"]
        _run([*keytool, "-keyalg", "EC", "-validity", "1"])
        secrets = ["--ks", str(keys), "--ks-pass", "pass:throwaway"]
        self.apksigner("sign", *secrets, "--min-sdk-version", str(_MIN_SDK), "--out", str(output), str(aligned))

    def apksigner(self, *arguments: str) -> str:
        """Call apksigner."""
        jars = ":".join(str(self._folder / f"tools/usr/share/java/{name}.jar") for name in ("apksigner", "apksig"))
        return _run(["java", "-cp", jars, "com.android.apksigner.ApkSignerTool", *arguments])

    def _tool(self, name: str) -> str:
        return str(self._folder / "tools/usr/lib/android-sdk/build-tools/debian" / name)

    def _call(self, command: list[str]) -> None:
        libraries = self._folder / "tools/usr/lib"
        folders = [libraries, *(libraries / name for name in ("p7zip", "x86_64-linux-gnu", "x86_64-linux-gnu/android"))]
        _run(command, {"LD_LIBRARY_PATH": ":".join(map(str, folders))})


def build_apk(kotlin: Toolchain, packager: Packager, core: Path, work: Path) -> Path:
    """Type-check the app and its instrumented tests with the signatures of LiteRT-LM's API, and package the app without
    those and without the tests, with the compiled `core`.

    Raises:
        CompileError: the app does not compile, or cannot be packaged.
    """
    app, classes, dex, apk = DEMO / "app/src", work / "classes", work / "app.dex", work / "app.apk"
    sources = [app / "main/kotlin", app / "androidTest/kotlin", DEMO / "litertlm-api/src"]
    kotlin.compile(sources, classes, classpath=[core, packager.android_jar])
    shutil.rmtree(classes / "com")
    for test in (classes / "io/mtpexport/app").glob("*Test*.class"):
        test.unlink()
    packager.dex([core, classes], dex)
    assets = DEMO.parent / "converter/mtp_export/check/prompt_sets"
    packager.package(app / "main/AndroidManifest.xml", assets, [dex], apk)
    return apk


def packager() -> Packager:
    """Return the packager, fetching and preparing it if it is not cached.

    Raises:
        FetchError: Java or npm is not installed, or a part cannot be fetched.
    """
    kotlin = toolchain()
    parts = [*_PLATFORM, *_DEXER, _TOOLS, *_TOOL_PACKAGES, KOTLIN]

    def build(folder: Path) -> None:
        for name, release, packages in (
            ("platform", _PLATFORM[0], _PLATFORM[1:]),
            ("dexer", _DEXER[0], _DEXER[1:]),
            ("tools", _TOOLS, _TOOL_PACKAGES),
        ):
            fetch(release, "amd64", packages, folder / name, alone=True)
        with zipfile.ZipFile(kotlin.stdlib) as jar:  # without what it has for newer versions of Java
            jar.extractall(folder / "kotlin", [name for name in jar.namelist() if name.startswith("kotlin/")])
        Packager(folder).dex([folder / "kotlin"], folder / "kotlin.dex")
        shutil.rmtree(folder / "kotlin")

    return Packager(prepared("android", parts, build))


def _run(command: list[str], environ: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env={**os.environ, **(environ or {})}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout
