"""The tier of vLLM's KV cache under vLLM's own tiering manager: no GPU, no model, no server.

vLLM is too heavy for the tests' environment: `cargo xtask test --suite vllm` gets it (0.33 and 0.26) and runs this; elsewhere all of it is
skipped."""

import dataclasses

import gc
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from common import StallingDrive

import nvtier
import nvtier.vllm

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
try:
    from vllm.v1.kv_offload import base, config
    from vllm.v1.kv_offload.tiering.base import JobResult
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
except ImportError as error:
    # The suite that brings vLLM must not pass without it.
    if os.environ.get("NVTIER_SUITE", "").startswith("vllm"):
        raise
    pytest.skip(f"no vLLM with tiers here: {error}", allow_module_level=True)

CHUNK = 128 << 10
#: Steps, of a millisecond and more, until something has to have come.
STEPS = 60_000


#: vLLM 0.26: a tier is known by its name, and the results of jobs say less.
OLD = "successful_keys" not in {field.name for field in dataclasses.fields(JobResult)}
if OLD:
    # As vLLM does in every process of it.
    nvtier.vllm.register()


def known(kind, **values):
    """An object of vLLM's, of the fields that this version of it has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def places(spec):
    return spec.block_ids if OLD else spec.chunk_ids


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    return tmp_path / "pool"


class Engine:
    """A manager of vLLM's, as its scheduler drives it."""

    def __init__(self, pool, chunks, chunk=CHUNK, **tier):
        tier = {"type": "NvtierTier", "module_path": "nvtier.vllm", "pool": str(pool), "budget": 256 << 20, "fingerprint": "f", "ram": 32 << 20, **tier}
        self.id = f"nvtier-test-{uuid.uuid4().hex}"
        self.manager = TieringOffloadingSpec(
            known(
                config.OffloadingConfig,
                groups=(known(config.OffloadingGroupConfig, tokens_per_block=16, layer_names=("l0",), group_id=0),),
                worker_kv_bytes_per_block=chunk,
                enable_kv_cache_events=False,
                extra_config={"cpu_bytes_to_use": chunk * chunks, "secondary_tiers": [tier]},
                engine_id=self.id,
                model=config.OffloadingModelConfig("m", "bfloat16"),
                cache=config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
                parallel=known(
                    config.OffloadingParallelConfig,
                    rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
                    data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=True,
                ),
                kv_cache_layout="NHD",
            )
        ).get_manager()  # fmt: skip
        self.chunks = chunks
        self.tier = self.manager.secondary_tiers[0] if hasattr(self.manager, "secondary_tiers") else self.manager.tiers[0]

    def rows(self):
        return np.asarray(self.manager.primary_tier.get_kv_memoryview()).view(np.uint8)

    def step(self):
        self.manager.on_schedule_end(base.ScheduleEndContext(new_req_ids=(), preempted_req_ids=()))
        time.sleep(0.001)

    def request(self, tenant=None):
        context = base.ReqContext(f"r{uuid.uuid4().hex}", kv_transfer_params=None if tenant is None else {"tenant": tenant})
        self.manager.on_new_request(context)
        return context

    def store(self, numbers, tenant=None):
        """Stores chunks in waves of half of the CPU tier."""
        context = self.request(tenant)
        for start in range(0, len(numbers), max(self.chunks // 2, 1)):
            wave = numbers[start : start + max(self.chunks // 2, 1)]
            for _ in range(STEPS):
                output = self.manager.prepare_store([key(n) for n in wave], context)
                if output is not None:
                    break
                self.step()
            assert output is not None, "the CPU tier stays full"
            at = dict(zip(output.keys_to_store, places(output.store_spec)))
            rows = self.rows()
            for n in wave:
                if key(n) in at:
                    rows[at[key(n)]] = content(n, rows.shape[1])
            del rows
            self.manager.complete_store([key(n) for n in wave], context)
            self.tier.drain_jobs()
            self.step()
        self.manager.on_request_finished(context)

    def load(self, numbers, tenant=None):
        """Which of the chunks come back; their bytes are compared."""
        context = self.request(tenant)
        results = {}
        for _ in range(STEPS):
            results = {n: self.manager.lookup(key(n), context) for n in numbers}
            if all(result in (base.LookupResult.HIT, base.LookupResult.MISS) for result in results.values()):
                break
            self.step()
        assert all(r in (base.LookupResult.HIT, base.LookupResult.MISS) for r in results.values()), results
        found = [n for n, result in results.items() if result is base.LookupResult.HIT]
        if found:
            spec = self.manager.prepare_load([key(n) for n in found], context)
            rows = self.rows()
            for n, at in zip(found, places(spec)):
                assert (rows[at] == content(n, rows.shape[1])).all(), f"chunk {n} is not what was stored"
            del rows
            self.manager.complete_load([key(n) for n in found], context)
        self.manager.on_request_finished(context)
        return found

    def close(self):
        self.tier = None
        gc.collect()
        self.manager.shutdown()
        for left in pathlib.Path("/dev/shm").glob(f"*{self.id}*"):
            left.unlink()


def key(n):
    return base.make_offload_key(hashlib.sha256(b"key %d" % n).digest(), 0)


def content(n, size):
    """Unique for each chunk and within it."""
    row = np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8)
    row[:32] = np.frombuffer(hashlib.sha256(b"key %d" % n).digest(), dtype=np.uint8)
    return row


def test_vllm_finds_the_tier_by_the_plugin():
    nvtier.vllm.register()
    assert SecondaryTierFactory.get_tier_class({"type": "NvtierTier"}) is nvtier.vllm.NvtierTier


def test_what_left_the_cpu_tier_comes_back_also_after_a_restart(pool):
    engine = Engine(pool, 32)
    try:
        engine.store(range(64))
        assert engine.load(range(16)) == list(range(16))
        assert engine.load(range(200, 204)) == []
        stats = engine.manager.get_stats()
        assert stats is not None and "nvtier_tier_loaded" in repr(vars(stats))
        known = nvtier.vllm.NvtierTier.build_metric_definitions({})
        told = engine.tier.get_stats()
        assert engine.tier._tier.stat()["stored"] == 64 and told is not None
        assert "vllm:nvtier_tier_stored" in known and "vllm:nvtier_tier_queued" in known
    finally:
        engine.close()
    engine = Engine(pool, 32)
    try:
        assert engine.load(range(24)) == list(range(24))
    finally:
        engine.close()


def test_what_is_there_is_not_written_again_nor_told_as_written(pool):
    told = []
    for _ in range(2):
        engine = Engine(pool, 32)
        try:
            fetch = engine.tier.get_finished_jobs
            results = []

            def watch(fetch=fetch, results=results):
                results.extend(new := list(fetch()))
                return new

            engine.tier.get_finished_jobs = watch
            engine.store(range(16))
            engine.step()
            del engine.tier.get_finished_jobs
            told.append([(result.success, None if OLD else result.transfer_bytes) for result in results])
            stat = engine.tier._tier.stat()
            told.append((stat["stored"], stat["present"], stat["stored_bytes"]))
            del fetch, watch
        finally:
            engine.close()
    said = [None, None] if OLD else [16 * CHUNK, 0]
    assert told == [[(True, said[0])], (16, 0, 16 * CHUNK), [(True, said[1])], (0, 16, 0)]


def test_tenants_and_other_weights_never_meet(pool):
    engine = Engine(pool, 16)
    try:
        engine.store(range(8), "alice")
        # Out of the CPU tier, which knows no tenants.
        engine.store(range(100, 132), "alice")
        assert engine.load(range(8), "bob") == []
        assert engine.load(range(8), "alice") == list(range(8))
    finally:
        engine.close()
    engine = Engine(pool, 16, fingerprint="other")
    try:
        assert engine.load(range(8), "alice") == []
    finally:
        engine.close()


def test_a_tenant_cannot_grow_beyond_its_quota(pool):
    engine = Engine(pool, 8, quotas={"alice": 5 * CHUNK}, tenant_quota=f"{3 * CHUNK}")
    try:
        for tenant, first in (("alice", 0), ("bob", 100), (None, 200)):
            engine.store(range(first, first + 16), tenant)
        # Out of the CPU tier, which knows no tenants.
        engine.store(range(300, 316))
        # Waves of four, whose chunks come in any order: the last ones are there, and of a wave that is more than the quota a part.
        found = engine.load(range(16), "alice")
        assert len(found) == 5 and set(range(12, 16)) < set(found) < set(range(8, 16))
        assert len(found := engine.load(range(100, 116), "bob")) == 3 and set(found) < set(range(112, 116))
        assert engine.load(range(200, 204)) == list(range(200, 204)), "who gave no name has no quota"
    finally:
        engine.close()
    # It is in the store.
    engine = Engine(pool, 8)
    try:
        engine.store(range(400, 416), "alice")
        engine.store(range(300, 316))
        found = engine.load([*range(16), *range(400, 416)], "alice")
        assert len(found) == 5 and set(range(412, 416)) < set(found) < set(range(408, 416))
    finally:
        engine.close()


def where(pool, numbers):
    """File and place of each chunk."""
    places = {}
    for path in sorted(p for p in pool.rglob("*") if p.is_file()):
        raw = path.read_bytes()
        for n in numbers:
            at = raw.find(content(n, CHUNK).tobytes())
            if at >= 0:
                places[n] = (path, at)
    assert len(places) == len(numbers)
    return places


@pytest.mark.parametrize("damage", ["flip", "zero", "swap"])
def test_damage_is_a_miss_and_harms_no_neighbour(pool, damage):
    engine = Engine(pool, 64)
    try:
        engine.store(range(12))
    finally:
        engine.close()
    places = where(pool, range(12))
    for n in (3, 7):
        path, at = places[n]
        new = bytearray(content(n, CHUNK).tobytes())
        if damage == "flip":
            for i in range(64):
                new[CHUNK // 2 + i] ^= 255
        elif damage == "zero":
            new = bytearray(CHUNK)
        else:
            new = bytearray(content(n + 1, CHUNK).tobytes())
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(new)
    engine = Engine(pool, 64)
    try:
        good = [n for n in range(12) if n not in (3, 7)]
        # The store has them, a load finds out, and whoever asks again is told that they are not there.
        assert engine.load(range(12)) == good
        assert engine.tier._tier.stat()["corrupt"] == 2
        engine.store([3, 7])
    finally:
        engine.close()
    engine = Engine(pool, 64)
    try:
        assert engine.load(range(12)) == list(range(12)), "a later store makes it whole"
    finally:
        engine.close()


def test_a_file_that_was_cut_costs_its_own_chunks_only(pool):
    numbers = list(range(160))
    engine = Engine(pool, 256)
    try:
        engine.store(numbers)
    finally:
        engine.close()
    places = where(pool, numbers)
    files = sorted({path for path, _ in places.values()})
    assert len(files) > 1
    gone = [n for n in numbers if places[n][0] == files[0]]
    os.truncate(files[0], places[gone[len(gone) // 2]][1] + 4096)
    engine = Engine(pool, 256)
    try:
        # Of the file that was cut, some chunks may have stayed whole; none comes back wrong (`load` compares).
        found = engine.load(numbers)
        assert set(numbers) - set(gone) <= set(found) and not set(gone) <= set(found)
        engine.store(sorted(set(numbers) - set(found)))
    finally:
        engine.close()
    engine = Engine(pool, 256)
    try:
        assert engine.load(numbers) == numbers, "a later store makes it whole"
    finally:
        engine.close()


def test_what_does_not_come_in_time_is_a_miss_and_nobody_waits_for_ever(pool):
    engine = Engine(pool, 64)
    try:
        engine.store(range(12))
    finally:
        engine.close()
    # Over before anything begins: all that is loaded is late.
    engine = Engine(pool, 64, deadline=1e-9)
    try:
        assert engine.load(range(12)) == []
        stat = engine.tier._tier.stat()
        assert stat["load_failed"] == stat["hits"] > 0
        assert stat["loaded"] == stat["lost"] == stat["corrupt"] == 0
    finally:
        engine.close()
    engine = Engine(pool, 64)
    try:
        assert engine.load(range(12)) == list(range(12)), "slow is not damaged"
    finally:
        engine.close()


def test_a_drive_that_hangs_costs_its_chunks_and_no_step(tmp_path):
    drive = StallingDrive(tmp_path, 256 << 20)
    engine = None
    try:
        engine = Engine(drive.pool, 16, budget=64 << 20, deadline=1.0)
        engine.store(range(8))
        # Out of the CPU tier.
        engine.store(range(100, 132))
        drive.stop()
        for attempt in range(2):
            # Every call of vLLM's manager came back while the drive did not answer, and in the end what it has are misses.
            context, seen, results = engine.request(), set(), []
            for _ in range(STEPS):
                results = [engine.manager.lookup(key(n), context) for n in range(8)]
                engine.step()
                assert not drive.answers, "a step waited for the drive"
                seen.update(results)
                if set(results) == {base.LookupResult.MISS}:
                    break
            assert set(results) == {base.LookupResult.MISS}
            # The first time they were there, and being loaded.
            assert attempt or len(seen) > 1
            engine.manager.on_request_finished(context)
        stat = engine.tier._tier.stat()
        assert stat["load_failed"] == 8 and stat["loaded"] == stat["corrupt"] == stat["lost"] == 0
        assert not drive.answers
        drive.go_on()
        engine.store(range(8))
        assert engine.load(range(8)) == list(range(8))
    finally:
        drive.go_on()
        if engine is not None:
            engine.close()
        drive.close()


def test_a_reset_with_jobs_on_their_way_and_a_cpu_tier_of_one_chunk(pool):
    engine = Engine(pool, 1)
    try:
        engine.store(range(6))
        for n in range(6):
            assert engine.load([n]) == [n]
        context = engine.request()
        assert engine.manager.lookup(key(0), context) is not base.LookupResult.HIT
        engine.step()
        engine.manager.reset_cache()
        if not OLD:
            engine.manager.on_reset_flushed()
        engine.manager.on_request_finished(context)
        assert engine.load([3]) == [3]
    finally:
        engine.close()


def test_the_digest_of_weights_is_of_their_bytes(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "config.json").write_text("{}")
    first = nvtier.vllm.weights_digest(str(folder))
    (folder / "a.safetensors").rename(folder / "b.safetensors")
    assert nvtier.vllm.weights_digest(str(folder)) == first
    with open(folder / "b.safetensors", "r+b") as file:
        file.seek(9000)
        file.write(b"\xff")
    assert nvtier.vllm.weights_digest(str(folder)) != first
    (folder / "b.safetensors").unlink()
    with pytest.raises(nvtier.InvalidArgument, match="no weights"):
        nvtier.vllm.weights_digest(str(folder))


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import test_vllm_tier as t
engine = t.Engine(sys.argv[1], 16)
for start in range(0, 4000, 8):
    engine.store(list(range(start, start + 8)))
    if start == 64:
        engine.tier._store.namespace(engine.tier._print, t.CHUNK).flush()
    print(start, flush=True)
"""


def test_a_kill_loses_nothing_that_was_flushed_and_serves_nothing_wrong(pool):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(pool), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    try:
        for start in range(0, 96, 8):
            # vLLM's log is between.
            assert f"{start}\n" in child.stdout, f"the child ended before {start}"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        for left in pathlib.Path("/dev/shm").glob("*nvtier-test-*"):
            left.unlink()
    engine = Engine(pool, 128)
    try:
        found = engine.load(range(104))
        assert set(range(72)) <= set(found)
    finally:
        engine.close()


OWNER = """
import sys, nvtier
pool = nvtier.Pool(sys.argv[1])
print("owner", flush=True)
sys.stdin.read()
"""


def test_another_owner_serves_two_engines_and_its_death_is_misses(pool):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(pool)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    engines = []
    try:
        assert owner.stdout.readline() == "owner\n"
        engines = [Engine(pool, 16), Engine(pool, 16)]
        engines[0].store(range(32))
        assert engines[0].load(range(8)) == list(range(8))
        assert engines[1].load(range(8)) == list(range(8)), "what one engine stored, another one finds"
        owner.kill()
        owner.wait()
        # From vLLM's own tier, or not at all.
        engines[1].store(range(100, 116))
        assert engines[1].load(range(8)) == []
    finally:
        for engine in engines:
            engine.close()
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
    engine = Engine(pool, 16)
    try:
        assert set(engine.load(range(8))) <= set(range(8))
    finally:
        engine.close()


def test_what_makes_no_sense_is_refused(pool):
    with pytest.raises(nvtier.InvalidArgument, match="deadline"):
        Engine(pool, 4, deadline=0)
    with pytest.raises(nvtier.InvalidArgument, match="fingerprint"):
        Engine(pool, 4, fingerprint=None)
    with pytest.raises(TypeError, match="budgget"):
        Engine(pool, 4, budgget=1)
