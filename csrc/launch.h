// The C++ view of a Launch (xgrad_optim/launch.py): plain structs over its tables, nothing that depends on a device.
#pragma once

#include <cstdint>

#include "numeric.h"

namespace xgrad {

constexpr int kMaxStates = 3;  // state buffers of a tensor, the optional one last

// One line of a launch's table: where the buffers of a tensor are, 0 for one that it does not have, and what else a
// kernel needs to know of it. 64 bytes, so that a GPU reads a line in one piece.
struct Line {
  int64_t param;
  int64_t state[kMaxStates];
  int64_t master_weights;
  int64_t numel;    // in real numbers
  int64_t row;      // which row of coefficients
  int64_t numbers;  // where the state's own numbers are, for the kernel to write; 0 where somebody else writes them
};
constexpr int kLineLength = sizeof(Line) / sizeof(int64_t);

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16 };

// Elements [index * chunk_size, (index + 1) * chunk_size) of one tensor, as far as it goes. An empty tensor has one
// chunk as well: whoever runs chunk 0 writes the tensor's numbers.
struct Chunk {
  int32_t tensor;
  int32_t index;
};

struct Launch {
  const Line* table;           // [n_tensors]
  const int64_t* grads;        // [n_tensors], addresses; nullptr for a swap
  const void* rows;            // [n_rows, n_columns] in the compute type
  int64_t n_columns;
  const double* next_numbers;  // [n_rows, n_numbers]: what the state's numbers are after the launch
  int64_t n_numbers;
  const Chunk* chunks;         // [n_chunks]
  int64_t chunk_size;
};

// One chunk of a launch: its tensor, which of its elements, and their coefficients.
struct Piece {
  Line line;
  int64_t grad;
  int64_t offset, count;
  int64_t row;
  bool is_first;

  XGRAD_HD Piece(const Launch& launch, int64_t chunk) {
    const Chunk found = launch.chunks[chunk];
    line = launch.table[found.tensor];
    grad = launch.grads == nullptr ? 0 : launch.grads[found.tensor];
    offset = found.index * launch.chunk_size;
    const int64_t rest = line.numel - offset;
    count = rest < launch.chunk_size ? rest : launch.chunk_size;
    row = line.row * launch.n_columns;
    is_first = found.index == 0;
  }
};

// Runs chunks [begin, end) of a launch; which rule, dtypes and instructions is what tells kernels apart.
using Kernel = void (*)(const Launch& launch, int64_t begin, int64_t end);

}  // namespace xgrad
