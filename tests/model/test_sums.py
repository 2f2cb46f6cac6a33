"""A tensor's dense sum is formed at most once a call, is never stale, and is gone afterwards."""

import collections
import contextlib
import copy
import gc
import importlib
import sys
import threading
import weakref

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates
from paramlora.update.lowrank import LowRank

KNOWN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.fixture
def sums(monkeypatch):
    """How often each update's product was formed."""
    counts, lock, product = collections.Counter(), threading.Lock(), LowRank.delta

    def counted(self, *args, **kwargs):
        with lock:
            counts[id(self)] += 1
        return product(self, *args, **kwargs)

    monkeypatch.setattr(LowRank, "delta", counted)
    return counts


class Loop(nn.Module):
    """Reads a stack once for each of its matrices, and asks for types and sizes."""

    def __init__(self, meanwhile=lambda model: None):
        super().__init__()
        self.stack, self.meanwhile = nn.Parameter(torch.randn(4, 6, 6)), meanwhile
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        for index in range(4):
            x = torch.tanh(x.to(self.other.weight.dtype) @ self.stack[index])
            self.meanwhile(self)
        return self.other(x) + self.other.weight.shape[0] * self.stack.size(0) * self.stack.dim()


CONFIG = {"stack": {"r": 2}, "other": {"r": 2}}


def adapted(model, config=None):
    torch.manual_seed(0)
    paramlora.attach(model, CONFIG if config is None else config)
    for _, _, update in updates(model):
        nn.init.normal_(update.lora_B, std=0.3)
    return model


def dense(model, paths=("stack", "other.weight")):
    """A copy of the plain model with the definition's tensors, in float64."""
    twin = paramlora.detach(copy.deepcopy(model)).double()
    with torch.no_grad():
        for path in paths:
            owner, _, name = path.rpartition(".")
            lists = model.get_submodule(owner).parametrizations[name]
            total = lists.original.double()
            for update in lists:
                product = update.lora_B.double() @ update.lora_A.double()
                product = product * update.lora_scale.double() * update.strength
                total = total + product.reshape(total.shape)
            twin.get_parameter(path).copy_(total)
    return twin


def loop(meanwhile=lambda model: None):
    torch.manual_seed(0)
    return adapted(Loop(meanwhile))


def test_a_loop_gets_one_sum_and_its_gradients(sums):
    model, x = loop(), torch.randn(5, 6)
    model(x).square().sum().backward()
    update = model.parametrizations.stack[0]
    assert sums == {id(update): 1}
    right = dense(model).requires_grad_()
    right(x.double()).square().sum().backward()
    a, b = update.lora_A.detach().double(), update.lora_B.detach().double()
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update.lora_A.grad.double(), b.mT @ right.stack.grad, **close)
    torch.testing.assert_close(update.lora_B.grad.double(), right.stack.grad @ a.mT, **close)


def test_another_kind_of_update_is_computed_once_too(monkeypatch):
    from paramlora.update.dora import Dora

    counts, value = collections.Counter(), Dora.forward

    def counted(self, weight):
        counts[id(self)] += not torch.is_grad_enabled()  # the backward computes it again
        return value(self, weight)

    torch.manual_seed(0)
    model = adapted(Loop(), {"stack": {"r": 2, "kind": "dora"}})
    monkeypatch.setattr(Dora, "forward", counted)
    x = torch.randn(5, 6)
    want = model.stack.detach().clone()
    counts.clear()
    y = model(x)
    assert list(counts.values()) == [1]
    y.square().sum().backward()
    for matrix in want:
        x = torch.tanh(x @ matrix)
    size = 6 * 4 * 3
    torch.testing.assert_close(y, model.other(x) + size)
    assert model.parametrizations.stack[0].lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_the_same_number_in_each_mode(context, sums):
    model, x = loop(), torch.randn(5, 6)
    with context():
        y = model(x)
    assert sums[id(model.parametrizations.stack[0])] == 1
    torch.testing.assert_close(y.double(), dense(model)(x.double()), rtol=1e-4, atol=1e-4)


def test_a_reader_without_gradients_and_one_with_share_it(sums):
    class Net(Loop):
        def forward(self, x):
            with torch.no_grad():
                before = self.stack[0].sum()
            return self.stack.sum() * before

    model = adapted(Net())
    model(None).backward()
    assert sums[id(model.parametrizations.stack[0])] == 1
    b = model.parametrizations.stack[0].lora_B
    total = dense(model).stack
    want = model.parametrizations.stack[0].lora_A.sum(-1)[:, None].expand_as(b) * total[0].sum()
    torch.testing.assert_close(b.grad.double(), want.double(), rtol=1e-4, atol=1e-4)


def test_a_recurrent_layer_reads_each_weight_once(sums):
    names = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")
    model = adapted(nn.LSTM(6, 5, num_layers=2), {name: {"r": 2} for name in names})
    model(torch.randn(3, 2, 6))[0].square().sum().backward()
    assert len(sums) == 4 and set(sums.values()) == {1}
    assert all(low.lora_B.grad.abs().sum() > 0 for _, _, low in updates(model))


def test_it_is_gone_after_the_call_and_after_one_that_fails():
    seen = []

    def look(model):
        seen.append(weakref.ref(model.stack))

    def stop(model):
        look(model)
        raise KeyError("stop")

    for meanwhile in (look, stop):
        model = loop(meanwhile)
        with torch.no_grad():
            try:
                model(torch.randn(5, 6))
            except KeyError:
                pass
        gc.collect()
        assert seen and all(ref() is None for ref in seen)


@torch.no_grad()
def step(model):
    model.parametrizations.stack[0].lora_A.add_(0.1)


@torch.no_grad()
def new_base(model):
    model.load_state_dict({"stack": model.parametrizations.stack.original + 0.1}, strict=False)


def strength(model):
    update = model.parametrizations.stack[0]
    paramlora.set_adapters(model, {"default": update.strength + 0.5})


@torch.no_grad()
def optimizer(model):
    b = model.parametrizations.stack[0].lora_B
    b.grad = torch.ones_like(b)
    torch.optim.AdamW([b], lr=0.1).step()


@torch.no_grad()
def fused(model):
    """Which counts no version of what it writes to."""
    b = model.parametrizations.stack[0].lora_B
    b.grad, before = torch.ones_like(b), b._version
    torch.optim.AdamW([b], lr=0.1, fused=True).step()
    assert b._version == before


def data(model):
    b = model.parametrizations.stack[0].lora_B
    b.data = b.data + 0.1


@torch.no_grad()
def written(model):
    model.stack.mul_(2)  # by a reader, who has its own


def second(model):
    if len(model.parametrizations.stack) == 1:
        paramlora.attach(model, {"stack": {"r": 1}}, "second")
        nn.init.ones_(model.parametrizations.stack[1].lora_B)


CHANGES = (step, new_base, strength, optimizer, fused, data, written, second)


@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_reads_is_seen(change, cached):
    seen = []

    def look(model):
        seen.append((model.stack.detach().clone(), dense(model).stack))
        change(model)
        seen.append((model.stack.detach().clone(), dense(model).stack))

    model = loop(look)
    with torch.no_grad(), parametrize.cached() if cached else contextlib.nullcontext():
        model(torch.randn(5, 6))
    for got, right in seen:
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_disabled_inside_of_a_call(sums):
    class Net(Loop):
        def forward(self, x):
            first = self.stack
            with paramlora.disable_adapters(self):
                assert self.stack is self.parametrizations.stack.original
            return (self.stack + first).sum()

    model = adapted(Net())
    model(None).backward()
    assert sums[id(model.parametrizations.stack[0])] == 1


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed_segments_read_it_once_each(reentrant, sums):
    """Twice the same segment: a sum that one of them found is not missed when the other is
    computed again."""
    model, x = loop(), torch.randn(5, 6, requires_grad=True)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, how=None):
            for _ in range(2):
                x = self.inner(x) if how is None else checkpoint(self.inner, x, use_reentrant=how)
            return x

    outer = Twice()
    outer(x, reentrant).square().sum().backward()
    update = model.parametrizations.stack[0]
    assert sums[id(update)] <= 3  # the forward's, and each segment's again
    got = update.lora_A.grad.clone()
    update.lora_A.grad = None
    outer(x).square().sum().backward()
    torch.testing.assert_close(got, update.lora_A.grad, rtol=1e-4, atol=1e-4)


def test_a_backward_inside_of_a_call_and_one_after_it(sums):
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Loop()

        def forward(self, x):
            x = x.requires_grad_()
            (dx,) = torch.autograd.grad(self.inner(x).sum(), x)
            return self.inner(x) + dx

    model = Penalty()
    adapted(model)
    model(torch.randn(5, 6)).sum().backward()
    update = model.inner.parametrizations.stack[0]
    assert sums[id(update)] == 1 and update.lora_B.grad.abs().sum() > 0


def test_gradients_of_gradients():
    model, x = loop().double(), torch.randn(3, 6).double()
    update = model.parametrizations.stack[0]
    factors = (update.lora_A, update.lora_B)

    def run(a, b):
        with torch.no_grad():
            update.lora_A.copy_(a), update.lora_B.copy_(b)
        return torch.autograd.grad(model(x).square().sum(), factors, create_graph=True)

    first = run(*(f.detach().clone() for f in factors))
    second = torch.autograd.grad(sum(g.square().sum() for g in first), factors)
    step = 1e-6
    for index in range(2):
        values = [f.detach().clone() for f in factors]
        around = []
        for sign in (1, -1):
            moved = [v.clone() for v in values]
            moved[index].view(-1)[0] += sign * step
            around.append(sum(g.square().sum() for g in run(*moved)).detach())
        run(*values)
        slope = (around[0] - around[1]) / (2 * step)
        torch.testing.assert_close(second[index].flatten()[0], slope, rtol=1e-4, atol=1e-6)


def test_stepped_before_backward_is_refused():
    model = loop()
    y = model(torch.randn(5, 6)).sum()
    step(model)
    with pytest.raises(paramlora.AdapterError, match="changed between forward and backward"):
        y.backward()


def test_several_threads(sums):
    model, x, got = loop(), torch.randn(5, 6), {}

    def run(index):
        with torch.no_grad():
            got[index] = model(x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums[id(model.parametrizations.stack[0])] == 4
    right = dense(model)(x.double())
    for y in got.values():
        torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def test_torchs_own_block_computes_it_once(sums):
    model = loop()
    with parametrize.cached():
        for _ in range(3):
            model(torch.randn(5, 6)).sum().backward()
        assert model.stack is model.stack
    assert set(sums.values()) == {1}
    assert model.stack is not model.stack


def test_compiled_code_forms_it_once():
    """Equal products are one in the graph that the compiler hands on, where gradients are asked."""
    from functorch.compile import aot_module_simplified, make_boxed_func
    from functorch.compile import min_cut_rematerialization_partition as partition

    counts = []

    def count(graph, _):
        product = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.bmm.default,)]
        counts.append(len([n for n in product if n.meta["val"].shape == (4, 6, 6)]))
        return make_boxed_func(graph.forward)

    def backend(graph, example):
        return aot_module_simplified(graph, example, fw_compiler=count, partition_fn=partition)

    model, x = loop(), torch.randn(5, 6)
    torch.compiler.reset()
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    y.sum().backward()
    assert counts == [1, 0]
    torch.testing.assert_close(y.double(), dense(model)(x.double()), rtol=1e-4, atol=1e-4)


class Scaled(nn.Embedding):
    def forward(self, rows):
        return super().forward(rows) * 2.0


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input.to(self.weight.dtype)) + self.weight.shape[0]


class Causal(nn.Conv3d):
    def forward(self, x):
        chunks = (F.pad(x[:, :, :n], (1, 1, 1, 1, 2, 0)) for n in (2, 3))
        return torch.cat([super(Causal, self).forward(chunk) for chunk in chunks], 2)


ENDING = {
    "embedding": (Scaled, (9, 4, 1), (torch.randint(9, (2, 5)),)),
    "linear": (Shifted, (4, 5), (torch.randn(3, 4).double(),)),
    "convolution": (Causal, (2, 4, 3), (torch.randn(2, 2, 3, 4, 5).double(),)),
}


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize("name", ENDING)
def test_a_forward_that_ends_in_a_known_one_is_known(name, train, sums):
    cls, sizes, inputs = ENDING[name]
    torch.manual_seed(0)
    model = nn.Sequential(cls(*sizes)).double()
    adapted(model, {"0": {"r": 2}}).train(train)
    y = model(*inputs)
    y.square().sum().backward()
    assert not sums
    update, layer = model[0].parametrizations.weight[0], model[0]
    weight = layer.parametrizations.weight.original
    product = update.lora_B @ update.lora_A
    product = product.t() if name == "embedding" else product.reshape(weight.shape)
    twin = cls(*sizes).double()
    twin.load_state_dict({**paramlora.detach(model)[0].state_dict()})
    total = (weight + product).detach().requires_grad_()
    right = torch.func.functional_call(twin, {"weight": total}, inputs)
    torch.testing.assert_close(y, right)
    (grad,) = torch.autograd.grad(right.square().sum(), total)
    grad = grad.t() if name == "embedding" else grad.flatten(1)
    torch.testing.assert_close(update.lora_B.grad, (grad @ update.lora_A.t()).detach())
    assert type(model[0]) is cls


def test_a_base_that_somebody_replaced_is_called_by_it(monkeypatch):
    model = adapted(nn.Sequential(Scaled(9, 4)), {"0": {"r": 2}})
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, rows: torch.ones(3))
    assert torch.equal(model(torch.zeros(2).long()), 2 * torch.ones(3))


SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
GATED = dict(**SMALL, intermediate_size=24, num_key_value_heads=2, head_dim=8)
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CODED = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, **ENDS)
CODED |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
CODED |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
T5 |= dict(decoder_start_token_id=0, feed_forward_proj="gated-gelu")
MOE = dict(GATED, num_local_experts=4, num_experts_per_tok=2, **ENDS)
MAMBA = dict(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2)

LANGUAGE = {
    "Gemma3TextModel": ("Gemma3TextConfig", dict(GATED, num_key_value_heads=1)),
    "T5Model": ("T5Config", T5),
    "MT5Model": ("MT5Config", T5),
    "BartModel": ("BartConfig", dict(CODED, scale_embedding=True)),
    "MBartModel": ("MBartConfig", dict(CODED, scale_embedding=True)),
    "PegasusModel": ("PegasusConfig", CODED),
    "M2M100Model": ("M2M100Config", CODED),
    "MambaModel": ("MambaConfig", MAMBA),
    "RwkvModel": ("RwkvConfig", dict(vocab_size=40, hidden_size=16, num_hidden_layers=2)),
    "GPT2Model": ("GPT2Config", dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
    "OPTModel": ("OPTConfig", dict(SMALL, ffn_dim=24, word_embed_proj_dim=16)),
    "BertModel": ("BertConfig", dict(SMALL, intermediate_size=24)),
    "LlamaModel": ("LlamaConfig", GATED),
    "BloomModel": ("BloomConfig", dict(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)),
    "JetMoeModel": ("JetMoeConfig", dict(MOE, kv_channels=8)),
    "MixtralModel": ("MixtralConfig", MOE),
}


def language(name):
    config, sizes = LANGUAGE[name]
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )


def kl():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)


def wan():
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def cogvideo():
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
    )


IMAGES = {
    "UNet2DConditionModel": (unet, ((1, 4, 8, 8), (), (1, 3, 12))),
    "AutoencoderKL": (kl, ((1, 3, 8, 8),)),
    "AutoencoderKLWan": (wan, ((1, 3, 5, 16, 16),)),
    "AutoencoderKLCogVideoX": (cogvideo, ((1, 3, 5, 16, 16),)),
}


def call(name, model):
    if name in IMAGES:
        return model(*(torch.randn(shape) if shape else 3 for shape in IMAGES[name][1]))
    rows = torch.randint(3, 40, (2, 7))
    coded = model.config.is_encoder_decoder
    return model(input_ids=rows, **({"decoder_input_ids": rows} if coded else {}))


@pytest.mark.parametrize("name", [*LANGUAGE, *IMAGES])
def test_twenty_architectures(name, sums):
    torch.manual_seed(0)
    model = language(name) if name in LANGUAGE else IMAGES[name][0]()
    paths = {f"{at}.weight": m for at, m in model.named_modules()}
    wide_ = [n for n, p in model.named_parameters() if p.dim() > 1 and min(p.shape[:2]) > 1]
    adapted(model, {path: {"r": 1} for path in wide_})
    found = {id(u): (path, m) for path, m, u in updates(model)}
    for context in (torch.enable_grad, torch.no_grad):
        sums.clear()
        with context():
            call(name, model)
        assert all(count == 1 for count in sums.values()), [found[key][0] for key in sums]
        read = {found[key][0] for key in sums}
        known = {path for path, m in found.values() if isinstance(paths.get(path), KNOWN)}
        assert not read & known


# --- inputs of a class that only carries data ----------------------------------------------------


class Tagged(torch.Tensor):
    """Torch gives what is computed of it its class."""


class Odd(torch.Tensor):
    """Whose override computes something else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        y = super().__torch_function__(func, types, args, kwargs)
        return y * 2 if func in (F.linear, F.conv2d, F.embedding) else y


UNWRAPPING = """
import torch

class Image(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = func(*args, **(kwargs or {}))
        return y.as_subclass(torch.Tensor) if isinstance(y, cls) else y
"""


@pytest.fixture
def image(tmp_path, monkeypatch):
    """A class as torchvision's, whose override gives plain tensors."""
    file, name = tmp_path / "images.py", "torchvision.tv_tensors._tv_tensor"
    file.write_text(UNWRAPPING)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module.Image


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return paramlora.expert_linear(self, "weight", x, torch.tensor([2, 0, 2]))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def moe():
    config = transformers.MixtralConfig(**MOE | {"hidden_size": 4, "intermediate_size": 6})
    config._experts_implementation = "eager"
    block = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p)
    return block


GIVEN = {
    "linear": (lambda: nn.Linear(4, 5), (4, 4)),
    "its end": (lambda: ScaledLinear(4, 5), (4, 4)),
    "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(5, 4), (4, 4)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3, padding=1), (4, 4, 5, 5)),
    "alone": (lambda: nn.Conv2d(4, 5, 3), (4, 5, 5)),
    "embedding": (lambda: nn.Embedding(9, 5), (4, 3)),
    "scaled": (lambda: Scaled(9, 5), (4, 3)),
    "experts": (Stacked, (4, 4)),
    "transformers": (moe, (4, 3, 4)),
}
ENTRIES = {"transformers": {"experts.gate_up_proj": {"r": 2}, "experts.down_proj": {"r": 2}}}
LACKS = {"dropout": ("embedding", "scaled"), "dora": ("experts", "transformers")}
LACKS |= {"evaluation": (), "routed": ("alone", "experts")}  # which tell no rows
WAYS = [(name, how) for name in GIVEN for how in LACKS if name not in LACKS[how]]


@pytest.mark.parametrize("name, how", WAYS)
def test_an_input_of_a_class_that_carries_data(name, how, image, monkeypatch):
    """What a plain one gives, in the class that the layer without an update gives, and no sum."""
    make, shape = GIVEN[name]
    of_ids = name in ("embedding", "scaled")
    torch.manual_seed(0)
    plain = make().double()
    entry = {"r": 2, "dropout": 0.5 if how == "dropout" else 0}
    entry |= {"kind": "dora"} if how == "dora" else {}
    config = {path: entry for path in ENTRIES.get(name, ["weight"])}
    model = adapted(copy.deepcopy(plain), config)
    if how == "dora":
        for p in paramlora.trainable_parameters(model):
            nn.init.normal_(p)
    x = torch.randint(9, shape) if of_ids else torch.randn(shape).double()

    def run(x):
        torch.manual_seed(3)
        rows = paramlora.route(model, ["default", None, None, "default"])
        with rows if how == "routed" else contextlib.nullcontext():
            return model.train(how == "dropout")(x)

    def gradients(of):
        x_own = x.clone() if of_ids else x.clone().requires_grad_()
        y = run(x_own if of is None else x_own.as_subclass(of))
        y.square().sum().backward()
        grads = [p.grad for p in paramlora.trainable_parameters(model)] + [x_own.grad]
        model.zero_grad()
        return type(y), y.detach(), [g for g in grads if g is not None]

    _, y, grads = gradients(None)
    if how != "dora":
        monkeypatch.setattr(LowRank, "delta", None)  # called by nobody
    for cls in (Tagged, image):
        kind, found, own = gradients(cls)
        assert kind is type(plain(x.as_subclass(cls))), cls
        assert torch.equal(found.as_subclass(torch.Tensor), y)
        assert len(own) == len(grads) and all(map(torch.equal, own, grads))


@pytest.mark.parametrize("name", ("linear", "convolution", "embedding"))
def test_an_input_whose_class_computes_is_left_to_it(name, sums):
    make, shape = GIVEN[name]
    model = adapted(make(), {"weight": {"r": 2}})
    x = torch.randint(9, shape) if name == "embedding" else torch.randn(shape)
    torch.testing.assert_close(model(x.as_subclass(Odd)).as_subclass(torch.Tensor), model(x) * 2)
    assert [*sums.values()] == [1]
