"""Checkpoints: what a folder, a published ``.pt`` file or a hub repository says about a model.

Our own are ``config.json`` and ``model.safetensors``. Parameter names and shapes are the published
ones in every case. Nothing is unpickled beyond what ``torch.load(weights_only=True)`` allows.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_fast.atomic import file_sha256, settle, temporary_path, write_json
from blip3o_fast.checked import read_json
from blip3o_fast.config import PRESETS, DiTConfig
from blip3o_fast.hub import download, repository
from blip3o_fast.torch_files import read_torch_file, require_room
from blip3o_fast.untrusted import reading

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
SOLVER_NAME = "solver.json"
"""Solvers fitted to the model, see ``flow.fitted``."""
EXPERIMENT_NAME = "experiment_config.json"
MARKER = "COMPLETE"
"""Lists the files of a training checkpoint with their sizes and SHA-256."""
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
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(plain, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors lets nobody else read
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
            repository, ``hf:owner/name``, or ``owner/name`` where no such path is (see ``hub``).
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
    require_intact(found, CONFIG_NAME, WEIGHTS_NAME)
    with reading(found / CONFIG_NAME, "the configuration of a model"):
        config = DiTConfig.from_dict(read_json(found / CONFIG_NAME))
    weights = found / WEIGHTS_NAME
    if not weights.is_file():
        raise FileNotFoundError(f"{found}: expected {WEIGHTS_NAME} beside {CONFIG_NAME}")
    tensors = _read_weights(weights)
    _require_plausible(weights, config, tensors)
    return Checkpoint(config, tensors, found)


def content_digest(config: DiTConfig, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 that names a model by what it is, wherever it lies."""
    sha = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        sha.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        sha.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


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


def require_intact(folder: Path, *names: str) -> None:
    """Raise ``ValueError`` if files are not those that a training checkpoint's marker lists.

    Args:
        folder: a checkpoint; without a marker, or with an older one, nothing can be said.
        names: of the files; none means all.
    """
    marker = folder / MARKER
    recorded = read_json(marker).get("sha256") if marker.is_file() else None
    if not isinstance(recorded, dict):
        return
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in recorded and (not names or name in names):
            digest = file_sha256(path)
            if digest != recorded[name]:
                raise ValueError(
                    f"{path}: damaged: expected SHA-256 {str(recorded[name])[:12]}..., that of "
                    f"{MARKER}, got {digest[:12]}..."
                )


def locate_checkpoint(given: str | Path, revision: str | None = None) -> Path:
    """The ``.pt`` file, or the folder that holds ``config.json``; see ``load_checkpoint``."""
    if (name := repository(given)) is not None:
        return download(name, revision, (CONFIG_NAME, WEIGHTS_NAME, SOLVER_NAME), "hub")
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
    raise FileNotFoundError(
        f"{given}: expected a checkpoint folder, a .pt file or hf:owner/name, found none"
    )


def _follow(run: Path, pointer: str) -> Path:
    with reading(run / pointer, "the name of a folder in the run"):
        name = (run / pointer).read_bytes()[:256].decode().strip()
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


def _read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own and not mapped from the file."""
    with reading(file, "complete weights of a model; copy it again"):
        return published_names({name: x.clone() for name, x in load_file(file).items()})


def _read_published(file: Path, heads: int | None, kv_heads: int | None) -> Checkpoint:
    """A ``.pt`` of the published trainer: weights in ``model_state_dict``, no configuration."""
    content = read_torch_file(file)
    tensors = content.get("model_state_dict", content) if isinstance(content, dict) else None
    tensors = tensors if isinstance(tensors, dict) else {}
    tensors = published_names({str(name): x for name, x in tensors.items()})
    if not isinstance(tensors.get("input_proj.weight"), Tensor):
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
    with reading(file, "the weights of a BLIP3-o DiT"):
        fields |= shape_fields(tensors)
        fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        if not recorded:
            _require_preset_heads(file, fields)
        config = DiTConfig.from_dict(fields)
    _require_plausible(file, config, tensors)
    return Checkpoint(config, tensors, file.parent)


def _require_preset_heads(file: Path, fields: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for weights of a published size with the heads of another."""
    counts = ("num_attention_heads", "num_key_value_heads")
    for name, preset in PRESETS.items():
        same = ("hidden_size", "num_hidden_layers", "intermediate_size")
        if all(fields[field] == preset[field] for field in same):
            right, given = ([of[count] for count in counts] for of in (preset, fields))
            if right != given:
                raise ValueError(
                    f"{file}: num_attention_heads, num_key_value_heads: expected {right[0]} and "
                    f"{right[1]} for weights of the published size {name}, got {given[0]} and "
                    f"{given[1]}; other counts need {EXPERIMENT_NAME} beside the file"
                )


def _require_plausible(file: Path, config: DiTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` before anything is built that ``file``, with the weights, has not."""
    if not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{file}: expected tensors alone")
    elements = sum(x.numel() for x in tensors.values())
    require_room(file, elements)
    limits = {
        **dict.fromkeys(("num_hidden_layers", "eva_adapter_layers"), len(tensors)),
        **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), elements),
        **dict.fromkeys(("eva_embedding_size", "clip_embedding_size"), elements),
        "num_tokens": elements // config.head_dim,  # the rotary tables are no larger than the rest
    }
    for name, limit in limits.items():
        if getattr(config, name) > limit:
            raise ValueError(
                f"{file}: {name}: expected at most {limit} beside {elements} numbers in "
                f"{len(tensors)} tensors, got {getattr(config, name)}"
            )


def _recorded_fields(file: Path) -> dict[str, Any]:
    """What a published ``experiment_config.json`` beside the file says of the model."""
    path = file.parent / EXPERIMENT_NAME
    if not path.is_file():
        return {}
    with reading(path, "the configuration of a published experiment"):
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
