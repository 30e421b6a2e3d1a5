"""Modules that public packages ship, exported and served as a user would: `make packages`, docs/packages.md."""
