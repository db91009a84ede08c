"""numpy: memmaps, and the tensors of a file as .npy files of their own."""

import hashlib
import os

import pytest

from conftest import in_child, same_act

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def maps(folder):
    """np.memmap in every mode, against plain reads."""
    path = folder / "array.bin"
    written = np.memmap(path, dtype="<f4", mode="w+", shape=(700, 801))
    written[:] = np.arange(written.size, dtype="<f4").reshape(written.shape)
    written.flush()
    updated = np.memmap(path, dtype="<f4", mode="r+", shape=(700, 801))
    updated[5, 6] = -1
    updated.flush()
    copied = np.memmap(path, dtype="<f4", mode="c", shape=(700, 801))
    copied[0, 0] = 12345
    read = np.memmap(path, dtype="<f4", mode="r", offset=4096, shape=(1000,))
    assert np.array_equal(read, np.asarray(updated).ravel()[1024:2024])
    return sha(path.read_bytes()), float(read[3])


def test_memmap_modes(mount, native):
    same_act(mount, native, maps)


def saved(folder):
    np.save(folder / "a.npy", np.arange(12345, dtype=np.int32).reshape(5, -1))
    np.savez(folder / "b.npz", x=np.ones((3, 4)), y=np.zeros(0))
    mapped = np.load(folder / "a.npy", mmap_mode="r")
    with np.load(folder / "b.npz") as archive:
        total = float(archive["x"].sum()) + archive["y"].size
    return sha((folder / "a.npy").read_bytes()), int(mapped[4, 7]), total


def test_save_and_load(mount, native):
    same_act(mount, native, saved)


def tensors():
    rng = np.random.default_rng(20261124)
    made = {f"layer.0.{d}": (rng.random((33, 17)) * 100).astype(d) for d in DTYPES}
    made["scalar"] = np.array(7, dtype="int32")
    made["vector"] = np.arange(100_001, dtype="float32")
    made["empty"] = np.zeros((0, 3), dtype="float32")
    return made


def views(root, path):
    """Each tensor of a safetensors file through its own .npy file, mapped."""
    folder = root / ".tensors" / path.relative_to(root)
    names = sorted(os.listdir(folder))
    result = {}
    for name in names:
        file = folder / name
        # numpy cannot map an array of no bytes, on any file system.
        array = np.load(file, mmap_mode="r") if "empty" not in name else np.load(file)
        result[name.removesuffix(".npy")] = (str(array.dtype), array.shape, sha(array.tobytes()))
    return result


def test_tensor_views(place, mount):
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("a plain folder has no .tensors")
    path = mount / "all.safetensors"
    safetensors_numpy.save_file(tensors(), path)
    expected = {name: (str(a.dtype), a.shape, sha(a.tobytes())) for name, a in tensors().items()}
    assert in_child(views, place.root, path) == expected


def bits(root, path, names):
    folder = root / ".tensors" / path.relative_to(root)
    return {name: sha(np.load(folder / f"{name}.npy", mmap_mode="r").tobytes()) for name in names}


def test_tensor_views_of_a_bfloat16_model(place, model_on_mount):
    """numpy has no bfloat16: its views give the same bits under a type of the same width."""
    torch = pytest.importorskip("torch")
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("a plain folder has no .tensors")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = sorted((model_on_mount / "snapshot").glob("*.safetensors"))[0]

    def expect(path):
        loaded = safetensors_torch.load_file(path)
        return {name: sha(t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in loaded.items()}

    expected = in_child(expect, path)
    assert in_child(bits, place.root, path, list(expected)) == expected


def test_tensor_views_are_read_only_and_refuse_orderly(place, mount):
    if os.environ.get("NVTIER_PLAIN"):
        pytest.skip("a plain folder has no .tensors")
    path = mount / "x.safetensors"
    safetensors_numpy.save_file({"w": np.zeros(10, dtype="float32")}, path)
    view = place.root / ".tensors" / path.relative_to(place.root) / "w.npy"
    assert view.stat().st_size >= 40
    with pytest.raises(OSError):
        open(view, "r+b").close()
    with pytest.raises(OSError):
        os.unlink(view)
    with pytest.raises(FileNotFoundError):
        open(view.with_name("nothing.npy"), "rb").close()
    assert np.array_equal(safetensors_numpy.load_file(path)["w"], np.zeros(10, dtype="float32"))
