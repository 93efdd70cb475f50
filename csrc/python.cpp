// Every binding: what Python sees of the extension.
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>

#include "checks.h"
#include "cpu/runtime.h"
#include "ops.h"
#ifdef LSTMFUSED_CUDA
#include "cuda/paths.h"
#endif

namespace lstmfused {
namespace {

// ---------------------------------------------------------------------------------------------------
// The eager way in: the operators, called by position, at half the cost of torch.ops. To go through
// pybind11, too, would take longer than a small step computes.

struct Names {
  const char *op, *arguments[11];
};
constexpr Names kStep{"lstm_cell",
                      {"input", "hx[0]", "hx[1]", "weight_ih", "weight_hh", "bias_ih", "bias_hh"}};
constexpr Names kPacked{
    "lstm_cell_packed",
    {"input", "hx[0]", "hx[1]", "weight", "bias", "scale", "input_size", "hidden_size", "format"}};
constexpr Names kLayer{"lstm_layer",
                       {"input", "hx[0]", "hx[1]", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "mask",
                        "reverse", "cell_states"}};

constexpr Names kPackedLayer{"lstm_layer_packed",
                             {"input", "hx[0]", "hx[1]", "weight", "bias", "scale", "mask", "input_size",
                              "hidden_size", "format", "reverse"}};
// No operator, and None in Python where it has no value or does not see just what it expects.
constexpr Names kLayers{"lstm_layers",
                        {"input", "hx", "params", "packed", "reset", "has_biases", "num_layers", "dropout",
                         "bidirectional", "batch_first"}};

template <class T>
constexpr bool is_tensor = std::is_same_v<T, Tensor> || std::is_same_v<T, OptionalTensor>;

template <class T>
void check(PyObject* object, const Names& names, const char* name) {
  if constexpr (is_tensor<T>) {
    const bool none = std::is_same_v<T, OptionalTensor> && object == Py_None;
    // What is no Tensor may know what to do with a call, as torch.fx's Proxy does.
    TORCH_CHECK_TYPE(
        none || THPVariable_Check(object) || PyObject_HasAttrString(object, "__torch_function__"), names.op,
        "(): argument '", name, "' must be Tensor, not ", Py_TYPE(object)->tp_name);
  }
}

// Whether it is of just this type: subclasses of Tensor and symbolic numbers ask to see the call in Python.
template <class T>
bool plain(PyObject* object) {
  const auto each = [object](auto is) {
    PyObject* const* const items = PySequence_Fast_ITEMS(object);
    return std::all_of(items, items + PySequence_Fast_GET_SIZE(object), is);
  };
  const bool none = object == Py_None, tuple = PyTuple_CheckExact(object);
  if constexpr (std::is_same_v<T, Tensor>) return THPVariable_CheckExact(object);
  if constexpr (std::is_same_v<T, OptionalTensor>) return none || THPVariable_CheckExact(object);
  if constexpr (std::is_same_v<T, std::vector<Tensor>>)
    return none || ((tuple || PyList_CheckExact(object)) && each(THPVariable_CheckExact));
  if constexpr (std::is_same_v<T, PackedSizes>)
    return none || (tuple && PyTuple_GET_SIZE(object) == 3 && each(THPUtils_checkLong));
  if constexpr (std::is_same_v<T, bool>) return PyBool_Check(object);
  if constexpr (std::is_same_v<T, double>) return THPUtils_checkDouble(object);
  return THPUtils_checkLong(object);
}

// What Python holds, uncounted: the first owner beside Python costs a call back into it, and so does the
// last one to go.
template <class T>
struct Borrowed {
  const T& value;
  explicit Borrowed(PyObject* object) : value(THPVariable_Unpack(object)) {}
};
template <>
struct Borrowed<OptionalTensor> {
  using Borrow = c10::MaybeOwnedTraits<Tensor>;
  OptionalTensor value;
  explicit Borrowed(PyObject* object) {
    if (object != Py_None) value = Borrow::createBorrow(THPVariable_Unpack(object));
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    if (value) Borrow::destroyBorrow(*value);
  }
};
template <>
struct Borrowed<std::vector<Tensor>> {
  using Borrow = c10::MaybeOwnedTraits<Tensor>;
  std::vector<Tensor> value;
  explicit Borrowed(PyObject* object) {
    if (object == Py_None) return;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
    value.reserve(count);
    for (Py_ssize_t i = 0; i < count; i++)
      value.push_back(Borrow::createBorrow(THPVariable_Unpack(PySequence_Fast_GET_ITEM(object, i))));
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    for (Tensor& tensor : value) Borrow::destroyBorrow(tensor);
  }
};
template <>
struct Borrowed<int64_t> {
  int64_t value;
  explicit Borrowed(PyObject* object) : value(THPUtils_unpackLong(object)) {}
};
template <>
struct Borrowed<PackedSizes> {
  PackedSizes value{};
  explicit Borrowed(PyObject* object) {
    if (object == Py_None) return;
    const auto at = [object](int i) { return THPUtils_unpackLong(PyTuple_GET_ITEM(object, i)); };
    value = {at(0), at(1), at(2)};
  }
};
template <>
struct Borrowed<double> {
  double value;
  explicit Borrowed(PyObject* object) : value(THPUtils_unpackDouble(object)) {}
};
template <>
struct Borrowed<bool> {
  bool value;
  explicit Borrowed(PyObject* object) : value(object == Py_True) {}
};

// So small that the step, or a layer's few steps, end before another thread would have noticed that the GIL
// is free.
bool is_small(const Tensor& tensor) {
  constexpr int64_t kSmall = 1 << 16, kFewSteps = 16;
  return tensor.is_cpu() && !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
         tensor.numel() < kSmall && (tensor.dim() < 3 || tensor.size(0) <= kFewSteps);
}
bool is_small(const OptionalTensor& tensor) { return !tensor || is_small(*tensor); }
bool is_small(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return is_small(tensor); });
}
template <class Number>
bool is_small(const Number&) {
  return true;
}

template <class Result, class... Arguments>
Result call(Result (*step)(Arguments...), const Borrowed<std::decay_t<Arguments>>&... given) {
  if ((is_small(given.value) && ...)) return step(given.value...);
  const std::tuple<std::decay_t<Arguments>...> kept{given.value...};  // whatever others do meanwhile
  const pybind11::gil_scoped_release no_gil;
  return std::apply(step, kept);
}

template <class... Tensors>
PyObject* tuple_of(std::tuple<Tensors...>& tensors) {
  THPObjectPtr tuple(PyTuple_New(sizeof...(Tensors)));
  if (!tuple) throw python_error();
  std::apply(
      [&, i = 0](auto&... tensor) mutable {
        (PyTuple_SET_ITEM(tuple.get(), i++, THPVariable_Wrap(std::move(tensor))), ...);
      },
      tensors);
  return tuple.release();
}
PyObject* tuple_of(std::optional<PackedLayerStates>& tensors) {
  if (!tensors) Py_RETURN_NONE;
  return tuple_of(*tensors);
}

template <class Result, class... Arguments, size_t... I>
PyObject* checked_call(Result (*step)(Arguments...), const Names& names, PyObject* const* objects,
                       Py_ssize_t count, std::index_sequence<I...>) {
  constexpr bool is_operator = !std::is_same_v<Result, std::optional<PackedLayerStates>>;
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == sizeof...(I), names.op, "() takes ", sizeof...(I), " arguments, got ", count);
  if constexpr (is_operator) (check<std::decay_t<Arguments>>(objects[I], names, names.arguments[I]), ...);
  if (at::impl::torch_function_mode_enabled() || !(plain<std::decay_t<Arguments>>(objects[I]) && ...)) {
    if (!is_operator) Py_RETURN_NONE;
    const pybind11::object op =
        pybind11::module_::import("torch").attr("ops").attr("lstmfused").attr(names.op);
    return PyObject_Vectorcall(op.ptr(), objects, count, nullptr);
  }
  Result next = call(step, Borrowed<std::decay_t<Arguments>>(objects[I])...);
  return tuple_of(next);
  END_HANDLE_TH_ERRORS
}

template <class Result, class... Arguments>
constexpr std::index_sequence_for<Arguments...> indices(Result (*)(Arguments...)) {
  return {};
}

template <auto step, const Names& names>
PyMethodDef method() {
  constexpr _PyCFunctionFast function = [](PyObject*, PyObject* const* objects, Py_ssize_t count) {
    return checked_call(step, names, objects, count, indices(step));
  };
  return {names.op, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          nullptr};
}

PyMethodDef methods[] = {
    method<lstm_cell, kStep>(),     method<lstm_cell_packed, kPacked>(),
    method<lstm_layer, kLayer>(),   method<lstm_layer_packed, kPackedLayer>(),
    method<lstm_layers, kLayers>(), {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace lstmfused

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  if (PyModule_AddFunctions(m.ptr(), lstmfused::methods)) throw pybind11::error_already_set();
  m.def("lstm_cell_composed", &lstmfused::lstm_cell_composed,
        pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("has_kernel", &lstmfused::has_kernel);
  m.def("check_lstm_cell", &lstmfused::check_lstm_cell);
  m.def("check_lstm_layer", &lstmfused::check_lstm_layer);
  m.def("check_lstm_cell_packed", &lstmfused::check_lstm_cell_packed);
  m.def("check_lstm_layer_packed", &lstmfused::check_lstm_layer_packed);
  m.def("batch_invariant", &lstmfused::batch_invariant);
  m.def("set_batch_invariant", &lstmfused::set_batch_invariant);
  m.attr("packed_format") = lstmfused::kPackedFormat;
  m.attr("packed_units") = lstmfused::kPackedUnits;
  m.attr("packed_multiple") = lstmfused::kPackedMultiple;
  m.def("cpu_kernel", [] { return lstmfused::cpu_kernels().name; });
#ifdef LSTMFUSED_CUDA
  m.attr("cuda_architectures") = LSTMFUSED_CUDA;
  m.def("set_cuda_path", &lstmfused::cuda::set_path);
  m.def("cuda_path", &lstmfused::cuda::path);
  m.def("cuda_paths_on", &lstmfused::cuda::paths_on);
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("compiler") =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
}
