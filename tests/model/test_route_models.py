"""A sweep of whole models whose rows take different adapters, against each row by itself."""

import copy

import pytest
import torch

import paramlora
from tests.model.rows import ROWS, adapted, one_row

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries themselves


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50)
    return transformers.GPT2Model(config), ["c_attn", "c_fc", "mlp.c_proj", "wpe", "wte"]


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    return transformers.LlamaModel(config), ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
    )
    return transformers.BertModel(config), ["query", "value", "dense", "position_embeddings"]


def gemma3():
    """Whose embedding scales what `nn.Embedding` gives."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=50,
    )
    return transformers.Gemma3TextModel(config), ["embed_tokens", "q_proj", "down_proj"]


def llama4():
    """Whose router, a linear layer of its own, scores the tokens, flattened."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=50,
        num_local_experts=4,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4TextModel(config), ["router", "q_proj", "up_proj", "o_proj"]


@pytest.mark.parametrize("make", [gpt2, llama, bert, gemma3, llama4])
def test_language_models(make):
    torch.manual_seed(0)
    plain, layers = make()
    plain = plain.double().eval()
    model = adapted(copy.deepcopy(plain), layers)
    tokens = torch.randint(0, 50, (len(ROWS), 7))
    with paramlora.route(model, ROWS):
        y = model(tokens).last_hidden_state
    for i, name in enumerate(ROWS):
        expected = one_row(plain, model, name, tokens[i : i + 1]).last_hidden_state
        torch.testing.assert_close(y[i : i + 1], expected)


def test_a_diffusion_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
    )
    plain = plain.double().eval()
    model = adapted(copy.deepcopy(plain), ["to_q", "to_v", "conv1", "conv_in", "linear_1"])
    x, text = torch.randn(6, 4, 8, 8).double(), torch.randn(6, 3, 6).double()
    with paramlora.route(model, ROWS):
        y = model(x, 3, text).sample
    for i, name in enumerate(ROWS):
        one = slice(i, i + 1)
        expected = one_row(plain, model, name, x[one], 3, text[one]).sample
        torch.testing.assert_close(y[one], expected)
