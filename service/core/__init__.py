"""Shared basics: errors with stable codes, session ids, the clock, turns of the event loop, and resources."""
