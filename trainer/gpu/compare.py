#!/usr/bin/env python3
"""A training step of `unimo-train` and of PyTorch on one device: samples/s, memory and utilisation of both, in one call.

    pip install torch numpy
    python3 trainer/gpu/compare.py --trainer target/release/unimo-train --sizes base edge-s edge-m
    python3 trainer/gpu/compare.py --trainer target/release/unimo-train --device cpu --sizes pico --images 4 --steps 2 --warm 1

The model, the made-up data, the step and the optimizer are those of benches/peer/training_step.py. PyTorch runs through
`torch.compile` (on CUDA also with its CUDA graphs, `reduce-overhead`) and eagerly, with bf16 autocast and in f32 (with TF32 products on
CUDA); unimo-train in bf16 and in TF32 (on the CPU: f32). What the comparison is for comes first, of every size, and each line is printed
when it is known. Where `--seconds` would be passed, what is left is left out, and said so.

Both times are the time that `--steps` steps took from end to end, by that number, after `--warm` others. unimo-train draws, packs and
uploads its batches beside the steps and may wait for them; more batches are warmed up with than it draws ahead. PyTorch's batch lies
ready on the device. Memory is what the device has in use after the steps, less what it had before; unimo-train's has the batches that
were drawn ahead in it. Utilisation is the step's floating-point operations (unimo-train's log counts them) over time and `--peak`, the
device's teraflops in dense bf16; known devices need no `--peak`. Sizes that train on a grid are given as many detected regions, so that
both get equal input without pictures; the arithmetic is the same.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Dense bf16 teraflops, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121}
KEYS = {key: key for key in ("hidden", "layers", "heads", "feed_forward", "vocabulary")} | {"feature": "region_feature"}


def peer_module():
    spec = importlib.util.spec_from_file_location("training_step", ROOT / "benches/peer/training_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(size: str, args) -> argparse.Namespace:
    config = tomllib.loads((ROOT / f"trainer/sizes/{size}.toml").read_text())
    found = {ours: config[theirs] for ours, theirs in KEYS.items()}
    found |= dict(classes=config["region_classes"], regions=config.get("detected_regions") or config["grid"] ** 2)
    # A tokenizer of 50,000 tokens cannot be trained on made-up words: the largest that can.
    found["vocabulary"] = min(found["vocabulary"], args.vocabulary)
    return argparse.Namespace(images=args.images, trainer=args.trainer, **found)


def used_memory(device: str) -> int:
    if device == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


@dataclasses.dataclass
class Found:
    """Of one way to train: seconds of a step, bytes of memory, packed rows and, of unimo-train, operations and seconds waited for data."""

    seconds: float
    memory: int
    rows: int
    operations: float = 0.0
    waited: float | None = None


def torch_step(module, vocabulary, sizes, args, mode, bf16) -> Found:
    before = used_memory(args.device)
    peer = module.Peer(vocabulary, sizes, args.device)
    rows = peer.rows
    model = peer.model if mode == "eager" else torch.compile(peer.model, mode=mode)
    autocast = lambda: torch.autocast(args.device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def step():
        peer.optimizer.zero_grad()
        with autocast():
            loss = model(*peer.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        peer.optimizer.step()

    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    try:
        for _ in range(args.warm):
            step()
        wait()
        started = time.perf_counter()
        for _ in range(args.steps):
            step()
        wait()
        return Found((time.perf_counter() - started) / args.steps, used_memory(args.device) - before, rows)
    finally:
        # What this has taken is no part of what the next one takes.
        del step, peer, model
        torch._dynamo.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def our_step(folder, args, precision, *more) -> Found:
    run = folder / "".join(["run-", precision, *more])
    command = [pathlib.Path(args.trainer).resolve(), "pretrain", "--size", "size.toml", "--recipe", "recipe.toml", "--out", run]
    command += ["--tokenizer", "tokenizer.json", "--pairs", "captions-0000.tar", "--regions", "regions.tsv"]
    command += ["--features", folder / "features", "--device", args.device, "--stop-after", str(args.warm + args.steps)]
    command += ["--precision", precision, *more]
    left = max(args.until - time.monotonic(), 1)
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=left)
    log = run / "log.jsonl"
    if not log.is_file():
        raise RuntimeError(f"unimo-train did not train:\n{done.stdout}{done.stderr}")
    steps = [step for step in map(json.loads, log.read_text().splitlines()) if "seconds" in step]
    if len(steps) != args.warm + args.steps:
        raise RuntimeError(f"unimo-train ran {len(steps)} of {args.warm + args.steps} steps:\n{done.stderr}")
    timed = steps[args.warm :]
    seconds = (steps[-1]["elapsed"] - steps[args.warm - 1]["elapsed"]) / args.steps
    memory = max(step["device_memory"] or 0 for step in timed)
    waited = statistics.fmean(step["waited"] for step in timed)
    return Found(seconds, memory, timed[0]["rows"], timed[0]["operations"], waited)


class Comparison:
    """One size, and what is known of it."""

    def __init__(self, size: str, args, module):
        self.size, self.args, self.module = size, args, module
        self.folder = tempfile.TemporaryDirectory()
        self.shapes = shapes(size, args)
        self.vocabulary = module.write_data(pathlib.Path(self.folder.name), self.shapes)
        self.found: dict[str, Found] = {}
        # The operations of a pass that keeps its activations: what is computed twice is no use of the device.
        self.counted: Found | None = None

    def ways(self, first: bool):
        """Names of ways to train, and how: those that the comparison is for, or all others."""
        args, cuda = self.args, self.args.device == "cuda"
        half, full = ("bf16", "tf32") if cuda else ("f32", "f32")
        ours = lambda precision, *more: lambda: our_step(pathlib.Path(self.folder.name), args, precision, *more)
        theirs = lambda mode, bf16: lambda: torch_step(self.module, self.vocabulary, self.shapes, args, mode, bf16)
        if first:
            yield f"unimo-train {half}", ours(half)
            if args.compile:
                yield "PyTorch compiled bf16", theirs("default", True)
            if args.compile and cuda:
                yield "PyTorch compiled, CUDA graphs, bf16", theirs("reduce-overhead", True)
            return
        yield "PyTorch eager bf16", theirs("eager", True)
        if full != half:
            yield f"unimo-train {full}", ours(full)
        if args.compile:
            yield f"PyTorch compiled {full}", theirs("default", False)
        yield f"PyTorch eager {full}", theirs("eager", False)
        yield f"unimo-train {half}, checkpointing", ours(half, "--activation-checkpointing")

    def run(self, first: bool) -> bool:
        """Whether all went well."""
        print(f"\n{self.size}{'' if first else ', the rest'}: {self.args.images} pictures a step, {self.vocabulary} tokens")
        print("| | samples/s | ms a step | waited for data | memory, GB | utilisation |")
        print("|---|---|---|---|---|---|", flush=True)
        well = True
        for what, how in self.ways(first):
            if time.monotonic() >= self.args.until:
                print(f"| {what} | left out: no time is left | | | | |", flush=True)
                continue
            try:
                found = how()
                self.counted = self.counted or (found if found.operations else None)
                if self.counted and found.rows != self.counted.rows:
                    raise RuntimeError(f"the steps are not the same: {self.counted.rows} rows in unimo-train, {found.rows} in PyTorch")
            except Exception as error:  # The others are still worth knowing.
                print(f"| {what} | failed: {' '.join(str(error).split())[:300]} | | | | |", flush=True)
                well = False
                continue
            self.found[what] = found
            print(self.line(what, found), flush=True)
        if self.counted:
            print(f"{self.counted.rows} rows and {self.counted.operations / 1e9:.1f} GFLOP a step")
        best = lambda of: min((found.seconds for what, found in self.found.items() if what.startswith(of)), default=None)
        ours, theirs = best("unimo-train"), best("PyTorch")
        if ours and theirs:
            print(f"fastest of unimo-train over fastest of PyTorch, samples/s: {theirs / ours:.2f}", flush=True)
        return well

    def line(self, what: str, found: Found) -> str:
        args = self.args
        operations = self.counted.operations if self.counted else 0
        share = f"{operations / found.seconds / args.peak / 1e12:.1%}" if args.peak and operations else "–"
        in_use = f"{found.memory / 1e9:.2f}" if args.device == "cuda" else "–"
        wait = f"{1e3 * found.waited:.2f} ms" if found.waited is not None else "–"
        return f"| {what} | {args.images / found.seconds:.1f} | {1e3 * found.seconds:.2f} | {wait} | {in_use} | {share} |"


def peak_of(name: str) -> float | None:
    known = [words for words in PEAKS if re.search(rf"\b{words}\b", name)]
    return PEAKS[max(known, key=len)] if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default=str(ROOT / "target/release/unimo-train"), help="the program to compare")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["base", "edge-s", "edge-m"], help="names of trainer/sizes")
    parser.add_argument("--images", type=int, default=64, help="pictures of a step")
    parser.add_argument("--steps", type=int, default=300, help="steps that are timed")
    parser.add_argument("--warm", type=int, default=100, help="steps before those, at least one")
    parser.add_argument("--vocabulary", type=int, default=8192, help="largest vocabulary")
    parser.add_argument("--peak", type=float, help="the device's teraflops in dense bf16")
    parser.add_argument("--seconds", type=float, default=3600, help="nothing is begun after so many")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    args.warm, args.until = max(args.warm, 1), time.monotonic() + args.seconds
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no CUDA device; --device cpu compares on the CPU")
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name()
        args.peak = args.peak or peak_of(name)
        print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    module = peer_module()
    comparisons = [Comparison(size, args, module) for size in args.sizes]
    results = [comparison.run(first) for first in (True, False) for comparison in comparisons]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
