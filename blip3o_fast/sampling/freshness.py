"""Whether a model's weights are still those that something was built from.

Every parameter is compared by address, version counter, dtype, device and shape: an optimizer
step, an EMA swap or ``load_state_dict`` raises the counter; ``.to`` and ``assign=True`` change the
address.

Writes through ``parameter.data`` raise no counter, so the middle element of every parameter is
compared too. Inference tensors have no counter at all; for them the norm of every parameter is
compared, which reads all of them once a call.

Costs 0.8 ms of one CPU core for base's 497 parameters.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Fingerprint(NamedTuple):
    """What is known of a model's weights; ``probes`` are views into them, ``seen`` their values."""

    facts: tuple[object, ...]
    probes: tuple[Tensor, ...]
    seen: Tensor

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the same weights, with the same values."""
        tensors = local_tensors(model)
        if self.facts != tuple(_facts(x) for x in tensors):
            return False
        return torch.equal(self.seen, _values(tensors, self.probes))


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the present weights."""
    tensors = local_tensors(model)
    probes = tuple(_middle(x) for x in tensors if x.numel())
    return Fingerprint(tuple(_facts(x) for x in tensors), probes, _values(tensors, probes))


def local_tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter, or this process's shard of it."""
    parameters = [p for module in model.modules() for p in module._parameters.values()]
    return [getattr(p, "_local_tensor", p).detach() for p in parameters if p is not None]


def _facts(x: Tensor) -> object:
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.dtype, x.device, x.shape, x.stride()


def _middle(x: Tensor) -> Tensor:
    return x[tuple(size // 2 for size in x.shape)]


def _values(tensors: list[Tensor], probes: tuple[Tensor, ...]) -> Tensor:
    """One element of each parameter, then norms of those without a version counter."""
    values = [*probes]
    unversioned = [x for x in tensors if x.is_inference()]
    if unversioned:
        values += [x.norm() for x in unversioned]
    return torch.stack(values)
