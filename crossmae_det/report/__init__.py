"""``report.html``: the page about a run, and the page that compares several runs."""

from crossmae_det.report.run_report import RunReport

__all__ = ["RunReport"]
