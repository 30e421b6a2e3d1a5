"""What export makes of many kinds of modules, beside what plain `torch.onnx.export` makes of them. Not installed."""
