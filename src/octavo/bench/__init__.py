"""``octavo bench``: throughput and latency without a server, load on a running one, and the start."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from octavo.bench import latency, serve, startup, throughput

Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]

# name -> (what it measures, adds its arguments, runs it)
COMMANDS: dict[str, Command] = {
    "throughput": ("tokens per second of the engine alone", throughput.add_arguments, throughput.run),
    "latency": ("time of a step and of a request, as percentiles", latency.add_arguments, latency.run),
    "serve": ("a running server under load", serve.add_arguments, serve.run),
    "startup": ("how long the engine takes to be ready, by phase", startup.add_arguments, startup.run),
}
