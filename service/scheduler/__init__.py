"""Scheduling: which steps run next. Only `loop.py` is asynchronous; it executes the scheduler's decisions."""
