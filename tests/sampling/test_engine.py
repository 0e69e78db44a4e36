"""What sampling keeps from call to call: how much, for how long, and from several threads."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import DiTConfig, SamplingPlan
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl, ImplTable
from blip3o_fast.sampling import cache, forget
from blip3o_fast.sampling.batches import context_bytes
from blip3o_fast.sampling.hoisted import condition, modulation_table
from blip3o_fast.sampling.packed import pack


def attention_flags():
    """Which kernels torch may use for attention, in the whole process."""
    names = ("flash", "mem_efficient", "math", "cudnn")
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]


def engines(model):
    return cache._ENGINES[model].engines.values


def test_at_most_two_dtypes_are_kept(model, draw):
    eva, noise = draw(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
        SamplingPlan(model, steps=1, dtype=dtype)(eva, noise)
    assert [key.dtype for key in engines(model)] == [torch.float16, torch.bfloat16]


def test_at_most_four_grids_are_kept(model, draw):
    eva, noise = draw(model)
    for steps in range(1, 8):
        SamplingPlan(model, steps=steps)(eva, noise)
    (own,) = engines(model).values()
    assert [len(grid) for grid, _, _ in own.tables.values] == [4, 5, 6, 7]


def test_recent_forgets_the_least_recently_used():
    kept = cache.Recent(2)
    made = []
    for key in "abacab":
        kept.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]


def test_the_model_does_not_carry_its_engines(model, draw):
    eva, noise = draw(model)
    names = set(model.state_dict())
    plan = SamplingPlan(model, steps=1)
    plan(eva, noise)
    assert set(model.state_dict()) == names
    assert pickle.loads(pickle.dumps(model)) not in cache._ENGINES
    assert copy.deepcopy(model) not in cache._ENGINES


def test_engines_die_with_their_model(make_model, draw):
    model = make_model()
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=1)
    plan(eva, noise)
    (own,) = engines(model).values()
    gone = weakref.ref(own)
    del own, plan, model
    gc.collect()
    assert gone() is None


def test_forget(model, draw):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=1)
    expected = plan(eva, noise)
    forget(model)
    assert model not in cache._ENGINES
    forget(model)
    assert torch.equal(plan(eva, noise), expected)


def test_implementations_are_kept_apart(model, draw):
    eva, noise = draw(model)
    SamplingPlan(model, steps=1)(eva, noise)
    model.set_impl(Impl.REFERENCE)
    SamplingPlan(model, steps=1)(eva, noise)
    assert len(engines(model)) == 2


def test_stated_sizes_of_base():
    """The figures in the docstrings of weights, conditioning and modulation."""
    mebibyte = 1 << 20
    with FakeTensorMode(), torch.no_grad():
        model = DiT(DiTConfig.preset("base"))
        for dtype, mebibytes in ((torch.float32, 366), (torch.bfloat16, 183)):
            packed = pack(model, dtype, ImplTable())
            assert round(packed.nbytes() / mebibyte) == mebibytes
        layers = (*packed.adapter.layers, packed.adapter.gate, packed.adapter.residual)
        adapter = sum(x.nbytes for layer in layers for x in layer if isinstance(x, torch.Tensor))
        assert round(adapter / mebibyte) == 84
        config = model.config
        eva = torch.empty(3, 256, 4096)
        context = condition(packed, eva, guided=False)
        keys_values, stream = (x.nbytes for x in context)
        assert keys_values + stream == 3 * context_bytes(config, torch.bfloat16)
        assert round(keys_values / 3e6, 1) == 3.1 and round(stream / 3e6, 1) == 0.4
        assert len(model.norm_sites()) == 73
        table = modulation_table(model, [i / 50 for i in range(51)], torch.float32)
        assert round(table.nbytes / 51e3) == 449 and round(table.nbytes / 1e6, 1) == 22.9


@pytest.mark.parametrize("same_model", [True, False])
def test_distinct_plans_in_distinct_threads(make_model, draw, same_model):
    models = [make_model() for _ in range(1 if same_model else 4)] * (4 if same_model else 1)
    eva, noise = draw(models[0], 3)
    flags = attention_flags()
    choices = [
        {"steps": 2, "solver": "heun"},
        {"steps": 3, "solver": "euler", "guidance_scale": 2.0},
        {"steps": 3, "solver": "adams_bashforth2"},
        {"steps": 2, "dtype": torch.bfloat16},
    ]
    plans = [SamplingPlan(m, **c) for m, c in zip(models, choices, strict=True)]
    expected = [plan(eva, noise) for plan in plans]
    for model in models:
        forget(model)
    results = [[] for _ in plans]
    barrier = threading.Barrier(len(plans))

    def work(plan, into):
        barrier.wait()
        for _ in range(5):
            into.append(plan(eva, noise))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(plans, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, want in zip(results, expected, strict=True):
        assert len(outputs) == 5
        assert all(torch.equal(out, want) for out in outputs)
    assert attention_flags() == flags
