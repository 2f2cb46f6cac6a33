"""A sweep of kinds of update that somebody else writes: what they inherit, hold and draw is what
they compute, or is refused in one sentence; held against float64 formulas of the tests' own."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import paramlora
from paramlora import files
from paramlora.model.attach import _register, updates
from paramlora.model.norms import relative_size
from paramlora.model.recomputed import AGAIN
from paramlora.update.attached import AttachedUpdate
from paramlora.update.dora import Dora
from paramlora.update.kinds import KINDS, register, unregister
from paramlora.update.loha import Loha
from paramlora.update.lowrank import LowRank
from paramlora.update.sum import Block, Term

# what a forward of the package is made of, by the class that computes so
MADE_OF = [
    *((LowRank, name) for name in ("delta", "factors", "held", "scaling", "stored_scale")),
    *((Dora, name) for name in ("delta", "factors", "scaling", "rescale", "magnitude")),
    (Loha, "scaling"),
]


@pytest.fixture
def known():
    """Registers a class for one test alone."""
    names = []

    def made(kind):
        names.append(kind.method)
        return register(kind)

    yield made
    for name in names:
        if name in KINDS:
            unregister(name)


def spoiled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in paramlora.trainable_parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ("factors", "delta", "scaling"))
def test_a_part_of_a_forward_that_a_kind_changes_is_in_its_term_and_once_in_its_file(
    name, known, tmp_path
):
    def changed(self, *args):
        own = getattr(super(Numbered, self), name)
        value = own(*args) if callable(own) else own
        both = isinstance(value, tuple)
        return (value[0], value[1] * self.own_number) if both else value * self.own_number

    class Numbered(LowRank):
        """``W + number · scale · B·A``."""

        method = "numbered"
        parts = {**LowRank.parts, "own_number": "number"}

        def __init__(self, weight, *args, **options):
            super().__init__(weight, *args, **options)
            self.own_number = nn.Parameter(self.lora_A.new_full((), 3.0))

        @staticmethod
        def term_of(parts, gain, layout):
            return LowRank.term_of(parts, gain * parts["own_number"], layout)

    setattr(Numbered, name, property(changed) if name == "scaling" else changed)
    known(Numbered)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    entry = {"0": {"r": 2, "scale": 0.7, "kind": "numbered"}}
    model = spoiled(paramlora.attach(copy.deepcopy(base), entry))
    ((_, _, u),) = updates(model)
    change = (u.own_number * 0.7 * u.lora_B @ u.lora_A).detach()
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    state = paramlora.checkpoint.merge(base.state_dict(), paramlora.adapter_of(model))
    torch.testing.assert_close(state["0.weight"], base[0].weight + change)
    for strength in (1.0, 0.5):
        want = base[0].weight + strength * change
        for one in (model, other):
            paramlora.set_adapters(one, {"default": strength})
            torch.testing.assert_close(one[0].weight, want)
            torch.testing.assert_close(paramlora.merge(copy.deepcopy(one))[0].weight, want)


@pytest.mark.parametrize("base, name", MADE_OF)
def test_a_class_that_changes_what_a_forward_is_made_of_says_its_term(base, name):
    said = {"method": "other", "parts": {**base.parts, "own_number": "number"}}
    kind = type("Other", (base,), {**said, name: vars(LowRank).get(name, getattr(base, name))})
    with pytest.raises(paramlora.AdapterError, match='Other computes .* not say its "term_of"'):
        register(kind)
    assert "other" not in KINDS


@pytest.mark.parametrize("name", ("delta", "factors", "scaling"))
def test_a_class_that_is_not_registered_and_changes_a_part_of_the_forward_is_not_merged(name):
    class Doubled(LowRank):
        """``W + 2 · scale · B·A``, without a word of it."""

    def doubled(self, *args):
        own = getattr(super(Doubled, self), name)
        value = own(*args) if callable(own) else own
        return (value[0], 2 * value[1]) if isinstance(value, tuple) else 2 * value

    setattr(Doubled, name, property(doubled) if name == "scaling" else doubled)
    layer = nn.Linear(4, 6).double()
    weight, update = layer.weight.detach().clone(), Doubled(layer.weight, 2)
    nn.init.normal_(update.lora_B)
    _register(layer, "weight", update)
    want = weight + 2 * update.lora_B @ update.lora_A
    torch.testing.assert_close(layer.weight, want)
    for act in (paramlora.merge, paramlora.adapter_of, paramlora.summary):
        with pytest.raises(paramlora.AdapterError, match="kind Doubled computes a weight of its"):
            act(layer)
    torch.testing.assert_close(layer.weight, want)


def drawing(base):
    """A kind that leaves half of the ranks out, others at each read."""

    class Drawing(base):
        method = "drawing"
        parts = {**base.parts, "own_number": "number"}

        def __init__(self, weight, *args, **options):
            super().__init__(weight, *args, **options)
            self.own_number = nn.Parameter(torch.ones((), dtype=self.lora_A.dtype))

        def forward(self, weight: Tensor) -> Tensor:
            self.keep(drawn=(torch.rand(self.r) < 0.5).to(weight.dtype))
            return weight + self.own_number * (self.lora_B * self.drawn) @ self.lora_A

        @staticmethod
        def term_of(parts, gain, layout):
            return LowRank.term_of(parts, gain, layout)

    return Drawing


@pytest.mark.parametrize("again", (False, True))  # as for reentrant checkpointing
@pytest.mark.parametrize("base", (LowRank, Dora))
def test_the_gradient_of_a_kind_that_draws_is_that_of_its_own_draw(base, again, known):
    known(drawing(base))
    model = nn.Sequential(nn.Linear(6, 5)).double()
    spoiled(paramlora.attach(model, {"0": {"r": 5, "kind": "drawing"}}))
    ((_, _, update),) = updates(model)
    if again:
        model[0].__dict__[AGAIN] = True
    x = torch.randn(4, 6).double()
    for _ in range(8):
        model.zero_grad()
        y, kept = model(x), update.drawn.clone()
        state = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)  # as if nothing were computed again
        dense = torch.ones(4, 5).double().T @ x  # the gradient of the weight
        want = update.own_number * dense @ update.lora_A.T * kept
        torch.testing.assert_close(update.lora_B.grad, want.detach())


class Held(AttachedUpdate):
    """``W + gain · held``, where `held` is made in another way by each test."""

    method = "held"
    parts = {"own_change": "weight"}

    def __init__(self, weight, adapter, gains):
        super().__init__(adapter, weight.device, weight.dtype, gains)
        self.own_change = nn.Parameter(torch.zeros_like(weight))
        self.more(weight)

    def more(self, weight):
        """Whatever else it holds."""

    def forward(self, weight):
        return weight + self.gain * self.own_change if self.acts else weight

    @classmethod
    def attached_to(cls, site, entry, adapter, gains):
        return cls(site.weight.detach(), adapter, gains)

    @staticmethod
    def term_of(parts, gain, layout):
        return Term()


MORE = {
    "a parameter own_more": lambda self, w: setattr(self, "own_more", nn.Parameter(w[0])),
    "a parameter net.weight": lambda self, w: setattr(self, "net", nn.Linear(2, 2)),
    "a buffer own_table": lambda self, w: self.register_buffer("own_table", w[0]),
    "a buffer net.running_mean": lambda self, w: setattr(
        self, "net", nn.BatchNorm1d(2, affine=False)
    ),
}


@pytest.mark.parametrize("what", MORE)
def test_a_tensor_that_no_file_would_hold_is_refused_before_it_trains(what, known):
    known(type("More", (Held,), {"more": MORE[what], "method": "held"}))
    model = nn.Sequential(nn.Linear(4, 4))
    before = dict(model.state_dict())
    with pytest.raises(paramlora.AdapterError, match=f'More has {what}, which its "parts" do not'):
        paramlora.attach(model, {"0": {"kind": "held"}})
    assert type(model[0]) is nn.Linear and model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.complex64, torch.float8_e5m2))
def test_a_tensor_in_a_type_that_no_file_holds_is_refused_before_it_trains(dtype, known):
    def more(self, weight):
        self.register_buffer("own_mask", torch.zeros(3).to(dtype))

    kept = {"parts": {**Held.parts, "own_mask": "own"}}
    known(type("More", (Held,), {"more": more, "method": "held", **kept}))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(paramlora.AdapterError, match=f"own_mask is of {dtype}, .*, int64"):
        paramlora.attach(model, {"0": {"kind": "held"}})
    assert type(model[0]) is nn.Linear


WRONG = {  # what a forward makes of a weight, and how a message calls it
    "a tensor of torch.float64": lambda self, w: w.double() + self.own_change,
    r"a tensor of shape \[5, 4\]": lambda self, w: (w + self.own_change)[1:],
    r"a tensor of shape \[4, 6\]": lambda self, w: (w + self.own_change).t(),
    "a NoneType": lambda self, w: None,
    "the weight itself, written to": lambda self, w: w.add_(1),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_weight_of_the_layer_is_refused_before_it_trains(what, known):
    said = {"method": "held", "parts": Held.parts, "term_of": Held.term_of}
    known(type("Wrong", (Held,), {**said, "forward": WRONG[what]}))
    model = nn.Sequential(nn.Linear(4, 6))
    weight, before = model[0].weight, model[0].weight.detach().clone()
    with pytest.raises(paramlora.AdapterError, match=f"^0: Wrong makes {what} of .*shape and type"):
        paramlora.attach(model, {"0": {"kind": "held"}})
    assert type(model[0]) is nn.Linear and model[0].weight is weight
    assert torch.equal(weight, before)


def test_a_cache_is_nobodys_loss(known):
    kept = {"hidden": {"own_mark": "number"}}

    def more(self, weight):
        self.register_buffer("own_cache", torch.ones(3), persistent=False)
        self.register_buffer("own_mark", torch.ones(()))
        self.register_buffer("own_none", None)

    known(type("More", (Held,), {"more": more, "method": "held", **kept}))
    model = spoiled(paramlora.attach(nn.Sequential(nn.Linear(4, 4)), {"0": {"kind": "held"}}))
    assert paramlora.adapter_state_dict(model).keys() == {"0.own_change"}


@pytest.mark.parametrize("bag", (False, True))
def test_the_base_of_a_kind_that_is_off_is_not_written_by_its_reader(bag, known):
    """An embedding with ``max_norm`` renormalises the rows of what it reads."""
    known(type("Plain", (Held,), {"method": "held"}))
    base = (nn.EmbeddingBag if bag else nn.Embedding)(6, 4, max_norm=0.5)
    weight, ids = base.weight.detach().clone(), torch.arange(6)[None]
    want = copy.deepcopy(base)(ids)
    model = paramlora.attach(nn.Sequential(base), {"0": {"kind": "held"}})
    with paramlora.disable_adapters(model):
        torch.testing.assert_close(model(ids), want)
    paramlora.set_adapters(model, {})
    torch.testing.assert_close(model(ids), want)
    assert torch.equal(paramlora.detach(model)[0].weight, weight)


class Ranked(LowRank):
    """``W + scale · B · diag(d) · A``."""

    method = "ranked"
    parts = {**LowRank.parts, "own_ranks": "own"}

    def __init__(self, weight, *args, **options):
        super().__init__(weight, *args, **options)
        self.own_ranks = nn.Parameter(torch.ones(self.r, dtype=self.lora_A.dtype))

    def forward(self, weight):
        return weight + (self.lora_B * self.own_ranks * self.scaling) @ self.lora_A

    @classmethod
    def fits(cls, held, shape, layout):
        return held["own_ranks"].shape == (cls.rank_of(held),)

    @staticmethod
    def term_of(parts, gain, layout):
        thick = {**parts, "lora_B": parts["lora_B"] * parts["own_ranks"]}
        return LowRank.term_of(thick, gain, layout)


class Third(LowRank):
    """``W + scale · B · (A + C)``, with a third factor along the inputs."""

    method = "third"
    parts = {**LowRank.parts, "own_C": "input"}

    def __init__(self, weight, *args, **options):
        super().__init__(weight, *args, **options)
        self.own_C = nn.Parameter(torch.zeros_like(self.lora_A))

    def forward(self, weight):
        return weight + (self.lora_B * self.scaling) @ (self.lora_A + self.own_C)

    @staticmethod
    def term_of(parts, gain, layout):
        return LowRank.term_of({**parts, "lora_A": parts["lora_A"] + parts["own_C"]}, gain, layout)


def test_a_factor_of_its_own_grows_with_its_ranks(known, tmp_path):
    known(Third)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    one = spoiled(paramlora.attach(copy.deepcopy(base), {"0": {"r": 2, "kind": "third"}}))
    paramlora.save_adapter(one, tmp_path / "a.safetensors")
    slot = paramlora.attach(copy.deepcopy(base), {"0": {"r": 1, "kind": "third"}}, max_rank=4)
    x = torch.randn(3, 6).double()
    torch.testing.assert_close(slot(x), base(x))
    paramlora.load_adapter(slot, tmp_path / "a.safetensors", into="default")
    ((_, _, u),) = updates(one)
    want = base[0].weight + u.lora_B @ (u.lora_A + u.own_C)
    torch.testing.assert_close(slot[0].weight, want)
    torch.testing.assert_close(slot(x), x @ want.T + base[0].bias)


def test_ranks_of_which_only_the_kind_knows_are_refused_room(known):
    known(Ranked)
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(paramlora.AdapterError, match="Ranked does not say how own_ranks grows .*4"):
        paramlora.attach(model, {"0": {"r": 2, "kind": "ranked"}}, max_rank=4)
    assert type(model[0]) is nn.Linear
    paramlora.attach(model, {"0": {"r": 2, "kind": "ranked"}}, max_rank=2)


class Gained(LowRank):
    """``W + scale · g · B·A`` of the factors as they are, which leaves a start in."""

    method = "gained"
    parts = {**LowRank.parts, "own_gain": "number"}

    def __init__(self, weight, *args, **options):
        super().__init__(weight, *args, **options)
        self.own_gain = nn.Parameter(torch.ones((), dtype=self.lora_A.dtype))

    def forward(self, weight):
        a, b = self.of()
        return weight + (b * self.scaling * self.own_gain) @ a

    def of(self):
        return self.lora_A, self.lora_B

    @staticmethod
    def term_of(parts, gain, layout):
        return LowRank.term_of(parts, gain * parts["own_gain"], layout)


@pytest.mark.parametrize("init", ("pissa", "olora"))
@pytest.mark.parametrize("kind", (Gained, Ranked, Third))
def test_a_start_that_a_kind_does_not_take_out_is_refused(kind, init, known):
    known(kind)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    entry = {"r": 2, "kind": kind.method, "init": init}
    with pytest.raises(
        paramlora.TargetError, match=f'"{init}".* {kind.__name__} does not take out'
    ):
        paramlora.attach(model, {"0": entry})
    assert type(model[0]) is nn.Linear
    paramlora.attach(model, {"0": {**entry, "init": "orthogonal"}})


@pytest.mark.parametrize("init", ("pissa", "olora"))
def test_a_start_that_a_kind_takes_out_leaves_the_function(init, known, tmp_path):
    known(type("Taking", (Gained,), {"method": "gained", "of": LowRank.factors}))
    base = nn.Sequential(nn.Linear(6, 5)).double()
    entry = {"r": 2, "kind": "gained", "init": init}
    model = paramlora.attach(copy.deepcopy(base), {"0": entry})
    torch.testing.assert_close(model[0].weight, base[0].weight)
    ((_, _, u),) = updates(spoiled(model))
    want = base[0].weight + u.own_gain * (u.lora_B @ u.lora_A - u.start_B @ u.start_A)
    torch.testing.assert_close(model[0].weight, want)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    torch.testing.assert_close(other[0].weight, want)
    torch.testing.assert_close(paramlora.merge(model)[0].weight, want)


@pytest.mark.parametrize("inside", (True, False))
def test_a_dora_takes_the_place_of_one_of_the_other_norm(inside, tmp_path):
    """What runs along a side of the weight has no ranks that could be filled up with zeros."""
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).double(), torch.randn(3, 6).double()

    def made(inside):
        layer = paramlora.attach(copy.deepcopy(base), {"weight": {"r": 2, "kind": "dora"}})
        own = layer.parametrizations.weight[0].lora_magnitude
        own.data = torch.ones(1, 6).double() if inside else own.data
        return spoiled(layer)

    paramlora.save_adapter(made(not inside), tmp_path / "a.safetensors")
    there = paramlora.load_adapter(made(inside), tmp_path / "a.safetensors", into="default")
    u = there.parametrizations.weight[0]
    total = base.weight + u.lora_B @ u.lora_A
    norm = total.square().sum(1 if inside else 0, keepdim=True).sqrt()
    want = u.lora_magnitude / norm * total
    assert u.lora_magnitude.shape == ((5, 1) if inside else (1, 6))
    torch.testing.assert_close(there(x), x @ want.T + base.bias)


ENTRIES = {
    **{kind: {"r": 2, "kind": kind} for kind in ("lora", "dora", "loha", "lokr")},
    "soft": {"r": 2, "hard": 0},
    "held": {"kind": "held"},
}


@pytest.mark.parametrize("layer", (lambda: nn.Linear(4, 4), lambda: nn.GRUCell(4, 4)))
@pytest.mark.parametrize("kind", ENTRIES)
def test_values_put_into_a_model_on_the_meta_device_act_as_strongly(kind, layer, known):
    """``load_state_dict(assign=True)`` gives tensors of another device and type to an update."""
    if kind == "soft" and not isinstance(layer(), nn.Linear):
        pytest.skip("no layer to act beside")
    known(type("Plain", (Held,), {"method": "held"}))
    torch.manual_seed(0)
    config = {"re:.*(weight|weight_ih)": ENTRIES[kind]}
    there = spoiled(paramlora.attach(nn.Sequential(layer()).double(), config))
    with torch.device("meta"):
        model = paramlora.attach(nn.Sequential(layer()), config)
    model.load_state_dict(there.state_dict(), assign=True)
    x = torch.randn(3, 4).double()
    for strength in (1.0, 0.1):
        for one in (there, model):
            paramlora.set_adapters(one, {"default": strength})
        torch.testing.assert_close(model(x), there(x), rtol=1e-12, atol=1e-12)
        assert all(update.gain.dtype == torch.float64 for _, _, update in updates(model))


class Turned(Held):
    """``(I + K) W`` of a trained matrix, and a mask, of which `fully_shard` splits the first."""

    method = "turned"
    parts = {"own_turn": "own", "own_mask": "weight"}

    def __init__(self, weight, adapter, gains):
        super(Held, self).__init__(adapter, weight.device, weight.dtype, gains)
        self.own_turn = nn.Parameter(weight.new_zeros(len(weight), len(weight)))
        self.register_buffer("own_mask", (torch.arange(weight.numel()) % 3).view_as(weight))

    def forward(self, weight):
        if not self.acts:
            return weight
        turn = torch.eye(len(weight), dtype=weight.dtype) + self.gain * self.own_turn
        return torch.where(self.own_mask > 0, turn @ weight, weight)

    @classmethod
    def fits(cls, held, shape, layout):
        return held["own_turn"].shape == (shape[0], shape[0])

    @staticmethod
    def term_of(parts, gain, layout):
        return TurnedTerm(parts["own_turn"] * gain, parts["own_mask"])


@dataclass(frozen=True)
class TurnedTerm(Term):
    turn: Tensor
    mask: Tensor
    whole_matrix = True

    def applied(self, total: Tensor, block: Block) -> Tensor:
        turn = torch.eye(len(total), dtype=total.dtype) + self.turn.to(total)
        return torch.where(self.mask > 0, turn @ total, total)


@pytest.mark.parametrize("layer", (nn.Linear, nn.Embedding))
def test_a_weight_is_the_same_under_autocast(layer, known):
    """Whose products are in 16 bits, and so would be what a forward makes by one."""
    known(Turned)
    model = nn.Sequential(layer(6, 6))
    spoiled(paramlora.attach(model, {"0": {"kind": "turned"}}))
    ((_, _, update),) = updates(model)
    base = model[0].parametrizations.weight.original.detach().double()
    want = torch.where(update.own_mask > 0, base + update.own_turn.double() @ base, base)
    plain = model[0].weight.detach()
    torch.testing.assert_close(plain.double(), want, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        read = model[0].weight
        assert torch.equal(read, plain) and read.dtype == torch.float32
        if layer is nn.Embedding:
            assert torch.equal(model(torch.arange(6)), plain)
    read.square().sum().backward()  # outside, as torch asks for
    got = update.own_turn.grad.clone()
    model.zero_grad()
    model[0].weight.square().sum().backward()
    assert torch.equal(got, update.own_turn.grad)


def test_a_sharded_weight_takes_what_only_its_kind_knows_how_to_lay_out(known, one_process):
    """Its tensors are split along another side than the weight, or not at all."""
    known(Turned)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6)).double()
    weight = model[0].weight.detach().clone()
    spoiled(paramlora.attach(model, {"0": {"kind": "turned"}}))
    ((_, _, update),) = updates(model)
    turn, mask = update.own_turn.detach().clone(), update.own_mask > 0
    fully_shard(model, mesh=one_process)
    for strength in (1.0, 0.5):
        paramlora.set_adapters(model, {"default": strength})
        want = torch.where(mask, weight + strength * turn @ weight, weight)
        size = relative_size(model[0], update)
        assert size == pytest.approx(((want - weight).norm() / weight.norm()).item())
    merged = paramlora.merge(model)[0].weight
    assert type(merged.data) is DTensor
    torch.testing.assert_close(merged.full_tensor(), want)


def saved(kind, folder):
    """The base and the state dict of a model under a kind that is registered until it is saved."""
    register(kind)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    entry = {"kind": kind.method, **({"r": 2} if issubclass(kind, LowRank) else {})}
    model = spoiled(paramlora.attach(copy.deepcopy(base), {"0": entry, "1": {"r": 1}}))
    paramlora.save_adapter(model, folder / "a.safetensors")
    unregister(kind.method)
    return base, model.state_dict()


# the names of the first begin as plain low ranks' do, those of the second are all its own
@pytest.mark.parametrize("kind", (Third, type("Plain", (Held,), {"method": "held"})))
def test_a_file_of_a_kind_that_nobody_registered_is_refused_by_its_name(kind, tmp_path):
    base, _ = saved(kind, tmp_path)
    file, name = tmp_path / "a.safetensors", kind.method
    for act in (
        lambda: paramlora.load_adapter(base, file),
        lambda: files.inspect(file),
        lambda: files.read_adapter(file),
    ):
        with pytest.raises(paramlora.FileError, match=f"'0' is of the kind '{name}'.*Import what"):
            act()
    assert type(base[0]) is nn.Linear


def test_a_state_dict_with_half_known_names_is_not_taken_for_a_plain_update(tmp_path):
    _, state = saved(Third, tmp_path)
    for act in (paramlora.checkpoint.merge, paramlora.checkpoint.extract):
        with pytest.raises(paramlora.FileError, match="own_C inside, which no kind .*Import what"):
            act(state)


def test_a_state_dict_with_names_of_nobody_tells_what_it_leaves(tmp_path):
    base, state = saved(type("Plain", (Held,), {"method": "held"}), tmp_path)
    for act in (paramlora.checkpoint.merge, paramlora.checkpoint.extract):
        with pytest.warns(paramlora.ParamloraWarning, match="0.weight: own_change .*Import what"):
            act(state)
    wrapped = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    state = paramlora.attach(wrapped, {"3": {"r": 1}}).state_dict()
    paramlora.checkpoint.merge(state)  # rules of torch's own are no updates: not a word
