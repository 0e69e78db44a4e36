// h = rms(rms(x; w1); w2) * (1 + scale) + shift, and its backward. Arithmetic: double_norm.cuh.
#include "modulation_grads.cuh"

namespace blip3o {
namespace {

template <typename T, typename P>
struct NormForward {
  Units units;
  int width;
  float inverse_width, eps;
  Rows<T> x;
  Modulation<P> modulation;
  T* h;
};

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) norm_forward(const NormForward<T, P> a) {
  await_previous();
  const Unit unit = a.units.here();
  const Columns<T, kAligned> columns{a.units.group, a.width};

  Share x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = columns.load(a.x.row(unit.batch, unit.token + r), unit.has(r));
  }
  const Weights weights =
      load_weights<true, P>(a.modulation, true, nullptr, unit.batch, a.eps, columns);
  norm_rows(x, weights, a.units, a.inverse_width, a.eps);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (unit.has(r)) columns.store(a.h + a.units.row(unit, r) * a.width, x[r]);
  }
}

template <typename T, typename P>
struct NormBackward {
  Units units;
  int width;
  float inverse_width, eps;
  Rows<T> dh, x;
  Modulation<P> modulation;
  T* dx;
  float* partial;
};

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) norm_backward(const NormBackward<T, P> a) {
  await_previous();
  const Unit unit = a.units.here();
  const Columns<T, kAligned> columns{a.units.group, a.width};
  const Weights weights =
      load_weights<false, P>(a.modulation, true, nullptr, unit.batch, a.eps, columns);

  ModulationSums sums_of_rows{};
  for (int offset = 0; offset < a.units.rows; offset += kRows) {
    Share dh[kRows], x[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int token = unit.token + offset + r;
      const bool has = unit.has(offset + r);
      dh[r] = columns.load(a.dh.row(unit.batch, token), has);
      x[r] = columns.load(a.x.row(unit.batch, token), has);
    }
    float sums[2 * kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sums[2 * r] += weights.square[i] * x[r][i] * x[r][i];
        sums[2 * r + 1] += weights.gain[i] * dh[r][i] * x[r][i];
      }
    }
    sum_over_unit(sums, a.units.group);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!unit.has(offset + r)) continue;
      const float scale = double_norm_scale(sums[2 * r], a.inverse_width, a.eps);
      const float pull = double_norm_pull(scale, sums[2 * r + 1], a.inverse_width);
      Share dx;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        dx[i] = double_norm_dx(weights.gain[i] * dh[r][i], x[r][i], weights.square[i], scale, pull);
        sums_of_rows.add(i, dh[r][i], x[r][i], scale, pull);
      }
      columns.store(a.dx + a.units.row(unit, offset + r) * a.width, dx);
    }
  }
  if (a.partial == nullptr || a.units.index() >= a.units.count) return;
  sums_of_rows.store(a.partial + static_cast<int64_t>(a.units.index()) * kSums * a.width, columns);
}

}  // namespace
}  // namespace blip3o

int blip3o_sandwich_norm_forward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows x,
                                 blip3o_modulation modulation, float eps, void* h,
                                 cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    const Units units(shape, kRows);
    const int width = static_cast<int>(shape.width);
    const NormForward<T, P> a{
        units, width, 1.f / width, eps, Rows<T>(x), Modulation<P>(&modulation), static_cast<T*>(h)};
    const bool whole_words = width % kPack<T> == 0 && aligned(x, sizeof(T)) && aligned(h) &&
                             aligned(&modulation, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      return launch<norm_forward<T, P, words>>(units.blocks(), units.threads(), a, stream);
    });
  });
}

int blip3o_sandwich_norm_backward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows dh,
                                  blip3o_rows x, blip3o_modulation modulation, float eps, void* dx,
                                  blip3o_modulation_grads grads, float* workspace,
                                  cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  const Units units(shape, backward_rows(shape));
  const int error = with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    const int width = static_cast<int>(shape.width);
    const NormBackward<T, P> a{units, width, 1.f / width, eps, Rows<T>(dh), Rows<T>(x),
                               Modulation<P>(&modulation), static_cast<T*>(dx), workspace};
    const bool whole_words = width % kPack<T> == 0 && aligned(dh, sizeof(T)) &&
                             aligned(x, sizeof(T)) && aligned({dx, workspace}) &&
                             aligned(&modulation, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      return launch<norm_backward<T, P, words>>(units.blocks(), units.threads(), a, stream);
    });
  });
  if (error != cudaSuccess || workspace == nullptr) return error;
  const ModulationGrads wanted{&modulation, nullptr, grads, nullptr, 0};
  return launch_modulation_grads(dtypes.parameter, shape, units, workspace, 1, &wanted, 1, eps,
                                 stream);
}

int64_t blip3o_sandwich_workspace(blip3o_shape shape, int modulations) {
  using namespace blip3o;
  const int64_t units = Units(shape, backward_rows(shape)).count;
  const int64_t floats = units * modulations * kSums * shape.width;
  return floats > 0 ? floats : 1;  // the memory of an empty tensor would be NULL
}
