#!/usr/bin/env bash
# A CUDA compiler for a machine that has neither CUDA nor a GPU: nvcc of CUDA 13.0, from NVIDIA's Python packages, into FOLDER
# (default: ./cuda-toolchain; 1 GB; keep it out of git). Needs python3 with pip, and gcc with g++.
#
#   trainer/gpu/toolchain.sh cuda-toolchain
#   . cuda-toolchain/env.sh
#   cargo build --release -p unimo-train --features cuda
#
# The program runs where NVIDIA's driver (580 or later) and CUDA 13's cublas, curand and cudart are, on devices of compute
# capability 8.0 and above; without them it says so, and trains on the CPU. A machine with CUDA 12 or 13 of its own needs nothing
# of this: with nvcc on the PATH the last line alone does it.
set -euo pipefail

folder=${1:-cuda-toolchain}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder/wheels" \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-cccl==13.0.85 nvidia-curand==10.4.0.35
for wheel in "$folder"/wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$folder/root"
done
home=$folder/root/nvidia/cu13
chmod +x "$home"/bin/* "$home"/nvvm/bin/*
[ -e "$home/lib64" ] || ln -s lib "$home/lib64"

# The linker asks for the libraries by name. The program opens them when it runs (see ops/cuda/libraries.rs), so empty ones do.
mkdir -p "$home/lib/stubs"
for library in cuda cudart cublas cublasLt curand nvrtc; do
    gcc -shared -fPIC -Wl,-soname,"lib$library.so" -o "$home/lib/stubs/lib$library.so" -x c /dev/null
done

# Code of compute capability 8.0 runs on every later device too; two compilers at a time bound memory.
cat > "$folder/env.sh" <<ENV
export CUDA_HOME=$home CUDA_PATH=$home PATH=$home/bin:\$PATH
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-80} CUDARC_CUDA_VERSION=13000 CUDAFORGE_THREADS=2
export LIBRARY_PATH=$home/lib/stubs:\${LIBRARY_PATH:-}
ENV
"$home/bin/nvcc" --version | tail -n 2
echo "ready: . $folder/env.sh"
