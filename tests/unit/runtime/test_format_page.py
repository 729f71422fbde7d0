"""docs/format.md names every key of a manifest, and no key that there is none of."""

from __future__ import annotations

import re

import msgspec

from mtp_runtime.bundle import contract
from tests.support.format_page import PAGE, named, section

STRUCTS = (
    contract.Manifest,
    contract.SamplerDefaults,
    contract.ChatTemplateOrigin,
    contract.ImageSettings,
    contract.FileEntry,
    contract.GraphSignature,
    contract.TensorSpec,
)


def keys() -> set[str]:
    """Return the keys of a manifest and of all that is inside it."""
    return {field.encode_name for struct in STRUCTS for field in msgspec.structs.fields(struct)}


def test_every_key_of_a_manifest_is_named() -> None:
    assert keys() - named(PAGE) == set()


def test_every_key_that_is_named_is_one() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("manifest.json"), re.MULTILINE)
    listed = {name for row in rows for name in named(row)}
    assert len(listed) > 20
    assert listed - keys() == set()


def test_every_name_of_the_contract_is_named() -> None:
    names = {
        contract.PARAM_TENSOR,
        contract.TOKEN_COUNTS,
        contract.ROW_COUNTS,
        contract.of_sequence("…", 0).replace("0", "{i}"),
        contract.MANIFEST_NAME,
        *(f"{role}.tflite" for role in contract.GRAPH_ROLES),
        *(f"{contract.batch_role(role).replace('_', '.')}.onnx" for role in contract.BATCH_ROLES),
    }
    assert names - named(PAGE) == set()
