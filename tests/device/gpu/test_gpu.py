"""On a real GPU: `python -m tools.gpu_check tests` runs these there, elsewhere they are skipped."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtp_export.check.prompts import heldout_prompts
from mtp_export.formats.tflite.gpu_table import delegate_table
from tools.gpu_check.converted import conversions
from tools.gpu_check.equality import check_equality
from tools.gpu_check.full_size import BUNDLES, bundle
from tools.gpu_check.machine import gpu
from tools.gpu_check.probe import collect, run_probes, write_probes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        gpu()["gpu"] == "unknown",
        reason="needs a GPU with a Vulkan driver (MTP_GPU_NAME: one not of NVIDIA)",
    ),
]


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Bundles of nano by recipe and delegate. A machine with a GPU may lack the converter: they come from where
    `tools.gpu_check` puts them, if it started the tests."""
    folder = Path(os.environ.get(BUNDLES, tmp_path))
    with conversions(folder / "converted"):
        yield functools.partial(bundle, folder)


def test_the_drafter_changes_nothing(exported: Callable[[str, str], Path]) -> None:
    prompts = [prompt.text for prompt in heldout_prompts()][:2]
    rows = check_equality(
        exported("int8", "gpu"),
        prompts,
        max_new_tokens=32,
        drafters=("exported", "noise"),
        on_run=lambda name: None,
    )
    exact = [row for row in rows if row["activations"] == "fp32"]
    assert [row["against_plain"]["equal"] for row in exact] == [2, 2, 2]
    acceptance = {row["drafter"]: row["acceptance_rate"] for row in exact}
    assert acceptance["exported"] > 0.1 > acceptance["noise"]


def test_the_table_lists_what_the_backend_delegates(exported: Callable[[str, str], Path], tmp_path: Path) -> None:
    forms = collect([exported("int8", "cpu") / "drafter.tflite"])  # the CPU's, whose scatter is refused
    write_probes(forms, tmp_path)
    delegated = {row["form"]: row["delegated"] for row in run_probes(tmp_path)}
    table = delegate_table("gpu")
    assert delegated == {form: table.reasons[form] is None for form in forms}
    assert not all(delegated.values())
