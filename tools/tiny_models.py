"""Small random models of any architecture that transformers registers, from its own default config.

Every width is divided by the same factor and every number of heads by another, so that what a config says about itself
(heads · head width = hidden size) stays true; nothing here knows a model by name. Several factors are tried, and the
first config that builds a small enough model is taken.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

LARGEST = 40_000_000  # parameters
VOCABULARY = 199
POSITIONS = 512
EXPERTS = 8

# (number of heads, width of a head) are divided by these; widths by the product.
FACTORS = ((4, 4), (2, 4), (1, 4), (4, 2), (2, 2), (1, 8), (1, 2), (2, 1), (8, 4), (4, 8), (8, 8), (1, 1))

_LAYERS = re.compile(
    r"^(n_layers?|depth|num_blocks|(num_|n_)?(encoder_|decoder_|hidden_|\w+_)?layers|e_layers|d_layers)$"
)
_HEADS = re.compile(r"(^|_)(n_?heads?|heads|n_head_kv|num_key_value_groups|num_query_groups)($|_per)|n_heads?$|_heads$")
_HEAD_WIDTH = re.compile(
    r"(head_dim|head_size|dim_head|d_head|headdim|d_kv|^kv_channels|rotary_dim|mrope_section|qk_\w+_dim|head_width)$"
)
_EXPERTS = re.compile(r"(^|_)(experts|num_experts|n_routed_experts|expert_num|num_local_experts)$")
_TOP = re.compile(r"(top_?k|experts_per_tok(en)?|moe_k|experts_per_token)$")
_FIXED = re.compile(
    r"(token_id|token_index|_idx|_id$|patch_embed_hidden_size|ids$|kernel|patch_size|num_channels|in_channels|audio_channels|out_channels_image|"
    r"type_vocab|chunk_size|window|period|offset|interval|expand|dilation|stride|ratio|factor|level|groups?$|n_groups|"
    r"num_labels|n_langs|buckets|distance|sampling_rate|num_codebooks|bits|tp$|^seed$|pool|scale|mel_bins|frames|"
    r"batch|cycles|ngram|layer_start|layer_end|queries|iters|num_classes|feature_layer|hop_length|n_fft|conv_cache|"
    r"d_conv|_step$|num_hashes|before$|after$|merge|tiles|temporal|shared_experts|hc_|num_feature|lags|expansion)"
)
_QUERIES = re.compile(
    r"(^|_)num_(object_)?queries($|_)|^num_query_tokens$|^query_length$|^num_latents$|^num_denoising$"
)
# Lists of layers whose outputs are read; the stages of a backbone count as layers.
_LAYER_PLACES = (
    "out_indices",
    "backbone_out_indices",
    "feature_layers",
    "vision_feature_layer",
    "deepstack_visual_indexes",
)
_FREE_WIDTH = re.compile(r"(^|_)(intermediate_size|ffn_dim|d_ff|dff|ffn_hidden_size|intermediate)$")
_WIDTH = re.compile(
    r"(size|dim|dims|dimension|width|d_model|d_ff|dff|ffn|inner|n_embd|n_inner|embd|channels?|rank|filters|features|planes|"
    r"d_ssm|embed|hidden|units|sizes|channel_list|channels_list)$|_dim_|_size_|intermediate_size"
)


# What the default config of a type leaves open or contradicts itself in, so that not even it can be built.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_FORECAST = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]}
# Their default backbone is of another library, timm.
_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}
OPEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"use_sliding_window": False}, "vision_config": {"pyramid_num_routed": [-1, 4]}},
    "dots3_note_text": {"use_sliding_window": False},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 30, "vocab_size_per_layer_input": 0}
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "autoformer": _FORECAST,
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    "conditional_detr": _RESNET,
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "table-transformer": _RESNET,
    "omdet-turbo": _RESNET,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "upernet": {"use_auxiliary_head": False},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 64], "axial_pos_embds_dim": [4, 12]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
}


class CannotBuild(Exception):
    """No config that was tried builds a small model."""


def tiny_models(model_type: str, cls: type[nn.Module]) -> Iterator[nn.Module]:
    """Random float32 models of ``cls`` on the CPU, in eval mode, with at most ``LARGEST`` parameters, smallest first.

    Raises :class:`CannotBuild` with the first reason when there is none.
    """
    reasons: list[str] = []
    found = False
    for config in _tiny_configs(model_type, reasons):
        if cls.config_class is not type(config):
            parts = [part for part in vars(config).values() if isinstance(part, cls.config_class)]
            config = parts[0] if parts else config
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if size > LARGEST:
                reasons.append(f"still has {size:,} parameters")
                continue
            torch.manual_seed(0)
            model = randomise(cls(config).float().eval())
        except Exception as error:  # noqa: BLE001  (whatever a constructor thinks of a config; the reason is kept)
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        found = True
        yield model
    if not found:
        raise CannotBuild(" ".join(reasons[0].split())[:300])


def _tiny_configs(model_type: str, reasons: list[str]) -> Iterator[PretrainedConfig]:
    kind = CONFIG_MAPPING[model_type]
    default = None
    for more in ({}, OPEN.get(model_type, {})):
        try:
            default = default or kind(**more)
        except Exception as error:  # noqa: BLE001
            reasons.append(f"its default config: {type(error).__name__}: {error}")
    for heads, width in FACTORS:
        for with_kinds in (False, True):
            try:
                settings = {} if default is None else _settings(default, heads, width, with_kinds)
                yield kind(**_merged(settings, OPEN.get(model_type, {})))
            except Exception as error:  # noqa: BLE001
                reasons.append(f"{type(error).__name__}: {error}")
    # Last, with all widths as they are, only with fewer tokens and images; then the default itself.
    for names in (("vocab_size", "image_size"), ()):
        try:
            settings = {n: v for n, v in _settings(default, 1, 1, False).items() if n in names} if default else {}
            yield kind(**_merged(settings, OPEN.get(model_type, {})))
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{type(error).__name__}: {error}")


def randomise(model: nn.Module) -> nn.Module:
    """Make every index of every parameter differ: fresh biases are 0 and fresh norms 1, which hides wrong slices."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            if not torch.isfinite(parameter).all():  # left uninitialised by its class
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(settings[k], v)
        for k, v in more.items()
        if isinstance(v, dict)
        and isinstance(settings.get(k), dict)
        and "model_type" not in v
        and k != "rope_parameters"
    }
    return {**settings, **more, **both}


def _settings(config: PretrainedConfig, heads: int, width: int, with_kinds: bool) -> dict[str, Any]:
    """What to give to the class of ``config`` for a smaller one; ``with_kinds`` also the list of kinds of layers."""
    accepted = {name for kind in type(config).__mro__ for name in vars(kind).get("__annotations__", {})}
    accepted |= set(inspect.signature(type(config).__init__).parameters)
    vocabulary = min(vars(config).get("vocab_size") or VOCABULARY, VOCABULARY)
    out: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name not in accepted:
            continue
        if isinstance(value, PretrainedConfig):
            out[name] = {"model_type": value.model_type, **_settings(value, heads, width, with_kinds)}
            if not value.model_type:
                out[name].pop("model_type")
        elif isinstance(value, int) and not isinstance(value, bool):
            out[name] = _number(name, value, config, heads, width, vocabulary)
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            out[name] = _numbers(name, list(value), config, heads, width, vocabulary)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            out[name] = _rope(value, width)
        elif name == "per_layer_config" and isinstance(value, dict):
            out[name] = {
                layer: {key: _number(key, v, config, heads, width, vocabulary) for key, v in own.items()}
                for layer, own in value.items()
                if isinstance(own, dict) and int(layer) < layers_needed(config)
            }
        elif with_kinds and name in _KINDS and isinstance(value, (list, tuple)):
            out[name] = list(value[: layers_needed(config)])
    places = vars(config).get("_out_indices")
    if isinstance(places, (list, tuple)) and "depths" not in vars(config):
        needed = layers_needed(config)
        if max(places) > needed:
            out["out_indices"] = list(range(needed - len(places) + 1, needed + 1))
    for name, value in _filled(config).items():
        if name in accepted and vars(config).get(name, 0) is None:
            out[name] = _number(name, value, config, heads, width, vocabulary)
    _multimodal_rope(config, out)
    return {name: value for name, value in out.items() if value != vars(config).get(name) or isinstance(value, dict)}


def _multimodal_rope(config: PretrainedConfig, out: dict[str, Any]) -> None:
    """Sections of the rotary width for time, height and width, where the default only implies them."""
    rope = vars(config).get("rope_parameters")
    wants = "mrope_section" in (getattr(type(config), "ignore_keys_at_rope_validation", None) or ())
    if not wants or not isinstance(rope, dict) or "mrope_section" in rope:
        return
    new = {**vars(config), **out}
    head = new.get("head_dim") or new["hidden_size"] // new["num_attention_heads"]
    pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    third = (3 * pairs) // 8
    out["rope_parameters"] = {**rope, "mrope_section": [pairs - 2 * third, third, third]}


def _filled(config: PretrainedConfig) -> dict[str, int]:
    """Numbers that some default configs leave open although their model needs them."""
    known = vars(config)
    heads = known.get("num_attention_heads")
    heads = heads if isinstance(heads, int) and heads else 8
    width = known.get("hidden_size")
    placeholders = {
        name: number
        for number, part in enumerate(("image", "video", "audio"), start=5)
        for name in (f"{part}_token_id", f"{part}_token_index")
    }
    return {
        **placeholders,
        "vocab_size": VOCABULARY,
        "head_dim": (width if isinstance(width, int) else 512) // heads,
        "num_key_value_heads": heads,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
    }


def _rope(settings: dict[str, Any], width: int) -> dict[str, Any]:
    return {
        key: _rope(value, width)
        if isinstance(value, dict)
        else [max(1, v // width) for v in value]
        if key == "mrope_section"
        else value
        for key, value in settings.items()
    }


def _number(name: str, value: int, config: PretrainedConfig, heads: int, width: int, vocabulary: int) -> int:
    if value <= 1:
        return value
    if _QUERIES.search(name):
        return min(value, 8)
    if name == "num_frames":
        return min(value, 4)
    if name == "window_size" and "depths" in vars(config):  # an image has few patches then
        return min(value, 2)
    if name.endswith("groups") and value > 32:  # as many as channels
        return max(1, value // (heads * width))
    if name.endswith("token_id") or name.endswith("token_index"):
        return value if value < vocabulary else vocabulary - 1 - value % 40
    if "vocab" in name and "type" not in name:
        return min(value, VOCABULARY)
    if "position" in name or name in ("n_ctx", "max_seq_len", "model_max_length", "context_length"):
        return min(value, POSITIONS)
    if name == "image_size":
        return _image_size(config, value)
    if name.startswith("index_top"):  # tokens, not experts
        return min(value, 16)
    if _TOP.search(name) or name in ("topk_group", "n_group", "num_expert_group"):
        return 1 if name == "topk_group" else min(value, 2)
    if _EXPERTS.search(name) and "shared" not in name:
        return min(value, EXPERTS)
    if name in ("first_k_dense_replace", "num_dense_layers", "max_window_layers"):
        return min(value, 1)
    if name == "num_kv_shared_layers":  # all of them, or none
        return layers_needed(config) if value == vars(config).get("num_hidden_layers") else 0
    if _LAYERS.search(name) and "per" not in name:
        return min(value, layers_needed(config))
    if _HEAD_WIDTH.search(name):
        return max(1, value // width)
    if _HEADS.search(name):
        return max(min(value, 2), value // heads)
    if _FIXED.search(name):
        return value
    if _FREE_WIDTH.search(name):  # tied to no other; some kernels want multiples
        return max(8, value // (heads * width) // 8 * 8)
    if _WIDTH.search(name) and value > 4:  # up to 4 are the channels of an image
        return max(1, value // (heads * width))
    return value


def _numbers(name: str, values: list[int], config: PretrainedConfig, heads: int, width: int, vocabulary: int) -> Any:
    if name.endswith(("token_id", "token_ids")):
        return [min(v, vocabulary - 1) for v in values]
    if name == "image_size":
        return [_image_size(config, v) for v in values]
    if len(values) == vars(config).get("num_hidden_layers", 0) or name == "num_attention_heads_per_layer":
        values = values[: layers_needed(config)]  # one per layer
    if name in _LAYER_PLACES:
        return list(range(1, len(values) + 1))
    if name.endswith(("in_channels", "num_channels")):
        return [v if v <= 4 else max(1, v // (heads * width)) for v in values]
    if name == "depths" or (_LAYERS.search(name) and "block" in name):
        return [min(v, 1) for v in values]
    return [_number(name, v, config, heads, width, vocabulary) for v in values]


def _image_size(config: PretrainedConfig, value: int) -> int:
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    return min(value, 4 * patch if isinstance(patch, int) and patch >= 8 else 64)


_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def layers_needed(config: PretrainedConfig) -> int:
    """How many layers show every kind of layer that the default config has: at least 2, at most 6."""
    places = vars(config).get("_out_indices") or vars(config).get("backbone_out_indices")
    needed = max(2, len(places)) if isinstance(places, (list, tuple)) else 2
    for name in _KINDS:
        kinds = vars(config).get(name)
        if isinstance(kinds, (list, tuple)) and kinds:
            needed = max(needed, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    return min(max(needed, 4), 6)


def non_embedding(model: nn.Module) -> dict[str, int]:
    """Name → size of every parameter that is no table of embeddings and no output projection to a vocabulary."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for get in ("get_output_embeddings", "get_input_embeddings"):
        try:
            found = getattr(model, get)() if hasattr(model, get) else None
        except (NotImplementedError, AttributeError):
            found = None
        if isinstance(found, nn.Module):
            tables |= {id(p) for p in found.parameters()}
    return {name: math.prod(p.shape) for name, p in model.named_parameters() if id(p) not in tables}
