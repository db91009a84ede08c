"""A drive that stops answering, and an owner of a pool that does: who asks is told so while it lasts, and waits for nobody. The drive is stopped for as long as
a test says, so that an answer that comes meanwhile came without it. vLLM's own managers are in `test_vllm_tier.py`."""

import signal
import subprocess
import sys
import time

import pytest
from common import LIMIT_S, MIB, StallingDrive, wait_stopped

import nvtier
from nvtier import _nvtier

torch = pytest.importorskip("torch")

BLOCK = 64 << 10
COUNT = 8
DEADLINE = 1.0


@pytest.fixture
def drive(tmp_path):
    drive = StallingDrive(tmp_path, 256 * MIB)
    yield drive
    drive.close()


def until(done, drive=None, limit=LIMIT_S):
    """Polls, as an engine's steps do, until something is there; all of it while the drive does not answer."""
    end = time.monotonic() + limit
    while True:
        value = done()
        assert drive is None or not drive.answers, "it came only when the drive answered again"
        if value:
            return value
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)


class Rows:
    """A tier over rows of memory, as vLLM's CPU tier is."""

    def __init__(self, pool, threads=2):
        self.store = nvtier.kv.Store(pool, budget=64 * MIB, ram=8 * MIB, keep=False, deadline=DEADLINE)
        self.memory = torch.zeros(COUNT, BLOCK, dtype=torch.uint8)
        planes, shape = [(self.memory.data_ptr(), COUNT * BLOCK)], (COUNT, BLOCK, 1, BLOCK, 1, BLOCK, BLOCK)
        self.tier = _nvtier.KvTier(self.store._inner, self.memory, "cpu", planes, shape, BLOCK, b"print" * 8, threads, DEADLINE)

    def close(self):
        self.tier.close()
        self.store.close()


KEYS = [bytes([n]) * 8 for n in range(COUNT)]


def content():
    return torch.arange(COUNT * BLOCK, dtype=torch.int64).mul(2654435761).bitwise_right_shift(13).to(torch.uint8).view(COUNT, BLOCK)


def stored(pool):
    rows = Rows(pool)
    rows.memory.copy_(content())
    rows.tier.store(1, "", KEYS, list(range(COUNT)))
    assert until(rows.tier.finished)[0][:2] == (1, True)
    rows.memory.zero_()
    return rows


def test_a_tier_answers_while_its_drive_does_not(drive):
    rows = stored(drive.pool)
    tier = rows.tier
    try:
        assert until(lambda: tier.prefix("before", "", KEYS)) == COUNT
        drive.stop()
        # All that an engine's scheduler calls; none of it waits for the drive. Stores that hang keep no load from its deadline.
        assert until(lambda: tier.prefix("r", "", KEYS), drive) == COUNT
        for job in (3, 4, 5):
            tier.store(job, "", [b"new %d" % job], [0])
        tier.load(2, "", KEYS, list(range(COUNT)))
        assert tier.is_busy() and tier.lookup("r", "", KEYS[0]) is True
        assert until(lambda: tier.lookup("r", "", b"unknown") is not None, drive)
        tier.forget("before")
        assert tier.stat()["queued"] > 0 and not drive.answers
        # The deadline ends the load: a miss, and so is whoever asks again.
        over = {}
        while 2 not in over:
            over.update((job[0], job[1:3]) for job in until(tier.finished, drive))
        assert over[2] == (False, [False] * COUNT)
        assert tier.prefix("r", "", KEYS) == 0
        assert until(lambda: tier.prefix("again", "", KEYS) is not None, drive) and tier.prefix("again", "", KEYS) == 0
        stat = tier.stat()
        assert stat["load_failed"] == COUNT and stat["loaded"] == stat["corrupt"] == stat["lost"] == 0 and tier.trouble()
        assert not drive.answers
        drive.go_on()
        # What is computed and stored anew is there again, and right.
        rows.memory.copy_(content())
        over.clear()
        for attempt in range(6, 1000):
            tier.store(attempt, "", KEYS, list(range(COUNT)))
            while attempt not in over:
                over.update((job[0], job[1]) for job in until(tier.finished))
            if over[attempt]:
                break
        rows.memory.zero_()
        assert until(lambda: tier.prefix("after", "", KEYS)) == COUNT
        tier.load(1000, "", KEYS, list(range(COUNT)))
        assert until(tier.finished)[0][:2] == (1000, True) and torch.equal(rows.memory, content())
    finally:
        drive.go_on()
        rows.close()


OWNER = """
import sys, nvtier
with nvtier.Pool(sys.argv[1]) as pool:
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_question_to_an_owner_that_hangs_is_a_miss_by_the_deadline(tmp_path):
    nvtier.format(tmp_path / "pool")
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "pool")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "ready\n"
        rows = stored(tmp_path / "pool")
        tier = rows.tier
        assert until(lambda: tier.prefix("before", "", KEYS)) == COUNT
        owner.send_signal(signal.SIGSTOP)
        wait_stopped(owner.pid)
        tier.load(2, "", KEYS, list(range(COUNT)))
        # First it is asked again, then it is a miss, and the owner has not gone on.
        assert tier.prefix("r", "", KEYS) is None and tier.prefix("r", "", KEYS) is None
        # Long before the minute that an owner is given who does not answer for other reasons.
        assert until(lambda: tier.prefix("r", "", KEYS) is not None, limit=30) and tier.prefix("r", "", KEYS) == 0
        assert until(tier.finished, limit=30)[0][:3] == (2, False, [False] * COUNT)
        wait_stopped(owner.pid)
        owner.send_signal(signal.SIGCONT)
        assert until(lambda: tier.prefix("after", "", [b"new"]) is not None)
        rows.close()
    finally:
        owner.send_signal(signal.SIGCONT)
        owner.communicate("", LIMIT_S)


def test_batches_of_lmcache_end_while_the_drive_does_not_answer(drive):
    import nvtier.lmcache

    client = nvtier.lmcache.NvtierClient(str(drive.pool), budget=64 * MIB, ram=8 * MIB, deadline=DEADLINE)
    try:
        keys = [f"model@0@0@{n:x}" for n in range(COUNT)]
        rows = [bytearray(row.numpy().tobytes()) for row in content()]
        batch = client.submit_batch_set(keys, [memoryview(row) for row in rows])
        assert until(client.drain_completions)[0][:2] == (batch, True)
        drive.stop()
        into = [bytearray(BLOCK) for _ in keys]
        batch = client.submit_batch_get(keys, [memoryview(row) for row in into])
        found = client.submit_batch_exists(keys)
        over = {}
        while len(over) < 2:
            over.update((one[0], one[1:]) for one in until(client.drain_completions, drive))
        assert over[batch][2] == [False] * COUNT and over[found][2] == [True] * COUNT
        assert not any(map(any, into)) and not drive.answers
    finally:
        drive.go_on()
        client.close()
