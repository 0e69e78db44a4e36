"""Work that cannot be avoided, counted by hand and by what torch really does.

Base: D = 768, L = 12, H = 12, K = 4, d = 64, I = 2048, E = 4096, C = 1024, N = 256.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_fast import SamplingPlan
from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.network_cases import Network
from blip3o_fast.benchmarking.op_cases import op_work, sizes_of
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.work import Work
from blip3o_fast.ops import OPS, Impl
from blip3o_fast.pretrained import BLIP3oDiT

BASE = Shape("base", 2)
SMALL = Shape("tiny", 2, 16)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        # 2 samples of 256 tokens are 512 rows; 2 bytes an element.
        ("sandwich_norm", 2 * 512 * 768 * 2, 3 * 512 * 768 * 2),
        ("sandwich_join", 3_145_728, 4_718_592),
        ("rope", 2_621_440, 2_621_440),  # 12 + 4 + 4 heads of 64
        ("swiglu", 6_291_456, 10_485_760),
        ("adapter_norm", 7_340_032, 11_010_048),  # 3541 columns, padded to 3584
        ("adapter_mix", 3_145_728, 5_505_024),
        ("solver_update", 512 * 1024 * (4 + 2 + 4 + 4), None),
        ("flow_loss", 512 * 1024 * (2 + 3 * 4), 512 * 1024 * (2 + 3 * 4 + 2)),
    ],
)
def test_bytes_of_row_ops(name, forward, backward):
    assert op_work(OPS[name], BASE, torch.bfloat16) == Work(0.0, forward)
    if backward is not None:
        assert op_work(OPS[name], BASE, torch.bfloat16, backward=True) == Work(0.0, backward)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_bytes_are_those_of_the_tensors(op):
    arguments = op.specimens(sizes_of(SMALL, torch.bfloat16, CPU))[0]
    results = op.function(Impl.REFERENCE)(*arguments)
    tensors = [x for x in (*arguments, *results) if isinstance(x, torch.Tensor)]
    moved = sum(x.nbytes for x in tensors if x.ndim >= 3)
    if op.name == "solver_update":
        moved -= results[0].nbytes  # the memory that the kernels write is an argument already
    assert op_work(op, SMALL, torch.bfloat16).bytes == moved


def test_rotation_and_attention_in_one_cost_what_attention_costs():
    """It reads the same queries, keys and values, and writes the same rows."""
    one = op_work(OPS["rope_attention"], BASE, torch.bfloat16)
    assert one == work.attention(BASE.config, 2, 2)


def test_attention():
    # One product: 2 flops * 2 samples * 12 heads * 256 * 256 * 64.
    product, q, kv = 201_326_592, 2 * 256 * 768 * 2, 2 * 256 * 2 * 256 * 2
    assert work.attention(BASE.config, 2, 2) == Work(2 * product, 2 * q + kv)
    backward = work.attention(BASE.config, 2, 2, backward=True)
    assert backward == Work(4 * product, 4 * q + 2 * kv)


def test_evaluation_of_base():
    weights = 12 * (768 * 20 * 64 + 3 * 768 * 768 + 3 * 768 * 2048) + 2 * 768 * 1024
    assert weights == 91_226_112
    done = work.evaluation(Shape("base").config, 1, 2)
    assert done.flops == 2 * 256 * weights + 24 * 201_326_592 == 51_539_607_552
    kept = 12 * 2 * 4 * 64 + 768  # keys and values of every block, and the aligned tokens
    assert done.bytes == 2 * weights + 256 * (2 * kept + 4 * 1024 + 2 * 1024) == 187_564_032


def test_conditioning_of_base():
    widths = [4096, 3541, 2986, 2432, 1877, 1322, 768]
    assert work.padded_widths(Shape("base").config, 1) == widths
    assert work.padded_widths(Shape("base").config) == [4096, 3584, 3008, 2432, 1920, 1344, 768]
    weights = 40_400_868 + 4096 * 768 + 768 * 768 + 768 * 6144
    done = work.conditioning(Shape("base").config, 1, 2)
    assert done == Work(2 * 256 * weights, 2 * (weights + 256 * (4096 + 6144 + 768)))


def test_block_of_base():
    weights = 768 * 20 * 64 + 3 * 768 * 768 + 3 * 768 * 2048 + 768 * 512
    modulations = 5 * 768 * 1536
    done = work.block(BASE.config, 2, 2)
    assert done.flops == 2 * 512 * weights + 2 * 2 * modulations + 2 * 402_653_184
    assert done.bytes == 2 * (weights + modulations + 5 * 512 * 768)


def test_generation_evaluates_twice_a_heun_step():
    config = SMALL.config
    once, each = work.conditioning(config, 2, 4), work.evaluation(config, 2, 4)
    assert work.generation(SMALL, 3, "heun", 4) == once + 6 * each
    assert work.generation(SMALL, 3, "euler", 4) == once + each * 3


@pytest.mark.parametrize("preset", ["tiny", "small", "base", "large"])
def test_every_weight_is_counted_once(preset):
    config = Shape(preset).config
    with torch.device("meta"):
        model = BLIP3oDiT(config)
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    parts = (work.core_weights, work.conditioning_weights, work.modulation_weights)
    assert sum(part(config) for part in parts) == sum(linear)


def products(counter):
    """Flops of matrix products but those of attention."""
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))


def test_an_evaluation_does_this_many_flops():
    network = Network(SMALL, "fp32", CPU)
    model, x, eva = network.get()
    trajectory = SamplingPlan(model, steps=1).start(eva, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trajectory.slope()
    attention = 2 * SMALL.config.num_hidden_layers * work.attention(SMALL.config, 2, 4).flops
    assert products(counter) == work.evaluation(SMALL.config, 2, 4).flops - attention


def test_a_training_step_does_this_many_flops():
    config = SMALL.config
    model = BLIP3oDiT(config)
    x, eva = torch.randn(2, 16, 1024), torch.randn(2, 16, 4096)
    with FlopCounterMode(display=False) as counter:
        model(x, torch.full((2,), 0.3), eva, return_dict=False).sum().backward()
    attention = 2 * config.num_hidden_layers * work.attention(config, 2, 4).flops
    assert products(counter) == work.training_step(SMALL, 0, 4).flops - 3 * attention


def test_bytes_of_a_training_step():
    # bf16 weights twice, the fp32 gradient written, AdamW's 7 words.
    assert work.training_step(BASE, 1000, 2).bytes == 1000 * (2 + 2 + 4 + 28)


def test_work_adds_and_multiplies():
    assert Work(1.0, 2.0, 3.0) + Work(10.0) == Work(11.0, 2.0, 3.0)
    assert 3 * Work(1.0, 2.0, 3.0) == Work(3.0, 6.0, 9.0)
    assert sum([Work(1.0)] * 2, Work()) == Work(2.0)
    with pytest.raises(TypeError):
        Work() + 1.0


def test_shapes():
    assert Shape("base", 64).name == "base-b64"
    assert Shape("large", 4, 1024).name == "large-b4-n1024"
    assert Shape("base", 4, 1024).config.patches == (1, 32, 32)
    with pytest.raises(ValueError, match="preset: expected one of tiny, small, base, large"):
        Shape("huge")
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        Shape("base", 0)
    with pytest.raises(ValueError, match="tokens: expected a square number, got 257"):
        Shape("base", 1, 257)
