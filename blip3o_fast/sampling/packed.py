"""The weights of the network as the sampler uses them: packed, folded, in the sampler's dtype.

* Queries, keys and values of self-attention are one projection. So are gate and up.
* The keys and values of all cross-attentions are one projection: all key heads, then all value
  heads. So one rotary call turns the keys of every layer.
* ``layer_scale * (W h) = (layer_scale * W) h``: layer scales are folded into the last projection of
  each branch. fp16 is excepted: its normal numbers end at 6e-5, and a scale of 0.1 would make
  weights of 1e-4 subnormal.
* On CUDA the adapter's projections are padded once (``model.adapter``).
* In FP8, a projection is e4m3 with one fp32 scale for each output channel if a join, a norm or
  SwiGLU computes its input. These are all projections of a block except the two after attention.
  Everything else is bf16. To quantise the result of attention, a kernel would move 3 D bytes a row
  and halve the time of D^2 multiply-adds. At the H100's 3.0 TB/s and 798 TFLOP/s that is a loss up
  to D = 800, even without the time of a launch.

An instance is a copy of all weights that an evaluation needs: 95.9 of base's 227.5 million
parameters, 366 MiB in fp32, 183 MiB in bf16, and 111 MiB in FP8, where 75.5 million are e4m3. The
adapter is copied if the dtype differs or on CUDA (84 MiB in bf16). Checkpoints contain none of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.model import DiT, DiTBlock
from blip3o_fast.model.adapter import EVAAdapter, adapt, adapter_layer, padded, width_multiple
from blip3o_fast.model.layers import (
    AdaLN,
    CrossAttention,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    TimestepEmbedder,
)
from blip3o_fast.model.network import Joining, Rotary, Rows, attend, swiglu
from blip3o_fast.model.positions import RotaryTables
from blip3o_fast.ops import Impl, ImplTable, Quantised, quantise_rows

E4M3 = torch.float8_e4m3fn
"""As the dtype of packed weights: FP8 products, and bf16 for the rest."""

Weight = Tensor | Quantised


def multiply(x: Rows, weight: Weight, impl: Impl | None) -> Tensor:
    """``x W^T``; in FP8 by the ``impl`` of the op that computed ``x``."""
    if isinstance(weight, Quantised):
        assert isinstance(x, Quantised)
        return ops.scaled_linear(x, weight, impl=impl)
    assert isinstance(x, Tensor)
    return F.linear(x, weight)


@dataclass(eq=False)
class PackedAttention:
    """The projections of one attention, ``[out, in]``: of its inputs and of its output."""

    project_weight: Weight
    out_weight: Tensor
    heads: int
    kv_heads: int
    rotates: bool
    impls: ImplTable
    packed = True
    __call__ = attend

    def drop_rate(self) -> float:
        """0: sampling drops nothing."""
        return 0.0

    def project(self, h: Rows) -> Tensor:
        """Queries, and in self-attention keys and values."""
        return multiply(h, self.project_weight, self.impls.sandwich_join)

    def out(self, attended: Tensor) -> Tensor:
        """The last projection, layer scale included."""
        return F.linear(attended, self.out_weight)


@dataclass(eq=False)
class PackedSwiGLU:
    """Projections of the MLP."""

    gate_up_weight: Weight
    down_weight: Weight
    impls: ImplTable
    quantised: bool
    __call__ = swiglu

    def gate_up(self, h: Rows) -> Tensor:
        """The first projections."""
        return multiply(h, self.gate_up_weight, self.impls.sandwich_join)

    def activated(self, h: Tensor) -> Tensor:
        """The first projections and their product, by one kernel or by two."""
        weight, impls = self.gate_up_weight, self.impls
        assert isinstance(weight, Tensor)
        return ops.gemm_swiglu(h, weight, impl=impls.gemm_swiglu, swiglu_impl=impls.swiglu)

    def down(self, activated: Rows) -> Tensor:
        """The last projection, layer scale included."""
        return multiply(activated, self.down_weight, self.impls.swiglu)


@dataclass(eq=False)
class PackedBlock:
    """The three branches of a block, and the layer scales that are not folded in."""

    joining: Joining
    self_attn: PackedAttention
    cross_attn: PackedAttention
    mlp: PackedSwiGLU
    layer_scales: tuple[Tensor | None, Tensor | None, Tensor | None]


class PackedAdapterLayer(NamedTuple):
    """The padded projection and the LayerNorm of one layer of the adapter."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float


class Affine(NamedTuple):
    """A linear layer with a bias."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b``."""
        return F.linear(x, self.weight, self.bias)


@dataclass(eq=False)
class PackedAdapter:
    """The EVA adapter, without dropout."""

    layers: tuple[PackedAdapterLayer, ...]
    gate: Affine
    residual: Affine
    impls: ImplTable

    def __call__(self, eva: Tensor) -> Tensor:
        """``[B, M, E]`` to ``[B, M, D]``."""

        def call(layer: PackedAdapterLayer) -> Callable[[Tensor], Tensor]:
            return lambda h: adapter_layer(h, *layer, impls=self.impls)

        width = len(self.residual.weight)
        calls = [call(layer) for layer in self.layers]
        return adapt(eva, calls, self.gate, self.residual, width, self.impls)


@dataclass(eq=False)
class PackedNetwork:
    """All weights of an evaluation and of the preparation of a condition.

    ``norms`` are the weights w1 ``[D]`` of the first norm of every site, in the order of
    ``norm_sites``. They and the rotary tables are fp32 (fp64 for fp64). ``dtype`` is that of
    activations.
    """

    config: DiTConfig
    impls: ImplTable
    joining: Joining
    blocks: tuple[PackedBlock, ...]
    keys_values: Tensor
    input_proj: Affine
    positions: Tensor | None
    output_proj: Affine
    norms: tuple[Tensor, ...]
    rotary: Rotary
    adapter: PackedAdapter | Affine
    dtype: torch.dtype

    @property
    def quantised(self) -> bool:
        """Whether the projections of blocks are FP8."""
        return self.joining.quantised

    def projections(self) -> Iterator[Tensor]:
        """Every packed projection of an evaluation, with its scales in FP8."""
        yield from (self.keys_values, self.input_proj.weight, self.output_proj.weight)
        for block in self.blocks:
            for weight in (
                *(block.self_attn.project_weight, block.self_attn.out_weight),
                *(block.cross_attn.project_weight, block.cross_attn.out_weight),
                *(block.mlp.gate_up_weight, block.mlp.down_weight),
            ):
                yield from weight if isinstance(weight, Quantised) else (weight,)

    def nbytes(self) -> int:
        """Bytes of the packed projections."""
        return sum(tensor.nbytes for tensor in self.projections())


def pack(model: DiT, dtype: torch.dtype, impls: ImplTable) -> PackedNetwork:
    """Pack the present weights of ``model`` in ``dtype``, which may be ``E4M3``."""
    packed, dtype = dtype, activation_dtype(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    config = model.config

    def affine(linear: nn.Linear) -> Affine:
        return Affine(whole(linear.weight).to(dtype), whole(linear.bias).to(dtype))

    adapter = model.eva_adapter
    positions = whole(model.pos_embed).to(dtype) if config.has_positions else None
    return PackedNetwork(
        config=config,
        impls=impls,
        joining=Joining(config.rms_norm_eps, impls, quantised=packed is E4M3),
        blocks=tuple(_pack_block(block, config, packed, impls) for block in model.layers()),
        keys_values=_stack_keys_values(model, dtype),
        input_proj=affine(model.input_proj),
        positions=None if positions is None else positions[:, : config.num_tokens],
        output_proj=affine(model.output_proj),
        norms=tuple(norm.gain * whole(norm.weight).to(wide) for norm, _ in model.norm_sites()),
        rotary=Rotary(model.rotary.cos.to(wide), model.rotary.sin.to(wide)),
        adapter=(
            _pack_adapter(adapter, affine, impls)
            if isinstance(adapter, EVAAdapter)
            else affine(adapter)
        ),
        dtype=dtype,
    )


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations beside weights packed in ``dtype``."""
    return torch.bfloat16 if dtype is E4M3 else dtype


def whole(parameter: Tensor) -> Tensor:
    """A detached parameter. A sharded one is gathered; all ranks must call this together."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


_CLASSES = frozenset(
    (
        *(nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Dropout),
        *(nn.Sequential, nn.ModuleList, RMSNorm, AdaLN, TimestepEmbedder, RotaryTables),
        *(SelfAttention, CrossAttention, SwiGLU, DiTBlock, EVAAdapter),
    )
)


def packable_modules(model: DiT) -> list[nn.Module]:
    """All modules of ``model``.

    Raises:
        TypeError: if something else than its parameters decides what it computes.

    The sampler calls none of the modules, so it would ignore adapters, parametrisations and hooks.
    FSDP, ``torch.compile``, activation checkpointing and accelerate's autocast are allowed: they do
    not change what a module computes.
    """
    modules = walk_modules(model)
    for module in modules:
        kind, own = type(module), module.__dict__
        known = kind in _CLASSES or module is model
        hooked = module._forward_hooks or module._forward_pre_hooks
        # accelerate replaces ``forward`` and keeps the one that it wraps in autocast.
        called = own.get("_original_forward", own.get("forward"))
        replaced = called is not None and called != kind.forward.__get__(module)
        if known and not hooked and not replaced:
            continue
        if hasattr(kind, "unshard") or kind.__name__ in ("OptimizedModule", "CheckpointWrapper"):
            continue
        name = next(name for name, other in model.named_modules() if other is module)
        what = f"{kind.__module__}.{kind.__qualname__}"
        if known:
            what = "hooks" if hooked else "a replaced forward"
        raise TypeError(
            f"generate packs every projection: at {name or 'the model'} expected a module of "
            f"the library's own without hooks, got {what}; merge adapters (LoRA), remove hooks "
            "and parametrisations"
        )
    return modules


def walk_modules(model: nn.Module) -> list[nn.Module]:
    """What ``modules()`` gives, several times faster: ``generate`` looks at all in every call."""
    found: list[nn.Module] = [model]
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _pack_block(
    block: DiTBlock, config: DiTConfig, packed: torch.dtype, impls: ImplTable
) -> PackedBlock:
    attention, cross, mlp = block.self_attn, block.cross_attn, block.mlp
    dtype = activation_dtype(packed)
    # Weights that become e4m3 are rounded once, from fp32.
    source = torch.float32 if packed is E4M3 else dtype

    def product(weight: Tensor) -> Weight:
        return quantise_rows(weight) if packed is E4M3 else weight

    scales = block.layer_scales
    folds = torch.finfo(dtype).tiny <= torch.finfo(torch.float32).tiny
    folded = scales if folds else (None, None, None)
    kept = [None if folds or scale is None else whole(scale).to(dtype) for scale in scales]
    heads = {"heads": attention.heads, "kv_heads": attention.kv_heads, "impls": impls}
    return PackedBlock(
        joining=Joining(config.rms_norm_eps, impls, quantised=packed is E4M3),
        self_attn=PackedAttention(
            product(_rows(source, attention.q_proj, attention.k_proj, attention.v_proj)),
            _scaled(attention.o_proj, folded[0], dtype),
            **heads,
            rotates=attention.rotates,
        ),
        cross_attn=PackedAttention(
            product(_rows(source, cross.q_proj)),
            _scaled(cross.o_proj, folded[1], dtype),
            **heads,
            rotates=cross.rotates,
        ),
        mlp=PackedSwiGLU(
            product(_rows(source, mlp.gate_proj, mlp.up_proj)),
            product(_scaled(mlp.down_proj, folded[2], source)),
            impls,
            quantised=packed is E4M3,
        ),
        layer_scales=(kept[0], kept[1], kept[2]),
    )


def _stack_keys_values(model: DiT, dtype: torch.dtype) -> Tensor:
    """``[2 L K d, D]``: the keys of every layer, then the values of every layer."""
    crosses = [block.cross_attn for block in model.layers()]
    return _rows(dtype, *(c.k_proj for c in crosses), *(c.v_proj for c in crosses))


def _rows(dtype: torch.dtype, *projections: nn.Linear) -> Tensor:
    weights = [whole(projection.weight).to(dtype) for projection in projections]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _scaled(projection: nn.Linear, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight of the projection times the layer scale, rounded once."""
    weight = whole(projection.weight)
    if scale is None:
        return weight.to(dtype)
    wide = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
    return (whole(scale).to(wide)[:, None] * weight).to(dtype)


def _pack_adapter(
    adapter: EVAAdapter, affine: Callable[[nn.Linear], Affine], impls: ImplTable
) -> PackedAdapter:
    layers: list[PackedAdapterLayer] = []
    width = adapter.widths[0]
    for modules in adapter.layers():
        linear, norm = cast(nn.Linear, modules[0]), cast(nn.LayerNorm, modules[1])
        weight, bias = affine(linear)
        weight, bias = padded(weight, bias, width, width_multiple(weight))
        width = len(weight)
        scale, shift = (whole(p).to(weight.dtype) for p in (norm.weight, norm.bias))
        layers.append(PackedAdapterLayer(weight, bias, scale, shift, norm.eps))
    return PackedAdapter(
        tuple(layers),
        affine(cast(nn.Linear, adapter.gate[0])),
        affine(adapter.residual_proj),
        impls,
    )
