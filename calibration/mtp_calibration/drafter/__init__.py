"""Training of drafters: adaptation to a fine-tune, clusters for a dense head."""
