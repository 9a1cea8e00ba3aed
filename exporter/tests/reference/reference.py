"""The model in NumPy, from its description alone, and what ONNX Runtime makes of an exported bundle.

    pip install numpy safetensors onnx onnxruntime
    python reference.py --checkpoint FOLDER --bundle FOLDER   compares every output of every graph with NumPy
    python reference.py --golden golden.json                  writes the values that tests/export_parity asserts

Nothing here is shared with the exporter or the trainer: a mistake would have to be made twice. Each precision is compared
with a NumPy forward over weights rounded as the bundle stores them, so the tolerance is that of 32-bit sums in another order.
"""

import argparse
import json
import math
import sys
import tomllib
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

CLS, PAD, SEP = 0, 1, 2
MAX_TEXT = 32
HIDDEN_SLOT = -1e4
# Largest difference, as a share of the output's largest value. The backbone sums 52 layers of products; 32-bit sums of up to
# 1292 terms in another order differ by about 1e-6 of their size a layer.
TOLERANCE = 2e-4

erf = np.vectorize(math.erf, otypes=[np.float32])


def inputs(vocabulary):
    """The same in tests/export_parity: smooth pixels in [-1, 1], and a text of eight ids."""
    c, y, x = np.meshgrid(np.arange(3), np.arange(224), np.arange(224), indexing="ij")
    pixels = np.sin(0.05 * (c + 1) * x + 0.031 * y).astype(np.float32)
    words = [4 + (37 * i + 11) % (vocabulary - 5) for i in range(6)]
    return pixels, [CLS, *words, SEP]


# Another embedding width than hidden, and no more positions than needed: a mixed-up size shows.
GOLDEN_SIZES = {
    "hidden": 64, "layers": 2, "heads": 2, "feed_forward": 128, "vocabulary": 280, "positions": 40, "embedding": 48,
    "region_feature": 1292, "grid": 7,
}  # fmt: skip


def scattered(name, shape, bound, centre=0.0):
    """Values in centre +- bound, fixed by the tensor's name: the same in tests/export_parity."""
    seed = 2166136261  # FNV-1a
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 % 2**32
    x = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32(seed)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    x ^= x >> np.uint32(16)
    return (centre + bound * (x / 2**31 - 1)).astype(np.float32).reshape(shape)


def golden_weights(s):
    """The model's and the backbone's weights, none of them zero, so that every one counts."""
    h = s["hidden"]
    embedded = s["region_feature"] if s.get("image_embedding") == "pooled" else h
    embedded_text = 2 * h if s.get("text_embedding") == "both" else h
    linears = {
        "image.feature": (h, s["region_feature"]), "image.box": (h, 5), "pool.image": (h, h), "pool.text": (h, h),
        "embed.image": (s["embedding"], embedded), "embed.text": (s["embedding"], embedded_text), "lm.transform": (h, h),
        "match": (1, h),
    }  # fmt: skip
    norms = ["text.norm", "image.norm", "lm.norm"]
    for i in range(s["layers"]):
        linears[f"layers.{i}.attention.qkv"] = (3 * h, h)
        linears[f"layers.{i}.attention.output"] = (h, h)
        linears[f"layers.{i}.ffn.up"] = (s["feed_forward"], h)
        linears[f"layers.{i}.ffn.down"] = (h, s["feed_forward"])
        norms += [f"layers.{i}.attention.norm", f"layers.{i}.ffn.norm"]
    w = {"lm.bias": scattered("lm.bias", (s["vocabulary"],), 0.3)}
    w["image.mean"] = scattered("image.mean", (s["region_feature"],), 0.5)
    w["image.deviation"] = scattered("image.deviation", (s["region_feature"],), 0.5, 1.0)
    for name, rows in (("text.token", s["vocabulary"]), ("text.position", s["positions"])):
        w[f"{name}.weight"] = scattered(f"{name}.weight", (rows, h), math.sqrt(3 / h))
    for name, shape in linears.items():
        w[f"{name}.weight"] = scattered(f"{name}.weight", shape, math.sqrt(3 / shape[1]))
        w[f"{name}.bias"] = scattered(f"{name}.bias", shape[:1], 0.3)
    for name in norms:
        w[f"{name}.weight"] = scattered(f"{name}.weight", (h,), 0.3, 1.0)
        w[f"{name}.bias"] = scattered(f"{name}.bias", (h,), 0.3)

    convolutions, channels = {"stem": (32, 3, 3, 3)}, 32
    for b, (count, expansion) in enumerate(BLOCKS):
        inner = channels * expansion
        if expansion > 1:
            convolutions[f"block{b}.expand"] = (inner, channels, 1, 1)
        convolutions[f"block{b}.depthwise"] = (inner, 1, 3, 3)
        convolutions[f"block{b}.project"] = (count, inner, 1, 1)
        channels = count
    convolutions["head"] = (1280, channels, 1, 1)
    backbone = {}
    for name, shape in convolutions.items():
        kernel = scattered(f"backbone.{name}.weight", shape, math.sqrt(6 / math.prod(shape[1:])))
        backbone[f"{name}.weight"] = kernel.astype(np.float16).astype(np.float32)
        backbone[f"{name}.bias"] = scattered(f"backbone.{name}.bias", shape[:1], 0.1)
    return w, backbone


# Output channels and expansion of the inverted residual blocks.
BLOCKS = [(16, 1)] + [(24, 6)] * 2 + [(32, 6)] * 3 + [(64, 6)] * 4 + [(96, 6)] * 3 + [(160, 6)] * 3 + [(320, 6)]


class Backbone:
    """MobileNetV2 1.0 (Sandler et al., arXiv 1801.04381) with batch norm folded in."""

    STRIDED = {1, 3, 6, 13}

    def __init__(self, weights):
        self.w = weights

    def convolve(self, x, name, stride=1, relu6=True):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        out, inner, side, _ = weight.shape
        if side == 3:
            # Stride 1 pads one pixel all round, stride 2 one at bottom and right.
            x = np.pad(x, [(0, 0)] + [(1, 1) if stride == 1 else (0, 1)] * 2)
        size = (x.shape[1] - side) // stride + 1
        y = np.zeros((out, size, size), np.float32) + bias[:, None, None]
        for i in range(side):
            for j in range(side):
                patch = x[:, i : i + stride * size : stride, j : j + stride * size : stride]
                if inner == 1 and x.shape[0] == out:
                    y += weight[:, 0, i, j][:, None, None] * patch
                else:
                    y += np.tensordot(weight[:, :, i, j], patch, axes=1)
        return np.clip(y, 0, 6) if relu6 else y

    def __call__(self, pixels):
        x = self.convolve(pixels, "stem", 2)
        for b in range(len(BLOCKS)):
            stride = 2 if b in self.STRIDED else 1
            y = self.convolve(x, f"block{b}.expand") if b else x
            y = self.convolve(y, f"block{b}.depthwise", stride)
            y = self.convolve(y, f"block{b}.project", relu6=False)
            x = x + y if y.shape == x.shape else y
        x = self.convolve(x, "head")
        # Cell by cell: the mean colours of its quarters, row by row.
        quarters = pixels.reshape(3, 14, 16, 14, 16).mean((2, 4))
        colours = [quarters[:, 2 * r + i, 2 * c + j] for r in range(7) for c in range(7) for i in (0, 1) for j in (0, 1)]
        return np.concatenate([x.reshape(x.shape[0], -1).T, np.reshape(colours, (49, 12))], axis=1, dtype=np.float32)


class Unimo:
    def __init__(self, sizes, weights):
        self.sizes, self.w = sizes, weights
        self.heads, self.layers = sizes["heads"], sizes["layers"]

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def texts(self, ids):
        token, position = self.w["text.token.weight"], self.w["text.position.weight"]
        return self.norm("text.norm", token[ids] + position[: len(ids)])

    def image(self, regions):
        grid = self.sizes["grid"]
        cells = [(c / grid, r / grid, (c + 1) / grid, (r + 1) / grid, 1 / grid**2) for r in range(grid) for c in range(grid)]
        boxes = np.array([(0, 0, 1, 1, 1), *cells], np.float32)
        if "image.mean" in self.w:
            regions = (regions - self.w["image.mean"]) / self.w["image.deviation"]
        features = np.concatenate([regions.mean(0, keepdims=True), regions])
        return self.norm("image.norm", self.linear("image.feature", features) + self.linear("image.box", boxes)), features[0]

    def transformer(self, x, visible):
        """`visible[i, j]`: row i sees row j. Gives the hidden states and each layer's keys and values [heads, rows, depth]."""
        gelu = lambda x: x * 0.5 * (1 + erf(x / np.sqrt(np.float32(2))))
        split = lambda x: x.reshape(len(x), self.heads, -1).swapaxes(0, 1)
        keys, values = [], []
        for i in range(self.layers):
            q, k, v = map(split, np.split(self.linear(f"layers.{i}.attention.qkv", x), 3, axis=-1))
            scores = np.where(visible, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(x.shape)
            x = self.norm(f"layers.{i}.attention.norm", x + self.linear(f"layers.{i}.attention.output", attended))
            inner = gelu(self.linear(f"layers.{i}.ffn.up", x))
            x = self.norm(f"layers.{i}.ffn.norm", x + self.linear(f"layers.{i}.ffn.down", inner))
            keys.append(k)
            values.append(v)
        return x, np.stack(keys), np.stack(values)

    def unit(self, x):
        return x / np.linalg.norm(x)

    def logits(self, hidden):
        x = self.linear("lm.transform", hidden)
        x = self.norm("lm.norm", x * 0.5 * (1 + erf(x / np.sqrt(np.float32(2)))))
        return x @ self.w["text.token.weight"].T + self.w["lm.bias"]

    def vision(self, regions):
        x, mean = self.image(regions)
        hidden, keys, values = self.transformer(x, np.ones((len(x), len(x)), bool))
        embedded = mean if self.sizes.get("image_embedding") == "pooled" else hidden[0]
        return self.unit(self.linear("embed.image", embedded)), keys, values

    def text(self, ids):
        hidden, _, _ = self.transformer(self.texts(ids), np.ones((len(ids), len(ids)), bool))
        both = self.sizes.get("text_embedding") == "both"
        embedded = np.concatenate([hidden[0], hidden[1:].mean(0)]) if both else hidden[0]
        return self.unit(self.linear("embed.text", embedded))

    def match(self, regions, ids):
        image, text = self.image(regions)[0], self.texts(ids)
        x = np.concatenate([image, text])
        hidden, _, _ = self.transformer(x, np.ones((len(x), len(x)), bool))
        pooled = [np.maximum(self.linear(f"pool.{p}", hidden[r]), 0) for p, r in (("image", 0), ("text", len(image)))]
        return self.linear("match", pooled[0] * pooled[1])

    def caption(self, regions, ids):
        """Logits after every token, and the text's keys and values, all at once: the graph does it one token at a time."""
        image, _ = self.image(regions)
        p, n = len(image), len(ids)
        visible = np.tri(p + n, dtype=bool)
        visible[:p, :p] = True
        hidden, keys, values = self.transformer(np.concatenate([image, self.texts(ids)]), visible)
        return self.logits(hidden[p:]), keys[:, :, p:], values[:, :, p:]


def expected(sizes, model_weights, backbone_weights):
    model, backbone = Unimo(sizes, model_weights), Backbone(backbone_weights)
    pixels, ids = inputs(sizes["vocabulary"])
    regions = backbone(pixels)
    embedding, prefix_keys, prefix_values = model.vision(regions)
    logits, keys, values = model.caption(regions, ids)
    return {
        "vision.embedding": embedding,
        "vision.prefix_keys": prefix_keys,
        "vision.prefix_values": prefix_values,
        "vision.regions": regions,
        "decode.logits": logits,
        "decode.new_keys": keys,
        "decode.new_values": values,
        "text.embedding": model.text(ids),
        "match.score": model.match(regions, ids),
    }


def folded(weights):
    """The model without the standardisation of region features: (x - mean) / deviation becomes part of the layers that take them."""
    w = dict(weights)
    mean, deviation = w.pop("image.mean"), w.pop("image.deviation")
    for layer in ("image.feature", "embed.image"):
        if w[f"{layer}.weight"].shape[1] == len(mean):
            w[f"{layer}.weight"] = w[f"{layer}.weight"] / deviation
            w[f"{layer}.bias"] = w[f"{layer}.bias"] - w[f"{layer}.weight"] @ mean
    return w


def stored(weights, precision):
    """Matrices and kernels are stored in 16 bits where asked; vectors, and the boxes' embedding, always in 32."""
    half = lambda name, value: precision == "f16" and value.ndim > 1 and name != "image.box.weight"
    return {k: (v.astype(np.float16) if half(k, v) else v).astype(np.float32) for k, v in weights.items()}


def computed(folder, sizes):
    """The outputs of the bundle's graphs in ONNX Runtime, and the decoding loop around `decode`."""
    import onnx
    import onnxruntime

    def load(graph):
        path = str(folder / f"{graph}.onnx")
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, feeds)))

    pixels, ids = inputs(sizes["vocabulary"])
    mask = np.full((1, MAX_TEXT), HIDDEN_SLOT, np.float32)
    mask[0, : len(ids)] = 0
    padded = np.array([ids + [PAD] * (MAX_TEXT - len(ids))], np.int64)
    vision = load("vision")({"pixels": pixels[None]})
    text = load("text")({"ids": padded, "mask": mask})
    match = load("match")({"regions": vision["regions"], "ids": padded, "mask": mask})

    depth = sizes["hidden"] // sizes["heads"]
    past = {k: np.zeros((sizes["layers"], sizes["heads"], MAX_TEXT, depth), np.float32) for k in ("past_keys", "past_values")}
    mask = np.full((1, MAX_TEXT), HIDDEN_SLOT, np.float32)
    step = load("decode")
    logits, keys, values = [], [], []
    for slot, token in enumerate(ids):
        numbers = {"tokens": np.array([token]), "position": np.array([slot]), "mask": mask}
        out = step({**numbers, **past, "prefix_keys": vision["prefix_keys"], "prefix_values": vision["prefix_values"]})
        for kind in ("keys", "values"):
            past[f"past_{kind}"][:, :, slot] = out[f"new_{kind}"][:, :, 0]
        mask[0, slot] = 0
        logits.append(out["logits"][0])
    n = len(ids)
    return {
        **{f"vision.{k}": v for k, v in vision.items()},
        "decode.logits": np.stack(logits),
        "decode.new_keys": past["past_keys"][:, :, :n],
        "decode.new_values": past["past_values"][:, :, :n],
        "text.embedding": text["embedding"],
        "match.score": match["score"],
    }


def compare(checkpoint, bundle):
    sizes = tomllib.loads((checkpoint / "model.toml").read_text())
    model, backbone = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "backbone"))
    model = folded(model)
    failed = False
    for precision in ("f32", "f16"):
        if not (bundle / precision).is_dir():
            continue
        right = expected(sizes, stored(model, precision), stored(backbone, precision))
        found = computed(bundle / precision, sizes)
        for name, value in right.items():
            other = found[name].reshape(value.shape)
            error = float(np.abs(other - value).max() / np.abs(value).max())
            failed |= not error < TOLERANCE
            print(f"{precision} {name:22} {str(list(value.shape)):20} {error:.1e} {'ok' if error < TOLERANCE else 'FAILED'}")
    return failed


def golden(file):
    """The root mean square and a few values of each output, of the image embedding where it is pooled, and of the text
    embedding where it is of both kinds."""

    def told(value):
        flat = value.astype(np.float64).ravel()
        at = sorted({int(i) for i in np.linspace(0, flat.size - 1, 12)})
        values = [round(float(flat[i]), 7) for i in at]
        return {"rms": round(float(np.sqrt((flat**2).mean())), 7), "at": at, "values": values}

    outputs = {name: told(value) for name, value in expected(GOLDEN_SIZES, *golden_weights(GOLDEN_SIZES)).items()}
    other = {**GOLDEN_SIZES, "image_embedding": "pooled", "text_embedding": "both"}
    found = expected(other, *golden_weights(other))
    others = {"pooled_embedding": told(found["vision.embedding"]), "both_embedding": told(found["text.embedding"])}
    file.write_text(json.dumps({"sizes": GOLDEN_SIZES, "outputs": outputs, **others}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()
    if arguments.golden:
        golden(arguments.golden)
    if arguments.bundle:
        sys.exit(compare(arguments.checkpoint, arguments.bundle))
