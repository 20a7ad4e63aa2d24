"""``stream``: prune a folder into another one without ever holding the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

import graphprune
from graphprune.compiler import compile
from graphprune.errors import GraphPruneError
from graphprune.io.atomic import refuse_existing
from graphprune.io.fingerprint import fingerprint, of_batches
from graphprune.io.folder import GENERATION_CONFIG, check_dtype, write_folder
from graphprune.io.manifest import CONFIG, MANIFEST, StoredFile
from graphprune.io.tensors import held_tensors
from graphprune.ir.plan import Plan
from graphprune.passes.methods import DEFAULT_METHOD, passes_of
from graphprune.reporting import Report, report
from graphprune.streaming.checkpoint import Checkpoint, open_checkpoint
from graphprune.streaming.kept_plan import kept_plan
from graphprune.streaming.open_model import open_stock
from graphprune.streaming.open_pruned import open_manifest, open_pruned
from graphprune.streaming.partial import Partial, partial_folder
from graphprune.streaming.shard_writer import write_shard

# Those that look at nothing but weights, and those that look at activations and train nothing.
WEIGHTS = ("magnitude", "l1", "l2", "random", "peak-to-peak")
ACTIVATIONS = ("ppm", "wanda-sp", "flap", "slimgpt", "flap-wifv", "flap-wifn")
Say = Callable[[str], None]


def stream(
    folder: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    ratio: float | None = None,
    *,
    method: str = DEFAULT_METHOD,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    deploy: str | None = None,
    allocation: str | Mapping[str, float] | None = None,
    round_to: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_first: int = 0,
    skip_last: int = 0,
    inner_axes: bool = False,
    width: bool = False,
    experts: bool = False,
    seed: int = 0,
    data: Any = None,
    samples: int | None = None,
    length: int = 128,
    device: str | torch.device | None = None,
    progress: Say | None = None,
) -> Report:
    """Prune the checkpoint in ``folder`` into the new folder ``directory``, a piece of a tensor at a time.

    The result is bit by bit what :func:`graphprune.compile` and :func:`graphprune.save` make of the loaded model, and
    is read as that is. The plan is made on the meta device by the same passes. The oracle would have to run the model
    twice and does not, so nothing is proven about the weights: ``oracle_error`` is None. What was checked is that the
    model of the new shapes runs on the meta device, with a cache too, and that the folder fits it.

    Interrupted, it leaves a hidden folder beside ``directory``, from which the same call goes on.

    Args:
        folder: what :func:`graphprune.save` or ``save_pretrained`` of transformers wrote, as safetensors.
        directory: a folder that does not exist yet; its parents are made.
        ratio: parameters to remove / all parameters, in (0, 1).
        method: ``"magnitude"``, ``"l1"``, ``"l2"``, ``"peak-to-peak"`` or ``"random"``, which look at weights alone, a
            piece at a time; or ``"ppm"``, ``"wanda-sp"``, ``"flap"``, ``"slimgpt"`` (and the criteria of FLAP), which
            run the model: weights come from disk as operators need them, and those of one block stay in memory. The
            default is that of :func:`graphprune.compile`.
        plan: a plan to replay instead of scoring.
        dtype: of the floating-point weights; as stored by default.
        max_shard_size: as for :func:`graphprune.save`.
        deploy, allocation, round_to, include, exclude, skip_first, skip_last, inner_axes, width, experts, seed: as for
            :func:`graphprune.compile`.
        data, samples, length, device: what methods that look at activations run, and where, as for
            :func:`graphprune.compile`, with the tokenizer of ``folder``. Without data the model writes some, for which
            it is read from disk once per token.
        progress: called with what is done, and how many bytes of it.

    Returns:
        The report, as of :func:`graphprune.compile`.

    Raises:
        GraphPruneError: for anything the user can act on, such as a folder that is damaged, or malicious: no code and
            no pickle in it is read, and no size in it believed that its weights do not have.
    """
    source, target = Path(os.path.abspath(folder)), Path(os.path.abspath(directory))
    _check(source, method, plan, dtype)
    refuse_existing(target)
    choices: dict[str, Any] = {
        "method": method,
        "deploy": deploy,
        "allocation": allocation if allocation is None or isinstance(allocation, str) else dict(allocation),
        "round_to": round_to,
        "include": [include] if isinstance(include, str) else list(include),
        "exclude": [exclude] if isinstance(exclude, str) else list(exclude),
        "skip_first": skip_first,
        "skip_last": skip_last,
        "inner_axes": inner_axes,
        "width": width,
        "experts": experts,
        "seed": seed,
        "samples": samples,
        "length": length,
        "device": device,
    }
    say = progress or (lambda text: None)
    say(f"reading {source}")
    runs = plan is None and method in ACTIVATIONS
    with ExitStack() as stack:
        try:
            model, checkpoint = _open(source, dtype, stack)
            tokenizer = _tokenizer(source)
            key = _key(source, checkpoint, ratio, plan, dtype, max_shard_size, {**choices, "data": _plain(data)})
            partial = stack.enter_context(partial_folder(target, key))
            how = None if plan is not None else (kept_plan(passes_of(method), partial, stack),)
            given: dict[str, Any] = {**choices, "data": data, "tokenizer": tokenizer} if runs else choices
            with nullcontext() if runs else _one_thread():
                pruned = compile(model, ratio, plan=plan, passes=how, verify=False, progress=progress, **given)
            report(pruned).settings.pop("passes", None)  # those of the method, which is told
            with _one_thread():
                _write(pruned, tokenizer, partial, max_shard_size, say)
            stack.close()
        except (OSError, SafetensorError, ValueError) as error:
            raise GraphPruneError(f"{target} could not be written: {error}. The same call goes on.") from error
    return report(pruned)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch in one thread: pieces are small, and two threads that meet after each wait longer than they work.

    Another one writes meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(source: Path, method: str, plan: Plan | None, dtype: Any) -> None:
    if not source.is_dir():
        raise GraphPruneError(f"There is no folder {source}: what is streamed is a folder of safetensors files.")
    if plan is None and method not in (*WEIGHTS, *ACTIVATIONS):
        passes_of(method)  # an unknown name is another error
        raise GraphPruneError(
            f"{method!r} needs gradients or trains, for which the model has to be in memory: choose one of "
            f"{', '.join((*WEIGHTS, *ACTIVATIONS))}, or replay a plan that it made."
        )
    check_dtype(dtype)


def _open(source: Path, dtype: torch.dtype | None, stack: ExitStack) -> tuple[nn.Module, Checkpoint]:
    if (source / MANIFEST).is_file():
        manifest, checkpoint = open_manifest(source)
        stack.enter_context(closing(checkpoint))
        return open_pruned(source, manifest, checkpoint, dtype), checkpoint
    checkpoint = stack.enter_context(closing(open_checkpoint(source)))
    return open_stock(source, checkpoint, dtype), checkpoint


def _key(source: Path, checkpoint: Checkpoint, *choices: Any) -> str:
    """What tells this command from any other, and its input from what was there before."""
    *others, plan, dtype, shard_size, options = choices
    texts = [
        (source / name).read_text(encoding="utf-8", errors="replace") if (source / name).is_file() else ""
        for name in (CONFIG, GENERATION_CONFIG, MANIFEST)
    ]
    given = json.dumps([*others, str(dtype), str(shard_size), options], sort_keys=True, default=repr)
    return fingerprint(
        graphprune.__version__,
        torch.__version__,
        str(source),
        checkpoint.fingerprint,
        *texts,
        given,
        plan.to_json() if plan is not None else "",
    )


def _plain(data: Any) -> Any:
    """What tells calibration data from other. That what comes of it is the same is looked at as well."""
    if isinstance(data, torch.Tensor):
        return of_batches([{"data": data}])
    return data if isinstance(data, (str, list)) and all(isinstance(one, str) for one in data) else type(data).__name__


def _write(pruned: nn.Module, tokenizer: Any, partial: Partial, max_shard_size: int | str, say: Say) -> None:
    distinct = {id(item.tensor): item.tensor for item in held_tensors(pruned).values()}
    total = sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
    done = 0

    def write(tensors: dict[str, torch.Tensor], path: Path) -> StoredFile:
        nonlocal done
        finished = partial.finished(path)
        if finished is None:

            def count(more: int) -> None:
                nonlocal done
                done += more
                say(f"writing {path.name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

            finished = write_shard(tensors, path, count)
            partial.finish(path.name, finished)
        else:
            done += finished.bytes
            say(f"{path.name} is there already: {done / 1e9:.2f} of {total / 1e9:.2f} GB")
        return finished

    if tokenizer is not None:
        tokenizer.save_pretrained(partial.path)
    write_folder(pruned, report(pruned), partial.path, max_shard_size, write_shard=write)


def _tokenizer(source: Path) -> Any:
    """Of the folder, None where there is none. No code of the folder runs."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
