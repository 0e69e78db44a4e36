// The operators of blip3o_fast_cuda: the C interface under torch's stable ABI.
//
// Schemas are those of blip3o_fast, whose fakes and autograd serve both. A tensor that a kernel cannot
// read as it lies (columns strided, dtypes mixed) is copied first. Only torch's C shims are used, so one
// binary serves every torch from 2.10 on, with CUDA or without.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "blip3o.h"

// A torch for CPUs does not have it: there the library loads, and an operator says what is missing.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

/// Makes the device of a tensor the current one for as long as it lives.
class Place {
 public:
  explicit Place(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this torch was built without CUDA: install a CUDA build of torch");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

void check(int error, const char* op) {
  STD_TORCH_CHECK(error != cudaErrorInvalidValue, op, ": no kernel for this width or size; rows of ",
                  "the norms are at most ", BLIP3O_MAX_WIDTH, " wide, heads of attention 64: pass ",
                  "impl=Impl.TRITON");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorName(static_cast<cudaError_t>(error)),
                  ", ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

/// No kernel takes it; parameters and velocities in it are converted.
constexpr int kFloat64 = 3;

int dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return BLIP3O_FLOAT32;
    case ScalarType::Half: return BLIP3O_FLOAT16;
    case ScalarType::BFloat16: return BLIP3O_BFLOAT16;
    case ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, "expected a floating dtype of at least 16 bits");
  }
}

int activation_dtype(const Tensor& x) {
  const int found = dtype(x);
  STD_TORCH_CHECK(found != kFloat64, "expected float16, bfloat16 or float32: pass impl=Impl.TRITON");
  return found;
}

Tensor as(const Tensor& x, int wanted) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16,
                                   ScalarType::Double};
  return dtype(x) == wanted ? x : torch::stable::to(x, kTypes[wanted]);
}

/// The one dtype of two tensors: fp32 where they differ.
int common_dtype(const Tensor& x, const Tensor& y) {
  return dtype(x) == dtype(y) ? activation_dtype(x) : BLIP3O_FLOAT32;
}

/// The one dtype of parameters: that of the activation where all have it, else fp32.
template <size_t kCount>
int parameter_dtype(int activation, const std::array<const Optional*, kCount>& given) {
  for (const Optional* x : given) {
    if (*x && dtype(**x) != activation) return BLIP3O_FLOAT32;
  }
  return activation;
}

Tensor fresh(Sizes sizes, int wanted, const Tensor& like) {
  const int32_t types[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float16(),
                           aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float64()};
  std::array<int64_t, 8> strides{};
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "expected at most 8 axes, got ", sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride *= sizes[axis] > 0 ? sizes[axis] : 1) {
    strides[axis] = stride;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), types[wanted],
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor fresh(const Tensor& like, int wanted) { return fresh(like.sizes(), wanted, like); }

/// Stands for a result that there is none of.
Tensor nothing(const Tensor& like) {
  const int64_t none = 0;
  return fresh(Sizes(&none, 1), dtype(like), like);
}

/// With adjacent elements along the last axis.
Tensor dense(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor whole(const Tensor& x, int wanted) { return torch::stable::contiguous(as(x, wanted)); }

const void* address(const Optional& x) { return x ? x->data_ptr() : nullptr; }

/// Rows of [B, N, width] in `wanted`, and the tensor that owns them.
struct Rows {
  Optional owner;
  blip3o_rows c{};

  Rows() = default;
  Rows(const Tensor& x, int wanted) : owner(dense(as(x, wanted))) {
    c = {owner->data_ptr(), owner->stride(0), owner->stride(1)};
  }
  Rows(const Optional& x, int wanted) {
    if (x) *this = Rows(*x, wanted);
  }
};

blip3o_shape shape_of(const Tensor& x, int64_t width) { return {x.size(0), x.size(1), width}; }

/// [..., width] as [B, N, width].
Tensor with_three_axes(const Tensor& x) {
  if (x.dim() == 3) return x;
  int64_t tokens = 1;
  for (int64_t axis = 1; axis + 1 < x.dim(); ++axis) tokens *= x.size(axis);
  const std::array<int64_t, 3> sizes{x.dim() > 1 ? x.size(0) : 1, tokens, x.size(-1)};
  return torch::stable::reshape(x, Sizes(sizes.data(), sizes.size()));
}

/// The parameters of a norm in one dtype.
struct Modulation {
  Tensor w1, w2, shift, scale;
  blip3o_modulation c;

  Modulation(const Tensor& of_w1, const Tensor& of_w2, const Tensor& of_shift, const Tensor& of_scale,
       int wanted)
      : w1(whole(of_w1, wanted)),
        w2(whole(of_w2, wanted)),
        shift(dense(as(of_shift, wanted))),
        scale(dense(as(of_scale, wanted))),
        c{w1.data_ptr(), w2.data_ptr(),   shift.data_ptr(),
          scale.data_ptr(), shift.stride(0), scale.stride(0)} {}
};

std::optional<Modulation> modulation_of(const Optional& w1, const Optional& w2, const Optional& shift,
                            const Optional& scale, int wanted) {
  if (!w1) return std::nullopt;
  return Modulation(*w1, *w2, *shift, *scale, wanted);
}

const blip3o_modulation* address(const std::optional<Modulation>& modulation) {
  return modulation ? &modulation->c : nullptr;
}

/// Gradients of a norm's parameters; none without a norm.
struct ModulationGrads {
  Optional w1, w2, shift, scale;
  blip3o_modulation_grads c{};

  ModulationGrads(const std::optional<Modulation>& modulation, bool wanted, int parameter) {
    if (!modulation || !wanted) return;
    w1 = fresh(modulation->w1, parameter);
    w2 = fresh(modulation->w2, parameter);
    shift = fresh(modulation->shift, parameter);
    scale = fresh(modulation->scale, parameter);
    c = {w1->data_ptr(), w2->data_ptr(), shift->data_ptr(), scale->data_ptr()};
  }
};

/// A gradient in the dtype of what it belongs to.
Tensor given_back(const Optional& gradient, const Optional& of, const Tensor& like) {
  return gradient && of ? as(*gradient, dtype(*of)) : nothing(like);
}

Tensor workspace(int activation, blip3o_shape shape, int modulations, const Tensor& like) {
  const int64_t floats = blip3o_sandwich_workspace(activation, shape, modulations);
  return fresh(Sizes(&floats, 1), BLIP3O_FLOAT32, like);
}

Tensor swiglu(Tensor gate_up) {
  const Place place(gate_up);
  const int activation = activation_dtype(gate_up);
  const Rows rows(with_three_axes(gate_up), activation);
  std::array<int64_t, 8> sizes{};
  STD_TORCH_CHECK(gate_up.dim() <= 8, "gate_up: expected at most 8 axes, got ", gate_up.dim());
  for (int64_t axis = 0; axis < gate_up.dim(); ++axis) sizes[axis] = gate_up.size(axis);
  sizes[gate_up.dim() - 1] /= 2;
  Tensor out = fresh(Sizes(sizes.data(), gate_up.dim()), activation, gate_up);
  check(blip3o_swiglu_forward(activation, shape_of(*rows.owner, gate_up.size(-1) / 2), rows.c,
                              out.data_ptr(), place.stream()),
        "swiglu");
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up) {
  const Place place(gate_up);
  const int activation = activation_dtype(gate_up);
  const Rows rows(with_three_axes(gate_up), activation);
  const Rows dout(with_three_axes(grad), activation);
  Tensor dgate_up = fresh(gate_up, activation);
  check(blip3o_swiglu_backward(activation, shape_of(*rows.owner, gate_up.size(-1) / 2), dout.c,
                               rows.c, dgate_up.data_ptr(), place.stream()),
        "swiglu_backward");
  return dgate_up;
}

/// Heads of packed rows, [B, N, heads d].
blip3o_heads packed_heads(const Tensor& x, int64_t d) {
  return {x.data_ptr(), x.stride(0), x.stride(1), d};
}

/// The heads of a tensor [B, N, heads, d] with adjacent columns.
blip3o_heads heads_of(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor fresh_heads(const Tensor& like, int64_t heads, int64_t d) {
  const std::array<int64_t, 4> sizes{like.size(0), like.size(1), heads, d};
  return fresh(Sizes(sizes.data(), sizes.size()), activation_dtype(like), like);
}

/// Between `packed` and its `heads` and twice `kv_heads` heads `apart`, as `blip3o_rope` says.
void turn(const Tensor& packed, const std::array<blip3o_heads, 3>& apart, const Tensor& cos,
          const Tensor& sin, int64_t heads, int64_t kv_heads, int64_t turned, bool adjoint,
          const char* op) {
  const Place place(packed);
  const int64_t d = cos.size(1);
  const int activation = activation_dtype(packed);
  const int parameter = dtype(cos) == activation && dtype(sin) == activation ? activation
                                                                             : BLIP3O_FLOAT32;
  const Tensor cosines = whole(cos, parameter), sines = whole(sin, parameter);
  check(blip3o_rope({activation, parameter}, shape_of(packed, d), static_cast<int>(heads),
                    static_cast<int>(kv_heads), static_cast<int>(turned), packed_heads(packed, d),
                    apart[0], apart[1], apart[2], cosines.data_ptr(), sines.data_ptr(), adjoint,
                    place.stream()),
        op);
}

std::tuple<Tensor, Tensor, Tensor> rope(Tensor qkv, Tensor cos, Tensor sin, int64_t heads,
                                        int64_t kv_heads, int64_t turned) {
  const Tensor rows = dense(qkv);
  const int64_t d = cos.size(1);
  Tensor q = fresh_heads(qkv, heads, d);
  Tensor k = fresh_heads(qkv, kv_heads, d), v = fresh_heads(qkv, kv_heads, d);
  turn(rows, {heads_of(q), heads_of(k), heads_of(v)}, cos, sin, heads, kv_heads, turned, false,
       "rope");
  return {q, k, v};
}

/// All heads stay packed.
void rope_inplace(Tensor qkv, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads,
                  int64_t turned) {
  const int64_t all = heads + 2 * kv_heads;
  if (qkv.is_contiguous()) {
    turn(qkv, {packed_heads(qkv, cos.size(1))}, cos, sin, all, 0, turned, false, "rope_");
  } else {
    const Tensor out = std::get<0>(rope(qkv, cos, sin, all, 0, turned));
    torch::stable::copy_(qkv, torch::stable::reshape(out, qkv.sizes()));
  }
}

Tensor rope_backward(Optional dq, Optional dk, Optional dv, Tensor cos, Tensor sin, int64_t heads,
                     int64_t kv_heads, int64_t turned) {
  const Tensor& given = dq ? *dq : dk ? *dk : *dv;
  const Place place(given);
  const int64_t d = cos.size(1);
  const auto present = [&](const Optional& gradient, int64_t count) {
    if (gradient) return dense(*gradient);
    Tensor zeros = fresh_heads(given, count, d);
    return torch::stable::zero_(zeros);
  };
  const Tensor q = present(dq, heads), k = present(dk, kv_heads), v = present(dv, kv_heads);
  const std::array<int64_t, 3> sizes{q.size(0), q.size(1), (heads + 2 * kv_heads) * d};
  Tensor out = fresh(Sizes(sizes.data(), sizes.size()), activation_dtype(q), q);
  turn(out, {heads_of(q), heads_of(k), heads_of(v)}, cos, sin, heads, kv_heads, turned, true,
       "rope_backward");
  return out;
}

/// [B, N, heads, d] as rows of adjacent heads that 16-byte accesses fit, copied where they do not.
struct Heads {
  Tensor owner;
  blip3o_rows c;

  explicit Heads(const Tensor& x) : owner(x) {
    STD_TORCH_CHECK(x.dim() == 4, "expected [B, N, heads, d], got ", x.dim(), " axes");
    if (!fit(x)) {
      owner = fresh(x, activation_dtype(x));
      torch::stable::copy_(owner, x);
    }
    c = {owner.data_ptr(), owner.stride(0), owner.stride(1)};
  }

 private:
  static bool fit(const Tensor& x) {
    constexpr int64_t kEight = 8;  // 16-bit elements of an access
    return (x.size(3) <= 1 || x.stride(3) == 1) &&
           (x.size(2) <= 1 || x.stride(2) == x.size(3)) && x.stride(1) % kEight == 0 &&
           x.stride(0) % kEight == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  }
};

Tensor rope_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool rotates_keys) {
  const Place place(q);
  const int activation = activation_dtype(q);
  const Tensor cosines = whole(cos, BLIP3O_FLOAT32), sines = whole(sin, BLIP3O_FLOAT32);
  const Heads queries(q), keys(k), values(v);
  Tensor out = fresh(q, activation);
  check(blip3o_rope_attention(activation, {q.size(0), q.size(1), q.size(3)}, k.size(1),
                              static_cast<int>(q.size(2)), static_cast<int>(k.size(2)), queries.c,
                              keys.c, values.c, static_cast<const float*>(cosines.data_ptr()),
                              static_cast<const float*>(sines.data_ptr()), rotates_keys,
                              out.data_ptr(), place.stream()),
        "rope_attention");
  return out;
}

Tensor sandwich_norm(Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, double eps) {
  const Place place(x);
  const int activation = activation_dtype(x);
  const Optional given[] = {w1, w2, shift, scale};
  const int parameter =
      parameter_dtype<4>(activation, {&given[0], &given[1], &given[2], &given[3]});
  const Rows rows(x, activation);
  const Modulation modulation(w1, w2, shift, scale, parameter);
  Tensor h = fresh(x, activation);
  check(blip3o_sandwich_norm_forward({activation, parameter}, shape_of(x, x.size(2)), rows.c,
                                     modulation.c, static_cast<float>(eps), h.data_ptr(),
                                     place.stream()),
        "sandwich_norm");
  return h;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sandwich_norm_backward(
    Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, double eps,
    bool parameters) {
  const Place place(x);
  const int activation = activation_dtype(x);
  const Optional given[] = {w1, w2, shift, scale};
  const int parameter =
      parameter_dtype<4>(activation, {&given[0], &given[1], &given[2], &given[3]});
  const Rows rows(x, activation), dh(grad, activation);
  const std::optional<Modulation> modulation = Modulation(w1, w2, shift, scale, parameter);
  const ModulationGrads grads(modulation, parameters, parameter);
  Tensor dx = fresh(x, activation);
  const blip3o_shape shape = shape_of(x, x.size(2));
  Optional scratch;
  if (parameters) scratch = workspace(activation, shape, 1, x);
  check(blip3o_sandwich_norm_backward(
            {activation, parameter}, shape, dh.c, rows.c, modulation->c, static_cast<float>(eps),
            dx.data_ptr(), grads.c, static_cast<float*>(scratch ? scratch->data_ptr() : nullptr),
            place.stream()),
        "sandwich_norm_backward");
  return {dx, given_back(grads.w1, w1, x), given_back(grads.w2, w2, x),
          given_back(grads.shift, shift, x), given_back(grads.scale, scale, x)};
}

std::tuple<Tensor, Tensor> sandwich_join(Tensor x, Tensor y, Optional layer_scale, Optional post_w1,
                                         Optional post_w2, Optional post_shift, Optional post_scale,
                                         Optional pre_w1, Optional pre_w2, Optional pre_shift,
                                         Optional pre_scale, double eps) {
  const Place place(x);
  const int activation = common_dtype(x, y);
  if (pre_w1 && activation != dtype(x)) {
    // Computed in fp32 and stored narrower: the next sub-layer must see the stored numbers.
    Tensor x_out = std::get<0>(sandwich_join(x, y, layer_scale, post_w1, post_w2, post_shift,
                                             post_scale, {}, {}, {}, {}, eps));
    return {x_out, sandwich_norm(x_out, *pre_w1, *pre_w2, *pre_shift, *pre_scale, eps)};
  }
  const int parameter =
      parameter_dtype<9>(activation, {&layer_scale, &post_w1, &post_w2, &post_shift, &post_scale,
                                      &pre_w1, &pre_w2, &pre_shift, &pre_scale});
  const Rows stream(x, activation), branch(y, activation);
  Optional ls;
  if (layer_scale) ls = whole(*layer_scale, parameter);
  const auto post = modulation_of(post_w1, post_w2, post_shift, post_scale, parameter);
  const auto pre = modulation_of(pre_w1, pre_w2, pre_shift, pre_scale, parameter);
  Tensor x_out = fresh(x, activation);
  Tensor h = pre ? fresh(x, activation) : nothing(x);
  check(blip3o_sandwich_join_forward({activation, parameter}, shape_of(x, x.size(2)), stream.c,
                                     branch.c, address(ls), address(post), address(pre),
                                     static_cast<float>(eps), x_out.data_ptr(),
                                     pre ? h.data_ptr() : nullptr, place.stream()),
        "sandwich_join");
  return {as(x_out, dtype(x)), h};
}

using Eleven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor>;

Eleven sandwich_join_backward(Optional dx_out, Optional dh, Tensor x_out, Tensor y,
                              Optional layer_scale, Optional post_w1, Optional post_w2,
                              Optional post_shift, Optional post_scale, Optional pre_w1,
                              Optional pre_w2, Optional pre_shift, Optional pre_scale, double eps,
                              bool parameters) {
  const Place place(x_out);
  const int activation = common_dtype(x_out, y);
  const int parameter =
      parameter_dtype<9>(activation, {&layer_scale, &post_w1, &post_w2, &post_shift, &post_scale,
                                      &pre_w1, &pre_w2, &pre_shift, &pre_scale});
  const Rows stream(x_out, activation), branch(y, activation);
  if (!pre_w1) dh.reset();  // the gradient of an empty tensor
  const Rows of_x_out(dx_out, activation), of_h(dh, activation);
  Optional ls, dls, scratch;
  if (layer_scale) ls = whole(*layer_scale, parameter);
  const auto post = modulation_of(post_w1, post_w2, post_shift, post_scale, parameter);
  const auto pre = modulation_of(pre_w1, pre_w2, pre_shift, pre_scale, parameter);
  const ModulationGrads dpost(post, parameters, parameter), dpre(pre, parameters, parameter);
  if (ls && parameters) dls = fresh(*ls, parameter);
  Tensor dx = fresh(x_out, activation), dy = fresh(y, activation);
  const blip3o_shape shape = shape_of(x_out, x_out.size(2));
  if (parameters) scratch = workspace(activation, shape, 2, x_out);
  check(blip3o_sandwich_join_backward(
            {activation, parameter}, shape, of_x_out.c, of_h.c, stream.c, branch.c, address(ls),
            address(post), address(pre), static_cast<float>(eps), dx.data_ptr(),
            dy.data_ptr(), dls ? dls->data_ptr() : nullptr, dpost.c, dpre.c,
            static_cast<float*>(scratch ? scratch->data_ptr() : nullptr), place.stream()),
        "sandwich_join_backward");
  return {as(dx, dtype(x_out)),
          as(dy, dtype(y)),
          given_back(dls, layer_scale, x_out),
          given_back(dpost.w1, post_w1, x_out),
          given_back(dpost.w2, post_w2, x_out),
          given_back(dpost.shift, post_shift, x_out),
          given_back(dpost.scale, post_scale, x_out),
          given_back(dpre.w1, pre_w1, x_out),
          given_back(dpre.w2, pre_w2, x_out),
          given_back(dpre.shift, pre_shift, x_out),
          given_back(dpre.scale, pre_scale, x_out)};
}

void solver_update(Tensor x, Tensor velocity, Tensor slopes, Tensor coefficients, Optional slot,
                   Optional clamp, double guidance_scale, Tensor out) {
  const Place place(x);
  for (const Tensor* state : {&x, &slopes, &out}) {
    STD_TORCH_CHECK(dtype(*state) == BLIP3O_FLOAT32,
                    "expected a float32 state: pass impl=Impl.TRITON");
  }
  const int newest = dtype(velocity) == kFloat64 ? BLIP3O_FLOAT32 : dtype(velocity);
  const Rows rows(x, BLIP3O_FLOAT32), now(velocity, newest);
  const Tensor numbers = whole(coefficients, BLIP3O_FLOAT32);
  Optional bound;
  if (clamp) bound = as(*clamp, BLIP3O_FLOAT32);
  check(blip3o_solver_update(newest, shape_of(x, x.size(2)), rows.c, now.c,
                             {static_cast<float*>(slopes.data_ptr()), slopes.stride(0),
                              slopes.size(0), static_cast<const int64_t*>(address(slot))},
                             static_cast<const float*>(numbers.data_ptr()),
                             static_cast<const float*>(address(bound)),
                             static_cast<float>(guidance_scale),
                             static_cast<float*>(out.data_ptr()), place.stream()),
        "solver_update");
}

}  // namespace

#define GIVEN                                                                              \
  "Tensor? layer_scale, Tensor? post_w1, Tensor? post_w2, Tensor? post_shift, "           \
  "Tensor? post_scale, Tensor? pre_w1, Tensor? pre_w2, Tensor? pre_shift, Tensor? pre_scale, " \
  "float eps"
#define ROTATION "Tensor cos, Tensor sin, int heads, int kv_heads, int turned"

// Tests bind the kernels to host tensors, under another name.
#ifndef BLIP3O_NAMESPACE
#define BLIP3O_NAMESPACE blip3o_fast_cuda
#define BLIP3O_DISPATCH_KEY CUDA
#endif
// One more macro each, so that their arguments are expanded.
#define LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define IMPLEMENTATIONS(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

LIBRARY(BLIP3O_NAMESPACE, m) {
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  m.def("rope(Tensor qkv, " ROTATION ") -> (Tensor, Tensor, Tensor)");
  m.def("rope_(Tensor(a!) qkv, " ROTATION ") -> ()");
  m.def("rope_backward(Tensor? dq, Tensor? dk, Tensor? dv, " ROTATION ") -> Tensor");
  m.def(
      "rope_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool rotates_keys) "
      "-> Tensor");
  m.def(
      "sandwich_norm(Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, float eps) "
      "-> Tensor");
  m.def(
      "sandwich_norm_backward(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor shift, "
      "Tensor scale, float eps, bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sandwich_join(Tensor x, Tensor y, " GIVEN ") -> (Tensor, Tensor)");
  m.def("sandwich_join_backward(Tensor? dx_out, Tensor? dh, Tensor x_out, Tensor y, " GIVEN
        ", bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor)");
  m.def(
      "solver_update(Tensor x, Tensor velocity, Tensor(a!) slopes, Tensor coefficients, "
      "Tensor? slot, Tensor? clamp, float guidance_scale, Tensor(b!) out) -> ()");
}

IMPLEMENTATIONS(BLIP3O_NAMESPACE, BLIP3O_DISPATCH_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("rope_", TORCH_BOX(&rope_inplace));
  m.impl("rope_backward", TORCH_BOX(&rope_backward));
  m.impl("rope_attention", TORCH_BOX(&rope_attention));
  m.impl("sandwich_norm", TORCH_BOX(&sandwich_norm));
  m.impl("sandwich_norm_backward", TORCH_BOX(&sandwich_norm_backward));
  m.impl("sandwich_join", TORCH_BOX(&sandwich_join));
  m.impl("sandwich_join_backward", TORCH_BOX(&sandwich_join_backward));
  m.impl("solver_update", TORCH_BOX(&solver_update));
}
