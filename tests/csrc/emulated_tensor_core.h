// Stands in for kernels/csrc/tensor_core.cuh: every lane shows the warp what it holds, waits, and
// gathers what the instruction would hand it. Included after emulation.h.
#pragma once

#define BLIP3O_TENSOR_CORE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstring>

namespace emulation {

/// What the lanes of each warp have shown one another: addresses, or four words.
inline std::vector<std::array<const void*, kWarp>> shown_rows;
inline std::vector<std::array<std::array<uint32_t, 4>, kWarp>> shown_words;

/// Calls `show`, lets the warp come together, calls `gather`, and keeps it together until all have.
template <typename Show, typename Gather>
void exchange(Show show, Gather gather) {
  Thread& self = *block.running;
  if (shown_rows.size() < block.warps.size()) {
    shown_rows.resize(block.warps.size());
    shown_words.resize(block.warps.size());
  }
  if (block.warps[self.warp].members != kWarp) std::abort();  // .aligned: all lanes or none
  show(self.warp, self.lane);
  wait(block.warps[self.warp]);
  gather(self.warp, self.lane);
  wait(block.warps[self.warp]);
}

}  // namespace emulation

inline void __syncwarp() {
  emulation::wait(emulation::block.warps[emulation::block.running->warp]);
}

namespace blip3o {

template <bool kTransposed, typename T>
void load_matrices(uint32_t (&out)[4], const T* row) {
  using namespace emulation;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  exchange([&](int warp, int lane) { shown_rows[warp][lane] = row; },
           [&](int warp, int lane) {
             const int g = lane / 4, t = lane % 4;
             for (int m = 0; m < 4; ++m) {
               T pair[2];
               for (int i = 0; i < 2; ++i) {
                 const int r = kTransposed ? 2 * t + i : g, c = kTransposed ? g : 2 * t + i;
                 pair[i] = static_cast<const T*>(shown_rows[warp][8 * m + r])[c];
               }
               std::memcpy(&out[m], pair, sizeof out[m]);
             }
           });
}

/// Number `i` of the two in a word.
template <typename T>
float half_of(uint32_t word, int i) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return static_cast<float>(pair[i]);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  float left[2][16], right[16][2];  // rows g and g + 8; columns 2t and 2t + 1
  exchange([&](int warp, int lane) { shown_words[warp][lane] = {a[0], a[1], a[2], a[3]}; },
           [&](int warp, int lane) {
             const int g = lane / 4;
             for (int k = 0; k < 16; ++k) {
               const auto& from = shown_words[warp][4 * g + k % 8 / 2];
               for (int r = 0; r < 2; ++r) left[r][k] = half_of<T>(from[k / 8 * 2 + r], k % 2);
             }
           });
  exchange([&](int warp, int lane) { shown_words[warp][lane] = {b0, b1, 0, 0}; },
           [&](int warp, int lane) {
             const int t = lane % 4;
             for (int k = 0; k < 16; ++k) {
               for (int n = 0; n < 2; ++n) {
                 const auto& from = shown_words[warp][4 * (2 * t + n) + k % 8 / 2];
                 right[k][n] = half_of<T>(from[k / 8], k % 2);
               }
             }
           });
  for (int r = 0; r < 2; ++r) {
    for (int n = 0; n < 2; ++n) {
      for (int k = 0; k < 16; ++k) c[2 * r + n] += left[r][k] * right[k][n];
    }
  }
}

inline float exp2_approximately(float x) { return std::exp2(x); }

}  // namespace blip3o
