#include "tensor_table.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
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

// torch's own macro for this has not the same name in every release.
void demand(AOTITorchError outcome) {
  STD_TORCH_CHECK(outcome == AOTI_TORCH_SUCCESS, "xgrad_optim: a call into torch failed");
}

// A tensor of a list, without the shared pointer that torch::stable::Tensor allocates: there are many.
class Handle {
 public:
  Handle(StableListHandle list, int64_t index) {
    StableIValue value;
    demand(torch_list_get_item(list, index, &value));
    handle_ = to<AtenTensorHandle>(value);
  }
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&&) = delete;

  AtenTensorHandle get() const { return handle_; }

  int32_t dtype() const {
    int32_t dtype;
    demand(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }

  // A gradient's memory is only read: asking for it so keeps copy-on-write tensors from being copied.
  int64_t address(bool is_written) const {
    if (is_written) {
      void* address;
      demand(torch_get_mutable_data_ptr(handle_, &address));
      return reinterpret_cast<int64_t>(address);
    }
    const void* address;
    demand(torch_get_const_data_ptr(handle_, &address));
    return reinterpret_cast<int64_t>(address);
  }

  std::pair<int32_t, int32_t> device() const {
    int32_t type, index = 0;
    demand(aoti_torch_get_device_type(handle_, &type));
    if (type != aoti_torch_device_type_cpu()) {
      demand(aoti_torch_get_device_index(handle_, &index));
    }
    return {type, index};
  }

 private:
  AtenTensorHandle handle_;
};

int32_t code(ScalarType type) { return to<int32_t>(from(type)); }

// The dtype of the numbers in memory: a complex number is a pair of reals.
int32_t real_dtype(int32_t dtype) {
  static const int32_t kComplex[] = {code(ScalarType::ComplexFloat), code(ScalarType::ComplexDouble)};
  static const int32_t kReal[] = {code(ScalarType::Float), code(ScalarType::Double)};
  return dtype == kComplex[0] ? kReal[0] : dtype == kComplex[1] ? kReal[1] : dtype;
}

// How a tensor's elements lie in its memory: the number of dimensions, the sizes, the strides. Many of them stand one
// after the other in one vector, which is read in order and has no pointers to follow.
class Layouts {
 public:
  void add(const Handle& handle) {
    const auto [dim, sizes, strides] = ask(handle);
    starts_.push_back(numbers_.size());
    numbers_.push_back(dim);
    numbers_.insert(numbers_.end(), sizes, sizes + dim);
    numbers_.insert(numbers_.end(), strides, strides + dim);
  }

  // Whether the tensor has these sizes, and these strides where they matter: equal offsets are equal elements then.
  bool is_of(int64_t i, const Handle& handle) const {
    const auto [own_dim, own_sizes, own_strides] = get(i);
    const auto [dim, sizes, strides] = ask(handle);
    if (dim != own_dim) return false;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != own_sizes[d] || (strides[d] != own_strides[d] && sizes[d] != 1)) return false;
    }
    return true;
  }

  int64_t numel(int64_t i) const {
    const auto [dim, sizes, strides] = get(i);
    int64_t numel = 1;
    for (int64_t d = 0; d < dim; ++d) numel *= sizes[d];
    return numel;
  }

  // Whether the elements fill one range of memory, each once, in whatever order of dimensions.
  bool is_dense(int64_t i) const {
    if (numel(i) == 0) return true;
    const auto [dim, sizes, strides] = get(i);
    std::vector<std::pair<int64_t, int64_t>> steps;
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != 1) steps.emplace_back(strides[d], sizes[d]);
    }
    std::sort(steps.begin(), steps.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : steps) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }

 private:
  struct Layout {
    int64_t dim;
    const int64_t *sizes, *strides;
  };

  Layout get(int64_t i) const {
    const int64_t* numbers = &numbers_[starts_[i]];
    return {numbers[0], numbers + 1, numbers + 1 + numbers[0]};
  }

  static Layout ask(const Handle& handle) {
    int64_t dim, *sizes, *strides;
    demand(aoti_torch_get_dim(handle.get(), &dim));
    demand(aoti_torch_get_sizes(handle.get(), &sizes));
    demand(aoti_torch_get_strides(handle.get(), &strides));
    return {dim, sizes, strides};
  }

  std::vector<int64_t> numbers_;
  std::vector<size_t> starts_;
};

// A tensor that lives as long as the launch. Only our reference keeps it the same tensor; its memory may be exchanged.
struct BoundTensor {
  Handle handle;
  int64_t address;
  int32_t dtype;

  explicit BoundTensor(Handle tensor)
      : handle(std::move(tensor)), address(handle.address(true)), dtype(handle.dtype()) {}
};

class ListOwner {
 public:
  explicit ListOwner(StableIValue value) : list_(to<StableListHandle>(value)) {
    size_t size;
    demand(torch_list_size(list_, &size));
    size_ = static_cast<int64_t>(size);
  }
  ~ListOwner() { torch_delete_list(list_); }
  ListOwner(const ListOwner&) = delete;

  int64_t size() const { return size_; }
  Handle operator[](int64_t i) const { return Handle(list_, i); }

 private:
  StableListHandle list_;
  int64_t size_;
};

class Binding {
 public:
  Binding(const ListOwner& tensors, const std::vector<int64_t>& slots, const std::vector<ScalarType>& types,
          const Tensor& numels)
      : slots_(slots), n_tensors_(numels.numel()) {
    STD_TORCH_CHECK(!slots.empty() && slots[0] == kParam && types.size() == slots.size() &&
                        tensors.size() == static_cast<int64_t>(slots.size()) * n_tensors_,
                    "bind_tensors: expected ", n_tensors_, " tensors for each of ", slots.size(), " slots, got ",
                    tensors.size());
    STD_TORCH_CHECK(numels.is_cpu() && numels.is_contiguous() && numels.scalar_type() == ScalarType::Long,
                    "bind_tensors: numels must be a contiguous int64 CPU tensor");
    for (int64_t slot : slots) STD_TORCH_CHECK(0 <= slot && slot < kNumSlots, "bind_tensors: no slot ", slot);
    bound_.reserve(tensors.size());
    const auto* numel = static_cast<const int64_t*>(numels.const_data_ptr());
    for (int64_t i = 0; i < n_tensors_; ++i) {
      for (size_t s = 0; s < slots.size(); ++s) bound_.emplace_back(tensors[s * n_tensors_ + i]);
      layouts_.add(at(i, 0).handle);
      is_flat_.push_back(is_flat(i, types, numel[i]));
    }
  }

  int64_t read(const ListOwner& grads, int64_t first, int64_t count, const Tensor& addresses) const {
    STD_TORCH_CHECK(0 <= first && 0 <= count && first + count <= n_tensors_, "read_addresses: tensors [", first, ", ",
                    first + count, ") are not all among the ", n_tensors_, " of the binding");
    STD_TORCH_CHECK(grads.size() == 0 || grads.size() == count, "read_addresses: expected ", count,
                    " gradients or none, got ", grads.size());
    STD_TORCH_CHECK(addresses.is_cpu() && addresses.is_contiguous() && addresses.scalar_type() == ScalarType::Long &&
                        addresses.numel() == n_tensors_ * kNumSlots,
                    "read_addresses: addresses must be a contiguous int64 CPU table of ", n_tensors_, " lines");
    auto* lines = static_cast<int64_t*>(addresses.mutable_data_ptr());
    int64_t n_refused = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!is_unchanged(first + i)) return kChanged;
      n_refused += !read_line(grads, i, first + i, lines + (first + i) * kNumSlots);
    }
    return n_refused;
  }

 private:
  const BoundTensor& at(int64_t tensor, size_t slot) const { return bound_[tensor * slots_.size() + slot]; }

  bool is_flat(int64_t i, const std::vector<ScalarType>& types, int64_t numel) const {
    const BoundTensor& param = at(i, 0);
    const int64_t n_reals = layouts_.numel(i) * (real_dtype(param.dtype) == param.dtype ? 1 : 2);
    if (!layouts_.is_dense(i) || n_reals != numel) return false;
    for (size_t s = 0; s < slots_.size(); ++s) {
      const BoundTensor& tensor = at(i, s);
      if (real_dtype(tensor.dtype) != code(types[s]) || !layouts_.is_of(i, tensor.handle)) return false;
      if (tensor.handle.device() != param.handle.device()) return false;
      if (numel != 0 && tensor.address == 0) return false;  // a tensor subclass without memory of its own
    }
    return true;
  }

  // A tensor that is not flat is looked at anew by whoever runs it.
  bool is_unchanged(int64_t i) const {
    for (size_t s = 0; is_flat_[i] && s < slots_.size(); ++s) {
      const auto& [handle, address, dtype] = at(i, s);
      if (handle.address(true) != address || handle.dtype() != dtype || !layouts_.is_of(i, handle)) return false;
    }
    return true;
  }

  bool read_line(const ListOwner& grads, int64_t index_of_grad, int64_t i, int64_t* line) const {
    std::fill_n(line, static_cast<int>(kNumSlots), 0);
    if (!is_flat_[i]) return false;
    if (grads.size() > 0 && !read_gradient(grads[index_of_grad], i, line)) return false;
    for (size_t s = 0; s < slots_.size(); ++s) line[slots_[s]] = at(i, s).address;
    return true;
  }

  bool read_gradient(const Handle& grad, int64_t i, int64_t* line) const {
    const BoundTensor& param = at(i, 0);
    if (grad.dtype() != param.dtype || !layouts_.is_of(i, grad) || grad.device() != param.handle.device()) {
      return false;
    }
    const int64_t address = grad.address(false);
    if (address == 0 && layouts_.numel(i) != 0) return false;
    line[kGrad] = address;
    return true;
  }

  std::vector<int64_t> slots_;
  int64_t n_tensors_;
  std::vector<BoundTensor> bound_;  // a parameter and its buffers by slot, then the next parameter
  Layouts layouts_;                 // of the parameters
  std::vector<char> is_flat_;
};

// Bindings by name; a name that was never given, or was released, is an error and not an address.
class Bindings {
 public:
  int64_t add(std::shared_ptr<const Binding> binding) {
    const std::lock_guard<std::mutex> guard(mutex_);
    bindings_.emplace(++last_, std::move(binding));
    return last_;
  }

  std::shared_ptr<const Binding> get(int64_t name) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = bindings_.find(name);
    STD_TORCH_CHECK(found != bindings_.end(), "read_addresses: there is no binding ", name);
    return found->second;
  }

  void remove(int64_t name) {
    std::shared_ptr<const Binding> last_owner;  // tensors are freed after the lock is
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = bindings_.find(name);
    if (found == bindings_.end()) return;
    last_owner = std::move(found->second);
    bindings_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Binding>> bindings_;
  int64_t last_ = 0;
};

// Never destroyed: torch may be gone by then.
Bindings& all_bindings() {
  static auto* bindings = new Bindings;
  return *bindings;
}

// The arguments on the stack are ours to free, whether they are used or not.
int64_t unbox_and_bind(StableIValue* stack, bool is_lazy) {
  const ListOwner tensors(stack[0]);
  const auto slots = to<std::vector<int64_t>>(stack[1]);
  const auto types = to<std::vector<ScalarType>>(stack[2]);
  const auto numels = to<Tensor>(stack[3]);
  if (is_lazy) return kLazy;
  return all_bindings().add(std::make_shared<const Binding>(tensors, slots, types, numels));
}

int64_t unbox_and_read(StableIValue* stack, bool is_lazy) {
  const auto name = to<int64_t>(stack[0]);
  const ListOwner grads(stack[1]);
  const auto first = to<int64_t>(stack[2]), count = to<int64_t>(stack[3]);
  const auto addresses = to<Tensor>(stack[4]);
  if (is_lazy) return kLazy;
  return all_bindings().get(name)->read(grads, first, count, addresses);
}

}  // namespace

void bind_tensors(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_bind(stack, false)); }

void bind_lazy_tensors(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_bind(stack, true)); }

void read_addresses(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_read(stack, false)); }

void read_lazy_addresses(StableIValue* stack, uint64_t, uint64_t) { stack[0] = from(unbox_and_read(stack, true)); }

void release_tensors(StableIValue* stack, uint64_t, uint64_t) { all_bindings().remove(to<int64_t>(stack[0])); }

}  // namespace xgrad
