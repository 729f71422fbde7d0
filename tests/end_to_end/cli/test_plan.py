"""Plans: their sizes against those of real exports, and that they read no weight."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from mtp_export.cli.export import command as export
from mtp_export.cli.plan import command
from mtp_export.errors import CheckpointError
from mtp_export.source.embedded import EMBEDDED
from mtp_runtime.errors import UserError
from tests.conftest import Export, run_cli
from tests.end_to_end.cli.test_cli import HEAVY, packages_imported, refused
from tests.support.hub_server import serving
from tests.support.tiny_files import rewrite_json, rewrite_tensors

VARIANTS = {"onnx": ("--batch-size", "8"), "onnx-portable": ("--portable",)}
# Graphs whose weights lie elsewhere and the manifest are small: what they take is estimated.
SMALL_BYTES = 256 << 10


NOWHERE = ("--output", "/tmp/not/there", "--json")


def planned(*arguments: str, command: click.Command = command) -> dict[str, Any]:
    """Plan nano with options, where nothing is."""
    return without_free_space(CliRunner().invoke(command, [*arguments, *NOWHERE], catch_exceptions=False).stdout)


def without_free_space(stdout: str) -> dict[str, Any]:
    """A plan without the space that is free on the disks, which others change."""
    result: dict[str, Any] = json.loads(stdout)
    for disk in result["disks"]:
        assert disk.pop("free_bytes") > 0
    return result


def hollow(source: Path, folder: Path) -> Path:
    """A checkpoint whose weights are a hole in the file: headers are there, and nothing else."""
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    return folder


class TestSizes:
    @pytest.mark.parametrize(
        ("export_format", "recipe"),
        [
            *(("tflite", recipe) for recipe in ("f32", "int8", "int4")),
            *(("onnx", recipe) for recipe in ("f32", "int8", "int4")),
            ("onnx-portable", "f32"),
        ],
    )
    def test_they_are_those_of_an_export_within_a_hundredth(
        self, export_format: str, recipe: str, export_nano: Export
    ) -> None:
        bundle = export_nano(recipe, export_format=export_format)
        options = ("--target", export_format.partition("-")[0], *VARIANTS.get(export_format, ()))
        sizes = planned("--recipe", recipe, *options)["files_bytes"]
        real = {path.name: path.stat().st_size for path in bundle.iterdir()}
        assert sizes.keys() == real.keys()
        for name, size in real.items():
            tolerance = 0.25 if size < SMALL_BYTES and name.endswith(".onnx") else 0.01
            assert sizes[name] == pytest.approx(size, rel=tolerance, abs=512), name
        assert sum(sizes.values()) == pytest.approx(sum(real.values()), rel=0.01)

    def test_memory_of_a_bundle_goes_by_the_context_that_an_app_chooses(self) -> None:
        """Four sliding layers of 64 and a full one of 128, keys and values in float32, for one KV head."""
        plan = planned("--rings", "off")
        by_context = plan["device"]["kv_cache_bytes_by_context"]
        assert by_context == {str(n): 2 * 4 * n * (4 * 64 + 128) for n in (1024, 2048, 4096)}
        assert plan["device"]["kv_cache_bytes"] == by_context["1024"]
        sizes = [plan[name] for name in ("context_length", "longest_context_length", "ring_length")]
        assert sizes == [1024, 4096, 0]

    def test_rings_are_as_large_at_every_context(self) -> None:
        """Positions in a cache of their own, one value a slot."""
        ring = 4 * 512 * (2 * 4 * 64 + 1)
        by_context = planned("--rings", "512", "--default-context", "1500")["device"]["kv_cache_bytes_by_context"]
        assert by_context == {str(n): ring + 2 * 4 * n * 128 for n in (1024, 1500, 2048, 4096)}

    def test_a_bundle_of_one_length_has_one_context(self) -> None:
        for options in (("--delegate", "gpu"), ("--target", "onnx")):
            plan = planned("--cache-length", "512", *options)
            assert plan["device"]["kv_cache_bytes_by_context"] == {"512": 2 * 4 * 512 * (4 * 64 + 128)}
            assert (plan["context_length"], plan["longest_context_length"], plan["ring_length"]) == (508, 0, 0)

    def test_the_table_of_contexts_is_printed(self) -> None:
        lines = CliRunner().invoke(command, ["--output", "/tmp/not/there"], catch_exceptions=False).stdout.splitlines()
        assert [line.split(":")[0].split()[-1] for line in lines if line.startswith("  context")] == [
            "1024",
            "2048",
            "4096",
        ]
        assert any("context 1024 tokens unless the app chooses another, at most 4096" in line for line in lines)


class TestNothingIsRead:
    def test_weights_may_be_a_hole(self, tmp_path: Path) -> None:
        """The drafter's token ordering, too, is not what an export would take."""
        folders = [str(hollow(EMBEDDED / part, tmp_path / part)) for part in ("target", "drafter")]
        assert planned("--checkpoint", folders[0], "--drafter", folders[1]) == planned()

    def test_an_export_would_find_the_hole(self, tmp_path: Path) -> None:
        """Before it converts anything."""
        drafter = hollow(EMBEDDED / "drafter", tmp_path / "drafter")
        message = refused("--drafter", str(drafter), "--output", str(tmp_path / "out"))
        assert "masked_embedding.token_ordering is not a permutation of 0…4095" in message

    def test_of_a_published_pair_headers_are_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        pair = {f"acme/{part}": EMBEDDED / part for part in ("target", "drafter")}
        with serving(pair) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.address)
            # A process of its own: the client reads its environment when it is imported.
            done = run_cli("plan", "--checkpoint", "acme/target", "--drafter", "acme/drafter", *NOWHERE)
        plan = without_free_space(done.stdout)
        assert hub.sent["model.safetensors"] <= 2 * 100_001, "no more than the client's first guess at a header"
        assert "tokenizer.json" not in hub.sent
        assert plan["download_bytes"] == pytest.approx(plan["input_bytes"], rel=0.001)
        local = planned()
        assert plan["files_bytes"].pop("manifest.json") == pytest.approx(
            local["files_bytes"].pop("manifest.json"), abs=8
        )
        assert plan["files_bytes"] == local["files_bytes"]

    def test_a_published_adapter_is_no_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor is one with merged weights beside it: transformers loads its base and puts it on that."""
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        shutil.copytree(EMBEDDED / "target", tmp_path / "target")
        (tmp_path / "target" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        with serving({"acme/target": tmp_path / "target"}) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.address)
            done = run_cli("plan", "--checkpoint", "acme/target", *NOWHERE, check=False)
        assert done.returncode == 2
        assert "holds an adapter (adapter_config.json)" in done.stderr

    def test_head_and_embedding_are_not_compared(self, tmp_path: Path) -> None:
        shutil.copytree(EMBEDDED / "target", tmp_path / "target")
        weights = tmp_path / "target" / "model.safetensors"
        name = "model.language_model.embed_tokens.weight"
        rewrite_tensors(weights, lambda tensors: tensors.update({"lm_head.weight": tensors[name] + 1}))
        folder = hollow(tmp_path / "target", tmp_path / "hollow")
        assert planned("--checkpoint", str(folder))["left_aside"] == ["lm_head.weight, if it equals the embedding"]

    def test_an_unreachable_hub_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        message = refused("plan", "--model", "e2b", "--output", str(tmp_path / "out"))
        assert message.startswith(
            "google/gemma-4-E2B-it is neither a folder nor in the Hugging Face cache, and the hub"
        )

    def test_an_unknown_id_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with serving({}) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.address)
            message = refused("plan", "--checkpoint", "acme/nothing", "--output", str(tmp_path / "out"))
        assert message.startswith("cannot download acme/nothing: ")


class TestPairs:
    def test_parts_that_do_not_belong_together(self, tmp_path: Path) -> None:
        drafter = tmp_path / "drafter"
        shutil.copytree(EMBEDDED / "drafter", drafter)
        rewrite_json(drafter / "config.json", {"backbone_hidden_size": 512})
        arguments = ("--drafter", str(drafter), "--output", str(tmp_path / "out"))
        assert refused("plan", *arguments) == refused("export", *arguments)
        assert "512" in refused("plan", *arguments)

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        arguments = ("--checkpoint", str(EMBEDDED / "drafter"), "--output", str(tmp_path / "out"))
        assert refused("plan", *arguments) == refused("export", *arguments)

    def test_a_missing_tokenizer(self, tmp_path: Path) -> None:
        shutil.copytree(EMBEDDED / "target", tmp_path / "target")
        (tmp_path / "target" / "tokenizer.json").unlink()
        arguments = ("--checkpoint", str(tmp_path / "target"), "--output", str(tmp_path / "out"))
        assert refused("plan", *arguments) == refused("export", *arguments)


DAMAGED_TOKENIZERS: dict[str, Callable[[str], str]] = {
    "text": lambda _: "hello",
    "cut off": lambda text: text[: len(text) // 2],
    "cut off early": lambda _: '{"a": 1',
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "no model": lambda _: "{}",
    "padding of nothing": lambda text: json.dumps(json.loads(text) | {"padding": {}}),
    "merges of unknown tokens": lambda text: json.dumps(
        json.loads(text) | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}
    ),
    "an id beyond the vocabulary": lambda text: json.dumps(
        json.loads(text) | {"model": {"type": "BPE", "vocab": {"a": 4096}, "merges": []}}
    ),
    "a pointer": lambda _: "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
}


@pytest.mark.parametrize("name", DAMAGED_TOKENIZERS)
def test_plan_and_export_refuse_a_damaged_tokenizer_with_one_message(tmp_path: Path, name: str) -> None:
    shutil.copytree(EMBEDDED / "target", tmp_path / "target")
    path = tmp_path / "target" / "tokenizer.json"
    path.write_text(DAMAGED_TOKENIZERS[name](path.read_text(encoding="utf-8")), encoding="utf-8")
    # Without them the padding of tokenizer.json has a say.
    (tmp_path / "target" / "tokenizer_config.json").unlink()
    messages = []
    for of_command in (command, export):
        arguments = ["--checkpoint", str(tmp_path / "target"), "--output", str(tmp_path / "out")]
        with pytest.raises(CheckpointError) as refusal:
            CliRunner().invoke(of_command, arguments, catch_exceptions=False)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]
    assert messages[0].startswith(str(path))


class TestCommand:
    def test_a_dry_run_is_a_plan(self) -> None:
        assert planned("--recipe", "int4", "--dry-run", command=export) == planned("--recipe", "int4")
        assert not Path("/tmp/not").exists()

    def test_what_people_read(self, tmp_path: Path) -> None:
        text = run_cli("plan", "--output", str(tmp_path / "out")).stdout
        for part in ("target.tflite", "LiteRT: prefill_16", "nano.litertlm", "to export: reads 23.7 MB", "about"):
            assert part in text
        assert "context 1024 tokens unless the app chooses another, at most 4096, up to 4 drafts a round" in text

    def test_options_are_those_of_export(self) -> None:
        def options(command: str) -> set[str]:
            return {word for word in run_cli(command, "--help").stdout.split() if word.startswith("--")}

        assert options("export") - options("plan") == {"--dry-run", "--resume"}
        assert options("plan") < options("export")

    def test_an_existing_output_is_refused_before_torch_is_loaded(self, tmp_path: Path) -> None:
        code, imported = packages_imported(["plan", "--output", str(tmp_path)])
        assert code == 2
        assert not HEAVY & imported

    def test_a_full_disk_is_exit_code_1_with_a_remedy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 40, (1 << 40) - 4096, 4096))
        done = CliRunner().invoke(command, ["--output", str(tmp_path / "out"), "--json"])
        assert done.exit_code == 1
        plan = json.loads(done.stdout)
        assert not plan["fits"]
        assert plan["disks"][0]["needed_bytes"] == sum(plan["files_bytes"].values())
        assert len(done.stderr.splitlines()) == 1
        assert "free some space, choose another --output, or a smaller --recipe" in done.stderr


@pytest.mark.parametrize("option", [("--max-size", "2GB"), ("--rounding", "gptq"), ("--centroid-top-k", "auto")])
def test_what_needs_the_weights_is_not_planned(option: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="settled by measuring: plan without them"):
        CliRunner().invoke(command, [*option, *NOWHERE], catch_exceptions=False)
