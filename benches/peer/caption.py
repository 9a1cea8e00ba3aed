#!/usr/bin/env python3
"""What `unimo caption` does, written in Python as a user of onnxruntime, Pillow and tokenizers would, and timed beside it.

    pip install onnxruntime==1.32.0 pillow tokenizers numpy
    python3 benches/peer/caption.py --bundle BUNDLE photo.jpg …       # BUNDLE: a folder or a .tar

Both sides get one thread, the same encoded pictures in memory, the same graphs, weights and decoding; rounds take turns. The
table gives the median milliseconds of a whole caption and of its parts, and the ratio of each to `unimo` on the same library.
A bundle's forms are compared one by one (tract runs all but the static one).
Pillow decodes JPEG and resamples a little differently, and ONNX Runtime is left with its defaults here: the program says which
captions differ.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "triangle": Image.Resampling.BILINEAR,
    "catmull_rom": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}
EMPTY = np.float32(-1e4)


def file_of(graph: str, form: str) -> str:
    return f"{graph}.onnx" if form == "expanded" else f"{graph}.{form}.onnx"


class Captioner:
    def __init__(self, bundle: pathlib.Path, precision: str, form: str):
        self.manifest = tomllib.loads((bundle / "manifest.toml").read_text())
        self.tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        beam = self.manifest["decoding"]["beam"]
        options.add_free_dimension_override_by_name("hypotheses", beam)
        options.add_free_dimension_override_by_name("slots", beam * self.manifest["model"]["max_text"])
        session = lambda name: onnxruntime.InferenceSession(
            str(bundle / precision / file_of(name, form)), options, providers=["CPUExecutionProvider"]
        )
        self.vision, self.decode = session("vision"), session("decode")
        self.cls, self.sep = (self.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        vocabulary = self.manifest["model"]["vocabulary"]
        special = [self.tokenizer.token_to_id(token) for token in ("[CLS]", "[PAD]", "[UNK]", "[MASK]")]
        self.forbidden = np.zeros(vocabulary, bool)
        self.forbidden[[id for id in special if id is not None]] = True

    def pixels(self, image: Image.Image) -> np.ndarray:
        preparation = self.manifest["image"]
        size = (preparation["width"], preparation["height"])
        if image.size != size:
            image = image.resize(size, FILTERS[preparation["filter"]])
        mean, std = (np.array(preparation[key], np.float32) for key in ("mean", "std"))
        values = (np.asarray(image, np.float32) - mean) / std
        return np.ascontiguousarray(values.transpose(2, 0, 1)[None])

    def likeliest(self, logits, count, tokens, length, no_repeat):
        """The `count` likeliest allowed ids of one hypothesis, with their log-probabilities."""
        forbidden = self.forbidden.copy()
        forbidden[self.sep] = length == 1
        if no_repeat and len(tokens) >= no_repeat:
            begun = tokens[len(tokens) + 1 - no_repeat :]
            for start in range(len(tokens) - no_repeat + 1):
                if tokens[start : start + no_repeat - 1] == begun:
                    forbidden[tokens[start + no_repeat - 1]] = True
        largest = logits.max()
        normaliser = largest + np.log(np.exp(logits - largest).sum())
        allowed = np.where(forbidden, -np.inf, logits)
        best = np.argpartition(-allowed, count)[:count]
        best = best[np.lexsort((best, -allowed[best]))]
        return [(int(id), float(logits[id] - normaliser)) for id in best]

    def write(self, keys, values):
        model, decoding = self.manifest["model"], self.manifest["decoding"]
        beam, penalty, no_repeat = decoding["beam"], decoding["length_penalty"], decoding["no_repeat"]
        slots = beam * model["max_text"]
        shape = (model["layers"], model["heads"], slots, model["hidden"] // model["heads"])
        past_keys, past_values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        mask, filled = np.full((beam, slots), EMPTY), 0
        tokens = np.full(beam, self.cls)
        live, ended = [(0.0, [])], []
        for length in range(1, decoding["max_words"] + 1):
            logits, new_keys, new_values = self.decode.run(
                ["logits", "new_keys", "new_values"],
                {
                    "tokens": tokens,
                    "position": np.array([length - 1]),
                    "prefix_keys": keys,
                    "prefix_values": values,
                    "past_keys": past_keys,
                    "past_values": past_values,
                    "mask": mask,
                },
            )
            count = len(live)
            past_keys[:, :, filled : filled + count] = new_keys[:, :, :count]
            past_values[:, :, filled : filled + count] = new_values[:, :, :count]
            continuations = []
            for parent, (probability, text) in enumerate(live):
                for id, added in self.likeliest(logits[parent], beam + 1, text, length, no_repeat):
                    continuations.append((probability + added, parent, id))
            continuations.sort(key=lambda next: -next[0])
            for probability, parent, id in continuations[:beam]:
                if id == self.sep:
                    ended.append((probability / length**penalty, live[parent][1]))
            continuations = [next for next in continuations if next[2] != self.sep][:beam]
            before, mask = mask, np.full((beam, slots), EMPTY)
            for row, (_, parent, id) in enumerate(continuations):
                mask[row] = before[parent]
                mask[row, filled + parent] = 0
                tokens[row] = id
            filled += count
            live = [(probability, [*live[parent][1], id]) for probability, parent, id in continuations]
            ended = sorted(ended, key=lambda text: -text[0])[:beam]
            if not live or (len(ended) == beam and live[0][0] / length**penalty <= ended[-1][0]):
                live = []
                break
        ended += [(probability / len(text) ** penalty, text) for probability, text in live]
        return self.tokenizer.decode(max(ended, key=lambda text: text[0])[1]).strip()

    def caption(self, encoded: bytes):
        start = time.perf_counter()
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
        decoded = time.perf_counter()
        keys, values = self.vision.run(["prefix_keys", "prefix_values"], {"pixels": self.pixels(image)})
        seen = time.perf_counter()
        text = self.write(keys, values)
        done = time.perf_counter()
        return text, [1e3 * ms for ms in (done - start, decoded - start, seen - decoded, done - seen)]


def unpacked(bundle: pathlib.Path, folder: str) -> pathlib.Path:
    if bundle.is_dir():
        return bundle
    with tarfile.open(bundle) as archive:
        archive.extractall(folder, filter="data")
    return pathlib.Path(folder)


def captions_of(unimo, bundle, precision, form, library, pictures, engine):
    command = [unimo, "caption", "--jsonl", "--bundle", bundle, "--precision", precision, "--form", form, "--engine", engine]
    command += ["--threads", "1"]
    command += ["--ort-lib", library] * (engine == "ort") + pictures
    lines = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line)["caption"] for line in lines]


def bench(unimo, bundle, precision, form, library, pictures, engine, seconds):
    command = [unimo, "bench", "--json", "--bundle", bundle, "--precision", precision, "--form", form, "--engine", engine]
    command += ["--duration", max(1, round(seconds)), "--rounds", 1] + ["--ort-lib", library] * (engine == "ort") + pictures
    output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    (row,) = json.loads(output)["results"]
    return [row[part]["p50"] for part in ("ms", "decode_image_ms", "vision_ms", "text_ms")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=pathlib.Path)
    parser.add_argument("--bundle", required=True, type=pathlib.Path)
    parser.add_argument("--precision", default=None, help="default: all of the bundle")
    parser.add_argument("--form", default=None, help="expanded, dynamic or static; default: the first two, where they are there")
    parser.add_argument("--unimo", default="target/release/unimo", type=pathlib.Path)
    parser.add_argument("--seconds", default=4.0, type=float, help="of each side in each round")
    parser.add_argument("--rounds", default=5, type=int)
    options = parser.parse_args()
    # A bare name would be looked for in PATH, not here.
    options.unimo = options.unimo.resolve()
    library = pathlib.Path(os.environ.get("ORT_DYLIB_PATH") or pathlib.Path(onnxruntime.__file__).parent / "capi")
    encoded = [path.read_bytes() for path in options.pictures]
    with tempfile.TemporaryDirectory() as folder:
        bundle = unpacked(options.bundle, folder)
        precisions = tomllib.loads((bundle / "manifest.toml").read_text())["precisions"]
        print("| precision | form | program | whole ms | decode | vision | text | ratio to unimo on ort |")
        print("|---|---|---|---|---|---|---|---|")
        precisions = [options.precision] if options.precision else precisions
        forms = [options.form] if options.form else ["expanded", "dynamic"]
        combinations = [(precision, form) for precision in precisions for form in forms]
        there = lambda precision, form: (bundle / precision / file_of("decode", form)).exists()
        for precision, form in filter(lambda both: there(*both), combinations):
            captioner = Captioner(bundle, precision, form)
            written = [captioner.caption(picture)[0] for picture in encoded]
            expected = captions_of(options.unimo, bundle, precision, form, library, options.pictures, "ort")
            for path, ours, theirs in zip(options.pictures, expected, written, strict=True):
                if ours != theirs:
                    print(f"{path}: unimo writes {ours!r}, this program {theirs!r}", file=sys.stderr)
            engines = ["ort"] if form == "static" else ["ort", "tract"]
            times = {"python": []} | {f"unimo {engine}": [] for engine in engines}
            for _ in range(options.rounds):
                samples, deadline = [], time.perf_counter() + options.seconds
                while not samples or time.perf_counter() < deadline:
                    samples += [captioner.caption(picture)[1] for picture in encoded]
                times["python"].append([statistics.median(part) for part in zip(*samples)])
                for engine in engines:
                    arguments = (options.unimo, bundle, precision, form, library, options.pictures, engine, options.seconds)
                    times[f"unimo {engine}"].append(bench(*arguments))
            medians = {name: [statistics.median(part) for part in zip(*rounds)] for name, rounds in times.items()}
            for name, parts in medians.items():
                ratio = statistics.median(own[0] / ort[0] for own, ort in zip(times[name], times["unimo ort"]))
                print(f"| {precision} | {form} | {name} | " + " | ".join(f"{ms:.1f}" for ms in parts) + f" | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
