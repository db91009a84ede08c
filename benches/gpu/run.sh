#!/usr/bin/env bash
# Loads into VRAM beside the loaders that people use, alternated, on a machine with an NVIDIA GPU. Builds nothing there.
#
#   NVTIER=target/gpu/nvtier OUT=results benches/gpu/run.sh
#
# NVTIER   the command, built elsewhere: cargo build --release && strip -o target/gpu/nvtier target/release/nvtier
# GPU_CHECK  the checks of kernels and windows, built elsewhere: cargo build --release -p nvtier-gpudirect --example gpu_check, then
#          target/release/examples/gpu_check (default target/gpu/gpu_check; may be missing)
# WHEELS   folder of wheels of peers that are not installed (default target/gpu/wheels; may be missing)
# OUT      where results.json and report.md go
# DISK     folder on the drive to measure, with room for three checkpoints (default: a new one in the working folder)
# GB       size of the checkpoint, 10^9 bytes (default 8)
# ROUNDS   (default 3)
# LIMIT    seconds for everything; what does not fit is left out and said (default 450)
# STEPS    only these, by their names in run.py (default: all)
# PEERS    only these (default: all that run.py knows)
#
# Needs python3 with torch and safetensors. As root it drops the page cache before each cold load; otherwise it evicts the
# files one by one. A step that fails is recorded, and the rest goes on.
set -eu
cd "$(dirname "$0")/../.."
NVTIER=$(realpath "${NVTIER:-target/gpu/nvtier}")
GPU_CHECK=$(realpath -m "${GPU_CHECK:-target/gpu/gpu_check}")
chmod +x "$GPU_CHECK" 2>/dev/null || true
WHEELS=${WHEELS:-target/gpu/wheels}
OUT=${OUT:-target/gpu/out}
mkdir -p "$OUT"
chmod +x "$NVTIER" 2>/dev/null || true
"$NVTIER" version > "$OUT/version.txt" 2>&1 || { cat "$OUT/version.txt"; echo "$NVTIER does not run here"; exit 1; }

made=""
if [ -z "${DISK:-}" ]; then
    DISK=$(mktemp -d "$PWD/.gpu-bench-XXXXXX")
    made=$DISK
fi
shm=$(mktemp -d /dev/shm/nvtier-XXXXXX)
site=$(mktemp -d)
trap 'rm -rf "$shm" "$site" ${made:+"$made"}' EXIT

if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
    for wheel in "$WHEELS"/*.whl; do
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheel" \
            || echo "not installed: $wheel"
    done
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 NVTIER

python3 benches/gpu/run.py --nvtier "$NVTIER" --disk "$DISK" --shm "$shm" --out "$OUT" --gb "${GB:-8}" \
    --rounds "${ROUNDS:-3}" --limit "${LIMIT:-450}" --gpu-check "$GPU_CHECK" ${STEPS:+--steps $STEPS} ${PEERS:+--peers $PEERS}
