"""nvtier.train with two ranks, gloo and CPU tensors: the numbers of DistributedDataParallel, half of the bytes for each, and what a crash of both leaves."""

import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import pytest

import nvtier

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
hf.utils.logging.set_verbosity_error()

import torch.distributed as dist  # noqa: E402

import nvtier.train._spill  # noqa: E402
import test_train as single  # noqa: E402

ADAMW, VOCABULARY = single.ADAMW, single.VOCABULARY
RANKS = 2
#: Seconds after which a run of two processes is given up: nothing takes as long.
LIMIT = 900

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no torch.distributed with gloo"
)


# What each of the two processes does


def batch(step, part, rank):
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1000 * step + 10 * part + rank))


def train(model, optimizer, steps, clip_by=None, *, micro=1, clip=None, precision="fp32", first=0, after=None):
    """Losses of this rank, and norms."""
    seen = []
    for step in range(first, steps):
        for part in range(micro):
            ids = batch(step, part, dist.get_rank())
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
                loss = model(input_ids=ids, labels=ids).loss / micro
            loss.backward()
            if after is not None:
                after()
            seen.append(loss.item())
        if clip is not None:
            seen.append(clip_by(clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


class Plain:
    """The reference with micro-batches and clipping: plain PyTorch, in which all reductions are those that nvtier documents. The mean over the ranks is
    taken of each micro-batch, and then added up, but for parameters that stay on the device: these are added up first. The square of a norm is the sum of
    those of the ranks' parts."""

    def __init__(self, model, manager):
        self.named = dict(model.named_parameters())
        self.blocks = [(block, self.named[entry.name], entry) for block in [manager.rest, *manager.blocks] for entry in block.params]
        self.sums = {}

    def after(self):
        for block, param, _ in self.blocks:
            if block.module is not None and param.grad is not None:
                mean = param.grad / RANKS
                dist.all_reduce(mean)
                self.sums[param] = mean if param not in self.sums else self.sums[param] + mean
                param.grad = None

    def finish(self):
        for block, param, _ in self.blocks:
            if block.module is not None:
                param.grad = self.sums.pop(param, None)
            elif param.grad is not None:
                param.grad /= RANKS
                dist.all_reduce(param.grad)

    def clip(self, most):
        self.finish()
        norms = {}
        for block, param, entry in self.blocks:
            share = block.layout.share(entry.key)
            # Where a rank's part ends.
            cuts = [min(max(rank * share - entry.place.start, 0), param.numel()) for rank in range(RANKS + 1)]
            pieces = [param.grad.view(-1)[start:end] for start, end in zip(cuts, cuts[1:]) if end > start]
            squares = [torch._foreach_norm([piece], 2.0, torch.float32)[0].double().square() for piece in pieces]
            norms[param] = sum(squares).sqrt().float()
        total = torch.linalg.vector_norm(torch.stack([norms[param] for param in self.named.values()]), 2.0)
        for param in self.named.values():
            param.grad.mul_(torch.clamp(most / (total + 1e-6), max=1.0))
        return total


def pool_of(folder, name="pool"):
    """A pool of this rank's, as on a drive of its own."""
    path = os.path.join(folder, f"{name}-{dist.get_rank()}")
    if not os.path.exists(path):
        nvtier.format(path)
    return path


def from_files(folder):
    """A model on the meta device: both take it from its files."""
    where = os.path.join(folder, "model")
    if dist.get_rank() == 0:
        single.llama(tie=False, dropout=0.0).save_pretrained(where)
    dist.barrier()
    reference = hf.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).train()
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(where), dtype=torch.float32).train()
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    wanted = train(torch.nn.parallel.DistributedDataParallel(reference), plain, 3)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool_of(folder), weights=where, device="cpu", accumulate=False, **ADAMW)
    assert train(model, optimizer, 3) == wanted
    single.compare(reference, plain, optimizer)
    optimizer.close()


def like_ddp(folder):
    """One micro-batch, no clipping: stock DistributedDataParallel."""
    for number, (precision, tied) in enumerate([("fp32", True), ("mixed", False), ("bf16", False)]):
        reference = single.llama(tie=tied, precision=precision, dropout=0.0)
        # Rank 0's weights are those that both begin with.
        model = copy.deepcopy(reference) if dist.get_rank() == 0 else single.llama(seed=8, tie=tied, precision=precision, dropout=0.0)
        for one in (reference, model):
            one.gradient_checkpointing_enable({"use_reentrant": False})
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        wanted = train(torch.nn.parallel.DistributedDataParallel(reference), plain, 8, precision=precision)
        whole = nvtier.train.plan(model, precision=precision, accumulate=False)
        needs = nvtier.train.plan(model, precision=precision, accumulate=False, ranks=RANKS)
        model, optimizer = nvtier.train.offload(
            model, torch.optim.AdamW, pool=pool_of(folder), run=f"r{number}", precision=precision, vram=needs["least_vram"], accumulate=False, **ADAMW
        )
        begun = optimizer.stats()
        assert train(model, optimizer, 8, precision=precision) == wanted
        single.compare(reference, plain, optimizer)
        stats = optimizer.stats()
        # Of bytes, half; mixed gradients are float32 then, and parts are padded.
        assert needs["state"] < whole["state"] * (0.58 if precision == "mixed" else 0.52), (needs, whole)
        # (The drive's own are whole blocks, of 64 KiB for units as small as these.)
        stored, fetched = (stats[key] - begun[key] for key in ("stored_bytes", "fetched_bytes"))
        assert 0.45 < stored / (8 * whole["written"]) < 0.58 and stored <= 8 * needs["written"], (stored, whole, needs)
        assert fetched < 9 * needs["read"] < 9 * 0.6 * whole["read"], (fetched, whole, needs)
        assert stats["drive_written_bytes"] >= stored and stats["drive_read_bytes"] >= fetched
        assert stats["device_peak_bytes"] <= needs["least_vram"]
        optimizer.close()


def like_plain(folder):
    """Micro-batches and clipping; a pool that both share, with activations in it, too."""
    # Those of this model are small.
    nvtier.train._spill._LEAST = 1 << 10
    shared = os.path.join(folder, "shared")
    if dist.get_rank() == 0:
        nvtier.format(shared)
    dist.barrier()
    cases = [("fp32", 3, 1.0, True), ("mixed", 3, 0.5, False), ("mixed", 1, 1.0, True), ("fp32", 2, None, False)]
    for number, (precision, micro, clip, tied) in enumerate(cases):
        reference = single.llama(tie=tied, dropout=0.0)
        model = copy.deepcopy(reference)
        for one in (reference, model):
            one.gradient_checkpointing_enable({"use_reentrant": False})
        model, optimizer = nvtier.train.offload(
            model, torch.optim.AdamW, pool=shared, run=f"p{number}", precision=precision, ram="200KiB", activations="pool" if number == 1 else None, **ADAMW
        )
        plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
        by_hand = Plain(reference, optimizer._manager)
        plain.register_step_pre_hook(lambda *_: by_hand.finish() if clip is None else None)
        wanted = train(reference, plain, 4, by_hand.clip, micro=micro, clip=clip, precision=precision, after=by_hand.after)
        assert train(model, optimizer, 4, optimizer.clip_grad_norm_, micro=micro, clip=clip, precision=precision) == wanted
        single.compare(reference, plain, optimizer)
        assert number != 1 or optimizer.stats()["activations_stored_bytes"] > 0
        if clip is not None and micro == 1:
            # And all but the last bits of the norm are what PyTorch makes of the whole gradients.
            again = copy.deepcopy(reference)
            ids = batch(99, 0, dist.get_rank())
            for one in (again, model):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "mixed"):
                    one(input_ids=ids, labels=ids).loss.backward()
            for parameter in again.parameters():
                parameter.grad /= RANKS
                dist.all_reduce(parameter.grad)
            norm = torch.nn.utils.clip_grad_norm_(again.parameters(), clip)
            torch.testing.assert_close(optimizer.clip_grad_norm_(clip), norm, rtol=1e-5, atol=0)
            optimizer.zero_grad()
        optimizer.save_pretrained(os.path.join(folder, f"saved-{number}"))
        if dist.get_rank() == 0:
            back = hf.AutoModelForCausalLM.from_pretrained(os.path.join(folder, f"saved-{number}"), dtype=torch.float32).state_dict()
            assert all(torch.equal(back[name], weight) for name, weight in reference.state_dict().items())
        state = model.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in reference.state_dict().items())
        optimizer.close()


def other_experts(folder):
    """Parameters that have a gradient on one rank, or on none."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.blocks = torch.nn.ModuleList(
                torch.nn.ModuleDict({f"e{i}": torch.nn.Linear(24, 24) for i in range(4)}) for _ in range(4)
            )
            for block in self.blocks:
                block.forward = lambda x, which, block=block: x + torch.tanh(block[f"e{which}"](x))

        def forward(self, x, which):
            for number, block in enumerate(self.blocks):
                x = block(x, (which + number) % 3)
            return x.square().mean()

    def run(model, optimizer):
        seen = []
        for step in range(9):
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step * 7 + dist.get_rank()))
            loss = model(x, step // 3 + (0 if step % 3 == 0 else dist.get_rank()))
            loss.backward()
            seen.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return seen

    reference, model = Mixture(), Mixture()
    plain = torch.optim.AdamW(reference.parameters(), fused=True, **ADAMW)
    wanted = run(torch.nn.parallel.DistributedDataParallel(reference, find_unused_parameters=True), plain)
    model, optimizer = nvtier.train.offload(model, torch.optim.AdamW, pool=pool_of(folder), blocks=list(model.blocks), **ADAMW)
    assert run(model, optimizer) == wanted
    single.compare(reference, plain, optimizer)
    optimizer.close()


def refused(folder):
    """What differs between ranks, or from the run that is there, is refused on all of them."""

    def fails(kind, words, model=None, **options):
        with pytest.raises(kind) as error:
            nvtier.train.offload(model or single.llama(layers=2), torch.optim.AdamW, **{"pool": pool_of(folder), **ADAMW, **options})
        for word in words:
            assert word in str(error.value), error.value

    rank = dist.get_rank()
    fails(nvtier.InvalidArgument, ["commit_every must be the same on all ranks"], commit_every=1 + rank)
    fails(nvtier.InvalidArgument, ["the model", "must be the same"], model=single.llama(layers=2 + rank))
    missing = {} if rank == 0 else {"pool": os.path.join(folder, "no pool")}
    fails(nvtier.NotFound, ["no pool", *(["rank 1: "] if rank == 0 else [])], **missing)
    fails(nvtier.NotFound, ["'run'"], resume=True)
    model, optimizer = nvtier.train.offload(single.llama(layers=2), torch.optim.AdamW, pool=pool_of(folder), **ADAMW)
    train(model, optimizer, 2)
    with pytest.raises(nvtier.NotSupported, match="Trainer"):
        arguments = hf.TrainingArguments("out", use_cpu=True, report_to=[], save_strategy="no")
        nvtier.train.adapt(hf.Trainer(model=model, args=arguments, optimizers=(optimizer, None)))
    optimizer.close()
    fails(nvtier.Exists, ["resume=True"])
    alone = [dist.new_group([member], backend="gloo") for member in range(RANKS)][rank]
    fails(nvtier.InvalidArgument, ["is of 2 ranks", "one process"], resume=True, group=alone)
    # One rank is a plain run.
    one, optimizer = nvtier.train.offload(single.llama(layers=2), torch.optim.AdamW, pool=pool_of(folder), run="one", group=alone, **ADAMW)
    train(one, optimizer, 1)
    optimizer.close()
    fails(nvtier.InvalidArgument, ["is of one process", "2 ranks"], resume=True, run="one")
    dist.barrier()
    if rank == 1:
        assert nvtier.train.remove(pool_of(folder), "run") and not nvtier.train.remove(pool_of(folder), "run")
    fails(nvtier.NotFound, ["rank 1 finds no part"], resume="auto")


def life(folder):
    """Trains to step 12, or goes on to it. ``die``: rank 1 is gone as it would commit that step, and rank 0 has done so."""
    steps, die = 12, int(os.environ["DIE"])
    model = single.llama(tie=False, layers=3, dropout=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = nvtier.train.offload(
        model, torch.optim.AdamW, pool=pool_of(folder), precision="mixed", ram="100KiB", resume="auto", **ADAMW
    )
    log = os.path.join(folder, f"log-{dist.get_rank()}")

    def line(**what):
        with open(log, "a") as out:
            print(json.dumps(what), file=out)

    first = (optimizer.resumed or {}).get("next", 0)
    line(begins=first, commits=optimizer.stats()["commits"])
    for step in range(first, steps):
        seen = train(model, optimizer, step + 1, optimizer.clip_grad_norm_, micro=2, clip=1.0, precision="mixed", first=step)
        line(step=step, seen=seen)
        if step == die and dist.get_rank() == 1:
            # What is asked for last.
            optimizer._manager.ranks.describe = lambda: kill([os.getpid()])
        optimizer.commit({"next": step + 1})
        if step == die:
            optimizer._last_commit.wait()
    optimizer.close()


def slow_death(folder):
    """Rank 1 is gone in the middle of a step."""
    model, optimizer = nvtier.train.offload(single.llama(layers=2), torch.optim.AdamW, pool=pool_of(folder), **ADAMW)
    train(model, optimizer, 1)
    if dist.get_rank() == 1:
        kill([os.getpid()])
    train(model, optimizer, 2, first=1)


def worker(what, folder, rendezvous, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    globals()[what](folder)
    dist.destroy_process_group()


def nursery():
    """Forks the ranks of each line that it is given; they need not import everything again. Their numbers, and how they ended."""
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["DIE"] = str(job["die"])
        children = []
        for rank, said in enumerate(job["said"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(out, 1)
                    os.dup2(out, 2)
                    worker(job["what"], job["folder"], job["rendezvous"], rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


# The tests


@pytest.fixture(scope="module")
def begin():
    """Begins a run of two ranks: their numbers, and what waits for them and gives their exit codes and what they said."""
    program = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def begin(what, folder, die=-1):
        place = tempfile.mkdtemp(dir=folder)
        said = [os.path.join(place, f"said-{rank}") for rank in range(RANKS)]
        job = {"what": what, "folder": str(folder), "die": die, "rendezvous": os.path.join(place, "rendezvous"), "said": said}
        program.stdin.write(json.dumps(job) + "\n")
        children = json.loads(program.stdout.readline())
        watch = threading.Timer(LIMIT, kill, [children])
        watch.start()

        def end():
            codes = json.loads(program.stdout.readline())
            watch.cancel()
            return codes, [open(path).read() for path in said]

        return children, end

    yield begin
    program.stdin.close()
    program.wait(timeout=60)


def kill(children):
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.mark.parametrize("what", ["like_ddp", "like_plain", "other_experts", "from_files", "refused"])
def test_two_ranks(begin, tmp_path, what):
    codes, said = begin(what, tmp_path)[1]()
    assert codes == [0, 0], "\n\n".join(said)


def lines(folder, rank):
    path = folder / f"log-{rank}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_both_go_on_from_the_last_step_that_both_committed(begin, tmp_path):
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    codes, said = begin("life", tmp_path / "undisturbed")[1]()
    assert codes == [0, 0], "\n\n".join(said)
    folder = tmp_path / "killed"
    # Rank 0 has one commit more: it goes back. What it waits for does not come, and that is an error, soon.
    for die in (3, 7):
        codes, said = begin("life", folder, die)[1]()
        assert codes[1] == -signal.SIGKILL and codes[0] == 1, "\n\n".join(said)
        heads = []
        for rank in range(RANKS):
            with nvtier.Pool(folder / f"pool-{rank}") as pool:
                heads.append([json.loads(meta)["commit"] for _, _, meta in nvtier._nvtier.State.commits(pool, f"train-run.rank{rank}")])
        assert heads[0][0] == heads[1][0] + 1 and heads[1][0] in heads[0], heads
    # Both, wherever they are.
    for moment in (9, 10):
        children, end = begin("life", folder)
        deadline = time.monotonic() + LIMIT
        while moment not in [line.get("step") for line in lines(folder, moment % 2)] and time.monotonic() < deadline:
            time.sleep(0.01)
        kill(children)
        assert end()[0] == [-signal.SIGKILL] * 2
    codes, said = begin("life", folder)[1]()
    assert codes == [0, 0], "\n\n".join(said)
    for rank in range(RANKS):
        wanted = {line["step"]: line["seen"] for line in lines(tmp_path / "undisturbed", rank) if "step" in line}
        found = lines(folder, rank)
        assert sorted(wanted) == list(range(12)) and all(line["seen"] == wanted[line["step"]] for line in found if "step" in line)
        begins = [line["begins"] for line in found if "begins" in line]
        assert begins[:3] == [0, 3, 7], begins
        assert begins == sorted(begins) and begins[-1] >= 9, begins
    assert [line["begins"] for line in lines(folder, 0) if "begins" in line] == [line["begins"] for line in lines(folder, 1) if "begins" in line]


def test_a_rank_that_dies_ends_the_others(begin, tmp_path):
    codes, said = begin("slow_death", tmp_path)[1]()
    assert codes[1] == -signal.SIGKILL and codes[0] == 1 and "Error" in said[0], "\n\n".join(said)


if __name__ == "__main__":
    nursery()
