"""Commands that look after a store: `unroll store` and `unroll sessions`."""
