#!/usr/bin/env python3
"""The chat's window: the client core of chat.py, shown with Tkinter.

    python3 gui_client.py              asks for a name and a server
    python3 gui_client.py alice        connects at once

Sections, in reading order; each uses only what stands above it:

    EVENTS          what the two threads tell each other: immutable tuples
    RIGHT TO LEFT   Hebrew and Arabic, where Tk leaves their order to us
    WHAT IS SHOWN   rows as coloured text, and the sheet that counts them: no widgets here
    EMOJI           names of emoji, for typing them
    ENGINE          the cores, their connections and their loop, in a thread of their own
    REMEMBERED      recent servers, geometry and look, kept in client.db
    MODEL           what Tk knows of the engine
    TIMERS          calls that Tk makes later, and for other threads
    LOOK            palettes, fonts and styles
    FIELDS          where text is typed
    FILES           pictures, the files on their way, and the programs that open them
    TRANSCRIPT      the conversation that is looked at
    LISTS           the sidebar and the members
    PANEL           results of a search, and texts to be read
    CARDS           dialogs, on top of the window
    NOTICES         what the desktop is told
    ACTS            what the user does, by subject: writing, reading, files, messages, ...
    WINDOW          everything together: building, connecting, events, closing
    DEMO            the pictures of the README
    MAIN            the command line

Where a thing goes: a widget shows what it is given and calls back, and knows nothing of the
engine; what the user does is a method in ACTS; what Tk knows of the engine is in MODEL; what
an event of the engine means is in the table of Window; what needs a core is in ENGINE.

Two threads, and what goes between them:

    Tk -> engine    Engine.submit(): a call that the loop makes in its next turn
    engine -> Tk    batches of events, one at a time, and one byte that wakes Tk

The engine's thread never touches Tk, and Tk never reads what belongs to the engine. The
engine makes the next batch when Tk has taken the last one: a flood waits in the rooms of
the core, which are bounded, and not in a queue.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import ctypes
import datetime
import functools
import gc
import itertools
import json
import logging
import os
import pathlib
import queue
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import webbrowser
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

try:
    import tkinter as tk
    from tkinter import filedialog, ttk
    from tkinter import font as tkfont
except ImportError:  # Debian and others have it in a package of its own
    sys.exit("gui_client.py: this Python has no Tkinter; on Debian, apt install python3-tk")

import chat

log = logging.getLogger("chat.window")

# ======================================================================================
# EVENTS
# ======================================================================================
# What the engine tells Tk. All of it is copied and cannot change: Tk sees nothing else of
# the core. A conversation is known by its number, which never changes; names do.

PENDING, FAILED = "pending", "failed"  # states of a message of ours


class Row(NamedTuple):
    """One row of a transcript: a view, and the state of the message."""

    view: chat.ViewEvent
    state: str = ""  # PENDING or FAILED; "" has arrived
    reason: str = ""  # why it failed
    parked: bool = False  # it can be sent again, or dropped
    reactions: tuple[tuple[str, tuple[str, ...]], ...] = ()  # emoji, and whose they are
    answers: tuple[str, str] = ("", "")  # whose message it answers, and how that begins
    missed: bool = False  # it was said while we were away

    @property
    def key(self) -> Any:
        """The identity of this row, by which it is found again."""
        view = self.view
        return view.own_id or view.id or (view.kind, view.time, view.name, view.text)


class Server(NamedTuple):
    """The state of one server."""

    number: int
    address: str  # as a user would write it
    nick: str
    phase: str = chat.WAITING
    ready: bool = False
    status: str = ""
    statuses: int = 0  # number of them so far
    retry_at: float = 0.0  # monotonic time of the next attempt; 0: none is planned
    waiting: int = 0  # messages that have not arrived
    parked: int = 0  # of these, messages that could not be sent
    doubted: str = ""  # fingerprint of a certificate that the user has to judge ...
    doubt: str = ""  # ... and why
    away: str = ""
    can: frozenset[str] = frozenset()  # redact, react, typing, reply
    separate_bytes: int = 0  # of a line and its target, where each line is a message
    rooms: tuple[int, ...] = ()

    @property
    def question(self) -> str:
        """A key of the question that the user has to answer before there is a connection; ""
        if there is none. The same question after another attempt has another key."""
        asks = self.phase == chat.WAITING and not self.retry_at and self.status
        return self.doubted or (f"{self.number} {self.statuses}" if asks else "")


class RoomInfo(NamedTuple):
    """The state of one conversation."""

    number: int
    server: int
    name: str
    channel: bool = True
    topic: str = ""
    inside: bool = True
    unread: int = 0
    called: int = 0
    muted: bool = False
    draft: str = ""
    gone: bool | None = None
    typing: tuple[str, ...] = ()  # who is typing


class Servers(NamedTuple):
    servers: tuple[Server, ...]
    ended: str | None = None  # why everything is over; "" because we left


class Rooms(NamedTuple):
    changed: tuple[RoomInfo, ...]
    gone: tuple[int, ...] = ()


class Looked(NamedTuple):
    """Another conversation is looked at. Its rows come next."""

    room: int
    server: int


class Rows(NamedTuple):
    """Rows of the conversation looked at: all (RESET), at an end, or of its PAST."""

    room: int
    at: str
    rows: tuple[Row, ...]
    read_time: int = 0  # of RESET: up to here everything was read ...
    unread: int = 0  # ... and so many messages were not
    mark: int = -1  # of PAST: the row that was looked for


RESET, END, START, PAST, AFTER = "reset", "end", "start", "past", "after"


class Trimmed(NamedTuple):
    """A number of the oldest rows is gone."""

    room: int
    count: int


class Changed(NamedTuple):
    room: int
    row: Row


class Removed(NamedTuple):
    """A message was redacted: its words are to be seen nowhere."""

    id: str


class Cleared(NamedTuple):
    """The user wants an empty page; scrolling up shows what was there."""

    room: int


class Read(NamedTuple):
    """The user has read up to a time, on another device."""

    room: int
    time: int


class Fetching(NamedTuple):
    """The state of older rows: a text, whether they are on the way, whether there may be more."""

    room: int
    text: str = ""
    under_way: bool = False
    more: bool = True
    again: bool = False  # there is a connection now, or none any more: ask again


class Members(NamedTuple):
    """Members of the conversation looked at: new or changed ones, and names of those who left."""

    room: int
    came: tuple[chat.Person, ...]
    went: tuple[str, ...] = ()
    reset: bool = False


class Back(NamedTuple):
    """A text that was not accepted."""

    room: int
    text: str


class Page(NamedTuple):
    """A text to be read in the panel."""

    title: str
    text: str


class Code(NamedTuple):
    """An address, to be shown with its QR code."""

    address: str


class Results(NamedTuple):
    """Messages that a search has found."""

    title: str
    rows: tuple[tuple[int, str, chat.ViewEvent], ...]  # room, its name, message


class Called(NamedTuple):
    """A message that mentions the user or is private, or an invitation, say."""

    room: int
    name: str
    text: str
    where: str
    bell: bool
    desktop: bool


class Settings(NamedTuple):
    values: tuple[tuple[str, str], ...]


class Moving(NamedTuple):
    """A file on its way."""

    server: int
    id: str
    text: str
    share: int  # percent that has arrived


class Progress(NamedTuple):
    """All files on their way, up and down."""

    files: tuple[Moving, ...]


class Picture(NamedTuple):
    """The content of a picture; empty if it could not be fetched."""

    server: int
    file: chat.FileTag
    data: bytes
    full: bool = False  # to be shown in a window of its own
    why: str = ""  # it could not be fetched


class Opened(NamedTuple):
    """A file has been saved that the user wants to open."""

    path: str


# ======================================================================================
# RIGHT TO LEFT
# ======================================================================================
# Tk on X11 draws all characters from left to right and joins no letters. So lines with
# Hebrew or Arabic are broken here, their letters put in the order in which they are seen,
# and Arabic ones get their joined forms. The rules are those of Unicode's UAX 9, whose names
# stand beside them (W1 to L4). Embeddings were removed before; a link is an isolate, as on
# the page for browsers. A line of the class `Seen` knows what was said, to be copied. Other
# systems do all this themselves.

RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
FORMS = ("isolated", "final", "initial", "medial")  # neither joined, to the one before, ...
ZWNJ = "\u200c"  # keeps two letters apart
# White space, quotes and the punctuation of Chinese and Japanese end a link, the latter without a
# space before or behind it
NO_LINK = (
    r"\s<>\"\xab\xbb\u201c-\u201f\u3001-\u3004\u3008-\u301f"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
PAIR = rf"\([^{NO_LINK}()]*\)"  # a bracket at the end belongs to it if it was opened there
LINK = re.compile(
    r"(?:https?://|www\.(?=[\w-]+\.))"
    rf"(?:{PAIR}|(?!{PAIR})[^{NO_LINK}])*(?:{PAIR}|[^{NO_LINK}(.,;:!?)\]}}'\u2018\u2019\u2026])",
    re.IGNORECASE,
)
# Classes of letters in one character each: strong ones, numbers, what may belong to numbers. All
# others are neutral, a blank. After the rules for numbers only L, R, 1, 2 and blanks are left.
CLASSES = {"L": "L", "R": "R", "AL": "A", "EN": "1", "AN": "2", "ES": "+", "ET": "$", "CS": ","}
OPPOSITE = {"LEFT": "RIGHT", "RIGHT": "LEFT", "LESS": "GREATER", "GREATER": "LESS"}
OPPOSITE_WORD = re.compile("LEFT|RIGHT|LESS|GREATER")
BRACKETS_DEEP = 63


class Letter(NamedTuple):
    """A letter, with the marks on it; or a link."""

    place: int  # in the line
    text: str
    marks: str
    is_link: bool
    drawn: str  # in its joined form

    @property
    def kind(self) -> str:
        kind = "" if self.is_link else unicodedata.bidirectional(self.text[0])
        return CLASSES.get(kind, " ")


class Seen(str):
    """A part of a line in the order in which it is seen. For each character, `said` has the place
    in the line and the text that it stands for."""

    said: list[tuple[int, str]]

    @classmethod
    def of(cls, places: list[tuple[str, int, str]]) -> "Seen":
        part = cls("".join(drawn for drawn, _, _ in places))
        part.said = [(place, text) for _, place, text in places]
        return part


@functools.cache
def arabic_forms() -> dict[str, dict[str, str]]:
    """Return the joined forms of letters, and of lam with alef (Arabic Presentation Forms)."""
    forms: dict[str, dict[str, str]] = {}
    for code in (*range(0xFB50, 0xFBEA), *range(0xFBFC, 0xFC00), *range(0xFE80, 0xFEFD)):
        form, *letters = unicodedata.decomposition(chr(code)).split() or [""]
        if form.strip("<>") in FORMS:
            known = forms.setdefault("".join(chr(int(one, 16)) for one in letters), {})
            known.setdefault(form.strip("<>"), chr(code))
    return forms


def joined(letters: list[Letter]) -> list[Letter]:
    """Return Arabic letters in the forms that they have beside each other."""
    known = arabic_forms()
    forms = [known.get(one.text, {}) for one in letters]
    if not any(forms):
        return letters
    joins = [
        "initial" in one and "final" in other and ZWNJ not in letter.marks
        for letter, one, other in zip(letters, forms, forms[1:], strict=False)
    ]
    shaped = []
    for letter, form, before, after in zip(
        letters, forms, [False, *joins], [*joins, False], strict=True
    ):
        drawn = form.get(FORMS[before + 2 * after]) or form.get("isolated") or letter.drawn
        shaped.append(letter._replace(drawn=drawn))
    return shaped


def letters_of(line: str, links: bool = True) -> list[Letter]:
    """Return the letters of a line; a mark goes with the letter before it (W1)."""
    ends = {match.start(): match.end() for match in LINK.finditer(line)} if links else {}
    letters: list[Letter] = []
    n, pairs = 0, arabic_forms()
    while n < len(line):
        one, pair = line[n], line[n : n + 2]
        mark = unicodedata.bidirectional(one) in ("NSM", "BN")
        if mark and letters and not letters[-1].is_link:
            letters[-1] = letters[-1]._replace(marks=letters[-1].marks + one)
            n += 1
            continue
        if n in ends or (pair in pairs and len(pair) == 2):
            one = line[n : ends.get(n, n + 2)]
        letters.append(Letter(n, one, "", n in ends, one))
        n += len(one)
    return joined(letters)


@functools.lru_cache(maxsize=1024)
def mirrored(sign: str) -> str:
    """Return the sign that this one is in a mirror (L4): of brackets, "less than" and so on."""
    if not unicodedata.mirrored(sign):
        return sign
    name = OPPOSITE_WORD.sub(lambda word: OPPOSITE[word[0]], unicodedata.name(sign, ""))
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return sign


def bracket_pairs(letters: list[Letter]) -> list[tuple[int, int]]:
    """Return where brackets open and close that belong together (BD16)."""
    opened: list[tuple[str, int]] = []
    pairs = []
    for n, letter in enumerate(letters):
        if letter.is_link or not unicodedata.mirrored(letter.text[0]):
            continue
        sign = unicodedata.normalize("NFC", letter.text)
        kind = unicodedata.category(sign) if mirrored(sign) != sign else ""
        if kind == "Ps":
            if len(opened) == BRACKETS_DEEP:
                return []
            opened.append((unicodedata.normalize("NFC", mirrored(sign)), n))
        for place in reversed(range(len(opened))) if kind == "Pe" else ():
            if opened[place][0] == sign:
                pairs.append((opened[place][1], n))
                del opened[place:]
                break
    return sorted(pairs)


def with_brackets(kinds: str, pairs: list[tuple[int, int]], own: str) -> str:
    """Give both brackets of a pair one direction: that of the line, if it occurs between them;
    else, if there are words of the other one, that of what stands before them (N0)."""
    known = list(kinds.translate({ord("1"): "R", ord("2"): "R"}))
    for start, end in pairs:
        within = set(known[start:end]) - {" "}
        if within:
            before = next((one for one in reversed(known[:start]) if one != " "), own)
            known[start] = known[end] = own if own in within else before
    return "".join(kind if kind in "12" else one for kind, one in zip(kinds, known, strict=True))


def levels_of(letters: list[Letter], base: int) -> list[int]:
    """Return the embedding level of each letter: odd ones are seen from right to left."""
    own = "R" if base else "L"
    kinds = "".join(letter.kind for letter in letters)
    kinds = re.sub("A[^LR]*", lambda run: run[0].replace("1", "2"), kinds)  # W2
    kinds = kinds.replace("A", "R")  # W3
    kinds = re.sub("(?<=1)[+,](?=1)", "1", kinds)  # W4
    kinds = re.sub("(?<=2),(?=2)", "2", kinds)
    kinds = re.sub(r"\$+(?=1)|(?<=1)\$+", lambda run: "1" * len(run[0]), kinds)  # W5
    kinds = re.sub("[+$,]", " ", kinds)  # W6
    left = "L[^R]*" if base else "(?:^|L)[^R]*"
    kinds = re.sub(left, lambda run: run[0].replace("1", "L"), kinds)  # W7
    kinds = with_brackets(kinds, bracket_pairs(letters), own)
    for one in "LR":  # N1, N2
        number = "12" if one == "R" else ""
        before = f"(?<=[{one}{number}])" if one != own else f"(?:(?<=[{one}{number}])|^)"
        after = f"(?=[{one}{number}])" if one != own else f"(?=[{one}{number}]|$)"
        kinds = re.sub(f"{before} +{after}", lambda run, one=one: one * len(run[0]), kinds)
    kinds = kinds.replace(" ", own)
    return [{"L": 2 * base, "R": 1}.get(kind, 2) for kind in kinds]  # I1, I2


def in_order(letters: list[Letter], levels: list[int]) -> list[tuple[Letter, int]]:
    """Return letters of a line in the order in which they are seen (L2), with their levels."""
    parts = list(zip(letters, levels, strict=True))
    for lowest in range(max(levels, default=0), 0, -1):
        groups = itertools.groupby(parts, lambda part, lowest=lowest: part[1] >= lowest)
        turned = [list(group)[::-1] if high else list(group) for high, group in groups]
        parts = [part for group in turned for part in group]
    return parts


def places_of(letter: Letter, level: int) -> list[tuple[str, int, str]]:
    """Return the characters with which a letter is drawn, their places, and what they stand for."""
    if letter.is_link:
        within = letters_of(letter.text, links=False)
        return [
            (drawn, letter.place + place, text)
            for one, depth in in_order(within, levels_of(within, 0))
            for drawn, place, text in places_of(one, depth)
        ]
    first = mirrored(letter.drawn) if level % 2 else letter.drawn
    whole_letter = [(first, letter.place, letter.text + letter.marks)]
    marks = [(mark, letter.place, "") for mark in letter.marks] if letter.marks else []
    return whole_letter + marks


def is_rtl(text: str) -> bool:
    """Return whether a line begins at the right: its first letter says so (P2, without links)."""
    kinds = (unicodedata.bidirectional(c) for c in LINK.sub("", text))
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def is_only_rtl(text: str) -> bool:
    """Return whether all words of a line are from right to left. A line of the program or of the
    server with words of both directions begins at the left: it may begin with a name."""
    return is_rtl(text) and is_rtl(text[::-1]) and not re.search("[A-Za-z]", LINK.sub("", text))


def parts_to_fit(
    letters: list[Letter], fits: Callable[[str], bool]
) -> Iterator[tuple[int, int, int]]:
    """Yield where parts of a line that fit begin and end, and where the next one begins."""
    text = "".join(" " if letter.text.isspace() else "x" for letter in letters)
    start = end = 0
    for word in re.finditer(" *(x+) *", text):
        if end > start and not fits("".join(one.drawn for one in letters[start : word.end(1)])):
            yield start, end, word.start(1)
            start = word.start(1)
        end = word.end(1)
    yield start, len(letters), len(letters)


def seen_lines(line: str, fits: Callable[[str], bool], base: int) -> Iterator[list[Seen]]:
    """Yield a line as it is to be drawn, broken to fit. Links are every second part, and after the
    last part stands what was left out where the line was broken."""
    letters = letters_of(line)
    levels = levels_of(letters, base)
    for start, end, following in parts_to_fit(letters, fits):
        parts: list[list[tuple[str, int, str]]] = [[]]
        for letter, level in in_order(letters[start:end], levels[start:end]):
            if letter.is_link:
                parts += [places_of(letter, level), []]
            else:
                parts[-1] += places_of(letter, level)
        left_out = "".join(letter.text for letter in letters[end:following])
        last = [("\n", letters[end].place, left_out)] if following < len(letters) else []
        yield [Seen.of(places) for places in (*parts, last)]


def seen_line(line: str, base: int) -> Seen:
    """Return the characters of a line in the order in which they are seen."""
    parts = [part for parts in seen_lines(line, lambda part: True, base) for part in parts]
    whole_line = Seen("".join(parts))
    whole_line.said = [one for part in parts for one in part.said]
    return whole_line


def lines_said(pieces: list, drawable: Callable[[str], str]) -> dict[str, list[tuple]]:
    """Return what lines stand for: for each character its place in what was said, and the text."""
    lines: dict[str, list[tuple]] = {}
    shown: list[str] = []
    said: list[tuple] = []
    group = 0  # parts in turn that are `Seen` are of one line
    for piece in pieces[::2]:
        group += not isinstance(piece, Seen)
        known = piece.said if isinstance(piece, Seen) else enumerate(piece)
        for c, (place, text) in zip(piece, known, strict=True):
            drawn = drawable(c)
            shown += drawn
            said += [(group, place, text), *[(group, place, "")] * (len(drawn) - 1)]
            if c == "\n":
                lines["".join(shown)] = said
                shown, said = [], []
        group += not isinstance(piece, Seen)
    return lines


def said_text(said: list[tuple]) -> str:
    """Return characters of a line in the order in which they were said."""
    return "".join(text for *_, text in sorted(said, key=lambda one: one[:2]))


# ======================================================================================
# WHAT IS SHOWN
# ======================================================================================
# Rows come in, pieces go out: text and its tags in turn, as a Text widget takes them in
# one call. Everything is counted here, in rows and lines, never in widget indices: those
# count an emoji as two.

ROWS_DRAWN = 200  # of a conversation when it is opened; more when the user scrolls up
ROWS_MORE = 100  # drawn at a time then
ROWS_MOST = 2500  # drawn at most while the end is in sight
LINE_SHOWN = 1000  # characters of one line: a line of 100 kB takes Tk half a second to lay out
TEXT_SHOWN = 2000  # characters of a message, before a click shows the rest ...
LINES_SHOWN = 24  # ... and lines
EXCERPT = 80  # characters of a message that another one answers
UNKNOWN_ANSWER = ("reply", "an earlier message")  # of a reply to a message that is not here
NAME_SHOWN = 80  # characters of a name ...
LABEL_SHOWN = 300  # ... of a label ...
CLOCK_SHOWN = 40  # ... and of a time
NAME_TAGS = 12
GROUP_SECONDS = 300  # messages of one speaker within this stand under one name
WHY_AGAIN = "; trying again"  # behind why there is no connection

ONLY_LINK = re.compile(r".+ \([^()]*\d [KMG]?B\): \S+")  # what clients say of a file they send


TK_FORMATS = {"image/png": "png", "image/gif": "gif"}  # of pictures that Tk decodes
PICTURE_BYTES = 2 * 1024 * 1024  # of a picture shown among the messages, at most ...
PICTURE_SIDE = 4096  # ... and pixels of a side ...
PICTURE_PIXELS = 3840 * 2160  # ... so one larger than a screen is shown by a click, in a window
PICTURE_BOX = (400, 300)  # pixels for a picture, where 96 are an inch
# What is opened by a click, and under which ending, whatever the sender calls it: a program that
# calls itself a picture is given to one that shows pictures.
OPENED_TYPES = {
    "image/png": ".png",
    "image/gif": ".gif",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "video/mp4": ".mp4",
    "application/pdf": ".pdf",
    "text/plain": ".txt",
}


def whole(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone ones dropped: no encoder takes those."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


key_of = functools.lru_cache(maxsize=16 * 1024)(chat.fold)  # names come again and again


def name_tag(name: str) -> str:
    """Return the tag with the colour of a name, which is the same everywhere."""
    return f"name{zlib.crc32(key_of(name).encode()) % NAME_TAGS}"


def link_of(text: str) -> str:
    """Return the address of a link as it stands in a text."""
    return text if "://" in text else f"https://{text}"


def link_meant(seen: str, text: str) -> str:
    """Return the address of the link in a text that is drawn like this, perhaps in another order:
    it has the same characters, or begins with them."""
    links = LINK.findall(text)
    same = [one for one in links if seen in (one, seen_line(one, 0))]
    same += [one for one in links if one.startswith(seen)]
    return link_of((same or [seen])[0])


def linked(text: str, *tags: str) -> list:
    """Return `text` as pieces, with the links in it tagged."""
    pieces, end = [], 0
    for match in LINK.finditer(text):
        pieces += [text[end : match.start()], tags, match.group(), (*tags, "link")]
        end = match.end()
    return [*pieces, text[end:], tags]


def clock_text(moment: datetime.datetime, style: str) -> str:
    """Return a time in the user's format; in the default format if that is unusable."""
    try:
        return " ".join(moment.strftime(chat.harmless(style)).split())[:CLOCK_SHOWN] or "\u2013"
    except ValueError:
        return f"{moment:%H:%M}"


def day_text(day: datetime.date) -> str:
    return f"{day:%A}, {day.day} {day:%B %Y}"


def broken(text: str) -> str:
    """Return `text` with its longest lines broken: Tk lays out lines, one at a time."""
    return re.sub(rf"(.{{{LINE_SHOWN}}})(?=.)", r"\1\n", text)


def shorter(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\u2026"


def label_text(text: str) -> str:
    """Return a text as a label can show it: Tk lays out all of a label, however long it is."""
    return " ".join(text[: 2 * LABEL_SHOWN].split())[:LABEL_SHOWN]


def excerpt(text: str) -> str:
    return shorter(" ".join(text[: 4 * EXCERPT].split()), EXCERPT)


def beginning(text: str) -> str:
    """Return the part of a long text that is shown before a click."""
    lines = text.split("\n", LINES_SHOWN)
    return "\n".join(lines[:LINES_SHOWN])[:TEXT_SHOWN]


def has_id(view: chat.ViewEvent, id: str) -> bool:
    """Return whether a view is the message with this id."""
    return bool(id) and view.id == id


def is_unread(row: Row, read_time: int) -> bool:
    """Return whether a row is a message of another user that was not read yet."""
    view = row.view
    return view.kind in chat.SPOKEN and not view.mine and (view.time or 0) > read_time


class Style(NamedTuple):
    """The display for which rows are drawn."""

    clock: str = "%H:%M"
    # Return whether a part of a line fits into one row; None: Tk orders and breaks lines itself
    fits: Callable[[str], bool] | None = None
    seen: Callable[..., str] = lambda text, base=0: text  # a text of one line as it is drawn
    box: tuple[int, int] = PICTURE_BOX  # pixels for a picture
    pictures: bool = True  # are shown among the messages


def head_pieces(row: Row, style: Style) -> list:
    """Return the name and the time above the messages of one speaker."""
    view, tags = row.view, ("head",)
    name = f"-{view.name}-" if view.kind == chat.NOTICE else view.name
    clock = clock_text(chat.moment_of(view), style.clock)
    named = (*tags, name_tag(view.name), "name")
    return [style.seen(shorter(name, NAME_SHOWN)), named, f"  {clock}\n", (*tags, "clock")]


def reply_pieces(row: Row, style: Style) -> list:
    """Return the line above an answer: the beginning of what it answers."""
    name, text = row.answers
    if not name:
        return []
    name, text = style.seen(shorter(name, NAME_SHOWN)), excerpt(text)
    shown = ("\u21b3 ", name, ": ", style.seen(text, is_rtl(text)), "\n")
    return [piece for part in shown for piece in (part, ("said", "answers"))]


def reaction_pieces(row: Row, me: str) -> list:
    pieces: list = []
    for emoji, names in row.reactions:
        tags = ("said", "reaction", *(("own-reaction",) if me in names else ()))
        pieces += [f" {emoji} {len(names)} ", tags, " ", ("said",)]
    return [*pieces, "\n", ("said",)] if pieces else []


def state_pieces(row: Row) -> list:
    """Return the line under a message that did not arrive."""
    if row.state != FAILED:
        return []
    pieces = [f"not sent: {row.reason}", ("said", "trouble")]
    if row.parked:
        pieces += ["   ", ("said", "trouble"), "Retry", ("said", "trouble", "retry")]
        pieces += ["   ", ("said", "trouble"), "Cancel", ("said", "trouble", "cancel")]
    return [*pieces, "\n", ("said", "trouble")]


def is_decodable(file: chat.FileTag) -> bool:
    """Return whether a file is a picture that Tk decodes."""
    sides = 0 < file.width <= PICTURE_SIDE and 0 < file.height <= PICTURE_SIDE
    return file.type in TK_FORMATS and 0 < file.size <= PICTURE_BYTES and sides


def is_shown(file: chat.FileTag) -> bool:
    """Return whether a picture is shown among the messages."""
    return is_decodable(file) and file.width * file.height <= PICTURE_PIXELS


def is_only_link(view: chat.ViewEvent) -> bool:
    """Return whether a message only names a file: its card says the same."""
    return bool(view.file and ONLY_LINK.fullmatch(view.text) and chat.parse_file_tag(view.file))


def divisor(file: chat.FileTag, box: tuple[int, int]) -> int:
    """Return the number by which the sides of a picture are divided, to fit into a box."""
    return max(1, -(-file.width // box[0]), -(-file.height // box[1]))


def file_pieces(row: Row, style: Style, trouble: str) -> list:
    """Return the lines about a file: the card, and the space of a picture."""
    file = chat.parse_file_tag(row.view.file)
    if file is None:
        return []
    tags = ("said", "file")
    name = chat.linked_name(row.view) if is_only_link(row.view) else ""
    name = style.seen(shorter(name, NAME_SHOWN))
    pieces = [piece for part in (" ", name, " ") for piece in (part, (*tags, "file-name"))]
    pieces = pieces if name else []
    why = f"; not shown: {trouble}" if trouble else ""
    pieces += [f" {file.words()}{why}   ", tags, "Save", (*tags, "save")]
    if file.type in OPENED_TYPES:
        pieces += ["   ", tags, "Open", (*tags, "open")]
    inline = style.pictures and is_shown(file) and not trouble
    if is_decodable(file) and not (inline or trouble):
        pieces += ["   ", tags, "Show", (*tags, "show")]
    pieces += [" ", tags, "\n", ("said",)]
    if inline:
        height = -(-file.height // divisor(file, style.box))
        pieces += ["\n", ("said", "picture", f"space{height}")]
    return pieces


def line_pieces(text: str, style: Style, *tags: str, base: Callable[[str], bool] = is_rtl) -> list:
    """Return lines of text, in the order in which their characters are seen."""
    if style.fits is None or not RIGHT_TO_LEFT.search(text):
        return [*linked(text, *tags), "\n", tags]
    pieces: list = []
    for line in text.split("\n"):
        over = (*tags, "rtl") if base(line) else tags
        for *parts, end in seen_lines(line, style.fits, base(line)):
            for n, part in enumerate(parts):
                pieces += [part, (*over, "link") if n % 2 else over]
            pieces += [end or "\n", over]
    return pieces


def text_pieces(row: Row, style: Style, expanded: bool) -> list:
    """Return the words of a message."""
    view = row.view
    over = ("mention",) if view.called else ()
    over += (row.state,) if row.state else ()
    over += ("notice",) if view.kind == chat.NOTICE else ()
    short = beginning(view.text)
    text = view.text if expanded else short
    pieces = line_pieces(broken(text), style, "said", *over)
    if len(short) < len(view.text):
        lines, size = view.text.count("\n") + 1, len(view.text)
        all_of_it = f"show all of it: {chat.counted(lines, 'line')}, {size:,} characters"
        more = "show less" if expanded else all_of_it
        pieces += [f"{more}\n", ("said", "expand")]
    return pieces


def said_pieces(
    row: Row, style: Style, headed: bool, expanded: bool, me: str, trouble: str
) -> list:
    """Return a message, with a head if the one before it is of another speaker."""
    return [
        *(head_pieces(row, style) if headed else ()),
        *reply_pieces(row, style),
        *(() if is_only_link(row.view) else text_pieces(row, style, expanded)),
        *(file_pieces(row, style, trouble) if row.view.file else ()),
        *reaction_pieces(row, me),
        *state_pieces(row),
    ]


def told_text(view: chat.ViewEvent) -> str:
    """Return the text of a row that is no message."""
    why = f" ({view.text})" if view.text not in ("", "Quit") else ""
    if view.kind == chat.JOIN:
        return f"\u2192 {view.name} joined"
    if view.kind in (chat.PART, chat.QUIT):
        return f"\u2190 {view.name} left{why}"
    return f"\u21c4 {view.text}" if view.kind == chat.MOVED else view.text


def told_pieces(row: Row, style: Style) -> list:
    """Return a row that is no message: joins, quits, texts of the server and of the client."""
    clock = clock_text(chat.moment_of(row.view), style.clock)
    text = broken(told_text(row.view))
    tags = ("told", "table") if "  " in text else ("told",)
    lines = line_pieces(text, style, *tags, base=is_only_rtl)
    return [f"{clock}\t", ("told", "clock"), *lines]


def lines_of(pieces: list) -> int:
    return sum(text.count("\n") for text in pieces[::2])


class Sheet:
    """The rows of the conversation looked at, which of them are drawn, and in how many lines."""

    def __init__(self, style: Style | None = None):
        self.style = style or Style()
        self.room = 0
        self.me = ""
        self.rows: list[Row] = []
        self.sizes: list[int] = []  # lines of each row that is drawn, from `first` on
        self.first = 0  # of the rows that are drawn
        self.marked: Any = None  # key of the row above which the "new" line stands ...
        self.unseen = False  # ... and whether what stands below it has not been seen
        self.read_time = 0
        self.expanded: set[Any] = set()
        self.troubles: dict[str, str] = {}  # why pictures are not shown, by their paths
        self.whole = False  # there is nothing older anywhere
        self.cleared = False  # nothing older is to be shown by itself
        self.past = False  # rows of the past are shown, and the newest ones are not

    # Rows

    def reset(self, event: Rows) -> None:
        """Take the rows of a conversation; none of them is drawn yet."""
        again = event.room == self.room and event.at == RESET and not self.past
        if event.room != self.room:
            self.expanded.clear()
            self.troubles.clear()
        self.room, self.rows, self.read_time = event.room, list(event.rows), event.read_time
        self.first, self.sizes = len(self.rows), []
        self.whole, self.past, self.cleared = False, event.at == PAST, False
        if not again:
            self.mark_new(event.unread)

    def mark_new(self, unread: int) -> None:
        """Put the "new" line above the first message that was not read."""
        news = [row for row in self.rows if is_unread(row, self.read_time)]
        if not self.read_time:  # nothing was ever read here
            news = news[len(news) - unread :] if unread else []
        self.marked, self.unseen = news[0].key if news else None, bool(news)

    def append(self, rows: Iterable[Row], seen: bool) -> int | None:
        """Add rows at the end. Return the row that loses its "new" line, if one does."""
        lost = None
        for row in rows:
            self.rows.append(row)
            # What was said before we came is new although the user sees it come
            known = self.read_time > 0 if row.missed else not seen
            if not known or self.unseen or not is_unread(row, self.read_time):
                continue
            lost = self.find(self.marked)
            self.marked, self.unseen = row.key, True
        return lost

    def seen(self, when: int) -> None:
        """Note that everything was seen: the next unseen message gets the "new" line."""
        self.unseen = False
        self.read_time = max(self.read_time, when)

    def trim(self, count: int) -> int:
        """Drop the oldest rows; return how many lines are to be deleted."""
        drawn = max(0, count - self.first)
        lines = sum(self.sizes[:drawn])
        del self.rows[:count], self.sizes[:drawn]
        self.first = max(0, self.first - count)
        return lines

    def fold_up(self) -> int:
        """Draw fewer of the oldest rows: they come back. Return the lines to be deleted."""
        excess = max(0, len(self.sizes) - ROWS_MOST)
        lines = sum(self.sizes[:excess])
        del self.sizes[:excess]
        self.first += excess
        return lines

    def prepend(self, rows: tuple[Row, ...]) -> None:
        """Add older rows; none of them is drawn yet."""
        self.rows[:0] = rows
        self.first += len(rows)

    def clear(self) -> None:
        """Draw none of the rows, until the user wants to see them."""
        self.first, self.sizes, self.cleared = len(self.rows), [], True

    def replace(self, row: Row) -> int | None:
        """Take another form of a row; return its number."""
        number = self.find_row(row)
        if number is not None:
            if self.rows[number].key == self.marked:
                self.marked = row.key
            self.rows[number] = row
        return number

    def read_to(self, when: int) -> int | None:
        """Note that all was read up to a time; return the row that loses its "new" line."""
        self.seen(when)
        number = self.find(self.marked)
        if number is None or (self.rows[number].view.time or 0) > when:
            return None
        self.marked = None
        return number

    def remove(self, id: str) -> list[int]:
        """Take the words of a message away, also where it is answered. Return the rows of both."""
        numbers = [n for n, row in enumerate(self.rows) if id in (row.view.id, row.view.reply)]
        for n in numbers:
            row = self.rows[n]
            if row.view.id == id:
                told = chat.ViewEvent(chat.NOTE, "a message was taken back", time=row.view.time)
                self.rows[n] = Row(told)
            else:
                self.rows[n] = row._replace(answers=UNKNOWN_ANSWER)
        return numbers

    def find(self, key: Any) -> int | None:
        """Return the number of the row with this key; the newest are looked at first."""
        if key is None:
            return None
        numbers = range(len(self.rows) - 1, -1, -1)
        return next((n for n in numbers if self.rows[n].key == key), None)

    def find_id(self, id: str) -> int | None:
        """Return the number of the row of a message, by the server's id."""
        numbers = range(len(self.rows) - 1, -1, -1)
        return next((n for n in numbers if has_id(self.rows[n].view, id)), None)

    def find_row(self, row: Row) -> int | None:
        """Return the number of an earlier form of this row."""
        number = self.find(row.key)
        return self.find_id(row.view.id) if number is None else number

    # Lines

    def line_of(self, number: int) -> int:
        """Return the line of the widget at which a row that is drawn begins."""
        return 1 + sum(self.sizes[: number - self.first])

    def body_of(self, number: int) -> tuple[str, str]:
        """Return where a row that is drawn begins and ends, without what stands above it."""
        before = self.rows[number - 1] if number > self.first else None
        line = self.line_of(number)
        above = lines_of(self._above(self.rows[number], before))
        return f"{line + above}.0", f"{line + self.sizes[number - self.first]}.0"

    def row_at(self, line: int) -> int | None:
        """Return the row of a line of the widget."""
        if not 1 <= line <= sum(self.sizes):
            return None
        ends = list(itertools.accumulate(self.sizes))
        return self.first + bisect.bisect_right(ends, line - 1)

    def is_drawn(self, number: int | None) -> bool:
        return number is not None and self.first <= number < self.first + len(self.sizes)

    # Drawing

    def draw(self, number: int) -> list:
        row = self.rows[number]
        before = self.rows[number - 1] if number > self.first else None
        pieces = self._above(row, before)
        headed = bool(pieces) or not self._follows(row, before)
        if row.view.kind in chat.SPOKEN:
            expanded = row.key in self.expanded
            trouble = self.troubles.get(row.view.file.partition(",")[0], "")
            pieces += said_pieces(row, self.style, headed, expanded, self.me, trouble)
        else:
            pieces += told_pieces(row, self.style)
        return pieces

    def _above(self, row: Row, before: Row | None) -> list:
        """Return the lines above a row: another day, and what is new."""
        day = chat.moment_of(row.view).date()
        known = chat.moment_of(before.view).date() if before else None
        pieces = [f"{day_text(day)}\n", ("day",)] if day != known else []
        if self.marked is not None and row.key == self.marked:
            pieces += ["\n", ("rule",), "new\n", ("new",)]
        return pieces

    @staticmethod
    def _follows(row: Row, before: Row | None) -> bool:
        """Return whether a message goes on with what its speaker said before."""
        if before is None or row.answers[0]:
            return False
        one, other = row.view, before.view
        same = (one.kind, one.name) == (other.kind, other.name)
        return same and 0 <= (one.time or 0) - (other.time or 0) < GROUP_SECONDS * 1000

    def draw_from(self, number: int) -> list:
        """Draw the rows from this one on, which are the last; return their pieces."""
        pieces: list = []
        for n in range(number, len(self.rows)):
            drawn = self.draw(n)
            self.sizes.append(lines_of(drawn))
            pieces += drawn
        return pieces

    def draw_before(self, count: int) -> list:
        """Draw so many more rows before the first that is drawn; return their pieces."""
        last, self.first = self.first, max(0, self.first - count)
        drawn = [self.draw(n) for n in range(self.first, last)]
        self.sizes[:0] = map(lines_of, drawn)
        return [piece for pieces in drawn for piece in pieces]

    def redraw(self, number: int) -> tuple[int, int, list]:
        """Draw a row again; return where it was, how many lines it had, and its pieces."""
        line, pieces = self.line_of(number), self.draw(number)
        before = self.sizes[number - self.first]
        self.sizes[number - self.first] = lines_of(pieces)
        return line, before, pieces

    @property
    def newest(self) -> int:
        """The time of the newest message, by the server's clock."""
        last = (row.view for row in self.rows[-ROWS_DRAWN:])
        return max((view.time or 0 for view in last if view.kind in chat.SPOKEN), default=0)

    def speakers(self) -> list[str]:
        """Return the names of the users who spoke here, the last one first."""
        spoken = (row.view for row in reversed(self.rows) if row.view.kind == chat.MESSAGE)
        return list(dict.fromkeys(view.name for view in spoken if not view.mine))


def title_text(server: Server | None, room: RoomInfo | None, unread: int) -> str:
    """Return the title, such as "(3) #tea - alice - server": a task bar shows its beginning."""
    parts = [shorter(room.name, NAME_SHOWN)] if room else []
    parts += [server.nick, server.address] if server else []
    return (f"({unread}) " if unread else "") + " \u2013 ".join([*filter(None, parts), "chat"])


def status_text(server: Server | None, now: float) -> str:
    if server is None:
        return "not connected"
    if server.ready:
        away = f", away: {server.away}" if server.away else ""
        return f"connected to {server.address} as {server.nick}{away}"
    if server.doubted:
        return f"{server.address} has a certificate that is not trusted"
    if server.retry_at:
        seconds = max(0, round(server.retry_at - now))
        why = server.status.partition(WHY_AGAIN)[0]
        return f"{why}{WHY_AGAIN} in {seconds} s"
    return server.status or f"{server.phase} {server.address}"


def waiting_text(server: Server | None) -> str:
    if server is None or not server.waiting:
        return ""
    counts = {"waiting": server.waiting - server.parked, "not sent": server.parked}
    told = [f"{chat.counted(count, 'message')} {how}" for how, count in counts.items() if count]
    return ", ".join(told)


def placeholder_text(server: Server | None, room: RoomInfo | None) -> str:
    if room is None:
        return "Join a channel to write: /join #lobby"
    name = shorter(room.name, NAME_SHOWN)
    where = name if room.channel else f"to {name}"
    if server is None or not server.ready:
        return f"Message {where}, sent once we are connected"
    return f"Message {where}"


def member_order(person: chat.Person) -> tuple:
    """Return the place of a member in the list: the highest rank first, then by name."""
    symbols = "~&@%+"
    rank = symbols.find(person.rank[:1]) if person.rank else len(symbols)
    return rank if rank >= 0 else len(symbols), key_of(person.name), person.name


def member_text(person: chat.Person, me: str) -> str:
    bot = " (bot)" if person.bot else ""
    away = " (away)" if person.away else ""
    you = " (you)" if person.name == me else ""
    return f"{person.rank[:1]}{shorter(person.name, NAME_SHOWN)}{you}{bot}{away}"


def sidebar_text(room: RoomInfo) -> str:
    draft = "\u270e " if room.draft else ""
    muted = "\u2298 " if room.muted else ""
    return f"{draft}{muted}{shorter(room.name, NAME_SHOWN)}"


def count_text(room: RoomInfo) -> str:
    """Return how many messages are new, with a mark if one of them is for the user."""
    if not room.unread:
        return ""
    number = "99+" if room.unread > 99 else str(room.unread)
    return f"@{number}" if room.called and not room.muted else number


# ======================================================================================
# EMOJI
# ======================================================================================
# Emoji are typed by name, as :tea and Tab. The names are Unicode's, and a few that people
# know from elsewhere.

EMOJI_BLOCKS = ((0x1F300, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1FAFF), (0x2600, 0x27BF))
EMOJI_TABLE = (
    "+1 \U0001f44d -1 \U0001f44e thumbsup \U0001f44d thumbsdown \U0001f44e "
    "heart \u2764\ufe0f tada \U0001f389 joy \U0001f602 smile \U0001f642 grin \U0001f600 "
    "wink \U0001f609 cry \U0001f622 sob \U0001f62d think \U0001f914 shrug \U0001f937 "
    "tea \U0001f375 coffee \u2615 beer \U0001f37a cake \U0001f370 check \u2705 cross \u274c "
    "eyes \U0001f440 fire \U0001f525 rocket \U0001f680 ok \U0001f44c pray \U0001f64f "
    "clap \U0001f44f wave \U0001f44b sun \u2600\ufe0f star \u2b50 bug \U0001f41b "
    "warning \u26a0\ufe0f 100 \U0001f4af "
)
EMOJI_KNOWN = dict(re.findall(r"(\S+) (\S+)", EMOJI_TABLE))
EMOJI_OFFERED = 8
EMOJI_WORD = re.compile(r"(?:^|(?<=\s)):([a-z0-9_+-]{2,})$", re.IGNORECASE)
REACTIONS = ("\U0001f44d", "\u2764\ufe0f", "\U0001f602", "\U0001f389", "\U0001f440", "\U0001f622")


@functools.cache
def emoji_names() -> dict[str, str]:
    """Return all names of emoji, and the emoji."""
    names = dict(EMOJI_KNOWN)
    for first, last in EMOJI_BLOCKS:
        for code in range(first, last + 1):
            if name := unicodedata.name(chr(code), ""):
                names.setdefault(name.lower().replace(" ", "_"), chr(code))
    return names


def emoji_for(word: str) -> list[tuple[str, str]]:
    """Return emoji with this text in their names, and the names: the best ones first."""
    word = word.lower()
    names = emoji_names()
    hits = [name for name in names if word in name]
    hits.sort(key=lambda name: (name != word, not name.startswith(word), len(name), name))
    chosen: dict[str, str] = {}
    for name in hits:
        chosen.setdefault(names[name], name)
    return list(chosen.items())[:EMOJI_OFFERED]


# ======================================================================================
# ENGINE
# ======================================================================================
# The same client that runs in a terminal, in a thread of its own. At the end of a turn it
# makes one batch of what has changed since the last one. The next batch is made when Tk has
# taken that: what comes meanwhile is in the rooms, and nothing is sent twice.
#
#   Overview   servers, conversations, settings and transfers, as Tk knows them
#   Watched    the rows and the members of the conversation that the user looks at
#   Wanted     the files that Tk waits for
#   Requests   the requests of Tk: Engine.do("say", ...) has Requests.say() called in the thread
#   SeatScreen the views of the core of one server
#   Engine     the thread and the batches

ROWS_AT_ONCE = 300  # in one batch: inserted in a few milliseconds
ROWS_KEPT = 2000  # of the conversation looked at, while the end is in sight ...
ROWS_TRIMMED = 500  # ... and so many more before the oldest go, all at once
ROWS_READING = 20_000  # at most, while the user reads back
MEMBERS_SECONDS = 0.3  # between two looks at the members of a large channel ...
MEMBERS_LARGE = 300  # ... with so many
CONTEXT_ROWS = 60  # around a message that was looked for
FOUND_MOST = 200
LOOKED_AT = 5000  # messages with the words, or the last ones, of which those from a user are shown
LAST = 2**53  # a time after all others
SEARCH_PART = re.compile(r"(?:from|in|has):\S+")
PROGRESS_SECONDS = 0.25  # between two looks at the files on their way
FETCHES = 2  # of pictures, at once
FETCH_TRIES = 2  # for one picture: the line may break
LEAVE_SECONDS = 0.8  # to hear the server out; the window is gone within a second
SERVER_NUMBERS = itertools.count(1)

Tell = Callable[[Any], None]  # takes an event for the next batch
Place = tuple[chat.Seat, chat.Room]  # a conversation, and its server


def search_words(text: str) -> tuple[str, dict[str, str]]:
    """Return the words of a search and its filters: from:NICK, in:#CHANNEL, has:link."""
    parts = text.split()
    wanted = dict(part.split(":", 1) for part in parts if SEARCH_PART.fullmatch(part))
    return " ".join(part for part in parts if not SEARCH_PART.fullmatch(part)), wanted


def is_wanted(core: chat.ClientCore, view: chat.ViewEvent, wanted: dict[str, str]) -> bool:
    """Return whether a message has the sender, conversation and link that a search wants."""
    name, where = wanted.get("from"), wanted.get("in")
    return (
        (name is None or core.fold(view.name) == core.fold(name))
        and (where is None or core.fold(view.where) == core.fold(where))
        and ("has" not in wanted or bool(LINK.search(view.text)))
    )


def find_kept(
    core: chat.ClientCore, room: chat.Room | None, words: str, wanted: dict[str, str]
) -> list[chat.ViewEvent]:
    """Return kept messages with these words, from a user, in a conversation, with a link."""
    room = core.find(wanted["in"]) if "in" in wanted else room
    if words:
        found = core.stored.find(words, room, FOUND_MOST if not wanted else LOOKED_AT)
    else:
        rooms = [room] if room else core.rooms.values()
        last = chat.ViewEvent(chat.NOTE, time=LAST)
        found = [view for one in rooms for view in core.stored.beside(one, last, LOOKED_AT)]
    return [view for view in found if is_wanted(core, view, wanted)]


def result_of(core: chat.ClientCore, view: chat.ViewEvent) -> tuple[int, str, chat.ViewEvent]:
    """Return a message that was found, with the number and the name of its conversation."""
    room = core.find(view.where)
    return room.id if room else 0, view.where, view


def looks_same(view: chat.ViewEvent, other: chat.ViewEvent) -> bool:
    return view is other or has_id(other, view.id)


def find_view(room: chat.Room, wanted: Callable[[chat.ViewEvent], bool]) -> chat.ViewEvent | None:
    return next((view for view in reversed(room.views) if wanted(view)), None)


def places(seats: Iterable[chat.Seat]) -> Iterator[Place]:
    """Yield all conversations, and for each server the place without one."""
    for seat in seats:
        yield seat, seat.screen.nowhere
        for room in seat.core.rooms.values():
            yield seat, room


def answered_by(
    core: chat.ClientCore, room: chat.Room, view: chat.ViewEvent, by_id: dict[str, chat.ViewEvent]
) -> tuple[str, str]:
    """Return the sender and the beginning of the message that this one answers."""
    if not view.reply:
        return "", ""
    said = by_id.get(view.reply) or find_view(room, lambda one: has_id(one, view.reply))
    said = said or core.stored.message(view.reply)
    return (said.name, said.text[: 4 * EXCERPT]) if said else UNKNOWN_ANSWER


def row_of(
    seat: chat.Seat,
    room: chat.Room,
    view: chat.ViewEvent,
    by_id: dict[str, chat.ViewEvent] | None = None,
    fresh: bool = False,
) -> Row:
    """Return a view as a row, with the state of the message. A fresh one has no reactions yet,
    unless they came before the window was told of it."""
    core, screen, outbox = seat.core, seat.screen, seat.core.outbox
    view = view._replace(line="")
    state = reason = ""
    parked = False
    if view.mine and view.own_id:
        waits = outbox.waiting.get(view.own_id)
        parked = bool(waits and waits.why)
        reason = waits.why if parked else screen.failed.get(view.own_id, "")
        state = FAILED if parked or (reason and not waits) else PENDING if waits else ""
    spoken = view.kind in chat.SPOKEN and view.id
    looked_up = spoken and (view.past or not fresh or view.id in screen.reacted)
    reactions = core.reactions.of(view.id) if looked_up else {}
    told = tuple((emoji, tuple(names)) for emoji, names in reactions.items())
    answers = answered_by(core, room, view, by_id or {})
    missed = bool(view.id) and view.id in screen.missed
    return Row(view, state, reason, parked, told, answers, missed)


def room_info(seat: chat.Seat, room: chat.Room) -> RoomInfo:
    return RoomInfo(
        room.id,
        seat.screen.number,
        room.name,
        room.is_channel and bool(room.name),
        room.topic,
        room.inside or not room.is_channel or not seat.core.ready,
        room.unread,
        room.called,
        room.muted,
        room.draft,
        room.gone,
        tuple(room.typing),
    )


class Overview:
    """Servers, conversations, settings and transfers, as Tk knows them. It compares them with the
    cores, and makes events of the differences."""

    def __init__(self, client: chat.ManyServers):
        self.client = client
        self.servers: tuple[Server, ...] = ()
        self.rooms: dict[int, RoomInfo] = {}
        self.values: tuple[tuple[str, str], ...] = ()  # settings
        self.moving: tuple[Moving, ...] = ()
        self.moving_due = 0.0  # on the loop's clock
        self.touched: set[int] = set()  # numbers of conversations that may have changed
        self.all_touched = True

    def events(self, ended: str | None) -> list:
        """Return the differences; `ended` is why everything is over, None if it is not."""
        servers = self._server_events(ended)
        return [*self._settings(), *servers, *self._room_events(), *self._transfers()]

    def _settings(self) -> list:
        values = tuple((name, self.client.core.setting(name)) for name in chat.SETTINGS)
        if values == self.values:
            return []
        self.values = values
        return [Settings(values)]

    def _server_events(self, ended: str | None) -> list:
        servers = tuple(self._server(seat) for seat in self.client.seats)
        if servers == self.servers and ended is None:
            return []
        shown = [[(one.ready, one.rooms) for one in some] for some in (servers, self.servers)]
        if shown[0] != shown[1]:  # whether the user is in a channel is known while ready
            self.all_touched = True
        self.servers = servers
        return [Servers(servers, ended)]

    def _server(self, seat: chat.Seat) -> Server:
        core, link, outbox = seat.core, seat.link, seat.core.outbox
        return Server(
            seat.screen.number,
            str(link.given),
            core.name,
            link.phase,
            core.ready,
            seat.screen.status,
            seat.screen.statuses,
            link.again.when if link.again else 0.0,
            len(outbox.waiting),
            len(outbox.parked),
            link.certificate.doubted,
            link.certificate.doubt,
            core.away,
            frozenset(what for what in ("redact", "react", "typing", "reply") if core.can(what)),
            core.talk.lines.separate_bytes if core.talk else 0,
            tuple(room.id for room in core.rooms.values()),
        )

    def _room_events(self) -> list:
        if not (self.touched or self.all_touched):
            return []
        known = {place[1].id: place for place in places(self.client.seats)}
        gone = tuple(self.rooms.keys() - known.keys()) if self.all_touched else ()
        wanted = known if self.all_touched else self.touched & known.keys()
        changed = []
        for number in wanted:
            info = room_info(*known[number])
            if info != self.rooms.get(number):
                self.rooms[number] = info
                changed.append(info)
        for number in gone:
            del self.rooms[number]
        self.touched.clear()
        self.all_touched = False
        return [Rooms(tuple(changed), gone)] if changed or gone else []

    def _transfers(self) -> list:
        """Return the state of the transfers; if only numbers have changed, not too often."""
        moving = tuple(
            Moving(seat.screen.number, one.id, one.words(), 100 * one.done // max(1, one.size))
            for seat in self.client.seats
            for one in seat.core.transfers
        )
        if moving == self.moving:
            return []
        loop, ids = self.client.loop, [one.id for one in moving]
        if loop.now < self.moving_due and ids == [one.id for one in self.moving]:
            return []
        self.moving, self.moving_due = moving, loop.now + PROGRESS_SECONDS
        loop.call_later(PROGRESS_SECONDS, chat.do_nothing)  # it begins a turn, which looks again
        return [Progress(moving)]


class Watched:
    """The conversation that the user looks at: which of its rows and members Tk has."""

    def __init__(self, loop: chat.Loop, tell: Tell):
        self.loop, self.tell = loop, tell
        self.seat: chat.Seat | None = None
        self.room: chat.Room | None = None
        self.count = 0  # rows that Tk has, from the first on
        self.back = False  # the user reads back
        self.past: list[chat.ViewEvent] = []  # shown instead of the rows
        self.again = False  # all rows are to be sent
        self.people: dict[str, chat.Person] = {}  # as Tk knows the members
        self.people_due = 0.0  # on the loop's clock
        self.people_changed = False

    def is_at(self, number: int) -> bool:
        return self.room is not None and self.room.id == number

    def update(self, seat: chat.Seat) -> None:
        """At the end of a turn: send what is new where the user looks."""
        room = seat.core.room or seat.screen.nowhere
        again, self.again = self.again, False
        if room is not self.room:
            self.watch(seat, room)
        elif again and not self.past:
            self._send_all()
        self._send_new()
        self._send_people()

    def watch(self, seat: chat.Seat, room: chat.Room) -> None:
        """Send a conversation that is looked at from now on."""
        if self.room is not None:
            self.room.views.reading = False
            self.room.views.trim()
        self.seat, self.room, self.back, self.past = seat, room, False, []
        self.tell(Looked(room.id, seat.screen.number))
        self.people, self.people_changed, self.people_due = {}, True, 0.0
        self._send_all()

    def change(self, room: chat.Room, view: chat.ViewEvent) -> None:
        """Have a row drawn again, if it is in the window."""
        if room is self.room:
            self.tell(Changed(room.id, row_of(self.seat, room, view)))

    def redacted(self, id: str) -> None:
        """Take a message away, also one that is shown from the past."""
        self.past = [view for view in self.past if view.id != id]
        self.tell(Removed(id))

    def ready_changed(self) -> None:
        """Note that the connection stands, or stands no more."""
        self.people_changed = True
        if self.room:
            self.tell(Fetching(self.room.id, again=True))

    def older_came(self, room: chat.Room, count: int) -> None:
        if room is self.room and not self.past:
            views = list(itertools.islice(room.views, count))
            self.count += len(views)
            self._send_rows(START, views)
            came = {view.id for view in views if view.id}
            for view in [view for view in room.views if view.reply in came]:
                self.change(room, view)  # what it answers is known now
            self._tell_fetched(bool(views))

    def _tell_fetched(self, came: bool) -> None:
        """Tell the state of older rows, after some came or none."""
        if self.room.whole and not self.room.views.dropped:
            self.tell(Fetching(self.room.id, "this is the beginning", more=False))
        else:
            self.tell(Fetching(self.room.id, "" if came else "nothing older is here"))

    # Rows

    def _send_all(self) -> None:
        self.room.views.reading = True  # from here on, rows go when the window is told so
        views = list(self.room.views)
        self.count = len(views)
        self._send_rows(RESET, views)

    def _send_rows(self, at: str, views: list, mark: int = -1) -> None:
        room, by_id = self.room, {view.id: view for view in views if view.id}
        rows = tuple(row_of(self.seat, room, view, by_id, at == END) for view in views)
        if rows or at == RESET:
            self.tell(Rows(room.id, at, rows, room.unread_since, room.unread, mark))

    def _send_new(self) -> None:
        """Send what is behind the rows that the window has."""
        views = self.room.views
        if self.past:
            while len(views) > ROWS_READING:
                views.popleft()
            return None
        new = len(views) - self.count
        if new > ROWS_KEPT // 2:
            self.count = len(views)  # soon
            self._trim()
            return self._send_all()
        if new > 0:
            sent = list(itertools.islice(views, self.count, self.count + ROWS_AT_ONCE))
            self.count += len(sent)
            self._send_rows(END, sent)
        if gone := self._trim():
            self.count -= gone
            self.tell(Trimmed(self.room.id, gone))
        return None

    def _trim(self) -> int:
        """Let the oldest rows go if there are too many; return how many went."""
        views = self.room.views
        most = ROWS_READING if self.back else ROWS_KEPT + ROWS_TRIMMED
        excess = len(views) - ROWS_KEPT
        if len(views) <= most or self.count < excess:
            return 0
        for _ in range(excess):
            views.popleft()
        views.dropped = True
        return excess

    # Members

    def _send_people(self) -> None:
        """Send which members have changed; of a large channel not after each join."""
        if not self.people_changed or self.loop.now < self.people_due:
            return
        self.people_changed = False
        core, room = self.seat.core, self.room
        asked = room.asked_people
        core.people.ask(room)  # who is away
        if room.asked_people != asked:
            self.loop.call_soon(self.seat.link.poke)
        known = room.is_channel and core.ready and room.inside
        now = {one.name: one for one in core.people.of(room)} if known else {}
        if len(now) > MEMBERS_LARGE:
            self.people_due = self.loop.now + MEMBERS_SECONDS
            self.loop.call_later(MEMBERS_SECONDS, chat.do_nothing)
        before, self.people = self.people, now
        came = tuple(one for name, one in now.items() if before.get(name) != one)
        went = tuple(before.keys() - now.keys())
        if came or went or not before:
            self.tell(Members(room.id, came, went, not before))

    # Reading back

    def read_back(self, back: bool) -> None:
        """Note that the user reads back, or that the end is in sight again."""
        self.back = back

    def older(self, number: int) -> None:
        """Fetch what is before the first row."""
        room = self.room
        if not self.is_at(number):
            return
        if self.past:
            views = self.seat.core.stored.beside(room, self.past[0], ROWS_MORE)
            self.past[:0] = views
            self._send_rows(START, views)
            return self.tell(Fetching(room.id, more=bool(views)))
        before = self.count
        # Before there is a message, nothing is older: the first page is still to come
        if not any(view.kind in chat.SPOKEN for view in room.views):
            self.tell(Fetching(room.id))
        elif self.seat.link.ask_older(room):
            self.tell(Fetching(room.id, "older ones are coming \u2026", under_way=True))
        elif self.count == before:
            self._tell_fetched(came=False)
        return None

    def newer(self, number: int) -> None:
        """Fetch what follows on rows of the past."""
        if not (self.past and self.is_at(number)):
            return
        views = self.seat.core.stored.beside(self.room, self.past[-1], ROWS_MORE, after=True)
        if not views:
            return self.present(number)
        self.past += views
        return self._send_rows(AFTER, views)

    def present(self, number: int) -> None:
        """Show the newest rows again."""
        if self.past and self.is_at(number):
            self.past, self.back = [], False
            self.again = True

    def clear(self, room: chat.Room) -> None:
        """Begin with an empty page, at the newest rows."""
        if room is self.room:
            if self.past:
                self.past, self.back = [], False
                self._send_all()
            self.tell(Cleared(room.id))

    def jump(self, seat: chat.Seat, room: chat.Room, view: chat.ViewEvent) -> None:
        """Show a message among those around it."""
        if room is not self.room:
            self.watch(seat, room)
        near, self.past = list(room.views), []
        if not any(looks_same(view, one) for one in near):
            near = self.past = seat.core.stored.around(room, view, CONTEXT_ROWS)
        mark = next((n for n, one in enumerate(near) if looks_same(view, one)), -1)
        if not self.past:
            self.count = len(near)
        self._send_rows(PAST if self.past else RESET, near, mark)


class Wanted:
    """The files that Tk waits for: pictures to be shown, and files to be opened once saved."""

    def __init__(self, seats: list[chat.Seat], tell: Tell):
        self.seats, self.tell = seats, tell
        self.pictures: list[tuple[chat.Seat, chat.FileTag, bool]] = []  # True: in full
        self.tries: collections.Counter[tuple] = collections.Counter()
        self.fetching: set[tuple] = set()
        self.opening: dict[str, chat.Transfer] = {}

    def want(self, seat: chat.Seat, files: Iterable[chat.FileTag]) -> None:
        """Fetch these pictures, which are in sight, in place of those that were in sight before."""
        full = [want for want in self.pictures if want[2]]
        self.pictures = [*full, *((seat, file, False) for file in files)]

    def fetch(self) -> None:
        """Fetch a few pictures at a time, from servers that are there."""
        for want in list(self.pictures):
            seat, file, _ = want
            if len(self.fetching) >= FETCHES:
                return
            if want in self.fetching or not seat.core.ready:
                continue
            self.fetching.add(want)
            self.tries[want] += 1
            seat.link.transfers.fetch(file.path, file.size, functools.partial(self._took, want))

    def _took(self, want: tuple[chat.Seat, chat.FileTag, bool], data: bytes, why: str) -> None:
        """Give a picture to Tk; try again if the line may have broken."""
        seat, file, full = want
        self.fetching.discard(want)
        again = not seat.core.ready or self.tries[want] < FETCH_TRIES
        if why and again and seat in self.seats:
            return
        self.pictures = [one for one in self.pictures if one != want]
        del self.tries[want]
        why = label_text(chat.visible(why))  # a server may say anything
        self.tell(Picture(seat.screen.number, file, data, full, why))

    def saved(self, core: chat.ClientCore, id: str) -> None:
        one = self.opening.get(id)
        if one is not None and one not in core.transfers:
            del self.opening[id]
            if os.path.exists(one.path):
                self.tell(Opened(one.path))

    def drop_opening(self) -> None:
        """Stop the transfers of files that would only be opened: their folder goes."""
        for seat in self.seats:
            for one in [one for one in seat.core.transfers if one.id in self.opening]:
                seat.core.transfers.drop(one)


class Requests:
    """The requests of Tk, carried out in the engine's thread. A conversation is known by its
    number, a server likewise; one that is gone is passed over."""

    def __init__(self, engine: "Engine"):
        self.engine, self.wanted = engine, engine.wanted
        watched = engine.watched
        self.older, self.newer, self.present = watched.older, watched.newer, watched.present
        self.back = watched.read_back

    def _place(self, number: int) -> Place | None:
        """Return a conversation and its server by its number."""
        return next((one for one in places(self.engine.seats) if one[1].id == number), None)

    def _seats(self, server: int) -> list[chat.Seat]:
        return [one for one in self.engine.seats if one.screen.number == server]

    def _act(self, number: int, act: Callable[[Any, chat.Room], None]) -> None:
        """Do something to a conversation, and send it."""
        if place := self._place(number):
            seat, room = place
            act(seat.core, room)
            seat.link.poke()
            self.engine.overview.touched.add(number)

    # What the user writes

    def say(self, number: int, text: str, reply: str = "") -> None:
        """Take what was half typed in a conversation: a text or a command; 0: there was none."""
        self.engine.writing = 0
        if place := self._place(number):
            place[1].draft = ""
        self.command(number, text, reply)

    def command(self, number: int, text: str, reply: str = "") -> None:
        """Carry out a command in a conversation, or send a text; what is half typed stays."""
        engine = self.engine
        here = engine.core.room or engine.seat.screen.nowhere
        place = self._place(number) if number else (engine.seat, here)
        if place is None:
            engine.tell(Back(number, text))
            return engine.note("that conversation is closed")
        seat, room = place
        engine.overview.touched.add(number)
        verb, _, rest = text.partition(" ")
        if verb.lower() == "/connect":
            return engine.connect(rest.strip())
        if verb.lower() == "/disconnect":
            engine.look_at(seat)
            return engine.disconnect()
        inside = room if room is not seat.screen.nowhere else None
        seat.link.typed(text.rstrip() if text[:1] == "/" else text, inside, reply)
        if inside and inside in seat.core.rooms.values():
            seat.core.rooms.keep(inside)
        return None

    def draft(self, number: int, text: str) -> None:
        """Keep what is half typed: it outlives the program."""
        if (place := self._place(number)) and place[1].name:
            seat, room = place
            room.draft = "" if chat.is_secret(text) else text
            seat.core.rooms.keep(room)
            if seat.core.store:
                seat.core.store.flush()
            self.engine.overview.touched.add(number)

    def typing(self, number: int, text: str) -> None:
        self.engine.writing = number if text else 0
        if (place := self._place(number)) and place[1].name:
            seat, room = place
            seat.link.typing(room, text)

    def retry(self, number: int, own_id: str) -> None:
        if place := self._place(number):
            seat, _ = place
            seat.core.outgoing.retry(own_id)
            seat.screen.arrived(chat.ViewEvent(chat.ARRIVED, room=number, own_id=own_id))
            seat.link.poke()

    def cancel(self, number: int, own_id: str) -> None:
        self._act(number, lambda core, room: core.outgoing.cancel(own_id))

    def redact(self, number: int, id: str) -> None:
        self._act(number, lambda core, room: core.redact(room, id))

    def react(self, number: int, id: str, emoji: str, on: bool) -> None:
        self._act(number, lambda core, room: core.reactions.send(room, id, emoji, on))

    # Conversations

    def look(self, number: int) -> None:
        if place := self._place(number):
            self.engine.go(*place)

    def close(self, number: int) -> None:
        if (place := self._place(number)) and place[1].name:
            seat, room = place
            seat.link.typed(f"/close {room.name}", room)

    def leave_open(self, number: int) -> None:
        """Leave a channel whose messages stay to be read."""
        if (place := self._place(number)) and place[1].inside:
            seat, room = place
            room.stays = True
            seat.link.typed(f"/part {room.name}", room)

    def mute(self, number: int, on: bool) -> None:
        self._act(number, lambda core, room: core.rooms.mute(room, on))

    def read(self, number: int, when: int = 0) -> None:
        """Note that the user has seen everything in a conversation, or what was said up to a
        time: more may have come since."""

        def act(core: chat.ClientCore, room: chat.Room) -> None:
            times = (view.time or 0 for view in room.views if view.kind in chat.SPOKEN)
            if not when or max(times, default=0) <= when:
                core.rooms.mark_read(room)
            elif room.read(when):
                core.rooms.keep(room)

        self._act(number, act)

    def focus(self, focused: bool) -> None:
        self.engine.core.looked_at = focused

    def jump(self, number: int, view: chat.ViewEvent) -> None:
        if not number:  # it was closed since
            number = self.engine.core.rooms.open(view.where).id
        self.look(number)
        if place := self._place(number):
            self.engine.watched.jump(*place, view)

    def search(self, text: str, number: int = 0) -> None:
        """Look for words in what this client has kept, of one conversation or of all."""
        words, wanted = search_words(text)
        rows: list[tuple[int, str, chat.ViewEvent]] = []
        for seat in self.engine.seats:
            core = seat.core
            room = core.by_id(number) if number and "in" not in wanted else None
            if not number or seat is self.engine.seat or core.by_id(number):
                rows += (result_of(core, view) for view in find_kept(core, room, words, wanted))
        rows.sort(key=lambda row: row[2].time or 0)
        self.engine.tell(Results(text, tuple(rows[-FOUND_MOST:])))

    # Files

    def pictures(self, number: int, files: tuple[chat.FileTag, ...]) -> None:
        if place := self._place(number):
            self.wanted.want(place[0], files)

    def full_picture(self, number: int, file: chat.FileTag) -> None:
        if place := self._place(number):
            self.wanted.pictures.append((place[0], file, True))

    def send_file(self, number: int, path: str) -> None:
        place = self._place(number)
        if place is None or not place[1].name:
            raise chat.Unusable("open a conversation, and send the file there")
        one = chat.Transfer(secrets.token_hex(8), True, place[1].name, path)
        self._act(number, lambda core, room: core.transfers.start(one))

    def save_file(self, number: int, view: chat.ViewEvent, path: str, opens: bool = False) -> None:
        """Save the file that a message links to; `opens`: Tk opens it then."""
        if place := self._place(number):
            core, before = place[0].core, place[0].core.transfers[:]
            self._act(number, lambda core, room: core.transfers.save(room, view, path))
            for one in core.transfers if opens else ():
                if one not in before:  # it was not refused
                    self.wanted.opening[one.id] = one

    def stop_file(self, server: int, id: str) -> None:
        for seat in self._seats(server):
            for one in [one for one in seat.core.transfers if one.id == id]:
                seat.core.transfers.drop(one)
                seat.link.poke()

    # Servers and settings

    def set(self, name: str, value: str) -> None:
        """Change a setting: the same as /set."""
        chat.change_setting(self.engine.core, name, value)

    def trust(self, server: int, trusted: bool) -> None:
        """Answer the question whether a certificate is the right one."""
        for seat in self._seats(server):
            if trusted:
                seat.link.typed("/trust")
            else:
                seat.link.leave(at_once=True)

    def server(self, server: int, command: str) -> None:
        """Give a command to a server, in the place without a conversation."""
        for seat in self._seats(server):
            self.engine.look_at(seat)
            self.command(seat.screen.nowhere.id, command)

    def register(self, address: str, secret: str) -> None:
        """Register the name as an account, once the server has it."""
        for seat in [one for one in self.engine.seats if str(one.link.given) == address]:
            seat.screen.secret = secret
            seat.screen.register()

    def connect(self, options: chat.ClientOptions) -> None:
        """Connect to one more server, or look at it if it is there."""
        engine = self.engine
        same = (seat for seat in engine.seats if str(seat.link.given) == str(options.target))
        known = next(same, None)
        engine.look_at(known or engine.add(options))
        if known and not known.core.ready:
            self._try_again(known, options)
        elif known:
            name = known.core.name
            engine.note(f"you are connected to {options.target} as {name}; /nick changes that")

    @staticmethod
    def _try_again(seat: chat.Seat, options: chat.ClientOptions) -> None:
        """Connect to a server again, with what the user answered to its question."""
        core = seat.core
        core.name = core.wanted_name = options.name
        core.password = options.password or core.password
        core.me.login = options.login or core.me.login
        seat.link.reconnect()

    def leave(self, reason: str, drafts: dict[int, str]) -> None:
        """Keep what is half typed, and leave all servers."""
        for number, text in drafts.items():
            self.draft(number, text)
        self.wanted.drop_opening()
        self.engine.leave(reason)


class SeatScreen(chat.Screen):
    """The state of the window about one server, in the engine's thread."""

    def __init__(self, engine: "Engine", seat: chat.Seat):
        super().__init__(seat.core)
        self.engine, self.seat = engine, seat
        self.number = next(SERVER_NUMBERS)
        self.status, self.statuses = "", 0
        self.failed: dict[str, str] = {}  # own ids of messages that are given up, and why
        self.was_ready = self.told_why = False
        self.secret = ""  # of an account that is to be registered
        self.missed: dict[str, None] = {}  # ids of what was said while we were away
        self.reacted: dict[str, None] = {}  # ids of the messages that got a reaction last
        self.last_removed = ""  # id of the message that was redacted last
        self.core.results = self._results

    @property
    def watched(self) -> Watched:
        return self.engine.watched

    def take(self, views: Iterable[chat.ViewEvent]) -> None:
        self._note_ready()
        self._note_removed()
        super().take(views)
        self.engine.overview.touched.update(view.room for view in views if view.room)

    def _note_ready(self) -> None:
        """Note that a connection stands, or stands no more."""
        if self.core.ready == self.was_ready:
            return
        self.was_ready = self.core.ready
        self.watched.ready_changed()
        if self.was_ready and self.told_why:
            self.told_why = False
            self.keep(chat.ViewEvent(chat.NOTE, f"connected to {self.seat.link.target}"))
        self.register()

    def _note_removed(self) -> None:
        """Note messages that were redacted since: the core tells only of those in its rooms."""
        removed, last = self.core.known.redacted, self.last_removed
        self.last_removed = next(reversed(removed), "")
        for id in itertools.takewhile(lambda id: id != last, reversed(removed)):
            self.watched.redacted(id)

    def register(self) -> None:
        """Register the account that the user wants, once the server has the name."""
        if self.secret and self.core.ready:
            secret, self.secret = self.secret, ""
            self.engine.submit(self._register_now, secret)

    def _register_now(self, secret: str) -> None:
        chat.do_register(self.core, secret)
        self.seat.link.poke()

    def call(self, view: chat.ViewEvent) -> None:
        room = self.room_of(view)
        on = (self.core.setting(name) == "on" for name in ("bell", "desktop"))
        self.engine.tell(Called(room.id, view.name, view.text, room.name, *on))

    def _said(self, view: chat.ViewEvent) -> None:
        if not view.where:
            self.keep(view)
        if self.seat.link.phase != chat.ONLINE or view.past:
            chat.remember(self.missed, view.id)

    def _status(self, view: chat.ViewEvent) -> None:
        self.status = view.text
        self.statuses += 1
        if self.seat.link.again and not self.told_why:
            self.told_why = True
            self.keep(chat.ViewEvent(chat.NOTE, view.text.partition(WHY_AGAIN)[0]))

    def _failed(self, view: chat.ViewEvent) -> None:
        room = self.room_of(view)
        said = find_view(room, lambda one: one.own_id == view.own_id)
        if said is None:
            return self.keep(view._replace(kind=chat.NOTE, own_id=""))
        why = view.text.partition(f": {said.text.strip('*')}")[0]
        why = self.core.outbox.parked.get(view.own_id) or why
        self.failed[view.own_id] = why
        if room is not self.watched.room:  # there, and where the user looks
            text = f"not sent to {room.name}: {excerpt(said.text)} ({why})"
            self.keep(chat.ViewEvent(chat.NOTE, text))
        return self.watched.change(room, said)

    def arrived(self, view: chat.ViewEvent) -> None:
        """Draw a message of the user's own again: it has arrived, or is on its way once more."""
        room = self.room_of(view)
        self.failed.pop(view.own_id, None)
        if said := find_view(room, lambda one: one.own_id == view.own_id):
            self.watched.change(room, said)

    def _reacted(self, view: chat.ViewEvent) -> None:
        room = self.room_of(view)
        chat.remember(self.reacted, view.id)
        if said := find_view(room, lambda one: has_id(one, view.id)):
            self.watched.change(room, said)

    def _reset(self, view: chat.ViewEvent) -> None:
        if self.room_of(view) is self.watched.room:
            self.watched.again = True  # some rows are gone

    def _older(self, view: chat.ViewEvent) -> None:
        self.watched.older_came(self.room_of(view), chat.whole_number(view.text) or 0)

    def _read_elsewhere(self, view: chat.ViewEvent) -> None:
        room = self.room_of(view)
        self.engine.tell(Read(room.id, room.read_time))

    def _people(self, view: chat.ViewEvent) -> None:
        self.watched.people_changed = True
        if view.text:
            names = sorted(view.text.split(", "), key=key_of)
            self.engine.tell(Page(f"Members of {view.where}", "\n".join(names)))

    def _results(self, title: str, views: list[chat.ViewEvent]) -> None:
        self.engine.tell(Results(title, tuple(result_of(self.core, view) for view in views)))

    def _back(self, view: chat.ViewEvent) -> None:
        self.engine.tell(Back(self.room_of(view).id, view.text))

    ROWS = {
        **dict.fromkeys((*chat.FOLDED, chat.SERVER_TEXT, chat.NOTE), chat.Screen.keep),
        chat.FAILED: _failed,
    }
    TAKEN = {
        **dict.fromkeys(chat.SPOKEN, _said),
        chat.STATUS: _status,
        chat.ARRIVED: arrived,
        chat.REACTED: _reacted,
        **dict.fromkeys((chat.REMOVED, chat.RESET), _reset),
        chat.OLDER: _older,
        chat.PEOPLE: _people,
        chat.TRANSFER: lambda self, view: self.engine.wanted.saved(self.core, view.own_id),
        chat.CLEARED: lambda self, view: self.watched.clear(self.room_of(view)),
        chat.BACK: _back,
        chat.PAGE: lambda self, view: self.engine.tell(Page(view.name, view.text)),
        chat.QR_CODE: lambda self, view: self.engine.tell(Code(view.text)),
        chat.READ_ELSEWHERE: _read_elsewhere,
    }


class Engine(chat.ManyServers):
    """The client; its screen is a queue of batches. `wake` is called when there is one."""

    leave_seconds = LEAVE_SECONDS

    def __init__(self, options: chat.ClientOptions, wake: Callable[[], None]):
        self.wake = wake
        self.batches: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.out: list[Any] = []  # events that are to go, in order
        self.under_way = False  # a batch is, to Tk
        self.writing = 0  # the conversation for which a text is begun in the field
        self.ended: str | None = None
        self.calls: collections.deque[tuple[Callable, tuple]] = collections.deque()  # of Tk
        self.lock = threading.Lock()  # guards `alive`: nothing is handed to a closed loop
        self.alive = True
        super().__init__(options)
        self.overview = Overview(self)
        self.watched = Watched(self.loop, self.tell)
        self.wanted = Wanted(self.seats, self.tell)
        self.requests = Requests(self)
        self.loop.turn_ends = self.publish
        self.thread: threading.Thread | None = None

    # Called by Tk

    def start(self) -> None:
        """Start the thread. Raises OSError if there can be none."""
        try:
            self.thread = chat.start_thread(self._work)
        except OSError:
            self._finish()
            raise

    def submit(self, act: Callable[..., Any], *values: Any) -> bool:
        """Have the engine's thread call this; return whether it is still there."""
        with self.lock:
            if self.alive:
                self.calls.append((act, values))
                self.loop.call_soon_threadsafe(self._take_call)
            return self.alive

    def do(self, name: str, *values: Any) -> bool:
        """Have the engine's thread call one of the methods of Requests."""
        return self.submit(getattr(self.requests, name), *values)

    # The thread

    def _take_call(self) -> None:
        """Call what Tk wants; a refusal is told, and a bug does not end the engine."""
        act, values = self.calls.popleft()
        try:
            act(*values)
        except chat.ChatError as refusal:
            self.note(str(refusal))
        except Exception:
            log.exception("a bug, please report it")

    def _work(self) -> None:
        try:
            self.open_others()
            self.run()
        except Exception as error:
            log.exception("a bug, please report it")
            self.ended = f"internal error: {error}"
        finally:
            self._finish()

    def _finish(self) -> None:
        """Close all, for the next engine."""
        with self.lock:
            self.alive = False
        for act, values in self.calls:  # texts that came too late are not lost
            if act == self.requests.say:
                self.tell(Back(*values[:2]))
        self.took()
        self.publish()
        for seat in self.seats:
            if seat.link.conn:
                seat.link.conn.sock.close()
            if seat.core.outbox.rows:
                seat.core.outbox.rows.close()  # another engine may want it
        self.close()
        self.loop.close()

    def over(self, reason: str) -> None:
        self.ended = reason
        super().over(reason)

    def screen_for(self, seat: chat.Seat) -> SeatScreen:
        seat.core.reads_at_once = False  # the window says what has been read
        seat.core.stays_when_left = False  # it keeps what was typed there
        return SeatScreen(self, seat)

    def is_writing(self, seat: chat.Seat) -> bool:
        return seat.core.room is not None and seat.core.room.id == self.writing

    # Batches

    def tell(self, event: Any) -> None:
        """Take an event for the next batch."""
        self.out.append(event)

    def publish(self) -> None:
        """At the end of a turn: make a batch, if Tk has taken the last one."""
        self.wanted.fetch()
        if self.under_way:
            return
        overview = self.overview.events(self.ended)
        self.watched.update(self.seat)
        events, self.out = (*overview, *self.out), []
        if events:
            self.under_way = True
            self.batches.put(events)
            self.wake()

    def took(self) -> None:
        self.under_way = False

    # What the cores have to show

    def show(self, views: list[chat.ViewEvent]) -> None:
        self.show_of(self.seat, views)

    def show_of(self, seat: chat.Seat, views: list[chat.ViewEvent]) -> None:
        seat.screen.take(views)


# ======================================================================================
# REMEMBERED
# ======================================================================================
# A user who comes back finds the window as it was, and the servers that were used: facts in
# client.db that belong to no server.

RECENT_SERVERS = 8


class Remembered:
    """Recent names and servers, and the look of the window; without a folder, for this run."""

    def __init__(self, folder: pathlib.Path | None):
        try:
            db = chat.open_client_file(folder)
            with chat.patience_with(db):
                self.store = chat.ClientStore(db)
        except (chat.Unusable, sqlite3.Error):  # the engine will say so
            self.store = chat.ClientStore(chat.open_client_file(None))
        if folder:
            self._take_over(folder / "window.json")

    def _take_over(self, path: pathlib.Path) -> None:
        """Move what an earlier version kept in a file to client.db."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            for name, value in json.loads(path.read_text("utf-8")).items():
                self.write(name, value)
            path.unlink()

    def write(self, name: str, value: Any) -> None:
        self.store.keep_fact(name, json.dumps(value))
        with chat.patience_with(self.store.db):
            self.store.flush()

    def load(self) -> tuple[str, str]:
        """Return the name and the server of the last time, "" each if not known."""
        name, server = (self.recent() or [["", ""]])[0]
        return name, server

    def save(self, name: str, server: str) -> None:
        recent = [[name, server], *(one for one in self.recent() if one[1] != server)]
        self.write("recent", recent[:RECENT_SERVERS])

    def recent(self) -> list[list[str]]:
        """Return names and servers that were used, the last ones first."""
        kept = chat.parsed(self.store.fact("recent"), list)
        return [list(map(str, one)) for one in kept if isinstance(one, list) and len(one) == 2]

    def close(self) -> None:
        self.store.db.close()

    def words(self, name: str) -> dict[str, Any]:
        """Return a part of what is remembered, {} if there is none."""
        return chat.parsed(self.store.fact(name), dict)


# ======================================================================================
# MODEL
# ======================================================================================
# What Tk knows of the engine. Widgets show it, and the acts of the user go through it: no
# widget is asked for what the model knows.


class Model:
    """The engine, and what it has told: servers, conversations, settings, and where the user is."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.servers: tuple[Server, ...] = ()
        self.rooms: dict[int, RoomInfo] = {}
        self.values: dict[str, str] = {}  # settings
        self.here = 0  # the conversation that is looked at ...
        self.server_here = 0  # ... and its server

    def start(self, engine: Engine) -> None:
        """Begin with an engine: its conversations are other ones than those of the last."""
        engine.start()
        self.engine, self.servers, self.here = engine, (), 0
        self.rooms.clear()

    def stop(self, reason: str) -> None:
        self.engine = None
        ended = {"ready": False, "phase": chat.ENDED, "status": reason or "not connected"}
        self.servers = tuple(server._replace(**ended) for server in self.servers)

    def do(self, name: str, *values: Any) -> bool:
        """Have the engine do something; return whether there is one."""
        return self.engine is not None and self.engine.do(name, *values)

    def command(self, text: str) -> bool:
        """Give a command to the conversation that is looked at."""
        return self.do("command", self.here, text)

    @property
    def server(self) -> Server | None:
        """The server that is looked at."""
        return next((one for one in self.servers if one.number == self.server_here), None)

    @property
    def me(self) -> str:
        """The name of the user on that server."""
        return self.server.nick if self.server else ""

    @property
    def room(self) -> RoomInfo | None:
        """The conversation that is looked at, if one is."""
        room = self.rooms.get(self.here)
        return room if room and room.name else None

    def unread(self, but: int) -> int:
        """Return the number of messages that were not read, but in one conversation."""
        rooms = (room for room in self.rooms.values() if not room.muted and room.number != but)
        return sum(room.unread for room in rooms)

    def take(self, event: Servers | Rooms | Looked | Settings) -> None:
        """Take what the engine tells; the widgets are told by the window."""
        match event:  # A SyntaxError here? This program needs Python 3.11 or newer
            case Servers():
                self.servers = event.servers
            case Rooms():
                for number in event.gone:
                    self.rooms.pop(number, None)
                self.rooms.update((room.number, room) for room in event.changed)
            case Looked():
                self.here, self.server_here = event.room, event.server
            case Settings():
                self.values = dict(event.values)


# ======================================================================================
# TIMERS
# ======================================================================================
# Tk's loop is never waited in. What comes later, from a thread or by a signal is a call that
# Tk makes.

POLL_MS = 30  # where Tk cannot watch a socket, between two looks for a wake-up


class Timers:
    """Calls that Tk makes later. Each is known by its purpose."""

    def __init__(self, root: tk.Tk):
        self.root = root
        self.ids: dict[str, str] = {}

    def later(self, what: str, milliseconds: int, act: Callable[[], Any]) -> None:
        """Call back later; a call for the same purpose is put off."""
        self.cancel(what)
        self.ids[what] = self.root.after(milliseconds, self._due, what, act)

    def soon(self, what: str, act: Callable[[], Any]) -> None:
        """Call back once, when Tk has nothing else to do."""
        if not self.waits(what):
            self.ids[what] = self.root.after_idle(self._due, what, act)

    def _due(self, what: str, act: Callable[[], Any]) -> None:
        self.ids.pop(what, None)
        act()

    def waits(self, what: str) -> bool:
        return what in self.ids

    def cancel(self, what: str) -> None:
        if timer := self.ids.pop(what, ""):
            self.root.after_cancel(timer)

    def close(self) -> None:
        for what in list(self.ids):
            self.cancel(what)


def send_wake_up(writer: socket.socket) -> None:
    with contextlib.suppress(OSError):  # full of wake-ups already, or closed
        writer.send(b"\0")


class Waker:
    """Wakes Tk from other threads and by signals, by a byte on a socket, and then calls `woken`."""

    def __init__(self, root: tk.Tk, woken: Callable[[], None]):
        self.root, self.woken = root, woken
        self.timer = ""
        self.for_signals = False
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)
        self.wake = functools.partial(send_wake_up, self.writer)  # it refers to no object of Tk
        self.watched = hasattr(root.tk, "createfilehandler")
        if self.watched:
            root.tk.createfilehandler(self.reader, tk.READABLE, self._readable)
        else:
            self._poll()

    def _readable(self, *_: Any) -> None:
        """Call `woken` if bytes have come. An exception in a file handler would end Tk's loop."""
        try:
            if self._read():
                self.woken()
        except Exception:
            log.exception("a bug, please report it")

    def _read(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(self.reader.recv(4096))
        return False

    def _poll(self) -> None:
        self._readable()
        self.timer = self.root.after(POLL_MS, self._poll)

    def wake_on_signals(self) -> None:
        """Let signals wake Tk. It waits in C, where Python's signal handlers do not run, until the
        byte that a signal writes has come."""
        self.for_signals = True
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Close the sockets. Tk would spin for ever on a closed one that it still watched."""
        if self.watched:
            self.root.tk.deletefilehandler(self.reader)
        elif self.timer:
            self.root.after_cancel(self.timer)
        if self.for_signals:
            signal.set_wakeup_fd(-1)
        self.reader.close()
        self.writer.close()


class Jobs:
    """Work that may take a while, each piece in a thread of its own; its result is handled on
    Tk's. No Tk object goes to a thread, which could be the last to hold it, and would free it."""

    def __init__(self, wake: Callable[[], None]):
        self.wake = wake
        self.answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.waiting: dict[int, Callable[[Any], None]] = {}
        self.numbers = itertools.count()

    def start(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do the job in a thread, and then call back with its result."""
        number, answers, wake = next(self.numbers), self.answers, self.wake
        self.waiting[number] = then

        def work() -> None:
            with contextlib.suppress(Exception):  # a look at the system, best effort
                answers.put((number, job()))
                wake()

        try:
            chat.start_thread(work)
        except OSError:
            del self.waiting[number]

    def take_answers(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                number, answer = self.answers.get_nowait()
                self.waiting.pop(number)(answer)


# ======================================================================================
# LOOK
# ======================================================================================
# ttk's styles do not reach Text widgets and menus, so all are given their colours from one
# palette. Every distance is a multiple of the font's height: a screen of 192 dots an inch
# is the same picture as one of 96.


class Colours(NamedTuple):
    """One theme. Text on its ground has a contrast of at least 4.5 to 1."""

    ground: str = "#f3f4f7"
    paper: str = "#ffffff"
    ink: str = "#1f2430"
    dim: str = "#626977"
    pale: str = "#8b92a0"
    edge: str = "#dde1e8"
    thumb: str = "#c3c9d4"
    accent: str = "#2563d9"
    accent_over: str = "#1d4fb0"
    on_accent: str = "#ffffff"
    selected: str = "#cfe0fb"
    chosen: str = "#eef3fc"
    good: str = "#23804a"
    waiting: str = "#a66a00"
    bad: str = "#c5303a"
    mention: str = "#fff3cd"
    chip: str = "#e9edf4"
    found: str = "#ffe08a"
    names: tuple[str, ...] = (
        *("#c0392b", "#a84c08", "#806600", "#47740e", "#157a3b", "#0f766e"),
        *("#0b6e8a", "#1d4ed8", "#4f46e5", "#7e22ce", "#a21caf", "#be185d"),
    )


LIGHT = Colours()
DARK = Colours(
    ground="#1b1e25",
    paper="#22262f",
    ink="#e4e7ee",
    dim="#9aa3b4",
    pale="#7d8698",
    edge="#454c5b",
    thumb="#4b5262",
    accent="#7aaefc",
    accent_over="#a3c7fd",
    on_accent="#10141c",
    selected="#34486d",
    chosen="#2a303c",
    good="#5fd38d",
    waiting="#e8b04a",
    bad="#ff8a85",
    mention="#453a1c",
    chip="#323846",
    found="#6b5518",
    names=(
        *("#ff8f85", "#f5a468", "#d8bb55", "#a3cb6c", "#66d494", "#55cfc2"),
        *("#5cc6e6", "#86b4ff", "#aab0ff", "#c9a2ff", "#e593ef", "#ff93bf"),
    ),
)
NO_SIGN = "\U0010fffd"  # for which no font has a picture
# Emoji beyond the basic plane; draws_emoji() is about all of them
EMOJI = re.compile("[\U0001f000-\U0001faff]")
SAFE_XFT = 20305  # libXft 2.3.5 draws coloured glyphs; before, one ended the whole program
SMALLEST, LARGEST = chat.SETTINGS["size"].range  # points of a font
PROBE_SECONDS = 2
LOOK_SETTINGS = ("theme", "font", "size")


def draws_emoji(root: tk.Tk) -> bool:
    """Return whether emoji may be drawn. Where not, a message with one would close the window, with
    an X error that cannot be caught."""
    if root.tk.call("tk", "windowingsystem") != "x11":
        return True
    try:
        return ctypes.CDLL("libXft.so.2").XftGetVersion() >= SAFE_XFT  # Tk has loaded it
    except (OSError, AttributeError):
        return True  # fonts of the X server itself have one colour


def spelled(text: str) -> str:
    """Return `text` with the names of emoji in place of their pictures."""
    return "".join(
        f"[{unicodedata.name(c, 'a sign').lower()}]"
        if ord(c) > 0xFFFF or unicodedata.category(c) == "So"
        else c
        for c in text
    )


def output_of(*command: str) -> str:
    """Return the output of a program of the system; "" if there is no such program."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, text=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout


def windows_is_dark() -> bool:
    import winreg

    path = r"Software\Microsoft\Windows\CurrentVersion\Themes\Personalize"
    try:
        with winreg.OpenKey(winreg.HKEY_CURRENT_USER, path) as key:
            return winreg.QueryValueEx(key, "AppsUseLightTheme")[0] == 0
    except OSError:
        return False


def system_is_dark() -> bool:
    """Return whether the desktop is dark, as far as it tells. May take a second."""
    if os.name == "nt":
        return windows_is_dark()
    if sys.platform == "darwin":
        return "Dark" in output_of("defaults", "read", "-g", "AppleInterfaceStyle")
    if theme := os.environ.get("GTK_THEME", ""):
        return theme.lower().endswith(("dark", ":dark"))
    schema = "org.gnome.desktop.interface"
    scheme = output_of("gsettings", "get", schema, "color-scheme")
    return "dark" in (scheme or output_of("gsettings", "get", schema, "gtk-theme")).lower()


class Look:
    """The fonts and colours of one window."""

    def __init__(self, root: tk.Tk, theme: str = "light", family: str = "", size: str = ""):
        self.root = root
        self.colours = LIGHT
        self.safe: Callable[[str], str] = str if draws_emoji(root) else spelled
        self.reorders = root.tk.call("tk", "windowingsystem") == "x11"  # see RIGHT TO LEFT
        self.signs: dict[str, bool] = {}  # emoji: whether a font has them
        self.spells = False  # none has one of them
        self.usual_font = tkfont.nametofont("TkDefaultFont", root)
        self.usual = self.usual_font.actual()
        self.font, self.bold, self.large, self.small, self.tiny, self.italic, self.fixed = (
            tkfont.nametofont(name, root).copy()
            for name in ("TkDefaultFont",) * 6 + ("TkFixedFont",)
        )
        self.followers: list[Callable[[], None]] = []
        self.style = ttk.Style(root)
        self.style.theme_use("clam")
        self.dark_system = False
        self.theme, self.family, self.size = theme, family, self.points(size)
        self.apply()

    # What is wanted

    def points(self, size: str) -> int:
        """Return a size in points; the system's where none is named."""
        usual = abs(int(self.usual["size"])) or 10
        return max(SMALLEST, min(LARGEST, chat.whole_number(size) or usual))

    def want(self, theme: str, family: str, size: str) -> bool:
        """Take the settings; return whether they change something."""
        wanted = (theme, family, self.points(size))
        if wanted == (self.theme, self.family, self.size):
            return False
        self.theme, self.family, self.size = wanted
        self.apply()
        return True

    def system(self, dark: bool) -> None:
        if dark != self.dark_system:
            self.dark_system = dark
            self.apply()

    def drawable(self, text: str) -> str:
        """Return a text with the names of the emoji that cannot be drawn."""
        if text.isascii() or not (self.reorders and EMOJI.search(text)):
            return text
        return EMOJI.sub(lambda sign: self._spelled(sign[0]), self.safe(text))

    def has(self, sign: str) -> bool:
        """Return whether a font has a sign: else it is as wide as one that does not exist."""
        if sign not in self.signs:
            measure = self.usual_font.measure
            self.signs[sign] = measure(sign) != measure(NO_SIGN)
        return self.signs[sign]

    def _spelled(self, sign: str) -> str:
        if self.has(sign):
            return sign
        self.spells = True
        return spelled(sign)

    def ordered(self, text: str, base: int = 0) -> str:
        """Return a text of one line in the order in which it is seen. Names begin at the left."""
        return seen_line(text, base) if self.reorders and RIGHT_TO_LEFT.search(text) else text

    def seen(self, text: str, base: int = 0) -> str:
        """Return a text of one line as it is drawn. Labels begin at the left."""
        return self.drawable(self.ordered(text, base))

    def part(self, share: float) -> int:
        """Return a distance, as a share of the height of a line."""
        return max(1, round(share * self.em))

    def follow(self, callback: Callable[[], None]) -> None:
        """Call back now, and whenever fonts or colours change."""
        self.followers.append(callback)
        callback()

    def apply(self) -> None:
        dark = self.theme == "dark" or (self.theme == "auto" and self.dark_system)
        self.colours = DARK if dark else LIGHT
        self._size_fonts()
        self._style_all()
        for callback in self.followers:
            callback()

    def _size_fonts(self) -> None:
        family = self.family or self.usual["family"]
        for font, share in (
            (self.font, 1.0),
            (self.bold, 1.0),
            (self.italic, 1.0),
            (self.large, 1.3),
            (self.small, 0.9),
        ):
            font.configure(family=family, size=max(SMALLEST, round(self.size * share)))
        self.bold.configure(weight="bold")
        self.large.configure(weight="bold")
        self.italic.configure(slant="italic")
        self.fixed.configure(size=max(SMALLEST, round(self.size * 0.9)))
        self.tiny.configure(size=1)
        self.em = self.font.metrics("linespace")  # the height of a line, for all distances

    # Styles

    def _style_all(self) -> None:
        c, style, root = self.colours, self.style, self.root
        root.configure(background=c.ground)
        style.configure(".", background=c.ground, foreground=c.ink, font=self.font)
        style.configure(".", troughcolor=c.ground, focuscolor=c.accent, bordercolor=c.edge)
        style.configure("Card.TFrame", background=c.paper)
        edge = {"bordercolor": c.thumb, "lightcolor": c.paper, "darkcolor": c.paper}
        style.configure("Raised.Card.TFrame", relief="raised", borderwidth=2, **edge)
        style.configure("TPanedwindow", background=c.edge)
        style.configure("Sash", sashthickness=self.part(0.3), gripcount=0, background=c.edge)
        style.configure("Sash", bordercolor=c.edge, lightcolor=c.edge, darkcolor=c.edge)
        self._style_labels()
        self._style_buttons()
        self._style_fields()
        self._style_lists()

    def _style_labels(self) -> None:
        c, style = self.colours, self.style
        style.configure("TLabel", background=c.ground, foreground=c.ink)
        style.configure("Card.TLabel", background=c.paper, foreground=c.ink)
        style.configure("Bad.Card.TLabel", foreground=c.bad)
        style.configure("Dim.Card.TLabel", foreground=c.dim, font=self.small)
        style.configure("Large.TLabel", font=self.large)
        style.configure("Large.Card.TLabel", font=self.large)
        style.configure("Dim.TLabel", foreground=c.dim, font=self.small)
        style.configure("Banner.TLabel", background=c.chip, foreground=c.ink, font=self.small)
        style.configure("Banner.TFrame", background=c.chip)

    def _style_buttons(self) -> None:
        c, style = self.colours, self.style
        room = (self.part(0.7), self.part(0.3))
        flat = {
            "relief": "flat",
            "borderwidth": 1,
            "padding": room,
            "focuscolor": c.accent,
            "width": 0,
        }
        for name, ground, ink, over in (
            ("TButton", c.paper, c.ink, c.selected),
            ("Accent.TButton", c.accent, c.on_accent, c.accent_over),
            ("Plain.TButton", c.ground, c.ink, c.selected),
            ("Banner.TButton", c.chip, c.ink, c.selected),
        ):
            edge = c.edge if name == "TButton" else ground
            style.configure(name, background=ground, foreground=ink, **flat)
            style.configure(name, bordercolor=edge, lightcolor=ground, darkcolor=ground)
            changed = [("pressed", over), ("active", over), ("focus", over)]
            style.map(name, background=changed, lightcolor=changed, darkcolor=changed)
            style.map(name, foreground=[("disabled", c.pale)])
            style.map(name, bordercolor=[("focus", c.accent)])
        style.configure("Accent.TButton", focuscolor=c.on_accent)
        small = (self.part(0.35), self.part(0.15))
        style.configure("Plain.TButton", padding=small)
        style.configure("Banner.TButton", padding=small, font=self.small)

    def _style_fields(self) -> None:
        c, style = self.colours, self.style
        style.configure("TEntry", fieldbackground=c.paper, foreground=c.ink)
        style.configure("TEntry", bordercolor=c.edge, lightcolor=c.paper, darkcolor=c.paper)
        style.configure("TEntry", insertcolor=c.ink, selectbackground=c.selected)
        style.configure("TEntry", selectforeground=c.ink, padding=self.part(0.3))
        style.map("TEntry", bordercolor=[("focus", c.accent)], lightcolor=[("focus", c.accent)])
        name, size = "TCheckbutton", {"indicatorsize": self.part(0.8)}
        style.configure(name, background=c.paper, foreground=c.ink, **size)
        style.configure(name, indicatorbackground=c.paper, indicatorforeground=c.accent)
        style.configure(name, indicatormargin=self.part(0.2))
        style.map(name, background=[("active", c.paper)])
        style.map(name, indicatorbackground=[("selected", c.paper)])

    def _style_lists(self) -> None:
        c, style = self.colours, self.style
        for name, ground in (("Side.Treeview", c.ground), ("Card.Treeview", c.paper)):
            plain = {"background": ground, "fieldbackground": ground, "borderwidth": 0}
            style.configure(name, rowheight=self.part(1.45), indent=self.part(0.6), **plain)
            style.configure(name, foreground=c.ink, font=self.font)
            style.configure(f"{name}.Item", indicatorsize=self.part(0.55))
            style.map(name, background=[("selected", c.selected)], foreground=[])
            style.layout(name, [("Treeview.treearea", {"sticky": "nswe"})])
        for name, way, sides, ground in (
            ("Vertical.TScrollbar", "Vertical", "ns", c.paper),
            ("Side.Vertical.TScrollbar", "Vertical", "ns", c.ground),
            ("Horizontal.TScrollbar", "Horizontal", "we", c.paper),
        ):
            thumb = (f"{way}.Scrollbar.thumb", {"expand": True, "sticky": "nswe"})
            trough = (f"{way}.Scrollbar.trough", {"sticky": sides, "children": [thumb]})
            style.layout(name, [trough])
            size = self.part(0.55)
            style.configure(name, troughcolor=ground, bordercolor=ground, gripcount=0)
            style.configure(name, arrowsize=size, width=size)
            for option in ("background", "lightcolor", "darkcolor"):
                style.configure(name, **{option: c.thumb})
                style.map(name, **{option: [("disabled", ground), ("active", c.dim)]})

    def menu(self, parent: tk.Misc) -> tk.Menu:
        """Return an empty menu in the present colours."""
        c = self.colours
        return tk.Menu(
            parent,
            tearoff=False,
            background=c.paper,
            foreground=c.ink,
            activebackground=c.selected,
            activeforeground=c.ink,
            disabledforeground=c.pale,
            activeborderwidth=self.part(0.2),
            borderwidth=1,
            relief="solid",
            font=self.font,
        )

    def text_options(self) -> dict[str, Any]:
        """Return the options that every Text widget is made with."""
        c = self.colours
        return {
            "font": self.font,
            "background": c.paper,
            "foreground": c.ink,
            "insertbackground": c.ink,
            "insertwidth": max(2, self.part(0.1)),
            "selectbackground": c.selected,
            "selectforeground": c.ink,
            "inactiveselectbackground": c.selected,
            "relief": "flat",
            "borderwidth": 0,
            "highlightbackground": c.edge,
            "highlightcolor": c.accent,
            "wrap": "word",
        }


# ======================================================================================
# FIELDS
# ======================================================================================
# Every field is a Text, also those of one line: emoji typed into an Entry corrupt its
# memory, and what it then returns would be sent (Tk 8.6, seen with CPython 3.11 to 3.13).

SHIFT_KEY = 0x1
COMMAND_KEYS = 0x4 | (0x20000 if os.name == "nt" else 0x8)  # Control, Alt: no letters
MENU_KEYS = ("<Menu>", "<App>", "<Shift-F10>")  # as far as this system knows them


def bind_menu(widget: tk.Misc, popup: Callable[[Any], Any]) -> None:
    """Call back when the user asks for a menu, by mouse or by keys."""
    sequences = ["<Button-3>", *MENU_KEYS]
    if widget.tk.call("tk", "windowingsystem") == "aqua":
        sequences += ["<Button-2>", "<Control-Button-1>"]
    for sequence in sequences:
        with contextlib.suppress(tk.TclError):  # not every system has each key
            widget.bind(sequence, popup)


def bind_typing(widget: tk.Misc, typed: Callable[[str], None]) -> None:
    """Call `typed` with what is typed or pasted while a widget without a field has the focus."""

    def key(event: Any) -> str | None:
        text = whole(event.char)
        if event.state & COMMAND_KEYS or not text or not text.isprintable():
            return None
        typed(text)
        return "break"

    def paste(event: Any) -> str:
        with contextlib.suppress(tk.TclError):  # nothing to paste
            typed(whole(widget.selection_get(selection="CLIPBOARD")))
        return "break"

    widget.bind("<Key>", key)
    widget.bind("<<Paste>>", paste)


def destroy_quietly(widget: tk.Misc) -> None:
    with contextlib.suppress(tk.TclError):  # it is gone already
        widget.destroy()


def lay_over(widget: tk.Misc, shown: bool, **place: Any) -> None:
    """Show a widget over others, or hide it."""
    if shown:
        widget.place(**place)
    else:
        widget.place_forget()


def post_menu(menu: tk.Menu, x: int, y: int) -> str:
    """Show a menu, until the user has chosen."""
    menu.tk_popup(x, y)
    menu.bind("<Unmap>", lambda _: menu.after_idle(destroy_quietly, menu))
    return "break"


def post_menu_below(menu: tk.Menu, button: tk.Misc) -> str:
    return post_menu(menu, button.winfo_rootx(), button.winfo_rooty() + button.winfo_height())


def popup_menu(menu: tk.Menu, event: Any, widget: tk.Misc, box: Any = None) -> str:
    """Show a menu at the pointer, or in the widget, below a box of it, if a key asked for it."""
    if event.type == tk.EventType.ButtonPress:
        return post_menu(menu, event.x_root, event.y_root)
    left, top, _, high = box or (20, 0, 0, 20)
    return post_menu(menu, widget.winfo_rootx() + left, widget.winfo_rooty() + top + high)


def offer_menu(widget: tk.Text, look: Look, *actions: str) -> None:
    """Offer Cut, Copy, Paste in a menu, for users who do not know the keys."""

    def popup(event: Any) -> str:
        menu = look.menu(widget)
        for action in actions:
            sequence = f"<<{action.replace(' ', '')}>>"
            menu.add_command(label=action, command=lambda s=sequence: widget.event_generate(s))
        return popup_menu(menu, event, widget)

    bind_menu(widget, popup)


PATH = re.compile(r"(?:file://|[/~]|[A-Za-z]:[/\\])[^\n]{1,4000}")  # of a file, perhaps
PASTED_MOST = 64 * 1024  # characters: four of the longest messages
PREVIEWED = 300  # characters on each side of the cursor
LINE_MOST = 4096  # characters of a field of one line: Tk lays out all of it for each key


class Field(tk.Text):
    """One line of text. Return enters, Tab goes on to the next field."""

    MOST = LINE_MOST  # characters that can be pasted

    def __init__(self, parent: tk.Misc, look: Look, enter: Callable[[], None], **options: Any):
        self.enter = enter
        self.refused: Callable[[str], None] = chat.do_nothing  # told why a paste is not taken
        self.look = look
        self.one_line = {"height": 1, "width": 34, "undo": True, "highlightthickness": 1} | options
        super().__init__(parent)
        look.follow(self.recolour)
        for sequence, handler in (
            ("<Return>", self._return),
            ("<KP_Enter>", self._return),
            ("<Tab>", lambda _: self._move(self.tk_focusNext())),
            ("<<PrevWindow>>", lambda _: self._move(self.tk_focusPrev())),
            ("<<Paste>>", lambda _: self._paste("CLIPBOARD")),
            ("<<PasteSelection>>", self._paste_here),
            ("<Control-a>", lambda _: self.tag_add("sel", "1.0", "end-1c") or "break"),
            ("<Control-BackSpace>", lambda _: self._erase_word()),
            ("<Control-Delete>", lambda _: self._erase_word(behind=True)),
        ):
            self.bind(sequence, handler)
        offer_menu(self, look, "Cut", "Copy", "Paste", "Undo", "Redo", "Select All")

    def recolour(self) -> None:
        look = self.look
        room = {"padx": look.part(0.5), "pady": look.part(0.35)}
        self.configure(**look.text_options() | room | self.one_line)

    @property
    def content(self) -> str:
        return whole(self.get("1.0", "end-1c"))

    def show_cursor(self) -> None:
        """Scroll to the cursor. Before a field is on the screen it is one pixel wide, and the
        layout of a long line takes seconds."""
        if self.winfo_width() > 1:
            self.see("insert")

    def set(self, text: str) -> None:
        self.delete("1.0", "end")
        self.insert("1.0", self.look.safe(whole(text)))

    def _return(self, event: Any) -> str:
        self.enter()
        return "break"

    def _move(self, widget: tk.Misc | None) -> str:
        if widget:
            widget.focus_set()
        return "break"

    def _erase_word(self, behind: bool = False) -> str | None:
        """Erase the word before the cursor or behind it. At an edge of a line or with a selection
        the key does what it does alone."""
        start, end = ("insert", "insert lineend") if behind else ("insert linestart", "insert")
        text, at = whole(self.get(start, end)), self.index(start)
        if not text or self.tag_ranges("sel"):
            return None
        kept = text.removesuffix(chat.last_word(text))
        if behind:
            kept = text.removeprefix(chat.first_word(text))
        self.delete(start, end)
        self.insert(at, kept)
        if behind:
            self.mark_set("insert", at)
        self.show_cursor()
        return "break"

    def _paste_here(self, event: Any) -> str:
        self.mark_set("insert", f"@{event.x},{event.y}")
        return self._paste("PRIMARY")

    def _paste(self, selection: str) -> str:
        """Paste in place of the selection: on X11 a Text keeps it."""
        try:
            text = self.selection_get(selection=selection)
        except tk.TclError:  # nothing there
            return "break"
        if len(text) + len(self.content) > self.MOST:
            self.too_long(whole(text))
            return "break"
        if self.tag_ranges("sel") and selection == "CLIPBOARD":
            self.delete("sel.first", "sel.last")
        self.take_paste(self.pasted(whole(text)))
        return "break"

    def take_paste(self, text: str) -> None:
        self.insert("insert", text)
        self.show_cursor()

    def too_long(self, text: str) -> None:
        self.refused(f"that is too long to be pasted: more than {self.MOST:,} characters")

    def pasted(self, text: str) -> str:
        return self.look.safe(chat.harmless(" ".join(text.split("\n")).strip()))


class Choices(ttk.Treeview):
    """A list for which a field beside it has the keys. A click takes a row."""

    def __init__(self, parent: tk.Misc, taken: Callable[[], None], **options: Any):
        super().__init__(parent, show="tree", style="Card.Treeview", selectmode="browse", **options)
        self.configure(takefocus=False)
        self.taken = taken
        self.bind("<ButtonRelease-1>", self._click)

    def show(self, rows: Iterable[tuple[str, ...]]) -> None:
        """Show rows, each with a text and values of columns."""
        self.delete(*self.get_children())
        for n, (text, *values) in enumerate(rows):
            self.insert("", "end", str(n), text=text, values=values)

    @property
    def chosen(self) -> int | None:
        selected = self.selection()
        return int(selected[0]) if selected else None

    def choose(self, number: int) -> None:
        self.selection_set(str(number))
        self.see(str(number))

    def move(self, step: int) -> str:
        count, now = len(self.get_children()), self.chosen
        if count:
            self.choose(((-1 if step > 0 else 0) + step if now is None else now + step) % count)
        return "break"

    def _click(self, event: Any) -> None:
        if row := self.identify_row(event.y):
            self.choose(int(row))
            self.taken()


class Offers(ttk.Frame):
    """A list of what the word being typed may become, above the field."""

    ROWS = 8

    def __init__(self, parent: tk.Misc, look: Look, chosen: Callable[[str], None]):
        super().__init__(parent, style="Raised.Card.TFrame", padding=2)
        self.look = look
        self.words: list[str] = []  # what each row stands for
        self.by_key = False  # the user has moved in the list
        self.tree = Choices(self, lambda: chosen(self.choice), columns=("what",))
        self.tree.pack(fill="both", expand=True)

    @property
    def shown(self) -> bool:
        return bool(self.place_info())

    def show(self, rows: list[tuple[str, str, str]]) -> None:
        """Show rows of what to insert, how that reads, and what it is."""
        if [row[0] for row in rows] == self.words and self.shown:
            return None
        self.words, self.by_key = [row[0] for row in rows], False
        if not rows:
            return self.hide()
        self.tree.show(row[1:] for row in rows)
        font, em = self.look.font, self.look.em
        width = max(font.measure(text) for _, text, _ in rows) + 2 * em
        more = max(font.measure(what) for _, _, what in rows) + em
        self.tree.column("#0", width=width, stretch=False)
        self.tree.column("what", width=more)
        self.tree.configure(height=min(self.ROWS, len(rows)))
        self.place(relx=0.01, rely=1.0, y=-self.look.part(0.2), anchor="sw", relwidth=0.98)
        return self.lift()

    def hide(self) -> None:
        self.words, self.by_key = [], False
        self.place_forget()

    def move(self, step: int) -> None:
        self.by_key = True
        self.tree.move(step)

    @property
    def choice(self) -> str:
        """The chosen word; the first one if none was chosen."""
        return self.words[self.tree.chosen or 0]


def command_offers(word: str) -> list[tuple[str, str, str]]:
    """Return the commands that begin with a word, with their syntax and summary."""
    records = [chat.client_command[verb] for verb in chat.client_command]
    found = [one for one in records if one.syntax[1:].split()[0].startswith(word.lower())]
    found.sort(key=lambda one: one.syntax)
    return [(f"{one.syntax.split()[0]} ", one.syntax, one.summary) for one in found]


EDGES = {-1: "1.0", 1: "end-1c"}  # of a text, upwards and downwards


class Compose(Field):
    """The field for messages. It grows with its text and has a history of sent lines.

    The line editor of the terminal keeps the history, the draft and the completion. It gets
    only the keys that a Text has no meaning for.
    """

    MOST, MOST_LINES = PASTED_MOST, 6
    LEAVES_OFFERS = ("Tab", "ISO_Left_Tab", "Shift_L", "Shift_R")

    def __init__(self, parent: tk.Misc, look: Look, above: tk.Misc):
        super().__init__(parent, look, self.submit, width=20, maxundo=500)
        self.send: Callable[[str], bool] = bool  # returns whether it could be: else the text stays
        self.complete: Callable[[str, str], list[str]] = lambda before, word: []
        self.editor = chat.LineEditor(lambda before, word: self.complete(before, word))
        self.offers = Offers(above, look, self.take_offer)
        self.preview: Callable[[str, int], None] = chat.do_nothing  # a line, and the cursor in it
        self.edited: Callable[[], None] = chat.do_nothing  # the user changed the text
        self.too_much: Callable[[str], None] = chat.do_nothing  # a paste over the limit
        self.several: Callable[[str], None] = chat.do_nothing  # a paste of several messages
        self.path: Callable[[str], None] = chat.do_nothing  # a paste that may be the path of a file
        self.placed = ""  # the text that was set last: it was not typed
        self.stepped_to, self.column = "", 0  # by Up and Down: the index, and pixels from the left
        self.hint = tk.Label(self, padx=0, pady=0, cursor="xterm", anchor="w")
        self.hint.bind("<Button-1>", lambda _: self.focus_set())
        for sequence, handler in (
            ("<Shift-Return>", self._newline),
            ("<Tab>", lambda _: self._complete("tab")),
            ("<<PrevWindow>>", lambda _: self._complete("back-tab")),
            ("<Up>", lambda event: self._arrow(event, -1)),
            ("<Down>", lambda event: self._arrow(event, 1)),
            ("<Key>", self._forget_offers),
            ("<<Modified>>", self._modified),
            ("<KeyRelease>", lambda _: self.show_seen()),
            ("<ButtonRelease-1>", lambda _: self.show_seen()),
            ("<Configure>", lambda _: self.show_cursor() or self.fit()),
        ):
            self.bind(sequence, handler)
        look.follow(self._recolour_hint)
        self._modified()

    def _recolour_hint(self) -> None:
        c = self.look.colours
        self.hint.configure(font=self.look.font, background=c.paper, foreground=c.dim)
        self.fit()

    def pasted(self, text: str) -> str:
        return self.look.safe(chat.harmless(text.replace("\r\n", "\n")))

    def take_paste(self, text: str) -> None:
        super().take_paste(text)
        if PATH.fullmatch(text.strip()):
            self.path(text.strip())
        elif text.rstrip("\n").count("\n") or len(text) > chat.LINE_ROOM:
            self.several(self.content)

    def too_long(self, text: str) -> None:
        self.too_much(chat.harmless(text.replace("\r\n", "\n")))

    def set(self, text: str) -> None:
        super().set(text)
        self.placed = self.content
        self.mark_set("insert", "end-1c")
        self.show_cursor()
        self.edit_reset()

    def open(self, text: str) -> None:
        """Go on with the draft of another conversation. The text over which a line was recalled is
        not lost: Up brings it."""
        self.editor.keep_draft()
        self.editor.take()
        self.set(text)

    def give_back(self, text: str) -> None:
        """Take back a text that was not accepted; Up brings it while another is being written."""
        if not (self.content.strip() or text[:1] == "/"):
            self.set(text)
        else:
            self.editor.remember(text)

    def begin(self, text: str) -> None:
        """Put a text before the one that is being written."""
        self.set(text + self.content)
        self.focus_set()

    def submit(self) -> None:
        if self.offers.by_key:
            return self.take_offer(self.offers.choice)
        text = self.content.rstrip("\n")
        if not text.strip() or not self.send(text):
            return None
        self.editor.set(text)
        self.editor.press(chat.Key("enter"))
        self.editor.take()
        self.set("")
        return None

    def _newline(self, event: Any) -> str:
        self.insert("insert", "\n")
        self.show_cursor()
        return "break"

    def _rows(self) -> int:
        """Return the rows of the text, up to the most that are shown. Tk's own count of all of
        them takes a second for a line of 20 kB."""
        at, rows = "1.0", 1
        while rows < self.MOST_LINES:
            below = self.index(f"{at} + 1 display lines")
            past = self.compare(below, ">", "end-1c")  # the line that every Text has at its end
            if past or self.compare(f"{below} display linestart", "<=", at):
                break
            at, rows = self.index(f"{below} display linestart"), rows + 1
        return rows

    def _arrow(self, event: Any, step: int) -> str | None:
        """Move in the offers, to another row, or from the first or last row in the sent lines."""
        if self.offers.shown:
            self.offers.move(step)
        elif event.state & SHIFT_KEY:
            self.tk.call("tk::TextKeySelect", self, self._row_beside(step))
        elif event.state & COMMAND_KEYS:
            return None
        elif self.dlineinfo("insert") == self.dlineinfo(EDGES[step]):
            self._recall("down" if step > 0 else "up")
        else:
            self.tk.call("tk::TextSetCursor", self, self._row_beside(step))
        return "break"

    def _row_beside(self, step: int) -> str:
        """Return the index one row up or down, in the column in which the first such step began.
        It is looked for on the screen: Tk's own way takes a minute in a line of 60 kB."""
        self.see("insert")
        if self.index("insert") != self.stepped_to:
            self.column = self.bbox("insert")[0]
        _, top, _, high, _ = row = self.dlineinfo("insert")
        there, last = (top + high, self.winfo_height()) if step > 0 else (top - 1, 0)
        if row == self.dlineinfo(f"@0,{last}"):
            self.yview_scroll(step, "units")
            there = last
        self.stepped_to = self.index(f"@{self.column},{there}")
        return self.stepped_to

    def _recall(self, key: str) -> None:
        self.editor.set(self.content)
        self.editor.press(chat.Key(key))
        if self.editor.text != self.content:
            self.set(self.editor.text)

    # Completion

    def _complete(self, key: str) -> str:
        if self.offers.shown:
            self.take_offer(self.offers.choice)
            return "break"
        before = whole(self.get("insert linestart", "insert"))
        self.editor.before, self.editor.after = before, ""
        self.editor.press(chat.Key(key))
        if self.editor.before != before:
            self.delete("insert linestart", "insert")
            self.insert("insert", self.editor.before)
        return "break"

    def take_offer(self, word: str) -> None:
        """Put an offered word in the place of the one before the cursor."""
        before = whole(self.get("insert linestart", "insert"))
        begun = before[before.rfind(" ") + 1 :]
        self.delete("insert linestart", "insert")
        self.insert("insert", before.removesuffix(begun) + self.look.safe(word))
        self.offers.hide()
        self.focus_set()

    def _forget_offers(self, event: Any) -> None:
        if event.keysym not in self.LEAVES_OFFERS:
            self.editor.offers = []

    def _update_offers(self) -> None:
        """Offer commands after "/", and emoji after ":" and two letters."""
        before = whole(self.get("insert linestart", "insert"))
        rows: list[tuple[str, str, str]] = []
        if before[:1] == "/" and " " not in before and self.index("insert").startswith("1."):
            rows = command_offers(before[1:])
        elif match := EMOJI_WORD.search(before[-40:]):
            rows = [
                (f"{emoji} ", self.look.drawable(emoji), name)
                for emoji, name in emoji_for(match[1])
            ]
        self.offers.show(rows)

    def _modified(self, event: Any = None) -> None:
        if self.edit_modified() or event is None:
            self.edit_modified(False)
            self.fit()
            if event is not None and self.content != self.placed:
                self.placed = ""
                self._update_offers()
                self.edited()
            else:
                self.offers.hide()

    def fit(self) -> None:
        """Fit the height to the text, up to the limit; show the hint while there is no text."""
        is_empty = self.get("1.0", "2.0") == "\n" and self.index("end-1c") == "1.0"
        # From where text begins, to where it ends: a Text's padding counts
        lay_over(self.hint, is_empty, x=1, y=0, relwidth=1, width=-1)
        # Tk lays out all of a text whose widget is configured, also as it was
        if self.winfo_width() > 1 and (rows := self._rows()) != int(self.cget("height")):
            self.configure(height=rows)
        self.show_seen()

    def show_seen(self) -> None:
        """Show the part of the line around the cursor in the order in which it will be seen."""
        before, after = "insert linestart", "insert lineend"
        if self.compare(before, "<", start := f"insert - {PREVIEWED} indices"):
            before = start
        if self.compare(after, ">", end := f"insert + {PREVIEWED} indices"):
            after = end
        typed = whole(self.get(before, "insert"))
        self.preview(typed + whole(self.get("insert", after)), len(typed))


# ======================================================================================
# FILES
# ======================================================================================
# Pictures are decoded by Tk, from content that has been looked at first: Tk's own decoder
# believes what it reads. It takes a third of a second for 16 million pixels, so large ones are
# decoded by another process. Images are made and freed on Tk's thread.

AT_ONCE_PIXELS = 1_000_000  # of a picture that is decoded on Tk's thread, in 20 ms
STRIP_PIXELS = 250_000  # of one that was decoded elsewhere, put on the screen in 10 ms
DECODE_SECONDS = 20  # that another process may take
QUIET = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)  # of other programs
DECODER = """
import sys, tkinter
given, by, wanted, paper = sys.argv[1:]
root = tkinter.Tk()
root.withdraw()
picture = tkinter.PhotoImage(master=root, data=sys.stdin.buffer.read(), format=given)
picture = picture.subsample(int(by))
pixels = root.tk.call(picture, "data", "-format", wanted, "-background", paper)
sys.stdout.buffer.write(pixels)
"""


def gif_frame_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the first frame of a GIF, with its offset (GIF89a, 20): Tk takes
    so much memory, whatever the header says. 0 and 0 if there is no frame."""
    if len(data) < 13:
        return 0, 0
    at = 13 + (3 << (data[10] & 7) + 1) * (data[10] >> 7)  # behind the colours
    while data[at : at + 1] == b"!":  # an extension: blocks, each after its length
        at += 2
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
    if data[at : at + 1] != b"," or len(data) < at + 10:
        return 0, 0
    left, top, width, height = struct.unpack_from("<4H", data, at + 1)
    return left + width, top + height


def picture_trouble(file: chat.FileTag, data: bytes) -> str:
    """Return why a picture is not given to Tk; "" if it may be."""
    if len(data) < file.size:
        return "it is shorter than was said"
    if chat.content_type(data[:4096], "", False) != file.type:
        return "it is not what was said"
    if chat.picture_size(file.type, data[:4096]) != (file.width, file.height):
        return "it has another size than was said"
    width, height = gif_frame_size(data) if file.type == "image/gif" else (1, 1)
    if not (0 < width <= file.width and 0 < height <= file.height):
        return "it is damaged"
    return ""


def decoded(root: tk.Misc, file: chat.FileTag, data: bytes, by: int = 1) -> tk.PhotoImage | None:
    """Return a picture with its sides divided by `by`; None if it cannot be decoded."""
    try:
        image = tk.PhotoImage(master=root, data=data, format=TK_FORMATS[file.type])
        return image.subsample(by) if by > 1 else image
    except (tk.TclError, MemoryError):
        return None


def decoded_elsewhere(file: chat.FileTag, data: bytes, by: int, paper: str) -> bytes:
    """Return a picture that another process has decoded: in full as PPM, on a colour, or divided
    as a PNG. Return b"" if that failed."""
    wanted = "png" if by > 1 else "ppm"
    arguments = [TK_FORMATS[file.type], str(by), wanted, paper]
    command = [sys.executable, "-I", "-c", DECODER, *arguments]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=DECODE_SECONDS)
    except (OSError, ValueError, MemoryError, subprocess.SubprocessError):
        return b""
    return done.stdout


class Decoder:
    """Decodes pictures. The user can type on while it decodes a large one."""

    def __init__(self, root: tk.Misc, look: Look, jobs: Jobs, timers: Timers):
        self.root, self.look, self.jobs, self.timers = root, look, jobs, timers

    def decode(
        self, file: chat.FileTag, data: bytes, by: int, then: Callable[[tk.PhotoImage | None], Any]
    ) -> None:
        """Call back with a picture whose sides are divided by `by`; None if it is damaged."""
        if file.width * file.height <= AT_ONCE_PIXELS:
            return then(decoded(self.root, file, data, by))

        def arrived(pixels: bytes) -> None:
            if not pixels:
                then(decoded(self.root, file, data, by))
            elif by > 1:
                then(tk.PhotoImage(master=self.root, data=pixels, format="png"))
            else:
                image = tk.PhotoImage(master=self.root, width=file.width, height=file.height)
                then(image)
                self._put(image, pixels[-3 * file.width * file.height :], file.width, 0)

        paper = self.look.colours.paper
        return self.jobs.start(functools.partial(decoded_elsewhere, file, data, by, paper), arrived)

    def _put(self, image: tk.PhotoImage, pixels: bytes, width: int, top: int) -> None:
        """Put the pixels of a picture in their places, from one row on: a strip at a time."""
        end = 3 * width * (top + max(1, STRIP_PIXELS // width))
        strip = pixels[3 * width * top : end]
        head = b"P6 %d %d 255\n" % (width, len(strip) // (3 * width))
        self.root.tk.call(image, "put", head + strip, "-format", "ppm", "-to", 0, top)
        if end < len(pixels):
            put = functools.partial(self._put, image, pixels, width, end // (3 * width))
            self.timers.later(f"strips of {image}", 1, put)


def open_file(path: str) -> str:
    """Open a file with the program that the desktop has for it; return why that cannot be."""
    try:
        if sys.platform == "win32":
            os.startfile(path)
        else:
            command = "open" if sys.platform == "darwin" else "xdg-open"
            opener = subprocess.Popen([command, path], **QUIET)
            threading.Thread(target=opener.wait, daemon=True).start()
    except OSError as error:
        return f"cannot open {path}: {chat.reason_of(error)}"
    return ""


def open_link(url: str) -> str:
    """Open a link in the browser, which may take a while; return why that cannot be."""
    with contextlib.suppress(webbrowser.Error, OSError):
        if webbrowser.open(url):
            return ""
    return f"no browser opens {shorter(url, NAME_SHOWN)}"


def user_folder() -> pathlib.Path:
    """Return the user's home folder; where the program runs if there is none."""
    with contextlib.suppress(chat.Unusable):
        return chat.home_folder()
    return pathlib.Path()


def download_folder() -> pathlib.Path:
    folder = user_folder() / "Downloads"
    return folder if folder.is_dir() else folder.parent


def pasted_file(text: str) -> str:
    """Return a path that was pasted, also as a file: URL, if a file is there; else ""."""
    import urllib.parse
    import urllib.request

    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text.strip())
        if url.scheme == "file" and url.netloc in ("", "localhost"):
            text = urllib.request.url2pathname(url.path)
    with contextlib.suppress(OSError, RuntimeError):  # it may not be looked at; no such user
        path = pathlib.Path(text.strip()).expanduser()
        return str(path) if path.is_file() else ""
    return ""


def set_text(label: Any, text: str) -> None:
    """Change the text of a label, if it is another one: Tk lays out all around it again."""
    if str(label.cget("text")) != text:
        label.configure(text=text)


class PictureWindow(tk.Toplevel):
    """A picture in full, to be scrolled. Escape closes it."""

    def __init__(self, parent: tk.Misc, look: Look, image: tk.PhotoImage, title: str):
        super().__init__(parent, background=look.colours.paper)
        self.title(title)
        self.image: tk.PhotoImage | None = image
        wide, high = image.width(), image.height()
        self.canvas = tk.Canvas(self, background=look.colours.paper, highlightthickness=0)
        self.canvas.configure(scrollregion=(0, 0, wide, high))
        self.canvas.configure(xscrollincrement=20, yscrollincrement=20)
        self.canvas.configure(width=min(wide, self.winfo_screenwidth() * 3 // 4))
        self.canvas.configure(height=min(high, self.winfo_screenheight() * 3 // 4))
        self.canvas.create_image(0, 0, anchor="nw", image=image)
        self.columnconfigure(0, weight=1)
        self.rowconfigure(0, weight=1)
        self.canvas.grid(row=0, column=0, sticky="nswe")
        across = ttk.Scrollbar(self, orient="horizontal", command=self.canvas.xview)
        down = ttk.Scrollbar(self, command=self.canvas.yview)
        self.canvas.configure(xscrollcommand=across.set, yscrollcommand=down.set)
        if wide > int(self.canvas.cget("width")):
            across.grid(row=1, column=0, sticky="we")
        if high > int(self.canvas.cget("height")):
            down.grid(row=0, column=1, sticky="ns")
        self._bind_scrolling(self.canvas.yview_scroll, "Up", "Down", "")
        self._bind_scrolling(self.canvas.xview_scroll, "Left", "Right", "Shift-")
        self.bind("<Escape>", lambda _: self.destroy())
        self.canvas.bind("<Button-1>", lambda _: self.destroy())
        self.canvas.focus_set()

    def _bind_scrolling(self, scroll: Callable, back: str, on: str, shift: str) -> None:
        """Scroll in one direction by two keys, and by the wheel, which is two buttons on X11."""
        up, down = (lambda _, step=step: scroll(step, "units") for step in (-3, 3))
        for widget, sequence, act in (
            (self, f"<{back}>", up),
            (self, f"<{on}>", down),
            (self.canvas, f"<{shift}Button-4>", up),
            (self.canvas, f"<{shift}Button-5>", down),
            (self.canvas, f"<{shift}MouseWheel>", lambda e: up(e) if e.delta > 0 else down(e)),
        ):
            widget.bind(sequence, act)

    def destroy(self) -> None:
        super().destroy()
        self.image = None  # all of its pixels


class Strip(ttk.Frame):
    """The files on their way, above the field: each with a bar, and a button that stops it."""

    MOST = 4  # shown; of the others the number

    def __init__(self, parent: tk.Misc, look: Look, stop: Callable[[int, str], None]):
        super().__init__(parent)
        self.look, self.stop = look, stop
        self.parts: dict[tuple[int, str], tuple[ttk.Frame, Any, Any, Any]] = {}
        self.more = ttk.Label(self, style="Dim.TLabel")
        look.follow(self.recolour)

    def recolour(self) -> None:
        look, c = self.look, self.look.colours
        self.configure(padding=(look.part(0.9), look.part(0.2), look.part(0.5), 0))
        style = "Horizontal.TProgressbar"
        look.style.configure(style, background=c.accent, troughcolor=c.chip, bordercolor=c.edge)
        look.style.configure(style, lightcolor=c.accent, darkcolor=c.accent)
        look.style.configure(style, thickness=look.part(0.4))

    @property
    def buttons(self) -> list[ttk.Button]:
        return [button for *_, button in self.parts.values()]

    def show(self, files: tuple[Moving, ...]) -> None:
        """Show these files, and no others."""
        shown = {(one.server, one.id): one for one in files[: self.MOST]}
        for key in self.parts.keys() - shown.keys():
            self.parts.pop(key)[0].destroy()
        self.more.pack_forget()
        for key, one in shown.items():
            if key not in self.parts:
                self.parts[key] = self._part(key)
            _, label, bar, _ = self.parts[key]
            set_text(label, self.look.seen(label_text(one.text)))
            bar.configure(value=one.share)
        if len(files) > self.MOST:
            self.more.configure(text=f"and {len(files) - self.MOST} more")
            self.more.pack(anchor="w")
        if files:
            self.grid()
        else:
            self.grid_remove()

    def _part(self, key: tuple[int, str]) -> tuple[ttk.Frame, Any, Any, Any]:
        frame = ttk.Frame(self)
        stop = functools.partial(self.stop, *key)
        button = ttk.Button(frame, text="\u2715", style="Plain.TButton", command=stop)
        for sequence in ("<Return>", "<Delete>"):
            button.bind(sequence, lambda _: button.invoke() and "break" or "break")
        button.bindtags(("WindowKeys", *button.bindtags()))
        bar = ttk.Progressbar(frame, length=self.look.part(8), maximum=100)
        label = ttk.Label(frame, style="Dim.TLabel", width=1, anchor="w")
        button.pack(side="right")
        bar.pack(side="right", padx=self.look.part(0.5))
        label.pack(side="left", fill="x", expand=True)
        frame.pack(fill="x")
        return frame, label, bar, button


# ======================================================================================
# TRANSCRIPT
# ======================================================================================
# One Text widget shows the conversation that is looked at. Rows are found by their line:
# a tag for each message would make every insertion slower.
#
#   ReadText     a text that is read and not edited, in the colours of the look
#   SheetText    the rows of a sheet as text: what is drawn, and where
#   Pictures     the pictures in sight
#   Pointer      the row that the keys and the pointer are for, and what a click means
#   Transcript   the part that is in sight: the end, or where the user reads back

BOTTOM = 0.99999  # of yview: the end is in sight
NEAR_TOP = 0.02  # of yview: older rows are wanted
TWO_SCREENS = 0.5  # of yview: a larger part of all rows is in sight
FEW_ROWS = 60  # below that there is perhaps room for older ones
PICTURES_KEPT = 40  # decoded: up to half a megabyte each
PICTURE_MS = 40  # from a change until pictures are looked for, and between two that are decoded
SCROLLING = (
    "<Button-4>",
    "<MouseWheel>",
    "<Prior>",
    "<Up>",
    "<B1-Motion>",
    "<B2-Motion>",
    "<Home>",
)
NOTHING_SAID = "nothing was said here yet"
SCROLL_MS = 1000  # from a key or a turn of the wheel until its movement is over
CLICKED = ("expand", "retry", "cancel", "answers", "reaction", "save", "open", "show", "picture")


class ReadText(tk.Text):
    """A text that is read and not edited, in the colours of the look, with a scroll bar."""

    def __init__(self, parent: tk.Misc, look: Look, padding: tuple[float, float], **options: Any):
        super().__init__(parent, state="disabled", cursor="arrow", **options)
        self.look, self.padding = look, padding
        self.filled: list = []  # pieces
        self.room = (0, 0)  # pixels of a row, and of a word
        self.bar = ttk.Scrollbar(parent, command=self.yview)
        self.configure(yscrollcommand=self.bar.set)
        self.bind("<<Copy>>", self._copy)
        self.show_hand("link")
        look.follow(self.recolour)

    def show_hand(self, *tags: str) -> None:
        """Show by the pointer that text with these tags does something."""
        for tag in tags:
            self.tag_bind(tag, "<Enter>", lambda _: self.configure(cursor="hand2"))
            self.tag_bind(tag, "<Leave>", lambda _: self.configure(cursor="arrow"))

    def link_at(self, index: str, said: str = "") -> str:
        """Return the link there, or "". One tag serves all of them."""
        found = self.tag_prevrange("link", f"{index} + 1 indices")
        if not found or self.compare(found[1], "<=", index):
            return ""
        return link_meant(whole(self.get(*found)), said)

    def _copy(self, event: Any) -> str:
        """Copy what is selected as it was said: lines may be drawn in another order."""
        if self.tag_ranges("sel"):
            self.clipboard_clear()
            self.clipboard_append(self.said_between("sel.first", "sel.last"))
        return "break"

    def said_between(self, first: str, last: str) -> str:
        """Return the text between two places as it was said."""
        text = whole(self.get(first, last))
        changed = self.look.reorders and RIGHT_TO_LEFT.search(text)
        if not (changed or self.look.spells):
            return text
        start = len(whole(self.get(f"{first} linestart", first)))
        line, said = int(self.index(first).split(".")[0]), []
        for n, part in enumerate(re.findall("[^\n]*\n|[^\n]+", text)):
            known = None
            if not part.isascii() or "[" in part:  # it may not be as it was said
                shown = whole(self.get(f"{line + n}.0", f"{line + n + 1}.0"))
                known = lines_said(self.pieces_at(line + n), self.look.drawable).get(shown)
            said.append(said_text(known[start : start + len(part)]) if known else part)
            start = 0
        return "".join(said)

    def pieces_at(self, line: int) -> list:
        """Return the pieces among which this line was drawn."""
        return self.filled

    @property
    def border(self) -> int:
        """The pixels above the first line."""
        return int(str(self.cget("pady"))) + int(str(self.cget("highlightthickness")))

    def fits(self, part: str) -> bool:
        """Return whether a part of a line is no wider than a row."""
        width = self.winfo_width() - 2 * self.border - 2 * self.look.part(self.padding[0])
        return self.look.font.measure(part) <= max(width, 4 * self.look.em)

    def has_other_room(self) -> bool:
        """Return whether a row has become wider or narrower, or its letters have."""
        before, self.room = self.room, (self.winfo_width(), self.look.font.measure("average"))
        return before != self.room

    def recolour(self) -> None:
        look, c, tag = self.look, self.look.colours, self.tag_configure
        wide, high = map(look.part, self.padding)
        self.configure(**look.text_options(), padx=wide, pady=high, highlightthickness=1)
        self.configure(highlightbackground=c.paper)
        tag("head", spacing1=look.part(0.5))
        tag("rtl", justify="right")
        for number, colour in enumerate(c.names):
            tag(f"name{number}", foreground=colour)
        self.configure_tags()
        tag("link", foreground=c.accent, underline=True)
        self.tag_raise("sel")

    def configure_tags(self) -> None:
        """Configure the tags that a subclass has besides."""

    @contextlib.contextmanager
    def editing(self) -> Iterator[None]:
        before = str(self.cget("state"))
        self.configure(state="normal")
        yield
        self.configure(state=before)

    def fill(self, pieces: list) -> None:
        """Show these pieces and nothing else."""
        self.filled = list(pieces)
        with self.editing():
            self.delete("1.0", "end")
            self.insert_pieces("1.0", pieces)

    def insert_pieces(self, index: str, pieces: list) -> None:
        if pieces:
            drawn = [*pieces]
            drawn[::2] = map(self.look.drawable, pieces[::2])
            self.insert(index, *drawn)


class Preview(ReadText):
    """The text being written in the order in which it will be seen: Tk may not order Hebrew or
    Arabic in a field. The letter at the cursor is marked."""

    ROWS = 3

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, look, (0.9, 0.2), height=1, takefocus=False)
        self.style = Style(fits=self.fits)
        self.line, self.cursor = "", 0
        self.bind("<Configure>", lambda _: self._draw())

    def show(self, line: str, cursor: int) -> None:
        if not (self.look.reorders and RIGHT_TO_LEFT.search(line)):
            line = ""
        if (line, cursor) != (self.line, self.cursor):
            self.line, self.cursor = line, cursor
            self._draw()
            self.grid() if line else self.grid_remove()

    def _draw(self) -> None:
        pieces = line_pieces(self.line, self.style)
        self.fill(pieces[:-2])
        if (rows := min(lines_of(pieces), self.ROWS)) != int(self.cget("height")):
            self.configure(height=rows)
        lines = lines_said(pieces, str).values()
        places = [place for line in lines for _, place, _ in line]
        text = "".join(pieces[::2])[: places.index(self.cursor)] if self.cursor in places else None
        if text is not None and self.cursor < len(self.line):
            self.tag_add("chosen", f"1.0 + {len(text)} indices")
        self.see("end" if text is None else f"{text.count(chr(10)) + 1}.0")

    def configure_tags(self) -> None:
        c = self.look.colours
        self.configure(background=c.ground, highlightbackground=c.ground)
        self.tag_configure("chosen", background=c.selected)


class SheetText(ReadText):
    """The rows of a sheet as text: which are drawn, and where."""

    def __init__(self, parent: tk.Misc, look: Look):
        fine = max(1.0, parent.winfo_fpixels("1i") / 96)
        box = tuple(round(side * fine) for side in PICTURE_BOX)
        fits = self.fits if look.reorders else None
        self.sheet = Sheet(Style(fits=fits, seen=look.ordered, box=box))
        self.spaces: set[str] = set()  # tags: lines as high as pictures
        self.marks: dict[str, Any] = {}  # tags that one row has, and its key
        self.drew: Callable[[], None] = chat.do_nothing  # rows with pictures, perhaps
        super().__init__(parent, look, (0.9, 0.5), width=20, height=5)

    def configure_tags(self) -> None:
        look, c, tag = self.look, self.look.colours, self.tag_configure
        self.configure(spacing3=look.part(0.12))
        sample = clock_text(datetime.datetime(2000, 12, 30, 20, 0), self.sheet.style.clock)
        column = look.small.measure(sample) + look.part(0.6)
        tag("clock", foreground=c.dim, font=look.small)
        tag("said", lmargin1=0, lmargin2=0)
        tag("told", foreground=c.dim, font=look.small, tabs=(column,), lmargin2=column)
        tag("told", spacing1=look.part(0.15))
        tag("mention", background=c.mention, lmargincolor=c.mention)
        tag("chosen", background=c.chosen)
        tag("found", background=c.found)
        tag("table", font=look.fixed)  # the server aligns what it lists with spaces
        tag("name", font=look.bold)
        tag(PENDING, foreground=c.pale)
        tag(FAILED, foreground=c.bad)
        tag("notice", font=look.italic)
        tag("trouble", foreground=c.bad, font=look.small)
        tag("answers", foreground=c.dim, font=look.small, spacing1=look.part(0.2))
        tag("reaction", background=c.chip, font=look.small)
        tag("own-reaction", background=c.selected)
        for name in ("expand", "retry", "cancel", "save", "open", "show"):
            tag(name, foreground=c.accent, underline=True)
        tag("expand", font=look.small)
        tag("file", background=c.chip, font=look.small, spacing1=look.part(0.1))
        tag("file", spacing3=look.part(0.2))
        tag("file-name", font=look.bold)
        for name in self.spaces:
            self._configure_space(name)
        tag("day", foreground=c.dim, justify="center", font=look.small)
        tag("day", spacing1=look.part(0.6), spacing3=look.part(0.3))
        tag("rule", background=c.bad, font=look.tiny, spacing1=0, spacing3=0)
        tag("new", foreground=c.bad, justify="right", font=look.small, spacing3=0)

    def _configure_space(self, name: str) -> None:
        """Make a line as high as the picture that will be in it."""
        height = int(name.removeprefix("space"))
        self.tag_configure(name, spacing1=max(0, height - self.look.em))

    def insert_pieces(self, index: str, pieces: list) -> None:
        for tags in pieces[1::2]:
            if tags and tags[-1][:5] == "space" and tags[-1] not in self.spaces:
                self.spaces.add(tags[-1])
                self._configure_space(tags[-1])
        super().insert_pieces(index, pieces)
        self.drew()

    # Drawing

    def append(self, rows: tuple[Row, ...], seen: bool) -> None:
        """Add rows at the end, in one go."""
        number = len(self.sheet.rows)
        lost = self.sheet.append(rows, seen)
        with self.editing():
            if self.sheet.is_drawn(lost):
                self.redraw(lost)
            self.insert_pieces("end", self.sheet.draw_from(number))

    def draw_older(self) -> bool:
        """Draw older rows that are here; return whether there were such."""
        sheet, head = self.sheet, self.sheet.first
        if head == 0:
            return False
        with self.editing():
            self.insert_pieces("1.0", sheet.draw_before(ROWS_MORE))
            if sheet.is_drawn(head):
                self.redraw(head)  # it may go on with what is above it now
        self.paint()
        return True

    def redraw(self, number: int) -> None:
        line, lines, pieces = self.sheet.redraw(number)
        with self.editing():
            self.delete(f"{line}.0", f"{line + lines}.0")
            self.insert_pieces(f"{line}.0", pieces)
        if self.sheet.rows[number].key in self.marks.values():
            self.paint()

    def delete_first(self, lines: int) -> None:
        """Delete lines of the oldest rows; what is the first row now gets a head."""
        if lines:
            with self.editing():
                self.delete("1.0", f"{lines + 1}.0")
            if self.sheet.sizes:
                self.redraw(self.sheet.first)

    # Where rows are

    def pieces_at(self, line: int) -> list:
        number = self.sheet.row_at(line)
        return [] if number is None else self.sheet.draw(number)

    def line_at(self, index: str) -> int:
        return int(self.index(index).split(".")[0])

    def row_at(self, index: str) -> int | None:
        return self.sheet.row_at(self.line_at(index))

    def start_of(self, number: int) -> str:
        return f"{self.sheet.line_of(number)}.0"

    def lay_out(self) -> None:
        """Let Tk count the pixels of all lines: it does that later, and takes the end to be in
        sight until then."""
        self.count("1.0", "end", "update", "ypixels")

    def last_in_sight(self) -> int:
        number = self.row_at(f"@0,{self.winfo_height()}")
        return len(self.sheet.rows) - 1 if number is None else number

    def mark_row(self, tag: str, number: int | None) -> None:
        """Give a tag to a row, and to no other one."""
        self.marks[tag] = None if number is None else self.sheet.rows[number].key
        self.paint()

    def paint(self) -> None:
        """Give the tags to their rows again, which may have been drawn again."""
        for tag, key in self.marks.items():
            self.tag_remove(tag, "1.0", "end")
            if self.sheet.is_drawn(number := self.sheet.find(key)):
                self.tag_add(tag, *self.sheet.body_of(number))


class Spot(NamedTuple):
    """The place in a conversation at which the user reads."""

    key: Any  # of the row at the top ...
    offset: int  # ... which begins so many pixels above
    drawn: int  # rows


class Pictures:
    """The pictures among the messages: those in sight are put in their places, or asked for. It
    frees those that were in sight longest ago."""

    def __init__(self, text: SheetText, timers: Timers):
        self.text, self.timers = text, timers
        self.images: dict[str, tk.PhotoImage] = {}  # by path; those seen last at the end
        self.placed: dict[str, list[str]] = {}  # names of their places in the text
        self.arrived: collections.deque[Picture] = collections.deque()  # to be decoded
        self.asked: tuple[chat.FileTag, ...] = ()
        self.decodes = False  # soon
        self.decoding: Picture | None = None
        self.decode: Callable = chat.do_nothing  # see Decoder
        self.wants: Callable[[tuple], None] = chat.do_nothing  # called with those to be fetched
        self.failed: Callable[[str, str], None] = chat.do_nothing  # called with a path and why

    def look_soon(self) -> None:
        if self.text.spaces and not self.timers.waits("pictures"):
            self.timers.later("pictures", PICTURE_MS, self._look)

    def _in_sight(self) -> Iterator[tuple[str, chat.FileTag]]:
        """Yield where the pictures in sight have their places."""
        text, sheet = self.text, self.text.sheet
        for number in range(text.row_at("@0,0") or 0, text.last_in_sight() + 1):
            file = chat.parse_file_tag(sheet.rows[number].view.file)
            if file is None or not sheet.is_drawn(number):
                continue
            if found := text.tag_nextrange("picture", *sheet.body_of(number)):
                yield found[0], file

    def _look(self) -> None:
        """Put pictures in sight in their places, and ask for those that are not here."""
        missing, seen = {}, set()
        for index, file in list(self._in_sight()):
            seen.add(file.path)
            image = self.images.pop(file.path, None)
            if image is None:
                missing[file.path] = file
                continue
            self.images[file.path] = image
            if self.text.get(index) == "\n":
                self._place(index, file.path, image)
        self._drop_others(seen)
        wanted = tuple(missing.values())
        if wanted != self.asked:
            self.asked = wanted
            self.wants(wanted)

    def _place(self, index: str, path: str, image: tk.PhotoImage) -> None:
        text = self.text
        with text.editing():
            name = text.image_create(index, image=image, name=path)
            for tag in text.tag_names(index):
                text.tag_remove(tag, index)
            for tag in ("said", "picture"):
                text.tag_add(tag, index)
        text.paint()
        names = self.placed.setdefault(path, [])
        if name not in names:
            names.append(name)

    def _drop_others(self, seen: set[str]) -> None:
        """Free pictures that were in sight longest ago. Their lines keep their heights."""
        excess = len(self.images) - PICTURES_KEPT
        for path in [path for path in self.images if path not in seen][: max(0, excess)]:
            for name in self.placed.pop(path, ()):
                with self.text.editing(), contextlib.suppress(tk.TclError):  # its row was redrawn
                    self.text.delete(name)
            del self.images[path]

    def forget(self, all_of_them: bool) -> None:
        """Forget which pictures were asked for, since another conversation is shown. Forget also
        the pictures (`all_of_them`) for another server: there, a path is another picture."""
        self.asked = ()
        self.arrived.clear()
        if all_of_them:
            self.decoding = None
            self.images.clear()
            self.placed.clear()

    def take(self, picture: Picture) -> None:
        """Take the content of a picture, to be decoded soon."""
        self.arrived.append(picture)
        self._decode_soon()

    def _decode_soon(self) -> None:
        if self.arrived and not self.decodes:
            self.decodes = True
            self.timers.later("decode", PICTURE_MS, self._decode_next)

    def _decode_next(self) -> None:
        """Decode one picture: the user may be typing."""
        if not self.arrived:
            self.decodes = False
            return
        picture = self.decoding = self.arrived.popleft()
        file, data = picture.file, picture.data
        why = picture.why or picture_trouble(file, data)
        if file.path in self.images:  # it came twice; Tk shows none that is freed
            self._decoded(picture, self.images[file.path])
        elif why:
            self._decoded(picture, None, why)
        else:
            by = divisor(file, self.text.sheet.style.box)
            self.decode(file, data, by, functools.partial(self._decoded, picture))

    def _decoded(self, picture: Picture, image: tk.PhotoImage | None, why: str = "") -> None:
        """Keep a picture, unless another server is looked at by now, and go on with the next."""
        self.decodes = False
        if picture is self.decoding:
            if image is None:
                self.failed(picture.file.path, why or "it is damaged")
            else:
                self.images[picture.file.path] = image
        self.look_soon()
        self._decode_soon()


class Pointer:
    """The row that the keys and the pointer are for, and what a click on it means."""

    def __init__(self, transcript: "Transcript"):
        self.transcript, self.text = transcript, transcript.text
        self.sheet = self.text.sheet
        self.hovered: int | None = None
        self.menu_for: Callable[[Row, Any], Any] = chat.do_nothing
        self.acted: Callable[[str, Row], None] = chat.do_nothing
        self.told: Callable[[str], None] = chat.do_nothing  # about the row under the pointer
        text = self.text
        text.bind("<Button-1>", self._press, add=True)
        text.bind("<ButtonRelease-1>", self._click)
        text.bind("<Motion>", self._hover)
        text.bind("<Leave>", lambda _: self.told(""))
        for key, step in (("<Up>", -1), ("<Down>", 1)):
            text.bind(key, functools.partial(self._choose_next, step))
        text.bind("<Return>", self._menu)
        bind_menu(text, self._menu)
        text.show_hand(*CLICKED)

    @property
    def chosen(self) -> Any:
        """The key of the row that the keys are for."""
        return self.text.marks.get("chosen")

    @property
    def row(self) -> Row | None:
        """The row that keys are for: the chosen one, or the last message."""
        number = self.sheet.find(self.chosen)
        if number is not None:
            return self.sheet.rows[number]
        messages = (row for row in reversed(self.sheet.rows) if row.view.kind in chat.SPOKEN)
        return next(messages, None)

    def choose(self, number: int | None) -> None:
        """Choose a row; None chooses none."""
        self.text.mark_row("chosen", number)

    def _choose_next(self, step: int, event: Any) -> str:
        """Choose the next row, or the one before; the first key chooses the last in sight."""
        sheet = self.sheet
        number = sheet.find(self.chosen)
        number = self.text.last_in_sight() if number is None else number + step
        if not 0 <= number < len(sheet.rows):
            return "break"
        if sheet.is_drawn(number) or self.transcript.draw_older():
            self.choose(number)
            self.text.see(self.text.start_of(number))
            self.told(self.about(number))
        return "break"

    def box(self) -> tuple | None:
        """Return where the last line of the row is, in pixels, if it is in sight."""
        number = self.sheet.find(self.row.key) if self.row else None
        if not self.sheet.is_drawn(number):
            return None
        _, end = self.sheet.body_of(number)
        return self.text.bbox(f"{end} - 1 lines")

    def about(self, number: int) -> str:
        """Return the time of a row, and the users who reacted to it."""
        row = self.sheet.rows[number]
        moment = chat.moment_of(row.view)
        told = [f"{day_text(moment.date())} {moment:%H:%M:%S}"]
        told += [f"{emoji} {', '.join(names[:5])}" for emoji, names in row.reactions[:4]]
        return self.text.look.drawable("   ".join(told))

    def _hover(self, event: Any) -> None:
        number = self.text.row_at(f"@{event.x},{event.y}")
        if number != self.hovered:
            self.hovered = number
            self.told("" if number is None else self.about(number))

    def _menu(self, event: Any) -> str:
        if event.type == tk.EventType.ButtonPress:
            self.choose(self.text.row_at(f"@{event.x},{event.y}"))
        if row := self.row:
            self.menu_for(row, event)
        return "break"

    def _press(self, event: Any) -> None:
        self.text.focus_set()  # so that Copy works
        self.choose(None)

    def _click(self, event: Any) -> None:
        index = f"@{event.x},{event.y}"
        number = self.text.row_at(index)
        beside = self.text.get(index) == "\n"  # there is nothing under the pointer
        if number is None or beside or self.text.tag_ranges("sel"):  # the end of a selection
            return
        tags, row = self.text.tag_names(index), self.sheet.rows[number]
        if url := self.link_at(index):
            return self.acted(f"link {url}", row)
        for tag in CLICKED:
            if tag in tags:
                self.acted(f"react {self._emoji_at(index, row)}" if tag == "reaction" else tag, row)
        return None

    def _emoji_at(self, index: str, row: Row) -> str:
        """Return the reaction there: it may be drawn as its name."""
        found = self.text.tag_prevrange("reaction", f"{index} + 1 indices")
        shown = whole(self.text.get(*found)).strip() if found else ""
        drawn = self.text.look.drawable
        return next((one for one, _ in row.reactions if shown.startswith(f"{drawn(one)} ")), "")

    def link_at(self, index: str) -> str:
        number = self.text.row_at(index)
        return self.text.link_at(index, "" if number is None else self.sheet.rows[number].view.text)


class Transcript(ttk.Frame):
    """The conversation. It stays at the end while the end is in sight."""

    def __init__(self, parent: tk.Misc, look: Look, timers: Timers):
        super().__init__(parent, style="Card.TFrame")
        self.look, self.timers = look, timers
        self.at_bottom = True
        self.waiting_older = self.waiting_after = False
        self.reached_bottom: Callable[[], None] = chat.do_nothing
        self.left_bottom: Callable[[], None] = chat.do_nothing
        self.wants_older: Callable[[], None] = chat.do_nothing
        self.wants_newer: Callable[[], None] = chat.do_nothing  # the newest
        self.wants_after: Callable[[], None] = chat.do_nothing  # the next ones, of the past
        self.text = SheetText(self, look)
        self.sheet = self.text.sheet
        self.pictures = Pictures(self.text, timers)
        self.pictures.failed = self._tell_trouble
        self.text.drew = self.pictures.look_soon
        self.pointer = Pointer(self)
        self.text.mark_set("top", "1.0")  # of what is in sight; it moves with its text
        self.text.mark_gravity("top", "left")
        self.text.configure(yscrollcommand=self._scrolled)
        self.text.bar.configure(command=self.yview)
        self.text.bar.pack(side="right", fill="y")
        self.text.pack(side="left", fill="both", expand=True)
        self.below = ttk.Button(self, style="Accent.TButton", command=self.to_bottom)
        self.above = ttk.Button(self, text="new above \u2191", command=self.show_new)
        for button in (self.below, self.above):
            button.configure(takefocus=False)
        self.top = ttk.Label(self, style="Dim.Card.TLabel")
        self.typing = ttk.Label(self, style="Dim.Card.TLabel")
        text = self.text
        text.bind("<Configure>", lambda _: self._stay() or self._break_again())
        widget, tk_class, *others = text.bindtags()
        text.bindtags(("UserScrolls", widget, tk_class, "UserScrolled", *others))
        for sequence in SCROLLING:
            text.bind_class("UserScrolls", sequence, self._scrolls)
            text.bind_class("UserScrolled", sequence, self._look)
        text.bind("<Button-4>", self._go_up, add=True)
        text.bind("<MouseWheel>", lambda event: event.delta > 0 and self._go_up(), add=True)
        text.bind("<Prior>", self._go_up, add=True)
        text.bind("<Home>", lambda _: self.yview("1.0") or "break")
        text.bind("<End>", lambda _: self.to_bottom() or "break")
        look.follow(self._break_again)

    def _scrolls(self, event: Any = None) -> None:
        """Note that the user scrolls: all other movements are Tk's, when it lays out lines."""
        self.timers.later("scrolling", SCROLL_MS, chat.do_nothing)

    def yview(self, *where: Any) -> None:
        """Scroll, as the user wants."""
        self._scrolls()
        self.text.yview(*where)
        self._look()

    def _look(self, event: Any = None) -> None:
        """See at once where the user has scrolled to: Tk tells it when it draws, and what arrives
        before that would go back to the end."""
        self._scrolled(*self.text.yview())

    def _break_again(self) -> None:
        """Break lines from right to left again, if they have more room or less."""
        turned = (RIGHT_TO_LEFT.search(row.view.text) for row in self.sheet.rows)
        if self.text.has_other_room() and self.look.reorders and any(turned):
            self.redraw_all()

    # Rows

    def reset(self, event: Rows, spot: Spot | None = None) -> None:
        """Show a conversation: its end, or around one row, or where the user was reading."""
        if event.room == self.sheet.room and event.at == RESET and not self.sheet.past:
            spot = self.spot() if not self.at_bottom else None
        drawn = max(ROWS_DRAWN, spot.drawn if spot else 0)
        if event.mark >= 0:
            drawn = max(drawn, len(event.rows) - event.mark + ROWS_MORE)
        if event.room != self.sheet.room:
            self.text.marks.pop("found", None)
        self.sheet.reset(event)
        self.text.fill(self.sheet.draw_before(drawn))
        self.waiting_older = self.waiting_after = False
        if event.mark >= 0:
            self.show_row(event.mark)
        elif spot is not None and self.return_to(spot):
            self.at_bottom = False
        else:
            self.at_bottom = not self.sheet.past
            self.text.see("end")
        self.text.paint()
        self.tell_older("")
        self._want_older()

    def append(self, rows: tuple[Row, ...], seen: bool) -> None:
        self.waiting_after = False
        before = len(self.sheet.rows)
        self.text.append(rows, seen)
        if self.at_bottom:
            self.text.delete_first(self.sheet.fold_up())
            self.text.see("end")
        if before == 0:
            self.tell_older("")
        if before < FEW_ROWS:  # there was nothing older when there was no connection, say
            self.sheet.whole = False
            self._want_older()

    def prepend(self, rows: tuple[Row, ...]) -> None:
        """Add older rows, and draw some; what is in sight stays where it is."""
        self.sheet.prepend(rows)
        self.waiting_older = False
        if rows:
            self.draw_older()
            self._want_older()

    def draw_older(self) -> bool:
        spot = self.spot()
        drew = self.text.draw_older()
        if drew and spot is not None and not self.at_bottom:
            self.return_to(spot)
        return drew

    def clear(self) -> None:
        """Begin with an empty page."""
        self.sheet.clear()
        self.text.fill([])
        self.at_bottom = True
        self.reached_bottom()

    def trim(self, count: int) -> None:
        self.text.delete_first(self.sheet.trim(count))

    def change(self, row: Row) -> None:
        number = self.sheet.find_row(row)
        before = "" if number is None else self.sheet.rows[number].view.name
        self.redraw(self.sheet.replace(row))
        if before not in ("", row.view.name):
            self.redraw(number + 1)  # it may have stood under the same name

    def redraw(self, number: int | None) -> None:
        if self.sheet.is_drawn(number):
            self.text.redraw(number)
            self._stay()

    def redraw_all(self) -> None:
        sheet = self.sheet
        self.reset(Rows(sheet.room, RESET, sheet.rows, sheet.read_time))

    def restyle(self, clock: str, pictures: bool) -> None:
        """Show times otherwise, or no pictures."""
        wanted = self.sheet.style._replace(clock=clock, pictures=pictures)
        if wanted != self.sheet.style:
            self.sheet.style = wanted
            self.text.recolour()
            self.redraw_all()

    def rename_me(self, name: str) -> None:
        """Mark the reactions of this user, whose name is another one now."""
        before, self.sheet.me = self.sheet.me, name
        for number, row in enumerate(self.sheet.rows if before != name else ()):
            if row.reactions:
                self.redraw(number)

    def read_to(self, when: int) -> None:
        """Take away the "new" line: all was read, here or on another device."""
        self.redraw(self.sheet.read_to(when))

    def remove(self, id: str) -> None:
        for number in self.sheet.remove(id):
            self.redraw(number)
            self.redraw(number + 1)  # it may have stood under the same name

    def toggle(self, row: Row) -> None:
        """Show all of a long message, or its beginning."""
        self.sheet.expanded ^= {row.key}
        self.redraw(self.sheet.find(row.key))

    def _tell_trouble(self, path: str, why: str) -> None:
        """Say on the card why a picture is not shown."""
        self.sheet.troubles[path] = why
        spot = self.spot()
        for number, row in enumerate(self.sheet.rows):
            if row.view.file.partition(",")[0] == path:
                self.redraw(number)
        if spot is not None and not self.at_bottom:
            self.return_to(spot)

    # Scrolling

    def spot(self) -> Spot | None:
        text, number = self.text, self.text.row_at("@0,0")
        if number is None:
            return None
        counted = text.count(text.start_of(number), "@0,0", "ypixels") or 0
        pixels = counted[0] if isinstance(counted, tuple) else counted  # before Python 3.13
        box = text.dlineinfo("@0,0")
        offset = pixels - (box[1] - text.border if box else 0)
        return Spot(self.sheet.rows[number].key, offset, len(self.sheet.sizes))

    def return_to(self, spot: Spot) -> bool:
        """Scroll so that a row is where it was; return whether it is here."""
        number = self.sheet.find(spot.key)
        if not self.sheet.is_drawn(number):
            return False
        self.text.lay_out()
        self.text.yview(self.text.start_of(number))
        if spot.offset:
            self.text.yview_scroll(spot.offset, "pixels")
        return True

    def _stay(self) -> None:
        if self.at_bottom:
            self.text.see("end")

    def to_bottom(self) -> None:
        if self.sheet.past:
            return self.wants_newer()
        self.at_bottom = True
        self.text.see("end")
        return self.reached_bottom()

    def show_row(self, number: int | None) -> None:
        """Scroll to a row, if it is here, and mark it for a while."""
        while not self.sheet.is_drawn(number):
            if number is None or not self.draw_older():
                return
        self.at_bottom = False
        self.text.lay_out()
        first, _ = self.sheet.body_of(number)
        self.text.yview(f"{first} - 4 lines")
        self.text.see(first)
        self.text.mark_row("found", number)
        self.pointer.choose(number)
        self.left_bottom()

    def show_new(self) -> None:
        """Scroll to the first message that was not read."""
        self.show_row(self.sheet.find(self.sheet.marked))

    def show_reply(self, row: Row) -> None:
        """Scroll to the message that this one answers."""
        self.show_row(self.sheet.find_id(row.view.reply))

    def _scrolled(self, first: str | float, last: str | float) -> None:
        text = self.text
        text.bar.set(first, last)
        at_end = float(last) > BOTTOM and not self.sheet.past
        went_up = self.timers.waits("scrolling") and text.compare("@0,0", "<", "top")
        text.mark_set("top", "@0,0")
        if at_end and not self.at_bottom:
            self.at_bottom = True
            self.reached_bottom()
        elif self.at_bottom and not at_end and went_up:
            self.at_bottom = False
            self.left_bottom()
        elif self.at_bottom and not at_end:  # Tk's layout, and no scrolling of the user
            self.timers.soon("stay", self._stay)
        if self.sheet.marked is not None or self.above.place_info():
            self._tell_above()
        if float(first) > 0:
            self.tell_older("")
        self.pictures.look_soon()
        if self.sheet.past and float(last) > BOTTOM and not self.waiting_after:
            self.waiting_after = True
            self.timers.soon("after", self.wants_after)
        self._want_older()

    def scroll(self, pages: int) -> None:
        """Page up or down; up at the top asks for what is older."""
        if pages < 0:
            self._go_up()
        self.yview("scroll", pages, "pages")

    def _go_up(self, event: Any = None) -> None:
        """Look for older rows again, also where none were found before: the user wants them."""
        if self.text.yview()[0] <= 0:
            self.sheet.whole = self.sheet.cleared = self.waiting_older = False
            self._want_older()

    def _want_older(self) -> None:
        """Look soon whether older rows are wanted."""
        self.timers.soon("older", self._fetch_older)

    def _fetch_older(self) -> None:
        """Draw or fetch older rows: at the top, or while there are less than two screens of them,
        since the user could hardly leave the end."""
        first, last = self.text.yview()
        wanted = first < NEAR_TOP and not self.at_bottom or last - first > TWO_SCREENS
        waits = self.waiting_older or self.sheet.cleared
        if waits or not wanted or self.text.winfo_height() <= 1:
            return
        if not self.draw_older() and not self.sheet.whole:
            self.waiting_older = True
            self.wants_older()

    # What lies over the text

    def tell_below(self, count: int) -> None:
        """Show the button that leads to the newest message."""
        if self.sheet.past:
            text = "Back to the present \u2193"
        elif count:
            text = f"{count:,} new below \u2193"
        else:
            text = "To the newest \u2193"
        self.below.configure(text=text)
        y = -self.look.part(0.6)
        lay_over(self.below, not self.at_bottom, relx=0.5, rely=1.0, y=y, anchor="s")

    def _tell_above(self) -> None:
        """Show the button that leads to the "new" line, while that is above what is in sight."""
        number = self.sheet.find(self.sheet.marked)
        drawn, top = self.sheet.is_drawn(number), self.text.line_at("@0,0")
        is_above = drawn and self.sheet.line_of(number) < top
        lay_over(self.above, is_above, relx=0.5, y=self.look.part(0.5), anchor="n")

    def older_told(self, event: Fetching) -> None:
        """Take the state of older rows, and show it if the user is at the top."""
        self.waiting_older, self.sheet.whole = event.under_way, not event.more
        at_top = self.text.yview()[0] <= 0 and not self.at_bottom
        self.tell_older(event.text if at_top else "")
        if event.again:
            self._want_older()

    def tell_older(self, text: str) -> None:
        """Show a text about older rows at the top."""
        text = text or (NOTHING_SAID if self.sheet.room and not self.sheet.rows else "")
        set_text(self.top, text)
        lay_over(self.top, bool(text), relx=0.5, y=self.look.part(0.2), anchor="n")

    def tell_typing(self, text: str) -> None:
        """Show the users who are typing, over the empty line below the last message."""
        set_text(self.typing, text)
        x, y = self.look.part(0.9), -self.look.part(0.15)
        lay_over(self.typing, bool(text), x=x, rely=1.0, y=y, anchor="sw")


# ======================================================================================
# LISTS
# ======================================================================================
# The sidebar and the members are Treeviews: 5,000 rows are inserted in 50 ms, and only what
# has changed is touched afterwards.

DRAG_PIXELS = 6
SASH_MS = 10  # from a change of the panes until they get their widths


MIDDLE_SHARE = 0.4  # of the window that the conversation has at least ...
MIDDLE_EMS = 16  # ... and so many heights of a line
NARROWEST_EMS = 5  # of a pane at a side: of less nothing can be read
WIDEST_EMS = 80  # of a pane at a side; earlier versions kept pixels


class Panes(ttk.PanedWindow):
    """The conversation, and panes beside it whose widths are kept while they are hidden."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, orient="horizontal")
        self.look = look
        self.middle: tk.Misc = self
        self.wide: dict[str, float] = {}  # of the panes at the sides, in heights of a line
        self.names: dict[str, tk.Misc] = {}  # from left to right
        self.timer = ""  # until they are arranged
        look.follow(self.arrange_soon)
        self.bind("<ButtonRelease-1>", lambda _: self._measure(), add=True)
        self.bind("<Configure>", lambda _: self.arrange_soon())
        self.bind("<Destroy>", lambda _: self.timer and self.after_cancel(self.timer))

    def compose(self, order: dict[str, tk.Misc], middle: tk.Misc, wide: dict[str, float]) -> None:
        """Take all panes there are, from left to right, and their widths at first."""
        self.names, self.middle, self.wide = order, middle, dict(wide)

    def is_shown(self, name: str) -> bool:
        return str(self.names[name]) in map(str, self.panes())

    def show(self, name: str, on: bool) -> None:
        pane = self.names[name]
        if on and not self.is_shown(name):
            shown = [one for one in self.names if self.is_shown(one) or one == name]
            place = shown.index(name)
            weight = 1 if pane is self.middle else 0
            self.insert(place if place < len(shown) - 1 else "end", pane, weight=weight)
        elif not on and self.is_shown(name):
            self.forget(pane)
        self.arrange_soon()

    def arrange_soon(self) -> None:
        self.timer = self.timer or self.after(SASH_MS, self.arrange)

    def arrange(self) -> None:
        """Give the panes at the sides their widths; the middle has the rest."""
        self.timer, full = "", self.winfo_width()
        if full <= 1:  # it is not on the screen yet
            return self.arrange_soon()
        shown = [name for name in self.names if self.is_shown(name)]
        sizes = self._sizes(shown, full)
        middle = next(n for n, name in enumerate(shown) if self.names[name] is self.middle)
        for _ in range(2):  # a sash does not pass the next one
            for n in range(len(shown) - 1):
                left = sum(sizes[: n + 1]) if n < middle else full - sum(sizes[n + 1 :])
                self.sashpos(n, left)
        return None

    def _sizes(self, shown: list[str], full: int) -> list[int]:
        """Return the widths of panes: in a narrow window the conversation needs most of it."""
        sizes = {name: round(self.wide.get(name, 0) * self.look.em) for name in shown}
        room = max(0, full - max(MIDDLE_EMS * self.look.em, round(MIDDLE_SHARE * full)))
        for name in ("members", "sidebar"):  # which give way to what the user opened
            if "panel" in sizes and name in sizes and sum(sizes.values()) > room:
                sizes[name] = 0
        share = min(1.0, room / max(1, sum(sizes.values())))
        scaled = [round(share * size) for size in sizes.values()]
        return [size if size > NARROWEST_EMS * self.look.em else 0 for size in scaled]

    def restore(self, wide: Any) -> None:
        """Take widths that were kept."""
        for name, ems in wide.items() if isinstance(wide, dict) else ():
            if name in self.wide and isinstance(ems, (int, float)) and 2 < ems < WIDEST_EMS:
                self.wide[name] = ems

    def _measure(self) -> None:
        """Note the widths to which the user has dragged the sashes."""
        for name in self.wide:
            if self.is_shown(name) and self.names[name].winfo_width() > 2 * self.look.em:
                self.wide[name] = round(self.names[name].winfo_width() / self.look.em, 1)


def scrolled_tree(parent: tk.Misc, look: Look, *columns: str) -> ttk.Treeview:
    """Return a list with a scroll bar, in a frame that shows whether it has the keys."""
    edge = tk.Frame(parent, highlightthickness=1)
    tree = ttk.Treeview(
        edge, show="tree", style="Side.Treeview", selectmode="browse", columns=columns
    )
    bar = ttk.Scrollbar(edge, command=tree.yview, style="Side.Vertical.TScrollbar")

    def recolour(focused: bool = False) -> None:
        c = look.colours
        edge.configure(background=c.ground, highlightcolor=c.accent)
        edge.configure(highlightbackground=c.accent if focused else c.ground)

    look.follow(recolour)
    tree.bind("<FocusIn>", lambda _: recolour(True))
    tree.bind("<FocusOut>", lambda _: recolour(False))
    edge.pack(fill="both", expand=True)
    tree.configure(yscrollcommand=bar.set)
    bar.pack(side="right", fill="y")
    tree.pack(side="left", fill="both", expand=True)
    return tree


def box_of_choice(tree: ttk.Treeview) -> tuple | None:
    """Return where the chosen row of a list is, in pixels."""
    selected = tree.selection() or (tree.focus(),)
    box = tree.bbox(selected[0]) if selected[0] else ""
    return tuple(box) if box else None


class Sidebar(ttk.Frame):
    """Servers, and below them channels and private conversations."""

    def __init__(self, parent: tk.Misc, look: Look, model: Model):
        super().__init__(parent)
        self.look, self.model = look, model
        self.here = 0  # the conversation that is selected
        self.order: dict[str, list[str]] = {}  # names of conversations by server, as dragged
        self.drafts: set[int] = set()  # conversations in which something is half typed
        self.counts: dict[int, str] = {}  # of new messages, as they are shown
        self.dragged = ""
        self.pressed_at = 0
        self.chosen: Callable[[int], None] = chat.do_nothing
        self.menu_for: Callable[[int, Any], Any] = chat.do_nothing
        self.reading: Callable[[], bool] = bool  # the user sees what comes in the one looked at
        self.reordered: Callable[[], None] = chat.do_nothing
        self.tree = scrolled_tree(self, look, "count")
        self.tree.column("count", anchor="e", stretch=False)
        look.follow(self.recolour)
        tree = self.tree
        tree.bind("<<TreeviewSelect>>", self._selected)
        tree.bind("<Button-1>", self._press, add=True)
        tree.bind("<B1-Motion>", self._drag)
        tree.bind("<ButtonRelease-1>", self._drop)
        bind_menu(tree, self._menu)

    def recolour(self) -> None:
        look, c, tag = self.look, self.look.colours, self.tree.tag_configure
        self.tree.column("#0", width=9 * look.em, minwidth=3 * look.em)
        self._fit_counts()
        tag("server", foreground=c.dim, font=look.small)
        tag("unread", font=look.bold, foreground=c.ink)
        tag("called", font=look.bold, foreground=c.bad)
        tag("muted", foreground=c.pale, font=look.font)
        tag("outside", foreground=c.dim, font=look.italic)

    # What there is

    def clear(self) -> None:
        self.tree.delete(*self.tree.get_children())
        self.drafts.clear()
        self.counts.clear()
        self.here = 0

    def restore(self, order: dict[str, Any]) -> None:
        """Take an order that was kept."""
        lists = {server: names for server, names in order.items() if isinstance(names, list)}
        self.order = {server: [str(name) for name in names] for server, names in lists.items()}

    def show_servers(self) -> None:
        servers = self.model.servers
        wanted = [f"s{server.number}" for server in servers]
        for row in set(self.tree.get_children()) - set(wanted):
            self.tree.delete(row)
        for server, row in zip(servers, wanted, strict=True):
            mark = "" if server.ready else "\u2026 " if server.phase != chat.ENDED else "\u2715 "
            text = self.look.seen(f"{mark}{server.address}")
            if self.tree.exists(row):
                self.tree.item(row, text=text)
            else:
                self.tree.insert("", "end", row, text=text, open=True, tags=("server",))
        self.arrange()

    def show_rooms(self, event: Rooms) -> None:
        """Show conversations that have changed, which the model knows already."""
        for number in event.gone:
            self.drafts.discard(number)
            self.counts.pop(number, None)
            if self.tree.exists(f"r{number}"):
                self.tree.delete(f"r{number}")
        for room in event.changed:
            if self.tree.exists(f"r{room.number}"):
                self.refresh(room.number)
        self.arrange()

    def arrange(self) -> None:
        """Insert what is missing, and put all in order."""
        for server in self.model.servers:
            parent = f"s{server.number}"
            wanted = [f"r{number}" for number in self.ordered(server)]
            known = self.tree.get_children(parent)
            if list(known) == wanted:
                continue
            for position, row in enumerate(wanted):
                if not self.tree.exists(row):
                    self.tree.insert(parent, position, row)
                    self.refresh(int(row[1:]))
                elif self.tree.index(row) != position or self.tree.parent(row) != parent:
                    self.tree.move(row, parent, position)
        self.select()

    def ordered(self, server: Server) -> list[int]:
        """Return the conversations of a server: as the user dragged them, else channels first."""
        names = {name: n for n, name in enumerate(self.order.get(server.address, []))}
        known = self.model.rooms
        rooms = [known[number] for number in server.rooms if number in known]
        last = len(names)
        rooms.sort(key=lambda room: (names.get(room.name, last), not room.channel))
        return [room.number for room in rooms]

    def all_rooms(self) -> list[int]:
        """Return all conversations from top to bottom: their numbers are those of Alt."""
        return [number for server in self.model.servers for number in self.ordered(server)]

    def refresh(self, number: int) -> None:
        room = self.model.rooms[number]
        if number in self.drafts:
            room = room._replace(draft="...")
        elif number == self.here:
            room = room._replace(draft="")
        if number == self.here and self.reading():
            room = room._replace(unread=0, called=0)
        away = not room.inside or bool(room.gone)
        states = {"muted": room.muted, "called": room.called, "unread": room.unread}
        tag = next((state for state, on in states.items() if on), "outside" if away else "read")
        text, count = self.look.seen(sidebar_text(room)), count_text(room)
        self.tree.item(f"r{number}", text=text, values=(count,), tags=(tag,))
        self.counts[number] = count

    def _fit_counts(self) -> None:
        """Give the counts the room of the longest: the names need the rest."""
        longest = max(self.counts.values(), key=len, default="")
        width = self.look.bold.measure(longest) + self.look.part(0.6)
        names, before = (self.tree.column(one, "width") for one in ("#0", "count"))
        if width != before:
            self.tree.column("count", width=width)
            self.tree.column("#0", width=names + before - width)

    def set_draft(self, number: int, on: bool) -> None:
        """Note whether something is half typed in a conversation."""
        if on != (number in self.drafts):
            self.drafts ^= {number}
            if self.tree.exists(f"r{number}"):
                self.refresh(number)

    def select(self) -> None:
        """Select the conversation that is looked at."""
        before, self.here = self.here, self.model.here
        number = self.here
        for one in {before, number}:
            if self.tree.exists(f"r{one}"):
                self.refresh(one)
        row = f"r{number}"
        room = self.model.rooms.get(number)
        if not self.tree.exists(row) and room:
            row = f"s{room.server}"
        if self.tree.exists(row) and self.tree.selection() != (row,):
            self.tree.selection_set(row)
            self.tree.focus(row)
            self.tree.see(row)
        self._fit_counts()

    def number_of(self, row: str) -> int:
        """Return the conversation of a row; of a server's, the place without one."""
        if row[:1] == "r":
            return int(row[1:])
        server = int(row[1:] or 0)
        rooms = self.model.rooms.values()
        empty = (room.number for room in rooms if room.server == server and not room.name)
        return next(empty, 0)

    def _selected(self, event: Any) -> None:
        selected = self.tree.selection()
        if not selected or self.dragged:
            return
        number = self.number_of(selected[0])
        room, here = (self.model.rooms.get(one) for one in (number, self.here))
        if room and here and not room.name and room.server == here.server:
            return
        if number and number != self.here:
            self.chosen(number)

    def _menu(self, event: Any) -> str:
        if event.type == tk.EventType.ButtonPress:
            row = self.tree.identify_row(event.y)
        else:
            row = self.tree.focus() or f"r{self.here}"
        if row:
            self.menu_for(self.number_of(row), event)
        return "break"

    # Another order

    def _press(self, event: Any) -> None:
        self.pressed_at = event.y
        self.dragged = ""

    def _drag(self, event: Any) -> str:
        """Move a conversation below the pointer to another place."""
        row = self.dragged or self.tree.identify_row(self.pressed_at)
        if row[:1] != "r" or abs(event.y - self.pressed_at) < DRAG_PIXELS:
            return "break"
        self.dragged = row
        target, parent = self.tree.identify_row(event.y), self.tree.parent(row)
        if target[:1] == "r" and target != row and self.tree.parent(target) == parent:
            self.tree.move(row, parent, self.tree.index(target))
        return "break"

    def _drop(self, event: Any) -> None:
        if self.dragged:
            self._keep_order(self.tree.parent(self.dragged))
            self.dragged = ""

    def shift(self, step: int, number: int = 0) -> None:
        """Move a conversation up or down; without a number, the one that is looked at."""
        row = f"r{number or self.here}"
        if self.tree.exists(row):
            parent = self.tree.parent(row)
            self.tree.move(row, parent, max(0, self.tree.index(row) + step))
            self._keep_order(parent)

    def _keep_order(self, parent: str) -> None:
        rows = [self.model.rooms[int(row[1:])] for row in self.tree.get_children(parent)]
        address = next(one.address for one in self.model.servers if f"s{one.number}" == parent)
        self.order[address] = [room.name for room in rows]
        self.reordered()


class People(ttk.Frame):
    """The members of a channel: operators first. Only what changed is drawn."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent)
        self.look = look
        self.rows: dict[str, chat.Person] = {}
        self.order: list[tuple] = []  # places in the list, sorted
        self.mine = ""
        self.chosen: Callable[[str], None] = chat.do_nothing
        self.menu_for: Callable[[str, Any], Any] = chat.do_nothing
        self.count = ttk.Label(self, style="Dim.TLabel")
        self.count.pack(fill="x")
        self.tree = scrolled_tree(self, look)
        look.follow(self.recolour)
        self.tree.bind("<Double-Button-1>", self._choose)
        self.tree.bind("<Return>", self._choose)
        bind_menu(self.tree, self._menu)

    def recolour(self) -> None:
        look, c = self.look, self.look.colours
        self.count.configure(padding=(look.part(0.6), look.part(0.6), 0, look.part(0.3)))
        self.tree.column("#0", width=8 * look.em, minwidth=3 * look.em)
        for number, colour in enumerate(c.names):
            self.tree.tag_configure(f"name{number}", foreground=colour)
        self.tree.tag_configure("away", foreground=c.pale, font=look.italic)

    def change(self, came: Iterable[chat.Person], went: Iterable[str], reset: bool) -> None:
        """Take members that came or are others now, and those who went."""
        if reset:
            self.rows.clear()
            self.order.clear()
            self.tree.delete(*self.tree.get_children())
        self._remove(went)
        came = list(came)
        self._remove(one.name for one in came if one.name in self.rows)
        if not self.rows:
            came.sort(key=member_order)
        for person in came:
            self._insert(person)
        self.count.configure(text=f"MEMBERS \u2013 {len(self.rows):,}" if self.rows else "")

    def _insert(self, person: chat.Person) -> None:
        place = member_order(person)
        position = bisect.bisect(self.order, place)
        self.order.insert(position, place)
        self.rows[person.name] = person
        tags = ("away",) if person.away else (name_tag(person.name),)
        text = self.look.seen(member_text(person, self.mine))
        where = position if position < len(self.rows) - 1 else "end"  # which needs no search
        self.tree.insert("", where, f"m{person.name}", text=text, tags=tags)

    def _remove(self, names: Iterable[str]) -> None:
        rows = []
        for name in names:
            if person := self.rows.pop(name, None):
                del self.order[bisect.bisect_left(self.order, member_order(person))]
                rows.append(f"m{name}")
        if rows:
            self.tree.delete(*rows)

    def is_operator(self, name: str) -> bool:
        """Return whether a member may remove messages of others."""
        return name in self.rows and self.rows[name].rank[:1] in ("~", "&", "@", "%")

    def rename_me(self, name: str) -> None:
        """Mark another row as that of this user."""
        before, self.mine = self.mine, name
        people = [self.rows[one] for one in (before, name) if one in self.rows]
        if before != name and people:
            self.change(people, (), False)

    def _selected(self) -> str:
        selected = self.tree.selection()
        return selected[0][1:] if selected else ""

    def _choose(self, event: Any) -> str:
        name = self._selected()
        if name and name != self.mine:
            self.chosen(name)
        return "break"

    def _menu(self, event: Any) -> str:
        if event.type == tk.EventType.ButtonPress:
            row = self.tree.identify_row(event.y)
            self.tree.selection_set(row)
        if name := self._selected():
            self.menu_for(name, event)
        return "break"


# ======================================================================================
# PANEL
# ======================================================================================
# Texts that are no part of a conversation stand beside it: what a search found, help,
# members that were asked for. A click on a message that was found leads to where it was said.

RESULT_SHOWN = 300  # characters of a message that was found
WINDOW_KEYS = (
    ("Return", "send; Shift+Return: a new line"),
    ("Tab", "complete a name, a channel, a command, an emoji (:tea)"),
    ("Up, Down", "earlier lines; in an empty field or at its edge"),
    ("Page Up, Page Down", "read back and forth"),
    ("Ctrl+K", "go to any conversation"),
    ("Alt+1 \u2026 Alt+9", "go to that conversation"),
    ("Alt+Up, Alt+Down", "the conversation above or below; with Shift: move it"),
    ("Alt+A", "the next unread conversation, those that mention you first"),
    ("Alt+N", "the first message here that was not read"),
    ("Ctrl+O", "send a file; or paste its path"),
    ("Ctrl+F", "search; Return searches, Down goes to what was found"),
    ("F6", "the next part of the window; Shift+F6: the one before"),
    ("Up, Down in the messages", "choose one; Return or the menu key opens its menu"),
    ("Alt+R, Alt+E", "answer, or react to, the chosen message or the last one"),
    ("F8, F9", "hide or show the conversations, the members"),
    ("Ctrl+Plus, Ctrl+Minus, Ctrl+0", "larger, smaller, as usual"),
    ("Ctrl+Comma", "settings"),
    ("Ctrl+W", "close the conversation"),
    ("F1, F10", "help, the menu"),
    ("Escape", "close what is open; then go to the newest message"),
)


def keys_text() -> str:
    width = max(len(key) for key, _ in WINDOW_KEYS)
    return "\n".join(f"{key:{width}}  {what}" for key, what in WINDOW_KEYS)


EXPLAINED = re.compile(r"(\S.*?) {2,}(\S.*)")  # a command or a key, and what it does


def page_pieces(text: str, style: Style) -> list:
    """Return a text to be read; where words are explained, those stand above."""
    pieces: list = []
    for line in broken(text).split("\n"):
        if match := EXPLAINED.fullmatch(line):
            pieces += [f"{match[1]}\n", ("term",), f"{match[2]}\n", ("explained",)]
        else:
            pieces += line_pieces(line, style, "page")
    return pieces


class PanelText(ReadText):
    def configure_tags(self) -> None:
        look, c, tag = self.look, self.look.colours, self.tag_configure
        indent = look.part(1.2)
        tag("head", foreground=c.dim, font=look.small)
        tag("chosen", background=c.selected)
        tag("page", spacing1=look.part(0.2))
        tag("term", font=look.fixed, spacing1=look.part(0.3))
        tag("explained", foreground=c.dim, font=look.small, lmargin1=indent, lmargin2=indent)


class Panel(ttk.Frame):
    """A pane for results and pages, with a field to search in."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, style="Card.TFrame")
        self.look = look
        self.search: Callable[[str, bool], None] = chat.do_nothing
        self.jump: Callable[[int, chat.ViewEvent], None] = chat.do_nothing
        self.closed: Callable[[], None] = chat.do_nothing
        self.open_link: Callable[[str], None] = chat.do_nothing
        self.rows: list[tuple[int, str, chat.ViewEvent]] = []
        self.wanted = ""  # words that were looked for
        self.everywhere = False
        head = ttk.Frame(self, style="Card.TFrame")
        close = ttk.Button(head, text="\u2715", style="Plain.TButton")
        close.configure(command=lambda: self.closed())
        close.pack(side="right")
        self.title = ttk.Label(head, style="Card.TLabel", font=look.bold)
        self.title.pack(side="left", fill="x", expand=True)
        head.pack(fill="x")
        self.field = Field(self, look, self.enter, width=20)
        self.scope = ttk.Button(self, style="Plain.TButton", command=self._change_scope)
        self.text = PanelText(self, look, (0.3, 0.4), width=30, height=4)
        self.style = Style(fits=self.text.fits if look.reorders else None, seen=look.ordered)
        self.make: Callable[[], list] = list  # the pieces that are shown
        self.field.pack(fill="x")
        self.scope.pack(anchor="w")
        self.text.bar.pack(side="right", fill="y")
        self.text.pack(side="left", fill="both", expand=True)
        self._name_scope()
        look.follow(self.recolour)
        text = self.text
        text.bind("<Configure>", self._break_again)
        self.look.follow(self._break_again)
        text.bind("<ButtonRelease-1>", self._click)
        text.bind("<Return>", lambda _: self._open())
        for key, step in (("<Up>", -1), ("<Down>", 1)):
            text.bind(key, functools.partial(self._choose, step))
        self.field.bind("<Down>", functools.partial(self._choose, 1))
        offer_menu(text, self.look, "Copy")

    def recolour(self) -> None:
        self.configure(padding=(self.look.part(0.5), self.look.part(0.3), 0, 0))

    # The field

    def ask(self, words: str = "") -> None:
        self._show_field(True)
        if not self.rows:  # a page, which is not what is looked for
            self._fill(list)
        if words:
            self.field.set(words)
        self.field.tag_add("sel", "1.0", "end-1c")
        self.field.focus_set()
        self.title.configure(text="Search")

    def enter(self) -> None:
        if words := self.field.content.strip():
            self.search(words, self.everywhere)

    def _change_scope(self) -> None:
        self.everywhere = not self.everywhere
        self._name_scope()
        self.enter()
        self.field.focus_set()

    def _name_scope(self) -> None:
        where = "in all conversations" if self.everywhere else "in this conversation"
        self.scope.configure(text=f"{where} (change)")

    def _show_field(self, on: bool) -> None:
        if on:
            self.field.pack(fill="x", before=self.text.bar)
            self.scope.pack(anchor="w", before=self.text.bar)
        else:
            self.field.pack_forget()
            self.scope.pack_forget()

    # What is shown

    def _fill(self, make: Callable[[], list]) -> None:
        self.make = make
        self.text.fill(make())
        self.text.yview_moveto(0)

    def _break_again(self, event: Any = None) -> None:
        """Break lines from right to left again, if they have more room or less."""
        turned = any(isinstance(piece, Seen) for piece in self.text.filled[::2])
        if self.text.has_other_room() and turned:
            self.text.fill(self.make())

    def show_page(self, title: str, text: str) -> None:
        """Show a text from its beginning."""
        self.rows = []
        self._show_field(False)
        self.title.configure(text=self.look.seen(title[:1].upper() + title[1:]))
        self._fill(lambda: page_pieces(text, self.style))
        self.text.focus_set()

    def show_results(self, title: str, rows: tuple) -> None:
        """Show messages that were found, the newest first."""
        self.rows, self.wanted = list(reversed(rows)), title
        self._show_field(True)
        count = chat.counted(len(rows), "message")
        self.title.configure(text=self.look.seen(shorter(f"{count}: {title}", NAME_SHOWN)))
        for tag in self.text.tag_names():
            if tag.startswith("row"):
                self.text.tag_delete(tag)
        self._fill(self._result_pieces)

    def _result_pieces(self) -> list:
        pieces: list = []
        for n, (_, where, view) in enumerate(self.rows):
            when, tag, seen = f"{chat.moment_of(view):%Y-%m-%d %H:%M}", f"row{n}", self.style.seen
            named = ("head", name_tag(view.name), tag)
            pieces += [seen(shorter(view.name, NAME_SHOWN)), named, "  ", ("head", tag)]
            pieces += [seen(where), ("head", tag), f"  {when}\n", ("head", tag)]
            text = " ".join(shorter(view.text, RESULT_SHOWN).split())
            lines = line_pieces(text, self.style, "found", tag)
            lines[1::2] = [tuple(one for one in tags if one != "link") for tags in lines[1::2]]
            pieces += lines
        return pieces

    def remove(self, id: str) -> None:
        """Take a message away that was redacted."""
        left = [row for row in self.rows if row[2].id != id]
        if left != self.rows:
            self.show_results(self.wanted, left[::-1])

    def _choose(self, step: int, event: Any) -> str | None:
        """Choose the next message that was found."""
        if not self.rows:
            return None
        chosen = [tag for tag in self.text.tag_names("insert") if tag.startswith("row")]
        number = int(chosen[0][3:]) + step if chosen and event.widget is self.text else 0
        number = max(0, min(len(self.rows) - 1, number))
        first, last = self.text.tag_ranges(f"row{number}")[:2]
        self.text.tag_remove("chosen", "1.0", "end")
        self.text.tag_add("chosen", first, last)
        self.text.mark_set("insert", first)
        self.text.see(last)
        self.text.see(first)
        self.text.focus_set()
        return "break"

    def _click(self, event: Any) -> None:
        index = f"@{event.x},{event.y}"
        self.text.mark_set("insert", index)
        if self.text.tag_ranges("sel"):
            return
        if url := self.text.link_at(index):
            self.open_link(url)
        else:
            self._open()

    def _open(self) -> str:
        """Show the message at the cursor among those around it."""
        for tag in self.text.tag_names("insert"):
            if tag.startswith("row"):
                number, _, view = self.rows[int(tag[3:])]
                self.jump(number, view)
        return "break"


# ======================================================================================
# CARDS
# ======================================================================================
# Dialogs are frames on top of the window: nothing waits for them, and they follow the look
# and the keys of everything else. Escape closes one.

ACCOUNT_LABEL = "Password of your account, if you have one"
PASSWORD_LABEL = "Password of the server, if it asks for one"


def secret_field(parent: tk.Misc, enter: Callable[[], None]) -> ttk.Entry:
    """Return a field that shows dots. It takes no emoji: they corrupt the memory of an Entry."""
    small = (parent.register(lambda text: all(ord(c) <= 0xFFFF for c in text)), "%P")
    field = ttk.Entry(parent, show="\u2022", validate="key", validatecommand=small)
    field.bind("<Return>", lambda _: enter())
    return field


def descendants(widget: tk.Misc) -> Iterator[tk.Misc]:
    for child in widget.winfo_children():
        yield child
        yield from descendants(child)


class Scrolled(tk.Canvas):
    """A frame, `content`, that scrolls by wheel, bar and focus where it has not enough room."""

    def __init__(self, parent: tk.Misc):
        super().__init__(parent, highlightthickness=0, borderwidth=0)
        self.content = ttk.Frame(self, style="Card.TFrame")
        self.create_window(0, 0, window=self.content, anchor="nw", tags="content")
        self.bar = ttk.Scrollbar(self, command=self.yview)
        self.configure(yscrollcommand=self._scrolled)
        self.content.bind("<Configure>", lambda _: self.fit())
        self.bind("<Configure>", lambda _: self._fill())

    def fit(self) -> None:
        """Ask for as much room as the content needs."""
        wide, high = self.content.winfo_reqwidth(), self.content.winfo_reqheight()
        self.configure(width=wide, height=high, scrollregion=(0, 0, wide, high))

    def _fill(self) -> None:
        """Give the content the width that the bar leaves."""
        bar = self.bar.winfo_reqwidth() if self.bar.winfo_manager() else 0
        self.itemconfigure("content", width=self.winfo_width() - bar)

    def _scrolled(self, first: str, last: str) -> None:
        self.bar.set(first, last)
        is_cut = float(first) > 0 or float(last) < 1
        lay_over(self.bar, is_cut, relx=1, relheight=1, anchor="ne")
        self._fill()

    def wheel(self, step: int) -> None:
        if self.bar.winfo_manager():
            self.yview_scroll(step, "units")

    def see(self, widget: tk.Misc) -> None:
        """Scroll as little as needed for a widget of the content to be in sight."""
        if not str(widget).startswith(str(self.content)):
            return
        high = max(1, self.content.winfo_height())
        top = widget.winfo_rooty() - self.content.winfo_rooty()
        first, last = (share * high for share in self.yview())
        if top < first:
            self.yview_moveto(top / high)
        elif top + widget.winfo_height() > last:
            self.yview_moveto((first + top + widget.winfo_height() - last) / high)


class Card(ttk.Frame):
    """The base of the dialogs."""

    def __init__(self, parent: tk.Misc, look: Look, title: str):
        super().__init__(parent, style="Raised.Card.TFrame")
        self.look = look
        self.closed: Callable[[], None] = chat.do_nothing
        self.head = ttk.Label(self, text=title, style="Large.Card.TLabel")
        self.page = Scrolled(self)
        self.body = self.page.content
        self.buttons = ttk.Frame(self, style="Card.TFrame")
        self.head.pack(fill="x", anchor="w")
        self.buttons.pack(side="bottom", fill="x")  # in sight also where the body is not
        self.page.pack(fill="both", expand=True)
        self.keys = f"Keys of {self}"  # a tag: Tab would stop at a label with a key of its own
        for sequence, act in (
            ("<Escape>", lambda _: self.hide() or "break"),
            ("<Button-4>", lambda _: self.page.wheel(-1)),
            ("<Button-5>", lambda _: self.page.wheel(1)),
            ("<MouseWheel>", lambda event: self.page.wheel(-1 if event.delta > 0 else 1)),
        ):
            self.bind_class(self.keys, sequence, act)
        look.follow(self.recolour)

    def recolour(self) -> None:
        self.configure(padding=self.look.part(1.3))
        self.body.configure(padding=(0, self.look.part(0.6)))
        self.page.configure(background=self.look.colours.paper)

    def add_button(self, text: str, command: Callable[[], Any], first: bool = False) -> ttk.Button:
        style = "Accent.TButton" if first else "TButton"
        button = ttk.Button(self.buttons, text=text, style=style, command=command)
        button.bind("<Return>", lambda _: button.invoke() and "break" or "break")
        button.pack(side="right", padx=(self.look.part(0.4), 0))
        return button

    @property
    def shown(self) -> bool:
        return bool(self.place_info())

    def open(self, focus: tk.Misc) -> None:
        """Show it, in place of others; the keys go to this part of it."""
        for other in self.master.winfo_children():
            if isinstance(other, Card):
                other.place_forget()
        self.place(relx=0.5, rely=0.5, anchor="center", width="", height="")
        self.lift()
        self._make_room()
        for widget in descendants(self):
            if self.keys not in widget.bindtags():
                widget.bindtags((self.keys, *widget.bindtags()))
        self.focused = focus
        focus.focus_set()

    def _make_room(self) -> None:
        """Make the window larger, if the card is larger than it, as far as the screen allows."""
        self.update_idletasks()
        self.page.fit()
        self.update_idletasks()
        window, needs = self.winfo_toplevel(), (self.winfo_reqwidth(), self.winfo_reqheight())
        now = (window.winfo_width(), window.winfo_height())
        screen = (window.winfo_screenwidth(), window.winfo_screenheight() * 9 // 10)
        if now[0] <= 1:  # it is not on the screen yet
            return
        wide, high = (
            max(have, min(need, most)) for have, need, most in zip(now, needs, screen, strict=True)
        )
        if (wide, high) != now:
            title = window.winfo_rooty() - window.winfo_y()
            x = min(window.winfo_x(), window.winfo_screenwidth() - wide)
            y = min(window.winfo_y(), window.winfo_screenheight() - high - title)
            window.geometry(f"{wide}x{high}+{max(0, x)}+{max(0, y)}")
        self.place(width=min(needs[0], wide), height=min(needs[1], high))

    def hide(self) -> None:
        self.place_forget()
        self.closed()

    def keep_focus(self, widget: Any) -> None:
        """Keep the focus in this card while it is open, and where it was, after a menu, say."""
        if self.shown and not str(widget).startswith(str(self)):
            self.focused.focus_set()
        elif self.shown and not isinstance(widget, tk.Menu):
            self.focused = widget
            self.page.see(widget)


class ConnectCard(Card):
    """The question for a name and a server."""

    def __init__(self, parent: tk.Misc, look: Look, connect: Callable, recent: Callable):
        super().__init__(parent, look, "Join the conversation")
        self.connect = connect
        self.recent: Callable[[], list[list[str]]] = recent
        body = self.body
        self.name = Field(body, look, self.enter)
        self.server = Field(body, look, self.enter)
        self.password, self.secret = secret_field(body, self.enter), secret_field(body, self.enter)
        self.tls = tk.BooleanVar(body)
        self.register = tk.BooleanVar(body)
        self.error = ttk.Label(self, style="Bad.Card.TLabel")
        self.found = ttk.Label(body, style="Dim.Card.TLabel")
        self.known = ttk.Button(body, text="Recent servers \u25be", command=self._show_recent)
        for widgets in (
            (ttk.Label(body, text="Your name", style="Card.TLabel"), self.name),
            (ttk.Label(body, text="Server", style="Card.TLabel"), self.server),
            (self.known, self._check("Encrypt the connection (TLS)", self.tls)),
            (ttk.Label(body, text=ACCOUNT_LABEL, style="Card.TLabel"), self.secret),
            (self._check("This is a new account: register it", self.register),),
            (ttk.Label(body, text=PASSWORD_LABEL, style="Card.TLabel"), self.password),
        ):
            for widget in widgets:
                fill = "none" if isinstance(widget, (ttk.Button, ttk.Checkbutton)) else "x"
                widget.pack(fill=fill, anchor="w", pady=(0, look.part(0.15)))
                widget.lift()  # Tab goes through widgets in this order
            widgets[-1].pack_configure(pady=(0, look.part(0.4)))
        self.error.pack(side="bottom", fill="x", before=self.page)  # in sight wherever the page is
        self.go = self.add_button("Connect", self.enter, first=True)
        self.cancel = self.add_button("Cancel", self.hide)

    def _check(self, text: str, variable: tk.BooleanVar) -> ttk.Checkbutton:
        return ttk.Checkbutton(self.body, text=text, variable=variable)

    def show(self, name: str, server: str, error: str = "") -> None:
        self._take(name, server)
        self.register.set(False)
        self.error.configure(text=self.look.seen(label_text(error)))
        self.error.configure(wraplength=20 * self.look.em)
        self.known.configure(state="normal" if self.recent() else "disabled")
        self.name.tag_add("sel", "1.0", "end-1c")
        self.open(self.name)

    def tell_found(self, server: str) -> None:
        """Tell that a server was found on this machine; "": there is none."""
        if not server:
            return
        self.found.configure(text=f"A server answers on this machine: {server}")
        self.found.configure(wraplength=20 * self.look.em)
        self.found.pack(anchor="w", after=self.server, pady=(0, self.look.part(0.4)))

    def _show_recent(self) -> None:
        menu = self.look.menu(self)
        for name, server in self.recent():
            label = self.look.seen(f"{server}  as {name}")
            menu.add_command(label=label, command=functools.partial(self._take, name, server))
        post_menu_below(menu, self.known)

    def _take(self, name: str, server: str) -> None:
        self.name.set(name)
        self.server.set(server)
        self.tls.set(server.startswith(("ircs://", "chats://")))

    def enter(self) -> None:
        secrets = self.password.get(), self.secret.get()
        for field in (self.password, self.secret):
            field.delete(0, "end")
        server = self.server.content.strip()
        if self.tls.get() and "://" not in server:
            server = f"ircs://{server}"
        self.connect(self.name.content.strip(), server, *secrets, bool(self.register.get()))


class CertificateCard(Card):
    """The question whether a certificate is the right one."""

    def __init__(self, parent: tk.Misc, look: Look, answered: Callable[[int, bool], None]):
        super().__init__(parent, look, "Is this the right server?")
        self.answered = answered
        self.server = 0
        self.why = ttk.Label(self.body, style="Card.TLabel")
        self.print = ttk.Label(self.body, style="Card.TLabel")
        self.advice = ttk.Label(self.body, style="Dim.Card.TLabel")
        for label in (self.why, self.print, self.advice):
            label.pack(anchor="w", pady=(0, look.part(0.4)))
        self.leave = self.add_button("Leave", lambda: self.answer(False), first=True)
        self.trust = self.add_button("Trust it", lambda: self.answer(True))

    def show(self, server: Server) -> None:
        self.server = server.number
        digits = server.doubted
        lines = [" ".join(re.findall("..", digits[n : n + 32])) for n in range(0, len(digits), 32)]
        self.why.configure(text=f"{server.doubt[:1].upper()}{server.doubt[1:]}.")
        self.print.configure(text="\n".join(["Its SHA-256 is", *lines]), font=self.look.fixed)
        self.advice.configure(
            text="Trust it if the operator of the server tells you the same number. If you do not "
            "know it, another machine may be between you and the server."
        )
        for label in (self.why, self.advice):
            label.configure(wraplength=26 * self.look.em)
        self.open(self.leave)

    def answer(self, trusted: bool) -> None:
        self.hide()
        self.answered(self.server, trusted)


class AskCard(Card):
    """A question that is answered by one line."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, look, "")
        self.taken: Callable[[str], None] = chat.do_nothing
        self.field = Field(self.body, look, self.enter)
        self.note = ttk.Label(self.body, style="Dim.Card.TLabel")
        self.field.pack(fill="x")
        self.note.pack(anchor="w", pady=(look.part(0.3), 0))
        self.add_button("OK", self.enter, first=True)
        self.add_button("Cancel", self.hide)

    def show(
        self, title: str, taken: Callable[[str], None], text: str = "", note: str = ""
    ) -> None:
        self.taken = taken
        self.head.configure(text=self.look.seen(title))
        self.note.configure(text=self.look.seen(note), wraplength=22 * self.look.em)
        self.field.set(text)
        self.field.tag_add("sel", "1.0", "end-1c")
        self.open(self.field)

    def enter(self) -> None:
        if text := self.field.content.strip():
            self.hide()
            self.taken(text)


class FileCard(Card):
    """The question whether to paste a path as text, or to send the file. Return pastes it, since
    users press Return to send a text."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, look, "Send this file?")
        self.taken: Callable[[], None] = chat.do_nothing
        self.about = ttk.Label(self.body, style="Card.TLabel")
        self.about.pack(anchor="w")
        self.send = self.add_button("Send the file", self.enter)
        self.keep = self.add_button("Paste as text", self.hide, first=True)

    def show(self, path: str, taken: Callable[[], None]) -> None:
        self.taken = taken
        self.about.configure(text=self.look.seen(label_text(path)), wraplength=22 * self.look.em)
        self.open(self.keep)

    def enter(self) -> None:
        self.hide()
        self.taken()


class CodeCard(Card):
    """An address as a QR code, black on white in every theme, because cameras expect that."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, look, "Open this page on a phone")
        self.canvas = tk.Canvas(self.body, background="white", highlightthickness=0)
        self.about = ttk.Label(self.body, style="Card.TLabel")
        self.canvas.pack()
        self.about.pack(pady=(look.part(0.6), 0))
        self.done = self.add_button("Done", self.hide, first=True)

    def show(self, address: str) -> None:
        code, module = chat.qr_code(address), self.look.part(0.4)
        side = (len(code) + 2 * chat.QR_QUIET) * module
        self.canvas.delete("all")
        self.canvas.configure(width=side, height=side)
        for row, modules in enumerate(code, chat.QR_QUIET):
            for run in re.finditer("1+", modules):
                left, right = ((chat.QR_QUIET + column) * module for column in run.span())
                spot = (left, row * module, right, (row + 1) * module)
                self.canvas.create_rectangle(*spot, fill="black", width=0)
        self.about.configure(text=self.look.seen(label_text(address)), wraplength=side)
        self.open(self.done)


class Switcher(Card):
    """Goes to a conversation, or does something, by a part of its name."""

    ROWS = 10

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, look, "Go to")
        self.choices: list[tuple[str, Callable[[], None]]] = []
        self.matching: list[Callable[[], None]] = []
        self.field = Field(self.body, look, self.enter)
        self.field.pack(fill="x")
        self.tree = Choices(self.body, self.enter, height=self.ROWS)
        self.tree.pack(fill="both", expand=True, pady=(look.part(0.4), 0))
        self.tree.column("#0", width=20 * look.em)
        self.field.bind("<<Modified>>", self._modified)
        self.field.bind("<Up>", lambda _: self.tree.move(-1))
        self.field.bind("<Down>", lambda _: self.tree.move(1))

    def show(self, choices: list[tuple[str, Callable[[], None]]]) -> None:
        self.choices = choices
        self.field.set("")
        self._filter()
        self.open(self.field)

    def _modified(self, event: Any) -> None:
        if self.field.edit_modified():
            self.field.edit_modified(False)
            self._filter()

    def _filter(self) -> None:
        words = key_of(self.field.content.strip()).split()
        found = [one for one in self.choices if all(word in key_of(one[0]) for word in words)]
        if words:
            found.sort(key=lambda one: not key_of(one[0]).lstrip("#").startswith(words[0]))
        found = found[: 5 * self.ROWS]
        self.matching = [act for _, act in found]
        self.tree.show((self.look.seen(shorter(text, NAME_SHOWN)),) for text, _ in found)
        if found:
            self.tree.choose(0)

    def enter(self) -> None:
        if self.tree.chosen is not None:
            act = self.matching[self.tree.chosen]
            self.hide()
            act()


class Choice(ttk.Button):
    """A button that shows a value, and offers others in a menu."""

    def __init__(
        self, parent: tk.Misc, look: Look, values: Iterable[str], chosen: Callable[[str], None]
    ):
        super().__init__(parent, command=self._offer, style="Plain.TButton")
        self.look, self.values, self.chosen = look, values, chosen
        for key in ("<Return>", "<Down>"):
            self.bind(key, lambda _: self._offer())

    def set(self, value: str) -> None:
        self.value = value
        self.configure(text=f"{value} \u25be")

    def _offer(self) -> str:
        menu = self.look.menu(self)
        for value in self.values:
            menu.add_command(label=value, command=functools.partial(self._take, value))
        return post_menu_below(menu, self)

    def _take(self, value: str) -> None:
        self.set(value)
        self.chosen(value)


NARROWEST_ABOUT = 8  # lines' heights: narrower, what is said of a setting is cut at the right


class SettingsCard(Card):
    """All settings, with the values that they have: the same as /set."""

    def __init__(self, parent: tk.Misc, look: Look, change: Callable[[str, str], None]):
        super().__init__(parent, look, "Settings")
        self.change = change
        self.fields: dict[str, Any] = {}
        self.values: dict[str, str] = {}
        self.abouts: list[ttk.Label] = []
        for row, (name, setting) in enumerate(sorted(chat.SETTINGS.items())):
            self._add_row(row, name, setting)
        self.body.columnconfigure(2, weight=1)
        self.note = ttk.Label(self, style="Dim.Card.TLabel")
        self.note.configure(text="The same as /set NAME VALUE; kept for the next start.")
        self.note.pack(side="bottom", anchor="w", before=self.page)
        self.page.bind("<Configure>", lambda _: self._wrap(), add=True)
        self.add_button("Done", self.done, first=True)

    def _add_row(self, row: int, name: str, setting: chat.Setting) -> None:
        pad = {"pady": self.look.part(0.12), "sticky": "w"}
        ttk.Label(self.body, text=name, style="Card.TLabel").grid(row=row, column=0, **pad)
        if setting.values:
            change = functools.partial(self.change, name)
            field: Any = Choice(self.body, self.look, setting.values, change)
        else:
            field = Field(self.body, self.look, lambda: self._enter(name), width=16)
            field.bind("<FocusOut>", lambda _: self._enter(name))
        pad["sticky"] = "we"
        field.grid(row=row, column=1, padx=self.look.part(0.6), **pad)
        about = ttk.Label(self.body, text=setting.summary, style="Dim.Card.TLabel")
        about.grid(row=row, column=2, **pad)
        self.fields[name] = field
        self.abouts.append(about)

    def _wrap(self) -> None:
        """Break what is said of a setting where it has not enough room."""
        if self.place_info().get("width"):  # else it is not known yet
            bar, em = self.page.bar.winfo_reqwidth(), self.look.em
            room = self.page.winfo_width() - bar - self.abouts[0].winfo_x()
            for about in self.abouts:
                wraps = self.look.small.measure(about.cget("text")) > room + bar
                about.configure(wraplength=max(room, NARROWEST_ABOUT * em) if wraps else 0)

    def take(self, values: dict[str, str]) -> None:
        """Show settings that were changed elsewhere, but for what is being typed."""
        for name, field in self.fields.items() if self.shown else ():
            old, new = (each.get(name, chat.SETTINGS[name].usual) for each in (self.values, values))
            if old != new and (chat.SETTINGS[name].values or field.content.strip() == old):
                field.set(new)
        self.values = dict(values)

    def show(self, values: dict[str, str]) -> None:
        for name, field in self.fields.items():
            field.set(values.get(name, chat.SETTINGS[name].usual))
        for about in self.abouts:
            about.configure(wraplength=0)
        self.values = dict(values)
        first = next(iter(self.fields.values()))
        self.open(first)

    def _enter(self, name: str) -> None:
        text = self.fields[name].content.strip()
        if self.shown and text != self.values.get(name, chat.SETTINGS[name].usual):
            self.values[name] = text
            self.change(name, text or "default")

    def done(self) -> None:
        for name, setting in chat.SETTINGS.items():
            if not setting.values:
                self._enter(name)
        self.hide()


class Banner(ttk.Frame):
    """A line above the field about the text being written, with buttons."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent, style="Banner.TFrame")
        self.look = look
        self.dropped: Callable[[], None] = chat.do_nothing
        self.label = ttk.Label(self, style="Banner.TLabel")
        self.buttons = ttk.Frame(self, style="Banner.TFrame")
        self.buttons.pack(side="right")
        self.label.pack(side="left", fill="x", expand=True)

    @property
    def shown(self) -> bool:
        return bool(self.winfo_manager())

    def show(self, text: str, dropped: Callable[[], None], *buttons: tuple[str, Callable]) -> None:
        """Show a text and buttons; call back when they are gone."""
        if self.shown:
            self.hide()
        self.dropped = dropped
        for child in self.buttons.winfo_children():
            child.destroy()
        self.configure(padding=(self.look.part(0.5), self.look.part(0.1)))
        self.label.configure(text=self.look.seen(text))
        for name, act in (*buttons, ("\u2715", self.hide)):
            button = ttk.Button(self.buttons, text=name, style="Banner.TButton", command=act)
            button.pack(side="left")
        self.grid()

    def hide(self) -> None:
        self.grid_remove()
        dropped, self.dropped = self.dropped, chat.do_nothing
        dropped()


# ======================================================================================
# NOTICES
# ======================================================================================
# The desktop is told of messages for the user while the window is not looked at. Words of
# other users are arguments of a program or values of its environment, and never a part of a
# command line.

NOTICE_SECONDS = 2.0  # between two notices
NOTICE_CHARACTERS = 200
BELL_SECONDS = 0.5  # between two sounds of the bell
APPLE_SCRIPT = (
    *("-e", "on run argv"),
    *("-e", "display notification (item 2 of argv) with title (item 1 of argv)"),
    *("-e", "end run"),
)
POWER_SHELL = (
    "Add-Type -AssemblyName System.Windows.Forms, System.Drawing;"
    "$n = New-Object System.Windows.Forms.NotifyIcon;"
    "$n.Icon = [System.Drawing.SystemIcons]::Information; $n.Visible = $true;"
    "$n.ShowBalloonTip(5000, $env:CHAT_TITLE, $env:CHAT_TEXT, 'Info');"
    "Start-Sleep 6; $n.Dispose()"
)


def notice_command(title: str, text: str, system: str) -> tuple[list[str], dict[str, str]]:
    """Return a command that tells the desktop, and what to add to its environment."""
    if system == "darwin":
        return ["osascript", *APPLE_SCRIPT, title, text], {}
    if system == "win32":
        shell = ["powershell", "-NoProfile", "-WindowStyle", "Hidden", "-Command", POWER_SHELL]
        return shell, {"CHAT_TITLE": title, "CHAT_TEXT": text}
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return ["notify-send", "--app-name=chat", "--", title, safe], {}


class WindowHints(ctypes.Structure):
    """The hints of a window for its manager, as Xlib has them: of them only the flags."""

    _fields_ = (("flags", ctypes.c_long),)
    URGENCY = 256


@contextlib.contextmanager
def window_hints(root: tk.Tk) -> Iterator[WindowHints]:
    """Open the hints of a window on X11 (ICCCM 4.1.2.4), and write them back. Raises OSError."""
    x, window, hints = ctypes.CDLL("libX11.so.6"), ctypes.c_ulong, ctypes.POINTER(WindowHints)
    for name, result, *arguments in (
        ("XOpenDisplay", ctypes.c_void_p, ctypes.c_char_p),
        ("XQueryTree", ctypes.c_int, ctypes.c_void_p, window, *(ctypes.c_void_p,) * 4),
        ("XGetWMHints", hints, ctypes.c_void_p, window),
        ("XSetWMHints", ctypes.c_int, ctypes.c_void_p, window, hints),
        ("XFree", ctypes.c_int, ctypes.c_void_p),
        ("XCloseDisplay", ctypes.c_int, ctypes.c_void_p),
    ):
        getattr(x, name).restype, getattr(x, name).argtypes = result, arguments
    display = x.XOpenDisplay(root.winfo_screen().encode())
    if not display:
        raise OSError("the display is gone")
    top, outer, children, count = window(), window(), ctypes.c_void_p(), ctypes.c_uint()
    found = [ctypes.byref(one) for one in (top, outer, children, count)]
    x.XQueryTree(display, root.winfo_id(), *found)  # the manager knows the window around Tk's
    known = x.XGetWMHints(display, outer)
    try:
        if known:
            yield known.contents
            x.XSetWMHints(display, outer, known)
        else:
            yield WindowHints()
    finally:
        for one in filter(None, (known, children)):
            x.XFree(ctypes.cast(one, ctypes.c_void_p))
        x.XCloseDisplay(display)


class Notices:
    """The bell and the notices of the desktop, not too many of them. It never waits for one."""

    def __init__(self, root: tk.Tk):
        self.root = root
        self.rang = -BELL_SECONDS
        self.flashes = False
        self.running: list[subprocess.Popen] = []
        self.told = -NOTICE_SECONDS

    def ring(self) -> None:
        if time.monotonic() - self.rang > BELL_SECONDS:
            self.rang = time.monotonic()
            self.root.bell()

    def flash(self, on: bool) -> None:
        """Ask for attention in the task bar, or no more; Tk cannot do that."""
        if on == self.flashes:
            return
        self.flashes = on
        with contextlib.suppress(AttributeError, OSError, ValueError):
            if os.name == "nt":
                ctypes.windll.user32.FlashWindow(int(self.root.frame(), 16), on)
            elif self.root.tk.call("tk", "windowingsystem") == "x11":
                with window_hints(self.root) as hints:
                    hints.flags = hints.flags & ~hints.URGENCY | on * hints.URGENCY

    def tell(self, title: str, text: str) -> None:
        now = time.monotonic()
        self.running = [one for one in self.running if one.poll() is None]
        if now - self.told < NOTICE_SECONDS or len(self.running) > 4:
            return
        self.told = now
        title, text = shorter(title, NAME_SHOWN), shorter(" ".join(text.split()), NOTICE_CHARACTERS)
        command, more = notice_command(title, text, sys.platform)
        if not shutil.which(command[0]):
            return
        with contextlib.suppress(OSError, ValueError):  # a NUL in the text, no memory
            self.running.append(subprocess.Popen(command, env={**os.environ, **more}, **QUIET))


# ======================================================================================
# ACTS
# ======================================================================================
# What the user does, by subject. Each class has the window, works with its widgets, and asks
# the model to have the engine do the rest.
#
#   Writing       the text that is being written
#   Reading       the rows of the conversation, and which of them were seen
#   FileActs      files that are sent, saved and opened
#   MessageActs   the menu of a message, and the acts in it
#   RoomActs      changes of conversation, and the menus of conversations, servers, members
#   Commands      the window as a whole: keys, the main menu, the switcher

DRAFT_MS = 250  # from a key until what is half typed is kept
SEEN_MS = 200  # from in sight to read
FOCUS_MS = 20  # from a loss of the focus until it has moved to where it goes
NOT_SENT = "not connected: connect first, your text is kept"


def enabled(on: bool) -> str:
    return "normal" if on else "disabled"


class Acts:
    """The base of the classes below: the window, and what all of them use of it."""

    def __init__(self, window: "Window"):
        self.window = window
        self.model, self.look, self.timers = window.model, window.look, window.timers
        self.do, self.command = window.model.do, window.model.command
        self.compose, self.transcript = window.compose, window.transcript


class Writing(Acts):
    """The text that is being written: drafts, replies, pastes, completion, notices of typing."""

    def __init__(self, window: "Window"):
        super().__init__(window)
        self.banner = self.window.banner
        self.drafts: dict[int, str] = {}  # of the other conversations
        self.kept = ""  # the draft of this one, as the engine knows it
        self.reply: Row | None = None  # the message that is answered
        self.about_text = False  # the banner tells of the text in the field
        self.closed = 0  # the conversation that the user closed last
        self.begun = False  # the text was begun in a conversation that is gone
        self.edited_at = 0.0  # when the user changed the text last
        compose = self.compose
        compose.send, compose.complete = self.send, self.complete
        compose.edited = self._edited
        compose.several, compose.too_much = self._show_paste, self._offer_paste
        people, sidebar = self.window.people.tree, self.window.sidebar.tree
        for widget in (self.transcript.text, self.window.panel.text, people, sidebar):
            bind_typing(widget, self.type_on)

    def send(self, text: str) -> bool:
        """Return whether it is on its way. While the line is broken it waits in the core."""
        if chat.is_quit(text):
            self.window.close(text[len("/quit") :].strip())
            return True
        if self.begun:
            return self._ask_where()
        reply = self.reply.view.id if self.reply and text[:1] != "/" else ""
        if not self.do("say", self.model.here, text, reply):
            self.window.ask(NOT_SENT)
            return False
        self.timers.cancel("draft")
        self.kept = ""
        if reply:
            self.reply = None
        if reply or self.about_text:
            self.banner.hide()
        if not self.transcript.at_bottom:
            self.transcript.to_bottom()
        return True

    def _ask_where(self) -> bool:
        """Ask before a text goes to another conversation than the one where it was begun."""

        def send() -> None:
            self.begun = False
            self.banner.hide()
            self.compose.submit()

        room = self.model.room
        button = f"Send it to {shorter(room.name, 30)}" if room else "Send it"
        self._show_over_reply("the conversation where you began this is gone", (button, send))
        self.about_text = True
        return False

    def complete(self, before: str, word: str) -> list[str]:
        """Return completions of the last word; the users who spoke last come first."""
        if match := EMOJI_WORD.fullmatch(word):
            return [f"{emoji} " for emoji, _ in emoji_for(match[1])]
        model, members = self.model, self.window.people.rows
        recent = [name for name in self.transcript.sheet.speakers() if name in members]
        rooms = [room.name for room in model.rooms.values() if room.name]
        talks = rooms if before[:1] == "/" else [model.room.name] if model.room else []
        names = dict.fromkeys((*recent, *sorted(members, key=key_of), *talks))
        names.pop(model.me, None)
        return chat.complete_word(before, word, names, rooms)

    def type_on(self, text: str) -> None:
        """Take what was typed or pasted elsewhere into the field."""
        self.compose.focus_set()
        text = self.compose.pasted(text)
        if len(text) + len(self.compose.content) > self.compose.MOST:
            return self.compose.too_much(text)
        return self.compose.take_paste(text)

    # Drafts

    def enter_room(self, room: RoomInfo | None, number: int, from_nowhere: bool) -> None:
        """Go on with the draft of a conversation. A text that was typed before there was a place
        for it comes with the user."""
        kept = draft = self.drafts.pop(number, room.draft if room else "")
        text = self.compose.content if from_nowhere or self.begun else ""
        if text.strip() and text != draft:
            self.compose.editor.remember(draft)
            draft = text
        self.compose.open(draft)
        self.kept = kept
        self._keep_draft(draft)

    def leave_room(self) -> None:
        """Keep an unfinished text in its conversation. If that conversation is gone, the text stays
        in the field, and is not sent elsewhere without a question."""
        text, here = self.compose.content, self.model.here
        gone = here not in self.model.rooms
        self.begun = gone and here != self.closed and bool(text.strip())
        if gone:
            self.stop_reply()
            return None if self.begun else self._keep_text(text)
        self.drafts[here] = text
        self.window.sidebar.set_draft(here, bool(text.strip()))
        self._keep_draft(text)
        self.stop_reply()
        self.do("typing", here, "")
        return None

    def room_gone(self, number: int) -> None:
        self._keep_text(self.drafts.pop(number, ""))

    def _keep_text(self, text: str) -> None:
        """Keep what was half typed in a conversation that is gone."""
        if self.compose.editor.remember(text):
            self.window.tell("what you typed there is kept: Up brings it back")

    def take_back(self, event: Back) -> None:
        """Give a text back to the field from which it came."""
        here, rooms = self.model.here, self.model.rooms
        if event.room == here or event.room not in rooms:
            was_empty = not self.compose.content.strip()
            self.compose.give_back(event.text)
            gone = event.room not in (0, here) and was_empty and bool(self.compose.content)
            self.begun = self.begun or gone
            self._keep_draft(self.compose.content)
        elif not self.drafts.get(event.room, "").strip() and event.text[:1] != "/":
            self.drafts[event.room] = event.text
            self.window.sidebar.set_draft(event.room, True)
            self.do("draft", event.room, event.text)
        else:
            self.compose.editor.remember(event.text)

    def _edited(self) -> None:
        """Store the changed text as a draft soon, and tell others about typing."""
        self.edited_at = time.monotonic()
        text = self.compose.content
        self.begun = self.begun and bool(text.strip())
        if not self.timers.waits("draft"):  # a user may type for minutes without a break
            self.timers.later("draft", DRAFT_MS, lambda: self._keep_draft(self.compose.content))
        self.do("typing", self.model.here, text)

    def _keep_draft(self, text: str) -> None:
        self.timers.cancel("draft")
        if text != self.kept and self.model.here:
            self.kept = text
            self.do("draft", self.model.here, text)

    # Replies

    def start_reply(self, row: Row) -> None:
        """Let the next message answer this one."""
        server = self.model.server
        if not row.view.id or not server or "reply" not in server.can:
            return self.window.tell("this message cannot be answered here")
        text = f"Reply to {shorter(row.view.name, 30)}: {excerpt(row.view.text)}"
        self.banner.show(text, self._forget_reply)
        self.reply = row
        return self.compose.focus_set()

    def _show_over_reply(self, about: str, *buttons: tuple[str, Callable[[], None]]) -> None:
        """Show a banner about a paste. The text is still an answer, as is shown afterwards."""
        self.banner.dropped = chat.do_nothing
        self.banner.show(about, self._paste_told, *buttons)

    def _paste_told(self) -> None:
        self.about_text = False
        row, self.reply = self.reply, None
        if row:
            self.start_reply(row)

    def _forget_reply(self) -> None:
        self.reply = None
        self.compose.focus_set()

    def stop_reply(self) -> None:
        if self.reply or self.about_text:
            self.reply = None
            self.banner.hide()

    def message_gone(self, id: str) -> None:
        if self.reply and self.reply.view.id == id:
            self.stop_reply()
            self.window.tell("the message that you answer was taken back; your text is kept")

    # Pastes

    def _show_paste(self, text: str) -> None:
        """Tell how a paste will be sent that is more than one line, or more than one message."""
        pieces = self._pieces(text.rstrip("\n"))
        lines = text.rstrip("\n").count("\n") + 1
        if lines == len(pieces) == 1:
            return

        def as_one_line() -> None:
            self.compose.set(" ".join(self.compose.content.split()))
            self.banner.hide()

        def preview() -> None:
            shown = "\n\n".join(f"[{n}]\n{piece}" for n, piece in enumerate(pieces, 1))
            self.window.show_page("What will be sent", shown)

        about = f"{chat.counted(lines, 'line')}: sent as {chat.counted(len(pieces), 'message')}"
        join = [("Make it one line", as_one_line)] if lines > 1 else []
        self._show_over_reply(about, ("Show", preview), *join)
        self.about_text = True

    def _pieces(self, text: str) -> list[str]:
        """Return a text as the messages that others will see."""
        server, room = self.model.server, self.model.room
        if not (server and room and server.separate_bytes):
            return list(chat.message_pieces(text))
        most = max(chat.LINE_ROOM, server.separate_bytes - len(room.name.encode()))
        return [line.text for line in chat.sendable_lines(text, most)]

    def _offer_paste(self, text: str) -> None:
        """Offer to send a paste that is too long for the field as several messages."""
        pieces, here = list(chat.message_pieces(text)), self.model.here

        def send_all() -> None:
            lines = [f"/{piece}" if piece[:1] == "/" else piece for piece in pieces]
            if all(self.do("command", here, line) for line in lines):
                return self.banner.hide()
            return self.window.ask(NOT_SENT)

        count = chat.counted(len(self._pieces(text)), "message")
        about = f"that is too long to be pasted: {len(text):,} characters; your text is as it was"
        self._show_over_reply(about, (f"Send it as {count}", send_all))


class Reading(Acts):
    """The reading of a conversation: takes its rows, and reports the messages that were seen."""

    def __init__(self, window: "Window"):
        super().__init__(window)
        self.focused = False  # the window has the keys
        self.below = 0  # messages that came below the part being read
        self.spots: dict[int, Spot] = {}  # where the user reads back in other conversations
        model, page = self.model, self.transcript
        page.reached_bottom, page.left_bottom = self._reached_bottom, self._left_bottom
        page.wants_older = lambda: self.do("older", model.here)
        page.wants_newer = lambda: self.do("present", model.here)
        page.wants_after = lambda: self.do("newer", model.here)

    @property
    def present(self) -> bool:
        """True while the user sees the newest messages."""
        return self.focused and self.transcript.at_bottom and not self.transcript.sheet.past

    def set_focus(self, focused: bool) -> None:
        """Note whether the window has the keys."""
        if focused != self.focused:
            self.focused = focused
            self.do("focus", focused)
            self._see()
            self._show_unread()

    def _see(self) -> None:
        """Soon note that what is in sight was read, also while more comes."""
        room, waits = self.model.room, self.timers.waits("seen")
        if self.present and room and (room.unread or self.transcript.sheet.unseen) and not waits:
            self.timers.later("seen", SEEN_MS, self._saw)

    def _saw(self) -> None:
        if self.present:
            newest = self.transcript.sheet.newest
            self.transcript.sheet.seen(newest)
            self.do("read", self.model.here, newest)

    def _show_unread(self) -> None:
        """Show what is not read here unless the user sees it."""
        self.window.sidebar.select()
        self.window.refresh()

    def _reached_bottom(self) -> None:
        self.below = 0
        self.do("back", False)
        self.transcript.tell_below(0)
        self._see()
        self._show_unread()

    def _left_bottom(self) -> None:
        self.do("back", True)
        self.transcript.tell_below(self.below)
        self._show_unread()

    def enter_room(self) -> None:
        self.below = 0
        self.transcript.tell_older("")

    def leave_room(self) -> None:
        """Keep the place where the user reads back; what was in sight was read."""
        page, here = self.transcript, self.model.here
        if here not in self.model.rooms:
            return
        spot = None if page.at_bottom or page.sheet.past else page.spot()
        if spot:
            self.spots[here] = spot
        if self.present and page.sheet.newest:  # what came since was not in sight
            self.do("read", here, page.sheet.newest)

    # Events of the conversation that is looked at

    def take(self, event: Any) -> None:
        """Take an event, unless another conversation is looked at by now."""
        if event.room == self.model.here:
            self.TAKEN[type(event)](self, event)

    def _take_rows(self, event: Rows) -> None:
        page = self.transcript
        if event.at in (RESET, PAST):
            page.reset(event, self.spots.pop(event.room, None))
            if page.at_bottom:
                self.below = 0
            elif event.at == RESET:
                self.below = event.unread
                self.do("back", True)
                self._show_unread()
        elif event.at == START:
            page.prepend(event.rows)
        else:
            page.append(event.rows, self.present or event.at == AFTER)
            if not page.at_bottom and event.at == END:
                rows = (row.view for row in event.rows)
                self.below += sum(map(chat.is_news, rows))
        page.tell_below(self.below)
        self._see()

    TAKEN: dict[type, Callable[[Any, Any], None]] = {
        Rows: _take_rows,
        Trimmed: lambda self, event: self.transcript.trim(event.count),
        Changed: lambda self, event: self.transcript.change(event.row),
        Cleared: lambda self, event: self.transcript.clear(),
        Read: lambda self, event: self.transcript.read_to(event.time),
        Fetching: lambda self, event: self.transcript.older_told(event),
    }


class FileActs(Acts):
    """Files that are sent, saved, opened and shown."""

    def __init__(self, window: "Window"):
        super().__init__(window)
        self.open_file, self.downloads = open_file, download_folder
        self.folder = str(user_folder())  # of the files that were sent last
        self.choosing = False  # a dialog of the system is open
        self.opened = ""  # folder of the files that were opened
        self.picture: PictureWindow | None = None  # the last one in full
        self.compose.path = self._look_for_file
        pictures = self.transcript.pictures
        self.decode = Decoder(window.root, self.look, window.jobs, self.timers).decode
        pictures.decode = self.decode
        pictures.wants = lambda files: self.do("pictures", self.model.here, files)

    def close(self) -> None:
        if self.opened:
            shutil.rmtree(self.opened, ignore_errors=True)

    def choose(self) -> Any:
        return filedialog.askopenfilenames(
            parent=self.window.root, title="Send files", initialdir=self.folder
        )

    def choose_place(self, name: str) -> str:
        folder = str(self.downloads())
        return filedialog.asksaveasfilename(
            parent=self.window.root, title="Save", initialfile=name, initialdir=folder
        )

    def _with_dialog(self, ask: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Ask by a dialog of the system. That runs Tk's loop inside itself, so it begins when no
        handler is at work, and only one is open; the engine does not notice."""

        def begin() -> None:
            self.choosing, answer = True, None
            try:
                answer = ask()
            except tk.TclError:  # the window was closed under it
                log.info("the dialog ended", exc_info=True)
            self.choosing = False
            if answer and not (self.window.closing or self.window.gone):
                self.compose.focus_set()
                then(answer)

        if not self.choosing:
            self.timers.later("dialog", 1, begin)

    # Sending

    def ask(self) -> None:
        """Ask for files to be sent to this conversation, whichever is looked at then."""
        here = self.model.here
        if self.model.room is None:
            return self.window.tell("open a conversation, and send the file there")

        def chosen(paths: Iterable[str]) -> None:
            self.folder = str(pathlib.Path(next(iter(paths))).parent)
            self.send(here, paths)

        return self._with_dialog(self.choose, chosen)

    def send(self, number: int, paths: Iterable[Any]) -> None:
        for path in paths:
            if not self.do("send_file", number, str(path)):
                self.window.ask("not connected: connect first, and send the file then")

    def _look_for_file(self, text: str) -> None:
        """Offer to send the file whose path was pasted, if there is one."""
        here, compose = self.model.here, self.compose

        def send(path: str) -> None:
            compose.set(compose.content.replace(text, "", 1))
            self.send(here, [path])

        def found(path: str) -> None:
            if path and here == self.model.here and self.model.room and text in compose.content:
                self.window.file_card.show(path, functools.partial(send, path))

        self.window.jobs.start(functools.partial(pasted_file, text), found)

    # Saving and opening

    def save(self, row: Row) -> None:
        """Save the file of a message among the downloads, under a name that is free."""
        self.do("save_file", self.model.here, row.view, str(self.downloads()))

    def save_as(self, row: Row) -> None:
        here, name = self.model.here, chat.linked_name(row.view) or "file"
        save = lambda place: self.do("save_file", here, row.view, str(place))  # noqa: E731
        self._with_dialog(lambda: self.choose_place(name), save)

    def open(self, row: Row) -> None:
        """Save a file in a folder of this window, and open it there."""
        file = chat.parse_file_tag(row.view.file)
        if file is None or file.type not in OPENED_TYPES:
            return self.window.tell("such a file is saved, and not opened")
        try:
            self.opened = self.opened or tempfile.mkdtemp(prefix="chat-")
        except OSError as error:
            return self.window.tell(f"cannot open a file: {chat.reason_of(error)}")
        stem = pathlib.Path(chat.linked_name(row.view) or "file").stem
        path = pathlib.Path(self.opened, f"{stem}{OPENED_TYPES[file.type]}")
        self.do("save_file", self.model.here, row.view, str(path), True)
        return self.window.tell(f"opening {path.name} \u2026")

    def take_opened(self, event: Opened) -> None:
        if why := self.open_file(event.path):
            self.window.tell(why)

    # Pictures

    def view(self, row: Row) -> None:
        """Show the full picture, or have it opened by another program."""
        file = chat.parse_file_tag(row.view.file)
        if file is None or not is_decodable(file):
            return self.open(row)
        self.do("full_picture", self.model.here, file)
        return self.window.tell("the picture is coming \u2026")

    def take_picture(self, event: Picture) -> None:
        """Take a picture of the server that is looked at, or one to be shown in full."""
        if event.full:
            self._show_full(event.file, event.data, event.why)
        elif event.server == self.model.server_here:
            self.transcript.pictures.take(event)

    def _show_full(self, file: chat.FileTag, data: bytes, why: str) -> None:
        why = why or picture_trouble(file, data)
        if why:
            return self.window.tell(f"the picture is not shown: {why}")

        def show(image: tk.PhotoImage | None) -> None:
            if image is None:
                return self.window.tell("the picture is not shown: it is damaged")
            self.window.tell("")
            title = f"{file.words()} \u2013 chat"
            self.picture = PictureWindow(self.window.root, self.look, image, title)
            return None

        return self.decode(file, data, 1, show)


class MessageActs(Acts):
    """The menu of a message, and the acts in it, by name."""

    def __init__(self, window: "Window"):
        super().__init__(window)
        self.writing, self.files = self.window.writing, self.window.files
        pointer = self.transcript.pointer
        pointer.menu_for, pointer.acted = self.menu, self.act
        pointer.told = self.window.status_line.tell
        self.window.panel.open_link = self._open_link

    def menu(self, row: Row, event: Any) -> None:
        view, menu = row.view, self.look.menu(self.transcript)
        add = functools.partial(self._add, menu, row)
        if row.state == FAILED and row.parked:
            add("Send again", "retry")
            add("Drop it", "cancel")
            menu.add_separator()
        message = view.kind in chat.SPOKEN
        if message:
            self._add_answers(menu, row)
            menu.add_separator()
        if file := chat.parse_file_tag(view.file):
            add("Save the file", "save")
            add("Save the file as \u2026", "save-as")
            if is_decodable(file):
                add("Show the picture in full", "picture")
            add("Open the file", "open", file.type in OPENED_TYPES)
            menu.add_separator()
        add("Copy text", "copy")
        if message and len(beginning(view.text)) < len(view.text):
            add("Show all of it, or less", "expand")
        for url in list(dict.fromkeys(link_of(one) for one in LINK.findall(view.text)))[:5]:
            add(f"Open {shorter(url, 60)}", f"link {url}")
        if message and not view.mine:
            menu.add_separator()
            add(f"Write to {shorter(view.name, 30)}", "private")
            add(f"Ignore {shorter(view.name, 30)}", "ignore")
        popup_menu(menu, event, self.transcript, self.transcript.pointer.box())

    def _add(
        self, menu: tk.Menu, row: Row, label: str, what: str, on: bool = True, key: str = ""
    ) -> None:
        act = functools.partial(self.act, what, row)
        label = self.look.seen(label)
        menu.add_command(label=label, command=act, state=enabled(on), accelerator=key)

    def _add_answers(self, menu: tk.Menu, row: Row) -> None:
        """Offer to answer a message, to react to it, and to take it back."""
        server = self.model.server
        can = server.can if server and row.view.id else frozenset()
        self._add(menu, row, "Reply", "reply", "reply" in can, "Alt+R")
        choices = self.look.menu(menu)
        for emoji in REACTIONS:
            act = functools.partial(self.act, f"react {emoji}", row)
            choices.add_command(label=self.look.drawable(emoji), command=act)
        choices.add_command(label="Another \u2026", command=lambda: self.act("react", row))
        menu.add_cascade(label="React", menu=choices, state=enabled("react" in can))
        if row.view.mine or self.window.people.is_operator(self.model.me):
            self._add(menu, row, "Take it back", "redact", "redact" in can)

    def act(self, what: str, row: Row) -> None:
        what, _, more = what.partition(" ")
        if what == "react" and more:
            self._react(row, more)
        elif what == "link":
            self._open_link(more)
        elif what in ("retry", "cancel"):
            self.do(what, self.model.here, row.view.own_id)
        elif act := self.ACTS.get(what):
            act(self, row)

    def _open_link(self, url: str) -> None:
        self.window.jobs.start(functools.partial(open_link, url), self.window.tell)

    def act_on_chosen(self, what: str) -> None:
        if row := self.transcript.pointer.row:
            self.act(what, row)

    def _ask_reaction(self, row: Row) -> None:
        """Ask for an emoji, by name or as it is."""

        def taken(text: str) -> None:
            found = emoji_for(text.strip(":"))
            emoji = found[0][0] if found and text.strip(":").isascii() else text
            self._react(row, emoji[: chat.REACTION_CHARACTERS])

        note = "an emoji, or its name: tea, heart, tada"
        self.window.ask_card.show("React with", taken, "", note)

    def _react(self, row: Row, emoji: str) -> None:
        mine = any(one == emoji and self.model.me in names for one, names in row.reactions)
        self.do("react", self.model.here, row.view.id, emoji, not mine)

    def _copy(self, row: Row) -> None:
        self.window.root.clipboard_clear()
        self.window.root.clipboard_append(row.view.text)

    ACTS: dict[str, Callable[[Any, Row], Any]] = {
        "reply": lambda self, row: self.writing.start_reply(row),
        "react": _ask_reaction,
        "redact": lambda self, row: self.do("redact", self.model.here, row.view.id),
        "copy": _copy,
        "expand": lambda self, row: self.transcript.toggle(row),
        "answers": lambda self, row: self.transcript.show_reply(row),
        "private": lambda self, row: self.command(f"/query {row.view.name}"),
        "ignore": lambda self, row: self.command(f"/ignore {row.view.name}"),
        "save": lambda self, row: self.files.save(row),
        "save-as": lambda self, row: self.files.save_as(row),
        "open": lambda self, row: self.files.open(row),
        "show": lambda self, row: self.files.view(row),
        "picture": lambda self, row: self.files.view(row),
    }


class RoomActs(Acts):
    """Changes of conversation, and the menus of conversations, servers and members."""

    MEMBER_MENU = (
        ("Write to", "/query {}", False),
        ("Who is", "/whois {}", False),
        ("Ignore", "/ignore {}", False),
        ("Make operator:", "/op {}", True),
        ("Kick", "/kick {}", True),
    )

    def __init__(self, window: "Window"):
        super().__init__(window)
        self.sidebar, self.people = self.window.sidebar, self.window.people
        self.ask_card = self.window.ask_card
        self.sidebar.chosen, self.sidebar.menu_for = self.look_at, self.room_menu
        self.people.chosen, self.people.menu_for = self.open_private, self.member_menu

    def look_at(self, number: int) -> None:
        self.do("look", number)

    def go_next(self, step: int) -> None:
        """Look at the conversation below this one, or above."""
        if rooms := self.sidebar.all_rooms():
            now = rooms.index(self.model.here) if self.model.here in rooms else -1
            self.look_at(rooms[(now + step) % len(rooms)])

    def go_number(self, number: int) -> None:
        for room in self.sidebar.all_rooms()[number - 1 : number]:
            self.look_at(room)

    def go_unread(self) -> None:
        """Look where the user is called; else where something is new."""
        rooms = [self.model.rooms[number] for number in self.sidebar.all_rooms()]
        rooms = [room for room in rooms if room.unread and room.number != self.model.here]
        rooms.sort(key=lambda room: (not room.called, room.muted))
        for room in rooms[:1]:
            self.look_at(room.number)

    def open_private(self, name: str) -> None:
        self.command(f"/query {name}")
        self.compose.focus_set()

    def close(self, number: int = 0) -> None:
        """Close a conversation; without a number, the one that is looked at."""
        self.window.writing.closed = number = number or self.model.here
        self.do("close", number)

    def _calls(self, room: RoomInfo) -> list[str]:
        """Return the words of the setting that make every message of a channel a mention."""
        words = self.model.values.get("highlight", "").split()
        return [word for word in words if chat.fold(word) == chat.fold(room.name)]

    def call_always(self, room: RoomInfo) -> None:
        """Let every message of a channel count as a mention, or only mentions again."""
        words = self.model.values.get("highlight", "").split()
        known = self._calls(room)
        left = [word for word in words if word not in known] if known else [*words, room.name]
        self.do("set", "highlight", " ".join(left) or "default")

    # Menus

    def room_menu(self, number: int, event: Any) -> None:
        """Open the menu of a conversation, or of a server."""
        room = self.model.rooms.get(number)
        if room is None:
            return
        menu = self.look.menu(self.sidebar)
        if room.name:
            self._add_room_acts(menu, room)
        else:
            self._add_server_acts(menu, room.server)
        popup_menu(menu, event, self.sidebar, box_of_choice(self.sidebar.tree))

    def _add_room_acts(self, menu: tk.Menu, room: RoomInfo) -> None:
        number, add = room.number, menu.add_command
        add(label="Go there", command=lambda: self.look_at(number))
        add(label="Mark as read", command=lambda: self.do("read", number))
        text = "Unmute" if room.muted else "Mute"
        add(label=text, command=lambda: self.do("mute", number, not room.muted))
        if room.channel:
            word = "Only mentions call me" if self._calls(room) else "Every message calls me"
            add(label=word, command=lambda: self.call_always(room))
            add(label="Topic \u2026", command=lambda: self.ask_topic(room))
            if not room.inside:
                add(label="Join", command=lambda: self.do("command", number, f"/join {room.name}"))
        for word, step in (("Move up", -1), ("Move down", 1)):  # some desktops use the keys
            add(label=word, command=functools.partial(self.window.sidebar.shift, step, number))
        menu.add_separator()
        if room.channel and room.inside:
            add(label="Leave, stay open", command=lambda: self.do("leave_open", number))
        text = "Leave and close" if room.channel and room.inside else "Close"
        add(label=text, command=lambda: self.close(number))

    def _add_server_acts(self, menu: tk.Menu, server: int) -> None:
        add = menu.add_command
        for doubtful in [one for one in self.model.servers if one.number == server and one.doubted]:
            ask = functools.partial(self.window.certificate.show, doubtful)
            add(label="Check the certificate \u2026", command=ask)
        add(label="Connect again", command=lambda: self.do("server", server, "/reconnect"))
        add(label="List the channels", command=lambda: self.do("server", server, "/list"))
        add(label="Join a channel \u2026", command=self.ask_channel)
        add(label="Protocol log", command=lambda: self.do("server", server, "/raw"))
        menu.add_separator()
        add(label="Leave this server", command=lambda: self.do("server", server, "/disconnect"))

    def member_menu(self, name: str, event: Any) -> None:
        menu, me = self.look.menu(self.people), self.model.me
        for label, command, for_operators in self.MEMBER_MENU:
            text = self.look.seen(f"{label} {shorter(name, 30)}")
            act = functools.partial(self.command, command.format(name))
            on = name != me and (self.people.is_operator(me) or not for_operators)
            menu.add_command(label=text, command=act, state=enabled(on))
        mention = functools.partial(self.compose.begin, f"{name}: ")
        menu.add_command(label="Mention in the field", command=mention)
        popup_menu(menu, event, self.people, box_of_choice(self.people.tree))

    # Questions

    def ask_topic(self, room: RoomInfo) -> None:
        taken = lambda text: self.do("command", room.number, f"/topic {room.name} {text}")  # noqa: E731
        self.ask_card.show(f"Topic of {room.name}", taken, room.topic)

    def ask_channel(self) -> None:
        note = "its name, and its password behind a blank if it has one"
        join = lambda text: self.command(f"/join {text}")  # noqa: E731
        self.ask_card.show("Join a channel", join, "#", note)

    def ask_private(self) -> None:
        self.ask_card.show("Write to", lambda text: self.open_private(text.split()[0]))

    def ask_name(self) -> None:
        rename = lambda text: self.command(f"/nick {text}")  # noqa: E731
        self.ask_card.show("Your name", rename, self.model.me)


class Commands(Acts):
    """The window as a whole: its keys, the main menu, the switcher, its panes and the focus."""

    def __init__(self, window: "Window"):
        super().__init__(window)
        window = self.window
        self.rooms, self.files, self.messages = window.rooms, window.files, window.messages
        self.panes, self.panel = window.panes, window.panel
        self.panel.search, self.panel.closed = self.search, self.close_panel
        self.panel.jump = lambda number, view: self.do("jump", number, view)
        window.header.menu.configure(command=self.open_menu)
        window.header.search.configure(command=self.ask_search)
        window.header.topic.bind("<Button-1>", lambda _: self.show_topic())
        self._bind_keys()

    # Keys

    def _bind_keys(self) -> None:
        root, compose = self.window.root, self.compose
        compose.bind("<Prior>", lambda _: self.transcript.scroll(-1) or "break")
        compose.bind("<Next>", lambda _: self.transcript.scroll(1) or "break")
        for sequence, act in self._keys():
            pressed = functools.partial(self._press, act)
            capital = re.sub("-([a-z])>", lambda match: f"-{match[1].upper()}>", sequence)
            for one in {sequence, capital}:  # Caps Lock may be on
                with contextlib.suppress(tk.TclError):  # a keyboard without that key
                    root.bind_class("WindowKeys", one, pressed)
        root.bind("<Control-q>", lambda _: self.window.close())  # in a dialog, too
        # It is F10, too, but means another menu
        root.bind_class("WindowKeys", "<Shift-F10>", chat.do_nothing)
        cards = tuple(map(str, self.window.cards))
        for widget in descendants(root):
            if not str(widget).startswith(cards):
                widget.bindtags(("WindowKeys", *widget.bindtags()))

    def _keys(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        rooms, messages = self.rooms, self.messages
        yield from (
            ("<Control-k>", self.open_switcher),
            ("<Control-f>", self.ask_search),
            ("<Control-o>", self.files.ask),
            ("<Control-plus>", lambda: self.zoom(1)),
            ("<Control-equal>", lambda: self.zoom(1)),
            ("<Control-KP_Add>", lambda: self.zoom(1)),
            ("<Control-minus>", lambda: self.zoom(-1)),
            ("<Control-KP_Subtract>", lambda: self.zoom(-1)),
            ("<Control-Key-0>", lambda: self.zoom(0)),
            ("<Control-comma>", self.open_settings),
            ("<Control-w>", rooms.close),
            ("<Control-q>", self.window.close),
            ("<Alt-Up>", lambda: rooms.go_next(-1)),
            ("<Alt-Down>", lambda: rooms.go_next(1)),
            ("<Alt-Shift-Up>", lambda: self.window.sidebar.shift(-1)),
            ("<Alt-Shift-Down>", lambda: self.window.sidebar.shift(1)),
            ("<Alt-a>", rooms.go_unread),
            ("<Alt-n>", self.transcript.show_new),
            ("<Alt-r>", lambda: messages.act_on_chosen("reply")),
            ("<Alt-e>", lambda: messages.act_on_chosen("react")),
            ("<F1>", self.show_help),
            ("<F10>", self.open_menu),
            ("<F6>", lambda: self.cycle_focus(1)),
            ("<Shift-F6>", lambda: self.cycle_focus(-1)),
            ("<F8>", lambda: self.toggle("sidebar")),
            ("<F9>", lambda: self.toggle("members")),
            ("<Escape>", self.escape),
        )
        for number in range(1, 10):
            yield f"<Alt-Key-{number}>", functools.partial(rooms.go_number, number)

    def _press(self, act: Callable[[], Any], event: Any) -> str:
        act()
        return "break"

    def escape(self) -> None:
        """Leave whatever is open; then go to the newest message."""
        offers, banner, page = self.compose.offers, self.window.banner, self.transcript
        if offers.shown:
            offers.hide()
        elif banner.shown:
            banner.hide()
        elif self.panes.is_shown("panel"):
            self.close_panel()
        elif not page.at_bottom:
            page.to_bottom()
        elif page.sheet.marked is not None:
            page.read_to(page.sheet.newest)
        page.pointer.choose(None)
        self.compose.focus_set()

    def cycle_focus(self, step: int) -> None:
        """Give the keys to the next part of the window."""
        window, shown = self.window, self.panes.is_shown
        parts: list[tk.Misc] = [self.compose]
        parts += window.banner.buttons.winfo_children()[:1] if window.banner.shown else []
        parts += [window.sidebar.tree] if shown("sidebar") else []
        parts += window.strip.buttons[:1]
        parts += [self.transcript.text]
        parts += [self.panel.text] if shown("panel") else []
        parts += [window.people.tree] if shown("members") else []
        focus = window.root.focus_get()
        now = parts.index(focus) if focus in parts else 0
        part = parts[(now + step) % len(parts)]
        part.focus_set()
        if isinstance(part, ttk.Treeview) and not part.selection() and part.get_children():
            part.selection_set(part.get_children()[0])
            part.focus(part.get_children()[0])

    # Menus

    def open_menu(self) -> None:
        menu, room, rooms = self.look.menu(self.window.root), self.model.room, self.rooms
        mute = "Unmute this conversation" if room and room.muted else "Mute this conversation"
        for entry in (
            ("Go to \u2026", self.open_switcher, "Ctrl+K"),
            ("Next unread conversation", rooms.go_unread, "Alt+A"),
            ("Join a channel \u2026", rooms.ask_channel, ""),
            ("Write to a user \u2026", rooms.ask_private, ""),
            ("Send a file \u2026", self.files.ask, "Ctrl+O"),
            (mute, lambda: room and self.do("mute", room.number, not room.muted), ""),
            ("Close this conversation", rooms.close, "Ctrl+W"),
            None,
            ("Search \u2026", self.ask_search, "Ctrl+F"),
            ("Show or hide conversations", lambda: self.toggle("sidebar"), "F8"),
            ("Show or hide members", lambda: self.toggle("members"), "F9"),
            None,
            ("Connect \u2026", self.window.ask, ""),
            ("Your name \u2026", rooms.ask_name, ""),
            ("Settings \u2026", self.open_settings, "Ctrl+,"),
            ("Help", self.show_help, "F1"),
            ("Quit", self.window.close, "Ctrl+Q"),
        ):
            if entry is None:
                menu.add_separator()
            else:
                menu.add_command(label=entry[0], command=entry[1], accelerator=entry[2])
        post_menu_below(menu, self.window.header.menu)

    def open_switcher(self) -> None:
        """Offer all conversations, and the main acts."""
        model, choices = self.model, []
        addresses = {server.number: server.address for server in model.servers}
        for number in self.window.sidebar.all_rooms():
            room = model.rooms[number]
            text = f"{room.name}  {count_text(room)}".rstrip()
            text += f"  ({addresses[room.server]})" if len(addresses) > 1 else ""
            choices.append((text, functools.partial(self.rooms.look_at, number)))
        choices += [
            ("Join a channel \u2026", self.rooms.ask_channel),
            ("Connect \u2026", self.window.ask),
            ("Settings \u2026", self.open_settings),
            ("Search \u2026", self.ask_search),
            ("Help", self.show_help),
        ]
        self.window.switcher.show(choices)

    def open_settings(self) -> None:
        if self.model.engine is None:
            return self.window.ask("connect first: settings are kept with what was said")
        return self.window.settings.show(self.model.values)

    # Panes

    def toggle(self, name: str) -> None:
        """Show or hide a pane at a side."""
        self.panes.show(name, not self.panes.is_shown(name))
        self.compose.focus_set()

    def close_panel(self) -> None:
        self.panes.show("panel", False)
        self.transcript.text.mark_row("found", None)
        self.compose.focus_set()

    def ask_search(self) -> None:
        self.panes.show("panel", True)
        self.panel.ask()

    def search(self, words: str, everywhere: bool) -> None:
        self.do("search", words, 0 if everywhere else self.model.here)

    def show_topic(self) -> None:
        if (room := self.model.room) and room.topic:
            self.window.show_page(f"Topic of {room.name}", room.topic)

    def show_help(self) -> None:
        if not self.command("/help"):
            self.window.show_page("Keys", keys_text())

    def zoom(self, step: int) -> None:
        """Make all larger or smaller; 0 is as usual."""
        look = self.look
        size = "default" if step == 0 else str(look.size + step)
        if not self.do("set", "size", size):
            look.want(look.theme, look.family, "" if step == 0 else size)


# ======================================================================================
# WINDOW
# ======================================================================================
# Everything happens in short steps that Tk calls: a key, a wake-up, a timer. None of them
# waits for anything, and none of them runs Tk's loop inside itself.

DEFAULT_SERVER = chat.address_text(chat.DEFAULT_HOST, chat.DEFAULT_PORT)
FRAME_SECONDS = 0.016  # between two batches: more is not seen
CLOSE_SECONDS = 0.9  # from hidden to gone, whatever the server does
CLOSE_POLL_MS = 10
TICK_MS = 1000
FOUND_SECONDS = 0.5  # to look for a server on this machine
IDLE_SECONDS = 1.0  # from the last key until a dialog opens that the user did not ask for
HINT = "F1: help and keys \u00b7 Ctrl+K: go anywhere \u00b7 Shift+Return: a new line"
WIDTHS = {"sidebar": 11, "panel": 21, "members": 9}  # of panes at first, in heights of a line
COLLECT_MS = 2000  # between two collections of young garbage ...
COLLECTIONS = 15  # ... and each of so many is one of all of it, which takes 20 ms


class WindowOptions(NamedTuple):
    """The options of the command line."""

    name: str = ""
    server: str = ""
    plain: bool = False
    password: str = ""
    trust: chat.Trust = chat.BELIEVE_THE_SYSTEM
    state: pathlib.Path | None = None  # folder for what is remembered; None: nowhere


def fitting_geometry(text: str, width: int, height: int) -> str:
    """Return a geometry that is on a screen of this size; "" if that is none."""
    match = re.fullmatch(r"(\d+)x(\d+)([+-]-?\d+)([+-]-?\d+)", text)
    if not match:
        return ""
    wide, high = min(int(match[1]), width), min(int(match[2]), height)
    left, top = (int(one.replace("+-", "-")) for one in match.groups()[2:])
    left, top = max(0, min(left, width - wide)), max(0, min(top, height - high))
    return f"{wide}x{high}+{left}+{top}"


def server_on_this_machine() -> str:
    """Return the address of a server of ours on this machine, if one answers."""
    address = (chat.DEFAULT_HOST, chat.DEFAULT_PORT)
    try:
        socket.create_connection(address, FOUND_SECONDS).close()
    except OSError:
        return ""
    return DEFAULT_SERVER


class Header(ttk.Frame):
    """The conversation and its topic, above the messages, and two buttons."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent)
        self.look = look
        self.menu = ttk.Button(self, text="Menu", style="Plain.TButton")
        self.search = ttk.Button(self, text="Search", style="Plain.TButton")
        for button in (self.menu, self.search):  # before the name, which may need all the room
            button.pack(side="right")
        self.place = ttk.Label(self, style="Large.TLabel")
        self.place.pack(side="left")
        self.topic = ttk.Label(self, style="Dim.TLabel", width=1, anchor="w")
        self.topic.pack(side="left", fill="x", expand=True, padx=look.part(0.8))
        look.follow(lambda: self.configure(padding=(look.part(0.9), look.part(0.35))))

    def refresh(self, model: Model) -> None:
        room, server = model.room, model.server
        outside = " (you are not in it)" if room and not room.inside else ""
        name = room.name if room else server.address if server else "Chat"
        set_text(self.place, self.look.seen(shorter(name + outside, NAME_SHOWN)))
        topic = label_text(room.topic) if room else ""
        set_text(self.topic, self.look.seen(topic, is_rtl(topic)))


class StatusLine(ttk.Frame):
    """The state of the connection, the messages that wait, and a hint."""

    def __init__(self, parent: tk.Misc, look: Look):
        super().__init__(parent)
        self.look = look
        self.dot = ttk.Label(self, text="\u25cf", style="Dim.TLabel")
        self.status = ttk.Label(self, style="Dim.TLabel")
        self.waiting = ttk.Label(self, style="Dim.TLabel")
        self.about = ttk.Label(self, text=HINT, style="Dim.TLabel", anchor="e", width=1)
        self.dot.pack(side="left")
        self.waiting.pack(side="right", padx=(look.part(0.8), 0))  # before what may be long
        self.status.pack(side="left", padx=(look.part(0.4), 0))
        self.about.pack(side="right", fill="x", expand=True, padx=(look.part(0.8), 0))
        look.follow(lambda: self.configure(padding=(look.part(0.7), look.part(0.2))))

    def refresh(self, server: Server | None) -> None:
        c = self.look.colours
        over = server is not None and server.phase == chat.ENDED
        good = server is not None and server.ready
        colour = c.good if good else c.bad if over else c.waiting if server else c.dim
        self.dot.configure(foreground=colour)
        text = label_text(status_text(server, time.monotonic()))
        set_text(self.status, self.look.seen(text))
        set_text(self.waiting, waiting_text(server))

    def tell(self, text: str) -> None:
        set_text(self.about, text or HINT)


class Window:
    """The window: its widgets, the acts of the user, and the events of the engine."""

    def __init__(self, options: WindowOptions):
        self.options = options
        self.remembered = Remembered(options.state)
        self.model = Model()
        self.address = ""  # of the last server, as it was typed
        self.asked_about: set[str] = set()  # keys of questions of servers
        self.closing = self.interrupted = self.gone = False
        self.collections = 0
        self.drained = 0.0  # when the last batch was taken
        gc.disable()  # see _collect()
        self.root = tk.Tk(className="chat")
        self.root.withdraw()
        self.root.report_callback_exception = self._log_bug
        self.timers = Timers(self.root)
        self.waker = Waker(self.root, self.woken)
        self.jobs = Jobs(self.waker.wake)
        self.notices = Notices(self.root)
        kept = self.remembered.words("look")
        self.look = Look(self.root, *(str(kept.get(name, "")) for name in LOOK_SETTINGS))
        self._build()
        self._join()
        self._collect()
        self._restore()
        self.refresh()
        self.root.deiconify()
        self._tick()
        self.jobs.start(system_is_dark, self.look.system)

    # Building

    def _build(self) -> None:
        root, look = self.root, self.look
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=1)
        self.panes = Panes(root, look)
        self.panes.grid(row=0, column=0, sticky="nswe")
        self.sidebar = Sidebar(self.panes, look, self.model)
        center = self._build_center()
        self.panel = Panel(self.panes, look)
        self.people = People(self.panes, look)
        parts = {"sidebar": self.sidebar, "center": center, "panel": self.panel}
        self.panes.compose(parts | {"members": self.people}, center, WIDTHS)
        for name in ("center", "sidebar", "members"):
            self.panes.show(name, True)
        self.status_line = StatusLine(root, look)
        self.status_line.grid(row=1, column=0, sticky="we")
        self._build_cards()

    def _build_center(self) -> ttk.Frame:
        look, center = self.look, ttk.Frame(self.panes)
        center.columnconfigure(0, weight=1)
        center.rowconfigure(1, weight=1)
        self.header = Header(center, look)
        self.transcript = Transcript(center, look, self.timers)
        self.strip = Strip(center, look, lambda *file: self.model.do("stop_file", *file))
        self.banner = Banner(center, look)
        self.preview = Preview(center, look)
        foot = self._build_foot(center)
        parts = (self.header, self.transcript, self.strip, self.banner, self.preview, foot)
        for row, part in enumerate(parts):
            part.grid(row=row, column=0, sticky="nswe")
        self.strip.grid_remove()
        self.preview.grid_remove()
        self.banner.hide()
        return center

    def _build_foot(self, parent: ttk.Frame) -> ttk.Frame:
        look, foot = self.look, ttk.Frame(parent)
        look.follow(lambda: foot.configure(padding=(look.part(0.5), look.part(0.35))))
        self.compose = Compose(foot, look, self.transcript)
        self.compose.preview = self.preview.show
        for text, style, act in (
            ("Send", "Accent.TButton", self.compose.submit),
            ("File", "Plain.TButton", lambda: self.files.ask()),
        ):
            button = ttk.Button(foot, text=text, style=style, command=act, takefocus=False)
            button.pack(side="right", anchor="s", padx=(look.part(0.4), 0))
        self.compose.pack(side="left", fill="x", expand=True)
        return foot

    def _build_cards(self) -> None:
        root, look, do = self.root, self.look, self.model.do
        self.card = ConnectCard(root, look, self.connect, self.remembered.recent)
        self.certificate = CertificateCard(root, look, lambda *answer: do("trust", *answer))
        self.ask_card = AskCard(root, look)
        self.switcher = Switcher(root, look)
        self.settings = SettingsCard(root, look, lambda *change: do("set", *change))
        self.file_card = FileCard(root, look)
        self.code_card = CodeCard(root, look)
        self.cards = [one for one in root.winfo_children() if isinstance(one, Card)]
        for card in self.cards:
            card.closed = self.compose.focus_set
        for field in [one for one in descendants(root) if isinstance(one, Field)]:
            field.refused = self.tell

    def _join(self) -> None:
        """Join the widgets to the acts of the user, and these to the events of the engine."""
        self.writing = Writing(self)
        self.reading = Reading(self)
        self.files = FileActs(self)
        self.messages = MessageActs(self)
        self.rooms = RoomActs(self)
        self.commands = Commands(self)
        self.sidebar.reordered = lambda: self.remembered.write("order", self.sidebar.order)
        self.sidebar.reading = lambda: self.reading.present
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.root.bind("<FocusIn>", self._focus_in)
        self.root.bind("<FocusOut>", self._focus_out)
        self.takers: dict[type, Callable[[Any], None]] = {
            Servers: self._take_servers,
            Rooms: self._take_rooms,
            Looked: self._take_looked,
            **dict.fromkeys(Reading.TAKEN, self.reading.take),
            Removed: self._take_removed,
            Members: self._take_members,
            Back: self.writing.take_back,
            Page: self._take_page,
            Code: lambda event: self.code_card.show(event.address),
            Results: self._take_results,
            Called: self._take_called,
            Settings: self._take_settings,
            Progress: lambda event: self.strip.show(event.files),
            Picture: self.files.take_picture,
            Opened: self.files.take_opened,
        }

    def _log_bug(self, *error: Any) -> None:
        log.error("a bug, please report it", exc_info=error)

    def _focus_in(self, event: Any) -> None:
        for card in self.cards:
            card.keep_focus(event.widget)
        self.reading.set_focus(True)
        self.notices.flash(False)

    def _focus_out(self, event: Any) -> None:
        """Look soon where the focus went: it may be another part of the window."""
        has_keys = lambda: bool(self.root.tk.call("focus", "-displayof", self.root))  # noqa: E731
        self.timers.later("focus", FOCUS_MS, lambda: self.reading.set_focus(has_keys()))

    def run(self) -> None:
        self.root.mainloop()

    # What is remembered

    def _restore(self) -> None:
        root, look = self.root, self.look
        kept = self.remembered.words("look")
        screen = root.winfo_screenwidth(), root.winfo_screenheight()
        wide, high = min(56 * look.em, screen[0] * 9 // 10), min(36 * look.em, screen[1] * 17 // 20)
        usual = f"{wide}x{high}+{2 * look.em}+{2 * look.em}"
        geometry = str(kept.get("geometry") or usual)
        root.minsize(min(screen[0], 22 * look.em), min(screen[1], 14 * look.em))
        room = screen[0], screen[1] - 3 * look.em // 2  # a window manager adds a title
        root.geometry(fitting_geometry(geometry, *room) or fitting_geometry(usual, *room))
        self.sidebar.restore(self.remembered.words("order"))
        for name in ("sidebar", "members"):
            self.panes.show(name, kept.get(name) is not False)
        self.panes.restore(kept.get("wide"))

    def _remember(self) -> None:
        """Keep the look of the window for the next start."""
        look = self.remembered.words("look")
        look |= {name: self.model.values[name] for name in LOOK_SETTINGS if self.model.values}
        look |= {"geometry": self.root.geometry(), "wide": self.panes.wide}
        look |= {name: self.panes.is_shown(name) for name in ("sidebar", "members")}
        self.remembered.write("look", look)

    # Connecting

    def begin(self) -> None:
        """Connect as the command line says, or ask for what is missing."""
        if self.options.name:
            self.connect(self.options.name, self.options.server)
        else:
            self.ask()

    def ask(self, error: str = "") -> None:
        name, server = self.remembered.load()
        name = self.model.me or self.options.name or name
        server = self.address or self.options.server or server
        self.card.show(name, server or DEFAULT_SERVER, error)
        self.jobs.start(server_on_this_machine, self.card.tell_found)

    def connect(
        self, name: str, server: str, password: str = "", secret: str = "", register: bool = False
    ) -> None:
        """Connect to a server, or show why that is not possible. `password` is that of the server,
        `secret` that of the account with this name."""
        try:
            options = self._client_options(name, server)
            if password:
                options = options._replace(password=password)
            if secret and not register:
                options = options._replace(login=chat.Login(name, secret))
            if self.model.engine is None:
                self._start(options)
            else:
                self.model.do("connect", options)
        except (chat.ChatError, OSError) as error:  # such as too many open files
            return self.card.show(name, server or DEFAULT_SERVER, str(error))
        if register and secret:
            self.model.do("register", str(options.target), secret)
        self.remembered.save(name, server)
        self.address = server
        self.card.hide()
        return self.refresh()

    def _start(self, options: chat.ClientOptions) -> None:
        """Start an engine, and forget the conversations of the last one."""
        self.model.start(Engine(options, self.waker.wake))
        self.sidebar.clear()
        self.strip.show(())
        self.writing.drafts.clear()  # the store has them
        self.reading.spots.clear()

    def _client_options(self, name: str, server: str) -> chat.ClientOptions:
        if not chat.clean_name(name):
            raise chat.Unusable("please choose a name")
        # What the command line says of its server is not said of another: a password
        # least of all.
        target = chat.parse_target(server)
        given = self.options if self._is_given(target) else WindowOptions()
        target = target._replace(kind=chat.PLAIN if given.plain else target.kind)
        return chat.ClientOptions(name, target, given.trust, self.options.state, given.password)

    def _is_given(self, target: chat.Target) -> bool:
        """Return whether it is the server of the command line, and no less secure."""
        with contextlib.suppress(chat.Unusable):
            given = chat.parse_target(self.options.server)
            return (given.host, given.port, given.tls) == (target.host, target.port, target.tls)
        return False

    # What the engine has to tell

    def woken(self) -> None:
        """Handle a signal, the results of jobs, and news of the engine: one of them has come."""
        if self.interrupted:
            return self.close()
        self.jobs.take_answers()
        if not self.gone and not self.timers.waits("drain"):
            wait = self.drained + FRAME_SECONDS - time.monotonic()
            self.timers.later("drain", max(0, int(wait * 1000)), self.drain)
        return None

    def drain(self) -> None:
        """Take the batch that waits, and ask for the next one."""
        engine = self.model.engine
        if engine is None or self.closing:
            return
        try:
            batch = engine.batches.get_nowait()
        except queue.Empty:
            return
        try:
            for event in batch:
                self.takers[type(event)](event)
            self.refresh()
        finally:  # a bug in one of them does not stop the others
            self.drained = time.monotonic()
            engine.submit(engine.took)
        if not engine.batches.empty():
            self.woken()

    def _take_servers(self, event: Servers) -> None:
        self.model.take(event)
        self.sidebar.show_servers()
        self._name_user()
        self.asked_about &= {server.question for server in event.servers}
        for server in event.servers:
            if server.question and server.question not in self.asked_about:
                self.asked_about.add(server.question)
                self.when_idle(server.question, functools.partial(self._ask_about, server.question))
        if event.ended is not None:
            self.ended(event.ended)

    def when_idle(self, what: str, act: Callable[[], Any]) -> None:
        """Open a dialog as soon as the user does not type, also not in another one: it takes the
        keys and the place of that."""
        wait = self.writing.edited_at + IDLE_SECONDS - time.monotonic()
        if any(card.shown for card in self.cards):
            wait = IDLE_SECONDS
        if wait > 0:
            self.timers.later(what, int(wait * 1000) + 1, lambda: self.when_idle(what, act))
        else:
            act()

    def _ask_about(self, question: str) -> None:
        """Let the user answer the question of a server, if it still has it."""
        for server in [one for one in self.model.servers if one.question == question]:
            if server.doubted:
                self.certificate.show(server)
            else:
                self.card.show(server.nick, server.address, server.status)

    def _name_user(self) -> None:
        """Mark what is the user's own, in the conversation and among the members."""
        if self.model.me:
            self.transcript.rename_me(self.model.me)
            self.people.rename_me(self.model.me)

    def _take_rooms(self, event: Rooms) -> None:
        self.model.take(event)
        self.sidebar.show_rooms(event)
        for number in event.gone:
            self.writing.room_gone(number)
            self.reading.spots.pop(number, None)

    def _take_looked(self, event: Looked) -> None:
        """Show another conversation. A draft stays in the conversation where it was begun."""
        model, before = self.model, self.model.here
        if before:
            self.writing.leave_room()
            self.reading.leave_room()
        self.transcript.pictures.forget(event.server != model.server_here)
        model.take(event)
        self.writing.enter_room(model.rooms.get(event.room), event.room, from_nowhere=not before)
        self.sidebar.set_draft(event.room, False)
        self.sidebar.select()
        self._name_user()
        self.reading.enter_room()

    def _take_removed(self, event: Removed) -> None:
        self.panel.remove(event.id)
        self.writing.message_gone(event.id)
        self.transcript.remove(event.id)

    def _take_members(self, event: Members) -> None:
        if event.room == self.model.here:
            self.people.change(event.came, event.went, event.reset)

    def _take_page(self, event: Page) -> None:
        keys = f"\n\nKeys\n\n{keys_text()}" if event.title == "help" else ""
        self.show_page(event.title, f"{event.text}{keys}")

    def _take_results(self, event: Results) -> None:
        self.panes.show("panel", True)
        self.panel.show_results(event.title, event.rows)

    def _take_called(self, event: Called) -> None:
        """Ring, and tell the desktop, unless the user is reading that conversation."""
        focused = self.reading.focused
        if focused and event.room == self.model.here:
            return
        if event.bell:
            self.notices.ring()
        if event.desktop and not focused:
            title = " in ".join(dict.fromkeys(chat.optional(event.name, event.where)))
            self.notices.tell(title, event.text)
        self.notices.flash(not focused)

    def _take_settings(self, event: Settings) -> None:
        self.model.take(event)
        values = self.model.values
        self.settings.take(values)
        self.look.want(*(values[name] for name in LOOK_SETTINGS))
        self.transcript.restyle(values["time"], values["pictures"] == "on")

    def ended(self, reason: str) -> None:
        """Note that the engine has stopped for good; the user can connect again, or elsewhere."""
        self.model.stop(reason)
        self.when_idle("ended", lambda: self.model.engine or self.closing or self.ask(reason))

    # What the window shows

    def refresh(self) -> None:
        """Bring labels up to date."""
        model, seen = self.model, self.look.seen
        self.header.refresh(model)
        set_text(self.compose.hint, seen(placeholder_text(model.server, model.room)))
        names = (shorter(name, 24) for name in model.room.typing) if model.room else ()
        self.transcript.tell_typing(seen(chat.typing_text(names)))
        self.status_line.refresh(model.server)
        unread = model.unread(but=model.here if self.reading.present else 0)
        title = title_text(model.server, model.room, unread)
        if title != self.root.title():
            self.root.title(title)

    def _tick(self) -> None:
        """Once a second, show the next number of a countdown."""
        self.status_line.refresh(self.model.server)
        self.timers.later("tick", TICK_MS, self._tick)

    def tell(self, text: str) -> None:
        """Show a text of the window's own, for a while."""
        self.status_line.tell(self.look.seen(text))

    def show_page(self, title: str, text: str) -> None:
        self.panes.show("panel", True)
        self.panel.show_page(title, text)

    # Closing

    def interrupt(self, *_: Any) -> None:
        """Note a signal, which comes at any moment: woken() closes the window."""
        self.interrupted = True
        self.waker.wake()

    def close(self, reason: str = "") -> None:
        """Hide at once, and leave the servers, for a second at most."""
        if self.closing:
            return
        self.closing = True
        self._remember()
        self.root.withdraw()
        drafts = {**self.writing.drafts, self.model.here: self.compose.content}
        self.model.do("leave", reason, drafts)
        self._wait_for_engine(time.monotonic() + CLOSE_SECONDS)

    def _wait_for_engine(self, until: float) -> None:
        engine = self.model.engine
        if engine and engine.thread.is_alive() and time.monotonic() < until:
            self.root.after(CLOSE_POLL_MS, self._wait_for_engine, until)
        else:
            self.destroy()

    def _collect(self) -> None:
        """Collect garbage on Tk's thread, and on no other: Tk aborts the program when one of
        its objects is freed elsewhere, and the loop's thread makes garbage, too."""
        self.collections += 1
        gc.collect(2 if self.collections % COLLECTIONS == 0 else 1)
        self.timers.later("collect", COLLECT_MS, self._collect)

    def destroy(self) -> None:
        self.gone = True
        self.timers.close()
        self.waker.close()
        self.files.close()
        self.remembered.close()
        self.root.destroy()


# ======================================================================================
# DEMO
# ======================================================================================
# The pictures of the README: --demo DIR makes them, on a virtual screen (Xvfb) with
# ImageMagick's import, of a window that talks with a real server.

DEMO_SIZE = (1000, 560)
DEMO_SECONDS = 20  # until a step has to be done
DEMO_REST_MS = 600  # from the last step to the picture
DEMO_NAMES = ("bob", "carol", "dave", "erin", "robot")
DEMO_CHANNELS = ("#lobby", "#tea", "#releases")
DEMO_TALK = (  # name, channel or "" for a private message, text
    ("carol", "#releases", "0.4 is tagged, the notes are in the wiki"),
    ("bob", "#releases", "alice: can you write the paragraph about the window?"),
    ("erin", "#tea", "the kettle is on"),
    ("dave", "#lobby", "good morning, everyone"),
    ("bob", "#lobby", "good morning! the build is green: https://example.org/build/42"),
    ("bob", "#lobby", "only the pictures of the README are missing"),
    ("carol", "#lobby", "alice: shall we look at them together at ten?"),
    ("erin", "", "psst, there is cake at four"),
)
DEMO_PICTURE = ("tea.png", 180, 90)
DEMO_ANSWER = "gladly, I bring the tea \u2615"


class DemoPeer:
    """A peer over IRC that says what it is told."""

    def __init__(self, name: str, address: tuple[str, int]):
        self.sock = socket.create_connection(address, DEMO_SECONDS)
        self.file = self.sock.makefile("r", encoding="utf-8", errors="replace")
        self.send("CAP REQ :message-tags server-time", "CAP END")
        self.send(f"NICK {name}", f"USER {name} 0 * :{name}")
        self.send(*(f"JOIN {channel}" for channel in DEMO_CHANNELS), "PING in")
        while "PONG" not in self.line():
            pass

    def send(self, *lines: str) -> None:
        self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def line(self) -> str:
        line = self.file.readline()
        if line.startswith("PING"):
            self.send(f"PONG{line[4:].rstrip()}")
        return line or "PONG, closed"

    def id_of(self, text: str) -> str:
        """Wait for a message; return the server's id of it."""
        while text not in (line := self.line()):
            if line == "PONG, closed":
                raise chat.Unusable("the server of the demo has gone")
        return re.search("msgid=([^; ]+)", line)[1]


@contextlib.contextmanager
def demo_screen() -> Iterator[None]:
    """A virtual screen of the size of the pictures."""
    ours, theirs = os.pipe()
    size = "x".join(map(str, DEMO_SIZE))
    command = ["Xvfb", "-displayfd", str(theirs), "-screen", "0", f"{size}x24"]
    with subprocess.Popen(command, pass_fds=[theirs], stderr=subprocess.DEVNULL) as screen:
        os.close(theirs)
        with open(ours, encoding="ascii") as reader:
            os.environ["DISPLAY"] = f":{reader.readline().strip()}"
        try:
            yield
        finally:
            screen.terminate()


def wait_for(window: Window, condition: Callable[[], Any]) -> None:
    """Let Tk work until the condition holds. Raises Unusable if it never does."""
    until = time.monotonic() + DEMO_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise chat.Unusable("a step of the demo did not end")
        timer = window.root.after(CLOSE_POLL_MS, chat.do_nothing)
        window.root.tk.dooneevent(0)
        window.root.tk.call("after", "cancel", timer)


def send_picture(window: Window, folder: pathlib.Path) -> None:
    """Draw a picture, a cup of tea, and send it."""
    name, wide, high = DEMO_PICTURE
    picture = tk.PhotoImage(master=window.root, width=wide, height=high)
    for colour, *box in (
        ("#f4d9b8", 0, 0, wide, high),
        *(("#8a4b2a", 108, 36, 130, 58), ("#f4d9b8", 108, 42, 124, 52)),  # the handle
        *(("#8a4b2a", 56, 28, 112, 72), ("#c9742f", 60, 28, 108, 34)),  # the cup, the tea
        *(("#e8e3da", 72, 10, 75, 22), ("#e8e3da", 90, 8, 93, 22)),  # its steam
    ):
        picture.put(colour, to=tuple(box))
    picture.write(folder / name, format="png")
    window.files.send(window.model.here, [folder / name])
    wait_for(window, lambda: window.transcript.text.image_names())


def play_demo(window: Window, peers: dict[str, DemoPeer], folder: pathlib.Path) -> None:
    """Let some users talk, and this one with them."""

    def shows(text: str) -> bool:
        return text in window.transcript.text.get("1.0", "end")

    wait_for(window, lambda: window.model.room and window.model.server.ready)
    for channel in DEMO_CHANNELS[1:]:
        window.model.command(f"/join {channel}")
        wait_for(window, lambda c=channel: window.model.room and window.model.room.name == c)
    window.rooms.go_number(1)
    wait_for(window, lambda: window.model.room.name == DEMO_CHANNELS[0])
    peers["bob"].send("TOPIC #lobby :Release 0.4 on Friday \u2013 https://example.org/notes")
    for name, channel, text in DEMO_TALK:
        peers[name].send(f"PRIVMSG {channel or 'alice'} :{text}")
        if channel == DEMO_CHANNELS[0]:
            wait_for(window, lambda t=text: shows(t))
    question = peers["dave"].id_of(DEMO_TALK[-2][2])
    for name in ("dave", "erin"):
        peers[name].send(f"@+draft/react=\u2764;+draft/reply={question} TAGMSG #lobby")
    window.messages.act("reply", window.transcript.sheet.rows[-1])
    window.compose.set(DEMO_ANSWER)
    window.compose.submit()
    wait_for(window, lambda: shows(DEMO_ANSWER) and shows("\u2764 2"))
    send_picture(window, folder)
    peers["dave"].send("@+typing=active TAGMSG #lobby")
    peers["erin"].send("AWAY :lunch")
    wait_for(window, lambda: window.transcript.typing.cget("text"))
    window.compose.focus_force()


def make_picture(path: pathlib.Path, theme: str, state: pathlib.Path) -> None:
    """Make one picture, in light or dark."""
    state.mkdir(mode=0o700)
    look = {"theme": theme, "geometry": "{}x{}+0+0".format(*DEMO_SIZE)}
    Remembered(state).write("look", look)
    with chat.temporary_server() as target:
        peers = {name: DemoPeer(name, target[:2]) for name in DEMO_NAMES}
        where = chat.address_text(*target[:2])
        window = Window(WindowOptions("alice", where, state=state))
        window.begin()
        window.model.do("set", "theme", theme)
        play_demo(window, peers, state)
        rested: list[bool] = []
        window.timers.later("demo", DEMO_REST_MS, lambda: rested.append(True))
        wait_for(window, lambda: rested)
        subprocess.run(["import", "-window", "root", str(path)], check=True)
        window.close()
        wait_for(window, lambda: window.gone)


def make_pictures(folder: pathlib.Path) -> int:
    """Make the pictures of the README in a folder."""
    for program in ("Xvfb", "import"):
        if not shutil.which(program):
            print(f"gui_client.py: --demo needs {program}", file=sys.stderr)
            return 1
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state, demo_screen():
        for theme in ("light", "dark"):
            path = folder / f"window-{theme}.png"
            make_picture(path, theme, pathlib.Path(state) / theme)
            print(path)
    return 0


# ======================================================================================
# MAIN
# ======================================================================================
# The command line is that of the terminal client, but that the window asks for what is
# missing or wrong.


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The chat's window.")
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", default="", help="without it, the window asks")
    add("--server", default="", metavar="HOST:PORT|URL")
    add("--demo", type=pathlib.Path, metavar="DIR", help=argparse.SUPPRESS)  # see DEMO
    chat.add_client_options(add)
    return parser


def heed_signals(window: Window) -> None:
    """Let signals close the window, but none that is ignored: under nohup it goes on."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, window.interrupt)
    window.waker.wake_on_signals()


def main(arguments: list[str] | None = None) -> int:
    try:
        args = command_line().parse_args(arguments)
        state = None if args.no_state else args.data or chat.data_folder() / "client"
    except chat.ChatError as error:
        print(f"gui_client.py: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
    if args.demo:
        return make_pictures(args.demo)
    if os.name == "nt":  # which blurs a program that does not say it draws for fine screens
        with contextlib.suppress(AttributeError, OSError):
            ctypes.OleDLL("shcore").SetProcessDpiAwareness(1)
    trust = chat.Trust(args.ca, args.pin, args.insecure, args.client_cert)
    options = WindowOptions(
        whole(args.name), whole(args.server), args.plain, args.password or "", trust, state
    )
    try:
        window = Window(options)
    except (tk.TclError, OSError) as error:
        print(f"gui_client.py: cannot open a window: {error}", file=sys.stderr)
        return 1
    heed_signals(window)
    window.begin()
    window.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
