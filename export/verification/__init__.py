"""What is asked of a model and of its graph before a bundle is written, and the proof that they agree."""
