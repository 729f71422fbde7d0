"""What the converter writes and a runtime reads: tensors, graph signatures and the manifest.

The names and shapes are LiteRT-LM's (docs/format.md). Fixed letters: T tokens of a signature, S cache length,
K draft tokens of a round, H hidden size, L layers, P per-layer embedding size, V vocabulary, G KV heads, D head size.

- `prefill_{N}`: embeddings[1,T,H], per_layer_embeddings[1,T,L,P], input_pos[T], mask[1,1,T,S] and the caches → the
  caches.
- `decode` (T = 1) and `verify` (T = K + 1): the same → the caches, logits[1,T,V], activations[1,T,H].
- `draft`: activations[1,1,2H], input_pos[1], mask[1,1,1,S] and the caches that it reads → logits[1,1,V],
  projected_activations[1,1,H].
- `embed`: token_ids[1,1] → embeddings[1,1,H], or [1,1,L,P] of the per-layer embedder.

Caches are `kv_cache_k_{n}` and `kv_cache_v_{n}`, float32, n counting the layers that own a cache: [1,G,S,D], values of
full layers [1,G,D,S]. With rings those of sliding layers are [1,G,R,D], and one more cache, with the number of these
pairs for n, [1,1,R,1], has the position of each slot.

A bundle for a GPU (`--delegate gpu`) has one more input in every signature of target and drafter, `param_tensor`
[1,1,1,7] int32: the first slot that a pass writes, the slot behind the last one, that again, and zeros. All its caches
of values are [1,G,D,S].
"""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mtp_runtime.errors import BundleError

FORMAT_VERSION = 2  # all versions up to it are read
MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20

PARAM_TENSOR = "param_tensor"
PARAM_COUNT = 7
Dtype = Literal["float32", "int32"]
SignatureKind = Literal["prefill", "decode", "verify", "forward", "draft", "embed"]


class _Version(msgspec.Struct):
    format_version: int


# Roles of the files of a bundle, in the order in which they are listed.
GRAPH_ROLES = ("target", "drafter", "embedder", "per_layer_embedder")


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class CacheName:
    """Name of a KV cache: `kv_cache_k_4` holds the keys of layer 4, `kv_cache_v_4` its values.

    A layer of an ONNX graph that only reads a cache gives it back as an output: `reader` is its number, and
    `kv_cache_k_4.9` are the keys of layer 4 as layer 9 leaves them.
    """

    PREFIX: ClassVar[str] = "kv_cache_"
    NEXT: ClassVar[str] = "_next"  # ends the name of what a pass leaves in a cache's place
    _FORM: ClassVar[re.Pattern[str]] = re.compile(
        r"kv_cache_(?P<part>[kv])_(?P<index>0|[1-9][0-9]{0,3})(?:\.(?P<reader>0|[1-9][0-9]{0,3}))?"
    )

    part: Literal["k", "v"]
    index: int
    reader: int | None = None

    def __str__(self) -> str:
        return f"{self.PREFIX}{self.part}_{self.index}" + ("" if self.reader is None else f".{self.reader}")

    @property
    def next(self) -> str:
        """Name of what a pass leaves in the cache's place."""
        return f"{self}{self.NEXT}"

    @property
    def shared(self) -> CacheName:
        """Name of the cache itself, whichever layer reads it."""
        return dataclasses.replace(self, reader=None)

    @classmethod
    def pair(cls, index: int) -> tuple[CacheName, CacheName]:
        """Return the names of the keys and the values of layer `index`."""
        return cls(part="k", index=index), cls(part="v", index=index)

    @classmethod
    def parse(cls, name: str) -> CacheName:
        """Return the cache name that `name` spells.

        Raises:
            BundleError: it spells none.
        """
        match = cls._FORM.fullmatch(name)
        if match is None:
            raise BundleError(f"{name!r} is no name of a KV cache, such as kv_cache_k_0: export the bundle again")
        part: Literal["k", "v"] = "k" if match["part"] == "k" else "v"
        reader = match["reader"]
        return cls(part=part, index=int(match["index"]), reader=None if reader is None else int(reader))

    @classmethod
    def in_name(cls, name: str) -> bool:
        """Return whether a tensor's name begins as a cache's does."""
        return name.startswith(cls.PREFIX)


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Name, shape and dtype of a graph's input or output; a dimension that may vary is given by its name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: Dtype

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a tensor of which no dimension varies.

        Raises:
            BundleError: one does.
        """
        sizes = tuple(size for size in self.shape if isinstance(size, int))
        if len(sizes) != len(self.shape):
            raise BundleError(f"{self.name} has the shape {self.shape}, expected fixed sizes: export the bundle again")
        return sizes

    @property
    def is_cache(self) -> bool:
        """Whether the tensor is one of the shared KV caches, or a sequence's own (`of_sequence`)."""
        return _is_cache(self.name)


class GraphSignature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry point of a graph.

    `attention_length` is there in bundles of format version 1 alone, which have variants of signatures, such as
    `decode_1024`, that read less of the cache than S. A runtime needs none of them.
    """

    name: str
    kind: SignatureKind
    num_tokens: int
    attention_length: int = 0
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def single_buffer(self) -> bool:
        """Whether it is told which slots it writes and how many are filled then; caches of values are [1,G,D,S] in
        that case."""
        return any(tensor.name == PARAM_TENSOR for tensor in self.inputs)


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the bundle, by its name relative to the manifest."""

    path: str
    sha256: str
    size_bytes: int


class SamplerDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the checkpoint says that tokens are drawn; the defaults are transformers'.

    `top_k` 0 keeps every token. Without `do_sample` only `repetition_penalty` has an effect.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class ChatTemplateOrigin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a bundle's chat template was, and the hash of its text; where it is one that Google published, of which
    models and when."""

    source: str
    sha256: str
    of: str = ""
    published: str = ""


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the checkpoint cuts an image: the side of a patch in pixels, and the most patches."""

    patch_size: int
    max_num_patches: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle holds and how to run it (`manifest.json`).

    `files` maps a role (`target`, `drafter`, `embedder`, `per_layer_embedder`, `tokenizer`, `tokenizer_config`,
    `chat_template`, `litertlm`) to its file; `signatures` maps a graph's role to its signatures.
    `cache_length` is S in the graphs, `context_length` how many tokens may be filled: S - K, because a verify writes
    K + 1 rows at the pending position. Where the context is chosen when a bundle is opened, it is the one of who
    chooses none, `longest_context_length` is the most, and S is a prime above. `ring_length` is R, 0 without rings.
    `drafter_position_offset` is what the draft graph adds to the `input_pos` it is fed, the position of the last
    processed token (the convention of LiteRT-LM 0.18): 1 gives transformers' convention, 0 vLLM's. With a `batch_size`
    above 1 there are also a `target_batch` and a `drafter_batch`, for so many sequences (`for_sequences`).
    """

    format_version: int
    tool_version: str
    model: str
    export_format: str
    recipe: str
    drafter_recipe: str
    embedder_recipe: str = ""  # empty in bundles that older versions wrote: the target's
    rounding: str = "nearest"  # of the target's matrices: nearest, gptq
    bits: Mapping[str, int] = {}  # with the recipe `mixed`, of each part of the target
    cache_length: int
    num_draft_tokens: int
    context_length: int
    longest_context_length: int = 0  # 0: the context is not chosen
    ring_length: int = 0
    batch_size: int = 1
    drafter_position_offset: int
    vocab_size: int
    hidden_size: int
    bos_token_id: int
    stop_token_ids: tuple[int, ...]
    suppress_tokens: tuple[int, ...] = ()  # never said
    sampler: SamplerDefaults | None = None  # None in bundles that older versions wrote
    special_tokens: Mapping[str, str] | None = None  # by name, as a chat template sees them; None: the bos alone
    chat_template: ChatTemplateOrigin | None = None
    images: ImageSettings | None = None  # None where the checkpoint has no vision tower
    target: Mapping[str, Any]
    drafter: Mapping[str, Any]
    inputs: tuple[FileEntry, ...]
    files: Mapping[str, FileEntry]
    signatures: Mapping[str, tuple[GraphSignature, ...]]

    @property
    def chooses_context(self) -> bool:
        """Whether how much of the cache is allocated is chosen when the bundle is opened."""
        return self.longest_context_length > 0

    @property
    def samples(self) -> bool:
        """Whether the checkpoint says that tokens are drawn."""
        return self.sampler is not None and self.sampler.do_sample

    def to_json(self) -> str:
        """Serialise deterministically: sorted keys, no times, no machine names."""
        packed = msgspec.json.encode(self, order="deterministic")
        return msgspec.json.format(packed, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: the text is not a manifest of this version, or contradicts itself.
        """
        try:
            # The version first: a newer manifest may have another shape, and deserves another message.
            version = msgspec.json.decode(text, type=_Version).format_version
            if version > FORMAT_VERSION:
                raise BundleError(
                    f"the bundle has format version {version} and this runtime reads up to {FORMAT_VERSION}: "
                    "upgrade mtp-export"
                )
            manifest = msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BundleError(f"{MANIFEST_NAME} is not a valid manifest ({error}): export the bundle again") from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME}: format_version is {self.format_version}, expected 1 to {FORMAT_VERSION}"
            )
        if self.num_draft_tokens < 1 or self.context_length < 1 or self.vocab_size < 1 or self.hidden_size < 1:
            raise BundleError(f"{MANIFEST_NAME}: sizes must be positive: export the bundle again")
        self._check_context()
        for role, entry in self.files.items():
            # A manifest is data from anywhere: a name must stay inside its folder.
            parts = PurePosixPath(entry.path).parts
            if len(parts) != 1 or parts[0] in ("", ".", "..") or "\\" in entry.path or "\0" in entry.path:
                raise BundleError(f"{MANIFEST_NAME}: file {role} has the unsafe path {entry.path!r}")
        for role in GRAPH_ROLES:
            if role in self.signatures and role not in self.files:
                raise BundleError(f"{MANIFEST_NAME}: signatures of {role} but no such file")
            if role not in self.signatures:
                raise BundleError(f"{MANIFEST_NAME}: no signatures of {role}: export the bundle again")

    def _check_context(self) -> None:
        room, longest = self.cache_length - self.num_draft_tokens, self.longest_context_length
        fits = self.context_length == room if longest == self.ring_length == 0 else self._may_choose()
        if not fits:
            raise BundleError(
                f"{MANIFEST_NAME}: context_length is {self.context_length}, expected cache_length - num_draft_tokens = "
                f"{room}, or in TFLite at most longest_context_length, below cache_length: export the bundle again"
            )

    def _may_choose(self) -> bool:
        allowed = self.format_version > 1 and self.export_format == "tflite" and self.ring_length >= 0
        return allowed and self.context_length <= self.longest_context_length < self.cache_length

    def signature(self, role: str, name: str) -> GraphSignature:
        """Return the signature `name` of the graph `role`.

        Raises:
            BundleError: there is none.
        """
        for signature in self.signatures.get(role, ()):
            if signature.name == name:
                return signature
        raise BundleError(f"the bundle's {role} has no signature {name!r}: export it again with this version")


BATCH_ROLES = ("target", "drafter")  # the graphs that have another form for several sequences
TOKEN_COUNTS = "token_counts"
ROW_COUNTS = "row_counts"
_POOL_INPUTS = ("full_last", "full_total", "sliding_last", "sliding_total")


def for_sequences(signature: GraphSignature, sequences: int) -> GraphSignature:
    """Return the signature of the graph that processes several sequences in one pass (ONNX; docs/format.md).

    The target has all their tokens in its dimension of tokens, sequence by sequence, as many as `token_counts` [N]
    says, and of those of each the last `row_counts` [N] in its dimension of rows; the drafter has N in its dimension
    of the batch. Caches, and how full they are, belong to one sequence each.
    """
    whole = "batch" if signature.kind == "forward" else None

    def repeated(specs: tuple[TensorSpec, ...]) -> Iterator[TensorSpec]:
        for spec in specs:
            own = spec.is_cache or spec.name in _POOL_INPUTS
            single = ("batch",) if own else (whole,)
            shape = tuple(1 if size in single else sequences if size == "batch" else size for size in spec.shape)
            names = [of_sequence(spec.name, i) for i in range(sequences)] if own else [spec.name]
            yield from (TensorSpec(name=name, shape=shape, dtype=spec.dtype) for name in names)

    counts = (TOKEN_COUNTS, ROW_COUNTS) if whole else ()
    counted = tuple(TensorSpec(name=name, shape=(sequences,), dtype="int32") for name in counts)
    inputs, outputs = tuple(repeated(signature.inputs)), tuple(repeated(signature.outputs))
    return msgspec.structs.replace(signature, inputs=inputs + counted, outputs=outputs)


def param_tensor(start: int, stop: int) -> NDArray[np.int32]:
    """What says that a pass writes the slots from `start` up to `stop`, and reads those up to `stop`."""
    values = np.zeros((1, 1, 1, PARAM_COUNT), np.int32)
    values[..., :3] = start, stop, stop
    return values


def output_name(name: str) -> str:
    """Return the name of an output in an ONNX graph: a cache goes in and out, and a graph's values have one name
    each."""
    return f"{name}{CacheName.NEXT}" if _is_cache(name) else name


def cache_of_output(name: str) -> str | None:
    """Return the name of the cache that an output gives back, its sequence's own where it has one; None where the
    output is no cache."""
    sequence, slash, own = name.rpartition("/")
    return f"{sequence}{slash}{CacheName.parse(own).shared}" if _is_cache(name) else None


def _is_cache(name: str) -> bool:
    return CacheName.in_name(name) or f"/{CacheName.PREFIX}" in name


def of_sequence(name: str, sequence: int) -> str:
    """Name that a tensor of one sequence has in a graph for several."""
    return f"sequence_{sequence}/{name}"


def batch_role(role: str) -> str:
    """Role of the file with the graph that `role` has for several sequences."""
    return f"{role}_batch"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a bundle's folder.

    Raises:
        BundleError: the folder or its manifest is missing, unreadable or invalid.
    """
    path = folder / MANIFEST_NAME
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device has no end
            raise BundleError(f"{path} is not a file: export the bundle again")
        if status.st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {status.st_size} bytes, too many for a manifest: export the bundle again")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"no {MANIFEST_NAME} in {folder}: give a folder that mtp-export wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    return Manifest.from_json(text)
