"""A parcel -> its repository at the hub: one commit of what is not there yet, then a look whether all arrived.

A repository is never half a parcel: large files go first and are kept by the hub, the commit names them all at once. So
whatever stops an upload, the same call sends what is missing. What is there already is told by its sum, as git and the
hub count it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import sha, validate_repo_id

from spinfast.errors import UserError
from spinfast.hub.parcels import Parcel
from spinfast.store import files

log = logging.getLogger("spinfast")
KEPT = ".gitattributes"  # the hub's own
AGAIN = "the same command again sends only what is missing"


@dataclass(frozen=True)
class Sent:
    """What an upload did."""

    url: str
    created: bool
    sent: list[str]
    kept: int  # files that were there already


class Hub:
    """The hub for whoever the token belongs to."""

    def __init__(self) -> None:
        if get_token() is None:
            raise UserError("no token of the hub: run `hf auth login` with one that may write, or set HF_TOKEN")
        self.api, self.user = HfApi(), "the token's owner"
        with one_line(constants.ENDPOINT):
            account = self.api.whoami()
        self.user = account["name"]
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"the token of {self.user} may only read; give one that may write (`hf auth login`)")

    def send(self, parcel: Parcel, public: bool, replace: bool) -> Sent:
        """Raises UserError for whatever the hub or the network refuses, and for a repository of other content."""
        where = {"repo_id": parcel.repo, "repo_type": parcel.type}
        with one_line(f"{parcel.type} {parcel.repo}", self.user):
            created = self._info(where) is None
            if created:
                self.api.create_repo(**where, private=not public)
            info = self.api.repo_info(**where, files_metadata=True)
            if not created:
                self._check_ours(parcel, info, replace)
            if not info.private and not public:
                raise UserError(
                    f"{parcel.type} {parcel.repo}: is public at the hub; publish with --public, or under another name"
                )
            missing = _missing(parcel, info)
            gone = [each.rfilename for each in info.siblings if replace and each.rfilename not in (*parcel.files, KEPT)]
            if missing or gone:
                changes = [CommitOperationAdd(name, str(path)) for name, path in missing.items()]
                changes += [CommitOperationDelete(name) for name in gone]
                message = f"spinfast publish: {len(missing)} files"
                with warnings.catch_warnings(record=True) as noted:
                    self.api.create_commit(operations=changes, commit_message=message, parent_commit=info.sha, **where)
                for each in noted:
                    log.warning("%s %s: %s", parcel.type, parcel.repo, _short(each.message))
            if lost := _missing(parcel, self.api.repo_info(**where, files_metadata=True)):
                raise UserError(
                    f"{parcel.type} {parcel.repo}: {next(iter(lost))} did not arrive as it was sent; {AGAIN}"
                )
            if public and info.private:
                self.api.update_repo_settings(**where, private=False)
        prefix = "datasets/" if parcel.type == "dataset" else ""
        url = f"{constants.ENDPOINT}/{prefix}{parcel.repo}"
        return Sent(url, created, [*missing], len(parcel.files) - len(missing))

    def _info(self, where: dict):
        try:
            return self.api.repo_info(**where)
        except RepositoryNotFoundError:
            return None

    def _check_ours(self, parcel: Parcel, info, replace: bool) -> None:
        """Nothing of another run's or of a person's is written over unasked."""
        names = {each.rfilename for each in info.siblings} - {KEPT}
        if not names or replace:
            return
        if "README.md" in names:
            found = self.api.hf_hub_download(
                parcel.repo, "README.md", repo_type=parcel.type, revision=info.sha, force_download=True
            )
            if parcel.mark in Path(found).read_text(encoding="utf-8", errors="replace"):
                return
        raise UserError(
            f"{parcel.type} {parcel.repo}: is there and holds something else than this stage of this run; give another "
            "--to, or --replace (what is there stays in its history)"
        )


def check_names(repos: list[str]) -> None:
    for repo in repos:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UserError(f"--to: {repo} is no name of a repository ({_short(error)})") from None


def _missing(parcel: Parcel, info) -> dict[str, Path]:
    """The parcel's files that the repository has not, or has otherwise."""
    there = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id for each in info.siblings}
    large = {each.rfilename for each in info.siblings if each.lfs}

    def sum_of(name: str, path: Path) -> str:
        return files.sha256(path) if name in large else sha.git_hash(path.read_bytes())

    return {name: path for name, path in parcel.files.items() if name not in there or there[name] != sum_of(name, path)}


@contextmanager
def one_line(what: str, user: str = "the token's owner") -> Iterator[None]:
    """What the hub's client raises, as a UserError about `what`; anything else is a bug and stays as it is."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise UserError(f"{what}: {_told(error, user)}") from error


def _told(error: BaseException, user: str) -> str:
    cause = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # "Error while uploading", and why
        cause = cause.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish"
    if isinstance(cause, HfHubHTTPError):
        status, said = cause.response.status_code, _short(cause.server_message or "")
        hint = HINTS.get(status, AGAIN).format(user=user)
        return f"the hub answers {status}{said and f' ({said})'}; {hint}"
    if isinstance(cause, httpx.TransportError):
        return f"the connection to the hub failed ({type(cause).__name__}: {_short(cause)}); {AGAIN}"
    return _short(cause)


HINTS = {
    401: "the token is wrong or has expired: run `hf auth login`, or set HF_TOKEN",
    402: "the account's storage or plan does not allow it",
    403: "{user} may not write there, or its storage is full: check the name, the token's rights and the quota",
    404: "it was removed meanwhile, or {user} may not see it",
    409: "the name is taken: give another --to",
    412: "somebody changed it meanwhile: run the same command again",
    413: "a file is too large for the hub",
    429: "too many requests: wait, then run the same command again",
}


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
