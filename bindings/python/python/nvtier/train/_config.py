"""aiDAPTIV's files: ``env_config.yaml``, ``exp_config.yaml`` and those of data sets, read unchanged.

A key that nvtier does not support is an error that names it, never silence; one that has no meaning here is named in a warning. What each key
does is in docs/guides/train.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import yaml

from ._yaml import Field, Problems, Section, documents, line, pairs, read, section

#: Strategies of data sets.
STRATEGIES = ("qa", "pretrain", "rag")


def _only(*allowed: Any, why: str) -> Callable[[Any], Optional[str]]:
    def refuse(value: Any) -> Optional[str]:
        if value in allowed:
            return None
        return f"`{value}` is not supported: {why}"

    return refuse


def _unsupported(why: str) -> Callable[[Any], Optional[str]]:
    return lambda value: f"is not supported: {why}"


def _between_0_and_1(value: float) -> Optional[str]:
    return None if 0 <= value < 1 else f"must be from 0 to below 1, not {value:g}"


def _positive(value: float) -> Optional[str]:
    return None if value > 0 else f"must be above 0, not {value:g}"


def _kept(value: int) -> Optional[str]:
    return None if value == -1 or value >= 1 else f"must be -1 (all) or at least 1, not {value}"


def _gpus(value: str) -> Optional[str]:
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdigit() for word in words):
        return f"must be numbers of GPUs, not `{value}`"
    return None if len(words) == 1 else f"`{value}` is not supported: this version trains on one GPU, name one"


_ONE_PROCESS = "has no effect: this version trains in one process"

ENV: Dict[str, Any] = {
    "path_settings": {
        "model_name_or_path": Field("text", required=True),
        "nvme_path": Field("text", required=True),
        "train_data_path": Field("texts", required=True),
        "val_data_path": Field("texts", default=[]),
        "output_dir": Field("text"),
        "log_name": Field("text"),
        "optimizer_path": Field("text"),
        "multi_node_env_path": Field("text", refuse=_unsupported("this version trains on one machine")),
        "lora": {
            "lora_weight": Field("text"),
            "lora_optimizer": Field("text"),
            "lora_output_dir": Field("text"),
        },
    }
}

EXP: Dict[str, Any] = {
    "process_settings": {
        "num_gpus": Field("int", 1, refuse=_only(1, why="this version trains on one GPU")),
        "specify_gpus": Field("text", refuse=_gpus),
        "master_port": Field("int", 8299, idle=lambda value: _ONE_PROCESS),
        "multi_node_settings": {
            "enable": Field("bool", False, refuse=_only(False, why="this version trains on one machine")),
            "master_addr": Field("text", "127.0.0.1", idle=lambda value: _ONE_PROCESS),
        },
    },
    "run_settings": {
        "task_type": Field("text", "text-generation", refuse=_only("text-generation", why="only text-generation is")),
        "task_mode": Field("text", "train", refuse=_only("train", why="scripts of your own call nvtier.train.offload themselves")),
        "per_device_train_batch_size": Field("int", 1, minimum=1),
        "per_update_total_batch_size": Field("int", 128, minimum=1),
        "num_train_epochs": Field("int", 1, minimum=1),
        "max_iter": Field("int", -1, refuse=_kept),
        "max_seq_len": Field("int", 2048, minimum=2),
        "triton": Field("bool", True, idle=lambda value: "has no effect: PyTorch's own kernels run" if value else None),
        "weight_file_format": Field(
            "text", refuse=_only("safetensors", "bin", "pt", "pth", why="there are safetensors, bin, pt, pth and null (whichever is there)")
        ),
        "from_config": Field("bool", False),
        "precision_mode": Field("int", 1, refuse=_only(0, 1, why="there are 0 (BF16) and 1 (BF16 with FP32 masters)")),
        "enable_save_optimizer_state": Field("bool", False),
        "model_saver": {
            "max_num_of_saved_model_on_epoch_end": Field("int", -1, refuse=_kept),
            "enable_save_model_on_iteration": Field("bool", False),
            "max_num_of_saved_model_on_iteration": Field("int", 2, refuse=_kept),
            "num_of_iteration_to_save_model": Field("int", 2, minimum=1),
        },
        "lr_scheduler": {
            "learning_rate": Field("float", 7e-6, refuse=_positive),
            "mode": Field("int", 1, refuse=_only(-1, 0, 1, 2, 3, 4, 5, why="there are -1 to 5")),
        },
        "optimizer": {
            "beta1": Field("float", 0.9, refuse=_between_0_and_1),
            "beta2": Field("float", 0.95, refuse=_between_0_and_1),
            "eps": Field("float", 1e-8, refuse=_positive),
            "weight_decay": Field("float", 0.01, minimum=0),
        },
        "early_stop": {
            "enable": Field("bool", False),
            "min_delta": Field("float", 0.01, minimum=0),
            "patience": Field("int", 2, minimum=1),
            "verbose": Field("bool", False),
        },
        "lora": {
            "enable_lora": Field("bool", False),
            "lora_rank": Field("int", 8, minimum=1),
            "lora_alpha": Field("float", 16.0, refuse=_positive),
            "lora_task_type": Field("text", "CAUSAL_LM", refuse=_only("CAUSAL_LM", why="only CAUSAL_LM is")),
            "lora_target_modules": Field("texts"),
        },
    },
}

_IMAGES = _unsupported("pictures are not")

DATASET: Dict[str, Any] = {
    "data_path": Field("text", required=True),
    "strategy": Field("text", required=True),
    "exp_type": Field("text", "train", refuse=_only("train", "eval", why="data to train on is of type train, to validate with train or eval")),
    "system_prompt": Field("text"),
    "user_prompt": Field("text"),
    "question_key": Field("texts"),
    "answer_key": Field("texts"),
    "rag_key": Field("texts"),
    "label_key": Field("texts"),
    "message_key": Field("text"),
    "text": Field("text"),
    "image_key": Field("text", refuse=_IMAGES),
    "image_folder": Field("text", refuse=_IMAGES),
}


@dataclass(frozen=True)
class Config:
    """Both files, the data sets they name, and what is to be said as a warning."""

    paths: Section
    process: Section
    run: Section
    train: Tuple[Section, ...]
    validation: Tuple[Section, ...]
    warnings: Tuple[str, ...]

    @property
    def accumulation(self) -> int:
        """Micro-batches of an update."""
        return self.run.per_update_total_batch_size // (self.process.num_gpus * self.run.per_device_train_batch_size)


def load(env_path: str, exp_path: str) -> Config:
    """Reads all files. Raises ``ConfigError`` with everything that is wrong in them, ``NotFound`` for a file that is not there."""
    problems = Problems()
    paths = read(env_path, ENV, problems).path_settings
    exp = read(exp_path, EXP, problems)
    _agree(paths, exp, problems)
    train = _datasets(paths, "train_data_path", env_path, problems)
    validation = _datasets(paths, "val_data_path", env_path, problems)
    for each in train:
        if each.exp_type == "eval":
            problems.error(each.where("exp_type"), "`eval` is not data to train on: name this file in val_data_path")
    problems.settle()
    return Config(paths, exp.process_settings, exp.run_settings, train, validation, tuple(problems.warnings))


def _agree(paths: Section, exp: Section, problems: Problems) -> None:
    """What concerns several keys."""
    run, gpus = exp.run_settings, exp.process_settings.num_gpus
    total, each = run.per_update_total_batch_size, run.per_device_train_batch_size
    if total % (gpus * each):
        problems.error(
            run.where("per_update_total_batch_size"), f"{total} is no multiple of num_gpus x per_device_train_batch_size, {gpus} x {each}"
        )
        return
    saver, accumulation = run.model_saver, total // (gpus * each)
    if saver.enable_save_model_on_iteration and saver.num_of_iteration_to_save_model % accumulation:
        problems.error(
            saver.where("num_of_iteration_to_save_model"),
            f"{saver.num_of_iteration_to_save_model} is no multiple of the {accumulation} iterations of an update",
        )
    lora = paths.lora
    for key, value in lora.items():
        if value and not run.lora.enable_lora:
            problems.warn(lora.where(key), "has no effect: run_settings.lora.enable_lora is false")
    if run.lora.enable_lora and paths.optimizer_path:
        problems.error(paths.where("optimizer_path"), "is the state of a full model; with LoRA name lora.lora_optimizer")
    if not (lora.lora_output_dir if run.lora.enable_lora else None) and not paths.output_dir:
        problems.warn(paths.where("output_dir"), "is empty: the trained model will not be saved")
    elif run.lora.enable_lora and not lora.lora_output_dir:
        problems.warn(lora.where("lora_output_dir"), f"is empty: adapters go to output_dir, {paths.output_dir}")


def find(path: str, beside: str) -> str:
    """A file that is read: below the current folder, as in aiDAPTIV, or beside the file that names it."""
    other = os.path.join(os.path.dirname(beside), path)
    return path if os.path.exists(path) or not os.path.exists(other) else other


def _datasets(paths: Section, key: str, env_path: str, problems: Problems) -> Tuple[Section, ...]:
    sets: List[Section] = []
    for name in paths[key] or ():
        file = os.path.normpath(find(name, env_path))
        if not os.path.exists(file):
            problems.error(paths.where(key), f"there is no file {name}")
            continue
        found = _read_datasets(file, problems)
        if not found:
            problems.error(file, "it names no data set")
        for each in found:
            same = next((other for other in sets if other.name == each.name), None)
            if same is not None and same.file != each.file:
                problems.error(f"{file}:{each.line}: {each.name}", f"is the name of another data set, {same.file}:{same.line}")
            sets.append(each)
    return tuple(sets)


def _read_datasets(file: str, problems: Problems) -> List[Section]:
    sets: List[Section] = []

    def take(name: str, node: yaml.Node) -> None:
        earlier = next((each for each in sets if each.name == name), None)
        if earlier is not None:
            problems.error(f"{file}:{line(node)}: {name}", f"is the name of another data set, on line {earlier.line}")
        before = len(problems.errors)
        found = section(node, DATASET, name, file, problems)
        if len(problems.errors) == before:
            _check(found, problems)
        sets.append(found)

    for document in documents(file):
        if not isinstance(document, yaml.MappingNode):
            problems.error(f"{file}:{line(document)}", "must be the name of a data set, and its keys below that")
            continue
        keys = {key.value for key, _ in document.value if isinstance(key, yaml.ScalarNode)}
        if keys & {"data_path", "strategy"}:
            # A set without a name of its own.
            take(f"set {len(sets) + 1}", document)
            continue
        for name, _, node in pairs(document, "", file, problems):
            take(name, node)
    return sets


def _check(found: Section, problems: Problems) -> None:
    """What the strategy of a data set needs and what it has no use for."""
    strategy = found["strategy"] = found.strategy.lower()
    if strategy not in STRATEGIES:
        known = {"harmony", "vqa"}
        reason = "is not supported" if strategy in known else "is unknown"
        problems.error(found.where("strategy"), f"`{strategy}` {reason}: there are {', '.join(STRATEGIES)}")
        return
    needed = {"qa": ["question_key", "answer_key"], "rag": ["question_key", "answer_key", "rag_key"], "pretrain": ["text"]}[strategy]
    if strategy == "qa" and found.message_key:
        needed = []
    for key in needed:
        if not found[key]:
            problems.error(found.where(key), f"must be given for the strategy {strategy}")
    useless = {"pretrain": ["system_prompt", "user_prompt", "question_key", "answer_key", "rag_key", "message_key", "label_key"]}.get(strategy, ["text"])
    useless = useless + (["rag_key"] if strategy == "qa" else [])
    if strategy == "rag":
        useless.append("message_key")
    if found.message_key and strategy == "qa":
        useless += ["question_key", "answer_key", "user_prompt"]
    for key in useless:
        if found[key]:
            with_messages = " with message_key" if found.message_key and strategy == "qa" else ""
            problems.error(found.where(key), f"has no use for the strategy {strategy}{with_messages}")
    if found.label_key and found.answer_key and found.label_key != found.answer_key:
        problems.error(found.where("label_key"), "another key than answer_key is not supported: the answer is what is learned")
    questions, answers = found.question_key or [], found.answer_key or []
    if len(questions) != len(answers):
        problems.error(found.where("answer_key"), f"has {len(answers)} keys and question_key {len(questions)}: a turn has one of each")
    if found.rag_key and len(found.rag_key) not in (1, len(questions)):
        problems.error(found.where("rag_key"), f"has {len(found.rag_key)} keys and question_key {len(questions)}")
    prompt = found.user_prompt
    if prompt and strategy != "pretrain":
        if "{question}" not in prompt:
            problems.error(found.where("user_prompt"), "does not say where the {question} goes")
        if strategy == "rag" and "{rag}" not in prompt:
            problems.error(found.where("user_prompt"), "does not say where {rag}, what was retrieved, goes")
        if strategy == "qa" and "{rag}" in prompt:
            problems.error(found.where("user_prompt"), "has a {rag}, which the strategy qa has not")
    elif strategy == "rag":
        problems.error(found.where("user_prompt"), "must be given for the strategy rag, with {question} and {rag}")
