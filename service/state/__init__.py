"""State rows: slots (numbers), the step table (memory), snapshots (bytes)."""
