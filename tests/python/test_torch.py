"""torch: checkpoints, mapped loads, files as storage."""

import hashlib

import pytest

from conftest import in_child, same_act

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
import safetensors.torch  # noqa: E402


def digest(tensor):
    """Of the bytes, whatever the dtype."""
    flat = tensor.detach().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


def checkpoint():
    """A training state as people save them: nested, several dtypes, shared storage."""
    generator = torch.Generator().manual_seed(20261124)
    weight = torch.randn(1500, 1501, generator=generator)
    return {
        "model": {"weight": weight, "view": weight[3:7], "half": weight[:9].to(torch.bfloat16)},
        "optimizer": {"step": 7, "moments": [torch.randn(3, 5, generator=generator) for _ in range(3)]},
        "empty": torch.empty(0, 4),
    }


def flatten(value, prefix=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flatten(item, f"{prefix}/{i}").items()}
    return {prefix: digest(value) if torch.is_tensor(value) and value.numel() else str(value)}


def save_and_map(folder):
    path = folder / "state.pt"
    torch.save(checkpoint(), path)
    mapped = torch.load(path, mmap=True, weights_only=True)
    result = flatten(mapped)
    assert result == flatten(checkpoint())
    assert any(str(path) in line for line in open("/proc/self/maps")), "torch did not map the file"
    return result, hashlib.sha256(path.read_bytes()).hexdigest()


def test_save_and_mapped_load(mount, native):
    same_act(mount, native, save_and_map)


def overwrite_while_mapped(folder):
    """A new checkpoint renamed over one that a reader has mapped: the reader keeps the old bytes."""
    path, new = folder / "state.pt", folder / "state.pt.tmp"
    torch.save({"x": torch.arange(100_000)}, path)
    mapped = torch.load(path, mmap=True, weights_only=True)
    torch.save({"x": torch.arange(100_000) * 3}, new)
    new.rename(path)
    fresh = torch.load(path, mmap=True, weights_only=True)
    return digest(mapped["x"]) == digest(torch.arange(100_000)), digest(fresh["x"])


def test_a_mapped_checkpoint_survives_its_replacement(mount, native):
    kept, _ = same_act(mount, native, overwrite_while_mapped)
    assert kept


def storage_in_a_file(folder):
    path = folder / "storage.bin"
    count = 300_001
    shared = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    shared.copy_(torch.arange(count, dtype=torch.float32))
    shared[17] = -1.0
    private = torch.from_file(str(path), shared=False, size=count, dtype=torch.float32)
    private[0] = 99.0  # stays in this process
    assert path.stat().st_size == count * 4
    return digest(shared), hashlib.sha256(path.read_bytes()).hexdigest()


def test_from_file_shared_and_private(mount, native):
    in_memory, in_file = same_act(mount, native, storage_in_a_file)
    assert in_memory == in_file


def open_every_tensor(snapshot):
    """Every tensor of every shard by safe_open, whole and as slices."""
    found = {}
    for shard in sorted(snapshot.glob("*.safetensors")):
        with safetensors.safe_open(shard, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                found[name] = (str(tensor.dtype), list(tensor.shape), digest(tensor))
                rows = file.get_slice(name)
                middle = tensor.shape[0] // 2
                assert torch.equal(rows[middle:], tensor[middle:])
        loaded = safetensors.torch.load_file(shard)
        assert all(found[name][2] == digest(tensor) for name, tensor in loaded.items())
    return found


def test_safe_open_of_a_real_checkpoint(model_on_mount, model):
    expected = in_child(open_every_tensor, model / "snapshot")
    assert len(expected) == 272
    assert in_child(open_every_tensor, model_on_mount / "snapshot") == expected
