"""Adapters as PEFT saves them, merged into a checkpoint's rows as they are read.

A folder holds `adapter_config.json` (config, fields) and `adapter_model.safetensors` (tensors). Which modules it
changes is decided by their names (modules, patterns); pairs and tokens check what it brings for them, merge orders the
changes, and steps are what is done to a block of rows.
"""

from mtp_export.source.adapters.adapted import AdaptedCheckpoint, adapter_files

__all__ = ["AdaptedCheckpoint", "adapter_files"]
