// x + dt s, s = weight v + previous_weight v_previous, in fp32. With guidance the velocities hold the
// conditional half over the unconditional one, and s := s_uncond + guidance (s_cond - s_uncond).
#include "elementwise.cuh"

namespace blip3o {
namespace {

template <typename S, typename V>
struct SolverUpdate {
  Items items;
  int64_t batch;
  int width;
  Rows<S> x;
  Rows<V> velocity, previous;
  blip3o_solver_step step;
  S* out;
};

/// weight v + previous_weight v_previous of one pack.
template <int kPack, typename S, typename V>
__device__ __forceinline__ void slope(float (&out)[kPack], const SolverUpdate<S, V>& a,
                                      int64_t batch, int token, int column) {
  load(out, a.velocity.row(batch, token) + column);
  float previous[kPack] = {};
  if (a.previous.data != nullptr) load(previous, a.previous.row(batch, token) + column);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    out[i] = a.step.weight * out[i] + a.step.previous_weight * previous[i];
  }
}

/// To [-bound, bound]; NaN stays NaN.
__device__ __forceinline__ float clamped(float x, float bound) {
  return x < -bound ? -bound : (x > bound ? bound : x);
}

template <typename S, typename V, int kPack>
__global__ void __launch_bounds__(kElementwiseThreads) solver_update(const SolverUpdate<S, V> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const int token = row - batch * a.items.tokens;
  const bool guided = a.step.guidance != 1.f;
  const float dt = a.step.dt_device != nullptr ? *a.step.dt_device : a.step.dt;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int column = item * kPack;
    float x[kPack], s[kPack], unconditional[kPack] = {};
    load(x, a.x.row(batch, token) + column);
    slope(s, a, batch, token, column);
    if (guided) slope(unconditional, a, a.batch + batch, token, column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (guided) s[i] = unconditional[i] + a.step.guidance * (s[i] - unconditional[i]);
      x[i] += dt * s[i];
      if (a.step.bound >= 0.f) x[i] = clamped(x[i], a.step.bound);
    }
    store(a.out + static_cast<int64_t>(row) * a.width + column, x);
  }
}

}  // namespace
}  // namespace blip3o

int blip3o_solver_update(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows x,
                         blip3o_rows velocity, blip3o_rows previous, blip3o_solver_step step,
                         void* out, cudaStream_t stream) {
  using namespace blip3o;
  if (!countable(shape, shape.width)) return cudaErrorInvalidValue;
  return with_dtypes(dtypes, [&](auto of_velocity, auto of_state) {
    using V = decltype(of_velocity);
    using S = decltype(of_state);
    const bool whole_words = shape.width % kPack<S> == 0 && aligned(x, sizeof(S)) &&
                             aligned(velocity, sizeof(V)) && aligned(previous, sizeof(V)) &&
                             aligned(out);
    return with_flag(whole_words, [&](auto words) -> int {
      constexpr int kCount = words ? kPack<S> : 1;
      const SolverUpdate<S, V> a{Items(shape, shape.width / kCount),
                                 shape.batch,
                                 static_cast<int>(shape.width),
                                 Rows<S>(x),
                                 Rows<V>(velocity),
                                 Rows<V>(previous),
                                 step,
                                 static_cast<S*>(out)};
      if (a.items.blocks() == 0) return cudaSuccess;
      return launch<solver_update<S, V, kCount>>(a.items.blocks(), a.items.threads(), a, stream);
    });
  });
}
