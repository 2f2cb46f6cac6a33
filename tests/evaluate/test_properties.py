"""Properties over generated configurations, garbage and module trees."""

import copy
import json
import re
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from paramlora import (
    ConfigError,
    LoRAConfig,
    ParamloraError,
    ParamloraWarning,
    TargetError,
    attach,
    summary,
    targets,
)
from paramlora.config import ALLOWED

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

COMMON = settings(max_examples=150, deadline=None, database=None)
FEWER = settings(max_examples=40, deadline=None, database=None)

NAMES = st.text(min_size=1, max_size=12).filter(lambda s: s != "trainable_model")
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
FLAGS = st.sampled_from([0, 1, False, True])

ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"r": st.integers(1, 4096)},
        optional={"scale": FLOATS | st.integers(-99, 99), "trainable_scale": FLAGS},
    ),
    st.fixed_dictionaries(
        {"r": st.integers(1, 4096), "alpha": FLOATS},
        optional={"hard": st.sampled_from([1, True])},
    ),
    st.fixed_dictionaries(
        {"r": st.integers(1, 64), "hard": st.sampled_from([0, False])},
        optional={"up_kernel": st.sampled_from([1, "same"]), "trainable_scale": FLAGS},
    ),
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(ALLOWED), inner, max_size=3)
    ),
    max_leaves=6,
)
GARBAGE = JSON | st.dictionaries(st.sampled_from(ALLOWED), JSON, max_size=4)
NEARLY = st.fixed_dictionaries(
    {"r": st.integers(-1, 3) | JSON}, optional={key: JSON for key in ALLOWED if key != "r"}
)


@COMMON
@given(st.dictionaries(NAMES, ENTRIES, min_size=1, max_size=4), FLAGS)
def test_a_config_survives_its_dict_and_json(entries, trainable):
    config = LoRAConfig.from_dict({"trainable_model": trainable, **entries})
    assert LoRAConfig.from_dict(config.to_dict()) == config
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [entry.name for entry in config.entries] == list(entries)
    assert config.trainable_model is bool(trainable)
    for entry, given_entry in zip(config.entries, entries.values()):
        assert entry.r == given_entry["r"]
        if "alpha" in given_entry:
            assert entry.scale == given_entry["alpha"] / given_entry["r"]
        else:
            assert entry.scale == given_entry.get("scale", 1)
        assert entry.hard is bool(given_entry.get("hard", 1))
        assert entry.up_kernel == given_entry.get("up_kernel", 1)


def check_valid(config):
    assert isinstance(config.trainable_model, bool) and config.entries
    for entry in config.entries:
        assert type(entry.r) is int and entry.r >= 1
        assert type(entry.scale) is float and abs(entry.scale) < float("inf")
        assert type(entry.hard) is bool and type(entry.trainable_scale) is bool
        assert entry.up_kernel == "same" or type(entry.up_kernel) is int and entry.up_kernel == 1
    assert LoRAConfig.from_dict(config.to_dict()) == config


@COMMON
@given(GARBAGE | NEARLY)
def test_any_json_value_of_an_entry_is_valid_or_a_config_error(value):
    try:
        config = LoRAConfig.from_dict({"to_q": value})
    except ConfigError as error:
        assert str(error).startswith("config") and len(str(error)) > 20
    else:
        check_valid(config)


@COMMON
@given(GARBAGE)
def test_any_json_value_as_a_whole_is_valid_or_a_config_error(value):
    try:
        config = LoRAConfig.from_dict(value)
    except ConfigError:
        return
    check_valid(config)


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


# errors leave nothing behind


def fingerprint(model):
    """Identities, so that an equal copy of something counts as a change."""
    return [
        (
            path,
            id(module),
            type(module),
            module.training,
            list(module._modules),
            [(n, id(p), getattr(p, "requires_grad", None)) for n, p in module._parameters.items()],
            [(p.data_ptr(), p.tolist()) for p in module._parameters.values() if p is not None],
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            sorted(module.__dict__),
        )
        for path, module in model.named_modules()
    ]


def mixed():
    model = nn.ModuleDict(
        {
            "to_q": nn.Linear(3, 2),
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.LayerNorm(3),
            "table": nn.Embedding(5, 3),
            "block": nn.ModuleDict({"to_q": nn.Linear(3, 3), "attn": nn.MultiheadAttention(4, 2)}),
            "lstm": nn.LSTM(3, 2),
        }
    )
    model["conv"].bias.requires_grad_(False)
    return model


MIXED_NAMES = st.sampled_from(
    "to_q block.to_q *.to_q conv norm table block attn out_proj in_proj_weight lstm "
    "weight_ih_l0 weight bias nothing re:.* re:block.*".split()
)
MIXED_ENTRIES = NEARLY | st.fixed_dictionaries(
    {"r": st.integers(1, 5)},
    optional={"hard": FLAGS, "up_kernel": st.sampled_from([1, "same"]), "scale": st.just(2)},
)


@pytest.mark.parametrize("attached", (False, True))
@FEWER
@given(st.dictionaries(MIXED_NAMES, MIXED_ENTRIES, min_size=1, max_size=3), st.booleans())
def test_an_error_leaves_the_model_as_it_was(attached, config, strict):
    model = mixed()
    if attached:
        attach(model, {"to_q": {"r": 1}, "conv": {"r": 1, "hard": 0}}, adapter="first")
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ParamloraWarning)
        try:
            attach(model, config, strict=strict)
        except ParamloraError:
            assert fingerprint(model) == before
        else:
            assert fingerprint(model) != before


class Interrupted:
    """Ctrl-C at the n-th line that Python runs inside some functions of the package."""

    def __init__(self, at, names):
        self.left, self.names = at, names

    def __call__(self, frame, event, _):
        if frame.f_code.co_name not in self.names or "paramlora" not in frame.f_code.co_filename:
            return None
        return self.line

    def line(self, frame, event, _):
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.line


def interrupt(at, names, call):
    """Whether `call` was interrupted."""
    tracer = sys.gettrace()
    sys.settrace(Interrupted(at, names))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


@pytest.mark.parametrize("attached", (False, True))
def test_ctrl_c_at_any_line_of_attaching_leaves_the_model_as_it_was(attached):
    config = {n: {"r": 1} for n in ("to_q", "table", "out_proj", "in_proj_weight", "*.to_q")}
    config |= {"weight_ih_l0": {"r": 1}, "conv": {"r": 1, "hard": 0}}
    model = mixed()
    parametrizations.weight_norm(model["block"]["to_q"])
    if attached:
        attach(model, {"to_q": {"r": 1}, "conv": {"r": 1, "hard": 0}}, adapter="first")
    before, lines = fingerprint(model), 0
    inside = {"_register", "_former", "shared", "add_branch", "attach"}
    whole = summary(attach(copy.deepcopy(model), config)).rows
    while interrupt(lines, inside, lambda: attach(model, config)):
        if fingerprint(model) != before:  # the last line, `return model`: all is there
            assert [row.path for row in summary(model).rows] == [row.path for row in whole]
            break
        lines += 1
    assert lines > 50
    attach(model, {"re:.*(to_q|conv)": {"r": 1}}, adapter="after")
    assert torch.is_tensor(model["to_q"](torch.ones(1, 3)))
