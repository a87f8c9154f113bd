"""What a reply is held to, as grammars."""
