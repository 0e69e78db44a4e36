"""Checkpoints: what a folder, a published ``.pt`` file or a hub repository says about a model.

Our own are ``config.json`` and ``model.safetensors``. Parameter names and shapes are the published
ones in every case. Nothing is unpickled beyond what ``torch.load(weights_only=True)`` allows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.atomic import settle, temporary_path, write_json
from blip3o_fast.checked import read_json
from blip3o_fast.config import PRESETS, DiTConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SOLVER_NAME = "solver.json"
"""Solvers fitted to the model, see ``flow.fitted``."""
EXPERIMENT_NAME = "experiment_config.json"
POINTERS = ("best", "latest")
"""Files of a training run that name one of its checkpoints; a run itself means the first."""


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, the parameters that fit it, and the folder that they were found in."""

    config: DiTConfig
    tensors: dict[str, Tensor]
    folder: Path


def save_checkpoint(folder: str | Path, config: DiTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors``, each complete or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = published_names(tensors)
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    temporary = temporary_path(folder / WEIGHTS_NAME)
    try:
        save_file(plain, temporary, metadata={"format": "pt"})
        settle(temporary, folder / WEIGHTS_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(folder / CONFIG_NAME, config.to_dict(), indent=2)


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what ``DistributedDataParallel`` and ``torch.compile`` put into parameter names."""
    return {re.sub(r"^module\.|_orig_mod\.", "", name): x for name, x in tensors.items()}


def load_checkpoint(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a folder with ``config.json`` and ``model.safetensors``; a training run that points to
            one; a published ``checkpoint_step_N.pt``, or a folder of them (highest N); or a hub
            repository, ``owner/name``.
        num_attention_heads, num_key_value_heads: for a ``.pt`` file without a configuration beside
            it. Head counts cannot be read off the shapes of the weights, so they are never guessed.
        revision: of a hub repository.

    Raises:
        FileNotFoundError: if there is no checkpoint at ``path``.
        ValueError: if it is damaged, or its head counts are unknown.
    """
    found = locate_checkpoint(path, revision)
    if found.suffix == ".pt":
        return _read_published(found, num_attention_heads, num_key_value_heads)
    config = DiTConfig.from_dict(read_json(found / CONFIG_NAME))
    weights = found / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{found}: expected {WEIGHTS_NAME} beside {CONFIG_NAME}")
    try:
        return Checkpoint(config, published_names(load_file(weights)), found)
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged or truncated ({error}); copy it again") from None


def check_tensors(
    config: DiTConfig, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]
) -> None:
    """Raise ``ValueError`` on the first parameter that is missing, unknown or of another shape."""
    about = f"a model of hidden_size {config.hidden_size} and {config.num_hidden_layers} layers"
    for name, tensor in expected.items():
        if name not in got:
            raise ValueError(f"checkpoint: expected {name} for {about}, got no such parameter")
        if got[name].shape != tensor.shape:
            raise ValueError(
                f"checkpoint: {name}: expected {list(tensor.shape)} for {about}, "
                f"got {list(got[name].shape)}"
            )
    unknown = sorted(got.keys() - expected.keys())
    if unknown:
        raise ValueError(
            f"checkpoint: expected {len(expected)} parameters for {about}, "
            f"got {len(unknown)} more, such as {unknown[0]}"
        )


def locate_checkpoint(given: str | Path, revision: str | None = None) -> Path:
    """The ``.pt`` file, or the folder that holds ``config.json``; see ``load_checkpoint``."""
    path = Path(given)
    if path.is_file():
        if path.suffix == ".pt":
            return path
        if path.name in POINTERS:
            return _follow(path.parent, path.name)
        raise ValueError(
            f"{path}: expected a folder, a .pt file or a run's {' or '.join(POINTERS)}, "
            "got another kind of file"
        )
    if path.is_dir():
        if (path / CONFIG_NAME).is_file():
            return path
        for pointer in POINTERS:
            if (path / pointer).is_file():
                return _follow(path, pointer)
        return _newest_published(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):
        return _download(str(given), revision)
    raise FileNotFoundError(f"{given}: expected a checkpoint folder, a .pt file or owner/name")


def _follow(run: Path, pointer: str) -> Path:
    name = (run / pointer).read_text(encoding="utf-8").strip()
    target = run / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{run / pointer}: expected the name of a folder in the run, got {name!r}")
    if not (target / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{run / pointer}: points to {name}, which is no checkpoint")
    return target


def _newest_published(folder: Path) -> Path:
    steps = {
        int(match[1]): file
        for file in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint_step_(\d+)\.pt", file.name))
    }
    if not steps:
        raise FileNotFoundError(
            f"{folder}: expected {CONFIG_NAME}, a pointer file or checkpoint_step_N.pt, found none"
        )
    return steps[max(steps)]


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{repository}: no such folder here, and a hub repository needs "
            "huggingface_hub: pip install 'blip3o-fast[hub]'"
        ) from None
    patterns = [CONFIG_NAME, WEIGHTS_NAME, SOLVER_NAME]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def _read_published(file: Path, heads: int | None, kv_heads: int | None) -> Checkpoint:
    """A ``.pt`` of the published trainer: weights in ``model_state_dict``, no configuration."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file
        first = str(error).strip().splitlines()[:1]
        raise ValueError(f"{file}: expected a weights-only torch file ({first})") from None
    tensors = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if isinstance(tensors, dict):
        tensors = published_names({str(name): x for name, x in tensors.items()})
    if tensors is None or not isinstance(tensors.get("input_proj.weight"), Tensor):
        raise ValueError(f"{file}: expected model_state_dict of a BLIP3-o DiT, found none")
    recorded = _recorded_fields(file)
    heads = heads or recorded.get("num_attention_heads")
    kv_heads = kv_heads or recorded.get("num_key_value_heads")
    if not heads or not kv_heads:
        raise ValueError(
            f"{file}: head counts are not in the file; expected {EXPERIMENT_NAME} beside it, or "
            "num_attention_heads and num_key_value_heads (12 and 4 for base, 16 and 8 for large)"
        )
    known = DiTConfig().to_dict().keys()
    fields = {name: value for name, value in recorded.items() if name in known}
    fields |= shape_fields(tensors)
    fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Checkpoint(DiTConfig.from_dict(fields), tensors, file.parent)


def _recorded_fields(file: Path) -> dict[str, Any]:
    """What a published ``experiment_config.json`` beside the file says of the model."""
    path = file.parent / EXPERIMENT_NAME
    if not path.is_file():
        return {}
    experiment = read_json(path)
    size = str((experiment.get("args") or {}).get("model_size"))
    return {**PRESETS.get(size, {}), **(experiment.get("model_config") or {})}


def shape_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration fields that the shapes of published weights determine."""
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    hidden, clip = tensors["input_proj.weight"].shape
    adapter = "eva_adapter.residual_proj.weight" in tensors
    eva = tensors["eva_adapter.residual_proj.weight" if adapter else "eva_adapter.weight"]
    layers = [name for name in tensors if name.startswith("eva_adapter.adaptation_layers.")]
    return {
        "hidden_size": hidden,
        "clip_embedding_size": clip,
        "eva_embedding_size": eva.shape[1],
        "num_hidden_layers": len(blocks),
        "intermediate_size": tensors["blocks.0.mlp.gate_proj.weight"].shape[0],
        "max_position_embeddings": tensors["pos_embed"].shape[1],
        "use_sandwich_norm": "output_pre_norm.weight" in tensors,
        "use_eva_adapter": adapter,
        **({"eva_adapter_layers": len(layers) // 4} if adapter else {}),
        **({} if "blocks.0.layer_scale_1" in tensors else {"layer_scale_init_value": 0.0}),
    }
