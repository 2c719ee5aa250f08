"""`pl`, `pltpu` and `plgpu`: jax's Pallas, imported as soon as one of its names is used, since that takes a tenth of a second."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas import triton as plgpu
else:

    class _Later:
        def __init__(self, module: str):
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    _PALLAS = "jax.experimental.pallas"
    pl, pltpu, plgpu = _Later(_PALLAS), _Later(f"{_PALLAS}.tpu"), _Later(f"{_PALLAS}.triton")

__all__ = ["pl", "plgpu", "pltpu"]
