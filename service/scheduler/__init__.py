"""Which steps run next, and for whom. Pure but for `loop.py`, which runs what the scheduler decides."""
