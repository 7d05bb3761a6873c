"""Checkpoints on the Hugging Face hub: `hf:org/name`, and only the files that are needed of it."""

import os
import re
from pathlib import Path

from sightline.errors import UserError, WorkError, printable

PREFIX = "hf:"
_FORM = re.compile(r"[\w.-]+/[\w.-]+")
_ON = {"1", "true", "yes", "on"}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def fetch(source: str) -> Path:
    """The folder with the files of `hf:org/name` or `hf:org/name@revision`, downloaded unless they are cached.

    `HF_ENDPOINT` and the other settings of huggingface_hub are honoured; with `SIGHTLINE_OFFLINE=1` or
    `HF_HUB_OFFLINE=1` only the cache is asked. Raises UserError for a repository or file that is not there or not
    allowed, WorkError where the network fails.
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")
    if not _FORM.fullmatch(name):
        raise UserError(f"'{printable(source)}' is not of the form hf:org/name or hf:org/name@revision")
    repository = _Repository(name, revision or None)
    config = repository.file("config.json")
    if config is None:
        raise UserError(f"{source} has no config.json, so nothing tells what its weights are")
    repository.file("preprocessor_config.json")
    weights = next((path for file in _WEIGHTS if (path := repository.file(file)) is not None), None)
    if weights is None:
        raise UserError(f"{source} has no weights that can be read ({', '.join(_WEIGHTS)})")
    if weights.suffix == ".json":
        from sightline.checkpoints.files import shards

        for shard in shards(weights):
            if repository.file(shard) is None:
                raise UserError(f"{source} lacks '{shard}', which its index names")
    return config.parent


def offline() -> bool:
    """Whether the environment forbids every download."""
    return any(os.environ.get(name, "").lower() in _ON for name in ("SIGHTLINE_OFFLINE", "HF_HUB_OFFLINE"))


class _Repository:
    """One revision of a repository: all files come from the commit that the first one came from."""

    def __init__(self, name: str, revision: str | None):
        self.name, self.revision = name, revision

    def file(self, name: str) -> Path | None:
        """The local path of a file, or None where the repository lacks it."""
        import huggingface_hub
        from huggingface_hub import constants, errors

        constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask the hub for more than the file
        try:
            if offline():
                return self._cached(name)
            endpoint = os.environ.get("HF_ENDPOINT") or None
            path = Path(huggingface_hub.hf_hub_download(self.name, name, revision=self.revision, endpoint=endpoint))
        except UserError:
            raise
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.LocalEntryNotFoundError as fault:
            raise WorkError(f"cannot reach the hub for '{self.name}': {_plain(fault.__cause__ or fault)}") from fault
        except errors.RepositoryNotFoundError as fault:
            raise UserError(f"the hub has no '{self.name}', or it is not open to you (HF_TOKEN)") from fault
        except errors.RevisionNotFoundError as fault:
            raise UserError(f"'{self.name}' on the hub has no revision '{printable(self.revision)}'") from fault
        except errors.HfHubHTTPError as fault:
            if fault.response is not None and fault.response.status_code == 404:
                return None
            raise WorkError(f"the hub did not give '{name}' of '{self.name}': {_plain(fault)}") from fault
        except (errors.HFValidationError, ValueError) as fault:
            raise UserError(f"'{self.name}' is not a name on the hub: {_plain(fault)}") from fault
        except OSError as fault:
            raise WorkError(f"'{name}' of '{self.name}' could not be fetched: {_plain(fault)}") from fault
        self.revision = path.parent.name if path.parent.parent.name == "snapshots" else self.revision
        return path

    def _cached(self, name: str) -> Path | None:
        """A file of the cache, without asking the network for anything."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, name, revision=self.revision)
        if isinstance(found, str):
            return Path(found)
        if name != "config.json":
            return None
        raise UserError(
            f"'{self.name}' is not in the cache, and downloads are forbidden "
            "(SIGHTLINE_OFFLINE or HF_HUB_OFFLINE is set); unset it, or name a local folder"
        )


def _plain(fault: BaseException) -> str:
    return printable(str(fault).strip().split("\n")[0] or type(fault).__name__)
