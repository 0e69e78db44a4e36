"""What a check says of its machine before anything else."""

import json

import describe_machine
import torch


def test_the_environment_and_what_would_run(tmp_path, capsys):
    path = tmp_path / "environment.json"
    assert describe_machine.main(["--device", "cpu", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["device_type"] == "cpu"
    assert "sandwich_norm on cpu" in capsys.readouterr().out


def test_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "environment.json"
    assert describe_machine.main(["--json", str(path)]) == 1
    assert not path.exists() and "expected a GPU that torch can use" in capsys.readouterr().out
