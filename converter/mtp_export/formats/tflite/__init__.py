"""TFLite, for LiteRT and LiteRT-LM."""
