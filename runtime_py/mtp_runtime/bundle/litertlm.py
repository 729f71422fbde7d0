"""Reading a `.litertlm` container: a table of sections, checked as data from a stranger.

Layout (LiteRT-LM's schema): magic `LITERTLM`, three version numbers, at byte 24 the end of the header, at byte 32 the
header, a flatbuffer that lists sections with their kind, properties and byte range. mtp-export stores its manifest as
the first GenericBinaryData section, so that the one file is a whole bundle, and the checkpoint's chat template as the
second: that of the metadata is written for LiteRT-LM.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from google.protobuf.message import DecodeError
from litert_lm_builder import litertlm_header_schema_py_generated as schema
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from mtp_runtime.bundle.consistency import check_consistency
from mtp_runtime.bundle.contract import FileEntry, Manifest
from mtp_runtime.errors import BundleError

_MAGIC = b"LITERTLM"
_MAJOR_VERSION = 1
_HEADER_START = 32
_MAX_HEADER_BYTES = 16 << 20
_MAX_SMALL_SECTION_BYTES = 64 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_SECTIONS = 256
_CHUNK_BYTES = 1 << 20

# Which section holds the file of a role, as `model_type` of a TFLiteModel section.
_MODEL_TYPES = {
    "target": "tf_lite_prefill_decode",
    "drafter": "tf_lite_mtp_drafter",
    "embedder": "tf_lite_embedder",
    "per_layer_embedder": "tf_lite_per_layer_embedder",
}


class Section(NamedTuple):
    """Kind (an AnySectionDataType), `model_type` if it has one, and byte range of a section."""

    kind: int
    model_type: str | None
    begin: int
    end: int


def unpack(path: Path, folder: Path, *, verify: bool) -> Manifest:
    """Write the graphs, the tokenizer and the chat template of the container `path` into `folder`.

    Each file must have the size that the container's own manifest states, and with `verify` its SHA-256.

    Raises:
        BundleError: the file is no container of this project, damaged, or contradicts its manifest.
    """
    try:
        with path.open("rb") as file:
            sections = read_sections(file)
            manifest = _read_manifest(file, sections)
            check_consistency(manifest)
            for role, entry in manifest.files.items():
                pieces = _pieces_of(file, sections, role, entry)
                if pieces is not None:
                    _write_checked(folder / entry.path, role, entry, pieces, verify=verify)
            return manifest
    except OSError as error:
        raise BundleError(f"cannot unpack {path}: {error.strerror}") from error


def read_sections(file: BinaryIO) -> list[Section]:
    """Return the sections of an opened container, in their order.

    Raises:
        BundleError: the header is not one of this format, or points outside the file.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_HEADER_START)
    if len(start) < _HEADER_START or not start.startswith(_MAGIC):
        raise BundleError("not a .litertlm file: give a folder or .litertlm file that mtp-export wrote")
    major, _minor, _patch, _padding, header_end = struct.unpack("<IIIIQ", start[len(_MAGIC) :])
    if major != _MAJOR_VERSION:
        raise BundleError(f"the .litertlm has version {major}, this runtime reads {_MAJOR_VERSION}: upgrade mtp-export")
    if not _HEADER_START < header_end <= min(size_bytes, _HEADER_START + _MAX_HEADER_BYTES):
        raise BundleError(f"the .litertlm's header ends at {header_end} of {size_bytes} bytes: it is damaged")
    header = file.read(header_end - _HEADER_START)
    try:
        sections = list(_parse_header(header))
    except (struct.error, IndexError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        # What the generated flatbuffer reader raises when offsets lead nowhere.
        raise BundleError(f"the .litertlm's header is damaged ({type(error).__name__}): export it again") from error
    for section in sections:
        if not header_end <= section.begin <= section.end <= size_bytes:
            raise BundleError(
                f"a .litertlm section covers bytes {section.begin} to {section.end} of {size_bytes}: it is damaged"
            )
    return sections


def _parse_header(header: bytes) -> Iterator[Section]:
    table = schema.LiteRTLMMetaData.GetRootAs(header, 0).SectionMetadata()
    count = table.ObjectsLength()
    if count > _MAX_SECTIONS:
        raise ValueError(count)
    for index in range(count):
        section = table.Objects(index)
        yield Section(section.DataType(), _model_type(section), section.BeginOffset(), section.EndOffset())


def _model_type(section: schema.SectionObject) -> str | None:
    for index in range(min(section.ItemsLength(), _MAX_SECTIONS)):
        item = section.Items(index)
        value = item.Value()
        if item.Key() == b"model_type" and value is not None and item.ValueType() == schema.VData.StringValue:
            text = schema.StringValue()
            text.Init(value.Bytes, value.Pos)
            return str(text.Value().decode("utf-8"))
    return None


def read_metadata(path: Path) -> llm_metadata_pb2.LlmMetadata:
    """Return the settings that a container has for LiteRT-LM.

    Raises:
        BundleError: the file is no container, damaged, or has none.
    """
    try:
        with path.open("rb") as file:
            for section in read_sections(file):
                if section.kind == schema.AnySectionDataType.LlmMetadataProto:
                    return _parse_metadata(_read_small(file, section))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    raise BundleError(f"{path} has no metadata of a language model: export it again")


def _read_manifest(file: BinaryIO, sections: list[Section]) -> Manifest:
    for section in sections:
        if section.kind == schema.AnySectionDataType.GenericBinaryData:
            try:
                return Manifest.from_json(_read_small(file, section).decode("utf-8"))
            except UnicodeDecodeError:
                break
    raise BundleError("the .litertlm holds no manifest of mtp-export: export it with mtp-export, or open its folder")


def _read_small(file: BinaryIO, section: Section) -> bytes:
    if section.end - section.begin > _MAX_SMALL_SECTION_BYTES:
        raise BundleError(f"a .litertlm section has {section.end - section.begin} bytes, too many for its kind")
    file.seek(section.begin)
    return file.read(section.end - section.begin)


def _pieces_of(file: BinaryIO, sections: list[Section], role: str, entry: FileEntry) -> Iterator[bytes] | None:
    """Return the contents of the file of `role`, or None where the container does not carry it."""
    kinds = schema.AnySectionDataType
    if role in _MODEL_TYPES:
        for section in sections:
            if section.kind == kinds.TFLiteModel and section.model_type == _MODEL_TYPES[role]:
                return _pieces(file, section)
        raise BundleError(f"the .litertlm has no {_MODEL_TYPES[role]} section: export it again")
    generic = [section for section in sections if section.kind == kinds.GenericBinaryData]
    if role == "chat_template" and len(generic) > 1:
        return iter((_read_small(file, generic[1]),))
    for section in sections:
        if role == "tokenizer" and section.kind == kinds.HF_Tokenizer_Zlib:
            return iter((_inflate(_read_small(file, section), entry.size_bytes),))
        if role == "chat_template" and section.kind == kinds.LlmMetadataProto:  # as versions before wrote it
            return iter((_parse_metadata(_read_small(file, section)).jinja_prompt_template.encode(),))
    return None


def _pieces(file: BinaryIO, section: Section) -> Iterator[bytes]:
    file.seek(section.begin)
    left = section.end - section.begin
    while left and (piece := file.read(min(left, _CHUNK_BYTES))):
        left -= len(piece)
        yield piece


def _inflate(data: bytes, size_bytes: int) -> bytes:
    """Return the tokenizer behind its eight bytes of length; never more than a byte too many."""
    if not 0 <= size_bytes <= _MAX_TOKENIZER_BYTES:
        raise BundleError(f"the .litertlm's manifest gives its tokenizer {size_bytes} bytes: it is damaged")
    try:
        return zlib.decompressobj().decompress(data[8:], size_bytes + 1)
    except zlib.error as error:
        raise BundleError(f"the .litertlm's tokenizer is damaged ({error}): export it again") from error


def _parse_metadata(data: bytes) -> llm_metadata_pb2.LlmMetadata:
    metadata = llm_metadata_pb2.LlmMetadata()
    try:
        metadata.ParseFromString(data)
    except DecodeError as error:
        raise BundleError(f"the .litertlm's metadata is damaged ({error}): export it again") from error
    return metadata


def _write_checked(path: Path, role: str, entry: FileEntry, pieces: Iterator[bytes], *, verify: bool) -> None:
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("xb") as file:
        for piece in pieces:
            size_bytes += len(piece)
            if verify:
                digest.update(piece)
            file.write(piece)
    if size_bytes != entry.size_bytes:
        raise BundleError(
            f"the .litertlm's {role} has {size_bytes} bytes, its manifest says {entry.size_bytes}: export it again"
        )
    if verify and digest.hexdigest() != entry.sha256:
        raise BundleError(
            f"the .litertlm's {role} has SHA-256 {digest.hexdigest()[:16]}…, its manifest says "
            f"{entry.sha256[:16]}…: the file was changed, export it again"
        )
