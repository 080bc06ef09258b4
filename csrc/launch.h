// The C++ view of a Launch (xgrad_optim/launch.py): plain structs over its tables, nothing that depends on a device.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace xgrad {

// Columns of the address table. A slot that the launch does not use holds 0, and so does the whole line of a tensor
// that the kernel must pass over.
enum Slot : int { kParam, kGrad, kState0, kState1, kMaxExpAvgSq, kMasterWeights, kNumSlots };

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Elements [index * chunk_size, (index + 1) * chunk_size) of one tensor, as far as it goes.
struct Chunk {
  int32_t tensor;
  int32_t index;
};

struct Launch {
  const int64_t* addresses;  // [n_tensors, kNumSlots]
  const int64_t* numels;     // [n_tensors], in real numbers
  const int32_t* row_of;     // [n_tensors]
  const void* rows;          // [n_rows, n_columns] in the compute type
  int64_t n_columns;
  const Chunk* chunks;  // [n_chunks]
  int64_t chunk_size;
  bool trusts_master;
};

// One chunk of a launch: the addresses of its tensor by slot, which of its elements, and their coefficients.
struct Piece {
  const int64_t* addresses;
  int64_t offset, count;
  int64_t row;

  XGRAD_HD Piece(const Launch& launch, int64_t chunk) {
    const Chunk found = launch.chunks[chunk];
    addresses = launch.addresses + int64_t{found.tensor} * kNumSlots;
    offset = found.index * launch.chunk_size;
    const int64_t rest = launch.numels[found.tensor] - offset;
    count = rest < launch.chunk_size ? rest : launch.chunk_size;
    row = launch.row_of[found.tensor] * launch.n_columns;
  }
};

// Runs chunks [begin, end) of a launch; which rule, dtypes and instructions is what tells kernels apart.
using Kernel = void (*)(const Launch& launch, int64_t begin, int64_t end);

}  // namespace xgrad
