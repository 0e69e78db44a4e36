"""One block: self-attention, cross-attention and SwiGLU, each a residual sub-layer.

    h  = norm(x; pre)          y = branch(h)          x' = x + norm(layer_scale * y; post)

``norm`` is a double RMSNorm with AdaLN modulation. Closing a sub-layer and opening the next is one
op, ``ops.sandwich_join``, so a block takes the opened ``h`` with the stream ``x`` and returns
both, opened for whatever follows. The plain pre-norm variant has no ``post``.
"""

import torch
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.model.layers import AdaLN, CrossAttention, RMSNorm, SelfAttention, SwiGLU
from blip3o_fast.ops import ImplTable, Modulation


class DiTBlock(nn.Module):
    """Three sub-layers and the norms around them, under the published parameter names."""

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        D = config.hidden_size
        self.eps = config.rms_norm_eps
        self.sandwich = config.use_sandwich_norm
        self.impls = impls
        self.self_attn = SelfAttention(config, impls)
        self.cross_attn = CrossAttention(config, impls)
        self.mlp = SwiGLU(config, impls)
        self.layer_scale_1 = layer_scale(config)
        self.layer_scale_2 = layer_scale(config)
        self.layer_scale_3 = layer_scale(config)
        if self.sandwich:
            self.self_attn_pre_norm, self.self_attn_ada_ln_pre = RMSNorm(D), AdaLN(D)
            self.self_attn_post_norm, self.self_attn_ada_ln_post = RMSNorm(D), AdaLN(D)
            self.cross_attn_pre_norm, self.cross_attn_ada_ln_pre = RMSNorm(D), AdaLN(D)
            self.cross_attn_post_norm, self.cross_attn_ada_ln_post = RMSNorm(D), AdaLN(D)
            self.mlp_pre_norm, self.mlp_ada_ln_pre = RMSNorm(D), AdaLN(D)
            self.mlp_post_norm, self.mlp_ada_ln_post = RMSNorm(D), AdaLN(D)
        else:
            self.norm1, self.ada_ln1 = RMSNorm(D), AdaLN(D)
            self.norm2, self.ada_ln2 = RMSNorm(D), AdaLN(D)
            self.norm3, self.ada_ln3 = RMSNorm(D), AdaLN(D)

    def pre_sites(self) -> list[tuple[RMSNorm, AdaLN]]:
        """The norm and AdaLN that open each of the three sub-layers."""
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
        ]

    def post_sites(self) -> list[tuple[RMSNorm, AdaLN]]:
        """The norm and AdaLN that close each sub-layer; empty without sandwich norm."""
        if not self.sandwich:
            return []
        return [
            (self.self_attn_post_norm, self.self_attn_ada_ln_post),
            (self.cross_attn_post_norm, self.cross_attn_ada_ln_post),
            (self.mlp_post_norm, self.mlp_ada_ln_post),
        ]

    def opening(self, activated: Tensor) -> Modulation:
        """What opens this block's self-attention; ``activated`` is SiLU of the time embedding."""
        norm, ada_ln = self.pre_sites()[0]
        return ada_ln.modulation(norm, activated)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        context: Tensor,
        activated: Tensor,
        cos: Tensor,
        sin: Tensor,
        following: Modulation,
    ) -> tuple[Tensor, Tensor]:
        """Stream ``x`` and opened ``h`` ``[B, N, D]``, adapted EVA tokens ``[B, M, D]``."""
        pre = [ada_ln.modulation(norm, activated) for norm, ada_ln in self.pre_sites()[1:]]
        post = [ada_ln.modulation(norm, activated) for norm, ada_ln in self.post_sites()]
        post = post or [None, None, None]
        x, h = self.join(x, self.self_attn(h, cos, sin), self.layer_scale_1, post[0], pre[0])
        y = self.cross_attn(h, context, cos, sin)
        x, h = self.join(x, y, self.layer_scale_2, post[1], pre[1])
        return self.join(x, self.mlp(h), self.layer_scale_3, post[2], following)

    def join(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor | None,
        post: Modulation | None,
        pre: Modulation,
    ) -> tuple[Tensor, Tensor]:
        """Close a sub-layer and open the next."""
        x, h = ops.sandwich_join(
            x, y, scale, post, pre, eps=self.eps, impl=self.impls.sandwich_join
        )
        assert h is not None
        return x, h


def layer_scale(config: DiTConfig) -> nn.Parameter | None:
    """Per-channel scale of a branch, or None where the configuration leaves it out."""
    if config.layer_scale_init_value <= 0:
        return None
    return nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init_value))
