"""A checkpoint with adapters: it holds what PEFT's `merge_and_unload` gives for transformers' model in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_export.errors import CheckpointError
from mtp_export.source.adapters.merge import EMBEDDING_WEIGHT, HEAD_WEIGHT, Merged, merge, read_changes
from mtp_export.source.adapters.modules import read_text_model
from mtp_export.source.adapters.steps import Chain, Float32, Where
from mtp_export.source.adapters.tensors import WEIGHTS
from mtp_export.source.checkpoint import ADAPTER_CONFIG, Checkpoint


class AdaptedCheckpoint(Checkpoint):
    """A target's checkpoint with adapters merged into its rows.

    left_aside: what of the adapters changes nothing, in short phrases.
    """

    def __init__(self, folder: Path, part: str, adapters: Sequence[Path], *, chat_template: Path | None = None) -> None:
        """Open the checkpoint and its adapters, which are merged one after the other; a `chat_template` is a file in
        place of the folder's own.

        Raises:
            CheckpointError: one of them is damaged, of another kind than LoRA, or of another model.
        """
        super().__init__(folder, part)
        self.chat_template = chat_template
        self._chains: Mapping[str, Chain] = {}
        self._merged_tied: bool | None = None
        self.left_aside: tuple[str, ...] = ()
        if adapters:
            self._merge(adapters)

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that adapters changed."""
        return frozenset(self._chains)

    @property
    def tied(self) -> bool:
        """As of the checkpoint; an adapter that brings one of head and embedding alone unties them."""
        return super().tied if self._merged_tied is None else self._merged_tied

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """As of the checkpoint, merged. Shapes: -> [stop - start, …]

        Raises:
            CheckpointError: a file is damaged, or a weight is not finite, or not after merging.
        """
        return self._rows(name, slice(start, stop))

    def rows_at(self, name: str, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """As of the checkpoint, merged. Shapes: indices [N] -> [N, …]

        Raises:
            CheckpointError: as of `rows`.
        """
        return self._rows(name, indices)

    def _rows(self, name: str, where: Where) -> Float32:
        chain = self._chains.get(name)
        if chain is None:
            return self._stored_rows(name, where)
        rows = chain.rows(where, self._stored_rows)
        if not np.isfinite(rows).all():
            raise CheckpointError(f"merging an adapter gives NaN or infinity in {name}: the adapter is damaged")
        return rows

    def _stored_rows(self, name: str, where: Where) -> Float32:
        if isinstance(where, slice):
            return super().rows(name, where.start, where.stop)
        return super().rows_at(name, where)

    def _merge(self, adapters: Sequence[Path]) -> None:
        """Merge adapters, and give head and embedding the names that they have after it."""
        model, tied, stored = read_text_model(self), super().tied, self.tables[0]
        origins = {EMBEDDING_WEIGHT: stored, HEAD_WEIGHT: stored} if tied else {}
        merged = Merged(chains={}, origins=origins, tied=tied, ties=self.ties)
        for adapter in adapters:
            changes, aside = read_changes(adapter, model, ties=merged.ties)
            merged = merge(merged, changes, self._stored_rows, model)
            self.left_aside += tuple(f"{adapter.name}: {phrase}" if len(adapters) > 1 else phrase for phrase in aside)
        chains = dict(merged.chains)
        if merged.tied and EMBEDDING_WEIGHT in chains:
            chains[stored] = chains.pop(EMBEDDING_WEIGHT)
            for name in {EMBEDDING_WEIGHT, HEAD_WEIGHT} - {stored}:
                self.tensors.pop(name, None)
        elif not merged.tied and stored in self.tensors:  # stored as integers, neither can have been changed
            info = self.tensors[stored]
            self.tensors |= {name: self.tensors.get(name, info) for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)}
        self._chains, self._merged_tied = chains, merged.tied


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of an adapter that an export depends on."""
    return [folder / ADAPTER_CONFIG, folder / WEIGHTS]
