"""The state of sessions, apart from who they are: slots (numbers), the arena (memory), snapshots (bytes)."""
