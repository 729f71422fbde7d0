"""Acceptance by kind of prompt, and the report of a bundle."""
