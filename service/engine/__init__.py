"""Runs one batch: gather state rows, run the graph, scatter the new rows."""
