// A layer's step as the host sees it, without Python: find the program of its operands, and run it.
// A program reserves memory, has the driver launch kernels that Triton compiled, and calls torch's
// convolutions between them. `native/steps.py` tells each program, and whatever is not served here
// is left to Python's own functions of autograd, whose numbers these are to the bit.

#include "launch.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Where a step's tensors are, as `native.steps.Slot` numbers them: its operands, then what its
// program makes. Behind them stands what else changes from launch to launch.
constexpr int TENSORS = 32;
enum Slot {
  X, WEIGHT, BIAS, A, B, SCALE, DY, KEPT, MAGNITUDE, NORM, Z,
  STRENGTH = TENSORS, NUMBER, TICKETS, BLOCK, BLOCK_1, BLOCK_2, BLOCK_3,
  SLOTS,
};

// What a program does, in the order of `native.steps.Kind`.
enum Kind { RESERVE, LAUNCH, CONVOLVE, GRADIENT, SUM, CAST };

struct Operation {
  Kind kind;
  int out = 0;
  std::array<int, 3> of{};                  // the slots of what it reads; one below 0 is left out
  std::vector<int64_t> sizes, strides;      // of what it makes
  at::ScalarType type = at::kFloat;
  std::vector<int64_t> stride, padding, dilation;
  bool of_weight = false;                   // which gradient of a convolution it is
  Launch launch;
};

struct Plan {
  bool served = false, tickets = false;
  std::vector<Operation> operations;
  std::vector<int> results;
};

// The tensors of one step, and what a launch reads of them.
struct Frame {
  std::array<Tensor, TENSORS> held;
  std::array<uint64_t, SLOTS> at{};

  void put(int slot, Tensor t) {
    at[slot] = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    held[slot] = std::move(t);
  }
};

using Key = c10::SmallVector<int64_t, 64>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037u;
    for (int64_t n : key) hash = (hash ^ static_cast<uint64_t>(n)) * 1099511628211u, hash ^= hash >> 29;
    return hash;
  }
};

struct Plans {
  std::mutex lock;  // never held where Python runs
  std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> of;

  std::shared_ptr<const Plan> find(const Key& key) {
    std::lock_guard<std::mutex> held(lock);
    auto found = of.find(key);
    return found == of.end() ? nullptr : found->second;
  }

  void keep(const Key& key, std::shared_ptr<const Plan> plan) {
    decltype(of) old;  // freed after the lock
    std::lock_guard<std::mutex> held(lock);
    // ever new shapes must not fill the memory, as in `launch.planned`
    if (of.size() >= 4096) old.swap(of);
    of[key] = std::move(plan);
  }
};

// What Python handed over once; never freed, for a thread may outlive the interpreter's end.
struct State {
  py::object plan_forward, plan_backward, backward, tickets;
  py::object device, stream, capturing, switched_on;
  std::atomic<uint64_t> number;  // of the next step, see `linear.plan.NUMBERS`
  c10::DeviceType kind = c10::DeviceType::CUDA;
  Plans forwards, backwards;
  std::map<std::pair<int64_t, uint64_t>, std::pair<py::object, uint64_t>> drawn;  // under the GIL
};
State* state = nullptr;

py::object wrapped(const Tensor& t) {
  if (!t.defined()) return py::none();
  return must(THPVariable_Wrap(t));
}

Tensor unwrapped(py::handle object) {
  return object.is_none() ? Tensor() : THPVariable_Unpack(object.ptr());
}

bool is_true(const py::object& asked) {
  return must(PyObject_CallNoArgs(asked.ptr())).ptr() == Py_True;
}

// Whether a tensor is nothing but memory on a device: no transform's, nor another class's.
bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  // any other key says that the memory is not the tensor: a conjugate's, a subclass's, vmap's
  static const auto known =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::ADInplaceOrView,
                           DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                           DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  return ((t.key_set() - known).raw_repr() & ~c10::full_backend_mask) == 0 &&
      !t._fw_grad(0).defined();
}

// Whether nothing follows torch's operations here, which see no launch.
bool is_followed() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The GIL is held. Whether a launch here and now is the device's own, and wanted.
bool is_launched(const Tensor& x) {
  if (!is_true(state->switched_on) || is_true(state->capturing)) return false;
  auto current = must(PyObject_CallNoArgs(state->device.ptr()));
  // a launch goes to the current device, whatever its addresses are of
  return PyLong_AsLong(current.ptr()) == x.get_device();
}

void describe(Key& key, const Tensor& t) {
  key.push_back(t.dim());
  key.push_back(static_cast<int64_t>(t.scalar_type()));
  key.append(t.sizes().begin(), t.sizes().end());
  key.append(t.strides().begin(), t.strides().end());
}

uint64_t address_of(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr());
}

// What a plan depends on: all of each tensor but its numbers, and its alignment.
Key key_of(c10::ArrayRef<const Tensor*> tensors) {
  Key key;
  uint64_t odd = 0;
  key.push_back(tensors[0]->get_device());
  for (const Tensor* t : tensors) {
    describe(key, *t);
    odd |= address_of(*t);
  }
  // nearly all addresses are multiples of 16, which Triton compiles in; then they add nothing
  if (odd & 15)
    for (const Tensor* t : tensors)
      key.push_back(address_of(*t) & 15);
  return key;
}

std::array<int, 3> three(const py::handle& of) {
  auto told = of.cast<std::vector<int>>();
  std::array<int, 3> slots{-1, -1, -1};
  std::copy(told.begin(), told.end(), slots.begin());
  return slots;
}

// Of a `native.steps.Operation`.
Operation operation_of(const py::tuple& of) {
  Operation made{static_cast<Kind>(of[0].cast<int>()), of[1].cast<int>()};
  made.of = three(of[2]);
  made.sizes = of[3].cast<std::vector<int64_t>>(), made.strides = of[4].cast<std::vector<int64_t>>();
  if (!of[5].is_none()) made.type = reinterpret_cast<THPDtype*>(of[5].ptr())->scalar_type;
  if (!of[6].is_none()) {
    auto window = of[6].cast<std::array<std::vector<int64_t>, 3>>();
    made.stride = window[0], made.padding = window[1], made.dilation = window[2];
  }
  made.of_weight = of[7].cast<bool>();
  if (!of[8].is_none()) made.launch = launch_of(of[8].cast<py::tuple>());
  return made;
}

// The GIL is held. None: never served; False: not yet, so that Python is asked again.
std::shared_ptr<const Plan> planned(Plans& plans, const Key& key, const py::object& told) {
  // not kept: the next call asks again, once Triton's own first launch is over
  if (told.ptr() == Py_False) return nullptr;
  auto plan = std::make_shared<Plan>();
  if (!told.is_none()) {
    auto of = told.cast<py::tuple>();
    plan->served = true;
    for (py::handle one : of[0]) plan->operations.push_back(operation_of(one.cast<py::tuple>()));
    plan->results = of[1].cast<std::vector<int>>();
    for (const Operation& one : plan->operations)
      for (auto [slot, bits] : one.launch.parameters) plan->tickets |= slot == TICKETS;
  }
  plans.keep(key, plan);
  return plan;
}

// The GIL is held. The current stream, on which the launches will be; it tells where tickets are.
CUstream stream_of(const Plan& plan, Frame& frame, const Tensor& like) {
  auto index = py::int_(like.get_device());
  auto current = must(PyObject_CallOneArg(state->stream.ptr(), index.ptr()));
  const uint64_t stream = PyLong_AsUnsignedLongLong(current.ptr());
  if (plan.tickets) {
    // one count for each device and stream, as in `launch.tickets`; looked up here without Python
    auto& drawn = state->drawn[{like.get_device(), stream}];
    if (drawn.second == 0) {
      auto made = must(PyObject_CallOneArg(state->tickets.ptr(), wrapped(like).ptr()));
      drawn = {made, address_of(unwrapped(made))};
    }
    frame.at[TICKETS] = drawn.second;
  }
  return reinterpret_cast<CUstream>(stream);
}

Tensor reserved(const Operation& of, const Tensor& like) {
  return at::empty_strided(of.sizes, of.strides, like.options().dtype(of.type).requires_grad(false));
}

// A convolution's result, which need not lie as its input does, where the next launch reads it.
Tensor laid(const Operation& of, Tensor t) {
  if (of.sizes.empty() || t.strides() == at::IntArrayRef(of.strides)) return t;
  return at::empty_strided(of.sizes, of.strides, t.options()).copy_(t);
}

Tensor made(const Operation& of, const Frame& frame) {
  auto held = [&](int i) { return of.of[i] < 0 ? Tensor() : frame.held[of.of[i]]; };
  switch (of.kind) {
    case RESERVE: return reserved(of, frame.held[X]);
    case CONVOLVE: {
      const std::vector<int64_t> none(of.stride.size(), 0);
      return laid(of, at::convolution(held(0), held(1), held(2), of.stride, of.padding, of.dilation,
                                      false, none, 1));
    }
    case GRADIENT: {
      const std::vector<int64_t> none(of.stride.size(), 0), no_bias{0};
      auto [dx, dweight, dbias] = at::convolution_backward(
          held(0), held(1), held(2), at::IntArrayRef(no_bias), of.stride, of.padding, of.dilation,
          false, none, 1, {!of.of_weight, of.of_weight, false});
      return laid(of, of.of_weight ? dweight : dx);
    }
    case SUM: return held(0).sum(0);
    default: return held(0).to(of.type);
  }
}

// The GIL is not held: the allocator, and the driver, may wait for another thread.
std::vector<Tensor> computed(const Plan& plan, Frame& frame, double strength, CUstream stream) {
  // neither follows what is done here: autograd has a node for the step, and types are settled
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard uncast(c10::autocast_dispatch_keyset);
  frame.at[STRENGTH] = std::bit_cast<uint32_t>(static_cast<float>(strength));
  frame.at[NUMBER] = state->number++;
  for (const Operation& of : plan.operations) {
    if (of.kind == LAUNCH)
      run(of.launch, frame.at.data(), stream);
    else
      frame.put(of.out, made(of, frame));
  }
  std::vector<Tensor> results;
  for (int slot : plan.results) results.push_back(frame.held[slot]);
  return results;
}

struct Step {
  const Plan& plan;
  const Tensor &x, &weight, &bias, &a, &b, &scale, &magnitude;
  double strength;
  const std::vector<int64_t>& window;
};

// The GIL is held. y and what the backward takes.
std::vector<Tensor> computed(const Step& of) {
  Frame frame;
  frame.put(X, of.x), frame.put(WEIGHT, of.weight), frame.put(A, of.a), frame.put(B, of.b);
  frame.put(SCALE, of.scale);
  if (of.bias.defined()) frame.put(BIAS, of.bias);
  if (of.magnitude.defined()) frame.put(MAGNITUDE, of.magnitude);
  auto stream = stream_of(of.plan, frame, of.x);
  py::gil_scoped_release released;
  return computed(of.plan, frame, of.strength, stream);
}

struct Layer : torch::autograd::Function<Layer> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b,
      const std::optional<Tensor>& magnitude, const Step& step) {
    auto results = computed(step);
    variable_list saved{x, step.weight, a, b, step.scale, results[1]};
    if (magnitude) saved.insert(saved.end(), {*magnitude, results[2], results[3]});
    ctx->save_for_backward(saved);
    ctx->saved_data["strength"] = step.strength;
    ctx->saved_data["window"] = step.window;
    int64_t needs = x.requires_grad() | a.requires_grad() << 1 | b.requires_grad() << 2;
    if (magnitude) needs |= magnitude->requires_grad() << 3;
    ctx->saved_data["needs"] = needs;
    return results[0];
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    auto saved = ctx->get_saved_variables();
    double strength = ctx->saved_data["strength"].toDouble();
    int64_t needs = ctx->saved_data["needs"].toInt();
    auto window = ctx->saved_data["window"].toIntVector();
    auto found = quickly(gradients[0], saved, strength, needs, window);
    return found.empty() ? in_python(gradients[0], saved, strength, needs, window) : found;
  }

  static variable_list in_python(
      const Tensor& dy, const variable_list& saved, double strength, int64_t needs,
      const std::vector<int64_t>& window) {
    py::gil_scoped_acquire held;
    py::tuple given(saved.size() + 4);
    given[0] = wrapped(dy);
    for (size_t i = 0; i < 6; ++i) given[i + 1] = wrapped(saved[i]);
    given[7] = strength;
    given[8] = py::make_tuple(bool(needs & 1), bool(needs & 2), bool(needs & 4), bool(needs & 8));
    given[9] = py::tuple(py::cast(window));
    for (size_t i = 6; i < saved.size(); ++i) given[i + 4] = wrapped(saved[i]);
    auto grads = must(PyObject_CallObject(state->backward.ptr(), given.ptr())).cast<py::tuple>();
    auto of_magnitude = grads.size() > 3 ? unwrapped(grads[3]) : Tensor();
    return {unwrapped(grads[0]), unwrapped(grads[1]), unwrapped(grads[2]), of_magnitude, Tensor()};
  }

  // The gradients, or nothing where Python must find them.
  static variable_list quickly(
      const Tensor& dy, const variable_list& saved, double strength, int64_t needs,
      const std::vector<int64_t>& window) {
    const Tensor &x = saved[0], &weight = saved[1], &a = saved[2], &b = saved[3];
    const Tensor &scale = saved[4], &kept = saved[5];
    const bool rescaled = saved.size() > 6;
    // grad mode: a backward of the backward, which Python's functions have and launches have not
    if (at::GradMode::is_enabled() || !(needs & 1) || !(needs & 6) || is_followed()) return {};
    if (!dy.defined() || !is_plain(dy) || dy.device() != x.device()) return {};
    for (const Tensor& t : saved)
      if (!is_plain(t) || t.device() != x.device()) return {};
    // a hook on saved tensors may have laid it anywhere
    if (address_of(kept) & 15) return {};
    c10::SmallVector<const Tensor*, 10> tensors{&dy};
    for (const Tensor& t : saved) tensors.push_back(&t);
    Key key = key_of(tensors);
    key.append(window.begin(), window.end());
    auto plan = state->backwards.find(key);
    Frame frame;
    CUstream stream;
    {
      py::gil_scoped_acquire held;
      if (!is_launched(x)) return {};
      if (!plan) {
        py::tuple given(saved.size() + 2);
        for (size_t i = 0; i < 7; ++i) given[i] = wrapped(*tensors[i]);
        given[7] = py::tuple(py::cast(window));
        for (size_t i = 7; i < tensors.size(); ++i) given[i + 1] = wrapped(*tensors[i]);
        plan = planned(state->backwards, key,
                       must(PyObject_CallObject(state->plan_backward.ptr(), given.ptr())));
      }
      if (!plan || !plan->served) return {};
      stream = stream_of(*plan, frame, x);
    }
    frame.put(X, x), frame.put(WEIGHT, weight), frame.put(A, a), frame.put(B, b);
    frame.put(SCALE, scale), frame.put(DY, dy), frame.put(KEPT, kept);
    if (rescaled) frame.put(MAGNITUDE, saved[6]), frame.put(NORM, saved[7]), frame.put(Z, saved[8]);
    auto results = computed(*plan, frame, strength, stream);
    auto of_magnitude = rescaled ? results[3].view(saved[6].sizes()) : Tensor();
    // the last is of the Step, which has none
    return {results[0], results[1], results[2], of_magnitude, Tensor()};
  }
};

// Appends the numbers of a convolution's stride, padding, dilation and groups; false: one is none.
bool flattened(PyObject* window, std::vector<int64_t>& numbers) {
  if (PyLong_CheckExact(window)) {
    numbers.push_back(PyLong_AsLongLong(window));
    return true;
  }
  if (!PyTuple_CheckExact(window)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(window); ++i)
    if (!flattened(PyTuple_GET_ITEM(window, i), numbers)) return false;
  return true;
}

// `functional.in_cpp`: x, weight, bias, A, B, scale, strength, window, magnitude.
PyObject* layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "a layer takes 9 arguments, got ", count);
  if (state == nullptr || is_followed()) Py_RETURN_NONE;
  const bool biased = given[2] != Py_None, rescaled = given[8] != Py_None;
  for (int i = 0; i < 6; ++i)
    if (!THPVariable_CheckExact(given[i]) && (i != 2 || biased)) Py_RETURN_NONE;
  if (rescaled && !THPVariable_CheckExact(given[8])) Py_RETURN_NONE;
  if (!PyFloat_CheckExact(given[6]) && !PyLong_CheckExact(given[6])) Py_RETURN_NONE;
  // a tensor or a symbolic number has gone to Python
  const double strength = PyFloat_AsDouble(given[6]);
  const Tensor &x = THPVariable_Unpack(given[0]), &weight = THPVariable_Unpack(given[1]);
  const Tensor bias = biased ? THPVariable_Unpack(given[2]) : Tensor();
  const Tensor &a = THPVariable_Unpack(given[3]), &b = THPVariable_Unpack(given[4]);
  const Tensor& scale = THPVariable_Unpack(given[5]);
  const Tensor magnitude = rescaled ? THPVariable_Unpack(given[8]) : Tensor();
  if (x.scalar_type() != at::kBFloat16 || x.device().type() != state->kind) Py_RETURN_NONE;
  if (at::autocast::is_autocast_enabled(state->kind)) {  // which then has nothing to cast
    const auto type = at::autocast::get_autocast_dtype(state->kind);
    if (type != at::kBFloat16 || weight.scalar_type() != type) Py_RETURN_NONE;
    if (biased && bias.scalar_type() != type) Py_RETURN_NONE;
  }
  c10::SmallVector<const Tensor*, 7> tensors{&x, &weight, &a, &b, &scale};
  if (biased) tensors.push_back(&bias);
  if (rescaled) tensors.push_back(&magnitude);
  for (const Tensor* t : tensors)
    if (!is_plain(*t) || t->device() != x.device()) Py_RETURN_NONE;
  const bool factors = a.requires_grad() || b.requires_grad();
  const bool trained = rescaled && magnitude.requires_grad();
  const bool graph = at::GradMode::is_enabled() && (x.requires_grad() || factors || trained);
  if (at::GradMode::is_enabled()) {
    // gradients that this backward does not find
    if (weight.requires_grad() || scale.requires_grad() || (biased && bias.requires_grad()))
      Py_RETURN_NONE;
    if (graph && !factors) Py_RETURN_NONE;  // which would keep the input for nothing
    if (graph && rescaled && !trained) Py_RETURN_NONE;  // likewise the output
  }
  std::vector<int64_t> window;
  if (given[7] != Py_None && !flattened(given[7], window)) Py_RETURN_NONE;
  if (!is_launched(x)) Py_RETURN_NONE;
  Key key = key_of(tensors);
  key.append(window.begin(), window.end());
  // a bias may be described as a magnitude is; and without a graph no output is kept
  if (rescaled) key.push_back(biased), key.push_back(graph);
  auto plan = state->forwards.find(key);
  if (!plan) {
    std::array<PyObject*, 10> all;
    std::copy(given, given + 9, all.begin());
    all[9] = graph ? Py_True : Py_False;
    auto told = must(PyObject_Vectorcall(state->plan_forward.ptr(), all.data(), 10, nullptr));
    plan = planned(state->forwards, key, told);
  }
  if (!plan || !plan->served) Py_RETURN_NONE;
  Step step{*plan, x, weight, bias, a, b, scale, magnitude, strength, window};
  if (!graph) return THPVariable_Wrap(computed(step)[0]);
  auto own = rescaled ? std::optional(magnitude) : std::nullopt;
  return THPVariable_Wrap(Layer::apply(x, a, b, own, step));
  END_HANDLE_TH_ERRORS
}

PyMethodDef method = {
    "layer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(layer)), METH_FASTCALL,
    "A layer's output, or None where Python must compute it."};

void configure(const py::kwargs& of) {
  auto made = std::make_unique<State>();
  made->plan_forward = of["plan_forward"], made->plan_backward = of["plan_backward"];
  made->backward = of["backward"], made->tickets = of["tickets"];
  made->number = of["number"].cast<uint64_t>();
  made->device = of["device"], made->stream = of["stream"];
  made->capturing = of["capturing"], made->switched_on = of["switched_on"];
  if (of.contains("cpu")) made->kind = c10::DeviceType::CPU;
  state = made.release();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("call_driver", &call_driver, py::arg("launch"), py::arg("describe"),
             "Take over where the driver's functions are.");
  module.def("configure", &configure, "Take over what `layer` asks of Python.");
  module.def("launcher", &launcher, "A launch of a kernel, and which slots hold floats.");
  module.attr("layer") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}
