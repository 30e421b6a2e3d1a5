"""HTTP: the native API, the Open Inference Protocol, health and metrics.

The inference routes are plain functions from a request to an Answer. `front.py` calls them straight from ASGI,
before FastAPI's router; FastAPI documents them and serves everything else.
"""
