"""Libraries that run the graphs."""
