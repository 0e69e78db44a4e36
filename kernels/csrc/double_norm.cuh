// The arithmetic of two RMSNorms in a row, which are one norm:
//
//   rms(rms(x; w1); w2) = x w1 w2 r      r = rsqrt(mean((w1 x)^2) + eps (mean(x^2) + eps))
//                                          = rsqrt(mean(square x^2) + eps^2)      square = w1^2 + eps
//
// Backward, with gain = w1 w2 (1 + scale), g = gain dh and c = sum(g x):
//
//   dx = r g - square x pull             pull = r^3 c / D
//
// and for the parameters, summing over the rows of a sample (P, Q) or over all rows (R),
//
//   P = sum r x dh    Q = sum dh    R = sum pull x^2
//   dscale = w1 w2 P    dshift = Q
//   dw2 = sum_b (1 + scale) w1 P    dw1 = sum_b (1 + scale) w2 P - w1 R
//
// When x stands for s y, a branch scaled by s, gain s and square s^2 take the places of gain and square
// and everything is said of y: dy is that dx, P and R of x are s P and s^2 R of y, and
// ds = sum_b gain P - s square R.
#pragma once

namespace blip3o {

/// r of a row from sum(square x^2).
__device__ __forceinline__ float double_norm_scale(float sum, float inverse_width, float eps) {
  return rsqrtf(sum * inverse_width + eps * eps);
}

/// pull of a row from r and c.
__device__ __forceinline__ float double_norm_pull(float r, float c, float inverse_width) {
  return r * r * r * (c * inverse_width);
}

}  // namespace blip3o
