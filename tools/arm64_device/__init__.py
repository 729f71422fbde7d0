"""An ARM64 place on an ordinary Linux machine: Debian's adbd and the aarch64 runtimes on an emulated CPU, over adb."""
