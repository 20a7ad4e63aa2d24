"""A model without weights, from its config alone."""

from __future__ import annotations

import torch
from torch import nn

from graphprune.errors import GraphPruneError, first_line


def model_from_config(name: str) -> nn.Module:
    """The model that a config describes, on the meta device: the class it names, or a causal language model.

    ``name`` is a folder with a config.json, or a name on the hub. Raises :class:`GraphPruneError` when there is none,
    or no model can be built from it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config) if named is None else named(config)
    except (OSError, ValueError, KeyError) as error:
        raise GraphPruneError(f"No model could be built from the config of {name}: {first_line(error)}") from error
    return model.eval()
