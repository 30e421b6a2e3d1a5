"""An example of use, for mypy only: it shows how type checkers see the public API. It is never run."""

import torch

import unroll

module = torch.nn.GRU(3, 4, batch_first=True)
report = unroll.export(module, {"input": torch.zeros(2, 7, 3)}, name="net", repository="models")
print(unroll.__version__.upper(), report.path.name, report.manifest.streamable)

try:
    unroll.export(module, {}, repository="models")  # type: ignore[call-arg]
except unroll.ExportError as error:
    print(error.code, error.nonsense)  # type: ignore[attr-defined]
