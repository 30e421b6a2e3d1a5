"""What happens, in figures (`metrics.py`) and in words (`logs.py`)."""
