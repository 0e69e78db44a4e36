"""The examples, run as a user runs them: interrupted at each stage, the report is the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {
    # What shows that the stage is under way, and has something to lose.
    "extract": lambda folder, log: any((folder / "shards").glob("shard_*.safetensors")),
    "train": lambda folder, log: (folder / "run/step_2/COMPLETE").exists(),
    "evaluate": lambda folder, log: "4 evaluations" in log,
}


def environment():
    paths = [str(ROOT), str(ROOT / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["lite_photos", "clip_eva_coco"])
def test_help_is_the_documentation(name):
    words = [sys.executable, ROOT / "examples" / f"{name}.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"python examples/{name}.py" in done.stdout and "--output_dir" in done.stdout


def test_every_option_exists(monkeypatch, tmp_path):
    """The commands that the examples give, parsed as they would be and not run."""
    import importlib
    import runpy

    from blip3o_fast.cli import main as frame

    asked = []

    def parse_only(argv):
        for name in ("extract", "train", "evaluate"):
            module = importlib.import_module(f"blip3o_fast.cli.{name}")
            monkeypatch.setattr(module, "run", lambda args: asked.append(args.command) or 0)
        return main(argv)

    main = frame.main
    monkeypatch.setattr(frame, "main", parse_only)
    for name, source in (("lite_photos", "--images"), ("clip_eva_coco", "--coco")):
        monkeypatch.setattr(sys, "argv", [name, source, str(tmp_path)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert asked == ["extract", "train", "evaluate"] * 2


def test_a_failing_stage_ends_the_example(tmp_path):
    words = [sys.executable, ROOT / "examples/lite_photos.py", "--images", tmp_path / "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "expected a folder of images" in done.stderr
    assert "train" not in done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten real photos, small; two of them are held out of training."""
    from blip3o_fast.data.dataset import photo_is_heldout
    from blip3o_fast.demo.photos import demo_photos
    from blip3o_fast.extraction.images import load_rgb

    folder = tmp_path_factory.mktemp("photos")
    refs = demo_photos()
    for i, ref in enumerate(refs[:: len(refs) // 10][:10]):
        image = load_rgb(ref.data)
        image.thumbnail((300, 300))
        image.save(folder / f"photo{i}.jpg")
    names = [path.name for path in folder.iterdir()]
    assert 0 < sum(photo_is_heldout(name, 0.2) for name in names) < 5
    return folder


def start(photos, folder, log):
    words = [sys.executable, ROOT / "examples/lite_photos.py", "--images", photos]
    words += ["--crops", "4", "--steps", "6", "--save_every", "2", "--evaluations", "1", "4"]
    return subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT
    )


def finish(photos, folder):
    with (folder / "log").open("w") as log, start(photos, folder, log) as process:
        pass
    assert process.returncode == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "lite/report/report.json").read_text())


def interrupt(photos, folder, stage, number):
    """Run until ``stage`` is under way, and kill it there."""
    path = folder / f"log {stage}"
    with path.open("w") as log, start(photos, folder, log) as process:
        deadline = time.monotonic() + 240
        while not STAGES[stage](folder / "lite", path.read_text()):
            assert process.poll() is None, path.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
    text = path.read_text()
    last = text.rindex("$ blip3o-fast ")
    assert text[last:].startswith(f"$ blip3o-fast {stage}"), text[-3000:]
    return process.returncode


@pytest.mark.slow
@pytest.mark.realdata
def test_interrupted_at_each_stage_the_report_is_the_same(photos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = finish(photos, whole)
    # Asked to stop, it saves and says 143.
    assert interrupt(photos, broken, "extract", signal.SIGTERM) == 143
    for stage in ("train", "evaluate"):
        assert interrupt(photos, broken, stage, signal.SIGKILL) == -signal.SIGKILL
    assert finish(photos, broken) == expected
