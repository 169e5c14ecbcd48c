"""Where base and data come from, as strangers may read it: names without places of this machine, and licences."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import httpx
from huggingface_hub import RepoCard, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from yaml import YAMLError

from spinfast.data.sources import is_local
from spinfast.errors import UserError
from spinfast.models import at_hub, gguf_file
from spinfast.store.files import expanded

UNKNOWN = "unknown"
KEYS = ("license", "license_name", "license_link")
TEXTS = {"apache license": "apache-2.0", "mit license": "mit"}  # how a licence's text begins -> the hub's name for it
OF_PACKAGES = {"reasoning_gym": "reasoning-gym"}  # what makes the problems of a source -> its distribution
PATH = re.compile(r"[~.]{0,2}/.*|.*/.*\.(jsonl?|ndjson|[ct]sv|parquet|arrow|feather|py(:\w+)?|gguf|ya?ml|txt)(\.\w+)?")
READ = (".md", ".json", ".yml", ".jinja", ".txt", ".Modelfile")
NOT_READ = ("tokenizer.json", "vocab.json", "merges.txt")  # words of languages, in which any may be found


def told(value):
    """A saved config, or any value of it, with the names of files and folders in place of their paths."""
    if isinstance(value, dict):
        return {told(key): told(item) for key, item in value.items()}
    if isinstance(value, list):
        return [told(item) for item in value]
    if not isinstance(value, str) or value.startswith("package:"):
        return value
    here = "/" in value and os.path.exists(expanded(value))  # of what can be no name Path.exists would raise
    return Path(value).name if here or PATH.fullmatch(value) else value


def licence_of_model(name: str) -> dict[str, str]:
    """Front matter of the model's card or, on this machine, of its licence file or .gguf; {} if none is to be had."""
    if at_hub(name):
        return _of_card(name, "model")
    file = gguf_file(name)
    if file and file.is_file():
        from gguf import GGUFReader

        fields = GGUFReader(file).fields
        keys = {key: fields.get(f"general.{key.replace('_', '.')}") for key in KEYS}
        return _known({key: field.contents() for key, field in keys.items() if field})
    return _of_directory(expanded(name))


def licence_of_data(name: str) -> dict[str, str]:
    """The same of a source of data; nothing is known of files of this machine's."""
    if package := OF_PACKAGES.get(name.partition(":")[0]):
        return _known({"license": (importlib.metadata.metadata(package).get("License-Expression") or "").casefold()})
    return {} if is_local(name) else _of_card(name, "dataset")


def in_words(licence: dict[str, str]) -> str:
    return licence.get("license_name") or licence.get("license") or UNKNOWN


def _of_card(name: str, kind: str) -> dict[str, str]:
    try:
        return _known(RepoCard.load(name, repo_type=kind, ignore_metadata_errors=True).data.to_dict())
    except GatedRepoError:
        return {}
    except RepositoryNotFoundError:
        if get_token() is None:
            return {}
        raise UserError(f"{kind} {name}: the hub knows none of that name, or not to you; check the name") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError, YAMLError):
        return {}


def _of_directory(path: Path) -> dict[str, str]:
    if not path.is_dir():
        return {}
    found = _of_text(path / "README.md")
    for file in [] if found else sorted(path.glob("LICEN[CS]E*")):
        first = next(filter(None, map(str.strip, file.read_text(encoding="utf-8", errors="replace").splitlines())), "")
        known = TEXTS.get(first.casefold())
        own = re.sub(r"[^a-z0-9.]+", "-", first.casefold()).strip("-")[:60]  # as the hub wants names of licences
        return {"license": known} if known else {"license": "other", "license_name": own}
    return found


def _of_text(card: Path) -> dict[str, str]:
    try:
        return _known(RepoCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except (OSError, ValueError, YAMLError):  # no card, or none that can be read
        return {}


def _known(data: dict) -> dict[str, str]:
    return {key: str(data[key]) for key in KEYS if data.get(key) and data.get("license")}


def check_private(directory: Path, run: Path) -> None:
    """Raises UserError where a file that people read or tools are configured by holds a place or token of this user."""
    secrets = {f"{place}/" for place in (Path.home(), run.parent, Path.cwd()) if len(place.parts) > 1}
    secrets |= {token} if (token := get_token()) else set()
    for file in sorted(directory.rglob("*")):
        if file.suffix not in READ or file.name in NOT_READ:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if found := next((secret for secret in sorted(secrets) if secret in text), None):
            shown = "the hub's token" if found == token else found
            raise UserError(
                f"{file}: holds {shown}, which is not for others; nothing was uploaded. Take it out of the base's own "
                "files, or report this"
            )
