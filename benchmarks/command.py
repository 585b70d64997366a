"""What the command lines of all benchmarks share: --help that teaches, and bad input as one line and exit code 2."""

import sys
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


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and exit."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
