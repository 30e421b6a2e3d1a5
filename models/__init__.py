"""Models to export and serve: the stacked RNN, reference implementations of its cells, and trained examples."""
