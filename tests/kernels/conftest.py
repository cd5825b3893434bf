"""The interpreter's and the compiler's tests run in processes of their own, which `test_own_process` starts."""

from pathlib import Path

OWN_PROCESS = ("interpreter", "compile")


def pytest_ignore_collect(collection_path: Path, config) -> bool | None:
    if collection_path.parent == Path(__file__).parent and collection_path.name in OWN_PROCESS:
        named = {Path(argument.split("::")[0]).resolve() for argument in config.args}
        if not any(path == collection_path or collection_path in path.parents for path in named):
            return True
    return None
