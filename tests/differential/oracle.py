"""A pair's folders through transformers and through our float32 export: the same logits and the same greedy tokens.

The prompt is given in passes of several tokens, and what follows is generated with drafts; transformers is given all of
it in one pass. So greedy tokens are compared along our own output, where one that differs shows at its first place.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mtp_export.arch.gemma4 import read_target_spec
from mtp_export.config import ExportConfig, FormatConfig, GraphConfig, QuantisationConfig, SourceConfig
from mtp_export.export import ExportResult, export
from mtp_export.plan import Plan, plan
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.generation import read_generation
from mtp_runtime import Session
from mtp_runtime.errors import UserError

# Float32 sums in another order differ by some 1e-5 here, where logits reach 30; one wrong term shows as 1e-2 and more.
TOLERANCE = 1e-4
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):"
NEW_TOKENS = 12
CACHE_LENGTH = 64
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PREFIX = "model.language_model."

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Folders of a target and a drafter that a test may change, and the adapters to merge."""

    target: Path
    drafter: Path
    adapters: tuple[Path, ...] = ()

    def config(self, change: Mapping[str, Any] | Callable[[dict[str, Any]], object], part: str = "target") -> None:
        """Change config.json: by keys (`...` removes one), or by a function."""
        rewrite_json(self.folder(part) / "config.json", change)

    def text_config(self, part: str = "target", **changes: Any) -> None:
        self.config(lambda config: _update(config["text_config"], changes), part)

    def tensors(self, change: Callable[[Tensors], object], part: str = "target") -> None:
        """Change the tensors of the one file of weights."""
        path = self.folder(part) / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        write_tensors(tensors, path)

    def folder(self, part: str) -> Path:
        return self.target if part == "target" else self.drafter


def rewrite_json(path: Path, change: Mapping[str, Any] | Callable[[Any], object]) -> None:
    """Change a JSON file, or write one: by keys (`...` removes one), or by a function."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if callable(change):
        change(document)
    else:
        _update(document, change)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _update(document: dict[str, Any], changes: Mapping[str, Any]) -> None:
    document |= changes
    for key in [key for key, value in document.items() if value is ...]:
        del document[key]


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    path.unlink(missing_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


@contextmanager
def nano_pair() -> Iterator[Pair]:
    """A copy of nano's folders, gone at the end: a suite's worth of them would fill a disk."""
    with tempfile.TemporaryDirectory(prefix="mtp-differential-") as folder:
        for part in ("target", "drafter"):
            shutil.copytree(EMBEDDED / part, Path(folder) / part)
        yield Pair(target=Path(folder) / "target", drafter=Path(folder) / "drafter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a runtime makes of the prompt and its own output after it, and of a first draft at the prompt's end.

    Shapes: logits [T,V] of all tokens but the last, draft [V] with the best at 0
    """

    export_format: str
    tokens: tuple[int, ...]
    prompt_length: int
    logits: NDArray[np.float32]
    draft: NDArray[np.float32]


class Silent:
    """Progress of an export that nobody watches."""

    def start(self, stage: str, total: int, *, of_bytes: bool = False) -> None: ...

    def advance(self, done: int, name: str = "") -> None: ...


def export_config(pair: Pair, output: Path, export_format: str = "tflite") -> ExportConfig:
    return ExportConfig(
        source=SourceConfig(
            model="nano", target=str(pair.target), drafter=str(pair.drafter), adapters=tuple(pair.adapters)
        ),
        format=FormatConfig(name=export_format),
        quantisation=QuantisationConfig(recipe="f32"),
        graph=GraphConfig(cache_length=CACHE_LENGTH),
        output=output,
    )


def exported(pair: Pair, export_format: str = "tflite") -> tuple[Run, ExportResult]:
    """Export a pair and run it.

    Raises:
        UserError: it is refused.
    """
    with tempfile.TemporaryDirectory(prefix="mtp-differential-") as folder:
        result = export(export_config(pair, Path(folder) / "bundle", export_format), Silent())
        files = result.manifest.files.values()
        graphs = tuple(sorted((f.path, f.sha256) for f in files if f.path.endswith((".tflite", ".onnx", ".onnx.data"))))
        if graphs not in _RUNS:  # the same bytes say the same
            _RUNS[graphs] = _run(result.output)
        return _RUNS[graphs], result


_RUNS: dict[tuple[tuple[str, str], ...], Run] = {}


def _run(bundle: Path) -> Run:
    with Session.open(bundle, threads=1, cache_dir=bundle.parent) as session:
        prompt = session.tokenize(PROMPT)
        generation = session.generate(PROMPT, max_new_tokens=NEW_TOKENS, stop_token_ids=()).finish()
        tokens = (*prompt, *generation.tokens)
        backend, logits = session.backend, []
        backend.kv_cache.rewind(0)
        step = session.manifest.num_draft_tokens + 1
        draft: NDArray[np.float32] | None = None
        for at in (*range(0, len(prompt), step), *range(len(prompt), len(tokens) - 1, step)):
            end = min(at + step, len(prompt) if at < len(prompt) else len(tokens) - 1)
            passed = backend.verify(tokens[at:end])
            backend.kv_cache.advance(end - at)
            logits.append(passed.logits)
            if end == len(prompt):
                proposal = backend.draft(tokens[end], passed.activations[-1], with_candidates=True)
                assert proposal.candidates is not None
                assert proposal.scores is not None
                draft = np.full(session.manifest.vocab_size, proposal.scores.min() - 1.0, np.float32)
                draft[proposal.candidates] = proposal.scores
    assert draft is not None
    return Run(
        export_format=session.manifest.export_format,
        tokens=tokens,
        prompt_length=len(prompt),
        logits=np.concatenate(logits),
        draft=draft - draft.max(),
    )


@torch.no_grad()
def assert_transformers_agrees(run: Run, pair: Pair) -> None:
    """Compare with what transformers makes of the same folders, which must load without a missing key."""
    target = loaded(pair.target)
    for adapter in pair.adapters:
        from peft import PeftModel

        target = PeftModel.from_pretrained(target, str(adapter)).merge_and_unload()
    options = {"output_hidden_states": True, "return_shared_kv_states": True, "use_cache": False}
    whole = target(torch.tensor([run.tokens[:-1]]), **options)
    np.testing.assert_allclose(run.logits, whole.logits[0].numpy(), atol=TOLERANCE, rtol=0)
    greedy = whole.logits[0].argmax(-1).tolist()[run.prompt_length - 1 :]
    assert greedy == list(run.tokens[run.prompt_length :])
    end = run.prompt_length
    before = target(torch.tensor([run.tokens[:end]]), **options)
    embedded = target.get_input_embeddings()(torch.tensor([[run.tokens[end]]]))
    proposal = loaded(pair.drafter)(
        inputs_embeds=torch.cat([embedded, before.hidden_states[-1][:, -1:]], -1),
        position_ids=torch.tensor([[end]]),
        shared_kv_states=before.shared_kv_states,
    )
    row = proposal.logits[0, 0]
    if run.export_format == "tflite":
        row[list(stop_tokens(pair))] = row.min()  # a LiteRT pair drafts none, and scores it as one that is no candidate
    np.testing.assert_allclose(run.draft, (row - row.max()).numpy(), atol=TOLERANCE, rtol=0)


def stop_tokens(pair: Pair) -> tuple[int, ...]:
    """The tokens that end a reply of the target's."""
    target = Checkpoint(pair.target, "target")
    spec = read_target_spec(target.config, str(pair.target))
    return read_generation(target, spec.vocab_size).stop_token_ids


def loaded(folder: Path) -> Any:
    """What transformers makes of a folder, in float32; it must find every tensor."""
    library: Any = transformers
    model, info = library.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"], f"transformers misses {sorted(info['missing_keys'])[:3]}"
    return model.train(False)


@functools.cache
def nano_run() -> Run:
    """nano as it lies in the package."""
    with nano_pair() as pair:
        run, _ = exported(pair)
        assert_transformers_agrees(run, pair)
    return run


def assert_nano(run: Run) -> None:
    """Compare with nano itself: for folders that transformers does not load, and of which the meaning is plain."""
    expected = nano_run()
    assert run.tokens == expected.tokens
    np.testing.assert_allclose(run.logits, expected.logits, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(run.draft, expected.draft, atol=TOLERANCE, rtol=0)


def planned(pair: Pair) -> Plan:
    """Plan the export of a pair.

    Raises:
        UserError: it is refused.
    """
    return plan(export_config(pair, pair.drafter / "bundle"))


def refusal(pair: Pair, run: Callable[[Pair], object] = exported) -> str:
    """The one line with which an export, or what else `run` is, is refused."""
    with pytest.raises(UserError) as caught:
        run(pair)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)
