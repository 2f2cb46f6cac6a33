"""A sweep of whole models of other libraries: train, merge, and load the result into a plain
model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paramlora

EXAMPLE = Path(__file__).parents[2] / "example_config.json"


def stable_diffusion():
    unet = pytest.importorskip("diffusers").UNet2DConditionModel
    with torch.device("meta"):
        return unet(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            layers_per_block=2,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
            cross_attention_dim=768,
        )


def small_unet():
    unet = pytest.importorskip("diffusers").UNet2DConditionModel
    return unet(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    )


def small_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTModel(config)


def small_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config)


def small_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def small_conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, dilation=2, groups=4),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def tokens():
    return torch.arange(10).reshape(2, 5)


def call_unet(model):
    x = torch.linspace(-1, 1, 2 * 4 * 64).double().reshape(2, 4, 8, 8)
    context = torch.linspace(-1, 1, 2 * 3 * 12).double().reshape(2, 3, 12)
    return model(x, torch.tensor([3, 500]), context).sample


def call_vit(model):
    return model(torch.linspace(-1, 1, 2 * 3 * 64).double().reshape(2, 3, 8, 8)).pooler_output


def call_conv_net(model):
    return model(torch.linspace(-1, 1, 2 * 3 * 64).double().reshape(2, 3, 8, 8))


MODELS = {
    "unet": (small_unet, call_unet, ["to_q", "to_v", "to_out.0", "conv1", "proj_in"], 25),
    "vit": (small_vit, call_vit, [r"re:.*(q_proj|query|o_proj|fc1|dense)", "projection"], 5),
    "bert": (
        small_bert,
        lambda m: m(tokens())[0],
        ["query", "value", "word_embeddings", "intermediate.dense"],
        7,
    ),
    "gpt2": (small_gpt2, lambda m: m(tokens()).logits, ["c_attn", "c_proj", "c_fc"], 8),
    "conv net": (small_conv_net, call_conv_net, ["0", "3", "4", "7"], 4),
}


def test_stable_diffusion_trains_what_the_original_trained():
    model = stable_diffusion()
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    with pytest.warns(paramlora.ParamloraWarning, match='"qkv_proj" matches nothing'):
        paramlora.attach(model, EXAMPLE)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 797_184
    assert paramlora.summary(model).trainable == 797_184
    paths = {row.path.split(".")[-1] for row in paramlora.summary(model).rows}
    assert paths == {"to_q", "to_v"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trainable_scale", (0, 1))
def test_training_leaves_the_base_and_merging_leaves_the_output(name, trainable_scale):
    build, call, entries, least = MODELS[name]
    torch.manual_seed(0)
    model, plain = build().double().eval(), build().double().eval()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    config = {e: {"r": 1, "scale": 2, "trainable_scale": trainable_scale} for e in entries}
    found = paramlora.targets(model, config)
    assert len(found) >= least and {t.entry.name for t in found} == set(entries)

    first = call(model).detach()
    paramlora.attach(model, config)
    assert torch.equal(call(model), first)
    losses, updates = train(model, call, torch.randn_like(first))
    assert losses[-1] < losses[0]
    assert updates == len(found) * (2 + trainable_scale)

    adapted = call(model).detach()
    assert (adapted - first).abs().max() > 1e-4
    with paramlora.disable_adapters(model):
        assert torch.equal(call(model), first)
    check_base(model, base)

    paramlora.merge(model)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(base)
    torch.testing.assert_close(call(model), adapted, rtol=1e-10, atol=1e-10)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(call(plain), call(model))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, base[k])}
    assert changed >= {f"{t.module}.{t.tensor}" for t in found}


def train(model, call, goal):
    """The losses, and the number of parameters that moved."""
    parameters = paramlora.trainable_parameters(model)
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(call(model), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, sum(not torch.equal(p, b) for p, b in zip(parameters, before))


def check_base(model, base):
    """Every stored tensor of the base, under its torch name, is the one before training."""
    state = model.state_dict()
    for key, value in base.items():
        owner, _, tensor = key.rpartition(".")
        original = f"{owner}.parametrizations.{tensor}.original"
        assert torch.equal(state[original] if original in state else state[key], value), key


def test_a_tied_language_model_head_follows_its_embedding_or_is_untied_with_a_warning():
    torch.manual_seed(0)
    model = small_gpt2().double().eval()
    with pytest.warns(paramlora.ParamloraWarning, match="one tensor is held as"):
        paramlora.attach(model, {"lm_head": {"r": 2}})
    train(model, MODELS["gpt2"][1], torch.randn(2, 5, 40).double())
    wte = model.transformer.wte.weight.detach().clone()
    adapted = model(tokens()).logits.detach()
    paramlora.merge(model)
    assert torch.equal(model.transformer.wte.weight, wte)
    assert not torch.equal(model.lm_head.weight, wte)
    torch.testing.assert_close(model(tokens()).logits, adapted, rtol=1e-10, atol=1e-10)
