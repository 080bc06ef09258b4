// The addresses of a Launch's tensors, followed from step to step; device independent.
#pragma once

#include <torch/csrc/stable/library.h>

namespace xgrad {

// The boxed operators
//
//   bind_tensors(Tensor[] tensors, int[] slots, ScalarType[] dtypes, Tensor numels) -> int
//     Takes hold of the tensors that live as long as a launch. `tensors` holds the parameters, then as many for each
//     further slot of `slots`. Where a parameter and its buffers are one flat range each, in one order of elements, of
//     the expected dtypes, on one device and of numels[i] numbers, a kernel can run them; other ones are refused.
//     Complex tensors count as twice as many real numbers. Returns a name for the binding, > 0, or kLazy.
//
//   read_addresses(int binding, Tensor[] grads, int first, int count, Tensor(a!) addresses) -> int
//     Writes the lines of addresses of `count` tensors from `first` on, zeros where one is refused: at binding, or
//     because its gradient (where there are any) lies otherwise. Returns how many are, or kChanged, or kLazy; the
//     table is then of no use.
//
//   release_tensors(int binding) -> ()
void bind_tensors(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
void read_addresses(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
void release_tensors(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

// The first two where some tensor's elements are not yet what its memory says: they touch nothing and return kLazy.
void bind_lazy_tensors(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);
void read_lazy_addresses(StableIValue* stack, uint64_t num_args, uint64_t num_outputs);

enum : int64_t {
  kLazy = -1,
  kChanged = -2,  // a bound tensor has other memory, another layout or another dtype than when it was bound
};

}  // namespace xgrad
