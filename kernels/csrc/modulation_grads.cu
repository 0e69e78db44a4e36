#include "modulation_grads.cuh"

namespace blip3o {
namespace {

inline constexpr int kColumns = 8;  // 32 bytes of fp32, which memory hands out together
inline constexpr int kStrides = 64;
inline constexpr int kWarps = kColumns * kStrides / kWarp;

template <typename P>
struct GradTarget {
  Modulation<P> modulation;
  const P* layer_scale;
  P *dw1, *dw2, *dshift, *dscale, *dlayer_scale;
  int slot;
};

template <typename P>
struct GradArguments {
  GradTarget<P> targets[2];
  const float* partial;
  int batch, per_sample, slots, width, tiles;
  float eps;
};

template <typename P>
__device__ __forceinline__ float at(const P* row, int column, float absent) {
  return row == nullptr ? absent : widen(row[column]);
}

template <typename P>
__device__ __forceinline__ void put(P* row, int64_t index, float value) {
  if (row != nullptr) row[index] = narrow<P>(value);
}

/// The block's two sums of a column, in a fixed order; valid where threadIdx.y == 0.
__device__ __forceinline__ float2 sum_over_strides(float2 mine) {
  __shared__ float2 of_warp[kWarps][kColumns];
#pragma unroll
  for (int offset = kWarp / 2; offset >= kColumns; offset /= 2) {
    mine.x += __shfl_xor_sync(~0u, mine.x, offset);
    mine.y += __shfl_xor_sync(~0u, mine.y, offset);
  }
  constexpr int kOfWarp = kWarp / kColumns;  // strides
  if (threadIdx.y % kOfWarp == 0) of_warp[threadIdx.y / kOfWarp][threadIdx.x] = mine;
  __syncthreads();
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    total.x += of_warp[warp][threadIdx.x].x;
    total.y += of_warp[warp][threadIdx.x].y;
  }
  return total;
}

/// Blocks: modulation, then tile of columns. A thread adds the sums of every kStrides-th sample.
template <typename P>
__global__ void __launch_bounds__(kColumns* kStrides) modulation_grads(const GradArguments<P> a) {
  await_previous();
  const int which = static_cast<int>(blockIdx.x) / a.tiles;
  const int column = (static_cast<int>(blockIdx.x) - which * a.tiles) * kColumns + threadIdx.x;
  const GradTarget<P>& out = a.targets[which];
  const int64_t stride = static_cast<int64_t>(a.slots) * kSums * a.width;
  const bool inside = column < a.width;
  const float w1 = at(inside ? out.modulation.w1 : nullptr, column, 1.f);
  const float w2 = at(inside ? out.modulation.w2 : nullptr, column, 1.f);
  const float layer_scale = at(inside ? out.layer_scale : nullptr, column, 1.f);
  float2 of_weights = make_float2(0.f, 0.f);  // sum_b (1 + scale) P and R
  for (int sample = threadIdx.y; inside && sample < a.batch; sample += kStrides) {
    const float* partial =
        a.partial + sample * a.per_sample * stride + out.slot * kSums * a.width + column;
    float q = 0.f, p = 0.f, r = 0.f;
#pragma unroll 4
    for (int block = 0; block < a.per_sample; ++block, partial += stride) {
      q += partial[0];
      p += partial[a.width];
      r += partial[2 * a.width];
    }
    const int64_t index = static_cast<int64_t>(sample) * a.width + column;
    put(out.dshift, index, q);
    put(out.dscale, index, w1 * w2 * layer_scale * p);
    const P* scale = out.modulation.present() ? out.modulation.scale_row(sample) : nullptr;
    of_weights.x += (1.f + at(scale, column, 0.f)) * p;
    of_weights.y += r;
  }
  const float2 sums = sum_over_strides(of_weights);
  if (threadIdx.y != 0 || !inside) return;
  put(out.dw1, column, w2 * layer_scale * sums.x - w1 * layer_scale * layer_scale * sums.y);
  put(out.dw2, column, w1 * layer_scale * sums.x);
  put(out.dlayer_scale, column, w1 * w2 * sums.x - layer_scale * (w1 * w1 + a.eps) * sums.y);
}

}  // namespace

int launch_modulation_grads(int parameter_dtype, blip3o_shape shape, const Cut& cut,
                            const float* partial, int slots, const ModulationGrads* wanted,
                            int count, float eps, cudaStream_t stream) {
  return with_dtype(parameter_dtype, [&](auto parameter) {
    using P = decltype(parameter);
    GradArguments<P> a{};
    a.partial = partial;
    a.batch = static_cast<int>(shape.batch);
    a.per_sample = cut.per_sample;
    a.slots = slots;
    a.width = static_cast<int>(shape.width);
    a.tiles = ceil_div(a.width, kColumns);
    a.eps = eps;
    for (int i = 0; i < count; ++i) {
      const ModulationGrads& from = wanted[i];
      a.targets[i] = {Modulation<P>(from.modulation),
                    static_cast<const P*>(from.layer_scale),
                    static_cast<P*>(from.grads.w1),
                    static_cast<P*>(from.grads.w2),
                    static_cast<P*>(from.grads.shift),
                    static_cast<P*>(from.grads.scale),
                    static_cast<P*>(from.dlayer_scale),
                    from.slot};
    }
    const int64_t blocks = static_cast<int64_t>(count) * a.tiles;
    return launch<modulation_grads<P>>(blocks, dim3(kColumns, kStrides), a, stream);
  });
}

}  // namespace blip3o
