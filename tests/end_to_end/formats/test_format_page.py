"""docs/format.md names every signature and tensor of real bundles, and none that no bundle has."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from mtp_runtime import Manifest, read_manifest
from tests.conftest import Export
from tests.support.format_page import PAGE, named, pattern, tables


@pytest.fixture(scope="module")
def manifests(export_nano: Export) -> list[Manifest]:
    return [read_manifest(export_nano("int8", export_format=name)) for name in ("tflite", "tflite-gpu", "onnx")]


def signatures(manifests: Iterable[Manifest]) -> set[str]:
    return {s.name for manifest in manifests for group in manifest.signatures.values() for s in group}


def tensors(manifests: Iterable[Manifest]) -> set[str]:
    every = [s for manifest in manifests for group in manifest.signatures.values() for s in group]
    return {tensor.name for signature in every for tensor in (*signature.inputs, *signature.outputs)}


def test_every_name_of_a_bundle_is_on_the_page(manifests: list[Manifest]) -> None:
    patterns = [pattern(name) for name in named(PAGE)]
    names = signatures(manifests) | tensors(manifests)
    assert len(names) > 30
    assert [name for name in sorted(names) if not any(p.fullmatch(name) for p in patterns)] == []


def test_every_name_of_the_tables_is_of_a_bundle(manifests: list[Manifest]) -> None:
    listed = [name for row in tables() for cell in row for name in named(cell) if re.search(r"[a-z]", name)]
    assert len(listed) > 25
    names = signatures(manifests) | tensors(manifests)
    assert [name for name in listed if not any(pattern(name).fullmatch(other) for other in names)] == []
