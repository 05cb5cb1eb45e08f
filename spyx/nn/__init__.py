"""Spiking neurons, one step at a time, and `run`, which scans them over time-major sequences (T, B, ...)."""

from .containers import Sequential, StatefulLayer, run
from .layers import ActivityRegularization, Flatten, PopulationCode, SumPool, sum_pool
from .leaky import LI, PSU_LIF, AssociativeLIF
from .spiking import ALIF, IF, LIF, RIF, RLIF, CuBaLIF, RCuBaLIF

__all__ = [
    "ALIF",
    "IF",
    "LI",
    "LIF",
    "PSU_LIF",
    "RIF",
    "RLIF",
    "ActivityRegularization",
    "AssociativeLIF",
    "CuBaLIF",
    "Flatten",
    "PopulationCode",
    "RCuBaLIF",
    "Sequential",
    "StatefulLayer",
    "SumPool",
    "run",
    "sum_pool",
]
