"""A sweep of accelerate's own ways of saving an attached model and of going on with it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import paramlora
from paramlora import checkpoint
from paramlora.model.attach import updates

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def a_state_of_its_own(monkeypatch):
    """A Trainer of another test leaves its precision in the environment and in accelerate."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.middle = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.middle(self.embedding(ids)))


CONFIGS = (
    {"middle": {"r": 2}},
    {"middle": {"r": 2, "hard": 0}},
    {"re:embedding|head": {"r": 2}, "middle": {"r": 2}},
    {"middle": {"whole": True}},
    {"trainable_model": 1, "middle": {"r": 2}},
)


def prepared(config):
    torch.manual_seed(0)
    model = paramlora.attach(Tied(), config)
    for _, _, update in updates(model):
        if hasattr(update, "lora_B"):
            nn.init.normal_(update.lora_B)
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    process = accelerate.Accelerator(cpu=True)
    return process, *process.prepare(model, optimizer)


def step(process, model, optimizer):
    optimizer.zero_grad()
    ids = torch.arange(8)
    process.backward(nn.functional.cross_entropy(model(ids), ids.roll(1)))
    optimizer.step()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_is_saved_and_gone_on_with_to_the_last_bit(config, tmp_path):
    process, model, optimizer = prepared(config)
    step(process, model, optimizer)
    process.save_state(tmp_path)
    step(process, model, optimizer)
    want = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [dict(state) for state in optimizer.state_dict()["state"].values()]
    process, model, optimizer = prepared(config)
    process.load_state(tmp_path)
    step(process, model, optimizer)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    for state, wanted in zip(optimizer.state_dict()["state"].values(), moments):
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shards", ("10GB", 100))
def test_a_saved_model_loads_where_the_same_is_attached(config, shards, tmp_path):
    process, model, optimizer = prepared(config)
    step(process, model, optimizer)
    process.save_model(model, tmp_path, max_shard_size=shards)
    _, other, _ = prepared(config)
    accelerate.load_checkpoint_in_model(process.unwrap_model(other), str(tmp_path))
    ids = torch.arange(8)
    assert torch.equal(other(ids), model(ids))


def test_its_state_dict_merges_without_the_model(tmp_path):
    process, model, _ = prepared(CONFIGS[0])
    assert process.unwrap_model(model) is model
    state = checkpoint.merge(process.get_state_dict(model))
    plain = Tied()
    plain.load_state_dict(state)
    ids = torch.arange(8)
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-6)


def test_fsdp2_saves_its_state_and_goes_on(tmp_path):
    script = Path(__file__).with_name("accelerate_fsdp2.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("losses")]
    spec = importlib.util.spec_from_file_location("accelerate_fsdp2", script)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    model = alone.attached()
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(model), lr=1e-2)
    want = alone.steps(model, optimizer, 6, torch.Tensor.backward)
    assert [float(one) for one in line.split()[1:]] == pytest.approx(want, rel=1e-5)
    assert want[-1] < want[0] * 0.9
    again = paramlora.load_adapter(alone.base(), tmp_path / "adapter.safetensors")
    x = torch.ones(8, 16)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
