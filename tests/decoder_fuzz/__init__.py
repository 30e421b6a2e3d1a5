"""Bytes for everything that reads bytes of others: seeds with names, and a fuzzer that is led by coverage."""
