"""Measurements that need the inside of the server: single parts, layers, the store's cost, the GPU engine.

Everything else in `bench` measures from outside and imports nothing of this package.
"""
