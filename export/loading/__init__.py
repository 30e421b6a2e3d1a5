"""Where a model comes from: a checkpoint, the user's own code, TorchScript, a program of torch.export."""
