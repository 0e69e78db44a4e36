import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from blip3o_fast import atomic
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.parts import merge_parts
from blip3o_fast.data.shards import SampleRecord, Shard, ShardWriter
from blip3o_fast.data.tensorfile import read_header


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder, facts, features, samples=20, batch=3, **options):
    with ShardWriter(folder, facts=facts, samples_per_shard=6, **options) as writer:
        for start in range(0, samples, batch):
            eva, clip, records = features(facts, start, min(samples, start + batch))
            left = [i for i, record in enumerate(records) if record.key not in writer.done]
            if left:
                writer.add(eva[left], clip[left], [records[i] for i in left])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("batch", [1, 5, 6, 20])
def test_what_was_written_is_read_back(tmp_path, facts, features, dtype, batch):
    facts = facts.replace(dtype=dtype)
    write(tmp_path, facts, features, batch=batch)
    manifest = Manifest.load(tmp_path)
    assert [entry.samples for entry in manifest.shards] == [6, 6, 6, 2]
    eva, clip, records = features(facts, 0, 20)
    row = 0
    for entry in manifest.shards:
        shard = Shard(tmp_path / entry.file, entry)
        got = shard.read(slice(None))
        assert torch.equal(got[0], eva[row : row + shard.samples])
        assert torch.equal(got[1], clip[row : row + shard.samples])
        assert [shard.records[i] for i in range(shard.samples)] == records[
            row : row + shard.samples
        ]
        row += shard.samples


def test_the_size_of_the_batches_does_not_matter(tmp_path, facts, features):
    write(tmp_path / "a", facts, features, batch=1)
    write(tmp_path / "b", facts, features, batch=20)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rows_are_read_in_the_order_asked_for(make_dataset, facts, features):
    folder = make_dataset()
    shard = Shard(folder / "shard_00001.safetensors")
    eva, clip, _ = features(facts, 6, 12)
    assert torch.equal(shard.read([5, 0, 5])[0], eva[[5, 0, 5]])
    assert torch.equal(shard.read(slice(1, 5, 2))[1], clip[1:5:2])
    with pytest.raises(IndexError, match="row 6 of 6"):
        shard.read([6])


def test_damaged_captions_survive(tmp_path, facts, features):
    eva, clip, _ = features(facts, 0, 1)
    record = SampleRecord("k", 'line\nbreak "quoted" \udc80 \u2028 \x00', "p")
    with ShardWriter(tmp_path, facts=facts) as writer:
        writer.add(eva, clip, [record])
    assert EmbeddingDataset(tmp_path).records([0]) == [record]


@pytest.mark.parametrize("absent", ["eva", "clip"])
def test_one_tower_alone(tmp_path, facts, features, absent):
    facts = facts.replace(**{f"{absent}_width": 0})
    eva, clip, records = features(facts, 0, 8)
    with ShardWriter(tmp_path, facts=facts, samples_per_shard=6) as writer:
        writer.add(eva if absent == "clip" else None, clip, records)
    dataset = EmbeddingDataset(tmp_path)
    batch = dataset.read(range(8))
    assert torch.equal(batch.eva, eva) and torch.equal(batch.clip, clip)
    assert getattr(batch, absent).shape == (8, 4, 0)
    names = read_header(tmp_path / "shard_00000.safetensors")
    assert list(names) == [name for name in ("eva", "clip") if name != absent]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, c, r: (e[:, :3], c, r), r"eva: expected \[3, 4, 6\] of floating point, got"),
        (lambda e, c, r: (e, c[..., :4], r), r"clip: expected \[3, 4, 5\] of floating point, got"),
        (lambda e, c, r: (e[:2], c, r), r"eva: expected \[3, 4, 6\]"),
        (lambda e, c, r: (e[0], c, r), r"eva: expected \[3, 4, 6\]"),
        (lambda e, c, r: (None, c, r), r"eva: expected \[3, 4, 6\] of floating point, got None"),
        (lambda e, c, r: (e.int(), c, r), r"got \[3, 4, 6\] of torch.int32"),
        (lambda e, c, r: (e[:0], c[:0], []), "expected at least one sample, got none"),
        (lambda e, c, r: (e, c, [r[0], r[1], r[0]]), "key 'key7' was already written"),
        (lambda e, c, r: (e, c, [r[0], r[1], SampleRecord("key0")]), "'key0' was already written"),
        (lambda e, c, r: (e, c, [r[0], r[1], SampleRecord("")]), "expected a key, got ''"),
        (lambda e, c, r: (e, c, [r[0], r[1], SampleRecord("k", 3)]), "expected strings, got 3"),
    ],
)
def test_a_bad_batch_is_refused_and_loses_nothing(tmp_path, facts, features, change, message):
    with ShardWriter(tmp_path, facts=facts, samples_per_shard=6) as writer:
        writer.add(*features(facts, 0, 7))
        with pytest.raises(ValueError, match=message):
            writer.add(*change(*features(facts, 7, 10)))
        writer.add(*features(facts, 7, 20))
    write(tmp_path / "clean", facts, features)
    clean = contents(tmp_path / "clean")
    assert contents_of_files(tmp_path) == clean


def contents_of_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tower", ["eva", "clip"])
def test_a_row_that_is_not_finite_is_named(tmp_path, facts, features, bad, tower):
    eva, clip, records = features(facts, 7, 10)
    (eva if tower == "eva" else clip)[2, 3, 1] = bad
    with ShardWriter(tmp_path, facts=facts, samples_per_shard=6) as writer:
        writer.add(*features(facts, 0, 7))
        with pytest.raises(ValueError, match=f"shard_00001: row 3 .key 'key9'.: {tower} holds NaN"):
            writer.add(eva, clip, records)


def test_a_value_too_large_for_the_dtype_is_named(tmp_path, facts, features):
    facts = facts.replace(dtype="fp16")
    eva, clip, records = features(facts, 0, 2)
    eva = eva.float()
    eva[1, 0, 0] = 70_000
    writer = ShardWriter(tmp_path, facts=facts)
    with pytest.raises(ValueError, match=r"row 1 \(key 'key1'\).*beyond the range of fp16"):
        writer.add(eva, clip, records)


def test_no_samples_leave_no_folder(tmp_path, facts):
    with (
        pytest.raises(ValueError, match="no samples were written"),
        ShardWriter(tmp_path / "new", facts=facts),
    ):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard: expected at least 1, got 0"),
        ({"part": "../x"}, "part: expected a letter"),
        ({"part": "0"}, "part: expected a letter"),
    ],
)
def test_bad_options(tmp_path, facts, options, message):
    with pytest.raises(ValueError, match=message):
        ShardWriter(tmp_path / "new", facts=facts, **options)
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused_without_resume(make_dataset, facts):
    folder = make_dataset()
    before = contents(folder)
    with pytest.raises(ValueError, match="already holds 20 samples"):
        ShardWriter(folder, facts=facts)
    with pytest.raises(
        ValueError,
        match=r"differs in dtype: expected fp16, got fp32; repeat the options .* an empty folder",
    ):
        ShardWriter(folder, facts=facts.replace(dtype="fp16"), resume=True)
    assert contents(folder) == before


def test_an_exception_keeps_the_finished_shards_and_resume_goes_on(tmp_path, facts, features):
    folder = tmp_path / "broken"
    with (
        pytest.raises(RuntimeError),
        ShardWriter(folder, facts=facts, samples_per_shard=6) as writer,
    ):
        writer.add(*features(facts, 0, 15))
        raise RuntimeError
    with pytest.raises(FileNotFoundError, match="unfinished"):
        EmbeddingDataset(folder)
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*"))
    with ShardWriter(folder, facts=facts, samples_per_shard=6, resume=True) as writer:
        assert writer.done == {f"key{i}" for i in range(12)}
        writer.add(*features(facts, 12, 20))
        writer.notes["skipped"] = 3
    write(tmp_path / "clean", facts, features)
    assert Manifest.load(folder).notes == {"skipped": 3}
    clean = contents(tmp_path / "clean")
    del clean["manifest.json"]
    assert clean.items() <= contents(folder).items()
    assert Manifest.load(folder).shards == Manifest.load(tmp_path / "clean").shards


def test_a_finished_data_set_can_grow(make_dataset, facts, features):
    folder = make_dataset(samples=8)
    with ShardWriter(folder, facts=facts, samples_per_shard=6, resume=True) as writer:
        writer.add(*features(facts, 8, 10))
    assert [entry.samples for entry in Manifest.load(folder).shards] == [6, 2, 2]
    assert EmbeddingDataset(folder, verify=True).read([9]).keys == ("key9",)


def test_resume_with_nothing_left_changes_nothing(make_dataset, facts):
    folder = make_dataset()
    before = contents(folder)
    with ShardWriter(folder, facts=facts, resume=True):
        pass
    assert contents(folder) == before


class TestParts:
    def test_processes_write_one_folder_together(self, tmp_path, facts, features):
        for rank, (start, stop) in enumerate([(0, 8), (8, 20)]):
            with ShardWriter(
                tmp_path, facts=facts, samples_per_shard=6, part=f"rank{rank}", merge=False
            ) as writer:
                writer.add(*features(facts, start, stop))
        assert not (tmp_path / "manifest.json").exists()
        assert merge_parts(tmp_path).samples == 20
        assert not list(tmp_path.glob("manifest.part*"))
        keys = EmbeddingDataset(tmp_path, verify=True).read(range(20)).keys
        assert keys == tuple(f"key{i}" for i in range(20))

    def test_the_number_of_processes_may_change_on_resume(self, tmp_path, facts, features):
        for rank in range(2):
            with ShardWriter(tmp_path, facts=facts, part=f"rank{rank}", merge=False) as writer:
                writer.add(*features(facts, 4 * rank, 4 * rank + 4))
        with ShardWriter(tmp_path, facts=facts, part="rank0", resume=True) as writer:
            assert writer.done == {f"key{i}" for i in range(8)}
            writer.add(*features(facts, 8, 10))
        assert len(EmbeddingDataset(tmp_path, verify=True)) == 10

    def test_a_key_in_two_parts_is_refused(self, tmp_path, facts, features):
        writers = [
            ShardWriter(tmp_path, facts=facts, part=f"rank{rank}", merge=False) for rank in range(2)
        ]
        for writer in writers:
            with writer:
                writer.add(*features(facts, 0, 2))
        with pytest.raises(ValueError, match="key 'key0' is in shard_rank0_00000"):
            merge_parts(tmp_path)

    def test_a_part_without_samples_is_fine_and_none_at_all_is_not(self, tmp_path, facts, features):
        for rank in range(2):
            with ShardWriter(tmp_path, facts=facts, part=f"rank{rank}", merge=False):
                pass
        with pytest.raises(ValueError, match="no samples were written"):
            merge_parts(tmp_path)
        with ShardWriter(tmp_path, facts=facts, part="rank1") as writer:
            writer.add(*features(facts, 0, 2))
        assert len(EmbeddingDataset(tmp_path)) == 2


class TestDamage:
    """What a reader says of a shard that something happened to."""

    def damaged(self, folder: Path, edit) -> Path:
        path = folder / "shard_00001.safetensors"
        data = bytearray(path.read_bytes())
        edit(data)
        path.write_bytes(data)
        return folder

    def test_truncated(self, make_dataset):
        folder = self.damaged(make_dataset(), lambda data: data.__delitem__(slice(700, None)))
        with pytest.raises(
            ValueError, match=r"shard_00001.safetensors: expected 1568 bytes, got 700"
        ):
            EmbeddingDataset(folder)
        with pytest.raises(ValueError, match="expected 1568 bytes, got 700: truncated"):
            Shard(folder / "shard_00001.safetensors")

    def test_one_flipped_bit_is_seen_when_asked_for(self, make_dataset):
        folder = self.damaged(make_dataset(), lambda data: data.__setitem__(900, data[900] ^ 1))
        EmbeddingDataset(folder)
        with pytest.raises(
            ValueError, match=r"shard_00001.safetensors: corrupted or replaced: expected SHA-256"
        ):
            EmbeddingDataset(folder, verify=True)

    def test_a_nan_on_disk_is_named_with_shard_row_and_key(self, make_dataset):
        # Row 2 of eva: 512 bytes of header, 96 bytes a row.
        folder = self.damaged(
            make_dataset(), lambda d: d.__setitem__(slice(704, 708), b"\0\0\xc0\x7f")
        )
        dataset = EmbeddingDataset(folder)
        with pytest.raises(ValueError, match=r"shard_00001.*: row 2 \(key 'key8'\): eva holds NaN"):
            dataset.read([7, 8])
        with pytest.raises(ValueError, match="holds NaN"):  # and again: it is not marked as checked
            dataset.read([8])
        assert dataset.read([7, 9]).keys == ("key7", "key9")

    def test_another_shard_of_the_same_size(self, make_dataset):
        folder = make_dataset()
        other = make_dataset(name="other", eva_width=5, clip_width=6)
        name = "shard_00000.safetensors"
        (folder / name).write_bytes((other / name).read_bytes())
        with pytest.raises(ValueError, match=r"shard_00000.*expected .*4, 6, 5.*got .*4, 5, 6"):
            EmbeddingDataset(folder)

    def test_missing(self, make_dataset):
        folder = make_dataset()
        (folder / "shard_00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"shard_00002.*the data set is incomplete"):
            EmbeddingDataset(folder)

    def test_sidecar_missing(self, make_dataset):
        folder = make_dataset()
        (folder / "shard_00002.jsonl").unlink()
        with pytest.raises(FileNotFoundError, match="no such sidecar; expected 6 records"):
            EmbeddingDataset(folder)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda lines: lines[:-1], "expected 6 records, got 5"),
            (lambda lines: [*lines[:-1], lines[-1][:-1]], "expected 6 records, got 5"),
            (lambda lines: [], "expected 6 records, got 0"),
            (lambda lines: [b"{\n", *lines[1:]], "row 0: corrupted record"),
            (lambda lines: [b'{"key": "a", "capton": ""}\n', *lines[1:]], "unknown key 'capton'"),
            (lambda lines: [b'{"caption": "a"}\n', *lines[1:]], "expected a key, got None"),
            (lambda lines: [b"[]\n", *lines[1:]], "expected a JSON object, got list"),
        ],
    )
    def test_sidecar_damaged(self, make_dataset, edit, message):
        folder = make_dataset()
        path = folder / "shard_00001.jsonl"
        path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
        with pytest.raises(ValueError, match=message) as caught:
            EmbeddingDataset(folder)
        assert "shard_00001.jsonl" in str(caught.value)

    def test_a_sidecar_that_was_replaced_is_seen_when_asked_for(self, make_dataset):
        folder = make_dataset()
        path = folder / "shard_00001.jsonl"
        path.write_bytes(path.read_bytes().replace(b"photo3", b"photo9"))
        with pytest.raises(ValueError, match=r"shard_00001.jsonl: corrupted"):
            EmbeddingDataset(folder, verify=True)


def file_operations(monkeypatch, before):
    """Call ``before()`` ahead of everything a writer does to the disk."""

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    wrap(atomic.PendingFile, "__init__")
    wrap(atomic.os, "fsync")
    wrap(Path, "replace")
    write = atomic.PendingFile.write

    def wrapped_write(self, data, offset=None):
        view = memoryview(data).cast("B")
        if offset is not None:
            self.file.seek(offset)
        write(self, view[: len(view) // 2])  # a write that dies half-way
        self.file.flush()
        before()
        write(self, view[len(view) // 2 :])

    monkeypatch.setattr(atomic.PendingFile, "write", wrapped_write)


SAMPLES = 8  # two shards, the second one short


def count_operations(folder, facts, features):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        file_operations(patch, lambda: calls.append(1))
        write(folder, facts, features, SAMPLES)
    return len(calls)


def test_sigkill_at_every_operation_leaves_nothing_that_a_reader_accepts(tmp_path, facts, features):
    total = count_operations(tmp_path / "clean", facts, features)
    clean = contents(tmp_path / "clean")
    assert total > 25
    for survived in range(total):
        folder = tmp_path / f"killed{survived}"
        child = os.fork()
        if child == 0:
            left = survived
            patch = pytest.MonkeyPatch()

            def die():
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            file_operations(patch, die)
            write(folder, facts, features, SAMPLES)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        if (folder / "manifest.json").exists():  # killed after the last rename
            assert len(EmbeddingDataset(folder, verify=True)) == SAMPLES
        else:
            with pytest.raises(FileNotFoundError, match="no manifest"):
                EmbeddingDataset(folder)
        write(folder, facts, features, SAMPLES, resume=True)
        assert contents(folder) == clean


def test_a_full_disk_at_every_operation_leaves_nothing_that_a_reader_accepts(
    tmp_path, facts, features
):
    total = count_operations(tmp_path / "clean", facts, features)
    clean = contents(tmp_path / "clean")
    for survived in range(total):
        folder = tmp_path / f"full{survived}"
        left = survived

        def fail():
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            file_operations(patch, fail)
            with pytest.raises(OSError, match="No space left on device"):
                write(folder, facts, features, SAMPLES)
        if folder.exists():
            assert not list(folder.glob(".*")), "temporary files stay behind"
            if not (folder / "manifest.json").exists():
                with pytest.raises(FileNotFoundError, match="no manifest"):
                    EmbeddingDataset(folder)
        write(folder, facts, features, SAMPLES, resume=True)
        assert contents(folder) == clean


def test_a_limit_of_the_system_is_reported_by_file(tmp_path, facts, features):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write(tmp_path / "new", facts, features)
        except OSError as error:
            clean = "shard_00000.safetensors" in str(error) and not (tmp_path / "new").exists()
            os._exit(7 if clean else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
