"""A sweep of transformers' own Trainer, with nothing of ours beside it: it saves, resumes, keeps
the best."""

import copy

import pytest
import safetensors.torch
import torch

import paramlora

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer itself

CONFIGS = {
    "hard": {"c_attn": {"r": 2, "alpha": 4}},
    "soft": {"c_attn": {"r": 2, "hard": 0}},
    "dropout": {"c_attn": {"r": 2, "dropout": 0.3}},
    "scale": {"c_attn": {"r": 2, "trainable_scale": 1}},
    "whole": {"c_attn": {"r": 2}, "ln_f": {"whole": True}},
    "pissa": {"c_attn": {"r": 2, "init": "pissa"}},
    "backbone": {"trainable_model": 1, "c_attn": {"r": 2}},
    "tied": {"re:.*(wte|lm_head)": {"r": 2}, "c_attn": {"r": 2}},
    "head": {"lm_head": {"r": 2}},
    "position": {"wpe": {"r": 2}},
}


def base(**options):
    torch.manual_seed(0)
    size = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **size, **options)
    return transformers.GPT2LMHeadModel(config)


def rows(count=16):
    found = [(torch.arange(8) * (start + 1)) % 20 for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in found]


def trainer(model, folder, steps, **options):
    arguments = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(1)
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=rows(),
        eval_dataset=rows(4),
    )


def attached(config, **options):
    model = base(**options)
    torch.manual_seed(2)
    return paramlora.attach(model, config)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def check_resumes(make, folder, **options):
    whole = trainer(make(), folder / "whole", 4, **options)
    whole.train()
    trainer(make(), folder / "stopped", 2, **options).train()
    resumed = trainer(make(), folder / "stopped", 4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    assert [k for k in want if not torch.equal(want[k], got[k])] == []
    want, got = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert want.keys() == got.keys() and want
    for key, moments in want.items():
        assert all(torch.equal(value, got[key][name]) for name, value in moments.items())
    started = make().state_dict()
    assert any(not torch.equal(v, started[k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_resumes_to_the_last_bit(name, tmp_path):
    check_resumes(lambda: attached(CONFIGS[name]), tmp_path)


@pytest.mark.parametrize("kind", ({}, {"use_reentrant": False}, {"use_reentrant": True}))
def test_it_resumes_under_gradient_checkpointing(kind, tmp_path):
    options = {"gradient_checkpointing": True}
    if kind:
        options["gradient_checkpointing_kwargs"] = kind
    check_resumes(lambda: attached(CONFIGS["hard"]), tmp_path, **options)


def test_it_resumes_with_an_untied_head(tmp_path):
    config = {"wte": {"r": 2}, "lm_head": {"r": 3}}
    check_resumes(lambda: attached(config, tie_word_embeddings=False), tmp_path)


def test_it_resumes_with_several_adapters_and_strengths(tmp_path):
    def make():
        model = paramlora.attach(attached(CONFIGS["hard"]), {"c_attn": {"r": 3}}, "second")
        paramlora.set_adapters(model, {"default": 0.5, "second": 1})
        return model

    check_resumes(make, tmp_path)


@pytest.mark.parametrize("options", ({"save_on_each_node": True}, {"save_only_model": True}))
def test_its_other_ways_of_saving(options, tmp_path):
    run = trainer(attached(CONFIGS["hard"]), tmp_path, 2, **options)
    run.train()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    ids = rows()[3]["input_ids"][None]
    torch.testing.assert_close(found(ids).logits, run.model.eval()(ids).logits)


@pytest.mark.parametrize("name", ("hard", "soft", "tied", "whole", "backbone"))
def test_it_ends_with_the_best_checkpoint(name, tmp_path):
    kept = {}

    class Watch(transformers.TrainerCallback):
        def on_save(self, args, state, control, model, **_):
            kept[state.global_step] = copy.deepcopy(model.state_dict())

    run = trainer(
        attached(CONFIGS[name]),
        tmp_path,
        8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    scores = iter((1, 2, 0, 0))
    run.compute_metrics = lambda _: {"score": next(scores)}
    run.add_callback(Watch())
    run.train()
    best = run.state.best_global_step
    assert best == 4
    now = run.model.state_dict()
    assert [k for k, v in kept[best].items() if not torch.equal(v, now[k])] == []
    assert any(not torch.equal(v, now[k]) for k, v in kept[8].items())


def test_a_checkpoint_loads_as_a_model_too(tmp_path):
    for name in ("hard", "soft", "tied", "head", "position", "scale"):
        run = trainer(attached(CONFIGS[name]), tmp_path / name, 2)
        run.train()
        ids = rows()[3]["input_ids"][None]
        want = run.model.eval()(ids).logits
        folder = tmp_path / name / "checkpoint-2"
        found = transformers.GPT2LMHeadModel.from_pretrained(folder)
        torch.testing.assert_close(found(ids).logits, want, rtol=1e-5, atol=1e-5)
        again = paramlora.load_adapter(base().eval(), folder)
        torch.testing.assert_close(again(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_saving_the_model_holds_no_tensors_of_ours_in_the_base(tmp_path):
    from safetensors.torch import load_file

    run = trainer(attached(CONFIGS["hard"]), tmp_path, 2)
    run.train()
    run.save_model(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    plain = {k: v for k, v in base().state_dict().items() if k != "lm_head.weight"}
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[k], v) for k, v in plain.items())


def test_it_resumes_from_a_checkpoint_in_shards(tmp_path):
    run = trainer(attached(CONFIGS["tied"]), tmp_path, 2)
    run.train()
    folder = tmp_path / "checkpoint-9"
    run.model.save_pretrained(folder, max_shard_size="4KB")
    assert (folder / "model.safetensors.index.json").exists()
    other = trainer(attached(CONFIGS["tied"]), tmp_path / "other", 2)
    other._load_from_checkpoint(str(folder))
    want, got = run.model.state_dict(), other.model.state_dict()
    assert [k for k in want if not torch.equal(want[k], got[k])] == []


@pytest.mark.parametrize("kind", ("mixtral", "llava"))
def test_it_resumes_models_whose_checkpoints_have_other_names(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        model = mixtral() if kind == "mixtral" else llava()
        torch.manual_seed(2)
        return paramlora.attach(model, {"q_proj": {"r": 2}, "re:.*lm_head": {"r": 2}})

    check_resumes(make, tmp_path)
    folder = tmp_path / "whole" / "checkpoint-4"
    model = type(make()).from_pretrained(folder).eval()
    ours = paramlora.load_adapter(type(make())(model.config), folder, strict=False)
    ours.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    ids = rows()[3]["input_ids"][None]
    torch.testing.assert_close(model(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


def mixtral():
    size = dict(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size))


def llava():
    text = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=19, eos_token_id=0
    )
    return transformers.LlavaForConditionalGeneration(config)
