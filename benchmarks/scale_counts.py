"""The cost of a sample, a parameter or a step: the counts behind ``SCALING.md``.

Flops are counted as in ``blip3o_fast.benchmarking.work``. Rates are from data sheets. Nothing here
was measured.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.config import DiTConfig, Size
from blip3o_fast.devices import no_values
from blip3o_fast.extraction.eva import EVAVisionConfig
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.sampling import batches

SAMPLES = 27_000_000
TOKENS = 256
STORED = 2
"""Bytes of a number in a shard, and of an activation, in bf16 or fp16."""
FP32 = 4
ADAM_MOMENTS = 2
PREFETCHED = 4
"""Batches that ``--prefetch`` keeps in device memory."""
EVA_TOWER = EVAVisionConfig(4096, 20480, 32, 32)
"""EVA-CLIP-8B, whose layers and tokens are those of any pre-norm vision transformer."""
CLIP_TOWER = EVAVisionConfig(1024, 4096, 24, 16)
"""CLIP ViT-L/14, in the same terms."""


@dataclass(frozen=True)
class Machine:
    """An H100 SXM and its connections, from data sheets, in bytes and flops a second.

    Attributes:
        flops: dense bf16.
        bandwidth: of HBM3.
        memory: bytes of HBM3.
        cache: bytes of L2.
        nvlink: of one GPU, each direction.
        network: of one 400 Gb/s adapter, each direction.
        pcie: of a Gen5 x16 slot, each direction.
        gpus: in one machine.
    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    cache: float = 50 * 2**20
    nvlink: float = 450e9
    network: float = 400e9 / 8
    pcie: float = 64e9
    gpus: int = 8


H100 = Machine()


@lru_cache
def parameters(config: DiTConfig) -> int:
    """The number of parameters of a model."""
    with no_values():
        return BLIP3oDiT(config).get_num_parameters()


def sample_bytes(config: DiTConfig) -> tuple[int, int]:
    """The bytes of a stored sample: EVA tokens, CLIP tokens."""
    N = config.num_tokens
    return N * config.eva_embedding_size * STORED, N * config.clip_embedding_size * STORED


def translating_flops(size: Size, tokens: int, steps: int, solver: str) -> float:
    """The flops to translate one sample, its condition included."""
    assert solver in ("euler", "heun")
    return work.generation(Shape(size, 1, tokens), steps, solver, STORED).flops


def tower_flops(tower: EVAVisionConfig) -> float:
    """The flops of an encoder for one image: its products, its attention and its patches."""
    N, D, inner = tower.num_positions, tower.hidden_size, tower.intermediate_size
    products = 2.0 * N * (4 * D * D + 2 * D * inner)
    attention = 4.0 * N * N * D
    patches = 2.0 * (N - 1) * tower.num_channels * tower.patch_size**2 * D
    return tower.num_hidden_layers * (products + attention) + patches


def tower_weights(tower: EVAVisionConfig) -> int:
    """The parameters of an encoder's products, which are nearly all."""
    D, inner = tower.hidden_size, tower.intermediate_size
    return tower.num_hidden_layers * (4 * D * D + 2 * D * inner)


def training_flops(size: Size, tokens: int) -> float:
    """The flops to train on one sample: forward, with nothing hoisted, and backward."""
    return work.training_step(Shape(size, 1, tokens), 0, STORED).flops


def evaluation_seconds(size: Size, tokens: int, batch: int) -> tuple[float, float]:
    """The seconds of one evaluation on ``H100``: for its flops, and for its bytes."""
    needed = work.evaluation(Shape(size, batch, tokens).config, batch, STORED)
    return needed.flops / H100.flops, needed.bytes / H100.bandwidth


class Fusion(NamedTuple):
    """What one kernel instead of two would save in an evaluation of one sample.

    Attributes:
        name: what would move into what.
        launches: how many launches it saves.
        bytes: how many bytes are neither written nor read again.
        flops: of the products that the fused kernel must do itself.
    """

    name: str
    launches: int
    bytes: int
    flops: float


def fusions(config: DiTConfig) -> list[Fusion]:
    """Fusions that are not among the fused ops, under the consistent conventions."""
    L, N, D, inner = (
        config.num_hidden_layers,
        config.num_tokens,
        config.hidden_size,
        config.intermediate_size,
    )
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention = 2 * L * work.attention(config, 1, STORED).flops
    rotated = 2 * (H + K) * d + 2 * H * d  # q and k of self-attention, q of cross-attention
    return [
        Fusion("rope in attention", 2 * L, L * N * rotated * STORED, attention),
        Fusion(
            "SwiGLU in the gate-up product",
            L,
            L * N * 4 * inner * STORED,
            L * 2.0 * N * D * 2 * inner,
        ),
        Fusion(
            "joins in the products before them",
            3 * L,
            L * N * 3 * 2 * D * STORED,
            L * 2.0 * N * (2 * D * D + D * inner),
        ),
    ]


def block_activations(config: DiTConfig) -> int:
    """Bytes that one block keeps for each token until its backward pass, under autocast.

    The fused ops keep only inputs. Three joins keep stream, branch and opened branch. Two
    attentions keep q, k, v, the result, and the fp32 log-sum of each head. The MLP keeps packed
    gate and up, and their product.
    """
    D, inner = config.hidden_size, config.intermediate_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    joins, attentions = 9 * D, (H + 2 * K) * d + 2 * K * d + 3 * D
    return STORED * (joins + attentions + 3 * inner) + 2 * H * FP32


def checkpointed_activations(config: DiTConfig) -> int:
    """Bytes that a block keeps for each token with ``--gradient_checkpointing``.

    They are stream and branch, and keys and values of the condition, which are not recomputed.
    """
    return STORED * 2 * (config.hidden_size + config.num_key_value_heads * config.head_dim)


def other_activations(config: DiTConfig, *, multiple: int = 64) -> int:
    """Bytes that adapter, input, output and loss keep for each token. No dropout mask is kept.

    Args:
        config: of the model.
        multiple: the adapter's widths are rounded up to it; 64 on a GPU.
    """
    D, E, C = config.hidden_size, config.eva_embedding_size, config.clip_embedding_size
    widths = sum(work.padded_widths(config, multiple)[1:])
    adapter = 2 * E * STORED + widths * 2 * STORED
    first_join = D if config.rules.aligned_stream else 0
    return adapter + (5 * D + first_join + C) * STORED + 4 * C * FP32


def training_state(config: DiTConfig, *, average: bool = True) -> int:
    """Bytes of weights, gradients, moments and average in fp32, and of the weights in bf16."""
    return parameters(config) * (FP32 * (2 + ADAM_MOMENTS + average) + STORED)


def training_sample(config: DiTConfig, *, checkpointing: bool = False) -> int:
    """Bytes of one more sample in a GPU's batch.

    These are activations; the sample as stored, once for the step and once for each prefetched
    batch; and in fp32 EVA tokens twice (as read, and with dropped conditions), targets and noise.
    """
    E, C, L = config.eva_embedding_size, config.clip_embedding_size, config.num_hidden_layers
    kept = L * block_activations(config)
    if checkpointing:
        kept = L * checkpointed_activations(config) + block_activations(config)
    inputs = (1 + PREFETCHED) * (E + C) * STORED + (2 * E + 2 * C) * FP32
    return config.num_tokens * (kept + other_activations(config) + inputs)


def most_samples(config: DiTConfig, *, checkpointing: bool = False) -> int:
    """How many samples of a training step fit in one GPU beside the state, an upper bound."""
    left = H100.memory - training_state(config)
    return max(0, int(left // training_sample(config, checkpointing=checkpointing)))


def sampling_weights(config: DiTConfig) -> int:
    """Bytes of the plan's packed weights in bf16."""
    return STORED * (work.core_weights(config) + work.conditioning_weights(config))


def micro_batch(config: DiTConfig) -> int:
    """How many samples the plan evaluates together on a GPU."""
    device = torch.device("cuda")
    return batches.micro_batch(config, torch.bfloat16, device, guided=False, working_memory=None)


def sampling_sample(config: DiTConfig) -> int:
    """Bytes of one more sample of a call: condition, noise and result in fp32."""
    E, C = config.eva_embedding_size, config.clip_embedding_size
    return config.num_tokens * (E + 2 * C) * FP32


def sampling_working(config: DiTConfig) -> int:
    """The most bytes that a sample of the micro-batch takes in addition."""
    dtype = torch.bfloat16
    evaluating = batches.evaluation_bytes(config, dtype)
    preparing = batches.conditioning_bytes(config, dtype)
    kept = batches.state_bytes(config) + batches.context_bytes(config, dtype)
    return max(evaluating, preparing) + kept


def all_reduce_seconds(config: DiTConfig, gpus: int, *, adapters: int = 8) -> tuple[float, float]:
    """Seconds to sum one step's fp32 gradients on ``H100``: within machines, and between them.

    A ring moves ``2 (n - 1) / n`` of the gradients through each member. Between machines, each GPU
    sums its eighth with its counterparts, through ``adapters`` adapters a machine.
    """
    gradients = parameters(config) * FP32
    local = min(gpus, H100.gpus)
    machines = gpus // local
    within = 2 * (local - 1) / local * gradients / H100.nvlink
    between = 2 * (machines - 1) / machines * gradients / adapters / H100.network
    return within, between


def checkpoint_bytes(config: DiTConfig, *, average: bool) -> tuple[int, int]:
    """Bytes of ``model.safetensors`` and ``trainer.pt``: moments, and raw weights if averaged."""
    count = parameters(config)
    return count * FP32, count * FP32 * (ADAM_MOMENTS + average)
