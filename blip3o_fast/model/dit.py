"""The network as a module, from state, time and condition to velocity."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_fast.axes import check_shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.model.adapter import EVAAdapter
from blip3o_fast.model.block import DiTBlock
from blip3o_fast.model.layers import (
    AdaLN,
    CrossAttention,
    RMSNorm,
    TimestepEmbedder,
    is_plain,
    keys_values,
    modulations,
)
from blip3o_fast.model.network import (
    BlockCall,
    Joining,
    LinearGuess,
    Rotary,
    Sites,
    block,
    network,
)
from blip3o_fast.model.positions import RotaryTables
from blip3o_fast.ops import Impl, ImplTable, Modulation


class DiT(nn.Module):
    """Diffusion transformer with sandwich norms, grouped-query attention and an EVA adapter.

    Parameters have the published names and shapes. ``impls`` holds the implementation of each fused
    op; ``set_impl`` changes it. ``fitted`` holds the solvers that were fitted to this model
    (``flow.FittedSolver``), by their number of evaluations.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, C = config.hidden_size, config.clip_embedding_size
        self.config = config
        self.impls = ImplTable()
        self.joining = Joining(config.rms_norm_eps, self.impls)
        self.fitted: dict[int, Any] = {}
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
            self.output_pre_norm, self.output_adaln_pre = RMSNorm(D, config.norm_gain), AdaLN(D)
        else:
            self.output_norm, self.output_adaln = RMSNorm(D, config.norm_gain), AdaLN(D)
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
        """Run every fused op by ``impl``, but those named: ``set_impl(Impl.TRITON, rope=None)``."""
        self.impls.set(impl, **per_op)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.pos_embed.dtype

    def output_site(self) -> tuple[RMSNorm, AdaLN]:
        """The norm and AdaLN before the output projection."""
        if self.config.use_sandwich_norm:
            return self.output_pre_norm, self.output_adaln_pre
        return self.output_norm, self.output_adaln

    def norm_sites(self) -> list[tuple[RMSNorm, AdaLN]]:
        """Every norm with its AdaLN: those of each block, then the one before the output."""
        blocks = [site for part in self.layers() for site in part.norm_sites()]
        return [*blocks, self.output_site()]

    def stream(self, context: Tensor) -> Tensor | None:
        """What is added to the projected state at the start: ``[B, N, D]``, or None.

        Token i of the state and token i of the condition are the same patch. Some conventions
        therefore add the adapted EVA tokens ``[B, N, D]``. Learned positions are added here too.
        """
        aligned = context if self.config.rules.aligned_stream else None
        if not self.config.has_positions:
            return aligned
        positions = self.pos_embed[:, : self.config.num_tokens]
        if aligned is None:
            return positions.expand(context.shape[0], -1, -1)
        return aligned + positions

    def linear_guess(self, timestep: Tensor, dtype: torch.dtype) -> LinearGuess | None:
        """The linear part of the velocity at times ``[B]``, two ``[B, 1, 1]``, or None."""
        rules = self.config.rules
        if rules.input_gain is None or rules.output_skip is None:
            return None
        both = (rules.input_gain(timestep), rules.output_skip(timestep))
        return LinearGuess(*(weight.to(dtype)[:, None, None] for weight in both))

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
        activated = nn.functional.silu(self.timestep_embedder(timestep))
        context = self.eva_adapter(encoder_hidden_states)
        rotary = Rotary(self.rotary.cos, self.rotary.sin)
        blocks, output = self._calls(context, activated, rotary)
        velocity, h = network(
            self,
            hidden_states,
            hidden_states.dtype,
            self.stream(context),
            self.linear_guess(timestep, hidden_states.dtype),
            blocks,
            output,
        )
        return {"velocity_prediction": velocity, "hidden_states": h} if return_dict else velocity

    def _calls(
        self, context: Tensor, activated: Tensor, rotary: Rotary
    ) -> tuple[list[BlockCall], Modulation]:
        """The blocks as functions of stream and open branch, and the output's modulation.

        One product gives all modulations, and one the keys and values of all layers. A block that
        somebody wrapped computes its own when it is called.
        """
        blocks = self.layers()
        crosses = [part.cross_attn for part in blocks]
        plain = [is_plain(part, DiTBlock) for part in blocks]
        calls: list[Callable[..., Any]]
        if all(plain) and all(is_plain(cross, CrossAttention) for cross in crosses):
            *found, output = modulations(self.norm_sites(), activated)
            kept = keys_values(crosses, context, rotary)
            sites = Sites.of(found, len(blocks))
            calls = [
                partial(block, part, condition=condition, rotary=rotary, sites=site)
                for part, condition, site in zip(blocks, kept, sites, strict=True)
            ]
        else:
            (output,) = modulations([self.output_site()], activated)
            calls = [
                partial(part, context=context, activated=activated, rotary=rotary, stays=stays)
                for part, stays in zip(self.blocks, plain, strict=True)
            ]
        if self.gradient_checkpointing and self.training:
            calls = [partial(checkpoint, call, use_reentrant=False) for call in calls]
        return calls, output

    def layers(self) -> list[DiTBlock]:
        """The blocks in order."""
        return cast(list[DiTBlock], list(self.blocks))

    def get_num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Recompute each block in the backward pass: less memory for one more forward pass.

        ``transformers.Trainer`` passes ``gradient_checkpointing_kwargs``. Only
        ``{"use_reentrant": False}`` is possible.

        Raises:
            ValueError: for any other option.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False) or options:
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False and nothing else, "
                f"got {dict(gradient_checkpointing_kwargs or {})}"
            )
        self.gradient_checkpointing = True

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """``gradient_checkpointing_enable`` as version 5 of transformers calls it.

        Raises:
            ValueError: if blocks are to be left out or activations to be offloaded.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation_checkpointing: expected every_n_layers=1 and offload=False, got "
                f"every_n_layers={every_n_layers} and offload={offload}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.gradient_checkpointing = False

    def _check_inputs(self, x: Tensor, t: Tensor, eva: Tensor) -> None:
        config = self.config
        N, C, E = config.num_tokens, config.clip_embedding_size, config.eva_embedding_size
        check_shape("hidden_states", x, "B N C", N=N, C=C)
        check_shape("encoder_hidden_states", eva, "B N E", B=x.shape[0], N=N, E=E)
        check_shape("timestep", t, "B", B=x.shape[0])
        if not t.is_floating_point() and config.conventions != "published":
            raise ValueError(f"timestep: expected numbers from 0 to 1, got {t.dtype}")
        device, dtype = self.device, self.dtype
        for name, tensor in (("hidden_states", x), ("encoder_hidden_states", eva)):
            if tensor.device != device:
                raise ValueError(
                    f"{name}: expected {device}, the model's device, got {tensor.device}"
                )
            if tensor.dtype != dtype and not torch.is_autocast_enabled(device.type):
                raise ValueError(
                    f"{name}: expected {dtype}, the dtype of the model, got {tensor.dtype}; "
                    "convert one of them or use autocast"
                )
