// The CPU kernels of one instruction set: compiled once for each, with XGRAD_ISA naming it. bindings.cpp chooses at run
// time.
#include "chunk_loop.h"
#include "rows.h"
#include "multi_tensor_cpu.h"  // last: it reopens the namespace that the first one makes inline

namespace xgrad {
inline namespace XGRAD_ISA {

template <class Rule> Kernel find_rules_kernel(Dtype param_dtype, Dtype state_dtype) {
  const bool is_wide = state_dtype == Dtype::kFloat32;
  if (param_dtype == Dtype::kFloat64 && state_dtype == Dtype::kFloat64) return run_chunks<Rule, double, double>;
  if (param_dtype == Dtype::kFloat32 && is_wide) return run_chunks<Rule, float, float>;
  if (param_dtype == Dtype::kBFloat16 && is_wide) return run_chunks<Rule, BFloat16, float>;
  if (param_dtype == Dtype::kFloat16 && is_wide) return run_chunks<Rule, Float16, float>;
  if (param_dtype == Dtype::kBFloat16 && state_dtype == param_dtype) return run_chunks<Rule, BFloat16, BFloat16>;
  if (param_dtype == Dtype::kFloat16 && state_dtype == param_dtype) return run_chunks<Rule, Float16, Float16>;
  return nullptr;
}

int64_t count_columns(const char* rule) {
  return with_rule(rule, [](auto found) -> int64_t { return Hyper<decltype(found), float>::kNumColumns; },
                   [] { return int64_t{0}; });
}

int64_t count_numbers(const char* rule) {
  return with_rule(rule, [](auto found) -> int64_t { return Hyper<decltype(found), float>::kNumNumbers; },
                   [] { return int64_t{0}; });
}

int64_t count_options(const char* rule) {
  return with_rule(rule, [](auto found) -> int64_t { return kNumOptions<decltype(found)>; }, [] { return int64_t{0}; });
}

template <class Rule, class S>
void make_row_of(bool is_step, const int64_t* options, const void* numbers, void* row, double* next_numbers) {
  const Option* option = reinterpret_cast<const Option*>(options);
  make_row_at<Rule>(is_step, option, numbers, static_cast<S*>(row), next_numbers);
}

RowMaker find_row_maker(const char* rule, bool is_double) {
  const auto found = [=](auto rule) {
    using Rule = decltype(rule);
    return is_double ? RowMaker{make_row_of<Rule, double>} : RowMaker{make_row_of<Rule, float>};
  };
  return with_rule(rule, found, [] { return RowMaker{nullptr}; });
}

Kernel find_kernel(const char* rule, Dtype param_dtype, Dtype state_dtype) {
  return with_rule(rule, [=](auto found) { return find_rules_kernel<decltype(found)>(param_dtype, state_dtype); },
                   [] { return Kernel{nullptr}; });
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
