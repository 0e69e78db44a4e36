"""Other formats to shards: lossless, streamed, resumed, verified."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from published_files import (
    CLIP_WIDTH,
    EVA_WIDTH,
    coco_content,
    coco_entry,
    shard_content,
    shard_path,
    towers,
    write_pickle,
)

from blip3o_fast.atomic import file_sha256
from blip3o_fast.data import EmbeddingDataset, Manifest, Wishes, convert
from blip3o_fast.data import conversion as conversion_module
from blip3o_fast.data.conversion import fp16_is_exact, verify_conversion, write_planned
from blip3o_fast.data.conversion_plan import open_sources, plan_conversion


def write_shards(folder, *seeds, samples=5, tokens=256, **changes):
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        content = shard_content(samples, tokens, seed, **changes)
        write_pickle(shard_path(folder, seed, tokens), content)
    return folder


def plan_of(path, **wishes):
    return plan_conversion(open_sources(path), Wishes(**wishes))


def everything(folder):
    dataset = EmbeddingDataset(folder, verify=True)
    batch = dataset.read(range(len(dataset)))
    return batch.eva, batch.clip, list(batch.keys)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_published_shards_convert_losslessly(tmp_path):
    source = write_shards(tmp_path / "pub", 0, 2, 10)
    outcome = convert(source, tmp_path / "out", samples_per_shard=4)
    assert (outcome.written, outcome.done, outcome.skipped) == (15, 0, [])
    eva, clip, keys = everything(tmp_path / "out")
    expected = [towers(5, seed=seed) for seed in (0, 2, 10)]
    assert torch.equal(eva, torch.cat([x for x, _ in expected]))
    assert torch.equal(clip, torch.cat([x for _, x in expected]))
    assert keys == [f"{seed:05d}{i:04d}" for seed in (0, 2, 10) for i in range(5)]
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.tokens, manifest.has_cls, manifest.grid) == (256, False, (1, 16, 16))
    assert (manifest.eva_width, manifest.clip_width) == (EVA_WIDTH, CLIP_WIDTH)
    assert manifest.dtype == "fp32" and manifest.eva_encoder.name == "BAAI/EVA-CLIP-8B"
    assert [entry.samples for entry in manifest.shards] == [4, 4, 4, 3]
    assert manifest.notes["converted_from"] == [shard_path(source, i).name for i in (0, 2, 10)]
    assert manifest.notes["skipped_rows"] == []
    assert EmbeddingDataset(tmp_path / "out").records([6])[0].caption == "caption 2-1"


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_the_dtype_is_kept_or_chosen(tmp_path, stored):
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[stored]
    eva, clip = (x.to(torch_dtype) for x in towers(3))
    content = shard_content(3, eva_blip3o_embeddings=eva, clip_blip3o_embeddings=clip)
    path = write_pickle(tmp_path / "x.pkl", content)
    convert(path, tmp_path / "kept")
    assert Manifest.load(tmp_path / "kept").dtype == stored
    assert torch.equal(everything(tmp_path / "kept")[0], eva)
    convert(path, tmp_path / "chosen", Wishes(dtype="fp16"))
    assert torch.equal(everything(tmp_path / "chosen")[1], clip.half())


def test_double_precision_is_stored_as_single(tmp_path):
    np.save(tmp_path / "eva.npy", np.random.default_rng(0).standard_normal((2, 4, 3)))
    convert(tmp_path, tmp_path / "out")
    assert Manifest.load(tmp_path / "out").dtype == "fp32"


def test_fp16_values_are_recognised(tmp_path):
    exact = write_pickle(tmp_path / "a.pkl", shard_content(3))
    assert fp16_is_exact(plan_of(exact))
    inexact = shard_content(3, clip_blip3o_embeddings=torch.randn(3, 256, CLIP_WIDTH))
    assert not fp16_is_exact(plan_of(write_pickle(tmp_path / "b.pkl", inexact)))


def test_cls_is_dropped_or_replaced_on_request_and_recorded(tmp_path):
    with_cls = write_shards(tmp_path / "257", 0, tokens=257)
    convert(with_cls, tmp_path / "as it is")
    manifest = Manifest.load(tmp_path / "as it is")
    assert (manifest.tokens, manifest.has_cls, manifest.notes.get("cls")) == (257, True, None)
    convert(with_cls, tmp_path / "dropped", Wishes(tokens=256))
    assert torch.equal(everything(tmp_path / "dropped")[0], towers(5, 257)[0][:, 1:])
    assert not Manifest.load(tmp_path / "dropped").has_cls

    without = write_shards(tmp_path / "256", 0)
    convert(without, tmp_path / "mean", Wishes(tokens=257))
    eva, clip, _ = everything(tmp_path / "mean")
    for x, y in zip(towers(5), (eva, clip), strict=True):
        assert torch.equal(y[:, 1:], x)
        torch.testing.assert_close(y[:, 0], x.double().mean(1).float())
    manifest = Manifest.load(tmp_path / "mean")
    assert manifest.has_cls and manifest.notes["cls"] == "token_mean"
    assert EmbeddingDataset(tmp_path / "mean").cls == "token_mean"
    assert any("token 0 is the mean" in remark for remark in manifest.notes["remarks"])


def test_sources_that_differ_need_a_choice(tmp_path):
    for seed, tokens in ((0, 256), (1, 257)):
        write_pickle(tmp_path / f"b{seed}.pkl", shard_content(2, tokens, seed))
    with pytest.raises(ValueError, match=r"differ in \(tokens, CLS\): .*choose tokens"):
        plan_of(tmp_path)
    convert(tmp_path, tmp_path / "out", Wishes(tokens=256))
    assert torch.equal(everything(tmp_path / "out")[0][2:], towers(2, 257, 1)[0][:, 1:])


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"tokens": 255}, "tokens: expected 256 or 257, got 255"),
        ({"tokens": 300}, "tokens: expected 256 or 257, got 300"),
        ({"grid": (1, 10, 10)}, "tokens: expected 100 for grid"),
        ({"dtype": "fp8"}, "dtype: expected fp32, bf16, fp16"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
    ],
)
def test_wishes_that_cannot_be_granted(tmp_path, wishes, message):
    source = write_shards(tmp_path / "pub", 0)
    with pytest.raises(ValueError, match=message):
        plan_of(source, **wishes)


def test_widths_must_agree(tmp_path):
    write_pickle(tmp_path / "b0.pkl", shard_content(2))
    other = shard_content(2, eva_blip3o_embeddings=torch.zeros(2, 256, 3))
    write_pickle(tmp_path / "b1.pkl", other)
    with pytest.raises(
        ValueError, match=r"b1\.pkl: expected widths .*\(12, 8\) as in b0.*\(3, 8\)"
    ):
        plan_of(tmp_path)


def test_keys_that_occur_again_in_shards_name_other_images(tmp_path):
    source = write_shards(tmp_path / "pub", 0, 1, samples=2, keys=["a", "b"])
    plan = plan_of(source)
    assert "2 keys occurred before; renamed KEY@FILE" in plan.remarks[0]
    convert(source, tmp_path / "out")
    dataset = EmbeddingDataset(tmp_path / "out")
    records = dataset.records(range(4))
    stem = shard_path(source, 1).stem
    assert [r.key for r in records] == ["a", "b", f"a@{stem}", f"b@{stem}"]
    assert [r.photo for r in records] == ["a", "b", "a", "b"]  # one side of the split, to be safe


def test_a_consolidation_run_twice_counts_each_image_once(tmp_path):
    """Its glob matches the earlier consolidated file, so the embeddings are there twice."""
    eva, clip = towers(6)
    metadata = [coco_entry(i, i // 4, i % 4) for i in range(6)]
    content = coco_content(
        eva_embeddings=torch.cat((eva, eva)),
        clip_embeddings=torch.cat((clip, clip)),
        metadata=metadata * 2,
    )
    path = write_pickle(tmp_path / "coco_embeddings_consolidated.pkl", content)
    convert(path, tmp_path / "out")
    out_eva, _, keys = everything(tmp_path / "out")
    assert keys == [f"coco_{i}" for i in range(6)] and torch.equal(out_eva, eva)
    remarks = Manifest.load(tmp_path / "out").notes["remarks"]
    assert any("6 keys occurred before; left out" in remark for remark in remarks)


def test_lexicographic_consolidation_keeps_samples_with_their_records(tmp_path):
    """Batch 100 before batch 50: odd, but metadata and embeddings are shuffled alike."""
    batches = {100: coco_content(2, seed=1), 50: coco_content(2, seed=0)}
    content = coco_content(
        metadata=[entry for b in batches.values() for entry in b["metadata"]],
        eva_embeddings=torch.cat([b["eva_embeddings"] for b in batches.values()]),
        clip_embeddings=torch.cat([b["clip_embeddings"] for b in batches.values()]),
    )
    for entry, pair in zip(content["metadata"], [(0, 0), (0, 1)] * 2, strict=True):
        entry["batch_idx"], entry["sample_idx"] = pair
    write_pickle(tmp_path / "coco_embeddings_consolidated.pkl", content)
    convert(tmp_path, tmp_path / "out")
    eva, _, keys = everything(tmp_path / "out")
    by_key = dict(zip(keys, eva, strict=True))
    for seed in (0, 1):
        for i in range(2):
            assert torch.equal(by_key[f"coco_{100 * seed + i}"], towers(2, seed=seed)[0][i])


def test_black_images_are_reported(tmp_path):
    """Every image that the published extraction could not read has the features of black."""
    eva, clip = towers(6)
    eva[[1, 4]], clip[[1, 4]] = eva[3].clone(), clip[3].clone()
    eva[5, 0], clip[5, 0] = eva[3, 0], clip[3, 0]  # alike in its first token only
    content = coco_content(6, eva_embeddings=eva, clip_embeddings=clip)
    plan = plan_of(write_pickle(tmp_path / "coco.pkl", content))
    write_planned(plan, tmp_path / "out", samples_per_shard=4)
    remarks = verify_conversion(plan, tmp_path / "out")
    assert len(remarks) == 1 and remarks[0].startswith("3 samples have identical features")
    assert remarks[0].endswith("not read: coco_1, coco_3, coco_4")
    assert Manifest.load(tmp_path / "out").notes["identical_features"] == remarks
    EmbeddingDataset(tmp_path / "out", verify=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_rows_that_are_not_finite_are_refused_or_left_out(tmp_path, bad):
    eva, clip = towers(6)
    clip[2, 200, 3] = bad
    path = write_pickle(tmp_path / "s.pkl", shard_content(6, clip_blip3o_embeddings=clip))
    plan = plan_of(path, dtype="fp16")
    message = r"s\.pkl: row 2 \(key '000000002'\): clip holds NaN or Inf, or values beyond"
    with pytest.raises(ValueError, match=message):
        write_planned(plan, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    outcome = write_planned(plan, tmp_path / "out", skip_bad_rows=True)
    assert outcome.skipped == ["s.pkl: row 2 (key '000000002'): clip"]
    out_eva, _, keys = everything(tmp_path / "out")
    assert torch.equal(out_eva, eva[[0, 1, 3, 4, 5]].half()) and "000000002" not in keys
    assert Manifest.load(tmp_path / "out").notes["skipped_rows"] == outcome.skipped


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("block_bytes", [1, 1 << 24])
@pytest.mark.parametrize("after", range(0, 15, 2))
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, after, block_bytes):
    monkeypatch.setattr(conversion_module, "_BLOCK_BYTES", block_bytes)
    source = write_shards(tmp_path / "pub", 0, 1, 2)
    convert(source, tmp_path / "whole", samples_per_shard=4)
    dealt = 0

    def stop(count):
        nonlocal dealt
        dealt += count
        if dealt > after:
            raise Interrupted

    with pytest.raises(Interrupted):
        write_planned(plan_of(source), tmp_path / "out", samples_per_shard=4, progress=stop)
    assert not (tmp_path / "out" / "manifest.json").exists()
    outcome = convert(source, tmp_path / "out", samples_per_shard=4)
    assert outcome.done % 4 == 0 and outcome.done + outcome.written == 15
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    again = convert(source, tmp_path / "out", samples_per_shard=4)
    assert (again.done, again.written) == (15, 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_other_samples_is_refused(tmp_path):
    convert(write_shards(tmp_path / "a", 0), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds 5 samples that the source lacks.*empty folder"):
        convert(write_shards(tmp_path / "b", 1), tmp_path / "out")
    with pytest.raises(ValueError, match="another data set: differs in dtype"):
        convert(tmp_path / "a", tmp_path / "out", Wishes(dtype="fp16"))
    assert contents(tmp_path / "out") == before


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion_module.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ValueError, match="expected 102400 bytes of free space, got 1000"):
        convert(write_shards(tmp_path / "a", 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestVerification:
    def converted(self, tmp_path):
        plan = plan_of(write_shards(tmp_path / "pub", 0, 1))
        write_planned(plan, tmp_path / "out", samples_per_shard=4)
        assert verify_conversion(plan, tmp_path / "out") == []
        return plan, tmp_path / "out"

    @pytest.mark.parametrize("name", ["shard_00001.safetensors", "shard_00001.jsonl"])
    def test_a_flipped_bit(self, tmp_path, name):
        plan, folder = self.converted(tmp_path)
        data = bytearray((folder / name).read_bytes())
        data[-2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: corrupted or replaced: expected SHA-256"):
            verify_conversion(plan, folder)

    def test_rows_that_are_not_those_of_the_source(self, tmp_path):
        """A shard that is whole, and is wrong: the checksum is right, the rows are not."""
        plan, folder = self.converted(tmp_path)
        path = folder / "shard_00001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        manifest = Manifest.load(folder)
        entries = list(manifest.shards)
        entries[1] = type(entries[1])(**{**vars(entries[1]), "sha256": file_sha256(path)})
        manifest.replace(shards=tuple(entries)).save(folder)
        with pytest.raises(ValueError, match=r"row 3: clip of '000010002' differs from row 2 of"):
            verify_conversion(plan, folder)

    def test_as_many_rows_as_asked_for_are_compared(self, tmp_path, monkeypatch):
        plan, folder = self.converted(tmp_path)
        seen = []
        compare = conversion_module._compare
        monkeypatch.setattr(
            conversion_module, "_compare", lambda *args: (seen.append(args[1]), compare(*args))
        )
        verify_conversion(plan, folder, rows=10)
        assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
        seen.clear()
        verify_conversion(plan, folder, rows=1)
        assert len(seen) == 3  # at least one of each shard


def test_memory_does_not_grow_with_the_file(tmp_path):
    """160 MB through a peak that is a fraction of it; the rule is 1.3 times the file's size."""
    samples = 64
    eva, clip = torch.empty(samples, 256, 1920), torch.empty(samples, 256, 512)
    for i in range(samples):
        eva[i], clip[i] = i, -i
    content = shard_content(
        samples,
        eva_blip3o_embeddings=eva,
        clip_blip3o_embeddings=clip,
        keys=None,
        captions=[""] * samples,
    )
    path = write_pickle(tmp_path / "large.pkl", content)
    del eva, clip, content
    code = (
        "import sys, resource; from pathlib import Path\n"
        "from blip3o_fast.data import convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); convert(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=16)\n"
        "print(peak() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 0.8 * path.stat().st_size


def test_npy_pairs_and_tars_convert(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"eva": rng.standard_normal((3, 9, 6)), "clip": rng.standard_normal((3, 9, 5))}
    for name, x in arrays.items():
        np.save(tmp_path / f"{name}.npy", x.astype(np.float16))
    convert(tmp_path, tmp_path / "out")
    assert np.array_equal(everything(tmp_path / "out")[0].numpy(), arrays["eva"].astype(np.float16))
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.grid, manifest.has_cls, manifest.eva_encoder.name) == ((1, 3, 3), False, "")


@pytest.mark.parametrize(
    ("tokens", "grid", "expected"),
    [
        (10, None, ((1, 3, 3), True)),
        (9, None, ((1, 3, 3), False)),
        (2, None, ((1, 1, 1), True)),
        (12, (2, 2, 3), ((2, 2, 3), False)),
        (13, (2, 2, 3), ((2, 2, 3), True)),
    ],
)
def test_the_grid_is_a_square_unless_given(tmp_path, tokens, grid, expected):
    np.save(tmp_path / "eva.npy", np.zeros((1, tokens, 3), np.float32))
    facts = plan_of(tmp_path, grid=grid).facts
    assert (facts.grid, facts.has_cls) == expected


def test_tokens_that_are_no_square(tmp_path):
    np.save(tmp_path / "eva.npy", np.zeros((1, 12, 3), np.float32))
    with pytest.raises(ValueError, match="12 patches are no square; give depth, height and width"):
        plan_of(tmp_path)


def test_names_of_encoders_can_be_given(tmp_path):
    np.save(tmp_path / "eva.npy", np.zeros((1, 4, 3), np.float32))
    facts = plan_of(tmp_path, eva_encoder="ours").facts
    assert facts.eva_encoder.name == "ours" and facts.clip_encoder is None
