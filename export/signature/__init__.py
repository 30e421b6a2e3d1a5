"""The signature of forward: its arguments, its results, and inputs of any size that resemble the example's."""
