"""Eight adapters of different ranks and rates learn eight tasks on one frozen base, in one batch.

Each row of the batch takes its own adapter (`paramlora.route`), and each adapter has its own loss,
optimizer, schedule and clipping. Beside it the same eight runs one after the other, which reach the
same losses. The tasks are the handwritten digits that ship with scikit-learn, each with its labels
moved on by another number.

python examples/many_adapters.py
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import paramlora

RANKS = {f"task{k}": r for k, r in enumerate((1, 2, 3, 4, 6, 8, 12, 16))}
RATES = {name: 0.01 * (k + 2) for k, name in enumerate(RANKS)}
STEPS, ROWS = 40, 8  # of each task
Losses, Names = dict[str, list[float]], list[str]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 64 pixels, and which digit each shows."""
    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32, device=DEVICE) / 16
    return images, torch.tensor(found.target, device=DEVICE)


def base() -> nn.Module:
    """A network that knows the digits as they are, frozen by attaching to it."""
    torch.manual_seed(0)
    sizes = (64, 1024, 1024, 10)
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).to(DEVICE)
    optimizer, (x, y) = torch.optim.AdamW(model.parameters(), lr=1e-3), digits()
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def attach(model: nn.Module, name: str) -> None:
    """The same adapter wherever it is made."""
    torch.manual_seed(int(name.removeprefix("task")))
    r = RANKS[name]
    layers = ("0", "2", "4") if r <= 8 else ("0", "2")  # adapters may leave layers alone
    paramlora.attach(model, {layer: {"r": r} for layer in layers}, name)


class Training:
    """What one adapter has of its own: its data, its optimizer, its schedule and its losses."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name, self.task = name, int(name.removeprefix("task"))
        self.losses: list[float] = []
        groups = paramlora.parameter_groups(model, lr=RATES[name], adapter=name)
        self.parameters = paramlora.trainable_parameters(model, name)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = digits()
        generator = torch.Generator().manual_seed(self.task)
        for _ in range(steps):
            rows = torch.randint(len(images), (ROWS,), generator=generator).to(DEVICE)
            yield images[rows], (labels[rows] + self.task) % 10

    def step(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


def together(model: nn.Module, names: Names, steps: int = STEPS) -> Losses:
    """All adapters in one batch: one pass of the base in each step."""
    for name in names:
        attach(model, name)
    trainings = [Training(model, name) for name in names]
    with paramlora.route(model, [name for name in names for _ in range(ROWS)]):
        for batches in zip(*(one.batches(steps) for one in trainings)):
            outputs = model(torch.cat([x for x, _ in batches])).split(ROWS)
            losses = [nn.functional.cross_entropy(o, y) for o, (_, y) in zip(outputs, batches)]
            torch.stack(losses).sum().backward()
            for training, loss in zip(trainings, losses):
                training.step(loss)
    return {one.name: one.losses for one in trainings}


def in_turn(model: nn.Module, names: Names, steps: int = STEPS) -> Losses:
    """One adapter after the other."""
    found = {}
    for name in names:
        attach(model, name)
        training = Training(model, name)
        for x, y in training.batches(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            training.step(loss)
        paramlora.detach(model)
        found[name] = training.losses
    return found


def seconds(run: Callable[[nn.Module, Names], Losses], model: nn.Module) -> tuple[Losses, float]:
    """The losses of a run of all adapters, and how long it took."""
    run(copy.deepcopy(model), list(RANKS)[:2], 2)  # what is done once
    started = time.perf_counter()
    return run(copy.deepcopy(model), list(RANKS)), time.perf_counter() - started


def kept(run: Callable[..., Losses], model: nn.Module, names: Names) -> float:
    """MiB that one step keeps for its backward, besides the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, names, 1)
    return sum(sizes.values()) / 2**20


def main() -> tuple[Losses, Losses]:
    """The losses of each task, step by step: together, and in turn."""
    model, last = base(), list(RANKS)[-1:]
    one, one_time = seconds(together, model)
    turn, turn_time = seconds(in_turn, model)
    sizes = [
        kept(*run)
        for run in (
            (together, copy.deepcopy(model), list(RANKS)),
            (in_turn, copy.deepcopy(model), last),
        )
    ]
    print("task   r   rate  first  last, together  last, in turn  largest difference")
    for name, losses in one.items():
        apart = max(abs(a - b) for a, b in zip(losses, turn[name]))
        told = f"{losses[0]:5.3f}  {losses[-1]:14.6f}  {turn[name][-1]:13.6f}  {apart:18.1e}"
        print(f"{name}  {RANKS[name]:2d}  {RATES[name]:.2f}  {told}")
    print("              seconds  rows a second  MiB kept in a step")
    rows = len(RANKS) * STEPS * ROWS
    for told, time_, size in zip(("one batch", "eight runs"), (one_time, turn_time), sizes):
        print(f"{told:12s}  {time_:7.2f}  {rows / time_:13.0f}  {size:18.2f}")
    return one, turn


if __name__ == "__main__":
    main()
