"""What nano says, as committed files that Python, Kotlin and the emulated device are all held against."""
