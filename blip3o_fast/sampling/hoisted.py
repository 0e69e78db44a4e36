"""Everything that does not depend on the state, computed before the first evaluation.

*The condition.* The adapter runs once a sample. Then one GEMM gives the cross-attention keys and
values of all layers. Where cross-attention has positions, one rotary call turns all keys. The
adapted tokens are kept if the model adds them to its stream. Guidance has one empty condition for
all samples, so it is computed once, as one more sample. Memory: 2 L M K d numbers a sample, 3.1 MB
in bf16 for base, and N D more for the stream, 0.4 MB.

*The times.* A norm site computes ``rms(rms(x; w1); w2) * (1 + scale) + shift``, where shift and
scale depend only on the time. One GEMM gives them for all distinct times and all sites (73 in
base). ``w2 * (1 + scale)`` is folded into one weight. Heun's second evaluation and the next step's
first have the same time, so they share a row of the table. Memory: T * sites * 2 * D fp32, 449 KB a
time for base (22.9 MB for the 51 times of 50 Heun steps). While it is built there is also a stacked
copy of the AdaLN projections, 86 million parameters for base.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.flow import Row, Solver, SolverTable, TimeGrid, solver_table
from blip3o_fast.model import DiT
from blip3o_fast.model.layers import sinusoids
from blip3o_fast.model.network import KeysValues, LinearGuess, Sites, block
from blip3o_fast.ops import Modulation
from blip3o_fast.sampling.packed import PackedNetwork, whole


class Context(NamedTuple):
    """The condition as evaluations read it.

    ``keys_values`` is ``[B', L, 2, M, K, d]``, so that a sample is one stretch of memory.
    ``stream`` ``[B', N, D]`` is added to the projected state at the start, or None. B' is 2B with
    guidance: the real conditions, then the empty ones.
    """

    keys_values: Tensor
    stream: Tensor | None

    def blank(self, batch: int) -> "Context":
        """A context of zeros for B' = ``batch``."""
        stream = self.stream
        return Context(
            self.keys_values.new_zeros(batch, *self.keys_values.shape[1:]),
            None if stream is None else stream.new_zeros(batch, *stream.shape[1:]),
        )


def condition(p: PackedNetwork, eva: Tensor, *, guided: bool) -> Context:
    """The context of EVA tokens ``[B, M, E]``."""
    config = p.config
    L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    B, M, E = eva.shape
    tokens = eva.to(p.dtype)
    if guided:
        tokens = torch.cat((tokens, tokens.new_zeros(1, M, E)))
    adapted = p.adapter(tokens)
    packed = F.linear(adapted, p.keys_values)
    if config.rules.cross_positions:
        packed = ops.rope(packed, *p.rotary, num_heads=0, num_kv_heads=L * K, impl=p.impls.rope)
    by_layer = packed.view(-1, M, 2, L, K, d).permute(0, 3, 2, 1, 4, 5)
    stream = p.positions
    if config.rules.aligned_stream:
        stream = adapted if stream is None else adapted + stream
    elif stream is not None:
        stream = stream.expand(len(tokens), -1, -1)

    def both(x: Tensor) -> Tensor:
        return torch.cat((x[:B], x[B:].expand(B, *x.shape[1:]))) if guided else x

    return Context(
        both(by_layer).contiguous(), None if stream is None else both(stream).contiguous()
    )


class TimeTable(NamedTuple):
    """All steps of a solver as evaluations read them, on the device.

    ``modulations`` is ``[T, sites, 2, D]``. ``solver`` has columns for the velocity: the row of
    ``modulations``, and the numbers of ``LinearGuess`` if the model has one. ``ends_step`` says of
    each evaluation whether a step ends with it.
    """

    solver: SolverTable
    modulations: Tensor
    ends_step: tuple[bool, ...]


def time_table(
    model: DiT, p: PackedNetwork, grid: TimeGrid, solver: Solver, dtype: torch.dtype
) -> TimeTable:
    """The table of a solver on a grid; ``dtype`` is that of the state."""
    evaluations = solver.evaluations(grid)
    order: dict[float, int] = {}
    rows = [[order.setdefault(e.label, len(order))] for e in evaluations]
    device = p.keys_values.device
    wide = torch.promote_types(p.dtype, torch.float32)
    t = torch.tensor([e.label for e in evaluations], device=device, dtype=wide)
    guess = model.linear_guess(t, t.dtype)
    numbers = t.new_empty(len(t), 0) if guess is None else torch.cat(guess, dim=-1).flatten(1)
    table = solver_table(
        evaluations,
        grid,
        device=device,
        dtype=dtype,
        numbers=numbers,
        places=torch.tensor(rows, device=device),
    )
    modulations = modulation_table(model, list(order), t.dtype)
    return TimeTable(table, modulations, tuple(e.ends_step for e in evaluations))


def modulation_table(model: DiT, times: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``w2 * (1 + scale)`` and ``shift`` of every site, ``[T, sites, 2, D]``, all in ``dtype``."""
    sites = model.norm_sites()

    def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
        weights = torch.cat([whole(layer.weight).to(dtype) for layer in layers])
        return F.linear(x, weights, torch.cat([whole(layer.bias).to(dtype) for layer in layers]))

    embedder = model.timestep_embedder
    inner, outer = cast("tuple[nn.Linear, nn.Linear]", (embedder.mlp[0], embedder.mlp[2]))
    t = torch.tensor(times, dtype=dtype, device=model.device)
    embedded = linear(F.silu(linear(sinusoids(t, embedder.scale), inner)), outer)
    projections = [cast(nn.Linear, ada_ln.adaLN_modulation[1]) for _, ada_ln in sites]
    stacked = linear(F.silu(embedded), *projections)
    shift, scale = stacked.view(len(times), len(sites), 2, -1).unbind(2)
    own = torch.stack([whole(ada_ln.norm.weight) for _, ada_ln in sites]).to(dtype)
    return torch.stack((own * (1 + scale), shift), dim=2)


def read_modulations(
    norms: Sequence[Tensor], row: Tensor, blocks: int, batch: int
) -> tuple[list[Sites], Modulation]:
    """The modulations of every block, and of the output: views of a table's row ``[sites, 2, D]``.

    The scale is already folded into w2, so the ops get a scale of zero.
    """
    zero = row.new_zeros(1, row.shape[-1]).expand(batch, -1)
    *sites, output = (
        Modulation(w1, folded, shift.expand(batch, -1), zero)
        for w1, (folded, shift) in zip(norms, row, strict=True)
    )
    return Sites.of(sites, blocks), output


class HoistedVelocity:
    """The packed network as the velocity field of one batch.

    Args:
        run: ``model.network.network``, perhaps compiled.
        p: the packed network.
        modulations: of the time table.
        context: of the batch.
    """

    def __init__(
        self,
        run: Callable[..., tuple[Tensor, Tensor]],
        p: PackedNetwork,
        modulations: Tensor,
        context: Context,
    ) -> None:
        self.run, self.p, self.modulations, self.context = run, p, modulations, context
        self._row = modulations.new_empty(1, *modulations.shape[1:])
        batch = context.keys_values.shape[0]
        sites, self.output = read_modulations(p.norms, self._row[0], len(p.blocks), batch)
        kept = [KeysValues(*both.unbind(1)) for both in context.keys_values.unbind(1)]
        self.blocks = [
            partial(block, part, condition=condition, rotary=p.rotary, sites=site)
            for part, condition, site in zip(p.blocks, kept, sites, strict=True)
        ]

    def __call__(self, x: Tensor, row: Row) -> Tensor:
        """The velocity ``[B', N, C]`` at ``x`` ``[B, N, C]``, B' = 2B with guidance.

        It has the dtype of the activations, or that of the state if there is a linear guess.
        """
        torch.index_select(self.modulations, 0, row.places, out=self._row)
        guess = LinearGuess(*row.numbers) if len(row.numbers) else None
        halves = self.context.keys_values.shape[0] // x.shape[0]
        velocity, _ = self.run(
            *(self.p, x, self.p.dtype, self.context.stream, guess, self.blocks, self.output),
            halves=halves,
        )
        return velocity
