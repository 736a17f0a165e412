"""`sam_config.json`: read from a folder or from the Hub, written atomically."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .. import __version__

SAM_CONFIG_NAME = "sam_config.json"


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options and the version of the package into a folder, created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"sam_hf_version": __version__, **options}
    with replacing(folder / SAM_CONFIG_NAME) as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_missing_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is the path of a folder that does not exist, and not a name on the Hub."""
    text, path = os.fspath(name), Path(name)
    has_parent = "/" in text and path.parent.exists()
    is_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or has_parent
    return is_path and not path.exists()


def read_options(
    name_or_path: str | os.PathLike[str], known: Collection[str], **hub: Any
) -> tuple[dict[str, Any], str]:
    """Read the `sam_config.json` of a folder or of a model on the Hub, without checking the values.

    Args:
        known: names of the options that exist.
        hub: keyword arguments of `transformers.utils.hub.cached_file`.

    Returns:
        The options, and a line that names the file and the version that wrote it.

    Raises:
        FileNotFoundError: the file does not exist, or the Hub cannot be reached.
        ValueError: the file is not a JSON object, or has an unknown key.
    """
    try:
        if is_missing_path(name_or_path):
            raise FileNotFoundError("there is no such folder")  # a request to the Hub would be slow
        file = cached_file(name_or_path, SAM_CONFIG_NAME, **hub)
    except OSError as error:
        raise FileNotFoundError(
            f"{SAM_CONFIG_NAME} could not be read from {str(name_or_path)!r}, which is neither a "
            "folder nor a model on the Hub that holds one: " + " ".join(str(error).split())
        ) from error
    assert file is not None  # `cached_file` raises otherwise
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # invalid JSON or invalid encoding
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {values!r}. Allowed: a JSON object.")
    version = values.pop("sam_hf_version", "unknown")
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(
            f"{file}: {', '.join(map(repr, unknown))} is not an option of sam_hf {__version__}. "
            f"The file was written by version {version}: install that version, or remove the key."
        )
    return values, f"The options were read from {file}, written by sam_hf {version}."


def changed_since(folder: Path, options: Mapping[str, Any]) -> list[str]:
    """Lines such as "sam_rho was 0.05 and is 0.1" for the options that differ from a checkpoint's.

    Empty for a folder without a `sam_config.json`, such as a plain Trainer's checkpoint.
    """
    try:
        before = dict(json.loads((folder / SAM_CONFIG_NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return []
    now = json.loads(json.dumps(options))
    return [
        f"{name} was {before[name]!r} and is {value!r}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a path whose file replaces `path` if the block succeeds."""
    temporary = path.with_name(f"_{path.name}")  # the Trainer does not push names with "_"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
