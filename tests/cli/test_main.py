"""The command line's frame: help, exit statuses, one-line errors."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from blip3o_fast import __version__
from blip3o_fast.cli.main import COMMANDS, guarded, main
from blip3o_fast.errors import OptionError


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert COMMANDS[command].split()[1] in out and "None" not in out
    assert max(map(len, out.splitlines())) <= 80
    flag = re.compile(r"^  (?:-\w, )?(?:--\w+|[A-Z]+)", re.MULTILINE)
    ends = [m.start() for m in flag.finditer(out)] + [len(out)]
    for start, end in itertools.pairwise(ends):
        # The help of an option begins in column 25, beside its name or below it.
        explained = [line[24:].strip() for line in out[start:end].splitlines()]
        assert any(explained), out[start:end]


ALONE = """
import contextlib, os, sys
sys.argv = ["/usr/bin/blip3o-fast", "train"]
from blip3o_fast.cli.main import COMMANDS, main
for argv in ([], ["--help"], ["--version"], ["trian"], *([c, "--help"] for c in COMMANDS)):
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            main(argv)
print(sorted({"torch", "numpy", "tqdm", "safetensors", "argcomplete"} & sys.modules.keys()))
print(main(["doctor", "--json"]))
"""


def test_help_and_refusals_import_nothing_heavy_and_commands_still_run():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    first, *report, status = done.stdout.splitlines()
    assert (first, status) == ("[]", "0"), done.stderr
    assert json.loads("\n".join(report))["ops"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("blip3o-fast ev", ["evaluate "]),
        ("blip3o-fast train --model_size ", ["tiny", "small", "base", "large"]),
        ("sudo blip3o-fast generate --num_at", ["--num_attention_heads "]),
    ],
)
def test_completion(line, words, tmp_path):
    """As ``register-python-argcomplete`` has the shell ask."""
    pytest.importorskip("argcomplete")
    code = "import sys; sys.argv = ['blip3o-fast']; from blip3o_fast.cli.main import main; main()"
    asked = {
        **{"_ARGCOMPLETE": str(1 + line.split().index("blip3o-fast")), "_ARGCOMPLETE_IFS": "\n"},
        **{"COMP_LINE": line, "COMP_POINT": str(len(line))},
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"),
    }
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    assert (tmp_path / "answer").read_text().splitlines() == words


def test_options_of_train_are_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: blip3o-fast train [options]\n")
    found = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert found[:4] == ["options", "Data", "Model", "Loss"] and len(found) > 6
    assert out.index("\nLoss:") < out.index("--cosine_weight") < out.index("\nOptimisation:")


@pytest.mark.parametrize("argv", [[], ["sing"], ["doctor", "--loud"], ["evaluate"]])
def test_bad_arguments_exit_with_two(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: blip3o-fast" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'?"),
        (["generate", "--modelpath", "run"], "--modelpath; did you mean '--model_path'?"),
        (["quit"], "unknown command 'quit'; choose from demo, train, "),
        (["doctor", "more"], "doctor: error: unrecognized arguments: more\n"),
        (["train", "--batchsize=4"], "--batchsize=4; did you mean '--batch_size'?"),
        (["doctor", "--loud"], "unrecognized arguments: --loud\n"),
        (["train", "--distributed"], "--distributed; torchrun starts the processes"),
        (["train", "--world_size=4"], "--world_size=4; torchrun starts the processes"),
        (["train", "--fsdp_mixed_precision"], "; --precision bf16 is what it means\n"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"blip3o-fast {__version__}\n"


def test_required_options_say_so(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "checkpoints, metrics, summary (required)" in out


def test_what_is_required_is_all_that_the_usage_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    words = "blip3o-fast generate --model_path PATH --embeddings_dir DIR --output_dir DIR [options]"
    assert usage.split() == ["usage:", *words.split()]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OptionError("steps: expected at least 1, got 0"), 2),
        (ValueError("shard 3, row 7:\n  NaN"), 1),
        (FileNotFoundError("no such folder"), 1),
        (ImportError("pip install 'blip3o-fast[images]'"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, status, capsys):
    def body():
        raise error

    assert guarded(body, "blip3o-fast train") == status
    err = capsys.readouterr().err
    assert err.startswith("blip3o-fast train: ") and err.count("\n") == 1


def test_a_defect_keeps_its_traceback():
    def body():
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        guarded(body, "blip3o-fast train")


def test_doctor_says_what_runs_and_why(capsys, monkeypatch):
    monkeypatch.setattr("blip3o_fast.cli.doctor.install", lambda extra: f"pip install '.[{extra}]'")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "bf16 on the CPU" in out
    for word in (
        "versions",
        "ops",
        "sandwich_join on cpu",
        "attention on cpu",
        "attention in training on cpu",
        "FP8 products",
        "flash-attn",
    ):
        assert word in out


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ops = {row["op"]: row for row in report["ops"] if row["device"] == "cpu"}
    assert ops["swiglu"]["runs"] == "reference" and ops["rope"]["runs"] == "aten"
    assert all(row["why"] for row in ops.values())
    assert set(report["versions"]) >= {"blip3o_fast", "torch", "python", "CUDA build"}
    assert report["packages"]["triton"]


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "blip3o_fast", "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)["ops"]
