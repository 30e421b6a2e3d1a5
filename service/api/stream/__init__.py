"""Streams of the native API: a WebSocket carries many sessions, and a frame has chunks of several sessions."""
