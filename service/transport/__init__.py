"""uvicorn's protocols with a fast path for the inference routes: no task, no ASGI scope, one write per reply."""
