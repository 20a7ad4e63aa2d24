"""Adapters that peft put into a model: how they are seen by the compiler, and what to call things without them.

All that is known of peft's classes is in this file; ``tests/test_adapters.py`` tells when they change. A model
that holds such a class has imported peft, so nothing here imports it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.quantised import is_quantised

_WRAPPERS = re.compile(r"(?<=\.)(?:base_layer|original_module)\.|(?<=\.)modules_to_save\.[^.]+\.")


def show_all_adapters(copy: nn.Module, *, tracing: bool = False) -> None:
    """Switch on every adapter of ``copy`` (never the user's model), so that one graph holds the weights of all.

    For ``tracing`` what peft adds to a parameter of any module (``target_parameters``) is added in plain sight, where
    peft itself parametrizes the module for the time of its forward.

    The norms that DoRA divides by, which are functions of weights alone, are ones meanwhile: what is pruned changes
    them, and ``passes/keep_magnitudes.py`` makes up for that.

    Raises :class:`GraphPruneError` for an adapter that is merged: its weights would not run.
    """
    for path, layer in _layers(copy):
        if layer.merged:
            raise GraphPruneError(
                f"The adapter {layer.merged_adapters[0]!r} is merged into {path}, but still there: call "
                "unmerge_adapter(), or merge_and_unload() to have a model without adapters."
            )
        layer._disable_adapters = False
        layer._active_adapter = adapter_names(layer)
        if tracing and _is(layer, "peft.tuners.lora.layer", "ParamWrapper"):
            layer.forward = _forward_in_plain_sight(layer)
    for module in copy.modules():
        if _is_dora(module):
            module._cache_clear()  # type: ignore[operator]
            module.get_weight_norm, module.get_lora_weight = _ones, _nothing  # type: ignore[assignment]


def _forward_in_plain_sight(layer: Any) -> Callable[..., Any]:
    """The forward of a layer that adapts a parameter of the module inside, which sees their sum as its own."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        held, name = vars(layer.get_base_layer()), layer.parameter_name
        held[name] = layer.get_param() + sum(layer.get_delta_weight(adapter) for adapter in layer.lora_A)
        try:
            return layer.base_layer(*args, **kwargs)
        finally:
            del held[name]

    return forward


def _ones(weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.ones((), dtype=weight.dtype, device=weight.device)


def _nothing(*_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros(())


def adapter_names(layer: nn.Module) -> list[str]:
    """The names of the adapters that a layer of peft holds, in its own order."""
    found: dict[str, None] = {}
    for kind in layer.adapter_layer_names:  # type: ignore[union-attr]
        found |= dict.fromkeys(getattr(layer, kind).keys())
    return list(found)


def twins(model: nn.Module) -> dict[str, str]:
    """Name of a tensor that does not run, since an adapter's copy of its module does → its name in that copy.

    Such are ``modules_to_save``: the module as it was, and the copies of adapters that are not active. Their sizes
    have to follow, or the adapter could not be changed any more.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if _is(module, "peft.utils.other", "ModulesToSaveWrapper"):
            copies: dict[str, nn.Module] = {f"modules_to_save.{name}": m for name, m in module.modules_to_save.items()}
            copies = {"original_module": module.original_module, **copies}
            active = f"modules_to_save.{module.active_adapters[0]}" if module.active_adapters else ""
            runs = "original_module" if module.disable_adapters or active not in copies else active
            for name, other in copies.items():
                if name != runs:
                    for tensor, _ in (*other.named_parameters(), *other.named_buffers()):
                        found[_join(path, name, tensor)] = _join(path, runs, tensor)
    return found


def plain_name(model: nn.Module, name: str) -> str:
    """What a parameter, buffer or module is called in the model without adapters; others keep their name."""
    if "peft" not in sys.modules:
        return name
    name = f"{name}."
    if _is(model, "peft.peft_model", "PeftModel"):
        name = name.removeprefix("base_model.model.")
    return _WRAPPERS.sub("", name)[:-1]


def base_of(model: nn.Module) -> nn.Module:
    """The model that a :class:`peft.PeftModel` hands its arguments on to; any other is its own."""
    return model.get_base_model() if _is(model, "peft.peft_model", "PeftModel") else model  # type: ignore[operator]


def refresh_sizes(model: nn.Module) -> None:
    """``in_features`` and ``out_features`` of adapted layers, by which new adapters are made, as the weights are."""
    for _, layer in _layers(model):
        if hasattr(layer, "in_features"):
            layer.in_features, layer.out_features = layer._get_in_out_features(layer.get_base_layer())


@dataclass(frozen=True)
class LowRank:
    """The active LoRA adapter of a linear layer: it computes ``(W + scaling·B·A) x`` and a bias.

    ``A``, of shape ``(rank, in)``, is the weight of ``reader``, and ``B``, ``(out, rank)``, that of ``writer``. The
    weight of ``base`` is ``(out, in)``, or ``(in, out)`` if ``across``. ``others`` hold the magnitudes of DoRA.
    Parameters are looked up when they are asked for: whoever shards a model puts others in their place.
    """

    path: str
    base: nn.Module
    reader: nn.Module
    writer: nn.Module
    scaling: float
    across: bool
    dropout: nn.Module
    others: tuple[nn.Module, ...]

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [module.weight for module in (self.reader, self.writer, *self.others)]  # type: ignore[misc]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` and ``B``, detached; whole, if they are sharded."""
        return _whole(self.reader.weight.detach()), _whole(self.writer.weight.detach())  # type: ignore[operator]

    def weight(self) -> torch.Tensor:
        """``W`` in shape ``(out, in)``, floating point: of a quantised base its value, made for this call."""
        from peft.utils.integrations import dequantize_module_weight

        held: Any = self.base.weight
        weight = held.dequantize() if is_quantised(held) else _whole(dequantize_module_weight(self.base).detach())
        return weight.T if self.across else weight

    def update(self) -> torch.Tensor:
        """``scaling·B·A``, shape ``(out, in)``."""
        a, b = self.factors()
        return (b @ a).mul_(self.scaling)

    def guided_gradient(self) -> torch.Tensor | None:
        """``scaling·(∇B·A + B·∇A − ∇B·∇A)``, shape ``(out, in)``: LoRAPrune's gradient of the merged weight (Eq. 9).

        None without gradients.
        """
        of_a, of_b = self.reader.weight.grad, self.writer.weight.grad
        if not isinstance(of_a, torch.Tensor) or not isinstance(of_b, torch.Tensor):
            return None
        (a, b), of_a, of_b = self.factors(), _whole(of_a), _whole(of_b)
        return (of_b @ a).addmm_(b - of_b, of_a).mul_(self.scaling)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has sharded, put together; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def low_rank_layers(model: nn.Module) -> Iterator[LowRank]:
    """Every linear layer of ``model`` with the LoRA adapter that is active on it, the first if there are several."""
    for path, layer in _layers(model):
        active = [name for name in getattr(layer, "active_adapters", ()) if name in getattr(layer, "lora_A", {})]
        if not active or not _is(layer, "peft.tuners.lora.layer", "Linear"):
            continue
        name = active[0]
        others = tuple(dora for key, dora in layer.lora_magnitude_vector.items() if key == name)
        yield LowRank(
            path,
            layer.get_base_layer(),
            layer.lora_A[name],
            layer.lora_B[name],
            float(layer.scaling[name]),
            bool(layer.fan_in_fan_out),
            layer.lora_dropout[name],
            others,
        )


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into ``model``."""
    return next(_layers(model), None) is not None


@dataclass
class DoraLayer:
    """One adapter of a layer with DoRA: the weight, what is added to it, the magnitudes, and how rows are measured.

    ``delta()`` makes what is added, in the layout of the weight; ``norm(weight, delta)`` gives ``‖weight + delta‖`` of
    every row.
    """

    weight: torch.Tensor
    delta: Callable[[], torch.Tensor]
    magnitude: nn.Parameter
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def dora_layers(model: nn.Module) -> Iterator[DoraLayer]:
    """Every adapter of every layer of ``model`` that uses DoRA."""
    for _, layer in _layers(model):
        for name, dora in getattr(layer, "lora_magnitude_vector", {}).items():
            across = bool(getattr(layer, "fan_in_fan_out", False))

            def norm(weight: torch.Tensor, delta: torch.Tensor, dora: Any = dora, across: bool = across) -> Any:
                return dora.get_weight_norm(weight, delta.T if across else delta, scaling=1)

            delta = functools.partial(layer.get_delta_weight, name)
            yield DoraLayer(layer.get_base_layer().weight, delta, dora.weight, norm)


def _is_dora(module: nn.Module) -> bool:
    return _is(module, "peft.tuners.lora.dora", "DoraLinearLayer")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer that holds adapters, with its path."""
    for path, module in model.named_modules():
        if _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            yield path, module


def _is(module: nn.Module, home: str, kind: str) -> bool:
    known = sys.modules.get(home)
    return known is not None and isinstance(module, getattr(known, kind))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
