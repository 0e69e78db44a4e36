// Rotary positions on a packed projection [(H + 2K) d]. With j = i + d/2, for query and key heads,
//
//   out[i] = x[i] cos[i] - x[j] sin[i]        adjoint: dx[i] = dy[i] cos[i] + dy[j] sin[j]
//   out[j] = x[j] cos[j] + x[i] sin[j]                 dx[j] = dy[j] cos[j] - dy[i] sin[i]
//
// and value heads are copied. The halves of a table may differ, so the adjoint is not "negate sin".
#include "elementwise.cuh"
#include "rotation.cuh"

namespace blip3o {
namespace {

template <typename T, typename P>
struct Rope {
  Items items;
  int half, width;        // d / 2, (H + 2K) d
  int turned;             // items of a row that rotate; the rest are copied
  Rows<T> qkv;
  const P *cos, *sin;
  T* out;
};

/// An item is one pack of a head's lower half and the same pack of its upper half.
template <typename T, typename P, int kPack, bool kAdjoint>
__global__ void __launch_bounds__(kElementwiseThreads) rope(const Rope<T, P> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const int token = row - batch * a.items.tokens;
  const T* from = a.qkv.row(batch, token);
  T* to = a.out + static_cast<int64_t>(row) * a.width;
  const P* cos = a.cos + static_cast<int64_t>(token) * 2 * a.half;
  const P* sin = a.sin + static_cast<int64_t>(token) * 2 * a.half;
  const int packs = a.half / kPack;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int head = item / packs;
    const int column = (item - head * packs) * kPack;
    const int first = head * 2 * a.half + column;
    float low[kPack], high[kPack];
    load(low, from + first);
    load(high, from + first + a.half);
    if (item < a.turned) {
      rotate<kPack, kAdjoint>(low, high, cos + column, sin + column, a.half);
    }
    store(to + first, low);
    store(to + first + a.half, high);
  }
}

template <typename T, typename P, int kPack>
int launch_rope(Rope<T, P>& a, blip3o_shape shape, int num_heads, int num_kv_heads, int adjoint,
                cudaStream_t stream) {
  const int packs = a.half / kPack;
  a.items = Items(shape, static_cast<int64_t>(num_heads + 2 * num_kv_heads) * packs);
  a.turned = (num_heads + num_kv_heads) * packs;
  const int64_t blocks = a.items.blocks();
  if (blocks == 0) return cudaSuccess;
  const dim3 threads = a.items.threads();
  return with_flag(adjoint != 0, [&](auto transposed) {
    return launch<rope<T, P, kPack, transposed>>(blocks, threads, a, stream);
  });
}

}  // namespace
}  // namespace blip3o

int blip3o_rope(blip3o_dtypes dtypes, blip3o_shape shape, int num_heads, int num_kv_heads,
                blip3o_rows qkv, const void* cos, const void* sin, int adjoint, void* out,
                cudaStream_t stream) {
  using namespace blip3o;
  const int64_t width = (num_heads + 2 * static_cast<int64_t>(num_kv_heads)) * shape.width;
  if (num_heads < 0 || num_kv_heads < 0 || shape.width % 2 != 0 || !countable(shape, width)) {
    return cudaErrorInvalidValue;
  }
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    Rope<T, P> a{};
    a.half = static_cast<int>(shape.width / 2);
    a.width = static_cast<int>(width);
    a.qkv = Rows<T>(qkv);
    a.cos = static_cast<const P*>(cos);
    a.sin = static_cast<const P*>(sin);
    a.out = static_cast<T*>(out);
    const bool whole_words =
        a.half % kPack<T> == 0 && aligned(qkv, sizeof(T)) && aligned({cos, sin, out});
    return whole_words
               ? launch_rope<T, P, kPack<T>>(a, shape, num_heads, num_kv_heads, adjoint, stream)
               : launch_rope<T, P, 1>(a, shape, num_heads, num_kv_heads, adjoint, stream);
  });
}
