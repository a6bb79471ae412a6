"""A base too large for one device: its decoder layers are shared out over processes and gathered when they run."""

from __future__ import annotations

from torch import distributed, nn

from vifamily.errors import ConfigError
from vifamily.llm._layers import StackedAdapter
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.manifest import base_digest

__all__ = ["shard_base"]


def shard_base(model: StackedCausalLM) -> StackedCausalLM:
    """Share out the frozen weights of each decoder layer over all processes, by FSDP2.

    Adapters, the embedding and the output head stay whole in every process. Adapters are then averaged, clipped and
    saved as ever, and the trainers take the model as they take any. A layer is gathered before it runs, forward and
    backward, so that all processes must evaluate the same number of micro-batches.

    Args:
        model: The ensemble; changed in place. Call this before a trainer is made.

    Returns:
        The model.

    Raises:
        ConfigError: If there is one process only, or no layers are found.

    Example:
        >>> model = shard_base(StackedCausalLM(base, config, 8))  # doctest: +SKIP
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        raise ConfigError("a base is shared out over processes, and there is one: start several with torchrun.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = _layers(model)
    model.known_digest = base_digest(model.base)  # afterwards each process has a part of the numbers
    mesh = init_device_mesh(model.device.type, (distributed.get_world_size(),))
    whole = set(model.adapter_parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    # processes average the gradients of adapters alone; the names are those of torch's DistributedDataParallel
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return model


def _layers(model: StackedCausalLM) -> list[nn.Module]:
    """Elements of the lists of layers that hold adapters; those below the first adapted one are shared out too."""
    for module in model.base.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(each, StackedAdapter) for each in module.modules()):
            return list(module)
    raise ConfigError(f"no list of layers with adapters was found in {type(model.base).__name__}.")
