#!/usr/bin/python3
"""Stands where a phone has LiteRT-LM's published `litert_lm_advanced_main`: it has its flags and output, and runs the
real runtime, that of the wheel. An unknown flag or value is an error, as it is there."""

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
    options = flags.parse_args()
    if vars(options)["async"] or not (
        options.use_session and options.benchmark and options.report_peak_memory_footprint
    ):
        flags.error("only the options of our command are there")
    with open(options.input_prompt_file, encoding="utf-8") as file:
        prompt = file.read()
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.INFO)
    with (
        litert_lm.Engine(
            options.model_path,
            backend=litert_lm.Backend.CPU(thread_count=options.num_cpu_threads),
            max_num_tokens=options.max_num_tokens,
            enable_speculative_decoding=options.enable_speculative_decoding,
            enable_benchmark=True,
        ) as engine,
        # Which samples as the file says: greedily.
        engine.create_session(max_output_tokens=options.max_output_tokens) as session,
    ):
        session.run_prefill([prompt])
        text = session.run_decode().texts[0]
        figures = session.get_benchmark_info()
    print(f"output: {text}")
    print(
        "BenchmarkInfo:\n  Init Phases (1):\n"
        f"    - Init Total: {1000 * figures.init_time_in_second:.2f} ms\n"
        f"  Time to first token: {figures.time_to_first_token_in_second:.2f} s\n"
        f"    Decode Turn 1: Processed {figures.last_decode_token_count} tokens in 1s duration.\n"
        f"      Decode Speed: {figures.last_decode_tokens_per_second:.2f} tokens/sec.",
        file=sys.stderr,
    )
    with open("/proc/self/status", encoding="utf-8") as status:
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read())
    assert peak
    print(f"Peak system ram usage: {int(peak[1]) * 1024 / 1e6}MB.", file=sys.stderr)


main()
