"""A folder or a hub id to a model."""
