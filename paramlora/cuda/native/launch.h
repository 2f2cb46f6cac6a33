// A kernel that Triton compiled, launched by CUDA's driver with what `native.handed` tells of it.

#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <cuda.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <bit>
#include <memory>
#include <vector>

namespace py = pybind11;

namespace {

// A kernel's parameter: what is in a slot, or where that is negative always the same bits. Those of
// 32 bits are the lower ones, which lie first in memory.
static_assert(std::endian::native == std::endian::little);
struct Parameter {
  int slot;
  uint64_t bits;
};

constexpr size_t MATRICES = 4;  // that one launch describes at most

// How the tensor memory engine loads a matrix whose address is in a slot; its rows are contiguous.
// As the driver wants it, the innermost dimension comes first.
struct Block {
  int slot;
  CUtensorMapDataType type;
  CUtensorMapSwizzle swizzle;
  std::array<cuuint32_t, 2> block;
  std::array<cuuint64_t, 2> shape;
  cuuint64_t stride;  // bytes
};

// A launch, all but what is in its slots. From the slot `first` on they are the blocks' own.
struct Launch {
  CUfunction function = nullptr;
  unsigned grid = 0, threads = 0, shared = 0;
  bool early = false;  // may start before the kernel ahead ends
  int first = 0;
  std::vector<Parameter> parameters;
  std::vector<Block> blocks;
};

// Of the driver, which is not linked: it need not be there.
struct Driver {
  decltype(&cuLaunchKernelEx) launch = nullptr;
  decltype(&cuTensorMapEncodeTiled) describe = nullptr;
} driver;

py::object must(PyObject* result) {
  if (result == nullptr) {
    python_error error;
    error.persist();  // another thread may raise it
    throw error;
  }
  return py::reinterpret_steal<py::object>(result);
}

Block block_of(const py::tuple& of) {
  auto [rows, columns] = of[2].cast<std::pair<cuuint32_t, cuuint32_t>>();
  auto [height, width] = of[3].cast<std::pair<cuuint64_t, cuuint64_t>>();
  auto swizzle = static_cast<CUtensorMapSwizzle>(of[1].cast<int>());
  auto type = static_cast<CUtensorMapDataType>(of[5].cast<int>());
  auto stride = of[4].cast<cuuint64_t>();
  return {of[0].cast<int>(), type, swizzle, {columns, rows}, {width, height}, stride};
}

// Of a `native.handed.Handed`.
Launch launch_of(const py::tuple& of) {
  Launch made;
  made.function = reinterpret_cast<CUfunction>(of[0].cast<uintptr_t>());
  made.grid = of[1].cast<unsigned>(), made.threads = of[2].cast<unsigned>();
  made.shared = of[3].cast<unsigned>(), made.early = of[4].cast<bool>();
  made.first = of[5].cast<int>();
  for (auto [slot, bits] : py::cast<std::vector<std::pair<int, uint64_t>>>(of[6]))
    made.parameters.push_back({slot, bits});
  TORCH_CHECK(of[7].cast<py::list>().size() <= MATRICES, "a launch describes too many matrices");
  for (py::handle one : of[7]) made.blocks.push_back(block_of(one.cast<py::tuple>()));
  return made;
}

void check(CUresult result, const char* call) {
  TORCH_CHECK(result == CUDA_SUCCESS, call, " ended with the driver's error ", int(result),
              ". PARAMLORA_NATIVE=0 in the environment leaves launches to Triton.");
}

// The GIL is not held: the driver may wait for room in the stream.
void run(const Launch& launch, const uint64_t* at, CUstream stream) {
  constexpr std::array<cuuint32_t, 2> steps{1, 1};
  std::array<CUtensorMap, MATRICES> maps;
  for (size_t i = 0; i < launch.blocks.size(); ++i) {
    const Block& of = launch.blocks[i];
    check(driver.describe(
        &maps[i], of.type, 2, reinterpret_cast<void*>(at[of.slot]), of.shape.data(), &of.stride,
        of.block.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, of.swizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
  }
  c10::SmallVector<void*, 96> places;
  for (const Parameter& of : launch.parameters) {
    const void* place = of.slot < 0 ? &of.bits : &at[of.slot];
    if (of.slot >= launch.first) place = &maps[of.slot - launch.first];
    places.push_back(const_cast<void*>(place));
  }
  CUlaunchAttribute early{};
  early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  early.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = launch.grid, config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = launch.threads, config.blockDimY = config.blockDimZ = 1;
  // above 48 KiB a kernel must be allowed to: Triton has done so when it loaded it
  config.sharedMemBytes = launch.shared, config.hStream = stream;
  config.attrs = &early, config.numAttrs = launch.early;
  check(driver.launch(&config, launch.function, places.data(), nullptr), "cuLaunchKernelEx");
}

// A launch that a call is handed: the stream, then what is in each slot.
struct Launcher {
  Launch launch;
  std::vector<bool> floats;  // of 32 bits, by slot
};

Launcher* launcher_in(PyObject* capsule) {
  return static_cast<Launcher*>(PyCapsule_GetPointer(capsule, nullptr));
}

PyObject* launched(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const Launcher& of = *launcher_in(self);
  const auto slots = static_cast<Py_ssize_t>(of.floats.size());
  TORCH_CHECK(count == slots + 1, "the launch takes ", slots + 1, " arguments, got ", count);
  auto stream = reinterpret_cast<CUstream>(PyLong_AsUnsignedLongLong(given[0]));
  c10::SmallVector<uint64_t, 32> at;
  for (Py_ssize_t i = 0; i < slots; ++i) {
    PyObject* one = given[i + 1];
    at.push_back(
        of.floats[i] ? std::bit_cast<uint32_t>(static_cast<float>(PyFloat_AsDouble(one)))
                     : PyLong_AsUnsignedLongLongMask(one));
  }
  if (PyErr_Occurred()) throw python_error();
  {
    py::gil_scoped_release released;
    run(of.launch, at.data(), stream);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef launched_method = {
    "launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launched)), METH_FASTCALL,
    "Launch on a stream, with what is in each slot."};

py::object launcher(const py::tuple& told, std::vector<bool> floats) {
  auto made = std::make_unique<Launcher>(Launcher{launch_of(told), std::move(floats)});
  auto self = must(PyCapsule_New(made.get(), nullptr, [](PyObject* of) { delete launcher_in(of); }));
  made.release();
  return must(PyCFunction_New(&launched_method, self.ptr()));
}

void call_driver(uintptr_t launch, uintptr_t describe) {
  driver.launch = reinterpret_cast<decltype(driver.launch)>(launch);
  driver.describe = reinterpret_cast<decltype(driver.describe)>(describe);
}

}  // namespace
