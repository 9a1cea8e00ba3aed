# To be sourced. fetch_packages SUITE CACHE INTO PACKAGE… unpacks Debian packages of a suite, `name:architecture` for foreign ones,
# into a folder that is new; an apt with lists of its own, in CACHE, fetches them, and the machine's own is left alone.

debian() { [ -e /etc/apt/sources.list.d/debian.sources ]; }

# apt of a suite: suite_apt SUITE CACHE get|cache ARGUMENT…
suite_apt() {
    local suite=$1 apt=$2/$1 command=$3 architecture
    shift 3
    architecture=$(dpkg --print-architecture)
    "apt-$command" -qq -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::State::lists="$apt/lists" \
        -o Dir::Cache="$apt/cache" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$apt/sources" \
        -o Dir::Etc::preferencesparts="$apt/preferences" -o APT::Architectures="$architecture,arm64,armhf" \
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none "$@"
}

# Fetches the lists of a suite, once.
suite_lists() {
    local suite=$1 apt=$2/$1 mirror
    [ ! -e "$apt/complete" ] || return 0
    mkdir -p "$apt"/{lists/partial,cache/archives/partial,sources,preferences}
    : >"$apt/status"
    mirror=$(awk '/^URIs:/ { print $2; exit }' /etc/apt/sources.list.d/debian.sources)
    printf '%s\n' "Types: deb" "URIs: $mirror" "Suites: $suite" "Components: main" \
        "Architectures: $(dpkg --print-architecture) arm64 armhf" \
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" >"$apt/sources/suite.sources"
    suite_apt "$suite" "$2" get update
    : >"$apt/complete"
}

fetch_packages() {
    local suite=$1 cache=$2 into=$3 archives=$2/$1/cache/archives
    shift 3
    suite_lists "$suite" "$cache"
    rm -rf "$into.new" "$archives"/*.deb
    mkdir -p "$into.new"
    (
        cd "$archives"
        suite_apt "$suite" "$cache" get download "$@"
        for file in *.deb; do dpkg-deb -x "$file" "$into.new"; done
    )
    rm -f "$archives"/*.deb
    # Where a merged /usr is a link on a system, it is one here.
    [ -e "$into.new/lib" ] || ln -s usr/lib "$into.new/lib"
    mv "$into.new" "$into"
}

# The package of the kernel that `linux-image-arm64` of a suite stands for: kernel_package SUITE CACHE
kernel_package() {
    suite_lists "$1" "$2"
    suite_apt "$1" "$2" cache show linux-image-arm64:arm64 | awk '/^Depends:/ { print $2; exit }' | tr -d ,
}
