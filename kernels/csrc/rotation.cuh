// The rotation of one pack of a head's lower half with the same pack of its upper half, in registers.
#pragma once

#include "vector.cuh"

namespace blip3o {

/// `cos` and `sin` point at the lower entries; the upper ones are `half` further. Halves may differ.
template <typename T, typename P, int kCount, bool kAdjoint, bool kFaithful>
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
    } else if constexpr (kFaithful) {
      low[i] = rounded<T>(a * rounded<T>(cos_low[i])) + rounded<T>(-b * rounded<T>(sin_low[i]));
      high[i] = rounded<T>(b * rounded<T>(cos_high[i])) + rounded<T>(a * rounded<T>(sin_high[i]));
    } else {
      low[i] = a * cos_low[i] - b * sin_low[i];
      high[i] = b * cos_high[i] + a * sin_high[i];
    }
  }
}

}  // namespace blip3o
