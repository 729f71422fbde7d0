"""nano, exported for real: every runtime says the same words, and the same input gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mtp_export.check.chats import parity_chats
from mtp_runtime import Bundle, Session
from mtp_runtime.errors import BundleError
from tests.conftest import Export, run_cli

# The runners of a report in their order, with their K.
OURS = [*(("mtp_runtime", k) for k in range(5)), ("mtp_runtime chats", 4)]
REFERENCE = [("transformers", 0), ("transformers chats", 0)]


def assert_equal(report: dict[str, Any], prompts: int, folder: Path) -> None:
    """Every runner says the same of every prompt and in every chat, and its drafts are accepted."""
    for result in report["results"]:
        verdicts = [c["verdict"] for c in result["comparisons"]]
        count = len(parity_chats()) if result["runner"].endswith(" chats") else prompts
        # At int4 the runtime's own library rounds otherwise where two tokens are as near as 0.045, behind a thought.
        near = {"near_tie"} if (report["recipe"], result["runner"]) == ("int4", "LiteRT-LM chats") else set()
        assert (len(verdicts), set(verdicts) - near) == (count, {"equal"}), (folder / "parity.md").read_text()
        if result["num_draft_tokens"] and result["runner"] != "LiteRT-LM chats":  # which tells no acceptance of chats
            assert result["committed_per_round"] > 1.5, "MTP runs, but its drafts are not accepted"


@pytest.mark.parametrize(("recipe", "prompts"), [("f32", 8), ("int8", 32), ("int4", 8)])
def test_every_runtime_generates_the_same_tokens(
    export_nano: Export, recipe: str, prompts: int, tmp_path: Path
) -> None:
    """Held-out prompts, 128 tokens: our runtime with every K, stock LiteRT-LM without and with MTP, and for the float
    bundle transformers, against our runtime without MTP. To the token, near-ties not excepted: see the next test.
    `mtp-export parity` without --limit runs all 32."""
    bundle = export_nano(recipe)
    done = run_cli("parity", str(bundle), "--limit", str(prompts), "--output", str(tmp_path), "--json", check=False)
    report = json.loads(done.stdout)
    assert (report["passed"], done.returncode) == (True, 0), (tmp_path / "parity.md").read_text()
    runners = [(r["runner"], r["num_draft_tokens"]) for r in report["results"]]
    stock = [(name, k) for k in (0, 4) for name in ("LiteRT-LM", "LiteRT-LM chats")]
    assert runners == OURS + (REFERENCE if recipe == "f32" else []) + stock
    assert_equal(report, prompts, tmp_path)


def test_parity_needs_a_context_in_which_litert_lm_takes_a_prompt(export_nano: Export) -> None:
    done = run_cli("parity", str(export_nano("int8")), "--context-length", "15", check=False)
    assert done.returncode == 2
    assert "context is 15, and LiteRT-LM takes no prompt in fewer than 16 tokens, the shortest prefill" in done.stderr


@pytest.mark.parametrize("recipe", ["f32", "int8", "int4"])
def test_a_token_has_the_same_bits_in_every_pass(export_nano: Export, recipe: str) -> None:
    """Whether it is decoded alone or verified at any row, before the window is full, while it fills and long after: so
    drafts cannot change what is said, even at a tie (docs/decisions/0011)."""
    with Session.open(export_nano(recipe)) as session:
        backend, vocab = session.backend, session.manifest.vocab_size
        tokens = np.random.default_rng(0).integers(100, vocab, 1000).tolist()
        for filled in (3, 126, 131, 254, 509, 900):
            backend.kv_cache.rewind(0)
            backend.prefill(tokens[:filled])
            together = backend.verify(tokens[filled : filled + 5])
            for row in range(5):
                alone = backend.verify(tokens[filled + row : filled + row + 1])
                np.testing.assert_array_equal(alone.logits[0], together.logits[row], f"{filled} + {row}")
                np.testing.assert_array_equal(alone.activations[0], together.activations[row])
                backend.kv_cache.advance(1)


@pytest.mark.parametrize("recipe", ["f32", "int8", "int4"])
def test_onnx_generates_the_same_tokens_with_every_k(export_nano: Export, recipe: str, tmp_path: Path) -> None:
    """To the token, near-ties not excepted: a row has the same bits in every pass (docs/decisions/0005). Eight prompts;
    `mtp-export parity` without --limit runs all 32."""
    prompts = 8
    arguments = ("--limit", str(prompts), "--threads", "1", "--output", str(tmp_path), "--json")
    done = run_cli("parity", str(export_nano(recipe, export_format="onnx")), *arguments, check=False)
    report = json.loads(done.stdout)
    assert (report["passed"], done.returncode) == (True, 0), (tmp_path / "parity.md").read_text()
    runners = [(r["runner"], r["num_draft_tokens"]) for r in report["results"]]
    assert runners == OURS + (REFERENCE if recipe == "f32" else [])
    assert_equal(report, prompts, tmp_path)


@pytest.mark.parametrize("export_format", ["tflite", "onnx"])
def test_two_exports_are_identical(export_nano: Export, export_format: str) -> None:
    first, second = (export_nano("int8", export_format=export_format, fresh=fresh) for fresh in (False, True))
    names = sorted(p.name for p in first.iterdir() if not p.name.startswith("parity"))
    assert names == sorted(p.name for p in second.iterdir() if not p.name.startswith("parity"))
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_litertlm_alone_is_a_bundle(export_nano: Export) -> None:
    """The one file carries the manifest: it runs, MTP included, and says what the folder says."""
    bundle = export_nano("int8")
    texts = []
    for path in (bundle, bundle / "nano.litertlm"):
        with Session.open(path) as session:
            trace = session.generate("class Stack:\n    def push(self", max_new_tokens=24).finish()
            texts.append(trace.tokens)
    assert texts[0] == texts[1]


def test_a_changed_file_is_refused(export_nano: Export, tmp_path: Path) -> None:
    bundle = tmp_path / "changed"
    bundle.mkdir()
    for path in export_nano("int8").iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    with (bundle / "drafter.tflite").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes((byte ^ 0xFF,)))
    with pytest.raises(BundleError, match="drafter"):
        Bundle.open(bundle)
    done = run_cli("run", str(bundle), "x", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_manifest_describes_the_bundle(export_nano: Export) -> None:
    with Bundle.open(export_nano("int8")) as bundle:
        manifest = bundle.exported
    assert (manifest.context_length, manifest.longest_context_length) == (1024, 4096)
    assert (manifest.cache_length, manifest.ring_length) == (4099, 1024)
    assert manifest.drafter_recipe == "int8"
    assert {entry.path for entry in manifest.inputs} >= {"target/model.safetensors", "drafter/model.safetensors"}
    verify = manifest.signature("target", "verify")
    assert verify.num_tokens == manifest.num_draft_tokens + 1
    assert manifest.signatures["drafter"][0].name == "draft"
    assert msgspec.to_builtins(manifest)["target"]["hidden_size"] == manifest.hidden_size
