"""The types that are promised are those of the compiled module: every name of ``_nvtier.pyi`` is there with these parameters, and nothing else is."""

import ast
import inspect
import pathlib

import nvtier
from nvtier import _nvtier

STUB = pathlib.Path(nvtier.__file__).with_name("_nvtier.pyi")
#: What every class has.
COMMON = set(dir(object)) | {"__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__slots__"}
#: Of exceptions: what Python gives them.
EXCEPTION = set(dir(OSError)) | set(dir(Exception))


def parameters(node):
    """Names in order, ``*`` where only keywords follow."""
    found = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
    if node.args.vararg:
        found.append("*" + node.args.vararg.arg)
    elif node.args.kwonlyargs:
        found.append("*")
    found += [argument.arg for argument in node.args.kwonlyargs]
    return found + ([node.args.kwarg.arg] if node.args.kwarg else [])


def parameters_of(thing):
    found, keywords = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            found.append("*")
            keywords = True
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.append("*" + parameter.name)
            keywords = True
        else:
            found.append(parameter.name)
    return found


def functions(body):
    """By name; of a property, its getter."""
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def is_property(node):
    return any(isinstance(one, ast.Name) and one.id == "property" for one in node.decorator_list)


def test_the_stub_says_what_is_there():
    tree = ast.parse(STUB.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    wrong = []
    for name, node in functions(tree.body).items():
        thing = getattr(_nvtier, name, None)
        if thing is None:
            wrong.append(f"{name}() is not there")
        elif parameters(node) != parameters_of(thing):
            wrong.append(f"{name}: {parameters(node)} is promised, {parameters_of(thing)} is there")
    for name, node in classes.items():
        kind = getattr(_nvtier, name, None)
        if kind is None:
            wrong.append(f"class {name} is not there")
            continue
        for method, promised in functions(node.body).items():
            if method == "__init__":
                there = kind
            else:
                there = inspect.getattr_static(kind, method, None)
            if there is None:
                wrong.append(f"{name}.{method} is not there")
                continue
            if is_property(promised) or (method.startswith("__") and method != "__init__"):
                continue
            want = [one for one in parameters(promised) if one != "self" and one != "cls"]
            have = [one for one in parameters_of(there if method == "__init__" else getattr(kind, method)) if one != "self"]
            if want != have:
                wrong.append(f"{name}.{method}: {want} is promised, {have} is there")
    assert not wrong, "\n".join(wrong)


def test_what_is_there_is_in_the_stub():
    tree = ast.parse(STUB.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    promised = set(classes) | set(functions(tree.body))
    promised |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    missing = [name for name in dir(_nvtier) if not name.startswith("__") and name not in promised]
    for name, node in classes.items():
        kind = getattr(_nvtier, name)
        known = set(functions(node.body)) | COMMON | {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
        if issubclass(kind, BaseException):
            known |= EXCEPTION
        missing += [f"{name}.{entry}" for entry in vars(kind) if entry not in known and entry != "__new__"]
    assert not missing, missing
