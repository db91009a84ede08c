#!/usr/bin/env python3
"""vLLM 0.26 with nvtier behind it, whole engines one after the other: `vllm_serve.py WHAT --model FOLDER --disk FOLDER --out FILE`.

WHAT:
  serve   random weights. Without a cache; with the connector, and a new process that finds what the one before stored; with the tier below vLLM's
          CPU tier, and a new process. Times to the first token; the weights by vLLM's loader and by nvtier's, from files and from a mounted pool
  crowd   many requests at once on a device with room for a part of them, in kernels whose results do not depend on the batch
  real    a model with a tokenizer, and text: no cache, the connector, a new process

A prompt is some whole steps of the engine and 15 tokens more. So what is left to compute after a load is a step of the same size as without a
cache, and the same kernels give the same bits: tokens and their log-probabilities are compared for equality, not for likeness. All prompts of a kind
end alike: what differs between their answers comes from the cache.

`--small`: a tiny model on the host, to work on this file; the tier needs a GPU, and is left out. Figures of it mean nothing.
One JSON file; a line for each check. Exit code 1: a check failed, or an engine did."""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from vllm_engines import Engines, Failed

BLOCK = 16
TAIL = 15
#: vLLM's CPU tier, at most.
CPU_TIER = 4 << 30
BUDGET = 24 << 30
#: What is tried where vLLM as it comes does not run: engines that are no forks of the process that asks them, and the older runner of models.
OTHERWISE = (
    ("plain-spawned", {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "NVTIER_NOT_AHEAD": "1"}),
    ("plain-spawned-v1", {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
)
KINDS = {"connector": "nvtier_connector_", "tier": "nvtier_tier_"}


class Run:
    """What is measured, and where."""

    def __init__(self, args):
        self.args = args
        self.begun = time.monotonic()
        self.disk = pathlib.Path(args.disk)
        self.report = {"what": args.what, "model": args.model, "small": args.small, "engines": {}, "checks": [], "loads": []}
        env = {
            "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_WORKER_MULTIPROC_METHOD": "fork", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        if args.small:
            env.update(NVTIER_NOT_AHEAD="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="2")
        if args.what == "crowd" and not args.small:
            env["VLLM_BATCH_INVARIANT"] = "1"
        self.engines = Engines(pathlib.Path(args.out).parent, env)

    def left(self):
        return self.args.limit - (time.monotonic() - self.begun)

    def save(self):
        pathlib.Path(self.args.out).write_text(json.dumps(self.report, indent=1))

    def check(self, name, fine, detail=""):
        self.report["checks"].append({"name": name, "fine": bool(fine), "detail": detail})
        print(f"{'ok  ' if fine else 'FAIL'} {name}{': ' if detail else ''}{detail}", flush=True)
        self.save()

    def nvtier(self, *command):
        done = subprocess.run([self.args.nvtier, *map(str, command)], capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise Failed(f"nvtier {command[0]} ended with {done.returncode}: {done.stderr.strip()[-600:]}")

    def engine(self, name, waves, transfer=None, stored=0, load="safetensors", source=None, settings=None, prompts=None, more=True, least=25):
        """An engine of its own process; None where it fails or there is no time for it, which is said."""
        if self.left() < least:
            self.check(f"{name} ran", False, f"{self.left():.0f} s are left of {self.args.limit}")
            return None
        model = source or self.args.model
        for folder in (model, self.disk / "models") if source else (model,):
            cold(folder)
        kind = next((kind for kind in KINDS if name.startswith(kind)), None)
        order = {
            "name": name, "engine": {**settings, "model": str(model), "load_format": load}, "prompts": prompts, "waves": waves, "transfer": transfer,
            "stored": stored, "prefix": KINDS.get(kind) if transfer else None, "patience": 20, "decode": self.args.what == "real",
        }  # fmt: skip
        started = time.monotonic()
        try:
            result = self.engines.run(order, min(self.args.each, self.left()), more)
        except Failed as error:
            self.check(f"{name} ran", False, str(error))
            return None
        result["whole_seconds"] = time.monotonic() - started
        self.report["engines"][name] = result
        took = [float(line.split("took ")[1].split()[0]) for line in result["notes"] if "Loading weights took" in line]
        if took:
            size = sum(file.stat().st_size for file in pathlib.Path(self.args.model).glob("*.safetensors"))
            load = {"engine": name, "format": load, "from": "mount" if source else "files", "seconds": took[0], "bytes": size}
            self.report["loads"].append(load)
        self.check(f"{name} ran", result["exit"] == 0, f"engine {result['seconds']['engine']:.1f} s, requests {result['seconds']['waves']:.1f} s, {result['runner']}, exit {result['exit']}")
        return result

    def pool(self, name):
        folder = self.disk / name
        self.nvtier("format", folder)
        return folder


def cold(folder):
    """Files of a model, or of a pool, are on the drive alone."""
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened, contextlib.suppress(OSError):
                os.fdatasync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def connector(pool, **extra):
    return {
        "kv_connector": "NvtierConnector", "kv_connector_module_path": "nvtier.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"pool": str(pool), "budget": BUDGET, "deadline": 60, **extra},
    }  # fmt: skip


def tier(pool, room):
    inner = {"type": "NvtierTier", "module_path": "nvtier.vllm", "pool": str(pool), "budget": BUDGET, "deadline": 60}
    return {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": room, "secondary_tiers": [inner]},
    }  # fmt: skip


def flat(result):
    return [answer for wave in result["waves"] for answer in wave] if result else []


def first(result):
    """By prompt: its first answer."""
    found = {}
    for answer in flat(result):
        found.setdefault(answer["name"], answer)
    return found


#: Of log-probabilities near 6 in bfloat16: two steps. Another block's keys move them by whole numbers.
NEAR = 0.0625


def same(run, name, expected, got, near=0.0, asked=True):
    """Tokens and their log-probabilities, all of them; ``near``: log-probabilities may be so far apart, and an answer is compared as far as a token, not the
    first, where another one was as likely. Whether all is alike; ``asked``: whether that is a check, or only told."""
    if not expected or not got:
        return False
    wrong, furthest, inexact = [], 0.0, 0
    for prompt, answer in got.items():
        if prompt not in expected:
            continue
        want = expected[prompt]
        count = min(len(want["tokens"]), len(answer["tokens"]))
        pairs = list(zip(want["tokens"][:count], answer["tokens"][:count]))
        differs = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        # The tokens that were chosen there as well, one against the other.
        until = count if differs is None else differs + 1
        apart = max((abs(a - b) for a, b in zip(want["logprobs"][:until], answer["logprobs"][:until])), default=0.0)
        furthest, inexact = max(furthest, apart), inexact + (apart != 0)
        if apart > near or differs == 0 or (differs is not None and near == 0):
            wrong.append(prompt if differs is None else f"{prompt} from token {differs} on")
    told = f"{'; '.join(wrong)}{'; ' if wrong else ''}{len(got)} prompts, log-probabilities of {inexact} differ, by {furthest:.2g} at most"
    if asked:
        run.check(f"{name}: {'the tokens of no cache' if near == 0 else f'answers within {near} of no cache'}", not wrong, told)
    elif wrong:
        print(f"note {name}: this engine's results depend on what else it computes, without any cache: {told}", flush=True)
    return not wrong


def hits(run, name, result, kind, waves):
    """What came from outside the device is all that could; nothing was damaged or late."""
    if not result:
        return
    short = [f"{answer['name']}: {answer['cached']} of {most(answer)}" for wave in result["waves"][waves] for answer in wave if answer["cached"] != most(answer)]
    run.check(f"{name}: every whole block of a prompt came from the cache", not short, "; ".join(short))
    counts = result["counts"]
    bad = {what: counts.get(KINDS[kind] + what, 0) for what in ("corrupt", "load_failed", "lost", "store_failed", "refused")}
    told = {key.removeprefix(KINDS[kind]): value for key, value in counts.items() if key.startswith((KINDS[kind], "external_prefix_cache"))}
    run.check(f"{name}: nothing damaged, lost, late or refused", not any(bad.values()), json.dumps(told))


def most(answer):
    """Tokens of a prompt that can come from a cache: whole blocks, and not the last token."""
    return (answer["prompt"] - 1) // BLOCK * BLOCK


def blocks(prompts, names):
    return sum(prompts[name]["length"] // BLOCK for name in names)


def serve(run):
    args = run.args
    step = 512 if args.small else 8192
    prompts = {}
    for steps, copies in ((1, 2), (2, 1)) if args.small else ((1, 2), (4, 2), (16, 1)):
        for copy in range(copies):
            prompts[f"{steps * step} {'ab'[copy]}"] = {
                "length": steps * step + TAIL, "tail": TAIL, "seed": 100 * steps + copy, "vocabulary": 1000 if args.small else 32000,
            }  # fmt: skip
    prompts["warm"] = {"length": step + TAIL, "tail": TAIL, "seed": 7, "vocabulary": 1000}
    names = [name for name in prompts if name != "warm"]
    short = names if args.small else names[:-1]
    longest = max(spec["length"] for spec in prompts.values())
    # Room for two of the longest: blocks of one that are being stored are not in the way of the next one.
    settings = {
        "dtype": "float32" if args.small else "bfloat16", "max_model_len": longest + 256, "max_num_seqs": 4, "max_num_batched_tokens": step,
        "enable_prefix_caching": False, "num_gpu_blocks_override": 2 * longest // BLOCK + 400,
    }  # fmt: skip
    if not args.small:
        settings["gpu_memory_utilization"] = 0.5

    def waves(chosen, again):
        made = [{"prompts": ["warm"], "tokens": 4}] + [{"prompts": [name], "tokens": args.tokens} for name in chosen]
        return made + [{"prompts": [name], "tokens": 8} for name in again]

    common = {"settings": settings, "prompts": prompts}
    run.engines.prepare()
    mounted = mount(run)
    plain = run.engine("plain", waves(names, short), **common)
    for name, env in () if args.small else OTHERWISE:
        if plain is None:
            run.engines.set(env)
            plain = run.engine(name, waves(names, short), **common)
    if plain is None:
        return
    expected = first(plain)
    again = {answer["name"]: answer for answer in flat(plain)[1 + len(names) :]}
    same(run, "no cache, once more", expected, again)
    alike = [f"{a} and {b}" for a in names for b in names if a < b and expected[a]["tokens"] == expected[b]["tokens"]]
    run.check("prompts that end alike have different answers", not alike, "; ".join(alike))

    pool = run.pool("kv")
    stored = blocks(prompts, [*names, "warm"])
    # The tier, below, takes a digest of all weights for a fingerprint; here they would be read twice for it, once through the mount.
    transfer = connector(pool, fingerprint="random weights")
    store = run.engine("connector-store", waves(names, []), transfer, stored, load="nvtier", **common)
    same(run, "nvtier's loader, and the connector that stores", expected, first(store))
    if store:
        counts = store["counts"]
        run.check("connector: every block is stored", counts.get("nvtier_connector_stored", 0) == stored, f"{counts.get('nvtier_connector_stored')} of {stored}")
        cold(pool)
        restore = run.engine("connector-restore", waves(names, short), transfer, load="nvtier", source=mounted, more=not args.small, **common)
        same(run, "connector, a new process", expected, first(restore))
        hits(run, "connector, a new process", restore, "connector", slice(0, None))

    if args.small:
        print("the tier: left out, it needs a GPU")
        return
    shm = os.statvfs("/dev/shm")
    room = min(CPU_TIER, shm.f_bavail * shm.f_frsize * 6 // 10)
    print(f"vLLM's CPU tier: {room / 1e9:.2f} GB of /dev/shm", flush=True)
    pool = run.pool("kv-tier")
    stored = blocks(prompts, [*short, "warm"])
    store = run.engine("tier-store", waves(short, []), tier(pool, room), stored, **common)
    same(run, "tier that stores", expected, first(store))
    if store:
        counts = store["counts"]
        run.check("tier: every block is stored", counts.get("nvtier_tier_stored", 0) == stored, f"{counts.get('nvtier_tier_stored')} of {stored}")
        cold(pool)
        restore = run.engine("tier-restore", waves(short, short), tier(pool, room), load="nvtier", more=False, **common)
        same(run, "tier, a new process", expected, first(restore))
        hits(run, "tier, a new process", restore, "tier", slice(0, 1 + len(short)))


def mount(run):
    """The model in a mounted pool, or None and why."""
    try:
        pool, place = run.pool("models"), run.disk / "mount"
        run.nvtier("import", run.args.model, "m", "--pool", pool)
        place.mkdir()
        run.nvtier("mount", pool, place)
        return place / "m"
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        run.check("the model in a mounted pool", False, str(error))
        return None


def crowd(run):
    """Many at once: the device has room for some of them, so requests wait, are preempted and loaded while others are computed."""
    args = run.args
    count, sizes, room = (6, (90, 200), 60) if args.small else (32, (500, 2000), 900)
    prompts = {}
    for number in range(count):
        length = sizes[0] + (number * 377) % (sizes[1] - sizes[0])
        # Three begin alike.
        prompts[f"r{number}"] = {
            "length": length, "tail": TAIL, "seed": 1000 + number, "group": 50 + number // 3, "shared": sizes[0] // 2, "vocabulary": 1000,
        }  # fmt: skip
    names = list(prompts)
    settings = {
        "dtype": "float32" if args.small else "bfloat16", "max_model_len": 4096, "max_num_seqs": count, "max_num_batched_tokens": 512 if args.small else 2048,
        "enable_prefix_caching": False, "num_gpu_blocks_override": room,
    }  # fmt: skip
    if args.small:
        settings["max_model_len"] = 512
    else:
        settings["gpu_memory_utilization"] = 0.3
    tokens = 24 if args.small else 96
    alone = [{"prompts": [name], "tokens": tokens} for name in names]
    together = [{"prompts": names, "tokens": tokens}]
    common = {"settings": settings, "prompts": prompts}
    plain = run.engine("plain", alone + together, **common)
    if plain is None:
        return
    expected = first(plain)
    # Where the engine itself gives other bits in a crowd, no cache can be asked for the same ones.
    alike = same(run, "no cache, all at once", expected, {answer["name"]: answer for answer in plain["waves"][-1]}, asked=False)
    pool = run.pool("kv-crowd")
    common["settings"] = {**settings, "enable_prefix_caching": True}
    for name, load in (("connector-store", "safetensors"), ("connector-restore", "nvtier")):
        # Twice: what the first wave stores, the second one may load.
        done = run.engine(name, together * 2, connector(pool), load=load, more=name == "connector-store", **common)
        for number, wave in enumerate(done["waves"] if done else ()):
            same(run, f"{name}, wave {number + 1}", expected, {answer["name"]: answer for answer in wave}, near=0.0 if alike else NEAR)
        if done:
            counts = done["counts"]
            bad = {what: counts.get(f"nvtier_connector_{what}", 0) for what in ("corrupt", "load_failed", "lost", "store_failed", "refused")}
            run.check(f"{name}: nothing damaged, lost, late or refused", not any(bad.values()), json.dumps(counts))
            run.check(f"{name}: requests were preempted", counts.get("num_preemptions", 0) > 0, str(counts.get("num_preemptions", 0)))
    run.check("connector-restore: blocks were loaded", bool(done) and done["counts"].get("nvtier_connector_loaded", 0) > 0)


def real(run):
    args = run.args
    root = pathlib.Path(__file__).resolve().parents[2]
    files = [str(root / name) for name in ("README.md", "ARCHITECTURE.md", "docs/format.md", "docs/posix.md")]
    step = 128 if args.small else 2048
    prompts = {
        f"{steps * step} tokens of text": {"files": files, "skip": 100 * steps, "length": steps * step + TAIL} for steps in ((1, 2) if args.small else (1, 3))
    }
    names = list(prompts)
    settings = {
        "dtype": "float32" if args.small else "bfloat16", "max_model_len": 512 if args.small else 8192, "max_num_seqs": 4, "max_num_batched_tokens": step,
        "enable_prefix_caching": False, "num_gpu_blocks_override": 1200,
    }  # fmt: skip
    if not args.small:
        settings["gpu_memory_utilization"] = 0.3
    waves = [{"prompts": [name], "tokens": args.tokens} for name in names] * 2
    common = {"settings": settings, "prompts": prompts}
    plain = run.engine("plain", waves, **common)
    if plain is None:
        return
    pool = run.pool("kv-real")
    stored = blocks(prompts, names)
    store = run.engine("connector-store", waves[: len(names)], connector(pool), stored, load="nvtier", **common)
    same(run, "the connector that stores", first(plain), first(store))
    restore = run.engine("connector-restore", waves, connector(pool), load="nvtier", more=False, **common) if store else None
    same(run, "connector, a new process", first(plain), first(restore))
    hits(run, "connector, a new process", restore, "connector", slice(0, None))
    for name, texts in zip(names, restore["texts"] if restore else ()):
        print(f"{name}: {texts[0][:300]!r}", flush=True)


def table(run):
    """Times to the first token, and of loads."""
    engines = run.report["engines"]
    rows = {}
    for engine, result in engines.items():
        seen = set()
        for answer in flat(result):
            key = (answer["name"], answer["name"] in seen)
            seen.add(answer["name"])
            if answer["ttft"] is not None and run.args.what != "crowd":
                rows.setdefault(key, {})[engine] = (answer["ttft"], answer["cached"])
    if rows:
        print("\nTIME TO THE FIRST TOKEN, s (tokens from the cache)\n" + " " * 14 + "".join(f"{engine:>26}" for engine in engines))
    for (name, again), row in rows.items():
        cells = (f"{row[engine][0]:.3f} ({row[engine][1]})" if engine in row else "" for engine in engines)
        print(f"{name + (', again' if again else ''):14}" + "".join(f"{cell:>26}" for cell in cells))
    for load in run.report["loads"]:
        print(f"weights, {load['format']} from {load['from']}: {load['seconds']:.2f} s, {load['bytes'] / load['seconds'] / 1e9:.2f} GB/s ({load['engine']})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("serve", "crowd", "real"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--disk", required=True, help="a folder on the drive")
    parser.add_argument("--nvtier", default="nvtier", help="the command")
    parser.add_argument("--out", required=True, help="the JSON file; logs of engines come beside it")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit", type=float, default=280, help="seconds for all of it")
    parser.add_argument("--each", type=float, default=110, help="seconds for an engine")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    # `timeout` ends it so: engines are ended, and what is known is written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("vllm_serve: told to end"))
    run = Run(args)
    try:
        {"serve": serve, "crowd": crowd, "real": real}[args.what](run)
    finally:
        run.engines.drop()
        if os.path.ismount(run.disk / "mount"):
            with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                run.nvtier("umount", run.disk / "mount")
        run.report["seconds"] = time.monotonic() - run.begun
        table(run)
        run.save()
    return 0 if all(check["fine"] for check in run.report["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
