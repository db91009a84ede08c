"""nvtier.torch against the reference library: what is loaded, how it is sliced, and every byte that is saved."""

import gc
import os
import random
import time

import pytest
from common import MIB, gguf, resident, safetensors

import nvtier

torch = pytest.importorskip("torch")
reference = pytest.importorskip("safetensors.torch")
from safetensors import safe_open as reference_open  # noqa: E402

SEED = int(os.environ.get("NVTIER_SEED", "20261125"))
QUICK = "NVTIER_QUICK" in os.environ
DTYPES = [
    getattr(torch, name)
    for name in (
        "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn "
        "float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
    ).split()
    if hasattr(torch, name)
]


def tensor(rng, dtype, shape):
    """Random bits of a type (bools are 0 or 1)."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = 1
    for length in shape:
        count *= length
    raw = bytearray(rng.randbytes(count * size))
    if dtype is torch.bool:
        raw = bytearray(byte & 1 for byte in raw)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)


def raw(value):
    """A tensor's bytes."""
    return bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist()) if value.numel() else b""


def data(tensors):
    """Names in their order, but for empty tensors: where those are, nothing says."""
    return [name for name, value in tensors.items() if value.numel()]


def same(ours, theirs):
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    if ours.numel():
        # A clone: a row of one element may have any stride and count as contiguous.
        ours, theirs = (t.reshape(-1).clone(memory_format=torch.contiguous_format) for t in (ours, theirs))
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def checkpoint(rng, dtypes=DTYPES):
    """Random tensors of all types, sizes from nothing to some MiB, names that need escaping."""
    tensors = {}
    shapes = [(), (0,), (1,), (3, 0, 2), (7,), (5, 3), (2, 3, 4), (64, 33)]
    for i in range(rng.randrange(1, 30)):
        dtype = rng.choice(dtypes)
        shape = rng.choice(shapes)
        if dtype is getattr(torch, "float4_e2m1fn_x2", None) and not shape:
            shape = (2,)
        name = rng.choice(["layer.{}.w", "a/{}", "q\"{}", "ü{}", "x\n{}", "{}"]).format(i)
        tensors[name] = tensor(rng, dtype, shape)
    if rng.random() < 0.3:
        tensors["big"] = tensor(rng, torch.bfloat16, (rng.randrange(1, 3000), 517))
    return tensors


def test_every_type_loads_as_the_reference_library_loads_it(tmp_path):
    rng = random.Random(SEED)
    file = tmp_path / "all.safetensors"
    tensors = {}
    for dtype in DTYPES:
        name = str(dtype).split(".")[1]
        tensors |= {name: tensor(rng, dtype, (6, 4)), f"{name}.none": tensor(rng, dtype, (0, 4))}
        if "float4" not in name:
            tensors[f"{name}.scalar"] = tensor(rng, dtype, ())
    reference.save_file(tensors, file)
    ours, theirs = nvtier.torch.load_file(file), reference.load_file(file)
    assert data(ours) == data(theirs) and ours.keys() == theirs.keys() and len(ours) >= 3 * 20 - 1
    for name in theirs:
        same(ours[name], theirs[name])
    # Writable, and of a storage of its own: nothing is shared by accident.
    ours["float32"].zero_()
    assert len({t.untyped_storage().data_ptr() for t in ours.values() if t.numel()}) == sum(t.numel() > 0 for t in ours.values())
    with nvtier.torch.safe_open(file) as f:
        for name in theirs:
            same(f.get_tensor(name), theirs[name])


def test_random_checkpoints_are_equal_both_ways(tmp_path):
    for round in range(12 if QUICK else 40):
        seed = SEED + round
        print("seed", seed)
        rng = random.Random(seed)
        tensors = checkpoint(rng)
        metadata = rng.choice([None, {"format": "pt"}])
        ours_file, theirs_file = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
        reference.save_file(tensors, theirs_file, metadata)
        nvtier.torch.save_file(tensors, ours_file, metadata)
        assert ours_file.read_bytes() == theirs_file.read_bytes()
        loaded = nvtier.torch.load_file(theirs_file, cache=rng.choice(["auto", "direct", "buffered"]))
        assert data(loaded) == data(reference.load_file(theirs_file)) and loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            same(loaded[name], value)
        with nvtier.torch.safe_open(theirs_file) as ours, reference_open(theirs_file, "pt") as theirs:
            assert ours.keys() == theirs.keys() and sorted(ours.offset_keys()) == ours.keys()
            assert data({name: tensors[name] for name in ours.offset_keys()}) == data(
                {name: tensors[name] for name in theirs.offset_keys()}
            )
            assert ours.metadata() == theirs.metadata() and len(ours) == len(tensors)
            names = rng.choice([ours.keys(), ours.offset_keys(), rng.sample(ours.keys(), len(tensors))])
            for name in names:
                same(ours.get_tensor(name), tensors[name])
                assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
                assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
            everything = ours.get_tensors()
            assert list(everything) == ours.offset_keys()


def index(rng, dims):
    """An index as people write them, and some that are wrong."""

    def item():
        kind = rng.randrange(6)
        if kind == 0:
            return rng.randrange(-7, 7)
        bound = lambda: rng.choice([None, *range(-8, 9)])  # noqa: E731
        step = rng.choice([None, None, 1, 2, 3, 0, -1]) if kind == 1 else None
        return slice(bound(), bound(), step)

    items = [item() for _ in range(rng.randrange(0, dims + 2))]
    if rng.random() < 0.3:
        items.insert(rng.randrange(len(items) + 1), ...)
    if rng.random() < 0.1:
        items.insert(rng.randrange(len(items) + 1), rng.choice([None, True, [0, 1], torch.tensor([0]), "x", 1.5]))
    return items[0] if len(items) == 1 and rng.random() < 0.5 else tuple(items)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_slices_are_those_of_the_reference_library(tmp_path):
    rng = random.Random(SEED)
    print("seed", SEED)
    file = tmp_path / "a.safetensors"
    types = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64]
    shapes = [(), (5,), (6, 4), (3, 5, 2), (2, 0, 3), (1, 1), (4, 3, 2, 5)]
    tensors = {f"{t}{s}": tensor(rng, t, s) for t in types for s in shapes}
    reference.save_file(tensors, file)
    refused = 0
    with nvtier.torch.safe_open(file) as ours, reference_open(file, "pt") as theirs:
        slices = {name: (ours.get_slice(name), theirs.get_slice(name)) for name in tensors}
        for round in range(600 if QUICK else 2000):
            name = rng.choice(list(tensors))
            mine, other = slices[name]
            at = index(rng, tensors[name].dim())
            try:
                expected = other[at]
            except Exception as error:
                refused += 1
                with pytest.raises(type(error)):
                    mine[at]
                continue
            try:
                same(mine[at], expected)
            except Exception as error:
                raise AssertionError(f"{name}[{at}]: {error!r}") from error
    assert 50 < refused < 1500
    # After the end of the file, slices that are there go on; the reference library's do, too.
    same(slices["torch.float32(6, 4)"][0][1:3], tensors["torch.float32(6, 4)"][1:3])


def test_a_slice_reads_its_own_bytes_only(tmp_path):
    file = tmp_path / "a.safetensors"
    value = torch.arange(1024 * 1024, dtype=torch.int32).reshape(1024, 1024)
    reference.save_file({"a": value}, file)
    with nvtier.torch.safe_open(file) as f:
        part = f.get_slice("a")
        for at in (slice(10, 20), (slice(None), slice(512, 1024)), (3, slice(5, 9)), (slice(0, 100, 7), 5)):
            assert torch.equal(part[at], value[at])
        before = resident()
        rows = part[100:101]
        assert resident() - before < MIB and rows.untyped_storage().nbytes() == 4096
        assert f._file.ahead() == (5, 0)


def test_tensors_in_order_are_loaded_together(tmp_path):
    rng = random.Random(SEED)
    file = tmp_path / "a.safetensors"
    tensors = {f"l.{i:03}": tensor(rng, torch.float16, (100, 50)) for i in range(200)}
    reference.save_file(tensors, file)
    with nvtier.torch.safe_open(file) as f:
        for name in f.keys():
            same(f.get_tensor(name), tensors[name])
        loads, waiting = f._file.ahead()
        assert loads <= 4 and waiting == 0
        for name in f.keys()[::10]:  # a second time, with gaps
            same(f.get_tensor(name), tensors[name])
        f._file.forget()
        names = f.keys()
        for name in names[::-1]:
            same(f.get_tensor(name), tensors[name])
        assert f._file.ahead() == (200, 0)  # out of order nothing is loaded that is not asked for


def test_threads_share_an_open_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    rng = random.Random(SEED)
    file = tmp_path / "a.safetensors"
    tensors = {f"l.{i:03}": tensor(rng, torch.float16, (rng.randrange(1, 300), 64)) for i in range(150)}
    reference.save_file(tensors, file)
    with nvtier.torch.safe_open(file) as f, ThreadPoolExecutor(4) as threads:
        slices = {name: f.get_slice(name) for name in f.keys()}
        loaded = list(threads.map(lambda name: (name, slices[name][...]), slices))
    for name, value in loaded:
        same(value, tensors[name])


def test_several_files_open_as_one(tmp_path):
    rng = random.Random(SEED)
    one, two = {"a": tensor(rng, torch.int8, (5,))}, {"b": tensor(rng, torch.float32, (6, 2))}
    reference.save_file(one, tmp_path / "1.safetensors", {"x": "1"})
    reference.save_file(two, tmp_path / "2.safetensors", {"y": "2"})
    with nvtier.torch.safe_open(tmp_path) as f:
        assert f.keys() == ["a", "b"] and f.metadata() == {"x": "1", "y": "2"} and "a" in f and "c" not in f
        same(f.get_tensor("b"), two["b"])
    assert set(nvtier.torch.load_file(tmp_path, filters="b")) == {"b"}
    cut = nvtier.torch.load_file(tmp_path, shard=(1, 2, {"b": 0}))
    same(cut["b"], two["b"][3:])


def test_what_safe_open_refuses(tmp_path):
    file = tmp_path / "a.safetensors"
    reference.save_file({"a": torch.zeros(3)}, file)
    with pytest.raises(nvtier.InvalidArgument, match="framework"):
        nvtier.torch.safe_open(file, framework="np")
    with pytest.raises(nvtier.InvalidArgument, match="device"):
        nvtier.torch.safe_open(file, device="tpu")
    with pytest.raises(nvtier.NotFound):
        nvtier.torch.safe_open(tmp_path / "b.safetensors")
    f = nvtier.torch.safe_open(file)
    for call in (f.get_tensor, f.get_slice):
        with pytest.raises(KeyError) as caught:
            call("b")
        assert isinstance(caught.value, nvtier.NoTensor) and "'b'" in str(caught.value) or '"b"' in str(caught.value)
    f.close()
    f.close()
    for call in (f.keys, f.metadata, lambda: f.get_tensor("a"), f.get_tensors):
        with pytest.raises(nvtier.Closed):
            call()
    (tmp_path / "six.safetensors").write_bytes(safetensors({"x": ("F6_E2M3", [4], b"abc"), "y": ("U8", [1], b"z")}))
    with pytest.raises(nvtier.NotSupported, match="F6_E2M3"):
        nvtier.torch.load_file(tmp_path / "six.safetensors")
    assert nvtier.torch.load_file(tmp_path / "six.safetensors", filters="y")["y"].tolist() == [ord("z")]
    assert nvtier.load(tmp_path / "six.safetensors")["x"].dtype == "F6_E2M3"
    same(nvtier.torch.load_file(file, device=torch.device("cpu"))["a"], torch.zeros(3))
    assert nvtier.torch.load_file(file, device="meta")["a"].device.type == "meta"


def test_pinned_memory_is_real_or_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    reference.save_file({"a": torch.arange(3)}, file)
    with pytest.raises(nvtier.InvalidArgument):
        nvtier.torch.load_file(file, device="cuda:0", pin_memory=True)
    if torch.cuda.is_available():
        pinned = nvtier.torch.load_file(file, pin_memory=True)["a"]
        assert pinned.is_pinned() and pinned.tolist() == [0, 1, 2]
    else:
        with pytest.raises(nvtier.NotSupported, match="CUDA"):
            nvtier.torch.load_file(file, pin_memory=True)


def test_memory_goes_with_the_last_tensor(tmp_path):
    file = tmp_path / "a.safetensors"
    size = 96 * MIB
    reference.save_file({"a": torch.randint(0, 255, (size,), dtype=torch.uint8), "b": torch.ones(4)}, file)
    nvtier.torch.load_file(file)
    gc.collect()
    before = resident()
    small = nvtier.torch.load_file(file)["b"][1:2]
    gc.collect()
    assert resident() - before > size * 0.9
    assert small.tolist() == [1.0]
    del small
    gc.collect()
    assert resident() - before < size * 0.3


def test_an_open_file_of_a_pool_holds_its_region(tmp_path):
    file, image = tmp_path / "a.safetensors", tmp_path / "image"
    value = torch.randint(0, 255, (30 * MIB,), dtype=torch.uint8)
    reference.save_file({"a": value}, file)
    nvtier.format(image, raw=True, size=128 * MIB)
    with nvtier.Pool(image) as pool:
        empty = pool.stat()["free_bytes"]
        pool.import_file(file, "a.safetensors")
        f = nvtier.torch.safe_open("a.safetensors", pool=pool)
        part = f.get_slice("a")
        pool.rm("a.safetensors")
        pool.sync()
        assert pool.stat()["free_bytes"] < empty - 20 * MIB
        loaded = f.get_tensor("a")
        f.close()
        assert torch.equal(part[5:100], value[5:100])  # a slice keeps it
        del part, f
        gc.collect()
        pool.sync()
        assert pool.stat()["free_bytes"] > empty - 4 * MIB  # the loaded tensor does not
        pool.write("b", os.urandom(60 * MIB))
        assert torch.equal(loaded, value)
    with pytest.raises(nvtier.Closed):
        nvtier.torch.safe_open("b.safetensors", pool=pool)
    # By the pool's path: opened for as long as the file is.
    with nvtier.Pool(image) as pool:
        pool.import_file(file, "c.safetensors")
    with nvtier.torch.safe_open("c.safetensors", pool=image) as f:
        assert torch.equal(f.get_tensor("a"), value)
    assert torch.equal(nvtier.torch.load_file("c.safetensors", pool=image)["a"], value)


def test_gguf(tmp_path):
    rng = random.Random(SEED)
    blocks = rng.randbytes(4 * 18)
    floats = torch.arange(64, dtype=torch.bfloat16)
    (tmp_path / "m.gguf").write_bytes(gguf({"q": (2, [64, 2], blocks), "b": (30, [32, 2], raw(floats)), "i": (26, [3], b"\1\0\0\0" * 3)}))
    loaded = nvtier.torch.load_file(tmp_path / "m.gguf")
    assert (loaded["q"].dtype, loaded["q"].shape) == (torch.uint8, (2, 36)) and raw(loaded["q"]) == blocks
    assert torch.equal(loaded["b"], floats.reshape(2, 32)) and loaded["i"].tolist() == [1, 1, 1]
    with nvtier.torch.safe_open(tmp_path / "m.gguf") as f:
        part = f.get_slice("q")
        assert part.get_dtype() == "Q4_0" and part.get_shape() == [2, 64]
        assert raw(part[1]) == blocks[36:] and torch.equal(f.get_slice("b")[1:], floats.reshape(2, 32)[1:])


def test_a_real_gguf_model_is_what_the_gguf_package_reads():
    gguf_package = pytest.importorskip("gguf")
    model = os.environ.get("NVTIER_MODEL")
    if not model:
        pytest.skip("no model: NVTIER_MODEL is not set")
    file = os.path.join(model, "model.gguf")
    theirs = {t.name: t for t in gguf_package.GGUFReader(file).tensors}
    ours = nvtier.torch.load_file(file)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == value.data.shape, name
        assert (ours[name].numpy() == value.data).all(), name


# What cannot be saved: how to make it, and how the reference library refuses it.
BAD = {
    "not contiguous": lambda: {"a": torch.zeros(3, 4).t()},
    "shared": lambda: (lambda t: {"a": t, "b": t})(torch.zeros(5)),
    "overlapping": lambda: (lambda t: {"a": t[:3], "b": t[2:]})(torch.zeros(5)),
    "no tensor": lambda: {"a": 1},
    "no dict": lambda: [torch.zeros(1)],
    "sparse": lambda: {"a": torch.zeros(3).to_sparse()},
    "name": lambda: {1: torch.zeros(1)},
    "type": lambda: {"a": torch.zeros(2, dtype=torch.complex128)},
    "meta": lambda: {"a": torch.zeros(2, device="meta")},
}


@pytest.mark.parametrize("what", list(BAD))
def test_what_cannot_be_saved_is_refused(tmp_path, what):
    file = tmp_path / "a.safetensors"
    nvtier.torch.save_file({"old": torch.ones(2)}, file)
    before = file.read_bytes()
    with pytest.raises(Exception) as theirs:
        reference.save_file(BAD[what](), tmp_path / "theirs.safetensors")
    with pytest.raises(Exception) as ours:
        nvtier.torch.save_file(BAD[what](), file)
    assert isinstance(ours.value, (nvtier.Error, TypeError))
    if type(theirs.value) in (ValueError, RuntimeError, TypeError):
        assert isinstance(ours.value, type(theirs.value)), (ours.value, theirs.value)
    assert file.read_bytes() == before and os.listdir(tmp_path).count("a.safetensors") == 1
    assert [name for name in os.listdir(tmp_path) if ".part" in name] == []


def test_what_may_be_saved(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    base = torch.arange(12, dtype=torch.float32)
    for tensors in (
        {},
        {"a": base[2:5], "b": base[5:9]},  # of one storage, without overlap
        {"p": torch.nn.Parameter(torch.ones(2, 3))},
        {"t": torch.zeros(1, 5).t(), "e": torch.empty(0, 7), "s": torch.tensor(3)},
        {"c": torch.tensor([1 + 2j]).conj().resolve_conj()},
    ):
        for metadata in (None, {"format": "pt"}):
            reference.save_file(tensors, theirs, metadata)
            report = nvtier.torch.save_file(tensors, ours, metadata)
            assert ours.read_bytes() == theirs.read_bytes() and report["bytes"] == ours.stat().st_size
    with pytest.raises(TypeError):
        nvtier.torch.save_file({"a": base}, ours, {"a": 1})


def test_save_through_dlpack(tmp_path):
    """nvtier.save takes tensors of any library; torch's give the same file."""
    rng = random.Random(SEED)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    types = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float64]
    tensors = {str(dtype): tensor(rng, dtype, shape) for dtype in types for shape in ((3, 5), (), (0, 2))}
    reference.save_file(tensors, theirs)
    nvtier.save(tensors, ours)
    assert ours.read_bytes() == theirs.read_bytes()
    # A part of a larger tensor starts where it starts.
    base = torch.arange(100, dtype=torch.int32)
    nvtier.save({"a": base[10:20]}, ours)
    assert nvtier.torch.load_file(ours)["a"].tolist() == list(range(10, 20))
    with pytest.raises(nvtier.InvalidArgument, match="'a'.*contiguous"):
        nvtier.save({"a": base[::2]}, ours)


def test_a_save_that_is_interrupted_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    nvtier.torch.save_file({"old": torch.ones(2)}, file)
    before = file.read_bytes()
    big = {"a": torch.zeros(64 * MIB, dtype=torch.uint8)}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nvtier.torch.save_file(big, file, progress=stop)
    with pytest.raises(nvtier.Timeout):
        nvtier.torch.save_file(big, file, deadline=0)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    seen = []
    nvtier.torch.save_file(big, file, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == file.stat().st_size
    assert torch.equal(nvtier.torch.load_file(file)["a"], big["a"])


def test_no_space(tmp_path):
    """A save that does not fit is told so, and leaves nothing: on a small tmpfs (root only)."""
    import subprocess

    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr}")
    try:
        with pytest.raises(nvtier.NoSpace):
            nvtier.torch.save_file({"a": torch.zeros(20 * MIB, dtype=torch.uint8)}, place / "a.safetensors")
        assert os.listdir(place) == []
        nvtier.torch.save_file({"a": torch.ones(MIB, dtype=torch.uint8)}, place / "a.safetensors")
        assert nvtier.torch.load_file(place / "a.safetensors")["a"].sum() == MIB
    finally:
        # The kernel takes a closed ring down, and lets go of its files, a moment later.
        for _ in range(600):
            if subprocess.run(["umount", place], capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
    assert not os.path.ismount(place)
