// Lists of tensors to the table of their addresses, each tensor checked; device independent.
#pragma once

#include <torch/csrc/stable/library.h>

namespace xgrad {

// The boxed operator
//   fill_addresses(Tensor[] tensors, int[] slots, ScalarType[] dtypes, Tensor numels, Tensor(a!) addresses) -> int
// `tensors` holds the parameters, then as many tensors for each further slot of `slots`. A parameter whose tensors are
// one flat range each, in one order of elements, of the expected dtypes, on one device and of numels[i] numbers, gets
// its addresses; any other gets zeros and is counted in the result. Complex tensors count as twice as many real numbers.
void fill_addresses(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

// The same operator where some tensor's elements are not yet what its memory says: touches nothing, returns -1.
void refuse_lazy_tensors(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

}  // namespace xgrad
