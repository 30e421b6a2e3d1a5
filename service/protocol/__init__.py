"""Bytes to arrays and back. Knows the manifest and NumPy; knows neither HTTP nor sessions."""
