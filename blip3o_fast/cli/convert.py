"""``blip3o-fast convert``: published pickles and other formats to shards, once and for all.

Pickles go through a restricted parser; no code in them runs. An interrupted conversion continues
when the same command is given again. At the end every shard's checksum is verified, and some rows
are compared bit by bit with the source.
"""

import argparse
from collections.abc import Sequence

from blip3o_fast.data.conversion import (
    Outcome,
    fp16_is_exact,
    verify_conversion,
    write_planned,
)
from blip3o_fast.data.conversion_plan import ConversionPlan, Wishes, open_sources, plan_conversion
from blip3o_fast.flags import given
from blip3o_fast.options.convert import ConvertOptions
from blip3o_fast.progress import Progress
from blip3o_fast.quantities import count, size
from blip3o_fast.untrusted import one_line

_REMARKS_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Convert and verify; 0 when every checksum and sampled row agrees.

    Raises:
        OptionError: for a number out of range.
        FileNotFoundError: if the source is missing or holds nothing to convert.
        ValueError: naming the file, the row or the shard at fault.
    """
    options = ConvertOptions(**given(ConvertOptions, args))
    sources = open_sources(options.source, options.training_mode, options.max_shards)
    wishes = Wishes(
        dtype=options.dtype,
        tokens=options.tokens,
        grid=options.grid,
        heldout_fraction=options.heldout_fraction,
        eva_encoder=options.eva_encoder,
        clip_encoder=options.clip_encoder,
    )
    plan = plan_conversion(sources, wishes)
    _describe(plan, options.samples_per_shard)
    if options.dry_run:
        print("dry run: nothing was written")
        return 0
    with Progress("convert", plan.count, "sample") as bar:
        outcome = write_planned(
            plan,
            options.dest,
            samples_per_shard=options.samples_per_shard,
            skip_bad_rows=options.skip_bad_rows,
            progress=bar.update,
        )
    identical = verify_conversion(plan, options.dest, options.verify_rows)
    _conclude(options, outcome, identical)
    return 0


def _describe(plan: ConversionPlan, samples_per_shard: int) -> None:
    facts = plan.facts
    print(
        f"{count(len(plan.sources), 'file')}, {count(plan.count, 'sample')} of "
        f"{count(facts.tokens, 'token')} "
        f"({'with' if facts.has_cls else 'without'} CLS, grid {facts.grid}), widths "
        f"{facts.eva_width} (eva) and {facts.clip_width} (clip)"
    )
    shards = -(-plan.count // samples_per_shard)
    print(
        f"{facts.dtype}: {size(plan.count * facts.sample_bytes)} in {count(shards, 'shard')} of "
        f"{samples_per_shard}"
    )
    if facts.dtype == "fp32" and fp16_is_exact(plan):
        print("the rows looked at are fp16 values: --dtype fp16 would halve this and lose nothing")
    _list("remark", plan.remarks)


def _conclude(options: ConvertOptions, outcome: Outcome, identical: list[str]) -> None:
    _list("left out", outcome.skipped)
    _list("remark", identical)
    done = f" ({outcome.done} were done before)" if outcome.done else ""
    print(
        f"{outcome.written} samples written{done}, {len(outcome.skipped)} left out; checksums and "
        f"up to {options.verify_rows} rows verified: {options.dest}"
    )


def _list(title: str, lines: Sequence[str]) -> None:
    for line in lines[:_REMARKS_SHOWN]:
        print(one_line(f"{title}: {line}"))
    if len(lines) > _REMARKS_SHOWN:
        print(f"{title}: {len(lines) - _REMARKS_SHOWN} more; the manifest's notes have them all")
