"""What is given away: wheel and source distribution, how they are described, what is said beside them."""

import configparser
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from launching import execute

import l2t_jax

ROOT = Path(__file__).parents[1]
NAMED = f"l2t_jax-{l2t_jax.__version__}"
HOSTS = {"doi.org"}  # that metadata may name
STRAY = (  # what lies about in a checkout
    "experiments/results/stray.json",
    "benchmarks/results/stray.json",
    "runs/stray/config.json",
    "stray-1.0-py3-none-any.whl",
    "l2t_jax/__pycache__/stray.pyc",
    "tests/__pycache__/stray.pyc",
    ".cache/stray",
    "build/lib/experiments/stray.py",
    "stray.py",
)
HERE = (".gitignore", ".pre-commit-config.yaml")  # of a checkout alone
MADE = {"PKG-INFO", *(f"l2t_jax.egg-info/{name}.txt" for name in ("SOURCES", "requires", "top_level"))} | {
    "l2t_jax.egg-info/PKG-INFO",
    "l2t_jax.egg-info/dependency_links.txt",
}
MOST = 5 * 2**20  # bytes of a source distribution

pytestmark = pytest.mark.versions


def files():
    """Paths of a checkout that git knows, without results; in a source distribution all that it came with."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    else:
        found = (ROOT / line for line in (ROOT / "l2t_jax.egg-info" / "SOURCES.txt").read_text().splitlines())
        names = {str(path.relative_to(ROOT)) for path in found} - MADE
    return {name for name in names if not name.startswith(("experiments/results/", "benchmarks/results/"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist and of the wheel that is made from it, both of a checkout that is not tidy."""
    folder = tmp_path_factory.mktemp("built")
    source, out = folder / "checkout", folder / "dist"
    for name in files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for name in STRAY:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    # Without isolation nothing is fetched.
    execute([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], check=True)
    assert sorted(path.name for path in out.iterdir()) == [f"{NAMED}-py3-none-any.whl", f"{NAMED}.tar.gz"]
    return out


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built / f"{NAMED}-py3-none-any.whl") as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(built):
    with tarfile.open(built / f"{NAMED}.tar.gz") as archive:
        yield archive


def test_the_wheel_holds_the_library_alone(wheel):
    """Its code, its assets, the marker of types, the licence; no package that another may have by this name."""
    library = {name for name in files() if name.startswith("l2t_jax/")}
    assert {"l2t_jax/py.typed", "l2t_jax/__main__.py", "l2t_jax/assets/digits_flips.npz"} <= library
    described = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    assert set(wheel.namelist()) == library | {f"{NAMED}.dist-info/{name}" for name in described}
    assert wheel.read(f"{NAMED}.dist-info/top_level.txt").split() == [b"l2t_jax"]
    assert wheel.read(f"{NAMED}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_source_distribution_is_a_checkout_without_results(built, sdist):
    names = {Path(member.name).relative_to(NAMED).as_posix() for member in sdist.getmembers() if member.isfile()}
    assert names - MADE == files() - set(HERE)
    assert {"tests/conftest.py", "tests/anchors/released_round.npz", ".ci/run", "docs/structure.md"} <= names
    assert (built / f"{NAMED}.tar.gz").stat().st_size < MOST


def test_what_is_installed_works_elsewhere(wheel, tmp_path):
    """Assets are found, and the report of `python -m l2t_jax`, from a folder that is no checkout."""
    wheel.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import l2t_jax, l2t_jax.__main__\n"
        "from l2t_jax import teachers\n"
        "print(l2t_jax.__file__, l2t_jax.__version__, *teachers.shipped())\n"
        "teachers.load(teachers.shipped()[0])\n"
    )
    done = execute([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
    file, version, *shipped = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "site") and version == l2t_jax.__version__
    assert shipped == sorted(path.stem for path in (ROOT / "l2t_jax" / "assets").glob("*.npz"))


def test_tests_of_the_source_distribution_need_no_results(sdist, tmp_path):
    """What reads them is skipped, and nothing fails for their absence while it is imported."""
    sdist.extractall(tmp_path, filter="data")
    at = tmp_path / NAMED
    command = [sys.executable, "-m", "pytest", "-n0", "-rs", "tests/test_tables.py", "tests/test_readme.py"]
    chosen = ["-k", "test_trials or test_comparison or test_what_is_said or test_a_table_is"]
    done = execute([*command, *chosen], cwd=at)
    assert done.returncode == 0 and re.search(r"1 passed, [5-9] skipped", done.stdout), done.stdout
    assert "reads results, which a source distribution does not hold" in done.stdout


def test_metadata(wheel, sdist):
    text = wheel.read(f"{NAMED}.dist-info/METADATA").decode()
    assert sdist.extractfile(f"{NAMED}/PKG-INFO").read().decode() == text
    told = email.message_from_string(text)
    assert (told["Name"], told["Version"]) == ("l2t_jax", l2t_jax.__version__)
    assert (told["License-Expression"], told.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert told["Requires-Python"] == ">=3.11" and told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    tried = {line.rpartition(" ")[2] for line in told.get_all("Classifier") if re.search(r":: 3\.\d+$", line)}
    assert tried == {"3.11", "3.12", "3.13"}
    setup = configparser.ConfigParser(inline_comment_prefixes="#")
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"].split()
    assert [line for line in told.get_all("Requires-Dist") if ";" not in line] == needed and len(needed) > 10
    assert set(told.get_all("Provides-Extra")) >= {"test", "dev", "bench", "weights", "tensorboard"}


def test_metadata_name_no_host_of_a_machine(wheel):
    text = wheel.read(f"{NAMED}.dist-info/METADATA").decode()
    urls = re.findall(r"\b\w+://[^\s)>\"]*", text)
    assert urls and {urlsplit(url).scheme for url in urls} == {"https"}
    assert {urlsplit(url).netloc for url in urls} <= HOSTS


def test_the_version_is_in_one_place():
    """And the two files that have to say it say the same."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", l2t_jax.__version__)
    assert "\nversion = attr: l2t_jax.__version__\n" in (ROOT / "setup.cfg").read_text()
    newest = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    assert newest == l2t_jax.__version__ == cited()["version"]


def cited():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


# Of the Citation File Format 1.2.0: what there must be, and what else we may have.
SOFTWARE = {"cff-version", "message", "title", "authors"}, {"type", "version", "license", "keywords", "references"}
REFERENCE = (
    {"type", "title", "authors"},
    {"collection-title", "conference", "volume", "start", "end", "year", "doi", "notes"},
)
ENTITY, PERSON = ({"name"}, set()), ({"family-names", "given-names"}, set())


def has(fields, kind):
    needed, more = kind
    return needed <= fields.keys() <= needed | more


def test_the_file_to_cite_by():
    """It names the software by an entity, and the work that it implements."""
    file = cited()
    assert has(file, SOFTWARE) and file["cff-version"] == "1.2.0" and file["type"] == "software"
    assert all(has(author, ENTITY) for author in file["authors"]) and file["license"] == "Apache-2.0"
    (paper,) = file["references"]
    assert has(paper, REFERENCE) and paper["type"] == "conference-paper" and has(paper["conference"], ENTITY)
    assert all(has(author, PERSON) for author in paper["authors"]) and paper["year"] == 2023
    assert paper["title"].startswith("L2T-DLN: ") and re.fullmatch(r"10\.\d{4,9}/\S+", paper["doi"])
    assert all(isinstance(value, str) for value in (file["title"], file["message"], file["version"], *file["keywords"]))


@pytest.mark.parametrize("name", ["bug", "result", "feature"])
def test_templates_of_issues(name):
    """Forms as they have to be; for a bug and a result we ask for `python -m l2t_jax` and the run's file."""
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml"
    form = yaml.safe_load(path.read_text())
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = form["body"]
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields) and fields[0]["validations"]["required"] is True
    asked = {"bug": ("python -m l2t_jax", "config.json"), "result": ("python -m l2t_jax", "summary.json")}
    assert all(words in path.read_text() for words in asked.get(name, ()))
