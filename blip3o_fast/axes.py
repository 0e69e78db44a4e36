"""The axis legend, and the one check that speaks it.

B  batch                      H  query heads            E  EVA width (4096)
N  tokens of the state        K  key and value heads    C  CLIP width (1024)
M  tokens of the condition    d  head width             I  inner width of the MLP
D  hidden width               S  sampler steps          R  slopes of earlier evaluations

Shapes in docstrings and error messages are written with these letters, as in ``[B, N, D]``.
"""

from torch import Tensor


def check_shape(name: str, x: Tensor, axes: str, **sizes: int) -> None:
    """Raise ``ValueError`` unless ``x`` is a tensor with the axes named in ``axes``.

    ``axes`` is a space-separated list from the legend, ``"B N C"``; ``sizes`` fixes some of them.

    >>> check_shape("hidden_states", torch.zeros(2, 256, 1024), "B N C", C=1024)
    """
    letters = axes.split()
    is_tensor = isinstance(x, Tensor)
    fits = (
        is_tensor
        and x.dim() == len(letters)
        and all(
            letter not in sizes or sizes[letter] == size
            for letter, size in zip(letters, x.shape, strict=True)
        )
    )
    if not fits:
        expected = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
        if not is_tensor:
            kind = type(x).__name__
            raise ValueError(f"{name}: expected a tensor of shape [{expected}], got {kind}")
        raise ValueError(f"{name}: expected shape [{expected}], got {list(x.shape)}")
