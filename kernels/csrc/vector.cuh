// Memory access: 16 bytes a thread where addresses allow it, arithmetic in fp32.
//
// Plain loads throughout. `ld.global.nc` (__ldg, or const __restrict__ kernel parameters) promises
// that memory never changes, so the compiler may move it above `griddepcontrol.wait`, where the
// kernel before is still writing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "blip3o.h"

namespace blip3o {

inline constexpr int kAccessBytes = 16;

/// Elements of one 16-byte access.
template <typename T>
inline constexpr int kPack = kAccessBytes / static_cast<int>(sizeof(T));

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Words {
  T at[kCount];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// To the nearest T and back; two at a time, which is one instruction each way.
template <typename T, int kCount>
__device__ __forceinline__ void round_to(float (&x)[kCount]) {
  static_assert(kCount % 2 == 0);
  if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      float2 pair = make_float2(x[i], x[i + 1]);
      if constexpr (std::is_same_v<T, __half>) {
        pair = __half22float2(__float22half2_rn(pair));
      } else {
        pair = __bfloat1622float2(__float22bfloat162_rn(pair));
      }
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }
}

/// Elements of T that travel in one access when kCount of them are wanted.
template <typename T, int kCount>
inline constexpr int kWord = kCount < kPack<T> ? kCount : kPack<T>;

/// kCount consecutive elements at an address aligned for kWord of them.
template <int kCount, typename T>
__device__ __forceinline__ void load(float (&out)[kCount], const T* from) {
  constexpr int kWidth = kWord<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    const auto word = *reinterpret_cast<const Words<T, kWidth>*>(from + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[i + j] = widen(word.at[j]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const float (&in)[kCount]) {
  constexpr int kWidth = kWord<T, kCount>;
#pragma unroll
  for (int i = 0; i < kCount; i += kWidth) {
    Words<T, kWidth> word;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) word.at[j] = narrow<T>(in[i + j]);
    *reinterpret_cast<Words<T, kWidth>*>(to + i) = word;
  }
}

/// [B, N, width] with a contiguous last axis; null where absent.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch_stride, row_stride;

  Rows() = default;
  explicit Rows(const blip3o_rows& rows)
      : data(static_cast<const T*>(rows.data)),
        batch_stride(rows.batch_stride),
        row_stride(rows.row_stride) {}

  __device__ __forceinline__ const T* row(int64_t batch, int64_t token) const {
    return data + batch * batch_stride + token * row_stride;
  }
};

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kAccessBytes == 0;
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!aligned(pointer)) return false;
  }
  return true;
}

/// Whether every row starts at a multiple of 16 bytes.
inline bool aligned(const blip3o_rows& rows, int64_t element_bytes) {
  return rows.data == nullptr ||
         (aligned(rows.data) && rows.batch_stride * element_bytes % kAccessBytes == 0 &&
          rows.row_stride * element_bytes % kAccessBytes == 0);
}

/// Whether every head starts at a multiple of 16 bytes.
inline bool aligned(const blip3o_heads& heads, int64_t element_bytes) {
  return aligned(blip3o_rows{heads.data, heads.batch_stride, heads.row_stride}, element_bytes) &&
         heads.head_stride * element_bytes % kAccessBytes == 0;
}

/// Calls `run` with a flag that is a constant of its type.
template <typename Run>
int with_flag(bool flag, Run run) {
  return flag ? run(std::true_type{}) : run(std::false_type{});
}

/// Calls `run` with a value of the dtype's C++ type.
template <typename Run>
int with_dtype(int dtype, Run run) {
  switch (dtype) {
    case BLIP3O_FLOAT32: return run(float{});
    case BLIP3O_FLOAT16: return run(__half{});
    case BLIP3O_BFLOAT16: return run(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

/// Calls `run` with values of the activation's and the parameter's C++ types.
template <typename Run>
int with_dtypes(blip3o_dtypes dtypes, Run run) {
  return with_dtype(dtypes.activation, [&](auto activation) -> int {
    if (dtypes.parameter == dtypes.activation) return run(activation, activation);
    if (dtypes.parameter == BLIP3O_FLOAT32) return run(activation, float{});
    return cudaErrorInvalidValue;
  });
}

}  // namespace blip3o
