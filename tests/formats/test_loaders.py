"""What other tools' loaders would match to nothing is found out before it is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paramlora import files, formats
from paramlora.errors import FileError
from paramlora.formats import Content, Slot
from paramlora.update.value import Adapter, Update
from tests.formats.test_comfyui import chosen, unet

diffusers = pytest.importorskip("diffusers")


# reading back


def one_layer(path, shape=(4, 6)):
    return Adapter({path: Update(torch.ones(1, 6), torch.ones(4, 1), 1.0, shape, kind="linear")})


def test_what_would_match_nothing_where_it_is_loaded_is_not_left(tmp_path):
    model = unet()
    base = formats.base_of(model)
    adapter = Adapter(chosen(model, ("to_q",)))
    for to, how in {
        "kohya": {"prefix": "lora_te1"},
        "diffusers": {"component": "text_encoder"},
    }.items():
        for dry in (True, False):
            with pytest.raises(
                FileError, match=rf"out.safetensors: what loads {to}'s files would m"
            ):
                files.write_adapter(
                    adapter, tmp_path / "out.safetensors", to, base, dry_run=dry, **how
                )
        assert not list(tmp_path.iterdir())
    for to in ("kohya", "diffusers", "comfyui"):
        files.write_adapter(adapter, tmp_path / f"{to}.safetensors", to, base)


@pytest.mark.parametrize("to", sorted(formats.WRITERS))
def test_every_tools_rule_of_names_is_asked(to):
    """A key that is of no layer is found out, whichever tool's file it is in."""
    base = {path: Slot((4, 6), "matrix", "linear", 1) for path in ("block.a", "head")}
    adapter = Adapter({**one_layer("block.a").updates, **one_layer("head").updates})
    content = formats.write(adapter, to, base)
    formats.check_loads(content, adapter, to, base)
    renamed = {key.replace("head", "heat"): tensor for key, tensor in content.state.items()}
    with pytest.raises(FileError, match=f"what loads {to}'s files would match nothing to .*heat"):
        formats.check_loads(Content(renamed, {}, content.config), adapter, to, base)


def test_a_writer_that_loses_a_layer_is_found_out(tmp_path):
    """Of any format: a broken one is registered, and its file is not left."""

    def write(adapter, base=None):
        first, *_ = adapter.updates
        return formats.FORMATS["peft"].write(
            Adapter({first: adapter.updates[first]}), {first: base[first]}
        )

    form = formats.FORMATS["peft"]
    broken = {**vars(form), "name": "broken", "marks": (), "like": "peft", "write": write}
    formats.register(formats.Format(**broken))
    try:
        base = {p: Slot((4, 6), "matrix", "linear", 1) for p in ("a.q", "a.k")}
        both = Adapter({**one_layer("a.q").updates, **one_layer("a.k").updates})
        with pytest.raises(
            FileError, match="out: (targets|read back as a file of broken it lacks a.k)"
        ):
            files.write_adapter(both, tmp_path / "out", "broken", base)
        assert not list(tmp_path.iterdir())
    finally:
        formats.unregister("broken")


@pytest.mark.parametrize("known", [True, False])
def test_what_stands_beside_the_factors_is_read_back_too(known, tmp_path):
    """Whole tensors of PEFT, and changes of biases and norms of kohya: a base has matrices."""
    model = nn.ModuleDict({"q": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3)})
    base = formats.base_of(model) if known else None
    whole = {"norm": torch.rand(4), "norm.bias": torch.rand(4), "head": torch.rand(3, 4)}
    whole["head.bias"] = torch.rand(3)
    adapter = Adapter(one_layer("q").updates, whole=whole)
    files.write_adapter(adapter, tmp_path / "peft", "peft", base)
    back = files.read_adapter(tmp_path / "peft", base).whole.values()
    assert sorted(map(str, map(torch.Tensor.tolist, back))) == sorted(
        str(t.tolist()) for t in whole.values()
    )
    state = {"lora_unet_q.lora_down.weight": torch.ones(1, 6)}
    state |= {"lora_unet_q.lora_up.weight": torch.ones(4, 1), "lora_unet_q.diff_b": torch.rand(4)}
    state |= {"lora_unet_norm.w_norm": torch.rand(4), "lora_unet_norm.b_norm": torch.rand(4)}
    save_file(state, tmp_path / "a.safetensors")
    found = files.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert len(found.values()) == 4
    written = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())
