// Operators of torch on the device: copies, views, and for every other one the CPU's, which runs when its stream does.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <set>

#include "memory.h"
#include "operators.h"

namespace late {
namespace {

using at::Tensor;
using c10::IValue;

const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// The tensor's memory as a CPU tensor. It owns nothing: streams run in the order in which memory is handed out again.
Tensor on_host(const Tensor& tensor) {
  void* const memory = tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

// -- memory and views ------------------------------------------------------------------------------------------------

Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<c10::Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, offset);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

Tensor& set_storage(
    Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::set_(self, std::move(storage), offset, size, stride);
}

const Tensor& resize_in_place(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  const at::Storage& storage = self.storage();
  const size_t before = storage.nbytes(), after = (self.storage_offset() + self.numel()) * self.itemsize();
  if (after > before) {
    c10::DataPtr memory = device_allocator()->allocate(after);
    if (before > 0) device_allocator()->copy_data(memory.get(), storage.data(), before);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(after);
  }
  return self;
}

void record_stream(Tensor& self, at::Stream stream) { use_on(self.const_data_ptr(), stream.id()); }

// -- copies ----------------------------------------------------------------------------------------------------------

bool lie_alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_contiguous() && b.is_contiguous();
}

void copy_between(const Tensor& from, const Tensor& to) {
  count("copy on the device");
  enqueue(always([from = on_host(from), to = on_host(to)] { to.copy_(from); }));
}

void copy_to_host(const Tensor& from, const Tensor& to, bool non_blocking) {
  count("copy to the host");
  if (!non_blocking || !is_pinned(to.const_data_ptr()) || !lie_alike(from, to)) {
    synchronize(current_stream());
    to.copy_(on_host(from));
    return;
  }
  use_pinned_on(to.const_data_ptr(), current_stream());
  void* const target = to.mutable_data_ptr();
  const void* const source = from.const_data_ptr();
  enqueue(always([=, n_bytes = from.nbytes()] { std::memcpy(target, source, n_bytes); }));
}

std::vector<Maker> held_uploads;
bool holds_uploads = false;

void copy_to_device(const Tensor& from, const Tensor& to, bool non_blocking) {
  count("copy to the device");
  const bool is_late = non_blocking && is_pinned(from.const_data_ptr());
  Maker copy;
  if (is_late && lie_alike(from, to)) {
    use_pinned_on(from.const_data_ptr(), current_stream());
    void* const target = to.mutable_data_ptr();
    const void* const source = from.const_data_ptr();
    copy = always([=, n_bytes = from.nbytes()] { std::memcpy(target, source, n_bytes); });
  } else {  // through a copy that the driver makes, now
    copy = always([staged = from.clone(), to = on_host(to)] { to.copy_(staged); });
  }
  if (is_late && holds_uploads) {
    held_uploads.push_back(std::move(copy));
    return;
  }
  enqueue(std::move(copy));
  if (!is_late) synchronize(current_stream());
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  if (self.numel() == 0) return dst;
  if (self.is_cpu() && dst.is_cpu()) {
    dst.copy_(self);
  } else if (dst.is_cpu()) {
    copy_to_host(self, dst, non_blocking);
  } else if (self.is_cpu()) {
    copy_to_device(self, dst, non_blocking);
  } else {
    copy_between(self, dst);
  }
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  if (dst.sizes() != self.sizes()) dst.resize_(self.sizes());
  return copy_from(self, dst, /*non_blocking=*/false);
}

at::Scalar item(const Tensor& self) {
  count("copy to the host");
  synchronize(current_stream());
  return on_host(self).item();
}

// -- every other operator --------------------------------------------------------------------------------------------

// Their results' shapes depend on what is in memory: as on a GPU, the host has to wait.
const std::set<std::string> kNeedData = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};

using Change = std::function<Tensor(const Tensor&)>;

// An argument with its tensors of the device replaced.
IValue replace(const IValue& value, const Change& change) {
  const auto one = [&](const Tensor& tensor) {
    return tensor.defined() && !tensor.is_cpu() ? change(tensor) : tensor;
  };
  if (value.isTensor()) return one(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(one(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor> tensor : value.toOptionalTensorList()) {
      list.push_back(tensor ? std::optional<Tensor>(one(*tensor)) : tensor);
    }
    return list;
  }
  return value.isDevice() ? IValue(c10::Device(c10::kCPU)) : value;
}

Tensor zeros_alike(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU)).zero_();
}

Tensor empty_alike(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(kDevice));
}

std::vector<IValue> run_on_host(const c10::OperatorHandle& op, std::vector<IValue> stack) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const at::NoGradGuard no_grad;
  op.callBoxed(&stack);
  return stack;
}

// The argument that a result is: of an operator that works in place, or into an `out`.
std::optional<size_t> argument_of_result(const c10::FunctionSchema& schema, size_t result) {
  const auto* const alias = schema.returns()[result].alias_info();
  if (alias == nullptr) return std::nullopt;
  TORCH_CHECK_NOT_IMPLEMENTED(alias->isWrite(), "the late device does not know ", schema.name(), ", which makes a view");
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* const info = schema.arguments()[i].alias_info();
    if (info != nullptr && info->isWrite() && info->beforeSets() == alias->beforeSets()) return i;
  }
  return std::nullopt;
}

// A first run, on zeros, tells the shapes of the results; the one that counts happens when the stream runs.
void run_late(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n_args = schema.arguments().size(), n_results = schema.returns().size();
  const std::vector<IValue> args(stack->end() - n_args, stack->end());
  bool needs_data = kNeedData.count(schema.name()) > 0;
  for (const auto& result : schema.returns()) needs_data |= !result.type()->isSubtypeOf(*c10::TensorType::get());

  count(schema.name());
  if (needs_data) synchronize(current_stream());
  std::vector<IValue> now, later;
  for (const IValue& arg : args) now.push_back(replace(arg, needs_data ? Change(on_host) : Change(zeros_alike)));
  const std::vector<IValue> first = run_on_host(op, now);
  for (size_t i = 0; i < n_args; ++i) {
    const auto* const alias = schema.arguments()[i].alias_info();
    // An `out` without elements takes the shape of the result.
    if (alias != nullptr && alias->isWrite() && args[i].isTensor() && !args[i].toTensor().is_cpu()) {
      resize_in_place(args[i].toTensor(), now[i].toTensor().sizes(), std::nullopt);
    }
    later.push_back(replace(args[i], on_host));
  }

  std::vector<IValue> results;
  std::vector<std::pair<size_t, Tensor>> fresh;
  for (size_t i = 0; i < n_results; ++i) {
    const auto argument = argument_of_result(schema, i);
    if (argument) {
      results.push_back(args[*argument]);
    } else if (first[i].isTensor() && first[i].toTensor().defined()) {
      const Tensor result = empty_alike(first[i].toTensor());
      fresh.emplace_back(i, on_host(result));
      results.emplace_back(result);
    } else {
      results.push_back(first[i]);
    }
  }
  if (needs_data) {
    for (const auto& [i, target] : fresh) target.copy_(first[i].toTensor());
  } else {
    enqueue(always([op, later, fresh] {
      const std::vector<IValue> last = run_on_host(op, later);
      for (const auto& [i, target] : fresh) target.copy_(last[i].toTensor());
    }));
  }
  torch::jit::drop(*stack, n_args);
  stack->insert(stack->end(), results.begin(), results.end());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(at::native::set_));
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("resize_", resize_in_place);
  library.impl("record_stream", record_stream);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_late>());
}

}  // namespace

void set_holds_uploads(bool holds) { holds_uploads = holds; }

void release_uploads() {
  for (Maker& copy : std::exchange(held_uploads, {})) enqueue(std::move(copy));
}

}  // namespace late
