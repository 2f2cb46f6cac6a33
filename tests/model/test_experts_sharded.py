"""A sweep of experts under FSDP2 over two processes (gloo), against one process and the dense
formula."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import paramlora
from paramlora.model.attach import updates
from tests.model.test_distributed import RATE, STEPS, assert_ran, both, half, train

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
CLOSE = dict(rtol=1e-9, atol=1e-9)
STACKS = ("gate_up_proj", "down_proj")


class Config:
    hidden_size, intermediate_size, num_local_experts, hidden_act = 8, 6, 4, "silu"
    num_experts = num_local_experts
    _experts_implementation = "batched_mm"


class Block(nn.Module):
    """Experts below their router, which is not trained."""

    def __init__(self):
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), MixtralExperts(Config())

    def forward(self, x):
        weights, index = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, index, weights)


def net(implementation="batched_mm"):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    for block in model:
        block.experts.config = copy.copy(block.experts.config)
        block.experts.config._experts_implementation = implementation
    return model


def adapted():
    torch.manual_seed(2)
    entries = {name: {"r": 2 + i, "scale": 0.7} for i, name in enumerate(STACKS)}
    model = paramlora.attach(net(), entries)
    for _, _, low in updates(model):
        nn.init.normal_(low.lora_B, std=0.2)
    return model


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch():
    torch.manual_seed(1)
    return torch.randn(12, 8).double(), torch.randn(12, 8).double()


def dense(state, x, y):
    """Each stack after the same steps in one process: W + 0.7·B·A written out, by the loop."""
    plain = net("eager").requires_grad_(False)
    leaves = {k: v.clone().requires_grad_() for k, v in state.items() if k.endswith(("A", "B"))}
    optimizer = torch.optim.AdamW(leaves.values(), lr=RATE)

    def stacks():
        paths = (k.removesuffix(".lora_A") for k in leaves if k.endswith("A"))
        return {
            p: plain.get_parameter(p) + 0.7 * leaves[f"{p}.lora_B"] @ leaves[f"{p}.lora_A"]
            for p in paths
        }

    for _ in range(STEPS):
        optimizer.zero_grad()
        out = torch.func.functional_call(plain, stacks(), (x,))
        nn.functional.mse_loss(out, y).backward()
        optimizer.step()
    return {name: stack.detach() for name, stack in stacks().items()}


def state_of(model):
    from paramlora.update.sharded import gathered

    return {k: gathered(v).clone() for k, v in paramlora.adapter_state_dict(model).items()}


def case_fsdp(rank, mesh, folder):
    x, y = batch()
    model = adapted()
    state = state_of(model)
    want = dense(state, x, y)
    assert len(want) == 4
    sharded(model, mesh)
    low = next(iter(updates(model)))[2]
    assert low.lora_B.to_local().shape[0] == 2  # of 4 experts
    train(model, *half(rank, x, y))
    trained = state_of(model)
    for name, stack in want.items():
        a, b = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
        base = net().get_parameter(name).detach()
        assert (stack - base).abs().max() > 0.05
        torch.testing.assert_close(base + 0.7 * b @ a, stack, **CLOSE)
    right = torch.func.functional_call(net("eager"), want, (x,))
    torch.testing.assert_close(model(x), right, **CLOSE)
    paramlora.save_adapter(model, folder / "a.safetensors")
    twin = paramlora.load_adapter(net(), folder / "a.safetensors")
    torch.testing.assert_close(twin(x), right, **CLOSE)
    with paramlora.disable_adapters(model):
        torch.testing.assert_close(model(x), net()(x), **CLOSE)
    paramlora.merge(model)
    from paramlora.update.sharded import gathered

    merged = {k: gathered(v) for k, v in model.state_dict().items()}
    assert set(merged) == set(net().state_dict())
    for name, stack in want.items():
        torch.testing.assert_close(merged[name], stack, **CLOSE)


def case_no_sums(rank, mesh, folder):
    """No dense sum is formed inside of a sharded model either, nor with dropout."""
    from paramlora.update.lowrank import LowRank

    x, y = batch()
    torch.manual_seed(2)
    model = sharded(paramlora.attach(net(), {n: {"r": 2, "dropout": 0.5} for n in STACKS}), mesh)

    def delta(self, *args, **kwargs):
        raise AssertionError("a dense sum")

    own, LowRank.delta = LowRank.delta, delta
    try:
        train(model.train(), *half(rank, x, y))
    finally:
        LowRank.delta = own


CASES = {"fsdp": case_fsdp, "no sums": case_no_sums}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return both(tmp_path_factory.mktemp("sharded"), "gloo", CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes(results, name):
    assert_ran(results, CASES, name)
