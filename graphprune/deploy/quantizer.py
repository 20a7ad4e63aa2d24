"""Stock ``from_pretrained`` on a folder of :func:`graphprune.save`, by what transformers offers to quantisers.

``register_quantizer`` is its documented place for code that changes a model after its construction, on the meta device,
and before its weights are loaded. Nothing is quantised here: the model that comes out is a plain one, whose config
remembers its sizes, so that ``save_pretrained`` writes a folder that loads again.

This module is imported when transformers is (:mod:`graphprune.after_import`), not with graphprune.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from graphprune.deploy.quantization_config import METHOD
from graphprune.deploy.resize import resize
from graphprune.errors import GraphPruneError

_KINDS = {"class": str, "attributes": dict, "shapes": dict, "biases": list, "buffers": dict}


@register_quantization_config(METHOD)
class PrunedConfig(QuantizationConfigMixin):
    """The sizes in config.json; its attributes are what :func:`graphprune.deploy.resize.resize` reads.

    Raises :class:`GraphPruneError` when one is missing or of another type.
    """

    def __init__(self, **settings: Any):
        for key, kind in _KINDS.items():
            if not isinstance(settings.get(key), kind):
                raise GraphPruneError(
                    f"config.json: quantization_config.{key} is to be a {kind.__name__}, as graphprune.save writes it."
                )
        vars(self).update(settings, quant_method=METHOD)

    def sizes(self) -> dict[str, Any]:
        """A copy, to be changed."""
        return self.to_dict()


@register_quantizer(METHOD)
class PrunedLoader(HfQuantizer):
    """Gives a model its pruned sizes before its weights are loaded."""

    quantization_config: PrunedConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        sizes = sizes_for(model, self.quantization_config.sizes())
        try:
            resize(model, sizes)
        except (AttributeError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise GraphPruneError(
                f"{type(model).__name__} cannot take the sizes in config.json: {error}. They are those of a "
                f"{sizes['class']}, as graphprune pruned it."
            ) from error
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """A plain model: nothing in it is quantised, and whatever trains or prunes it is to know that."""
        settings = self.quantization_config
        self.remove_quantization_config(model)
        model.config.quantization_config = settings
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None:
                vars(config).pop("_is_quantized", None)
        _attach_report(model, settings)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def sizes_for(model: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """``sizes`` of the class that was pruned, for one that shares its base: a model without a head, or with another."""
    if type(model).__name__ == sizes["class"]:
        return sizes
    prefix = f"{model.base_model_prefix}."
    bare = not hasattr(model, model.base_model_prefix)  # the base model itself
    found: dict[str, Any] = {"class": sizes["class"]}
    for key in ("attributes", "shapes", "buffers"):
        inner = {name: value for name, value in sizes[key].items() if name.startswith(prefix)}
        found[key] = {name.removeprefix(prefix): value for name, value in inner.items()} if bare else inner
    inside = [path for path in sizes["biases"] if path.startswith(prefix)]
    found["biases"] = [path.removeprefix(prefix) for path in inside] if bare else inside
    return found


def _attach_report(model: nn.Module, settings: PrunedConfig) -> None:
    """What graphprune.json in a local folder says of this model: it can be pruned again, and saved."""
    from graphprune.io.manifest import MANIFEST, read_manifest
    from graphprune.reporting import REPORT_ATTRIBUTE

    config: Any = model.config
    folder = Path(config.name_or_path)
    if type(model).__name__ != settings.sizes()["class"] or not (folder / MANIFEST).is_file():
        return
    base_config = copy.deepcopy(config)
    del base_config.quantization_config
    done = read_manifest(folder).report(base_config)
    if done.parameters_after == sum(parameter.numel() for parameter in model.parameters()):
        object.__setattr__(model, REPORT_ATTRIBUTE, done)
