"""How close generated tokens are to the true ones: the metrics and their records.

For generated g and target x, both ``[n, N, C]``, and the training mean m (``[N, C]``):

    token cosine     mean over tokens, then samples, of cos(g_i, x_i)
    image cosine     cos(mean_i g_i, mean_i x_i): the "CLIP similarity" of the published results
    centred cosine   token cosine of g - m and x - m; a constant prediction m scores 0
    MSE              mean of (g - x)^2
    R2               1 - sum (g - x)^2 / sum (x - m)^2, so that the mean predictor scores 0
    variance ratio   sum (g - m)^2 / sum (x - m)^2: 1 for samples as varied as the data, less for
                     means
    energy distance  of generated to true tokens as distributions, one token of each sample
                     (``similarity.energy_distance``): 0 for samples, more for means
    R@k              own partner among the k nearest by cosine of centred image means, both ways
    CKA              linear CKA of image means

The published metric is the weakest of these: raw CLIP tokens share a large mean, and averaging
tokens removes their own errors. With a CLS token (position 0) all of the above are over patches,
and CLS is reported apart.

This module holds the records and the arithmetic of one batch; ``accumulator`` streams over batches.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.evaluation.bootstrap import Estimate, FloatArray

RECALL_AT = (1, 5, 10)
THRESHOLDS = (0.7, 0.8, 0.9)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_NO_DIRECTION = 1e-6  # a relative difference this small is rounding and has no direction


@dataclass(frozen=True)
class ClsMetrics:
    """The CLS token alone."""

    cosine: Estimate
    centred_cosine: Estimate
    mse: Estimate


@dataclass(frozen=True)
class Metrics:
    """Summary of n samples. Intervals resample source photos; CKA and quantiles have none.

    Attributes:
        samples: n.
        sources: distinct source photos, the units of the bootstrap.
        tokens: patch tokens per sample.
        resamples, confidence: of every interval.
        token_cosine, image_cosine, centred_cosine, mse, r2, variance_ratio: as in the module's
            docstring.
        energy_distance: the same; None for a single sample.
        recall_generated_to_target: k to R@k, a generated vector searching the targets; without the
            k that are n or more, where every search succeeds.
        recall_target_to_generated: the same, a target searching the generated vectors.
        cka: linear CKA, biased upwards when samples are not many times C; None for a single sample.
        cka_debiased: its debiased form; None below four samples.
        image_cosine_above: threshold to the share of samples whose image cosine exceeds it.
        quantiles: name of a per-sample value to level to quantile.
        position_cosine: mean token cosine at each of the patch positions, row-major.
        cls: the CLS token, None where there is none.
    """

    samples: int
    sources: int
    tokens: int
    resamples: int
    confidence: float
    token_cosine: Estimate
    image_cosine: Estimate
    centred_cosine: Estimate
    mse: Estimate
    r2: Estimate
    variance_ratio: Estimate
    energy_distance: float | None
    recall_generated_to_target: Mapping[int, Estimate]
    recall_target_to_generated: Mapping[int, Estimate]
    cka: float | None
    cka_debiased: float | None
    image_cosine_above: Mapping[float, Estimate]
    quantiles: Mapping[str, Mapping[float, float]]
    position_cosine: tuple[float, ...]
    cls: ClsMetrics | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: dictionaries with string keys, lists, numbers and None."""
        return {**_string_keys(asdict(self)), "position_cosine": list(self.position_cosine)}


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Per-sample values in the order in which samples were added, each ``[n]`` in fp64.

    ``sources`` names each sample's photo; without photos it repeats ``keys``.
    """

    keys: tuple[str, ...]
    sources: tuple[str, ...]
    token_cosine: FloatArray
    image_cosine: FloatArray
    centred_cosine: FloatArray
    mse: FloatArray


def token_cosines(generated: Tensor, target: Tensor) -> Tensor:
    """Cosine of each token pair: two ``[n, N, C]`` to ``[n, N]`` in fp32; a zero token scores 0."""
    check_shape("generated", generated, "B N C")
    n, N, C = generated.shape
    check_shape("target", target, "B N C", B=n, N=N, C=C)
    return F.cosine_similarity(generated.float(), target.float(), dim=-1, eps=1e-8)


def patch_rows(g: Tensor, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Per-sample values, and token cosines ``[n, N]``, of patches ``[n, N, C]``.

    ``mean`` is the training mean ``[N, C]``. Values are ``[n]``, the four image means ``[n, C]``.
    """
    cosines = token_cosines(g, x)
    centred = F.cosine_similarity(_difference(g, mean), _difference(x, mean), dim=-1, eps=1e-8)
    g_image, x_image, mean_image = g.mean(1), x.mean(1), mean.mean(0)
    rows = {
        "token_cosine": cosines.mean(1),
        "image_cosine": F.cosine_similarity(g_image, x_image, dim=-1, eps=1e-8),
        "centred_cosine": centred.mean(1),
        "mse": (g - x).square().mean((1, 2)),
        "generated_variance": (g - mean).square().mean((1, 2)),
        "target_variance": (x - mean).square().mean((1, 2)),
        "generated_mean": g_image,
        "target_mean": x_image,
        "generated_centred_mean": _difference(g_image, mean_image),
        "target_centred_mean": _difference(x_image, mean_image),
    }
    return rows, cosines


def cls_rows(g: Tensor, x: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Per-sample values of the CLS token ``[n, C]`` with its training mean ``[C]``."""
    centred = F.cosine_similarity(_difference(g, mean), _difference(x, mean), dim=-1, eps=1e-8)
    return {
        "cls_cosine": F.cosine_similarity(g, x, dim=-1, eps=1e-8),
        "cls_centred_cosine": centred,
        "cls_mse": (g - x).square().mean(-1),
    }


def _difference(x: Tensor, mean: Tensor) -> Tensor:
    """``x - mean``, exactly zero where the two agree to rounding."""
    difference = x - mean
    rounding = difference.norm(dim=-1, keepdim=True) <= _NO_DIRECTION * x.norm(dim=-1, keepdim=True)
    return difference.masked_fill(rounding, 0.0)


def _string_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _string_keys(inner) for key, inner in value.items()}
    return value
