/*
 * C interface of the CUDA kernels: plain pointers and strides, no torch, no C++.
 *
 * Letters are those of the library: B batch, N tokens, D width, H query heads, K key and value heads,
 * d head width, I inner width. Strides count elements; the last axis of every tensor is contiguous.
 * Every launcher enqueues on `stream` of the current device, never synchronises, and returns a
 * cudaError_t: 0, or why nothing was enqueued (cudaErrorInvalidValue: a dtype pair or a width that
 * has no kernel). Empty tensors are legal. Outputs are contiguous and must not overlap inputs.
 */
#pragma once

#include <stdint.h>

#include <driver_types.h> /* cudaStream_t */

#define BLIP3O_API __attribute__((visibility("default")))

/* The widest row of sandwich_norm and sandwich_join. */
#define BLIP3O_MAX_WIDTH 3072

#ifdef __cplusplus
extern "C" {
#endif

enum { BLIP3O_FLOAT32 = 0, BLIP3O_FLOAT16 = 1, BLIP3O_BFLOAT16 = 2 };

/* Activations, and parameters beside them: the same dtype or fp32. */
typedef struct {
  int activation;
  int parameter;
} blip3o_dtypes;

typedef struct {
  int64_t batch, tokens, width;
} blip3o_shape;

/* [B, N, width] of an activation; data == NULL means absent where the launcher allows it. */
typedef struct {
  const void* data;
  int64_t batch_stride, row_stride;
} blip3o_rows;

/* Heads [B, N, heads, d] of an activation, read or written. */
typedef struct {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
} blip3o_heads;

/* rms(rms(x; w1); w2) * (1 + scale) + shift: w1, w2 [D]; shift, scale [B, D]. */
typedef struct {
  const void *w1, *w2, *shift, *scale;
  int64_t shift_stride, scale_stride;
} blip3o_modulation;

/* Gradients of a modulation, in the parameters' dtype: [D], [D], [B, D], [B, D]. */
typedef struct {
  void *w1, *w2, *shift, *scale;
} blip3o_modulation_grads;

/* h = norm(x). */
BLIP3O_API int blip3o_sandwich_norm_forward(blip3o_dtypes dtypes, blip3o_shape shape,
                                            blip3o_rows x, blip3o_modulation modulation, float eps,
                                            void* h, cudaStream_t stream);

/*
 * modulation.shift is not read. `workspace` holds blip3o_sandwich_workspace(dtype, shape, 1) floats; NULL:
 * only dx is wanted.
 */
BLIP3O_API int blip3o_sandwich_norm_backward(blip3o_dtypes dtypes, blip3o_shape shape,
                                             blip3o_rows dh, blip3o_rows x,
                                             blip3o_modulation modulation, float eps, void* dx,
                                             blip3o_modulation_grads grads, float* workspace,
                                             cudaStream_t stream);

/*
 * x_out = x + norm(layer_scale * y; post), h = norm(x_out; pre). layer_scale NULL: 1; post NULL: the
 * branch is added as it is; pre NULL: no h.
 */
BLIP3O_API int blip3o_sandwich_join_forward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows x,
                                            blip3o_rows y, const void* layer_scale,
                                            const blip3o_modulation* post,
                                            const blip3o_modulation* pre, float eps, void* x_out,
                                            void* h, cudaStream_t stream);

/*
 * dx_out or dh absent: zero. Gradients of what the forward was not given are not written.
 * `workspace` holds blip3o_sandwich_workspace(dtype, shape, 2) floats; NULL: only dx and dy are wanted.
 */
BLIP3O_API int blip3o_sandwich_join_backward(
    blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows dx_out, blip3o_rows dh,
    blip3o_rows x_out, blip3o_rows y, const void* layer_scale, const blip3o_modulation* post,
    const blip3o_modulation* pre, float eps, void* dx, void* dy, void* dlayer_scale,
    blip3o_modulation_grads dpost, blip3o_modulation_grads dpre, float* workspace,
    cudaStream_t stream);

/* Floats of scratch on the current device for the backward of an op with so many modulations. */
BLIP3O_API int64_t blip3o_sandwich_workspace(int activation, blip3o_shape shape, int modulations);

/*
 * Heads that lie packed, and the same heads apart: the first num_heads in q, num_kv_heads each in k and v.
 * adjoint == 0: reads packed and writes q, k, v, the first `turned` heads rotated, the rest copied; else
 * the transposed map, the other way. shape.width is d. cos, sin [N, d] contiguous, in the parameter
 * dtype. In place, q is packed and has all heads.
 */
BLIP3O_API int blip3o_rope(blip3o_dtypes dtypes, blip3o_shape shape, int num_heads,
                           int num_kv_heads, int turned, blip3o_heads packed, blip3o_heads q,
                           blip3o_heads k, blip3o_heads v, const void* cos, const void* sin,
                           int adjoint, cudaStream_t stream);

/*
 * softmax(rope(q) rope(k)^T / sqrt(d)) v, fp16 or bf16. shape: batch, queries N, d; d is 64. q rows [H d], k and v
 * rows [K d], `keys` of them, K divides H; cos, sin [N, d] contiguous. rotates_keys == 0: k is rotated
 * already; else keys is N. out [B, N, H d]. Pointers and strides are multiples of 16 bytes.
 */
BLIP3O_API int blip3o_rope_attention(int dtype, blip3o_shape shape, int64_t keys, int num_heads,
                                     int num_kv_heads, blip3o_rows q, blip3o_rows k,
                                     blip3o_rows v, const float* cos, const float* sin,
                                     int rotates_keys, void* out, cudaStream_t stream);

/* silu(gate) * up of rows [2I], gate first. shape.width is I. */
BLIP3O_API int blip3o_swiglu_forward(int dtype, blip3o_shape shape, blip3o_rows gate_up, void* out,
                                     cudaStream_t stream);

BLIP3O_API int blip3o_swiglu_backward(int dtype, blip3o_shape shape, blip3o_rows dout,
                                      blip3o_rows gate_up, void* dgate_up, cudaStream_t stream);

/*
 * Slopes of earlier evaluations, [count, B, N, C] in fp32: each row contiguous, `stride` elements apart.
 * *slot, on the device, is the row that the newest slope overwrites, after it was read; slot NULL, or *slot
 * outside 0 .. count - 1: none.
 */
typedef struct {
  float* data;
  int64_t stride, count;
  const int64_t* slot;
} blip3o_slopes;

/*
 * out = c[0] x + c[1] v + sum_r c[2 + r] slopes[r] of an fp32 state; c are count + 2 numbers on the
 * device, and a row whose coefficient is 0 is not read. With guidance != 1 the velocity is [2B, N, C],
 * conditional half first, and v is uncond + guidance * (cond - uncond). The result is clamped to
 * [-*bound, *bound], on the device too; bound NULL: not. `out` may be x.data where x is contiguous.
 */
BLIP3O_API int blip3o_solver_update(int velocity_dtype, blip3o_shape shape, blip3o_rows x,
                                    blip3o_rows velocity, blip3o_slopes slopes,
                                    const float* coefficients, const float* bound,
                                    float guidance, float* out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
