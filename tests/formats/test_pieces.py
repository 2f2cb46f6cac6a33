"""Language models: projections fused or apart, experts in a stack or one by one."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import paramlora
from paramlora import files, formats
from paramlora.errors import FileError
from paramlora.files import adapters
from paramlora.formats import Content, Slot
from tests.formats.architectures import delta, file_of, pairs_of
from tests.formats.peft.language import IDS, glm, mixtral, qwen


@pytest.mark.parametrize("fused_model", [True, False])
def test_a_file_with_a_fused_update_and_those_of_its_parts_means_the_sum(fused_model):
    """As ComfyUI adds them: one patch of the whole weight, and one of some of its rows."""
    stem = "double_blocks.0.img_attn.qkv" if fused_model else "transformer_blocks.0.attn.to_{}"
    parts = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]
    rows = {"double_blocks.0.img_attn.qkv": 12, **dict.fromkeys(parts, 4)}
    factors = pairs_of(rows)
    names = [stem] if fused_model else [stem.format(n) for n in "qkv"]
    slots = {n: Slot((12 if fused_model else 4, 6), "matrix", "linear") for n in names}
    file = file_of(factors, "diffusion_model.", alpha=3.0)
    file.state["diffusion_model.transformer_blocks.0.attn.to_k.alpha"].fill_(6.0)
    want = delta(factors["double_blocks.0.img_attn.qkv"], 1.0)
    want[:4] += delta(factors[parts[0]], 1.0)
    want[4:8] += delta(factors[parts[1]], 2.0)
    found = formats.read(file, slots).updates
    whole = torch.cat([found[name].delta() for name in names])
    torch.testing.assert_close(whole, want, rtol=1e-12, atol=1e-12)


def test_the_same_rows_twice_are_refused_still():
    factors = pairs_of({"blocks.0.self_attn.q": 4, "blocks.0.attn1.to_q": 4})
    slots = {"blocks.0.attn1.to_q": Slot((4, 6), "matrix", "linear")}
    with pytest.raises(FileError, match="second update of blocks.0.attn1.to_q. Choose one part"):
        formats.read(file_of(factors, ""), slots)


peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
PARTS = {mixtral: ("w1", "w3", "w2"), qwen: ("gate_proj", "up_proj", "down_proj")}


def saved(model, folder):
    """A checkpoint as such models are published, experts one by one, and its tensors."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def factors_of(state, names, seed=3):
    """Random factors of every weight that ends in one of the names."""
    torch.manual_seed(seed)
    found = {}
    for key, weight in state.items():
        stem = key.removesuffix(".weight")
        if stem.rpartition(".")[2] in names and "expert" in stem:
            out, fan_in = weight.shape
            found[stem] = (torch.randn(2, fan_in) / 4, torch.randn(out, 2) / 4)
    return found


def summed(state, factors, scale):
    out = dict(state)
    for stem, (a, b) in factors.items():
        delta = scale * b.double() @ a.double()
        out[f"{stem}.weight"] = (state[f"{stem}.weight"].double() + delta).float()
    return out


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_single_experts_onto_the_stacks_that_transformers_makes_of_them(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    state = saved(model, tmp_path / "base")
    factors = factors_of(state, PARTS[make])
    assert len(factors) > 6
    (tmp_path / "peft").mkdir()
    start = "base_model.model."
    halves = {f"{start}{s}.lora_{n}.weight": t for s, f in factors.items() for n, t in zip("AB", f)}
    save_file(halves, tmp_path / "peft" / "adapter_model.safetensors")
    peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=list(PARTS[make]), base_model_name_or_path="x"
    ).save_pretrained(tmp_path / "peft")
    save_file(
        summed(state, factors, 1.5), tmp_path / "base" / "model.safetensors", {"format": "pt"}
    )
    theirs = type(model).from_pretrained(tmp_path / "base")
    ours = paramlora.load_adapter(copy.deepcopy(model), tmp_path / "peft")
    updates = paramlora.adapter_of(ours).updates
    stacks = [p for p in updates if ".experts." in p]
    assert stacks and all(updates[p].layout == "stack" for p in stacks)
    want = dict(theirs.named_parameters())
    for name, weight in paramlora.merge(copy.deepcopy(ours)).named_parameters():
        torch.testing.assert_close(weight, want[name], rtol=1e-5, atol=1e-6)
    logits = theirs(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert (logits - model(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("make", [qwen, glm], ids=lambda make: make.__name__)
def test_a_stack_onto_a_checkpoint_of_single_experts(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    state = saved(model, tmp_path / "base")
    assert any(".experts.0.gate_proj" in key for key in state)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        theirs.save_pretrained(tmp_path / "peft")
    want = theirs(input_ids=IDS).logits
    files.merge(
        tmp_path / "base" / "model.safetensors", [tmp_path / "peft"], tmp_path / "m.safetensors"
    )
    merged = load_file(tmp_path / "m.safetensors")
    assert merged.keys() == state.keys()
    save_file(merged, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    ours = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert (want - model(IDS).logits).abs().max() > 1e-3


def layer(name, shape):
    return {f"model.layers.0.{name}": Slot(shape, "matrix", "linear")}


SPLIT = {
    **layer("self_attn.q_proj", (8, 6)), **layer("self_attn.k_proj", (4, 6)),
    **layer("self_attn.v_proj", (4, 6)), **layer("mlp.gate_proj", (10, 6)),
    **layer("mlp.up_proj", (10, 6)),
}  # fmt: skip
FUSED = {**layer("self_attn.qkv_proj", (16, 6)), **layer("mlp.gate_up_proj", (20, 6))}
ROWS = {
    "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}


def lora(slots, ranks=(2,), start="base_model.model."):
    torch.manual_seed(2)
    state, want = {}, {}
    for number, (path, slot) in enumerate(slots.items()):
        r = ranks[number % len(ranks)]
        a, b = torch.randn(r, 6).double(), torch.randn(slot.shape[0], r).double()
        state |= {f"{start}{path}.lora_A.weight": a, f"{start}{path}.lora_B.weight": b}
        want[path] = 6 / r * b @ a
    told = {path: ranks[number % len(ranks)] for number, path in enumerate(slots)}
    config = {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "rank_pattern": told}
    return Content(state, config=config), want


def test_a_fused_projection_of_a_file_onto_ones_apart():
    content, want = lora(FUSED)
    found = formats.read(content, SPLIT).updates
    assert found.keys() == SPLIT.keys()
    for whole, parts in ROWS.items():
        both = torch.cat([found[f"model.layers.0.{part}"].delta() for part in parts])
        assert torch.equal(both, want[f"model.layers.0.{whole}"])


@pytest.mark.parametrize("ranks", [(2,), (1, 3, 2)])
@pytest.mark.parametrize("lost", [None, "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_projections_of_a_file_onto_a_fused_one(ranks, lost):
    """Of all ranks and so scales; of a part that the file does not have the rows stay."""
    content, want = lora({p: s for p, s in SPLIT.items() if lost is None or lost not in p}, ranks)
    found = formats.read(content, FUSED).updates
    for whole, parts in ROWS.items():
        shapes = [SPLIT[f"model.layers.0.{part}"].shape for part in parts]
        expected = [
            want.get(f"model.layers.0.{part}", torch.zeros(shape).double())
            for part, shape in zip(parts, shapes)
        ]
        have = found[f"model.layers.0.{whole}"].delta()
        torch.testing.assert_close(have, torch.cat(expected), rtol=1e-14, atol=1e-14)


def test_blocks_of_zeros_are_no_ranks():
    """A fused projection as its parts have been trained: each gets its own rank back."""
    a = torch.randn(6, 6)
    b = torch.block_diag(torch.randn(8, 2), torch.randn(4, 2), torch.randn(4, 2))
    stem = "base_model.model.model.layers.0.self_attn.qkv_proj"
    state = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    content = Content(state, config={"r": 6, "lora_alpha": 6, "peft_type": "LORA"})
    found = formats.read(content, SPLIT).updates
    assert {update.r for update in found.values()} == {2}
    assert torch.equal(found["model.layers.0.self_attn.k_proj"].lora_A, a[2:4])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"self_attn.qkv_proj": 15}, r"q_proj, adapter|qkv_proj: 15 rows, which are not those of"),
        (
            {"self_attn.qkv_proj": 4},
            "rows, which are not those of .*Was it made for another model?",
        ),
    ],
)
def test_rows_that_do_not_fit(change, text):
    slots = {p: Slot((change.get(p[15:], s.shape[0]), 6)) for p, s in FUSED.items()}
    with pytest.raises(FileError, match=text):
        formats.read(lora(slots)[0], SPLIT)


@pytest.mark.parametrize("base", [SPLIT, FUSED])
def test_a_fused_projection_and_its_parts_in_one_file_add_up(base):
    content, want = lora(SPLIT | FUSED)
    found = formats.read(content, base).updates
    assert found.keys() == base.keys()
    for whole, parts in ROWS.items():
        own = [f"model.layers.0.{one}" for one in (parts if base is SPLIT else [whole])]
        both = torch.cat([found[path].delta() for path in own])
        summed = torch.cat([want[f"model.layers.0.{part}"] for part in parts])
        summed += want[f"model.layers.0.{whole}"]
        torch.testing.assert_close(both, summed, rtol=1e-12, atol=1e-12)


def test_a_converted_file_has_the_names_of_the_model(tmp_path):
    content, want = lora(FUSED)
    save_file(dict(content.state), tmp_path / "adapter_model.safetensors")
    peft.LoraConfig(r=2, lora_alpha=6, target_modules=["qkv_proj"]).save_pretrained(tmp_path)
    adapters.convert(tmp_path, tmp_path / "a.safetensors", "native", SPLIT)
    found = adapters.read_adapter(tmp_path / "a.safetensors").updates
    assert found.keys() == SPLIT.keys()


@pytest.mark.parametrize("rows, r", [((1 << 20, 2), 1 << 11), ((8, 2), 1 << 28)])
def test_a_rank_beyond_any_model_is_not_formed(rows, r):
    slots = {"layers.0.mlp.gate_up_proj": Slot(rows)}
    with torch.device("meta"):  # as large as it says, and of no bytes
        state = {
            "layers.0.mlp.up_proj.lora_A.weight": torch.empty(r, 2),
            "layers.0.mlp.up_proj.lora_B.weight": torch.empty(rows[0] // 2, r),
        }
    adapter = formats.FORMATS["diffusers"].read(Content(state), None, formats.Options())
    with pytest.raises(FileError, match=f"rank {r:,} for .* rows is more than any model has"):
        formats.fit(adapter, slots, formats.Options(), "a.safetensors")


def test_an_empty_stack_of_any_number_is_no_stack():
    """A checkpoint may claim it in no bytes at all."""
    slots = {"layers.0.mlp.experts.down_proj": Slot((1 << 50, 0, 0))}
    content, _ = lora({"layers.0.mlp.experts.0.down_proj": Slot((4, 6))})
    with pytest.raises(FileError, match="updates of what the model does not have"):
        formats.read(content, slots)
