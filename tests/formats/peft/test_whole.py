"""Whole tensors, biases, LoHa and LoKr written to peft: what it loads acts the same."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paramlora
from paramlora import FileError, files, formats
from paramlora.update.value import Adapter
from tests.formats import foreign
from tests.formats.peft.test_reading import close, in_peft, opened, saved

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """Layers of all kinds, a norm with statistics, and names that end one in another."""

    def __init__(self):
        super().__init__()
        self.every = foreign.Every()
        self.norm, self.bn = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.head, self.last = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5))
        self.last.other_norm = nn.LayerNorm(5)
        self.table = nn.Parameter(torch.randn(5, 5))

    def forward(self, tokens):
        x = self.every(tokens)[:, :6]
        return self.last(self.head(self.bn(self.norm(x)))) @ self.table


def net():
    torch.manual_seed(0)
    return Net().double().requires_grad_(False).eval()


def trained(config, seed=1, name="default", model=None):
    model = net() if model is None else model
    paramlora.attach(model, config, name)
    torch.manual_seed(seed)
    for parameter in paramlora.trainable_parameters(model, adapter=name):
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


LOW = {"every.linear": {"r": 2, "scale": 0.7}, "every.conv2": {"r": 1}}
WHOLES = {
    "a head": {"head": {"whole": True}},
    "two modules": {"head": {"whole": True}, "every.hf": {"whole": True}},
    "a norm and its statistics": {"bn": {"whole": True}},
    "biases of adapted layers": {"every.linear.bias": {"whole": True}},
    "biases": {"every.linear.bias": {"whole": True}, "head.bias": {"whole": True}},
    "all": {"re:.*bias": {"whole": True}, "bn": {"whole": True}, "head": {"whole": True}},
}


@pytest.mark.parametrize("name", WHOLES)
def test_what_is_written_acts_in_peft(name, tmp_path):
    config = dict(WHOLES[name])
    if name == "all":
        config = {k: v for k, v in config.items() if k != "re:.*bias"}
        config |= {f"{path}.bias": {"whole": True} for path in ("every.conv2", "norm", "every.hf")}
    model = trained({**LOW, **config})
    assert (model(foreign.TOKENS) - net()(foreign.TOKENS)).abs().max() > 0.01
    base, adapter = formats.base_of(net()), paramlora.adapter_of(model)
    folder = saved(tmp_path / "a", formats.write(adapter, "peft", base))
    theirs = in_peft(net(), folder)
    close(theirs(foreign.TOKENS), model(foreign.TOKENS))
    back = formats.read(opened(folder), base)
    assert back.whole.keys() == adapter.whole.keys()
    assert all(torch.equal(back.whole[p], t) for p, t in adapter.whole.items())
    close(paramlora.load_adapter(net(), folder)(foreign.TOKENS), model(foreign.TOKENS))
    close(theirs.merge_and_unload()(foreign.TOKENS), model(foreign.TOKENS))


def test_each_adapter_has_its_own(tmp_path):
    heads = {"first": {**LOW, "head": {"whole": True}}, "second": {**LOW, "bn": {"whole": True}}}
    base, wanted = formats.base_of(net()), {}
    model = net()
    for seed, (name, config) in enumerate(heads.items()):
        trained(config, seed, name, model)
    for name in heads:
        adapter = paramlora.adapter_of(model, name)
        saved(tmp_path / name, formats.write(adapter, "peft", base))
        wanted[name] = paramlora.attach_adapter(net(), adapter)(foreign.TOKENS)
    theirs = in_peft(net(), tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_adapter(tmp_path / "second", "second", autocast_adapter_dtype=False)
    theirs.eval()
    close(theirs(foreign.TOKENS), wanted["first"])
    theirs.set_adapter("second")
    close(theirs(foreign.TOKENS), wanted["second"])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"table": {"whole": True}}, "table: a parameter that is trained whole, and PEFT keeps"),
        ({"norm": {"whole": True}}, "norm: .*its name ends that of last.other_norm, which PEFT"),
        (
            {"head.weight": {"whole": True}},
            r'head: PEFT saves whole modules, and its bias is not.*"head": {"whole": true}',
        ),
    ],
)
def test_what_peft_does_not_hold_is_refused(config, text):
    adapter = paramlora.adapter_of(trained({**LOW, **config}))
    with pytest.raises(FileError, match=text):
        formats.write(adapter, "peft", formats.base_of(net()))


def test_a_classifier_is_found_by_auto_peft_model(tmp_path):
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    entries = {"query": {"r": 2}, "classifier": {"whole": True}, "bert.pooler.dense": {"r": 1}}
    model = trained(entries, model=copy.deepcopy(base))
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    told = {"task_type": "SEQ_CLS", "base_model_name_or_path": str(tmp_path / "base")}
    known = formats.base_of(base)
    files.convert(tmp_path / "a.safetensors", tmp_path / "peft", "peft", known, metadata=told)
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft").eval()
    ids = torch.arange(8)[None]
    want = model(ids).logits
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - base(ids).logits).abs().max() > 0.05


def images():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 24, 3), nn.Tanh(), nn.Conv2d(24, 8, 1), nn.Flatten(1, 2), nn.Conv1d(24, 6, 3),
        nn.Flatten(), nn.Linear(6, 40), nn.Linear(40, 5),
    )  # fmt: skip
    return net.double().requires_grad_(False).eval()


IMAGE = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)).double()
PRODUCTS = {
    "loha": {"kind": "loha", "r": 2, "scale": 0.7},
    "loha tucker": {"kind": "loha", "r": 2, "tucker": True},
    "lokr": {"kind": "lokr", "r": 2, "scale": 0.6},
    "lokr factor": {"kind": "lokr", "r": 1, "factor": 2},
    "lokr whole": {"kind": "lokr", "r": 1, "full_matrix": True, "scale": 1.5},
    "lokr both": {"kind": "lokr", "r": 1, "decompose_both": True, "factor": 2},
    "lokr tucker": {"kind": "lokr", "r": 1, "tucker": True},
}
# of a Conv1d of 24 inputs and 6 outputs: peft multiplies a whole second factor in another order
CONV1D = {
    **{name: entry for name, entry in PRODUCTS.items() if name != "lokr whole"},
    "lokr": {"kind": "lokr", "r": 2, "scale": 0.6},  # 2 < 6 / 2
    "lokr long": {"kind": "lokr", "r": 3, "factor": 2, "full_matrix": True, "scale": 1.5},
    "lokr long both": {"kind": "lokr", "r": 2, "factor": 2, "decompose_both": True, "scale": 0.3},
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_act_in_peft(name, tmp_path):
    entry = PRODUCTS[name]
    config = {"0": entry, "2": entry, "6": {**entry, "r": 3}, "7": {"whole": True}}
    if name in CONV1D:
        config["4"] = entry
    model = trained(config, model=images())
    assert (model(IMAGE) - images()(IMAGE)).abs().max() > 0.05
    base = formats.base_of(images())
    folder = saved(tmp_path / "a", formats.write(paramlora.adapter_of(model), "peft", base))
    close(in_peft(images(), folder)(IMAGE), model(IMAGE))
    close(paramlora.load_adapter(images(), folder)(IMAGE), model(IMAGE))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", CONV1D)
def test_products_of_a_conv1d_act_in_peft(name, kernel, tmp_path):
    def lines():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv1d(24, 6, kernel), nn.Conv1d(6, 40, kernel))
        return net.double().requires_grad_(False)

    x = torch.randn(2, 24, 9, generator=torch.Generator().manual_seed(1)).double()
    model = trained({"0": CONV1D[name], "1": CONV1D[name]}, model=lines())
    assert (model(x) - lines()(x)).abs().max() > 0.02
    written = formats.write(paramlora.adapter_of(model), "peft", formats.base_of(lines()))
    folder = saved(tmp_path / "a", written)
    close(in_peft(lines(), folder)(x), model(x))
    back = paramlora.load_adapter(lines(), folder)
    close(back(x), model(x))
    assert {row.kind for row in paramlora.summary(back).rows} == {CONV1D[name]["kind"]}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"0": PRODUCTS["loha"], "6": PRODUCTS["lokr"]}, "loha and lokr, and PEFT has one kind"),
        ({"0": PRODUCTS["loha"], "6": {"r": 2}}, "6: beside a folder of loha, which PEFT does not"),
        (
            {"0": PRODUCTS["loha"], "6.bias": {"whole": True}},
            "6.bias: beside a folder of loha, which PEFT does not",
        ),
        (
            {"6": {**PRODUCTS["lokr"], "factor": 2}, "7": {**PRODUCTS["lokr"], "factor": 5}},
            r"7: its factors are of \(\(1, 5\), .* no decompose_factor of PEFT gives together with",
        ),
        ({"4": PRODUCTS["lokr whole"]}, r"4: lokr of a Conv1d whose second .*\[3, 6, 3\], PEFT"),
    ],
)
def test_products_that_peft_does_not_hold_are_refused(config, text):
    adapter = paramlora.adapter_of(trained(config, model=images()))
    with pytest.raises(FileError, match=text):
        formats.write(adapter, "peft", formats.base_of(images()))


def test_without_the_model_a_product_of_unknown_shape_is_refused(tmp_path):
    value = paramlora.adapter_of(trained({"6": PRODUCTS["loha"]}, model=images())).others["6"]
    save_file(value.held, tmp_path / "x.safetensors")
    unknown = Adapter({}, others={"6": type(value)("loha", value.held, 0.7)})
    with pytest.raises(FileError, match=r"6: loha of a matrix of shape \[\].*give the model"):
        formats.write(unknown, "peft")
