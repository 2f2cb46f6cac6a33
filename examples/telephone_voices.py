"""A speaker encoder learns the telephone: LoRA on the weights of an `nn.LSTM`.

Resemblyzer's encoder (1.42 M parameters, Apache License 2.0) tells voices apart in clean speech.
Here a voice that was enrolled clean calls over a telephone band with noise. The voices are eSpeak
NG's (GPL-3.0; it is run, none of it is kept): 60 teach, 42 others are the test, and they say other
sentences.

python examples/telephone_voices.py --out voices
"""

import argparse
import codecs
import contextlib
import ctypes
import io
import os
import random
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from scipy import signal
from torch import nn
from transformers.audio_utils import mel_filter_bank

CONFIG = {
    "re:lstm\\.weight_[ih]h_l[012]": {"r": 8, "alpha": 16},
    "linear": {"r": 8, "alpha": 16},
}
RATE, FULL_RATE = 3e-3, 3e-4
SAMPLES, FRAMES, HOP = 16000, 160, 160  # a second's samples; frames of 10 ms
CLIPS, VOICES, TEMPERATURE = 8, 30, 0.05  # clips of a voice, voices of a batch
TESTED = int(os.environ.get("TESTED", 42))  # voices; fewer are measured sooner, and less surely
NOISE = 5  # dB that speech is louder than the line's noise


class Encoder(nn.Module):
    """Wan et al. 2018 (arXiv:1710.10467): mel spectrograms `[n, 160, 40]` to unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (last, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(last[-1]).relu(), dim=-1)


def base(file: str | None = None) -> nn.Module:
    """Resemblyzer's weights, or those of `file`; its package need not be imported."""
    model = Encoder().eval()
    if file:
        model.load_state_dict(load_file(file))
        return model
    (folder,) = find_spec("resemblyzer").submodule_search_locations
    stored = torch.load(Path(folder, "pretrained.pt"), map_location="cpu", weights_only=True)
    state = stored["model_state"]
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("similarity")})
    return model


class Speech:
    """eSpeak NG's library, by `speak_lib.h`: text to samples, in memory."""

    PLAYBACK_NONE, CHARS_UTF8 = 2, 1  # AUDIO_OUTPUT_SYNCHRONOUS
    RATE, PITCH = 1, 3  # of espeak_PARAMETER

    def __init__(self) -> None:
        import espeakng_loader

        data = espeakng_loader.get_data_path()
        self.names = sorted(path.name for path in Path(data, "voices", "!v").iterdir())
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(self.PLAYBACK_NONE, 0, data.encode(), 0)
        self.heard: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = kind(self.hear)  # kept, since the library calls it later
        self.library.espeak_SetSynthCallback(self.callback)

    def hear(self, samples, count: int, events: int) -> int:
        if samples and count:
            self.heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, pitch: int, rate: int) -> np.ndarray:
        """Samples at 16 kHz, in float32."""
        self.heard.clear()
        assert self.library.espeak_SetVoiceByName(f"en-us+{voice}".encode()) == 0, voice
        self.library.espeak_SetParameter(self.RATE, rate, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        self.library.espeak_ng_SetRandSeed(1)  # of its noise: each process hears the same
        told = text.encode()
        self.library.espeak_Synth(told, len(told) + 1, 0, 1, 0, self.CHARS_UTF8, None, None)
        sound = np.concatenate(self.heard).astype(np.float32)
        return signal.resample_poly(sound, SAMPLES, self.rate)


def sentences() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]


def piece(sound: np.ndarray, draw: random.Random) -> np.ndarray:
    """1.6 s from anywhere in the sound, its loudest sample at 0.3."""
    length = FRAMES * HOP
    start = draw.randrange(max(1, len(sound) - length))
    cut = sound[start : start + length]
    cut = np.pad(cut, (0, length - len(cut)))
    return 0.3 * cut / np.abs(cut).max()


def spoken(voices: list[str], lines: list[str], count: int) -> np.ndarray:
    """Clean clips `[voices, count, samples]`, each of another pitch, rate and place."""
    speech, draw = library(), random.Random(0)

    def clip(voice: str, k: int) -> np.ndarray:
        pitch, rate = draw.randrange(40, 60), draw.randrange(150, 190)
        return piece(speech.say(lines[k % len(lines)], voice, pitch, rate), draw)

    return np.array([[clip(voice, k) for k in range(count)] for voice in voices])


library = cache(Speech)  # a process can initialise it once


def telephone(clips: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """300 to 3400 Hz, then white noise 5 dB below the speech."""
    band = signal.butter(4, [300, 3400], "bandpass", fs=SAMPLES, output="sos")
    heard = signal.sosfilt(band, clips)
    power = np.square(heard).mean(-1, keepdims=True) * 10 ** (-NOISE / 10)
    return heard + draw.standard_normal(heard.shape) * np.sqrt(power)


def mels(clips: np.ndarray) -> torch.Tensor:
    """Power in 40 mel bands `[voices, clips, 160, 40]`; a clip below -30 dBFS is made as loud."""
    loud = np.sqrt(np.square(clips).mean(-1, keepdims=True))
    sound = torch.from_numpy(clips * np.maximum(1, 10**-1.5 / loud)).float().flatten(0, 1)
    bands = mel_filter_bank(201, 40, 0, 8000, SAMPLES, norm="slaney", mel_scale="slaney")
    window = torch.hann_window(400)
    spectrum = torch.stft(sound, 400, HOP, window=window, pad_mode="constant", return_complex=True)
    power = spectrum.abs().square().transpose(1, 2)[:, :FRAMES]
    return (power @ torch.from_numpy(bands).float()).unflatten(0, clips.shape[:2])


@cache
def data() -> dict[str, torch.Tensor]:
    """Clean clips and calls of the voices that teach, and of those held out."""
    voices = [name for name in library().names if not name.startswith("whisper")]
    random.Random(0).shuffle(voices)
    lines, noise = sentences(), np.random.default_rng(0)
    taught = spoken(voices[:60], lines[:10], CLIPS)
    tested = spoken(voices[60 : 60 + TESTED], lines[10:], 4)
    return {
        "clean": mels(taught),
        "calls": mels(telephone(taught, noise)),
        "test clean": mels(tested),
        "test calls": mels(telephone(tested, noise)),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Each clean voice finds its own call among those of the batch, and each call its voice.

    Symmetric cross-entropy over cosines (Radford et al. 2021, arXiv:2103.00020, figure 3).
    """
    clean, calls = data()["clean"], data()["calls"]
    draw, same = torch.Generator().manual_seed(1), torch.arange(VOICES)
    for _ in range(steps):
        voices = torch.randperm(len(clean), generator=draw)[:VOICES]
        first, second = torch.randint(CLIPS, (2, VOICES), generator=draw)
        pairs = model(torch.cat([clean[voices, first], calls[voices, second]]))
        logits = pairs[:VOICES] @ pairs[VOICES:].T / TEMPERATURE
        loss = nn.functional.cross_entropy(logits, same)
        loss = (loss + nn.functional.cross_entropy(logits.T, same)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def scores(model: nn.Module, other: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines of clean clips with `other` ones: of the same voice, and of different ones."""
    clean = model(data()["test clean"].flatten(0, 1))
    cosines = clean @ model(data()[other].flatten(0, 1)).T
    voice = torch.arange(len(clean)) // 4
    same = voice[:, None] == voice
    itself = torch.eye(len(clean), dtype=torch.bool)  # no clip is compared with its own call
    return cosines[same & ~itself], cosines[~same]


def equal_error(same: torch.Tensor, different: torch.Tensor) -> float:
    """The rate of errors at the threshold where refusing a voice is as frequent as mistaking it."""
    at = torch.cat([same, different]).sort()[0]
    refused = torch.searchsorted(same.sort()[0], at) / len(same)
    mistaken = 1 - torch.searchsorted(different.sort()[0], at) / len(different)
    best = (refused - mistaken).abs().argmin()
    return float(refused[best] + mistaken[best]) / 2


def measure(model: nn.Module) -> dict[str, float]:
    return {
        "equal error, calls": equal_error(*scores(model, "test calls")),
        "equal error, clean": equal_error(*scores(model, "test clean")),
    }


def picture(folder: Path) -> Path:
    """How alike a clean clip and a call are, of one voice and of two, before and after."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    before, after = figure.subplots(1, 2, sharey=True)
    models = (before, "before", None), (after, "after", str(folder / "merged.safetensors"))
    for axes, name, file in models:
        same, different = scores(base(file), "test calls")
        shape = {"bins": torch.linspace(0, 1, 41).tolist(), "density": True, "alpha": 0.6}
        axes.hist(different.tolist(), **shape, label="different voices", color="tab:red")
        axes.hist(same.tolist(), **shape, label="the same voice", color="tab:green")
        axes.set_title(f"{name}: equal error rate {equal_error(same, different):.1%}")
        axes.set_xlabel("cosine of a clean clip and a telephone call")
    before.set_ylabel("density")
    before.legend()
    figure.savefig(folder / "voices.png", dpi=80)
    return folder / "voices.png"


def main(folder: Path, steps: int = 30) -> dict[str, dict[str, float]]:
    from beside_full import compare  # here, since the merged model is measured without paramlora

    return compare(sys.modules[__name__], folder, steps)


if __name__ == "__main__":
    from beside_full import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("telephone-voices"))
    out = parser.parse_args().out
    show(main(out))
    print(picture(out))
