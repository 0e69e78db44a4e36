"""The later stages of the flow loss, and the arithmetic that its kernels share.

See ``blip3o_kernels.flow_loss`` for the formulas and the order of the stages.
"""

import triton.language as tl

from blip3o_kernels.reduction import sum2
from blip3o_kernels.tiles import load_vector
from blip3o_kernels.typed import jit

SUMS = 3
"""Scalars that a program of the first stage writes: two sums of squares and one of cosines."""

EPS = tl.constexpr(1e-8)
EARLIEST = tl.constexpr(1e-3)
"""The published loss keeps its times this far from both ends."""


@jit
def _time(t, PUBLISHED: tl.constexpr):
    if PUBLISHED:
        t = tl.minimum(tl.maximum(t, EARLIEST), 1.0 - EARLIEST)
    return t


@jit
def clean_scale(t, sample, ACC: tl.constexpr, PUBLISHED: tl.constexpr):
    """d clean / d velocity of one sample: ``s (1 - t)``."""
    rest = 1.0 - _time(tl.load(t + sample).to(ACC), PUBLISHED)
    return -rest if PUBLISHED else rest


@jit
def counts(t, MASKED: tl.constexpr):
    """Whether a sample counts in the semantic and the consistency term."""
    return (t > 0.5) if MASKED else (t == t) | (t != t)


@jit
def cosine(a, b):
    """``cos(a, b)``, ``1 / |a|`` and ``1 / |b|`` bounded below as torch bounds the norms, and the
    ``1 / |a|`` of the direction in which ``|a|`` grows, 0 for a row of zeros.
    """
    product, squares = sum2(a * b, a * a)
    length = tl.sqrt(squares)
    inverse = 1.0 / tl.maximum(length, EPS)
    inverse_b = 1.0 / tl.maximum(tl.sqrt(tl.sum(b * b, axis=0)), EPS)
    direction = tl.where(length > 0.0, 1.0 / tl.maximum(length, 1e-37), 0.0)
    return product * inverse * inverse_b, inverse, direction, inverse_b


@jit(do_not_specialize=["tokens", "chunks"])
def sample_stage(
    partial,
    columns,
    per_sample,
    image,
    tokens,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Second stage: the four sums of a sample, and the gradient of its image cosine in c."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    velocity = tl.full((), 0.0, ACC)
    semantic = tl.full((), 0.0, ACC)
    cosines = tl.full((), 0.0, ACC)
    clean = tl.zeros((BLOCK,), ACC)
    data = tl.zeros((BLOCK,), ACC)
    for chunk in range(0, chunks):
        program = sample * chunks + chunk
        velocity += tl.load(partial + program * SUMS)
        semantic += tl.load(partial + program * SUMS + 1)
        cosines += tl.load(partial + program * SUMS + 2)
        clean += load_vector(columns + program * (2 * WIDTH), cols, inside, ACC)
        data += load_vector(columns + program * (2 * WIDTH) + WIDTH, cols, inside, ACC)
    count = tl.cast(tokens, ACC)
    clean, data = clean / count, data / count
    similarity, inverse, direction, inverse_data = cosine(clean, data)
    gradient = inverse * (inverse_data * data - similarity * direction * clean) / count
    tl.store(image + sample * WIDTH + cols, gradient, mask=inside)
    tl.store(per_sample + sample * 4, velocity)
    tl.store(per_sample + sample * 4 + 1, semantic)
    tl.store(per_sample + sample * 4 + 2, cosines)
    tl.store(per_sample + sample * 4 + 3, 1.0 - similarity)


@jit
def _capped(term, most, PUBLISHED: tl.constexpr):
    """A term under the published cap, and d capped / d term: 0.5 at the cap, as torch's minimum."""
    slope = tl.full((), 1.0, term.dtype)
    if PUBLISHED:
        slope = tl.where(term > most, 0.0, tl.where(term == most, 0.5, 1.0))
        slope = tl.where(term < 0.0, 0.0, slope)
        term = tl.where(term > most, most, tl.where(term < 0.0, 0.0, term))
    return term, slope


@jit(do_not_specialize=["samples", "tokens"])
def total_stage(
    per_sample,
    t,
    total,
    terms,
    factors,
    samples,
    tokens,
    width,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    PUBLISHED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Third stage, one program: terms, total, and d total / d (each sum over samples)."""
    velocity = tl.zeros((SAMPLES,), ACC)
    semantic = tl.zeros((SAMPLES,), ACC)
    cosines = tl.zeros((SAMPLES,), ACC)
    consistency = tl.zeros((SAMPLES,), ACC)
    active = tl.zeros((SAMPLES,), ACC)
    for first in range(0, samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        present = sample < samples
        time = _time(tl.load(t + sample, mask=present, other=0.0).to(ACC), PUBLISHED)
        counted = present & counts(time, MASKED)
        row = per_sample + sample.to(tl.int64) * 4
        velocity += tl.load(row, mask=present, other=0.0)
        semantic += tl.load(row + 1, mask=counted, other=0.0)
        cosines += tl.load(row + 2, mask=present, other=0.0)
        consistency += tl.load(row + 3, mask=counted, other=0.0)
        active += counted.to(ACC)
    rows = tl.cast(samples, ACC) * tl.cast(tokens, ACC)
    elements = rows * tl.cast(width, ACC)
    active_samples = tl.maximum(tl.sum(active, axis=0), 1.0)
    active_elements = active_samples * tl.cast(tokens, ACC) * tl.cast(width, ACC)
    term0, slope0 = _capped(tl.sum(velocity, axis=0) / elements, 100.0, PUBLISHED)
    term1, slope1 = _capped(tl.sum(semantic, axis=0) / active_elements, 100.0, PUBLISHED)
    term2, slope2 = _capped(1.0 - tl.sum(cosines, axis=0) / rows, 2.0, PUBLISHED)
    term3, slope3 = _capped(tl.sum(consistency, axis=0) / active_samples, 2.0, PUBLISHED)
    result = term0 * W0 + term1 * W1 + term2 * W2 + term3 * W3
    slope = tl.full((), 1.0, ACC)
    if PUBLISHED:
        slope = tl.where(result > 100.0, 0.0, slope)
        result = tl.where(result > 100.0, 100.0, result)
    tl.store(total, result)
    tl.store(terms, term0)
    tl.store(terms + 1, term1)
    tl.store(terms + 2, term2)
    tl.store(terms + 3, term3)
    tl.store(factors, W0 * slope * slope0 / elements)
    tl.store(factors + 1, W1 * slope * slope1 / active_elements)
    tl.store(factors + 2, -(W2 * slope * slope2) / rows)
    tl.store(factors + 3, -(W3 * slope * slope3) / active_samples)
