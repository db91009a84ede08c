"""nvtier.load: what is loaded, what is refused, and who gives what back when."""

import gc
import os
import random
import sys

import pytest
from common import MIB, gguf, python, resident, safetensors

import nvtier

numpy = pytest.importorskip("numpy")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pool"
    nvtier.format(path)
    return path


def array(tensor):
    """A tensor's bytes, as numpy sees them."""
    return numpy.asarray(tensor.as_bytes()).tobytes()


def write(path, sizes, seed=0):
    """A file of U8 tensors; returns {name: bytes}."""
    rng = random.Random(seed)
    tensors = {name: rng.randbytes(size) for name, size in sizes.items()}
    path.write_bytes(safetensors({name: ("U8", [len(raw)], raw) for name, raw in tensors.items()}))
    return tensors


def test_importing_it_imports_no_framework():
    code = "import nvtier, sys; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), sys.modules.keys()"
    python(code)


def test_a_file(tmp_path):
    values = numpy.arange(24, dtype="<f4").reshape(2, 3, 4)
    file = tmp_path / "a.safetensors"
    file.write_bytes(
        safetensors({
            "w": ("F32", [2, 3, 4], values.tobytes()),
            "scalar": ("F64", [], numpy.float64(2.5).tobytes()),
            "none": ("I16", [0, 3], b""),
            "flags": ("BOOL", [3], b"\1\0\1"),
            "half": ("BF16", [2], b"\x80\x3f\x00\x40"),
            "eight": ("F8_E4M3", [2], b"\x38\x40"),
            "four": ("F4", [2, 4], b"\x12\x34\x56\x78"),
        })
    )
    loaded = nvtier.load(file)
    assert [name for name in loaded if name != "none"] == ["w", "scalar", "flags", "half", "eight", "four"]
    assert len(loaded) == 7
    assert "w" in loaded and "x" not in loaded
    with pytest.raises(nvtier.NoTensor):
        loaded["x"]
    w = loaded["w"]
    assert (w.name, w.dtype, w.shape, w.nbytes, w.device) == ("w", "F32", (2, 3, 4), 96, "cpu")
    assert w.data_ptr % 16 == 0 and w.__dlpack_device__() == (1, 0)
    assert (numpy.asarray(w) == values).all() and numpy.asarray(w).dtype == values.dtype
    assert (numpy.from_dlpack(w) == values).all()
    assert numpy.asarray(loaded["scalar"]) == 2.5 and numpy.from_dlpack(loaded["scalar"]) == 2.5
    assert numpy.asarray(loaded["flags"]).tolist() == [True, False, True]
    assert numpy.asarray(loaded["none"]).shape == (0, 3)
    assert numpy.asarray(loaded["half"]).dtype == numpy.dtype("V2")
    assert array(loaded["eight"]) == b"\x38\x40"
    assert loaded["four"].as_bytes(rows=True).shape == (2, 2) and numpy.asarray(loaded["four"]).shape == (2, 2)
    assert not hasattr(w, "__cuda_array_interface__")
    report = loaded.report
    assert report["bytes"] == sum(t.nbytes for t in loaded.values()) and report["tensors"] == 7
    assert report["device"]["id"] == "cpu" and report["path"] and report["seconds"] >= 0
    assert "7 tensors" in repr(loaded) and "F32" in repr(w)


def test_an_empty_file(tmp_path):
    (tmp_path / "e.safetensors").write_bytes(safetensors({}))
    loaded = nvtier.load(tmp_path / "e.safetensors")
    assert len(loaded) == 0 and loaded.report["bytes"] == 0


def test_dlpack_capsules_of_both_kinds(tmp_path):
    tensors = write(tmp_path / "a.safetensors", {"a": 1000})
    tensor = nvtier.load(tmp_path / "a.safetensors")["a"]
    for version, name in ((None, "dltensor"), ((0, 8), "dltensor"), ((1, 0), "dltensor_versioned")):
        capsule = tensor.__dlpack__(max_version=version)
        assert f'"{name}"' in repr(capsule)
        del capsule  # not consumed: its own destructor has to give the memory back
    assert array(tensor) == tensors["a"]
    with pytest.raises(BufferError):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        tensor.__dlpack__(dl_device=(2, 0))


def test_filters_and_shards(tmp_path):
    values = numpy.arange(8 * 6, dtype="<i4").reshape(8, 6)
    raw = values.tobytes()
    names = ["q.weight", "o.weight", "norm.weight"]
    (tmp_path / "m.safetensors").write_bytes(safetensors({name: ("I32", [8, 6], raw) for name in names}))
    assert list(nvtier.load(tmp_path, filters="*.weight")) == names
    assert set(nvtier.load(tmp_path, filters=["q.*", "norm.?eight"])) == {"q.weight", "norm.weight"}
    with pytest.raises(nvtier.NotFound, match="fits"):
        nvtier.load(tmp_path, filters="nothing*")
    for rank in range(2):
        part = nvtier.load(tmp_path, shard=(rank, 2, {"q.*": 0, "o.*": 1}))
        assert (numpy.asarray(part["q.weight"]) == values[4 * rank : 4 * rank + 4]).all()
        assert (numpy.asarray(part["o.weight"]) == values[:, 3 * rank : 3 * rank + 3]).all()
        assert (numpy.asarray(part["norm.weight"]) == values).all()
    assert nvtier.load(tmp_path, shard=(0, 2, [("q.*", 1), ("*", 0)]))["q.weight"].shape == (8, 3)
    for shard in ((2, 2, {}), (0, 5, {"q.*": 0}), (0, 2, {"q.*": 7})):
        with pytest.raises(nvtier.InvalidArgument):
            nvtier.load(tmp_path, shard=shard)


def test_directories_and_indexes(tmp_path):
    one = write(tmp_path / "m-1.safetensors", {"a": 5000, "b": 3}, seed=1)
    two = write(tmp_path / "m-2.safetensors", {"c": 70_000}, seed=2)
    for paths in (tmp_path, str(tmp_path), [tmp_path / "m-1.safetensors", str(tmp_path / "m-2.safetensors")]):
        loaded = nvtier.load(paths)
        assert {name: array(tensor) for name, tensor in loaded.items()} == {**one, **two}
        assert loaded.report["sources"] == 2
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"c": "m-2.safetensors"}}')
    assert set(nvtier.load(index)) == set(nvtier.load(tmp_path)) == {"c"}
    index.write_text('{"weight_map": {"c": "gone.safetensors"}}')
    with pytest.raises(nvtier.NotFound, match="gone"):
        nvtier.load(tmp_path)
    for text in ("{}", "[", '{"weight_map": 3}', '{"weight_map": {"a": "../m-1.safetensors"}}', '{"weight_map": {"a": "/x"}}'):
        index.write_text(text)
        with pytest.raises(nvtier.Malformed):
            nvtier.load(index)
    index.unlink()
    with pytest.raises(nvtier.InvalidArgument, match="both"):
        nvtier.load([tmp_path / "m-1.safetensors", tmp_path / "m-1.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(nvtier.NotFound, match="no .safetensors"):
        nvtier.load(tmp_path / "empty")


def test_gguf(tmp_path):
    floats, blocks = numpy.arange(64, dtype="<f2"), random.Random(5).randbytes(3 * 2 * 18)
    (tmp_path / "m.gguf").write_bytes(gguf({"f": (1, [32, 2], floats.tobytes()), "q": (2, [64, 3], blocks)}))
    loaded = nvtier.load(tmp_path)
    assert (numpy.asarray(loaded["f"]) == floats.reshape(2, 32)).all() and loaded["f"].dtype == "F16"
    assert (loaded["q"].dtype, loaded["q"].shape, loaded["q"].nbytes) == ("Q4_0", (3, 64), len(blocks))
    assert numpy.from_dlpack(loaded["q"]).shape == (3, 36) and array(loaded["q"]) == blocks
    arrays = nvtier.numpy.load_file(tmp_path)
    assert arrays["q"].shape == (3, 36) and arrays["q"].tobytes() == blocks


def test_what_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    write(file, {"a": 10})
    with pytest.raises(FileNotFoundError) as caught:
        nvtier.load(tmp_path / "missing.safetensors")
    assert isinstance(caught.value, nvtier.NotFound)
    (tmp_path / "plain.bin").write_bytes(b"x")
    with pytest.raises(nvtier.Malformed, match="no tensor file"):
        nvtier.load(tmp_path / "plain.bin")
    (tmp_path / "liar.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(nvtier.Malformed, match="liar"):
        nvtier.load(tmp_path / "liar.safetensors")
    (tmp_path / "type.safetensors").write_bytes(safetensors({"a": ("F9", [1], b"x")}))
    with pytest.raises(nvtier.Malformed, match="F9"):
        nvtier.load(tmp_path / "type.safetensors")
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(nvtier.Malformed, match="short"):
        nvtier.load(tmp_path / "short.safetensors")
    for device in ("tpu", "cuda:x", "", True):
        with pytest.raises(nvtier.InvalidArgument, match="device"):
            nvtier.load(file, device=device)
    with pytest.raises(nvtier.InvalidArgument, match="cache"):
        nvtier.load(file, cache="often")
    with pytest.raises(nvtier.InvalidArgument, match="deadline"):
        nvtier.load(file, deadline=-1)
    with pytest.raises(TypeError):
        nvtier.load(file, progress=3)
    with pytest.raises(TypeError):
        nvtier.load(b"bytes")
    with pytest.raises(TypeError):
        nvtier.load(file, filter="typo")


def test_every_error_has_its_class():
    for name in (
        "NoDevice NoDriver OldDriver DeviceError OutOfMemory OutOfDeviceMemory OutOfHostMemory Changed Cancelled DriveError "
        "Forked Closed NoTensor SharedTensors"
    ).split():
        kind = getattr(nvtier, name)
        assert issubclass(kind, nvtier.Error) and str(kind("text")) == "text"
    assert issubclass(nvtier.OutOfMemory, MemoryError) and issubclass(nvtier.NoTensor, KeyError)
    assert issubclass(nvtier.NoDriver, nvtier.NoDevice) and issubclass(nvtier.OutOfDeviceMemory, nvtier.OutOfMemory)


def test_a_gpu_that_is_not_there(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 10})
    with pytest.raises((nvtier.NoDevice, nvtier.InvalidArgument)) as caught:
        nvtier.load(tmp_path / "a.safetensors", device="cuda:99")
    print(caught.value)


def test_no_cuda_driver(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 10})
    try:
        nvtier.device_info("cuda")
    except nvtier.NoDriver:
        pass
    except nvtier.NoDevice as error:
        pytest.skip(f"a CUDA driver is here: {error}")
    else:
        pytest.skip("a GPU is here")
    for device in ("cuda", "cuda:0", 0):
        with pytest.raises(nvtier.NoDriver, match="libcuda"):
            nvtier.load(tmp_path / "a.safetensors", device=device)


def test_out_of_memory_keeps_nothing_and_a_smaller_load_works(tmp_path):
    file = tmp_path / "huge.safetensors"
    huge = nvtier.device_info("cpu")["memory_bytes"] * 4
    head = safetensors({"small": ("U8", [3], b"abc")})
    text = f'{{"small":{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}},"huge":{{"dtype":"U8","shape":[{huge}],"data_offsets":[3,{3 + huge}]}}}}'
    head = len(text).to_bytes(8, "little") + text.encode() + b"abc"
    file.write_bytes(head)
    try:
        os.truncate(file, len(head) + huge)
    except OSError as error:
        pytest.skip(f"no sparse file of {huge} bytes here: {error}")
    before = resident()
    with pytest.raises(MemoryError) as caught:
        nvtier.load(file)
    nvtier.trim()
    assert isinstance(caught.value, nvtier.OutOfDeviceMemory)
    assert array(nvtier.load(file, filters="small")["small"]) == b"abc"
    assert resident() - before < 64 * MIB


def test_progress(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 40 * MIB, "b": 5})
    total = 40 * MIB + 5
    seen = []
    nvtier.load(tmp_path, progress=lambda done, all: seen.append((done, all)))
    assert seen[-1] == (total, total) and seen == sorted(seen) and all(t == total for _, t in seen)

    class Bar:
        total, n = None, 0

        def update(self, more):
            assert more > 0
            self.n += more

    bar = Bar()
    nvtier.load(tmp_path, progress=bar)
    assert (bar.total, bar.n) == (total, total)

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        nvtier.load(tmp_path, progress=stop)
    assert len(nvtier.load(tmp_path)) == 2


def test_progress_with_tqdm(tmp_path, capsys):
    tqdm = pytest.importorskip("tqdm")
    write(tmp_path / "a.safetensors", {"a": MIB})
    with tqdm.tqdm(total=0) as bar:
        nvtier.load(tmp_path, progress=bar)
        assert (bar.n, bar.total) == (MIB, MIB)
    nvtier.load(tmp_path, progress=True)
    assert "load" in capsys.readouterr().err


def test_a_deadline(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 8 * MIB})
    with pytest.raises(TimeoutError) as caught:
        nvtier.load(tmp_path, deadline=0)
    assert isinstance(caught.value, nvtier.Timeout) and "deadline" in str(caught.value)
    assert len(nvtier.load(tmp_path, deadline=1e6)) == 1


def test_files_that_change_while_they_are_loaded(tmp_path):
    file = tmp_path / "a.safetensors"

    def truncate():
        os.truncate(file, 1000)

    def replace():
        (tmp_path / "b").write_bytes(file.read_bytes())
        os.replace(tmp_path / "b", file)

    def append():
        with open(file, "ab") as f:
            f.write(b"more")

    for act, words in ((truncate, "truncated|shorter"), (replace, "replaced"), (append, "written"), (file.unlink, "removed")):
        write(file, {"a": 20 * MIB})
        before = resident()
        acts = [act]

        def progress(done, total):
            while acts:
                acts.pop()()

        with pytest.raises(nvtier.Changed, match=words):
            nvtier.load(file, progress=progress)
        gc.collect()
        assert resident() - before < 200 * MIB
    write(file, {"a": 20 * MIB})
    assert len(nvtier.load(file)) == 1


INTERRUPT = """
import nvtier, os, signal, sys, threading
inside, caught = 0, 0
for attempt in range(40):
    done_at = [None]
    # From another thread, as a terminal does it; after the first report, so that it comes while the load runs.
    fired = []
    def progress(done, total):
        if not fired:
            fired.append(threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)))
            fired[0].start()
            fired[0].join()
        done_at[0] = (done, total)
    try:
        nvtier.load(sys.argv[1], progress=progress)
    except KeyboardInterrupt:
        caught += 1
        if done_at[0] is None or done_at[0][0] < done_at[0][1]:
            break
print("caught", caught)
loaded = nvtier.load(sys.argv[1])
print("tensors", len(loaded))
"""


def test_ctrl_c(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 64 * MIB})
    out = python(INTERRUPT, tmp_path)
    assert "caught 1" in out and "tensors 1" in out


def test_ctrl_c_without_a_progress_function(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 64 * MIB})
    code = """
import nvtier, signal, sys
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    while True:
        nvtier.load(sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
print(len(nvtier.load(sys.argv[1])))
"""
    assert python(code, tmp_path).split() == ["interrupted", "1"]


def test_memory_goes_with_the_last_view(tmp_path):
    size = 96 * MIB
    tensors = write(tmp_path / "a.safetensors", {"a": size, "b": MIB})
    nvtier.load(tmp_path)  # takes what is kept for later loads
    gc.collect()
    before = resident()
    loaded = nvtier.load(tmp_path)
    view, other = numpy.from_dlpack(loaded["b"]), numpy.asarray(loaded["b"])
    del loaded
    gc.collect()
    assert resident() - before > size * 0.9  # one view keeps its whole load
    assert view.tobytes() == other.tobytes() == tensors["b"]
    del view
    gc.collect()
    assert other.tobytes() == tensors["b"] and resident() - before > size * 0.9
    del other
    gc.collect()
    assert resident() - before < size * 0.3


def test_many_loads_leak_nothing(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 24 * MIB, "b": 10})
    held = []
    for round in range(12):
        loaded = nvtier.load(tmp_path)
        numpy.from_dlpack(loaded["a"]).sum()
        loaded["b"].__dlpack__()
        held.append(resident())
    assert held[-1] - held[3] < 24 * MIB, held
    threads = os.listdir("/proc/self/task")
    files = os.listdir("/proc/self/fd")
    for round in range(5):
        nvtier.load(tmp_path)
    assert len(os.listdir("/proc/self/task")) <= len(threads)
    assert len(os.listdir("/proc/self/fd")) <= len(files)


def test_trim_gives_the_rings_back(tmp_path):
    write(tmp_path / "a.safetensors", {"a": 80 * MIB})
    nvtier.load(tmp_path)
    before = resident()
    nvtier.trim()
    assert resident() < before - 64 * MIB
    assert len(nvtier.load(tmp_path)) == 1


def test_from_a_pool(path, tmp_path):
    tensors = write(tmp_path / "a.safetensors", {"a": 3 * MIB + 7, "b": 100})
    with nvtier.Pool(path) as pool:
        pool.import_file(tmp_path / "a.safetensors", "d/a.safetensors")
        pool.write("d/model.safetensors.index.json", b'{"weight_map": {"a": "a.safetensors"}}')
        for names in ("d/a.safetensors", "/d/a.safetensors", ["d/a.safetensors"], "d", "d/model.safetensors.index.json"):
            loaded = pool.load(names)
            assert {name: array(tensor) for name, tensor in loaded.items()} == tensors
            assert loaded.report["verified_sources"] == 1
        assert pool.load("d", verify=False).report["verified_sources"] == 0
        assert array(nvtier.load("d/a.safetensors", pool=pool, filters="b")["b"]) == tensors["b"]
        with pytest.raises(nvtier.NotFound):
            pool.load("nothing")
        # Another process, through this one as the owner.
        code = """
import nvtier, sys, zlib
loaded = nvtier.load("d/a.safetensors", pool=sys.argv[1])
import numpy
print(zlib.crc32(numpy.asarray(loaded["a"]).tobytes()))
with nvtier.Pool(sys.argv[1]) as pool, pool.region("d/a.safetensors") as region:
    assert pool.is_remote and not region.is_leased
    print(zlib.crc32(numpy.asarray(region.load()["a"]).tobytes()))
"""
        import zlib

        assert python(code, path).split() == [str(zlib.crc32(tensors["a"]))] * 2
    loaded = nvtier.load("d/a.safetensors", pool=path)  # nobody owns it: opened for this load
    assert array(loaded["a"]) == tensors["a"]
    with pytest.raises(nvtier.Closed):
        pool.load("d/a.safetensors")


def test_a_damaged_region_is_corrupt(path):
    raw = random.Random(8).randbytes(MIB)
    with nvtier.Pool(path) as pool:
        pool.write("r.safetensors", safetensors({"a": ("U8", [MIB], raw)}))
    for directory, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(directory, name), "r+b") as f:
                at = f.read().find(raw[4096:8192])
                if at >= 0:
                    f.seek(at)
                    f.write(bytes([raw[4096] ^ 1]))
    with nvtier.Pool(path) as pool:
        with pytest.raises(nvtier.Corrupt, match="r.safetensors"):
            pool.load("r.safetensors")


def image(tmp_path, size):
    path = tmp_path / "image"
    nvtier.format(path, raw=True, size=size)
    return path


@pytest.mark.parametrize("kind", ["directory", "raw"])
def test_a_region_is_held_until_it_is_closed(path, tmp_path, kind):
    if kind == "raw":
        path = image(tmp_path, 128 * MIB)
    one, two = random.Random(1).randbytes(30 * MIB), random.Random(2).randbytes(30 * MIB)
    file = safetensors({"a": ("U8", [len(one)], one)})
    with nvtier.Pool(path) as pool:
        empty = pool.stat()["free_bytes"]
        pool.write("m.safetensors", file)
        region = pool.region("m.safetensors")
        assert (region.name, region.size, region.is_leased, region.closed) == ("m.safetensors", len(file), True, False)
        assert region.tensors()["a"].nbytes == len(one) and region.pool is pool
        loaded = region.load(filters="*")
        pool.write("m.safetensors", safetensors({"b": ("U8", [len(two)], two)}))
        assert region.read() == file and list(region.tensors()) == ["a"]
        with pytest.raises(nvtier.Changed, match="another generation"):
            region.load()
        pool.rm("m.safetensors")
        assert region.read(0, 100) == file[:100]
        with pytest.raises(nvtier.NotFound):
            region.load()
        pool.sync()
        if kind == "raw":
            assert empty - 40 * MIB < pool.stat()["free_bytes"] < empty - 20 * MIB  # the one that is held
        region.close()
        region.close()
        with pytest.raises(nvtier.Closed, match="m.safetensors"):
            region.read()
        if kind == "raw":
            # The loaded tensors hold no lease: all of the space is there again, and can be used.
            pool.sync()
            assert pool.stat()["free_bytes"] > empty - 4 * MIB
        for round in range(4):
            pool.write("n.safetensors", safetensors({"b": ("U8", [len(two)], two)}))
        assert array(loaded["a"]) == one
    with pytest.raises(nvtier.Closed):
        pool.region("n.safetensors")


def test_a_closed_pool_stays_open_for_its_regions(path):
    pool = nvtier.Pool(path)
    pool.write("m.bin", b"content")
    region = pool.region("m.bin")
    pool.close()
    assert region.read() == b"content"
    region.close()
    with nvtier.Pool(path) as again:
        assert not again.is_remote and again.read("m.bin") == b"content"


def test_two_processes_at_once(path, tmp_path):
    import subprocess
    import zlib

    tensors = write(tmp_path / "a.safetensors", {f"t{i}": 3 * MIB + i for i in range(8)})
    expected = zlib.crc32(b"".join(tensors.values()))
    with nvtier.Pool(path) as pool:
        pool.import_file(tmp_path / "a.safetensors", "a.safetensors")
        code = """
import nvtier, sys, zlib, numpy
print("ready", flush=True)
sys.stdin.readline()
for round in range(3):
    for loaded in (nvtier.load(sys.argv[1]), nvtier.load("a.safetensors", pool=sys.argv[2])):
        total = b"".join(numpy.asarray(tensor).tobytes() for tensor in loaded.values())
        assert zlib.crc32(total) == int(sys.argv[3])
"""
        arguments = [sys.executable, "-c", code, str(tmp_path / "a.safetensors"), str(path), str(expected)]
        children = [
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        try:
            for child in children:
                assert child.stdout.readline() == "ready\n"
            for child in children:
                child.stdin.write("go\n")
                child.stdin.flush()
            for child in children:
                assert child.wait(timeout=240) == 0
        finally:
            for child in children:
                child.kill()
                child.communicate()


def test_processes_that_open_a_pool_for_one_load_each(path):
    """Nobody owns it: one process becomes its owner, the others go through that one, and it may be gone before they are."""
    import subprocess

    raw = random.Random(9).randbytes(3 * MIB)
    with nvtier.Pool(path) as pool:
        pool.write("a.safetensors", safetensors({"a": ("U8", [len(raw)], raw), "b": ("U8", [len(raw)], raw)}))
    code = """
import nvtier, sys
for round in range(8):
    assert len(nvtier.load("a.safetensors", pool=sys.argv[1])) == 2
"""
    children = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    try:
        assert [child.wait(timeout=240) for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()


FORK = """
import nvtier, numpy, os, signal, sys
path, file = sys.argv[1:]
pool = nvtier.Pool(path)
pool.import_file(file, "a.safetensors")
region = pool.region("a.safetensors")
open_file = nvtier._nvtier.TensorFile([file])
loaded = nvtier.load(file)
expected = numpy.asarray(loaded["a"]).tobytes()
child = os.fork()
if child == 0:
    signal.alarm(120)
    code = 1
    try:
        for use in (lambda: pool.ls(), lambda: pool.load("a.safetensors"), lambda: region.read(), lambda: region.load(),
                    lambda: pool.region("a.safetensors"), lambda: open_file.keys(), lambda: open_file.get("a", "cpu")):
            try:
                use()
            except nvtier.Forked as error:
                assert "fork" in str(error)
            else:
                raise AssertionError("no error")
        # What lies in memory is there, and a new load works.
        assert numpy.asarray(loaded["a"]).tobytes() == expected
        assert numpy.asarray(nvtier.load(file)["a"]).tobytes() == expected
        # The parent owns the pool: it can be reached as from any other process.
        with nvtier.Pool(path) as again:
            assert again.is_remote and again.read("a.safetensors", 0, 8)
        pool.close(); region.close()
        del loaded, open_file, region, pool
        code = 0
    finally:
        sys.stderr.flush()
        if code:
            import traceback; traceback.print_exc()
            os._exit(code)
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert [entry.path for entry in pool.ls()] == ["a.safetensors"]
assert numpy.asarray(region.load()["a"]).tobytes() == expected
region.close(); pool.close()
print("fine")
"""


def test_fork(path, tmp_path):
    write(tmp_path / "a.safetensors", {"a": MIB})
    assert python(FORK, path, tmp_path / "a.safetensors").split() == ["fine"]


def test_fork_while_loading(tmp_path):
    """Threads that load at the time of a fork are not in the child, and it does not wait for them."""
    write(tmp_path / "a.safetensors", {"a": 4 * MIB})
    code = """
import nvtier, os, signal, sys, threading
stop = False
def work():
    while not stop:
        nvtier.load(sys.argv[1])
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for round in range(8):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        assert len(nvtier.load(sys.argv[1])) == 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop = True
for thread in threads: thread.join()
print("fine")
"""
    env = {"PYTHONWARNINGS": "ignore"}
    assert python(code, tmp_path, env=env).split() == ["fine"]


def test_save(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = numpy.arange(1000, dtype="<f4").reshape(10, 100)
    nvtier.save({"w": values, "b": numpy.array([True, False])}, source, {"k": "v"})
    loaded = nvtier.load(source)
    assert (numpy.asarray(loaded["w"]) == values).all()
    report = nvtier.save(dict(loaded), target, {"k": "v"})
    assert target.read_bytes() == source.read_bytes() and report["bytes"] == source.stat().st_size
    nvtier.save(loaded, target)
    assert set(nvtier.load(target)) == {"w", "b"}
    before = target.read_bytes()
    for tensors, kind in (
        ({"w": values.T}, nvtier.InvalidArgument),
        ({"w": values.astype("c16")}, nvtier.NotSupported),
        ({"w": 3}, nvtier.NotSupported),
        ({3: values}, TypeError),
    ):
        with pytest.raises(kind):
            nvtier.save(tensors, target)
    with pytest.raises(nvtier.NotFound):
        nvtier.save({"w": values}, tmp_path / "no" / "x.safetensors")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nvtier.save({"w": values}, target, progress=stop)
    assert target.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_numpy(tmp_path):
    arrays = {
        "f": numpy.arange(6, dtype="<f8").reshape(2, 3),
        "i": numpy.arange(3, dtype=">i4"),
        "b": numpy.array([True, False]),
        "s": numpy.array(3, dtype="u2"),
        "e": numpy.empty((0, 4), dtype="f4"),
        "c": numpy.array([1 + 2j], dtype="c8"),
    }
    file = tmp_path / "a.safetensors"
    nvtier.numpy.save_file(arrays, file, {"a": "b"})
    back = nvtier.numpy.load_file(file)
    for name, value in arrays.items():
        assert (back[name] == value).all() and back[name].shape == value.shape, name
        assert back[name].dtype == value.dtype.newbyteorder("<")
    reference = pytest.importorskip("safetensors.numpy")
    theirs = tmp_path / "theirs.safetensors"
    reference.save_file({n: a.astype(a.dtype.newbyteorder("<")) for n, a in arrays.items()}, theirs, {"a": "b"})
    assert theirs.read_bytes() == file.read_bytes()
    with pytest.raises(nvtier.InvalidArgument, match="contiguous"):
        nvtier.numpy.save_file({"a": arrays["f"].T}, file)
    with pytest.raises(nvtier.NotSupported):
        nvtier.numpy.save_file({"a": numpy.array(["x"])}, file)
    (tmp_path / "h.safetensors").write_bytes(safetensors({"h": ("BF16", [1], b"\x80\x3f")}))
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        with pytest.raises(nvtier.NotSupported, match="ml_dtypes"):
            nvtier.numpy.load_file(tmp_path / "h.safetensors")
    else:
        assert nvtier.numpy.load_file(tmp_path / "h.safetensors")["h"].tolist() == [1.0]
