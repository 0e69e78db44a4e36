"""A model's weights as the sampler wants them: packed, folded, in the dtype that it computes in.

* Queries, keys and values of self-attention are one projection; so are gate and up.
* Keys and values of every layer's cross-attention are one projection: all key heads, then all value
  heads, so that one rotary call turns the keys of every layer.
* ``layer_scale * (W h) = (layer_scale * W) h``: layer scales are folded into the rows of the
  projection that ends each branch. Not in fp16, whose range ends at 6e-5: a scale of 0.1 would push
  weights of 1e-4 into its subnormals.
* FP8 makes e4m3, with one fp32 scale an output channel, of the projections whose inputs a join, a
  norm or SwiGLU has just computed: all of a block but the two that end its attentions. Activations
  and all else are bf16. A kernel that quantised what attention returns would move 3 D bytes a row
  to halve the time of D^2 multiply-adds: by the H100's 3.0 TB/s and 798 TFLOP/s a loss up to
  D = 800, before its launch is counted.

Beside its model an instance holds a copy of everything a single evaluation needs: 95.9 of base's
227.5 million parameters, 366 MiB in fp32, 183 MiB in bf16, and 111 MiB in FP8, where 75.5 million
are e4m3. The adapter is not copied unless the dtype differs (84 MiB in bf16). Nothing of it appears
in a checkpoint.
"""

from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from blip3o_fast.model import DiT, DiTBlock
from blip3o_fast.model.adapter import EVAAdapter
from blip3o_fast.model.layers import AdaLN, RMSNorm
from blip3o_fast.ops import ImplTable, Quantised, quantise_rows

E4M3 = torch.float8_e4m3fn
"""As a dtype to pack in: FP8 products, bf16 for the rest."""

Weight = Tensor | Quantised


class BlockWeights(NamedTuple):
    """Projections of one block, ``[out, in]``, and the layer scales that are not folded in."""

    qkv: Weight
    self_out: Tensor
    cross_q: Weight
    cross_out: Tensor
    gate_up: Weight
    down: Weight
    scales: tuple[Tensor | None, Tensor | None, Tensor | None]


class PackedWeights(NamedTuple):
    """Everything that one evaluation, or the preparation of a condition, reads.

    ``norms`` are the outer norm weights w1 ``[D]`` of every site, in the order of ``norm_sites``;
    they and the rotary tables are fp32 (fp64 for fp64). ``dtype`` is that of activations;
    ``quantised`` says whether blocks are FP8.
    """

    blocks: tuple[BlockWeights, ...]
    keys_values: Tensor
    input_weight: Tensor
    input_bias: Tensor
    positions: Tensor | None
    output_weight: Tensor
    output_bias: Tensor
    norms: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor
    adapter: nn.Module
    dtype: torch.dtype
    quantised: bool

    def nbytes(self) -> int:
        """Bytes of the packed projections, and of their scales in FP8."""
        tensors = [self.keys_values, self.input_weight, self.output_weight]
        for block in self.blocks:
            for weight in block[:-1]:
                tensors += weight if isinstance(weight, Quantised) else [weight]
        return sum(tensor.nbytes for tensor in tensors)


def norm_sites(model: DiT) -> list[tuple[RMSNorm, AdaLN]]:
    """Every norm with its AdaLN: what opens each of the 3L sub-layers and the output, then what
    closes each sub-layer (none without sandwich norm).
    """
    blocks = model.layers()
    openings = [site for block in blocks for site in block.pre_sites()]
    closings = [site for block in blocks for site in block.post_sites()]
    return [*openings, model.output_site(), *closings]


def pack_weights(model: DiT, dtype: torch.dtype, impls: ImplTable) -> PackedWeights:
    """Pack the weights of ``model``, as they are now, in ``dtype``, which may be ``E4M3``.

    Raises:
        TypeError: if a projection has been replaced by something that cannot be folded.
    """
    packed, dtype = dtype, activation_dtype(dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def narrow(parameter: Tensor) -> Tensor:
        return whole(parameter).to(dtype)

    position = None if model.config.use_3d_rope else narrow(model.pos_embed)
    tokens = model.config.num_tokens
    return PackedWeights(
        blocks=tuple(_pack_block(block, packed) for block in model.layers()),
        keys_values=_stack_keys_values(model, dtype),
        input_weight=narrow(model.input_proj.weight),
        input_bias=narrow(model.input_proj.bias),
        positions=None if position is None else position[:, :tokens],
        output_weight=narrow(model.output_proj.weight),
        output_bias=narrow(model.output_proj.bias),
        norms=tuple(whole(norm.weight).to(wide) for norm, _ in norm_sites(model)),
        cos=model.rotary.cos.to(wide),
        sin=model.rotary.sin.to(wide),
        adapter=_adapter_twin(model, dtype, impls),
        dtype=dtype,
        quantised=packed is E4M3,
    )


def activation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations beside weights packed in ``dtype``."""
    return torch.bfloat16 if dtype is E4M3 else dtype


def whole(parameter: Tensor) -> Tensor:
    """A parameter without its gradient; a sharded one is gathered, which every rank must join."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


Module = TypeVar("Module", bound=nn.Module)


def twin(blank: Module, original: nn.Module, dtype: torch.dtype) -> Module:
    """``blank``, made on the meta device, with the parameters of ``original`` in evaluation mode.

    Storage is shared where the dtype allows. A twin leaves the mode and the hooks of the original
    alone, so sampling in one thread does not switch dropout off in another.
    """
    tensors = {name: whole(p).to(dtype) for name, p in original.named_parameters()}
    blank.load_state_dict(tensors, assign=True)
    return blank.requires_grad_(False).eval()


def _pack_block(block: DiTBlock, packed: torch.dtype) -> BlockWeights:
    attention, cross, mlp = block.self_attn, block.cross_attn, block.mlp
    dtype = activation_dtype(packed)
    # What becomes e4m3 is rounded once, from fp32.
    source = torch.float32 if packed is E4M3 else dtype

    def product(weight: Tensor) -> Weight:
        return quantise_rows(weight) if packed is E4M3 else weight

    scales = [block.layer_scale_1, block.layer_scale_2, block.layer_scale_3]
    kept = [None if scale is None else whole(scale).to(dtype) for scale in scales]
    folds = torch.finfo(dtype).tiny <= torch.finfo(torch.float32).tiny
    folded = scales if folds else [None] * 3
    return BlockWeights(
        qkv=product(_rows(source, attention.q_proj, attention.k_proj, attention.v_proj)),
        self_out=_scaled(attention.o_proj, folded[0], dtype),
        cross_q=product(_rows(source, cross.q_proj)),
        cross_out=_scaled(cross.o_proj, folded[1], dtype),
        gate_up=product(_rows(source, mlp.gate_proj, mlp.up_proj)),
        down=product(_scaled(mlp.down_proj, folded[2], source)),
        scales=(None, None, None) if folds else (kept[0], kept[1], kept[2]),
    )


def _stack_keys_values(model: DiT, dtype: torch.dtype) -> Tensor:
    """``[2 L K d, D]``: the keys of every layer, then the values of every layer."""
    crosses = [block.cross_attn for block in model.layers()]
    return _rows(dtype, *(c.k_proj for c in crosses), *(c.v_proj for c in crosses))


def _rows(dtype: torch.dtype, *projections: nn.Module) -> Tensor:
    weights = [_plain_weight(projection).to(dtype) for projection in projections]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _scaled(projection: nn.Module, scale: Parameter | None, dtype: torch.dtype) -> Tensor:
    """Rows of the projection times the layer scale, rounded once."""
    weight = _plain_weight(projection)
    if scale is None:
        return weight.to(dtype)
    wide = torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)
    return (whole(scale).to(wide)[:, None] * weight).to(dtype)


def _plain_weight(projection: nn.Module) -> Tensor:
    """The weight of a bias-free linear layer that does nothing else."""
    computes = type(projection).forward is nn.Linear.forward
    if not computes or projection._forward_hooks or projection._forward_pre_hooks:
        raise TypeError(
            f"generate packs every projection, expected nn.Linear without hooks, "
            f"got {type(projection).__name__}; merge adapters (LoRA) and remove hooks first"
        )
    return whole(cast(nn.Linear, projection).weight)


def _adapter_twin(model: DiT, dtype: torch.dtype, impls: ImplTable) -> nn.Module:
    adapter = model.eva_adapter
    with torch.device("meta"):
        if isinstance(adapter, EVAAdapter):
            blank = EVAAdapter(model.config, impls)
        else:
            blank = nn.Linear(adapter.in_features, adapter.out_features)
    return twin(blank, adapter, dtype)
