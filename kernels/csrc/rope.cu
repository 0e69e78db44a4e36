// Rotary positions on a packed projection [(H + 2K) d]. With j = i + d/2, for query and key heads,
//
//   out[i] = x[i] cos[i] - x[j] sin[i]        adjoint: dx[i] = dy[i] cos[i] + dy[j] sin[j]
//   out[j] = x[j] cos[j] + x[i] sin[j]                 dx[j] = dy[j] cos[j] - dy[i] sin[i]
//
// and value heads are copied. The halves of a table may differ, so the adjoint is not "negate sin".
// One side is packed. The other is queries, keys and values apart, or all heads as queries.
#include "elementwise.cuh"
#include "rotation.cuh"

namespace blip3o {
namespace {

template <typename T>
struct Heads {
  T* data;
  int64_t batch_stride, row_stride;
  int head_stride;

  Heads() = default;
  explicit Heads(const blip3o_heads& heads)
      : data(static_cast<T*>(heads.data)),
        batch_stride(heads.batch_stride),
        row_stride(heads.row_stride),
        head_stride(static_cast<int>(heads.head_stride)) {}

  __device__ __forceinline__ T* at(int64_t batch, int64_t token, int head, int column) const {
    return data + batch * batch_stride + token * row_stride + (head * head_stride + column);
  }
};

template <typename T, typename P>
struct Rope {
  Items items;
  int half;               // d / 2
  int turned;             // heads that rotate; the rest are copied
  int first_key, first_value;
  Heads<T> packed, q, k, v;
  const P *cos, *sin;

  template <bool kKeys>
  __device__ __forceinline__ T* apart(int batch, int token, int head, int column) const {
    if (!kKeys || head < first_key) return q.at(batch, token, head, column);
    return head < first_value ? k.at(batch, token, head - first_key, column)
                              : v.at(batch, token, head - first_value, column);
  }
};

/// An item is one pack of a head's lower half and the same pack of its upper half. Without kKeys all heads
/// are in q.
template <typename T, typename P, int kPack, bool kAdjoint, bool kKeys>
__global__ void __launch_bounds__(kElementwiseThreads) rope(const Rope<T, P> a) {
  await_previous();
  const int row = a.items.row();
  if (row >= a.items.rows) return;
  const int batch = row / a.items.tokens;
  const int token = row - batch * a.items.tokens;
  const P* cos = a.cos + static_cast<int64_t>(token) * 2 * a.half;
  const P* sin = a.sin + static_cast<int64_t>(token) * 2 * a.half;
  const int packs = a.half / kPack;
  for (int item = threadIdx.x; item < a.items.per_row; item += blockDim.x) {
    const int head = item / packs;
    const int column = (item - head * packs) * kPack;
    T* const packed = a.packed.at(batch, token, head, column);
    T* const apart = a.template apart<kKeys>(batch, token, head, column);
    const T* from = kAdjoint ? apart : packed;
    T* to = kAdjoint ? packed : apart;
    float low[kPack], high[kPack];
    load(low, from);
    load(high, from + a.half);
    if (head < a.turned) {
      rotate<kPack, kAdjoint>(low, high, cos + column, sin + column, a.half);
    }
    store(to, low);
    store(to + a.half, high);
  }
}

template <typename T, typename P, int kPack>
int launch_rope(Rope<T, P>& a, blip3o_shape shape, int64_t heads, int adjoint,
                cudaStream_t stream) {
  a.items = Items(shape, heads * (a.half / kPack));
  const int64_t blocks = a.items.blocks();
  if (blocks == 0) return cudaSuccess;
  const dim3 threads = a.items.threads();
  return with_flag(adjoint != 0, [&](auto transposed) {
    return with_flag(a.first_key < heads, [&](auto keys) {
      return launch<rope<T, P, kPack, transposed, keys>>(blocks, threads, a, stream);
    });
  });
}

}  // namespace
}  // namespace blip3o

int blip3o_rope(blip3o_dtypes dtypes, blip3o_shape shape, int num_heads, int num_kv_heads,
                int turned, blip3o_heads packed, blip3o_heads q, blip3o_heads k, blip3o_heads v,
                const void* cos, const void* sin, int adjoint, cudaStream_t stream) {
  using namespace blip3o;
  const int64_t heads = num_heads + 2 * static_cast<int64_t>(num_kv_heads);
  if (num_heads < 0 || num_kv_heads < 0 || shape.width % 2 != 0 ||
      !countable(shape, heads * shape.width)) {
    return cudaErrorInvalidValue;
  }
  for (const blip3o_heads& x : {packed, q, k, v}) {
    if (!countable(shape, heads * x.head_stride)) return cudaErrorInvalidValue;
  }
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    Rope<T, P> a{};
    a.half = static_cast<int>(shape.width / 2);
    a.turned = turned;
    a.first_key = num_heads;
    a.first_value = num_heads + num_kv_heads;
    a.packed = Heads<T>(packed);
    a.q = Heads<T>(q);
    a.k = Heads<T>(k);
    a.v = Heads<T>(v);
    a.cos = static_cast<const P*>(cos);
    a.sin = static_cast<const P*>(sin);
    bool whole_words = a.half % kPack<T> == 0 && aligned({cos, sin});
    for (const blip3o_heads& x : {packed, q, k, v}) whole_words &= aligned(x, sizeof(T));
    return whole_words ? launch_rope<T, P, kPack<T>>(a, shape, heads, adjoint, stream)
                       : launch_rope<T, P, 1>(a, shape, heads, adjoint, stream);
  });
}
