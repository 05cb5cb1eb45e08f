"""Makes the derived files of the golden folder again: `python -m parity.amend [CASE ...] [--write]`.

From the stored weights and inputs of a case, and the reference that it names (installed beside this package), come
io_amended.safetensors (a run without the defect that the file's metadata names), grads64.safetensors (gradients in
float64) and io_bfloat16.safetensors (logits in bfloat16). Prints by how much each differs from the stored file;
`--write` replaces those that differ. Exit status: 0 if all that could be made are equal within rounding, 1 if not, 2 if
none could be made.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from .case import GOLDEN, Arrays, largest
from .live_models import classifier
from .live_run import import_class
from .torch_run import everything_in_64_bits, gradients, in_float64, output_of

LIMITS = {8: 1e-9, 4: 1e-6}
"""Largest difference by the bytes of an item, relative to max(1, max|array|): processors round differently."""


class Recipe(NamedTuple):
    """How a file is made, `make(folder of the case)`, and what its metadata says beside that."""

    file: str
    make: Callable[[Path], Arrays]
    metadata: dict[str, str] | None = None


def main(arguments: list[str] | None = None) -> int:
    """Make, compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of reference cases")
    parser.add_argument("--write", action="store_true", help="replace the files that differ")
    args = parser.parse_args(arguments)
    if unknown := set(args.cases) - RECIPES.keys():
        parser.error(f"no recipe for {', '.join(sorted(unknown))}")
    verdicts = []
    for case in args.cases or RECIPES:
        recipe = RECIPES[case]
        path = args.golden / case / recipe.file
        try:
            made = recipe.make(path.parent)
        except ImportError as err:
            print(f"{case}/{recipe.file}: not made, {str(err).splitlines()[0]}")
            continue
        difference, equal = compare(made, load_file(path)) if path.exists() else (np.inf, False)
        print(f"{case}/{recipe.file}: {len(made)} arrays, largest difference {difference:.1e}")
        if args.write and not equal:
            save_file({name: np.ascontiguousarray(value) for name, value in made.items()}, path, recipe.metadata)
        verdicts.append(equal or args.write)
    if not verdicts:
        return 2
    return 0 if all(verdicts) else 1


def compare(made: Arrays, stored: Arrays) -> tuple[float, bool]:
    """The largest difference, relative to max(1, max|array|), and whether all arrays are equal within `LIMITS`."""
    if {name: (a.shape, a.dtype) for name, a in made.items()} != {n: (a.shape, a.dtype) for n, a in stored.items()}:
        return np.inf, False
    worst, equal = 0.0, True
    for name, array in stored.items():
        difference = largest(made[name].astype(np.float64) - array) / max(1.0, largest(array))
        worst, equal = max(worst, difference), equal and difference <= LIMITS[array.itemsize]
    return worst, equal


# lrnnx


def _lrnnx(folder: Path) -> tuple[Any, Arrays]:
    """The model of a case with its weights from after the first forward (S4), and the arrays of that run."""
    import torch

    about, weights = json.loads((folder / "case.json").read_text()), load_file(folder / "weights.safetensors")
    cls, kwargs = about["cls"], about["kwargs"]
    model = classifier(cls, kwargs) if "lrnn_cls" in kwargs else import_class(cls)(**kwargs)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval(), load_file(folder / "io.safetensors")


def _gradients64(folder: Path) -> Arrays:
    import torch

    model, io = _lrnnx(folder)
    y64, grads = in_float64(model, torch.from_numpy(io["x"]), {}, torch.from_numpy(io["w"]))
    _check_outputs(y64, io["y64"], folder)
    return {f"grad64.{name}": value for name, value in grads.items()}


def _events_without_padding(folder: Path) -> Arrays:
    """The reference runs on timesteps that are 0 past the lengths; the file has all of them, for us to leave out."""
    model, io = _lrnnx(folder)
    timesteps = io["integration_timesteps"]
    valid = np.arange(timesteps.shape[1]) < io["lengths"][:, None]
    made = _classified(model, {**io, "integration_timesteps": timesteps * valid})
    return {**made, "integration_timesteps": timesteps}


def _windows_without_padding(folder: Path) -> Arrays:
    """Windows of padding alone, where the reference has -1e9, are 0."""
    model, io = _lrnnx(folder)
    for block in model.blocks:
        if block.pooler is not None:
            block.pooler.register_forward_hook(lambda _, __, out: (out[0].masked_fill(out[0] < -1e8, 0), *out[1:]))
    return _classified(model, io)


def _classified(model: Any, io: Arrays) -> Arrays:
    """`io` with outputs and gradients made again."""
    import torch

    given = {name: value for name, value in io.items() if name in ("x", "w", "lengths", "integration_timesteps")}
    inputs = {name: torch.from_numpy(value) for name, value in given.items()}
    x, w = inputs.pop("x"), inputs.pop("w")
    y = output_of(model(x.requires_grad_(), **inputs))
    grads = {f"grad.{name}": value for name, value in gradients(model, x, y, w).items()}
    y64, _ = in_float64(model, x.detach(), inputs, w)
    return {**given, "y": y.detach().numpy(), "y64": y64, **grads}


# state-spaces/s4


def _dense_gradients64(folder: Path) -> Arrays:
    """Of an S4Block (DPLR, else default arguments) by dense matrices: its own formula cancels in float64 too."""
    import torch
    from torch.nn.functional import gelu, glu

    stored, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    M = int(stored.pop("layer.kernel.l_kernel"))
    p = {name: torch.from_numpy(value).double().requires_grad_() for name, value in stored.items()}
    x = torch.from_numpy(io["x"]).double().requires_grad_()
    k = {name.removeprefix("layer.kernel."): value for name, value in p.items()}

    def both(half: Any) -> Any:
        """Both halves of the conjugate pairs."""
        return torch.cat([half, half.conj()], -1)

    P, B, C = (both(torch.view_as_complex(k[name])) for name in "PBC")
    A = torch.diag_embed(both(torch.complex(-k["A_real"].exp(), -k["A_imag"])))
    A = A - torch.einsum("rhi,rhj->hij", P, P.conj())
    dt, eye = k["inv_dt"].exp(), torch.eye(A.shape[-1], dtype=A.dtype)
    backward = eye - dt[..., None] * A / 2
    A_bar, state = torch.linalg.solve(backward, 2 * eye - backward), torch.linalg.solve(backward, dt * B[0])
    C = torch.linalg.solve((eye - torch.linalg.matrix_power(A_bar, M)).mT, C[0])
    kernel = []
    for _ in range(x.shape[2]):
        kernel.append((C * state).sum(-1).real)
        state = (A_bar @ state[..., None])[..., 0]
    K = torch.stack(kernel, -1)
    y = torch.stack([(K[:, : t + 1].flip(-1) * x[..., : t + 1]).sum(-1) for t in range(x.shape[2])], -1)
    y = gelu(y + p["layer.D"][0][:, None] * x).mT @ p["output_linear.0.weight"].mT + p["output_linear.0.bias"]
    y = glu(y, -1).mT
    _check_outputs(y.detach().numpy(), io["y64"], folder)
    (y * torch.from_numpy(io["w"])).sum().backward()
    return {f"grad64.{name}": value.grad.numpy() for name, value in {**p, "x": x}.items() if value.grad is not None}


def _check_outputs(y: np.ndarray, y64: np.ndarray, folder: Path) -> None:
    """y64 is of the weights before the first forward, which rounds the C of an S4 to float32."""
    if not largest(y - y64) <= 1e-6 * max(1.0, largest(y64)):
        raise ValueError(f"{folder.name}: the outputs differ from the stored y64 by {largest(y - y64):.1e}")


# transformers


def _wide_recurrent_gemma(folder: Path) -> Arrays:
    """Logits with the scan and the rotary frequencies in float64 as well."""
    import torch
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as gemma

    io = load_file(folder / "io.safetensors")
    model: Any = gemma.RecurrentGemmaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64).eval()
    base = model.config.rope_parameters["rope_theta"]
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            d = 2 * module.inv_freq.numel()
            module.inv_freq = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    with _scan_in_float64(gemma), everything_in_64_bits(), torch.no_grad():
        logits = model(torch.from_numpy(io["input_ids"]), use_cache=False).logits
    return {**io, "logits64": logits.numpy()}


@contextlib.contextmanager
def _scan_in_float64(gemma: Any) -> Iterator[None]:
    """Another default of the dtype in which the RG-LRU scans."""
    import torch

    scan = gemma.RecurrentGemmaRglru._rnn_scan
    saved, scan.__defaults__ = scan.__defaults__, (torch.float64,)
    try:
        yield
    finally:
        scan.__defaults__ = saved


def _mamba2_in_bfloat16(folder: Path) -> Arrays:
    import torch
    from transformers import Mamba2ForCausalLM

    if importlib.util.find_spec("mamba_ssm"):
        raise ImportError(
            "needs an environment without mamba_ssm, whose kernels transformers would take: they need CUDA"
        )
    ids = torch.from_numpy(load_file(folder / "io.safetensors")["input_ids"])
    model: Any = Mamba2ForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        return {"logits": model(ids, use_cache=False).logits.float().numpy()}


RECIPES = {
    **dict.fromkeys(
        (
            "lrnnx_s4_fourier", "lrnnx_s4_rank2_legt", "lrnnx_s4d_init_all", "lrnnx_s4d_init_fourier",
            "lrnnx_s4d_init_fout", "lrnnx_s4d_init_hippo",
        ),
        Recipe("grads64.safetensors", _gradients64),
    ),
    **dict.fromkeys(
        ("s4repo_block_dplr_fourier", "s4repo_block_dplr_legt2"),
        Recipe(
            "grads64.safetensors",
            _dense_gradients64,
            {"origin": "the same layer in float64 by dense matrices and torch autograd; y equals the stored y64"},
        ),
    ),
    "lrnnx_clf_mamba_events": Recipe(
        "io_amended.safetensors",
        _events_without_padding,
        {
            "remark": "the reference's record sums integration_timesteps of the padding into the last window: compared "
            "with the reference on integration_timesteps that are 0 past the lengths"
        },
    ),
    "lrnnx_clf_max_stride": Recipe(
        "io_amended.safetensors",
        _windows_without_padding,
        {
            "remark": "the reference's record has windows of padding alone at -1e9, which drown its FFT: compared with "
            "the reference where they are 0"
        },
    ),
    "hf_recurrent_gemma_tiny": Recipe(
        "io_amended.safetensors",
        _wide_recurrent_gemma,
        {
            "remark": "the reference computes its scan and rotary frequencies in float32 even as float64: rerun with "
            "both in float64"
        },
    ),
    "hf_mamba2_tiny_tied": Recipe(
        "io_bfloat16.safetensors",
        _mamba2_in_bfloat16,
        {
            "made_with": "transformers 5.23.0, torch 2.13.0, CPU: Mamba2ForCausalLM, weights and arithmetic in bfloat16"
        },
    ),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
