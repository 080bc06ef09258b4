// What the operators of all C++ back ends ask of their arguments.
#pragma once

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
inline Launch read_tables(const torch::stable::Tensor& addresses, const torch::stable::Tensor& numels,
                          const torch::stable::Tensor& row_of, const torch::stable::Tensor& rows,
                          const torch::stable::Tensor& chunks, int64_t chunk_size, int64_t n_columns, Dtype param_dtype) {
  using torch::headeronly::ScalarType;
  check_table("addresses", addresses, ScalarType::Long, 2);
  check_table("numels", numels, ScalarType::Long, 1);
  check_table("row_of", row_of, ScalarType::Int, 1);
  check_table("rows", rows, param_dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float, 2);
  check_table("chunks", chunks, ScalarType::Int, 2);
  const int64_t n_tensors = addresses.size(0);
  STD_TORCH_CHECK(addresses.size(1) == kNumSlots && numels.numel() == n_tensors && row_of.numel() == n_tensors &&
                      chunks.size(1) == 2,
                  "xgrad_optim: the tables disagree about the number of tensors or slots");
  STD_TORCH_CHECK(rows.size(1) == n_columns, "xgrad_optim: the rule has ", n_columns, " columns, the rows have ",
                  rows.size(1));
  STD_TORCH_CHECK(chunk_size > 0, "xgrad_optim: chunk_size must be positive, got ", chunk_size);
  return {static_cast<const int64_t*>(addresses.const_data_ptr()),
          static_cast<const int64_t*>(numels.const_data_ptr()),
          static_cast<const int32_t*>(row_of.const_data_ptr()),
          rows.const_data_ptr(),
          n_columns,
          static_cast<const Chunk*>(chunks.const_data_ptr()),
          chunk_size,
          false};
}

}  // namespace xgrad
