"""Files for vLLM: what its own rule of names and formula make of them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paramlora import files, formats
from paramlora.errors import FileError
from paramlora.update.value import Adapter, Update


def test_vllm_gets_one_rank_and_one_alpha(tmp_path):
    """Its formula: one ``lora_alpha / r`` for all, and names behind ``base_model.model.``."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "o_proj": nn.Linear(4, 6)})
    shapes = {"q_proj": (1, 3.0), "o_proj": (2, 0.5)}
    updates = {
        path: Update(
            torch.randn(r, model[path].in_features), torch.randn(model[path].out_features, r),
            scale, tuple(model[path].weight.shape), kind="linear",
        )
        for path, (r, scale) in shapes.items()
    }  # fmt: skip
    files.write_adapter(Adapter(updates), tmp_path / "out", "vllm", formats.base_of(model))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {}, {})
    assert config["target_modules"] == ["o_proj", "q_proj"] and config["bias"] == "none"
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(t) for key, t in state.items() if "lora_A" in key} == {2}
    for path, update in updates.items():
        a, b = (state[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        want = update.scale * update.lora_B.double() @ update.lora_A.double()
        torch.testing.assert_close(config["lora_alpha"] / 2 * b @ a, want, rtol=1e-6, atol=1e-6)
    assert formats.detect(files.adapters.outlined(tmp_path / "out")) == "peft"


def test_vllm_has_experts_one_by_one_where_their_checkpoint_has():
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, 6), torch.randn(3, 4, 1)
    stack = {"mlp.experts.gate_up_proj": Update(a, b, 1.0, (3, 4, 6), "stack", kind="parameter")}
    shapes = {f"mlp.experts.{e}.{n}_proj.weight": (2, 6) for e in range(3) for n in ("gate", "up")}
    content = formats.write(Adapter(stack), "vllm", formats.base_of_shapes(shapes))
    for e in range(3):
        for half, name in enumerate(("gate", "up")):
            stem = f"base_model.model.mlp.experts.{e}.{name}_proj"
            down, up = (content.state[f"{stem}.lora_{x}.weight"].double() for x in "AB")
            want = (b[e].double() @ a[e].double())[2 * half : 2 * half + 2]
            torch.testing.assert_close(content.config["lora_alpha"] * up @ down, want)


def test_what_vllm_does_not_load_is_refused():
    head = Update(torch.ones(1, 6), torch.ones(4, 1), 1.0, (4, 6), kind="linear")
    with pytest.raises(FileError, match="lm_head: a head, which vLLM adapts only in models that"):
        formats.write(Adapter({"lm_head": head}), "vllm")
