// The operators of the CUDA library, registered through LibTorch's stable ABI: one build serves every torch from the
// one it targets on, and none of torch's CUDA headers is needed.
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

constexpr int64_t kMaxChunks = (int64_t{1} << 31) - 1;  // of a grid

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

// Steps or swaps every tensor of a Launch, except those whose addresses are 0, on the given stream of the device that
// the tables are on. What the tables hold is not checked: that would take a copy to the host.
void multi_tensor_cuda(Tensor addresses, Tensor numels, Tensor row_of, Tensor rows, Tensor chunks, int64_t chunk_size,
                       bool has_grad, bool has_max_exp_avg_sq, bool has_master_weights, bool trusts_master,
                       std::string rule, ScalarType param_dtype, ScalarType state_dtype, int64_t stream) {
  static const std::string problem = cuda_problem();
  STD_TORCH_CHECK(problem.empty(), "multi_tensor_cuda: ", problem);
  for (const Tensor* table : {&addresses, &numels, &row_of, &rows, &chunks}) {
    STD_TORCH_CHECK(table->is_cuda() && table->get_device_index() == addresses.get_device_index(),
                    "multi_tensor_cuda: all tables must be on one CUDA device");
  }
  const int64_t n_columns = with_rule(
      rule.c_str(), [](auto found) -> int64_t { return Hyper<decltype(found), float>::kNumColumns; },
      [] { return int64_t{0}; });
  STD_TORCH_CHECK(n_columns > 0, "multi_tensor_cuda: there is no rule \"", rule, "\"");
  const Dtype param = dtype_of(param_dtype), state = dtype_of(state_dtype);
  const Launch launch = read_tables(addresses, numels, row_of, rows, chunks, chunk_size, n_columns, param);
  const int64_t n_chunks = chunks.size(0);
  STD_TORCH_CHECK(n_chunks <= kMaxChunks && chunk_size <= kMaxChunks, "multi_tensor_cuda: ", n_chunks, " chunks of ",
                  chunk_size, " elements exceed a grid");
  const Buffers buffers{has_grad, has_max_exp_avg_sq, has_master_weights, trusts_master};
  const torch::stable::accelerator::DeviceGuard guard(addresses.get_device_index());
  const auto run = [&](auto found) {
    return run_on_device<decltype(found)>(launch, n_chunks, param, state, buffers, reinterpret_cast<void*>(stream));
  };
  const char* error = with_rule(rule.c_str(), run, [] { return "no such rule"; });
  STD_TORCH_CHECK(error == nullptr, "multi_tensor_cuda: ", error);
}

}  // namespace
}  // namespace xgrad

STABLE_TORCH_LIBRARY_FRAGMENT(xgrad_optim, library) {
  library.def("cuda_problem() -> str");
  library.def(
      "multi_tensor_cuda(Tensor addresses, Tensor numels, Tensor row_of, Tensor rows, Tensor chunks, int chunk_size, "
      "bool has_grad, bool has_max_exp_avg_sq, bool has_master_weights, bool trusts_master, str rule, "
      "ScalarType param_dtype, ScalarType state_dtype, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(xgrad_optim, CompositeExplicitAutograd, library) {
  library.impl("cuda_problem", TORCH_BOX(&xgrad::cuda_problem));
  library.impl("multi_tensor_cuda", TORCH_BOX(&xgrad::multi_tensor_cuda));
}
