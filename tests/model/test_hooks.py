"""A sweep of hooks on an adapted layer, and children of the process: each gives what it gives
outside.

The cases are those of `test_contexts`: every known layer, and layers that read their tensors.
"""

import multiprocessing
import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

import paramlora
from tests.model.test_contexts import CASES, input_of, made, outcome, same

FORWARD = {
    "before": lambda layer, seen: layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    ),
    "before, by keyword": lambda layer, seen: layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    ),
    "after": lambda layer, seen: layer.register_forward_hook(
        lambda module, args, output: seen.append(output)
    ),
    "after, in any case": lambda layer, seen: layer.register_forward_hook(
        lambda module, args, output: seen.append(output), always_call=True
    ),
    "before the backward": lambda layer, seen: layer.register_full_backward_pre_hook(
        lambda module, grads: seen.append(grads[0])
    ),
    "after the backward": lambda layer, seen: layer.register_full_backward_hook(
        lambda module, inputs, grads: seen.append(grads[0])
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # words have no gradient
def test_hooks_that_look(case):
    for name, register in FORWARD.items():
        want, seen = outcome(made(case), input_of(case)), []
        model = made(case)
        handle = register(model[0], seen)
        same(outcome(model, input_of(case)), want)
        assert len(seen) == 1, name
        if name.startswith("after") and "backward" not in name:
            assert torch.equal(seen[0], want[0])
        handle.remove()
        paramlora.detach(model)
        assert not model[0]._forward_hooks and not model[0]._backward_hooks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_that_change(case):
    """As they change the plain layer: twice the input or the output, or thrice its gradient."""
    register = {
        "output": lambda layer: layer.register_forward_hook(lambda m, args, out: 2 * out),
        "gradient": lambda layer: layer.register_full_backward_pre_hook(
            lambda m, grads: tuple(3 * g for g in grads)
        ),
    }
    factors = {"output": (2, 2), "gradient": (1, 3)}
    want = outcome(made(case, torch.float64), input_of(case, torch.float64))
    for name, hook in register.items():
        model = made(case, torch.float64)
        hook(model[0])
        output, *grads = outcome(model, input_of(case, torch.float64))
        of_output, of_gradient = factors[name]
        torch.testing.assert_close(output, of_output * want[0], rtol=1e-12, atol=1e-12)
        for mine, true in zip(grads, want[1:], strict=True):
            torch.testing.assert_close(mine, of_gradient * true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_of_all_modules_and_of_parameters(case):
    want, seen = outcome(made(case), input_of(case)), []
    model = made(case)
    handles = [
        register_module_forward_pre_hook(lambda module, args: None),
        register_module_forward_hook(lambda module, args, output: None),
    ]
    if case != "attention":  # its one input would be three, for which torch projects otherwise
        handles.append(register_module_full_backward_hook(lambda module, inputs, grads: None))
    for parameter in paramlora.trainable_parameters(model):
        handles.append(parameter.register_hook(lambda grad: seen.append(grad)))
    try:
        same(outcome(model, input_of(case)), want)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(paramlora.trainable_parameters(model))


def test_gradients_are_accumulated_before_their_hook():
    for case in CASES:
        model, x, seen = made(case), input_of(case), {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, name=name, seen=seen: seen.update({name: p.grad.clone()})
                )
        for _ in range(2):
            model(x).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert seen.keys() == trained.keys()
        assert all(torch.equal(seen[name], grad) for name, grad in trained.items())


@pytest.mark.parametrize("when", ("before", "after"))
def test_hooks_outlive_attach_merge_and_detach(when):
    for act in (paramlora.detach, paramlora.merge):
        model, seen = nn.Sequential(nn.Linear(4, 4)), []

        def hook(module, args, output, seen=seen):
            seen.append(output)

        if when == "before":
            model[0].register_forward_hook(hook)
        paramlora.attach(model, {"0": {"r": 2}})
        if when == "after":
            model[0].register_forward_hook(hook)
        model(torch.randn(3, 4))
        act(model)
        model(torch.randn(3, 4))
        assert len(seen) == 2 and list(model[0]._forward_hooks.values()) == [hook]


def in_a_child(model, x):
    """What a child does to its copy: trains, switches, loads, merges; the numbers that it sees."""
    found = outcome(model, x)
    optimizer = torch.optim.SGD(paramlora.trainable_parameters(model), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    paramlora.set_adapters(model, {"default": 0.5})
    state = {k: v + 0 for k, v in paramlora.adapter_state_dict(model).items()}
    paramlora.load_adapter_state_dict(model, state)
    found += outcome(model, x)
    paramlora.merge(model)
    return [t.numpy() for t in (*found, model(x).detach())]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_of_os_fork_changes_its_own_copy_alone():
    cases = [(case, made(case), input_of(case)) for case in CASES]
    before = [[t.clone() for t in m.state_dict().values()] for _, m, _ in cases]
    first = [outcome(m, x) for _, m, x in cases]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(write, "wb") as out:
            pickle.dump([in_a_child(m, x) for _, m, x in cases], out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told_by_child:
        found = pickle.load(told_by_child)
    assert os.waitpid(child, 0)[1] == 0
    for (_, model, x), held, want, numbers in zip(cases, before, first, found):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), held))
        same(outcome(model, x), want)
        here = in_a_child(model, x)  # the parent does the same, after the child
        assert all((a == b).all() for a, b in zip(here, numbers, strict=True))


def _trains(case, queue):
    queue.put(in_a_child(made(case), input_of(case)))


@pytest.mark.parametrize("how", ("fork", "spawn"))
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_of_multiprocessing_does_what_its_parent_does(how):
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    cases = CASES if how == "fork" else ["soft convolution"]
    for case in cases:
        child = context.Process(target=_trains, args=(case, queue))
        child.start()
        numbers = queue.get(timeout=600)
        child.join()
        here = in_a_child(made(case), input_of(case))
        assert all((a == b).all() for a, b in zip(here, numbers, strict=True))
