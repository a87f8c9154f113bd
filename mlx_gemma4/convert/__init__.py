"""A checkpoint to another."""
