"""What models and loaders cost: parameters, FLOPs, seconds a step, images a second."""

from crossmae_det.benchmark.candidate import Candidate
from crossmae_det.benchmark.comparison import (
    case_values,
    compare,
    comparison_section,
    earlier_section,
    find_earlier,
    flops_section,
)
from crossmae_det.benchmark.detection_flops import DetectionCost, detection_cost, trunk_of
from crossmae_det.benchmark.flops import (
    PretrainingCost,
    baseline_of,
    pretraining_cost,
    pretraining_section,
    step_flops,
)
from crossmae_det.benchmark.growth import OneBlock, grow, growth_section
from crossmae_det.benchmark.loading import UsualCrops, loading_section, time_loading
from crossmae_det.benchmark.report import Report, Section, environment, read_json
from crossmae_det.benchmark.steps import step_section, time_steps
from crossmae_det.benchmark.timing import check_repeats
from crossmae_det.benchmark.work import PARTS, PRECISIONS, Work, check_sizes

__all__ = [
    "PARTS",
    "PRECISIONS",
    "Candidate",
    "DetectionCost",
    "OneBlock",
    "PretrainingCost",
    "Report",
    "Section",
    "UsualCrops",
    "Work",
    "baseline_of",
    "case_values",
    "check_repeats",
    "check_sizes",
    "compare",
    "comparison_section",
    "detection_cost",
    "earlier_section",
    "environment",
    "find_earlier",
    "flops_section",
    "grow",
    "growth_section",
    "loading_section",
    "pretraining_cost",
    "pretraining_section",
    "read_json",
    "step_flops",
    "step_section",
    "time_loading",
    "time_steps",
    "trunk_of",
]
