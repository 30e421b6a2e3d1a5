"""A conformance test for clients: scripted conversations, and a server that plays its part in them.

`python -m unroll.client.conformance --client COMMAND` tests a client in any language. See docs/client-conformance.md.
"""
