"""`python -m l2t_jax`: all that a report of a bug needs, whatever does not start, and nothing private."""

import getpass
import importlib.util
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest
from launching import execute

import l2t_jax
from l2t_jax import __main__ as report
from l2t_jax.runs.environment import devices, versions

ROOT = Path(__file__).parents[1]
JANE = "/home/jane.doe"


def said(*arguments, path=(), **variables):
    """What a process prints, in an environment without any of JAX's variables but these."""
    kept = {name: value for name, value in os.environ.items() if not report.VARIABLES.fullmatch(name)}
    kept["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT)])
    return execute([sys.executable, "-m", "l2t_jax", *arguments], env=kept | {"JAX_PLATFORMS": "cpu"} | variables)


def lines(*arguments, **given):
    done = said(*arguments, **given)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.splitlines()


def private(text):
    """Whether a text names a place, the machine or who works on it."""
    of_tests = [str(ROOT), str(Path.home()), JANE, "jane"]
    here = [name for name in (platform.node(), getpass.getuser()) if len(name) > 5]  # shorter ones are words too
    return [name for name in (*of_tests, *here) if name in text]


def test_what_it_says():
    """Versions, the machine, devices, settings; variables by their values, without places and hosts."""
    given = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": f"{JANE}/my cache",
        "JAX_COORDINATOR_ADDRESS": "jane-desktop:1234",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 --xla_dump_to={JANE}/dump",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "NOT_OF_JAX": "1",
    }
    found = lines(**given)
    assert found[0].startswith(f"l2t_jax: {l2t_jax.__version__}")
    assert f"python: {platform.python_version()}" in found
    (where,) = [line for line in found if line.startswith("platform: ")]
    assert platform.platform() in where and re.search(r", \d+ cores, \d+ GiB, ", where)
    kind = jax.devices("cpu")[0].device_kind
    rest = found[found.index("environment variables:") + 1 :]
    assert rest == [
        "  JAX_COMPILATION_CACHE_DIR=(set)",
        "  JAX_COORDINATOR_ADDRESS=(set)",
        "  JAX_DEFAULT_MATMUL_PRECISION=highest",
        "  JAX_ENABLE_X64=1",
        "  JAX_PLATFORMS=cpu",
        "  TF_CPP_MIN_LOG_LEVEL=2",
        "  XLA_FLAGS=--xla_force_host_platform_device_count=2 --xla_dump_to=PATH",
        f"devices: cpu, 2 x {kind}",
        "x64: on",
        "matmul precision: highest",
        "compilation cache: on",
    ]
    assert not private("\n".join(found))


def test_versions_are_those_of_all_that_is_asked_for():
    """Of the dependencies, the extras, and of what is missing that it is."""
    found = [line.strip() for line in report.report()]
    needed, extras = report._requirements()
    assert {"jax", "jaxlib", "flax", "optax"} <= set(needed) and not set(needed) & set(extras)
    asked = {re.match(r"[\w.-]+", line)[0] for line in metadata.requires("l2t_jax")}
    assert asked <= {*needed, *extras} and {"torch", "pytest"} <= set(extras)
    start, middle, end = (found.index(f"{title}:") for title in ("dependencies", "extras", "environment variables"))
    for part, names in ((found[start + 1 : middle], needed), (found[middle + 1 : end], extras)):
        assert part == [f"{name} {versions([name])[name] or 'not installed'}" for name in sorted(names, key=str.lower)]
    assert f"jax {jax.__version__}" in found
    absent = [name for name in ("torch", "betty-ml") if importlib.util.find_spec(name.partition("-")[0]) is None]
    assert all(f"{name} not installed" in found for name in absent)


def test_a_checkout_that_is_not_installed_says_what_matters(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report.metadata, "requires", absent)
    needed, extras = report._requirements()
    assert set(report.PACKAGES) <= set(needed) and extras == []


def broken(folder, package, text):
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(text)
    return folder


@pytest.mark.parametrize("what", ["platform", "no message", "flag", "import", "abort", "silence"])
def test_devices_that_do_not_start_are_one_line(what, tmp_path, monkeypatch):
    """And the rest is there: XLA may end the process, JAX may be broken, a driver may hang."""
    asserts = "def __getattr__(name):\n    raise AssertionError"
    given, line = {
        "platform": ({"JAX_PLATFORMS": "nonsense"}, r"RuntimeError: Unable to initialize backend 'nonsense'.*"),
        "no message": ({"path": asserts}, r"AssertionError: nothing said"),
        "flag": ({"XLA_FLAGS": "--xla_nonsense=1"}, r".*--xla_nonsense=1 \((exit code|signal) \d+\)"),
        "import": ({"path": f"raise ImportError('no {JANE}/libx.so\\nmore')"}, r"ImportError: no PATH"),
        "abort": ({"path": "import os\nos.abort()"}, r"signal 6"),
        "silence": ({"path": "import time\ntime.sleep(60)"}, r"no answer in 1 s"),
    }[what]
    if "path" in given:
        given = {"path": [broken(tmp_path, "jax", given["path"])]}
    if what == "silence":
        monkeypatch.setattr(report, "PATIENCE", 1.0)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
        found = list(report.report())
    else:
        found = lines(**given)
    assert re.fullmatch(f"devices: none, JAX does not start: {line}", found[-1]), found[-1]
    assert found[0].startswith("l2t_jax: ") and "dependencies:" in found and "environment variables:" in found
    assert not private("\n".join(found))


def test_an_accelerator_that_is_left_out_is_a_warning(tmp_path):
    """JAX goes on with the CPU and logs a traceback; here it is a line."""
    text = f"def initialize():\n    raise RuntimeError('the driver {JANE}/x.so is too old\\nmore')\n"
    broken(tmp_path / "jax_plugins", "nonsense", text)
    found = lines(path=[tmp_path], JAX_PLATFORMS="")
    assert any(line.startswith("devices: cpu, ") for line in found)
    (warned,) = [line for line in found if line.startswith("JAX warns: ")]
    assert "jax_plugins.nonsense" in warned and warned.endswith(" the driver PATH is too old")


def test_an_environment_is_never_an_error(monkeypatch):
    def fails():
        raise RuntimeError("no device\nand a long story")

    monkeypatch.setattr(jax, "devices", fails)
    assert devices() == {"backend": None, "devices": [], "error": "RuntimeError: no device"}


def test_help_and_what_is_not_known():
    for flag in ("--help", "-h"):
        done = said(flag)
        assert done.returncode == 0 and done.stdout == report.USAGE + "\n" and "report of a bug" in done.stdout
    for arguments in (["run"], ["--verbose"], ["--help", "x"]):
        done = said(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: '.*' is not known: give nothing, or --help\.\n", done.stderr)
