"""Kotlin's compiler from npm and JUnit from Debian, cached outside the tree; compiling and testing with them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tools.fetched.cache import prepared
from tools.fetched.debian import FetchError, fetch

KOTLIN = "2.4.20"
_JAVA = 17
# What the dexer reads, and what Android 8 runs: classes of Java 8, lambdas and texts made without invokedynamic.
_OLD_CLASSES = ("-jvm-target", "1.8", "-Xlambdas=class", "-Xsam-conversions=class", "-Xstring-concat=inline")
_SHORT = ("-Xmx1g", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")  # a JVM that ends before optimising pays
_JUNIT = ("junit4", "libhamcrest-java")


class Toolchain:
    """Where the parts lie."""

    def __init__(self, folder: Path) -> None:
        """Take the prepared folder; `toolchain` gives it."""
        self._kotlin = folder / "node_modules/kotlin-compiler/lib"
        java = folder / "root/usr/share/java"
        self.stdlib = self._kotlin / "kotlin-stdlib.jar"
        jars = [self._kotlin / f"{name}.jar" for name in ("kotlin-test", "kotlin-test-junit")]
        self._classpath = [self.stdlib, *jars, java / "junit4.jar", java / "hamcrest.jar"]

    def compile(self, sources: Sequence[Path], output: Path, *, classpath: Sequence[Path] = ()) -> str:
        """Compile Kotlin files to classes in `output`, warnings being errors, and return what the compiler said.

        Raises:
            CompileError: it does not compile.
        """
        command = ["java", *_SHORT, "-cp", f"{self._kotlin}/*", "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
        command += ["-no-stdlib", "-no-reflect", "-Werror", *_OLD_CLASSES, "-d", str(output)]
        command += ["-classpath", _joined([*classpath, *self._classpath]), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(done.stderr or done.stdout)
        return done.stderr

    def run_tests(
        self, names: Sequence[str], classpath: Sequence[Path], **properties: str
    ) -> subprocess.CompletedProcess[str]:
        """Run JUnit classes in a JVM with system `properties`."""
        command = ["java", *_SHORT, *(f"-D{name}={value}" for name, value in properties.items())]
        command += ["-cp", _joined([*classpath, *self._classpath]), "org.junit.runner.JUnitCore", *names]
        return subprocess.run(command, capture_output=True, text=True, check=False)


class CompileError(Exception):
    """Kotlin sources do not compile; the message is the compiler's."""


def toolchain() -> Toolchain:
    """Return the toolchain, fetching it if it is not cached.

    Raises:
        FetchError: Java or npm is not installed, or a part cannot be fetched.
    """
    _check_java()
    if shutil.which("npm") is None:
        raise FetchError("npm is not installed, which Kotlin's compiler is fetched with: install npm")
    return Toolchain(prepared("kotlin", [KOTLIN, *_JUNIT], _build))


def _check_java() -> None:
    if shutil.which("java") is None:
        raise FetchError(f"java is not installed: install a JDK of version {_JAVA} or newer")
    output = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(\d+)', output)
    if not match or int(match[1]) < _JAVA:
        raise FetchError(f"java is of version {match[1] if match else '?'}: install {_JAVA} or newer")


def _build(folder: Path) -> None:
    npm = ["npm", "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(folder)]
    done = subprocess.run([*npm, f"kotlin-compiler@{KOTLIN}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"npm did not fetch kotlin-compiler {KOTLIN}: {done.stderr.strip()[-200:]}: check the network")
    fetch("bookworm", "amd64", _JUNIT, folder / "root", alone=True)


def _joined(paths: Sequence[Path]) -> str:
    return ":".join(map(str, paths))
