"""Sizes that keep the house readable: of modules, of functions, and of what a function takes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGES = ("converter", "runtime_py", "calibration", "tools", "benchmarks", "tests")
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 6

# Signatures that another library dictates, with the reason.
_OPERATOR = "torch.library takes an operator's tensors and numbers one by one"
_TRANSLATION = "torch's ONNX exporter calls a translation with an operator's arguments one by one"
_SEGMENT = "torch.export traces a segment's tensors one by one"
DICTATED = {
    "converter/mtp_export/models/ops.py write_and_attend": _OPERATOR,
    "converter/mtp_export/models/ops.py attend": _OPERATOR,
    "converter/mtp_export/formats/onnx/convert.py _write_and_attend": _TRANSLATION,
    "converter/mtp_export/formats/onnx/convert.py _attend": _TRANSLATION,
    "converter/mtp_export/formats/onnx/convert.py _portable_write_and_attend": _TRANSLATION,
    "converter/mtp_export/formats/onnx/convert.py _portable_attend": _TRANSLATION,
    "converter/mtp_export/models/dynamic.py forward": _SEGMENT,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[Path]:
    """Yield every module of the packages."""
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    """Yield every function of a module, methods and inner functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def lines_of(function: Function) -> int:
    """Return the number of lines from `def` to the last one."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters_of(function: Function) -> int:
    """Return the number of parameters, without `self` and `cls`."""
    every = function.args
    names = [argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(every.vararg) + bool(every.kwarg)


def too_large(measure: Callable[[Function], int], limit: int, *, skip: Callable[[Path, Function], bool]) -> list[str]:
    """Return `path:line name count` of every function above a limit."""
    return [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name} {measure(function)}"
        for path in modules()
        for function in functions(path)
        if measure(function) > limit and not skip(path, function)
    ]


@pytest.mark.many_cases  # every module is parsed
class TestSizes:
    def test_modules(self) -> None:
        counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
        large = [f"{path.relative_to(ROOT)}:1 module {n}" for path, n in counts.items() if n > MAX_MODULE_LINES]
        assert not large, "\n".join(large)

    def test_functions(self) -> None:
        large = too_large(lines_of, MAX_FUNCTION_LINES, skip=lambda path, function: False)
        assert not large, "\n".join(large)

    def test_parameters(self) -> None:
        """Commands take what their options are; a test takes the fixtures and cases that it names."""

        def skip(path: Path, function: Function) -> bool:
            inside = path.relative_to(ROOT)
            dictated = f"{inside} {function.name}" in DICTATED
            return "cli" in inside.parts[:-1] or inside.parts[0] == "tests" or dictated

        large = too_large(parameters_of, MAX_PARAMETERS, skip=skip)
        assert not large, "\n".join(large)


def test_counts() -> None:
    tree = ast.parse("def f(self, a, *b, c=1, **d):\n    pass\n")
    (function,) = (node for node in ast.walk(tree) if isinstance(node, Function))
    assert (lines_of(function), parameters_of(function)) == (2, 4)


def test_every_exception_is_of_a_function_that_is_there() -> None:
    names = {name for name in DICTATED if (ROOT / name.partition(" ")[0]).is_file()}
    there = {f"{name.partition(' ')[0]} {f.name}" for name in names for f in functions(ROOT / name.partition(" ")[0])}
    assert set(DICTATED) - there == set()
