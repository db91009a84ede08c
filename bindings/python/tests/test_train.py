"""nvtier.train: the numbers of plain PyTorch, bit for bit, with one block of many on the device; resumes after kill -9; bad input."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()

import nvtier.train  # noqa: E402
from nvtier.train import _planes as planes  # noqa: E402

ADAMW = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
VOCABULARY = 211


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool(tmp_path):
    nvtier.format(tmp_path / "pool")
    with nvtier.Pool(tmp_path / "pool") as pool:
        yield pool


def llama(seed=0, tie=True, layers=6, precision="fp32", dropout=0.1):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=168,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = hf.LlamaForCausalLM(config)
    model.config.use_cache = False
    return (model.bfloat16() if precision == "bf16" else model).train()


def train(model, optimizer, steps, *, micro=1, clip=None, precision="fp32", first=0, schedule=None, each=None):
    """A training loop as anybody would write it, for either optimizer. Losses and norms."""
    seen = []
    for step in range(first, steps):
        for part in range(micro):
            generator = torch.Generator().manual_seed(1000 * step + part)
            ids = torch.randint(0, VOCABULARY, (2, 16), generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
                loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
            seen.append(loss.item())
        if clip is not None:
            ours = isinstance(optimizer, nvtier.train.Optimizer)
            norm = optimizer.clip_grad_norm_(clip) if ours else torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            seen.append(norm.item())
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        if each is not None:
            each(step)
    return seen


def compare(model, plain, optimizer):
    """All parameters and both moments, bit for bit; nothing is within a tolerance."""
    wanted = dict(model.named_parameters())
    names = []
    for name, weight in optimizer.weights():
        names.append(name)
        assert weight.dtype == wanted[name].dtype
        assert torch.equal(weight, wanted[name].detach()), name
    assert sorted(names) == sorted(wanted)
    for name, steps, m, v in optimizer.moments():
        state = plain.state.get(wanted[name])
        if not state:
            assert steps == 0, name
            continue
        assert steps == int(state["step"]), name
        assert torch.equal(m, state["exp_avg"]), name
        assert torch.equal(v, state["exp_avg_sq"]), name


CASES = [
    # precision, micro-batches, clip, checkpointing, tied
    ("fp32", 1, None, True, True),
    ("fp32", 4, 1.0, True, True),
    ("fp32", 4, 0.5, False, False),
    ("mixed", 1, 0.5, True, False),
    ("mixed", 4, 1.0, True, True),
    ("mixed", 1, None, False, False),
    ("bf16", 4, 1.0, True, False),
    ("bf16", 1, None, True, True),
]


@pytest.mark.parametrize("precision,micro,clip,checkpointing,tied", CASES)
def test_the_numbers_are_plain_pytorchs(pool, precision, micro, clip, checkpointing, tied):
    reference = llama(tie=tied, precision=precision)
    model = copy.deepcopy(reference)
    for one in (reference, model):
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    wanted = train(reference, plain, 20, micro=micro, clip=clip, precision=precision)

    needs = nvtier.train.plan(model, precision=precision, accumulate=micro > 1)
    # One block of six and a part of another one are there at a time; some planes are kept in host memory.
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool, precision=precision, vram=needs["least_vram"], ram="600KiB", accumulate=micro > 1, **ADAMW
    )
    torch.manual_seed(5)
    assert train(model, optimizer, 20, micro=micro, clip=clip, precision=precision) == wanted
    compare(reference, plain, optimizer)
    stats = optimizer.stats()
    assert stats["device_peak_bytes"] <= needs["least_vram"] < needs["state"] / 2, (stats, needs)
    assert stats["ram_bytes"] > 0 and stats["drive_read_bytes"] > stats["ram_bytes"] / 2
    optimizer.close()


def test_another_kernel_is_told_apart(pool):
    """The control of the test above: AdamW of another implementation, which differs in the last bits, does not pass."""
    reference = llama()
    model = copy.deepcopy(reference)
    plain = torch.optim.AdamW(reference.parameters(), fused=False, foreach=True, **ADAMW)
    torch.manual_seed(5)
    train(reference, plain, 5)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, **ADAMW)
    torch.manual_seed(5)
    train(model, optimizer, 5)
    with pytest.raises(AssertionError):
        compare(reference, plain, optimizer)


def test_schedules_groups_frozen_parameters_and_evaluation(pool):
    def groups(model):
        named = list(model.named_parameters())
        for name, parameter in named:
            parameter.requires_grad_("layers.1." not in name and "layers.3.mlp" not in name)
        norms = [parameter for name, parameter in named if "norm" in name and parameter.requires_grad]
        others = [parameter for name, parameter in named if "norm" not in name and parameter.requires_grad]
        return [{"params": norms, "weight_decay": 0.0}, {"params": others, "lr": 1e-3}]

    reference = llama(tie=False)
    model = copy.deepcopy(reference)
    reference_groups, model_groups = groups(reference), groups(model)
    plain = torch.optim.AdamW(reference_groups, fused=True, **ADAMW)
    ids = torch.arange(20).view(1, 20)

    def looks(model):
        seen = []

        def look(step):
            if step % 3 == 0:
                model.eval()
                with torch.no_grad():
                    seen.append(model(input_ids=ids, labels=ids).loss.item())
                model.train()

        return seen, look

    torch.manual_seed(6)
    wanted_seen, look = looks(reference)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 12)
    wanted = train(reference, plain, 20, micro=2, clip=1.0, schedule=schedule, each=look)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, param_groups=model_groups, **ADAMW)
    torch.manual_seed(6)
    seen, look = looks(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    assert train(model, optimizer, 20, micro=2, clip=1.0, schedule=schedule, each=look) == wanted
    assert seen == wanted_seen
    compare(reference, plain, optimizer)


def test_adapters_train_above_a_frozen_base(pool):
    """LoRA as it is usually made: two small matrices beside each linear layer, the base in bfloat16 and frozen."""

    class Adapted(torch.nn.Module):
        def __init__(self, base, seed):
            super().__init__()
            self.base = base
            generator = torch.Generator().manual_seed(seed)
            self.down = torch.nn.Parameter(torch.randn(4, base.in_features, generator=generator) * 0.1)
            self.up = torch.nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x):
            return self.base(x) + ((x.float() @ self.down.T) @ self.up.T).to(x.dtype)

    def adapted():
        model = llama(precision="bf16", tie=False)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for number, layer in enumerate(model.model.layers):
            if number != 2:
                layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, number)
                layer.mlp.up_proj = Adapted(layer.mlp.up_proj, 100 + number)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model

    reference, model = adapted(), adapted()
    plain = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], fused=True, **ADAMW)
    torch.manual_seed(7)
    wanted = train(reference, plain, 20, micro=2, clip=1.0)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, ram="100KiB", **ADAMW)
    torch.manual_seed(7)
    assert train(model, optimizer, 20, micro=2, clip=1.0) == wanted
    compare(reference, plain, optimizer)
    # The base is written once.
    assert optimizer.stats()["stored_bytes"] < 20 * nvtier.train.plan(adapted())["state"]


def test_parameters_without_gradients_are_left_alone(pool):
    """Experts that no token went to: no decay, no step, as in plain PyTorch."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.blocks = torch.nn.ModuleList(
                torch.nn.ModuleDict({f"e{i}": torch.nn.Linear(24, 24) for i in range(3)}) for _ in range(4)
            )
            for block in self.blocks:
                block.forward = lambda x, which, block=block: x + torch.tanh(block[f"e{which}"](x))

        def forward(self, x, which):
            for number, block in enumerate(self.blocks):
                if (which + number) % 4 != 3:
                    x = block(x, (which + number) % 3)
            return x.square().mean()

    def run(model, optimizer):
        seen = []
        for step in range(20):
            for part in range(2):
                x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step * 7 + part))
                loss = model(x, step * 5 + part)
                loss.backward()
                seen.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return seen

    reference, model = Mixture(), Mixture()
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    wanted = run(reference, plain)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, blocks=list(model.blocks), **ADAMW)
    assert run(model, optimizer) == wanted
    compare(reference, plain, optimizer)


def test_models_are_saved_as_stock_transformers_reads_them(pool, tmp_path):
    reference = llama()
    model = copy.deepcopy(reference)
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    train(reference, plain, 3)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, **ADAMW)
    torch.manual_seed(5)
    train(model, optimizer, 3)
    want = reference.state_dict()
    for most in (5 << 30, 100_000):
        folder = tmp_path / f"saved-{most}"
        optimizer.save_pretrained(folder, max_shard_bytes=most)
        back = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        have = back.state_dict()
        assert have.keys() == want.keys() and all(torch.equal(have[name], want[name]) for name in want)
        assert not [name for name in os.listdir(folder) if "part" in name]
    assert len([name for name in os.listdir(tmp_path / "saved-100000") if name.endswith(".safetensors")]) > 3
    state = model.state_dict()
    assert state.keys() == want.keys() and all(torch.equal(state[name], want[name]) for name in want)
    layer = model.model.layers[2].state_dict()
    assert all(torch.equal(layer[name], want[f"model.layers.2.{name}"]) for name in layer)


#: Trains in children of its own, one for each line that it is given; they need not import everything again.
NURSERY = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_train as t
import nvtier, nvtier.train
torch.set_num_threads(1)
_, _, pool, precision, steps, log = sys.argv

def run():
    model = t.llama(precision=precision, tie=False, layers=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool, precision=precision, ram="300KiB", resume="auto", **t.ADAMW)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    first = 0
    if optimizer.resumed:
        first = optimizer.resumed["next"]
        schedule.load_state_dict(optimizer.resumed["schedule"])
        assert optimizer.steps == first
    else:
        torch.manual_seed(5)
    with open(log, "a") as out:
        print(json.dumps({"from": first}), file=out, flush=True)
        for step in range(first, int(steps)):
            seen = t.train(model, optimizer, step + 1, micro=2, clip=1.0, precision=precision, first=step, schedule=schedule)
            optimizer.commit({"next": step + 1, "schedule": schedule.state_dict()})
            print(json.dumps({"step": step, "seen": seen}), file=out, flush=True)
    optimizer.close()

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def kill_at(child, when, round):
    """Kills a process a little after something, unless it ended before."""
    deadline = time.monotonic() + 120
    while not when() and time.monotonic() < deadline:
        time.sleep(0.002)
        if not os.path.exists(f"/proc/{child}"):
            return
    time.sleep(0.003 * (round * 7 % 11))
    try:
        os.kill(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_after_kill_it_goes_on_as_if_nothing_had_happened(tmp_path, precision):
    steps = 14
    reference = llama(precision=precision, tie=False, layers=4)
    reference.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    schedule = torch.optim.lr_scheduler.ExponentialLR(plain, 0.97)
    torch.manual_seed(5)
    wanted = [
        train(reference, plain, step + 1, micro=2, clip=1.0, precision=precision, first=step, schedule=schedule) for step in range(steps)
    ]
    nvtier.format(tmp_path / "pool")
    log = tmp_path / "log"

    def lines():
        return [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []

    arguments = [os.path.dirname(__file__), tmp_path / "pool", precision, steps, log]
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    kills, status = 0, -1
    try:
        for round in range(40):
            before = len([line for line in lines() if "step" in line])
            nursery.stdin.write("go\n")
            child = int(nursery.stdout.readline())
            # At some moment of some later step.
            until = before + 1 + round % 3
            kill = threading.Thread(target=kill_at, args=(child, lambda: len([line for line in lines() if "step" in line]) >= until, round))
            kill.start()
            status = int(nursery.stdout.readline())
            kill.join()
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
            kills += 1
    finally:
        nursery.stdin.close()
        nursery.wait(timeout=60)
    assert status == 0 and kills >= 4, (kills, status)
    done = {}
    for line in lines():
        if "from" in line:
            # What was reported before the kill was committed behind it: at most two steps are done again.
            assert line["from"] >= max(done, default=-1) - 1, (line, done.keys())
        else:
            assert line["seen"] == wanted[line["step"]], line["step"]
            done[line["step"]] = line["seen"]
    assert sorted(done) == list(range(steps))
    with nvtier.Pool(tmp_path / "pool") as pool:
        model, optimizer = nvtier.train.offload(
            llama(precision=precision, tie=False, layers=4, seed=9), torch.optim.AdamW, pool=pool, precision=precision, resume=True, **ADAMW
        )
        compare(reference, plain, optimizer)
        optimizer.close()
        assert nvtier.train.remove(pool, "run") and not nvtier.train.remove(pool, "run")


def test_a_pool_that_another_process_owns(tmp_path):
    """State goes through the owner then."""
    nvtier.format(tmp_path / "pool")
    code = "import nvtier, sys; p = nvtier.Pool(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pool")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "ready\n"
        reference = llama()
        model = copy.deepcopy(reference)
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        torch.manual_seed(5)
        wanted = train(reference, plain, 4)
        model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=tmp_path / "pool", **ADAMW)
        torch.manual_seed(5)
        assert train(model, optimizer, 4) == wanted
        compare(reference, plain, optimizer)
        optimizer.close()
    finally:
        owner.stdin.close()
        owner.wait(timeout=30)


def test_a_pool_that_is_mounted(tmp_path):
    """Its mount point names it; the daemon keeps the state."""
    program = os.environ.get("NVTIER_BIN")
    if not program or not os.path.exists("/dev/fuse"):
        pytest.skip("NVTIER_BIN is not set, or there is no /dev/fuse here: no pool can be mounted")
    nvtier.format(tmp_path / "pool")
    (tmp_path / "a mount").mkdir()
    done = subprocess.run([program, "mount", "pool", "a mount"], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode == 7:
        pytest.skip("mounting is not possible here: " + done.stderr)
    assert done.returncode == 0, done.stderr
    try:
        reference = llama(layers=2)
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        torch.manual_seed(5)
        wanted = train(reference, plain, 3)
        model, optimizer = nvtier.train.offload(llama(layers=2), torch.optim.AdamW, pool=tmp_path / "a mount", **ADAMW)
        torch.manual_seed(5)
        assert train(model, optimizer, 3) == wanted
        compare(reference, plain, optimizer)
        optimizer.close()
        assert nvtier.train.remove(tmp_path / "a mount", "run")
    finally:
        subprocess.run([program, "umount", "a mount"], cwd=tmp_path, check=True)


def test_what_makes_no_sense_is_refused(pool, tmp_path):
    def refused(error_kind, words, model=None, kind=torch.optim.AdamW, pool=pool, **options):
        with pytest.raises(error_kind) as error:
            nvtier.train.offload(model or llama(layers=2), kind, pool=pool, **{**ADAMW, **options})
        for word in words:
            assert word in str(error.value), error.value

    refused(nvtier.NotSupported, ["SGD", "AdamW"], kind=torch.optim.SGD)
    refused(nvtier.NotSupported, ["amsgrad"], amsgrad=True)
    refused(nvtier.InvalidArgument, ["precision='int8'"], precision="int8")
    refused(nvtier.InvalidArgument, ["bf16", "float32", "convert"], precision="bf16")
    refused(nvtier.InvalidArgument, ["20 apples"], vram="20 apples")
    refused(nvtier.InvalidArgument, ["run="], run="../x")
    refused(nvtier.OutOfDeviceMemory, ["at least"], vram=1000)
    refused(nvtier.NotFound, ["'run'"], resume=True)
    refused(nvtier.InvalidArgument, ["blocks="], model=torch.nn.Linear(3, 3))
    refused(nvtier.InvalidArgument, ["part of the model"], blocks=[torch.nn.Linear(2, 2)])
    refused(nvtier.InvalidArgument, ["trainable"], model=llama(layers=2).requires_grad_(False))
    with torch.device("meta"):
        meta = llama(layers=2)
    refused(nvtier.InvalidArgument, ["meta", "weights="], model=meta)
    assert nvtier.train.plan(meta)["state"] == nvtier.train.plan(llama(layers=2))["state"]
    nvtier.format(tmp_path / "small", size=24 << 20, members=[tmp_path / "image"])
    refused(nvtier.NoSpace, ["needs", "free"], pool=tmp_path / "small", model=llama(layers=2))

    model, optimizer = nvtier.train.offload(llama(layers=2), torch.optim.AdamW, pool=pool, **ADAMW)
    ids = torch.arange(16).view(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(nvtier.InvalidArgument, match="whole steps"):
        optimizer.commit()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(nvtier.InvalidArgument, match="optimizer.clip_grad_norm_"):
        optimizer.step()
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with pytest.raises(nvtier.InvalidArgument, match="zero_grad"):
        model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(nvtier.NotSupported, match="closure"):
        optimizer.step(lambda: 1.0)
    with pytest.raises(nvtier.InvalidArgument, match="JSON"):
        optimizer.zero_grad()
        optimizer.commit({"x": object()})
    with pytest.raises(nvtier.InvalidArgument, match="already"):
        nvtier.train.offload(model, torch.optim.AdamW, pool=pool, run="b", **ADAMW)
    optimizer.commit({"x": 1}, wait=True)
    optimizer.close()
    optimizer.close()
    with pytest.raises(nvtier.Closed, match="load the model again"):
        model(input_ids=ids)
    refused(nvtier.Exists, ["resume=True", "remove"], model=llama(layers=2))
    refused(nvtier.InvalidArgument, ["another model"], model=llama(layers=3), resume=True)
    refused(nvtier.InvalidArgument, ["another"], model=llama(layers=2), precision="mixed", resume=True)
    model, optimizer = nvtier.train.offload(llama(layers=2, seed=4), torch.optim.AdamW, pool=pool, resume=True, **ADAMW)
    assert optimizer.resumed == {"x": 1} and optimizer.steps == 1
    optimizer.close()

    model, optimizer = nvtier.train.offload(llama(layers=2), torch.optim.AdamW, pool=pool, run="c", precision="mixed", accumulate=False, **ADAMW)
    with pytest.raises(nvtier.InvalidArgument, match="autocast"):
        model(input_ids=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(RuntimeError, match="accumulate=False"):
            model(input_ids=ids, labels=ids).loss.backward()




@pytest.mark.parametrize("upper", [0, 1, 0x3F80, 0x3F81, 0x7F7F, 0x7F7E, 0x8000, 0xFF7F, 0xBF80, 0x007F, 0x0080, 0x7F80])
def test_halves_of_weights_are_the_weights(upper):
    low = torch.arange(1 if upper == 0x7F80 else 65536, dtype=torch.int64)
    bits = (upper << 16) | low
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    weights = bits.view(torch.float32)
    hi, lo = torch.empty_like(weights, dtype=torch.bfloat16), torch.empty_like(bits, dtype=torch.int16)
    ties = torch.empty(-(-len(bits) // 8), dtype=torch.uint8)
    planes.split(weights, hi, lo, ties)
    assert torch.equal(hi.view(torch.int16), weights.to(torch.bfloat16).view(torch.int16)), "not what autocast makes of it"
    assert torch.equal(planes.join(hi, lo, ties).view(torch.int32), bits)


@pytest.mark.skipif(not os.environ.get("NVTIER_MODEL"), reason="NVTIER_MODEL names no model: a real one is wanted")
def test_a_real_model_learns_as_in_plain_pytorch(pool, tmp_path):
    torch.set_num_threads(2)
    where = os.path.join(os.environ["NVTIER_MODEL"], "snapshot")
    tokenizer = hf.AutoTokenizer.from_pretrained(where)
    # Text that is installed everywhere.
    text = " ".join((dict.__doc__ or "").split() + (str.__doc__ or "").split())
    ids = tokenizer(text * 4, return_tensors="pt").input_ids[:, :96].view(2, 48)

    def load():
        model = hf.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        return model.train()

    def run(model, optimizer):
        losses = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    options = dict(lr=1e-4, weight_decay=0.01)
    reference = load()
    wanted = run(reference, torch.optim.AdamW(reference.parameters(), fused=True, **options))
    assert wanted[-1] < wanted[0] - 0.05, wanted
    prompt = ids[:1, :24]

    def says(model):
        return model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False).tolist()

    before = says(hf.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32))
    needs = nvtier.train.plan(reference)
    model, optimizer = nvtier.train.offload(load(), torch.optim.AdamW, pool=pool, vram=needs["least_vram"], ram="64MiB", **options)
    assert run(model, optimizer) == wanted
    optimizer.save_pretrained(tmp_path / "tuned")
    optimizer.close()
    tuned = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    after = says(tuned)
    assert after == says(reference) and after != before


def test_what_is_pending_has_room_however_it_is_asked_for(pool):
    """Looking at the weights, a state_dict or a flush carries out a whole step at once: more than what there is room for between two commits."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
    )
    for ask in (lambda model, optimizer: [0 for _ in optimizer.weights()], lambda model, optimizer: model.state_dict(), lambda model, optimizer: optimizer.flush()):
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).train()
        model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, device="cpu", run="run", precision="mixed", **ADAMW)
        for _ in range(2):
            train(model, optimizer, 1, precision="mixed")
            ask(model, optimizer)
        optimizer.close()
        assert nvtier.train.remove(pool, "run")


def test_commits_may_be_rare(pool):
    """What is in host memory is written with a commit, and a run that ends without one goes back to the last."""
    reference = llama()
    models = [copy.deepcopy(reference) for _ in range(3)]
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    torch.manual_seed(5)
    wanted = train(reference, plain, 8)
    options = dict(pool=pool, ram="100MiB", commit_every=5, **ADAMW)
    model, optimizer = nvtier.train.offload(models[0], torch.optim.AdamW, **options)
    torch.manual_seed(5)
    begun = optimizer.stats()["drive_written_bytes"]
    assert train(model, optimizer, 4, each=lambda step: optimizer.commit({"next": step + 1})) == wanted[:4]
    assert optimizer.stats()["drive_written_bytes"] == begun, "steps in host memory were written to the drive"
    assert train(model, optimizer, 7, first=4, each=lambda step: optimizer.commit({"next": step + 1})) == wanted[4:7]
    assert optimizer.stats()["drive_written_bytes"] > begun
    with pytest.raises(ZeroDivisionError):
        with optimizer:
            raise ZeroDivisionError
    model, optimizer = nvtier.train.offload(models[1], torch.optim.AdamW, resume=True, **options)
    assert optimizer.resumed == {"next": 5} and optimizer.steps == 5
    assert train(model, optimizer, 8, first=5, each=lambda step: optimizer.commit({"next": step + 1})) == wanted[5:]
    compare(reference, plain, optimizer)
    optimizer.close()
    model, optimizer = nvtier.train.offload(models[2], torch.optim.AdamW, resume=True, **options)
    assert optimizer.resumed == {"next": 8} and optimizer.steps == 8
    compare(reference, plain, optimizer)
    optimizer.close()


def test_hugging_faces_trainer(pool, tmp_path):
    """The same numbers by ``transformers.Trainer``, with clipping, accumulation and its schedule."""
    pytest.importorskip("accelerate")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            ids = torch.randint(0, VOCABULARY, (16,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids, "labels": ids}

    def arguments(**more):
        return hf.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=3e-3,
            weight_decay=0.1,
            max_grad_norm=0.5,
            lr_scheduler_type="cosine",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=7,
            **{"save_strategy": "no", **more},
        )

    def losses(trainer):
        return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in trainer.state.log_history if "loss" in entry]

    options = {**ADAMW, "weight_decay": 0.1}
    reference = llama()
    model = copy.deepcopy(reference)
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **options)
    wanted = hf.Trainer(model=reference, args=arguments(), train_dataset=Rows(), optimizers=(plain, None))
    wanted.train()
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool, **options)
    with pytest.raises(nvtier.NotSupported, match="save_strategy"):
        nvtier.train.adapt(hf.Trainer(model=model, args=arguments(save_strategy="epoch"), train_dataset=Rows(), optimizers=(optimizer, None)))
    with pytest.raises(nvtier.InvalidArgument, match="optimizers="):
        nvtier.train.adapt(hf.Trainer(model=model, args=arguments(), train_dataset=Rows(), optimizers=(plain, None)))
    trainer = nvtier.train.adapt(hf.Trainer(model=model, args=arguments(), train_dataset=Rows(), optimizers=(optimizer, None)))
    trainer.train()
    assert len(losses(wanted)) == 12 and losses(trainer) == losses(wanted)
    compare(reference, plain, optimizer)
    optimizer.close()
    _, optimizer = nvtier.train.offload(llama(seed=1), torch.optim.AdamW, pool=pool, resume=True, **options)
    assert optimizer.steps == 12 and optimizer.resumed["global_step"] == 12
    with pytest.raises(nvtier.NotSupported, match="in the pool"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.close()
