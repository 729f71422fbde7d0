"""The same prompts on this machine and on a device behind adb: an emulated ARM64 place, or a phone."""
