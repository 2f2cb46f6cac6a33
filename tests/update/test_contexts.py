"""Every operation gives in any context what it gives outside of it, to the last bit."""

import copy
import os
import tempfile
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora.model.attach import updates

CONFIG = {
    "0": {"r": 2, "scale": 1e5},
    "1": {"r": 2, "hard": 0, "trainable_scale": 1},
    "2": {"r": 1, "alpha": 3},
    "3": {"whole": 1},
    "4": {"r": 2, "init": "pissa"},
    "re:5.in_proj_weight": {"r": 2},
    "6": {"r": 2, "kind": "dora"},
    "7": {"r": 2, "kind": "loha", "scale": 1e5},
    "8": {"r": 2, "kind": "lokr"},
    "9": {"rows": [1, 3]},
}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Embedding(9, 8), nn.BatchNorm1d(8)]
    layers += [nn.Linear(8, 8), nn.MultiheadAttention(8, 2), nn.ConvTranspose1d(8, 8, 3)]
    layers += [nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)]
    return nn.Sequential(*layers).to(dtype).eval()


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_a_hook(act):
    """What `act` gives when a backward calls it."""
    x, found = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda grad: found.append(act()))
    (x * 2).sum().backward()
    return found[0]


def in_a_thread(act):
    found = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def in_a_child(act):
    """What `act` gives in a process that is forked from this one."""
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "found")
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.save(act(), place)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        return torch.load(place)


def under(context):
    def run(act):
        with context():
            return act()

    return run


CONTEXTS = {
    "autocast bf16": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast fp16": under(lambda: torch.autocast("cpu", torch.float16)),
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "meta device": under(lambda: torch.device("meta")),
    "default float16": under(lambda: default_dtype(torch.float16)),
    "default float64": under(lambda: default_dtype(torch.float64)),
    "deterministic": under(deterministic),
    "a thread": in_a_thread,
    "a backward hook": in_a_hook,
    **({"a child process": in_a_child} if hasattr(os, "fork") else {}),
    "as it is": under(nullcontext),
}
if torch.cuda.is_available():
    CONTEXTS["cuda device"] = under(lambda: torch.device("cuda"))


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, _, update in updates(model):
            for p in update.parameters():
                p.copy_(torch.randn(p.shape, dtype=torch.float32, device="cpu") * 0.01)
    return model


def attached(dtype=torch.float32):
    torch.manual_seed(2)
    return filled(paramlora.attach(net(dtype), CONFIG))


def bits(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def attach(folder):
    model = net()
    torch.manual_seed(2)
    return bits(paramlora.attach(model, CONFIG))


def merge(folder):
    return bits(paramlora.merge(attached()))


def merge_narrow(folder):
    return bits(paramlora.merge(attached(torch.bfloat16)))


def merge_nothing(folder):
    model = attached()
    with torch.no_grad():
        for _, _, update in updates(model):
            if hasattr(update, "lora_B"):
                update.lora_B.zero_()
    return bits(paramlora.merge(model))


def merge_by_torch(folder):
    layer = attached()[0]
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return bits(layer)


def detach(folder):
    return bits(paramlora.detach(attached()))


def switch(folder):
    model = attached()
    paramlora.set_adapters(model, {"default": 0.3})
    with paramlora.disable_adapters(model):
        off = model[0].weight.detach().clone()
    return {"on": model[0].weight.detach().clone(), "off": off}


def save_and_load(folder):
    paramlora.save_adapter(attached(), folder / "a.safetensors")
    return bits(paramlora.load_adapter(net(), folder / "a.safetensors"))


def tensors(folder):
    model = attached()
    state = {k: v.clone() for k, v in paramlora.adapter_state_dict(model).items()}
    other = paramlora.attach(net(), CONFIG)
    return bits(paramlora.load_adapter_state_dict(other, state))


def embed(folder):
    return paramlora.checkpoint.embed(bits(net()), paramlora.adapter_of(attached()))


def extract(folder):
    found = paramlora.checkpoint.extract(bits(attached()))
    out = {f"{path}.whole": tensor for path, tensor in found.whole.items()}
    for path, update in found.updates.items():
        out |= {f"{path}.A": update.lora_A, f"{path}.B": update.lora_B}
        out[f"{path}.scale"] = torch.tensor(update.scale, dtype=torch.float64, device="cpu")
    return out


def merge_states(folder):
    return dict(paramlora.checkpoint.merge(bits(net()), (paramlora.adapter_of(attached()), 0.5)))


def copied(folder):
    return bits(copy.deepcopy(attached()))


def loaded(folder):
    model = attached()
    model.load_state_dict({k: v + 1 for k, v in bits(net()).items()})
    return bits(model)


def values(folder):
    return bits(paramlora.attach_adapter(net(), paramlora.adapter_of(attached())))


def swap(folder):
    model = attached()
    paramlora.save_adapter(model, folder / "a.safetensors")
    return bits(paramlora.load_adapter(model, folder / "a.safetensors", into="default"))


def on_disk(folder, name, content):
    path = folder / name
    save_file({k: v.contiguous() for k, v in content.items()}, path)
    return path


def merge_files(folder):
    base = on_disk(folder, "base.safetensors", bits(net()))
    paramlora.files.merge(base, [paramlora.adapter_of(attached())], folder / "merged.safetensors")
    return load_file(folder / "merged.safetensors")


def embed_files(folder):
    base, inside = on_disk(folder, "base.safetensors", bits(net())), folder / "in.safetensors"
    paramlora.files.embed(base, paramlora.adapter_of(attached()), inside)
    paramlora.files.extract(inside, folder / "out.safetensors")
    return load_file(inside) | {
        f"{k} out": v for k, v in load_file(folder / "out.safetensors").items()
    }


OPERATIONS = [attach, merge, merge_narrow, merge_nothing, merge_by_torch, detach, switch]
OPERATIONS += [save_and_load, tensors, embed, extract, merge_states, copied, loaded]
OPERATIONS += [values, swap, merge_files, embed_files]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_as_outside(operation, context, tmp_path):
    (tmp_path / "in").mkdir()
    want = operation(tmp_path)
    plain, ready = net(), attached(torch.bfloat16 if operation is merge_narrow else torch.float32)
    with pytest.MonkeyPatch.context() as patch:  # models are made outside of the context
        patch.setitem(globals(), "net", lambda dtype=None: plain)
        patch.setitem(globals(), "attached", lambda dtype=None: ready)
        got = CONTEXTS[context](lambda: operation(tmp_path / "in"))
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].device == value.device and got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def test_a_merge_inside_of_autocast_moves_no_weight_by_no_update():
    model = paramlora.attach(nn.Linear(64, 64), {"weight": {"r": 2}})
    base = model.parametrizations.weight.original.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        paramlora.merge(model)
    assert torch.equal(model.weight, base)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("layout", (nn.Linear, nn.Embedding))
def test_a_read_inside_of_autocast_is_the_sum_in_the_weights_type(layout, dtype):
    model = filled(paramlora.attach(layout(16, 16).to(dtype), {"weight": {"r": 2}}))
    want = model.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.weight, want)


INSIDE = {  # what is done to an attached model, a plain one and a state dict; what comes of it
    "attach": lambda model, plain, state, path: paramlora.attach(plain, CONFIG),
    "another": lambda model, plain, state, path: paramlora.attach(model, {"0": {"r": 1}}, "b"),
    "detach": lambda model, plain, state, path: paramlora.detach(model),
    "merge": lambda model, plain, state, path: paramlora.merge(model),
    "strengths": lambda model, plain, state, path: strengths(model),
    "disabled": lambda model, plain, state, path: disabled(model),
    "save": lambda model, plain, state, path: saved(model, path),
    "load": lambda model, plain, state, path: paramlora.load_adapter(plain, saved(model, path)),
    "load tensors": lambda model, plain, state, path: paramlora.load_adapter_state_dict(
        model, {k: v for k, v in paramlora.adapter_state_dict(model).items()}
    ),
    "values": lambda model, plain, state, path: paramlora.attach_adapter(
        plain, paramlora.adapter_of(model)
    ),
    "embed": lambda model, plain, state, path: paramlora.checkpoint.embed(
        state, paramlora.adapter_of(model)
    ),
    "merge states": lambda model, plain, state, path: paramlora.checkpoint.merge(
        state, (paramlora.adapter_of(model), 0.5)
    ),
}


def strengths(model):
    paramlora.set_adapters(model, {"default": 0.3})
    return model


def disabled(model):
    paramlora.disable_adapters(model).__enter__()
    return model


def saved(model, folder):
    paramlora.save_adapter(model, folder / "a.safetensors")
    return folder / "a.safetensors"


def in_grad(act):
    torch.func.grad(lambda x: act(x) or x.sum())(torch.ones(2))


def in_vmap(act):
    torch.func.vmap(lambda x: act(x) or x.sum())(torch.ones(2, 2))


@pytest.mark.parametrize("transform", (in_grad, in_vmap))
@pytest.mark.parametrize("name", INSIDE)
def test_inside_of_a_transform_as_outside(name, transform, tmp_path):
    """The model was made outside, and is used outside afterwards."""
    found, act = [], INSIDE[name]
    for inside in (False, True):
        model, plain = attached(), net()
        state = bits(net())

        def run(_=None, model=model, plain=plain, state=state):
            torch.manual_seed(5)
            found.append(act(model, plain, state, tmp_path))

        transform(run) if inside else run()
    want, got = (load_file(one) if name == "save" else one for one in found)
    if isinstance(want, nn.Module):
        weights = [one[0].weight.detach() for one in (want, got)]
        assert torch.equal(*weights)
        got[0](torch.ones(1, 8)).sum().backward() if name != "merge" and name != "detach" else None
        want, got = bits(want), bits(got)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
