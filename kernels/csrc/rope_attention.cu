// Attention with rotary positions in its prologue: softmax(rope(q) rope(k)^T / 8) v for heads of 64.
//
// A block takes 64 or 128 queries of one head, a warp 16 or 32 of them. Keys and values pass through
// shared memory in chunks of 64, the next chunk travelling while tensor cores work on this one; queries
// and keys are rotated there, so nobody writes them back. Softmax is the running one (arXiv:1805.02867),
// attention tiled after it (arXiv:2205.14135). All is fp32 but for the operands of the products: rotated
// q and k are rounded once, as `rope` rounds them, and the weights once.
//
// Per head and tile of queries: reads the tile, all keys and values and their rows of the tables, writes
// the tile. A query's result does not depend on the tile that holds it.
#include "async_copy.cuh"
#include "launch.cuh"
#include "rotation.cuh"
#include "tensor_core.cuh"

namespace blip3o {
namespace {

constexpr int kHead = 64;
constexpr int kHalf = kHead / 2;
constexpr int kChunk = 64;              // keys in shared memory at a time
constexpr int kSet = 16;                // queries of one tensor-core product
constexpr int kEight = 8;               // 16-bit elements of an access; side of an operand's matrix
constexpr int kPacks = kHead / kEight;  // accesses of a row
constexpr int kPitch = kHead + kEight;  // spreads eight rows of a matrix over all banks
constexpr int kWarpSize = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kManyBlocks = 264;  // of 128 queries: two for each multiprocessor of an H100

template <typename T>
using Pack = Words<T, kEight>;

template <typename T>
struct RopeAttention {
  int tokens, keys, heads, group, tiles;  // group: query heads that share a key head
  bool rotates_keys;
  Rows<T> q, k, v;
  const float *cos, *sin;
  T* out;
};

/// A thread's part of kRows rows of a head: a pack of the lower half, and the one it turns with.
template <int kRows>
struct Part {
  static constexpr int kPairs = kPacks / 2;
  static constexpr int kItems = kRows * kPairs / kThreads;

  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x + i * kThreads) / kPairs;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % kPairs * kEight;
  }

  /// Starts to copy rows from `first` on of the head at `from`; zeros stand for those from `count` on.
  template <typename T>
  static __device__ __forceinline__ void copy(T* to, const T* from, int64_t stride, int first,
                                              int count) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int token = first + row(i);
      const bool present = token < count;
      const T* source = from + (present ? token : 0) * stride + column();
      T* target = to + row(i) * kPitch + column();
      copy_async(target, source, present);
      copy_async(target + kHalf, source + kHalf, present);
    }
  }

  /// Rotates what this thread has copied, once it is there.
  template <typename T>
  static __device__ __forceinline__ void rotate_copied(T* rows, const float* cos, const float* sin,
                                                       int first, int count) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int token = first + row(i);
      if (token >= count) continue;
      T* at = rows + row(i) * kPitch + column();
      float low[kEight], high[kEight];
      load(low, at);
      load(high, at + kHalf);
      const int angle = token * kHead + column();
      rotate<kEight, false>(low, high, cos + angle, sin + angle, kHalf);
      store(at, low);
      store(at + kHalf, high);
    }
  }
};

/// Two numbers as one operand word.
template <typename T>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  struct alignas(4) {
    T at[2];
  } pair{{narrow<T>(first), narrow<T>(second)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// The largest, or the sum, over the four lanes that hold a row.
template <bool kLargest>
__device__ __forceinline__ float over_row(float x) {
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = kLargest ? fmaxf(x, other) : x + other;
  }
  return x;
}

/// A warp's queries, 16 of them `kSets` times: their operands, and what the running softmax knows of
/// rows g and g + 8 of each set. An operand of keys or values serves every set.
template <typename T, int kSets>
struct Queries {
  static constexpr int kSteps = kHead / kSet;    // products of depth 16 along a head
  static constexpr int kTiles = kHead / kEight;  // columns, and keys of a chunk, in eights
  using Tiles = float[kTiles][4];

  uint32_t q[kSets][kSteps][4];
  Tiles out[kSets] = {};
  float largest[kSets][2], total[kSets][2] = {};

  __device__ __forceinline__ Queries(const T* rows, int lane) {
    const T* at = rows + lane % kSet * kPitch + lane / kSet * kEight;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      largest[set][0] = largest[set][1] = -INFINITY;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices<false>(q[set][step], at + set * kSet * kPitch + step * kSet);
      }
    }
  }

  /// Takes in a chunk of which the first `count` keys exist.
  __device__ __forceinline__ void attend(const T* k, const T* v, int count, int lane) {
    Tiles logits[kSets] = {};
    multiply_keys(logits, k, lane);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if (count < kChunk) hide(logits[set], count, lane);
      weigh(set, logits[set]);
    }
    add_values(logits, v, lane);
  }

  __device__ __forceinline__ void multiply_keys(Tiles (&logits)[kSets], const T* k, int lane) {
    // Matrices of a load: keys 0-7 at columns 0-7 and 8-15, then keys 8-15.
    const T* at = k + (lane / 16 * kEight + lane % 8) * kPitch + lane / 8 % 2 * kEight;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b[4];
        load_matrices<false>(b, at + tile * kEight * kPitch + step * kSet);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          multiply_add<T>(logits[set][tile], q[set][step], b[0], b[1]);
          multiply_add<T>(logits[set][tile + 1], q[set][step], b[2], b[3]);
        }
      }
    }
  }

  /// Keys from `count` on weigh nothing.
  static __device__ __forceinline__ void hide(Tiles& logits, int count, int lane) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      const int key = i / 4 * kEight + lane % 4 * 2 + i % 2;
      if (key >= count) logits[i / 4][i % 4] = -INFINITY;
    }
  }

  /// Logits to weights relative to the largest so far, to which what was added before is brought.
  __device__ __forceinline__ void weigh(int set, Tiles& logits) {
    constexpr float kScale = 1.44269504089f / 8;  // log2(e) / sqrt(kHead)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = largest[set][r];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        most = fmaxf(most, fmaxf(logits[tile][2 * r], logits[tile][2 * r + 1]));
      }
      most = over_row<true>(most);
      const float before = exp2_approximately((largest[set][r] - most) * kScale);
      largest[set][r] = most;
      total[set][r] *= before;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          logits[tile][i] = exp2_approximately(logits[tile][i] * kScale - most * kScale);
          total[set][r] += logits[tile][i];
          out[set][tile][i] *= before;
        }
      }
    }
  }

  __device__ __forceinline__ void add_values(const Tiles (&weights)[kSets], const T* v, int lane) {
    // Matrices of a load: keys 0-7 and 8-15 at columns 0-7, then at columns 8-15.
    const T* at = v + lane % 16 * kPitch + lane / 16 * kEight;
#pragma unroll
    for (int step = 0; step < kChunk / kSet; ++step) {
      uint32_t a[kSets][4];
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // two tiles of weights are one operand
          const float* pair = &weights[set][2 * step + i / 2][i % 2 * 2];
          a[set][i] = packed<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b[4];
        load_matrices<true>(b, at + step * kSet * kPitch + tile * kEight);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          multiply_add<T>(out[set][tile], a[set], b[0], b[1]);
          multiply_add<T>(out[set][tile + 1], a[set], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void put(T* rows, int lane) const {
#pragma unroll
    for (int i = 0; i < kSets * 2; ++i) {
      const int set = i / 2, r = i % 2;
      const float part = 1.f / over_row<false>(total[set][r]);
      T* at = rows + (set * kSet + r * kEight + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* pair = &out[set][tile][2 * r];
        *reinterpret_cast<uint32_t*>(at + tile * kEight) =
            packed<T>(pair[0] * part, pair[1] * part);
      }
    }
  }
};

/// Two blocks a multiprocessor: one computes while the other waits for memory.
template <typename T, int kSets>
__global__ void __launch_bounds__(kThreads, 2) rope_attention(const RopeAttention<T> a) {
  constexpr int kWarpRows = kSets * kSet;
  constexpr int kTile = kWarps * kWarpRows;
  static_assert(kTile <= 2 * kChunk, "queries, and results, lie where keys and values do");
  constexpr int kBuffer = kChunk * kPitch;
  // Keys and values of two chunks: one is filled while the other is read.
  alignas(kAccessBytes) __shared__ T shared[4 * kBuffer];
  await_previous();
  const int tile = blockIdx.x % a.tiles;
  const int head = blockIdx.x / a.tiles % a.heads;
  const int64_t batch = blockIdx.x / a.tiles / a.heads;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = tile * kTile;
  T* const mine = shared + warp * kWarpRows * kPitch;

  using Tile = Part<kTile>;
  Tile::copy(shared, a.q.row(batch, 0) + head * kHead, a.q.row_stride, first, a.tokens);
  await_copies();
  Tile::rotate_copied(shared, a.cos, a.sin, first, a.tokens);
  __syncthreads();
  Queries<T, kSets> queries(mine, lane);
  __syncthreads();

  using Chunk = Part<kChunk>;
  const T* const keys = a.k.row(batch, 0) + head / a.group * kHead;
  const T* const values = a.v.row(batch, 0) + head / a.group * kHead;
  const auto copy_chunk = [&](T* to, int begin) {
    Chunk::copy(to, keys, a.k.row_stride, begin, a.keys);
    Chunk::copy(to + kBuffer, values, a.v.row_stride, begin, a.keys);
  };
  T *chunk = shared, *next = shared + 2 * kBuffer;
  copy_chunk(chunk, 0);
  for (int begin = 0; begin < a.keys; begin += kChunk) {
    await_copies();
    if (a.rotates_keys) Chunk::rotate_copied(chunk, a.cos, a.sin, begin, a.keys);
    // Also says that nobody reads the other chunk any more, which is filled from here on.
    __syncthreads();
    if (begin + kChunk < a.keys) copy_chunk(next, begin + kChunk);
    queries.attend(chunk, chunk + kBuffer, a.keys - begin, lane);
    T* const read = chunk;
    chunk = next;
    next = read;
  }

  __syncthreads();
  queries.put(mine, lane);
  __syncwarp();
  T* const out = a.out + ((batch * a.tokens + first) * a.heads + head) * kHead;
  for (int item = lane; item < kWarpRows * kPacks; item += kWarpSize) {
    const int row = item / kPacks, column = item % kPacks * kEight;
    const int token = warp * kWarpRows + row;
    if (first + token < a.tokens) {
      T* to = out + static_cast<int64_t>(token) * a.heads * kHead + column;
      *reinterpret_cast<Pack<T>*>(to) =
          *reinterpret_cast<const Pack<T>*>(mine + row * kPitch + column);
    }
  }
}

template <typename T, int kSets>
int launch_tiles(RopeAttention<T>& a, int64_t batch, cudaStream_t stream) {
  constexpr int kTile = kSets * kSet * kWarps;
  a.tiles = (a.tokens + kTile - 1) / kTile;
  return launch<rope_attention<T, kSets>>(batch * a.heads * a.tiles, dim3(kThreads), a, stream);
}

template <typename T>
int launch_attention(RopeAttention<T>& a, int64_t batch, cudaStream_t stream) {
  const bool many = batch * a.heads * (a.tokens / 128) >= kManyBlocks;
  return many ? launch_tiles<T, 2>(a, batch, stream) : launch_tiles<T, 1>(a, batch, stream);
}

}  // namespace
}  // namespace blip3o

int blip3o_rope_attention(int dtype, blip3o_shape shape, int64_t keys, int num_heads,
                          int num_kv_heads, blip3o_rows q, blip3o_rows k, blip3o_rows v,
                          const float* cos, const float* sin, int rotates_keys, void* out,
                          cudaStream_t stream) {
  using namespace blip3o;
  const bool fits = shape.width == kHead && num_heads > 0 && num_kv_heads > 0 &&
                    num_heads % num_kv_heads == 0 && shape.batch >= 0 && shape.tokens >= 0 &&
                    shape.tokens <= INT_MAX / kHead && keys <= INT_MAX / kHead &&
                    (keys > 0 || shape.tokens == 0) && (!rotates_keys || keys == shape.tokens);
  constexpr int64_t kBytes = sizeof(__half);
  if (!fits || !aligned(q, kBytes) || !aligned(k, kBytes) || !aligned(v, kBytes) ||
      !aligned({cos, sin, out})) {
    return cudaErrorInvalidValue;
  }
  const auto run = [&](auto element) {
    using T = decltype(element);
    RopeAttention<T> a{};
    a.tokens = static_cast<int>(shape.tokens);
    a.keys = static_cast<int>(keys);
    a.heads = num_heads;
    a.group = num_heads / num_kv_heads;
    a.rotates_keys = rotates_keys != 0;
    a.q = Rows<T>(q);
    a.k = Rows<T>(k);
    a.v = Rows<T>(v);
    a.cos = cos;
    a.sin = sin;
    a.out = static_cast<T*>(out);
    return launch_attention(a, shape.batch, stream);
  };
  if (dtype == BLIP3O_FLOAT16) return run(__half{});
  if (dtype == BLIP3O_BFLOAT16) return run(__nv_bfloat16{});
  return cudaErrorInvalidValue;
}
