"""safetensors with the mount as working directory: everything that its own suite promises of files."""

import hashlib
import os
import pathlib

import pytest

from conftest import same_act

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402

TORCH_DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
]  # fmt: skip
NUMPY_DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]


def inside(folder, function):
    """Runs with the folder as working directory, so that every name is relative."""
    os.chdir(folder)
    result = function()
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in pathlib.Path().iterdir()}
    return result, files


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


def torch_round_trip():
    for shape in [(3, 5), (1,), (), (0,), (2, 0, 3), (7, 1, 2, 2)]:
        for dtype in TORCH_DTYPES:
            size = int(np.prod(shape, dtype=np.int64))
            tensor = (torch.arange(size, dtype=torch.float32) % 2).reshape(shape).to(getattr(torch, dtype))
            name = f"{dtype}-{'x'.join(map(str, shape))}.safetensors"
            safetensors.torch.save_file({"t": tensor}, name, metadata={"format": "pt", "shape": str(shape)})
            loaded = safetensors.torch.load_file(name)["t"]
            assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
            assert bits(loaded.reshape(-1)) == bits(tensor.reshape(-1)), name
            with safetensors.safe_open(name, framework="pt") as file:
                assert file.metadata() == {"format": "pt", "shape": str(shape)}
                assert list(file.keys()) == ["t"]


def test_every_torch_dtype_and_shape(mount, native):
    same_act(mount, native, inside, torch_round_trip)


def numpy_round_trip():
    arrays = {d: np.arange(60).reshape(3, 4, 5).astype(d) for d in NUMPY_DTYPES}
    safetensors.numpy.save_file(arrays, "all.safetensors")
    loaded = safetensors.numpy.load_file("all.safetensors")
    assert set(loaded) == set(arrays)
    assert all(np.array_equal(loaded[d], arrays[d]) and loaded[d].dtype == arrays[d].dtype for d in arrays)
    with safetensors.safe_open("all.safetensors", framework="np") as file:
        part = file.get_slice("float32")
        assert part.get_shape() == [3, 4, 5] and part.get_dtype() == "F32"
        for cut in [np.s_[1:], np.s_[:, 1:3], np.s_[2, :, 4:], np.s_[0:0], np.s_[:, :, :]]:
            assert np.array_equal(part[cut], arrays["float32"][cut])
    raw = safetensors.numpy.save(arrays)
    assert pathlib.Path("all.safetensors").read_bytes() == raw


def test_every_numpy_dtype_and_slices(mount, native):
    same_act(mount, native, inside, numpy_round_trip)


def shared_tensors():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(20, 20, bias=False)
            self.b = torch.nn.Linear(20, 20, bias=False)
            self.b.weight = self.a.weight

    torch.manual_seed(1)
    model, other = Tied(), Tied()
    safetensors.torch.save_model(model, "tied.safetensors")
    missing, unexpected = safetensors.torch.load_model(other, "tied.safetensors")
    assert torch.equal(model.a.weight, other.b.weight)
    try:
        safetensors.torch.save_file(model.state_dict(), "refused.safetensors")
    except RuntimeError as error:
        assert "share memory" in str(error)
    else:
        raise AssertionError("tensors that share memory were saved")
    return sorted(missing), sorted(unexpected)


def test_shared_tensors(mount, native):
    same_act(mount, native, inside, shared_tensors)


def replaced():
    """Saved over again while open, as a training loop does; grown, shrunk and appended to."""
    for rows in [1000, 3000, 10]:
        safetensors.torch.save_file({"t": torch.full((rows, 100), float(rows))}, "again.safetensors")
        with safetensors.safe_open("again.safetensors", framework="pt") as file:
            tensor = file.get_tensor("t")
            assert tensor.shape == (rows, 100) and bool((tensor == rows).all())
            del tensor


def test_saved_over_again(mount, native):
    same_act(mount, native, inside, replaced)


def damaged():
    """A damaged file is refused in the same words as on any file system."""
    safetensors.numpy.save_file({"t": np.arange(1000.0)}, "good.safetensors")
    good = pathlib.Path("good.safetensors").read_bytes()
    header = int.from_bytes(good[:8], "little")
    cases = {
        "cut": good[:-1],
        "longer": good + b"x",
        "empty": b"",
        "short": good[:7],
        "headerless": good[:8],
        "endless": (2**63).to_bytes(8, "little") + good[8:],
        "not-json": good[:8] + b"[" + good[9:],
        "not-utf8": good[:9] + b"\xff" + good[10:],
        "beyond": good[:8] + good[8 : 8 + header].replace(b"8000", b"9000") + good[8 + header :],
    }
    words = {}
    for name, data in cases.items():
        pathlib.Path(name).write_bytes(data)
        try:
            with safetensors.safe_open(name, framework="np"):
                words[name] = "opened"
        except Exception as error:  # the kind is part of the result
            words[name] = f"{type(error).__name__}: {error}"
    assert "opened" not in words.values()
    return words


def test_damaged_files_are_refused_alike(mount, native):
    same_act(mount, native, inside, damaged)
