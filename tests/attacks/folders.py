"""Model folders: what is missing, what leads out of them, what is no file; caches of the hub that were changed."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from attacks.core import Variant, attack, attacks
from attacks.good import WEIGHTS, Job

MODELS = {"base": "base model", "merged": "merged model", "math": "expert math"}
# Files that are read, whose content a link would bring in from elsewhere.
READ = {
    "base": ("config.json", WEIGHTS),
    "merged": ("config.json", WEIGHTS, "generation_config.json"),
    "math": ("config.json", WEIGHTS),
}


@attacks()
def links_out() -> Iterator[Variant]:
    for model, files in READ.items():
        for file in files:
            yield f"{model}-{file}", (f"{model}/{file}", "link"), lambda job, f=f"{model}/{file}": job.outside(f)


@attacks()
def no_files() -> Iterator[Variant]:
    for model, files in READ.items():
        for file in files:
            name = f"{model}/{file}"
            yield f"pipe-{model}-{file}", (MODELS[model], file), lambda job, f=name: job.pipe(f)
            yield f"zeros-{model}-{file}", (MODELS[model], file), lambda job, f=name: job.link(f, "/dev/zero")
            yield f"circle-{model}-{file}", (MODELS[model], model), lambda job, f=name: job.link(f, f.split("/")[1])


@attacks()
def gone() -> Iterator[Variant]:
    for model in MODELS:
        for file in ("config.json", WEIGHTS):
            yield f"{model}-{file}", (f"{model}", file), lambda job, f=f"{model}/{file}": job.path(f).unlink()


@attack("merged", "tokenizer.json", "link", kind="texts")
def a_tokenizer_from_outside(job: Job) -> None:
    job.outside("merged/tokenizer.json")


@attack("merged", "preprocessor_config.json", "link", kind="clip")
def a_processor_from_outside(job: Job) -> None:
    job.outside("merged/preprocessor_config.json")


@attack("merged/1_pooling", "link")
def a_subfolder_from_outside(job: Job) -> None:
    job.write("merged/1_Pooling/config.json", "{}")
    job.outside("merged/1_Pooling")


@attack("merged/1_pooling/secret", "link")
def a_link_to_a_secret(job: Job) -> None:
    job.path("merged/1_Pooling").mkdir()
    job.link("merged/1_Pooling/secret", "/etc/passwd")


@attack("merged/notes", "link")
def a_link_to_the_root(job: Job) -> None:
    job.link("merged/notes", "/")


@attack("merged/up", "link")
def a_link_to_the_folder_above(job: Job) -> None:
    job.link("merged/up", "..")


@attack("merged", "link")
def links_without_end(job: Job) -> None:
    job.path("merged/a").mkdir()
    job.link("merged/a/again", "..")
    job.link("merged/a/more", "../a")


@attack("merged/notes.txt", "read")
def a_dangling_link(job: Job) -> None:
    job.link("merged/notes.txt", "nothing")


@attack("merged/notes.txt", ("file", "regular"))
def a_pipe_beside_the_weights(job: Job) -> None:
    job.pipe("merged/notes.txt")


@attack("merged/door", ("neither", "file"))
def a_socket_beside_the_weights(job: Job) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"/proc/self/fd/{_open(job, 'merged')}/door")
    _close()


_held: list[int] = []


def _open(job: Job, folder: str) -> int:
    """A folder's number: a socket's address may have 108 bytes."""
    import os

    _held.append(os.open(job.path(folder), os.O_RDONLY))
    return _held[-1]


def _close() -> None:
    import os

    os.close(_held.pop())


@attack("merged/tape", ("neither", "link", "file"))
def a_device_beside_the_weights(job: Job) -> None:
    job.link("merged/tape", "/dev/zero")


@attack("out:", "free")
def a_terabyte_beside_the_weights(job: Job) -> None:
    job.write("merged/notes.txt", "")
    job.sparse("merged/notes.txt", 2**43)


@attacks()
def pickled() -> Iterator[Variant]:
    for model, label in MODELS.items():

        def damage(job: Job, model: str = model) -> None:
            job.path(f"{model}/{WEIGHTS}").unlink()
            job.write(f"{model}/pytorch_model.bin", b"cos\nsystem\n(S'touch run'\ntR.")

        yield model, (label, "pickled", "pytorch_model.bin"), damage


@attack("expert math", "math/model.gguf", "GGUF")
def no_gguf_but_called_so(job: Job) -> None:
    job.path(f"math/{WEIGHTS}").rename(job.path("math/model.gguf"))


@attack("base model", "adapter")
def an_adapter_as_base(job: Job) -> None:
    job.path("base/config.json").rename(job.path("base/adapter_config.json"))


@attack("merged model", "adapter", kind="adapter")
def an_adapter_as_merged(job: Job) -> None:
    job.recipe(merged_model="math")


@attack("expert math", ("mismatch", "shape", "config.json", "type", "architecture", "layers"), kind="llama")
def another_family(job: Job) -> None:
    import pico

    pico.KINDS["bert"]().save_pretrained(job.path("other"))
    job.expert(model="other")


@attack("expert math", ("layers", "layer", "blocks"))
def another_depth(job: Job) -> None:
    import pico

    from attacks.good import LLAMA

    pico.llama(**{**LLAMA, "layers": 1}).save_pretrained(job.path("other"))
    job.expert(model="other")


@attack("base model", "snapshots", kind="hub")
def two_snapshots_and_no_main(job: Job) -> None:
    job.path("base/refs/main").unlink()
    job.path("base/snapshots/def").mkdir()


@attack("base model", "config.json", kind="hub")
def a_blob_that_is_gone(job: Job) -> None:
    job.path("base/blobs/config.json-blob").unlink()


@attack("base model", "link", WEIGHTS, kind="hub")
def a_blob_that_is_elsewhere(job: Job) -> None:
    job.outside(f"base/blobs/{WEIGHTS}-blob")


@attack("base model", "link", "config.json", kind="hub")
def a_snapshot_that_leads_out(job: Job) -> None:
    job.outside("base/blobs/config.json-blob")


@attacks("hub")
def names_of_main() -> Iterator[Variant]:
    for name, text in {
        "up": "../..",
        "up-far": "../../math",
        "absolute": "/etc",
        "empty": "",
        "noise": "\xff\0",
    }.items():

        def damage(job: Job, text: str = text) -> None:
            job.path("base/snapshots/def").mkdir()  # with one only, that is meant
            job.write("base/refs/main", text.encode("latin-1"))

        yield name, ("base model", "snapshots"), damage


@attack("base model", "main", kind="hub")
def main_is_a_pipe(job: Job) -> None:
    job.path("base/snapshots/def").mkdir()  # with one only, that is meant
    job.pipe("base/refs/main")


@attack("base model", ("main", "snapshots"), kind="hub")
def main_without_end(job: Job) -> None:
    job.sparse("base/refs/main", 2**40)


@attack("expert math", "config.json", "rights", as_user=True)
def a_config_that_may_not_be_read(job: Job) -> None:
    job.path("math/config.json").chmod(0)
