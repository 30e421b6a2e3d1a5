"""A benchmark from outside: Unroll over HTTP and WebSocket, beside what the machine allows and what others reach."""
