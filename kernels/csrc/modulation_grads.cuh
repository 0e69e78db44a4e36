// Second stage of the gradients of weights and modulations: partial sums of the units, in a fixed
// order and without atomics, so that every run gives the same bits.
#pragma once

#include "sandwich.cuh"

namespace blip3o {

/// Partial sums that a unit writes for each of its modulations: Q, P, R of double_norm.cuh, each
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

/// Rows of one unit in a backward: enough units to fill a device, long enough that partial sums are
/// small beside the rows they come from. A function of the shape alone.
inline int backward_rows(blip3o_shape shape) {
  constexpr int kFewest = 8, kMost = 64;
  constexpr int64_t kUnits = 512;
  int rows = kFewest;
  while (rows < kMost && shape.batch * ceil_div<int64_t>(shape.tokens, 2 * rows) >= kUnits) rows *= 2;
  return rows;
}

/// Reduces `partial` [units][slots][kSums][width] and writes every gradient that has a place.
int launch_modulation_grads(int parameter_dtype, blip3o_shape shape, const Units& units,
                            const float* partial, int slots, const ModulationGrads* wanted,
                            int count, float eps, cudaStream_t stream);

}  // namespace blip3o
