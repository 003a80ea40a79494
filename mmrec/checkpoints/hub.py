"""Models on the Hugging Face Hub, ``hf:OWNER/NAME``: taken from there, and sent there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrec.core.errors import UserError, one_line
from mmrec.core.optional import optional_import

EXPORTED, DESCRIPTION = "model.safetensors", "mmrec.json"
"""In a folder for transformers, which a repository holds: the weights, and what else makes a model of them."""
PREFIX = "hf:"
NAMED = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def is_on_hub(which: str) -> bool:
    """Whether a checkpoint is one of the Hub."""
    return which.startswith(PREFIX)


def download_model(which: str) -> Path:
    """Return the path of the weights of ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``, as the Hub's cache has them.

    What is in the cache is asked for, and not fetched, again; without a network it is taken as it is.

    Raises:
        UserError: there is no such repository, it cannot be reached, or it holds no model that mmrec exported.
    """
    match = NAMED.fullmatch(which.removeprefix(PREFIX))
    if match is None:
        raise UserError(f"{which}: is not hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
    library = optional_import("huggingface_hub")
    with _one_line(which):
        folder = library.snapshot_download(
            match["repository"],
            revision=match["revision"],
            allow_patterns=[EXPORTED, DESCRIPTION],
            endpoint=_endpoint(),
        )
    path = Path(folder) / EXPORTED
    if not path.is_file() or not path.with_name(DESCRIPTION).is_file():
        raise UserError(f"{which}: holds no {EXPORTED} with a {DESCRIPTION}, as mmrec export --format hf writes them")
    return path


def check_repository(name: str) -> None:
    """Raise UserError where ``name`` is not OWNER/NAME, or the package that sends is missing."""
    match = NAMED.fullmatch(name)
    if match is None or match["revision"] is not None:
        raise UserError(f"--push {name}: is not OWNER/NAME")
    optional_import("huggingface_hub")


def push_folder(folder: Path, name: str) -> str:
    """Send the files of ``folder`` to the repository ``name``, which is made, private, if there is none.

    Returns:
        Where it is shown.

    Raises:
        UserError: it was not sent.
    """
    api: Any = optional_import("huggingface_hub").HfApi(endpoint=_endpoint())
    with _one_line(f"{folder} was written, but not pushed to {name}"):
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model of mmrec")
    return str(address)


def _endpoint() -> str | None:
    """Return the address of the Hub where the environment gives another than the library's."""
    return os.environ.get("HF_ENDPOINT")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what the library, or the network below it, raises into one line that begins with ``what``."""
    errors: Any = optional_import("huggingface_hub.errors")
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        hint = "no such repository, or none that you may use: log in by 'hf auth login', or set HF_TOKEN"
        raise UserError(f"{what}: {hint}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: there is no such revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(f"{what}: the Hub cannot be reached") from None
    except Exception as error:  # of the network, which the library reaches by other packages from version to version
        raise UserError(f"{what}: {one_line(error)[:300]}") from None
