"""peft's LoHa and LoKr folders: read as what they are, and written so that what it loads acts
the same."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import paramlora
from paramlora import FileError, formats
from paramlora.files import convert, merge
from paramlora.update.value import Adapter
from tests.formats.peft.folders import close, in_peft, saved
from tests.formats.peft.wholes import trained

peft = pytest.importorskip("peft")


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


CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=["0", "3"], init_weights=False),
    "loha tucker": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=["0", "3"], use_effective_conv2d=True, init_weights=False
    ),
    "loha by name": lambda: peft.LoHaConfig(
        r=3,
        alpha=2,
        target_modules=["0", "3"],
        rank_pattern={"3": 2},
        alpha_pattern={"3": 5},
        init_weights=False,
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["0", "3"], init_weights=False),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["0", "3"], decompose_both=True, init_weights=False
    ),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=["0", "3"], use_effective_conv2d=True, init_weights=False
    ),
}


def test_a_conv1d_of_lokr_as_peft_multiplies_it(tmp_path):
    torch.manual_seed(0)
    base, x = (
        nn.Sequential(nn.Conv1d(6, 8, 3), nn.Flatten()).double(),
        torch.randn(2, 6, 5).double(),
    )
    config = peft.LoKrConfig(r=8, alpha=3, target_modules=["0"], init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert (theirs(x) - base(x)).abs().max() > 0.01
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("without_model", (False, True))
@pytest.mark.parametrize("kind", (peft.LoHaConfig, peft.LoKrConfig))
def test_kernels_of_a_conv1d_apart_as_peft_pads_them(kind, without_model, tmp_path):
    """``use_effective_conv2d``: peft gives the kernel a second size, of 1."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Conv1d(16, 32, 3)).double(), torch.randn(2, 16, 6).double()
    config = kind(r=2, alpha=3, target_modules=["0"], use_effective_conv2d=True, init_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    found = tmp_path / "theirs"
    if without_model:
        found = tmp_path / "a.safetensors"
        convert(tmp_path / "theirs", found, "native")
    ours = paramlora.load_adapter(copy.deepcopy(base), found)
    assert (theirs(x) - base(x)).abs().max() > 0.01
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", [found], tmp_path / "out.safetensors")
    merged = paramlora.merge(ours)
    torch.testing.assert_close(merged(x), theirs(x))
    assert torch.equal(load_file(tmp_path / "out.safetensors")["0.weight"], merged[0].weight)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 40))


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_act_here_and_merge(name, tmp_path):
    base, x = small(), torch.randn(2, 4, 5, 5)
    theirs = peft.get_peft_model(copy.deepcopy(base), CONFIGS[name]()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = paramlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    kind = name.split()[0]
    assert [row.kind for row in paramlora.summary(ours).rows] == [kind, kind]
    with torch.no_grad():
        want = theirs(x)
        assert (want - base(x)).abs().max() > 1e-3
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(paramlora.merge(ours)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ("peft", "kohya", "diffusers", "comfyui", "torchtune"))
def test_an_embedding_is_called_so_where_it_is_refused(to):
    """Of all the layers' names it alone begins with a vowel."""
    model = nn.Sequential(nn.Embedding(10, 8))
    entry = {"r": 2} if to in ("diffusers", "torchtune") else {"r": 2, "kind": "loha"}
    adapter = paramlora.adapter_of(paramlora.attach(model, {"0": entry}))
    with pytest.raises(paramlora.FileError, match="an embedding"):
        formats.write(adapter, to, formats.base_of(model))
