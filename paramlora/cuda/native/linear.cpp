// A step of one linear layer as the host sees it, without Python: find the plan of its operands,
// reserve memory, have the driver launch the kernel that Triton compiled. `linear/native.py` plans
// and tells each kernel's parameters, and whatever is not served here is left to Python's
// `functional._Linear`, whose numbers these are to the bit.

#include "launch.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// What changes from launch to launch, in the order of `linear.native.Slot`; the first are addresses.
enum Slot {
  INPUT, WEIGHT, BIAS, A, B, SCALE, OUT, KEPT, DY, SCRATCH, DA, DB, TICKETS,
  STRENGTH, NUMBER, BLOCK, BLOCK_1, BLOCK_2,
  SLOTS,
};
using Values = std::array<uint64_t, SLOTS>;

struct Plan {
  bool served = false;
  std::vector<int64_t> sizes, strides;  // of the result
  int64_t size = 0;                     // of what is kept, or of the scratch
  bool tickets = false;
  Launch launch;
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
  std::atomic<uint64_t> number;  // of the next launch, see `linear.plan.NUMBERS`
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

// The GIL is held. None: never served; False: not yet, so that Python is asked again.
std::shared_ptr<const Plan> planned(Plans& plans, const Key& key, const py::object& told) {
  // not kept: the next call asks again, once Triton's own first launch is over
  if (told.ptr() == Py_False) return nullptr;
  auto plan = std::make_shared<Plan>();
  if (!told.is_none()) {
    auto of = told.cast<py::tuple>();
    plan->served = true;
    plan->sizes = py::cast<std::vector<int64_t>>(of[0]);
    plan->strides = py::cast<std::vector<int64_t>>(of[1]);
    plan->size = of[2].cast<int64_t>();
    plan->launch = launch_of(of[3].cast<py::tuple>());
    for (auto [slot, bits] : plan->launch.parameters) plan->tickets |= slot == TICKETS;
  }
  plans.keep(key, plan);
  return plan;
}

Tensor reserved(at::IntArrayRef sizes, at::IntArrayRef strides, const Tensor& like) {
  return at::empty_strided(sizes, strides, like.options().requires_grad(false));
}

// The GIL is held. The current stream, on which the launch will be; it tells where tickets are.
CUstream stream_of(const Plan& plan, Values& at, const Tensor& like) {
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
    at[TICKETS] = drawn.second;
  }
  return reinterpret_cast<CUstream>(stream);
}

void run(const Plan& plan, Values& at, double strength, CUstream stream) {
  at[STRENGTH] = std::bit_cast<uint32_t>(static_cast<float>(strength));
  at[NUMBER] = state->number++;
  run(plan.launch, at.data(), stream);
}

struct Step {
  const Plan& plan;
  const Tensor &x, &weight, &bias, &a, &b, &scale;
  double strength;
};

// The GIL is held. y and what the backward takes.
std::pair<Tensor, Tensor> computed(const Step& of) {
  Values at{};
  auto stream = stream_of(of.plan, at, of.x);
  py::gil_scoped_release released;  // the allocator may wait for another thread too
  Tensor y = reserved(of.plan.sizes, of.plan.strides, of.x);
  Tensor kept = reserved({of.plan.size}, {1}, of.x);
  at[INPUT] = address_of(of.x), at[WEIGHT] = address_of(of.weight);
  at[A] = address_of(of.a), at[B] = address_of(of.b), at[SCALE] = address_of(of.scale);
  at[OUT] = address_of(y), at[KEPT] = address_of(kept);
  at[BIAS] = of.bias.defined() ? address_of(of.bias) : at[KEPT];
  run(of.plan, at, of.strength, stream);
  return {y, kept};
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b, const Step& step) {
    auto [y, kept] = computed(step);
    ctx->save_for_backward({x, step.weight, a, b, step.scale, kept});
    ctx->saved_data["strength"] = step.strength;
    int64_t needs = x.requires_grad() | a.requires_grad() << 1 | b.requires_grad() << 2;
    ctx->saved_data["needs"] = needs;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    auto saved = ctx->get_saved_variables();
    double strength = ctx->saved_data["strength"].toDouble();
    int64_t needs = ctx->saved_data["needs"].toInt();
    auto found = quickly(gradients[0], saved, strength, needs);
    return found.empty() ? in_python(gradients[0], saved, strength, needs) : found;
  }

  static variable_list in_python(
      const Tensor& dy, const variable_list& saved, double strength, int64_t needs) {
    py::gil_scoped_acquire held;
    py::tuple given(7 + 2);
    given[0] = wrapped(dy);
    for (size_t i = 0; i < 6; ++i) given[i + 1] = wrapped(saved[i]);
    given[7] = strength;
    given[8] = py::make_tuple(bool(needs & 1), bool(needs & 2), bool(needs & 4));
    auto grads = must(PyObject_CallObject(state->backward.ptr(), given.ptr())).cast<py::tuple>();
    return {unwrapped(grads[0]), unwrapped(grads[1]), unwrapped(grads[2]), Tensor()};
  }

  // The gradients, or nothing where Python must find them.
  static variable_list quickly(
      const Tensor& dy, const variable_list& saved, double strength, int64_t needs) {
    const Tensor &x = saved[0], &weight = saved[1], &a = saved[2], &b = saved[3];
    const Tensor &scale = saved[4], &kept = saved[5];
    // grad mode: a backward of the backward, which Python's function has and launches have not
    if (at::GradMode::is_enabled() || !(needs & 1) || !(needs & 6) || is_followed()) return {};
    if (!dy.defined() || !is_plain(dy) || dy.device() != x.device()) return {};
    for (const Tensor& t : saved)
      if (!is_plain(t) || t.device() != x.device()) return {};
    // a hook on saved tensors may have laid it anywhere
    if (address_of(kept) & 15) return {};
    Key key = key_of({&dy, &x, &weight, &scale});
    // the factors' casts are in kept: of the factors themselves only the rank matters
    key.push_back(a.size(0));
    auto plan = state->backwards.find(key);
    if (!plan) {
      py::gil_scoped_acquire held;
      if (!is_launched(x)) return {};
      auto told = state->plan_backward(wrapped(dy), wrapped(x), wrapped(weight), wrapped(a),
                                       wrapped(b), wrapped(scale));
      plan = planned(state->backwards, key, told);
    }
    if (!plan || !plan->served) return {};
    int64_t r = a.size(0), in = weight.size(1), out = weight.size(0);
    auto wide = x.options().dtype(at::kFloat).requires_grad(false);
    Tensor dx = reserved(plan->sizes, plan->strides, x);
    Tensor scratch = reserved({plan->size}, {1}, x);
    Tensor da = at::empty_strided({r, in}, {in, 1}, wide);
    Tensor db = at::empty_strided({out, r}, {r, 1}, wide);
    Values at{};
    CUstream stream;
    {
      py::gil_scoped_acquire held;
      if (!is_launched(x)) return {};
      stream = stream_of(*plan, at, x);
    }
    at[INPUT] = address_of(x), at[WEIGHT] = address_of(weight), at[SCALE] = address_of(scale);
    at[DY] = address_of(dy), at[KEPT] = address_of(kept), at[OUT] = address_of(dx);
    at[SCRATCH] = address_of(scratch), at[DA] = address_of(da), at[DB] = address_of(db);
    run(*plan, at, strength, stream);
    // in float32 so far, as the kernels sum; the last is of the Step, which has none
    return {dx, da.to(a.scalar_type()), db.to(b.scalar_type()), Tensor()};
  }
};

// `functional.linear` of seven arguments, or None where Python must compute it.
PyObject* linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "linear takes 7 arguments, got ", count);
  if (state == nullptr || is_followed()) Py_RETURN_NONE;
  const bool biased = given[2] != Py_None;
  for (int i = 0; i < 6; ++i)
    if (!THPVariable_CheckExact(given[i]) && (i != 2 || biased)) Py_RETURN_NONE;
  if (!PyFloat_CheckExact(given[6]) && !PyLong_CheckExact(given[6])) Py_RETURN_NONE;
  // a tensor or a symbolic number has gone to Python
  const double strength = PyFloat_AsDouble(given[6]);
  const Tensor &x = THPVariable_Unpack(given[0]), &weight = THPVariable_Unpack(given[1]);
  const Tensor bias = biased ? THPVariable_Unpack(given[2]) : Tensor();
  const Tensor &a = THPVariable_Unpack(given[3]), &b = THPVariable_Unpack(given[4]);
  const Tensor& scale = THPVariable_Unpack(given[5]);
  if (x.scalar_type() != at::kBFloat16 || x.device().type() != state->kind) Py_RETURN_NONE;
  if (at::autocast::is_autocast_enabled(state->kind)) {  // which then has nothing to cast
    const auto type = at::autocast::get_autocast_dtype(state->kind);
    if (type != at::kBFloat16 || weight.scalar_type() != type) Py_RETURN_NONE;
    if (biased && bias.scalar_type() != type) Py_RETURN_NONE;
  }
  c10::SmallVector<const Tensor*, 6> tensors{&x, &weight, &a, &b, &scale};
  if (biased) tensors.push_back(&bias);
  for (const Tensor* t : tensors)
    if (!is_plain(*t) || t->device() != x.device()) Py_RETURN_NONE;
  const bool factors = a.requires_grad() || b.requires_grad();
  const bool graph = at::GradMode::is_enabled() && (x.requires_grad() || factors);
  if (at::GradMode::is_enabled()) {
    // gradients that this backward does not find
    if (weight.requires_grad() || scale.requires_grad() || (biased && bias.requires_grad()))
      Py_RETURN_NONE;
    if (graph && !factors) Py_RETURN_NONE;  // which would keep the input for nothing
  }
  if (!is_launched(x)) Py_RETURN_NONE;
  Key key = key_of(tensors);
  auto plan = state->forwards.find(key);
  if (!plan) {
    auto told = must(PyObject_Vectorcall(state->plan_forward.ptr(), given, 6, nullptr));
    plan = planned(state->forwards, key, told);
  }
  if (!plan || !plan->served) Py_RETURN_NONE;
  Step step{*plan, x, weight, bias, a, b, scale, strength};
  return THPVariable_Wrap(graph ? Linear::apply(x, a, b, step) : computed(step).first);
  END_HANDLE_TH_ERRORS
}

PyMethodDef method = {
    "linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
    "functional.linear, or None where Python must compute it."};

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
  module.def("configure", &configure, "Take over what `linear` asks of Python.");
  module.def("launcher", &launcher, "A launch of a kernel, and which slots hold floats.");
  module.attr("linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}
