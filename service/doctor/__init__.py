"""`unroll doctor`: reports which devices this machine and installation can serve on, and how to fix the rest.

`machine.py`, `nvidia_driver.py` and `trial.py` collect the facts of `facts.py`; `findings.py` judges them.
"""
