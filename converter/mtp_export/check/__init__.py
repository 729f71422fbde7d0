"""Parity: a bundle held against transformers, our runtime and the stock runtimes."""
