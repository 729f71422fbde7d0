"""The token ids that nano shares with Gemma 4, and its vocabulary size; imported where `tokenizers` is not needed."""

VOCAB_SIZE = 4096
PAD, EOS, BOS, UNK, TURN_OPEN, TURN_CLOSE = 0, 1, 2, 3, 105, 106
STOP_IDS = (EOS, TURN_CLOSE)
