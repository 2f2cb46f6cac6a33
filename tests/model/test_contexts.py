"""A sweep of where a layer is called, and where its update is attached: each context gives, to the
last bit, what the same call gives outside of it; under autocast, and in other types, what the dense
definition in float64 gives, to the roundings of the type."""

import copy
import multiprocessing
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import paramlora
from paramlora.model.attach import updates
from tests.model.test_types import made_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(6, 6, 5)

    def forward(self, x):
        return self.inner(x, x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x):
        return torch.einsum("eoi,bi->bo", self.inner, x)


def conv1d_of_transformers():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 6)


def channels_last():
    return nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)


HARD, SOFT, WHOLE = {"r": 2}, {"r": 2, "hard": 0}, {"whole": True}
IMAGE, WORDS = (2, 4, 6, 5), "words"
CASES = {  # the module, what is adapted in it, its entry, its input
    "linear": (lambda: nn.Linear(6, 7), "0", HARD, (3, 6)),
    "one row": (lambda: nn.Linear(6, 7), "0", HARD, (6,)),
    "a linear layer that is not tiny": (lambda: nn.Linear(160, 120), "0", HARD, (70, 160)),
    "a trained scale": (lambda: nn.Linear(6, 7), "0", HARD | {"trainable_scale": 1}, (3, 6)),
    "a whole one": (lambda: nn.Linear(6, 7), "0", WHOLE, (3, 6)),
    "soft": (lambda: nn.Linear(6, 7), "0", SOFT, (3, 6)),
    "Conv1D": (conv1d_of_transformers, "0", HARD, (3, 6)),
    "soft Conv1D": (conv1d_of_transformers, "0", SOFT, (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), "0", HARD, IMAGE),
    "convolution 1×1": (lambda: nn.Conv2d(4, 6, 1), "0", HARD, IMAGE),
    "a larger convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), "0", HARD, (2, 16, 20, 20)),
    "channels last": (channels_last, "0", HARD, IMAGE),
    "in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), "0", HARD, IMAGE),
    "dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, stride=2), "0", HARD, (2, 4, 11)),
    "circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        "0",
        HARD,
        IMAGE,
    ),
    "three dimensions": (lambda: nn.Conv3d(2, 4, 2), "0", HARD, (2, 2, 3, 4, 3)),
    "soft convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), "0", SOFT, IMAGE),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), "0", HARD, IMAGE),
    "soft transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "0", SOFT, IMAGE),
    "embedding": (lambda: nn.Embedding(9, 6), "0", HARD, WORDS),
    "embedding with padding": (lambda: nn.Embedding(9, 6, padding_idx=1), "0", HARD, WORDS),
    "a bag": (lambda: nn.EmbeddingBag(9, 6), "0", HARD, WORDS),
    "attention": (Attention, "0.inner.in_proj_weight", HARD, (2, 3, 8)),
    "recurrent": (Recurrent, "0.inner.weight_ih_l0", HARD, (2, 3, 6)),
    "bilinear": (Twice, "0.inner", {"r": 1}, (3, 6)),
    "experts": (Experts, "0.inner", HARD, (3, 6)),
    "dora": (lambda: nn.Linear(6, 7), "0", HARD | {"kind": "dora"}, (3, 6)),
    "a dora convolution": (lambda: nn.Conv2d(4, 6, 3), "0", HARD | {"kind": "dora"}, IMAGE),
    "loha": (lambda: nn.Linear(6, 7), "0", HARD | {"kind": "loha"}, (3, 6)),
    "lokr": (lambda: nn.Linear(6, 8), "0", {"r": 1, "kind": "lokr"}, (3, 6)),
    "rows": (lambda: nn.Embedding(9, 6), "0", {"rows": [1, 3]}, WORDS),
}
ALONE = ("a whole one", "rows")  # whose adapters stand in each other's way


def model_of(case, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(CASES[case][0]()).to(device, dtype)


def adapt(model, case, adapters=("default",)):
    _, name, entry, _ = CASES[case]
    torch.manual_seed(1)
    for adapter in adapters:
        paramlora.attach(model, {name: entry}, adapter=adapter)
    if len(adapters) > 1:
        paramlora.set_adapters(model, dict(zip(adapters, (1.0, -0.5))))
    generator = torch.Generator().manual_seed(2)
    for _, _, update in updates(model):
        for parameter in update.parameters():
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            values.normal_(std=0.4, generator=generator)
            parameter.data.copy_(values)
    return model


def made(case, dtype=torch.float32, adapters=("default",)):
    return adapt(model_of(case, dtype), case, adapters)


def input_of(case, dtype=torch.float32):
    torch.manual_seed(3)
    shape = CASES[case][3]
    return torch.randint(9, (2, 4)) if shape == WORDS else torch.randn(shape).to(dtype)


def outcome(model, x):
    """The output and every gradient."""
    x = x.clone().requires_grad_(x.is_floating_point())
    leaves = [x] * x.requires_grad + paramlora.trainable_parameters(model)
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device="cpu").view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def same(got, want):
    assert len(got) == len(want)
    for mine, true in zip(got, want):
        assert mine.dtype == true.dtype and torch.equal(mine, true)


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


class Default:
    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)


CONTEXTS = {
    "the meta device": lambda: torch.device("meta"),
    "float16 by default": lambda: Default(torch.float16),
    "float64 by default": lambda: Default(torch.float64),
    "deterministic": Deterministic,
    "hooks on saved tensors": hooks,
    "detecting anomalies": torch.autograd.detect_anomaly,
    "without the kernels": lambda: paramlora.kernels(False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_a_call_gives_what_it_gives_outside(context, dtype):
    for case in CASES:
        for adapters in (("default",), ("one", "two")) if case not in ALONE else ((None,),):
            adapters = ("default",) if adapters == (None,) else adapters
            model, x = made(case, dtype, adapters), input_of(case, dtype)
            want = outcome(model, x)
            with CONTEXTS[context]():
                got = outcome(model, x)
            same(got, want)
            plain = model_of(case, dtype)
            with CONTEXTS[context]():
                adapt(plain, case, adapters)
            same(outcome(plain, x), want)


def test_counting_operations():
    for case in CASES:
        model, x = made(case), input_of(case)
        want = outcome(model, x)[1:]
        with FlopCounterMode(display=False) as counter:
            leaves, y = paramlora.trainable_parameters(model), model(x)
            dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
            y.backward(dy.to(y.dtype))
        same([leaf.grad for leaf in leaves], want[x.is_floating_point() :])
        assert counter.get_total_flops() > 0 or CASES[case][3] is WORDS or case == "a whole one"


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_where_nothing_is_recorded(context):
    for case in CASES:
        model, x = made(case), input_of(case)
        want = outcome(model, x)
        with context():
            got = model(x)
        if case in ("attention", "recurrent"):  # which torch then computes by another kernel
            torch.testing.assert_close(got, want[0])
        else:
            assert torch.equal(got, want[0]), case
        plain = model_of(case)
        with context():
            paramlora.attach(plain, {CASES[case][1]: CASES[case][2]})
        for (_, _, one), (_, _, two) in zip(updates(plain), updates(model)):
            for mine, true in zip(one.parameters(), two.parameters()):
                assert mine.requires_grad and not mine.is_inference()
                mine.data.copy_(true)
        same(outcome(plain, x), want)


def test_a_copy_made_in_inference_mode(tmp_path):
    """Its tensors can be written there alone, by whom it is used."""
    path = tmp_path / "a.safetensors"
    for case in CASES:
        model = nn.Sequential(*model_of(case), nn.BatchNorm1d(3, affine=False)).eval()
        adapt(model, case)
        paramlora.save_adapter(model, path)
        state = {k: t.clone() for k, t in paramlora.adapter_state_dict(model).items()}
        base = paramlora.detach(copy.deepcopy(model)).state_dict()
        merged = paramlora.merge(copy.deepcopy(model)).state_dict()

        def copied(model=model):
            with torch.inference_mode():
                return copy.deepcopy(model)

        for context in (torch.enable_grad, torch.inference_mode):
            one, two, three = copied(), copied(), copied()
            with context():
                assert str(paramlora.summary(one)) == str(paramlora.summary(model)), case
                for adapter in (paramlora.load_adapter_state_dict, _load_into):
                    with torch.inference_mode():
                        for _, _, update in updates(one):
                            for parameter in update.parameters():
                                parameter.zero_()
                    adapter(one, state if adapter is not _load_into else path)
                    got = paramlora.adapter_state_dict(one)
                    assert all(torch.equal(got[k], t) for k, t in state.items()), case
                same(list(paramlora.merge(one).state_dict().values()), list(merged.values()))
                paramlora.merge(two, report=True, seed=0)
                with torch.inference_mode():
                    three[-1].running_mean.fill_(1)
                same(list(paramlora.detach(three).state_dict().values()), list(base.values()))
                assert all(p.requires_grad for p in three.parameters()), case


def _load_into(model, path):
    paramlora.load_adapter(model, path, into="default")


def test_another_thread_and_a_backward_hook():
    for case in CASES:
        model, x, found = made(case), input_of(case), []
        want = outcome(model, x)
        thread = threading.Thread(target=lambda m=model, x=x, f=found: f.append(outcome(m, x)))
        thread.start(), thread.join()

        def inside(_, model=model, x=x, found=found):
            with torch.enable_grad():
                found.append(outcome(model, x))

        leaf = torch.zeros((), requires_grad=True)
        leaf.register_hook(inside)
        (leaf * 2).backward()
        same(found[0], want)
        same(found[1], want)


def _in_a_child(model, cases, queue):
    queue.put([[t.numpy() for t in outcome(model[i], input_of(c))] for i, c in enumerate(cases)])


def test_a_forked_child_with_shared_memory():
    cases = list(CASES)
    models = nn.ModuleList(made(case) for case in cases).share_memory()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(models, cases, queue))
    child.start()
    found = queue.get(timeout=600)
    child.join()
    for model, case, got in zip(models, cases, found):
        same([torch.from_numpy(t) for t in got], outcome(model, input_of(case)))


def _in_a_fresh_child(cases, queue):
    for case in cases:
        queue.put([t.numpy() for t in outcome(made(case), input_of(case))])


def test_a_spawned_child_that_attaches():
    cases = ["linear", "convolution", "embedding"]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_a_fresh_child, args=(cases, queue))
    child.start()
    for case in cases:
        got = [torch.from_numpy(t) for t in queue.get(timeout=600)]
        same(got, outcome(made(case), input_of(case)))
    child.join()


def test_the_meta_device_infers_shapes():
    for case in CASES:
        model, x = made(case), input_of(case)
        want = outcome(model, x)
        if case in ALONE:  # whose values `to` cannot invent
            continue
        lazy = copy.deepcopy(model).to("meta")
        got = outcome_on(lazy, x.to("meta"))
        assert [t.shape for t in got] == [t.shape for t in want], case
        assert all(t.is_meta and t.dtype == true.dtype for t, true in zip(got, want))
        fresh = model_of(case, device="meta")
        paramlora.attach(fresh, {CASES[case][1]: CASES[case][2]})
        got = outcome_on(fresh, x.to("meta"))
        assert [t.shape for t in got] == [t.shape for t in want], case


def outcome_on(model, x):
    x = x.requires_grad_(x.is_floating_point())
    leaves = [x] * x.requires_grad + paramlora.trainable_parameters(model)
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def test_the_meta_device_under_autocast_of_others():
    model, x = model_of("linear", device="meta"), torch.randn(3, 6, device="meta")
    paramlora.attach(model, {"0": HARD})
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).is_meta


def test_fake_tensors():
    for case in CASES:
        if case == "channels last":  # torch cannot lay fake ones out
            continue
        with FakeTensorMode():
            model = adapt_fake(case)
            x = torch.randint(9, (2, 4)) if CASES[case][3] == WORDS else torch.randn(CASES[case][3])
            got = [t.shape for t in outcome_on(model, x)]
        assert got == [t.shape for t in outcome(made(case), input_of(case))], case


def adapt_fake(case):
    model = nn.Sequential(CASES[case][0]())
    return paramlora.attach(model, {CASES[case][1]: CASES[case][2]})


def replica_of(module):
    """What `torch.nn.parallel.replicate` makes for a device: tensors as attributes alone."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is None:
            replica._modules[name] = None
        else:
            setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.view_as(parameter))
    for name, buffer in module._buffers.items():
        if buffer is None:
            replica._buffers[name] = None
        else:
            setattr(replica, name, buffer.clone())
    return replica


def test_a_replica_of_data_parallel():
    for case in CASES:
        for adapters in (("default",), ("one", "two")) if case not in ALONE else (("one",),):
            model, x = made(case, adapters=adapters), input_of(case)
            x = x.requires_grad_(x.is_floating_point())
            leaves = paramlora.trainable_parameters(model)
            want = model(x)
            y = replica_of(model)(x)
            # evaluated by the definition, in another order
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
            got, true = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, want))
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_data_parallel_on_two_devices(dtype):
    for case in CASES:
        if case in ("one row", "recurrent", "experts"):  # no batch first, flat weights, no split
            continue
        model, x = made(case).to("cuda", dtype), input_of(case).cuda()
        x = torch.cat([x, x]).to(dtype if x.is_floating_point() else x.dtype)
        want, leaves = model(x), paramlora.trainable_parameters(model)
        y = nn.DataParallel(model)(x)
        eps = 8 * torch.finfo(dtype).eps
        assert (y - want).norm() <= eps * want.norm(), case
        got, true = (torch.autograd.grad(t.float().square().sum(), leaves) for t in (y, want))
        assert all((g - t).norm() <= 8 * eps * t.norm() for g, t in zip(got, true)), case


def test_a_parametrization_of_a_factor_itself():
    from torch.nn.utils import parametrizations

    for case in ("linear", "convolution", "embedding", "recurrent", "soft", "soft convolution"):
        model, x = made(case, torch.float64), input_of(case, torch.float64)
        ((_, _, update),) = updates(model)
        parametrizations.orthogonal(update, "lora_A")
        with torch.no_grad():
            eye = update.lora_A @ update.lora_A.T
        torch.testing.assert_close(eye, torch.eye(2).double())
        check(model, case, x, 1e-12, torch.float64)
        y = model(x)
        update.parametrizations.lora_A.original.grad = None
        y.sum().backward()
        assert update.parametrizations.lora_A.original.grad.abs().max() > 0
        groups = {g["name"]: g["params"] for g in paramlora.parameter_groups(model, lr=1e-3)}
        assert groups["lora_A"] == [update.parametrizations.lora_A.original]
        torch.optim.SGD([p for params in groups.values() for p in params])
        state = paramlora.adapter_state_dict(model)
        with pytest.raises(paramlora.AdapterError, match="lora_A is computed by .* Take it off"):
            paramlora.load_adapter_state_dict(model, state)


@pytest.fixture
def alone():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("flat", (True, False))
@pytest.mark.filterwarnings("ignore")  # of FSDP on a CPU
def test_fully_sharded(flat, alone):
    """FSDP1 with one flat parameter, of which the layers hold views."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    # another layer of the same class whose bias is parametrized, which has the views as attributes
    parametrize.register_parametrization(made("linear")[0], "bias", nn.Identity())
    cases = ("linear", "soft", "convolution", "embedding", "in groups", "bilinear", "Conv1D")
    for case in cases:
        model, x = made(case), input_of(case)
        model.requires_grad_(True)
        want = model(x).detach()
        sharded = FullyShardedDataParallel(
            copy.deepcopy(model), use_orig_params=not flat, device_id=torch.device("cpu")
        )
        y = sharded(x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        y.sum().backward()
        assert all(p.grad is not None for p in sharded.parameters() if p.requires_grad)


def test_sharded_by_tensor(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for case in CASES:
        # flat weights; neither scalars nor channels last can be sharded
        if case in ("recurrent", "a trained scale", "channels last"):
            continue
        model, x = made(case), input_of(case)
        want = model(x).detach()
        y = fully_shard(copy.deepcopy(model), mesh=mesh)(x)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def dense_of(model, case, x):
    """The output in float64 of the sum written out, and the gradients of x and of all updates."""
    plain = model_of(case).double().requires_grad_(False)
    values, leaves = dict(plain.named_parameters()), []
    source = {k.replace("parametrizations.", ""): v for k, v in model.state_dict().items()}
    for key in values:
        stored = source.get(key, source.get(f"{key}.original"))
        values[key] = stored.double()
    for path, _, update in updates(model):
        key = f"{path}.weight" if f"{path}.weight" in values else path
        found = {k: v.detach().double() for k, v in update.plain().items()}
        leaves += [found[k].requires_grad_() for k, _ in update.named_parameters() if k in found]
        whole = made_of(found, values[key], found.get("lora_scale", 1.0), update.layout)
        values[key] = values[key] + update.strength * (whole - values[key])
    wide = x.detach().double().requires_grad_() if x.is_floating_point() else x
    y = functional_call(plain, values, (wide,))
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    inputs = [wide] * wide.is_floating_point() + leaves
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)] if leaves else [y.detach()]


def check(model, case, x, bound, dtype):
    """Within `bound` of each tensor's size."""
    want = dense_of(model, case, x)
    got = outcome(model, x) if len(want) > 1 else [model(x).detach()]
    assert got[0].dtype == dtype, case
    for mine, true in zip(got, want, strict=False):
        assert (mine.double() - true).norm() <= bound * (true.norm() + 1e-30), case
    return got


ADAPTERS = (("default",), ("one", "two"))


@pytest.mark.parametrize("adapters", ADAPTERS, ids=len)
@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_every_type_is_right_to_its_roundings(dtype, adapters):
    for case in CASES:
        if case in ALONE and len(adapters) > 1:
            continue
        model, x = made(case, dtype, adapters), input_of(case, dtype)
        # a recurrent layer rounds at every step, attention at every product
        several = 8 if case in ("recurrent", "attention", "bilinear", "experts") else 2
        check(model, case, x, 4 * several * torch.finfo(dtype).eps, dtype)


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_entered_before_and_after_attaching(narrow, when):
    for case in CASES:
        if case == "recurrent" and narrow == torch.float16:  # which a CPU does not compute
            continue
        if case in ("bilinear", "experts", "recurrent", "attention"):
            several = 16
        else:
            several = 4
        plain, x = model_of(case), input_of(case)
        with torch.autocast("cpu", narrow):
            try:
                dtype = plain(x).dtype
            except RuntimeError:
                assert case == "recurrent"  # of which some processors have none in 16 bits
                continue
        model = plain
        if when == "after":
            adapt(model, case)
        with torch.autocast("cpu", narrow):
            if when == "before":
                adapt(model, case)
            check(model, case, x, 4 * several * torch.finfo(narrow).eps, dtype)
        same(outcome(model, x), outcome(made(case), x))


@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16), ids=str)
def test_a_weight_is_what_it_is_under_autocast_too(narrow):
    for case in CASES:
        if CASES[case][2] is SOFT:
            continue
        model, name = made(case), CASES[case][1]
        owner, _, tensor = name.rpartition(".")
        whole = hasattr(model.get_submodule(name), "weight") if name == "0" else False
        owner, tensor = (name, "weight") if whole or case == "bilinear" else (owner, tensor)
        want = getattr(model.get_submodule(owner), tensor)
        with torch.autocast("cpu", narrow):
            got = getattr(model.get_submodule(owner), tensor)
        assert got.dtype == want.dtype and torch.equal(got, want), case


def test_under_the_transforms_of_functions():
    for case in CASES:
        model, x = made(case, torch.float64), input_of(case, torch.float64)
        values = {k: v.detach() for k, v in model.named_parameters()}
        trained = {k: v for k, v in model.named_parameters() if v.requires_grad}

        def loss(some, x, model=model, values=values):
            return functional_call(model, values | some, (x,)).square().sum()

        some = {k: v.detach() for k, v in trained.items()}
        want = torch.autograd.grad(model(x).square().sum(), list(trained.values()))
        got = grad(loss)(some, x)
        for mine, true in zip(got.values(), want):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
        # a padding row torch itself derives forwards alone, the others backwards alone
        if case in ("embedding with padding", "a bag", "attention"):
            continue
        tangents = {k: torch.ones_like(v) for k, v in some.items()}
        _, tangent = jvp(lambda s, x=x, loss=loss: loss(s, x), (some,), (tangents,))
        torch.testing.assert_close(tangent, sum(g.sum() for g in want), rtol=1e-9, atol=1e-9)
        if case == "recurrent":  # which vmap does not know
            continue
        many = torch.stack([x, x.flip(0)])
        got = vmap(lambda one, model=model: functional_call(model, {}, (one,)))(many)
        want = torch.stack([model(one) for one in many])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


EDGES = {  # of A, B and the scale
    "no scale": (1.0, 1.0, 0.0),
    "a large scale": (1e-3, 1e-3, 1e5),
    "a small scale": (1.0, 1.0, 1e-8),
    "subnormal": (1e-39, 1e38, 1.0),
    "nearly subnormal": (1e-36, 1e36, 1.0),
    "small and large": (1e-30, 1e30, 1.0),
}


FACTORS = ("lora_A", "hada_w1_a", "lokr_w1"), ("lora_B", "hada_w1_b", "lokr_w2", "lokr_w2_a")


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_numbers_at_the_edge(edge, dtype):
    for case in CASES:
        # types of 16 bits have no digits left down there
        if case in ALONE or (edge == "subnormal" and dtype.itemsize == 2):
            continue
        model, x = made(case, dtype), input_of(case, dtype)
        a, b, scale = EDGES[edge]
        ((_, _, update),) = updates(model)
        first, second = (next(p for n, p in update.named_parameters() if n in of) for of in FACTORS)
        with torch.no_grad():
            first.mul_(a), second.mul_(b), update.lora_scale.fill_(scale)
        want, got = dense_of(model, case, x), outcome(model, x)
        # a subnormal factor has digits of its own alone, and the other one's gradient is beyond it
        loss, seen = (1e-2, 1) if edge == "subnormal" else (0, len(want))
        bound = 32 * torch.finfo(dtype).eps + loss
        for mine, true in zip(got[:seen], want):
            assert mine.isfinite().all(), case
            assert (mine.double() - true).norm() <= bound * true.norm() + 1e-38, case


def test_no_rows():
    """Of whatever takes a batch of none without its update; torch's kernels lack some of them."""
    # one row is no batch, and torch's recurrent layers take no empty one
    every = set(CASES) - {"one row", "recurrent"}
    for case in every:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            model, x = made(case, dtype), input_of(case, dtype)[:0]
            y, *grads = outcome(model, x)
            assert y.shape == model_of(case, dtype)(x).shape and y.dtype == dtype, case
            assert all(g.abs().sum() == 0 for g in grads), case


def test_no_rows_of_a_lokr_whose_sum_is_not_formed():
    model = nn.Sequential(nn.Linear(272, 256))
    paramlora.attach(model, {"0": {"r": 2, "kind": "lokr"}})
    y, *grads = outcome(model, torch.randn(0, 272))
    assert y.shape == (0, 256) and all(g.abs().sum() == 0 for g in grads)


def test_rank_at_its_limit():
    for case in CASES:
        _, name, entry, _ = CASES[case]
        if entry is not HARD and entry is not SOFT:
            continue
        r = 2
        while r < 64:  # the largest that is not refused
            try:
                paramlora.targets(model_of(case), {name: entry | {"r": r + 1}})
            except paramlora.TargetError:
                break
            r += 1
        model = paramlora.attach(model_of(case, torch.float64), {name: entry | {"r": r}})
        for _, _, update in updates(model):
            nn.init.normal_(update.lora_B)
        x = input_of(case, torch.float64)
        check(model, case, x, 1e-12, torch.float64)


@pytest.mark.parametrize("case", ("linear", "convolution", "soft", "embedding"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_compiled(case, dtype):
    torch._dynamo.reset()  # other tests compile nn.Sequential too, and torch counts how often
    model, x = made(case, dtype), input_of(case, dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = outcome(model, x), outcome_compiled(model, compiled, x)
    for mine, true in zip(got, want):
        assert (mine.double() - true.double()).norm() <= 4 * torch.finfo(dtype).eps * true.norm()


def outcome_compiled(model, compiled, x):
    x = x.clone().requires_grad_(x.is_floating_point())
    leaves = [x] * x.requires_grad + paramlora.trainable_parameters(model)
    y = compiled(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("flat", (True, False))
@pytest.mark.filterwarnings("ignore")  # of FSDP on a CPU
def test_under_flat_parameters_what_needs_whole_tensors_is_refused(flat, alone, tmp_path):
    """Or is right, where FSDP1 gathers them; forward and strengths need none."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Sharded

    model, path = made("linear").requires_grad_(True), tmp_path / "a.safetensors"
    want = {k: t.clone() for k, t in paramlora.adapter_state_dict(model).items()}
    kept = tmp_path / "kept.safetensors"
    paramlora.save_adapter(model, kept)
    device = torch.device("cpu")
    sharded = Sharded(copy.deepcopy(model), use_orig_params=not flat, device_id=device)
    for act in (
        paramlora.merge,
        paramlora.detach,
        paramlora.adapter_state_dict,
        lambda m: paramlora.load_adapter_state_dict(m, want),
        lambda m: paramlora.save_adapter(m, path),
        paramlora.adapter_of,
        paramlora.summary,
        lambda m: paramlora.load_adapter(m, kept, into="default"),
    ):
        with pytest.raises(paramlora.AdapterError, match="flat parts.*summon_full_params"):
            act(sharded)
    assert not path.exists()
    assert not paramlora.summary(Sharded(model_of("linear"), device_id=device)).rows
    if flat:
        with pytest.raises(paramlora.AdapterError, match="one rate. Wrap with use_orig_params"):
            paramlora.parameter_groups(sharded, lr=1e-3, lr_ratio=16)
        with pytest.raises(paramlora.AdapterError, match="one rate. Wrap with use_orig_params"):
            paramlora.trainable_parameters(sharded, "default")
    else:
        names = [group["name"] for group in paramlora.parameter_groups(sharded, lr=1e-3)]
        assert names == ["lora_A", "lora_B", "model"]
    with Sharded.summon_full_params(sharded):
        paramlora.save_adapter(sharded, path)
        with pytest.raises(paramlora.AdapterError, match="^merge under"):
            paramlora.merge(sharded)
        assert paramlora.summary(sharded).rows == paramlora.summary(model).rows
        paramlora.load_adapter(sharded, kept, into="default")
    x = input_of("linear")
    torch.testing.assert_close(sharded(x), model(x), rtol=1e-5, atol=1e-5)
    read = paramlora.adapter_state_dict(paramlora.load_adapter(model_of("linear"), path))
    assert read.keys() == want.keys() and all(torch.equal(read[k], want[k]) for k in want)
