"""Methods of other libraries' models, put on those that hold updates and taken off again."""

import copy

import pytest
from torch import nn

import paramlora
from paramlora.model.methods import add_methods, library, remove_methods

hub = pytest.importorskip("huggingface_hub")


class Saved(nn.Sequential, hub.PyTorchModelHubMixin):
    """A model of the hub's, which saves itself."""

    def tie_weights(self):
        return "tied"


def model():
    return nn.ModuleDict({"held": Saved(nn.Linear(4, 3)), "plain": Saved(nn.Linear(4, 3))})


def test_a_library_is_known_by_the_class_that_it_defines():
    assert library(Saved()) == "huggingface_hub"
    assert library(nn.Linear(1, 1)) == ""
    # a name alone is nobody's
    namesake = type("ModelMixin", (nn.Module,), {"save_pretrained": lambda self, *_: None})
    assert library(namesake()) == ""


def test_only_what_holds_updates_gets_them_and_loses_them_again():
    one = model()
    paramlora.attach(one["held"], {"0": {"r": 2}})
    remove_methods(one)
    before = {name: set(vars(module)) for name, module in one.items()}
    add_methods(one)
    assert set(vars(one["held"])) - before["held"] == {"save_pretrained", "tie_weights"}
    assert set(vars(one["plain"])) == before["plain"]
    assert one["held"].save_pretrained.__name__ == "save_pretrained"
    remove_methods(one)
    assert set(vars(one["held"])) == before["held"]


def test_an_instances_own_method_is_somebodys_and_stays():
    one = model()["held"]
    one.tie_weights = own = lambda: "mine"
    paramlora.attach(one, {"0": {"r": 2}})
    assert one.tie_weights is own and "save_pretrained" in vars(one)
    paramlora.detach(one)
    assert one.tie_weights is own and "save_pretrained" not in vars(one)


def test_a_copy_has_its_own_and_a_kept_one_is_the_classs_after_the_last_update():
    one = paramlora.attach(model()["held"], {"0": {"r": 2}})
    other = copy.deepcopy(one)
    assert other.tie_weights.__self__ is other and one.tie_weights.__self__ is one
    kept = one.tie_weights
    paramlora.detach(one)
    assert kept() == "tied" and "tie_weights" in vars(other)
