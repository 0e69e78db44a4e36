// Second stage of the gradients of weights and modulations: partial sums of the blocks, in a fixed
// order and without atomics, so that every run gives the same bits.
#pragma once

#include "sandwich.cuh"

namespace blip3o {

/// Partial sums that a block writes for each of its modulations: Q, P, R of double_norm.cuh, each
/// [width].
inline constexpr int kSums = 3;

/// A modulation (null: none), the layer scale before it (null: 1), and where gradients go.
struct ModulationGrads {
  const blip3o_modulation* modulation;
  const void* layer_scale;
  blip3o_modulation_grads grads;
  void* dlayer_scale;
  int slot;  // its place in the partial sums
};

/// What the parameters of a norm need, summed over the rows of a thread's group: Q, P, R of
/// double_norm.cuh.
struct ModulationSums {
  Share q, p, r;

  /// Adds one element x of a row, with gradient d; returns its dx.
  __device__ __forceinline__ float add(int i, float d, float x, const Weights& weights, float scale,
                                       float pull) {
    const float scaled = scale * d, pulled = pull * x;
    q[i] += d;
    p[i] += scaled * x;
    r[i] += pulled * x;
    return weights.gain[i] * scaled - weights.square[i] * pulled;
  }

  /// Adds the groups of the block in their order, in shared memory that nobody else uses by now, and
  /// writes the sums.
  template <typename C>
  __device__ __forceinline__ void store(float* to, const C& columns) const {
    float* const of_groups = reinterpret_cast<float*>(shared_memory());
    const int count = kSums * columns.width, threads = static_cast<int>(blockDim.x * blockDim.y);
    float* const mine = of_groups + static_cast<int>(threadIdx.y) * count;
    __syncthreads();
    columns.store(mine, q);
    columns.store(mine + columns.width, p);
    columns.store(mine + 2 * columns.width, r);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < count; i += threads) {
      float sum = of_groups[i];
      for (int group = 1; group < static_cast<int>(blockDim.y); ++group) {
        sum += of_groups[group * count + i];
      }
      to[i] = sum;
    }
  }
};

/// The cut of a backward. Sixteen rows are about what a block spends on parameters and partial sums.
inline Cut backward_cut(int activation, blip3o_shape shape) {
  constexpr int kCost = 16;
  return Cut(shape, activation == BLIP3O_FLOAT32 ? kMaxThreads / 2 : kMaxThreads, kMaxThreads, kCost);
}

/// Reduces `partial` [blocks][slots][kSums][width] and writes every gradient that has a place.
int launch_modulation_grads(int parameter_dtype, blip3o_shape shape, const Cut& cut,
                            const float* partial, int slots, const ModulationGrads* wanted,
                            int count, float eps, cudaStream_t stream);

}  // namespace blip3o
