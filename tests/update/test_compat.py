"""Every private name of torch stands in `compat`, and its stand-in gives the right answer."""

import ast
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.evaluate import functional
from paramlora.update import attached as switch
from paramlora.update import compat

FOLDER = Path(paramlora.__file__).parent
SOURCES = [p for p in FOLDER.rglob("*.py") if p.name != "compat.py"]
CHOSEN = {  # what each name of `compat` is without that of torch
    "_are_functorch_transforms_active": {"transforms_active": "_refuses"},
    "_current_level": {"transformed": "_transformed_by_trial"},
    "temporarily_clear_interpreter_stack": {"outside_transforms": "nullcontext"},
    "is_functorch_wrapped_tensor": {"applied": "_applied_as_ever"},
    "_FunctionBase": {"applied": "_applied_as_ever"},
    "is_legacy_batchedtensor": {"is_batched": "_has_no_memory"},
    "_get_dispatch_mode": {"recorded": "_recorded_publicly"},
    "_TorchDispatchModeKey": {"recorded": "_recorded_publicly"},
    "_is_tracing": {"traced": "is_tracing"},
    "is_traceable_wrapper_subclass": {"is_wrapper": "_is_wrapper"},
    "_dynamo_marked_constant": {"constant_result": "assume_constant_result"},
    "_current_autograd_node": {
        "current_node": "_nothing_runs",
        "strength_changes": "_warn_of_strengths",
    },
    "_sequence_nr": {"current_node": "_nothing_runs", "strength_changes": "_warn_of_strengths"},
    "_current_graph_task_id": {"current_backward": "_task_of_node"},
    "_get_sequence_nr": {"next_number": "_number_of_next_node"},
    "_top_saved_tensors_default_hooks": {"keeps_saved": "_perhaps_kept"},
    "_cache_enabled": {"cached_by_torch": "_nothing_cached"},
    "_assert_async": {"asserted": "_asserted"},
    "_cuda_getDevice": {"cuda_device": "current_device"},
    "_cuda_getCurrentRawStream": {"cuda_stream": "_stream_of"},
    "_empty_strided_cuda": {"cuda_empty": "_empty"},
    "_foreach_copy_": {"copied": "_copied_each"},
    "_unsafe_view": {"reshaped": "_reshaped_copy"},
    "_ConvNd": {
        "ANY_CONVOLUTION": "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d"
    },
    "_ConvTransposeNd": {"ANY_TRANSPOSED": "ConvTranspose1d ConvTranspose2d ConvTranspose3d"},
    "_InstanceNorm": {
        "ANY_INSTANCE_NORM": "InstanceNorm1d InstanceNorm2d InstanceNorm3d "
        "LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d"
    },
    "_DropoutNd": {
        "ANY_DROPOUT": "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
    },
}
ALL = tuple(CHOSEN)


def name_of(found):
    """What a function is called, or each of several classes."""
    return " ".join(one.__name__ for one in found) if isinstance(found, tuple) else found.__name__


def without(*names):
    """`compat` as it is imported where torch has none of these names."""
    spec = importlib.util.spec_from_file_location("paramlora.update.compat", compat.__file__)
    module = importlib.util.module_from_spec(spec)

    def seen(owner, name, *default):
        return default[0] if name in names and default else getattr(owner, name, *default)

    class Hidden(type(Path())):
        def read_text(self, *args, **kwargs):
            text = super().read_text(*args, **kwargs)
            for name in names:
                text = text.replace(name, "")
            return text

    module.__dict__["getattr"] = seen
    spec.loader.exec_module(module)
    if "_dynamo_marked_constant" in names:  # its file is read, so once more, with that file changed
        source = Path(compat.__file__).read_text(encoding="utf-8")
        source = source.replace("from pathlib import Path", "")
        module.__dict__["Path"] = Hidden
        exec(compile(source, compat.__file__, "exec"), module.__dict__)
    return module


@pytest.fixture
def hide(monkeypatch):
    """Put a `compat` without some names in place of the one that the package imported."""

    def hidden(*names):
        other = without(*names)
        users = {name: m for name, m in sys.modules.items() if name.startswith("paramlora.")}
        for user in [m for m in users.values() if m is not compat]:
            for name, value in list(vars(user).items()):
                if callable(value) and value is vars(compat).get(name):
                    monkeypatch.setattr(user, name, vars(other)[name])
        return other

    return hidden


@pytest.mark.parametrize("name", ALL)
def test_each_name_has_a_stand_in(name):
    other = without(name)
    chosen = {key: name_of(vars(other)[key]) for key in CHOSEN[name]}
    assert chosen == CHOSEN[name]


@pytest.mark.parametrize("name", [n for n in ALL if "cuda" not in n])
def test_this_torch_has_each_name(name):
    """Else the stand-in is at work unnoticed: this is where a new release of torch shows."""
    for key, stand_in in CHOSEN[name].items():
        assert name_of(vars(compat)[key]) != stand_in


HIDDEN = [(), *[(name,) for name in ALL], ALL]


def adapted(layer):
    model = paramlora.attach(nn.Sequential(layer), {"0": {"r": 2}})
    update = model[0].parametrizations["weight"][0]
    torch.nn.init.normal_(update.lora_B, std=0.3)
    return model[0]


def dense(layer):
    """``W + scale·B·A``, computed here."""
    update = layer.parametrizations["weight"][0]
    product = update.lora_B.double() @ update.lora_A.double() * update.lora_scale.double()
    original = layer.parametrizations["weight"].original.double()
    return original + product.reshape(original.shape)


def layer_of(fan_in, out, dtype=torch.float32):
    torch.manual_seed(0)
    return adapted(nn.Linear(fan_in, out).to(dtype))


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize("fan_in, tokens", ((8, 5), (160, 100)))
def test_forward_and_gradient(hidden, fan_in, tokens, hide):
    hide(*hidden)
    layer, x = layer_of(fan_in, 120), torch.randn(tokens, fan_in, requires_grad=True)
    y = layer(x)
    right = F.linear(x.double(), dense(layer), layer.bias.double())
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(right.square().sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_transforms_and_forward_mode(hidden, hide):
    hide(*hidden)
    layer, x = layer_of(160, 120), torch.randn(100, 160)
    weight, bias = dense(layer).float().detach(), layer.bias.detach()

    def plain(x):
        return F.linear(x, weight, bias)

    for transform in (torch.func.vmap, torch.func.jacrev):
        found, right = transform(layer)(x[:2]), transform(plain)(x[:2])
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, plain(x) - bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_what_is_at_work_is_told(hidden):
    other, told = without(*hidden), []

    def ask(x):
        told.append((other.transforms_active(), other.transformed()))
        return x.sum()

    ask(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2, 2))
    torch.func.grad(ask)(torch.ones(2))
    with forward_ad.dual_level():
        ask(torch.ones(2))
    ask(torch.ones(2))
    quiet = (False, False)
    assert told == [quiet, (True, True), (True, True), (False, True), quiet]


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_an_input_left_over_from_a_transform(hidden):
    other, left = without(*hidden), []

    class Address(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert x.data_ptr()
            return 2 * x

    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.ones(3))
    assert torch.equal(other.applied(Address, left[0]), 2 * torch.ones(3))
    wrong = type("Wrong", (Address,), {"forward": lambda ctx, x: x + torch.ones(4)})
    with pytest.raises(RuntimeError, match="size of tensor"):
        other.applied(wrong, torch.ones(3))


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_many_gradients_at_once(hidden, hide):
    hide(*hidden)
    torch.manual_seed(0)
    layer, x = layer_of(160, 120, torch.float16), torch.randn(100, 160).half().requires_grad_()
    y, many = layer(x), torch.randn(3, 100, 120).half()
    (dx,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    weight = dense(layer).detach()
    torch.testing.assert_close(dx.double(), many.double() @ weight, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_what_follows_operations_is_told(hidden):
    other, told = without(*hidden), []

    def ask(x):
        told.append((other.recorded(), other.traced()))
        return x + 1

    ask(torch.ones(2))
    make_fx(ask)(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that tracing is old
        torch.jit.trace(ask, torch.ones(2), check_trace=False)
    assert told == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_a_wrapper_is_told(hidden):
    class Wrapper(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            return inner

    other = without(*hidden)
    assert other.is_wrapper(torch.ones(2).as_subclass(Wrapper))
    for plain in (torch.ones(2), nn.Parameter(torch.ones(2)), None, Wrapper):
        assert not other.is_wrapper(plain)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_a_constant_result_bears_the_mark_of_torch(hidden):
    def answer():
        return 1

    assert without(*hidden).constant_result(answer) is answer
    assert torch.compiler.assume_constant_result(lambda: 1).__dict__ == answer.__dict__


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_a_backward_finds_the_strength_of_its_forward(hidden, hide):
    """Or, where torch does not tell, whoever changes it is warned."""
    hide(*hidden)
    torch.manual_seed(0)
    layer, x = layer_of(8, 6), torch.randn(5, 8, requires_grad=True)
    gradient = torch.autograd.grad(layer(x).square().sum(), x)[0]
    y = checkpoint(layer, x, use_reentrant=False)
    if {"_current_autograd_node", "_sequence_nr"} & set(hidden):
        with pytest.warns(paramlora.ParamloraWarning, match="call backward before the strengths"):
            paramlora.set_adapters(nn.Sequential(layer), {"default": 3.0})
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paramlora.set_adapters(nn.Sequential(layer), {"default": 3.0})
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_numbers_of_nodes(hidden):
    other, seen = without(*hidden), []
    if not {"_sequence_nr", "_get_sequence_nr"} <= set(hidden):
        number = other.next_number()
        node = torch.ones((), requires_grad=True).exp().grad_fn
        assert number == node._sequence_nr()

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append((other.current_backward() != -1, other.current_node() is not None))
            return dy

    assert (other.current_backward(), other.current_node()) == (-1, None)
    Asks.apply(torch.ones((), requires_grad=True)).backward()
    untold = bool({"_current_autograd_node", "_sequence_nr"} & set(hidden))
    by_task = not untold or "_current_graph_task_id" not in hidden
    assert seen == [(by_task, not untold)]


def test_the_names_are_bound_and_not_called_through_python():
    """A layer asks several in every forward; each is torch's own function."""
    builtin = type(len)
    for name in ("transforms_active", "is_batched", "traced", "current_node", "current_backward",
                 "next_number"):  # fmt: skip
        assert isinstance(vars(compat)[name], builtin), name
    assert functional.is_batched is compat.is_batched
    assert switch.current_backward is compat.current_backward


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_an_output_may_be_changed_in_place(hidden):
    other, x = without(*hidden), torch.ones(6, requires_grad=True)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return other.reshaped(2 * x, (2, 3))

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy.flatten()

    y = Twice.apply(x)
    y *= 3
    assert torch.equal(y, torch.full((2, 3), 6.0))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((6,), 6.0))


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
@pytest.mark.parametrize(
    "name", ["ANY_CONVOLUTION", "ANY_TRANSPOSED", "ANY_INSTANCE_NORM", "ANY_DROPOUT"]
)
def test_layers_of_a_kind_are_told(name, hidden):
    public = [one for one in vars(nn).values() if isinstance(one, type)]

    def of(module):
        return {one for one in public if issubclass(one, vars(module)[name])}

    assert of(without(*hidden)) == of(compat)
    assert len(of(compat)) >= 3


# --- nobody else knows a private name ---


def roots(tree):
    """The names under which a file holds torch, or a part of it, and of what."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield alias.asname or "torch", alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def private(tree):
    """Paths of private names of torch that a file uses, beside those of modules and operators."""
    known = dict(roots(tree))
    paths = [path for path in known.values()]
    for node in ast.walk(tree):
        names, at = [], node
        while isinstance(at, ast.Attribute):
            names.insert(0, at.attr)
            at = at.value
        if names and isinstance(at, ast.Name) and at.id in known:
            paths.append(".".join([known[at.id], *names]))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super" and node.args:
            paths.append("torch._super") if "Function" in ast.unparse(node.args[0]) else None
    for path in paths:
        hidden = [p for p in path.split(".") if p.startswith("_") and not p.startswith("__")]
        if hidden:
            yield path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_no_other_file_uses_a_private_name(path):
    source = path.read_text(encoding="utf-8")
    assert list(private(ast.parse(source))) == []
    named = [name for name in ALL if f".{name}" in source or f'"{name}' in source]
    assert named == []


@pytest.mark.parametrize(
    "line",
    (
        "import torch\ntorch._C._cuda_getDevice()",
        "from torch._C import _functorch",
        "from torch.utils._python_dispatch import f",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "import torch\nsuper(torch.autograd.Function, f).apply(x)",
        "import torch._dynamo as d\nd.reset()",
    ),
)
def test_a_private_name_is_seen(line):
    assert list(private(ast.parse(line)))


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_what_is_false_is_told(hidden):
    other = without(*hidden)
    other.asserted(torch.tensor(True), "as it is")
    with pytest.raises(RuntimeError, match="^so it is not$"):
        other.asserted(torch.tensor(False), "so it is not")
