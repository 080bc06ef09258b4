// What the operators of all C++ back ends ask of their arguments.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"

namespace xgrad {

inline Dtype dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "xgrad_optim: expected a real floating-point dtype, got ", static_cast<int>(type));
  }
}

inline void check_table(const char* name, const torch::stable::Tensor& table, torch::headeronly::ScalarType type,
                        int64_t dim) {
  STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == type && table.dim() == dim, "xgrad_optim: ", name,
                  " must be a contiguous tensor of ", dim, " dimensions and dtype ", static_cast<int>(type), ", got ",
                  table.dim(), " dimensions and dtype ", static_cast<int>(table.scalar_type()));
}

// The tables of a Launch that every back end reads, checked against each other as far as their shapes tell.
inline Launch read_tables(const torch::stable::Tensor& table, const std::optional<torch::stable::Tensor>& grads,
                          const torch::stable::Tensor& rows, const torch::stable::Tensor& next_numbers,
                          const torch::stable::Tensor& chunks, int64_t chunk_size, int64_t n_columns, int64_t n_numbers,
                          bool is_double) {
  using torch::headeronly::ScalarType;
  check_table("table", table, ScalarType::Long, 2);
  check_table("rows", rows, is_double ? ScalarType::Double : ScalarType::Float, 2);
  check_table("next_numbers", next_numbers, ScalarType::Double, 2);
  check_table("chunks", chunks, ScalarType::Int, 2);
  const int64_t n_tensors = table.size(0);
  if (grads) check_table("grads", *grads, ScalarType::Long, 1);
  STD_TORCH_CHECK(table.size(1) == kLineLength && chunks.size(1) == 2 && (!grads || grads->numel() == n_tensors),
                  "xgrad_optim: the tables disagree about the number of tensors or their lines' length");
  STD_TORCH_CHECK(rows.size(1) == n_columns && next_numbers.size(1) == n_numbers &&
                      next_numbers.size(0) == rows.size(0),
                  "xgrad_optim: the rule has ", n_columns, " columns and ", n_numbers, " numbers, the rows have ",
                  rows.size(1), " and ", next_numbers.size(1));
  STD_TORCH_CHECK(chunk_size > 0, "xgrad_optim: chunk_size must be positive, got ", chunk_size);
  return {static_cast<const Line*>(table.const_data_ptr()),
          grads ? static_cast<const int64_t*>(grads->const_data_ptr()) : nullptr,
          rows.const_data_ptr(),
          n_columns,
          static_cast<const double*>(next_numbers.const_data_ptr()),
          n_numbers,
          static_cast<const Chunk*>(chunks.const_data_ptr()),
          chunk_size};
}

}  // namespace xgrad
