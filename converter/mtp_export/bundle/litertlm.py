"""Writing what a bundle has besides its graphs: the manifest, and the one `.litertlm` for LiteRT-LM."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from litert_lm_builder import litertlm_builder
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType

from mtp_export.bundle.metadata import llm_metadata
from mtp_export.formats.roles import ROLES
from mtp_runtime.bundle.contract import GRAPH_ROLES, MANIFEST_NAME, Manifest


def _section_order(role: str) -> int:
    """Return where a graph lies: first those that every bundle has, in the runtime's order."""
    return GRAPH_ROLES.index(role) if role in GRAPH_ROLES else len(GRAPH_ROLES)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a bundle into its folder, which nobody reads before it takes its name."""
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def write_litertlm(folder: Path, manifest: Manifest, path: Path) -> None:
    """Pack the graphs and tokenizer of `folder` into one file for LiteRT-LM.

    `manifest` goes in too, so that the one file is a whole bundle; it cannot name the file's own hash.
    """
    builder = LitertLmFileBuilder()
    with tempfile.TemporaryDirectory(prefix=".parts-", dir=folder) as parts:
        metadata = Path(parts) / "llm_metadata.pb"
        metadata.write_bytes(llm_metadata(folder, manifest).SerializeToString(deterministic=True))
        inner = Path(parts) / MANIFEST_NAME
        inner.write_text(manifest.to_json(), encoding="utf-8")
        builder.add_llm_metadata(str(metadata))
        builder.add_generic_binary_data(str(inner))
        if "chat_template" in manifest.files:  # as the checkpoint has it: the metadata's is LiteRT-LM's own
            builder.add_generic_binary_data(str(folder / manifest.files["chat_template"].path))
        builder.add_hf_tokenizer(str(folder / manifest.files["tokenizer"].path))
        for role in sorted(manifest.signatures, key=_section_order):
            model_type = getattr(TfLiteModelType, ROLES[role].section)
            # No backend constraint: marked for the CPU, the drafter would be refused by the GPU backend.
            builder.add_tflite_model(str(folder / manifest.files[role].path), model_type)
        with path.open("wb") as file, _fixed_identity(manifest):
            builder.build(file)


@contextlib.contextmanager
def _fixed_identity(manifest: Manifest) -> Iterator[None]:
    """Give the file an id that follows from its contents and no time, in place of a random id and the clock.

    The builder (0.18.1) has no option for it: the same input must give the same bytes.
    """
    original = litertlm_builder.populate_system_metadata

    def populate(entries: list[Metadata]) -> list[Metadata]:
        kept = [entry for entry in entries if entry.key not in ("uuid", "creation_timestamp")]
        identity = str(uuid.uuid5(uuid.NAMESPACE_OID, manifest.to_json()))
        epoch = datetime.datetime.fromtimestamp(0, datetime.UTC).isoformat()
        return [
            *kept,
            Metadata(key="uuid", value=identity, dtype=DType.STRING),
            Metadata(key="creation_timestamp", value=epoch, dtype=DType.STRING),
        ]

    litertlm_builder.populate_system_metadata = populate
    try:
        yield
    finally:
        litertlm_builder.populate_system_metadata = original
