"""Traced graphs: which segments a signature is made of, and which parameters they read."""
