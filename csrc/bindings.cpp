// The operators, registered through LibTorch's stable ABI: one build serves every torch from the one it targets on.
#include <algorithm>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "multi_tensor_cpu.h"
#include "tensor_table.h"

namespace xgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RuleId rule_of(const std::string& name) {
  if (name == "sgdm") return RuleId::kSgdm;
  if (name == "adam") return RuleId::kAdam;
  if (name == "adabelief") return RuleId::kAdaBelief;
  if (name == "adam3") return RuleId::kAdaM3;
  STD_TORCH_CHECK(false, "multi_tensor_cpu: there is no rule \"", name, "\"");
}

Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "multi_tensor_cpu: expected a real floating-point dtype, got ", static_cast<int>(type));
  }
}

// The instruction sets that this build and this machine have, best first.
std::vector<std::string> cpu_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (has_avx512) isas.push_back("avx512");
  if (has_avx2) isas.push_back("avx2");
#endif
  isas.push_back("baseline");
  return isas;
}

Kernel find_kernel(RuleId rule, Dtype param_dtype, Dtype state_dtype, const std::string& wanted) {
  static const std::vector<std::string> isas = cpu_isas();
  const std::string& isa = wanted.empty() ? isas.front() : wanted;
  STD_TORCH_CHECK(std::find(isas.begin(), isas.end(), isa) != isas.end(),
                  "multi_tensor_cpu: this machine has no instruction set \"", isa, "\"");
#if defined(__x86_64__)
  if (isa == "avx512") return avx512::find_kernel(rule, param_dtype, state_dtype);
  if (isa == "avx2") return avx2::find_kernel(rule, param_dtype, state_dtype);
#endif
  return baseline::find_kernel(rule, param_dtype, state_dtype);
}

void check_table(const char* name, const Tensor& table, ScalarType type, int64_t dim) {
  STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == type && table.dim() == dim,
                  "multi_tensor_cpu: ", name, " must be a contiguous CPU tensor of ", dim, " dimensions and dtype ",
                  static_cast<int>(type), ", got ", table.dim(), " dimensions and dtype ",
                  static_cast<int>(table.scalar_type()));
}

template <class T> const T* data(const Tensor& table) { return static_cast<const T*>(table.const_data_ptr()); }

// No index of the tables may lead out of another one.
void check_launch(const Launch& launch, int64_t n_tensors, int64_t n_rows, int64_t n_chunks) {
  STD_TORCH_CHECK(launch.chunk_size > 0, "multi_tensor_cpu: chunk_size must be positive, got ", launch.chunk_size);
  for (int64_t tensor = 0; tensor < n_tensors; ++tensor) {
    const int32_t row = launch.row_of[tensor];
    STD_TORCH_CHECK(0 <= row && row < n_rows, "multi_tensor_cpu: tensor ", tensor, " has row ", row, " of ", n_rows);
  }
  for (int64_t c = 0; c < n_chunks; ++c) {
    const auto [tensor, index] = launch.chunks[c];
    STD_TORCH_CHECK(0 <= tensor && tensor < n_tensors && 0 <= index &&
                        index * launch.chunk_size < launch.numels[tensor],
                    "multi_tensor_cpu: chunk ", c, " is (", tensor, ", ", index, "), outside of the tensors");
  }
}

// Steps or swaps every tensor of a Launch, except those whose addresses are 0. `tasks` are the bounds, in chunks, of
// about equal portions of work. The result depends on neither the portions nor the threads.
void multi_tensor_cpu(Tensor addresses, Tensor numels, Tensor row_of, Tensor rows, Tensor chunks, Tensor tasks,
                      int64_t chunk_size, bool trusts_master, std::string rule, ScalarType param_dtype, ScalarType state_dtype,
                      std::string isa) {
  const Kernel kernel = find_kernel(rule_of(rule), dtype_of(param_dtype), dtype_of(state_dtype), isa);
  STD_TORCH_CHECK(kernel, "multi_tensor_cpu: no kernel for parameters of dtype ", static_cast<int>(param_dtype),
                  " with state of dtype ", static_cast<int>(state_dtype));
  const ScalarType compute = param_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_table("addresses", addresses, ScalarType::Long, 2);
  check_table("numels", numels, ScalarType::Long, 1);
  check_table("row_of", row_of, ScalarType::Int, 1);
  check_table("rows", rows, compute, 2);
  check_table("chunks", chunks, ScalarType::Int, 2);
  check_table("tasks", tasks, ScalarType::Long, 1);
  const int64_t n_tensors = addresses.size(0), n_chunks = chunks.size(0), n_tasks = tasks.numel() - 1;
  STD_TORCH_CHECK(addresses.size(1) == kNumSlots && numels.numel() == n_tensors && row_of.numel() == n_tensors &&
                      chunks.size(1) == 2,
                  "multi_tensor_cpu: the tables disagree about the number of tensors or slots");
  const int64_t n_columns = baseline::count_columns(rule_of(rule));
  STD_TORCH_CHECK(rows.size(1) == n_columns, "multi_tensor_cpu: the rule \"", rule, "\" has ", n_columns,
                  " columns, the rows have ", rows.size(1));
  const Launch launch{data<int64_t>(addresses), data<int64_t>(numels), data<int32_t>(row_of), rows.const_data_ptr(),
                      rows.size(1),             data<Chunk>(chunks),   chunk_size, trusts_master};
  check_launch(launch, n_tensors, rows.size(0), n_chunks);
  const int64_t* bounds = data<int64_t>(tasks);
  STD_TORCH_CHECK(n_tasks >= 0 && bounds[0] == 0 && bounds[n_tasks] == n_chunks &&
                      std::is_sorted(bounds, bounds + n_tasks + 1),
                  "multi_tensor_cpu: the tasks must cover the ", n_chunks, " chunks in order");
  torch::stable::parallel_for(0, n_tasks, 1, [&](int64_t begin, int64_t end) {
    kernel(launch, bounds[begin], bounds[end]);
  });
}

std::string isa_names() {
  std::string names;
  for (const std::string& isa : cpu_isas()) names += (names.empty() ? "" : ",") + isa;
  return names;
}

}  // namespace
}  // namespace xgrad

STABLE_TORCH_LIBRARY(xgrad_optim, library) {
  library.def("cpu_isas() -> str");
  library.def("bind_tensors(Tensor[] tensors, int[] slots, ScalarType[] dtypes, Tensor numels) -> int");
  library.def("read_addresses(int binding, Tensor[] grads, int first, int count, Tensor(a!) addresses) -> int");
  library.def("release_tensors(int binding) -> ()");
  library.def(
      "multi_tensor_cpu(Tensor addresses, Tensor numels, Tensor row_of, Tensor rows, Tensor chunks, Tensor tasks, "
      "int chunk_size, bool trusts_master, str rule, ScalarType param_dtype, ScalarType state_dtype, str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CompositeExplicitAutograd, library) {
  library.impl("cpu_isas", TORCH_BOX(&xgrad::isa_names));
  library.impl("release_tensors", &xgrad::release_tensors);
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CPU, library) {
  library.impl("bind_tensors", &xgrad::bind_tensors);
  library.impl("read_addresses", &xgrad::read_addresses);
  library.impl("multi_tensor_cpu", TORCH_BOX(&xgrad::multi_tensor_cpu));
}

// A tensor whose negation, conjugation or zeros are still to be done would reach the kernel above as a temporary copy.
STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, Negative, library) {
  library.impl("bind_tensors", &xgrad::bind_lazy_tensors);
  library.impl("read_addresses", &xgrad::read_lazy_addresses);
}
STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, Conjugate, library) {
  library.impl("bind_tensors", &xgrad::bind_lazy_tensors);
  library.impl("read_addresses", &xgrad::read_lazy_addresses);
}
STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, ZeroTensor, library) {
  library.impl("bind_tensors", &xgrad::bind_lazy_tensors);
  library.impl("read_addresses", &xgrad::read_lazy_addresses);
}
