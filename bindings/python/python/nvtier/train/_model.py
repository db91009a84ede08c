"""Model and tokenizer of a training, from a folder in Hugging Face's layout."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any, List, Optional

import torch
import transformers

from .._errors import InvalidArgument, Malformed, NotFound, NotSupported
from ._yaml import Section

#: Files that belong to a model and are not its weights or configuration: they are copied byte for byte.
_BESIDE = (
    "tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece", "chat_template", "preprocessor_config", "processor_config",
    "video_preprocessor_config", "image_processor_config", "feature_extractor", "generation_config",
)  # fmt: skip


if not sys.stderr.isatty():
    # Bars are for eyes.
    transformers.utils.logging.disable_progress_bar()


def check(folder: str, where: str) -> None:
    """Says before anything is loaded what is wrong with a model's folder."""
    if not os.path.isdir(folder):
        hint = ": replace the part in braces" if "{" in folder else "; a model is a folder with config.json, fetch it first (`hf download`, `nvtier import`)"
        raise NotFound(f"{where}: there is no folder {folder}{hint}")
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise NotFound(f"{where}: there is no config.json in {folder}; a model is a folder in Hugging Face's layout")


def tokenizer(folder: str) -> Any:
    """The tokenizer beside the model."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise Malformed(f"load the tokenizer of {folder}: {error}") from error


def _dtype(run: Section) -> torch.dtype:
    """The type in which a model is loaded. Below adapters all is BF16."""
    return torch.bfloat16 if run.precision_mode == 0 or run.lora.enable_lora else torch.float32


def outline(folder: str, run: Section) -> torch.nn.Module:
    """The model without any weights, to count by."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=_dtype(run))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Malformed(f"load the model {folder}: {error}") from error


def load(folder: str, run: Section) -> torch.nn.Module:
    """The model on the host, in the type that is trained; or of its configuration, with weights at random."""
    dtype = _dtype(run)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if run.from_config:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        elif run.weight_file_format in ("pt", "pth"):
            model = _of_states(folder, config, dtype, "." + run.weight_file_format, run.where("weight_file_format"))
        else:
            form = {"safetensors": True, "bin": False}.get(run.weight_file_format)
            options = {} if form is None else {"use_safetensors": form}
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
            )
            _complete(folder, report)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, (Malformed, NotFound)):
            raise
        raise Malformed(f"load the model {folder}: {error}") from error
    return _ready(model)


def lazy(folder: str, run: Section) -> Optional[str]:
    """Why a model cannot be trained without having been in memory as a whole; None: it can."""
    if run.from_config:
        return f"{run.where('from_config')}: weights at random are made in memory"
    if run.lora.enable_lora:
        return f"{run.lora.where('enable_lora')}: what is below adapters is loaded into memory"
    if run.weight_file_format in ("bin", "pt", "pth") or not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        return "only safetensors files are read a part at a time"
    return None


def skeleton(folder: str, run: Section) -> torch.nn.Module:
    """The model with buffers and without weights, else as :func:`load` gives it."""
    from .._meta import prepare

    model = outline(folder, run)
    prepare(model)
    return _ready(model)


def _ready(model: torch.nn.Module) -> torch.nn.Module:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return model


def _complete(folder: str, report: Any) -> None:
    """A weight that the files have not would be trained from random numbers."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise Malformed(f"load the model {folder}: its files lack {len(missing)} weights, {', '.join(missing[:3])} first")


def _of_states(folder: str, config: Any, dtype: torch.dtype, extension: str, where: str) -> torch.nn.Module:
    files = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(extension))
    if not files:
        raise NotFound(f"{where}: there is no file in {folder} that ends with {extension}")
    weights = {}
    for file in files:
        try:
            weights.update(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except Exception as error:
            raise Malformed(f"load {file}: {str(error).splitlines()[0]}") from error
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise Malformed(f"load the model {folder}: its files lack {missing[:3]} and have {list(unexpected)[:3]}, which the model has not")
    return model


def adapters(model: torch.nn.Module, paths: Section, run: Section) -> torch.nn.Module:
    """The model with LoRA adapters, everything else frozen."""
    settings, weight = run.lora, paths.lora.lora_weight
    try:
        import peft
    except ImportError:
        raise NotSupported(f"{settings.where('enable_lora')}: LoRA needs peft, which is not installed: pip install peft") from None
    if weight:
        if not os.path.exists(os.path.join(weight, "adapter_config.json")):
            raise NotFound(f"{paths.lora.where('lora_weight')}: there is no adapter_config.json in {weight}")
        adapted = peft.PeftModel.from_pretrained(model, weight, is_trainable=True)
    else:
        alpha = settings.lora_alpha
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
            target_modules=settings.lora_target_modules,
            task_type=settings.lora_task_type,
        )
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise InvalidArgument(f"{settings.where('lora_target_modules')}: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if run.precision_mode == 0 else torch.float32)
    return adapted


def fits(model: torch.nn.Module, highest: int, longest: int, warn: Any) -> None:
    """Tokens that the model has no row for end in an unreadable error on a GPU."""
    rows = model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise InvalidArgument(f"the tokenizer makes token {highest} and the model has {rows} rows: they do not belong together")
    most: Optional[int] = getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        warn(f"max_seq_len is {longest}; the model was made for {most} positions")


def copy_beside(source: str, target: str) -> List[str]:
    """Tokenizer, processors and templates, as they are in the model's folder."""
    copied = []
    for name in sorted(os.listdir(source)):
        if name.startswith(_BESIDE) and os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
            copied.append(name)
    return copied
