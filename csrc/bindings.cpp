// The operators, registered through LibTorch's stable ABI: one build serves every torch from the one it targets on.
#include <algorithm>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "multi_tensor_cpu.h"

namespace xgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

Kernel find_kernel(const char* rule, Dtype param_dtype, Dtype state_dtype, const std::string& wanted) {
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

// No index of the tables may lead out of another one.
void check_launch(const Launch& launch, int64_t n_tensors, int64_t n_rows, int64_t n_chunks) {
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
                      int64_t chunk_size, bool trusts_master, std::string rule, ScalarType param_dtype,
                      ScalarType state_dtype, std::string isa) {
  const int64_t n_columns = baseline::count_columns(rule.c_str());
  STD_TORCH_CHECK(n_columns > 0, "multi_tensor_cpu: there is no rule \"", rule, "\"");
  const Dtype dtype = dtype_of(param_dtype);
  const Kernel kernel = find_kernel(rule.c_str(), dtype, dtype_of(state_dtype), isa);
  STD_TORCH_CHECK(kernel, "multi_tensor_cpu: no kernel for parameters of dtype ", static_cast<int>(param_dtype),
                  " with state of dtype ", static_cast<int>(state_dtype));
  for (const Tensor* table : {&addresses, &numels, &row_of, &rows, &chunks, &tasks}) {
    STD_TORCH_CHECK(table->is_cpu(), "multi_tensor_cpu: all tables must be on the CPU");
  }
  check_table("tasks", tasks, ScalarType::Long, 1);
  Launch launch = read_tables(addresses, numels, row_of, rows, chunks, chunk_size, n_columns, dtype);
  launch.trusts_master = trusts_master;
  const int64_t n_tensors = numels.numel(), n_chunks = chunks.size(0), n_tasks = tasks.numel() - 1;
  check_launch(launch, n_tensors, rows.size(0), n_chunks);
  const int64_t* bounds = static_cast<const int64_t*>(tasks.const_data_ptr());
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
  library.def(
      "multi_tensor_cpu(Tensor addresses, Tensor numels, Tensor row_of, Tensor rows, Tensor chunks, Tensor tasks, "
      "int chunk_size, bool trusts_master, str rule, ScalarType param_dtype, ScalarType state_dtype, str isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CompositeExplicitAutograd, library) {
  library.impl("cpu_isas", TORCH_BOX(&xgrad::isa_names));
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CPU, library) {
  library.impl("multi_tensor_cpu", TORCH_BOX(&xgrad::multi_tensor_cpu));
}
