"""A training step, and the loader that feeds it."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import has_impl
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.config import DiTConfig
from blip3o_fast.data import EmbeddingDataset, Manifest, SampleRecord, ShardWriter, Split
from blip3o_fast.data.loader import Loader
from blip3o_fast.ops import Impl
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.training import TrainingOptions
from blip3o_fast.training.run import prepare as make_plan
from blip3o_fast.training.step import OptimizerStep
from blip3o_fast.training.trainer import Trainer

BATCHES_AHEAD = 4
"""A sample of the loader reads this many times what it keeps ready: the rest was not ready."""


def training_cases(
    shape: Shape, dtype: str, device: torch.device, *, compiled: bool
) -> Iterator[Case]:
    """A whole optimizer step on a batch in memory: draws, forward, loss, backward, clipping, AdamW.

    ``dtype`` is that of autocast; weights and optimizer state are fp32. On a GPU also by the CUDA
    C++ kernels, where they are built, and with every op by plain PyTorch.
    """
    needed = step_work(shape, DTYPES[dtype].itemsize)
    task = Task("training", "step", shape.name, dtype, needed, shape.batch)

    prepare = partial(prepare_step, shape, dtype, device)
    contenders = [Contender("trainer", prepare)]
    if compiled:
        contenders.append(Contender("trainer, torch.compile", partial(prepare, compile_it=True)))
    if device.type == "cuda":
        cuda = {
            op: Impl.CUDA
            for op in ("sandwich_norm", "sandwich_join", "rope", "swiglu")
            if has_impl(Impl.CUDA, op, DTYPES[dtype], device, gradients=True)
        }
        if cuda:
            contenders.append(Contender("trainer, CUDA C++", partial(prepare, **cuda)))
        reference = partial(prepare, Impl.REFERENCE)
        contenders.append(Contender("reference", reference, False))
        if compiled:
            tuned = partial(reference, compile_it=True)
            contenders.append(Contender("reference, torch.compile", tuned, False))
    yield Case(task, tuple(contenders))


def step_work(shape: Shape, size: int) -> work.Work:
    """Of an optimizer step; ``size`` bytes an element of activations."""
    with torch.device("meta"):
        parameters = BLIP3oDiT(shape.config).get_num_parameters()
    return work.training_step(shape, parameters, size)


def prepare_step(
    shape: Shape,
    dtype: str,
    device: torch.device,
    impl: Impl | None = None,
    *,
    compile_it: bool = False,
    **per_op: Impl,
) -> Prepared:
    """A trainer between two steps, its ops by ``impl`` but for the exceptions in ``per_op``."""
    folder = tempfile.TemporaryDirectory(prefix="blip3o-fast-bench-")
    shards = Path(folder.name) / "shards"
    write_shards(shards, shape.config, 2 * shape.batch + 8, held_out=4)
    options = TrainingOptions(
        chunked_embeddings_dir=str(shards),
        output_dir=str(Path(folder.name) / "run"),
        model_size=shape.preset,
        batch_size=shape.batch,
        max_steps=1000,
        precision=dtype,  # pyright: ignore[reportArgumentType]
        device=device.type,  # pyright: ignore[reportArgumentType]
        compile=compile_it,
        progress=False,
    )
    trainer = Trainer(make_plan(options, World()), World())
    trainer.model.train()
    trainer.model.set_impl(impl, **per_op)
    # Made again, for it takes the implementation of the loss from the model.
    take_step = OptimizerStep(trainer.plan, trainer.world, trainer.parallel, trainer.state)
    batch = next(trainer.loader)
    step = iter(range(1000))

    def close() -> None:
        trainer.loader.close()
        folder.cleanup()

    return Prepared([lambda: take_step(batch, next(step))], kernel=False, close=close)


def loader_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A batch of a loader that does nothing else, from shards in bf16 that the page cache holds:
    copies, checks and transfers, not the disk.

    Loaders read ahead, so each is timed by itself, over many more batches than it keeps ready.
    """
    config = shape.config
    widths = config.eva_embedding_size + config.clip_embedding_size
    delivered = 2 * shape.batch * shape.tokens * widths
    needed = work.Work(transfer=delivered)
    task = Task("loader", "batch", shape.name, "bf16", needed, shape.batch)
    for threads in (1, 2) if device.type == "cpu" else (1, 2, 4, 8):
        name = f"{threads} thread{'s' * (threads > 1)}"
        prepare = partial(_prepare_loader, shape, device, threads)
        yield Case(task, (Contender(name, prepare),))


def _prepare_loader(shape: Shape, device: torch.device, threads: int) -> Prepared:
    folder = tempfile.TemporaryDirectory(prefix="blip3o-fast-bench-")
    write_shards(Path(folder.name), shape.config, max(4 * shape.batch, 32), held_out=0)
    dataset = EmbeddingDataset(folder.name)
    loader = Loader(dataset, batch_size=shape.batch, seed=0, device=device, workers=threads)
    batches = BATCHES_AHEAD * loader.prefetch

    def read() -> None:
        for _ in range(batches):
            next(loader)

    def close() -> None:
        loader.close()
        folder.cleanup()

    return Prepared([read], kernel=False, per_call=batches, close=close)


def write_shards(
    folder: Path,
    config: DiTConfig,
    samples: int,
    *,
    held_out: int,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Random paired embeddings in bf16; about ``held_out`` of them are for validation.

    ``scales`` are the standard deviations of EVA and of CLIP embeddings.
    """
    facts = Manifest(
        tokens=config.num_tokens,
        has_cls=False,
        grid=config.patches,
        eva_width=config.eva_embedding_size,
        clip_width=config.clip_embedding_size,
        dtype="bf16",
        split=Split(held_out / samples),
    )
    with ShardWriter(folder, facts=facts) as writer:
        for i in range(samples):
            eva = scales[0] * torch.randn(1, config.num_tokens, config.eva_embedding_size)
            clip = scales[1] * torch.randn(1, config.num_tokens, config.clip_embedding_size)
            writer.add(eva, clip, [SampleRecord(f"sample{i}", "", f"photo{i}")])
