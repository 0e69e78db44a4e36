import json
import threading
import time
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.loader import Loader
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.order import Position, epoch_order
from blip3o_fast.data.shards import SampleRecord, ShardWriter


@pytest.fixture
def dataset(make_dataset):
    return EmbeddingDataset(make_dataset(samples=23, samples_per_shard=7))


def keys(loader, steps):
    return [next(loader).keys for _ in range(steps)]


def loader_of(dataset, **options):
    return Loader(dataset, **{"batch_size": 4, "seed": 3, **options})


def test_batches_are_the_global_order(dataset, facts, features):
    eva, clip, records = features(facts, 0, 23)
    with loader_of(dataset) as loader:
        assert loader.steps_per_epoch == 5
        for epoch in range(3):
            order = epoch_order(23, 3, epoch)
            for step in range(5):
                assert loader.position == (epoch, step)
                batch, chosen = next(loader), order[4 * step : 4 * step + 4].tolist()
                assert batch.keys == tuple(records[i].key for i in chosen)
                assert torch.equal(batch.eva, eva[chosen])
                assert torch.equal(batch.clip, clip[chosen])


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [1, 3, 9])
def test_threads_and_read_ahead_do_not_change_the_order(dataset, workers, prefetch):
    with loader_of(dataset) as reference:
        expected = keys(reference, 17)
    with loader_of(dataset, workers=workers, prefetch=prefetch) as loader:
        assert keys(loader, 17) == expected


def test_slow_threads_do_not_change_the_order(dataset, monkeypatch):
    with loader_of(dataset) as reference:
        expected = keys(reference, 12)
    read, rng = dataset.read, np.random.default_rng(0)

    def slow(indices):
        time.sleep(rng.uniform(0, 0.01))
        return read(indices)

    monkeypatch.setattr(dataset, "read", slow)
    with loader_of(dataset, workers=4, prefetch=6) as loader:
        assert keys(loader, 12) == expected


# Mid-epoch 0, at a boundary, mid-epoch 2, and before anything.
@pytest.mark.parametrize("taken", [0, 1, 3, 5, 12])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_stream_is_the_uninterrupted_one(dataset, taken, workers):
    with loader_of(dataset) as reference:
        expected = keys(reference, 20)
    with loader_of(dataset, workers=2) as first:
        assert keys(first, taken) == expected[:taken]
        state = json.loads(json.dumps(first.state_dict()))
    with loader_of(dataset, workers=workers, prefetch=7) as second:
        second.load_state_dict(state)
        assert keys(second, 4) == expected[taken : taken + 4]
        state = second.state_dict()
    with loader_of(dataset) as third:  # a second resume
        third.load_state_dict(state)
        assert keys(third, 4) == expected[taken + 4 : taken + 8]


def test_a_loader_can_go_back(dataset):
    with loader_of(dataset) as loader:
        state = loader.state_dict()
        first = keys(loader, 7)
        loader.load_state_dict(state)
        assert keys(loader, 7) == first


def test_the_number_of_ranks_may_change_on_resume(dataset):
    with loader_of(dataset, batch_size=6) as reference:
        expected = keys(reference, 9)

    def run(ranks, state, steps):
        streams = []
        for rank in range(ranks):
            with loader_of(dataset, batch_size=6, rank=rank, world_size=ranks) as loader:
                loader.load_state_dict(state)
                streams.append(keys(loader, steps))
                after = loader.state_dict()
        return [sum(parts, ()) for parts in zip(*streams, strict=True)], after

    with loader_of(dataset, batch_size=6) as loader:
        state = loader.state_dict()
    taken = []
    for ranks, steps in ((2, 2), (3, 4), (1, 3)):
        batches, state = run(ranks, state, steps)
        taken += batches
    assert taken == expected


def test_every_rank_takes_the_same_number_of_steps(dataset):
    for drop_last, steps in ((True, 3), (False, 4)):
        loaders = [
            loader_of(dataset, batch_size=6, rank=rank, world_size=3, drop_last=drop_last)
            for rank in range(3)
        ]
        batches = [list(loader.epoch()) for loader in loaders]
        assert [len(b) for b in batches] == [steps] * 3
        for loader in loaders:
            assert loader.position == (1, 0)
            loader.close()


def test_a_short_last_step(dataset):
    with loader_of(dataset, batch_size=20, drop_last=False, shuffle=False) as loader:
        batches = list(loader.epoch())
    assert [len(batch.keys) for batch in batches] == [20, 3]
    assert batches[1].eva.shape == (3, 4, 6)
    assert sum((batch.keys for batch in batches), ()) == tuple(f"key{i}" for i in range(23))


def test_an_epoch_that_was_begun_is_finished(dataset):
    with loader_of(dataset) as loader:
        next(loader)
        assert len(list(loader.epoch())) == 4
        assert loader.position == (1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 24}, "batch_size: expected at most 23, the samples of the data, got 24"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"prefetch": 0}, "prefetch: expected at least 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, r"a multiple of world_size \(2\)"),
        ({"rank": 2, "world_size": 2}, "a rank below it, got 4 and 2"),
    ],
)
def test_bad_arguments(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "data order changed .* seed: expected 4, got 3"),
        ({"samples": 24}, "samples: expected 24, got 23"),
        ({"batch_size": 8}, "batch_size: expected 8, got 4"),
        ({"shuffle": 0}, "shuffle: expected 0, got 1"),
        ({"step": 5}, "expected a step below 5"),
        ({"epoch": -1}, "got Position"),
        ({"other": 1}, "loader state: expected"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset, change, message):
    with loader_of(dataset) as loader:
        expected = keys(loader, 1)
        state = {**loader.state_dict(), **change}
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
        assert loader.position == Position(0, 1)
        assert keys(loader, 1) != expected


def test_a_bad_row_stops_the_stream_at_its_batch_and_no_earlier(make_dataset):
    folder = make_dataset(samples=12, samples_per_shard=12)
    path = folder / "shard_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[512 + 9 * 96 : 512 + 9 * 96 + 4] = b"\0\0\x80\x7f"  # Inf in row 9 of eva
    path.write_bytes(data)
    with loader_of(EmbeddingDataset(folder), shuffle=False, prefetch=4) as loader:
        assert keys(loader, 2) == [
            ("key0", "key1", "key2", "key3"),
            ("key4", "key5", "key6", "key7"),
        ]
        for _ in range(2):
            with pytest.raises(ValueError, match=r"row 9 \(key 'key9'\): eva holds NaN or Inf"):
                next(loader)
        assert loader.position == Position(0, 2)


def test_an_order_is_sorted_once_however_many_threads_want_it(dataset, monkeypatch):
    calls, running = [], threading.Lock()

    @lru_cache(maxsize=4)
    def slow_order(samples, seed, epoch):
        assert running.acquire(blocking=False)
        calls.append(epoch)
        time.sleep(0.1)
        running.release()
        return epoch_order(samples, seed, epoch)

    monkeypatch.setattr("blip3o_fast.data.loader.epoch_order", slow_order)
    with loader_of(dataset, workers=5, prefetch=8) as loader:
        keys(loader, 6)
    assert calls == [0, 1, 2][: len(calls)] and len(calls) >= 2


def test_reading_leaves_the_records_alone(dataset, monkeypatch):
    monkeypatch.setattr("blip3o_fast.data.index.read_records", None)
    with loader_of(dataset) as loader:
        assert next(loader).eva.shape == (4, 4, 6)


def test_waiting_is_measured(dataset, monkeypatch):
    """By a clock that goes on while a batch is waited for, and while the caller is busy."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("blip3o_fast.data.loader.time", clock)
    with loader_of(dataset) as loader:
        take = loader._reader.take

        def waits(future, seconds):
            clock.now += seconds
            return take(future)

        total = 0.0
        for seconds in (3.0, 0.0, 0.25):
            monkeypatch.setattr(loader._reader, "take", partial(waits, seconds=seconds))
            next(loader)
            clock.now += 64.0
            total += seconds
            assert (loader.wait_seconds, loader.total_wait_seconds) == (seconds, total)


def test_a_tower_that_is_absent_has_width_zero(tmp_path, facts, features):
    facts = facts.replace(clip_width=0)
    eva, _, records = features(facts, 0, 8)
    with ShardWriter(tmp_path, facts=facts) as writer:
        writer.add(eva, None, records)
    with loader_of(EmbeddingDataset(tmp_path)) as loader:
        assert next(loader).clip.shape == (4, 4, 0)


def test_a_batch_belongs_to_its_consumer(dataset):
    with loader_of(dataset, prefetch=1) as loader:
        batch = next(loader)
        before = batch.eva.clone()
        for _ in range(6):
            next(loader)
        assert torch.equal(batch.eva, before)


@pytest.mark.gpu
class TestCuda:
    def test_batches_arrive_on_the_device_in_order(self, make_dataset, facts, features):
        dataset = EmbeddingDataset(make_dataset(samples=40, dtype="bf16"))
        eva, clip, _ = features(facts.replace(dtype="bf16"), 0, 40)
        with loader_of(dataset, device="cuda", workers=3, prefetch=5) as loader:
            for epoch in range(20):
                order = epoch_order(40, 3, epoch)
                for step in range(10):
                    batch, chosen = next(loader), order[4 * step : 4 * step + 4]
                    assert batch.eva.device == torch.device("cuda", torch.cuda.current_device())
                    assert torch.equal(batch.eva.cpu(), eva[chosen])
                    assert torch.equal(batch.clip.cpu(), clip[chosen])

    def test_a_busy_consumer_never_sees_a_buffer_reused(self, tmp_path):
        facts = Manifest(
            tokens=256, has_cls=False, grid=(1, 16, 16), eva_width=512, clip_width=64, dtype="bf16"
        )
        with ShardWriter(tmp_path, facts=facts) as writer:
            for i in range(64):
                eva, clip = torch.full((1, 256, 512), float(i)), torch.full((1, 256, 64), float(i))
                writer.add(eva, clip, [SampleRecord(str(i))])
        with Loader(EmbeddingDataset(tmp_path), batch_size=8, seed=0, device="cuda") as loader:
            results = []
            for _ in range(40):
                batch = next(loader)
                torch.cuda._sleep(2_000_000)  # the consumer's stream is behind
                expected = torch.tensor([float(key) for key in batch.keys], device="cuda")
                results.append(
                    (batch.eva.float().mean((1, 2)) == expected).all()
                    & (batch.clip.float().amin((1, 2)) == expected).all()
                )
                del batch
            assert torch.stack(results).all()
