"""Lightning's checkpoints hold the adapter and not the base."""

import pytest
import torch

import paramlora
from tests.test_examples import load


def test_lightnings_checkpoint_holds_no_base(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    example = load("lightning_module")
    example.trainer(tmp_path, 1).fit(example.Regression(), example.data())
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["state_dict"] == {} and checkpoint["optimizer_states"]
    module = example.Regression()
    assert set(checkpoint["paramlora"]) == set(paramlora.adapter_state_dict(module))
    assert isinstance(module, pl.LightningModule)
    other = example.Regression()
    paramlora.detach(other)
    paramlora.attach(other, {"re:net.0": {"r": 4}})
    with pytest.raises(paramlora.FileError, match="does not fit Regression: .*unexpected: net.2"):
        example.trainer(tmp_path / "b", 2).fit(other, example.data(), ckpt_path=path)
