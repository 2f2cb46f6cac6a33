"""A sweep of training in 16 bits as it is done on a device: compiled, in CUDA graphs, checkpointed,
exported, sharded. On CUDA the updates run in the kernels, which every test there counts."""

import copy
import os
import socket
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import paramlora
from paramlora.cuda import operators
from paramlora.evaluate import choose
from paramlora.model.attach import updates
from paramlora.update.sharded import gathered
from tests.model import forked
from tests.model.test_compile import _is_conv1d, every_linear

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
HARD = pytest.mark.parametrize("hard", (1, 0))
NARROW = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
BACKEND = {"cpu": "aot_eager", "cuda": "inductor"}


@pytest.fixture(autouse=True)
def a_fresh_compiler():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def kernels(monkeypatch):
    """A list that grows with every layer that runs in the kernels."""
    return count_kernels(monkeypatch.setattr)


def count_kernels(replace):
    ran, own = [], operators.forward

    def counted(*args, **named):
        result = own(*args, **named)
        ran.extend([] if result is None else [args[0].x.dtype])
        return result

    replace(operators, "forward", counted)
    return ran


def unet():
    model = pytest.importorskip("diffusers").UNet2DConditionModel
    return model(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)


def vit():
    transformers = pytest.importorskip("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=8, patch_size=2))


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=16, vocab_size=40)
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config)


def fixed(shape, device, dtype):
    """The same numbers in every type."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)


def call_unet(model, device, dtype):
    x, context = (fixed(shape, device, dtype) for shape in ((2, 4, 8, 8), (2, 5, 24)))
    return model(x, torch.tensor([3, 500], device=device), encoder_hidden_states=context).sample


def call_vit(model, device, dtype):
    out = model(fixed((4, 3, 8, 8), device, dtype))
    return torch.cat([out.last_hidden_state, out.pooler_output[:, None]], 1)


def call_tokens(model, device, dtype):
    tokens = torch.arange(32, device=device).reshape(2, 16)
    return model(tokens, use_cache=False).logits


MODELS = {
    "unet": (unet, call_unet),
    "vit": (vit, call_vit),
    "gpt2": (gpt2, call_tokens),
    "llama": (llama, call_tokens),
}


def adapted(name, hard, device, dtype):
    """The model with every linear adapted, and the base's numbers in float64."""
    plain = MODELS[name][0]().eval().to(device, dtype)
    entry, paths = every_linear(plain, hard)
    model = paramlora.attach(copy.deepcopy(plain), entry)
    assert len(list(updates(model))) == len(paths) > 4
    fill(model)
    return model, plain.double()


def fill(model):
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_A, std=0.2)
        nn.init.normal_(low.lora_B, std=0.2)


def reference(model, plain, call, strength=1.0, dtype=torch.float64):
    """Output and gradients of every factor by the dense formula: all in float64, or computed in
    `dtype` from what the model keeps."""
    values, leaves = dict(plain.named_parameters()), {}
    for path, _, low in updates(model):
        a, b = (getattr(low, f"lora_{n}").detach().double().requires_grad_() for n in "AB")
        leaves[path], owner = (a, b), plain.get_submodule(path)
        product = strength * low.lora_scale.double() * b @ a
        values[f"{path}.weight"] = owner.weight + (product.T if _is_conv1d(owner) else product)
    if dtype != torch.float64:
        (kept,) = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
        values = {name: value.to(kept) for name, value in values.items()}
    out = call(lambda *args, **kwargs: functional_call(plain, values, args, kwargs), dtype)
    out.backward(direction(out))
    return out.detach(), {path: (a.grad, b.grad) for path, (a, b) in leaves.items()}


def direction(out):
    """A gradient of the output that no norm's invariance makes small."""
    return fixed(out.shape, out.device, out.dtype)


def error(got, want):
    assert want.norm() > 0
    return ((got.double() - want).norm() / want.norm()).item()


def check(model, plain, call, runs, dtype, strength=1.0):
    """Output and gradients, against float64 within some roundings of the narrow type.

    A factor's own gradient may be the small difference of large numbers (a key's, before softmax):
    each alone is held to what a wrong one could not reach, and all together to the narrow type, or
    to the error of torch's own operations on the dense sum where that is larger (GPT-2).
    """
    model.zero_grad()
    out = call(runs, dtype)
    assert out.dtype == dtype
    out.backward(direction(out))
    want, grads = reference(model, plain, call, strength)
    without = call(plain, torch.float64).detach()
    eps = torch.finfo(dtype).eps
    assert error(without, want) > 16 * eps, "the update is too small to be missed"
    assert error(out, want) < 4 * eps
    pairs = [
        (factor.grad, grad)
        for path, _, low in updates(model)
        for factor, grad in zip((low.lora_A, low.lora_B), grads[path])
    ]
    assert {got.dtype for got, _ in pairs} == {torch.float32}
    assert max(error(*pair) for pair in pairs) < 32 * eps
    got, want = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs))
    _, plainly = reference(model, plain, call, strength, dtype)
    noise = torch.cat([t.flatten() for pair in plainly.values() for t in pair])
    assert error(got, want) < max(8 * eps, 1.5 * error(noise, want))


def graphs():
    return counters["stats"]["unique_graphs"]


WHOLE = [(name, hard) for name in MODELS for hard in (1, 0)]


@pytest.mark.parametrize(
    "name, hard, device",
    # on the CPU test_compile runs each of them, in float64 and hard or both
    [("vit", 1, "cpu"), ("vit", 0, "cpu")]
    + [pytest.param(*one, "cuda", marks=CUDA.marks) for one in WHOLE],
)
def test_whole_models_compile_in_bfloat16(name, hard, device, kernels):
    dtype = torch.bfloat16
    model, plain = adapted(name, hard, device, dtype)

    def call(m, kind):
        return MODELS[name][1](m, device, kind)

    compiled = torch.compile(model, backend=BACKEND[device], fullgraph=True)
    for strength in (1.0, -0.5):
        paramlora.set_adapters(model, {"default": strength})
        kernels.clear()
        check(model, plain, call, compiled, dtype, strength)
        layers = len(list(updates(model))) if device == "cuda" and hard else 0
        assert kernels == layers * [dtype]
    assert graphs() == 1
    with paramlora.disable_adapters(model), torch.no_grad():
        kernels.clear()
        assert error(call(compiled, dtype), call(plain, torch.float64)) < 4 * 2**-7
        assert kernels == [] and graphs() == 2


class Block(nn.Module):
    def __init__(self, width, inner, dropout=0.0):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))


def blocks(hard, device, dtype, dropout=0.0, inside=0.0, sizes=(64, 96)):
    """(adapted, the base's numbers in float64): three blocks, their two layers adapted."""
    plain = nn.Sequential(*[Block(*sizes, dropout=inside) for _ in range(3)]).to(device, dtype)
    entry = {"r": 3, "scale": 1.5, "hard": hard, "dropout": dropout}
    model = paramlora.attach(copy.deepcopy(plain), {"up": entry, "down": entry})
    fill(model)
    return model, plain.double()


@HARD
@NARROW
@DEVICES
def test_compiled_under_autocast(hard, dtype, device, kernels):
    model, plain = blocks(hard, device, torch.float32)
    compiled = torch.compile(model, backend=BACKEND[device], fullgraph=True)
    x = fixed((5, 8, 64), device, torch.float64)

    def call(m, kind):
        if kind == torch.float64:
            return m(x)
        with torch.autocast(device, dtype):
            y = m(x.float())
        assert y.dtype == torch.float32  # torch's own: the residual's
        return y.to(dtype)

    check(model, plain, call, compiled, dtype)
    assert kernels == (6 * [dtype] if device == "cuda" and hard else []) and graphs() == 1


def trained(model, plain, x, strengths, rate):
    """The factors after steps of gradient descent by the dense formula, all in float64."""
    leaves = {}
    for path, _, low in updates(model):
        pair = (getattr(low, f"lora_{n}").detach().double().requires_grad_() for n in "AB")
        leaves[path] = tuple(pair)
    optimizer = torch.optim.SGD([t for pair in leaves.values() for t in pair], lr=rate)
    plain.requires_grad_(False)
    for strength in strengths:
        values = {
            f"{path}.weight": plain.get_submodule(path).weight + strength * 1.5 * b @ a
            for path, (a, b) in leaves.items()
        }
        functional_call(plain, values, (x.double(),)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {path: [t.detach() for t in pair] for path, pair in leaves.items()}


STRENGTHS, RATE = (1.0, 1.0, 1.0, 0.5, -2.0, 0.5), 0.5


def check_training(step, model, start, plain, x):
    """After steps of changing strength the factors have moved from `start` as in float64."""
    want = trained(start, plain, x, STRENGTHS, RATE)
    for strength in STRENGTHS:
        paramlora.set_adapters(model, {"default": strength})
        step()
    end = {k: gathered(v).double() for k, v in paramlora.adapter_state_dict(model).items()}
    first = {k: v.double() for k, v in paramlora.adapter_state_dict(start).items()}
    for path, pair in want.items():
        for key, value in zip((f"{path}.lora_A", f"{path}.lora_B"), pair):
            assert error(end[key] - first[key], value - first[key]) < 8 * eps_of(x), key


def eps_of(x):
    return torch.finfo(x.dtype).eps


@HARD
@DEVICES
def test_training_in_cuda_graphs_follows_the_strength(hard, device, kernels):
    dtype = torch.bfloat16
    model, plain = blocks(hard, device, dtype)
    start = copy.deepcopy(model)
    how = dict(mode="reduce-overhead") if device == "cuda" else dict(backend="aot_eager")
    compiled = torch.compile(model, fullgraph=True, **how)
    x = fixed((5, 8, 64), device, dtype)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=RATE)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    check_training(step, model, start, plain, x)
    assert graphs() == 1
    if device == "cuda":
        from torch._inductor.cudagraph_trees import get_manager

        assert counters["inductor"]["cudagraph_skips"] == 0
        assert get_manager(x.device.index, create_if_none_exists=False).new_graph_id().id > 0
        # a replayed graph calls no Python: that ran to warm up and to record, not at every step
        assert (6 <= len(kernels) < 6 * len(STRENGTHS)) if hard else kernels == []


@NARROW
@HARD
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("dropout", (0.0, 0.25))
@pytest.mark.parametrize(
    "device, tokens, sizes",
    [
        ("cpu", 40, (64, 96)),
        pytest.param("cuda", 40, (64, 96), marks=CUDA.marks),
        # where the thin product has a grid of its own
        pytest.param("cuda", 2**14, (2048, 4096), marks=CUDA.marks),
    ],
)
def test_checkpointing_changes_no_bit(
    dtype, hard, reentrant, dropout, device, tokens, sizes, kernels
):
    model, _ = blocks(hard, device, dtype, dropout, 0.0 if dropout else 0.3, sizes)
    x = fixed((tokens, sizes[0]), device, dtype)

    def gradients(saving):
        model.zero_grad()
        torch.manual_seed(1)
        y = x.clone().requires_grad_(reentrant)
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant) if saving else block(y)
        y.backward(direction(y))
        return [y.detach(), *(p.grad for p in paramlora.trainable_parameters(model))]

    want = gradients(False)
    once = len(kernels)
    got = gradients(True)
    assert len(got) == 13 and all(g.norm() > 0 for g in got)
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    ours = device == "cuda" and hard and (not dropout or choose.measured(0, "dropout"))
    assert once == (6 if ours else 0)
    assert len(kernels) == 3 * once  # the segments ran twice
    torch.manual_seed(2)
    masked = model(x)
    assert not torch.equal(masked, want[0]), "no mask was drawn"


@HARD
@DEVICES
def test_export_of_an_attached_model(hard, device, tmp_path):
    dtype = torch.bfloat16
    model, plain = adapted("vit", hard, device, dtype)

    def call(m, kind):
        return MODELS["vit"][1](m, device, kind)

    x = fixed((4, 3, 8, 8), device, dtype)
    program = torch.export.export(model, (x,))
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.paramlora.linear.default]
    assert len(nodes) == (len(list(updates(model))) if device == "cuda" and hard else 0)
    want, _ = reference(model, plain, call)
    torch.export.save(program, tmp_path / "model.pt2")
    for ready in (program, torch.export.load(tmp_path / "model.pt2")):
        with torch.no_grad():
            assert error(call(ready.module(), dtype), want) < 4 * torch.finfo(dtype).eps


# one process of a process group: the wrappers around the kernels


def case_ddp(model, mesh):
    return nn.parallel.DistributedDataParallel(model)


def case_fully_shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def case_fully_shard_compiled(model, mesh):
    for block in model:
        block.compile(backend=BACKEND[mesh.device_type], fullgraph=True)
    return case_fully_shard(model, mesh)


def case_fully_shard_checkpointed(model, mesh):
    for block in model:
        run = block.forward
        block.forward = lambda y, run=run: checkpoint(run, y, use_reentrant=False)
    return case_fully_shard(model, mesh)


CASES = {name[5:]: case for name, case in list(globals().items()) if name.startswith("case_")}


def run_one(device, hard, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = dist.device_mesh.init_device_mesh(device, (1,))
    kernels = count_kernels(setattr)
    failed = {}
    for name, case in CASES.items():
        kernels.clear(), counters.clear()
        try:
            train_wrapped(case, hard, mesh, folder / f"{name}.safetensors")
            assert (graphs() > 0) is name.endswith("compiled")
            least = 6 * len(STRENGTHS) if device == "cuda" and hard else 0
            assert (len(kernels) >= least) if least else not kernels, len(kernels)
        except Exception:
            failed[name] = traceback.format_exc()
    torch.save(failed, folder / "failed.pt")
    os._exit(0)


def train_wrapped(case, hard, mesh, path):
    torch.manual_seed(0)
    model, plain = blocks(hard, mesh.device_type, torch.bfloat16)
    x = fixed((5, 8, 64), mesh.device_type, torch.bfloat16)
    start = copy.deepcopy(model)
    wrapped = case(model, mesh)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(wrapped), lr=RATE)

    def step():
        wrapped(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    check_training(step, wrapped, start, plain, x)
    paramlora.set_adapters(wrapped, {"default": 1.0})
    paramlora.save_adapter(wrapped, path)
    alone = paramlora.load_adapter(paramlora.detach(start), path)
    assert error(alone(x), wrapped(x).detach().double()) < 4 * eps_of(x)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@HARD
@DEVICES
def test_one_process_of_a_group(hard, device, tmp_path):
    if not (dist.is_nccl_available() if device == "cuda" else dist.is_gloo_available()):
        pytest.skip("needs the backend")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context(forked.METHOD)
    process = context.Process(target=run_one, args=(device, hard, port, tmp_path))
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
    assert (tmp_path / "failed.pt").exists(), "the process died"
    assert torch.load(tmp_path / "failed.pt") == {}
