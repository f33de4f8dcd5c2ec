"""``--config FILE``: options out of a YAML file, as vLLM reads them; the command line has the last word.

Keys are names of options, with dashes or underscores, and ``model`` is MODEL. PyYAML, which reads the file, comes with
the Hub's client. JSON is YAML, too.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import ConfigError

FLAG = "--config"
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")  # a number everywhere but in YAML 1.1


class OptionFile(NamedTuple):
    """What a file says: ``model``, and all else as arguments of the command line."""

    model: str | None
    arguments: list[str]


def taken_out(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The file that ``--config`` names, the last one if there are several, and the other arguments."""
    path, rest = None, []
    given = iter(arguments)
    for argument in given:
        if argument == FLAG:
            path = next(given, "")
        elif argument.startswith(f"{FLAG}="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return path, rest


def read(path: str, known: Mapping[str, argparse.Action], instead: Mapping[str, str]) -> OptionFile:
    """The options in the file ``path``. ``known`` are the flags that there are, ``instead`` what to do about others.

    Raises `ConfigError`, with the line, for a key that is no option, or that comes twice, and for a value of a form
    that the option does not have.
    """
    model, arguments, lines = None, [], dict[str, int]()
    for key, line, value in _entries(path):
        where = f"{path}, line {line}: {key}"
        flag = _flag(_name(key), known, where, instead)
        if flag in lines:
            raise ConfigError(f"{where} is there already, in line {lines[flag]}.", "Keep one of them.")
        lines[flag] = line
        if value is None:
            continue
        if flag == "--model":
            model = str(value)
        else:
            arguments += _arguments(flag, known[flag.partition(".")[0]], value, where)
    return OptionFile(model, arguments)


def _entries(path: str) -> Iterator[tuple[str, int, Any]]:
    """Key, line and value of each entry of the mapping that the file is.

    Scalars come as they are written (``revision: 0012`` is a text), but for null and truth.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # it has no types
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    if not path:
        raise ConfigError(f"{FLAG} names no file.", f"{FLAG} FILE")
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} holds no options.", "Write one on each line: max-model-len: 4096")
        for key, node in root.value:
            value = loader.construct_object(node, deep=True)
            plain = value is None or isinstance(value, bool | list | dict)
            yield str(key.value), key.start_mark.line + 1, value if plain else node.value
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of {FLAG} cannot be read: {error}.", "Give a YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{path}{line}: {problem}.", "Give a YAML file, with an option on each line.") from None


def _name(key: str) -> str:
    """``max_num_seqs`` -> ``max-num-seqs``; keys behind a dot stay."""
    head, dot, keys = key.partition(".")
    return head.replace("_", "-") + dot + keys


def _flag(name: str, known: Mapping[str, argparse.Action], where: str, instead: Mapping[str, str]) -> str:
    """The option ``name``, long or short; raises `ConfigError` if there is none."""
    for flag in (f"--{name}", f"-{name}"):
        head, dot, _ = flag.partition(".")
        if head in known and head not in (FLAG, "--help", "-h") and (not dot or known[head].metavar == "JSON"):
            return flag
    if f"--{name}" in instead:
        remedy = instead[f"--{name}"]
        raise ConfigError(f"{where}: octavo has no --{name}.", f"{remedy[0].upper()}{remedy[1:]}.")
    near = [flag.lstrip("-") for flag in difflib.get_close_matches(f"--{name}", known, n=2)]
    raise ConfigError(f"{where} is no option of this command.", f"Did you mean {' or '.join(near) or 'one of --help'}?")


def _arguments(flag: str, action: argparse.Action, value: Any, where: str) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}.", "Give true or false.")
        return _switch(flag, action, value)
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list) and isinstance(action, argparse._AppendAction):
        return [f"{flag}={one}" for one in value]
    if isinstance(value, list) and action.nargs == "+":
        return [f"{flag}={','.join(map(str, value))}"]
    return [f"{flag}={json.dumps(value) if isinstance(value, list | bool) else value}"]


def _switch(flag: str, action: argparse.Action, value: bool) -> list[str]:
    if value:
        return [flag]
    return [f"--no-{flag.removeprefix('--')}"] if isinstance(action, argparse.BooleanOptionalAction) else []
