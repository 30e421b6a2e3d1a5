"""A job for child processes, in a module that is imported in no time."""

import os
import signal


def work(job: str) -> str:
    if job == "dies":
        os.abort()
    if job == "hangs":
        signal.pause()
    return job.upper()
