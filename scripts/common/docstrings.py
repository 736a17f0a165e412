"""A small real text data set without a download: the docstrings of Python's standard library.

Each is labelled with the part of the library that it comes from. The source files are parsed, not
imported: the same Python version always gives the same data.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.cli import InputError

SOURCE = f"docstrings of Python {platform.python_version()}"
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


class Docstring(NamedTuple):
    text: str  # on one line
    section: int  # its place in SECTIONS
    definition: str  # the class or function at the top of the module that it belongs to


def read_docstrings() -> list[Docstring]:
    """All docstrings of at least five words, in a fixed order, each wording once."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, ...], Docstring] = {}
    for section, names in enumerate(SECTIONS.values()):
        for name in names.split():
            for file in [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]:
                module = ast.parse(file.read_bytes() if file.is_file() else "")
                for definition, text in _walk(module):
                    words = tuple(re.findall(r"[a-z]+", text.lower()))
                    where = f"{file.relative_to(library).as_posix()}:{definition}"
                    if len(words) >= MIN_WORDS:
                        found.setdefault(words, Docstring(text, section, where))
    if not found:
        raise InputError(f"no docstrings in {library}: give --train_file or --dataset_name")
    return list(found.values())


def _walk(node: ast.AST, top: str = "") -> Iterator[tuple[str, str]]:
    """Each docstring, on one line, after the name of the outermost definition that holds it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield top, " ".join((ast.get_docstring(node) or "").split())
    # Definitions are statements, never parts of an expression, and most nodes are expressions.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _walk(child, top or getattr(child, "name", None) or "")
