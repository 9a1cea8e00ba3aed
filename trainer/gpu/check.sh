#!/usr/bin/env bash
# Proves a build of unimo-train on a machine with a CUDA device: no Rust and no network needed there. One command:
#
#   trainer/gpu/check.sh pack target/release/unimo-train gpu-check      # where it was built: a folder of at most 64 MiB
#   gpu-check/check.sh                                                  # where the device is: at most ten minutes
#
# Prints a line for every kernel, then trains a small model for twenty steps on the device and on the CPU, and, where Python has
# PyTorch, compares the speed of both. Exits with 0 if everything is right, 1 if not. What was printed is also in the folder RESULTS, if
# that is set, as it comes. The parts alone: `check.sh kernels`, `check.sh train`, `check.sh compare …` with what compare.py takes.
#
# Without a device: `check.sh rehearse PROGRAM` does on the CPU what can be done there, to see that the script itself works. `check.sh
# stand-in PROGRAM` does the whole with a driver and cuBLAS that run on the processor (stand-in/driver.cpp; a C++ compiler is needed, seven
# minutes), and where the program was built with the feature `nccl`, trains on two ranks whose devices sum by a stand-in of NCCL.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

pack() {
    local program=$1 folder=$2 root
    root=$(cd "$here/../.." && pwd)
    mkdir -p "$folder/target/release" "$folder/trainer/gpu" "$folder/benches/peer"
    # Compressed, because candle's kernels are large.
    strip -o "$folder/target/release/unimo-train" "$program"
    gzip -9 --force "$folder/target/release/unimo-train"
    cp -r "$root/trainer/sizes" "$folder/trainer/"
    cp "$here/compare.py" "$folder/trainer/gpu/"
    cp "$root/benches/peer/training_step.py" "$folder/benches/peer/"
    cp "$0" "$folder/check.sh"
    local size
    size=$(du -sm "$folder" | cut -f1)
    echo "$folder: $size MiB"
    [ "$size" -le 64 ] || { echo "more than the 64 MiB that can be carried" >&2; exit 1; }
}

# CUDA's libraries: those that came with PyTorch, so that both are compared on the same, or the system's.
find_libraries() {
    local folders="" packages
    for packages in $(python3 -c 'import site, sys; print(*site.getsitepackages(), *sys.path, sep="\n")' 2>/dev/null | sort -u); do
        for folder in "$packages"/nvidia/*/lib; do
            [ -d "$folder" ] && folders+="$folder:"
        done
    done
    export LD_LIBRARY_PATH="$folders/usr/local/cuda/lib64:/usr/local/cuda/targets/x86_64-linux/lib:${LD_LIBRARY_PATH:-}"
}

failed=0
# step WHAT FILE SECONDS COMMAND…: a part, which may take so long, and its file in RESULTS.
step() {
    local what=$1 file=$2 seconds=$3
    shift 3
    printf '\n== %s\n' "$what"
    [ -z "${RESULTS:-}" ] || mkdir -p "$RESULTS"
    # A function sees to its time by itself.
    [ "$(type -t "$1")" = function ] || set -- timeout "$seconds" "$@"
    "$@" 2>&1 | tee ${RESULTS:+"$RESULTS/$file.txt"} || { echo "FAILED ($?): $*"; failed=1; }
}

finish() {
    [ "$failed" = 0 ] && echo "all right" || echo "something is wrong"
    exit "$failed"
}

# Pictures of nine random regions with random captions, a tokenizer, a size and a recipe with most objectives.
write_data() {
    python3 - "$work" <<'PYTHON'
import array, base64, io, json, pathlib, random, sys, tarfile
folder, rng = pathlib.Path(sys.argv[1]), random.Random(1)
words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(60)]
encode = lambda values: base64.b64encode(array.array("f", values).tobytes()).decode()
with tarfile.open(folder / "captions-0000.tar", "w") as shard, open(folder / "regions.tsv", "w") as table:
    for number in range(64):
        member = json.dumps({"captions": [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(2)]}).encode()
        about = tarfile.TarInfo(f"{number}.json")
        about.size = len(member)
        shard.addfile(about, io.BytesIO(member))
        boxes = [edge for i in range(9) for edge in (i % 3 * 50, i // 3 * 50, i % 3 * 50 + 50, i // 3 * 50 + 50)]
        features, chances = [rng.gauss(0, 1) for _ in range(9 * 24)], [1 / 11] * (9 * 11)
        print(number, 150, 150, 9, encode(boxes), encode(features), encode(chances), sep="\t", file=table)
(folder / "size.toml").write_text("""name = "check"
hidden = 64
layers = 2
heads = 2
feed_forward = 128
vocabulary = 6
positions = 48
embedding = 64
region_feature = 24
region_classes = 11
detected_regions = 9
dropout = 0.1
""")
(folder / "recipe.toml").write_text("""steps = 20
checkpoint_every = 10
[batch]
images = 16
captions = 2
contrast_captions = 1
match_images = 4
masked_pairs = 4
[optimizer]
learning_rate = 1e-3
warmup_steps = 5
""")
PYTHON
    "$program" tokenizer --pairs "$work/captions-0000.tar" --vocabulary 300 --out "$work/tokenizer.json"
}

train() {
    timeout "${TRAINING_SECONDS:-1000}" "$program" pretrain --size "$work/size.toml" --recipe "${recipe:-$work/recipe.toml}" \
        --tokenizer "$work/tokenizer.json" --pairs "$work/captions-0000.tar" --regions "$work/regions.tsv" \
        --features "$work/features" --precision f32 "$@"
}

# Equal data, draws and masks on the device and on the CPU: the losses stay together. A run that the CPU began, the device ends,
# and it has them too where it keeps no activations.
train_both() {
    local first=$1 second=$2
    write_data &&
        train --out "$work/first" --device "$first" &&
        train --out "$work/second" --device "$second" &&
        train --out "$work/mixed" --device "$first" --stop-after 10 &&
        train --out "$work/mixed" --device "$second" --resume &&
        train --out "$work/checkpointed" --device "$second" --activation-checkpointing || return 1
    python3 - "$work"/{first,second,mixed,checkpointed}/log.jsonl <<'PYTHON'
import json, sys
runs = [[json.loads(line)["loss"] for line in open(path)] for path in sys.argv[1:]]
apart = [max(losses) / min(losses) - 1 for losses in zip(*runs, strict=True)]
print(f"losses of {len(apart)} steps: apart by {apart[0]:.1e} in the first, {max(apart):.1e} at most")
# Rounding differs, and training carries it on.
sys.exit(len(apart) != 20 or apart[0] > 1e-4 or max(apart) > 2e-2)
PYTHON
}

# The program that was packed, and a folder to work in.
unpack() {
    program=$here/target/release/unimo-train
    [ -e "$program" ] || [ -e "$program.gz" ] || { echo "there is no $program: check.sh pack makes a folder with it" >&2; exit 2; }
    [ -x "$program" ] || { gunzip --keep "$program.gz" && chmod +x "$program"; }
    make_room
    find_libraries
    if command -v nvidia-smi >/dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true; fi
}

# Not local: it is cleared away when the script ends.
make_room() {
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
}

check_kernels() {
    step "kernels against f64, steps against the CPU's" kernels 150 "$program" gpu check --wide
}

check_training() {
    # Five trainings of seconds each; one that hangs is ended.
    TRAINING_SECONDS=40 step "training on the device and on the CPU" training 200 train_both cpu cuda
}

# Within the seconds given. A Python that has PyTorch and cannot use it is a mistake; one without is none.
check_speed() {
    local seconds=$1
    shift
    if python3 -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ["torch", "numpy"])))'; then
        step "PyTorch and unimo-train" speed "$seconds" python3 "$here/trainer/gpu/compare.py" --trainer "$program" \
            --seconds "$((seconds - 10))" "$@"
    else
        printf '\n== PyTorch and unimo-train\nleft out: this Python has no torch or no numpy\n'
    fi
}

# All of it within ten minutes, whatever hangs.
run() {
    unpack
    check_kernels
    check_training
    check_speed "$((580 - SECONDS))"
    finish
}

rehearse() {
    program=$1
    make_room
    step "training twice on the CPU" training 1000 train_both cpu cpu
    finish
}

# What was told of two and of four steps: two more make six more copies from the device (losses, norm and temperature, at the end of
# each), no other wait, and no upload that a host may wait for. Nor is anything large added up by one block, as candle does with the sum
# of a whole tensor.
told_of_waits() {
    python3 - "$@" <<'PYTHON'
import re, sys
told = r"one block: (\d+) values.* (\d+) that a host may wait for\), (\d+) from it, (\d+) other waits"
two, four = ([int(n) for n in re.search(told, open(path).read()).groups()] for path in sys.argv[1:])
largest, more = four[0], [b - a for a, b in zip(two[1:], four[1:])]
print(f"two steps: {more[0]} uploads above 64 KB, {more[1]} copies from the device, {more[2]} other waits")
print(f"largest sum by one block: {largest} values")
sys.exit(more != [0, 6, 0] or largest > 1024)
PYTHON
}

waits_at_the_end_alone() {
    local steps
    for steps in 2 4; do
        # It ends without a checkpoint, and says so.
        train --out "$work/of-$steps" --device cuda --stop-after $steps 2>"$work/of-$steps.txt" || true
    done
    told_of_waits "$work"/of-{2,4}.txt
}

# Steps of two ranks, each with a device, are those of one; sums go from device to device, and no host waits for them inside a step.
ranks_learn_as_one() {
    local rank steps recipe=$work/two.toml
    # By the same passes, so with the same dropout.
    sed 's/^images = 16/images = 16\nchunks = 2/' "$work/recipe.toml" >"$recipe"
    # None has a checkpoint, and says so.
    train --device cuda --stop-after 4 --out "$work/one-rank" 2>"$work/one-rank.txt" || true
    for steps in 2 4; do
        for rank in 0 1; do
            RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 10000)) \
                train --device cuda --stop-after $steps --out "$work/two-ranks-$steps" 2>"$work/rank-$rank-$steps.txt" || true &
        done
        wait
    done
    if grep -q 'lacks the feature' "$work"/rank-0-4.txt; then
        echo "left out: this build lacks the feature nccl"
        return
    fi
    grep -h 'through their hosts\|stand-in: a' "$work"/rank-*.txt && return 1
    told_of_waits "$work"/rank-1-{2,4}.txt || return 1
    python3 - "$work"/{one-rank,two-ranks-4}/log.jsonl <<'PYTHON'
import json, sys
one, two = ([json.loads(line)["loss"] for line in open(path)] for path in sys.argv[1:])
apart = [abs(a / b - 1) for a, b in zip(one, two, strict=True)]
print(f"losses of {len(apart)} steps: apart by {max(apart):.1e} at most")
sys.exit(len(apart) != 4 or max(apart) > 1e-5)
PYTHON
}

# Checks and trainings with the stand-ins for the driver and NCCL.
stand_in() {
    local name
    program=$1
    make_room
    # Fibers leave functions by longjmp, which fortified builds take for a mistake.
    "${CXX:-c++}" -std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -DUNIMO_EMULATED -shared -fPIC -pthread \
        -o "$work/libcuda.so.1" "$here/stand-in/driver.cpp"
    "${CXX:-c++}" -std=c++17 -O1 -shared -fPIC -pthread -o "$work/libnccl.so.2" "$here/../src/parallel/reference/nccl.cpp" -ldl -lrt
    for name in cudart.so.1{2,3} cublasLt.so.1{2,3} cublas.so.1{2,3} curand.so.10 nvrtc.so.1{2,3}; do
        ln -s libcuda.so.1 "$work/lib$name"
    done
    export LD_LIBRARY_PATH=$work STAND_IN_REPORT=1
    step "kernels against f64, steps against the CPU's" kernels 1000 "$program" gpu check
    step "training on the stand-in and on the CPU" training 1000 train_both cpu cuda
    step "where the host waits" waits 1000 waits_at_the_end_alone
    step "two ranks" ranks 1000 ranks_learn_as_one
    finish
}

case ${1:-} in
    stand-in | rehearse)
        program=$(realpath -e "${2:?which program}")
        "${1//-/_}" "$program"
        ;;
    pack) pack "${2:?which program}" "${3:?into which folder}" ;;
    kernels | train | compare)
        unpack
        case $1 in
            kernels) check_kernels ;;
            train) check_training ;;
            compare) check_speed 580 "${@:2}" ;;
        esac
        finish
        ;;
    '') run ;;
    *)
        echo "usage: check.sh [kernels | train | compare …], or check.sh pack PROGRAM FOLDER, check.sh rehearse PROGRAM," \
            "check.sh stand-in PROGRAM" >&2
        exit 2
        ;;
esac
