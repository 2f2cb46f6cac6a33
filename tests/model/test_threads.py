"""A sweep of what several threads do at once with one model: some call it, others switch its
adapters."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora import Adapter, AdapterError, Update
from paramlora.model.attach import updates

STRENGTHS = (0.0, 0.5, 1.0, -2.0)
KINDS = {
    "known forward": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0": {"r": 2}}),
    "dense read": (lambda: nn.Sequential(nn.Bilinear(6, 6, 5)), {"0": {"r": 2}}),
    "soft": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0": {"r": 2, "hard": 0}}),
    "whole": (lambda: nn.Sequential(nn.Linear(6, 5)), {"0.weight": {"whole": 1}}),
}


@pytest.fixture
def often():
    """Threads take turns at nearly every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def made(kind):
    torch.manual_seed(0)
    make, config = KINDS[kind]
    model = paramlora.attach(make().double(), config)
    with torch.no_grad():
        for _, _, update in updates(model):
            for parameter in update.parameters():
                parameter.normal_()
    return model


def call(model, x):
    return model[0](x, x) if isinstance(model[0], nn.Bilinear) else model(x)


def answers(model, x):
    """What a dense layer gives at each strength, with the sum formed here."""
    update = next(u for _, _, u in updates(model))
    lists = model[0]._modules.get("parametrizations")
    base = model[0].weight if lists is None else lists.weight.original
    if hasattr(update, "lora_whole"):
        delta = update.lora_whole - base
    else:
        delta = (update.lora_scale * update.lora_B @ update.lora_A).view(base.shape)
    found = []
    for strength in STRENGTHS:
        full, bias = base + strength * delta, model[0].bias
        dense = isinstance(model[0], nn.Bilinear)
        f = nn.functional
        found.append((f.bilinear(x, x, full, bias) if dense else f.linear(x, full, bias)).detach())
    return found


def together(*works):
    """Run all at once, each in a thread of its own; what one raises is raised here."""
    gate, raised = threading.Barrier(len(works)), []

    def run(work):
        try:
            gate.wait()
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_call_is_that_of_one_strength(kind, often):
    model, x = made(kind), torch.randn(3, 6, dtype=torch.float64)
    wanted, seen = answers(model, x), []

    def calls():
        for _ in range(150):
            y = call(model, x.clone().requires_grad_())
            y.sum().backward()
            seen.append(y.detach())

    def switches():
        for turn in range(300):
            paramlora.set_adapters(model, {"default": STRENGTHS[turn % 4]})

    def disables():
        for _ in range(300):
            with paramlora.disable_adapters(model):
                pass

    together(calls, calls, switches, disables)
    which = [[torch.allclose(y, w, rtol=1e-12, atol=1e-12) for w in wanted] for y in seen]
    assert all(map(any, which))
    paramlora.set_adapters(model, {"default": 1.0})
    torch.testing.assert_close(call(model, x), wanted[2], rtol=1e-12, atol=1e-12)


ROWS = [["a", "b", None], ["b", None, "a"], [None, "a", "b"]]


def two(kind):
    """Two adapters, and what each row of three gives with each of them, formed here."""
    model = made(kind)
    paramlora.attach(model, KINDS[kind][1], "b")
    with torch.no_grad():
        for _, _, update in updates(model):
            update.lora_B.normal_()
    x, found = torch.randn(3, 6, dtype=torch.float64), {}
    held = {update.adapter: update for _, _, update in updates(model)}
    lists = model[0]._modules.get("parametrizations")
    base, bias = (model[0].weight if lists is None else lists.weight.original), model[0].bias
    for name, update in (("a", held["default"]), ("b", held["b"]), (None, None)):
        delta = 0 if update is None else update.lora_scale * update.lora_B @ update.lora_A
        found[name] = nn.functional.linear(x, base + delta, bias).detach()
    return model, x, found


def rowwise(found, rows):
    return torch.stack([found[name][at] for at, name in enumerate(rows)])


def named(rows):
    return [{"a": "default"}.get(name, name) for name in rows]


@pytest.mark.parametrize("kind", ["known forward", "soft"])
def test_copies_are_routed_at_once(kind, often):
    model, x, found = two(kind)

    def work(own, rows):
        for _ in range(60):
            with torch.no_grad(), paramlora.route(own, named(rows)):
                y = own(x)
            torch.testing.assert_close(y, rowwise(found, rows), rtol=1e-12, atol=1e-12)

    copies = [(copy.deepcopy(model), rows) for rows in ROWS]
    together(*[lambda pair=pair: work(*pair) for pair in copies])


@pytest.mark.parametrize("kind", ["known forward", "soft"])
def test_calls_of_any_thread_inside_of_a_block_take_its_rows(kind, often):
    model, x, found = two(kind)

    def calls():
        for _ in range(60):
            y = model(x.clone().requires_grad_())
            y.sum().backward()
            torch.testing.assert_close(y, rowwise(found, ROWS[0]), rtol=1e-12, atol=1e-12)

    with paramlora.route(model, named(ROWS[0])):
        together(calls, calls, calls)


@pytest.mark.parametrize("kind", ["known forward", "soft"])
def test_blocks_of_route_that_overlap_are_all_left(kind, often):
    model, x, found = two(kind)
    done = []

    def calls():
        for _ in range(100):
            try:
                done.append(model(x).detach())
            except AdapterError as error:  # while a block was opened or left
                assert "acts on some rows of the batch" in str(error)

    def routes(rows):
        for _ in range(60):
            with paramlora.route(model, named(rows)):
                pass

    together(calls, *[lambda rows=rows: routes(rows) for rows in ROWS])
    assert done
    both = found["a"] + found["b"] - found[None]
    torch.testing.assert_close(model(x), both, rtol=1e-12, atol=1e-12)
    with paramlora.route(model, named(ROWS[1])):
        torch.testing.assert_close(model(x), rowwise(found, ROWS[1]), rtol=1e-12, atol=1e-12)


RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def recurrent(kind):
    """A recurrent layer with two adapters, a batch for it, and what a dense layer gives each row
    with each of them."""
    torch.manual_seed(0)
    layer, x, found = kind(6, 5, batch_first=True).double(), torch.randn(3, 4, 6).double(), {}
    dense = copy.deepcopy(layer)
    paramlora.attach(layer, {"weight_hh_l0": {"r": 2}}, "a")
    paramlora.attach(layer, {"weight_hh_l0": {"r": 3}}, "b")
    base = dense.weight_hh_l0.detach().clone()
    for update in [None, *[update for _, _, update in updates(layer)]]:
        with torch.no_grad():
            delta = 0 if update is None else update.lora_B.normal_() @ update.lora_A
            dense.weight_hh_l0.copy_(base + delta)
            found[update and update.adapter] = dense(x)[0]
    return layer, x, found


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_layers_rows_are_those_of_their_own_thread(kind, often):
    layer, x, found = recurrent(kind)

    def calls():
        for _ in range(60):
            y, _ = layer(x.clone().requires_grad_())
            y.sum().backward()
            torch.testing.assert_close(y, rowwise(found, ROWS[0]), rtol=1e-12, atol=1e-12)

    with paramlora.route(layer, ROWS[0]):
        together(calls, calls, calls)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_layer_trains_while_another_thread_wants_no_gradients(kind):
    layer, x, _ = recurrent(kind)
    factors = list(paramlora.trainable_parameters(layer))
    wanted = torch.autograd.grad(layer(x)[0].square().sum(), factors)
    check, own = layer.check_forward_args, threading.get_ident()

    def evaluates():
        with torch.no_grad():
            layer(x)

    def checked(*args):  # what a call does between its reading of the weights and its product
        if threading.get_ident() == own:
            together(evaluates)
        check(*args)

    layer.check_forward_args = checked
    found = torch.autograd.grad(layer(x)[0].square().sum(), factors)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_layer_is_as_it_is_now_in_every_thread(kind):
    """What one thread's call read of the weights is none of another's, also where they change
    between the calls and are read as they are stored."""
    layer, x, found = recurrent(kind)
    paramlora.set_adapters(layer, {"a": 1.0, "b": 0.0})
    turns = [threading.Event() for _ in range(4)]

    def one():
        torch.testing.assert_close(layer(x)[0], found["a"], rtol=1e-12, atol=1e-12)
        turns[0].set()
        turns[1].wait(60)
        torch.testing.assert_close(layer(x)[0], found[None], rtol=1e-12, atol=1e-12)

    def other():
        turns[0].wait(60)
        paramlora.set_adapters(layer, {"a": 0.0})
        torch.testing.assert_close(layer(x)[0], found[None], rtol=1e-12, atol=1e-12)
        turns[1].set()

    together(one, other)
    copied = copy.copy(layer)
    together(lambda: torch.testing.assert_close(copied(x)[0], found[None], rtol=1e-12, atol=1e-12))
    torch.testing.assert_close(paramlora.detach(layer)(x)[0], found[None], rtol=1e-12, atol=1e-12)


class Flat(nn.Module):
    """Flattens its batch's tokens, as mixtures of experts do before an MLP."""

    def __init__(self, reentrant):
        super().__init__()
        self.mlp, self.reentrant = (
            nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)),
            reentrant,
        )

    def forward(self, x):
        flat = x.view(-1, 6)
        if self.reentrant is None or not x.requires_grad:
            return self.mlp(flat).view(x.shape)
        return checkpoint(self.mlp, flat, use_reentrant=self.reentrant).view(x.shape)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_batches_of_other_lengths_are_flattened_in_other_threads(reentrant):
    """Also where a backward, which has a thread of its own on CUDA, computes a segment again."""
    torch.manual_seed(0)
    model, own = Flat(reentrant).double(), threading.get_ident()
    dense = copy.deepcopy(model)
    for name in ("a", "b"):
        paramlora.attach(model, {"0": {"r": 2}, "2": {"r": 2}}, name)
    with torch.no_grad():
        for _, _, update in updates(model):
            update.lora_B.normal_()

    def wanted(x):
        rows = []
        for at, name in enumerate(ROWS[0]):
            with torch.no_grad():
                for index in (0, 2):
                    plist = model.mlp[index].parametrizations.weight
                    held = [update for update in plist if update.adapter == name]
                    delta = sum(update.lora_B @ update.lora_A for update in held)
                    dense.mlp[index].weight.copy_(plist.original + delta)
                rows.append(dense(x[at : at + 1]))
        return torch.cat(rows)

    x, longer = torch.randn(3, 4, 6).double(), torch.randn(3, 7, 6).double()
    x_wanted, longer_wanted = wanted(x), wanted(longer)

    def calls_the_longer():
        torch.testing.assert_close(model(longer), longer_wanted, rtol=1e-12, atol=1e-12)

    def meanwhile(*_):
        if threading.get_ident() == own:
            together(calls_the_longer)

    model.mlp[2].register_forward_pre_hook(meanwhile)
    with paramlora.route(model, ROWS[0]):
        y = model(x.requires_grad_())
        together(y.sum().backward)
        torch.testing.assert_close(y, x_wanted, rtol=1e-12, atol=1e-12)


def test_files_are_worked_on_at_once(tmp_path, often):
    state = {"0.weight": torch.randn(5, 6), "0.bias": torch.randn(5)}
    save_file(state, tmp_path / "base.safetensors")
    update = Update(torch.randn(2, 6), torch.randn(5, 2), 0.5, (5, 6))
    want = state["0.weight"].double() + 0.5 * update.lora_B.double() @ update.lora_A.double()

    def work(number):
        out = tmp_path / f"{number}.safetensors"
        for _ in range(10):
            paramlora.files.merge(
                tmp_path / "base.safetensors", [Adapter({"0": update})], out, force=True
            )
            found = load_file(out)["0.weight"]
            torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)

    together(*[lambda number=number: work(number) for number in range(3)])


def test_it_is_written_of_every_function_what_threads_may_do():
    page = Path(__file__).parents[2] / "docs" / "training.md"
    told = page.read_text("utf-8").partition("## Threads and processes")[2]
    names = {n for n in paramlora.__all__ if not isinstance(getattr(paramlora, n), type)}
    assert {n for n in names | {"kernels"} if f"`{n}`" not in told} == set()


def test_different_models_may_be_changed_at_once(often):
    models = [nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]) for _ in range(4)]
    before = [copy.deepcopy(model.state_dict()) for model in models]

    def work(model):
        for _ in range(20):
            paramlora.attach(model, {"*": {"r": 1}})
            model(torch.ones(1, 4)).sum().backward()
            paramlora.detach(model)
        paramlora.merge(paramlora.attach(model, {"*": {"r": 1}}))  # B = 0: the same weights

    together(*[lambda model=model: work(model) for model in models])
    for model, state in zip(models, before):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert all(type(layer) is nn.Linear for layer in model)
