"""The network: state, time and condition to velocity."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_fast import ops
from blip3o_fast.axes import check_shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.model.adapter import EVAAdapter
from blip3o_fast.model.block import DiTBlock
from blip3o_fast.model.layers import AdaLN, RMSNorm, TimestepEmbedder
from blip3o_fast.model.positions import RotaryTables
from blip3o_fast.ops import Impl, ImplTable, Modulation


def skip_coefficient(t: Tensor) -> Tensor:
    """``c(t) = (2t - 1) / (t^2 + (1 - t)^2)``: the velocity is ``c(t) x_t`` plus what the network
    adds.

    ``c(t) x_t`` is the best linear guess of ``v = x_1 - eps`` from ``x_t`` alone when both are
    uncorrelated with unit variance: E[v x_t] / E[x_t^2]. Without it the network has to carry the
    noise itself through every norm to its output, and at t = 0, where v = E[x_1] - eps, whatever
    it loses of eps is error of the estimate. The same idea as the skip of arXiv:2206.00364, and
    like it without parameters. It belongs to the consistent conventions; published weights know no
    skip.
    """
    return (2 * t - 1) / (t.square() + (1 - t).square())


def clean_coefficient(t: Tensor) -> Tensor:
    """``t / (t^2 + (1 - t)^2)``: times ``x_t``, the best linear guess of ``x_1`` from ``x_t``.

    The consistent conventions show the network this guess instead of ``x_t``. At t = 0, where
    ``x_t`` is noise and says nothing, it is zero: with the skip of ``-x_t`` a single Euler step
    then gives an estimate of the conditional mean that does not depend on the noise at all.
    """
    return t / (t.square() + (1 - t).square())


class DiT(nn.Module):
    """Diffusion transformer with sandwich norms, grouped-query attention and an EVA adapter.

    Parameters carry the published names and shapes. ``impls`` says which implementation of each
    fused op runs; ``set_impl`` changes it.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, C = config.hidden_size, config.clip_embedding_size
        self.config = config
        self.impls = ImplTable()
        self.gradient_checkpointing = config.use_gradient_checkpointing
        self.input_proj = nn.Linear(C, D)
        self.timestep_embedder = TimestepEmbedder(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.max_position_embeddings, D))
        self.eva_adapter: EVAAdapter | nn.Linear = (
            EVAAdapter(config, self.impls)
            if config.use_eva_adapter
            else nn.Linear(config.eva_embedding_size, D)
        )
        self.blocks = nn.ModuleList(
            DiTBlock(config, self.impls) for _ in range(config.num_hidden_layers)
        )
        if config.use_sandwich_norm:
            self.output_pre_norm, self.output_adaln_pre = RMSNorm(D), AdaLN(D)
        else:
            self.output_norm, self.output_adaln = RMSNorm(D), AdaLN(D)
        self.output_proj = nn.Linear(D, C)
        self.rotary = RotaryTables(config)
        self._initialise()

    def _initialise(self) -> None:
        spread = self.config.initializer_range
        nn.init.normal_(self.input_proj.weight, std=0.5 * spread)
        nn.init.zeros_(self.input_proj.bias)
        nn.init.normal_(self.pos_embed, std=0.005)
        std = 0.1 * spread / self.config.num_hidden_layers**0.5
        nn.init.normal_(self.output_proj.weight, std=0 if self.config.zero_init_output else std)
        nn.init.zeros_(self.output_proj.bias)

    def set_impl(self, impl: Impl | None = None, **per_op: Impl | None) -> None:
        """Run every fused op in ``impl`` but those named: ``set_impl(Impl.TRITON, rope=None)``."""
        self.impls.set(impl, **per_op)

    def output_site(self) -> tuple[RMSNorm, AdaLN]:
        """The norm and AdaLN before the output projection."""
        if self.config.use_sandwich_norm:
            return self.output_pre_norm, self.output_adaln_pre
        return self.output_norm, self.output_adaln

    def embed_state(self, hidden_states: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """State ``[B, N, C]`` and adapted EVA tokens ``[B, N, D]`` to the stream ``[B, N, D]``.

        Token i of the state and token i of the condition are the same patch, so the consistent
        conventions add the one to the other; the published model leaves cross-attention to find it.
        """
        if self.config.conventions == "consistent":
            gain = clean_coefficient(timestep).to(hidden_states.dtype)[:, None, None]
            x = self.input_proj(gain * hidden_states) + context
        else:
            x = self.input_proj(hidden_states)
        return x if self.config.use_3d_rope else x + self.pos_embed[:, : x.shape[1]]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> dict[str, Tensor] | Tensor:
        """Predict the velocity.

        Args:
            hidden_states: state x_t, ``[B, N, C]``.
            timestep: ``[B]`` in [0, 1]; 0 is noise, 1 is data.
            encoder_hidden_states: EVA tokens ``[B, N, E]``.
            return_dict: False returns the velocity alone.

        Returns:
            ``velocity_prediction`` ``[B, N, C]`` and ``hidden_states`` ``[B, N, D]`` (after the
            output norm).

        Raises:
            ValueError: on a wrong shape, dtype or device, saying what was expected and what came.
        """
        self._check_inputs(hidden_states, timestep, encoder_hidden_states)
        config = self.config
        cos, sin = self.rotary.cos, self.rotary.sin
        activated = nn.functional.silu(self.timestep_embedder(timestep))
        context = self.eva_adapter(encoder_hidden_states)
        openings = self.openings(activated)

        x = self.embed_state(hidden_states, timestep, context)
        h = ops.sandwich_norm(
            x, *openings[0], eps=config.rms_norm_eps, impl=self.impls.sandwich_norm
        )
        for block, following in zip(self.layers(), openings[1:], strict=True):
            inputs = (x, h, context, activated, cos, sin, following)
            if self.gradient_checkpointing and self.training:
                x, h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, h = block(*inputs)

        velocity = self.output_proj(h)
        if config.conventions == "consistent":
            skip = skip_coefficient(timestep).to(hidden_states.dtype)[:, None, None]
            velocity = velocity + skip * hidden_states
        return {"velocity_prediction": velocity, "hidden_states": h} if return_dict else velocity

    def layers(self) -> list[DiTBlock]:
        """The blocks in order."""
        return cast(list[DiTBlock], list(self.blocks))

    def openings(self, activated: Tensor) -> list[Modulation]:
        """What opens each block, then what opens the output projection."""
        norm, ada_ln = self.output_site()
        blocks = [block.opening(activated) for block in self.layers()]
        return [*blocks, ada_ln.modulation(norm, activated)]

    def get_num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each block in the backward pass: less memory, one more forward."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.gradient_checkpointing = False

    def _check_inputs(self, x: Tensor, t: Tensor, eva: Tensor) -> None:
        config = self.config
        N, C, E = config.num_tokens, config.clip_embedding_size, config.eva_embedding_size
        check_shape("hidden_states", x, "B N C", N=N, C=C)
        check_shape("encoder_hidden_states", eva, "B N E", B=x.shape[0], N=N, E=E)
        check_shape("timestep", t, "B", B=x.shape[0])
        weight = self.input_proj.weight
        for name, tensor in (("hidden_states", x), ("encoder_hidden_states", eva)):
            if tensor.device != weight.device:
                raise ValueError(
                    f"{name}: expected {weight.device}, the model's device, got {tensor.device}"
                )
            if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
                raise ValueError(
                    f"{name}: expected {weight.dtype}, the dtype of the model, got {tensor.dtype}; "
                    "convert one of them or use autocast"
                )
