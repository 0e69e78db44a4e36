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
  Units units;
  int width;
  float inverse_width, eps;
  Rows<T> x, y;
  const P* layer_scale;
  Modulation<P> post, pre;
  T *x_out, *h;
};

/// x := x', rounded as it is stored: the next sub-layer and the backward see the stored numbers.
template <typename T, typename P, typename C>
__device__ __forceinline__ void add_and_store(Share (&x)[kRows], const Share (&y)[kRows],
                                              const JoinForward<T, P>& a, const Unit& unit,
                                              const C& columns) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[r][i] = rounded<T>(x[r][i] + y[r][i]);
    if (unit.has(r)) columns.store(a.x_out + a.units.row(unit, r) * a.width, x[r]);
  }
}

/// x := x', y := scratch, then x := h; parameters are asked for before anything is waited for.
template <typename T, typename P, typename C>
__device__ __forceinline__ void join(Share (&x)[kRows], Share (&y)[kRows],
                                     const JoinForward<T, P>& a, const Unit& unit,
                                     const C& columns) {
  const bool has_post = a.post.present(), has_pre = a.pre.present();
  const Weights post =
      load_weights<true>(a.post, has_post, a.layer_scale, unit.batch, a.eps, columns);
  const Weights pre = load_weights<true, P>(a.pre, has_pre, nullptr, unit.batch, a.eps, columns);
  if (has_post) {
    norm_rows(y, post, a.units, a.inverse_width, a.eps);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) y[r][i] *= post.gain[i];
    }
  }
  add_and_store(x, y, a, unit, columns);
  if (has_pre) norm_rows(x, pre, a.units, a.inverse_width, a.eps);
}

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) join_forward(const JoinForward<T, P> a) {
  await_previous();
  const Unit unit = a.units.here();
  const Columns<T, kAligned> columns{a.units.group, a.width};

  Share x[kRows], y[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = columns.load(a.x.row(unit.batch, unit.token + r), unit.has(r));
    y[r] = columns.load(a.y.row(unit.batch, unit.token + r), unit.has(r));
  }
  join(x, y, a, unit, columns);
  if (!a.pre.present()) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (unit.has(r)) columns.store(a.h + a.units.row(unit, r) * a.width, x[r]);
  }
}

template <typename T, typename P>
struct JoinBackward {
  Units units;
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

template <typename T, typename P, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) join_backward(const JoinBackward<T, P> a) {
  await_previous();
  const Unit unit = a.units.here();
  const Columns<T, kAligned> columns{a.units.group, a.width};
  const bool has_h = a.pre.present() && a.dh.data != nullptr;
  const Weights pre = load_weights<false, P>(a.pre, has_h, nullptr, unit.batch, a.eps, columns);
  const Weights post =
      load_weights<false>(a.post, a.post.present(), a.layer_scale, unit.batch, a.eps, columns);

  ModulationSums of_pre{}, of_post{};
#pragma unroll 1
  for (int r = 0; r < a.units.rows; ++r) {
    const int token = unit.token + r;
    const bool has = unit.has(r);
    Share dx = columns.load(a.dx_out.row(unit.batch, token), has && a.dx_out.data != nullptr);
    const Share dh = columns.load(a.dh.row(unit.batch, token), has && has_h);
    const Share x = columns.load(a.x.row(unit.batch, token), has && has_h);
    const Share y = columns.load(a.y.row(unit.batch, token), has);

    float sums[6] = {};
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
    sum_over_unit(sums, a.units.group);
    if (!has) continue;

    const JoinScales scales = join_scales(sums, a, has_h);
    Share dy;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      dx[i] += double_norm_dx(pre.gain[i] * dh[i], x[i], pre.square[i], scales.pre, scales.pull_pre);
      dy[i] = double_norm_dx(post.gain[i] * dx[i], y[i], post.square[i], scales.post,
                             scales.pull_post);
      of_pre.add(i, dh[i], x[i], scales.pre, scales.pull_pre);
      of_post.add(i, dx[i], y[i], scales.post, scales.pull_post);
    }
    columns.store(a.dx + a.units.row(unit, r) * a.width, dx);
    columns.store(a.dy + a.units.row(unit, r) * a.width, dy);
  }
  if (a.units.index() >= a.units.count) return;
  const int64_t offset = static_cast<int64_t>(a.units.index()) * a.slots * kSums * a.width;
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
  return with_dtypes(dtypes, [&](auto activation, auto parameter) {
    using T = decltype(activation);
    using P = decltype(parameter);
    JoinForward<T, P> a{};
    a.units = Units(shape, kRows);
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
      return launch<join_forward<T, P, words>>(a.units.blocks(), a.units.threads(), a, stream);
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
  const Units units(shape, backward_rows(shape));
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
    a.units = units;
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
      return launch<join_backward<T, P, words>>(units.blocks(), units.threads(), a, stream);
    });
  });
  if (error != cudaSuccess || slots == 0) return error;
  return launch_modulation_grads(dtypes.parameter, shape, units, workspace, slots, wanted, slots, eps,
                                 stream);
}
