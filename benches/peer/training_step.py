#!/usr/bin/env python3
"""One step of training in PyTorch and in `unimo-train`: the same model, shapes and objectives, one thread each.

    pip install torch numpy
    cargo build --release -p unimo-train
    python3 benches/peer/training_step.py --trainer target/release/unimo-train

The step: pictures of 49 regions, each with a caption that is written after it (prefix language model, label smoothing 0.1) and one
that is encoded alone and contrasted with the step's pictures; forward, backward, clipping, AdamW. Every text is as long as the
longest, so that nobody pads. Rounds take turns; the table gives the median processor seconds of a step.

`unimo-train` is timed by `pretrain --dry-run` on made-up data, and so reads, unpacks and packs its batches as well; PyTorch's lie
ready in memory. Random values stand for features and words: arithmetic does not care.
"""

import argparse
import base64
import io
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import tarfile
import tempfile
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

TEXT = 48
# So many steps that none of those that are timed writes a checkpoint or is judged.
RECIPE = """
steps = 100000
checkpoint_every = 100000
evaluate_every = 100000
[batch]
images = {images}
captions = 1
contrast_captions = 1
[optimizer]
learning_rate = 1e-4
"""
SIZE = """
name = "peer"
hidden = {hidden}
layers = {layers}
heads = {heads}
feed_forward = {feed_forward}
vocabulary = 6
positions = 64
embedding = {hidden}
region_feature = {feature}
region_classes = {classes}
detected_regions = {regions}
dropout = 0.1
"""


def write_data(folder: pathlib.Path, args) -> int:
    """Captions, a table of regions, a tokenizer, a size and a recipe; gives the number of tokens of the vocabulary."""
    rng, draw = random.Random(1), np.random.default_rng(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7))) for _ in range(4000)]
    side = np.arange(7) * 32
    corners = [(x, y, x + 32, y + 32) for y in side for x in side]
    corners = [corners[number % len(corners)] for number in range(args.regions)]
    encode = lambda values: base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
    with tarfile.open(folder / "captions-0000.tar", "w") as shard, open(folder / "regions.tsv", "w") as table:
        for number in range(4 * args.images):
            captions = [" ".join(rng.choices(words, k=60)) for _ in range(2)]
            member = json.dumps({"captions": captions}).encode()
            about = tarfile.TarInfo(f"{number}.json")
            about.size = len(member)
            shard.addfile(about, io.BytesIO(member))
            chances = np.full((args.regions, args.classes), 1 / args.classes)
            columns = [encode(corners), encode(draw.normal(size=(args.regions, args.feature))), encode(chances)]
            print(number, 224, 224, args.regions, *columns, sep="\t", file=table)
    run = [args.trainer, "tokenizer", "--pairs", folder / "captions-0000.tar", "--vocabulary", str(args.vocabulary)]
    subprocess.run([*run, "--out", folder / "tokenizer.json"], check=True, capture_output=True)
    sizes = {key: getattr(args, key) for key in ("hidden", "layers", "heads", "feed_forward", "regions", "feature", "classes")}
    (folder / "size.toml").write_text(SIZE.format(**sizes))
    (folder / "recipe.toml").write_text(RECIPE.format(images=args.images))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    return max(max(tokenizer["model"]["vocab"].values()), *(token["id"] for token in tokenizer["added_tokens"])) + 1


def ours(folder: pathlib.Path, args) -> tuple[float, int]:
    """Processor seconds of a step, and its packed rows."""
    run = [args.trainer, "pretrain", "--dry-run", "--size", "size.toml", "--recipe", "recipe.toml", "--out", "run"]
    run += ["--tokenizer", "tokenizer.json", "--pairs", "captions-0000.tar", "--regions", "regions.tsv"]
    run[0] = str(pathlib.Path(args.trainer).resolve())
    done = subprocess.run(run, cwd=folder, env=os.environ | {"RAYON_NUM_THREADS": "1"}, check=True, capture_output=True, text=True)
    seconds = re.search(r"([\d.]+) processor seconds", done.stdout)
    rows = re.search(r"(\d+) rows", done.stdout)
    if not seconds or not rows:
        raise SystemExit(f"the trainer did not tell its time:\n{done.stdout}{done.stderr}")
    return float(seconds[1]), int(rows[1])


class Layer(nn.Module):
    def __init__(self, hidden, heads, feed_forward):
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, feed_forward), nn.Linear(feed_forward, hidden)
        self.attention_norm, self.norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, mask):
        batch, rows, hidden = x.shape
        query, key, value = self.qkv(x).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.1)
        x = self.attention_norm(x + self.drop(self.output(seen.transpose(1, 2).reshape(batch, rows, hidden))))
        return self.norm(x + self.drop(self.down(F.gelu(self.up(x)))))


class Unimo(nn.Module):
    def __init__(self, vocabulary, args):
        super().__init__()
        hidden, self.regions = args.hidden, args.regions
        self.token, self.position = nn.Embedding(vocabulary, hidden), nn.Embedding(64, hidden)
        self.text_norm, self.image_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.feature, self.box = nn.Linear(args.feature, hidden), nn.Linear(5, hidden)
        self.drop = nn.Dropout(0.1)
        self.layers = nn.ModuleList(Layer(hidden, args.heads, args.feed_forward) for _ in range(args.layers))
        self.transform, self.lm_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.lm_bias = nn.Parameter(torch.zeros(vocabulary))
        self.image_space, self.text_space = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.temperature = nn.Parameter(torch.tensor(0.07).log())
        image, rows = 1 + args.regions, args.regions + TEXT
        # The image sees itself; a caption sees the image and its own past.
        mask = torch.ones(rows, rows, dtype=torch.bool).tril()
        mask[:, :image] = True
        mask[:image, image:] = False
        self.register_buffer("mask", mask)

    def texts(self, ids):
        return self.text_norm(self.token(ids) + self.position.weight[: ids.shape[1]])

    def images(self, features, boxes):
        features = torch.cat([features.mean(1, keepdim=True), features], 1)
        return self.image_norm(self.feature(features) + self.box(boxes))

    def encode(self, x, mask):
        x = self.drop(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(self, features, boxes, captions, alone):
        pairs = self.encode(torch.cat([self.images(features, boxes), self.texts(captions[:, :-1])], 1), self.mask)
        hidden = self.lm_norm(F.gelu(self.transform(pairs[:, 1 + self.regions :].flatten(0, 1))))
        logits = F.linear(hidden, self.token.weight, self.lm_bias)
        written = F.cross_entropy(logits, captions[:, 1:].flatten(), label_smoothing=0.1)
        texts = F.normalize(self.text_space(self.encode(self.texts(alone), None)[:, 0]), dim=1)
        images = F.normalize(self.image_space(pairs[:, 0]), dim=1)
        scores, own = images @ texts.T / self.temperature.exp(), torch.arange(len(images), device=images.device)
        return written + (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


class Peer:
    def __init__(self, vocabulary, args, device="cpu"):
        torch.manual_seed(1)
        self.model = Unimo(vocabulary, args).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, (0.9, 0.98), 1e-6, 0.01, fused=True)
        ids = lambda: torch.randint(4, vocabulary - 1, (args.images, TEXT))
        features = torch.randn(args.images, args.regions, args.feature)
        batch = features, torch.rand(args.images, 1 + args.regions, 5), ids(), ids()
        self.batch = [tensor.to(device) for tensor in batch]
        self.rows = args.images * (args.regions + TEXT + TEXT)

    def step(self):
        self.optimizer.zero_grad()
        self.model(*self.batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def seconds(self, steps=5):
        self.step()
        started = time.process_time()
        for _ in range(steps):
            self.step()
        return (time.process_time() - started) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default="target/release/unimo-train", help="the program to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--regions", type=int, default=49)
    parser.add_argument("--feature", type=int, default=1292)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        vocabulary = write_data(folder, args)
        peer = Peer(vocabulary, args)
        _, rows = ours(folder, args)
        if rows != peer.rows:
            raise SystemExit(f"the steps are not the same: {rows} rows in unimo-train, {peer.rows} in PyTorch")
        times = [(ours(folder, args)[0], peer.seconds()) for _ in range(args.rounds)]
    unimo, torch_seconds = (statistics.median(column) for column in zip(*times))
    print(f"{rows} rows a step, {vocabulary} tokens, {args.layers} layers of {args.hidden}; PyTorch {torch.__version__}")
    print("| processor seconds of a step | median | of each round |")
    print("|---|---|---|")
    print(f"| unimo-train | {unimo:.2f} | {' '.join(f'{a:.2f}' for a, _ in times)} |")
    print(f"| PyTorch | {torch_seconds:.2f} | {' '.join(f'{b:.2f}' for _, b in times)} |")
    print(f"unimo-train / PyTorch: {unimo / torch_seconds:.2f}")


if __name__ == "__main__":
    main()
