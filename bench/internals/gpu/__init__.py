"""The engine on a GPU, compared with the device's limits and with PyTorch under a CUDA graph."""
