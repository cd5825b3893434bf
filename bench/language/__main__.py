"""Run a study: `python -m bench.language llama` or `t5`."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from bench import language
from bench.language.llama import Llama
from bench.language.study import Study, choose, run, table, write
from bench.language.t5 import T5


def main() -> None:
    parser = argparse.ArgumentParser(description=language.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("llama", "t5"))
    parser.add_argument("--choose", action="store_true", help="compare settings on the validation part instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    study: Study = Llama() if args.study == "llama" else T5()
    results = choose(study, console) if args.choose else run(study, console)
    for metric in study.metrics:
        console.print(table(results, metric, study))
    kind = "settings" if args.choose else "accuracy"
    print(f"Wrote {write(results, f'{kind}-{study.name}')}")


if __name__ == "__main__":
    main()
