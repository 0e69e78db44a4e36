"""CLIP's vision tower through transformers (4.57 or 5.x), imported when it is loaded.

The output is the last layer's, before ``post_layernorm`` and before the visual projection:
``[B, 3, 224, 224] -> [B, 257, 1024]`` for ViT-L/14 (arXiv:2103.00020), CLS first, patches
row-major.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blip3o_fast.axes import check_shape
from blip3o_fast.extraction.published_weights import CONFIG, find_weights, require_supported
from blip3o_fast.installation import install
from blip3o_fast.untrusted import reading

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
"""What transformers' CLIP reads of its configuration, beside what only training needs."""


class CLIPVisionTower(nn.Module):
    """A transformers ``CLIPVisionModel`` that returns its last hidden state.

    Attributes:
        image_size: side S of the image in pixels.
        grid: patches down and across.
        width: of a token.
        revision: commit of the hub repository, or the digest of a local folder.
    """

    def __init__(self, model: "CLIPVisionModel", revision: str = "") -> None:
        super().__init__()
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        self.image_size: int = config.image_size
        side: int = config.image_size // config.patch_size
        self.grid = (side, side)
        self.width: int = config.hidden_size
        self.revision = revision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Last hidden state ``[B, 3, S, S] -> [B, 1 + patches, C]``.

        Raises:
            ValueError: when the pixels have another shape.
        """
        side = self.image_size
        check_shape("pixel_values", pixel_values, "B c h w", c=3, h=side, w=side)
        return self.model(pixel_values=pixel_values).last_hidden_state

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "CLIPVisionTower":
        """Load the vision part of a CLIP checkpoint; the text part is not read.

        Args:
            path_or_hub_id: a folder, or a hub id such as ``hf:openai/clip-vit-large-patch14``.
            revision: commit, tag or branch of the hub repository.
            dtype, device: of the tower.

        Raises:
            ImportError: without transformers, naming the extra.
            FileNotFoundError: when the folder or its files are missing.
            ValueError: when the checkpoint lacks weights of the vision tower, or its configuration
                sets a field that transformers' CLIP does not read and that may change the result.
        """
        try:
            from transformers import CLIPVisionModel
            from transformers.utils import logging
        except ImportError:
            raise ImportError(f"the CLIP tower needs transformers: {install('extract')}") from None
        folder = find_weights(path_or_hub_id, revision)
        with reading(folder.path / CONFIG, "the configuration of these weights"):
            fields = folder.config.get("vision_config", folder.config)
            require_supported(fields, _FIELDS)
        verbosity = logging.get_verbosity()
        # It would list every weight of the text part, which is left out on purpose.
        logging.set_verbosity_error()
        try:
            loaded: Any = CLIPVisionModel.from_pretrained(
                folder.path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
        # transformers only warns about these, and leaves them random.
        model, facts = loaded
        wrong = sorted(map(str, [*facts["missing_keys"], *facts["mismatched_keys"]]))
        if wrong:
            raise ValueError(f"{path_or_hub_id}: expected CLIP's {wrong[0]}, missing or misshapen")
        return cls(model.to(device), folder.revision)
