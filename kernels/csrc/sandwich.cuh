// What sandwich_norm and sandwich_join share: who computes what, and the parameters of a norm.
//
// A *unit* is a group of threads (whole warps) that owns some consecutive rows of one sample. Every
// thread owns the same kElements columns of each of them, in packs of 16 bytes of the activation, so
// parameters are read once a unit and gradients over rows need no exchange. Which thread adds what
// depends on the width alone: a row's result does not depend on the batch around it.
#pragma once

#include "double_norm.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace blip3o {

inline constexpr int kElements = 8;
inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = BLIP3O_MAX_WIDTH / kElements;
inline constexpr int kMaxWarps = kMaxThreads / kWarp;

/// Rows that a unit works on at a time: their loads are in flight together.
inline constexpr int kRows = 2;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

/// The rows of one unit: `token` and the following ones of sample `batch`, up to `end`.
struct Unit {
  int batch, token, end;

  __device__ __forceinline__ bool has(int row) const { return token + row < end; }
};

/// The cut of [B, N] into units; blocks are (group, units_per_block) threads.
struct Units {
  int tokens, rows, per_sample, group, per_block, count;

  Units() = default;
  Units(blip3o_shape shape, int rows_per_unit)
      : tokens(static_cast<int>(shape.tokens)),
        rows(rows_per_unit),
        per_sample(ceil_div(tokens, rows)),
        group(ceil_div(static_cast<int>(shape.width), kElements * kWarp) * kWarp),
        per_block(group < 128 ? 128 / group : 1),
        count(static_cast<int>(shape.batch) * per_sample) {}

  int blocks() const { return ceil_div(count, per_block); }
  dim3 threads() const { return dim3(group, per_block); }

  __device__ __forceinline__ int index() const { return blockIdx.x * per_block + threadIdx.y; }

  /// This thread's unit; one past the last has no rows, and reads the parameters of sample 0.
  __device__ __forceinline__ Unit here() const {
    const int unit = index();
    if (unit >= count) return {0, 0, 0};
    const int batch = unit / per_sample;
    const int token = (unit - batch * per_sample) * rows;
    return {batch, token, min(token + rows, tokens)};
  }

  /// Where a row of the unit lies in a contiguous [B, N].
  __device__ __forceinline__ int64_t row(const Unit& unit, int row) const {
    return static_cast<int64_t>(unit.batch) * tokens + unit.token + row;
  }
};

/// One thread's share of a row, in fp32.
struct Share {
  float at[kElements];

  __device__ __forceinline__ float& operator[](int i) { return at[i]; }
  __device__ __forceinline__ float operator[](int i) const { return at[i]; }
};

/// The columns that a thread owns in rows of T and in parameters beside them.
template <typename T, bool kAligned>
struct Columns {
  static constexpr int kPacks = kElements / kPack<T>;
  int group, width;

  __device__ __forceinline__ int first(int pack) const {
    return (static_cast<int>(threadIdx.x) + pack * group) * kPack<T>;
  }

  /// `absent` past the width, and everywhere unless the row is `present`.
  template <typename S>
  __device__ __forceinline__ Share load(const S* row, bool present = true,
                                        float absent = 0.f) const {
    Share out;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      float part[kPack<T>];
      load_pack(part, row, first(pack), present, absent);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) out[pack * kPack<T> + i] = part[i];
    }
    return out;
  }

  /// A row of parameters, `absent` where there is none.
  template <typename S>
  __device__ __forceinline__ Share load_or(const S* row, float absent) const {
    return load(row, row != nullptr, absent);
  }

  template <typename S>
  __device__ __forceinline__ void store(S* row, const Share& share) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int column = first(pack);
      float part[kPack<T>];
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) part[i] = share[pack * kPack<T> + i];
      if constexpr (kAligned) {
        if (column < width) blip3o::store(row + column, part);
      } else {
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          if (column + i < width) row[column + i] = narrow<S>(part[i]);
        }
      }
    }
  }

 private:
  template <typename S>
  __device__ __forceinline__ void load_pack(float (&out)[kPack<T>], const S* row, int column,
                                            bool present, float absent) const {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) out[i] = absent;
    if constexpr (kAligned) {
      if (present && column < width) blip3o::load(out, row + column);
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (present && column + i < width) out[i] = widen(row[column + i]);
      }
    }
  }
};

/// Adds each of `values` over the threads of a unit, in an order fixed by the width.
template <int kCount>
__device__ __forceinline__ void sum_over_unit(float (&values)[kCount], int group) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(~0u, values[i], offset);
  }
  if (group == kWarp) return;
  __shared__ float of_warp[kMaxWarps][kCount];
  const int warps = group / kWarp;
  const int first = static_cast<int>(threadIdx.y) * warps;
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_warp[first + threadIdx.x / kWarp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = of_warp[first][i];
#pragma unroll 1
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += of_warp[first + warp][i];
  }
}

/// A modulation; all null where there is none, which is the identity.
template <typename P>
struct Modulation {
  const P *w1, *w2, *shift, *scale;
  int64_t shift_stride, scale_stride;

  Modulation() = default;
  explicit Modulation(const blip3o_modulation* from)
      : w1(from ? static_cast<const P*>(from->w1) : nullptr),
        w2(from ? static_cast<const P*>(from->w2) : nullptr),
        shift(from ? static_cast<const P*>(from->shift) : nullptr),
        scale(from ? static_cast<const P*>(from->scale) : nullptr),
        shift_stride(from ? from->shift_stride : 0),
        scale_stride(from ? from->scale_stride : 0) {}

  __device__ __forceinline__ bool present() const { return w1 != nullptr; }
  __device__ __forceinline__ const P* shift_row(int64_t batch) const {
    return shift + batch * shift_stride;
  }
  __device__ __forceinline__ const P* scale_row(int64_t batch) const {
    return scale + batch * scale_stride;
  }
};

/// gain, square and shift of double_norm.cuh for a thread's columns, with s folded in.
struct Weights {
  Share gain, square, shift;
};

/// Of the identity unless the modulation is `present`. A backward does not use the shift.
template <bool kShift, typename P, typename C>
__device__ __forceinline__ Weights load_weights(const Modulation<P>& modulation, bool present,
                                                const P* layer_scale, int64_t batch, float eps,
                                                const C& columns) {
  Weights out;
  if constexpr (kShift) out.shift = columns.load(modulation.shift_row(batch), present);
  const Share w1 = columns.load(modulation.w1, present, 1.f);
  const Share w2 = columns.load(modulation.w2, present, 1.f);
  const Share scale = columns.load(modulation.scale_row(batch), present);
  const Share s = columns.load_or(layer_scale, 1.f);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    out.gain[i] = w1[i] * w2[i] * (1.f + scale[i]) * s[i];
    out.square[i] = (w1[i] * w1[i] + eps) * (s[i] * s[i]);
  }
  return out;
}

/// x := norm(s x), the rows of a unit.
__device__ __forceinline__ void norm_rows(Share (&x)[kRows], const Weights& weights,
                                          const Units& units, float inverse_width, float eps) {
  float sums[kRows] = {};
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[row] += weights.square[i] * x[row][i] * x[row][i];
  }
  sum_over_unit(sums, units.group);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float r = double_norm_scale(sums[row], inverse_width, eps);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      x[row][i] = x[row][i] * r * weights.gain[i] + weights.shift[i];
    }
  }
}

/// What the parameters of a norm need, summed over the rows of a unit: Q, P, R of double_norm.cuh.
struct ModulationSums {
  Share q, p, r;

  /// One element of a row x with gradient d.
  __device__ __forceinline__ void add(int i, float d, float x, float scale, float pull) {
    q[i] += d;
    p[i] += scale * x * d;
    r[i] += pull * x * x;
  }

  template <typename C>
  __device__ __forceinline__ void store(float* to, const C& columns) const {
    columns.store(to, q);
    columns.store(to + columns.width, p);
    columns.store(to + 2 * columns.width, r);
  }
};

inline bool aligned(const blip3o_modulation* modulation, int64_t element_bytes) {
  return modulation == nullptr ||
         (aligned({modulation->w1, modulation->w2, modulation->shift, modulation->scale}) &&
          modulation->shift_stride * element_bytes % kAccessBytes == 0 &&
          modulation->scale_stride * element_bytes % kAccessBytes == 0);
}

/// Whether the width has a kernel and rows can be counted in an int.
inline bool has_kernel(blip3o_shape shape) {
  return shape.width > 0 && shape.width <= BLIP3O_MAX_WIDTH && shape.batch >= 0 &&
         shape.tokens >= 0 && shape.batch * (shape.tokens + kMaxThreads) <= INT_MAX;
}

}  // namespace blip3o
