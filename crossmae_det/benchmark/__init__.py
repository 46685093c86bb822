"""What models and loaders cost: parameters, FLOPs, seconds a step, images a second."""

from crossmae_det.benchmark.candidate import Candidate
from crossmae_det.benchmark.detection_flops import DetectionCost, detection_cost
from crossmae_det.benchmark.flops import (
    PretrainingCost,
    baseline_of,
    pretraining_cost,
    pretraining_section,
    step_flops,
)
from crossmae_det.benchmark.loading import UsualCrops, loading_section, time_loading
from crossmae_det.benchmark.report import Report, Section, environment
from crossmae_det.benchmark.steps import PRECISIONS, step_section, time_steps

__all__ = [
    "PRECISIONS",
    "Candidate",
    "DetectionCost",
    "PretrainingCost",
    "Report",
    "Section",
    "UsualCrops",
    "baseline_of",
    "detection_cost",
    "environment",
    "loading_section",
    "pretraining_cost",
    "pretraining_section",
    "step_flops",
    "step_section",
    "time_loading",
    "time_steps",
]
