import threading

import numpy as np
import pytest
import torch

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.readahead import BatchReader, read_ahead

PARTS = [np.array(part) for part in ([3, 1], [19], [0, 7, 12], [5, 5], [2], [4, 6])]


@pytest.fixture
def dataset(make_dataset):
    return EmbeddingDataset(make_dataset())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 2, 9])
def test_any_samples_in_the_order_asked_for(dataset, facts, features, workers, prefetch):
    eva, clip, _ = features(facts, 0, 20)
    with BatchReader(dataset, 3, workers=workers) as reader:
        batches = list(read_ahead(reader, PARTS, prefetch=prefetch))
    for batch, part in zip(batches, PARTS, strict=True):
        assert torch.equal(batch.eva, eva[part]) and torch.equal(batch.clip, clip[part])
        assert batch.keys == tuple(f"key{i}" for i in part)


def test_no_more_is_read_than_asked_for(dataset, monkeypatch):
    with BatchReader(dataset, 3, workers=1) as reader:
        submit, asked = reader.submit, []
        monkeypatch.setattr(reader, "submit", lambda part: (asked.append(1), submit(part))[1])
        for i, _ in enumerate(read_ahead(reader, PARTS, prefetch=2)):
            assert len(asked) == min(i + 3, len(PARTS))


@pytest.mark.parametrize("records", [False, True])
def test_records_are_read_by_the_threads_on_request(dataset, monkeypatch, records):
    index, readers = dataset._index, []

    class Watched(type(index)):
        def records(self, indices):
            readers.append(threading.current_thread())
            return super().records(indices)

    monkeypatch.setattr(dataset, "_index", Watched(*index))
    with BatchReader(dataset, 3, records=records) as reader:
        batch = next(read_ahead(reader, PARTS[:1]))
        assert len(readers) == records
        assert batch.keys == ("key3", "key1") and batch.sources == ("photo1", "photo0")
    assert len(readers) == 1
    assert (readers[0] is threading.current_thread()) == (not records)


def test_an_error_comes_in_its_turn(dataset):
    with BatchReader(dataset, 3) as reader:
        batches = read_ahead(reader, [np.array([1]), np.array([20])])
        assert next(batches).keys == ("key1",)
        with pytest.raises(IndexError, match="sample 20: expected 0 to 19"):
            next(batches)
