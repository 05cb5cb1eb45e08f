"""One contestant in its own process: `python worker.py NAME`, JSON commands in, JSON answers out.

{"prepare": case} -> facts; {"run": kind} -> {"seconds": s}; {"rss": true} -> {"bytes": peak since prepare}.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def peak_rss() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(run: Callable[[], Any], warm: bool = True) -> float:
    """Median of the calls, at least 9, of a tenth of a second, or of those that 0.2 s hold; not of the first.

    The first wakes an idle core. If not `warm`, it is one call.
    """
    times: list[float] = []
    while not times or (warm and sum(times) < (0.2 if len(times) < 10 else 0.1)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def main() -> None:
    """Answer commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from contestants import CONTESTANTS
    from layer_contestants import LAYER_CONTESTANTS
    from torch_contestants import TORCH_CONTESTANTS

    families = {**CONTESTANTS, **LAYER_CONTESTANTS, **TORCH_CONTESTANTS}
    prepared, before = None, 0
    for line in sys.stdin:
        command = json.loads(line)
        if "prepare" in command:
            case = command["prepare"]
            try:
                prepared = families[case["family"]][sys.argv[1]](case)
                answer = {"kinds": list(prepared.run), **prepared.facts}
            except Exception as err:
                answer = {"error": f"{type(err).__name__}: {err}"}
            before = peak_rss()
        elif prepared is None:
            answer = {"error": "not prepared"}
        elif "run" in command:
            answer = {"seconds": seconds(prepared.run[command["run"]])}
        else:
            answer = {"bytes": peak_rss(), "before": before}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
