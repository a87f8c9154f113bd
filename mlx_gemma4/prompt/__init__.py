"""Messages to what the model reads."""
