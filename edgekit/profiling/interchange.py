"""Reports in the formats of two other benchmarks, for tools that read those.

`llama_bench` has the fields of llama.cpp's `llama-bench -o json`, one object for each test;
`llm_bench` those of OpenVINO GenAI's llm_bench (`-rj`), one result for each repetition of each
depth. What edgekit does not know is left out rather than guessed.
"""

import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from edgekit.runtime.latency import Decode, Prefill, Report, Spread

__all__ = ["llama_bench", "llm_bench"]


def llama_bench(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One object for each prompt and each depth of each report; times in ns, rates in tokens/s."""
    return [test for report in reports for test in _llama_tests(report)]


def _llama_tests(report: Report) -> Iterator[dict[str, Any]]:
    known = {
        "build_commit": f"edgekit {report.versions['edgekit']}",
        "cpu_info": report.cpu,
        "backends": f"{report.engine} {report.device}",
        "model_filename": report.bundle,
        "model_type": f"{'+'.join(report.mixers)} {report.weights}",
        "model_size": report.model_bytes,
        "n_threads": report.threads,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    for prompt in report.prefill:
        counts = {"n_prompt": prompt.tokens, "n_gen": 0, "n_depth": 0}
        yield known | counts | _llama_times(prompt.tokens, prompt.tokens_per_second)
    for row in report.decode:
        counts = {"n_prompt": 0, "n_gen": row.tokens, "n_depth": row.depth}
        yield known | counts | _llama_times(row.tokens, row.tokens_per_second)


def _llama_times(tokens: int, rate: Spread) -> dict[str, Any]:
    times = [round(1e9 * tokens / sample) for sample in rate.samples]
    return {
        "avg_ns": round(statistics.mean(times)),
        "stddev_ns": round(_deviation(times)),
        "avg_ts": statistics.mean(rate.samples),
        "stddev_ts": _deviation(rate.samples),
        "samples_ns": times,
        "samples_ts": list(rate.samples),
    }


def _deviation(samples: Sequence[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def llm_bench(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One object for each report: `metadata`, and `perfdata` with a result for each repetition.

    A prompt's results have `first_latency` (ms) alone, a depth's `second_avg_latency`.
    """
    return [
        {
            "metadata": {
                "model": report.bundle,
                "framework": report.engine,
                "device": report.device,
                "precision": report.weights,
                "num_beams": 1,
                "batch_size": 1,
            },
            "perfdata": {"results": list(_llm_results(report))},
        }
        for report in reports
    ]


def _llm_results(report: Report) -> Iterator[dict[str, Any]]:
    whole: dict[str, Any] = {"pretrain_time": report.load_ms / 1e3}
    if report.memory is not None:
        whole["max_rss_mem"] = report.memory.total / 2**20
    tests = [*map(_llm_prompt, report.prefill), *map(_llm_decode, report.decode)]
    for index, test in enumerate(tests):
        for number, result in enumerate(test, start=1):
            yield {"iteration": number, "prompt_idx": index, **result, **whole}


def _llm_prompt(prompt: Prefill) -> Iterator[dict[str, Any]]:
    for ms in prompt.ttft_ms.samples:
        sizes = {"input_size": prompt.tokens, "output_size": 1, "infer_count": 1}
        yield {**sizes, "generation_time": ms / 1e3, "first_latency": ms}


def _llm_decode(row: Decode) -> Iterator[dict[str, Any]]:
    sizes = {"input_size": row.depth, "output_size": row.tokens, "infer_count": row.tokens}
    for rate in row.tokens_per_second.samples:
        times = {"latency": 1e3 / rate, "second_avg_latency": 1e3 / rate}
        yield {
            **sizes,
            **times,
            "generation_time": row.tokens / rate,
            "second_token_throughput": rate,
        }
