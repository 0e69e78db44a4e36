// The grid of elementwise kernels: rows of equal items, an item a thread, several short rows a block.
#pragma once

#include "launch.cuh"
#include "vector.cuh"

namespace blip3o {

inline constexpr int kElementwiseThreads = 256;

struct Items {
  int tokens, rows, per_row;

  Items() = default;
  Items(blip3o_shape shape, int64_t per_row)
      : tokens(static_cast<int>(shape.tokens)),
        rows(static_cast<int>(shape.batch * shape.tokens)),
        per_row(static_cast<int>(per_row)) {}

  dim3 threads() const {
    const int columns = per_row < kElementwiseThreads ? per_row : kElementwiseThreads;
    return dim3(columns, kElementwiseThreads / columns);
  }

  int64_t blocks() const {
    if (rows == 0 || per_row == 0) return 0;
    const int64_t rows_per_block = threads().y;
    return (rows + rows_per_block - 1) / rows_per_block;
  }

  __device__ __forceinline__ int row() const { return blockIdx.x * blockDim.y + threadIdx.y; }
};

/// Whether rows and the elements of one can be counted in an int.
inline bool countable(blip3o_shape shape, int64_t elements_per_row) {
  return shape.batch >= 0 && shape.tokens >= 0 && shape.width >= 0 &&
         elements_per_row <= INT_MAX - kElementwiseThreads &&
         (shape.tokens == 0 || shape.batch <= (INT_MAX - kElementwiseThreads) / shape.tokens);
}

}  // namespace blip3o
