// Each rule's math, once for every C++ back end: functions of one element, or of a SIMD vector of elements, in the
// order of operations of the numeric contract. No loads, no stores, nothing of torch.
//
// T is a number or a vector of numbers, S the number. Compile with -ffp-contract=off (CUDA: -fmad=false).
//
// A rule declares its options and the columns of its rows (`options`, `accumulate_columns` and `direction_columns` of
// xgrad_optim/rule.py, in order)
//   coefficients(options, step, row) fills the rule's columns, and step_size, for the step of this number, from 1
//   accumulate(grad, state, hyper, has_optional)   advance the state with this gradient
//   direction<Number>(state, hyper, has_optional)  delta of predictions, and of updates but where there is
//   update(grad, state, hyper, has_optional)       delta of updates alone, which a prediction never undoes
// Number takes roots, as Numeric<T> does. The first state is the momentum, which has no displacement where it is 0. An
// optional buffer is the last state; `has_optional` tells whether a launch has it, and is known to the compiler.
#pragma once

#include "numeric.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// What a rule has beside its states: `optional` and `update` of xgrad_optim/rule.py.
struct RuleParts {
  static constexpr bool kHasOptional = false, kHasUpdate = false;
};

// SGD with momentum. A momentum of 0 starts the buffer afresh.
struct Sgdm : RuleParts {
  static constexpr int kMomentumBuffer = 0, kNumStates = 1;

  struct Options {
    double lr, momentum, dampening;
  };
  template <class S> struct AccumulateHyper {
    S momentum, one_minus_dampening;
  };
  template <class S> struct DirectionHyper {};

  template <class Row> XGRAD_HD static void coefficients(const Options& options, double step, Row& row) {
    row.step_size = options.lr;
    row.momentum = step > 1 ? options.momentum : 0;  // the first step has no buffer yet
    row.one_minus_dampening = 1 - options.dampening;
  }

  template <class T, class Hyper>
  XGRAD_HD static void accumulate(T grad, T (&state)[kNumStates], const Hyper& hyper, bool) {
    T& momentum_buffer = state[kMomentumBuffer];
    if (hyper.momentum == 0) {
      momentum_buffer = grad;
    } else {
      momentum_buffer = hyper.momentum * momentum_buffer + hyper.one_minus_dampening * grad;
    }
  }

  template <class Number, class T, class Hyper>
  XGRAD_HD static T direction(const T (&state)[kNumStates], const Hyper&, bool) {
    return state[kMomentumBuffer];
  }
};

// What the Adam family shares: two moments, the first of which is a running mean of the gradient. With amsgrad the
// running maximum of the second stands in for it.
struct TwoMoments : RuleParts {
  static constexpr int kExpAvg = 0, kExpAvgSq = 1, kNumStates = 2, kMaxExpAvgSq = kNumStates;
  static constexpr bool kHasOptional = true;

  struct Options {
    double lr, beta1, beta2, eps;
  };

  template <class Row> XGRAD_HD static void coefficients(const Options& options, double step, Row& row) {
    const int64_t t = static_cast<int64_t>(step);
    row.step_size = options.lr / (1 - power(options.beta1, t));
    row.one_minus_beta1 = 1 - options.beta1;
    row.beta2 = options.beta2;
    row.one_minus_beta2 = 1 - options.beta2;
    row.rsqrt_bias_correction2 = 1 / Numeric<double>::square_root(1 - power(options.beta2, t));
    row.eps = options.eps;
  }

  template <class T> XGRAD_HD static void keep_largest(T (&state)[kNumStates + 1], bool is_amsgrad) {
    if (is_amsgrad) state[kMaxExpAvgSq] = maximum(state[kMaxExpAvgSq], state[kExpAvgSq]);
  }

  template <class T> XGRAD_HD static T second_moment(const T (&state)[kNumStates + 1], bool is_amsgrad) {
    return state[is_amsgrad ? kMaxExpAvgSq : kExpAvgSq];
  }
};

struct Adam : TwoMoments {
  template <class S> struct AccumulateHyper {
    S one_minus_beta1, beta2, one_minus_beta2;
  };
  template <class S> struct DirectionHyper {
    S rsqrt_bias_correction2, eps;
  };

  template <class T, class Hyper>
  XGRAD_HD static void accumulate(T grad, T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    T &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = exp_avg + hyper.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = hyper.beta2 * exp_avg_sq + hyper.one_minus_beta2 * (grad * grad);
    keep_largest(state, is_amsgrad);
  }

  template <class Number, class T, class Hyper>
  XGRAD_HD static T denominator(const T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    return Number::square_root(second_moment(state, is_amsgrad)) * hyper.rsqrt_bias_correction2 + hyper.eps;
  }

  template <class Number, class T, class Hyper>
  XGRAD_HD static T direction(const T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    return state[kExpAvg] / denominator<Number>(state, hyper, is_amsgrad);
  }
};

// AdaBelief (Zhuang et al. 2020, Algorithm 2): the second moment is of the surprise, grad - exp_avg.
struct AdaBelief : Adam {
  template <class T, class Hyper>
  XGRAD_HD static void accumulate(T grad, T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    T &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = exp_avg + hyper.one_minus_beta1 * (grad - exp_avg);
    const T surprise = grad - exp_avg;
    exp_avg_sq = hyper.beta2 * exp_avg_sq + hyper.one_minus_beta2 * (surprise * surprise) + hyper.eps;
    keep_largest(state, is_amsgrad);
  }
};

// AdaM3 (arXiv 2106.11514): the second moment is of the momentum.
struct AdaM3 : TwoMoments {
  template <class S> struct AccumulateHyper {
    S one_minus_beta1, beta2, one_minus_beta2, eps;
  };
  template <class S> struct DirectionHyper {
    S rsqrt_bias_correction2;
  };

  template <class T, class Hyper>
  XGRAD_HD static void accumulate(T grad, T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    T &exp_avg = state[kExpAvg], &exp_avg_sq = state[kExpAvgSq];
    exp_avg = exp_avg + hyper.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = hyper.beta2 * exp_avg_sq + hyper.one_minus_beta2 * (exp_avg * exp_avg) + hyper.eps;
    keep_largest(state, is_amsgrad);
  }

  template <class Number, class T, class Hyper>
  XGRAD_HD static T direction(const T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    const T denom = Number::square_root(second_moment(state, is_amsgrad)) * hyper.rsqrt_bias_correction2;
    const T one = T{} + 1;
    return state[kExpAvg] / (state[kExpAvg] == 0 ? one : denom);  // zero momentum stays zero, over a zero too
  }
};

// AdaPlus (arXiv 2309.01966): AdaBelief whose update has Nesterov's numerator.
struct AdaPlus : AdaBelief {
  static constexpr bool kHasUpdate = true;

  template <class T, class Hyper>
  XGRAD_HD static T update(T grad, const T (&state)[kNumStates + 1], const Hyper& hyper, bool is_amsgrad) {
    const T ahead = hyper.one_minus_beta1 * (grad - state[kExpAvg]) + state[kExpAvg];
    return ahead / denominator<Numeric<T>>(state, hyper, is_amsgrad);
  }
};

// RMSprop: the quotient goes into the buffer, with a momentum of 0, too, so that the direction needs no gradient.
struct Rmsprop : RuleParts {
  static constexpr int kMomentumBuffer = 0, kSquareAvg = 1, kNumStates = 2, kGradAvg = kNumStates;
  static constexpr bool kHasOptional = true;

  struct Options {
    double lr, alpha, eps, momentum;
  };
  template <class S> struct AccumulateHyper {
    S momentum, alpha, one_minus_alpha, eps;
  };
  template <class S> struct DirectionHyper {};

  template <class Row> XGRAD_HD static void coefficients(const Options& options, double, Row& row) {
    row.step_size = options.lr;
    row.momentum = options.momentum > 0 ? options.momentum : 0;
    row.alpha = options.alpha;
    row.one_minus_alpha = 1 - options.alpha;
    row.eps = options.eps;
  }

  template <class T, class Hyper>
  XGRAD_HD static void accumulate(T grad, T (&state)[kNumStates + 1], const Hyper& hyper, bool is_centered) {
    T &momentum_buffer = state[kMomentumBuffer], &square_avg = state[kSquareAvg], &grad_avg = state[kGradAvg];
    square_avg = hyper.alpha * square_avg + hyper.one_minus_alpha * (grad * grad);
    T variance = square_avg;
    if (is_centered) {
      grad_avg = grad_avg + hyper.one_minus_alpha * (grad - grad_avg);
      variance = maximum(square_avg - grad_avg * grad_avg, T{});
    }
    const T quotient = grad / (Numeric<T>::square_root(variance) + hyper.eps);
    if (hyper.momentum == 0) {
      momentum_buffer = quotient;
    } else {
      momentum_buffer = hyper.momentum * momentum_buffer + quotient;
    }
  }

  template <class Number, class T, class Hyper>
  XGRAD_HD static T direction(const T (&state)[kNumStates + 1], const Hyper&, bool) {
    return state[kMomentumBuffer];
  }
};

// Every rule, and its name in Python: all that is made of rules, for any back end, is made of this list.
#define XGRAD_FOR_EACH_RULE(X) \
  X(Sgdm, "sgdm")              \
  X(Adam, "adam")              \
  X(AdaBelief, "adabelief")    \
  X(AdaM3, "adam3")            \
  X(AdaPlus, "adaplus")        \
  X(Rmsprop, "rmsprop")

// Calls `visit` with an object of the type of the rule with this name, or with none of them: `otherwise`.
template <class Visit, class Otherwise>
auto with_rule(const char* name, Visit visit, Otherwise otherwise) -> decltype(otherwise()) {
#define XGRAD_VISIT(Rule, rule_name) \
  if (std::strcmp(name, rule_name) == 0) return visit(Rule{});
  XGRAD_FOR_EACH_RULE(XGRAD_VISIT)
#undef XGRAD_VISIT
  return otherwise();
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
