"""Documents made from results: text and data cannot disagree."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import conventions
import fitted_solvers
import published_cpu
import pytest
import render
import torch
import zero_time
from small_data import small_model, write_shards

from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.sampling import fit


def page(*markers):
    """A document with empty blocks."""
    return (
        "text\n\n" + "\n\n".join(f"{begin}\n{render.END}" for begin in markers) + "\n\nmore text\n"
    )


PAGES = {name: page(*blocks) for name, blocks in render.BLOCKS.items()}
PAGES[render.OWN] = page(render.EVERYTHING)
TOP, OWN = PAGES["README.md"], PAGES[render.OWN]
ENVIRONMENT = {
    "device": "a device",
    "device_type": "cuda",
    "driver": "595.1",
    "cuda": "13.0",
    "load": [0.5],
    "versions": {"torch": "2.12.0"},
    "commit": "0123456789abcdef",
    "changed": True,
    "date": "2026-01-02T03:04:05+00:00",
}

CONVENTIONS = {
    "benchmark": "conventions",
    "environment": ENVIRONMENT,
    "data": "800 crops",
    "steps": 300,
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def made(kind, **values):
    """A record's dataclass with zeros for what a test does not care about."""
    missing = dataclasses.MISSING
    names = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is missing and f.default_factory is missing
    }
    return kind(**{**dict.fromkeys(names, 0), **values})


def measurement(contender, median, ours, **values):
    task = {"group": "evaluation", "name": "evaluation", "shape": "base-b64", "dtype": "bf16"}
    times = {"median": median, "low": 0.9 * median, "high": 1.1 * median, "limit": 1e-3}
    return made(
        Measurement, contender=contender, ours=ours, bound="compute", **{**task, **times, **values}
    )


def write_bench(folder, *measurements, **environment):
    record = made(
        Record,
        settings={"quick": True},
        environment={**ENVIRONMENT, **environment},
        bandwidth=3e12,
        rates={"bf16": 8e14},
        peers={"triton": "3.6.0", "apex": "absent: not installed"},
        measurements=measurements,
        left_out={"torch.compile": "takes minutes"},
    )
    record.write(folder / "bench.json")


ROWS = (
    measurement("plan", 4e-3, True),
    measurement("plan, CUDA graph", 2e-3, True),
    measurement("reference", 9e-3, False),
    measurement("torch.compile", 5e-3, False),
)


def texts(root, short="README.md"):
    """A page with the headline of a result, and the one with all of it."""
    assert render.main([], root) == 0
    return [(root / name).read_text() for name in (short, render.OWN)]


def test_the_committed_documents_are_what_the_results_say():
    assert render.main(["--check"]) == 0


def test_without_results_the_block_says_so(root):
    for text, empty in zip(texts(root), (TOP, OWN), strict=True):
        assert text == empty.replace(f"\n{render.END}", f"\n{render.NONE}\n{render.END}")
    assert (root / "benchmarks" / "SCALING.md").is_file()


def test_the_fastest_of_ours_stands_beside_limit_and_fastest_peer(root):
    write_bench(root / "benchmarks/results/gpu", *ROWS)
    expected = (
        "| evaluation, base-b64, bf16 | plan, CUDA graph | 2 ms | 1 ms | 50% | compute "
        "| torch.compile, 5 ms | 2.5x |"
    )
    for text in texts(root):
        assert expected in text
        assert "**a device**" in text and "commit 0123456789 with changes" in text
        assert "torch 2.12.0" in text and "2026-01-02" in text
        assert text.startswith("text\n\n") and text.endswith("\n\nmore text\n")
    own = texts(root)[1]
    assert "3 TB/s copy, 800 TFLOP/s bf16. A quick run" in own
    assert "| evaluation, base-b64, bf16 | reference | 9 ms | 10% | 1 ms | 11% | compute |" in own
    assert "* apex: absent: not installed" in own and "* torch.compile: takes minutes" in own


def test_a_result_of_unknown_commit_says_so(root):
    write_bench(root / "benchmarks/results", ROWS[0], commit=None)
    assert "commit not recorded" in texts(root)[0]


def test_a_run_on_a_cpu_stands_in_the_longer_document_only(root):
    write_bench(root / "benchmarks/results", *ROWS, device_type="cpu", driver=None)
    top, own = texts(root)
    assert "2.5x" in own and "2.5x" not in top


def test_a_task_without_a_peer_says_so(root):
    write_bench(root / "benchmarks/results", ROWS[0])
    assert "| none in this run |  |" in texts(root)[0]


def test_check_names_every_document_that_differs(root, capsys):
    texts(root)
    assert render.main(["--check"], root) == 0
    write_bench(root / "benchmarks/results", *ROWS)
    assert render.main(["--check"], root) == 1
    named = capsys.readouterr().err
    assert str(root / "README.md") in named and str(root / "benchmarks/README.md") in named
    assert "SCALING" not in named
    (root / "benchmarks" / "SCALING.md").write_text("other")
    assert render.main(["--check"], root) == 1
    assert "SCALING.md" in capsys.readouterr().err
    assert render.main([], root) == 0 and render.main(["--check"], root) == 0


def test_a_changed_digit_is_found(root):
    write_bench(root / "benchmarks/results", *ROWS)
    texts(root)
    page = root / "README.md"
    page.write_text(page.read_text().replace("2.5x", "3.5x"))
    assert render.main(["--check"], root) == 1


def test_a_failure_is_shown(root):
    write_bench(root / "benchmarks/results", *ROWS)
    path = root / "benchmarks/results/bench.json"
    content = json.loads(path.read_text())
    content["failures"] = {"the run": "stopped by SIGTERM"}
    path.write_text(json.dumps(content))
    assert "Failed:\n\n* the run: stopped by SIGTERM\n" in texts(root)[1]


def test_a_check_of_a_copy_without_history_was_told_its_commit(root):
    folder = root / "benchmarks/results/gpu"
    write_bench(folder / "bench", ROWS[0], commit="fedcba987654", changed=None)
    step = {"name": "tests", "verdict": "failed", "seconds": 61.2, "reason": "1 | 2 failed"}
    summary = {
        "kind": "blip3o-fast gpu check",
        "format": 1,
        "mode": "gpu",
        "commit": "fedcba987654",
    }
    content = {**summary, "environment": {**ENVIRONMENT, "commit": None}, "steps": [step]}
    (folder / "summary.json").write_text(json.dumps(content))
    for name in ("environment", "smoke", "kernels", "tests"):
        (folder / f"{name}.json").write_text("{}")
    own = texts(root)[1]
    assert own.count("commit fedcba9876") == 2
    assert "| tests | failed | 61 s | 1 / 2 failed |" in own


def test_pictures_beside_a_record_are_shown(root):
    write_bench(root / "benchmarks/results/gpu", ROWS[0])
    (root / "benchmarks/results/gpu/roofline.png").touch()
    assert "![roofline](results/gpu/roofline.png)" in texts(root)[1]


def test_a_picture_of_another_result_is_not_taken_for_ones_own(root):
    write_bench(root / "benchmarks/results", ROWS[0])
    content = {**CONVENTIONS, "rows": []}
    (root / "benchmarks/results/conventions.json").write_text(json.dumps(content))
    (root / "benchmarks/results/conventions.png").touch()
    assert texts(root)[1].count("![conventions](results/conventions.png)") == 1


def test_published_cpu_as_it_prints_itself(root, capsys):
    seconds = {
        "published, fp32": [4.5, 4.4, 5.5],
        "GEMM limit, fp32": [0.3],
        "plan, fp32": [0.5],
        "GEMM limit, bf16": [0.15],
        "plan, bf16": [0.24, 0.25, 0.26],
    }
    args = SimpleNamespace(rounds=5, layers=12)
    published_cpu.report(seconds, 2e-6, args)
    line = capsys.readouterr().out.splitlines()[-1]
    (root / "benchmarks/results/published_cpu.json").write_text(line)
    _, text = texts(root)
    assert "| plan, bf16 | 250 ms | 240 ms | 18x | 150 ms | 60% |" in text
    assert "differ by 2.0e-06" in text and f"torch {torch.__version__}" in text


def test_conventions_by_number_of_evaluations(root):
    def row(network, evaluations, cosine):
        names = {"network": network, "loss": "", "sampler": "", "evaluations": evaluations}
        return {**names, "token_cosine": cosine, "token_cosine_interval": [cosine - 0.1, 0.95]}

    rows = [row("ridge", 0, 0.813), row("consistent", 1, 0.838), row("consistent", 50, 0.702)]
    content = {**CONVENTIONS, "rows": rows}
    (root / "benchmarks/results/conventions.json").write_text(json.dumps(content))
    top, own = texts(root, "docs/published.md")
    assert own.count("| ridge |") == 1 and "| ridge |" in top.partition(render.CONVENTIONS)[2]
    assert "| ridge |  |  | 0.813 [0.713, 0.950] |  |" in own
    assert "| consistent |  |  | 0.838 [0.738, 0.950] | 0.702 [0.602, 0.950] |" in own
    assert "1 evaluation |" in own and "50 evaluations |" in own


def test_conventions_as_it_writes_itself(root, tmp_path, monkeypatch):
    """Everything but the training."""
    shards = write_shards(tmp_path / "shards", samples=40, photos=20)
    written = root / "benchmarks/results/conventions.json"
    monkeypatch.setattr(
        conventions, "trained", lambda args, run, network, loss: small_model(conventions=network)
    )
    monkeypatch.setattr(conventions, "learning_curve", lambda run: [(1, 0.25), (2, 0.5)])
    flags = {"--shards": shards, "--output_dir": tmp_path / "runs", "--json": written}
    flags |= {"--steps": 7, "--max_samples": 6}
    words = [str(word) for pair in flags.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["conventions.py", *words, "--evaluations", "1", "2"])
    conventions.main()
    own = texts(root)[1]
    rows = {
        (row["network"], row["loss"], row["sampler"], row["evaluations"]): row
        for row in json.loads(written.read_text())["rows"]
    }
    assert len(rows) == 2 + 3 * 2 * 2
    row = rows["published", "published", "ascending", 2]
    low, high = row["token_cosine_interval"]
    assert f" {row['token_cosine']:.3f} [{low:.3f}, {high:.3f}] |" in own
    assert "6 of " in own and "![conventions](results/conventions.png)" in own


def run_program(monkeypatch, program, flags):
    words = [str(word) for name, values in flags.items() for word in (f"--{name}", *values)]
    monkeypatch.setattr(sys, "argv", [program.__name__, *words])
    program.main()


def test_fitted_solvers_as_the_program_writes_them(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "REFERENCE_STEPS", 32)
    shards = write_shards(tmp_path / "shards", samples=40, photos=20)
    for conventions_name, dropped in (("consistent", 0.0), ("published", 0.1)):
        model = small_model(conventions=conventions_name, condition_dropout=dropped)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.2)
        model.save_pretrained(tmp_path / conventions_name)
    written = root / "benchmarks/results/fitted_solvers.json"
    flags = {"model_path": [tmp_path / "consistent", tmp_path / "published"], "json": [written]}
    flags |= {"embeddings_dir": [shards], "evaluations": [2, 4], "conditions": [8]}
    run_program(monkeypatch, fitted_solvers, flags | {"max_samples": [8], "device": ["cpu"]})
    capsys.readouterr()
    models = json.loads(written.read_text())["models"]
    kinds = [(model["conventions"], model["guidance_scale"]) for model in models]
    assert kinds == [("consistent", 1), ("published", 2)]
    for model in models:
        errors = {(row["solver"], row["evaluations"]): row["error"] for row in model["errors"]}
        assert errors["fitted", 4] < errors["heun", 4], "no better than what anyone has"
        floor, *others = model["samples"]
        assert floor["solver"] == "reference" and len(others) == 5
        for row in model["dtypes"]:
            assert 0 < row["fp32"] < row["fp8"], "FP8 adds an error"
        cases = [row["case"] for row in model["transfer"]]
        guided = ["guidance 2.5 instead of 2"] if model["guidance_scale"] == 2 else []
        assert cases == ["conditions that are no image", *guided]
    top, own = texts(root, "docs/solvers.md")
    for text in (top, own):
        assert "**Published conventions, guidance 2.** Relative error of the final" in text
        assert f"| 4 | {models[0]['errors'][1]['error']:.2g} |" in text
    assert "Samples, dtypes, transfer" in own and "Samples, dtypes" not in top


def test_training_at_zero_as_the_program_writes_it(root, tmp_path, monkeypatch, capsys):
    shards = write_shards(tmp_path / "shards", samples=40, photos=20)
    written = root / "benchmarks/results/zero_time.json"
    flags = {"shards": [shards], "output_dir": [tmp_path / "runs"], "json": [written]}
    flags |= {"fractions": [0.0, 1.0], "seeds": [0, 1], "steps": [2], "max_samples": [6]}
    run_program(monkeypatch, zero_time, flags)
    capsys.readouterr()
    rows = json.loads(written.read_text())["rows"]
    assert [(row["fraction"], row["seed"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    values = [row["one"]["token_cosine"] for row in rows if row["fraction"] == 1]
    mean, low, high = sum(values) / 2, min(values), max(values)
    for text in texts(root, "docs/solvers.md"):
        assert f"| 1 | {mean:.4f} ({low:.4f} to {high:.4f}) |" in text
        assert "2 steps each, 2 seeds: mean (range)." in text


def test_a_batch_beside_the_published_sampler(root):
    name = "ours, fp32, fitted 5"
    content = {
        **{"benchmark": "published_sampling", "environment": ENVIRONMENT, "batch": 2, "layers": 12},
        **{"rounds": 3, "seconds": {"published": 40.0, name: 0.5}, "ratio": {name: 80.0}},
        "error": {"published": 0.0, name: 0.0034},
        "fit": {"seconds": 300.0, "bytes": 2e9, "conditions": 12, "held_out_error": 0.003},
    }
    content["ratio"]["published"] = 1.0
    (root / "benchmarks/results/published_sampling.json").write_text(json.dumps(content))
    for text in texts(root):
        assert f"| {name} | 500 ms | 80x | 3.4e-03 |" in text
        assert "12 conditions took 5 min and 2 GB more memory." in text


def test_a_profile_lists_the_dearest_launches(root):
    launch = {"op": "aten::mm", "shapes": [[64, 32], [32, 16]], "calls": 12.0, "share": 0.6}
    content = {
        **{"kind": "blip3o-fast profile", "format": 1, "environment": ENVIRONMENT},
        **{
            "task": {"name": "one evaluation", "shape": "base-b64", "dtype": "bf16"},
            "seconds": 1e-2,
            "limit": 5e-3,
        },
        **{"launches": 180.0, "rest_seconds": 4e-3},
        "dearest": [{**launch, "seconds": 6e-3, "limit": 3e-3, "launches": 12.0, "kernels": []}],
    }
    (root / "benchmarks/results/profile.json").write_text(json.dumps(content))
    own = texts(root)[1]
    assert "| `aten::mm` | 64x32 32x16 | 12 | 6 ms | 60% | 3 ms | 50% |" in own
    assert "10 ms in 180 launches, limit 5 ms" in own


def test_a_long_training_says_what_broke(root):
    content = {
        **{"kind": "blip3o-fast long training", "format": 1, "environment": ENVIRONMENT},
        "task": {"shape": "base-b128", "dtype": "bf16", "scales": [1.5, 1.0]},
        **{"steps": 2000, "skipped": 0, "clipped": 12, "first_loss": 2.0, "last_loss": 1.0},
        **{"seconds": 0.08, "data_wait": 1e-4, "peak": 30_000_000_000},
    }
    (root / "benchmarks/results/long.json").write_text(json.dumps(content))
    own = texts(root)[1]
    assert "2,000 training steps of base-b128 in bf16" in own
    assert "deviations 1.5 (EVA) and 1 (CLIP): 0 with NaN or Inf, 12 clipped, 80 ms a step" in own
    assert "30 GB allocated at most." in own


def test_the_demo_stands_beside_its_baselines(root):
    def metrics(cosine):
        interval = {"value": cosine, "low": cosine - 0.01, "high": cosine + 0.01}
        named = dict.fromkeys(("token_cosine", "image_cosine", "r2"), interval)
        return {**named, "samples": 96, "recall_generated_to_target": {"1": interval}}

    facts = {"crops": "100 to learn from", "model": "tiny", "versions": "torch 2.12.0"}
    content = {
        "title": "a demo",
        "verdict": {"sentence": "The DiT beats ridge regression."},
        "mean_predictor": metrics(0.27),
        "ridge": metrics(0.812),
        "dit": [{"evaluations": 1, **metrics(0.837)}, {"evaluations": 50, **metrics(0.702)}],
        "facts": {**facts, "device": "a device", "commit": "0123456789abcdef"},
    }
    (root / "benchmarks/results/demo.json").write_text(json.dumps(content))
    for text in texts(root)[1:]:
        assert "| DiT, 50 evaluations | 0.702 [0.692, 0.712] | 0.702 | 0.702 | 0.702 |" in text
        assert "R@1 of 96" in text and "**a device**; torch 2.12.0; commit 0123456789." in text


def test_fp8_stands_beside_bf16_and_fp32(root):
    content = {
        **{"benchmark": "fp8_quality", "environment": ENVIRONMENT, "fp8": "hardware"},
        **{"parameters": 1001220, "samples": 32, "sources": 14},
        "rows": [
            {"measure": "velocity error", "at": 0.5, "bf16": 0.007, "fp8": 0.0139},
            {"measure": "cosine to fp32", "at": 4, "fp32": 1.0, "bf16": 0.99999, "fp8": 0.99997},
        ],
    }
    (root / "benchmarks/results/fp8_quality.json").write_text(json.dumps(content))
    own = texts(root)[1]
    assert "1,001,220 parameters; 32 held-out samples of 14 photos; FP8 by hardware." in own
    assert "| velocity error, t = 0.5 | 0 | 0.70% | 1.39% |" in own
    assert "| cosine to fp32, 4 evaluations | 1.00000 | 0.99999 | 0.99997 |" in own


@pytest.mark.parametrize(
    "content, said",
    [
        ("not json", "expected a JSON object"),
        ("[]", "expected a result of"),
        ('{"kind": "x"}', "expected a result of"),
        ('{"benchmark": "published_cpu"}', "difference, environment"),
        ('{"kind": "blip3o-fast benchmarks", "format": 1}', "record: missing settings"),
    ],
)
def test_a_file_that_is_no_result_is_named(root, capsys, content, said):
    path = root / "benchmarks/results/odd.json"
    path.write_text(content)
    assert render.main([], root) == 1
    error = capsys.readouterr().err
    assert str(path) in error and said in error
    assert (root / "README.md").read_text() == TOP


@pytest.mark.parametrize(
    "text", ["no block", f"{render.END}\n{render.SPEED}", TOP + TOP, TOP.replace(render.END, "", 1)]
)
def test_a_document_without_one_block_is_named(root, capsys, text):
    (root / "README.md").write_text(text)
    assert render.main([], root) == 1
    assert str(root / "README.md") in capsys.readouterr().err
