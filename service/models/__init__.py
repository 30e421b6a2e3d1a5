"""Served models: the index of versions, loading a version, and the repository that selects them."""
