"""Quantisation recipes, and prompts with their provenance."""
