"""Example inputs for tracing: small, random, and of sizes that no dimension of the model has.

A Hugging Face model says what it reads: ``main_input_name``, the names of the arguments of its forward, and a config
with the sizes of images, spectrograms and vocabularies. :data:`_MAKERS` has one small function for each standard name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.trace.adapters import base_of
from graphprune.trace.quiet import REFUSALS, eval_mode

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def normalise(example_inputs: Any) -> Inputs:
    """``(args, kwargs)`` from what the user gave: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """What forward takes, by name; for a wrapper of peft, also what it hands on to the model inside."""
    found = dict(inspect.signature(model.forward).parameters)
    base = base_of(model)
    if base is model:
        return found
    own = {name: parameter for name, parameter in found.items() if parameter.kind not in VARIADIC}
    return {**own, **{name: p for name, p in forward_parameters(base).items() if name not in own}}


def odd_sizes(model: nn.Module, how_many: int) -> list[int]:
    """Small primes that are no dimension of any weight and no integer of the config, smallest first."""
    taken = {size for tensor in (*model.parameters(), *model.buffers()) for size in tensor.shape}
    config = getattr(model, "config", None)
    if config is not None:
        taken |= {value for value in vars(config).values() if isinstance(value, int)}
    primes = (n for n in count(3) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return [next(n for n in primes if n not in taken) for _ in range(how_many)]


def example_inputs_for(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs for a Hugging Face model, found from its ``main_input_name``, its forward signature and its config.

    Given are the main input, every argument without a default, what a model that decodes what it encoded or that has
    several towers needs besides, and for a language model that sees or hears as many placeholder tokens as it has
    features.

    Raises :class:`GraphPruneError` when the model's forward needs something that cannot be guessed.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise GraphPruneError(
            f"{type(model).__name__}.forward needs inputs and nobody gave any: pass example_inputs=, "
            "a tuple of positional or a dict of keyword arguments with small example tensors."
        )
    ask = _Ask(model, config, forward_parameters(model), dtype)
    for name in _wanted(ask):
        ask.made[name] = _make(ask, name)
    _add_placeholders(ask)
    if "use_cache" in ask.parameters:
        ask.made["use_cache"] = False
    return (), {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in ask.made.items()}


@dataclass
class _Ask:
    """What is asked for, and what was made so far."""

    model: nn.Module
    config: Any
    parameters: dict[str, inspect.Parameter]
    dtype: torch.dtype
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.batch, self.length = odd_sizes(self.model, 2)

    def setting(self, part: tuple[str, ...], *names: str) -> Any:
        """The first of the settings ``names`` that any config has, those for ``part`` of the model asked first."""
        for settings in _configs(self.config, part):
            for name in names:
                value = getattr(settings, name, None)
                if value is not None:
                    return value
        return None

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def ints(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=self.generator)

    def has_layer(self, kind: type[nn.Conv1d], channels: int) -> bool:
        """Whether the first layer of this kind reads that many channels."""
        return next((m.in_channels == channels for m in self.model.modules() if isinstance(m, kind)), False)


_VISION = ("vision", "image", "video", "backbone", "encoder")
_AUDIO = ("audio", "speech", "acoustic", "encoder")
_TEXT = ("text", "language", "decoder")


def _configs(config: Any, part: tuple[str, ...]) -> Iterator[Any]:
    """The configs nested in ``config``: those named after ``part``, then itself, then the rest."""
    nested = {n: c for n, c in vars(config).items() if hasattr(c, "to_dict") and not n.startswith("_")}
    if isinstance(nested_dict := getattr(config, "sub_configs", None), dict):
        nested |= {n: c for n in nested_dict if hasattr(c := getattr(config, n, None), "to_dict")}
    mine = [child for name, child in nested.items() if any(word in name for word in part)]
    for child in mine:
        yield from _configs(child, part)
    yield config
    for child in nested.values():
        if not any(child is other for other in mine):
            yield from _configs(child, part)


def _wanted(ask: _Ask) -> list[str]:
    """The names of the arguments to give, in the order of the signature."""
    known = [name for name in ask.parameters if name in _MAKERS]
    required = [n for n, p in ask.parameters.items() if p.default is p.empty and p.kind not in VARIADIC]
    said = getattr(ask.model, "main_input_name", None)
    main = [name for name in (said if isinstance(said, (list, tuple)) else [said]) if name in ask.parameters]
    wanted = {*required, *main}
    for name in main:
        if name not in _MAKERS:
            raise _cannot(ask, name)
    if not main and not required and known:
        wanted.add(known[0])
    if getattr(ask.config, "is_encoder_decoder", False):
        wanted |= {"decoder_input_ids"} & set(known)
    if not _placeholder(ask, "image") and not _placeholder(ask, "audio"):
        for part, tower in _TOWERS:
            if getattr(ask.config, f"{part}_config", None) is not None:
                wanted |= {name for name in tower if name in known}
        if "input_ids" in wanted and isinstance(getattr(ask.config, "image_size", None), int):
            wanted |= {"pixel_values"} & set(known)
    for reader, companions in _COMPANIONS.items():
        wanted |= set(companions) & set(known) if reader in wanted else set()
    if getattr(ask.config, "encoder_hidden_size", None) is not None:
        wanted |= {"encoder_hidden_states"} & set(known)
    return [name for name in ask.parameters if name in wanted]


# A config with this part has a tower that reads these.
_TOWERS = (
    ("text", ("input_ids",)),
    ("vision", ("pixel_values", "pixel_values_videos")),
    ("image", ("pixel_values",)),
    ("audio", ("input_features", "input_values")),
    ("speech", ("input_features",)),
)
# Optional by signature, yet models that have them cannot do without, or leave a part of themselves unused.
_COMPANIONS = {
    "input_ids": ("bbox", "visual_feats", "visual_pos", "visual_embeds", "qformer_input_ids", "global_attention_mask"),
    "pixel_values": ("spatial_shapes", "pixel_attention_mask"),
}


def _cannot(ask: _Ask, name: str) -> GraphPruneError:
    return GraphPruneError(
        f"{type(ask.model).__name__}.forward needs {name!r}, for which no example can be made: pass example_inputs=, "
        "a dict of small example tensors."
    )


def _make(ask: _Ask, name: str) -> Any:
    maker = _MAKERS.get(name)
    made = maker(ask) if maker is not None else None
    if made is None:
        raise _cannot(ask, name)
    return made


def _tokens(ask: _Ask) -> torch.Tensor:
    """Random token ids; none that has a meaning of its own, such as the end of the text or an image."""
    choice = _plain_tokens(ask)
    limit = _limit(ask)
    width = ask.length if limit is None else min(ask.length, limit)
    return choice[ask.ints(len(choice), ask.batch, width)]


def _plain_tokens(ask: _Ask) -> torch.Tensor:
    settings = _text_settings(ask)
    vocabulary = getattr(settings, "vocab_size", None)
    if vocabulary is None:
        vocabulary = ask.setting(_TEXT, "vocab_size", "vocabulary_size", "num_tokens", "num_hash_buckets")
    if vocabulary is None:
        raise GraphPruneError(f"The config of {type(ask.model).__name__} has no vocab_size: pass example_inputs=.")
    plain = torch.ones(int(vocabulary), dtype=torch.bool)
    plain[[number for number in special_tokens(ask.config) if number < vocabulary]] = False
    return plain.nonzero()[:, 0] if plain.any() else torch.arange(int(vocabulary))


def plain_tokens(model: nn.Module) -> torch.Tensor:
    """Every token id of a Hugging Face model, int64, but those with a meaning of their own.

    Raises :class:`GraphPruneError` when the config does not say how many there are.
    """
    return _plain_tokens(_Ask(model, model.config, {}, torch.float32))


def longest_row(model: nn.Module) -> int | None:
    """How many positions a Hugging Face model has, if its config says it.

    Raises :class:`GraphPruneError` when the config has several text parts.
    """
    return _limit(_Ask(model, model.config, {}, torch.float32))


def _limit(ask: _Ask) -> int | None:
    limit = getattr(_text_settings(ask), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def special_tokens(config: Any) -> list[int]:
    return [
        value
        for part in _configs(config, ())
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 0
    ]


def _text_settings(ask: _Ask) -> Any:
    """The part of the config that knows the vocabulary."""
    try:
        return ask.config.get_text_config() if hasattr(ask.config, "get_text_config") else ask.config
    except ValueError as error:
        raise GraphPruneError(
            f"{type(ask.model).__name__} has several text parts ({error}): pass example_inputs=."
        ) from error


def _token_mask(ask: _Ask) -> torch.Tensor:
    main = next((v for v in ask.made.values() if isinstance(v, torch.Tensor)), None)
    shape = (ask.batch, ask.length) if main is None else main.shape[:2]
    return torch.ones(*shape, dtype=torch.long)


def _first_token(ask: _Ask) -> torch.Tensor:
    """Of all tokens the first, which the others attend to wherever they are."""
    mask = torch.zeros_like(_token_mask(ask))
    mask[:, 0] = 1
    return mask


def _boxes(ask: _Ask) -> torch.Tensor:
    """Left, top, right, bottom of every token's box on a page."""
    end = ask.setting(_TEXT, "max_2d_position_embeddings") or 1000
    x, y = (ask.ints(int(end) // 2, ask.batch, ask.length, 2).sort(-1).values for _ in range(2))
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _side(ask: _Ask) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    side = ask.setting(_VISION, "image_size", "img_size") or 64
    if isinstance(side, dict):
        side = (side["height"], side["width"])
    return (int(side[0]), int(side[-1])) if isinstance(side, (tuple, list)) else (int(side), int(side))


def _channels(ask: _Ask) -> int:
    channels = ask.setting(_VISION, "num_channels", "in_channels", "in_chans", "num_input_channels")
    return channels if isinstance(channels, int) else 3


def _images(ask: _Ask) -> torch.Tensor:
    if _is_required(ask, *_GRIDS):
        return _patches(ask)
    if "spatial_shapes" in ask.parameters:
        return _patches(ask).expand(ask.batch, -1, -1).contiguous()
    frames = ask.setting(_VISION, "num_frames")
    if isinstance(frames, int) and "pixel_values_videos" not in ask.parameters:
        return ask.floats(ask.batch, frames, _channels(ask), *_side(ask))
    return ask.floats(ask.batch, _channels(ask), *_side(ask))


def _video(ask: _Ask) -> torch.Tensor:
    frames = ask.setting(_VISION, "num_frames", "frames_per_clip", "temporal_patch_size") or 2
    return ask.floats(ask.batch, int(frames), _channels(ask), *_side(ask))


_GRIDS = ("grid_thw", "image_grid_thw")


def _is_required(ask: _Ask, *names: str) -> bool:
    return any(ask.parameters[name].default is inspect.Parameter.empty for name in names if name in ask.parameters)


def _spatial_shapes(ask: _Ask) -> torch.Tensor:
    return _grid(ask)[:, 1:].expand(ask.batch, -1).contiguous()


def _patch_mask(ask: _Ask) -> torch.Tensor:
    return torch.ones(ask.batch, int(_grid(ask).prod()), dtype=torch.long)


def _grid(ask: _Ask) -> torch.Tensor:
    """Frames, rows and columns of patches of one image: as few as can be merged, and not square."""
    merge = int(ask.setting(_VISION, "spatial_merge_size", "merge_size") or 1)
    return torch.tensor([[1, 2 * merge, 4 * merge]])


def _patches(ask: _Ask) -> torch.Tensor:
    """An image cut into flat patches, for towers that take images of any size."""
    rows = int(_grid(ask).prod())
    side = int(ask.setting(_VISION, "patch_size") or 14)
    return ask.floats(rows, _channels(ask) * int(ask.setting(_VISION, "temporal_patch_size") or 1) * side**2)


def _flat_patches(ask: _Ask) -> torch.Tensor:
    """Patches with their row and column, counted from 1, in front."""
    side = int(ask.setting(_VISION, "patch_size") or 16)
    patches = ask.floats(ask.batch, 12, 2 + _channels(ask) * side**2)
    patches[..., 0] = torch.arange(12) // 4 + 1
    patches[..., 1] = torch.arange(12) % 4 + 1
    return patches


def _spectrogram(ask: _Ask) -> torch.Tensor | None:
    """(batch, time, mel) or, for a model that begins with a convolution over time, (batch, mel, time)."""
    mels = ask.setting(_AUDIO, *_MELS)
    if not isinstance(mels, int):
        return None
    if ask.has_layer(nn.Conv1d, mels):
        positions = ask.setting(_AUDIO, "max_source_positions")
        return ask.floats(ask.batch, mels, 2 * positions if isinstance(positions, int) else 16 * ask.length)
    return ask.floats(ask.batch, 16 * ask.length, mels)


_MELS = (
    "num_mel_bins",
    "feature_size",
    "feature_projection_input_dim",
    "input_feat_per_channel",
    "input_feat_size",
    "input_dim",
    "mel_dim",
    "n_mels",
    "num_mels",
    "audio_mel_bins",
)


def _sound(ask: _Ask) -> torch.Tensor:
    """A waveform, long enough for several steps of all convolutions; or a spectrogram, if that is what is read."""
    time, mels = ask.setting(_AUDIO, "max_length"), ask.setting(_AUDIO, "num_mel_bins")
    if isinstance(time, int) and isinstance(mels, int):
        return ask.floats(ask.batch, time, mels)
    strides = ask.setting(_AUDIO, *_STRIDES) or (320,)
    samples = math.prod(int(step) for step in strides) * ask.length * 2
    channels = ask.setting(_AUDIO, "audio_channels")
    if channels is None and ask.setting(_AUDIO, "codebook_size", "n_codebooks", "downsampling_ratios") is None:
        return ask.floats(ask.batch, samples)
    return ask.floats(ask.batch, channels or 1, samples)


_STRIDES = ("conv_stride", "downsampling_ratios", "upsampling_ratios")


def _sound_mask(ask: _Ask) -> torch.Tensor:
    sound = next(value for name, value in ask.made.items() if name in ("input_features", "audio_mel", "input_values"))
    time = sound.shape[-1] if sound.ndim == 2 or ask.has_layer(nn.Conv1d, sound.shape[1]) else sound.shape[1]
    return torch.ones(sound.shape[0], time, dtype=torch.bool)


def _series(ask: _Ask) -> torch.Tensor:
    """(batch, time) or (batch, time, channels): as much of the past as the longest lag reaches back."""
    lags = ask.setting((), "lags_sequence")
    time = int(ask.setting((), "context_length") or 64) + (max(lags) if lags else 0)
    channels = ask.setting((), "num_input_channels") or ask.setting((), "input_size")
    if ask.setting((), "num_input_channels") is None and channels in (None, 1):
        return ask.floats(ask.batch, time)
    return ask.floats(ask.batch, time, int(channels))


def _series_features(ask: _Ask) -> torch.Tensor:
    time = _series(ask).shape[1]
    features = ask.setting((), "num_time_features")
    return ask.floats(ask.batch, time, 1 if features is None else int(features))


def _series_mask(ask: _Ask) -> torch.Tensor:
    return torch.ones_like(_series(ask))


def _states(ask: _Ask) -> torch.Tensor | None:
    """Vectors for models that read embeddings; for a tower that takes images of any size, its patches."""
    if _is_required(ask, *_GRIDS):
        return _patches(ask)
    width = ask.setting((), "hidden_size", "d_model")
    return ask.floats(ask.batch, ask.length, width) if isinstance(width, int) else None


def _encoded(ask: _Ask) -> torch.Tensor | None:
    """What another model encoded, for one that attends to it."""
    width = getattr(ask.config, "encoder_hidden_size", None)
    return ask.floats(ask.batch, ask.length, width) if isinstance(width, int) else _states(ask)


def _region_features(ask: _Ask) -> torch.Tensor | None:
    """What an object detector says about a few regions of an image."""
    width = ask.setting(_VISION, "visual_feat_dim", "visual_embedding_dim")
    return ask.floats(ask.batch, 6, width) if isinstance(width, int) else None


def _region_places(ask: _Ask) -> torch.Tensor:
    return ask.floats(ask.batch, 6, int(ask.setting(_VISION, "visual_pos_dim") or 4)).sigmoid()


def _anything(ask: _Ask) -> torch.Tensor | None:
    """``inputs``: of whatever the encoder reads."""
    encoder = getattr(ask.config, "encoder", None)
    if encoder is not None:
        return _sound(ask) if getattr(encoder, "conv_dim", None) else _spectrogram(ask)
    return _tokens(ask)


_MAKERS: dict[str, Callable[[_Ask], Any]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "qformer_input_ids": _tokens,
    "attention_mask": _token_mask,
    "global_attention_mask": _first_token,
    "bbox": _boxes,
    "pixel_values": _images,
    "pixel_values_videos": _video,
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "merge_sizes": lambda ask: torch.tensor([int(ask.setting(_VISION, "spatial_merge_size", "merge_size") or 1)]),
    "spatial_shapes": _spatial_shapes,
    "pixel_attention_mask": _patch_mask,
    "flattened_patches": _flat_patches,
    "input_features": _spectrogram,
    "audio_mel": _spectrogram,
    "input_values": _sound,
    "input_features_mask": _sound_mask,
    "audio_mel_mask": _sound_mask,
    "past_values": _series,
    "past_time_features": _series_features,
    "past_observed_mask": _series_mask,
    "hidden_states": _states,
    "inputs_embeds": _states,
    "encoder_hidden_states": _encoded,
    "query_embeds": _states,
    "latents": _states,
    "visual_feats": _region_features,
    "visual_embeds": _region_features,
    "visual_pos": _region_places,
    "inputs": _anything,
}


def _placeholder(ask: _Ask, part: str) -> int | None:
    """The token that stands for a piece of an image or a sound."""
    found = ask.setting((), f"{part}_token_id", f"{part}_token_index")
    return found if isinstance(found, int) else None


# Argument, method that says how many features it becomes, and what its placeholder is named after.
_FEATURES = (
    ("pixel_values", "get_image_features", "image"),
    ("input_features", "get_audio_features", "audio"),
)


def _add_placeholders(ask: _Ask) -> None:
    """Give a language model an image and a sound, with one placeholder token for every feature they become."""
    for name, method, part in _FEATURES:
        token = _placeholder(ask, part)
        if token is None or name not in ask.parameters or name in ask.made or "input_ids" not in ask.made:
            continue
        if any(grid in ask.parameters for grid in _GRIDS) or not hasattr(ask.model, method):
            continue
        value = _MAKERS[name](ask)
        features = None if value is None else _count_features(ask, method, name, value)
        if features is None or features % ask.batch:
            continue
        row = torch.full((ask.batch, features // ask.batch), token)
        ask.made[name] = value
        if "token_type_ids" in ask.parameters:  # says which tokens are of an image
            places = torch.cat([torch.zeros(ask.batch, 1), row == token, torch.zeros(ask.batch, ask.length - 1)], 1)
            ask.made["token_type_ids"] = places.long()
        ask.made["input_ids"] = torch.cat([ask.made["input_ids"][:, :1], row, ask.made["input_ids"][:, 1:]], 1)


def _count_features(ask: _Ask, method: str, name: str, value: torch.Tensor) -> int | None:
    """How many vectors an image or a sound becomes; none if the model cannot say it from that alone."""
    first = next(ask.model.parameters())
    try:
        with eval_mode(ask.model):
            out = getattr(ask.model, method)(**{name: value.to(first.device)})
    except REFUSALS:  # it wants more than that: the text alone will do
        return None
    found = getattr(out, "pooler_output", out)
    if isinstance(found, torch.Tensor):
        return found.numel() // found.shape[-1]
    if isinstance(found, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in found):
        return sum(part.numel() // part.shape[-1] for part in found)
    return None
