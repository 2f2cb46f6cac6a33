"""The callback of transformers' Trainer."""

import pytest
import torch

import paramlora
from paramlora.integrations.progress import update_norms


@pytest.mark.filterwarnings("ignore")  # of the Trainer itself
def test_the_trainers_callback_writes_whenever_it_logs(tmp_path):
    transformers = pytest.importorskip("transformers")
    from paramlora.integrations.transformers import UpdateNorms

    torch.manual_seed(0)
    size = dict(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, **size))
    paramlora.attach(model, {"c_attn": {"r": 2}})
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    told = []
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[UpdateNorms(lambda *x: told.append(x))]
    ).train()
    names = {name for name, _, _ in told}
    assert names == {"update/transformer.h.0.attn.c_attn"}
    assert [step for *_, step in told][:3] == [1, 2, 3]
    assert told[-1][1] == update_norms(model)["transformer.h.0.attn.c_attn"] > 0
