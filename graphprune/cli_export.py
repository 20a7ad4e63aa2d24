"""The command ``graphprune export MODEL -o DIR --format onnx``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from graphprune import cli_config
from graphprune.cli_common import new_command, print_json
from graphprune.cli_progress import progress
from graphprune.errors import GraphPruneError

_EXAMPLES = """examples:
  graphprune export smaller -o smaller-onnx --format onnx
  graphprune export smaller -o smaller-pt2 --format pt2 --dtype bfloat16
  graphprune export smaller -o half --format safetensors --dtype float16 --portable
onnx and pt2 are one graph from tokens (or images, …) to logits, without a cache, checked against the model before the
folder appears. safetensors is what prune writes, in another dtype, in other shards, or portable. For GGUF and vLLM see
docs/serving.md: they begin with what prune --deploy transformers writes.
"""
_FORMATS = ("onnx", "pt2", "safetensors")


def add_command(commands: Any) -> None:
    """Add it to the subparsers ``commands``."""
    parser = new_command(
        commands,
        "export",
        _export,
        "write a model for other runtimes: ONNX, torch.export, or safetensors in another dtype",
        _EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that graphprune wrote, or any other model")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--format", required=True, choices=_FORMATS, help="what to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: as stored; onnx float32)"
    )
    parser.add_argument("--portable", action="store_true", help="safetensors: write a modelling file too")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="safetensors: of one file at most (default 5GB)")


def _export(options: argparse.Namespace) -> None:
    import torch

    from graphprune.deploy.exported import export
    from graphprune.io.folder import save
    from graphprune.io.models import load_model

    output = Path(options.output)
    if output.exists():
        raise GraphPruneError(f"{output} exists already; give a folder that does not.")
    plain = options.format == "safetensors"
    if not plain and (options.portable or options.max_shard_size):
        raise GraphPruneError(f"--portable and --max-shard-size are of --format safetensors, not of {options.format}.")
    dtype = options.dtype or ("float32" if options.format == "onnx" else None)
    with progress(options) as say:
        say(f"loading {options.model}")
        model, tokenizer = load_model(options.model, dtype=getattr(torch, dtype) if dtype else None)
        error = None
        if plain:
            say(f"writing {output}")
            size = options.max_shard_size or "5GB"
            save(model, output, tokenizer=tokenizer, max_shard_size=size, portable=options.portable)
        else:
            error = export(model, output, options.format, tokenizer=tokenizer, progress=say)
    cli_config.write_run(options, output)
    files = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    if options.json:
        print_json({"output": str(output), "format": options.format, "files": files, "error": error})
        return
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print(f"written to {output}" + ("" if error is None else f"; differs by {error:.1e} of the largest output"))
