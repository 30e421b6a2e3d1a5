"""Performs the children's slow, lazy imports once, in the server that they are forked from."""

import torch
import torch._dynamo
import torch._export
import torch._inductor.config
import torch.onnx._internal.exporter._core
import torch.onnx._internal.exporter._registration

torch.set_num_threads(1)
