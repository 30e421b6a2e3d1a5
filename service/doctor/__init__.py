"""`unroll doctor`: what of this machine and this installation serves models, and what to do about the rest.

`facts.py` is what is found, by `machine.py`, `driver.py`, `libraries.py` and `trial.py`; `findings.py` judges it.
"""
