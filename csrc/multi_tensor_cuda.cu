// The CUDA driver of one rule: a chunk per block, load -> restore, update, predict -> store, 16 bytes at a time.
// Compiled once for each rule, with XGRAD_RULE naming it, and with -fmad=false: each operation rounds once.
#include <cuda_runtime.h>

#include "multi_tensor_cuda.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// Several such blocks fit a multiprocessor at once, and a full chunk is many rounds of one.
constexpr int kThreads = 256;

// kWidth numbers as they lie in memory, moved by one instruction.
template <class Storage, int kWidth> struct alignas(kWidth * sizeof(Storage)) Pack {
  Storage values[kWidth];
};

template <class Storage, int kWidth> __device__ __forceinline__ Pack<Storage, kWidth>* at(int64_t address, int offset) {
  auto* pack = reinterpret_cast<Pack<Storage, kWidth>*>(reinterpret_cast<Storage*>(address) + offset);
  __builtin_assume(__isGlobal(pack));  // an address out of a table could be shared memory's as well
  return pack;
}

// What one kernel is made for. The flags are Buffers as one number: a template takes no struct before C++20.
template <class Rule_, class Param_, class State_, int kFlags> struct Variant {
  using Rule = Rule_;
  using Param = Param_;
  using State = State_;
  using T = Compute<Param>;
  static constexpr Buffers kBuffers{(kFlags & 1) != 0, (kFlags & 2) != 0, (kFlags & 4) != 0, (kFlags & 8) != 0};
  static constexpr int kWidth = 16 / (sizeof(State) > sizeof(Param) ? sizeof(State) : sizeof(Param));
};

constexpr int flags_of(Buffers buffers) {
  return buffers.has_grad + 2 * buffers.has_max_exp_avg_sq + 4 * buffers.has_master_weights + 8 * buffers.trusts_master;
}

// kWidth elements of every buffer, `offset` elements on from the addresses by slot.
template <class V, int kWidth>
__device__ __forceinline__ void run_pack(const int64_t (&home)[kNumSlots], int offset,
                                         const Hyper<typename V::Rule, typename V::T>& hyper) {
  using Rule = typename V::Rule;
  using Param = typename V::Param;
  using State = typename V::State;
  using T = typename V::T;
  using Number = Numeric<T>;
  constexpr Buffers kBuffers = V::kBuffers;
  Pack<Param, kWidth> param{}, grad{};
  Pack<State, kWidth> state[Rule::kNumStates], max_exp_avg_sq{};
  Pack<T, kWidth> master_weights{};
  if (!kBuffers.trusts_master) param = *at<Param, kWidth>(home[kParam], offset);
  if (kBuffers.has_grad) grad = *at<Param, kWidth>(home[kGrad], offset);
  for (int s = 0; s < Rule::kNumStates; ++s) state[s] = *at<State, kWidth>(home[kState0 + s], offset);
  if (kBuffers.has_max_exp_avg_sq) max_exp_avg_sq = *at<State, kWidth>(home[kMaxExpAvgSq], offset);
  if (kBuffers.has_master_weights) master_weights = *at<T, kWidth>(home[kMasterWeights], offset);

  for (int i = 0; i < kWidth; ++i) {
    Element<Rule, T> element;
    element.param = Number::load(&param.values[i]);
    element.grad = Number::load(&grad.values[i]);
    for (int s = 0; s < Rule::kNumStates; ++s) element.state[s] = Number::load(&state[s].values[i]);
    element.max_exp_avg_sq = Number::load(&max_exp_avg_sq.values[i]);
    element.master_weights = master_weights.values[i];
    run_element<Rule, Param, State>(element, hyper, kBuffers);
    Number::store(&param.values[i], element.param);
    for (int s = 0; s < Rule::kNumStates; ++s) Number::store(&state[s].values[i], element.state[s]);
    Number::store(&max_exp_avg_sq.values[i], element.max_exp_avg_sq);
    master_weights.values[i] = element.master_weights;
  }

  *at<Param, kWidth>(home[kParam], offset) = param;
  // A swap that trusts the master weights has no cause to change them.
  constexpr bool kWritesMaster = kBuffers.has_grad || !kBuffers.trusts_master;
  if (kBuffers.has_master_weights && kWritesMaster) *at<T, kWidth>(home[kMasterWeights], offset) = master_weights;
  if constexpr (kBuffers.has_grad) {  // a swap changes no state, so it writes none
    for (int s = 0; s < Rule::kNumStates; ++s) *at<State, kWidth>(home[kState0 + s], offset) = state[s];
    if (kBuffers.has_max_exp_avg_sq) *at<State, kWidth>(home[kMaxExpAvgSq], offset) = max_exp_avg_sq;
  }
}

// The addresses of a chunk's elements by slot; 0 for a buffer that the launch does not have.
template <class V> struct Home {
  static constexpr int64_t kParamSize = sizeof(typename V::Param), kStateSize = sizeof(typename V::State),
                           kMasterSize = sizeof(typename V::T);
  int64_t addresses[kNumSlots];

  __device__ explicit Home(const Piece& piece) {
    constexpr int64_t kSizes[kNumSlots] = {kParamSize, kParamSize, kStateSize, kStateSize, kStateSize, kMasterSize};
    for (int slot = 0; slot < kNumSlots; ++slot) {
      const int64_t address = piece.addresses[slot];
      addresses[slot] = address == 0 ? 0 : address + piece.offset * kSizes[slot];
    }
  }

  // Whether every buffer can be moved in packs.
  __device__ bool is_aligned() const {
    const int64_t params = addresses[kParam] | addresses[kGrad];
    const int64_t states = addresses[kState0] | addresses[kState1] | addresses[kMaxExpAvgSq];
    return params % (V::kWidth * kParamSize) == 0 && states % (V::kWidth * kStateSize) == 0 &&
           addresses[kMasterWeights] % (V::kWidth * kMasterSize) == 0;
  }
};

// The 1 lets a thread have the registers that it needs: with more, ptxas spills to reach a rounder number of blocks.
template <class V> __global__ void __launch_bounds__(kThreads, 1) multi_tensor_kernel(const Launch launch) {
  using T = typename V::T;
  const Piece piece(launch, blockIdx.x);
  if (piece.addresses[kParam] == 0) return;
  const Hyper<typename V::Rule, T> hyper(static_cast<const T*>(launch.rows) + piece.row);
  if (hyper.is_skipped != 0) return;
  const Home<V> home(piece);
  const int count = static_cast<int>(piece.count), thread = static_cast<int>(threadIdx.x);
  const int packed = home.is_aligned() ? count / V::kWidth * V::kWidth : 0;
#pragma unroll 1  // a pack's own elements are enough to hide the latency
  for (int i = thread * V::kWidth; i < packed; i += kThreads * V::kWidth) {
    run_pack<V, V::kWidth>(home.addresses, i, hyper);
  }
#pragma unroll 1
  for (int i = packed + thread; i < count; i += kThreads) run_pack<V, 1>(home.addresses, i, hyper);
}

using KernelFunction = void (*)(Launch);

// The kernel for these buffers, which are flags at run time still. Master weights lie beside state of their own width.
template <class Rule, class Param, class State, int kFlags = 0> KernelFunction find_variant(Buffers buffers) {
  constexpr bool has_max = (kFlags & 2) != 0, has_master = (kFlags & 4) != 0, trusts_master = (kFlags & 8) != 0;
  constexpr bool exists = (!has_max || Rule::kSecondMoment >= 0) &&
                          (!has_master || sizeof(State) == sizeof(Compute<Param>)) && (!trusts_master || has_master);
  if constexpr (exists) {
    if (kFlags == flags_of(buffers)) return multi_tensor_kernel<Variant<Rule, Param, State, kFlags>>;
  }
  if constexpr (kFlags < 15) return find_variant<Rule, Param, State, kFlags + 1>(buffers);
  return nullptr;
}

template <class Rule> KernelFunction find_kernel(Dtype param_dtype, Dtype state_dtype, Buffers buffers) {
  const bool is_wide = state_dtype == Dtype::kFloat32;
  if (param_dtype == Dtype::kFloat64 && state_dtype == param_dtype) return find_variant<Rule, double, double>(buffers);
  if (param_dtype == Dtype::kFloat32 && is_wide) return find_variant<Rule, float, float>(buffers);
  if (param_dtype == Dtype::kBFloat16 && is_wide) return find_variant<Rule, BFloat16, float>(buffers);
  if (param_dtype == Dtype::kFloat16 && is_wide) return find_variant<Rule, Float16, float>(buffers);
  if (state_dtype != param_dtype) return nullptr;
  if (param_dtype == Dtype::kBFloat16) return find_variant<Rule, BFloat16, BFloat16>(buffers);
  return find_variant<Rule, Float16, Float16>(buffers);
}

template <class Rule>
const char* run_on_device(const Launch& launch, int64_t n_chunks, Dtype param_dtype, Dtype state_dtype, Buffers buffers,
                          void* stream) {
  const KernelFunction kernel = find_kernel<Rule>(param_dtype, state_dtype, buffers);
  if (kernel == nullptr) return "there is no kernel for these dtypes and buffers";
  if (n_chunks == 0) return nullptr;  // CUDA has no empty grid
  void* arguments[] = {const_cast<Launch*>(&launch)};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(n_chunks)), dim3(kThreads),
                       arguments, 0, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* run_on_device<XGRAD_RULE>(const Launch&, int64_t, Dtype, Dtype, Buffers, void*);

}  // namespace XGRAD_ISA
}  // namespace xgrad
