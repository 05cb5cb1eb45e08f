"""Cases made on the spot by an installed lrnnx, with fresh random weights and inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .case import Case, amended
from .live_models import model_cases
from .live_run import INSTALL, ReferenceMissingError, import_class, record, versions
from .torch_run import in_float64, output_of

__all__ = [
    "INSTALL",
    "Configuration",
    "ReferenceMissingError",
    "configurations",
    "import_class",
    "in_float64",
    "live_cases",
    "output_of",
    "versions",
]

_DISCRETIZATIONS = ("zoh", "bilinear", "dirac")
_S4 = {
    "default": {},
    "nontransposed": {"transposed": False},
    "gate3_ch2_bottleneck1": {"gate": 3, "channels": 2, "bottleneck": 1},
    "fast_untied_tiled": {"dt_fast": True, "dt_tie": False, "n_ssm": 2, "transposed": False},
    "relu_softplus": {"real_transform": "relu", "imag_transform": "softplus", "dt_transform": "sigmoid"},
    "mix_final_none": {"init": ["legs", "diag-inv"], "final_act": None, "swap_channels": True, "channels": 3},
    "rand_short": {"init": "diag-rand", "B_init": "random", "l_max": 5, "transposed": False},
}
_S4D = {
    "bilinear": {"disc": "bilinear", "init": "diag-quad", "imag_scale": 0.5},
    "real_bilinear": {"disc": "bilinear", "is_real": True, "init": "diag-real"},
    "deterministic": {"deterministic": True, "init": "fourier"},
}
_S4_DPLR = {
    "l_max": {"l_max": 17},
    "rank2": {"rank": 2, "init": "legt", "l_max": 31},
    "rank3": {"rank": 3, "init": "dplr-inv", "l_max": 64, "transposed": False},
}
_SHAPES = ((1, 1, 1, 1), (2, 17, 4, 8), (3, 31, 5, 3), (2, 23, 2, 16), (1, 200, 7, 6))


@dataclass(frozen=True)
class Configuration:
    """What to build and feed.

    Attributes:
        cls: the reference class, "package.module:Class".
        kwargs: its constructor arguments.
        shape: (B, L, H) of the input.
        event: with random integration_timesteps.
        label: part of the name.
    """

    cls: str
    kwargs: dict[str, Any]
    shape: tuple[int, int, int]
    event: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """For the report."""
        sizes = "x".join(map(str, (*self.shape, self.kwargs.get("d_state", 1))))
        words = (
            self.cls.split(":")[1].lower(),
            self.label,
            self.kwargs.get("discretization"),
            "event" * self.event,
            sizes,
        )
        return "_".join(filter(None, words))


def configurations() -> list[Configuration]:
    """Every live case of one layer."""
    found: list[Configuration] = []
    for B, L, H, N in _SHAPES:
        sizes, shape = {"d_model": H, "d_state": N}, (B, L, H)
        found.append(Configuration("lrnnx.models.lti.lru:LRU", sizes, shape))
        for discretization in _DISCRETIZATIONS:
            kwargs = {**sizes, "discretization": discretization}
            found.append(Configuration("lrnnx.models.lti.s5:S5", kwargs, shape))
    sizes = {"d_model": 3, "d_state": 4, "discretization": "no_discretization"}
    found.append(Configuration("lrnnx.models.lti.s5:S5", sizes, (2, 7, 3)))
    for index, discretization in enumerate((*_DISCRETIZATIONS, "mamba")):
        for event in (False, True):
            B, L, H, N = _SHAPES[(index + event) % len(_SHAPES)]
            options = {"d_conv": 3, "expand": 1, "dt_rank": 2, "bias": True, "conv_bias": False} if event else {}
            kwargs = {"d_model": H, "d_state": N, "discretization": discretization, **options}
            found.append(Configuration("lrnnx.models.ltv.mamba:Mamba", kwargs, (B, L, H), event))
    found += _event_s5() + _gated() + _centaurus()
    for name, special in (("s4d:S4D", _S4D), ("s4:S4", _S4_DPLR)):
        for index, (label, options) in enumerate({**_S4, **special}.items()):
            kwargs = {"d_model": 4, "d_state": 8, "verbose": False, **options}
            if name == "s4:S4" and "gate" in kwargs:  # with more channels the reference raises
                kwargs["channels"] = 1
            shape = (1 + index % 3, (17, 1, 31, 8)[index % 4], 4)
            found.append(Configuration(f"lrnnx.models.lti.{name}", kwargs, shape, label=label))
    return found


def _event_s5() -> list[Configuration]:
    found = []
    for index, discretization in enumerate(_DISCRETIZATIONS):
        for event in (False, True):
            B, L, H, N = _SHAPES[(index + 3 * event) % len(_SHAPES)]
            options = {"conj_sym": True, "step_rescale": 1.5} if (index + event) % 2 else {}
            kwargs = {"d_model": H, "d_state": N, "discretization": discretization, **options}
            found.append(Configuration("lrnnx.models.ltv.s5:S5", kwargs, (B, L, H), event, "ltv"))
    return found


def _gated() -> list[Configuration]:
    options = {"d_conv": 3, "expand": 2, "c": 4.0, "a_init_range": (0.4, 0.95), "conv_bias": False, "bias": True}
    found = []
    for index, (B, L, H, N) in enumerate(_SHAPES):
        kwargs = {"d_model": H, **(options if index % 2 else {})}
        found.append(Configuration("lrnnx.models.ltv.rglru:RGLRU", kwargs, (B, L, H)))
        kwargs = {"d_model": H, "d_state": N, "J": 1 + index % 2 if N % 2 == 0 else 1, "use_fast_path": False}
        found.append(Configuration("lrnnx.models.ltv.s7:S7", kwargs, (B, L, H)))
    return found


def _centaurus() -> list[Configuration]:
    """At these sizes the reference does not choose its kernel strategy, in which it raises."""
    found = []
    for B, L, H, N in ((1, 1, 1, 1), (2, 17, 4, 8), (2, 31, 5, 3), (1, 200, 7, 6)):
        modes = (("Neck", N), ("PWNeck", N), ("DWS", H), ("Full", H * H))
        for mode, d_state in modes:
            kwargs = {"d_model": H, "d_state": d_state, "sub_state_dim": 1 + (H - 1) % 4}
            found.append(Configuration(f"lrnnx.models.lti.centaurus:Centaurus{mode}", kwargs, (B, L, H)))
    return found


def live_cases(seed: int) -> Iterator[Case]:
    """Run the installed reference on every configuration, and on every whole model.

    Args:
        seed: of weights and inputs.

    Raises:
        ReferenceMissingError: lrnnx cannot be imported.
    """
    for index, configuration in enumerate(configurations()):
        yield _make_case(import_class(configuration.cls), configuration, seed + index)
    yield from model_cases(seed)


def _make_case(reference: Any, configuration: Configuration, seed: int) -> Case:
    import torch

    kwargs, shape = configuration.kwargs, configuration.shape
    torch.manual_seed(seed)
    np.random.seed(seed)
    model = reference(**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    transposed = getattr(model, "transposed", False)
    x = torch.randn(shape).transpose(1, 2) if transposed else torch.randn(shape)
    extra = {"integration_timesteps": 0.1 + 2 * torch.rand(shape[:2])} if configuration.event else {}

    def steps(model: Any) -> np.ndarray:
        found = _steps(model, x.transpose(1, 2) if transposed else x, extra)
        return np.moveaxis(found, 1, 2) if transposed else found

    case = Case(configuration.name, configuration.cls, kwargs, {}, ())
    has_steps = not kwargs.get("is_real")
    return amended(record(case, model, x, extra, steps if has_steps else None, time_axis=2 if transposed else 1))


def _steps(model: Any, x: Any, extra: dict[str, Any]) -> np.ndarray:
    """The reference's outputs step by step: LTI layers take (B, H), the others (B, 1, H)."""
    import torch

    varying = ".ltv." in type(model).__module__
    cache = model.allocate_inference_cache(x.shape[0], *([1] if varying else []))
    steps = []
    for t in range(x.shape[1]):
        now = slice(t, t + 1) if varying else t
        y_t, cache = model.step(x[:, now], cache, **{name: value[:, now] for name, value in extra.items()})
        steps.append(y_t.reshape(x.shape[0], -1).clone())
    return torch.stack(steps, 1).numpy()
