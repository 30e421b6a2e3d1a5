"""Durability: stores that keep sessions beyond the life of a process."""
