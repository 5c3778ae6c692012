"""What token ids say. Trajectory files hold ids and whole turns; a page shows tokens one by one.

``tokenizers`` alone reads ``tokenizer.json``, in hundredths of a second; nothing is encoded here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchrl.models import STAMP

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILE = "tokenizer.json"
_BROKEN = "\ufffd"
"""What bytes that are no whole character decode to."""


class TokenTexts:
    """Splits decoded text into the pieces that its tokens stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}

    def split(self, token_ids: Sequence[int], text: str) -> list[str] | None:
        """One piece for each id, which together are ``text``; None if this tokenizer does not decode it so.

        A character that takes several tokens stands at the last of them, the others are empty.
        """
        pieces = [self._piece(token_id) for token_id in token_ids]
        if "".join(pieces) == text:
            return pieces
        return self._grown(token_ids, text)

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """One piece for each id, without a text to compare with: for prompts, of which none is kept."""
        return self.split(token_ids, self._decode(token_ids)) or [self._decode(token_ids)]

    def _piece(self, token_id: int) -> str:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._decode([token_id])
        return self._pieces[token_id]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _grown(self, token_ids: Sequence[int], text: str) -> list[str] | None:
        """By what each token adds to those before it.

        Right where tokens are parts of characters, or where a text's first word loses the space before it.
        """
        pieces: list[str] = []
        before, start = 0, 0  # ids[before:start] made the last piece; those from start on wait for the rest
        for end in range(1, len(token_ids) + 1):
            context, whole = self._decode(token_ids[before:start]), self._decode(token_ids[before:end])
            if whole.endswith(_BROKEN) and end < len(token_ids):
                pieces.append("")
            else:
                pieces.append(whole[len(context) :])
                before, start = start, end
        return pieces if "".join(pieces) == text else None


def find_tokenizer(run_dir: Path, settings: Mapping[str, object]) -> Path | None:
    """``tokenizer.json`` of the run's model, if it is on this machine: nothing is built or downloaded.

    Args:
        run_dir: whose ``model/`` comes first.
        settings: the run's, flat by dotted names.
    """
    folders = [run_dir / "model"]
    for key in ("checkpoint", "model.path"):
        if name := str(settings.get(key, "")):
            folders.append(Path(name).expanduser())
            folders += _built(name, Path(str(settings.get("assets", "assets"))))
            folders += _downloaded(name)
    return next((folder / _FILE for folder in folders if (folder / _FILE).is_file()), None)


def open_tokens(run_dir: Path, settings: Mapping[str, object]) -> TokenTexts | None:
    """The texts of the run's tokens; None if ``find_tokenizer`` finds none that can be read."""
    path = find_tokenizer(run_dir, settings)
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        return TokenTexts(Tokenizer.from_buffer(path.read_bytes()))
    except ValueError:  # a damaged file; the report says that tokens are not shown one by one
        return None


def _built(name: str, assets: Path) -> list[Path]:
    """Folders that ``models`` has made of ``name``: their stamps say of what."""
    found = []
    for stamp in sorted((assets / "models").glob(f"*/{STAMP}")):
        source = str(json.loads(stamp.read_text(encoding="utf-8")).get("source", ""))
        if source.startswith(f"{name} "):
            found.append(stamp.parent)
    return found


def _downloaded(name: str) -> list[Path]:
    """The folder of a hub's model in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, _FILE)
    except HFValidationError:  # no hub name
        return []
    return [Path(found).parent] if isinstance(found, str) else []
