// The norms as two RMSNorm modules and AdaLN compute them in 16 bits: rounded after every step.
//
// The second mean square is that of rounded numbers, so this takes two rounds of reduction. Steps round
// to the dtype that torch would promote to: the activation's for the first norm's unit vector (the
// parameters' where a layer scale already promoted the branch), the parameters' from then on.
#pragma once

#include "sandwich.cuh"

namespace blip3o {

/// x := X(x rsqrt(mean(x^2) + eps)), the rows of a unit.
template <typename X>
__device__ __forceinline__ void unit_rows(Share (&x)[kRows], const Units& units,
                                          float inverse_width, float eps) {
  float sums[kRows] = {};
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[row] += x[row][i] * x[row][i];
  }
  sum_over_unit(sums, units.group);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float r = rsqrtf(sums[row] * inverse_width + eps);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[row][i] = rounded<X>(x[row][i] * r);
  }
}

/// x := X(norm(x)) of rows in X, the rows of a unit.
template <typename X, typename P, typename C>
__device__ __forceinline__ void faithful_norm_rows(Share (&x)[kRows], const Site<P>& site,
                                                   int64_t batch, const Units& units,
                                                   float inverse_width, float eps,
                                                   const C& columns) {
  const Share w1 = columns.load(site.w1);
  unit_rows<X>(x, units, inverse_width, eps);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[row][i] = rounded<P>(w1[i] * x[row][i]);
  }
  const Share w2 = columns.load(site.w2);
  const Share scale = columns.load(site.scale_row(batch));
  const Share shift = columns.load(site.shift_row(batch));
  unit_rows<P>(x, units, inverse_width, eps);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float u = rounded<P>(rounded<P>(w2[i] * x[row][i]) * rounded<P>(1.f + scale[i]));
      x[row][i] = rounded<X>(rounded<P>(u + shift[i]));
    }
  }
}

}  // namespace blip3o
