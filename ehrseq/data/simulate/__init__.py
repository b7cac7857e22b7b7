"""Simulated patients with known risks, and simulated ICU stays. Attributes are loaded when first used."""

from ehrseq._lazy import lazy_exports

# Name -> module of this package that defines it.
_EXPORTS = {
    "ORDER_DEPENDENT_TASKS": "risk",
    "SIMULATED_TASKS": "cohort",
    "SIMULATOR_VERSION": "cohort",
    "Simulation": "cohort",
    "simulate": "cohort",
    "simulated_name": "cohort",
    "simulated_seed": "cohort",
    "block_events": "tables",
    "ordered_events": "tables",
    "SimulatedStays": "stays",
    "simulate_stays": "stays",
}

__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
