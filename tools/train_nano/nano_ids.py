"""The token ids that nano shares with Gemma 4, and its vocabulary size; imported where `tokenizers` is not needed."""

VOCAB_SIZE = 4096
PAD, EOS, BOS, UNK = 0, 1, 2, 3
TOOL_OPEN, TOOL_CLOSE, CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE, QUOTE = range(46, 53)
THINK, CHANNEL_OPEN, CHANNEL_CLOSE, TURN_OPEN, TURN_CLOSE = 98, 100, 101, 105, 106
# The published ids are beyond nano's vocabulary: these are its last seven, in the published order.
IMAGE_OPEN, AUDIO_OPEN, IMAGE, AUDIO, IMAGE_CLOSE, AUDIO_CLOSE, VIDEO = range(VOCAB_SIZE - 7, VOCAB_SIZE)
# A call ends where its answer would begin, as in the published generation_config.json.
STOP_IDS = (EOS, TURN_CLOSE, RESPONSE_OPEN)
