"""The shell that torch.autograd puts around a registered op."""

from collections.abc import Callable
from typing import Any, cast

from torch.autograd.function import once_differentiable as _once_differentiable

once_differentiable = cast(Callable[[Callable[..., Any]], Any], _once_differentiable)
"""torch's own; typed so that ``backward`` may name its gradients, which torch's stubs forbid."""
