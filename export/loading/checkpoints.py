"""Loads a checkpoint of `StackedRNN`; its configuration describes the inputs."""

from pathlib import Path

from torch import nn

from unroll.export.errors import ExportError
from unroll.export.loading.example_inputs import Example, example, token_example
from unroll.export.loading.input_specs import InputSpec
from unroll.models.checkpoint import CheckpointError
from unroll.models.stacked_rnn import StackedRNN


def from_checkpoint(stem: str) -> tuple[nn.Module, Example]:
    """Load the model saved as `stem`.safetensors and `stem`.json; returns it with example inputs.

    Raises:
        ExportError: checkpoint, naming the missing or damaged file.
    """
    path = Path(stem)
    try:
        model = StackedRNN.load(path.with_name(path.name.removesuffix(".safetensors")))
    except CheckpointError as error:
        raise ExportError("checkpoint", str(error)) from error
    if model.config.vocabulary is not None:
        return model, {"x": token_example(model.config.vocabulary)}
    return model, {"x": example(InputSpec("x", "float32", (model.config.input_size or 1,)))}
