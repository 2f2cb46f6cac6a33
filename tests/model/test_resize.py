"""transformers' own hands on the embeddings of an attached model: tying, resizing, replacing."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

import paramlora
from paramlora.model.attach import updates

transformers = pytest.importorskip("transformers")
TIED = {"re:.*(wte|lm_head)": {"r": 2}}


def base(tied=True):
    torch.manual_seed(0)
    size = dict(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.GPT2Config(tie_word_embeddings=tied, **size, **ends)
    return transformers.GPT2LMHeadModel(config).double().eval()


def fill(model):
    generator = torch.Generator().manual_seed(3)
    for _, _, update in updates(model):
        for name, value in update.named_parameters():
            if name in ("lora_B", "lora_whole"):
                value.data += 0.3 * torch.randn(value.shape, generator=generator).to(value.dtype)
    return model


def sums(model):
    """By path, the update of each weight in the weight's shape."""
    return {
        path: (
            update.delta(module.weight.shape)
            if hasattr(update, "lora_A")
            else update.lora_whole - module.parametrizations.weight.original
        ).detach()
        for path, module, update in updates(model)
    }


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


CASES = {
    "tied": (True, TIED),
    "embedding": (False, {"wte": {"r": 2}}),
    "head": (False, {"lm_head": {"r": 2}}),
    "soft head": (False, {"lm_head": {"r": 2, "hard": 0}, "wte": {"r": 3}}),
    "both": (False, {"wte": {"r": 2}, "lm_head": {"r": 3}}),
    "pissa": (False, {"wte": {"r": 2, "init": "pissa"}, "lm_head": {"r": 3, "init": "olora"}}),
    "whole": (False, {"wte": {"whole": True}, "c_attn": {"r": 2}}),
    "none of them": (True, {"c_attn": {"r": 2}}),
}


@pytest.mark.parametrize("how", ((23, None), (23, 8), (None, 16), (12, None), (20, None)))
@pytest.mark.parametrize("case", CASES)
def test_a_vocabulary_of_another_size_keeps_the_updates_on_the_old_rows(case, how):
    tied, config = CASES[case]
    model = fill(paramlora.attach(base(tied), config))
    old = sums(model)
    ids = {id(p) for _, _, update in updates(model) for p in update.parameters()}
    plain = base(tied)
    for one in (plain, model):
        torch.manual_seed(5)
        got = one.resize_token_embeddings(how[0], pad_to_multiple_of=how[1])
    size = plain.config.vocab_size
    assert size == model.config.vocab_size == got.num_embeddings == model.vocab_size
    assert got is model.get_input_embeddings() and model.lm_head.out_features == size
    assert {id(p) for _, _, update in updates(model) for p in update.parameters()} == ids
    kept = min(20, size)
    with torch.no_grad():
        for path, delta in sums(model).items():
            layer = plain.get_submodule(path)
            rows = slice(None) if "attn" in path else slice(kept)
            torch.testing.assert_close(delta[rows], old[path][rows], rtol=1e-12, atol=1e-12)
            layer.weight[rows] += old[path][rows]
            for name in (path, "lm_head") if tied and path == "transformer.wte" else (path,):
                there = model.get_submodule(name)
                shown = there.weight
                if "lora_branches" in there._modules:
                    shown = shown + there.lora_branches[0].delta(shown.shape)
                torch.testing.assert_close(shown, layer.weight, rtol=1e-12, atol=1e-12)
    tokens = torch.arange(min(size, 23))[None, -8:]
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-9, atol=1e-9)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    paramlora.merge(model)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-9, atol=1e-9)
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_a_resized_model_trains_saves_and_loads(tmp_path):
    model = fill(paramlora.attach(base(), TIED))
    model.resize_token_embeddings(23)
    tokens = torch.arange(15, 23)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    ((_, _, update),) = updates(model)
    assert update.lora_A.shape == update.lora_A.grad.shape == (2, 23)
    paramlora.save_adapter(model, tmp_path / "a.safetensors")
    other = base()
    other.resize_token_embeddings(23)
    other.load_state_dict(paramlora.detach(copy.deepcopy(model)).state_dict())
    paramlora.load_adapter(other, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(other, tokens), logits(model, tokens), rtol=0, atol=0)


def test_a_square_one_still_tells_its_sides():
    from paramlora import checkpoint

    model = fill(paramlora.attach(base(False), {"wte": {"r": 2}}))
    model.resize_token_embeddings(16)
    layer = model.transformer.wte
    want = layer.weight.detach()
    state = checkpoint.merge(model.state_dict())
    torch.testing.assert_close(state["transformer.wte.weight"], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", (TIED, {"lm_head": {"r": 2}}, {"wte": {"r": 2}}))
@pytest.mark.filterwarnings("ignore:.*one tensor is held as")
def test_tying_again_ties_the_base_as_before(config):
    model = fill(paramlora.attach(base(), config))
    tokens = torch.arange(8)[None]
    want, keys = logits(model, tokens), list(model.state_dict())
    model.tie_weights()
    assert torch.equal(logits(model, tokens), want) and list(model.state_dict()) == keys
    tensors = [
        m.parametrizations.weight.original if hasattr(m, "parametrizations") else m.weight
        for m in (model.transformer.wte, model.lm_head)
    ]
    assert tensors[0] is tensors[1]


def test_tying_ties_what_was_apart():
    model = base(False)
    model.config.tie_word_embeddings = True
    fill(paramlora.attach(model, {"wte": {"r": 2}, "lm_head": {"r": 2}}))
    model.tie_weights()
    head, embedding = model.lm_head.parametrizations.weight, model.transformer.wte.parametrizations
    assert head.original is embedding.weight.original and head[0] is not embedding.weight[0]


@pytest.mark.parametrize("which", ("input", "output"))
def test_replacing_an_adapted_end_is_refused(which):
    model = fill(paramlora.attach(base(False), {"wte": {"r": 2}, "lm_head": {"r": 2}}))
    ask, put = (getattr(model, f"{verb}_{which}_embeddings") for verb in ("get", "set"))
    old = ask()
    put(old)
    with pytest.raises(paramlora.AdapterError, match=f"set_{which}_embeddings would lose"):
        put(torch.nn.Embedding(23, 16))
    assert ask() is old
    paramlora.detach(model)
    put(torch.nn.Embedding(23, 16))
    assert ask() is not old


def test_replacing_an_end_without_updates_works():
    model = paramlora.attach(base(False), {"c_attn": {"r": 2}})
    new = torch.nn.Embedding(23, 16)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new


def test_under_somebodys_parametrization_resizing_is_refused():
    model = base(False)
    parametrizations.weight_norm(model.lm_head)
    paramlora.attach(model, {"lm_head": {"r": 2}})
    with pytest.raises(paramlora.AdapterError, match="weight of Linear is under WeightNorm beside"):
        model.resize_token_embeddings(23)
    assert model.config.vocab_size == 20 and model.get_input_embeddings().num_embeddings == 20


def test_an_error_in_the_middle_leaves_the_updates_where_they_were():
    model = fill(paramlora.attach(base(), TIED))
    tokens = torch.arange(8)[None]
    want = logits(model, tokens)
    with pytest.raises(ValueError, match="which is not and integer"):
        model.resize_token_embeddings(23, pad_to_multiple_of=1.5)
    assert torch.equal(logits(model, tokens), want)
