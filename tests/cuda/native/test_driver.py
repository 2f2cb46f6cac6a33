"""The driver's functions, as a library of the same names and arguments tells what it was given."""

import ctypes
import os
import shlex
import shutil
import subprocess

import pytest

from paramlora.cuda.native import driver

SOURCE = """
#include <stddef.h>
extern "C" {
static const size_t sizes[] = {128, 4, 8}, starts[] = {0, 128, 136};
int cuFuncGetParamInfo(void *kernel, size_t index, size_t *offset, size_t *size) {
    if (kernel != (void *)0x123456789abc || index >= 3) return 1;
    *offset = starts[index];
    *size = sizes[index];
    return 0;
}
int cuLaunchKernelEx() { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
void *where(int second) {
    return second ? (void *)&cuTensorMapEncodeTiled : (void *)&cuLaunchKernelEx;
}
}
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "cuda.cpp").write_text(SOURCE)
    built = tmp_path / "libcuda.so.1"
    command = [*compiler, "-shared", "-fPIC", "-o", str(built), str(tmp_path / "cuda.cpp")]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(built))
    monkeypatch.setattr(driver, "_library", lambda: found)
    return found


def test_the_sizes_of_a_kernels_parameters_end_where_the_driver_knows_no_more(library):
    assert driver.sizes_of(0x123456789ABC) == [128, 4, 8]
    assert driver.sizes_of(5) == []  # of no kernel


def test_the_addresses_are_those_of_the_functions_that_are_called(library):
    library.where.restype = ctypes.c_void_p
    assert driver.addresses() == {"launch": library.where(0), "describe": library.where(1)}
