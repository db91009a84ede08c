"""What vLLM's connector calls blocks by, and what its scheduler's half does while a drive hangs: the connector's two halves in one process, driven
with vLLM's own requests, adapters and pictures, as its scheduler and its worker drive them. No model runs; `test_vllm_connector.py` has whole
engines."""

import json
import os
import pathlib
import time
import uuid
from types import SimpleNamespace

import pytest
from common import LIMIT_S, MIB, StallingDrive, safetensors

import nvtier
import nvtier.vllm

torch = pytest.importorskip("torch")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
try:
    from nvtier._vllm_connector import NvtierConnector
    from vllm import EngineArgs, SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request
except ImportError as error:
    # The suite that brings this vLLM must not pass without it.
    if os.environ.get("NVTIER_SUITE", "") == "vllm026":
        raise
    pytest.skip(f"no vLLM 0.26 here: {error}", allow_module_level=True)

BLOCK, LAYERS, BLOCKS = 16, 3, 32
#: Tokens of six whole blocks and some more.
PROMPT = list(range(1000, 1000 + 6 * BLOCK + 5))


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    return tmp_path / "pool"


class Connector:
    """Both halves, with memory of their own."""

    def __init__(self, pool, **extra):
        from vllm_engine import arguments

        folder = os.environ.get("NVTIER_MODEL")
        if not folder:
            pytest.skip("no model: NVTIER_MODEL is not set")
        order = {
            "model": str(pathlib.Path(folder) / "snapshot"),
            "extra": {"pool": str(pool), "budget": 64 * MIB, "ram": 8 * MIB, "fingerprint": "f", **extra},
        }
        config = EngineArgs(**arguments(order)).create_engine_config()
        names = [f"layer{n}" for n in range(LAYERS)]
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
        caches = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])
        self.scheduler = NvtierConnector(config, KVConnectorRole.SCHEDULER, caches)
        self.worker = NvtierConnector(config, KVConnectorRole.WORKER, caches)
        self.memory = {name: torch.zeros(BLOCKS, 2, BLOCK, 2, 64) for name in names}
        self.worker.register_kv_caches(self.memory)
        self.scheduler.set_xfer_handshake_metadata({0: self.worker.get_handshake_metadata()})

    def close(self):
        self.scheduler.shutdown()
        self.worker.shutdown()

    def matched(self, request, watch=lambda: None):
        """What a scheduler is told when it has asked often enough: tokens that can be loaded."""
        end = time.monotonic() + LIMIT_S
        while True:
            tokens, later = self.scheduler.get_num_new_matched_tokens(request, 0)
            watch()
            if tokens is not None:
                assert later == (tokens > 0)
                return tokens
            assert time.monotonic() < end, "it is never told"
            time.sleep(0.001)

    def step(self, request, computed):
        """A step that has a request's first blocks to load, or computes the others."""
        output = SchedulerOutput.make_empty()
        if computed:
            request.num_computed_tokens = 0
            output.scheduled_new_reqs = [NewRequestData.from_request(request, block_ids=(blocks(request),))]
            output.total_num_scheduled_tokens = request.num_prompt_tokens
            output.num_scheduled_tokens = {request.request_id: request.num_prompt_tokens}
        meta = self.scheduler.build_connector_meta(output)
        self.worker.bind_connector_metadata(meta)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        self.worker.clear_connector_metadata()

    def allocate(self, request, external):
        self.scheduler.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: (blocks(request),)), external)

    def finished(self, over, watch=lambda: None):
        """What the worker has to tell: requests whose stores are through, and whose loads are."""
        end = time.monotonic() + LIMIT_S
        while True:
            stored, came = self.worker.get_finished(over)
            watch()
            if stored or came:
                return stored, came
            assert time.monotonic() < end, "nothing is ever finished"
            time.sleep(0.001)

    def compute(self, request):
        """Computes a prompt, and stores its blocks; says how many tokens were there before."""
        before = self.matched(request)
        self.allocate(request, 0)
        self.step(request, True)
        if self.scheduler.request_finished(request, blocks(request))[0]:
            assert self.finished({request.request_id})[0] == {request.request_id}
        return before

    def ask(self, request):
        """How many tokens of a prompt could be loaded."""
        tokens = self.matched(request)
        self.scheduler.request_finished(request, [])
        return tokens


def blocks(request):
    return list(range(1, 2 + request.num_prompt_tokens // BLOCK))


def request(tokens=PROMPT, **more):
    return Request(f"r{uuid.uuid4().hex}", list(tokens), SamplingParams(max_tokens=4), None, **more)


def picture(content, offset, length, modality="image"):
    """A picture, as vLLM's scheduler sees one: by a hash of its content, and where it is."""
    return MultiModalFeatureSpec(data=None, modality=modality, identifier=content, mm_position=PlaceholderRange(offset=offset, length=length))


@pytest.fixture
def connector(pool):
    connector = Connector(pool)
    yield connector
    connector.close()


WHOLE = 6 * BLOCK


def test_pictures_are_part_of_the_names_of_their_blocks_and_all_behind_them(connector):
    # In the third and the fourth block.
    cat, dog = picture("hash of a cat", 2 * BLOCK + 3, 20), picture("hash of a dog", 2 * BLOCK + 3, 20)
    assert connector.compute(request(mm_features=[cat])) == 0
    assert connector.ask(request(mm_features=[picture("hash of a cat", 2 * BLOCK + 3, 20)])) == WHOLE
    # What is before it does not depend on it; what is behind it does, though it has the same tokens.
    assert connector.ask(request(mm_features=[dog])) == 2 * BLOCK
    assert connector.ask(request()) == 2 * BLOCK
    assert connector.ask(request(mm_features=[picture("hash of a cat", 2 * BLOCK + 4, 20)])) == 2 * BLOCK
    assert connector.ask(request(mm_features=[picture("hash of a cat", 2 * BLOCK + 3, 20, "audio")])) == 2 * BLOCK
    assert connector.ask(request(PROMPT[: 4 * BLOCK + 1], mm_features=[cat])) == 4 * BLOCK
    # Without a picture, before and after.
    assert connector.compute(request(mm_features=[dog])) == 2 * BLOCK
    assert connector.ask(request(mm_features=[dog])) == connector.ask(request(mm_features=[cat])) == WHOLE
    # Two of them, of which one is at the border of blocks and one in the last block, which is not whole.
    both = [picture("hash of a cat", 0, BLOCK), picture("hash of a dog", WHOLE + 1, 2)]
    assert connector.compute(request(mm_features=both)) == 0
    assert connector.ask(request(mm_features=[both[1], both[0]])) == WHOLE
    assert connector.ask(request(mm_features=both[:1])) == WHOLE
    assert connector.ask(request(mm_features=both[1:])) == 2 * BLOCK, "it is behind all whole blocks"


def adapter(folder, seed=0, **config):
    """Files of a LoRA adapter, as peft makes them."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    raw = {f"base_model.model.layers.{n}.lora_A.weight": torch.rand(4, 8, generator=generator).numpy().tobytes() for n in range(2)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors({name: ("F32", [4, 8], bytes_) for name, bytes_ in raw.items()}))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return str(folder)


def test_adapters_are_known_by_their_bytes_and_their_scale(connector, pool, tmp_path):
    first = adapter(tmp_path / "a")
    lora = LoRARequest("sql", 1, first)
    assert connector.compute(request(lora_request=lora)) == 0
    assert connector.ask(request(lora_request=lora)) == WHOLE
    assert connector.ask(request()) == 0
    # The same adapter under other names; and other ones under the same name.
    assert connector.ask(request(lora_request=LoRARequest("other", 2, adapter(tmp_path / "copy")))) == WHOLE
    assert connector.ask(request(lora_request=LoRARequest("sql", 3, adapter(tmp_path / "weights", seed=1)))) == 0
    assert connector.ask(request(lora_request=LoRARequest("sql", 4, adapter(tmp_path / "scale", lora_alpha=16)))) == 0
    assert connector.ask(request(lora_request=LoRARequest("sql", 5, adapter(tmp_path / "kind", use_rslora=True)))) == 0
    # With a picture as well.
    cat = picture("cat", 0, 5)
    assert connector.ask(request(lora_request=lora, mm_features=[cat])) == 0
    # It is another one by now, and vLLM may have either in memory: nothing is found, and nothing is stored.
    adapter(tmp_path / "a", seed=7)
    assert connector.ask(request(lora_request=lora)) == 0
    assert connector.compute(request(lora_request=lora)) == connector.compute(request(lora_request=lora)) == 0
    # Nor of one that replaces another one in a running engine, nor of one that is not here.
    for odd in (LoRARequest("sql", 6, first, load_inplace=True), LoRARequest("sql", 7, str(tmp_path / "nowhere"))):
        assert connector.compute(request(lora_request=odd)) == connector.ask(request(lora_request=odd)) == 0
    connector.close()
    # After a restart the files are what vLLM reads.
    again = Connector(pool)
    try:
        assert again.ask(request(lora_request=LoRARequest("sql", 1, first))) == 0
        adapter(tmp_path / "a")
        assert again.ask(request(lora_request=LoRARequest("sql", 9, adapter(tmp_path / "again")))) == WHOLE
    finally:
        again.close()


def test_an_adapter_on_a_drive_that_hangs_holds_nobody_up(pool, tmp_path):
    drive = StallingDrive(tmp_path, 256 * MIB)
    connector = None
    try:
        # Files of the mount: whoever looks at them waits for the daemon.
        folder = adapter(drive.pool.parent / "adapter")
        connector = Connector(pool, deadline=1.0)
        assert connector.compute(request()) == 0

        def watch():
            assert not drive.answers, "it came only when the drive answered again"

        drive.stop()
        lora = LoRARequest("sql", 1, folder)
        asked = request(lora_request=lora)
        assert connector.scheduler.get_num_new_matched_tokens(asked, 0) == (None, False)
        assert connector.matched(request(), watch) == WHOLE, "others go on meanwhile"
        assert connector.matched(asked, watch) == 0
        # The next one is not made to wait as long.
        assert connector.scheduler.get_num_new_matched_tokens(request(lora_request=lora), 0) == (0, False)
        watch()
        drive.go_on()
        end = time.monotonic() + LIMIT_S
        while connector.compute(request(lora_request=lora)) != WHOLE:
            assert time.monotonic() < end, "it is never known"
    finally:
        drive.go_on()
        if connector is not None:
            connector.close()
        drive.close()


def test_prompts_of_embeddings_have_no_names(connector):
    embeds = torch.zeros(len(PROMPT), 8)
    odd = Request("e", None, SamplingParams(max_tokens=4), None, prompt_embeds=embeds)
    assert connector.ask(odd) == 0


def test_a_drive_that_hangs_costs_a_scheduler_no_step(tmp_path):
    drive = StallingDrive(tmp_path, 256 * MIB)
    connector = None
    try:
        connector = Connector(drive.pool, deadline=1.0)
        assert connector.compute(request()) == 0

        def watch():
            assert not drive.answers, "it came only when the drive answered again"

        drive.stop()
        # What is there is known without the drive; the load begins, and the steps of others go on.
        asked = request()
        assert connector.matched(asked, watch) == WHOLE
        connector.allocate(asked, WHOLE)
        connector.step(asked, False)
        other = request(range(5000, 5000 + 3 * BLOCK))
        assert connector.matched(other, watch) == 0
        connector.allocate(other, 0)
        # The deadline makes misses of it: vLLM computes these blocks.
        assert connector.finished(set(), watch)[1] == {asked.request_id}
        bad = connector.worker.get_block_ids_with_load_errors()
        assert bad == set(blocks(asked)[:6])
        connector.scheduler.update_connector_output(KVConnectorOutput(finished_recving={asked.request_id}, invalid_block_ids=bad))
        assert connector.matched(asked, watch) == 0
        assert connector.matched(request(), watch) == 0, "the next one is told so at once"
        connector.scheduler.get_kv_connector_stats()
        # A reset waits for nobody either.
        assert connector.scheduler.reset_cache() is True
        connector.scheduler.request_finished(asked, blocks(asked))
        watch()
        drive.go_on()
    finally:
        drive.go_on()
        if connector is not None:
            connector.close()
        drive.close()
