"""What models and loaders cost: parameters, FLOPs, time, memory."""

from crossmae_det.benchmark.comparison import (
    OneBlock,
    case_values,
    compare,
    comparison_section,
    earlier_section,
    find_earlier,
    flops_section,
    grow,
    growth_section,
)
from crossmae_det.benchmark.costs import (
    Candidate,
    DetectionCost,
    PretrainingCost,
    backbone_of,
    baseline_of,
    detection_cost,
    pretraining_cost,
    pretraining_section,
    step_flops,
)
from crossmae_det.benchmark.loading import UsualCrops, loading_section, time_loading
from crossmae_det.benchmark.measuring import PARTS, PRECISIONS, Work, check_repeats, check_sizes
from crossmae_det.benchmark.report import Report, Section, environment, read_json
from crossmae_det.benchmark.steps import step_section, time_steps

__all__ = [
    "Candidate",
    "DetectionCost",
    "OneBlock",
    "PARTS",
    "PRECISIONS",
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
    "backbone_of",
]
