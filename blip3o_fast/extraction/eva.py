"""The EVA-CLIP vision tower (arXiv:2402.04252) as plain modules that read the published keys.

    x = [CLS; patches] + positions                            patches of a P x P convolution
    x = x + attention(norm1(x));  x = x + mlp(norm2(x))       pre-norm, as in EVA-CLIP-8B
    x = x + norm1(attention(x));  x = x + norm2(mlp(x))       post-norm

Patches are in row-major order.

The output is the last layer's, before ``post_layernorm``: the published EVA features. EVA-CLIP-8B
gives ``[B, 3, 224, 224] -> [B, 257, 4096]`` from 32 layers, with CLS first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast.axes import check_shape
from blip3o_fast.devices import no_values
from blip3o_fast.extraction.published_weights import (
    CONFIG,
    find_weights,
    read_shards,
    require_supported,
)
from blip3o_fast.untrusted import reading

PREFIX = "vision_model."
"""Where the published checkpoints keep the vision tower."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class EVAVisionConfig:
    """Dimensions of the tower, under the names of the published ``vision_config``.

    Attributes:
        hidden_size: width E of the tokens.
        intermediate_size: inner width of the MLP.
        num_hidden_layers: layers.
        num_attention_heads: heads; divides ``hidden_size``.
        num_channels: channels of the image.
        image_size, patch_size: pixels.
        hidden_act: ``gelu`` (exact) or ``quick_gelu``.
        layer_norm_eps: number added to variances.
        q_bias, k_bias, v_bias: whether these projections have one.
        post_layernorm: normalise each branch's output instead of its input.
        use_rms_norm: RMSNorm instead of LayerNorm.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    q_bias: bool = True
    k_bias: bool = True
    v_bias: bool = True
    post_layernorm: bool = False
    use_rms_norm: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size ({self.hidden_size}), "
                f"got {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}"
            )

    @classmethod
    def from_published(
        cls, vision_config: Mapping[str, Any], *, use_rms_norm: bool = False
    ) -> "EVAVisionConfig":
        """Read a published ``vision_config``, which holds other fields too.

        Args:
            vision_config: fields; None counts as absent.
            use_rms_norm: what holds when the field of that name is absent.

        Raises:
            ValueError: when a dimension is missing, or a field is set that may change the result
                and is not implemented, such as ``use_rope``.
        """
        names = [field.name for field in fields(cls)]
        require_supported(vision_config, names)
        known = {n: vision_config[n] for n in names if vision_config.get(n) is not None}
        known.setdefault("use_rms_norm", use_rms_norm)
        for name in names[:4]:
            if name not in known:
                raise ValueError(f"vision_config: expected the field {name!r}, which is missing")
        return cls(**known)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_positions(self) -> int:
        """Tokens with CLS."""
        return self.grid[0] * self.grid[1] + 1


class Embeddings(nn.Module):
    """Patches, CLS token and learned positions."""

    def __init__(self, config: EVAVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch)
        self.position_embedding = nn.Embedding(config.num_positions, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, h, w] -> [B, 1 + patches, E]``."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((cls, patches), dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: EVAVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=config.q_bias)
        self.k_proj = nn.Linear(width, width, bias=config.k_bias)
        self.v_proj = nn.Linear(width, width, bias=config.v_bias)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E] -> [B, N, E]``."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (u.unflatten(-1, (self.heads, -1)).transpose(1, 2) for u in projected)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: EVAVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E] -> [B, N, E]``."""
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each with a residual and one norm."""

    def __init__(self, config: EVAVisionConfig) -> None:
        super().__init__()
        norm = nn.RMSNorm if config.use_rms_norm else nn.LayerNorm
        self.layer_norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.post_norm = config.post_layernorm

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, E] -> [B, N, E]``."""
        if self.post_norm:
            x = x + self.layer_norm1(self.self_attn(x))
            return x + self.layer_norm2(self.mlp(x))
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class EVAVisionTower(nn.Module):
    """EVA-CLIP's vision tower, without ``post_layernorm`` and projection.

    >>> tower = EVAVisionTower.from_pretrained("EVA-CLIP-8B", dtype=torch.float16, device="cuda")
    >>> tower(pixel_values).shape
    torch.Size([8, 257, 4096])
    """

    def __init__(self, config: EVAVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.revision = ""
        self.embeddings = Embeddings(config)
        layers = (Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Last hidden state ``[B, 3, S, S] -> [B, 1 + patches, E]``, CLS first, patches row-major.

        Raises:
            ValueError: when the pixels have another shape.
        """
        side, channels = self.config.image_size, self.config.num_channels
        check_shape("pixel_values", pixel_values, "B c h w", c=channels, h=side, w=side)
        x = self.embeddings(pixel_values)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return x

    @classmethod
    def from_published(
        cls, state_dict: Mapping[str, Tensor], vision_config: Mapping[str, Any]
    ) -> "EVAVisionTower":
        """Build the tower from the published keys ``vision_model.*``, using their tensors uncopied.

        Args:
            state_dict: published weights; keys of other parts of the model are left alone.
            vision_config: published ``vision_config``. Where it does not say ``use_rms_norm``,
                norms without a bias in the weights are RMSNorm.

        Raises:
            ValueError: on a key that is missing, left over or of another shape.
        """
        weights = {k.removeprefix(PREFIX): v for k, v in state_dict.items() if k.startswith(PREFIX)}
        biased = "encoder.layers.0.layer_norm1.bias" in weights
        config = EVAVisionConfig.from_published(vision_config, use_rms_norm=not biased)
        if config.num_hidden_layers > len(weights):
            raise ValueError(
                f"num_hidden_layers: expected at most {len(weights)}, the tensors, got "
                f"{config.num_hidden_layers}"
            )
        with no_values():
            tower = cls(config)
        tower._check(weights)
        used = {key: weights[key] for key in tower.state_dict()}
        tower.load_state_dict(used, assign=True)
        return tower.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "EVAVisionTower":
        """Load ``config.json`` and the weight shards of a local folder or a hub repository.

        Each tensor is converted and moved as it is read, so the peak is one tower and one tensor.
        No code of the repository runs.

        Args:
            path_or_hub_id: a folder, or a hub id such as ``hf:BAAI/EVA-CLIP-8B``.
            revision: commit, tag or branch of the hub repository.
            dtype: of the tower; None keeps the stored one.
            device: of the tower.

        Raises:
            FileNotFoundError: when the folder or its files are missing.
            ValueError: on a damaged shard, a missing key or another shape.
        """
        folder = find_weights(path_or_hub_id, revision)
        shards = read_shards(folder, PREFIX)
        # Copies, so that the tower does not change or end with the file.
        weights = {k: x.to(device=device, dtype=dtype, copy=True) for k, x in shards}
        with reading(folder.path / CONFIG, "the configuration of these weights"):
            tower = cls.from_published(weights, folder.config.get("vision_config", folder.config))
        tower.revision = folder.revision
        return tower

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        expected = self.state_dict()
        for key, parameter in expected.items():
            if key not in weights:
                raise ValueError(
                    f"EVA weights: expected the key {PREFIX + key!r}, which is missing"
                )
            if weights[key].shape != parameter.shape:
                raise ValueError(
                    f"{PREFIX + key}: expected shape {list(parameter.shape)}, "
                    f"got {list(weights[key].shape)}; does config.json belong to these weights?"
                )
        unused = ("post_layernorm.", "embeddings.position_ids")
        left = [key for key in weights if key not in expected and not key.startswith(unused)]
        if left:
            raise ValueError(f"EVA weights: unexpected key {PREFIX + min(left)!r}")
