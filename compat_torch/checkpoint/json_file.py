"""Reading config.json and shard indexes: small, strict, and bounded in size and depth."""

from __future__ import annotations

import json
import os
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError
from .source import open_source, reading

MAX_DEPTH = 32


def read_json(path: str | os.PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file, checked.

    Infinity is a number: transformers 4 writes `"time_step_limit": [0.0, Infinity]`.

    Args:
        path: a UTF-8 file.
        max_bytes: a bigger file is refused unread.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptCheckpointError: too big, not UTF-8, not JSON, NaN, a name given twice, nested deeper than
            `MAX_DEPTH` levels.
        CheckpointError: not a regular file, or its content is not an object.
    """
    source = open_source(path)
    with reading(source.path):
        if source.size > max_bytes:
            raise CorruptCheckpointError(f"the file has {source.size} bytes; at most {max_bytes} are read")
        try:
            text = bytes(source.data).decode("utf-8")
        except UnicodeDecodeError as err:
            raise CorruptCheckpointError(f"the file is not UTF-8 text: {err}") from err
        try:
            content = json.loads(text, object_pairs_hook=unique, parse_constant=_constant)
        except json.JSONDecodeError as err:
            raise CorruptCheckpointError(f"the file is not JSON: {err}") from err
        if not isinstance(content, dict):
            raise CheckpointError(f"the file holds a JSON {type(content).__name__}; expected an object {{...}}")
        _check_depth(content)
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of the pairs of a JSON object.

    Raises:
        CorruptCheckpointError: a name occurs more than once.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = {name for name, _ in pairs if name in seen or seen.add(name)}
        shown = [name[:80] for name in sorted(twice)[:5]]
        raise CorruptCheckpointError(f"{shown} is there more than once")
    return result


def _constant(token: str) -> float:
    if token == "NaN":
        raise CorruptCheckpointError("NaN is no value of a configuration")
    return float(token)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if any(isinstance(value, dict | list) for value in level):
        raise CorruptCheckpointError(f"the content is nested more than {MAX_DEPTH} levels deep")
