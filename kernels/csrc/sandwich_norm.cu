// h = rms(rms(x; w1); w2) * (1 + scale) + shift, and its backward. Arithmetic: double_norm.cuh.
#include "modulation_grads.cuh"

namespace blip3o {
namespace {

template <typename T, typename P>
struct NormForward {
  Cut cut;
  int width;
  float inverse_width, eps;
  Rows<T> x;
  Modulation<P> modulation;
  T* h;
};

/// Turns of rows in shared memory.
inline constexpr int kStages = 4;

/// How a forward is cut: 64 registers a thread, and parameters that cost a block as much as eight rows.
inline constexpr int kForwardThreads = 256, kForwardResident = 1024, kForwardCost = 8;

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxGroup, 2) norm_forward(const NormForward<T, P> a) {
  await_previous();
  const Range range = a.cut.here();
  const Columns<T, kAligned> columns{a.cut.group, a.width};
  const Pipeline<T, 1, kStages, kAligned> rows(columns);
  int token = range.token + static_cast<int>(threadIdx.y);
  const auto fetch = [&](int turn, int coming) {
    rows.fetch(turn, 0, a.x.row(range.batch, coming), coming < range.end);
    commit_copies();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) fetch(turn, token + turn * a.cut.groups);
  const Weights weights =
      load_weights<true, P>(a.modulation, true, nullptr, range.batch, a.eps, columns);
  const int turns = a.cut.rows / a.cut.groups;
  bool odd = false;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn, token += a.cut.groups) {
    fetch(turn + kStages - 1, token + (kStages - 1) * a.cut.groups);
    await_batches<kStages - 1>();
    Share x = rows.read(turn, 0);
    norm_row(x, weights, a.inverse_width, a.eps, odd);
    if (token < range.end) columns.store(a.h + a.cut.row(range.batch, token) * a.width, x);
  }
}

template <typename T, typename P>
struct NormBackward {
  Cut cut;
  int width;
  float inverse_width, eps;
  Rows<T> dh, x;
  Modulation<P> modulation;
  T* dx;
  float* partial;
};

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_backward(const NormBackward<T, P> a) {
  await_previous();
  const Range range = a.cut.here();
  const Columns<T, kAligned> columns{a.cut.group, a.width};
  const Pipeline<T, 2, kStages, kAligned> rows(columns);
  int token = range.token + static_cast<int>(threadIdx.y);
  const auto fetch = [&](int turn, int coming) {
    rows.fetch(turn, 0, a.dh.row(range.batch, coming), coming < range.end);
    rows.fetch(turn, 1, a.x.row(range.batch, coming), coming < range.end);
    commit_copies();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) fetch(turn, token + turn * a.cut.groups);
  const Weights weights =
      load_weights<false, P>(a.modulation, true, nullptr, range.batch, a.eps, columns);
  ModulationSums sums_of_rows{};
  const int turns = a.cut.rows / a.cut.groups;
  bool odd = false;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn, token += a.cut.groups) {
    fetch(turn + kStages - 1, token + (kStages - 1) * a.cut.groups);
    await_batches<kStages - 1>();
    const Share dh = rows.read(turn, 0), x = rows.read(turn, 1);
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sums[0] += weights.square[i] * x[i] * x[i];
      sums[1] += weights.gain[i] * dh[i] * x[i];
    }
    sum_over_group(sums, odd);
    if (token >= range.end) continue;
    const float scale = double_norm_scale(sums[0], a.inverse_width, a.eps);
    const float pull = double_norm_pull(scale, sums[1], a.inverse_width);
    Share dx;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      dx[i] = sums_of_rows.add(i, dh[i], x[i], weights, scale, pull);
    }
    columns.store(a.dx + a.cut.row(range.batch, token) * a.width, dx);
  }
  if (a.partial == nullptr) return;
  await_copies();
  const int64_t block = blockIdx.x;
  sums_of_rows.store(a.partial + block * kSums * a.width, columns);
}

}  // namespace
}  // namespace blip3o

int blip3o_sandwich_norm_forward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows x,
                                 blip3o_modulation modulation, float eps, void* h,
                                 cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    const Cut cut(shape, kForwardThreads, kForwardResident, kForwardCost);
    const int width = static_cast<int>(shape.width);
    const NormForward<T, P> a{
        cut, width, 1.f / width, eps, Rows<T>(x), Modulation<P>(&modulation), static_cast<T*>(h)};
    const bool whole_words = width % kPack<T> == 0 && aligned(x, sizeof(T)) && aligned(h) &&
                             aligned(&modulation, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      const int shared = cut.shared<Pipeline<T, 1, kStages, words>>();
      return launch<norm_forward<T, P, words>>(cut.blocks, cut.threads(), a, stream, shared);
    });
  });
}

int blip3o_sandwich_norm_backward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows dh,
                                  blip3o_rows x, blip3o_modulation modulation, float eps, void* dx,
                                  blip3o_modulation_grads grads, float* workspace,
                                  cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  const Cut cut = backward_cut(dtypes.activation, shape);
  const int error = with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    const int width = static_cast<int>(shape.width);
    const NormBackward<T, P> a{cut, width, 1.f / width, eps, Rows<T>(dh), Rows<T>(x),
                               Modulation<P>(&modulation), static_cast<T*>(dx), workspace};
    const bool whole_words = width % kPack<T> == 0 && aligned(dh, sizeof(T)) &&
                             aligned(x, sizeof(T)) && aligned({dx, workspace}) &&
                             aligned(&modulation, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      const int shared = cut.shared<Pipeline<T, 2, kStages, words>>();
      return launch<norm_backward<T, P, words>>(cut.blocks, cut.threads(), a, stream, shared);
    });
  });
  if (error != cudaSuccess || workspace == nullptr) return error;
  const ModulationGrads wanted{&modulation, nullptr, grads, nullptr, 0};
  return launch_modulation_grads(dtypes.parameter, shape, cut, workspace, 1, &wanted, 1, eps,
                                 stream);
}

int64_t blip3o_sandwich_workspace(int activation, blip3o_shape shape, int modulations) {
  using namespace blip3o;
  if (!has_kernel(shape)) return 1;
  const int64_t floats = backward_cut(activation, shape).blocks * modulations * kSums * shape.width;
  return floats > 0 ? floats : 1;  // the memory of an empty tensor would be NULL
}
