"""``blip3o-fast train`` and ``train_dit.py``: the published command, files of options, exits."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import write_shards

from blip3o_fast.cli.main import main
from blip3o_fast.options.train import ANSWERS, TrainingOptions

ROOT = Path(__file__).parents[2]
FIELDS = dataclasses.fields(TrainingOptions)

PUBLISHED_COMMAND = """
    --chunked_embeddings_dir {data} --output_dir {out} --model_size base --batch_size 128
    --num_epochs 15 --semantic_weight 0.5 --cosine_weight 0.2 --consistency_weight 0.3
    --use_eva_adapter --use_heun_inference --simple_scale_factor 1.0
"""

PUBLISHED_PARSER = {
    "model_size": "tiny",
    "training_mode": "cls_patch",
    "learning_rate": "2e-4",
    "batch_size": "4",
    "num_epochs": "3",
    "warmup_steps": "2",
    "weight_decay": "0.02",
    "max_grad_norm": "0.5",
    "velocity_weight": "0.9",
    "semantic_weight": "0.4",
    "cosine_weight": "0.1",
    "consistency_weight": "0.2",
    "simple_scale_factor": "4.0",
    "eval_every_n_steps": "6",
    "eval_num_samples": "5",
    "eval_inference_steps": "2",
    "use_heun_inference": None,
    "max_shards": "2",
    "fp16": None,
    "num_workers": "0",
    "use_eva_adapter": None,
    "eva_adapter_layers": "2",
    "use_timestep_weighting": None,
    "use_wandb": None,
    "wandb_project": "blip3o-clip-no-norm",
    "wandb_run_name": "35shard_sf1",
}

SMALL_RUN = """
    --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --num_key_value_heads 1
    --intermediate_size 24 --eva_adapter_layers 1 --eval_inference_steps 1 --device cpu
"""
SMALL = SMALL_RUN.split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(folder, samples=800, photos=400)


@pytest.fixture
def command(data, tmp_path):
    return ["train", *PUBLISHED_COMMAND.format(data=data, out=tmp_path / "out").split()]


def short(data, out, *more):
    words = (
        f"train --chunked_embeddings_dir {data} --output_dir {out} --batch_size 16 --max_steps 4"
    )
    return [*words.split(), "--eval_every_n_steps", "2", *SMALL, *more]


def test_the_published_command_plans_the_published_model(command, capsys, tmp_path, monkeypatch):
    assert main([*command, "--dry_run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["model"]["hidden_size"], plan["model"]["num_hidden_layers"]) == (768, 12)
    assert plan["steps"] == 15 * plan["steps_per_epoch"] == 15 * (plan["training_samples"] // 128)
    assert plan["heldout_samples"] > 0
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    monkeypatch.setenv("RANK", "1")
    assert main([*command, "--dry_run"]) == 0
    assert not capsys.readouterr().out, "one process of several prints the plan"


def test_the_published_command_trains(command, capsys, tmp_path):
    assert main([*command, *SMALL]) == 0
    out = tmp_path / "out"
    assert "best validation: token cosine" in capsys.readouterr().out
    assert (out / "latest").read_text().strip() == "step_60"
    saved = json.loads((out / "options.json").read_text())["options"]
    assert (saved["batch_size"], saved["num_epochs"]) == (128, 15)


def test_the_script_is_the_command(data, tmp_path):
    argv = short(data, tmp_path / "out", "--no_progress")[1:]
    done = subprocess.run(
        [sys.executable, ROOT / "train_dit.py", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "step_4" / "model.safetensors").is_file()


def test_every_flag_of_the_published_parser_is_taken(data, capsys):
    words = ["train", "--chunked_embeddings_dir", str(data), "--output_dir", "out"]
    for name, value in PUBLISHED_PARSER.items():
        words += [f"--{name}"] if value is None else [f"--{name}", value]
    assert main([*words, "--print_config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for name, value in PUBLISHED_PARSER.items():
        assert str(printed[name]).lower() == (
            "true" if value is None else str_like(value, printed, name)
        )


def str_like(value, printed, name):
    return str(type(printed[name])(value)).lower()


@pytest.mark.parametrize(
    "field", [f for f in FIELDS if "bool" in str(f.type)], ids=lambda f: f.name
)
def test_switches_have_both_forms(field, data, capsys):
    for word, expected in ((f"--{field.name}", True), (f"--no_{field.name}", False)):
        argv = ["train", "--chunked_embeddings_dir", str(data), "--output_dir", "out", word]
        assert main([*argv, "--print_config"]) == 0
        assert json.loads(capsys.readouterr().out)[field.name] is expected


def test_unions_of_types_are_read(data, capsys):
    argv = ["train", "--chunked_embeddings_dir", str(data), "--output_dir", "out", "--print_config"]
    words = "--simple_scale_factor auto --grid 1 2 3 --warmup_steps 5 --heldout_fraction 0.25"
    assert main([*argv, *words.split(), "--init_from", "x", "--eval_batch_size", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["simple_scale_factor"] == "auto" and printed["grid"] == [1, 2, 3]
    assert (printed["warmup_steps"], printed["heldout_fraction"]) == (5, 0.25)
    assert (printed["init_from"], printed["eval_batch_size"]) == ("x", 2)


def test_a_file_gives_values_and_flags_override_it(data, capsys, tmp_path):
    assert main([*short(data, tmp_path / "out"), "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "a.json").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "a.json"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    (tmp_path / "a.toml").write_text(f'chunked_embeddings_dir = "{data}"\nbatch_size = 3\n')
    argv = ["train", "--config", str(tmp_path / "a.toml"), "--output_dir", "o", "--print_config"]
    assert main([*argv, "--no_progress"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 3
    assert main([*argv, "--batch_size", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 5


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        assert f"--{field.name}" in out
    assert "optimizer steps, instead of num_epochs --learning_rate" in out
    assert "peak rate of AdamW (default: 0.0001)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chunked_embeddings_dir", "/nowhere"], "chunked_embeddings_dir: .*does not exist"),
        (["--batch_size", "0"], "batch_size: expected at least 1, got 0"),
        (["--batch_size", "9999"], "batch_size: expected at most"),
        (["--heldout_fraction", "0"], "expected heldout samples, got none"),
        (["--learning_rate", "0"], "learning_rate: expected more than 0"),
        (["--grid", "1", "3", "2"], "grid: expected (1, 2, 3), as in the data"),
        (["--config", "/nowhere.json"], "nowhere.json: cannot read"),
        (["--parallel", "ddp"], "parallel: ddp expects torchrun"),
        (["--init_from", "/nowhere"], "init_from: /nowhere"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_bad_input_is_one_line_and_status_two(words, message, dry, data, tmp_path, capsys):
    if dry and "--parallel" in words:
        pytest.skip("a dry run takes part in no group")
    out = tmp_path / "out"
    assert main([*short(data, out, *words), *["--dry_run"] * dry]) == 2
    err = capsys.readouterr().err
    assert err.startswith("blip3o-fast train: error: ") and err.count("\n") == 1
    position = 0
    for piece in message.split(".*"):
        position = err.index(piece, position)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--simple_scale_factor", "much"], "expected a number or auto, got 'much'"),
        (["--model_size", "huge"], "invalid choice: 'huge'"),
        (["--grid", "1", "2"], "expected 3 arguments"),
        (["--batchsize", "3"], "unrecognized arguments"),
    ],
)
def test_words_that_cannot_be_read(words, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(short(data, tmp_path / "out", *words))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_folders_are_asked_for(capsys):
    assert main(["train"]) == 2
    assert "options: missing chunked_embeddings_dir, output_dir" in capsys.readouterr().err


def test_the_same_command_again_goes_on_and_a_different_one_is_refused(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(short(data, out)) == 0
    assert main(short(data, out)) == 0
    assert main(short(data, out, "--learning_rate", "0.5")) == 2
    assert "learning_rate was 0.0001, is 0.5" in capsys.readouterr().err
    assert main(short(data, out, "--no_resume")) == 2


def test_a_run_begins_with_what_it_is_and_a_finished_one_says_so(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(short(data, out)) == 0
    said = capsys.readouterr()
    first, hint = said.err.splitlines()[:2]
    assert re.fullmatch(
        r"training [\d,]+ parameters on cpu in fp32: 4 steps of 16 samples; "
        r"\d+ samples of \d+ photos, held out \d+ samples of \d+ photos",
        first,
    )
    assert re.search(r"standard deviation is (2\.9|3)", hint) and "simple_scale_factor=auto" in hint
    assert "nothing to do" not in said.out
    assert main(short(data, out)) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"nothing to do: {out} is complete after 4 steps\nbest validation: ")
    assert said.err == ""


def test_no_hint_where_the_scale_is_set(data, tmp_path, capsys):
    assert main(short(data, tmp_path / "out", "--simple_scale_factor", "auto")) == 0
    assert "standard deviation" not in capsys.readouterr().err


def test_a_run_that_goes_on_says_from_where(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(short(data, out, "--save_every_n_steps", "2")) == 0
    shutil.rmtree(out / "step_4")
    capsys.readouterr()
    assert main(short(data, out, "--save_every_n_steps", "2")) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{out}: going on after step 2\ntraining ")
    assert "nothing to do" not in said.out


def test_a_run_shorter_than_the_default_interval_is_validated_at_its_end(data, tmp_path, capsys):
    argv = [word for word in short(data, tmp_path / "out") if word != "--eval_every_n_steps"]
    argv.remove("2")
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.err.count("validation after step") == 1 and "after step 4;" in said.out


def test_progress_goes_to_standard_error(data, tmp_path, capsys):
    assert main(short(data, tmp_path / "a", "--log_every_n_steps", "2")) == 0
    err = capsys.readouterr().err
    for words in ("step 2/4: loss", "samples/s", "wait", "validation after step 4", "(best)"):
        assert words in err
    assert main(short(data, tmp_path / "b", "--no_progress")) == 0
    assert capsys.readouterr().err == ""


def test_defaults_of_the_command_are_those_of_the_record(data, capsys):
    argv = ["train", "--chunked_embeddings_dir", str(data), "--output_dir", "out", "--print_config"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == TrainingOptions(str(data), "out").to_dict()


def test_answers_name_flags_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    flags = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert not flags & set(ANSWERS)
    named = set(re.findall(r"--\w+", " ".join(ANSWERS.values()))) - {"--nproc_per_node"}
    assert named <= flags
