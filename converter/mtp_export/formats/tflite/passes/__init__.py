"""Rewriting passes over converted graphs."""
