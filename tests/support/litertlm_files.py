"""Building `.litertlm` containers for tests, with the project's own manifest inside."""

from __future__ import annotations

from pathlib import Path

import msgspec
from litert_lm_builder import LitertLmFileBuilder, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_runtime.bundle.contract import Manifest, read_manifest

MODEL_TYPES = {
    "target": TfLiteModelType.PREFILL_DECODE,
    "embedder": TfLiteModelType.EMBEDDER,
    "per_layer_embedder": TfLiteModelType.PER_LAYER_EMBEDDER,
    "drafter": TfLiteModelType.MTP_DRAFTER,
}


def build_container(folder: Path, path: Path, *, manifest: str | None = None, leave_out: str = "") -> Manifest:
    """Pack the bundle in `folder` into `path`, with the text `manifest` in place of its own, without `leave_out`."""
    own = read_manifest(folder)
    work = path.with_suffix(".parts")
    work.mkdir()
    builder = LitertLmFileBuilder()
    metadata = llm_metadata_pb2.LlmMetadata()
    metadata.start_token.token_ids.ids.append(own.bos_token_id)
    for token_id in own.stop_token_ids:
        metadata.stop_tokens.add().token_ids.ids.append(token_id)
    metadata.max_num_tokens = own.context_length
    metadata.llm_model_type.gemma4.SetInParent()
    if "chat_template" in own.files:
        metadata.jinja_prompt_template = (folder / own.files["chat_template"].path).read_text(encoding="utf-8")
    (work / "metadata.pb").write_bytes(metadata.SerializeToString())
    builder.add_llm_metadata(str(work / "metadata.pb"))
    if leave_out != "manifest":
        inner = own.to_json() if manifest is None else manifest
        (work / "manifest.json").write_text(inner, encoding="utf-8")
        builder.add_generic_binary_data(str(work / "manifest.json"))
    if leave_out != "tokenizer":
        builder.add_hf_tokenizer(str(folder / own.files["tokenizer"].path))
    for role, model_type in MODEL_TYPES.items():
        if role != leave_out:
            builder.add_tflite_model(str(folder / own.files[role].path), model_type)
    with path.open("wb") as file:
        builder.build(file)
    return own


def with_file(manifest: Manifest, role: str, **changes: object) -> str:
    """Return the JSON of `manifest` with the entry of one file changed."""
    entry = msgspec.structs.replace(manifest.files[role], **changes)
    return msgspec.structs.replace(manifest, files={**manifest.files, role: entry}).to_json()
