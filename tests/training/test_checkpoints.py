"""Folders of a run: whole or not there, pointed to, deleted only when superseded."""

import errno
import hashlib
import json
import random
import shutil

import pytest

from blip3o_fast import load_trained_model
from blip3o_fast.processes import World
from blip3o_fast.training import checkpoints, train

WORLD = World()


def write(run, step, content="x", name="a.txt"):
    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / name).write_text(content)
        (folder / name).write_text(content)

    return checkpoints.write_checkpoint(run, step, fill, WORLD)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_marker_lists_every_file_with_its_size(tmp_path):
    folder = write(tmp_path, 5)
    marker = json.loads((folder / checkpoints.MARKER).read_text())
    digest = hashlib.sha256(b"x").hexdigest()
    assert marker == {
        "format_version": 1,
        "step": 5,
        "files": {"a.txt": 1, "inner/a.txt": 1},
        "sha256": {"a.txt": digest, "inner/a.txt": digest},
    }
    assert checkpoints.is_complete(folder) and names(tmp_path) == ["step_5"]


def test_missing_or_short_files_are_damage(tmp_path):
    (write(tmp_path, 1) / "a.txt").write_text("xx")
    (write(tmp_path, 2) / "inner" / "a.txt").unlink()
    write(tmp_path, 3)
    assert checkpoints.damaged_checkpoints(tmp_path) == ["step_1", "step_2"]
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["step_3"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer.pt"])
def test_a_flipped_bit_is_found(options, name):
    run = options(max_steps=3)
    folder = train(run).folder / "step_3"
    whole = (folder / name).read_bytes()
    chosen = random.Random(0)
    for _ in range(10):
        bad = bytearray(whole)
        bad[chosen.randrange(len(bad))] ^= 1 << chosen.randrange(8)
        (folder / name).write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{name}: damaged: expected SHA-256.*step_3"):
            train(run)
        if name != "trainer.pt":  # which a model is loaded without
            with pytest.raises(ValueError, match=rf"{name}: damaged"):
                load_trained_model(folder)
    (folder / name).write_bytes(whole)
    assert train(run).steps == 3


def test_a_run_whose_folder_is_deleted_fails(options):
    run = options()

    def delete(record):
        if record.step == 3:
            shutil.rmtree(run.output_dir)

    with pytest.raises(OSError, match=r"cannot write .*step_3: .*No such file or directory"):
        train(run, on_step=delete)


def test_newest_is_by_number(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "step_x").mkdir()
    found = [path.name for path in checkpoints.complete_checkpoints(tmp_path)]
    assert found == ["step_100", "step_10", "step_9"]


def test_a_complete_checkpoint_is_not_written_again(tmp_path):
    write(tmp_path, 1, "first")
    write(tmp_path, 1, "second")
    assert (tmp_path / "step_1" / "a.txt").read_text() == "first"


def test_a_failed_write_leaves_no_trace(tmp_path):
    write(tmp_path, 1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*step_2: .*No space.*as they were"):
        checkpoints.write_checkpoint(tmp_path, 2, fail, WORLD)
    assert names(tmp_path) == ["step_1"]


def test_what_an_interruption_left_is_deleted(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / checkpoints.MARKER).unlink()
    (tmp_path / ".step_3.partial").mkdir()
    (tmp_path / "step_by_step").mkdir()
    checkpoints.delete_unfinished(tmp_path)
    assert names(tmp_path) == ["step_1", "step_by_step"]


def test_pointers(tmp_path):
    assert checkpoints.pointed(tmp_path, "best") is None
    checkpoints.point(tmp_path, "best", write(tmp_path, 7))
    assert (tmp_path / "best").read_text() == "step_7\n"
    assert checkpoints.pointed(tmp_path, "best") == tmp_path / "step_7"
    (tmp_path / "best").write_text("../elsewhere\n")
    assert checkpoints.pointed(tmp_path, "best") is None


def test_only_superseded_ones_are_deleted(tmp_path):
    folders = {step: write(tmp_path, step) for step in range(1, 7)}
    checkpoints.delete_superseded(tmp_path, 2, [folders[3], None])
    assert names(tmp_path) == ["step_3", "step_5", "step_6"]


def test_a_run_keeps_best_last_and_periodic_ones(options):
    run = options(max_steps=20, save_every_n_steps=2, keep_last=2, eval_every_n_steps=5)
    result = train(run)
    best = result.best.step
    kept = {path.name for path in result.folder.glob("step_*")}
    assert kept == {"step_18", "step_20", f"step_{best}"}
    assert (result.folder / "latest").read_text() == "step_20\n"
    assert (result.folder / "best").read_text() == f"step_{best}\n"
    chosen = max(result.validations, key=lambda record: record["token_cosine"])
    assert chosen["step"] == best
    loaded = load_trained_model(result.folder)
    expected = load_trained_model(result.folder / f"step_{best}")
    assert all(map(lambda a, b: a.equal(b), loaded.parameters(), expected.parameters()))
    saved = json.loads((result.folder / "options.json").read_text())
    assert saved["options"] == run.to_dict() and saved["plan"]["steps"] == 20
