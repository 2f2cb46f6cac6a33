"""PEFT's files: what is written here acts the same in peft; every update of a model alone and
all together."""

import copy
import warnings

import pytest
import torch

from paramlora import FileError, formats
from paramlora.update.geometry import matrix_shape
from paramlora.update.value import Adapter, KindUpdate, Update
from tests.formats import foreign
from tests.formats.peft.folders import PLAIN, attention, close, in_peft, saved
from tests.formats.peft.language import SPARSE, deepseek, glm, llama, mixtral, qwen

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kinds", [PLAIN, ["hf"], ["hf", "linear"], ["grouped"]])
def test_what_is_written_here_acts_in_peft(tmp_path, kinds):
    adapter, base = foreign.adapter(kinds), formats.base_of(foreign.model())
    folder = saved(tmp_path / "a", formats.write(adapter, "peft", base))
    want = foreign.dense(foreign.model(), adapter)(foreign.TOKENS)
    assert (want - foreign.model()(foreign.TOKENS)).abs().max() > 0.05
    close(in_peft(foreign.model(), folder)(foreign.TOKENS), want)


def attention_adapter(names):
    torch.manual_seed(1)
    sizes = {"attn.in_proj_weight": 24, "attn.out_proj": 8}
    return Adapter(
        {
            name: Update(torch.randn(2, 8).double(), torch.randn(sizes[name], 2).double(), 0.7)
            for name in names
        }
    )


def test_attention_acts_in_peft(tmp_path):
    adapter, net = attention_adapter(["attn.in_proj_weight"]), attention()
    content = formats.write(adapter, "peft", formats.base_of(net))
    x, update = torch.randn(2, 5, 8).double(), adapter.updates["attn.in_proj_weight"]
    theirs = in_peft(attention(), saved(tmp_path / "a", content))
    net.attn.in_proj_weight += 0.7 * update.lora_B @ update.lora_A
    close(theirs(x), net(x))


@pytest.mark.parametrize("names", [["attn.out_proj"], ["attn.in_proj_weight", "attn.out_proj"]])
def test_the_output_projection_of_attention_is_refused(names):
    """peft 0.21 adds its term twice, and a later one will not."""
    base = formats.base_of(attention())
    with pytest.raises(FileError, match=r"attn.out_proj: the output projection.*adds twice.*merge"):
        formats.write(attention_adapter(names), "peft", base)


transformers = pytest.importorskip("transformers")
LATENT = {
    "n_shared_experts": 1, "n_routed_experts": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip


def of(kind, **sizes):
    def make():
        config = transformers.AutoConfig.for_model(kind, **{**SPARSE, **sizes})
        return transformers.AutoModelForCausalLM.from_config(config)

    return make


LONGCAT = {
    **LATENT, "num_layers": 2, "expert_ffn_hidden_size": 8, "ffn_hidden_size": 16, "moe_topk": 2,
    "zero_expert_num": 1, "head_dim": 4,
}  # fmt: skip
MODELS = {
    "deepseek_v3": deepseek,
    "deepseek_v32": of("deepseek_v32", **LATENT),
    "glm4_moe": glm,
    "hunyuan_v1_moe": of("hunyuan_v1_moe", num_experts=4, head_dim=8),
    "llama": llama,
    "longcat_flash": of("longcat_flash", **LONGCAT),
    "mixtral": mixtral,
    "qwen2_moe": qwen,
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def updates_of(base, paths):
    torch.manual_seed(1)
    found = {}
    for i, path in enumerate(paths):
        slot = base[path]
        stack, out, fan_in = matrix_shape(slot.shape, slot.layout)
        lead, r = (stack,) if slot.layout == "stack" else (), 1 + i % 2
        factors = torch.randn(*lead, r, fan_in) / 3, torch.randn(*lead, out, r) / 3
        found[path] = Update(
            *factors, (0.5, 1.0, 2.0)[i % 3], slot.shape, slot.layout, kind=slot.kind
        )
    return found


def loaded(net, content, folder):
    """The weights of the model that peft makes of the two."""
    folder = saved(folder, content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compared below, tensor by tensor
        found = peft.PeftModel.from_pretrained(
            copy.deepcopy(net), folder, autocast_adapter_dtype=False
        )
        return dict(found.merge_and_unload().named_parameters())


def summed(net, updates):
    """The weights with each update written out in float64."""
    weights = {name: p.detach().double() for name, p in net.named_parameters()}
    for path, update in updates.items():
        name = f"{path}.weight" if f"{path}.weight" in weights else path
        delta = update.scale * update.lora_B.double() @ update.lora_A.double()
        weights[name] += delta.mT if update.layout == "transposed" else delta
    return weights


def groups(base, adaptable):
    """All, and each kind of name alone, of the first block and of the others."""
    found = {"all": adaptable}
    for path in adaptable:
        found.setdefault((path.rpartition(".")[2], ".0." in path), []).append(path)
    wanted = ("gate_proj", "up_proj", "down_proj", "gate", "gate_up_proj")
    return [paths for key, paths in found.items() if key == "all" or key[0] in wanted]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_update_arrives_or_is_refused(name, known, tmp_path):
    net = made(name)
    base = formats.base_of(net)
    for number, paths in enumerate(groups(base, [path for path in base if path != "lm_head"])):
        updates = updates_of(base, paths)
        try:
            content = formats.write(Adapter(updates), "peft", base if known else None)
        except FileError as error:
            assert not known and "Give the model, which knows their order" in str(error)
            continue
        got, want = loaded(net, content, tmp_path / str(number)), summed(net, updates)
        assert got.keys() == want.keys()
        for key, weight in want.items():
            torch.testing.assert_close(got[key].double(), weight, rtol=1e-5, atol=1e-5)


def test_without_the_model_its_blocks_tell_that_there_are_no_experts():
    names = ("self_attn.q_proj", "mlp.gate_proj")
    paths = [f"model.layers.{i}.{name}" for i in range(5) for name in names]
    one = Update(torch.ones(1, 3), torch.ones(2, 1), shape=(2, 3), kind="linear")
    content = formats.write(Adapter(dict.fromkeys(paths, one)), "peft")
    assert sorted(paths) == content.config["target_modules"]
    some = [path for path in paths if path != "model.layers.4.mlp.gate_proj"]
    content = formats.write(Adapter(dict.fromkeys(some, one)), "peft")
    assert content.config["target_modules"] == [p for p in sorted(paths) if "q_proj" in p]
    assert f"{some[1]}.weight" in content.config["target_parameters"]


def test_dora_of_a_layer_beside_experts_is_refused():
    held = {
        "lora_A": torch.ones(1, 3),
        "lora_B": torch.ones(2, 1),
        "lora_magnitude": torch.ones(2, 1),
    }
    path = "model.layers.1.mlp.shared_experts.up_proj"
    value = KindUpdate("dora", held, 1.0, (2, 3), kind="linear")
    with pytest.raises(
        FileError, match=rf'{path}: "dora" of a parameter, which PEFT does not have'
    ):
        formats.write(Adapter({}, others={path: value}), "peft")
