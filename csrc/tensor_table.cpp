#include "tensor_table.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "launch.h"

namespace xgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// A tensor of the list, without the shared pointer that torch::stable::Tensor allocates: there are many.
class Handle {
 public:
  Handle(StableListHandle list, int64_t index) {
    StableIValue value;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, index, &value));
    handle_ = to<AtenTensorHandle>(value);
  }
  ~Handle() { aoti_torch_delete_tensor_object(handle_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_;
};

// What a tensor's handle tells of its layout, asked no more than needed: each question is a call into torch.
class Layout {
 public:
  explicit Layout(const Handle& handle) : handle_(handle.get()) {
    int64_t* sizes;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is_contiguous_));
    sizes_ = sizes;
  }

  // The dtype as handles tell it; a complex tensor is pairs of reals.
  int32_t real_dtype() const {
    static const int32_t kComplex[] = {code(ScalarType::ComplexFloat), code(ScalarType::ComplexDouble)};
    static const int32_t kReal[] = {code(ScalarType::Float), code(ScalarType::Double)};
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    return dtype == kComplex[0] ? kReal[0] : dtype == kComplex[1] ? kReal[1] : dtype;
  }

  static int32_t code(ScalarType type) { return to<int32_t>(from(type)); }

  // How many numbers of `real_size` bytes it holds.
  int64_t real_numel(int64_t real_size) const {
    int32_t dtype;
    int64_t numel;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle_, &numel));
    return numel * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)) / real_size;
  }

  // Whether the elements fill one range of memory, each once, in whatever order of dimensions.
  bool is_dense() const {
    if (is_contiguous_) return true;
    const int64_t* steps = strides();
    std::vector<int64_t> order(dim_);
    for (int64_t i = 0; i < dim_; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [this, steps](int64_t a, int64_t b) {
      return steps[a] != steps[b] ? steps[a] < steps[b] : sizes_[a] < sizes_[b];
    });
    int64_t expected = 1;
    for (int64_t i : order) {
      if (sizes_[i] == 1) continue;
      if (steps[i] != expected) return false;
      expected *= sizes_[i];
    }
    return true;
  }

  // Whether equal offsets into the two tensors' memory are equal elements.
  bool matches(const Layout& other) const {
    if (dim_ != other.dim_ || !std::equal(sizes_, sizes_ + dim_, other.sizes_)) return false;
    if (device() != other.device()) return false;
    if (is_contiguous_ && other.is_contiguous_) return true;
    const int64_t *steps = strides(), *other_steps = other.strides();
    for (int64_t i = 0; i < dim_; ++i) {
      if (sizes_[i] != 1 && steps[i] != other_steps[i]) return false;
    }
    return true;
  }

 private:
  const int64_t* strides() const {
    int64_t* strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }

  std::pair<int32_t, int32_t> device() const {
    int32_t type, index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    if (type != aoti_torch_device_type_cpu()) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    }
    return {type, index};
  }

  AtenTensorHandle handle_;
  int64_t dim_;
  const int64_t* sizes_;
  bool is_contiguous_;
};

int64_t address_of(const Handle& handle, int64_t slot) {
  if (slot == kGrad) {
    const void* address;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle.get(), &address));
    return reinterpret_cast<int64_t>(address);
  }
  void* address;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle.get(), &address));
  return reinterpret_cast<int64_t>(address);
}

// Fills one line of the table; false where the tensors are not flat or not what was expected.
bool fill_line(StableListHandle tensors, int64_t index, int64_t n_tensors, const std::vector<int64_t>& slots,
               const std::vector<int32_t>& dtypes, int64_t numel, int64_t* line) {
  const Handle param(tensors, index);
  const Layout layout(param);
  if (layout.real_dtype() != dtypes[0] || !layout.is_dense()) return false;
  if (layout.real_numel(aoti_torch_dtype_element_size(dtypes[0])) != numel) return false;
  line[slots[0]] = address_of(param, slots[0]);
  for (size_t i = 1; i < slots.size(); ++i) {
    const Handle tensor(tensors, static_cast<int64_t>(i) * n_tensors + index);
    const Layout other(tensor);
    if (other.real_dtype() != dtypes[i] || !other.matches(layout)) return false;
    line[slots[i]] = address_of(tensor, slots[i]);
  }
  // A tensor subclass without memory of its own.
  return numel == 0 || std::none_of(slots.begin(), slots.end(), [line](int64_t slot) { return line[slot] == 0; });
}

struct ListOwner {
  StableListHandle list;
  ~ListOwner() { torch_delete_list(list); }
};

int64_t fill(StableListHandle tensors, const std::vector<int64_t>& slots, const std::vector<ScalarType>& types,
             const Tensor& numels, const Tensor& addresses) {
  const int64_t n_tensors = numels.numel();
  size_t length;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(tensors, &length));
  STD_TORCH_CHECK(!slots.empty() && slots[0] == kParam && types.size() == slots.size() &&
                      length == slots.size() * n_tensors,
                  "fill_addresses: expected ", n_tensors, " tensors for each of ", slots.size(), " slots, got ",
                  length);
  STD_TORCH_CHECK(addresses.is_cpu() && addresses.is_contiguous() && addresses.scalar_type() == ScalarType::Long &&
                      addresses.numel() == n_tensors * kNumSlots && numels.is_cpu() && numels.is_contiguous() &&
                      numels.scalar_type() == ScalarType::Long,
                  "fill_addresses: numels and addresses must be contiguous int64 CPU tables of all tensors");
  for (int64_t slot : slots) STD_TORCH_CHECK(0 <= slot && slot < kNumSlots, "fill_addresses: no slot ", slot);
  std::vector<int32_t> dtypes;
  for (ScalarType type : types) dtypes.push_back(Layout::code(type));
  const auto* numel = static_cast<const int64_t*>(numels.const_data_ptr());
  auto* line = static_cast<int64_t*>(addresses.mutable_data_ptr());
  int64_t n_refused = 0;
  for (int64_t i = 0; i < n_tensors; ++i, line += kNumSlots) {
    std::fill_n(line, static_cast<int>(kNumSlots), 0);
    if (!fill_line(tensors, i, n_tensors, slots, dtypes, numel[i], line)) {
      std::fill_n(line, static_cast<int>(kNumSlots), 0);
      ++n_refused;
    }
  }
  return n_refused;
}

int64_t unbox_and_fill(StableIValue* stack, bool touches) {
  const ListOwner tensors{to<StableListHandle>(stack[0])};
  const auto slots = to<std::vector<int64_t>>(stack[1]);
  const auto types = to<std::vector<ScalarType>>(stack[2]);
  const auto numels = to<Tensor>(stack[3]);
  const auto addresses = to<Tensor>(stack[4]);
  return touches ? fill(tensors.list, slots, types, numels, addresses) : -1;
}

}  // namespace

void fill_addresses(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_fill(stack, true)); }

void refuse_lazy_tensors(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_fill(stack, false)); }

}  // namespace xgrad
