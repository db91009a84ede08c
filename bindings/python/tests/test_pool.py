"""The binding on real pools. `python -m pytest bindings/python/tests` with the wheel installed."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import nvtier

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pool"
    nvtier.format(path)
    return path


@pytest.fixture
def pool(path):
    with nvtier.Pool(path, ram=16 * MIB) as pool:
        yield pool


def safetensors(tensors):
    header, data, end = {}, b"", 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        data, end = data + raw, end + len(raw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_info_and_stat(pool, path):
    info = pool.info()
    assert info["id"] and len(info["members"]) == 1
    assert info["owner_pid"] == os.getpid() == pool.owner_pid
    assert not pool.is_remote
    assert os.fspath(pool.path) == os.fspath(path)
    stat = pool.stat()
    assert stat["regions"] == 0 and stat["free_bytes"] > 0


def test_write_read_and_names(pool):
    data = os.urandom(3 * MIB + 17)
    entry = pool.write("models/a.bin", data)
    assert (entry.path, entry.kind, entry.size) == ("models/a.bin", "region", len(data))
    assert abs(entry.mtime - time.time()) < 3600 and entry.mode == 0o644
    assert pool.read("models/a.bin") == data
    assert pool.read("/models/a.bin", 1000, 50) == data[1000:1050]
    assert pool.read("models/a.bin", len(data) - 5, 50) == data[-5:]
    assert pool.read("models/a.bin", len(data) + 5) == b""
    assert [e.path for e in pool.ls(recursive=True)] == ["models", "models/a.bin"]
    assert [e.kind for e in pool.ls()] == ["directory"]
    pool.mkdirs("x/y")
    pool.rename("models/a.bin", "x/y/b.bin")
    assert pool.exists("x/y/b.bin") and not pool.exists("models/a.bin") and not pool.exists("x/y/b.bin/c")
    assert pool.stat_path("x/y/b.bin").size == len(data)
    assert "b.bin" in repr(pool.stat_path("x/y/b.bin"))
    pool.rm("x", recursive=True)
    pool.rm("models")
    assert pool.ls() == []


def test_import_and_export(pool, tmp_path):
    source, target = tmp_path / "in.bin", tmp_path / "out.bin"
    data = os.urandom(20 * MIB + 3)
    source.write_bytes(data)
    assert pool.import_file(source, "a/in.bin").size == len(data)
    assert pool.export_file("a/in.bin", target) == len(data)
    assert target.read_bytes() == data
    report = pool.verify()
    assert report["bad_chunks"] == 0 and report["regions"] == 1
    seen = []
    pool.verify("a", progress=lambda *args: seen.append(args))
    assert all(done <= total and bad == 0 for done, total, bad in seen)
    (tmp_path / "empty").write_bytes(b"")
    assert pool.import_file(tmp_path / "empty", "empty").size == 0
    assert pool.export_file("empty", target) == 0 and target.read_bytes() == b""
    with pytest.raises(FileNotFoundError):
        pool.import_file(tmp_path / "missing", "b")
    with pytest.raises(nvtier.Error):
        pool.export_file("a/in.bin", tmp_path / "no" / "such" / "directory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "in.bin", "out.bin", "pool"]


def test_an_interrupted_import_resumes(path, tmp_path):
    source = tmp_path / "in.bin"
    data = os.urandom(40 * MIB)
    source.write_bytes(data)
    code = """
import nvtier, os, signal, sys
pool = nvtier.Pool(sys.argv[1])
# One Ctrl-C, somewhere in the imports.
signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    while True:
        pool.import_file(sys.argv[2], "in.bin", resume=True)
        pool.rm("in.bin")
except KeyboardInterrupt:
    print("interrupted")
    pool.close()
"""
    out = subprocess.run(
        [sys.executable, "-c", code, path, source], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert "interrupted" in out
    with nvtier.Pool(path) as pool:
        pool.import_file(source, "in.bin", resume=True)
        assert pool.read("in.bin") == data
        assert [e.path for e in pool.ls(recursive=True)] == ["in.bin"]


def test_tensors(pool):
    raw = struct.pack("<6f", *range(6))
    pool.write("m.safetensors", safetensors({"w": ("F32", [2, 3], raw), "a/..": ("BF16", [1], b"\1\2")}))
    tensors = pool.tensors("m.safetensors")
    assert list(tensors) == ["w", "a/.."]
    tensor = tensors["w"]
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) == ("w", "F32", (2, 3), 24)
    begin, end = tensor.data_offsets
    assert pool.read("m.safetensors", begin, end - begin) == raw
    with pytest.raises(nvtier.NotSupported):
        pool.write("plain.txt", b"x")
        pool.tensors("plain.txt")
    pool.write("liar.safetensors", b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(nvtier.Malformed, match="liar.safetensors"):
        pool.tensors("liar.safetensors")


def test_numpy_files(pool, tmp_path):
    numpy = pytest.importorskip("numpy")
    for dtype in ["?", "u1", "i1", "<u2", "<i4", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16"]:
        array = numpy.arange(12).reshape(3, 4).astype(dtype)
        numpy.save(tmp_path / "a.npy", array)
        pool.import_file(tmp_path / "a.npy", "a.npy")
        tensor = pool.tensors("a.npy")["data"]
        begin, end = tensor.data_offsets
        assert tensor.shape == (3, 4)
        back = numpy.frombuffer(pool.read("a.npy", begin, end - begin), dtype=array.dtype).reshape(tensor.shape)
        assert (back == array).all(), dtype


def test_errors(pool, path, tmp_path):
    with pytest.raises(nvtier.NotFound) as caught:
        pool.read("nothing")
    assert isinstance(caught.value, nvtier.Error) and isinstance(caught.value, FileNotFoundError)
    assert "nothing" in str(caught.value)
    pool.mkdirs("d/e")
    with pytest.raises(nvtier.IsADirectory):
        pool.read("d")
    with pytest.raises(nvtier.NotEmpty):
        pool.rm("d")
    with pytest.raises(nvtier.InvalidArgument):
        pool.rm("../x")
    with pytest.raises(nvtier.Error):
        nvtier.Pool(tmp_path / "no pool")
    with pytest.raises(ValueError):
        nvtier.Pool(path, wait=-1)
    with pytest.raises(nvtier.Error):
        nvtier.format(path)
    for name in ("Corrupt", "NoSpace", "PoolBusy", "Timeout", "PermissionDenied", "ReadOnly", "Exists"):
        assert issubclass(getattr(nvtier, name), nvtier.Error)
        assert str(getattr(nvtier, name)("text")) == "text"


def test_a_damaged_region_is_corrupt(path):
    data = os.urandom(MIB)
    with nvtier.Pool(path) as pool:
        pool.write("r.bin", data)
    hit = 0
    for directory, _, files in os.walk(path):
        for name in files:
            file = os.path.join(directory, name)
            with open(file, "r+b") as f:
                content = f.read()
                at = content.find(data[4096:8192])
                if at >= 0:
                    f.seek(at + 100)
                    f.write(bytes([content[at + 100] ^ 1]))
                    hit += 1
    assert hit == 1
    with nvtier.Pool(path) as pool:
        with pytest.raises(nvtier.Corrupt):
            pool.read("r.bin")
        assert pool.verify()["bad_chunks"] == 1


def test_closed(path):
    pool = nvtier.Pool(path)
    pool.close()
    pool.close()
    with pytest.raises(nvtier.Error, match="closed"):
        pool.ls()


def test_an_open_pool_serves_other_processes(pool, path):
    pool.write("a.bin", b"from the owner")
    code = """
import nvtier, os, sys
with nvtier.Pool(sys.argv[1]) as pool:
    assert pool.is_remote and pool.owner_pid == int(sys.argv[2])
    assert pool.read("a.bin") == b"from the owner"
    pool.write("b.bin", b"from the client" * 1000000)
    assert [e.path for e in pool.ls()] == ["a.bin", "b.bin"]
    assert pool.verify()["bad_chunks"] == 0
"""
    subprocess.run([sys.executable, "-c", code, path, str(os.getpid())], check=True, timeout=120)
    assert pool.read("b.bin") == b"from the client" * 1000000


def test_read_only(pool, path):
    with nvtier.Pool(path, read_only=True) as client:
        assert client.is_remote
        with pytest.raises(nvtier.ReadOnly):
            client.write("a", b"")


def test_the_gil_is_free_meanwhile(pool):
    data = os.urandom(64 * MIB)
    pool.write("big", data)
    ticks, stop = 0, threading.Event()

    def count():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = ticks
    for _ in range(5):
        assert len(pool.read("big")) == len(data)
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 0


# What numpy makes of the view of each type: its dtype, and bits of an element in the file.
VIEWS = {
    "BOOL": ("bool", 8), "U8": ("u1", 8), "I8": ("i1", 8), "U16": ("<u2", 16), "I16": ("<i2", 16), "U32": ("<u4", 32),
    "I32": ("<i4", 32), "U64": ("<u8", 64), "I64": ("<i8", 64), "F16": ("<f2", 16), "F32": ("<f4", 32), "F64": ("<f8", 64),
    "C64": ("<c8", 64), "BF16": ("V2", 16), "F8_E4M3": ("V1", 8), "F8_E5M2": ("V1", 8), "F8_E8M0": ("V1", 8),
    "F8_E4M3FNUZ": ("V1", 8), "F8_E5M2FNUZ": ("V1", 8), "F4": ("u1", 4), "F6_E2M3": ("u1", 6), "F6_E3M2": ("u1", 6),
}  # fmt: skip


def check_views(numpy, pool, mount):
    """Every type and awkward name, opened by numpy through the mount."""
    tensors = {f"t.{name}": (name, [3, 4], os.urandom(12 * bits // 8)) for name, (_, bits) in VIEWS.items()}
    tensors |= {name: ("U8", [2], os.urandom(2)) for name in ["a/b", "..", "", "%", "x\ny", "ü" * 200]}
    tensors |= {"scalar": ("F32", [], os.urandom(4)), "none": ("F32", [0, 3], b"")}
    pool.write("all.safetensors", safetensors(tensors))
    folder = mount / ".tensors/all.safetensors"
    assert len(list(folder.iterdir())) == len(tensors)
    views = {}
    for file in folder.iterdir():
        # numpy cannot map a file without data after the header.
        array = numpy.load(file, mmap_mode=None if file.name == "none.npy" else "r", allow_pickle=False)
        views[file.name] = (array.dtype, array.shape, array.tobytes())
    for name, (dtype, bits) in VIEWS.items():
        shape = (3, 4 * bits // 8) if bits < 8 else (3, 4)
        assert views[f"t.{name}.npy"] == (numpy.dtype(dtype), shape, tensors[f"t.{name}"][2]), name
    for file, name in {"a%2Fb": "a/b", "%2E.": "..", "%": "", "%25": "%", "x%0Ay": "x\ny", "scalar": "scalar"}.items():
        assert views[file + ".npy"][2] == tensors[name][2], name
    assert views["scalar.npy"][1] == () and views["none.npy"][1] == (0, 3)

    # GGUF: dimensions turned, rows of a quantised type as bytes.
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    blocks, plain = os.urandom(3 * 2 * 18), os.urandom(8)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    header += text("q") + struct.pack("<IQQIQ", 2, 64, 3, 2, 0)
    header += text("f") + struct.pack("<IQIQ", 1, 2, 0, 128)
    header += b"\0" * (-len(header) % 32)
    pool.write("m.gguf", header + blocks.ljust(128, b"\0") + plain)
    view = numpy.load(mount / ".tensors/m.gguf/q.npy", mmap_mode="r")
    assert (view.dtype, view.shape, view.tobytes()) == (numpy.dtype("u1"), (3, 36), blocks)
    view = numpy.load(mount / ".tensors/m.gguf/f.npy", mmap_mode="r")
    assert (view.dtype, view.shape, view.tobytes()) == (numpy.dtype("<f4"), (2,), plain)


def program():
    found = os.environ.get("NVTIER_BIN") or shutil.which("nvtier")
    if not found:
        pytest.skip("no nvtier program: set NVTIER_BIN to test a mounted pool")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here")
    return found


def test_a_mounted_pool(path, tmp_path):
    numpy = pytest.importorskip("numpy")
    nvtier_program = program()
    mount = tmp_path / "mnt"
    mount.mkdir()
    done = subprocess.run(
        [nvtier_program, "mount", path, mount], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode == 7:
        pytest.skip("mounting is not possible here: " + done.stderr)
    assert done.returncode == 0, done.stderr
    try:
        with nvtier.Pool(path) as pool:
            assert pool.is_remote
            weights = numpy.arange(6, dtype="<f4").reshape(2, 3)
            pool.write("d/m.safetensors", safetensors({"w": ("F32", [2, 3], weights.tobytes())}))
            assert (mount / "d/m.safetensors").read_bytes() == pool.read("d/m.safetensors")
            view = numpy.load(mount / ".tensors/d/m.safetensors/w.npy", mmap_mode="r")
            assert (view == weights).all() and view.dtype == weights.dtype
            del view
            # Through the mount, and past it.
            for loaded in (nvtier.load(mount / "d"), nvtier.load("d", pool=path), pool.load("d/m.safetensors")):
                assert (numpy.asarray(loaded["w"]) == weights).all()
            saved = mount / "saved.safetensors"
            nvtier.numpy.save_file({"w": weights}, saved, {"a": "b"})
            assert list(pool.tensors("saved.safetensors")) == ["w"]
            assert (numpy.asarray(nvtier.load(saved)["w"]) == weights).all()
            check_views(numpy, pool, mount)
            (mount / "through-the-mount").write_bytes(b"hello")
            assert pool.read("through-the-mount") == b"hello"
    finally:
        subprocess.run([nvtier_program, "umount", mount], timeout=120, check=True)


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def test_metrics_are_served_while_the_pool_is_open(path):
    with nvtier.Pool(path, ram=16 * MIB, metrics=0) as pool:
        host, port = pool.metrics.split(":")
        assert host == "127.0.0.1" and int(port) > 0
        pool.write("a", b"x" * MIB)
        text = scrape(pool.metrics)
        assert "nvtier_pool_regions 1" in text.splitlines() and "nvtier_kv_blocks{" not in text, text
        with nvtier.kv.Store(pool, "chat", ram=4 * MIB) as store, store.namespace(b"print", 4096):
            assert 'nvtier_kv_blocks{store="chat"} 0' in scrape(pool.metrics).splitlines()
        assert "nvtier_build_info{version=" in text and "nvtier_fuse_" not in text
        # Nobody else has the port, and who does not own the pool cannot tell of it.
        with pytest.raises(nvtier.PoolBusy, match="the port is taken"):
            nvtier.Pool(path.with_name("another"), metrics=pool.metrics)
        child = "import sys, nvtier; nvtier.Pool(sys.argv[1], metrics=0)"
        done = subprocess.run([sys.executable, "-c", child, path], capture_output=True, text=True, timeout=60, check=False)
        assert "PoolBusy" in done.stderr and f"process {os.getpid()} owns the pool" in done.stderr, done.stderr
        address = pool.metrics
    assert pool.metrics is None
    with pytest.raises(OSError):
        scrape(address)
    with nvtier.Pool(path, ram=16 * MIB) as pool:
        assert pool.metrics is None and pool.read("a", 0, 1) == b"x"


@pytest.mark.parametrize("wrong", ["here", "localhost:9299", "1.2.3.4", "70000", ""])
def test_what_is_no_address_is_told(path, wrong):
    with pytest.raises(nvtier.InvalidArgument, match="9299: loopback only"):
        nvtier.Pool(path, metrics=wrong)


def test_a_forked_child_leaves_its_parents_metrics_alone(path):
    with nvtier.Pool(path, ram=16 * MIB, metrics=0) as pool:
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if pool.metrics is None and pool.close() is None else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert "nvtier_pool_regions 0" in scrape(pool.metrics).splitlines()
