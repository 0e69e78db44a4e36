"""Out of memory halves the piece, not the batch."""

import pytest
import torch

from blip3o_fast.pieces import Pieces
from blip3o_fast.training import train
from blip3o_fast.training.step import OptimizerStep


def fits(limit, done):
    def work(piece, last):
        if piece.stop - piece.start > limit:
            raise torch.OutOfMemoryError
        done.append((piece.start, piece.stop, last))
        return piece.stop - piece.start

    return work


@pytest.mark.parametrize(
    ("rows", "limit", "fitting"), [(16, 16, 4), (7, 7, 2), (5, 8, 1), (8, 3, 9)]
)
def test_every_row_is_done_once_in_pieces_that_fit(rows, limit, fitting):
    done = []
    pieces = Pieces(limit)
    sizes = pieces.run(rows, fits(fitting, done), done.clear)
    assert sum(sizes) == rows and max(sizes) <= fitting
    assert [start for start, *_ in done] == [0, *(stop for _, stop, _ in done[:-1])]
    assert [last for *_, last in done] == [False] * (len(done) - 1) + [True]
    assert pieces.limit <= max(fitting, limit), "the next batch starts with what fitted"


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(MemoryError, match="with 1 samples at once; use a smaller model"):
        Pieces(4).run(4, fits(0, []), lambda: None)


def test_shared_work_is_not_retried():
    with pytest.raises(MemoryError, match="raise gradient_accumulation_steps"):
        Pieces(4, retry=False).run(4, fits(2, []), lambda: None)


def test_training_survives_a_shortage_with_the_same_gradients(options, tmp_path, monkeypatch):
    plain = train(options(eva_adapter_dropout=0.0))
    backward = OptimizerStep.backward

    def short_of_memory(self, x_1, *rest):
        if len(x_1) > 2:
            raise torch.OutOfMemoryError
        return backward(self, x_1, *rest)

    monkeypatch.setattr(OptimizerStep, "backward", short_of_memory)
    cut = train(options(eva_adapter_dropout=0.0, output_dir=tmp_path / "cut"))
    for (_, a), (_, b) in zip(plain.losses, cut.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
