"""Alternated loads into VRAM; started by run.sh. Each loader runs in a process of its own and times itself: from the first
call of its API, with CUDA started and everything imported, until all tensors are on the device."""

import argparse, glob, json, os, resource, statistics, subprocess, sys, time, traceback

PEERS = ["safetensors", "fastsafetensors", "runai_streamer", "instanttensor", "kvikio"]
START = time.monotonic()


# --- in a child process: one load by one peer ---------------------------------------------------------------------------


def peer(name, files, device):
    """A generator: imports up to the first yield, then gives the tensors."""
    if name == "safetensors":
        from safetensors.torch import load_file

        yield
        yield {k: v for f in files for k, v in load_file(f, device=device).items()}
    elif name == "fastsafetensors":
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        yield
        loader = SafeTensorsFileLoader(SingleGroup(), device=device, nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        tensors = {k: buffers.get_tensor(k) for k in loader.get_keys()}
        tensors[""] = (loader, buffers)  # kept: they own the memory
        yield tensors
    elif name == "runai_streamer":
        from runai_model_streamer import SafetensorsStreamer

        yield
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            tensors = {k: t.to(device) for k, t in streamer.get_tensors()}
        yield tensors
    elif name == "instanttensor":
        import instanttensor

        yield
        with instanttensor.safe_open(files, framework="pt", device=device) as f:
            tensors = {k: t.clone() for k, t in f.tensors()}
        yield tensors
    elif name == "kvikio":
        # A reader of bytes, not of checkpoints: the data of each file in one read, by its threads, and views of that.
        import kvikio
        import torch

        types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        yield
        tensors = {}
        for path in files:
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            size = max(entry["data_offsets"][1] for entry in header.values())
            memory = torch.empty(size, dtype=torch.uint8, device=device)
            with kvikio.CuFile(path, "r") as f:
                if f.pread(memory if memory.is_cuda else memory.numpy(), size, 8 + length).get() != size:
                    raise OSError(f"{path}: kvikio read less than there is")
            for key, entry in header.items():
                start, end = entry["data_offsets"]
                tensors[key] = memory[start:end].view(types[entry["dtype"]]).view(entry["shape"])
        yield tensors


def child(name, files, device):
    import torch

    torch.empty(1 << 20, device=device)
    torch.cuda.synchronize()
    run = peer(name, files, device)
    next(run)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    tensors = next(run)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    tensors.pop("", None)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    # Sum of all bytes as 16-bit words: catches zeros, skips and garbled data whatever the order.
    check = sum(int(t.contiguous().view(-1).view(torch.int16).to(torch.int64).sum()) for t in tensors.values())
    print(json.dumps({
        "seconds": seconds, "bytes": size, "check": check,
        "cpu_seconds": after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime,
        "vram": torch.cuda.max_memory_allocated(),
    }))


def make(folder, nbytes, small=0):
    """A Llama-shaped bf16 checkpoint of random weights in two files, by the reference library; with `small` instead that
    many tensors of 4 KiB in one."""
    import torch
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    random = torch.Generator(device="cuda").manual_seed(7)

    def weights(*shape):
        return (torch.randn(*shape, device="cuda", generator=random) * 0.02 + 0.001).to(torch.bfloat16).cpu()

    if small:
        rows = weights(small, 2048)
        save_file({f"t.{i:06}": rows[i].clone() for i in range(small)}, f"{folder}/model-00001-of-00001.safetensors", metadata={"format": "pt"})
        return
    hidden, inner, vocabulary, kv = 4096, 14336, 32000, 1024
    layer = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden)
    layers = max(1, (nbytes - 4 * vocabulary * hidden) // layer)
    files = [{"model.embed_tokens.weight": weights(vocabulary, hidden)}, {"lm_head.weight": weights(vocabulary, hidden)}]
    for i in range(layers):
        p = f"model.layers.{i}."
        files[i * 2 // layers].update({
            p + "self_attn.q_proj.weight": weights(hidden, hidden), p + "self_attn.k_proj.weight": weights(kv, hidden),
            p + "self_attn.v_proj.weight": weights(kv, hidden), p + "self_attn.o_proj.weight": weights(hidden, hidden),
            p + "mlp.gate_proj.weight": weights(inner, hidden), p + "mlp.up_proj.weight": weights(inner, hidden),
            p + "mlp.down_proj.weight": weights(hidden, inner), p + "input_layernorm.weight": weights(hidden),
            p + "post_attention_layernorm.weight": weights(hidden),
        })
    for i, tensors in enumerate(files):
        save_file(tensors, f"{folder}/model-{i + 1:05}-of-00002.safetensors", metadata={"format": "pt"})
    os.sync()


# --- the run ------------------------------------------------------------------------------------------------------------


def call(command, timeout):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, cpu


def read_whole(files):
    """Has all of them in memory."""
    for f in files:
        with open(f, "rb", buffering=0) as source:
            while source.readinto(bytearray(1 << 24)):
                pass


def last_words(done):
    return (done.stderr.strip().splitlines() or ["no output"])[-1][:300]


class Run:
    def __init__(self, args):
        self.a = args
        self.results = {"steps": {}, "failures": [], "args": vars(args)}
        self.dropped = None

    def left(self):
        return self.a.limit - (time.monotonic() - START)

    def drop(self, files):
        """Cold: the whole page cache where we may, else file by file."""
        for f in files:
            fd = os.open(f, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        try:
            with open("/proc/sys/vm/drop_caches", "w") as f:
                f.write("3")
            self.dropped = "drop_caches"
        except OSError:
            self.dropped = "fadvise"

    def nvtier(self, paths, *options):
        done, cpu = call([self.a.nvtier, "load", *paths, "--json", "--progress", "none", *options], max(10, self.left()))
        if done.returncode != 0:
            return {"error": f"exit {done.returncode}: {last_words(done)}"}
        full = json.loads(done.stdout)
        load = full["load"]
        # The ring is taken and pinned within the time, as the peers' are.
        seconds = load["seconds"] + load["setup_seconds"]
        return {"seconds": seconds, "bytes": load["bytes"], "cpu_seconds": load["cpu_seconds"], "process_cpu_seconds": cpu, "vram": load["device_bytes"], "report": full}

    def peer(self, name, files):
        done, _ = call([sys.executable, __file__, "--child", name, *files], max(10, min(120, self.left())))
        try:
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            return {"error": last_words(done)}

    def bench(self, path, verb, size, seconds=3):
        """Sequential transfers by the benchmark's own engine: what the drive gives."""
        options = ["--name=c", f"--filename={path}", f"--rw={verb}", "--bs=1m", "--iodepth=32", "--direct=1", "--ioengine=io_uring",
                   "--ceiling=off", "--output-format=json", f"--size={size}"]
        options += ["--readonly", f"--runtime={seconds}", "--time_based"] if verb == "read" else ["--end_fsync=1"]
        done, _ = call([self.a.nvtier, "bench", *options], max(10, self.left()))
        try:
            side = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0][verb]
            return {"seconds": side["runtime"] / 1000, "bytes": side["io_bytes"], "gb": side["bw_bytes"] / 1e9}
        except (ValueError, KeyError, IndexError):
            return {"error": last_words(done)}

    def alternate(self, key, files, entries, rounds, cold):
        table = {name: [] for name in entries}
        for i in range(rounds):
            # Each goes first in turn: who does finds the machine as the others' last left it.
            order = list(entries.items())
            for name, one in order[i % len(order):] + order[: i % len(order)]:
                if self.left() < 20:
                    self.results["failures"].append(f"{key}: out of time in round {i + 1}, before {name}")
                    return table
                if table[name] and all("error" in r for r in table[name]):
                    continue  # It failed once: no time for it.
                if cold:
                    self.drop(files)
                try:
                    table[name].append(one())
                except Exception as error:
                    table[name].append({"error": f"{type(error).__name__}: {error}"[:300]})
        return table

    def loaders(self, files):
        return {"nvtier": lambda: self.nvtier(files), **{p: (lambda p=p: self.peer(p, files)) for p in self.a.peers}}

    def step(self, name, work):
        # Bytes are always compared, and the drive has a while to forget that it was written to.
        if self.a.steps and name not in self.a.steps and name != "check":
            return
        if self.left() < 25:
            self.results["failures"].append(f"{name}: left out, no time")
            return
        start = time.monotonic()
        try:
            self.results["steps"][name] = work()
        except Exception:
            self.results["failures"].append(f"{name}: {traceback.format_exc(limit=3)}")
        print(f"{name}: {time.monotonic() - start:.1f} s, {self.left():.0f} s left", flush=True)
        self.write()

    def write(self):
        with open(os.path.join(self.a.out, "results.json"), "w") as f:
            json.dump(self.results, f, indent=1)
        with open(os.path.join(self.a.out, "report.md"), "w") as f:
            f.write(report(self.results))

    def all(self):
        a = self.a
        disk, shm = os.path.join(a.disk, "m"), os.path.join(a.shm, "m")
        small = os.path.join(a.disk, "small")
        files = lambda folder: sorted(glob.glob(folder + "/*.safetensors"))
        self.results["machine"] = machine(a.disk)
        done, _ = call([sys.executable, __file__, "--make", disk, str(int(a.gb * 1e9))], 200)
        if done.returncode != 0 or not files(disk):
            sys.exit(f"the checkpoint could not be made: {last_words(done)}\n{done.stderr[-2000:]}")
        print(f"checkpoint: {time.monotonic() - START:.1f} s", flush=True)
        on_disk = files(disk)
        size = os.path.getsize(on_disk[0])
        # Every byte compared on the device, before any figure.
        self.step("check", lambda: self.nvtier([disk], "--check", "--ceilings"))
        self.step("cold", lambda: self.alternate("cold", on_disk, {
            **self.loaders(on_disk), "drive (nvtier bench read)": lambda: self.bench(on_disk[0], "read", size)}, a.rounds, True))

        def warm():
            read_whole(on_disk)
            return self.alternate("warm", on_disk, self.loaders(on_disk), max(2, a.rounds), False)

        self.step("warm", warm)

        def tmpfs():
            os.makedirs(shm)
            for f in on_disk:
                subprocess.run(["cp", f, shm], check=True)
            # Read once before: the first reading of new pages of tmpfs moves each on the kernel's lists, which takes half of the time again.
            read_whole(files(shm))
            return self.alternate("tmpfs", [], self.loaders(files(shm)), max(2, a.rounds), False)

        self.step("tmpfs", tmpfs)
        self.step("tmpfs_settings", lambda: self.alternate("tmpfs_settings", [], {
            f"threads {t}, chunk {c}": (lambda t=t, c=c: self.nvtier(files(shm), "--threads", str(t), "--chunk", c))
            for t in (4, 8, 12, 16) for c in ("1MiB", "2MiB", "4MiB")} | {
            "direct, io_uring": lambda: self.nvtier(files(shm), "--cache", "direct"),
            "mapped": lambda: self.nvtier(files(shm), "--cached", "map")}, 1, False))
        self.step("cold_settings", lambda: self.alternate("cold_settings", on_disk, {
            f"depth {d}, chunk {c}": (lambda d=d, c=c: self.nvtier(on_disk, "--depth", str(d), "--chunk", c, "--ring", "256MiB"))
            for d in (8, 32, 128) for c in ("512KiB", "2MiB", "8MiB")}, 1, True))

        def save():
            out = os.path.join(a.disk, "saved.safetensors")
            raw = os.path.join(a.disk, "raw")
            source = files(shm)[:1] or on_disk[:1]

            def nvtier():
                r = self.nvtier(source, "--save", out)
                if "report" in r:
                    s = r["report"]["save"]
                    r = {"seconds": s["seconds"], "bytes": s["bytes"], "report": r["report"]}
                return r

            # Both write a file that was not there: blocks that are allocated anew cost some drives twice the time of others.
            def fresh(path, one):
                if os.path.exists(path):
                    os.remove(path)
                os.sync()
                return one()

            table = self.alternate("save", [], {
                "nvtier --save": lambda: fresh(out, nvtier),
                "drive (nvtier bench write)": lambda: fresh(raw, lambda: self.bench(raw, "write", size)),
                "nvtier --save over a file": nvtier}, 2, False)
            same = subprocess.run(["cmp", source[0], out], capture_output=True, text=True)
            table["saved file equals the reference library's"] = same.returncode == 0 or (same.stdout + same.stderr).strip()
            for f in (out, raw):
                if os.path.exists(f):
                    os.remove(f)
            return table

        self.step("save", save)

        def gpu_check():
            """Kernels, windows, RAM tier and mapped files; see gpudirect/examples/gpu_check."""
            command = [a.gpu_check, "--device", "cuda:0", "--gb", str(min(a.gb, 2)), "--shm", a.shm, "--folder", a.disk,
                       "--out", os.path.join(a.out, "gpu_check.json")]
            done, _ = call(command, max(10, self.left()))
            if done.returncode != 0:
                self.results["failures"].append(f"gpu_check: exit {done.returncode}: {last_words(done)}")
            return {"lines": done.stdout.strip().splitlines()[:-1]}

        if os.path.exists(a.gpu_check):
            self.step("gpu_check", gpu_check)
        elif not a.steps or "gpu_check" in a.steps:
            self.results["failures"].append(f"gpu_check: left out, {a.gpu_check} is not there")

        def tensors():
            done, _ = call([sys.executable, __file__, "--make", small, "0", "100000"], 90)
            if done.returncode != 0:
                raise RuntimeError(last_words(done))
            return self.alternate("small", files(small), self.loaders(files(small)), 1, True)

        self.step("small", tensors)
        self.results["caches"] = self.dropped
        self.write()


def machine(disk):
    def out(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError:
            return ""

    return {
        "gpu": out("nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current", "--format=csv,noheader"),
        "kernel": out("uname", "-r"), "cpus": os.cpu_count(), "disk": out("df", "-T", disk).splitlines()[-1:],
        "python": out(sys.executable, "-c", "import torch, safetensors; print(torch.__version__, safetensors.__version__)"),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    }


def report(results):
    lines = [f"machine: {json.dumps(results.get('machine'))}", ""]
    for step, table in results["steps"].items():
        lines += [f"## {step}", ""]
        if step == "gpu_check":
            lines += ["```", *table["lines"], "```", ""]
            continue
        if step == "check":
            lines += ["```", json.dumps(table, indent=1)[:4000], "```", ""]
            continue
        checks = {r["check"] for rs in table.values() if isinstance(rs, list) for r in rs if "check" in r}
        lines += ["| what | GB/s median | min | max | CPU s/GB | runs |", "|---|---|---|---|---|---|"]
        for name, runs in table.items():
            if not isinstance(runs, list):
                lines.append(f"| {name} | {runs} | | | | |")
                continue
            good = [r for r in runs if "error" not in r]
            if not good:
                lines.append(f"| {name} | failed: {runs[0]['error'] if runs else 'not run'} | | | | 0 |")
                continue
            rates = [r.get("gb") or r["bytes"] / r["seconds"] / 1e9 for r in good]
            cpu = [r["cpu_seconds"] / r["bytes"] * 1e9 for r in good if "cpu_seconds" in r]
            cpu = f"{statistics.median(cpu):.3f}" if cpu else ""
            lines.append(f"| {name} | {statistics.median(rates):.2f} | {min(rates):.2f} | {max(rates):.2f} | {cpu} | {len(good)} |")
        lines += ["", f"byte sums of the peers agree: {len(checks) <= 1}", ""]
    lines += [f"- {failure}" for failure in results["failures"]]
    lines.append("")
    lines.append("CPU seconds are of the load alone, all threads of the process; nvtier's seconds include pinning its ring.")
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:], "cuda:0")
    if sys.argv[1:2] == ["--make"]:
        return make(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    p = argparse.ArgumentParser()
    for name, kind, default in [("nvtier", str, None), ("disk", str, None), ("shm", str, None), ("out", str, None), ("gb", float, 8), ("rounds", int, 3), ("limit", float, 450)]:
        p.add_argument(f"--{name}", type=kind, default=default, required=default is None)
    p.add_argument("--gpu-check", default="")
    p.add_argument("--steps", nargs="*")
    p.add_argument("--peers", nargs="*", default=PEERS)
    run = Run(p.parse_args())
    run.all()
    print(report(run.results))


if __name__ == "__main__":
    main()
