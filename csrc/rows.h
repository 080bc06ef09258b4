// The rows of a launch whose numbers live on its device, in float64: what xgrad_optim/numbers.py computes on the host,
// in the same order of operations.
#pragma once

#include <type_traits>

#include "element.h"
#include "launch.h"

namespace xgrad {
inline namespace XGRAD_ISA {

// One param group as the device reads it: a number's bits, or the address of a tensor that holds it.
enum OptionKind : int64_t { kBits, kFloat64At, kFloat32At, kBFloat16At, kFloat16At };

struct Option {
  int64_t kind, bits;

  XGRAD_HD double value() const {
    switch (kind) {
      case kFloat64At:
        return at<double>();
      case kFloat32At:
        return at<float>();
      case kBFloat16At:
        return at<BFloat16>();
      case kFloat16At:
        return at<Float16>();
      default:
        return bit_cast<double>(bits);
    }
  }

 private:
  template <class Storage> XGRAD_HD double at() const {
    return Numeric<Compute<Storage>>::load(reinterpret_cast<const Storage*>(bits));
  }
};

// The options of every rule, after the rule's own (`COMMON_OPTIONS` of xgrad_optim/rule.py).
struct CommonOptions {
  double weight_decay, is_decoupled, maximize, prediction_steps, grad_scale, found_inf, to_predicted;
};

// The state's own numbers (`number_keys`): the step count, and all that it takes to undo the prediction.
template <class Rule> struct Numbers {
  double step, predicted, shift;
  typename Rule::template DirectionHyper<double> direction;
};

// A row before it is rounded; a Hyper (element.h) whose columns can be written.
template <class Rule>
struct Row : StepHyper<double>, Rule::template AccumulateHyper<double>, Rule::template DirectionHyper<double> {
  typename Rule::template DirectionHyper<double> prev;

  XGRAD_HD typename Rule::template DirectionHyper<double>& direction() { return *this; }
};

// What a launch reads to make its rows, one for each tensor, and where it writes them.
struct RowsLaunch {
  const Line* table;        // [n_tensors]
  const int64_t* group_of;  // [n_tensors]
  const Option* options;    // [n_groups, options of the rule and common ones]
  void* rows;               // [n_tensors, n_columns] in the compute type
  double* next_numbers;     // [n_tensors, n_numbers]
  int64_t n_tensors;
  bool is_step;
};

template <class Options> XGRAD_HD void read_options(const Option* option, Options& options) {
  constexpr int kCount = sizeof(Options) / sizeof(double);
  double values[kCount];
  for (double& value : values) value = (option++)->value();
  std::memcpy(&options, values, sizeof(options));
}

// The coefficients of a step, or of a swap, and what the numbers are after it.
template <class Rule>
XGRAD_HD void make_row(bool is_step, const typename Rule::Options& options, const CommonOptions& common,
                       const Numbers<Rule>& numbers, Row<Rule>& row, Numbers<Rule>& next) {
  const bool was_predicted = numbers.predicted != 0;
  next = numbers;
  row.prev = numbers.direction;
  row.is_skipped = common.found_inf;
  if (is_step) {
    next.step = numbers.step + 1;
    Rule::coefficients(options, next.step, row);
    const bool is_decoupled = common.is_decoupled != 0;
    row.grad_factor = (common.maximize != 0 ? -1.0 : 1.0) / common.grad_scale;
    row.weight_decay = is_decoupled ? 0 : common.weight_decay;
    row.decay_factor = is_decoupled ? 1 - options.lr * common.weight_decay : 1;
    row.shift = common.prediction_steps * row.step_size;
    row.shift_prev = was_predicted ? numbers.shift : 0;
    next.predicted = 1;
    next.shift = row.shift;
    next.direction = row.direction();
  } else {
    const bool to_predicted = common.to_predicted != 0;
    // What is in place stays untouched: with a shift of 0 the master would take theta_hat for a foreign write.
    if (to_predicted == was_predicted) row.is_skipped = 1;
    row.direction() = numbers.direction;
    row.shift = to_predicted && !was_predicted ? numbers.shift : 0;
    row.shift_prev = !to_predicted && was_predicted ? numbers.shift : 0;
    next.predicted = to_predicted;
  }
}

// The row as the launch reads it, each number rounded once.
template <class Rule, class S> XGRAD_HD void write_row(const Row<Rule>& row, S* columns) {
  const auto write = [&](const auto& part) {
    constexpr int kCount = Hyper<Rule, double>::template columns_of<std::decay_t<decltype(part)>>();
    if constexpr (kCount != 0) {
      double values[kCount];
      std::memcpy(values, &part, sizeof(values));
      for (const double value : values) *columns++ = static_cast<S>(value);
    }
  };
  write(static_cast<const StepHyper<double>&>(row));
  write(static_cast<const typename Rule::template AccumulateHyper<double>&>(row));
  write(static_cast<const typename Rule::template DirectionHyper<double>&>(row));
  write(row.prev);
}

// A row, and what its numbers will be, of a param group's options (the rule's, then the common ones) and the numbers at
// an address. Only reads those, so that nothing has happened yet where the launch after it can't run.
template <class Rule, class S>
XGRAD_HD void make_row_at(bool is_step, const Option* option, const void* numbers_at, S* columns, double* next_at) {
  constexpr int kNumbers = Hyper<Rule, S>::kNumNumbers;
  typename Rule::Options options;
  CommonOptions common;
  read_options(option, options);
  read_options(option + sizeof(options) / sizeof(double), common);
  Numbers<Rule> numbers{}, next{};
  Row<Rule> row{};
  std::memcpy(&numbers, numbers_at, kNumbers * sizeof(double));
  make_row(is_step, options, common, numbers, row, next);
  std::memcpy(next_at, &next, kNumbers * sizeof(double));
  write_row(row, columns);
}

template <class Rule> constexpr int kNumOptions = (sizeof(typename Rule::Options) + sizeof(CommonOptions)) / sizeof(double);

}  // namespace XGRAD_ISA
}  // namespace xgrad
