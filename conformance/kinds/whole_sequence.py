"""Modules that export for whole sequences only, with the reason."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance.kinds.kind import Kind, gru, head, lstm, made, per_step, rnn
from conformance.kinds.layers import pointwise_conv
from conformance.kinds.loops import Layer


def attention(s: Any, x: Tensor) -> Tensor:
    y = s.rnn(x)[0]
    return torch.softmax(y @ y.transpose(1, 2), -1) @ y


def causal_attention(s: Any, x: Tensor) -> Tensor:
    y = s.rnn(x)[0]
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return torch.softmax((y @ y.transpose(1, 2)).masked_fill(~mask, -1e9), -1) @ y


def ahead(s: Any, x: Tensor) -> Tensor:
    return s.rnn(torch.cat([x[:, 1:], x[:, -1:]], 1))[0]


class Backwards(Layer):
    def steps(self, x: Tensor) -> list[Tensor]:
        return list(x.unbind(0))[::-1]


def encoder_decoder(s: Any, x: Tensor) -> Tensor:
    _, h = s.encoder(x)
    return s.decoder(x, h)[0]


WHOLE_SEQUENCE = [
    Kind(
        "bidirectional proj_size",
        lambda: made(per_step, rnn=lstm(layers=2, bidirectional=True, proj_size=2), head=head(4)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Kind(
        "loop from the end",
        lambda: made(lambda s, x: s.b(s.a(x.transpose(0, 1))[0])[0].transpose(0, 1), a=Layer(4, 6), b=Backwards(6, 6)),
        streams=False,
        says="layer 'b' is bidirectional",
    ),
    Kind(
        "bidirectional LSTM",
        lambda: made(per_step, rnn=lstm(layers=2, bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Kind(
        "bidirectional GRU",
        lambda: made(per_step, rnn=gru(bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Kind(
        "bidirectional RNN",
        lambda: made(per_step, rnn=rnn(bidirectional=True), head=head(12)),
        streams=False,
        says="layer 'rnn' is bidirectional",
    ),
    Kind(
        "mean over time",
        lambda: made(lambda s, x: s.head(s.rnn(x)[0].mean(1)), rnn=gru(), head=head()),
        streams=False,
        ragged=False,
        says="how the sequence is cut",
    ),
    Kind(
        "maximum over time",
        lambda: made(lambda s, x: s.rnn(x)[0].amax(1), rnn=gru()),
        streams=False,
        ragged=False,
        says="after layer 'rnn'",
    ),
    Kind(
        "centred convolution",
        lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 3, padding=1), rnn=gru()),
        streams=False,
        ragged=False,
        bit_exact=False,
        says="later time steps (at layer 'conv' (Conv1d))",
    ),
    Kind(
        "centred convolution, far",
        lambda: made(pointwise_conv, conv=nn.Conv1d(4, 4, 3, dilation=16, padding=16), rnn=gru()),
        streams=False,
        ragged=False,
        bit_exact=False,
        says="later time steps (at layer 'conv' (Conv1d))",
    ),
    Kind(
        "attention over time", lambda: made(attention, rnn=gru()), streams=False, ragged=False, says="later time steps"
    ),
    Kind(
        "causal attention",
        lambda: made(causal_attention, rnn=gru()),
        streams=False,
        bit_exact=False,
        says="how the sequence is cut",
    ),
    Kind("look-ahead", lambda: made(ahead, rnn=gru()), streams=False, ragged=False, says="later time steps"),
    Kind(
        "flipped in time",
        lambda: made(lambda s, x: s.rnn(x.flip(1))[0].flip(1), rnn=gru()),
        streams=False,
        ragged=False,
        says="later time steps",
    ),
    Kind(
        "a table of positions, looked up",
        lambda: made(
            lambda s, x: s.rnn(x + s.table(torch.arange(x.shape[1])))[0], table=nn.Embedding(50, 4), rnn=gru()
        ),
        streams=False,
        says="how the sequence is cut",
    ),
    Kind(
        "encoder and decoder",
        lambda: made(encoder_decoder, encoder=gru(), decoder=gru()),
        streams=False,
        says="later time steps (at layer 'decoder'",
    ),
]
