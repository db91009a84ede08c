#!/usr/bin/env bash
# vLLM 0.26 served end to end on a machine with one NVIDIA GPU of compute capability 9.0 and no network, with nvtier behind it. A step at a time.
#
#   OUT=results benches/gpu/vllm.sh STEP...
#
# Made elsewhere, with a network:  benches/gpu/vllm_pack.py       (target/gpu/vllm/a, b, c, d: each fits one transfer)
#
#   transfer 1: target/gpu/vllm/a        vllm.sh unpack model
#   transfer 2: target/gpu/vllm/b        vllm.sh unpack layout serve
#   transfer 3: target/gpu/vllm/c        vllm.sh unpack crowd
#   transfer 4: target/gpu/vllm/d        vllm.sh unpack real
#
# What is unpacked stays in PLACE, so that the parts need not be there at once.
#
# Steps:  unpack    whatever parts are there: vLLM (a), what it imports and nvtier (b), the two halves of a small real model (c, d)
#         model     makes the model of random weights
#         layout    the layouts of attention backends on the GPU (test_vllm_layout.py)
#         serve     no cache, connector, tier, loader: see vllm_serve.py
#         crowd     many requests at once, with preemptions
#         real      a small real model and text
#
# PLACE    where things are unpacked to and the models are, on the drive to measure (default target/gpu/vllm-place)
# DISK     folder on the drive (default: a new one in the working folder)
# LIMIT    seconds for each step (default 280)
#
# A step that fails is said, and the next one runs.
set -u
cd "$(dirname "$0")/../.."
PLACE=$(realpath -m "${PLACE:-target/gpu/vllm-place}")
PARTS=${PARTS:-target/gpu/vllm}
OUT=$(realpath -m "${OUT:-target/gpu/out}")
site=$PLACE/site
limit=${LIMIT:-280}
mkdir -p "$OUT" "$site"
made=""
if [ -z "${DISK:-}" ]; then
    DISK=$(mktemp -d "$PWD/.gpu-vllm-XXXXXX")
    made=$DISK
fi
mounted() { grep -q " $DISK/mount " /proc/mounts && umount -l "$DISK/mount"; }
trap 'mounted; rm -rf ${made:+"$made"}' EXIT
export PYTHONPATH="$site:$PWD/bindings/python/tests" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$PLACE/triton" HF_HUB_OFFLINE=1

check() {
    name=$1
    shift
    echo "== $name, $(date +%T)"
    timeout -k 10 "$limit" "$@" 2>&1 | tail -150
    echo "== $name: exit ${PIPESTATUS[0]}, $(date +%T)"
}

# Once, also where the archive is still there at the next call.
untar() {
    mark=$PLACE/unpacked-$(basename "$1")-$(stat -c %s "$1")
    [ -e "$mark" ] || { python3 -c "
import os, sys, tarfile
with tarfile.open(sys.argv[1], 'r|xz') as tar:
    for file in tar:
        # Others make the same folders meanwhile.
        os.makedirs(os.path.dirname(os.path.join(sys.argv[2], file.name)), exist_ok=True)
        tar.extract(file, sys.argv[2], filter='tar')" "$1" "$2" && : > "$mark"; }
}

# Everything of a transfer at once: unpacking is one thread's work for each archive.
unpack() {
    jobs=()
    for archive in "$PARTS"/a/*.tar.xz "$PARTS"/b/*.tar.xz; do
        [ -e "$archive" ] && { untar "$archive" "$site" & jobs+=($!); }
    done
    failed=0
    for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
    [ -e "$site/nvtier-bin/nvtier" ] && chmod +x "$site/nvtier-bin/nvtier"
    mkdir -p "$PLACE/gguf"
    cp "$PARTS"/c/model.gguf.* "$PARTS"/d/model.gguf.* "$PLACE/gguf/" 2>/dev/null
    # Compiled once, and not by each process again.
    python3 -m compileall -q -j 0 "$site" >/dev/null 2>&1
    du -sh "$site"
    return $failed
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
df -BG "$DISK" /dev/shm | tail -2

serve() {
    name=$1
    shift
    check "$name" python3 benches/gpu/vllm_serve.py "$name" --disk "$DISK" --nvtier "$site/nvtier-bin/nvtier" --out "$OUT/$name.json" --limit $((limit - 15)) "$@"
    # What engines said, small enough to keep.
    for log in "$OUT"/log-*.txt; do [ -e "$log" ] && { tail -c 200000 "$log" > "$log.tail" && mv "$log.tail" "$PLACE/$name-$(basename "$log")" && rm -f "$log"; }; done
    tar -czf "$OUT/$name-logs.tar.gz" -C "$PLACE" $(cd "$PLACE" && ls -d "$name"-log-*.txt 2>/dev/null) 2>/dev/null
}

for step in "$@"; do
    case $step in
    unpack)
        echo "== unpack, $(date +%T)"
        unpack
        echo "== unpack: exit $?, $(date +%T)"
        ;;
    model) check model python3 benches/gpu/vllm_model.py "$PLACE/model" 3b ;;
    layout) check layout python3 -m pytest -q -p no:cacheprovider bindings/python/tests/test_vllm_layout.py ;;
    serve) serve serve --model "$PLACE/model" ;;
    crowd)
        [ -e "$PLACE/crowd/config.json" ] || check "model for crowd" python3 benches/gpu/vllm_model.py "$PLACE/crowd" crowd
        serve crowd --model "$PLACE/crowd"
        ;;
    real)
        if [ ! -e "$PLACE/real/snapshot/config.json" ]; then
            # The package that the project's conversion reads: one file.
            mkdir -p "$site/nvtier_gguf" && : > "$site/nvtier_gguf/__init__.py"
            cat "$PLACE"/gguf/model.gguf.* > "$site/nvtier_gguf/model.gguf"
            check "conversion" python3 tests/python/tools/gguf_to_safetensors.py nvtier_gguf "$PLACE/real"
        fi
        serve real --model "$PLACE/real/snapshot"
        ;;
    *) echo "no step $step"; exit 2 ;;
    esac
done
