"""What `unroll sessions` does with the sessions of a store."""
