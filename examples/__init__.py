"""Examples that run against a server, and their bundles."""
