#!/usr/bin/env python3
"""A chat in one file: a server for everyone in the room, and a client for it.

    python3 chat.py server          python3 chat.py client alice          nc 127.0.0.1 7000

Sections, in reading order; each opens with a banner and uses only what stands above it:

    LIMITS          every tunable, with its unit and its reason
    VOCABULARY      events, and the errors that are raised on purpose
    FRAMING         bytes to lines, names, cutting text where it may be cut
    BUFFERS         what waits to be sent, TLS as a filter, input budgets
    COMMANDS        the record of a command, and the one gate before it runs
    ACCOUNTS        secrets, and how to prove that one knows them
    DOMAIN          users, sessions, channels, the hub, and the log of a turn
    STORE           history in SQLite
    IRC DIALECT     every command of RFC 1459 and 2812
    LINE DIALECT    the workshop's protocol and its slash commands
    FIRST LINE      which dialect a connection speaks
    CLIENT CORE     a conversation as lines in and views out
    --- waterline   below: sockets, clocks, threads, terminals
    LOOP            selector, timers, connections
    SERVER          listeners, the five beats of the tick, shutdown
    LINK            a client's connection: find the server, come back to it
    TERMINAL        keys, line editor, what a screen shows
    CLI CLIENT      the terminal and the connection on one loop
    BENCH           a load generator on the same loop
    MAIN            arguments and subcommands

How data flows through the server, once a turn:

    poll    sockets, timers and wake-ups are waited for
    read    bytes of every ready connection become lines
    act     lines become Hub calls; events pile up in the turn's log, nothing is sent
    commit  the turn's events go to SQLite in one transaction
    write   the log becomes bytes, one write per connection

Glossary:

    line      what stands between two newlines on the wire
    event     what other people can see: a message, a join, a topic ... (class Event)
    turn      one round of the loop, and the log of what happened in it (class Turn)
    conn      connection: a socket with its buffers; knows nothing of chat
    peer      a connection as the server sees it: with a first line, a budget, a session
    session   one connection's side of the talk, in one dialect
    user      a person who is here now, under a name; has one or more sessions
    channel   a named place where users talk
    audience  whom an event is for: a channel, several channels, a private conversation
    wire      one way to turn events into bytes; sessions of one wire share those bytes
    view      what a client shows its person
    key       a name folded for comparison; two names with one key are the same name
    stay      a user from coming to leaving for good; who has an account or a secret may have
              no session for a while
    receipt   what was said under an id of its sender's: under one id a thing is said once
    room      a channel or private talk as a client knows it
    talk      what a client speaks over one connection: IRC, or the workshop's protocol
    outbox    what a client has accepted and no server has acknowledged; its file is a journal
    link      a client core and its connection, kept up
"""

from __future__ import annotations

import argparse
import atexit
import base64
import bisect
import codecs
import collections
import contextlib
import datetime
import errno
import functools
import hashlib
import heapq
import hmac
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import random
import re
import secrets
import selectors
import shlex
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

# ======================================================================================
# LIMITS
# ======================================================================================
# Every number that somebody may want to change, with its unit and the reason for it.
# A refusal always names the limit it enforces and says what to do.

VERSION = "0.2"
SERVER_NAME = "chat.py"  # unless --name says otherwise; IRC wants a dot in it
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000

LINE_BYTES = 16 * 1024  # longest line in the line protocol; a page of text fits
IRC_BYTES = 512  # longest line of IRC with its end (RFC 2812 section 2.3) ...
TAGS_BYTES = 4095  # ... and of the tags before it with their @ (IRCv3 message-tags)
MESSAGE_LINES = 200  # longest message of several lines; more is a file, not a message
NAME_CHARACTERS = 32  # longest name as people count ...
NAME_BYTES = 64  # ... and as the wire does; room for 16 characters outside the BMP
NAMES_COUNTED = 100  # alice2 to alice99; after that any number will do
CHANNEL_BYTES = 64  # as for names
TOPIC_BYTES = 300  # fits an IRC line beside the longest mask and channel ...
REASON_BYTES = 200  # ... and this, why somebody is away, kicked or gone, beside two names more
USERNAME_BYTES = 20
REALNAME_BYTES = 128
CHANNEL_PASSWORD_BYTES = 32
CHANNELS_A_USER = 50  # bounds the table of channels by the number of users ...
CHANNELS_FOUNDED = 50  # ... and of those that last, by the number of accounts
STANDING_KEPT = 100  # accounts with a rank in a channel while they are not there
SECRETS_A_USER = 10  # devices that may come back
SECRET_DIGITS = 32  # hexadecimal: 128 bits
OWN_ID_BYTES = 64  # of the id that a client gives its message
RECEIPTS_MS = 30 * 24 * 3600 * 1000  # that such an id is known after its message is gone
RECEIPTS_SWEPT = 500  # looked through at a time ...
SWEEP_SECONDS = 3600.0  # ... and from when to when
MASKS_A_LIST = 60  # bans of one channel: each is looked at when somebody joins or speaks
MASK_BYTES = 200
MODES_BYTES = 300  # of one change of modes: as for topics
MODES_AT_ONCE = 100  # signs and letters of one command; the rest is not looked at ...
USER_MODES_AT_ONCE = 20  # ... as with one's own, which are five
PATTERN_ITEMS = 4  # a letter of a mask costs as much as looking at so many users
INVITATIONS = 50  # of one user, not yet used
WATCHED = 100  # names that one session monitors
FORMER_USERS = 1000  # remembered for WHOWAS
FITS_ALWAYS = 300  # bytes that fit in a line of IRC behind the longest mask and channel
LABEL_BYTES = 64  # of a label (IRCv3 labeled-response)
METADATA_KEYS = 20  # that a user or a channel may have
METADATA_SUBS = 50  # that one session may want to hear of
METADATA_BYTES = 300  # of a value
METADATA_AT_ONCE = 100  # values told to who joins a channel; more are there for the asking
METADATA_KEY_BYTES = 64
MARKERS = 1000  # of one user: how far each channel and talk has been read
TARGETS = 20  # of one PRIVMSG
LIST_TARGETS = 10  # names, masks and conditions of one LIST
LOOKED_AT_A_LINE = 100  # users or channels that a command may look through for one line's budget
HOST_BYTES = 46  # an IPv6 address and a zero before it
PARAM_BYTES = 100  # of what a client said, when it is said back: there have to be words, too
TOKENS_A_LINE = 13  # of 005: a line has 15 parameters, the name and the last words included
PASSWORD_TRIES = 3  # before a connection is closed
OPERATOR_ROUNDS = 50_000  # of PBKDF2 for --oper: 20 ms a guess, and at every start
ACCOUNT_ROUNDS = 210_000  # for what is kept on disk (OWASP, Password Storage, for SHA-512)
PASSWORD_LEAST = 3  # characters; more is better, but it is their account
SASL_CHUNK = 400  # bytes of base64 in a line (IRCv3 sasl-3.1)
SASL_BYTES = 4 * SASL_CHUNK  # in all
LOGIN_TRIES = 5  # failures from one address at one account ...
LOGIN_WAIT_SECONDS = 60  # ... before it has to wait
LOGIN_FAILURES_KEPT = 10_000
CERTIFICATES = 10  # of one account
ACCOUNTS_MADE = 5  # from one address (loopback exempt) ...
ACCOUNTS_MADE_SECONDS = 3600  # ... with no more than this between one and the next
PENDING_ACCOUNTS = 1000  # that wait for a code sent by mail
MAIL_SECONDS = 30  # for --sendmail to take one
GRACE_SECONDS = 60.0  # who can prove to be the same and loses the line is here for so long ...
ABSENT_MOST = 1000  # ... but not more of them (of one address: PER_ADDRESS): the first one goes

READ_BYTES = 64 * 1024  # taken from one connection in one turn
LINES_A_TURN = 256  # acted on for one connection in one turn, so that nobody waits for a flood
BACKLOG = 1024  # connections the kernel keeps for us meanwhile
ACCEPTS_A_TURN = 128  # connections taken in one turn, likewise
SEND_BYTES = 64 * 1024  # small chunks are joined up to this for one send
UNSENT_NO_READ = 256 * 1024  # bytes: who does not read is not listened to either
UNSENT_SLOW = 512 * 1024  # bytes: more than this for SLOW_SECONDS closes the receiver ...
SLOW_SECONDS = 20.0
UNSENT_MOST = 4 * 1024 * 1024  # ... and more than this at once

FLOOD_BURST = 1000  # lines at once: a pasted file
FLOOD_RATE = 100.0  # lines a second after that
GREETING_SECONDS = 0.1  # whoever knows the protocol has spoken by then
NAMING_SECONDS = 30.0  # connection to name
PING_SECONDS = 90.0  # an IRC client silent for so long is asked whether it is there ...
PONG_SECONDS = 30.0  # ... and closed if it says nothing
LINGER_SECONDS = 2.0  # how long a closed connection may still read our last words
STOP_SECONDS = 1.0  # how long a shutdown waits for slow readers
PER_ADDRESS = 64  # connections from one address (loopback exempt)
SPARE_DESCRIPTORS = 64  # kept from clients for the database, listeners, helpers and logs
ACCEPT_BACKOFF = 1.0  # seconds without accepting when the descriptors ran out
KEEPALIVE_SECONDS = 90  # first TCP probe to a silent line-protocol peer ...
KEEPALIVE_PROBES = 3  # ... and how many of them, KEEPALIVE_EVERY apart
KEEPALIVE_EVERY = 10

ID_CLOCK_BITS = 12  # an event's id is the time and 4,096 events a millisecond
ID_DIGITS = 15  # hexadecimal, of an event's id: SQLite's integers have a bit more
LAST_MOMENT = 253_402_300_799_000  # milliseconds: no calendar has the year 10,000
TIMES_AHEAD = 1000  # milliseconds that an event's time may be ahead of the clock, to be unique
KEEP_EVENTS = 1_000_000  # history of a channel
KEEP_EVENTS_IN_MEMORY = 10_000  # the same with --data none: about 5 MB a busy channel ...
MEMORY_BYTES = 256 * 1024 * 1024  # ... and this much for all channels, those of the past too
PRUNE_ROWS = 500  # rows deleted at a time: 1 to 3 ms, measured
INDEX_ROWS = 200  # messages made searchable at a time: 1 to 2 ms, measured
PART_ROWS = 50_000  # messages of one part of the index: its longest list is merged in 10 ms
MERGE_PAGES = 16  # of the index brought in order at a time: 1 to 5 ms
INDEX_SECONDS = 1.0  # until what was said can be searched, if there is nothing else to do
TALLY_SECONDS = 1.0  # between writing down how much history there is
TARGETS_CACHED = 10_000  # row ids of channels and private talks kept at hand
PRUNE_OVERDUE = 1.1  # times the limit: from here on pruning does not wait for an idle turn
BUSY_SECONDS = 1.0  # a database busy for longer gets no more of the turn's events
PASSWD_WAIT = 5000  # milliseconds that `chat.py passwd` waits for a busy server
BUSY_RETRY_SECONDS = 0.005  # not noticed by a person, and not a busy loop either
CHECKPOINT_SECONDS = 1.0  # the log stays small, and the next start quick
WAL_RESTART_BYTES = 64 * 1024 * 1024  # PASSIVE checkpoints never reset it under unbroken load
CHECKED_ON_START_BYTES = 16 * 1024 * 1024  # a larger database is not read whole: 300 ms to start
HISTORY_LINES = 20  # /history without a number: a screen
HISTORY_LINES_MOST = 500
PAGE_LINES = 100  # that our clients ask for at once
SENT_AHEAD = 32  # messages of ours under way: what is sent again after a break, at most
VIEWS_KEPT = 2000  # of a conversation, by our clients; more is in the server's history
IDS_KEPT = 10_000  # of messages, to tell a repeat
ROOMS_KEPT = 200  # conversations; a private one that nobody looks at gives way to the next
TOKENS_KEPT = 500  # capabilities, and tokens of 005, that a server may have
BATCH_LINES = 2000  # of what a server says at once ...
BATCHES = 20  # ... and so many that it has not ended
TARGETS_ASKED = 500  # places with something new, after a break
SHOWN_FAILED = 100  # bytes of a message that did not arrive
SHORT_NAME = 9  # letters that every server takes (RFC 2812 section 1.2.1) ...
NAMES_TRIED = 4  # ... and names, before we give up
SCRAM_ROUNDS = range(4096, 2_000_001)  # that a server may ask of us (RFC 7677 section 4)
PAGE_BYTES = 128 * 1024  # of history at once: well below what closes a slow reader
PEOPLE_LISTED = 10_000  # of a channel, by our clients
NAMES_GREETED = 20  # who is here, told to a newcomer in one line
NAMES_A_LINE = 100  # at 64 bytes each still well below LINE_BYTES

HELPER_THREADS = 2  # one may wait for the disk while the other reads a page

LISTEN_SECONDS = 1.0  # how long our client waits for a server to speak first ...
LISTEN_CONNECT_TIMES = 4  # ... or this many times what connecting took, the longer
CONNECT_SECONDS = 10.0  # to one address, and as much again for the TLS handshake
BACKOFF_FIRST = 0.5  # seconds before the first attempt to reconnect
BACKOFF_MOST = 30.0
NEXT_ADDRESS_SECONDS = 0.25  # until the next address is tried, too (RFC 8305 section 5)
RETRY_SECONDS = 60.0  # that a filter looks for a server it has lost
WATCH_SECONDS = 1.0  # between two looks whether the server is still there ...
SILENT_SECONDS = 25.0  # ... which is given up after so long: half of it, then a PING ...
WAITING_SECONDS = 10.0  # ... and sooner while a message waits to be acknowledged
OUTBOX_FULL = 256  # messages: then a pipe is read later
UNDERSTOOD_KEPT = 10_000  # said to a server that may turn out to speak IRC, to be said again

PAINTS_A_SECOND = 30  # of the terminal: more cannot be seen
LINES_AT_ONCE = 200  # new in a conversation that a terminal shows: a page of history
LINES_A_SECOND = 600  # ... and after that: more is left for those who read back
BESIDE_COLUMNS = 60  # fewer, and what belongs together stands one below the other
MARK_COLUMNS = 20  # of a conversation's name in the status row
LEAST_COLUMNS, LEAST_ROWS = 10, 4  # of a terminal that we draw on
BENCH_PAYLOAD = LINE_BYTES - 256  # beside the time, and the name of who said it
BENCH_QUIET_SECONDS = 0.3  # without news: everybody has joined
ESCAPE_SECONDS = 0.04  # a lone ESC is a key, not the beginning of one, after this
TYPED_KEPT = 500  # lines of what was typed, for the arrow keys

# ======================================================================================
# VOCABULARY
# ======================================================================================
# An Event is one record of something other people can see. It names its audience and
# never its receivers: who that is, is worked out once, when the turn is written.

LOBBY = "#lobby"  # where everybody without a channel of their own finds themselves
SERVICE = "NickServ"  # who looks after accounts, for clients that know no better
SERVICE_KEY = SERVICE.lower()
SERVICES = (SERVICE_KEY, "chanserv", "histserv")  # and what other servers have
PASSWORD_CHANGED = "your password is another now"  # as NickServ says it, and ...
ACCOUNT_GONE = "your account is gone"  # ... this
UNCONFIRMED = "sent-"  # before a message's id, in a PING that is sent behind it

MESSAGE, ACTION, NOTICE = "message", "action", "notice"
JOIN, PART, QUIT, NICK, TOPIC = "join", "part", "quit", "nick", "topic"
KICK, MODE, PASSWORD = "kick", "mode", "password"  # PASSWORD: the mode k
RENAME = "rename"  # of a channel: about is the name it had
INVITE, INVITED, AWAY, WALLOPS = "invite", "invited", "away", "wallops"
REALNAME, ACCOUNT = "realname", "account"
HOST = "host"  # somebody is connected from elsewhere: about is the username
TAGS = "tags"  # a message that has nothing but tags: somebody is typing, or likes another
REDACT = "redact"  # a message is taken back: the text is its id, and " :why"
SOFT_BREAK = "\0"  # in a text: a client sent its line in two pieces here; nobody can type it
SPOKEN = (MESSAGE, ACTION, NOTICE)  # the kinds that a person said
PASSING = (  # for the moment, and not for history
    *(INVITE, INVITED, AWAY, WALLOPS, REALNAME, ACCOUNT, HOST, PASSWORD, REDACT, RENAME),
)
PLAYED = (*SPOKEN, TAGS, JOIN, PART, QUIT, KICK, NICK, MODE, TOPIC)  # all that history has


class Source(NamedTuple):
    """Who did something, as they were called at that moment."""

    name: str
    address: str  # HOST:PORT; an IPv6 host in brackets
    username: str = ""  # what they call themselves, unverified ...
    host: str = ""  # ... and where they are, as IRC writes it
    mask: str = ""  # nick!user@host (RFC 2812 section 2.3.1), of which hostmasks are patterns
    account: str = ""  # that they are logged in to
    bot: bool = False
    identity: str = ""  # whose private talks these are, see User


def host_of(address: str) -> str:
    return address.rpartition(":")[0]


def source_of(
    name: str, address: str, username: str, account: str = "", bot: bool = False
) -> Source:
    """With its mask, which is asked for with every message."""
    host = host_of(address).strip("[]")
    if host.startswith(":"):  # a word of IRC cannot begin with one
        host = f"0{host}"
    return Source(name, address, username, host, f"{name}!{username}@{host}", account, bot)


class Event(NamedTuple):
    """One thing that others can see. A tuple, because a storm makes 50,000 of them a second."""

    id: int  # grows with every event, over restarts too; the order of everything
    time: int  # milliseconds since 1970, never falling within one audience
    kind: str
    source: Source
    audience: Any  # a Channel, a Conversation ...: see DOMAIN
    text: str = ""
    about: str = ""  # the one kicked, or the one that a private message is for
    origin: Any = None  # the Session that did it; None when read back from the store
    tags: str = ""  # what a client had to say to clients, as on the wire: +a=b;+c


class ChatError(Exception):
    """What this program raises on purpose. The text is a sentence for a person."""


class Refused(ChatError):
    """A peer asked for what cannot be done; the gate tells that peer, nobody else notices."""

    def __init__(self, code: str, text: str, *about: str):
        super().__init__(text)
        self.code = code  # a word for programs, the same in every dialect
        self.about = about  # what programs want to know besides: which channel, which name


class Unusable(ChatError):
    """Something this program needs is not to be had; it says so in one line and ends."""


class TlsFailed(ChatError):
    """The other side does not speak TLS as we do, or is not who it should be."""


# ======================================================================================
# FRAMING
# ======================================================================================
# Bytes are split at LF first and decoded line by line after, so that a character cut in
# two by the network is whole again before anything looks at it.

TOO_LONG = b"\n"  # stands for a line over the limit; no real line holds a newline


class LineBuffer:
    """Bytes in, lines out, as tokio's LinesCodec frames them: LF ends, one CR before it goes.

    A line longer than `limit` bytes comes out as TOO_LONG once and is skipped to its end.
    """

    __slots__ = ("limit", "lines", "skipping", "tail")

    def __init__(self, limit: int):
        self.limit = limit
        self.lines: list[bytes] = []  # complete ones, the oldest last, for pop()
        self.tail = b""
        self.skipping = False

    def feed(self, data: bytes) -> None:
        if self.tail:
            data = self.tail + data
        *lines, tail = data.split(b"\n")
        if self.skipping:
            if not lines:
                return
            del lines[0]
            self.skipping = False
        if b"\r" in data:
            lines = [line.removesuffix(b"\r") for line in lines]
        if len(data) > self.limit:
            lines = [TOO_LONG if len(line) > self.limit else line for line in lines]
            if len(tail) > self.limit + 1:  # one more: a CR that may yet be dropped
                lines.append(TOO_LONG)
                tail = b""
                self.skipping = True
        lines.reverse()
        self.lines = lines + self.lines
        self.tail = tail

    def take(self) -> bytes | None:
        """The oldest complete line; None when there is none."""
        return self.lines.pop() if self.lines else None

    def finish(self) -> None:
        """The peer will send no more: what came after the last newline is a line too."""
        if self.tail not in (b"", b"\r"):
            self.lines.insert(0, self.tail.removesuffix(b"\r"))
        self.tail = b""


def fold(name: str) -> str:
    """The key of a name: full case folding, and what only looks different made the same."""
    if name.isascii():  # nothing to normalize, and asked for with every message
        return name.lower()
    folded = unicodedata.normalize("NFKC", name).casefold()
    return unicodedata.normalize("NFKC", folded)


def cut(text: str, limit: int) -> str:
    """As much of `text` as fits in `limit` bytes of UTF-8, never half a character."""
    return text.encode()[:limit].decode(errors="ignore")


NOT_IN_NAMES = frozenset(",:!@*?.$/")  # they mean something in masks, URLs or IRC lines
NOT_FIRST_IN_NAMES = frozenset("#&~%+-([")  # channel types, ranks, and our own prefixes


FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that show nothing


def is_solid(c: str) -> bool:
    """Neither a control, format or unassigned character, nor a separator, nor a filler."""
    return unicodedata.category(c)[0] not in "CZ" and c not in FILLERS


def is_visible(text: str) -> bool:
    """Whether there is more to see than marks on nothing."""
    return any(unicodedata.category(c)[0] not in "MCZ" for c in text)


def is_word(text: str, limit: int) -> bool:
    """Whether `text` can stand between others in a line of IRC, and has at most `limit` bytes."""
    solid = text and text[0] != ":" and all(map(is_solid, text))
    return bool(solid) and len(text.encode()) <= limit


def clean_name(wanted: str) -> str:
    """The nearest name that every dialect can carry; "" if nothing is left.

    NFKC; control, format, separator and unassigned characters (Unicode C* and Z*) and
    NOT_IN_NAMES become "_", as does one of NOT_FIRST_IN_NAMES at the start.
    """
    name = unicodedata.normalize("NFKC", wanted.strip()[: 4 * NAME_CHARACTERS])
    name = "".join(c if is_solid(c) and c not in NOT_IN_NAMES else "_" for c in name)
    if name[:1] in NOT_FIRST_IN_NAMES:
        name = "_" + name[1:]
    return cut(name[:NAME_CHARACTERS], NAME_BYTES) if is_visible(name) else ""


def numbered_name(name: str, number: int) -> str:
    """alice, 2 -> alice2, shortened where the number would not fit."""
    suffix = str(number)
    stem = name[: NAME_CHARACTERS - len(suffix)]
    return cut(stem, NAME_BYTES - len(suffix)) + suffix


def check_channel_name(name: str) -> None:
    """Raise Refused unless `name` can name a channel (RFC 2812 section 1.3, in Unicode)."""
    if not name.startswith("#") or len(name) < 2:
        text = "a channel's name begins with # and goes on, like #tea"
        raise Refused("BAD_CHANNEL", text, name)
    if len(name.encode()) > CHANNEL_BYTES:
        text = f"a channel's name has at most {CHANNEL_BYTES} bytes"
        raise Refused("BAD_CHANNEL", text, name)
    if set(",]") & set(fold(name)) or not all(map(is_solid, name)) or not is_visible(name[1:]):
        text = "a channel's name is visible, without spaces, commas or ]"
        raise Refused("BAD_CHANNEL", text, name)


class Message(NamedTuple):
    """One line of IRC (RFC 2812 section 2.3.1) as a client sends it."""

    verb: str  # in capitals; "" for a line of blanks
    params: list[str]
    tags: dict[str, str]


TAG_ESCAPES = {":": ";", "s": " ", "r": "\r", "n": "\n"}


def unescaped_tag(value: str) -> str:
    return re.sub(r"\\(.?)", lambda match: TAG_ESCAPES.get(match[1], match[1]), value)


def parse_tags(text: str) -> dict[str, str]:
    """a=b;c -> {"a": "b", "c": ""} (IRCv3 message-tags): nothing in there is an error."""
    pairs = (tag.partition("=") for tag in text.split(";"))
    return {key: unescaped_tag(value) for key, _, value in pairs if key}


def parse_message(line: str) -> Message:
    """Lenient: spaces in a row count as one, a source is ignored, verbs have any case."""
    tags: dict[str, str] = {}
    if line.startswith("@"):
        head, _, line = line[1:].partition(" ")
        tags = parse_tags(head)
    line = line.lstrip(" ")
    if line.startswith(":"):
        line = line.partition(" ")[2]
    middle, colon, trailing = line.partition(" :")
    words = middle.split(" ")
    if "" in words:
        words = list(filter(None, words))
    if colon:
        words.append(trailing)
    verb, *params = words or [""]
    return Message(verb.upper(), params, tags)


def split_text(text: str, room: int) -> Iterator[str]:
    """Pieces of at most `room` bytes of UTF-8: between words where one is near, and never
    inside a character."""
    while len(text.encode()) > room:
        piece = cut(text, room)
        space = piece.rfind(" ") + 1
        if space > len(piece) // 2:
            piece = piece[:space]
        yield piece
        text = text[len(piece) :]
    yield text


@functools.lru_cache(1000)
def mask_pattern(mask: str) -> re.Pattern:
    """What fullmatch()es the folded texts that `mask` means: * is anything, ? is any one.

    An atomic group, (?>...), never gives back what it took. So each piece between two stars
    is found once, where it comes first, and no number of stars makes this slow: the time is
    at most the product of both lengths, where nested .* would double with every star.
    """
    pieces = re.split(r"\*+", fold(mask))
    first, *others = (re.escape(piece).replace(r"\?", ".") for piece in pieces)
    if others:
        *middle, last = others
        first += "".join(f"(?>.*?{piece})" for piece in middle) + f".*{last}"
    return re.compile(first, re.DOTALL)


CONTROLS = {n: None for n in (*range(0x20), *range(0x7F, 0xA0)) if chr(n) not in "\t\n"}


def harmless(text: str) -> str:
    """`text` without control characters but TAB and newline: no terminal is steered by it."""
    return text if text.isprintable() else text.translate(CONTROLS)


# Embeddings, overrides and isolates (UAX 9): they move what stands around a message, too.
BIDI_CONTROLS = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def escaped(text: str) -> str:
    """`text` with control characters made visible, for the log and error messages."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def whole_number(text: str) -> int | None:
    """The number that `text` is; None if it is none, or none that anybody means."""
    return int(text) if text.isdecimal() and len(text) < 10 else None


def time_text(milliseconds: int) -> str:
    """2026-11-22 08:30:05Z: UTC, because a server does not know where its readers live."""
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def counted(number: int, noun: str) -> str:
    """1, "message" -> "1 message"; 2 -> "2 messages"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# ======================================================================================
# BUFFERS
# ======================================================================================
# Bytes between the dialects and the socket. What a channel said is one bytes object in
# the queues of all its members, so a backlog costs a reference a receiver, not a copy.


class SendQueue:
    """What waits to be sent to one receiver, in order."""

    __slots__ = ("chunks", "offset", "size")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.offset = 0  # how much of the first chunk is gone
        self.size = 0  # bytes waiting in all

    def append(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)

    def head(self) -> bytes | memoryview:
        """What the next send may take: one large chunk, or small ones joined."""
        first = self.chunks[0]
        if self.offset:
            return memoryview(first)[self.offset :]
        if len(self.chunks) == 1 or len(first) >= SEND_BYTES:
            return first
        sizes = itertools.accumulate(map(len, self.chunks))
        count = sum(1 for _ in itertools.takewhile(lambda size: size <= SEND_BYTES, sizes))
        return b"".join(self.chunks[: max(count, 1)])

    def advance(self, sent: int) -> None:
        """`sent` bytes of the head are gone."""
        self.size -= sent
        if not self.size:  # nearly always: no walk along the chunks
            self.chunks.clear()
            self.offset = 0
            return
        sent += self.offset
        gone = 0
        while sent >= len(self.chunks[gone]):
            sent -= len(self.chunks[gone])
            gone += 1
        del self.chunks[:gone]
        self.offset = sent

    def clear(self) -> None:
        self.chunks.clear()
        self.offset = self.size = 0


class TlsFilter:
    """TLS between two buffers of bytes: it has no socket and never waits.

    feed() takes what came from the network and gives the plaintext in it; seal() takes
    plaintext; take() gives what has to go out, the handshake's own bytes included.
    Raises TlsFailed.
    """

    def __init__(self, context: Any, hostname: str | None = None):
        import ssl  # 15 ms, paid only by those who use TLS

        self.ssl = ssl
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self.session = context.wrap_bio(
            self.incoming, self.outgoing, server_side=server_side, server_hostname=hostname
        )
        self.ready = False  # the handshake is done
        self.ended = False  # the peer said it will send no more
        self.finished = False  # we did
        if not server_side:
            self.feed(b"")

    def feed(self, data: bytes) -> bytes:
        self.incoming.write(data)
        plain = []
        try:
            if not self.ready:
                self.session.do_handshake()
                self.ready = True
            while chunk := self.session.read(READ_BYTES):
                plain.append(chunk)
            self.ended = True
        except self.ssl.SSLWantReadError:
            pass
        except self.ssl.SSLZeroReturnError:
            self.ended = True
        except self.ssl.SSLError as error:
            raise TlsFailed(str(error.args[-1] if error.args else error)) from error
        return b"".join(plain)

    def seal(self, data: bytes | memoryview) -> None:
        try:
            self.session.write(data)
        except self.ssl.SSLError as error:
            raise TlsFailed(str(error)) from error

    def take(self) -> bytes:
        return self.outgoing.read()

    def finish(self) -> bool:
        """Say that we will send no more (close_notify); whether that was news."""
        if self.finished or not self.ready:
            return False
        self.finished = True
        with contextlib.suppress(self.ssl.SSLError):
            self.session.unwrap()
        return True

    def fingerprint(self) -> str:
        """SHA-256 of the peer's certificate, in hex; "" if it shows none."""
        certificate = self.session.getpeercert(binary_form=True)
        return hashlib.sha256(certificate).hexdigest() if certificate else ""


class Budget:
    """Lines a peer may say: `burst` at once, `rate` a second after that (a token bucket)."""

    __slots__ = ("burst", "rate", "stamp", "tokens")

    def __init__(self, burst: float, rate: float, now: float):
        self.burst, self.rate = burst, rate
        self.tokens, self.stamp = burst, now

    def refill(self, now: float) -> None:
        self.tokens = min(self.burst, self.tokens + (now - self.stamp) * self.rate)
        self.stamp = now

    def wait(self) -> float:
        """Seconds until there is a whole line to spend again."""
        return max(0.0, (1.0 - self.tokens) / self.rate)


# ======================================================================================
# COMMANDS
# ======================================================================================
# A command is a function with a record on it. To add one, write the function and put
# @table("verb", ...) above it; its docstring is "SYNTAX -- what it does", and the help
# text is made from that. What every command needs is checked in one place, run(). A
# handler with a long answer is a generator: wherever it yields, it can be left for later.


class Command(NamedTuple):
    """What the gate has to know of a command before it may run."""

    verb: str
    handler: Callable
    least: int  # parameters it needs
    most: int  # parameters it takes; the rest is left alone, or belongs to the last one
    nameless: bool  # may be used before there is a name
    privileged: bool  # only for operators of the server
    syntax: str
    summary: str


class Commands(dict):
    """The commands of one dialect by verb, and the gate in front of them."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark  # what stands before a verb on the wire

    def __call__(
        self,
        verb: str,
        least: int = 0,
        most: int | None = None,
        nameless: bool = False,
        privileged: bool = False,
    ):
        """Decorator: this handler is the command `verb`."""

        def register(handler: Callable) -> Callable:
            if verb in self:
                raise ValueError(f"two handlers for {verb}")
            syntax, summary = " ".join(handler.__doc__.split()).split(" -- ")
            most_params = least if most is None else most
            self[verb] = Command(
                verb, handler, least, most_params, nameless, privileged, syntax, summary
            )
            return handler

        return register

    def run(self, session: "Session", verb: str, params: Callable[[int], list[str]]) -> None:
        """The one gate. `params(most)` gives the parameters, so many at most."""
        command = self.get(verb)
        if command is None:
            text = f"there is no {self.mark}{verb}; {self.mark}help lists what there is"
            raise Refused("UNKNOWN_COMMAND", text, verb)
        if session.user is None and not command.nameless:
            raise Refused("NOT_NAMED", "a name first, please; then commands")
        given = params(command.most)
        if len(given) < command.least:
            raise Refused("NEED_MORE_PARAMS", f"it goes like this: {command.syntax}", verb)
        if command.privileged and not session.user.is_operator:
            raise Refused("NOT_SERVER_OPERATOR", "only operators of this server can do that")
        session.unfinished = command.handler(session, *given)


# ======================================================================================
# ACCOUNTS
# ======================================================================================
# Secrets, and how somebody proves to know one (SASL, RFC 4422). A mechanism is a generator
# of what the server says; what the client answers is sent into it. What takes long is
# yielded as a function to be called off the loop. It returns the account's name at the
# end, or raises Refused.


def sha256_hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def client_keys(password: str, salt: bytes, rounds: int) -> tuple[bytes, bytes]:
    """ClientKey and ServerKey (RFC 5802 section 3)."""
    prepared = unicodedata.normalize("NFKC", password).encode()
    salted = hashlib.pbkdf2_hmac("sha256", prepared, salt, rounds)
    return sha256_hmac(salted, b"Client Key"), sha256_hmac(salted, b"Server Key")


def scram_keys(password: str, salt: bytes, rounds: int) -> tuple[bytes, bytes]:
    """StoredKey and ServerKey."""
    client_key, server_key = client_keys(password, salt, rounds)
    return hashlib.sha256(client_key).digest(), server_key


class Verifier(NamedTuple):
    """What is kept of a password (RFC 5802 section 3): it can be checked and not read back."""

    salt: bytes
    rounds: int
    stored_key: bytes
    server_key: bytes

    def fits(self, password: str) -> bool:
        """Takes as long as the rounds do: off the loop, please."""
        stored_key, _ = scram_keys(password, self.salt, self.rounds)
        return hmac.compare_digest(self.stored_key, stored_key)


def make_verifier(password: str, rounds: int = ACCOUNT_ROUNDS) -> Verifier:
    """Of a new password, with a salt of its own. Takes as long as the rounds do."""
    salt = secrets.token_bytes(16)
    return Verifier(salt, rounds, *scram_keys(password, salt, rounds))


def nobodys_verifier(name: str, key: bytes = secrets.token_bytes(16)) -> Verifier:
    """Of an account that does not exist: the same salt for the same name, and no password
    fits, so that asking for it tells nothing."""
    return Verifier(sha256_hmac(key, fold(name).encode())[:16], ACCOUNT_ROUNDS, b"", b"")


Lookup = Callable[[str], tuple[str, Verifier]]  # name -> as it is registered, its verifier
Mechanism = Iterator  # of bytes to the client, or functions for off the loop


def wrong_login() -> Refused:
    """A new one each time: an exception keeps the frames that it went through, and they
    keep the password."""
    return Refused("SASL_FAILED", "name or password are wrong")


def split_plain(response: bytes) -> list[str]:
    try:
        parts = response.decode().split("\0")
    except UnicodeDecodeError:
        raise wrong_login() from None
    if len(parts) != 3:
        raise wrong_login()
    return parts


def sasl_plain(find: Lookup) -> Mechanism:
    """RFC 4616."""
    authzid, authcid, password = split_plain((yield b""))
    if not authcid or not password or fold(authzid or authcid) != fold(authcid):
        raise wrong_login()
    name, verifier = find(authcid)
    if not (yield functools.partial(verifier.fits, password)):
        raise wrong_login()
    return name


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def scram_fields(message: str) -> dict[str, str]:
    """n=alice,r=abc -> {"n": "alice", "r": "abc"}"""
    return dict(field.partition("=")[::2] for field in message.split(","))


def sasl_scram(find: Lookup) -> Mechanism:
    """SCRAM-SHA-256 without channel binding (RFC 5802 section 3, RFC 7677)."""
    try:
        first = (yield b"").decode()
        binding, authzid, bare = first.split(",", 2)
        fields = scram_fields(bare)
        authcid = fields["n"].replace("=2C", ",").replace("=3D", "=")
        nonce = fields["r"] + secrets.token_urlsafe(18)
        wanted = authzid.removeprefix("a=")
        if binding not in ("n", "y") or (wanted and fold(wanted) != fold(authcid)):
            raise wrong_login()
        name, verifier = find(authcid)
        salt = base64.b64encode(verifier.salt).decode()
        challenge = f"r={nonce},s={salt},i={verifier.rounds}"
        final = (yield challenge.encode()).decode()
        without_proof, _, proof = final.rpartition(",p=")
        answered = scram_fields(without_proof)
        header = f"{binding},{authzid},".encode()
        if answered["r"] != nonce or base64.b64decode(answered["c"]) != header:
            raise wrong_login()
        signed = f"{bare},{challenge},{without_proof}".encode()
        client_key = xor(base64.b64decode(proof), sha256_hmac(verifier.stored_key, signed))
    except (KeyError, ValueError):  # not a message of SCRAM; UnicodeDecodeError is a ValueError
        raise wrong_login() from None
    if not hmac.compare_digest(hashlib.sha256(client_key).digest(), verifier.stored_key):
        raise wrong_login()
    yield b"v=" + base64.b64encode(sha256_hmac(verifier.server_key, signed))
    return name


def sasl_external(find: Lookup) -> Mechanism:
    """RFC 4422 appendix A: the proof was given before, to TLS; find() knows whose it is."""
    try:
        authzid = (yield b"").decode()
    except UnicodeDecodeError:
        raise wrong_login() from None
    return find(authzid)[0]


MECHANISMS = {"PLAIN": sasl_plain, "SCRAM-SHA-256": sasl_scram, "EXTERNAL": sasl_external}


def login_plain(account: str, password: str) -> Mechanism:
    """sasl_plain() from the client's side: takes what the server says, gives the answers."""
    yield b""
    yield f"{account}\0{account}\0{password}".encode()


def login_scram(account: str, password: str) -> Mechanism:
    """sasl_scram() from the client's side; the server has to know the password, too."""
    yield b""
    nonce, name = secrets.token_urlsafe(18), account.replace("=", "=3D").replace(",", "=2C")
    bare = f"n={name},r={nonce}"
    try:
        challenge = (yield f"n,,{bare}".encode()).decode()
        fields = scram_fields(challenge)
        salt, rounds = base64.b64decode(fields["s"]), int(fields["i"])
        if not fields["r"].startswith(nonce) or rounds not in SCRAM_ROUNDS:
            raise wrong_login()
        client_key, server_key = yield functools.partial(client_keys, password, salt, rounds)
        without_proof = f"c=biws,r={fields['r']}"
        signed = f"{bare},{challenge},{without_proof}".encode()
        signature = sha256_hmac(hashlib.sha256(client_key).digest(), signed)
        proof = base64.b64encode(xor(client_key, signature)).decode()
        final = (yield f"{without_proof},p={proof}".encode()).decode()
        if base64.b64decode(scram_fields(final)["v"]) != sha256_hmac(server_key, signed):
            raise wrong_login()
    except (KeyError, ValueError):
        raise wrong_login() from None
    yield b""


LOGINS = {"SCRAM-SHA-256": login_scram, "PLAIN": login_plain}  # the best one first


class Exchange:
    """One log-in by SASL: base64 lines in and out (IRCv3 sasl-3.1)."""

    def __init__(self, mechanism: Mechanism):
        self.mechanism = mechanism
        self.verifier: Verifier | None = None  # of the account that is claimed
        self.received = ""

    def feed(self, chunk: str) -> bytes | None:
        """What the client said, once it is whole: a chunk of 400 bytes is not the last one."""
        self.received += "" if chunk == "+" else chunk
        if len(self.received) > SASL_BYTES:
            raise wrong_login()
        if len(chunk) == SASL_CHUNK:
            return None
        text, self.received = self.received, ""
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise wrong_login() from None

    @staticmethod
    def chunks(data: bytes) -> list[str]:
        """What the server says, in as many lines as it takes."""
        text = base64.b64encode(data).decode()
        pieces = [text[n : n + SASL_CHUNK] for n in range(0, len(text), SASL_CHUNK)]
        return pieces if len(text) % SASL_CHUNK else [*pieces, "+"]


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host.strip("[]") == "::1"


class Throttle:
    """How often somebody may fail to log in: by (address, account), so that nobody can lock
    the owner out."""

    def __init__(self, most: int = LOGIN_TRIES, seconds: int = LOGIN_WAIT_SECONDS):
        self.most, self.milliseconds = most, seconds * 1000
        self.failures: collections.OrderedDict[tuple[str, str], tuple[int, int]]
        self.failures = collections.OrderedDict()  # how many, and until when they count

    def wait(self, host: str, name: str, now: int) -> int:
        """Seconds until another try; `now` in milliseconds."""
        count, until = self.failures.get((host, fold(name)), (0, 0))
        return (until - now) // 1000 + 1 if count >= self.most and now < until else 0

    def check(self, host: str, name: str, now: int) -> None:
        """Raises Refused."""
        if seconds := self.wait(host, name, now):
            raise Refused("TRY_LATER", f"too many failures; try again in {seconds} s")

    def failed(self, host: str, name: str, now: int) -> None:
        key = (host, fold(name))
        count, until = self.failures.pop(key, (0, 0))
        self.failures[key] = (count if now < until else 0) + 1, now + self.milliseconds
        while len(self.failures) > LOGIN_FAILURES_KEPT:
            self.failures.popitem(last=False)

    def succeeded(self, host: str, name: str) -> None:
        self.failures.pop((host, fold(name)), None)


# ======================================================================================
# DOMAIN
# ======================================================================================
# Who is here and who may do what. The Hub turns what sessions ask for into events; it
# sends nothing and stores nothing. An audience is anything with
#
#     name           what it is called on the wire, "" for people
#     keys           under which the store keeps the event
#     admit(user, text)  raise Refused unless this user may say that to it (where one can)
#     addressee(user)  whom it is for, if for one person, when this user speaks to it
#     stamp(now)     the time of its next event
#     sessions_by_wire()  of all who may have to be told of this turn's events
#     stays(user)    when this one was there in this turn: from event id, to event id
#
# and is hashable, because a turn's events are grouped by audience.


class Site(NamedTuple):
    """What all sessions of one server share."""

    hub: "Hub"
    store: Any
    later: Callable  # later(session, job, then): job() off the loop, then(its result) on it
    read: Callable  # read(session, job, then): the same for a job that reads the store
    # What runs it: motd, tls_port, nameless(), miss(user), note(text), refresh(), rehash(session),
    # restart(session), stop(), and for off the loop mail(address, name, code)
    house: Any
    password: str | None = None
    name: str = SERVER_NAME  # of this server, as a host
    network: str = SERVER_NAME
    operators: dict[str, Verifier] = {}  # by name; nobody adds to it
    registration: frozenset[str] = frozenset()  # "before-connect", "email-required", or "off"
    sts: int = 0  # seconds that clients shall come by TLS only (IRCv3 sts); 0: as they like


def next_time(last: int, now: int) -> int:
    """Milliseconds for the event after one at `last`: unique up to 1 s ahead of the clock."""
    if now > last:
        return now
    return last + 1 if last < now + TIMES_AHEAD else last


def sessions_by_wire(users: "Iterable[User]") -> "dict[Any, set[Session]]":
    """Their sessions, those together who get the same bytes."""
    found: "dict[Any, set[Session]]" = {}
    for user in users:
        for session in user.sessions:
            found.setdefault(session.wire, set()).add(session)
    return found


SOURCE_FIELDS = ("name", "address", "username", "account", "bot")  # what source_of() takes


class User:
    """A person here now. Identity is the object; the name may change."""

    __slots__ = (
        "away",
        "channels",
        "invitations",
        "key",
        "last_time",
        "login",
        "mask_key",
        "metadata",
        "modes",
        "realname",
        "secrets",
        "sessions",
        "since",
        "source",
        "spoke",
        "stay",
        "stored",
    )

    def __init__(self, source: Source, realname: str, stay: str, now: int):
        self.stay = stay
        self.stored = False  # the store knows this stay
        self.secrets: dict[str, None] = {}  # hashes; who knows one has this user's place
        self.login = ""  # Account.identity
        self.realname = realname
        self.modes: set[str] = set()
        self.away = ""  # why; "" is here
        self.sessions: "list[Session]" = []
        self.channels: "dict[Channel, None]" = {}  # in the order of joining
        self.invitations: "dict[Channel, None]" = {}  # not yet used
        self.metadata: dict[str, str] = {}  # what programs want to know of somebody
        self.since = self.spoke = now  # milliseconds since 1970
        self.last_time = 0
        self.called(source)

    @property
    def identity(self) -> str:
        """Of this stay; or of the account, over all of them. No channel's key begins so."""
        return self.login or self.stay

    def called(self, source: Source) -> None:
        """From now on."""
        self.source = source._replace(identity=self.identity)
        self.key = fold(source.name)
        self.mask_key = fold(source.mask)

    @property
    def live(self) -> "list[Session]":
        """The sessions that have not ended in this turn."""
        return [session for session in self.sessions if session.user is self]

    def logged_in(self, account: str, identity: str) -> None:
        self.login = identity
        self.changed(account=account)

    def changed(self, **known: Any) -> None:
        """Somebody else from now on: another name, account, or a bot."""
        was = self.source
        fields = {name: getattr(was, name) for name in SOURCE_FIELDS} | known
        self.called(source_of(**fields))

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def account(self) -> str:
        return self.source.account

    @property
    def is_operator(self) -> bool:
        """Of the server: may do what an operator of any channel may."""
        return "o" in self.modes

    @property
    def may_return(self) -> bool:
        """Whether this one could prove to be the same, without a line for a while."""
        return bool(self.login or self.secrets)

    def state(self) -> dict[str, Any]:
        """What outlives the server, for JSON. Nobody operates the next server by that."""
        return {
            "source": {name: getattr(self.source, name) for name in SOURCE_FIELDS},
            "login": self.login,
            "secrets": [*self.secrets],
            "realname": self.realname,
            "modes": sorted(self.modes - {"o"}),
            "away": self.away,
            "since": self.since,
            "metadata": self.metadata,
            "channels": {c.key: c.members[self].ranks for c in self.channels},
        }

    @classmethod
    def revived(cls, stay: str, state: dict[str, Any], now: int) -> "User":
        """As state() had it, but for the channels."""
        user = cls(source_of(**state["source"]), state["realname"], stay, state["since"])
        user.login, user.away, user.stored = state["login"], state["away"], True
        user.secrets = dict.fromkeys(state["secrets"])
        user.modes, user.metadata, user.spoke = set(state["modes"]), state["metadata"], now
        user.called(user.source)
        return user


class FormerUser(NamedTuple):
    """What WHOWAS knows of somebody."""

    source: Source
    realname: str
    time: int


RANKS = "qaohv"  # of members, the highest first: owner, admin, operator, half-operator, voice
SYMBOLS = dict(zip(RANKS, "~&@%+", strict=True))  # what stands before their names
RANK_NEEDED = dict(zip(RANKS, "qqooh", strict=True))  # to give or take each of them

# What a channel can be besides, and who may come in or speak (Modern IRC, channel modes)
MASK_LISTS = "beI"  # banned; excepted from bans; welcome where one has to be invited
FLAGS = {
    "C": "no CTCP but actions",
    "R": "only who is logged in may join",
    "i": "only who is invited may join",
    "m": "only who has a voice may speak",
    "n": "only members may speak",
    "s": "secret: not listed",
    "t": "only operators set the topic",
}


class ModeChange(NamedTuple):
    """+o alice, or -t."""

    on: bool
    letter: str
    value: str = ""


def format_modes(changes: Iterable[ModeChange]) -> str:
    """+ov-t alice bob"""
    letters, values, sign = "", [], ""
    for change in changes:
        wanted = "+" if change.on else "-"
        letters += change.letter if wanted == sign else wanted + change.letter
        sign = wanted
        if change.value:
            values.append(change.value)
    return " ".join([letters, *values])


def mode_lines(changes: Iterable[ModeChange]) -> Iterator[str]:
    """The same, as many times as it takes for each to fit in an IRC line."""
    some: list[ModeChange] = []
    for change in changes:
        if some and len(format_modes([*some, change]).encode()) > MODES_BYTES:
            yield format_modes(some)
            some = []
        some.append(change)
    if some:
        yield format_modes(some)


class Membership:
    """What a channel knows of one of its members."""

    __slots__ = ("ranks", "since")

    def __init__(self, since: int, ranks: str):
        self.since = since  # id of the event that made it: earlier ones are not shown
        self.ranks = ranks  # letters of RANKS, in that order

    @property
    def level(self) -> int:
        """Of the highest rank; smaller is higher, as in RANKS."""
        return RANKS.index(self.ranks[0]) if self.ranks else len(RANKS)

    @property
    def symbols(self) -> str:
        return "".join(SYMBOLS[rank] for rank in self.ranks)

    def set_rank(self, rank: str, on: bool) -> bool:
        """Give it or take it; whether that changed anything."""
        before = self.ranks
        self.ranks = "".join(r for r in RANKS if (on if r == rank else r in before))
        return self.ranks != before


class Mask:
    """A line of one of a channel's lists: whom it means, who put it there and when.

    nick!user@host with * and ?, or extended: a:ACCOUNT means those logged in to it, and
    m:MASK those who may be here but not speak.
    """

    __slots__ = ("by_account", "mutes", "pattern", "setter", "text", "when")

    def __init__(self, text: str, setter: str = "", when: int = 0):
        self.text, self.setter, self.when = text, setter, when
        self.mutes = text.startswith("m:")
        rest = text.removeprefix("m:")
        self.by_account = rest.startswith("a:")
        self.pattern = mask_pattern(rest.removeprefix("a:"))

    def matches(self, user: User) -> bool:
        if not self.by_account:
            return self.pattern.fullmatch(user.mask_key) is not None
        return bool(user.account) and self.pattern.fullmatch(fold(user.account)) is not None


def full_mask(text: str) -> str:
    """bob -> bob!*@*, b@c -> *!b@c; what is extended keeps its letter."""
    mute = "m:" if text.startswith("m:") else ""
    text = text.removeprefix("m:")
    if text.startswith("a:"):
        return mute + text
    name, bang, rest = text.rpartition("!")
    username, at, host = rest.rpartition("@")
    if not bang and not at:
        return f"{mute}{host or '*'}!*@*"
    if not at:  # nick!user
        username, host = host, "*"
    return f"{mute}{name or '*'}!{username or '*'}@{host or '*'}"


class ChannelPassword(NamedTuple):
    """What IRC calls the key. The store has a salted hash of it: one round, because all its
    members know and tell each other such a word; it protects nobody's account."""

    salt: str
    digest: str
    text: str = "*"  # as the members are told, until the server is restarted

    def fits(self, word: str) -> bool:
        digest = hashlib.sha256(f"{self.salt} {word}".encode()).hexdigest()
        return hmac.compare_digest(digest, self.digest)


def channel_password(word: str) -> ChannelPassword:
    salt = secrets.token_hex(16)
    return ChannelPassword(salt, hashlib.sha256(f"{salt} {word}".encode()).hexdigest(), word)


class Channel:
    """A room. Without members it ceases to exist, unless an account founded it; its history
    stays in the store."""

    __slots__ = (
        "by_wire",
        "created",
        "flags",
        "former",
        "founder",
        "key",
        "keys",
        "last_time",
        "limit",
        "lists",
        "members",
        "metadata",
        "name",
        "password",
        "private",
        "standing",
        "topic",
        "topic_setter",
        "topic_time",
    )
    # What the store keeps as it is
    STATE = (
        *("name", "founder", "standing", "topic", "topic_setter", "topic_time", "created"),
        *("limit", "private", "metadata"),
    )

    def __init__(self, name: str, last_time: int, now: int):
        self.name, self.key = name, fold(name)
        self.keys = (self.key,)
        self.members: dict[User, Membership] = {}
        self.former: dict[User, list[tuple[int, int]]] = {}  # left in this turn: from id, to id
        self.by_wire: "dict[Any, set[Session]] | None" = None  # of its listeners; None: to be made
        self.topic = ""
        self.topic_setter, self.topic_time = "", 0
        self.created = now
        # Nobody from outside; and the lobby has no operators to set a topic
        self.flags = set("n") if self.key == LOBBY else set("nt")
        self.limit: int | None = None
        self.password: ChannelPassword | None = None
        self.founder = ""  # Account.identity; "" if nobody with an account founded it
        self.standing: dict[str, str] = {}  # ranks of accounts, by identity, if it has a founder
        self.private = False  # it was +i, +k or +s at some time
        self.metadata: dict[str, str] = {}
        self.lists: dict[str, dict[str, Mask]] = {letter: {} for letter in MASK_LISTS}
        self.last_time = last_time

    # What outlives the server

    def state(self) -> dict[str, Any]:
        """For JSON."""
        lists = {
            letter: [(m.text, m.setter, m.when) for m in masks.values()]
            for letter, masks in self.lists.items()
        }
        password = self.password and self.password._replace(text="*")
        known = {name: getattr(self, name) for name in self.STATE}
        return {**known, "flags": sorted(self.flags), "password": password, "lists": lists}

    @classmethod
    def revived(cls, state: dict[str, Any], last_time: int) -> "Channel":
        """As state() had it, without its members."""
        channel = cls(state["name"], last_time, 0)
        for name in cls.STATE:
            setattr(channel, name, state[name])
        channel.flags = set(state["flags"]) & set(FLAGS)
        channel.password = state["password"] and ChannelPassword(*state["password"])
        for letter, masks in state["lists"].items():
            channel.lists[letter] = {fold(text): Mask(text, *rest) for text, *rest in masks}
        return channel

    def standing_of(self, user: User) -> str:
        """The ranks that somebody has here by his account."""
        known = self.standing.get(user.login, "") if user.login else ""
        return "q" + (known or "o") if self.founded_by(user) else known

    def note_standing(self, user: User) -> None:
        """Ranks of accounts last, where there is somebody whose channel it is."""
        if self.founder and user.login:
            self.standing.pop(user.login, None)
            if (ranks := self.members[user].ranks) and len(self.standing) < STANDING_KEPT:
                self.standing[user.login] = ranks

    def founded_by(self, user: User) -> bool:
        return bool(user.login) and user.login == self.founder

    # Who may what

    def member(self, user: User) -> Membership:
        member = self.members.get(user)
        if member is None:
            text = f"you are not in {self.name}; /join {self.name} first"
            raise Refused("NOT_IN_CHANNEL", text, self.name)
        return member

    def require_inside(self, user: User) -> None:
        """Raise Refused unless this one is here, or operates the server."""
        if not user.is_operator:
            self.member(user)

    def require(self, user: User, rank: str = "h") -> None:
        """Raise Refused unless this one has that rank here, or operates the server."""
        if not user.is_operator and self.member(user).level > RANKS.index(rank):
            text = f"only operators of {self.name} can do that"
            raise Refused("NOT_OPERATOR", text, self.name)

    def admit(self, user: User, text: str) -> None:
        if "C" in self.flags and "\n\x01" in f"\n{text}":
            text = f"{self.name} takes no CTCP but actions (+C)"
            raise Refused("CANNOT_SEND", text, self.name)
        member = self.members.get(user)
        if member is not None and member.ranks:
            return
        if member is None and "n" in self.flags:
            text = f"you are not in {self.name}; /join {self.name} first"
        elif "m" in self.flags:
            text = f"{self.name} is moderated; only who has a voice may speak"
        elif self.lists["b"] and self.banned(user, speaking=True):
            text = f"you may not speak in {self.name}"
        else:
            return
        raise Refused("CANNOT_SEND", text, self.name)

    def banned(self, user: User, speaking: bool = False) -> bool:
        """From coming here; or also from speaking, which mutes take away alone."""

        def listed(letter: str) -> bool:
            masks = self.lists[letter].values()
            return any(m.matches(user) for m in masks if speaking or not m.mutes)

        return listed("b") and not listed("e")

    def check_entry(self, user: User, password: str) -> None:
        """Raise Refused unless this one may join."""
        if self in user.invitations or self.founded_by(user):
            return
        wrong = self.password is not None and not self.password.fits(password)
        obstacles = (
            (self.banned(user), "BANNED", "you are banned from it"),
            ("R" in self.flags and not user.account, "NEED_ACCOUNT", "one has to be logged in"),
            (wrong, "BAD_PASSWORD", "it has a password (+k)"),
            (
                "i" in self.flags and not any(m.matches(user) for m in self.lists["I"].values()),
                "INVITE_ONLY",
                "one has to be invited (+i)",
            ),
            (
                self.limit is not None and len(self.members) >= self.limit,
                "CHANNEL_FULL",
                f"it is full (+l {self.limit})",
            ),
        )
        for stands, code, text in obstacles:
            if stands:
                raise Refused(code, f"cannot join {self.name}: {text}", self.name)

    def visible_to(self, user: User) -> bool:
        """In lists; a channel that waits for its people is not one to go to."""
        return bool(self.members) and "s" not in self.flags or user in self.members

    def names(self, viewer: User, multi: bool = False, masks: bool = False) -> list[str]:
        """The members that the viewer may see, each behind the symbol of the highest rank,
        or those of all ranks."""
        most, inside = None if multi else 1, viewer in self.members
        return [
            member.symbols[:most] + (user.source.mask if masks else user.name)
            for user, member in self.members.items()
            if inside or "i" not in user.modes
        ]

    def modes_text(self, user: User) -> str:
        """+klnt WORD 12; the password is for members only."""
        letters = set(self.flags)
        values = []
        if self.password:
            letters.add("k")
            told = user in self.members or user.is_operator
            values.append(self.password.text if told else "*")
        if self.limit is not None:
            letters.add("l")
            values.append(str(self.limit))
        return " ".join(["+" + "".join(sorted(letters)), *values])

    # Changing its modes: each says what really changed, or None

    def _bad_value(self, change: ModeChange, text: str) -> Refused:
        return Refused("BAD_MODE_VALUE", text, self.name, change.letter, change.value)

    def set_flag(self, change: ModeChange) -> ModeChange | None:
        if change.on == (change.letter in self.flags):
            return None
        self.flags ^= {change.letter}
        self.private |= change.on and change.letter in "is"
        return ModeChange(change.on, change.letter)

    def set_limit(self, change: ModeChange) -> ModeChange | None:
        limit = whole_number(change.value) if change.on else None
        if change.on and not limit:
            raise self._bad_value(change, "a limit is a number from 1 on")
        changed, self.limit = limit != self.limit, limit
        return ModeChange(change.on, "l", str(limit or "")) if changed else None

    def set_password(self, change: ModeChange) -> ModeChange | None:
        word = change.value
        if not change.on:
            had, self.password = self.password, None
            return ModeChange(False, "k", "*") if had else None
        if not is_word(word, CHANNEL_PASSWORD_BYTES) or "," in word:
            text = f"a channel's password is one word of at most {CHANNEL_PASSWORD_BYTES} bytes"
            raise self._bad_value(change._replace(value="*"), text)
        if self.password and self.password.fits(word):
            return None
        self.password, self.private = channel_password(word), True
        return change

    def set_mask(self, change: ModeChange, setter: str, now: int) -> ModeChange | None:
        if not is_word(change.value, MASK_BYTES):
            raise self._bad_value(change, f"a mask is one word of at most {MASK_BYTES} bytes")
        masks, mask = self.lists[change.letter], full_mask(change.value)
        key, change = fold(mask), change._replace(value=mask)
        if not change.on:
            return change if masks.pop(key, None) else None
        if key in masks:
            return None
        if len(masks) >= MASKS_A_LIST:
            text = f"the list is full: {MASKS_A_LIST} masks at most"
            raise Refused("LIST_FULL", text, self.name, mask)
        masks[key] = Mask(mask, setter, now)
        return change

    # As an audience

    def addressee(self, user: User) -> str:
        return ""

    def stamp(self, now: int) -> int:
        self.last_time = next_time(self.last_time, now)
        return self.last_time

    def listeners(self) -> Iterable[User]:
        return dict.fromkeys([*self.members, *self.former])

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        """Kept from turn to turn: nobody comes or goes without Turn.move()."""
        if self.by_wire is None:
            self.by_wire = sessions_by_wire(self.listeners())
        return self.by_wire

    def stays(self, user: User) -> list[tuple[int, float]]:
        stays = self.former.get(user, [])
        member = self.members.get(user)
        return [*stays, (member.since, math.inf)] if member else stays


class Ranked(NamedTuple):
    """Those members of a channel who had a rank, or a higher one, at that moment. Not kept:
    history does not know who may read it."""

    channel: Channel
    name: str  # of the channel, behind the symbol of the rank
    users: frozenset[User]
    keys = ()

    def admit(self, user: User, text: str) -> None:
        self.channel.admit(user, text)

    def addressee(self, user: User) -> str:
        return ""

    def stamp(self, now: int) -> int:
        return self.channel.stamp(now)

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return sessions_by_wire(self.users)

    def stays(self, user: User) -> list[tuple[int, float]]:
        return [(0, math.inf)]


def ranked(channel: Channel, symbol: str, speaker: User) -> Ranked:
    """Of those whose rank is shown by that symbol, or by one that is higher; and the one
    who speaks, who may have asked for an echo."""
    level = list(SYMBOLS.values()).index(symbol)
    users = {user for user, member in channel.members.items() if member.level <= level}
    return Ranked(channel, symbol + channel.name, frozenset(users | {speaker}))


class Overseen(NamedTuple):
    """A channel, and somebody who acts on it from outside: an operator of the server, or
    who speaks to a channel that lets him."""

    channel: Channel
    outsider: User

    def addressee(self, user: User) -> str:
        return ""

    @property
    def name(self) -> str:
        return self.channel.name

    @property
    def keys(self) -> tuple[str]:
        return self.channel.keys

    def stamp(self, now: int) -> int:
        return self.channel.stamp(now)

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return sessions_by_wire(dict.fromkeys([*self.channel.listeners(), self.outsider]))

    def stays(self, user: User) -> list[tuple[int, float]]:
        return [(0, math.inf)] if user is self.outsider else self.channel.stays(user)


class Renamed(NamedTuple):
    """A channel, for what happened in it in this turn before it had another name."""

    channel: Channel
    name: str

    @property
    def keys(self) -> tuple[str]:
        return self.channel.keys

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return self.channel.sessions_by_wire()

    def stays(self, user: User) -> list[tuple[int, float]]:
        return self.channel.stays(user)


def scene(channel: Channel, user: User) -> Channel | Overseen:
    """The audience of what somebody does to a channel: he sees it himself."""
    return channel if user in channel.members else Overseen(channel, user)


class Neighbours(NamedTuple):
    """Everyone who shares one of these channels with somebody, and some who watch for him
    from elsewhere; each is told once."""

    channels: tuple[Channel, ...]
    watchers: "frozenset[User]" = frozenset()
    name = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(channel.key for channel in self.channels)

    def stamp(self, now: int) -> int:
        newest = next_time(max((c.last_time for c in self.channels), default=0), now)
        for channel in self.channels:
            channel.last_time = newest
        return newest

    def listeners(self) -> Iterable[User]:
        near = (user for channel in self.channels for user in channel.listeners())
        return dict.fromkeys(itertools.chain(near, self.watchers))

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return sessions_by_wire(self.listeners())

    def stays(self, user: User) -> list[tuple[int, float]]:
        if user in self.watchers:
            return [(0, math.inf)]
        return list(itertools.chain(*(channel.stays(user) for channel in self.channels)))


class People(NamedTuple):
    """Some people, each by themselves: nobody keeps what they are told."""

    users: "frozenset[User]"
    name = ""
    keys = ()

    def stamp(self, now: int) -> int:
        return now

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return sessions_by_wire(self.users)

    def stays(self, user: User) -> list[tuple[int, float]]:
        return [(0, math.inf)]


class Conversation(NamedTuple):
    """Two people in private; made by conversation(), so that both directions are one."""

    one: User
    other: User
    name = ""

    @property
    def keys(self) -> tuple[str]:
        return (" ".join(sorted((self.one.identity, self.other.identity))),)

    @property
    def parties(self) -> tuple[str, str, str, str]:
        one, other = self.one, self.other
        return one.identity, one.key, other.identity, other.key

    def partner(self, user: User) -> User:
        return self.one if user is self.other else self.other

    def admit(self, user: User, text: str) -> None:
        """Whoever can name the other may speak to them."""
        partner = self.partner(user)
        if "R" in partner.modes and not user.account:
            text = f"{partner.name} only hears who is logged in"
            raise Refused("NEED_ACCOUNT", text, partner.name)

    def addressee(self, user: User) -> str:
        return self.partner(user).name

    def stamp(self, now: int) -> int:
        newest = next_time(max(self.one.last_time, self.other.last_time), now)
        self.one.last_time = self.other.last_time = newest
        return newest

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        return sessions_by_wire({self.one, self.other})

    def stays(self, user: User) -> list[tuple[int, float]]:
        return [(0, math.inf)]


def conversation(one: User, other: User) -> Conversation:
    return Conversation(*sorted((one, other), key=lambda user: user.stay))


def neighbours(user: User) -> Channel | Neighbours:
    """The audience of what somebody does to themselves. One channel stands for itself, so
    that a hundred people leaving it are one audience and not a hundred."""
    channels = tuple(user.channels)
    return channels[0] if len(channels) == 1 else Neighbours(channels)


class Session:
    """One connection's side of the talk. A dialect is a subclass with a wire of its own.

    `conn` offers address, secure, close(), named(), charge(items) for what is looked
    through, and gone: nothing can be sent there; the fingerprint of the certificate that it
    shows, or "", and certifiable: whether one would be looked at.
    """

    __slots__ = (
        "conn",
        "deferred",
        "meant",
        "parting",
        "replied",
        "replies",
        "site",
        "tries",
        "unfinished",
        "user",
    )
    # wire.encode(audience, events) -> a line each; wire.own(event, line) -> what its origin gets
    wire: Any
    client = ""  # the hash of a secret that only this client knows ...
    secret = ""  # ... and the same if it has a place by that
    unended = False  # whether a last line without its end counts; else it may be half of one
    probed = False  # whether its peer is asked now and then if it is there: probe()
    follows = False  # whether it hears more of those it watches than that they come and go

    def __init__(self, site: Site, conn: Any):
        self.site, self.conn = site, conn
        self.user: User | None = None
        self.parting = ""  # why it ends, for those who are still here
        self.meant = False  # somebody wants it to end; else the line broke
        self.tries = 0  # at passwords, in vain
        self.unfinished: Iterator | None = None  # a long answer that has been begun
        self.deferred = False  # an answer waits for a job
        self.replies: list[tuple[int, bytes]] = []  # this turn's: after event id, bytes
        self.replied = 0  # bytes of them

    @property
    def host(self) -> str:
        """Where it comes from, for limits by address."""
        return host_of(self.conn.address)

    @property
    def author(self) -> str:
        """Whose ids for messages these are: of the client that makes them, if it says which
        it is, whoever is logged in; else of a person."""
        return self.client or self.user.identity

    def receive(self, line: bytes) -> None:
        """One complete line, or TOO_LONG, from the peer."""
        raise NotImplementedError

    def not_kept(self, events: list[Event], reason: str) -> None:
        """Say that these messages of this session's are delivered but were not stored."""
        raise NotImplementedError

    def notice(self, text: str) -> None:
        """A word of the server's own."""
        raise NotImplementedError

    def refuse(self, refusal: Refused) -> None:
        """Say what cannot be done, and why."""
        raise NotImplementedError

    def go_on(self) -> None:
        """With the long answer, by one piece; only then comes the next line."""
        try:
            next(self.unfinished)
        except StopIteration:
            self.unfinished = None
        except Refused as refusal:
            self.unfinished = None
            self.refuse(refusal)
        if self.unfinished is None:
            self.answered()

    def later(self, job: Callable, then: Callable) -> None:
        """Run job() off the loop, then then(its result); only then comes the next line."""
        self.deferred = True
        self.site.later(self, job, then)

    def read(self, job: Callable, then: Callable) -> None:
        """The same for a job that reads the store."""
        self.deferred = True
        self.site.read(self, job, then)

    def take_result(self, then: Callable, result: Any) -> None:
        """What a job gave, or the ChatError that it raised."""
        self.deferred = False
        try:
            if isinstance(result, Refused):
                raise result
            if isinstance(result, Exception):
                raise Refused("UNUSABLE", str(result))
            then(result)
        except Refused as refusal:
            self.refuse(refusal)
        if not self.deferred:
            self.answered()

    def answered(self) -> None:
        """All has been said to the line that was received last."""

    def own(self, event: Event, line: bytes) -> bytes:
        """What this session, which did it, hears of it: `line` is what the others hear."""
        return self.wire.own(event, line)

    def turn_over(self) -> None:
        """What was said in this turn has been sent."""
        self.replies, self.replied = [], 0

    def farewell(self, text: str) -> None:
        """The same, and the last one: the connection is about to be closed."""
        self.notice(text)

    def end(self, reason: str, meant: bool = True) -> None:
        """Close the connection, and say why here and to everybody who knew this one."""
        self.parting, self.meant = reason, meant
        self.farewell(f"Closing link: {reason}")
        self.conn.close()

    def killed(self, by: Source, reason: str) -> None:
        """By an operator of the server."""
        self.end(f"Killed ({by.name} ({reason}))")

    def replaced(self) -> None:
        """By another connection of the same client."""
        self.end("Another connection of yours took this place")

    def read_on(self, name: str) -> None:
        """Another device of the same user has read this on."""

    def place_entered(self, channel: Channel) -> None:
        """Another device of the same user has come into a channel, and so has this one."""

    def place_renamed(self, old: str, channel: Channel, reason: str) -> None:
        """A channel that this session's user is in has another name."""

    def learns(self, name: str, key: str, value: str) -> None:
        """Something about a user or channel has changed (metadata)."""

    def spotted(self, source: Source, online: bool) -> None:
        """Somebody whom this session watches for has come or gone."""

    def ended(self) -> None:
        """The peer is gone, or said that it will send no more. May be called twice."""
        if self.user:
            self.site.hub.leave(self, self.meant)

    def abandoned(self) -> None:
        """The server goes down: nobody is told that everybody left."""
        self.user = None

    def send(self, data: bytes) -> None:
        """For this session only, in its place among the events of the turn."""
        hub = self.site.hub
        self.replies.append((hub.last_id, data))
        self.replied += len(data)
        hub.turn.apart.add(self)


class Group:
    """What one audience was told in a turn: encoded once a wire, joined once."""

    __slots__ = ("audience", "by_wire", "events", "lines_by_wire", "origins")

    def __init__(self, audience: Any):
        self.audience = audience
        self.by_wire = audience.sessions_by_wire()
        self.events: list[Event] = []
        self.origins: dict[Session | None, list[int]] = {}  # who did which, as indices
        self.lines_by_wire: dict[Any, list[bytes]] = {}

    def add(self, event: Event) -> None:
        self.origins.setdefault(event.origin, []).append(len(self.events))
        self.events.append(event)

    def lines_for(self, session: Session) -> list[bytes]:
        """The same for one that did some of it: where a hundred speak, each of them gets a
        copy with a few lines replaced, and not a hundred times as many looked at."""
        lines = self.lines(session.wire)
        if mine := self.origins.get(session):
            lines = lines.copy()
            for n in mine:
                lines[n] = session.own(self.events[n], lines[n])
        return lines

    def lines(self, wire: Any) -> list[bytes]:
        lines = self.lines_by_wire.get(wire)
        if lines is None:
            lines = self.lines_by_wire[wire] = wire.encode(self.audience, self.events)
        return lines

    def joined(self, wire: Any) -> bytes:
        return b"".join(self.lines(wire))

    def heard_by(self, user: User) -> list[int]:
        """Which of the events this one was there for, as indices; those who share several
        channels with somebody may have been there twice over."""
        ids = [event.id for event in self.events]
        stays = self.audience.stays(user)
        spans = (range(bisect.bisect_left(ids, a), bisect.bisect_right(ids, b)) for a, b in stays)
        return sorted(set(itertools.chain(*spans)))


FORGET_CHANNEL = "DELETE FROM channels WHERE key = ?"


class Turn:
    """The numbered log of one turn, and who is told what of it.

    Most sessions are addressed through one audience and get its joined bytes, the same
    object for all. Those who stand apart (they spoke, came, went, or were answered) and
    those addressed in several ways get the same lines one by one, in the log's order.
    """

    __slots__ = (
        "apart",
        "changed",
        "events",
        "kept",
        "left",
        "moved",
        "receipts",
        "redacted",
        "renamed",
        "sealed",
        "since",
        "states",
        "writes",
    )

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.since: dict[Session, int] = {}  # connected in this turn, behind event id
        self.receipts: dict[tuple[str, str], Event] = {}  # by Session.author, and own id
        self.renamed: list[tuple[str, str]] = []  # keys of channels, old and new
        self.redacted: list[tuple[str, int]] = []  # ids of what was taken back, and under which key
        self.sealed: list[str] = []  # keys whose history ends with this turn
        self.kept: set[User | Channel] = set()  # what outlives the server, and has changed ...
        self.states: dict[tuple[str, str], tuple[str, tuple]] = {}  # ... in words for the store
        self.writes: list[tuple[str, tuple]] = []  # statements for the store, and their values
        self.apart: set[Session] = set()
        self.moved: set[User] = set()  # came to or left an audience in this turn
        self.changed: set[Channel] = set()  # where they did
        self.left: dict[Session, User] = {}  # ended; still hear what came before that

    def move(self, user: User, channel: Channel) -> None:
        self.moved.add(user)
        self.changed.add(channel)
        self.kept |= {user, channel}
        channel.by_wire = None
        self.apart.update(user.sessions)

    @property
    def to_store(self) -> bool:
        return bool(self.events) or self.more_than_events

    @property
    def more_than_events(self) -> bool:
        """There is something else for the store to do than to add events."""
        return bool(
            self.writes
            or self.states
            or self.receipts
            or self.renamed
            or self.redacted
            or self.sealed
        )

    @property
    def lone_key(self) -> str:
        """The key of one event that is all there is to store; "" if there is more, or less."""
        if len(self.events) != 1 or self.more_than_events:
            return ""
        event = self.events[0]
        keys = () if event.kind in PASSING else event.audience.keys
        return keys[0] if len(keys) == 1 else ""

    def deliveries(self) -> Iterator[tuple[bytes, Iterable[Session]]]:
        """The write beat: bytes, and the sessions that get them; no session comes twice."""
        groups: dict[Any, Group] = {}
        for event in self.events:
            group = groups.get(event.audience)
            if group is None:
                group = groups[event.audience] = Group(event.audience)
            group.add(event)
        heard = {session: [] for session in self.apart | self._heard_twice(groups.values())}
        for group in groups.values():
            for wire, sessions in group.by_wire.items():
                if data := group.joined(wire):
                    yield data, sessions - heard.keys()
                for session in heard.keys() & sessions:
                    heard[session].append(group)
        for session, told in heard.items():
            if not session.conn.gone and (data := self.selection(session, told)):
                yield data, (session,)

    def _heard_twice(self, groups: Collection[Group]) -> set[Session]:
        """Those who are in more than one of these audiences."""
        if len(groups) < 2:
            return set()
        lists = itertools.chain(*(group.by_wire.values() for group in groups))
        times = collections.Counter(itertools.chain(*lists))
        return {session for session, count in times.items() if count > 1}

    def selection(self, session: Session, groups: list[Group]) -> bytes:
        """One session's own lines of the log, in the log's order."""
        user = session.user or self.left.get(session)
        alone = len(groups) == 1 and not session.replies
        if alone and user not in self.moved and session not in self.since:
            return b"".join(groups[0].lines_for(session))
        numbered: list[tuple[int, bytes]] = []
        for group in groups:
            pairs = list(zip(group.events, group.lines_for(session), strict=True))
            if user in self.moved:
                pairs = [pairs[n] for n in group.heard_by(user)]
            numbered += [(event.id, line) for event, line in pairs]
        if since := self.since.get(session):
            numbered = [pair for pair in numbered if pair[0] > since]
        numbered += session.replies  # behind the event they follow: sort() is stable
        numbered.sort(key=lambda pair: pair[0])
        return b"".join([data for _, data in numbered])

    def not_kept(self, reason: str) -> None:
        """The store could not take this turn's events: their speakers are told so."""
        lost: dict[Session, list[Event]] = {}
        for event in self.events:
            if event.origin and event.kind in SPOKEN:
                lost.setdefault(event.origin, []).append(event)
        for session, events in lost.items():
            session.not_kept(events, reason)

    def close(self) -> None:
        for session in self.apart:
            session.turn_over()
        for channel in self.changed:
            channel.former.clear()
            channel.by_wire = None
        for session, user in self.left.items():
            user.sessions.remove(session)
            for channel in user.channels:  # where other sessions of the same user still are
                channel.by_wire = None


def change_rank(hub: "Hub", user: User, channel: Channel, change: ModeChange) -> ModeChange | None:
    """Everybody may step down; else it takes a rank to make one."""
    if not change.value:
        raise Refused("NEED_MORE_PARAMS", f"to whom? MODE {channel.name} +o <nickname>", "MODE")
    steps_down = not change.on and fold(change.value) == user.key
    channel.require(user, "v" if steps_down else RANK_NEEDED[change.letter])
    other = hub.find_user(change.value)
    member = channel.members.get(other)
    if member is None:
        text = f"{other.name} is not in {channel.name}"
        raise Refused("USER_NOT_IN_CHANNEL", text, other.name, channel.name)
    if not member.set_rank(change.letter, change.on):
        return None
    channel.note_standing(other)
    hub.turn.kept.add(other)
    return change._replace(value=other.name)


def change_mode(hub: "Hub", user: User, channel: Channel, change: ModeChange) -> ModeChange | None:
    """Do one of them; what really changed, if anything did. Raises Refused."""
    letter = change.letter
    if letter in RANKS:
        return change_rank(hub, user, channel, change)
    channel.require(user)
    if letter in FLAGS:
        return channel.set_flag(change)
    if letter in MASK_LISTS:
        return channel.set_mask(change, user.source.mask, hub.now)
    if letter == "k":
        return channel.set_password(change)
    if letter == "l":
        return channel.set_limit(change)
    text = f"there is no channel mode {letter}; the modes are {MASK_LISTS}, k, l, {RANKS}, "
    raise Refused("UNKNOWN_MODE", text + "".join(FLAGS), letter)


class Watchers(dict[str, set[Session]]):
    """Who wants to know when somebody comes and goes, by the key of the name."""

    def add(self, session: Session, name: str) -> None:
        self.setdefault(fold(name), set()).add(session)

    def remove(self, session: Session, name: str) -> None:
        watching = self.get(fold(name), set())
        watching.discard(session)
        if not watching:
            self.pop(fold(name), None)

    def tell(self, source: Source, online: bool) -> None:
        for session in self.get(fold(source.name), ()):
            session.spotted(source, online)


class Account(NamedTuple):
    """A name that lasts, and what proves that one may have it."""

    name: str
    verifier: Verifier
    email: str = ""
    number: int = 0  # that no other account ever has, not even the next one of this name

    @property
    def identity(self) -> str:
        """Whose private talks these are. Names have no slash."""
        return f"={self.name}/{self.number:x}"


class Certificates(dict[str, str]):
    """Those that prove to be the owner of an account: its key, by fingerprint."""

    def of(self, account: str) -> list[str]:
        return [fingerprint for fingerprint, key in self.items() if key == fold(account)]

    def add(self, fingerprint: str, account: str, turn: Turn) -> None:
        """Raises Refused."""
        if not fingerprint:
            raise Refused("NO_CERTIFICATE", "this connection shows no certificate")
        if self.get(fingerprint, fold(account)) != fold(account):
            raise Refused("CERTIFICATE_TAKEN", "this certificate is another account's")
        if fingerprint not in self and len(self.of(account)) >= CERTIFICATES:
            raise Refused("LIMIT_REACHED", f"{CERTIFICATES} certificates at most; remove one")
        self[fingerprint] = fold(account)
        turn.writes.append(
            ("REPLACE INTO certificates VALUES (?, ?)", (fingerprint, fold(account)))
        )

    def remove(self, fingerprint: str, account: str, turn: Turn) -> None:
        """Raises Refused."""
        if self.get(fingerprint) != fold(account):
            raise Refused("NO_CERTIFICATE", "that is no certificate of yours; see CERT LIST")
        del self[fingerprint]
        turn.writes.append(("DELETE FROM certificates WHERE fingerprint = ?", (fingerprint,)))


class Accounts(dict[str, Account]):
    """Those there are, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.certificates = Certificates()
        self.throttle = Throttle()
        self.made = Throttle(ACCOUNTS_MADE, ACCOUNTS_MADE_SECONDS)
        self.pending: collections.OrderedDict[str, tuple[Account, str]]
        self.pending = collections.OrderedDict()  # by key, with the code that was sent by mail

    def read(self, known: Iterable[Account]) -> None:
        """All of them, anew."""
        self.clear()
        self.update((fold(account.name), account) for account in known)

    def await_code(self, account: Account) -> str:
        """Until the code comes back that is to be sent to its address."""
        code = f"{secrets.randbelow(10**8):08}"
        self.pending[fold(account.name)] = account, code
        while len(self.pending) > PENDING_ACCOUNTS:
            self.pending.popitem(last=False)
        return code

    def verified(self, name: str, code: str, host: str, now: int) -> Account:
        """The account that this code was sent for. Raises Refused."""
        self.throttle.check(host, f"code {name}", now)
        self.throttle.failed(host, f"code {name}", now)
        account, expected = self.pending.get(fold(name), (None, ""))
        fits = hmac.compare_digest(code.encode(), expected.encode())
        if account is None or not fits or fold(name) in self:
            raise Refused("INVALID_CODE", "that is not the code that was sent", name)
        del self.pending[fold(name)]
        return account

    def is_foreign(self, name: str, account: str) -> bool:
        """Whether a name belongs to another account, or to nobody ever."""
        key = fold(name)
        return key in SERVICES or (key in self and key != fold(account))

    def find(self, name: str) -> tuple[str, Verifier]:
        """As it is registered, and its verifier; or one that nothing fits."""
        account = self.get(fold(name))
        return (account.name, account.verifier) if account else (name, nobodys_verifier(name))

    def save(self, account: Account, turn: Turn) -> None:
        """A new one, or one with a new secret. Who is told so is told after the commit."""
        key = fold(account.name)
        self[key] = account
        values = (key, account.name, *account.verifier, account.email, account.number)
        turn.writes.append((f"REPLACE INTO accounts VALUES ({', '.join('?' * 8)})", values))

    def identity(self, name: str) -> str:
        """Of an account; "" if there is none."""
        account = self.get(fold(name))
        return account.identity if account else ""

    def drop(self, name: str, turn: Turn) -> None:
        for fingerprint in self.certificates.of(name):
            self.certificates.remove(fingerprint, name, turn)
        del self[fold(name)]
        turn.writes.append(("DELETE FROM accounts WHERE key = ?", (fold(name),)))


class Markers(dict[str, dict[str, int]]):
    """How far people have read: by identity, by the key of a channel or name."""

    def move(self, user: User, target: str, when: int, turn: Turn) -> bool:
        """Forward, never back; whether it moved."""
        marks = self.setdefault(user.identity, {})
        if when <= marks.get(target, 0) or (target not in marks and len(marks) >= MARKERS):
            return False
        marks[target] = when
        if user.account:
            replace = "REPLACE INTO markers VALUES (?, ?, ?)"
            turn.writes.append((replace, (user.identity, target, when)))
        return True

    def of(self, user: User, target: str) -> int:
        return self.get(user.identity, {}).get(target, 0)

    def rename(self, old: str, new: str, turn: Turn) -> None:
        """A channel has another key. What was read under that one was another channel."""
        if old == new:
            return
        for owner, marks in self.items():
            if marks.keys().isdisjoint((old, new)):
                continue
            when, _ = marks.pop(old, None), marks.pop(new, None)
            marks.update({} if when is None else {new: when})
            if owner[0] == "=":  # of an account: they are kept
                update = "UPDATE OR REPLACE markers SET target = ? WHERE owner = ? AND target = ?"
                turn.writes.append(
                    ("DELETE FROM markers WHERE owner = ? AND target = ?", (owner, new))
                )
                turn.writes.append((update, (new, owner, old)))


def restore_standing(hub: "Hub", session: Session) -> None:
    """Who logs in where he is already gets the ranks that his account has there."""
    user = session.user
    server = Source(session.site.name, "", mask=session.site.name)
    for channel in user.channels:
        member, standing = channel.members[user], channel.standing_of(user)
        given = [ModeChange(True, r, user.name) for r in standing if member.set_rank(r, True)]
        if given:
            hub.turn.kept.add(user)
            hub.emit(MODE, server, channel, format_modes(given))


class Hub:
    """Who is here. Everything others can see passes through one door: emit()."""

    def __init__(self, last_id: int = 0, last_time: int = 0):
        self.accounts = Accounts()
        self.markers = Markers()
        self.users: dict[str, User] = {}  # by key
        self.channels: dict[str, Channel] = {}  # by key
        self.places: dict[str, User] = {}  # by the hash of a secret that somebody has
        self.founded: collections.Counter[str] = collections.Counter()  # by Account.identity
        self.former: collections.deque[FormerUser] = collections.deque(maxlen=FORMER_USERS)
        self.watchers = Watchers()
        self.most_users = 0  # at once, so far
        self.last_id, self.last_time = last_id, last_time  # where the last server stopped
        self.now = last_time
        self.started = 0  # milliseconds since 1970; with the first turn
        self.turn = Turn()

    def begin(self, now: float) -> None:
        """A turn begins at wall time `now`, in seconds. Ids keep pace with the clock, so
        that they grow even over a restart of a server that keeps nothing."""
        self.now = int(now * 1000)
        self.started = self.started or self.now
        self.last_id = max(self.last_id, self.now << ID_CLOCK_BITS)

    def new_reference(self) -> str:
        """A name that nothing else in this server has."""
        self.last_id += 1
        return f"{self.last_id:x}"

    def end(self, lost: bool = False) -> None:
        """The turn has been written. What the store could not take of it and cannot do
        without (accounts, names, seals: not what was said) is for the next turn to try."""
        old, self.turn = self.turn, Turn()
        old.close()
        if lost:
            self.turn.writes, self.turn.renamed = old.writes, old.renamed
            self.turn.states = old.states
            self.turn.sealed, self.turn.redacted = old.sealed, old.redacted

    def emit(
        self,
        kind: str,
        source: Source,
        audience: Any,
        text: str = "",
        about: str = "",
        origin: Session | None = None,
        tags: str = "",
    ) -> None:
        """Log one event: `source` did something that `audience` can see."""
        self.last_id += 1
        time_ms = audience.stamp(self.now)
        self.turn.events.append(
            Event(self.last_id, time_ms, kind, source, audience, text, about, origin, tags)
        )
        if origin is not None:
            self.turn.apart.add(origin)

    # Coming and going

    def enter(
        self,
        session: Session,
        name: str,
        username: str = "line",
        realname: str = "",
        account: str = "",
    ) -> User:
        """A session becomes a user, under a name that free_name() or check_name() allowed."""
        self.last_id += 1
        source = source_of(name, session.conn.address, username)
        # Who comes back with his secret after all is still who he was to his private talks
        stay = f"~{session.secret[:SECRET_DIGITS] or self.last_id}"
        user = User(source, realname or name, stay, self.now)
        if account:
            user.logged_in(account, self.accounts.identity(account))
        self.arrived(user)
        self.attach(session, user)
        self.watchers.tell(source, True)
        return user

    def arrived(self, user: User) -> None:
        """Somebody is here."""
        user.last_time = self.last_time
        self.users[user.key] = user
        self.most_users = max(self.most_users, len(self.users))
        self.places.update(dict.fromkeys(user.secrets, user))

    def attach(self, session: Session, user: User) -> None:
        """A device of somebody who is here. The one whose secret it has is gone."""
        before = [s for s in user.live if s.secret and s.secret == session.secret]
        user.sessions.append(session)
        session.user = user
        self.turn.apart.add(session)
        self.turn.since[session] = self.last_id
        self.turn.kept.add(user)
        for channel in user.channels:
            channel.by_wire = None
        for other in before:
            other.replaced()
        if session.secret in user.secrets:  # that makes nobody an operator
            user.modes.discard("o")
        if session.secret:
            user.secrets[session.secret], self.places[session.secret] = None, user
        for secret in list(user.secrets)[:-SECRETS_A_USER]:
            self.forget(user, secret)
        if host_of(user.source.address) not in {s.host for s in user.live}:
            self._moved(user, session.conn.address)

    def _moved(self, user: User, address: str) -> None:
        """Somebody is somewhere else now; which is where bans are looked for."""
        source = user.source
        user.changed(address=address)
        self.turn.kept.add(user)
        self.emit(HOST, source, self.witnesses(user), user.source.host, source.username)

    def forget(self, user: User, secret: str) -> None:
        """It gives nobody a place any more."""
        if user.secrets.pop(secret, self) is None:
            del self.places[secret]

    def leave(self, session: Session, for_good: bool = True) -> None:
        """One session ends; its user is gone with the last one, or, if the line broke under
        somebody who can prove to be the same when he comes back, a while after."""
        user = session.user
        self.turn.left[session] = user
        self.turn.apart.add(session)
        session.user = None
        if not all(other in self.turn.left for other in user.sessions):
            if for_good and all(other.secret != session.secret for other in user.live):
                self.forget(user, session.secret)
        elif for_good or not user.may_return:
            self.remove(user, session.parting, session)
        else:
            user.modes.discard("o")
            session.site.house.miss(user)

    def remove(self, user: User, reason: str, session: Session | None = None) -> None:
        """Somebody is gone."""
        reason = reason or "Connection closed"  # RFC 2812 section 3.1.7: there is always one
        self.emit(QUIT, user.source, neighbours(user), reason, origin=session)
        for channel in list(user.channels):
            self.put_out(user, channel)
        del self.users[user.key]
        for secret in user.secrets:
            del self.places[secret]
        self.turn.kept.add(user)
        self.markers.pop(user.stay, None)
        self.last_time = max(self.last_time, user.last_time)
        self._was(user)

    def give_up(self, user: User) -> None:
        """Somebody was missed for long enough."""
        if not user.sessions and self.users.get(user.key) is user:
            self.remove(user, "Connection lost")

    def log_in(self, session: Session, account: str) -> None:
        """This session's user proved to be the owner of an account."""
        user = session.user
        user.logged_in(account, self.accounts.identity(account))
        self.turn.kept.add(user)
        self.emit(ACCOUNT, user.source, self.witnesses(user), "", account, session)
        restore_standing(self, session)

    def _was(self, user: User) -> None:
        """Nobody has this name now."""
        self.former.append(FormerUser(user.source, user.realname, self.now))
        self.watchers.tell(user.source, False)

    def witnesses(self, user: User) -> Any:
        """The audience of what somebody does to himself: himself, who shares a channel with
        him, and who watches for him and wants to hear more than that he comes and goes."""
        watching = (s.user for s in self.watchers.get(user.key, ()) if s.follows)
        return Neighbours(tuple(user.channels), frozenset([user, *watching]))

    def join(self, session: Session, name: str, password: str = "") -> Channel:
        """Into the channel `name`, which is founded if need be; its founder operates it."""
        check_channel_name(name)
        user, key = session.user, fold(name)
        channel = self.channels.get(key)
        if channel and channel in user.channels:
            return channel
        if len(user.channels) >= CHANNELS_A_USER:
            text = f"{CHANNELS_A_USER} channels at most; /part one"
            raise Refused("TOO_MANY_CHANNELS", text, name)
        if channel is None:
            channel = self.channels[key] = Channel(name, self.last_time, self.now)
            ranks = self._found(user, channel)
        else:
            channel.check_entry(user, password)
            ranks = channel.standing_of(user)
        user.invitations.pop(channel, None)
        channel.members[user] = Membership(self.last_id + 1, ranks)
        user.channels[channel] = None
        self.turn.move(user, channel)
        self.emit(JOIN, user.source, channel, user.realname, user.account, session)
        if user.away:
            self.emit(AWAY, user.source, channel, user.away, origin=session)
        return channel

    def _found(self, user: User, channel: Channel) -> str:
        """A channel that lasts, if one with an account founds it; the founder's ranks."""
        if channel.key == LOBBY:
            return ""
        if user.login and self.founded[user.login] < CHANNELS_FOUNDED:
            channel.founder = user.login
            self.founded[user.login] += 1
        return "o"

    def disown(self, channel: Channel) -> None:
        """It ends with its last member, like any other."""
        self.founded -= collections.Counter([channel.founder])
        channel.founder = ""
        channel.standing.clear()
        self.turn.kept.add(channel)
        if not channel.members:
            self._close(channel)

    def _close(self, channel: Channel) -> None:
        del self.channels[channel.key]
        self.last_time = max(self.last_time, channel.last_time)
        if channel.private:  # whoever founds it next was not meant to read this
            self.turn.sealed.append(channel.key)

    def part(self, session: Session, channel: Channel, reason: str = "") -> None:
        user = session.user
        channel.member(user)
        self.emit(PART, user.source, channel, cut(reason, REASON_BYTES), origin=session)
        self.put_out(user, channel)

    def put_out(self, user: User, channel: Channel) -> None:
        """Out of the channel, after the event that says so."""
        self.turn.move(user, channel)
        member = channel.members.pop(user)
        channel.former.setdefault(user, []).append((member.since, self.last_id))
        del user.channels[channel]
        if not channel.members and not channel.founder:
            self._close(channel)

    def rename(self, session: Session, name: str) -> None:
        """Another name for this session's user, one that is free."""
        self.rename_user(session.user, name, session)

    def rename_user(self, user: User, name: str, session: Session | None = None) -> None:
        if name == user.name:
            return
        circle = neighbours(user) if user.channels else People(frozenset([user]))
        self.emit(NICK, user.source, circle, name, origin=session)
        if fold(name) != user.key:
            self._was(user)
        del self.users[user.key]
        was = user.key
        user.changed(name=name)
        self.turn.kept.add(user)
        self.users[user.key] = user
        if user.key != was:
            self.watchers.tell(user.source, True)

    def set_away(self, session: Session, reason: str) -> None:
        """Away for a reason, or with none back again."""
        user, reason = session.user, cut(reason, REASON_BYTES)
        if reason != user.away:
            user.away = reason
            self.turn.kept.add(user)
            self.emit(AWAY, user.source, self.witnesses(user), reason, origin=session)

    # Talking

    def say(
        self, session: Session, audience: Any, text: str, kind: str = MESSAGE, tags: str = ""
    ) -> None:
        user = session.user
        audience.admit(user, text)
        user.spoke = self.now
        if isinstance(audience, Channel) and audience not in user.channels:
            audience = scene(audience, user)  # who speaks may want an echo
        self.emit(kind, user.source, audience, text, audience.addressee(user), session, tags)

    # Looking

    def find_user(self, name: str) -> User:
        user = self.users.get(fold(name))
        if user is None:
            raise Refused("NO_SUCH_NAME", f"nobody here is called {harmless(name)}", name)
        return user

    def find_channel(self, name: str) -> Channel:
        channel = self.channels.get(fold(name))
        if channel is None:
            raise Refused("NO_SUCH_CHANNEL", f"there is no channel {harmless(name)} now", name)
        return channel

    def find_audience(self, session: Session, name: str) -> Channel | Ranked | Conversation:
        """What `name` means to this session: a channel, those of a rank in it, or a private
        talk with somebody."""
        if name.startswith("#"):
            return self.find_channel(name)
        if name[1:2] == "#" and name[0] in SYMBOLS.values():
            return ranked(self.find_channel(name[1:]), name[0], session.user)
        return conversation(session.user, self.find_user(name))


def free_name(hub: Hub, wanted: str, owner: User | None = None, account: str = "") -> str:
    """`wanted` as the rule for names has it, with a number where it is somebody else's."""
    name = clean_name(wanted)
    if not name:
        raise Refused("NO_NAME", "a name needs at least one visible character; try again")
    few, many = range(2, NAMES_COUNTED), iter(lambda: random.randrange(10**6), None)
    numbers = itertools.chain(few, many)  # counting past a thousand guests takes too long
    candidates = itertools.chain([name], (numbered_name(name, n) for n in numbers))
    account = owner.account if owner else account
    return next(
        c
        for c in candidates
        if hub.users.get(fold(c)) in (None, owner) and not hub.accounts.is_foreign(c, account)
    )


def check_name(hub: Hub, wanted: str, owner: User | None = None, account: str = "") -> None:
    """Raise Refused unless a user can be called exactly so."""
    if clean_name(wanted) != wanted or not wanted:
        text = f"names have at most {NAME_CHARACTERS} characters, and none that IRC needs"
        raise Refused("BAD_NAME", text, wanted)
    holder = hub.users.get(fold(wanted))
    if holder not in (None, owner) and not (account and holder.account == account):
        raise Refused("NAME_TAKEN", f"{wanted} is taken", wanted)
    if owner and hub.accounts.is_foreign(wanted, owner.account):
        raise Refused("NAME_TAKEN", f"{wanted} belongs to an account; log in first", wanted)


def kick(session: Session, channel: Channel, victim: User, reason: str) -> None:
    """Put somebody out. Nobody can do that to a higher rank, nor half-operators to
    their like."""
    user, hub = session.user, session.site.hub
    channel.require(user)
    if victim not in channel.members:
        text = f"{victim.name} is not in {channel.name}"
        raise Refused("USER_NOT_IN_CHANNEL", text, victim.name, channel.name)
    if not user.is_operator:
        mine, theirs = channel.members[user].level, channel.members[victim].level
        if theirs < mine or theirs == mine == RANKS.index("h"):
            text = f"{victim.name} has too high a rank in {channel.name}"
            raise Refused("NOT_OPERATOR", text, channel.name)
    reason = cut(reason or user.name, REASON_BYTES)
    hub.emit(KICK, user.source, scene(channel, user), reason, victim.name, session)
    hub.put_out(victim, channel)


def invite(session: Session, user: User, channel: Channel) -> None:
    hub = session.site.hub
    channel.require_inside(session.user)
    if user in channel.members:
        text = f"{user.name} is in {channel.name} already"
        raise Refused("ALREADY_IN_CHANNEL", text, user.name, channel.name)
    if "i" in channel.flags:
        channel.require(session.user)
    if len(user.invitations) >= INVITATIONS:  # the oldest is the least likely to be used
        del user.invitations[next(iter(user.invitations))]
    user.invitations[channel] = None
    source, only = session.user.source, People(frozenset([user]))
    hub.emit(INVITE, source, only, channel.name, user.name, session)
    level = RANKS.index("h") if "i" in channel.flags else len(RANKS)
    able = {other for other, member in channel.members.items() if member.level <= level}
    others = People(frozenset(able - {session.user}))
    hub.emit(INVITED, source, others, channel.name, user.name, session)


def set_topic(session: Session, channel: Channel, topic: str) -> None:
    user, hub = session.user, session.site.hub
    channel.require_inside(user)
    if "t" in channel.flags:
        channel.require(user)
    if len(topic.encode()) > TOPIC_BYTES:
        raise Refused("TOO_LONG", f"a topic has at most {TOPIC_BYTES} bytes")
    channel.topic = topic
    channel.topic_setter, channel.topic_time = user.source.mask, hub.now
    hub.turn.kept.add(channel)
    hub.emit(TOPIC, user.source, scene(channel, user), topic, origin=session)


def take_name_back(hub: Hub, wanted: str, account: str) -> None:
    """Whoever has the name of an account that is not theirs gets another when its owner comes."""
    holder = hub.users.get(fold(wanted))
    if holder and holder.account != account and account and fold(wanted) == fold(account):
        hub.rename_user(holder, free_name(hub, wanted))


def become_device(session: Session, user: User) -> None:
    """This session is one more of somebody who is here. Who it was leaves, if there is no
    other device of that one."""
    hub, before = session.site.hub, session.user
    before.sessions.remove(session)
    for channel in before.channels:
        channel.by_wire = None
    if not before.live:
        hub.remove(before, f"Logged in as {user.account}", session)
    hub.attach(session, user)
    del hub.turn.since[session]  # it has heard all of this turn, too


def enter_channel(session: Session, name: str, password: str = "") -> Channel | None:
    """Join it, with all devices; None if this user is there already."""
    before = len(session.user.channels)
    channel = session.site.hub.join(session, name, password)
    if len(session.user.channels) == before:
        return None
    for other in session.user.live:
        if other is not session:
            other.place_entered(channel)
    return channel


def set_realname(session: Session, realname: str) -> None:
    user, hub = session.user, session.site.hub
    user.realname = realname
    hub.turn.kept.add(user)
    hub.emit(REALNAME, user.source, hub.witnesses(user), realname, origin=session)


def kill(session: Session, victim: User, reason: str) -> None:
    """Close all connections of somebody."""
    reason = cut(reason, REASON_BYTES) or "no reason given"
    session.site.house.note(f"{victim.source.mask} killed by {session.user.name}: {reason}")
    by, live = session.user.source, victim.live
    for other in live:
        other.killed(by, reason)
    if not live:  # missed, and not back yet
        session.site.hub.remove(victim, f"Killed ({by.name} ({reason}))")


def redact(session: Session, audience: Any, event: Event, reason: str) -> None:
    """Take back what was said, for its author and operators of the channel."""
    user, hub = session.user, session.site.hub
    if event.source.identity != user.identity:
        if not isinstance(audience, Channel):
            raise Refused("REDACT_FORBIDDEN", "these are not your words")
        audience.require(user)
    hub.turn.redacted += [(key, event.id) for key in audience.keys]
    gone = "UPDATE receipts SET time = ? WHERE event = ?"
    hub.turn.writes.append((gone, (hub.now, event.id)))
    text = f"{event.id:x}" + (f" :{reason}" if reason else "")
    hub.emit(REDACT, user.source, audience, text, audience.addressee(user), session)


def move_history(turn: Turn, channel: Channel, key: str) -> None:
    """It goes with the channel, and with it what this turn did to it before."""
    turn.renamed.append((channel.key, key))
    turn.redacted = [(key if k == channel.key else k, id) for k, id in turn.redacted]


def rename_channel(session: Session, channel: Channel, name: str, reason: str) -> None:
    """Another name for a channel, and for its history. The old one is free at once."""
    hub, user = session.site.hub, session.user
    channel.require(user, "o")
    check_channel_name(name)
    other, old = hub.channels.get(fold(name)), channel.name
    if channel.key == LOBBY or fold(name) == LOBBY:
        text = f"{LOBBY} stays what it is"
        raise Refused("CANNOT_RENAME", text, old, name)
    if other not in (None, channel):
        raise Refused("CHANNEL_NAME_IN_USE", f"there is a {other.name} already", old, name)
    if any(gone.key == fold(name) and gone is not channel for gone in hub.turn.changed):
        raise Refused("CHANNEL_NAME_IN_USE", "that is just being left; try again", old, name)
    if fold(name) != channel.key and session.site.store.remembers(fold(name), hub.turn):
        text = f"something was said in a channel called {name}, which its people may come back to"
        raise Refused("CHANNEL_NAME_IN_USE", text, old, name)
    hub.turn.events = [
        e._replace(audience=Renamed(channel, old)) if e.audience is channel else e
        for e in hub.turn.events
    ]
    del hub.channels[channel.key]
    move_history(hub.turn, channel, fold(name))
    hub.markers.rename(channel.key, fold(name), hub.turn)
    hub.turn.states["channel", channel.key] = FORGET_CHANNEL, (channel.key,)
    channel.name, channel.key, channel.keys = name, fold(name), (fold(name),)
    hub.channels[channel.key] = channel
    hub.turn.kept |= {channel, *channel.members}
    hub.emit(RENAME, user.source, scene(channel, user), reason, old, session)
    for member in channel.members:
        for other_session in member.live:
            other_session.place_renamed(old, channel, reason)


def set_metadata(session: Session, owner: User | Channel, key: str, value: str) -> None:
    """ "" unsets it. Who wants to hear of this key is told, but for who did it."""
    if value:
        owner.metadata[key] = value
    else:
        owner.metadata.pop(key, None)
    if session.user:  # else it is for who is not here yet
        session.site.hub.turn.kept.add(owner)
    if isinstance(owner, Channel):
        hearers = owner.listeners()
    else:
        hearers = session.site.hub.witnesses(owner).listeners() if session.user else ()
    for other in itertools.chain(*(user.live for user in hearers)):
        if other is not session:
            other.learns(owner.name, key, value)


def tell_all(session: Session, text: str) -> None:
    """To everybody who wants to hear of server operators (user mode w)."""
    hub = session.site.hub
    listening = frozenset(user for user in hub.users.values() if "w" in user.modes)
    hub.emit(WALLOPS, session.user.source, People(listening), text, origin=session)


def apply_modes(session: Session, channel: Channel, changes: Iterable[ModeChange]) -> list[Refused]:
    """Do what can be done, in one event, and say why not of the rest."""
    hub = session.site.hub
    done: list[ModeChange] = []
    refusals: dict[Any, Refused] = {}  # one of a kind: a hundred letters are no flood
    for change in changes:
        try:
            changed = change_mode(hub, session.user, channel, change)
            done += [changed] if changed else []
        except Refused as refusal:
            refusals.setdefault((refusal.code, refusal.about), refusal)
    hub.turn.kept.add(channel)
    user, audience = session.user, scene(channel, session.user)
    for text in mode_lines(change for change in done if change.letter != "k"):
        hub.emit(MODE, user.source, audience, text, origin=session)
    for text in mode_lines(change for change in done if change.letter == "k"):
        hub.emit(PASSWORD, user.source, audience, text, origin=session)
    return list(refusals.values())


def parse_modes(letters: str, values: Iterable[str]) -> list[ModeChange]:
    """ "+o-l", ["bob"] -> what is to be changed. What lacks its value gets an empty one."""
    on, changes, left = True, [], iter(values)
    for letter in letters[:MODES_AT_ONCE]:
        if letter in "+-":
            on = letter == "+"
            continue
        takes_value = letter in RANKS + MASK_LISTS + "k" or (letter == "l" and on)
        changes.append(ModeChange(on, letter, next(left, "") if takes_value else ""))
    return changes


def wrong_password(session: Session) -> None:
    """Say so; too many close the connection."""
    session.tries += 1
    text = f"that is not it (try {session.tries} of {PASSWORD_TRIES})"
    session.refuse(Refused("WRONG_PASSWORD", text))
    if session.tries >= PASSWORD_TRIES:
        session.end("Too many wrong passwords")


def claimed_account(session: Session, name: str) -> tuple[str, Verifier]:
    """That somebody says is theirs. It counts as a failure until proven. Raises Refused."""
    session.site.house.refresh()
    accounts, now = session.site.hub.accounts, session.site.hub.now
    accounts.throttle.check(session.host, name, now)
    accounts.throttle.failed(session.host, name, now)
    return accounts.find(name)


def certified_account(session: Session, name: str) -> tuple[str, Verifier]:
    """Whose certificate this connection shows; "" or that account may be asked for. Raises
    Refused."""
    session.site.house.refresh()
    accounts, fingerprint = session.site.hub.accounts, session.conn.fingerprint
    if not fingerprint:
        raise Refused("SASL_FAILED", "this connection shows no certificate")
    key = accounts.certificates.get(fingerprint)
    if key not in accounts or fold(name or key) != key:
        text = f"not with this certificate; log in and /msg {SERVICE} CERT ADD"
        raise Refused("SASL_FAILED", text)
    return accounts.find(key)


def proven_account(session: Session, name: str, verifier: Verifier) -> None:
    """It was; but another may have it by now, or a new password: then raise Refused."""
    accounts = session.site.hub.accounts
    if accounts.find(name)[1] != verifier:
        raise wrong_login()
    accounts.throttle.succeeded(session.host, name)


def check_owner(session: Session, name: str, password: str, done: Callable[[str], None]) -> None:
    """Whether that is the account's password; then done(the name as it is registered)."""
    account, verifier = claimed_account(session, name)

    def judge(fits: bool) -> None:
        if not fits:
            raise wrong_login()
        proven_account(session, account, verifier)
        done(account)

    session.later(functools.partial(verifier.fits, password), judge)


def identify(session: Session, name: str, password: str, done: Callable[[], None]) -> None:
    """Log this session's user in to an account, if the password is right; then done()."""

    def proved(account: str) -> None:
        session.site.hub.log_in(session, account)
        done()

    check_owner(session, name, password, proved)


def own_account(session: Session) -> str:
    """That this session's user is logged in to. Raises Refused."""
    if not session.user.account:
        raise Refused("NOT_LOGGED_IN", "you are not logged in")
    return session.user.account


def check_password(password: str, name: str) -> None:
    """Raise Refused unless it can protect an account."""
    if len(password) < PASSWORD_LEAST:
        text = f"a password has at least {PASSWORD_LEAST} characters"
        raise Refused("WEAK_PASSWORD", text, name)


def change_password(session: Session, old: str, new: str, done: Callable[[], None]) -> None:
    """Of the account that one is logged in to."""
    name, hub = own_account(session), session.site.hub
    check_password(new, name)

    def save(verifier: Verifier) -> None:
        account = hub.accounts.get(fold(name))
        if account is None:  # given up meanwhile
            raise wrong_login()
        hub.accounts.save(account._replace(verifier=verifier), hub.turn)
        done()

    def proved(_: str) -> None:
        session.later(functools.partial(make_verifier, new), save)

    check_owner(session, name, old, proved)


def drop_account(session: Session, password: str, done: Callable[[], None]) -> None:
    """Give up the account that one is logged in to."""
    name, hub = own_account(session), session.site.hub

    def proved(_: str) -> None:
        identity = hub.accounts.identity(name)
        hub.accounts.drop(name, hub.turn)
        hub.markers.pop(identity, None)
        hub.turn.writes.append(("DELETE FROM markers WHERE owner = ?", (identity,)))
        for user in [user for user in hub.users.values() if user.account == name]:
            user.logged_in("", "")
            hub.turn.kept.add(user)
            hub.emit(ACCOUNT, user.source, hub.witnesses(user))
        for channel in [c for c in hub.channels.values() if c.founder == identity]:
            hub.disown(channel)
        done()

    check_owner(session, name, password, proved)


def check_new_account(session: Session, nick: str, wanted: str, password: str) -> str:
    """The name that may be registered: one's own. Raises Refused."""
    rules, hub = session.site.registration, session.site.hub
    name = nick if fold(wanted) in ("*", fold(nick)) else wanted
    if "off" in rules:
        raise Refused("TEMPORARILY_UNAVAILABLE", "this server makes no accounts", name)
    if session.user is None and "before-connect" not in rules:
        raise Refused("COMPLETE_CONNECTION_REQUIRED", "come in first, then register", name)
    if session.user and session.user.account:
        raise Refused("ALREADY_AUTHENTICATED", "you are logged in already", name)
    if not nick:
        raise Refused("NEED_NICK", "take a name first", name)
    if name != nick:
        text = f"an account is called as you are: {nick}"
        raise Refused("ACCOUNT_NAME_MUST_BE_NICK", text, name)
    holder = hub.users.get(fold(name))
    if hub.accounts.is_foreign(name, "") or holder not in (None, session.user):
        raise Refused("ACCOUNT_EXISTS", f"{name} is somebody's already", name)
    check_password(password, name)
    return name


def count_account(session: Session, name: str) -> None:
    """One more from this address, if it may have another one. Raises Refused."""
    made, host, now = session.site.hub.accounts.made, session.host, session.site.hub.now
    if seconds := made.wait(host, "", now):
        text = f"{ACCOUNTS_MADE} accounts from one address at most; try again in {seconds} s"
        raise Refused("TEMPORARILY_UNAVAILABLE", text, name)
    if not is_loopback(host):
        made.failed(host, "", now)


def register_account(
    session: Session,
    nick: str,
    wanted: str,
    email: str,
    password: str,
    done: Callable[[str, bool], None],
) -> None:
    """Make a name an account; then done(name, whether its address is still to be verified)."""
    name, site = check_new_account(session, nick, wanted, password), session.site
    host, now = session.host, site.hub.now
    by_mail = "email-required" in site.registration
    if by_mail:  # nobody's mailbox is to be filled from here
        site.hub.accounts.throttle.check(host, "mail", now)
        site.hub.accounts.throttle.failed(host, "mail", now)
    if by_mail and not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
        raise Refused("INVALID_EMAIL", "this server wants an address to write to", name)
    count_account(session, name)

    def made(verifier: Verifier) -> None:
        check_new_account(session, nick, wanted, password)  # somebody may have been quicker
        number = int(site.hub.new_reference(), 16)
        account = Account(name, verifier, email if by_mail else "", number)
        if not by_mail:
            site.hub.accounts.save(account, site.hub.turn)
            return done(name, False)
        code = site.hub.accounts.await_code(account)
        send = functools.partial(site.house.mail, email, name, code)
        session.later(send, lambda _: done(name, True))

    session.later(functools.partial(make_verifier, password), made)


def disown(session: Session, name: str) -> str:
    """Give up a channel that this session's user founded; its name as it is written."""
    channel = session.site.hub.find_channel(name)
    if not channel.founded_by(session.user):
        raise Refused("NOT_OPERATOR", f"{channel.name} is not yours", channel.name)
    session.site.hub.disown(channel)
    return channel.name


def become_operator(session: Session, name: str, password: str, done: Callable) -> None:
    """Check the password off the loop; then the session's user operates the server, and
    done() says so. A name that does not exist takes as long as one that does."""
    verifier = session.site.operators.get(name) or nobodys_verifier(name)

    def judge(fits: bool) -> None:
        who = f"{session.user.source.mask} as {name}"
        session.site.house.note(f"OPER: {who}{'' if fits else ': wrong password'}")
        if not fits:
            return wrong_password(session)
        session.user.modes.add("o")
        done()

    session.later(functools.partial(verifier.fits, password), judge)


def settle(hub: Hub) -> None:
    """What changed in this turn and outlives the server becomes statements for the store."""
    states, kept = hub.turn.states, hub.turn.kept
    for key in {one.key for one in kept if isinstance(one, Channel)}:
        if channel := hub.channels.get(key):
            replace = "REPLACE INTO channels VALUES (?, ?)"
            states["channel", key] = replace, (key, json.dumps(channel.state()))
        else:
            states["channel", key] = FORGET_CHANNEL, (key,)
    for user in (one for one in kept if isinstance(one, User)):
        was, user.stored = user.stored, user.may_return and hub.users.get(user.key) is user
        if user.stored:
            replace = "REPLACE INTO stays VALUES (?, ?)"
            states["stay", user.stay] = replace, (user.stay, json.dumps(user.state()))
        elif was:
            states["stay", user.stay] = "DELETE FROM stays WHERE stay = ?", (user.stay,)
    kept.clear()


def revive_user(hub: Hub, stay: str, state: dict[str, Any]) -> User | None:
    """Somebody who was here when the last server stopped, and has now to come back."""
    user = User.revived(stay, state, hub.now)
    if user.login and hub.accounts.identity(user.account) != user.login:  # it was given up
        user.logged_in("", "")
    if user.key in hub.users or not user.may_return:
        return None
    hub.arrived(user)
    return user


def revive(hub: Hub, channels: Iterable[tuple[str, str]], stays: Iterable[tuple[str, str]]) -> None:
    """What settle() wrote. A channel is there again if an account founded it, or one of its
    members may come back; else it ends like one whose last member has left."""
    wanted: dict[User, dict[str, str]] = {}
    for stay, text in stays:
        state = json.loads(text)
        if user := revive_user(hub, stay, state):
            wanted[user] = state["channels"]
        else:
            hub.turn.writes.append(("DELETE FROM stays WHERE stay = ?", (stay,)))
    identities = {account.identity for account in hub.accounts.values()}
    for key, text in channels:
        hub.channels[key] = channel = Channel.revived(json.loads(text), hub.last_time)
        for user in (user for user, places in wanted.items() if key in places):
            ranks = "".join(rank for rank in RANKS if rank in wanted[user][key])
            channel.members[user] = Membership(0, ranks)
        if channel.founder:
            hub.founded[channel.founder] += 1
        if channel.founder not in identities:
            hub.disown(channel)
    for user, places in wanted.items():
        user.channels = {hub.channels[key]: None for key in places if key in hub.channels}


# ======================================================================================
# STORE
# ======================================================================================
# History in SQLite. The loop's connection alone writes, one transaction a turn, and never
# waits: a busy database is tried again next turn. Helpers read through connections of
# their own. To change the schema, append a step to MIGRATIONS; steps are never edited.

APPLICATION_ID = 0x63686174  # "chat", in the database's header (PRAGMA application_id)

MIGRATIONS = (
    """
    CREATE TABLE targets (          -- what events were said to: channels, private talks
        id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice
        key TEXT NOT NULL UNIQUE,   -- a channel's key, or the identities of two people
        events INTEGER NOT NULL DEFAULT 0   -- rows, for pruning; after a crash too few
    );
    CREATE TABLE events (
        target INTEGER NOT NULL,
        id INTEGER NOT NULL,        -- Event.id: the order of everything
        time INTEGER NOT NULL,      -- Event.time: milliseconds since 1970
        kind TEXT NOT NULL,
        name TEXT NOT NULL,         -- Source
        address TEXT NOT NULL,
        text TEXT NOT NULL,
        PRIMARY KEY (target, id)    -- one tree, and a channel's rows lie side by side
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE events ADD COLUMN username TEXT NOT NULL DEFAULT '';    -- Source
    ALTER TABLE events ADD COLUMN about TEXT NOT NULL DEFAULT '';
    """,
    """
    CREATE TABLE accounts (
        key TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        salt BLOB NOT NULL,         -- Verifier
        rounds INTEGER NOT NULL,
        stored_key BLOB NOT NULL,
        server_key BLOB NOT NULL,
        email TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE events ADD COLUMN author TEXT NOT NULL DEFAULT '';      -- User.identity
    ALTER TABLE events ADD COLUMN tags TEXT NOT NULL DEFAULT '';
    ALTER TABLE targets ADD COLUMN one TEXT NOT NULL DEFAULT '';        -- of a private talk:
    ALTER TABLE targets ADD COLUMN one_key TEXT NOT NULL DEFAULT '';    -- identities, and
    ALTER TABLE targets ADD COLUMN other TEXT NOT NULL DEFAULT '';      -- keys of the names
    ALTER TABLE targets ADD COLUMN other_key TEXT NOT NULL DEFAULT '';  -- when it began
    ALTER TABLE targets ADD COLUMN private INTEGER NOT NULL DEFAULT 0;  -- was +i, +k or +s
    ALTER TABLE accounts ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX targets_one ON targets (one);
    CREATE INDEX targets_other ON targets (other);
    CREATE TABLE markers (          -- how far somebody has read
        owner TEXT NOT NULL,        -- User.identity
        target TEXT NOT NULL,       -- a channel's key, or that of a name
        time INTEGER NOT NULL,
        PRIMARY KEY (owner, target)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE channels (         -- those there are; what is asked for is but the key
        key TEXT PRIMARY KEY,
        state TEXT NOT NULL         -- JSON, see Channel.state()
    ) WITHOUT ROWID;
    CREATE TABLE stays (            -- who is here and can prove it when he comes back
        stay TEXT PRIMARY KEY,
        state TEXT NOT NULL         -- JSON, see User.state()
    ) WITHOUT ROWID;
    CREATE TABLE receipts (         -- what was said under an id of its sender's own making
        owner TEXT NOT NULL,        -- Session.author
        own_id TEXT NOT NULL,
        event INTEGER NOT NULL,
        target INTEGER NOT NULL,
        time INTEGER NOT NULL,      -- milliseconds: when it was said, or else deleted
        PRIMARY KEY (owner, own_id)
    ) WITHOUT ROWID;
    CREATE INDEX receipts_event ON receipts (event);
    UPDATE targets SET key = '~' || id, private = 0 WHERE private;  -- channels tells it now
    """,
    """
    CREATE TABLE certificates (     -- with which one can log in
        fingerprint TEXT PRIMARY KEY,   -- SHA-256, in hex
        account TEXT NOT NULL       -- the key of its name
    ) WITHOUT ROWID;
    """,
)


KEPT, BUSY, LOST = "kept", "busy", "lost"  # what became of a turn's events
PARTIES = ("one", "one_key", "other", "other_key")  # columns of a private talk's target
COLUMNS = (
    "id, time, kind, name, address, username, about, events.text, author, tags"  # for event_of()
)
INSERT_EVENT = f"INSERT INTO events VALUES ({', '.join('?' * 11)})"


def connect(path: pathlib.Path | None, mode: str) -> sqlite3.Connection:
    """A connection that never waits and begins no transaction by itself."""
    address = f"{path.absolute().as_uri()}?mode={mode}" if path else ":memory:"
    return sqlite3.connect(
        address, timeout=0, isolation_level=None, uri=True, check_same_thread=False
    )


def inspect_database(path: pathlib.Path) -> None:
    """Raise Unusable unless `path` is a sound database of ours, without writing to it."""
    advice = "nothing was changed; move it away or choose another --data"
    with contextlib.closing(connect(path, "ro")) as db:
        try:
            application = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            small = path.stat().st_size <= CHECKED_ON_START_BYTES
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
        except sqlite3.OperationalError:
            raise  # locked by another program: that is no damage
        except sqlite3.DatabaseError as error:
            application, verdict, version, tables = APPLICATION_ID, str(error), 0, 0
    if verdict != "ok":
        raise Unusable(f"the database {path} is damaged ({verdict.splitlines()[-1]}); {advice}")
    if application != APPLICATION_ID and tables:  # an empty one was never finished: go on
        raise Unusable(f"{path} is not a database of chat.py; {advice}")
    if version > len(MIGRATIONS):
        raise Unusable(
            f"the database {path} is from a newer chat.py (schema {version}, this one knows "
            f"{len(MIGRATIONS)}); {advice}"
        )


def migrate(db: sqlite3.Connection) -> None:
    """Run the steps that this database has not seen, all in one transaction."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if steps := MIGRATIONS[version:]:
        db.executescript(
            f"BEGIN; {';'.join(steps)}; PRAGMA user_version = {len(MIGRATIONS)};"
            f"PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
        )


def open_database(path: pathlib.Path | None) -> sqlite3.Connection:
    """Open or create, bring the schema up to date; touch nothing that is not ours."""
    try:
        if path and path.exists() and path.stat().st_size:
            inspect_database(path)
        db = connect(path, "rwc")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last seconds
        db.execute("PRAGMA wal_autocheckpoint = 0")  # helpers do it: it waits for the disk
        migrate(db)
    except sqlite3.Error as error:
        raise Unusable(f"cannot open the database {path}: {error}") from error
    return db


def event_of(
    id: int,
    time_ms: int,
    kind: str,
    name: str,
    address: str,
    username: str,
    about: str,
    text: str,
    author: str,
    tags: str,
) -> Event:
    """A row of the store, read back."""
    account = author[1:].rpartition("/")[0]
    source = source_of(name, address, username, account)._replace(identity=author)
    # Versions before 0.3 stored client tags with CR and LF in their values
    tags = tags.translate({13: "\\r", 10: "\\n", 0: None})
    return Event(id, time_ms, kind, source, None, text, about, None, tags)


class Mark(NamedTuple):
    """A point in history: an id, or else a time in milliseconds."""

    id: int | None = None
    time: int = 0

    @property
    def moment(self) -> tuple[int, int]:
        """For comparing the two kinds."""
        return (self.time, 0) if self.id is None else (self.id >> ID_CLOCK_BITS, self.id)


class Place(NamedTuple):
    """Where something was said: under a key, and for a private talk of somebody with an
    account also under those that he had with people without one, who had that name."""

    key: str
    owner: str = ""
    other_key: str = ""


def place_of(user: User, audience: Channel | Conversation) -> Place:
    """Where the store keeps what this user may read of it."""
    (key,) = audience.keys
    if isinstance(audience, Channel):
        return Place(key)
    return Place(key, user.identity, audience.partner(user).key)


class Span(NamedTuple):
    """A part of some history: which things, and between which bounds, both left out. The
    bounds are ids or times; an id begins with the time (see Hub.begin), so that a time
    bounds the ids as well, but for the second that times may be ahead of the clock."""

    place: Place
    kinds: tuple[str, ...] = SPOKEN
    after: Mark | None = None
    before: Mark | None = None

    def where(self) -> tuple[str, list]:
        """As SQL, and its values."""
        texts, values = [f"kind IN ({', '.join('?' * len(self.kinds))})"], [*self.kinds]
        for sign, mark in ((">", self.after), ("<", self.before)):
            if mark is None:
                continue
            if mark.id is not None:
                texts.append(f"id {sign} ?")
                values.append(mark.id)
            else:
                slack = -TIMES_AHEAD if sign == ">" else TIMES_AHEAD
                texts.append(f"id {sign} ? AND time {sign} ?")
                values += [(mark.time + slack) << ID_CLOCK_BITS, mark.time]
        return " AND ".join(texts), values


class Index:
    """The words of all that was said, so that they can be searched: newest first, and by
    target, is how it is asked. Not every Python has FTS5; then nothing is found.

    FTS5 never leaves off in the middle of a word's list, and a common word is in every
    message: in one table, bringing a million messages in order would stop everything for
    100 ms. So there are many tables, each for so many messages that the longest list in it
    takes a slice, and each is brought in order by itself. A target with many messages has
    tables of its own: they go when its oldest messages do.
    """

    def __init__(self, store: "Store"):
        self.store = store
        self.behind: set[int] = set()  # targets with words that cannot be found yet
        self.untidy: dict[int, int] = {}  # parts to be merged, and how much of them at a time
        self.usable = self._open()
        if self.usable:
            newest = "(SELECT max(id) FROM events WHERE target = targets.id)"
            known = "ifnull((SELECT max(id) FROM covered WHERE target = targets.id), 0)"
            query = f"SELECT id FROM targets WHERE key < '~' AND {known} < {newest}"
            self.behind = {row[0] for row in store.db.execute(query)}

    def _open(self) -> bool:
        """Whether this Python has FTS5. What an earlier version left is made anew."""
        try:
            self.store.db.executescript("""
                CREATE VIRTUAL TABLE temp.probe USING fts5(text, content='');
                DROP TABLE temp.probe;
                DROP TABLE IF EXISTS search;    -- an earlier index, all in one
                DROP TABLE IF EXISTS indexed;
                CREATE TABLE IF NOT EXISTS parts (      -- search_1, search_2 ...
                    part INTEGER PRIMARY KEY AUTOINCREMENT,
                    lane INTEGER NOT NULL,      -- the target whose own it is; or 0
                    messages INTEGER NOT NULL DEFAULT 0
                );
                CREATE TABLE IF NOT EXISTS covered (    -- what of a target is in a part
                    target INTEGER NOT NULL,
                    id INTEGER NOT NULL,        -- the last message
                    part INTEGER NOT NULL,
                    messages INTEGER NOT NULL,
                    PRIMARY KEY (target, id)
                ) WITHOUT ROWID;""")
        except sqlite3.OperationalError:
            return False
        return True

    def advance(self) -> bool:
        """One slice of what cannot be searched yet; whether there is more."""
        if not self.usable:
            self.behind.clear()
        try:
            if not self._merge() and self.behind:
                self._add(next(iter(self.behind)))
        except sqlite3.Error:
            self.store._roll_back()  # busy or full: another time
            return False
        return bool(self.behind or self.untidy)

    def _merge(self) -> bool:
        """Bring a part in order, by one slice; whether there was anything to do."""
        db = self.store.db
        for part, pages in list(self.untidy.items()):
            before = db.total_changes
            insert = f"INSERT INTO search_{part} (search_{part}, rank) VALUES ('merge', ?)"
            db.execute(insert, [pages])
            if db.total_changes - before > 1:  # as FTS5 says that it did something
                self.untidy[part] = abs(pages)
                return True
            del self.untidy[part]
        return False

    def _add(self, target: int) -> None:
        """The next messages of this target."""
        db = self.store.db
        query = "SELECT id, messages, part FROM covered WHERE target = ? ORDER BY id DESC LIMIT 1"
        last, known, part = db.execute(query, [target]).fetchone() or (0, 0, 0)
        kinds = ", ".join("?" * len(SPOKEN))
        query = f"""
            SELECT id, text FROM events WHERE target = ? AND id > ? AND kind IN ({kinds})
            ORDER BY id LIMIT ?"""
        rows = db.execute(query, [target, last, *SPOKEN, INDEX_ROWS]).fetchall()
        if rows:
            db.execute("BEGIN IMMEDIATE")
            open_part, free = self._part(target)
            if open_part == part:
                db.execute("DELETE FROM covered WHERE target = ? AND id = ?", [target, last])
            insert = f"INSERT INTO search_{open_part} (rowid, place, text) VALUES (?, ?, ?)"
            db.executemany(insert, [(id, f"t{target}", text) for id, text in rows])
            count = len(rows) + (known if open_part == part else 0)
            values = (target, rows[-1][0], open_part, count)
            db.execute("INSERT INTO covered VALUES (?, ?, ?, ?)", values)
            update = "UPDATE parts SET messages = messages + ? WHERE part = ?"
            db.execute(update, [len(rows), open_part])
            db.execute("COMMIT")
            full = len(rows) >= free  # then all of it is merged, which begins with a minus
            self.untidy[open_part] = -MERGE_PAGES if full else MERGE_PAGES
        if len(rows) < INDEX_ROWS:
            self.behind.discard(target)

    def _part(self, target: int) -> tuple[int, int]:
        """Where the next messages of this target go, and how many have room there."""
        db = self.store.db
        query = """
            SELECT EXISTS (SELECT 1 FROM parts WHERE lane = ?)
            OR (SELECT sum(messages) FROM covered WHERE target = ?) >= ?"""
        own = db.execute(query, [target, target, PART_ROWS]).fetchone()[0]
        lane = target if own else 0
        query = "SELECT part, ? - messages FROM parts WHERE lane = ? AND messages < ?"
        row = db.execute(query, [PART_ROWS, lane, PART_ROWS]).fetchone()
        if row:
            return row
        part = db.execute("INSERT INTO parts (lane) VALUES (?)", [lane]).lastrowid
        name = f"search_{part}"
        options = "content='', columnsize=0"
        db.execute(f"CREATE VIRTUAL TABLE {name} USING fts5(place, text, {options})")
        for option, value in (("automerge", 0), ("crisismerge", 1999), ("usermerge", 16)):
            db.execute(f"INSERT INTO {name} ({name}, rank) VALUES (?, ?)", [option, value])
        return part, PART_ROWS

    def forget(self, target: int, id: int, text: str) -> None:
        """What was said there is taken back; `text` as it was (FTS5, contentless tables)."""
        if not self.usable:
            return
        query = "SELECT part FROM covered WHERE target = ? AND id >= ? ORDER BY id LIMIT 1"
        for (part,) in self.store.db.execute(query, [target, id]).fetchall():
            columns = f"search_{part} (search_{part}, rowid, place, text)"
            delete = f"INSERT INTO {columns} VALUES ('delete', ?, ?, ?)"
            self.store.db.execute(delete, [id, f"t{target}", text])
            self.untidy.setdefault(part, MERGE_PAGES)

    def shed(self, target: int) -> None:
        """Its oldest events are deleted: what was only of those is not needed any more."""
        if not self.usable:
            return
        db = self.store.db
        row = db.execute("SELECT min(id) FROM events WHERE target = ?", [target]).fetchone()
        oldest = LAST_MOMENT << ID_CLOCK_BITS if row[0] is None else row[0]
        values = [target, oldest]
        parts = db.execute(
            "SELECT part FROM covered WHERE target = ? AND id < ?", values
        ).fetchall()
        db.execute("DELETE FROM covered WHERE target = ? AND id < ?", values)
        query = """
            SELECT 1 FROM parts WHERE part = ? AND (messages >= ? OR lane = ?)
            AND part NOT IN (SELECT part FROM covered)"""
        for (part,) in parts:
            if db.execute(query, [part, PART_ROWS, target]).fetchone():
                db.execute("DELETE FROM parts WHERE part = ?", [part])
                db.execute(f"DROP TABLE search_{part}")
                self.untidy.pop(part, None)

    def search(
        self, places: Iterable[Place], words: str, span: Span, count: int
    ) -> list[tuple[Place, Event]]:
        """The newest things with all these words in them, the oldest first."""
        where, values = span.where()
        text = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
        found: dict[int, tuple[Place, Event]] = {}
        with self.store.reading() as db:
            targets = ((place, t) for place in places for t in self.store.targets_of(db, place))
            for place, target in targets if self.usable else ():
                match = f"place: t{target} AND text: ({text})"
                for row in self._matches(db, target, where, [match, target, *values], count):
                    found[row[0]] = place, event_of(*row)
        return [found[id] for id in sorted(found)[-count:]]

    def _matches(
        self, db: sqlite3.Connection, target: int, where: str, values: list, count: int
    ) -> list[tuple]:
        """From the newest part on, until there are enough."""
        query = "SELECT part FROM covered WHERE target = ? ORDER BY id DESC"
        rows: list[tuple] = []
        for (part,) in db.execute(query, [target]).fetchall():
            name = f"search_{part}"
            joined = f"{name} AS search JOIN events ON events.id = search.rowid"
            which = f"{name} MATCH ? AND events.target = ? AND {where}"
            query = f"SELECT {COLUMNS} FROM {joined} WHERE {which} ORDER BY rowid DESC LIMIT ?"
            rows += db.execute(query, [*values, count - len(rows)])
            if len(rows) >= count:
                break
        return rows


class Readers:
    """Read-only connections, each for one job at a time; or the only one that there is, if
    all is in memory. To open one takes longer than most pages do: it is kept for the next."""

    def __init__(self, path: pathlib.Path | None, only: sqlite3.Connection):
        self.path, self.only = path, only
        self.idle: list[sqlite3.Connection] = []  # pop() and append(), on whatever thread

    @contextlib.contextmanager
    def __call__(self) -> Iterator[sqlite3.Connection]:
        if self.path is None:
            yield self.only
            return
        try:
            db = self.idle.pop()
        except IndexError:
            db = connect(self.path, "ro")
        try:
            db.execute("BEGIN")  # all that the job reads is of one moment
            yield db
            db.execute("COMMIT")
        except Exception:
            db.close()
            raise
        self.idle.append(db)

    def close(self) -> None:
        for db in self.idle:
            db.close()


class Receipts:
    """What was said under an id that its sender made, so that nothing is said twice. They
    outlive what they are for: who was away for weeks may not know that it arrived."""

    def __init__(self, store: "Store"):
        self.store = store
        self.lost: collections.OrderedDict[tuple[str, str], None] = collections.OrderedDict()
        self.swept = ("", "")  # how far

    def write(self, receipts: dict[tuple[str, str], Event]) -> None:
        """In the transaction that the events are in."""
        insert = """
            INSERT OR IGNORE INTO receipts
            SELECT ?, ?, ?, ifnull((SELECT id FROM targets WHERE key = ?), 0), ?"""
        values = (
            (*key, event.id, next(iter(event.audience.keys), ""), event.time)
            for key, event in receipts.items()
        )
        self.store.db.executemany(insert, values)

    def not_kept(self, receipts: Iterable[tuple[str, str]]) -> None:
        """These were said and are not in the store."""
        self.lost.update(dict.fromkeys(receipts))
        while len(self.lost) > TARGETS_CACHED:
            self.lost.popitem(last=False)

    def find(self, db: sqlite3.Connection, owner: str, own_id: str) -> tuple[int, int] | None:
        """The event and its target; None if nothing was said under that id."""
        query = "SELECT event, target FROM receipts WHERE owner = ? AND own_id = ?"
        return db.execute(query, [owner, own_id]).fetchone()

    def knows(self, owner: str, own_id: str) -> bool:
        return self.find(self.store.db, owner, own_id) is not None

    def event(self, owner: str, own_id: str) -> tuple[int, Event | None] | None:
        """What was said under that id: its id, and all of it if it is still there. On
        whatever thread."""
        with self.store.reading() as db:
            found = self.find(db, owner, own_id)
            if found is None:
                return None
            id, target = found
            query = f"SELECT {COLUMNS} FROM events WHERE target = ? AND id = ?"
            row = db.execute(query, [target, id]).fetchone()
        return id, event_of(*row) if row else None

    def sweep(self, now: int) -> bool:
        """Forget what is old enough, one slice; whether there is more to look through."""
        query = f"""
            SELECT owner, own_id, time < ? AND NOT EXISTS (SELECT 1 FROM events
                WHERE events.target = receipts.target AND events.id = receipts.event)
            FROM receipts WHERE (owner, own_id) > (?, ?) ORDER BY owner, own_id
            LIMIT {RECEIPTS_SWEPT}"""
        rows = self.store.db.execute(query, [now - RECEIPTS_MS, *self.swept]).fetchall()
        old = [row[:2] for row in rows if row[2]]
        if old:
            self.store.db.executemany("DELETE FROM receipts WHERE owner = ? AND own_id = ?", old)
        self.swept = rows[-1][:2] if len(rows) == RECEIPTS_SWEPT else ("", "")
        return self.swept != ("", "")


class Store:
    """Events on disk, or in memory for `path` None. Raises Unusable when it cannot open."""

    def __init__(self, path: pathlib.Path | None, keep: int | None = None):
        self.path = path
        self.keep = keep or (KEEP_EVENTS if path else KEEP_EVENTS_IN_MEMORY)
        self.db = open_database(path)
        self.reading = Readers(path, self.db)
        self.version = 0  # of the data, as seen last
        self.changed_elsewhere()
        self.targets: dict[str, int] = {}  # id by key, of those written to lately
        self.counts: dict[int, int] = {}  # rows by target id, of the same
        self.unsure: list[str] = []  # keys of targets made in a transaction not yet committed
        self.tally_due = 0.0  # when the counts are to be written again
        self.excess: set[int] = set()  # targets with more rows than they may have
        try:
            self._look_back()
        except sqlite3.DatabaseError as error:
            raise Unusable(f"the database {path} is damaged ({error}); move it away") from error
        self.busy_since: float | None = None
        self.trouble = ""  # why events are being lost just now

    def _look_back(self) -> None:
        """Where the last server stopped."""
        newest = "e.id = (SELECT max(id) FROM events WHERE target = targets.id)"
        joined = f"targets JOIN events e ON e.target = targets.id AND {newest}"
        row = self.db.execute(f"SELECT max(e.id), max(e.time) FROM {joined}").fetchone()
        self.last_id, self.last_time = (value or 0 for value in row)
        self.orphans: set[int] = set()
        self.words, self.receipts = Index(self), Receipts(self)

    def abandon(self, stays: Collection[str]) -> None:
        """Give up what is nobody's any more: what was sealed, and private talks of people
        without an account, which end with their stay; `stays` are those that go on."""
        rows = self.db.execute("SELECT id, key FROM targets WHERE key > '~'").fetchall()
        talks = {id: key.split() for id, key in rows}
        self.orphans = {id for id, who in talks.items() if not who[1:] or stays.isdisjoint(who)}

    def commit(self, turn: Any, now: float) -> str:
        """One transaction for all of a turn's events: KEPT, BUSY (ask again) or LOST.
        Channels are renamed before them; other statements are run, and the history of the
        `sealed` keys is closed, after them."""
        try:
            self._write(turn, now)
        except sqlite3.Error as error:
            self._roll_back()
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self.busy_since = now if self.busy_since is None else self.busy_since
                if now - self.busy_since < BUSY_SECONDS:
                    return BUSY
            self.trouble = str(error)
            self.receipts.not_kept(turn.receipts)
            return LOST
        self.busy_since = None
        self.trouble = ""
        return KEPT

    def _write(self, turn: Any, now: float) -> None:
        due = now >= self.tally_due  # not every turn: it is a second page to write
        alone = not due and turn.lone_key in self.targets
        if not alone:  # one statement commits itself, in two thirds of the time
            self.db.execute("BEGIN IMMEDIATE")
        for old, new in turn.renamed:
            self._rename(old, new)
        rows = [
            (
                *(self.targets.get(key) or self._target(key, audience), id, when, kind),
                *(who.name, who.address, text, who.username, about, who.identity, tags),
            )
            for id, when, kind, who, audience, text, about, _, tags in turn.events
            if kind not in PASSING
            for key in audience.keys
        ]
        self.db.executemany(INSERT_EVENT, rows)
        gone = [self._redact(key, id) for key, id in turn.redacted]
        if turn.receipts:
            self.receipts.write(turn.receipts)
        for statement, values in (*turn.writes, *turn.states.values()):
            self.db.execute(statement, values)
        for key in turn.sealed:
            self._seal(key)
        if due:
            self.tally_due = now + TALLY_SECONDS
            self._tally()
        if not alone:
            self.db.execute("COMMIT")
        self.unsure.clear()
        for row in rows:
            self.counts[row[0]] += 1
            self.words.behind.add(row[0])
        for target in gone:
            if target in self.counts:
                self.counts[target] -= 1
        if due and len(self.targets) > TARGETS_CACHED:
            self.targets.clear()
            self.counts.clear()

    def _rename(self, old: str, new: str) -> None:
        """The history of a channel goes with it. What another one left there is sealed."""
        if old != new:
            self._seal(new)
            self.db.execute("UPDATE targets SET key = ? WHERE key = ?", [new, old])
            if (target := self.targets.pop(old, None)) is not None:
                self.targets[new] = target

    def _redact(self, key: str, id: int) -> int:
        """Take back what was said; the target that it was said to, or 0."""
        query = "SELECT target, kind, text FROM events WHERE id = ? AND target IN "
        only = "(SELECT id FROM targets WHERE key = ?)"
        target, kind, text = self.db.execute(query + only, [id, key]).fetchone() or (0, "", "")
        if kind in SPOKEN:
            self.words.forget(target, id, text)
        self.db.execute("DELETE FROM events WHERE target = ? AND id = ?", [target, id])
        self.db.execute("UPDATE targets SET events = events - 1 WHERE id = ?", [target])
        return target

    def _seal(self, key: str) -> None:
        """What was said there is nobody's to read any more; the next start deletes it. What
        is said under this key from now on is another target's."""
        self.db.execute("UPDATE targets SET key = '~' || id WHERE key = ?", [key])
        self.targets.pop(key, None)

    def _tally(self) -> None:
        """Write down how many rows the targets lately written to have, and see which ones
        have too many."""
        counts = [(count, target) for target, count in self.counts.items()]
        self.db.executemany("UPDATE targets SET events = ? WHERE id = ?", counts)
        self.excess.update(target for count, target in counts if count > self.keep)
        if self.path is None:
            self._bound_memory()

    def _bound_memory(self) -> None:
        """In memory, channels that are long gone give way to those that are talked in."""
        pragmas = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self.db.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas)
        if (pages - free) * size > MEMORY_BYTES:
            query = "SELECT target FROM events GROUP BY target ORDER BY max(id) LIMIT 1"
            self.orphans.update(row[0] for row in self.db.execute(query))

    def _target(self, key: str, audience: Any) -> int:
        """Of what has not been written to lately."""
        row = self.db.execute("SELECT id, events FROM targets WHERE key = ?", [key]).fetchone()
        if row is None:
            insert = f"INSERT INTO targets (key, {', '.join(PARTIES)}) VALUES (?, ?, ?, ?, ?)"
            parties = audience.parties if isinstance(audience, Conversation) else ("",) * 4
            row = self.db.execute(insert, [key, *parties]).lastrowid, 0
            self.unsure.append(key)
        target, count = row
        self.targets[key], self.counts[target] = target, count
        return target

    def _roll_back(self) -> None:
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        for key in self.unsure:  # never written after all
            self.counts.pop(self.targets.pop(key, 0), None)
        self.unsure.clear()

    def changed_elsewhere(self) -> bool:
        """Whether somebody else has written to the database since this was asked last."""
        version = self.db.execute("PRAGMA data_version").fetchone()[0]
        before, self.version = self.version, version
        return version != before

    def accounts(self) -> Iterator[Account]:
        columns = "name, salt, rounds, stored_key, server_key, email, number"
        for name, *verifier, email, number in self.db.execute(f"SELECT {columns} FROM accounts"):
            yield Account(name, Verifier(*verifier), email, number)

    def remembers(self, key: str, turn: Any) -> bool:
        """Whether there is history under this key, as it will be after the turn; also if
        that cannot be told just now."""
        for old, new in reversed(turn.renamed):
            key = old if key == new else "" if key == old else key
        query = "SELECT 1 FROM targets t JOIN events e ON e.target = t.id WHERE key = ? LIMIT 1"
        try:
            return self.db.execute(query, [key]).fetchone() is not None
        except sqlite3.Error:
            return True

    # Reading, on whatever thread

    def page(self, span: Span, count: int, newest: bool = True) -> list[Event]:
        """At most `count` things of that span, the newest or the oldest of them, in their
        order; fewer if they are more than PAGE_BYTES long."""
        where, values = span.where()
        order = "DESC" if newest else "ASC"
        with self.reading() as db:
            targets = self.targets_of(db, span.place)
            which = f"target IN ({', '.join('?' * len(targets))}) AND {where}"
            query = f"SELECT {COLUMNS} FROM events WHERE {which} ORDER BY id {order} LIMIT ?"
            rows = db.execute(query, [*targets, *values, count]).fetchall()
        sizes = itertools.accumulate(len(row[7].encode()) for row in rows)
        rows = [row for row, size in zip(rows, sizes, strict=True) if size <= PAGE_BYTES]
        return [event_of(*row) for row in (reversed(rows) if newest else rows)]

    def targets_of(self, db: sqlite3.Connection, place: Place) -> list[int]:
        found = [row[0] for row in db.execute("SELECT id FROM targets WHERE key = ?", [place.key])]
        if place.owner:
            query = """
                SELECT id FROM targets WHERE one = ? AND other_key = ? AND other LIKE '~%'
                UNION SELECT id FROM targets WHERE other = ? AND one_key = ? AND one LIKE '~%'"""
            rows = db.execute(query, [place.owner, place.other_key] * 2)
            found += [row[0] for row in rows if row[0] not in found]
        return found

    def around(self, span: Span, centre: Mark, count: int) -> list[Event]:
        """What is before that point, and as much from it on."""
        older = self.page(span._replace(before=centre), count // 2)
        inclusive = Mark(centre.id - 1) if centre.id is not None else Mark(time=centre.time - 1)
        return older + self.page(span._replace(after=inclusive), count - len(older), newest=False)

    def newest(self, keys: Iterable[str], owner: str) -> list[tuple[str, Event]]:
        """The last thing said under each key, and in each private talk of the owner's: with
        the key, or "" of a talk."""
        query = f"""
            SELECT {COLUMNS} FROM events WHERE target = ? AND kind IN (?, ?, ?)
            ORDER BY id DESC LIMIT 1"""
        found = []
        with self.reading() as db:
            talks = db.execute("SELECT id FROM targets WHERE one = ? OR other = ?", [owner] * 2)
            targets = [("", row[0]) for row in talks]
            for key in keys:
                targets += [(key, target) for target in self.targets_of(db, Place(key))]
            for key, target in targets:
                for row in db.execute(query, [target, *SPOKEN]):
                    found.append((key, event_of(*row)))
        return found

    def find(self, place: Place, id: int) -> Event | None:
        """One thing that was said there, if it was."""
        kinds = (*SPOKEN, TAGS)
        found = self.page(Span(place, kinds, Mark(id - 1), Mark(id + 1)), 1)
        return found[0] if found else None

    def rows(self, table: str) -> list[tuple]:
        return self.db.execute(f"SELECT * FROM {table}").fetchall()

    # Housekeeping

    def prune(self, idle: bool, now: int) -> bool:
        """Delete one slice of what is over the limits; say whether there is more to do."""
        overdue = (t for t in self.excess if self.counts.get(t, 0) > self.keep * PRUNE_OVERDUE)
        target = next(iter(self.orphans or self.excess) if idle else overdue, None)
        if target is None:
            return False
        try:
            self._delete_oldest(target, 0 if target in self.orphans else self.keep, now)
        except sqlite3.Error:
            self._roll_back()  # busy or full: the next idle turn tries again
            return False
        return bool(self.orphans or self.excess)

    def _delete_oldest(self, target: int, keep: int, now: int) -> None:
        """One slice of what `target` has beyond `keep` rows. With none to keep, the target
        goes when nothing was found, whatever the count says: a crash leaves it too low."""
        excess = self.counts.get(target, 0) - keep if keep else PRUNE_ROWS
        oldest = "SELECT id FROM events WHERE target = ? ORDER BY id LIMIT ?"
        delete = f"DELETE FROM events WHERE target = ? AND id IN ({oldest})"
        count = max(0, min(PRUNE_ROWS, excess))
        gone = f"UPDATE receipts SET time = ? WHERE target = ? AND event IN ({oldest})"
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute(gone, [now, target, target, count])
        deleted = self.db.execute(delete, [target, target, count]).rowcount
        if not keep and not deleted:
            self.db.execute("DELETE FROM targets WHERE id = ?", [target])
            self.targets = {key: known for key, known in self.targets.items() if known != target}
        update = "UPDATE targets SET events = max(0, events - ?) WHERE id = ?"
        self.db.execute(update, [deleted, target])
        self.words.shed(target)
        self.db.execute("COMMIT")
        if target in self.counts:
            self.counts[target] -= deleted
        if not deleted:
            self.orphans.discard(target)
        if self.counts.get(target, 0) <= keep:
            self.excess.discard(target)

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database: on a helper, it waits for the disk."""
        with contextlib.closing(connect(self.path, "rw")) as db:
            _, frames, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            page_size = db.execute("PRAGMA page_size").fetchone()[0]
            if frames * page_size > WAL_RESTART_BYTES:
                db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._tally()
        self.reading.close()
        self.db.close()


# ======================================================================================
# IRC DIALECT
# ======================================================================================
# RFC 1459 and 2812, and where today's servers disagree with them, modern.ircdocs.horse.
# First every shape of line that the server sends, then the session, then one handler a
# verb, by topic. A handler that cannot do what it is asked raises Refused; the numeric
# that says so in IRC stands in REFUSALS, the words come with the refusal.

RPL_WELCOME = "001 :Welcome to {}, {}"
RPL_YOURHOST = "002 :Your host is {}, running chat.py/{}"
RPL_CREATED = "003 :This server was started {}"
RPL_MYINFO = "004 {} {} {} {} {}"
RPL_ISUPPORT = "005 {} :are supported by this server"
RPL_ENDOFSTATS = "219 {} :End of statistics"
RPL_UMODEIS = "221 +{}"
RPL_SERVLISTEND = "235 * * :There are no services"
RPL_STATSUPTIME = "242 :Server up {} days {:02}:{:02}:{:02}"
RPL_STATSOLINE = "243 O * * {}"
RPL_LUSERCLIENT = "251 :There are {} users and {} invisible on 1 servers"
RPL_LUSEROP = "252 {} :operators online"
RPL_LUSERUNKNOWN = "253 {} :connections without a name yet"
RPL_LUSERCHANNELS = "254 {} :channels formed"
RPL_LUSERME = "255 :I have {} clients and 0 servers"
RPL_TRACEEND = "262 {} {} :End of trace: this server stands alone"
RPL_LOCALUSERS = "265 {0} {1} :Current local users {0}, max {1}"
RPL_GLOBALUSERS = "266 {0} {1} :Current global users {0}, max {1}"
RPL_WHOISCERTFP = "276 {} :has client certificate fingerprint {}"
RPL_AWAY = "301 {} :{}"
RPL_USERHOST = "302 :{}"
RPL_ISON = "303 :{}"
RPL_UNAWAY = "305 :You are no longer marked as being away"
RPL_NOWAWAY = "306 :You have been marked as being away"
RPL_WHOISUSER = "311 {} {} {} * :{}"
RPL_WHOISSERVER = "312 {} {} :{}"
RPL_WHOISOPERATOR = "313 {} :operates this server"
RPL_WHOWASUSER = "314 {} {} {} * :{}"
RPL_ENDOFWHO = "315 {} :End of WHO"
RPL_WHOISIDLE = "317 {} {} {} :seconds idle, signon time"  # irssi looks for these words
RPL_ENDOFWHOIS = "318 {} :End of WHOIS"
RPL_WHOISCHANNELS = "319 {} :{}"
RPL_LISTSTART = "321 Channel :Users Topic"
RPL_LIST = "322 {} {} :{}"
RPL_LISTEND = "323 :End of LIST"
RPL_CHANNELMODEIS = "324 {} {}"
RPL_CREATIONTIME = "329 {} {}"
RPL_NOTOPIC = "331 {} :No topic is set"
RPL_TOPIC = "332 {} :{}"
RPL_TOPICWHOTIME = "333 {} {} {}"
RPL_WHOISBOT = "335 {} :is a bot"
RPL_INVITELIST = "336 {}"  # the invitations that somebody has; 346 is a channel's +I
RPL_ENDOFINVITELIST = "337 :End of invitations"
RPL_WHOISACTUALLY = "338 {} {} :is connecting from here"
RPL_INVITING = "341 {} {}"
RPL_VERSION = "351 chat.py-{} {} :{}"
RPL_WHOREPLY = "352 {} {} {} {} {} {} :0 {}"
RPL_NAMREPLY = "353 {} {} :{}"
RPL_WHOSPCRPL = "354 {}"
RPL_ENDOFLINKS = "365 {} :End of LINKS: this server stands alone"
RPL_ENDOFNAMES = "366 {} :End of NAMES"
RPL_ENDOFWHOWAS = "369 {} :End of WHOWAS"
RPL_INFO = "371 :{}"
RPL_MOTD = "372 :- {}"
RPL_ENDOFINFO = "374 :End of INFO"
RPL_MOTDSTART = "375 :- {} Message of the day"
RPL_ENDOFMOTD = "376 :End of MOTD"
RPL_YOUREOPER = "381 :You are now an operator of this server"
RPL_REHASHING = "382 {} :Reading it again"
RPL_TIME = "391 {} :{}"
RPL_WHOISACCOUNT = "330 {} {} :is logged in as"
RPL_LOGGEDIN = "900 {} {} :You are now logged in as {}"
RPL_SASLSUCCESS = "903 :SASL authentication successful"
ERR_SASLFAIL = "904 :{}"
ERR_SASLTOOLONG = "905 :a line of SASL has at most 400 bytes"
ERR_SASLALREADY = "907 :{}"
ERR_SASLABORTED = "906 :SASL authentication aborted"
RPL_SASLMECHS = "908 {} :are the mechanisms there are"
RPL_WHOISSECURE = "671 {} :is using a secure connection"
RPL_WHOISKEYVALUE = "760 {} {} * :{}"
RPL_KEYVALUE = "761 {} {} * :{}"
RPL_KEYNOTSET = "766 {} {} :is not set"
RPL_METADATASUBOK = "770 {}"
RPL_METADATAUNSUBOK = "771 {}"
RPL_METADATASUBS = "772 {}"
ERR_METADATASYNCLATER = "774 {0} 0 :METADATA {0} SYNC tells what is known of it and its members"
RPL_HELPSTART = "704 {} :{}"
RPL_HELPTXT = "705 {} :{}"
RPL_ENDOFHELP = "706 {} :End of help"
RPL_MONONLINE = "730 :{}"
RPL_MONOFFLINE = "731 :{}"
RPL_MONLIST = "732 :{}"
RPL_ENDOFMONLIST = "733 :End of MONITOR list"
ERR_MONLISTFULL = "734 {} {} :Monitor list is full"
LIST_REPLIES = {  # letter of a list of masks -> its lines, its end
    "b": ("367 {} {} {} {}", "368 {} :End of bans"),
    "e": ("348 {} {} {} {}", "349 {} :End of exceptions from bans"),
    "I": ("346 {} {} {} {}", "347 {} :End of exceptions from +i"),
}

REFUSALS = {  # Refused.code -> the numeric; its parameters are Refused.about
    "NO_SUCH_NAME": "401",
    "NO_SUCH_SERVER": "402",
    "NO_SUCH_CHANNEL": "403",
    "CANNOT_SEND": "404",
    "TOO_MANY_CHANNELS": "405",
    "WAS_NO_SUCH_NAME": "406",
    "TOO_MANY_TARGETS": "407",
    "NO_SUCH_SERVICE": "408",
    "NO_RECIPIENT": "411",
    "NO_TEXT": "412",
    "LINE_TOO_LONG": "417",
    "UNKNOWN_COMMAND": "421",
    "NO_MOTD": "422",
    "NO_ADMIN": "423",
    "NO_NAME": "431",
    "BAD_NAME": "432",
    "NAME_TAKEN": "433",
    "USER_NOT_IN_CHANNEL": "441",
    "NOT_IN_CHANNEL": "442",
    "ALREADY_IN_CHANNEL": "443",
    "NO_SUMMON": "445",
    "NO_USERS": "446",
    "NOT_NAMED": "451",
    "NEED_MORE_PARAMS": "461",
    "ALREADY_NAMED": "462",
    "WRONG_PASSWORD": "464",
    "CHANNEL_FULL": "471",
    "UNKNOWN_MODE": "472",
    "INVITE_ONLY": "473",
    "BANNED": "474",
    "BAD_PASSWORD": "475",
    "BAD_CHANNEL": "476",
    "NEED_ACCOUNT": "477",
    "LIST_FULL": "478",
    "NOT_SERVER_OPERATOR": "481",
    "NOT_OPERATOR": "482",
    "UNKNOWN_USER_MODE": "501",
    "NOT_YOURSELF": "502",
    "NO_HELP": "524",
    "BAD_MODE_VALUE": "696",
}

IRC_SPOKEN = {  # kind -> the verb, what stands before the text, and what behind it
    MESSAGE: ("PRIVMSG", "", ""),
    ACTION: ("PRIVMSG", "\x01ACTION ", "\x01"),
    NOTICE: ("NOTICE", "", ""),
}
IRC_EVENTS = {  # kind -> the line behind its source; {tail} is " :TEXT" if there is a text
    TAGS: "TAGMSG {where}",
    REDACT: "REDACT {where} {text}",
    RENAME: "RENAME {about} {where} :{text}",
    ACCOUNT: "ACCOUNT {about}",
    HOST: "CHGHOST {about} {text}",
    INVITED: "INVITE {about} {text}",
    JOIN: "JOIN {where}",
    PART: "PART {where}{tail}",
    QUIT: "QUIT{tail}",
    NICK: "NICK :{text}",  # ii reads it only behind a colon
    TOPIC: "TOPIC {where} :{text}",
    KICK: "KICK {where} {about} :{text}",
    MODE: "MODE {where} {text}",
    PASSWORD: "MODE {where} {text}",
    INVITE: "INVITE {about} {text}",
    AWAY: "AWAY{tail}",
    REALNAME: "SETNAME :{text}",
    WALLOPS: "WALLOPS :{text}",
}
IRC_EXTENDED_JOIN = "JOIN {where} {about}{tail}"
NOT_OWN = (INVITE, INVITED, AWAY, QUIT)  # who does these is told by other means
ECHOED = (*SPOKEN, TAGS)  # or by an echo, if he asked for it

CAPABILITIES = {  # what CAP offers (ircv3.net/specs), with its value
    "account-notify": "",
    "account-tag": "",
    "draft/account-registration": "",
    "draft/chathistory": "",
    "draft/event-playback": "",
    "draft/channel-rename": "",
    "draft/message-redaction": "",
    "draft/metadata-3": f"before-connect,max-subs={METADATA_SUBS},max-keys={METADATA_KEYS}"
    f",max-value-bytes={METADATA_BYTES}",
    "draft/no-implicit-names": "",
    "draft/pre-away": "",
    "draft/multiline": f"max-bytes={LINE_BYTES},max-lines={MESSAGE_LINES}",
    "draft/read-marker": "",
    "sasl": "",
    "away-notify": "",
    "batch": "",
    "cap-notify": "",
    "chat.py/session": "",
    "chghost": "",
    "echo-message": "",
    "extended-join": "",
    "extended-monitor": "",
    "invite-notify": "",
    "labeled-response": "",
    "message-tags": "",
    "multi-prefix": "",
    "server-time": "",
    "setname": "",
    "soju.im/search": "",
    "standard-replies": "",
    "userhost-in-names": "",
}
NEEDS_CAPABILITY = {  # to be told of these events
    ACCOUNT: "account-notify",
    AWAY: "away-notify",
    HOST: "chghost",
    INVITED: "invite-notify",
    REALNAME: "setname",
    REDACT: "draft/message-redaction",
    RENAME: "draft/channel-rename",
    TAGS: "message-tags",
}

USER_MODES = {  # letter -> what it is
    "B": "is a bot",
    "R": "only hears from who is logged in",
    "i": "is not listed to those who share no channel",
    "o": "operates this server",
    "w": "hears what operators tell each other",
}

NOT_IN_IRC = {0: None, 10: " ", 13: " "}  # what would end a line


def irc_bytes(text: str) -> bytes:
    """One line, cut between characters where it has to be (RFC 2812 section 2.3)."""
    if not text.isprintable():
        text = text.translate(NOT_IN_IRC)
    data = text.encode()
    if len(data) > IRC_BYTES - 2:
        data = cut(text, IRC_BYTES - 2).encode()
    return data + b"\r\n"


def as_param(text: str) -> str:
    """`text` as a parameter that others may follow."""
    return "*" if not text or " " in text or text[0] == ":" else cut(text, PARAM_BYTES)


def wrapped(words: Iterable[str], room: int, between: str = " ") -> Iterator[str]:
    """The words in lines of at most `room` bytes."""
    line, size = [], 0
    for one in words:
        length = len(one.encode()) + len(between)
        if line and size + length > room:
            yield between.join(line)
            line, size = [], 0
        line.append(one)
        size += length
    if line:
        yield between.join(line)


@functools.lru_cache(100)  # seconds; one is asked for with every message of it
def second_text(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%S}"


def tag_time(milliseconds: int) -> str:
    """2026-11-22T08:30:05.123Z (IRCv3 server-time)."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{second_text(seconds)}.{rest:03}Z"


TAG_CHARACTERS = {"\\": "\\\\", ";": "\\:", " ": "\\s", "\r": "\\r", "\n": "\\n", "\0": ""}
TAG_TRANSLATION = str.maketrans(TAG_CHARACTERS)


def escaped_tag(value: str) -> str:
    """Return a tag value as it is written on the wire; unescaped_tag() is the inverse."""
    return value.translate(TAG_TRANSLATION)


def add_tag(line: bytes, tag: str) -> bytes:
    """To a line, or the first of several."""
    if line[:1] == b"@":
        return f"@{tag};".encode() + line[1:]
    return f"@{tag} ".encode() + line


IN_BATCH = re.compile(rb"@(?:[^ ]*;)?batch=")  # a line of one
ENDS_BATCH = re.compile(rb"(?:@[^ ]* )?:[^ ]* BATCH -")


def add_tag_to_all(lines: bytes, tag: str) -> bytes:
    """To every line but those of a batch among them: its beginning and its end stand for
    them (IRCv3 batch, nested batches)."""
    parts = lines.splitlines(keepends=True)
    return b"".join(part if IN_BATCH.match(part) else add_tag(part, tag) for part in parts)


def count_answers(lines: bytes) -> int:
    """So many there are; a batch is one."""
    parts = lines.splitlines()
    return sum(not (IN_BATCH.match(part) or ENDS_BATCH.match(part)) for part in parts)


MESSAGE_ID = re.compile(r"msgid=[^; ]*;|;msgid=[^; ]*|@msgid=[^; ]* ")  # among tags


def spoken_lines(event: Event, where: str, blank: bool = False) -> Iterator[tuple[str, bool]]:
    """A message of several lines, or a long one, in as many lines of IRC as it takes; and
    whether each goes on with the one before it. Blank ones only if they are wanted."""
    verb, before, behind = IRC_SPOKEN[event.kind]
    head = f":{event.source.mask} {verb} {where or event.about} :{before}"
    room = IRC_BYTES - 2 - len(f"{head}{behind}".encode())
    texts = event.text.replace("\r", "").split("\n")
    if not blank:
        texts = [text for text in texts if text.strip(SOFT_BREAK)] or [" "]  # some ignore ""
    for text in texts:
        pieces = (split_text(part, room) for part in text.split(SOFT_BREAK))
        for n, piece in enumerate(itertools.chain(*pieces)):
            yield head + piece + behind, n > 0


class IrcWire:
    """Events as lines of IRC, the same for all sessions with the same capabilities."""

    def __init__(self, capabilities: frozenset[str]):
        self.capabilities = capabilities
        self.echo = "echo-message" in capabilities
        self.timed = "server-time" in capabilities
        self.tagged = "message-tags" in capabilities
        self.accounts = "account-tag" in capabilities
        self.multiline = {"draft/multiline", "batch"} <= capabilities
        self.without = {k for k, cap in NEEDS_CAPABILITY.items() if cap not in capabilities}

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """One bytes object an event; a message too long for a line is several lines in it."""
        where, lines = audience.name, []
        for e in events:
            line, tags = None, self.tags(e)
            if e.kind is MESSAGE and e.text.isprintable():  # all that a storm is made of
                line = f"{tags}:{e.source.mask} PRIVMSG {where or e.about} :{e.text}\r\n".encode()
            if line is None or len(line) - len(tags) > IRC_BYTES or not e.text:
                line = b"".join(self.parts(e, where, tags))
            lines.append(line)
        return lines

    def parts(self, event: Event, where: str, tags: str) -> Iterator[bytes]:
        """The lines of one event; of a message that is several, the first has its id."""
        lines = list(self.lines(event, where))
        if self.multiline and len(lines) > 1:
            yield from self.multiline_batch(event, where, tags)
            return
        for line in lines:
            yield tags.encode() + irc_bytes(line)
            tags = re.sub(MESSAGE_ID, "", tags, count=1)

    def multiline_batch(self, event: Event, where: str, tags: str) -> Iterator[bytes]:
        """A message of several lines as one, for who knows (draft/multiline)."""
        source, name = f":{event.source.mask}", f"{event.id:x}"
        yield f"{tags}{source} BATCH +{name} draft/multiline {where or event.about}\r\n".encode()
        for line, goes_on in spoken_lines(event, where, blank=True):
            concat = ";draft/multiline-concat" if goes_on else ""
            yield f"@batch={name}{concat} ".encode() + irc_bytes(line)
        yield f"{source} BATCH -{name}\r\n".encode()

    def tags(self, event: Event) -> str:
        """What stands before its line, with the space behind."""
        tags = f";time={tag_time(event.time)}" if self.timed else ""
        if self.tagged:
            tags += f";msgid={event.id:x}"
            if event.source.bot:
                tags += ";bot"
            if event.tags:
                tags += f";{event.tags}"
        if self.accounts and event.source.account:
            tags += f";account={escaped_tag(event.source.account)}"
        return f"@{tags[1:]} " if tags else ""

    def lines(self, event: Event, where: str) -> Iterable[str]:
        """The lines of one event, without their ends."""
        if event.kind in SPOKEN:
            return [line for line, _ in spoken_lines(event, where)]
        if event.kind in self.without:
            return []
        text = event.text
        shape = IRC_EVENTS[event.kind]
        if event.kind == JOIN and "extended-join" in self.capabilities:
            shape = IRC_EXTENDED_JOIN
        where = where or event.about
        known = {"where": where, "about": event.about or "*", "text": text}
        return [f":{event.source.mask} {shape.format(**known, tail=f' :{text}' if text else '')}"]

    def own(self, event: Event, line: bytes) -> bytes:
        """What somebody hears of what he did: he speaks to himself, or asked for echoes."""
        if event.kind in ECHOED:
            to_self = event.about == event.source.name
            return line * (self.echo + to_self)
        return b"" if event.kind in NOT_OWN else line


# The capabilities that change the bytes of an event. Sessions that differ only in others
# share a wire.
WIRE_CAPABILITIES = frozenset(
    (
        *("account-tag", "batch", "draft/multiline", "echo-message", "extended-join"),
        *("message-tags", "server-time", *NEEDS_CAPABILITY.values()),
    )
)
IRC_WIRES: "weakref.WeakValueDictionary[frozenset[str], IrcWire]" = weakref.WeakValueDictionary()


def irc_wire(capabilities: frozenset[str]) -> IrcWire:
    """Return the wire of these capabilities; it lives as long as a session uses it."""
    key = capabilities & WIRE_CAPABILITIES
    wire = IRC_WIRES.get(key)
    if wire is None:
        wire = IRC_WIRES[key] = IrcWire(key)
    return wire


irc_command = Commands("")


class Labelled(NamedTuple):
    """A label, and where the answer that gets it began in this turn."""

    label: str  # escaped
    replies: int  # so many of the session's before it
    events: int  # and so many of the turn's, the last of which ...
    last_id: int  # ... is this one


CONCAT = "draft/multiline-concat"
OWN_ID = "+chat.py/id"  # what a client calls its message: under one id it is said once


def client_id(session: "IrcSession", target: str) -> str:
    """What the client calls the message that it sends; one to several people has no such
    name, which would have to mean each of them."""
    own = session.message.tags.get(OWN_ID, "") if session.message.tags else ""
    return own if session.wire.tagged and is_word(own, OWN_ID_BYTES) and "," not in target else ""


class Collected:
    """A message of several lines that has been begun (draft/multiline)."""

    def __init__(self, reference: str, target: str, label: str, tags: str, own_id: str):
        self.reference, self.target, self.label, self.tags = reference, target, label, tags
        self.own_id = own_id
        self.verb = ""
        self.text = ""
        self.lines = 0
        self.failed = False

    def add(self, message: Message) -> None:
        """One more line. Raises Refused."""
        verb, (target, *texts), tags = message
        text, goes_on = "".join(texts[:1]), CONCAT in tags
        if tags["batch"] != self.reference or fold(target) != fold(self.target):
            raise Refused("MULTILINE_INVALID", "this line belongs to another message")
        if verb not in ("PRIVMSG", "NOTICE") or self.verb not in ("", verb):
            raise Refused("MULTILINE_INVALID", "a message is all PRIVMSG, or all NOTICE")
        if goes_on and not text:
            raise Refused("MULTILINE_INVALID", "nothing cannot go on with a line")
        between = "" if not self.lines else SOFT_BREAK if goes_on else "\n"
        self.verb, self.text = verb, self.text + between + text
        self.lines += not goes_on
        if len(self.text.replace(SOFT_BREAK, "").encode()) > LINE_BYTES:
            text = "the message is too long; nobody got it"
            raise Refused("MULTILINE_MAX_BYTES", text, str(LINE_BYTES))
        if self.lines > MESSAGE_LINES:
            text = "the message has too many lines; nobody got it"
            raise Refused("MULTILINE_MAX_LINES", text, str(MESSAGE_LINES))


def collect(session: "IrcSession", message: Message) -> None:
    """A line of a batch that the client has begun. A bad one ends the whole message."""
    session.message = message._replace(verb="BATCH")  # what a refusal is about
    collected = session.collected
    if collected is None:
        raise Refused("MULTILINE_INVALID", "there is no such batch")
    try:
        if not collected.failed:
            collected.add(message if message.params else message._replace(params=[""]))
    except Refused:
        collected.failed = True  # said once; the rest of it is not looked at
        if "labeled-response" in session.capabilities:
            session.begin_answer(collected.label)
        raise


def tell_topic_irc(session: "IrcSession", channel: Channel) -> None:
    session.reply(RPL_TOPIC, channel.name, channel.topic)
    when = channel.topic_time // 1000
    session.reply(RPL_TOPICWHOTIME, channel.name, channel.topic_setter, when)


def tell_names_irc(session: "IrcSession", channel: Channel) -> None:
    capabilities, me = session.capabilities, session.user
    names = channel.names(me, "multi-prefix" in capabilities, "userhost-in-names" in capabilities)
    kind = "@" if "s" in channel.flags else "="
    session.reply_list(RPL_NAMREPLY, names, kind, channel.name)


def owner_name(owner: "User | Channel | IrcSession") -> str:
    """Who has no name yet is called so."""
    return owner.name if isinstance(owner, (User, Channel)) else "*"


def subscribed_metadata(
    session: "IrcSession", owners: Iterable[Any]
) -> Iterator[tuple[str, str, str]]:
    """Whose, which and what: all that this session wants to hear of."""
    for owner in owners:
        for key, value in list(owner.metadata.items()):
            if key in session.subscribed:
                yield owner_name(owner), key, value


def tell_metadata_of_channel(session: "IrcSession", channel: Channel) -> None:
    """Where it is much, that it can be asked for (draft/metadata, postponed synchronization)."""
    others = (channel, *(user for user in channel.members if user is not session.user))
    known = subscribed_metadata(session, others)
    some = list(itertools.islice(known, METADATA_AT_ONCE + 1))
    if len(some) > METADATA_AT_ONCE:
        return session.reply(ERR_METADATASYNCLATER, channel.name)
    for one in some:
        session.learns(*one)


def tell_channel(session: "IrcSession", channel: Channel) -> None:
    """What somebody is told who has come into it."""
    if channel.topic:
        tell_topic_irc(session, channel)
    if "draft/read-marker" in session.capabilities:
        session.tell_marker(channel.name)
    if session.subscribed:
        tell_metadata_of_channel(session, channel)
    if "draft/no-implicit-names" not in session.capabilities:
        tell_names_irc(session, channel)
        session.reply(RPL_ENDOFNAMES, channel.name)


class IrcSession(Session):
    """Somebody with an IRC client."""

    __slots__ = (
        "account",
        "asked",
        "batch",
        "capabilities",
        "client",
        "collected",
        "exchange",
        "from_service",
        "labelled",
        "login",
        "message",
        "negotiating",
        "own_tags",
        "password",
        "away",
        "metadata",
        "realname",
        "secret",
        "subscribed",
        "username",
        "wanted",
        "watched",
        "wire",
        "withheld",
    )
    probed = True

    def __init__(self, site: Site, conn: Any):
        super().__init__(site, conn)
        self.wanted = self.asked = ""  # the name, until there is a user; also one refused
        self.username = self.realname = self.password = ""
        self.negotiating = False  # capabilities; until it is over nobody comes in
        self.watched: dict[str, str] = {}  # names by key, see MONITOR
        self.message = Message("", [], {})  # that is being answered
        self.labelled: Labelled | None = None  # where its answer began, if it has a label
        self.batch = ""  # that this answer is in, if it is more than a line
        self.subscribed: dict[str, None] = {}  # keys of metadata
        self.secret = self.client = ""
        self.account = self.away = ""  # logged in to, and away, before there is a user
        self.login = ""  # Account.identity of that account
        self.from_service = False  # the answer that is waited for is NickServ's
        self.metadata: dict[str, str] = {}  # likewise
        self.exchange: Exchange | None = None  # of SASL, going on
        self.collected: Collected | None = None  # a message of several lines, as it comes
        self.withheld: set[int] = set()  # ids of what this session did and gets no echo of
        # Of what this session did in this turn, by id: add_tag or add_tag_to_all, and the tag
        self.own_tags: dict[int, tuple[Callable, str]] = {}
        self.capabilities: frozenset[str] = frozenset()  # enabled by CAP REQ
        self.wire = irc_wire(self.capabilities)

    @property
    def nick(self) -> str:
        return self.user.name if self.user else self.wanted or "*"

    @property
    def follows(self) -> bool:
        return "extended-monitor" in self.capabilities

    def line(self, text: str) -> None:
        """A line of the server's own, without its source."""
        self.say(f":{self.site.name} {text}")

    def say(self, text: str) -> None:
        """A whole line."""
        data = irc_bytes(text)
        if self.wire.timed:
            data = add_tag(data, f"time={tag_time(self.site.hub.now)}")
        self.send(data)

    def shaped(self, shape: str, *values: Any) -> str:
        """A numeric, without its source."""
        number, rest = shape.split(" ", 1)
        return f"{number} {self.nick} {rest.format(*values)}"

    def reply(self, shape: str, *values: Any) -> None:
        self.line(self.shaped(shape, *values))

    def shaped_line(self, shape: str, *values: Any) -> bytes:
        """The whole line of it, not yet said."""
        return irc_bytes(f":{self.site.name} {self.shaped(shape, *values)}")

    def reply_list(
        self, shape: str, words: Iterable[str], *values: Any, between: str = " "
    ) -> None:
        """As many replies as it takes for all the words, which stand behind the values."""
        head = f":{self.site.name} {shape} {self.nick} {' '.join(map(str, values))}"
        for line in wrapped(words, IRC_BYTES - 2 - len(head.encode()), between):
            self.reply(shape, *values, line)

    def notice(self, text: str) -> None:
        self.line(f"NOTICE {self.nick} :{text}")

    def killed(self, by: Source, reason: str) -> None:
        self.say(f":{by.mask} KILL {self.nick} :{reason}")
        super().killed(by, reason)

    def replaced(self) -> None:
        self.fail("SESSION", "REPLACED", "another connection of yours has this place now")
        super().replaced()

    def fail(self, verb: str, code: str, text: str, *about: str) -> None:
        """A standard reply (IRCv3), for what no numeric says."""
        params = "".join(f"{as_param(one)} " for one in about)
        self.line(f"FAIL {verb} {code} {params}:{text}")

    def not_kept(self, events: list[Event], reason: str) -> None:
        """An echo would say that they are: this comes in its place."""
        for event in events:
            self.withheld.add(event.id)
            own_id = parse_tags(event.tags).get(OWN_ID, "")
            self.tell_not_kept(f"{event.id:x}", *[own_id] if own_id else [], reason=reason)

    def tell_not_kept(self, *ids: str, reason: str) -> None:
        """The server's id of a message, and its sender's if it has one."""
        self.fail("PRIVMSG", "NOT_KEPT", f"delivered but not kept: {reason}", *ids)

    def farewell(self, text: str) -> None:
        self.send(irc_bytes(f"ERROR :{text}"))

    def probe(self) -> None:
        """Ask whether anybody is there."""
        self.send(irc_bytes(f"PING :{self.site.name}"))

    def service_says(self, text: str) -> None:
        self.say(f":{SERVICE}!{SERVICE}@{self.site.name} NOTICE {self.nick} :{text}")

    def refuse(self, refusal: Refused) -> None:
        number, text = REFUSALS.get(refusal.code), harmless(str(refusal))
        if self.from_service and not self.deferred:
            return self.service_says(text)
        if number is None:
            return self.fail(self.message.verb or "*", refusal.code, text, *refusal.about)
        about = "".join(f"{as_param(one)} " for one in refusal.about)
        self.line(f"{number} {self.nick} {about}:{text}")

    def place_entered(self, channel: Channel) -> None:
        tell_channel(self, channel)

    def place_renamed(self, old: str, channel: Channel, reason: str) -> None:
        if "draft/channel-rename" in self.capabilities:
            return
        mask = self.user.source.mask
        self.say(
            f":{mask} PART {old} :renamed to {channel.name}" + (f": {reason}" if reason else "")
        )
        self.say(f":{mask} JOIN {channel.name}")
        tell_channel(self, channel)

    def learns(self, name: str, key: str, value: str) -> None:
        if key not in self.subscribed:
            return
        if value:
            self.reply(RPL_KEYVALUE, name, key, value)
        else:
            self.reply(RPL_KEYNOTSET, name, key)

    def read_on(self, name: str) -> None:
        if "draft/read-marker" in self.capabilities:
            self.tell_marker(name)

    def tell_marker(self, name: str) -> None:
        when = self.site.hub.markers.of(self.user, fold(name))
        self.line(f"MARKREAD {name} {f'timestamp={tag_time(when)}' if when else '*'}")

    def spotted(self, source: Source, online: bool) -> None:
        if online:
            self.reply(RPL_MONONLINE, source.mask)
        else:
            self.reply(RPL_MONOFFLINE, source.name)

    def receive(self, line: bytes) -> None:
        self.from_service = False
        try:
            self.message = message = self.parse(line)
            if "batch" in message.tags:
                collect(self, message)
            elif message.verb:
                if message.tags and "labeled-response" in self.capabilities:
                    self.begin_answer(message.tags.get("label", ""))
                irc_command.run(self, message.verb, lambda most: message.params[:most])
        except Refused as refusal:
            self.refuse(refusal)
        self.mark_answer(whole=not (self.deferred or self.unfinished))

    def parse(self, line: bytes) -> Message:
        tags, _, body = line.partition(b" ") if line[:1] == b"@" else (b"", b"", line)
        if line == TOO_LONG or len(body) > IRC_BYTES - 2 or len(tags) > TAGS_BYTES:
            text = f"a line has at most {IRC_BYTES} bytes, and {TAGS_BYTES - 1} of tags"
            raise Refused("LINE_TOO_LONG", text)
        if b"\r" in line or b"\0" in line:  # they would end what is made of it
            line = line.translate(None, b"\r\0")
        try:
            return parse_message(line.decode())
        except UnicodeDecodeError:
            broken = parse_message(line.decode(errors="replace"))
            self.message = broken._replace(verb=as_param(broken.verb))
            if "labeled-response" in self.capabilities:
                self.begin_answer(broken.tags.get("label", ""))
            text = "that line is not UTF-8 text; nobody got it"
            raise Refused("INVALID_UTF8", text) from None

    # What was asked with a label is answered with it (IRCv3 labeled-response)

    def begin_answer(self, label: str) -> None:
        if label:
            turn = self.site.hub.turn
            label = cut(label, LABEL_BYTES)
            events, last_id = len(turn.events), self.site.hub.last_id
            self.labelled = Labelled(escaped_tag(label), len(self.replies), events, last_id)

    def resume_answer(self) -> None:
        """From here on: it took until another turn, or others have been heard meanwhile."""
        if self.labelled:
            self.begin_answer(unescaped_tag(self.labelled.label))

    def go_on(self) -> None:
        self.resume_answer()
        super().go_on()
        if self.unfinished:
            self.mark_answer(whole=False)

    def take_result(self, then: Callable, result: Any) -> None:
        self.resume_answer()
        super().take_result(then, result)
        if self.deferred:
            self.mark_answer(whole=False)

    def answered(self) -> None:
        self.mark_answer(whole=True)

    def mark_answer(self, whole: bool) -> None:
        """What has been said since it was begun or resumed gets the label; or is put in a
        batch, if it is several lines, or may be yet."""
        if self.labelled is None:
            return
        turn, (label, replies, events, _) = self.site.hub.turn, self.labelled
        heard = {e.id: count for e in turn.events[events:] if (count := self.hears(e))}
        count = sum(heard.values()) + sum(count_answers(data) for _, data in self.replies[replies:])
        if self.batch or count > 1 or (count and not whole):
            self.put_in_batch(heard)
        elif whole:
            if not count:
                self.line("ACK")
            self.tag_answer(heard, add_tag, f"label={label}", replies + 1)
        if whole and self.batch:
            self.send(self.batch_line(f"-{self.batch}"))
        if whole:
            self.labelled, self.batch = None, ""

    def put_in_batch(self, heard: Iterable[int]) -> None:
        """What has been said of the answer, which may have begun to be put there before."""
        begun, hub = self.batch, self.site.hub
        self.batch = begun or hub.new_reference()
        self.tag_answer(heard, add_tag_to_all, f"batch={self.batch}")
        if not begun:
            label, replies, _, last_id = self.labelled
            line = self.batch_line(f"+{self.batch} labeled-response")
            self.replies.insert(replies, (last_id, add_tag(line, f"label={label}")))

    def tag_answer(
        self, heard: Iterable[int], mark: Callable, tag: str, last: int | None = None
    ) -> None:
        """Mark its replies with the tag, and, when they are written, events of these ids."""
        which = slice(self.labelled.replies, last)
        self.replies[which] = [(n, mark(data, tag)) for n, data in self.replies[which]]
        self.own_tags.update(dict.fromkeys(heard, (mark, tag)))

    def batch_line(self, text: str) -> bytes:
        return irc_bytes(f":{self.site.name} BATCH {text}")

    def hears(self, event: Event) -> int:
        """How many lines or batches this session is told of it, if it did that."""
        if event.origin is not self:
            return 0
        (line,) = self.wire.encode(event.audience, [event])
        return count_answers(line) if self.wire.own(event, line) else 0

    def own(self, event: Event, line: bytes) -> bytes:
        if event.id in self.withheld:
            return b""
        data, marked = self.wire.own(event, line), self.own_tags.get(event.id)
        if not data or not marked:
            return data
        mark, tag = marked
        return mark(line, tag) + data[len(line) :]  # whoever speaks to himself hears it twice

    def turn_over(self) -> None:
        super().turn_over()
        self.own_tags.clear()
        self.withheld.clear()

    def ended(self) -> None:
        for name in list(self.watched.values()):
            self.site.hub.watchers.remove(self, name)
        self.watched.clear()
        super().ended()


def isupport(site: Site) -> list[str]:
    """The tokens of 005 (modern.ircdocs.horse, RPL_ISUPPORT parameters)."""
    flags = "".join(sorted(FLAGS))
    ranks, symbols = RANKS, "".join(SYMBOLS.values())
    targets = f"JOIN:,KICK:,LIST:{LIST_TARGETS},MONITOR:{WATCHED},NAMES:,PART:,WHOIS:1"
    return [
        f"AWAYLEN={REASON_BYTES}",
        "BOT=B",
        f"CHATHISTORY={HISTORY_LINES_MOST}",
        "MSGREFTYPES=msgid,timestamp",
        "CASEMAPPING=ascii",
        f"CHANLIMIT=#:{CHANNELS_A_USER}",
        f"CHANMODES={MASK_LISTS},k,l,{flags}",
        f"CHANNELLEN={CHANNEL_BYTES}",
        "CHANTYPES=#",
        "ELIST=CMNTU",
        "EXCEPTS=e",
        "EXTBAN=,am",
        "ACCOUNTEXTBAN=a",
        f"HOSTLEN={HOST_BYTES}",
        "INVEX=I",
        f"KEYLEN={CHANNEL_PASSWORD_BYTES}",
        f"KICKLEN={REASON_BYTES}",
        "MAXLIST=" + ",".join(f"{letter}:{MASKS_A_LIST}" for letter in MASK_LISTS),
        "MODES",
        f"MONITOR={WATCHED}",
        f"NAMELEN={REALNAME_BYTES}",
        f"NETWORK={site.network}",
        f"NICKLEN={NAME_CHARACTERS}",
        f"PREFIX=({ranks}){symbols}",
        "SAFELIST",
        f"STATUSMSG={symbols}",
        f"TARGMAX={targets},PRIVMSG:{TARGETS},NOTICE:{TARGETS}",
        f"TOPICLEN={TOPIC_BYTES}",
        f"USERLEN={USERNAME_BYTES}",
        "UTF8ONLY",
        "WHOX",
    ]


def tell_isupport(session: IrcSession) -> None:
    tokens = isupport(session.site)
    for start in range(0, len(tokens), TOKENS_A_LINE):
        some = tokens[start : start + TOKENS_A_LINE]
        session.reply(RPL_ISUPPORT, " ".join(some))


def tell_lusers(session: IrcSession) -> None:
    hub, house = session.site.hub, session.site.house
    users = list(hub.users.values())
    invisible = sum("i" in user.modes for user in users)
    session.reply(RPL_LUSERCLIENT, len(users) - invisible, invisible)
    session.reply(RPL_LUSEROP, sum(user.is_operator for user in users))
    session.reply(RPL_LUSERUNKNOWN, house.nameless())
    session.reply(RPL_LUSERCHANNELS, len(hub.channels))
    session.reply(RPL_LUSERME, len(users))
    session.reply(RPL_LOCALUSERS, len(users), hub.most_users)
    session.reply(RPL_GLOBALUSERS, len(users), hub.most_users)


def tell_motd(session: IrcSession) -> None:
    lines = session.site.house.motd
    if not lines:
        return session.refuse(Refused("NO_MOTD", "there is no message of the day"))
    session.reply(RPL_MOTDSTART, session.site.name)
    room = IRC_BYTES - 2 - len(f":{session.site.name} {RPL_MOTD} {session.nick}".encode())
    for line in lines:
        for piece in split_text(line, room):
            session.reply(RPL_MOTD, piece)
    session.reply(RPL_ENDOFMOTD)


def welcome(session: IrcSession) -> None:
    """What a client is told when it has come in, in the order that clients rely on."""
    site = session.site
    session.reply(RPL_WELCOME, site.network, session.user.source.mask)
    session.reply(RPL_YOURHOST, site.name, VERSION)
    session.reply(RPL_CREATED, time_text(site.hub.started))
    with_value = "".join(sorted(MASK_LISTS + RANKS + "kl"))
    modes = "".join(sorted(with_value + "".join(FLAGS)))
    user_modes = "".join(sorted(USER_MODES))
    session.reply(RPL_MYINFO, site.name, f"chat.py-{VERSION}", user_modes, modes, with_value)
    tell_isupport(session)
    tell_lusers(session)
    tell_motd(session)
    session.reply(RPL_UMODEIS, "".join(sorted(session.user.modes)))


def abort_sasl(session: IrcSession) -> None:
    session.exchange = None
    session.reply(ERR_SASLABORTED)


def batch_in_pieces(session: IrcSession, kind: str, lines: Iterable[bytes]) -> Iterator[None]:
    """Several lines as one, for who knows batches; the rest can be left for later."""
    batched, reference = "batch" in session.capabilities, session.site.hub.new_reference()
    if batched:
        session.send(session.batch_line(f"+{reference} {kind}"))
    for line in lines:
        session.send(add_tag_to_all(line, f"batch={reference}") if batched else line)
        yield
    if batched:
        session.send(session.batch_line(f"-{reference}"))


def in_batch(session: IrcSession, kind: str, lines: Iterable[bytes]) -> None:
    """The same at once."""
    for _ in batch_in_pieces(session, kind, lines):
        pass


def tell_metadata(session: IrcSession, owner: Any, keys: Iterable[str]) -> None:
    """Values, or that there are none, in a batch."""
    name = owner_name(owner)
    lines = (
        session.shaped_line(RPL_KEYVALUE, name, key, owner.metadata[key])
        if key in owner.metadata
        else session.shaped_line(RPL_KEYNOTSET, name, as_param(key))
        for key in keys
    )
    in_batch(session, f"metadata {name}", lines)


def tell_who_came(session: IrcSession, wanted: str, channels: Iterable[Channel]) -> None:
    """All that a client is told at the beginning; it is in those channels already."""
    welcome(session)
    if "draft/metadata-3" in session.capabilities:
        tell_metadata(session, session.user, session.user.metadata)
    if session.site.hub.accounts.is_foreign(wanted, session.account):
        session.notice(f"{wanted} belongs to an account; /msg {SERVICE} IDENTIFY {wanted} PASSWORD")
    for channel in channels:
        session.say(f":{session.user.source.mask} JOIN {channel.name}")
        tell_channel(session, channel)


def own_place(session: IrcSession) -> User | None:
    """Whoever has this session's secret. It is no log-in: of an account's user it makes no
    more than those who are logged in to it may have."""
    user = session.site.hub.places.get(session.secret)
    if user is None:
        return None
    others = any(one.secret != session.secret for one in user.live)
    if user.account != session.account and (user.account or others):
        text = f"log in to {user.account} to have your place again"
        session.fail("SESSION", "ACCOUNT_REQUIRED", text)
        session.secret = ""  # or it would be the secret of two places
        return None
    return user


def who_is_there(session: IrcSession, wanted: str) -> User | None:
    """The user of the same account under the name that is wanted. Raises Refused if it is
    somebody else's."""
    hub, account = session.site.hub, session.account
    take_name_back(hub, wanted, account)
    check_name(hub, wanted, account=account)
    return hub.users.get(fold(wanted))


def come_in(session: IrcSession) -> None:
    """Once there is all that it takes: a name, USER, and no negotiation going on."""
    if session.user or session.negotiating or not (session.wanted and session.username):
        return
    expected, given = session.site.password, session.password
    if expected and not hmac.compare_digest(given.encode(), expected.encode()):
        session.refuse(Refused("WRONG_PASSWORD", "the server's password is missing or wrong"))
        return session.end("wrong password")
    if session.exchange:  # whoever ends the negotiation in the middle of it has given up
        abort_sasl(session)
    hub = session.site.hub
    if hub.accounts.identity(session.account) != session.login:  # it was given up meanwhile
        session.account = ""
    wanted, session.wanted = session.wanted, ""  # somebody may have taken it meanwhile
    holder = own_place(session) or who_is_there(session, wanted)
    session.password = ""
    if holder:
        if session.secret in holder.secrets:
            session.line("NOTE SESSION RESUMED :you have your place again")
        hub.attach(session, holder)
        if session.account and holder.account != session.account:
            hub.log_in(session, session.account)
    else:
        free = free_name(hub, wanted, account=session.account)
        user = hub.enter(session, free, session.username, session.realname, session.account)
        user.metadata, user.away = session.metadata, session.away
    session.conn.named()
    tell_who_came(session, wanted, session.user.channels if holder else ())


def check_server(session: IrcSession, name: str) -> None:
    """Queries can name the server that is to answer; there is but this one."""
    site, key = session.site, fold(name)
    if not name or key == fold(site.name) or key in site.hub.users:
        return
    session.conn.charge(PATTERN_ITEMS * len(name))
    if not mask_pattern(name).fullmatch(fold(site.name)):
        raise Refused("NO_SUCH_SERVER", "there is no such server; this one stands alone", name)


def each_in_pieces(session: IrcSession, names: str, act: Callable[[str], None]) -> Iterator[None]:
    """Do it for every name of a list, once; what is refused for one is done for the others."""
    for name in {fold(name): name for name in names.split(",") if name}.values() or [""]:
        try:
            act(name)
        except Refused as refusal:
            session.refuse(refusal)
        yield


def each(session: IrcSession, names: str, act: Callable[[str], None]) -> None:
    """The same at once."""
    for _ in each_in_pieces(session, names, act):
        pass


# Registration


@irc_command("PASS", 1, nameless=True)
def irc_pass(session: IrcSession, password: str) -> None:
    """PASS <password> -- the server's password, before the name"""
    if session.user:
        raise Refused("ALREADY_NAMED", "you are in already")
    session.password = password


@irc_command("NICK", most=1, nameless=True)
def irc_nick(session: IrcSession, wanted: str = "") -> None:
    """NICK <nickname> -- take a name, or another one"""
    if not wanted:
        raise Refused("NO_NAME", "which name?")
    hub = session.site.hub
    if clean_name(wanted) == wanted:
        session.asked = wanted
    if session.negotiating and clean_name(wanted) == wanted:
        session.wanted = wanted  # it may be his own, and the proof is still to come
        return
    check_name(hub, wanted, session.user, "" if session.user else session.account)
    if session.user:
        return hub.rename(session, wanted)
    session.wanted = wanted
    come_in(session)


@irc_command("USER", 4, nameless=True)
def irc_user(session: IrcSession, username: str, mode: str, unused: str, realname: str) -> None:
    """USER <username> 0 * <realname> -- say who you are, when you come in"""
    if session.user or session.username:
        raise Refused("ALREADY_NAMED", "that was said already, and cannot be changed")
    if not realname:
        raise Refused("NEED_MORE_PARAMS", "a real name, please", "USER")
    plain = "".join(c for c in username if is_solid(c) and c not in "!@*?~:,")
    # ~ as elsewhere: nobody has verified it (there is no ident)
    session.username = "~" + (cut(plain, USERNAME_BYTES - 1) or "user")
    realname = cut(harmless(realname), REALNAME_BYTES)
    session.realname = realname if is_visible(realname) else plain
    come_in(session)


def set_capabilities(session: IrcSession, capabilities: Iterable[str]) -> None:
    """From now on this session is one of another wire."""
    session.capabilities = frozenset(capabilities)
    session.wire = irc_wire(session.capabilities)
    for channel in session.user.channels if session.user else ():
        channel.by_wire = None


def mechanisms(session: IrcSession) -> list[str]:
    """That this one may log in by."""
    certifiable = session.conn.certifiable
    return [name for name in MECHANISMS if name != "EXTERNAL" or certifiable]


def cap_ls(session: IrcSession, version: str) -> None:
    """With values, and in several lines, for those who know version 302."""
    session.negotiating = session.user is None
    recent = (whole_number(version) or 0) >= 302
    if recent:
        set_capabilities(session, {"cap-notify"} | session.capabilities)
    site, secure = session.site, session.conn.secure
    rules, ways = ",".join(site.registration), ",".join(mechanisms(session))
    known = CAPABILITIES | {"draft/account-registration": rules, "sasl": ways}
    if site.sts and recent:  # a policy, not to be asked for (IRCv3 sts)
        known["sts"] = f"duration={site.sts}" if secure else f"port={site.house.tls_port}"
    offers = [f"{cap}={value}" if value and recent else cap for cap, value in known.items()]
    head = f"CAP {session.nick} LS"
    lines = list(wrapped(offers, IRC_BYTES - 2 - len(f":{session.site.name} {head} * :".encode())))
    for line in lines[:-1] if recent else []:
        session.line(f"{head} * :{line}")
    session.line(f"{head} :{lines[-1]}")


def cap_list(session: IrcSession, _: str) -> None:
    session.line(f"CAP {session.nick} LIST :{' '.join(sorted(session.capabilities))}")


def cap_req(session: IrcSession, text: str) -> None:
    """All of them or none."""
    session.negotiating = session.user is None
    wanted = text.split()
    if any(cap.removeprefix("-") not in CAPABILITIES for cap in wanted):
        return session.line(f"CAP {session.nick} NAK :{text}")
    capabilities = set(session.capabilities)
    for cap in wanted:
        if cap.startswith("-"):
            capabilities.discard(cap[1:])
        else:
            capabilities.add(cap)
    set_capabilities(session, capabilities)
    session.line(f"CAP {session.nick} ACK :{text}")


def cap_end(session: IrcSession, _: str) -> None:
    session.negotiating = False
    come_in(session)


CAP_HANDLERS = {"LS": cap_ls, "LIST": cap_list, "REQ": cap_req, "END": cap_end}


@irc_command("CAP", 1, 2, nameless=True)
def irc_cap(session: IrcSession, subcommand: str, text: str = "") -> None:
    """CAP LS|LIST|REQ|END [<capabilities>] -- agree on extensions of the protocol"""
    handler = CAP_HANDLERS.get(subcommand.upper())
    if handler is None:
        session.line(f"410 {session.nick} {as_param(subcommand)} :CAP has LS, LIST, REQ and END")
    else:
        handler(session, text)


def log_in(session: IrcSession, account: str) -> None:
    """Somebody has proved to own it."""
    user, session.account = session.user, account
    session.login = session.site.hub.accounts.identity(account)
    source = user.source if user else source_of(session.nick, "*:0", session.username or "*")
    session.reply(RPL_LOGGEDIN, source.mask, account, account)
    if user:
        session.site.hub.log_in(session, account)


def fail_sasl(session: IrcSession, refusal: Refused) -> None:
    session.exchange = None
    session.reply(ERR_SASLFAIL, str(refusal))


def end_sasl(session: IrcSession, account: str) -> None:
    exchange, session.exchange = session.exchange, None
    try:
        proven_account(session, account, exchange.verifier)
    except Refused as refusal:
        return fail_sasl(session, refusal)
    log_in(session, account)
    session.reply(RPL_SASLSUCCESS)


def go_on_sasl(session: IrcSession, step: Callable, *values: Any) -> None:
    """The mechanism's next word: for the client, or a job for off the loop."""
    exchange = session.exchange
    try:
        said = step(*values)
    except StopIteration as end:
        return end_sasl(session, end.value)
    except Refused as refusal:
        return fail_sasl(session, refusal)
    if isinstance(said, bytes):
        for piece in exchange.chunks(said):
            session.say(f"AUTHENTICATE {piece}")
    else:
        session.later(said, lambda result: go_on_sasl(session, exchange.mechanism.send, result))


def begin_sasl(session: IrcSession, name: str) -> None:
    if session.user and len(session.user.live) > 1:
        text = "your other devices are logged in, too"
        return session.reply(ERR_SASLALREADY, text)
    if name not in mechanisms(session):
        session.reply(RPL_SASLMECHS, ",".join(mechanisms(session)))
        return fail_sasl(session, wrong_login())
    look_up = certified_account if name == "EXTERNAL" else claimed_account

    def find(authcid: str) -> tuple[str, Verifier]:
        name, session.exchange.verifier = look_up(session, authcid)
        return name, session.exchange.verifier

    session.exchange = Exchange(MECHANISMS[name](find))
    go_on_sasl(session, next, session.exchange.mechanism)


@irc_command("AUTHENTICATE", 1, nameless=True)
def irc_authenticate(session: IrcSession, chunk: str) -> None:
    """AUTHENTICATE <mechanism or base64> -- log in by SASL"""
    if chunk == "*":
        return abort_sasl(session)
    if session.exchange is None:
        return begin_sasl(session, chunk.upper())
    if len(chunk) > SASL_CHUNK:
        session.exchange = None
        return session.reply(ERR_SASLTOOLONG)
    try:
        answer = session.exchange.feed(chunk)
    except Refused as refusal:
        return fail_sasl(session, refusal)
    if answer is not None:
        go_on_sasl(session, session.exchange.mechanism.send, answer)


@irc_command("REGISTER", 3, nameless=True)
def irc_register(session: IrcSession, account: str, email: str, password: str) -> None:
    """REGISTER <account or *> <email or *> <password> -- make your name an account"""
    nick = session.user.name if session.user else session.asked

    def done(name: str, to_be_verified: bool) -> None:
        if to_be_verified:
            text = "a code was sent to you: VERIFY with it"
            return session.line(f"REGISTER VERIFICATION_REQUIRED {name} :{text}")
        session.line(f"REGISTER SUCCESS {name} :{name} is yours; log in with your password")
        log_in(session, name)

    register_account(session, nick, account, email, password, done)


@irc_command("VERIFY", 2, nameless=True)
def irc_verify(session: IrcSession, name: str, code: str) -> None:
    """VERIFY <account> <code> -- the code that was sent to the address of a new account"""
    hub = session.site.hub
    account = hub.accounts.verified(name, code, session.host, hub.now)
    hub.accounts.save(account, hub.turn)
    session.line(f"VERIFY SUCCESS {account.name} :{account.name} is yours")
    log_in(session, account.name)


@irc_command("SESSION", 1, nameless=True)
def irc_session(session: IrcSession, secret: str) -> None:
    """SESSION <secret> -- before NICK: 32 hexadecimal digits that no other client knows. Who
    comes with them again, within a while, has the same place again"""
    if session.user:
        raise Refused("ALREADY_NAMED", "you are here already")
    if not re.fullmatch(rf"[0-9a-f]{{{SECRET_DIGITS}}}", secret):
        raise Refused("BAD_SECRET", f"a secret has {SECRET_DIGITS} hexadecimal digits")
    session.secret = session.client = hashlib.sha256(secret.encode()).hexdigest()


@irc_command("PING", 1, nameless=True)
def irc_ping(session: IrcSession, token: str) -> None:
    """PING <token> -- is anybody there?"""
    session.line(f"PONG {session.site.name} :{token}")


@irc_command("PONG", most=2, nameless=True)
def irc_pong(session: IrcSession, *tokens: str) -> None:
    """PONG <token> -- yes; any line says that"""


@irc_command("ERROR", most=1, nameless=True)
def irc_error(session: IrcSession, text: str = "") -> None:
    """ERROR <text> -- what servers say to each other; nothing happens"""


@irc_command("QUIT", most=1, nameless=True)
def irc_quit(session: IrcSession, reason: str = "") -> None:
    """QUIT [<reason>] -- leave"""
    session.end("Quit" + (f": {cut(reason, REASON_BYTES)}" if reason else ""))


# NickServ, for clients that know no better

service_command = Commands(f"/msg {SERVICE} ")


@service_command("help", most=1)
def service_help(session: IrcSession, verb: str = "") -> None:
    """HELP -- what can be said to NickServ"""
    for command in service_command.values():
        session.service_says(f"{command.syntax}: {command.summary}")


@service_command("register", 1, 2)
def service_register(session: IrcSession, password: str, email: str = "") -> None:
    """REGISTER PASSWORD [EMAIL] -- make your name an account"""

    def done(name: str, to_be_verified: bool) -> None:
        if to_be_verified:
            return session.service_says("a code was sent to you: VERIFY CODE")
        session.service_says(f"{name} is yours")
        log_in(session, name)

    register_account(session, session.nick, "*", email, password, done)


@service_command("verify", 1)
def service_verify(session: IrcSession, code: str) -> None:
    """VERIFY CODE -- the code that was sent to your address"""
    irc_verify(session, session.nick, code)


@service_command("identify", 1, 2)
def service_identify(session: IrcSession, *words: str) -> None:
    """IDENTIFY [NAME] PASSWORD -- log in"""
    name, password = words if len(words) == 2 else (session.nick, *words)
    done = functools.partial(session.service_says, f"you are logged in as {name}")
    identify(session, name, password, done)


@service_command("passwd", 2)
def service_passwd(session: IrcSession, old: str, new: str) -> None:
    """PASSWD OLD NEW -- another password"""
    done = functools.partial(session.service_says, PASSWORD_CHANGED)
    change_password(session, old, new, done)


@service_command("drop", 1)
def service_drop(session: IrcSession, password: str) -> None:
    """DROP PASSWORD -- give up your account"""
    done = functools.partial(session.service_says, ACCOUNT_GONE)
    drop_account(session, password, done)


def cert_add(session: IrcSession, account: str, _: str) -> None:
    hub = session.site.hub
    hub.accounts.certificates.add(session.conn.fingerprint, account, hub.turn)
    session.service_says(f"{session.conn.fingerprint} logs in to {account} now (SASL EXTERNAL)")


def cert_list(session: IrcSession, account: str, _: str) -> None:
    known = session.site.hub.accounts.certificates.of(account)
    for fingerprint in known:
        session.service_says(fingerprint)
    session.service_says(f"{counted(len(known), 'certificate')} of {account}")


def cert_remove(session: IrcSession, account: str, wanted: str) -> None:
    hub, fingerprint = session.site.hub, wanted.lower() or session.conn.fingerprint
    hub.accounts.certificates.remove(fingerprint, account, hub.turn)
    session.service_says(f"{fingerprint} does not log in to {account} any more")


CERT_HANDLERS = {"ADD": cert_add, "LIST": cert_list, "REMOVE": cert_remove}


@service_command("cert", 1, 2)
def service_cert(session: IrcSession, how: str, fingerprint: str = "") -> None:
    """CERT ADD|LIST|REMOVE [FINGERPRINT] -- certificates that log in: add the one you show"""
    handler = CERT_HANDLERS.get(how.upper())
    if handler is None:
        raise Refused("INVALID_PARAMS", "CERT has ADD, LIST and REMOVE")
    handler(session, own_account(session), fingerprint)


@service_command("disown", 1)
def service_disown(session: IrcSession, name: str) -> None:
    """DISOWN #CHANNEL -- let a channel that you founded end with its last member"""
    session.service_says(f"{disown(session, name)} is nobody's now")


def ask_service(session: IrcSession, text: str) -> None:
    """What is said to NickServ reaches neither people nor the history, nor any log."""
    verb, _, rest = text.partition(" ")
    try:
        service_command.run(
            session, verb.lower(), lambda most: rest.split(None, most - 1) if most else []
        )
        session.from_service = session.deferred
    except Refused as refusal:
        session.service_says(str(refusal))


@irc_command("NS", 1, 15)
def irc_ns(session: IrcSession, *words: str) -> None:
    """NS <command> -- the same as PRIVMSG NickServ"""
    ask_service(session, " ".join(words))


# Talking


def check_room(session: IrcSession, name: str, text: str) -> None:
    """Raise Refused if a line with the sender before it, as others get it, is too long."""
    if len(text) * (1 if text.isascii() else 4) <= FITS_ALWAYS:
        return
    room = IRC_BYTES - 2 - len(f":{session.user.source.mask} PRIVMSG {name} :".encode())
    if len(text.encode()) > room:
        raise Refused("LINE_TOO_LONG", f"a message to {name} has at most {room} bytes")


def tell_away(session: IrcSession, user: User) -> None:
    if user.away:
        session.reply(RPL_AWAY, user.name, user.away)


CLIENT_TAG = r"\+[\w./-]+"


def client_tags(session: IrcSession) -> str:
    """What the client being answered has to say to clients (IRCv3 message-tags)."""
    if not session.message.tags or not session.wire.tagged:
        return ""
    tags = ((k, v) for k, v in session.message.tags.items() if re.fullmatch(CLIENT_TAG, k))
    return ";".join(f"{key}={escaped_tag(value)}" if value else key for key, value in tags)


class Past(NamedTuple):
    """What a channel or talk is called, for what was said there."""

    name: str


def repeated(session: IrcSession, name: str, own: str) -> bool:
    """Whether that has been said: the line broke before the client could know. Then it hears
    what it would have heard; of what is not there any more, that it was said."""
    receipts, key = session.site.store.receipts, (session.author, own)
    first = session.site.hub.turn.receipts.get(key)
    if not own or not (first or key in receipts.lost or receipts.knows(*key)):
        return False

    def tell(found: tuple[int, Event | None] | None) -> None:
        if found is None:  # the turn that it was said in could not be kept
            return session.tell_not_kept("*", own, reason="it could not be stored")
        id, event = found
        past = Past(name if name.startswith("#") else "")
        if event is None:
            mask, tags = session.user.source.mask, f"@msgid={id:x};{OWN_ID}={escaped_tag(own)}"
            return session.send(irc_bytes(f"{tags} :{mask} TAGMSG {name}"))
        for line in session.wire.encode(past, [event]) if session.wire.echo else ():
            session.send(line)

    if key in receipts.lost:
        session.tell_not_kept("*", own, reason="it was said before, and could not be kept")
    elif first and session.site.store.path is None:  # which loses nothing, and is read too soon
        tell((first.id, first))
    else:
        session.read(functools.partial(receipts.event, *key), tell)
    return True


def speak(
    session: IrcSession, audience: Any, text: str, kind: str, tags: str, own: str = ""
) -> None:
    hub = session.site.hub
    hub.say(session, audience, text, kind, tags)
    if own:
        hub.turn.receipts[session.author, own] = hub.turn.events[-1]
    if isinstance(audience, Conversation) and kind is MESSAGE:
        tell_away(session, audience.partner(session.user))


def say(session: IrcSession, name: str, text: str, kind: str = MESSAGE) -> None:
    hub = session.site.hub
    own = client_id(session, session.message.params[0])
    if own and repeated(session, name, own):
        return
    try:
        audience = hub.find_audience(session, name)
    except Refused:
        if fold(name) != SERVICE_KEY or kind is not MESSAGE:
            raise
        return ask_service(session, text)
    check_room(session, name, text)
    if kind is MESSAGE and text.startswith("\x01ACTION "):
        kind, text = ACTION, text[8:].removesuffix("\x01")
    speak(session, audience, text, kind, client_tags(session), own)


@irc_command("PRIVMSG", most=2)
def irc_privmsg(session: IrcSession, targets: str = "", text: str = "") -> None:
    """PRIVMSG <target>{,<target>} <text> -- say something to people and channels"""
    if not targets:
        raise Refused("NO_RECIPIENT", "to whom?")
    if not text:
        raise Refused("NO_TEXT", "there is nothing to say")
    if targets.count(",") >= TARGETS:
        raise Refused("TOO_MANY_TARGETS", f"{TARGETS} targets at most; nobody got it", targets)
    each(session, targets, lambda name: say(session, name, text))


@irc_command("NOTICE", most=2)
def irc_notice(session: IrcSession, targets: str = "", text: str = "") -> None:
    """NOTICE <target>{,<target>} <text> -- the same, but nothing answers it"""
    names = {fold(name): name for name in targets.split(",")[:TARGETS]}
    for name in names.values() if text else ():
        with contextlib.suppress(Refused):
            say(session, name, text, NOTICE)


@irc_command("TAGMSG", most=1)
def irc_tagmsg(session: IrcSession, targets: str = "") -> None:
    """TAGMSG <target>{,<target>} -- send nothing but the tags before it"""
    if not targets:
        raise Refused("NO_RECIPIENT", "to whom?")
    hub, tags = session.site.hub, client_tags(session)
    if tags:
        each(
            session,
            targets,
            lambda name: hub.say(session, hub.find_audience(session, name), "", TAGS, tags),
        )


@irc_command("BATCH", 1, 3)
def irc_batch(session: IrcSession, reference: str, kind: str = "", target: str = "") -> None:
    """BATCH +<reference> draft/multiline <target> | -<reference> -- say several lines as one"""
    sign, reference = reference[:1], reference[1:]
    if sign == "+":
        if kind != "draft/multiline" or not target:
            raise Refused("UNKNOWN_TYPE", "only messages of several lines come so", reference)
        label = session.message.tags.get("label", "")
        if session.collected:
            text = "there is one already; end that first"
            raise Refused("MULTILINE_INVALID", text, reference)
        tags = client_tags(session)
        session.collected = Collected(reference, target, label, tags, client_id(session, target))
        session.labelled = None  # the answer comes at its end
        return
    done, session.collected = session.collected, None
    if done is None or done.reference != reference or sign != "-":
        raise Refused("INVALID_REFTAG", "there is no such batch", reference)
    if done.failed:
        return
    if done.label and "labeled-response" in session.capabilities:
        session.begin_answer(done.label)
    if not done.text.strip("\n"):
        raise Refused("MULTILINE_INVALID", "there is nothing to say")
    if repeated(session, done.target, done.own_id):
        return
    hub, kind = session.site.hub, MESSAGE if done.verb == "PRIVMSG" else NOTICE
    audience = hub.find_audience(session, done.target)
    speak(session, audience, done.text, kind, done.tags, done.own_id)


@irc_command("AWAY", most=1, nameless=True)
def irc_away(session: IrcSession, reason: str = "") -> None:
    """AWAY [<reason>] -- say that you are not here, or without a reason that you are back"""
    if session.user:
        session.site.hub.set_away(session, reason)
    else:
        session.away = cut(reason, REASON_BYTES)
    session.reply(RPL_NOWAWAY if reason else RPL_UNAWAY)


@irc_command("SETNAME", 1)
def irc_setname(session: IrcSession, realname: str) -> None:
    """SETNAME <realname> -- change your real name"""
    realname = harmless(realname)
    if not is_visible(realname) or len(realname.encode()) > REALNAME_BYTES:
        text = f"a real name has 1 to {REALNAME_BYTES} bytes that can be seen"
        return session.fail("SETNAME", "INVALID_REALNAME", text)
    set_realname(session, realname)


# Channels


def tell_of_newcomer(session: IrcSession, channel: Channel) -> None:
    """What is known of somebody who came (metadata), to those who want to hear of it."""
    if not session.user.metadata:
        return
    for other in itertools.chain(*(user.live for user in channel.members)):
        for key, value in session.user.metadata.items() if other is not session else ():
            other.learns(session.nick, key, value)


def join_irc(session: IrcSession, name: str, password: str) -> None:
    if channel := enter_channel(session, name, password):
        tell_channel(session, channel)
        tell_of_newcomer(session, channel)


@irc_command("JOIN", 1, 2)
def irc_join(session: IrcSession, names: str, keys: str = "") -> Iterator[None]:
    """JOIN <channel>{,<channel>} [<key>{,<key>}] -- enter channels; JOIN 0 leaves all"""
    if names == "0":
        for channel in list(session.user.channels):
            session.site.hub.part(session, channel)
        return
    passwords = dict(zip(names.split(","), keys.split(","), strict=False))
    enter = functools.partial(join_irc, session)
    yield from each_in_pieces(session, names, lambda name: enter(name, passwords.get(name, "")))


@irc_command("PART", 1, 2)
def irc_part(session: IrcSession, names: str, reason: str = "") -> None:
    """PART <channel>{,<channel>} [<reason>] -- leave channels"""
    hub = session.site.hub
    each(session, names, lambda name: hub.part(session, hub.find_channel(name), reason))


@irc_command("TOPIC", 1, 2)
def irc_topic(session: IrcSession, name: str, topic: str | None = None) -> None:
    """TOPIC <channel> [<topic>] -- read or set what a channel is about"""
    channel = session.site.hub.find_channel(name)
    if topic is not None:
        return set_topic(session, channel, cut(topic, TOPIC_BYTES))
    if not channel.visible_to(session.user):
        channel.member(session.user)
    if not channel.topic:
        return session.reply(RPL_NOTOPIC, channel.name)
    tell_topic_irc(session, channel)


@irc_command("NAMES", most=1)
def irc_names(session: IrcSession, names: str = "") -> Iterator[None]:
    """NAMES [<channel>{,<channel>}] -- who is in channels"""
    for key in dict.fromkeys(map(fold, names.split(","))):
        channel = session.site.hub.channels.get(key)
        if channel and channel.visible_to(session.user):
            session.conn.charge(len(channel.members))
            tell_names_irc(session, channel)
            yield
    session.reply(RPL_ENDOFNAMES, as_param(names))


LIST_BOUND = re.compile(r"([CT]?)([<>])(\d{1,9})")


def within(channel: Channel, what: str, sign: str, number: str, now: int) -> bool:
    """Whether a channel is on that side of a bound: users, or the minutes since it was
    created (C), or since its topic was set (T)."""
    if not what:
        value = float(len(channel.members))
    elif what == "T" and not channel.topic:
        return False
    else:
        value = (now - (channel.created if what == "C" else channel.topic_time)) / 60_000
    return value < int(number) if sign == "<" else value > int(number)


def list_filter(conditions: str, now: int) -> Callable[[Channel], bool]:
    """ELIST: every condition has to hold, and of the names and masks one."""
    bounds = [b for c in conditions.split(",") if (b := LIST_BOUND.fullmatch(c))]
    texts = [c for c in conditions.split(",") if c and not LIST_BOUND.fullmatch(c)]
    masks = [mask_pattern(text) for text in texts if text[0] != "!"]
    excluded = [mask_pattern(text[1:]) for text in texts if text[0] == "!"]

    def matches(channel: Channel) -> bool:
        return (
            (not masks or any(mask.fullmatch(channel.key) for mask in masks))
            and not any(mask.fullmatch(channel.key) for mask in excluded)
            and all(within(channel, *bound.groups(), now) for bound in bounds)
        )

    return matches


@irc_command("LIST", most=2)
def irc_list(session: IrcSession, conditions: str = "", server: str = "") -> Iterator[None]:
    """LIST [<channel or condition>{,...}] -- the channels: >9, <9, C<5, T>5, *mask*, !*mask*"""
    check_server(session, server)
    hub, user = session.site.hub, session.user
    if conditions.count(",") >= LIST_TARGETS:
        raise Refused("TOO_MANY_TARGETS", f"{LIST_TARGETS} conditions at most", conditions)
    session.conn.charge(len(hub.channels) + PATTERN_ITEMS * len(conditions))
    wanted = list_filter(conditions, hub.now)
    session.reply(RPL_LISTSTART)
    for channel in [channel for channel in hub.channels.values() if wanted(channel)]:
        if channel.members and channel.visible_to(user):
            session.reply(RPL_LIST, channel.name, len(channel.members), channel.topic)
            yield
    session.reply(RPL_LISTEND)


@irc_command("INVITE", most=2)
def irc_invite(session: IrcSession, name: str = "", where: str = "") -> None:
    """INVITE [<nickname> <channel>] -- ask somebody in; alone, who asked you"""
    hub = session.site.hub
    if not name:
        for channel in session.user.invitations:
            if hub.channels.get(channel.key) is channel:
                session.reply(RPL_INVITELIST, channel.name)
        return session.reply(RPL_ENDOFINVITELIST)
    if not where:
        raise Refused(
            "NEED_MORE_PARAMS", "it goes like this: INVITE <nickname> <channel>", "INVITE"
        )
    user, channel = hub.find_user(name), hub.find_channel(where)
    invite(session, user, channel)
    session.reply(RPL_INVITING, user.name, channel.name)
    tell_away(session, user)


@irc_command("KICK", 2, 3)
def irc_kick(session: IrcSession, names: str, victims: str, reason: str = "") -> None:
    """KICK <channel> <nickname>{,<nickname>} [<reason>] -- put people out"""
    hub, channels, people = session.site.hub, names.split(","), victims.split(",")
    if len(channels) == 1:
        channels *= len(people)
    if len(channels) != len(people):
        text = "one channel, or as many as people"
        raise Refused("NEED_MORE_PARAMS", text, "KICK")
    for where, name in zip(channels, people, strict=True):
        try:
            channel = hub.find_channel(where)
            channel.require(session.user)  # before anybody is told who is here
            kick(session, channel, hub.find_user(name), reason)
        except Refused as refusal:
            session.refuse(refusal)


def tell_masks(session: IrcSession, channel: Channel, letter: str) -> None:
    channel.require_inside(session.user)
    line, end = LIST_REPLIES[letter]
    for mask in channel.lists[letter].values():
        session.reply(line, channel.name, mask.text, mask.setter, mask.when // 1000)
    session.reply(end, channel.name)


def user_mode(session: IrcSession, name: str, letters: str) -> None:
    """One's own: nobody changes, or sees, those of somebody else."""
    user = session.site.hub.find_user(name)
    if user is not session.user:
        raise Refused("NOT_YOURSELF", "only your own modes are yours to see and change")
    if not letters:
        return session.reply(RPL_UMODEIS, "".join(sorted(user.modes)))
    changed, unknown = [], False
    for change in parse_modes(letters[:USER_MODES_AT_ONCE], ()):
        if change.letter not in USER_MODES:
            unknown = True
        elif change.on != (change.letter in user.modes) and not (
            change.on and change.letter == "o"
        ):
            user.modes ^= {change.letter}  # nobody makes himself an operator; OPER does
            changed.append(change)
    if changed:
        user.changed(bot="B" in user.modes)
        session.say(f":{user.source.mask} MODE {user.name} {format_modes(changed)}")
    if unknown:
        text = f"there are only the user modes {''.join(USER_MODES)}"
        raise Refused("UNKNOWN_USER_MODE", text)


@irc_command("MODE", 1, 15)
def irc_mode(session: IrcSession, name: str, letters: str = "", *values: str) -> None:
    """MODE <channel or nickname> [<modes> [<value>...]] -- read or change modes"""
    if not name.startswith("#"):
        return user_mode(session, name, letters)
    channel = session.site.hub.find_channel(name)
    if not channel.visible_to(session.user):
        channel.require_inside(session.user)
    if not letters:
        session.reply(RPL_CHANNELMODEIS, channel.name, channel.modes_text(session.user))
        return session.reply(RPL_CREATIONTIME, channel.name, channel.created // 1000)
    changes = parse_modes(letters, values)
    queries = {c.letter: None for c in changes if c.letter in MASK_LISTS and not c.value}
    for letter in queries:
        tell_masks(session, channel, letter)
    changes = [c for c in changes if c.value or c.letter not in MASK_LISTS]
    for refusal in apply_modes(session, channel, changes):
        session.refuse(refusal)


@irc_command("RENAME", 2, 3)
def irc_rename(session: IrcSession, name: str, wanted: str, reason: str = "") -> None:
    """RENAME <channel> <new name> [<reason>] -- give a channel another name"""
    channel = session.site.hub.find_channel(name)
    rename_channel(session, channel, wanted, cut(reason, REASON_BYTES))


# Metadata (draft/metadata-3)

METADATA_KEY = re.compile(rf"[a-z0-9_./-]{{1,{METADATA_KEY_BYTES}}}")


def check_key(key: str) -> str:
    if not METADATA_KEY.fullmatch(key):
        raise Refused("INVALID_KEY", "a key is made of a-z, 0-9, _, ., / and -", key)
    return key


def metadata_owner(session: IrcSession, target: str) -> Any:
    """Whose metadata that is. Raises Refused where they may not be seen."""
    hub = session.site.hub
    if target == "*" or fold(target) == fold(session.nick):
        return session.user or session
    known = hub.channels if target.startswith("#") else hub.users
    owner = known.get(fold(target)) if session.user else None
    closed = isinstance(owner, Channel) and (owner.password or owner.flags & set("is"))
    if owner is None or (closed and session.user not in owner.members):
        raise Refused("INVALID_TARGET", "there is nothing of it that you may see", target)
    return owner


def metadata_writable(session: IrcSession, target: str, key: str) -> Any:
    owner = metadata_owner(session, target)
    user = session.user
    if isinstance(owner, Channel):
        member = owner.members.get(user)
        allowed = user.is_operator or (member and member.level <= RANKS.index("o"))
    else:
        allowed = owner in (user, session) or user.is_operator
    if not allowed:
        raise Refused("KEY_NO_PERMISSION", "that is not yours to change", target, key)
    return owner


def metadata_get(session: IrcSession, target: str, *keys: str) -> None:
    tell_metadata(session, metadata_owner(session, target), keys)


def metadata_list(session: IrcSession, target: str) -> None:
    owner = metadata_owner(session, target)
    tell_metadata(session, owner, list(owner.metadata))


def metadata_owners(session: IrcSession, target: str) -> list[Any]:
    """Somebody; a channel with its members; or all that this session hears of. Raises Refused."""
    if target == "*ALL" and session.user:
        people = (session.site.hub.users.get(key) for key in session.watched)
        channels = list(session.user.channels)
        members = itertools.chain(*(channel.members for channel in channels))
        found = dict.fromkeys([session.user, *channels, *members, *filter(None, people)])
        return list(found)
    owner = metadata_owner(session, target)
    return [owner, *owner.members] if isinstance(owner, Channel) else [owner]


def metadata_sync(session: IrcSession, target: str) -> Iterator[None]:
    owners = metadata_owners(session, target)
    session.conn.charge(len(owners))
    known = subscribed_metadata(session, owners)
    lines = (session.shaped_line(RPL_KEYVALUE, *one) for one in known)
    name = target if target == "*ALL" else owner_name(owners[0])
    yield from batch_in_pieces(session, f"metadata {name}", lines)


def metadata_set(session: IrcSession, target: str, key: str, value: str = "") -> None:
    owner = metadata_writable(session, target, check_key(key))
    if len(value.encode()) > METADATA_BYTES:
        raise Refused("INVALID_VALUE", f"a value has at most {METADATA_BYTES} bytes", key)
    if value and key not in owner.metadata and len(owner.metadata) >= METADATA_KEYS:
        raise Refused("LIMIT_REACHED", f"{METADATA_KEYS} keys at most", target)
    name = target if owner is session else owner.name
    if owner is session:
        session.metadata.update({key: value})
        session.metadata = {known: text for known, text in session.metadata.items() if text}
    else:
        set_metadata(session, owner, key, value)
    if value:
        session.reply(RPL_KEYVALUE, name, key, value)
    else:
        session.reply(RPL_KEYNOTSET, name, key)


def metadata_clear(session: IrcSession, target: str) -> None:
    owner = metadata_writable(session, target, "*")
    keys = list(owner.metadata)
    for key in keys:
        set_metadata(session, owner, key, "")
    tell_metadata(session, owner, keys)


def metadata_sub(session: IrcSession, target: str, *keys: str) -> None:
    for key in keys:
        if len(session.subscribed) >= METADATA_SUBS and key not in session.subscribed:
            raise Refused("TOO_MANY_SUBS", f"{METADATA_SUBS} keys at most", key)
        session.subscribed[check_key(key)] = None
    session.reply(RPL_METADATASUBOK, " ".join(keys))


def metadata_unsub(session: IrcSession, target: str, *keys: str) -> None:
    for key in keys:
        session.subscribed.pop(check_key(key), None)
    session.reply(RPL_METADATAUNSUBOK, " ".join(keys))


def metadata_subs(session: IrcSession, target: str) -> None:
    lines = [session.shaped_line(RPL_METADATASUBS, key) for key in session.subscribed]
    in_batch(session, "metadata-subs", lines)


METADATA_HANDLERS = {  # subcommand -> what does it, and the parameters that it needs and takes
    "CLEAR": (metadata_clear, 0, 0),
    "GET": (metadata_get, 1, 15),
    "LIST": (metadata_list, 0, 0),
    "SET": (metadata_set, 1, 2),
    "SUB": (metadata_sub, 1, 15),
    "SUBS": (metadata_subs, 0, 0),
    "SYNC": (metadata_sync, 0, 0),
    "UNSUB": (metadata_unsub, 1, 15),
}


@irc_command("METADATA", 2, 15, nameless=True)
def irc_metadata(session: IrcSession, target: str, how: str, *params: str) -> Iterator[None] | None:
    """METADATA <target or *> <subcommand> [<key>...] -- what programs know of people and channels:
    GET, LIST, SET, CLEAR, SUB, UNSUB, SUBS, SYNC"""
    handler, least, most = METADATA_HANDLERS.get(how.upper(), (None, 0, 0))
    if handler is None or len(params) < least:
        raise Refused("INVALID_PARAMS", "see HELP METADATA", how)
    return handler(session, target, *params[:most])


# History


def invalid_target(subcommand: str, name: str) -> Refused:
    text = "there is nothing of it that you may read"
    return Refused("INVALID_TARGET", text, subcommand, name)


def readable(session: IrcSession, name: str, about: str) -> Place:
    """Where that is kept, if this user may read it: a channel, a talk with somebody who is
    here, with an account, or with whoever had that name. Raises Refused."""
    hub, user = session.site.hub, session.user
    if name.startswith("#"):
        channel = hub.channels.get(fold(name))
        if channel is None or user not in channel.members:
            raise invalid_target(about, name)
        return place_of(user, channel)
    if other := hub.users.get(fold(name)):
        return place_of(user, conversation(user, other))
    identities = sorted((user.identity, hub.accounts.identity(name)))
    return Place(" ".join(identities), user.identity, fold(name))


def parse_time(text: str) -> int:
    """Milliseconds since 1970. Raises Refused."""
    try:
        moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")
        when = int(moment.replace(tzinfo=datetime.UTC).timestamp() * 1000 + 0.5)
        return min(when, LAST_MOMENT)
    except (ValueError, OverflowError):
        raise Refused("INVALID_PARAMS", "a time looks like 2026-11-22T08:30:05.123Z") from None


def parse_id(text: str) -> int:
    """Of an event, as message-tags have it. Raises ValueError."""
    if len(text) > ID_DIGITS:
        raise ValueError(text)
    return int(text, 16)


def parse_mark(text: str) -> Mark:
    """timestamp=2026-11-22T08:30:05.123Z, or msgid=ID. Raises Refused."""
    kind, _, value = text.partition("=")
    if kind == "timestamp":
        return Mark(time=parse_time(value))
    if kind != "msgid":
        raise Refused("INVALID_MSGREFTYPE", "a selector is *, msgid=... or timestamp=...")
    try:
        return Mark(parse_id(value))
    except ValueError:
        raise Refused("INVALID_PARAMS", "that is no msgid of this server") from None


def tell_targets(session: IrcSession, one: int, other: int, count: int) -> None:
    """Where something was said last between two times, the oldest of them first."""
    first, last, user = min(one, other), max(one, other), session.user
    names = {channel.key: channel.name for channel in user.channels}

    def tell(found: list[tuple[str, Event]]) -> None:
        latest = sorted((e.time, names.get(key) or partner(e)) for key, e in found)
        within = [(when, name) for when, name in latest if first < when < last]
        lines = (
            irc_bytes(f":{session.site.name} CHATHISTORY TARGETS {name} {tag_time(when)}")
            for when, name in within[:count]
        )
        in_batch(session, "draft/chathistory-targets", lines)

    def partner(event: Event) -> str:
        return event.about if event.source.identity == user.identity else event.source.name

    session.read(functools.partial(session.site.store.newest, list(names), user.identity), tell)


def play(session: IrcSession, name: str, events: list[Event]) -> None:
    """What was said, in a batch for who knows them."""
    past = Past(name if name.startswith("#") else "")
    lines = (line for line in session.wire.encode(past, events) if line)
    in_batch(session, f"chathistory {name}", lines)


def history_job(store: Any, how: str, span: Span, marks: list[str], count: int) -> Callable:
    """What a helper has to do for CHATHISTORY."""
    first = None if how == "LATEST" and marks[0] == "*" else parse_mark(marks[0])
    if how == "AROUND":
        return functools.partial(store.around, span, first, count)
    newest = how in ("BEFORE", "LATEST")
    after, before = (None, first) if how == "BEFORE" else (first, None)
    if how == "BETWEEN":
        second = parse_mark(marks[1])
        newest = second.moment < first.moment
        after, before = (second, first) if newest else (first, second)
    return functools.partial(store.page, span._replace(after=after, before=before), count, newest)


CHATHISTORY_MARKS = {"BEFORE": 1, "AFTER": 1, "LATEST": 1, "AROUND": 1, "BETWEEN": 2, "TARGETS": 1}


@irc_command("CHATHISTORY", 4, 5)
def irc_chathistory(session: IrcSession, how: str, name: str, *params: str) -> None:
    """CHATHISTORY <how> <target> <selector> [<selector>] <limit> -- what was said: BEFORE,
    AFTER, LATEST, AROUND, BETWEEN or TARGETS; selectors are *, timestamp=... and msgid=..."""
    how = how.upper()
    *marks, limit = params
    count = whole_number(limit)
    needed = CHATHISTORY_MARKS.get(how)
    if needed is None or len(marks) != needed or not count:
        raise Refused("INVALID_PARAMS", "see HELP CHATHISTORY", how)
    count = min(count, HISTORY_LINES_MOST)
    if how == "TARGETS":
        return tell_targets(
            session, *(parse_time(t.removeprefix("timestamp=")) for t in (name, marks[0])), count
        )
    place = readable(session, name, how)
    kinds = PLAYED if "draft/event-playback" in session.capabilities else SPOKEN
    job = history_job(session.site.store, how, Span(place, kinds), marks, count)

    def show(events: list[Event]) -> None:
        readable(session, name, how)  # or not any more: he was put out meanwhile
        channel = session.site.hub.channels.get(fold(name))
        play(session, channel.name if channel else name, events)

    session.read(job, show)


@irc_command("SEARCH", 1)
def irc_search(session: IrcSession, attributes: str) -> None:
    """SEARCH <attributes> -- what was said with some words: in=<target>;text=<words>;
    from=<nick>;after=<time>;before=<time>;limit=<n>"""
    wanted, user = parse_tags(attributes), session.user
    count = min(whole_number(wanted.get("limit", "")) or HISTORY_LINES, HISTORY_LINES_MOST)
    bounds = {
        name: Mark(time=parse_time(wanted[name])) for name in ("after", "before") if name in wanted
    }
    if not wanted.get("text", "").strip():
        raise Refused("INVALID_PARAMS", "which words?", "text")
    if name := wanted.get("in"):
        places = [readable(session, name, "in")]
    else:
        places = [Place(channel.key) for channel in user.channels]
    span, author = Span(Place(""), SPOKEN, **bounds), fold(wanted.get("from", ""))

    def show(found: list[tuple[Place, Event]]) -> None:
        names = {channel.key: channel.name for channel in user.channels}
        lines = (
            line
            for place, event in found
            if not author or fold(event.source.name) == author
            for line in session.wire.encode(Past(names.get(place.key, "")), [event])
        )
        in_batch(session, "soju.im/search", lines)

    search = functools.partial(session.site.store.words.search, places, wanted["text"], span, count)
    session.read(search, show)


@irc_command("MARKREAD", most=2)
def irc_markread(session: IrcSession, name: str = "", when: str = "") -> None:
    """MARKREAD <target> [timestamp=<time>] -- how far you have read it, on any device"""
    if not is_word(name, NAME_BYTES):
        return session.fail("MARKREAD", "NEED_MORE_PARAMS", "of what?")
    if when:
        if not when.startswith("timestamp="):
            raise Refused("INVALID_PARAMS", "a marker is timestamp=...", name)
        hub, stamp = session.site.hub, parse_time(when.removeprefix("timestamp="))
        stamp = min(stamp, hub.now + TIMES_AHEAD)  # nobody has read the future
        moved = hub.markers.move(session.user, fold(name), stamp, hub.turn)
        for other in session.user.live if moved else ():
            if other is not session:
                other.read_on(name)
    session.tell_marker(name)


@irc_command("REDACT", 2, 3)
def irc_redact(session: IrcSession, name: str, message_id: str, reason: str = "") -> None:
    """REDACT <target> <message id> [<reason>] -- take back what was said"""
    try:
        audience = session.site.hub.find_audience(session, name)
        place = readable(session, name, name)
    except Refused:
        text = "there is nothing of it that you may read"
        raise Refused("INVALID_TARGET", text, name) from None
    try:
        number = parse_id(message_id)
    except ValueError:
        number = 0

    def take_back(event: Event | None) -> None:
        if event is None:
            raise Refused("UNKNOWN_MSGID", "there is no such message", name, message_id)
        try:
            redact(session, audience, event, cut(reason, REASON_BYTES))
        except Refused as refusal:
            text = str(refusal)
            raise Refused("REDACT_FORBIDDEN", text, name, message_id) from None

    # Not what was said to an earlier guest of this name: the one of today has no part in it
    only = Place(place.key)
    session.read(functools.partial(session.site.store.find, only, number), take_back)


# Looking around


def can_see(user: User, other: User) -> bool:
    """In lists: who is +i is seen by those who share a channel."""
    return (
        user is other
        or "i" not in other.modes
        or not user.channels.keys().isdisjoint(other.channels)
    )


def who_flags(user: User, member: Membership | None, multi: bool) -> str:
    """H or G (here or gone), * for operators, the ranks, and B for bots."""
    symbols = member.symbols if member else ""
    here = "G" if user.away else "H"
    star = "*" if user.is_operator else ""
    return here + star + (symbols if multi else symbols[:1]) + ("B" if "B" in user.modes else "")


def who_fits(pattern: re.Pattern, user: User) -> bool:
    source = user.source
    texts = (source.mask, source.name, source.username, source.host, user.realname)
    return any(pattern.fullmatch(fold(text)) for text in texts)


def who_matches(session: IrcSession, mask: str) -> Iterator[tuple[User, Channel | None]]:
    """The users that a WHO means, with a channel that both are in."""
    hub, me = session.site.hub, session.user
    channel, exact = hub.channels.get(fold(mask)), hub.users.get(fold(mask))
    if mask.startswith("#"):
        if channel and channel.visible_to(me):
            yield from ((user, channel) for user in channel.members if can_see(me, user))
        return
    pattern = mask_pattern("*" if mask == "0" else mask)
    session.conn.charge(1 if exact else len(hub.users) + PATTERN_ITEMS * len(mask))
    for user in [exact] if exact else hub.users.values():
        if user is exact or (can_see(me, user) and who_fits(pattern, user)):
            yield user, next((c for c in user.channels if c in me.channels), None)


WHOX_FIELDS = "tcuihsnfdlaor"  # in the order of their answers (ircv3.net, WHOX)


def who_values(
    session: IrcSession, user: User, channel: Channel | None, flags: str, token: str
) -> dict[str, str]:
    """By the letters of WHOX."""
    source, hub = user.source, session.site.hub
    return {
        "t": as_param(token),
        "c": channel.name if channel else "*",
        "u": source.username,
        "i": source.host,
        "h": source.host,
        "s": session.site.name,
        "n": source.name,
        "f": flags,
        "d": "0",  # hops
        "l": str((hub.now - user.spoke) // 1000),
        "a": user.account or "0",
        "o": "n/a",  # there are no levels of operators
        "r": f":{user.realname}",
    }


@irc_command("WHO", most=2)
def irc_who(session: IrcSession, mask: str = "*", options: str = "") -> Iterator[None]:
    """WHO <channel or mask> [o][%<fields>[,<token>]] -- the people that match, in a line each"""
    flags, extended, rest = options.partition("%")
    fields, _, token = rest.partition(",")
    multi = "multi-prefix" in session.capabilities
    wanted = [field for field in WHOX_FIELDS if extended and field in fields]
    for user, channel in list(who_matches(session, mask)):
        if "o" in flags and not user.is_operator:
            continue
        member = channel.members.get(user) if channel else None
        values = who_values(session, user, channel, who_flags(user, member, multi), token)
        if wanted:
            session.reply(RPL_WHOSPCRPL, " ".join(values[field] for field in wanted))
        else:
            session.reply(RPL_WHOREPLY, *(values[field] for field in "cuhsnf"), user.realname)
        yield
    session.reply(RPL_ENDOFWHO, as_param(mask))


def whois_lines(session: IrcSession, user: User) -> Iterator[tuple]:
    """The shapes and what goes into them behind the name."""
    me, source = session.user, user.source
    yield RPL_WHOISUSER, source.username, source.host, user.realname
    seen = [
        c for c in user.channels if c.visible_to(me) and (c in me.channels or can_see(me, user))
    ]
    multi = "multi-prefix" in session.capabilities
    symbols = (channel.members[user].symbols for channel in seen)
    names = [(s if multi else s[:1]) + c.name for s, c in zip(symbols, seen, strict=True)]
    session.reply_list(RPL_WHOISCHANNELS, names, user.name)
    if user.account:
        yield RPL_WHOISACCOUNT, user.account
    for key, value in user.metadata.items():
        yield RPL_WHOISKEYVALUE, key, value
    yield RPL_WHOISSERVER, session.site.name, session.site.network
    if user.away:
        yield RPL_AWAY, user.away
    if user.is_operator:
        yield (RPL_WHOISOPERATOR,)
    if "B" in user.modes:
        yield (RPL_WHOISBOT,)
    if user.sessions and all(other.conn.secure for other in user.sessions):
        yield (RPL_WHOISSECURE,)
    if user is me or me.is_operator:
        yield RPL_WHOISACTUALLY, source.host
        for fingerprint in dict.fromkeys(other.conn.fingerprint for other in user.sessions):
            if fingerprint:
                yield RPL_WHOISCERTFP, fingerprint
    yield RPL_WHOISIDLE, (session.site.hub.now - user.spoke) // 1000, user.since // 1000


@irc_command("WHOIS", most=2)
def irc_whois(session: IrcSession, server: str = "", name: str = "") -> None:
    """WHOIS [<server>] <nickname> -- all about somebody"""
    if not name:
        server, name = "", server
    if not name:
        raise Refused("NO_NAME", "about whom?")
    check_server(session, server)
    try:
        user = session.site.hub.find_user(name)
        for shape, *values in whois_lines(session, user):
            session.reply(shape, user.name, *values)
    except Refused as refusal:
        session.refuse(refusal)
    session.reply(RPL_ENDOFWHOIS, as_param(name))


@irc_command("WHOWAS", 1, 3)
def irc_whowas(session: IrcSession, name: str, count: str = "", server: str = "") -> None:
    """WHOWAS <nickname> [<count>] -- who had a name before"""
    check_server(session, server)
    key, most = fold(name), whole_number(count)
    found = [one for one in reversed(session.site.hub.former) if fold(one.source.name) == key]
    for one in found[: most or None]:
        source = one.source
        session.reply(RPL_WHOWASUSER, source.name, source.username, source.host, one.realname)
        session.reply(RPL_WHOISSERVER, source.name, session.site.name, time_text(one.time))
    if not found:
        text = f"nobody was called {name} lately"
        session.refuse(Refused("WAS_NO_SUCH_NAME", text, name))
    session.reply(RPL_ENDOFWHOWAS, as_param(name))


@irc_command("ISON", 1, 15)
def irc_ison(session: IrcSession, *names: str) -> None:
    """ISON <nickname>{ <nickname>} -- which of them are here"""
    users = session.site.hub.users
    here = [users[fold(n)].name for n in " ".join(names).split() if fold(n) in users]
    session.reply_list(RPL_ISON, here or [""])


def userhost(user: User) -> str:
    star, sign = "*" if user.is_operator else "", "-" if user.away else "+"
    return f"{user.name}{star}={sign}{user.source.username}@{user.source.host}"


@irc_command("USERHOST", 1, 5)
def irc_userhost(session: IrcSession, *names: str) -> None:
    """USERHOST <nickname>{ <nickname>} -- where they are, and whether they are away"""
    users = (session.site.hub.users.get(fold(name)) for name in names)
    session.reply_list(RPL_USERHOST, [userhost(user) for user in users if user] or [""])


def tell_monitored(session: IrcSession, names: list[str]) -> None:
    users = session.site.hub.users
    online = [users[fold(name)].source.mask for name in names if fold(name) in users]
    offline = [name for name in names if fold(name) not in users]
    session.reply_list(RPL_MONONLINE, online, between=",")
    session.reply_list(RPL_MONOFFLINE, offline, between=",")


def monitor_add(session: IrcSession, names: list[str]) -> None:
    added = []
    for number, name in enumerate(names):
        if len(session.watched) >= WATCHED and fold(name) not in session.watched:
            session.reply(ERR_MONLISTFULL, WATCHED, as_param(",".join(names[number:])))
            break
        if clean_name(name) != name:  # a mask, or what nobody can be called
            session.refuse(Refused("BAD_NAME", "names only, no masks", name))
        elif fold(name) not in session.watched:
            session.watched[fold(name)] = name
            session.site.hub.watchers.add(session, name)
            added.append(name)
    tell_monitored(session, added)


def monitor_remove(session: IrcSession, names: list[str]) -> None:
    for name in names:
        if session.watched.pop(fold(name), None):
            session.site.hub.watchers.remove(session, name)


def monitor_clear(session: IrcSession, _: list[str]) -> None:
    monitor_remove(session, list(session.watched))


def monitor_list(session: IrcSession, _: list[str]) -> None:
    session.reply_list(RPL_MONLIST, session.watched.values(), between=",")
    session.reply(RPL_ENDOFMONLIST)


def monitor_status(session: IrcSession, _: list[str]) -> None:
    tell_monitored(session, list(session.watched.values()))


MONITOR_HANDLERS = {
    "+": monitor_add,
    "-": monitor_remove,
    "C": monitor_clear,
    "L": monitor_list,
    "S": monitor_status,
}


@irc_command("MONITOR", 1, 2)
def irc_monitor(session: IrcSession, sign: str, names: str = "") -> None:
    """MONITOR +|-|C|L|S [<nickname>{,<nickname>}] -- be told when people come and go"""
    handler = MONITOR_HANDLERS.get(sign.upper())
    if handler is None:
        raise Refused("NEED_MORE_PARAMS", "MONITOR takes +, -, C, L or S", "MONITOR")
    handler(session, [name for name in dict.fromkeys(names.split(",")) if name])


# The server


@irc_command("MOTD", most=1)
def irc_motd(session: IrcSession, server: str = "") -> None:
    """MOTD [<server>] -- the message of the day"""
    check_server(session, server)
    tell_motd(session)


@irc_command("LUSERS", most=2)
def irc_lusers(session: IrcSession, mask: str = "", server: str = "") -> None:
    """LUSERS -- how many people and channels there are"""
    check_server(session, server)
    tell_lusers(session)


@irc_command("VERSION", most=1)
def irc_version(session: IrcSession, server: str = "") -> None:
    """VERSION [<server>] -- what this server is and can do"""
    check_server(session, server)
    session.reply(RPL_VERSION, VERSION, session.site.name, "a chat in one file of Python")
    tell_isupport(session)


@irc_command("STATS", most=2)
def irc_stats(session: IrcSession, letter: str = "", server: str = "") -> None:
    """STATS u|o [<server>] -- time since the start; who may be an operator"""
    check_server(session, server)
    site = session.site
    if letter == "u":
        minutes, seconds = divmod((site.hub.now - site.hub.started) // 1000, 60)
        hours, minutes = divmod(minutes, 60)
        session.reply(RPL_STATSUPTIME, *divmod(hours, 24), minutes, seconds)
    elif letter == "o" and session.user.is_operator:
        for name in site.operators:
            session.reply(RPL_STATSOLINE, as_param(name))
    session.reply(RPL_ENDOFSTATS, as_param(letter[:1]))


@irc_command("LINKS", most=2)
def irc_links(session: IrcSession, server: str = "", mask: str = "") -> None:
    """LINKS -- which servers there are: this one"""
    session.reply(RPL_ENDOFLINKS, "*")


@irc_command("TIME", most=1)
def irc_time(session: IrcSession, server: str = "") -> None:
    """TIME [<server>] -- what time it is here"""
    check_server(session, server)
    session.reply(RPL_TIME, session.site.name, time_text(session.site.hub.now))


@irc_command("ADMIN", most=1)
def irc_admin(session: IrcSession, server: str = "") -> None:
    """ADMIN [<server>] -- whom to ask: see the message of the day"""
    check_server(session, server)
    text = "the message of the day says whom to ask, or nobody does"
    raise Refused("NO_ADMIN", text, session.site.name)


@irc_command("INFO", most=1)
def irc_info(session: IrcSession, server: str = "") -> None:
    """INFO [<server>] -- about this program"""
    check_server(session, server)
    session.reply(RPL_INFO, f"chat.py {VERSION}: a chat in one file of plain Python,")
    session.reply(RPL_INFO, "for IRC clients, netcat, and terminals and windows of its own")
    session.reply(RPL_INFO, f"running since {time_text(session.site.hub.started)}")
    session.reply(RPL_ENDOFINFO)


@irc_command("HELP", most=1)
def irc_help(session: IrcSession, subject: str = "") -> None:
    """HELP [<command>] -- what there is to say to this server"""
    command = irc_command.get(subject.upper())
    if subject and not command:
        raise Refused("NO_HELP", "there is no help on that; HELP lists the commands", subject)
    about = as_param(subject)
    if command:
        session.reply(RPL_HELPSTART, about, command.syntax)
        session.reply(RPL_HELPTXT, about, command.summary)
    else:
        session.reply(RPL_HELPSTART, about, "HELP <command> tells more about one of these:")
        session.reply_list(RPL_HELPTXT, sorted(irc_command), about)
    session.reply(RPL_ENDOFHELP, about)


@irc_command("HELPOP", most=1)
def irc_helpop(session: IrcSession, subject: str = "") -> None:
    """HELPOP [<command>] -- the same as HELP"""
    irc_help(session, subject)


@irc_command("TRACE", most=1)
def irc_trace(session: IrcSession, server: str = "") -> None:
    """TRACE [<server>] -- the way to a server: there is but this one"""
    check_server(session, server)
    session.reply(RPL_TRACEEND, session.site.name, VERSION)


@irc_command("SERVLIST", most=2)
def irc_servlist(session: IrcSession, mask: str = "", kind: str = "") -> None:
    """SERVLIST -- which services there are: none"""
    session.reply(RPL_SERVLISTEND)


def refusing(
    syntax: str, summary: str, code: str, text: str, least: int = 0, **needs: bool
) -> None:
    """Make a command of the RFCs that is always refused here."""

    def handler(session: IrcSession, *params: str) -> None:
        raise Refused(code, text, *params[:least])

    handler.__doc__ = f"{syntax} -- {summary}"
    irc_command(syntax.split()[0], least, 3, **needs)(handler)


ALONE = "this server stands alone"
refusing("SQUERY <service> <text>", "ask a service", "NO_SUCH_SERVICE", "there are none", 1)
refusing("SUMMON <user>", "call a user of this machine", "NO_SUMMON", "SUMMON has been disabled")
refusing("USERS", "the users of this machine", "NO_USERS", "USERS has been disabled")
refusing("SERVER <name>", "be another server", "ALREADY_NAMED", ALONE, nameless=True)
refusing("SERVICE <name>", "be a service", "ALREADY_NAMED", "there are no services", nameless=True)
refusing("CONNECT <server>", "link servers", "NO_SUCH_SERVER", ALONE, 1, privileged=True)
refusing("SQUIT <server>", "unlink a server", "NO_SUCH_SERVER", ALONE, 1, privileged=True)


# For operators of the server


@irc_command("OPER", 2)
def irc_oper(session: IrcSession, name: str, password: str) -> None:
    """OPER <name> <password> -- become an operator of this server"""

    def done() -> None:
        session.reply(RPL_YOUREOPER)
        session.say(f":{session.user.source.mask} MODE {session.nick} +o")

    become_operator(session, name, password, done)


@irc_command("KILL", 1, 2, privileged=True)
def irc_kill(session: IrcSession, name: str, reason: str = "") -> None:
    """KILL <nickname> [<reason>] -- close somebody's connection"""
    kill(session, session.site.hub.find_user(name), reason)


@irc_command("WALLOPS", 1, privileged=True)
def irc_wallops(session: IrcSession, text: str) -> None:
    """WALLOPS <text> -- tell everybody who wants to hear operators (user mode w)"""
    if not text:
        raise Refused("NO_TEXT", "there is nothing to say")
    tell_all(session, text)


@irc_command("REHASH", privileged=True)
def irc_rehash(session: IrcSession) -> None:
    """REHASH -- read the message of the day and the certificate again"""
    session.reply(RPL_REHASHING, "chat.py")
    session.site.house.note(f"REHASH by {session.user.source.mask}")
    session.site.house.rehash(session)


@irc_command("DIE", privileged=True)
def irc_die(session: IrcSession) -> None:
    """DIE -- end the server"""
    session.site.house.note(f"DIE by {session.user.source.mask}")
    session.site.house.stop()


@irc_command("RESTART", privileged=True)
def irc_restart(session: IrcSession) -> None:
    """RESTART -- end the server and start it again"""
    session.site.house.note(f"RESTART by {session.user.source.mask}")
    session.site.house.restart(session)


# ======================================================================================
# LINE DIALECT
# ======================================================================================
# The workshop's protocol: the first line is the name, every other line is said to the
# others. What begins with "/" is a command; what only the server says to one person
# begins with "* ". Every function under @line_command is one of those commands.

LINE_SHAPES = {  # kind -> does the channel stand before it?, and the line itself
    MESSAGE: (True, "{name}: {text}"),
    ACTION: (True, "{name}: *{text}*"),
    JOIN: (True, "{name} ({address}) joined the chat!"),
    PART: (True, "{name} ({address}) left the chat!"),
    QUIT: (False, "{name} ({address}) left the chat!"),
    NICK: (False, "* {name} is now called {text}"),
    TOPIC: (False, "* {name} set the topic of {where}: {text}"),
    NOTICE: (True, "-{name}- {text}"),
    KICK: (False, "* {name} kicked {about} from {where}: {text}"),
    MODE: (False, "* {name} set {text} in {where}"),
    PASSWORD: (False, "* {name} set {text} in {where}"),
    INVITE: (False, "* {name} invites you to {text}; /join {text}"),
    AWAY: (False, "* {name} is away: {text}"),
    WALLOPS: (False, "* {name} tells all operators: {text}"),
    REDACT: (False, "* {name} took back a message in {where}"),
    RENAME: (False, "* {name} renamed {about} to {where}"),
}
LINE_BACK = (False, "* {name} is back")
LINE_CTCP = (True, "* {name} sends a CTCP that only programs understand: {text}")

# The colours of IRC (mIRC's, and hexadecimal ones); its other styles are control characters.
COLOURS = re.compile("\x03(?:\\d{1,2}(?:,\\d{1,2})?)?|\x04(?:[0-9a-fA-F]{6})?")


def line_prefix(audience: Any) -> str:
    """What tells a line of the lobby from one said elsewhere."""
    if isinstance(audience, Conversation):
        return "(private) "
    return f"[{audience.name}] " if audience.name not in ("", LOBBY) else ""


def line_shape(event: Event) -> tuple[bool, str]:
    if event.kind in SPOKEN and event.text.startswith("\x01"):
        return LINE_CTCP
    return LINE_BACK if event.kind == AWAY and not event.text else LINE_SHAPES[event.kind]


def line_texts(event: Event, prefix: str, where: str = "") -> list[str]:
    """The lines of one event, without their ends. A message of several lines is several."""
    if event.kind not in LINE_SHAPES:  # nothing that anybody sees
        return []
    prefixed, shape = line_shape(event)
    known = {**event.source._asdict(), "where": where, "about": event.about}
    return [
        (prefix if prefixed else "") + shape.format(**known, text=text)
        for text in harmless(COLOURS.sub("", event.text)).split("\n")
    ]


class LineWire:
    """Events as lines of the workshop's protocol."""

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """One bytes object an event; all events have this audience."""
        prefix, where = line_prefix(audience), audience.name
        return [
            f"{prefix}{e.source.name}: {e.text}\n".encode()
            if e.kind is MESSAGE and e.text.isprintable()  # all that a storm is made of
            else "".join(f"{line}\n" for line in line_texts(e, prefix, where)).encode()
            for e in events
        ]

    def own(self, event: Event, line: bytes) -> bytes:
        """A speaker hears nothing of what he said: netcat has it on the screen already."""
        if event.kind not in (MODE, PASSWORD):
            return b""
        return f"* you set {harmless(event.text)} in {event.audience.name}\n".encode()


LINE_WIRE = LineWire()
line_command = Commands("/")


def why_renamed(hub: Hub, wanted: str, name: str) -> str:
    cleaned = clean_name(wanted)
    if name != cleaned and hub.accounts.is_foreign(cleaned, ""):
        return f"{cleaned} belongs to an account; if it is yours: /login PASSWORD"
    if name != cleaned:
        return f"{cleaned} is taken"
    never, not_first = "".join(sorted(NOT_IN_NAMES)), "".join(sorted(NOT_FIRST_IN_NAMES))
    return f"names have no spaces or controls, none of {never} and at the start none of {not_first}"


class LineSession(Session):
    """Somebody at the line protocol: netcat, or a workshop client."""

    __slots__ = ("collected", "greeted", "here", "passed", "wanted_lines", "wanted_name")
    wire = LINE_WIRE
    unended = True

    def __init__(self, site: Site, conn: Any, greeted: bool = False):
        super().__init__(site, conn)
        self.greeted = greeted  # by the server: then a person is at the keyboard
        self.here: Channel | None = None  # where plain lines go
        self.passed = site.password is None
        self.wanted_name = ""  # which may be somebody's account, perhaps his own
        self.wanted_lines = 0  # of a message begun with /lines
        self.collected: list[str] = []

    def tell(self, text: str) -> None:
        """A line of the server's own, to this session only."""
        self.send(f"* {text}\n".encode())

    def notice(self, text: str) -> None:
        self.tell(text)

    def not_kept(self, events: list[Event], reason: str) -> None:
        self.tell(f"{counted(len(events), 'message')} delivered but not kept: {reason}")

    def receive(self, line: bytes) -> None:
        try:
            text = self.decode(line)
            if self.wanted_lines:
                self.collect(text)
            elif text[:1] == "/" and text[:2] != "//":
                verb, _, rest = text[1:].strip().partition(" ")
                line_command.run(
                    self, verb.lower(), lambda most: rest.split(None, most - 1) if most else []
                )
            elif self.user is None:
                self.take_name(text)
            else:
                self.say(text[1:] if text[:2] == "//" else text)
        except Refused as refusal:
            self.refuse(refusal)

    def refuse(self, refusal: Refused) -> None:
        self.wanted_lines, self.collected = 0, []  # a message with a bad line is none
        self.tell(str(refusal))

    def decode(self, line: bytes) -> str:
        if line == TOO_LONG:
            raise Refused("TOO_LONG", f"a line has at most {LINE_BYTES} bytes; nobody got it")
        try:
            return line.decode().replace(SOFT_BREAK, "")
        except UnicodeDecodeError:
            raise Refused("NOT_UTF8", "that line is not UTF-8 text; nobody got it") from None

    def say(self, text: str, kind: str = MESSAGE) -> None:
        self.site.hub.say(self, self.place(), text, kind)

    def place(self) -> Channel:
        """Where plain lines go. Whoever was put out of it has to choose another."""
        if self.here is None:
            raise Refused("NOT_IN_CHANNEL", f"you are in no channel; /join {LOBBY}")
        self.here.member(self.user)
        return self.here

    def take_name(self, wanted: str) -> None:
        """The first line, or another try after an empty one."""
        if not self.passed:
            raise Refused("PASSWORD_NEEDED", "this server asks for a password: /pass WORD")
        self.wanted_name = clean_name(wanted)
        user = self.site.hub.enter(self, free_name(self.site.hub, wanted))
        self.conn.named()
        if user.name != wanted:
            self.tell(f"you are {user.name}: {why_renamed(self.site.hub, wanted, user.name)}")
        elif self.greeted:
            self.tell(f"you are {user.name}{self.who_is_here()}; /help")
        self.here = self.site.hub.join(self, LOBBY)

    def move(self) -> None:
        """To a channel that one is in, if need be: the lobby rather than another."""
        channels = self.user.channels
        if self.here and self.here not in channels:
            lobby = self.site.hub.channels.get(LOBBY)
            self.here = lobby if lobby in channels else next(iter(channels), None)
            where = f"you speak in {self.here.name} now" if self.here else "you are in no channel"
            self.tell(where)

    def who_is_here(self) -> str:
        lobby = self.site.hub.channels.get(LOBBY)
        names = [user.name for user in lobby.members] if lobby else []
        some, others = names[:NAMES_GREETED], len(names) - NAMES_GREETED
        more = f" and {others} more" if others > 0 else ""
        if not names:
            return "; nobody else is here yet"
        topic = f"; the topic is: {harmless(lobby.topic)}" if lobby.topic else ""
        return f"; here: {', '.join(some)}{more}{topic}"

    def collect(self, text: str) -> None:
        """One more line of a message begun with /lines."""
        self.collected.append(text)
        message = "\n".join(self.collected)
        if len(message.encode()) > LINE_BYTES:
            raise Refused("TOO_LONG", f"a message has at most {LINE_BYTES} bytes; nobody got it")
        if len(self.collected) == self.wanted_lines:
            self.wanted_lines, self.collected = 0, []
            self.say(message)


def named_channel(session: LineSession, name: str) -> Channel:
    """The channel of that name, or the one the session speaks in."""
    return session.site.hub.find_channel(name) if name else session.place()


def ban_mask(user: User) -> str:
    """What keeps this person out: their address, unless everybody here may have the same."""
    host = user.source.host
    shared = host.startswith("127.") or host == "0::1"
    return f"{user.name}!*@*" if shared else f"*!*@{host}"


def change_modes(session: LineSession, channel: Channel, changes: list[ModeChange]) -> None:
    """Raises Refused for what cannot be done; the rest is."""
    for refusal in apply_modes(session, channel, changes):
        raise refusal


def tell_topic(session: LineSession, channel: Channel) -> None:
    topic = f"is: {harmless(channel.topic)}" if channel.topic else "is not set"
    session.tell(f"the topic of {channel.name} {topic}")


def tell_names(session: LineSession, channel: Channel) -> None:
    """`* #rust 1-3 of 3: @bob, carol, dave`; a crowded channel takes several lines."""
    names = channel.names(session.user)
    for start in range(0, len(names), NAMES_A_LINE):
        some = names[start : start + NAMES_A_LINE]
        span = f"{start + 1}-{start + len(some)} of {len(names)}"
        session.tell(f"{channel.name} {span}: {', '.join(some)}")


@line_command("pass", 1, nameless=True)
def line_pass(session: LineSession, word: str) -> None:
    """/pass WORD -- the server's password, before the name"""
    expected = session.site.password
    if session.user:
        return session.tell("you are in already")
    if expected is None or hmac.compare_digest(word.encode(), expected.encode()):
        session.passed = True
        return session.tell("thank you; now your name")
    wrong_password(session)


@line_command("help", most=1, nameless=True)
def line_help(session: LineSession, verb: str = "") -> None:
    """/help [COMMAND] -- what can be typed here"""
    wanted = verb.removeprefix("/").lower()
    if wanted and wanted not in line_command:
        raise Refused("UNKNOWN_COMMAND", f"there is no /{wanted}; /help lists what there is")
    commands = [line_command[wanted]] if wanted else list(line_command.values())
    columns = max(len(command.syntax) for command in commands)
    for command in commands:
        session.tell(f"{command.syntax:{columns}}  {command.summary}")


@line_command("tell", 2)
def line_tell(session: LineSession, name: str, text: str) -> None:
    """/tell NAME TEXT -- to one person only, or into a #channel you are in"""
    audience = session.site.hub.find_audience(session, name)
    session.site.hub.say(session, audience, text)
    session.tell(f"told {name}: {harmless(text)}")
    if isinstance(audience, Conversation) and (away := audience.partner(session.user).away):
        session.tell(f"{name} is away: {harmless(away)}")


@line_command("join", 1, 2)
def line_join(session: LineSession, name: str, password: str = "") -> None:
    """/join #CHANNEL [PASSWORD] -- enter it, and speak there from now on"""
    channel = enter_channel(session, name, password) or session.site.hub.find_channel(name)
    session.here = channel
    session.tell(f"you speak in {channel.name} now")
    tell_topic(session, channel)
    tell_names(session, channel)


@line_command("part", most=2)
def line_part(session: LineSession, name: str = "", reason: str = "") -> None:
    """/part [#CHANNEL [REASON]] -- leave it, or the one you speak in"""
    channel = named_channel(session, name)
    session.site.hub.part(session, channel, reason)
    session.tell(f"you left {channel.name}")
    if channel is session.here:
        session.move()


@line_command("names", most=1)
def line_names(session: LineSession, name: str = "") -> None:
    """/names [#CHANNEL] -- who is in it; @ marks its operators"""
    channel = named_channel(session, name)
    if not channel.visible_to(session.user):
        channel.member(session.user)
    tell_names(session, channel)


@line_command("list")
def line_list(session: LineSession) -> Iterator[None]:
    """/list -- the channels there are"""
    session.conn.charge(len(session.site.hub.channels))
    for channel in list(session.site.hub.channels.values()):
        topic = f": {harmless(channel.topic)}" if channel.topic else ""
        if channel.members and channel.visible_to(session.user):
            session.tell(f"{channel.name} ({len(channel.members)}){topic}")
            yield


@line_command("topic", most=1)
def line_topic(session: LineSession, text: str = "") -> None:
    """/topic [TEXT] -- read or set the topic of the channel you speak in"""
    channel = session.place()
    if text:
        set_topic(session, channel, text)
    tell_topic(session, channel)


@line_command("me", 1)
def line_me(session: LineSession, text: str) -> None:
    """/me TEXT -- say what you do: /me waves"""
    session.say(text, ACTION)


@line_command("nick", 1)
def line_nick(session: LineSession, wanted: str) -> None:
    """/nick NAME -- take another name"""
    name = free_name(session.site.hub, wanted, session.user)
    session.site.hub.rename(session, name)
    session.tell(
        f"you are {name}"
        + ("" if name == wanted else f": {why_renamed(session.site.hub, wanted, name)}")
    )


@line_command("away", most=1)
def line_away(session: LineSession, reason: str = "") -> None:
    """/away [REASON] -- say that you are not here, or without a reason that you are back"""
    session.site.hub.set_away(session, reason)
    session.tell(f"you went away: {harmless(session.user.away)}" if reason else "you came back")


@line_command("invite", 1, 2)
def line_invite(session: LineSession, name: str, where: str = "") -> None:
    """/invite NAME [#CHANNEL] -- ask somebody in, past any limit or ban"""
    user, channel = session.site.hub.find_user(name), named_channel(session, where)
    invite(session, user, channel)
    session.tell(f"you invited {user.name} to {channel.name}")


@line_command("kick", 1, 2)
def line_kick(session: LineSession, name: str, reason: str = "") -> None:
    """/kick NAME [REASON] -- put somebody out of the channel you speak in"""
    user, channel = session.site.hub.find_user(name), session.place()
    kick(session, channel, user, reason)
    session.tell(f"you kicked {user.name} from {channel.name}")


@line_command("mode", most=1)
def line_mode(session: LineSession, text: str = "") -> None:
    """/mode [MODES] -- see or change the channel you speak in: /mode +m-t, /mode +o NAME"""
    channel = session.place()
    if not text:
        known = "; ".join(f"{letter} {meaning}" for letter, meaning in FLAGS.items())
        session.tell(f"the modes of {channel.name}: {channel.modes_text(session.user)} ({known})")
    letters, *values = text.split() or [""]
    change_modes(session, channel, parse_modes(letters, values))


@line_command("ban", most=1)
def line_ban(session: LineSession, whom: str = "") -> None:
    """/ban [NAME|MASK] -- keep somebody out of the channel you speak in, and put them out"""
    channel, user = session.place(), session.site.hub.users.get(fold(whom))
    if not whom:
        masks = ", ".join(mask.text for mask in channel.lists["b"].values())
        return session.tell(f"banned from {channel.name}: {harmless(masks) or 'nobody'}")
    mask = ban_mask(user) if user else full_mask(whom)
    change_modes(session, channel, [ModeChange(True, "b", mask)])
    meant = [m for m in channel.members if Mask(mask).matches(m)] if mask[:2] != "m:" else []
    for member in set(meant) - {session.user}:
        kick(session, channel, member, "banned")
        session.tell(f"you kicked {member.name} from {channel.name}")


@line_command("unban", 1)
def line_unban(session: LineSession, whom: str) -> None:
    """/unban NAME|MASK -- let them in again"""
    channel, user = session.place(), session.site.hub.users.get(fold(whom))
    keys = {fold(whom), fold(full_mask(whom)), fold(ban_mask(user)) if user else ""}
    found = [channel.lists["b"][key].text for key in keys & channel.lists["b"].keys()]
    if not found:
        raise Refused("NOT_BANNED", f"no ban of {channel.name} is {whom}; /ban lists them")
    change_modes(session, channel, [ModeChange(False, "b", mask) for mask in found])


@line_command("register", 1, 2)
def line_register(session: LineSession, password: str, email: str = "") -> None:
    """/register PASSWORD [EMAIL] -- make your name an account, which nobody else can have"""

    def done(name: str, to_be_verified: bool) -> None:
        if to_be_verified:
            return session.tell("a code was sent to you: /verify CODE")
        session.site.hub.log_in(session, name)
        session.tell(f"{name} is yours; /login PASSWORD next time")

    register_account(session, session.user.name, "*", email, password, done)


@line_command("verify", 1)
def line_verify(session: LineSession, code: str) -> None:
    """/verify CODE -- the code that was sent to your address"""
    hub = session.site.hub
    account = hub.accounts.verified(session.user.name, code, session.host, hub.now)
    hub.accounts.save(account, hub.turn)
    hub.log_in(session, account.name)
    session.tell(f"{account.name} is yours; /login PASSWORD next time")


@line_command("login", 1, 2)
def line_login(session: LineSession, *words: str) -> None:
    """/login [NAME] PASSWORD -- log in to an account; it gives you its name, or whom it is"""
    name, password = words if len(words) == 2 else (session.wanted_name, *words)
    hub = session.site.hub

    def proved(account: str) -> None:
        before = session.user.name
        take_name_back(hub, account, account)
        holder = hub.users.get(fold(account))
        session.tell(f"you are logged in as {account}")
        if holder in (None, session.user):
            hub.log_in(session, account)
            hub.rename(session, account if holder is None else before)
        else:
            become_device(session, holder)
        if session.user.name != before:
            session.tell(f"you are {session.user.name}")
        if session.user is holder:
            session.move()

    check_owner(session, name, password, proved)


@line_command("passwd", 2)
def line_passwd(session: LineSession, old: str, new: str) -> None:
    """/passwd OLD NEW -- another password for your account"""
    done = functools.partial(session.tell, "your password is another now")
    change_password(session, old, new, done)


@line_command("drop", 1)
def line_drop(session: LineSession, password: str) -> None:
    """/drop PASSWORD -- give up your account"""
    drop_account(session, password, functools.partial(session.tell, "your account is gone"))


@line_command("disown", 1)
def line_disown(session: LineSession, name: str) -> None:
    """/disown #CHANNEL -- let a channel that you founded end with its last member"""
    session.tell(f"{disown(session, name)} is nobody's now")


@line_command("oper", 2)
def line_oper(session: LineSession, name: str, password: str) -> None:
    """/oper NAME PASSWORD -- become an operator of this server"""

    def done() -> None:
        session.tell("you are an operator of this server now: /kick, /ban and /topic work anywhere")

    become_operator(session, name, password, done)


@line_command("history", most=2)
def line_history(session: LineSession, *params: str) -> None:
    """/history [#CHANNEL|NAME] [N] -- the last N messages said there"""
    numbers = [whole_number(p) for p in params if p.isdecimal()]
    names = [p for p in params if not p.isdecimal()]
    count = numbers[0] if numbers else HISTORY_LINES
    if not count or count > HISTORY_LINES_MOST:
        raise Refused("BAD_COUNT", f"history comes in 1 to {HISTORY_LINES_MOST} messages")
    audience: Channel | Conversation
    if names and not names[0].startswith("#"):
        audience = conversation(session.user, session.site.hub.find_user(names[0]))
    else:
        audience = named_channel(session, names[0] if names else "")
        audience.member(session.user)
    place = place_of(session.user, audience)
    prefix = line_prefix(audience)

    def show(events: list[Event]) -> None:
        for event in events:
            when = time_text(event.time)
            for text in line_texts(event, prefix):
                session.tell(f"{when} {text}")
        session.tell(f"that was {counted(len(events), 'message')}")

    session.read(functools.partial(session.site.store.page, Span(place), count), show)


@line_command("search", 1)
def line_search(session: LineSession, words: str) -> None:
    """/search WORDS -- what was said with them in the channel you speak in"""
    channel = session.place()
    place = place_of(session.user, channel)

    def show(found: list[tuple[Place, Event]]) -> None:
        for _, event in found:
            for text in line_texts(event, line_prefix(channel)):
                session.tell(f"{time_text(event.time)} {text}")
        session.tell(f"found {counted(len(found), 'message')} with {harmless(words)}")

    job = functools.partial(
        session.site.store.words.search, [place], words, Span(place), HISTORY_LINES
    )
    session.read(job, show)


@line_command("lines", 1)
def line_lines(session: LineSession, count: str) -> None:
    """/lines N -- the next N lines are one message"""
    lines = whole_number(count)
    if not lines or lines > MESSAGE_LINES:
        raise Refused("BAD_COUNT", f"a message has 1 to {MESSAGE_LINES} lines")
    session.wanted_lines = lines


@line_command("quit", most=1, nameless=True)
def line_quit(session: LineSession, reason: str = "") -> None:
    """/quit [REASON] -- leave"""
    session.parting = "Quit" + (f": {cut(reason, REASON_BYTES)}" if reason else "")
    session.meant = True
    session.conn.close()


# ======================================================================================
# FIRST LINE
# ======================================================================================
# One port for every dialect: the first line decides. Whoever knows a protocol speaks
# first; to whoever is silent the server says a line that every IRC client ignores and
# every person understands.

GREETING = f":chat.py/{VERSION} NOTICE * :type a name and press return\r\n".encode()
IRC_FIRST = re.compile(rb"(?:@\S* +)?(?:CAP|NICK|USER|PASS|AUTHENTICATE|PING|QUIT|WEBIRC)(?: |$)")
HTTP_FIRST = re.compile(rb".* HTTP/1\.[01]$")

GOODBYES = {  # for the dialects that are not spoken here: never taken for a name
    "http": b"HTTP/1.1 501 Not Implemented\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This is a chat server without web pages; connect with netcat and type a name.\n",
}


def dialect_of(first_line: bytes) -> str:
    """ "irc", "http" or "line": what a connection speaks whose first line this is."""
    if IRC_FIRST.match(first_line):
        return "irc"
    return "http" if HTTP_FIRST.match(first_line) else "line"


# ======================================================================================
# CLIENT CORE
# ======================================================================================
# A client's conversation without a screen or a socket: bytes and typed text in, views and
# bytes out. The terminal and the window drive the same object. It first finds out whom it
# talks to; then a talk (IrcTalk, PlainTalk) speaks for as long as the connection lasts.
# What lasts longer, rooms and outbox, is the core's.
#
# Nothing is lost and nothing comes twice: a message is in the outbox until the server has
# said that it has it, and is sent again under the same id. A room knows up to which message
# it holds everything; after a break it asks for what came behind that, and live messages
# wait until that is there.

CHAT, IRC, PLAIN = "chat.py", "irc", "plain"  # the kinds of server this client can talk to

SAID, CAME, WENT, TOLD = "said", "came", "went", "told"
NOTE, STATUS, UP, PEOPLE = "note", "status", "up", "people"
ARRIVED, FAILED, BACK, OLDER, PLACE = "arrived", "failed", "back", "older", "place"


class View(NamedTuple):
    """One thing to show."""

    # SAID, CAME, WENT; TOLD by the server; a NOTE of our own; the STATUS of the connection,
    # UP when it stands; PEOPLE when those who are here have changed, with a text if somebody
    # asked who they are; ARRIVED, FAILED: what became of a message of ours; BACK: a text that
    # was not accepted, to be edited; OLDER: a room has so many views more before the others;
    # PLACE: another room is looked at, of which so many messages are new
    kind: str
    text: str = ""
    name: str = ""
    where: str = ""  # a channel, or whom a private talk is with; "" is nowhere in particular
    time: int | None = None  # milliseconds since 1970; None is now
    mine: bool = False
    called: bool = False  # it is for us: our name is in it, or nobody else hears it
    past: bool = False  # from history: no news
    id: str = ""  # the server's, of a message
    own_id: str = ""  # ours, of a message of ours
    address: str = ""  # of who came or went
    line: str = ""  # as a server of the line protocol had it


class Heard(NamedTuple):
    """A line of IRC as a server sends it: a Message, and who it is from."""

    source: str
    verb: str
    params: list[str]
    tags: dict[str, str]

    @property
    def name(self) -> str:
        return self.source.partition("!")[0]

    @property
    def time(self) -> int | None:
        try:
            return parse_time(self.tags["time"])
        except (KeyError, Refused):
            return None


def shown_line(raw: bytes) -> str:
    """What a server sent, without whatever could steer a terminal. What marks a CTCP stays."""
    parts = raw.decode(errors="replace").split("\x01")
    return "\x01".join(harmless(COLOURS.sub("", part)) for part in parts).translate(BIDI_CONTROLS)


def parse_heard(line: str) -> Heard:
    body = line.partition(" ")[2].lstrip(" ") if line.startswith("@") else line
    source = body[1:].partition(" ")[0] if body.startswith(":") else ""
    return Heard(source, *parse_message(line))


client_command = Commands("/")


def completions(word: str, first: bool, names: Iterable[str], rooms: Iterable[str]) -> list[str]:
    """What a word may become: a command or an address at the start of a line, a channel, a
    name. Names are offered in the order given."""
    if word[:1] == "/" and first:
        return sorted(f"/{verb} " for verb in client_command if verb.startswith(word[1:]))
    if word[:1] == "#":
        return [f"{room} " for room in rooms if room.startswith(word)]
    end = ": " if first else " "
    return [name + end for name in names if fold(name).startswith(fold(word))]


def calls(text: str, name: str) -> bool:
    """Whether `text` has this name in it, as a word of its own."""
    key, folded = fold(name), fold(text)
    return key in folded and bool(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", folded))


def is_quit(text: str) -> bool:
    """/quit, which a client does by itself: it leaves, and does not come back."""
    return text.lower().split()[:1] == ["/quit"]


def is_channel(name: str) -> bool:
    return name[:1] in ("#", "&")


# What is said, until it has arrived


class Waiting(NamedTuple):
    """A message that has not arrived for certain."""

    id: str
    where: str
    text: str
    kind: str  # MESSAGE or ACTION


class Outbox:
    """What was said and has not arrived for certain, in order. A `journal` outlives the
    program: append(record), which raises Unusable when it cannot, and clear()."""

    def __init__(self, journal: Any = None, secret: str = "", waiting: Iterable[Waiting] = ()):
        self.journal = journal
        self.secret = secret or secrets.token_hex(SECRET_DIGITS // 2)
        self.waiting = {one.id: one for one in waiting}
        self.flying: dict[str, None] = {}  # sent over the present connection
        self.doubtful: set[str] = set()  # sent over an earlier one; history will tell

    def add(self, now: float, where: str, text: str, kind: str) -> Waiting:
        """Accept a message, at wall time `now`. Raises Unusable if it cannot be kept."""
        one = Waiting(f"{int(now * 1000):x}-{secrets.token_hex(8)}", where, text, kind)
        if self.journal:
            self.journal.append({"say": one})
        self.waiting[one.id] = one
        return one

    def next(self, carries: Callable[[Waiting], bool]) -> Waiting | None:
        """What is to be sent now, of what the talk `carries`. Nothing overtakes what was said
        before it."""
        if len(self.flying) >= SENT_AHEAD:
            return None
        there = (one for id, one in self.waiting.items() if id not in self.flying)
        one = next(filter(carries, there), None)
        if one is None or one.id in self.doubtful:
            return None
        self.flying[one.id] = None
        return one

    def arrived(self, id: str) -> Waiting | None:
        """Or was refused: it is not to be sent again."""
        self.flying.pop(id, None)
        self.doubtful.discard(id)
        one = self.waiting.pop(id, None)
        if one and self.journal:
            with contextlib.suppress(Unusable):  # then it is sent again, and known as a repeat
                self.journal.append({"done": id})
                if not self.waiting:
                    self.journal.clear()
        return one

    def readdress(self, old: str, new: str) -> None:
        """What is still to be sent there goes to where they are now."""
        for id, one in self.waiting.items():
            if fold(one.where) == fold(old) and id not in self.flying:
                self.waiting[id] = one._replace(where=new)

    def take_back(self, sent: Iterable[Waiting]) -> None:
        """These have not arrived after all. Raises Unusable if they cannot be kept."""
        self.waiting = {one.id: one for one in sent} | self.waiting
        for one in sent if self.journal else ():
            self.journal.append({"say": one})

    def grounded(self) -> list[Waiting]:
        """The connection broke: these had been sent."""
        flown, self.flying = [self.waiting[id] for id in self.flying], {}
        return flown


class Transcript(collections.deque):
    """What there is to show of a room, the oldest first; and how much ever was put behind it."""

    total = 0

    def append(self, view: View) -> None:
        self.total += 1
        super().append(view)


class Room:
    """A channel, or a private talk with somebody, as this client knows it."""

    def __init__(self, name: str, password: str = ""):
        self.name, self.password = name, password
        self.people: dict[str, str] = {}  # ranks by name; who spoke last is last
        self.topic = ""
        self.inside = False
        self.wanted = False  # to be entered again after a break ...
        self.entered = False  # ... unless our place is given back, which includes it
        self.mark = ""  # up to here (msgid=... or timestamp=...) everything is held
        self.held: list[View] | None = None  # what waits for the pages that come before it ...
        self.spilled = False  # ... and was more than could be held: there will be pages of it

        self.views = Transcript(maxlen=VIEWS_KEPT)
        self.whole = False  # there is nothing older than the first of these
        self.unread = self.called = 0

    @property
    def is_channel(self) -> bool:
        return is_channel(self.name)

    @property
    def oldest(self) -> str:
        """The id of the first message here; "" if there is none."""
        return next((view.id for view in self.views if view.id), "")

    def hold(self, view: View) -> None:
        """Until what comes before it is there."""
        self.held.append(view)
        if len(self.held) > VIEWS_KEPT:
            self.held, self.spilled = [], True

    def came(self, name: str, ranks: str = "") -> None:
        """A server may make up as many people as it likes."""
        if len(self.people) < PEOPLE_LISTED and len(name.encode()) <= NAME_BYTES:
            self.people[name] = ranks

    def spoke(self, name: str) -> None:
        if name in self.people:
            self.people[name] = self.people.pop(name)

    def renamed(self, name: str, new: str) -> bool:
        if name not in self.people:
            return False
        self.people[new] = self.people.pop(name)
        return True


# Talking to a workshop server

PLAIN_LINES = {
    CAME: re.compile(r"([^:]*) \((\S+)\) joined the chat!"),
    WENT: re.compile(r"([^:]*) \((\S+)\) left the chat!"),
    SAID: re.compile(r"([^:*][^:]*): (.*)"),
}
IRC_SPEAKS = re.compile(r":|NOTICE |ERROR |PING ")  # how a line of an IRC server begins
# Who says so to a name is no workshop server
WANTS_IRC = re.compile(r":chat\.py/|:\S+ (?:421|451) |ERROR :")


class PlainTalk:
    """The workshop's protocol: a name, then lines. Nothing is ever acknowledged."""

    ready = True
    doubts = pages = False

    def __init__(self, core: "ClientCore"):
        self.core = core
        self.sent: collections.deque[Waiting] = collections.deque(maxlen=UNDERSTOOD_KEPT)
        core.output.append(core.wanted_name)
        core.rooms.setdefault(fold(LOBBY), Room(LOBBY)).inside = True
        core.here = LOBBY

    def take(self, line: str) -> None:
        core, room = self.core, self.core.rooms[fold(LOBBY)]
        if WANTS_IRC.match(line) and not core.insists:
            core.outbox.take_back(self.sent)  # nobody has understood it
            return core.come_back(CHAT if line.startswith(":chat.py/") else IRC)
        matches = ((kind, pattern.fullmatch(line)) for kind, pattern in PLAIN_LINES.items())
        kind, match = next((pair for pair in matches if pair[1]), (TOLD, None))
        if match is None:
            return core.show(View(TOLD, line, where=LOBBY, line=line))
        core.sure = True
        name, rest = match.groups()
        if kind == WENT:
            room.people.pop(name, None)
        else:
            room.came(name)  # such a server does not tell who was here before
        if kind == SAID:
            called = calls(rest, core.name)
            core.deliver(room, View(SAID, rest, name, LOBBY, called=called, line=line))
            room.spoke(name)
        else:
            core.show(View(kind, name=name, where=LOBBY, address=rest, line=line))
        core.show(View(PEOPLE, where=LOBBY))

    def carries(self, one: Waiting) -> bool:
        """What was meant for somebody else is not for everybody."""
        return fold(one.where) == fold(LOBBY)

    def transmit(self, one: Waiting) -> None:
        text = f"*{one.text}*" if one.kind == ACTION else one.text
        self.core.output += text.split("\n")
        if not self.core.sure:
            self.sent.append(one)
        self.core.shown.discard(one.id)
        self.core.outbox.arrived(one.id)  # or never will: nobody tells

    def bye(self) -> None:
        pass

    def ping(self) -> None:
        pass


# Talking IRC

WANTED = (  # capabilities that this client can use
    *("message-tags", "server-time", "batch", "echo-message", "labeled-response"),
    *("draft/multiline", "draft/chathistory", "draft/channel-rename", "multi-prefix"),
    *("draft/message-redaction", "standard-replies", "soju.im/search", "chat.py/session", "sasl"),
)


class Batch:
    """Lines that belong together, until all of them are there (IRCv3 batch)."""

    def __init__(self, heard: Heard, outer: str):
        self.kind = heard.params[1]
        self.opening, self.outer = heard, outer
        self.items: "list[Heard | Batch]" = []


class Asked(NamedTuple):
    """History that is on its way."""

    where: str
    # "last": what was said before we came. "missed": behind the mark, page by page. "gap":
    # the newest of that, for a person. "older": before what is shown. "asked": just to see
    how: str
    limit: int


IRC_HEARD: dict[str, tuple[Callable, int]] = {}  # verb -> handler, and parameters it needs


def from_server(*verbs: str, least: int = 0) -> Callable:
    """Decorator: this function is for these verbs and numerics."""

    def register(handler: Callable) -> Callable:
        IRC_HEARD.update(dict.fromkeys(verbs, (handler, least)))
        return handler

    return register


def sendable_lines(text: str, room: int) -> Iterator[tuple[str, bool]]:
    """A message as lines that fit; and whether each goes on with the one before."""
    for line in text.split("\n"):
        for n, piece in enumerate(split_text(line, room)):
            yield piece, n > 0


def spoken_view(talk: "IrcTalk", heard: Heard, text: str) -> View:
    """PRIVMSG or NOTICE, as it is shown."""
    core, target = talk.core, heard.params[0].lstrip(talk.ranks)
    mine = fold(heard.name) == fold(core.name)
    where = target if mine or is_channel(target) else heard.name
    if text.startswith("\x01ACTION "):
        text = f"*{text[8:].removesuffix(chr(1))}*"
    text = text.replace("\x01", "")
    called = not mine and (not is_channel(where) or calls(text, core.name))
    own_id = heard.tags.get(OWN_ID, "") if mine else ""
    person = mine or ("!" in heard.source and fold(heard.name) not in SERVICES)
    kind = SAID if person else TOLD
    return View(
        *(kind, text, heard.name, where, heard.time, mine, called),
        id=heard.tags.get("msgid", ""),
        own_id=own_id,
    )


def page_last(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """What was said before we came."""
    for view in views:
        talk.core.deliver(room, view._replace(past=True))
    room.whole = not views  # a short page may be one of long messages
    talk.core.release(room)


def page_missed(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """Page by page, until there is nothing new: one may be short because of its size."""
    new = any(view.id not in talk.core.seen for view in views)
    for view in views:
        talk.core.deliver(room, view)
    if new or room.spilled:
        room.spilled = False
        talk.ask_history(room, "missed")
    else:
        talk.core.release(room)


def page_gap(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """The newest first: if there was more, what is shown begins with this page."""
    size = sum(len(view.text.encode()) for view in views)
    if len(views) >= limit or size > PAGE_BYTES // 2:
        room.views.clear()
        room.whole = False
        text = "more was said meanwhile; page up, or /history, shows it"
        talk.core.show(View(NOTE, text, where=room.name))
    for view in views:
        talk.core.deliver(room, view)
    if room.spilled:
        room.spilled = False
        talk.ask_history(room, "gap")
    else:
        talk.core.release(room)


def page_older(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """In front of what is there."""
    shown = {view.id for view in room.views}
    views = [view._replace(past=True) for view in views if view.id not in shown]
    views = views[len(views) - (VIEWS_KEPT - len(room.views)) :] if room.views else views
    room.views.extendleft(reversed(views))
    room.whole = not views
    talk.core.show(View(OLDER, str(len(views)), where=room.name))


PAGES = {"last": page_last, "missed": page_missed, "gap": page_gap, "older": page_older}


class IrcTalk:
    """IRC from the client's side, for one connection. What comes is handled by the functions
    below; a line with too few parameters is no line."""

    def __init__(self, core: "ClientCore"):
        self.core = core
        self.ready = False
        self.offered: dict[str, str] = {}  # capabilities and their values
        self.enabled: set[str] = set()
        self.support: dict[str, str] = {}  # 005
        self.batches: dict[str, Batch] = {}
        self.asked: collections.deque[Asked] = collections.deque()  # in the order of answers
        self.names: dict[str, dict[str, str]] = {}  # by key of a channel, as they come
        self.shown_names: set[str] = set()  # keys of channels that somebody wants to see them of
        self.going: dict[str, str] = {}  # channels to be looked at once we are there: passwords
        self.introduced = self.negotiating = False
        self.resumed = False  # we have our place again: the server says where we are
        self.tries = 1  # at names
        self.login: Iterator | None = None  # an exchange of SASL, from the client's side ...
        self.exchange: Exchange | None = None  # ... and what is received of it
        self.mechanism_used = ""
        self.proven = False  # the server has shown that it knows the password, too
        self.mask = ""  # ours, as others see it
        self.pings = 0
        self.unconfirmed: list[str] = []  # own ids of what the next PONG is behind
        # What came later than this, we may not have seen: times are unique within one target
        self.since = max(0, core.newest - 2 * TIMES_AHEAD)
        self.send("CAP LS 302")

    # What this server can do

    @property
    def echoes(self) -> bool:
        """Our messages come back with our ids: that is how we know that they arrived."""
        return {"echo-message", "message-tags"} <= self.enabled

    @property
    def doubts(self) -> bool:
        """It may say twice what is sent to it twice."""
        return not (self.echoes and "chat.py/session" in self.enabled)

    @property
    def pages(self) -> bool:
        """It can tell what was said, and has ids for it."""
        return {"draft/chathistory", "batch", "message-tags", "server-time"} <= self.enabled

    @property
    def page_size(self) -> int:
        return min(whole_number(self.support.get("CHATHISTORY", "")) or PAGE_LINES, PAGE_LINES)

    @property
    def multiline(self) -> bool:
        return {"draft/multiline", "batch"} <= self.enabled

    @property
    def ranks(self) -> str:
        """The symbols before names."""
        return self.support.get("PREFIX", "(ov)@+").partition(")")[2]

    # Out

    def send(self, verb: str, *params: str) -> None:
        """One line; the last parameter may be anything."""
        middle = [verb, *params[:-1]]
        last = params[-1:]
        if last and (not last[0] or " " in last[0] or last[0].startswith(":")):
            last = (f":{last[0]}",)
        self.core.output.append(" ".join([*middle, *last]))

    def bye(self) -> None:
        self.send("QUIT", "")

    def ping(self) -> None:
        self.pings += 1
        self.send("PING", f"{self.pings}")

    def introduce(self) -> None:
        """All in one go: slow lines pay for every answer that is waited for. What the server
        offers it grants, so that what comes behind CAP REQ can rely on it."""
        if self.introduced:
            return
        core, self.introduced = self.core, True
        wanted = [name for name in WANTED if name in self.offered]
        if wanted:
            self.send("CAP", "REQ", " ".join(wanted))
        if core.password:
            self.send("PASS", core.password)
        if "chat.py/session" in wanted:
            self.send("SESSION", core.outbox.secret)
        core.name = clean_name(core.wanted_name)
        self.send("NICK", core.name)
        username = re.sub("[^a-z]", "", fold(core.name))[:SHORT_NAME] or "chat"
        core.output.append(f"USER {username} 0 * :{core.name}")
        mechanism = self.mechanism() if "sasl" in wanted else ""
        if mechanism:
            self.begin_log_in(mechanism)
        elif self.negotiating:
            self.send("CAP", "END")

    def mechanism(self, asked: bool = False) -> str:
        """The best way to log in that both know; "" if there is no need or none. Nobody's
        password travels in the clear by itself, only when somebody asked for it."""
        core = self.core
        offered = self.offered["sasl"].split(",") if self.offered["sasl"] else [*LOGINS]
        name = next((name for name in LOGINS if name in offered and core.me.login), "")
        if name == "PLAIN" and not (core.secure or asked):
            text = "not logged in: this server wants to be told the password in the clear"
            core.show(View(NOTE, f"{text}; /login does so, ircs:// is better"))
            return ""
        return name

    def begin_log_in(self, mechanism: str) -> None:
        self.login, self.mechanism_used = LOGINS[mechanism](*self.core.me.login), mechanism
        self.proven = False
        next(self.login)  # the server speaks first, if only to say nothing
        self.exchange = Exchange(self.login)
        self.send("AUTHENTICATE", mechanism)

    def transmit(self, one: Waiting) -> None:
        """A message of ours, with our id on the last line of it, or on all of it."""
        if one.kind == ACTION:
            lines = [(f"\x01ACTION {one.text}\x01", False)]
        else:
            head = f":{self.mask or self.longest_mask()} PRIVMSG {one.where} :"
            lines = list(sendable_lines(one.text, IRC_BYTES - 2 - len(head.encode())))
        tags = f"@{OWN_ID}={one.id}" if "message-tags" in self.enabled else ""
        if tags and "labeled-response" in self.enabled:
            tags += f";label={one.id}"
        if len(lines) > 1 and self.multiline:
            return self.transmit_batch(one, lines, tags)
        for text, _ in lines[:-1]:
            self.send("PRIVMSG", one.where, text or " ")
        self.send(*[tags] * bool(tags), "PRIVMSG", one.where, lines[-1][0] or " ")
        if not self.echoes:
            self.unconfirmed.append(one.id)
            self.send("PING", f"{UNCONFIRMED}{one.id}")

    def transmit_batch(self, one: Waiting, lines: list[tuple[str, bool]], tags: str) -> None:
        self.send(*[tags] * bool(tags), "BATCH", "+m", "draft/multiline", one.where)
        for text, goes_on in lines:
            self.send(f"@batch=m{f';{CONCAT}' * goes_on}", "PRIVMSG", one.where, text)
        self.send("BATCH", "-m")

    def carries(self, one: Waiting) -> bool:
        return True

    def longest_mask(self) -> str:
        return f"{self.core.name}!{'u' * USERNAME_BYTES}@{'h' * HOST_BYTES}"

    def enter(self, room: Room) -> None:
        self.send("JOIN", room.name, *[room.password] * bool(room.password))

    def ask_history(self, room: Room, how: str) -> bool:
        """A page of it; whether one comes."""
        if not self.pages:
            return False
        limit = HISTORY_LINES if how == "last" else self.page_size
        words = {
            "last": ("LATEST", "*"),
            "gap": ("LATEST", room.mark),
            "missed": ("AFTER", room.mark),
            "older": ("BEFORE", f"msgid={room.oldest}" if room.oldest else "*"),
        }
        subcommand, selector = words[how]
        self.asked.append(Asked(room.name, how, limit))
        self.send("CHATHISTORY", subcommand, room.name, selector, str(limit))
        return True

    def catch_up(self, room: Room) -> None:
        """From where this room holds everything; a new one begins with the last things said,
        if that is for a person, or with what comes from now on."""
        room.held = []
        how = "last" if not room.mark else "gap" if self.core.tidy else "missed"
        wanted = room.mark or self.core.tidy
        if not (wanted and self.ask_history(room, how)):
            self.core.release(room)

    # In

    def take(self, line: str) -> None:
        heard = parse_heard(line)
        batch = self.batches.get(heard.tags.get("batch", ""))
        if heard.verb == "BATCH":
            self.take_batch(heard)
        elif batch is None or len(batch.items) >= BATCH_LINES:
            self.act(heard)
        else:
            batch.items.append(heard)

    def act(self, heard: Heard) -> None:
        handler, least = IRC_HEARD.get(heard.verb) or IRC_HEARD[""]
        if len(heard.params) >= least:
            handler(self, heard)

    def take_batch(self, heard: Heard) -> None:
        reference = heard.params[0] if heard.params else ""
        if reference[:1] == "+" and len(heard.params) > 1 and len(self.batches) < BATCHES:
            self.batches[reference[1:]] = Batch(heard, heard.tags.get("batch", ""))
        batch = self.batches.pop(reference[1:], None) if reference[:1] == "-" else None
        if batch is None:
            return
        if outer := self.batches.get(batch.outer):
            outer.items.append(batch)
        else:
            self.end_batch(batch)

    def end_batch(self, batch: Batch) -> None:
        views = [view for item in batch.items if (view := self.view_of(item))]
        if batch.kind == "chathistory":
            self.take_page(views)
        elif batch.kind == "draft/multiline":
            if view := self.view_of(batch):
                self.core.said(view)
        elif batch.kind == "soju.im/search":
            self.show_past(views)
        else:  # its lines are what they would be without it
            for item in batch.items:
                if isinstance(item, Batch):
                    self.end_batch(item)
                else:
                    label = batch.opening.tags.get("label", "")
                    self.act(item._replace(tags={"label": label} | item.tags))
        if batch.kind == "draft/chathistory-targets" and self.asked:
            self.asked.popleft()
            self.release_talks()

    def view_of(self, item: "Heard | Batch") -> View | None:
        """A message, if it is one; of a batch, the message of several lines."""
        if isinstance(item, Heard):
            spoken = item.verb in ("PRIVMSG", "NOTICE") and len(item.params) > 1
            return spoken_view(self, item, item.params[1]) if spoken else None
        lines = [line for line in item.items if isinstance(line, Heard) and len(line.params) > 1]
        if item.kind != "draft/multiline" or not lines:
            return None
        text = "".join(("" if CONCAT in line.tags else "\n") + line.params[1] for line in lines)
        source, tags = item.opening.source or lines[0].source, item.opening.tags
        first = lines[0]._replace(source=source, tags=tags)
        return spoken_view(self, first, text.removeprefix("\n"))

    def take_page(self, views: list[View]) -> None:
        """History that was asked for; servers answer in order."""
        asked = self.asked.popleft() if self.asked else Asked("", "asked", 0)
        room = self.core.rooms.get(fold(asked.where))
        if room is None or asked.how == "asked":
            return self.show_past(views)
        PAGES[asked.how](self, room, views, asked.limit)

    def show_past(self, views: list[View]) -> None:
        """Just so, wherever one is."""
        self.core.show(*(view._replace(past=True) for view in views if view.kind == SAID))

    def release_talks(self) -> None:
        """The private talks in which nothing was missed."""
        busy = {fold(asked.where) for asked in self.asked}
        for key, room in list(self.core.rooms.items()):
            if not room.is_channel and room.held is not None and key not in busy:
                self.core.release(room)


# What a server says: whatever has no function of its own, and before there is a welcome


NOT_JOINED = ("403", "405", "471", "473", "474", "475", "476", "477")


def give_up_doubts(talk: IrcTalk, name: str) -> None:
    """Where we cannot be, nobody tells whether it arrived."""
    room, core = talk.core.rooms.get(fold(name)), talk.core
    for id in list(core.outbox.doubtful) if room and not room.inside else ():
        if fold(core.outbox.waiting[id].where) == fold(name):
            core.lost(id, "the line broke: it may have arrived or not")


def refused(talk: IrcTalk, heard: Heard, text: str) -> None:
    """Something that we wanted: a message of ours, if it has our label."""
    label = heard.tags.get("label", "")
    if label in talk.core.outbox.waiting:
        talk.core.lost(label, text)
    else:
        talk.core.show(View(TOLD, text))


SAYING_FAILED = ("401", "403", "404", "407", "412", "417", "477")


@from_server("", least=1)
def tell_rest(talk: IrcTalk, heard: Heard) -> None:
    """A numeric, or another line of a server, that needs nothing but to be read."""
    *about, text = heard.params[1:] or heard.params
    between = ": " if heard.verb[:1] in ("4", "5") else " "
    text = between.join([" ".join(about), text] if about else [text])
    if heard.verb in NOT_JOINED and len(heard.params) > 1:
        give_up_doubts(talk, heard.params[1])
    if heard.verb not in SAYING_FAILED:
        return refused(talk, heard, text)
    flying = (talk.core.outbox.waiting[id] for id in talk.core.outbox.flying)
    target = fold(heard.params[1]) if len(heard.params) > 1 else ""
    lost = next((one.id for one in flying if fold(one.where) == target), "")
    refused(talk, heard._replace(tags={"label": lost} | heard.tags), text)


@from_server("CAP", least=3)
def capabilities_told(talk: IrcTalk, heard: Heard) -> None:
    subcommand, words = heard.params[1].upper(), heard.params[-1].split()
    if subcommand in ("LS", "NEW"):
        if len(talk.offered) < TOKENS_KEPT:
            talk.offered.update(word.partition("=")[::2] for word in words)
        talk.negotiating = True
        if heard.params[2] != "*":  # else there are more to come
            talk.introduce()
    elif subcommand == "ACK":
        for word in words:
            (talk.enabled.discard if word[0] == "-" else talk.enabled.add)(word.lstrip("-"))
    elif subcommand == "DEL":
        talk.enabled.difference_update(words)


@from_server("421", "451", least=2)
def no_capabilities(talk: IrcTalk, heard: Heard) -> None:
    """A server that knows no CAP."""
    if talk.introduced:
        return tell_rest(talk, heard)
    talk.introduce()


def keep_login(core: "ClientCore") -> None:
    if core.me.keep:
        try:
            core.me.keep(core.me.login)
        except Unusable as error:
            core.show(View(NOTE, f"{error}; the next start cannot log in by itself"))


def renew_login(core: "ClientCore") -> None:
    """The one that was proposed is valid now."""
    if core.me.proposed:
        core.me.login, core.me.proposed = core.me.proposed, None
        core.me.account = core.me.login.account
        if core.me.generated:
            keep_login(core)


def forget_login(core: "ClientCore") -> None:
    """Nobody has that account, or not with that password."""
    core.me.proposed, core.me.login = None, None
    if core.me.generated:
        core.me.generated = False
        keep_login(core)


def answer_log_in(talk: IrcTalk, said: Any) -> None:
    """`said` by the server, or by a job that the exchange asked for."""
    if talk is not talk.core.talk or talk.login is None:
        return
    try:
        answer = talk.login.send(said)
    except StopIteration:
        return
    except Refused:
        return talk.send("AUTHENTICATE", "*")
    if callable(answer):
        talk.exchange = None  # nothing can be said to us meanwhile
        return talk.core.later(answer, functools.partial(answer_log_in, talk))
    talk.exchange = Exchange(talk.login)
    talk.proven = talk.mechanism_used == "PLAIN" or answer == b""
    for chunk in Exchange.chunks(answer):
        talk.send("AUTHENTICATE", chunk)


@from_server("AUTHENTICATE", least=1)
def asked_to_log_in(talk: IrcTalk, heard: Heard) -> None:
    try:
        said = talk.exchange.feed(heard.params[0]) if talk.exchange else None
    except Refused:
        return talk.send("AUTHENTICATE", "*")
    if said is not None:
        answer_log_in(talk, said)


@from_server("900", least=1)
def told_to_be_logged_in(talk: IrcTalk, heard: Heard) -> None:
    talk.core.show(View(TOLD, heard.params[-1]))


def end_log_in(talk: IrcTalk) -> None:
    talk.login = talk.exchange = None
    if not talk.ready:
        talk.send("CAP", "END")


@from_server("903", least=1)
def logged_in(talk: IrcTalk, heard: Heard) -> None:
    core = talk.core
    if talk.login is None:  # no log-in is under way: nothing of ours has succeeded
        return tell_rest(talk, heard)
    if not talk.proven:
        core.over = "the server said that we are logged in, and could not prove that it is right"
        return talk.bye()
    core.me.account = core.me.login.account if core.me.login else ""
    renew_login(core)
    end_log_in(talk)


def come_another_time(talk: IrcTalk, why: str) -> None:
    """Not as somebody else, who would say everything once more."""
    talk.core.refusal, talk.core.patient = why, True
    talk.bye()


@from_server("902", "904", "905", "906", "907", least=1)
def not_logged_in(talk: IrcTalk, heard: Heard) -> None:
    core, why = talk.core, f"not logged in: {heard.params[-1]}"
    if talk.login is None:
        return tell_rest(talk, heard)
    core.show(View(NOTE, why))
    if core.me.proposed and not talk.ready:  # the /register before the break was not heard
        core.me.login = None
        forget_login(core)
    elif core.me.account and not talk.ready:
        return come_another_time(talk, why)
    end_log_in(talk)


def try_name(talk: IrcTalk, heard: Heard, most: int, candidate: Callable[[int], str]) -> None:
    """Another one, until a server takes it; after so many we give up."""
    if talk.ready:
        return tell_rest(talk, heard)
    talk.tries += 1
    if talk.tries > most:
        talk.core.refusal = heard.params[-1]
        return talk.bye()
    talk.core.name = candidate(talk.tries)
    talk.send("NICK", talk.core.name)


@from_server("433", "436", "437", least=2)
def name_is_taken(talk: IrcTalk, heard: Heard) -> None:
    name = clean_name(talk.core.wanted_name)
    try_name(talk, heard, NAMES_COUNTED, functools.partial(numbered_name, name))


@from_server("432", least=1)
def name_is_no_name(talk: IrcTalk, heard: Heard) -> None:
    """Here: other servers want less in a name than we do."""
    letters, guest = re.sub(r"[^A-Za-z]", "", talk.core.name), f"guest{random.randrange(1000)}"
    try_name(talk, heard, NAMES_TRIED, lambda n: letters[: SHORT_NAME - n] or guest)


@from_server("001", least=1)
def welcomed(talk: IrcTalk, heard: Heard) -> None:
    core, talk.ready = talk.core, True
    core.sure = True
    core.name = heard.params[0]
    core.began = core.began or heard.time or 0
    if core.tidy or core.name != core.wanted_name:
        core.show(View(TOLD, f"you are {core.name}"))
    for room in core.rooms.values():
        if room.is_channel and room.wanted and not (talk.resumed and room.entered):
            talk.enter(room)
    if talk.pages and talk.since:
        now = tag_time(LAST_MOMENT)
        talk.asked.append(Asked("", "targets", 0))
        since = f"timestamp={tag_time(talk.since)}"
        talk.send("CHATHISTORY", "TARGETS", since, f"timestamp={now}", str(TARGETS_ASKED))
    else:
        talk.release_talks()
    core.show(View(PEOPLE))


@from_server("005", least=2)
def support_told(talk: IrcTalk, heard: Heard) -> None:
    if len(talk.support) < TOKENS_KEPT:
        talk.support.update(word.partition("=")[::2] for word in heard.params[1:-1])


@from_server("ERROR", least=1)
def error_told(talk: IrcTalk, heard: Heard) -> None:
    if not talk.core.quitting:
        talk.core.refusal = talk.core.refusal or heard.params[0]


@from_server("464", "465", "466", least=1)
def not_let_in(talk: IrcTalk, heard: Heard) -> None:
    tell_rest(talk, heard)
    if not talk.ready:
        talk.core.refusal = heard.params[-1]
        talk.core.password = ""


# What a server says: whether we are there, and whether what we said is


@from_server("PING", least=1)
def pinged(talk: IrcTalk, heard: Heard) -> None:
    talk.send("PONG", *heard.params)


def confirm(talk: IrcTalk, own_id: str) -> None:
    if one := talk.core.outbox.arrived(own_id):
        talk.core.shown.discard(own_id)
        talk.core.show(View(ARRIVED, where=one.where, own_id=own_id))


@from_server("PONG", least=1)
def ponged(talk: IrcTalk, heard: Heard) -> None:
    """Whatever was sent before our PING has been dealt with."""
    id = heard.params[-1].removeprefix(UNCONFIRMED)
    while talk.unconfirmed and id in talk.unconfirmed:
        confirm(talk, talk.unconfirmed.pop(0))


@from_server("TAGMSG", least=1)
def tags_told(talk: IrcTalk, heard: Heard) -> None:
    """With our id it stands for a message of ours that is not there any more."""
    if fold(heard.name) == fold(talk.core.name):
        confirm(talk, heard.tags.get(OWN_ID, ""))


def end_page(talk: IrcTalk) -> None:
    """There is none."""
    if talk.asked and talk.asked[0].how == "targets":
        talk.asked.popleft()
        talk.release_talks()
    else:
        talk.take_page([])


def tell_nothing(talk: IrcTalk, heard: Heard) -> None:
    """What only programs need to know, or what is told in other words."""


for quiet in (
    *("002", "003", "004", "221", "250", "251", "252", "253", "254", "255", "265", "266", "315"),
    *("318", "321", "323", "329", "333", "369", "372", "375", "376", "396", "422", "705", "706"),
    *("731", "AWAY", "ACCOUNT", "CHGHOST", "SETNAME", "908"),
):
    IRC_HEARD[quiet] = (tell_nothing, 0)


@from_server("FAIL", least=3)
def failed(talk: IrcTalk, heard: Heard) -> None:
    verb, code, *about, text = heard.params
    if (verb, code) == ("SESSION", "REPLACED"):
        talk.core.over = "another client of yours has taken this place"
    elif (verb, code) == ("SESSION", "ACCOUNT_REQUIRED"):
        come_another_time(talk, text)
    elif verb == "CHATHISTORY":
        end_page(talk)
    elif verb == "REGISTER":
        forget_login(talk.core)
        refused(talk, heard, text)
    elif code == "NOT_KEPT" and len(about) > 1:
        talk.core.lost(about[1], text)
    else:
        refused(talk, heard, text)


# What a server says: people and their words


@from_server("NOTE", "WARN", least=3)
def noted(talk: IrcTalk, heard: Heard) -> None:
    if heard.params[:2] == ["SESSION", "RESUMED"]:
        talk.resumed = True
    else:
        talk.core.show(View(TOLD, heard.params[-1]))


@from_server("PRIVMSG", "NOTICE", least=2)
def somebody_spoke(talk: IrcTalk, heard: Heard) -> None:
    text = heard.params[1]
    view = spoken_view(talk, heard, text)
    if text.startswith("\x01") and not text.startswith("\x01ACTION ") and not view.mine:
        return  # CTCP: between programs, and ours has nothing to say to it
    if view.kind == SAID:
        return talk.core.said(view)
    if fold(view.name) == SERVICE_KEY and text == PASSWORD_CHANGED:
        renew_login(talk.core)
    elif fold(view.name) == SERVICE_KEY and text == ACCOUNT_GONE:
        forget_login(talk.core)
    who = f"{view.name}: " if "!" in heard.source else ""
    talk.core.show(View(TOLD, who + view.text, time=view.time))


@from_server("CHATHISTORY", least=3)
def missed_in_a_talk(talk: IrcTalk, heard: Heard) -> None:
    """One of the places where something was said meanwhile."""
    name = heard.params[1]
    if is_channel(name):
        return
    room = talk.core.room_for(name)
    room.held = room.held or []
    room.mark = room.mark or f"timestamp={tag_time(talk.since)}"
    talk.ask_history(room, "gap" if talk.core.tidy else "missed")


def we_joined(talk: IrcTalk, heard: Heard) -> None:
    core, talk.mask = talk.core, heard.source
    room = core.room_for(heard.params[0])
    room.name, room.inside = heard.params[0], True
    room.wanted = room.entered = True
    room.password = talk.going.get(fold(room.name), room.password)
    if not core.tidy and not room.mark:  # whatever is said from now on
        if "msgid" in heard.tags:
            room.mark = f"msgid={heard.tags['msgid']}"
        elif core.began:  # we came in before, and the line broke before we heard of it
            room.mark = f"timestamp={tag_time(max(core.began, talk.since))}"
    core.newest = max(core.newest, heard.time or 0)
    if talk.going.pop(fold(room.name), None) is not None:
        core.go(room)
    talk.catch_up(room)


@from_server("JOIN", least=1)
def somebody_joined(talk: IrcTalk, heard: Heard) -> None:
    core, name = talk.core, heard.params[0]
    if fold(heard.name) == fold(core.name):
        return we_joined(talk, heard)
    if room := core.rooms.get(fold(name)):
        room.came(heard.name)
        address = heard.source.partition("@")[2]
        core.happened(room, View(CAME, name=heard.name, where=room.name, address=address))
        core.show(View(PEOPLE, where=room.name))


def somebody_went(talk: IrcTalk, room: Room, heard: Heard, name: str, why: str = "") -> None:
    """Out of one room; perhaps it was us."""
    core = talk.core
    room.people.pop(name, None)
    if fold(name) == fold(core.name):
        room.inside = room.wanted = False
        return
    address = heard.source.partition("@")[2]
    core.happened(room, View(WENT, why, name, room.name, address=address))
    core.show(View(PEOPLE, where=room.name))


@from_server("PART", least=1)
def somebody_parted(talk: IrcTalk, heard: Heard) -> None:
    room = talk.core.rooms.get(fold(heard.params[0]))
    if room is None:
        return
    somebody_went(talk, room, heard, heard.name, *heard.params[1:2])
    if fold(heard.name) == fold(talk.core.name):
        talk.core.close(room)


@from_server("QUIT")
def somebody_quit(talk: IrcTalk, heard: Heard) -> None:
    for room in list(talk.core.rooms.values()):
        if heard.name in room.people:
            somebody_went(talk, room, heard, heard.name, *heard.params[:1])


@from_server("KICK", least=2)
def somebody_kicked(talk: IrcTalk, heard: Heard) -> None:
    core, (where, name, *why) = talk.core, heard.params
    if room := core.rooms.get(fold(where)):
        reason = f": {why[0]}" if why else ""
        text = f"{heard.name} kicked {name} from {where}{reason}"
        core.happened(room, View(TOLD, text, where=room.name))
        room.people.pop(name, None)
        if fold(name) == fold(core.name):
            room.inside = room.wanted = False
        core.show(View(PEOPLE, where=room.name))


@from_server("NICK", least=1)
def somebody_renamed(talk: IrcTalk, heard: Heard) -> None:
    core, old, new = talk.core, heard.name, heard.params[0]
    if fold(old) == fold(core.name):
        core.name = core.wanted_name = new
        core.show(View(TOLD, f"you are {new}"))
    for room in list(core.rooms.values()):
        if room.renamed(old, new) and fold(new) != fold(core.name):
            core.happened(room, View(TOLD, f"{old} is now called {new}", where=room.name))
    if fold(old) in core.rooms and fold(new) not in core.rooms:  # a private talk goes on
        core.rename(core.rooms[fold(old)], new)
    core.show(View(PEOPLE))


@from_server("RENAME", least=2)
def channel_renamed(talk: IrcTalk, heard: Heard) -> None:
    core, (old, new, *_) = talk.core, heard.params
    if room := core.rooms.get(fold(old)):
        core.rename(room, new)
        core.happened(room, View(TOLD, f"{heard.name} renamed {old} to {new}", where=new))


@from_server("TOPIC", least=2)
def topic_set(talk: IrcTalk, heard: Heard) -> None:
    if room := talk.core.rooms.get(fold(heard.params[0])):
        room.topic = heard.params[1]
        text = f"{heard.name} set the topic of {room.name}: " + room.topic
        talk.core.happened(room, View(TOLD, text, where=room.name, time=heard.time))


WHOIS = {  # numeric -> how it is told; {2} is its second parameter behind the name
    "311": "{1} is {2}@{3}: {last}",
    "312": "{1} uses {2}",
    "313": "{1} {last}",
    "317": "{1} has said nothing for {2} s",
    "319": "{1} is in {last}",
    "330": "{1} is logged in as {2}",
    "338": "{1} comes from {2}",
    "671": "{1} {last}",
}


@from_server(*WHOIS, least=3)
def person_told(talk: IrcTalk, heard: Heard) -> None:
    missing = [""] * 3
    text = WHOIS[heard.verb].format(*heard.params, *missing, last=heard.params[-1])
    talk.core.show(View(TOLD, text))


@from_server("332", least=3)
def topic_told(talk: IrcTalk, heard: Heard) -> None:
    _, where, topic = heard.params[:3]
    room = talk.core.rooms.get(fold(where))
    if room:
        room.topic = topic
    text = f"the topic of {where}: {topic}"
    talk.core.show(View(TOLD, text, where=room.name if room else ""))


@from_server("MODE", least=2)
def modes_set(talk: IrcTalk, heard: Heard) -> None:
    where, letters = heard.params[:2]
    room = talk.core.rooms.get(fold(where))
    if room is None:
        return
    text = f"{heard.name} set {' '.join(heard.params[1:])} in {room.name}"
    talk.core.happened(room, View(TOLD, text, where=room.name))
    ranks = talk.support.get("PREFIX", "(ov)@+").partition(")")[0]
    if set(letters) & set(ranks) - set("("):
        talk.send("NAMES", room.name)


@from_server("INVITE", least=2)
def invited(talk: IrcTalk, heard: Heard) -> None:
    where = heard.params[1]
    text = f"{heard.name} invites you to {where}; /join {where}"
    talk.core.show(View(TOLD, text, called=True))


@from_server("REDACT", least=2)
def taken_back(talk: IrcTalk, heard: Heard) -> None:
    where, id = heard.params[:2]
    if room := talk.core.rooms.get(fold(where)):
        kept = [view for view in room.views if view.id != id]
        room.views.clear()
        room.views.extend(kept)
        text = f"{heard.name} took back a message"
        talk.core.happened(room, View(TOLD, text, where=room.name))


@from_server("353", least=4)
def names_told(talk: IrcTalk, heard: Heard) -> None:
    key = fold(heard.params[2])
    if key not in talk.core.rooms and key not in talk.shown_names:
        return
    coming = talk.names.setdefault(key, {})
    for word in heard.params[3].split()[: PEOPLE_LISTED - len(coming)]:
        name = word.lstrip(talk.ranks)
        coming[name] = word.removesuffix(name)


@from_server("366", least=2)
def names_ended(talk: IrcTalk, heard: Heard) -> None:
    key = fold(heard.params[1])
    people, room = talk.names.pop(key, {}), talk.core.rooms.get(key)
    text = ", ".join(ranks + name for name, ranks in people.items()) or "nobody"
    if room:
        known = {name: people.pop(name) for name in room.people if name in people}
        room.people = people | known  # in the order of who spoke last
    asked = key in talk.shown_names
    talk.shown_names.discard(key)
    where = room.name if room else heard.params[1]
    talk.core.show(View(PEOPLE, text if asked else "", where=where))


@from_server("322", least=3)
def channel_listed(talk: IrcTalk, heard: Heard) -> None:
    _, name, count, *topic = heard.params
    text = "  ".join(filter(None, [name, count, *topic[:1]]))
    talk.core.show(View(TOLD, text))


@from_server("REGISTER", "VERIFY", least=2)
def registered(talk: IrcTalk, heard: Heard) -> None:
    """What became of it; who has an account now comes back to it."""
    core = talk.core
    core.show(View(TOLD, heard.params[-1]))
    if heard.params[0] == "SUCCESS":
        renew_login(core)


# The core


def check_message(where: str, text: str, kind: str) -> None:
    """Raise Refused if no server would take it."""
    if text.count("\n") >= MESSAGE_LINES or len(text.encode()) > LINE_BYTES:
        limit = f"a message has at most {MESSAGE_LINES} lines and {LINE_BYTES:,} bytes"
        raise Refused("TOO_LONG", limit)
    if kind == ACTION and len(text.encode()) > FITS_ALWAYS:
        raise Refused("TOO_LONG", f"what one does has at most {FITS_ALWAYS} bytes")
    if len(where.encode()) > NAME_BYTES:
        raise Refused("BAD_NAME", f"a name has at most {NAME_BYTES} bytes")


class Login(NamedTuple):
    """What a client knows of its account."""

    account: str
    password: str


class Rooms(dict[str, Room]):
    """The conversations there are, by key, in the order in which they were opened."""

    def rename(self, room: Room, name: str) -> None:
        room.name = name
        rooms = {fold(one.name): one for one in self.values()}
        self.clear()
        self.update(rooms)

    def least(self) -> Room:
        """The one that is missed least: the oldest private talk."""
        private = (room for room in self.values() if not room.is_channel)
        return next(private, next(iter(self.values())))


def wanted_rooms(join: Iterable[str]) -> Rooms:
    """Each is a channel, and perhaps its password behind a blank."""
    names = [words.split() for words in join if words.split()] or [[LOBBY]]
    rooms = Rooms((fold(words[0]), Room(*words[:2])) for words in names)
    for room in rooms.values():
        room.wanted = True
    return rooms


class Credentials:
    """Who a client is to its server, and how it proves that."""

    def __init__(self, login: Login | None):
        self.login = login
        self.proposed: Login | None = None  # that a /register or /passwd is to make valid
        self.account = ""  # that we were logged in to
        self.generated = False  # the password is no person's, and is kept on disk by ...
        self.keep: Callable[[Login | None], None] | None = None  # ... this; it raises Unusable


def first_words(core: "ClientCore", line: str) -> bool:
    """Who speaks before us tells by that what he is; whether that is all he said by it."""
    if line.startswith("* "):  # we are being turned away, and told why
        core.refusal = line.removeprefix("* ")
        core.show(View(TOLD, core.refusal))
        return True
    if line.startswith(":chat.py/"):
        core.kind = CHAT
    else:
        core.kind = IRC if IRC_SPEAKS.match(line) else PLAIN
    core.introduce()
    return core.kind == CHAT


class ClientCore:
    """A client's side of the talk.

    Call connected() for each new connection, then feed() with what comes, silence() if
    nothing does and disconnected() at its end; send what take_output() gives. typed() takes
    what the person wrote, also while there is no connection: then it waits. `tidy` is for
    a person's eyes: it asks what was said last. `later` runs a job off the loop.
    """

    def __init__(
        self,
        name: str,
        tidy: bool = True,
        kind: str = "",
        password: str = "",
        join: Iterable[str] = (),
        login: Login | None = None,
        outbox: Outbox | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        later: Callable[[Callable, Callable], None] = lambda job, then: then(job()),
    ):
        self.wanted_name = self.name = name
        self.tidy, self.kind, self.password = tidy, kind, password
        self.me = Credentials(login)
        self.outbox = outbox or Outbox()
        self.clock, self.later = clock, later
        self.talk: Any = None  # while connected, once it is known what is spoken
        self.secure = False  # what is said now, nobody reads on its way
        self.listening = False  # for whether the server speaks first
        self.refusal = ""  # why the server will not have us
        self.over = ""  # why there is no point in coming back
        self.redial = False  # come back at once: it speaks something else ...
        self.insists = False  # ... unless a person said what it speaks
        self.sure = False  # the server has said something that only its kind says
        self.quitting = False
        self.ignored: set[str] = set()  # keys
        self.seen: dict[str, None] = {}  # ids
        self.shown: set[str] = set()  # own ids of what the person has seen himself say
        self.failures = 0  # messages that did not arrive, or were not kept
        self.newest = 0  # time of the newest thing heard of, in milliseconds ...
        self.began = 0  # ... and of the first welcome
        self.patient = False  # the refusal is for the moment
        self.rooms = wanted_rooms(join)
        self.here = next(iter(self.rooms.values())).name
        self.inbox = LineBuffer(IRC_BYTES + 2 * TAGS_BYTES + LINE_BYTES)
        self.views: list[View] = []
        self.output: list[str] = []

    @property
    def ready(self) -> bool:
        """The server has our name."""
        return self.talk is not None and self.talk.ready

    @property
    def user(self) -> "ClientCore":
        """For the gate before a command: whoever types here has a name."""
        return self

    @property
    def room(self) -> Room | None:
        """That is looked at."""
        return self.rooms.get(fold(self.here))

    # The connection

    def connected(self) -> list[View]:
        self.inbox = LineBuffer(self.inbox.limit)
        self.output.clear()
        self.refusal, self.redial, self.talk = "", False, None
        self.patient = False
        self.listening = not self.kind
        if not self.listening:
            self.introduce()
        return self.take_views()

    def disconnected(self) -> list[View]:
        """What was on its way is sent again where that makes no second one of it."""
        talk, self.talk, self.listening = self.talk, None, False
        flown = self.outbox.grounded()
        for one in flown if talk and talk.doubts else ():
            if talk.pages:
                self.outbox.doubtful.add(one.id)
            else:
                self.lost(one.id, "the line broke: it may have arrived or not")
        for room in self.rooms.values():
            room.held, room.inside = [], False
        return self.take_views()

    def silence(self) -> list[View]:
        """The server let us wait: a workshop server, which wants the name first."""
        if self.listening:
            self.kind = PLAIN
            self.introduce()
        return self.take_views()

    def feed(self, data: bytes) -> list[View]:
        self.inbox.feed(data)
        while (raw := self.inbox.take()) is not None:
            if raw == TOO_LONG:
                self.show(View(NOTE, "the server sent a line too long to be shown"))
                continue
            line = shown_line(raw)
            if self.listening and first_words(self, line):
                continue
            if self.talk:
                self.talk.take(line)
        self.flush()
        return self.take_views()

    def finish(self) -> list[View]:
        """The server has closed: what came after the last newline is a line too, but in IRC,
        where it may be half of one."""
        if self.kind == PLAIN:
            self.inbox.finish()
        return self.feed(b"")

    def take_output(self) -> bytes:
        end = "\n" if self.kind == PLAIN else "\r\n"
        ends = {} if self.kind == PLAIN else NOT_IN_IRC
        lines = (line.translate(ends) for line in self.output)
        data = "".join(line + end for line in lines).encode(errors="replace")
        self.output.clear()
        return data

    def take_views(self) -> list[View]:
        views, self.views = self.views, []
        return views

    def introduce(self) -> None:
        self.listening = False
        self.talk = PlainTalk(self) if self.kind == PLAIN else IrcTalk(self)
        self.flush()

    def come_back(self, kind: str) -> None:
        """As something else than what we took the server for."""
        self.kind, self.redial = kind, True

    def leave(self) -> None:
        self.quitting = True
        if self.talk:
            self.talk.bye()

    # What the person writes

    def typed(self, text: str) -> list[View]:
        """A line or several, as one message, or a command."""
        if text[:1] == "/" and text[:2] != "//":
            self._command(text)
        else:
            self._speak(text[1:] if text[:2] == "//" else text)
        self.flush()
        return self.take_views()

    def say(self, text: str) -> list[View]:
        """Text, whatever it begins with: what a pipe sends."""
        self._speak(text)
        self.flush()
        return self.take_views()

    def _command(self, text: str) -> None:
        verb, _, rest = text[1:].partition(" ")
        known = client_command.get(verb.lower())
        why = (
            "this server knows no commands" * (self.kind == PLAIN)
            or "a command is one line" * ("\n" in text)
            or "not connected" * (not (self.ready or (known and known.nameless)))
        )
        if why:
            return self.show(View(BACK, text), View(NOTE, f"{why}; nothing was sent"))
        try:
            client_command.run(self, verb.lower(), lambda most: rest.split(None, max(0, most - 1)))
        except ChatError as refusal:
            self.show(View(BACK, text), View(NOTE, str(refusal)))

    def _speak(self, text: str) -> None:
        if self.room is None:
            return self.show(View(BACK, text), View(NOTE, "nowhere to say that; /join #CHANNEL"))
        self.send(self.here, text)

    def send(self, where: str, text: str, kind: str = MESSAGE) -> None:
        """Accept a message; shown at once, and sent when that can be."""
        try:
            check_message(where, text, kind)
            one = self.outbox.add(self.clock(), where, text if text.strip("\n") else "", kind)
        except ChatError as error:
            return self.show(View(BACK, text), View(NOTE, f"{error}; nothing was sent"))
        self.shown.add(one.id)
        shown = f"*{text}*" if kind == ACTION else text
        view = self.timed(View(SAID, shown, self.name, where, mine=True, own_id=one.id))
        self.room_for(where).views.append(view)
        self.show(view)

    def flush(self) -> None:
        """Send what may be sent."""
        while self.ready and not self.redial and (one := self.outbox.next(self.talk.carries)):
            self.talk.transmit(one)

    # What there is to show

    def show(self, *views: View) -> None:
        self.views += views

    def room_for(self, name: str) -> Room:
        """A new one takes the place of the oldest private talk, where there are too many."""
        if fold(name) not in self.rooms and len(self.rooms) >= ROOMS_KEPT:
            self.close(self.rooms.least())
        return self.rooms.setdefault(fold(name), Room(name))

    def go(self, room: Room) -> None:
        """Look at another room."""
        self.show(View(PLACE, str(room.unread or ""), where=room.name))
        self.here, room.unread, room.called = room.name, 0, 0

    def rename(self, room: Room, name: str) -> None:
        """It is called otherwise, and is in its place."""
        looked_at = self.here == room.name
        self.outbox.readdress(room.name, name)
        self.rooms.rename(room, name)
        if looked_at:
            self.go(room)

    def close(self, room: Room) -> None:
        """Look at it no more."""
        self.rooms.pop(fold(room.name), None)
        if self.here == room.name:
            self.here = ""
            for other in list(self.rooms.values())[-1:]:
                self.go(other)

    def said(self, view: View) -> None:
        """A live message: behind the pages that are on their way."""
        room = self.room_for(view.where)
        if room.held is None:
            self.deliver(room, view)
        else:
            room.hold(view)

    def timed(self, view: View) -> View:
        """So that it is known later, too, when that was."""
        return view if view.time is not None else view._replace(time=int(self.clock() * 1000))

    def happened(self, room: Room, view: View) -> None:
        """Something else than a message, likewise."""
        view = self.timed(view)
        if room.held is None:
            room.views.append(view)
            self.show(view)
        else:
            room.hold(view)

    def knows(self, id: str) -> bool:
        """Whether that message has come already; from now on it has."""
        known = id in self.seen
        if id:
            self.seen[id] = None
        if len(self.seen) > IDS_KEPT:
            del self.seen[next(iter(self.seen))]
        return known

    def deliver(self, room: Room, view: View) -> None:
        """The next message of a room, in its order."""
        self.newest = max(self.newest, view.time or 0)
        known = self.knows(view.id)
        if view.id and not known:
            room.mark = f"msgid={view.id}"
        if view.own_id:
            arrived = self.outbox.arrived(view.own_id)
            if view.own_id in self.shown:
                self.shown.discard(view.own_id)
                return self.show(view._replace(kind=ARRIVED))
            known = known and arrived is None
        if known or view.kind != SAID or (fold(view.name) in self.ignored and not view.mine):
            return
        room.spoke(view.name)
        view = self.timed(view)
        room.views.append(view)
        if room.name != self.here and not (view.mine or view.past):
            room.unread += 1
            room.called += view.called
        self.show(view)

    def release(self, room: Room) -> None:
        """All that came before is here: now what has waited for it."""
        held, room.held = room.held or [], None
        for view in held:  # also what the pages had: it may be the answer to one of ours
            (self.deliver if view.kind == SAID else self.happened)(room, view)
        self.outbox.doubtful -= {
            one.id for one in self.outbox.waiting.values() if fold(one.where) == fold(room.name)
        }

    def lost(self, own_id: str, reason: str) -> None:
        """A message of ours has not arrived, and is not sent again."""
        one = self.outbox.arrived(own_id)
        if one is not None:
            self.shown.discard(own_id)
            self.failures += 1
            text = f"{reason}: {cut(one.text, SHOWN_FAILED)}"
            self.show(View(FAILED, text, where=one.where, own_id=own_id))


# What a person wants: commands, over IRC


def asked_room(core: ClientCore, name: str = "") -> Room:
    """The one that is meant: by name, or that is looked at. Raises Refused."""
    room = core.rooms.get(fold(name)) if name else core.room
    if room is None:
        raise Refused("NO_ROOM", f"{name or 'nothing'} is not open; /join #CHANNEL opens one")
    return room


def channel_first(core: ClientCore, words: str) -> tuple[str, str]:
    """A channel, if one is named before the rest, else the one that is looked at; the rest."""
    first, _, rest = words.partition(" ")
    return (first, rest.strip()) if is_channel(first) else (asked_room(core).name, words)


@client_command("help", most=1, nameless=True)
def do_help(core: ClientCore, verb: str = "") -> None:
    """/help [COMMAND] -- what can be typed here"""
    wanted = client_command.get(verb.lstrip("/").lower())
    shown = [wanted] if wanted else client_command.values()
    column = max(len(one.syntax) for one in shown)
    core.show(*(View(TOLD, f"{one.syntax:{column}}  {one.summary}") for one in shown))


@client_command("join", 1, 2)
def do_join(core: ClientCore, name: str, password: str = "") -> None:
    """/join #CHANNEL [PASSWORD] -- enter a channel, or look at it again"""
    room = core.rooms.get(fold(name))
    if room and room.inside:
        return core.go(room)
    core.talk.going[fold(name)] = password
    core.talk.enter(Room(name, password))
    if not core.tidy:  # what a pipe says next is meant for there
        core.go(core.room_for(name))


@client_command("part", most=2)
def do_part(core: ClientCore, name: str = "", reason: str = "") -> None:
    """/part [#CHANNEL] [REASON] -- leave a channel, or close a private talk"""
    room = asked_room(core, name)
    if room.inside:
        core.talk.send("PART", room.name, *[reason] * bool(reason))
    else:
        core.close(room)


@client_command("go", 1, nameless=True)
def do_go(core: ClientCore, name: str) -> None:
    """/go #CHANNEL|NAME|N -- look at another conversation, by its name or number"""
    number = whole_number(name)
    if number and number <= len(core.rooms):
        return core.go(list(core.rooms.values())[number - 1])
    found = core.rooms.get(fold(name)) or core.rooms.get(fold(f"#{name}"))
    core.go(found or asked_room(core, name))


@client_command("tell", 1, 2)
def do_tell(core: ClientCore, name: str, text: str = "") -> None:
    """/tell NAME [TEXT] -- say something to one person only, or begin a private talk"""
    for one in name.split(",") if text else ():
        if fold(one) in SERVICES:  # which keep nothing, and shall not be told twice
            core.talk.send("PRIVMSG", one, text)
        else:
            core.send(one, text)
    if not text or is_channel(name):
        core.go(core.room_for(name))


@client_command("me", 1)
def do_me(core: ClientCore, text: str) -> None:
    """/me TEXT -- say what you do"""
    core.send(asked_room(core).name, text, ACTION)


@client_command("names", most=1)
def do_names(core: ClientCore, name: str = "") -> None:
    """/names [#CHANNEL] -- who is here"""
    where = name or asked_room(core).name
    core.talk.shown_names.add(fold(where))
    core.talk.send("NAMES", where)


@client_command("list", most=1)
def do_list(core: ClientCore, mask: str = "") -> None:
    """/list [MASK] -- which channels there are"""
    core.talk.send("LIST", *[mask] * bool(mask))


@client_command("topic", most=1)
def do_topic(core: ClientCore, words: str = "") -> None:
    """/topic [#CHANNEL] [TEXT] -- read or set what a channel is about"""
    where, text = channel_first(core, words)
    core.talk.send("TOPIC", where, *[text] * bool(text))


@client_command("nick", 1)
def do_nick(core: ClientCore, name: str) -> None:
    """/nick NAME -- be called otherwise"""
    core.talk.send("NICK", name)


@client_command("history", most=2)
def do_history(core: ClientCore, *words: str) -> None:
    """/history [#CHANNEL|NAME] [N] -- what was said last"""
    count = whole_number(words[-1]) if words else None
    name = words[0] if words and (len(words) > 1 or not count) else asked_room(core).name
    if not core.talk.pages:
        raise Refused("NO_HISTORY", "this server keeps no history")
    core.talk.asked.append(Asked(name, "asked", 0))
    limit = min(count or HISTORY_LINES, HISTORY_LINES_MOST)
    core.talk.send("CHATHISTORY", "LATEST", name, "*", str(limit))


@client_command("search", 1)
def do_search(core: ClientCore, words: str) -> None:
    """/search WORDS -- what was said with these words in it, here"""
    if "soju.im/search" not in core.talk.enabled:
        raise Refused("NO_SEARCH", "this server cannot search")
    where, text = channel_first(core, words)
    core.talk.send("SEARCH", f"in={escaped_tag(where)};text={escaped_tag(text)}")


@client_command("away", most=1)
def do_away(core: ClientCore, reason: str = "") -> None:
    """/away [REASON] -- say that you are not here, or that you are back"""
    core.talk.send("AWAY", *[reason] * bool(reason))


@client_command("ignore", most=1, nameless=True)
def do_ignore(core: ClientCore, name: str = "") -> None:
    """/ignore [NAME] -- do not show what somebody says, or show it again; who is ignored"""
    if name:
        core.ignored ^= {fold(name)}
    text = ", ".join(sorted(core.ignored)) or "nobody"
    core.show(View(NOTE, f"ignored: {text}"))


@client_command("invite", 1, 2)
def do_invite(core: ClientCore, name: str, where: str = "") -> None:
    """/invite NAME [#CHANNEL] -- ask somebody to come in"""
    core.talk.send("INVITE", name, where or asked_room(core).name)


@client_command("kick", 1, 2)
def do_kick(core: ClientCore, name: str, reason: str = "") -> None:
    """/kick NAME [REASON] -- put somebody out of this channel"""
    core.talk.send("KICK", asked_room(core).name, name, *[reason] * bool(reason))


@client_command("mode", most=1)
def do_mode(core: ClientCore, words: str = "") -> None:
    """/mode [#CHANNEL] [+-LETTERS] [VALUE ...] -- read or set what a channel is like"""
    where, rest = channel_first(core, words)
    core.talk.send("MODE", where, *rest.split())


@client_command("whois", 1)
def do_whois(core: ClientCore, name: str) -> None:
    """/whois NAME -- what is known of somebody"""
    core.talk.send("WHOIS", name)


@client_command("oper", 2)
def do_oper(core: ClientCore, name: str, password: str) -> None:
    """/oper NAME PASSWORD -- operate the server"""
    core.talk.send("OPER", name, password)


@client_command("register", most=2)
def do_register(core: ClientCore, *words: str) -> None:
    """/register [EMAIL] [PASSWORD] -- make your name yours; without a password this computer
    makes one, keeps it, and logs in with it from then on"""
    by_mail = "email-required" in core.talk.offered.get("draft/account-registration", "")
    email = words[0] if len(words) > 1 or (words and by_mail) else "*"
    password = words[-1] if words and words[-1] != email else ""
    if not password and core.me.keep is None:
        raise Refused("NO_STATE", "nothing is kept on disk; /register with a password of yours")
    core.me.generated = not password
    core.me.proposed = Login(core.name, password or secrets.token_urlsafe(SECRET_DIGITS))
    if core.me.generated:  # before anybody knows it: the answer may be lost
        core.me.login = core.me.proposed
        core.me.keep(core.me.login)
    core.talk.send("REGISTER", "*", email, core.me.proposed.password)


@client_command("verify", 1)
def do_verify(core: ClientCore, code: str) -> None:
    """/verify CODE -- the one that came by mail, to end a /register"""
    core.talk.send("VERIFY", core.name, code)


@client_command("login", 1, 2)
def do_login(core: ClientCore, *words: str) -> None:
    """/login [ACCOUNT] PASSWORD -- be who you are; also when the line has to be built up anew"""
    core.me.login = Login(words[0] if len(words) > 1 else core.name, words[-1])
    mechanism = core.talk.mechanism(asked=True) if "sasl" in core.talk.enabled else ""
    if not mechanism:
        return core.talk.send("PRIVMSG", SERVICE, f"IDENTIFY {' '.join(core.me.login)}")
    core.talk.begin_log_in(mechanism)


@client_command("passwd", 1, 2)
def do_passwd(core: ClientCore, *words: str) -> None:
    """/passwd [OLD] NEW -- another password for your account"""
    if len(words) == 1 and core.me.login is None:
        raise Refused("NOT_LOGGED_IN", "which one is the old one? /passwd OLD NEW")
    old = words[0] if len(words) > 1 else core.me.login.password
    core.me.proposed = Login(core.me.login.account if core.me.login else core.name, words[-1])
    core.talk.send("PRIVMSG", SERVICE, f"PASSWD {old} {words[-1]}")


@client_command("drop", 1)
def do_drop(core: ClientCore, password: str) -> None:
    """/drop PASSWORD -- give up your account"""
    core.talk.send("PRIVMSG", SERVICE, f"DROP {password}")


@client_command("disown", 1)
def do_disown(core: ClientCore, name: str) -> None:
    """/disown #CHANNEL -- let a channel that you founded end with its last member"""
    core.talk.send("PRIVMSG", SERVICE, f"DISOWN {name}")


@client_command("raw", 1)
def do_raw(core: ClientCore, line: str) -> None:
    """/raw LINE -- say a line of IRC to the server"""
    core.output.append(line)


@client_command("quit", most=1)
def do_quit(core: ClientCore, reason: str = "") -> None:
    """/quit -- leave"""
    core.leave()


# ======================================================================================
# ============================== THE WATERLINE =========================================
# ======================================================================================
# Above, everything is bytes in and bytes out. Below, there is an operating system.

# ======================================================================================
# LOOP
# ======================================================================================
# One turn of the loop is run_once(): poll, let every ready handler read and act, run what
# is due, let the owner end the turn, write to every connection that has something to say,
# close what was closed. Sockets are closed last, so that no file descriptor comes to mean
# something else while a turn's batch of ready ones is being worked through.

log = logging.getLogger("chat")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
OPEN, CLOSING, LINGERING, CLOSED = range(4)  # the states of a connection
TLS_TROUBLE = "TLS: "  # how a reason begins that is not the network's fault
HUNG_UP = "the connection was closed"  # in order, by both sides


def do_nothing(*_: Any) -> None:
    """For hooks that nobody uses, and for timers that only want there to be another turn."""


class Timer:
    """Something to be done later; cancel() and it will not be."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], Any]):
        self.when, self.callback = when, callback

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        self.callback = None


class Delay:
    """Many waits of one length: they end in the order they began, so an item costs a dict
    entry and not a timer. `due` is called with each item whose time is up."""

    def __init__(self, loop: "Loop", seconds: float, due: Callable[[Any], None]):
        self.loop, self.seconds, self.due = loop, seconds, due
        self.waiting: dict[Any, float] = {}  # until when, the soonest first
        self.armed = False

    def add(self, item: Any) -> None:
        """Begin a wait, unless this item is waiting already."""
        if item not in self.waiting:
            self.waiting[item] = time.monotonic() + self.seconds
            self._arm()

    def discard(self, item: Any) -> None:
        self.waiting.pop(item, None)

    def _arm(self) -> None:
        if self.waiting and not self.armed:
            self.armed = True
            first = next(iter(self.waiting.values()))
            self.loop.call_later(first - time.monotonic(), self._sweep)

    def _sweep(self) -> None:
        self.armed = False
        due = itertools.takewhile(lambda pair: pair[1] <= self.loop.now, self.waiting.items())
        try:
            for item, _ in list(due):
                del self.waiting[item]
                self.due(item)
        finally:
            self._arm()


def reason_of(error: OSError) -> str:
    """What went wrong, in the operating system's words without its numbers."""
    if error.errno == errno.ENOTCONN:  # how a reset shows when we hang up
        return "connection reset by peer"
    return (error.strerror or str(error)).lower()


class Connection:
    """A socket and its buffers. Knows nothing of chat; a subclass says what to do with

    received(data)    plaintext has come
    ended()           the other side will send no more (once)
    lost(reason)      it is closed, whoever closed it (once)
    secured()         the TLS handshake is done
    wants_read()      whether to listen to the other side just now
    lagging()         some of what was written could not be sent, or now has been

    close() sends what is queued first, drop() does not. What is written is sent at the
    end of the turn, in one piece; broadcast() sends at once.
    """

    __slots__ = ("direct", "eof", "loop", "mask", "queue", "sealed", "sock", "state", "tls")
    hears_out = False  # after close(): take what still comes, for as long as it comes

    def __init__(self, loop: "Loop", sock: socket.socket):
        sock.setblocking(False)
        self.loop, self.sock = loop, sock
        self.queue = SendQueue()
        self.tls: TlsFilter | None = None
        self.sealed = b""  # encrypted, not yet sent
        self.direct = True  # no TLS, nothing queued, open: broadcast() may use the socket
        self.eof = False
        self.state = OPEN
        self.mask = READ
        loop.selector.register(sock, READ, self)

    def received(self, data: bytes) -> None:
        raise NotImplementedError

    def ended(self) -> None:
        self.close()

    def lost(self, reason: str) -> None:
        pass

    def secured(self) -> None:
        pass

    def wants_read(self) -> bool:
        return True

    def lagging(self) -> None:
        pass

    # Reading

    def ready(self, mask: int) -> None:
        if self.state == CLOSED:
            return  # by a handler that ran earlier in this turn
        if mask & WRITE:
            self.loop.dirty.add(self)
        if mask & READ:
            self.read()

    def read(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            return self._bury(reason_of(error))
        if not data:
            self._end()
        elif self.state == OPEN or self.hears_out:
            self.arrived(data)

    def arrived(self, data: bytes) -> None:
        """Bytes from the network, sealed or not."""
        if self.tls is None:
            return self.received(data)
        try:
            was_ready = self.tls.ready
            plain = self.tls.feed(data)
        except TlsFailed as failure:
            with contextlib.suppress(OSError):
                self.sock.send(self.tls.take())  # an alert, which says what was wrong
            return self.drop(f"{TLS_TROUBLE}{failure}")
        self.loop.dirty.add(self)  # the handshake may have something to say
        if self.tls.ready and not was_ready:
            self.secured()
        if self.state == CLOSED:  # we do not like who it is
            return
        if plain:
            self.received(plain)
        if self.tls.ended:
            self._end()

    def _end(self) -> None:
        """The other side will send no more."""
        if self.state == LINGERING:
            self._bury(HUNG_UP)
        elif not self.eof:
            self.eof = True
            if self.state == OPEN:
                self.ended()
            self.update()

    # Writing

    def write(self, data: bytes) -> None:
        """To be sent at the end of this turn."""
        if self.state <= CLOSING:
            self.direct = False
            self.queue.append(data)
            self.loop.dirty.add(self)

    def cut_short(self, data: bytes, sent: int, error: OSError | None) -> None:
        """Only so much of it went straight to the socket: keep the rest, or bury the dead."""
        if error and not isinstance(error, BlockingIOError):
            return self._bury(reason_of(error))
        self.write(data)
        self.queue.advance(sent)

    def flush(self) -> None:
        """Send what the network takes of what is queued; then finish a close()."""
        if self.state >= LINGERING:
            return
        try:
            if self.tls is not None:
                self._flush_tls()
            elif self.queue.size:
                self.queue.advance(self.sock.send(self.queue.head()))
        except BlockingIOError:
            pass
        except OSError as error:
            return self._bury(reason_of(error))
        except TlsFailed as failure:
            return self.drop(f"{TLS_TROUBLE}{failure}")
        self.direct = self.tls is None and not self.queue.size and self.state == OPEN
        if self.unsent or self.mask != READ or self.state != OPEN:
            self._flushed()

    def _flushed(self) -> None:
        """What is not the common case: something is left, or was, or it is the end."""
        self.lagging()
        if self.state == CLOSING and not self.unsent:
            self._hang_up()
        self.update()

    def encrypt(self, tls: TlsFilter) -> None:
        """From here on everything goes through this, the handshake first."""
        self.tls = tls
        self.direct = False
        self.loop.dirty.add(self)

    def _flush_tls(self) -> None:
        """Encrypt only what is about to be sent: the backlog stays shared plaintext."""
        if not self.sealed and self.queue.size and self.tls.ready:
            data = self.queue.head()[:SEND_BYTES]
            self.tls.seal(data)
            self.queue.advance(len(data))
        self.sealed += self.tls.take()
        if self.sealed:
            self.sealed = self.sealed[self.sock.send(self.sealed) :]

    @property
    def unsent(self) -> int:
        return self.queue.size + len(self.sealed)

    def update(self) -> None:
        """The one place that decides what the selector watches."""
        if self.state == CLOSED:
            return
        reads = (
            self.wants_read() if self.state == OPEN else self.state == LINGERING or self.hears_out
        )
        mask = READ if reads and not self.eof else 0
        if self.unsent and self.state <= CLOSING:
            mask |= WRITE
        if mask == self.mask:
            return
        if not self.mask:
            self.loop.selector.register(self.sock, mask, self)
        elif mask:
            self.loop.selector.modify(self.sock, mask, self)
        else:
            self.loop.selector.unregister(self.sock)
        self.mask = mask

    # Closing

    def close(self) -> None:
        """Send what is queued, say that there is no more, wait for the other side."""
        if self.state == OPEN:
            self.state = CLOSING
            self.loop.dirty.add(self)
            if not self.hears_out:
                self.loop.linger.add(self)

    def _hang_up(self) -> None:
        """Everything is sent. Closing at once would answer what the other side may still
        send with a reset, and that would destroy our last words on their way."""
        if self.tls is not None and self.tls.finish():
            self.loop.dirty.add(self)  # that is one more thing to be sent
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            return self._bury(reason_of(error))
        if self.eof:
            return self._bury(HUNG_UP)
        self.state = LINGERING

    def drop(self, reason: str) -> None:
        """Close now, whatever is queued."""
        self._bury(reason)

    def _bury(self, reason: str) -> None:
        if self.state == CLOSED:
            return
        if self.mask:
            self.loop.selector.unregister(self.sock)
            self.mask = 0
        self.state = CLOSED
        self.direct = False
        self.queue.clear()
        self.loop.linger.discard(self)
        self.loop.dirty.discard(self)
        self.loop.graves.append(self.sock)
        self.lost(reason)


def broadcast(data: bytes, owners: Iterable[Any]) -> None:
    """The same bytes to the conn of each, now. The inner loop of the server: a method of
    Connection's called for each would cost 4 % of all it does, measured."""
    size = len(data)
    for owner in owners:
        conn = owner.conn
        if not conn.direct:
            conn.write(data)
            continue
        sent, trouble = 0, None
        try:
            sent = conn.sock.send(data)
        except OSError as error:
            trouble = error
        if sent < size:
            conn.cut_short(data, sent, trouble)


class Loop:
    """A selector, timers, and what other threads hand in."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.now = time.monotonic()  # of this turn
        self.timers: list[Timer] = []
        self.soon: collections.deque[Callable] = collections.deque()
        self.dirty: set[Connection] = set()  # have something to write or to finish
        self.graves: list[socket.socket] = []
        self.running = False
        self.turn_begins: Callable = do_nothing
        self.turn_ends: Callable = do_nothing
        self.linger = Delay(self, LINGER_SECONDS, lambda conn: conn.drop("did not hang up"))
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)
        self.selector.register(self.woken, READ, self)

    def run(self) -> None:
        self.running = True
        while self.running:
            self.run_once()

    def stop(self) -> None:
        self.running = False

    def run_once(self, longest: float | None = None) -> None:
        """One turn; waits at most `longest` seconds for something to happen."""
        ready = self.selector.select(self._timeout(longest))
        self.now = time.monotonic()
        self.turn_begins()
        for key, mask in ready:
            self._guarded(key.data.ready, mask)
        self._run_due()
        self._guarded(self.turn_ends)
        dirty, self.dirty = self.dirty, set()
        for conn in dirty:
            self._guarded(conn.flush)
        while self.graves:
            self.graves.pop().close()

    def _guarded(self, callback: Callable, *args: Any) -> None:
        """The one catch: a bug costs the connection it happened on, and is logged."""
        try:
            callback(*args)
        except Exception:
            owner = getattr(callback, "__self__", None)
            log.exception("a bug, please report it (%s)", getattr(owner, "address", "no peer's"))
            if isinstance(owner, Connection):
                owner.drop("internal error")

    def _timeout(self, longest: float | None) -> float | None:
        while self.timers and self.timers[0].callback is None:
            heapq.heappop(self.timers)
        if self.soon or self.dirty:
            return 0
        if not self.timers:
            return longest
        wait = max(0.0, self.timers[0].when - time.monotonic())
        return wait if longest is None else min(wait, longest)

    def _run_due(self) -> None:
        while self.timers and self.timers[0].when <= self.now:
            timer = heapq.heappop(self.timers)
            if timer.callback:
                self._guarded(timer.callback)
        for _ in range(len(self.soon)):  # what they add is for the next turn
            self._guarded(self.soon.popleft())

    def call_later(self, seconds: float, callback: Callable[[], Any]) -> Timer:
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self.timers, timer)
        return timer

    def call_soon(self, callback: Callable[[], Any]) -> None:
        self.soon.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], Any]) -> None:
        """The same from another thread or a signal handler: wakes the selector."""
        self.soon.append(callback)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already: it will wake
            self.waker.send(b"\0")

    def ready(self, mask: int) -> None:
        """Somebody has woken us, which is all there is to it."""
        with contextlib.suppress(BlockingIOError):
            self.woken.recv(READ_BYTES)

    def close(self) -> None:
        self.selector.close()
        self.woken.close()
        self.waker.close()


def attempt(job: Callable[[], Any]) -> Any:
    """What job() gives; an exception is a result, too."""
    try:
        return job()
    except Exception as error:
        return error


class Helpers:
    """A few threads for what would make the loop wait: pages, checkpoints, look-ups.

    Whoever asks most waits most: a free thread takes the next owner's oldest job, and
    there are so few threads that no owner ever has many jobs under way.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.waiting: dict[Any, collections.deque] = {}  # jobs by owner, next owner first
        self.free = HELPER_THREADS
        self.started = False

    def submit(self, owner: Any, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run job() on a thread, then then(result) on the loop; an exception is a result."""
        if not self.started:
            self.started = True
            for _ in range(HELPER_THREADS):
                threading.Thread(target=self._work, daemon=True).start()
        self.waiting.setdefault(owner, collections.deque()).append((job, then))
        self._hand_out()

    def _hand_out(self) -> None:
        while self.free and self.waiting:
            owner = next(iter(self.waiting))
            jobs = self.waiting.pop(owner)
            self.free -= 1
            self.jobs.put(jobs.popleft())
            if jobs:
                self.waiting[owner] = jobs  # behind the others

    def close(self) -> None:
        """The threads end once they have nothing more to do."""
        for _ in range(HELPER_THREADS):
            self.jobs.put(None)

    def _work(self) -> None:
        while work := self.jobs.get():
            job, then = work
            self.loop.call_soon_threadsafe(functools.partial(self._done, then, attempt(job)))

    def _done(self, then: Callable[[Any], None], result: Any) -> None:
        self.free += 1
        self._hand_out()
        then(result)


# ======================================================================================
# SERVER
# ======================================================================================
# Listeners, peers, and the five beats: the loop polls and reads, act() turns lines into
# Hub calls, end_turn() commits and writes. Whatever a peer does wrong is answered or
# logged here in one line, and nobody else notices.


TLS_FIRST_BYTES = b"\x16\x03"  # a handshake record, and a version (RFC 8446 section 5.1)


class ServerOptions(NamedTuple):
    """What the command line says; the defaults are what it says when it says nothing."""

    listen: tuple[tuple[str, int], ...] = ((DEFAULT_HOST, DEFAULT_PORT),)
    data: pathlib.Path | None = None  # None: in memory
    keep: int | None = None
    password: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None  # whose client certificates are looked at
    flood: tuple[float, float] | None = (FLOOD_BURST, FLOOD_RATE)
    max_clients: int | None = None  # None: what the descriptor limit allows
    max_per_address: int = PER_ADDRESS
    name: str = SERVER_NAME
    network: str = SERVER_NAME
    oper: tuple[tuple[str, str], ...] = ()  # names and passwords
    register: frozenset[str] = frozenset()  # how accounts are made, see Site
    sts: int | None = None
    sendmail: str | None = None  # a command that takes a message, like sendmail -t
    motd: pathlib.Path | None = None


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Peer(Connection):
    """A connection as the server sees it; what a session knows as its conn."""

    __slots__ = (
        "address",
        "asked",
        "budget",
        "greeted",
        "heard",
        "held",
        "host",
        "inbox",
        "leaving",
        "resuming",
        "server",
        "session",
    )

    def __init__(self, server: "Server", sock: socket.socket, host: str, port: int):
        super().__init__(server.loop, sock)
        self.server = server
        self.host = host
        self.address = address_text(host, port)
        self.inbox: LineBuffer | None = None  # until something comes: many never speak
        self.session: Session | None = None
        self.budget: Budget | None = None
        self.heard = server.loop.now  # when, last ...
        self.asked = 0.0  # ... and when it was asked whether it is still there
        self.greeted = False
        self.held = False  # its lines wait for an answer ...
        self.resuming = False  # ... or for resume(), which is on its way
        self.leaving = False  # its lines are not taken any more

    # What a session may do with its conn

    def named(self) -> None:
        """The session has a name: no more hurry."""
        self.server.unnamed.discard(self)
        if self.session.probed:
            self.server.probed.add(self)

    def charge(self, items: int) -> None:
        """A command that looks through so many costs as much as many lines."""
        if self.budget:
            self.budget.tokens -= items / LOOKED_AT_A_LINE

    @property
    def secure(self) -> bool:
        return self.tls is not None

    @property
    def certifiable(self) -> bool:
        return self.secure and self.server.options.tls_client_ca is not None

    @property
    def fingerprint(self) -> str:
        return self.tls.fingerprint() if self.tls else ""

    @property
    def gone(self) -> bool:
        return self.state == CLOSED

    def close(self) -> None:
        """Leave. The connection is closed behind the last thing that this turn gives it."""
        if not self.leaving:
            self.leaving = True
            self.server.unnamed.discard(self)
            if self.inbox:
                self.inbox.lines.clear()
            if self.session:
                self.session.ended()
            self.server.leaving.append(self)

    # What the network does to it

    @property
    def busy(self) -> bool:
        """There is something of this peer's to act on."""
        unfinished = self.session is not None and self.session.unfinished is not None
        return unfinished or bool(self.inbox and self.inbox.lines)

    def wants_read(self) -> bool:
        waits = self.held or self.leaving or self.busy
        return not waits and self.unsent <= UNSENT_NO_READ

    def ready(self, mask: int) -> None:
        # Lines that wait have a resume() on its way: enough to do. Telling the selector so
        # would cost two system calls a turn in every storm.
        super().ready(mask if self.wants_read() or self.state != OPEN else mask & ~READ)

    def received(self, data: bytes) -> None:
        self.heard = self.loop.now
        if self.inbox is None:
            self.server.silent.discard(self)
            if self.tls is None and TLS_FIRST_BYTES.startswith(data[:2]):
                return self.start_tls(data)
            self.inbox = LineBuffer(LINE_BYTES)
            self.budget = self.server.new_budget()
        self.inbox.feed(data)
        self.server.act(self)

    def start_tls(self, data: bytes) -> None:
        if self.server.tls_context is None:
            log.info("%s speaks TLS, and there is no certificate (--tls-cert)", self.address)
            return self.drop("no TLS here")
        self.encrypt(TlsFilter(self.server.tls_context))
        self.arrived(data)

    def secured(self) -> None:
        self.server.silent.add(self)

    def ended(self) -> None:
        if self.inbox is None:
            return self.close()
        if self.session is None or self.session.unended:
            self.inbox.finish()
        self.server.act(self)

    def resume(self) -> None:
        """Take up the lines that were left when this peer had its turn, or was answered."""
        self.resuming = False
        self.server.act(self)
        self.update()

    def resume_soon(self, seconds: float = 0.0) -> None:
        if self.resuming:
            return
        self.resuming = True
        if seconds:
            self.loop.call_later(seconds, self.resume)
        else:
            self.loop.call_soon(self.resume)

    def lagging(self) -> None:
        if self.unsent > UNSENT_MOST:
            self.server.drop_slow(self)
        elif self.unsent > UNSENT_SLOW:
            self.server.slow.add(self)
        else:
            self.server.slow.discard(self)
            if self.inbox and self.unsent <= UNSENT_NO_READ:
                self.resume_soon()

    def drop(self, reason: str) -> None:
        if self.inbox:
            self.inbox.lines.clear()  # our decision: what it still wanted to say is void
        super().drop(reason)

    def lost(self, reason: str) -> None:
        # Happens while the turn is being written, too: what it causes comes next turn.
        self.loop.call_soon(functools.partial(self.server.lost, self, reason))


class Listener:
    """A socket that connections arrive at."""

    def __init__(self, server: "Server", host: str, port: int):
        self.server = server
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # so that [::] and 0.0.0.0 can have the same port
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self._set_options()
        try:
            self.sock.bind((host, port))
        except OSError as error:
            self.sock.close()
            where = address_text(host, port)
            raise Unusable(
                f"cannot listen on {where}: {reason_of(error)}; try --listen HOST:0"
            ) from error
        self.sock.listen(BACKLOG)
        self.sock.setblocking(False)
        self.address = self.sock.getsockname()[:2]
        server.loop.selector.register(self.sock, READ, self)

    def _set_options(self) -> None:
        """Set once here: accepted sockets inherit them."""
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
            ("TCP_KEEPALIVE", KEEPALIVE_SECONDS),  # macOS calls it so
            ("TCP_KEEPINTVL", KEEPALIVE_EVERY),
            ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ):
            if hasattr(socket, option):
                self.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def ready(self, mask: int) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, (host, port, *_) = self.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                return self._back_off(error)
            self.server.admit(sock, host, port)

    def _back_off(self, error: OSError) -> None:
        """No descriptors, or no memory. Who waits is told so on the descriptor we have
        spare for that; where even this is not possible, asking again at once would spin."""
        log.warning("cannot accept: %s; raise the limit (ulimit -n)", reason_of(error))
        if self.server.door.turn_away_all(self.sock):
            return
        self.server.loop.selector.unregister(self.sock)
        self.server.loop.call_later(ACCEPT_BACKOFF, self._come_back)

    def _come_back(self) -> None:
        if self.sock.fileno() >= 0:
            self.server.loop.selector.register(self.sock, READ, self)

    def close(self) -> None:
        with contextlib.suppress(KeyError):
            self.server.loop.selector.unregister(self.sock)
        self.sock.close()


def spare_descriptor() -> int | None:
    """One that can be closed when there are none left, to say so to a newcomer."""
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None


def descriptor_limit() -> int:
    """How many files and sockets we may have open, after asking for as many as we may ask."""
    try:
        import resource
    except ImportError:
        return 512  # what select() takes on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a hard limit that it refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def read_motd(path: pathlib.Path | None) -> list[str]:
    """Its lines, as they can be shown. Raises Unusable."""
    try:
        return harmless(path.read_text("utf-8-sig")).expandtabs().splitlines() if path else []
    except UnicodeDecodeError:
        raise Unusable(f"the message of the day {path} is not UTF-8 text") from None
    except OSError as error:
        raise Unusable(f"cannot read the message of the day {path}: {reason_of(error)}") from error


def server_tls_context(options: ServerOptions) -> Any:
    if not options.tls_cert:
        if options.tls_key or options.sts or options.tls_client_ca:
            text = "--tls-key, --tls-client-ca and --sts are of no use without --tls-cert"
            raise Unusable(text)
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key is refused: nobody may be there who could be asked.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
    except OSError as error:
        what = f"the certificate {options.tls_cert}"
        what += f" with the key {options.tls_key}" if options.tls_key else ""
        why = "no PEM, not a pair, or encrypted"  # OpenSSL says but "PEM lib"
        why = why if isinstance(error, ssl.SSLError) else reason_of(error)
        raise Unusable(f"cannot use {what}: {why}") from error
    if options.tls_client_ca:
        try:
            context.load_verify_locations(options.tls_client_ca)
        except OSError as error:
            why = "no PEM" if isinstance(error, ssl.SSLError) else reason_of(error)
            text = f"cannot use the authorities {options.tls_client_ca}: {why}"
            raise Unusable(text) from error
        context.verify_mode = ssl.CERT_OPTIONAL  # who shows none is welcome, too
    return context


class Door:
    """Who may come in: so many in all, and so many from one address. Who may not is told
    which limit it is, and so is everybody who waits when there are no descriptors left."""

    def __init__(self, options: ServerOptions):
        room = max(descriptor_limit() - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)
        self.most = options.max_clients or room
        self.most_per_address = options.max_per_address
        self.inside = 0
        self.per_address: collections.Counter[str] = collections.Counter()
        self.spare = spare_descriptor()

    def enter(self, host: str) -> str:
        """Count somebody in; or say why not."""
        if self.inside >= self.most:
            return f"this server is full: {self.most} clients"
        if self.per_address[host] >= self.most_per_address and not is_loopback(host):
            text = f"too many connections from {host}: {self.most_per_address} at most"
            return f"{text} (--max-per-address)"
        self.inside += 1
        self.per_address[host] += 1
        return ""

    def leave(self, host: str) -> None:
        self.inside -= 1
        self.per_address[host] -= 1
        if not self.per_address[host]:
            del self.per_address[host]

    def turn_away(self, sock: socket.socket, host: str, text: str) -> None:
        log.warning("%s turned away: %s", host, text)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(f"* {text}; try again later\n".encode())
        sock.close()

    def turn_away_all(self, listening: socket.socket) -> bool:
        """Everybody in the backlog, on the spare descriptor; whether that went well."""
        if self.spare is None:
            return False
        os.close(self.spare)
        try:
            for _ in range(ACCEPTS_A_TURN):
                sock, (host, *_) = listening.accept()
                self.turn_away(sock, host, "this server has no file descriptors left (ulimit -n)")
        except OSError as error:
            return isinstance(error, BlockingIOError)
        finally:
            self.spare = spare_descriptor()
        return True

    def close(self) -> None:
        if self.spare is not None:
            os.close(self.spare)


def mail_code(options: ServerOptions, address: str, name: str, code: str) -> None:
    """Send the code of a new account. For off the loop. Raises Unusable."""
    from email.message import EmailMessage  # 20 ms, paid only by those who send mail

    if not options.sendmail:
        raise Unusable("this server cannot send mail (--sendmail)")
    message = EmailMessage()
    message["To"], message["Subject"] = address, f"Your code for {options.network}"
    message.set_content(f"The code of the account {name} is {code}.\n")
    command = shlex.split(options.sendmail)
    try:
        subprocess.run(command, input=message.as_bytes(), timeout=MAIL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("--sendmail: %s", error)
        raise Unusable("the mail could not be sent; try again later") from error


def hub_of(store: Store, now: float) -> Hub:
    """Where the last server stopped."""
    hub = Hub(store.last_id, store.last_time)
    hub.begin(now)
    hub.accounts.read(store.accounts())
    hub.accounts.certificates.update(store.rows("certificates"))
    for owner, target, when in store.rows("markers"):
        hub.markers.setdefault(owner, {})[target] = when
    try:
        revive(hub, store.rows("channels"), store.rows("stays"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"the database {store.path} is damaged ({error!r}); move it away") from error
    store.abandon({user.stay for user in hub.users.values()})
    return hub


class Keeper:
    """The commit beat, and what the store needs besides: checkpoints and pruning."""

    def __init__(self, loop: Loop, store: Store, helpers: Helpers):
        self.loop, self.store, self.helpers = loop, store, helpers
        self.losing = False  # the store is; it has been logged
        self.checkpoint_due = False
        self.index_due = False
        self.committed = 0.0  # when, last
        self.sweep()

    def commit(self, hub: Hub) -> bool:
        """The turn's events are stored, or never will be; False: not yet."""
        turn = hub.turn
        if turn.kept:
            settle(hub)
        if not turn.to_store:
            return True
        self.committed = self.loop.now
        outcome = self.store.commit(turn, self.loop.now)
        if outcome == BUSY:
            self.loop.call_later(BUSY_RETRY_SECONDS, do_nothing)
            return False
        if outcome == LOST:
            turn.not_kept(self.store.trouble)
        if self.losing != (outcome == LOST):
            self.losing = not self.losing
            if self.losing:
                log.error("history is not being kept: %s", self.store.trouble)
            else:
                log.warning("history is being kept again")
        if self.store.path and not self.checkpoint_due:
            self.checkpoint_due = True
            self.loop.call_later(CHECKPOINT_SECONDS, self.checkpoint)
        words = self.store.words
        if (words.behind or words.untidy) and not self.index_due:
            self.index_due = True
            self.loop.call_later(INDEX_SECONDS, self.index)
        return True

    def index(self) -> None:
        """Slice by slice, in turns that have nothing else to do; under unbroken load one
        slice now and then."""
        if not self.store.words.advance():
            self.index_due = False
        elif self.loop.now - self.committed < INDEX_SECONDS / 10:
            self.loop.call_later(INDEX_SECONDS, self.index)
        else:
            self.loop.call_soon(self.index)

    def prune(self, idle: bool) -> None:
        if self.store.prune(idle, int(time.time() * 1000)) and idle:
            self.loop.call_soon(do_nothing)  # and another slice in the next turn

    def sweep(self) -> None:
        more = False
        with contextlib.suppress(sqlite3.Error):  # busy or full: another time
            more = self.store.receipts.sweep(int(time.time() * 1000))
        self.loop.call_later(0 if more else SWEEP_SECONDS, self.sweep)

    def checkpoint(self) -> None:
        def done(error: Exception | None) -> None:
            self.checkpoint_due = False
            if error and not self.losing:
                log.error("checkpoint: %s", error)

        self.helpers.submit(self, self.store.checkpoint, done)


def site_of(server: "Server") -> Site:
    """What the sessions of a server share, as the command line wants it."""
    options = server.options
    return Site(
        server.hub,
        server.store,
        server.later,
        server.read,
        server,
        options.password,
        options.name,
        options.network,
        {name: make_verifier(word, OPERATOR_ROUNDS) for name, word in options.oper},
        options.register,
        options.sts or 0,
    )


class Server:
    """Everything of one running server."""

    def __init__(self, loop: Loop, options: ServerOptions):
        self.loop, self.options = loop, options
        self.tls_context = server_tls_context(options)
        path = options.data / "chat.db" if options.data else None
        self.store = Store(path, options.keep)
        self.hub = hub_of(self.store, time.time())
        self.site = site_of(self)
        self.motd = read_motd(options.motd)
        self.mail = functools.partial(mail_code, options)
        self.note = functools.partial(log.warning, "%s")  # what operators do goes to the log
        self.helpers = Helpers(loop)
        self.peers: set[Peer] = set()
        self.door = Door(options)
        self.silent = Delay(loop, GREETING_SECONDS, self.greet)
        self.unnamed = Delay(loop, NAMING_SECONDS, self.evict)
        self.slow = Delay(loop, SLOW_SECONDS, self.drop_slow)
        self.probed = Delay(loop, PONG_SECONDS, self.probe)
        self.missed = Delay(loop, GRACE_SECONDS, self.hub.give_up)
        self.leaving: list[Peer] = []  # to be closed once this turn is written
        self.jobs: list[tuple[str, Callable, Callable]] = []  # for helpers, after the commit
        self.keeper = Keeper(loop, self.store, self.helpers)
        self.stopping = self.restarting = False
        self.listeners = [Listener(self, *address) for address in options.listen]
        self.tls_port = self.listeners[0].address[1]  # the same as for plain text
        for user in self.hub.users.values():  # of the last server
            self.miss(user)
        loop.turn_begins = self.begin_turn
        loop.turn_ends = self.end_turn

    # Coming

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """A connection has been accepted: it becomes a peer, or is told why not."""
        if refusal := self.door.enter(host):
            return self.door.turn_away(sock, host, refusal)
        peer = Peer(self, sock, host, port)
        self.peers.add(peer)
        self.silent.add(peer)
        self.unnamed.add(peer)

    def greet(self, peer: Peer) -> None:
        peer.greeted = True
        peer.write(GREETING)

    def evict(self, peer: Peer) -> None:
        text = f"no name after {NAMING_SECONDS:.0f} seconds; come back when you have one"
        if peer.session:
            peer.session.farewell(text)
        else:
            peer.write(f"* {text}\n".encode())
        peer.close()

    def probe(self, peer: Peer) -> None:
        """Now and then: has anything been heard of this one? TCP tells us only of those
        who said goodbye."""
        if peer.busy or peer.held:  # we are the ones who do not listen
            peer.heard = self.loop.now
        silent = self.loop.now - peer.heard
        if silent >= PING_SECONDS and peer.asked > peer.heard:
            return peer.session.end(f"Ping timeout: {silent:.0f} seconds", meant=False)
        if silent >= PING_SECONDS:
            peer.asked = self.loop.now
            peer.session.probe()
        self.probed.add(peer)

    # What operators may ask for

    def nameless(self) -> int:
        return len(self.unnamed.waiting)

    def refresh(self) -> None:
        """`chat.py passwd` may have changed an account meanwhile."""
        if not self.hub.turn.writes and self.store.changed_elsewhere():
            self.hub.accounts.read(self.store.accounts())

    def miss(self, user: User) -> None:
        """Give somebody a while to come back, from now on; so many at most."""
        self.missed.discard(user)
        self.missed.add(user)
        absent, host = self.missed.waiting, host_of(user.source.address)
        local = is_loopback(host)
        near = [] if local else [u for u in absent if host_of(u.source.address) == host]
        for crowd, most in ((near, self.options.max_per_address), (absent, ABSENT_MOST)):
            if len(crowd) > most:
                first = next(iter(crowd))
                self.missed.discard(first)
                self.loop.call_soon(functools.partial(self.hub.give_up, first))
                return

    def rehash(self, session: Session, then: Callable = do_nothing) -> None:
        """Read again what may have changed: if one of it cannot be read, all stays as it
        was, and then() is not called."""

        def read() -> tuple[Any, list[str]]:
            return server_tls_context(self.options), read_motd(self.options.motd)

        def use(result: tuple[Any, list[str]]) -> None:
            self.tls_context, self.motd = result
            then()

        session.later(read, use)

    def restart(self, session: Session) -> None:
        """Not with files that the new start could not read."""

        def begin() -> None:
            self.restarting = True
            self.stop()

        self.rehash(session, begin)

    def new_budget(self) -> Budget | None:
        return Budget(*self.options.flood, self.loop.now) if self.options.flood else None

    # The act beat

    def act(self, peer: Peer) -> None:
        """Some lines of one peer become Hub calls; then see when to take the next."""
        if peer.resuming or peer.held or peer.leaving:
            return
        if peer.budget:
            peer.budget.refill(self.loop.now)
        for _ in range(LINES_A_TURN):
            if peer.held or peer.leaving or self.too_much(peer):
                break
            if peer.session and peer.session.unfinished:
                peer.session.go_on()
            elif not self.act_on_a_line(peer):
                break
        if peer.busy and not peer.held:
            self.postpone(peer)
        elif peer.eof and not peer.busy and not peer.held:
            peer.close()

    def act_on_a_line(self, peer: Peer) -> bool:
        """Whether there was one, and budget for it."""
        if peer.budget and peer.budget.tokens < 1:
            return False
        line = peer.inbox.take()
        if line is None:
            return False
        if peer.budget:
            peer.budget.tokens -= 1
        if peer.session or self.open_session(peer, line):
            peer.session.receive(line)
        return True

    def postpone(self, peer: Peer) -> None:
        """There are lines left: for the next turn, or until there is budget for one."""
        if peer.queue.size <= UNSENT_NO_READ:  # else lagging() resumes it
            peer.resume_soon(peer.budget.wait() if peer.budget else 0.0)
        peer.update()

    def too_much(self, peer: Peer) -> bool:
        """More has been answered than is likely to be read: the next lines can wait."""
        replied = peer.session.replied if peer.session else 0
        return peer.queue.size + replied > UNSENT_NO_READ

    def open_session(self, peer: Peer, first_line: bytes) -> bool:
        dialect = dialect_of(first_line)
        if dialect in GOODBYES:
            log.info("%s speaks %s, which is not spoken here yet", peer.address, dialect.upper())
            peer.write(GOODBYES[dialect])
            peer.close()
            return False
        if dialect == "irc":
            peer.session = IrcSession(self.site, peer)
        else:
            peer.session = LineSession(self.site, peer, peer.greeted)
        return True

    def later(self, session: Session, job: Callable, then: Callable) -> None:
        """Run job() on a helper once this turn is committed, then then(its result) here;
        until then this session's next lines wait, so that answers come in order."""
        self.jobs.append((session.conn.host, job, self._held(session, then)))

    def read(self, session: Session, job: Callable, then: Callable) -> None:
        """The same for a job that reads the store. In memory it has but one connection,
        which nobody else may use, and nothing to wait for."""
        if self.store.path:
            return self.later(session, job, then)
        done = self._held(session, then)
        self.loop.call_soon(lambda: done(attempt(job)))

    def _held(self, session: Session, then: Callable) -> Callable:
        session.conn.held = True
        session.conn.update()
        return functools.partial(self.answer, session, then)

    def answer(self, session: Session, then: Callable, result: Any) -> None:
        peer = session.conn
        peer.held = False
        peer.resume_soon()
        if peer.gone or peer.leaving:
            return
        if isinstance(result, Exception) and not isinstance(result, ChatError):
            log.error("a job for %s failed: %s", peer.address, result)
            text = "that cannot be answered just now; try again later"
            result = Refused("TRY_AGAIN", text)
        session.take_result(then, result)

    # The commit and the write beat

    def begin_turn(self) -> None:
        self.hub.begin(time.time())

    def end_turn(self) -> None:
        if not self.keeper.commit(self.hub):
            return
        turn = self.hub.turn
        if turn.apart or turn.to_store:  # something happened
            try:
                self.deliver(turn)
            finally:
                self.hub.end(self.keeper.losing)
        if self.leaving or self.jobs:
            self._after_writing()
        if self.store.excess or self.store.orphans:
            self.keeper.prune(idle=not turn.events)

    def deliver(self, turn: Turn) -> None:
        for data, sessions in turn.deliveries():
            broadcast(data, sessions)

    def _after_writing(self) -> None:
        leaving, self.leaving = self.leaving, []
        for peer in leaving:
            if peer.gone:
                self.forget(peer)
            else:
                Connection.close(peer)
        jobs, self.jobs = self.jobs, []
        for owner, job, done in jobs:
            self.helpers.submit(owner, job, done)

    # Going

    def lost(self, peer: Peer, reason: str) -> None:
        """A connection is gone. What it said before is still taken, and until that is done
        it counts against the limits as if it were still there."""
        log.log(
            logging.INFO if reason.startswith(TLS_TROUBLE) else logging.DEBUG,
            "%s: %s",
            peer.address,
            reason,
        )
        for delay in (self.silent, self.unnamed, self.slow, self.probed):
            delay.discard(peer)
        if peer.session and not peer.session.parting:
            peer.session.parting = reason
        peer.eof = True
        if peer.inbox and not peer.leaving:
            self.act(peer)
        else:
            self.forget(peer)

    def forget(self, peer: Peer) -> None:
        """The end of a peer. One that is lost while it leaves comes here twice."""
        if peer not in self.peers:
            return
        self.peers.discard(peer)
        self.door.leave(peer.host)
        if peer.session:
            peer.session.ended()
        if self.stopping and not self.peers:
            self.loop.stop()

    def drop_slow(self, peer: Peer) -> None:
        log.warning("%s reads too slowly: %d bytes unsent", peer.address, peer.unsent)
        peer.drop("reads too slowly")

    def stop(self) -> None:
        """Tell everybody, let them have what is theirs, and end."""
        if self.stopping:
            return
        self.stopping = True
        for listener in self.listeners:
            listener.close()
        for peer in list(self.peers):
            if peer.session:
                peer.session.farewell("the server is going down")
                peer.session.abandoned()
            peer.close()
        self.loop.call_later(STOP_SECONDS, self.loop.stop)
        if not self.peers:
            self.loop.stop()

    def close(self) -> None:
        """After the loop has ended: what is left goes to the store."""
        self.keeper.commit(self.hub)
        self.helpers.close()
        self.store.close()
        self.door.close()


# ======================================================================================
# LINK
# ======================================================================================
# A client's connection, kept up: look the server up, try its addresses, find out what it
# speaks, introduce ourselves, and when the line breaks do it all again, ever less eagerly.
# And what a client keeps on disk, for that it outlives the program.


class Target(NamedTuple):
    """Where a client wants to go."""

    host: str
    port: int
    tls: bool = False
    kind: str = ""  # CHAT, IRC or PLAIN if somebody says so: then there is nothing to find out

    def __str__(self) -> str:
        return address_text(self.host, self.port)


TARGET = re.compile(r"(?:(\w+)://)?(\[[^\]]+\]|[^:/\[\]]+)?(?::(\d+))?/?")
SCHEMES = {  # kind of server, TLS, port
    None: ("", False, DEFAULT_PORT),
    "chat": (PLAIN, False, DEFAULT_PORT),
    "chats": (PLAIN, True, DEFAULT_PORT),
    "irc": (IRC, False, 6667),
    "ircs": (IRC, True, 6697),
}
PORTS = {6667: "irc", 6697: "ircs"}  # without a scheme these mean one


def parse_target(text: str) -> Target:
    """HOST, HOST:PORT, [IPV6]:PORT or a URL (chat://, irc://; with TLS chats://, ircs://)."""
    match = TARGET.fullmatch(text.strip())
    scheme, host, port = match.groups() if match else ("?", "", "")
    scheme = scheme or PORTS.get(int(port or 0))
    if scheme not in SCHEMES or int(port or 0) > 65535:
        raise Unusable(f"{text} is not a server's address; write HOST:PORT or irc://HOST:PORT")
    kind, tls, usual = SCHEMES[scheme]
    return Target((host or DEFAULT_HOST).strip("[]"), int(port or usual), tls, kind)


class Trust(NamedTuple):
    """Whose certificates a client believes."""

    ca: str | None = None  # a file of certificates, instead of the system's
    pin: str | None = None  # SHA-256 of the one certificate to believe, in hex
    insecure: bool = False

    def context(self) -> Any:
        import ssl

        context = ssl.create_default_context(cafile=self.ca)
        if self.insecure or self.pin:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def accepts(self, fingerprint: str) -> bool:
        return not self.pin or self.pin == fingerprint


BELIEVE_THE_SYSTEM = Trust()
NOT_SIGNED = "certificate verify failed"  # as OpenSSL says it


class Memory:
    """A small private file of JSON, by some name; None remembers nothing."""

    def __init__(self, path: pathlib.Path | None):
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8"))) if self.path else {}
        except (OSError, ValueError, TypeError):
            return {}  # none yet, or damaged

    def write(self, **news: Any) -> None:
        known = self.read()
        if self.path is None or known | news == known:
            return
        with contextlib.suppress(OSError):  # keep() is for what one cannot live without
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = self.path.with_suffix(".new")
            fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(known | news, file, indent=1)
            written.replace(self.path)

    def keep(self, name: str, value: Any) -> None:
        """The same for what must not be lost; None forgets it. Raises Unusable."""
        if self.path.exists() and not self.read():
            raise Unusable(f"{self.path} is damaged; move it away")
        self.write(**{name: value})
        if self.read().get(name) != json.loads(json.dumps(value)):
            raise Unusable(f"{self.path} cannot be written")


class KnownServers(Memory):
    """What kind of server answered at an address, and which certificate it is to have."""

    def _known(self, target: Target) -> dict[str, str]:
        known = self.read().get(str(target), {})
        return known if isinstance(known, dict) else {"kind": known}  # as version 0.1 wrote it

    def kind(self, target: Target) -> str:
        return self._known(target).get("kind", "")

    def pin(self, target: Target) -> str | None:
        return self._known(target).get("pin")

    def remember(self, target: Target, **what: str) -> None:
        self.write(**{str(target): self._known(target) | what})


def locked(path: pathlib.Path) -> int:
    """A file opened for this process alone. Raises BlockingIOError if another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise BlockingIOError(str(error)) from error
    return fd


class Journal:
    """An outbox's file: its secret, then what was accepted and what has arrived, a line of
    JSON each. What is half written when the program is killed was not accepted."""

    def __init__(self, path: pathlib.Path):
        self.fd = locked(path)
        self.waiting: dict[str, Waiting] = {}
        self.secret = ""
        os.lseek(self.fd, 0, os.SEEK_SET)
        data = os.read(self.fd, os.fstat(self.fd).st_size)
        os.ftruncate(self.fd, data.rfind(b"\n") + 1)  # or a torn line would spoil the next one
        self.head = data.find(b"\n") + 1  # bytes of the first line, which is the secret
        for line in data.splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        self.secret = record.get("secret", self.secret)
        if "say" in record:
            one = Waiting(*record["say"])
            self.waiting[one.id] = one
        self.waiting.pop(record.get("done"), None)

    def begin(self, secret: str) -> None:
        os.ftruncate(self.fd, 0)
        self.secret = secret
        self.append({"secret": secret})
        self.head = os.fstat(self.fd).st_size

    def append(self, record: dict[str, Any]) -> None:
        data = f"{json.dumps(record)}\n".encode()
        size = os.fstat(self.fd).st_size
        try:
            written = os.write(self.fd, data)
            if written < len(data):
                os.ftruncate(self.fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Unusable(f"the outbox cannot be written: {reason_of(error)}") from error

    def clear(self) -> None:
        """Everything has arrived; the secret stays."""
        os.ftruncate(self.fd, self.head)

    def close(self) -> None:
        os.close(self.fd)


def outbox_stem(target: Target, name: str) -> str:
    """The name of the file, for people; and what tells it from others that look alike."""
    text = f"{target} {fold(name)}"
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', text)}-{zlib.crc32(text.encode()):08x}"


def free_journal(folder: pathlib.Path, stem: str) -> Journal:
    """One that no other client uses: where something waits, if there is such a one. Raises
    Unusable."""
    free: list[Journal] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = folder / f"{stem}.{number}"
            new = not path.exists()
            if new and free:
                break
            with contextlib.suppress(BlockingIOError):
                free.append(Journal(path))
    except OSError as error:
        raise Unusable(f"cannot keep an outbox in {folder}: {reason_of(error)}") from error
    chosen = next((journal for journal in free if journal.waiting), free[0])
    for journal in free:
        if journal is not chosen:
            journal.close()
    return chosen


def open_outbox(folder: pathlib.Path | None, target: Target, name: str) -> Outbox:
    """As the last client of this name left it; in memory only without a folder."""
    if folder is None:
        return Outbox()
    journal = free_journal(folder, outbox_stem(target, name))
    if not re.fullmatch(r"[0-9a-f]{32}", journal.secret):
        journal.begin(Outbox().secret)
    return Outbox(journal, journal.secret, journal.waiting.values())


UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))


class Connecting:
    """A socket on its way to being connected; then(self, "") or then(self, reason)."""

    def __init__(self, loop: Loop, family: int, address: tuple, then: Callable):
        self.loop, self.then = loop, then
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.timer = loop.call_later(CONNECT_SECONDS, lambda: self._done("no answer"))
        error = self.sock.connect_ex(address)
        loop.selector.register(self.sock, WRITE, self)
        if error not in UNDER_WAY:
            loop.call_soon(lambda: self._done(os.strerror(error).lower()))

    def ready(self, mask: int) -> None:
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._done(os.strerror(error).lower() if error else "")

    def _done(self, reason: str) -> None:
        """Connected, or not for `reason`."""
        if self.timer.callback is None:
            return
        self.timer.cancel()
        self.loop.selector.unregister(self.sock)
        if reason:
            self.sock.close()
        else:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.then(self, reason)

    def cancel(self) -> None:
        self.then = do_nothing
        self._done("another one was quicker")


class Race:
    """All addresses of a server: IPv6 and IPv4 in turn, each a moment after the one before
    (RFC 8305). Then then(sock, "") with the first that answers, or then(None, reason)."""

    def __init__(self, loop: Loop, addresses: list[tuple[int, tuple]], then: Callable):
        self.loop, self.then = loop, then
        by_family: dict[int, list] = {}
        for family, address in addresses:
            by_family.setdefault(family, []).append((family, address))
        turns = itertools.zip_longest(*by_family.values())
        self.left = [one for turn in turns for one in turn if one]
        self.running: list[Connecting] = []
        self.timer: Timer | None = None
        self.reason = "no address"
        self._next()

    def _next(self) -> None:
        if self.timer:
            self.timer.cancel()
        if self.left:
            family, address = self.left.pop(0)
            try:
                self.running.append(Connecting(self.loop, family, address, self._tried))
            except OSError as error:  # IPv6 is switched off, say
                self.reason = reason_of(error)
                return self._next()
            self.timer = self.loop.call_later(NEXT_ADDRESS_SECONDS, self._next)
        elif not self.running:
            self.then(None, self.reason)

    def _tried(self, one: Connecting, reason: str) -> None:
        self.running.remove(one)
        if reason:
            self.reason = reason
            return self._next()
        self.cancel()
        self.then(one.sock, "")

    def cancel(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.left = []
        for other in self.running:
            other.cancel()


class ServerConnection(Connection):
    """The connection of a Link; reads to the server's end even after we said all."""

    __slots__ = ("heard", "link")
    hears_out = True

    def __init__(self, link: "Link", sock: socket.socket):
        super().__init__(link.loop, sock)
        self.link = link
        self.heard = link.loop.now  # when, last

    def arrived(self, data: bytes) -> None:
        self.heard = self.loop.now
        super().arrived(data)

    def received(self, data: bytes) -> None:
        self.link.received(data)

    def secured(self) -> None:
        self.link.secured()

    def lost(self, reason: str) -> None:
        self.link.lost(reason)
        self.loop.call_soon(do_nothing)  # a line can break while a turn is written: show it

    def lagging(self) -> None:
        self.link.make_room()


class Link:
    """One client core, connected to its server whenever that can be.

    `show(views)` gets what there is to show, `over(reason)` is called once at the end:
    with "" after leave(), else with the reason why there is no going on. It gives up after
    `patience` seconds without a server. `asks`: a person is there to answer what nobody else
    can. `drained()` may be replaced by who wants to know when has_room() has become true.
    """

    def __init__(
        self,
        loop: Loop,
        target: Target,
        core: ClientCore,
        show: Callable[[list[View]], None],
        over: Callable[[str], None],
        trust: Trust = BELIEVE_THE_SYSTEM,
        known: KnownServers | None = None,
        patience: float = math.inf,
        asks: bool = True,
    ):
        self.loop, self.target, self.core = loop, target, core
        self.show, self.over, self.trust = show, over, trust
        self.patience, self.asks = patience, asks
        self.known = known or KnownServers(None)
        self.helpers = Helpers(loop)
        self.conn: ServerConnection | None = None
        self.race: Race | None = None
        self.backoff = BACKOFF_FIRST
        self.began = loop.now  # when connecting did, then when it was done
        self.standing = False  # we are where we want to be ...
        self.stood = loop.now  # ... and were so last, or began to want it, at this time
        self.pin: str | None = None  # the certificate that the server is to have
        self.timer: Timer | None = None  # the one wait that is going on ...
        self.again: Timer | None = None  # ... if that is for the next attempt to connect
        self.doubted = ""  # the fingerprint of a certificate that a person has to judge
        self.looking = False  # at a certificate, and no more
        self.leaving = self.ended = False
        self.drained: Callable = do_nothing
        core.later, core.clock = self.later, time.time
        self.known_kind = self.known.kind(target)
        core.kind, core.insists = target.kind or self.known_kind, bool(target.kind)
        self._watch()

    def start(self) -> None:
        self.status(f"connecting to {self.target}")
        self.core.redial, self.again = False, None
        self.pin = self.trust.pin or self.known.pin(self.target)
        trust = self.trust._replace(pin=self.pin, insecure=self.trust.insecure or self.looking)

        def look_up() -> tuple[Any, list]:
            """Also what TLS needs, since reading certificates takes a while."""
            host, port = self.target.host, self.target.port
            context = trust.context() if self.target.tls else None
            return context, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

        self.helpers.submit(self, look_up, self._found)

    def status(self, text: str) -> None:
        self.show([View(STATUS, text)])

    def later(self, job: Callable, then: Callable) -> None:
        """For the core: a job off the loop."""

        def done(result: Any) -> None:
            if not isinstance(result, Exception):
                then(result)
                self._carry_on([])

        self.helpers.submit(self, job, done)

    def typed(self, text: str) -> None:
        """What the person wrote."""
        if self.doubted and text.strip() == "/trust":
            return self._trust()
        self._carry_on(self.core.typed(text))

    def say(self, line: str) -> None:
        """What a pipe wrote."""
        self._carry_on(self.core.say(line))

    def ask_older(self, room: Room) -> bool:
        """What was said before all that is known of a room; whether it is on its way."""
        talk = self.core.talk
        if room.whole or not (self.core.ready and talk.pages):
            return False
        under_way = any((one.where, one.how) == (room.name, "older") for one in talk.asked)
        if not under_way:
            talk.ask_history(room, "older")
            self._carry_on([])
        return True

    def leave(self, at_once: bool = False) -> None:
        """Say what is left to be said, hear the server out, and end; or leave that for
        another time."""
        self.leaving = True
        if at_once and not self.core.ready:
            self._end("")
        elif at_once and self.core.ready:
            self._say_goodbye()
        else:
            self._carry_on([])

    def has_room(self) -> bool:
        """Whether what is said now goes out soon; if not, drained() is called when it does."""
        sent = self.conn is not None and self.core.ready and self.conn.unsent <= UNSENT_NO_READ
        return sent and len(self.core.outbox.waiting) < OUTBOX_FULL

    def make_room(self) -> None:
        if self.has_room():
            self.drained()

    # Connecting

    def _found(self, result: Any) -> None:
        if isinstance(result, OSError):
            reason = reason_of(result)
            if not isinstance(result, socket.gaierror) and self.target.tls:
                return self._end(f"cannot use the certificates {self.trust.ca}: {reason}")
            return self.lost(reason)
        if isinstance(result, Exception):  # UnicodeError: no name of a host looks like that
            return self.lost("no name of a host")
        context, found = result
        self.began = self.loop.now
        addresses = [(family, address) for family, *_, address in found]
        self.race = Race(self.loop, addresses, functools.partial(self._tried, context))

    def _tried(self, context: Any, sock: socket.socket | None, reason: str) -> None:
        self.race = None
        if sock is None:
            return self.lost(reason)
        self.conn = ServerConnection(self, sock)
        if context is None:
            return self._connected()
        self.conn.encrypt(TlsFilter(context, self.target.host))
        self.timer = self.loop.call_later(CONNECT_SECONDS, self._no_handshake)

    def _no_handshake(self) -> None:
        self.conn.drop("no answer in TLS")

    def secured(self) -> None:
        self.timer.cancel()
        fingerprint = self.conn.tls.fingerprint()
        if self.looking:
            return self._doubt(fingerprint)
        if not Trust(pin=self.pin).accepts(fingerprint):
            return self._fail(
                f"ANOTHER CERTIFICATE: {self.target} does not have the one that it had. "
                f"Somebody may be between you and the server. It shows {fingerprint}, and is "
                f"known by {self.pin}; if that is right, --pin {fingerprint}"
            )
        self._connected()

    def _connected(self) -> None:
        took = self.loop.now - self.began
        self.began = self.loop.now
        self.show([View(UP, f"connected to {self.target}")])
        self.core.secure = self.target.tls or is_loopback(self.conn.sock.getpeername()[0])
        views = self.core.connected()
        if self.core.listening:
            patience = max(LISTEN_SECONDS, LISTEN_CONNECT_TIMES * took)
            self.timer = self.loop.call_later(patience, self._silence)
        self._carry_on(views)

    def _silence(self) -> None:
        self._carry_on(self.core.silence())

    def received(self, data: bytes) -> None:
        self._carry_on(self.core.feed(data))

    def _carry_on(self, views: list[View]) -> None:
        """After anything that may have moved the core on."""
        self.show(views + self.core.take_views())
        if self.conn is None:
            return
        if data := self.core.take_output():
            self.conn.write(data)
        if self.conn.unsent > UNSENT_MOST:
            return self.conn.drop("it asks, and does not hear our answers")
        if self.core.kind in (CHAT, IRC):  # which are worth looking for when they are lost
            self.patience = max(self.patience, RETRY_SECONDS)
        if self.core.redial:
            return self.conn.drop("it speaks something else")
        if self.core.ready:
            self._stand()

    def _stand(self) -> None:
        """We are where we want to be."""
        self.standing, self.backoff = True, BACKOFF_FIRST
        if self.core.sure and self.core.kind != self.known_kind and not self.target.kind:
            self.known_kind = self.core.kind
            self.known.remember(self.target, kind=self.core.kind)
        self.make_room()
        if self.leaving and not self.core.outbox.waiting:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if not self.core.quitting:
            self.core.leave()
            self.conn.write(self.core.take_output())
            self.conn.close()

    # A certificate that nobody has signed

    def _doubt(self, fingerprint: str) -> None:
        """Ask the person who sits here; who is not there would not know either."""
        self.looking, self.doubted = False, fingerprint
        text = f"the certificate of {self.target} is signed by nobody whom this computer knows"
        if not self.asks:
            advice = f"--pin {fingerprint} if you know that it is the right one"
            return self._fail(f"{text}; {advice}")
        self.show(
            [
                View(NOTE, f"{text}. Its SHA-256 is"),
                View(NOTE, fingerprint),
                View(NOTE, "/trust if whoever runs the server tells you the same; else /quit"),
            ]
        )
        self.conn.drop("not trusted")

    def _trust(self) -> None:
        self.known.remember(self.target, pin=self.doubted)
        if self.known.path is None:
            self.trust = self.trust._replace(pin=self.doubted)
        self.doubted = ""
        self.start()

    # Ending

    def _watch(self) -> None:
        """Now and then: is the server there? TCP alone would notice in a quarter of an hour."""
        if self.ended:
            return
        self.loop.call_later(WATCH_SECONDS, self._watch)
        if self.conn is None or self.core.kind == PLAIN or self.core.listening:
            return
        silent = self.loop.now - self.conn.heard
        patience = WAITING_SECONDS if self.core.outbox.flying else SILENT_SECONDS
        if silent > patience:
            self.conn.drop(f"no answer for {silent:.0f} s")
        elif silent > patience / 2 and self.core.ready:
            self.core.talk.ping()
            self._carry_on([])

    def lost(self, reason: str) -> None:
        """The line is broken, or could not be had."""
        self.conn = None
        refused = bool(self.core.refusal) and not self.core.ready and not self.core.patient
        if self.timer:
            self.timer.cancel()
        if self.core.talk or self.core.listening:
            self.show(self.core.finish())
        self.show(self.core.disconnected())
        why = f"{self.target}: {self.core.refusal or reason}"
        if self.standing:
            self.standing, self.stood = False, self.loop.now
        waited = self.loop.now - self.stood > self.patience
        if self.ended or self.doubted:
            return
        if reason.startswith(TLS_TROUBLE) and NOT_SIGNED in reason and not self.looking:
            self.looking = True
            self.start()
        elif reason.startswith(TLS_TROUBLE):
            advice = "--ca, --pin or --insecure if you know better"
            self._end(f"{self.target} is not to be trusted: {reason}; {advice}")
        elif self.core.over:
            self._end(self.core.over)
        elif self.core.redial:
            self.core.quitting = False
            self.start()
        elif self.core.quitting and (reason == HUNG_UP or self.core.kind != PLAIN):
            self._end("")
        elif self.patience == 0 or waited or (refused and not self.asks):
            self._end(why)
        else:
            self._come_back(reason)

    def _come_back(self, reason: str) -> None:
        wait = self.backoff * random.uniform(0.75, 1.25)  # so that not all come back at once
        self.backoff = min(BACKOFF_MOST, self.backoff * 2)
        self.core.quitting = False
        why = self.core.refusal or reason
        self.timer = self.again = self.loop.call_later(wait, self.start)
        self.status(f"{self.target}: {why}; trying again in {wait:.1f} s")

    def _fail(self, reason: str) -> None:
        """There is no point in trying again."""
        self._end(reason)
        self.conn.drop(reason)

    def _end(self, reason: str) -> None:
        if not self.ended:
            self.ended = True
            if self.race:
                self.race.cancel()
            self.over(reason)


# ======================================================================================
# TERMINAL
# ======================================================================================
# Keys in, a line out, and a picture of it between. All of it is pure but RawTerminal at
# the end. To add a key, give its bytes a name in KEY_NAMES and the name a method in
# LineEditor.KEYS. The sequences are those of xterm, which every terminal imitates.
#
# What is on the screen: one conversation, scrolling as terminals scroll, and under it two
# rows: how things are, and the line being typed. New text is written over them, and they
# are drawn again below it, in one write. Lines are left whole, for the terminal to wrap, so
# that they can be copied.


class Key(NamedTuple):
    """A key that was pressed: "text" and "paste" carry text, the others are names."""

    name: str
    text: str = ""


KEY_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA", "\x10"), "up"),
    **dict.fromkeys(("\x1b[B", "\x1bOB", "\x0e"), "down"),
    **dict.fromkeys(("\x1b[C", "\x1bOC", "\x06"), "right"),
    **dict.fromkeys(("\x1b[D", "\x1bOD", "\x02"), "left"),
    **dict.fromkeys(("\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~", "\x01"), "home"),
    **dict.fromkeys(("\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~", "\x05"), "end"),
    **dict.fromkeys(("\x1b[1;5D", "\x1b[1;3D", "\x1bb"), "word-left"),
    **dict.fromkeys(("\x1b[1;5C", "\x1b[1;3C", "\x1bf"), "word-right"),
    **dict.fromkeys(("\x7f", "\x08"), "backspace"),
    **dict.fromkeys(("\x17", "\x1b\x7f", "\x1b\x08"), "erase-word"),
    **dict.fromkeys(("\x1b[3;5~", "\x1b[3;3~", "\x1bd"), "delete-word"),
    **dict.fromkeys(("\x1b\r", "\x1b\n", "\x0a"), "newline"),
    "\x1b[3~": "delete",
    "\x04": "delete-or-leave",
    "\x15": "erase-to-start",
    "\x0b": "erase-to-end",
    "\x19": "yank",
    "\x0c": "redraw",
    "\t": "tab",
    "\x1b[Z": "back-tab",
    "\r": "enter",
    "\x1b": "escape",
    **dict.fromkeys(("\x1b[5~", "\x1b[5;2~"), "page-up"),
    **dict.fromkeys(("\x1b[6~", "\x1b[6;2~"), "page-down"),
    "\x1ba": "room-unread",
    **dict.fromkeys(("\x1bn", "\x1b[6;5~"), "room-next"),
    **dict.fromkeys(("\x1bp", "\x1b[5;5~"), "room-previous"),
    **{f"\x1b{n}": f"room-{n}" for n in range(1, 10)},
}
SEQUENCE = re.compile(
    r"\x1b\[[0-9;?<=>]*[ -/]*[@-~]"  # CSI, parameters, intermediates, final byte (ECMA-48 5.4)
    r"|\x1bO[ -~]"  # SS3
    r"|\x1b[^\[O\x1b]"  # Alt and a key
)
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


ZWNJ, ZWJ = "\u200c", "\u200d"  # zero width (non-)joiners: Persian; one emoji of several


def is_typed(c: str) -> bool:
    """Whether a character is text, and no key."""
    return c.isprintable() or c in (ZWNJ, ZWJ)


class KeyDecoder:
    """Bytes from a terminal in, keys out. What is incomplete waits for more."""

    def __init__(self) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.rest = ""
        self.pasted: str | None = None  # what of a paste has come so far

    def feed(self, data: bytes) -> list[Key]:
        self.rest += self.decode(data)
        keys = []
        while self.rest and (key := self._next()):
            keys.append(key)
        return [key for key in keys if key.name]

    def flush(self) -> list[Key]:
        """No more is coming: what looked like the beginning of a sequence was none."""
        if self.pasted is not None:
            return []  # slow, but its end is still to come
        text, self.rest = self.rest, ""
        return [Key(KEY_NAMES.get(text, ""))] if text in KEY_NAMES else []

    def _next(self) -> Key | None:
        """One key off `rest`, with an empty name if it means nothing; None if incomplete."""
        if self.pasted is not None or self.rest.startswith(PASTE_BEGINS):
            return self._paste()
        if self.rest[0] == "\x1b":
            match = SEQUENCE.match(self.rest)
            return self._named(match.group()) if match else None
        if not is_typed(self.rest[0]):
            return self._named(self.rest[0])
        text = "".join(itertools.takewhile(is_typed, self.rest))
        self.rest = self.rest[len(text) :]
        return Key("text", text)

    def _named(self, sequence: str) -> Key:
        self.rest = self.rest[len(sequence) :]
        return Key(KEY_NAMES.get(sequence, ""))

    def _paste(self) -> Key | None:
        if self.pasted is None:
            self.rest, self.pasted = self.rest.removeprefix(PASTE_BEGINS), ""
        text, end, after = self.rest.partition(PASTE_ENDS)
        if not end:
            held = next((n for n in range(5, 0, -1) if text.endswith(PASTE_ENDS[:n])), 0)
            self.pasted += text[: len(text) - held]
            self.rest = text[len(text) - held :]
            return None
        pasted, self.pasted, self.rest = self.pasted + text, None, after
        return Key("paste", harmless(pasted.replace("\r\n", "\n").replace("\r", "\n")))


EMOJI_STYLE = "\ufe0f"  # the character before it is to be shown as an emoji
CLUSTER_CHARACTERS = 64  # none is longer, or nobody cares how it is cut


def is_regional(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"  # two of them are a flag


def joins(cluster: str, c: str) -> bool:
    """Whether `c` goes on with the character before it."""
    if cluster[-1] == ZWJ or c == ZWJ or unicodedata.category(c) in ("Mn", "Me", "Mc"):
        return cluster != "\n"
    if is_regional(c):
        return len(cluster) == 1 and is_regional(cluster)
    return "\U0001f3fb" <= c <= "\U0001f3ff"  # skin tones (UTS 51)


def clusters(text: str) -> list[str]:
    """What a person would call the characters of `text`: letters with their accents, emoji
    with their modifiers, flags. A subset of UAX 29 that needs no tables."""
    if text.isascii():
        return list(text)
    found: list[str] = []
    for c in text:
        if found and joins(found[-1], c):
            found[-1] += c
        else:
            found.append(c)
    return found


def first_cluster(text: str) -> str:
    return "".join(clusters(text[:CLUSTER_CHARACTERS])[:1])


def last_cluster(text: str) -> str:
    return "".join(clusters(text[-CLUSTER_CHARACTERS:])[-1:])


def cluster_width(cluster: str) -> int:
    first = cluster[0]
    if EMOJI_STYLE in cluster or ZWJ in cluster[1:-1] or is_regional(first):
        return 2
    if unicodedata.category(first) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(first) in "WF" else 1


def width(text: str) -> int:
    """Columns that a terminal gives `text`: none for marks, two for wide characters (UAX 11)
    and emoji. Terminals disagree about the newest emoji, so nothing may depend on it."""
    if text.isascii() and text.isprintable():
        return len(text)
    return sum(map(cluster_width, clusters(text)))


WORD = re.compile(r"\W*\w*")
SECRETS = (
    "/pass ",
    "/oper ",
    "/register ",
    "/login ",
    "/passwd ",
    "/drop ",
)  # commands whose parameters are nobody's business


def first_word(text: str) -> str:
    """The first word, with what stands before it."""
    return WORD.match(text).group()


def last_word(text: str) -> str:
    """The last word, with what stands behind it."""
    return first_word(text[::-1])[::-1]


def is_secret(text: str) -> bool:
    return text.lower().startswith(SECRETS)


class LineEditor:
    """The line being typed: what stands before the cursor and what after it.

    press(key) changes it and returns what was entered, if that key entered it. `complete`
    offers what a word may become: complete(word, at the start of the line) -> candidates.
    """

    def __init__(self, complete: Callable[[str, bool], list[str]] = lambda word, first: []):
        self.before = self.after = ""
        self.complete = complete
        self.killed = ""  # for yank
        self.typed: collections.deque[str] = collections.deque(maxlen=TYPED_KEPT)
        self.recalled = 0  # how many lines back we are; 0 is the line being typed
        self.draft = ""  # which is kept here meanwhile
        self.offers: list[str] = []  # of a completion under way, the next one first
        self.left = False  # end of input was pressed on an empty line

    @property
    def text(self) -> str:
        return self.before + self.after

    def set(self, text: str) -> None:
        self.before, self.after = text, ""

    def insert(self, text: str) -> None:
        room = LINE_BYTES - len(self.text.encode())
        self.before += cut(text, max(0, room))

    def press(self, key: Key) -> str | None:
        if key.name not in ("tab", "back-tab"):
            self.offers = []
        if key.name == "enter":
            return self._enter()
        if key.name in ("text", "paste"):
            self.insert(key.text)
        elif key.name in self.KEYS:
            self.KEYS[key.name](self)
        return None

    def _enter(self) -> str:
        text = self.text.rstrip("\n")  # a pasted line brings its newline along
        if text.strip() and not is_secret(text):
            self.remember(text)
        self.recalled = 0
        self.set("")
        return text

    def remember(self, text: str) -> None:
        if text != (self.typed[-1] if self.typed else ""):
            self.typed.append(text)

    # Moving

    def _left(self) -> None:
        last = last_cluster(self.before)
        self.before = self.before.removesuffix(last)
        self.after = last + self.after

    def _right(self) -> None:
        first = first_cluster(self.after)
        self.before += first
        self.after = self.after.removeprefix(first)

    def _home(self) -> None:
        self.before, self.after = "", self.text

    def _end(self) -> None:
        self.set(self.text)

    def _word_left(self) -> None:
        word = last_word(self.before)
        self.before, self.after = self.before.removesuffix(word), word + self.after

    def _word_right(self) -> None:
        word = first_word(self.after)
        self.before, self.after = self.before + word, self.after.removeprefix(word)

    # Erasing

    def _backspace(self) -> None:
        self.before = self.before.removesuffix(last_cluster(self.before))

    def _delete(self) -> None:
        self.after = self.after.removeprefix(first_cluster(self.after))

    def _delete_or_leave(self) -> None:
        self.left = not self.text
        self._delete()

    def _erase_word(self) -> None:
        self.killed = last_word(self.before)
        self.before = self.before.removesuffix(self.killed)

    def _delete_word(self) -> None:
        self.killed = first_word(self.after)
        self.after = self.after.removeprefix(self.killed)

    def _erase_to_start(self) -> None:
        self.killed, self.before = self.before, ""

    def _erase_to_end(self) -> None:
        self.killed, self.after = self.after, ""

    def _yank(self) -> None:
        self.insert(self.killed)

    def _newline(self) -> None:
        self.insert("\n")

    # Earlier lines

    def _up(self) -> None:
        self._recall(self.recalled + 1)

    def _down(self) -> None:
        self._recall(self.recalled - 1)

    def _recall(self, back: int) -> None:
        if not 0 <= back <= len(self.typed):
            return
        if self.recalled == 0:
            self.draft = self.text
        self.recalled = back
        self.set(self.typed[-back] if back else self.draft)

    # Completion

    def _tab(self) -> None:
        self._offer(1)

    def _back_tab(self) -> None:
        self._offer(-1)

    def _offer(self, step: int) -> None:
        """Put the next candidate in the place of the one before, or of the word."""
        word = self.before[self.before.rfind(" ") + 1 :]
        if self.offers:
            word = self.offers[0]
            self.offers = self.offers[step:] + self.offers[:step]
        else:
            first = word == self.before
            self.offers = self.complete(word, first)[::step]
        if self.offers:
            self.before = self.before.removesuffix(word) + self.offers[0]

    KEYS = {
        "left": _left,
        "right": _right,
        "home": _home,
        "end": _end,
        "word-left": _word_left,
        "word-right": _word_right,
        "backspace": _backspace,
        "delete": _delete,
        "delete-or-leave": _delete_or_leave,
        "erase-word": _erase_word,
        "delete-word": _delete_word,
        "erase-to-start": _erase_to_start,
        "erase-to-end": _erase_to_end,
        "yank": _yank,
        "newline": _newline,
        "up": _up,
        "down": _down,
        "tab": _tab,
        "back-tab": _back_tab,
    }


# Text on its way to a screen

RESET = "\x1b[0m"
COLOUR = re.compile(r"(\x1b\[[\d;]*m)")  # the only escape sequences in a line of ours
# Also the separators of lines and paragraphs: some terminals obey them.
INERT = CONTROLS | BIDI_CONTROLS | {0x09: "    ", 0x2028: " ", 0x2029: " "}


def inert(text: str) -> str:
    """Text that can only be shown, whatever it was meant to do, of one line or several."""
    return text if text.isprintable() else text.translate(INERT)


def visible(text: str) -> str:
    """A line with its newlines shown as symbols, so that it stays one row."""
    return inert(text.replace("\n", "\u23ce").replace("\t", " "))


def fitting(parts: Iterable[str], room: int) -> tuple[list[str], int]:
    """As many of these clusters as fit, and the columns they take."""
    chosen, used = [], 0
    for part in parts:
        if used + cluster_width(part) > room:
            break
        chosen.append(part)
        used += cluster_width(part)
    return chosen, used


def cut_to(text: str, columns: int) -> str:
    """The beginning of it, with a mark if that is not all."""
    if width(text) <= columns:
        return text
    return "".join(fitting(clusters(text), columns - 1)[0]) + "\u2026"


def rows_of(line: str, columns: int) -> list[str]:
    """A line as a terminal wraps it. A row that begins inside a colour begins with it."""
    rows, row, used, colour = [], "", 0, ""
    for n, part in enumerate(COLOUR.split(line)):
        if n % 2:
            colour = "" if part == RESET else colour + part
            row += part
            continue
        for cluster in clusters(part):
            if used + cluster_width(cluster) > columns:
                rows.append(row + RESET * bool(colour))
                row, used = colour, 0
            row += cluster
            used += cluster_width(cluster)
    return [*rows, row]


def in_columns(words: list[str], columns: int) -> list[str]:
    """Words in columns, to be read downwards, in as few rows as fit."""
    across = max(map(width, words), default=0) + 2
    count = max(1, (columns + 2) // across)
    height = math.ceil(len(words) / count)
    rows = (words[n::height] for n in range(height))
    return ["".join(word + " " * (across - width(word)) for word in row).rstrip() for row in rows]


def beside(left: str, right: str, columns: int) -> list[str]:
    """What something is called, and what it is: in two columns, or one below the other."""
    wide = columns >= BESIDE_COLUMNS
    indent = " " * (columns // 3 if wide else 4)
    rows = textwrap.wrap(right, columns - 1, initial_indent=indent, subsequent_indent=indent)
    if wide and width(left) + 2 <= len(indent):
        rows[0] = left + rows[0][width(left) :]
        return rows
    return [left, *rows]


class Palette:
    """Colours as escape sequences, or nothing at all."""

    NAMES = (31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96)  # legible on dark and on light

    def __init__(self, on: bool):
        self.on = on

    def paint(self, text: str, *codes: int) -> str:
        if not (self.on and text and codes):
            return text
        return f"\x1b[{';'.join(map(str, codes))}m{text}{RESET}"

    def name(self, name: str) -> str:
        """A person's name in that person's colour, the same on every screen."""
        return self.paint(name, self.NAMES[zlib.crc32(fold(name).encode()) % len(self.NAMES)])

    def dim(self, text: str) -> str:
        return self.paint(text, 2)

    def loud(self, text: str) -> str:
        return self.paint(text, 1, 31)


# Views as lines


class Look(NamedTuple):
    """What the look of a line depends on."""

    palette: Palette
    columns: int = 80
    here: str = ""  # the conversation that it is shown in


def moment_of(view: View) -> datetime.datetime:
    """When it was, by the clock on this person's wall, as that was set then."""
    try:
        return datetime.datetime.fromtimestamp(view.time / 1000)
    except (TypeError, ValueError, OverflowError, OSError):  # no calendar has such a time
        return datetime.datetime.now()


def where_of(view: View, look: Look) -> str:
    """The conversation it belongs to, if that is another one."""
    if fold(view.where) in ("", fold(look.here)):
        return ""
    return f"[{view.where}] " if is_channel(view.where) else f"({view.where}) "


def said_lines(view: View, look: Look) -> list[str]:
    """What somebody said: lines after the first stand under it, as far as there is room."""
    palette, clock, where = look.palette, f"{moment_of(view):%H:%M} ", where_of(view, look)
    loud = view.called and is_channel(view.where)  # in a private talk everything is for us
    mark = "! " * loud
    first, *others = (palette.paint(line, *[1] * loud) for line in view.text.split("\n"))
    head = palette.dim(clock + where) + palette.loud(mark) + palette.name(view.name)
    indent = " " * min(width(f"{clock}{where}{mark}{view.name}: "), look.columns // 3)
    return [f"{head}: {first}", *(indent + line for line in others)]


def moved_lines(view: View, look: Look) -> list[str]:
    verb = "joined" if view.kind == CAME else "left"
    why = "" if view.text in ("", "Quit") else f" ({view.text})"
    where = "" if fold(view.where) in ("", fold(look.here)) else f" {view.where}"
    return [look.palette.dim(f"{moment_of(view):%H:%M} {view.name} {verb}{where}{why}")]


EXPLAINED = re.compile(r"(/\S.*?|\S.*?:) {2,}(\S.*)")  # a command or a key, and what it does


def told_lines(view: View, look: Look) -> list[str]:
    if match := EXPLAINED.fullmatch(view.text):
        return beside(*match.groups(), look.columns)
    return [look.palette.dim(f"{moment_of(view):%H:%M} {where_of(view, look)}{view.text}")]


def failed_lines(view: View, look: Look) -> list[str]:
    clock = look.palette.dim(f"{moment_of(view):%H:%M} {where_of(view, look)}")
    return [clock + look.palette.loud(f"FAILED: {view.text}")]


def people_lines(view: View, look: Look) -> list[str]:
    """Who is there, on demand: those with a rank first."""
    names = view.text.split(", ")
    names.sort(key=lambda name: (name[:1] not in SYMBOLS.values(), fold(name)))
    head = look.palette.dim(f"{moment_of(view):%H:%M} {len(names):,} in {view.where}")
    return [head, *(f"  {row}" for row in in_columns(names, look.columns - 3))]


LINES = {  # how each kind of view looks
    SAID: said_lines,
    CAME: moved_lines,
    WENT: moved_lines,
    TOLD: told_lines,
    NOTE: told_lines,
    FAILED: failed_lines,
    PEOPLE: people_lines,
}


def view_lines(view: View, look: Look) -> list[str]:
    """One view as lines for a terminal. Whatever came from elsewhere is made inert here, once
    more: the only escape sequences in a line are those of our palette."""
    text, name, where = inert(view.text), visible(view.name), visible(view.where)
    view = view._replace(text=text, name=name, where=where)
    return LINES[view.kind](view, look)


def dated_lines(before: View | None, view: View, look: Look) -> list[str]:
    """A view as lines, and above them the day, if that is not the one of the view before."""
    lines, day = view_lines(view, look), moment_of(view)
    known = moment_of(before) if before else datetime.datetime.now()
    if day.date() != known.date():
        lines.insert(0, look.palette.dim(f"\u2500\u2500 {day:%A}, {day.day} {day:%B %Y}"))
    return lines


def place_lines(room: Room, look: Look) -> list[str]:
    """Where one is, at the top of a screen that was drawn anew."""
    topic = visible(f": {room.topic}" if room.topic else "")
    title = visible(room.name) if room.is_channel else f"with {visible(room.name)}"
    return [look.palette.paint(f"\u2500\u2500 {title}", 1) + topic] if room.name else []


def room_marks(rooms: Iterable[Room], here: str) -> list[tuple[str, tuple[int, ...]]]:
    """The other conversations in which there is something new; what is for us comes first."""
    new = [room for room in rooms if room.unread and room.name != here]
    new.sort(key=lambda room: not room.called)
    return [
        (f"{cut_to(visible(room.name), MARK_COLUMNS)}:{room.unread}{'!' * bool(room.called)}",
         (1, 31) if room.called else (36,))
        for room in new
    ]  # fmt: skip


def status_row(parts: list[tuple[str, tuple[int, ...]]], columns: int, palette: Palette) -> str:
    """The row between what is said and what is being typed: as many of the parts as fit, the
    most important ones first, and a line to the margin."""
    shown, used = "", 2
    for n, (text, colours) in enumerate(parts):
        left = columns - 1 - used - 2 * (n + 1 < len(parts))  # there has to be room for a mark
        if width(text) + 1 > left and n:
            shown += " \u2026"
            used += 2
            break
        text = cut_to(text, left - 1)
        shown += " " + palette.paint(text, *colours)
        used += 1 + width(text)
    rule = " " * (columns - used > 2) + "\u2500" * (columns - used - 2)
    return palette.dim("\u2500\u2500") + shown + palette.dim(rule)


class Painter:
    """Draws the two rows at the bottom, the status and as much of the line being typed as
    there is room for, and takes them away for what is new. Everything is text to be written
    at once. Nothing is cleared below the margin of the screen by one sequence, since some
    terminals keep in their history what goes that way."""

    def __init__(self, columns: int = 80, rows: int = 24):
        self.columns, self.rows = columns, rows
        self.drawn = False  # the two rows are there

    def row(self, prompt: str, before: str, after: str) -> str:
        """Everything from the left margin on; the cursor ends where it belongs. Its column
        is set by number and not by counting back, so that a terminal which disagrees about
        a width spoils the look and nothing else."""
        prompt = "".join(fitting(clusters(visible(prompt)), self.columns // 2)[0])
        room = max(4, self.columns - width(prompt) - 1)
        shown, used = fitting(reversed(clusters(visible(before[-room * 8 :]))), room)
        shown.reverse()
        rest, _ = fitting(clusters(visible(after[: room * 8])), room - used)
        column = width(prompt) + used
        return f"\r\x1b[K{prompt}{''.join(shown)}{''.join(rest)}\r" + (
            f"\x1b[{column}C" if column else ""
        )

    def erase(self) -> str:
        """From the row being typed on to where the two rows begin, with nothing left of them."""
        up, self.drawn = "\x1b[A\r\x1b[K" if self.drawn else "", False
        return f"\r\x1b[K{up}"

    def bottom(self, status: str, row: str) -> str:
        """The two rows, without wrapping: a terminal may think them wider than we do."""
        self.drawn = True
        return f"\x1b[?7l{status}\r\n{row}\x1b[?7h"

    def clear(self) -> str:
        """An empty screen, the cursor at its top."""
        self.drawn = False
        return "\x1b[H" + "\x1b[K\n" * (self.rows - 1) + "\x1b[K\x1b[H"

    def page(self, rows: list[tuple[str, bool]]) -> str:
        """A screen of rows, each with whether it goes on with the one above: then the terminal
        wraps, and knows them for one line when it is copied."""
        shown = (
            row if goes_on and n else f"\x1b[{n + 1}H{row}" for n, (row, goes_on) in enumerate(rows)
        )
        return f"\x1b[H\x1b[J{''.join(shown)}\x1b[{self.rows - 1}H"


class Reader:
    """How much of a conversation is on the screen.

    Views are numbered from 1 on as they came. Live, everything up to number `shown` has been
    printed. A person who reads back sees a page instead: the last view on it is number `end`,
    and `cut` rows of that one are below the page.
    """

    def __init__(self, room: Room, look: Look, height: int, now: float = 0.0):
        self.room, self.look, self.height = room, look._replace(here=room.name), height
        self.shown = 0
        self.back = False  # a page is read
        self.end = self.cut = 0
        self.at_top = False  # nothing older is here ...
        self.owed = 0  # ... but the person wanted to go up by so many rows
        self.mark: int | None = None  # the number of the first view that is new to the person
        self.budget = Budget(LINES_AT_ONCE, LINES_A_SECOND, now)

    @property
    def total(self) -> int:
        return self.room.views.total

    @property
    def first(self) -> int:
        """The number before the oldest view that is here."""
        return self.total - len(self.room.views)

    @property
    def below(self) -> int:
        """Views that came while a page is read."""
        return self.total - self.shown

    def lines(self, number: int) -> list[str]:
        place = number - self.first - 1
        before = self.room.views[place - 1] if place else None
        lines = dated_lines(before, self.room.views[place], self.look)
        new = [self.look.palette.paint("\u2500\u2500 new", 36)] if number == self.mark else []
        return new + lines

    def mark_unread(self, count: int) -> None:
        """The last so many messages are new to the person."""
        for number in range(self.total, self.first if count else self.total, -1):
            view = self.room.views[number - self.first - 1]
            count -= view.kind == SAID and not (view.mine or view.past)
            if not count:
                self.mark = number
                return

    def moment(self) -> datetime.datetime:
        """Of the last view on the page."""
        views = self.room.views
        return moment_of(views[self.end - self.first - 1] if views else View(NOTE))

    def rows(self, number: int) -> list[tuple[str, bool]]:
        """As they are wrapped, each with whether it goes on with the one above."""
        return [
            (row, n > 0)
            for line in self.lines(number)
            for n, row in enumerate(rows_of(line, self.look.columns))
        ]

    # Live

    def screenful(self, since: int = 0, taken: int = 1) -> tuple[list[str], int]:
        """The last lines, at least one and as many as fit with `taken` rows above them, of the
        views after number `since`; and the number of the first that is among them."""
        lines, left, oldest = [], self.height - taken, self.total + 1
        for number in range(self.total, max(since, self.first), -1):
            for line in reversed(self.lines(number)):
                left -= len(rows_of(line, self.look.columns))
                if left < 0 and lines:
                    return lines, oldest
                lines.insert(0, line)
                oldest = number
        return lines, oldest

    def news(self, now: float) -> list[str]:
        """What has come since the last time; if that is more than can be shown, the last
        screenful of it, and how much is missing before."""
        since, new, self.shown = self.shown, self.below, self.total
        self.budget.refill(now)
        if new > max(self.height, self.budget.tokens):
            lines, number = self.screenful(since)
            skipped = f"\u2026 {counted(number - 1 - since, 'line')} more; Page Up shows them"
            return [self.look.palette.dim(skipped), *lines]
        self.budget.tokens = max(0.0, self.budget.tokens - new)
        numbers = range(max(since, self.first) + 1, self.total + 1)
        return [line for number in numbers for line in self.lines(number)]

    # Reading back

    def up(self, rows: int) -> None:
        """Towards the past. Who is at its beginning goes on when there is more: came_older()."""
        if not self.back:
            self.back, self.end, self.cut = True, self.total, 0
        before = self.end, self.cut
        self.cut += rows
        while self.end > self.first + 1 and self.cut >= (tall := len(self.rows(self.end))):
            self.end, self.cut = self.end - 1, self.cut - tall
        missing = max(0, self.height - self._above())
        self._down(missing)
        self.at_top = missing > 0
        self.owed = rows if (self.end, self.cut) == before else 0

    def down(self, rows: int) -> None:
        """Towards the present, where it ends."""
        self.at_top, self.owed = False, 0
        self._down(rows)
        self.back = self.end < self.total or self.cut > 0

    def came_older(self) -> None:
        self.at_top = False
        if self.back and self.owed:
            self.up(self.owed)

    def page(self) -> list[tuple[str, bool]]:
        """What is to be seen, as rows()."""
        self.end = max(self.end, min(self.total, self.first + 1))  # the oldest may be gone
        rows: list[tuple[str, bool]] = []
        for number in range(self.end, self.first, -1):
            rows = self.rows(number) + rows
            if len(rows) - self.cut >= self.height:
                break
        return rows[: len(rows) - self.cut][-self.height :]

    def _above(self) -> int:
        """Rows from the bottom of the page upwards, but no more than fill it."""
        found = -self.cut
        for number in range(self.end, self.first, -1):
            found += len(self.rows(number))
            if found >= self.height:
                break
        return found

    def _down(self, rows: int) -> None:
        self.cut -= rows
        while self.cut < 0 and self.end < self.total:
            self.end += 1
            self.cut += len(self.rows(self.end))
        self.cut = max(0, self.cut)


GO_COMMANDS = ("/go", "/part", "/names", "/history")  # are followed by a conversation


def complete_line(core: ClientCore, before: str, word: str) -> list[str]:
    """What the last word of a line may become. Who spoke last comes first; a command may be
    about somebody who is elsewhere."""
    rooms = [room.name for room in core.rooms.values()]
    command, first = before.split(" ")[0].lower(), word == before
    if command in GO_COMMANDS and not first:
        key = fold(word).lstrip("#")
        return [name for name in rooms if fold(name).lstrip("#").startswith(key)]
    near = [core.room] if core.room else []
    near += core.rooms.values() if command[:1] == "/" else []
    names = dict.fromkeys(n for room in near for n in (*reversed(room.people), room.name))
    names.pop(core.name, None)
    return completions(word, first, (name for name in names if not is_channel(name)), rooms)


class Display:
    """What the screen shows of a client core, as text to be written.

    Live, a conversation scrolls by on the terminal's own screen, with two rows below it.
    A person who reads back does so on the terminal's other buffer, so that what can be
    scrolled back to with the mouse stays a plain log.
    """

    def __init__(self, core: ClientCore, palette: Palette, columns: int = 80, rows: int = 24):
        self.core, self.palette = core, palette
        self.painter = Painter(columns, rows)
        self.nowhere = Room("")  # what is told while no conversation is looked at
        self.reader = self._read()
        self.whole = False  # the screen has to be drawn anew
        self.bell = False
        self.fetching = False  # what is older than all that is here
        self.paged = False  # the other buffer is shown ...
        self.was_drawn = False  # ... and whether the two rows are there on the first
        self.seen: Any = None  # what was written last, and need not be again

    @property
    def room(self) -> Room:
        return self.core.room or self.nowhere

    def _read(self) -> Reader:
        look = Look(self.palette, self.painter.columns)
        return Reader(self.room, look, self.painter.rows - 2)

    # What there is to show

    def take(self, views: Iterable[View]) -> None:
        for view in views:
            self.bell |= view.called and not (view.past or view.mine)
            if handler := self.TAKEN.get(view.kind):
                handler(self, view)

    def keep(self, view: View, room: Room | None = None) -> None:
        """In a conversation, unless the core has put it there."""
        room = room or self.core.rooms.get(fold(view.where)) or self.room
        if not view.where or not any(one is view for one in reversed(room.views)):
            room.views.append(self.core.timed(view))

    def _take_said(self, view: View) -> None:
        """What is new is kept by the core; what somebody asked for is shown where he is."""
        room = self.core.rooms.get(fold(view.where))
        if view.past and not (room and any(one is view for one in reversed(room.views))):
            self.keep(view._replace(id=""), self.room)

    def _take_failed(self, view: View) -> None:
        """There, and here."""
        self.keep(view)
        self.keep(view, self.room)

    def _take_people(self, view: View) -> None:
        if view.text:
            self.keep(view, self.room)

    def _take_older(self, view: View) -> None:
        if fold(view.where) == fold(self.reader.room.name):
            self.fetching = False
            if whole_number(view.text):
                self.reader.came_older()

    def _take_place(self, view: View) -> None:
        self.reader, self.whole = self._read(), True
        self.reader.mark_unread(whole_number(view.text) or 0)

    TAKEN = {
        SAID: _take_said,
        CAME: keep,
        WENT: keep,
        TOLD: keep,
        NOTE: keep,
        FAILED: _take_failed,
        PEOPLE: _take_people,
        OLDER: _take_older,
        PLACE: _take_place,
    }

    # What it looks like

    def resize(self, columns: int, rows: int) -> None:
        """What terminals do to rows that have become too long, nobody knows: all is drawn anew."""
        if (columns, rows) != (self.painter.columns, self.painter.rows):
            self.painter.columns, self.painter.rows = columns, rows
            self.reader.look = self.reader.look._replace(columns=columns)
            self.reader.height = rows - 2
            self.whole, self.seen = True, None

    def prompt(self) -> str:
        where = "" if self.core.here == LOBBY else f"{self.core.here} "
        name = self.core.name if self.painter.columns >= BESIDE_COLUMNS or not where else ""
        return f"{where}{name}".rstrip() + "> "

    def parts(self, trouble: str, waiting: int) -> list[tuple[str, tuple[int, ...]]]:
        """Of the status row, the most important one first."""
        room = self.room
        people = f" {len(room.people):,}" if room.is_channel and room.people else ""
        parts = [
            (trouble, (1, 33)),
            (f"{waiting:,} waiting" if waiting else "", (33,)),
            *self._reading(),
            (visible(room.name) + people, (1,)),
            *room_marks(self.core.rooms.values(), self.core.here),
            ("connected" if not trouble else "", (2,)),
        ]
        return [(text, colours) for text, colours in parts if text]

    def _reading(self) -> list[tuple[str, tuple[int, ...]]]:
        """Where in the past the person is."""
        reader = self.reader
        if not reader.back:
            return []
        return [(f"{reader.below:,} new below" * bool(reader.below), (1, 36)), (self._at(), (36,))]

    def _at(self) -> str:
        reader, views = self.reader, self.reader.room.views
        if not reader.at_top:
            return f"back at {reader.moment():%a %d %b %H:%M}"
        if self.fetching and self.core.ready:
            return "older ones are coming"
        whole = reader.room.whole and len(views) < VIEWS_KEPT
        return "this is the beginning" if whole else "nothing older is here"

    def frame(self, row: str, parts: list, now: float, due: bool = True) -> str:
        """What brings the screen up to date; what was said is looked at only when that is due."""
        if self.reader.room is not self.room:
            self._take_place(View(PLACE))
        bottom = status_row(parts, self.painter.columns, self.palette), row
        bell, self.bell = "\a" * self.bell, False
        draw = self._page if self.reader.back else self._live
        return bell + draw(bottom, now, due)

    def _live(self, bottom: tuple[str, str], now: float, due: bool) -> str:
        painter, back, self.paged = self.painter, "\x1b[?1049l" * self.paged, False
        if back:
            painter.drawn = self.was_drawn
        if self.whole:
            self.whole = False
            lines = place_lines(self.room, self.reader.look)
            height = sum(len(rows_of(line, painter.columns)) for line in lines)
            lines += self.reader.screenful(taken=height)[0]
            self.reader.shown = self.reader.total
            text = painter.clear()
        else:
            lines = self.reader.news(now) if due or back else []
            if not (lines or back) and painter.drawn and self.seen == bottom:
                return ""
            text = painter.erase()
        self.seen = bottom
        return back + text + "".join(f"{line}\n" for line in lines) + painter.bottom(*bottom)

    def _page(self, bottom: tuple[str, str], now: float, due: bool) -> str:
        painter, rows = self.painter, self.reader.page()
        if self.seen == (rows, bottom):
            return ""
        go = "" if self.paged else "\x1b[?1049h"
        if go:
            self.paged, self.was_drawn = True, painter.drawn
        self.seen = rows, bottom
        return go + painter.page(rows) + painter.bottom(*bottom)

    def leave(self) -> str:
        """Everything that was said, and nothing else, is left on the screen."""
        self.reader.back = self.whole = False
        return self._live(("", ""), 0.0, True) + self.painter.erase()


class RawTerminal:
    """The terminal while we have it: keys as they come, everything put back at the end."""

    # Bracketed paste; then colours, wrapping and cursor as they were.
    ON, OFF = "\x1b[?2004h", "\x1b[?2004l\x1b[0m\x1b[?7h\x1b[?25h"

    def __init__(self, keys: int = 0, screen: int = 1):
        try:
            import termios
        except ImportError:
            raise Unusable("this needs a Unix terminal; gui_client.py does not") from None
        self.termios = termios
        self.keys, self.screen = keys, screen
        self.before = termios.tcgetattr(keys)
        self.raw = False

    def enter(self) -> None:
        """Signals stay on, so that Ctrl-C and Ctrl-Z mean what they always mean. DRAIN, not
        FLUSH: what was typed ahead is not thrown away."""
        termios, mode = self.termios, [*self.before[:6], list(self.before[6])]
        mode[0] &= ~(termios.ICRNL | termios.IXON)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
        termios.tcsetattr(self.keys, termios.TCSADRAIN, mode)
        self.raw = True
        self.write(self.ON)

    def leave(self) -> None:
        if self.raw:
            self.raw = False
            with contextlib.suppress(OSError, self.termios.error):  # the terminal may be gone
                self.write(f"\r\x1b[K{self.OFF}")
                self.termios.tcsetattr(self.keys, self.termios.TCSADRAIN, self.before)

    def write(self, text: str) -> None:
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(self.screen, data) :]

    def size(self) -> tuple[int, int]:
        """Columns and rows; no fewer than there can be something to see on."""
        try:
            columns, rows = os.get_terminal_size(self.screen)
        except OSError:
            columns = rows = 0
        return max(columns or 80, LEAST_COLUMNS), max(rows or 24, LEAST_ROWS)


# ======================================================================================
# CLI CLIENT
# ======================================================================================
# The link and standard input on one loop. With a terminal on both sides it is a chat
# program; otherwise it is a filter, and prints what the workshop's client prints.


class Input:
    """Standard input on the loop, whatever it is: epoll refuses regular files, which are
    read a piece a turn instead. Never set non-blocking: its terminal is also the screen's
    and the shell's."""

    def __init__(self, loop: Loop, fd: int, take: Callable[[bytes], None]):
        self.loop, self.fd, self.take = loop, fd, take  # take(b"") at the end
        self.paused, self.ended = True, False
        # kqueue takes regular files, but never says that one has ended.
        self.watched = not stat.S_ISREG(os.fstat(fd).st_mode)
        self.resume()

    def resume(self) -> None:
        if not self.paused or self.ended:
            return
        self.paused = False
        try:
            if self.watched:
                self.loop.selector.register(self.fd, READ, self)
        except PermissionError:  # /dev/null
            self.watched = False
        if not self.watched:
            self.loop.call_soon(self._read)

    def pause(self) -> None:
        if not self.paused:
            self.paused = True
            if self.watched:
                self.loop.selector.unregister(self.fd)

    def ready(self, mask: int) -> None:
        self._read()

    def _read(self) -> None:
        if self.paused:
            return
        try:
            data = os.read(self.fd, READ_BYTES)
        except OSError:  # a terminal that has gone
            data = b""
        if not data:
            self.ended = True
            self.pause()
        self.take(data)
        if data and not self.watched:
            self.loop.call_soon(self._read)


class ClientOptions(NamedTuple):
    """What the command line says of a client."""

    name: str
    target: Target
    trust: Trust = BELIEVE_THE_SYSTEM
    state: pathlib.Path | None = None  # folder for what is remembered; None: nowhere
    password: str = ""
    join: tuple[str, ...] = ()
    commands: bool = False  # piped lines may be commands
    login: Login | None = None
    config: pathlib.Path | None = None  # folder for the passwords that we made


class Client:
    """What both clients share: a loop, a link, and an end with a reason."""

    patience = math.inf
    tidy = asks = True

    def __init__(self, options: ClientOptions):
        self.loop = Loop()
        state, target = options.state, options.target
        known = KnownServers(state / "servers.json" if state else None)
        logins = Memory(options.config / "logins.json" if options.config else None)
        whose = f"{target} {fold(options.name)}"
        made = logins.read().get(whose)
        self.core = ClientCore(
            options.name,
            self.tidy,
            password=options.password,
            join=options.join,
            login=options.login or (Login(*made) if made else None),
            outbox=open_outbox(state / "outbox" if state else None, target, options.name),
        )
        self.core.me.generated = bool(made) and options.login is None
        self.core.me.keep = functools.partial(logins.keep, whose) if options.config else None
        self.link = Link(
            self.loop,
            target,
            self.core,
            self.show,
            self.over,
            options.trust,
            known,
            self.patience,
            self.asks,
        )
        self.reason = ""

    def show(self, views: list[View]) -> None:
        raise NotImplementedError

    def over(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.loop.stop()

    def run(self) -> str:
        """Until the end; says why it was one, or ""."""
        self.link.start()
        self.loop.run()
        return self.reason


def filter_lines(view: View) -> list[str]:
    """What the workshop's client prints. What we said ourselves we know."""
    if view.line:
        return [view.line]
    where = "" if view.where == LOBBY else f"[{view.where}] "
    if view.kind == SAID and (view.past or not view.mine):
        before = where if is_channel(view.where) else "(private) "
        return [f"{before}{view.name}: {line}" for line in view.text.split("\n")]
    if view.kind in (CAME, WENT):
        verb = "joined" if view.kind == CAME else "left"
        return [f"{where}{view.name} ({view.address}) {verb} the chat!"]
    if view.kind == TOLD or (view.kind == PEOPLE and view.text):
        return [f"* {view.text}"]
    return []


def output_trouble(error: OSError) -> str:
    """What is wrong with standard output, which Python would flush again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return f"standard output: {reason_of(error)}"


class Filter(Client):
    """Lines in, lines out, for pipes: it ends when its input does, and the server has it all."""

    patience = 0.0  # until there is a connection
    tidy = asks = False

    def __init__(self, options: ClientOptions):
        super().__init__(options)
        self.was_up = False
        self.refused = 0  # lines that could not be said
        self.login, self.join = options.login, options.join
        self.commands = options.commands
        self.lines = LineBuffer(LINE_BYTES)
        self.failure = ""  # of something, although the rest went well
        sys.stdout.reconfigure(errors="replace")
        self.speak = self.link.typed if options.commands else self.link.say
        self.input = Input(self.loop, 0, self.take)
        self.input.pause()  # until there is somebody to tell it to
        self.link.drained = self.input.resume

    def take(self, data: bytes) -> None:
        if data:
            self.lines.feed(data)
        else:
            self.lines.finish()
        while (line := self.lines.take()) is not None:
            if line == TOO_LONG:
                self.failure = f"a line has at most {LINE_BYTES:,} bytes: it was not sent"
            elif self.commands and is_quit(line.decode(errors="replace")):
                data = b""  # the end, for which all that was said before is waited for
                break
            else:
                self.speak(line.decode(errors="replace"))
        if not data:
            self.input.pause()
            self.link.drained = do_nothing
            self.link.leave()
        elif not self.link.has_room():
            self.input.pause()

    def show(self, views: list[View]) -> None:
        lines = []
        for view in views:
            if view.kind == UP and not self.was_up:
                self.was_up = True
                lines.append(f"{view.text}\n")
            elif view.kind in (NOTE, FAILED) or (view.kind == STATUS and self.was_up):
                print(f"chat.py: {view.text}", file=sys.stderr)
            self.refused += view.kind == BACK
            lines += [f"> {line}\n" for line in filter_lines(view)]
        try:
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
        except OSError as error:
            trouble = output_trouble(error)
            if not (isinstance(error, BrokenPipeError) and self.link.leaving):
                self.over(trouble)  # there may be more to say

    def over(self, reason: str) -> None:
        waiting, failures = len(self.core.outbox.waiting), self.core.failures + self.refused
        reasons = [reason or self.failure]
        if failures and not reason:
            reasons.append(f"{counted(failures, 'message')} did not arrive")
        if self.login and self.was_up and not self.core.me.account:
            reasons.append(f"not logged in as {self.login.account}")
        if self.join and self.was_up and self.core.kind == PLAIN:
            reasons.append("a plain server has no channels; if it is one of IRC, write irc://...")
        if waiting:
            reasons.append(f"{counted(waiting, 'message')} waiting, to be sent the next time")
        super().over("; ".join(filter(None, reasons)))


def on_signal(loop: Loop, name: str, callback: Callable[[], Any]) -> None:
    """Call back on the loop when the signal of that name comes; not every system has each,
    and what whoever started us (nohup) wants ignored is."""
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback))


CLIENT_KEYS = (  # what /help tells of them
    "Page Up:  read back; Page Down, Escape or Enter lead to the present",
    "Alt-A:  to the next conversation with something new; first where you are called",
    "Alt-N, Alt-P:  to the next conversation, or the previous one",
    "Alt-1 to Alt-9:  to that conversation; /go alone lists them",
    "Tab:  complete a name, a channel or a command; again: the next that fits",
    "Up, Down:  what you typed before",
    "Alt-Enter:  a new line in a message",
    "Ctrl-L:  draw the screen anew",
    "Ctrl-C:  forget the line; leave, if there is none",
)


class TerminalClient(Client):
    """A terminal and a link: keys to the one, views to the other."""

    def __init__(self, options: ClientOptions):
        super().__init__(options)
        self.terminal = RawTerminal()
        palette = Palette("NO_COLOR" not in os.environ)
        self.display = Display(self.core, palette, *self.terminal.size())
        self.decoder = KeyDecoder()
        self.editor = LineEditor(self.complete)
        self.pressed = self.news = True  # there is something to paint: at once, or soon
        self.painted = 0.0
        self.painting: Timer | None = None  # what came too early for that
        self.was_ready = self.told_why = False
        self.late: set[str] = set()  # own ids of what has been waiting for a while
        self.escape: Timer | None = None
        self.input = Input(self.loop, 0, self.take)
        self.loop.turn_ends = self.paint

    def run(self) -> str:
        for number, handler in (
            ("SIGINT", self.interrupt),
            ("SIGTERM", functools.partial(self.over, "")),
            ("SIGHUP", functools.partial(self.over, "")),
            ("SIGWINCH", self.resize),
            ("SIGTSTP", self.suspend),
        ):
            on_signal(self.loop, number, handler)
        atexit.register(self.give_back)
        self.terminal.enter()
        self.tick()
        try:
            reason = super().run()
        finally:
            self.give_back()
        if waiting := len(self.core.outbox.waiting):
            kept = self.core.outbox.journal  # else there was nowhere to keep them
            fate = "waiting, to be sent the next time" if kept else "not sent"
            print(f"{counted(waiting, 'message')} {fate}")
        return reason

    def tick(self) -> None:
        """Once a second: the status may say another number now."""
        self.late = set(self.core.outbox.waiting)
        self.news = True
        self.loop.call_later(1.0, self.tick)

    # What is typed

    def take(self, data: bytes) -> None:
        if not data:
            return self.over("")
        if self.escape:
            self.escape.cancel()
        self.press(self.decoder.feed(data))
        if self.decoder.rest.startswith("\x1b"):
            self.escape = self.loop.call_later(ESCAPE_SECONDS, self.flush_escape)

    def flush_escape(self) -> None:
        self.press(self.decoder.flush())

    def press(self, keys: list[Key]) -> None:
        for key in keys:
            reading = self.READING.get(key.name) if self.display.reader.back else None
            if act := reading or self.KEYS.get(key.name):
                act(self)
            elif (text := self.editor.press(key)) is not None:
                self.enter(text)
        if self.editor.left:
            self.leave()
        self.pressed = True

    def enter(self, text: str) -> None:
        """A line was entered; an empty one is no message, as it is from netcat."""
        self.present()
        command = text.rstrip().lower() if text[:1] == "/" else ""
        if is_quit(text):
            self.leave()
        elif command == "/go":
            self.list_rooms()
        elif text:
            self.link.typed(text.rstrip() if command else text)
        if command == "/help" and self.core.kind != PLAIN:
            self.show([View(NOTE, keys) for keys in CLIENT_KEYS])

    def list_rooms(self) -> None:
        """With the numbers that they have for Alt and /go."""
        rooms = [
            f"{n} {room.name}" + f" ({room.unread} new)" * bool(room.unread)
            for n, room in enumerate(self.core.rooms.values(), 1)
        ]
        self.show([View(NOTE, ", ".join(rooms) or "there is none; /join #CHANNEL")])

    def leave(self) -> None:
        """The server hears us out, for as long as that is bearable."""
        self.loop.call_later(STOP_SECONDS, lambda: self.over(""))
        self.link.leave(at_once=True)

    def interrupt(self) -> None:
        """Ctrl-C: forget the line; without one, leave."""
        if not self.editor.text:
            return self.leave()
        self.editor.set("")
        self.pressed = True

    def complete(self, word: str, first: bool) -> list[str]:
        return complete_line(self.core, self.editor.before, word)

    # Where one is

    def go(self, room: Room) -> None:
        self.core.go(room)
        self.show(self.core.take_views())

    def go_number(self, number: int) -> None:
        for room in list(self.core.rooms.values())[number - 1 : number]:
            self.go(room)

    def go_next(self, step: int = 1) -> None:
        rooms = list(self.core.rooms.values())
        if rooms:
            here = rooms.index(self.core.room) if self.core.room else -1
            self.go(rooms[(here + step) % len(rooms)])

    def go_unread(self) -> None:
        """Where we are called; else where something is new."""
        rooms = sorted(self.core.rooms.values(), key=lambda room: not room.called)
        for room in [room for room in rooms if room.unread][:1]:
            self.go(room)

    # Reading back

    def page_up(self) -> None:
        self.up(self.display.reader.height - 1)

    def page_down(self) -> None:
        self.display.reader.down(self.display.reader.height - 1)

    def up(self, rows: int) -> None:
        """More of the past is asked for before one is at the end of what is here."""
        reader = self.display.reader
        reader.up(rows)
        if reader.end - reader.first < 2 * reader.height:
            self.display.fetching = self.link.ask_older(reader.room)

    def present(self) -> None:
        self.display.reader.back = False

    def redraw(self) -> None:
        self.terminal.write("\x1b[2J")
        self.display.whole, self.display.seen = True, None

    KEYS = {
        "redraw": redraw,
        "page-up": page_up,
        "page-down": page_down,
        "room-unread": go_unread,
        "room-next": go_next,
        "room-previous": lambda self: self.go_next(-1),
        **{f"room-{n}": lambda self, n=n: self.go_number(n) for n in range(1, 10)},
    }
    READING = {  # what these mean meanwhile; a mouse wheel sends the arrows
        "up": lambda self: self.up(1),
        "down": lambda self: self.display.reader.down(1),
        "home": lambda self: self.up(VIEWS_KEPT * self.display.reader.height),
        "end": present,
        "escape": present,
    }

    # What is shown

    def show(self, views: list[View]) -> None:
        if self.core.ready and not self.was_ready:
            self.told_why = False
            self.display.keep(View(NOTE, f"connected to {self.link.target}"))
        self.was_ready = self.core.ready
        self.display.take(views)
        for view in views:
            if view.kind == BACK:
                self.give_text_back(view.text)
            elif view.kind == STATUS and self.link.again and not self.told_why:
                self.told_why = True
                self.display.keep(View(NOTE, view.text))
        self.news = True

    def give_text_back(self, text: str) -> None:
        """It was not accepted: to be typed on; or to be recalled, if something else is typed."""
        if not self.editor.text:
            self.editor.set(text)
        elif not is_secret(text):
            self.editor.remember(text)

    def trouble(self) -> str:
        """What is the matter with the connection; "" if nothing is."""
        link = self.link
        if link.doubted:
            return "/trust or /quit"
        if link.again:
            return f"reconnecting in {max(0, math.ceil(link.again.when - self.loop.now))} s"
        return "" if self.core.ready else "connecting"

    def paint(self, last: bool = False) -> None:
        """All that is new, in one write: at once if a key was pressed, else not more often
        than it can be seen."""
        wait = self.painted + 1 / PAINTS_A_SECOND - self.loop.now
        if self.news and wait > 0 and not self.painting:
            self.painting = self.loop.call_later(wait, do_nothing)
        due = self.news and wait <= 0
        if not (self.pressed or due) or not self.terminal.raw:
            return
        waiting = self.core.outbox.waiting
        count = len(self.late & waiting.keys() if self.core.ready else waiting)
        display, editor = self.display, self.editor
        row = display.painter.row(display.prompt(), editor.before, editor.after)
        text = display.frame(row, display.parts(self.trouble(), count), self.loop.now, due)
        self.pressed = False
        if due:
            self.news, self.painted, self.painting = False, self.loop.now, None
        self.write(text)

    def write(self, text: str) -> None:
        try:
            self.terminal.write(text)
        except OSError:  # the terminal has gone
            self.over("")

    # What the shell wants

    def resize(self) -> None:
        self.display.resize(*self.terminal.size())
        self.news = True

    def give_back(self) -> None:
        """The terminal as it was, with what was said left on it."""
        if self.terminal.raw:
            self.write(self.display.leave())
            self.terminal.leave()

    def suspend(self) -> None:
        """Ctrl-Z: give the terminal back, stop, and take it again when we are continued."""
        self.give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        on_signal(self.loop, "SIGTSTP", self.suspend)
        self.terminal.enter()
        self.display.resize(*self.terminal.size())
        self.pressed = self.news = True


# ======================================================================================
# BENCH
# ======================================================================================
# A load generator for any server of the line protocol. Receivers count newlines; one of
# them (all, when messages come at a rate) also reads the time that each message carries.


class BenchOptions(NamedTuple):
    """What a run of the benchmark is made of."""

    target: Target
    clients: int = 100  # who only listen
    senders: int = 10
    messages: int = 20000
    payload: int = 60  # bytes beside the time
    window: int = 512  # messages under way, as the slowest receiver sees it
    rate: float = 0.0  # messages a second instead of a window


class BenchConnection(Connection):
    """One client of the load: counts what comes, and perhaps times it."""

    __slots__ = ("counted", "failure", "inbox", "latencies", "said", "times")

    def __init__(self, loop: Loop, sock: socket.socket):
        super().__init__(loop, sock)
        self.failure = ""
        self.counted = False  # from when on lines count
        self.said = 0  # messages received
        self.times = False
        self.inbox = LineBuffer(LINE_BYTES)
        self.latencies: list[float] = []

    def received(self, data: bytes) -> None:
        if not self.counted:
            return
        if not self.times:
            self.said += data.count(b"\n")
            return
        self.inbox.feed(data)
        now = time.perf_counter()
        while (line := self.inbox.take()) is not None:
            self.said += 1
            self.latencies.append(now - float(line.split(b"^")[1]))

    def lost(self, reason: str) -> None:
        self.failure = reason


class Bench:
    """One run: connect everybody, wait until it is quiet, send, count."""

    def __init__(self, options: BenchOptions, progress: Callable[[str], None]):
        self.options, self.progress = options, progress
        self.loop = Loop()
        self.receivers: list[BenchConnection] = []
        self.senders: list[BenchConnection] = []
        self.sent = 0

    def _connect(self, name: str) -> BenchConnection:
        try:
            sock = socket.create_connection(self.options.target[:2], CONNECT_SECONDS)
        except OSError as error:
            raise Unusable(f"{self.options.target}: {reason_of(error)}") from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = BenchConnection(self.loop, sock)
        conn.write(f"{name}\n".encode())
        return conn

    def run(self) -> dict[str, Any]:
        for n in range(self.options.clients):
            self.receivers.append(self._connect(f"r{n}"))
        for n in range(self.options.senders):
            self.senders.append(self._connect(f"s{n}"))
        self._settle()
        for conn in self.receivers:
            conn.counted = True
        for conn in self.receivers if self.options.rate else self.receivers[:1]:
            conn.times = True
        began = reported = time.perf_counter()
        done = 0
        while done < self.options.messages:
            self._send(done, time.perf_counter() - began)
            self._turn(1 / self.options.rate if self.options.rate else 1.0)
            done = min(conn.said for conn in self.receivers)
            if time.perf_counter() - reported > 0.5:
                reported = time.perf_counter()
                self.progress(f"{done:,} of {self.options.messages:,} messages")
        return self._result(time.perf_counter() - began)

    def _settle(self) -> None:
        """Until everybody is in, as far as can be told from outside: there was something to
        hear, and then nothing more for a while."""
        for conn in self.receivers:
            conn.counted = True
        for sender in self.senders:
            sender.write(b"ready\n")
        known = -1
        while known != (known := sum(conn.said for conn in self.receivers)) or known == 0:
            deadline = time.perf_counter() + BENCH_QUIET_SECONDS
            while (left := deadline - time.perf_counter()) > 0:
                self._turn(left)
        for conn in self.receivers:
            conn.said = 0

    def _turn(self, longest: float) -> None:
        self.loop.run_once(longest)
        failure = next((c.failure for c in (*self.receivers, *self.senders) if c.failure), "")
        if failure:
            raise Unusable(f"the server closed a connection of the load: {failure}")

    def close(self) -> None:
        """Hang up: a server that is told to end waits for its clients."""
        for conn in (*self.receivers, *self.senders):
            conn.sock.close()
        self.loop.close()

    def _send(self, done: int, elapsed: float) -> None:
        """What may go now: due by the clock, or inside the window."""
        options = self.options
        due = int(elapsed * options.rate) + 1 if options.rate else done + options.window
        count = min(due, options.messages) - self.sent
        for n, sender in enumerate(self.senders):
            share = count // len(self.senders) + (n < count % len(self.senders))
            if share > 0:
                line = f"^{time.perf_counter():.7f}^{'x' * options.payload}\n".encode()
                sender.write(line * share)
                self.loop.dirty.discard(sender)
                sender.flush()
        self.sent += max(0, count)

    def _result(self, seconds: float) -> dict[str, Any]:
        options = self.options
        latencies = sorted(itertools.chain(*(conn.latencies for conn in self.receivers)))

        def at(share: float) -> float:
            """The latency in milliseconds that this share of the messages stayed below."""
            return round(latencies[int(share * (len(latencies) - 1))] * 1000, 3)

        return {
            "receivers": options.clients,
            "senders": options.senders,
            "messages": options.messages,
            "payload": options.payload,
            "window": 0 if options.rate else options.window,
            "rate": options.rate,
            "seconds": round(seconds, 3),
            "deliveries_per_s": round(options.clients * options.messages / seconds),
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
            "p999_ms": at(0.999),
        }


@contextlib.contextmanager
def server_for_bench() -> Iterator[Target]:
    """A server of our own, on any port, with its history in a temporary folder."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "server", "--listen", "127.0.0.1:0"]
        command += ["--flood", "off", "--data", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            match = re.search(r"listens on (\S+)", process.stdout.readline())
            if not match:
                raise Unusable("the server for the benchmark did not start")
            yield parse_target(match.group(1))
        finally:
            process.terminate()
            process.communicate()


def bench_table(result: dict[str, Any]) -> str:
    mode = f"{result['rate']:g} a second" if result["rate"] else f"{result['window']} under way"
    return (
        f"{result['messages']:,} messages, {result['senders']} senders, "
        f"{result['receivers']} receivers, {mode}\n"
        f"deliveries a second   {result['deliveries_per_s']:>12,}\n"
        f"latency p50           {result['p50_ms']:>12,.3f} ms\n"
        f"latency p99           {result['p99_ms']:>12,.3f} ms\n"
        f"latency p99.9         {result['p999_ms']:>12,.3f} ms"
    )


# ======================================================================================
# MAIN
# ======================================================================================
# The command line. Everything works without any flag; whatever goes wrong is one line on
# standard error and an exit status: 1 for what did not work, 2 for a wrong command line.


def data_folder() -> pathlib.Path:
    """Where this user's programs keep their data, in the system's own way."""
    home = pathlib.Path.home()
    if os.name == "nt":
        return pathlib.Path(os.environ.get("APPDATA") or home) / "chat.py"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "chat.py"
    return pathlib.Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "chat.py"


def config_folder() -> pathlib.Path:
    """Likewise, what they were told to be like."""
    if os.name == "nt" or sys.platform == "darwin":
        return data_folder()
    home = os.environ.get("XDG_CONFIG_HOME") or pathlib.Path.home() / ".config"
    return pathlib.Path(home) / "chat.py"


def listen_address(text: str) -> tuple[str, int]:
    try:
        target = parse_target(text)
    except Unusable:
        raise argparse.ArgumentTypeError(f"{text}: write HOST:PORT") from None
    return target.host, target.port


def server_target(text: str) -> Target:
    try:
        return parse_target(text)
    except Unusable as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flood_limits(text: str) -> tuple[float, float] | None:
    if text == "off":
        return None
    try:
        burst, rate = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write BURST,RATE or off") from None
    if not (1 <= burst < math.inf and 0 < rate < math.inf):
        raise argparse.ArgumentTypeError("at least 1 line at once, and more than 0 a second")
    return burst, rate


def message_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: messages a second, or 0 for a window")
    return rate


def data_option(text: str) -> pathlib.Path | None:
    return None if text == "none" else pathlib.Path(text)


def positive(text: str) -> int:
    number = whole_number(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on")
    return number


def payload_bytes(text: str) -> int:
    number = positive(text)
    if number > BENCH_PAYLOAD:
        raise argparse.ArgumentTypeError(f"{text}: a message has at most {BENCH_PAYLOAD:,} bytes")
    return number


def certificate_pin(text: str) -> str:
    digits = text.replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", digits):
        raise argparse.ArgumentTypeError(f"{text}: write the SHA-256 as 64 hexadecimal digits")
    return digits


def mail_command(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def registration(text: str) -> frozenset[str]:
    """How accounts are made: "" (by who has come in), before-connect too, or off."""
    wanted = frozenset(filter(None, text.split(",")))
    if not wanted <= {"off", "before-connect", "email-required"}:
        raise argparse.ArgumentTypeError(f"{text}: write off, or before-connect,email-required")
    return wanted


def host_name(text: str) -> str:
    """One word that can stand in a line of IRC."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise argparse.ArgumentTypeError(f"{text}: letters, digits, dots and hyphens, please")
    return text


def ask_for_password() -> str:
    """Ask at the terminal, whatever standard input is: a pipe's first line is no password."""
    import getpass
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass("password: ")
        except (getpass.GetPassWarning, EOFError):
            raise Unusable("nobody typed the password; it can be given as @FILE") from None


def secret_option(text: str) -> str:
    """A password as it is, or @FILE that holds it, or "" to be asked for it. Raises Unusable."""
    what = f"the password in {text[1:]}" if text.startswith("@") else "the password"
    try:
        if text.startswith("@"):
            secret = pathlib.Path(text[1:]).read_text("utf-8-sig").strip()
        else:
            secret = text or ask_for_password()
    except UnicodeError:
        raise Unusable(f"{what} is not UTF-8 text") from None
    except OSError as error:
        raise Unusable(f"cannot read {what}: {reason_of(error)}") from None
    if not secret:  # it would let everybody in
        raise Unusable(f"{what} is empty")
    return secret


def operator_option(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not name or not colon or " " in name:
        raise argparse.ArgumentTypeError("write NAME:PASSWORD, NAME:@FILE, or NAME: to be asked")
    return name, secret_option(password)


def lock_folder(folder: pathlib.Path) -> int:
    """The data folder, made if need be, for this process alone. Raises Unusable."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return locked(folder / "lock")
    except BlockingIOError:
        raise Unusable(f"another server uses {folder}; stop it, or choose another --data") from None
    except OSError as error:
        advice = "choose another --data, or --data none to keep nothing"
        raise Unusable(f"cannot use {folder}: {reason_of(error)}; {advice}") from error


def how_to_join(server: Server) -> str:
    """The start-up lines: where, who can get in, and how."""
    lines = []
    for listener in server.listeners:
        host, port = listener.address
        where = address_text(host, port)
        near = "this machine only; --listen 0.0.0.0:7000 for the network"
        who = near if is_loopback(host) else "everybody who can reach this machine"
        lines.append(f"chat.py {VERSION} listens on {where} ({who})")
    host, port = server.listeners[0].address
    default = (host, port) == (DEFAULT_HOST, DEFAULT_PORT)
    elsewhere = "HOST" if host in ("0.0.0.0", "::") else host
    option = "" if default else f" --server {address_text(elsewhere, port)}"
    kept = server.store.path.parent if server.store.path else "memory only: gone when it ends"
    lines += [
        f"history: {kept}",
        f"terminal: python3 chat.py client NAME{option}",
        f"window:   python3 gui_client.py NAME{option}",
        f"netcat:   nc {elsewhere} {port}",
        f"IRC:      any client, {elsewhere} port {port}; irssi -c {elsewhere} -p {port}",
    ]
    return "\n".join(lines)


def announce(text: str) -> None:
    """On standard output. Raises Unusable."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise Unusable(output_trouble(error)) from error


def run_server(args: argparse.Namespace) -> int:
    logging.basicConfig(level=args.log.upper(), format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    lock = lock_folder(args.data) if args.data else None
    names = set(ServerOptions._fields) - {"listen"}
    listen = tuple(args.listen or ServerOptions().listen)
    loop = Loop()
    server = Server(loop, ServerOptions(listen, **{name: getattr(args, name) for name in names}))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        on_signal(loop, name, server.stop)
    announce(how_to_join(server))
    loop.run()
    server.close()
    if lock is not None:
        os.close(lock)
    if server.restarting:
        os.execv(sys.executable, sys.orig_argv)
    return 0


def run_passwd(args: argparse.Namespace) -> int:
    """Another password for an account, whoever asks: he has the files. The server may run."""
    path = args.data / "chat.db"
    if not path.exists():
        raise Unusable(f"there is no database in {args.data}; --data says where it is")
    with contextlib.closing(open_database(path)) as db:
        db.execute(f"PRAGMA busy_timeout = {PASSWD_WAIT}")
        query = "SELECT name, salt FROM accounts WHERE key = ?"
        name, salt = db.execute(query, [fold(args.name)]).fetchone() or ("", b"")
        if not name:
            raise Unusable(f"there is no account {args.name}")
        password = args.password or secret_option("")
        if len(password) < PASSWORD_LEAST:
            raise Unusable(f"a password has at least {PASSWORD_LEAST} characters")
        columns = "salt = ?, rounds = ?, stored_key = ?, server_key = ?"
        values = [*make_verifier(password), fold(name), salt]
        try:
            done = db.execute(f"UPDATE accounts SET {columns} WHERE key = ? AND salt = ?", values)
        except sqlite3.Error as error:
            raise Unusable(f"the password could not be changed: {error}") from error
    if not done.rowcount:
        raise Unusable(f"the password of {name} was changed meanwhile; this was not done")
    announce(f"{name} has another password now")
    return 0


def login_option(args: argparse.Namespace) -> Login | None:
    """Who wants to log in is asked for the password, unless it came by --login ACCOUNT:@FILE."""
    if args.login is None:
        return None
    account, _, password = args.login.partition(":")
    return Login(account or args.name, secret_option(password))


def run_client(args: argparse.Namespace) -> int:
    if not clean_name(args.name) or args.name[0] == "/" or dialect_of(args.name.encode()) != "line":
        raise Unusable(f"{args.name!r} cannot be a name")
    if len(args.name.encode()) > NAME_BYTES:
        raise Unusable(f"a name has at most {NAME_BYTES} bytes")
    if not args.server.tls and (args.ca or args.pin or args.insecure):
        raise Unusable("--ca, --pin and --insecure are of no use without TLS: write ircs://...")
    options = ClientOptions(
        " ".join(args.name.split()),
        args.server._replace(kind=PLAIN if args.plain else args.server.kind),
        Trust(args.ca, args.pin, args.insecure),
        None if args.no_state else data_folder() / "client",
        args.password or "",
        tuple(filter(None, args.join.split(","))),
        args.commands,
        login_option(args),
        None if args.no_state else config_folder(),
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    reason = (TerminalClient if terminal else Filter)(options).run()
    if reason:
        raise Unusable(reason)
    return 0


def show_progress(text: str) -> None:
    """Over what stood there before, and to be written over."""
    print(f"\r{text}\x1b[K\r", end="", file=sys.stderr)


def run_bench(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: a server may be ours
    own = contextlib.nullcontext(args.server) if args.server else server_for_bench()
    with own as target:
        options = BenchOptions(
            target, **{n: getattr(args, n) for n in BenchOptions._field_defaults}
        )
        with contextlib.closing(
            Bench(options, show_progress if sys.stderr.isatty() else do_nothing)
        ) as bench:
            result = bench.run()
    announce(json.dumps(result) if args.json else bench_table(result))
    return 0


def add_server(commands: Any) -> None:
    server = commands.add_parser("server", help="let others talk")
    add = server.add_argument
    add("--listen", type=listen_address, action="append", metavar="HOST:PORT")
    add("--tls-cert", metavar="PEM", help="certificate chain: TLS on the same port")
    add("--tls-key", metavar="PEM", help="its key, unless it is in the same file")
    add("--tls-client-ca", metavar="PEM", help="whose client certificates can log in")
    add("--data", type=data_option, default=data_folder(), metavar="DIR", help="or none")
    add("--keep", type=positive, metavar="N", help="events kept of each channel")
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    add("--flood", type=flood_limits, default=(FLOOD_BURST, FLOOD_RATE), metavar="BURST,RATE|off")
    add("--name", type=host_name, default=SERVER_NAME, metavar="HOST", help="of this server")
    add("--network", type=host_name, default=SERVER_NAME, metavar="NAME")
    add("--oper", type=operator_option, action="append", default=[], metavar="NAME:PASSWORD")
    add("--motd", type=pathlib.Path, metavar="FILE", help="message of the day, for IRC")
    add(
        "--register",
        type=registration,
        default=frozenset(),
        metavar="RULES",
        help="off, or before-connect,email-required",
    )
    add("--sts", type=positive, metavar="SECONDS", help="IRC clients come back by TLS only")
    add(
        "--sendmail",
        type=mail_command,
        metavar="COMMAND",
        help="takes a message, like: sendmail -t",
    )
    add("--max-clients", type=positive, metavar="N")
    add("--max-per-address", type=positive, default=PER_ADDRESS, metavar="N")
    add("--log", default="info", choices=("debug", "info", "warning", "error"))
    server.set_defaults(run=run_server)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description="A chat in one file.")
    parser.add_argument("--version", action="version", version=f"chat.py {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)

    add_server(commands)

    client = commands.add_parser("client", help="talk")
    add = client.add_argument
    add("name", metavar="NAME")
    add("--server", type=server_target, default=server_target(""), metavar="HOST:PORT|URL")
    add("--join", default="", metavar="#A,#B", help="channels to enter at once")
    add("--plain", action="store_true", help="a workshop server: the line protocol, no commands")
    add(
        "--login",
        nargs="?",
        const="",
        metavar="ACCOUNT[:@FILE]",
        help="asks for the password, or reads it from FILE",
    )
    add("--commands", action="store_true", help="lines of a pipe may be commands")
    add("--no-state", action="store_true", help="remember nothing")
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    add("--ca", metavar="PEM", help="believe these certificates instead of the system's")
    add("--pin", type=certificate_pin, metavar="SHA256", help="believe this one certificate")
    add("--insecure", action="store_true", help="believe any certificate")
    client.set_defaults(run=run_client)

    passwd = commands.add_parser("passwd", help="another password for an account")
    add = passwd.add_argument
    add("name", metavar="NAME")
    add("--data", type=pathlib.Path, default=data_folder(), metavar="DIR")
    add("--password", type=secret_option, metavar="PW", help="or @FILE; asked for without it")
    passwd.set_defaults(run=run_passwd)

    bench = commands.add_parser("bench", help="measure a server; one of its own without --server")
    add = bench.add_argument
    add("--server", type=server_target, metavar="HOST:PORT")
    for name, value in BenchOptions._field_defaults.items():
        kind = {"rate": message_rate, "payload": payload_bytes}.get(name, positive)
        add(f"--{name}", type=kind, default=value, metavar="N")
    add("--json", action="store_true")
    bench.set_defaults(run=run_bench)
    return parser


def require_text(arguments: list[str]) -> None:
    """Names and passwords go into UTF-8; the bytes of a command line can be anything."""
    for text in arguments:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Unusable(f"{text!r} on the command line is not UTF-8 text")


def main(arguments: list[str] | None = None) -> int:
    for fd in (0, 1, 2):  # a closed one would come back as a socket, and be written to
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)  # Python found them closed
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    try:
        require_text(sys.argv[1:] if arguments is None else arguments)
        args = command_line().parse_args(arguments)
        return args.run(args)
    except ChatError as error:
        print(f"chat.py: {escaped(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
