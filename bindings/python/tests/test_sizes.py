"""Sizes as people write them."""

import pytest

import nvtier
from nvtier._sizes import size_of


@pytest.mark.parametrize(
    "text, bytes_",
    [("0", 0), ("4096", 4096), ("20GiB", 20 << 30), ("20GB", 20 * 10**9), ("20g", 20 * 10**9), (" 1.5 TiB ", 3 << 39), ("3k", 3000), ("7MiB", 7 << 20), (5, 5)],
)
def test_sizes(text, bytes_):
    assert size_of("ram", text) == bytes_


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 2", "3PB", "0x10", "1e9", "nan", True, 1.5, [], -1])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(nvtier.InvalidArgument, match="ram="):
        size_of("ram", text)


def test_a_store_takes_them(tmp_path):
    nvtier.format(tmp_path / "pool")
    with nvtier.kv.Store(tmp_path / "pool", budget="200MB", ram="16MiB") as store:
        assert store.memory()["budget_bytes"] == 16 << 20
        space = store.namespace(b"x" * 32, 4096)
        assert space.stat()["budget_bytes"] == 200 * 10**6
        space.set_quota("1MB")
    with pytest.raises(nvtier.InvalidArgument, match="budget='much'"):
        nvtier.kv.Store(tmp_path / "pool", budget="much")
    with pytest.raises(nvtier.InvalidArgument, match="at least 1 MiB"):
        nvtier.kv.Store(tmp_path / "pool", ram="1k")
