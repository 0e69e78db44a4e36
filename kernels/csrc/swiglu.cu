// out = silu(gate) * up of rows [gate | up]. With s = sigmoid(gate),
//
//   dup = g gate s          dgate = g up s (1 + gate (1 - s))
#include "elementwise.cuh"

namespace blip3o {
namespace {

/// Rows of 2,816 and 5,632 elements have equal parts of eleven whole warps.
inline constexpr int kThreads = 384;

template <typename T>
struct Swiglu {
  Items items;
  int width;
  Rows<T> gate_up, dout;
  T* out;
};

/// The division is right to two units in the last place, and 0 where the exponential is infinite.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) swiglu_forward(const Swiglu<T> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const T* from = a.gate_up.row(batch, row - batch * a.items.tokens);
  T* to = a.out + static_cast<int64_t>(row) * a.width;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int column = item * kPack;
    float gate[kPack], up[kPack];
    load(gate, from + column);
    load(up, from + a.width + column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
    store(to + column, up);
  }
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kThreads) swiglu_backward(const Swiglu<T> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const int token = row - batch * a.items.tokens;
  const T* from = a.gate_up.row(batch, token);
  const T* dout = a.dout.row(batch, token);
  T* to = a.out + static_cast<int64_t>(row) * 2 * a.width;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int column = item * kPack;
    float gate[kPack], up[kPack], g[kPack];
    load(gate, from + column);
    load(up, from + a.width + column);
    load(g, dout + column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float s = sigmoid(gate[i]);
      const float dgate = g[i] * up[i] * s * (1.f + gate[i] * (1.f - s));
      up[i] = g[i] * gate[i] * s;
      gate[i] = dgate;
    }
    store(to + column, gate);
    store(to + a.width + column, up);
  }
}

template <typename T>
Swiglu<T> arguments(blip3o_shape shape, blip3o_rows gate_up, blip3o_rows dout, void* out, int pack) {
  const int width = static_cast<int>(shape.width);
  return {Items(shape, width / pack, kThreads), width, Rows<T>(gate_up), Rows<T>(dout), static_cast<T*>(out)};
}

}  // namespace
}  // namespace blip3o

int blip3o_swiglu_forward(int dtype, blip3o_shape shape, blip3o_rows gate_up, void* out,
                          cudaStream_t stream) {
  using namespace blip3o;
  if (!countable(shape, 2 * shape.width)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto activation) {
    using T = decltype(activation);
    const bool whole_words =
        shape.width % kPack<T> == 0 && aligned(gate_up, sizeof(T)) && aligned(out);
    return with_flag(whole_words, [&](auto words) -> int {
      constexpr int kCount = words ? kPack<T> : 1;
      const Swiglu<T> a = arguments<T>(shape, gate_up, {}, out, kCount);
      if (a.items.blocks() == 0) return cudaSuccess;
      return launch<swiglu_forward<T, kCount>>(a.items.blocks(), a.items.threads(), a, stream);
    });
  });
}

int blip3o_swiglu_backward(int dtype, blip3o_shape shape, blip3o_rows dout, blip3o_rows gate_up,
                           void* dgate_up, cudaStream_t stream) {
  using namespace blip3o;
  if (!countable(shape, 2 * shape.width)) return cudaErrorInvalidValue;
  return with_dtype(dtype, [&](auto activation) {
    using T = decltype(activation);
    const bool whole_words = shape.width % kPack<T> == 0 && aligned(gate_up, sizeof(T)) &&
                             aligned(dout, sizeof(T)) && aligned(dgate_up);
    return with_flag(whole_words, [&](auto words) -> int {
      constexpr int kCount = words ? kPack<T> : 1;
      const Swiglu<T> a = arguments<T>(shape, gate_up, dout, dgate_up, kCount);
      if (a.items.blocks() == 0) return cudaSuccess;
      return launch<swiglu_backward<T, kCount>>(a.items.blocks(), a.items.threads(), a, stream);
    });
  });
}
