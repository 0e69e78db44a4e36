"""``blip3o-fast evaluate`` and the published command."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_data import C, E, N, small_model, write_shards

from blip3o_fast.atomic import locked
from blip3o_fast.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    write_shards(tmp_path / "shards", 40, photos=20)
    return tmp_path


def evaluate(files, *options):
    fixed = {"model_path": files / "model", "output_dir": files / "out", "num_inference_steps": 2}
    words = [str(word) for name, value in fixed.items() for word in (f"--{name}", value)]
    return main(["evaluate", *words, "--no_plots", *map(str, options)])


def test_shards(files, capsys):
    assert evaluate(files, "--embeddings_dir", files / "shards") == 0
    out = capsys.readouterr().out
    assert "ridge" in out.lower() and "report.html" in out
    report = json.loads((files / "out/report.json").read_text())
    assert [row["evaluations"] for row in report["dit"]] == [1, 2, 4]
    rows = (files / "out/samples.csv").read_text().splitlines()
    assert len(rows) - 1 == report["ridge"]["samples"]


def test_euler_spends_one_evaluation_a_step(files):
    assert evaluate(files, "--embeddings_dir", files / "shards", "--no_use_heun") == 0
    report = json.loads((files / "out/report.json").read_text())
    assert [row["evaluations"] for row in report["dit"]] == [1, 2]


def test_regression_and_fitted_solvers_stand_in_the_report(files, capsys):
    shards = files / "shards"
    fit = ["fit-solver", "--model_path", files / "model", "--embeddings_dir", shards]
    fit += ["--conditions", "8", "--evaluations", "3", "--device", "cpu"]
    assert main([str(word) for word in fit]) == 0
    small_model(seed=3).save_pretrained(files / "plain")
    options = ("--embeddings_dir", shards, "--regression_path", files / "plain")
    assert evaluate(files, *options) == 0
    out = capsys.readouterr().out
    assert "regression" in out and "fitted (3)" in out
    report = json.loads((files / "out/report.json").read_text())
    assert report["fitted"][0]["evaluations"] == 3 and report["fitted"][0]["solver_error"] < 1
    assert report["regression"] != report["dit"][0]
    columns = (files / "out/samples.csv").read_text().splitlines()[0]
    assert "regression_token_cosine" in columns and "fitted_3_token_cosine" in columns
    page = (files / "out/report.html").read_text()
    assert "Samples in few evaluations" in page


def test_training_shards_give_the_baselines(files):
    write_shards(files / "coco", 12, photos=12, heldout=0.0)
    options = ("--embeddings_dir", files / "coco", "--chunked_embeddings_dir", files / "shards")
    assert evaluate(files, *options) == 0
    report = json.loads((files / "out/report.json").read_text())
    assert report["ridge"]["samples"] == 12


SAMPLES = 20


def coco_file(files):
    samples = SAMPLES
    content = {
        "clip_embeddings": torch.randn(samples, N, C),
        "eva_embeddings": torch.randn(samples, N, E),
        "metadata": [
            {"image_id": i, "file_name": f"{i:012d}.jpg", "caption": "a photo"}
            for i in range(samples)
        ],
        "config": {"format_version": "coco_embeddings_v1"},
    }
    path = files / "coco_embeddings.pkl"
    path.write_bytes(pickle.dumps(content))
    return path, content


def test_published_coco_file_through_the_published_command(files):
    path, _ = coco_file(files)
    command = [
        sys.executable,
        str(ROOT / "eval_blip3o_coco.py"),
        *("--model_path", str(files / "model"), "--coco_embeddings_file", str(path)),
        *("--batch_size", "64", "--num_inference_steps", "2", "--max_samples", "1000"),
        *("--use_heun", "--training_mode", "patch_only"),
        *("--output_dir", str(files / "out"), "--no_plots"),
    ]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((files / "out/report.json").read_text())
    assert 0 < report["ridge"]["samples"] < SAMPLES


def test_a_coco_file_that_was_replaced_is_named(files, capsys):
    path, content = coco_file(files)
    assert evaluate(files, "--coco_embeddings_file", path) == 0
    assert evaluate(files, "--coco_embeddings_file", path) == 0
    content["eva_embeddings"][13, 2, 1] += 1
    path.write_bytes(pickle.dumps(content))
    capsys.readouterr()
    assert evaluate(files, "--coco_embeddings_file", path) == 1
    assert "eva of 'coco_13' differs from row 13 of coco_embeddings.pkl" in capsys.readouterr().err


def test_widths_are_checked_before_anything_is_converted(files, capsys):
    path, content = coco_file(files)
    path.write_bytes(pickle.dumps({**content, "clip_embeddings": torch.randn(SAMPLES, N, C + 1)}))
    assert evaluate(files, "--coco_embeddings_file", path) == 2
    assert f"expected widths {E, C} (EVA, CLIP), those of the model" in capsys.readouterr().err
    assert not list((files / "out").glob("*_shards"))


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [(("--solver", "euler"), [1, 2]), (("--solver", "rk4"), [1, 2, 4, 8])],
)
def test_solvers_have_the_names_that_generate_takes(files, options, evaluations):
    assert evaluate(files, "--embeddings_dir", files / "shards", *options) == 0
    report = json.loads((files / "out/report.json").read_text())
    assert [row["evaluations"] for row in report["dit"]] == evaluations


def test_a_folder_that_another_process_writes_to(files, capsys):
    with locked(files / "out"):
        assert evaluate(files, "--embeddings_dir", files / "shards") == 2
    assert "expected a folder that nobody else writes to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--num_inference_steps", "0"), 2, "num_inference_steps: expected at least 1, got 0"),
        (("--evaluations", "0"), 2, "evaluations: expected at least 1, got (0,)"),
        (("--training_mode", "cls_patch"), 2, "training_mode: expected patch_only"),
        (("--solver", "rk4", "--no_use_heun"), 2, "solver: expected euler, as use_heun says"),
        (("--solver", "fitted"), 2, "solver: expected the name of a solver, got fitted"),
        (("--model_path", "nowhere"), 1, "nowhere: expected a checkpoint folder"),
        (("--embeddings_dir", "nowhere"), 1, "nowhere"),
    ],
)
def test_bad_input(files, options, status, message, capsys):
    options = ("--embeddings_dir", files / "shards", *options)
    assert evaluate(files, *options) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (files / "out").exists()
