#!/usr/bin/env python3
"""A chat in one file: a server for everyone in the room, and a client for it.

    python3 chat.py server          python3 chat.py client alice          nc 127.0.0.1 7000

Sections, in reading order; each opens with a banner and uses only what stands above it:

    LIMITS          every tunable, with its unit and its reason
    VOCABULARY      events, and the errors that are raised on purpose
    FRAMING         bytes to lines, names, cutting text where it may be cut
    BUFFERS         what waits to be sent, TLS as a filter, input budgets
    COMMANDS        the record of a command, and the one gate before it runs
    DOMAIN          users, sessions, channels, the hub, and the log of a turn
    STORE           history in SQLite
    LINE DIALECT    the workshop's protocol and its slash commands
    FIRST LINE      which dialect a connection speaks
    CLIENT CORE     a conversation as lines in and views out
    --- waterline   below: sockets, clocks, threads, terminals
    LOOP            selector, timers, connections
    SERVER          listeners, the five beats of the tick, shutdown
    LINK            a client's connection: find the server, come back to it
    TERMINAL        keys, line editor, painter
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
    channel   a named room of users
    audience  whom an event is for: a channel, several channels, a private conversation
    wire      one way to turn events into bytes; sessions of one wire share those bytes
    view      what a client shows its person
    key       a name folded for comparison; two names with one key are the same name
"""

from __future__ import annotations

import argparse
import atexit
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
import selectors
import signal
import socket
import sqlite3
import stat
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

# ======================================================================================
# LIMITS
# ======================================================================================
# Every number that somebody may want to change, with its unit and the reason for it.
# A refusal always names the limit it enforces and says what to do.

VERSION = "0.1"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000

LINE_BYTES = 16 * 1024  # longest line in the line protocol; a page of text fits
MESSAGE_LINES = 200  # longest message of several lines; more is a file, not a message
NAME_CHARACTERS = 32  # longest name as people count ...
NAME_BYTES = 64  # ... and as the wire does; room for 16 characters outside the BMP
NAMES_COUNTED = 100  # alice2 to alice99; after that any number will do
CHANNEL_BYTES = 64  # as for names
TOPIC_BYTES = 390  # fits an IRC line beside the longest names
CHANNELS_A_USER = 50  # bounds the table of channels by the number of users
PASSWORD_TRIES = 3  # before a connection is closed

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
LINGER_SECONDS = 2.0  # how long a closed connection may still read our last words
STOP_SECONDS = 1.0  # how long a shutdown waits for slow readers
PER_ADDRESS = 64  # connections from one address (loopback exempt)
SPARE_DESCRIPTORS = 64  # kept from clients for the database, listeners, helpers and logs
ACCEPT_BACKOFF = 1.0  # seconds without accepting when the descriptors ran out
KEEPALIVE_SECONDS = 90  # first TCP probe to a silent line-protocol peer ...
KEEPALIVE_PROBES = 3  # ... and how many of them, KEEPALIVE_EVERY apart
KEEPALIVE_EVERY = 10

KEEP_EVENTS = 1_000_000  # history of a channel
KEEP_EVENTS_IN_MEMORY = 10_000  # the same with --data none: about 5 MB a busy channel ...
MEMORY_BYTES = 256 * 1024 * 1024  # ... and this much for all channels, those of the past too
PRUNE_ROWS = 500  # rows deleted at a time: 1 to 3 ms, measured
TALLY_SECONDS = 1.0  # between writing down how much history there is
TARGETS_CACHED = 10_000  # row ids of channels and private talks kept at hand
PRUNE_OVERDUE = 1.1  # times the limit: from here on pruning does not wait for an idle turn
BUSY_SECONDS = 1.0  # a database busy for longer gets no more of the turn's events
BUSY_RETRY_SECONDS = 0.005  # not noticed by a person, and not a busy loop either
CHECKPOINT_SECONDS = 1.0  # the log stays small, and the next start quick
WAL_RESTART_BYTES = 64 * 1024 * 1024  # PASSIVE checkpoints never reset it under unbroken load
CHECKED_ON_START_BYTES = 16 * 1024 * 1024  # a larger database is not read whole: 300 ms to start
HISTORY_LINES = 20  # /history without a number: a screen
HISTORY_LINES_MOST = 500
PAGE_BYTES = 128 * 1024  # of history at once: well below what closes a slow reader
PEOPLE_LISTED = 10_000  # of a channel, by our clients
NAMES_GREETED = 20  # who is here, told to a newcomer in one line
NAMES_A_LINE = 100  # at 64 bytes each still well below LINE_BYTES

HELPER_THREADS = 2  # one may wait for the disk while the other reads a page

LISTEN_SECONDS = 1.0  # how long our client waits for a server to speak first ...
LISTEN_CONNECT_TIMES = 4  # ... or this many times what connecting took, the longer
LISTEN_KNOWN_SECONDS = 10.0  # for a server known to be chat.py
CONNECT_SECONDS = 10.0  # to one address, and as much again for the TLS handshake
BACKOFF_FIRST = 0.5  # seconds before the first attempt to reconnect
BACKOFF_MOST = 30.0
BACKOFF_RESET = 5.0  # seconds a connection has to last for the back-off to begin anew

PAINTS_A_SECOND = 30  # of the terminal: more cannot be seen
BENCH_QUIET_SECONDS = 0.3  # without news: everybody has joined
ESCAPE_SECONDS = 0.04  # a lone ESC is a key, not the beginning of one, after this
TYPED_KEPT = 500  # lines of what was typed, for the arrow keys

# ======================================================================================
# VOCABULARY
# ======================================================================================
# An Event is one record of something other people can see. It names its audience and
# never its receivers: who that is, is worked out once, when the turn is written.

LOBBY = "#lobby"  # where everybody without a channel of their own finds themselves

MESSAGE, ACTION = "message", "action"
JOIN, PART, QUIT, NICK, TOPIC = "join", "part", "quit", "nick", "topic"
SPOKEN = (MESSAGE, ACTION)  # the kinds that a person said


class Source(NamedTuple):
    """Who did something, as they were called at that moment."""

    name: str
    address: str  # HOST:PORT; an IPv6 host in brackets


class Event(NamedTuple):
    """One thing that others can see. A tuple, because a storm makes 50,000 of them a second."""

    id: int  # grows with every event, over restarts too; the order of everything
    time: int  # milliseconds since 1970, never falling within one audience
    kind: str
    source: Source
    audience: Any  # Channel, Neighbours or Conversation
    text: str = ""
    origin: Any = None  # the Session that did it; None when read back from the store


class ChatError(Exception):
    """What this program raises on purpose. The text is a sentence for a person."""


class Refused(ChatError):
    """A peer asked for what cannot be done; the gate tells that peer, nobody else notices."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code = code  # a word for programs, the same in every dialect


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
        raise Refused("BAD_CHANNEL", "a channel's name begins with # and goes on, like #tea")
    if len(name.encode()) > CHANNEL_BYTES:
        raise Refused("BAD_CHANNEL", f"a channel's name has at most {CHANNEL_BYTES} bytes")
    if set(",]") & set(fold(name)) or not all(map(is_solid, name)) or not is_visible(name[1:]):
        raise Refused("BAD_CHANNEL", "a channel's name is visible, without spaces, commas or ]")


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
        """SHA-256 of the peer's certificate, in hex."""
        return hashlib.sha256(self.session.getpeercert(binary_form=True) or b"").hexdigest()


class Budget:
    """Lines a peer may say: `burst` at once, `rate` a second after that (a token bucket)."""

    __slots__ = ("burst", "rate", "stamp", "tokens")

    def __init__(self, burst: float, rate: float, now: float):
        self.burst, self.rate = burst, rate
        self.tokens, self.stamp = burst, now

    def available(self, now: float) -> int:
        self.tokens = min(self.burst, self.tokens + (now - self.stamp) * self.rate)
        self.stamp = now
        return int(self.tokens)

    def spend(self, lines: int) -> None:
        self.tokens -= lines

    def wait(self) -> float:
        """Seconds until there is a whole line to spend again."""
        return max(0.0, (1.0 - self.tokens) / self.rate)


# ======================================================================================
# COMMANDS
# ======================================================================================
# A command is a function with a record on it. To add one, write the function and put
# @table("verb", ...) above it; its docstring is "SYNTAX -- what it does", and the help
# text is made from that. What every command needs is checked in one place, run().


class Command(NamedTuple):
    """What the gate has to know of a command before it may run."""

    verb: str
    handler: Callable
    least: int  # parameters it needs
    most: int  # parameters it takes; the last one takes the rest of the line
    nameless: bool  # may be used before there is a name
    syntax: str
    summary: str


class Commands(dict):
    """The commands of one dialect by verb, and the gate in front of them."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark  # what stands before a verb on the wire

    def __call__(self, verb: str, least: int = 0, most: int | None = None, nameless: bool = False):
        """Decorator: this handler is the command `verb`."""

        def register(handler: Callable) -> Callable:
            if verb in self:
                raise ValueError(f"two handlers for {verb}")
            syntax, summary = handler.__doc__.split(" -- ")
            self[verb] = Command(
                verb, handler, least, least if most is None else most, nameless, syntax, summary
            )
            return handler

        return register

    def run(self, session: "Session", line: str) -> None:
        """The one gate: `line` is a verb and its parameters, without the mark; white space
        around parameters means nothing."""
        verb, _, rest = line.strip().partition(" ")
        command = self.get(verb.lower())
        if command is None:
            text = f"there is no {self.mark}{verb}; {self.mark}help lists what there is"
            raise Refused("UNKNOWN_COMMAND", text)
        if session.user is None and not command.nameless:
            raise Refused("NOT_NAMED", "a name first, please; then commands")
        params = rest.split(None, command.most - 1) if command.most else []
        if len(params) < command.least:
            raise Refused("NEED_MORE_PARAMS", f"it goes like this: {command.syntax}")
        command.handler(session, *params)


# ======================================================================================
# DOMAIN
# ======================================================================================
# Who is here and who may do what. The Hub turns what sessions ask for into events; it
# sends nothing and stores nothing. An audience is anything with
#
#     keys           under which the store keeps the event
#     admit(user)    raise Refused unless this user may speak to it (not of Neighbours)
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
    password: str | None = None


def next_time(last: int, now: int) -> int:
    """Milliseconds for the event after one at `last`: unique up to 1 s ahead of the clock."""
    if now > last:
        return now
    return last + 1 if last < now + 1000 else last


def sessions_by_wire(users: "Iterable[User]") -> "dict[Any, list[Session]]":
    """Their sessions, those together who get the same bytes."""
    found: "dict[Any, list[Session]]" = {}
    for user in users:
        for session in user.sessions:
            found.setdefault(session.wire, []).append(session)
    return found


class User:
    """A person here now. Identity is the object; the name may change."""

    __slots__ = ("channels", "identity", "key", "last_time", "sessions", "source")

    def __init__(self, name: str, address: str, number: int):
        self.source = Source(name, address)
        self.key = fold(name)
        self.identity = f"~{number}"  # of this stay; no channel's key begins like this
        self.sessions: "list[Session]" = []
        self.channels: "dict[Channel, None]" = {}  # in the order of joining
        self.last_time = 0

    @property
    def name(self) -> str:
        return self.source.name


class Membership:
    """What a channel knows of one of its members."""

    __slots__ = ("operator", "since")

    def __init__(self, since: int, operator: bool):
        self.since = since  # id of the event that made it: earlier ones are not shown
        self.operator = operator


class Channel:
    """A room. Without members it ceases to exist; its history stays in the store."""

    __slots__ = (
        "by_wire",
        "former",
        "key",
        "keys",
        "last_time",
        "members",
        "name",
        "topic",
        "topic_locked",
    )

    def __init__(self, name: str, last_time: int):
        self.name, self.key = name, fold(name)
        self.keys = (self.key,)
        self.members: dict[User, Membership] = {}
        self.former: dict[User, list[tuple[int, int]]] = {}  # left in this turn: from id, to id
        self.by_wire: "dict[Any, list[Session]] | None" = None  # of its listeners; None: to be made
        self.topic = ""
        self.topic_locked = self.key != LOBBY  # the lobby has no operators to set one
        self.last_time = last_time

    def admit(self, user: User) -> None:
        if user not in self.members:
            raise Refused("NOT_IN_CHANNEL", f"you are not in {self.name}; /join {self.name} first")

    def stamp(self, now: int) -> int:
        self.last_time = next_time(self.last_time, now)
        return self.last_time

    def listeners(self) -> Iterable[User]:
        return dict.fromkeys([*self.members, *self.former])

    def sessions_by_wire(self) -> "dict[Any, list[Session]]":
        """Kept from turn to turn: nobody comes or goes without Turn.move()."""
        if self.by_wire is None:
            self.by_wire = sessions_by_wire(self.listeners())
        return self.by_wire

    def stays(self, user: User) -> list[tuple[int, float]]:
        stays = self.former.get(user, [])
        member = self.members.get(user)
        return [*stays, (member.since, math.inf)] if member else stays


class Neighbours(NamedTuple):
    """Everyone who shares one of these channels with somebody; each is told once."""

    channels: tuple[Channel, ...]

    @property
    def keys(self) -> Iterator[str]:
        return (channel.key for channel in self.channels)

    def stamp(self, now: int) -> int:
        newest = next_time(max((c.last_time for c in self.channels), default=0), now)
        for channel in self.channels:
            channel.last_time = newest
        return newest

    def listeners(self) -> Iterable[User]:
        return dict.fromkeys(user for channel in self.channels for user in channel.listeners())

    def sessions_by_wire(self) -> "dict[Any, list[Session]]":
        return sessions_by_wire(self.listeners())

    def stays(self, user: User) -> list[tuple[int, float]]:
        return list(itertools.chain(*(channel.stays(user) for channel in self.channels)))


class Conversation(NamedTuple):
    """Two people in private; made by conversation(), so that both directions are one."""

    one: User
    other: User

    @property
    def keys(self) -> tuple[str]:
        return (f"{self.one.identity} {self.other.identity}",)

    def admit(self, user: User) -> None:
        """Whoever can name the other may speak to them."""

    def stamp(self, now: int) -> int:
        newest = next_time(max(self.one.last_time, self.other.last_time), now)
        self.one.last_time = self.other.last_time = newest
        return newest

    def sessions_by_wire(self) -> "dict[Any, list[Session]]":
        return sessions_by_wire({self.one, self.other})

    def stays(self, user: User) -> list[tuple[int, float]]:
        return [(0, math.inf)]


def conversation(one: User, other: User) -> Conversation:
    return Conversation(*sorted((one, other), key=lambda user: user.identity))


def neighbours(user: User) -> Channel | Neighbours:
    """The audience of what somebody does to themselves. One channel stands for itself, so
    that a hundred people leaving it are one audience and not a hundred."""
    channels = tuple(user.channels)
    return channels[0] if len(channels) == 1 else Neighbours(channels)


class Session:
    """One connection's side of the talk. A dialect is a subclass with a wire of its own.

    `conn` offers address, close(), named(), and gone: nothing can be sent there any more.
    """

    __slots__ = ("conn", "replied", "replies", "site", "user")
    wire: Any  # wire.encode(audience, events) -> lines; wire.own(event) -> the origin's line

    def __init__(self, site: Site, conn: Any):
        self.site, self.conn = site, conn
        self.user: User | None = None
        self.replies: list[tuple[int, bytes]] = []  # this turn's: after event id, bytes
        self.replied = 0  # bytes of them

    def receive(self, line: bytes) -> None:
        """One complete line, or TOO_LONG, from the peer."""
        raise NotImplementedError

    def not_kept(self, count: int, reason: str) -> None:
        """Say that `count` of this session's messages were delivered but not stored."""
        raise NotImplementedError

    def notice(self, text: str) -> None:
        """A word of the server's own."""
        raise NotImplementedError

    def ended(self) -> None:
        """The peer is gone, or said that it will send no more. May be called twice."""
        if self.user:
            self.site.hub.leave(self)

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

    __slots__ = ("audience", "by_wire", "events", "lines_by_wire")

    def __init__(self, audience: Any):
        self.audience = audience
        self.by_wire = audience.sessions_by_wire()
        self.events: list[Event] = []
        self.lines_by_wire: dict[Any, list[bytes]] = {}

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


class Turn:
    """The numbered log of one turn, and who is told what of it.

    Most sessions are addressed through one audience and get its joined bytes, the same
    object for all. Those who stand apart (they spoke, came, went, or were answered) and
    those addressed in several ways get the same lines one by one, in the log's order.
    """

    __slots__ = ("apart", "changed", "events", "left", "moved")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.apart: set[Session] = set()
        self.moved: set[User] = set()  # came to or left an audience in this turn
        self.changed: set[Channel] = set()  # where they did
        self.left: dict[Session, User] = {}  # ended; still hear what came before that

    def move(self, user: User, channel: Channel) -> None:
        self.moved.add(user)
        self.changed.add(channel)
        channel.by_wire = None
        self.apart.update(user.sessions)

    def deliveries(self) -> Iterator[tuple[bytes, Iterable[Session]]]:
        """The write beat: bytes, and the sessions that get them; no session comes twice."""
        groups: dict[Any, Group] = {}
        for event in self.events:
            group = groups.get(event.audience)
            if group is None:
                group = groups[event.audience] = Group(event.audience)
            group.events.append(event)
        heard = {session: [] for session in self.apart | self._heard_twice(groups.values())}
        for group in groups.values():
            for wire, sessions in group.by_wire.items():
                yield group.joined(wire), [s for s in sessions if s not in heard]
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
        user, wire = session.user or self.left.get(session), session.wire
        numbered: list[tuple[int, bytes]] = []
        for group in groups:
            pairs = list(zip(group.events, group.lines(wire), strict=True))
            if user in self.moved:
                pairs = [pairs[n] for n in group.heard_by(user)]
            numbered += [(e.id, wire.own(e) if e.origin is session else line) for e, line in pairs]
        if session.replies:
            numbered += session.replies  # behind the event they follow: sort() is stable
        if len(groups) > 1 or session.replies:
            numbered.sort(key=lambda pair: pair[0])
        return b"".join([data for _, data in numbered])

    def not_kept(self, reason: str) -> None:
        """The store could not take this turn's events: their speakers are told so."""
        lost = collections.Counter(e.origin for e in self.events if e.origin and e.kind in SPOKEN)
        for session, count in lost.items():
            session.not_kept(count, reason)

    def close(self) -> None:
        for session in self.apart:
            session.replies, session.replied = [], 0
        for channel in self.changed:
            channel.former.clear()
            channel.by_wire = None
        for session, user in self.left.items():
            user.sessions.remove(session)


class Hub:
    """Who is here. Everything others can see passes through one door: emit()."""

    def __init__(self, last_id: int = 0, last_time: int = 0):
        self.users: dict[str, User] = {}  # by key
        self.channels: dict[str, Channel] = {}  # by key
        self.last_id = last_id  # both from the store: ids and times go on where they stopped
        self.last_time = last_time
        self.now = last_time
        self.turn = Turn()

    def begin(self, now: float) -> None:
        """A turn begins at wall time `now`, in seconds. Ids keep pace with the clock, so
        that they grow even over a restart of a server that keeps nothing."""
        self.now = int(now * 1000)
        self.last_id = max(self.last_id, self.now << 12)

    def end(self) -> None:
        """The turn has been written."""
        self.turn.close()
        self.turn = Turn()

    def emit(self, kind: str, session: Session, audience: Any, text: str = "") -> None:
        """Log one event: `session` did something that `audience` can see."""
        self.last_id += 1
        self.turn.events.append(
            Event(
                self.last_id,
                audience.stamp(self.now),
                kind,
                session.user.source,
                audience,
                text,
                session,
            )
        )
        self.turn.apart.add(session)

    # Coming and going

    def enter(self, session: Session, wanted: str) -> User:
        """A session becomes a user, under `wanted` or the nearest free name."""
        self.last_id += 1
        user = User(self.free_name(wanted), session.conn.address, self.last_id)
        user.last_time = self.last_time
        user.sessions.append(session)
        self.users[user.key] = user
        session.user = user
        return user

    def free_name(self, wanted: str, owner: User | None = None) -> str:
        """`wanted` as the rule for names has it, with a number where somebody else has it."""
        name = clean_name(wanted)
        if not name:
            raise Refused("NO_NAME", "a name needs at least one visible character; try again")
        few, many = range(2, NAMES_COUNTED), iter(lambda: random.randrange(10**6), None)
        numbers = itertools.chain(few, many)  # counting past a thousand guests takes too long
        candidates = itertools.chain([name], (numbered_name(name, n) for n in numbers))
        return next(c for c in candidates if self.users.get(fold(c)) in (None, owner))

    def leave(self, session: Session) -> None:
        """One session ends; its user is gone with the last one."""
        user = session.user
        self.turn.left[session] = user
        self.turn.apart.add(session)
        if all(other in self.turn.left for other in user.sessions):
            self.emit(QUIT, session, neighbours(user))
            for channel in list(user.channels):
                self._remove(user, channel)
            del self.users[user.key]
            self.last_time = max(self.last_time, user.last_time)
        session.user = None

    def join(self, session: Session, name: str) -> Channel:
        """Into the channel `name`, which is founded if need be; its founder operates it."""
        check_channel_name(name)
        user, key = session.user, fold(name)
        channel = self.channels.get(key)
        if channel and channel in user.channels:
            return channel
        if len(user.channels) >= CHANNELS_A_USER:
            raise Refused("TOO_MANY_CHANNELS", f"{CHANNELS_A_USER} channels at most; /part one")
        if channel is None:
            channel = self.channels[key] = Channel(name, self.last_time)
        operator = not channel.members and key != LOBBY
        channel.members[user] = Membership(self.last_id + 1, operator)
        user.channels[channel] = None
        self.turn.move(user, channel)
        self.emit(JOIN, session, channel)
        return channel

    def part(self, session: Session, channel: Channel, reason: str = "") -> None:
        channel.admit(session.user)
        self.emit(PART, session, channel, reason)
        self._remove(session.user, channel)

    def _remove(self, user: User, channel: Channel) -> None:
        """Out of the channel, after the event that says so."""
        self.turn.move(user, channel)
        member = channel.members.pop(user)
        channel.former.setdefault(user, []).append((member.since, self.last_id))
        del user.channels[channel]
        if not channel.members:
            del self.channels[channel.key]
            self.last_time = max(self.last_time, channel.last_time)

    def rename(self, session: Session, wanted: str) -> str:
        """Another name for this session's user; says which one it became."""
        user = session.user
        name = self.free_name(wanted, user)
        if name != user.name:
            self.emit(NICK, session, neighbours(user), name)
            del self.users[user.key]
            user.source, user.key = user.source._replace(name=name), fold(name)
            self.users[user.key] = user
        return name

    # Talking

    def say(self, session: Session, audience: Any, text: str, kind: str = MESSAGE) -> None:
        audience.admit(session.user)
        self.emit(kind, session, audience, text)

    def set_topic(self, session: Session, channel: Channel, topic: str) -> None:
        channel.admit(session.user)
        if channel.topic_locked and not channel.members[session.user].operator:
            raise Refused("NOT_OPERATOR", f"only operators of {channel.name} set its topic")
        if len(topic.encode()) > TOPIC_BYTES:
            raise Refused("TOO_LONG", f"a topic has at most {TOPIC_BYTES} bytes")
        channel.topic = topic
        self.emit(TOPIC, session, channel, topic)

    # Looking

    def find_user(self, name: str) -> User:
        user = self.users.get(fold(name))
        if user is None:
            raise Refused("NO_SUCH_NAME", f"nobody here is called {harmless(name)}")
        return user

    def find_channel(self, name: str) -> Channel:
        channel = self.channels.get(fold(name))
        if channel is None:
            raise Refused("NO_SUCH_CHANNEL", f"there is no channel {harmless(name)} now")
        return channel

    def find_audience(self, session: Session, name: str) -> Channel | Conversation:
        """What `name` means to this session: a channel, or a private talk with somebody."""
        if name.startswith("#"):
            return self.find_channel(name)
        return conversation(session.user, self.find_user(name))


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
)

KEPT, BUSY, LOST = "kept", "busy", "lost"  # what became of a turn's events


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
    """Run the steps that this database has not seen, each in a transaction of its own."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    for number, step in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(
            f"BEGIN; {step}; PRAGMA user_version = {number};"
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


class Store:
    """Events on disk, or in memory for `path` None. Raises Unusable when it cannot open."""

    def __init__(self, path: pathlib.Path | None, keep: int | None = None):
        self.path = path
        self.keep = keep or (KEEP_EVENTS if path else KEEP_EVENTS_IN_MEMORY)
        self.db = open_database(path)
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
        """Where the last server stopped, and what of its history is nobody's any more:
        private talks of people without an account end with their stay, and no stay
        outlives the server."""
        newest = "e.id = (SELECT max(id) FROM events WHERE target = targets.id)"
        joined = f"targets JOIN events e ON e.target = targets.id AND {newest}"
        row = self.db.execute(f"SELECT max(e.id), max(e.time) FROM {joined}").fetchone()
        self.last_id, self.last_time = (value or 0 for value in row)
        self.orphans = {row[0] for row in self.db.execute("SELECT id FROM targets WHERE key > '~'")}

    def commit(self, events: list[Event], now: float) -> str:
        """One transaction for all of a turn's events: KEPT, BUSY (ask again) or LOST."""
        try:
            self._write(events, now)
        except sqlite3.Error as error:
            self._roll_back()
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self.busy_since = now if self.busy_since is None else self.busy_since
                if now - self.busy_since < BUSY_SECONDS:
                    return BUSY
            self.trouble = str(error)
            return LOST
        self.busy_since = None
        self.trouble = ""
        return KEPT

    def _write(self, events: list[Event], now: float) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        rows = [
            (self._target(key), e.id, e.time, e.kind, e.source.name, e.source.address, e.text)
            for e in events
            for key in e.audience.keys
        ]
        self.db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        if now >= self.tally_due:  # not every turn: it is a second page to write
            self.tally_due = now + TALLY_SECONDS
            self._tally()
        self.db.execute("COMMIT")
        self.unsure.clear()
        for row in rows:
            self.counts[row[0]] += 1

    def _tally(self) -> None:
        """Write down how many rows the targets lately written to have, and see which ones
        have too many."""
        counts = [(count, target) for target, count in self.counts.items()]
        self.db.executemany("UPDATE targets SET events = ? WHERE id = ?", counts)
        self.excess.update(target for count, target in counts if count > self.keep)
        if len(self.targets) > TARGETS_CACHED:
            self.targets.clear()
            self.counts.clear()
        if self.path is None:
            self._bound_memory()

    def _bound_memory(self) -> None:
        """In memory, channels that are long gone give way to those that are talked in."""
        pragmas = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self.db.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas)
        if (pages - free) * size > MEMORY_BYTES:
            query = "SELECT target FROM events GROUP BY target ORDER BY max(id) LIMIT 1"
            self.orphans.update(row[0] for row in self.db.execute(query))

    def _target(self, key: str) -> int:
        target = self.targets.get(key)
        if target is not None:
            return target
        row = self.db.execute("SELECT id, events FROM targets WHERE key = ?", [key]).fetchone()
        if row is None:
            row = self.db.execute("INSERT INTO targets (key) VALUES (?)", [key]).lastrowid, 0
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

    # Reading, on whatever thread

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read-only connection for one job; the only one there is, if it is in memory."""
        if self.path is None:
            yield self.db
            return
        with contextlib.closing(connect(self.path, "ro")) as db:
            yield db

    def page(self, key: str, count: int) -> list[Event]:
        """The newest `count` things said to `key`, the oldest first; fewer if they are
        more than PAGE_BYTES long."""
        query = """
            SELECT id, time, kind, name, address, text FROM events
            WHERE target = (SELECT id FROM targets WHERE key = ?) AND kind IN (?, ?)
            ORDER BY id DESC LIMIT ?"""
        with self.reading() as db:
            rows = db.execute(query, [key, *SPOKEN, count]).fetchall()
        sizes = itertools.accumulate(len(row[-1].encode()) for row in rows)
        rows = [row for row, size in zip(rows, sizes, strict=True) if size <= PAGE_BYTES]
        return [
            Event(id, time_ms, kind, Source(name, address), None, text)
            for id, time_ms, kind, name, address, text in reversed(rows)
        ]

    # Housekeeping

    def prune(self, idle: bool) -> bool:
        """Delete one slice of what is over the limits; say whether there is more to do."""
        overdue = (t for t in self.excess if self.counts.get(t, 0) > self.keep * PRUNE_OVERDUE)
        target = next(iter(self.orphans or self.excess) if idle else overdue, None)
        if target is None:
            return False
        try:
            self._delete_oldest(target, 0 if target in self.orphans else self.keep)
        except sqlite3.Error:
            self._roll_back()  # busy or full: the next idle turn tries again
            return False
        return bool(self.orphans or self.excess)

    def _delete_oldest(self, target: int, keep: int) -> None:
        """One slice of what `target` has beyond `keep` rows. With none to keep, the target
        goes when nothing was found, whatever the count says: a crash leaves it too low."""
        excess = self.counts.get(target, 0) - keep if keep else PRUNE_ROWS
        oldest = "SELECT id FROM events WHERE target = ? ORDER BY id LIMIT ?"
        delete = f"DELETE FROM events WHERE target = ? AND id IN ({oldest})"
        count = max(0, min(PRUNE_ROWS, excess))
        self.db.execute("BEGIN IMMEDIATE")
        deleted = self.db.execute(delete, [target, target, count]).rowcount
        if not keep and not deleted:
            self.db.execute("DELETE FROM targets WHERE id = ?", [target])
            self.targets = {key: known for key, known in self.targets.items() if known != target}
        update = "UPDATE targets SET events = max(0, events - ?) WHERE id = ?"
        self.db.execute(update, [deleted, target])
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
        self.db.close()


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
}


def line_prefix(audience: Any) -> str:
    """What tells a line of the lobby from one said elsewhere."""
    if isinstance(audience, Channel):
        return "" if audience.key == LOBBY else f"[{audience.name}] "
    return "(private) " if isinstance(audience, Conversation) else ""


def line_texts(event: Event, prefix: str, where: str = "") -> list[str]:
    """The lines of one event, without their ends. A message of several lines is several."""
    prefixed, shape = LINE_SHAPES[event.kind]
    return [
        (prefix if prefixed else "")
        + shape.format(name=event.source.name, address=event.source.address, where=where, text=text)
        for text in harmless(event.text).split("\n")
    ]


class LineWire:
    """Events as lines of the workshop's protocol."""

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """One bytes object an event; all events have this audience."""
        prefix, where = line_prefix(audience), getattr(audience, "name", "")
        return [
            f"{prefix}{e.source.name}: {e.text}\n".encode()
            if e.kind is MESSAGE and e.text.isprintable()  # all that a storm is made of
            else "".join(f"{line}\n" for line in line_texts(e, prefix, where)).encode()
            for e in events
        ]

    def own(self, event: Event) -> bytes:
        """A speaker hears nothing of what he did: netcat has it on the screen already."""
        return b""


LINE_WIRE = LineWire()
line_command = Commands("/")


def why_renamed(wanted: str, name: str) -> str:
    cleaned = clean_name(wanted)
    if name != cleaned:
        return f"{cleaned} is taken"
    return f"names have no spaces, no control characters, none of {''.join(sorted(NOT_IN_NAMES))}"


class LineSession(Session):
    """Somebody at the line protocol: netcat, a workshop client, our own clients."""

    __slots__ = ("collected", "greeted", "here", "passed", "tries", "wanted_lines")
    wire = LINE_WIRE

    def __init__(self, site: Site, conn: Any, greeted: bool = False):
        super().__init__(site, conn)
        self.greeted = greeted  # by the server: then a person is at the keyboard
        self.here: Channel | None = None  # where plain lines go
        self.passed = site.password is None
        self.tries = 0
        self.wanted_lines = 0  # of a message begun with /lines
        self.collected: list[str] = []

    def tell(self, text: str) -> None:
        """A line of the server's own, to this session only."""
        self.send(f"* {text}\n".encode())

    def notice(self, text: str) -> None:
        self.tell(text)

    def not_kept(self, count: int, reason: str) -> None:
        self.tell(f"{counted(count, 'message')} delivered but not kept: {reason}")

    def receive(self, line: bytes) -> None:
        try:
            text = self.decode(line)
            if self.wanted_lines:
                self.collect(text)
            elif text[:1] == "/" and text[:2] != "//":
                line_command.run(self, text[1:])
            elif self.user is None:
                self.take_name(text)
            else:
                self.say(text[1:] if text[:2] == "//" else text)
        except Refused as refusal:
            self.wanted_lines, self.collected = 0, []  # a message with a bad line is none
            self.tell(str(refusal))

    def decode(self, line: bytes) -> str:
        if line == TOO_LONG:
            raise Refused("TOO_LONG", f"a line has at most {LINE_BYTES} bytes; nobody got it")
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise Refused("NOT_UTF8", "that line is not UTF-8 text; nobody got it") from None

    def say(self, text: str, kind: str = MESSAGE) -> None:
        if self.here is None:
            raise Refused("NOT_IN_CHANNEL", f"you are in no channel; /join {LOBBY}")
        self.site.hub.say(self, self.here, text, kind)

    def take_name(self, wanted: str) -> None:
        """The first line, or another try after an empty one."""
        if not self.passed:
            raise Refused("PASSWORD_NEEDED", "this server asks for a password: /pass WORD")
        user = self.site.hub.enter(self, wanted)
        self.conn.named()
        if user.name != wanted:
            self.tell(f"you are {user.name}: {why_renamed(wanted, user.name)}")
        elif self.greeted:
            self.tell(f"you are {user.name}{self.who_is_here()}; /help")
        self.here = self.site.hub.join(self, LOBBY)

    def who_is_here(self) -> str:
        lobby = self.site.hub.channels.get(LOBBY)
        names = [user.name for user in lobby.members] if lobby else []
        some, others = names[:NAMES_GREETED], len(names) - NAMES_GREETED
        more = f" and {others} more" if others > 0 else ""
        return f"; here: {', '.join(some)}{more}" if names else "; nobody else is here yet"

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
    if name:
        return session.site.hub.find_channel(name)
    if session.here is None:
        raise Refused("NOT_IN_CHANNEL", f"you are in no channel; /join {LOBBY}")
    return session.here


def tell_topic(session: LineSession, channel: Channel) -> None:
    topic = f"is: {harmless(channel.topic)}" if channel.topic else "is not set"
    session.tell(f"the topic of {channel.name} {topic}")


def tell_names(session: LineSession, channel: Channel) -> None:
    """`* #rust 1-3 of 3: @bob, carol, dave`; a crowded channel takes several lines."""
    names = [("@" if m.operator else "") + user.name for user, m in channel.members.items()]
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
    session.tries += 1
    if session.tries >= PASSWORD_TRIES:
        session.conn.close()
    raise Refused("WRONG_PASSWORD", f"that is not it (try {session.tries} of {PASSWORD_TRIES})")


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


@line_command("join", 1)
def line_join(session: LineSession, name: str) -> None:
    """/join #CHANNEL -- enter it, and speak there from now on"""
    channel = session.site.hub.join(session, name)
    session.here = channel
    session.tell(f"you speak in {channel.name} now")
    tell_topic(session, channel)
    tell_names(session, channel)


@line_command("part", most=1)
def line_part(session: LineSession, name: str = "") -> None:
    """/part [#CHANNEL] -- leave it, or the one you speak in"""
    channel = named_channel(session, name)
    session.site.hub.part(session, channel)
    session.tell(f"you left {channel.name}")
    if channel is session.here:
        session.here = next(iter(session.user.channels), None)
        where = f"you speak in {session.here.name} now" if session.here else "you are in no channel"
        session.tell(where)


@line_command("names", most=1)
def line_names(session: LineSession, name: str = "") -> None:
    """/names [#CHANNEL] -- who is in it; @ marks its operators"""
    tell_names(session, named_channel(session, name))


@line_command("list")
def line_list(session: LineSession) -> None:
    """/list -- the channels there are"""
    for channel in session.site.hub.channels.values():
        topic = f": {harmless(channel.topic)}" if channel.topic else ""
        session.tell(f"{channel.name} ({len(channel.members)}){topic}")


@line_command("topic", most=1)
def line_topic(session: LineSession, text: str = "") -> None:
    """/topic [TEXT] -- read or set the topic of the channel you speak in"""
    channel = named_channel(session, "")
    if text:
        session.site.hub.set_topic(session, channel, text)
    tell_topic(session, channel)


@line_command("me", 1)
def line_me(session: LineSession, text: str) -> None:
    """/me TEXT -- say what you do: /me waves"""
    session.say(text, ACTION)


@line_command("nick", 1)
def line_nick(session: LineSession, wanted: str) -> None:
    """/nick NAME -- take another name"""
    name = session.site.hub.rename(session, wanted)
    session.tell(f"you are {name}" + ("" if name == wanted else f": {why_renamed(wanted, name)}"))


@line_command("history", most=2)
def line_history(session: LineSession, *params: str) -> None:
    """/history [#CHANNEL|NAME] [N] -- the last N messages said there"""
    numbers = [whole_number(p) for p in params if p.isdecimal()]
    names = [p for p in params if not p.isdecimal()]
    count = numbers[0] if numbers else HISTORY_LINES
    if not count or count > HISTORY_LINES_MOST:
        raise Refused("BAD_COUNT", f"history comes in 1 to {HISTORY_LINES_MOST} messages")
    if names and not names[0].startswith("#"):
        audience = session.site.hub.find_audience(session, names[0])
    else:
        audience = named_channel(session, names[0] if names else "")
        audience.admit(session.user)
    (key,) = audience.keys
    prefix = line_prefix(audience)

    def show(events: list[Event]) -> None:
        for event in events:
            when = time_text(event.time)
            for text in line_texts(event, prefix):
                session.tell(f"{when} {text}")
        session.tell(f"that was {counted(len(events), 'message')}")

    session.site.later(session, functools.partial(session.site.store.page, key, count), show)


@line_command("lines", 1)
def line_lines(session: LineSession, count: str) -> None:
    """/lines N -- the next N lines are one message"""
    lines = whole_number(count)
    if not lines or lines > MESSAGE_LINES:
        raise Refused("BAD_COUNT", f"a message has 1 to {MESSAGE_LINES} lines")
    session.wanted_lines = lines


@line_command("quit", nameless=True)
def line_quit(session: LineSession) -> None:
    """/quit -- leave"""
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
    "irc": b"ERROR :This server does not speak IRC yet; connect with netcat and type a name\r\n",
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
# talks to: chat.py greets the silent, a plain workshop server waits for a name.

CHAT, PLAIN = "chat.py", "plain"  # the kinds of server this client can talk to

SAID, CAME, WENT, TOLD = "said", "came", "went", "told"
NOTE, STATUS, UP, PEOPLE = "note", "status", "up", "people"


class View(NamedTuple):
    """One thing to show. `line` is how the wire had it, for whoever shows lines."""

    # SAID, CAME, WENT; TOLD by the server; a NOTE of our own; the STATUS of the connection,
    # UP when it stands; PEOPLE when those who are here have changed
    kind: str
    text: str = ""
    name: str = ""
    where: str = LOBBY  # a channel, or "private", or "to NAME"
    time: int | None = None  # milliseconds since 1970; None is now
    mine: bool = False
    line: str = ""


SAID_LINE = re.compile(r"((?:\[(#[^\]]+)\] |\((private)\) )?([^:*][^:]*): (.*))")


def completions(word: str, first: bool, names: Iterable[str], rooms: Iterable[str]) -> list[str]:
    """What a word may become: a command or an address at the start of a line, a channel, a
    name. Names are offered in the order given."""
    if word[:1] == "/" and first:
        return sorted(f"/{verb} " for verb in line_command if verb.startswith(word[1:]))
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


class ClientCore:
    """The line protocol from the client's side.

    Call connected() for each new connection, then feed() with what comes and silence() if
    nothing does; send what take_output() gives. typed() takes what the person wrote, also
    while there is no connection: then it waits. With `tidy`, it asks a server that can
    tell who is here and what was said last.
    """

    def __init__(
        self,
        name: str,
        tidy: bool = True,
        kind: str | None = None,
        password: str = "",
        join: Iterable[str] = (),
    ):
        self.wanted_name = self.name = name
        self.tidy = tidy
        self.password = password
        self.kind = kind  # of server, as far as known
        self.listening = False  # for whether the server speaks first
        self.ready = False  # the name has been sent
        self.refusal = ""  # why the server will not have us
        self.here = next(iter(join := list(join)), LOBBY)  # where plain lines go
        self.rooms: dict[str, dict[str, None]] = {
            room: {} for room in (LOBBY, *join)
        }  # who is where
        self.recent: collections.deque[tuple[str, str]] = collections.deque(
            maxlen=5 * HISTORY_LINES
        )
        self.page: list[View] | None = None  # history asked for by tidy, as it comes
        self.inbox = LineBuffer(LINE_BYTES + 1024)  # a line that somebody said, and who did
        self.output: list[str] = []
        self.waiting: list[tuple[Callable, str]] = []  # what to do once the name is sent

    # The connection

    def connected(self) -> list[View]:
        self.inbox = LineBuffer(self.inbox.limit)
        self.page = None
        self.output.clear()
        self.ready = False
        self.listening = self.kind != PLAIN
        return [] if self.listening else self._introduce()

    def disconnected(self) -> None:
        self.ready = self.listening = False

    def silence(self) -> list[View]:
        """The server let us wait: a workshop server, which wants the name first."""
        if not self.listening:
            return []
        if self.kind == CHAT:
            raise Unusable("this server used to be chat.py and is silent now; --plain talks to it")
        self.kind = PLAIN
        return self._introduce()

    def feed(self, data: bytes) -> list[View]:
        self.inbox.feed(data)
        views = []
        while (raw := self.inbox.take()) is not None:
            if raw == TOO_LONG:
                views.append(View(NOTE, "the server sent a line too long to be shown"))
                continue
            line = harmless(raw.decode(errors="replace")).translate(BIDI_CONTROLS)
            views += self._first(line) if self.listening else self._line(line)
        return views

    def finish(self) -> list[View]:
        """The server has closed: what came after the last newline is a line too."""
        self.inbox.finish()
        return self.feed(b"")

    def take_output(self) -> bytes:
        data = "".join(f"{line}\n" for line in self.output).encode(errors="replace")
        self.output.clear()
        return data

    def _first(self, line: str) -> list[View]:
        if line.startswith(":chat.py/"):
            self.kind = CHAT
            return self._introduce()
        if line.startswith((":", "NOTICE ", "ERROR ")):
            raise Unusable("this is an IRC server, and this client does not speak IRC yet")
        if line.startswith("* "):  # we are being turned away, and told why
            self.refusal = line.removeprefix("* ")
            return [View(TOLD, self.refusal, line=line)]
        if self.kind == CHAT:
            raise Unusable("this server used to be chat.py and is another now; --plain talks to it")
        self.kind = PLAIN
        return [*self._introduce(), *self._line(line)]

    def _introduce(self) -> list[View]:
        """The name, where we were, and what was typed meanwhile."""
        self.listening, self.ready, self.refusal = False, True, ""
        if self.password and self.kind == CHAT:
            self.output.append(f"/pass {self.password}")
        self.output.append(self.wanted_name)
        if self.kind == CHAT:
            others = [room for room in self.rooms if room not in (LOBBY, self.here)]
            last = [self.here] if self.here != LOBBY or others else []  # this is where we speak
            self.output += [f"/join {room}" for room in others + last]
        if self.kind == CHAT and self.tidy:
            self.page = []
            self.output += [f"/history {LOBBY} {HISTORY_LINES}", f"/names {LOBBY}"]
        for room in self.rooms.values():
            room.clear()
        waiting, self.waiting = self.waiting, []
        return list(itertools.chain(*(do(text) for do, text in waiting)))

    # What the person writes

    def typed(self, text: str) -> list[View]:
        """A line or several, as one message. Commands go to a server that knows them."""
        if not self.ready:
            self.waiting.append((self.typed, text))
            return [View(NOTE, f"not connected; to be sent: {text}")]
        is_command = text[:1] == "/" and text[:2] != "//"
        lines = (text[1:] if text[:2] == "//" else text).split("\n")
        if is_command and (self.kind == PLAIN or len(lines) > 1):
            what = (
                "this server knows no commands" if self.kind == PLAIN else "a command is one line"
            )
            return [View(NOTE, f"{what}; // says a line that begins with /; nothing was sent")]
        if len(lines) > MESSAGE_LINES or len(text.encode()) > LINE_BYTES:
            limit = f"a message has at most {MESSAGE_LINES} lines and {LINE_BYTES:,} bytes"
            return [View(NOTE, f"{limit}; nothing was sent")]
        if is_command:
            self.output.append(text)
            return self._echo([f"*{text[4:]}*"]) if text.startswith("/me ") else []
        if self.kind == PLAIN or len(lines) == 1:
            for line in lines:
                self.say(line)
            return self._echo(lines)
        self.output += [f"/lines {len(lines)}", *lines]
        return self._echo(["\n".join(lines)])

    def say(self, line: str) -> list[View]:
        """A line that is text, whatever it begins with: what a pipe sends."""
        if self.ready:
            self.output.append(f"/{line}" if line[:1] == "/" and self.kind != PLAIN else line)
        else:
            self.waiting.append((self.say, line))
        return []

    def _echo(self, texts: list[str]) -> list[View]:
        """The server sends nothing to the speaker, so we show it ourselves."""
        if self.here == LOBBY:
            self.recent += [(self.name, line) for text in texts for line in text.split("\n")]
        return [View(SAID, text, self.name, self.here, mine=True) for text in texts]

    # What the server says

    def _line(self, line: str) -> list[View]:
        for pattern, method in self.plain_patterns if self.kind == PLAIN else self.patterns:
            if match := pattern.fullmatch(line):
                return method(self, *match.groups())
        return [View(TOLD, line.removeprefix("* "), line=line)]

    def _came(self, line: str, where: str | None, name: str) -> list[View]:
        self._is_here(name, where or LOBBY)
        return [View(CAME, name=name, where=where or LOBBY, line=line), View(PEOPLE)]

    def _went(self, line: str, where: str | None, name: str) -> list[View]:
        for room in [self.rooms.get(where, {})] if where else self.rooms.values():
            room.pop(name, None)
        return [View(WENT, name=name, where=where or LOBBY, line=line), View(PEOPLE)]

    def _said(
        self, line: str, channel: str | None, private: str | None, name: str, text: str
    ) -> list[View]:
        where = channel or private or LOBBY
        if where == LOBBY:
            self.recent.append((name, text))
        views = [View(SAID, text, name, where, line=line)]
        if self.kind == PLAIN and name not in self.rooms[LOBBY]:
            self._is_here(name, LOBBY)  # such a server does not tell who was here before
            views.append(View(PEOPLE))
        if name in (room := self.rooms.get(where, {})):
            self.rooms[where] = {name: None, **room}  # who spoke last is completed first
        return views

    def _is_here(self, name: str, where: str) -> None:
        """Somebody is in a channel that we are in. A server may make up as many as it likes."""
        room = self.rooms.get(where)
        if room is not None and len(room) < PEOPLE_LISTED and len(name.encode()) <= NAME_BYTES:
            room[name] = None

    def _history(self, line: str, when: str, rest: str) -> list[View]:
        try:
            moment = datetime.datetime.strptime(when, "%Y-%m-%d %H:%M:%S%z")
        except ValueError:  # a year that no calendar has
            return [View(TOLD, line.removeprefix("* "), line=line)]
        time_ms = int(moment.timestamp()) * 1000
        match = SAID_LINE.fullmatch(rest)
        if match is None:
            return [View(TOLD, rest, time=time_ms, line=line)]
        _, channel, private, name, text = match.groups()
        view = View(SAID, text, name, channel or private or LOBBY, time_ms, line=line)
        if self.page is None:
            return [view]
        self.page.append(view)
        return []

    def _history_end(self, line: str) -> list[View]:
        """After coming back, only what is new: what overlaps with the last screen is not."""
        if self.page is None:
            return []
        page, self.page = self.page, None
        said = [(view.name, view.text) for view in page]
        recent = list(self.recent)
        known = next((n for n in range(len(said), 0, -1) if recent[-n:] == said[:n]), 0)
        self.recent += said[known:]
        return page[known:]

    def _names(self, line: str, where: str, start: str, names: str) -> list[View]:
        if where not in self.rooms:  # asked about from outside
            return [View(TOLD, line.removeprefix("* "), line=line)]
        if start == "1":
            self.rooms[where] = {}
        for name in names.split(", "):
            self._is_here(name.removeprefix("@"), where)
        return [View(PEOPLE, names, where=where, line=line)]

    def _renamed(self, line: str, old: str, new: str) -> list[View]:
        for where, room in self.rooms.items():
            self.rooms[where] = {new if name == old else name: None for name in room}
        return [View(TOLD, f"{old} is now called {new}", line=line), View(PEOPLE)]

    def _refused(self, line: str, text: str) -> list[View]:
        """The password is wrong, or missing. What we sent with it was not heard."""
        self.refusal, self.password = text, ""
        return [View(TOLD, text, line=line)]

    def _let_in(self, line: str) -> list[View]:
        """A person gave the right password when asked: now our name is welcome."""
        return [] if self.password else self._introduce()

    def _you_are(self, line: str, name: str) -> list[View]:
        self._renamed(line, self.name, name)
        self.name = self.wanted_name = name
        return [View(TOLD, line.removeprefix("* "), line=line), View(PEOPLE)]

    def _you_speak_in(self, line: str, where: str) -> list[View]:
        self.here = where
        self.rooms.setdefault(where, {})
        return [View(TOLD, line.removeprefix("* "), line=line), View(PEOPLE)]

    def _you_left(self, line: str, where: str) -> list[View]:
        self.rooms.pop(where, None)
        return [View(TOLD, line.removeprefix("* "), line=line), View(PEOPLE)]

    def _told(self, line: str, name: str, text: str) -> list[View]:
        where = name if name.startswith("#") else f"to {name}"
        return [View(SAID, text, self.name, where, mine=True, line=line)]

    patterns = tuple(  # tried in this order; the first group is the whole line
        (re.compile(pattern), method)
        for pattern, method in (
            (r"((?:\[(#[^\]]+)\] )?([^:*][^:]*) \(\S+\) joined the chat!)", _came),
            (r"((?:\[(#[^\]]+)\] )?([^:*][^:]*) \(\S+\) left the chat!)", _went),
            (r"(\* (\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ) (.*))", _history),
            (r"(\* that was [\d,]+ messages?)", _history_end),
            (r"(\* (#\S+) (\d+)-\d+ of \d+: (.*))", _names),
            (r"(\* (\S+) is now called (\S+))", _renamed),
            (r"(\* you are (\S+?)(?:[:;] .*)?)", _you_are),
            (r"(\* you speak in (#\S+) now)", _you_speak_in),
            (r"(\* you left (#\S+))", _you_left),
            (r"(\* (this server asks for a password.*|that is not it.*))", _refused),
            (r"(\* thank you; now your name)", _let_in),
            (r"(\* told (\S+): (.*))", _told),
            (SAID_LINE, _said),
        )
    )
    # Where anybody may be called anything, a line that begins "* " is no answer.
    plain_patterns = (*patterns[:2], patterns[-1])


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
    end of the turn, in one piece.
    """

    __slots__ = ("eof", "loop", "mask", "queue", "sealed", "sock", "state", "tls")
    hears_out = False  # after close(): take what still comes, for as long as it comes

    def __init__(self, loop: "Loop", sock: socket.socket):
        sock.setblocking(False)
        self.loop, self.sock = loop, sock
        self.queue = SendQueue()
        self.tls: TlsFilter | None = None
        self.sealed = b""  # encrypted, not yet sent
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
            self.queue.append(data)
            self.loop.dirty.add(self)

    def write_now(self, data: bytes) -> None:
        """The same without the detour, for who has all of this turn's bytes in hand."""
        if self.queue.size or self.tls is not None or self.state != OPEN:
            return self.write(data)
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            return self._bury(reason_of(error))
        if sent < len(data):
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
        if self.unsent or self.mask != READ or self.state != OPEN:
            self._flushed()

    def _flushed(self) -> None:
        """What is not the common case: something is left, or was, or it is the end."""
        self.lagging()
        if self.state == CLOSING and not self.unsent:
            self._hang_up()
        self.update()

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
        self.queue.clear()
        self.loop.linger.discard(self)
        self.loop.dirty.discard(self)
        self.loop.graves.append(self.sock)
        self.lost(reason)


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
    flood: tuple[float, float] | None = (FLOOD_BURST, FLOOD_RATE)
    max_clients: int | None = None  # None: what the descriptor limit allows
    max_per_address: int = PER_ADDRESS


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Peer(Connection):
    """A connection as the server sees it; what a session knows as its conn."""

    __slots__ = (
        "address",
        "budget",
        "greeted",
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
        self.greeted = False
        self.held = False  # its lines wait for an answer ...
        self.resuming = False  # ... or for resume(), which is on its way
        self.leaving = False  # its lines are not taken any more

    # What a session may do with its conn

    def named(self) -> None:
        """The session has a name: no more hurry."""
        self.server.unnamed.discard(self)

    @property
    def gone(self) -> bool:
        return self.state == CLOSED

    def close(self) -> None:
        """Leave. The connection is closed behind the last thing that this turn gives it."""
        if not self.leaving:
            self.leaving = True
            if self.inbox:
                self.inbox.lines.clear()
            if self.session:
                self.session.ended()
            self.server.leaving.append(self)

    # What the network does to it

    def wants_read(self) -> bool:
        waits = self.held or self.leaving or bool(self.inbox and self.inbox.lines)
        return not waits and self.unsent <= UNSENT_NO_READ

    def ready(self, mask: int) -> None:
        # Lines that wait have a resume() on its way: enough to do. Telling the selector so
        # would cost two system calls a turn in every storm.
        super().ready(mask if self.wants_read() or self.state != OPEN else mask & ~READ)

    def received(self, data: bytes) -> None:
        if self.inbox is None:
            self.server.silent.discard(self)
            if self.tls is None and TLS_FIRST_BYTES.startswith(data[:2]):
                return self.server.start_tls(self, data)
            self.inbox = LineBuffer(LINE_BYTES)
            self.budget = self.server.new_budget()
        self.inbox.feed(data)
        self.server.act(self)

    def secured(self) -> None:
        self.server.silent.add(self)

    def ended(self) -> None:
        if self.inbox is None:
            return self.close()
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
        if self.server.turn_away_on_spare(self.sock):
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


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


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


def server_tls_context(options: ServerOptions) -> Any:
    if not options.tls_cert:
        if options.tls_key:
            raise Unusable("--tls-key is of no use without --tls-cert")
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"cannot use the certificate {options.tls_cert}: {error}") from error
    return context


class Server:
    """Everything of one running server."""

    def __init__(self, loop: Loop, options: ServerOptions):
        self.loop, self.options = loop, options
        self.tls_context = server_tls_context(options)
        path = options.data / "chat.db" if options.data else None
        self.store = Store(path, options.keep)
        self.hub = Hub(self.store.last_id, self.store.last_time)
        self.site = Site(self.hub, self.store, self.later, options.password)
        self.helpers = Helpers(loop)
        self.peers: set[Peer] = set()
        self.per_address: collections.Counter[str] = collections.Counter()
        room = max(descriptor_limit() - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)
        self.max_clients = options.max_clients or room
        self.silent = Delay(loop, GREETING_SECONDS, self.greet)
        self.unnamed = Delay(loop, NAMING_SECONDS, self.evict)
        self.slow = Delay(loop, SLOW_SECONDS, self.drop_slow)
        self.leaving: list[Peer] = []  # to be closed once this turn is written
        self.jobs: list[tuple[str, Callable, Callable]] = []  # for helpers, after the commit
        self.spare = spare_descriptor()
        self.losing = False  # the store is; it has been logged
        self.checkpoint_due = False
        self.stopping = False
        self.listeners = [Listener(self, *address) for address in options.listen]
        loop.turn_begins = self.begin_turn
        loop.turn_ends = self.end_turn

    # Coming

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """A connection has been accepted: it becomes a peer, or is told why not."""
        if len(self.peers) >= self.max_clients:
            return self.turn_away(sock, host, f"this server is full: {self.max_clients} clients")
        if self.per_address[host] >= self.options.max_per_address and not is_loopback(host):
            text = f"too many connections from {host}: {self.options.max_per_address} at most"
            return self.turn_away(sock, host, f"{text} (--max-per-address)")
        peer = Peer(self, sock, host, port)
        self.peers.add(peer)
        self.per_address[host] += 1
        self.silent.add(peer)
        self.unnamed.add(peer)

    def turn_away(self, sock: socket.socket, host: str, text: str) -> None:
        log.warning("%s turned away: %s", host, text)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(f"* {text}; try again later\n".encode())
        sock.close()

    def turn_away_on_spare(self, listening: socket.socket) -> bool:
        """Tell everybody in the backlog that there is no room; whether that went well."""
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

    def greet(self, peer: Peer) -> None:
        peer.greeted = True
        peer.write(GREETING)

    def evict(self, peer: Peer) -> None:
        peer.write(
            f"* no name after {NAMING_SECONDS:.0f} seconds; come back when you have one\n".encode()
        )
        peer.close()

    def start_tls(self, peer: Peer, data: bytes) -> None:
        if self.tls_context is None:
            log.info("%s speaks TLS, and there is no certificate (--tls-cert)", peer.address)
            return peer.drop("no TLS here")
        peer.tls = TlsFilter(self.tls_context)
        peer.arrived(data)

    def new_budget(self) -> Budget | None:
        return Budget(*self.options.flood, self.loop.now) if self.options.flood else None

    # The act beat

    def act(self, peer: Peer) -> None:
        """Some lines of one peer become Hub calls; then see when to take the next."""
        budget, inbox = peer.budget, peer.inbox
        if peer.resuming or peer.held or peer.leaving:
            return
        allowed = LINES_A_TURN
        if budget:
            allowed = min(allowed, budget.available(self.loop.now))
        taken = 0
        while taken < allowed and not peer.held and not peer.leaving and not self.too_much(peer):
            line = inbox.take()
            if line is None:
                break
            taken += 1
            if peer.session or self.open_session(peer, line):
                peer.session.receive(line)
        if budget:
            budget.spend(taken)
        if inbox.lines and not peer.held:
            self.postpone(peer)
        elif peer.eof and not inbox.lines and not peer.held:
            peer.close()

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
        peer.session = LineSession(self.site, peer, peer.greeted)
        return True

    def later(self, session: Session, job: Callable, then: Callable) -> None:
        """Run job() on a helper once this turn is committed, then then(its result) here;
        until then this session's next lines wait, so that answers come in order."""
        peer = session.conn
        peer.held = True
        peer.update()

        def done(result: Any) -> None:
            peer.held = False
            peer.resume_soon()
            if peer.gone or peer.leaving:
                return
            if isinstance(result, Exception):
                log.error("a job for %s failed: %s", peer.address, result)
                session.notice("that cannot be answered just now; try again later")
            else:
                then(result)

        self.jobs.append((peer.host, job, done))

    # The commit and the write beat

    def begin_turn(self) -> None:
        self.hub.begin(time.time())

    def end_turn(self) -> None:
        turn = self.hub.turn
        if turn.events and not self.commit(turn):
            return
        if turn.apart:  # whoever did something, or was answered
            try:
                self.deliver(turn)
            finally:
                self.hub.end()
        if self.leaving or self.jobs:
            self._after_writing()
        if self.store.excess or self.store.orphans:
            self.prune(idle=not turn.events)

    def deliver(self, turn: Turn) -> None:
        for data, sessions in turn.deliveries():
            for session in sessions:
                session.conn.write_now(data)

    def commit(self, turn: Turn) -> bool:
        """The turn's events are stored, or never will be; False: not yet."""
        outcome = self.store.commit(turn.events, self.loop.now)
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
        return True

    def _after_writing(self) -> None:
        leaving, self.leaving = self.leaving, []
        for peer in leaving:
            if peer.gone:
                self.forget(peer)
            else:
                Connection.close(peer)
        jobs, self.jobs = self.jobs, []
        for owner, job, done in jobs:
            if self.store.path:
                self.helpers.submit(owner, job, done)
            else:  # one connection, in memory: nothing to wait for, and nothing to share
                self.loop.call_soon(functools.partial(self._answer, job, done))

    def _answer(self, job: Callable, done: Callable) -> None:
        done(attempt(job))

    def prune(self, idle: bool) -> None:
        if self.store.prune(idle) and idle:
            self.loop.call_soon(do_nothing)  # and another slice in the next turn

    def checkpoint(self) -> None:
        def done(error: Exception | None) -> None:
            self.checkpoint_due = False
            if error and not self.losing:
                log.error("checkpoint: %s", error)

        self.helpers.submit(self, self.store.checkpoint, done)

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
        for delay in (self.silent, self.unnamed, self.slow):
            delay.discard(peer)
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
        self.per_address[peer.host] -= 1
        if not self.per_address[peer.host]:
            del self.per_address[peer.host]
        if peer.session:
            peer.session.ended()
        if self.stopping and not self.peers:
            self.loop.stop()

    def drop_slow(self, peer: Peer) -> None:
        log.warning("%s reads too slowly: %s bytes unsent", peer.address, f"{peer.unsent:,}")
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
                peer.session.notice("the server is going down")
                peer.session.abandoned()
            peer.close()
        self.loop.call_later(STOP_SECONDS, self.loop.stop)
        if not self.peers:
            self.loop.stop()

    def close(self) -> None:
        """After the loop has ended: what is left goes to the store."""
        if self.hub.turn.events:
            self.store.commit(self.hub.turn.events, self.loop.now)
        self.helpers.close()
        self.store.close()
        if self.spare is not None:
            os.close(self.spare)


# ======================================================================================
# LINK
# ======================================================================================
# A client's connection, kept up: look the server up, connect, listen whether it speaks
# first, introduce ourselves, and when the line breaks do it all again, ever less eagerly.


class Target(NamedTuple):
    """Where a client wants to go."""

    host: str
    port: int
    tls: bool = False
    plain: bool = False  # the line protocol for certain: no need to listen first

    def __str__(self) -> str:
        return address_text(self.host, self.port)


TARGET = re.compile(r"(?:(\w+)://)?(\[[^\]]+\]|[^:/\[\]]+)?(?::(\d+))?/?")


def parse_target(text: str, plain: bool = False) -> Target:
    """HOST, HOST:PORT, [IPV6]:PORT or a URL chat://... (chats://... with TLS) as a Target."""
    match = TARGET.fullmatch(text.strip())
    scheme, host, port = match.groups() if match else ("?", "", "")
    if scheme in ("irc", "ircs"):
        raise Unusable(f"{text}: this client does not speak IRC yet")
    if scheme not in (None, "chat", "chats") or int(port or 0) > 65535:
        raise Unusable(f"{text} is not a server's address; write HOST:PORT or chat://HOST:PORT")
    number = int(port) if port else DEFAULT_PORT
    tls, host = scheme == "chats", (host or DEFAULT_HOST).strip("[]")
    return Target(host, number, tls, plain or scheme == "chat")


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
        return not self.pin or self.pin.replace(":", "").lower() == fingerprint


BELIEVE_THE_SYSTEM = Trust()


class KnownServers:
    """What kind of server answered at an address, remembered in a file (None: nowhere)."""

    def __init__(self, path: pathlib.Path | None):
        self.path = path

    def _read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}  # none yet, or damaged: it is only a memory

    def kind(self, target: Target) -> str | None:
        return self._read().get(str(target)) if self.path else None

    def remember(self, target: Target, kind: str) -> None:
        if self.path is None or self.kind(target) == kind:
            return
        known = {**self._read(), str(target): kind}
        with contextlib.suppress(OSError):  # we can live without
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = self.path.with_suffix(".new")
            written.write_text(json.dumps(known, indent=1))
            written.replace(self.path)


UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))


class Connecting:
    """A socket on its way to being connected; then(sock, "") or then(None, reason)."""

    def __init__(self, loop: Loop, sock: socket.socket, address: tuple, then: Callable):
        self.loop, self.then, self.sock = loop, then, sock
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
            return self.then(None, reason)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.then(self.sock, "")


class ServerConnection(Connection):
    """The connection of a Link; reads to the server's end even after we said all."""

    __slots__ = ("link",)
    hears_out = True

    def __init__(self, link: "Link", sock: socket.socket):
        super().__init__(link.loop, sock)
        self.link = link

    def received(self, data: bytes) -> None:
        self.link.received(data)

    def secured(self) -> None:
        self.link.secured()

    def lost(self, reason: str) -> None:
        self.link.lost(reason)

    def lagging(self) -> None:
        if self.link.has_room():
            self.link.drained()


class Link:
    """One client core, connected to its server whenever that can be.

    `show(views)` gets what there is to show, `over(reason)` is called once at the end:
    with "" after leave(), else with the reason why there is no going on. `drained()` may
    be replaced by who wants to know when has_room() has become true.
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
        retry: bool = True,
    ):
        self.loop, self.target, self.core = loop, target, core
        self.show, self.over, self.trust, self.retry = show, over, trust, retry
        self.known = known or KnownServers(None)
        self.helpers = Helpers(loop)
        self.conn: ServerConnection | None = None
        self.addresses: list[tuple] = []  # still to be tried
        self.backoff = BACKOFF_FIRST
        self.began = 0.0  # when connecting did, then when it was done
        self.timer: Timer | None = None  # the one wait that is going on
        self.leaving = False
        self.drained: Callable = do_nothing
        core.kind = PLAIN if target.plain else self.known.kind(target)

    def start(self) -> None:
        self.status(f"connecting to {self.target}")
        look_up = functools.partial(
            socket.getaddrinfo, self.target.host, self.target.port, type=socket.SOCK_STREAM
        )
        self.helpers.submit(self, look_up, self._found)

    def status(self, text: str) -> None:
        self.show([View(STATUS, text)])

    def typed(self, text: str) -> None:
        """What the person wrote."""
        self.show(self.core.typed(text))
        self.flush()

    def say(self, line: str) -> None:
        """What a pipe wrote."""
        self.core.say(line)
        self.flush()

    def leave(self) -> None:
        """Say what is left to be said, hear the server out, and end."""
        self.leaving = True
        if self.conn and self.core.ready:
            self.conn.close()
        elif self.conn is None and self.retry:
            self._end("")  # a person need not wait for a server that is not there

    def flush(self) -> None:
        if self.conn and (data := self.core.take_output()):
            self.conn.write(data)

    def has_room(self) -> bool:
        """Whether what is said now goes out soon; if not, drained() is called when it does."""
        return self.conn is not None and self.core.ready and self.conn.unsent <= UNSENT_NO_READ

    # Connecting

    def _found(self, result: Any) -> None:
        if isinstance(result, Exception):  # UnicodeError: no name of a host looks like that
            reason = reason_of(result) if isinstance(result, OSError) else "no name of a host"
            return self.lost(reason)
        self.addresses = [(family, address) for family, *_, address in result]
        self.began = self.loop.now
        self._try_next("no address")

    def _try_next(self, reason: str) -> None:
        if not self.addresses:
            return self.lost(reason)
        family, address = self.addresses.pop(0)
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:  # IPv6 is switched off, say
            return self._try_next(reason_of(error))
        Connecting(self.loop, sock, address, self._tried)

    def _tried(self, sock: socket.socket | None, reason: str) -> None:
        if sock is None:
            return self._try_next(reason)
        self.conn = ServerConnection(self, sock)
        if self.target.tls:
            try:
                self.conn.tls = TlsFilter(self.trust.context(), self.target.host)
            except OSError as error:
                return self._fail(f"cannot use the certificates {self.trust.ca}: {error}")
            self.loop.dirty.add(self.conn)
            self.timer = self.loop.call_later(CONNECT_SECONDS, self._no_handshake)
        else:
            self._connected()

    def _no_handshake(self) -> None:
        self.conn.drop("no answer in TLS")

    def secured(self) -> None:
        self.timer.cancel()
        fingerprint = self.conn.tls.fingerprint()
        if not self.trust.accepts(fingerprint):
            return self._fail(f"{self.target} has another certificate: {fingerprint}")
        self._connected()

    def _connected(self) -> None:
        took = self.loop.now - self.began
        self.began = self.loop.now
        self.show([View(UP, f"connected to {self.target}")])
        views = self.core.connected()
        if self.core.listening:
            usual = max(LISTEN_SECONDS, LISTEN_CONNECT_TIMES * took)
            patience = LISTEN_KNOWN_SECONDS if self.core.kind == CHAT else usual
            self.timer = self.loop.call_later(patience, self._silence)
        self._carry_on(views)

    def _silence(self) -> None:
        try:
            self._carry_on(self.core.silence())
        except Unusable as error:
            self._fail(str(error))

    def received(self, data: bytes) -> None:
        try:
            self._carry_on(self.core.feed(data))
        except Unusable as error:
            self._fail(str(error))

    def _carry_on(self, views: list[View]) -> None:
        """After anything that may have moved the core on."""
        self.show(views)
        self.flush()
        if self.core.ready:
            self.known.remember(self.target, self.core.kind)
            self.drained()
            if self.leaving:
                self.conn.close()

    # Ending

    def lost(self, reason: str) -> None:
        """The line is broken, or could not be had."""
        self.conn = None
        if self.timer:
            self.timer.cancel()
        self._hear_the_rest()
        heard_out = reason == HUNG_UP and self.core.ready and not self.core.refusal
        self.core.disconnected()
        if reason.startswith(TLS_TROUBLE):
            advice = "--ca, --pin or --insecure if you know better"
            self._end(f"{self.target} is not to be trusted: {reason}; {advice}")
        elif self.leaving:
            self._end("" if heard_out else f"{self.target}: {self.core.refusal or reason}")
        elif self.retry:
            self._come_back(reason)
        else:
            self._end(f"{self.target}: {self.core.refusal or reason}")

    def _hear_the_rest(self) -> None:
        """A last line without its end."""
        if self.core.ready or self.core.listening:
            try:
                self.show(self.core.finish())
            except Unusable as error:
                self.retry = False
                self.core.refusal = str(error)

    def _come_back(self, reason: str) -> None:
        if self.loop.now - self.began > BACKOFF_RESET:
            self.backoff = BACKOFF_FIRST
        wait = self.backoff * random.uniform(0.75, 1.25)  # so that not all come back at once
        self.backoff = min(BACKOFF_MOST, self.backoff * 2)
        self.status(f"{self.target}: {reason}; trying again in {wait:.1f} s")
        self.timer = self.loop.call_later(wait, self.start)

    def _fail(self, reason: str) -> None:
        """There is no point in trying again."""
        self.leaving = True
        self._end(reason)
        self.conn.drop(reason)

    def _end(self, reason: str) -> None:
        over, self.over = self.over, do_nothing
        over(reason)


# ======================================================================================
# TERMINAL
# ======================================================================================
# Keys in, a line out, and a picture of it between. All of it is pure but RawTerminal at
# the end. To add a key, give its bytes a name in KEY_NAMES and the name a method in
# LineEditor.KEYS. The sequences are those of xterm, which every terminal imitates.
#
# What is on the screen: everything that was said, scrolling as terminals scroll, and
# under it one row with the line being typed. New text is written over that row, and the
# row is drawn again below it, in one write.


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
}
SEQUENCE = re.compile(
    r"\x1b\[[0-9;?<=>]*[ -/]*[@-~]"  # CSI, parameters, intermediates, final byte (ECMA-48 5.4)
    r"|\x1bO[ -~]"  # SS3
    r"|\x1b[^\[O\x1b]"  # Alt and a key
)
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


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
        if not self.rest[0].isprintable():
            return self._named(self.rest[0])
        text = "".join(itertools.takewhile(str.isprintable, self.rest))
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


ZWJ = "\u200d"  # zero width joiner: makes one emoji of several
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
    return sum(map(cluster_width, clusters(text)))


WORD = re.compile(r"\W*\w*")
SECRETS = ("/pass ",)  # commands whose parameters are nobody's business


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
        if text.strip() and text != (self.typed[-1] if self.typed else "") and not is_secret(text):
            self.typed.append(text)
        self.recalled = 0
        self.set("")
        return text

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


def visible(text: str) -> str:
    """A line with its newlines and tabs shown as symbols, so that it stays one row."""
    return text.replace("\n", "\u23ce").replace("\t", " ")


class Painter:
    """Draws one row: the prompt, and as much of the line as there is room for."""

    def __init__(self, columns: int = 80):
        self.columns = columns

    def row(self, prompt: str, before: str, after: str) -> str:
        """Everything from the left margin on; the cursor ends where it belongs. Its column
        is set by number and not by counting back, so that a terminal which disagrees about
        a width spoils the look and nothing else."""
        prompt = "".join(self._fit(clusters(prompt), self.columns // 2)[0])
        room = max(4, self.columns - width(prompt) - 1)
        shown, used = self._fit(reversed(clusters(visible(before[-room * 8 :]))), room)
        shown.reverse()
        rest, _ = self._fit(clusters(visible(after[: room * 8])), room - used)
        column = width(prompt) + used
        return f"\r\x1b[K{prompt}{''.join(shown)}{''.join(rest)}\r" + (
            f"\x1b[{column}C" if column else ""
        )

    def _fit(self, parts: Iterable[str], room: int) -> tuple[list[str], int]:
        """As many of these clusters as fit, and the columns they take."""
        chosen, used = [], 0
        for part in parts:
            if used + cluster_width(part) > room:
                break
            chosen.append(part)
            used += cluster_width(part)
        return chosen, used

    def above(self, lines: Iterable[str]) -> str:
        """Lines that take the place of the row, which is to be drawn again below them."""
        return "\r\x1b[K" + "".join(f"{line}\n" for line in lines)


class Palette:
    """Colours as escape sequences, or nothing at all."""

    NAMES = (31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96)  # legible on dark and on light

    def __init__(self, on: bool):
        self.on = on

    def paint(self, text: str, *codes: int) -> str:
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self.on else text

    def name(self, name: str) -> str:
        """A person's name in that person's colour, the same on every screen."""
        return self.paint(name, self.NAMES[zlib.crc32(fold(name).encode()) % len(self.NAMES)])

    def dim(self, text: str) -> str:
        return self.paint(text, 2)


def view_lines(view: View, palette: Palette, my_name: str, clock: str) -> list[str]:
    """One view as lines for a terminal; `clock` is the time to show before it."""
    clock = palette.dim(clock)
    if view.kind == SAID:
        elsewhere = f"({view.where}) " if view.where[:1] != "#" else f"[{view.where}] "
        before = "" if view.where == LOBBY else palette.dim(elsewhere)
        called = not view.mine and calls(view.text, my_name)
        lines = (palette.paint(line, 1) if called else line for line in view.text.split("\n"))
        return [f"{clock} {before}{palette.name(view.name)}: {line}" for line in lines]
    if view.kind in (CAME, WENT):
        where = "" if view.where == LOBBY else f" {view.where}"
        verb = "joined" if view.kind == CAME else "left"
        return [palette.dim(f"{clock} {view.name} {verb}{where}")]
    if view.kind == PEOPLE:
        return [palette.dim(f"{clock} in {view.where}: {view.text}")] if view.text else []
    return [palette.dim(f"{clock} {view.text}")]


class RawTerminal:
    """The terminal while we have it: keys as they come, everything put back at the end."""

    ON, OFF = "\x1b[?2004h", "\x1b[?2004l\x1b[0m\x1b[?25h"  # bracketed paste; colours, cursor

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

    def columns(self) -> int:
        try:
            return os.get_terminal_size(self.screen).columns or 80
        except OSError:
            return 80


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


class Client:
    """What both clients share: a loop, a link, and an end with a reason."""

    retry = tidy = True

    def __init__(self, options: ClientOptions):
        self.loop = Loop()
        core = ClientCore(options.name, self.tidy, password=options.password, join=options.join)
        known = KnownServers(options.state / "servers.json" if options.state else None)
        self.link = Link(
            self.loop, options.target, core, self.show, self.over, options.trust, known, self.retry
        )
        self.core = core
        self.reason = ""

    def show(self, views: list[View]) -> None:
        raise NotImplementedError

    def over(self, reason: str) -> None:
        self.reason = reason
        self.loop.stop()

    def run(self) -> str:
        """Until the end; says why it was one, or ""."""
        self.link.start()
        self.loop.run()
        return self.reason


class Filter(Client):
    """Lines in, lines out, for pipes: it ends when its input does, and the server agrees."""

    retry = tidy = False

    def __init__(self, options: ClientOptions):
        super().__init__(options)
        self.lines = LineBuffer(LINE_BYTES)
        self.failure = ""  # of something, although the rest went well
        sys.stdout.reconfigure(errors="replace")
        self.speak = self.link.typed if options.commands else self.link.say
        self.input = Input(self.loop, 0, self.take)
        self.link.drained = self.input.resume

    def take(self, data: bytes) -> None:
        if data:
            self.lines.feed(data)
        else:
            self.lines.finish()
        while (line := self.lines.take()) is not None:
            if line == TOO_LONG:
                self.failure = f"a line has at most {LINE_BYTES:,} bytes: it was not sent"
            else:
                self.speak(line.decode(errors="replace"))
        if not data:
            self.link.leave()
        elif not self.link.has_room():
            self.input.pause()

    def show(self, views: list[View]) -> None:
        lines = [
            f"> {v.line}\n" if v.line else f"{v.text}\n" for v in views if v.line or v.kind == UP
        ]
        try:
            sys.stdout.write("".join(lines))
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again at its end
            gone = isinstance(error, BrokenPipeError)  # whoever read us has read enough
            self.over("" if gone else f"standard output: {reason_of(error)}")

    def over(self, reason: str) -> None:
        super().over(reason or self.failure)


def on_signal(loop: Loop, name: str, callback: Callable[[], Any]) -> None:
    """Call back on the loop when the signal of that name comes; not every system has each."""
    if number := getattr(signal, name, None):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback))


class TerminalClient(Client):
    """A line to type on, and above it what everybody says."""

    def __init__(self, options: ClientOptions):
        super().__init__(options)
        self.terminal = RawTerminal()
        self.painter = Painter(self.terminal.columns())
        self.palette = Palette("NO_COLOR" not in os.environ)
        self.decoder = KeyDecoder()
        self.editor = LineEditor(self.complete)
        self.lines: list[str] = []  # to be shown at the next painting
        self.stale = True  # the row is not what it should be
        self.painted = 0.0
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
        atexit.register(self.terminal.leave)
        self.terminal.enter()
        try:
            return super().run()
        finally:
            self.paint(everything=True)
            self.terminal.leave()

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
            text = self.editor.press(key)
            if key.name == "redraw":
                self.terminal.write("\x1b[2J\x1b[H")
            elif text is not None and is_quit(text):
                self.leave()
            elif text:  # return on an empty row is no message, as it is from netcat
                self.link.typed(text)
        if self.editor.left:
            self.leave()
        self.stale = True

    def leave(self) -> None:
        """The server hears us out, for as long as that is bearable."""
        self.loop.call_later(STOP_SECONDS, lambda: self.over(""))
        self.link.leave()

    def interrupt(self) -> None:
        """Ctrl-C: forget the line; without one, leave."""
        if not self.editor.text:
            return self.leave()
        self.editor.set("")
        self.stale = True

    def complete(self, word: str, first: bool) -> list[str]:
        core = self.core
        names = [name for name in core.rooms.get(core.here, ()) if name != core.name]
        return completions(word, first, names, core.rooms)

    # What is shown

    def show(self, views: list[View]) -> None:
        for view in views:
            moment = time.time() if view.time is None else view.time / 1000
            clock = time.strftime("%H:%M", time.localtime(moment))
            self.lines += view_lines(view, self.palette, self.core.name, clock)

    def prompt(self) -> str:
        where = "" if self.core.here == LOBBY else f"{self.core.here} "
        return f"{where}{self.core.name}> "

    def paint(self, everything: bool = False) -> None:
        """All that is new and the row under it, in one write; not more often than it can
        be seen."""
        if not (self.lines or self.stale or everything) or not self.terminal.raw:
            return
        wait = self.painted + 1 / PAINTS_A_SECOND - self.loop.now
        if wait > 0 and not everything:
            self.loop.call_later(wait, do_nothing)
            return
        lines, self.lines = self.lines, []
        row = self.painter.row(self.prompt(), self.editor.before, self.editor.after)
        self.stale = False
        self.painted = self.loop.now
        try:
            self.terminal.write((self.painter.above(lines) if lines else "") + row)
        except OSError:
            self.over("")

    # What the shell wants

    def resize(self) -> None:
        self.painter.columns = self.terminal.columns()
        self.stale = True

    def suspend(self) -> None:
        """Ctrl-Z: give the terminal back, stop, and take it again when we are continued."""
        self.terminal.leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        on_signal(self.loop, "SIGTSTP", self.suspend)
        self.terminal.enter()
        self.resize()


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
        self.receivers = [self._connect(f"r{n}") for n in range(options.clients)]
        self.senders = [self._connect(f"s{n}") for n in range(options.senders)]
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
            yield parse_target(match.group(1), plain=True)
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


def listen_address(text: str) -> tuple[str, int]:
    try:
        target = parse_target(text, plain=True)
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


def secret_option(text: str) -> str:
    """A password as it is, or @FILE that holds it, or "" to be asked for it."""
    if not text:
        import getpass

        return getpass.getpass("password: ")
    if not text.startswith("@"):
        return text
    try:
        return pathlib.Path(text[1:]).read_text().strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[1:]}: {reason_of(error)}") from None


def lock_folder(folder: pathlib.Path) -> int:
    """The data folder, made if need be, for this process alone. Raises Unusable."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unusable(f"another server uses {folder}; stop it, or choose another --data") from None
    except OSError as error:
        advice = "choose another --data, or --data none to keep nothing"
        raise Unusable(f"cannot use {folder}: {reason_of(error)}; {advice}") from error
    return lock


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
    ]
    return "\n".join(lines)


def run_server(args: argparse.Namespace) -> int:
    logging.basicConfig(level=args.log.upper(), format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    lock = lock_folder(args.data) if args.data else None
    names = set(ServerOptions._fields) - {"listen"}
    listen = tuple(args.listen or ServerOptions().listen)
    loop = Loop()
    server = Server(loop, ServerOptions(listen, **{name: getattr(args, name) for name in names}))
    for name in ("SIGINT", "SIGTERM"):
        on_signal(loop, name, server.stop)
    print(how_to_join(server), flush=True)
    loop.run()
    server.close()
    if lock is not None:
        os.close(lock)
    return 0


def run_client(args: argparse.Namespace) -> int:
    if not clean_name(args.name) or args.name[0] == "/" or dialect_of(args.name.encode()) != "line":
        raise Unusable(f"{args.name!r} cannot be a name")
    options = ClientOptions(
        " ".join(args.name.split()),
        args.server._replace(plain=args.plain or args.server.plain),
        Trust(args.ca, args.pin, args.insecure),
        None if args.no_state else data_folder() / "client",
        args.password or "",
        tuple(filter(None, args.join.split(","))),
        args.commands,
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
    own = contextlib.nullcontext(args.server) if args.server else server_for_bench()
    with own as target:
        options = BenchOptions(
            target, **{n: getattr(args, n) for n in BenchOptions._field_defaults}
        )
        result = Bench(options, show_progress if sys.stderr.isatty() else do_nothing).run()
    print(json.dumps(result) if args.json else bench_table(result))
    return 0


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description="A chat in one file.")
    parser.add_argument("--version", action="version", version=f"chat.py {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)

    server = commands.add_parser("server", help="let others talk")
    add = server.add_argument
    add("--listen", type=listen_address, action="append", metavar="HOST:PORT")
    add("--tls-cert", metavar="PEM", help="certificate chain: TLS on the same port")
    add("--tls-key", metavar="PEM", help="its key, unless it is in the same file")
    add("--data", type=data_option, default=data_folder(), metavar="DIR", help="or none")
    add("--keep", type=positive, metavar="N", help="events kept of each channel")
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    add("--flood", type=flood_limits, default=(FLOOD_BURST, FLOOD_RATE), metavar="BURST,RATE|off")
    add("--max-clients", type=positive, metavar="N")
    add("--max-per-address", type=positive, default=PER_ADDRESS, metavar="N")
    add("--log", default="info", choices=("debug", "info", "warning", "error"))
    server.set_defaults(run=run_server)

    client = commands.add_parser("client", help="talk")
    add = client.add_argument
    add("name", metavar="NAME")
    add("--server", type=server_target, default=server_target(""), metavar="HOST:PORT|URL")
    add("--join", default="", metavar="#A,#B", help="channels to enter at once")
    add("--plain", action="store_true", help="a workshop server: the line protocol, no commands")
    add("--commands", action="store_true", help="lines of a pipe may be commands")
    add("--no-state", action="store_true", help="remember nothing")
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    add("--ca", metavar="PEM", help="believe these certificates instead of the system's")
    add("--pin", metavar="SHA256", help="believe this one certificate")
    add("--insecure", action="store_true", help="believe any certificate")
    client.set_defaults(run=run_client)

    bench = commands.add_parser("bench", help="measure a server; one of its own without --server")
    add = bench.add_argument
    add("--server", type=server_target, metavar="HOST:PORT")
    for name, value in BenchOptions._field_defaults.items():
        kind = message_rate if name == "rate" else positive
        add(f"--{name}", type=kind, default=value, metavar="N")
    add("--json", action="store_true")
    bench.set_defaults(run=run_bench)
    return parser


def main(arguments: list[str] | None = None) -> int:
    for fd in (0, 1, 2):  # a closed one would come back as a socket, and be written to
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    args = command_line().parse_args(arguments)
    try:
        return args.run(args)
    except ChatError as error:
        print(f"chat.py: {escaped(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
