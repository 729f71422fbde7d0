"""Measures what an export does to a model: is it the same, what is best, what does a drafter bring."""
