"""Lifting: rewrites a copy of the user's module so that every stateful part reads and writes the state row."""
