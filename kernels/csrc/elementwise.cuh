// The grid of elementwise kernels: rows of equal items, an item a thread; a block takes several short
// rows, or a long one in several turns.
#pragma once

#include "launch.cuh"
#include "vector.cuh"

namespace blip3o {

/// The most of a block.
inline constexpr int kElementwiseThreads = 256;

struct Items {
  int tokens, rows, per_row, most;

  Items() = default;
  Items(blip3o_shape shape, int64_t per_row, int most_threads = kElementwiseThreads)
      : tokens(static_cast<int>(shape.tokens)),
        rows(static_cast<int>(shape.batch * shape.tokens)),
        per_row(static_cast<int>(per_row)),
        most(most_threads) {}

  /// Turns of one row are equal. Rows fill whole warps, or leave as few threads without one as can be.
  dim3 threads() const {
    constexpr int kWarp = 32;
    const int turns = (per_row + most - 1) / most;
    const int columns = (per_row + turns - 1) / turns;
    int best = 1;
    for (int count = 2; count * columns <= most; ++count) {
      const auto idle = [&](int of) { return (kWarp - of * columns % kWarp) % kWarp; };
      if (idle(count) * best <= idle(best) * count) best = count;
    }
    return dim3(columns, best);
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
