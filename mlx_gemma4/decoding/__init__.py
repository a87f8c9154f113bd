"""A prompt to tokens: the law, the round, and what is kept."""
