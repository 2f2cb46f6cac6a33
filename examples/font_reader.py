"""A text recogniser learns a script typeface: convolutions, two-way LSTMs and linear layers.

EasyOCR's English recogniser (3.78 M parameters, Apache License 2.0) reads print well. Lines of the
Python reference, drawn in Great Vibes (SIL Open Font License 1.1), teach it that typeface; it is
tested on the Zen of Python, which is not among them, and on the same lines in a book face.

python examples/font_reader.py --out reader
"""

import argparse
import codecs
import contextlib
import io
import os
import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import nn

CONFIG = {
    "re:features\\.(3|6|8|11|14|18)": {"r": 8, "alpha": 16},
    "re:lines\\.[01]\\.rnn\\.weight_.*": {"r": 8, "alpha": 16},  # both directions
    "linear": {"r": 8, "alpha": 16},
    "letters": {"r": 8, "alpha": 16},
}
RATE, FULL_RATE = 2e-3, 2e-4
CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
HEIGHT, BATCH = 64, 16
LINES = int(os.environ.get("LINES", 1000))  # fewer are measured sooner, and less surely


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.rnn(x)[0])


class Recogniser(nn.Module):
    """Shi et al. 2017 (arXiv:1507.05717), in the sizes of EasyOCR's `english_g2`."""

    def __init__(self) -> None:
        super().__init__()
        conv, relu, pool, flat = nn.Conv2d, nn.ReLU, nn.MaxPool2d, (2, 1)
        self.features = nn.Sequential(
            *(conv(1, 32, 3, padding=1), relu(), pool(2)),
            *(conv(32, 64, 3, padding=1), relu(), pool(2)),
            *(conv(64, 128, 3, padding=1), relu()),
            *(conv(128, 128, 3, padding=1), relu(), pool(flat)),
            *(conv(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), relu()),
            *(conv(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), relu(), pool(flat)),
            *(conv(256, 256, 2), relu()),
        )
        self.lines = nn.Sequential(BothWays(), BothWays())
        self.letters = nn.Linear(256, 1 + len(CHARACTERS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `[lines, 1, 64, width]` in [-1, 1] to logits `[lines, places, 97]`."""
        columns = self.features(images).mean(2).transpose(1, 2)
        return self.letters(self.lines(columns))


def base(file: str | None = None) -> nn.Module:
    """EasyOCR's weights, or those of `file`; in `eval`, so that batch norms stay as they are."""
    model = Recogniser()
    if file:
        model.load_state_dict(load_file(file))
        return model.eval()
    (folder,) = find_spec("easyocr_en_models").submodule_search_locations
    path = Path(folder, "models", "english_g2.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    ours = {"FeatureExtraction.ConvNet": "features", "SequenceModeling": "lines"}
    ours |= {"Prediction": "letters"}
    state = {}
    for key, value in stored.items():
        their = next(name for name in ours if key.startswith(f"module.{name}."))
        state[key.replace(f"module.{their}", ours[their], 1)] = value
    model.load_state_dict(state)
    return model.eval()


def font_file(package: str) -> Path:
    (folder,) = find_spec(package).submodule_search_locations
    return next(Path(folder).rglob("*.ttf" if package != "matplotlib" else "DejaVuSerif.ttf"))


SCRIPT = ImageFont.truetype(str(font_file("fontpkg_great_vibes")), 72)
PRINT = ImageFont.truetype(str(font_file("matplotlib")), 48)


def drawn(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    left, top, right, bottom = font.getbbox(text)
    width, height = round(right - left) + 20, round(bottom - top) + 16
    image = Image.new("L", (width, height), 255)
    ImageDraw.Draw(image).text((10 - left, 8 - top), text, font=font, fill=20)
    return image.resize((round(width * HEIGHT / height), HEIGHT), Image.Resampling.BICUBIC)


def batch(texts: list[str], font: ImageFont.FreeTypeFont) -> torch.Tensor:
    """Drawn lines, filled with white to the longest: `[lines, 1, 64, width]`."""
    images = [drawn(text, font) for text in texts]
    pixels = torch.ones(len(images), 1, HEIGHT, max(image.width for image in images))
    for row, image in zip(pixels, images):
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        row[0, :, : image.width] = values.view(HEIGHT, image.width) / 127.5 - 1
    return pixels


def training_lines(count: int) -> list[str]:
    """Groups of one to three words of the language reference that Python carries."""
    from pydoc_data.topics import topics

    word = re.compile(r"[A-Za-z']+[.,;:?!]?")
    words = [w for key in sorted(topics) for w in topics[key].split() if word.fullmatch(w)]
    draw, lines = random.Random(1), []
    while len(lines) < count:
        start = draw.randrange(len(words) - 3)
        line = " ".join(words[start : start + draw.choice((1, 2, 2, 3))])
        lines += [line] if 6 <= len(line) <= 22 else []
    return lines


def held_out() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    lines = [line.split() for line in codecs.decode(this.s, "rot13").splitlines()[2:]]
    parts = [" ".join(line[i : i + 3]) for line in lines for i in range(0, len(line), 3)]
    return parts[:LINES]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Connectionist temporal classification (Graves et al. 2006) on lines drawn as they come."""
    lines = sorted(training_lines(steps * BATCH), key=len)  # so that a batch has one width
    batches = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
    random.Random(2).shuffle(batches)
    for texts in batches:
        logits = model(batch(texts, SCRIPT)).log_softmax(-1).transpose(0, 1)  # places first
        letters = torch.tensor([CHARACTERS.index(c) + 1 for text in texts for c in text])
        lengths = torch.tensor([len(text) for text in texts])
        places = torch.full((len(texts),), len(logits))
        loss = nn.functional.ctc_loss(logits, letters, places, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def read(model: nn.Module, texts: list[str], font: ImageFont.FreeTypeFont) -> list[str]:
    """What the model reads in each drawn line: the best letter at each place, repeats once."""
    found = []
    for start in range(0, len(texts), BATCH):
        for best in model(batch(texts[start : start + BATCH], font)).argmax(-1):
            kept = torch.unique_consecutive(best).tolist()
            found.append("".join(CHARACTERS[k - 1] for k in kept if k))
    return found


def distance(a: str, b: str) -> int:
    """Letters to insert, remove or change on the way from `a` to `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def measure(model: nn.Module) -> dict[str, float]:
    """The share of letters read wrong in the lines held out, in each typeface."""
    texts = held_out()
    letters = sum(len(text) for text in texts)

    def wrong(font: ImageFont.FreeTypeFont) -> float:
        return sum(map(distance, read(model, texts, font), texts)) / letters

    return {"errors in script": wrong(SCRIPT), "errors in print": wrong(PRINT)}


def picture(folder: Path, count: int = 9) -> Path:
    """Lines of the test with what is read in them, before and after."""
    texts = held_out()
    before = read(base(), texts, SCRIPT)
    after = read(base(str(folder / "merged.safetensors")), texts, SCRIPT)
    font = ImageFont.truetype(str(font_file("matplotlib")), 20)
    sheet = Image.new("RGB", (1100, 40 + count * 74), "white")
    pen = ImageDraw.Draw(sheet)
    for left, title in ((12, "the line"), (480, "read before"), (800, "read after")):
        pen.text((left, 8), title, font=font, fill="gray")
    for k in range(count):
        top, text = 40 + k * 74, texts[k]
        sheet.paste(drawn(text, SCRIPT), (0, top))
        for left, found in ((480, before[k]), (800, after[k])):
            pen.text((left, top + 20), found, font=font, fill="green" if found == text else "red")
    sheet.save(folder / "lines.png")
    return folder / "lines.png"


def main(folder: Path, steps: int = 30) -> dict[str, dict[str, float]]:
    from beside_full import compare  # here, since the merged model is measured without paramlora

    return compare(sys.modules[__name__], folder, steps)


if __name__ == "__main__":
    from beside_full import show

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("font-reader"))
    out = parser.parse_args().out
    show(main(out))
    print(picture(out))
