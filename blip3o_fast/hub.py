"""Where a model is: a path on this machine, or a repository of the Hugging Face hub.

``hf:owner/name`` is a repository, and a ``Path`` is a path. A bare text ``owner/name`` is what the
ecosystem's ``from_pretrained`` takes: what lies there on the disk, or else the repository; the log
says which. On a command line nothing is bare (``typed``): a misspelt path downloads nothing.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from blip3o_fast.installation import install

PREFIX = "hf:"
EVA_REPOSITORY = f"{PREFIX}BAAI/EVA-CLIP-8B"
CLIP_REPOSITORY = f"{PREFIX}openai/clip-vit-large-patch14"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_log = logging.getLogger(__name__)


def typed(text: str) -> str | Path:
    """What somebody typed as a model: a path, unless it begins with ``hf:``."""
    return text if text.startswith(PREFIX) else Path(text)


def repository(given: str | Path) -> str | None:
    """The repository, ``owner/name``, that is meant; None for a path.

    Raises:
        ValueError: if ``hf:`` is followed by something else.
    """
    if isinstance(given, Path):
        return None
    name = given.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        if name != given:
            raise ValueError(f"{given}: expected {PREFIX}owner/name")
        return None
    if name == given and Path(name).exists():
        _log.info("%s: taken from the disk, %s", name, Path(name).resolve())
        return None
    if name == given:
        _log.warning("%s: no such path here; taking the hub's repository %s%s", name, PREFIX, name)
    return name


def download(name: str, revision: str | None, patterns: Sequence[str], extra: str) -> Path:
    """The folder of a repository's files that match ``patterns``, from the hub or its cache.

    Raises:
        ImportError: without huggingface_hub, naming the extra.
        OSError: if the repository cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{PREFIX}{name}: the hub needs huggingface_hub: {install(extra)}"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of whichever library it asks the network with
        raise OSError(
            f"{PREFIX}{name}: expected the hub or its cache to have it, got "
            f"{type(error).__name__}: {error}; a folder with its files does as well"
        ) from error
