"""nvtier.train.cli: whole trainings of a tiny model with a real tokenizer, and of the real one for two updates; kills, signals, exit codes.

Mostly with --plain, that is, without tiers: what is tested here is everything around the optimizer. The offload gives the same numbers.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
pytest.importorskip("yaml")

import nvtier
import nvtier.train
from common import LIMIT_S
from nvtier.train import _data, cli

ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"{n} plus {n} is {2 * n}."} for n in range(5)]
ENV = """\
path_settings:
  model_name_or_path: model
  nvme_path: nvme
  train_data_path: [data.yaml]
  output_dir: output
  log_name: logs/t.log
"""
DATA = "sums:\n  data_path: data.json\n  strategy: QA\n  user_prompt: 'Answer: {question}'\n  question_key: question\n  answer_key: answer\n"
EXP = """\
run_settings:
  per_device_train_batch_size: 1
  per_update_total_batch_size: 2
  num_train_epochs: 2
  max_seq_len: 64
  lr_scheduler: {learning_rate: 3.0e-3, mode: 2}
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing by more, and a machine that does other things makes threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model, with dropout so that states of random numbers matter, and the tokenizer of the real one."""
    folder = os.environ.get("NVTIER_MODEL")
    if not folder:
        pytest.skip("NVTIER_MODEL is not set: run this through `cargo xtask test`")
    to, source = tmp_path_factory.mktemp("train") / "model", Path(folder) / "snapshot"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True, attention_dropout=0.1,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(to)
    for name in os.listdir(source):
        if name.startswith(("tokenizer", "chat_template", "generation")):
            shutil.copy(source / name, to)
    return to


class Place:
    """A folder with all files, where trainings are run."""

    def __init__(self, path, model):
        self.path = path
        (path / "nvme").mkdir()
        (path / "model").symlink_to(model)
        (path / "data.json").write_text(json.dumps(ROWS))
        self.write()

    def write(self, env=ENV, exp=EXP, data=DATA):
        for name, text in [("env.yaml", env), ("exp.yaml", exp), ("data.yaml", data)]:
            (self.path / name).write_text(text)

    def train(self, *args, plain=True):
        """Exit code, standard output, standard error."""
        line = ["--env_config", "env.yaml", "--exp_config", "exp.yaml", *(["--plain"] if plain else []), *args]
        out, err = io.StringIO(), io.StringIO()
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(line)
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
        return code, out.getvalue(), err.getvalue()

    def fine(self, *args, **options):
        code, out, err = self.train(*args, **options)
        assert code == 0, out + err
        return out

    def spawn(self, *args, program=(sys.executable, "-m", "nvtier.train.cli"), plain=True, **env):
        line = [*program, "--env_config", "env.yaml", "--exp_config", "exp.yaml", *(["--plain"] if plain else []), *args]
        return subprocess.Popen(
            line, cwd=self.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    def events(self, name, log="logs/t.jsonl"):
        path = self.path / log
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def losses(self):
        """Of each iteration, the last one where it was run twice."""
        return {(event["epoch"], event["iteration"]): event["loss"] for event in self.events("iteration")}

    def saved(self, folder="output"):
        place = self.path / folder
        return sorted(name for name in os.listdir(place) if name.startswith((".", "epoch"))) if place.exists() else []

    def wait_for_updates(self, process, updates):
        """Until so many updates are written down."""
        deadline = time.monotonic() + LIMIT_S
        while max((event["update"] for event in self.events("iteration")), default=0) < updates:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, model)


@contextlib.contextmanager
def ended(process):
    """Kills what is left of a process."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def weights(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_whole_training(place):
    place.write(exp=EXP.replace("num_train_epochs: 2", "num_train_epochs: 6"))
    out = place.fine()
    log = (place.path / "logs/t.log").read_text()
    assert out == log, "the terminal has what the file has"
    lines = iter(re.sub(r"^\[2[^]]*\] ", "", line) for line in out.splitlines())
    for wanted in [
        r"\[INFO\] get dataset name:  data.json  training_strategy:  qa", r"\[INFO\] You are loading \[LlamaForCausalLM\] with .*",
        r"\[INFO\] create current swap data path: nvme.*",
        r"\[INFO\] The current training schedule consists of 6 epochs with 5 iterations each\.",
        r"\[INFO\] The accumulated time is set to 2 so the training will be updated 3 times during each epoch\.",
        r"\[INFO\] Beginning of Epoch 1/6, Total Micro Batches 5",
        r"\[PHISON START\] Epoch: 0, Iteration: 0", r"\[Forward\]\[start\]", r"\[Forward\]\[time spent\]:[0-9.e-]+", r"\[Loss\]:[0-9.]+",
        r"\[Backward\]\[start\]", r"\[Backward\]\[time spent\]:[0-9.e-]+", r"\[PHISON END\] Iteration: 0",
        r"\[INFO\] Training efficiency: [0-9.]+ \(tokens/s\)",
        r"\[PHISON START\] Epoch: 0, Iteration: 1", r"\[Update\]\[Start\]", r"\[Update\]\[time spent\]:[0-9.e-]+", r"\[PHISON END\] Iteration: 1",
        r"\[PHISON START\] Epoch: 0, Iteration: 4", r"\[Save Model_Checkpoint\]\[Start\]", r"\[Save Model_Checkpoint\]\[time spent\]:[0-9.e-]+",
        r"The model stored this time includes 3 update cycles\.", r"\[PHISON START\] Epoch: 5, Iteration: 4", r"training complete!",
    ]:  # fmt: skip
        assert any(re.fullmatch(wanted, line) for line in lines), f"no line {wanted}, or not in this order:\n{out}"
    iterations = place.events("iteration")
    assert [(event["epoch"], event["iteration"]) for event in iterations] == [(e, i) for e in range(6) for i in range(5)]
    # Five iterations are two updates of two and one of what is left.
    assert [event["update"] for event in iterations[:5]] == [0, 1, 1, 2, 3]
    assert all(event["tokens"] > 0 and event["seconds_left"] >= 0 and set(event["stats"]) == {"vram", "ram", "nvme"} for event in iterations)
    assert [event["lr"] for event in iterations if "lr" in event] == pytest.approx([3e-3 * 0.99**n for n in range(18)])
    means = [event["train_loss"] for event in place.events("epoch")]
    assert means[-1] < means[0] - 0.5, means
    assert place.saved() == [f"epoch_{n}_step_4_#model" for n in range(6)]
    # What was saved is a model for anyone, with the tokenizer byte for byte.
    last = place.path / "output/epoch_5_step_4_#model"
    assert weights(last)["lm_head.weight"].dtype == torch.float32
    for name in os.listdir(place.path / "model"):
        if not name.startswith(("config", "model")):
            assert (last / name).read_bytes() == (place.path / "model" / name).read_bytes(), name
    assert not equal(weights(last), weights(place.path / "output/epoch_4_step_4_#model"))
    assert hf.AutoTokenizer.from_pretrained(last).chat_template


@pytest.mark.parametrize("mode, accumulation, clip", [(0, 1, None), (0, 2, 0.05), (1, 2, 0.05)])
def test_the_numbers_are_plain_pytorchs(place, mode, accumulation, clip):
    exp = EXP.replace("batch_size: 2", f"batch_size: {2 * accumulation}").replace("batch_size: 1", "batch_size: 2") + f"  precision_mode: {mode}\n"
    place.write(exp=exp)
    place.fine(*(["--clip-grad-norm", str(clip)] if clip else []))
    model = hf.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32 if mode else torch.bfloat16)
    tokenizer = hf.AutoTokenizer.from_pretrained("model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    from nvtier.train import _config

    data = _data.Data(_config.load("env.yaml", "exp.yaml").train, tokenizer, 64)
    order, losses = _data.Order(5, 2, seed=42), []
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(42)
    for _ in range(2):
        left = 3
        while left:
            group = min(accumulation, left)
            for _ in range(group):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == 1):
                    loss = model(**data.batch(order.take())).loss
                losses.append(loss.item())
                (loss / group).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            left -= group
        order.next_epoch()
    assert list(place.losses().values()) == losses
    assert equal(weights("output/epoch_1_step_2_#model"), model.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """Losses and weights of a training that nobody disturbed."""
    path = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(path)
    try:
        place = Place(path, model)
        place.fine()
        return place.losses(), weights(path / "output/epoch_1_step_4_#model")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_kill_and_a_resume_give_the_same_numbers(place, whole, after):
    with ended(place.spawn("--commit-every", "1")) as process:
        place.wait_for_updates(process, after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = len(place.events("iteration"))
    out = place.fine("--resume")
    assert f"going on with the run model after update {after}" in out or f"after update {after + 1}" in out
    assert before < 10 + 2 and len(place.events("iteration")) < before + 10, "it began anew"
    assert place.losses() == whole[0]
    assert equal(weights("output/epoch_1_step_4_#model"), whole[1])
    assert place.saved() == ["epoch_0_step_4_#model", "epoch_1_step_4_#model"]


def test_other_seeds_give_other_numbers(place, whole):
    # Without which the test before could not fail.
    place.fine("--seed", "7")
    assert place.losses().keys() == whole[0].keys() and place.losses() != whole[0]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_at_a_place_to_go_on_from(place, whole, number, code):
    # Commits are ten minutes apart here: the stop makes its own.
    with ended(place.spawn()) as process:
        place.wait_for_updates(process, 1)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, out + err
    assert err.strip().splitlines()[-1] == f"nvtier: error: stopped by {number.name}" and "Traceback" not in err
    assert "can be gone on with after update" in out
    assert "going on with the run model" in place.fine()
    assert place.losses() == whole[0] and equal(weights("output/epoch_1_step_4_#model"), whole[1])


def test_a_signal_before_the_training_is_honest_too(place):
    with ended(place.spawn()) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143 and "Traceback" not in err, err


def test_again_anew_and_what_cannot_go_on(place):
    exp = EXP.replace("num_train_epochs: 2", "num_train_epochs: 1").replace("  max_seq_len: 64", "  max_iter: 2\n  max_seq_len: 64")
    place.write(exp=exp)
    code, _, err = place.train("--resume")
    assert code == 3 and "resume the run 'model': there is no nvme/nvtier-train/model.pt" in err
    place.fine()
    assert place.saved() == ["epoch_0_step_1_#model"] and len(place.events("iteration")) == 2
    # Complete: nothing is trained again, and what was moved away is saved again.
    shutil.rmtree(place.path / "output/epoch_0_step_1_#model")
    assert "training complete!" in place.fine()
    assert len(place.events("iteration")) == 2 and place.saved() == ["epoch_0_step_1_#model"]
    # One more epoch goes on; another rate is another run.
    place.write(exp=exp.replace("num_train_epochs: 1", "num_train_epochs: 2"))
    place.fine()
    assert [(event["epoch"], event["iteration"]) for event in place.events("iteration")] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    place.write(exp=exp.replace("3.0e-3", "1.0e-3"))
    code, _, err = place.train()
    assert code == 2 and "lr_scheduler was {'learning_rate': 0.003" in err and "--fresh" in err
    code, _, err = place.train("--run", "other")
    assert code == 2 and "output/epoch_0_step_1_#model is not of the run other" in err
    elsewhere = ENV.replace("output_dir: output", "output_dir: elsewhere")
    place.write(exp=exp.replace("3.0e-3", "1.0e-3"), env=elsewhere)
    place.fine("--run", "other")
    (place.path / "data.json").write_text(json.dumps(ROWS[:4]))
    code, _, err = place.train("--run", "other")
    assert code == 2 and "data was" in err
    place.fine("--run", "other", "--fresh")
    assert place.events("start")[-1]["resumed"] is False


def test_a_damaged_state_is_refused(place):
    place.write(exp=EXP + "  max_iter: 1\n")
    place.fine()
    state = place.path / "nvme/nvtier-train/model.pt"
    content = state.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no state"):
        state.write_bytes(damaged)
        code, _, err = place.train()
        assert code == 5 and "model.pt: it is damaged" in err, err
    place.fine("--fresh")


def test_two_trainings_of_one_run(place):
    with ended(place.spawn()) as process:
        place.wait_for_updates(process, 1)
        code, _, err = place.train()
        assert code == 4 and "another process trains this run" in err
    assert place.train()[0] == 0


def test_a_loss_that_is_no_number_ends_it_with_an_error(place):
    place.write(exp=EXP.replace("3.0e-3", "1.0e+38"))
    code, out, err = place.train()
    assert code == 1 and re.search(r"the loss of epoch 0, iteration \d is (nan|inf)", err) and "learning_rate" in err
    assert "training complete!" not in out and place.saved() == []
    [error] = place.events("error")
    assert error["kind"] == "Diverged" and "[ERROR] the loss" in (place.path / "logs/t.log").read_text()


def test_the_last_models_are_kept_and_others_left_alone(place):
    saver = """\
  max_iter: 5
  enable_save_optimizer_state: true
  model_saver: {enable_save_model_on_iteration: true, num_of_iteration_to_save_model: 2, max_num_of_saved_model_on_iteration: 3, max_num_of_saved_model_on_epoch_end: 1}
"""
    foreign = place.path / "output/epoch_0_step_9_#model"
    foreign.mkdir(parents=True)
    (place.path / "output/.epoch_0_step_1.model.nvtier-part").mkdir()
    place.write(exp=EXP + saver)
    place.fine()
    assert place.saved() == ["epoch_0_step_3_#model", "epoch_0_step_9_#model", "epoch_1_step_1_#model", "epoch_1_step_3_#model", "epoch_1_step_4_#model"]
    assert os.listdir(foreign) == []
    kinds = [(event["kind"], event["update"]) for event in place.events("save")]
    assert kinds == [("iteration", 1), ("iteration", 2), ("epoch", 3), ("iteration", 4), ("iteration", 5), ("epoch", 6)]
    # The optimizer's state of a run begins another one: its first step is not a first step of Adam.
    last = "output/epoch_1_step_4_#model"
    short = EXP.replace("num_train_epochs: 2", "num_train_epochs: 1") + "  max_iter: 2\n"
    trained = []
    for path in ("''", last, f"{last}/optimizer.pt"):
        env = ENV.replace("model_name_or_path: model", f"model_name_or_path: '{last}'").replace("output_dir: output", "output_dir: other")
        place.write(env=env + f"  optimizer_path: '{path}'\n".replace("''''", "''"), exp=short)
        place.fine("--fresh")
        trained.append(weights("other/epoch_0_step_1_#model"))
    assert not equal(trained[0], trained[1]) and equal(trained[1], trained[2])
    # A folder of somebody else's is never replaced.
    shutil.rmtree("other/epoch_0_step_1_#model")
    os.mkdir("other/epoch_0_step_1_#model")
    code, out, err = place.train("--fresh")
    assert code == 2 and "other/epoch_0_step_1_#model is not of the run epoch_1_step_4_-model, which would save a model there" in err
    assert os.listdir("other/epoch_0_step_1_#model") == [] and "PHISON START" not in out


def test_early_stops_and_validation(place):
    early = "  early_stop: {enable: true, min_delta: 100, patience: 2, verbose: true}\n"
    place.write(exp=EXP.replace("num_train_epochs: 2", "num_train_epochs: 9") + early, env=ENV + "  val_data_path: data.yaml\n")
    out = place.fine()
    # The first is the best so far; two later ones are no better by 100.
    assert len(place.events("epoch")) == 3 and "2 of 2 epochs without getting better" in out and "training complete!" in out
    for event in place.events("epoch"):
        assert 0 < event["validation_loss"] < event["train_loss"]
    # Going on is the same decision.
    assert "training complete!" in place.fine() and place.events("iteration")[-1]["epoch"] == 2


def test_weights_at_random_and_of_other_files(place):
    short = EXP.replace("num_train_epochs: 2", "num_train_epochs: 1") + "  max_iter: 1\n"
    place.write(exp=short + "  from_config: true\n")
    place.fine()
    at_random = list(place.losses().values())[-1]
    place.write(exp=short, env=ENV.replace("output_dir: output", "output_dir: ''"))
    place.fine("--run", "pretrained")
    pretrained = list(place.losses().values())[-1]
    assert at_random != pretrained
    state = {key: value for key, value in weights("model").items() if key != "lm_head.weight"}
    for form in ("bin", "pt", "pth"):
        folder = place.path / form
        shutil.copytree(place.path / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(state, folder / ("pytorch_model.bin" if form == "bin" else f"weights.{form}"))
        place.write(exp=short + f"  weight_file_format: {form}\n", env=ENV.replace("path: model", f"path: {form}", 1))
        place.fine()
        assert list(place.losses().values())[-1] == pretrained, form
    place.write(exp=short + "  weight_file_format: pth\n", env=ENV.replace("output_dir: output", "output_dir: ''"))
    code, _, err = place.train("--run", "x")
    assert code == 3 and "there is no file in model that ends with .pth" in err
    os.remove(place.path / "pt/weights.pt")
    torch.save({key: value for key, value in state.items() if "layers.1" not in key}, place.path / "pt/weights.pt")
    place.write(exp=short + "  weight_file_format: pt\n", env=ENV.replace("path: model", "path: pt", 1).replace("output_dir: output", "output_dir: ''"))
    code, _, err = place.train("--run", "y")
    assert code == 1 and "its files lack ['model.layers.1" in err


def test_lora(place):
    pytest.importorskip("peft", reason="peft is not installed: LoRA was not trained")
    lora = "  lora: {enable_lora: true, lora_rank: 4, lora_alpha: 8, lora_target_modules: [q_proj, v_proj]}\n"
    place.write(exp=EXP + lora, env=ENV + "  lora: {lora_output_dir: adapters}\n")
    place.fine()
    assert place.saved() == [] and place.saved("adapters") == ["epoch_0_step_4_#model", "epoch_1_step_4_#model"]
    last = place.path / "adapters/epoch_1_step_4_#model"
    assert (last / "adapter_model.safetensors").stat().st_size < 100_000 and (last / "tokenizer.json").exists()
    import peft

    adapted = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained("model"), last)
    assert any(tensor.any() for name, tensor in adapted.named_parameters() if "lora_B" in name)
    # An adapter can be gone on with in another run, and its losses begin where these ended.
    place.write(exp=EXP + lora, env=ENV + f"  lora: {{lora_output_dir: more, lora_weight: '{last}'}}\n")
    first = place.losses()[0, 0]
    place.fine("--run", "more")
    assert place.losses()[0, 0] != first
    place.write(exp=EXP + lora.replace("q_proj", "banana").replace("v_proj", "apple"))
    code, _, err = place.train("--run", "z")
    assert code == 2 and "lora_target_modules" in err


def test_lora_without_peft_says_so(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    place.write(exp=EXP + "  lora: {enable_lora: true}\n")
    code, _, err = place.train()
    assert code == 7 and "enable_lora: LoRA needs peft, which is not installed: pip install peft" in err


def replaced(old, new):
    return {"env": ENV.replace(old, new)} if old in ENV else {"data": DATA.replace(old, new)} if old in DATA else {"exp": EXP.replace(old, new)}


@pytest.mark.parametrize(
    "old, new, code, said",
    [
        ("path: model", "path: /home/{username}/m", 3, "env.yaml:2: path_settings.model_name_or_path: there is no folder /home/{username}/m: replace"),
        ("path: model", "path: nvme", 3, "there is no config.json in nvme"),
        ("nvme_path: nvme", "nvme_path: gone", 3, "env.yaml:3: path_settings.nvme_path: there is no gone"),
        ("nvme_path: nvme", "nvme_path: data.json", 1, "it must be a folder"),
        ("data_path: data.json", "data_path: gone.json", 3, "read gone.json: there is no such file"),
        ("question_key: question", "question_key: instruction", 2, "data.json: row 0: there is no key `instruction`, it has question, answer"),
        ("output_dir: output", "output_dir: data.json/x", 2, "env.yaml:5: path_settings.output_dir: make data.json/x: "),
        ("log_name: logs/t.log", "log_name: data.json/t.log", 1, "open the log data.json/t.log"),
        ("num_train_epochs: 2", "num_train_epochs: two", 2, "exp.yaml:4: run_settings.num_train_epochs: must be a whole number"),
        ("max_seq_len: 64", "max_seq_len: 4", 2, "gives no example to learn from"),
    ],
)
def test_mistakes_have_a_code_and_a_text(place, old, new, code, said):
    place.write(**replaced(old, new))
    got, _, err = place.train()
    assert (got, err.startswith("nvtier: error: ")) == (code, True) and said in err, err
    assert "Traceback" not in err


def test_options_that_make_no_sense(place):
    code, _, err = place.train("--vram", "8GiB")
    assert code == 2 and "--vram has no effect with --plain" in err
    for args in (["--resume", "--fresh"], ["--run", "../x"], ["--seed", "-1"], ["--commit-every", "0"], ["--frobnicate"]):
        with pytest.raises(SystemExit) as caught:
            place.train(*args)
        assert caught.value.code == 2
    pool = place.path / "pool"
    nvtier.format(pool)
    code, _, err = place.train("--pool", str(pool))
    assert code == 2 and "is the folder of a pool, and --plain keeps ordinary files" in err


def test_ranks_are_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = place.train(plain=False)
    assert code == cli.UNSUPPORTED and "WORLD_SIZE=2" in err and "nvtier.train.offload" in err
    assert not os.listdir(place.path / "nvme")
    monkeypatch.setenv("WORLD_SIZE", "1")
    place.fine("--check")


def test_a_model_larger_than_memory_is_refused_before_it_is_loaded(place):
    (place.path / "model").unlink()
    shutil.copytree(Path(os.environ["NVTIER_MODEL"]) / "snapshot", place.path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((place.path / "model/config.json").read_text())
    # 30 layers of 1.2 TB: the weights need not be there to know that.
    config.update(hidden_size=576 * 200, intermediate_size=1536 * 1000)
    (place.path / "model/config.json").write_text(json.dumps(config))
    code, _, err = place.train()
    assert code == 6 and re.search(r"load the model model: it takes \d{4,}\.\d GB of the host's memory while it is loaded, and \d", err), err
    # With the offload as well, where its files cannot be read a part at a time.
    code, _, err = place.train(plain=False)
    assert code == 6 and "only safetensors" in err, err


def test_a_full_drive_is_noticed_before_the_training(place, monkeypatch):
    from nvtier.train import _saver

    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(_saver.os, "statvfs", lambda path: Full if "output" in str(path) else real(path))
    code, _, err = place.train()
    assert code == 6 and "output has 0.0 MB free and a saved model needs about" in err and not place.events("iteration")


FULL = """\
mount -t tmpfs -o size=22m none nvme || exit 99
train() { "$PYTHON" -m nvtier.train.cli --env_config env.yaml --exp_config exp.yaml --plain --quiet --commit-every 1; echo "$? $(ls nvme/nvtier-train)"; }
train
mount -o remount,size=64m nvme
train
"""


def test_a_drive_that_fills_up_and_is_given_room(place):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small file system of its own needs `unshare -m`, which is not allowed here")
    # State of 9.5 MB, twice while it is replaced, and a saved model of 7 MB.
    place.write(env=ENV.replace("output_dir: output", "output_dir: nvme/output"))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL], cwd=place.path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S,
        check=False, env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "model.lock", "model.pt"] + ["0", "model.lock", "model.pt"], (done.stdout, done.stderr)
    assert "model.pt.part: No space left on device; the state of the commit before is still there" in done.stderr
    assert [event["resumed"] for event in place.events("start")] == [False, True]
    assert sorted(place.losses()) == [(epoch, iteration) for epoch in range(2) for iteration in range(5)]


def test_json_quiet_and_check(place):
    place.write(exp=EXP + "  max_iter: 1\n")
    events = [json.loads(line)["event"] for line in place.fine("--json").splitlines()]
    assert events == ["start", "iteration", "epoch", "save", "iteration", "epoch", "save", "end"]
    assert place.fine("--quiet", "--fresh") == ""
    shutil.rmtree(place.path / "logs")
    out = place.fine("--check")
    assert "sums: data.json, qa" in out and "2 an update" in out and not (place.path / "logs").exists()
    assert json.loads(place.fine("--check", "--json"))["accumulation"] == 2
    place.write(exp=EXP.replace("max_seq_len", "max_seqlen"))
    code, _, err = place.train("--json")
    error = json.loads(err)["error"]
    assert code == error["code"] == 2 and "did you mean `max_seq_len`?" in error["message"] and error["kind"] == "ConfigError"


def test_a_reader_that_goes_away_does_not_stop_it(place):
    place.write(exp=EXP + "  max_iter: 1\n")
    with ended(place.spawn()) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert "training complete!" in (place.path / "logs/t.log").read_text()


@pytest.fixture
def offloaded():
    if not hasattr(nvtier.train, "offload"):
        pytest.skip("this build has no nvtier.train.offload: trainings with tiers were not run")


def test_the_offload_gives_the_same_numbers_and_survives_a_kill(place, whole, offloaded):
    # A little of the device and of the host, so that weights stream.
    budgets = ["--vram", "16MiB", "--ram", "1MiB"]
    with ended(place.spawn(*budgets, plain=False)) as process:
        place.wait_for_updates(process, 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = place.fine(*budgets, plain=False)
    assert "going on with the run model after update" in out
    assert place.losses() == whole[0] and equal(weights("output/epoch_1_step_4_#model"), whole[1])
    stats = place.events("iteration")[-1]["stats"]
    assert stats["drive_written_bytes"] > 0 and stats["device_bytes"] <= stats["device_peak_bytes"] <= 16 << 20
    # The drive's mount point has become a pool's. Anew, with what the host has; a pool that is named is taken as it is.
    nvtier.Pool("nvme/nvtier-pool").close()
    place.write(exp=EXP + "  max_iter: 2\n", env=ENV.replace("output_dir: output", "output_dir: ''"))
    place.fine("--fresh", "--pool", "nvme/nvtier-pool", plain=False)
    assert place.events("start")[-1]["resumed"] is False and place.losses()[0, 0] == whole[0][0, 0]


@pytest.mark.parametrize("asked", [True, False])
def test_the_model_need_not_fit_into_memory(place, whole, offloaded, monkeypatch, asked):
    from nvtier.train import _model, _setup

    def load(*args):
        raise AssertionError("the model was loaded into memory")

    monkeypatch.setattr(_model, "load", load)
    if not asked:
        # Where its 3 MB have no room.
        monkeypatch.setattr(_setup, "_available", lambda: 1 << 20)
    out = place.fine("--vram", "16MiB", *(["--lazy"] if asked else []), plain=False)
    assert "go from their files into the pool, a layer at a time" in out
    assert place.losses() == whole[0] and equal(weights("output/epoch_1_step_4_#model"), whole[1])


def test_what_has_to_be_in_memory_says_so(place, offloaded):
    code, _, err = place.train("--lazy")
    assert code == cli.USAGE and "--lazy has no effect with --plain" in err
    place.write(exp=EXP + "  from_config: true\n")
    code, _, err = place.train("--lazy", plain=False)
    assert code == cli.UNSUPPORTED and "--lazy" in err and "from_config" in err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_with_the_offload(place, whole, offloaded, number, code):
    with ended(place.spawn(plain=False)) as process:
        place.wait_for_updates(process, 1)
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code and "can be gone on with after update" in out, out + err
    place.fine("--resume", plain=False)
    assert place.losses() == whole[0] and equal(weights("output/epoch_1_step_4_#model"), whole[1])


@pytest.fixture
def program():
    found = os.environ.get("NVTIER_BIN") or shutil.which("nvtier")
    if not found:
        pytest.skip("no nvtier program: set NVTIER_BIN to run `nvtier train`")
    return found


def test_a_pool_that_is_mounted(place, program, offloaded):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here: no pool can be mounted")
    nvtier.format("a pool")
    (place.path / "mnt").mkdir()
    done = subprocess.run([program, "mount", "a pool", "mnt"], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode == 7:
        pytest.skip("mounting is not possible here: " + done.stderr)
    assert done.returncode == 0, done.stderr
    try:
        place.write(env=ENV.replace("nvme_path: nvme", "nvme_path: mnt"), exp=EXP + "  max_iter: 2\n")
        out = place.fine(plain=False)
        assert f"create current swap data path: {place.path / 'a pool'}, run model" in out
        # Files of --plain are ordinary ones, also there.
        place.write(env=ENV.replace("nvme_path: nvme", "nvme_path: mnt").replace("output_dir: output", "output_dir: mnt/output"), exp=EXP + "  max_iter: 2\n")
        before = place.losses()
        place.fine()
        assert place.losses() == before and place.saved("mnt/output") == ["epoch_0_step_1_#model", "epoch_1_step_1_#model"]
        assert (place.path / "mnt/nvtier-train/model.pt").exists()
        assert "training complete!" in place.fine("--resume")
    finally:
        subprocess.run([program, "umount", "mnt"], timeout=LIMIT_S, check=True)


def test_mistakes_with_the_offload(place, offloaded):
    code, _, err = place.train("--resume", plain=False)
    assert code == 3 and "has none of that name" in err
    code, _, err = place.train("--vram", "4096", plain=False)
    assert code == 6 and "needs at least" in err
    place.write(env=ENV + "  optimizer_path: nvme\n")
    code, _, err = place.train(plain=False)
    assert code == 7 and "path_settings.optimizer_path: with the offload, a run goes on from its pool" in err
    place.write(exp=EXP + "  max_iter: 2\n  enable_save_optimizer_state: true\n")
    assert "the pool holds it with every update" in place.fine("--fresh", plain=False)


def test_lora_with_the_offload(place, offloaded):
    pytest.importorskip("peft", reason="peft is not installed: LoRA was not trained")
    lora = "  lora: {enable_lora: true, lora_rank: 4, lora_target_modules: [q_proj, v_proj]}\n"
    saved = []
    for plain in (True, False):
        place.write(exp=EXP + lora, env=ENV + f"  lora: {{lora_output_dir: adapters-{plain}}}\n")
        place.fine(plain=plain)
        saved.append(Path(f"adapters-{plain}/epoch_1_step_4_#model/adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1]


def test_a_build_without_the_offload_says_so(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtier.train._offload", None)
    monkeypatch.delattr(nvtier.train, "offload", raising=False)
    code, _, err = place.train(plain=False)
    assert code == 7 and "no nvtier.train.offload" in err and "--plain" in err


def test_the_command_becomes_the_training(place, program):
    place.write(exp=EXP + "  max_iter: 1\n")
    with ended(place.spawn("--python", sys.executable, program=(program, "train"))) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and "training complete!" in out, err
    place.write(exp=EXP)
    shutil.rmtree("logs")
    with ended(place.spawn("--fresh", program=(program, "train"), NVTIER_PYTHON=sys.executable)) as process:
        place.wait_for_updates(process, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    place.write(exp=EXP.replace("num_train_epochs", "num_train_epoch"))
    with ended(place.spawn(program=(program, "train"), NVTIER_PYTHON=sys.executable)) as process:
        _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "exp.yaml:4: run_settings.num_train_epoch: unknown key" in err


def test_the_command_says_what_python_lacks(place, program, tmp_path):
    def train(python):
        done = subprocess.run(
            [program, "train", "--env_config", "env.yaml", "--exp_config", "exp.yaml", "--python", python],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S,
            check=False, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )  # fmt: skip
        return done.returncode, done.stderr

    code, err = train("/nonexistent/python")
    assert code == 2 and "start Python as /nonexistent/python" in err
    # A Python that sees only its own library.
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    code, err = train(str(bare))
    assert code == 7 and "it has no nvtier and no torch and no transformers and no yaml" in err and "pip install torch transformers PyYAML" in err
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 3\n")
    broken.chmod(0o755)
    code, err = train(str(broken))
    assert code == 7 and "out of order" in err


def test_the_real_model_for_two_updates(place):
    (place.path / "model").unlink()
    (place.path / "model").symlink_to(Path(os.environ["NVTIER_MODEL"]) / "snapshot")
    (place.path / "data.json").write_text(json.dumps([{"text": "The capital of France is Paris, where the otters live."}]))
    exp = "run_settings:\n  per_update_total_batch_size: 1\n  num_train_epochs: 2\n  lr_scheduler: {learning_rate: 1.0e-4, mode: -1}\n"
    saver = "  model_saver: {max_num_of_saved_model_on_epoch_end: 1}\n"
    place.write(exp=exp + saver, data="text:\n  data_path: data.json\n  strategy: pretrain\n  text: text\n")
    place.fine()
    losses = list(place.losses().values())
    # It speaks English, has never heard of these otters, and learns.
    assert len(losses) == 2 and 2 < losses[0] < 6 and losses[-1] < losses[0] - 0.2, losses
    last, before = place.path / "output/epoch_1_step_0_#model", weights("model")
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(last, dtype="auto"), hf.AutoTokenizer.from_pretrained(last)
    assert model.dtype == torch.float32 and not equal(model.state_dict(), before) and model.state_dict().keys() == before.keys()
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])


def test_help_names_every_option():
    done = subprocess.run([sys.executable, "-m", "nvtier.train.cli", "--help"], capture_output=True, text=True, timeout=LIMIT_S, check=True)
    for option in ("--env_config", "--exp_config", "--pool", "--run", "--vram", "--ram", "--plain", "--resume", "--fresh", "130 and 143"):
        assert option in done.stdout
