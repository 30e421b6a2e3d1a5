"""What a GPU does with the engine, beside its own limits and beside PyTorch under a CUDA graph."""
