"""From the flags to the exit code: what every experiment module does, and how what went wrong is told."""

import shlex
import sys
from collections.abc import Callable, Iterable
from zipfile import BadZipFile

from absl import app, flags, logging

from experiments import _flags
from l2t_jax import data
from l2t_jax.runs import parallel
from l2t_jax.runs.checkpoints import CheckpointError
from l2t_jax.runs.config import Config, Noise, Options, UsageError
from l2t_jax.runs.records import WorkdirError
from l2t_jax.runs.running import run_entries
from l2t_jax.runs.setting import build_setting, enable_compilation_cache, prepare
from l2t_jax.runs.training import StoppedError
from l2t_jax.tasks import TASKS

Main = Callable[[list[str]], None]  # of the arguments that are left, which are none


def start(main: Main) -> None:
    """Entry point of a module: quiet libraries, then absl."""
    if not flags.FLAGS.get_key_flags_for_module(sys.argv[0]):  # a script of somebody's own: its --help teaches too
        for flag in flags.FLAGS.get_key_flags_for_module(_flags):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.ERROR)  # tensorflow-datasets and orbax tell much; --verbosity=0 brings it back
    app.run(main, flags_parser=_flags.parse_arguments)


def command(
    experiment: str,
    work: Callable[[Config, Options], int],
    noise: Callable[[], Noise | None] = lambda: None,
    task: str | None = None,
) -> Main:
    """The main of a module that runs: resolve the flags, start the devices, work, exit.

    Args:
      experiment: the module's name.
      work: config, options -> exit code.
      noise: what the module's own flags say of wrong labels, if it has them.
      task: the only one the module is for; by default any.
    Returns:
      a function that exits: 0; 1 where a seed stopped early; 2 where input was bad; 130 where it was interrupted.
    """

    def main(_: list[str]) -> None:
        try:
            config, options = _flags.resolve(experiment, noise(), task)
            parallel.start(options.devices, options.coordinator, options.num_processes, options.process_id)
            enable_compilation_cache()
            code = work(config, options)
        except (UsageError, parallel.ParallelError, data.DataError, WorkdirError, ImportError) as error:
            _flags.fail(str(error))
        except parallel.LostError as error:
            _flags.fail(f"{error}. What was saved is intact; {_go_on(experiment, options)}", 1)
        except (CheckpointError, OSError) as error:
            _flags.fail(f"{error}. What was saved is intact; make room, then {_go_on(experiment, options)}", 1)
        except (StoppedError, KeyboardInterrupt):
            _flags.fail(f"interrupted; {_go_on(experiment, options)}", 130)
        sys.exit(code)

    return main


def reader(work: Callable[[], Iterable[object]]) -> Main:
    """The main of a module that reads what runs have left: work, say line by line what it did, exit.

    Args:
      work: -> what to say, a line each.
    Returns:
      a function that exits: 0; 2 where input was bad.
    """

    def main(_: list[str]) -> None:
        try:
            for line in work():
                print(line)
        except KeyError as error:
            _flags.fail(f"a record has no {error}: it was written by something else, or by another version.")
        except (ValueError, OSError, BadZipFile) as error:
            _flags.fail(str(error))
        sys.exit(0)

    return main


def refuse(name: str, why: str) -> None:
    """Say so where a flag was given that has no meaning for a module.

    Raises:
      UsageError: it was.
    """
    if flags.FLAGS[name].present:
        raise UsageError(f"--{name} is {why}")


def run_one(config: Config, options: Options) -> int:
    """Train all methods of a config, as one run in one directory."""
    setting, entries = build_setting(config, options, prepare(config, options))
    code = run_entries(setting, entries)
    if parallel.is_leader():
        own = "your own data by --dataset=PATH, " if TASKS[config.task].open else ""
        print(f"Next: {own}other methods by --method=NAME,NAME, all flags by --help.")
    return code


def _go_on(experiment: str, options: Options) -> str:
    # Of a flag given twice the last counts.
    again = shlex.join([*sys.argv[1:], f"--workdir={options.workdir}", "--resume"])
    script = getattr(sys.modules["__main__"], "__spec__", None) is None  # somebody's own file, run by its path
    what = shlex.quote(sys.argv[0]) if script else f"-m experiments.{experiment}"
    return f"go on with: python {what} {again}"
