"""A sweep of torch.compile and export of whole models with every linear adapted."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.model.attach import updates
from tests.model.test_models import call_unet, call_vit, tokens

CLOSE = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def a_fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def tiny_unet(up="UpBlock2D", mid=None):
    unet = pytest.importorskip("diffusers").UNet2DConditionModel
    return unet(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=(up,),
        mid_block_type=mid,
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )


def large_unet():
    return tiny_unet("CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")


def tiny_llama(layers=1):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=False,
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTModel(config)


def call_tokens(model):
    return model(tokens(), use_cache=False).logits


MODELS = {
    "unet": (tiny_unet, call_unet),
    "vit": (tiny_vit, call_vit),
    "gpt2": (tiny_gpt2, call_tokens),
    "llama": (tiny_llama, call_tokens),
}


def every_linear(plain, hard):
    """One entry that names every linear layer, transformers' Conv1D included."""
    named = plain.named_modules()
    paths = [n for n, m in named if isinstance(m, nn.Linear) or _is_conv1d(m)]
    return {"re:" + "|".join(p.replace(".", r"\.") for p in paths): {"r": 2, "hard": hard}}, paths


def _is_conv1d(module):
    return type(module).__name__ == "Conv1D"


def adapted(name, hard):
    build, call = MODELS[name]
    plain = build().double().eval()
    entry, paths = every_linear(plain, hard)
    model = paramlora.attach(copy.deepcopy(plain), entry)
    assert len(list(updates(model))) == len(paths) > 4
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.2)
    return model, plain, call


def reference(model, plain, call, strength=1.0):
    """The output by W + strength·B·A written out, and the gradient of every factor."""
    state = {k: v.clone().requires_grad_() for k, v in paramlora.adapter_state_dict(model).items()}
    values = dict(plain.named_parameters())
    for key in [k.removesuffix(".lora_A") for k in state if k.endswith(".lora_A")]:
        product = strength * state[f"{key}.lora_B"] @ state[f"{key}.lora_A"]
        owner = plain.get_submodule(key)
        values[f"{key}.weight"] = owner.weight + (product.T if _is_conv1d(owner) else product)
    out = call(lambda *args, **kwargs: functional_call(plain, values, args, kwargs))
    out.square().sum().backward()
    return out.detach(), {k: v.grad for k, v in state.items() if not k.endswith("scale")}


def check(model, plain, call, compiled, strength=1.0):
    model.zero_grad()
    out = call(compiled)
    out.square().sum().backward()
    want, grads = reference(model, plain, call, strength)
    torch.testing.assert_close(out, want, **CLOSE)
    for path, _, low in updates(model):
        for name in ("lora_A", "lora_B"):
            grad = getattr(low, name).grad
            assert grad.abs().max() > 0
            torch.testing.assert_close(grad, grads[f"{path}.{name}"], **CLOSE)


# soft ones on each class of layers, Linear and Conv1D; the UNet's and the ViT's are Linear too
@pytest.mark.parametrize("name, hard", [*((name, 1) for name in MODELS), ("gpt2", 0), ("llama", 0)])
def test_one_graph_whatever_the_strength(name, hard):
    model, plain, call = adapted(name, hard)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, plain, call, compiled)
    assert graphs() == 1
    paramlora.set_adapters(model, {"default": -0.5})
    check(model, plain, call, compiled, -0.5)
    assert graphs() == 1
    with paramlora.disable_adapters(model), torch.no_grad():
        torch.testing.assert_close(call(compiled), call(plain), **CLOSE)
    off = graphs()
    assert off == 2  # the base alone, which computes no update
    with paramlora.disable_adapters(model), torch.no_grad():
        call(compiled)
    paramlora.set_adapters(model, {"default": 1.0})
    call(compiled)
    assert graphs() == off


@pytest.mark.parametrize("hard", (1, 0))
@pytest.mark.parametrize("trainable", (0, 1))
def test_a_changed_scale_and_loaded_factors_compile_nothing(hard, trainable):
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    entry = {"r": 2, "hard": hard, "trainable_scale": trainable}
    model = paramlora.attach(copy.deepcopy(plain), {"re:[02]": entry})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4).double()
    for scale in (1.0, 0.3, -2.0):
        state = {
            key: torch.tensor(scale, dtype=torch.float64)
            if key.endswith("scale")
            else torch.randn_like(value)
            for key, value in paramlora.adapter_state_dict(model).items()
        }
        paramlora.load_adapter_state_dict(model, state)
        check(model, plain, lambda m: m(x), compiled, scale)
        assert graphs() == 1


def test_two_adapters_switch_without_compiling_again_once_seen():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model = paramlora.attach(plain, {"0": {"r": 2}})
    paramlora.attach(model, {"*": {"r": 1}}, "second")
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, choices = (
        torch.randn(2, 4).double(),
        ({"default": 1.0}, {"second": 1.0}, {"default": 1, "second": 1}),
    )
    for choice in choices:
        paramlora.set_adapters(model, choice)
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    seen = graphs()
    assert seen == len(choices)
    for choice in choices:
        paramlora.set_adapters(model, {name: 0.3 for name in choice})
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    assert graphs() == seen


@pytest.mark.parametrize("hard", (1, 0))
def test_dropout_draws_its_mask_inside_one_graph(hard):
    plain = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2)).double()
    model = paramlora.attach(plain, {"re:[02]": {"r": 2, "hard": hard, "dropout": 0.5}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8).double()

    def run(call, seed):
        model.zero_grad()
        torch.manual_seed(seed)
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in paramlora.trainable_parameters(model))]

    for seed in (1, 2):
        for own, want in zip(run(compiled, seed), run(model, seed)):
            torch.testing.assert_close(own, want, **CLOSE)
    assert not torch.equal(run(compiled, 1)[0], run(compiled, 2)[0])
    assert graphs() == 1
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), **CLOSE)
    assert graphs() == 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("hard", (1, 0))
def test_identical_blocks_compile_once(hard):
    plain = nn.Sequential(*[Block() for _ in range(4)]).double()
    model = paramlora.attach(copy.deepcopy(plain), {"up": {"r": 2, "hard": hard}, "down": {"r": 2}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 8).double()
    model(x)  # the first block's input requires no gradient, the others' does
    before = graphs()
    check(model, plain, lambda m: m(x), model)
    assert before == graphs() == 2


@pytest.mark.parametrize("build", (large_unet, lambda: tiny_llama(3)))
def test_repeated_blocks_of_libraries_compile_once(build):
    plain = build().eval()
    model = paramlora.attach(copy.deepcopy(plain), every_linear(plain, 1)[0])
    if hasattr(model, "compile_repeated_blocks"):  # diffusers
        model = model.float()
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        kind = "BasicTransformerBlock"
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
        kind = "LlamaDecoderLayer"
    blocks = [m for m in model.modules() if type(m).__name__ == kind]
    assert len(blocks) > 2
    with torch.no_grad():
        if kind == "LlamaDecoderLayer":
            call_tokens(model)
        else:
            x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
            model(x, torch.tensor([3, 500]), encoder_hidden_states=context)
    assert graphs() == 1


def test_checkpointed_blocks_compile_whole():
    plain = nn.Sequential(*[Block() for _ in range(2)]).double()
    model = paramlora.attach(copy.deepcopy(plain), {"up": {"r": 2}, "down": {"r": 2, "hard": 0}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    x = torch.randn(3, 8).double()
    check(model, plain, lambda m: run(x) if m is model else m(x), model)
    assert graphs() == 1


def test_attaching_and_merging_before_and_after_compiling(tmp_path):
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(5, 4).double()
    compiled(x)
    assert paramlora.attach(compiled, {"re:[02]": {"r": 2}}) is compiled
    assert torch.equal(compiled(x), plain(x))
    for _, _, low in updates(compiled):
        nn.init.normal_(low.lora_B)
    check(model, plain, lambda m: m(x), compiled)
    want, _ = reference(model, plain, lambda m: m(x))
    assert set(paramlora.adapter_state_dict(compiled)) == set(paramlora.adapter_state_dict(model))
    paramlora.save_adapter(compiled, tmp_path / "a.safetensors")
    other = paramlora.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    torch.testing.assert_close(other(x), want, **CLOSE)
    again = torch.compile(copy.deepcopy(plain), backend="eager", fullgraph=True)
    paramlora.load_adapter(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(x), want, **CLOSE)
    paramlora.merge(compiled)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(compiled(x), want, **CLOSE)


def test_layers_compiled_one_by_one_keep_their_paths():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0] = torch.compile(model[0], backend="eager")
    paramlora.attach(model, {"0": {"r": 2}, "re:1": {"r": 1}})
    assert set(k.split(".")[0] for k in paramlora.adapter_state_dict(model)) == {"0", "1"}
    assert all(k.count(".") == 1 for k in paramlora.adapter_state_dict(model))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_inductor_with_a_changed_strength():
    plain = nn.Sequential(nn.Linear(4, 3)).double()
    model = paramlora.attach(copy.deepcopy(plain), {"0": {"r": 2}})
    nn.init.normal_(model[0].parametrizations.weight[0].lora_B)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 4).double()
    for strength in (1.0, 0.3):
        paramlora.set_adapters(model, {"default": strength})
        check(model, plain, lambda m: m(x), compiled, strength)
    assert graphs() == 1


@pytest.mark.parametrize("hard", (1, 0))
def test_export_attached_and_merged(hard):
    model, plain, _ = adapted("vit", hard)
    x = torch.linspace(-1, 1, 2 * 3 * 64).double().reshape(2, 3, 8, 8)
    want, _ = reference(model, plain, lambda m: m(x).last_hidden_state)
    for ready in (model, paramlora.merge(copy.deepcopy(model))):
        program = torch.export.export(ready, (x,))
        torch.testing.assert_close(program.module()(x).last_hidden_state, want, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript's own
def test_onnx_of_a_merged_model(tmp_path):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model = paramlora.attach(copy.deepcopy(plain), {"0": {"r": 2}, "3": {"r": 2, "hard": 0}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    x = torch.randn(2, 3, 4, 4)
    want = model(x).detach()
    paramlora.merge(model)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = evaluator(str(tmp_path / "model.onnx"))
    (got,) = session.run(None, {session.input_names[0]: x.numpy()})
    assert (want - plain(x)).abs().max() > 0.1
    torch.testing.assert_close(torch.tensor(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("hard", (1, 0))
def test_cuda_graphs_follow_the_strength(hard):
    plain = nn.Sequential(*[Block() for _ in range(2)]).double().cuda()
    model = paramlora.attach(copy.deepcopy(plain), {"up": {"r": 2, "hard": hard}, "down": {"r": 2}})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(3, 8, dtype=torch.float64, device="cuda")
    for strength in (1.0, 1.0, 1.0, 0.5, -2.0):
        paramlora.set_adapters(model, {"default": strength})
        torch.compiler.cudagraph_mark_step_begin()
        check(model, plain, lambda m: m(x), compiled, strength)
    assert graphs() == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
