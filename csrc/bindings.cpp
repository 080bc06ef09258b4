// The operators, registered through LibTorch's stable ABI: one build serves every torch from the one it targets on.
#include <algorithm>
#include <cmath>
#include <deque>
#include <mutex>
#include <optional>
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

// What runs a launch, and the shape of the rows that it reads.
struct FoundKernel {
  Kernel kernel;
  RowMaker make_row;
  int64_t n_columns, n_numbers, n_options;
  bool is_double;
};

std::mutex found_mutex;
std::deque<FoundKernel> found_kernels;  // a deque's elements stay where they are as others join

// A number for the kernel of this rule, these dtypes and this instruction set, "" for the best one. Launches name it by
// that: the conversion of a string argument leaks, before torch 2.14.
int64_t find_kernel_cpu(std::string rule, ScalarType param_dtype, ScalarType state_dtype, std::string isa) {
  const int64_t n_columns = baseline::count_columns(rule.c_str());
  STD_TORCH_CHECK(n_columns > 0, "multi_tensor_cpu: there is no rule \"", rule, "\"");
  const Dtype dtype = dtype_of(param_dtype);
  const Kernel kernel = find_kernel(rule.c_str(), dtype, dtype_of(state_dtype), isa);
  STD_TORCH_CHECK(kernel, "multi_tensor_cpu: no kernel for parameters of dtype ", static_cast<int>(param_dtype),
                  " with state of dtype ", static_cast<int>(state_dtype));
  const std::lock_guard<std::mutex> lock(found_mutex);
  const bool is_double = dtype == Dtype::kFloat64;
  found_kernels.push_back({kernel, baseline::find_row_maker(rule.c_str(), is_double), n_columns,
                           baseline::count_numbers(rule.c_str()), baseline::count_options(rule.c_str()), is_double});
  return static_cast<int64_t>(found_kernels.size()) - 1;
}

const FoundKernel& kernel_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(found_mutex);
  STD_TORCH_CHECK(0 <= number && number < static_cast<int64_t>(found_kernels.size()),
                  "multi_tensor_cpu: find_kernel_cpu has given no kernel the number ", number);
  return found_kernels[number];
}

// No index of the tables may lead out of another one.
void check_launch(const Launch& launch, int64_t n_tensors, int64_t n_rows, int64_t n_chunks) {
  for (int64_t tensor = 0; tensor < n_tensors; ++tensor) {
    const int64_t row = launch.table[tensor].row;
    STD_TORCH_CHECK(0 <= row && row < n_rows, "multi_tensor_cpu: tensor ", tensor, " has row ", row, " of ", n_rows);
  }
  for (int64_t c = 0; c < n_chunks; ++c) {
    const auto [tensor, index] = launch.chunks[c];
    const bool is_inside = 0 <= tensor && tensor < n_tensors && 0 <= index &&
                           (index == 0 || index * launch.chunk_size < launch.table[tensor].numel);
    STD_TORCH_CHECK(is_inside, "multi_tensor_cpu: chunk ", c, " is (", tensor, ", ", index, "), outside of the tensors");
  }
}

// Steps or swaps every tensor of a Launch and writes its numbers: no Python runs in between, so an interrupt finds all of
// it or nothing. `tasks` are the bounds, in chunks, of about equal portions of work. The result depends on neither the
// portions nor the threads.
void multi_tensor_cpu(Tensor table, std::optional<Tensor> grads, Tensor rows, Tensor next_numbers, Tensor chunks,
                      Tensor tasks, int64_t chunk_size, int64_t kernel_number) {
  const FoundKernel& found = kernel_of(kernel_number);
  for (const Tensor* one : {&table, &rows, &next_numbers, &chunks, &tasks}) {
    STD_TORCH_CHECK(one->is_cpu(), "multi_tensor_cpu: all tables must be on the CPU");
  }
  check_table("tasks", tasks, ScalarType::Long, 1);
  const Launch launch = read_tables(table, grads, rows, next_numbers, chunks, chunk_size, found.n_columns,
                                    found.n_numbers, found.is_double);
  const int64_t n_chunks = chunks.size(0), n_tasks = tasks.numel() - 1;
  check_launch(launch, table.size(0), rows.size(0), n_chunks);
  const int64_t* bounds = static_cast<const int64_t*>(tasks.const_data_ptr());
  STD_TORCH_CHECK(n_tasks >= 0 && bounds[0] == 0 && bounds[n_tasks] == n_chunks &&
                      std::is_sorted(bounds, bounds + n_tasks + 1),
                  "multi_tensor_cpu: the tasks must cover the ", n_chunks, " chunks in order");
  torch::stable::parallel_for(0, n_tasks, 1, [&](int64_t begin, int64_t end) {
    found.kernel(launch, bounds[begin], bounds[end]);
  });
}

bool are_finite(const void* row, int64_t count, bool is_double) {
  const auto is_finite = [](auto value) { return std::isfinite(value); };
  return is_double ? std::all_of(static_cast<const double*>(row), static_cast<const double*>(row) + count, is_finite)
                   : std::all_of(static_cast<const float*>(row), static_cast<const float*>(row) + count, is_finite);
}

// Makes the rows of a Launch: row r of the options r and of the numbers of tensor members[r]; and what these are next. It
// changes nothing else, so nothing has happened where the launch after it fails. Returns whether all rows are finite: if
// not, an option may have left its range.
bool make_rows_cpu(Tensor table, Tensor members, Tensor options, Tensor rows, Tensor next_numbers, bool is_step,
                   int64_t kernel_number) {
  const FoundKernel& found = kernel_of(kernel_number);
  for (const Tensor* one : {&table, &members, &options, &rows, &next_numbers}) {
    STD_TORCH_CHECK(one->is_cpu(), "make_rows_cpu: all tables must be on the CPU");
  }
  check_table("table", table, ScalarType::Long, 2);
  check_table("members", members, ScalarType::Long, 1);
  check_table("options", options, ScalarType::Long, 3);
  check_table("rows", rows, found.is_double ? ScalarType::Double : ScalarType::Float, 2);
  check_table("next_numbers", next_numbers, ScalarType::Double, 2);
  const int64_t n_rows = members.numel();
  STD_TORCH_CHECK(table.size(1) == kLineLength && options.size(0) == n_rows && options.size(1) == found.n_options &&
                      options.size(2) == 2 && rows.size(0) == n_rows && rows.size(1) == found.n_columns &&
                      next_numbers.size(0) == n_rows && next_numbers.size(1) == found.n_numbers,
                  "make_rows_cpu: the tables do not fit the rule and each other");
  const Line* lines = static_cast<const Line*>(table.const_data_ptr());
  const int64_t* member = static_cast<const int64_t*>(members.const_data_ptr());
  const int64_t* option = static_cast<const int64_t*>(options.const_data_ptr());
  char* row = static_cast<char*>(rows.mutable_data_ptr());
  double* next = static_cast<double*>(next_numbers.mutable_data_ptr());
  const int64_t row_bytes = found.n_columns * (found.is_double ? sizeof(double) : sizeof(float));
  bool is_finite = true;
  for (int64_t r = 0; r < n_rows; ++r) {
    STD_TORCH_CHECK(0 <= member[r] && member[r] < table.size(0) && lines[member[r]].numbers != 0,
                    "make_rows_cpu: row ", r, " is that of tensor ", member[r], ", which the table lacks");
    found.make_row(is_step, option + r * found.n_options * 2, reinterpret_cast<const void*>(lines[member[r]].numbers),
                   row + r * row_bytes, next + r * found.n_numbers);
    is_finite = is_finite && are_finite(row + r * row_bytes, found.n_columns, found.is_double);
  }
  return is_finite;
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
  library.def("find_kernel_cpu(str rule, ScalarType param_dtype, ScalarType state_dtype, str isa) -> int");
  library.def(
      "multi_tensor_cpu(Tensor table, Tensor? grads, Tensor rows, Tensor next_numbers, Tensor chunks, Tensor tasks, "
      "int chunk_size, int kernel) -> ()");
  library.def(
      "make_rows_cpu(Tensor table, Tensor members, Tensor options, Tensor rows, Tensor next_numbers, "
      "bool is_step, int kernel) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CompositeExplicitAutograd, library) {
  library.impl("cpu_isas", TORCH_BOX(&xgrad::isa_names));
  library.impl("find_kernel_cpu", TORCH_BOX(&xgrad::find_kernel_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CPU, library) {
  library.impl("multi_tensor_cpu", TORCH_BOX(&xgrad::multi_tensor_cpu));
  library.impl("make_rows_cpu", TORCH_BOX(&xgrad::make_rows_cpu));
}
