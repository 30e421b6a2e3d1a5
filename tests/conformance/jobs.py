"""A job for child processes, in a module that imports quickly."""

import os
import signal


def work(job: str) -> str:
    if job == "dies":
        os.abort()
    if job == "hangs":
        signal.pause()
    return job.upper()
