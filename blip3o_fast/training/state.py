"""Everything that an exact resume needs, and nothing twice.

``model.safetensors`` holds the weights for use: the averages if the run keeps any, and then
``trainer.pt`` holds the raw weights. With FSDP, raw weights, averages and the optimizer's moments
are in ``sharded/``, one shard per process, in the format of ``torch.distributed.checkpoint``, which
any number of processes can read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from blip3o_fast.atomic import PendingFile
from blip3o_fast.checkpoint import WEIGHTS_NAME, require_intact, save_checkpoint
from blip3o_fast.data.loader import Loader
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.seeds import stream_seed
from blip3o_fast.training.clipping import AdaptiveClipper
from blip3o_fast.training.ema import WeightAverage
from blip3o_fast.training.randomness import random_state, restore_random_state, seed_everything
from blip3o_fast.training.validation import Validation

FORMAT_VERSION = 1
STATE_NAME = "trainer.pt"
SHARDS_NAME = "sharded"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        validated: whether the validation due after that step, if any, was done.
        best: the best validation so far.
        seconds: of training before this process.
    """

    step: int = 0
    validated: bool = True
    best: Validation | None = None
    seconds: float = 0.0


@dataclass
class TrainingState:
    """The parts of a run that change as it trains; ``write`` and ``read`` are collective.

    Attributes:
        model: raw weights, possibly sharded.
        sharded: whether they are.
        seed: reseeds the generators if the number of processes changed.
    """

    model: BLIP3oDiT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clipper: AdaptiveClipper
    average: WeightAverage | None
    loader: Loader
    progress: Progress
    world: World
    device: torch.device
    seed: int
    sharded: bool

    def write(self, folder: Path) -> None:
        """Write a checkpoint's files into an existing folder, and flush them to the disk."""
        random = self.world.gather(random_state(self.device))
        weights = dict(self.model.named_parameters())
        if self.sharded:
            _write_shards(folder / SHARDS_NAME, self._shards())
        chosen = weights if self.average is None else self.average.averages
        usable = _on_host(chosen, keep=self.world.is_main)
        if not self.world.is_main:
            return
        save_checkpoint(folder, self.model.config, usable)
        averaged = self.average is not None and not self.sharded
        best = self.progress.best
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.progress.step,
            "validated": self.progress.validated,
            "best": None if best is None else best.to_dict(),
            "seconds": self.progress.seconds,
            "loader": self.loader.state_dict(),
            "optimizer": None if self.sharded else self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clipper": self.clipper.state_dict(),
            "average_updates": 0 if self.average is None else self.average.updates,
            "weights": {n: p.detach() for n, p in weights.items()} if averaged else None,
            "random": random,
        }
        with PendingFile(folder / STATE_NAME) as pending:
            torch.save(content, pending.file)

    def read(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if it is damaged or of another format.
        """
        damage = ""
        if self.world.is_main:
            try:
                require_intact(folder)
            except (OSError, ValueError) as error:
                damage = str(error)
        if self.world.agree(bool(damage)):
            damage = damage or f"{folder}: damaged"
            raise ValueError(f"{damage}; delete {folder.name} to resume before")
        try:
            saved = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
            usable = load_file(folder / WEIGHTS_NAME)
        except Exception as error:  # both raise many kinds for a damaged file
            reason = str(error).strip().splitlines()[:1]
            raise ValueError(f"{folder}: damaged ({reason}); delete it to resume before") from None
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder / STATE_NAME}: this library reads format {FORMAT_VERSION}, "
                f"got {saved.get('format_version')!r}"
            )
        if self.sharded:
            self._read_shards(folder / SHARDS_NAME, saved["average_updates"])
        else:
            self._read_whole(saved, usable)
        self.scaler.load_state_dict(saved["scaler"])
        self.clipper.load_state_dict(saved["clipper"])
        self.loader.load_state_dict(saved["loader"])
        best = saved["best"]
        self.progress.step = saved["step"]
        self.progress.validated = saved["validated"]
        self.progress.best = None if best is None else Validation.from_dict(best)
        self.progress.seconds = saved["seconds"]
        if len(saved["random"]) == self.world.size:
            restore_random_state(saved["random"][self.world.rank], self.device)
        else:
            seed_everything(stream_seed(self.seed, self.progress.step, self.world.rank))

    def _read_whole(self, saved: dict[str, Any], usable: dict[str, Tensor]) -> None:
        weights = saved["weights"] or usable
        self.model.load_state_dict(weights)
        for mine, theirs in zip(
            self.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True
        ):
            # The kind of update depends on the device of this run, not on that of the saved one.
            theirs.update({name: mine[name] for name in ("fused", "foreach") if name in mine})
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load(usable, saved["average_updates"])

    def _shards(self) -> dict[str, Any]:
        """The sharded tensors, by name; moments exist before the first step, too."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {
            "weights": dict(self.model.named_parameters()),
            "averages": {} if self.average is None else self.average.averages,
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def _read_shards(self, folder: Path, average_updates: int) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        shards = self._shards()
        with torch.no_grad():
            load(shards, checkpoint_id=folder)
        set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])
        if self.average is not None:
            self.average.updates = average_updates


def _write_shards(folder: Path, shards: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(shards, checkpoint_id=folder)
    except CheckpointException as error:  # not an Exception, so nothing else would catch it
        raise OSError(f"{folder.name}: {error}") from error


def _on_host(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, where ``keep`` says so; collective if they are sharded."""
    whole: dict[str, Tensor] = {}
    for name, x in tensors.items():
        full = x.full_tensor() if isinstance(x, DTensor) else x
        if keep:
            whole[name] = full.detach().cpu()
    return whole
