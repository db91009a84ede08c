"""Write small stand-ins for the NVIDIA libraries that torch's Linux wheel names as NEEDED.

With them `import torch` works on a machine without a GPU and without about 2 GB of nvidia-* wheels. Each function
in them returns 100 (cudaErrorNoDevice, and a non-zero status for the other libraries), so that CUDA reports itself
unavailable. cudart and cupti must be the real ones (a stand-in cudart crashes inside transformers).

Usage: torch_cpu_stubs.py            needs gcc and pyelftools; run by `cargo xtask test`
"""

import collections
import glob
import importlib.util
import os
import re
import subprocess
import tempfile

from elftools.elf.elffile import ELFFile

SYSTEM = re.compile(
    r"^(libc|libm|libdl|librt|libpthread|ld-linux-x86-64|libgcc_s|libgomp)\b|^libstdc\+\+|^libc10|^libtorch|^libshm"
)
NVIDIA = re.compile(
    r"^(cu|nv|nccl|cublas|cudnn|cufft|curand|cusparse|cusolver|__cuda|_?nvshmem|Nv|nvtx)", re.IGNORECASE
)
REAL = {"libcudart.so.13", "libcupti.so.13"}


def scan(library_dir):
    """Returns (needed libraries in order, {library: {(symbol, version)}}, unversioned NVIDIA symbols)."""
    needed = {}
    versioned = collections.defaultdict(set)
    unversioned, defined = set(), set()
    for path in sorted(glob.glob(library_dir + "/*.so*")):
        name = os.path.basename(path)
        if os.path.islink(path) or not name.startswith(("libtorch", "libc10", "libcaffe2")):
            continue
        with open(path, "rb") as file:
            elf = ELFFile(file)
            for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
                if not SYSTEM.match(tag.needed):
                    needed[tag.needed] = True
            owner = {}
            requirements = elf.get_section_by_name(".gnu.version_r")
            if requirements:
                for library, versions in requirements.iter_versions():
                    for version in versions:
                        owner[version["vna_other"]] = (library.name, version.name)
            indices = elf.get_section_by_name(".gnu.version")
            for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
                if not symbol.name:
                    continue
                if symbol["st_shndx"] != "SHN_UNDEF":
                    defined.add(symbol.name)
                    continue
                version = indices.get_symbol(index)["ndx"] if indices else None
                if isinstance(version, int) and version in owner:
                    library, tag = owner[version]
                    if not SYSTEM.match(library):
                        versioned[library].add((symbol.name, tag))
                else:
                    unversioned.add(symbol.name)
    return list(needed), versioned, {s for s in unversioned - defined if NVIDIA.match(s)}


def main():
    library_dir = os.path.join(os.path.dirname(importlib.util.find_spec("torch").origin), "lib")
    needed, versioned, unversioned = scan(library_dir)
    with tempfile.TemporaryDirectory() as work:
        for library in needed:
            if library in REAL:
                continue
            names = {symbol for symbol, _ in versioned[library]}
            if library.startswith("libcublas."):
                names |= unversioned  # one home is enough: the loader searches all of them
            by_version = collections.defaultdict(list)
            for symbol, version in sorted(versioned[library]):
                by_version[version].append(symbol)
            source, script = os.path.join(work, "stub.c"), os.path.join(work, "stub.map")
            with open(source, "w") as file:
                file.writelines(f"int {name}(void) {{ return 100; }}\n" for name in sorted(names))
            command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
            if by_version:
                with open(script, "w") as file:
                    for version, symbols in by_version.items():
                        file.write(f"{version} {{ global: {'; '.join(symbols)}; }};\n")
                command.append(f"-Wl,--version-script={script}")
            subprocess.check_call([*command, "-o", os.path.join(library_dir, library), source])
            print(library, len(names), "functions")


if __name__ == "__main__":
    main()
