"""Texts that calibrate a program go through it as they are served."""

from __future__ import annotations

import numpy as np

from mlserver_hftasks.backends import lanes
from mlserver_hftasks.backends.program import Layout, Plan, Reads
from mlserver_hftasks.engine.rows import Row
from mlserver_hftasks.export.onnx import BATCH, calibration_feeds


def rows(*lengths: int) -> list[Row]:
    return [Row({"input_ids": np.arange(length)}) for length in lengths]


def test_a_program_of_one_row_is_calibrated_row_by_row() -> None:
    feeds = list(calibration_feeds(Plan(Layout.SINGLE, 0), rows(3, 7, 5)))
    assert [feed["input_ids"].shape for feed in feeds] == [(1, 3), (1, 7), (1, 5)]


def test_lanes_are_no_larger_than_those_that_are_served() -> None:
    feeds = list(calibration_feeds(Plan(Layout.LANES, 0, Reads.FIRST), rows(*[500] * 20, *[2] * 40)))
    areas = [len(feed["packed_ids"]) * feed["places"].shape[1] for feed in feeds]
    assert max(areas) <= lanes.MAX_AREA
    assert sum(len(feed["packed_ids"]) for feed in feeds) == 20 * 500 + 40 * 2
    assert max(len(feed["head_ids"]) for feed in feeds) <= BATCH
