"""The lifted model as an ONNX graph: traced, translated, run by onnxruntime, reduced in precision."""
