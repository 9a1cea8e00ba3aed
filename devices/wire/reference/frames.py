"""Writes the frames that the tests of this crate compare with: python3 frames.py > frames.txt

Postcard's encoding and COBS are written out from their specifications, the CRC is zlib's; nothing is shared with the crate.
"""

import struct
import zlib


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def text(value):
    encoded = value.encode()
    return varint(len(encoded)) + encoded


def f32(value):
    return struct.pack("<f", value)


def cobs(data):
    out = bytearray()
    # Runs of up to 254 bytes without a zero, each behind its length plus one; a full run stands for no zero.
    while True:
        zero = data.find(b"\0")
        run = data if zero < 0 else data[:zero]
        if len(run) >= 254:
            out += bytes([255]) + data[:254]
            data = data[254:]
            continue
        out += bytes([len(run) + 1]) + run
        if zero < 0:
            return bytes(out)
        data = data[zero + 1 :]


def frame(kind, *fields):
    body = bytes([1, kind]) + b"".join(fields)
    return cobs(body + struct.pack("<I", zlib.crc32(body))) + b"\0"


def caption(sequence, captured_ms, latency_ms, score, words):
    return frame(1, varint(sequence), varint(captured_ms), varint(latency_ms), f32(score), text(words))


def stats(*counts, temperature=None):
    option = b"\0" if temperature is None else b"\1" + f32(temperature)
    return frame(2, *map(varint, counts), option)


for name, bytes_ in [
    ("hello", frame(0, text("0.1.0"), text("v4l2:///dev/video0"))),
    ("caption", caption(300, 1732472801123, 132, -0.5, "a small blue heart at the top")),
    ("empty", caption(0, 0, 0, 0.0, "")),
    ("long", caption(300, 1732472801123, 132, -0.5, "é" * 127)),
    ("stats", stats(1000, 24, 6, 970, 0, 0, 0)),
    ("warm", stats(1000, 24, 6, 970, 1, 2, 3, temperature=48.25)),
]:
    print(name, bytes_.hex())
