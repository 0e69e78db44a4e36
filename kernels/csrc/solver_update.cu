// out = c[0] x + c[1] v + sum_r c[2 + r] slopes[r], in fp32; row `slot` of slopes becomes v. With guidance
// the velocity holds the conditional half over the unconditional one, and
// v = v_uncond + guidance (v_cond - v_uncond).
//
// The thread that reads an element of x or of a slope also writes it, so `out` may be x, and `slot` a
// row that is read.
#include "elementwise.cuh"

namespace blip3o {
namespace {

template <typename V>
struct SolverUpdate {
  Items items;
  int64_t batch;
  int width;
  Rows<float> x;
  Rows<V> velocity;
  blip3o_slopes slopes;
  const float *coefficients, *bound;
  float guidance;
  float* out;
};

/// sum + factor * x, the product rounded too: no implementation of the op fuses the two.
__device__ __forceinline__ float plus_product(float sum, float factor, float x) {
  return __fadd_rn(sum, __fmul_rn(factor, x));
}

/// To [-bound, bound]; NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float bound) {
  return x < -bound ? -bound : (x > bound ? bound : x);
}

template <typename V, int kCount>
__global__ void __launch_bounds__(kElementwiseThreads) solver_update(const SolverUpdate<V> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const int token = row - batch * a.items.tokens;
  const int64_t kept = a.slopes.slot != nullptr ? *a.slopes.slot : -1;
  const float bound = a.bound != nullptr ? *a.bound : INFINITY;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int column = item * kCount;
    const int64_t at = static_cast<int64_t>(row) * a.width + column;
    float state[kCount], slope[kCount], other[kCount];
    load(state, a.x.row(batch, token) + column);
    load(slope, a.velocity.row(batch, token) + column);
    if (a.guidance != 1.f) {
      load(other, a.velocity.row(a.batch + batch, token) + column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        slope[i] = plus_product(other[i], a.guidance, slope[i] - other[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      state[i] = plus_product(__fmul_rn(a.coefficients[0], state[i]), a.coefficients[1], slope[i]);
    }
    for (int64_t r = 0; r < a.slopes.count; ++r) {
      const float coefficient = a.coefficients[2 + r];
      if (coefficient == 0.f) continue;
      load(other, a.slopes.data + r * a.slopes.stride + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) state[i] = plus_product(state[i], coefficient, other[i]);
    }
    if (kept >= 0 && kept < a.slopes.count) {
      store(a.slopes.data + kept * a.slopes.stride + at, slope);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) state[i] = clamped(state[i], bound);
    store(a.out + at, state);
  }
}

}  // namespace
}  // namespace blip3o

int blip3o_solver_update(int velocity_dtype, blip3o_shape shape, blip3o_rows x,
                         blip3o_rows velocity, blip3o_slopes slopes, const float* coefficients,
                         const float* bound, float guidance, float* out, cudaStream_t stream) {
  using namespace blip3o;
  if (!countable(shape, shape.width)) return cudaErrorInvalidValue;
  return with_dtype(velocity_dtype, [&](auto of_velocity) -> int {
    using V = decltype(of_velocity);
    constexpr int kAccess = kPack<V>;
    const bool whole_words = shape.width % kAccess == 0 && aligned(x, sizeof(float)) &&
                             aligned(velocity, sizeof(V)) && aligned({slopes.data, out}) &&
                             slopes.stride % kPack<float> == 0;
    return with_flag(whole_words, [&](auto words) -> int {
      constexpr int kCount = words ? kAccess : 1;
      const SolverUpdate<V> a{Items(shape, shape.width / kCount),
                              shape.batch,
                              static_cast<int>(shape.width),
                              Rows<float>(x),
                              Rows<V>(velocity),
                              slopes,
                              coefficients,
                              bound,
                              guidance,
                              out};
      if (a.items.blocks() == 0) return cudaSuccess;
      return launch<solver_update<V, kCount>>(a.items.blocks(), a.items.threads(), a, stream);
    });
  });
}
