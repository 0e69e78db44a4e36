"""Published weights, in a local folder or a hub repository, read without running its code.

A folder holds ``config.json`` and one of, in this order of preference::

    model.safetensors.index.json      and the shards that its weight_map names
    model.safetensors
    pytorch_model.bin.index.json      and the shards that its weight_map names
    pytorch_model.bin

A ``.bin`` is a pickle: it is read with ``weights_only=True``, which refuses everything but tensors.
"""

import hashlib
import reprlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from blip3o_fast.atomic import file_sha256
from blip3o_fast.checked import read_json
from blip3o_fast.hub import download, repository
from blip3o_fast.untrusted import reading

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"

HARMLESS = frozenset(
    (
        # names, and what concerns other parts of the model
        *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version"),
        *("projection_dim", "id2label", "label2id", "problem_type", "finetuning_task"),
        *("task_specific_params", "tokenizer_class", "prefix", "tie_word_embeddings"),
        *("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"),
        *("cross_attention_hidden_size", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("sep_token_id", "decoder_start_token_id"),
        # training
        *("dropout", "attention_dropout", "drop_path_rate", "patch_dropout"),
        *("initializer_factor", "initializer_range", "gradient_checkpointing"),
        # how the same numbers are computed and returned
        *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss"),
        *("chunk_size_feed_forward", "attn_implementation", "_attn_implementation_autoset"),
        *("output_attentions", "output_hidden_states", "output_scores", "return_dict"),
        *("return_dict_in_generate", "use_cache"),
        # generation of text, which older versions of transformers wrote into every configuration
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
        *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length"),
        *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
        *("num_return_sequences", "remove_invalid_values", "repetition_penalty"),
        *("suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
    )
)
"""Fields of a vision tower's configuration that do not change its last hidden state."""
_WITHOUT_EFFECT: Mapping[str, Any] = {"pruned_heads": {}, "use_rope": False, "rope": False}
"""Fields that are not supported, and the value with which each does nothing."""


class PublishedFolder(NamedTuple):
    """A folder of weights: its parsed ``config.json``, its shards, and what identifies it."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Path, ...]
    revision: str


def find_weights(path_or_hub_id: str | Path, revision: str | None = None) -> PublishedFolder:
    """Locate published weights; a hub repository is downloaded, or found in the hub's cache.

    Args:
        path_or_hub_id: a folder, or ``hf:owner/name`` on the hub (needs the extra ``extract``);
            ``owner/name`` is looked for on the disk first.
        revision: commit, tag or branch of the hub repository; a local folder has none.

    Raises:
        FileNotFoundError: when there is no such folder, or it lacks its configuration or weights.
        ValueError: when a JSON file is malformed or names a file outside the folder.
        ImportError: when a hub id needs huggingface_hub, naming the extra.
    """
    folder, commit = Path(path_or_hub_id), None
    if (name := repository(path_or_hub_id)) is not None:
        folder = _download(name, revision)
        commit = folder.name
    elif not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder of weights or a hub id hf:owner/name")
    shards = _shards(folder)
    return PublishedFolder(folder, read_json(folder / CONFIG), shards, commit or digest(folder))


def require_supported(vision_config: Mapping[str, Any], supported: Iterable[str]) -> None:
    """Raise ``ValueError`` for a field that may change the result and is not implemented.

    Args:
        vision_config: as published; None counts as absent.
        supported: fields that the tower reads.
    """
    known = {*supported, *HARMLESS}
    for name, value in vision_config.items():
        idle = name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]
        if name not in known and value is not None and not idle:
            raise ValueError(
                f"vision_config: {name}: expected a tower without it, which this one does not "
                f"implement, got {reprlib.repr(value)}"
            )


def read_shards(folder: PublishedFolder, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors whose keys start with ``prefix``, one shard after another, on the CPU.

    Safetensors are read tensor by tensor and a ``.bin`` is mapped into memory, so a consumer that
    converts each tensor as it comes holds one copy of the weights.

    Raises:
        ValueError: when a shard is damaged or holds anything but tensors.
    """
    for shard in folder.shards:
        read = _read_safetensors if shard.suffix == ".safetensors" else _read_bin
        yield from read(shard, prefix)


def digest(folder: Path) -> str:
    """Identify a local folder by the contents of its configuration and weights."""
    facts = hashlib.sha256()
    for path in (folder / CONFIG, *_shards(folder)):
        facts.update(f"{path.name} {file_sha256(path)}\n".encode())
    return f"local-{facts.hexdigest()[:12]}"


def _shards(folder: Path) -> tuple[Path, ...]:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected {CONFIG} beside the weights, found none")
    for name in WEIGHTS:
        if (folder / f"{name}{_INDEX}").is_file():
            return _indexed(folder, folder / f"{name}{_INDEX}")
        if (folder / name).is_file():
            return (folder / name,)
    raise FileNotFoundError(f"{folder}: expected {' or '.join(WEIGHTS)} or an index of either")


def _indexed(folder: Path, index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map of keys to files")
    shards = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{index}: expected file names inside the folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: named by {index.name}, but missing")
        shards.append(folder / name)
    return tuple(shards)


def _read_safetensors(shard: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    with reading(shard, "complete weights; fetch it again"), safe_open(shard, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (the handle is no mapping)
            if key.startswith(prefix):
                yield key, file.get_tensor(key)


def _read_bin(shard: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    # Files of before torch 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(shard)
    with reading(shard, "a file of tensors"):
        tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict):
        raise ValueError(f"{shard}: expected a dict of tensors, got {type(tensors).__name__}")
    for key in list(tensors):
        tensor = tensors.pop(key)
        if isinstance(key, str) and key.startswith(prefix) and isinstance(tensor, Tensor):
            yield key, tensor


def _download(name: str, revision: str | None) -> Path:
    suffixes = [Path(name).suffix for name in WEIGHTS]
    for suffix in suffixes:
        patterns = [CONFIG, f"*{suffix}", f"*{suffix}{_INDEX}"]
        folder = download(name, revision, patterns, "extract")
        if any(folder.glob(f"*{suffix}")):
            return folder
    raise FileNotFoundError(f"{name}: expected files {' or '.join(suffixes)}, found none")
