#!/usr/bin/env bash
# Builds `unimo` for a board and packs it: a .deb, a tarball, and their checksums.
#
#   devices/package/package.sh aarch64                all Jetsons, Raspberry Pi 3, 4, 5 and Zero 2 W with a 64-bit system
#   devices/package/package.sh armv7                  Raspberry Pi 2 and later with a 32-bit system
#   devices/package/package.sh aarch64-musl           one static file for any 64-bit ARM Linux (Alpine, Buildroot, initramfs)
#   devices/package/package.sh x86_64-musl            the same for any 64-bit PC
#
# A second word names another profile than `release`: `dist` or `small` (README). Results lie in
# target/packages. Binaries need no newer glibc than 2.31 (JetPack 5, Debian 11), or no library at all, which is checked. Static ones
# have tract alone, because ONNX Runtime is a library to be loaded; find names of machines in /etc/hosts and at name servers alone,
# not such as camera.local; and come as a tarball without a .deb.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD

glibc=2.31 features=()
case "${1:-}" in
    aarch64) triple=aarch64-unknown-linux-gnu architecture=arm64 runner=AARCH64 ;;
    armv7) triple=armv7-unknown-linux-gnueabihf architecture=armhf runner=ARMV7 ;;
    aarch64-musl) triple=aarch64-unknown-linux-musl architecture= runner=AARCH64 ;;
    x86_64-musl) triple=x86_64-unknown-linux-musl architecture= runner= ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
case $triple in
    *-musl)
        linked=$triple features=(--no-default-features --features static)
        rustup target add "$triple"
        ;;
    *) linked=$triple.$glibc ;;
esac
profile=${2:-release}

say() { printf 'package: %s\n' "$*" >&2; }

tools=${UNIMO_BOARD_TOOLS:-$root/target-boards/tools}
[ -e "$tools/env.sh" ] || devices/package/toolchain.sh "$tools"
# shellcheck source=/dev/null
. "$tools/env.sh"

# Rows of `unimo bench` tell which commit they measured.
if commit=$(git describe --always --dirty 2>/dev/null); then export UNIMO_COMMIT=$commit; fi
say "building for $triple, profile $profile"
cargo zigbuild --profile "$profile" --package unimo --target "$linked" "${features[@]}"
built=${CARGO_TARGET_DIR:-$root/target}/$triple/$profile
program=$built/unimo

case $triple in
    *-musl)
        if readelf --program-headers --dynamic --wide "$program" | grep -E 'INTERP|NEEDED' >&2; then
            say "$program is not static: it asks for the above"
            exit 1
        fi
        say "static: needs no library and no loader"
        ;;
    *)
        needs=$(readelf --version-info --wide "$program" | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1 | cut -d_ -f2 || true)
        if [ "$(printf '%s\n' "$needs" "$glibc" | sort -V | tail -1)" != "$glibc" ]; then
            say "$program needs glibc $needs: newer than $glibc"
            exit 1
        fi
        say "needs glibc $needs"
        ;;
esac

# The program writes its manual pages and completions itself; a foreign one through the emulator.
emulator=()
if [ -n "$runner" ]; then
    runner=UNIMO_RUNNER_$runner
    read -ra emulator <<<"${!runner-}"
fi
staged=$built/package
rm -rf "$staged"
mkdir -p "$staged"/{man,completions}
"${emulator[@]}" "$program" man --out "$staged/man"
for shell in bash zsh fish; do "${emulator[@]}" "$program" completions "$shell" >"$staged/completions/unimo.$shell"; done
gzip -9n "$staged"/man/*.1

version=$(cargo metadata --no-deps --format-version 1 | grep -o '"name":"unimo","version":"[^"]*"' | cut -d'"' -f8)
packages=${CARGO_TARGET_DIR:-$root/target}/packages
name=unimo-$version-$triple
mkdir -p "$packages"

say "tarball"
folder=$staged/$name
mkdir -p "$folder"
cp "$program" README.md CHANGELOG.md MODEL_CARD.md LICENSE LICENSE-APACHE LICENSE-MIT devices/package/unimo.{service,default} "$folder"
cp -r "$staged"/{man,completions} "$folder"
tar --create --xz --file "$packages/$name.tar.xz" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$staged" "$name"

files=("$name.tar.xz")

if [ -n "$architecture" ]; then
    say "Debian package"
    [ -x "$tools/bin/cargo-deb" ] ||
        cargo install cargo-deb --version 3.8.0 --locked --no-default-features --root "$tools" --target-dir "$tools/cargo-deb"
    deb=unimo_${version}_$architecture.deb
    "$tools/bin/cargo-deb" deb --package unimo --no-build --no-strip --profile "$profile" --target "$triple" --deb-revision "" \
        --output "$packages/$deb"
    files+=("$deb")
fi

(cd "$packages" && for file in "${files[@]}"; do sha256sum "$file" >"$file.sha256"; done && ls -l "${files[@]}")
