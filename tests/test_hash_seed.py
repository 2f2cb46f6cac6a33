"""The order of a set of names is another in every process; no file and no message has it."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora import ParamloraError, files, formats
from paramlora.update.value import Adapter, Update

NAMES = ("north", "east", "south", "west", "up", "down", "left", "right")


def net():
    """Layers of every kind, tied ones, running statistics, and names of several lengths."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})
    model["conv"], model["norm"] = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
    model["rows"], model["head"] = nn.Embedding(5, 4), nn.Linear(4, 5)
    model["head"].weight = model["rows"].weight
    return model


CONFIG = {
    **{name: {"r": 1 + place % 3} for place, name in enumerate(NAMES[:6])},
    "left": {"r": 2, "kind": "dora"},
    "conv": {"r": 2},
    "right.bias": {"whole": True},
}


def adapter(config=CONFIG, model=None):
    model = paramlora.attach(net() if model is None else model, config)
    for parameter in paramlora.trainable_parameters(model):
        nn.init.normal_(parameter)
    return paramlora.adapter_of(model)


def with_header(names):
    """Low-rank updates, with what a header may say."""
    update = Update(torch.ones(1, 4), torch.ones(4, 1), 1.0, (4, 4), kind="linear")
    return Adapter(dict.fromkeys(names, update), metadata={name: f"of {name}" for name in NAMES})


def peft_file(folder, tensors, **config):
    folder.mkdir()
    state = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(state, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def factors(paths):
    made = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    return {f"{path}.{name}.weight": one.clone() for path in paths for name, one in made.items()}


def pickled(at):
    """A file of torch.save whose state dict holds more than tensors."""
    rest = {f"{name}.extra": place for place, name in enumerate(NAMES)}
    torch.save({**net().state_dict(), **rest}, at / "base.pt")
    files.merge(at / "base.pt", [adapter({"up": {"r": 1}})], at / "merged.pt")
    files.embed(at / "base.pt", adapter(), at / "attached.pt")
    files.extract(at / "attached.pt", at / "back.safetensors")


def sums(at):
    files.write_adapter(with_header(NAMES), at / "a.safetensors", "native")
    both = files.combine([(at / "a.safetensors", 0.5), (with_header(NAMES[::-1]), 0.5)])
    files.write_adapter(both, at / "sum.safetensors", "native")
    print(files.resize(both, {"*": 1, "up": 1}))


def too_high(at):
    files.resize(with_header(NAMES), {"re:.*": 2})


def differences(at):
    before = net().state_dict()
    after = {k: value + 1 if value.is_floating_point() else value for k, value in before.items()}
    found = files.difference(before, after, 1, exclude=["up", "norm"], whole=True)
    print(found)
    files.difference(before, after, 1)


def every_format(at):
    low = adapter({name: {"r": 1 + place % 2} for place, name in enumerate(NAMES)})
    for one in (low, adapter(), replace(low, metadata={name: "told" for name in NAMES})):
        for name in formats.FORMATS:
            with refused(), warnings_told():
                place = at / f"{len(list(at.iterdir()))}{name}"
                files.write_adapter(one, place, name, files.base_of(net()))


def copies(at):
    embeddings = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
    saved = {f"{name}.{one}.weight": torch.ones(4, 4) for one in embeddings for name in NAMES}
    folder = peft_file(at / "peft", {**factors(["q"]), **saved})
    files.write_adapter(files.read_adapter(folder), at / "read.safetensors", "native")
    print(list(files.read_adapter(folder).whole))


def wholes(at):
    base = {name: nn.Linear(4, 4) for name in ("q", "norm", *(f"{one}_norm" for one in NAMES))}
    model = nn.ModuleDict(base)
    saved = adapter({"q": {"r": 1}, "norm": {"whole": True}, "norm.bias": {"whole": True}}, model)
    formats.write(saved, "peft", formats.base_of(model))


def experts(at):
    owners = [f"layers.{name}.mlp.experts" for name in NAMES]
    asked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    files.read_adapter(peft_file(at / "peft", factors(owners), target_parameters=asked))


def strangers(at):
    odd = {f"{name}.{other}": torch.ones(2) for name in NAMES for other in NAMES[:3]}
    files.read_adapter(peft_file(at / "peft", {**factors(NAMES), **odd}))


def unfitting(at):
    paramlora.save_adapter(paramlora.attach(net(), CONFIG), at / "a.safetensors")
    for inner in (nn.ModuleDict({"up": nn.Linear(4, 4)}), nn.ModuleDict({"up": nn.Linear(3, 3)})):
        with refused(), warnings_told():
            paramlora.load_adapter(inner, at / "a.safetensors")


def unsafe(at):
    torch.save({"a": [Path("."), contextlib.ExitStack(), io.StringIO()]}, at / "code.pt")
    files.merge(at / "code.pt", [], at / "merged.pt")


def said(at):
    model = paramlora.attach(net(), {**CONFIG, "norm": {"whole": True}, "rows": {"r": 1}})
    print(paramlora.summary(model))
    paramlora.save_adapter(model, at / "a.safetensors")
    print(files.inspect(at / "a.safetensors"))
    unknown = {"nort": {"r": 1}}, {"up": {"r": 1, "ranc": 2}}, {"*": {"r": 1}, "exclude": ["x"]}
    for config in unknown:
        with refused(), warnings_told():
            print(paramlora.targets(net(), config))
    groups = paramlora.parameter_groups(model, 1e-3, rates={"up": 1e-2, "conv": 1e-4})
    print([(group["lr"], len(group["params"])) for group in groups])


CASES = (
    *(pickled, sums, too_high, differences, every_format, copies, wholes),
    *(experts, strangers, unfitting, unsafe, said),
)


@contextlib.contextmanager
def refused():
    try:
        yield
    except ParamloraError as error:
        print(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def warnings_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for one in caught:
        print(one.message)


def outcome(case, at):
    """What a case has printed, and the digest of every file that it has left."""
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings_told(), refused():
        case(at)
    left = sorted(path for path in at.rglob("*") if path.is_file())
    digests = {str(path.relative_to(at)): hashlib.sha256(path.read_bytes()) for path in left}
    told = out.getvalue().replace(str(at), "")
    return {"told": told, **{name: digest.hexdigest() for name, digest in digests.items()}}


def all_outcomes(folder, seed):
    place = folder / str(seed)
    place.mkdir()
    root = str(Path(__file__).parents[1])
    more = {"PYTHONHASHSEED": str(seed), "PYTHONPATH": root}
    command = [sys.executable, __file__, place]
    done = subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout)


def test_no_file_and_no_message_depends_on_the_hash_seed(tmp_path):
    one, other = (all_outcomes(tmp_path, seed) for seed in (1, 2))
    assert set(one) == {case.__name__ for case in CASES}
    assert one == other


if __name__ == "__main__":
    outcomes = {}
    for case in CASES:
        at = Path(sys.argv[1]) / case.__name__
        at.mkdir()
        outcomes[case.__name__] = outcome(case, at)
    print(json.dumps(outcomes))
