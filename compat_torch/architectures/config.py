"""Configurations of language models, under Hugging Face's names, checked before anything is allocated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self


def setting(default: Any, accepts: Callable[[Any], bool], supported: str) -> Any:
    """A field of a `CausalLMConfig`: its default, which values it takes, and these in words."""
    return field(default=default, metadata={"accepts": accepts, "supported": supported})


def integer(default: int | None, low: int, high: int, optional: bool = False) -> Any:
    """An integer in [low, high]; None too if `optional`."""
    text = f"an integer from {low} to {high}" + (" or null" if optional else "")
    return setting(default, lambda value: is_integer(value, low, high) or (optional and value is None), text)


def number(default: float, low: float, high: float) -> Any:
    """A finite real number in [low, high]."""
    return setting(default, lambda value: is_number(value) and low <= value <= high, f"a number from {low} to {high}")


def flag(default: bool) -> Any:
    """true or false."""
    return setting(default, lambda value: isinstance(value, bool), "true or false")


def choice(default: str, *choices: str) -> Any:
    """One of some strings."""
    return setting(default, lambda value: isinstance(value, str) and value in choices, f"one of {choices}")


def token(default: int | None) -> Any:
    """A token id, several of them, or None; -1 is none too."""

    def accepts(value):
        return value is None or all(is_integer(v, -1, _LARGEST_VOCABULARY) for v in _items(value))

    return setting(default, accepts, f"a token id from -1 to {_LARGEST_VOCABULARY}, a list of them, or null")


_LARGEST_VOCABULARY = 2**24


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """The configuration of a language model, under Hugging Face's names.

    A subclass adds fields, each made by `integer`, `number`, `flag`, `choice`, `token` or `setting`. Whatever the
    values, checking them allocates nothing.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        tie_word_embeddings: the head shares the embedding's weight.
        pad_vocab_size_multiple: embedding and head have `vocab_size` rounded up to a multiple of it.
        bos_token_id, eos_token_id, pad_token_id: for generation; the model itself does not use them.
        extra: what else a config.json holds. Without effect, kept for writing it again.

    Raises:
        ValueError: values that are not supported; it names all of them.
    """

    model_type: ClassVar[str] = ""

    vocab_size: int = integer(50280, 1, _LARGEST_VOCABULARY)
    hidden_size: int = integer(768, 1, 2**20)
    num_hidden_layers: int = integer(32, 1, 2**10)
    tie_word_embeddings: bool = flag(True)
    pad_vocab_size_multiple: int = integer(1, 1, 2**16)
    bos_token_id: int | tuple[int, ...] | None = token(0)
    eos_token_id: int | tuple[int, ...] | None = token(0)
    pad_token_id: int | tuple[int, ...] | None = token(0)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        wrong = []
        for name, metadata in self._settings().items():
            value = getattr(self, name)
            if not metadata["accepts"](value):
                wrong.append(f"{name} must be {metadata['supported']}, got {_shortened(value)}")
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._raise(wrong)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The configuration of a config.json.

        Args:
            config: its content; infinities may be written as {"__float__": "Infinity"}. vocab_size, hidden_size and
                num_hidden_layers must be there; other fields have transformers' defaults.

        Raises:
            ValueError: not a mapping, another model_type, quantised weights, missing or unsupported values.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"{cls.__name__} must be made from a mapping, got {type(config).__name__}")
        given = copy.deepcopy(dict(config))
        model_type = given.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"{cls.__name__}: model_type must be {cls.model_type!r}, got {_shortened(model_type)}")
        wrong = [f"{name} is missing" for name in _REQUIRED if name not in given]
        if given.get("quantization_config") is not None:
            wrong.append("quantization_config is not supported: load the weights as they were before quantisation")
        cls._raise(wrong)
        known = {name: _decoded(given.pop(name)) for name in cls._settings() if name in given}
        return cls(**known, extra=given)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json: every field and what `extra` holds."""
        values = {name: _encoded(getattr(self, name)) for name in self._settings()}
        return {"model_type": self.model_type, **copy.deepcopy(dict(self.extra)), **values}

    @classmethod
    def _settings(cls) -> dict[str, Mapping[str, Any]]:
        return {f.name: f.metadata for f in fields(cls) if f.metadata}

    @classmethod
    def _raise(cls, wrong: list[str]) -> None:
        if wrong:
            raise ValueError(f"{cls.__name__}: " + "; ".join(wrong))


_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers")


def is_integer(value: Any, low: int, high: int) -> bool:
    """Whether it is an int, not a bool, in [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether it is an int or a finite float, not a bool."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"{type(value).__name__} of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _decoded(value: Any) -> Any:
    """Replace transformers' {"__float__": "Infinity"} by the number."""
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"__float__"} and value["__float__"] in _SPECIAL:
        return float(value["__float__"])
    return value


def _encoded(value: Any) -> Any:
    """A value as JSON can hold it, the inverse of `_decoded`."""
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


_SPECIAL = ("Infinity", "-Infinity", "NaN")
