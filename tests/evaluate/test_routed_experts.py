"""Rows of a batch that take different adapters of stacks of experts, against each row by itself."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import paramlora
from paramlora import AdapterError
from tests.model.rows import ROWS, adapted, check, images, trained
from tests.model.test_experts import IMPLEMENTATIONS, Config, built

FAMILIES = {
    "qwen3_moe": "Qwen3MoeExperts",
    "gpt_oss": "GptOssExperts",
    "nemotron_h": "NemotronHExperts",
    "step3p7": "Step3p7Experts",
    "longcat_flash": "LongcatFlashExperts",
}


class Block(nn.Module):
    """A router that no adapter changes, and experts, as transformers' blocks call them."""

    def __init__(self, experts, implementation="eager", time_first=False):
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), experts
        self.time_first = time_first
        self.implementation = implementation

    def forward(self, x):
        # the untouched ones by their loop, which alone is there in float64
        own = self.implementation if hasattr(self.experts, "parametrizations") else "eager"
        if hasattr(self.experts, "config"):
            self.experts.config._experts_implementation = own
        hidden = x.transpose(0, 1) if self.time_first else x
        flat = hidden.reshape(-1, 16)
        weights, index = self.router(flat).softmax(-1).topk(2)
        y = self.experts(flat, index, weights).view(hidden.shape)
        return y.transpose(0, 1) if self.time_first else y


def experts_of(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = Config()
    config.zero_expert_num = 0
    return built(getattr(module, FAMILIES[family]), config)


def stacks_of(experts, prefix="experts."):
    return [prefix + name for name, p in experts.named_parameters() if p.dim() == 3]


LOOPS = ("step3p7", "longcat_flash")
EVERY = [(family, how) for family in FAMILIES for how in IMPLEMENTATIONS[: family in LOOPS or None]]


@pytest.mark.parametrize(("family", "implementation"), EVERY)
def test_each_row_takes_its_own(family, implementation):
    layers = stacks_of(experts_of(family))
    # the reference, a loop over the experts, is the same function as each implementation
    check(lambda: Block(experts_of(family), implementation), layers, images(7, 16))


def test_one_stack_alone_and_rows_of_one_token():
    (first, second) = stacks_of(experts_of("qwen3_moe"))
    for layers in ([first], [second], [second, first]):
        check(lambda: Block(experts_of("qwen3_moe")), layers, images(1, 16))


def test_llama4_gives_every_expert_all_tokens():
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = built(Llama4TextExperts)

        def forward(self, x):
            flat = x.reshape(1, -1, 16).expand(4, -1, -1).reshape(-1, 16)
            return self.experts(flat).view(4, *x.shape).sum(0)

    check(Dense, stacks_of(Dense().experts), images(3, 16))


def pair(**how):
    torch.manual_seed(0)
    plain = Block(experts_of("qwen3_moe"), **how).double()
    return plain, adapted(copy.deepcopy(plain), stacks_of(plain.experts))


def test_rows_behind_time_and_packed_sequences():
    plain, model = pair(time_first=True)
    x = images(5, 16)
    with paramlora.route(model, ROWS, dim=1):
        y = model(x)
    _, same = pair()
    with paramlora.route(same, ROWS):
        torch.testing.assert_close(y, same(x))
    packed = x.reshape(1, -1, 16)
    ends = torch.arange(0, 5 * len(ROWS) + 1, 5)
    with paramlora.route(same, ROWS, dim=1, cu_seqlens=ends):
        torch.testing.assert_close(same(packed).view(y.shape), y)


def test_what_is_not_finite_stays_in_its_row():
    _, model = pair()
    x = images(5, 16)
    x[0] = torch.nan  # a row of "a", which row 4 is too
    model.router = nn.Identity()
    model.router.forward = lambda flat: torch.arange(len(flat) * 4).view(-1, 4).double() % 7
    with paramlora.route(model, ROWS):
        y = model(x)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    y.square().sum().backward()
    for name, p in trained(model).items():
        assert p.grad.isnan().any() == (".0." in name), name  # of "a"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    plain, model = pair()
    x = images(33, 16)
    with paramlora.route(model, ROWS):
        exact = model(x)
    narrow = copy.deepcopy(model).to(dtype)
    paramlora_dtype = {p.dtype for p in trained(narrow).values()}
    assert len(paramlora_dtype) == 1
    narrow.router = model.router  # the same experts for each token
    narrow.router.forward = lambda flat: nn.Linear.forward(model.router, flat.double()).to(dtype)
    with paramlora.route(narrow, ROWS):
        y = narrow(x.to(dtype))
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_a_small_update_is_kept_in_bfloat16():
    """The share of an update of a thousandth of the weights that reaches one product."""
    torch.manual_seed(0)
    from paramlora.evaluate.routed_experts import grouped_linear_of_rows, pairs_of

    experts, rows = torch.arange(64).sort()[0] % 2, torch.arange(64) % 3
    experts = experts.sort()[0]
    x, W = torch.randn(64, 256).bfloat16(), (torch.randn(2, 128, 256) / 16).bfloat16()
    A = [torch.randn(2, 4, 256) / 16 for _ in range(2)]
    B = [torch.randn(2, 4, 128) * 5e-4 for _ in range(2)]
    ends = torch.tensor([32, 64])
    y = grouped_linear_of_rows(x, W, ends, A, B, pairs_of(experts, rows, 2, 2))
    wide = torch.einsum("ni,noi->no", x.double(), W.double()[experts])
    true = torch.zeros(64, 128).double()
    for i in range(2):
        low = torch.einsum(
            "ni,nri,nro->no", x.double(), A[i].double()[experts], B[i].double()[experts]
        )
        true[rows == i] = low[rows == i]
    kept = ((y.double() - wide) * true).sum() / true.square().sum()
    assert 2e-4 < true.norm() / wide.norm() < 5e-3
    rounded = ((wide.bfloat16() + true.bfloat16()).double() - wide).mul(
        true
    ).sum() / true.square().sum()
    assert abs(kept - 1) < 0.1 < abs(rounded - 1) + 0.09


def test_dropout_acts_on_the_updates_of_each_row():
    torch.manual_seed(0)
    plain = Block(experts_of("qwen3_moe")).double()
    model = adapted(copy.deepcopy(plain), stacks_of(plain.experts), dropout=0.5)
    x = images(5, 16)
    with paramlora.route(model.eval(), ROWS):
        exact = model(x)
    with paramlora.route(model.train(), ROWS):
        one, two = model(x), model(x)
    base = [i for i, name in enumerate(ROWS) if name is None]
    assert not torch.equal(one, two) and not torch.allclose(one, exact)
    torch.testing.assert_close(one[base], plain(x)[base])


def test_compiled_with_other_numbers_of_adapters():
    plain, model = pair(implementation="grouped_mm")
    model, x = model.float(), images(5, 16).float()
    torch._dynamo.reset()
    count = CompileCounter()
    fast = torch.compile(model, backend=count, fullgraph=True)
    for rows in (ROWS, ROWS[::-1], ["a"] * len(ROWS)):
        with paramlora.route(model, rows):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert count.frame_count == 1


def test_what_cannot_tell_its_tokens_is_refused():
    plain, model = pair()
    with paramlora.route(model, ["a", "b", None, "c"]):
        with pytest.raises(AdapterError, match=r"\[30, 16\], whose dimension 0 is not the 4 rows"):
            model.experts(images(5, 16).view(30, 16), *2 * [torch.zeros(30, 2).long()])
    with paramlora.route(model, ROWS, dim=2):
        with pytest.raises(AdapterError, match="dimension 2"):
            model(images(5, 16))
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    sizes = paramlora.attach(JetMoeParallelExperts(4, 16, 8), {"weight": {"r": 2}}, "a")
    with pytest.raises(AdapterError, match="only the tensor is known"):
        paramlora.route(sizes, ["a", None]).__enter__()
