// The tensors of a Launch, followed from step to step: their addresses and layouts, gradients and version counters.
//
// The kernels are built for torch's stable ABI, which has no words for gradients and version counters. This file alone
// is built for one torch. It computes nothing: xgrad_optim/tensor_reader.py does the same in Python where it is missing.
#include <algorithm>
#include <atomic>
#include <exception>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/stable/ops.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "launch.h"

namespace xgrad {
namespace {

using at::ScalarType;
using at::Tensor;

constexpr int64_t kChanged = -1;

constexpr int64_t kGrain = 512;  // tensors that are worth another thread: what takes time is fetching them from memory

bool is_lazy(const Tensor& tensor) { return tensor.is_conj() || tensor.is_neg() || tensor._is_zerotensor(); }

// Whether the elements fill one range of memory, each once, in whatever order of dimensions.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) steps.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(steps.begin(), steps.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// The sizes and strides of a parameter, and whether it and its buffers are one flat range each, in one order of elements.
struct Layout {
  at::DimVector sizes, strides;
  bool is_flat;

  // Equal offsets are equal elements then. A dimension of one element has no stride that matters.
  bool is_of(const Tensor& tensor) const {
    if (!tensor.sizes().equals(sizes)) return false;
    if (tensor.strides().equals(strides)) return true;
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1 && tensor.strides()[d] != strides[d]) return false;
    }
    return true;
  }
};

// A tensor that lives as long as the launch. Our reference keeps it the same tensor; its memory may be exchanged.
struct Bound {
  Tensor tensor;
  const void* address;
  ScalarType dtype;

  explicit Bound(Tensor bound)
      : tensor(std::move(bound)), address(tensor.mutable_data_ptr()), dtype(tensor.scalar_type()) {}
};

class LaunchTensors : public torch::CustomClassHolder {
 public:
  // `tensors` holds the parameters, then as many for each further slot of `slots`. The dtypes are those of real numbers:
  // complex tensors count as twice as many, which `numels` says of each parameter.
  LaunchTensors(const std::vector<Tensor>& tensors, std::vector<int64_t> slots, int64_t param_dtype, int64_t state_dtype,
                const Tensor& numels, bool has_grad)
      : slots_(std::move(slots)), n_tensors_(numels.numel()), has_grad_(has_grad) {
    const int64_t n_slots = static_cast<int64_t>(slots_.size());
    TORCH_CHECK(n_slots > 0 && slots_[0] == kParam && static_cast<int64_t>(tensors.size()) == n_slots * n_tensors_,
                "LaunchTensors: expected ", n_tensors_, " tensors for each of ", n_slots, " slots, got ", tensors.size());
    for (int64_t slot : slots_) TORCH_CHECK(0 <= slot && slot < kNumSlots, "LaunchTensors: there is no slot ", slot);
    std::vector<ScalarType> dtypes;
    for (int64_t slot : slots_) {
      const auto param = static_cast<ScalarType>(param_dtype), state = static_cast<ScalarType>(state_dtype);
      const ScalarType master = param == at::kDouble ? at::kDouble : at::kFloat;
      dtypes.push_back(slot == kParam ? param : slot == kMasterWeights ? master : state);
    }
    const int64_t* numel = table(numels, "numels", n_tensors_);
    bound_.reserve(tensors.size());
    for (int64_t i = 0; i < n_tensors_; ++i) {
      for (int64_t s = 0; s < n_slots; ++s) bound_.emplace_back(tensors[s * n_tensors_ + i]);
      const Tensor& param = at(i, 0).tensor;
      layouts_.push_back({at::DimVector(param.sizes()), at::DimVector(param.strides()), false});
      layouts_[i].is_flat = is_flat(i, dtypes, numel[i]);
    }
  }

  // Writes each tensor's line of addresses, zeros where it is not flat or its gradient lies otherwise, and the version
  // counter of each parameter. Returns how many have zeros; or kChanged, where a parameter has no gradient, or a bound
  // tensor other memory, another layout or another dtype than it had: the tables are of no use then. The gradients
  // whose addresses it wrote are held until finish().
  int64_t read(const Tensor& addresses, const Tensor& versions) {
    int64_t* lines = table(addresses, "addresses", n_tensors_ * kNumSlots);
    int64_t* version = table(versions, "versions", n_tensors_);
    std::atomic<int64_t> n_refused{0};
    std::atomic<bool> is_changed{false};
    std::exception_ptr error;  // of a sparse gradient, say
    std::atomic<bool> has_failed{false};
    grads_.resize(has_grad_ ? n_tensors_ : 0);
    torch::stable::parallel_for(0, n_tensors_, kGrain, [&](int64_t begin, int64_t end) {
      try {
        for (int64_t i = begin; i < end && !is_changed; ++i) {
          const Tensor& param = at(i, 0).tensor;
          if (has_grad_) grads_[i] = param.grad();
          if ((has_grad_ && !grads_[i].defined()) || !is_unchanged(i)) {
            is_changed = true;
            break;
          }
          version[i] = param._version();
          if (!read_line(i, lines + i * kNumSlots)) ++n_refused;
        }
      } catch (...) {
        if (!has_failed.exchange(true)) error = std::current_exception();
        is_changed = true;
      }
    });
    if (is_changed) grads_.clear();
    if (error) std::rethrow_exception(error);
    return is_changed ? kChanged : n_refused.load();
  }

  // Tells autograd of a run, as torch's own in-place operators do, and lets the gradients go. Without gradients no state
  // buffer was written. Tensors of inference mode have no counter.
  void finish() {
    torch::stable::parallel_for(0, n_tensors_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (size_t s = 0; s < slots_.size(); ++s) {
          const bool is_written = has_grad_ || slots_[s] == kParam || slots_[s] == kMasterWeights;
          const Tensor& tensor = at(i, s).tensor;
          if (is_written && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
        }
      }
    });
    grads_.clear();
  }

 private:
  const Bound& at(int64_t tensor, size_t slot) const { return bound_[tensor * slots_.size() + slot]; }

  static int64_t* table(const Tensor& table, const char* name, int64_t numel) {
    TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == at::kLong && table.numel() == numel,
                "LaunchTensors: ", name, " must be a contiguous int64 CPU table of ", numel, " numbers");
    return table.mutable_data_ptr<int64_t>();
  }

  bool is_flat(int64_t i, const std::vector<ScalarType>& dtypes, int64_t numel) const {
    const Tensor& param = at(i, 0).tensor;
    if (!is_dense(param) || param.numel() * (param.is_complex() ? 2 : 1) != numel) return false;
    for (size_t s = 0; s < slots_.size(); ++s) {
      const auto& [tensor, address, dtype] = at(i, s);
      if (c10::toRealValueType(dtype) != dtypes[s] || !layouts_[i].is_of(tensor)) return false;
      if (tensor.device() != param.device() || is_lazy(tensor)) return false;
      if (numel != 0 && address == nullptr) return false;  // a tensor subclass without memory of its own
    }
    return true;
  }

  // A tensor that is not flat is looked at anew by whoever runs it.
  bool is_unchanged(int64_t i) const {
    for (size_t s = 0; layouts_[i].is_flat && s < slots_.size(); ++s) {
      const auto& [tensor, address, dtype] = at(i, s);
      const bool is_same = tensor.mutable_data_ptr() == address && tensor.scalar_type() == dtype;
      if (!is_same || is_lazy(tensor) || !layouts_[i].is_of(tensor)) return false;
    }
    return true;
  }

  bool read_line(int64_t i, int64_t* line) const {
    std::fill_n(line, static_cast<int>(kNumSlots), 0);
    if (!layouts_[i].is_flat || (has_grad_ && !fits(grads_[i], i))) return false;
    // A gradient is only read: asking for it so keeps copy-on-write tensors from being copied.
    if (has_grad_) line[kGrad] = reinterpret_cast<int64_t>(grads_[i].const_data_ptr());
    for (size_t s = 0; s < slots_.size(); ++s) line[slots_[s]] = reinterpret_cast<int64_t>(at(i, s).address);
    return true;
  }

  bool fits(const Tensor& grad, int64_t i) const {
    const auto& [param, address, dtype] = at(i, 0);
    return grad.scalar_type() == dtype && grad.device() == param.device() && !is_lazy(grad) && layouts_[i].is_of(grad) &&
           (grad.const_data_ptr() != nullptr || grad.numel() == 0);
  }

  std::vector<int64_t> slots_;
  int64_t n_tensors_;
  bool has_grad_;
  std::vector<Bound> bound_;  // a parameter and its buffers by slot, then the next parameter
  std::vector<Layout> layouts_;
  std::vector<Tensor> grads_;  // while a launch runs on them, another thread may take them from their parameters
};

}  // namespace
}  // namespace xgrad

TORCH_LIBRARY_FRAGMENT(xgrad_optim, library) {
  using xgrad::LaunchTensors;
  library.class_<LaunchTensors>("LaunchTensors")
      .def(torch::init<const std::vector<at::Tensor>&, std::vector<int64_t>, int64_t, int64_t, const at::Tensor&, bool>())
      .def("read", &LaunchTensors::read)
      .def("finish", &LaunchTensors::finish);
}
