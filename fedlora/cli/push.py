"""`fedlora push`: a run's adapter, or another export, to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli._common import app
from fedlora.cli.export import base_folder
from fedlora.errors import ExportError, RunDirError
from fedlora.sanitize import clean_text

CARD = "README.md"


@app.command()
def push(
    run_path: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, or one that fedlora export has written.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Owner and name on the hub, such as me/my-adapter.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone, where the repository is new.")] = False,
) -> None:
    """Upload a run's adapter with its model card to the Hugging Face hub, or to the one that HF_ENDPOINT names."""
    folder = _folder(run_path)
    if (base := base_folder(folder)) is not None:
        raise ExportError(
            f"the adapter names its base model by a folder of this machine, {base!r}: write one that names it as "
            f"others find it with fedlora export {run_path} OUT --base OWNER/NAME, and push OUT",
            code="base-in-a-folder",
        )
    typer.echo(f"uploading {folder}", err=True)
    typer.echo(f"{folder} is at {_upload(folder, repo, private)}")


def _folder(path: Path) -> Path:
    """What is uploaded: the verified adapter of a run, or a folder as it is."""
    if (path / "config.toml").is_file():
        if not (path / "adapter" / CARD).is_file():
            raise RunDirError(
                f"{str(path)!r} has no adapter yet: go on with fedlora run --resume {path}, or write one with fedlora "
                f"export {path} OUT",
                code="run-without-adapter",
            )
        return path / "adapter"
    if not (path / CARD).is_file():
        raise RunDirError(
            f"{str(path)!r} is neither a run nor an export: name a folder with a model card, {CARD}",
            code="not-an-export",
        )
    return path


def _upload(folder: Path, repo: str, private: bool) -> str:
    """The address of the repository, after all files of a folder are there in one commit."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(library_name="fedlora")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=url.repo_id, commit_message=f"Upload {folder.name} by fedlora")
    except OfflineModeIsEnabled:
        raise ExportError("HF_HUB_OFFLINE is set: unset it to upload", code="hub-offline") from None
    except HFValidationError as error:
        raise ExportError(f"REPO {repo!r} is no name on the hub: {clean_text(error, 200)}", code="bad-repo") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        cure = "log in with hf auth login, or set HF_TOKEN" if status in (401, 403) else "look at what it says"
        raise ExportError(
            f"the hub refuses {repo!r} ({status}): {clean_text(error.server_message or error, 300)}; {cure}",
            code="hub-refuses",
        ) from None
    except httpx.HTTPError as error:
        raise ExportError(
            f"the hub {api.endpoint} does not answer ({clean_text(error, 200)}): try again later", code="hub-away"
        ) from None
    except ValueError as error:  # of the card's metadata, or of a reply
        raise ExportError(f"{folder} is not taken: {clean_text(error, 300)}", code="hub-refuses") from None
    return str(url)
