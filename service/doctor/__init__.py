"""`unroll doctor`: reports what this machine and this installation can serve with, and how to fix the rest.

`machine.py`, `nvidia_driver.py` and `trial.py` collect the facts of `facts.py`; `findings.py` judges them.
"""
