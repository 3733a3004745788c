"""Whether a name is on the hub or in its cache: one quick question, one clear sentence."""

import contextlib
import os

from common import InputError


def check_hub_id(name: str, kind: str, flag: str = "") -> None:
    """Raises InputError at once where a hub id neither exists nor is in the local cache.

    One quiet request, not the libraries' half a minute of retries. `kind`: "model" or "dataset"."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    flag = flag or ("--model" if kind == "model" else "--data")
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"{flag} {name}: no such file or folder, and not the form of a hub id.") from None
    with contextlib.suppress(Exception):
        if os.environ.get("HF_HUB_OFFLINE") not in {"1", "true", "TRUE", "True", "ON", "YES", "yes"}:
            try:
                huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=5)
                return
            except RepositoryNotFoundError:
                message = f"no such {kind} on the hub, or it is private, and no such file or folder here."
                raise InputError(f"{flag} {name}: {message}") from None
    try:
        huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True)
        # Cached: use that copy, do not ask the hub again.
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    except Exception:
        message = f"no such file or folder here, and the hub cannot be reached for a {kind} of that name."
        raise InputError(f"{flag} {name}: {message}") from None
