"""A training step, and the loader."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import has_impl
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.config import DiTConfig
from blip3o_fast.data import EmbeddingDataset, Manifest, SampleRecord, ShardWriter, Split
from blip3o_fast.data.dataset import Batch
from blip3o_fast.data.loader import Loader
from blip3o_fast.devices import no_values
from blip3o_fast.ops import OPS, Impl
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.training import TrainingOptions
from blip3o_fast.training.run import prepare as make_plan
from blip3o_fast.training.step import OptimizerStep
from blip3o_fast.training.trainer import Trainer

BATCHES_AHEAD = 4
"""A sample reads this many times the batches that the loader has ready, so most were not ready."""
DISTINCT = 8
"""How many samples of a case differ. To draw all of them would take longer than to write them."""
MOST_STEPS = 1000


class RandomShards:
    """A data set of random embeddings. It is written at first use and removed with this object.

    It has ``samples`` samples for training and one for validation.
    """

    def __init__(self, config: DiTConfig, samples: int) -> None:
        self.config, self.samples = config, samples
        self._folder: Path | None = None

    def folder(self) -> Path:
        """Where the shards are."""
        if self._folder is None:
            made = Path(tempfile.mkdtemp(prefix="blip3o-fast-bench-"))
            weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
            write_shards(made, self.config, self.samples + 1, held_out=1, distinct=DISTINCT)
            self._folder = made
        return self._folder


class Training:
    """A trainer and a batch in memory, made at first use and kept.

    ``dtype`` is that of autocast; weights and optimizer state are fp32.
    """

    def __init__(
        self, shape: Shape, dtype: str, device: torch.device, *, compile_it: bool = False
    ) -> None:
        self.shape, self.dtype, self.device, self.compile_it = shape, dtype, device, compile_it
        self._made: tuple[Trainer, Batch] | None = None

    def get(self) -> tuple[Trainer, Batch]:
        """A trainer whose loader is closed, and a batch of it."""
        if self._made is None:
            shards = RandomShards(self.shape.config, self.shape.batch)
            options = TrainingOptions(
                chunked_embeddings_dir=str(shards.folder()),
                output_dir=str(shards.folder() / "run"),
                model_size=self.shape.preset,
                batch_size=self.shape.batch,
                max_steps=MOST_STEPS,
                precision=self.dtype,  # pyright: ignore[reportArgumentType]
                device=self.device.type,  # pyright: ignore[reportArgumentType]
                compile=self.compile_it,
                progress=False,
            )
            trainer = Trainer(make_plan(options, World()), World())
            with trainer.loader:
                self._made = trainer, next(trainer.loader)
            trainer.model.train()
        return self._made


def training_cases(
    shape: Shape, dtype: str, device: torch.device, *, compiled: bool
) -> Iterator[Case]:
    """A whole optimizer step on a batch in memory: draws, forward, loss, backward, clipping, AdamW.

    ``dtype`` is that of autocast; weights and optimizer state are fp32. On a GPU there are also the
    CUDA C++ kernels, if they are built, and plain PyTorch. Contenders share one trainer, but each
    compiled one has its own.
    """
    needed = step_work(shape, DTYPES[dtype].itemsize)
    task = Task("training", "step", shape.name, dtype, needed, shape.batch)

    eager = partial(prepare_step, Training(shape, dtype, device))

    def tuned(impl: Impl | None = None) -> Prepared:
        return prepare_step(Training(shape, dtype, device, compile_it=True), impl)

    contenders = [Contender("trainer", eager)]
    if compiled:
        contenders.append(Contender("trainer, torch.compile", tuned))
    if device.type == "cuda":
        cuda = {
            name: Impl.CUDA
            for name, op in OPS.items()
            if op.cuda is not None
            and op.backward is not None
            and has_impl(Impl.CUDA, name, DTYPES[dtype], device, gradients=True)
        }
        if cuda:
            contenders.append(Contender("trainer, CUDA C++", partial(eager, **cuda)))
        contenders.append(Contender("reference", partial(eager, Impl.REFERENCE), False))
        if compiled:
            reference = partial(tuned, Impl.REFERENCE)
            contenders.append(Contender("reference, torch.compile", reference, False))
    yield Case(task, tuple(contenders))


def step_work(shape: Shape, size: int) -> work.Work:
    """The work of an optimizer step; ``size`` is the bytes of an element of activations."""
    with no_values():
        parameters = BLIP3oDiT(shape.config).get_num_parameters()
    return work.training_step(shape, parameters, size)


def prepare_step(training: Training, impl: Impl | None = None, **per_op: Impl) -> Prepared:
    """A step of a trainer, with its ops by ``impl``, except those in ``per_op``."""
    trainer, batch = training.get()
    trainer.model.set_impl(impl, **per_op)
    # A new one, because it takes the implementation of the loss from the model.
    take_step = OptimizerStep(trainer.plan, trainer.world, trainer.parallel, trainer.state)
    step = iter(range(MOST_STEPS))

    def call() -> object:
        trainer.model.set_impl(impl, **per_op)
        return take_step(batch, next(step))

    return Prepared([call], kernel=False)


def loader_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A batch of the loader, from bf16 shards in the page cache: copies, checks and transfers.

    Loaders read ahead. So each is timed alone, over many more batches than it has ready.
    """
    config = shape.config
    widths = config.eva_embedding_size + config.clip_embedding_size
    delivered = 2 * shape.batch * shape.tokens * widths
    needed = work.Work(transfer=delivered)
    task = Task("loader", "batch", shape.name, "bf16", needed, shape.batch)
    shards = RandomShards(config, max(shape.batch, 32))
    for threads in (1, 2) if device.type == "cpu" else (1, 2, 4, 8):
        name = f"{threads} thread{'s' * (threads > 1)}"
        prepare = partial(_prepare_loader, shards, shape.batch, device, threads)
        yield Case(task, (Contender(name, prepare),))


def _prepare_loader(
    shards: RandomShards, batch: int, device: torch.device, threads: int
) -> Prepared:
    dataset = EmbeddingDataset(shards.folder())
    loader = Loader(dataset, batch_size=batch, seed=0, device=device, workers=threads)
    batches = BATCHES_AHEAD * loader.prefetch

    def read() -> None:
        for _ in range(batches):
            next(loader)

    return Prepared([read], kernel=False, per_call=batches, close=loader.close)


def write_shards(
    folder: Path,
    config: DiTConfig,
    samples: int,
    *,
    held_out: int,
    scales: tuple[float, float] = (1.0, 1.0),
    distinct: int | None = None,
) -> None:
    """Random paired embeddings in bf16. The first ``held_out`` samples are for validation.

    ``scales`` are the standard deviations of EVA and of CLIP embeddings. The embeddings repeat
    after ``distinct`` samples; None: never. The keys are all different.
    """
    facts = Manifest(
        tokens=config.num_tokens,
        has_cls=False,
        grid=config.patches,
        eva_width=config.eva_embedding_size,
        clip_width=config.clip_embedding_size,
        dtype="bf16",
        split=Split(heldout_sources=tuple(f"photo{i}" for i in range(held_out))),
    )

    widths = facts.eva_width, facts.clip_width

    def draw() -> list[Tensor]:
        return [
            (scale * torch.randn(1, config.num_tokens, width)).bfloat16()
            for scale, width in zip(scales, widths, strict=True)
        ]

    repeated = [draw() for _ in range(distinct or 0)]
    with ShardWriter(folder, facts=facts) as writer:
        for i in range(samples):
            eva, clip = repeated[i % len(repeated)] if repeated else draw()
            writer.add(eva, clip, [SampleRecord(f"sample{i}", "", f"photo{i}")])
