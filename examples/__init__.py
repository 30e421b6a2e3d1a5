"""What a newcomer runs first: a demo against a live server, and the bundles that it serves."""
