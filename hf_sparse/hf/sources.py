"""Whether what the user names is there at all: a folder, or a model on the hub."""

from __future__ import annotations

import os

SIDECAR = "sparse_attention.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_SECONDS = 10  # to find out whether the hub has a model


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """True for a folder with any file that only adapters have."""
    return any(
        os.path.exists(os.path.join(source, name)) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDECAR)
    )


def check_path(source: str) -> None:
    """Raise ValueError for a path with no model in it; what may be a hub id passes."""
    if not source.strip():
        raise ValueError(
            f"the name of the model is empty, got {source!r}; give a folder, or a hub id such as org/name."
        )
    if os.path.isdir(source):
        if not os.path.exists(os.path.join(source, "config.json")) and not is_adapter(source):
            raise ValueError(f"{source} holds neither config.json nor {ADAPTER_CONFIG}; give a model folder.")
    elif os.path.exists(source):
        raise ValueError(f"{source} is a file; give the model's folder, or a hub id.")
    elif source.startswith((".", "~", "/")) or source.count("/") > 1 or not all(source.split("/")):
        raise _no_folder(source)


def check_source(source: str) -> None:
    """Raise ValueError for what is neither a model folder, nor in the hub's cache, nor on the hub.

    Asked for a name it cannot find, transformers tries the hub for most of a minute; this asks once.
    """
    check_path(source)
    if os.path.isdir(source):
        return
    if "/" in source and os.path.isdir(source.split("/")[0]):
        raise _no_folder(source)
    _check_hub(source)


def _no_folder(source: str) -> ValueError:
    return ValueError(f"there is no folder {source}; check the spelling, or give a hub id such as org/name.")


def _check_hub(source: str) -> None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = any(
            isinstance(try_to_load_from_cache(source, name), str) for name in ("config.json", ADAPTER_CONFIG)
        )
        HfApi().model_info(source, timeout=HUB_SECONDS)
    except HFValidationError:
        raise ValueError(
            f"{source!r} is neither a folder nor a hub id such as org/name; check the spelling."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(
            f"the hub has no model {source} that you may read (status {status}), and there is no such folder; "
            "check the spelling, or log in with: hf auth login"
        ) from None
    except Exception as error:  # noqa: BLE001 - out of reach: each version of the client has its own classes for that
        if not cached:
            raise ValueError(
                f"there is no folder {source}, it is not in the hub's cache, and the hub cannot be reached "
                f"({type(error).__name__}); check the spelling or the connection."
            ) from None
        constants.HF_HUB_OFFLINE = True  # or transformers would ask again, file by file
