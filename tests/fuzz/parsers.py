"""Every parser of files from outside: a whole file for it, how to damage it, and how it is read.

published_shard, coco_pickle    convert: pickles of the published implementation
array_tar, npy, npy_records     convert: tars and folders of arrays
manifest, shard, sidecar        folders of shards; done_rows: a sidecar of a writer that goes on;
                                verified: what a run remembers of them
config, weights, solver         a model's folder; marker: of a training checkpoint; pointer: to one;
                                drop_in_config: of the published class; saved_run: a run's options
published_pt, legacy_pt         published checkpoints; experiment: what stands beside them
options_json, options_toml      train --config; metrics: records of a run that goes on
webdataset, captions, image_*   extract: tars, texts, images; coco: annotations
tower_config, tower_weights, tower_bin, tower_index: published encoders
bench_record                    what bench wrote elsewhere

``coverage.py`` lists which functions of the library each of them runs.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, features
from published_files import coco_content, shard_content
from safetensors.torch import save_file
from small_data import small_config, small_model, small_report, write_shards

from blip3o_fast.atomic import file_sha256
from blip3o_fast.benchmarking.record import read_record
from blip3o_fast.checkpoint import MARKER, load_checkpoint, require_intact
from blip3o_fast.data import EmbeddingDataset, Manifest, ShardWriter, Wishes
from blip3o_fast.data.conversion import read_rows
from blip3o_fast.data.conversion_plan import open_sources, plan_conversion
from blip3o_fast.data.verified import VERIFIED_NAME, verify_once
from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower
from blip3o_fast.extraction.image_sources import coco_images, folder_images, webdataset_images
from blip3o_fast.extraction.images import UnreadableImage, load_rgb, to_pixels
from blip3o_fast.flow import FittedSolver, load_solvers
from blip3o_fast.model_card import make_card
from blip3o_fast.options.train import read_options_file
from blip3o_fast.pretrained import load_trained_model
from blip3o_fast.processes import World
from blip3o_fast.published import BLIP3oCLIPDiTConfig
from blip3o_fast.training import TrainingOptions
from blip3o_fast.training.checkpoints import complete_checkpoints
from blip3o_fast.training.run import _read_saved
from blip3o_fast.training.step_records import StepRecord
from blip3o_fast.training.summary import summarise
from blip3o_fast.training.tracking import MetricsFile, read_metrics
from blip3o_fast.training.validation import Validation
from tests.benchmarking.records import measurement, record
from tests.fuzz import mutate


class Parser(NamedTuple):
    """One parser.

    Attributes:
        seed: writes a whole folder and returns the file to damage.
        damage: ``(bytes, Random) -> bytes``.
        read: reads the folder as a command would.
    """

    seed: Callable[[Path], Path]
    damage: Callable
    read: Callable[[Path], object]


def convert(path: Path) -> None:
    plan = plan_conversion(open_sources(path), Wishes(grid=None))
    for source, picked in zip(plan.sources, plan.samples, strict=True):
        for row, _ in picked:
            read_rows(plan.facts, source, row, row + 1)


def published_shard(folder: Path) -> Path:
    path = folder / "embeddings_shard_00000.pkl"
    path.write_bytes(pickle.dumps(shard_content(2), protocol=4))
    return path


def coco_pickle(folder: Path) -> Path:
    path = folder / "coco_embeddings_consolidated.pkl"
    content = coco_content(2)
    content = {name: x.numpy() if hasattr(x, "numpy") else x for name, x in content.items()}
    path.write_bytes(pickle.dumps(content, protocol=5))
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def npy_bytes(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(shape, np.float32))
    return buffer.getvalue()


def array_tar(folder: Path) -> Path:
    members = {"k.eva.npy": npy_bytes((4, 6)), "k.clip.npy": npy_bytes((4, 5)), "k.txt": b"a"}
    return tar_of(folder / "a.tar", members)


def npy(folder: Path) -> Path:
    (folder / "clip.npy").write_bytes(npy_bytes((2, 4, 5)))
    (folder / "eva.npy").write_bytes(npy_bytes((2, 4, 6)))
    return folder / "eva.npy"


def npy_records(folder: Path) -> Path:
    npy(folder)
    lines = [{"key": f"k{i}", "caption": "c", "source": "p"} for i in range(2)]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def data_set(name: str) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        write_shards(folder, samples=12)
        return folder / name

    return seed


def verified(folder: Path) -> Path:
    write_shards(folder / "shards", samples=12)
    verify(folder)
    return folder / VERIFIED_NAME


def verify(folder: Path) -> None:
    entries = Manifest.load(folder / "shards").shards
    verify_once(folder / "shards", entries, folder, World())


def go_on_with_shards(folder: Path) -> None:
    ShardWriter(folder, facts=Manifest.load(folder), resume=True, part=None, merge=False)


def read_data_set(folder: Path) -> None:
    data = EmbeddingDataset(folder)
    data.read(range(len(data)))
    data.records(range(len(data)))


def model(name: str) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        small_model().save_pretrained(folder)
        FittedSolver(
            **{"labels": (0.0,), "lengths": (1.0,), "states": (1.0,), "slopes": ((1.0,),)},
            **{"clamp": None, "guidance_scale": 1.0, "conventions": "consistent", "weights": "a"},
            **{"dtype": "fp32", "reference": "heun", "conditions": (1, 1)},
            **{"error": 0.1, "fitted_error": 0.1},
        ).save(folder)
        return folder / name

    return seed


def marker(folder: Path) -> Path:
    step = folder / "step_3"
    model("config.json")(step)
    files = ("config.json", "model.safetensors")
    content = {
        "format_version": 1,
        "step": 3,
        "files": {name: (step / name).stat().st_size for name in files},
        "sha256": {name: file_sha256(step / name) for name in files},
    }
    (step / MARKER).write_text(json.dumps(content))
    return step / MARKER


def pointer(folder: Path) -> Path:
    model("config.json")(folder / "step_3")
    (folder / "latest").write_text("step_3\n")
    return folder / "latest"


def drop_in_config(folder: Path) -> Path:
    BLIP3oCLIPDiTConfig().save_pretrained(folder)
    return folder / "config.json"


def saved_run(folder: Path) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps({"options": {"batch_size": 4}, "data": "a"}))
    return path


def read_marked(folder: Path) -> None:
    complete_checkpoints(folder)
    require_intact(folder / "step_3")


def published_pt(*, legacy: bool = False) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        content = {
            "global_step": 1,
            "best": np.float64(0.5),
            "model_state_dict": small_model(conventions="published").state_dict(),
        }
        path = folder / "checkpoint_step_1.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        experiment = {
            "args": {"model_size": "base"},
            "model_config": {
                **{"num_attention_heads": 2, "num_key_value_heads": 1},
                **{"num_tokens": 6, "grid": [1, 2, 3]},
            },
        }
        (folder / "experiment_config.json").write_text(json.dumps(experiment))
        return path

    return seed


def experiment(folder: Path) -> Path:
    published_pt()(folder)
    return folder / "experiment_config.json"


def options_file(kind: str) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        path = folder / f"options.{kind}"
        values = {
            "chunked_embeddings_dir": "a",
            "output_dir": "b",
            "batch_size": 4,
            "grid": [1, 2, 3],
        }
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        path.write_text(json.dumps(values) if kind == "json" else "".join(lines))
        return path

    return seed


def read_options(folder: Path) -> None:
    (path,) = folder.iterdir()
    TrainingOptions.from_dict(read_options_file(path))


def metrics(folder: Path) -> Path:
    numbers = dict.fromkeys(StepRecord.__dataclass_fields__, 1.0)
    step = {"kind": "step", **numbers, "step": 1, "skipped": False}
    means = dict.fromkeys(Validation.__dataclass_fields__, 0.5)
    validation = {"kind": "validation", **means, "step": 2, "above": [0.5, 0.5, 0.5]}
    path = folder / "metrics.jsonl"
    lines = (step, {**step, "step": 2}, validation)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def go_on_with_metrics(folder: Path) -> None:
    MetricsFile(folder, 2, validated=True).close()
    summarise(read_metrics(folder), total_steps=3, batch_size=4, seconds=1.0)


def image(form: str) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        noise = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
        path = folder / f"a.{form.lower()}"
        Image.fromarray(noise).save(path, form)
        return path

    return seed


def decode(folder: Path) -> None:
    for ref in folder_images(folder):
        decode_one(ref.data)


def decode_one(data: Path | bytes | UnreadableImage) -> None:
    if not isinstance(data, UnreadableImage):
        try:
            to_pixels(load_rgb(data, max_pixels=1 << 20), 8)
        except UnreadableImage as reason:
            assert str(reason) and "\n" not in str(reason)


def webdataset(folder: Path) -> Path:
    data = image("PNG")(folder).read_bytes()
    (folder / "a.png").unlink()
    members = {"a.png": data, "a.txt": b"about a", "b.1.jpg": data, "c.heic": b"", "notes": b""}
    return tar_of(folder / "x.tar", members)


def read_webdataset(folder: Path) -> None:
    for ref in webdataset_images(str(folder / "x.tar")):
        decode_one(ref.data)


def captions(folder: Path) -> Path:
    image("PNG")(folder)
    path = folder / "a.txt"
    path.write_bytes("Hündchen am Fluß".encode("utf-16"))
    return path


def coco(folder: Path) -> Path:
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    path = folder / "annotations" / "captions_val2017.json"
    values = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}],
    }
    path.write_text(json.dumps(values))
    return path


def tower(name: str, kind: str) -> Callable[[Path], Path]:
    def seed(folder: Path) -> Path:
        values = {
            **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
            **{"num_attention_heads": 1, "image_size": 28, "patch_size": 14},
        }
        net = EVAVisionTower(EVAVisionConfig(**values))
        weights = {f"vision_model.{k}": torch.zeros_like(x) for k, x in net.state_dict().items()}
        if kind == "bin":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors")
        if kind == "index":
            index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"vision_config": values}))
        return folder / name

    return seed


def bench_record(folder: Path) -> Path:
    record(measurement(), measurement("peer", ours=False)).write(folder / "bench.json")
    return folder / "bench.json"


def card_results(folder: Path) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(small_report()))
    return path


def card_of(folder: Path) -> None:
    make_card(small_config(), 1, {}, report=folder / "report.json")


PARSERS = {
    "published_shard": Parser(published_shard, mutate.damage, convert),
    "coco_pickle": Parser(coco_pickle, mutate.damage, convert),
    "array_tar": Parser(array_tar, mutate.damage_tar, convert),
    "arrays_in_tar": Parser(array_tar, mutate.rewrap_tar, convert),
    "npy": Parser(npy, mutate.damage_npy, convert),
    "npy_records": Parser(npy_records, mutate.damage_lines, convert),
    "manifest": Parser(data_set("manifest.json"), mutate.damage_json, read_data_set),
    "shard": Parser(data_set("shard_00000.safetensors"), mutate.damage_safetensors, read_data_set),
    "sidecar": Parser(data_set("shard_00000.jsonl"), mutate.damage_lines, read_data_set),
    "done_rows": Parser(data_set("shard_00000.jsonl"), mutate.damage_lines, go_on_with_shards),
    "verified": Parser(verified, mutate.damage_json, verify),
    "config": Parser(model("config.json"), mutate.damage_json, load_trained_model),
    "weights": Parser(model("model.safetensors"), mutate.damage_safetensors, load_trained_model),
    "card_results": Parser(card_results, mutate.damage_json, card_of),
    "solver": Parser(model("solver.json"), mutate.damage_json, load_solvers),
    "marker": Parser(marker, mutate.damage_json, read_marked),
    "pointer": Parser(pointer, mutate.damage, load_trained_model),
    "drop_in_config": Parser(
        drop_in_config, mutate.damage_json, BLIP3oCLIPDiTConfig.from_pretrained
    ),
    "saved_run": Parser(
        saved_run, mutate.damage_json, lambda folder: _read_saved(folder / "run.json")
    ),
    "published_pt": Parser(published_pt(), mutate.damage_zip, load_trained_model),
    "legacy_pt": Parser(published_pt(legacy=True), mutate.damage, load_checkpoint),
    "experiment": Parser(experiment, mutate.damage_json, load_checkpoint),
    "options_json": Parser(options_file("json"), mutate.damage_json, read_options),
    "options_toml": Parser(options_file("toml"), mutate.damage, read_options),
    "metrics": Parser(metrics, mutate.damage_lines, go_on_with_metrics),
    "webdataset": Parser(webdataset, mutate.damage_tar, read_webdataset),
    "captions": Parser(captions, mutate.damage, decode),
    "coco": Parser(coco, mutate.damage_json, coco_images),
    "tower_config": Parser(
        tower("config.json", "one"), mutate.damage_json, EVAVisionTower.from_pretrained
    ),
    "tower_weights": Parser(
        tower("model.safetensors", "one"),
        mutate.damage_safetensors,
        EVAVisionTower.from_pretrained,
    ),
    "tower_index": Parser(
        tower("model.safetensors.index.json", "index"),
        mutate.damage_json,
        EVAVisionTower.from_pretrained,
    ),
    "tower_bin": Parser(
        tower("pytorch_model.bin", "bin"), mutate.damage_zip, EVAVisionTower.from_pretrained
    ),
    "bench_record": Parser(
        bench_record, mutate.damage_json, lambda folder: read_record(folder / "bench.json")
    ),
    **{
        f"image_{form.lower()}": Parser(image(form), mutate.damage, decode)
        for form in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
        if form != "AVIF" or features.check("avif")
    },
}
