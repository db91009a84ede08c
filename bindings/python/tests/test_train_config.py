"""nvtier.train's configuration: aiDAPTIV's files as they are, and every kind of mistake with file and line."""

import json

import pytest

pytest.importorskip("yaml")

import nvtier
from nvtier.train import _config, _yaml

# The vendor's example of an 8B model, key for key.
ENV = """\
# env_config.yaml
# Save_path, nvme_path, log_name settings
path_settings:
  lora:
    lora_weight: ""       # whether to load lora_weight (only activated when lora: true)
    lora_optimizer: ""    # whether to load lora_optimizer (only activated when lora: true)
    lora_output_dir: ""   # where to save lora adapter weight (only activated when lora: true)

  model_name_or_path: "/home/{username}/workspace/models/Meta-Llama-3.1-8B-Instruct"
  multi_node_env_path: null
  optimizer_path: ""      # whether to load optimizer state

  train_data_path:
    - ./QA_dataset_config.yaml

  val_data_path: null

  nvme_path: "/mnt/nvme0"
  output_dir: "output/"
  log_name: "output/PhisonAI_20GB_8B.log"
"""
EXP = """\
# exp_config.yaml

# Environmental settings
process_settings:
  num_gpus: 1
  specify_gpus: "0"
  master_port: 8299
  multi_node_settings:
    enable: False
    master_addr: "127.0.0.1"

# Running train, eval, inference related settings
run_settings:
  task_type: "text-generation"
  task_mode: "train"
  per_device_train_batch_size: 8
  per_update_total_batch_size: 160
  num_train_epochs: 1
  max_iter: -1
  max_seq_len: 12000
  triton: True
  weight_file_format: null
  from_config: false
  precision_mode: 1
  enable_save_optimizer_state: false

  model_saver:
    max_num_of_saved_model_on_epoch_end: -1  # If -1, equals num_train_epochs
    enable_save_model_on_iteration: false
    max_num_of_saved_model_on_iteration: 2
    num_of_iteration_to_save_model: 2

  lr_scheduler:
    mode: 1
    learning_rate: 0.000007

  optimizer:
    beta1: 0.9
    beta2: 0.95
    eps: 0.00000001
    weight_decay: 0.01

  early_stop:
    enable: false
    min_delta: 0.01
    patience: 2
    verbose: false

  lora:
    enable_lora: false
    lora_rank: 8
    lora_alpha: 16
    lora_task_type: "CAUSAL_LM"
    lora_target_modules: null
"""
DATA = """\
rm-static:
  data_path: "Dahoas/rm-static"
  strategy: "QA"
  system_prompt: ""
  user_prompt: "{question}"
  question_key: "instruction"
  answer_key: "response"
  label_key: "response"
  exp_type: train
"""
MINIMAL = "path_settings: {model_name_or_path: m, nvme_path: /mnt/nvme0, train_data_path: [data.yaml]}\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes the three files, changed as asked, and loads them."""
    monkeypatch.chdir(tmp_path)

    def load(env=ENV, exp=EXP, data=DATA):
        for name, text in [("env.yaml", env), ("exp.yaml", exp), ("QA_dataset_config.yaml", data), ("data.yaml", data)]:
            if text is not None:
                (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return _config.load("env.yaml", "exp.yaml")

    return load


def line_of(text, part):
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


def test_the_vendors_files_are_read_as_they_are(files):
    config = files()
    assert config.paths.model_name_or_path.endswith("Meta-Llama-3.1-8B-Instruct")
    assert (config.paths.nvme_path, config.paths.output_dir) == ("/mnt/nvme0", "output/")
    assert config.paths.lora.lora_weight is None and config.paths.optimizer_path is None
    assert config.run.per_update_total_batch_size == 160 and config.accumulation == 20
    assert config.run.lr_scheduler.learning_rate == 0.000007 and config.run.optimizer.eps == 1e-8
    assert config.run.lora.lora_target_modules is None and config.process.specify_gpus == "0"
    [data] = config.train
    assert (data.name, data.strategy, data.question_key, data.system_prompt) == ("rm-static", "qa", ["instruction"], None)
    assert config.validation == ()
    # What has no effect is said, with the reason, and nothing else is.
    assert [warning.split(": ")[0] for warning in config.warnings] == [
        f"exp.yaml:{line_of(EXP, key)}" for key in ("master_port", "master_addr", "triton")
    ]
    assert "PyTorch's own kernels" in config.warnings[2]


def test_defaults_are_the_manuals(files):
    run = files(env=MINIMAL, exp="").run
    assert run.per_device_train_batch_size == 1 and run.per_update_total_batch_size == 128 and run.max_seq_len == 2048
    assert run.num_train_epochs == 1 and run.max_iter == -1 and run.precision_mode == 1 and run.from_config is False
    assert run.lr_scheduler == {"learning_rate": 7e-6, "mode": 1}
    assert run.optimizer == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
    assert run.early_stop == {"enable": False, "min_delta": 0.01, "patience": 2, "verbose": False}
    assert run.lora.lora_rank == 8 and run.lora.lora_alpha == 16 and run.enable_save_optimizer_state is False
    saver = run.model_saver
    assert list(saver.values()) == [-1, False, 2, 2]


def test_numbers_as_people_write_them(files):
    exp = EXP.replace("0.000007", "7e-6").replace("0.00000001", "1E-8").replace('specify_gpus: "0"', "specify_gpus: 0")
    config = files(exp=exp)
    assert config.run.lr_scheduler.learning_rate == 7e-6 and config.run.optimizer.eps == 1e-8
    assert config.process.specify_gpus == "0"


# File, what is replaced, by what, what is said. The line is that of the replacement.
MISTAKES = [
    ("env", "nvme_path:", "nvme_pth:", "path_settings.nvme_pth: unknown key: did you mean `nvme_path`?"),
    ("exp", "beta1: 0.9", "beta_1: 0.9", "run_settings.optimizer.beta_1: unknown key: did you mean `beta1`?"),
    ("exp", "  max_iter: -1", "  banana: 3", "run_settings.banana: unknown key: known here are task_type"),
    ("exp", "num_train_epochs: 1", "num_train_epochs: one", "must be a whole number, not `one`"),
    ("exp", "num_train_epochs: 1", 'num_train_epochs: "1"', 'must be a whole number, not the text "1"'),
    ("exp", "num_train_epochs: 1", "num_train_epochs: 1.5", "must be a whole number, not `1.5`"),
    ("exp", "num_train_epochs: 1", "num_train_epochs: true", "must be a whole number, not `true`"),
    ("exp", "num_train_epochs: 1", "num_train_epochs: 0", "must be at least 1, not 0"),
    ("exp", "num_train_epochs: 1", "num_train_epochs: [1]", "must be a whole number, not a list"),
    ("exp", "triton: True", 'triton: "yes"', 'must be true or false, not the text "yes"'),
    ("exp", "max_iter: -1", "max_iter: 0", "must be -1 (all) or at least 1"),
    ("exp", "learning_rate: 0.000007", "learning_rate: .nan", "must be a number, not `.nan`"),
    ("exp", "learning_rate: 0.000007", "learning_rate: -1", "must be above 0"),
    ("exp", "beta2: 0.95", "beta2: 1", "must be from 0 to below 1"),
    ("exp", "    mode: 1", "    mode: 6", "run_settings.lr_scheduler.mode: `6` is not supported: there are -1 to 5"),
    ("exp", "precision_mode: 1", "precision_mode: 2", "there are 0 (BF16) and 1"),
    ("exp", "num_gpus: 1", "num_gpus: 2", "`2` is not supported: this version trains on one GPU"),
    ("exp", 'specify_gpus: "0"', 'specify_gpus: "3,2"', "trains on one GPU"),
    ("exp", 'specify_gpus: "0"', 'specify_gpus: "a"', "must be numbers of GPUs"),
    ("exp", "enable: False", "enable: True", "multi_node_settings.enable: `True` is not supported"),
    ("exp", '"text-generation"', '"image-text-to-text"', "only text-generation"),
    ("exp", 'task_mode: "train"', 'task_mode: "my/train.py"', "nvtier.train.offload"),
    ("exp", "weight_file_format: null", "weight_file_format: gguf", "there are safetensors, bin, pt, pth"),
    ("exp", "per_update_total_batch_size: 160", "per_update_total_batch_size: 12", "no multiple of num_gpus x per_device_train_batch_size, 1 x 8"),
    ("exp", '"CAUSAL_LM"', '"SEQ_CLS"', "only CAUSAL_LM"),
    ("exp", "lora_rank: 8", "lora_rank: 8\n    lora_rank: 4", None),
    ("env", "multi_node_env_path: null", "multi_node_env_path: x", "one machine"),
    ("env", 'nvme_path: "/mnt/nvme0"', "nvme_path:", "path_settings.nvme_path: must not be empty"),
    ("env", "val_data_path: null", "val_data_path: [gone.yaml]", "there is no file gone.yaml"),
    ("data", 'strategy: "QA"', "strategy: harmony", "`harmony` is not supported: there are qa, pretrain, rag"),
    ("data", 'strategy: "QA"', "strategy: q", "`q` is unknown"),
    ("data", "question_key:", "questoin_key:", "did you mean `question_key`?"),
    ("data", 'user_prompt: "{question}"', 'user_prompt: "Answer!"', "does not say where the {question} goes"),
    ("data", 'user_prompt: "{question}"', 'user_prompt: "{question} {rag}"', "which the strategy qa has not"),
    ("data", 'label_key: "response"', 'label_key: "other"', "another key than answer_key"),
    ("data", "exp_type: train", "exp_type: inference", "data to train on is of type train"),
    ("data", "exp_type: train", "exp_type: eval", "name this file in val_data_path"),
    ("data", "exp_type: train", "image_key: image", "pictures are not"),
    ("data", 'question_key: "instruction"', "question_key: [a, b]", None),
    ("data", 'data_path: "Dahoas/rm-static"', "data_path: ''", "rm-static.data_path: must not be empty"),
]  # fmt: skip


@pytest.mark.parametrize("file, old, new, said", MISTAKES)
def test_a_mistake_is_named_with_file_and_line(files, file, old, new, said):
    texts = {"env": ENV, "exp": EXP, "data": DATA}
    assert texts[file].count(old) >= 1
    texts[file] = texts[file].replace(old, new, 1)
    with pytest.raises(_yaml.ConfigError) as caught:
        files(**texts)
    name = {"env": "env.yaml", "exp": "exp.yaml", "data": "QA_dataset_config.yaml"}[file]
    if said is None:
        assert str(caught.value).startswith(f"{name}:")
        return
    at = line_of(texts[file], new.strip().splitlines()[0])
    assert f"{name}:{at}: " in str(caught.value) and said in str(caught.value)
    assert isinstance(caught.value, nvtier.InvalidArgument)


def test_all_mistakes_of_all_files_are_said_at_once(files):
    env, exp = ENV.replace("  output_dir", "  outptu_dir"), EXP.replace("lora_rank: 8", "lora_rank: x").replace("    mode: 1", "    mode: 9")
    with pytest.raises(_yaml.ConfigError) as caught:
        files(env, exp, DATA.replace("data_path", "data_pth"))
    said = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in said] == ["env.yaml", "exp.yaml", "exp.yaml", "QA_dataset_config.yaml", "QA_dataset_config.yaml"]


def test_a_block_at_the_wrong_place_is_told_where_it_belongs(files):
    exp = EXP.replace("  lr_scheduler:\n    mode: 1\n    learning_rate: 0.000007\n", "") + "lr_scheduler:\n  mode: 1\n"
    with pytest.raises(_yaml.ConfigError, match=rf"exp.yaml:{len(exp.splitlines()) - 1}: lr_scheduler: unknown key: it belongs below run_settings"):
        files(exp=exp)
    with pytest.raises(_yaml.ConfigError, match="run_settings.learning_rate: unknown key: it belongs below run_settings.lr_scheduler"):
        files(exp=EXP.replace("  max_iter: -1", "  learning_rate: 1.0"))


def test_a_key_given_twice_names_both_lines(files):
    exp = EXP.replace("    lora_rank: 8", "    lora_rank: 8\n    lora_rank: 4")
    first = line_of(exp, "lora_rank: 8")
    with pytest.raises(_yaml.ConfigError, match=f"exp.yaml:{first + 1}: run_settings.lora.lora_rank: is there twice, first on line {first}"):
        files(exp=exp)


@pytest.mark.parametrize(
    "exp, said",
    [
        ("run_settings:\n  lora: {\n", "exp.yaml:3: it is not YAML"),
        ("run_settings:\n\tlora:\n", "exp.yaml:2: it is not YAML"),
        (b"run_settings: \xff\n", "exp.yaml: it is not UTF-8"),
        ("- a\n", "exp.yaml:1: the file: must have keys"),
        ("run_settings: 3\n", "exp.yaml:1: run_settings: must have keys"),
        ("run_settings: {}\n---\nrun_settings: {}\n", "exp.yaml:3: this file has one document"),
        ("run_settings: !!python/object/apply:os.system [x]\n", "must have keys"),
        ("run_settings: &a\n  lora: *a\n", "unknown key"),
    ],
)
def test_files_that_are_no_configuration(files, exp, said):
    with pytest.raises(_yaml.ConfigError) as caught:
        files(exp=exp)
    assert said in str(caught.value)


def test_a_file_that_is_not_there(files, tmp_path):
    files()
    with pytest.raises(nvtier.NotFound, match="gone.yaml: there is no such file"):
        _config.load("gone.yaml", "exp.yaml")
    with pytest.raises(_yaml.ConfigError, match="Is a directory"):
        _config.load(str(tmp_path), "exp.yaml")


def test_saves_on_iterations_are_at_updates(files):
    exp = EXP.replace("enable_save_model_on_iteration: false", "enable_save_model_on_iteration: true")
    with pytest.raises(_yaml.ConfigError, match="num_of_iteration_to_save_model: 2 is no multiple of the 20 iterations of an update"):
        files(exp=exp)
    files(exp=exp.replace("num_of_iteration_to_save_model: 2", "num_of_iteration_to_save_model: 40"))


def test_what_is_lost_or_without_effect_is_a_warning(files):
    config = files(env=ENV.replace('output_dir: "output/"', 'output_dir: ""').replace('lora_weight: ""', 'lora_weight: "w"'))
    said = "\n".join(config.warnings)
    assert "output_dir: is empty: the trained model will not be saved" in said
    assert "lora_weight: has no effect: run_settings.lora.enable_lora is false" in said
    config = files(exp=EXP.replace("enable_lora: false", "enable_lora: true"))
    assert any("adapters go to output_dir" in warning for warning in config.warnings)


RAG = """\
one:
  data_path: a.json
  strategy: rag
  user_prompt: "Context: {rag}, based on the context answer the question: {question}"
  question_key: question
  answer_key: answer
  rag_key: context.sentences   # supports nested format
  exp_type: train
  label_key: answer
---
two:
  data_path: b.json   # a comment about data_path: is no data set
  strategy: pretrain
  system_prompt:
  user_prompt:
  text: text_column
  exp_type: train
---
# data_path
"""


def test_several_sets_in_a_file(files):
    config = files(data=RAG)
    assert [(each.name, each.strategy) for each in config.train] == [("one", "rag"), ("two", "pretrain")]
    assert config.train[0].rag_key == ["context.sentences"] and config.train[1].text == "text_column"
    # Also without names, and several names in one document.
    bare = RAG.replace("one:\n", "").replace("two:\n", "").replace("\n  ", "\n").lstrip()
    assert [each.name for each in files(data=bare).train] == ["set 1", "set 2"]
    assert len(files(data=RAG.replace("---\ntwo", "two")).train) == 2


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("two:", "one:", "QA_dataset_config.yaml:12: one: is the name of another data set, on line 2"),
        ("  rag_key: context.sentences   # supports nested format\n", "", "rag_key: must be given for the strategy rag"),
        ("  text: text_column\n", "", "text: must be given for the strategy pretrain"),
        ("{rag}, ", "", "user_prompt: does not say where {rag}"),
        ("  text: text_column\n", "  text: t\n  question_key: q\n", "question_key: has no use for the strategy pretrain"),
        ("  user_prompt:\n", "  user_prompt: Hm\n", "user_prompt: has no use for the strategy pretrain"),
        ("answer_key: answer\n", "answer_key: [a, b]\n", "has 2 keys and question_key 1"),
    ],
)
def test_mistakes_of_strategies(files, old, new, said):
    assert old in RAG
    with pytest.raises(_yaml.ConfigError) as caught:
        files(data=RAG.replace(old, new, 1))
    assert said in str(caught.value)


def test_paths_are_below_the_current_folder_or_beside_the_file_that_names_them(files, tmp_path, monkeypatch):
    files()
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    config = _config.load("../env.yaml", "../exp.yaml")
    assert config.train[0].file == "../QA_dataset_config.yaml"
    (other / "QA_dataset_config.yaml").write_text(DATA.replace("rm-static:", "nearer:"))
    assert _config.load("../env.yaml", "../exp.yaml").train[0].name == "nearer"


def test_configurations_are_json(files):
    json.dumps(files().run)
