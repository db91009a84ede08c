#!/usr/bin/env bash
# Training and streaming beyond a device's memory, on a machine with an NVIDIA GPU, a step at a time. Builds nothing of nvtier there.
#
#   WHEEL=target/wheels/nvtier-*.whl NVTIER=target/gpu/train/nvtier OUT=results benches/gpu/train.sh STEP...
#
# Steps:  exact     bit for bit plain PyTorch, every precision
#         small     1.1 G parameters: all of it in host memory, the step in the forward and in the backward pass
#         stream    3B inference with 2 GiB of VRAM beside accelerate's disk_offload, and all of it in host memory
#         ranks     two GPUs: bit for bit DistributedDataParallel, times of a step
#         part      2.9 G parameters, 8 GiB of VRAM, 16 GiB of RAM, the rest on the drive
#         ram       1.8 G parameters, 8 GiB of VRAM, all of it in RAM (the drive, which has no part in it, is not measured)
#         states    2.9 G parameters, 8 GiB of VRAM, all of it in 64 GiB of RAM; needs 90 GB of the drive; likewise
#         peer      DeepSpeed ZeRO-3 with NVMe, the same model (PEER: folder with its source, wheels and libaio packages)
#         large     3.8 G parameters (LAYERS: 37), 24 GiB of VRAM, 64 GiB of RAM; and what plain PyTorch trains in as much VRAM
#
# WHEEL    the Python package, or a folder that has it unpacked; NVTIER: the command; both built elsewhere (cargo xtask wheel; cargo build --release)
# DISK     folder on the drive (default: a new one in the working folder)
# LIMIT    seconds for each step (default 280)
# VRAM     GiB of weights, gradients and state on the device, where a step says so by it (small 3, ram 5, states 4)
# RUNS     of the step ram (ram; ram-backward needs a larger cap)
# PROFILER a command that a training run is started by, such as "py-spy record -f raw -o FILE --"
#
# Needs python3 with torch, transformers and accelerate. A step that fails is said, and the next one runs.
set -u
cd "$(dirname "$0")/../.."
NVTIER=$(realpath "${NVTIER:-target/gpu/train/nvtier}")
chmod +x "$NVTIER"
WHEEL=$(ls -d ${WHEEL:-target/gpu/train/py} | head -1)
PEER=$(realpath -m "${PEER:-target/gpu/ds}")
OUT=$(realpath -m "${OUT:-target/gpu/out}")
mkdir -p "$OUT"
made=""
if [ -z "${DISK:-}" ]; then
    DISK=$(mktemp -d "$PWD/.gpu-train-XXXXXX")
    made=$DISK
fi
site=$(mktemp -d)
trap 'rm -rf "$site" ${made:+"$made"}' EXIT
if [ -d "$WHEEL" ]; then
    cp -r "$WHEEL"/. "$site" || exit 1
else
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEEL" || exit 1
fi
export PYTHONPATH="$site:$PWD/bindings/python/tests" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
tests=bindings/python/tests
limit=${LIMIT:-280}
big=(--layers 28 --hidden 3072 --ffn 8192 --batch 2 --seq 2048)

df -BG "$DISK" | tail -1
free -g | head -2
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader

check() {
    name=$1
    shift
    echo "== $name"
    timeout -k 10 "$limit" "$@" 2>&1 | grep -v -i warning | tail -40
    echo "== $name: exit ${PIPESTATUS[0]}, $(date +%T)"
}

train() {
    name=$1
    shift
    check "$name" ${PROFILER:-} python3 $tests/train_gpu_check.py --dir "$DISK" --out "$OUT/$name.json" --nvtier "$NVTIER" "$@"
}

for step in "$@"; do
    case $step in
    exact) check exact python3 -c "
import sys, json, tempfile
import train_gpu_check
found = train_gpu_check.exact(tempfile.mkdtemp(dir=sys.argv[1]))
json.dump(found, open(sys.argv[2], 'w'), indent=1)" "$DISK" "$OUT/exact.json" ;;
    small) train small --no-exact --runs ram,ram-backward --vram "${VRAM:-3}" --steps 6 --timeline ;;
    stream) check stream python3 $tests/stream_gpu_check.py --dir "$DISK" --out "$OUT/stream.json" --nvtier "$NVTIER" --rounds 5 ;;
    ranks) check ranks python3 -m torch.distributed.run --standalone --nproc-per-node 2 $tests/ranks_gpu_check.py --dir "$DISK" --out "$OUT/ranks.json" ;;
    part) train part --no-exact "${big[@]}" --runs part --vram 3 --cap 8 --steps 3 ;;
    ram) train ram --no-exact "${big[@]}" --layers 16 --runs "${RUNS:-ram}" --vram "${VRAM:-5}" --cap 8 --steps 6 --timeline --nvtier "" ;;
    large)
        train large --no-exact --no-plain "${big[@]}" --layers "${LAYERS:-37}" --batch 1 --runs large --vram 12 --cap 24 --steps 2
        for layers in 14 13 12 11 10 9; do
            check "plain $layers" python3 $tests/train_gpu_check.py --dir "$DISK" --out "$OUT/plain-$layers.json" "${big[@]}" --layers $layers --batch 1 --no-exact --runs "" --cap 24 | tee "$OUT/plain.log"
            grep -q "exit 0" "$OUT/plain.log" && break
        done
        ;;
    states) train states --no-exact "${big[@]}" --runs ram --vram "${VRAM:-4}" --cap 8 --steps 6 --timeline --nvtier "" ;;
    peer)
        for package in "$PEER"/*.deb; do dpkg -x "$package" "$site/aio"; done
        ( 
            lib=$(dirname "$(find "$site/aio" -name 'libaio.so.1*' | head -1)")
            export CFLAGS="-I$site/aio/usr/include" CXXFLAGS="-I$site/aio/usr/include" LDFLAGS="-L$lib" LIBRARY_PATH="$lib" CPATH="$site/aio/usr/include"
            export LD_LIBRARY_PATH="$lib:${LD_LIBRARY_PATH:-}" TORCH_CUDA_ARCH_LIST=9.0 DS_SKIP_CUDA_CHECK=1 MAX_JOBS=16
            python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$PEER"/*.whl
            python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --no-build-isolation --target "$site" "$PEER"/deepspeed-*.tar.gz
            check peer python3 benches/gpu/train_peer.py --dir "$DISK" --out "$OUT/peer.json" "${big[@]}" --steps 3 --limit $((limit - 60))
        ) ;;
    *) echo "no step $step"; exit 2 ;;
    esac
done
