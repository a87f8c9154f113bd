"""What comes out: token ids to text, thought and tool calls."""
