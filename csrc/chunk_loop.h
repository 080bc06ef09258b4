// The CPU driver: chunk -> load -> restore, update, predict -> store, a vector of elements at a time.
#pragma once

#include "element.h"
#include "launch.h"
#include "root.h"
#include "simd.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// So far ahead each buffer is fetched, so that memory works while the processor computes. From 640 bytes on, AMD's Zen 4
// is slower than without.
constexpr int64_t kPrefetchBytes = 512;

template <class Storage> XGRAD_HD Storage* at(int64_t address, int64_t index) {
  return reinterpret_cast<Storage*>(address) + index;
}

// Whether the dividing unit is what such elements wait for: every second vector then has a root multiplied.
#if defined(__AVX512F__)
template <class Param> constexpr bool kMultipliesRoots = std::is_same<Param, float>::value;
#else
template <class Param> constexpr bool kMultipliesRoots = false;
#endif

// So many vectors of each buffer run at once; two where all of them have 16 bits.
template <class Param, class State>
constexpr int kVectors = sizeof(State) < sizeof(Compute<Param>) || kMultipliesRoots<Param> ? 2 : 1;

template <class Param, class State> constexpr int64_t kStride = kVectors<Param, State> * kLanes<Compute<Param>>;

// Elements [begin, end) of one tensor, a multiple of the stride. Which buffers there are, the compiler knows.
template <class Rule, class Param, class State, int kFlags>
__attribute__((noinline)) void run_vectors(Line line, int64_t grad, int64_t begin, int64_t end,
                                           Hyper<Rule, Compute<Param>> hyper) {
  using T = Compute<Param>;
  using V = Vector<T>;
  constexpr Buffers kBuffers = buffers_of(kFlags);
  constexpr int kCount = kVectors<Param, State>;
  Element<Rule, V> elements[kCount];
  const auto load = [&](auto* address, auto field) {
    constexpr int64_t kBlockBytes = kStride<Param, State> * sizeof(*address);
    for (int64_t byte = 0; byte < kBlockBytes; byte += kVectorBytes) {
      __builtin_prefetch(reinterpret_cast<const char*>(address) + kPrefetchBytes + byte);
    }
    V block[kCount];
    load_block(address, block);
    if (sizeof(*address) == sizeof(T)) clean_block<Param>(block);  // a 16-bit NaN comes clean from memory
    for (int v = 0; v < kCount; ++v) field(elements[v]) = block[v];
  };
  const auto store = [&](auto* address, auto field) {
    V block[kCount];
    for (int v = 0; v < kCount; ++v) block[v] = field(elements[v]);
    store_block(address, block);
  };
  const auto param = [](auto& element) -> V& { return element.param; };
  const auto gradient = [](auto& element) -> V& { return element.grad; };
  const auto state = [](int s) { return [s](auto& element) -> V& { return element.state[s]; }; };
  const auto master_weights = [](auto& element) -> V& { return element.master_weights; };
  for (int64_t i = begin; i < end; i += kStride<Param, State>) {
    load(at<Param>(line.param, i), param);
    if (kBuffers.has_grad) load(at<Param>(grad, i), gradient);
    for (int s = 0; s < num_states<Rule>(kBuffers); ++s) load(at<State>(line.state[s], i), state(s));
    if constexpr (kBuffers.has_master_weights) load(at<T>(line.master_weights, i), master_weights);

    run_element<Rule, Param, State>(elements[0], hyper, kBuffers);
    if constexpr (kMultipliesRoots<Param>) {
      run_element<Rule, Param, State, MultipliedRoots>(elements[1], hyper, kBuffers);
    } else if constexpr (kCount == 2) {
      run_element<Rule, Param, State>(elements[1], hyper, kBuffers);
    }
    if constexpr (std::is_same<Param, BFloat16>::value) {
      for (auto& element : elements) element.param = Numeric<V>::template round<Param>(element.param);
    }

    store(at<Param>(line.param, i), param);
    if constexpr (kBuffers.has_master_weights) store(at<T>(line.master_weights, i), master_weights);
    if (!kBuffers.has_grad) continue;  // a swap changes no state, so it writes none
    for (int s = 0; s < num_states<Rule>(kBuffers); ++s) store(at<State>(line.state[s], i), state(s));
  }
}

template <class Rule, class Param>
using Loop = void (*)(Line line, int64_t grad, int64_t begin, int64_t end, Hyper<Rule, Compute<Param>> hyper);

// The loop for these buffers.
template <class Rule, class Param, class State, int kFlags = 0> Loop<Rule, Param> find_loop(Buffers buffers) {
  if constexpr (exists<Rule, Param, State>(buffers_of(kFlags))) {
    if (kFlags == flags_of(buffers)) return run_vectors<Rule, Param, State, kFlags>;
  }
  if constexpr (kFlags + 1 < kNumFlags) return find_loop<Rule, Param, State, kFlags + 1>(buffers);
  return nullptr;
}

// The last elements of a tensor, too few for a block, run in a block's worth of memory of every buffer.
template <class Rule, class Param, class State>
void run_tail(Loop<Rule, Param> loop, const Piece& piece, int64_t begin, const Hyper<Rule, Compute<Param>>& hyper) {
  constexpr int kBuffers = 3 + kMaxStates;
  constexpr int64_t kBlockBytes = kStride<Param, State> * sizeof(Compute<Param>);
  alignas(kVectorBytes) char memory[kBuffers][kBlockBytes] = {};
  int used = 0;
  const int64_t count = piece.offset + piece.count - begin;
  const auto copy_in = [&](int64_t address, int64_t size) -> int64_t {
    char* copy = memory[used++];
    if (address == 0) return 0;
    std::memcpy(copy, at<const char>(address, begin * size), count * size);
    return reinterpret_cast<int64_t>(copy);
  };
  const auto copy_back = [&](int64_t copy, int64_t address, int64_t size) {
    if (address != 0) std::memcpy(at<char>(address, begin * size), at<const char>(copy, 0), count * size);
  };
  const Line& line = piece.line;
  Line copies{};
  copies.param = copy_in(line.param, sizeof(Param));
  const int64_t grad_copy = copy_in(piece.grad, sizeof(Param));
  for (int i = 0; i < kMaxStates; ++i) copies.state[i] = copy_in(line.state[i], sizeof(State));
  copies.master_weights = copy_in(line.master_weights, sizeof(Compute<Param>));
  loop(copies, grad_copy, 0, kStride<Param, State>, hyper);
  copy_back(copies.param, line.param, sizeof(Param));
  copy_back(copies.master_weights, line.master_weights, sizeof(Compute<Param>));
  if (piece.grad == 0) return;
  for (int i = 0; i < kMaxStates; ++i) copy_back(copies.state[i], line.state[i], sizeof(State));
}

template <class Rule, class Param, class State>
void run_piece(const Piece& piece, const Hyper<Rule, Compute<Param>>& hyper) {
  constexpr int64_t kLength = kStride<Param, State>;
  const int64_t end = piece.offset + piece.count, whole = piece.offset + piece.count / kLength * kLength;
  const Buffers buffers{piece.grad != 0, piece.line.state[Rule::kNumStates] != 0, piece.line.master_weights != 0};
  const Loop<Rule, Param> loop = find_loop<Rule, Param, State>(buffers);
  loop(piece.line, piece.grad, piece.offset, whole, hyper);
  if (whole != end) run_tail<Rule, Param, State>(loop, piece, whole, hyper);
}

template <class Rule, class Param, class State> void run_chunks(const Launch& launch, int64_t begin, int64_t end) {
  using S = Compute<Param>;
  for (int64_t c = begin; c < end; ++c) {
    const Piece piece(launch, c);
    S columns[Hyper<Rule, S>::kNumColumns];
    const S* row = static_cast<const S*>(launch.rows) + piece.row;
    for (S& column : columns) column = clean<Param>(*row++);
    const Hyper<Rule, S> hyper(columns);
    if (hyper.is_skipped != 0) continue;
    run_piece<Rule, Param, State>(piece, hyper);
    if (piece.is_first && piece.line.numbers != 0) {
      const double* next = launch.next_numbers + piece.line.row * launch.n_numbers;
      std::memcpy(reinterpret_cast<double*>(piece.line.numbers), next, launch.n_numbers * sizeof(double));
    }
  }
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
