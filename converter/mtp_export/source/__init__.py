"""Checkpoints as they lie on a disk: what is read of them, what is left aside, and what is refused."""
