"""Session locations: on a served version, in host memory without a row, or in the store."""
