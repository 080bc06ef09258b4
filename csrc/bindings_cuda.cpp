// The operators of the CUDA library, registered through LibTorch's stable ABI: one build serves every torch from the
// one it targets on, and none of torch's CUDA headers is needed.
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments.h"
#include "multi_tensor_cuda.h"

namespace xgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid

// Why this library can run nothing on this machine; empty where it can. It brings a CUDA runtime of its own, which may
// want a newer driver than torch's does.
std::string cuda_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();  // leave no error behind for somebody else to find
  const std::string reason = error == cudaSuccess ? "none found" : cudaGetErrorString(error);
  return "there is no CUDA device (" + reason + ")";
}

// What runs a launch, and the shape of the tables that it reads.
struct FoundKernels {
  DeviceKernels kernels;
  int64_t n_columns, n_numbers, n_options;
  bool is_double, has_grad;
};

std::mutex found_mutex;
std::deque<FoundKernels> found_kernels;  // a deque's elements stay where they are as others join

// A number for the kernels of this rule, these dtypes and these buffers. Launches name them by that: the conversion of a
// string argument leaks, before torch 2.14.
int64_t find_kernels_cuda(std::string rule, ScalarType param_dtype, ScalarType state_dtype, bool has_grad,
                          bool has_optional, bool has_master_weights) {
  const Dtype param = dtype_of(param_dtype), state = dtype_of(state_dtype);
  const Buffers buffers{has_grad, has_optional, has_master_weights};
  const auto find = [&](auto rule_found) -> FoundKernels {
    using Rule = decltype(rule_found);
    constexpr int64_t kOptions = (sizeof(typename Rule::Options) + sizeof(CommonOptions)) / sizeof(double);
    return {find_kernels<Rule>(param, state, buffers), Hyper<Rule, float>::kNumColumns, Hyper<Rule, float>::kNumNumbers,
            kOptions, param == Dtype::kFloat64, has_grad};
  };
  const FoundKernels found = with_rule(rule.c_str(), find, [] { return FoundKernels{}; });
  STD_TORCH_CHECK(found.n_columns > 0, "xgrad_optim: there is no rule \"", rule, "\"");
  STD_TORCH_CHECK(found.kernels.multi_tensor, "xgrad_optim: no CUDA kernel for parameters of dtype ",
                  static_cast<int>(param_dtype), " with state of dtype ", static_cast<int>(state_dtype),
                  " and these buffers");
  const std::lock_guard<std::mutex> lock(found_mutex);
  found_kernels.push_back(found);
  return static_cast<int64_t>(found_kernels.size()) - 1;
}

const FoundKernels& kernels_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(found_mutex);
  STD_TORCH_CHECK(0 <= number && number < static_cast<int64_t>(found_kernels.size()),
                  "xgrad_optim: find_kernels_cuda has given no kernel the number ", number);
  return found_kernels[number];
}

void check_device(const Tensor& table, const Tensor& other) {
  STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == table.get_device_index(),
                  "xgrad_optim: all tables must be on one CUDA device");
}

void run(const void* kernel, int64_t n_blocks, void* argument, const Tensor& table, int64_t stream) {
  if (n_blocks == 0) return;  // CUDA has no empty grid
  STD_TORCH_CHECK(n_blocks <= kMaxBlocks, "xgrad_optim: ", n_blocks, " blocks exceed a grid");
  const torch::stable::accelerator::DeviceGuard guard(table.get_device_index());
  void* arguments[] = {argument};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(n_blocks)), dim3(kThreads), arguments, 0,
                                             reinterpret_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "xgrad_optim: ", cudaGetErrorString(error));
}

// Steps or swaps every tensor of a Launch on the given stream of the device that the tables are on. What the tables hold
// is not checked: that would take a copy to the host.
void multi_tensor_cuda(Tensor table, std::optional<Tensor> grads, Tensor rows, Tensor next_numbers, Tensor chunks,
                       int64_t chunk_size, int64_t kernel, int64_t stream) {
  const FoundKernels& found = kernels_of(kernel);
  for (const Tensor* one : {&table, &rows, &next_numbers, &chunks}) check_device(table, *one);
  if (grads) check_device(table, *grads);
  STD_TORCH_CHECK(grads.has_value() == found.has_grad, "multi_tensor_cuda: the kernel ",
                  found.has_grad ? "needs gradients" : "swaps, it takes no gradients");
  STD_TORCH_CHECK(chunk_size <= kMaxBlocks, "multi_tensor_cuda: chunk_size ", chunk_size, " is too large");
  Launch launch = read_tables(table, grads, rows, next_numbers, chunks, chunk_size, found.n_columns, found.n_numbers,
                              found.is_double);
  run(found.kernels.multi_tensor, chunks.size(0), &launch, table, stream);
}

// Makes the rows of a Launch, one for each tensor, of the numbers that live on the device, and what these are next. It
// changes nothing else, so nothing has happened where the launch after it fails.
void make_rows_cuda(Tensor table, Tensor group_of, Tensor options, Tensor rows, Tensor next_numbers, int64_t kernel,
                    int64_t stream) {
  const FoundKernels& found = kernels_of(kernel);
  for (const Tensor* one : {&table, &group_of, &options, &rows, &next_numbers}) check_device(table, *one);
  const int64_t n_tensors = table.size(0);
  check_table("table", table, ScalarType::Long, 2);
  check_table("group_of", group_of, ScalarType::Long, 1);
  check_table("options", options, ScalarType::Long, 3);
  check_table("rows", rows, found.is_double ? ScalarType::Double : ScalarType::Float, 2);
  check_table("next_numbers", next_numbers, ScalarType::Double, 2);
  STD_TORCH_CHECK(table.size(1) == kLineLength && group_of.numel() == n_tensors && options.size(1) == found.n_options &&
                      options.size(2) == 2 && rows.size(0) == n_tensors && rows.size(1) == found.n_columns &&
                      next_numbers.size(0) == n_tensors && next_numbers.size(1) == found.n_numbers,
                  "make_rows_cuda: the tables do not fit the rule and each other");
  RowsLaunch launch{static_cast<const Line*>(table.const_data_ptr()),
                    static_cast<const int64_t*>(group_of.const_data_ptr()),
                    static_cast<const Option*>(options.const_data_ptr()),
                    rows.mutable_data_ptr(),
                    static_cast<double*>(next_numbers.mutable_data_ptr()),
                    n_tensors,
                    found.has_grad};
  run(found.kernels.make_rows, (n_tensors + kThreads - 1) / kThreads, &launch, table, stream);
}

}  // namespace
}  // namespace xgrad

STABLE_TORCH_LIBRARY_FRAGMENT(xgrad_optim, library) {
  library.def("cuda_problem() -> str");
  library.def(
      "find_kernels_cuda(str rule, ScalarType param_dtype, ScalarType state_dtype, bool has_grad, "
      "bool has_optional, bool has_master_weights) -> int");
  library.def(
      "multi_tensor_cuda(Tensor table, Tensor? grads, Tensor rows, Tensor next_numbers, Tensor chunks, int chunk_size, "
      "int kernel, int stream) -> ()");
  library.def(
      "make_rows_cuda(Tensor table, Tensor group_of, Tensor options, Tensor(a!) rows, Tensor(b!) next_numbers, "
      "int kernel, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CompositeExplicitAutograd, library) {
  library.impl("cuda_problem", TORCH_BOX(&xgrad::cuda_problem));
  library.impl("find_kernels_cuda", TORCH_BOX(&xgrad::find_kernels_cuda));
  library.impl("multi_tensor_cuda", TORCH_BOX(&xgrad::multi_tensor_cuda));
  library.impl("make_rows_cuda", TORCH_BOX(&xgrad::make_rows_cuda));
}
