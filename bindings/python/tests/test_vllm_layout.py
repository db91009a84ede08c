"""How the connector of `nvtier.vllm` finds blocks in tensors of attention backends. Needs torch and no vLLM; with a CUDA device, also there."""

import time

import pytest

import nvtier
from nvtier import _nvtier

torch = pytest.importorskip("torch")

from nvtier._vllm_layout import Layout  # noqa: E402


def layouts(blocks, device="cpu"):
    """Tensors as attention backends have them, whose blocks hold 2 x 3 heads x 16 tokens x 8 numbers."""
    numbers = blocks * 2 * 3 * 16 * 8
    flat = torch.arange(numbers, dtype=torch.float32, device=device)
    return {
        "pages": flat.clone().view(blocks, 3, 16, 16),
        "keys, then values": flat.clone().view(2, blocks, 16, 3, 8),
        "keys beside values": flat.clone().view(blocks, 2, 16, 3, 8),
        "heads first": flat.clone().view(blocks, 2, 3, 16, 8).permute(0, 1, 3, 2, 4),
        "small pages": flat.clone().view(blocks * 2, 2, 8, 3, 8),
    }


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request):
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param


@pytest.mark.parametrize("name", layouts(1))
def test_every_layout_gives_its_blocks_back(tmp_path, name, device):
    blocks = 12
    pool = tmp_path / "pool"
    nvtier.format(pool)
    caches = {f"layer{n}": layouts(blocks, device)[name] + n * 1e6 for n in range(3)}
    expected = {layer: cache.clone() for layer, cache in caches.items()}
    layout = Layout(caches, blocks)
    assert layout.block_bytes == 3 * 2 * 3 * 16 * 8 * 4
    assert f"12 blocks of {layout.block_bytes} bytes" in layout.describe() and layout.device in layout.describe()

    def index(block):
        """The block's part of a tensor."""
        if name == "keys, then values":
            return slice(None), block
        return slice(block * 2, block * 2 + 2) if name == "small pages" else block

    with nvtier.kv.Store(pool, budget=64 << 20, ram=8 << 20) as store:
        tier = _nvtier.KvTier(store._inner, layout.keep, layout.device, layout.planes, layout.shape, layout.block_bytes, b"f" * 32, 2, 10.0)
        finish(device)
        tier.store(1, "", [b"a", b"b", b"c"], [3, 7, 0])
        assert finished(tier) == (1, True)
        for cache in caches.values():
            cache.zero_()
        finish(device)
        # To other places than they were stored from.
        tier.load(2, "", [b"b", b"a", b"nobody's"], [3, 5, 6])
        assert finished(tier) == (2, False)
        tier.close()
    for layer, cache in caches.items():
        for block in range(blocks):
            source = {3: 7, 5: 3}.get(block)
            want = torch.zeros_like(cache[index(block)]) if source is None else expected[layer][index(source)]
            assert torch.equal(cache[index(block)], want), (layer, block)


def finish(device):
    """What torch began must have ended: the connector waits for an event."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def finished(tier):
    tier.drain()
    for _ in range(10_000):
        for job, success, *_ in tier.finished():
            return job, success
        time.sleep(0.001)
    raise AssertionError("the job does not end")


def test_layouts_that_mean_something_else_differ_and_strange_ones_are_refused():
    digests = {name: Layout({"l": cache}, 12).digest for name, cache in layouts(12).items()}
    assert len(set(digests.values())) == len(digests)
    assert Layout({"l": layouts(24)["pages"]}, 24).digest == digests["pages"], "the number of blocks is no matter"
    gaps = torch.zeros(12, 3, 32, 16)[:, :, ::2]
    with pytest.raises(nvtier.NotSupported, match="gaps"):
        Layout({"l": gaps}, 12)
    with pytest.raises(nvtier.NotSupported, match="does not know"):
        Layout({"l": torch.zeros(5, 7)}, 12)
    with pytest.raises(nvtier.NotSupported, match="alike"):
        Layout({"a": torch.zeros(12, 4), "b": torch.zeros(12, 8)}, 12)
