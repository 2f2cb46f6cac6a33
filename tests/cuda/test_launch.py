"""The hand-made launch against Triton's own, of a Triton whose inside is changed in the test."""

import inspect

import pytest
import torch

import paramlora

launch = pytest.importorskip("paramlora.cuda.launch", reason="needs Triton")
tl = launch.tl


def kernel_of_two(x, y, strength, number, M, stride_ym, BIAS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The signature of a kernel."""


def kernel_of_a_matrix(matrix, x, strength, M, BIAS: tl.constexpr):
    """One whose first pointer may be described to the tensor memory engine."""


NUMBERS, CONSTANTS = {"M": 16, "stride_ym": 3}, {"BIAS": True, "BLOCK_M": 64}


class Compiled:
    """What Triton gives for a compiled kernel; `given` holds what reached the device."""

    function, packed_metadata = 77, (4, 1, 0)

    def __init__(self):
        self.given = []
        self._run = lambda *given: self.given.append(given)

    @property
    def run(self):
        return self._run


class Kernel:
    """Triton's own launch, as of 3.6 and 3.7."""

    def __init__(self, fn=kernel_of_two):
        self.compiled, self.own = Compiled(), 0
        self.fn, self.arg_names = fn, list(inspect.signature(fn).parameters)

    def warmup(self, *arguments, grid, **options):
        return self.compiled

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched(grid, arguments)

    def launched(self, grid, arguments):
        self.own += 1
        one = self.compiled
        return one.run(
            *grid, 1, 1, 5, one.function, one.packed_metadata, None, "enter", "exit", *arguments
        )


class MoreArguments(Kernel):
    def launched(self, grid, arguments):
        return super().launched(grid, (*arguments, "scratch"))


class AnotherOrder(Kernel):
    def launched(self, grid, arguments):
        return super().launched(grid, arguments[::-1])


class AnotherName(Kernel):
    def launched(self, grid, arguments):
        self.own += 1
        self.compiled.given.append((*grid, *arguments))

    def warmup(self, *arguments, grid, **options):
        return object()


class NoMetadata(Kernel):
    def warmup(self, *arguments, grid, **options):
        class Hidden(Compiled):
            @property
            def packed_metadata(self):
                raise AttributeError

        return Hidden()


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(launch, "_TRUSTED", {})
    monkeypatch.setattr(launch, "_warned", False)
    monkeypatch.setattr(launch, "cuda_stream", lambda device: 5)


def made(kernel, numbers=NUMBERS, constants=CONSTANTS, layouts=()):
    about = {"numbers": numbers, "constants": constants, "layouts": layouts}
    return launch.Launch(kernel, 0, 8, stages=3, warps=4, **about)


def launched(kernel, times=3):
    """The address of x that reached the device, each time."""
    one = made(kernel)
    seen, before = [], len(kernel.compiled.given)
    for i in range(times):
        x, y = torch.zeros(8), torch.zeros(8)
        one((x, y), (x.data_ptr() + 16, y.data_ptr()), (0.5, i))
        given = kernel.compiled.given[-1]
        addresses = [g.data_ptr() if isinstance(g, torch.Tensor) else g for g in given]
        wanted = {x.data_ptr() + 16, y.data_ptr(), i}
        seen.append(wanted <= {one for one in addresses if isinstance(one, int)})
    assert len(kernel.compiled.given) == before + times
    return seen


@pytest.mark.usefixtures("alone")
def test_the_first_launch_is_tritons_and_the_others_are_ours():
    kernel = Kernel()
    assert launched(kernel) == [True] * 3
    assert kernel.own == 1
    first, *others = kernel.compiled.given
    for other in others:
        assert len(other) == len(first) and other[6:9] == (None, None, None)
    assert launched(kernel, 1) == [True]  # of the same kind by another plan
    assert kernel.own == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("changed", (MoreArguments, AnotherOrder, AnotherName, NoMetadata))
def test_a_triton_that_has_changed_launches_by_itself(changed):
    kernel = changed()
    with pytest.warns(paramlora.ParamloraWarning, match="launches kernels otherwise") as told:
        assert launched(kernel) == [True] * 3
        assert launched(changed()) == [True] * 3
    assert len(told) == 1
    assert kernel.own == 3


@pytest.mark.usefixtures("alone")
def test_a_launch_by_the_driver_gets_what_changes_alone(monkeypatch):
    """The matrices' addresses, the others, the numbers; asked for once, when Triton is trusted."""
    asked, given = [], []

    def launcher(*about):
        asked.append(about)
        return lambda *values: given.append(values)

    monkeypatch.setattr(launch, "launcher", launcher)
    layout, kernel = ([8, 8], [8, 1], [8, 8]), Kernel()
    # by name, in whatever order
    one = made(kernel, {"stride_ym": 3, "M": 16}, {"BLOCK_M": 64, "BIAS": True}, (layout,))
    x, matrix = torch.zeros(8), torch.zeros(8, 8)
    for i in range(3):
        one((matrix, x), (matrix.data_ptr(), x.data_ptr()), (0.5, i))
    assert asked == [(kernel.compiled, 8, (layout,), (int, int, float, int), (16, 3, True, 64))]
    assert given == [(5, matrix.data_ptr(), x.data_ptr(), 0.5, i) for i in (1, 2)]
    assert len(kernel.compiled.given) == 1


@pytest.mark.usefixtures("alone")
def test_what_is_described_takes_its_pointers_place():
    """To Triton's own launch as a descriptor, and from then on as a block that equals it."""
    layout, kernel = ([8, 8], [8, 1], [8, 8]), Kernel(kernel_of_a_matrix)
    one = made(kernel, {"M": 16}, {"BIAS": True}, (layout,))
    x, matrix = torch.zeros(8), torch.zeros(8, 8)
    for _ in range(2):
        one((matrix, x), (matrix.data_ptr(), x.data_ptr() + 16), (0.5,))
    (*_, described, _, _, _, _), (*_, block, address, strength, number, constant) = (
        kernel.compiled.given
    )
    assert type(described) is launch.TensorDescriptor and launch._equal(block, described)
    assert (address, strength, number, constant) == (x.data_ptr() + 16, 0.5, 16, True)
    assert kernel.own == 1


def without(given, name):
    return {other: given[other] for other in given if other != name}


REFUSED = {
    "it has no N": ({**NUMBERS, "N": 1}, CONSTANTS),
    "it has no BLOCK_N": (NUMBERS, {**CONSTANTS, "BLOCK_N": 64}),
    "stride_ym is missing": (without(NUMBERS, "stride_ym"), CONSTANTS),
    "BIAS is missing": (NUMBERS, without(CONSTANTS, "BIAS")),
    "M is given twice": (NUMBERS, {**CONSTANTS, "M": 16}),
    "BLOCK_M is a constant": ({**NUMBERS, "BLOCK_M": 64}, without(CONSTANTS, "BLOCK_M")),
    "stride_ym is no constant": (without(NUMBERS, "stride_ym"), {**CONSTANTS, "stride_ym": 3}),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_plan_is_refused_whose_names_are_not_the_kernels(fault):
    with pytest.raises(TypeError, match=rf"kernel_of_two: (.*, )?{fault}"):
        made(Kernel(), *REFUSED[fault])


def test_a_kernel_has_its_numbers_ahead_of_its_constants():
    def mixed(x, M, BIAS: tl.constexpr, N):
        """Whose numbers and constants are no tail of two parts."""

    with pytest.raises(TypeError, match="BIAS comes before a number"):
        made(Kernel(mixed), {"M": 16, "N": 16}, {"BIAS": True})


@pytest.mark.usefixtures("alone")
def test_a_first_number_that_is_missing_is_no_pointer():
    one, x = made(Kernel(), without(NUMBERS, "M")), torch.zeros(8)
    with pytest.raises(TypeError, match="x, y, strength, number, M, but is called with 2 pointers"):
        one((x, x), (x.data_ptr(), x.data_ptr()), (0.5, 1))


def test_a_name_for_each_axis():
    assert launch.along("stride_x", "mk", (8, 1)) == {"stride_xm": 8, "stride_xk": 1}
    with pytest.raises(ValueError, match="shorter"):
        launch.along("stride_x", "bmk", (8, 1))


def test_a_descriptor_is_compared_by_what_it_describes():
    base = torch.zeros(64, 64)
    block = launch.Block(base, ([64, 64], [64, 1], [16, 16]))
    same = launch.TensorDescriptor(base, [64, 64], [64, 1], [16, 16])
    other = launch.TensorDescriptor(base, [64, 64], [64, 1], [16, 32])
    assert launch._equal(block, same) and not launch._equal(block, other)
    assert not launch._equal(
        block, launch.TensorDescriptor(base.clone(), [64, 64], [64, 1], [16, 16])
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_this_triton_launches_as_ours_does():
    layer = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)
    model = paramlora.attach(torch.nn.Sequential(layer), {"0": {"r": 4}})
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        model(x).sum().backward()
    assert launch._TRUSTED and None not in launch._TRUSTED.values()
