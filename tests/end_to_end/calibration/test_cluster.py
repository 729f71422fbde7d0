"""A dense drafter gets clusters: nano's without its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtp_export.errors import CheckpointError
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.pair import open_made_from
from tests.conftest import run_cli


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's drafter as transformers would save it with a dense head."""
    folder = tmp_path_factory.mktemp("dense") / "drafter"
    shutil.copytree(EMBEDDED / "drafter", folder)
    config = json.loads((folder / "config.json").read_text()) | {"use_ordered_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("masked_embedding")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_dense_drafter_is_sent_to_be_clustered_and_exports_then(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"use_ordered_embeddings is False.* with mtp-export cluster"):
        open_made_from("nano", None, str(dense), ())
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "clustered"
    texts = ("def add(a, b):", "The sea is", "import os\n", "class Stack:", "In the beginning")
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ("--checkpoint", str(EMBEDDED / "target"), "--clusters", "64", "--top-k", "16", "--prompts", str(prompts))
    few = ("--beginnings", "16", "--max-new-tokens", "48", "--steps", "150")
    output_text = run_cli("cluster", str(dense), *options, *few, "--output", str(output)).stdout
    recall = re.search(r"64 clusters, of which the best 16 hold (\d+\.\d)%", output_text)
    assert recall is not None
    assert float(recall[1]) > 80  # a quarter of the vocabulary; by chance it would be 25
    drafter: Any = AutoModelForCausalLM.from_pretrained(output)
    assert sorted(drafter.masked_embedding.token_ordering.tolist()) == list(range(4096))
    head = open_made_from("nano", None, str(output), ()).drafter_spec.head
    assert (head.num_centroids, head.top_k) == (64, 16)
    stored = load_file(output / "model.safetensors")
    assert all(stored[name].equal(tensor) for name, tensor in load_file(dense / "model.safetensors").items())
    again = run_cli("cluster", str(output), *options, "--output", str(tmp_path / "again"), check=False)
    assert again.returncode == 2
    assert "has clusters already" in again.stderr
