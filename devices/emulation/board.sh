#!/usr/bin/env bash
# The whole path on an emulated board: 64-bit ARM, a camera that sees a picture, a screen, a disk, and `unimo` between them.
#   1. `unimo watch` captions the picture; caption, screen, serial line and gallery are checked, and the screenshot is kept.
#   2. The camera is pulled out and plugged in again while it is watched.
#   3. The power is cut while a gallery is filled; nothing that was acknowledged may be lost.
#
#   devices/emulation/board.sh [PICTURE] [WORDS]      (default: runtime/samples/blue-circle.png 'a blue circle')
#
# PICTURE is what the camera sees, WORDS what its caption must contain (less a leading article) and what is searched for. Needs
# Debian with qemu-system-arm, kmod, cpio, xz-utils and e2fsprogs, and `unimo` of `devices/package/package.sh aarch64 release`.
# Kernel and camera (vivid) are Debian's own. Takes some five minutes. Emulation is some hundred times slower than a board: nothing
# is to be read from its times.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
picture=$(realpath "${1:-runtime/samples/blue-circle.png}")
words=${2:-a blue circle}
program=${UNIMO_PROGRAM:-${CARGO_TARGET_DIR:-$root/target}/aarch64-unknown-linux-gnu/release/unimo}
tools=${UNIMO_BOARD_TOOLS:-$root/target-boards/tools}
out=$root/target-boards/emulated
# shellcheck source=../package/debian.sh
. devices/package/debian.sh

say() { printf 'emulation: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

debian || fail "this needs a Debian system, for its kernel"
[ -e "$tools/env.sh" ] || devices/package/toolchain.sh "$tools"
export PATH=$PATH:/sbin:/usr/sbin
for command in qemu-system-aarch64 modprobe cpio xz mkfs.ext4; do
    command -v "$command" >/dev/null || fail "$command is missing: apt-get install qemu-system-arm kmod cpio xz-utils e2fsprogs"
done
[ -x "$program" ] || fail "$program is missing: devices/package/package.sh aarch64 release"
[ -e "$tools/python/lib"/python3*/site-packages/PIL ] || "$tools/python/bin/pip" install --quiet --disable-pip-version-check pillow

suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
system=$tools/board
if [ ! -d "$system" ]; then
    say "C libraries, busybox and v4l-utils, from Debian $suite"
    fetch_packages "$suite" "$tools/apt" "$system" busybox-static:arm64 libc6:arm64 libgcc-s1:arm64 libstdc++6:arm64 \
        v4l-utils:arm64 libv4l-0:arm64 libv4lconvert0:arm64 libjpeg62-turbo:arm64 libudev1:arm64
fi
if [ ! -d "$tools/kernel" ]; then
    package=$(kernel_package "$suite" "$tools/apt")
    say "$package, from Debian $suite"
    fetch_packages "$suite" "$tools/apt" "$tools/kernel" "$package:arm64"
fi
kernel=$(echo "$tools"/kernel/boot/vmlinuz-*)
modules=$(echo "$tools"/kernel/lib/modules/*)
version=${modules##*/}

say "initramfs"
files=$out/files
rm -rf "$out"
mkdir -p "$files"/{bin,dev,proc,sys,tmp,disk,data/pictures,lib/modules/"$version"}
cp devices/emulation/guest/init "$files/init"
cp devices/emulation/guest/{watch,fill,verify} "$files/data/"
cp runtime/samples/*.png "$files/data/pictures/"
printf '%s' "$words" >"$files/data/words"
cp "$system/bin/busybox" "$files/bin/busybox"
for name in sh mount modprobe sleep uname nproc free awk sed poweroff cat hexdump; do ln -s busybox "$files/bin/$name"; done
cp "$system/usr/bin/v4l2-ctl" "$program" "$files/bin/"
libraries=("$system"/{usr/,}lib/aarch64-linux-gnu)
for library in ld-linux-aarch64 libc libm libdl librt libpthread libgcc_s libstdc++ libudev libv4l2 libv4lconvert libjpeg; do
    find -L "${libraries[@]}" -maxdepth 1 -name "$library.so.*" -exec cp -L {} "$files/lib/" \;
done
[ -e "$modules/modules.dep" ] || depmod --basedir "$tools/kernel" "$version"
for module in virtio_pci virtio-gpu virtio_blk crc32c_generic ext4 vivid; do
    modprobe --dirname "$tools/kernel" --set-version "$version" --show-depends "$module" | awk '$1 == "insmod" { print $2 }'
done | sort -u | while read -r module; do
    to=$files/lib/modules/$version/${module#"$modules"/}
    mkdir -p "$(dirname "$to")"
    case $module in *.xz) xz --decompress --stdout "$module" >"${to%.xz}" ;; *) cp "$module" "$to" ;; esac
done
cp "$modules"/modules.{builtin,builtin.modinfo,order} "$files/lib/modules/$version/"
depmod --basedir "$files" "$version"
# What the S-Video socket carries: 720×480 pixels, YUYV.
"$tools/python/bin/python" - "$picture" "$files/data/picture.yuyv" <<'PYTHON'
import sys
from PIL import Image

source, target = sys.argv[1:]
y, u, v = Image.open(source).convert("RGB").resize((720, 480)).convert("YCbCr").split()
u, v = (plane.resize((360, 480), Image.Resampling.BOX).tobytes() for plane in (u, v))
frame = bytearray(720 * 480 * 2)
frame[0::2], frame[1::4], frame[3::4] = y.tobytes(), u, v
open(target, "wb").write(frame)
PYTHON
(cd "$files" && find . | cpio --create --format newc --quiet --owner 0:0) | gzip -1 >"$out/initramfs.gz"

# boot NAME OPTION…: boots into a task, and keeps its log.
boot() {
    local name=$1
    shift
    say "boot: $name"
    python3 devices/emulation/boot.py "$kernel" "$out/initramfs.gz" "$name" "$@" | tee "$out/$name.log" || fail "the board did not come to its end"
}
logged() { grep -aqF -- "$2" "$out/$1.log" || fail "$1: nothing says \"$2\""; }

bare=${words#a }
boot watch --screenshot "$out/screen.png"
logged watch "board: watch ended with 0"
grep -aF '"caption"' "$out/watch.log" | grep -aF '"frame"' | head -1 | grep -aqF "$bare" || fail "the caption does not say \"$bare\""
grep -aF '"results"' "$out/watch.log" | grep -aqF "$bare" || fail "the search did not find it"
# A frame on the line holds the caption as it is, in UTF-8.
grep -aF 'board: serial' "$out/watch.log" | grep -aqF "$(printf '%s' "$bare" | od -An -v -tx1 | tr -d ' \n')" ||
    fail "the serial line does not carry it"
logged watch "board: watch of the pulled camera ended with 0"
grep -aqE '[1-9][0-9]* reconnects' "$out/watch.log" || fail "the camera that was plugged in again was not watched again"
[ "$(grep -acF '"frame"' "$out/watch.log")" -eq 5 ] || fail "there are not five captions, one and four"
# The screen shows the frame and the caption: as many different colours as a picture has, and white letters below.
"$tools/python/bin/python" - "$out/screen.png" <<'PYTHON' || fail "the screen shows no frame and caption"
import sys
from PIL import Image

screen = Image.open(sys.argv[1]).convert("RGB")
width, height = screen.size
frame = screen.crop((0, 0, width, height * 2 // 3))
letters = screen.crop((0, height * 2 // 3, width, height)).convert("L").point(lambda light: 255 if light > 250 else 0)
sys.exit(0 if len(frame.getcolors(1 << 24)) > 100 and letters.getbbox() else 1)
PYTHON

truncate --size 64M "$out/disk"
mkfs.ext4 -q "$out/disk"
boot fill --disk "$out/disk" --cut-after '"source"' 2
boot verify --disk "$out/disk"
logged verify "board: verify ended with 0"
kept=$(grep -ao '"images":[0-9]*' "$out/verify.log" | cut -d: -f2)
[ "${kept:-0}" -ge 2 ] || fail "two pictures were acknowledged before the power was cut, ${kept:-0} are there after it"
say "captioned, shown ($out/screen.png), found; camera plugged in again; $kept pictures kept through a power cut"
