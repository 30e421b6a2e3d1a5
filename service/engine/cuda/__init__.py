"""The engine on an NVIDIA GPU: the state rows stay in its memory, and a batch of single steps is one graph launch."""
