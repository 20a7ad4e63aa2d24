"""Load a model by name: a folder, a hub name, a GGUF file, or a folder that graphprune wrote."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError, first_line

# transformers has one Auto class per task; they are tried in this order until one knows the config.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load_model(name: str, *, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Load ``name`` with its tokenizer, which is None where there is none.

    Args:
        name: a folder that graphprune or transformers wrote, a name on the Hugging Face hub, or a ``.gguf`` file.
        dtype: of the weights; as stored by default (GGUF: float32, dequantised).

    Returns:
        The model in eval mode on the CPU, and its tokenizer.

    Raises:
        GraphPruneError: when there is no such model, or it cannot be read.
    """
    from transformers.utils import logging

    path = Path(name)
    logging.disable_progress_bar()
    if path.is_dir() and (path / "graphprune.json").is_file():
        from graphprune.io.folder import load

        return load(path, dtype=dtype), _tokenizer(str(path))
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    if path.exists() and not path.is_dir():
        raise GraphPruneError(f"{name} is neither a folder nor a .gguf file.")
    return _load_pretrained(name, dtype).eval(), _tokenizer(name)


def auto_class(config: Any) -> Any:
    """The first of the Auto classes that knows a model for ``config``, or None."""
    import transformers

    known = [getattr(transformers, auto) for auto in _AUTO_CLASSES]
    return next((auto for auto in known if type(config) in auto._model_mapping), None)


def _load_pretrained(name: str, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        auto = auto_class(config)
        if auto is None:
            raise GraphPruneError(f"{name} is a {type(config).__name__}, for which there is no model class.")
        architecture = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], auto)
        return architecture.from_pretrained(name, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise GraphPruneError(f"{name} could not be loaded: {first_line(error)}") from error


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    import transformers

    if not path.is_file():
        raise GraphPruneError(f"There is no file {path}.")
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
    except ImportError:
        raise GraphPruneError("Reading a GGUF file needs the package gguf: pip install 'graphprune[gguf]'.") from None
    arguments: dict[str, Any] = {"gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **arguments)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=dtype or torch.float32, **arguments
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise GraphPruneError(f"{path} could not be read: {str(error).strip()}") from error
    _forget_quantization(model)
    return model.eval(), tokenizer


def _forget_quantization(model: nn.Module) -> None:
    """The weights of a GGUF file are dequantised on loading; what still calls the model quantised is dropped."""
    for holder, names in ((model.config, ["quantization_config"]), (model, ["hf_quantizer", "quantization_method"])):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False  # type: ignore[assignment]


def _tokenizer(name: str) -> Any:
    import transformers

    with contextlib.suppress(OSError, ValueError, KeyError):  # a model without a tokenizer is fine
        return transformers.AutoTokenizer.from_pretrained(name)
    return None
