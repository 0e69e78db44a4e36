"""The network, written once.

    h  = norm(x; pre)          y = branch(h)          x' = x + norm(layer_scale * y; post)

``norm`` is a double RMSNorm with AdaLN modulation. A block has three such branches: self-attention,
cross-attention and SwiGLU. One op, ``join``, closes a branch and opens the next one. So a block
hands on the stream and its last branch, which is still open.

The functions here compute with *parts*: projections, layer scales and settings. In training the
parts are the modules of ``DiT``. In sampling they are the packed weights of ``sampling.packed``.
Both run these lines.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.ops import ImplTable, Modulation, Quantised
from blip3o_fast.ops.sandwich_join import ABSENT, SANDWICH_JOIN

Rows = Tensor | Quantised
"""The input of a projection. In FP8 the op before it returns rows in e4m3."""


class Rotary(NamedTuple):
    """``cos`` and ``sin`` ``[N, d]`` of the angles of every token."""

    cos: Tensor
    sin: Tensor


class KeysValues(NamedTuple):
    """Keys and values of cross-attention, ``[B, M, K, d]`` each. Sampling computes them once."""

    keys: Tensor
    values: Tensor


class Branch(NamedTuple):
    """An open branch: its output ``y``, and how the next join will add it to the stream."""

    y: Tensor
    layer_scale: Tensor | None = None
    post: Modulation | None = None


class Sites(NamedTuple):
    """The modulations of a block: of the norms that open and that close its three branches."""

    pre: tuple[Modulation, ...]
    post: tuple[Modulation | None, ...]

    @classmethod
    def of(cls, found: Sequence[Modulation], blocks: int) -> list["Sites"]:
        """Those of each block in turn: the three that open, then the three that close or none."""
        each = len(found) // blocks
        parts = (tuple(found[i : i + each]) for i in range(0, len(found), each))
        return [cls(part[:3], part[3:] or (None, None, None)) for part in parts]


class LinearGuess(NamedTuple):
    """The linear part of the velocity: two weights that broadcast over the state.

    ``gain`` times the state enters the network. ``skip`` times the state is added to its output.
    """

    gain: Tensor
    skip: Tensor


class Joining(NamedTuple):
    """How branches join the stream: epsilon, implementations, and whether ``h`` is e4m3."""

    eps: float
    impls: ImplTable
    quantised: bool = False


class AttentionParts(Protocol):
    """The parts of an attention.

    ``rotates`` says whether queries and keys carry rotary positions. ``packed`` parts own the rows
    that they return, which may then be overwritten.
    """

    heads: int
    kv_heads: int
    rotates: bool
    impls: ImplTable
    packed: bool

    def drop_rate(self) -> float:
        """The probability of dropping an attention weight."""
        ...

    def project(self, h: Any) -> Tensor:
        """Queries, and keys and values in self-attention, ``[B, N, ...]``."""
        ...

    def out(self, attended: Tensor) -> Tensor:
        """``[B, N, H d]`` to ``[B, N, D]``."""
        ...


class SwiGLUParts(Protocol):
    """The parts of the MLP."""

    impls: ImplTable
    quantised: bool

    def gate_up(self, h: Any) -> Tensor:
        """``[B, N, D]`` to ``[B, N, 2I]``, the gate first."""
        ...

    def activated(self, h: Any) -> Tensor:
        """``silu(gate(h)) * up(h)`` ``[B, N, I]``."""
        ...

    def down(self, activated: Any) -> Tensor:
        """``[B, N, I]`` to ``[B, N, D]``."""
        ...


class BlockParts(Protocol):
    """The parts of a block: three branches, and the scale of each."""

    joining: Joining

    @property
    def layer_scales(self) -> tuple[Tensor | None, ...]:
        """``[D]`` each, or None."""
        ...

    @property
    def self_attn(self) -> Callable[[Any, Rotary], Tensor]:
        """``(h, rotary) -> y``."""
        ...

    @property
    def cross_attn(self) -> Callable[[Any, Rotary, Any], Tensor]:
        """``(h, rotary, condition) -> y``."""
        ...

    @property
    def mlp(self) -> Callable[[Any], Tensor]:
        """``h -> y``."""
        ...


class EndParts(Protocol):
    """The projections before the first block and after the last."""

    joining: Joining

    @property
    def input_proj(self) -> Callable[[Tensor], Tensor]:
        """``[B, N, C]`` to ``[B, N, D]``."""
        ...

    @property
    def output_proj(self) -> Callable[[Tensor], Tensor]:
        """``[B', N, D]`` to ``[B', N, C]``."""
        ...


BlockCall = Callable[[Tensor, Branch | None], tuple[Tensor, Branch]]


def join(how: Joining, x: Tensor, branch: Branch | None, pre: Modulation) -> tuple[Tensor, Rows]:
    """Close ``branch`` and open the next one: the new stream and ``h``, ``[B, N, D]`` each."""
    eps, impls = how.eps, how.impls
    if branch is None:
        norm = ops.sandwich_norm_quantised if how.quantised else ops.sandwich_norm
        return x, norm(x, *pre, eps=eps, impl=impls.sandwich_norm)
    y, scale, post = branch
    if how.quantised:
        return ops.sandwich_join_quantised(
            x, y, scale, post, pre, eps=eps, impl=impls.sandwich_join
        )
    return SANDWICH_JOIN(x, y, scale, *(post or ABSENT), *pre, eps, impl=impls.sandwich_join)


def attend(p: AttentionParts, h: Rows, rotary: Rotary, kept: KeysValues | None = None) -> Tensor:
    """Attention of rows ``[B, N, D]`` to themselves, or to ``kept``, the condition's."""
    q, dropout = p.project(h), p.drop_rate()
    if not p.rotates:
        assert kept is not None
        heads = q.unflatten(-1, (p.heads, -1))
        return p.out(ops.attention(heads, *kept, dropout=dropout).flatten(2))
    attended = ops.rope_attention(
        q,
        *rotary,
        num_heads=p.heads,
        num_kv_heads=p.kv_heads if kept is None else 0,
        kept=kept,
        dropout=dropout,
        impl=p.impls.rope_attention if p.packed else None,
        rope_impl=p.impls.rope,
        inplace=p.packed,
    )
    return p.out(attended)


def swiglu(p: SwiGLUParts, h: Rows) -> Tensor:
    """``down(silu(gate(h)) * up(h))`` (arXiv:2002.05202)."""
    if p.quantised:
        return p.down(ops.swiglu_quantised(p.gate_up(h), impl=p.impls.swiglu))
    return p.down(p.activated(h))


def block(
    p: BlockParts,
    x: Tensor,
    branch: Branch | None,
    condition: Tensor | KeysValues,
    rotary: Rotary,
    sites: Sites,
) -> tuple[Tensor, Branch]:
    """Self-attention, cross-attention and MLP. Each join closes the branch before it.

    ``condition`` is the condition as ``p.cross_attn`` takes it: adapted EVA tokens ``[B, M, D]``,
    or their keys and values.
    """
    pre, post, scales = sites.pre, sites.post, p.layer_scales
    x, h = join(p.joining, x, branch, pre[0])
    branch = Branch(p.self_attn(h, rotary), scales[0], post[0])
    x, h = join(p.joining, x, branch, pre[1])
    branch = Branch(p.cross_attn(h, rotary, condition), scales[1], post[1])
    x, h = join(p.joining, x, branch, pre[2])
    return x, Branch(p.mlp(h), scales[2], post[2])


def network(
    p: EndParts,
    state: Tensor,
    dtype: torch.dtype,
    stream: Tensor | None,
    guess: LinearGuess | None,
    blocks: Iterable[BlockCall],
    output: Modulation,
    *,
    halves: int = 1,
) -> tuple[Tensor, Tensor]:
    """The velocity ``[B', N, C]`` at a state, and the rows ``[B', N, D]`` before ``output_proj``.

    Args:
        p: input and output projection.
        state: ``[B, N, C]``, any floating dtype.
        dtype: of the activations.
        stream: ``[B', N, D]``, added to the projected state at the start, or None.
        guess: None if the network takes the state as it is and returns the velocity.
        blocks: in order.
        output: modulation before the output projection.
        halves: B' / B. With 2, both halves of guidance are evaluated at the same state.
    """
    x = p.input_proj(state.to(dtype) if guess is None else _scaled(state, guess.gain, dtype))
    if halves > 1:
        x = torch.cat([x] * halves)
    branch = None
    if stream is not None:
        x, branch = stream, Branch(x)
    for call in blocks:
        x, branch = call(x, branch)
    _, h = join(p.joining._replace(quantised=False), x, branch, output)
    assert isinstance(h, Tensor)
    velocity = p.output_proj(h)
    if guess is not None:
        both = velocity.unflatten(0, (halves, -1))
        velocity = torch.addcmul(both, state, guess.skip).flatten(0, 1)
    return velocity, h


def _scaled(state: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """``gain * state`` in ``dtype``, in one pass over memory if no gradient is recorded."""
    if torch.is_grad_enabled() or state.dtype == dtype:
        return (gain * state).to(dtype)
    return torch.mul(state, gain, out=torch.empty_like(state, dtype=dtype))
