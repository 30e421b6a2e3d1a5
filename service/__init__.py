"""The server: keeps each client's hidden state, batches the time steps of many clients, and answers over HTTP.

Imports go one way: app → api → sessions → models → protocol | scheduler → engine | store → state → telemetry → core.
"""
