// Closes one residual sub-layer and opens the next:
//
//   x' = x + norm(layer_scale y; post)      h = norm(x'; pre)
//
// The backward needs c of the pre-norm and then c of the post-norm, which depends on the first through
// the gradient of x'. It does so linearly, so that sums of one round give both: with r, pull, square
// of the pre-norm, g = gain dh of the pre-norm and k = gain y of the post-norm,
//
//   dx = dx_out + r g - square x' pull
//   c_post = sum(dx k) = sum(dx_out k) + r sum(g k) - pull sum(square x' k)
#include "modulation_grads.cuh"

namespace blip3o {
namespace {

template <typename T, typename P>
struct JoinForward {
  Cut cut;
  int width;
  float inverse_width, eps;
  Rows<T> x, y;
  const P* layer_scale;
  Modulation<P> post, pre;
  T *x_out, *h;
};

/// Turns of rows in shared memory.
inline constexpr int kForwardStages = 4, kBackwardStages = 2;

/// How a forward is cut: 96 registers a thread, and parameters that cost a block as much as eight rows.
inline constexpr int kForwardThreads = 256, kForwardResident = 640, kForwardCost = 8;

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxGroup, 1) join_forward(const JoinForward<T, P> a) {
  await_previous();
  const Range range = a.cut.here();
  const Columns<T, kAligned> columns{a.cut.group, a.width};
  const Pipeline<T, 2, kForwardStages, kAligned> rows(columns);
  int token = range.token + static_cast<int>(threadIdx.y);
  const auto fetch = [&](int turn, int coming) {
    rows.fetch(turn, 0, a.x.row(range.batch, coming), coming < range.end);
    rows.fetch(turn, 1, a.y.row(range.batch, coming), coming < range.end);
    commit_copies();
  };
#pragma unroll
  for (int turn = 0; turn < kForwardStages - 1; ++turn) fetch(turn, token + turn * a.cut.groups);
  const bool has_post = a.post.present(), has_pre = a.pre.present();
  const Weights post =
      load_weights<true>(a.post, has_post, a.layer_scale, range.batch, a.eps, columns);
  const Weights pre = load_weights<true, P>(a.pre, has_pre, nullptr, range.batch, a.eps, columns);
  const int turns = a.cut.rows / a.cut.groups;
  bool odd = false;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn, token += a.cut.groups) {
    fetch(turn + kForwardStages - 1, token + (kForwardStages - 1) * a.cut.groups);
    await_batches<kForwardStages - 1>();
    const bool has = token < range.end;
    const int64_t at = a.cut.row(range.batch, token) * a.width;
    Share y = rows.read(turn, 1);
    if (has_post) {
      norm_row(y, post, a.inverse_width, a.eps, odd);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) y[i] *= post.gain[i];
    }
    // Rounded as it is stored: the next sub-layer and the backward see the stored numbers.
    Share x = rows.read(turn, 0);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] += y[i];
    round_to<T>(x.at);
    if (has) columns.store(a.x_out + at, x);
    if (!has_pre) continue;
    norm_row(x, pre, a.inverse_width, a.eps, odd);
    if (has) columns.store(a.h + at, x);
  }
}

template <typename T, typename P>
struct JoinBackward {
  Cut cut;
  int width;
  float inverse_width, eps;
  Rows<T> dx_out, dh, x, y;
  const P* layer_scale;
  Modulation<P> post, pre;
  T *dx, *dy;
  float *partial_post, *partial_pre;  // null: nothing there wants a gradient
  int slots;
};

/// r and pull of both norms of a row.
struct JoinScales {
  float pre, pull_pre, post, pull_post;
};

/// Absent norms are the identity: r = 1 before the stream, no gradient from a missing h.
template <typename T, typename P>
__device__ __forceinline__ JoinScales join_scales(const float (&sums)[6],
                                                  const JoinBackward<T, P>& a, bool has_h) {
  JoinScales out{0.f, 0.f, 1.f, 0.f};
  if (has_h) {
    out.pre = double_norm_scale(sums[0], a.inverse_width, a.eps);
    out.pull_pre = double_norm_pull(out.pre, sums[1], a.inverse_width);
  }
  if (a.post.present()) {
    const float c = sums[3] + out.pre * sums[4] - out.pull_pre * sums[5];
    out.post = double_norm_scale(sums[2], a.inverse_width, a.eps);
    out.pull_post = double_norm_pull(out.post, c, a.inverse_width);
  }
  return out;
}

/// Scalar access to fp32 needs more than 128 registers; its blocks have fewer threads.
template <typename T, bool kAligned>
inline constexpr int kBackwardThreads = sizeof(T) == 4 && !kAligned ? kMaxGroup : kMaxThreads;

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kBackwardThreads<T, kAligned>, 1) join_backward(const JoinBackward<T, P> a) {
  await_previous();
  const Range range = a.cut.here();
  const Columns<T, kAligned> columns{a.cut.group, a.width};
  const Pipeline<T, 4, kBackwardStages, kAligned> rows(columns);
  const bool has_h = a.pre.present() && a.dh.data != nullptr;
  const bool has_dx = a.dx_out.data != nullptr;
  int token = range.token + static_cast<int>(threadIdx.y);
  const auto fetch = [&](int turn, int coming) {
    const bool has = coming < range.end;
    rows.fetch(turn, 0, a.dx_out.row(range.batch, coming), has && has_dx);
    rows.fetch(turn, 1, a.dh.row(range.batch, coming), has && has_h);
    rows.fetch(turn, 2, a.x.row(range.batch, coming), has && has_h);
    rows.fetch(turn, 3, a.y.row(range.batch, coming), has);
    commit_copies();
  };
#pragma unroll
  for (int turn = 0; turn < kBackwardStages - 1; ++turn) fetch(turn, token + turn * a.cut.groups);
  const Weights pre = load_weights<false, P>(a.pre, has_h, nullptr, range.batch, a.eps, columns);
  const Weights post =
      load_weights<false>(a.post, a.post.present(), a.layer_scale, range.batch, a.eps, columns);

  ModulationSums of_pre{}, of_post{};
  const int turns = a.cut.rows / a.cut.groups;
  bool odd = false;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn, token += a.cut.groups) {
    fetch(turn + kBackwardStages - 1, token + (kBackwardStages - 1) * a.cut.groups);
    await_batches<kBackwardStages - 1>();
    float sums[6] = {};
    {
      const Share dx = rows.read(turn, 0), dh = rows.read(turn, 1);
      const Share x = rows.read(turn, 2), y = rows.read(turn, 3);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float g = pre.gain[i] * dh[i];
        const float k = post.gain[i] * y[i];
        const float sx = pre.square[i] * x[i];
        sums[0] += sx * x[i];
        sums[1] += g * x[i];
        sums[2] += post.square[i] * y[i] * y[i];
        sums[3] += dx[i] * k;
        sums[4] += g * k;
        sums[5] += sx * k;
      }
    }
    sum_over_group(sums, odd);
    if (token >= range.end) continue;

    // Read once more, which costs less than registers for four rows.
    const JoinScales scales = join_scales(sums, a, has_h);
    Share dx = rows.read(turn, 0), dy = rows.read(turn, 3);
    const Share dh = rows.read(turn, 1), x = rows.read(turn, 2);
    const int64_t at = a.cut.row(range.batch, token) * a.width;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      dx[i] += of_pre.add(i, dh[i], x[i], pre, scales.pre, scales.pull_pre);
      dy[i] = of_post.add(i, dx[i], dy[i], post, scales.post, scales.pull_post);
      if constexpr (!kAligned) {  // at once, for want of registers
        columns.put(a.dx + at, i, dx[i]);
        columns.put(a.dy + at, i, dy[i]);
      }
    }
    if constexpr (kAligned) {
      columns.store(a.dx + at, dx);
      columns.store(a.dy + at, dy);
    }
  }
  await_copies();
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * a.slots * kSums * a.width;
  if (a.partial_post != nullptr) of_post.store(a.partial_post + offset, columns);
  if (a.partial_pre != nullptr) of_pre.store(a.partial_pre + offset, columns);
}

}  // namespace
}  // namespace blip3o

int blip3o_sandwich_join_forward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows x,
                                 blip3o_rows y, const void* layer_scale,
                                 const blip3o_modulation* post, const blip3o_modulation* pre,
                                 float eps, void* x_out, void* h, cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  const Cut cut(shape, kForwardThreads, kForwardResident, kForwardCost);
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    JoinForward<T, P> a{};
    a.cut = cut;
    a.width = static_cast<int>(shape.width);
    a.inverse_width = 1.f / a.width;
    a.eps = eps;
    a.x = Rows<T>(x);
    a.y = Rows<T>(y);
    a.layer_scale = static_cast<const P*>(layer_scale);
    a.post = Modulation<P>(post);
    a.pre = Modulation<P>(pre);
    a.x_out = static_cast<T*>(x_out);
    a.h = static_cast<T*>(h);
    const bool whole_words = a.width % kPack<T> == 0 && aligned(x, sizeof(T)) &&
                             aligned(y, sizeof(T)) && aligned({layer_scale, x_out, h}) &&
                             aligned(post, sizeof(P)) && aligned(pre, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      const int shared = cut.shared<Pipeline<T, 2, kForwardStages, words>>();
      return launch<join_forward<T, P, words>>(cut.blocks, cut.threads(), a, stream, shared);
    });
  });
}

int blip3o_sandwich_join_backward(blip3o_dtypes dtypes, blip3o_shape shape, blip3o_rows dx_out,
                                  blip3o_rows dh, blip3o_rows x_out, blip3o_rows y,
                                  const void* layer_scale, const blip3o_modulation* post,
                                  const blip3o_modulation* pre, float eps, void* dx, void* dy,
                                  void* dlayer_scale, blip3o_modulation_grads dpost,
                                  blip3o_modulation_grads dpre, float* workspace,
                                  cudaStream_t stream) {
  using namespace blip3o;
  if (!has_kernel(shape)) return cudaErrorInvalidValue;
  const Cut cut = backward_cut(dtypes.activation, shape);
  ModulationGrads wanted[2];
  int slots = 0;
  if (workspace != nullptr && (post != nullptr || layer_scale != nullptr)) {
    wanted[slots] = {post, layer_scale, dpost, dlayer_scale, slots};
    ++slots;
  }
  const int post_slots = slots;
  if (workspace != nullptr && pre != nullptr) {
    wanted[slots] = {pre, nullptr, dpre, nullptr, slots};
    ++slots;
  }
  const int error = with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    JoinBackward<T, P> a{};
    a.cut = cut;
    a.width = static_cast<int>(shape.width);
    a.inverse_width = 1.f / a.width;
    a.eps = eps;
    a.dx_out = Rows<T>(dx_out);
    a.dh = Rows<T>(dh);
    a.x = Rows<T>(x_out);
    a.y = Rows<T>(y);
    a.layer_scale = static_cast<const P*>(layer_scale);
    a.post = Modulation<P>(post);
    a.pre = Modulation<P>(pre);
    a.dx = static_cast<T*>(dx);
    a.dy = static_cast<T*>(dy);
    a.partial_post = post_slots > 0 ? workspace : nullptr;
    a.partial_pre = slots > post_slots ? workspace + post_slots * kSums * shape.width : nullptr;
    a.slots = slots;
    const bool whole_words =
        a.width % kPack<T> == 0 && aligned(dx_out, sizeof(T)) && aligned(dh, sizeof(T)) &&
        aligned(x_out, sizeof(T)) && aligned(y, sizeof(T)) &&
        aligned({layer_scale, dx, dy, workspace}) && aligned(post, sizeof(P)) &&
        aligned(pre, sizeof(P));
    return with_flag(whole_words, [&](auto words) {
      const int shared = cut.shared<Pipeline<T, 4, kBackwardStages, words>>();
      return launch<join_backward<T, P, words>>(cut.blocks, cut.threads(), a, stream, shared);
    });
  });
  if (error != cudaSuccess || slots == 0) return error;
  return launch_modulation_grads(dtypes.parameter, shape, cut, workspace, slots, wanted, slots, eps,
                                 stream);
}
