"""Export of many kinds of modules, compared with plain `torch.onnx.export`. Not installed."""
