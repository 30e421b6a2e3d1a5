"""The implementation of `unroll sessions`."""
