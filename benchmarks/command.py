"""What the command lines of all benchmarks share: --help that teaches, and bad input as one line and exit code 2."""

import sys
from collections.abc import Iterable
from typing import NoReturn

from absl import flags


def parse(values: flags.FlagValues, about: str | None, argv: list[str]) -> None:
    """Parse a command line into `values`, which are a script's own: absl's global ones would clash among scripts."""
    if "help" not in values:
        flags.DEFINE_bool("help", False, "Say all this.", flag_values=values)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        fail(str(error))
    if values.help:
        print(f"{about}\n{values.main_module_help()}")
        sys.exit(0)
    if rest:
        fail(f"{rest[0]!r} is not a flag: flags look like --workload=w3.")


def some_of(flag: str, given: list[str], names: Iterable[str]) -> list[str]:
    """What a list flag names, all of it known."""
    if unknown := [name for name in given if name not in names]:
        fail(f"--{flag}={','.join(given)}: {unknown[0]!r} is not one of {', '.join(names)}.")
    return given


def lengths_in(given: list[str]) -> list[int]:
    """The unroll lengths of --lengths."""
    if not given or not all(length.isdecimal() and int(length) for length in given):
        fail(f"--lengths={','.join(given)}: give unroll lengths of at least 1, e.g. --lengths=1,5,25.")
    return [int(length) for length in given]


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
