"""Conversations that a client of Unroll servers must master, and a server that plays its part in them.

`python -m unroll.client.conformance --client COMMAND` runs them against any client, in any language.
See docs/client-conformance.md.
"""
