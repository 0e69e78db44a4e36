"""The counts and the arithmetic of ``kernels/static_model.py``, on code whose counts are known."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "kernels"))

import sass
import static_model as model

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R0, RZ ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   FFMA R8, R4, R5, R8 ;
        /*0040*/                   MUFU.RSQ R9, R8 ;
        /*0050*/                   SHFL.BFLY PT, R10, R9, 0x1, 0x1f ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R10 ;
        /*0080*/                   ISETP.LT.AND P0, PT, R0, R1, PT ;
        /*0090*/              @!P0 BRA 0x20 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
        /*00c0*/                   NOP ;
"""


def launch(**changes):
    facts = {
        "programs": 1320,
        "num_warps": 4,
        "registers": 64,
        "shared": 0,
        "rows": 8,
        "trips": 0,
        "row_stored": 4 * 256,
        "traffic": 1320 * 8 * 4 * (512 + 256),
    }
    return model.Launch(**{**facts, **changes})


def test_counts_of_sass():
    """A loop lies between the target of a branch back and the branch; padding is not counted."""
    code = sass.read(SASS)
    (loop,) = code.loops
    assert code.once.instructions == 3 and loop.instructions == 8
    assert (loop.loaded, loop.stored, loop.barriers) == (32 * 16, 32 * 8, 1)
    assert loop.units == {"lsu": 4, "fma": 1, "mufu": 1, "alu": 1, "branch": 1}


def test_a_warp_alone_waits_for_what_it_reads():
    """A trip takes the latency of memory and of each dependent instruction after it."""
    (loop,) = sass.read(SASS).loops
    chain = sass.MEMORY + sum(sass.READY[unit] for unit in ("fma", "mufu", "lsu"))
    assert chain <= loop.alone <= chain + 20


def test_a_second_load_is_of_the_cache():
    """A load after a wait for memory in the same trip is short."""
    lines = SASS.replace("MUFU.RSQ R9, R8", "LDG.E R9, desc[UR4][R8.64]")
    (once,), (twice,) = sass.read(SASS).loops, sass.read(lines).loops
    assert twice.alone - once.alone == sass.CACHED - sass.READY["mufu"]


ASYNC = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   DEPBAR.LE SB0, 0x{pending} ;
        /*0030*/                   LDS.128 R4, [R0] ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   BRA 0x0 ;
"""


def test_copies_are_waited_for_by_batch():
    """A batch that a wait leaves under way has further trips to arrive in."""
    trips = [sass.read(ASYNC.format(pending=n)).loops[0] for n in range(4)]
    assert trips[0].loaded == trips[0].stored == 32 * 16
    assert trips[0].alone >= sass.MEMORY
    for ahead in (1, 2, 3):
        assert trips[ahead].alone == pytest.approx(trips[0].alone / (ahead + 1), rel=0.05)


def test_resident_programs():
    """Registers are given to warps in eights, shared memory with 1 KiB for the system."""
    device = model.DEVICES[90]
    assert model.resident(device, launch(registers=168)) == 3
    assert model.resident(device, launch(registers=161)) == 3
    assert model.resident(device, launch(registers=32)) == 16
    assert model.resident(device, launch(registers=32, num_warps=1)) == 32
    assert model.resident(device, launch(registers=32, shared=100 * 1024)) == 2


def test_limits_of_one_kernel():
    """Each limit binds where its cause is large; the fraction of a copy is never above 1."""
    code, device = sass.read(SASS), model.DEVICES[90]
    free = model.predict(code, launch(), device)
    assert free.fraction < 1 and free.barriers == 8 / 8
    assert free.instructions == pytest.approx(4 * (3 + 8 * 8) / 8)
    assert model.predict(code, launch(registers=255), device).binds.startswith("latency")
    (loop,) = code.loops
    busy = code._replace(loops=(loop._replace(instructions=4000),))
    assert model.predict(busy, launch(), device).binds.startswith("issue")
    slow = code._replace(loops=(loop._replace(units=Counter(mufu=400)),))
    assert model.predict(slow, launch(), device).binds.startswith("mufu")


def test_more_of_one_limit_is_never_faster():
    code, device = sass.read(SASS), model.DEVICES[80]
    times = [model.predict(code, launch(registers=r), device).seconds for r in (32, 64, 128, 255)]
    assert times == sorted(times)


def test_an_op_pays_for_each_launch():
    """Two kernels of half the bytes reach less than one."""
    code, device = sass.read(SASS), model.DEVICES[90]
    whole = model.predict(code, launch(), device)
    nbytes = launch().traffic
    assert model.fraction([whole], nbytes, device) == pytest.approx(whole.fraction)
    two = model.fraction([whole, whole], 2 * nbytes, device)
    assert two == pytest.approx(whole.copy / (whole.seconds + model.LAUNCH / 2))


PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry known(.param .u64 p, .param .u32 n)
{{
  .reg .pred q; .reg .f32 f<4>; .reg .u32 i, n; .reg .u64 a;
  ld.param.u64 a, [p]; ld.param.u32 n, [n_]; mov.u32 i, 0;
loop:
  ld.global.f32 f1, [a];
{body}
  st.global.f32 [a], f1;
  bar.sync 0;
  add.u32 i, i, 1; setp.lt.u32 q, i, n;
  @q bra loop;
  ret;
}}
"""


def test_counts_of_a_kernel_in_ptx(tmp_path):
    """100 dependent fused multiplications, a load, a store and a barrier in each trip."""
    pytest.importorskip("triton")
    from triton import knobs

    body = "  fma.rn.f32 f1, f1, f1, f1;\n" * 100
    text = PTX.format(body=body).replace(".param .u32 n)", ".param .u32 n_)")
    (tmp_path / "known.ptx").write_text(text)
    cubin = tmp_path / "known.cubin"
    ptxas = [knobs.nvidia.ptxas.path, "-arch=sm_90", "-o", cubin, tmp_path / "known.ptx"]
    subprocess.run(ptxas, check=True)
    dump = [knobs.nvidia.cuobjdump.path, "-sass", cubin]
    dumped = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    loop = max(sass.read(dumped).loops, key=lambda s: s.instructions)
    trips = loop.barriers  # ptxas may unroll
    assert trips >= 1
    assert loop.loaded == loop.stored == 128 * trips
    assert 100 * trips <= loop.units["fma"] <= 104 * trips
    assert loop.alone >= trips * (100 * sass.READY["fma"] + sass.READY["lsu"])
