"""A prompt for the toy pair."""

TOY_PROMPT = (2, 5, 9, 11, 3, 4, 8, 20, 33, 41, 2, 3)
