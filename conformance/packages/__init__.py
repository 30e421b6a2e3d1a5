"""Exports and serves modules from public packages, as a user would: `make packages`, docs/packages.md."""
