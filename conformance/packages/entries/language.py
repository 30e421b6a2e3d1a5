"""Packages for texts."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.packages.entry import entry


def _flair_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    hidden, outputs = model.model.init_hidden(1), []
    for step in inputs["x"].unbind(1):
        y, _, hidden = model.model(step.unsqueeze(0), hidden)
        outputs.append(y.squeeze(0))
    return torch.cat(outputs)


@entry("flair", "LanguageModel, of characters", "x:int64:", own=_flair_steps)
def flair_language_model() -> nn.Module:
    from flair.data import Dictionary
    from flair.models import LanguageModel

    characters = Dictionary()
    for character in "abcdefghijklmnopqrst":
        characters.add_item(character)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LanguageModel(characters, True, hidden_size=16, nlayers=1, embedding_size=8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.model.init_hidden(x.shape[0])
            y: Tensor = self.model(x.t(), hidden)[0]
            return y.transpose(0, 1)

    return Model()


class _Logits(nn.Module):
    """The answer of a language model of transformers, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x, use_cache=False).logits
        return y


def _rwkv_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    state, outputs = None, []
    for step in inputs["x"].unbind(1):
        answer = model.model(step.unsqueeze(1), state=state, use_cache=True)
        state = answer.state
        outputs.append(answer.logits.squeeze(1))
    return torch.cat(outputs)


@entry("transformers", "RwkvForCausalLM, 2 layers", "x:int64:", own=_rwkv_steps)
def transformers_rwkv() -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=20, context_length=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    return _Logits(RwkvForCausalLM(config))


@entry("transformers", "MambaForCausalLM, 2 layers", "x:int64:")
def transformers_mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
    return _Logits(MambaForCausalLM(config))


@entry("transformers", "RecurrentGemmaForCausalLM, recurrent blocks", "x:int64:")
def transformers_recurrent_gemma() -> nn.Module:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes: Any = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = RecurrentGemmaConfig(**sizes, num_hidden_layers=2, block_types=("recurrent",))
    return _Logits(RecurrentGemmaForCausalLM(config))
