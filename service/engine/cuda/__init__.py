"""The engine on an NVIDIA GPU: the rows stay in the device's memory, and a batch of single steps is one graph launch."""
