"""The configuration of a model: one frozen record, and the four published sizes."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal, Self

from blip3o_fast.checked import Count, Positive, Share, check, check_names, from_json
from blip3o_fast.conventions import Conventions, ConventionsName, find_conventions

Size = Literal["tiny", "small", "base", "large"]
TrainingMode = Literal["patch_only", "cls_patch"]


@dataclass(unsafe_hash=True)
class DiTConfig:
    """Dimensions and constants of a BLIP3-o DiT, under the published field names.

    Fields never change; ``replace`` makes another configuration.

    Attributes:
        hidden_size: width D of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads H; D / H is the head width d, a multiple of 4.
        num_key_value_heads: key and value heads K; divides H.
        intermediate_size: inner width I of the SwiGLU.
        eva_embedding_size: width E of the condition.
        clip_embedding_size: width C of the state.
        num_tokens: tokens N of the state: the product of ``grid``, plus one for a CLS token.
        max_position_embeddings: rows of the learned ``pos_embed``, used without ``use_3d_rope``.
            Published models with more tokens than rows do without.
        use_3d_rope: rotary positions on the grid. Off: 1-D rotary positions and ``pos_embed``.
        rope_theta: longest rotary period is ``2 pi * rope_theta`` positions.
        image_size, patch_size: in pixels. Their ratio is the default grid's height and width.
        use_sandwich_norm: norm and modulate each branch's output as well as its input.
        rms_norm_eps: added to mean squares.
        dropout_prob: on the MLP's output, in training.
        attention_dropout: on attention weights, in training.
        initializer_range: scale of the initial weights of every projection.
        layer_scale_init_value: initial layer scale; 0 or less leaves layer scales out.
        use_gradient_checkpointing: recompute each block in the backward pass.
        training_mode: ``patch_only`` (no CLS token) or ``cls_patch`` (CLS first).
        use_grouped_query_attention: published files have it. Off requires K = H.
        zero_init_output: start from zero velocity.
        use_eva_adapter: the gated MLP adapter. Off: one linear map.
        eva_adapter_layers: layers of the adapter's MLP, widths spaced evenly from E to D.
        eva_adapter_dropout: in the adapter, in training.
        conventions: ``consistent`` or ``published``; see ``blip3o_fast.conventions``.
        grid: (depth, height, width) of the patches; None: (1, image / patch, image / patch).
        simple_scale_factor: training multiplied its targets by this; ``generate`` divides by it.
        condition_dropout: probability with which training zeroed the condition. Guidance needs it
            above 0.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    num_key_value_heads: Count = 4
    intermediate_size: Count = 3072
    eva_embedding_size: Count = 4096
    clip_embedding_size: Count = 1024
    num_tokens: Count = 256
    max_position_embeddings: Count = 256
    use_3d_rope: bool = True
    rope_theta: Positive = 10000.0
    image_size: Count = 224
    patch_size: Count = 14
    use_sandwich_norm: bool = True
    rms_norm_eps: Positive = 1e-6
    dropout_prob: Share = 0.0
    attention_dropout: Share = 0.0
    initializer_range: Positive = 0.01
    layer_scale_init_value: float = 0.1
    use_gradient_checkpointing: bool = False
    training_mode: TrainingMode = "patch_only"
    use_grouped_query_attention: bool = True
    zero_init_output: bool = True
    use_eva_adapter: bool = True
    eva_adapter_layers: Count = 6
    eva_adapter_dropout: Share = 0.1
    conventions: ConventionsName = "consistent"
    grid: tuple[Count, Count, Count] | None = None
    simple_scale_factor: Positive = 1.0
    condition_dropout: Share = 0.0

    def __setattr__(self, name: str, value: object) -> None:
        # transformers.Trainer sets ``use_cache`` on the configuration of any model it trains.
        if name != "use_cache" and (name in vars(self) or name not in self.__dataclass_fields__):
            raise FrozenInstanceError(f"{name}: a configuration is fixed; use replace({name}=...)")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        check(self)
        if self.grid is None:
            side = self.image_size // self.patch_size
            object.__setattr__(self, "grid", (1, side, side))
        self._check_dimensions()

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def norm_gain(self) -> float:
        """What multiplies the weight of a norm that AdaLN follows, so that one epsilon serves both.

        AdaLN normalises the norm's output y with an epsilon of its own, and
        ``rms(c y; e) = rms(y; e / c^2)``: with c the root of their ratio, ``rms_norm_eps`` does the
        work of both.
        """
        own = self.rules.ada_ln_eps
        return 1.0 if own is None else math.sqrt(self.rms_norm_eps / own)

    @property
    def has_positions(self) -> bool:
        """Whether learned positions are added to the stream."""
        return not self.use_3d_rope and self.num_tokens <= self.max_position_embeddings

    @property
    def rules(self) -> Conventions:
        """The record that ``conventions`` names."""
        return find_conventions(self.conventions)

    @property
    def has_cls(self) -> bool:
        """Whether token 0 of the state is a CLS token."""
        return self.num_tokens > math.prod(self.patches)

    @property
    def patches(self) -> tuple[int, int, int]:
        """The grid (depth, height, width), never None."""
        assert self.grid is not None
        return self.grid

    @classmethod
    def preset(cls, size: Size, **overrides: Any) -> Self:
        """A published size, with some fields replaced.

        Examples:
            >>> DiTConfig.preset("base").num_hidden_layers
            12
        """
        if size not in PRESETS:
            raise ValueError(f"size: expected one of {', '.join(PRESETS)}, got {size!r}")
        check_names(cls, overrides, "config key")
        fields: dict[str, Any] = {**PRESETS[size], **overrides}
        if fields.get("training_mode") == "cls_patch":
            fields.setdefault("num_tokens", 257)
            if find_conventions(fields.get("conventions", cls.conventions)).needs_positions:
                fields.setdefault("max_position_embeddings", 257)
        return cls(**fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the fields of a ``config.json``. Without ``conventions`` it is a published one.

        Raises:
            ValueError: on an unknown key, naming the nearest valid one.
        """
        known = {
            name: value
            for name, value in fields.items()
            if name not in _LIBRARY_KEYS and not name.startswith("_")
        }
        return from_json(cls, {"conventions": "published", **known}, "config")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; ``DiTConfig.from_dict`` reads them back."""
        return {**dataclasses.asdict(self), "grid": list(self.patches)}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        check_names(type(self), changes, "config key")
        return dataclasses.replace(self, **changes)

    def _check_dimensions(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size: expected num_attention_heads ({self.num_attention_heads}) times a "
                f"multiple of 4, got {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads "
                f"({self.num_attention_heads}), got {self.num_key_value_heads}"
            )
        if not self.use_grouped_query_attention and (
            self.num_key_value_heads != self.num_attention_heads
        ):
            raise ValueError(
                f"num_key_value_heads: expected {self.num_attention_heads} without grouped-query "
                f"attention, got {self.num_key_value_heads}"
            )
        grid = self.patches
        if min(grid) < 1:
            raise ValueError(
                f"image_size: expected at least patch_size ({self.patch_size}), "
                f"got {self.image_size}"
            )
        tokens = math.prod(grid) + (self.training_mode == "cls_patch")
        # In published files num_tokens may count a CLS token although the mode has none.
        cls_unsaid = self.conventions == "published" and self.num_tokens == tokens + 1
        if self.num_tokens != tokens and not cls_unsaid:
            raise ValueError(
                f"num_tokens: expected {tokens} for grid {grid} in mode {self.training_mode}, "
                f"got {self.num_tokens}"
            )
        if self.use_3d_rope and self.head_dim % self.rules.head_width_multiple:
            raise ValueError(
                f"hidden_size: the rotary layout of the {self.conventions} conventions expects a "
                f"head width that is a multiple of {self.rules.head_width_multiple}, "
                f"got {self.head_dim}"
            )
        learned = self.use_3d_rope or self.has_positions
        if self.rules.needs_positions and not learned:
            raise ValueError(
                f"max_position_embeddings: expected at least num_tokens ({self.num_tokens}), "
                f"got {self.max_position_embeddings}"
            )


# transformers adds these to a configuration.
_LIBRARY_KEYS = frozenset(
    (
        "architectures",
        "dtype",
        "grid_size",
        "model_type",
        "torch_dtype",
        "transformers_version",
        "format_version",
    )
)

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "initializer_range": 0.008,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1536,
        "initializer_range": 0.01,
    },
    "base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "initializer_range": 0.01,
    },
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "initializer_range": 0.012,
    },
}
"""The published sizes: 61.9, 98.8, 227.5 and 684.3 million parameters."""
