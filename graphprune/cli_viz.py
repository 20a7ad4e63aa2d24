"""The command ``graphprune viz MODEL -o graph.html``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.cli_common import new_command, print_json
from graphprune.cli_progress import progress
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.ir.plan import Plan

_EXAMPLES = """examples:
  graphprune viz model.gguf -o graph.html
  graphprune viz some-org/some-model --config-only -o graph.svg
  graphprune viz model.gguf --plan plan.json --layer 3 -o layer3.html
  graphprune viz smaller -o smaller.html
"""


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = new_command(
        commands, "viz", _viz, "draw what hangs together: .html to look around in, or .svg, .png, .dot", _EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or a .gguf file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="graph.html, .dot, .svg or .png; written anew"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="only block N, unfolded, and the groups it is in")
    parser.add_argument(
        "--group", metavar="NAME", help="only this node group (or those that match, as '*.mlp.*') and its neighbours"
    )
    parser.add_argument("--operators", action="store_true", help="draw operators too; those of --group always are")
    parser.add_argument(
        "--plan",
        metavar="FILE",
        help="show what a plan (JSON, or a saved folder) keeps; a pruned MODEL shows its own",
    )
    parser.add_argument("--config-only", action="store_true", help="read only the config: no weights are needed")
    parser.add_argument("--inner-axes", action="store_true", help="show inner factors of products as prunable")
    parser.add_argument("--width", action="store_true", help="show what is normalised as prunable")
    parser.add_argument("--experts", action="store_true", help="show whole experts of mixtures as prunable")


def _viz(options: argparse.Namespace) -> None:
    import graphprune
    from graphprune.drawing import FORMATS, View, build_graph, write
    from graphprune.io.from_config import model_from_config
    from graphprune.io.models import load_model

    if Path(options.output).suffix not in FORMATS:  # before the model is read
        raise GraphPruneError(f"{options.output} must end in {', '.join(FORMATS)}: the extension says what to draw.")
    plan, widths = _plan(options)
    with progress(options) as say:
        say(f"loading {options.model}")
        model = model_from_config(options.model) if options.config_only else load_model(options.model)[0]
        say("tracing")
        found = graphprune.inspect(
            model,
            inner_axes=options.inner_axes,
            width=options.width or (plan is not None and plan.width),
            experts=options.experts or (plan is not None and plan.experts),
        )
        say("drawing")
        graph = build_graph(found, View(options.layer, options.group, options.operators, widths))
        write(graph, options.output)
    groups = sum(side == "group" for _, side in graph.nodes(data="side"))
    tensors = sum(side == "tensor" for _, side in graph.nodes(data="side"))
    if options.json:
        print_json({"output": options.output, "groups": groups, "tensors": tensors})
    else:
        print(f"{options.output}: {groups} kinds of node groups, {tensors} kinds of tensors")


def _plan(options: argparse.Namespace) -> tuple[Plan | None, dict[str, tuple[int, int]]]:
    """The plan to show, and the width of every group before and after it."""
    from graphprune.io.checked_json import read_text
    from graphprune.io.manifest import MANIFEST, read_manifest
    from graphprune.ir.plan import Plan
    from graphprune.reporting import widths_over_all

    source = Path(options.plan or options.model)
    if (source / MANIFEST).is_file():
        done = read_manifest(source).report(None)
        return done.plan, widths_over_all(done)
    if not options.plan:
        return None, {}
    plan = Plan.from_json(read_text(source))
    return plan, plan.widths()
