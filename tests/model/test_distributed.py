"""A sweep of training over two processes (gloo) against one process, in float64 by the dense
formula.

The cases run in one pair of processes, because starting a pair takes longer than all of them.
`test_two_gpus` runs them over NCCL.
"""

import os
import socket
import traceback
import warnings
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import connection

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import paramlora
from paramlora.model.attach import updates
from tests.model import forked, test_quantised

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]
CLOSE = dict(rtol=1e-9, atol=1e-9)
CONFIG = {
    "up": {"r": 3, "scale": 1.5},
    "down": {"r": 2},
    "head": {"r": 2, "trainable_scale": 1},
}
FSDP = CONFIG | {"head": {"r": 2}}  # fully_shard takes no scalar parameter
STEPS, RATE = 3, 0.05
PATIENCE = timedelta(seconds=30)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.checkpoint = False

    def forward(self, x):
        for block in self.blocks:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


def here():
    """Where this process computes: its own device under NCCL."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def net():
    torch.manual_seed(0)
    return Net().double().to(here())


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 8).double().to(here()), torch.randn(8, 4).double().to(here())


def adapted(config=CONFIG, **options):
    """The adapted model with B away from zero, the same in every process."""
    model = net()
    torch.manual_seed(2)
    paramlora.attach(model, {name: {**entry, **options} for name, entry in config.items()})
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.2)
    return model


def train(model, x, y):
    trained = [p for p in model.parameters() if p.requires_grad]
    # torch's joint step of many tensors takes no mixture of sharded and plain ones
    optimizer = torch.optim.AdamW(trained, lr=RATE, foreach=False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def dense_weights(start, x, y, scale_trains=True):
    """Every weight after the same steps in one process, from W + s·B·A written out."""
    plain, values = net(), {}
    found = {}
    for key, value in start.items():
        path, _, name = key.rpartition(".")
        found.setdefault(path, {})[name] = value.clone()
    for path, one in found.items():
        one["lora_A"].requires_grad_()
        one["lora_B"].requires_grad_()
        one["lora_scale"].requires_grad_(scale_trains and path == "head")
    leaves = [t for one in found.values() for t in one.values() if t.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=RATE)

    def weights():
        for path, one in found.items():
            base = plain.get_submodule(path).weight.detach()
            values[path + ".weight"] = base + one["lora_scale"] * one["lora_B"] @ one["lora_A"]
        return values

    for _ in range(STEPS):
        optimizer.zero_grad()
        out = torch.func.functional_call(plain, weights(), (x,))
        nn.functional.mse_loss(out, y).backward()
        optimizer.step()
    return {k: v.detach() for k, v in weights().items()}


def state_of(model):
    from paramlora.update.sharded import gathered

    return {k: gathered(v).clone() for k, v in paramlora.adapter_state_dict(model).items()}


def compare(model, want, **close):
    """The weights that the adapter's tensors mean."""
    state, plain = state_of(model), net()
    for name, weight in want.items():
        path = name.removesuffix(".weight")
        a, b, s = (state[f"{path}.lora_{n}"].double() for n in ("A", "B", "scale"))
        base = plain.get_submodule(path).weight
        assert (weight - base).abs().max() > 0.05
        torch.testing.assert_close(base + s * b @ a, weight, **(close or CLOSE))


def half(rank, *tensors):
    return [t.chunk(2)[rank] for t in tensors]


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def split(model, mesh):
    """Tensor parallelism: rows of one layer, columns of the next."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


class Exchanged(TorchDispatchMode):
    """Collects the sizes of what processes put together."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # which then shows the operations that it is made of
        out = func(*args, **(kwargs or {}))
        if "c10d" in str(func) and isinstance(out, torch.Tensor) and "wait" not in str(func):
            self.sizes.append(out.numel())
        return out


LARGEST = 3 * 12  # elements of a factor; a block's weight has 96


def merged_equals(model, want, **close):
    from paramlora.update.sharded import gathered, is_sharded

    with Exchanged() as exchanged:
        paramlora.merge(model)
    assert max(exchanged.sizes, default=0) <= LARGEST, exchanged.sizes
    with Exchanged() as exchanged:
        state = {k: gathered(v) for k, v in model.state_dict().items()}
    sharded = any(is_sharded(t) for t in model.state_dict().values())
    assert not sharded or max(exchanged.sizes) > LARGEST  # which this gather does show
    assert set(state) == set(net().state_dict())
    for name, weight in want.items():
        torch.testing.assert_close(state[name], weight, **(close or CLOSE))


# the cases, each run by both processes


def case_ddp(rank, mesh, folder, hard=1):
    x, y = batch()
    model = adapted(hard=hard)
    want = dense_weights(state_of(model), x, y)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, *half(rank, x, y))
    compare(wrapped, want)
    assert set(paramlora.adapter_state_dict(wrapped)) == set(paramlora.adapter_state_dict(model))
    paramlora.save_adapter(wrapped, folder / "ddp.safetensors")
    compare(paramlora.load_adapter(net(), folder / "ddp.safetensors"), want)
    assert len(paramlora.summary(wrapped).rows) == 5
    merged_equals(model, want)
    torch.testing.assert_close(model(x), torch.func.functional_call(net(), want, (x,)), **CLOSE)


def case_ddp_soft(rank, mesh, folder):
    case_ddp(rank, mesh, folder, hard=0)


def case_ddp_checkpointed(rank, mesh, folder):
    x, y = batch()
    model = adapted()
    model.checkpoint = True
    want = dense_weights(state_of(model), x, y)
    train(nn.parallel.DistributedDataParallel(model), *half(rank, x, y))
    compare(model, want)


def case_attaching_to_a_wrapped_model(rank, mesh, folder):
    for wrap, name in (
        (nn.parallel.DistributedDataParallel, "DistributedDataParallel"),
        (lambda m: shard(m, mesh), "fully_shard"),
    ):
        model = wrap(net())
        before = [type(m) for m in model.modules()]
        with pytest.raises(paramlora.AdapterError, match=f"under {name} already.*Attach first"):
            paramlora.attach(model, CONFIG)
        assert [type(m) for m in model.modules()] == before


def case_fsdp(rank, mesh, folder, checkpoint=False, hard=1):
    x, y = batch()
    model = adapted(FSDP, hard=hard)
    model.checkpoint = checkpoint
    want = dense_weights(state_of(model), x, y, False)
    shard(model, mesh)
    low = next(iter(updates(model)))[2]
    assert low.lora_B.to_local().shape[0] == 6  # of 12
    train(model, *half(rank, x, y))
    compare(model, want)
    path = folder / "fsdp.safetensors"
    with Exchanged() as exchanged:
        paramlora.save_adapter(model, path)
    assert 0 < max(exchanged.sizes) <= LARGEST, exchanged.sizes
    assert path.exists()
    compare(paramlora.load_adapter(net(), path), want)
    again = shard(adapted(FSDP, hard=hard), mesh)
    from safetensors.torch import load_file

    paramlora.load_adapter_state_dict(again, load_file(path))
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    with paramlora.disable_adapters(model):
        torch.testing.assert_close(model(x), net()(x), **CLOSE)
    merged_equals(model, want)


def case_fsdp_after_a_call(rank, mesh, folder):
    """Where the root's tensors are whole until they are sharded again, and the layers' own places
    change under torch's feet."""
    x, y = batch()
    start = state_of(adapted(FSDP))
    acts = {
        "detach": paramlora.detach,
        "merge": paramlora.merge,
        "merge one": lambda model: paramlora.merge(model, "default"),
        "load": lambda model: paramlora.load_adapter_state_dict(model, start),
    }
    for name, act in acts.items():
        model, weights = adapted(FSDP), dict(net().named_parameters())
        paramlora.attach(model, {"up": {"r": 1}, "head": {"r": 1}}, "other")
        for path, _, low in updates(model) if name != "detach" else ():
            if low.adapter == "other":
                nn.init.normal_(low.lora_B, std=0.2)
            delta = low.lora_scale * low.lora_B @ low.lora_A
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta.detach()
            if name == "load" and low.adapter == "default":
                low.lora_B.data.zero_()
        want = torch.func.functional_call(net(), weights, (x,))
        with torch.no_grad():
            shard(model, mesh)(x)
        act(model)
        for _ in range(2):
            got = model(x)
            torch.testing.assert_close(got, want, **CLOSE)
            if got.requires_grad:
                nn.functional.mse_loss(got, y).backward()


def case_fsdp_of_a_tied_tensor(rank, mesh, folder):
    """Of which torch keeps one for both layers, so that merging cannot give one its own."""
    from torch.distributed.fsdp import fully_shard

    for both in (True, False):
        table = nn.Embedding(6, 8).double().to(here())
        head = nn.Linear(8, 6, bias=False).double().to(here())
        head.weight = table.weight
        model = nn.Sequential(table, head)
        nn.init.constant_(table.weight, 0.5)
        paramlora.attach(model, {"re:.*" if both else "1": {"r": 2}})
        for _, _, low in updates(model):
            nn.init.constant_(low.lora_A, 0.25)
            nn.init.constant_(low.lora_B, 2.0)
        ids = torch.arange(6, device=here())
        want = torch.full((6, 6), 8 * 1.5 * (1.5 if both else 0.5), device=here()).double()
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(ids), want, **CLOSE)
        if both:
            paramlora.merge(model)
        else:
            with pytest.raises(paramlora.AdapterError, match="^1.weight: .*fully_shard.*Merge bef"):
                paramlora.merge(model)
        torch.testing.assert_close(model(ids), want, **CLOSE)


def case_fsdp_starts(rank, mesh, folder):
    """Starts from the weight, which are buffers: `fully_shard` leaves them whole, and splits the
    factors that they stand beside."""
    x, y = batch()

    def started():
        inits = {"up": "pissa", "down": "olora"}
        entries = {name: {"r": 2, "kind": kind, "init": init} for name, init in inits.items()}
        return paramlora.attach(net(), entries)

    for kind in ("lora", "dora"):
        alone, model, other = started(), shard(started(), mesh), shard(started(), mesh)
        train(alone, x, y)  # in one process, which other tests hold against the dense formula
        train(model, *half(rank, x, y))
        torch.testing.assert_close(model(x), alone(x), **CLOSE)
        state = paramlora.adapter_state_dict(model)
        paramlora.save_adapter(model, folder / f"{kind}.safetensors")
        loaded = paramlora.load_adapter(net(), folder / f"{kind}.safetensors")
        torch.testing.assert_close(loaded(x), alone(x), **CLOSE)
        assert not torch.allclose(other(x), alone(x))
        paramlora.load_adapter_state_dict(other, state)  # which is sharded, too
        torch.testing.assert_close(other(x), alone(x), **CLOSE)
        paramlora.set_adapters(model, {"default": 0.5})
        paramlora.set_adapters(alone, {"default": 0.5})
        paramlora.merge(model)
        torch.testing.assert_close(model(x), alone(x), **CLOSE)


def case_fsdp_soft(rank, mesh, folder):
    case_fsdp(rank, mesh, folder, hard=0)


def case_fsdp_checkpointed(rank, mesh, folder):
    case_fsdp(rank, mesh, folder, checkpoint=True)


def case_fsdp_in_mixed_precision(rank, mesh, folder):
    """bfloat16 in the layers, float32 in the adapter, whose gradients are float64's to 2 %."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    x, y = batch()
    model = adapted(FSDP).float()
    model.checkpoint = True
    leaves = {k: v.double().requires_grad_() for k, v in state_of(model).items()}
    plain, weights = net(), {}
    for path in (k.removesuffix(".lora_A") for k in leaves if k.endswith(".lora_A")):
        a, b, s = (leaves[f"{path}.lora_{n}"] for n in ("A", "B", "scale"))
        weights[path + ".weight"] = plain.get_submodule(path).weight.detach() + s * b @ a
    out = torch.func.functional_call(plain, weights, (x,))
    nn.functional.mse_loss(out, y).backward()

    shard(model, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    mine, target = half(rank, x.float(), y.to(torch.bfloat16))
    out = model(mine)
    assert out.dtype == torch.bfloat16
    nn.functional.mse_loss(out, target).backward()
    for path, _, low in updates(model):
        for name in ("lora_A", "lora_B"):
            grad = getattr(low, name).grad.full_tensor()
            assert grad.dtype == torch.float32
            want = leaves[f"{path}.{name}"].grad
            assert (grad - want).norm() < 0.02 * want.norm()


def case_fsdp_of_a_narrow_base(rank, mesh, folder):
    """bfloat16 base and float32 factors in one unit; the step is far below the base's rounding."""
    x, y = batch()
    model = adapted(FSDP).float()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not name.startswith("lora"):
                p.data = p.data.to(torch.bfloat16)
    start = state_of(model)
    shard(model, mesh)
    x16, y16 = (t.to(torch.bfloat16) for t in half(rank, x, y))
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=1e-6)
    nn.functional.mse_loss(model(x16), y16).backward()
    optimizer.step()
    after = state_of(model)
    moved = [k for k in after if not torch.equal(after[k], start[k])]
    assert len(moved) == 2 * 5, moved


def case_flat(rank, mesh, folder):
    """FSDP1, whose flat parts are of other shapes, or of no memory at all, between its calls."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Sharded

    x, _ = batch()
    plain = adapted(FSDP)
    a, b = plain(x), net()(x)
    rows = torch.tensor([[i % 2 == 0] for i in range(len(x))], device=x.device)
    for flat in (True, False):
        model = adapted(FSDP).requires_grad_(True)
        model = Sharded(model, use_orig_params=not flat, device_id=here())
        for act in (paramlora.adapter_of, paramlora.summary, paramlora.merge, state_of):
            with pytest.raises(paramlora.AdapterError, match="flat parts.*summon_full_params"):
                act(model)
        torch.testing.assert_close(model(x), a, **CLOSE)
        if not flat:  # else a layer finds its tensors by reading them alone
            with paramlora.route(model, ["default", None] * (len(x) // 2)):
                y = model(x)
            torch.testing.assert_close(y, torch.where(rows, a, b), **CLOSE)
        with Sharded.summon_full_params(model):
            assert all(torch.equal(t, state_of(plain)[k]) for k, t in state_of(model).items())
            assert paramlora.summary(model).rows == paramlora.summary(plain).rows


def case_tensors_trained_whole(rank, mesh, folder):
    x, y = batch()
    plain = net().requires_grad_(False)
    plain.head.requires_grad_(True)
    train(plain, x, y)
    wrappers = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": lambda m: shard(m, mesh)}
    for name, wrap in wrappers.items():
        model = wrap(paramlora.attach(net(), {"head": {"whole": 1}}))
        train(model, *half(rank, x, y))
        paramlora.save_adapter(model, folder / f"{name}.safetensors")
        alone = paramlora.merge(paramlora.load_adapter(net(), folder / f"{name}.safetensors"))
        assert (plain.head.weight - net().head.weight).abs().max() > 0.05
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(alone.state_dict()[key], value, **CLOSE)


def case_a_head_for_each_task(rank, mesh, folder):
    """Trained one after the other on a sharded base, each as on a plain one, and summed."""
    x, y = batch()
    plain = net().requires_grad_(False)
    plain.head.requires_grad_(True)
    train(plain, x, y)
    model, head = net(), net().head.weight.detach()
    for name in "ab":
        paramlora.attach(model, {"head": {"whole": 1}}, name)
    shard(model, mesh)
    for name in "ab":
        paramlora.set_adapters(model, {name: 1.0})
        train(model, *half(rank, x, y))
        paramlora.save_adapter(model, folder / "head.safetensors", name)
        alone = paramlora.merge(paramlora.load_adapter(net(), folder / "head.safetensors"))
        torch.testing.assert_close(alone.head.weight, plain.head.weight, **CLOSE)
    paramlora.set_adapters(model, {"a": 1.0, "b": 0.5})
    want = head + 1.5 * (plain.head.weight - head)
    merged = paramlora.merge(model).head.weight.full_tensor()
    torch.testing.assert_close(merged.detach(), want.detach(), **CLOSE)


def case_tensor_parallel(rank, mesh, folder):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    x, y = batch()
    model = split(net(), mesh)
    torch.manual_seed(rank)  # processes that draw differently still agree
    paramlora.attach(model, CONFIG)
    assert type(model.blocks[0].up.parametrizations.weight.original.data) is DTensor
    torch.testing.assert_close(model(x), net()(x), **CLOSE)
    paramlora.load_adapter_state_dict(model, state_of(adapted()))
    low = {path: low for path, _, low in updates(model)}
    column, row = low["blocks.0.up"], low["blocks.0.down"]
    assert column.lora_B.placements == (Shard(0),) and column.lora_A.placements == (Replicate(),)
    assert row.lora_A.placements == (Shard(1),) and row.lora_B.placements == (Replicate(),)
    want = dense_weights(state_of(model), x, y)
    train(model, x, y)
    compare(model, want)
    with Exchanged() as exchanged:
        paramlora.save_adapter(model, folder / "tp.safetensors")
    assert 0 < max(exchanged.sizes) <= LARGEST, exchanged.sizes
    compare(paramlora.load_adapter(net(), folder / "tp.safetensors"), want)
    other = paramlora.load_adapter(split(net(), mesh), folder / "tp.safetensors")
    torch.testing.assert_close(other(x), model(x), **CLOSE)
    merged_equals(model, want)
    torch.testing.assert_close(model(x), torch.func.functional_call(net(), want, (x,)), **CLOSE)
    paramlora.detach(other)
    assert type(other.blocks[0].up) is nn.Linear
    torch.testing.assert_close(other(x), net()(x), **CLOSE)


def case_tensor_parallel_starts(rank, mesh, folder):
    x, _ = batch()
    model = split(net(), mesh)
    paramlora.attach(model, {"up": {"r": 2, "init": "pissa"}, "down": {"r": 2, "init": "olora"}})
    torch.testing.assert_close(model(x), net()(x), **CLOSE)
    u, s, v = torch.linalg.svd(net().blocks[0].up.weight)
    low = next(low for path, _, low in updates(model) if path == "blocks.0.up")
    product = low.lora_B.full_tensor() @ low.lora_A.full_tensor()
    torch.testing.assert_close(product, (u[:, :2] * s[:2]) @ v[:2], **CLOSE)


def case_what_tensor_parallel_refuses(rank, mesh, folder):
    model = split(net(), mesh)
    for option in ({"hard": 0}, {"dropout": 0.1}):
        with pytest.raises(paramlora.TargetError, match="lies on several processes, where only"):
            paramlora.attach(model, {"up": {"r": 2, **option}})
    assert type(model.blocks[0].up) is nn.Linear


def case_distributed_checkpoint_of_the_adapter(rank, mesh, folder):
    import torch.distributed.checkpoint as dcp

    x, y = batch()
    model = shard(adapted(FSDP), mesh)
    train(model, *half(rank, x, y))
    dcp.save(paramlora.adapter_state_dict(model), checkpoint_id=folder / "dcp")
    for other in (shard(adapted(FSDP), mesh), adapted(FSDP)):  # sharded alike, and not at all
        assert not torch.allclose(other(x), model(x))
        state = paramlora.adapter_state_dict(other)
        dcp.load(state, checkpoint_id=folder / "dcp")
        paramlora.load_adapter_state_dict(other, state)
        torch.testing.assert_close(other(x), model(x), **CLOSE)
    saved = dcp.FileSystemReader(folder / "dcp").read_metadata().state_dict_metadata
    assert set(saved) == set(paramlora.adapter_state_dict(model))


def case_quantised_bases(rank, mesh, folder):
    """Packed weights, the same everywhere: neither sent around at the start nor sharded."""
    from torch.distributed.fsdp import fully_shard

    def ddp(model):
        return nn.parallel.DistributedDataParallel(model, init_sync=False)

    def fsdp(model):
        frozen = {p for p in model.parameters() if not p.requires_grad}
        return fully_shard(model, mesh=mesh, ignored_params=frozen)

    for kind in filter(lambda kind: find_spec(kind.split()[0]), test_quantised.KINDS):
        for wrap in (ddp, fsdp):
            model, wide = test_quantised.two_layers(kind, here())
            x = torch.randn(8, 64).to(here(), torch.bfloat16)
            start = [p.detach().double() for p in paramlora.trainable_parameters(model)]
            leaves = [p.clone().requires_grad_() for p in start]
            optimizer = torch.optim.SGD(leaves, lr=RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                wide(x.double(), leaves, 1.0).square().mean().backward()
                optimizer.step()
            keys = [k for k in paramlora.adapter_state_dict(model) if not k.endswith("scale")]
            wrapped = wrap(model)
            optimizer = torch.optim.SGD(paramlora.trainable_parameters(wrapped), lr=RATE)
            for _ in range(STEPS):
                optimizer.zero_grad()
                wrapped(*half(rank, x)).float().square().mean().backward()
                optimizer.step()
            state = state_of(wrapped)
            for key, first, want in zip(keys, start, leaves):
                off = state[key].double() - want.detach()
                assert off.norm() < 0.05 * (want.detach() - first).norm(), (kind, wrap, key)


CASES = {name[5:]: case for name, case in list(globals().items()) if name.startswith("case_")}


def run(rank, port, folder, backend, cases):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh(here().type, (2,))
    failed = {}
    for number, (name, case) in enumerate(cases.items()):
        (folder / name).mkdir(exist_ok=True)
        try:
            case(rank, mesh, folder / name)
        except Exception:
            failed[name] = traceback.format_exc()
        torch.save((number, failed), folder / f"{rank}.pt")
        if not ended(name, rank, store):
            break
    leave(rank, store)
    os._exit(0)  # a process that waits for one that failed would hang here


def ended(name, rank, store):
    """Whether the other process is at the end of the case too: no exchange of theirs is open."""
    store.set(f"{name} {rank}", "")
    return came(f"{name} {1 - rank}", store)


def leave(rank, store):
    """The first process serves the store, and so goes last."""
    came("left", store) if rank == 0 else store.set("left", "")


def came(key, store):
    try:
        store.wait([key], PATIENCE)
    except dist.DistError:
        return False
    return True


def both(folder, backend, cases):
    """(the last case's number, tracebacks by case) of each process; None of one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context(forked.METHOD)
    pair = [
        context.Process(target=run, args=(rank, port, folder, backend, cases)) for rank in range(2)
    ]
    for process in pair:
        process.start()
    connection.wait([process.sentinel for process in pair], 240)
    for process in pair:
        process.join(PATIENCE.total_seconds())  # one that waits for one that failed
        if process.is_alive():
            process.kill()
    return [torch.load(f) if (f := folder / f"{rank}.pt").exists() else None for rank in range(2)]


def assert_ran(results, cases, name):
    seen = [result for result in results if result is not None]
    failed = [failures[name] for _, failures in seen if name in failures]
    assert not failed, failed[0]
    assert seen and all(reached >= list(cases).index(name) for reached, _ in seen), "not reached"
    assert len(seen) == 2, "a process died"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return both(tmp_path_factory.mktemp("distributed"), "gloo", CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(results, name):
    assert_ran(results, CASES, name)
