"""``train.report`` of the configs: the page about a run, written while it trains."""

import os
from pathlib import Path

from detectron2.config import LazyConfig

from crossmae_det.engine.launch import PAGE, RECIPE
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import atomic_path


class RunReport:
    """Writes ``report.html`` into the folder of a run: see :class:`engine.run_record.Report`.

    The page is written after each evaluation, without images, and complete when the run has ended.

    Args:
        output_dir: the run's folder.
    """

    def __init__(self, output_dir: str):
        self.output_dir = output_dir

    def begin(self, config_file: str) -> None:
        """Keep the config that the run was started with, as ``recipe.yaml`` in its folder.

        A run that is resumed with its own ``config.yaml`` keeps the one it has.
        """
        if not config_file:
            return
        folder, given = Path(self.output_dir), Path(config_file)
        recipe = folder / RECIPE
        if given.is_file() and recipe.is_file() and given.resolve().parent == folder.resolve():
            return
        cfg = get_config(config_file)
        with atomic_path(recipe) as temporary:
            LazyConfig.save(cfg, str(temporary))

    def write(self, *, final: bool) -> None:
        """Write the page."""
        # matplotlib and Jinja take a second to import.
        from crossmae_det.report.page import write_run_page

        write_run_page(self.output_dir, os.path.join(self.output_dir, PAGE), with_images=final)
