"""Teach the model: adapters from examples of what it is to say."""
