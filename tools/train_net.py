#!/usr/bin/env python3
"""Train or evaluate a yaml config, with detectron2's keys and those of this project."""

from lazyconfig_train_net import main, run_tool

if __name__ == "__main__":
    run_tool(lambda: main(__doc__))
