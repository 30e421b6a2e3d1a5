"""HTTP and WebSocket: the native API, streams, the Open Inference Protocol, health and metrics.

The inference routes are plain functions from a request to an `Answer` (`inference_routes.py`). The transport calls them
directly from uvicorn's parser. FastAPI documents them, handles the requests that the transport passes on, and serves
all other routes.
"""
