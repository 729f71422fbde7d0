"""The ONNX pair on a real GPU, through ONNX Runtime's WebGPU provider."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_export.check.prompts import heldout_prompts
from mtp_runtime import Session
from tests.support.backend_tests import BackendTests
from tools.gpu_check.full_size import BUNDLES
from tools.gpu_check.machine import gpu
from tools.gpu_check.onnx_bundles import nano

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        gpu()["gpu"] == "unknown" or importlib.util.find_spec("onnxruntime_ep_webgpu") is None,
        reason="needs a GPU with a Vulkan driver (MTP_GPU_NAME: one not of NVIDIA), and mtp-export[webgpu]",
    ),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano, from where `tools.gpu_check` puts it, if it started the tests."""
    return nano(Path(os.environ.get(BUNDLES) or tmp_path_factory.mktemp("bundles")), "f32")


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")  # where a container hides the GPU
    with Session.open(bundle, provider="webgpu") as opened:
        yield opened


class TestWebGpu(BackendTests):
    """Target and drafter on the GPU, over caches in its memory."""

    def test_drafts_change_nothing(self, session: Session, bundle: Path) -> None:
        prompt = heldout_prompts()[0].text
        with Session.open(bundle) as cpu:
            expected = cpu.generate(prompt, max_new_tokens=8, num_draft_tokens=0).finish().tokens
        for drafts in (0, None):
            trace = session.generate(prompt, max_new_tokens=8, num_draft_tokens=drafts).finish()
            assert trace.tokens == expected
