"""Prompts as labels of a contact sheet, in a font that has their characters.

Pillow's own font has the letters of English only, so that others are looked for on the system. A character that none
has is written without its accent, or as its code.
"""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

SIZE = 11  # pixels
_LINE = SIZE + 4
# Pillow finds them by these names in the font folders of Linux, Windows and macOS. Those of most characters first.
_ON_SYSTEMS = (
    *("DejaVuSans.ttf", "segoeui.ttf", "arial.ttf", "Arial.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf"),
    *(
        "NotoSansCJK-Regular.ttc",
        "NotoSansCJKsc-Regular.otf",
        "SourceHanSansSC-Regular.otf",
        "DroidSansFallbackFull.ttf",
    ),
    *("wqy-zenhei.ttc", "wqy-microhei.ttc", "unifont.otf", "unifont.ttf", "msyh.ttc", "YuGothM.ttc", "msgothic.ttc"),
    *("malgun.ttf", "simsun.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
    *("Nirmala.ttc", "Nirmala.ttf", "LeelawUI.ttf", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf"),
    *("NotoSansThai-Regular.ttf", "NotoSansDevanagari-Regular.ttf", "FreeSans.ttf"),
    *("seguisym.ttf", "seguiemj.ttf", "NotoSansSymbols2-Regular.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf"),
)
_NOBODYS = "\U000effff"  # a character that no font has, and for which each shows its sign for that


def label(text: str, width: int, height: int) -> tuple[str, FreeTypeFont]:
    """`text` in lines that fit into so many pixels, and the font for them; "…" stands for what does not fit."""
    font, shown = readable_in(text)
    lines, room = [""], height // _LINE
    for word in shown.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += _pieces(word, font, width)
    lines = [line for line in lines if line]
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{_pieces(lines[room - 1], font, width - font.getlength('…'))[0]}…"]
    return "\n".join(lines), font


def _pieces(word: str, font: FreeTypeFont, width: float) -> list[str]:
    """A word in parts that are no wider than `width`."""
    parts = [""]
    for character in word:
        if parts[-1] and font.getlength(parts[-1] + character) > width:
            parts.append("")
        parts[-1] += character
    return parts


def readable_in(text: str) -> tuple[FreeTypeFont, str]:
    """The font with the most characters of `text`, and `text` with a substitute for each that the font lacks."""
    # What shows nothing by itself: control characters, joiners, the selectors that follow emoji.
    shown = [own for own in unicodedata.normalize("NFC", text) if own.isspace() or not _is_invisible(own)]
    characters, best, most = {own for own in shown if not own.isspace()}, None, -1
    for font in _fonts():
        count = sum(_has(font, character) for character in characters)
        if count > most:
            best, most = font, count
        if most == len(characters):
            break
    return best, "".join(_shown(best, character) for character in shown)


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf") or "\ufe00" <= character <= "\ufe0f"


def _shown(font: FreeTypeFont, character: str) -> str:
    if character.isspace() or _has(font, character):
        return character
    plain = unicodedata.normalize("NFKD", character)[0]
    return plain if _has(font, plain) else character.encode("unicode_escape").decode()


@lru_cache(maxsize=10_000)
def _has(font: FreeTypeFont, character: str) -> bool:
    return _drawn(font, character) != _drawn(font, _NOBODYS)


def _drawn(font: FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _fonts() -> Iterator[FreeTypeFont]:
    """Pillow's own, then those that are found on the system."""
    yield _own_font()
    yield from filter(None, map(_system_font, _ON_SYSTEMS))


@lru_cache(maxsize=1)
def _own_font() -> FreeTypeFont:
    return ImageFont.load_default(SIZE)


@lru_cache(maxsize=len(_ON_SYSTEMS))
def _system_font(name: str) -> FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, SIZE)
    except OSError:  # not there
        return None
