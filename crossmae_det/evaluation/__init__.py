"""COCO evaluation and its results as tables and JSON."""

from crossmae_det.evaluation.coco import COCOEvaluator
from crossmae_det.evaluation.results import format_table, write_results

__all__ = ["COCOEvaluator", "format_table", "write_results"]
