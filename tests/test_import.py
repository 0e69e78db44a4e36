"""What importing the library costs and touches."""

import subprocess
import sys

from small_data import small_model


def run(code):
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_import_brings_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import blip3o_fast\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'triton', 'transformers', 'matplotlib', 'PIL', 'huggingface_hub'}))\n"
        "print(torch.cuda.is_initialized())"
    )
    assert run(["-c", code]).stdout.split("\n")[:2] == ["[]", "False"]


def test_extraction_is_imported_when_asked_for():
    code = (
        "import sys, blip3o_fast\n"
        "extraction = 'blip3o_fast.extraction'\n"
        "assert 'extract_eva_features' in dir(blip3o_fast) and extraction not in sys.modules\n"
        "from blip3o_fast import extract_eva_features as first\n"
        "import blip3o_fast.extraction as module\n"
        "assert first is module.extract_eva_features is blip3o_fast.extract_eva_features\n"
        "assert set(blip3o_fast.__all__) <= set(dir(blip3o_fast))\n"
        "assert not hasattr(blip3o_fast, 'extract_everything')\n"
        "print('transformers' in sys.modules)"
    )
    assert run(["-c", code]).stdout == "False\n"


def test_the_import_brings_the_ops_of_exported_models_and_no_triton():
    code = "import blip3o_fast, torch; torch.ops.blip3o_fast.swiglu"
    log = run(["-X", "importtime", "-c", code]).stderr
    names = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in log.splitlines()}
    assert "blip3o_fast" in names and not names & {"triton", "transformers"}


def test_loading_and_sampling_leave_the_compiler_of_torch_alone(tmp_path):
    small_model().save_pretrained(tmp_path)
    code = (
        "import sys, torch; from blip3o_fast import BLIP3oDiT\n"
        f"model = BLIP3oDiT.from_pretrained({str(tmp_path)!r})\n"
        "config = model.config\n"
        "eva = torch.zeros(1, config.num_tokens, config.eva_embedding_size)\n"
        "assert model.generate(eva, 1).isfinite().all()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert run(["-c", code]).stdout == "False\n"
