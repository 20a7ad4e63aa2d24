"""Peak memory of a prefill: weights, activations and KV cache."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.evaluate.language_model import check_language_model, random_prompt, step
from graphprune.trace.quiet import eval_mode

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CHILD = "import sys; from graphprune.evaluate.memory import _child; _child(*sys.argv[1:])"


def peak_memory(model: nn.Module, *, batch: int = 1, prompt: int = 128) -> int:
    """Bytes on the CUDA device of ``model`` at the peak of one prefill: its own tensors and what the forward allocates.

    The prompt is random tokens: ``batch`` rows of ``prompt`` each.

    Raises:
        GraphPruneError: when it is not on a CUDA device (use :func:`peak_memory_of`), or no causal language model.
    """
    check_language_model(model, prompt)
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise GraphPruneError(f"The model is on {device}, where no peak is counted: save it, and use peak_memory_of().")
    ids = random_prompt(model, batch, prompt)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with eval_mode(model):
        step(model, ids)
    return _own_bytes(model) + torch.cuda.max_memory_allocated(device) - before


def _own_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, memory that is shared once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_memory_of(name: str, *, batch: int = 1, prompt: int = 128, dtype: torch.dtype | None = None) -> int:
    """Bytes of main memory at the peak of one prefill on the CPU: the model's tensors and what the forward allocates.

    The latter is how far the resident memory of a fresh process rises; neither what loading took for a moment nor
    Python and its libraries (some 500 MB) are in it.

    Args:
        name: what :func:`graphprune.io.models.load_model` takes.
        dtype: of the weights; as stored by default.
        batch: rows of the prompt.
        prompt: tokens in each.

    Raises:
        GraphPruneError: when the model cannot be loaded or is no causal language model, when it does not fit into
            memory, and on systems other than Linux.
    """
    if not _CLEAR.exists():
        raise GraphPruneError(f"Peak memory on the CPU is measured with {_CLEAR}, which this system does not have.")
    arguments = [name, str(batch), str(prompt), str(dtype or "").removeprefix("torch.")]
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode} (out of memory?)"]
        raise GraphPruneError(f"The memory of {name} could not be measured: {said[-1]}")
    return int(done.stdout.split()[-1])


def _child(name: str, batch: str, prompt: str, dtype: str) -> None:
    """The fresh process: prints the peak."""
    import transformers

    from graphprune.io.models import load_model

    transformers.logging.set_verbosity_error()
    try:
        model, _ = load_model(name, dtype=getattr(torch, dtype) if dtype else None)
        check_language_model(model, int(prompt))
        ids = random_prompt(model, int(batch), int(prompt))
    except GraphPruneError as error:
        sys.exit(str(error))
    with eval_mode(model):
        step(model, ids[:1, :1])  # reads every weight from disk that loading only mapped, and imports what it needs
        _give_back_freed()
        _CLEAR.write_text("5")  # the peak is from now on
        before = _kilobytes("VmRSS")
        step(model, ids)
    print(_own_bytes(model) + 1024 * (_kilobytes("VmHWM") - before))


def _give_back_freed() -> None:
    """What loading has freed would be used by the forward without a rise; glibc keeps it unless it is told."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(field: str) -> int:
    """A line of /proc/self/status, such as ``VmRSS:   10856 kB``."""
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
