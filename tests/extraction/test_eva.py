"""The EVA tower: recorded outputs, token order, and loading from folders of shards."""

import json
import pickle
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "k_bias": False,
}


def golden(name):
    with safe_open(GOLDEN / f"eva_tower_{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["vision_config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if "weights." in k}
    return config, weights, tensors["pixel_values"], tensors["last_hidden_state"]


def random_weights(rms_norm=False):
    tower = EVAVisionTower(EVAVisionConfig.from_published(CONFIG, use_rms_norm=rms_norm))
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"vision_model.{k}": torch.randn(v.shape, generator=generator) / 3
        for k, v in tower.state_dict().items()
    }
    others = {"text_model.x": torch.ones(3), "vision_model.post_layernorm.weight": torch.ones(8)}
    return {**weights, **others, "vision_model.embeddings.position_ids": torch.arange(37)}


def pixels(config):
    side = config["image_size"]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["prenorm", "postnorm"])
def test_recorded_outputs(name, device):
    config, weights, pixel_values, expected = golden(name)
    tower = EVAVisionTower.from_published(weights, config).to(device)
    got = tower(pixel_values.to(device)).cpu()
    assert got.shape == (2, 17, 48)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_patches_are_row_major_after_cls():
    """Layers that add nothing and patches that sum their pixels leave the image readable."""
    weights = {k: torch.zeros_like(v) for k, v in random_weights().items()}
    weights["vision_model.embeddings.patch_embedding.weight"] += 1
    weights["vision_model.embeddings.class_embedding"] -= 1
    tower = EVAVisionTower.from_published(weights, CONFIG)
    image = torch.zeros(1, 3, 24, 24)
    row, column = 2, 5
    image[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1
    expected = torch.zeros(1, 37, 8)
    expected[:, 0] = -1
    expected[:, 1 + 6 * row + column] = 3 * 4 * 4
    assert torch.equal(tower(image), expected)


def test_rms_norm_where_the_weights_have_no_norm_biases():
    weights = random_weights(rms_norm=True)
    assert "vision_model.encoder.layers.0.layer_norm1.bias" not in weights
    by_keys = EVAVisionTower.from_published(weights, CONFIG)
    by_config = EVAVisionTower.from_published(weights, {**CONFIG, "use_rms_norm": True})
    x = pixels(CONFIG)
    assert torch.equal(by_keys(x), by_config(x))
    norm = by_keys.encoder["layers"].get_submodule("0").layer_norm1
    u = torch.randn(3, 8)
    expected = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(u), expected)
    with pytest.raises(ValueError, match=r"layer_norm1\.bias.*missing"):
        EVAVisionTower.from_published(weights, {**CONFIG, "use_rms_norm": False})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_rope", True),
        ("rope", {"theta": 10_000}),
        ("pruned_heads", {"0": [1]}),
        ("ls_init_value", 1e-5),
        ("something_new", 0),
    ],
)
def test_a_field_that_changes_the_result_is_refused_by_name(tmp_path, name, value):
    config = {**CONFIG, name: value}
    with pytest.raises(ValueError, match=f"vision_config: {name}: expected a tower without it"):
        EVAVisionTower.from_published(random_weights(), config)
    folder = save_folder(tmp_path / "eva", random_weights(), "safetensors", config)
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}"):
        EVAVisionTower.from_pretrained(folder)


def test_fields_of_training_and_of_text_change_nothing():
    transformers = pytest.importorskip("transformers")
    weights, x = random_weights(), pixels(CONFIG)
    others = {"use_rope": False, "pruned_heads": {}, "dropout": 0.1, "model_type": "a", "new": None}
    generic = transformers.PretrainedConfig().to_dict()
    tower = EVAVisionTower.from_published(weights, {**generic, **CONFIG, **others})
    assert torch.equal(tower(x), EVAVisionTower.from_published(weights, CONFIG)(x))


def test_given_tensors_are_used_uncopied():
    weights = random_weights()
    tower = EVAVisionTower.from_published(weights, CONFIG)
    for key, parameter in tower.state_dict().items():
        assert parameter.data_ptr() == weights[f"vision_model.{key}"].data_ptr()


def save_folder(folder, weights, form, config=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vision_config": config, "text_config": {}}))
    keys = sorted(weights)
    halves = [keys[::2], keys[1::2]]
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "old bin":
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        name = "model" if form == "safetensors shards" else "pytorch_model"
        end = "safetensors" if form == "safetensors shards" else "bin"
        write = save_file if end == "safetensors" else torch.save
        for n, half in enumerate(halves):
            write({k: weights[k] for k in half}, folder / f"{name}-{n}.{end}")
        index = {k: f"{name}-{n}.{end}" for n, half in enumerate(halves) for k in half}
        (folder / f"{name}.{end}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "old bin", "safetensors shards", "bin shards"]
)
def test_from_pretrained(tmp_path, form):
    weights = random_weights()
    folder = save_folder(tmp_path / "eva", weights, form)
    x = pixels(CONFIG)
    tower = EVAVisionTower.from_pretrained(folder)
    assert torch.equal(tower(x), EVAVisionTower.from_published(weights, CONFIG)(x))
    assert tower.revision.startswith("local-")
    half = EVAVisionTower.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(x.bfloat16()).float(), tower(x), rtol=0.1, atol=0.1)


def test_safetensors_are_preferred_and_revision_follows_the_files(tmp_path):
    folder = save_folder(tmp_path / "eva", random_weights(), "safetensors")
    first = EVAVisionTower.from_pretrained(folder).revision
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert EVAVisionTower.from_pretrained(folder).revision == first
    (folder / "config.json").write_text(json.dumps({"vision_config": {**CONFIG, "k_bias": None}}))
    with pytest.raises(ValueError, match=r"k_proj\.bias.*missing"):
        EVAVisionTower.from_pretrained(folder)


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_pickle_with_a_payload_is_refused(tmp_path):
    folder = save_folder(tmp_path / "eva", random_weights(), "safetensors")
    (folder / "model.safetensors").unlink()
    for protocol in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))):
        protocol({"vision_model.x": Payload()}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a file of tensors"):
            EVAVisionTower.from_pretrained(folder)
    assert Payload.ran is False


def spoil_missing_weights(folder):
    (folder / "model.safetensors").unlink()


def spoil_missing_config(folder):
    (folder / "config.json").unlink()


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def spoil_truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_width(folder):
    (folder / "config.json").write_text(json.dumps({"vision_config": {**CONFIG, "patch_size": 6}}))


def spoil_heads(folder):
    fields = {**CONFIG, "num_attention_heads": 3}
    (folder / "config.json").write_text(json.dumps({"vision_config": fields}))


def spoil_no_heads(folder):
    fields = {k: v for k, v in CONFIG.items() if k != "num_attention_heads"}
    (folder / "config.json").write_text(json.dumps({"vision_config": fields}))


def spoil_layers(folder):
    fields = {**CONFIG, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps({"vision_config": fields}))


def spoil_index(folder):
    index = {"weight_map": {"vision_model.x": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_missing_weights, FileNotFoundError, "expected model.safetensors or pytorch_model"),
        (spoil_missing_config, FileNotFoundError, "expected config.json"),
        (spoil_config, ValueError, "config.json: expected JSON"),
        (spoil_truncated, ValueError, "expected complete weights"),
        (spoil_width, ValueError, r"expected shape \[8, 3, 6, 6\], got \[8, 3, 4, 4\]"),
        (spoil_heads, ValueError, r"num_attention_heads: expected a divisor of hidden_size \(8\)"),
        (spoil_no_heads, ValueError, "expected the field 'num_attention_heads'"),
        (spoil_layers, ValueError, "unexpected key 'vision_model.encoder.layers.1"),
        (spoil_index, ValueError, "expected file names inside the folder"),
    ],
)
def test_damaged_folders(tmp_path, spoil, error, message):
    folder = save_folder(tmp_path / "eva", random_weights(), "safetensors")
    spoil(folder)
    with pytest.raises(error, match=message):
        EVAVisionTower.from_pretrained(folder)


def test_wrong_pixels_and_no_such_folder():
    tower = EVAVisionTower.from_published(random_weights(), CONFIG)
    with pytest.raises(ValueError, match=r"pixel_values: expected shape \[B, c=3, h=24, w=24\]"):
        tower(torch.zeros(1, 3, 24, 20))
    with pytest.raises(FileNotFoundError, match="expected a folder of weights or a hub id"):
        EVAVisionTower.from_pretrained("no/such/folder")


@pytest.mark.parametrize("form", ["safetensors shards", "bin shards"])
def test_the_peak_is_one_tower_and_one_tensor(tmp_path, form):
    """28 M parameters: 106 MiB in files, 53 in half precision, 4 in the largest tensor."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc, which this system lacks")

    def anonymous():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    wide = {**CONFIG, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    shapes = EVAVisionTower(EVAVisionConfig.from_published(wide)).state_dict()
    weights = {f"vision_model.{k}": torch.zeros_like(v) for k, v in shapes.items()}
    folder = save_folder(tmp_path / "eva", weights, form, wide)
    del shapes, weights
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    tower = EVAVisionTower.from_pretrained(folder, dtype=torch.float16)
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in tower.parameters()) / 2**20
    assert size > 50
    assert peak[0] < size + 24


def test_weights_of_the_same_size_are_other_weights(tmp_path):
    folder = save_folder(tmp_path / "tower", random_weights(), "safetensors")
    first = EVAVisionTower.from_pretrained(folder)
    before = {name: x.clone() for name, x in first.state_dict().items()}
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert EVAVisionTower.from_pretrained(folder).revision != first.revision
    assert all(torch.equal(x, before[name]) for name, x in first.state_dict().items())


def test_a_hub_repository(tmp_path, monkeypatch):
    """The commit names the snapshot folder; .bin files are fetched only without safetensors."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    save_folder(tmp_path / commit, random_weights(), "bin shards")
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / commit)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    tower = EVAVisionTower.from_pretrained("owner/eva", revision="main")
    assert tower.revision == commit
    assert [(name, revision) for name, revision, _ in asked] == [("owner/eva", "main")] * 2
    assert [("*.bin" in patterns) for *_, patterns in asked] == [False, True]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install .*\[extract\]"):
        EVAVisionTower.from_pretrained("owner/eva")
