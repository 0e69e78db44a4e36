"""Rotary tables: the rotation, and the published shear."""

import math

import pytest
import torch

from blip3o_fast import DiTConfig, ops
from blip3o_fast.model.positions import RotaryTables, rotary_tables

D = 32


def config(conventions="consistent", grid=(1, 4, 5), cls=False, **fields):
    tokens = math.prod(grid) + cls
    return DiTConfig(
        hidden_size=D,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_tokens=tokens,
        max_position_embeddings=tokens,
        training_mode="cls_patch" if cls else "patch_only",
        grid=grid,
        conventions=conventions,
        rope_theta=100.0,
        **fields,
    )


def rotate(x, settings):
    """x [N, d], one head per row."""
    cos, sin = (table.double() for table in rotary_tables(settings))
    return ops.rope(x[None], cos, sin, num_heads=1, num_kv_heads=0)[0]


def logits_by_offset(settings):
    """Logits of one query and one key placed at every pair of cells, grouped by their offset."""
    torch.manual_seed(0)
    q, k = torch.randn(2, D, dtype=torch.float64)
    N = settings.num_tokens
    logits = rotate(q.expand(N, D), settings) @ rotate(k.expand(N, D), settings).T
    cells = torch.cartesian_prod(*(torch.arange(n) for n in settings.patches)).tolist()
    groups = {}
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            offset = tuple(x - y for x, y in zip(a, b, strict=True))
            groups.setdefault(offset, []).append(logits[i, j].item())
    return groups


@pytest.mark.parametrize("grid", [(1, 4, 5), (3, 2, 4), (1, 1, 7)])
def test_consistent_preserves_norms(grid):
    settings = config(grid=grid)
    x = torch.randn(settings.num_tokens, D, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, settings).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [(1, 4, 5), (3, 2, 4)])
def test_consistent_logits_depend_on_the_offset_alone(grid):
    for offset, logits in logits_by_offset(config(grid=grid)).items():
        assert max(logits) - min(logits) < 1e-5, offset


def test_consistent_tells_offsets_apart():
    means = [group[0] for group in logits_by_offset(config(grid=(3, 2, 4))).values()]
    gaps = torch.tensor(sorted(means)).diff()
    assert gaps.min() > 1e-6


def test_published_is_a_shear():
    settings = config("published")
    x = torch.randn(settings.num_tokens, D, dtype=torch.float64)
    ratios = rotate(x, settings).norm(dim=-1) / x.norm(dim=-1)
    assert (ratios - 1).abs().max() > 0.05
    spread = max(max(v) - min(v) for v in logits_by_offset(settings).values())
    assert spread > 0.5


def test_published_layout():
    """[height d/4 | width d/4 | depth d/2], each block its half twice; depth angles are zero."""
    settings = config("published", grid=(1, 2, 3))
    cos, sin = rotary_tables(settings)
    h, w = 1, 2
    inverse = 100.0 ** (-torch.arange(4) / 4)
    angles = torch.cat([h * inverse, h * inverse, w * inverse, w * inverse, torch.zeros(16)])
    torch.testing.assert_close(cos[h * 3 + w], angles.cos())
    torch.testing.assert_close(sin[h * 3 + w], angles.sin())


@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_cls_has_angle_zero(conventions):
    cos, sin = rotary_tables(config(conventions, cls=True))
    patches = rotary_tables(config(conventions))
    assert torch.equal(cos[0], torch.ones(D)) and torch.equal(sin[0], torch.zeros(D))
    assert torch.equal(cos[1:], patches[0]) and torch.equal(sin[1:], patches[1])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_stay_fp32(cast):
    tables = RotaryTables(config())
    expected = tables.cos.clone()
    tables.to(cast)
    assert tables.cos.dtype is torch.float32 and torch.equal(tables.cos, expected)


def test_tables_leave_the_meta_device():
    with torch.device("meta"):
        tables = RotaryTables(config())
    tables.to_empty(device="cpu")
    assert torch.equal(tables.sin, rotary_tables(config())[1])
