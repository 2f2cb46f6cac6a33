"""An adapter's tensors leave one model and enter another, or take the place of its own."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora import FileError, adapter_state_dict, attach, load_adapter_state_dict
from paramlora.files.adapters import read_adapter
from paramlora.files.safetensors import SafeFile
from paramlora.model.attach import updates
from paramlora.model.values import swap_adapter


def attached():
    return attach(nn.Sequential(nn.Linear(4, 3)), {"0": {"r": 2, "scale": 0.3}})


def test_the_tensors_carry_the_whole_update():
    source, target = attached(), attached()
    nn.init.normal_(source[0].parametrizations.weight[0].lora_B)
    state = adapter_state_dict(source)
    assert sorted(state) == ["0.lora_A", "0.lora_B", "0.lora_scale"]
    load_adapter_state_dict(target, state)
    base = target[0].parametrizations.weight.original
    want = base.double() + 0.3 * state["0.lora_B"].double() @ state["0.lora_A"].double()
    torch.testing.assert_close(target[0].weight.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"0.lora_A": None}, "missing: 0.lora_A; unexpected: none"),
        ({"1.lora_A": torch.ones(1)}, "missing: none; unexpected: 1.lora_A"),
        ({"0.lora_B": torch.ones(3, 1)}, r"0.lora_B: shape \[3, 1\] does not fit \[3, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = attached()
    before = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    state = {k: v + 1 for k, v in before.items()} | change
    with pytest.raises(FileError, match=message):
        load_adapter_state_dict(model, {k: v for k, v in state.items() if v is not None})
    assert all(torch.equal(v, before[k]) for k, v in adapter_state_dict(model).items())


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((2, 4), float("nan")), "0.lora_A: not finite"),
        (torch.full((2, 4), 1e300, dtype=torch.float64), "0.lora_A: not finite in torch.float32"),
        (torch.ones(2, 4, dtype=torch.int64), "0.lora_A: of type torch.int64"),
        (torch.ones(2, 4, dtype=torch.complex64), "0.lora_A: of type torch.complex64"),
        ([[1.0] * 4] * 2, "0.lora_A: a list"),
    ],
)
def test_values_that_no_factor_holds_are_refused_and_change_nothing(value, message):
    model = attached()
    before = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    state = {k: v + 1 for k, v in before.items()} | {"0.lora_A": value}
    with pytest.raises(FileError, match=message):
        load_adapter_state_dict(model, state)
    assert all(torch.equal(v, before[k]) for k, v in adapter_state_dict(model).items())


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Embedding(9, 7))


def run(model, x):
    return model[2](model[1](model[0](x)).permute(0, 3, 1, 2)), model[3](torch.arange(9))


CONFIG = {"0": {"r": 4}, "2": {"r": 4}, "3": {"r": 4}}


def made(path, seed, config):
    """A file, and what the model computes with it by the definition: merged."""
    torch.manual_seed(seed)
    model = paramlora.attach(base(), config, "file")
    for p in paramlora.trainable_parameters(model):
        p.data.uniform_(-1, 1)
    paramlora.save_adapter(model, path, "file")
    return run(paramlora.merge(model), x())


def x():
    return torch.randn(2, 5, 5, 6, generator=torch.Generator().manual_seed(1))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("how", ["hard", "soft", "same"])
def test_values_come_in_place(tmp_path, how, r):
    def config(r):
        more = {"hard": how == "hard"} | ({"up_kernel": "same"} if how == "same" else {})
        one = {"r": r, "scale": 0.5 * r}
        return {"0": one, "2": {**one, **more}, "3": one}

    model = paramlora.attach(base(), config(4), "style")
    paramlora.attach(model, {"0": {"r": 1}}, "other")
    before = {id(p): p.data_ptr() for p in model.parameters()}
    torch.manual_seed(2)
    other = paramlora.attach(base(), config(r), "file")
    for p in paramlora.trainable_parameters(other):
        p.data.uniform_(-1, 1)
    paramlora.save_adapter(other, tmp_path / "f.safetensors", "file")
    assert paramlora.load_adapter(model, tmp_path / "f.safetensors", into="style") is model
    close(run(model, x()), run(other, x()))
    assert {id(p): p.data_ptr() for p in model.parameters()} == before
    paramlora.detach(model, "style")
    close(run(model, x()), run(base(), x()))


def test_a_larger_rank_needs_room(tmp_path):
    expected = made(tmp_path / "f.safetensors", 3, {"0": {"r": 6}, "2": {"r": 6}, "3": {"r": 6}})
    model = paramlora.attach(base(), CONFIG, "style")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.FileError) as told:
        paramlora.load_adapter(model, tmp_path / "f.safetensors", into="style")
    assert str(told.value) == (
        '0.lora_A: of rank 6, and the attached "style" has room for 4. Attach it with max_rank=6 '
        "or more."
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model = paramlora.attach(base(), CONFIG, "style", max_rank=6)
    close(run(model, x()), run(base(), x()))
    paramlora.load_adapter(model, tmp_path / "f.safetensors", into="style")
    close(run(model, x()), expected)
    small = made(tmp_path / "s.safetensors", 4, {"0": {"r": 1}, "2": {"r": 2}, "3": {"r": 3}})
    paramlora.load_adapter(model, tmp_path / "s.safetensors", into="style")
    close(run(model, x()), small)
    fresh = paramlora.load_adapter(base(), tmp_path / "s.safetensors", "new", max_rank=64)
    assert [u.r for _, _, u in updates(fresh)] == [6, 6, 7]  # the most that the layers hold
    close(run(fresh, x()), small)
    paramlora.load_adapter(fresh, tmp_path / "f.safetensors", into="new")
    close(run(fresh, x()), expected)


def test_ranks_of_zeros_stay_so_in_training():
    model = paramlora.attach(base(), CONFIG, max_rank=6)
    optimizer = torch.optim.AdamW(paramlora.parameter_groups(model, 1e-2))
    for _ in range(3):
        sum(y.square().sum() for y in run(model, x())).backward()
        optimizer.step()
        optimizer.zero_grad()
    for _, _, update in updates(model):
        assert update.lora_A[:4].any() and update.lora_B[:, :4].any()
        assert not update.lora_A[4:].any() and not update.lora_B[:, 4:].any()


def test_nothing_compiles_again(tmp_path):
    expected = made(tmp_path / "f.safetensors", 3, {"0": {"r": 2}, "2": {"r": 3}, "3": {"r": 1}})
    model, graphs = paramlora.attach(base(), CONFIG, "style", max_rank=5), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    close(compiled(model, x()), run(base(), x()))
    paramlora.load_adapter(model, tmp_path / "f.safetensors", into="style")
    close(compiled(model, x()), expected)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_another_kind_of_update_is_refused(tmp_path):
    """Whichever has a tensor that the other lacks, such as a magnitude, which would be lost."""
    kinds = {kind: {"0": {"r": 2, "kind": kind}} for kind in ("lora", "dora", "loha", "lokr")}
    for kind, config in kinds.items():
        made(tmp_path / f"{kind}.safetensors", 3, config)
    for have, config in kinds.items():
        for kind in kinds:
            model = paramlora.attach(base(), config, "style")
            before = {k: v.clone() for k, v in model.state_dict().items()}
            if kind == have:
                paramlora.load_adapter(model, tmp_path / f"{kind}.safetensors", into="style")
                continue
            with pytest.raises(paramlora.FileError, match="another kind. Load it under a name"):
                paramlora.load_adapter(model, tmp_path / f"{kind}.safetensors", into="style")
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    made(tmp_path / "f.safetensors", 3, {"0": {"r": 2}, "3": {"r": 1}})
    model = paramlora.attach(base(), CONFIG, "style")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(paramlora.FileError, match="missing: 2; unexpected: none. Load it under a"):
        paramlora.load_adapter(model, tmp_path / "f.safetensors", into="style")
    with pytest.raises(paramlora.AdapterError, match='no adapter "d" is attached. Attached: style'):
        paramlora.load_adapter(model, tmp_path / "f.safetensors", into="d")
    with pytest.raises(paramlora.AdapterError, match="Leave out adapter and max_rank"):
        paramlora.load_adapter(model, tmp_path / "f.safetensors", "x", into="style")
    with pytest.raises(paramlora.AdapterError, match="0: r = 4 is above max_rank = 3"):
        paramlora.attach(base(), CONFIG, max_rank=3)
    with pytest.raises(paramlora.AdapterError, match="max_rank must be a whole number, got 2.5"):
        paramlora.attach(base(), CONFIG, max_rank=2.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Read(TorchDispatchMode):
    """How often a number is read out of a tensor, for which a device's host would wait."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


def stack(count):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def test_no_number_is_read_for_each_layer(tmp_path):
    counts = []
    for count in (10, 40):
        paramlora.save_adapter(
            paramlora.attach(stack(count), {"*": {"r": 2}}), tmp_path / f"{count}.safetensors"
        )
        model = paramlora.attach(stack(count), {"*": {"r": 3}}, "style")
        adapter = read_adapter(tmp_path / f"{count}.safetensors")
        with Read() as read:
            swap_adapter(model, adapter, "style")
        counts.append(read.count)
    assert counts[0] == counts[1] < 5


def test_without_a_device_a_file_is_read_into_ordinary_memory(tmp_path):
    made(tmp_path / "f.safetensors", 3, CONFIG)
    file = SafeFile(tmp_path / "f.safetensors")
    plain, locked = file.every(), file.every(together=True, locked=True)
    file.close()
    assert [*plain] == [*locked] and all(torch.equal(plain[k], locked[k]) for k in plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_device_is_waited_for_as_often_for_any_number_of_layers(tmp_path):
    counts = []
    for count in (40, 80):  # whose bases are told by as many of them
        model = paramlora.attach(stack(count).cuda(), {"*": {"r": 2}}, "style")
        path = tmp_path / f"{count}.safetensors"
        paramlora.save_adapter(model, path, "style")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                paramlora.load_adapter(model, path, into="style")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(told))
    assert counts[0] == counts[1] < 30
