"""What is used of Pyro; the only file that imports it, since its import switches torch's distribution validation on."""

from __future__ import annotations

import torch

_validates = torch.distributions.Distribution._validate_args
try:
    import pyro
    from pyro import poutine
    from pyro.distributions import Delta, Unit
    from pyro.distributions.util import scale_and_mask
    from pyro.infer import config_enumerate
    from pyro.ops.contract import contract_to_tensor
    from pyro.ops.rings import LogRing
    from pyro.poutine.enum_messenger import EnumMessenger
    from pyro.poutine.messenger import Messenger
    from pyro.poutine.subsample_messenger import _Subsample as Subsample
finally:
    torch.distributions.Distribution.set_default_validate_args(_validates)

__all__ = [
    "Delta",
    "EnumMessenger",
    "LogRing",
    "Messenger",
    "Subsample",
    "Unit",
    "config_enumerate",
    "contract_to_tensor",
    "poutine",
    "pyro",
    "scale_and_mask",
]
