"""Durability: what of a session outlives the process."""
