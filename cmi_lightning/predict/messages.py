"""What the parser of options says, in one sentence with the nearest name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any

from cmi_lightning.errors import one_sentence, wording

LONGEST = 300  # characters of another library's words
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
}


def explain(message: str, options: Iterable[str]) -> str:
    """Return a sentence for a parser's message, given the names of all options.

    >>> explain("unrecognized arguments: --model.num_step=5", ["model.num_steps"])
    'There is no option --model.num_step; did you mean --model.num_steps?'
    """
    lines, message = message, one_sentence(message)
    if found := re.search(r"nrecognized arguments: (\S+)", message):
        name = found[1].partition("=")[0]
        return f"There is no option {name}{nearest(name, [f'--{o}' for o in options])}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        name = ".".join(found.groups())
        return f"There is no option {name}{nearest(name, options)}"
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    where = f"{key[1]}: " if key else ""
    if where == "trainer.precision: " and message.endswith("value: auto"):
        return "trainer.precision has no auto: set model.precision to auto."
    required = r"(?:the following .* required: (.*)|Option '([\w.]+)' is required)"  # or older
    if lacks := re.search(rf"class_path '[\w.]*?(\w+)':\s+{required}", lines):
        names = lacks[2] or lacks[3]
        option = f": give --{key[1]}.init_args.{names.partition(',')[0]}" if key else ""
        return f"{where}{lacks[1]} needs {names}{option}."
    if lacks := re.search(f"^{required}", message):
        return f"There is no {lacks[1] or lacks[2]}: give a configuration that has it, by -c."
    if key and (one := re.search(r"Expected a <class 'list'>.*Given value: ([\w.]+)$", message)):
        return f"{where}it is a list: --{key[1]}+={one[1]} adds to it."
    if wrong := _wrong_value(lines):
        return wrong
    known = re.findall(r"class_path '([\w.]+)'[^']*Option '([^']+)' is not accepted", message)
    if known:
        path, option = known[-1]
        return f"{where}{path} has no option '{option}'{nearest(option, _arguments(path))}"
    missing = re.search(r"Expected a dot import path string: ([^\s,;]+)", message)
    base = re.search(r"(?:<class '|list\[)((?:cmi_lightning|torch|lightning)\.[\w.]+)", message)
    if missing and "." not in missing[1]:
        classes = _classes(base[1]) if base else ()
        return f"{where}there is no class '{missing[1]}'{nearest(missing[1], classes)}"
    if found := re.search(r"Unexpected import path format: (\S+)", message):
        own = [name for name in options if key and name.startswith(f"{key[1]}.")]
        remedy = f"; did you mean --{own[0]}?" if own else "; --help lists them."
        return f"{where}there is no class '{found[1]}'{remedy}"
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = absent.groups()
        return f"{where}there is no '{name}' in {module}{nearest(name, _held(module))}"
    other = re.search(r"mport path ?[\w.]* does not correspond to a subclass of (\w+)", message)
    if other and (given := re.search(r"(?:but|Import path|Given value:) (\w+\.[\w.]+)", message)):
        name = given[1].rpartition(".")[2]
        return f"{where}{name} is no {other[1]}{nearest(name, _classes(base[1]) if base else ())}"
    ours = re.search(r"^ *- (?!Expected|Not a|Problem|Does not)(\S.*\.)$", lines, re.MULTILINE)
    if ours:
        return ours[1]  # of a class that is made, which the parser lists among its own
    if len(message) > LONGEST:
        message = f"{message[: LONGEST - 100]} … {message[-97:]}"
    return message + _quotes(message)


def _wrong_value(lines: str) -> str | None:
    r"""Return what an option must be, and what it is, where numbers, texts and names are wanted.

    >>> told = "Expected a <class 'float'>. Got value: x"
    >>> _wrong_value(f'Parser key "model.solver":\n  Parser key "eta":\n    {told}')
    "model.solver.eta must be a number, got 'x'."
    """
    within: dict[int, str] = {}  # the options that hold each other, by their indentation
    end = 0
    for key in re.finditer(r'^( *)Parser key "([^"]+)":', lines, re.MULTILINE):
        depth, end = len(key[1]), key.end()
        within = {i: name for i, name in within.items() if i < depth} | {depth: key[2]}
    value = re.compile(r"(?:Got|Given) value: (.*)").search(lines, end)
    if value is None or not within:
        return None
    told = lines[end : value.start()]
    told = re.sub(r"Expected a tuple with (\d+) elements", r"Expected a Literal[\1 values]", told)
    wanted = re.findall(r"Expected a (?:<class '(\w+)'>|(?:typing\.)?Literal\[(.*)\])", told)
    plain = all(names or kind in KINDS for kind, names in wanted)
    if (
        not plain
        or {kind for kind, _ in wanted} <= {"NoneType"}
        or len(wanted) < len(re.findall(r"^ *- ", told, re.MULTILINE))
    ):
        return None
    kinds = [
        KINDS[kind] if kind else "one of " * ("," in names) + names.replace("'", "")
        for kind, names in wanted
    ]
    kinds.sort(key=KINDS["NoneType"].__eq__)  # last, as younger releases have it
    if "a number" in kinds and "a whole number" in kinds:
        kinds.remove("a whole number")
    return f"{'.'.join(within.values())} must be {' or '.join(kinds)}, got '{value[1]}'." + (
        _quotes(told) if "a text" in kinds else ""
    )


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a sentence about a wrong name: the nearest of the right ones.

    >>> nearest("SPD", ["DSG", "DPS"])
    '; did you mean DPS?'
    """
    if found := closest(name, names):
        return f"; did you mean {found}?"
    return wording("; --help lists them.", "; help() lists them.")


def closest(name: str, names: Iterable[str]) -> str | None:
    """Return the nearest of the right names, or None if none is near.

    >>> closest("DSP", ["DSG", "DPS"])
    'DPS'
    """
    names = list(names)
    swapped = [right for right in names if sorted(right) == sorted(name)]
    return next(iter(swapped or difflib.get_close_matches(name, names, 1, 0.5)), None)


def _quotes(message: str) -> str:
    """Return how to write a text that YAML or OmegaConf takes for something else."""
    if "${" in message or "nterpolation" in message or "no viable alternative" in message:
        return " For a plain ${, write \\${."
    other = r"<class '(?:int|float|bool|datetime\.date|datetime\.datetime)'>|datetime\.date"
    if "str" in message and re.search(other, message):
        return " A text that looks like a number or a date needs quotes: '\"2024\"'."
    return ""


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _arguments(path: str) -> list[str]:
    made = _import(path)
    return list(inspect.signature(made).parameters) if callable(made) else []


def _held(module: str) -> list[str]:
    """Return the public names of a module, those of its own modules among them."""
    held = importlib.import_module(module)
    inner = [found.name for found in pkgutil.iter_modules(getattr(held, "__path__", ()))]
    return [n for n in [*getattr(held, "__all__", dir(held)), *inner] if not n.startswith("_")]


def _classes(path: str) -> list[str]:
    """Return the names of the classes that may stand where ``path`` is wanted."""
    found, rest = [], [_import(path)]
    while rest:
        kind = rest.pop()
        if inspect.isclass(kind):
            found.append(kind.__name__)
            rest += kind.__subclasses__()
    return found
