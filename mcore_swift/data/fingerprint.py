"""Hashes of everything that the tokens of a data set depend on."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .cache import FORMAT
from .selection import Part
from .settings import DataSettings

_HASHED_WHOLE = 256 << 20
_PIECE, _PIECES = 1 << 20, 64


def store_key(part: Part, tokenizer_hash: str, settings: DataSettings, max_length: int | None) -> str:
    """Name of the cache folder of a part, 32 hex digits."""
    s = settings
    return digest(
        {
            "format": FORMAT,
            "transformers": version("transformers"),  # renders the chat template
            "tokenizer": tokenizer_hash,
            "sources": [[file_digest(path) for path in source.files] for source in part.sources],
            "rows": [None if rows is None else _array(rows) for rows in part.rows],
            "columns": s.columns,
            "system": s.system,
            "max_length": max_length,
            "truncation_strategy": s.truncation_strategy,
            "loss_scale": s.loss_scale,
            "use_chat_template": s.use_chat_template,
            "enable_thinking": s.enable_thinking,
            "drops_bad_rows": s.strict is False,
            **({"names": [s.model_name, s.model_author]} if s.model_name or s.model_author else {}),
        }
    )


def indexed_key(part: Part, settings: DataSettings, max_length: int | None) -> str:
    """The same for a corpus of token ids. It is used in place, so this key only tells whether it has changed."""
    idx = part.sources[0].files[0]
    return digest(
        {
            "files": [file_digest(path) for path in (idx, idx.with_suffix(".bin"))],
            "rows": [None if rows is None else _array(rows) for rows in part.rows],
            "max_length": max_length,
            "truncation_strategy": settings.truncation_strategy,
        }
    )


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _array(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array, np.int64), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Hash of a file's contents; above 256 MiB, of its size, modification time and 64 pieces spread over it."""
    stat = path.stat()
    with path.open("rb") as file:
        if stat.st_size <= _HASHED_WHOLE:
            return (
                hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                + path.suffix.lower()
            )
        hasher = hashlib.blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
        for piece in range(_PIECES):
            file.seek((stat.st_size - _PIECE) * piece // (_PIECES - 1))
            hasher.update(file.read(_PIECE))
    return hasher.hexdigest() + path.suffix.lower()


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary and rules, its special tokens and its chat template."""
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        if backend.padding or backend.truncation:  # settings of calls, not of the tokenizer
            backend = type(backend).from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        model: Any = hashlib.blake2b(backend.to_str().encode()).hexdigest()
    else:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        model = [type(tokenizer).__qualname__, vocabulary]
    return digest(
        {
            "model": model,
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "eos": tokenizer.eos_token_id,
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
    )
