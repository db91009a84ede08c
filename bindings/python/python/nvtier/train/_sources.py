"""Rows of data sets: json, jsonl, csv and parquet files, folders of them, and repositories of Hugging Face."""

from __future__ import annotations

import csv
import json
import os
import re
from typing import Any, Dict, Iterator, List, Tuple

from .._errors import Malformed, NotFound, NotSupported

Row = Dict[str, Any]

_EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet")
_POINTER = b"version https://git-lfs"


def rows(path: str, beside: str) -> Iterator[Tuple[str, Row]]:
    """Every row with where it is, ``file:line`` or ``file: row``, for messages. ``beside`` is the file that names the path."""
    from ._config import find

    place = find(path, beside)
    if os.path.isdir(place):
        for file in _inside(place):
            yield from _file(file)
    elif os.path.exists(place):
        yield from _file(place)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and os.path.splitext(path)[1].lower() not in _EXTENSIONS:
        yield from _repository(path)
    else:
        raise NotFound(f"read {path}: there is no such file or folder")


def _inside(folder: str) -> List[str]:
    """Data files of a folder in the order of their names. Where some are called train, only those: the rest is there to test with."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in names if name.lower().endswith(_EXTENSIONS)]
    if not found:
        raise NotFound(f"read {folder}: there is no file in it that ends with {', '.join(_EXTENSIONS)}")
    found.sort()
    train = [file for file in found if re.search(r"(^|[^a-z])train([^a-z]|$)", os.path.relpath(file, folder).lower())]
    return train or found


def _file(path: str) -> Iterator[Tuple[str, Row]]:
    extension = os.path.splitext(path)[1].lower()
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise NotFound(f"read {path}: {error.strerror}") from error
    if head.startswith(_POINTER):
        raise Malformed(f"read {path}: it is a pointer of git-lfs, not the data: run `git lfs pull` where it was cloned")
    read = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(extension)
    if read is None:
        raise NotSupported(f"read {path}: files of data end with {', '.join(_EXTENSIONS)}")
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise Malformed(f"read {path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _json(path: str) -> Iterator[Tuple[str, Row]]:
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        # Many files of this name hold an object a line.
        if text.lstrip().startswith("{"):
            yield from _jsonl(path)
            return
        raise Malformed(f"read {path}: {error}") from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if "data" in value and isinstance(value["data"], list):
            value = value["data"]
        elif len(lists) == 1 and len(value) == 1:
            value = lists[0]
        else:
            value = [value]
    if not isinstance(value, list):
        raise Malformed(f"read {path}: it must be a list of objects")
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise Malformed(f"read {path}: row {index} is no object with keys")
        yield f"{path}: row {index}", row


def _jsonl(path: str) -> Iterator[Tuple[str, Row]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise Malformed(f"read {path}:{number}: {error}") from None
            if not isinstance(row, dict):
                raise Malformed(f"read {path}:{number}: it is no object with keys")
            yield f"{path}:{number}", row


def _csv(path: str) -> Iterator[Tuple[str, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise Malformed(f"read {path}:{reader.line_num}: it has not as many columns as the first line names")
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            raise Malformed(f"read {path}:{reader.line_num}: {error}") from None


def _parquet(path: str) -> Iterator[Tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NotSupported(f"read {path}: parquet files need pyarrow, which is not installed: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}: row {index}", row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise Malformed(f"read {path}: {error}") from error


def _repository(name: str) -> Iterator[Tuple[str, Row]]:
    try:
        import datasets
    except ImportError:
        raise NotFound(
            f"read {name}: there is no such file or folder here; to take it from Hugging Face's hub, install its package: pip install datasets"
        ) from None
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise NotFound(f"read {name} from Hugging Face's hub: {type(error).__name__}: {error}") from error
    for index, row in enumerate(found):
        yield f"{name}: row {index}", row
