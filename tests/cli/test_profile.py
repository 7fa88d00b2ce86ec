"""`edgekit profile`: measurements, formats, comparisons, and what an interruption leaves."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.runtime import latency

Edgekit = Callable[..., Any]

ENGINES = ("openvino", "onnx")
BRIEF = ("--prompt", "8", "--depth", "0,40", "--gen", "2", "--repeat", "2")


def test_profile_of_both_engines_and_constant_state(edgekit: Edgekit, lawcat_bundle: Path) -> None:
    done = edgekit(
        "profile", lawcat_bundle, "--engine", "openvino,onnx", "--prompt", "8,40",
        "--depth", "0,700", "--gen", "4", "--repeat", "2", "--format", "json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [report["engine"] for report in done.json] == list(ENGINES)
    for report in done.json:
        assert [row["tokens"] for row in report["prefill"]] == [8, 40]
        shallow, deep = report["decode"]
        assert (shallow["depth"], deep["depth"]) == (0, 700)
        assert shallow["state_bytes"] == deep["state_bytes"] > 0
        assert deep["p50_ms"] <= deep["p99_ms"]
        assert report["memory"]["total"] > report["model_bytes"]
    assert done.json[0]["output_md5"] == done.json[1]["output_md5"]


def test_profile_of_softmax_shows_a_growing_state(
    edgekit: Edgekit, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    options = ("--prompt", "8", "--depth", "0,100", "--gen", "4", "--repeat", "1")
    done = edgekit("profile", bundle, *options, "--format", "csv", "-o", out)
    assert done.code == 0, done.err
    assert not done.out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["test"] for row in rows] == ["pp8", "tg4 @ 0", "tg4 @ 100"]
    assert int(rows[2]["state"]) > int(rows[1]["state"])
    too_deep = edgekit("profile", bundle, "--depth", "5000")
    assert too_deep.code == 2
    assert "5064 tokens asked for" in too_deep.err


def test_profile_where_the_system_tells_no_load(
    edgekit: Edgekit, lawcat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no os.getloadavg."""
    monkeypatch.delattr(os, "getloadavg")
    options = ("--prompt", "8", "--depth", "0", "--gen", "2", "--repeat", "1")
    done = edgekit("profile", lawcat_bundle, *options)
    assert done.code == 0, done.err
    assert "load before: -;" in done.out
    assert "busy" not in done.err


def test_a_sweep_of_threads_with_operators_and_loading(
    edgekit: Edgekit, lawcat_bundle: Path, tmp_path: Path
) -> None:
    more = ("--threads", "1,2", "--ops", "--load", "--plot", tmp_path / "depth.png")
    done = edgekit("profile", lawcat_bundle, "--engine", "openvino", *BRIEF, *more)
    assert done.code == 0, done.err
    assert "operators take" in done.out
    assert "FullyConnected" in done.out
    assert "a cache of blobs: cold" in done.out
    assert {line.split()[2] for line in done.out.splitlines() if " tg2 @ 40 " in line} == {"1", "2"}
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_another_bundle_and_a_kept_report_stand_beside(
    edgekit: Edgekit, lawcat_bundle: Path, bundle: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.json"
    assert not edgekit("profile", bundle, *BRIEF, "--format", "json", "-o", kept).code
    more = ("--engine", "onnx", "--compare", bundle, "--compare", kept, "--format", "md")
    done = edgekit("profile", lawcat_bundle, *BRIEF, *more)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("| tg2 @ 40 |")]
    ours, first, second, ratio = (float(x) for x in lines[-1].strip("| ").split(" | ")[1:5])
    assert ratio == pytest.approx(ours / max(first, second), abs=0.02)


def test_formats_of_other_benchmarks(edgekit: Edgekit, lawcat_bundle: Path) -> None:
    tests = edgekit("profile", lawcat_bundle, *BRIEF, "--format", "llama-bench").json
    assert [(t["n_prompt"], t["n_gen"], t["n_depth"]) for t in tests] == [
        (8, 0, 0),
        (0, 2, 0),
        (0, 2, 40),
    ]
    for test in tests:
        assert len(test["samples_ns"]) == len(test["samples_ts"]) == 2
        tokens = test["n_prompt"] + test["n_gen"]
        assert test["samples_ts"][0] == pytest.approx(
            1e9 * tokens / test["samples_ns"][0], rel=1e-3
        )
    (report,) = edgekit("profile", lawcat_bundle, *BRIEF, "--format", "llm-bench").json
    results = report["perfdata"]["results"]
    assert [r["iteration"] for r in results] == [1, 2, 1, 2, 1, 2]
    assert results[0]["first_latency"] == pytest.approx(1e3 * results[0]["generation_time"])
    assert results[-1]["second_avg_latency"] == pytest.approx(
        1e3 / results[-1]["second_token_throughput"]
    )


def test_an_interruption_leaves_what_was_measured(
    edgekit: Edgekit, lawcat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "measure_memory", interrupted)
    out = tmp_path / "report.json"
    done = edgekit("profile", lawcat_bundle, *BRIEF, "--format", "json", "-o", out)
    assert done.code == 130
    (report,) = json.loads(out.read_text())
    assert not report["complete"]
    assert [row["depth"] for row in report["decode"]] == [0, 40]
    shown = edgekit("profile", lawcat_bundle, *BRIEF)
    assert shown.out.rstrip().endswith("INTERRUPTED, not complete")


def test_what_cannot_be_compared_is_said_at_once(
    edgekit: Edgekit, lawcat_bundle: Path, tmp_path: Path
) -> None:
    missing = edgekit("profile", lawcat_bundle, *BRIEF, "--compare", tmp_path / "none.json")
    assert missing.code == 2
    assert "allowed: a bundle, or what --format json -o wrote" in missing.err
    odd = tmp_path / "odd.json"
    odd.write_text("[{}]")
    assert "odd.json" in edgekit("profile", lawcat_bundle, *BRIEF, "--compare", odd).err
    nowhere = edgekit("profile", lawcat_bundle, *BRIEF, "--plot", tmp_path / "no" / "x.png")
    assert "is no directory" in nowhere.err


def test_a_peer_and_the_floor_stand_beside(
    edgekit: Edgekit, lawcat_bundle: Path, bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino_genai")
    kept = tmp_path / "kept.json"
    peer = ("--peer", f"openvino-genai={bundle}")
    done = edgekit("profile", lawcat_bundle, "--engine", "openvino", *BRIEF, *peer, "--floor")
    assert done.code == 0, done.err
    assert "\n\nmemory is read at" in done.out
    mixed = edgekit("profile", lawcat_bundle, *BRIEF, "--floor", "--format", "json")
    assert mixed.code == 2
    assert "--floor given with --format json; allowed: table, md" in mixed.err
    (row,) = [line for line in done.out.splitlines() if line.startswith("tg2 @ 40 ")]
    assert len(row.split()) == 9  # the test's three words, ours, theirs, the ratio, its range
    edgekit("profile", bundle, *BRIEF, *peer, "--format", "json", "-o", kept)
    again = edgekit("profile", lawcat_bundle, *BRIEF, "--compare", kept)
    assert "openvino-genai" in again.out


def test_a_peer_that_is_not_there_is_said_at_once(
    edgekit: Edgekit, lawcat_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = edgekit("profile", lawcat_bundle, *BRIEF, "--peer", "ollama")
    assert unknown.code == 2
    assert "peer 'ollama' given; allowed: llama-cpp" in unknown.err
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        missing = edgekit("profile", lawcat_bundle, *BRIEF, "--peer", "llama-cpp")
    assert "pip install llama-cpp-python" in missing.err
    unread = edgekit("profile", lawcat_bundle, *BRIEF, "--peer", "openvino-genai=nowhere")
    assert "allowed: a directory with openvino_model.xml" in unread.err


def test_a_host_is_refused_beside_what_is_measured_here(
    edgekit: Edgekit, lawcat_bundle: Path
) -> None:
    done = edgekit("profile", lawcat_bundle, "--host", "nobody@nowhere.invalid", "--floor")
    assert done.code == 2
    assert "allowed beside it: reports to --compare" in done.err
    unreachable = edgekit("profile", lawcat_bundle, "--host", "nobody@nowhere.invalid")
    assert unreachable.code == 1
    assert "nowhere.invalid" in unreachable.err
    assert unreachable.err.strip().count("\n") <= 1
