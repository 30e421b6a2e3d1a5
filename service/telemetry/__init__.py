"""Metrics (`metrics.py`), statistics of the Open Inference Protocol (`statistics.py`), and logs (`logs.py`)."""
