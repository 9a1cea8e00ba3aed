#!/usr/bin/env bash
# The runtime's tests on a board's processor, emulated: its library's (kernels, engines, gallery, cameras, displays), then the
# command line's, on both engines, with `unimo` built for the board and all else of this machine.
#
#   devices/emulation/user.sh aarch64|armv7|aarch64-musl [small]
#
# `aarch64-musl` is the static program, which has tract alone. `small` is what CI runs: the kernels, engines and picture preparation
# of the library, and captions, embeddings and a search of the command line.
#
# Emulation is some hundred times slower than a board: nothing is to be read from its times.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
architecture=${1:-} wheel= features=()
case $architecture in
    aarch64) triple=aarch64-unknown-linux-gnu runner=UNIMO_RUNNER_AARCH64 wheel=manylinux_2_28_aarch64 ;;
    armv7) triple=armv7-unknown-linux-gnueabihf runner=UNIMO_RUNNER_ARMV7 ;;
    aarch64-musl) triple=aarch64-unknown-linux-musl runner=UNIMO_RUNNER_AARCH64 ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
# As package.sh builds it, or it would be built twice.
lacks=()
case $triple in
    *-musl)
        linked=$triple features=(--no-default-features --features unimo/static)
        # A part of it is about a search for ONNX Runtime.
        lacks=(--skip exit_codes)
        rustup target add "$triple"
        ;;
    *) linked=$triple.2.31 ;;
esac
case ${2:-all} in
    # `unimo bench` starts itself, which an emulated program cannot.
    all) units=() suites=(caption_cli devices_cli search_cli gallery_durability) cases=(--skip captioning_is_measured "${lacks[@]}") ;;
    # Names of units and of tests: each is a part of those that run.
    small) units=(kernels:: engine:: image:: captioning::) suites=(caption_cli search_cli devices_cli)
        cases=(a_caption_line embeddings_are matching_gives pictures_are_added a_board_is_detected) ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
tools=${UNIMO_BOARD_TOOLS:-$root/target-boards/tools}
target=${CARGO_TARGET_DIR:-$root/target}

say() { printf 'emulation: %s\n' "$*" >&2; }

[ -e "$tools/env.sh" ] || devices/package/toolchain.sh "$tools"
# shellcheck source=/dev/null
. "$tools/env.sh"
library=
if [ -n "$wheel" ]; then
    library=$tools/onnxruntime-$architecture/onnxruntime/capi
    if [ ! -d "$library" ]; then
        say "ONNX Runtime for $architecture, from its Python wheel"
        "$tools/python/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --platform "$wheel" \
            --python-version 311 --target "$tools/onnxruntime-$architecture" onnxruntime==1.32.0
    fi
fi

# The emulated processor's library, whatever this machine's own tests are given.
if [ -n "$library" ]; then
    export ORT_DYLIB_PATH=$library UNIMO_REQUIRE_ORT=1
else
    unset ORT_DYLIB_PATH UNIMO_REQUIRE_ORT
fi

export "CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$triple")_RUNNER=${!runner}"
say "the runtime's library"
cargo-zigbuild test --release --package unimo --package unimo-devices --lib --target "$linked" "${features[@]}" -- "${units[@]}"

# The emulated processor is a Raspberry Pi 4's; a Pi 5's has the dot product of bytes, for which there are kernels.
newer=${!runner/cortex-a72/cortex-a76}
if [ "$newer" != "${!runner}" ]; then
    say "the runtime's library, on a processor with the dot product"
    env "CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$triple")_RUNNER=$newer" cargo-zigbuild test --release --package unimo \
        --package unimo-devices --lib --target "$linked" "${features[@]}" -- kernels:: engine::
fi

say "the command line"
if commit=$(git describe --always --dirty 2>/dev/null); then export UNIMO_COMMIT=$commit; fi
cargo zigbuild --release --package unimo --target "$linked" "${features[@]}"
export UNIMO_PROGRAM=$target/$triple/release/unimo UNIMO_RUNNER=${!runner}
tests=()
for suite in "${suites[@]}"; do tests+=(--test "$suite"); done
for engine in tract ${library:+ort}; do
    say "on $engine"
    UNIMO_ENGINE=$engine cargo test --release --workspace "${tests[@]}" -- "${cases[@]}"
done
if [ "$newer" != "${!runner}" ]; then
    say "on tract, on a processor with the dot product"
    UNIMO_RUNNER=$newer UNIMO_ENGINE=tract cargo test --release --workspace --test caption_cli -- a_caption_line matching_gives
fi
