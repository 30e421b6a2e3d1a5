"""Models to export and serve: the stacked RNN, its cells by hand, and trained examples."""
