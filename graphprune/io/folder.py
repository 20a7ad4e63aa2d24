"""``save`` and ``load``: a pruned model as a folder of safetensors and JSON, never pickle.

Stock ``from_pretrained`` reads it as well: always when it was made with ``deploy``, otherwise where graphprune has been
imported (:mod:`graphprune.deploy.quantizer`) or, when it is portable, with ``trust_remote_code``.

A folder holds config.json (Hugging Face models only: the config of the pruned model when it was made with ``deploy``,
else the one before the first pruning), generation_config.json,
model.safetensors (several with an index when large), graphprune_buffers.safetensors (tensors outside the state dict,
unless the class computes them from its config),
the tokenizer, README.md (the model card), and graphprune.json (:mod:`graphprune.io.manifest`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_leaves

import graphprune
from graphprune.deploy.portable import auto_classes, write_portable
from graphprune.deploy.quantization_config import quantization_config
from graphprune.deploy.resize import refresh_torch_attributes
from graphprune.deploy.sizes_left import Sizes, in_state_dict, sizes_left
from graphprune.deploy.stock import Stock, settings_of
from graphprune.errors import GraphPruneError, first_line
from graphprune.io.atomic import new_folder
from graphprune.io.checked_json import read_json
from graphprune.io.empty_model import Factory, class_in_transformers, empty_model
from graphprune.io.manifest import CONFIG, Manifest, read_manifest, reports_to_data, write_manifest
from graphprune.io.model_card import write_card
from graphprune.io.stored_config import write_config
from graphprune.io.tensors import Held, held_tensors, replace_tensor, same_values
from graphprune.io.weight_files import WriteShard, check_files, fingerprint, read_weights, write_weights
from graphprune.reporting import REPORT_ATTRIBUTE, Report, report
from graphprune.trace.provenance import Attribute, get_attribute, set_attribute
from graphprune.trace.stored import Stored, stand_in, stored_of

if TYPE_CHECKING:
    from graphprune.io.model_card import Evaluations

GENERATION_CONFIG = "generation_config.json"


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    evaluations: Evaluations | None = None,
    metadata: Mapping[str, Any] | None = None,
    portable: bool = False,
) -> None:
    """Write a pruned model to a new folder that :func:`load` reads. The folder is complete or it is not there.

    Args:
        model: what :func:`graphprune.compile` or :func:`load` returned.
        directory: a folder that does not exist yet; its parents are made.
        tokenizer: a Hugging Face tokenizer to write beside it.
        max_shard_size: bytes of one weight file at most, or a text such as ``"5GB"`` (10⁹ bytes each).
        evaluations: what :func:`graphprune.evaluate.evaluate` measured of it, or of several models by their titles, for
            its README.md; :func:`graphprune.update_card` puts them there later.
        metadata: fields of the front matter of README.md, such as ``{"license": "mit"}``, over those that are known.
        portable: also write a modelling file, with which ``from_pretrained(directory, trust_remote_code=True)`` of
            transformers loads the model where graphprune is not installed. A model made with ``deploy`` needs none.

    Raises:
        GraphPruneError: when ``directory`` exists, the model was not pruned, has no weights, has been changed since so
            that it could not be loaded again, or the disk refuses. Nothing is left behind then.
    """
    target = Path(os.path.abspath(directory))
    if not isinstance(model, nn.Module):
        raise GraphPruneError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    done = report(model)
    if done.emitted == "graph":
        raise GraphPruneError("A model made with emit='graph' has no class to load it with: keep its state_dict.")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise GraphPruneError(f"tokenizer must be a Hugging Face tokenizer, not {type(tokenizer).__name__}.")
    try:
        with new_folder(target) as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            card = {"metadata": metadata, "evaluations": evaluations}
            write_folder(model, done, folder, max_shard_size, portable=portable, card=card)
    except (OSError, SafetensorError, ValueError) as error:
        raise GraphPruneError(f"{target} could not be written: {error}.") from error


def write_folder(
    model: nn.Module,
    done: Report,
    folder: Path,
    max_shard_size: int | str,
    *,
    portable: bool = False,
    write_shard: WriteShard | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write all but the tokenizer into ``folder``.

    ``write_shard`` may know weights that are not in memory; ``card`` has more arguments of :func:`write_card`.
    """
    name = type(model).__name__
    held = held_tensors(model) if done.fields is None else _without_computed(model, done)
    sizes = _sizes(model, done, held, portable)
    stated = held if sizes is None else in_state_dict(held, sizes)
    tensors, ties, files = write_weights(stated, folder, max_shard_size, write_shard)
    # How load is to hold them: as the class does.
    tensors = {key: replace(one, persistent=held[key].persistent) for key, one in tensors.items()}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    manifest = Manifest(
        class_name=name,
        in_transformers=class_in_transformers(name) is type(model),
        attention=attention if isinstance(attention, str) else None,
        versions=_versions(),
        files=files,
        tensors=tensors,
        ties=ties,
        reports=reports_to_data(done),
    )
    if hasattr(done.base_config, "to_json_string"):
        more: dict[str, Any] = {}
        if sizes is not None:
            more = write_portable(model, sizes, folder) if portable else quantization_config(sizes)
        write_config(done.base_config, name, _float_dtype(manifest), folder, more)
        _write_generation_config(model, folder)
        files[CONFIG] = fingerprint(folder / CONFIG)
    manifest.files = dict(sorted(files.items()))
    write_manifest(manifest, folder)
    if manifest.in_transformers:
        # Whoever changed the model after pruning (new tokens, adapters) is told now, not when loading.
        _shaped_model(manifest, folder, manifest.report(None), None, None)
    loader = "transformers" if done.fields is not None else auto_classes(model)[0] if portable else "graphprune"
    write_card(folder, done, name, loader, **(card or {}))


def _sizes(model: nn.Module, done: Report, held: dict[str, Held], portable: bool) -> Sizes | None:
    """What transformers has to be told to load the folder; None for a model that its config describes."""
    if done.fields is not None:
        return None
    try:
        return sizes_left(model, done, held)
    except GraphPruneError as error:
        if portable:
            raise GraphPruneError(f"portable=True: {error}") from error
        return None  # load can do more: other classes, and it says what is wrong


def _without_computed(model: nn.Module, done: Report) -> dict[str, Held]:
    """The tensors that the class does not compute itself from the config."""
    built = held_tensors(Stock(model).build_with_buffers(settings_of(done.base_config)))
    return {
        name: item
        for name, item in held_tensors(model).items()
        if item.persistent or name not in built or not same_values(item.tensor, built[name].tensor)
    }


def _write_generation_config(model: nn.Module, folder: Path) -> None:
    config = getattr(model, "generation_config", None)
    if config is not None:
        # Not its save_pretrained, which refuses settings that the model was loaded with and works with.
        (folder / GENERATION_CONFIG).write_text(config.to_json_string(), encoding="utf-8")


def _versions() -> dict[str, str]:
    import transformers

    return {
        "graphprune": graphprune.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _float_dtype(manifest: Manifest) -> str | None:
    """The dtype of a model, as transformers has it: that of its first floating-point parameter."""
    kinds = (t.dtype for t in manifest.tensors.values() if t.kind == "parameter")
    return next((dtype for dtype in kinds if getattr(torch, dtype).is_floating_point), None)


def load(
    directory: str | os.PathLike[str],
    *,
    model: Factory | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a folder that :func:`save` wrote. The unpruned weights are never allocated, and no pickle is read.

    Args:
        directory: the folder.
        model: builds the unpruned model, called without arguments under ``torch.device("meta")``. Needed for classes
            that transformers does not have.
        device: where the weights go.
        dtype: of the floating-point weights; as saved by default.

    Returns:
        The model in eval mode; :func:`graphprune.report` says how it was made, and it can be pruned and saved again.

    Raises:
        GraphPruneError: when the folder is missing, foreign, incomplete or damaged, or does not fit ``model``.
    """
    folder = Path(directory)
    place = _checked_device(device)
    check_dtype(dtype)
    manifest = read_manifest(folder)
    check_files(manifest, folder)
    done = manifest.report(None)
    built = _shaped_model(manifest, folder, done, model, dtype)
    _complete(built, manifest, folder, read_weights(manifest, folder, place, dtype), place)
    object.__setattr__(built, REPORT_ATTRIBUTE, done)
    return built.eval()


def load_stored(folder: Path, manifest: Manifest, stored: dict[str, Stored], dtype: torch.dtype | None) -> nn.Module:
    """:func:`load` for weights that stay on disk: ``stored`` reads them. The files are checked already.

    What is outside of the state dict is read: it is small.
    """
    done = manifest.report(None)
    built = _shaped_model(manifest, folder, done, None, dtype)
    tensors = {name: stand_in(one) if manifest.tensors[name].persistent else one.read() for name, one in stored.items()}
    _complete(built, manifest, folder, tensors, torch.device("cpu"))
    object.__setattr__(built, REPORT_ATTRIBUTE, done)
    return built.eval()


def _complete(
    built: nn.Module, manifest: Manifest, folder: Path, tensors: dict[str, torch.Tensor], place: torch.device
) -> None:
    """Give a model of the right shapes its weights and all else that the folder holds."""
    _put_weights(built, manifest, tensors)
    for name, item in held_tensors(built).items():
        if not item.tensor.is_meta and item.tensor.device != place:  # computed by the class
            replace_tensor(built, name, item.kind, item.tensor.to(place))
    refresh_torch_attributes(built)
    _read_generation_config(built, folder)
    _refuse_meta(built)


def check_dtype(dtype: Any) -> None:
    """Raises :class:`GraphPruneError` unless ``dtype`` is None or one of floating-point numbers."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise GraphPruneError(f"dtype must be a floating-point torch.dtype, not {dtype!r}.")


def _checked_device(device: Any) -> torch.device:
    try:
        place = torch.device(device)
        if place.type != "meta":
            torch.empty(0, device=place)
            return place
    except (RuntimeError, AssertionError, TypeError) as error:
        raise GraphPruneError(f"device {device!r} cannot be used: {first_line(error)}") from error
    raise GraphPruneError("device cannot be 'meta': that would load no weights.")


def _shaped_model(
    manifest: Manifest, folder: Path, done: Report, factory: Factory | None, dtype: torch.dtype | None
) -> nn.Module:
    """The model on meta with its attributes set, checked to have a place for every stored tensor.

    Completes ``done``, and its history, with the config found on the way.
    """
    saved_dtype = _float_dtype(manifest)
    built_dtype = dtype or (getattr(torch, saved_dtype) if saved_dtype else None)
    built = empty_model(manifest, folder, factory, built_dtype, computes=done.fields is not None)
    if done.base_config is None:
        base_config = copy.deepcopy(getattr(built, "config", None))
        for one in (done, *done.history):
            one.base_config = base_config
    for attribute, value in done.attributes.items():
        _set_checked(built, attribute, value)
    for path in done.new_biases:
        _add_bias(built, path)
    _check_fit(built, manifest)
    _check_count(built, manifest, done)
    return built


def _set_checked(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute that comes from a file: only one that exists and is an integer."""
    try:
        if attribute.index is not None and attribute.index < 0:
            raise IndexError(attribute.index)
        get_attribute(model, attribute)
        set_attribute(model, attribute, value)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        raise GraphPruneError(
            f"The folder sets {attribute} = {value}, but {type(model).__name__} has no such integer attribute: the "
            "folder is damaged, or made for another version of the model."
        ) from None


def _check_fit(model: nn.Module, manifest: Manifest) -> None:
    name = type(model).__name__
    # Plain attributes come and go (caches): those that need a value and get none are found by _refuse_meta.
    places = {key: place for key, place in held_tensors(model).items() if place.kind != "attribute"}
    kinds = {key: stored.kind for key, stored in manifest.tensors.items()}
    kinds |= {key: tie.kind for key, tie in manifest.ties.items()}
    kinds = {key: kind for key, kind in kinds.items() if kind != "attribute"}
    places = {key: place for key, place in places.items() if key in kinds or place.persistent or place.tensor.is_meta}
    if missing := places.keys() - kinds.keys():
        raise GraphPruneError(f"{name} has a tensor {min(missing)!r} of which the weights are not in the folder.")
    if extra := kinds.keys() - places.keys():
        raise GraphPruneError(f"The folder has weights for {min(extra)!r}, for which {name} has no place.")
    for key, place in places.items():
        if kinds[key] != place.kind:
            raise GraphPruneError(f"{key} is a {place.kind} of {name}, but a {kinds[key]} in the folder.")
        _check_shape(key, place.tensor.shape, manifest.tensors[_stored_name(manifest, key)].shape, place.kind)


def _add_bias(model: nn.Module, path: str) -> None:
    """A linear layer that got a bias when the model was pruned: one without, as it is built."""
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or linear.bias is not None:
        raise GraphPruneError(
            f"The folder gives {path!r} a bias, but {type(model).__name__} has no such linear layer without one: the "
            "folder is damaged, or made for another version of the model."
        )
    linear.bias = nn.Parameter(linear.weight.new_empty(linear.weight.shape[0]))


def _check_count(model: nn.Module, manifest: Manifest, done: Report) -> None:
    """The model that was pruned had exactly these parameters: finds a config or factory of another size."""
    before = _parameters_of_config(done)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = {f"{path}.bias" for path in done.new_biases}
    stored = {key for key, one in manifest.tensors.items() if one.kind == "parameter"}
    count = sum(parameters[key].numel() for key in stored - new)
    if count != before:
        raise GraphPruneError(
            f"{type(model).__name__} has {count:,} parameters as it is built now, but {before:,} when it was pruned: "
            "this is not the model that the folder was made from."
        )


def _parameters_of_config(done: Report) -> int:
    """How many parameters config.json describes: those before the first pruning, or after the last that it follows."""
    reports = (*done.history, done)
    stated = [one.parameters_after for one in reports if one.fields is not None]
    return stated[-1] if stated else reports[0].parameters_before


def _stored_name(manifest: Manifest, name: str) -> str:
    return manifest.ties[name].to if name in manifest.ties else name


def _check_shape(key: str, before: torch.Size, after: tuple[int, ...], kind: str) -> None:
    """Pruning only takes away. Buffers may have grown since: tables of positions do when a longer text comes."""
    fits = len(before) == len(after)
    if kind == "parameter":
        fits = fits and all(small <= large for small, large in zip(after, before, strict=True))
    if not fits:
        raise GraphPruneError(
            f"{key} has shape {list(after)}, which does not come from pruning {list(before)}: the model was changed "
            "otherwise, or the folder is for another one."
        )


def _put_weights(model: nn.Module, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    for name, stored in manifest.tensors.items():
        if stored.kind == "parameter":
            on_disk = stored_of(tensors[name])
            tensors[name] = (
                nn.Parameter(tensors[name], requires_grad=stored.requires_grad)
                if on_disk is None
                else stand_in(on_disk, stored.requires_grad)
            )
    for name, place in held_tensors(model).items():
        source = _stored_name(manifest, name)
        if source in tensors:  # a plain attribute may not have been there when the model was saved
            replace_tensor(model, name, place.kind, tensors[source])


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    if not (folder / GENERATION_CONFIG).is_file() or not hasattr(model, "generation_config"):
        return
    import transformers

    data = read_json(folder / GENERATION_CONFIG)
    try:
        model.generation_config = transformers.GenerationConfig.from_dict(data)  # type: ignore[assignment]
    except Exception as error:  # whatever strange values make it do
        raise GraphPruneError(f"{folder / GENERATION_CONFIG} is no generation config: {error}.") from error


def _refuse_meta(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            if any(tensor.is_meta and stored_of(tensor) is None for tensor in tensors):
                raise GraphPruneError(
                    f"{type(model).__name__}: {path or 'the model'} keeps a tensor in {name!r} that is neither "
                    "parameter nor buffer; its value cannot be restored. Make it a buffer (persistent=False)."
                )
