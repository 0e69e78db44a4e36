"""Peers: who is here, and that what is written with them is the op."""

import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from blip3o_fast.benchmarking import peers
from blip3o_fast.benchmarking.cases import check_agreement
from blip3o_fast.benchmarking.op_cases import sizes_of
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import OPS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape("tiny", 2, 16)


@pytest.fixture
def install(monkeypatch):
    """Put modules of these names and contents in place, parents included."""

    def put(name, **content):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in sys.modules:
                module = types.ModuleType(part)
                module.__spec__ = importlib.machinery.ModuleSpec(part, None)
                monkeypatch.setitem(sys.modules, part, module)
        vars(sys.modules[name]).update(content)

    return put


def rms(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class LigerRMSNorm:
    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return rms(x, weight, eps)


class LigerModulated:
    @staticmethod
    def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return rms(x, weight, eps) * (1 + scale[:, None]) + shift[:, None]


class LigerSiLUMul:
    @staticmethod
    def apply(gate, up):
        return F.silu(gate) * up


class LigerRope:
    @staticmethod
    def apply(q, k, cos, sin):
        def rotate(x):
            low, high = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]

        return rotate(q), rotate(k)


@pytest.fixture
def installed(install):
    install("liger_kernel.ops.rms_norm", LigerRMSNormFunction=LigerRMSNorm)
    install("liger_kernel.ops.modulated_rms_norm", LigerModulatedRMSNormFunction=LigerModulated)
    install("liger_kernel.ops.swiglu", LigerSiLUMulFunction=LigerSiLUMul)
    install("liger_kernel.ops.rope", LigerRopeFunction=LigerRope)
    install("quack", rmsnorm=lambda x, weight, eps: rms(x, weight, eps))
    install(
        "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=lambda x, weight, shape, eps: rms(x, weight, eps),
    )


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("sandwich_norm", ["liger", "quack", "apex"]),
        ("sandwich_join", ["liger", "quack", "apex"]),
        ("rope", ["liger"]),
        ("swiglu", ["liger"]),
        ("flow_loss", []),
    ],
)
def test_what_is_written_with_them_is_the_op(installed, name, libraries):
    op = OPS[name]
    arguments = op.specimens(sizes_of(SHAPE, torch.float32, CPU))[0]
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    found = list(peers.op_peers(name, SHAPE))
    assert [library for library, _ in found] == libraries
    for library, call in found:
        check_agreement(library, call(*tensors), op.reference(*arguments))


def test_without_them_there_are_no_peers():
    missing = {"liger_kernel", "quack", "apex"} - {*sys.modules}
    if any(peers.importlib.util.find_spec(name) for name in missing):
        pytest.skip("a peer is installed here")
    assert list(peers.op_peers("sandwich_norm", SHAPE)) == []


def test_an_absent_peer_is_listed_with_its_reason(install, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"nothing-here": "nothing_here_at_all", "own": "own_peer"})
    install("own_peer")
    assert peers.find_peers(CUDA)["nothing-here"] == "absent: not installed"
    assert peers.find_peers(CUDA)["own"] == "installed, version unknown"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"own": "1.2"}[name])
    assert peers.find_peers(CUDA)["own"] == "1.2"
    cpu = peers.find_peers(CPU)
    assert cpu["own"] == "absent: 1.2 is installed, but its kernels need a GPU"
    assert "CUDA C++ kernels" in cpu


def test_a_peer_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(peers, "PEERS", {"broken": "broken_peer"})
    assert peers.find_peers(CUDA)["broken"] == ("absent: does not load: OSError: undefined symbol")
