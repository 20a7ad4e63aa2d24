"""Pruned models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from torch import nn

from graphprune.errors import GraphPruneError
from graphprune.io.folder import save

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a pruned model",
    create_pr: bool = False,
    **options: Any,
) -> CommitInfo:
    """Upload what :func:`graphprune.save` writes, the model card with it. Files of the same names are replaced.

    A model made with ``deploy="transformers"`` can also be uploaded with its own ``push_to_hub``, which writes another
    card and no plan. That of any other uploads weights that do not fit their config.

    Args:
        model: what :func:`graphprune.compile` or :func:`graphprune.load` returned.
        repo_id: ``"owner/name"``; made if it does not exist yet.
        private, token, revision, commit_message, create_pr: as huggingface_hub takes them.
        tokenizer, options: as :func:`graphprune.save` takes them.

    Returns:
        What huggingface_hub says of the commit.

    Raises:
        GraphPruneError: when the model cannot be saved, or the hub cannot be reached or refuses.
    """
    with TemporaryDirectory(prefix="graphprune-") as temporary:
        folder = Path(temporary, "model")
        save(model, folder, tokenizer=tokenizer, **options)
        api = HfApi(token=token)
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise GraphPruneError(f"{repo_id} could not be uploaded: {error}") from error
