"""Every config.json that was published, or that a version of transformers made of one, beside weights of its shape: the
pair is planned as the model that it is.

The weights are a header and a hole: a plan reads no more. Their names and shapes are those of the published files, the
towers among them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_export.arch.published import PAIRS
from mtp_export.cli.plan import command
from tools.synthesize import files, layout, texts, towers

PUBLISHED = Path(__file__).parents[3] / "shared" / "published"
MODELS = ("e2b", "e4b")
LEFT_ASIDE = (
    "vision tower (658 tensors)",
    "audio tower (751 tensors)",
    "projections of images and audio (2 tensors)",
    "keys and values of KV-sharing layers ({} tensors)",
)


def configs_of(part: str) -> list[Path]:
    """The configs of a model's target, or of its drafter by `e2b-it-assistant`."""
    return [PUBLISHED / part / "config.json", *sorted(PUBLISHED.glob(f"configs/{part}.*.json"))]


def name_of(path: Path) -> str:
    return path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")


# The drafters' configs are fewer, and so some of them are planned twice.
CASES = [
    (model, target, configs_of(f"{model}-it-assistant")[i % len(configs_of(f"{model}-it-assistant"))])
    for model in MODELS
    for i, target in enumerate(configs_of(f"{model}-it"))
]


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of both models without a config."""
    folders = {}
    for model in MODELS:
        pair, folder = PAIRS[model], tmp_path_factory.mktemp(model)
        tensors = {
            "target": layout.target_tensors(pair.target, unused_caches=True)
            + towers.tensors_of(towers.of(model), pair.target.hidden_size),
            "drafter": layout.drafter_tensors(pair.drafter),
        }
        for part, stored in tensors.items():
            (folder / part).mkdir()
            header = files.header(stored)
            path = folder / part / "model.safetensors"
            path.write_bytes(header)
            os.truncate(path, len(header) + sum(tensor.size_bytes for tensor in stored))
        texts.write_target_texts(folder / "target", pair.target, "plain", towers.of(model), {})
        folders[model] = folder
    return folders


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="shared/published does not lie beside the repository")
@pytest.mark.parametrize(
    ("model", "target", "drafter"), CASES, ids=[f"{name_of(t)} with {name_of(d)}" for _, t, d in CASES]
)
def test_a_published_config_is_planned(hollow: dict[str, Path], model: str, target: Path, drafter: Path) -> None:
    folder = hollow[model]
    for part, config in (("target", target), ("drafter", drafter)):
        (folder / part / "config.json").unlink(missing_ok=True)
        shutil.copy(config, folder / part / "config.json")
    pair = ("--model", model, "--checkpoint", str(folder / "target"), "--drafter", str(folder / "drafter"))
    options = ("--recipe", "int4", "--output", str(folder / "out"), "--json")
    done = CliRunner().invoke(command, [*pair, *options], catch_exceptions=False)
    plan = json.loads(done.stdout)
    assert plan["model"] == model
    unused = 3 * PAIRS[model].target.values()["num_kv_shared_layers"]
    assert plan["left_aside"] == [phrase.format(unused) for phrase in LEFT_ASIDE]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="shared/published does not lie beside the repository")
def test_all_of_them_are_there() -> None:
    assert len({path for _, *pair in CASES for path in pair}) == 28
