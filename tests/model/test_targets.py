"""Which tensors an entry means, and what is said where it does not fit: everything that is wrong,
and what there is."""

import json
import re
import sys
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import paramlora
from paramlora import ConfigError, LoRAConfig, ParamloraWarning, TargetError, targets
from tests.config.generated import COMMON
from tests.model.chosen import R, chosen, net

transformers = pytest.importorskip("transformers")


class Thin(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.wide = nn.Linear(32, 32)


@pytest.mark.parametrize("pattern", ["re:.*", "*", "re:.*(token|weight)"])
def test_thin_tensors_are_listed_all_at_once(pattern):
    model = Thin()
    config = {pattern: {"r": 16}}
    if pattern == "*":
        config = {"re:(?!wide).*": {"r": 16}}
    told = (
        r"r = 16 is more than 2 tensors hold.*cls_token \(1\), depthwise \(9\).*entry of their own"
    )
    with pytest.raises(TargetError, match=told):
        paramlora.attach(model, config)
    own = {"cls_token": {"r": 1}, "depthwise": {"r": 9}}  # the way out
    assert len(paramlora.targets(model, config | own)) == 3 - (pattern == "*")


def test_many_thin_tensors_are_counted():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))
    with pytest.raises(TargetError, match=r"more than 30 tensors hold.*11 \(4\) and 18 more"):
        paramlora.attach(model, {"re:.*": {"r": 5}})


def test_a_recurrent_layer_says_that_all_of_it_can_be_named():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2)})
    with pytest.raises(
        TargetError, match=r'for example lstm.weight_ih_l0, or all of it: "lstm.\*"\.'
    ):
        paramlora.attach(model, {"lstm": {"r": 2}})
    assert len(paramlora.targets(model, {"lstm.*": {"r": 2}})) == 4


def test_a_container_of_containers_does_not_say_so():
    model = nn.ModuleDict({"deep": nn.Sequential(nn.Sequential(nn.Linear(2, 2)))})
    with pytest.raises(TargetError, match=r"for example deep.0.0.weight\.$"):
        paramlora.attach(model, {"deep": {"r": 2}})
    with pytest.raises(TargetError):
        paramlora.attach(model, {"deep.*": {"r": 2}})


def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config)


def test_a_name_of_another_family_gets_the_names_that_there_are():
    told = r'"q_proj" matches nothing. There are: .*query, key, value \(2 layers each\)'
    with pytest.raises(TargetError, match=told):
        paramlora.attach(bert(), {"q_proj": {"r": 2}})
    with pytest.warns(paramlora.ParamloraWarning, match=told):
        paramlora.targets(bert(), {"q_proj": {"r": 2}, "query": {"r": 2}})
    with pytest.raises(TargetError, match='Closest: "query"'):
        paramlora.attach(bert(), {"qery": {"r": 2}})


def test_names_without_an_end_are_cut():
    model = nn.ModuleDict({f"layer{n}x": nn.Linear(2, 2) for n in range(40)})
    with pytest.raises(TargetError) as told:
        paramlora.attach(model, {"zz": {"r": 1}})
    assert "layer11x" in str(told.value) and "layer12x" not in str(told.value)
    assert str(told.value).endswith("(1 layer each), and more.")


@pytest.mark.parametrize("call", [paramlora.attach, paramlora.targets])
def test_swapped_arguments_do_not_print_the_model(call):
    with pytest.raises(ConfigError) as told:
        call({"0": {"r": 2}}, nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))))
    assert "got a Sequential. The model comes first" in str(told.value)
    assert len(str(told.value)) < 200
    with pytest.raises(ConfigError, match="got a NoneType"):
        call(nn.Linear(2, 2), None)


@pytest.mark.parametrize(
    "model, told, name",
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "There are: 0, 1 (1 layer each).", "1"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2))), "There are: 0 (1 layer).", "0"),
        (nn.Linear(2, 2), "There are: weight (1 layer).", "weight"),
        (nn.LayerNorm(2), '"q_proj" matches nothing.', None),
    ],
    ids=["numbers", "deep", "one layer", "nothing to adapt"],
)
def test_what_there_is_is_said_where_layers_have_no_names(model, told, name):
    with pytest.raises(TargetError, match='"q_proj" matches nothing') as error:
        paramlora.attach(model, {"q_proj": {"r": 1}})
    assert str(error.value).endswith(told)
    if name is not None:  # what it says can be named
        assert paramlora.targets(model, {name: {"r": 1}})


class Whole(nn.Module):
    """A layer of integers, with a bias beside them."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        weight = torch.ones(3, 4, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize("name", ["*", "re:.*", "deep.*"])
def test_a_pattern_that_finds_only_what_cannot_be_adapted_says_why(name):
    model = nn.ModuleDict({"deep": nn.ModuleDict({"norm": nn.LayerNorm(3), "layer": Whole()})})
    with pytest.raises(TargetError) as told:
        paramlora.attach(model, {name: {"r": 1}})
    start = f'"{name}" matches deep.layer.weight, of type torch.int8: a hard update needs one of '
    assert str(told.value).startswith(start)


def block():
    return nn.ModuleDict({n: nn.Linear(4, 4) for n in ("to_q", "not_to_q")})


def test_names_match_whole_components():
    model = nn.ModuleDict({"attn1": block(), "attn2": block()})
    paths = [t.path for t in targets(model, {"to_q": {"r": 1}})]
    assert paths == ["attn1.to_q", "attn2.to_q"]
    both = {"to_q": {"r": 1}, "attn1.to_q": {"r": 2}}
    assert [t.entry.r for t in targets(model, both)] == [2, 1]


def test_empty_containers_and_claims():
    model = nn.ModuleDict({"attn1": block()})
    with pytest.raises(TargetError, match=r'"to_qq" matches nothing. Closest: "to_q" \(1 lay'):
        targets(model, {"to_qq": {"r": 1}})
    with pytest.warns(ParamloraWarning, match='"to_vv" matches nothing'):
        targets(model, {"to_q": {"r": 1}, "to_vv": {"r": 1}})
    with pytest.raises(TargetError, match="attn1, a ModuleDict"):
        targets(model, {"attn1": {"r": 1}})
    with pytest.raises(TargetError, match="claim it equally"):
        targets(model, {"attn1.to_q": {"r": 1}, "*.to_q": {"r": 1}})


def test_matching_grows_with_the_model_not_with_its_square(monkeypatch):
    """An entry for every layer, as a loaded file has: each pattern meets few paths."""
    from paramlora import targets as module

    calls = []
    original = sys.modules["paramlora.model.targets"].fits
    monkeypatch.setattr(
        sys.modules["paramlora.model.targets"], "fits", lambda *a: calls.append(a) or original(*a)
    )
    assert module is targets
    model = nn.ModuleDict({f"layer{i}": block() for i in range(50)})
    config = {f"layer{i}.to_q": {"r": 1} for i in range(50)}
    assert len(targets(model, config)) == 50
    assert len(calls) <= 50 * 50 * 2  # candidates share their last component
    calls.clear()
    named = nn.ModuleDict({f"a{i}": nn.Linear(4, 4) for i in range(50)})
    assert len(targets(named, {f"a{i}": {"r": 1} for i in range(50)})) == 50
    assert len(calls) <= 50 * 2


# matching

WORDS = st.sampled_from(["a", "b", "to_q", "not_to_q", "q", "0"])
PATHS = st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=8)


def tree(paths):
    """Containers all along, and a Linear at every end that lies under no other end."""
    ends = sorted({tuple(path) for path in paths})
    ends = [p for p in ends if not any(q != p and q[: len(p)] == p for q in ends)]
    root = nn.ModuleDict()
    for path in ends:
        at = root
        for word in path[:-1]:
            if word not in at:
                at[word] = nn.ModuleDict()
            at = at[word]
        at[path[-1]] = nn.Linear(3, 2, bias=False)
    return root, ends


@COMMON
@given(PATHS, st.lists(WORDS | st.sampled_from(["*", "weight"]), min_size=1, max_size=3))
def test_an_entry_matches_exactly_the_layers_whose_path_ends_in_it(paths, suffix):
    model, ends = tree(paths)
    pattern = re.compile(r"(?:.*\.)?" + r"\.".join("[^.]+" if s == "*" else s for s in suffix))
    # an entry names a layer, or with one component more its tensor
    names = {".".join(end): ".".join((*end, "weight")) for end in ends}
    want = {n for n, tensor in names.items() if pattern.fullmatch(n) or pattern.fullmatch(tensor)}
    config = {".".join(suffix): {"r": 1}}
    if want:
        found = targets(model, config)
        assert {t.path for t in found} == want and len(found) == len(want)
        assert all(t.tensor == "weight" and t.shape == (2, 3) for t in found)
    else:
        with pytest.raises(TargetError):
            targets(model, config)


@COMMON
@given(PATHS, st.sets(st.lists(WORDS, min_size=1, max_size=3).map(tuple), min_size=2, max_size=4))
def test_the_longest_entry_claims_a_layer(paths, suffixes):
    model, ends = tree(paths)
    ordered = sorted(suffixes)
    want = {}
    for end in ends:
        hits = [s for s in ordered if end[-len(s) :] == s]
        if hits:
            want[".".join(end)] = ".".join(max(hits, key=len))
    assume(want)
    containers = {name for name, m in model.named_modules() if name and not hasattr(m, "weight")}
    matched = {s: any(end[-len(s) :] == s for end in ends) for s in ordered}
    for suffix in ordered:
        inner = any(tuple(name.split("."))[-len(suffix) :] == suffix for name in containers)
        assume(matched[suffix] or not inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = targets(model, {".".join(s): {"r": 1} for s in ordered})
    assert {t.path: t.entry.name for t in found} == want
    missed = {".".join(s) for s in ordered if not matched[s]}
    text = " ".join(str(w.message) for w in caught if w.category is ParamloraWarning)
    assert {s for s in re.findall(r'"([^"]+)" matches nothing', text)} == missed


def test_what_is_excluded_belongs_to_no_entry():
    linear = {"type:Linear": R}
    assert chosen(net(), {**linear, "exclude": ["head", "attn"]}) == {
        "type:Linear": ["a.up", "b.up"]
    }
    assert chosen(net(), {**linear, "exclude": ["a", "b.attn.*"]}) == {
        "type:Linear": ["b.up", "head"]
    }
    assert chosen(net(), {**linear, "exclude": ["re:.*attn", "type:Narrow"]}) == {
        "type:Linear": ["head"]
    }
    assert (
        chosen(net(), {**linear, "exclude": ["up.weight", "head"]})["type:Linear"][0]
        == "a.attn.out_proj"
    )
    whole = {"a": {"whole": 1}, "exclude": ["bias", "type:LayerNorm", "a.attn"]}
    assert chosen(net(), whole) == {"a": ["a.mine.table", "a.mine.shift", "a.up"]}
    assert chosen(net(), {**linear, "exclude": ["all-linear"], "mine.table": R}).keys() == {
        "mine.table"
    }


def test_an_exclude_is_read_written_and_compared():
    config = LoRAConfig.from_dict({"exclude": ["head", "head", "re:.*b"], "*": R})
    assert config.exclude == ("head", "re:.*b")
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != LoRAConfig.from_dict({"*": R})
    assert "exclude" not in LoRAConfig.from_dict({"*": R}).to_dict()
    layer = nn.ModuleDict({"exclude": nn.Linear(2, 2)})
    assert chosen(layer, {"exclude": R}) == {"exclude": ["exclude"]}  # a layer that is called so


@pytest.mark.parametrize("value", ["head", [], [1], [""], None, {"head": 1}, {}, 0, [["head"]]])
def test_another_exclude_is_refused(value):
    with pytest.raises(
        ConfigError, match=r'config: "exclude" must be a list of names such as \["lm_head"\], got'
    ):
        LoRAConfig.from_dict({"up": R, "exclude": value})


def test_an_exclude_that_names_nothing_or_everything_is_told():
    with pytest.warns(
        ParamloraWarning, match='"heat" in "exclude" matches nothing. Closest: "head"'
    ):
        chosen(net(), {"up": R, "exclude": ["heat"]})
    with pytest.raises(
        TargetError, match='"heat" in "exclude" matches nothing.*Remove it, or leave str'
    ):
        chosen(net(), {"up": R, "exclude": ["heat"]}, strict=True)
    with pytest.raises(TargetError, match='"head" matches nothing but what "exclude" leaves out'):
        chosen(net(), {"head": R, "exclude": ["head"]})
    with pytest.raises(
        TargetError, match='"type:Linear" matches nothing but what "exclude" leaves out'
    ):
        chosen(net(), {"type:Linear": R, "exclude": ["*"]})
    with pytest.raises(ConfigError, match=r'"re:\(" in "exclude": not a regular expression'):
        LoRAConfig.from_dict({"up": R, "exclude": ["re:("]})
    with pytest.raises(ConfigError, match='expected an object.*Did you mean "exclude"'):
        LoRAConfig.from_dict({"exclud": ["a"], "up": R})


def test_an_excludes_pattern_takes_bounded_time():
    """Python's own matcher would try for longer than the world is old."""
    model = nn.ModuleDict({"a" * 60: nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    left = {"type:Linear": ["b"]}
    assert chosen(model, {"type:Linear": R, "exclude": ["re:((a|a?)+)+"]}) == left
    with pytest.warns(ParamloraWarning, match="matches nothing"):
        both = chosen(model, {"type:Linear": R, "exclude": ["re:((a+)+)+c"]})
    assert len(both["type:Linear"]) == 2
    with pytest.raises(ConfigError, match='"exclude": .*bounded time.*Give a plain name'):
        chosen(model, {"type:Linear": R, "exclude": [r"re:(a)\1"]})


def test_the_narrowest_entry_counts():
    config = {
        "all-linear": R,
        "type:Narrow": R,
        "attention": R,
        r"re:a\.attn\.out_proj": R,
        "b.up": R,
    }
    assert chosen(net(), config) == {
        "all-linear": ["head"],
        "type:Narrow": ["a.up"],
        "attention": ["b.attn.out_proj", "a.attn.in_proj_weight", "b.attn.in_proj_weight"],
        r"re:a\.attn\.out_proj": ["a.attn.out_proj"],
        "b.up": ["b.up"],
    }
    with pytest.raises(TargetError, match='"type:Linear" and "type:Narrow" claim it equally'):
        chosen(net(), {"type:Linear": R, "type:Narrow": R})


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "convolution": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: nn.Embedding(7, 6),
}
ENTRIES = {
    "hard": {"r": 2},
    "soft": {"r": 2, "hard": 0},
    "soft, two kernels": {"r": 2, "hard": 0, "up_kernel": "same"},
    "started by the weight": {"r": 2, "init": "pissa"},
    "dora": {"r": 2, "kind": "dora"},
    "loha": {"r": 2, "kind": "loha"},
    "lokr": {"r": 1, "kind": "lokr"},
    "rows": {"rows": [1, 3]},
    "difference": {"kind": "difference"},
    "whole": {"whole": 1},
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_dry_run_counts_what_attaching_makes(layer, entry):
    plain = {"linear": "two kernels", "embedding": "soft"}.get(layer)
    if plain and plain in entry:
        pytest.skip("a convolution's")
    model = nn.Sequential(LAYERS[layer]())
    told = sum(target.parameters for target in targets(model, {"0": ENTRIES[entry]}))
    paramlora.attach(model, {"0": ENTRIES[entry]})
    assert told == sum(p.numel() for p in paramlora.trainable_parameters(model))
