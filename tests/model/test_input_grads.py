"""Activation checkpointing changes no gradient, reentrant or not, in whoever does it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora import AdapterError
from paramlora.model.attach import updates
from tests.model.test_models import small_bert, small_gpt2, small_unet, small_vit, tokens

HARD = pytest.mark.parametrize("hard", (1, 0))
REENTRANT = pytest.mark.parametrize("reentrant", (True, False))


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


class Blocks(nn.Module):
    """Blocks in checkpoints, behind an embedding or not."""

    def __init__(self, embed, mode=None):
        super().__init__()
        self.embed = nn.Embedding(9, 8) if embed else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 8))
            for _ in range(3)
        )
        self.mode = mode

    def forward(self, x):
        x = self.embed(x)
        x += 1  # in place, which a leaf that requires a gradient would refuse
        for block in self.blocks:
            if self.mode is None:
                x = residual(block, x)
            else:
                x = checkpoint(residual, block, x, use_reentrant=self.mode)
        return x


def residual(block, x):
    return x + block(x)


def attached(model, entries, hard, **options):
    paramlora.attach(model, {e: {"r": 2, "hard": hard, **options} for e in entries})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.3)
    return model.train()


def gradients(model, call, autocast=False):
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = call(model).float().square().mean()
    loss.backward()
    out = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert out and any(g.abs().max() > 0 for g in out.values())
    return loss.detach(), out


def check_equal(want, got, **close):
    """Bit for bit, unless told how close.

    Where several readers' gradients meet at a segment's input, torch's reentrant kind adds them in
    another order: a plain module trained whole differs by as much.
    """
    assert torch.equal(want[0], got[0])
    assert want[1].keys() == got[1].keys()
    for name, grad in want[1].items():
        if close:
            size = grad.abs().max().item()
            torch.testing.assert_close(got[1][name], grad, rtol=0, atol=close["of_size"] * size)
        else:
            assert torch.equal(grad, got[1][name]), name


@HARD
@REENTRANT
@pytest.mark.parametrize("embed", (True, False))
@pytest.mark.parametrize("autocast", (True, False))
def test_plain_blocks_with_dropout(hard, reentrant, embed, autocast):
    model = attached(Blocks(embed), [r"re:blocks\..*"], hard, dropout=0.2)
    x = torch.randint(9, (4, 5)) if embed else torch.randn(4, 5, 8)
    want = gradients(model, lambda m: m(x.clone()), autocast)
    model.mode = reentrant
    if reentrant:
        paramlora.enable_input_grads(model)
    got = gradients(model, lambda m: m(x.clone()), autocast)
    two_readers = reentrant and autocast and not hard  # the layer and the branch
    check_equal(want, got, **({"of_size": 0.02} if two_readers else {}))


def test_without_it_the_reentrant_kind_has_no_gradient():
    model = attached(Blocks(True, True), [r"re:blocks\..*"], 1)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        assert not model(torch.arange(5)).requires_grad
    paramlora.enable_input_grads(model)
    assert model(torch.arange(5)).requires_grad
    with torch.no_grad():
        assert not model(torch.arange(5)).requires_grad
    paramlora.disable_input_grads(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_a_float_says_what_to_do():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return checkpoint(self.body, self.first(x), use_reentrant=True)

    model = paramlora.enable_input_grads(attached(Bag(), ["body"], 1))
    x = torch.arange(6).reshape(2, 3)
    with pytest.raises(AdapterError, match="no input of Bag is a floating-point tensor.*module"):
        model(x)
    paramlora.enable_input_grads(model, model.first)
    model(x).sum().backward()
    ((_, _, low),) = updates(model)
    assert low.lora_A.grad.abs().max() > 0


def test_a_model_that_takes_no_input_with_a_gradient_begins_at_the_named_module():
    class Sounds(nn.Module):
        """As wav2vec2's encoder does in training, to checkpoint what is frozen."""

        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = x[:, None]
            hidden.requires_grad = True
            return checkpoint(self.body, self.first(hidden.detach()), use_reentrant=True)

    torch.manual_seed(0)
    model = attached(Sounds(), ["body"], 1)
    x = torch.randn(5, 4, dtype=next(model.parameters()).dtype)
    with pytest.raises(RuntimeError, match="leaf variables"):
        paramlora.enable_input_grads(model)(x)
    paramlora.enable_input_grads(model, model.first)
    y = model(x)
    y.sum().backward()
    ((_, _, low),) = updates(model)
    hidden = model.first(x[:, None]).detach().double().reshape(-1, 4)
    want = low.scaling.double() * low.lora_B.double().sum(0)[:, None] * hidden.sum(0)[None]
    torch.testing.assert_close(low.lora_A.grad.double(), want.detach())
    paramlora.disable_input_grads(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_last_adapter_takes_the_hooks_along():
    for leave in (paramlora.merge, paramlora.detach):
        model = paramlora.enable_input_grads(attached(Blocks(True), ["blocks.0.0"], 1))
        twin = copy.deepcopy(model)
        leave(model)
        pickle.loads(pickle.dumps(model))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert twin._forward_pre_hooks and twin.embed._forward_hooks


def call_unet(model):
    x = torch.linspace(-1, 1, 2 * 4 * 64).reshape(2, 4, 8, 8)
    context = torch.linspace(-1, 1, 2 * 3 * 12).reshape(2, 3, 12)
    return model(x, torch.tensor([3, 500]), encoder_hidden_states=context).sample


def call_vit(model):
    pixels = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)
    return model(pixel_values=pixels).last_hidden_state


BLOCK = r"re:(transformer|encoder|layers)\..*(c_attn|c_proj|query|value|dense|q_proj|o_proj|fc1)"
TRANSFORMERS = {
    "gpt2": (small_gpt2, lambda m: m(tokens()).logits, [BLOCK], "ln_1"),
    "bert": (small_bert, lambda m: m(tokens()).last_hidden_state, [BLOCK], "output.LayerNorm"),
    "vit": (small_vit, call_vit, [BLOCK], "layernorm_before"),
}


SUMS = {"of_size": 0.02}  # several readers' gradients in another order, in bfloat16


@pytest.mark.parametrize("name", TRANSFORMERS)
@HARD
@REENTRANT
@pytest.mark.parametrize("order", ("attach first", "attach last"))
@pytest.mark.parametrize("autocast", (False, True))
def test_transformers(name, hard, reentrant, order, autocast):
    build, call, entries, norm = TRANSFORMERS[name]
    model = build().train()
    twin = attached(copy.deepcopy(model), entries, hard, dropout=0.2)
    want = gradients(twin, call, autocast)
    config = {e: {"r": 2, "hard": hard, "dropout": 0.2} for e in entries}
    how = {"use_reentrant": reentrant}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)  # its name since 5.20
        if order == "attach last":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            model = paramlora.attach(model, config)
        else:
            model = paramlora.attach(model, config)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            if reentrant:
                paramlora.enable_input_grads(model)
    paramlora.load_adapter_state_dict(model, paramlora.adapter_state_dict(twin))
    runs = count_runs(next(m for n, m in model.named_modules() if n.endswith("0." + norm)))
    check_equal(
        want,
        gradients(model, call, autocast),
        **(SUMS if (name, reentrant, autocast) == ("bert", True, True) else {}),
    )
    assert len(runs) == 2


def count_runs(module):
    """A list that grows whenever the module runs."""
    runs = []
    module.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@HARD
@pytest.mark.parametrize("reentrant, autocast", [(True, False), (False, False), (False, True)])
def test_diffusers(hard, reentrant, autocast):
    entries = ["to_q", "to_v", "to_out.0", "conv1", "ff.net.0.proj"]
    model = attached(small_unet(), entries, hard, dropout=0.2)
    want = gradients(model, call_unet, autocast)
    if reentrant:

        def reenter(module, *args):
            return checkpoint(module.__call__, *args, use_reentrant=True)

        model.enable_gradient_checkpointing(reenter)
        paramlora.enable_input_grads(model)
    else:
        model.enable_gradient_checkpointing()
    runs = count_runs(model.down_blocks[0].resnets[0].norm1)
    got = gradients(model, call_unet, autocast)
    check_equal(want, got, **({"of_size": 1e-5} if reentrant else {}))
    assert len(runs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@HARD
@REENTRANT
def test_checkpointing_saves_memory_on_the_device(hard, reentrant):
    with torch.device("cuda"):
        model = Blocks(False)
        model.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(16)
        )
    attached(model, [r"re:blocks\..*"], hard)
    x = torch.randn(4096, 512, device="cuda")

    def peak(mode):
        model.mode = mode
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x.clone()).square().mean().backward()
        return torch.cuda.max_memory_allocated() - before

    if reentrant:
        paramlora.enable_input_grads(model)
    without, saved = peak(None), peak(reentrant)
    print(f"peak {without / 2**20:.0f} MiB without, {saved / 2**20:.0f} MiB with checkpointing")
    assert saved < without / 2


class Sounds(nn.Module):
    """As transformers' Wav2Vec2 and its kin begin gradients: at a view of what they are given."""

    def __init__(self):
        super().__init__()
        self._requires_grad = True
        self.first, self.second = nn.Conv1d(1, 3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = x[:, None]
        if self._requires_grad and self.training:
            h.requires_grad = True
        h = checkpoint(self.first, h, use_reentrant=True)
        return checkpoint(self.second, h.mT, use_reentrant=True)


def test_a_model_that_begins_gradients_at_a_view_of_its_input():
    torch.manual_seed(0)
    model = paramlora.attach(Sounds().double(), {"first": {"r": 1}, "second": {"r": 2}})
    for parameter in paramlora.trainable_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, dtype=torch.float64)
    want = model.second(nn.functional.conv1d(x[:, None], model.first.weight, model.first.bias).mT)
    wanted = torch.autograd.grad(want.sin().sum(), list(paramlora.trainable_parameters(model)))
    paramlora.enable_input_grads(model)(x).sin().sum().backward()
    for parameter, gradient in zip(paramlora.trainable_parameters(model), wanted):
        torch.testing.assert_close(parameter.grad, gradient)
