"""Export the two trained examples into `examples/repository`: `make bundles`. Needs torch.

The same as `unroll export` does from the command line, with inputs of the size that the models really meet:
parity with PyTorch is proven on inputs like the example's.
"""

from pathlib import Path

import torch

import export
from models import bytes as next_byte
from models import co2, mauna_loa
from models.stacked_rnn import StackedRNN

REPOSITORY = Path(__file__).parent / "repository"


def main(repository: Path = REPOSITORY) -> None:
    ppm = torch.from_numpy(mauna_loa.read().ppm[:2000]).reshape(4, 500, 1)
    text = torch.tensor([list(Path(__file__).read_bytes()[:256])])
    print(export.export(co2.load(), {"ppm": ppm}, name="co2", repository=repository, replace=True))
    model = StackedRNN.load(next_byte.CHECKPOINT)
    print(export.export(model, {"x": text}, name="bytes", repository=repository, replace=True))


if __name__ == "__main__":
    main()
