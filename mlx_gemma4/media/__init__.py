"""What people send: bytes to patches and frames."""
