"""How a fused op is judged: against the reference in fp64, beside the reference in its own dtype.

The rule: our error is at most twice the error of the same-precision PyTorch path, plus a floor for
the roundings that this path was lucky with, in the maximum and in the root mean square. A 16-bit
result is rounded once, from fp32. In fp32 and fp64 every step rounds, and the floor follows from
their number.
"""

from collections.abc import Callable, Sequence

import torch
from rounding import rounding_bound
from torch import Tensor

Op = Callable[..., Tensor | tuple[Tensor | None, ...]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    offset: float = 0.0,
) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values * scale + offset).to(dtype=dtype, device=device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout.

    ``contiguous``; ``sliced``: rows inside wider rows, at an odd offset; ``spread``: every second
    column; ``transposed``: the first two axes swapped in memory; ``expanded``: row 0 repeated, a
    stride of 0; ``halves``: the last half of a row of twice the width, as ``chunk`` gives.
    """
    if layout == "contiguous":
        return x.contiguous()
    *lead, width = x.shape
    if layout == "sliced":
        wide = x.new_full((*lead, width + 3), torch.nan)
        wide[..., 1 : width + 1] = x
        return wide[..., 1 : width + 1]
    if layout == "spread":
        wide = x.new_full((*lead, 2 * width), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "halves":
        return torch.cat((torch.full_like(x, torch.nan), x), dim=-1).chunk(2, dim=-1)[1]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(layout)


def repeats(device: torch.device) -> int:
    """How often a test of repeatability calls: on a GPU the order of programs changes."""
    return 20 if device.type == "cuda" else 3


STEPS = 30
"""Operations on the longest path of a fused op and its gradient, sums left out."""


def floor(dtype: torch.dtype, terms: int) -> float:
    """What roundings alone may do to a well-conditioned result that is a sum of ``terms``."""
    once = dtype in (torch.float16, torch.bfloat16)
    return torch.finfo(dtype).eps if once else rounding_bound(dtype, STEPS + terms)


def judge(
    name: str,
    ours: Tensor,
    same: Tensor,
    truth: Tensor,
    terms: int = 1,
    conditioning: float = 1.0,
) -> None:
    """Fail unless ``ours`` keeps the rule of this module.

    Its numbers are sums of ``terms``; ``conditioning`` is what the op, by cancellation, makes of a
    relative error of one.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    assert ours.dtype == same.dtype, f"{name}: {ours.dtype}, not {same.dtype}"
    assert ours.isfinite().all(), f"{name}: not finite"
    if not truth.numel():
        return
    wide = truth.double()
    error, allowed = (x.double() - wide for x in (ours, same))
    unit = conditioning * floor(ours.dtype, terms)
    for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt()):
        limit = 2 * measure(allowed) + unit * measure(wide)
        assert measure(error) <= limit, f"{name}: error {measure(error):.3e}, allowed {limit:.3e}"


def check(
    ours: Op,
    reference: Op,
    inputs: Sequence[Tensor | None],
    *,
    cotangent: str = "contiguous",
    differentiable: Sequence[int] | None = None,
    conditioning: float = 1.0,
) -> None:
    """Judge every output and every gradient of ``ours``.

    ``cotangent`` is the layout of the incoming gradients; ``differentiable`` limits the inputs
    whose gradients are compared; ``conditioning`` is that of ``judge``.
    """
    chosen = range(len(inputs)) if differentiable is None else differentiable
    wide = [None if x is None else x.detach().double() for x in inputs]
    truth, true_grads = _run(reference, wide, chosen, cotangent)
    same, same_grads = _run(reference, inputs, chosen, cotangent)
    got, grads = _run(ours, inputs, chosen, cotangent)
    assert len(got) == len(truth)
    longest = max(size for x in (*wide, *truth) if x is not None for size in x.shape)
    for i, values in enumerate(zip(got, same, truth, strict=True)):
        judge(f"output {i}", *values, longest, conditioning)
    for i, values in enumerate(zip(grads, same_grads, true_grads, strict=True)):
        shared = max(x.numel() for x in truth) // max(1, values[0].numel())
        judge(f"gradient {i}", *values, longest + shared, conditioning)


def _run(
    op: Op, inputs: Sequence[Tensor | None], chosen: Sequence[int], cotangent: str
) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [None if x is None else x.detach() for x in inputs]
    wanted = [leaf for i in chosen if (leaf := leaves[i]) is not None]
    for leaf in wanted:
        leaf.requires_grad_()
    result = op(*leaves)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if x is not None]
    upstream = {
        x: laid_out(randn(*x.shape, dtype=torch.bfloat16, seed=i).to(x), cotangent)
        for i, x in enumerate(outputs)
        if x.requires_grad
    }
    grads = torch.autograd.grad(list(upstream), wanted, list(upstream.values())) if wanted else ()
    return [x.detach() for x in outputs], list(grads)
