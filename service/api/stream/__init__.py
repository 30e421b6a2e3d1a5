"""Streams of the native API: many sessions on one WebSocket, and chunks of many of them in one frame."""
