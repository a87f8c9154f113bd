"""What a person types and has no room of its own."""
