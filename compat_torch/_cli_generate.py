"""The command `generate`: a model of a folder continues a text."""

from __future__ import annotations

import codecs
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_NO_TOKENIZER = (
    "has no tokenizer: pass --tokenizer with a name or a folder (state-spaces/mamba models use "
    "EleutherAI/gpt-neox-20b), --tokenizer bytes, or --prompt-ids"
)


def generate(
    path: Annotated[str, typer.Argument(help="Folder of a language model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help='Token ids to continue, "1,2,3".')] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="How many tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 or none: the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of this probability together.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: avoid tokens already there.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the parameters, such as bfloat16; the file's if not given.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='A name or folder for transformers.AutoTokenizer, or "bytes"; the folder\'s own.')
    ] = None,
) -> None:
    """Continue a text, printed as it is made. A tokenizer's end of text ends it. Exit status 1 on an error."""
    from .errors import CheckpointError

    console = Console(stderr=True, highlight=False)
    try:
        ids, seconds = _run(
            path, prompt, prompt_ids, max_new_tokens, seed, dtype, tokenizer,
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
    except (CheckpointError, ValueError, TypeError, OSError, ImportError) as err:
        console.print(f"error: {err}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from err
    console.print(f"{ids} tokens in {seconds:.2f} s", style="dim")


def _run(path, prompt, prompt_ids, max_new_tokens, seed, dtype, tokenizer, **sampling: Any) -> tuple[int, float]:
    """Print the new text; how many tokens it took, and how long."""
    import numpy as np
    from flax import nnx

    from .checkpoint import from_pretrained
    from .generation import generate as generate_ids

    if (prompt is None) == (prompt_ids is None):
        raise ValueError("pass either --prompt or --prompt-ids")
    encode, decode, eos = _tokenizer(path, tokenizer, needed=prompt is not None)
    ids = encode(prompt) if prompt is not None else _parse(prompt_ids)
    model = from_pretrained(path) if dtype is None else from_pretrained(path, dtype=dtype)
    show, count = _Printer(decode), itertools.count()

    def on_token(tokens: np.ndarray) -> None:
        next(count)
        show(int(tokens[0]))

    started = time.perf_counter()
    generate_ids(
        model, np.array([ids], np.int32).reshape(1, -1), max_new_tokens,
        eos_token_id=eos, rngs=nnx.Rngs(seed), on_token=on_token, **sampling,
    )  # fmt: skip
    show.end()
    return next(count), time.perf_counter() - started


def _parse(prompt_ids: str) -> list[int]:
    try:
        return [int(part) for part in prompt_ids.split(",")]
    except ValueError as err:
        raise ValueError(
            f'--prompt-ids must be integers with commas between them, "1,2,3", got {prompt_ids!r}'
        ) from err


def _tokenizer(path: str, name: str | None, needed: bool) -> tuple[Callable, Callable[[list[int]], str], int | None]:
    """`(encode, decode, end of text)`; decode gives the whole text of all tokens so far."""
    if name == "bytes":
        return _to_bytes, _from_bytes, None
    if name is None and not any((Path(path) / file).exists() for file in _TOKENIZER_FILES):
        if needed:
            raise ValueError(f"{path} {_NO_TOKENIZER}")
        return _to_bytes, _numbers, None
    try:
        from transformers import AutoTokenizer
    except ImportError as err:
        raise ImportError(
            "the tokenizer needs transformers: pip install transformers, or pass --tokenizer bytes or --prompt-ids"
        ) from err
    loaded = AutoTokenizer.from_pretrained(path if name is None else name)
    return loaded.encode, lambda ids: str(loaded.decode(ids, skip_special_tokens=True)), loaded.eos_token_id


def _to_bytes(text: str) -> list[int]:
    return list(text.encode())


def _from_bytes(ids: list[int]) -> str:
    if wrong := [token for token in ids if token > 255]:
        raise ValueError(f"--tokenizer bytes: token {wrong[0]} is no byte; the model has another tokenizer")
    return codecs.decode(bytes(ids), "utf-8", "replace")


def _numbers(ids: list[int]) -> str:
    return "".join(f"{token} " for token in ids)


class _Printer:
    """Prints text as tokens complete it: a character that may still be incomplete waits."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.pending, self.context = decode, [], []

    def __call__(self, token: int) -> None:
        self.pending.append(token)
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(self.pending) > 8:
            self._print(text)

    def end(self) -> None:
        """Print what still waits, and end the line."""
        self._print(self._text())
        typer.echo()

    def _text(self) -> str:
        return self.decode(self.context + self.pending)[len(self.decode(self.context)) :]

    def _print(self, text: str) -> None:
        typer.echo(text, nl=False)
        self.context, self.pending = self.pending or self.context, []
