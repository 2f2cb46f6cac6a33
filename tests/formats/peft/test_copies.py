"""The embeddings that peft saves beside an adapter: with the rows of an extended vocabulary."""

import copy

import peft
import pytest
import torch

import paramlora
from paramlora.files.adapters import convert
from tests.formats.peft.test_tokens import llama


def extended(tied, seed):
    """A model with four more rows, which each run fills at random."""
    base = llama(tied)
    torch.manual_seed(seed)
    base.resize_token_embeddings(24, mean_resizing=False)
    return base.requires_grad_(False)


ADAPTED = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "neither": {"target_modules": ["q_proj"]},
}
MORE = torch.arange(24)[None]


@pytest.mark.parametrize("same", (True, False))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("name", ADAPTED)
def test_an_extended_vocabulary_comes_with_its_rows(name, tied, same, tmp_path, recwarn):
    """peft's ``save_embedding_layers``: other new rows than those that it saved are replaced."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTED[name])
    theirs = peft.get_peft_model(extended(tied, 1), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    other = extended(tied, 1 if same else 2)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "theirs").eval()
    ours = paramlora.load_adapter(copy.deepcopy(other), tmp_path / "theirs")
    want = reloaded(input_ids=MORE).logits
    assert (want - other(MORE).logits).abs().max() > (1e-4 if name == "neither" else 0.01)
    torch.testing.assert_close(ours(MORE).logits, want, rtol=1e-5, atol=1e-5)
    adapter = paramlora.adapter_of(ours)
    assert bool(adapter.whole) != same  # a copy of what the model has says nothing
    torch.testing.assert_close(paramlora.merge(ours)(MORE).logits, want, rtol=1e-5, atol=1e-5)


def test_without_the_model_the_saved_rows_are_kept(tmp_path, recwarn):
    config = peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTED["embedding"])
    theirs = peft.get_peft_model(extended(False, 1), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    convert(tmp_path / "theirs", tmp_path / "a.safetensors", "native")
    ours = paramlora.load_adapter(extended(False, 2), tmp_path / "a.safetensors")
    reloaded = peft.PeftModel.from_pretrained(extended(False, 2), tmp_path / "theirs").eval()
    want = reloaded(input_ids=MORE).logits
    torch.testing.assert_close(ours(MORE).logits, want, rtol=1e-5, atol=1e-5)
