"""Whole tensors and biases written to peft: what it loads acts the same."""

import copy
import warnings

import pytest
import torch

import paramlora
from paramlora import FileError, files, formats
from tests.formats import foreign
from tests.formats.peft.folders import close, in_peft, opened, saved
from tests.formats.peft.wholes import net, trained

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


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
