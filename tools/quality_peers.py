"""Other pruning packages, pruning the same model to the same number of parameters on the same tokens.

Both prune FFN channels here. Torch-Pruning does not come to an end on grouped-query attention whose sizes coincide (its
index mapping loops where 32 + 32 = 64), and optipfair prunes gated FFNs alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Setting = Mapping[str, Any]
Peer = Callable[[nn.Module, float, torch.Tensor, Setting], nn.Module]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def blocks_to_prune(model: Any, setting: Setting) -> list[int]:
    """The numbers of the blocks that are pruned: all but ``skip_first`` and ``skip_last`` ones."""
    return list(range(setting.get("skip_first", 0), len(model.model.layers) - setting.get("skip_last", 0)))


def channels(model: Any, ratio: float, blocks: list[int]) -> tuple[int, int]:
    """(FFN channels to remove from each of ``blocks``, channels it has) to remove ``ratio`` of all parameters.

    Raises :class:`ValueError` where no channel would stay.
    """
    mlp = model.model.layers[blocks[0]].mlp
    width = mlp.down_proj.in_features
    cost = sum(getattr(mlp, name).weight.numel() for name in PROJECTIONS) // width
    wanted = round(ratio * sum(p.numel() for p in model.parameters()) / (cost * len(blocks)))
    if wanted >= width:
        raise ValueError(f"{ratio} of all parameters cannot be removed from the FFNs of {len(blocks)} blocks")
    return wanted, width


def torch_pruning_l2(model: Any, ratio: float, rows: torch.Tensor, setting: Setting) -> nn.Module:
    """``GroupMagnitudeImportance(p=2)`` of the whole group, without data."""
    import torch_pruning as tp

    return _torch_pruning(model, ratio, tp.importance.GroupMagnitudeImportance(p=2), setting)


def torch_pruning_taylor(model: Any, ratio: float, rows: torch.Tensor, setting: Setting) -> nn.Module:
    """``GroupTaylorImportance``, |w · gradient| of the whole group, over the next-token loss of ``rows``."""
    import torch_pruning as tp

    for batch in rows.split(4):
        (model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch) / len(rows)).backward()
    importance = tp.importance.GroupTaylorImportance(multivariable=setting.get("multivariable", False))
    pruned = _torch_pruning(model, ratio, importance, setting)
    pruned.zero_grad(set_to_none=True)
    return pruned


def _torch_pruning(model: Any, ratio: float, importance: Any, setting: Setting) -> nn.Module:
    """In place: every gate and up projection of the blocks to prune is a root, everything else is ignored."""
    import torch_pruning as tp

    blocks = blocks_to_prune(model, setting)
    count, width = channels(model, ratio, blocks)
    roots = {id(getattr(model.model.layers[i].mlp, name)) for i in blocks for name in PROJECTIONS[:2]}
    ignored = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)) and id(m) not in roots]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lists every norm weight
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs={"input_ids": torch.zeros(1, 8, dtype=torch.long, device=model.device), "use_cache": False},
            importance=importance,
            global_pruning=setting.get("global_pruning", False),
            # It removes n − int(n·(1 − ratio)) of n channels: the half keeps rounding from moving that.
            pruning_ratio=(count - 0.5 / (len(blocks) if setting.get("global_pruning") else 1)) / width,
            ignored_layers=ignored,
            root_module_types=[nn.Linear],
        )
        pruner.step()
    return model


def optipfair(model: Any, ratio: float, rows: torch.Tensor, setting: Setting) -> nn.Module:
    """Peak-to-peak magnitude of the gate and up projections alone; or another ``neuron_selection_method``."""
    return _optipfair(model, ratio, None, setting)


def optipfair_data(model: Any, ratio: float, rows: torch.Tensor, setting: Setting) -> nn.Module:
    """PPM of all three projections times the norm of what the down projection sees; 16 rows a batch, as it advises."""
    return _optipfair(model, ratio, [{"input_ids": batch} for batch in rows.split(16)], setting)


def _optipfair(model: Any, ratio: float, batches: list[dict[str, torch.Tensor]] | None, setting: Setting) -> nn.Module:
    from optipfair import prune_model

    blocks = blocks_to_prune(model, setting)
    count, width = channels(model, ratio, blocks)
    return prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method=setting.get("neuron_selection_method", "MAW"),
        pruning_percentage=100 * (count + 0.5) / width,  # it rounds down
        dataloader=batches,
        layer_indices=blocks,
        show_progress=False,
    )


PEERS: dict[str, Peer] = {
    "torch-pruning L2": torch_pruning_l2,
    "torch-pruning Taylor": torch_pruning_taylor,
    "optipfair": optipfair,
    "optipfair with data": optipfair_data,
}
