"""The tokenizer of an export reads text as the hybrid's does.

transformers picks a tokenizer's class by the model's class too, so that the same files may be another tokenizer beside
another config.json: LlamaTokenizer builds its own pipeline where TokenizersBackend takes tokenizer.json as it stands, and
some classes of models overrule what tokenizer_config.json names.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hybridize.core import read_json
from hybridize.data.same_tokenizer import differences, tokenizer_file
from hybridize.errors import CheckpointError
from hybridize.storage import write_json, write_text

# Read by every class of transformers as "what tokenizer.json says".
PLAIN = "PreTrainedTokenizerFast"
SAMPLES = ("Once upon a time, it's 12345.", "  two  spaces\n\n\ttab, ünïcödé, 日本語, 🙂", "", "def f(x):\n    return x")


def keep_tokenizer(source: Path, folder: Path) -> bool:
    """Check that `folder`, which has `source`'s tokenizer files and another config.json, reads text alike; mend it if not.

    Mending writes what `source` makes of its files as tokenizer.json, under the class that takes it as it stands.

    Returns:
        Whether anything was written.

    Raises:
        CheckpointError: the two still differ.
    """
    if tokenizer_file(source) is None:
        return False
    own = _load(source)
    if _difference(own, folder) is None:
        return False
    if not getattr(own, "is_fast", False):
        raise CheckpointError(
            f"{source}: its tokenizer is a {type(own).__name__}, which only its own class reads; expected a fast one"
        )
    path = folder / "tokenizer_config.json"
    settings = read_json(path, "the tokenizer's settings") if path.is_file() else {}
    write_text(folder / "tokenizer.json", own.backend_tokenizer.to_str())
    write_json(path, {**settings, "tokenizer_class": PLAIN, **_specials(own)})
    if (difference := _difference(own, folder)) is not None:
        raise CheckpointError(f"{source}: its tokenizer reads text otherwise beside the native class: {difference}")
    return True


def _load(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _specials(tokenizer: Any) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def _difference(own: Any, folder: Path) -> str | None:
    try:
        found = _load(folder)
    except ValueError as error:
        # A class that needs files of another format says so at length.
        return f"it cannot be read ({str(error).splitlines()[0]})"
    if (difference := next(differences(own, found), None)) is not None:
        return difference
    for text in SAMPLES:
        ids, others = own(text)["input_ids"], found(text)["input_ids"]
        if ids != others or own.decode(ids) != found.decode(ids):
            return f"{json.dumps(text, ensure_ascii=False)} is {others}, expected {ids}"
    if own.chat_template != found.chat_template or own.eos_token_id != found.eos_token_id:
        return "its chat template or end of text differs"
    return None
