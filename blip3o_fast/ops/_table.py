"""The table of implementations that a model runs.

This module imports every op's module, which registers the op. A new file is therefore a new field.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._registration import OPS

for _module in iter_modules([str(Path(__file__).parent)]):
    if not _module.name.startswith("_"):
        import_module(f"blip3o_fast.ops.{_module.name}")


@dataclass
class ImplTable:
    """The implementation of each op of one model. None leaves the choice to ``resolve_impl``.

    ``rope_attention`` and ``gemm_swiglu`` are used by sampling only. With None, sampling runs the
    ops that they combine unless one kernel was measured to be faster; with ``Impl.REFERENCE``, it
    always does.
    """

    __annotations__ = dict.fromkeys(OPS, Impl | None)  # the fields; the defaults follow
    vars().update(dict.fromkeys(OPS))

    if TYPE_CHECKING:

        def __init__(self, *impls: Impl | None, **per_op: Impl | None) -> None: ...

        def __getattr__(self, op: str) -> Impl | None: ...

    def set(self, impl: Impl | None = None, **per_op: Impl | None) -> None:
        """Choose ``impl`` for every op, then the exceptions named in ``per_op``.

        Of ops that combine others, ``impl`` is for these others: one kernel must be asked for by
        name.
        """
        for name in per_op:
            if name not in OPS:
                raise ValueError(f"unknown op {name!r}; expected one of {', '.join(OPS)}")
        for name, op in OPS.items():
            default = Impl.REFERENCE if op.combines and impl is not None else impl
            setattr(self, name, per_op.get(name, default))
