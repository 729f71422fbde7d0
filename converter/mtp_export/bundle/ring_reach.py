"""How far a text can be taken back in a bundle whose sliding layers keep a ring of slots."""

from __future__ import annotations

from mtp_runtime.bundle.context import sliding_window
from mtp_runtime.bundle.contract import Manifest


def rewindable_tokens(manifest: Manifest) -> int | None:
    """Return how many tokens of a text can be taken back, however long it is; None: any number.

    What the drafter reads before the end, one row more than the window, must still be in the ring. Behind it lie the
    tokens that are taken back, and what the last pass filled up, all but one row at most. So ring_length >= window +
    tokens + longest pass.

    Raises:
        BundleError: the manifest has rings and no window.
    """
    if not manifest.ring_length:
        return None
    longest_pass = max(signature.num_tokens for signature in manifest.signatures["target"])
    return manifest.ring_length - sliding_window(manifest) - longest_pass
