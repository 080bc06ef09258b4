// The CPU driver: chunk -> load -> restore, update, predict -> store, a vector of elements at a time.
#pragma once

#include "element.h"
#include "launch.h"
#include "simd.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// Where a vector of elements lies in memory; nullptr for a buffer that the launch does not have.
template <class Rule, class Param, class State> struct Place {
  using T = Compute<Param>;
  using Number = Numeric<Vector<T>>;

  Param* param;
  const Param* grad;
  State* state[Rule::kNumStates];
  State* max_exp_avg_sq;
  T* master_weights;
  bool trusts_master;

  // `offset` elements on from the addresses of one tensor, by slot.
  XGRAD_HD Place(const int64_t* addresses, int64_t offset, bool trusts) : trusts_master(trusts) {
    param = at<Param>(addresses[kParam], offset);
    grad = at<const Param>(addresses[kGrad], offset);
    for (int i = 0; i < Rule::kNumStates; ++i) state[i] = at<State>(addresses[kState0 + i], offset);
    max_exp_avg_sq = at<State>(addresses[kMaxExpAvgSq], offset);
    master_weights = at<T>(addresses[kMasterWeights], offset);
  }

  template <class Storage> XGRAD_HD static Storage* at(int64_t address, int64_t offset) {
    return address == 0 ? nullptr : reinterpret_cast<Storage*>(address) + offset;
  }

  XGRAD_HD Buffers buffers() const {
    return {grad != nullptr, max_exp_avg_sq != nullptr, master_weights != nullptr, trusts_master};
  }

  XGRAD_HD Element<Rule, Vector<T>> load() const {
    Element<Rule, Vector<T>> element{};
    if (!trusts_master) element.param = Number::load(param);
    if (grad) element.grad = Number::load(grad);
    for (int i = 0; i < Rule::kNumStates; ++i) element.state[i] = Number::load(state[i]);
    if (max_exp_avg_sq) element.max_exp_avg_sq = Number::load(max_exp_avg_sq);
    if (master_weights) element.master_weights = Number::load(master_weights);
    return element;
  }

  // A swap changes no state, so it writes none.
  XGRAD_HD void store(const Element<Rule, Vector<T>>& element) const {
    Number::store(param, element.param);
    if (master_weights) Number::store(master_weights, element.master_weights);
    if (!grad) return;
    for (int i = 0; i < Rule::kNumStates; ++i) Number::store(state[i], element.state[i]);
    if (max_exp_avg_sq) Number::store(max_exp_avg_sq, element.max_exp_avg_sq);
  }
};

template <class Rule, class Param, class State>
XGRAD_HD void run_vector(const Place<Rule, Param, State>& place, const Hyper<Rule, Compute<Param>>& hyper) {
  auto element = place.load();
  run_element<Rule, Param, State>(element, hyper, place.buffers());
  place.store(element);
}

// The last elements of a tensor, too few for a vector, run in a vector's worth of memory of every buffer.
template <class Rule, class Param, class State>
void run_tail(const int64_t* addresses, int64_t offset, int64_t count, const Hyper<Rule, Compute<Param>>& hyper,
              bool trusts_master) {
  constexpr int64_t kParamSize = sizeof(Param), kStateSize = sizeof(State), kMasterSize = sizeof(Compute<Param>);
  constexpr int64_t kSizes[kNumSlots] = {kParamSize, kParamSize, kStateSize, kStateSize, kStateSize, kMasterSize};
  alignas(kVectorBytes) char memory[kNumSlots][kVectorBytes] = {};
  int64_t copies[kNumSlots] = {};
  for (int slot = 0; slot < kNumSlots; ++slot) {
    if (addresses[slot] == 0) continue;
    const void* home = reinterpret_cast<const void*>(addresses[slot] + offset * kSizes[slot]);
    std::memcpy(memory[slot], home, count * kSizes[slot]);
    copies[slot] = reinterpret_cast<int64_t>(memory[slot]);
  }
  run_vector(Place<Rule, Param, State>(copies, 0, trusts_master), hyper);
  for (int slot = 0; slot < kNumSlots; ++slot) {
    const bool is_state = kState0 <= slot && slot <= kMaxExpAvgSq;
    const bool is_written = slot != kGrad && !(is_state && addresses[kGrad] == 0);
    if (addresses[slot] == 0 || !is_written) continue;
    void* home = reinterpret_cast<void*>(addresses[slot] + offset * kSizes[slot]);
    std::memcpy(home, memory[slot], count * kSizes[slot]);
  }
}

template <class Rule, class Param, class State>
void run_chunk(const int64_t* addresses, int64_t offset, int64_t count, const Hyper<Rule, Compute<Param>>& hyper,
               bool trusts_master) {
  constexpr int64_t kLength = kLanes<Compute<Param>>;
  const int64_t whole = count / kLength * kLength;
  for (int64_t i = 0; i < whole; i += kLength) {
    run_vector(Place<Rule, Param, State>(addresses, offset + i, trusts_master), hyper);
  }
  if (whole < count) run_tail<Rule, Param, State>(addresses, offset + whole, count - whole, hyper, trusts_master);
}

template <class Rule, class Param, class State> void run_chunks(const Launch& launch, int64_t begin, int64_t end) {
  using S = Compute<Param>;
  for (int64_t c = begin; c < end; ++c) {
    const Piece piece(launch, c);
    if (piece.addresses[kParam] == 0) continue;
    const Hyper<Rule, S> hyper(static_cast<const S*>(launch.rows) + piece.row);
    if (hyper.is_skipped != 0) continue;
    const bool trusts_master = launch.trusts_master && piece.addresses[kMasterWeights] != 0;
    run_chunk<Rule, Param, State>(piece.addresses, piece.offset, piece.count, hyper, trusts_master);
  }
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
