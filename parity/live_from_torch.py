"""Does `from_torch` make the right module of a live one? `python -m parity.live_from_torch [--seed 1]`

Every class of lrnnx, mamba_ssm and s5-pytorch that `from_torch` knows, with fresh random weights: outputs and gradients
of the JAX module against those of the torch module, by `parity.compare_modules`. mamba_ssm is built without CUDA and
without its dependencies (`make live`), and computes with its own functions for a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .compare import Row
from .live import configurations, import_class
from .live_run import ReferenceMissingError
from .modules import compare_modules

INSTALL = """pip install --no-deps s5-pytorch==0.2.1
pip install transformers triton
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"""
VOCABULARY = 11


class Live(NamedTuple):
    """A torch module, and the shape of its input; of tokens where the shape has two axes."""

    name: str
    make: Callable[[], Any]
    shape: tuple[int, ...]
    event: bool = False


def live_modules() -> Iterator[Live]:
    """Every class, with more than one setting where its constructor has some that its tensors do not tell."""
    yield from _s5_pytorch()
    yield from _mamba_ssm()
    seen = set()
    for found in configurations():
        wanted = (found.cls, found.kwargs.get("discretization"), found.label)
        if wanted not in seen and found.shape[1] > 1:
            seen.add(wanted)

            def make(found=found):
                return import_class(found.cls)(**found.kwargs)

            yield Live(f"{found.cls.split('.')[0]}_{found.name}", make, found.shape, found.event)
    yield from _lrnnx_models()


def _s5_pytorch() -> Iterator[Live]:
    settings: list[dict[str, Any]] = [
        {},
        {"state_width": 6, "block_count": 2},
        {"bidir": True},
        {"liquid": True},
        {"degree": 2},
        {"bcInit": "complex_normal"},
    ]
    for options in settings:
        name = "_".join(["s5_pytorch_S5", *options])
        yield Live(name, lambda options=options: _import("s5").S5(4, **options), (2, 13, 4))
    for glu in (True, False):
        options = {"glu": glu, "ff_mult": 1.5, "attn_dropout": 0.2, "liquid": glu}
        name = "s5_pytorch_S5Block" + "_glu" * glu
        yield Live(name, lambda options=options: _import("s5").S5Block(4, 6, False, **options), (2, 13, 4))


def _mamba_ssm() -> Iterator[Live]:
    def layer(**options):
        return _mamba_module("modules.mamba_simple").Mamba(5, **options)

    def model(options, **ssm):
        config = _mamba_module("models.config_mamba").MambaConfig(
            d_model=8, n_layer=2, vocab_size=VOCABULARY, fused_add_norm=False, ssm_cfg=ssm, **options
        )
        return _mamba_module("models.mixer_seq_simple").MambaLMHeadModel(config)

    yield Live("mamba_ssm_Mamba", lambda: layer(), (2, 13, 5))
    yield Live("mamba_ssm_Mamba_sizes", lambda: layer(d_state=3, d_conv=2, expand=3, dt_rank=2, bias=True), (1, 7, 5))
    yield Live("mamba_ssm_MambaLMHeadModel", lambda: model({}), (2, 13))
    untied = {"tie_embeddings": False, "residual_in_fp32": False, "pad_vocab_size_multiple": 1}
    yield Live("mamba_ssm_MambaLMHeadModel_untied", lambda: model(untied, d_state=3, dt_rank=2), (1, 7))
    second = {"layer": "Mamba2", "headdim": 4, "d_state": 8, "use_mem_eff_path": False}
    yield Live("mamba_ssm_MambaLMHeadModel_Mamba2", lambda: model({}, **second), (2, 13))
    limited = {**second, "ngroups": 2, "dt_limit": (0.01, 0.1)}
    yield Live("mamba_ssm_MambaLMHeadModel_Mamba2_groups", lambda: model(untied, **limited), (1, 7))


def _lrnnx_models() -> Iterator[Live]:
    def language_model():
        mixers = {"S5": {"discretization": "bilinear"}, "Mamba": {"discretization": "zoh"}}
        for cls in ("lti.s5:S5", "ltv.mamba:Mamba", "lti.s4d:S4D"):
            import_class(f"lrnnx.models.{cls}")
        return import_class("lrnnx.architectures.language_model:LRNNLMHeadModel")(
            8, 4, 3, VOCABULARY, ["Mamba", "S5", "LRU"], mixer_kwargs=mixers, fused_add_norm=False
        )

    def classifier():
        layer = functools.partial(import_class("lrnnx.models.lti.s5:S5"), d_model=6, d_state=4, discretization="dirac")
        return import_class("lrnnx.architectures.classifier:Classifier")(
            5, 3, d_model=6, n_layers=2, lrnn_cls=layer, pooling="mean", intermediate_pooling="stride",
            pooling_factor=2, dropout=0.2,
        )  # fmt: skip

    yield Live("lrnnx_LRNNLMHeadModel", language_model, (2, 13))
    yield Live("lrnnx_Classifier", classifier, (2, 13, 5))


def check(live: Live, seed: int) -> Row:
    """Make it, convert it, run both. A reference that cannot be imported is a row that says so."""
    import torch

    from compat_torch.errors import ReferenceDefectWarning

    torch.manual_seed(seed)
    np.random.seed(seed)
    nothing = (live.name, "from_torch", None, None, None, None)
    try:
        module = live.make().eval()
    except ReferenceMissingError as err:
        return Row(*nothing, "unsupported", str(err))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    x = torch.randint(VOCABULARY, live.shape) if len(live.shape) == 2 else torch.randn(live.shape)
    x = x.transpose(1, 2).contiguous() if getattr(module, "transposed", False) else x
    inputs = {"integration_timesteps": 0.1 + 2 * torch.rand(live.shape[:2])} if live.event else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReferenceDefectWarning)
            return replace(compare_modules(module, x, inputs=inputs), case=live.name)
    except Exception as err:
        return Row(*nothing, "differs", f"{type(err).__name__}: {err}")


def _import(name: str) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ImportError as err:
        raise ReferenceMissingError(f"{name} cannot be imported ({err}); install it with\n{INSTALL}") from err


def _mamba_module(name: str) -> Any:
    """A module of mamba_ssm, whose package imports what needs a GPU: it is passed over."""
    if "mamba_ssm" not in sys.modules:
        found = importlib.util.find_spec("mamba_ssm")
        if found is None:
            raise ReferenceMissingError(f"mamba_ssm is not installed; install it with\n{INSTALL}")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules["mamba_ssm"] = package
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
        _on_cpu()
    return _import(f"mamba_ssm.{name}")


def _on_cpu() -> None:
    """Put mamba_ssm's own definitions in the place of its kernels."""
    scan = _import("mamba_ssm.ops.selective_scan_interface")
    norm = _import("mamba_ssm.ops.triton.layer_norm")
    gated = _import("mamba_ssm.ops.triton.layernorm_gated")
    dual = _import("mamba_ssm.ops.triton.ssd_combined")
    scan.selective_scan_fn = scan.selective_scan_ref

    def rms_norm(*args, residual_in_fp32=False, **kwargs):
        return norm.rms_norm_ref(*args, **kwargs)

    def dual_scan(*args, chunk_size, seq_idx=None, cu_seqlens=None, **kwargs):
        given = {key: value for key, value in kwargs.items() if not key.startswith("return_")}
        return dual.ssd_selective_scan(*args, **given)

    norm.rms_norm_fn, gated.rmsnorm_fn, dual.mamba_chunk_scan_combined = rms_norm, gated.rms_norm_ref, dual_scan


def report(rows: list[Row]) -> int:
    """Print the table; 0 if every row is identical."""
    from rich.console import Console

    from .report import print_table, summary

    console = Console(width=None if sys.stdout.isatty() else 120)
    print_table(rows, console)
    console.print(summary(rows, 0), style="bold", highlight=False)
    return int(not rows or any(row.verdict != "identical" for row in rows))


def options(about: str | None) -> argparse.Namespace:
    """`--seed` and `-k` of the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("-k", default="", help="only what has this in its name")
    return parser.parse_args()


def main() -> int:
    """Check every module; the exit status."""
    args = options(__doc__)
    return report([check(live, args.seed + i) for i, live in enumerate(live_modules()) if args.k in live.name])


if __name__ == "__main__":
    raise SystemExit(main())
