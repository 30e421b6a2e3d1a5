"""Benchmark of Unroll from outside, over HTTP and WebSocket, compared with the machine's limits and other servers."""
