#!/usr/bin/python3
"""Stands where a phone has LiteRT-LM's published `litert_lm_advanced_main`: its flags, what it prints, and the real
runtime, that of the wheel. An unknown flag or value is an error, as it is there."""

import argparse
import re
import sys

import litert_lm


def main() -> None:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    boolean = {"true": True, "false": False}.__getitem__
    flags.add_argument("--backend", choices=["cpu"])
    for name in ("model_path", "input_prompt_file"):
        flags.add_argument(f"--{name}", required=True)
    for name in ("max_num_tokens", "max_output_tokens", "num_cpu_threads"):
        flags.add_argument(f"--{name}", type=int, required=True)
    for name in ("async", "use_session", "benchmark", "report_peak_memory_footprint", "enable_speculative_decoding"):
        flags.add_argument(f"--{name}", type=boolean, required=True)
    asked = flags.parse_args()
    if vars(asked)["async"] or not (asked.use_session and asked.benchmark and asked.report_peak_memory_footprint):
        flags.error("only what is asked of it here is there")
    with open(asked.input_prompt_file, encoding="utf-8") as file:
        prompt = file.read()
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    with (
        litert_lm.Engine(
            asked.model_path,
            backend=litert_lm.Backend.CPU(thread_count=asked.num_cpu_threads),
            max_num_tokens=asked.max_num_tokens,
            enable_speculative_decoding=asked.enable_speculative_decoding,
            enable_benchmark=True,
        ) as engine,
        # Which samples as the file says: greedily.
        engine.create_session(max_output_tokens=asked.max_output_tokens) as session,
    ):
        session.run_prefill([prompt])
        text = session.run_decode().texts[0]
        told = session.get_benchmark_info()
    print(f"output: {text}")
    print(
        "BenchmarkInfo:\n  Init Phases (1):\n"
        f"    - Init Total: {1000 * told.init_time_in_second:.2f} ms\n"
        f"  Time to first token: {told.time_to_first_token_in_second:.2f} s\n"
        f"    Decode Turn 1: Processed {told.last_decode_token_count} tokens in 1s duration.\n"
        f"      Decode Speed: {told.last_decode_tokens_per_second:.2f} tokens/sec.",
        file=sys.stderr,
    )
    with open("/proc/self/status", encoding="utf-8") as status:
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read())
    assert peak
    print(f"Peak system ram usage: {int(peak[1]) * 1024 / 1e6}MB.", file=sys.stderr)


main()
