"""Classes of `benchmarks.architectures` that together reach what all that were tried reach."""

import copy
import json
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
import peft

from benchmarks import arch_checks, architectures, tiny, tiny_inputs

# chosen by `python -m benchmarks.arch_cover`
COVER = """
AutoencoderKL, of odd sizes; BioGptForCausalLM; BitForImageClassification;
DreamLiteTransformer2DModel; EomtForUniversalSegmentation; FalconForCausalLM; GPT2LMHeadModel;
Gemma4ForConditionalGeneration; GptOssForCausalLM, grouped products; JetMoeForCausalLM;
LasrForCTC; Llama4ForCausalLM; M2M100ForConditionalGeneration; MarianForCausalLM;
MiniMaxM3VLVisionModel; MuseSparkForConditionalGeneration;
Nemotron3_5TranscribeWordTimestampModel; NemotronAsrStreamingForRNNT; NemotronHForCausalLM;
NeoMMEForMaskedLM; ParakeetForCTC; Phi4MultimodalVisionModel;
RegNetForImageClassification, groups of three; T5ForConditionalGeneration, gated;
ViTForImageClassification, of odd sizes; VoxtralRealtimeEncoder;
Wav2Vec2ForCTC, layer norm, many groups
"""
# the quickest of the others, so that it is a tenth of all that are checked
MORE = """
Owlv2TextModel; OwlViTVisionModel; MetaClip2ForImageClassification; FlavaMultimodalModel;
GPTNeoXJapaneseForCausalLM; PatchTSTForClassification; OpenAIGPTLMHeadModel; AlbertForMaskedLM;
Ernie4_5_VLMoeVisionTransformerPretrainedModel; RoFormerForCausalLM; FlavaTextModel;
Phi3ForCausalLM; ModernBertForMaskedLM; FlavaImageModel; InstructBlipVideoVisionModel;
PhiForCausalLM; PixtralVisionModel; OlmoForCausalLM; PaddleOCRTextModel; MetaClip2VisionModel;
FNetForMaskedLM; MptForCausalLM; BartForConditionalGeneration, scaled, of odd sizes;
Idefics3VisionTransformer; Ideogram4PromptEnhancerHead; InklingAudioModel; LwDetrViTBackbone;
MambaForCausalLM; OPTForCausalLM; PvtV2ForImageClassification;
SwinForImageClassification, windows that do not fit;
WhisperForConditionalGeneration, scaled, untied; XLNetLMHeadModel;
Qwen2MoeForCausalLM, batched products, of odd sizes; LlamaForCausalLM, of odd sizes;
LlamaForCausalLM, tied, with biases; MixtralForCausalLM, batched products;
SegformerForSemanticSegmentation, of odd sizes
"""
CLASSES = [" ".join(name.split()) for name in f"{COVER};{MORE}".split(";")]


@pytest.fixture(autouse=True)
def _quiet():
    """Double precision by default and no word of the other libraries, as in a worker."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    with warnings.catch_warnings():
        architectures.quiet()
        yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


def of(name):
    return architectures.examined(name, cost=False)


@pytest.mark.parametrize("name", CLASSES)
def test_everything_in_a_model_is_exact(name):
    row = of(name)
    assert row["reached"] > 0
    wrong = {
        check: told
        for check, told in row["checks"].items()
        if isinstance(told, str)
        and not told.startswith("own:")  # the plain model cannot, or peft's own layers
        and not (check == "peft" and told.startswith("FileError:"))  # refused in one sentence
    }
    assert not wrong


def subject(name):
    _, model, inputs = architectures.able(name)
    return arch_checks.subject(model, inputs)


def test_an_update_that_is_missing_or_wrong_is_caught():
    s = subject("GPT2LMHeadModel")
    arch_checks.in_mode(s, False)
    last = s.places[-1].paths[0]
    update = s.adapted.get_submodule(last).parametrizations.weight[0]
    with torch.no_grad():
        update.lora_B *= 1.001
    with pytest.raises(arch_checks.Differs, match="apart"):
        arch_checks.in_mode(s, False)
    with torch.no_grad():
        update.lora_B.zero_()
    for check in (arch_checks.saved_and_loaded, arch_checks.merged, arch_checks.read_by_peft):
        with pytest.raises(arch_checks.Differs, match="apart"):
            check(s)


class Jumps(torch.nn.Module):
    """Computes in float32 by name; its gradient jumps where an output of its layer crosses zero."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 64, dtype=torch.float32)

    def forward(self, x):
        return torch.relu(self.layer(x.to(torch.float32)))


def test_a_gradient_that_jumps_at_a_rounding_is_compared_in_double_precision():
    torch.manual_seed(0)
    model, x = Jumps(), torch.randn(2, 5, dtype=torch.float32)
    with torch.no_grad():  # the first row's outputs are roundings
        model.layer.bias -= arch_checks.subject(model, {"x": x}).reference.layer(x)[0]
    s = arch_checks.subject(model, {"x": x})
    arch_checks.outputs_match(s, s.adapted)
    with pytest.raises(arch_checks.Differs, match="gradients"):
        arch_checks.at_a_step(s, False)
    assert arch_checks.in_mode(s, False) < 1e-12
    with torch.no_grad():
        s.adapted.layer.parametrizations.weight[0].lora_B *= 1.0001
    with pytest.raises(arch_checks.Differs, match="apart"):
        arch_checks.in_mode(s, False)


def test_what_peft_holds_of_a_convolution_is_read_from_its_factors():
    """Its own function for it raises for a `Conv3d` whose kernel is one."""
    model = torch.nn.Sequential(torch.nn.Conv3d(4, 6, 1), torch.nn.Conv2d(6, 6, 3))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, lora_alpha=3)
    adapted = peft.get_peft_model(model, config).base_model.model
    for layer, x in (
        (adapted[0], torch.randn(1, 4, 2, 3, 3)),
        (adapted[1], torch.randn(1, 6, 5, 5)),
    ):
        base = layer.get_base_layer()
        weight = base.weight + arch_checks._delta(layer).reshape(base.weight.shape)
        want = torch.func.functional_call(base, {"weight": weight}, (x,))
        torch.testing.assert_close(layer(x), want)


def test_a_base_that_moved_is_caught():
    s = subject("GPT2LMHeadModel")
    assert arch_checks.base_again(s) == arch_checks.detached(s) == 0.0
    weight = s.adapted.transformer.h[0].attn.c_attn.parametrizations.weight.original
    with torch.no_grad():
        weight.mul_(1 + 1e-12)
    with pytest.raises(arch_checks.Differs, match="bit for bit"):
        arch_checks.base_again(s)
    with pytest.raises(arch_checks.Differs, match="other values"):
        arch_checks.detached(s)


def test_a_gradient_that_is_missing_is_caught():
    s = subject("GPT2LMHeadModel")
    want = arch_checks.of_dense(s.reference, s.inputs, s.places, s.factors)
    got = arch_checks.of_adapted(s.adapted, s.inputs)
    short = copy.copy(got.gradients)
    name = next(iter(short))
    del short[name]
    with pytest.raises(arch_checks.Differs, match=f"no gradient of {name}"):
        arch_checks.gradients_apart(short, want.gradients)


class Asks(torch.nn.Module):
    """Takes what its errors ask for."""

    config = type("Config", (), {"hidden_size": 64, "to_dict": dict, "model_type": "asks"})()

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(24, 2)

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        if attention_mask is None:
            raise ValueError("`attention_mask` is needed")
        return self.layer(hidden_states) * timestep.mean()


def test_inputs_are_what_errors_ask_for():
    reasons = []
    found = architectures.callable_with(Asks().double(), torch.float64, "named", reasons)
    assert list(found) == ["hidden_states", "attention_mask", "timestep"]
    assert found["hidden_states"].shape == (2, 8, 24) and len(reasons) > 2
    error = RuntimeError(
        "Given groups=1, expected input[2, 3, 9] to have 5 channels, but got 3 channels"
    )
    new = tiny_inputs.resized(error, {"x": torch.ones(2, 3, 9), "ids": torch.ones(2).long()})
    assert new["x"].shape == (2, 5, 9) and new["ids"].shape == (2,)
    assert tiny_inputs.resized(error, {"x": torch.ones(2, 4)}) is None
    assert tiny_inputs.resized(ValueError("no"), {"x": torch.ones(2, 4)}) is None


def test_a_configuration_is_given_what_its_model_reads():
    class Config:
        model_type, intermediate_size = "reads", None

        def to_dict(self):
            return {}

    class Reads(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.layer = torch.nn.Linear(4, config.mlp_dim * config.intermediate_size)

    config = Config()
    config.intermediate_size = None
    assert tiny.size_of(Reads, {"config": config}) == 5 * 64 * 64
    assert (config.mlp_dim, config.intermediate_size) == (64, 64)
    with pytest.raises(TypeError, match="no word"):
        tiny.size_of(type("Fails", (torch.nn.Module,), {"__init__": fails}), {"config": config})


def fails(self, config):
    raise TypeError("no word")


def test_a_run_goes_on_with_the_last(tmp_path, capsys):
    options = ["^(GPT2Model|OPTModel)$", "--out", str(tmp_path)]
    assert architectures.main([*options, "--count", "1", "--workers", "1"]) == 0
    assert "1 of 2 classes" in capsys.readouterr().out
    assert architectures.main([*options, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "2 checked, 0 refused, 0 not built, 0 failed" in told and "2 of 2 classes" in told
    lines = (tmp_path / "architectures.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["class"] for line in lines) == ["GPT2Model", "OPTModel"]
