"""Imports go runtime ← export ← calibration, never back.

The imports of every module are read from its source, also those inside functions.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {"mtp_runtime": "runtime_py", "mtp_export": "converter", "mtp_calibration": "calibration"}
MAY_IMPORT = {
    "mtp_runtime": {"mtp_runtime"},
    "mtp_export": {"mtp_runtime", "mtp_export"},
    "mtp_calibration": set(PACKAGES),
}
CLI = "mtp_export.cli"  # the one package that may import all three


class Import(NamedTuple):
    """One imported module, or name in a module. `at_once`: importing the module `by` imports it too."""

    by: str
    line: int
    name: str
    at_once: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Yield the imports of a module's source; of `from a import b` both a and a.b, for b may be a module."""
    tree = ast.parse(source)
    later = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield Import(module, node.lineno, name, id(node) not in later)


@functools.cache
def all_imports() -> dict[str, list[Import]]:
    """Return the imports of every module of the three packages, by its name."""
    return {
        name: list(imports_of(path.read_text(encoding="utf-8"), name))
        for package, folder in PACKAGES.items()
        for path in sorted((REPOSITORY / folder / package).rglob("*.py"))
        for name in [module_name(path, REPOSITORY / folder)]
    }


def against_the_direction(imports: Iterable[Import]) -> list[str]:
    """Return the imports of the three packages that go back, as "module:line imports name"."""
    imports = list(imports)
    back = {
        f"{each.by}:{each.line} imports {each.name.partition('.')[0]}"
        for each in imports
        for package in [each.name.partition(".")[0]]
        if package in PACKAGES
        and package not in MAY_IMPORT[each.by.partition(".")[0]]
        and not (each.by == CLI or each.by.startswith(f"{CLI}."))
    }
    back |= {
        f"{each.by}:{each.line} imports {CLI}"
        for each in imports
        if f"{each.name}.".startswith(f"{CLI}.") and not f"{each.by}.".startswith((f"{CLI}.", "mtp_export.__main__."))
    }
    return sorted(back)


def cycle(imports: Mapping[str, Iterable[Import]]) -> list[str]:
    """Return the modules of an import cycle, if there is one among the imports at module level."""
    graph = {
        name: {each.name for each in own if each.at_once and each.name in imports and each.name != name}
        for name, own in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_one_way() -> None:
    assert against_the_direction(each for own in all_imports().values() for each in own) == []


def test_modules_import_each_other_without_a_cycle() -> None:
    assert cycle(all_imports()) == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import mtp_export.plan", "mtp_runtime.errors", ["mtp_runtime.errors:1 imports mtp_export"]),
        (
            "def late():\n    from mtp_calibration.choose import choices",
            "mtp_export.plan",
            ["mtp_export.plan:2 imports mtp_calibration"],
        ),
        ("from mtp_calibration.choose import choices", "mtp_export.cli.export", []),
        (
            "from mtp_calibration.choose import choices",
            "mtp_export.client",
            ["mtp_export.client:1 imports mtp_calibration"],
        ),
        ("import mtp_export.cli.main", "mtp_calibration.a", ["mtp_calibration.a:1 imports mtp_export.cli"]),
        ("import mtp_export.plan, mtp_runtime, torch", "mtp_calibration.choose.choices", []),
    ],
)
def test_an_import_that_goes_back_is_noticed(source: str, module: str, expected: list[str]) -> None:
    assert against_the_direction(imports_of(source, module)) == expected


@pytest.mark.parametrize(
    ("of_b", "expected"),
    [("from a import x", {"a", "b"}), ("def late():\n    import a", set()), ("import c", set())],
)
def test_a_cycle_is_noticed(of_b: str, expected: set[str]) -> None:
    sources = {"a": "import b", "b": of_b}
    assert set(cycle({name: list(imports_of(source, name)) for name, source in sources.items()})) == expected
