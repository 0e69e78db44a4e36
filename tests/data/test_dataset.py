import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_fast.data.access import RandomAccessFile
from blip3o_fast.data.dataset import EmbeddingDataset, photo_is_heldout
from blip3o_fast.data.manifest import Split
from blip3o_fast.data.shards import SampleRecord, ShardWriter

DESCRIPTORS = Path("/proc/self/fd")


def test_reads_any_samples_in_any_order(make_dataset, facts, features):
    dataset = EmbeddingDataset(make_dataset())
    eva, clip, records = features(facts, 0, 20)
    chosen = [19, 0, 7, 7, 6]
    batch = dataset.read(chosen)
    assert torch.equal(batch.eva, eva[chosen]) and torch.equal(batch.clip, clip[chosen])
    assert batch.keys == tuple(records[i].key for i in chosen)
    assert batch.sources == tuple(records[i].source for i in chosen)
    assert dataset.records(chosen) == [records[i] for i in chosen]
    assert dataset.read(np.array(chosen)).keys == batch.keys
    assert (len(dataset), dataset.photos, dataset.tokens) == (20, 10, 4)
    assert (dataset.eva_width, dataset.clip_width, dataset.dtype) == (6, 5, torch.float32)


def test_a_batch_costs_its_own_bytes(make_dataset, facts, monkeypatch):
    """Once each, whether they are checked the first time or known to be good."""
    dataset = EmbeddingDataset(make_dataset(samples=20, samples_per_shard=7))
    dataset.read([0, 7, 14])  # headers
    read_into, read = RandomAccessFile.read_into, []

    def counted(file, out, start):
        if file.path.suffix == ".safetensors":
            read.append((file.path, start, out.nbytes))
        read_into(file, out, start)

    monkeypatch.setattr(RandomAccessFile, "read_into", counted)
    for _ in range(2):
        read.clear()
        for part in ([3, 19, 5], [12, 13, 6, 18]):
            dataset.read(part)
        assert sum(size for _, _, size in read) == 7 * facts.sample_bytes
        assert len({(path, start) for path, start, _ in read}) == len(read)


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_outside_is_refused(make_dataset, index):
    with pytest.raises(IndexError, match=f"sample {index}: expected 0 to 19"):
        EmbeddingDataset(make_dataset()).read([index])


def test_the_split_goes_by_photo_and_loses_nothing(make_dataset):
    folder = make_dataset(samples=200)
    train = EmbeddingDataset(folder, split="train")
    heldout = EmbeddingDataset(folder, split="heldout")
    sides = [side.read(range(len(side))) for side in (train, heldout)]
    assert not set(sides[0].sources) & set(sides[1].sources)
    assert set(sides[0].keys) | set(sides[1].keys) == {f"key{i}" for i in range(200)}
    assert train.photos + heldout.photos == 100
    assert 10 <= heldout.photos <= 45  # 25 expected, standard deviation 4.3


def test_a_larger_fraction_keeps_what_a_smaller_one_held_out():
    photos = [f"photo{i}" for i in range(5000)]
    small, large = ({p for p in photos if photo_is_heldout(p, f)} for f in (0.1, 0.3))
    assert small < large
    assert len(small) == pytest.approx(500, abs=85)  # four standard deviations
    assert len(large) == pytest.approx(1500, abs=130)
    assert not any(photo_is_heldout(p, 0.0) for p in photos)


def test_the_side_of_a_photo_is_fixed_for_ever():
    # Recorded: data extracted later must not move photos from one side to the other.
    assert [photo_is_heldout(f"photo{i}", 0.5) for i in range(8)] == RECORDED


RECORDED = [False, True, False, False, False, False, False, True]


def test_the_fraction_can_be_given_or_left_to_the_manifest(make_dataset):
    folder = make_dataset(samples=200)
    implied = EmbeddingDataset(folder, split="heldout")
    assert len(EmbeddingDataset(folder, split="heldout", heldout_fraction=0.25)) == len(implied)
    assert len(EmbeddingDataset(folder, split="heldout", heldout_fraction=0.6)) > len(implied)
    assert len(EmbeddingDataset(folder, split="train", heldout_fraction=0.0)) == 200


def test_the_manifest_can_list_the_photos_held_out(make_dataset):
    folder = make_dataset(split=Split(0.0, ("photo3", "photo8")))
    heldout = EmbeddingDataset(folder, split="heldout")
    assert heldout.read(range(4)).keys == ("key6", "key7", "key16", "key17")
    assert len(EmbeddingDataset(folder, split="train")) == 16


def test_a_sample_without_a_source_is_its_own_photo(tmp_path, facts, features):
    eva, clip, _ = features(facts, 0, 3)
    with ShardWriter(tmp_path, facts=facts) as writer:
        writer.add(eva, clip, [SampleRecord("a"), SampleRecord("b"), SampleRecord("c", "", "b")])
    dataset = EmbeddingDataset(tmp_path)
    assert dataset.read(range(3)).sources == ("a", "b", "b")
    assert dataset.photos == 2


@pytest.mark.parametrize(("split", "fraction"), [("heldout", 0.0), ("train", 0.9999)])
def test_an_empty_side_is_refused(make_dataset, split, fraction):
    with pytest.raises(ValueError, match=f"expected {split} samples, got none of 20"):
        EmbeddingDataset(make_dataset(), split=split, heldout_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: expected train, heldout or all, got 'test'"),
        ({"heldout_fraction": 1.0}, "heldout_fraction: expected 0 or more and less than 1"),
        ({"heldout_fraction": -0.1}, "heldout_fraction: expected 0 or more"),
        ({"tokens": 6}, r"tokens: expected 4, or 5 \(with a token mean in front\), got 6"),
        ({"tokens": 3}, "tokens: expected 4, or 5"),
        ({"max_shards": 0}, "max_shards: expected at least 1, got 0"),
        ({"open_shards": 0}, "open_shards: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(make_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingDataset(make_dataset(), **options)


def test_the_first_shards_only(make_dataset):
    dataset = EmbeddingDataset(make_dataset(), max_shards=2)
    assert dataset.read([11]).keys == ("key11",)
    assert len(dataset) == 12


def test_more_shards_than_are_kept_open(make_dataset, facts, features):
    dataset = EmbeddingDataset(make_dataset(samples_per_shard=1), open_shards=2)
    eva, _, _ = features(facts, 0, 20)
    for _ in range(2):
        assert torch.equal(dataset.read(range(20)).eva, eva)


class TestReopening:
    """A shard that was closed to make room for others."""

    @pytest.fixture
    def opened(self, monkeypatch):
        """Names of the files that are opened, and (name, start, bytes) of what is read of them."""
        files, reads = [], []
        open_file, read_into = Path.open, RandomAccessFile.read_into

        def counting_open(self, *args, **options):
            files.append(self.name)
            return open_file(self, *args, **options)

        def counting_read(self, out, start):
            reads.append((self.path.name, start, out.nbytes))
            read_into(self, out, start)

        monkeypatch.setattr(Path, "open", counting_open)
        monkeypatch.setattr(RandomAccessFile, "read_into", counting_read)
        return files, reads

    def test_reads_the_bytes_of_its_rows_alone(self, make_dataset, facts, features, opened):
        dataset = EmbeddingDataset(make_dataset(), open_shards=1)
        files, reads = opened
        files.clear()
        eva, clip, _ = features(facts, 0, 20)
        batch = dataset.read([13, 1, 14])
        assert torch.equal(batch.eva, eva[[13, 1, 14]])
        assert torch.equal(batch.clip, clip[[13, 1, 14]])
        assert files == [f"shard_0000{i}.safetensors" for i in (2, 0, 2)]
        # 512 bytes of header; six rows of eva, 96 bytes each, and then of clip, 80 bytes each.
        assert reads == [
            (f"shard_0000{shard}.safetensors", start, size)
            for shard, row in ((2, 1), (0, 1), (2, 2))
            for start, size in ((512 + 96 * row, 96), (512 + 96 * 6 + 80 * row, 80))
        ]
        assert batch.keys == ("key13", "key1", "key14")
        assert files[3:] == [f"shard_0000{i}.jsonl" for i in (2, 0, 2)]

    def test_open_ones_are_not_opened_again(self, make_dataset, opened):
        dataset = EmbeddingDataset(make_dataset(), open_shards=4)
        for _ in range(3):
            opened[0].clear()
            dataset.read([13, 1, 14, 7, 19])
        assert opened[0] == []

    def test_another_size_is_refused(self, make_dataset):
        folder = make_dataset()
        dataset = EmbeddingDataset(folder)
        with (folder / "shard_00001.safetensors").open("ab") as file:
            file.write(b"x")
        with pytest.raises(ValueError, match=r"shard_00001\.safetensors: expected 1568 bytes, got"):
            dataset.read([7])
        assert dataset.read([0]).keys == ("key0",)

    def test_a_shard_that_shrinks_while_open_is_refused(self, make_dataset):
        folder = make_dataset()
        dataset = EmbeddingDataset(folder)
        dataset.read([6])
        with (folder / "shard_00001.safetensors").open("r+b") as file:
            file.truncate(700)
        with pytest.raises(ValueError, match=r"shard_00001\.safetensors: .*truncated while in use"):
            dataset.read([8])

    @pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="counts descriptors")
    def test_files_close_with_the_data_set(self, make_dataset):
        dataset = EmbeddingDataset(make_dataset(samples_per_shard=1))
        before = len([*DESCRIPTORS.iterdir()])
        dataset.read(range(20))
        assert len([*DESCRIPTORS.iterdir()]) == before + 20
        del dataset
        assert len([*DESCRIPTORS.iterdir()]) == before

    @pytest.mark.parametrize(
        ("soft", "kept"), [(1024, 256), (1, 1), (1 << 20, 4096), (resource.RLIM_INFINITY, 256)]
    )
    def test_as_many_stay_open_as_the_system_allows(self, make_dataset, monkeypatch, soft, kept):
        monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
        assert EmbeddingDataset(make_dataset())._shard.cache_info().maxsize == kept


class TestTokens:
    def test_cls_can_be_dropped(self, make_dataset, facts, features):
        folder = make_dataset(tokens=5, has_cls=True, dtype="bf16")
        eva, clip, _ = features(facts.replace(tokens=5, has_cls=True, dtype="bf16"), 0, 20)
        whole, patches = EmbeddingDataset(folder), EmbeddingDataset(folder, tokens=4)
        assert (whole.tokens, whole.cls, whole.has_cls) == (5, "encoder", True)
        assert (patches.tokens, patches.cls, patches.has_cls) == (4, "none", False)
        batch = patches.read([3, 9])
        assert torch.equal(batch.eva, eva[[3, 9], 1:]) and torch.equal(batch.clip, clip[[3, 9], 1:])

    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_the_token_mean_stands_in_for_cls_on_request(
        self, make_dataset, facts, features, dtype
    ):
        folder = make_dataset(dtype=dtype)
        eva, clip, _ = features(facts.replace(dtype=dtype), 0, 20)
        dataset = EmbeddingDataset(folder, tokens=5)
        assert (dataset.tokens, dataset.cls, dataset.has_cls) == (5, "token_mean", True)
        batch = dataset.read([4, 0])
        for got, stored in ((batch.eva, eva), (batch.clip, clip)):
            mean = stored[[4, 0]].float().mean(1, keepdim=True).to(stored.dtype)
            assert torch.equal(got, torch.cat((mean, stored[[4, 0]]), dim=1))
        assert EmbeddingDataset(folder).cls == "none"

    def test_a_stand_in_that_was_stored_is_told_apart(self, make_dataset):
        folder = make_dataset(tokens=5, has_cls=True, notes={"cls": "token_mean"})
        assert EmbeddingDataset(folder).cls == "token_mean"
