"""HTTP and WebSocket: the native API, streams, the Open Inference Protocol, health and metrics.

The inference routes are plain functions from a request to an Answer (`routes.py`). The transport calls them straight
from uvicorn's parser; FastAPI documents them, calls them where the transport does not, and serves everything else.
"""
