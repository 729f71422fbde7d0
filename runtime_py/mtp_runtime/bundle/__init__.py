"""Opening a bundle and checking it."""
