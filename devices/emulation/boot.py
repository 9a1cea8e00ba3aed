#!/usr/bin/env python3
"""Boots an emulated board with a kernel and an initramfs, and shows its serial line, each line with the seconds since power-on.

Takes a picture of its screen when the guest says `board: look`. Exit status: 0 after `board: done`, or after the power was cut where
that was asked for; 1 where it never came to that.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time


def take_screenshot(monitor: str, path: str) -> None:
    """Asks QEMU's monitor for the screen, and waits until it has answered."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(monitor)
        line.settimeout(20)
        for command in [b"", f"screendump {os.path.abspath(path)} -f png\n".encode()]:
            line.sendall(command)
            while b"(qemu)" not in line.recv(4096):
                pass


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("initramfs")
    parser.add_argument("task", help="script in /data that the board runs")
    parser.add_argument("--disk", help="raw image, the board's /dev/vda")
    parser.add_argument("--screenshot", help="PNG file to write")
    parser.add_argument("--cut-after", nargs=2, metavar=("WORDS", "N"), help="cut the power after the N-th line with these words")
    parser.add_argument("--timeout", type=float, default=900, help="seconds")
    return parser.parse_args()


def main() -> int:
    wanted = arguments()
    with tempfile.TemporaryDirectory() as folder:
        monitor = os.path.join(folder, "monitor")
        machine = ["-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "2048", "-net", "none", "-device", "virtio-gpu-pci"]
        if wanted.disk:
            machine += ["-drive", f"file={wanted.disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]
        words = f"console=ttyAMA0 panic=-1 quiet task={wanted.task}"
        boot = ["-kernel", wanted.kernel, "-initrd", wanted.initramfs, "-append", words, "-no-reboot"]
        console = ["-display", "none", "-serial", "stdio", "-monitor", f"unix:{monitor},server,nowait"]
        guest = subprocess.Popen(
            ["qemu-system-aarch64", *machine, *boot, *console],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        timer = threading.Timer(wanted.timeout, guest.kill)
        timer.start()
        start, ended, seen = time.monotonic(), False, 0
        for raw in guest.stdout:
            text = raw.decode(errors="replace").rstrip().replace("\0", "")
            print(f"{time.monotonic() - start:6.1f} {text}", flush=True)
            if "board: look" in text and wanted.screenshot:
                take_screenshot(monitor, wanted.screenshot)
            if wanted.cut_after and wanted.cut_after[0] in text:
                seen += 1
                if seen == int(wanted.cut_after[1]):
                    print("the power is cut", flush=True)
                    ended = True
                    guest.kill()
                    break
            if "board: done" in text:
                ended = not wanted.cut_after
                guest.kill()
        guest.wait()
        timer.cancel()
    return 0 if ended else 1


if __name__ == "__main__":
    sys.exit(main())
