"""The commands that trained the checkpoints, and measure them against naive baselines."""
