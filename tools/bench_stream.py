"""How fast and how large is pruning a checkpoint from disk to disk, next to copying its bytes?

    python tools/bench_stream.py                       # a random bf16 Llama of about 3 GB, in shards
    python tools/bench_stream.py --gigabytes 0.3       # a smaller one

Everything lies in a temporary folder (``--folder`` says where). ``cp`` and the stream run in turn, each in a process of
its own, after all that is dirty was written to the disk. The stream ends when all of it is on the disk; of ``cp`` both
are said, when it ends and when its bytes are there. The peak is that of resident memory over what the interpreter has
after importing the libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_STREAM = """
import json, resource, sys, time
import graphprune, torch, transformers
from graphprune.compiler import compile
from graphprune.streaming.stream import stream
transformers.LlamaForCausalLM, transformers.AutoTokenizer, transformers.GenerationConfig

def now():
    with open("/proc/self/status") as file:
        return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)
                if name in ("VmHWM", "VmRSS")}

before = now()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
start, used = time.perf_counter(), time.process_time()
found = stream(sys.argv[1], sys.argv[2], float(sys.argv[3]), method=sys.argv[4])
print(json.dumps({"seconds": time.perf_counter() - start, "processor": time.process_time() - used,
                  "libraries": before["VmRSS"], "peak": now()["VmHWM"], "ratio": found.ratio, "passes": found.seconds}))
"""


def make(folder: Path, gigabytes: float, shard: str) -> int:
    """A random checkpoint of about so many bytes, written shard by shard; returns the bytes."""
    import torch
    import transformers

    hidden, intermediate, vocabulary = 2048, 5632, 32000
    layer = 2 * (4 * hidden * hidden + 3 * hidden * intermediate)
    layers = max(1, round((gigabytes * 1e9 - 4 * hidden * vocabulary) / layer))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        for rows in parameter.data.split(256):
            rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    model.save_pretrained(folder, max_shard_size=shard)
    return sum(path.stat().st_size for path in folder.iterdir())


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that ``cp -r`` takes, in a process of its own, and until all is on the disk."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - start
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    written = time.perf_counter() - start
    shutil.rmtree(target)
    return copied, written


def streamed(source: Path, target: Path, ratio: float, method: str) -> dict:
    """What the stream took, in a process of its own."""
    subprocess.run(["sync"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(source), str(target), str(ratio), method], check=True, capture_output=True
    )
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--shard", default="500MB", help="of the checkpoint that is read")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--folder", help="where to make the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-stream-") as folder:
        source, target = Path(folder, "dense"), Path(folder, "out")
        size = make_in_process(source, options)
        print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards")
        for _ in range(options.runs):
            cp, synced = copied(source, target)
            found = streamed(source, target, options.ratio, options.method)
            over = (found["peak"] - found["libraries"]) / 1e6
            print(
                f"cp {cp:.1f} s, {synced:.1f} s until on the disk; stream {found['seconds']:.1f} s, of the processor "
                f"{found['processor']:.1f} s ({options.method}, {found['ratio']:.3f} removed): "
                f"{cp / found['seconds']:.0%} and {synced / found['seconds']:.0%} of the throughput; "
                f"peak {over:.0f} MB over the libraries"
            )
            print({name: round(seconds, 2) for name, seconds in found["passes"].items() if seconds > 0.05})


def make_in_process(source: Path, options: argparse.Namespace) -> int:
    """:func:`make` in a process whose memory goes with it."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from bench_stream import make; "
    code += "print(make(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))"
    here = str(Path(__file__).resolve().parent)
    done = subprocess.run(
        [sys.executable, "-c", code, here, str(source), str(options.gigabytes), options.shard],
        check=True,
        capture_output=True,
    )
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
