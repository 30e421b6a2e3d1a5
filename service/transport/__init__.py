"""uvicorn's protocols, with a short way for the inference routes: no task, no scope, one write per answer."""
