"""Rows on the driver's bar: running and finished work together, each row once."""

from __future__ import annotations

import pytest

from hashray.engine.reports import Meter
from hashray.progress import Bar


def test_each_row_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("encode", 50, "rows", done=10) as bar:
        meter = Meter(bar, "part")
        for index in range(3):
            meter.hear({"start": index})
            meter.hear({"index": index, "rows": 4})
        assert bar.done == 22
        for index in range(3):
            meter.finish(index, 10)
            meter.hear({"index": index, "rows": 6})  # was under way when the part ended
        assert bar.done == 40
        meter.hear({"start": 3})
        meter.hear({"index": 3, "rows": 9})
        meter.hear({"start": 3})  # its worker was lost: its rows count again from none
        assert "note: encode: part 3 runs again, its worker was lost" in capsys.readouterr().err
        meter.hear({"index": 3, "rows": 2})
        assert bar.done == 42
        assert "encode: part 3 lost its worker 4 times" in str(meter.lost())
