#!/usr/bin/env bash
# Gathers in one folder what building for a board needs beside Rust, and writes FOLDER/env.sh to be sourced. Nothing is installed
# on the machine but rustup's targets, and what is there already is not fetched again.
#
#   devices/package/toolchain.sh [FOLDER]                          (default: target-boards/tools)
#
# zig and cargo-zigbuild come from PyPI: they link against the glibc of an older system than this one. The boards' standard
# libraries come from rustup. On Debian, an emulator to run the result and the C libraries that it loads come out of a newer
# suite (UNIMO_SUITE names it: ONNX Runtime crashes under QEMU before 10, which Debian 12 does not have); elsewhere the machine's
# own qemu-user and cross libraries are taken.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${1:-$here/../../target-boards/tools}")
suite=${UNIMO_SUITE:-forky}
mkdir -p "$folder"
# shellcheck source=debian.sh
. "$here/debian.sh"

say() { printf 'toolchain: %s\n' "$*" >&2; }

(cd "$here" && rustup target add aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf) >&2

if [ ! -x "$folder/python/bin/cargo-zigbuild" ]; then
    say "zig and cargo-zigbuild, from PyPI"
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install --quiet --disable-pip-version-check ziglang==0.17.1 cargo-zigbuild==0.24.1
fi

aarch64_libraries=/usr/aarch64-linux-gnu armv7_libraries=/usr/arm-linux-gnueabihf emulator=
if debian; then
    if [ ! -d "$folder/emulator" ]; then
        say "qemu-user, from Debian $suite"
        fetch_packages "$suite" "$folder/apt" "$folder/emulator" qemu-user
    fi
    emulator=$folder/emulator/usr/bin/
    for board in aarch64:arm64 armv7:armhf; do
        [ ! -d "$folder/sysroot-${board%:*}" ] || continue
        say "C libraries of ${board%:*}, from Debian $suite"
        fetch_packages "$suite" "$folder/apt" "$folder/sysroot-${board%:*}" "libc6:${board#*:}" "libgcc-s1:${board#*:}" "libstdc++6:${board#*:}"
    done
    aarch64_libraries=$folder/sysroot-aarch64 armv7_libraries=$folder/sysroot-armv7
fi

zig=$(echo "$folder"/python/lib/python3*/site-packages/ziglang/zig)
{
    printf 'export CARGO_ZIGBUILD_ZIG_PATH=%q PATH=%q:"$PATH"\n' "$zig" "$folder/python/bin"
    # A Cortex-A72 is a Raspberry Pi 4's, and quicker to emulate than one that has every extension.
    printf 'export UNIMO_RUNNER_AARCH64=%q\n' "${emulator}qemu-aarch64 -cpu cortex-a72 -L $aarch64_libraries"
    printf 'export UNIMO_RUNNER_ARMV7=%q\n' "${emulator}qemu-arm -L $armv7_libraries"
} >"$folder/env.sh"
say "source $folder/env.sh"
