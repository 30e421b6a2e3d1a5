"""Loads models: from a checkpoint, the user's own code, TorchScript or a program of torch.export."""
