"""Members as folders of adapters, with a manifest of the ensemble beside them."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vifamily.errors import CheckpointError, ConfigError
from vifamily.llm._bases import quantisation, quantised
from vifamily.llm._extra import pretrained, require
from vifamily.llm._layers import StackedLoRA
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm._targets import adapter_scale, features, is_linear, matching
from vifamily.llm.adapter_files import read_lora_config, read_tensors
from vifamily.llm.manifest import MANIFEST, Manifest, base_digest, file_digest, read_manifest, read_object, versions
from vifamily.llm.walsh import WalshCausalLM, WalshConfig
from vifamily.report import write_bytes, write_text

__all__ = ["export_lora", "export_merged", "load_members", "load_model", "save_members"]

_FILES = {
    "lora": ("adapter_model.safetensors", "adapter_config.json"),
    # other names than PEFT's: it must not take them for adapters that it knows
    "walsh_hadamard": ("walsh_hadamard.safetensors", "walsh_hadamard.json"),
}
"""Names of a member's weights and settings, by the kind of adapter."""
_PREFIX = "base_model.model."


def save_members(model: StackedCausalLM, folder: str | Path, *, training: Mapping[str, Any] | None = None) -> Manifest:
    """Save each member in a folder of its own, and ``ensemble.json`` last.

    LoRA members are in PEFT's format: ``PeftModel.from_pretrained(base, folder / "member_0")`` loads one without this
    package. Walsh-Hadamard members are in safetensors too, which PEFT cannot load. A folder whose writing was broken
    off has no manifest and is refused when it is read.

    Args:
        model: The ensemble.
        folder: Where to; made when it is missing, and what it held of an ensemble is replaced.
        training: How it was trained, for the manifest; plain values.

    Returns:
        The manifest.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    tensors = functools.partial(_member_tensors, model)
    return _write(model, Path(folder), model.adapter, tensors, _settings(model), dict(training or {}))


def load_members(model: StackedCausalLM, folder: str | Path, *, check_base: bool = True) -> Manifest:
    """Load saved members into an ensemble of the same form.

    Args:
        model: The ensemble; its adapters and weights are overwritten.
        folder: Where :func:`save_members` wrote.
        check_base: Whether the base must be the one that members were trained on.

    Returns:
        The manifest.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, or of an ensemble of another form or base.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.adapter != model.adapter:
        raise CheckpointError(f"{folder} holds adapters of the kind {manifest.adapter!r}, not {model.adapter!r}.")
    if manifest.num_members != model.num_members:
        raise CheckpointError(f"{folder} holds {manifest.num_members} members, the ensemble has {model.num_members}.")
    if check_base and manifest.base_digest != (model.known_digest or base_digest(model.base)):
        raise CheckpointError(
            f"the members in {folder} were trained on another base ({manifest.base or 'without a name'}) than the one "
            f"that is loaded ({getattr(model.config, '_name_or_path', '') or 'without a name'}). Load that base."
        )
    # all of them are read before the first is changed, so that a damaged one leaves the ensemble as it was
    members = [_read_member(model, folder, k) for k in range(model.num_members)]
    with torch.no_grad():
        for k, found in enumerate(members):
            for name, layer in model.adapters():
                for part, saved in zip(layer.trained, layer.saved, strict=True):
                    part[k].copy_(found[f"{_PREFIX}{name}.{saved}"])
        model.log_weight.copy_(torch.tensor(manifest.log_weights, dtype=torch.float64))
    return manifest


def _read_member(model: StackedCausalLM, folder: Path, k: int) -> dict[str, Tensor]:
    """Tensors of a saved member, once they are known to be those of this ensemble."""
    path = folder / f"member_{k}" / _FILES[model.adapter][0]
    found, wanted = read_tensors(path), _member_tensors(model, k)
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in wanted.items()}:
        raise CheckpointError(
            f"{path} has adapters of other layers or another rank than this ensemble: make it with the settings in "
            f"{path.parent / _FILES[model.adapter][1]}."
        )
    scale, scales = _saved_scale(path.parent, model.adapter), {float(layer.scale) for _, layer in model.adapters()}
    if not all(math.isclose(scale, own, rel_tol=1e-9) for own in scales):
        raise CheckpointError(
            f"the adapters in {path.parent} are scaled by {scale:g}, those of the ensemble by "
            f"{', '.join(f'{s:g}' for s in sorted(scales))}, and would be other adapters there: use the lora_alpha "
            "(walsh_scale) that they were trained with."
        )
    return found


def load_model(folder: str | Path, base: Any = None, **options: Any) -> StackedCausalLM:
    """Load a saved ensemble over its base.

    Args:
        folder: Where :func:`save_members` wrote.
        base: A loaded model, or its name or path; None takes what the manifest names.
        options: For ``AutoModelForCausalLM.from_pretrained``, where the base has to be loaded.

    Returns:
        The ensemble.

    Raises:
        CheckpointError: If the folder is incomplete or damaged, or the base is another one.
        ConfigError: If the manifest names no base and none is given.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    name = manifest.base if base is None else base
    if not name:
        raise ConfigError(f"{folder / MANIFEST} names no base: give base=, the model that members were trained on.")
    if isinstance(name, (str, Path)):
        told = manifest.training.get("quantisation")
        if isinstance(told, dict) and "quantization_config" not in options:
            # members fit the numbers that they were trained over
            options = {**quantised(told, torch.device("cuda" if torch.cuda.is_available() else "cpu")), **options}
        base = pretrained("AutoModelForCausalLM", str(name), "the base", **options)
    model: StackedCausalLM
    if manifest.adapter == WalshCausalLM.adapter:
        model = WalshCausalLM(base, _walsh_config(folder / "member_0"), manifest.num_members)
    elif manifest.adapter == StackedCausalLM.adapter:
        config = read_lora_config(folder / "member_0")
        config.inference_mode = False
        _check_rank(folder / "member_0", config.r)
        model = StackedCausalLM(base, config, manifest.num_members)
    else:
        known = ", ".join(_FILES)
        raise CheckpointError(f"{folder} holds adapters of the kind {manifest.adapter!r}; this version reads {known}.")
    load_members(model, folder)
    return model.eval()


def export_merged(model: StackedCausalLM, folder: str | Path) -> Path:
    """Save the mean change of the weights as one adapter, which is not the ensemble.

    The change of each layer is averaged over members by their weights. It has rank K r, and its predictions are not
    those of the mixture; for what can serve one adapter only, and labelled as what it is.

    Args:
        model: The ensemble.
        folder: Where to.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    folder = Path(folder)
    tensors, weight = {}, model.log_weight.exp()
    for name, layer in model.lora_adapters():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().flatten(0, 1).contiguous()
        wide = layer.lora_B.detach() * weight.to(layer.lora_B)[:, None, None]
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = wide.permute(1, 0, 2).flatten(1).contiguous()
    settings = json.loads(_settings(model))
    scale = next(model.adapters())[1].scale
    settings |= {
        "r": model.num_members * settings["r"],
        "lora_alpha": scale * model.num_members * settings["r"],
        "use_rslora": False,
    }
    save = require("safetensors.torch", "saving an adapter").save
    weights, config = _FILES[model.adapter]
    write_bytes(folder / weights, save(tensors, metadata={"format": "pt"}))
    write_text(folder / config, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_text(
        folder / "README.md",
        f"# Merged adapter, not the ensemble\n\nThis adapter is the mean change of the weights over the "
        f"{model.num_members} members of an ensemble. It predicts otherwise than their mixture, has no uncertainty, "
        "and where members disagree it may be worse than each of them.\n",
    )
    return folder


def export_lora(model: StackedCausalLM, folder: str | Path, *, r: int) -> list[float]:
    r"""Save the nearest ensemble of LoRA adapters of a rank, for what knows LoRA alone: PEFT, or servers such as vLLM.

    Each layer's change is cut to its r largest singular values, which is nearest in Frobenius norm. The change of a
    Walsh-Hadamard adapter has full rank, and what is cut off may be most of it: look at the errors, and score the
    result as an ensemble of its own. The changes are written out one by one, which for large layers takes a while.

    Args:
        model: The ensemble.
        folder: Where to; it is read by :meth:`Ensemble.from_pretrained <vifamily.llm.Ensemble.from_pretrained>`.
        r: Rank; where a layer has fewer inputs or outputs, what is left of the matrices is zero.

    Returns:
        For each member :math:`\|\Delta - \Delta_r\| / \|\Delta\|` over all layers, zero where nothing was changed.

    Raises:
        ConfigError: If the rank is out of range, or the folder cannot be written.
    """
    room = max(min(features(layer.base_layer)) for _, layer in model.adapters())
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= room:
        raise ConfigError(f"r must be an integer from 1 to {room}, the largest rank of a change, got {r!r}.")
    errors: list[float] = []

    def tensors(k: int) -> dict[str, Tensor]:
        found, cut, whole = {}, 0.0, 0.0
        for name, layer in model.adapters():
            left, value, right = torch.linalg.svd(layer.change(k).detach().double().cpu(), full_matrices=False)
            root = value[:r].sqrt()
            low, high = root.unsqueeze(1) * right[:r], left[:, :r] * root
            short = r - len(root)  # a smaller layer has zeros in what it does not need
            pair = pad(low, (0, 0, 0, short)), pad(high, (0, short))
            for saved, matrix in zip(StackedLoRA.saved, pair, strict=True):
                found[f"{_PREFIX}{name}.{saved}"] = matrix.to(layer.trained[0].dtype).contiguous()
            cut, whole = cut + float(value[r:].square().sum()), whole + float(value.square().sum())
        errors.append(math.sqrt(cut / whole) if whole else 0.0)
        return found

    config = require("peft", "exporting adapters").LoraConfig(r=r, lora_alpha=r)
    training = {"approximates": model.adapter, "relative_error": errors}
    _write(model, Path(folder), StackedCausalLM.adapter, tensors, _adapter_config(model, config), training)
    return errors


def _write(
    model: StackedCausalLM,
    folder: Path,
    adapter: str,
    tensors: Callable[[int], dict[str, Tensor]],
    settings: str,
    training: dict[str, Any],
) -> Manifest:
    """Write the folders of members, and the manifest last."""
    (folder / MANIFEST).unlink(missing_ok=True)
    weights, config = _FILES[adapter]
    save = require("safetensors.torch", "saving members").save
    files = {}
    for k in range(model.num_members):
        own = folder / f"member_{k}"
        write_bytes(own / weights, save(tensors(k), metadata={"format": "pt"}))
        write_text(own / config, settings)
        files[f"member_{k}/{weights}"] = file_digest(own / weights)
    told = quantisation(model.base)
    manifest = Manifest(
        num_members=model.num_members,
        weights=tuple(model.log_weight.exp().tolist()),
        log_weights=tuple(model.log_weight.tolist()),
        base=str(getattr(model.config, "_name_or_path", "") or ""),
        revision=getattr(model.config, "_commit_hash", None),
        base_digest=model.known_digest or base_digest(model.base),
        files=files,
        adapter=adapter,
        training={**training, **({} if told is None else {"quantisation": told})},
        versions=versions(),
    )
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _member_tensors(model: StackedCausalLM, k: int) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}{name}.{saved}": part[k].detach().cpu().contiguous().clone()
        for name, layer in model.adapters()
        for part, saved in zip(layer.trained, layer.saved, strict=True)
    }


def _settings(model: StackedCausalLM) -> str:
    if isinstance(model, WalshCausalLM):
        content = {"adapter": model.adapter, **model.adapter_config.plain()}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"
    return _adapter_config(model, model.adapter_config)


def _walsh_config(folder: Path) -> WalshConfig:
    path = folder / _FILES[WalshCausalLM.adapter][1]
    try:
        content = read_object(path)
        del content["adapter"]
        return WalshConfig(**content)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _saved_scale(folder: Path, adapter: str) -> float:
    """The scale that a member's settings say."""
    if adapter == WalshCausalLM.adapter:
        return float(_walsh_config(folder).scale)
    return adapter_scale(read_lora_config(folder))


def _check_rank(folder: Path, rank: Any) -> None:
    """Refuse settings whose rank is not that of the matrices, before memory is taken for them."""
    wide = {len(value) for name, value in read_tensors(folder / _FILES["lora"][0]).items() if ".lora_A." in name}
    if wide != {rank}:
        raise CheckpointError(f"{folder} has matrices of rank {sorted(wide)}, and settings with r={rank!r}.")


def _adapter_config(model: StackedCausalLM, config: Any) -> str:
    """PEFT's settings of a member, with sorted names so that the same ensemble gives the same bytes."""
    config = copy.copy(config)
    layers = dict(model.adapters())
    endings = sorted({name.rpartition(".")[2] for name in layers})
    config.target_modules = set(endings)
    every = [name.removesuffix(".base_layer") for name, module in model.base.named_modules() if is_linear(module)]
    if set(matching(every, config)) != set(layers):
        config.target_modules = set(layers)
    transposed = {not isinstance(layer.base_layer, torch.nn.Linear) for layer in layers.values()}
    content: dict[str, Any] = config.to_dict()
    content |= {
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "peft_version": versions().get("peft"),
    }
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}
    return json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
