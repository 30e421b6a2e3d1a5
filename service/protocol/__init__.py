"""Encoding and decoding of tensors by the manifest, independent of HTTP and sessions."""
