"""A path is a path, and a repository says so."""

import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from small_data import small_model, write_shards

from blip3o_fast import BLIP3oDiT
from blip3o_fast.cli.main import main
from blip3o_fast.extraction.encoders import clip_tower, eva_tower
from blip3o_fast.hub import download, repository, typed


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What is downloaded; the hub holds a small model, and the present folder nothing."""
    from transformers import CLIPVisionModel  # imported before the hub is replaced

    assert CLIPVisionModel
    small_model().save_pretrained(tmp_path / "hub")
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision))
        return str(tmp_path / "hub")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return calls


def test_names():
    assert typed("a/b") == Path("a/b") and typed("hf:a/b") == "hf:a/b"
    assert repository(Path("a/b")) is None and repository("hf:a/b") == "a/b"
    for text in ("a", "/a/b", "a/b/c", "../b", ""):
        assert repository(text) is None
    for text in ("hf:a", "hf:../b", "hf:a/b/c", "hf:"):
        with pytest.raises(ValueError, match="expected hf:owner/name"):
            repository(text)


def test_a_bare_name_is_looked_for_on_the_disk_first(asked, caplog):
    caplog.set_level(logging.INFO)
    BLIP3oDiT.from_pretrained("owner/model", revision="v1")
    assert asked == [("owner/model", "v1")]
    assert "taking the hub's repository hf:owner/model" in caplog.text
    small_model(rope_theta=7.0).save_pretrained("owner/model")
    assert BLIP3oDiT.from_pretrained("owner/model").config.rope_theta == 7.0
    assert len(asked) == 1 and "taken from the disk" in caplog.text
    assert BLIP3oDiT.from_pretrained("hf:owner/model").config.rope_theta != 7.0
    with pytest.raises(FileNotFoundError, match="hf:owner/name"):
        BLIP3oDiT.from_pretrained(Path("owner/absent"))
    assert len(asked) == 2


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_command_downloads_only_what_says_so(asked, capsys, command):
    write_shards(Path("shards"))
    words = [command, "--embeddings_dir", "shards", "--output_dir", "out", "--device", "cpu"]
    words += ["--num_inference_steps", "1", *(["--no_plots"] if command == "evaluate" else [])]
    assert main([*words, "--model_path", "owner/model"]) == 1
    assert "owner/model: expected a checkpoint folder" in capsys.readouterr().err
    assert asked == []
    assert main([*words, "--model_path", "hf:owner/model", "--revision", "abc"]) == 0
    assert asked == [("owner/model", "abc")]


@pytest.mark.parametrize("tower", [eva_tower, clip_tower])
def test_towers(asked, tower):
    with pytest.raises(FileNotFoundError, match="hub id hf:owner/name"):
        tower(Path("owner/tower"))
    assert asked == []
    for given in ("hf:owner/tower", "owner/tower"):
        with pytest.raises(ValueError):  # the hub holds something else
            tower(given, revision="v1", dtype=torch.float32)
        assert asked.pop(0) == ("owner/tower", "v1")
        asked.clear()


def test_extract_takes_a_path_for_a_path(asked, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    words = ["extract", "--images", str(folder), "--output_dir", "out", "--device", "cpu"]
    assert main([*words, "--clip_path", "owner/tower"]) == 1
    assert "owner/tower: expected a folder of weights" in capsys.readouterr().err
    assert asked == []


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route\nto host")

    hub = types.SimpleNamespace(snapshot_download=unreachable)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(OSError, match=r"(?s)^hf:owner/x: .*ConnectionError: no route.* a folder"):
        download("owner/x", None, ["*"], "hub")
