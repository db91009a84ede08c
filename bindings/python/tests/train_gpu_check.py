"""nvtier.train on a GPU: bit for bit plain PyTorch, and how long a step takes beside what the drive, the bus and the model allow.

    train_gpu_check.py --dir DIR --out FILE [--layers 16] [--hidden 2048] [--ffn 8192] [--batch 4] [--seq 2048] [--steps 4] [--runs drive,ram] [--nvtier NVTIER]

The pool and the files of the drive's ceilings are made in DIR and removed. Needs torch, transformers and a CUDA device.
"""

import argparse
import copy
import gzip
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import nvtier  # noqa: E402
import nvtier.train  # noqa: E402

GIB = 1 << 30
ADAMW = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def halves(folder):
    """Float32 weights taken apart and put together by the GPU's kernel, beside PyTorch on the host, bit for bit: random bits, all ties, the smallest and the
    largest, tails of every length. Not a number is left out: its bits are each device's own."""
    from nvtier import _nvtier
    from nvtier.train._planes import join, split

    pool = os.path.join(folder, "halves")
    nvtier.format(pool)
    state = _nvtier.State(nvtier.Pool(pool), name="halves", budget=64 << 20, block_bytes=64 << 10, ram=0, deadline=10.0)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 22,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    ties = (torch.arange(1 << 16, dtype=torch.int64) << 16 | 0x8000).where(torch.arange(1 << 16) < 1 << 15, (torch.arange(1 << 16, dtype=torch.int64) - (1 << 16)) << 16 | 0x8000)
    wrong = 0
    for count in [*range(1, 33), 4095, None]:
        master = torch.cat([ties, bits]).to(torch.int32).view(torch.float32)
        master = master[~master.isnan()][-count if count else 0 :].clone()
        parts = [torch.empty(master.numel(), dtype=torch.bfloat16), torch.empty(master.numel(), dtype=torch.int16), torch.empty(-(-master.numel() // 8), dtype=torch.uint8)]
        split(master, *parts)
        on_device = [torch.zeros_like(part, device="cuda") for part in parts]
        split(master.cuda(), *on_device, state)
        wrong += sum(int((mine.cpu().view(torch.uint8) != part.view(torch.uint8)).sum()) for mine, part in zip(on_device, parts))
        wrong += int((join(*on_device, state).cpu().view(torch.int32) != master.view(torch.int32)).sum())
    state.close()
    shutil.rmtree(pool)
    return {"halves_wrong": wrong, "elements": master.numel()}


def exact(folder):
    """Twenty steps of a small model, every precision, the budget of one block: losses, weights and moments are compared bit for bit."""
    found = [halves(folder)]
    print(json.dumps(found[0]), flush=True)
    torch.use_deterministic_algorithms(True)
    cases = [("fp32", 4, 1.0, True, "forward"), ("mixed", 4, 1.0, False, "forward"), ("mixed", 1, None, True, "forward"), ("bf16", 1, 0.5, False, "forward")]
    cases += [("fp32", 1, None, True, "backward"), ("mixed", 1, None, False, "backward")]
    for precision, micro, clip, tie, step_in in cases:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1031,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=tie,
            attention_dropout=0.1,
            attn_implementation="eager",
        )
        reference = LlamaForCausalLM(config).cuda().train()
        reference.config.use_cache = False
        reference.gradient_checkpointing_enable({"use_reentrant": False})
        if precision == "bf16":
            reference = reference.bfloat16()
        model = copy.deepcopy(reference)
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        needs = nvtier.train.plan(model, precision=precision, accumulate=micro > 1, step_in=step_in)
        pool = os.path.join(folder, "exact")
        nvtier.format(pool)
        model, optimizer = nvtier.train.offload(
            model,
            torch.optim.AdamW,
            pool=pool,
            precision=precision,
            vram=needs["least_vram"],
            ram="2MiB",
            accumulate=micro > 1,
            step_in=step_in,
            **ADAMW,
        )

        def run(model, optimizer, clip_by):
            torch.manual_seed(1)
            seen = []
            for step in range(20):
                for part in range(micro):
                    ids = torch.randint(0, 1031, (2, 64), generator=torch.Generator().manual_seed(100 * step + part)).cuda()
                    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "mixed"):
                        loss = model(input_ids=ids, labels=ids).loss / micro
                    loss.backward()
                    seen.append(loss.item())
                if clip is not None:
                    seen.append(clip_by(clip).item())
                optimizer.step()
                optimizer.zero_grad()
            return seen

        wanted = run(reference, plain, lambda most: torch.nn.utils.clip_grad_norm_(reference.parameters(), most))
        seen = run(model, optimizer, optimizer.clip_grad_norm_)
        parameters = dict(reference.named_parameters())
        weights = sum(int((weight.cuda() != parameters[name]).sum()) for name, weight in optimizer.weights())
        moments = 0
        for name, steps, m, v in optimizer.moments():
            state = plain.state[parameters[name]]
            moments += int((m.cuda() != state["exp_avg"]).sum()) + int((v.cuda() != state["exp_avg_sq"]).sum())
            moments += steps != int(state["step"])
        peak = optimizer.stats()["device_peak_bytes"]
        optimizer.close()
        shutil.rmtree(pool)
        one = {
            "precision": precision,
            "micro": micro,
            "clip": clip,
            "step_in": step_in,
            "losses_equal": seen == wanted,
            "weights_different": weights,
            "moments_different": moments,
            "peak_within_budget": peak <= needs["least_vram"],
        }
        print(json.dumps(one), flush=True)
        found.append(one)
    torch.use_deterministic_algorithms(False)
    return found


def drive(nvtier_bin, folder, ways=("write", "read"), keep=False):
    """GB/s that the drive reads and writes now, by nvtier bench. ``keep``: the file stays, for a later call that only reads: a drive that has just been
    written to may read more slowly for seconds."""
    if not nvtier_bin:
        return None
    speeds = {}
    for way in ways:
        command = [nvtier_bin, "bench", f"--name={way}", f"--rw={way}", "--bs=4m", "--iodepth=16", "--direct=1", "--ioengine=io_uring"]
        command += [f"--filename={folder}/ceiling", "--size=6g", "--runtime=5", "--time_based", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print("bench:", done.stderr[-500:])
            return None
        speeds[way] = json.loads(done.stdout)["jobs"][0][way]["bw_bytes"] / 1e9
    if not keep:
        os.remove(os.path.join(folder, "ceiling"))
    return speeds


def bus():
    """GB/s of pinned copies: each way alone, and (``both``) each of the two while the other runs."""
    host, device = torch.empty(GIB, dtype=torch.uint8, pin_memory=True), torch.empty(GIB, dtype=torch.uint8, device="cuda")
    back, there = torch.empty(GIB, dtype=torch.uint8, pin_memory=True), torch.empty(GIB, dtype=torch.uint8, device="cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def timed(copies):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            for stream, (to, source) in zip(streams, copies):
                with torch.cuda.stream(stream):
                    to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return 3 * GIB / (time.perf_counter() - start) / 1e9

    in_, out = (device, host), (back, there)
    timed([in_, out])
    return {"htod": timed([in_]), "dtoh": timed([out]), "both": timed([in_, out])}


def steps_of(model, optimizer, ids, count, clip=True):
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clip:
            optimizer.clip_grad_norm_(1.0) if hasattr(optimizer, "clip_grad_norm_") else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


#: Bytes of copies on the device that mark where a pass begins and ends: of no size that anything else has.
MARKS = {"forward": 100_003, "backward": 100_019, "end": 100_043}


def timeline(model, optimizer, ids, clip, path):
    """What the device did in one step: seconds of the forward and of the backward pass, and of these, seconds in which it copied each way, both ways at
    once, and computed; and bytes. From the activities that CUPTI records; ``path``: where the whole record is written."""
    there, here = (torch.empty(max(MARKS.values()), dtype=torch.uint8, device="cuda") for _ in range(2))

    def mark(name):
        there[: MARKS[name]].copy_(here[: MARKS[name]])

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        mark("forward")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        mark("backward")
        loss.backward()
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        mark("end")
        torch.cuda.synchronize()
    profiler.export_chrome_trace(path)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    marks = {event["args"].get("bytes"): event["ts"] for event in events if event.get("cat") == "gpu_memcpy" and "DtoD" in event["name"]}
    found = {}
    for phase, until in (("forward", "backward"), ("backward", "end")):
        first, last = marks[MARKS[phase]], marks[MARKS[until]]
        spans, moved = {"htod": [], "dtoh": [], "kernel": []}, {"htod": 0, "dtoh": 0}
        for event in events:
            name = event["name"]
            way = {"gpu_memcpy": "htod" if "HtoD" in name else "dtoh" if "DtoH" in name else None, "kernel": "kernel"}.get(event.get("cat"))
            begin, end = max(event["ts"], first), min(event["ts"] + event["dur"], last)
            if way is None or end <= begin:
                continue
            spans[way].append((begin, end))
            if way != "kernel":
                moved[way] += event["args"].get("bytes", 0) * (end - begin) / event["dur"]
        seconds = {way: _length(parts) for way, parts in spans.items()}
        found[phase] = {
            "seconds": (last - first) / 1e6,
            **{f"{way}_seconds": value for way, value in seconds.items()},
            "both_ways_seconds": seconds["htod"] + seconds["dtoh"] - _length(spans["htod"] + spans["dtoh"]),
            **{f"{way}_gb": value / 1e9 for way, value in moved.items()},
            "kernels": len(spans["kernel"]),
        }
    return found


def _length(spans):
    """Seconds that at least one of the spans covers."""
    covered, until = 0.0, 0.0
    for begin, end in sorted(spans):
        covered += max(end - max(begin, until), 0)
        until = max(until, end)
    return covered / 1e6


#: Runs by name: bytes of RAM, steps between commits, where the step is carried out.
RUNS = {
    "drive": (0, 1, "forward"),
    "part": ("16GiB", 1, "forward"),
    "ram": ("64GiB", 1000, "forward"),
    "ram-backward": ("64GiB", 1000, "backward"),
    "large": ("64GiB", 1, "forward"),
}


def make(options):
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=options.hidden,
        intermediate_size=options.ffn,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def share_of(one, ceilings, compute):
    """How much of the floor's speed a run reached. Floors: the drive (reads and writes side by side, and one after the other), the bus, computing."""
    moved = one["per_step"]
    floors = {"compute": compute}
    floors["bus"] = max(moved["fetched_bytes"] / ceilings["bus"]["htod"], moved["stored_bytes"] / ceilings["bus"]["dtoh"]) / 1e9
    # What both ways at once allow, which is what most of a step does.
    floors["bus_both_ways"] = max(moved["fetched_bytes"], moved["stored_bytes"]) / ceilings["bus"]["both"] / 1e9
    if ceilings["drive"] is not None:
        read, written = moved["drive_read_bytes"] / ceilings["drive"]["read"] / 1e9, moved["drive_written_bytes"] / ceilings["drive"]["write"] / 1e9
        floors["drive_side_by_side"], floors["drive_in_turn"] = max(read, written), read + written
    binding = max(floors, key=lambda name: floors[name])
    return {"floors": floors, "binding": binding, "share": floors[binding] / one["median_seconds"]}


def speed(options, folder):
    found = {"model": vars(options), "ceilings": [], "runs": []}

    def ceilings():
        one = {"drive": drive(options.nvtier, folder), "bus": bus()}
        print(json.dumps(one), flush=True)
        found["ceilings"].append(one)
        return one

    ids = torch.randint(0, 32000, (options.batch, options.seq), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    model = make(options)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["plain_seconds"] = compute = None
    if not options.no_plain:
        if options.cap and not options.runs:
            torch.cuda.set_per_process_memory_fraction(options.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
        times = steps_of(model, torch.optim.AdamW(model.parameters(), fused=True, **ADAMW), ids, 4)
        found["plain_seconds"], compute = times, statistics.median(times[1:])
        found["plain_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print("plain", times, found["plain_peak_gb"], flush=True)
    del model
    torch.cuda.empty_cache()
    for name in filter(None, options.runs.split(",")):
        ram, every, step_in = RUNS[name]
        before_run = ceilings()
        pool = os.path.join(folder, "pool")
        nvtier.format(pool)
        model = make(options)
        needs = nvtier.train.plan(model, precision="mixed", accumulate=False, step_in=step_in)
        start = time.perf_counter()
        model, optimizer = nvtier.train.offload(
            model,
            torch.optim.AdamW,
            pool=pool,
            precision="mixed",
            ram=ram,
            vram=max(int(options.vram * GIB), needs["least_vram"]),
            accumulate=False,
            step_in=step_in,
            commit_every=every,
            **ADAMW,
        )
        begun = time.perf_counter() - start
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if options.cap:
            torch.cuda.set_per_process_memory_fraction(options.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
        # The first step has nothing to update yet, and the second one no moments to read.
        warm = min(2, options.steps - 1)
        times = steps_of(model, optimizer, ids, warm, clip=step_in == "forward")
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        before = optimizer.stats()
        times += steps_of(model, optimizer, ids, options.steps - warm, clip=step_in == "forward")
        after = optimizer.stats()
        one = {
            "name": name,
            "begin_seconds": begun,
            # Each is a pause: PyTorch's allocator met the cap, and gave gaps back first.
            "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries,
            "seconds": times,
            "median_seconds": statistics.median(times[warm:]),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "state_peak_gb": after["device_peak_bytes"] / 1e9,
            "needs": needs,
            "per_step": {key: (after[key] - before[key]) / (options.steps - warm) for key in after if key.endswith("bytes") and "device" not in key},
        }
        if options.timeline:
            one["timeline"] = timeline(model, optimizer, ids, step_in == "forward", f"{options.out}.{name}.trace.json.gz")
        torch.cuda.set_per_process_memory_fraction(1.0)
        optimizer.__exit__(KeyboardInterrupt, None, None)
        del model, optimizer
        torch.cuda.empty_cache()
        shutil.rmtree(pool)
        after_run = ceilings()
        mean = {
            part: {way: (before_run[part][way] + after_run[part][way]) / 2 for way in before_run[part]} if before_run[part] else None
            for part in ("drive", "bus")
        }
        one.update(share_of(one, mean, compute or 0.0), ceilings=mean)
        print(json.dumps(one), flush=True)
        found["runs"].append(one)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--nvtier", help="the command, for the drive's ceilings")
    for name, default in (("layers", 16), ("hidden", 2048), ("ffn", 8192), ("batch", 4), ("seq", 2048), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vram", type=float, default=3, help="GiB of weights, gradients and state on the device")
    parser.add_argument("--cap", type=float, default=0, help="GiB that all of the process may have on the device while it trains; 0: no cap")
    parser.add_argument("--runs", default="drive,ram,ram-backward", help=f"of {','.join(RUNS)}")
    parser.add_argument("--no-plain", action="store_true", help="leave out plain PyTorch with all of it on the device")
    parser.add_argument("--timeline", action="store_true", help="record what the device did in one more step of each run")
    parser.add_argument("--no-exact", action="store_true", help="leave out the comparison bit for bit")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("train_gpu_check: torch sees no CUDA device here")
    folder = tempfile.mkdtemp(dir=options.dir)
    found = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    try:
        if not options.no_exact:
            found["exact"] = exact(folder)
        found["speed"] = speed(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
