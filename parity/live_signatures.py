"""Constructor arguments of the reference: `python -m parity.live_signatures [--write]`.

Compares those of an installed lrnnx with the stored golden/signatures.json, from which the tests check ours. Exit
status: 0 if they are equal, 1 if not, 2 without lrnnx.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from .case import GOLDEN
from .live_run import ReferenceMissingError, import_class

FILE = GOLDEN / "signatures.json"
CLASSES = (
    "models.lti.lru:LRU", "models.lti.s5:S5", "models.lti.s4d:S4D", "models.lti.s4:S4",
    "models.lti.centaurus:Centaurus", "models.lti.centaurus:CentaurusNeck", "models.lti.centaurus:CentaurusPWNeck",
    "models.lti.centaurus:CentaurusDWS", "models.lti.centaurus:CentaurusFull", "models.ltv.mamba:Mamba",
    "models.ltv.s5:S5", "models.ltv.rglru:RGLRU", "models.ltv.s7:S7", "layers.mha:MHA", "layers.mlp:GatedMLP",
    "layers.block:Block", "architectures.embedding:TokenEmbedding", "architectures.embedding:PositionEmbedding",
    "architectures.language_model:LRNNModel", "architectures.language_model:LRNNLMHeadModel",
    "architectures.classifier:SequencePooling", "architectures.classifier:ClassifierBlock",
    "architectures.classifier:Classifier", "architectures.lru_unet:LRUBlock",
    "architectures.lru_unet:LayerNormFeature", "architectures.lru_unet:DownPool1D", "architectures.lru_unet:UpPool1D",
    "architectures.lru_unet:LRUUnet",
)  # fmt: skip
REQUIRED, ANY = "required", "any"


def arguments(cls: type) -> dict[str, Any]:
    """The default of every constructor argument by name, in order: `REQUIRED`, `ANY` of **kwargs, or its value.

    Values that JSON lacks (classes, functions, dtypes) are their names.
    """
    make = cls.__new__ if "__new__" in vars(cls) else cls.__init__
    found: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(make).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            found[name] = ANY
        else:
            found[name] = REQUIRED if parameter.default is parameter.empty else _plain(parameter.default)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def main(command: list[str] | None = None) -> int:
    """Compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--write", action="store_true", help="replace the stored arguments")
    args = parser.parse_args(command)
    try:
        found = {cls: arguments(import_class(f"lrnnx.{cls}")) for cls in CLASSES}
    except ReferenceMissingError as err:
        print(err)
        return 2
    if args.write:
        args.file.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(args.file.read_text())
    differing = [cls for cls in found | stored if list(found.get(cls, {}).items()) != list(stored.get(cls, {}).items())]
    print(f"{len(found)} classes of lrnnx, the arguments of {len(differing)} are not the stored ones", *differing)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
