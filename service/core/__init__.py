"""Nouns everything else may use: errors with stable codes, and the clock."""
