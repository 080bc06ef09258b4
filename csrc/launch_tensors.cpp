// The tensors of a Launch, followed from step to step: their addresses and layouts, gradients and version counters.
//
// The kernels are built for torch's stable ABI, which has no words for gradients and version counters. This file alone
// is built for one torch. It computes nothing: xgrad_optim/backends/addresses.py does the same in Python where it is
// missing.
#include <atomic>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <torch/csrc/stable/ops.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "launch.h"

namespace xgrad {
namespace {

using at::ScalarType;
using at::Tensor;

constexpr int64_t kGrain = 512;  // tensors that are worth another thread: what takes time is fetching them from memory

bool is_lazy(const Tensor& tensor) { return tensor.is_conj() || tensor.is_neg() || tensor._is_zerotensor(); }

// Tensors of inference mode have no counter.
int64_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

// The sizes and strides of a parameter, which its buffers share.
struct Layout {
  at::DimVector sizes, strides;

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
  // Of the DTensor whose local shard this is: a write moves its counter or the shard's.
  c10::VariableVersion wrapper_version{c10::VariableVersion::DISABLED};

  Bound(Tensor bound, const Tensor& wrapper)
      : tensor(std::move(bound)), address(tensor.mutable_data_ptr()), dtype(tensor.scalar_type()) {
    if (!wrapper.is_same(tensor)) wrapper_version = wrapper.unsafeGetTensorImpl()->version_counter();
  }

  int64_t version() const {
    return version_of(tensor) + (wrapper_version.enabled() ? wrapper_version.current_version() : 0);
  }

  void bump_version() {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    if (wrapper_version.enabled()) wrapper_version.bump();
  }
};

// Where the numbers of one parameter are. The state's step count stands for all its numbers: whoever gives one of them
// other memory (`step.data = ...`, which leaves no trace but its address), does so for it, too.
struct Numbers {
  Tensor step;
  size_t storage;
  int64_t offset;  // bytes
};

// Fetching a thousand tensors from memory is most of the work: ask for those that come next before they are needed.
void prefetch(const Tensor& tensor) {
  const char* impl = reinterpret_cast<const char*>(tensor.unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(impl + line);
}

class LaunchTensors : public torch::CustomClassHolder {
 public:
  // `tensors` holds the parameters, then as many for each further one of `columns`, the columns of the launch's table
  // where their addresses belong; `wrappers` holds for a local shard its DTensor, for any other tensor itself.
  // `vectors` are the numbers of each parameter, `steps` the step counts in its state, which are views of the vectors'
  // beginnings.
  LaunchTensors(const std::vector<Tensor>& tensors, const std::vector<Tensor>& wrappers, std::vector<int64_t> columns,
                const std::vector<Tensor>& vectors, const std::vector<Tensor>& steps, bool has_grad,
                bool writes_numbers)
      : columns_(std::move(columns)), has_grad_(has_grad), writes_numbers_(writes_numbers) {
    const int64_t n_columns = columns_.size();
    TORCH_CHECK(n_columns > 0 && columns_[0] == 0 && tensors.size() % n_columns == 0,
                "LaunchTensors: expected as many tensors for each column, the parameters first");
    TORCH_CHECK(wrappers.size() == tensors.size(), "LaunchTensors: expected a wrapper for each tensor");
    n_tensors_ = tensors.size() / n_columns;
    TORCH_CHECK(static_cast<int64_t>(vectors.size()) == n_tensors_ && vectors.size() == steps.size(),
                "LaunchTensors: expected a vector and a step count for each parameter");
    for (const int64_t column : columns_) {
      TORCH_CHECK(0 <= column && column <= kMasterWeightsColumn, "LaunchTensors: no column ", column);
    }
    bound_.reserve(tensors.size());
    for (int64_t i = 0; i < n_tensors_; ++i) {
      for (int64_t c = 0; c < n_columns; ++c) {
        bound_.emplace_back(tensors[c * n_tensors_ + i], wrappers[c * n_tensors_ + i]);
      }
      const Tensor& param = at(i, 0).tensor;
      layouts_.push_back({at::DimVector(param.sizes()), at::DimVector(param.strides())});
      add_numbers(vectors[i], steps[i]);
    }
  }

  // Writes the addresses of each tensor into its line of `table`, those of the gradients into `grad_addresses`, and into
  // `versions` two counts for each parameter: its version counter, and those of its state buffers together. False where a
  // parameter has no gradient that fits it, or a bound tensor other memory, another layout or another dtype than it had:
  // the tables are of no use then. `given` stands for the parameters' own gradients. The gradients whose addresses it
  // wrote are held until finish().
  bool read(const Tensor& table, const Tensor& grad_addresses, const Tensor& versions,
            const std::optional<std::vector<Tensor>>& given) {
    int64_t* lines = numbers_of(table, "table", n_tensors_ * kLineLength);
    int64_t* grad_address = numbers_of(grad_addresses, "grad_addresses", has_grad_ ? n_tensors_ : 0);
    int64_t* version = numbers_of(versions, "versions", 2 * n_tensors_);
    TORCH_CHECK(!given || static_cast<int64_t>(given->size()) == n_tensors_, "LaunchTensors: expected ", n_tensors_,
                " gradients, got ", given ? given->size() : 0);
    std::atomic<bool> is_changed{false}, needs_copies{false};
    std::exception_ptr error;  // of a storage that has none, say
    std::atomic<bool> has_failed{false};
    grads_.resize(has_grad_ ? n_tensors_ : 0);
    std::vector<const char*> memory;  // of the numbers; torch may have moved it, to share it with another process
    for (const c10::Storage& storage : storages_) memory.push_back(static_cast<const char*>(storage.data()));
    torch::stable::parallel_for(0, n_tensors_, kGrain, [&](int64_t begin, int64_t end) {
      try {
        for (int64_t i = begin; i < end && !is_changed; ++i) {
          if (i + 2 < end) prefetch_member(i + 2);
          if (has_grad_) {
            grads_[i] = given ? (*given)[i] : at(i, 0).tensor.grad();
            if (!grads_[i].defined() || !matches(grads_[i], at(i, 0))) is_changed = true;
          }
          const char* numbers = memory[numbers_[i].storage] + numbers_[i].offset;
          if (is_changed || !is_unchanged(i) || numbers_[i].step.const_data_ptr() != numbers) {
            is_changed = true;
            break;
          }
          write_line(i, numbers, lines + i * kLineLength);
          read_versions(i, version + 2 * i);
          if (!has_grad_) continue;
          // A gradient is only read: asking for it so keeps copy-on-write tensors from being copied.
          grad_address[i] = reinterpret_cast<int64_t>(grads_[i].const_data_ptr());
          if (is_lazy(grads_[i]) || !layouts_[i].is_of(grads_[i])) needs_copies = true;
        }
      } catch (...) {
        if (!has_failed.exchange(true)) error = std::current_exception();
        is_changed = true;
      }
    });
    if (is_changed) grads_.clear();
    if (error) std::rethrow_exception(error);
    if (!is_changed && needs_copies) copy_grads(grad_address);
    return !is_changed;
  }

  // Tells autograd of a run, as torch's own in-place operators do, and lets the gradients go. Without gradients no state
  // buffer was written.
  void finish() {
    torch::stable::parallel_for(0, n_tensors_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (size_t c = 0; c < columns_.size(); ++c) {
          const bool is_written = has_grad_ || columns_[c] == 0 || columns_[c] == kMasterWeightsColumn;
          if (is_written) bound_[i * columns_.size() + c].bump_version();
        }
      }
    });
    grads_.clear();
  }

  // The counts of read() as they are now.
  void versions(const Tensor& versions) const {
    int64_t* version = numbers_of(versions, "versions", 2 * n_tensors_);
    for (int64_t i = 0; i < n_tensors_; ++i) read_versions(i, version + 2 * i);
  }

 private:
  static constexpr int64_t kMasterWeightsColumn = 1 + kMaxStates, kNumbersColumn = kLineLength - 1;

  const Bound& at(int64_t tensor, size_t column) const { return bound_[tensor * columns_.size() + column]; }

  static int64_t* numbers_of(const Tensor& table, const char* name, int64_t numel) {
    TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == at::kLong && table.numel() == numel,
                "LaunchTensors: ", name, " must be a contiguous int64 CPU table of ", numel, " numbers");
    return table.mutable_data_ptr<int64_t>();
  }

  static bool matches(const Tensor& grad, const Bound& param) {
    return grad.layout() == at::kStrided && grad.scalar_type() == param.dtype &&
           grad.device() == param.tensor.device() && grad.sizes().equals(param.tensor.sizes());
  }

  bool is_unchanged(int64_t i) const {
    for (size_t c = 0; c < columns_.size(); ++c) {
      const Bound& bound = at(i, c);
      const Tensor& tensor = bound.tensor;
      const bool is_same = tensor.mutable_data_ptr() == bound.address && tensor.scalar_type() == bound.dtype;
      if (!is_same || is_lazy(tensor) || !layouts_[i].is_of(tensor)) return false;
    }
    return true;
  }

  void add_numbers(const Tensor& vector, const Tensor& step) {
    size_t index = 0;
    while (index < storages_.size() && !storages_[index].is_alias_of(vector.storage())) ++index;
    if (index == storages_.size()) storages_.push_back(vector.storage());
    numbers_.push_back({step, index, vector.storage_offset() * static_cast<int64_t>(vector.element_size())});
  }

  void prefetch_member(int64_t i) const {
    for (size_t c = 0; c < columns_.size(); ++c) prefetch(at(i, c).tensor);
    prefetch(numbers_[i].step);
  }

  void write_line(int64_t i, const char* numbers, int64_t* line) const {
    for (size_t c = 0; c < columns_.size(); ++c) line[columns_[c]] = reinterpret_cast<int64_t>(at(i, c).address);
    line[kNumbersColumn] = writes_numbers_ ? reinterpret_cast<int64_t>(numbers) : 0;
  }

  void read_versions(int64_t i, int64_t* version) const {
    version[0] = at(i, 0).version();
    version[1] = 0;
    for (size_t c = 1; c < columns_.size(); ++c) version[1] += at(i, c).version();
  }

  // Gradients that lie otherwise than their parameters are copied as these lie.
  void copy_grads(int64_t* grad_address) {
    for (int64_t i = 0; i < n_tensors_; ++i) {
      if (!is_lazy(grads_[i]) && layouts_[i].is_of(grads_[i])) continue;
      grads_[i] = at::empty_strided(layouts_[i].sizes, layouts_[i].strides, grads_[i].options()).copy_(grads_[i]);
      grad_address[i] = reinterpret_cast<int64_t>(grads_[i].const_data_ptr());
    }
  }

  std::vector<int64_t> columns_;
  int64_t n_tensors_;
  bool has_grad_, writes_numbers_;
  std::vector<Bound> bound_;  // a parameter and its buffers by column, then the next parameter
  std::vector<Layout> layouts_;
  std::vector<Numbers> numbers_;
  std::vector<c10::Storage> storages_;  // where the numbers are; few
  std::vector<Tensor> grads_;  // while a launch runs on them, another thread may take them from their parameters
};

}  // namespace
}  // namespace xgrad

TORCH_LIBRARY_FRAGMENT(xgrad_optim, library) {
  using xgrad::LaunchTensors;
  library.class_<LaunchTensors>("LaunchTensors")
      .def(torch::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&, std::vector<int64_t>,
                       const std::vector<at::Tensor>&, const std::vector<at::Tensor>&, bool, bool>())
      .def("read", &LaunchTensors::read)
      .def("finish", &LaunchTensors::finish)
      .def("versions", &LaunchTensors::versions);
}
