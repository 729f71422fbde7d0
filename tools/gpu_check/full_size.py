"""Bundles for the checks: of nano; of E2B or E4B at true shapes with synthetic weights, and graphs no bundle has."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import ROOT
from mtp_export.arch import published
from mtp_export.arch.spec import DecoderSpec, DrafterSpec, LayerSpec, PairSpec
from mtp_export.bundle.litertlm import write_litertlm
from mtp_export.config import ExportConfig, FormatConfig, QuantisationConfig, SourceConfig
from mtp_export.export import export
from mtp_export.formats.format import format_of
from mtp_export.formats.tflite import chain as tflite
from mtp_export.formats.tflite.format import TFLiteFormat
from mtp_export.formats.tflite.write import write_graph
from mtp_export.graph.ir import TracedGraph
from mtp_export.graph.static import GraphShape, trace_target
from mtp_export.models.layers import RMSNorm, use_composites
from mtp_export.pair_graphs import Settings, trace_pair, trace_request
from mtp_export.source.pair import Pair, open_pair
from mtp_export.weights.parameter import Parameter
from mtp_export.weights.recipes import INT8
from mtp_runtime import read_manifest
from tools.gpu_check.converted import composed
from tools.synthesize.__main__ import synthesize

BUNDLES = "MTP_GPU_BUNDLES"  # the variable that names the folder of bundles to tests
VERIFIED = tuple(range(2, 9))  # tokens of a verify pass
_EMBEDDING = "model.embed_tokens.weight"


class Silent:
    """Progress that says nothing."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None: ...

    def advance(self, done: int, name: str = "") -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullSize:
    """What was written: the bundle; the same as one file with a dense head in the drafter; the target with every
    verify pass; and that drafter."""

    bundle: Path
    dense: Path
    passes: Path
    dense_drafter: Path


def bundle(folder: Path, recipe: str, delegate: str, *, composites: bool = False) -> Path:
    """Return a bundle of nano, exported if it is not there."""
    path = folder / f"nano-{recipe}-{delegate}{suffix(composites)}"
    return exported(export_config("nano", recipe, delegate, path, None, composites=composites))


def bundle_of_two_kv_heads(folder: Path) -> Path:
    """A bundle of random weights at f32, with composites, like nano's but for the two KV heads that E4B has, exported
    if it is not there."""
    path = folder / "two-kv-heads"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with two_kv_heads(), tempfile.TemporaryDirectory(prefix="two-kv-heads-", dir=folder) as place:
            checkpoint = Path(place) / "pair"
            synthesize("nano", checkpoint, variant="plain", depth=Fraction(1), seed=0)
            exported(export_config("nano", "f32", "gpu", path, checkpoint, composites=True))
    return path


@contextlib.contextmanager
def two_kv_heads() -> Iterator[None]:
    """Within it, nano has two KV heads."""
    pairs = cast(dict[str, PairSpec], published.PAIRS)
    nano = pairs["nano"]
    pairs["nano"] = dataclasses.replace(
        nano,
        target=dataclasses.replace(nano.target, layers=_with_two_kv_heads(nano.target)),
        drafter=dataclasses.replace(nano.drafter, layers=_with_two_kv_heads(nano.drafter)),
    )
    try:
        yield
    finally:
        pairs["nano"] = nano


def _with_two_kv_heads(spec: DecoderSpec) -> tuple[LayerSpec, ...]:
    return tuple(dataclasses.replace(layer, num_kv_heads=2) for layer in spec.layers)


def exported(config: ExportConfig) -> Path:
    """Return the bundle of an export, made if it is not there."""
    if not config.output.exists():
        config.output.parent.mkdir(parents=True, exist_ok=True)
        export(config, Silent())
    return config.output


def suffix(composites: bool) -> str:
    """Return what tells files of graphs with composites from those without."""
    return "-composites" if composites else ""


def write_full_size(model: str, folder: Path, *, composites: bool = False) -> FullSize:
    """Synthesise a pair and export it at int4 for a GPU, unless that was done. Its checkpoint is removed again."""
    checkpoint = folder / model
    name = f"{model}{suffix(composites)}"
    config = export_config(model, "int4", "gpu", folder / f"{name}-int4-gpu", checkpoint, composites=composites)
    written = FullSize(
        bundle=config.output,
        dense=folder / f"{name}-dense.litertlm",
        passes=folder / f"{name}-passes.tflite",
        dense_drafter=folder / f"{name}-dense" / "drafter.tflite",
    )
    if written.dense.exists():
        return written
    ours = not checkpoint.exists()
    if ours:
        command = [sys.executable, "-m", "tools.synthesize", "--model", model, "--output", str(checkpoint)]
        subprocess.run(command, check=True, cwd=ROOT)
    exported(config)
    _write_others(config, written)
    if ours:  # it is larger than all that was made of it
        shutil.rmtree(checkpoint)
    return written


def export_config(
    model: str, recipe: str, delegate: str, output: Path, checkpoint: Path | None, *, composites: bool = False
) -> ExportConfig:
    """Return an export with the defaults of the command line."""
    return ExportConfig(
        source=SourceConfig(
            model=model,
            target=None if checkpoint is None else str(checkpoint / "target"),
            drafter=None if checkpoint is None else str(checkpoint / "drafter"),
        ),
        format=FormatConfig(delegate=delegate, composites=composites),
        quantisation=QuantisationConfig(recipe=recipe),
        output=output,
        workers=2,
    )


def _write_others(config: ExportConfig, written: FullSize) -> None:
    pair = open_pair(config.source)
    traced = trace_pair(Settings(config=config, pair=pair), format_of(config.format))
    values = traced.values
    _write(config, trace_passes(pair.model, composites=config.format.composites), values["target"], written.passes)
    embedding = Parameter(
        shape=(pair.drafter_spec.vocab_size, pair.drafter_spec.hidden_size),
        format=INT8,
        rows=functools.partial(pair.drafter.rows, _EMBEDDING),
    )
    shutil.rmtree(written.dense_drafter.parent, ignore_errors=True)  # of a run that was stopped
    written.dense_drafter.parent.mkdir()
    dense = trace_dense_drafter(pair.model, traced.graphs[3])
    _write(config, dense, {**values["drafter"], _EMBEDDING: embedding}, written.dense_drafter)
    for path in config.output.iterdir():
        if path.name != written.dense_drafter.name and path.suffix != ".litertlm":
            (written.dense_drafter.parent / path.name).symlink_to(path.absolute())
    write_litertlm(written.dense_drafter.parent, read_manifest(config.output), written.dense)


def convert_all(models: Sequence[str], *, composites: bool) -> None:
    """Convert what the checks need of nano, and of `models` with composites or without, without checkpoints."""
    for recipe in ("f32", "int8"):
        _convert("nano", recipe, "cpu")
        for with_composites in (False, True):
            _convert("nano", recipe, "gpu", composites=with_composites)
    with two_kv_heads():
        _convert("nano", "f32", "gpu", composites=True)
    for model in models:
        drafter, spec = _convert(model, "int4", "gpu", composites=composites)[3], published.PAIRS[model]
        for graph in (trace_passes(spec, composites=composites), trace_dense_drafter(spec, drafter)):
            tflite.lower([graph], 2)


def _convert(model: str, recipe: str, delegate: str, *, composites: bool = False) -> list[TracedGraph]:
    spec = published.PAIRS[model]
    config = export_config(model, recipe, delegate, Path(), None, composites=composites)
    # All that tracing looks at of a pair.
    specs = types.SimpleNamespace(
        model=spec,
        target=types.SimpleNamespace(config={}),
        target_spec=spec.target,
        drafter_spec=spec.drafter,
    )
    pair = cast(Pair, specs)
    graphs = format_of(config.format).trace(trace_request(config, pair))
    tflite.lower(graphs, config.workers)
    return graphs


def _write(config: ExportConfig, graph: TracedGraph, values: Mapping[str, Parameter], path: Path) -> None:
    (lowered,) = TFLiteFormat(config.format).lower([graph], 2, lambda count: None)
    write_graph(lowered, {name: values[name] for name in graph.weights}, path)


def trace_passes(pair: PairSpec, *, composites: bool = False) -> TracedGraph:
    """Return the target with a `decode`, and a `verify_{n}` for every number of tokens."""
    shapes = (
        GraphShape(
            cache_length=pair.sizes.context_length,
            num_draft_tokens=n - 1,
            prefill_lengths=(),
            single_buffer=True,
            composites=composites,
        )
        for n in VERIFIED
    )
    graphs = [trace_target(pair.target, shape) for shape in shapes]
    renamed = [
        dataclasses.replace(traced, signature=msgspec.structs.replace(traced.signature, name=f"verify_{n}"))
        for n, graph in zip(VERIFIED, graphs, strict=True)
        for traced in graph.signatures[1:]
    ]
    segments = {key: segment for graph in graphs for key, segment in graph.segments.items()}
    return dataclasses.replace(graphs[0], segments=segments, signatures=(graphs[0].signatures[0], *renamed))


class DenseHead(nn.Module):
    """The drafter's head as if it had no clusters: every token is scored."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.post_projection = nn.Linear(spec.hidden_size, spec.backbone_hidden_size, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x [1,1,H] -> logits [1,1,V], projected_activations [1,1,backbone]"""
        hidden = self.norm(x)
        logits = F.linear(hidden, self.embed_tokens.weight)
        return {"logits": logits, "projected_activations": self.post_projection(hidden)}


def trace_dense_drafter(pair: PairSpec, drafted: TracedGraph) -> TracedGraph:
    """`drafted`, a drafter's graph, with the dense head in place of its own."""
    with torch.no_grad(), torch.device("meta"):
        module = DenseHead(pair.drafter).eval().requires_grad_(False)
    if composed(drafted):
        use_composites(module)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    weights = {leaf: leaf if leaf == "post_projection.weight" else f"model.{leaf}" for leaf in shapes}
    signatures = [
        dataclasses.replace(
            traced,
            calls=tuple(
                dataclasses.replace(call, weights=weights) if call.segment == "head" else call for call in traced.calls
            ),
        )
        for traced in drafted.signatures
    ]
    kept = {name: shape for name, shape in drafted.weights.items() if not name.startswith("masked_embedding.")}
    return dataclasses.replace(
        drafted,
        segments={**drafted.segments, "head": dataclasses.replace(drafted.segments["head"], module=module)},
        signatures=tuple(signatures),
        weights=kept | {weights[leaf]: shape for leaf, shape in shapes.items()},
    )
