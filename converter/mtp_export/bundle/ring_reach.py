"""How far a text can be taken back in a bundle whose sliding layers keep a ring of slots."""

from __future__ import annotations

from mtp_runtime.bundle.contract import Manifest


def rewindable_tokens(manifest: Manifest) -> int | None:
    """Return how many tokens of a text can be taken back, however long it is; None: any number.

    The rows of the window before the end must still be in the ring. Behind them lie the tokens that are taken back, and
    what the last pass filled up. So ring_length >= window + all that was written since.
    """
    if not manifest.ring_length:
        return None
    longest_pass = max(signature.num_tokens for signature in manifest.signatures["target"])
    window: int = manifest.target["sliding_window"]
    return manifest.ring_length - window - longest_pass + 1
