"""What models and loaders cost: parameters, FLOPs, time, memory."""

from crossmae_det.benchmark.comparison import BackboneCase, compare, comparison_sections, grow
from crossmae_det.benchmark.costs import (
    DetectionCost,
    ModelSpec,
    PretrainingCost,
    detection_cost,
    pretraining_cost,
    pretraining_section,
    step_flops,
)
from crossmae_det.benchmark.measuring import PRECISIONS, Case, Measurement, Spread
from crossmae_det.benchmark.report import Report, Section, environment, read_json
from crossmae_det.benchmark.steps import time_steps

__all__ = [
    "PRECISIONS",
    "BackboneCase",
    "Case",
    "DetectionCost",
    "Measurement",
    "ModelSpec",
    "PretrainingCost",
    "Report",
    "Section",
    "Spread",
    "compare",
    "comparison_sections",
    "detection_cost",
    "environment",
    "grow",
    "pretraining_cost",
    "pretraining_section",
    "read_json",
    "step_flops",
    "time_steps",
]
