"""Blocks of KV caches put and got through the interfaces of LMCache's second tiers and of vLLM's secondary tiers: nvtier and what ships with them.

    python kv_peers.py FOLDER [--rounds 7] [--mib 64] [--only lmcache|vllm]

FOLDER is on the disk that is measured; everything in a folder of its own there is removed at the end. Rounds go through all rows in turns, begun
by another row each time, with new blocks. A row's files are flushed after its puts, and dropped from the page cache before its gets; every byte
that comes is compared, outside the measured time. A row by fio says what the drive gives meanwhile. Prints medians and (min..max). Needs LMCache, or vLLM with tiers, and nvtier."""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid

import numpy as np

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1", PYTHONHASHSEED="0")
SIZES = {"128 KiB": 128 << 10, "2 MiB": 2 << 20}
THREADS = 4
LIMIT_S = 300


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def flush(folder):
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def drop(folder):
    for path in files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class LmCache:
    """A second tier of LMCache's, by its factory."""

    def __init__(self, folder, size, count, config):
        from lmcache.cli.commands.bench.l2_adapter_bench import data
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config

        self.size, self.count = size, count
        whole = data.make_aligned_tensor(count * size, 4096)
        self.objects = data.make_memory_objects(whole, count, size, 0)
        self.rows = whole.numpy().reshape(count, size)
        desc = data.create_l1_memory_desc(whole, align_bytes=4096)
        parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(config(folder, size))]))
        self.adapter = create_l2_adapter(parsed.adapters[0], l1_memory_desc=desc)

    def _keys(self, first):
        from lmcache.v1.distributed.api import ObjectKey

        return [ObjectKey(chunk_hash=n.to_bytes(32, "big"), model_name="bench", kv_rank=0) for n in range(first, first + self.count)]

    def _wait(self, fd):
        from lmcache.v1.platform import consume_fd

        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(LIMIT_S * 1000):
            raise TimeoutError("LMCache's tier says nothing")
        consume_fd(fd)

    def put(self, first):
        task = self.adapter.submit_store_task(self._keys(first), self.objects)
        self._wait(self.adapter.get_store_event_fd())
        if not self.adapter.pop_completed_store_tasks()[task].is_successful():
            raise RuntimeError("not all was stored")

    def look(self, first):
        """LMCache asks before it loads; some tiers know sizes by that only."""
        keys = self._keys(first)
        task = self.adapter.submit_lookup_and_lock_task(keys, {})
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        found = self.adapter.query_lookup_and_lock_result(task)
        if not all(found.test(n) for n in range(self.count)):
            raise RuntimeError("not all is there")
        return keys

    def get(self, first):
        keys = self.look(first)
        task = self.adapter.submit_load_task(keys, self.objects)
        self._wait(self.adapter.get_load_event_fd())
        came = self.adapter.query_load_result(task)
        self.adapter.submit_unlock(keys)
        if not all(came.test(n) for n in range(self.count)):
            raise RuntimeError("not all came")

    def close(self):
        self.adapter.close()


class Fio:
    """What the drive gives with blocks of the size, by fio: no tier, a ceiling."""

    def __init__(self, folder, size, count, config):
        self.folder, self.size, self.count = folder, size, count
        self.rows = np.zeros((count, size), dtype=np.uint8)

    def _run(self, rw, first):
        command = ["fio", "--name=r", f"--rw={rw}", f"--bs={self.size}", f"--size={self.count * self.size}", f"--filename={self.folder}/{first}",
                   "--direct=1", "--ioengine=io_uring", "--iodepth=16", "--refill_buffers", "--output-format=json"]  # fmt: skip
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout)["jobs"][0]
        way = found["read" if "read" in rw else "write"]
        return way["bw_bytes"], found["usr_cpu"] + found["sys_cpu"]

    def put(self, first):
        return self._run("write", first)

    def get(self, first):
        return self._run("randread", first)

    def close(self):
        pass


class Vllm:
    """A secondary tier of vLLM's, as its manager calls it."""

    def __init__(self, folder, size, count, config):
        from vllm.v1.kv_offload import base, config as offload
        from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

        import nvtier.vllm

        nvtier.vllm.register()
        self.size, self.count, self.base = size, count, base
        parallel = offload.OffloadingParallelConfig(
            rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0, is_parallelism_agnostic=True
        )
        described = offload.OffloadingConfig(
            groups=(offload.OffloadingGroupConfig(tokens_per_block=16, layer_names=("l0",)),), worker_kv_bytes_per_block=size,
            enable_kv_cache_events=False, extra_config={"cpu_bytes_to_use": size * count, "secondary_tiers": [config(folder, size)]},
            engine_id=uuid.uuid4().hex, model=offload.OffloadingModelConfig("m", "bfloat16"),
            cache=offload.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1), parallel=parallel,
        )  # fmt: skip
        self.manager = TieringOffloadingSpec(described).get_manager()
        self.rows = np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)
        self.tier = self.manager.secondary_tiers[0]
        self.region = f"/dev/shm/vllm_offload_{described.engine_id}.mmap"
        self.jobs = 0

    def _job(self, start, first, promotion):
        from vllm.v1.kv_offload.tiering.base import JobMetadata

        self.jobs += 1
        context = self.base.ReqContext(f"r{self.jobs}")
        self.tier.on_new_request(context)
        keys = [self.base.make_offload_key(n.to_bytes(32, "big"), 0) for n in range(first, first + self.count)]
        start(JobMetadata(self.jobs, keys, np.arange(self.count, dtype=np.int64), promotion, context))
        done = []
        self.tier.drain_jobs()
        by = time.monotonic() + LIMIT_S
        while not done and time.monotonic() < by:
            done = list(self.tier.get_finished_jobs())
        if not done or not done[0].success:
            raise RuntimeError("not all went well")
        self.tier.on_request_finished(context)

    def put(self, first):
        self._job(self.tier.submit_store, first, False)

    def get(self, first):
        self._job(self.tier.submit_load, first, True)

    def close(self):
        self.rows = self.tier = None
        try:
            self.manager.shutdown()
        finally:
            pathlib.Path(self.region).unlink(missing_ok=True)


def pool(folder):
    import nvtier

    if not (folder / "pool").exists():
        nvtier.format(folder / "pool")
    return {"pool": str(folder / "pool"), "budget": 4 << 30, "threads": THREADS, "fingerprint": "bench"}


def raw(folder, size):
    with open(folder / "raw", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 << 30)
    return {"type": "raw_block", "device_path": str(folder / "raw"), "slot_bytes": size + 4096, "io_engine": "io_uring", "meta_total_bytes": 64 << 20,
            "num_store_workers": THREADS, "num_load_workers": THREADS}  # fmt: skip


def plugin(folder, size):
    return {"type": "native_plugin", "module_path": "nvtier.lmcache", "class_name": "NvtierClient", "adapter_params": pool(folder)}


FIO = "fio, no tier"
ROWS = {
    "lmcache": {
        FIO: None,
        "nvtier (native_plugin)": plugin,
        "fs": lambda folder, size: {"type": "fs", "base_path": str(folder)},
        "fs_native, O_DIRECT": lambda folder, size: {"type": "fs_native", "base_path": str(folder), "num_workers": THREADS, "use_odirect": True},
        "raw_block, io_uring, on a file": raw,
    },
    "vllm": {
        FIO: None,
        "nvtier (NvtierTier)": lambda folder, size: {"type": "NvtierTier", **pool(folder)},
        "fs": lambda folder, size: {"type": "fs", "root_dir": str(folder), "n_read_threads": THREADS, "n_write_threads": THREADS},
    },
}


def measure(kind, folder, size, count, rounds):
    made, found = {}, {}
    try:
        for name, config in ROWS[kind].items():
            home = folder / name.split(" ")[0].strip(",")
            home.mkdir()
            try:
                how = Fio if name == FIO else {"lmcache": LmCache, "vllm": Vllm}[kind]
                made[name] = (how(home, size, count, config), home)
            except Exception as error:
                print(f"skipped: {kind}, {name}: {error}", file=sys.stderr)
        names = list(made)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                row, home = made[name]
                moved = count * size / 1e6
                if name == FIO:
                    put, get = row.put(turn * count), row.get(turn * count)
                    (home / str(turn * count)).unlink()
                    # Percent of a core while so many bytes a second go through.
                    used = [1e7 * busy / rate for rate, busy in (put, get)]
                    found.setdefault(name, []).append((put[0] / 1e6, put[0] / 1e6, get[0] / 1e6, *used))
                    continue
                blocks = np.random.default_rng(turn).integers(0, 256, (count, size), dtype=np.uint8)
                row.rows[:] = blocks
                times = [time.perf_counter()]
                start = cpu()
                row.put(turn * count)
                times.append(time.perf_counter())
                used = [cpu() - start]
                flush(home)
                times.append(time.perf_counter())
                drop(home)
                row.rows[:] = 0
                times.append(time.perf_counter())
                start = cpu()
                row.get(turn * count)
                times.append(time.perf_counter())
                used.append(cpu() - start)
                if not (row.rows == blocks).all():
                    raise RuntimeError(f"{name}: what came is not what was put")
                found.setdefault(name, []).append(
                    (moved / (times[1] - times[0]), moved / (times[2] - times[0]), moved / (times[4] - times[3]), *(1e3 * u / moved for u in used))
                )
    finally:
        for row, _ in made.values():
            with contextlib.suppress(Exception):
                row.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=64, help="of blocks in a round")
    parser.add_argument("--only", choices=list(ROWS))
    given = parser.parse_args()
    for kind in [given.only] if given.only else ROWS:
        for label, size in SIZES.items():
            folder = pathlib.Path(tempfile.mkdtemp(prefix="kv-peers-", dir=given.folder))
            try:
                found = measure(kind, folder, size, max((given.mib << 20) // size, 1), given.rounds)
            finally:
                shutil.rmtree(folder)
            print(f"\n{kind}, blocks of {label}, {given.mib} MiB a batch, {given.rounds} rounds\n")
            print("| | put, MB/s | put and flushed, MB/s | get, cold, MB/s | CPU of puts, s/GB | CPU of gets, s/GB |\n|---|---|---|---|---|---|")
            for name, rows in found.items():
                cells = [f"{statistics.median(column):.{d}f} ({min(column):.{d}f}..{max(column):.{d}f})" for d, column in zip((0, 0, 0, 2, 2), zip(*rows))]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
