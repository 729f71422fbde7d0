"""Altered files: whatever is done to them, they are read whole or refused in one line, at once and in little memory."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_export.arch import gemma4
from mtp_export.cli import main as cli
from mtp_export.source.checkpoint import Checkpoint, check_tensors, read_token_ordering
from mtp_runtime import Bundle
from mtp_runtime.errors import UserError
from tests.support import toy_pair
from tests.support.gemma4_configs import drafter_config, target_config
from tests.support.litertlm_files import build_container
from tests.support.tiny_files import MODELS, copy_pair, pair_arguments, rewrite_tensors, tiny_model

MEMORY_BYTES = 256 << 20  # many times what any of these files takes
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

fuzz = settings(
    max_examples=150,
    derandomize=True,  # the same alterations in every run
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # files are put back for every example
)
Alteration = list[tuple[str, float, bytes]]
Alter = Callable[[bytes], bytes]

# Values that trip readers: edges of integers, emptiness, and what other languages write for nothing.
ODD: st.SearchStrategy[object] = st.sampled_from(
    [0, -1, 1, True, False, None, "", "\0", "\ud800", [], {}, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, [[]]]
)
VALUES = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
# What is done to bytes, and where, as a fraction of their length.
ALTERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=3,
)


def altered(content: bytes, alterations: Alteration) -> bytes:
    for kind, place, patch in alterations:
        at = int(place * len(content))
        if kind == "cut":
            content = content[:at]
        else:
            after = at if kind == "insert" else at + len(patch)
            content = content[:at] + (b"" if kind == "delete" else patch) + content[after:]
    return content


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let this process grow by MEMORY_BYTES and no more: whoever asks for more gets a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def survives(read: Callable[[], object]) -> bool:
    """Read something; returns whether it was accepted. Anything but a UserError of one line is a failure."""
    try:
        with little_memory():
            read()
    except UserError as error:
        refused = error
    else:
        return True
    assert refused.exit_code == 2
    assert "\n" not in str(refused)
    return False


def replaced(document: Any, path: list[int], value: Any, *, delete: bool) -> Any:
    """Put `value` somewhere into a JSON document; `path` chooses, level by level, where."""
    document = copy.deepcopy(document)
    at, key = document, None
    for depth, step in enumerate(path):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[step % len(keys)]
        if depth == len(path) - 1 or not isinstance(at[key], dict | list) or not at[key]:
            break
        at = at[key]
    if delete:
        del at[key]
    else:
        at[key] = value
    return document


@pytest.mark.parametrize("part", ["target", "drafter"])
@fuzz
@given(path=st.lists(st.integers(0, 40), min_size=1, max_size=4), value=VALUES, delete=st.booleans())
def test_any_value_in_a_config(part: str, path: list[int], value: Any, delete: bool) -> None:
    config, read = (
        (target_config("e2b"), gemma4.read_target_spec)
        if part == "target"
        else (drafter_config("e2b"), gemma4.read_drafter_spec)
    )
    survives(lambda: read(replaced(config, path, value, delete=delete), "config.json"))


@pytest.fixture(scope="module")
def expected(tiny_source: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The stored tensors of the tiny pair."""
    return {
        part: {name: info.shape for name, info in Checkpoint(tiny_source / part, part).tensors.items()}
        for part in ("target", "drafter")
    }


def read_checkpoint(folder: Path, part: str, expected: dict[str, dict[str, tuple[int, ...]]]) -> None:
    """Read all that an export reads of a checkpoint."""
    checkpoint = Checkpoint(folder / part, part)
    if part == "target":
        gemma4.read_target_spec(checkpoint.config, "config.json")
    else:
        gemma4.read_drafter_spec(checkpoint.config, "config.json")
    check_tensors(checkpoint, expected[part])
    if part == "drafter":
        read_token_ordering(checkpoint, "masked_embedding.token_ordering", 128)
    for name, shape in expected[part].items():
        if name != "masked_embedding.token_ordering":
            checkpoint.rows(name, 0, shape[0])


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@fuzz
@given(alterations=ALTERATIONS)
def test_any_bytes_in_a_checkpoint(
    part: str, name: str, alterations: Alteration, tiny: Path, tiny_source: Path, expected: Any
) -> None:
    """Of the weights it is the header that is altered: any bytes of the data are weights."""
    original = (tiny_source / part / name).read_bytes()
    end = 8 + struct.unpack_from("<Q", original)[0] if name == WEIGHTS else len(original)
    (tiny / part / name).write_bytes(altered(original[:end], alterations) + original[end:])
    survives(lambda: read_checkpoint(tiny, part, expected))
    (tiny / part / name).write_bytes(original)
    assert survives(lambda: read_checkpoint(tiny, part, expected))


@fuzz
@given(
    path=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    value=VALUES | st.lists(st.integers(-1, 2**64), max_size=3),
)
def test_any_value_in_the_header_of_weights(
    path: list[int], value: Any, tiny: Path, tiny_source: Path, expected: Any
) -> None:
    original = (tiny_source / "drafter" / WEIGHTS).read_bytes()
    end = 8 + struct.unpack_from("<Q", original)[0]
    header = json.dumps(replaced(json.loads(original[8:end]), path, value, delete=False)).encode()
    (tiny / "drafter" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + original[end:])
    survives(lambda: read_checkpoint(tiny, "drafter", expected))


@fuzz
@given(index=st.dictionaries(st.text(max_size=20), st.text(max_size=300), max_size=4) | VALUES)
def test_any_index(index: Any, tiny: Path, tiny_source: Path, expected: Any) -> None:
    (tiny / "target" / INDEX).write_text(json.dumps({"weight_map": index}))
    survives(lambda: read_checkpoint(tiny, "target", expected))


@pytest.fixture(scope="module")
def bundle_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is a bundle to all but the inference library, and its `.litertlm` beside it."""
    folder = tmp_path_factory.mktemp("bundle") / "toy"
    folder.mkdir()
    for role in toy_pair.SIGNATURES:
        (folder / f"{role}.tflite").write_bytes(role.encode() * 99)
    (folder / "tokenizer.json").write_text(toy_pair.tokenizer_json(), encoding="utf-8")
    toy_pair.write_manifest(folder)
    build_container(folder, folder.parent / "toy.litertlm")
    return folder


@fuzz
@given(alterations=ALTERATIONS)
def test_any_bytes_in_a_manifest(alterations: Alteration, bundle_source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    if not folder.exists():
        copy_pair(bundle_source, folder)
    (folder / "manifest.json").write_bytes(altered((bundle_source / "manifest.json").read_bytes(), alterations))
    survives(lambda: Bundle.open(folder).close())


@fuzz
@given(path=st.lists(st.integers(0, 40), min_size=1, max_size=6), value=VALUES, delete=st.booleans())
def test_any_value_in_a_manifest(
    path: list[int], value: Any, delete: bool, bundle_source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "toy"
    if not folder.exists():
        copy_pair(bundle_source, folder)
    manifest = replaced(json.loads((bundle_source / "manifest.json").read_text()), path, value, delete=delete)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    survives(lambda: Bundle.open(folder).close())


@fuzz
@given(alterations=ALTERATIONS)
def test_any_bytes_in_the_header_of_a_container(alterations: Alteration, bundle_source: Path, tmp_path: Path) -> None:
    original = bundle_source.with_suffix(".litertlm").read_bytes()
    end = struct.unpack_from("<Q", original, 24)[0]
    path = tmp_path / "toy.litertlm"
    path.write_bytes(altered(original[:end], alterations) + original[end:])
    survives(lambda: Bundle.open(path).close())


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Return a function that runs the command line in this process and returns the one line that it ends with."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mtp-export", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        assert ended.value.code == 2, printed.err
        assert printed.out == ""
        assert printed.err.startswith("mtp-export: error: ")
        assert printed.err.count("\n") == 1, printed.err
        return printed.err

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


sample = settings(fuzz, max_examples=25, deadline=timedelta(seconds=60))


@pytest.mark.parametrize(("part", "name"), [("target", "config.json"), ("target", WEIGHTS), ("drafter", "config.json")])
@sample
@given(alterations=ALTERATIONS)
def test_an_export_of_altered_files_ends_in_one_line(
    part: str,
    name: str,
    alterations: Alteration,
    tiny: Path,
    tiny_source: Path,
    monkeypatch: pytest.MonkeyPatch,
    command_line: Callable[..., str],
) -> None:
    """What the alteration leaves whole fails at the last check, on a drafter whose tokens are in no order."""
    monkeypatch.setitem(MODELS, "tiny", tiny_model(tiny_source))
    original = (tiny_source / part / name).read_bytes()
    end = 8 + struct.unpack_from("<Q", original)[0] if name == WEIGHTS else len(original)
    (tiny / part / name).write_bytes(altered(original[:end], alterations) + original[end:])
    unordered = torch.zeros(128, dtype=torch.int64)
    rewrite_tensors(
        tiny / "drafter" / WEIGHTS, lambda tensors: tensors.update({"masked_embedding.token_ordering": unordered})
    )
    command_line(*pair_arguments(tiny), "--output", str(tiny.parent / "out"))
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


@sample
@given(alterations=ALTERATIONS)
def test_a_run_of_an_altered_bundle_ends_in_one_line(
    alterations: Alteration, bundle_source: Path, tmp_path: Path, command_line: Callable[..., str]
) -> None:
    """Its target is not the one of the manifest, so that none is accepted."""
    folder = tmp_path / "toy"
    if not folder.exists():
        copy_pair(bundle_source, folder)
        (folder / "target.tflite").write_bytes(b"another")
    (folder / "manifest.json").write_bytes(altered((bundle_source / "manifest.json").read_bytes(), alterations))
    command_line("run", str(folder), "s")
    container = tmp_path / "toy.litertlm"
    container.write_bytes(altered(bundle_source.with_suffix(".litertlm").read_bytes()[:-5000], alterations))
    command_line("run", str(container), "s")
