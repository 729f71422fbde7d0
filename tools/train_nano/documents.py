"""From fetched packages to plain documents: one `Document` per file, page, chapter or group of dictionary entries."""

from __future__ import annotations

import gzip
import re
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tools.train_nano.sources import KJV_READER, Kind, Source

MIN_CHARS = 200
MAX_CHARS = 250_000
SYNSETS_PER_DOCUMENT = 24
_BLOCKS = frozenset(
    [
        "p",
        "div",
        "br",
        "li",
        "tr",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "dt",
        "dd",
        "pre",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
        "section",
    ]
)
_SKIPPED = frozenset(["script", "style", "head", "nav", "title", "footer", "form", "svg"])
_PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text with its provenance; `group` is what the held-out split decides on (a file, a page, a book)."""

    source: str
    path: str
    group: str
    kind: Kind
    text: str


class _HtmlText(HTMLParser):
    """Collects the text of a page, a line break per block element, `pre` kept as it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skip = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED:
            self._skip += 1
        if tag == "pre":
            self._pre += 1
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED and self._skip:
            self._skip -= 1
        if tag == "pre" and self._pre:
            self._pre -= 1
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.parts.append(data if self._pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Return the readable text of an HTML page, with at most one empty line in a row."""
    parser = _HtmlText()
    parser.feed(page)
    text = "".join(parser.parts).replace("¶", "").replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"\n ", "\n", text)).strip()


def _usable(text: str) -> bool:
    """False for tables, generated data and files that are too short or too long to be worth learning."""
    if not MIN_CHARS <= len(text) <= MAX_CHARS:
        return False
    lines = text.count("\n") + 1
    letters = sum(map(str.isascii, text))
    digits = sum(map(str.isdigit, text))
    return len(text) / lines < 200 and letters > 0.97 * len(text) and digits < 0.15 * len(text)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def _files(root: Path, source: Source) -> Iterator[tuple[str, str]]:
    suffix = {"python": ".py", "rst": ".txt", "html": ".html"}[source.format]
    if root.suffix == ".whl":
        with zipfile.ZipFile(root) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(suffix) and "/_vendor/" not in name and "/locale/" not in name:
                    yield name, wheel.read(name).decode("utf-8", errors="replace").replace("\r\n", "\n")
        return
    base = root / source.under
    for path in sorted(base.rglob(f"*{suffix}")):
        text = None if "/_modules/" in str(path) or path.is_symlink() else _read(path)
        if text is not None:
            yield path.relative_to(base).as_posix(), text


def _kjv(root: Path, reader: Path, source: Source) -> Iterator[Document]:
    command = [str(reader / "usr/bin/bible"), "-p", str(root / source.under), "-f", "Gen1:1-Rev22:21"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        place, _, verse = line.partition(" ")
        chapters.setdefault(place.partition(":")[0], []).append(f"{place.partition(':')[2]} {verse}")
    for chapter, verses in chapters.items():
        book = re.sub(r"\d+$", "", chapter)
        text = f"{book} {chapter[len(book) :]}\n\n" + "\n".join(verses) + "\n"
        yield Document(source=source.package, path=chapter, group=book, kind="prose", text=text)


def _synsets(root: Path, source: Source) -> Iterator[tuple[str, str, str]]:
    """Yield (words, part of speech, gloss) of each WordNet synset, in the order of the files."""
    for part, name in _PARTS_OF_SPEECH.items():
        for line in (root / source.under / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            words = [columns[4 + 2 * i].replace("_", " ") for i in range(int(columns[3], 16))]
            yield ", ".join(re.sub(r"\([a-z]+\)$", "", word) for word in words), name, gloss.strip()


def _wordnet(root: Path, source: Source) -> Iterator[Document]:
    entries = [f"{words} ({part}): {gloss}" for words, part, gloss in _synsets(root, source)]
    for start in range(0, len(entries), SYNSETS_PER_DOCUMENT):
        group = f"synsets-{start // SYNSETS_PER_DOCUMENT}"
        text = "\n".join(entries[start : start + SYNSETS_PER_DOCUMENT]) + "\n"
        yield Document(source=source.package, path=group, group=group, kind="prose", text=text)


def _jargon(root: Path, source: Source) -> Iterator[Document]:
    text = gzip.decompress((root / source.under / "jargon.dict.dz").read_bytes()).decode("utf-8")
    for number, start in enumerate(range(0, len(text), 8000)):
        group = f"part-{number}"
        yield Document(source=source.package, path=group, group=group, kind="prose", text=text[start : start + 8000])


def documents(root: Path, source: Source, folders: dict[str, Path]) -> Iterator[Document]:
    """Yield all usable documents of one unpacked package (or wheel) at `root`."""
    if source.format == "kjv":
        yield from _kjv(root, folders[KJV_READER], source)
    elif source.format == "wordnet":
        yield from _wordnet(root, source)
    elif source.format == "jargon":
        yield from _jargon(root, source)
    else:
        for path, raw in _files(root, source):
            text = html_text(raw) if source.format == "html" else raw
            if _usable(text):
                yield Document(source=source.package, path=path, group=path, kind=source.kind, text=text)
