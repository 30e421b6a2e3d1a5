"""Commands that train the checkpoints, and compare them with naive baselines."""
