"""The manifest of a bundle, and what is written last: the container and the manifest itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec

from mtp_export.arch import gemma4
from mtp_export.bundle import litertlm
from mtp_export.pair_graphs import TracedPair, contexts
from mtp_export.progress import Progress
from mtp_export.source import texts
from mtp_export.source.checkpoint import hash_file
from mtp_export.source.pair import input_files
from mtp_export.source.templates import read_template
from mtp_runtime.bundle.contract import FORMAT_VERSION, FileEntry, Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleContents:
    """What a bundle is made of. `bits`: of each part whose bits are not the recipe's. `files`: of graphs and texts, by
    the roles of the files."""

    traced: TracedPair
    bits: Mapping[str, int]
    files: Mapping[str, FileEntry]


def write_bundle(contents: BundleContents, folder: Path, progress: Progress, *, container: bool) -> Manifest:
    """Hash the inputs, write the `.litertlm` where there is to be one, and the manifest; return the manifest."""
    inputs = input_files(contents.traced.settings.pair)
    progress.start("hashing and bundling", len(inputs) + len(contents.traced.graphs) + 1)
    plain = manifest_of(contents, [_hash_input(part, path, progress) for part, path in inputs])
    progress.advance(len(contents.traced.graphs))
    manifest = _with_container(plain, folder) if container else plain
    litertlm.write_manifest(folder, manifest)
    progress.advance(1)
    return manifest


def _with_container(manifest: Manifest, folder: Path) -> Manifest:
    path = folder / f"{manifest.model}.litertlm"
    litertlm.write_litertlm(folder, manifest, path)
    return msgspec.structs.replace(manifest, files={**manifest.files, "litertlm": hash_file(path)})


def _hash_input(part: str, path: Path, progress: Progress) -> FileEntry:
    entry = hash_file(path)
    progress.advance(1)
    return FileEntry(path=f"{part}/{entry.path}", sha256=entry.sha256, size_bytes=entry.size_bytes)


def manifest_of(contents: BundleContents, inputs: Sequence[FileEntry]) -> Manifest:
    """Return the manifest of a bundle without a container, made from these inputs."""
    traced = contents.traced
    config, pair, shape = traced.settings.config, traced.settings.pair, traced.shape
    chosen, context = config.format.chooses_context, contexts(config, pair)
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=version("mtp-export"),
        model=config.source.model,
        export_format=config.format.name,
        recipe="mixed" if contents.bits else config.quantisation.recipe,
        drafter_recipe=config.quantisation.drafter,
        embedder_recipe="mixed" if contents.bits else config.quantisation.embedders,
        rounding=config.refinement.rounding,
        cache_length=shape.cache_length,
        num_draft_tokens=shape.num_draft_tokens,
        context_length=context.default if chosen else shape.cache_length - shape.num_draft_tokens,
        longest_context_length=context.longest if chosen else 0,
        ring_length=shape.ring_length or 0,
        batch_size=config.format.batch_size,
        drafter_position_offset=config.graph.drafter_position_offset,
        vocab_size=pair.target_spec.vocab_size,
        hidden_size=pair.target_spec.hidden_size,
        bos_token_id=pair.target_spec.bos_token_id,
        stop_token_ids=pair.generation.stop_token_ids,
        suppress_tokens=pair.generation.suppress_tokens,
        sampler=pair.generation.sampler,
        special_tokens=texts.special_tokens(pair.target),
        chat_template=read_template(pair.target).origin(),
        images=gemma4.read_image_settings(pair.target.config),
        target=pair.target_spec.as_manifest(),
        drafter=pair.drafter_spec.as_manifest(),
        inputs=tuple(inputs),
        files=dict(contents.files),
        signatures={graph.role: tuple(t.signature for t in graph.signatures) for graph in traced.graphs},
        bits=dict(contents.bits),
    )
