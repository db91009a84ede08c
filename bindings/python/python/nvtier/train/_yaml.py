"""YAML files that are read strictly: every key is known, every value of its type, and what is wrong is said with file and line."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import yaml

from .._errors import InvalidArgument, NotFound

_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "text",
    "texts": "text or a list of texts",
}


class ConfigError(InvalidArgument):
    """A configuration file is wrong. One line a problem, each with file and line."""


@dataclass(frozen=True)
class Field:
    """One key: type, default, and what is allowed."""

    kind: str
    default: Any = None
    required: bool = False
    #: Of numbers, the smallest.
    minimum: Optional[float] = None
    #: Gives, for a value that is not right or not supported, the reason.
    refuse: Optional[Callable[[Any], Optional[str]]] = None
    #: Gives, for a value without effect here, the reason.
    idle: Optional[Callable[[Any], Optional[str]]] = None


Schema = Mapping[str, Union[Field, "Schema"]]


class Section(Dict[str, Any]):
    """Values of a mapping as attributes, and the line of each."""

    def __init__(self, name: str, file: str, line: int) -> None:
        super().__init__()
        self.name, self.file, self.line = name, file, line
        self.lines: Dict[str, int] = {}

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def where(self, key: str) -> str:
        """``file:line: section.key`` for messages."""
        dotted = f"{self.name}.{key}" if self.name else key
        return f"{self.file}:{self.lines.get(key, self.line)}: {dotted}"


class Problems:
    """What is wrong with all files, and what is worth a warning."""

    def __init__(self) -> None:
        self.errors: List[str] = []
        self.warnings: List[str] = []

    def error(self, where: str, text: str) -> None:
        self.errors.append(f"{where}: {text}")

    def warn(self, where: str, text: str) -> None:
        self.warnings.append(f"{where}: {text}")

    def settle(self) -> None:
        """Raises when there was an error."""
        if self.errors:
            raise ConfigError("\n".join(self.errors))


def documents(path: str) -> List[yaml.Node]:
    """The documents of a file that are not empty, as nodes that know their lines."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise NotFound(f"read {path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"read {path}: {error.strerror}") from error
    try:
        return [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None and not _null(node)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: it is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: it is not YAML: {error}") from None


def read(path: str, schema: Schema, problems: Problems) -> Section:
    """The only document of a file."""
    found = documents(path)
    if len(found) > 1:
        problems.error(f"{path}:{line(found[1])}", "this file has one document; a second one begins here")
    if not found:
        return section(None, schema, "", path, problems)
    return section(found[0], schema, "", path, problems)


def line(node: yaml.Node) -> int:
    """The line, from 1, on which a node begins."""
    return node.start_mark.line + 1


def _null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"


def pairs(node: yaml.MappingNode, name: str, file: str, problems: Problems) -> Iterator[Tuple[str, yaml.Node, yaml.Node]]:
    """Keys and values of a mapping, each key once."""
    seen: Dict[str, int] = {}
    for key, value in node.value:
        dotted = f"{name}." if name else ""
        if not isinstance(key, yaml.ScalarNode):
            problems.error(f"{file}:{line(key)}", f"{dotted}: a key must be text")
        elif key.value in seen:
            problems.error(f"{file}:{line(key)}: {dotted}{key.value}", f"is there twice, first on line {seen[key.value]}")
        else:
            seen[key.value] = line(key)
            yield key.value, key, value


def section(node: Optional[yaml.Node], schema: Schema, name: str, file: str, problems: Problems, root: Optional[Schema] = None) -> Section:
    """The values of a mapping as its schema wants them."""
    root = schema if root is None else root
    values = Section(name, file, 1 if node is None else line(node))
    given: Dict[str, yaml.Node] = {}
    broken = False
    if node is None or _null(node):
        pass
    elif not isinstance(node, yaml.MappingNode):
        problems.error(f"{file}:{line(node)}: {name or 'the file'}", f"must have keys ({', '.join(schema)}), not {_shown(node)}")
        broken = True
    else:
        for key, at, value in pairs(node, name, file, problems):
            values.lines[key] = line(at)
            if key in schema:
                given[key] = value
            else:
                problems.error(values.where(key), "unknown key" + _advice(key, schema, name, root))
    for key, field in schema.items():
        value = given.get(key)
        if not isinstance(field, Field):
            inner = f"{name}.{key}" if name else key
            values[key] = section(value, field, inner, file, problems, root)
            if value is None:
                values[key].line = values.lines.get(key, values.line)
            continue
        # What is missing in something else than keys would only repeat that.
        values[key] = field.default if broken else _value(value, field, values.where(key), problems)
    return values


def _value(node: Optional[yaml.Node], field: Field, where: str, problems: Problems) -> Any:
    value = None
    if node is not None and not _null(node):
        try:
            value = _convert(node, field.kind)
        except ValueError as error:
            problems.error(where, str(error))
            return field.default
    empty = value is None or value == "" or value == []
    if empty:
        if field.required:
            problems.error(where, "must be given" if node is None else "must not be empty")
        return field.default
    if field.minimum is not None and value < field.minimum:
        problems.error(where, f"must be at least {field.minimum:g}, not {value:g}")
        return field.default
    reason = field.refuse(value) if field.refuse else None
    if reason:
        problems.error(where, reason)
    reason = field.idle(value) if field.idle else None
    if reason:
        problems.warn(where, reason)
    return value


def _convert(node: yaml.Node, kind: str) -> Any:
    wanted = ValueError(f"must be {_KINDS[kind]}, not {_shown(node)}")
    if kind == "texts":
        if isinstance(node, yaml.SequenceNode):
            return [_convert(item, "text") for item in node.value]
        return [text] if (text := _convert(node, "text")) else []
    if not isinstance(node, yaml.ScalarNode):
        raise wanted
    tag = node.tag[len(_TAG) :] if node.tag.startswith(_TAG) else node.tag
    plain = node.style is None
    if kind == "text":
        # A file may well be called 1 or 2026-01-01.
        if tag in ("bool", "null") or node.tag.startswith("!"):
            raise wanted
        return node.value
    constructor = yaml.constructor.SafeConstructor()
    if kind == "bool":
        if tag != "bool":
            raise wanted
        return constructor.construct_yaml_bool(node)
    try:
        if kind == "int" and tag == "int":
            return constructor.construct_yaml_int(node)
        if kind == "float" and tag in ("int", "float"):
            number = float(constructor.construct_yaml_int(node) if tag == "int" else constructor.construct_yaml_float(node))
        elif kind == "float" and tag == "str" and plain:
            # YAML 1.1 takes 7e-6 for text, nobody else does.
            number = float(node.value)
        else:
            raise wanted
    except (ValueError, OverflowError):
        raise wanted from None
    if not math.isfinite(number):
        raise wanted
    return number


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _null(node):
        return "nothing"
    quoted = node.style in ("'", '"')
    return f'the text "{node.value}"' if quoted else f"`{node.value}`"


def _advice(key: str, schema: Schema, name: str, root: Schema) -> str:
    """What may have been meant."""
    places = [place for place in _places(root, key) if place != name]
    if places:
        return f": it belongs below {' or '.join(place or 'no section' for place in places)}"
    near = difflib.get_close_matches(key, list(schema), n=1, cutoff=0.6)
    if near:
        return f": did you mean `{near[0]}`?"
    return f": known here are {', '.join(schema)}"


def _places(schema: Schema, key: str, name: str = "") -> List[str]:
    found = [name] if key in schema else []
    for inner, field in schema.items():
        if not isinstance(field, Field):
            found += _places(field, key, f"{name}.{inner}" if name else inner)
    return found
