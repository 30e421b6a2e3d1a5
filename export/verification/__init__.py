"""Probes of a model and its graph before a bundle is written, and the proof that the two agree."""
