"""State rows: slots (numbers), the arena and the step table (memory), snapshots (bytes)."""
