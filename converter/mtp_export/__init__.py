"""Export Gemma 4 E2B/E4B with its multi-token-prediction drafter to LiteRT."""
