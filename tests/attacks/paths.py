"""Where the recipe's paths lead: nowhere, in circles, to what is no file, out of what may be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attacks.core import Needle, Variant, attack, attacks
from attacks.good import Job

FILE = "recipe.yaml"
# By the recipe's key: how to set it, and what errors may call it.
KEYS: dict[str, tuple[Callable[[Job, str], None], Needle]] = {
    "base": (lambda job, path: job.recipe(base_model=path), ("base_model", "base model")),
    "merged": (lambda job, path: job.recipe(merged_model=path), ("merged_model", "merged model")),
    "expert": (lambda job, path: job.expert(model=path), ("experts.math.model", "expert math")),
    "data": (lambda job, path: job.expert(data=path), ("experts.math.data", "data", "math", "input folder")),
    "out": (lambda job, path: job.recipe(out=path), "out"),
}
NOWHERE: dict[str, tuple[str, str | tuple[str, ...]]] = {
    "no-such-home": ("~nosuchuser/x", "nosuchuser"),
    "zero": ("a\0b", (r"\x00", r"\u0000", "null", "\\0", "zero", "character")),
    "surrogate": ("a\udcffb", ("udcff", "utf-8", "character", "surrogate")),
    "long-name": ("n" * 300, ("nnn", "long")),
    "long-path": ("/".join(["p" * 200] * 40), ("ppp", "long")),
    "link-to-itself": ("circle", "circle"),
    "link-circle": ("./circle-a/x", "circle-a"),
}
ELSEWHERE = {
    "missing": "nothing-here",
    "missing-below": "./nothing/at/all",
    "missing-absolute": "/nothing/at/all",
    "a-file": "recipe.yaml",
    "the-recipes-folder": ".",
    "below-a-file": "./recipe.yaml/x",
    "pipe": "pipe",
    "device": "/dev/zero",
    "null-device": "/dev/null",
    "processes": "/proc/self/mem",
    "devices": "/dev",
    "empty-folder": "empty",
    "a-url": "https://example.com/model",
    "escape": "\x1b[31mred\x1b[0m",
    "newlines": "a\nb\nc",
    "line-back": "a\rb",
    "spaces": "   ",
    "option": "--help",
}


def _places(job: Job) -> None:
    job.link("circle", "circle")
    job.link("circle-a", "circle-b")
    job.link("circle-b", "circle-a")
    job.pipe("pipe")
    job.path("empty").mkdir()


@attacks()
def nowhere() -> Iterator[Variant]:
    for key, (put, needle) in KEYS.items():
        for name, (path, part) in NOWHERE.items():

            def damage(job: Job, put: Callable[[Job, str], None] = put, path: str = path) -> None:
                _places(job)
                put(job, path)

            yield f"{key}-{name}", (needle, part), damage


@attacks()
def elsewhere() -> Iterator[Variant]:
    for key, (put, needle) in list(KEYS.items())[:4]:
        for name, path in ELSEWHERE.items():

            def damage(job: Job, put: Callable[[Job, str], None] = put, path: str = path) -> None:
                _places(job)
                put(job, path)

            own = path.split("\n")[0].split("\x1b")[0].split("\r")[0].strip(" .").rpartition("//")[2]
            yield f"{key}-{name}", (needle, own or ("/job", "looked for")), damage


# Folders that may not be written, and what of them must be named; those that hold something already may be planned for.
TAKEN = {
    "the-recipes-folder": ".",
    "the-recipe": "recipe.yaml",
    "not-empty": "data",
    "parent-of-all": "..",
    "root": "/",
    "devices": "/dev",
    "through-nothing": "nothere/..",
    "through-nothing-deep": "nothere/../nothere/../out/..",
    "pipe": "pipe",
}
OUTPUTS = {
    "the-base": "base",
    "below-the-base": "base/deep/below",
    "the-merged": "merged",
    "below-an-expert": "math/out",
    "below-by-dots": "code/../math/x",
    "by-a-link": "alias/out",
    "below-a-file": "recipe.yaml/out",
    "below-a-device": "/dev/null/x",
    "processes": "/proc/x",
    "system": "/sys/x",
    "circle": "circle",
    "below-a-circle": "circle-a/out",
    "below-a-pipe": "pipe/out",
    "the-data": "data/math.safetensors",
}


def _outputs(paths: dict[str, str]) -> Iterator[Variant]:
    for name, path in paths.items():

        def damage(job: Job, path: str = path) -> None:
            _places(job)
            job.link("alias", "math")
            job.recipe(out=path)

        yield name, ("out:", path.strip(".").split("/")[0] or path.strip(".") or "/job"), damage


@attacks()
def outputs() -> Iterator[Variant]:
    yield from _outputs(OUTPUTS)


@attacks(calibrate_only="a plan only warns of what an output folder holds")
def taken() -> Iterator[Variant]:
    yield from _outputs(TAKEN)


@attacks("clip")
def outputs_among_images() -> Iterator[Variant]:
    for name, path in {"itself": "data/images", "below": "data/images/out", "deep": "data/images/a/b"}.items():
        yield name, ("out", "images"), lambda job, path=path: job.recipe(out=path)


@attack("out", "notes", as_user=True)
def an_output_that_may_not_be_written(job: Job) -> None:
    job.path("notes").mkdir()
    job.path("notes").chmod(0o500)
    job.recipe(out="notes/out")


@attack("out", "notes", as_user=True)
def an_output_that_cannot_be_entered(job: Job) -> None:
    job.path("notes").mkdir()
    job.path("notes").chmod(0)
    job.recipe(out="notes/deep/out")


@attack("expert math", "rights", as_user=True)
def an_expert_that_cannot_be_entered(job: Job) -> None:
    job.path("math").chmod(0)


@attack("out", "full")
def a_file_system_without_room(job: Job) -> None:
    job.recipe(out="/dev/full/out")


@attack("/proc", ("cannot", "no images"))
def data_of_processes(job: Job) -> None:
    job.expert(data="/proc")


@attack(("data", "images", "files", "out"), "/")
def data_of_everything(job: Job) -> None:
    job.expert(data="/")
