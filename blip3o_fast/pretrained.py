"""The model as people use it: the network with ``generate``, ``save_pretrained`` and their kin."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from blip3o_fast.checkpoint import (
    CONFIG_NAME,
    SOLVER_NAME,
    check_tensors,
    load_checkpoint,
    locate_checkpoint,
    save_checkpoint,
)
from blip3o_fast.devices import no_values
from blip3o_fast.flow import Callback, FittedSolver, load_solvers, save_solvers
from blip3o_fast.installation import install
from blip3o_fast.model import DiT
from blip3o_fast.model_card import make_card, write_card
from blip3o_fast.sampling import PlanOptions, SamplingPlan
from blip3o_fast.untrusted import reading


class BLIP3oDiT(DiT):
    """BLIP3-o DiT: EVA-CLIP tokens ``[B, N, E]`` to CLIP tokens ``[B, N, C]``.

    Examples:
        >>> model = BLIP3oDiT(DiTConfig.preset("base"))
        >>> clip = model.generate(eva_features=eva, num_inference_steps=50)
    """

    def generate(
        self,
        eva_features: Tensor,
        num_inference_steps: int = 50,
        use_heun: bool = True,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        solver: str | FittedSolver | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        **options: Unpack[PlanOptions],
    ) -> Tensor:
        """Sample CLIP tokens by integrating the velocity from noise to data.

        One Euler step gives the conditional mean, the best answer for cosine and squared error;
        many steps give a sample. Runs without gradients and without dropout; the state is fp32.

        What sampling needs is kept from call to call: packed weights, tables and CUDA graphs.

        Args:
            eva_features: ``[B, N, E]``, finite, on the model's device. Where they begin with a CLS
                token that the model has not, ``[B, N + 1, E]``, it is left out, as in training.
            num_inference_steps: S, at least 1.
            use_heun: Heun (two evaluations a step) rather than Euler, unless ``solver`` says.
            guidance_scale: weight of the condition over the empty condition; 1 is no guidance.
            generator: source of the noise; a CPU generator gives the same noise on any device.
            noise: ``[B, N, C]`` to start from, instead of drawing it.
            seeds: one per sample, instead of a generator: a sample's noise then depends on its own
                seed alone, not on its batch.
            solver: a name of ``flow.SOLVERS``, or ``fitted``: the solver that was fitted to this
                model for S evaluations (``fit_solver``).
            progress: show a bar of steps.
            callback: called with (step, state) after each step.
            **options: ``time_grid``, ``dtype``, ``impl``, ``graph``, ``compile`` and
                ``working_memory`` of ``SamplingPlan``.

        Returns:
            ``[B, N, C]`` in the dtype of ``eva_features``, divided by ``simple_scale_factor``.

        Raises:
            ValueError: on a wrong shape, dtype, device, NaN or option, saying what was expected.
        """
        plan = SamplingPlan(
            self,
            steps=num_inference_steps,
            solver=solver or ("heun" if use_heun else "euler"),
            guidance_scale=guidance_scale,
            **options,
        )
        return plan(eva_features, noise, generator, seeds, progress, callback)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        shards: str | Path | None = None,
        report: str | Path | None = None,
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` under the published parameter names, the
        fitted solvers, and a model card, ``README.md``. A card of your own is kept.

        Args:
            folder: is made if need be.
            shards: folder of the embeddings that the model was trained on; the card then names the
                encoders and the data.
            report: ``report.json`` of ``blip3o-fast evaluate``; the card then has its results,
                beside those of the baselines.

        Raises:
            FileNotFoundError: if shards or report are not there.
            ValueError: if they are damaged. Nothing is written then.
        """
        count = self.get_num_parameters()
        card = make_card(self.config, count, self.fitted, shards=shards, report=report)
        save_checkpoint(folder, self.config, self.state_dict())
        if self.fitted:
            save_solvers(folder, self.fitted)
        write_card(folder, card)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "BLIP3oDiT":
        """Load a model in evaluation mode.

        Args:
            path: our folder, training run or its ``latest`` or ``best``, a published ``.pt`` file
                or a folder of them, or a hub repository ``hf:owner/name`` (needs the extra
                ``hub``); ``owner/name`` is looked for on the disk first, and the log says which.
            num_attention_heads, num_key_value_heads: for a ``.pt`` file that comes without its
                configuration.
            revision: of a hub repository.
            device: where to put the parameters.
            dtype: None keeps the stored one.

        Raises:
            FileNotFoundError: if there is no checkpoint at ``path``.
            ValueError: if it is damaged or does not fit its configuration.
        """
        checkpoint = load_checkpoint(
            path,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            revision=revision,
        )
        fits = reading(checkpoint.folder / CONFIG_NAME, "the configuration of a model")
        with fits, no_values():
            model = cls(checkpoint.config)
        check_tensors(checkpoint.config, model.state_dict(), checkpoint.tensors)
        model.load_state_dict(checkpoint.tensors, assign=True)
        model.rotary.to_empty(device="cpu")  # is in no checkpoint
        if (checkpoint.folder / SOLVER_NAME).is_file():
            model.fitted = load_solvers(checkpoint.folder)
        return model.to(device=device, dtype=dtype).eval()

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = True,
        shards: str | Path | None = None,
        report: str | Path | None = None,
    ) -> str:
        """Upload what ``save_pretrained`` writes; returns the address of the commit.

        Args:
            repository: ``owner/name``, made if need be. Its card is replaced.
            private: whether a new repository is.
            shards, report: of ``save_pretrained``.

        Raises:
            ImportError: without huggingface_hub.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise ImportError(f"push_to_hub needs huggingface_hub: {install('hub')}") from None
        from tempfile import TemporaryDirectory

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, shards=shards, report=report)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))


def newest_run(folder: Path) -> Path:
    """The training run that is a folder, or the newest of those in it.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = [folder, *folder.glob("*/")]
    for run in sorted(runs, key=lambda run: (run == folder, _changed(run)), reverse=True):
        try:
            locate_checkpoint(run)
        except (FileNotFoundError, ValueError):
            continue
        return run
    raise FileNotFoundError(
        f"path: expected a checkpoint, got none, and there is no training run in ./{folder}; pass "
        "its folder"
    )


def _changed(folder: Path) -> float:
    return folder.stat().st_mtime if folder.exists() else 0.0


def load_trained_model(
    path: str | Path | None = None,
    *,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> BLIP3oDiT:
    """``BLIP3oDiT.from_pretrained`` under the name that the published README uses.

    Without a path it loads the run in ``./checkpoints``, or the newest run below that folder.
    """
    return BLIP3oDiT.from_pretrained(
        newest_run(Path("checkpoints")) if path is None else path,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        revision=revision,
        device=device,
        dtype=dtype,
    )
