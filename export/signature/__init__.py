"""The signature of forward: its arguments, what it returns, and inputs of any size that look like the example's."""
