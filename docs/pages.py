"""Pages of the site that are written elsewhere in the repository; a hook of mkdocs (mkdocs.yml).

README.md, SECURITY.md and the bundles' README become pages, every module of the package gets one
from its docstrings, and a text file that a page links to (a config, an experiment) is shown as it
is. Links are those of the repository, so that they lead on GitHub too; here they get the site's.
"""

import ast
import os.path
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "common" / "diffboost"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
CODE = re.compile(r"^( *)(```+).*?^\1\2`*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r'(?<=<span class="w"> </span>)--[^\s<]+')
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(?=<code>)")
PICTURES = (".png", ".svg", ".jpg", ".gif")
LANGUAGES = {".yml": "yaml", ".py": "python", ".sh": "bash", ".smk": "python", ".conf": "ini"}


def written_elsewhere() -> dict[Path, str]:
    """Markdown files outside docs/ and the page that each becomes, relative to the site."""
    pages = {REPOSITORY / "README.md": "readme.md", REPOSITORY / "SECURITY.md": "security.md"}
    for path in sorted((REPOSITORY / "bundles").glob("*/docs/README.md")):
        pages[path] = f"bundles/{path.parents[1].name}.md"
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages: called by mkdocs with the files of docs/."""
    pages = written_elsewhere()
    generated = dict(api_pages())
    for path, place in pages.items():
        name = Path(place).stem
        title = {"readme": "Overview", "security": "Security"}.get(name, name)
        generated[place] = f"---\ntitle: {title}\n---\n{path.read_text(encoding='utf-8')}"
    written = [Path(file.abs_src_path) for file in files.documentation_pages()]
    linked = {target for path in [*written, *pages] for target in linked_files(path)}
    for path in sorted(linked - set(pages)):
        if path.suffix in PICTURES:
            place = _place(path, pages)
            files.append(File.generated(config, place, abs_src_path=str(path)))
        else:
            generated[_place(path, pages)] = file_page(path)
    for place, content in generated.items():
        shown = InclusionLevel.NOT_IN_NAV if place.startswith("files/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, place, content=content, inclusion=shown))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the repository's links of a page into the site's; code stays as it is."""
    pages = written_elsewhere()
    here = page.file.src_uri
    sources = {place: path for path, place in pages.items()}
    source = sources.get(here, REPOSITORY / "docs" / here)

    def site_link(match: re.Match) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.is_file():
            return match[0]  # mkdocs says that it leads nowhere
        return os.path.relpath(_place(target, pages), Path(here).parent)

    return "".join(
        part if is_code else LINK.sub(site_link, part) for part, is_code in _parts(markdown)
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keeps the flags of a highlighted command in one piece, and takes Sphinx's roles away."""
    html = ROLE.sub("", html)
    return FLAG.sub(r'<span class="flag">\g<0></span>', html)


def linked_files(path: Path) -> set[Path]:
    """The files of the repository outside docs/ that a Markdown file links to."""
    found = set()
    for part, is_code in _parts(path.read_text(encoding="utf-8")):
        targets = [] if is_code else [(path.parent / name).resolve() for name in LINK.findall(part)]
        found |= {target for target in targets if target.is_file()}
    inside = {target for target in found if REPOSITORY in target.parents}
    return {target for target in inside if REPOSITORY / "docs" not in target.parents}


def file_page(path: Path) -> str:
    """A page that shows a text file."""
    name = path.relative_to(REPOSITORY)
    language = LANGUAGES.get(path.suffix, path.suffix.lstrip("."))
    text = path.read_text(encoding="utf-8").rstrip()
    block = f"`````{language}\n{text}\n`````\n"
    return f"---\ntitle: {path.name}\n---\n# {path.name}\n\n`{name}`\n\n{block}"


def api_pages() -> Iterator[tuple[str, str]]:
    """(page, content) of every public module, a folder a package, and of the lists of them."""
    packages = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    for package in packages:
        folder = Path("api", package.relative_to(PACKAGE))
        modules = [path for path in sorted(package.glob("*.py")) if path.name[0] != "_"]
        inner = [path for path in packages if path.parent == package]
        lines = [f"- [{path.name}]({path.name}/index.md): {_about(path)}" for path in inner]
        lines += [f"- [{path.stem}]({path.stem}.md): {_about(path)}" for path in modules]
        name = ".".join(package.relative_to(PACKAGE.parent).parts)
        text = "\n".join([f"# {name}\n", _about(package) + "\n", *lines])
        yield f"{folder}/index.md", f"---\ntitle: {package.name}\n---\n{text}\n"
        for path in modules:
            text = f"# {name}.{path.stem}\n\n::: {name}.{path.stem}\n"
            yield f"{folder}/{path.stem}.md", f"---\ntitle: {path.stem}\n---\n{text}"


def _about(path: Path) -> str:
    """The first sentence of a module's or package's docstring."""
    file = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def _place(path: Path, pages: dict[Path, str]) -> str:
    """Where a file of the repository stands in the site."""
    if path in pages:
        return pages[path]
    if REPOSITORY / "docs" in path.parents:
        return str(path.relative_to(REPOSITORY / "docs"))
    name = path.relative_to(REPOSITORY)
    return f"files/{name}" if path.suffix in PICTURES else f"files/{name}.md"


def _parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """A text in parts, with whether each is code, in which nothing is a link."""
    start = 0
    for match in CODE.finditer(markdown):
        yield markdown[start : match.start()], False
        yield match[0], True
        start = match.end()
    yield markdown[start:], False
