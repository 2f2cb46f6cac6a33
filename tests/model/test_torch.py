"""A sweep of torch's own machinery over an adapted model, against a dense reference written
here."""

import copy
import pickle
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import paramlora

CLOSE = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def adapted(plain, *entries, **options):
    """A float64 model with B away from zero, and the untouched plain one beside it."""
    plain = plain.double()
    model = copy.deepcopy(plain)
    paramlora.attach(model, {e: {"r": 2, "scale": 1.5, **options} for e in entries})
    fill(model)
    return model, plain


def fill(model, adapter="default"):
    with torch.no_grad():
        for key, tensor in paramlora.adapter_state_dict(model, adapter).items():
            if key.endswith("lora_B"):
                tensor.normal_(std=0.5)


def factors(model, plain, adapter="default"):
    """{parameter name: (scale, B, A)}, as new leaves."""
    state, known = paramlora.adapter_state_dict(model, adapter), dict(plain.named_parameters())
    out = {}
    for key in state:
        if key.endswith("lora_A"):
            stem = key[: -len("lora_A")]
            name = stem + "weight" if stem + "weight" in known else stem[:-1]
            names = ("lora_scale", "lora_B", "lora_A")
            out[name] = tuple(state[stem + n].clone().requires_grad_() for n in names)
    return out


def weights(plain, found):
    """Every parameter of the plain model, with W + scale·B·A written out for the found ones."""
    out = dict(plain.named_parameters())
    for name, (scale, b, a) in found.items():
        owner = plain.get_submodule(name.rpartition(".")[0])
        product = scale * (b @ a)
        out[name] = out[name] + (product.T if isinstance(owner, nn.Embedding) else product).reshape(
            out[name].shape
        )
    return out


def reference(model, plain, *args, **kwargs):
    return functional_call(plain, weights(plain, factors(model, plain)), args, kwargs)


def check_gradients(model, plain, call):
    """The factors' gradients of ``call(model).sum()`` are those of the dense formula."""
    found = factors(model, plain)
    holder = Functional(plain, weights(plain, found))
    (call(holder) ** 2).sum().backward()
    (call(model) ** 2).sum().backward()
    for name, (_, b, a) in found.items():
        owner, _, tensor = name.rpartition(".")
        (low,) = model.get_submodule(owner).parametrizations[tensor]
        assert low.lora_A.grad.abs().max() > 0
        torch.testing.assert_close(low.lora_A.grad, a.grad, **CLOSE)
        torch.testing.assert_close(low.lora_B.grad, b.grad, **CLOSE)


class Functional:
    def __init__(self, plain, values):
        self.plain, self.values = plain, values

    def __call__(self, *args, **kwargs):
        return functional_call(self.plain, self.values, args, kwargs)


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))


def image():
    return torch.randn(2, 3, 4, 4).double()


# functional transforms, export, compilation


def test_functional_call_takes_the_factors():
    model, plain = adapted(conv_net(), "0", "3")
    other = copy.deepcopy(model)
    fill(other)
    x, own = image(), model(image())
    want = reference(other, plain, x)
    assert not torch.allclose(want, reference(model, plain, x))
    got = functional_call(model, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(got, want, **CLOSE)
    assert own.shape == got.shape
    torch.testing.assert_close(model(x), reference(model, plain, x), **CLOSE)


def test_vmap_over_stacked_factors_is_a_loop_over_models():
    model, plain = adapted(conv_net(), "0", "3")
    twins = [copy.deepcopy(model) for _ in range(3)]
    for twin in twins:
        fill(twin)
    x = image()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    stack = {n: torch.stack([dict(t.named_parameters())[n] for t in twins]) for n in names}
    got = vmap(lambda state: functional_call(model, state, (x,)))(stack)
    want = torch.stack([reference(twin, plain, x) for twin in twins])
    assert not torch.allclose(want[0], want[1])
    torch.testing.assert_close(got, want, **CLOSE)


def test_per_sample_gradients_through_vmap_and_grad():
    model, plain = adapted(nn.Sequential(nn.Linear(4, 3)), "0")
    x = torch.randn(5, 4).double()
    low = model[0].parametrizations.weight[0]
    key = "0.parametrizations.weight.0.lora_B"

    def loss(b, sample):
        return (functional_call(model, {key: b}, (sample,)) ** 2).sum()

    got = vmap(torch.func.grad(loss), in_dims=(None, 0))(low.lora_B.detach(), x)
    y = reference(model, plain, x).detach()
    want = 1.5 * torch.einsum("no,ni,ri->nor", 2 * y, x, low.lora_A.detach())
    torch.testing.assert_close(got, want, **CLOSE)


def test_export_equals_the_reference():
    model, plain = adapted(conv_net(), "0", "3")
    x = image()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), reference(model, plain, x), **CLOSE)


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_forward_and_backward_equal_the_reference(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    torch.compiler.reset()
    if backend == "aot_eager":
        x, (model, plain) = image(), adapted(conv_net(), "0", "3")
    else:  # one layer: each kernel costs a run of the C++ compiler
        x, (model, plain) = torch.randn(2, 4).double(), adapted(nn.Linear(4, 3), "weight")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(model, plain, x), **CLOSE)
    check_gradients(model, plain, lambda m: compiled(x) if m is model else m(x))


@pytest.mark.parametrize("entry", ("0", "1"))
def test_checkpointing_keeps_the_gradients(entry):
    model, plain = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), entry)
    x = torch.randn(5, 4).double()

    def call(m):
        return checkpoint(m, x, use_reentrant=False) if m is model else m(x)

    check_gradients(model, plain, call)


# torch's removal, pickling, copies


def test_torchs_removal_on_every_layer_equals_merge():
    model, plain = adapted(conv_net(), "0", "3")
    removed = copy.deepcopy(model)
    want = weights(plain, factors(model, plain))
    for module in list(removed.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    paramlora.merge(model)
    assert [type(m) for m in removed.modules()] == [type(m) for m in plain.modules()]
    assert set(removed.state_dict()) == set(plain.state_dict())
    for key, value in model.state_dict().items():
        for merged in (removed.state_dict()[key], value):
            torch.testing.assert_close(merged, want[key], rtol=1e-12, atol=1e-12)


def test_torchs_removal_of_one_tensor_leaves_the_other_of_the_same_layer():
    names = ("weight_ih_l0", "weight_hh_l0")
    model, plain = adapted(nn.LSTM(4, 3), *names)
    x = torch.randn(5, 2, 4).double()
    want = reference(model, plain, x)[0]
    parametrize.remove_parametrizations(model, names[0], leave_parametrized=True)
    assert parametrize.is_parametrized(model, names[1])
    torch.testing.assert_close(model(x)[0], want, **CLOSE)
    parametrize.remove_parametrizations(model, names[1], leave_parametrized=True)
    assert type(model) is nn.LSTM
    torch.testing.assert_close(model(x)[0], want, **CLOSE)


LOAD = """
import sys
sys.modules["paramlora"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
assert type(model[0]) is torch.nn.Conv2d, type(model[0])
assert type(model[3]) is torch.nn.Linear, type(model[3])
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize("hard", (1, 0))
def test_a_merged_model_is_saved_whole_and_loads_where_paramlora_is_not(hard, tmp_path):
    model, plain = adapted(conv_net(), "0", "3", hard=hard)
    x = image()
    want = reference(model, plain, x)
    paramlora.merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), want, **CLOSE)
    files = [str(tmp_path / name) for name in ("model.pt", "x.pt", "y.pt")]
    torch.save(model, files[0])
    torch.save(x, files[1])
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    torch.testing.assert_close(torch.load(files[2]), want.detach(), **CLOSE)


@pytest.mark.parametrize("hard", (1, 0))
def test_pickling_while_attached_is_refused(hard, tmp_path):
    model, _ = adapted(conv_net(), "0", hard=hard)
    with pytest.raises(paramlora.AdapterError, match="cannot be pickled"):
        pickle.dumps(model)
    with pytest.raises(paramlora.AdapterError, match="cannot be pickled"):
        torch.save(model, tmp_path / "model.pt")


@pytest.mark.parametrize("hard", (1, 0))
def test_training_a_deep_copy_leaves_the_original(hard):
    model, _ = adapted(conv_net(), "0", "3", hard=hard)
    x = image()
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    optimizer = torch.optim.AdamW(paramlora.trainable_parameters(twin), lr=0.1)
    for _ in range(2):
        (twin(x) ** 2).sum().backward()
        optimizer.step()
    assert not torch.allclose(twin(x), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), before)
    assert all(p.grad is None for p in model.parameters())
    paramlora.merge(twin)
    assert torch.equal(model(x), before)


# layers


class Reader(nn.Module):
    """Reads a weight without calling its layer."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.proj.weight) + F.linear(x, self.proj.weight.data.detach())


def test_a_reader_of_the_weight_sees_the_update():
    model, plain = adapted(Reader(), "proj")
    x = torch.randn(5, 4).double()
    weight = weights(plain, factors(model, plain))["proj.weight"]
    torch.testing.assert_close(model(x), 2 * F.linear(x, weight), **CLOSE)


def test_the_model_itself_is_a_target():
    model, plain = adapted(nn.Linear(4, 3), "weight")
    x = torch.randn(5, 4).double()
    want = reference(model, plain, x)
    torch.testing.assert_close(model(x), want, **CLOSE)
    assert set(paramlora.adapter_state_dict(model)) == {"lora_A", "lora_B", "lora_scale"}
    paramlora.merge(model)
    assert type(model) is nn.Linear
    torch.testing.assert_close(model(x), want, **CLOSE)


ENCODER = ("linear1", "linear2", "out_proj", "self_attn.in_proj_weight")


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("grad", (True, False))
def test_transformer_layer(training, grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    model, plain = adapted(layer, *ENCODER)
    assert len(paramlora.summary(model).rows) == 4
    x = torch.randn(2, 3, 8).double()
    with torch.set_grad_enabled(grad):
        # in training mode the plain layer takes no fused path, and without dropout is the same
        got, want = model(x), reference(model, copy.deepcopy(plain).train(), x)
        assert (want - plain(x)).abs().max() > 0.01
    torch.testing.assert_close(got, want, **CLOSE)
    if grad:
        check_gradients(model, plain.train(), lambda m: m(x))
    paramlora.merge(model)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), want, **CLOSE)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("need_weights", (True, False))
def test_attention(training, batch_first, need_weights):
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).train(training)
    model, plain = adapted(layer, "in_proj_weight", "out_proj")
    x = torch.randn(2, 3, 8).double()

    def call(m):
        return m(x, x, x, need_weights=need_weights)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, want = call(model), reference(model, plain, x, x, x, need_weights=need_weights)
        torch.testing.assert_close(got[0], want[0], **CLOSE)
        assert (got[1] is None) is (want[1] is None) is not need_weights
        if need_weights:
            torch.testing.assert_close(got[1], want[1], **CLOSE)
    check_gradients(model, plain, lambda m: call(m)[0])


@pytest.mark.parametrize("cls", (nn.LSTMCell, nn.GRUCell, nn.RNNCell))
def test_cells(cls):
    model, plain = adapted(cls(4, 3), "weight_ih", "weight_hh")
    x = torch.randn(5, 4).double()

    def two_steps(m):
        first = m(x)
        second = m(x, first)
        return second[0] if isinstance(second, tuple) else second

    found = Functional(plain, weights(plain, factors(model, plain)))
    torch.testing.assert_close(two_steps(model), two_steps(found), **CLOSE)
    check_gradients(model, plain, two_steps)


def test_embedding_with_padding_gives_the_padding_row_no_gradient():
    model, plain = adapted(nn.Sequential(nn.Embedding(9, 4, padding_idx=0)), "0")
    rows = torch.tensor([[0, 1], [5, 0]])
    torch.testing.assert_close(model(rows), reference(model, plain, rows), **CLOSE)
    check_gradients(model, plain, lambda m: m(rows))
    assert torch.equal(model[0].parametrizations.weight[0].lora_A.grad[:, 0], torch.zeros(2))


def test_embedding_with_max_norm_bounds_the_rows_and_keeps_the_base():
    model, plain = adapted(nn.Sequential(nn.Embedding(9, 4, max_norm=0.5)), "0")
    rows = torch.arange(9)
    base = plain[0].weight.detach().clone()
    whole = weights(plain, factors(model, plain))["0.weight"]
    want = whole * (0.5 / (whole.norm(dim=1, keepdim=True) + 1e-7)).clamp(max=1)
    torch.testing.assert_close(model(rows), want, **CLOSE)
    model(rows).sum().backward()
    assert torch.equal(model[0].parametrizations.weight.original, base)
    paramlora.merge(model)
    torch.testing.assert_close(model(rows), want, **CLOSE)


# training, switching, types


def test_a_trainable_model_trains_its_base_too():
    plain = conv_net().double()
    model = copy.deepcopy(plain)
    paramlora.attach(model, {"trainable_model": 1, "3": {"r": 2}})
    fill(model)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert len(before) == 4 + 2
    x = image()
    dense_weights = weights(plain, factors(model, plain))
    dense_weights["3.weight"].retain_grad()
    (Functional(plain, dense_weights)(x) ** 2).sum().backward()
    (model(x) ** 2).sum().backward()
    original = model[3].parametrizations.weight.original
    torch.testing.assert_close(original.grad, dense_weights["3.weight"].grad, **CLOSE)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, **CLOSE)
    torch.optim.AdamW(paramlora.trainable_parameters(model), lr=0.1).step()
    assert not any(torch.equal(p, before[k]) for k, p in model.named_parameters())


@pytest.mark.parametrize("strengths", ({"a": 0.5, "b": -2.0}, {"b": 0.25}, {"a": 1, "b": 1}, {}))
def test_two_adapters_add_with_their_strengths(strengths):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    model = copy.deepcopy(plain)
    paramlora.attach(model, {"0": {"r": 2, "scale": 3}}, adapter="a")
    paramlora.attach(model, {"0": {"r": 1, "scale": 0.5}}, adapter="b")
    fill(model, "a")
    fill(model, "b")
    want = plain[0].weight.detach().clone()
    for name, strength in strengths.items():
        ((scale, b, a),) = factors(model, plain, name).values()
        want += (strength * scale * (b @ a)).detach().reshape(want.shape)
    paramlora.set_adapters(model, strengths)
    torch.testing.assert_close(model[0].weight, want, rtol=1e-12, atol=1e-12)
    paramlora.merge(model)
    torch.testing.assert_close(model[0].weight.detach(), want, rtol=1e-12, atol=1e-12)


def test_a_seed_decides_the_start():
    def start(seed):
        torch.manual_seed(seed)
        return paramlora.adapter_state_dict(paramlora.attach(conv_net(), {"3": {"r": 2}}))[
            "3.lora_A"
        ]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("dtype, steps", ((torch.bfloat16, 128), (torch.float16, 1024)))
def test_a_16_bit_base_is_rounded_once(dtype, steps):
    model = nn.Sequential(nn.Linear(32, 24, bias=False)).to(dtype)
    # all are fractions for which float32 is exact, so only the last rounding is left
    base = torch.randint(-steps, steps, (24, 32)).double() / steps
    model[0].weight.data.copy_(base)
    assert torch.equal(model[0].weight.double(), base)
    paramlora.attach(model, {"0": {"r": 4}})
    low = model[0].parametrizations.weight[0]
    assert {low.lora_A.dtype, low.lora_B.dtype, low.lora_scale.dtype} == {torch.float32}
    low.lora_A.data.copy_(torch.randint(-99, 99, low.lora_A.shape) / 64)
    low.lora_B.data.copy_(torch.randint(-99, 99, low.lora_B.shape) / 4096)
    delta = low.lora_B.detach().double() @ low.lora_A.detach().double()
    want = (base + delta).to(dtype)
    assert not torch.equal(want, base.to(dtype) + delta.to(dtype))
    assert torch.equal(model[0].weight, want)
    model(torch.randn(2, 32).to(dtype)).sum().backward()
    assert low.lora_A.grad.dtype == low.lora_B.grad.dtype == torch.float32
    paramlora.merge(model)
    assert model[0].weight.dtype == dtype and torch.equal(model[0].weight, want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_16_bit_merge_is_the_float32_sum_rounded(dtype):
    model = nn.Sequential(nn.Linear(32, 24, bias=False)).to(dtype)
    base = model[0].weight.detach().clone()
    paramlora.attach(model, {"0": {"r": 4, "scale": 0.5}})
    fill(model)
    low = model[0].parametrizations.weight[0]
    a, b = low.lora_A.detach(), low.lora_B.detach()
    whole = model[0].weight.detach().clone()
    paramlora.merge(model)
    assert torch.equal(model[0].weight, whole)
    assert torch.equal(whole, (base.float() + 0.5 * b @ a).to(dtype))
    exact = (base.double() + 0.5 * b.double() @ a.double()).to(dtype)
    assert (whole != exact).double().mean() < 0.01


def test_a_whole_round_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = adapted(conv_net(), "0", "3")
        model(image()).sum().backward()
        paramlora.merge(model)


def test_several_adapters_on_a_16_bit_weight_are_rounded_once():
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16()
    base = model[0].weight.detach().clone()
    for name in "abcd":
        paramlora.attach(model, {"0": {"r": 2, "scale": 0.1}}, name)
        fill(model, name)
    total = base.float()
    for low in model[0].parametrizations.weight:
        total = total + low.lora_scale * low.lora_B.detach() @ low.lora_A.detach()
    whole = model[0].weight.detach().clone()
    # the sum in another order of float32 operations may fall on the other side of a tie
    assert (whole != total.bfloat16()).double().mean() < 0.01
    paramlora.merge(model)
    assert (model[0].weight != whole).double().mean() < 0.01
