"""Adapting nano's drafter: its steps are those of a round, a killed run goes on, and what is written is a drafter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtp_calibration.drafter.adapt import Adaptation, Step, Watch, adapt
from mtp_calibration.drafter.models import load, merge_adapters
from mtp_calibration.drafter.rounds import draft_step, round_masks
from mtp_calibration.same_model.float_pair import FloatDrafter, FloatTarget, lookup_name
from mtp_export.source.checkpoint import Checkpoint
from mtp_export.source.embedded import EMBEDDED
from mtp_export.source.pair import Pair, open_made_from
from tests.unit.source.test_adapters import ADAPTED, save_adapter

CPU = torch.device("cpu")
PROMPTS = [[2, 300, 400, 500], [2, 310, 410, 510], [2, 700, 800], [2, 333, 444, 555]]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return open_made_from("nano", None, None, ())


@torch.no_grad()
def test_rounds_are_those_of_an_export(pair: Pair) -> None:
    """The training step at every position of a text longer than the window, twice, against the exported segments."""
    ids = [2, *torch.randint(200, 4000, (159,), generator=torch.Generator().manual_seed(0)).tolist()]
    target = FloatTarget(pair, len(ids))
    (outputs,) = target.outputs([ids])
    exported = FloatDrafter(pair, len(ids), target.values[lookup_name("embedder")])
    model, drafter = load(pair.target.folder, CPU), load(pair.drafter.folder, CPU, trained=True)
    out = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
    rounds, first = len(ids) - 2, 140
    shared = {kind: tuple(x[:, :, :rounds] for x in kv) for kind, kv in out.shared_kv_states.items()}
    embedded, masks = model.get_input_embeddings()(torch.tensor([ids])), round_masks(rounds, 128, CPU)
    state, theirs = out.hidden_states[-1][:, :rounds], torch.from_numpy(outputs.activations[first - 1 : rounds])
    for step in (1, 2):
        now = embedded[:, step : step + rounds]
        hidden, state = draft_step(drafter, now, state, shared, masks, torch.arange(rounds) + 1)
        tokens = ids[first + step - 1 : rounds + step]
        expected, theirs = exported.step(tokens, theirs, outputs.caches, first, 1)
        torch.testing.assert_close(hidden[0, first - 1 :], expected, rtol=0, atol=1e-3)


def test_adapters_are_merged_as_an_export_merges_them(tmp_path: Path) -> None:
    pair = open_made_from("nano", None, None, (save_adapter(tmp_path / "lora", EMBEDDED / "target"),))
    model = load(pair.target.folder, CPU)
    merge_adapters(pair, model)
    weights = dict(model.named_parameters())
    for module in ADAPTED:
        name = f"{module}.weight"
        weight = weights[f"model.language_model.{name}"].detach()
        merged = torch.from_numpy(pair.target.rows(name, 0, len(weight)))
        plain = Checkpoint(EMBEDDED / "target", "target").rows(name, 0, len(weight))
        assert not torch.equal(merged, torch.from_numpy(plain))
        torch.testing.assert_close(weight, merged)


class KilledError(Exception):
    """The run is ended from outside."""


def test_a_killed_run_goes_on_and_writes_a_drafter(pair: Pair, tmp_path: Path) -> None:
    options = Adaptation(
        steps=4, batch=2, learning_rate=1e-3, max_new_tokens=8, position_offset=1, seed=0, save_every=2
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps: list[Step] = []
    adapt(pair, PROMPTS, whole, options, watch=Watch(on_step=steps.append))
    assert [step.number for step in steps] == [1, 2, 3, 4]

    def until_the_third(step: Step) -> None:
        if step.number == 3:
            raise KilledError

    with pytest.raises(KilledError):
        adapt(pair, PROMPTS, killed, options, watch=Watch(on_step=until_the_third))
    assert not killed.exists()
    again: list[Step] = []
    adapt(pair, PROMPTS, killed, options, resume=True, watch=Watch(on_step=again.append))
    assert [step.number for step in again] == [3, 4]
    assert again == steps[2:]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]

    stock, adapted = (load_file(folder / "model.safetensors") for folder in (EMBEDDED / "drafter", whole))
    assert {n: (t.shape, t.dtype) for n, t in adapted.items()} == {n: (t.shape, t.dtype) for n, t in stock.items()}
    kept = ("model.embed_tokens.weight", "masked_embedding.token_ordering")
    changed = {name for name in stock if not torch.equal(stock[name], adapted[name])}
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert "masked_embedding.centroids.weight" in changed
    assert not changed.intersection(kept)
    assert AutoModelForCausalLM.from_pretrained(whole).config.model_type == "gemma4_assistant"
    assert open_made_from("nano", None, str(whole), ()).drafter_spec == pair.drafter_spec
