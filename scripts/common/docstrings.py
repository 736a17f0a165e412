"""A small real text data set without a download: the docstrings of Python's standard library.

Each docstring is labelled with the part of the library that it comes from, much as the library
reference is divided. They are read from the source files, nothing is imported, so the same Python
version gives the same data; another version has other docstrings.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from common.cli import InputError
from common.data import SPLIT_SEED, Sets

MIN_WORDS = 5  # shorter ones ("Return a copy.") could come from anywhere

SECTIONS = {
    "data types": "abc _collections_abc bisect collections contextlib copy dataclasses enum "
    "functools graphlib heapq operator pprint reprlib types typing weakref",
    "numbers and dates": "calendar datetime _pydatetime fractions numbers _pydecimal random "
    "statistics _strptime zoneinfo",
    "text and markup": "argparse codecs configparser csv difflib encodings gettext html json "
    "locale optparse plistlib re shlex string textwrap tomllib xml",
    "files and archives": "bz2 filecmp fileinput fnmatch genericpath glob gzip lzma ntpath os "
    "pathlib posixpath _pyio shutil stat tarfile tempfile zipapp zipfile",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading "
    "_threading_local",
    "internet protocols": "ftplib http imaplib ipaddress poplib smtplib socket socketserver ssl "
    "urllib uuid webbrowser wsgiref xmlrpc",
    "mail": "base64 email mailbox mimetypes quopri",
    "imports and code": "ast code codeop compileall dis importlib inspect modulefinder pickletools "
    "pkgutil py_compile pyclbr runpy symtable sysconfig tokenize traceback zipimport",
    "development": "bdb cProfile doctest logging pdb profile pstats pydoc timeit trace tracemalloc "
    "unittest venv warnings",
}


@dataclass(frozen=True)
class Docstring:
    """A docstring, on one line, and where it comes from."""

    text: str
    section: int  # its place in SECTIONS
    definition: str  # the class or function at the top of the module that it belongs to


def describe_source() -> str:
    return f"docstrings of Python {platform.python_version()}"


def read_docstrings() -> list[Docstring]:
    """All docstrings of at least five words, in a fixed order, each wording once.

    Raises:
        InputError: this Python came without the source files of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, ...], Docstring] = {}
    for section, names in enumerate(SECTIONS.values()):
        for name in names.split():  # a module that this version lacks has no files
            for file in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
                if file.is_file():
                    _add(found, section, file.relative_to(library).as_posix(), file)
    sections = {docstring.section for docstring in found.values()}
    if len(sections) < len(SECTIONS):
        raise InputError(
            f"no docstrings in {library}: this Python lacks the sources of its library; give data "
            "of your own with --train_file or --dataset_name"
        )
    return list(found.values())


def split_docstrings(eval_fraction: float) -> Sets:
    """A training and an evaluation set of docstrings with their sections.

    All docstrings of one class or function are in the same set, as they share phrases.
    """
    from sklearn.model_selection import GroupShuffleSplit  # here: importing it takes a second

    found = read_docstrings()
    columns = {"text": [d.text for d in found], "label": [d.section for d in found]}
    sections = datasets.ClassLabel(names=list(SECTIONS))
    data = datasets.Dataset.from_dict(columns).cast_column("label", sections)
    splitter = GroupShuffleSplit(1, test_size=eval_fraction, random_state=SPLIT_SEED)
    train, test = next(splitter.split(found, groups=[d.definition for d in found]))
    return data.select(train), data.select(test)


def _add(found: dict[tuple[str, ...], Docstring], section: int, module: str, file: Path) -> None:
    for name, text in _docstrings(ast.parse(file.read_bytes())):
        words = tuple(re.findall(r"[a-z]+", text.lower()))
        if len(words) >= MIN_WORDS:
            # The same sentence in other capitals and punctuation would stand in both splits.
            found.setdefault(words, Docstring(text, section, f"{module}:{name}"))


def _docstrings(node: ast.AST, top: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield top, " ".join(docstring.split())
    # Definitions stand among statements, never in an expression, and most nodes are expressions.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _docstrings(child, top or getattr(child, "name", None) or "")
