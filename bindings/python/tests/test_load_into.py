"""nvtier.load: into memory that is there, from and to arrays that only say where they are; priorities; what a pool's RAM tier has."""

import os
import shutil
import subprocess
import threading

import pytest
from common import MIB, python, safetensors
from test_load import array, write

import nvtier

numpy = pytest.importorskip("numpy")


class Interface:
    """An array of a library that speaks no DLPack: it says where it is, and keeps what it is a view of."""

    def __init__(self, array, name="__array_interface__", **more):
        self.array = array
        said = dict(array.__array_interface__)
        said.pop("descr", None)
        setattr(self, name, {**said, **more})


def test_into_memory_that_is_there(tmp_path):
    file = tmp_path / "a.safetensors"
    values = numpy.arange(300_000, dtype="<f4").reshape(3, 100_000)
    raw = {
        "w": ("F32", [3, 100_000], values.tobytes()),
        "flags": ("BOOL", [3], b"\1\0\1"),
        "half": ("BF16", [2, 2], b"\x80\x3f\x00\x40" * 2),
        "none": ("I16", [0, 3], b""),
        "scalar": ("F64", [], numpy.float64(2.5).tobytes()),
        "other": ("U8", [9], bytes(range(9))),
    }
    file.write_bytes(safetensors(raw))
    out = {
        "scalar": numpy.zeros((), dtype="<f8"),
        "w": numpy.full((3, 100_000), 7, dtype="<f4"),
        "flags": numpy.zeros(3, dtype=bool),
        "half": numpy.zeros((2, 2), dtype="V2"),
        "none": numpy.zeros((0, 3), dtype="<i2"),
    }
    loaded = nvtier.load(file, out=out)
    assert (out["w"] == values).all() and out["scalar"] == 2.5 and out["flags"].tolist() == [True, False, True]
    assert out["half"].tobytes() == raw["half"][2]
    assert loaded["w"] is out["w"] and set(loaded) == set(out)
    report = loaded.report
    assert report["tensors"] == 5 and report["bytes"] == sum(a.nbytes for a in out.values()) and report["device_bytes"] == 0
    # A part of a larger array, its neighbours untouched; and arrays that only say where they are.
    large = numpy.full((5, 100_000), 7, dtype="<f4")
    nvtier.load(file, out={"w": large[1:4]}, device="cpu")
    assert (large[1:4] == values).all() and (large[[0, 4]] == 7).all()
    plain = numpy.zeros((3, 100_000), dtype="<f4")
    nvtier.load(file, out={"w": Interface(plain)})
    assert (plain == values).all()
    shard = numpy.zeros((1, 100_000), dtype="<f4")
    nvtier.load(file, out={"w": shard}, shard=(1, 3, {"w": 0}))
    assert (shard == values[1:2]).all()


def test_torch_tensors_are_filled(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors({"half": ("BF16", [2], b"\x80\x3f\x00\x40"), "w": ("F32", [2], numpy.float32([3, 4]).tobytes())}))
    out = {"half": torch.zeros(2, dtype=torch.bfloat16), "w": torch.zeros(2)}
    nvtier.load(file, out=out)
    assert out["half"].tolist() == [1.0, 2.0] and out["w"].tolist() == [3.0, 4.0]


def test_what_cannot_be_filled_is_refused_before_a_byte_is_written(tmp_path):
    file = tmp_path / "a.safetensors"
    write(file, {"a": 100, "b": 50})
    good = numpy.full(50, 9, dtype="u1")
    frozen = numpy.zeros(100, dtype="u1")
    frozen.flags.writeable = False
    both = numpy.zeros(120, dtype="u1")
    for out, kind, match in (
        ({"a": numpy.zeros(99, dtype="u1")}, nvtier.InvalidArgument, "'?\"?a\"?'?.*must be alike"),
        ({"a": numpy.zeros((10, 10), dtype="u1")}, nvtier.InvalidArgument, "must be alike"),
        ({"a": numpy.zeros(100, dtype="i1")}, nvtier.InvalidArgument, "I8"),
        ({"a": numpy.zeros(200, dtype="u1")[::2]}, nvtier.InvalidArgument, "contiguous"),
        ({"a": frozen}, nvtier.InvalidArgument, "read-only"),
        ({"a": both[:100], "b": both[60:110]}, nvtier.InvalidArgument, "same memory"),
        ({"c": numpy.zeros(1, dtype="u1")}, nvtier.NoTensor, "c"),
        ({"a": 5}, nvtier.NotSupported, "__cuda_array_interface__"),
        ({3: good}, TypeError, "str"),
        ({"a": Interface(numpy.zeros(100, dtype="u1"), mask=good)}, nvtier.NotSupported, "mask"),
        ({"a": Interface(numpy.zeros(100, dtype="u1"), typestr="|O8")}, nvtier.InvalidArgument, "O8"),
        ({"a": Interface(numpy.zeros(100, dtype="u1"), typestr="ü")}, nvtier.NotSupported, "type"),
        ({"a": Interface(numpy.zeros(100, dtype="u1"), shape=(2**40, 2**40))}, nvtier.InvalidArgument, "shape"),
        ({"a": nvtier.load(file)["a"]}, nvtier.InvalidArgument, "read-only"),
    ):
        with pytest.raises(kind, match=match):
            nvtier.load(file, out={"b": good, **out} if "b" not in out else out)
    assert (good == 9).all() and not both.any()
    with pytest.raises(nvtier.InvalidArgument, match="filters"):
        nvtier.load(file, out={"b": good}, filters="b")
    with pytest.raises(nvtier.InvalidArgument, match="leave device out"):
        nvtier.load(file, out={"b": good}, device="cuda:0")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nvtier.load(file, out={"b": good}, progress=stop)


def test_arrays_that_only_say_where_they_are_are_saved(tmp_path):
    values = numpy.arange(24, dtype="<f4").reshape(2, 3, 4)
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    nvtier.save({"w": Interface(values, strides=(48, 16, 4)), "flags": Interface(numpy.array([True]))}, ours)
    nvtier.save({"w": values, "flags": numpy.array([True])}, theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(nvtier.InvalidArgument, match="contiguous"):
        nvtier.save({"w": Interface(values.T)}, ours)
    with pytest.raises(nvtier.NotSupported, match="V2"):
        nvtier.save({"w": Interface(numpy.zeros(3, dtype="V2"))}, ours)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_cuda_array_without_cuda_says_what_is_missing(tmp_path):
    try:
        nvtier.device_info("cuda")
    except nvtier.NoDriver:
        pass
    except nvtier.Error:
        pytest.skip("CUDA is here: gpu_check.py has these arrays")
    else:
        pytest.skip("a GPU is here: gpu_check.py has these arrays")
    values = numpy.arange(4, dtype="<f4")
    there = Interface(values, "__cuda_array_interface__", version=3, stream=1)
    with pytest.raises(nvtier.NoDriver, match="libcuda"):
        nvtier.save({"w": there}, tmp_path / "a.safetensors")
    write(tmp_path / "a.safetensors", {"w": 16})
    with pytest.raises(nvtier.NoDriver, match="libcuda"):
        nvtier.load(tmp_path / "a.safetensors", out={"w": there})
    with pytest.raises(nvtier.InvalidArgument, match="stream of 0"):
        nvtier.save({"w": Interface(values, "__cuda_array_interface__", version=3, stream=0)}, tmp_path / "b.safetensors")


def test_an_old_cuda_driver_is_told_by_its_version_and_the_one_that_is_needed(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a stand-in for an old libcuda")
    write(tmp_path / "a.safetensors", {"a": 10})
    for version, match in ((10020, "it is of CUDA 10.2; of CUDA 11.4 or newer"), (11080, "it is of CUDA 11.8 by its own word, and lacks cuInit")):
        folder = tmp_path / str(version)
        folder.mkdir()
        code = f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}"
        subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libcuda.so.1"], input=code.encode(), check=True)
        said = python(
            "import nvtier, sys\ntry:\n    nvtier.load(sys.argv[1], device='cuda:0')\nexcept nvtier.OldDriver as error:\n    print(error)",
            tmp_path / "a.safetensors",
            env={"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"},
        )
        assert match in said, said


def test_a_background_load_waits_for_foreground_ones(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    raw = write(first, {"a": 3 * MIB})
    write(second, {"b": 3 * MIB}, seed=1)
    begun, go_on, told = threading.Event(), threading.Event(), []

    def hold(done, total):
        begun.set()
        assert go_on.wait(60)

    foreground = threading.Thread(target=lambda: told.append(array(nvtier.load(first, progress=hold)["a"]) == raw["a"]))
    foreground.start()
    try:
        assert begun.wait(60)
        # It is not begun while the other one runs: its deadline is over before that one is.
        with pytest.raises(nvtier.Timeout, match="0 of"):
            nvtier.load(second, priority="background", deadline=0.3)
        assert not told
        # One of the same priority does not wait.
        assert len(nvtier.load(second)) == 1 and not told
    finally:
        go_on.set()
        foreground.join()
    assert told == [True]
    assert len(nvtier.load(second, priority="background")) == 1
    with pytest.raises(nvtier.InvalidArgument, match="priority"):
        nvtier.load(second, priority="high")


def test_what_the_ram_tier_has_is_not_read_again(tmp_path):
    path = tmp_path / "pool"
    nvtier.format(path, raw=True, size=128 * MIB)
    write(tmp_path / "a.safetensors", {"a": 5 * MIB, "b": 3 * MIB})
    with nvtier.Pool(path, ram=64 * MIB) as pool:
        pool.import_file(tmp_path / "a.safetensors", "m.safetensors")
        wanted = nvtier.load(tmp_path / "a.safetensors")
        same = lambda loaded: all(array(loaded[name]) == array(wanted[name]) for name in wanted)  # noqa: E731
        cold = pool.load("m.safetensors")
        assert same(cold) and cold.report["tier_bytes"] < MIB and cold.report["reads"] > 0
        assert pool.warm("m.safetensors") >= 8 * MIB
        warm = pool.load("m.safetensors")
        report = warm.report
        assert same(warm) and report["tier_bytes"] == report["bytes"] == 8 * MIB and report["reads"] == 0
        with pool.region("m.safetensors") as region:
            assert region.load().report["tier_bytes"] == 8 * MIB
        assert nvtier.load(tmp_path / "a.safetensors").report["tier_bytes"] == 0
        # New content is not the old one.
        write(tmp_path / "a.safetensors", {"a": 5 * MIB, "b": 3 * MIB}, seed=2)
        pool.import_file(tmp_path / "a.safetensors", "m.safetensors")
        wanted = nvtier.load(tmp_path / "a.safetensors")
        assert same(pool.load("m.safetensors"))
    # A pool that is opened for one load has nothing, and a directory's tier is the page cache.
    assert nvtier.load("m.safetensors", pool=path).report["tier_bytes"] == 0
    nvtier.format(tmp_path / "directory")
    with nvtier.Pool(tmp_path / "directory", ram=64 * MIB) as pool:
        pool.import_file(tmp_path / "a.safetensors", "m.safetensors")
        assert pool.warm("m.safetensors") == 0 and pool.load("m.safetensors").report["tier_bytes"] == 0
