"""Run a study: `python -m bench.language llama` or `t5`."""

from __future__ import annotations

import torch

from bench import language
from bench.harness.results import RESULTS, write_whole
from bench.harness.runs import command_line
from bench.language.llama import Llama
from bench.language.study import Study, run, show
from bench.language.t5 import T5

STUDIES: dict[str, type[Study]] = {study.name: study for study in (Llama, T5)}


def main() -> None:
    parser = command_line(language.__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--choose", action="store_true", help="compare settings on the validation part instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = STUDIES[args.study]()
    results = run(study, args.choose)
    print(show(results, study))
    path = RESULTS / f"{'settings' if args.choose else 'accuracy'}-{study.name}.json"
    write_whole(path, results)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
