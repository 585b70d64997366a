"""What the site has beside docs/: README as its front, files that pages link to, a page a method, the API.

Pages link to files as a checkout has them. Here such links come to lead to pages of the site: a source file is shown as
code, a folder as a list, a page of another folder as a page.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from l2t_jax.knobs import knobs_of
from l2t_jax.methods import KNOBS, METHODS, method_names
from l2t_jax.runs.published import PUBLISHED
from l2t_jax.runs.records import read_record
from l2t_jax.runs.texts import name_of, shown

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "experiments" / "results"
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
CODE = {".py": "python", ".cfg": "ini", ".toml": "toml", ".sh": "bash", ".yml": "yaml", "": "text"}
# Of METHODS that are another's function with other arguments, or a builder's: where the docstring is.
DOCUMENTED = {
    "mentornet_data_driven": "methods.mentornet.mentornet",
    "ml3": "losses.ml3.ml3",
    "adalfl": "losses.ml3.ml3",
    "taylor_glo": "losses.taylor_glo.taylor_glo",
    "bilinear": "losses.bilinear.bilinear",
    "meta_only": "methods.common.on_validation",
}
FOLDERS = ("replication_digits", "replication_mnist", "compare_noisy", "compare_clean", "worth_noisyag_news")


class Site:
    """The pages that are made, and where files of the checkout are in it."""

    def __init__(self) -> None:
        """Begin with README."""
        self.texts: dict[str, str] = {}  # URI of a page -> its text
        self.copies: dict[str, Path] = {}  # URI of a file -> where it is
        self.texts["index.md"] = self.linked(ROOT / "README.md", "index.md")

    def uri_of(self, path: Path) -> str:
        """Where a file or folder of the checkout is in the site, which has it from now on."""
        if path == ROOT / "README.md":
            return "index.md"
        if DOCS in path.parents:
            return path.relative_to(DOCS).as_posix()
        name = "source/" + path.relative_to(ROOT).as_posix()
        if path.suffix in (".png", ".svg", ".json", ".csv", ".txt", ".npz"):
            self.copies[name] = path
            return name
        uri = name if path.suffix == ".md" else f"{name}.md"
        if uri not in self.texts:
            self.texts[uri] = ""  # it is under way: pages may link to each other
            self.texts[uri] = self._page(path, uri)
        return uri

    def _page(self, path: Path, uri: str) -> str:
        if path.suffix == ".md":
            return self.linked(path, uri)
        title = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            return f"# {title}\n\n" + "\n".join(f"- `{child.name}`" for child in sorted(path.iterdir())) + "\n"
        return f"# {title}\n\n````{CODE[path.suffix]}\n{path.read_text().rstrip()}\n````\n"

    def linked(self, path: Path, uri: str) -> str:
        """The text of a page with its links led to where their files are in the site."""

        def lead(found: re.Match[str]) -> str:
            begin, link, anchor, end = found.groups()
            target = (path.parent / link).resolve()
            if not target.exists():
                return found[0]  # strict mode says so
            to = posixpath.relpath(self.uri_of(target), posixpath.dirname(uri))
            return f"{begin}{to}{anchor or ''}{end}"

        return LINK.sub(lead, path.read_text())


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    site = Site()
    for file in list(files.documentation_pages()):
        path = DOCS / file.src_uri
        if path.suffix == ".md":
            site.texts[file.src_uri] = site.linked(path, file.src_uri)
            files.remove(file)
    site.uri_of(ROOT / "CHANGELOG.md")
    site.uri_of(ROOT / "CONTRIBUTING.md")
    site.texts["methods.md"] += "\n" + "\n".join(["## A page for each", "", *_index()]) + "\n"
    for name in method_names():
        site.texts[f"methods/{name}.md"] = _method(name)
    site.texts |= dict(_api())
    for uri, text in site.texts.items():
        files.append(File.generated(config, uri, content=text))
    for uri, path in site.copies.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lists that follow a line of text are lists in a checkout; Markdown's first dialect needs a blank line."""
    return re.sub(r"^((?!\s*[-|>#`]).+)\n(- )", r"\1\n\n\2", markdown, flags=re.MULTILINE)


def _index() -> Iterator[str]:
    for name in method_names():
        yield f"- [`{name}`](methods/{name}.md)"


def _method(name: str) -> str:
    """Of a method: when to use it, its knobs, its docstring, what was published of it, what we have found."""
    what, _, when = _row(name)
    lines = [
        f"# {name}",
        "",
        f"    --method={name}",
        "",
        f"{what[0].upper()}{what[1:]}. **When to use it**: {when}.",
        "",
    ]
    if knobs := knobs_of(KNOBS[name]) if name in KNOBS else {}:
        lines += ["| knob | default | what it is |", "|---|---|---|"]
        lines += [f"| `--set={name}.{knob}=` | {value.default} | {value.text} |" for knob, value in knobs.items()]
        lines += [""]
    elif name == "l2t_dln":
        lines += ["Its settings are rows of the preset's [sheet](../source/l2t_jax/presets.py.md)."]
    lines += ["", f"::: l2t_jax.{_documented(name)}", ""]
    found = [(group, value) for (group, method), value in PUBLISHED.items() if method == name]
    if found:
        lines += ["## Published", "", "| data | student | labels | score, % |", "|---|---|---|---|"]
        lines += [f"| {g.dataset} | {g.student} | {g.noise or 'right'} | {value:g} |" for g, value in found]
    lines += _ours(name)
    return "\n".join(lines) + "\n"


def _row(name: str) -> list[str]:
    """What docs/methods.md says of a method: what it is, how far it looks ahead, when to use it."""
    rows = [line.strip().strip("|").split("|") for line in (DOCS / "methods.md").read_text().splitlines()]
    (found,) = (row for row in rows if len(row) == 4 and f"`{name}`" in row[0])
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell).strip() for cell in found[1:]]


def _documented(name: str) -> str:
    if name in DOCUMENTED:
        return DOCUMENTED[name]
    if name in METHODS:
        return f"methods.{name}.{name}"
    defined = re.compile(rf"^(def {name}\(|{name} = )", re.MULTILINE)  # what LOSSES holds may be wrapped
    (path,) = (path for path in (ROOT / "l2t_jax" / "losses").glob("*.py") if defined.search(path.read_text()))
    return f"losses.{path.stem}.{name}"


def _ours(name: str) -> list[str]:
    rows = []
    for folder in FOLDERS:
        for path in sorted((RESULTS / folder / "records").glob("*.json")):
            record = read_record(path)
            if name not in record["methods"] or record["config"].get("held_out"):
                continue
            if folder.startswith("worth") and not path.stem.endswith("_144"):
                continue
            score = shown(record["methods"][name]["score"], record["metric"])
            teacher = f", {record['teacher']}" if name == "l2t_dln" else ""
            rows.append(
                f"| {name_of(record)}{teacher} | {record['preset']} | {score} | {len(record['seeds'])} | {folder} |"
            )
    head = ["", "## Here", "", "| data | preset | score, % | seeds | folder of results |", "|---|---|---|---|---|"]
    return [*head, *dict.fromkeys(rows)] if rows else []


def _api() -> Iterator[tuple[str, str]]:
    """A page a module that has public names, by rooms."""
    index = ["# API", "", "Every public name, by module. `l2t_jax` itself has the doors for own data.", ""]
    for path in sorted((ROOT / "l2t_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        name = ".".join(part for part in parts if part != "__init__")
        yield f"api/{name}.md", f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n"
        first = re.match(r'"""(.*?)("""|\n)', path.read_text())
        index.append(f"- [`{name}`]({name}.md): {first[1] if first else ''}")
    yield "api/index.md", "\n".join(index) + "\n"
