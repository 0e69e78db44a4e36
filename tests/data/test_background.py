import threading
import time

import pytest
import torch

from blip3o_fast.data.background import BackgroundWriter
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.shards import ShardWriter


def test_the_folder_is_the_one_written_in_turns(tmp_path, facts, features):
    with ShardWriter(tmp_path / "turns", facts=facts, samples_per_shard=6) as writer:
        for start in range(0, 20, 4):
            writer.add(*features(facts, start, start + 4))
    with (
        ShardWriter(tmp_path / "ahead", facts=facts, samples_per_shard=6) as writer,
        BackgroundWriter(writer) as background,
    ):
        for start in range(0, 20, 4):
            background.add(*features(facts, start, start + 4))
    turns, ahead = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("turns", "ahead")
    )
    assert turns == ahead


def test_no_more_than_asked_for_are_waiting(tmp_path, facts, features, monkeypatch):
    gate, add = threading.Event(), ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda *args: (gate.wait(), add(*args)))
    with ShardWriter(tmp_path, facts=facts) as writer, BackgroundWriter(writer, ahead=2) as back:
        back.add(*features(facts, 0, 2))
        back.add(*features(facts, 2, 4))
        third = threading.Thread(target=back.add, args=features(facts, 4, 6))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        gate.set()
        third.join()


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_a_refused_batch_is_the_last(tmp_path, facts, features, ahead):
    eva, clip, records = features(facts, 6, 12)
    eva[1, 0, 0] = torch.nan
    with (
        pytest.raises(ValueError, match=r"row 1 \(key 'key7'\): eva holds NaN"),
        ShardWriter(tmp_path, facts=facts, samples_per_shard=6) as writer,
        BackgroundWriter(writer, ahead) as background,
    ):
        background.add(*features(facts, 0, 6))
        background.add(eva, clip, records)
        for start in (12, 18):
            background.add(*features(facts, start, start + 6))
    assert Manifest.read(tmp_path / "manifest.part-0.json").samples == 6


def test_what_was_added_before_an_exception_is_written(tmp_path, facts, features, monkeypatch):
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda *args: (time.sleep(0.1), add(*args)))
    with (
        pytest.raises(RuntimeError, match="elsewhere"),
        ShardWriter(tmp_path, facts=facts, samples_per_shard=6) as writer,
        BackgroundWriter(writer) as background,
    ):
        background.add(*features(facts, 0, 7))
        background.add(*features(facts, 7, 12))
        raise RuntimeError("elsewhere")
    assert Manifest.read(tmp_path / "manifest.part-0.json").samples == 12


@pytest.mark.gpu
def test_tensors_on_a_device_are_copied_before_they_change(tmp_path, facts):
    from blip3o_fast.data import SampleRecord

    facts = facts.replace(dtype="fp16")
    x = torch.zeros(2, 4, 11, device="cuda")
    with ShardWriter(tmp_path, facts=facts) as writer, BackgroundWriter(writer) as background:
        for i in range(40):
            torch.cuda._sleep(1_000_000)  # the stream is behind
            x.fill_(i)
            records = [SampleRecord(f"{i}-{j}") for j in range(2)]
            background.add(x[..., :6], x[..., 6:], records)
    batch = EmbeddingDataset(tmp_path).read(range(80))
    expected = torch.arange(40).repeat_interleave(2)[:, None, None].half()
    assert (batch.eva == expected).all() and (batch.clip == expected).all()
