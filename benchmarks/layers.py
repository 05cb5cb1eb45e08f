"""How fast are the lrnnx classes of compat_torch next to lrnnx itself, on this CPU? `make bench-layers`

Each class in its own process, the rounds interleaved, lrnnx at its better thread count: forward, forward and backward,
and 128 decoding steps; for some classes also their matrix products alone, by XLA; and the temporary memory of S4D and
S4 against the number of states.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from layer_contestants import LAYER_CONTESTANTS, is_varying
from scan import HERE, best_threads, measure

SHAPES = {"lti": [(8, 1024, 64, 64), (2, 2048, 128, 64)], "ltv": [(2, 512, 64, 16), (8, 256, 32, 16)]}
STATES = (16, 64, 256)
KINDS = ("forward", "both", "decode")


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", nargs="*", default=list(LAYER_CONTESTANTS), choices=list(LAYER_CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    results, memory = [], []
    print(
        f"{'class':7}{'(B, L, H, N)':>22}"
        + "".join(f"{kind + ' ms':>12}{'lrnnx':>10}{'ratio':>7}" for kind in KINDS)
        + f"{'products ms':>13}"
    )
    for name in args.classes:
        for shape in SHAPES["ltv" if is_varying(name) else "lti"]:
            rows = best_threads(measure(name, shape, args.rounds, "", list(LAYER_CONTESTANTS[name]), KINDS), KINDS)
            ours, theirs, *floor = rows
            cells = [f"{name:7}{shape!s:>22}"]
            for kind in KINDS:
                mine, other = ours.get(f"{kind}_s"), theirs.get(f"{kind}_s")
                cells.append(
                    f"{mine * 1e3:12.2f}{other * 1e3:10.2f}{other / mine:7.1f}" if mine and other else f"{'-':>29}"
                )
            cells += [f"{row['forward_s'] * 1e3:13.2f}" for row in floor if "forward_s" in row]
            print("".join(cells), *(row["error"] for row in rows if "error" in row), flush=True)
            results += rows
    for name in [name for name in args.classes if name in ("S4D", "S4")]:
        for N in STATES:
            (row,) = measure(name, (2, 1024, 64, N), 1, "", ["ours"], KINDS)
            memory.append(row)
            temp = " ".join(f"{row[f'{kind}_temp_bytes'] / 1e6:8.2f}" for kind in ("forward", "both"))
            print(f"{name} (2, 1024, 64, {N}): temporary MB, forward and forward + backward: {temp}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "layers.json").write_text(json.dumps({"layers": results, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
