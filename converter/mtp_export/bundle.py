"""Writing what a bundle has besides its graphs: the manifest, and the one `.litertlm` for LiteRT-LM."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litert_lm_builder import litertlm_builder
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_runtime.contract import MANIFEST_NAME, Manifest, SamplerDefaults

_MODEL_TYPES = {
    "target": TfLiteModelType.PREFILL_DECODE,
    "drafter": TfLiteModelType.MTP_DRAFTER,
    "embedder": TfLiteModelType.EMBEDDER,
    "per_layer_embedder": TfLiteModelType.PER_LAYER_EMBEDDER,
}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def write_litertlm(folder: Path, manifest: Manifest, path: Path) -> None:
    """Pack the graphs and tokenizer of `folder` into one file for LiteRT-LM.

    `manifest` goes in too, so that the one file is a whole bundle; it cannot name the file's own hash.
    """
    builder = LitertLmFileBuilder()
    with tempfile.TemporaryDirectory(prefix=".parts-", dir=folder) as parts:
        metadata = Path(parts) / "llm_metadata.pb"
        metadata.write_bytes(_llm_metadata(folder, manifest).SerializeToString(deterministic=True))
        inner = Path(parts) / MANIFEST_NAME
        inner.write_text(manifest.to_json(), encoding="utf-8")
        builder.add_llm_metadata(str(metadata))
        builder.add_generic_binary_data(str(inner))
        builder.add_hf_tokenizer(str(folder / manifest.files["tokenizer"].path))
        for role, model_type in _MODEL_TYPES.items():
            # No backend constraint: marked for the CPU, the drafter would be refused by the GPU backend.
            builder.add_tflite_model(str(folder / manifest.files[role].path), model_type)
        with path.open("wb") as file, _fixed_identity(manifest):
            builder.build(file)


def _llm_metadata(folder: Path, manifest: Manifest) -> Any:
    metadata = llm_metadata_pb2.LlmMetadata()
    metadata.start_token.token_ids.ids.append(manifest.bos_token_id)
    # LiteRT-LM opens no file without a stop token; an id behind the vocabulary never comes.
    for token_id in manifest.stop_token_ids or (manifest.vocab_size,):
        metadata.stop_tokens.add().token_ids.ids.append(token_id)
    metadata.suppress_tokens.ids.extend(manifest.suppress_tokens)
    if manifest.sampler is not None and manifest.samples:
        _set_sampler(metadata.sampler_params, manifest.sampler, manifest.vocab_size)
    # Past this, a verify pass would write beyond the cache and LiteRT-LM's output would change.
    metadata.max_num_tokens = manifest.context_length
    metadata.llm_model_type.gemma4.SetInParent()
    if "chat_template" in manifest.files:
        template = folder / manifest.files["chat_template"].path
        metadata.jinja_prompt_template = template.read_text(encoding="utf-8")
    return metadata


def _set_sampler(parameters: Any, sampler: SamplerDefaults, vocab_size: int) -> None:
    """Write the checkpoint's sampler. There is no field for its repetition penalty."""
    parameters.type = parameters.TOP_P
    parameters.k = min(sampler.top_k or vocab_size, vocab_size)
    parameters.p = sampler.top_p
    parameters.temperature = sampler.temperature


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
