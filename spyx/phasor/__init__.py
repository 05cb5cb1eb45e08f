"""Phasor networks: activations are phases, trained as complex numbers, run as spike times.

Every parameter is real, complex matrices being stored as real and imaginary part, so any optax optimiser trains them.

Source: Frady and Sommer 2019 (arXiv:1901.07718), Olin-Ammentorp and Bazhenov 2021 (arXiv:2106.11908), Bybee, Frady and
Sommer 2022 (arXiv:2204.00507).
"""

from __future__ import annotations

from ._codes import phase_of, phase_to_spikes, phasor_to_real, real_to_phasor, spikes_to_phase
from ._layers import PhasorActivation, PhasorLinear, PhasorMLP, PhasorReadout, SpikingPhasor
from ._resonate import ResonateFire

__all__ = [
    "PhasorActivation",
    "PhasorLinear",
    "PhasorMLP",
    "PhasorReadout",
    "ResonateFire",
    "SpikingPhasor",
    "phase_of",
    "phase_to_spikes",
    "phasor_to_real",
    "real_to_phasor",
    "spikes_to_phase",
]
