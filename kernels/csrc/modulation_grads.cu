#include "modulation_grads.cuh"

namespace blip3o {
namespace {

inline constexpr int kColumns = 32;
inline constexpr int kStrides = 16;

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

/// The block's two sums of a column, added over kStrides threads in order; valid where threadIdx.y == 0.
__device__ __forceinline__ float2 sum_over_strides(float2 mine) {
  __shared__ float2 of_stride[kStrides][kColumns];
  of_stride[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int stride = 0; stride < kStrides; ++stride) {
    total.x += of_stride[stride][threadIdx.x].x;
    total.y += of_stride[stride][threadIdx.x].y;
  }
  return total;
}

/// Q and P of one sample: dshift and dscale.
template <typename P>
__device__ __forceinline__ void sample_grads(const GradArguments<P>& a, const GradTarget<P>& out,
                                             int batch, int column) {
  float2 sums = make_float2(0.f, 0.f);
  const int64_t unit_stride = static_cast<int64_t>(a.slots) * kSums * a.width;
  const float* partial =
      a.partial + batch * a.per_sample * unit_stride + out.slot * kSums * a.width;
  if (column < a.width) {
#pragma unroll 4
    for (int unit = threadIdx.y; unit < a.per_sample; unit += kStrides) {
      const float* of_unit = partial + unit * unit_stride + column;
      sums.x += of_unit[0];
      sums.y += of_unit[a.width];
    }
  }
  sums = sum_over_strides(sums);
  if (threadIdx.y != 0 || column >= a.width) return;
  const float w1 = at(out.modulation.w1, column, 1.f), w2 = at(out.modulation.w2, column, 1.f);
  const float layer_scale = at(out.layer_scale, column, 1.f);
  const int64_t index = static_cast<int64_t>(batch) * a.width + column;
  put(out.dshift, index, sums.x);
  put(out.dscale, index, w1 * w2 * layer_scale * sums.y);
}

/// sum_b (1 + scale) P and R of all samples: dw1, dw2 and the gradient of the layer scale.
template <typename P>
__device__ __forceinline__ void weight_grads(const GradArguments<P>& a, const GradTarget<P>& out,
                                             int column) {
  float2 sums = make_float2(0.f, 0.f);
  const int64_t unit_stride = static_cast<int64_t>(a.slots) * kSums * a.width;
  const float* partial = a.partial + out.slot * kSums * a.width;
  if (column < a.width) {
#pragma unroll 4
    for (int unit = threadIdx.y; unit < a.batch * a.per_sample; unit += kStrides) {
      const float* of_unit = partial + unit * unit_stride + column;
      const P* scale_row =
          out.modulation.present() ? out.modulation.scale_row(unit / a.per_sample) : nullptr;
      const float scale = at(scale_row, column, 0.f);
      sums.x += (1.f + scale) * of_unit[a.width];
      sums.y += of_unit[2 * a.width];
    }
  }
  sums = sum_over_strides(sums);
  if (threadIdx.y != 0 || column >= a.width) return;
  const float w1 = at(out.modulation.w1, column, 1.f), w2 = at(out.modulation.w2, column, 1.f);
  const float layer_scale = at(out.layer_scale, column, 1.f);
  put(out.dw1, column, w2 * layer_scale * sums.x - w1 * layer_scale * layer_scale * sums.y);
  put(out.dw2, column, w1 * layer_scale * sums.x);
  put(out.dlayer_scale, column, w1 * w2 * sums.x - layer_scale * (w1 * w1 + a.eps) * sums.y);
}

/// Blocks: modulation, then sample with one more for the weights, then tile of columns.
template <typename P>
__global__ void __launch_bounds__(kColumns* kStrides) modulation_grads(const GradArguments<P> a) {
  await_previous();
  const int block = blockIdx.x;
  const int which = block / a.tiles;
  const int column = (block - which * a.tiles) * kColumns + threadIdx.x;
  const int second = which > a.batch;
  const int sample = which - second * (a.batch + 1);
  const GradTarget<P>& out = a.targets[second];
  if (sample == a.batch) {
    weight_grads(a, out, column);
  } else if (out.dshift != nullptr) {
    sample_grads(a, out, sample, column);
  }
}

}  // namespace

int launch_modulation_grads(int parameter_dtype, blip3o_shape shape, const Units& units,
                            const float* partial, int slots, const ModulationGrads* wanted,
                            int count, float eps, cudaStream_t stream) {
  return with_dtype(parameter_dtype, [&](auto parameter) {
    using P = decltype(parameter);
    GradArguments<P> a{};
    a.partial = partial;
    a.batch = static_cast<int>(shape.batch);
    a.per_sample = units.per_sample;
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
    const int64_t blocks = count * (shape.batch + 1) * a.tiles;
    return launch<modulation_grads<P>>(blocks, dim3(kColumns, kStrides), a, stream);
  });
}

}  // namespace blip3o
