"""Fuzzing of every decoder of untrusted bytes: named seeds and a coverage-guided fuzzer."""
