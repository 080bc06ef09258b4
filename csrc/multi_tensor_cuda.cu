// The CUDA driver of one rule: a chunk per block, load -> restore, update, predict -> store, 16 bytes at a time; and
// before it, where the numbers live on the device, a thread per tensor for its row.
// Compiled once for each rule, with XGRAD_RULE naming it, and with -fmad=false: each operation rounds once.
#include <cuda_runtime.h>

#include "multi_tensor_cuda.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// kWidth numbers as they lie in memory, moved by one instruction.
template <class Storage, int kWidth> struct alignas(kWidth * sizeof(Storage)) Pack {
  Storage values[kWidth];
};

template <class Storage, int kWidth> __device__ __forceinline__ Pack<Storage, kWidth>* at(int64_t address, int offset) {
  auto* pack = reinterpret_cast<Pack<Storage, kWidth>*>(reinterpret_cast<Storage*>(address) + offset);
  __builtin_assume(__isGlobal(pack));  // an address out of a table could be shared memory's as well
  return pack;
}

// What one kernel is made for.
template <class Rule_, class Param_, class State_, int kFlags> struct Variant {
  using Rule = Rule_;
  using Param = Param_;
  using State = State_;
  using T = Compute<Param>;
  static constexpr Buffers kBuffers = buffers_of(kFlags);
  static constexpr int kWidth = 16 / (sizeof(State) > sizeof(Param) ? sizeof(State) : sizeof(Param));
};

// kWidth elements of every buffer, `offset` elements on from where they begin.
template <class V, int kWidth>
__device__ __forceinline__ void run_pack(const Line& line, int64_t grad_address, int offset,
                                         const Hyper<typename V::Rule, typename V::T>& hyper) {
  using Rule = typename V::Rule;
  using Param = typename V::Param;
  using State = typename V::State;
  using T = typename V::T;
  using Number = Numeric<T>;
  constexpr Buffers kBuffers = V::kBuffers;
  Pack<Param, kWidth> param = *at<Param, kWidth>(line.param, offset), grad{};
  constexpr int kNumStates = num_states<Rule>(kBuffers);
  Pack<State, kWidth> state[kNumStates];
  Pack<T, kWidth> master_weights{};
  if (kBuffers.has_grad) grad = *at<Param, kWidth>(grad_address, offset);
  for (int s = 0; s < kNumStates; ++s) state[s] = *at<State, kWidth>(line.state[s], offset);
  if (kBuffers.has_master_weights) master_weights = *at<T, kWidth>(line.master_weights, offset);

  for (int i = 0; i < kWidth; ++i) {
    Element<Rule, T> element;
    element.param = Number::load(&param.values[i]);
    element.grad = Number::load(&grad.values[i]);
    for (int s = 0; s < kNumStates; ++s) element.state[s] = Number::load(&state[s].values[i]);
    element.master_weights = master_weights.values[i];
    run_element<Rule, Param, State>(element, hyper, kBuffers);
    Number::store(&param.values[i], element.param);
    for (int s = 0; s < kNumStates; ++s) Number::store(&state[s].values[i], element.state[s]);
    master_weights.values[i] = element.master_weights;
  }

  *at<Param, kWidth>(line.param, offset) = param;
  if (kBuffers.has_master_weights) *at<T, kWidth>(line.master_weights, offset) = master_weights;
  if constexpr (kBuffers.has_grad) {  // a swap changes no state, so it writes none
    for (int s = 0; s < kNumStates; ++s) *at<State, kWidth>(line.state[s], offset) = state[s];
  }
}

// Moves a piece's addresses on to its first element.
template <class V> __device__ __forceinline__ void go_to_start(Piece& piece) {
  const auto advance = [&](int64_t& address, int64_t size) { address += address == 0 ? 0 : piece.offset * size; };
  advance(piece.line.param, sizeof(typename V::Param));
  advance(piece.grad, sizeof(typename V::Param));
  for (int64_t& address : piece.line.state) advance(address, sizeof(typename V::State));
  advance(piece.line.master_weights, sizeof(typename V::T));
}

// Whether every buffer can be moved in packs.
template <class V> __device__ __forceinline__ bool is_aligned(const Piece& piece) {
  int64_t states = 0;
  for (const int64_t address : piece.line.state) states |= address;
  return (piece.line.param | piece.grad) % (V::kWidth * sizeof(typename V::Param)) == 0 &&
         states % (V::kWidth * sizeof(typename V::State)) == 0 &&
         piece.line.master_weights % (V::kWidth * sizeof(typename V::T)) == 0;
}

// The step count and the prediction, as they are once the launch has run; a thread each, in the tensor's first block.
template <class V> __device__ __forceinline__ void write_numbers(const Launch& launch, const Piece& piece, int thread) {
  constexpr int kNumbers = Hyper<typename V::Rule, typename V::T>::kNumNumbers;
  if (!piece.is_first || piece.line.numbers == 0 || thread >= kNumbers) return;
  at<double, 1>(piece.line.numbers, thread)->values[0] = launch.next_numbers[piece.line.row * kNumbers + thread];
}

// The 1 lets a thread have the registers that it needs: with more, ptxas spills to reach a rounder number of blocks.
template <class V> __global__ void __launch_bounds__(kThreads, 1) multi_tensor_kernel(const Launch launch) {
  using T = typename V::T;
  Piece piece(launch, blockIdx.x);
  const Hyper<typename V::Rule, T> hyper(static_cast<const T*>(launch.rows) + piece.row);
  if (hyper.is_skipped != 0) return;
  const int count = static_cast<int>(piece.count), thread = static_cast<int>(threadIdx.x);
  write_numbers<V>(launch, piece, thread);
  go_to_start<V>(piece);
  const int packed = is_aligned<V>(piece) ? count / V::kWidth * V::kWidth : 0;
#pragma unroll 1  // a pack's own elements are enough to hide the latency
  for (int i = thread * V::kWidth; i < packed; i += kThreads * V::kWidth) {
    run_pack<V, V::kWidth>(piece.line, piece.grad, i, hyper);
  }
#pragma unroll 1
  for (int i = packed + thread; i < count; i += kThreads) run_pack<V, 1>(piece.line, piece.grad, i, hyper);
}

// A thread per tensor: its row, and what its numbers will be.
template <class Rule, class T> __global__ void make_rows_kernel(const RowsLaunch launch) {
  const int64_t tensor = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (tensor >= launch.n_tensors) return;
  using Columns = Hyper<Rule, T>;
  make_row_at<Rule>(launch.is_step, launch.options + launch.group_of[tensor] * kNumOptions<Rule>,
                    reinterpret_cast<const double*>(launch.table[tensor].numbers),
                    static_cast<T*>(launch.rows) + tensor * Columns::kNumColumns,
                    launch.next_numbers + tensor * Columns::kNumNumbers);
}

using KernelFunction = void (*)(Launch);

// The kernel for these buffers, which are flags at run time still.
template <class Rule, class Param, class State, int kFlags = 0> KernelFunction find_variant(Buffers buffers) {
  if constexpr (exists<Rule, Param, State>(buffers_of(kFlags))) {
    if (kFlags == flags_of(buffers)) return multi_tensor_kernel<Variant<Rule, Param, State, kFlags>>;
  }
  if constexpr (kFlags + 1 < kNumFlags) return find_variant<Rule, Param, State, kFlags + 1>(buffers);
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

template <class Rule> DeviceKernels find_kernels(Dtype param_dtype, Dtype state_dtype, Buffers buffers) {
  void (*const make_rows)(RowsLaunch) =
      param_dtype == Dtype::kFloat64 ? make_rows_kernel<Rule, double> : make_rows_kernel<Rule, float>;
  const KernelFunction multi_tensor = find_kernel<Rule>(param_dtype, state_dtype, buffers);
  return {reinterpret_cast<const void*>(multi_tensor), reinterpret_cast<const void*>(make_rows)};
}

template DeviceKernels find_kernels<XGRAD_RULE>(Dtype, Dtype, Buffers);

}  // namespace XGRAD_ISA
}  // namespace xgrad
