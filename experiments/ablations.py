"""What each choice in AGRL is worth: one choice changed at a time, with the settings that the search chose."""

from __future__ import annotations

from experiments import study

RUNS = {
    "agrl": {},
    "gate_none": {"reward.composition": "sum"},
    "gate_tier": {"reward.composition": "gated_tier"},
    "credit_sequence": {"objective.credit": "sequence"},
    "forced_shaped": {"guidance.treatment": "shaped"},
    "forced_importance": {"guidance.treatment": "importance"},
    "forced_mask": {"guidance.treatment": "mask"},
    "baseline_unguided": {"guidance.baseline": "unguided_only"},
    "level_fixed": {"guidance.level": "fixed"},
    "level_global": {"guidance.per_family": False},
    "level_capped": {"guidance.cap": "linear"},
    "capacity_0.25": {"guidance.capacity": 0.25},
    "capacity_1": {"guidance.capacity": 1.0},
    "tier_first": {"rulebook.order": "respond_then_think"},
}

SWEEP = study.Sweep(
    "ablations", runs={run: {"method": "agrl", **fields} for run, fields in RUNS.items()}, seeds=(0, 1, 2)
)
get_config = SWEEP.get_config
