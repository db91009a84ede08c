#!/usr/bin/env python3
"""The Python package on a machine with a GPU: run by hand, one line a check, and a JSON summary as the last line.

    pip install --no-deps nvtier-*.whl
    python3 bindings/python/tests/gpu_check.py [--device cuda:0] [--dir FOLDER] [--out FILE] [CHECK...]

Needs torch and safetensors; transformers is used where it is. Every check runs in a process of its own, so that one which crashes
or hangs takes nothing along. `--device cpu` runs what makes sense there, to work on this file. No name of a test: pytest leaves it.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

MIB = 1 << 20
LIMIT_S = 150
SEED = 20261125
CHECKS = {}


class Skip(Exception):
    """It cannot run here; the text says why."""


def check(function):
    CHECKS[function.__name__] = function
    return function


class Context:
    """Where things are, and what every check needs."""

    def __init__(self, device, folder):
        self.device = device
        self.folder = pathlib.Path(folder)
        self.cuda = device.startswith("cuda")
        self.index = int(device.split(":")[1]) if ":" in device else 0

    def need_cuda(self):
        if not self.cuda:
            raise Skip("needs a GPU")

    def free(self):
        import torch

        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(self.index)[0]

    def big(self):
        """A bf16 file of 320 MiB in 41 tensors, made once."""
        import torch
        from safetensors.torch import save_file

        file = self.folder / "big.safetensors"
        if not file.exists():
            generator = torch.Generator().manual_seed(SEED)
            tensors = {
                f"layer.{i:02}.w": torch.randint(0, 2**15, (4 * MIB,), dtype=torch.int16, generator=generator).view(torch.bfloat16)
                for i in range(40)
            }
            tensors["odd"] = torch.randint(0, 255, (1000003,), dtype=torch.uint8, generator=generator)
            save_file(tensors, self.folder / "making")
            os.rename(self.folder / "making", file)
        return file

    def types(self):
        """A file with every type that torch has, made once."""
        import torch
        from safetensors.torch import save_file

        file = self.folder / "types.safetensors"
        rng = random.Random(SEED)
        tensors = {}
        names = (
            "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn "
            "float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
        )
        for name in names.split():
            dtype = getattr(torch, name, None)
            if dtype is None:
                continue
            size = torch.empty(0, dtype=dtype).element_size()
            raw = bytearray(rng.randbytes(12 * size)) if name != "bool" else bytearray([0, 1] * 6)
            tensors[name] = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(3, 4)
            tensors[f"{name}.none"] = torch.empty(0, 4, dtype=dtype)
            if "float4" not in name:
                tensors[f"{name}.scalar"] = tensors[name].reshape(-1)[0].clone()
        save_file(tensors, file)
        return file


def equal(ours, theirs, device):
    """Every byte, type, shape and place."""
    import torch

    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    for name, expected in theirs.items():
        value = ours[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        assert value.device == torch.device(device), (name, value.device)
        if value.numel():
            ours_there, theirs_there = (t if t.dim() else t.reshape(1) for t in (value, expected))
            assert torch.equal(move(ours_there, "cpu").view(torch.uint8), theirs_there.view(torch.uint8)), name


def move(value, device):
    """To a device by its bytes: torch copies no type that it has no kernel for."""
    import torch

    if value.dim() == 0 or not value.numel():
        return value.to(device)
    return value.view(torch.uint8).to(device).view(value.dtype)


@check
def versions(context):
    """What is here; the device as nvtier sees it."""
    import safetensors
    import torch

    import nvtier

    told = {"nvtier": nvtier.__version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    told["python"] = sys.version.split()[0]
    info = nvtier.device_info(context.device)
    if context.cuda:
        assert info["id"].startswith("cuda") and info["memory_bytes"] > MIB
    return {**told, "device": info["name"], "driver": info["driver"]}


@check
def every_type(context):
    """load_file of every type, empty and 0-d tensors: bytes as the reference library's."""
    from safetensors.torch import load_file

    import nvtier

    file = context.types()
    ours = nvtier.torch.load_file(file, device=context.device)
    equal(ours, load_file(file), context.device)
    with nvtier.torch.safe_open(file, device=context.device) as f:
        equal({name: f.get_tensor(name) for name in f.keys()}, load_file(file), context.device)
    return {"tensors": len(ours)}


@check
def big_file(context):
    """load_file of 320 MiB: bytes as the reference library's, and the report."""
    from safetensors.torch import load_file

    import nvtier

    file = context.big()
    theirs = load_file(file)
    for cache in ("auto", "direct", "buffered"):
        try:
            equal(nvtier.torch.load_file(file, device=context.device, cache=cache), theirs, context.device)
        except nvtier.NotSupported as error:
            print("   ", cache, error)
    if context.cuda:
        equal(nvtier.torch.load_file(file, device=context.index), theirs, context.device)
    loaded = nvtier.load(file, device=context.device)
    report = loaded.report
    assert report["bytes"] == sum(t.numel() * t.element_size() for t in theirs.values())
    assert report["device_extra_bytes"] <= 64 * MIB
    return {key: report[key] for key in ("path", "bound_by", "gb_per_second", "bytes", "backend", "notes")}


@check
def filters_and_shards(context):
    """Parts of a file by name and by rank."""
    import torch
    from safetensors.torch import load_file, save_file

    import nvtier

    file = context.folder / "shards.safetensors"
    value = torch.arange(512 * 768, dtype=torch.int32).reshape(512, 768)
    save_file({"q.weight": value, "o.weight": value.clone(), "norm": value.clone()}, file)
    equal(nvtier.torch.load_file(file, context.device, filters="n*"), {"norm": load_file(file)["norm"]}, context.device)
    for rank in range(4):
        part = nvtier.torch.load_file(file, context.device, shard=(rank, 4, {"q.*": 0, "o.*": 1}))
        expected = {"q.weight": value.chunk(4, 0)[rank], "o.weight": value.chunk(4, 1)[rank], "norm": value}
        equal(part, {name: t.contiguous() for name, t in expected.items()}, context.device)


@check
def safe_open_and_slices(context):
    """safe_open on the device: single tensors, slices, all at once."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    import nvtier

    file = context.big()
    theirs = load_file(file)
    with nvtier.torch.safe_open(file, framework="pt", device=context.device) as f:
        equal({name: f.get_tensor(name) for name in f.keys()}, theirs, context.device)
        loads, waiting = f._file.ahead()
        assert waiting == 0 and loads < 20, (loads, waiting)
        equal(f.get_tensors(), theirs, context.device)
        part = f.get_slice("odd")
        assert torch.equal(part[5:5000:7].cpu(), theirs["odd"][5:5000:7])
        with safe_open(file, "pt") as other:
            assert f.keys() == other.keys() and part.get_shape() == other.get_slice("odd").get_shape()
    return {"loads": loads}


@check
def views_of_other_libraries(context):
    """DLPack and the array interface: the same memory, no copy."""
    import torch

    import nvtier

    loaded = nvtier.load(context.big(), device=context.device, filters="odd")
    tensor = loaded["odd"]
    view = torch.from_dlpack(tensor)
    assert view.data_ptr() == tensor.data_ptr and view.device == torch.device(context.device)
    if context.cuda:
        other = torch.as_tensor(tensor, device=context.device)
        assert other.data_ptr() == tensor.data_ptr and torch.equal(view, other)
        try:
            import cupy
        except ImportError:
            return {"cupy": "not here"}
        array = cupy.from_dlpack(tensor)
        assert array.data.ptr == tensor.data_ptr and int(array[:100].sum()) == int(view[:100].sum())
        return {"cupy": cupy.__version__}
    return {}


class Interface:
    """An array of a library that speaks no DLPack, on a GPU: `__cuda_array_interface__`, with a stream that is at work on it."""

    def __init__(self, tensor, stream=None):
        self.tensor = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "version": 3, "stream": stream}


@check
def array_interfaces_in(context):
    """Saving from and loading into arrays that only say where they are: `__cuda_array_interface__`, whose stream is waited for."""
    import torch
    from safetensors.torch import load_file

    import nvtier

    file, ours = context.big(), context.folder / "interface.safetensors"
    theirs = load_file(file)
    out = {name: torch.zeros_like(tensor, device=context.device) for name, tensor in theirs.items()}
    loaded = nvtier.load(file, out=out)
    equal(out, theirs, context.device)
    assert loaded.report["device_bytes"] == 0 and loaded["odd"] is out["odd"]
    # Neighbours in one allocation stay as they are.
    room = torch.full((theirs["odd"].numel() + 200,), 7, dtype=torch.uint8, device=context.device)
    nvtier.load(file, out={"odd": room[100:-100]})
    assert torch.equal(room[100:-100].cpu(), theirs["odd"]) and bool((room[:100] == 7).all()) and bool((room[-100:] == 7).all())
    if not context.cuda:
        return {}
    value = torch.zeros(64 * MIB // 4, device=context.device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            value.add_(1)
    nvtier.save({"a": Interface(value, stream.cuda_stream)}, ours)
    assert bool((load_file(ours)["a"] == 200).all()), "the stream was not waited for"
    for number in (1, 2, None):
        nvtier.save({"a": Interface(value, number)}, ours)
        assert bool((load_file(ours)["a"] == 200).all())
    with torch.cuda.stream(stream):
        for _ in range(200):
            value.add_(1)
    target = Interface(value, stream.cuda_stream)
    saved = torch.arange(value.numel(), dtype=torch.float32)
    nvtier.torch.save_file({"a": saved}, ours)
    nvtier.load(ours, out={"a": target})
    assert torch.equal(value.cpu(), saved)
    for bad in (0, 64):
        odd = Interface(value)
        odd.__cuda_array_interface__["data"] = (bad, False)
        try:
            nvtier.load(ours, out={"a": odd})
        except nvtier.Error as error:
            print("   ", error)
        else:
            raise AssertionError(f"loaded to {bad:#x}")
    ours.unlink()
    return {}


@check
def ram_tier(context):
    """What the RAM tier of a pool of this process has goes to the device from there, and the tier's memory is given back with the pool."""
    from safetensors.torch import load_file

    import nvtier

    file, path = context.big(), context.folder / "raw-pool"
    nvtier.format(path, raw=True, size=700 * MIB)
    told = {}
    with nvtier.Pool(path, ram=512 * MIB) as pool:
        pool.import_file(file, "m.safetensors")
        cold = nvtier.torch.load_file("m.safetensors", context.device, pool=pool)
        assert pool.warm("m.safetensors") >= 320 * MIB
        for round in range(3):
            loaded = pool.load("m.safetensors", device=context.device)
            assert loaded.report["tier_bytes"] == loaded.report["bytes"] and loaded.report["reads"] == 0
            told[f"gb_per_second {round}"] = loaded.report["gb_per_second"]
            del loaded
        equal(nvtier.torch.load_file("m.safetensors", context.device, pool=pool), load_file(file), context.device)
        equal(cold, load_file(file), context.device)
        with nvtier.torch.safe_open("m.safetensors", framework="pt", device=context.device, pool=pool) as f:
            equal({name: f.get_tensor(name) for name in f.keys()}, load_file(file), context.device)
    # Another pool, whose tier may lie where this one's did.
    with nvtier.Pool(path, ram=512 * MIB) as pool:
        pool.warm("m.safetensors")
        assert pool.load("m.safetensors", device=context.device).report["tier_bytes"] >= 320 * MIB
    path.unlink()
    return told


@check
def memory_comes_and_goes(context):
    """VRAM: little more than the tensors, and all of it back with the last view."""
    context.need_cuda()
    import gc

    import torch

    import nvtier

    file = context.big()
    # What is used below is used once before: torch keeps its kernels, about 100 MB of them, from their first use on.
    nvtier.torch.load_file(file, context.device)["odd"][:10].sum().item()
    gc.collect()
    before = context.free()
    tensors = nvtier.torch.load_file(file, context.device)
    taken = before - context.free()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert taken <= size + 66 * MIB, (taken, size)
    one = tensors["odd"][:10]
    del tensors
    gc.collect()
    assert before - context.free() > size * 0.9 and one.sum() >= 0
    del one
    gc.collect()
    torch.cuda.synchronize()
    assert before - context.free() < 8 * MIB, before - context.free()
    return {"extra_bytes": taken - size}


@check
def save_from_the_device(context):
    """save_file of the device's tensors: the bytes that the reference library writes, also of work that is still queued."""
    import torch
    from safetensors.torch import load_file, save_file

    import nvtier

    ours, theirs = context.folder / "ours.safetensors", context.folder / "theirs.safetensors"
    for file in (context.types(), context.big()):
        tensors = {name: move(t, context.device) for name, t in load_file(file).items()}
        report = nvtier.torch.save_file(tensors, ours, {"format": "pt"})
        save_file(load_file(file), theirs, {"format": "pt"})
        assert ours.read_bytes() == theirs.read_bytes(), file
    told = {key: report[key] for key in ("gb_per_second", "direct", "backend", "bytes")}
    if context.cuda:
        stream = torch.cuda.Stream()
        value = torch.zeros(64 * MIB // 4, device=context.device)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(200):
                value.add_(1)
        nvtier.torch.save_file({"a": value}, ours)
        assert bool((load_file(ours)["a"] == 200).all())
    # Through DLPack, from nvtier's own tensors.
    loaded = nvtier.load(context.types(), device=context.device)
    nvtier.save(loaded, ours)
    equal(load_file(ours), load_file(context.types()), "cpu")
    # One on the device, one on the host.
    nvtier.torch.save_file({"a": torch.ones(3, device=context.device), "b": torch.zeros(2)}, ours)
    assert load_file(ours)["a"].tolist() == [1, 1, 1]
    for path in (ours, theirs):
        path.unlink()
    return told


@check
def out_of_memory(context):
    """A load that does not fit is refused, leaves nothing, and a smaller one works; so does safe_open, one by one."""
    context.need_cuda()
    import gc

    import torch
    from safetensors.torch import load_file

    import nvtier

    file = context.big()
    nvtier.torch.load_file(file, context.device, filters="odd")
    nvtier.torch.load_file(file, context.device)
    gc.collect()
    torch.cuda.empty_cache()
    filler = torch.empty(context.free() - 200 * MIB, dtype=torch.uint8, device=context.device)
    before = context.free()
    for _ in range(3):
        try:
            nvtier.torch.load_file(file, context.device)
        except nvtier.OutOfDeviceMemory as error:
            assert isinstance(error, MemoryError)
            text = str(error)
        else:
            raise AssertionError(f"320 MiB fitted into {before >> 20} MiB")
    gc.collect()
    assert before - context.free() < 8 * MIB, "something was kept"
    small = nvtier.torch.load_file(file, context.device, filters=["layer.0?.w", "odd"])
    theirs = load_file(file)
    equal(small, {name: theirs[name] for name in small}, context.device)
    del small
    gc.collect()
    # In order it would load ahead; where that does not fit it loads what is asked for.
    with nvtier.torch.safe_open(file, device=context.device) as f:
        for name in f.offset_keys():
            assert torch.equal(f.get_tensor(name).cpu().view(torch.uint8), theirs[name].view(torch.uint8)), name
    del filler
    torch.cuda.empty_cache()
    equal(nvtier.torch.load_file(file, context.device), theirs, context.device)
    return {"error": text}


@check
def ctrl_c(context):
    """SIGINT while a load runs: KeyboardInterrupt, nothing kept, the next load works."""
    from safetensors.torch import load_file

    import nvtier

    file = context.big()
    caught = 0
    for attempt in range(30):
        fired, last = [], [0, 1]

        def progress(done, total):
            last[:] = done, total
            if not fired:
                fired.append(threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)))
                fired[0].start()
                fired[0].join()

        try:
            nvtier.torch.load_file(file, context.device, progress=progress)
        except KeyboardInterrupt:
            caught += 1
            if last[0] < last[1]:
                break
    else:
        raise AssertionError(f"caught {caught} times, never in the middle")
    equal(nvtier.torch.load_file(file, context.device), load_file(file), context.device)


@check
def deadline_and_changes(context):
    """A deadline that passes, a file that is replaced meanwhile: typed errors."""
    import shutil

    import nvtier

    file = context.folder / "changes.safetensors"
    shutil.copy(context.big(), file)
    try:
        nvtier.load(file, device=context.device, deadline=0)
    except nvtier.Timeout:
        pass
    else:
        raise AssertionError("no Timeout")
    acts = [lambda: os.truncate(file, 100 * MIB)]

    def progress(done, total):
        while acts:
            acts.pop()()

    try:
        nvtier.load(file, device=context.device, progress=progress)
    except nvtier.Changed as error:
        text = str(error)
    else:
        raise AssertionError("no Changed")
    file.unlink()
    return {"error": text}


@check
def fork(context):
    """A child of a process that used the GPU: typed errors, no hang, and the parent goes on."""
    import nvtier

    file = context.types()
    opened = nvtier.torch.safe_open(file, device=context.device)
    tensor = opened.get_tensor("int32")
    before = tensor.tolist()
    loaded = nvtier.load(file, device=context.device)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        code = 3
        try:
            try:
                opened.get_tensor("int8")
            except nvtier.Forked:
                code = 0
            if context.cuda:
                try:
                    nvtier.load(file, device=context.device)
                    code = 4
                except nvtier.Forked as error:
                    print("    in the child:", type(error).__name__, error, flush=True)
            else:
                nvtier.load(file, device=context.device)
            del loaded, tensor, opened
        except BaseException:
            traceback.print_exc()
            code = 5
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
    assert tensor.tolist() == before and opened.get_tensor("int8").shape == (3, 4)
    assert len(nvtier.load(file, device=context.device)) == len(loaded)


@check
def threads(context):
    """Four threads that load at once."""
    from concurrent.futures import ThreadPoolExecutor

    from safetensors.torch import load_file

    import nvtier

    file = context.big()
    theirs = load_file(file)
    with ThreadPoolExecutor(4) as pool:
        for loaded in pool.map(lambda _: nvtier.torch.load_file(file, context.device), range(4)):
            equal(loaded, theirs, context.device)
    with nvtier.torch.safe_open(file, device=context.device) as f, ThreadPoolExecutor(4) as pool:
        slices = {name: f.get_slice(name) for name in f.keys()}
        equal(dict(pool.map(lambda name: (name, slices[name][...]), slices)), theirs, context.device)


@check
def two_processes(context):
    """Two processes that load onto one device at once."""
    context.big()
    command = [sys.executable, __file__, "--one", "big_file", "--device", context.device, "--dir", str(context.folder)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    try:
        for child in children:
            out, _ = child.communicate(timeout=LIMIT_S - 20)
            assert child.returncode == 0, out
    finally:
        for child in children:
            child.kill()


@check
def pinned(context):
    """pin_memory=True gives page-locked tensors."""
    context.need_cuda()
    from safetensors.torch import load_file

    import nvtier

    tensors = nvtier.torch.load_file(context.big(), pin_memory=True)
    assert all(tensor.is_pinned() for tensor in tensors.values() if tensor.numel())
    equal(tensors, load_file(context.big()), "cpu")


@check
def current_device(context):
    """torch's current device is what it was after a load onto another one."""
    context.need_cuda()
    import torch

    import nvtier

    if torch.cuda.device_count() < 2:
        raise Skip("there is one GPU")
    torch.cuda.set_device(1)
    torch.zeros(1, device="cuda")
    loaded = nvtier.torch.load_file(context.types(), device="cuda:0")
    assert torch.cuda.current_device() == 1 and torch.zeros(1, device="cuda").device.index == 1
    assert loaded["int8"].device.index == 0
    assert nvtier.torch.load_file(context.types(), device="cuda")["int8"].device.index == 1
    del loaded
    nvtier.trim()
    assert torch.cuda.current_device() == 1


@check
def pool(context):
    """From a pool by name: checked, and with a handle on the region."""
    import shutil

    from safetensors.torch import load_file

    import nvtier

    path = context.folder / "pool"
    nvtier.format(path)
    try:
        with nvtier.Pool(path) as pool:
            pool.import_file(context.big(), "m/big.safetensors")
            loaded = nvtier.torch.load_file("m", context.device, pool=pool)
            equal(loaded, load_file(context.big()), context.device)
            with pool.region("m/big.safetensors") as region:
                report = region.load(device=context.device).report
                assert report["verified_sources"] == 1
        equal(nvtier.torch.load_file("m", context.device, pool=path), load_file(context.big()), context.device)
    finally:
        shutil.rmtree(path)
    return {key: report[key] for key in ("path", "bound_by", "gb_per_second", "verify_seconds")}


@check
def transformers_through_the_patch(context):
    """from_pretrained of a random Llama: nvtier serves it, and the logits are the same."""
    try:
        import transformers
    except ImportError as error:
        raise Skip(f"no transformers: {error}") from None
    import torch

    import nvtier.patch as patch

    folder = context.folder / "llama"
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    patch.undo()
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2MB")
    ids = torch.arange(32).reshape(1, 32)

    def logits():
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=context.device)
        except (ImportError, ValueError) as error:  # no accelerate
            if "accelerate" not in str(error):
                raise
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(context.device)
        assert next(loaded.parameters()).device == torch.device(context.device)
        with torch.no_grad():
            return loaded(ids.to(context.device)).logits.cpu()

    theirs = logits()
    before = patch.calls()
    patch.apply()
    ours = logits()
    patch.undo()
    served = {key: value - before[key] for key, value in patch.calls().items()}
    assert torch.equal(ours, theirs)
    assert served["safe_open"] >= 1 and served["tensors"] >= 30 and served["left"] == 0, served
    return {"transformers": transformers.__version__, "served": served}


@check
def vllm_plugin(context):
    """The loader plugin of vLLM, where vLLM is: it registers, and loads the random Llama's weights into a model of its."""
    try:
        import vllm
    except Exception as error:
        raise Skip(f"no vllm: {error!r}") from None
    import nvtier.vllm as plugin

    plugin.register()
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    loader = get_model_loader(LoadConfig(load_format="nvtier"))
    assert type(loader).__module__.startswith("nvtier")
    return {"vllm": vllm.__version__}


def one(name, context):
    """Runs a check here and says how it went, as JSON in the last line."""
    try:
        result, status = CHECKS[name](context) or {}, "passed"
    except Skip as skip:
        result, status = {"why": str(skip)}, "skipped"
    except BaseException:
        result, status = {"trace": traceback.format_exc()}, "failed"
    print(json.dumps({"status": status, "result": result}, default=str), flush=True)
    return status != "failed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dir", help="a folder on the drive (default: a new one here)")
    parser.add_argument("--out", help="the summary as a file, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.exit(not one(arguments.one, Context(arguments.device, arguments.dir)))
    unknown = set(arguments.checks) - set(CHECKS)
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    summary = {}
    with tempfile.TemporaryDirectory(prefix=".nvtier-check-", dir=arguments.dir or os.getcwd()) as folder:
        for name in arguments.checks or CHECKS:
            started = time.monotonic()
            command = [sys.executable, os.path.abspath(__file__), "--one", name, "--device", arguments.device, "--dir", folder]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                )  # fmt: skip
                lines = done.stdout.splitlines()
                try:
                    told = json.loads(lines[-1])
                except (IndexError, ValueError):
                    told = {"status": "failed", "result": {"trace": f"ended with {done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"}}
                if told["status"] == "passed" and done.returncode != 0:
                    told = {"status": "failed", "result": {"trace": f"passed, and then ended with {done.returncode}\n{done.stderr[-2000:]}"}}
                for line in lines[:-1]:
                    print(line)
            except subprocess.TimeoutExpired as error:
                told = {"status": "failed", "result": {"trace": f"it hangs: no end after {LIMIT_S} s\n{error.stdout!r}\n{error.stderr!r}"}}
            told["seconds"] = round(time.monotonic() - started, 1)
            summary[name] = told
            words = {key: value for key, value in told["result"].items() if key != "trace"}
            print(f"{told['status']:8}{name:32}{told['seconds']:6} s  {words or ''}", flush=True)
            if "trace" in told["result"]:
                print(told["result"]["trace"], flush=True)
    counts = {status: sum(t["status"] == status for t in summary.values()) for status in ("passed", "failed", "skipped")}
    text = json.dumps({"counts": counts, "device": arguments.device, "checks": summary}, default=str)
    if arguments.out:
        pathlib.Path(arguments.out).write_text(text + "\n")
    print(text)
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
