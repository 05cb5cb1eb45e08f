"""How fast are the classes of compat_torch.nn next to lrnnx, in a PyTorch program on this CPU? `make bench-torch`

Each class in its own process, the rounds interleaved, lrnnx at its better thread count: forward under no_grad, forward
and backward with every gradient, one decoding step; and what one call costs that computes next to nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from layer_contestants import DECODE_STEPS, is_varying
from scan import HERE, best_threads, measure
from torch_contestants import BRIDGE, TORCH_CONTESTANTS, TWINS

SHAPES = {"lti": [(8, 1024, 64, 64), (2, 2048, 128, 64)], "ltv": [(2, 512, 64, 16)]}
KINDS = {"forward": ("forward", 1), "both": ("fwd+bwd", 1), "decode": ("step", DECODE_STEPS)}
WANTED = {"lti": 2.0, "Mamba": 10.0}
WANTED_BRIDGE_US = 150.0


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="*", default=list(TWINS.values()), choices=list(TWINS.values()))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    (bridge,) = measure(BRIDGE, (), 0, "", ["ours"], ())
    print(f"load average {os.getloadavg()[0]:.1f}")
    print(
        f"one call of a trivial layer: forward {bridge['forward_us']:.0f} us (wanted: under {WANTED_BRIDGE_US:.0f}), "
        f"forward and backward {bridge['both_us']:.0f} us; JAX alone {bridge['jax_us']:.0f} us, "
        f"torch alone, forward and backward, {bridge['torch_both_us']:.0f} us"
    )
    print(
        f"{'class':10}{'(B, L, H, N)':>20}"
        + "".join(f"{name + ' ms':>12}{'lrnnx':>10}{'ratio':>7}" for name, _ in KINDS.values())
    )
    results = [bridge]
    for family, name in TWINS.items():
        kind = "ltv" if is_varying(name) else "lti"
        for shape in SHAPES[kind] if name in args.classes else ():
            rows = measure(family, shape, args.rounds, "", list(TORCH_CONTESTANTS[family]), tuple(KINDS))
            ours, theirs = rows = best_threads(rows, tuple(KINDS))
            cells = [f"{name:10}{shape!s:>20}"]
            for key, (_, calls) in KINDS.items():
                mine, other = ours.get(f"{key}_s"), theirs.get(f"{key}_s")
                cells.append(
                    f"{mine / calls * 1e3:12.3f}{other / calls * 1e3:10.3f}{other / mine:7.1f}"
                    if mine and other
                    else f"{'-':>29}"
                )
            wanted = WANTED.get(name, WANTED.get(kind))
            if wanted and "both_s" in ours and "both_s" in theirs and theirs["both_s"] < wanted * ours["both_s"]:
                cells.append(f"  fwd+bwd below {wanted:.0f}x")
            print("".join(cells), *(row["error"] for row in rows if "error" in row), flush=True)
            results += rows
    print(f"load average {os.getloadavg()[0]:.1f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "torch_backend.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
