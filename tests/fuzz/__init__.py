"""Odd inputs of every kind, each tried in a process that may die: `python -m tests.fuzz --minutes 10`."""
