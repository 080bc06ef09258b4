// The CPU kernels of one instruction set: compiled once for each, with XGRAD_ISA naming it. bindings.cpp chooses at run
// time.
#include "chunk_loop.h"
#include "multi_tensor_cpu.h"  // second: it reopens the namespace that the first one makes inline

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

Kernel find_kernel(const char* rule, Dtype param_dtype, Dtype state_dtype) {
  return with_rule(rule, [=](auto found) { return find_rules_kernel<decltype(found)>(param_dtype, state_dtype); },
                   [] { return Kernel{nullptr}; });
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
