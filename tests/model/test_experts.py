"""Experts by grouped products: transformers' families, loops of their own, one's own class."""

import collections
import copy
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import paramlora
from paramlora import expert_linear as by_expert
from paramlora.evaluate.dropout import drops_for, masked
from paramlora.model.attach import updates
from paramlora.update.lowrank import LowRank

FOLDER = Path(transformers.__file__).parent / "models"
LOOPS = ("Step3p7Experts", "LongcatFlashExperts", "JetMoeParallelExperts", "Llama4TextExperts")
SUMS_IN_FLOAT32 = ("Inkling2Experts", "OpenAIPrivacyFilterExperts")  # their own loops, in any type
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class Config:
    """Small sizes for whatever a class of experts asks of its configuration."""

    _experts_implementation = "eager"
    ffn_act_fn = {"name": "silu"}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if "num" in name or "experts" in name:
            return 4
        if "limit" in name or "alpha" in name:
            return 7.0
        return {True: 8, False: 16}["intermediate" in name or "ffn" in name]


def families():
    """Each class that transformers' decorator gave its implementations."""
    found = {}
    for file in sorted(FOLDER.glob("*/modeling_*.py")):
        if re.search("^@use_experts_implementation", file.read_text(encoding="utf-8"), re.M):
            name = f"transformers.models.{file.parent.name}.{file.stem}"
            module = importlib.import_module(name)
            for key, cls in vars(module).items():
                own = inspect.isclass(cls) and cls.__module__ == name and "forward" in vars(cls)
                if own and cls.forward.__code__.co_filename.endswith("integrations/moe.py"):
                    found[key] = cls
    return found


@pytest.fixture
def no_sums(monkeypatch):
    """Fails where a dense sum is formed."""

    def delta(self, *args, **kwargs):
        raise AssertionError("a dense sum")

    return lambda: monkeypatch.setattr(LowRank, "delta", delta)


def built(cls, config=None):
    torch.manual_seed(0)
    layer = cls(config or Config()).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    return layer


def stacks_of(layer):
    return [n for n, p in layer.named_parameters() if p.dim() == 3]


def adapted(layer, names, second=False, **more):
    """With r of its own for each tensor, and perhaps another adapter."""
    entries = {name: {"r": 2 + i, "scale": 0.7, **more} for i, name in enumerate(names)}
    paramlora.attach(layer, entries)
    if second:
        paramlora.attach(layer, {names[0]: {"r": 1}}, "second")
        paramlora.set_adapters(layer, {"default": 0.5, "second": 2.0})
    for _, _, update in updates(layer):
        nn.init.normal_(update.lora_B, std=0.4)
    return layer


def dense(layer):
    """The plain layer with the definition's tensors, and the gradients of an update from theirs."""
    twin = paramlora.detach(copy.deepcopy(layer)).requires_grad_()
    if hasattr(twin, "config"):  # the loop, which torch's grouped product in float64 is not
        twin.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, lists in layer.parametrizations.items():
            for low in lists:
                product = low.lora_B @ low.lora_A * (low.lora_scale * low.strength)
                twin.get_parameter(name).add_(product)
    return twin


def check_gradients(layer, twin, **close):
    for name, lists in layer.parametrizations.items():
        whole = twin.get_parameter(name).grad
        for low in lists:
            factor = low.lora_scale * low.strength
            a, b = low.lora_A.detach(), low.lora_B.detach()
            torch.testing.assert_close(low.lora_A.grad, factor * b.mT @ whole, **close)
            torch.testing.assert_close(low.lora_B.grad, factor * whole @ a.mT, **close)


def routed(layer, tokens=9, top=2, beyond=False):
    x = torch.randn(tokens, 16).double().requires_grad_()
    index = torch.stack([torch.randperm(3)[:top] for _ in range(tokens + 1)])[1:]  # one gets no row
    weights = torch.rand(tokens, top).double().requires_grad_()
    if beyond:
        index[::2, 0] = 4
        weights = (weights.detach() * (index < 4)).requires_grad_()
    return x, index, weights


def same(layer, twin, inputs, **close):
    """Outputs and gradients of both, each with inputs of its own."""
    outputs, grads = [], []
    for run in (layer, twin):
        own = [t.detach().requires_grad_() if t.requires_grad else t for t in inputs]
        y = run(*own)
        y.square().sum().backward()
        outputs.append(y)
        grads.append([t.grad for t in own if t.requires_grad])
    torch.testing.assert_close(*outputs, **close)
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, **close)
    check_gradients(layer, twin, **close)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_family_in_each_implementation(implementation, no_sums):
    every = families()
    assert len(every) >= 60
    work = []
    for cls in every.values():
        layer = built(cls)
        layer = adapted(layer, stacks_of(layer))
        layer.config._experts_implementation = implementation
        work.append((layer, dense(layer)))
    no_sums()
    for layer, twin in work:
        sums = dict(rtol=1e-4, atol=1e-5) if type(twin).__name__ in SUMS_IN_FLOAT32 else {}
        same(layer, twin, routed(layer), **sums)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_rounds_what_it_rounds_without_an_update(implementation):
    """torch's grouped product, which computes in the weight's type there, among others."""
    for name, cls in families().items():
        layer = built(cls)
        inputs = [t.detach() for t in routed(layer)]
        exact, layer = layer(*inputs), layer.float()
        inputs = [t.float() if t.is_floating_point() else t for t in inputs]
        layer.config._experts_implementation = implementation
        errors = []
        for entry in (None, {"r": 2}):
            if entry is not None:
                paramlora.attach(layer, dict.fromkeys(stacks_of(layer), entry))
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                errors.append((layer(*inputs) - exact).norm() / exact.norm())
        assert errors[1] <= 2 * errors[0] + 1e-6, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_no_tokens(implementation, dropout):
    """As a process may get where others have the batch: nothing, and gradients of zero."""
    layers = [built(cls) for cls in families().values()]
    work = [(x, stacks_of(x), routed(x, tokens=0)) for x in layers]
    if implementation == "eager":
        work += [make(0) for make in (step, longcat, jetmoe, llama4)]
    for layer, stacks, inputs in work:
        layer = adapted(layer, stacks, dropout=dropout).train()
        if hasattr(layer, "config"):
            layer.config._experts_implementation = implementation
        y = layer(*inputs)
        y.square().sum().backward()
        assert len(y) == 0 and inputs[0].grad.shape == inputs[0].shape
        for _, _, update in updates(layer):
            assert all(p.grad.abs().sum() == 0 for p in update.parameters() if p.requires_grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", ("MixtralExperts", "GptOssExperts", "NemotronHExperts"))
@pytest.mark.parametrize("only", (0, 1, None))
def test_two_adapters_and_one_tensor_alone(implementation, cls, only):
    module = {"M": "mixtral", "G": "gpt_oss", "N": "nemotron_h"}[cls[0]]
    module = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    layer = built(getattr(module, cls))
    stacks = stacks_of(layer)
    layer = adapted(layer, stacks if only is None else [stacks[only]], second=True)
    layer.config._experts_implementation = implementation
    same(layer, dense(layer), routed(layer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", ("MixtralExperts", "GptOssExperts"))
def test_rows_of_other_processes(implementation, cls):
    """Sentinels of expert parallelism: indices beyond the experts, whose weights are zero."""
    name = {"M": "mixtral", "G": "gpt_oss"}[cls[0]]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    layer = adapted(built(getattr(module, cls)), ["gate_up_proj", "down_proj"])
    layer._is_expert_parallel, layer.config._experts_implementation = True, "grouped_mm"
    twin = dense(layer)
    twin.config._experts_implementation = "batched_mm"  # gpt-oss's loop knows none of them
    layer.config._experts_implementation = implementation
    same(layer, twin, routed(layer, beyond=True))


def step(tokens=9):
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    return built(Step3p7Experts), ["gate_up_proj", "down_proj"], routed(None, tokens)


def longcat(tokens=9):
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    config = Config()
    config.zero_expert_num = 2
    x, index, weights = routed(None, tokens)
    index[::2, 0] = 5  # one that gives its input
    return built(LongcatFlashExperts, config), ["gate_up_proj", "down_proj"], (x, index, weights)


def jetmoe(tokens=9):
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    layer = built(lambda _: JetMoeParallelExperts(4, 16, 8))
    sizes = [4, 0, 3, 2] if tokens else [0] * 4
    return layer, ["weight"], (torch.randn(tokens, 16).double().requires_grad_(), sizes)


def llama4(tokens=12):
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    x = torch.randn(tokens, 16).double().requires_grad_()
    return built(Llama4TextExperts), ["gate_up_proj", "down_proj"], (x,)


@pytest.mark.parametrize("make", (step, longcat, jetmoe, llama4))
def test_loops_of_their_own(make, no_sums):
    layer, names, inputs = make()
    layer = adapted(layer, names, second=True)
    twin = dense(layer)
    no_sums()

    same_of(layer, twin, inputs)


def same_of(layer, twin, inputs):
    tensors = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    results = []
    for run in (layer, twin):
        own = [t.detach().requires_grad_() if any(t is o for o in tensors) else t for t in inputs]
        y = run(*own)
        y.square().sum().backward()
        results.append((y, [t.grad for t in own if isinstance(t, torch.Tensor)]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(one, two)
    check_gradients(layer, twin)


def test_a_loop_that_nobody_knows_gets_one_sum(monkeypatch):
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    counts, product = collections.Counter(), LowRank.delta

    def counted(self, *args, **kwargs):
        counts[id(self)] += 1
        return product(self, *args, **kwargs)

    monkeypatch.setattr(LowRank, "delta", counted)
    layer = adapted(built(DbrxExperts), ["mlp.w1", "mlp.v1", "mlp.w2"])
    layer(*routed(layer)).sum().backward()
    assert len(counts) == 3 and set(counts.values()) == {1}


def mixtral(**more):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return adapted(built(MixtralExperts), ["gate_up_proj", "down_proj"], **more)


@pytest.mark.parametrize("implementation", ("batched_mm", "grouped_mm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled_whole(implementation, dtype):
    layer = mixtral().to(dtype)
    layer.config._experts_implementation = implementation
    inputs = [t.detach().to(dtype) if t.is_floating_point() else t for t in routed(layer)]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (layer, compiled):
        layer.zero_grad()
        x = inputs[0].requires_grad_()
        x.grad = None
        run(x, *inputs[1:]).float().square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(grads[0]) == 5
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two)


def test_dropout_acts_in_training_alone_and_is_reproduced():
    layer = mixtral(dropout=0.5)
    inputs = routed(layer)
    torch.manual_seed(1)
    first = layer.train()(*inputs)
    torch.manual_seed(1)
    assert torch.equal(first, layer(*inputs)) and not torch.equal(first, layer(*inputs))
    torch.testing.assert_close(layer.eval()(*inputs), dense(layer)(*inputs))
    assert not torch.allclose(first, layer(*inputs))


class Own(nn.Module):
    """A class of one's own, by the documented function."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4).double())

    def forward(self, x, counts):
        return paramlora.expert_linear(self, "w1", x, counts)


def test_ones_own_class(no_sums):
    x, counts = torch.randn(6, 4).double(), torch.tensor([2, 0, 4])
    plain = Own()
    torch.testing.assert_close(plain(x, counts)[:2], F.linear(x[:2], plain.w1[0]))
    model = adapted(plain, ["w1"])
    twin = dense(model)
    no_sums()
    same_of(model, twin, (x.requires_grad_(), counts))
    with pytest.raises(paramlora.AdapterError, match="Own has no tensor 'w2'. Name one of its"):
        paramlora.expert_linear(model, "w2", x, counts)
    layer = nn.Linear(2, 2)
    with pytest.raises(paramlora.AdapterError, match=r"'weight' of Linear is of shape \[2, 2\]"):
        paramlora.expert_linear(layer, "weight", x, counts)


class Renamed(nn.Module):
    """Says the function by another name, in a method of its own."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4).double())

    def product(self, x, counts):
        return [by_expert(self, name, x, counts) for name in ("w1",)][0]

    def forward(self, x, counts):
        return self.product(x, counts)


class Reader(nn.Module):
    """Reads the tensor, where nothing could be dropped."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 5, 4).double())

    def forward(self, x, counts):
        return torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), self.w1)])


@pytest.mark.parametrize("cls", (Own, Renamed))
def test_dropout_in_ones_own_class(cls):
    """By the mask that a sorted row has, drawn anew at each call and again by a seed."""
    model = adapted(cls(), ["w1"], dropout=0.5)
    x, counts = torch.randn(6, 4).double().requires_grad_(), torch.tensor([2, 0, 4])
    assert not torch.equal(model.train()(x, counts), model(x, counts))
    torch.manual_seed(3)
    got = model(x, counts)
    torch.manual_seed(3)
    drops = drops_for(x, (0.5,), (2,))
    ((_, _, low),) = updates(model)
    a, b = (t.detach().requires_grad_() for t in (low.lora_A, low.lora_B))
    seen, own = masked(x, drops, 0) / 0.5, [0, 0, 2, 2, 2, 2]
    base = torch.einsum("noi,ni->no", model.parametrizations.w1.original.detach()[own], x)
    want = base + 0.7 * torch.einsum("nor,nri,ni->no", b[own], a[own], seen)
    torch.testing.assert_close(got, want)
    leaves = (x, low.lora_A, low.lora_B), (x, a, b)
    grads = [torch.autograd.grad(y.square().sum(), t) for y, t in zip((got, want), leaves)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(model.eval()(x, counts), dense(model)(x, counts))


def test_dropout_in_a_class_that_reads_its_tensor_is_refused():
    with pytest.raises(paramlora.TargetError, match='"dropout" cannot act at w1 of Reader'):
        adapted(Reader(), ["w1"], dropout=0.5)
    layer = Own()  # whose other tensor is no stack, so it is given to nobody who could drop
    layer.router = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(paramlora.TargetError, match='"dropout" cannot act at router of Own'):
        adapted(layer, ["router"], dropout=0.5)


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize(
    ("counts", "got"),
    [
        ([2, 0, 4], r"got \[2, 0, 4\]"),
        (torch.tensor([2, 4]), r"got \[2\] of torch.int64"),
        (torch.tensor([[2, 0, 4]]), r"got \[1, 3\] of torch.int64"),
        (torch.tensor([2.0, 0.0, 4.0]), r"got \[3\] of torch.float32"),
        (torch.tensor([True, False, True]), r"got \[3\] of torch.bool"),
        (torch.tensor([2, 0, 4], dtype=torch.complex64), r"got \[3\] of torch.complex64"),
    ],
    ids=["list", "short", "dimensions", "float", "bool", "complex"],
)
def test_counts_of_other_experts_are_refused(counts, got, updates):
    layer = adapted(Own(), ["w1"]) if updates else Own()
    told = f"each of the 3 matrices of 'w1'.*{got}. Give index.bincount\\(minlength=3\\)."
    with pytest.raises(paramlora.AdapterError, match=told):
        layer(torch.randn(6, 4).double(), counts)


WRONG = {
    "negative": [4, -2, 4],
    "too few": [2, 0, 3],
    "too many": [2, 1, 4],
    "beyond 32 bits": [2**32 + 2, 0, 4],
    "none": [0, 0, 0],
}


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_counts_of_other_rows_are_refused(name, updates):
    layer, counts = adapted(Own(), ["w1"]) if updates else Own(), torch.tensor(WRONG[name])
    x = torch.randn(6, 4).double()
    told = r"of 'w1' of Own must add up to the rows of x, 6, none below 0, got \[.*minlength=3"
    with pytest.raises(paramlora.AdapterError, match=told):
        layer(x, counts)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert compiled(x, torch.tensor([2, 0, 4])).shape == (6, 5)
    with pytest.raises(RuntimeError, match="must add up to the rows of x, none below 0"):
        compiled(x, counts)


@pytest.mark.parametrize("updates", [False, True])
def test_rows_of_more_dimensions_are_refused(updates):
    layer = adapted(Own(), ["w1"]) if updates else Own()
    told = r"x of 'w1' of Own must be \[rows, in\], sorted by expert, got \[2, 3, 4\]. Flatten it."
    with pytest.raises(paramlora.AdapterError, match=told):
        layer(torch.randn(2, 3, 4).double(), torch.tensor([2, 0, 4]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shapes_alone(implementation, dropout):
    """On the meta device, where a count of operations or of memory is made."""
    layer = mixtral(second=True, dropout=dropout).to("meta")
    layer.config._experts_implementation = implementation
    x, index, weights = (t.detach().to("meta") for t in routed(layer))
    y = layer(x.requires_grad_(), index, weights)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(p.grad.shape == p.shape for p in paramlora.trainable_parameters(layer))


def test_counts_elsewhere_are_refused():
    layer = Own().to("meta")
    x, counts = torch.randn(6, 4, device="meta").double(), torch.tensor([2, 0, 4])
    with pytest.raises(paramlora.AdapterError, match="lie on cpu, and x on meta. Give counts.to"):
        layer(x, counts)
    assert layer(x, counts.to("meta")).shape == (6, 5)


def test_merged_saved_and_off_as_every_other(tmp_path):
    layer = mixtral()
    inputs = routed(layer)
    want = layer(*inputs)
    plain = paramlora.detach(copy.deepcopy(layer))
    with paramlora.disable_adapters(layer):
        assert torch.equal(layer(*inputs), plain(*inputs))
    paramlora.save_adapter(layer, tmp_path / "a.safetensors")
    twin = paramlora.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    assert torch.equal(twin(*inputs), want)
    torch.testing.assert_close(paramlora.merge(layer)(*inputs), want)
    assert type(layer) is type(plain)


def test_another_implementation_is_left_to_it():
    """One that somebody registered reads the dense sums."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    seen = []

    def mine(self, hidden_states, top_k_index, top_k_weights):
        seen.append(self.gate_up_proj)
        return hidden_states

    layer = mixtral()
    ALL_EXPERTS_FUNCTIONS.register("mine", mine)
    try:
        layer.config._experts_implementation = "mine"
        layer(*routed(layer))
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["mine"]
    torch.testing.assert_close(seen[0], dense(layer).gate_up_proj)


def test_dropout_is_refused_where_it_would_not_act():
    layer = mixtral(dropout=0.5).train()
    layer.config._experts_implementation = "sonicmoe"
    inputs = routed(layer)
    with pytest.raises(paramlora.AdapterError, match=(
        "'gate_up_proj' of MixtralExperts is read as a dense sum by the implementation 'sonicmoe', "
        'where "dropout": 0.5 cannot act. Choose "eager", "grouped_mm" or "batched_mm" by set'
    )):  # fmt: skip
        layer(*inputs)
    layer, names, inputs = llama4()
    layer = adapted(layer, names, dropout=0.5).train()
    twin = dense(layer)
    torch.nn.utils.parametrize.register_parametrization(layer, names[1], nn.Identity())
    with pytest.raises(paramlora.AdapterError, match="as a dense sum by its own product, where"):
        layer(*inputs)
    torch.testing.assert_close(layer.eval()(*inputs), twin(*inputs))


def test_nothing_dense_is_kept():
    """A tiny JetMoE of many experts keeps what the frozen one does, and thin products."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    sizes |= dict(num_key_value_heads=2, kv_channels=16, intermediate_size=64)
    config = transformers.JetMoeConfig(**sizes, num_local_experts=32, num_experts_per_tok=2)
    model = transformers.JetMoeModel(config)
    rows = torch.randint(40, (2, 8))

    def kept():
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (held.__setitem__(t.data_ptr(), t.untyped_storage().nbytes()), t)[1],
            lambda t: t,
        ):
            model(rows)
        return sum(held.values()), held

    stacks = [n for n, p in model.named_parameters() if p.dim() == 3]
    before, _ = kept()
    adapted(model, stacks)
    after, held = kept()
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert after < before + weights


def kept_by(layer, inputs):
    """Bytes of all that autograd keeps of a call but parameters, each memory once."""
    held, own = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def keep(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            held[memory.data_ptr()] = (
                memory.nbytes(),
                t,
            )  # as long as it is held none other is there
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(*inputs)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("sizes", ((16, 256, 96, 512, 8), (4, 360, 360, 1024, 4)), ids=str)
@pytest.mark.parametrize("name", ("qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"))
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_a_call_keeps_no_more_than_the_frozen_one(name, sizes, dropout):
    """At an eighth of the sizes that `benchmarks.experts` measures: neither the rows that are
    gathered nor what the activation gives is kept."""
    family, name = name.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config, (experts, hidden, inner, tokens, top) = Config(), sizes
    vars(config).update(num_experts=experts, num_local_experts=experts, hidden_size=hidden)
    vars(config).update(moe_intermediate_size=inner, intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    layer = getattr(module, name)(config).bfloat16().requires_grad_(False)
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    weights, index = torch.rand(tokens, experts).softmax(-1).topk(top)
    inputs = x, index, weights.bfloat16().requires_grad_()
    frozen = kept_by(layer, inputs)
    adapted(layer, ["gate_up_proj", "down_proj"], dropout=dropout).train()
    assert kept_by(layer, inputs) < frozen


def test_an_activation_that_learns():
    """Its parameters get their gradients: xIELU's."""
    config = Config()
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = built(MixtralExperts, config)
    layer.act_fn = transformers.activations.ACT2FN["xielu"].double()
    twin = dense(adapted(layer, ["gate_up_proj", "down_proj"]))
    layer.act_fn.requires_grad_()
    same(layer, twin, routed(layer))
    grads = [[p.grad for p in run.act_fn.parameters()] for run in (layer, twin)]
    assert len(grads[0]) == 2
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two)


def own_gate(implementation, gate):
    """A class of somebody's own behind transformers' decorator, with a gate of its own."""
    from transformers.integrations.moe import use_experts_implementation
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Gated(MixtralExperts):
        _apply_gate = gate

        def __init__(self, config):
            super().__init__(config)
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, hidden, index, weights):
            y = torch.zeros_like(hidden)
            for e in range(self.num_experts):
                token, place = torch.where(index == e)
                rows = self._apply_gate(F.linear(hidden[token], self.gate_up_proj[e]))
                rows = F.linear(rows, self.down_proj[e]) * weights[token, place, None]
                y = y.index_add(0, token, rows)
            return y

    layer = built(use_experts_implementation(Gated))
    layer.config._experts_implementation = implementation
    return adapted(layer, ["gate_up_proj", "down_proj"]).train()


@pytest.mark.parametrize("implementation", ("eager", "batched_mm"))
def test_a_gate_that_learns(implementation):
    def gate(self, y):
        left, right = y.chunk(2, -1)
        return left * torch.sigmoid(self.slope * left) * right

    layer = own_gate(implementation, gate)
    layer.slope.requires_grad_()
    twin = dense(layer)
    same(layer, twin, routed(layer))
    assert layer.slope.grad is not None
    torch.testing.assert_close(layer.slope.grad, twin.slope.grad)


def dropped(self, y):
    left, right = y.chunk(2, -1)
    return F.dropout(self.act_fn(left) * right, 0.5)


def plain(self, y):
    left, right = y.chunk(2, -1)
    return self.act_fn(left) * right


@pytest.mark.parametrize(
    ("gate", "act"),
    ((dropped, None), (plain, nn.RReLU()), (plain, nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))),
    ids=("dropout", "rrelu", "within"),
)
def test_a_gate_that_draws_random_numbers(gate, act):
    """Its gradient is that of the numbers that were drawn."""
    layer = own_gate("eager", gate)
    layer.act_fn = layer.act_fn if act is None else act
    x, index, weights = routed(layer)

    def loss(x):
        torch.manual_seed(1)
        return layer(x, index, weights).square().sum()

    loss(x).backward()
    way, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        slope = (loss(x + step * way) - loss(x - step * way)) / (2 * step)
    torch.testing.assert_close((x.grad * way).sum(), slope, rtol=1e-5, atol=1e-6)


def test_an_activation_that_is_read_by_a_hook():
    """Once, and with its gradient: a loss may be of what was read."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    layer = adapted(built(MixtralExperts), ["gate_up_proj", "down_proj"])
    twin, (x, index, weights) = dense(layer), routed(layer)
    grads, lengths = [], []
    for run in (layer, twin):
        read, own = [], x.detach().requires_grad_()
        run.act_fn.register_forward_hook(lambda m, i, y, read=read: read.append(y))
        (run(own, index, weights).sum() + sum(y.square().sum() for y in read)).backward()
        grads.append(own.grad)
        lengths.append(sum(map(len, read)))
    assert lengths == [index.numel()] * 2
    torch.testing.assert_close(*grads)
    check_gradients(layer, twin)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_biases_that_are_trained(implementation):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    layer = adapted(built(GptOssExperts), ["gate_up_proj", "down_proj"])
    layer.config._experts_implementation = implementation
    twin = dense(layer)
    biases = ["gate_up_proj_bias", "down_proj_bias"]
    for name in biases:
        layer.get_parameter(name).requires_grad_()
    same(layer, twin, routed(layer))
    for name in biases:
        torch.testing.assert_close(layer.get_parameter(name).grad, twin.get_parameter(name).grad)
