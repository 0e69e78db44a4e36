"""Records that nobody measured, for tests of what is made of records."""

from blip3o_fast.benchmarking.record import Measurement, Record

LIMIT = 1e-3


def measurement(
    contender="plan",
    seconds=2e-3,
    *,
    spread=0.0,
    group="evaluation",
    name="evaluation",
    shape="base-b1",
    dtype="bf16",
    ours=True,
    flops=1e9,
    moved=1e6,
    batch=1,
    **rest,
):
    """One figure; ``spread`` is (high - low) / median."""
    return Measurement(
        group=group,
        name=name,
        shape=shape,
        dtype=dtype,
        contender=contender,
        ours=ours,
        median=seconds,
        low=seconds * (1 - spread / 2),
        high=seconds * (1 + spread / 2),
        samples=5,
        flops=flops,
        bytes=moved,
        transfer=0.0,
        limit=LIMIT,
        bound="compute",
        batch=batch,
        **rest,
    )


def record(*measurements, device="some GPU", kind="cuda", groups=None, **rest):
    """A run with these figures."""
    present = list(dict.fromkeys(m.group for m in measurements))
    fields = {
        "settings": {"quick": True, "groups": present if groups is None else groups},
        "environment": {"device": device, "device_type": kind, "load": [0.5]},
        "bandwidth": 3e12,
        "rates": {"bf16": 800e12},
        "transfer": 50e9,
        "peers": {"liger-kernel": "absent: not installed", "triton": "3.6.0"},
        "left_out": {"training": "not among the groups asked for"},
    }
    return Record(**(fields | rest), measurements=measurements)
