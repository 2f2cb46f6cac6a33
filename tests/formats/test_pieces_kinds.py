"""A sweep over kinds of updates of weights that a model holds apart, or with others in one.

What a file's own weight becomes is formed here in float64 by the kind's formula, and its rows are
compared with those of the model's weights.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from paramlora import formats
from paramlora.errors import FileError
from paramlora.files import adapters
from paramlora.formats import Content, Options, Slot
from paramlora.update.kinds import register, unregister
from paramlora.update.loha import Loha
from paramlora.update.lowrank import LowRank
from paramlora.update.sum import folded
from paramlora.update.value import Adapter, KindUpdate, Update, apart_by_kind

EXACT = dict(rtol=1e-12, atol=1e-12)
IN, Q, KV = 6, 8, 4
ATTENTION = "model.layers.0.self_attn"
SPLIT = {f"{ATTENTION}.{n}_proj": rows for n, rows in zip("qkv", (Q, KV, KV))}
FUSED = {f"{ATTENTION}.qkv_proj": Q + 2 * KV}
# of single blocks of FLUX: other rows than those of q, k and v in one weight with them
SINGLE = {
    **{f"single_transformer_blocks.0.attn.to_{n}": 4 for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp": 12,
}
WIDE = {"single_blocks.0.linear1": 24}
# halves that change places
NORM, ADALN = {"norm_out.linear": 8}, {"final_layer.adaLN_modulation.1": 8}
CASES = {
    "apart": (FUSED, SPLIT), "fused": (SPLIT, FUSED),
    "linear1-apart": (WIDE, SINGLE), "linear1-fused": (SINGLE, WIDE),
    "halves": (ADALN, NORM), "halves-back": (NORM, ADALN),
}  # fmt: skip


def lora(out, fan_in):
    return Update(torch.randn(2, fan_in), torch.randn(out, 2), 0.7)


def dora(out, fan_in, scale=0.7):
    held = {
        "lora_A": torch.randn(2, fan_in), "lora_B": torch.randn(out, 2),
        "lora_magnitude": torch.rand(out, 1) + 0.5,
    }  # fmt: skip
    return KindUpdate("dora", held, scale)


def loha(out, fan_in):
    shapes = {"a": (out, 2), "b": (2, fan_in)}
    return KindUpdate(
        "loha", {f"hada_w{n}_{s}": torch.randn(shapes[s]) for n in (1, 2) for s in "ab"}, 0.7
    )


def lokr(first, whole):
    """With so many rows in w1; one that is above 1 divides few of the parts here."""

    def made(out, fan_in):
        held = {"lokr_w1": torch.randn(first, 2)}
        rows, inside = out // first, fan_in // 2
        if whole:
            held["lokr_w2"] = torch.randn(rows, inside)
        else:
            held |= {"lokr_w2_a": torch.randn(rows, 1), "lokr_w2_b": torch.randn(1, inside)}
        return KindUpdate("lokr", held, 0.7)

    return made


def difference(out, fan_in):
    return KindUpdate("difference", {"lora_diff": torch.randn(out, fan_in)})


KINDS = {
    "lora": lora, "dora": dora, "loha": loha, "difference": difference,
    "lokr-1": lokr(1, False), "lokr-2": lokr(2, False), "lokr-4": lokr(4, True),
}  # fmt: skip


def become(value, weight):
    """What an update makes of its weight, by the formula of its kind."""
    t = value.tensors()
    if value.method == "difference":
        return weight + t["lora_diff"]
    if value.method == "loha":
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    elif value.method == "lokr":
        second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        change = torch.kron(t["lokr_w1"], second)
    else:
        change = t["lora_B"] @ t["lora_A"]
    total = weight + value.scale * change
    if value.method != "dora":
        return total
    return total / total.norm(dim=1, keepdim=True) * t["lora_magnitude"]


def rows_of(weights):
    """The rows of all weights by the model's parts, in an order that all spellings share."""
    names = {"final_layer.adaLN_modulation.1": slice(None)}
    (path, whole), *rest = weights.items()
    if path in names:  # shift and scale, which diffusers has the other way round
        return torch.cat([whole[4:], whole[:4]])
    return torch.cat([whole, *(one for _, one in rest)])


def adapter(values):
    return Adapter(**apart_by_kind(values))


def fitted(values, model):
    slots = {path: Slot((rows, IN), "matrix", "linear") for path, rows in model.items()}
    return formats.fit(adapter(values), slots, Options(), "a.safetensors").values()


def laid(weights, model, names):
    """Weights of one spelling as those of the other."""
    whole = rows_of(weights)
    if "final_layer.adaLN_modulation.1" in model:
        whole = torch.cat([whole[4:], whole[:4]])
    return dict(zip(model, whole.split(list(model.values()))))


@pytest.fixture(autouse=True)
def _in_float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(values, file, model):
    weights = {path: torch.randn(rows, IN) for path, rows in file.items()}
    new = {p: become(values[p], w) if p in values else w for p, w in weights.items()}
    want, base = laid(new, model, file), laid(weights, model, file)
    found = fitted(values, model)
    for path, weight in base.items():
        terms = [found[path].term(1.0, torch.float64)] if path in found else []
        torch.testing.assert_close(folded(weight, terms), want[path], **EXACT)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_what_its_weights_become(kind, case):
    file, model = CASES[case]
    values = {path: KINDS[kind](rows, IN) for path, rows in file.items()}
    found = check(values, file, model)
    # a Kronecker product is one of other rows only where they are whole blocks of it
    if not kind.startswith("lokr"):
        assert {value.method for value in found.values()} == {kind}
    assert all(value.shape == (model[path], IN) for path, value in found.items())


def test_a_kronecker_product_stays_one_where_the_rows_are_whole_blocks_or_inside_of_one():
    file, model = CASES["apart"]
    for first, kinds in ((1, {"lokr"}), (2, {"lokr"}), (4, {"lokr"}), (8, {"lokr"})):
        found = check({next(iter(file)): lokr(first, False)(16, IN)}, file, model)
        assert {value.method for value in found.values()} == kinds
    # 24 rows by 3 are 8: q, k and v lie inside of the first two, across their border
    file, model = CASES["linear1-apart"]
    found = check({next(iter(file)): lokr(3, False)(24, IN)}, file, model)
    methods = [found[path].method for path in model]
    assert methods == ["lokr", "lokr", "lokr", "lora"]


def test_scales_of_the_parts_may_differ():
    for make in (dora, lambda *sides: loha(*sides)):
        values = {path: make(rows, IN) for path, rows in SPLIT.items()}
        first = next(iter(values))
        values[first] = KindUpdate(values[first].method, values[first].held, 1.9)
        check(values, SPLIT, FUSED)


@pytest.mark.parametrize("lost", SPLIT)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dora"}))
def test_rows_of_no_update_stay(kind, lost):
    values = {path: KINDS[kind](rows, IN) for path, rows in SPLIT.items() if path != lost}
    check(values, SPLIT, FUSED)


def test_kinds_that_add_add_up_in_one_weight():
    makes = (lora, loha, lokr(2, True), difference)
    for number in range(len(makes)):
        kinds = [*makes[number:], *makes[:number]]
        values = {path: make(SPLIT[path], IN) for path, make in zip(SPLIT, kinds)}
        check(values, SPLIT, FUSED)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dora"}))
@pytest.mark.parametrize("model", (SPLIT, FUSED), ids=("apart", "fused"))
def test_one_of_the_whole_and_one_of_a_part_add_up(kind, model):
    whole, part = next(iter(FUSED)), f"{ATTENTION}.k_proj"
    values = {whole: KINDS[kind](16, IN), part: loha(KV, IN)}
    weight = torch.randn(16, IN)
    want = become(values[whole], weight)
    want[Q : Q + KV] = become(values[part], want[Q : Q + KV])
    found = fitted(values, model)
    each = dict(zip(model, weight.split(list(model.values()))))
    have = [folded(w, [found[path].term(1.0, torch.float64)]) for path, w in each.items()]
    torch.testing.assert_close(torch.cat(have), want, **EXACT)


def test_what_is_of_a_whole_weight_alone_is_refused():
    rescaled = {path: dora(rows, IN) for path, rows in SPLIT.items()}
    q, k, _ = rescaled
    with pytest.raises(
        FileError, match=r"dora is of all rows of a weight, and of .*k_proj.* tells"
    ):
        fitted({p: v for p, v in rescaled.items() if p != k}, FUSED)
    with pytest.raises(FileError, match="an update of kind dora as this one is of its whole"):
        fitted({**rescaled, k: lora(KV, IN)}, FUSED)
    whole = dora(16, IN)
    over = {**whole.held, "lora_magnitude": torch.rand(1, IN)}
    with pytest.raises(FileError, match="an update of kind dora as this one is of its whole"):
        fitted({next(iter(FUSED)): KindUpdate("dora", over)}, SPLIT)


@pytest.mark.parametrize("kind", KINDS)
def test_other_inputs_are_another_models(kind):
    values = {path: KINDS[kind](rows, IN + 2 * (rows == Q)) for path, rows in SPLIT.items()}
    with pytest.raises(FileError, match="q_proj: an update of .* does not fit the weight"):
        fitted(values, FUSED)


EXPERTS = "model.layers.0.mlp.experts"
ONE_BY_ONE = {
    f"{EXPERTS}.{e}.{n}_proj": 4 for e in range(3) for n in ("gate", "up")
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", (False, True))
@pytest.mark.parametrize("input_first", (False, True))
def test_single_experts_onto_their_stack(kind, lost, input_first):
    values = {path: KINDS[kind](rows, IN) for path, rows in ONE_BY_ONE.items()}
    if lost:
        values = {path: value for path, value in values.items() if ".1." not in path}
    shape = (3, IN, 8) if input_first else (3, 8, IN)
    slot = Slot(shape, "stack", "parameter", input_first=input_first)
    file = adapter(values)
    if kind == "dora" and (lost or input_first):
        with pytest.raises(FileError, match="kind dora is of (all|one)"):
            formats.fit(file, {f"{EXPERTS}.gate_up_proj": slot}, Options(), "a")
        return
    value = formats.fit(file, {f"{EXPERTS}.gate_up_proj": slot}, Options(), "a").values()
    own = value[f"{EXPERTS}.gate_up_proj"]
    weights = {path: torch.randn(4, IN) for path in ONE_BY_ONE}
    new = [become(values[p], w) if p in values else w for p, w in weights.items()]
    stacks = [torch.cat(each).view(3, 8, IN) for each in (list(weights.values()), new)]
    base, want = (one.mT.contiguous() if input_first else one for one in stacks)
    torch.testing.assert_close(folded(base, [own.term(1.0, torch.float64)]), want, **EXACT)


@pytest.mark.parametrize("kind", ("lora", "dora", "difference"))
def test_a_stack_onto_single_experts(kind):
    each = [KINDS[kind](8, IN) for _ in range(3)]
    tensors = {n: torch.stack([one.tensors()[n] for one in each]) for n in each[0].tensors()}
    one = each[0]
    stack = (
        Update(**tensors, scale=one.scale, layout="stack")
        if kind == "lora"
        else KindUpdate(kind, tensors, one.scale, (3, 8, IN), "stack")
    )
    found = fitted({f"{EXPERTS}.gate_up_proj": stack}, ONE_BY_ONE)
    for number, value in enumerate(each):
        weight = torch.randn(8, IN)
        want = become(value, weight)
        names = [f"{EXPERTS}.{number}.{n}_proj" for n in ("gate", "up")]
        have = [
            folded(rows.contiguous(), [found[name].term(1.0, torch.float64)])
            for name, rows in zip(names, weight.split(4))
        ]
        torch.testing.assert_close(torch.cat(have), want, **EXACT)


LYCORIS = {
    "dora": {"lora_down.weight": (2, IN), "lora_up.weight": (24, 2), "dora_scale": (24, 1)},
    "loha": {f"hada_w{n}_{s}": {"a": (24, 2), "b": (2, IN)}[s] for n in (1, 2) for s in "ab"},
    "lokr": {"lokr_w1": (4, 2), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, IN // 2)},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_lycoris_file_of_a_fused_layer(kind, tmp_path):
    """Read, converted and written back under the original names, where it is fused again."""
    stem = "lora_unet_single_blocks_0_linear1"
    state = {f"{stem}.{name}": torch.randn(shape) for name, shape in LYCORIS[kind].items()}
    state = {name: tensor.float().abs() for name, tensor in state.items()}
    save_file({**state, f"{stem}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    slots = {path: Slot((rows, IN), "matrix", "linear") for path, rows in SINGLE.items()}
    own = formats.FORMATS["kohya"].read(
        Content({**state, f"{stem}.alpha": torch.tensor(3.0)}), None, Options()
    )
    value = next(iter(own.values().values()))
    weights = {path: torch.randn(rows, IN) for path, rows in SINGLE.items()}
    whole = torch.cat(list(weights.values()))
    want = folded(whole, [value.term(1.0, torch.float64)])
    found = adapters.read_adapter(tmp_path / "a.safetensors", slots)
    have = [folded(w, [found.values()[p].term(1.0, torch.float64)]) for p, w in weights.items()]
    torch.testing.assert_close(torch.cat(have), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("to", ("kohya", "comfyui"))
@pytest.mark.parametrize("kind", (*KINDS, "each another"))
def test_every_kind_is_written_under_names_that_are_fused(kind, to, tmp_path):
    """q, k, v and the MLP of FLUX's single blocks are one weight for these tools."""
    makes = [lora, loha, lokr(2, True), difference] if kind == "each another" else [KINDS[kind]] * 4
    slots = {path: Slot((rows, IN), "matrix", "linear") for path, rows in SINGLE.items()}
    values = {p: make(rows, IN) for make, (p, rows) in zip(makes, SINGLE.items())}
    values = fitted(values, SINGLE)
    base = slots if to == "comfyui" else formats.original_of(slots)
    out = tmp_path / "a.safetensors"
    if (kind, to) == ("dora", "comfyui"):
        with pytest.raises(FileError, match="ComfyUI divides by another norm"):
            adapters.write_adapter(adapter(values), out, to, base)
        return
    adapters.write_adapter(adapter(values), out, to, base)
    assert any("linear1" in key for key in load_file(out))
    found = adapters.read_adapter(out, slots).values()
    for path, value in values.items():
        weight = torch.randn(value.shape)
        have = folded(weight, [found[path].term(1.0, torch.float64)])
        torch.testing.assert_close(have, become(value, weight), **EXACT)


SIZES = [(), (3,), (0, 2), (1, 1), (2, 6), (5, 2), (16, 6), (2, 6, 1), (4, 4, 6)]


@pytest.mark.parametrize("layout", ("matrix", "transposed", "stack"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ("apart", "fused"))
def test_tensors_that_do_not_fit_are_refused_in_a_sentence(case, kind, layout):
    file, model = CASES[case]
    refused = 0
    for path, size in itertools.product(file, SIZES):
        values = {p: KINDS[kind](rows, IN) for p, rows in file.items()}
        for name in values[path].tensors():
            bad = {**values[path].tensors(), name: torch.ones(size)}
            change = bad if kind == "lora" else {"held": bad}
            odd = replace(values[path], **change, layout=layout)
            try:
                fitted({**values, path: odd}, model)
            except FileError:
                refused += 1
    assert refused > 5


class Sine(Loha):
    """A change of its own, whose rows it does not tell."""

    method = "sine"
    parts = {name.replace("hada", "sine"): part for name, part in Loha.parts.items()}

    @staticmethod
    def change(parts):
        return Loha.change({name.replace("sine", "hada"): one.sin() for name, one in parts.items()})

    @classmethod
    def rank_of(cls, held):
        return held["sine_w1_b"].shape[0]

    @classmethod
    def options_of(cls, held):
        return ()


class Gained(LowRank):
    """A low-rank sum times a number for each output, which `of_rows` of the former leaves out."""

    method = "gained"
    parts = {**LowRank.parts, "lora_gain": "weight"}

    def forward(self, weight):
        raise NotImplementedError

    @staticmethod
    def term_of(parts, gain, layout):
        raise NotImplementedError


@pytest.mark.parametrize("file, model", ((FUSED, SPLIT), (SPLIT, FUSED)), ids=("apart", "fused"))
def test_a_kind_of_ones_own_is_had_as_its_change_or_refused(file, model):
    """What it inherits is of another weight."""
    makes = {
        Sine: lambda rows: {
            name.replace("hada", "sine"): one for name, one in loha(rows, IN).held.items()
        },
        Gained: lambda rows: {**lora(rows, IN).tensors(), "lora_gain": torch.rand(rows, 1)},
    }
    for kind, make in makes.items():
        register(kind)
        try:
            held = {path: make(rows) for path, rows in file.items()}
            values = {path: KindUpdate(kind.method, one, 0.7) for path, one in held.items()}
            if kind is Gained:
                with pytest.raises(FileError, match="gained as this one is of its whole weight"):
                    fitted(values, model)
                continue
            found = fitted(values, model)
            assert {value.method for value in found.values()} == {"difference"}
            want = torch.cat([0.7 * Sine.change(one) for one in held.values()])
            have = torch.cat([found[path].held["lora_diff"] for path in model])
            torch.testing.assert_close(have, want, **EXACT)
        finally:
            unregister(kind.method)
