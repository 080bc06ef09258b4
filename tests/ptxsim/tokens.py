"""PTX text as tokens."""

import re
import struct
from typing import NamedTuple

from ptxsim.errors import PTXSyntaxError
from ptxsim.operands import Float, Integer

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\f]+) | (?P<newline>\n) |
    (?P<string>"(?:[^"\\]|\\.)*") |
    (?P<bits>0[fF][0-9a-fA-F]{8}(?![\w])|0[dD][0-9a-fA-F]{16}(?![\w])) |
    (?P<float>\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+) |
    (?P<integer>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?) |
    (?P<directive>\.[A-Za-z_][\w$]*(?:::[\w$]+)*) |
    (?P<name>[%$A-Za-z_][\w$]*(?:(?:\.|::)[\w$]+)*) |
    (?P<punctuation>[{}\[\]()<>,;:+\-|!@=*~&^])
    """,
    re.VERBOSE,
)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_IGNORED_LINE = re.compile(r"^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n]*", re.MULTILINE)

NUMBERS = ("integer", "float", "bits")


class Token(NamedTuple):
    kind: str
    text: str
    line: int


END = Token("end", "", -1)


def tokenize(text: str) -> list[Token]:
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    text = _IGNORED_LINE.sub("", text)
    tokens, position, line = [], 0, 1
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise PTXSyntaxError(f"PTX line {line}: cannot read {text[position : position + 20]!r}")
        kind = str(found.lastgroup)
        if kind == "newline":
            line += 1
        elif kind != "space":
            tokens.append(Token(kind, found[0], line))
        position = found.end()
    return tokens


def integer(text: str) -> int:
    text = text.rstrip("U").lower()
    if text.startswith(("0x", "0b")):
        return int(text, 0)
    return int(text, 8 if text.startswith("0") and len(text) > 1 else 10)


def number(token: Token) -> Integer | Float:
    """The literal that a token of one of the `NUMBERS` kinds spells."""
    if token.kind == "integer":
        return Integer(integer(token.text))
    if token.kind == "float":
        return Float(float(token.text))
    bits = int(token.text[2:], 16)
    if token.text[1] in "fF":
        return Float(struct.unpack("<f", bits.to_bytes(4, "little"))[0], 32, bits)
    return Float(struct.unpack("<d", bits.to_bytes(8, "little"))[0], 64, bits)
