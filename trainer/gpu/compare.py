#!/usr/bin/env python3
"""A training step of `unimo-train` and of PyTorch on one device: samples/s, memory and utilisation of both, in one call.

    pip install torch numpy
    python3 trainer/gpu/compare.py --trainer target/release/unimo-train --sizes edge-s edge-m base
    python3 trainer/gpu/compare.py --trainer target/release/unimo-train --device cpu --sizes pico --images 4 --steps 2

The model, the made-up data, the step and the optimizer are those of benches/peer/training_step.py. PyTorch runs eagerly and
through `torch.compile`, in f32 (with TF32 products on CUDA) and with bf16 autocast; unimo-train in TF32 and in bf16 (on the
CPU: f32).

unimo-train's time is the median of its log's `seconds`: it draws, packs and uploads its batches beside the steps and may wait
for them. PyTorch's batch lies ready on the device. Memory is what the device has in use after the steps, less what it had
before. Utilisation is the step's floating-point operations (unimo-train's log counts them) over time and `--peak`, the device's
teraflops in dense bf16; known devices need no `--peak`. Sizes that train on a grid are given as many detected regions, so that
both get equal input without pictures; the arithmetic is the same.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Dense bf16 teraflops, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
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


def torch_step(module, vocabulary, sizes, args, compiled, bf16):
    """Seconds of a step, bytes of memory, packed rows."""
    before = used_memory(args.device)
    peer = module.Peer(vocabulary, sizes, args.device)
    rows = peer.rows
    model = torch.compile(peer.model) if compiled else peer.model
    autocast = lambda: torch.autocast(args.device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def step():
        peer.optimizer.zero_grad()
        with autocast():
            loss = model(*peer.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        peer.optimizer.step()

    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for _ in range(args.warm):
        step()
    wait()
    started = time.perf_counter()
    for _ in range(args.steps):
        step()
    wait()
    seconds, memory = (time.perf_counter() - started) / args.steps, used_memory(args.device) - before
    del peer, model
    if args.device == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return seconds, memory, rows


def our_step(folder, args, precision, *more):
    """Seconds of a step, bytes of memory, packed rows, operations of a step, seconds that it waited for its data."""
    run = folder / "".join(["run-", precision, *more])
    command = [pathlib.Path(args.trainer).resolve(), "pretrain", "--size", "size.toml", "--recipe", "recipe.toml", "--out", run]
    command += ["--tokenizer", "tokenizer.json", "--pairs", "captions-0000.tar", "--regions", "regions.tsv"]
    command += ["--features", folder / "features", "--device", args.device, "--stop-after", str(args.warm + args.steps)]
    command += ["--precision", precision, *more]
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    log = run / "log.jsonl"
    if not log.is_file():
        raise SystemExit(f"unimo-train did not train:\n{done.stdout}{done.stderr}")
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    timed = [step for step in steps if "seconds" in step][args.warm :]
    if len(timed) != args.steps:
        raise SystemExit(f"unimo-train ran {len(timed)} of {args.steps} steps:\n{done.stderr}")
    median = lambda key: statistics.median(step[key] for step in timed)
    memory = max(step["device_memory"] or 0 for step in timed)
    return median("seconds"), memory, timed[0]["rows"], timed[0]["operations"], median("waited")


def compare(size: str, args, module) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, sizes = pathlib.Path(name), shapes(size, args)
        vocabulary = module.write_data(folder, sizes)
        precisions = ["f32"] if args.device == "cpu" else ["tf32", "bf16"]
        ours = {p: our_step(folder, args, p) for p in precisions}
        # The operations of a pass that keeps its activations: what is computed twice is no use of the device.
        rows, operations = next(iter(ours.values()))[2:4]
        ours[f"{precisions[-1]}, checkpointing"] = our_step(folder, args, precisions[-1], "--activation-checkpointing")
        lines = [(f"unimo-train {p}", seconds, memory, waited) for p, (seconds, memory, _, _, waited) in ours.items()]
        for compiled in [False, True] if args.compile else [False]:
            for bf16 in (False, True):
                seconds, memory, their_rows = torch_step(module, vocabulary, sizes, args, compiled, bf16)
                if their_rows != rows:
                    raise SystemExit(f"the steps are not the same: {rows} rows in unimo-train, {their_rows} in PyTorch")
                precision = "bf16" if bf16 else "f32" if args.device == "cpu" else "tf32"
                lines.append((f"PyTorch {'compiled' if compiled else 'eager'} {precision}", seconds, memory, None))
    print(f"\n{size}: {rows} rows and {operations / 1e9:.1f} GFLOP a step of {args.images} pictures, {vocabulary} tokens")
    print("| | samples/s | ms a step | waited for data | memory, GB | utilisation |")
    print("|---|---|---|---|---|---|")
    for what, seconds, memory, waited in lines:
        share = f"{operations / seconds / args.peak / 1e12:.1%}" if args.peak else "–"
        in_use = f"{memory / 1e9:.2f}" if args.device == "cuda" else "–"
        wait = f"{1e3 * waited:.2f} ms" if waited is not None else "–"
        print(f"| {what} | {args.images / seconds:.1f} | {1e3 * seconds:.2f} | {wait} | {in_use} | {share} |")
    best = lambda start: min(seconds for what, seconds, *_ in lines if what.startswith(start))
    print(f"fastest of unimo-train over fastest of PyTorch, samples/s: {best('PyTorch') / best('unimo-train'):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default=str(ROOT / "target/release/unimo-train"), help="the program to compare")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", nargs="+", default=["edge-s", "edge-m", "base"], help="names of trainer/sizes")
    parser.add_argument("--images", type=int, default=64, help="pictures of a step")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--warm", type=int, default=5, help="steps before those")
    parser.add_argument("--vocabulary", type=int, default=8192, help="largest vocabulary")
    parser.add_argument("--peak", type=float, help="the device's teraflops in dense bf16")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("PyTorch sees no CUDA device; --device cpu compares on the CPU")
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name()
        args.peak = args.peak or next((peak for known, peak in PEAKS.items() if known in name), None)
        print(f"{name}, PyTorch {torch.__version__}", file=sys.stderr)
    module = peer_module()
    for size in args.sizes:
        compare(size, args, module)


if __name__ == "__main__":
    main()
