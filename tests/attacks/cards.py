"""The card that a model comes with: whatever it says, it stops no run (`tests/test_card.py`); but it must be a file."""

from __future__ import annotations

from collections.abc import Iterator

from attacks.core import Variant, attack, attacks
from attacks.good import Job

CARD = "merged/README.md"


def elsewhere(job: Job) -> None:
    job.write(CARD, "# A model\n")
    job.outside(CARD)


@attacks()
def no_files() -> Iterator[Variant]:
    yield "elsewhere", (CARD, "link"), elsewhere
    yield "a-secret", (CARD, "link"), lambda job: job.link(CARD, "/etc/passwd")
    yield "zeros", (CARD, "link"), lambda job: job.link(CARD, "/dev/zero")
    yield "a-pipe", (CARD, "neither"), lambda job: job.pipe(CARD)
    yield "a-circle", (CARD, "cannot be read"), lambda job: job.link(CARD, "README.md")
    yield "nothing", (CARD, "cannot be read"), lambda job: job.link(CARD, "gone.md")
    yield "a-folder", (CARD, "folder"), lambda job: job.write(f"{CARD}/README.md", "# A model\n")
    yield "the-folder", (CARD, "folder"), lambda job: job.link(CARD, ".")


@attack(CARD, "rights", as_user=True)
def may_not_be_read(job: Job) -> None:
    job.write(CARD, "# A model\n")
    job.path(CARD).chmod(0)
