"""The same prompts on this machine, on an emulated ARM64 place and on a phone, over adb."""
