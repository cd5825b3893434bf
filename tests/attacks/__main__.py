"""`python -m tests.attacks list | write NAME FOLDER | run [PATTERN]`, from the repository's root."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "kernels")]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical", HF_HUB_DISABLE_PROGRESS_BARS="1")

from attacks.core import Attack, all_attacks  # noqa: E402
from attacks.good import Goods  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the attacks' names, the kind of job that each damages")
    write = commands.add_parser("write", help="write an attack's job, to look at it and try it by hand")
    write.add_argument("name")
    write.add_argument("folder", type=Path)
    run = commands.add_parser("run", help="carry attacks out")
    run.add_argument("pattern", nargs="?", default="*", help="of names, such as 'headers/*' or '*nan*'")
    run.add_argument("--failures", action="store_true", help="print only those that are not beaten off")
    arguments = parser.parse_args()
    known = all_attacks()
    if arguments.command == "list":
        for each in known.values():
            print(f"{each.kind:8} {each.name}")
        return 0
    if arguments.command == "write":
        if arguments.name not in known:
            parser.error(f"there is no attack {arguments.name!r}; see `list`")
        return _write(known[arguments.name], arguments.folder)
    chosen = [each for each in known.values() if fnmatch.fnmatch(each.name, arguments.pattern)]
    return _run(chosen, arguments.failures)


def _write(attack: Attack, folder: Path) -> int:
    with tempfile.TemporaryDirectory() as goods:
        job = Goods(Path(goods)).copy(attack.kind, folder)
    attack.damage(job)
    print(f"featcal-fast plan {job.path('recipe.yaml')}")
    if attack.during is not None:
        print("(the damage is done while it runs: nothing is wrong with it yet)")
    return 0


def _run(attacks: list[Attack], failures: bool) -> int:
    import torch

    from attacks.judge import judge, reads_everything, warm_up

    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        goods = Goods(Path(folder))
        warm_up(goods, Path(folder) / "warm")
        for number, attack in enumerate(attacks):
            if attack.as_user and reads_everything():
                continue
            verdict = judge(attack, goods.copy(attack.kind, Path(folder) / f"{number}"))
            failed += bool(verdict.faults)
            if verdict.faults or not failures:
                said = " ".join(verdict.error.split()).replace(folder, "")
                print(f"{'FAILED' if verdict.faults else 'ok':6} {verdict.name} {verdict.seconds:.2f} s ", end="")
                print(f"{verdict.megabytes:.0f} MB: {said:.200}", flush=True)
            for fault in verdict.faults:
                print(f"       {fault}".replace(folder, ""), flush=True)
    print(f"{len(attacks) - failed} of {len(attacks)} were beaten off")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
