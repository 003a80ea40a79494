// A simulated CUDA device for a CPU build of torch: memory and arithmetic are the host's, the rules are a device's.
//
// It registers an allocator, a device guard, hooks and a boxed fallback under CUDA's dispatch key. Tensors of two
// devices do not mix, kernels and waits of the host are counted, and so is memory. cuda.py makes torch.cuda's
// functions fit to it.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

// From the device's memory to the host's and back: the same bytes under another name

bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == DeviceType::CUDA;
}

Tensor as_host(const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  bool has_memory = tensor.numel() || tensor.storage().nbytes();
  auto keep = [kept = Tensor(tensor)](void*) mutable { kept.reset(); };
  auto host = from_blob(
      const_cast<void*>(has_memory ? tensor.const_data_ptr() : nullptr),
      tensor.sizes(),
      tensor.strides(),
      keep,
      TensorOptions().dtype(tensor.dtype()).device(kCPU),
      Device(kCPU));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
  return host;
}

struct Kept {
  Tensor tensor;
  int64_t bytes;
};

Tensor as_device(const Tensor& host, DeviceIndex index) {
  if (!host.defined() || on_device(host)) return host;
  auto* kept = new Kept{host, static_cast<int64_t>(host.storage().nbytes())};
  allocated(kept->bytes);
  auto release = [](void* context) {
    auto* kept = static_cast<Kept*>(context);
    allocated(-kept->bytes);
    delete kept;
  };
  Storage storage(
      Storage::use_byte_size_t(),
      host.storage().nbytes() - host.storage_offset() * host.itemsize(),
      DataPtr(
          const_cast<void*>(host.numel() ? host.const_data_ptr() : nullptr),
          kept,
          release,
          Device(DeviceType::CUDA, index)),
      &allocator,
      true);
  auto result = at::detail::make_tensor<TensorImpl>(
      std::move(storage), DispatchKeySet(DispatchKey::CUDA), host.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  return result;
}

// Every operation that has no kernel of its own below: its arguments under the host's name, the CPU's kernel, and the
// results under the device's.

const std::set<std::string> TAKES_BOTH_DEVICES = {
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_local_scalar_dense", "aten::is_pinned"};
const std::set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"};

class Arguments {
 public:
  explicit Arguments(const std::string& name) : name(name), index(current) {}

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      has_host_tensor = has_host_tensor || tensor.dim() > 0;  // a number goes with any device
      return tensor;
    }
    if (any && tensor.device().index() != index) refuse(tensor.device());
    index = tensor.device().index();
    any = true;
    for (auto& pair : pairs)
      if (pair.second.is_same(tensor)) return pair.first;
    auto host = tensor.numel() ? as_host(tensor) : at::empty(tensor.sizes(), tensor.options().device(kCPU));
    pairs.emplace_back(host, tensor);
    return host;
  }

  IValue turn(const IValue& value, bool is_generator) {
    if (value.isTensor()) return host(value.toTensor());
    if (value.isTensorList() || (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensor())) {
      c10::List<Tensor> turned;
      for (const IValue& one : value.toListRef()) turned.push_back(host(one.toTensor()));
      return turned;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> turned;
      for (std::optional<Tensor> one : value.toOptionalTensorList())
        turned.push_back(one ? std::optional<Tensor>(host(*one)) : one);
      return turned;
    }
    if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) {
      if (value.toDevice().index() >= 0) index = value.toDevice().index();
      return Device(kCPU);
    }
    if (value.isNone() && is_generator) return default_generator();
    return value;
  }

  void check() const {
    if (any && has_host_tensor && !TAKES_BOTH_DEVICES.count(name)) refuse(Device(kCPU));
  }

  Tensor device(const Tensor& tensor) const {
    if (!tensor.defined()) return tensor;
    for (auto& pair : pairs)
      if (pair.first.is_same(tensor)) return pair.second;
    return as_device(tensor, index);
  }

  // An output that was given empty has got its memory.
  void adopt_resized() const {
    for (auto& [host, tensor] : pairs) {
      if (host.sizes() == tensor.sizes()) continue;
      auto resized = as_device(host, index);
      auto* impl = tensor.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(resized.storage());
      impl->set_sizes_and_strides(resized.sizes(), resized.strides());
    }
  }

 private:
  void refuse(Device other) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
                Device(DeviceType::CUDA, index), " and ", other, "! (", name, ")");
  }

  std::string name;
  DeviceIndex index;
  bool any = false, has_host_tensor = false;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // the host's and the device's
};

// Of those that training could call; torch's CUDA kernels refuse them under torch.use_deterministic_algorithms.
bool is_nondeterministic(const std::string& name, const torch::jit::Stack& stack, size_t begin) {
  return (name == "aten::cumsum" || name == "aten::cumsum_") && stack[begin].isTensor() &&
      stack[begin].toTensor().is_floating_point();
}

void fallback(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.name();
  Arguments arguments(name);
  const auto begin = stack->size() - schema.arguments().size();
  if (is_nondeterministic(name, *stack, begin)) at::globalContext().alertNotDeterministic(name);
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    IValue& value = (*stack)[begin + i];
    value = arguments.turn(value, schema.arguments()[i].name() == "generator");
  }
  arguments.check();
  launch(name.c_str());
  if (WAITS.count(name)) tell(WAIT, name.c_str());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  const auto first = stack->size() - schema.returns().size();
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = IValue(arguments.device(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> turned;
      for (const Tensor& one : value.toTensorVector()) turned.push_back(arguments.device(one));
      value = IValue(turned);
    }
  }
  arguments.adopt_resized();
}

// Operations with kernels of their own

struct OnDevice {
  explicit OnDevice(std::optional<Device> device) : before(current) {
    if (device && device->index() >= 0) current = device->index();
  }
  ~OnDevice() { current = before; }
  DeviceIndex before;
};

Tensor empty_memory_format(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<MemoryFormat> format) {
  OnDevice here(device);
  auto type = dtype.value_or(typeMetaToScalarType(at::get_default_dtype()));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA), type, format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device> device, std::optional<bool>) {
  OnDevice here(device);
  auto type = dtype.value_or(typeMetaToScalarType(at::get_default_dtype()));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), type);
}

// The host waits for the device where it copies down, and where it copies up, unless told not to.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (on_device(source) && !on_device(self)) {
    tell(WAIT, "copy to host");
  } else if (on_device(self) && !on_device(source)) {
    if (non_blocking)
      tell(UPLOAD, "copy to device");
    else
      tell(WAIT, "blocking copy to device");
  } else {
    launch("aten::copy_");
  }
  auto host = as_host(self);
  host.copy_(as_host(source));
  return self;
}

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride);
}

Tensor depthwise(
    const Tensor& self, const Tensor& weight, IntArrayRef, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation) {
  launch("aten::_conv_depthwise2d");
  auto host_bias = bias ? std::optional<Tensor>(as_host(*bias)) : std::nullopt;
  auto result = at::conv2d(as_host(self), as_host(weight), host_bias, stride, padding, dilation, self.size(1));
  return as_device(result, self.device().index());
}

Tensor& set_storage(Tensor& self, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}

Tensor& set_source(Tensor& self, Storage source) {
  int64_t count = source.nbytes() / self.itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {count}, {1});
}

Tensor& set_empty(Tensor& self) {
  Storage nothing(Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true);
  return at::native::set_storage_cpu_(self, nothing, 0, {0}, {});
}

// CUDA's kernels for lists of tensors, which torch would otherwise take apart before they come to the fallback.
const char* const FOREACH[] = {
    "_foreach_add.List", "_foreach_add.Scalar", "_foreach_add_.List", "_foreach_add_.Scalar", "_foreach_addcdiv_.Scalar",
    "_foreach_addcdiv_.ScalarList", "_foreach_addcmul_.Scalar", "_foreach_copy_", "_foreach_div.ScalarList",
    "_foreach_div_.List", "_foreach_div_.Scalar", "_foreach_div_.ScalarList", "_foreach_lerp.Scalar",
    "_foreach_lerp_.Scalar", "_foreach_mul.Scalar", "_foreach_mul_.List", "_foreach_mul_.Scalar", "_foreach_mul_.Tensor",
    "_foreach_neg", "_foreach_norm.Scalar", "_foreach_sqrt", "_foreach_sub_.List"};

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  for (const char* name : FOREACH) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  library.impl("empty.memory_format", empty_memory_format);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", TORCH_FN(at::native::unfold));
  library.impl("resize_", TORCH_FN(at::native::resize_));
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_", set_empty);
  library.impl("set_.source_Storage", set_source);
  library.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  library.impl("copy_", copy_);
  library.impl("_conv_depthwise2d", depthwise);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// For Python: the host's view of a tensor, for collectives, and the size of its memory, which FSDP changes

void resize_storage(const Tensor& tensor, int64_t bytes) {
  at::native::resize_bytes_cpu(tensor.storage().unsafeGetStorageImpl(), bytes);
}

TORCH_LIBRARY(simulated_cuda, library) {
  library.def("host(Tensor x) -> Tensor");
  library.def("resize_storage(Tensor x, int bytes) -> ()");
}

TORCH_LIBRARY_IMPL(simulated_cuda, CUDA, library) {
  library.impl("host", as_host);
  library.impl("resize_storage", resize_storage);
}

struct Registration {
  Registration() {
    c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
    c10::SetAllocator(DeviceType::CUDA, &allocator, 100);
    replace_hooks();
  }
} registration;

}  // namespace

namespace c10d {
struct SimulatedTimer final : Timer {
  explicit SimulatedTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return 1; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, SimulatedTimer)
}  // namespace c10d

extern "C" {
void set_listener(Listener one) { listener = one; }
void set_device_count(int count) { device_count = count; }
int get_device() { return current; }
void set_device(int index) { current = index; }
int64_t allocated_bytes() { return bytes_now; }
int64_t peak_bytes() { return bytes_peak; }
int64_t kernel_count() { return kernels; }
void reset_counters() {
  bytes_peak = bytes_now.load();
  kernels = 0;
}
}
