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

int64_t count_columns(RuleId rule) {
  switch (rule) {
    case RuleId::kSgdm:
      return Hyper<Sgdm, float>::kNumColumns;
    case RuleId::kAdam:
      return Hyper<Adam, float>::kNumColumns;
    case RuleId::kAdaBelief:
      return Hyper<AdaBelief, float>::kNumColumns;
    case RuleId::kAdaM3:
      return Hyper<AdaM3, float>::kNumColumns;
  }
  return 0;
}

Kernel find_kernel(RuleId rule, Dtype param_dtype, Dtype state_dtype) {
  switch (rule) {
    case RuleId::kSgdm:
      return find_rules_kernel<Sgdm>(param_dtype, state_dtype);
    case RuleId::kAdam:
      return find_rules_kernel<Adam>(param_dtype, state_dtype);
    case RuleId::kAdaBelief:
      return find_rules_kernel<AdaBelief>(param_dtype, state_dtype);
    case RuleId::kAdaM3:
      return find_rules_kernel<AdaM3>(param_dtype, state_dtype);
  }
  return nullptr;
}

}  // namespace XGRAD_ISA
}  // namespace xgrad
