"""What the project's pages say, taken apart: commands, links, headings, paths, YAML."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
BUNDLES = sorted((REPOSITORY / "bundles").iterdir())
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md"]
DOCUMENTS += sorted((REPOSITORY / "docs").rglob("*.md"))
DOCUMENTS += [bundle / "docs" / "README.md" for bundle in BUNDLES]

SHELLS = ("", "sh", "bash", "shell", "console")
FENCE = re.compile(r"^( *)(`{3,})(\w*)[^\n`]*\n(.*?)^\1\2`*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TREE = re.compile(r"(?:bundles|workflow|tests|benchmarks|docs|common)/[\w./*-]*[\w/]")


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return [(match[3], match[4]) for match in FENCE.finditer(text)]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", text)


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of every command of the fenced shell blocks, continued lines joined."""
    for language, block in fences(text):
        if language not in SHELLS:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            yield from commands_of(line.strip().removeprefix("$ "))


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a line; comments and settings of variables are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word.strip("|&;"):
            words += [] if not words and re.match(r"\w+=", word) else [word]
        elif words:
            yield words
            words = []


def inline_commands(text: str, program: str) -> Iterator[list[str]]:
    """The words of every command of a program that stands in the prose as code."""
    for code in INLINE.findall(prose(text)):
        if code.startswith(f"{program} "):
            yield from commands_of(code)


def without_placeholders(words: list[str]) -> list[str]:
    """The words of a command as written, brackets of optional ones taken off, `…` left out."""
    words = [word.strip("[]") if not word.startswith("['") else word for word in words]
    return [word for word in words if word and word not in ("…", "...")]


def headings(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them and as mkdocs.yml orders them."""
    found = re.findall(r"^#+ +(.+?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def links(text: str) -> list[str]:
    """Targets of the links and pictures that are no addresses, code left out."""
    found = LINK.findall(INLINE.sub("", prose(text)))
    return [target for target in found if not re.match(r"\w+:", target)]


def tree_paths(text: str) -> set[str]:
    """Files and folders of the repository that are named in code, in blocks or in the prose."""
    blocks = [block for language, block in fences(text) if language in SHELLS]
    words = " ".join([*blocks, *INLINE.findall(prose(text))]).split()
    return {match[0] for word in words if (match := TREE.match(word.strip("'\"[](),")))}
