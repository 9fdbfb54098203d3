"""Token ids of prompts, by the UMT5 tokenizer that lies nearest to its text encoder.

AutoTokenizer and T5Tokenizer are avoided: transformers 5 rebuilds their backend with another unknown token and without
byte fallback, so characters outside the vocabulary would get wrong ids.
"""

import html
from collections.abc import Callable
from pathlib import Path

from wan.errors import InputError

END = "</s>"
_HUB_REPOSITORY = "google/umt5-xxl"
_PLACES = ("tokenizer.json", "google/umt5-xxl/tokenizer.json", "spiece.model", "google/umt5-xxl/spiece.model")


def clean_prompt(text: str) -> str:
    """The text as Wan tokenizes it: mojibake repaired, HTML entities resolved, runs of whitespace made one space."""
    import ftfy  # here: parsing a command line needs no tokenizer

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def tokenizer_file(chosen: str | Path) -> Path:
    """The tokenizer.json or SentencePiece model that a user's path is or contains; InputError if there is none."""
    chosen = Path(chosen)
    if chosen.is_file() and chosen.suffix in (".json", ".model"):
        return chosen
    found = _first_in(chosen)
    if found is None:
        raise InputError(f"--tokenizer {chosen} is not a tokenizer.json, a spiece.model or a folder with one of them")
    return found


def open_tokenizer(encoder_path: Path, embedded: bytes | None, vocab_size: int) -> Callable[[str], list[int]]:
    """The tokenizer beside the text encoder's file, else the one inside it, else the hub's; see read_tokenizer.

    InputError if there is none; it names the flag to give one.
    """
    beside = _first_in(encoder_path.parent)
    if beside is not None:
        return read_tokenizer(beside, vocab_size)
    if embedded is not None:
        return _sentencepiece(embedded, str(encoder_path), vocab_size)
    return read_tokenizer(_from_hub(encoder_path), vocab_size)


def read_tokenizer(path: Path, vocab_size: int) -> Callable[[str], list[int]]:
    """A function from a clean prompt to its token ids, ending with </s>, by a tokenizer.json or SentencePiece model.

    InputError if the file cannot be read or has more tokens than the text encoder's `vocab_size`.
    """
    if path.suffix == ".model":
        return _sentencepiece(path.read_bytes(), str(path), vocab_size)
    from tokenizers import Tokenizer  # here: parsing a command line needs no tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more specific
        raise InputError(f"tokenizer {path} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.token_to_id(END)
    _check_vocabulary(tokenizer.get_vocab_size(), end, vocab_size, str(path))
    return lambda prompt: [*tokenizer.encode(prompt, add_special_tokens=False).ids, end]


def _sentencepiece(model: bytes, source: str, vocab_size: int) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor  # here: parsing a command line needs no tokenizer

    try:
        tokenizer = SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise InputError(f"the tokenizer in {source} is not a SentencePiece model") from None
    end = tokenizer.piece_to_id(END) if tokenizer.eos_id() >= 0 else None
    _check_vocabulary(tokenizer.get_piece_size(), end, vocab_size, source)
    return lambda prompt: [*tokenizer.encode(prompt), end]


def _check_vocabulary(size: int, end: int | None, vocab_size: int, source: str) -> None:
    if end is None:
        raise InputError(f"the tokenizer in {source} has no {END} token, so it is not UMT5's")
    if size > vocab_size:
        raise InputError(
            f"the tokenizer in {source} has {size} tokens, the text encoder only {vocab_size}: they are not a pair"
        )


def _first_in(folder: Path) -> Path | None:
    return next((folder / place for place in _PLACES if (folder / place).is_file()), None)


def _from_hub(encoder_path: Path) -> Path:
    from huggingface_hub import hf_hub_download  # here, because most runs have their tokenizer on disk

    try:
        return Path(hf_hub_download(_HUB_REPOSITORY, "tokenizer.json"))
    except OSError as error:
        raise InputError(
            f"there is no tokenizer beside {encoder_path} or in it, and {_HUB_REPOSITORY} cannot be downloaded "
            f"({str(error).splitlines()[0]}): give a tokenizer.json, a spiece.model or their folder as --tokenizer"
        ) from None
