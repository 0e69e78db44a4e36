"""One block as a module, with parameters under the published names."""

import torch
from torch import Tensor, nn

from blip3o_fast.config import DiTConfig
from blip3o_fast.model import network
from blip3o_fast.model.layers import (
    AdaLN,
    CrossAttention,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    modulations,
)
from blip3o_fast.model.network import Branch, Joining, Rotary, Sites
from blip3o_fast.ops import ImplTable, Modulation


class DiTBlock(nn.Module):
    """Three branches and the norms around them.

    A block first closes the last branch of the block before it, and returns its own last branch
    open. It reads only its own parameters, so it can be sharded, compiled, checkpointed and hooked
    by itself.
    """

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        D, gain = config.hidden_size, config.norm_gain
        self.joining = Joining(config.rms_norm_eps, impls)
        self.sandwich = config.use_sandwich_norm
        self.self_attn = SelfAttention(config, impls)
        self.cross_attn = CrossAttention(config, impls)
        self.mlp = SwiGLU(config, impls)
        self.layer_scale_1 = layer_scale(config)
        self.layer_scale_2 = layer_scale(config)
        self.layer_scale_3 = layer_scale(config)
        if self.sandwich:
            self.self_attn_pre_norm, self.self_attn_ada_ln_pre = RMSNorm(D, gain), AdaLN(D)
            self.self_attn_post_norm, self.self_attn_ada_ln_post = RMSNorm(D, gain), AdaLN(D)
            self.cross_attn_pre_norm, self.cross_attn_ada_ln_pre = RMSNorm(D, gain), AdaLN(D)
            self.cross_attn_post_norm, self.cross_attn_ada_ln_post = RMSNorm(D, gain), AdaLN(D)
            self.mlp_pre_norm, self.mlp_ada_ln_pre = RMSNorm(D, gain), AdaLN(D)
            self.mlp_post_norm, self.mlp_ada_ln_post = RMSNorm(D, gain), AdaLN(D)
        else:
            self.norm1, self.ada_ln1 = RMSNorm(D, gain), AdaLN(D)
            self.norm2, self.ada_ln2 = RMSNorm(D, gain), AdaLN(D)
            self.norm3, self.ada_ln3 = RMSNorm(D, gain), AdaLN(D)

    @property
    def layer_scales(self) -> tuple[Tensor | None, ...]:
        """Per-channel scales of the three branches, or None."""
        return self.layer_scale_1, self.layer_scale_2, self.layer_scale_3

    def norm_sites(self) -> list[tuple[RMSNorm, AdaLN]]:
        """The norm and AdaLN that open the three branches, then those that close them, if any."""
        if not self.sandwich:
            return [
                (self.norm1, self.ada_ln1),
                (self.norm2, self.ada_ln2),
                (self.norm3, self.ada_ln3),
            ]
        return [
            (self.self_attn_pre_norm, self.self_attn_ada_ln_pre),
            (self.cross_attn_pre_norm, self.cross_attn_ada_ln_pre),
            (self.mlp_pre_norm, self.mlp_ada_ln_pre),
            (self.self_attn_post_norm, self.self_attn_ada_ln_post),
            (self.cross_attn_post_norm, self.cross_attn_ada_ln_post),
            (self.mlp_post_norm, self.mlp_ada_ln_post),
        ]

    def forward(
        self,
        x: Tensor,
        branch: Branch | None,
        context: Tensor,
        activated: Tensor,
        rotary: Rotary,
        stays: bool = False,
    ) -> tuple[Tensor, Branch]:
        """The new stream and open branch.

        Args:
            x: the stream, ``[B, N, D]``.
            branch: the open branch of the block before, or None.
            context: adapted EVA tokens, ``[B, M, D]``.
            activated: SiLU of the time's embedding, ``[B, D]``.
            rotary: of the tokens.
            stays: the parameters stay in memory after this call. FSDP frees them, and may have
                wrapped the block or a module around it. The branch then needs copies.
        """
        (sites,) = Sites.of(modulations(self.norm_sites(), activated), 1)
        x, last = network.block(self, x, branch, context, rotary, sites)
        return x, last if stays else _owned(last)


def _owned(branch: Branch) -> Branch:
    """The branch with copies of its parameters, three rows of D numbers, made in one launch."""
    scale, post = branch.layer_scale, branch.post
    parameters = [scale, *(post[:2] if post is not None else ())]
    given = [p for p in parameters if p is not None]
    if not given:
        return branch
    copies = iter(torch.stack(given).unbind())
    if scale is not None:
        scale = next(copies)
    if post is not None:
        post = Modulation(next(copies), next(copies), post.shift, post.scale)
    return Branch(branch.y, scale, post)


def layer_scale(config: DiTConfig) -> nn.Parameter | None:
    """Per-channel scale of a branch, or None where the configuration leaves it out."""
    if config.layer_scale_init_value <= 0:
        return None
    return nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))
