"""The four-term loss of rectified-flow training, and its gradient in the velocity.

With v the velocity, x1 the data, c = x_t + s (1 - t) v the clean estimate (s = 1; -1 ``published``)
and A the samples that count (all, or with ``masks`` only those with t > 0.5):

    velocity = mean (v - (x1 - noise))^2       semantic = mean over A of mean_nc (c - x1)^2
    cosine = 1 - mean_bn cos(c, x1)            consistency = mean_A 1 - cos(mean_n c, mean_n x1)

    total = sum of weight_k term_k, where ``published`` caps the terms and the total

Three stages in a fixed order, without atomics and without a wait of the host. (1) Programs walk the
tokens of a sample and write their sums, among them c and x1 summed over tokens, by column. (2) One
program for each sample adds these and computes the cosine of the means and its gradient. (3) One
program adds the samples. It writes the terms, and for each sum d total / d (sum), which is its
factor in the gradient. Backward is then a map over rows. It cannot be part of the first stage,
since the cosine of the means and the caps need the sums of all tokens.

Forward, per row: reads 4 C elements, and writes 2 C sums per program. Backward, per row: reads 4 C,
writes C; saves nothing of that size. Computes in fp32 (fp64 for an fp64 velocity).
"""

from functools import partial

import triton.language as tl
from torch import Tensor

from blip3o_kernels.flow_loss_terms import (
    SUMS,
    clean_scale,
    cosine,
    counts,
    sample_stage,
    total_stage,
)
from blip3o_kernels.launch import (
    accumulator,
    blank,
    block_launch,
    on_device,
    torch_accumulator,
    unit_stride,
)
from blip3o_kernels.tiles import load_row, load_vector, token_range
from blip3o_kernels.typed import cdiv, jit, next_power_of_2

TERMS = 4
SAMPLES = 128
"""Samples that the last stage adds at a time."""


@jit
def _load(
    velocity,
    x_t,
    x_1,
    noise,
    token,
    cols,
    velocity_n,
    velocity_d,
    x_t_n,
    x_t_d,
    x_1_n,
    x_1_d,
    noise_n,
    noise_d,
    inside,
    scale,
    ACC: tl.constexpr,
):
    """The clean estimate, the data, and velocity minus target, of one row."""
    v = load_row(velocity, token, cols, velocity_n, velocity_d, inside, ACC)
    data = load_row(x_1, token, cols, x_1_n, x_1_d, inside, ACC)
    clean = load_row(x_t, token, cols, x_t_n, x_t_d, inside, ACC) + scale * v
    return clean, data, v - (data - load_row(noise, token, cols, noise_n, noise_d, inside, ACC))


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _sums_kernel(
    velocity,
    x_t,
    x_1,
    noise,
    t,
    partial,
    columns,
    tokens,
    rows,
    chunks,
    velocity_b,
    velocity_n,
    velocity_d,
    x_t_b,
    x_t_n,
    x_t_d,
    x_1_b,
    x_1_n,
    x_1_d,
    noise_b,
    noise_n,
    noise_d,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    ACC: tl.constexpr,
    PUBLISHED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    scale = clean_scale(t, sample, ACC, PUBLISHED)
    velocity_errors = tl.zeros((BLOCK,), ACC)
    clean_errors = tl.zeros((BLOCK,), ACC)
    clean_sums = tl.zeros((BLOCK,), ACC)
    data_sums = tl.zeros((BLOCK,), ACC)
    cosines = tl.full((), 0.0, ACC)
    for token in range(first, last):
        clean, data, error = _load(
            velocity + sample * velocity_b,
            x_t + sample * x_t_b,
            x_1 + sample * x_1_b,
            noise + sample * noise_b,
            token,
            cols,
            velocity_n,
            velocity_d,
            x_t_n,
            x_t_d,
            x_1_n,
            x_1_d,
            noise_n,
            noise_d,
            inside,
            scale,
            ACC,
        )
        velocity_errors += error * error
        clean_errors += (clean - data) * (clean - data)
        clean_sums += clean
        data_sums += data
        similarity, _, _, _ = cosine(clean, data)
        cosines += similarity
    program = tl.program_id(0).to(tl.int64)
    tl.store(partial + program * SUMS, tl.sum(velocity_errors, axis=0))
    tl.store(partial + program * SUMS + 1, tl.sum(clean_errors, axis=0))
    tl.store(partial + program * SUMS + 2, cosines)
    tl.store(columns + program * (2 * WIDTH) + cols, clean_sums, mask=inside)
    tl.store(columns + program * (2 * WIDTH) + WIDTH + cols, data_sums, mask=inside)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _gradient_kernel(
    grad,
    velocity,
    x_t,
    x_1,
    noise,
    t,
    image,
    factors,
    out,
    tokens,
    rows,
    chunks,
    velocity_b,
    velocity_n,
    velocity_d,
    x_t_b,
    x_t_n,
    x_t_d,
    x_1_b,
    x_1_n,
    x_1_d,
    noise_b,
    noise_n,
    noise_d,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PUBLISHED: tl.constexpr,
    MASKED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    scale = clean_scale(t, sample, ACC, PUBLISHED)
    active = counts(tl.load(t + sample).to(ACC), MASKED).to(ACC)
    upstream = tl.load(grad).to(ACC)
    of_velocity = 2.0 * upstream * tl.load(factors)
    of_semantic = 2.0 * upstream * active * tl.load(factors + 1)
    of_cosine = upstream * tl.load(factors + 2)
    # The same for every token of the sample.
    shared = upstream * active * tl.load(factors + 3)
    shared = shared * load_vector(image + sample * WIDTH, cols, inside, ACC)
    for token in range(first, last):
        clean, data, error = _load(
            velocity + sample * velocity_b,
            x_t + sample * x_t_b,
            x_1 + sample * x_1_b,
            noise + sample * noise_b,
            token,
            cols,
            velocity_n,
            velocity_d,
            x_t_n,
            x_t_d,
            x_1_n,
            x_1_d,
            noise_n,
            noise_d,
            inside,
            scale,
            ACC,
        )
        similarity, inverse, direction, inverse_data = cosine(clean, data)
        d = inverse * (inverse_data * data - similarity * direction * clean)
        d = of_semantic * (clean - data) + of_cosine * d + shared
        d = of_velocity * error + scale * d
        target = out + (sample * tokens + token) * WIDTH
        tl.store(target + cols, d.to(out.dtype.element_ty), mask=inside)


def forward(
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    weights: list[float],
    published: bool,
    masks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The total, its four terms, and for ``backward`` the image gradients and the factors."""
    samples, tokens, width = velocity.shape
    acc = accumulator(velocity)
    sources = (velocity, x_t, x_1, noise)
    t = unit_stride(t)
    launch = block_launch(width, samples * tokens)
    new = partial(velocity.new_empty, dtype=torch_accumulator(acc))
    image, factors, total, terms = new(samples, width), new(TERMS), new(()), new(TERMS)
    per_sample = new(samples, TERMS)
    options = {"ACC": acc, "enable_fp_fusion": False}
    chunks = cdiv(tokens, launch.rows)
    sums, columns = new(samples, chunks, SUMS), new(samples, chunks, 2, width)
    with on_device(velocity):
        _sums_kernel[(samples * chunks,)](
            *sources,
            t,
            sums,
            columns,
            tokens,
            launch.rows,
            chunks,
            *(stride for x in sources for stride in x.stride()),
            WIDTH=width,
            BLOCK=launch.block,
            SUMS=SUMS,
            PUBLISHED=published,
            num_warps=launch.num_warps,
            **options,
        )
        sample_stage[(samples,)](
            sums,
            columns,
            per_sample,
            image,
            tokens,
            chunks,
            WIDTH=width,
            BLOCK=launch.block,
            SUMS=SUMS,
            num_warps=launch.num_warps,
            **options,
        )
        total_stage[(1,)](
            per_sample,
            t,
            total,
            terms,
            factors,
            samples,
            tokens,
            width,
            W0=weights[0],
            W1=weights[1],
            W2=weights[2],
            W3=weights[3],
            SAMPLES=min(SAMPLES, next_power_of_2(samples)),
            PUBLISHED=published,
            MASKED=masks,
            num_warps=4,
            **options,
        )
    return total, terms, image, factors


def backward(
    grad: Tensor,
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    image: Tensor,
    factors: Tensor,
    published: bool,
    masks: bool,
) -> Tensor:
    """The gradient of the velocity, contiguous; ``grad`` is that of the total, 0-d."""
    samples, tokens, width = velocity.shape
    out = blank(velocity)
    sources = (velocity, x_t, x_1, noise)
    t = unit_stride(t)
    launch = block_launch(width, samples * tokens)
    chunks = cdiv(tokens, launch.rows)
    with on_device(velocity):
        _gradient_kernel[(samples * chunks,)](
            grad,
            *sources,
            t,
            image,
            factors,
            out,
            tokens,
            launch.rows,
            chunks,
            *(stride for x in sources for stride in x.stride()),
            WIDTH=width,
            BLOCK=launch.block,
            ACC=accumulator(velocity),
            PUBLISHED=published,
            MASKED=masks,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return out
