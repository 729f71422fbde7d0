"""Writing a bundle: everything into a folder beside the output, which takes its name only when it is complete."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litert_lm_builder import litertlm_builder
from litert_lm_builder.litertlm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_export.errors import OutputError
from mtp_runtime.contract import MANIFEST_NAME, Manifest

_MODEL_TYPES = {
    "target": TfLiteModelType.PREFILL_DECODE,
    "drafter": TfLiteModelType.MTP_DRAFTER,
    "embedder": TfLiteModelType.EMBEDDER,
    "per_layer_embedder": TfLiteModelType.PER_LAYER_EMBEDDER,
}


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `output` if the block succeeds, and vanishes if it does not.

    Raises:
        OutputError: the output exists and `force` is false, or cannot be written, or the disk is full.
    """
    output = output.absolute()
    if output.exists() and not force:
        raise OutputError(f"{output} exists: choose another --output, or replace it with --force")
    if force and output.exists() and not (output / MANIFEST_NAME).is_file():
        raise OutputError(f"{output} is not a bundle, so --force does not replace it: choose another --output")
    with _explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{os.getpid()}-", dir=output.parent))
        try:
            yield stage
            stage.chmod(0o777 & ~_umask())
            _replace(stage, output)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Turn what the file system says into what the user can do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"the disk of {output.parent} is full: free some space, nothing was written") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
            reason = (error.strerror or "no access").lower()
            raise OutputError(f"cannot write {output}: {reason}: choose another --output") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_leftovers(output: Path) -> None:
    """Remove what killed exports of the same output left; a living process keeps its own."""
    prefix = f".{output.name}.partial-"
    for leftover in output.parent.glob(f"{prefix}*"):
        pid = leftover.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _replace(stage: Path, output: Path) -> None:
    """Put the finished folder in place; the old one is moved aside first and deleted last."""
    if output.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{os.getpid()}-old-", dir=output.parent))
        output.rename(aside / output.name)
        try:
            stage.rename(output)
        except OSError:
            (aside / output.name).rename(output)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        stage.rename(output)


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
    for token_id in manifest.stop_token_ids:
        metadata.stop_tokens.add().token_ids.ids.append(token_id)
    # Past this, a verify pass would write beyond the cache and LiteRT-LM's output would change.
    metadata.max_num_tokens = manifest.context_length
    metadata.llm_model_type.gemma4.SetInParent()
    if "chat_template" in manifest.files:
        template = folder / manifest.files["chat_template"].path
        metadata.jinja_prompt_template = template.read_text(encoding="utf-8")
    return metadata


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
