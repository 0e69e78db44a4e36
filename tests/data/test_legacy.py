"""Published shards and COCO files, with every quirk that they are known to have."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from hostile import within
from published_files import (
    coco_content,
    coco_entry,
    shard_content,
    shard_path,
    towers,
    write_pickle,
)

from blip3o_fast.data.legacy import published_files, read_published
from blip3o_fast.data.sidecar import SampleRecord


def source_of(tmp_path, content, protocol=4):
    return read_published(write_pickle(tmp_path / "file.pkl", content, protocol))


def all_rows(source):
    return tuple(x.rows(0, x.shape[0]) for x in (source.eva, source.clip))


def as_fp16(x):
    return x.half()


def as_numpy(x):
    return x.numpy()


def as_fp16_numpy(x):
    return x.half().numpy()


def as_list_of_tensors(x):
    return list(x)


def as_list_of_arrays(x):
    return list(x.numpy())


def as_numbers(x):
    return x.tolist()


def as_two_dimensions(x):
    return x.flatten(0, 1)


def as_a_cut_of_more_tokens(x):
    return torch.cat((x[:, :1], x), dim=1)[:, 1:]


FORMS = [
    torch.Tensor.clone,
    as_fp16,
    as_numpy,
    as_fp16_numpy,
    as_list_of_tensors,
    as_list_of_arrays,
    as_numbers,
    as_two_dimensions,
    as_a_cut_of_more_tokens,
]


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("tokens", [256, 257])
@pytest.mark.parametrize("form", FORMS)
def test_embeddings_of_every_kind_are_read_exactly(tmp_path, form, tokens, protocol):
    eva, clip = towers(3, tokens)
    content = shard_content(
        3, tokens, eva_blip3o_embeddings=form(eva), clip_blip3o_embeddings=form(clip)
    )
    source = source_of(tmp_path, content, protocol)
    for x, y in zip((eva, clip), all_rows(source), strict=True):
        assert torch.equal(y.float(), x)
    assert source.has_cls == (tokens == 257) and source.remarks == ()
    assert torch.equal(source.eva.rows(1, 2).float(), eva[1:2])


def test_what_a_shard_says_of_itself(tmp_path):
    source = source_of(tmp_path, shard_content(2, seed=3))
    assert source.records == [
        SampleRecord("000030000", "caption 3-0"),
        SampleRecord("000030001", "caption 3-1"),
    ]
    assert source.eva_encoder.name == "BAAI/EVA-CLIP-8B"
    assert source.clip_encoder.name == "openai/clip-vit-large-patch14"
    assert "before post_layernorm" in source.clip_encoder.layer
    assert not source.same_key_same_image


@pytest.mark.parametrize("keys", [None, [], ["a", None]])
def test_samples_without_keys_are_numbered(tmp_path, keys):
    source = source_of(tmp_path, shard_content(2, keys=keys))
    first = keys[0] if keys else "file_sample_00000"
    assert [r.key for r in source.records] == [first, "file_sample_00001"]


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"keys": ["a"]}, "1 keys for 3 samples; samples are numbered instead"),
        ({"captions": ["a"]}, "1 captions for 3 samples; the rest is cut or empty"),
        ({"captions": list("abcde")}, "5 captions for 3 samples"),
        ({"config": {"include_cls": True}}, "config says include_cls=True, the tensors have 256"),
    ],
)
def test_a_shard_that_contradicts_itself_is_told(tmp_path, changes, remark):
    source = source_of(tmp_path, shard_content(3, **changes))
    assert len(source.records) == 3 and not source.has_cls
    assert any(remark in line for line in source.remarks)
    assert torch.equal(all_rows(source)[0], towers(3)[0])


@pytest.mark.parametrize("config", [None, "words", {}, {"include_cls": "yes"}, {"eva_model": 3}])
def test_the_config_may_be_absent_or_odd(tmp_path, config):
    source = source_of(tmp_path, shard_content(2, config=config))
    assert source.has_cls is False and source.eva_encoder.name == "BAAI/EVA-CLIP-8B"


def test_coco(tmp_path):
    source = source_of(tmp_path, coco_content(5, seed=2))
    assert source.records[1] == SampleRecord("coco_201", "about 201", "000000000201.jpg")
    assert source.same_key_same_image and source.remarks == ()
    assert torch.equal(all_rows(source)[1], towers(5, seed=2)[1])


def test_coco_in_two_dimensions_is_cut_by_its_metadata(tmp_path):
    eva, clip = (x.flatten(0, 1).numpy() for x in towers(6))
    source = source_of(tmp_path, coco_content(6, eva_embeddings=eva, clip_embeddings=clip))
    assert torch.equal(all_rows(source)[0], towers(6)[0])


@pytest.mark.parametrize("flat", [False, True])
def test_metadata_extended_within_the_loop(tmp_path, flat):
    """One older extractor appended a batch's entries again for each of its samples."""
    metadata = []
    for batch, size in enumerate((4, 4, 2)):
        entries = [coco_entry(10 * batch + i, batch, i) for i in range(size)]
        metadata += entries * size
    eva, clip = towers(10)
    if flat:
        eva, clip = eva.flatten(0, 1), clip.flatten(0, 1)
    content = coco_content(10, metadata=metadata, eva_embeddings=eva, clip_embeddings=clip)
    source = source_of(tmp_path, content)
    expected = [10 * batch + i for batch, size in enumerate((4, 4, 2)) for i in range(size)]
    assert [r.key for r in source.records] == [f"coco_{image}" for image in expected]
    assert source.remarks == ("metadata repeats itself: 36 entries, 10 distinct",)
    assert torch.equal(all_rows(source)[0], towers(10)[0])


def test_a_consolidated_file_may_repeat_its_pairs(tmp_path):
    """Batches numbered anew by a second run: as many entries as samples, so all are meant."""
    metadata = [coco_entry(i, 0, i % 3) for i in range(6)]
    source = source_of(tmp_path, coco_content(6, metadata=metadata))
    assert [r.key for r in source.records] == [f"coco_{i}" for i in range(6)]
    assert source.remarks == ()


def test_metadata_of_other_kinds(tmp_path):
    metadata = ["a cat", None, {"caption": "a dog"}, {"image_id": "x7", "file_name": None}]
    source = source_of(tmp_path, coco_content(6, metadata=metadata))
    assert source.records == [
        SampleRecord("file_sample_00000", "a cat"),
        SampleRecord("file_sample_00001"),
        SampleRecord("file_sample_00002", "a dog"),
        SampleRecord("coco_x7"),
        SampleRecord("file_sample_00004"),
        SampleRecord("file_sample_00005"),
    ]
    assert source.remarks == ("4 metadata for 6 samples; the rest is cut or unnamed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1}, r"file\.pkl: expected a published shard .* got \{'weights': 1\}"),
        ([1, 2], r"file\.pkl: expected a published shard"),
        (shard_content(2, captions=None), "missing 'captions'"),
        (shard_content(2, clip_blip3o_embeddings=None), "missing 'clip_blip3o_embeddings'"),
        (coco_content(2, metadata=None), "missing 'metadata'"),
        (shard_content(2, captions="ab"), "captions: expected a list, got 'ab'"),
        (shard_content(2, captions=["a", []]), r"captions: expected text, got \[\]"),
        (shard_content(2, eva_blip3o_embeddings=None), "missing 'eva_blip3o_embeddings'"),
        (shard_content(2, eva_blip3o_embeddings=7), "expected embeddings, got 7"),
        (shard_content(2, eva_blip3o_embeddings=[]), r"expected embeddings, got \[\]"),
        (shard_content(2, eva_blip3o_embeddings=[[1], [2, 3]]), "nested lists of numbers"),
        (shard_content(2, eva_blip3o_embeddings=[[10**400]]), "nested lists of numbers"),
        (shard_content(2, eva_blip3o_embeddings=["a", "b"]), "nested lists of numbers"),
        (
            shard_content(2, eva_blip3o_embeddings=np.zeros((2, 256, 3), np.int64)),
            "expected floating point, got <i8",
        ),
        (shard_content(2, eva_blip3o_embeddings=torch.zeros(2, 257, 3)), "257.* and .*256"),
        (shard_content(2, eva_blip3o_embeddings=torch.zeros(3, 256, 3)), "3, 256.* and .*2, 256"),
        (shard_content(2, eva_blip3o_embeddings=torch.zeros(2, 256, 3, 1)), r"\[2, 256, 3, 1\]"),
        (shard_content(2, eva_blip3o_embeddings=torch.zeros(501, 3)), "501 rows of tokens do not"),
        (
            shard_content(
                0,
                eva_blip3o_embeddings=torch.zeros(0, 256, 3),
                clip_blip3o_embeddings=torch.zeros(0, 256, 3),
            ),
            "expected samples",
        ),
        (
            shard_content(2, eva_blip3o_embeddings=[torch.zeros(256, 3), torch.zeros(255, 3)]),
            "sample 1: expected .256, 3",
        ),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        source_of(tmp_path, content)


def test_unhashable_pairs_in_metadata_are_no_pairs(tmp_path):
    metadata = [{**coco_entry(i, 0, i), "batch_idx": [0]} for i in range(3)]
    source = source_of(tmp_path, coco_content(3, metadata=metadata))
    assert [r.key for r in source.records] == ["coco_0", "coco_1", "coco_2"]


class TestFolders:
    def touch(self, folder, *names):
        for name in names:
            (folder / name).touch()

    def names(self, folder, mode=None):
        return [path.name for path in published_files(folder, mode)]

    def test_shards_come_in_the_order_of_their_numbers(self, tmp_path):
        self.touch(tmp_path, *(shard_path(tmp_path, i).name for i in (10, 9, 100_000, 0)))
        assert self.names(tmp_path) == [
            "embeddings_shard_00000_patch_only.pkl",
            "embeddings_shard_00009_patch_only.pkl",
            "embeddings_shard_00010_patch_only.pkl",
            "embeddings_shard_100000_patch_only.pkl",
        ]

    def test_numbers_without_zeros_in_front(self, tmp_path):
        self.touch(tmp_path, "embeddings_shard_10.pkl", "embeddings_shard_9.pkl")
        assert self.names(tmp_path) == ["embeddings_shard_9.pkl", "embeddings_shard_10.pkl"]

    def test_one_mode_is_chosen_and_two_are_ambiguous(self, tmp_path):
        patch, cls = shard_path(tmp_path, 0).name, shard_path(tmp_path, 0, 257).name
        self.touch(tmp_path, patch, cls, "embeddings_shard_00001.pkl")
        assert self.names(tmp_path, "patch_only") == [patch]
        assert self.names(tmp_path, "cls_patch") == [cls]
        with pytest.raises(ValueError, match="patch_only and cls_patch shards; choose a training"):
            published_files(tmp_path)

    def test_the_other_mode_is_never_taken_for_a_file_without_one(self, tmp_path):
        self.touch(tmp_path, "embeddings_shard_00000_cls_patch.pkl", "embeddings_shard_00000.pkl")
        assert self.names(tmp_path, "patch_only") == ["embeddings_shard_00000.pkl"]

    def test_names_of_other_kinds(self, tmp_path):
        self.touch(tmp_path, "b2.pkl", "b10.pkl", "notes.txt", "embeddings_manifest.json")
        assert self.names(tmp_path) == ["b2.pkl", "b10.pkl"]

    def test_coco_batches_by_number_and_the_final_one_last(self, tmp_path):
        numbers = (50, 100, 150)
        self.touch(tmp_path, "coco_embeddings_final.pkl", "other.pkl")
        self.touch(tmp_path, *(f"coco_embeddings_batch_{k}.pkl" for k in numbers))
        assert self.names(tmp_path) == [
            *(f"coco_embeddings_batch_{k}.pkl" for k in numbers),
            "coco_embeddings_final.pkl",
        ]

    def test_a_consolidated_file_holds_all_others(self, tmp_path):
        self.touch(tmp_path, "coco_embeddings_batch_50.pkl", "coco_embeddings_consolidated.pkl")
        assert self.names(tmp_path) == ["coco_embeddings_consolidated.pkl"]

    @pytest.mark.parametrize("mode", [None, "patch_only"])
    def test_nothing_there(self, tmp_path, mode):
        with pytest.raises(FileNotFoundError, match=r"expected published pickles \(\*.pkl\)"):
            published_files(tmp_path, mode)


def shared_lists(count, levels):
    """Nested lists of ``count ** levels`` numbers, whose parts are shared."""
    value = [1.0] * count
    for _ in range(levels - 1):
        value = [value] * count
    return value


def list_in_itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "embeddings",
    [
        *(shared_lists(100, 4), shared_lists(1000, 3), list_in_itself(), shared_lists(2, 200)),
        [torch.zeros(256, 12)] * 100_000,
    ],
    ids=["10^8", "10^9", "in itself", "deep", "one tensor"],
)
def test_lists_that_expand_to_more_than_their_file(tmp_path, embeddings):
    content = shard_content(2, eva_blip3o_embeddings=embeddings)
    path = write_pickle(tmp_path / "x.pkl", content)
    with within(seconds=5, megabytes=100), pytest.raises(ValueError, match=r"x\.pkl: "):
        read_published(path)


@pytest.mark.parametrize("place", ["metadata", "config"])
def test_keys_of_one_hash(tmp_path, place):
    """Integers that are equal modulo Python's prime: each finds all others in its place."""
    prime = (1 << 61) - 1
    if place == "config":
        changes = {"config": {prime * i: None for i in range(1, 300)}}
    else:
        entries = [{"batch_idx": prime * i, "sample_idx": 0} for i in range(1, 20_000)]
        changes = {"metadata": entries}
    path = write_pickle(tmp_path / "coco.pkl", coco_content(2, **changes))
    with within(seconds=5, megabytes=100):
        assert read_published(path).eva.shape[0] == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(64), "expected a pickle, got a zip archive"),
        (gzip.compress(pickle.dumps({}), mtime=0), "got a gzip file; unpack it first"),
        (pickle.dumps(shard_content(1), protocol=2), "got bytes of protocol 2"),
        (pickle.dumps("[" * 2000), "expected a published shard"),
    ],
    ids=["zip", "gzip", "protocol2", "text"],
)
def test_messages_that_say_what_to_do(tmp_path, data, message):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.pkl: .*{message}") as caught:
        read_published(tmp_path / "x.pkl")
    assert "\n" not in str(caught.value)
