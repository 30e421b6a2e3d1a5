"""Which models and versions are served, and which of them a session belongs to."""
