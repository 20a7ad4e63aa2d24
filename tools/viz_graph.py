"""Draw the node groups of a model: ``python tools/viz_graph.py MODEL -o graph.svg``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn

import graphprune
from graphprune.drawing import build_graph, write
from graphprune.errors import GraphPruneError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        model = _from_config(arguments.model) if arguments.config_only else _load(arguments.model)
        graph = build_graph(graphprune.inspect(model, inner_axes=arguments.inner_axes))
        write(graph, arguments.output)
    except GraphPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    groups = sum(side == "group" for _, side in graph.nodes(data="side"))
    print(f"{arguments.output}: {groups} kinds of node groups, {graph.number_of_nodes() - groups} kinds of tensors")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw which parameter dimensions of a model hang together, and why.")
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name or a GGUF file")
    parser.add_argument("-o", "--output", required=True, help="graph.dot, graph.svg or graph.png")
    parser.add_argument("--config-only", action="store_true", help="read only the config: no weights are needed")
    parser.add_argument("--inner-axes", action="store_true", help="show inner factors of products as prunable")
    return parser


def _load(name: str) -> nn.Module:
    from graphprune.io.models import load_model

    return load_model(name)[0]


def _from_config(name: str) -> nn.Module:
    """The model that a config describes, on the meta device: the class it names, or a causal language model."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config) if named is None else named(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise GraphPruneError(f"No model could be built from the config of {name}: {reason}") from error
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
