"""A demo against a running server, and the bundles it needs."""
