// The rotation of one pack of a head's lower half with the same pack of its upper half, in registers.
#pragma once

#include "vector.cuh"

namespace blip3o {

/// `cos` and `sin` point at the lower entries; the upper ones are `half` further. Halves may differ.
template <int kCount, bool kAdjoint, typename P>
__device__ __forceinline__ void rotate(float (&low)[kCount], float (&high)[kCount], const P* cos,
                                       const P* sin, int half) {
  float cos_low[kCount], cos_high[kCount], sin_low[kCount], sin_high[kCount];
  load(cos_low, cos);
  load(cos_high, cos + half);
  load(sin_low, sin);
  load(sin_high, sin + half);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float a = low[i], b = high[i];
    if constexpr (kAdjoint) {
      low[i] = a * cos_low[i] + b * sin_high[i];
      high[i] = b * cos_high[i] - a * sin_low[i];
    } else {
      low[i] = a * cos_low[i] - b * sin_low[i];
      high[i] = b * cos_high[i] + a * sin_high[i];
    }
  }
}

}  // namespace blip3o
