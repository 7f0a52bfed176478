"""What a round leaves on disk: reproducible numbers in one file, the others in another."""

from __future__ import annotations

import json
from dataclasses import replace

from fedllm_sec.records.history import RoundRecord, read_history, record_line, timing_line

RECORD = RoundRecord(
    round=1, cohort=["c0"], malicious=[], attacking=False, losses={}, norms={}, quarantined={}, weights=None,
    kept=None, scores=None, notes={}, update_norm=0.0, skipped=None, lora_gap=None, detection=None, quality=None,
    attack=None, robustness=0.5, stealth={"norm_rank": 1.0, "cosine_rank": None}, seconds={"train": 2.0},
    memory_mb={"defense": 12.5, "process": 300.0},
)  # fmt: skip


def test_seconds_and_memory_go_to_the_timings_and_come_back(tmp_path):
    assert "seconds" not in json.loads(record_line(RECORD))
    assert "memory_mb" not in json.loads(record_line(RECORD))
    assert json.loads(timing_line(RECORD)) == {
        "round": 1, "train": 2.0, "defense_peak_mb": 12.5, "process_peak_mb": 300.0,
    }  # fmt: skip
    (tmp_path / "history.jsonl").write_text(record_line(RECORD))
    (tmp_path / "timings.jsonl").write_text(timing_line(RECORD))
    assert read_history(tmp_path) == [RECORD]


def test_a_folder_of_an_older_version_lacks_the_new_measures_and_is_still_read(tmp_path):
    row = json.loads(record_line(RECORD))
    del row["robustness"], row["stealth"]
    (tmp_path / "history.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "timings.jsonl").write_text('{"round": 1, "train": 2.0}\n')
    assert read_history(tmp_path) == [replace(RECORD, robustness=None, stealth=None, memory_mb={})]
