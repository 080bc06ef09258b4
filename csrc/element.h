// What a launch does to one element, or to a SIMD vector of elements, whatever the rule: restore, decay, update,
// predict. No loads, no stores; the drivers of all C++ back ends call run_element between theirs.
#pragma once

#include "rules.h"

namespace xgrad {
inline namespace XGRAD_ISA {

template <class S> struct StepHyper {
  S is_skipped, grad_factor, weight_decay, decay_factor, step_size, shift, shift_prev;
};

// One row by name: the columns of `Rule.columns` (xgrad_optim/rule.py); `prev` undoes the last prediction.
template <class Rule, class S>
struct Hyper : StepHyper<S>, Rule::template AccumulateHyper<S>, Rule::template DirectionHyper<S> {
  typename Rule::template DirectionHyper<S> prev;
  bool restores, scales, decays, shrinks, predicts;  // compared here, not for each element

  XGRAD_HD explicit Hyper(const S* row) {
    read(row, static_cast<StepHyper<S>&>(*this));
    read(row, static_cast<typename Rule::template AccumulateHyper<S>&>(*this));
    read(row, static_cast<typename Rule::template DirectionHyper<S>&>(*this));
    read(row, prev);
    restores = this->shift_prev != 0;  // 0 * delta may be NaN, which must not reach the weights
    scales = this->grad_factor != 1;
    decays = this->weight_decay != 0;
    shrinks = this->decay_factor != 1;
    predicts = this->shift != 0;
  }

  // An empty struct has a size of 1 and no columns.
  template <class Part> XGRAD_HD static constexpr int columns_of() { return sizeof(Part) / sizeof(S); }

  static constexpr int kNumColumns = columns_of<StepHyper<S>>() +
                                     columns_of<typename Rule::template AccumulateHyper<S>>() +
                                     2 * columns_of<typename Rule::template DirectionHyper<S>>();

  // The state's own: the step count, the mode, the shift, and what direction read for it.
  static constexpr int kNumNumbers = 3 + columns_of<typename Rule::template DirectionHyper<S>>();

 private:
  template <class Part> XGRAD_HD static void read(const S*& row, Part& part) {
    constexpr int kColumns = columns_of<Part>();
    if constexpr (kColumns != 0) {
      S columns[kColumns];  // one by one: a GPU would copy memory of unknown alignment by bytes
      for (S& column : columns) column = *row++;
      std::memcpy(&part, columns, sizeof(part));
    }
  }
};

// The buffers that a launch has; the same for all its elements.
struct Buffers {
  bool has_grad;  // else it is a swap
  bool has_optional;  // the rule's
  bool has_master_weights;
};

// As one number: a template takes no struct before C++20.
constexpr int kNumFlags = 8;
XGRAD_HD constexpr int flags_of(Buffers buffers) {
  return buffers.has_grad + 2 * buffers.has_optional + 4 * buffers.has_master_weights;
}
XGRAD_HD constexpr Buffers buffers_of(int flags) { return {(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0}; }

// Whether any launch has them: master weights lie beside state of their own width.
template <class Rule, class Param, class State> XGRAD_HD constexpr bool exists(Buffers buffers) {
  return (!buffers.has_optional || Rule::kHasOptional) &&
         (!buffers.has_master_weights || sizeof(State) == sizeof(Compute<Param>));
}

template <class Rule, class T> struct Element {
  T param, grad, state[Rule::kNumStates + Rule::kHasOptional], master_weights;
};

// How many states a launch with these buffers has.
template <class Rule> XGRAD_HD constexpr int num_states(Buffers buffers) {
  return Rule::kNumStates + (Rule::kHasOptional && buffers.has_optional);
}

template <class Number, class Rule, class T, class DirectionHyper>
XGRAD_HD T direction_of(const Element<Rule, T>& element, const DirectionHyper& hyper, Buffers buffers) {
  return Rule::template direction<Number>(element.state, hyper, buffers.has_optional);
}

// delta as predictions use it: rows that join with zeros for their state must not be moved by 0 / 0.
template <class Rule, class T> XGRAD_HD T predicted(T delta, const Element<Rule, T>& element) {
  const T momentum = element.state[0];
  return momentum == 0 ? momentum : delta;
}

// theta = R(theta_hat + d): exact, because theta_hat was made from a theta for which it is.
template <class Rule, class Param, class Number, class T, class Hyper>
XGRAD_HD T restore(const Element<Rule, T>& element, const Hyper& hyper, Buffers buffers) {
  T displacement{};
  if (hyper.restores) {
    displacement = hyper.shift_prev * predicted(direction_of<Number>(element, hyper.prev, buffers), element);
  }
  if (!buffers.has_master_weights) {
    if (!hyper.restores) return element.param;
    return Number::template round<Param>(element.param + Number::template round<Param>(displacement));
  }
  // The master stands where the parameter still holds what it made of it; a foreign write there counts.
  T expected = element.master_weights, edited = element.param;
  if (hyper.restores) {
    expected = expected - displacement;
    edited = edited + displacement;
  }
  return Number::template round<Param>(expected) == element.param ? element.master_weights : edited;
}

// Weight decay, the penalty's in the gradient; and the state advanced with that and rounded to what will be stored:
// delta is taken of it, so that it can be computed again.
template <class Rule, class State, class T, class Hyper>
XGRAD_HD T decay_and_accumulate(T theta, Element<Rule, T>& element, const Hyper& hyper, Buffers buffers) {
  T& grad = element.grad;
  if (hyper.scales) grad = hyper.grad_factor * grad;
  if (hyper.decays) grad = grad + hyper.weight_decay * theta;
  Rule::accumulate(grad, element.state, hyper, buffers.has_optional);
  for (int s = 0; s < num_states<Rule>(buffers); ++s) {
    element.state[s] = Numeric<T>::template round<State>(element.state[s]);
  }
  return hyper.shrinks ? theta * hyper.decay_factor : theta;
}

// theta_hat = R(theta - d), from the theta next to it that survives the round trip.
template <class Rule, class Param, class T, class Hyper>
XGRAD_HD T predict(T theta, T delta, const Element<Rule, T>& element, const Hyper& hyper, Buffers buffers) {
  using Number = Numeric<T>;
  if (!hyper.predicts) return theta;
  const T displacement = hyper.shift * predicted(delta, element);
  if (buffers.has_master_weights) return theta - displacement;
  const T d = Number::template round<Param>(displacement);
  const T there = Number::template round<Param>(theta - d);
  const T and_back = Number::template round<Param>(there + d);
  return and_back - d;
}

// Param and State are the storage types; the element's numbers go in and come out as the storage holds them, but for
// `param`, which the store rounds. Undo takes the roots of the prediction that is undone.
template <class Rule, class Param, class State, template <class> class Undo = Numeric, class T, class Hyper>
XGRAD_HD void run_element(Element<Rule, T>& element, const Hyper& hyper, Buffers buffers) {
  T theta = restore<Rule, Param, Undo<T>>(element, hyper, buffers), delta{};
  if (buffers.has_grad) {
    theta = decay_and_accumulate<Rule, State>(theta, element, hyper, buffers);
    delta = direction_of<Numeric<T>>(element, hyper, buffers);  // once for update and prediction: a division and a root
    T moved = delta;
    if constexpr (Rule::kHasUpdate) moved = Rule::update(element.grad, element.state, hyper, buffers.has_optional);
    theta = theta - hyper.step_size * moved;
    if (!buffers.has_master_weights) theta = Numeric<T>::template round<Param>(theta);
  } else if (hyper.predicts) {
    delta = direction_of<Numeric<T>>(element, hyper, buffers);
  }
  element.master_weights = theta;
  element.param = predict<Rule, Param>(theta, delta, element, hyper, buffers);
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
