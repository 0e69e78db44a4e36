// What sandwich_norm and sandwich_join share: who computes what, and the parameters of a norm.
//
// A *group* of threads (whole warps) works on one row at a time. Every thread owns the same kElements
// columns of each row, in packs of 16 bytes of the activation. A block has several groups and owns
// consecutive rows of one sample, which its groups take in turn: parameters are read once a block, and
// gradients over rows are added in registers. Rows travel to shared memory while others are worked on.
// Which thread adds what of a row depends on the width alone, not on the batch around it.
#pragma once

#include "async_copy.cuh"
#include "double_norm.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace blip3o {

inline constexpr int kElements = 8;
inline constexpr int kWarp = 32;
inline constexpr int kMaxGroup = BLIP3O_MAX_WIDTH / kElements;
inline constexpr int kMaxGroupWarps = kMaxGroup / kWarp;

/// Threads of the largest block. One fits on a multiprocessor, with 128 registers a thread: launch bounds
/// say so, or ptxas saves registers for a second block at the cost of instructions and spills.
inline constexpr int kMaxThreads = 512;

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

/// The rows of a block: `token` and the following ones of sample `batch`, up to `end`.
struct Range {
  int batch, token, end;
};

/// The cut of [B, N] into blocks of (group, groups) threads.
struct Cut {
  int tokens, rows, per_sample, group, groups;
  int64_t blocks;

  Cut() = default;

  /// `threads`: of a block, unless a group has more. `resident`: that a multiprocessor holds. Blocks fill
  /// the device in whole waves, as far as that goes. `cost`: what a block spends besides its rows, in rows.
  Cut(blip3o_shape shape, int threads, int resident, int cost)
      : tokens(static_cast<int>(shape.tokens)),
        group(ceil_div(static_cast<int>(shape.width), kElements * kWarp) * kWarp),
        groups(group < threads ? threads / group : 1) {
    constexpr int kMostWaves = 8;
    const int64_t at_once = multiprocessors() * (resident / (group * groups));
    const int64_t turns = ceil_div(tokens, groups);
    int64_t least = INT64_MAX;
    rows = tokens;
    for (int64_t wave = 1; wave <= kMostWaves && shape.batch > 0; ++wave) {
      const int64_t fit = at_once * wave / shape.batch;
      const int64_t blocks_of_sample = fit < 1 ? 1 : fit < turns ? fit : turns;
      const int64_t turns_of_block = ceil_div(turns, blocks_of_sample > 0 ? blocks_of_sample : 1);
      const int64_t waves = ceil_div(shape.batch * blocks_of_sample, at_once);
      const int64_t total = waves * (turns_of_block * groups + cost);
      if (total >= least) continue;
      least = total;
      rows = static_cast<int>(turns_of_block) * groups;
    }
    per_sample = rows > 0 ? ceil_div(tokens, rows) : 0;
    blocks = shape.batch * per_sample;
  }

  dim3 threads() const { return dim3(group, groups); }

  /// Bytes of a block's pipeline.
  template <typename P>
  int shared() const {
    return group * groups * P::kThreadBytes;
  }

  __device__ __forceinline__ Range here() const {
    const int batch = static_cast<int>(blockIdx.x) / per_sample;
    const int token = (static_cast<int>(blockIdx.x) - batch * per_sample) * rows;
    return {batch, token, min(token + rows, tokens)};
  }

  /// Where a row lies in a contiguous [B, N].
  __device__ __forceinline__ int64_t row(int batch, int token) const {
    return static_cast<int64_t>(batch) * tokens + token;
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

  /// Element `i` of this thread's share.
  template <typename S>
  __device__ __forceinline__ void put(S* row, int i, float value) const {
    const int column = first(i / kPack<T>) + i % kPack<T>;
    if (column < width) row[column] = narrow<S>(value);
  }

  template <typename S>
  __device__ __forceinline__ void store(S* row, const Share& share) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        float part[kPack<T>];
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) part[i] = share[pack * kPack<T> + i];
        if (first(pack) < width) blip3o::store(row + first(pack), part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) put(row, i, share[i]);
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

/// Rows of kArrays tensors on their way to the threads that own their columns: the next kStages turns of
/// every group. A thread reads only what it has copied itself.
template <typename T, int kArrays, int kStages, bool kAligned>
struct Pipeline {
  static constexpr int kPacks = Columns<T, kAligned>::kPacks;
  static constexpr int kThreadBytes = kStages * kArrays * kPacks * kAccessBytes;
  static_assert((kStages & (kStages - 1)) == 0);

  Columns<T, kAligned> columns;
  T* mine;
  int stride;

  __device__ __forceinline__ explicit Pipeline(const Columns<T, kAligned>& of_thread)
      : columns(of_thread), stride(static_cast<int>(blockDim.x * blockDim.y) * kPack<T>) {
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    mine = reinterpret_cast<T*>(shared_memory()) + thread * kPack<T>;
  }

  __device__ __forceinline__ T* place(int turn, int array, int pack) const {
    return mine + (((turn & (kStages - 1)) * kArrays + array) * kPacks + pack) * stride;
  }

  /// Sends for this thread's columns of a row; zeros unless it is `present`.
  __device__ __forceinline__ void fetch(int turn, int array, const T* row, bool present) const {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      const int column = columns.first(pack);
      T* to = place(turn, array, pack);
      if constexpr (kAligned) {
        copy_async(to, row + column, present && column < columns.width);
      } else {
#pragma unroll 1
        for (int i = 0; i < kPack<T>; ++i) {
          to[i] = present && column + i < columns.width ? row[column + i] : narrow<T>(0.f);
        }
      }
    }
  }

  __device__ __forceinline__ Share read(int turn, int array) const {
    Share out;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      float part[kPack<T>];
      blip3o::load(part, place(turn, array, pack));
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) out[pack * kPack<T> + i] = part[i];
    }
    return out;
  }
};

/// Adds each of `values` over the threads of a group, in an order fixed by the width. Every call flips
/// `odd`, so that a warp which is ahead does not overwrite what another still reads.
template <int kCount>
__device__ __forceinline__ void sum_over_group(float (&values)[kCount], bool& odd) {
  constexpr int kSlots = kCount > 4 ? 8 : kCount > 2 ? 4 : kCount;
  constexpr int kLanes = kWarp / kSlots;  // that end up with the same value
  constexpr int kParts = 4;               // lanes that share out the sums of the warps
  __shared__ float of_warp[2][kMaxThreads / kWarp][kSlots];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  float mine[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) mine[i] = i < kCount ? values[i] : 0.f;
  // Half of the lanes keep half of the values and give away the others, until each has one.
#pragma unroll
  for (int left = kSlots / 2; left > 0; left /= 2) {
    const int offset = left * kLanes;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float kept = upper ? mine[i + left] : mine[i];
      const float given = upper ? mine[i] : mine[i + left];
      mine[i] = kept + __shfl_xor_sync(~0u, given, offset);
    }
  }
  float sum = mine[0];
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (warps > 1) {
    const int first = static_cast<int>(threadIdx.y) * warps;
    const int slot = lane / kLanes, part = lane % kParts;
    if (lane % kLanes == 0) of_warp[odd][first + static_cast<int>(threadIdx.x) / kWarp][slot] = sum;
    sync_some(1 + static_cast<int>(threadIdx.y), static_cast<int>(blockDim.x));
    sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kMaxGroupWarps; warp += kParts) {
      if (warp + part < warps) sum += of_warp[odd][first + warp + part][slot];
    }
    odd = !odd;
#pragma unroll
    for (int offset = kParts / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = kSlots == 1 ? sum : __shfl_sync(~0u, sum, i * kLanes);
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

/// x := norm(s x).
__device__ __forceinline__ void norm_row(Share& x, const Weights& weights, float inverse_width, float eps,
                                         bool& odd) {
  float sums[1] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) sums[0] += weights.square[i] * x[i] * x[i];
  sum_over_group(sums, odd);
  const float r = double_norm_scale(sums[0], inverse_width, eps);
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = x[i] * r * weights.gain[i] + weights.shift[i];
}

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
