import json

import pytest

from blip3o_fast.data.manifest import Encoder, Manifest, ShardEntry, Split, entry_path

DIGEST = "0" * 64


def manifest(**changes):
    entry = ShardEntry("shard_00000.safetensors", 2, 4096, DIGEST, DIGEST)
    known = Manifest(
        tokens=5,
        has_cls=True,
        grid=(1, 2, 2),
        eva_width=6,
        clip_width=5,
        dtype="bf16",
        eva_encoder=Encoder("tower", "abc", "last", "224 px"),
        shards=(entry,),
        split=Split(0.2, ("photo1",)),
        notes={"why": ["because"]},
    )
    return known.replace(**changes)


def test_saving_and_loading_keep_every_field(tmp_path):
    manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text())["samples"] == 2


def test_sizes(tmp_path):
    assert manifest().samples == 2
    assert manifest().sample_bytes == 5 * (6 + 5) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 4}, r"tokens: expected 5 for grid \(1, 2, 2\) with CLS, got 4"),
        ({"grid": (2, 2)}, "grid: expected"),
        ({"grid": (0, 2, 2)}, "grid: expected at least 1"),
        ({"dtype": "fp8"}, "dtype: expected fp32, bf16, fp16, got 'fp8'"),
        ({"eva_width": 0, "clip_width": 0}, "at least one present, got 0 and 0"),
        ({"eva_width": -1}, "got -1 and 5"),
        ({"has_cls": 1}, "has_cls: expected true or false, got 1"),
        ({"tokens": True}, "tokens: expected an integer, got True"),
        ({"format_version": 2}, "this library reads 1, got 2"),
        ({"shards": [1]}, "shards: expected"),
        ({"tokns": 5}, "unknown manifest key 'tokns'; did you mean 'tokens'"),
    ],
)
def test_a_contradiction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        manifest(**changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ShardEntry("a.safetensors", 0, 4096, DIGEST, DIGEST), "expected samples, got 0"),
        (ShardEntry("a.safetensors", 99, 4096, DIGEST, DIGEST), "99 samples need more than 10890"),
        (ShardEntry("a.safetensors", 2, 4096, "xyz", DIGEST), "64 hexadecimal digits, got 'xyz'"),
        (
            ShardEntry("a.safetensors", 2.0, 4096, DIGEST, DIGEST),
            "samples: expected an integer, got 2.0",
        ),
    ],
)
def test_an_impossible_entry_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        manifest(shards=(entry,))


def test_one_file_listed_twice():
    entry = manifest().shards[0]
    with pytest.raises(ValueError, match="listed twice"):
        manifest(shards=(entry, entry))


def edited(tmp_path, edit):
    values = json.loads(json.dumps(manifest().to_dict()))
    edit(values)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v.update(samples=3), "samples: expected 2, the sum over the shards, got 3"),
        (lambda v: v.pop("samples"), "samples: expected 2, the sum over the shards, got None"),
        (lambda v: v.update(dtpye="x"), "unknown manifest key 'dtpye'; did you mean 'dtype'"),
        (lambda v: v["shards"][0].update(sha=1), "unknown shards key 'sha'"),
        (lambda v: v["shards"][0].pop("bytes"), "shards: missing bytes"),
        (lambda v: v["split"].update(heldout=1), "unknown split key 'heldout'"),
        (lambda v: v["split"].update(heldout_fraction=1.0), "at least 0 and below 1, got 1.0"),
        (lambda v: v["eva_encoder"].update(nmae=1), "unknown eva_encoder key 'nmae'"),
        (lambda v: v.update(shards={}), "shards: expected"),
        (lambda v: v.update(format_version=7, new_key=1), "this library reads 1, got 7"),
        (lambda v: v.update(shards=[], samples=0), "at least one shard, got none"),
    ],
)
def test_an_edited_manifest_is_refused_by_name(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(edited(tmp_path, edit))
    assert "manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"tokens": 1}'])
def test_what_is_no_manifest_at_all(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../shard.safetensors",
        "a/../../shard.safetensors",
        "/etc/shard.safetensors",
        "./shard.safetensors",
        "a//shard.safetensors",
        "..\\shard.safetensors",
        "C:shard.safetensors",
        "shard\0.safetensors",
        "",
        "passwd",
    ],
)
def test_an_entry_cannot_leave_the_folder(tmp_path, name):
    folder = edited(tmp_path, lambda v: v["shards"][0].update(file=name))
    with pytest.raises(ValueError, match=r"expected a \.safetensors file name relative to"):
        Manifest.load(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".jsonl"])
def test_a_link_cannot_leave_the_folder(tmp_path, suffix):
    folder = tmp_path / "inside"
    folder.mkdir()
    outside = tmp_path / "secret"
    outside.write_bytes(b"x")
    (folder / "shard_00000").with_suffix(suffix).symlink_to(outside)
    manifest().save(folder)
    with pytest.raises(ValueError, match="is a link that leads out of"):
        Manifest.load(folder)


def test_a_folder_below_is_inside(tmp_path):
    (tmp_path / "part").mkdir()
    entry = ShardEntry("part/a.safetensors", 2, 4096, DIGEST, DIGEST)
    assert entry_path(tmp_path, entry) == tmp_path / "part" / "a.safetensors"


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        (None, "does not exist"),
        ("manifest.part-0.json", "unfinished"),
        ("embeddings_shard_00000_patch_only.pkl", "blip3o-fast convert"),
        ("photo.jpg", "blip3o-fast extract"),
    ],
)
def test_a_folder_without_a_manifest_says_what_to_do(tmp_path, file, hint):
    folder = tmp_path / "data"
    if file is not None:
        folder.mkdir()
        (folder / file).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=hint):
        Manifest.load(folder)


def test_differing_facts_are_named():
    with pytest.raises(ValueError, match=r"there: differs in .*dtype: expected bf16, got fp16"):
        manifest().require_facts(manifest(dtype="fp16"), "there:")
