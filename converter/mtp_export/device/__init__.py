"""The same prompts on this machine and on an emulated ARM64 place, over adb."""
