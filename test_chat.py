"""Tests of chat.py and gui_client.py: bytes in, bytes out, most of them without a socket.

In memory, a House is a server without a network: sessions are joined back to back, a turn
ends when the test says so, and the clock is a number. The tests on real sockets wait for
replies and never for time to pass. Seeded tests print their seed when they fail. The sections
are those of chat.py, in its order. Helpers that many tests use:

    House           the server in memory: say(), turn(), heard(); asked() and of() for one answer
    transcripts()   who says what and what each hears, as text: IRC and the line protocol
    Browser         a client of the web dialect, joined to a House
    Pair            a client core joined to a House; two_screens() makes two that keep messages
    Elsewhere       a client core on a server that is no chat.py, of which there are only lines
    Desk            a terminal's display, and the screen that it draws
    Running         a server on a real port in a thread (the fixture `running`); Guest, Visitor
    program()       chat.py in a process; serving() is a server, piped() a client
    Proxy           a network that resets, delays and swallows
    Linked, Sender  a link with a loop of its own, and one that sends files
    window          opens windows on a virtual screen (a fixture)
    browse          opens tabs of a headless Chromium (a fixture); Tab
"""

from __future__ import annotations

import ast
import atexit
import base64
import codecs
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import itertools
import json
import math
import os
import pathlib
import pickle
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request
import weakref
import zlib
from typing import NamedTuple

import pytest

import chat
import gui_client

HERE = pathlib.Path(__file__).parent
SEED = int(os.environ.get("CHAT_SEED", "20261122"))
PATIENCE = 10.0  # seconds until a test on real sockets gives up


THOROUGH = bool(os.environ.get("CHAT_THOROUGH"))  # all cases, and what takes long
thorough = pytest.mark.skipif(not THOROUGH, reason="only with CHAT_THOROUGH=1")


def some(cases, count=1):
    """All of these cases in a thorough run, else the first ones."""
    return list(cases)[: None if THOROUGH else count]


def in_turn(cases, *others):
    """All combinations in a thorough run, else each case once, with one value of each other
    list in turn."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    if THOROUGH:
        return [(*case, *more) for case, *more in itertools.product(cases, *others)]
    rest = zip(*(itertools.cycle(values) for values in others), strict=False)
    return [(*case, *more) for case, more in zip(cases, rest, strict=False)]


@pytest.fixture
def seeded(request):
    """A random generator whose seed is printed when the test fails."""
    print(f"CHAT_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


# ======================================================================================
# HELPERS: a server without sockets, and clients of it
# ======================================================================================

IRC_LINE = re.compile(
    r"(?:@[^ \r\n\0;=]+(?:=[^ \r\n\0;]*)?(?:;[^ \r\n\0;=]+(?:=[^ \r\n\0;]*)?)* )?"  # tags
    r"(?::(?P<source>\S+) )?"
    r"(?P<verb>[A-Z]+|\d{3})"
    r"(?P<params>(?: [^ :\r\n\0][^ \r\n\0]*)*(?: :[^\r\n\0]*)?)"
)
IRC_SOURCE = re.compile(r"[^ !@]+![^ !@]+@[^ @]+|[A-Za-z0-9][A-Za-z0-9._/-]*")
WITHOUT_SOURCE = ("PING", "ERROR", "AUTHENTICATE", "BATCH")
LEAST_PARAMS = {"PRIVMSG": 2, "NOTICE": 2, "TAGMSG": 1, "QUIT": 1, "JOIN": 1, "PART": 1, "NICK": 1}
LINE_FORM = re.compile(
    r"\* .*|(?:\[#[^\]]+\] |\(private\) )?"
    r"(?:-[^ ]+- .*|[^ :]+: .*|\* [^ ]+ sends a CTCP .*"
    r"|[^ ]+ \(\S+:\d+\) (?:joined|left) the chat!)"
)


def check_grammar(data):
    """Every line that a client receives is one that its dialect may send."""
    assert data.endswith(b"\n"), data
    for line in data.decode()[:-1].split("\n"):
        if not line.endswith("\r"):
            assert LINE_FORM.fullmatch(line), line
            assert all(c.isprintable() or c in "\t" or ord(c) > 0x9F for c in line), line
            assert not set(line) & set("\u2028\u2029"), line
            continue
        match = IRC_LINE.fullmatch(line[:-1])
        assert match, line
        source, verb, params = match["source"], match["verb"], match["params"]
        assert source is not None or verb in WITHOUT_SOURCE, line
        assert source is None or IRC_SOURCE.fullmatch(source), line
        assert verb.isdigit() <= bool(source and "!" not in source), line
        before, _, _ = params.partition(" :")
        count = len(before.split()) + (" :" in params)
        assert count >= LEAST_PARAMS.get(verb, 0), line
        tags = line.partition(" ")[0] if line[0] == "@" else ""
        assert len(line.removeprefix(tags).encode()) <= chat.IRC_BYTES, line
        assert len(tags.encode()) <= 8191, line


WEB = chat.Web(documents={"/": chat.Document("a page", "text/plain")})


class FakeConn:
    """A connection as a session knows it, which remembers what it was told."""

    secure = encrypted = gone = certifiable = leaving = False
    fingerprint, local = "", "127.0.0.1:7000"
    direct = False  # nothing is sent past write()
    unsent = 0

    def __init__(self, house, address):
        self.house = house
        self.address = address
        self.out = b""
        self.closed = self.held = False
        self.session = None
        self.lines = collections.deque()  # that wait for an answer before them

    @property
    def limit_key(self):
        return chat.address_key(chat.host_of(self.address))

    @property
    def host(self):
        return chat.host_of(self.address)

    def named(self):
        pass

    def charge(self, items):
        pass

    def update(self):
        pass

    def still_there(self):
        return True

    def resume_soon(self):
        pass

    def write(self, data):
        assert self.session not in self.house.written, "a session was written to twice in a turn"
        self.house.written.add(self.session)
        check_grammar(data)
        self.out += data

    def close(self):
        if not self.closed:
            self.closed = self.leaving = True
            self.session.ended()


class FakeLoop:
    """A loop without sockets: what is to be done later is done when the test says so."""

    def __init__(self, now):
        self.now = now
        self.soon = collections.deque()
        self.timers = []

    def call_later(self, seconds, callback):
        timer = chat.Timer(self.now + seconds, callback)
        self.timers.append(timer)
        return timer

    def call_soon(self, callback):
        self.soon.append(callback)

    def stop(self):
        pass

    def run_due(self):
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer.when > self.now]
        for timer in due:
            if timer.callback:
                timer.callback()
        while self.soon:
            self.soon.popleft()()


class FakeHelpers:
    """Jobs are done when the test's turn comes to them."""

    def __init__(self):
        self.waiting = []

    def submit(self, owner, job, then, lane=chat.DISK_LANE, wanted=lambda: True):
        self.waiting.append((job, then, wanted))

    def run(self):
        waiting, self.waiting = self.waiting, []
        for job, then, wanted in waiting:
            if wanted():
                then(chat.attempt(job))

    def close(self):
        return True


SLOW_ROUNDS = chat.ACCOUNT_ROUNDS
chat.ACCOUNT_ROUNDS = min(chat.SCRAM_ROUNDS)  # hundreds of accounts are made here
chat.make_verifier.__defaults__ = (chat.ACCOUNT_ROUNDS,)
BOSS = chat.make_verifier("secret", rounds=1000)


MIGRATE = chat.migrate


@functools.cache
def empty_database():
    """Return a database in memory with all its tables, as bytes."""
    db = chat.connect(None, "rwc")
    MIGRATE(db)
    return db.serialize()


def migrate_quickly(db):
    """Make the tables of a new database in memory by copying them: thousands are made here."""
    in_memory = not db.execute("PRAGMA database_list").fetchone()[2]
    if in_memory and not db.execute("PRAGMA user_version").fetchone()[0]:
        db.deserialize(empty_database())
    else:
        MIGRATE(db)


chat.migrate = migrate_quickly


class House(chat.Server):
    """The server, without a network. What was sent is seen after turn()."""

    def __init__(self, password=None, store=None, **options):
        self.now = 1_000_000.0
        self.written = set()
        self.asked_for = []  # what operators did with the server
        self.guests = {}
        given = chat.ServerOptions(listen=(), password=password, **{"web": WEB, **options})
        loop = FakeLoop(self.now)
        super().__init__(loop, given, store or chat.Store(None), lambda: self.now)
        self.limits.close()
        self.helpers = self.committer.helpers = FakeHelpers()
        self.site.operators = {"boss": BOSS}
        self.note = self.asked_for.append
        self.mail = lambda *values: self.asked_for.append(values)
        self.use_files = lambda files: self.asked_for.append("files")
        self.restart = lambda: self.asked_for.append("restart")
        self.stop = lambda: self.asked_for.append("stop")
        self.begin_turn()

    def begin_turn(self):
        self.loop.now = self.now
        super().begin_turn()

    def nameless(self):
        return sum(session.user is None for session in self.guests.values())

    @property
    def missed(self):
        """Users who may come back."""
        return list(self.hub.absent)

    def grace_over(self):
        """The time of those who may come back is over."""
        for user in self.missed:
            self.hub.perform("grace_period_over", 0, user.resume_id, self.hub.absent[user])

    def connect(self, label, greeted=False, host="127.0.0.1"):
        conn = FakeConn(self, f"{host}:{50000 + len(self.guests)}")
        self.guests[label] = conn.session = chat.LineSession(self.site, conn, greeted)
        return conn.session

    def connect_irc(self, label, host="127.0.0.1"):
        conn = FakeConn(self, f"{host}:{50000 + len(self.guests)}")
        self.guests[label] = conn.session = chat.IrcSession(self.site, conn)
        return conn.session

    def enter(self, *names):
        """Guests come in, each in a turn of their own; what they heard is forgotten."""
        for name in names:
            self.connect(name).receive(name.encode())
            self.turn()
        for session in self.guests.values():
            session.conn.out = b""

    def enter_irc(self, *names):
        """The same with IRC clients."""
        for name in names:
            self.connect_irc(name)
            self.say(name, f"NICK {name}", "USER u 0 * :Real Name")
            self.turn()
        for session in self.guests.values():
            session.conn.out = b""

    def say(self, label, *lines):
        conn = self.guests[label].conn
        conn.lines += [line if isinstance(line, bytes) else line.encode() for line in lines]
        self.pump(self.guests[label])

    def pump(self, session):
        """Act on what has come, but for what has to wait."""
        conn = session.conn
        while not (conn.held or conn.closed):  # what follows a QUIT is not looked at
            if session.has_more:
                session.go_on()
            elif conn.lines:
                session.take(conn.lines.popleft())
            else:
                break

    def turn(self):
        """The end of a turn, the server's own, and what helpers were asked for meanwhile."""
        for _ in range(100):
            self.written.clear()
            self.end_turn()
            assert not self.hub.turn.events, "the turn could not be stored"
            if not (self.helpers.waiting or self.loop.soon):
                break
            self.helpers.run()
            self.loop.run_due()
            for session in self.guests.values():
                self.pump(session)
        for _ in range(1000):
            if not self.store.words.has_work:
                break
            self.store.words.finish(self.store.words.step()())
        self.now += 1.0
        self.begin_turn()

    def idle(self, turns):
        """So many turns, a second each, with what the server does by itself meanwhile."""
        for _ in range(turns):
            self.loop.run_due()
            self.turn()

    def heard(self, label):
        """The lines that one guest got since the last call."""
        conn = self.guests[label].conn
        text, conn.out = conn.out.decode(), b""
        return re.sub(r"1970-01-\d\d \d\d:\d\d:\d\dZ", "WHEN", text).splitlines()

    def leave(self, label):
        self.guests[label].ended()


def index_all(store):
    while store.words.has_work:
        store.words.finish(store.words.step()())


def house_of(*names):
    house = House()
    house.enter(*names)
    return house


CAPS = (
    "message-tags server-time echo-message draft/message-redaction draft/read-marker "
    "draft/channel-rename draft/multiline chat.py/session"
)
DAY_SECONDS, YEAR = 86_400, 365 * 86_400


def come(house, *names, caps=CAPS, secret=""):
    """Let guests with IRC clients come in, with capabilities; nothing has been heard yet."""
    for name in names:
        house.connect_irc(name)
        house.say(name, f"CAP REQ :{caps}", *([f"SESSION {secret}"] if secret else []))
        house.say(name, f"NICK {name}", "USER u 0 * :Real Name", "CAP END")
        house.turn()
    for name in house.guests:
        house.heard(name)


def ask(house, who, *lines):
    """Send lines, end the turn; return what this client received for them."""
    house.heard(who)
    house.say(who, *lines)
    house.turn()
    return house.heard(who)


def set_clock(house, when):
    """Let the wall clock be `when` in the turn that begins now."""
    house.now = when - 1.0
    house.turn()


def stored(path):
    return House(store=chat.Store(path / "chat.db"))


def spoken(lines):
    """Return the texts of the messages among these lines."""
    return [
        line.partition(" PRIVMSG ")[2].partition(" :")[2] for line in lines if " PRIVMSG " in line
    ]


def tag(line, name):
    return re.search(rf"[@;]{name}=([^; ]*)", line)[1]


def send(house, who, target, text, tags=""):
    """Send a message; return its (msgid, time tag), as the echo carries them."""
    lines = ask(house, who, f"{tags}PRIVMSG {target} :{text}")
    echo = next(line for line in lines if f" PRIVMSG {target} :" in line and "msgid=" in line)
    return tag(echo, "msgid"), tag(echo, "time")


def seconds(stamp):
    return datetime.datetime.fromisoformat(stamp).timestamp()


def iso(when):
    moment = datetime.datetime.fromtimestamp(when, datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"


def history(house, who, target, query="LATEST {} * 100"):
    return spoken(ask(house, who, "CHATHISTORY " + query.format(target)))


def refused(lines, *codes):
    """Return whether one of these lines is one of these numerics or FAIL codes."""
    found = [re.sub(r"^@\S+ ", "", line).split() for line in lines]
    return any(words[1] in codes or (words[1] == "FAIL" and words[3] in codes) for words in found)


def plain(name, password):
    return base64.b64encode(f"\0{name}\0{password}".encode()).decode()


def sasl(house, who, name, password="password"):
    """Log in by SASL PLAIN; return whether it worked (903)."""
    lines = ask(house, who, "AUTHENTICATE PLAIN", f"AUTHENTICATE {plain(name, password)}")
    lines += house.heard(who)
    return refused(lines, "903")


def is_logged_in(house, who, name):
    return any(line.endswith(f" 354 {who} {name}") for line in ask(house, who, f"WHO {who} %a"))


def device(house, label, name, password="password", caps=CAPS):
    """Connect another IRC client that logs in to the account before it has come in."""
    house.connect_irc(label)
    house.say(label, f"CAP REQ :sasl {caps}", f"NICK {name}", "USER u 0 * :r", "AUTHENTICATE PLAIN")
    house.say(label, f"AUTHENTICATE {plain(name, password)}")
    house.turn()
    return ask(house, label, "CAP END")


def account(house, *names, password="password"):
    """Let accounts exist whose owners are not here."""
    for name in names:
        house.connect_irc(f"maker of {name}")
        maker = f"maker of {name}"
        house.say(maker, f"NICK {name}", "USER u 0 * :r")
        house.turn()
        assert "SUCCESS" in str(ask(house, maker, f"REGISTER * * :{password}"))
        house.say(maker, "QUIT")
        house.turn()


@pytest.mark.parametrize("ends, between", [("bd", "c"), ("db", "c"), ("ac", "b"), ("ad", "b c")])
def test_what_lies_between_two_ids_is_by_the_order_of_ids_when_the_clock_was_set_back(
    folder, ends, between
):
    house, _, ids = house_with_a_clock_set_back(folder, restart=False)
    one, other = (ids["#a", text] for text in ends)
    found = history(house, "alice", "#a", f"BETWEEN {{}} msgid={one} msgid={other} 10")
    assert found == [f"word {text}" for text in between.split()]
    house.store.close()


STOPS_WITHIN = 2.0  # seconds from SIGTERM to the end of the process
FREEZE = 0.15  # seconds of the loop's processor time that another user may wait; decided: 5 ms
ON_LINUX = pytest.mark.skipif(not pathlib.Path("/proc/self/schedstat").exists(), reason="/proc")


def quietly(guest, data):
    """Send as much as the other side takes."""
    guest.sock.setblocking(False)
    with contextlib.suppress(OSError):
        guest.sock.sendall(data.encode())
    guest.sock.settimeout(PATIENCE)


def eventually(condition, seconds=PATIENCE):
    """Poll until the condition holds, and return it; the last answer if it never does."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return answer


def loop_seconds(process):
    """Processor time of the main thread of a server process: of its loop."""
    text = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/schedstat").read_text()
    return int(text.split()[0]) / 1e9


def process_seconds(process):
    """The same of all its threads."""
    return time.clock_gettime((~process.pid << 3) | 2)  # CPUCLOCK_SCHED


@contextlib.contextmanager
def logging_to(path, *arguments, **options):
    """A server process; what it logs is copied to a file (by us: its own may be limited)."""
    path.touch()
    with serving(*arguments, stderr=subprocess.PIPE, **options) as (process, address):

        def copy():
            with path.open("ab", buffering=0) as file:
                while data := os.read(process.stderr.fileno(), 65536):
                    file.write(data)

        copier = threading.Thread(target=copy)
        copier.start()
        try:
            yield process, address
        finally:
            process.kill()
            copier.join(PATIENCE)


def troubles(text):
    """Lines of the log above INFO."""
    return [line for line in text.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]


def check_log(text):
    assert "Traceback" not in text and "a bug" not in text, text


def terminate(process, close=True):
    """SIGTERM ends it with status 0, in time."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for guest in list(Visitor.open) if close else ():
        guest.close()
    assert process.wait(STOPS_WITHIN + 1) == 0
    assert time.monotonic() - began < STOPS_WITHIN


def limit_files(process, size):
    """Let no file of the process grow beyond `size` bytes: a full disk, to SQLite."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


ECHOING = "CAP REQ :echo-message message-tags batch draft/chathistory draft/read-marker"
ACKNOWLEDGED = re.compile(r"(?:@\S+ )?:alice!\S+ PRIVMSG #a :(\S+)\r?$|^.*FAIL PRIVMSG NOT_KEPT ")


def say_one_by_one(guest, texts):
    """Say each in #a under an id of its own, in a turn of its own; whether it was echoed.
    That a NOT_KEPT has its place in the order of replies is tested elsewhere (section 4)."""
    echoed = {}
    for text in texts:
        lines = guest.ask(f"@+chat.py/id=id-{text} PRIVMSG #a :{text}") + guest.ask()
        (line,) = [line for line in lines if ACKNOWLEDGED.match(line)]
        echoed[text] = "NOT_KEPT" not in line
    return echoed


def texts_kept(data):
    """Return the state of #a on a later server."""
    with serving("--data", data, "--flood", "off") as (_, address):
        guest = Visitor(address)
        guest.enter_irc("reader", "CAP REQ :batch draft/chathistory message-tags", "JOIN #a")
        lines = guest.ask("CHATHISTORY LATEST #a * 200")
        guest.close()
    return {line.rstrip("\r").rpartition(" :")[2] for line in lines if " PRIVMSG #a " in line}


# ======================================================================================
# FRAMING
# ======================================================================================

LINES = [  # what comes, the lines that come out; the last one is what finish() adds
    (b"alice\n", [b"alice"], None),
    (b"alice\r\n", [b"alice"], None),
    (b"a\nb\nc\n", [b"a", b"b", b"c"], None),
    (b"\n\r\n\n", [b"", b"", b""], None),
    (b"  spaces kept  \n", [b"  spaces kept  "], None),
    (b"one CR goes\r\r\n", [b"one CR goes\r"], None),
    (b"a CR inside\rstays\n", [b"a CR inside\rstays"], None),
    (b"no newline", [], b"no newline"),
    (b"no newline\r", [], b"no newline"),
    (b"\r", [], None),
    (b"", [], None),
    (
        "gr\u00fc\u00dfe \u4f60\u597d \U0001f600\n".encode(),
        ["gr\u00fc\u00dfe \u4f60\u597d \U0001f600".encode()],
        None,
    ),
    (b"junk \xff\x00\x80\n", [b"junk \xff\x00\x80"], None),
]


def taken(buffer):
    return list(iter(buffer.take, None))


@pytest.mark.parametrize("data, lines, last", LINES)
def test_lines_are_the_same_however_the_network_cuts_them(data, lines, last):
    for size in (len(data) or 1, 1, 2, 3):
        buffer = chat.LineBuffer(100)
        for start in range(0, len(data), size):
            buffer.feed(data[start : start + size])
        assert taken(buffer) == lines
        buffer.finish()
        assert taken(buffer) == ([] if last is None else [last])


@pytest.mark.parametrize("length", [99, 100, 101, 102, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_a_line_over_the_limit_is_reported_once_and_skipped_to_its_end(length, end, size):
    data = b"before\n" + b"x" * length + end + b"after\n"
    buffer = chat.LineBuffer(100)
    for start in range(0, len(data), size):
        buffer.feed(data[start : start + size])
    middle = b"x" * length if length <= 100 else chat.TOO_LONG
    assert taken(buffer) == [b"before", middle, b"after"]


def test_an_endless_line_costs_no_memory():
    buffer = chat.LineBuffer(100)
    for _ in range(1000):
        buffer.feed(b"x" * 1000)
    assert taken(buffer) == [chat.TOO_LONG]
    assert len(buffer.buffer) <= 102
    buffer.finish()
    assert taken(buffer) == []


def test_random_pieces_give_the_lines_of_the_whole(seeded):
    for _ in range(300):
        alphabet = [b"\n", b"\r", b"a", b"\xc3\xa9", b"x" * seeded.randrange(30)]
        data = b"".join(seeded.choices(alphabet, k=seeded.randrange(80)))
        whole, pieces = chat.LineBuffer(40), chat.LineBuffer(40)
        whole.feed(data)
        rest = data
        while rest:
            size = seeded.randrange(1, 9)
            pieces.feed(rest[:size])
            rest = rest[size:]
        for buffer in (whole, pieces):
            buffer.finish()
        assert taken(whole) == taken(pieces)


NAMES = [
    ("alice", "alice"),
    ("  alice ", "alice"),
    ("Alice Smith", "Alice_Smith"),
    ("Пётр", "Пётр"),
    ("王小明", "王小明"),
    ("ﬁne", "fine"),  # a ligature is its letters (NFKC)
    ("ａｌｉｃｅ", "alice"),  # full width
    ("#rust", "_rust"),
    ("a#b", "a#b"),
    ("@op", "_op"),
    ("a,b:c!d@e*f?g.h$i/j", "a_b_c_d_e_f_g_h_i_j"),
    ("tab\there", "tab_here"),
    ("bell\x07", "bell_"),
    ("zero\u200bwidth", "zero_width"),
    ("right\u202eleft", "right_left"),
    ("x" * 40, "x" * 32),
    ("й" * 40, "й" * 32),
    ("王" * 40, "王" * 21),  # 63 bytes
    ("\U0001f600" * 20, "\U0001f600" * 16),
    ("", ""),
    ("   ", ""),
    ("(private)", "_private)"),
    ("\u0301", ""),
    ("\u3164", "_"),
]


@pytest.mark.parametrize("wanted, name", NAMES)
def test_a_name_becomes_one_that_every_dialect_can_carry(wanted, name):
    assert chat.clean_name(wanted) == name


def test_cleaning_a_name_twice_changes_nothing_more_and_keeps_the_limits(seeded):
    for _ in range(2000):
        wanted = "".join(
            chr(seeded.choice((seeded.randrange(0x250), seeded.randrange(0xD800))))
            for _ in range(40)
        )
        name = chat.clean_name(wanted)
        assert chat.clean_name(name) == name
        assert len(name) <= chat.NAME_CHARACTERS and len(name.encode()) <= chat.NAME_BYTES
        assert not set(name) & set(" :!@*?,./$\n\t\0")


@pytest.mark.parametrize(
    "one, other", [("Alice", "aLICE"), ("Straße", "STRASSE"), ("ﬁ", "FI"), ("ΣΊΣΥΦΟΣ", "σίσυφος")]
)
def test_names_that_differ_in_case_only_are_one(one, other):
    assert chat.fold(one) == chat.fold(other)


MARKS = "a" + "\u0300" * 3900 + "\u0316" * 3900  # a run that NFKC would have to sort


def test_a_text_too_long_for_a_name_gets_a_short_key_that_no_name_has(monkeypatch):
    monkeypatch.setattr(chat, "fold_text", None)
    one, other = chat.fold(MARKS), chat.fold(MARKS[:-1])
    assert one != other and " " in one and len(one) < 100
    assert chat.fold(one) == one


def test_the_longest_key_of_a_name_is_its_own_key():
    name = "#" + "\ufdfa" * ((chat.CHANNEL_BYTES - 1) // 3)
    chat.check_channel_name(name)
    key = chat.fold(name)
    assert len(key) == 379 and chat.fold(key) == key


def test_a_password_longer_than_any_is_wrong_at_once(monkeypatch):
    verifier = chat.make_verifier("secret", 1000)
    monkeypatch.setattr(chat, "scram_keys", None)
    assert not verifier.fits(MARKS)


@pytest.mark.parametrize("limit", range(8))
def test_text_is_cut_between_characters(limit):
    assert len(chat.cut("aé\U0001f600", limit).encode()) <= limit
    assert "aé\U0001f600".startswith(chat.cut("aé\U0001f600", limit))


def test_control_characters_but_tab_and_newline_are_dropped_for_terminals():
    everything = "".join(map(chr, range(0x100)))
    left = chat.harmless(everything)
    assert set(everything) - set(left) == {
        chr(n) for n in (*range(32), *range(127, 160)) if n not in (9, 10)
    }
    assert chat.escaped("a\x1b[31m\n") == r"a\x1b[31m\n"


# ======================================================================================
# BUFFERS
# ======================================================================================


def test_the_send_queue_gives_back_exactly_what_went_in(seeded):
    for _ in range(100):
        queue, model = chat.SendQueue(), b""
        for _ in range(60):
            if seeded.random() < 0.5:
                data = seeded.randbytes(seeded.choice((1, 10, 100, 70_000)))
                queue.append(data)
                model += data
            elif model:
                head = bytes(queue.head())
                assert head and model.startswith(head)
                sent = seeded.choice((0, 1, len(head) // 2, len(head)))
                queue.advance(sent)
                model = model[sent:]
            assert queue.size == len(model)


def test_a_backlog_shares_its_bytes_among_receivers():
    data = b"x" * 1000
    queues = [chat.SendQueue() for _ in range(3)]
    for queue in queues:
        queue.append(data)
        queue.advance(0)
    assert all(queue.chunks[0] is data for queue in queues)


def test_small_chunks_are_joined_for_one_send_and_large_ones_are_not_copied():
    queue = chat.SendQueue()
    for _ in range(10):
        queue.append(b"x" * 100)
    assert len(queue.head()) == 1000
    queue.advance(1000)
    large = b"y" * (chat.SEND_BYTES + 1)
    queue.append(large)
    queue.append(b"z")
    assert queue.head() is large


def test_a_budget_allows_a_burst_and_then_a_rate():
    budget = chat.Budget(burst=10, rate=2, now=100.0)
    assert budget.tokens == 10
    budget.tokens -= 10
    budget.refill(100.0)
    assert budget.tokens == 0
    assert budget.wait() == pytest.approx(0.5)
    budget.refill(101.0)
    assert budget.tokens == 2
    budget.refill(1000.0)
    assert budget.tokens == 10


CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg05FogudGc7Ek9ZXR
IkBATZw+NCkXOP3tYr5mJEPFzA+hRANCAAS/cneEPxjacr6fvzqSQ0WpP58//ERr
FIOqKUL/do6pALbPtHQBOK84oCJ9d49K5Y9pK780aL0az+6qt+x1XbW7
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUKtfP5nqFgzxgSvcFMycA0tCPlCUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMjA5MjIwNloYDzIxMjYxMDI5
MDkyMjA2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAS/cneEPxjacr6fvzqSQ0WpP58//ERrFIOqKUL/do6pALbPtHQBOK84
oCJ9d49K5Y9pK780aL0az+6qt+x1XbW7o28wbTAdBgNVHQ4EFgQUUyr5yTDEkcgf
VDhEIfItB48j9XIwHwYDVR0jBBgwFoAUUyr5yTDEkcgfVDhEIfItB48j9XIwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgFQK/zQRWoWpdqtI38CTDc00njHi3Pc5v38uoFAveduECIGZk
VeRbdQ7lZd/+Nn/BxYg+uoTEiDl2YWoA6HLR7D/v
-----END CERTIFICATE-----
"""


# alice's is signed by the one above, mallory's by himself
CLIENT_CERTIFICATES = {
    "alice": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg65hsD6V+EJMvFYH8
TR4blJuKrFX8S8Uy4e5fKraw/XKhRANCAARaBxlcB9dUVT+9t2Sa6iMrjCG16HIm
XPN77diJQCchPm8dsovsYu3cpUahvOr7xNLlymfEJu1V7DqaNefXCYb3
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBDTCBtAIBBzAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwIBcN
MjYxMTIyMTUwMDEwWhgPMjEyNjEwMjkxNTAwMTBaMBAxDjAMBgNVBAMMBWFsaWNl
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEWgcZXAfXVFU/vbdkmuojK4whtehy
Jlzze+3YiUAnIT5vHbKL7GLt3KVGobzq+8TS5cpnxCbtVew6mjXn1wmG9zAKBggq
hkjOPQQDAgNIADBFAiAgEmKCq+JyIjY4RFpgnNAf+mAdqLxcD92zhIMRYTI3BQIh
AOeDzs2wUBkIb0i2+7vk6e5ft7aEdVjL226IhPwmU7l+
-----END CERTIFICATE-----
""",
    "mallory": """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgNjGGSE4mkjU2AvVX
6YpP9+jzFrRCN0w/YqdXRGy6klahRANCAAR1L3S74AQ129weKND/cakfoiRzz9op
7Hf9iqLbXOgatblfV11W+7IHV6edlt3hRxuCpr1jRwVvP+Gilum9oLzz
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBezCCASGgAwIBAgIUa8TkfnJibDvU6T9fmjYLr1lpCYswCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHbWFsbG9yeTAgFw0yNjExMjIxNTAwMTBaGA8yMTI2MTAyOTE1
MDAxMFowEjEQMA4GA1UEAwwHbWFsbG9yeTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABHUvdLvgBDXb3B4o0P9xqR+iJHPP2insd/2Kottc6Bq1uV9XXVb7sgdXp52W
3eFHG4KmvWNHBW8/4aKW6b2gvPOjUzBRMB0GA1UdDgQWBBQLqhv3xhgW+VRspCzx
laDjwyV83zAfBgNVHSMEGDAWgBQLqhv3xhgW+VRspCzxlaDjwyV83zAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIQCHfvKCDrcXhUw1kTnjPz64uDsN
Bbi7XiuHiFrL2oeG5QIgDptiBOBwEOp0OYhx07cGwnCWEmtQ3BH/pFeqbgJQ4R4=
-----END CERTIFICATE-----
""",
}


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for localhost, with its key."""
    path = tmp_path / "cert.pem"
    path.write_text(CERTIFICATE)
    return str(path)


def tls_pair(certificate):
    server = chat.TlsFilter(chat.server_tls_context(chat.ServerOptions(tls_cert=certificate)))
    return server, chat.TlsFilter(chat.Trust(ca=certificate).context(), "localhost")


def test_tls_carries_bytes_through_buffers_however_they_are_cut(certificate, seeded):
    server, client = tls_pair(certificate)
    sent, got = seeded.randbytes(300_000), b""
    client_done = False
    for _ in range(100_000):
        if client.ready and not client_done:
            client.seal(sent)
            client.finish()
            client_done = True
        data = client.take()
        while data:
            size = seeded.randrange(1, 5000)
            got += server.feed(data[:size])
            data = data[size:]
        client.feed(server.take())
        if server.ended:
            break
    assert got == sent and server.ready and server.ended


def test_junk_in_place_of_tls_is_refused(certificate):
    server, _ = tls_pair(certificate)
    with pytest.raises(chat.TlsFailed):
        server.feed(b"\x16\x03\x01" + b"junk" * 100)


# ======================================================================================
# COMMANDS
# ======================================================================================


def test_two_handlers_for_one_verb_are_refused_when_the_program_starts():
    table = chat.Commands("/")

    @table("x")
    def first(session):
        """/x -- something"""

    with pytest.raises(ValueError, match="two handlers for x"):
        table("x")(first)


def test_help_is_made_from_the_handlers_and_lists_every_command():
    house = house_of("alice")
    house.say("alice", "/help")
    house.turn()
    lines = house.heard("alice")
    assert len(lines) == len(chat.line_command)
    for verb, command in chat.line_command.items():
        assert command.syntax.startswith(f"/{verb}")
        assert any(line.startswith(f"* {command.syntax}") for line in lines)


@pytest.mark.parametrize("dialect", ["irc", "service", "line", "client"])
def test_each_command_takes_as_many_parameters_as_may_be_given_to_it(dialect):
    import inspect

    for verb, command in getattr(chat, f"{dialect}_command").items():
        for count in (command.least, command.most):
            given = (None, *[""] * count)
            assert inspect.signature(command.handler).bind(*given), verb


# ======================================================================================
# ACCOUNTS
# ======================================================================================


def proven(mechanism, *answers):
    """Return what a mechanism says to these answers; the last one is the account, or None."""
    said = [next(mechanism)]
    try:
        for answer in answers:
            said.append(mechanism.send(answer))
            while callable(said[-1]):
                said[-1] = mechanism.send(said[-1]())
    except StopIteration as end:
        return [*said, end.value]
    except chat.Refused:
        return [*said, None]
    return said


ALICE = chat.make_verifier("sesame", 1000)


def find_alice(name):
    return ("Alice", ALICE) if name.lower() == "alice" else (name, chat.decoy_verifier(name))


PLAIN_LOGINS = [
    (b"\0alice\0sesame", "Alice"),
    (b"ALICE\0alice\0sesame", "Alice"),
    (b"\0alice\0Sesame", None),
    (b"\0bob\0sesame", None),
    (b"bob\0alice\0sesame", None),
    (b"\0alice\0", None),
    (b"\0\0sesame", None),
    (b"alice\0sesame", None),
    (b"\0alice\0sesame\0", None),
    (b"\xff\0alice\0sesame", None),
    (b"", None),
]


@pytest.mark.parametrize("answer, account", PLAIN_LOGINS)
def test_plain_is_right_or_wrong(answer, account):
    assert proven(chat.sasl_plain(find_alice), answer)[-1] == account


class ScramClient:
    """The other side of SCRAM-SHA-256, as RFC 5802 has it, written from the RFC."""

    def __init__(self, name, password, binding="n,,"):
        self.password, self.binding = password, binding
        self.bare = f"n={name},r=clientnonce"

    def first(self):
        return (self.binding + self.bare).encode()

    def final(self, challenge):
        fields = dict(part.split("=", 1) for part in challenge.decode().split(","))
        salt, rounds = base64.b64decode(fields["s"]), int(fields["i"])
        salted = hashlib.pbkdf2_hmac("sha256", self.password.encode(), salt, rounds)
        channel = base64.b64encode(self.binding.encode()).decode()
        without = f"c={channel},r={fields['r']}"
        message = f"{self.bare},{challenge.decode()},{without}".encode()
        key = hmac.digest(salted, b"Client Key", "sha256")
        signature = hmac.digest(hashlib.sha256(key).digest(), message, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        server_key = hmac.digest(salted, b"Server Key", "sha256")
        self.expected = b"v=" + base64.b64encode(hmac.digest(server_key, message, "sha256"))
        return f"{without},p={base64.b64encode(proof).decode()}".encode()


@pytest.mark.parametrize(
    "name, password, binding, account",
    [
        ("alice", "sesame", "n,,", "Alice"),
        ("alice", "sesame", "y,,", "Alice"),
        ("alice", "sesame", "n,a=alice,", "Alice"),
        ("alice", "sesame", "n,a=bob,", None),
        ("alice", "sesame", "p=tls-unique,,", None),
        ("alice", "wrong", "n,,", None),
        ("absent", "sesame", "n,,", None),
    ],
)
def test_scram_proves_the_password_without_telling_it_and_the_server_proves_itself(
    name, password, binding, account
):
    client, mechanism = ScramClient(name, password, binding), chat.sasl_scram(find_alice)
    next(mechanism)
    try:
        challenge = mechanism.send(client.first())
        answer = mechanism.send(client.final(challenge))
        assert answer == client.expected
        mechanism.send(b"")
        raise AssertionError("a mechanism ends")
    except StopIteration as end:
        assert end.value == account
    except chat.Refused:
        assert account is None


def test_junk_in_place_of_scram_is_refused(seeded):
    for _ in range(500):
        mechanism = chat.sasl_scram(find_alice)
        parts = ["n,,", "n=alice,r=x", "c=biws", "p=", "\xff", ",", "=", "r=", "n="]
        junk = "".join(seeded.choices(parts, k=4)).encode("latin-1")
        assert (
            proven(mechanism, junk, junk)[-1] is None
            or len(proven(chat.sasl_scram(find_alice), junk)) == 2
        )


def test_an_exchange_puts_chunks_of_400_bytes_together():
    exchange = chat.Exchange(iter(()))
    for size in (0, 1, 299, 300, 301, 600, 900):
        data = bytes(range(256)) * 4
        text = base64.b64encode(data[:size]).decode()
        pieces = [text[n : n + 400] for n in range(0, len(text), 400)]
        if len(text) % 400 == 0:
            pieces.append("+")
        assert chat.Exchange.chunks(data[:size]) == pieces
        *some, last = pieces
        assert [exchange.feed(piece) for piece in some] == [None] * len(some)
        assert exchange.feed(last) == data[:size]
    with pytest.raises(chat.Refused):
        for _ in range(5):
            exchange.feed("A" * 400)


def test_a_client_that_fails_too_often_waits_and_the_owner_elsewhere_does_not():
    throttle, now = chat.Throttle(), 10**9
    for _ in range(chat.LOGIN_TRIES):
        throttle.check("10.0.0.1", "alice", now)
        throttle.failed("10.0.0.1", "Alice", now)
    with pytest.raises(chat.Refused, match="try again in 60 s|try again in 61 s"):
        throttle.check("10.0.0.1", "ALICE", now)
    throttle.check("10.0.0.2", "alice", now)
    throttle.check("10.0.0.1", "bob", now)
    throttle.check("10.0.0.1", "alice", now + 61_000)
    for n in range(3 * chat.LOGIN_FAILURES_KEPT):
        throttle.failed(f"host{n}", "alice", now)
    assert len(throttle.failures) <= chat.LOGIN_FAILURES_KEPT
    with pytest.raises(chat.Refused):  # an address that fills the table is not forgotten by that
        throttle.check("10.0.0.1", "alice", now)


def test_an_address_can_have_so_many_accounts_made_and_this_machine_any_number():
    house = House()
    house.enter("dora")
    for name, address in (("eve", "10.0.0.7:1"), ("ipv6", "[::1]:1"), ("far", "10.0.0.8:1")):
        house.connect_irc(name).conn.address = address
    house.guests["dora"].conn.address = "10.0.0.7:2"

    def register(name, *lines):
        house.say(name, f"NICK {name}{house.now:.0f}", "USER u 0 * :r", *lines)
        house.turn()
        house.say(name, "REGISTER * * password")
        house.turn()
        answer = next(line for line in house.heard(name) if " REGISTER " in line)
        if " SUCCESS " in answer:
            house.say(name, "NS DROP password")
            house.turn()
        return answer

    for _ in range(chat.ACCOUNTS_MADE):
        assert "SUCCESS" in register("eve") and "SUCCESS" in register("ipv6")
    answer = register("eve")
    assert "FAIL REGISTER TEMPORARILY_UNAVAILABLE" in answer
    assert ":5 accounts from one address at most; try again in 35" in answer
    house.heard("dora")
    house.say("dora", "/register password")
    house.turn()
    (answer,) = house.heard("dora")
    assert answer.startswith("* 5 accounts from one address at most; try again in 35")
    assert "SUCCESS" in register("ipv6") and "SUCCESS" in register("far")
    house.now += chat.ACCOUNTS_MADE_SECONDS
    house.turn()
    assert "SUCCESS" in register("eve")


def test_passwords_of_any_script_and_length_are_told_apart():
    for password in ("x" * 300, "x" * 299 + "y", "p\u00e4ssw\u00f6rd", "\u4f60\u597d"):
        verifier = chat.make_verifier(password, 10)
        assert verifier.fits(password) and not verifier.fits(password + " ")
        assert not verifier.fits("x" * 298)


def test_an_account_outlives_the_server_and_its_password_is_not_in_the_files(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice")
    house.enter("dora")
    house.say("alice", "REGISTER * * hunter2hunter2", "PRIVMSG NickServ :IDENTIFY hunter2hunter2")
    house.turn()
    house.say("dora", "/register swordfish99", "/login swordfish99")
    house.turn()
    house.store.close()
    files = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"hunter2" not in files and b"swordfish" not in files
    again = chat.Store(folder / "chat.db")
    known = {account.name: account.verifier for account in again.accounts()}
    assert known["alice"].fits("hunter2hunter2") and known["dora"].fits("swordfish99")
    again.close()


def logged_in(house, label, name, password="password"):
    """One more device of a user, with the account."""
    house.connect_irc(label)
    blob = base64.b64encode(f"\0{name}\0{password}".encode()).decode()
    house.say(label, "CAP REQ :sasl", f"NICK {name}", "USER u 0 * :r", "AUTHENTICATE PLAIN")
    house.say(label, f"AUTHENTICATE {blob}")
    house.turn()
    house.say(label, "CAP END")
    house.turn()
    return house.heard(label)


def test_a_user_whose_connection_breaks_stays_for_a_while_and_comes_back_to_the_same_channels():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password")
    house.turn()
    house.say("alice", "JOIN #a")
    house.say("bob", "JOIN #a")
    house.turn()
    user = house.guests["alice"].user
    house.heard("bob")
    house.leave("alice")
    house.turn()
    assert house.missed == [user] and house.heard("bob") == []
    house.say("bob", "PRIVMSG alice :are you there?", "NAMES #a")
    house.turn()
    assert "@alice bob" in str(house.heard("bob"))
    lines = logged_in(house, "again", "alice")
    assert ":alice!~u@127.0.0.1 JOIN #a" in lines and house.heard("bob") == []
    assert house.guests["again"].user is user
    house.grace_over()  # the time is over, but he is back
    house.turn()
    assert house.heard("bob") == []
    house.leave("again")
    house.turn()
    house.grace_over()
    house.turn()
    assert house.heard("bob") == [":alice!~u@127.0.0.1 QUIT :Connection lost"]


def crowd_with_metadata(house, channel, count):
    """So many members, with a color and a status each."""
    for n in range(count):
        house.connect_irc(f"m{n}")
        house.say(f"m{n}", f"NICK m{n}", "USER u 0 * :r", f"JOIN {channel}")
        house.say(f"m{n}", f"METADATA * SET color :{n}", f"METADATA * SET status :{n}")
    house.turn()


@pytest.mark.parametrize("count, told", [(50, ["761"] * 99), (51, ["774"])])
def test_a_newcomer_to_a_crowd_is_told_what_is_known_of_it_or_where_to_ask(count, told):
    house = House()
    crowd_with_metadata(house, "#a", count)
    house.say("m0", "TOPIC #a :tea", "METADATA * SET color")
    house.turn()
    house.enter_irc("alice")
    house.say("alice", "CAP REQ :draft/metadata-3 draft/read-marker batch")
    house.say("alice", "METADATA * SUB color status", "METADATA * SET color :mine")
    house.turn()
    house.heard("alice")
    house.say("alice", "JOIN #a")
    house.turn()
    lines = [chat.parse_message(line) for line in house.heard("alice")]
    verbs = [line.verb for line in lines if line.verb != "353"]
    assert verbs == ["JOIN", "332", "333", "MARKREAD", *told, "366"]
    if told == ["774"]:
        assert lines[4].params[:3] == ["alice", "#a", "0"]
    for target, extra in (("#a", 1), ("*ALL", 1), ("m1", 0), ("alice", 1)):
        house.say("alice", f"METADATA {target} SYNC")
        house.turn()
        begin, *known, end = [chat.parse_message(line) for line in house.heard("alice")]
        assert begin.params[1:] == ["metadata", target] and end.verb == "BATCH"
        crowd = 2 * count - 1 if target in ("#a", "*ALL") else 2 * (target == "m1")
        assert [line.verb for line in known] == ["761"] * (crowd + extra)
        assert len({tuple(line.params) for line in known}) == crowd + extra


def test_a_long_synchronization_waits_for_its_reader_and_is_whole(running, monkeypatch):
    monkeypatch.setattr(chat, "LINES_A_TURN", 5)
    monkeypatch.setattr(chat, "UNSENT_NO_READ", 2000)
    server = running()
    alice, bob = server.guest(), server.guest()
    lines = [f"METADATA * SET key{n} :{'x' * 300}" for n in range(chat.METADATA_KEYS)]
    bob.enter_irc("bob", "JOIN #a", *lines)
    alice.enter_irc("alice", "CAP REQ :batch labeled-response", "JOIN #a,#b,#c")
    for n in range(chat.METADATA_KEYS):
        alice.send(f"METADATA * SUB key{n}\r\n")
    alice.send("@label=1 METADATA #a SYNC\r\nPING end\r\n")
    *lines, _ = itertools.dropwhile(lambda line: "label=1" not in line, alice.until("PONG"))
    (known,) = answer_with("1", lines)
    assert [line[0] for line in known] == ["761"] * chat.METADATA_KEYS


def test_what_one_device_joins_the_others_learn_all_about():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password")
    house.say("bob", "JOIN #a,#b", "TOPIC #a :tea")
    house.turn()
    logged_in(house, "phone", "alice")
    logged_in(house, "tablet", "alice")
    house.say("phone", "CAP REQ draft/read-marker")
    house.say("tablet", "CAP REQ draft/no-implicit-names")
    house.turn()
    for who in house.guests:
        house.heard(who)
    house.say("alice", "JOIN #a")
    house.turn()
    joined, topic, set_by, *names = irc_heard(house, "alice")
    assert joined == ":alice JOIN #a" and topic == "332 alice #a :tea"
    assert [line[:4] for line in names] == ["353 ", "366 "]
    assert irc_heard(house, "phone") == [joined, topic, set_by, "MARKREAD #a *", *names]
    assert irc_heard(house, "tablet") == [joined, topic, set_by]
    assert irc_heard(house, "bob") == [joined]
    house.say("phone", "JOIN #A")
    house.turn()
    assert irc_heard(house, "phone") == irc_heard(house, "alice") == []


def house_with_two_devices():
    """bob, and alice at two terminals; the second one came as alice2."""
    house = house_of("alice", "bob")
    house.say("alice", "/register password", "/join #a", "/join #lobby")
    house.turn()
    house.connect("laptop")
    house.say("laptop", "alice")
    house.turn()
    house.say("laptop", "/join #b", "/login password")
    house.turn()
    return house


def test_a_login_at_the_line_protocol_joins_the_user_who_is_here():
    house = house_with_two_devices()
    assert [line for line in house.heard("bob") if "alice2" in line] == [
        "alice2 (127.0.0.1:50002) joined the chat!",
        "alice2 (127.0.0.1:50002) left the chat!",
    ]
    told = house.heard("laptop")
    assert (
        told[0] == "* you are alice2: alice belongs to an account; if it is yours: /login PASSWORD"
    )
    assert told[-3:] == [
        "* you are logged in as alice",
        "* you are alice",
        "* you speak in #lobby now",
    ]
    assert list(house.hub.channels) == ["#lobby", "#a"]
    house.heard("alice")
    house.say("laptop", "from the laptop", "/tell bob in private")
    house.say("alice", "from the desk")
    house.say("bob", "both hear this", "/tell alice both hear that")
    house.turn()
    both = ["bob: both hear this", "(private) bob: both hear that"]
    assert house.heard("alice") == ["alice: from the laptop", *both]
    assert house.heard("laptop") == ["* told bob: in private", "alice: from the desk", *both]
    assert [line for line in house.heard("bob") if "alice" in line] == [
        "alice: from the laptop",
        "(private) alice: in private",
        "alice: from the desk",
        "* told alice: both hear that",
    ]


def test_a_device_that_leaves_leaves_the_other_here_and_the_last_one_is_missed():
    house = house_with_two_devices()
    user = house.guests["laptop"].user
    house.heard("bob")
    house.say("alice", "/quit")
    house.turn()
    house.say("laptop", "still here")
    house.turn()
    assert house.heard("bob") == ["alice: still here"] and user.live == [house.guests["laptop"]]
    house.leave("laptop")
    house.turn()
    assert house.missed == [user]
    house.connect("again")
    house.say("again", "alice")
    house.turn()
    house.say("again", "/login password")
    house.turn()
    assert house.guests["again"].user is user and len(house.hub.users) == 2
    assert sum("joined" in line for line in house.heard("bob")) == 1  # alice2, for a moment


def test_a_login_on_another_connection_moves_one_device_only_and_sends_others_no_line():
    house = house_of("alice", "bob", "carol")
    for who in ("alice", "bob"):
        house.say(who, "/register password")
        house.turn()
    house.connect("second")
    house.say("second", "bob")
    house.turn()
    house.say("second", "/login password")
    house.turn()
    house.say("second", "/login alice password")
    house.turn()
    for who in ("alice", "bob", "second"):
        house.heard(who)
    house.say("carol", "one", "two")
    house.turn()
    assert all(
        house.heard(who) == ["carol: one", "carol: two"] for who in ("bob", "second", "alice")
    )
    alice, bob = (house.guests[who].user for who in ("alice", "bob"))
    assert (len(alice.sessions), len(bob.sessions)) == (2, 1)


def test_private_talks_are_for_their_two_identities_only():
    house = House()
    house.enter_irc("alice", "bob", "carol")
    house.say("alice", "REGISTER * * password")
    house.turn()
    house.say("bob", "PRIVMSG alice :my secret")
    house.turn()
    house.say("bob", "QUIT")
    house.turn()
    house.say("carol", "NICK bob", "CHATHISTORY LATEST alice * 10", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert "my secret" not in str(house.heard("carol"))
    house.heard("alice")
    house.say("alice", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert house.heard("alice") == [":bob!~u@127.0.0.1 PRIVMSG alice :my secret"]
    house.say("alice", "QUIT")
    house.turn()
    house.connect_irc("thief")
    house.say("thief", "NICK alice", "USER u 0 * :r", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert "my secret" not in str(house.heard("thief"))
    logged_in(house, "home", "alice")
    house.say("home", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert "my secret" in str(house.heard("home"))


def test_only_the_author_or_an_operator_redacts_a_message():
    house = House()
    house.enter_irc("alice", "bob", "carol")
    for who in house.guests:
        house.say(who, "CAP REQ :message-tags draft/message-redaction echo-message", "JOIN #a")
    house.turn()
    ids = {}
    for who in ("alice", "bob"):
        house.heard(who)
        house.say(who, f"PRIVMSG #a :from {who}")
        house.turn()
        ids[who] = re.search("msgid=([0-9a-z]+)", house.heard(who)[-1])[1]
    for who in house.guests:
        house.heard(who)
    house.say("bob", f"REDACT #a {ids['alice']}")
    house.turn()
    assert "FAIL REDACT REDACT_FORBIDDEN #a" in house.heard("bob")[0]
    house.say("carol", f"REDACT #a {ids['bob']}")
    house.turn()
    assert "REDACT_FORBIDDEN" in house.heard("carol")[0]
    house.say("alice", f"REDACT #a {ids['bob']} :rude")
    house.turn()
    assert house.heard("carol")[0].endswith(f" REDACT #a {ids['bob']} :rude")
    assert texts(house.store, "#a") == ["from alice"]


def said_with_id(house, who, target, text):
    """Say it; the id that it got."""
    house.heard(who)
    house.say(who, f"PRIVMSG {target} :{text}")
    house.turn()
    return re.search("msgid=([0-9a-z]+)", house.heard(who)[-1])[1]


def indexed_words(store):
    """How often each word stands in the index, by the word."""
    index, counts = store.words.db, collections.Counter()
    for (part,) in index.execute("SELECT part FROM parts").fetchall():
        name = f"search_{part}"
        index.execute(f"CREATE VIRTUAL TABLE temp.v USING fts5vocab(main, {name}, 'col')")
        query = "SELECT term, cnt FROM temp.v WHERE col = 'text'"
        counts.update(dict(index.execute(query).fetchall()))
        index.execute("DROP TABLE temp.v")
    return counts


def counted_rows(store):
    store.count()
    return store.db.execute("SELECT sum(events) FROM targets").fetchone()[0]


def test_what_is_taken_back_is_neither_found_nor_counted(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice")
    house.say("alice", "CAP REQ :message-tags draft/message-redaction echo-message", "JOIN #a")
    house.turn()
    ids = [said_with_id(house, "alice", "#a", text) for text in ("keep this", "hide this", "me")]
    assert indexed_words(house.store) == {"keep": 1, "hide": 1, "this": 2, "me": 1}
    count = counted_rows(house.store)
    house.say("alice", f"REDACT #a {ids[1]}")
    house.turn()
    assert indexed_words(house.store) == {"keep": 1, "this": 1, "me": 1}
    assert counted_rows(house.store) == count  # the REDACT stands in its place
    house.say("alice", f"REDACT #a {ids[1]}", f"REDACT #a {ids[2]}", f"REDACT #a {ids[2]}")
    house.turn()
    assert indexed_words(house.store) == {"keep": 1, "this": 1}
    rows = house.store.db.execute("SELECT count(*) FROM events").fetchone()[0]
    house.store.close()
    with contextlib.closing(sqlite3.connect(folder / "chat.db")) as db:
        assert db.execute("SELECT events FROM targets").fetchall() == [(rows,)] == [(count,)]
    with contextlib.closing(sqlite3.connect(folder / "search.db")) as db:
        db.execute("INSERT INTO search_1 (search_1) VALUES ('integrity-check')")


def test_what_is_taken_back_before_it_can_be_searched_is_never_found():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "CAP REQ :message-tags draft/message-redaction echo-message", "JOIN #a")
    house.turn()
    first = said_with_id(house, "alice", "#a", "first")
    behind, house.store.words.behind = house.store.words.behind, set()  # it has no time just now
    late = said_with_id(house, "alice", "#a", "late")
    house.say("alice", f"REDACT #a {late}")
    house.turn()
    house.store.words.behind |= behind
    said_with_id(house, "alice", "#a", "last")
    assert indexed_words(house.store) == {"first": 1, "last": 1}
    house.say("alice", f"REDACT #a {first}", "RENAME #a #b")  # in the same turn
    house.turn()
    assert texts(house.store, "#b") == ["last"] and found(house.store, "#b", "first") == []


def test_the_end_of_the_grace_period_is_told_at_once_and_nothing_is_written_twice(
    running, folder, monkeypatch
):
    monkeypatch.setattr(chat, "GRACE_SECONDS", 0.1)
    server = running(data=folder)
    alice, bob = server.guest(), server.guest()
    alice.enter_irc("alice", "REGISTER * * password", "JOIN #a")
    bob.enter_irc("bob", "JOIN #a")
    alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    alice.close()
    assert bob.line() == ":alice!~u@127.0.0.1 QUIT :Connection lost\r"
    bob.send("REGISTER * * password\r\nPRIVMSG #a :kept\r\nPING 1\r\n")
    assert not any("NOT_KEPT" in line for line in bob.until("PONG"))
    with contextlib.closing(sqlite3.connect(folder / "chat.db")) as db:
        names = [row[0] for row in db.execute("SELECT name FROM accounts ORDER BY name")]
    assert names == ["alice", "bob"]


def test_the_next_owner_of_a_dropped_name_inherits_nothing():
    house = House()
    house.enter_irc("alice", "bob")
    for who in ("alice", "bob"):
        house.say(who, "REGISTER * * password")
        house.turn()
    house.say("alice", "PRIVMSG bob :the old secret")
    house.turn()
    waiting = house.connect_irc("waiting")
    blob = base64.b64encode(b"\0alice\0password").decode()
    house.say("waiting", "CAP REQ sasl", "AUTHENTICATE PLAIN", f"AUTHENTICATE {blob}")
    house.turn()
    house.say("alice", "NS DROP password")
    house.turn()
    house.say("alice", "QUIT")
    house.turn()
    house.enter_irc("stranger")
    house.say("stranger", "NICK alice", "REGISTER * * other")
    house.turn()
    house.say("stranger", "CAP REQ batch", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert "secret" not in str(house.heard("stranger"))
    house.say("waiting", "NICK alice", "USER w 0 * :w", "CAP END")
    house.turn()
    assert waiting.user is None or waiting.user.name == "alice2"
    assert house.guests["stranger"].user.live == [house.guests["stranger"]]


def test_proving_a_password_again_is_no_news_to_others():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password", "JOIN #a")
    house.say("bob", "CAP REQ account-notify", "JOIN #a")
    house.turn()
    house.heard("bob")
    house.say("alice", "NS PASSWD password other-password")
    house.turn()
    assert house.heard("bob") == [] and "another now" in house.heard("alice")[-1]
    house.say("alice", "NS DROP other-password")
    house.turn()
    assert house.heard("bob") == [":alice!~u@127.0.0.1 ACCOUNT *"]


def test_a_login_under_way_when_its_account_is_given_up_fails():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "REGISTER * * password")
    house.turn()
    blob = base64.b64encode(b"\0alice\0password").decode()
    house.connect_irc("late")
    house.say("late", "CAP REQ sasl", "AUTHENTICATE PLAIN", f"AUTHENTICATE {blob}")
    revision = house.hub.accounts["alice"].revision
    house.hub.perform("drop_account", house.guests["alice"].id, "alice", revision)
    house.turn()
    assert house.heard("late")[-1] == ":chat.py 904 * :name or password are wrong"
    assert house.guests["late"].account == ""


def test_failures_count_together_whichever_way_they_came():
    house = House()
    house.enter_irc("alice", "mallory")
    house.say("alice", "REGISTER * * password")
    house.turn()
    blob = base64.b64encode(b"\0alice\0wrong").decode()
    for _ in range(chat.LOGIN_TRIES - 1):
        house.say("mallory", "NS IDENTIFY alice wrong")
        house.turn()
    house.say("mallory", "AUTHENTICATE PLAIN", f"AUTHENTICATE {blob}")
    house.turn()
    house.heard("mallory")
    house.say("mallory", "NS IDENTIFY alice password")
    house.turn()
    assert "too many failures" in house.heard("mallory")[-1]


def test_a_name_that_another_device_has_is_taken():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "REGISTER * * password")
    house.turn()
    logged_in(house, "other", "alice")
    house.say("other", "QUIT")
    house.turn()
    house.connect_irc("third")
    blob = base64.b64encode(b"\0alice\0password").decode()
    house.say("third", "CAP REQ sasl", "NICK al2", "USER u 0 * :r", "AUTHENTICATE PLAIN")
    house.say("third", f"AUTHENTICATE {blob}")
    house.turn()
    house.say("third", "CAP END", "NICK alice")
    house.turn()
    assert ":chat.py 433 al2 alice :alice is taken" in house.heard("third")
    for who in ("alice", "third"):
        house.say(who, "QUIT")
    house.turn()
    assert house.hub.users == {}


def test_the_owner_of_a_name_gets_it_back_from_any_user():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password")
    house.turn()
    house.say("bob", "JOIN #a")
    account = house.hub.accounts.pop("alice")  # as if bob had come before there was an account
    house.say("alice", "QUIT")
    house.turn()
    house.say("bob", "NICK alice")
    house.turn()
    house.hub.accounts["alice"] = account
    house.heard("bob")
    logged_in(house, "home", "alice")
    assert house.heard("bob") == [":alice!~u@127.0.0.1 NICK :alice2"]
    assert house.guests["home"].user.name == "alice"


def test_a_secret_channel_is_closed_also_after_a_crash(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice")
    house.say("alice", "JOIN #s,#open", "MODE #s +s", "PRIVMSG #s :secret talk", "PRIVMSG #open :x")
    house.turn()
    house.store.close()  # no user left
    again = House(store=chat.Store(folder / "chat.db"))
    again.enter_irc("mallory")
    again.say(
        "mallory", "JOIN #s,#open", "CHATHISTORY LATEST #s * 9", "CHATHISTORY LATEST #open * 9"
    )
    again.turn()
    said = [line for line in again.heard("mallory") if "PRIVMSG" in line]
    assert said == [":alice!~u@127.0.0.1 PRIVMSG #open :x"]
    again.store.close()


@pytest.mark.parametrize(
    "line",
    ["HELP a b c", "IDENTIFY a b c", "PASSWD a b c", "DROP a b", "REGISTER a b c", "VERIFY a b"],
)
def test_a_word_too_many_for_nickserv_breaks_nothing(line):
    house = House()
    house.enter_irc("alice")
    house.say("alice", f"NS {line}", f"PRIVMSG NickServ :{line}")
    house.turn()
    assert all(" NOTICE alice :" in one or " 900 " in one for one in house.heard("alice"))


def test_what_one_device_does_in_the_turn_in_which_another_leaves_is_done():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password", "JOIN #a", "CAP REQ draft/read-marker")
    house.say("bob", "JOIN #a")
    house.turn()
    logged_in(house, "phone", "alice")
    house.say("phone", "CAP REQ draft/read-marker", "QUIT")
    house.say("alice", "MARKREAD #a timestamp=1970-01-02T00:00:00.000Z", "METADATA * SET a :b")
    house.say("alice", "RENAME #a #b")
    house.turn()
    assert ":chat.py MARKREAD #a timestamp=1970-01-02T00:00:00.000Z" in house.heard("alice")


def test_what_was_said_before_a_channel_was_renamed_has_its_old_name():
    house = House()
    house.enter_irc("alice", "bob")
    for who in ("alice", "bob"):
        house.say(who, "CAP REQ draft/channel-rename", "JOIN #a")
    house.turn()
    house.heard("bob")
    house.say("alice", "PRIVMSG #a :before", "RENAME #a #b", "PRIVMSG #b :after")
    house.turn()
    mask = ":alice!~u@127.0.0.1"
    assert house.heard("bob") == [
        f"{mask} PRIVMSG #a :before",
        f"{mask} RENAME #a #b :",
        f"{mask} PRIVMSG #b :after",
    ]
    assert texts(house.store, "#b") == ["before", "after"] and texts(house.store, "#a") == []


def found(store, key, words, count=1000):
    """The texts that a search there gives, in their order."""
    place = chat.Place((key,))
    events = store.words.search([place], words, chat.Span(place), count)
    return [event.text for _, event in events]


def test_a_reader_of_the_store_reuses_a_connection_unless_its_job_failed(folder, monkeypatch):
    house, opened, connect = House(store=chat.Store(folder / "chat.db")), [], chat.connect
    monkeypatch.setattr(chat, "connect", lambda *how: opened.append(how) or connect(*how))
    house.enter_irc("alice")
    house.say("alice", "JOIN #a")
    for n in range(5):
        house.say("alice", f"PRIVMSG #a :{n}")
        house.turn()
        assert texts(house.store, "#a")[-1] == found(house.store, "#a", f"{n}")[-1] == f"{n}"
    assert len(opened) == 2  # one for each file
    with pytest.raises(sqlite3.Error), house.store.reading() as db:
        db.execute("SELECT nothing")
    assert texts(house.store, "#a")[-1] == "4" and len(opened) == 3
    with house.store.reading(), house.store.reading() as db:  # two helpers at once
        assert db.execute("SELECT count(*) FROM targets").fetchone() == (1,)
    assert len(opened) == 4
    house.store.close()


@pytest.fixture
def small_parts(monkeypatch):
    """An index in parts of 50 messages, of which 10 ids are taken at a time."""
    monkeypatch.setattr(chat, "PART_ROWS", 50)
    monkeypatch.setattr(chat, "INDEX_IDS", 10)


def test_a_search_between_two_times_reads_only_the_messages_between_them():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "JOIN #a")
    for n in range(60):
        house.say("alice", f"PRIVMSG #a :word {n}")
        house.turn()
    words, read, ids_of = house.store.words, [], house.store.words._ids
    times = [
        row[0] for row in house.store.db.execute("SELECT time FROM events WHERE kind = 'message'")
    ]
    words._ids = lambda *values: ([read.append(id), id][1] for id in ids_of(*values))
    place = chat.Place(("#a",))
    for after, before, texts in (
        (times[10], times[14], ["word 11", "word 12", "word 13"]),
        (times[-1] + 10**9, None, []),
        (None, times[2], ["word 0", "word 1"]),
    ):
        read.clear()
        marks = [time and chat.Mark(time=time) for time in (after, before)]
        found = words.search([place], "word", chat.Span(place, chat.SPOKEN, *marks), 50)
        assert [event.text for _, event in found] == texts
        assert len(read) == len(texts)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_search_goes_through_as_many_parts_of_the_index_as_it_takes(folder, small_parts, on_disk):
    house = House(store=chat.Store(folder / "chat.db" if on_disk else None))
    house.enter_irc("alice", "bob")
    house.say("alice", "JOIN #busy,#quiet", "AWAY")
    for n in range(400):
        house.say("alice", f"PRIVMSG #busy :number {n} {'odd' if n % 2 else 'even'}")
        if n % 100 == 0:
            house.say("alice", f"PRIVMSG #quiet :number {n}")
            house.turn()
    house.turn()
    for again in (False, True) if on_disk else (False,):
        store = chat.Store(folder / "chat.db") if again else house.store
        numbers = [f"number {n} {'odd' if n % 2 else 'even'}" for n in range(400)]
        assert found(store, "#busy", "number") == numbers
        assert found(store, "#busy", "EVEN number", 70) == numbers[::2][-70:]
        assert found(store, "#busy", "number 7") == [numbers[7]]
        assert found(store, "#quiet", "number") == [f"number {n}" for n in (0, 100, 200, 300)]
        assert found(store, "#busy", "nothing") == found(store, "#none", "number") == []
        assert store.words.db.execute("SELECT sum(messages) FROM parts").fetchone() == (404,)
        assert store.words.db.execute("SELECT count(*) FROM parts").fetchone()[0] >= 9
        store.close()


def test_parts_of_the_index_go_with_the_messages_that_they_were_of(folder, small_parts):
    store = chat.Store(folder / "chat.db", keep=100)
    house = House(store=store)
    house.enter_irc("alice")
    house.say("alice", "JOIN #busy,#quiet", "PRIVMSG #quiet :stays")
    for n in range(400):
        house.say("alice", f"PRIVMSG #busy :number {n}")
    for _ in range(3):  # turns enough for the counts to be looked at
        house.turn()
    while store.prune(idle=True, now=0):
        pass
    index_all(store)
    assert found(store, "#busy", "number") == [f"number {n}" for n in range(300, 400)]
    assert found(store, "#quiet", "stays") == ["stays"]
    index = store.words.db
    tables = {row[0] for row in index.execute("SELECT name FROM sqlite_master")}
    parts = {f"search_{row[0]}" for row in index.execute("SELECT part FROM parts")}
    assert len(parts) <= 4 and parts <= tables
    assert len([name for name in tables if re.fullmatch(r"search_\d+", name)]) == len(parts)
    house.say("alice", "PRIVMSG #busy :number 400")
    house.turn()
    assert found(store, "#busy", "number", 2) == ["number 399", "number 400"]
    store.close()


@pytest.mark.parametrize("how", ["gone", "junk", "behind"])
def test_the_index_is_made_from_the_messages_whenever_it_is_needed(folder, how):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice")
    house.say("alice", "JOIN #a", "PRIVMSG #a :said before")
    house.turn()
    index = (folder / "search.db").read_bytes()
    house.say("alice", "PRIVMSG #a :said later")
    house.turn()
    house.store.close()
    path = folder / "search.db"
    path.unlink()
    if how != "gone":
        path.write_bytes(index if how == "behind" else b"junk" * 5000)
    store = chat.Store(folder / "chat.db")
    index_all(store)
    assert found(store, "#a", "said") == ["said before", "said later"]
    store.close()


def test_renaming_a_channel_onto_an_empty_one_does_not_delete_the_history_of_that_one():
    house = House()
    house.enter_irc("alice", "mallory")
    house.say("alice", "JOIN #a", "PRIVMSG #a :for all to read", "JOIN #b,#s", "MODE #s +s")
    house.turn()
    house.say("alice", "PART #a,#b,#s")
    house.say("mallory", "JOIN #c")
    house.turn()
    for name in ("#a", "#A", "#b"):
        house.heard("mallory")
        house.say("mallory", f"RENAME #c {name}")
        house.turn()
        assert house.heard("mallory")[0].startswith(
            f":chat.py FAIL RENAME CHANNEL_NAME_IN_USE #c {name} :"
        )
    house.say("mallory", "RENAME #c #s")  # no user can read that any more
    house.turn()
    assert "JOIN #s" in str(house.heard("mallory"))
    assert texts(house.store, "#a") == ["for all to read"]


def test_a_channel_can_have_its_old_name_back_and_others_can_have_it_meanwhile():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "CAP REQ draft/channel-rename", "JOIN #a", "PRIVMSG #a :one")
    house.say("bob", "CAP REQ draft/channel-rename", "JOIN #other", "PRIVMSG #other :two")
    house.turn()
    house.say("alice", "RENAME #a #b")
    house.say("bob", "RENAME #other #a")  # in the same turn: nothing is left there
    house.turn()
    assert (texts(house.store, "#a"), texts(house.store, "#b")) == (["two"], ["one"])
    house.say("bob", "RENAME #a #elsewhere")
    house.say("alice", "RENAME #b #A", "RENAME #A #b", "RENAME #b #B", "RENAME #B #a")
    house.turn()
    assert "FAIL" not in str(house.heard("alice") + house.heard("bob"))
    assert texts(house.store, "#a") == ["one"] and texts(house.store, "#b") == []


def markers_told(house, who, *names):
    house.heard(who)
    house.say(who, *(f"MARKREAD {name}" for name in names))
    house.turn()
    return [line.split()[-1] for line in house.heard(who)]


def test_how_far_a_channel_has_been_read_goes_with_its_new_name(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice", "bob", "carol")
    for who in ("alice", "carol"):
        house.say(who, "REGISTER * * password")
        house.turn()
    early, late = (f"timestamp=1970-01-0{day}T00:00:00.000Z" for day in (2, 3))
    house.say("alice", "JOIN #a", f"MARKREAD #a {late}", f"MARKREAD #b {early}")
    house.say("bob", f"MARKREAD #a {early}")
    house.say("carol", f"MARKREAD #b {late}")
    house.turn()
    house.say("alice", "RENAME #a #b", "RENAME #b #B")
    house.turn()
    for who, told in (("alice", late), ("bob", early), ("carol", "*")):
        assert markers_told(house, who, "#a", "#b") == ["*", told]
    house.store.close()
    again = chat.Store(folder / "chat.db")
    hub = chat.load_hub(again, house.now, house.now)
    kept = [marks for owner, marks in hub.markers.items() if marks]
    assert kept == [{"#b": (2 * 24 * 3600 * 1000, 0)}]
    again.close()


def test_failed_logins_keep_no_password_in_memory():
    house = House()
    house.enter_irc("alice")
    blob = base64.b64encode(b"\0alice\0hunter2").decode()
    one, other = chat.wrong_login(), chat.wrong_login()
    assert one is not other
    house.say("alice", "AUTHENTICATE PLAIN", f"AUTHENTICATE {blob}")
    house.turn()
    assert " 904 " in house.heard("alice")[-1]


def test_private_messages_with_an_absent_user_are_found_by_account():
    house = House()
    house.enter_irc("alice", "bob")
    for who in ("alice", "bob"):
        house.say(who, "REGISTER * * password")
        house.turn()
    house.say("alice", "PRIVMSG bob :see you")
    house.say("bob", "QUIT")
    house.turn()
    house.heard("alice")
    house.say("alice", "CHATHISTORY LATEST bob * 10")
    house.turn()
    assert house.heard("alice") == [":alice!~u@127.0.0.1 PRIVMSG bob :see you"]


def test_what_is_not_kept_is_not_echoed_and_its_speaker_told_which_it_was():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "CAP REQ :echo-message message-tags labeled-response", "JOIN #a")
    house.say("bob", "JOIN #a")
    house.turn()
    house.heard("alice")
    house.heard("bob")
    house.say("alice", "@label=1 PRIVMSG #a :lost")
    message_id = house.hub.ids.text(house.hub.last_id)
    house.hub.turn.not_kept("disk full")
    house.turn()
    text = "delivered but not kept: disk full"
    assert house.heard("alice") == [f"@label=1 :chat.py FAIL PRIVMSG NOT_KEPT {message_id} :{text}"]
    assert house.heard("bob") == [":alice!~u@127.0.0.1 PRIVMSG #a :lost"]


def test_a_user_in_the_grace_period_can_be_killed():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "REGISTER * * password", "JOIN #a")
    house.say("bob", "JOIN #a", "OPER boss secret")
    house.turn()
    house.leave("alice")
    house.turn()
    house.heard("bob")
    house.say("bob", "KILL alice :gone")
    house.turn()
    assert house.heard("bob") == [":alice!~u@127.0.0.1 QUIT :Killed (bob (gone))"]
    assert "alice" not in house.hub.users


def test_history_is_found_by_time_and_by_id_in_the_middle_of_much(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice")
    house.say("alice", "JOIN #a")
    for n in range(300):
        house.say("alice", f"PRIVMSG #a :{n}")
        house.turn()
    span = chat.Span(chat.Place(("#a",)))
    events = house.store.history.page(span, 500)
    assert [event.text for event in events] == [str(n) for n in range(300)]
    for n in (0, 1, 150, 299):
        for mark in (chat.Mark(events[n].id), chat.Mark(time=events[n].time)):
            before = house.store.history.page(span._replace(before=mark), 5)
            after = house.store.history.page(span._replace(after=mark), 5, newest=False)
            around = house.store.history.around(span, mark, 5)
            assert [e.text for e in before] == [str(k) for k in range(max(0, n - 5), n)]
            assert [e.text for e in after] == [str(k) for k in range(n + 1, min(300, n + 6))]
            assert str(n) in [e.text for e in around]
    house.store.close()


def test_a_page_of_a_million_messages_is_found_at_once(folder):
    store = chat.Store(folder / "chat.db")
    store.db.execute("INSERT INTO targets (key, events) VALUES ('#a', 1000000)")
    base = 1_700_000_000_000
    rows = (
        (
            1,
            n + 1,
            base + n,
            "message",
            "a",
            "h:1",
            str(n),
            "u",
            "",
            "",
            "",
        )
        for n in range(100_000)  # a tenth, to be quick here; the depth of the tree is the same
    )
    store.db.execute("BEGIN")
    store.db.executemany(chat.INSERT_EVENT, rows)
    store.db.execute("COMMIT")
    span, middle = chat.Span(chat.Place(("#a",))), chat.Mark(time=base + 50_000)
    for job in (
        lambda: store.history.page(span, 100),
        lambda: store.history.page(span._replace(before=middle), 100),
        lambda: store.history.page(span._replace(after=middle), 100, newest=False),
        lambda: store.history.around(span, middle, 100),
    ):
        began = time.perf_counter()
        assert len(job()) == 100
        assert time.perf_counter() - began < 0.1  # milliseconds, but machines are shared
    store.close()


@pytest.mark.parametrize(
    "host, own, key",
    [
        ("[2001:db8:1:2::3]", "::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9%eth0", "10.0.0.1", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::3]", "[2001:db8:1:2::1]", "2001:db8:1:2::3"),  # a LAN is one network
        ("fe80::1%eth0", "", "fe80::1"),
        ("[::1]", "", "::1"),
        ("10.0.0.1", "", "10.0.0.1"),
    ],
)
def test_an_ipv6_address_counts_as_its_network_unless_others_share_that(host, own, key):
    assert chat.address_key(host, own) == key


@pytest.mark.parametrize("name", ["x" * 16_000, "\ufdfa" * 5000, MARKS])
def test_an_attempt_at_a_long_name_takes_little_memory(name):
    throttle = chat.Throttle()
    throttle.failed("10.0.0.1", name, 10**9)
    assert sum(len((key or "").encode()) for _, key in throttle.failures) < 2000
    assert throttle.count("10.0.0.1", name, 10**9) == 1
    throttle.succeeded("10.0.0.1", name)
    assert not throttle.failures


def test_the_passwords_of_the_server_and_its_operators_may_be_tried_more_often():
    throttle, now = chat.Throttle(), 10**9
    for subject, most in (("alice", chat.LOGIN_TRIES), ("*oper", chat.LOGIN_TRIES_SERVER)):
        for _ in range(most):
            throttle.check("10.0.0.1", subject, now)
            throttle.failed("10.0.0.1", subject, now)
        with pytest.raises(chat.Refused):
            throttle.check("10.0.0.1", subject, now)


# ======================================================================================
# DOMAIN
# ======================================================================================


def test_a_channel_without_members_is_gone_and_its_next_founder_operates_it():
    house = house_of("alice", "bob")
    house.say("alice", "/join #a", "/topic x", "/part")
    house.turn()
    assert list(house.hub.channels) == [chat.LOBBY]
    house.say("bob", "/join #a", "/topic")
    house.turn()
    assert house.heard("bob")[-2:] == ["* #a 1-1 of 1: @bob", "* the topic of #a is not set"]


def test_a_user_who_joins_in_the_middle_of_a_turn_hears_only_what_follows():
    house = house_of("alice", "bob")
    house.say("alice", "/join #a", "before")
    house.say("bob", "/join #a")
    house.say("alice", "after")
    house.say("bob", "/part #a")
    house.say("alice", "too late")
    house.say("bob", "/join #a")
    house.say("alice", "again")
    house.turn()
    assert [line for line in house.heard("bob") if "alice:" in line] == [
        "[#a] alice: after",
        "[#a] alice: again",
    ]


def test_times_are_unique_in_a_channel_and_fall_with_the_clock():
    house = house_of("alice", "bob")
    for now in (house.now, house.now, house.now - 50, house.now + 0.001):
        house.hub.begin(now)
        house.say("alice", *["x"] * 1500)
        events = house.hub.turn.events[-1500:]
        times = [event.time for event in events]
        assert times == sorted(times) and times[-1] <= now * 1000 + 1000
        assert len(set(times[:1000])) == 1000 or now == house.now or now > house.now
    events = house.hub.turn.events
    assert events[3000].time == (house.now - 50) * 1000
    ids = [event.id for event in events]
    assert ids == sorted(set(ids))


class NaiveRoom:
    """Return what all should hear, worked out the slow way: each line to each member at
    the moment it is said."""

    def __init__(self):
        self.members = collections.defaultdict(list)  # of a channel
        self.heard = collections.defaultdict(list)
        self.names = {}

    def tell(self, audience, line, but):
        for who in audience:
            if who != but:
                self.heard[who].append(line)

    def near(self, who):
        rooms = (room for room in self.members.values() if who in room)
        return dict.fromkeys(itertools.chain(*rooms))


def test_all_users_hear_what_a_naive_server_would_send_in_the_same_order(seeded):
    for _ in range(60):
        people = ["ann", "ben", "cat", "dan", "eve"]
        house, naive = house_of(*people), NaiveRoom()
        naive.members[chat.LOBBY] = list(people)
        naive.names = {who: who for who in people}
        present = list(people)
        for step in range(40):
            if seeded.random() < 0.25:
                house.turn()
            if not present:
                break
            random_step(seeded, house, naive, present, step)
        house.turn()
        for who in people:
            told = [
                line for line in house.heard(who) if not line.startswith(("* you", "* the", "* #"))
            ]
            assert told == naive.heard[who], who


def random_step(seeded, house, naive, present, step):
    """One thing that a user does, in the house and in the model."""
    who, channel = seeded.choice(present), seeded.choice((chat.LOBBY, "#a", "#b"))
    room, name = naive.members[channel], naive.names[who]
    prefix = "" if channel == chat.LOBBY else f"[{channel}] "
    address = house.guests[who].conn.address
    action = seeded.choices(("say", "join", "part", "nick", "tell", "quit"), (9, 3, 2, 1, 2, 0.3))[
        0
    ]
    if action == "say" and who in room:
        house.say(who, f"/tell {channel} {step}")
        naive.heard[who].append(f"* told {channel}: {step}")
        naive.tell(room, f"{prefix}{name}: {step}", who)
    elif action == "join" and who not in room:
        naive.tell(room, f"{prefix}{name} ({address}) joined the chat!", who)
        room.append(who)
        house.say(who, f"/join {channel}")
    elif action == "part" and who in room:
        house.say(who, f"/part {channel}")
        naive.tell(room, f"{prefix}{name} ({address}) left the chat!", who)
        room.remove(who)
    elif action == "nick":
        house.say(who, f"/nick {who}{step}")
        naive.tell(naive.near(who), f"* {name} is now called {who}{step}", who)
        naive.names[who] = f"{who}{step}"
    elif action == "tell":
        other = seeded.choice(present)
        house.say(who, f"/tell {naive.names[other]} {step}")
        naive.tell([other], f"(private) {name}: {step}", who)
        naive.heard[who].append(f"* told {naive.names[other]}: {step}")
    elif action == "quit":
        house.leave(who)
        naive.tell(naive.near(who), f"{name} ({address}) left the chat!", who)
        present.remove(who)
        for room in naive.members.values():
            if who in room:
                room.remove(who)


def test_a_crowd_that_leaves_at_once_costs_no_more_than_what_is_heard_of_it(monkeypatch):
    house = house_of(*(f"n{n}" for n in range(300)), "watcher")
    looked, spans = [], chat.Channel.membership_spans
    count = lambda *given: looked.append(given) or spans(*given)  # noqa: E731
    monkeypatch.setattr(chat.Channel, "membership_spans", count)
    for n in range(300):
        house.guests[f"n{n}"].conn.gone = n % 2 == 0  # half of them can still be written to
        house.leave(f"n{n}")
    house.turn()
    assert len(house.heard("watcher")) == 300
    assert len(looked) <= 150
    assert house.heard("n0") == [] and len(house.heard("n299")) == 299


def test_a_storm_is_encoded_once_and_shared():
    house = house_of(*(f"n{n}" for n in range(50)))
    house.say("n0", *["x"] * 100)
    deliveries = list(house.hub.turn.deliveries())
    shared = [(data, sessions) for data, sessions in deliveries if len(sessions) > 1]
    assert len(shared) == 1
    assert len(shared[0][1]) == 49
    assert shared[0][0] == b"n0: x\n" * 100


# NAMES

# All of Default_Ignorable_Code_Point, by a member of each range (Unicode 15, DerivedCoreProperties)
IGNORABLE = [
    *(
        0x00AD,
        0x034F,
        0x061C,
        0x115F,
        0x1160,
        0x17B4,
        0x17B5,
        0x180B,
        0x180C,
        0x180D,
        0x180E,
        0x180F,
    ),
    *(0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x202A, 0x202E, 0x2060, 0x2065, 0x206F, 0x3164),
    *(0xFE00, 0xFE0E, 0xFE0F, 0xFEFF, 0xFFA0, 0xFFF0, 0xFFF8, 0x1BCA0, 0x1BCA3, 0x1D173, 0x1D17A),
    *(0xE0000, 0xE0001, 0xE0020, 0xE007F, 0xE0100, 0xE01EF, 0xE01F0, 0xE0FFF),
]
PLACES_OF_IT = {"start": "{}bob", "middle": "b{}ob", "end": "bob{}"}
INVISIBLE = in_turn(IGNORABLE if THOROUGH else IGNORABLE[::3], PLACES_OF_IT, [False, True])


def as_id(value):
    return f"{value:04X}" if isinstance(value, int) and value > 1 else str(value)


# Refused with 432 in IRC, at any position. Also: the first NICK and a later one.
@pytest.mark.parametrize("code, place, later", INVISIBLE, ids=as_id)
def test_a_nick_with_an_invisible_character_is_refused(code, place, later):
    house = House()
    account(house, "bob")
    name = PLACES_OF_IT[place].format(chr(code))
    if later:
        come(house, "alice")
    else:
        house.connect_irc("alice")
    lines = ask(house, "alice", f"NICK {name}")
    assert refused(lines, "432") and not refused(lines, "NICK")
    lines = ask(house, "alice", *([] if later else ["USER u 0 * :r", "NICK fine"]), "PING x")
    assert refused(lines, "PONG") and name not in str(lines)


# Replaced in the line protocol. Also: the first line and /nick.
@pytest.mark.parametrize("code, place, later", INVISIBLE, ids=as_id)
def test_an_invisible_character_in_a_line_protocol_name_becomes_an_underscore(code, place, later):
    house = House()
    account(house, "bob")
    come(house, "alice")
    name = PLACES_OF_IT[place].format(chr(code))
    if later:
        house.enter("dora")
        house.say("dora", f"/nick {name}")
    else:
        house.connect("dora")
        house.say("dora", name)
    house.turn()
    house.heard("alice")
    house.say("dora", "/tell alice hello")
    house.turn()
    (line,) = house.heard("alice")
    sender = re.search(r" :([^! ]+)!", line)[1]
    expected = {name.replace(chr(code), "_")}
    if (code, place, later) == (0xFEFF, "start", False):
        expected.add("bob2")  # a BOM before a first line may be dropped
    assert sender in expected and chr(code) not in line


# The names of services. SASL, NICK and NOTICE with them are the victim's view of them.
@pytest.mark.parametrize(
    "code, service",
    in_turn([0x034F, 0xFE0F, 0x17B4, 0x180B, 0xE0100], ["NickServ", "ChanServ", "HistServ"]),
)
def test_a_copy_of_a_service_cannot_send_a_notice(service, code):
    house = House()
    come(house, "alice", "eve")
    house.enter("dora")
    name = service + chr(code)
    assert refused(ask(house, "eve", f"NICK {name}"), "432")
    house.say("dora", f"/nick {name}")
    house.turn()
    house.heard("alice")
    house.say("eve", "NOTICE alice :your password, please")
    house.say("dora", "/tell alice your password, please")
    house.turn()
    heard = house.heard("alice")
    assert len(heard) == 2 and chr(code) not in str(heard)
    assert not any(f":{service}!" in line for line in heard)


# Channels have the same fault. Also: JOIN, RENAME, line protocol.
@pytest.mark.parametrize("code, place, _", INVISIBLE, ids=as_id)
def test_a_channel_with_an_invisible_character_in_its_name_cannot_be(code, place, _):
    house = House()
    come(house, "alice")
    house.enter("dora")
    ask(house, "alice", "JOIN #bob,#mine")
    name = "#" + PLACES_OF_IT[place].format(chr(code))
    assert refused(ask(house, "alice", f"JOIN {name}"), "476", "479", "403")
    assert refused(ask(house, "alice", f"RENAME #mine {name}"), "476", "479", "CANNOT_RENAME")
    house.say("dora", f"/join {name}", "/list")
    house.turn()
    assert chr(code) not in str(ask(house, "alice", "LIST", "PRIVMSG #mine :still #mine"))
    assert " PRIVMSG #mine " in str(ask(house, "alice", "PRIVMSG #mine :still"))


# A name given by REGISTER.
@pytest.mark.parametrize("code", [0x034F, 0xFE0F, 0xE0100], ids=as_id)
def test_an_account_with_an_invisible_character_cannot_be_made(code):
    house = House()
    come(house, "alice")
    lines = ask(house, "alice", f"REGISTER alice{chr(code)} * password")
    assert " FAIL REGISTER " in str(lines) and "SUCCESS" not in str(lines)


# What people say keeps its emoji sequences; only names are restricted.
@pytest.mark.parametrize("text", ["\u2764\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467"])
def test_a_message_keeps_its_joiners_and_variation_selectors(text):
    house = House()
    come(house, "alice", "bob")
    house.say("alice", f"PRIVMSG bob :{text}")
    house.turn()
    assert spoken(house.heard("bob")) == [text]


SEPARATORS = ["\u2028", "\u2029", "\x85"]
REACHING_NETCAT = {  # what an IRC user does with | (a separator) inside, for dora in #a to read
    "message": "PRIVMSG #a :left|right",
    "notice": "NOTICE #a :left|right",
    "private": "PRIVMSG dora :left|right",
    "action": "PRIVMSG #a :\x01ACTION left|right\x01",
    "ctcp": "PRIVMSG dora :\x01PING left|right\x01",
    "topic": "TOPIC #a :left|right",
    "kick": "KICK #a bob :left|right",
    "part": "PART #a :left|right",
    "quit": "QUIT :left|right",
    "rename": "RENAME #a #b :left|right",
    "password": "MODE #a +k left|right",
    "mask": "MODE #a +b left|right!*@*",
    "wallops": "WALLOPS :left|right",
    "realname": "SETNAME :left|right",
    "metadata": "METADATA #a SET color :left|right",
}


# U+2028/2029 must never reach netcat (and U+0085, which some terminals take for a line end).
@pytest.mark.parametrize("act, separator", in_turn(REACHING_NETCAT, SEPARATORS), ids=ascii)
def test_a_unicode_line_separator_does_not_reach_netcat(act, separator):
    house = House()
    come(house, "alice", "bob")
    house.enter("dora")
    for who in ("alice", "bob"):
        ask(house, who, "JOIN #a")
    ask(house, "alice", "OPER boss secret")
    house.say("dora", "/join #a")
    house.turn()
    house.say("alice", REACHING_NETCAT[act].replace("|", separator))
    house.turn()
    house.say("dora", "/topic", "/ban", "/mode", "/names", "/list", "/history", "/search left")
    house.turn()
    heard = house.guests["dora"].conn.out.decode()
    assert not set(heard) & {"\u2028", "\u2029", "\x85"}
    if act in ("message", "notice", "private", "action", "topic"):
        assert "left" in heard and "right" in heard


# What the netcat user typed and is told again, and what another netcat user typed.
TYPED = (
    *("x{}y", "/search x{}y", "/tell bob x{}y", "/topic x{}y", "/away x{}y", "/join #x{}y"),
    *("/nick x{}y", "/me x{}y", "/foo{}y", "/mode +k x{}y", "/lines x{}y", "/help x{}y"),
)


@pytest.mark.parametrize("line, separator", in_turn(TYPED, SEPARATORS), ids=ascii)
def test_a_unicode_line_separator_is_not_told_to_the_user_who_typed_it(line, separator):
    house = House()
    house.enter("dora", "bob")
    house.say("dora", "/join #a")
    house.say("bob", "/join #a", "/away")
    house.turn()
    house.say("dora", line.format(separator))
    house.turn()
    house.say("bob", "/tell dora x", "/history", "/names")
    house.turn()
    for who in ("dora", "bob"):
        heard = house.guests[who].conn.out.decode()
        assert not set(heard) & {"\u2028", "\u2029", "\x85"}


LOOKALIKES = [  # the account or service, and names in other letters that look like it
    ("alice", "\u0430lice"),  # Cyrillic a
    ("alice", "ali\u0441e"),  # Cyrillic es
    ("alice", "\u03b1lice"),  # Greek alpha
    ("alice", "\u0251lice"),  # Latin alpha
    ("alice", "al\u0456c\u0435"),  # Cyrillic i, ie
    ("alice", "\u0410L\u0406\u0421\u0415"),  # capitals
    ("boss", "b\u03bfss"),  # Greek omicron
    ("boss", "b\u043e\u0455\u0455"),  # Cyrillic o, dze
    ("cop", "\u0441\u043e\u0440"),  # whole script: Cyrillic es o er
    ("nickserv", "N\u0456ckServ"),
    ("nickserv", "NickSer\u03bd"),
    ("chanserv", "\u0421hanServ"),
    ("histserv", "HistS\u0435rv"),
]


# Refused with the reason (432 or 433). Also: first NICK, later
# NICK, and SASL is no way round.
@pytest.mark.parametrize("original, copy, later", in_turn(LOOKALIKES, [False, True]))
def test_a_look_alike_of_a_service_or_account_is_refused(original, copy, later):
    house = House()
    account(house, "alice", "boss", "cop")
    come(house, "zoe") if later else house.connect_irc("zoe")
    lines = ask(house, "zoe", f"NICK {copy}")
    assert refused(lines, "432", "433")
    if not later:
        assert " 001 zoe2 " in str(ask(house, "zoe", "NICK zoe2", "USER u 0 * :r"))


# The line protocol gives another name and says why.
@pytest.mark.parametrize("original, copy, later", in_turn(LOOKALIKES, [False, True]))
def test_a_look_alike_in_the_line_protocol_is_another_name(original, copy, later):
    house = House()
    account(house, "alice", "boss", "cop")
    come(house, "zoe")
    house.enter("dora") if later else house.connect("dora")
    house.say("dora", f"/nick {copy}" if later else copy)
    house.turn()
    told = house.heard("dora")
    assert any(line.startswith("* ") for line in told)
    house.heard("zoe")
    house.say("dora", "/tell zoe hello")
    house.turn()
    (line,) = house.heard("zoe")
    assert f":{copy}!" not in line


ACCEPTED = [  # with the account alice and the services there are
    "a1ice", "aIice", "A11CE", "rnary", "b0ss", "N1ckServ", "vvilly",  # ASCII
    "\u0410\u043b\u0438\u0441\u0430", "\u041f\u0451\u0442\u0440", "\u738b\u5c0f\u660e",
    "\u0395\u03bb\u03ad\u03bd\u03b7", "\u039d\u03af\u03ba\u03bf\u03c2", "\u05d3\u05d5\u05d3",
    "\u0645\u0631\u064a\u0645", "\u0e2a\u0e21\u0e0a\u0e32\u0e22", "alic\u00e9", "\u00e1lice",
    "\u0441\u043e\u0440",  # looks like "cop", which is no account here
    "\U0001f600",
]  # fmt: skip


# Names that use only ASCII never collide; other scripts stay welcome.
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_name_that_looks_like_no_service_or_account_is_accepted(name):
    house = House()
    account(house, "alice", "mary", "willy", "boss")
    come(house, "zoe", "bob")
    lines = ask(house, "zoe", f"NICK {name}")
    assert any(line.endswith(f" NICK :{name}") for line in lines)
    house.say("zoe", "PRIVMSG bob :hello")
    house.turn()
    assert f":{name}!" in house.heard("bob")[-1]


# REGISTER under a name taken before there was the account that it looks like.
def test_a_look_alike_of_an_account_cannot_be_registered():
    house = House()
    come(house, "zoe")
    ask(house, "zoe", "NICK \u0430lice")  # there is no account alice yet
    account(house, "alice")
    for line in ("REGISTER * * password", "NS REGISTER password"):
        lines = ask(house, "zoe", line)
        assert "SUCCESS" not in str(lines) and not refused(lines, "900")
    assert not sasl(house, "zoe", "\u0430lice")


# After a restart, and free again when the account is given up.
def test_a_look_alike_is_refused_after_a_restart_and_until_the_account_is_dropped(folder):
    house = stored(folder)
    account(house, "alice")
    house = restarted(house, folder / "chat.db")
    come(house, "zoe")
    device(house, "alice", "alice")
    assert refused(ask(house, "zoe", "NICK \u0430lice"), "432", "433")
    ask(house, "alice", "NS DROP password")
    assert " NICK :\u0430lice" in str(ask(house, "zoe", "NICK \u0430lice"))
    house.store.close()


# Existing accounts remain: an account in other letters keeps its name, also after a restart.
def test_an_account_in_other_letters_keeps_its_name(folder):
    house = stored(folder)
    account(house, "\u0441\u043e\u0440")  # Cyrillic, looks like "cop"
    house = restarted(house, folder / "chat.db")
    assert " 001 \u0441\u043e\u0440 " in str(device(house, "owner", "\u0441\u043e\u0440"))
    house.store.close()


BANS_OF_BOB = {"ban": "bob!*@*", "mute": "m:bob", "mask": "b?b*!*@*"}


# A nick change does not escape a ban or mute by nick (437).
@pytest.mark.parametrize("ban", BANS_OF_BOB)
@pytest.mark.parametrize("dialect", ["irc", "line"])
def test_a_nick_change_does_not_escape_a_ban_or_mute(ban, dialect):
    house = House()
    come(house, "alice")
    come(house, "bob") if dialect == "irc" else house.enter("bob")
    nick, join = ("NICK {}", "JOIN #a") if dialect == "irc" else ("/nick {}", "/join #a")
    ask(house, "alice", "JOIN #a")
    ask(house, "bob", join)
    ask(house, "alice", f"MODE #a +b {BANS_OF_BOB[ban]}")
    lines = ask(house, "bob", nick.format("robert"))
    if dialect == "irc":
        assert refused(lines, "437")
    else:
        assert lines[0].startswith("* ") and "robert" not in str(house.heard("alice"))
    assert "robert" not in str(ask(house, "alice", "NAMES #a"))
    house.heard("bob")
    ask(house, "alice", f"MODE #a -b {BANS_OF_BOB[ban]}")
    ask(house, "bob", nick.format("robert"))
    assert "robert" in str(ask(house, "alice", "NAMES #a"))


# Other users of the channel, and a user who is exempt or elsewhere, change as they like.
@pytest.mark.parametrize("why", ["not banned", "exempt", "not in the channel"])
def test_a_nick_change_of_a_user_whom_no_ban_concerns_is_free(why):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #a")
    if why != "not in the channel":
        ask(house, "bob", "JOIN #a")
    mask = "carol!*@*" if why == "not banned" else "bob!*@*"
    ask(house, "alice", f"MODE #a +b {mask}")
    if why == "exempt":
        ask(house, "alice", "MODE #a +e bob!*@*")
    assert " NICK :robert" in str(ask(house, "bob", "NICK robert"))


NOT_SPEAKING = {
    "CTCP reply": "NOTICE bob :\x01VERSION some client\x01",
    "CTCP reply to a channel": "NOTICE #a :\x01PING 1\x01",
    "typing": "@+typing=active TAGMSG bob",
    "typing in a channel": "@+typing=paused TAGMSG #a",
}


# CTCP replies and typing do not reset idle times; what a user says does.
@pytest.mark.parametrize("act", NOT_SPEAKING)
def test_a_ctcp_reply_or_typing_leaves_the_idle_time(act):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #a", "PRIVMSG bob :hello")
    for _ in range(100):  # seconds on whichever clock
        house.turn()
    ask(house, "alice", NOT_SPEAKING[act])

    def idle():
        (line,) = [x for x in ask(house, "bob", "WHOIS alice") if " 317 " in x]
        return int(line.split(" 317 bob alice ")[1].split()[0])

    assert idle() >= 100
    ask(house, "alice", "PRIVMSG bob :here")
    assert idle() < 50


TOO_LONG_WITH_SOURCE = {
    "channel": ("#a", "PRIVMSG #a :"),
    "notice": ("bob", "NOTICE bob :"),
    "action": ("#a", "PRIVMSG #a :\x01ACTION "),
}


# A line that is too long only with its source prefix is split for the receivers.
@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u738b"])
@pytest.mark.parametrize("kind", TOO_LONG_WITH_SOURCE)
def test_a_line_that_is_too_long_with_its_source_is_split_and_not_refused(kind, letter):
    house = House()
    come(house, "alice", "bob", caps="server-time")
    for who in ("alice", "bob"):
        ask(house, who, "JOIN #a")
    _, start = TOO_LONG_WITH_SOURCE[kind]
    end = "\x01" if "\x01" in start else ""
    text = letter * ((510 - len(start) - len(end)) // len(letter.encode()))
    house.heard("bob")
    assert ask(house, "alice", start + text + end) == []
    lines = house.heard("bob")
    texts_said = [chat.parse_message(line).params[-1] for line in lines]
    said = [text.removeprefix("\x01ACTION ").rstrip("\x01") for text in texts_said]
    assert "".join(said) == text and len(lines) == 2


# TIME


# Also: the channel of the future message, another channel, one founded afterwards, a
# private conversation; the same server or the next one.
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
@pytest.mark.parametrize("where", ["#old", "#other", "#founded-later", "bob"])
def test_times_follow_the_clock_again_after_it_was_a_year_ahead(folder, where, restart):
    house = stored(folder)
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #old,#other")
    now = house.now
    set_clock(house, now + YEAR)
    for target in ("#old", "bob"):
        _, when = send(house, "alice", target, "from next year")
        assert abs(seconds(when) - now - YEAR) < 60
    set_clock(house, now + 60)
    if restart:
        house = restarted(house, folder / "chat.db")
        come(house, "alice", "bob")
    ask(house, "alice", "JOIN #old,#other,#founded-later")
    clock = house.now
    lines = ask(house, "alice", *[f"PRIVMSG {where} :{n}" for n in range(3)])
    times = [seconds(tag(line, "time")) for line in lines if " PRIVMSG " in line]
    assert len(set(times)) == 3 and all(clock <= t <= clock + 1 for t in times)
    house.store.close()


# The same in the line protocol's history.
def test_the_line_protocol_shows_times_of_the_corrected_clock():
    house = House()
    house.enter("dora")
    now = house.now
    set_clock(house, now + YEAR)
    house.say("dora", "from next year")
    set_clock(house, now + DAY_SECONDS)
    house.say("dora", "corrected")
    house.turn()
    house.say("dora", "/history")
    house.turn()
    text = house.guests["dora"].conn.out.decode()
    (line,) = [line for line in text.splitlines() if line.endswith(" dora: corrected")]
    assert line[2:12] == iso(now + DAY_SECONDS)[:10]


# Times fall when the clock is set back, by a second as by a day.
@pytest.mark.parametrize("back", [1.5, 60, DAY_SECONDS])
def test_times_fall_with_the_clock_that_is_set_back(back):
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    clock = house.now
    send(house, "alice", "#a", "before")
    set_clock(house, clock - back)
    _, when = send(house, "alice", "#a", "after")
    assert clock - back <= seconds(when) < clock - back + 1
    assert history(house, "alice", "#a") == ["before", "after"]  # the id alone defines the order


# Unique per channel while the clock runs forward. Another channel may have the same time.
def test_times_of_one_turn_differ_in_a_channel_and_begin_at_the_clock_in_each():
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a,#b")
    clock = house.now
    lines = ask(house, "alice", *["PRIVMSG #a :x", "PRIVMSG #b :x"] * 20)
    for channel in ("#a", "#b"):
        times = [seconds(tag(x, "time")) for x in lines if f"PRIVMSG {channel}" in x]
        assert len(set(times)) == 20 and clock <= times[0] <= times[-1] <= clock + 1


SAID_AT = {"a": 100, "b": 200, "c": 150, "d": 160}  # in this order; the clock was set back after b
SELECTORS = [  # a query with seconds in {}, and what it returns, in id order
    ("BEFORE {t} timestamp={170} 10", "a c d"),
    ("BEFORE {t} timestamp={170} 2", "c d"),
    ("BEFORE {t} timestamp={155} 10", "a c"),
    ("BEFORE {t} timestamp={150} 10", "a"),
    ("BEFORE {t} timestamp={300} 1", "b"),  # the nearest by time, not the newest by id
    ("BEFORE {t} timestamp={300} 10", "a b c d"),
    ("AFTER {t} timestamp={155} 10", "b d"),
    ("AFTER {t} timestamp={155} 1", "d"),
    ("AFTER {t} timestamp={120} 2", "c d"),
    ("AFTER {t} timestamp={200} 10", ""),
    ("BETWEEN {t} timestamp={120} timestamp={170} 10", "c d"),
    ("BETWEEN {t} timestamp={90} timestamp={165} 2", "a c"),
    ("BETWEEN {t} timestamp={165} timestamp={90} 2", "c d"),
    ("BETWEEN {t} timestamp={155} timestamp={300} 10", "b d"),
    ("LATEST {t} timestamp={155} 10", "b d"),
    ("LATEST {t} * 2", "c d"),
    ("AROUND {t} timestamp={150} 3", "a c d"),
]


def house_with_a_clock_set_back(folder, restart):
    house = stored(folder)
    account(house, "alice", "bob")  # whose private conversations outlive the server
    device(house, "alice", "alice")
    device(house, "bob", "bob")
    base, ids = house.now + 1000, {}
    ask(house, "alice", "JOIN #a")
    for text, after in SAID_AT.items():
        for target in ("#a", "bob"):
            set_clock(house, base + after)
            ids[target, text], _ = send(house, "alice", target, f"word {text}")
    if restart:
        house.say("alice", "QUIT")
        house = restarted(house, folder / "chat.db")
        device(house, "alice", "alice")
        device(house, "bob", "bob")
        ask(house, "alice", "JOIN #a")
    return house, base, ids


# Also: every selector, channel and private conversation, before and after a restart.
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
@pytest.mark.parametrize("target", ["#a", "bob"])
def test_a_page_by_time_misses_nothing_when_the_clock_was_set_back(folder, target, restart):
    house, base, _ = house_with_a_clock_set_back(folder, restart)
    wrong = {}
    for query, expected in SELECTORS:
        asked = re.sub(r"\{(\d+)\}", lambda match: iso(base + int(match[1])), query)
        found = history(house, "alice", target, asked.replace("{t}", "{}"))
        if found != [f"word {text}" for text in expected.split()]:
            wrong[query] = found
    assert wrong == {}
    house.store.close()


# Pages by msgid are by the id alone.
@pytest.mark.parametrize("target", ["#a", "bob"])
def test_a_page_by_msgid_is_by_the_order_of_ids_when_the_clock_was_set_back(folder, target):
    house, _, ids = house_with_a_clock_set_back(folder, restart=False)
    before = history(house, "alice", target, f"BEFORE {{}} msgid={ids[target, 'c']} 10")
    after = history(house, "alice", target, f"AFTER {{}} msgid={ids[target, 'b']} 10")
    assert (before, after) == (["word a", "word b"], ["word c", "word d"])
    house.store.close()


# Also: SEARCH has time selectors, too.
@pytest.mark.parametrize(
    "bound, expected", [("before={170}", "a c d"), ("after={155}", "b d"), ("before={155}", "a c")]
)
def test_a_search_by_time_misses_nothing_when_the_clock_was_set_back(folder, bound, expected):
    house, base, _ = house_with_a_clock_set_back(folder, restart=False)
    asked = re.sub(r"\{(\d+)\}", lambda match: iso(base + int(match[1])), bound)
    found = spoken(ask(house, "alice", f"SEARCH in=#a;text=word;{asked}"))
    assert sorted(found) == [f"word {text}" for text in expected.split()]
    house.store.close()


# Also: TARGETS; after a message from next year the channel's newest message is the
# corrected one, and a client that comes back asks for the time since it left.
def test_targets_lists_a_channel_whose_newest_message_came_after_the_clock_was_corrected():
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    now = house.now
    set_clock(house, now + YEAR)
    send(house, "alice", "#a", "from next year")
    set_clock(house, now + 100)
    send(house, "alice", "#a", "corrected")
    query = f"CHATHISTORY TARGETS timestamp={iso(now + 50)} timestamp={iso(now + 500)} 10"
    assert [x.split()[-2] for x in ask(house, "alice", query) if " TARGETS " in x] == ["#a"]


# A page of TARGETS never ends between equal times.
def test_a_page_of_targets_holds_all_that_have_the_time_of_its_last_one():
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a,#b,#c,#d")
    since = iso(house.now - 1)
    for channels in (["#a"], ["#b", "#c"], ["#d"]):
        lines = ask(house, "alice", *[f"PRIVMSG {channel} :x" for channel in channels])
        assert len({tag(x, "time") for x in lines if " PRIVMSG " in x}) == 1
    query = f"CHATHISTORY TARGETS timestamp={since} timestamp={iso(house.now + DAY_SECONDS)} {{}}"
    pages = {
        count: {x.split()[-2] for x in ask(house, "alice", query.format(count)) if " TARGETS " in x}
        for count in (1, 2, 3)
    }
    assert pages == {1: {"#a"}, 2: {"#a", "#b", "#c"}, 3: {"#a", "#b", "#c"}}


# The first bound of TARGETS may be an id, for clients with chat.py/session only.
@pytest.mark.parametrize("capable", [True, False])
def test_targets_since_an_id_are_for_clients_with_the_session_capability(capable):
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a,#b")
    send(house, "alice", "#a", "held by the client")
    last, _ = send(house, "alice", "#a", "the last one it holds")
    set_clock(house, house.now - DAY_SECONDS)  # the id alone defines what is later
    send(house, "alice", "#b", "missing")
    if not capable:
        ask(house, "alice", "CAP REQ :-chat.py/session")
    until = iso(house.now + YEAR)
    lines = ask(house, "alice", f"CHATHISTORY TARGETS msgid={last} timestamp={until} 10")
    listed = [x.split()[-2] for x in lines if " CHATHISTORY TARGETS " in x and "FAIL" not in x]
    assert listed == (["#b"] if capable else [])
    assert capable or " FAIL CHATHISTORY " in str(lines)


def marker(house, who, target, when=""):
    lines = ask(house, who, f"MARKREAD {target}" + (f" timestamp={when}" if when else ""))
    (line,) = [x for x in lines if " MARKREAD " in x]
    return line.split()[-1].removeprefix("timestamp=")


# Also: guest and account, channel and private conversation.
@pytest.mark.parametrize("target", ["#a", "bob"])
@pytest.mark.parametrize("logged_in", [False, True], ids=["guest", "account"])
def test_a_read_marker_goes_back_to_a_later_message_with_a_lower_time(target, logged_in):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #a", *(["REGISTER * * password"] if logged_in else []))
    _, first = send(house, "alice", target, "first")
    now = house.now
    set_clock(house, now + YEAR)
    _, ahead = send(house, "alice", target, "from next year")
    assert marker(house, "alice", target, ahead) == ahead
    set_clock(house, now + 10)
    _, second = send(house, "alice", target, "second")
    _, third = send(house, "alice", target, "third")
    assert abs(seconds(second) - now) < 60
    assert marker(house, "alice", target, iso(seconds(second) - 5)) == ahead  # of no message
    assert marker(house, "alice", target, first) == ahead  # of a message with a lower id
    assert marker(house, "alice", target, second) == second
    assert marker(house, "alice", target, third) == third
    assert marker(house, "alice", target, second) == third  # never back
    assert marker(house, "alice", target) == third


# MARKREAD cannot reach it: a marker can reach a message that bears a time of the future
def test_a_read_marker_reaches_a_message_from_the_future():
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    now = house.now
    set_clock(house, now + YEAR)
    _, ahead = send(house, "alice", "#a", "from next year")
    set_clock(house, now + 10)
    assert marker(house, "alice", "#a", ahead) == ahead
    _, later = send(house, "alice", "#a", "later")
    assert marker(house, "alice", "#a", later) == later
    assert seconds(marker(house, "alice", "#a", "9999-01-01T00:00:00.000Z")) < now + DAY_SECONDS


# Also: after a restart, and on the user's other device.
def test_a_read_marker_of_next_year_does_not_outlive_the_restart_with_a_corrected_clock(folder):
    house = stored(folder)
    come(house, "alice")
    ask(house, "alice", "JOIN #a", "REGISTER * * password")
    now = house.now
    set_clock(house, now + YEAR)
    _, ahead = send(house, "alice", "#a", "from next year")
    assert marker(house, "alice", "#a", ahead) == ahead
    set_clock(house, now + 10)
    house.say("alice", "QUIT")
    house = restarted(house, folder / "chat.db")
    device(house, "alice", "alice")
    device(house, "phone", "alice")
    ask(house, "alice", "JOIN #a")
    _, corrected = send(house, "alice", "#a", "corrected")
    house.heard("phone")
    assert marker(house, "alice", "#a", corrected) == corrected
    assert f"MARKREAD #a timestamp={corrected}" in str(house.heard("phone"))
    assert marker(house, "phone", "#a") == corrected
    house.store.close()


# A restored backup, or a server that keeps nothing, gives no msgid a second time, even with the
# same clock.
@pytest.mark.parametrize("how", ["restored backup", "in memory"])
def test_no_msgid_is_given_twice(folder, how):
    ids = set()
    for n in range(3):
        path = folder / str(n)
        if how == "restored backup" and n:
            shutil.copytree(folder / "backup", path)
        path.mkdir(exist_ok=True)
        house = House() if how == "in memory" else stored(path)
        if how == "restored backup" and not n:
            house.turn()
            house.store.close()
            shutil.copytree(path, folder / "backup")
            house = stored(path)
        come(house, "alice")
        ask(house, "alice", "JOIN #a")
        ids |= {send(house, "alice", "#a", f"{k}")[0] for k in range(5)}
        house.store.close()
    assert len(ids) == 15


# An id of a message that was delivered and then lost (kill -9 before the commit; here: the
# files are those of before the message) is not used again, with the clock set back, too.
@pytest.mark.parametrize("back", [0, YEAR])
def test_the_msgid_of_a_message_that_was_not_stored_is_not_given_to_another(folder, back):
    house = stored(folder)
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    send(house, "alice", "#a", "stored")
    shutil.copytree(folder, folder / "at the kill")
    now = house.now
    lost, _ = send(house, "alice", "#a", "delivered and not stored")
    house.store.close()
    again = stored(folder / "at the kill")
    set_clock(again, now - back)
    come(again, "alice")
    ask(again, "alice", "JOIN #a")
    ids = [send(again, "alice", "#a", f"{n}")[0] for n in range(5)]
    assert lost not in ids and len(set(ids)) == 5
    lines = ask(again, "alice", f"CHATHISTORY AFTER #a msgid={lost} 10")
    assert " FAIL CHATHISTORY " in str(lines) and spoken(lines) == []
    again.store.close()


# A msgid stays what it is in the next server, for pages and for REDACT.
def test_a_msgid_is_the_same_after_a_restart(folder):
    house = stored(folder)
    come(house, "alice")
    ask(house, "alice", "REGISTER * * password", "JOIN #a")
    first, _ = send(house, "alice", "#a", "first")
    second, _ = send(house, "alice", "#a", "second")
    house.say("alice", "QUIT")
    house = restarted(house, folder / "chat.db")
    device(house, "alice", "alice")
    ask(house, "alice", "JOIN #a")
    lines = ask(house, "alice", f"CHATHISTORY AFTER #a msgid={first} 10")
    assert [tag(x, "msgid") for x in lines if " PRIVMSG " in x] == [second]
    assert f" REDACT #a {second}" in str(ask(house, "alice", f"REDACT #a {second}"))
    assert history(house, "alice", "#a") == ["first"]
    house.store.close()


# AFTER an unknown msgid is answered FAIL. Also: the other selectors, channel and private.
@pytest.mark.parametrize("target", ["#a", "bob"])
@pytest.mark.parametrize(
    "query",
    [
        "AFTER {} msgid={id} 10",
        "BEFORE {} msgid={id} 10",
        "AROUND {} msgid={id} 10",
        "LATEST {} msgid={id} 10",
        "BETWEEN {} msgid={id} msgid={known} 10",
        "BETWEEN {} msgid={known} msgid={id} 10",
    ],
)
def test_a_page_relative_to_an_unknown_msgid_fails(query, target):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #a")
    known, _ = send(house, "alice", target, "x")
    other = House()
    set_clock(other, other.now + 77)
    come(other, "alice")
    ask(other, "alice", "JOIN #a")
    unknown, _ = send(other, "alice", "#a", "an id of another server")
    asked = query.replace("{id}", unknown).replace("{known}", known)
    lines = ask(house, "alice", "CHATHISTORY " + asked.replace("{}", target))
    assert " FAIL CHATHISTORY " in str(lines) and spoken(lines) == []
    held = asked.replace("{}", target).replace(unknown, known)
    assert " FAIL " not in str(ask(house, "alice", f"CHATHISTORY {held}"))


# A clock jump writes one log line, whichever way, however many turns follow.
@pytest.mark.parametrize("jump", [DAY_SECONDS, -DAY_SECONDS])
def test_a_jump_of_the_clock_is_one_line_in_the_log(running, monkeypatch, caplog, jump):
    guest = running().guest()
    guest.enter_irc("alice")
    real, before = time.time, len(caplog.records)
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    for n in range(5):
        guest.send(f"PING {n}\r\n")
        guest.until(f"PONG chat.py :{n}")
    assert len(caplog.records) == before + 1


# Keys of messages do not expire by a wrong clock as long as the message is there.
@pytest.mark.parametrize("jump", [YEAR, -YEAR / 400])
def test_a_message_is_said_once_whatever_the_clock_did_meanwhile(jump):
    house = House()
    come(house, "alice", "bob")
    for who in ("alice", "bob"):
        ask(house, who, "JOIN #a")
    now = house.now
    send(house, "alice", "#a", "once", "@+chat.py/id=k1 ")
    set_clock(house, now + jump)
    send(house, "alice", "#a", "other", "@+chat.py/id=k2 ")
    set_clock(house, now + 60)
    house.heard("bob")
    house.say("alice", "@+chat.py/id=k1 PRIVMSG #a :once", "@+chat.py/id=k2 PRIVMSG #a :other")
    house.turn()
    assert house.heard("bob") == []
    assert history(house, "alice", "#a") == ["once", "other"]


# Identity


WAYS_TO_LOG_IN = {
    "REGISTER": ("alice", ["REGISTER * * password"]),
    "NS REGISTER": ("alice", ["NS REGISTER password"]),
    "NS IDENTIFY": ("zoe", ["NS IDENTIFY zoe password"]),
    "SASL": ("zoe", ["AUTHENTICATE PLAIN", f"AUTHENTICATE {plain('zoe', 'password')}"]),
}


def guest_with_a_past(house):
    """alice, a guest, has talked in bob's #a and with bob; return the ids and times of that."""
    account(house, "zoe", "yan")
    come(house, "alice", "bob")
    for who in ("bob", "alice"):  # so that she may redact as the author and not as an operator
        ask(house, who, "JOIN #a")
    said = {
        "#a": send(house, "alice", "#a", "in the channel"),
        "bob": send(house, "alice", "bob", "in private"),
    }
    send(house, "bob", "alice", "answered")
    for target, (_, when) in said.items():
        assert marker(house, "alice", target, when) == when
    return said


def can_redact(house, who, target, message_id):
    lines = ask(house, who, f"REDACT {target} {message_id}")
    return any(f" REDACT {target} {message_id}" in x and " FAIL " not in x for x in lines)


CHECKS = {  # what must hold after the log-in
    "redact in a channel": lambda house, said: can_redact(house, "alice", "#a", said["#a"][0]),
    "redact in private": lambda house, said: can_redact(house, "alice", "bob", said["bob"][0]),
    "private history": lambda house, said: (
        history(house, "alice", "bob") == ["in private", "answered"]
    ),
    "private history goes on": lambda house, said: (
        send(house, "alice", "bob", "more") and send(house, "bob", "alice", "and more")
        and history(house, "alice", "bob") == ["in private", "answered", "more", "and more"]
    ),
    "private search": lambda house, said: (
        spoken(ask(house, "alice", "SEARCH in=bob;text=private")) == ["in private"]
    ),
    "targets": lambda house, said: (
        " TARGETS bob " in str(ask(house, "alice", f"CHATHISTORY TARGETS timestamp={iso(0)} "
                                   f"timestamp={iso(house.now + DAY_SECONDS)} 10"))
    ),
    "marker of a channel": lambda house, said: marker(house, "alice", "#a") == said["#a"][1],
    "marker of a private conversation": lambda house, said: (
        marker(house, "alice", "bob") == said["bob"][1]
    ),
    "the peer's history": lambda house, said: (
        send(house, "alice", "bob", "more")
        and history(house, "bob", "alice") == ["in private", "answered", "more"]
    ),
    "the peer's search": lambda house, said: (
        spoken(ask(house, "bob", "SEARCH in=alice;text=private")) == ["in private"]
    ),
}  # fmt: skip


# Also: each way to log in, each thing that belongs to an identity.
@pytest.mark.parametrize("check, way", in_turn(CHECKS, WAYS_TO_LOG_IN))
def test_a_guest_who_logs_in_keeps_the_past(way, check):
    house = House()
    said = guest_with_a_past(house)
    name, lines = WAYS_TO_LOG_IN[way]
    ask(house, "alice", *lines)
    assert is_logged_in(house, "alice", name)
    assert CHECKS[check](house, said)


# A dedup key is found under the account and the identity of the session, after the log-in and in
# the next connection of the account.
@pytest.mark.parametrize("where", ["same session", "next connection"])
@pytest.mark.parametrize("way", WAYS_TO_LOG_IN)
def test_a_message_sent_before_the_log_in_is_not_said_again_after_it(way, where):
    house = House()
    guest_with_a_past(house)
    name, lines = WAYS_TO_LOG_IN[way]
    send(house, "alice", "#a", "once", "@+chat.py/id=own ")
    ask(house, "alice", *lines)
    if where == "next connection":
        house.leave("alice")
        house.turn()
        device(house, "alice", name)
    house.heard("bob")
    ask(house, "alice", "@+chat.py/id=own PRIVMSG #a :once")
    assert spoken(house.heard("bob")) == []
    assert history(house, "bob", "#a").count("once") == 1


# Queries cover all identities of the account, on its other devices, too.
def test_another_device_of_the_account_has_the_past_of_the_guest():
    house = House()
    said = guest_with_a_past(house)
    ask(house, "alice", "REGISTER * * password")
    device(house, "phone", "alice")
    assert history(house, "phone", "bob") == ["in private", "answered"]
    assert marker(house, "phone", "bob") == said["bob"][1]
    assert can_redact(house, "phone", "#a", said["#a"][0])


# After a restart (bob has an account, so that the conversation has two who come back).
@pytest.mark.parametrize("way", ["REGISTER", "NS IDENTIFY"])
def test_the_past_of_a_guest_is_still_the_account_s_after_a_restart(folder, way):
    house = stored(folder)
    said = guest_with_a_past(house)
    name, lines = WAYS_TO_LOG_IN[way]
    ask(house, "bob", "REGISTER * * password")
    ask(house, "alice", *lines)
    for who in ("alice", "bob"):
        house.say(who, "QUIT")
    house = restarted(house, folder / "chat.db")
    device(house, "alice", name)
    ask(house, "alice", "JOIN #a")
    assert history(house, "alice", "bob") == ["in private", "answered"]
    assert marker(house, "alice", "bob") == said["bob"][1]
    assert can_redact(house, "alice", "#a", said["#a"][0])
    house.store.close()


# The first account takes over; a later account gets only data from after that log-in.
def test_a_second_account_of_a_session_has_nothing_of_the_first_one_s_past():
    house = House()
    said = guest_with_a_past(house)
    ask(house, "alice", "NS IDENTIFY zoe password")
    as_zoe, _ = send(house, "alice", "bob", "as zoe")
    ask(house, "alice", "NS IDENTIFY yan password")
    assert is_logged_in(house, "alice", "yan")
    send(house, "alice", "bob", "as yan")
    assert history(house, "alice", "bob") == ["as yan"]
    assert marker(house, "alice", "bob") == "*"
    assert not can_redact(house, "alice", "#a", said["#a"][0])
    assert not can_redact(house, "alice", "bob", as_zoe)
    device(house, "home", "zoe")
    assert history(house, "home", "bob") == ["in private", "answered", "as zoe"]


# An identity is set once: what the account did before is not given to the guest's other account.
def test_an_account_reads_the_conversations_of_so_many_guests(monkeypatch):
    monkeypatch.setattr(chat, "GUESTS_LINKED", 3)
    house = House()
    account(house, "alice")
    alice = house.hub.accounts.identity("alice")
    for n in range(5):
        house.hub.link(f"~{n}", alice)
    assert house.hub.identities(alice) == (alice, "~2", "~3", "~4")
    assert house.hub.same_person("~0", alice)
    house.hub.take_work()
    assert len(chat.conversation_keys(house.hub, alice, "~x")) == 4
    assert house.hub.take_work() == 4 * chat.WORK_OF_A_RECEIVER
    come(house, "eve")
    ask(house, "eve", "NS IDENTIFY alice password", "NS DROP password")
    assert not (house.hub.accounts_of or house.hub.guests_of)


def test_a_guest_who_logs_in_gets_the_account_s_own_past_merged_by_id():
    house = House()
    account(house, "zoe")
    come(house, "bob")
    device(house, "zoe", "zoe")
    send(house, "zoe", "bob", "first, as zoe")
    house.say("zoe", "QUIT")
    house.turn()
    come(house, "alice")
    send(house, "alice", "bob", "second, as a guest")
    send(house, "bob", "alice", "third")
    ask(house, "alice", "NS IDENTIFY zoe password")
    merged = ["first, as zoe", "second, as a guest", "third"]
    assert history(house, "alice", "bob") == merged


# The session secret of an account's device is no log-in: a guest who comes back with it is new.
def test_a_guest_with_the_secret_of_an_account_s_device_has_a_new_identity():
    house = House()
    come(house, "bob")
    come(house, "alice", secret=SECRET)
    ask(house, "alice", "JOIN #a")
    ask(house, "bob", "JOIN #a")
    first, _ = send(house, "alice", "#a", "as a guest")
    send(house, "alice", "bob", "in private")
    ask(house, "alice", "REGISTER * * password")
    second, _ = send(house, "alice", "bob", "as alice")
    house.say("alice", "QUIT")
    house.turn()
    come(house, "alicia", secret=SECRET)
    ask(house, "alicia", "JOIN #a")
    assert history(house, "alicia", "bob") == []
    assert not can_redact(house, "alicia", "#a", first)
    assert not can_redact(house, "alicia", "bob", second)


# The line protocol.
@pytest.mark.parametrize("line", ["/register password", "/login zoe password"])
def test_a_netcat_user_who_logs_in_keeps_the_private_conversation(line):
    house = House()
    account(house, "zoe")
    house.enter("dora")
    come(house, "bob")
    house.say("dora", "/tell bob hello")
    house.turn()
    ask(house, "bob", "PRIVMSG dora :hello, too")
    house.say("dora", line)
    house.turn()
    house.heard("dora")
    house.say("dora", "/history bob")
    house.turn()
    lines = house.heard("dora")
    assert [x.partition(": ")[2] for x in lines if ": " in x] == ["hello", "hello, too"]


# A second device is no operator; 3.7 the time of oper


PRIVILEGED = ["KILL bob :x", "WALLOPS :x", "REHASH", "DIE", "RESTART"]


# Also: came before or after OPER, after the operator's connection broke or left.
WHEN = ("before OPER", "after OPER", "after a break", "operator quit")


@pytest.mark.parametrize("line, when", in_turn(PRIVILEGED, WHEN))
def test_a_second_device_is_no_operator_of_the_server_without_oper(line, when):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "REGISTER * * password")
    if when == "before OPER":
        device(house, "phone", "alice")
    assert refused(ask(house, "alice", "OPER boss secret") + house.heard("alice"), "381")
    if when == "after a break":
        house.leave("alice")
        house.turn()
    if when != "before OPER":
        device(house, "phone", "alice")
    if when == "operator quit":
        house.say("alice", "QUIT")
        house.turn()
    asked = list(house.asked_for)
    assert refused(ask(house, "phone", line), "481")
    assert house.asked_for == asked and not house.guests["bob"].conn.closed
    if when in ("before OPER", "after OPER"):  # the first device still is
        assert not refused(ask(house, "alice", "WALLOPS :x"), "481")


# Powers of an operator in channels of others; an IRC and a netcat device.
@pytest.mark.parametrize("dialect", ["irc", "line"])
def test_a_second_device_has_no_power_in_channels_of_others_without_oper(dialect):
    house = House()
    come(house, "alice", "bob")
    ask(house, "alice", "REGISTER * * password", "OPER boss secret")
    ask(house, "bob", "JOIN #b", "TOPIC #b :of bob")
    ask(house, "alice", "JOIN #b")
    if dialect == "irc":
        device(house, "phone", "alice")
        lines = ["TOPIC #b :taken", "MODE #b +m", "KICK #b bob", "RENAME #b #c"]
    else:
        house.connect("phone")
        house.say("phone", "phone")
        house.turn()
        house.say("phone", "/login alice password")
        house.turn()
        lines = ["/join #b", "/topic taken", "/mode +m", "/kick bob", "/ban bob"]
    ask(house, "phone", *lines)
    heard = ask(house, "bob", "TOPIC #b", "MODE #b", "NAMES #b")
    assert any(" 332 bob #b :of bob" in x for x in heard)
    assert any(" 324 bob #b +nt" in x for x in heard)
    assert "bob" in str([x for x in heard if " 353 " in x])
    ask(house, "alice", "TOPIC #b :by an operator")  # the device that said OPER still has it
    assert any(":by an operator" in x for x in ask(house, "bob", "TOPIC #b"))


# An unknown name costs the same hashing as a known one. Also: the line protocol, log-ins.
@pytest.mark.parametrize(
    "known, unknown, answer",
    [
        ("OPER boss guess", "OPER other guess", "464"),
        ("OPER boss guess", "OPER BOSS guess", "464"),
        ("NS IDENTIFY zoe guess", "NS IDENTIFY other guess", "NOTICE"),
    ],
)
def test_an_unknown_name_costs_as_much_hashing_as_a_known_one(
    running, monkeypatch, known, unknown, answer
):
    server = running(oper=(("boss", "secret"), ("admin", "secret2")))
    zoe = server.guest()
    zoe.enter_irc("zoe", "REGISTER * * password")
    done, real = [], hashlib.pbkdf2_hmac

    def count(name, password, salt, rounds, *more):
        done.append(rounds)
        return real(name, password, salt, rounds, *more)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", count)
    costs = []
    for line in (known, unknown):
        guest = server.guest()
        guest.enter_irc("eve")
        done.clear()
        guest.send(f"{line}\r\n")
        guest.until(f" {answer} ")
        costs.append(list(done))
        guest.send("QUIT\r\n")
        guest.rest()
    assert costs[0] == costs[1] and costs[0]


# A channel that was empty


def emptied_channel(house):
    """alice and bob have talked in #a and left; mallory has founded it again."""
    come(house, "alice", "bob", "mallory", "carol")
    ids = {}
    for who in ("alice", "bob"):
        ask(house, who, "JOIN #a")
    for who in ("alice", "bob"):
        ids[who], _ = send(house, who, "#a", f"by {who}")
    for who in ("alice", "bob"):
        ask(house, who, "PART #a")
    assert "@mallory" in str(ask(house, "mallory", "JOIN #a", "NAMES #a"))
    return ids


# REDACT by rank is for events of this founding; the author may still.
def test_the_next_founder_of_a_channel_cannot_redact_what_was_said_before():
    house = House()
    ids = emptied_channel(house)
    for who in ("alice", "bob"):
        lines = ask(house, "mallory", f"REDACT #a {ids[who]}")
        assert refused(lines, "REDACT_FORBIDDEN")
    ask(house, "bob", "JOIN #a")
    later, _ = send(house, "bob", "#a", "under mallory")
    assert can_redact(house, "mallory", "#a", later)  # of this founding
    assert can_redact(house, "bob", "#a", ids["bob"])  # by its author
    assert history(house, "mallory", "#a") == ["by alice"]  # members read as today


# Also: after a restart; the founding that a session's place keeps alive is the same one.
def test_a_founding_is_the_same_after_a_restart_with_members_who_come_back(folder):
    house = stored(folder)
    come(house, "alice", secret=SECRET)
    come(house, "bob")
    ask(house, "alice", "JOIN #a,#empty")
    ask(house, "bob", "JOIN #a,#empty")
    kept, _ = send(house, "bob", "#a", "of this founding")
    left, _ = send(house, "bob", "#empty", "of a founding that ends")
    ask(house, "alice", "PART #empty")
    house.say("bob", "QUIT")
    house = restarted(house, folder / "chat.db")
    come(house, "alice", secret=SECRET)
    ask(house, "alice", "JOIN #empty")
    assert can_redact(house, "alice", "#a", kept)
    assert refused(ask(house, "alice", f"REDACT #empty {left}"), "REDACT_FORBIDDEN")
    house.store.close()


# A channel of an account does not end; its founder may redact what was said while it was empty.
def test_the_founding_of_a_registered_channel_outlives_its_members():
    house = House()
    come(house, "bob")
    come(house, "alice")
    ask(house, "alice", "REGISTER * * password", "JOIN #a")
    ask(house, "bob", "JOIN #a")
    message_id, _ = send(house, "bob", "#a", "rude")
    for who in ("bob", "alice"):
        ask(house, who, "PART #a")
    ask(house, "alice", "JOIN #a")
    assert can_redact(house, "alice", "#a", message_id)


# RENAME applies only to events of this founding; earlier ones stay under the old name,
# readable by every user who may enter that channel.
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
def test_a_rename_takes_along_only_what_was_said_since_the_channel_was_founded(folder, restart):
    house = stored(folder)
    emptied_channel(house)
    send(house, "mallory", "#a", "by mallory")
    ask(house, "mallory", "RENAME #a #b")
    if restart:
        for who in ("mallory", "alice", "bob", "carol"):
            house.say(who, "QUIT")
        house = restarted(house, folder / "chat.db")
        come(house, "carol")
    assert " JOIN #a" in str(ask(house, "carol", "JOIN #a"))
    ask(house, "carol", "JOIN #b")
    assert history(house, "carol", "#a") == ["by alice", "by bob"]
    assert history(house, "carol", "#b") == ["by mallory"]
    assert sorted(spoken(ask(house, "carol", "SEARCH in=#a;text=by"))) == ["by alice", "by bob"]
    assert spoken(ask(house, "carol", "SEARCH in=#b;text=by")) == ["by mallory"]
    house.store.close()


# A rename to and fro, a second one, and one in the turn of the message.
@pytest.mark.parametrize("names", [["#b", "#a"], ["#b", "#c"], ["#A"]])
def test_renames_in_one_turn_keep_each_founding_s_events_together(names):
    house = House()
    emptied_channel(house)
    lines, name = ["PRIVMSG #a :by mallory"], "#a"
    for wanted in names:
        lines.append(f"RENAME {name} {wanted}")
        name = wanted
    ask(house, "mallory", *lines)
    ask(house, "carol", "JOIN #a", "JOIN #b", "JOIN #c")
    together = name.lower() == "#a"
    assert history(house, "carol", "#a") == ["by alice", "by bob"] + ["by mallory"] * together
    if not together:
        assert history(house, "carol", name) == ["by mallory"]


# A rename does not let the founder redact what stays behind.
def test_a_founder_cannot_redact_earlier_events_by_way_of_a_rename():
    house = House()
    ids = emptied_channel(house)
    ask(house, "mallory", "RENAME #a #b", "JOIN #a")
    for where in ("#a", "#b"):
        lines = ask(house, "mallory", f"REDACT {where} {ids['bob']}")
        assert refused(lines, "REDACT_FORBIDDEN", "UNKNOWN_MSGID")
    ask(house, "carol", "JOIN #a")
    assert history(house, "carol", "#a") == ["by alice", "by bob"]


# Invitations


OBSTACLES = {  # a mode that keeps carol out, the numerics of a refused JOIN
    "+k word": ("475",),
    "+l 2": ("471",),
    "+b carol!*@*": ("474",),
    "+R": ("477", "473"),
    "+i": ("473",),
    "+b *!*@*": ("474",),
}


def channel_with_a_plain_member(house, dialect="irc"):
    """alice operates #a, bob has no rank, carol is outside."""
    come(house, "alice", "carol")
    come(house, "bob") if dialect == "irc" else house.enter("bob")
    ask(house, "alice", "JOIN #a")
    ask(house, "bob", "JOIN #a" if dialect == "irc" else "/join #a")


def entered(house, who="carol", line="JOIN #a"):
    return any(x.endswith(" JOIN #a") for x in ask(house, who, line))


# It takes an operator to invite past what keeps users out. Also: a voice is none; netcat.
@pytest.mark.parametrize("mode, dialect", in_turn(OBSTACLES, ["irc", "line", "voiced"]))
def test_a_member_without_rank_cannot_invite_where_something_keeps_users_out(mode, dialect):
    house = House()
    channel_with_a_plain_member(house, "line" if dialect == "line" else "irc")
    if dialect == "voiced":
        ask(house, "alice", "MODE #a +v bob")
    ask(house, "alice", f"MODE #a {mode}")
    house.heard("carol")
    lines = ask(house, "bob", "/invite carol #a" if dialect == "line" else "INVITE carol #a")
    if dialect == "line":
        assert lines[0].startswith("* ") and len(lines) == 1
    else:
        assert refused(lines, "482") and not refused(lines, "341")
    assert " INVITE " not in str(house.heard("carol"))
    lines = ask(house, "carol", "JOIN #a")
    assert refused(lines, *OBSTACLES[mode]) and not refused(lines, "JOIN")


# An operator's invitation goes past each of them, as README says (past any limit or ban).
@pytest.mark.parametrize("mode", OBSTACLES)
def test_an_operator_invites_past_whatever_keeps_users_out(mode):
    house = House()
    channel_with_a_plain_member(house)
    ask(house, "alice", f"MODE #a {mode}")
    assert refused(ask(house, "alice", "INVITE carol #a"), "341")
    assert entered(house)


# Where nothing keeps users out, every member may invite.
@pytest.mark.parametrize("mode", ["", "+m", "+s", "+b dave!*@*", "+b m:carol", "+l 9"])
def test_a_member_without_rank_invites_where_nothing_keeps_the_guest_out(mode):
    house = House()
    channel_with_a_plain_member(house)
    if mode:
        ask(house, "alice", f"MODE #a {mode}")
    house.heard("carol")
    assert refused(ask(house, "bob", "INVITE carol #a"), "341")
    assert " INVITE carol " in str(house.heard("carol"))
    assert entered(house)


# A later ban or +i must end it; by kind +k, +l and +R, which a member without rank could not
# have invited past, either. Who may be invited past them is for the operator to say again.
@pytest.mark.parametrize("mode", OBSTACLES)
def test_an_invitation_by_a_member_without_rank_ends_with_a_later_obstacle(mode):
    house = House()
    channel_with_a_plain_member(house)
    assert refused(ask(house, "bob", "INVITE carol #a"), "341")
    ask(house, "alice", f"MODE #a {mode}")
    lines = ask(house, "carol", "JOIN #a")
    assert refused(lines, *OBSTACLES[mode]) and not refused(lines, "JOIN")
    ask(house, "alice", "INVITE carol #a")
    assert entered(house)


# A later ban or +i ends an operator's invitation, too; the list of invitations (336) knows it.
# Also: /ban of the line protocol, which sets the same mode.
@pytest.mark.parametrize("mode", ["+b carol!*@*", "+b *!*@127.0.0.1", "+i"])
def test_an_operator_s_invitation_ends_with_a_later_ban_or_invite_only_mode(mode):
    house = House()
    channel_with_a_plain_member(house)
    ask(house, "alice", "INVITE carol #a")
    assert refused(ask(house, "carol", "INVITE"), "336")
    ask(house, "alice", f"MODE #a {mode}")
    assert not refused(ask(house, "carol", "INVITE"), "336")
    lines = ask(house, "carol", "JOIN #a")
    assert refused(lines, "473", "474") and not refused(lines, "JOIN")


# A ban of another user ends nothing.
def test_an_invitation_outlives_the_ban_of_another_user():
    house = House()
    channel_with_a_plain_member(house)
    ask(house, "alice", "MODE #a +i", "INVITE carol #a", "MODE #a +b dave!*@*")
    assert entered(house)


# An invitation of a founding that ended is none: by an id, not by a name).
def test_an_invitation_does_not_hold_for_the_next_channel_of_the_name():
    house = House()
    channel_with_a_plain_member(house)
    ask(house, "alice", "INVITE carol #a")
    ask(house, "bob", "PART #a")
    ask(house, "alice", "PART #a", "JOIN #a", "MODE #a +i")
    assert not refused(ask(house, "carol", "INVITE"), "336")
    assert refused(ask(house, "carol", "JOIN #a"), "473")


# BANS AND IDLE TIMES


# The same in a second channel, and by the line protocol
def test_a_ban_in_any_channel_refuses_the_nick_change():
    house = irc_house("#a,#b", alice="", bob="")
    asked(house, "alice", "MODE #b +b bob!*@*")
    forget(house)
    (line,) = asked(house, "bob", "NICK robert")
    assert line.verb == "437" and "#b" in line.params
    assert [line.verb for line in asked(house, "bob", "PART #b", "NICK robert")] == ["PART", "NICK"]


@pytest.mark.parametrize("mask", ["dora!*@*", "m:dora!*@*"])
def test_netcat_does_not_escape_a_ban_by_another_name(mask):
    house = irc_house("#a", alice="")
    house.enter("dora")
    house.say("dora", "/join #a")
    house.turn()
    asked(house, "alice", f"MODE #a +b {mask}")
    forget(house)
    house.say("dora", "/nick other", "hello")
    house.turn()
    assert heard(house, "alice") == []
    assert len(house.heard("dora")) == 2  # two refusals
    assert of(asked(house, "alice", "WHOIS dora"), "311")


def idle(house, who):
    lines = asked(house, "watcher", f"WHOIS {who} {who}")
    return int(of(lines, "317")[0].params[2])


# CTCP replies and typing must not reset the idle time
@pytest.mark.parametrize(
    "line, resets",
    [
        ("NOTICE watcher :\x01VERSION client 1.0\x01", False),
        ("NOTICE #a :\x01PING 12345\x01", False),
        ("NOTICE watcher :\x01CLIENTINFO", False),
        ("@+typing=active TAGMSG #a", False),
        ("@+typing=paused TAGMSG watcher", False),
        ("@+typing=done TAGMSG #a", False),
        ("PING x", False),
        ("MARKREAD #a timestamp=1970-01-01T00:00:01.000Z", False),
        ("PRIVMSG #a :hello", True),
        ("PRIVMSG watcher :hello", True),
        ("PRIVMSG #a :\x01ACTION waves\x01", True),
    ],
)
def test_only_what_a_user_says_resets_the_idle_time(line, resets):
    house = irc_house("#a", alice="message-tags", watcher="")
    asked(house, "alice", "PRIVMSG #a :before")
    house.now += 500
    house.turn()
    assert idle(house, "alice") >= 499
    asked(house, "alice", line)
    assert (idle(house, "alice") < 100) == resets


# ======================================================================================
# ACTS
# ======================================================================================

TALKERS = ("alice", "bob", "carol", "dan", "zoe")  # who talks in IRC, and in lines
PLACES = ("#a", "#b", "#c", "#lobby")
IRC_SAYS = """
    JOIN {place}|JOIN {place},{other}|JOIN {place} key|PART {place} :bye|PRIVMSG {place} :{text}
    PRIVMSG {name} :{text}|PRIVMSG {name},{place} :{text}|NOTICE {place} :{text}
    @+draft/react=x TAGMSG {place}|PRIVMSG {place} :\x01ACTION {text}\x01
    TOPIC {place} :{text}|MODE {place} +o {name}|MODE {place} -o+v {name} {name}
    MODE {place} {flag}|MODE {place} +kl key 9|MODE {place} -k *|MODE {place} +b {name}!*@*
    MODE {place} -b {name}!*@*|MODE {place} +e *!*@127.*|KICK {place} {name} :out
    INVITE {name} {place}|NICK {nick}|AWAY :{text}|AWAY|SETNAME :{text}|MODE {nick} +iB
    MODE {nick} -i|MONITOR + {name}|MONITOR - {name}|METADATA {place} SET key :{text}
    METADATA * SET key :{text}|METADATA * SUB key|RENAME {place} {other} :moved
    REDACT {place} {id}|MARKREAD {place} timestamp=1970-01-12T13:50:00.000Z
    NS REGISTER password|NS IDENTIFY {name} password|NS LOGOUT|CS REGISTER {place}|OPER boss secret
    KLINE 60 *!*@10.* :no|UNKLINE *!*@10.*|KILL {name} :go|WALLOPS :{text}
    CHATHISTORY LATEST {place} * 5
    NAMES {place}|WHO {place}|WHOIS {name}|LIST|SAJOIN {name} {place}
"""
LINES_SAY = """
    {text}|/tell {name} {text}|/tell {place} {text}|/join {place}|/part {place}|/nick {nick}
    /me {text}|/topic {place} {text}|/away {text}|/back|/kick {name} {place}|/invite {name} {place}
    /register password|/login {name} password|/logout|/history {place}|/names {place}
"""
IRC_SAYS, LINES_SAY = (
    [line.strip() for line in text.replace("\n", "|").split("|") if line.strip()]
    for text in (IRC_SAYS, LINES_SAY)
)


def act_at_random(seeded, house, n):
    """A client comes, goes, breaks off, or says a line that may be anything."""
    label = seeded.choice(TALKERS)
    in_irc, session = label < "d", house.guests.get(label)
    if session is None or session.conn.closed:
        connect = house.connect_irc if in_irc else house.connect
        connect(label, host=f"127.0.0.{1 + TALKERS.index(label)}")
        start = [
            f"SESSION {SECRET[:-5]}{label:_<5}",
            f"NICK {label}",
            "CAP REQ :message-tags batch",
            f"USER {label} 0 * :{label}",
            "CAP END",
        ]
        house.say(label, *(start if in_irc else [label]))
    elif seeded.random() < 0.02:
        session.conn.close()
    else:
        ids = [event.id for event in house.logged if isinstance(event, chat.Event)][-20:]
        words = {
            "place": seeded.choice(PLACES),
            "other": seeded.choice(PLACES),
            "name": seeded.choice(TALKERS),
            "nick": label + seeded.choice(("", "", "_", "2")),
            "text": f"text {n}",
            "flag": seeded.choice("+-") + seeded.choice("imnstRC"),
            "id": house.hub.ids.text(seeded.choice(ids or [1])),
        }
        house.say(label, seeded.choice(IRC_SAYS if in_irc else LINES_SAY).format(**words))


def live_at_random(seeded, house, steps):
    """Let clients do something; what they did is in hub.journal, what came of it in logged."""
    hub, end = house.hub, house.hub.end
    house.logged = []
    hub.journal = []

    def note_end():
        house.logged += hub.turn.events
        hub.journal.append(None)
        end()

    hub.end = note_end
    for n in range(steps):
        act_at_random(seeded, house, n)
        if seeded.random() < 0.3:
            house.turn()
        if seeded.random() < 0.01:
            house.grace_over()
    house.turn()


def picture(value, inside=False):
    """Return a piece of the Hub as plain data that can be compared."""
    if isinstance(value, chat.Session):
        return ("session", value.id)
    if isinstance(value, chat.User) and inside:
        return ("user", value.resume_id)
    if isinstance(value, chat.Channel) and inside:
        return ("channel", value.key, value.founding)
    if isinstance(value, chat.Audience):
        parts = (value.name, value.targets, value.channels, value.users, value.parties)
        return ("audience", *picture(parts, inside=True))
    if isinstance(value, dict):
        return {repr(picture(k, True)): picture(v, True) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(repr(picture(one, True)) for one in value)
    if isinstance(value, (list, tuple, collections.deque)):
        return [picture(one, True) for one in value]
    if hasattr(type(value), "__slots__") and not isinstance(value, (str, int, float)):
        names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        passing = ("by_wire", "rosters", "former", "audience", "since")  # of this turn, or made
        return {name: picture(getattr(value, name), True) for name in names if name not in passing}
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


STATE = (
    *("users", "users_by_id", "users_by_token", "absent", "absent_by_host", "channels", "founded"),
    *("accounts_of", "guests_of", "bans", "former", "invisible", "operators", "watchers"),
    *("subscribers", "most_users", "last_id", "accounts", "markers"),
)


def picture_of(hub):
    """All the state of a Hub."""
    whole = {name: picture(getattr(hub, name)) for name in STATE}
    whole["each user"] = {key: picture(user) for key, user in hub.users.items()}
    whole["each channel"] = {key: picture(channel) for key, channel in hub.channels.items()}
    whole["sessions"] = {
        id: (one.token, one.client, one.operator, picture(one.user, True))
        for id, one in hub.sessions.items()
        if one.user
    }
    return whole


@pytest.mark.parametrize("run", some(range(20), 2))
def test_the_same_acts_on_a_new_hub_give_the_same_state_and_the_same_events(seeded, run):
    house = House()
    start = house.now
    live_at_random(seeded, house, 400)
    journal, logged = house.hub.journal, house.logged
    assert len({entry[2] for entry in journal if entry}) > 15  # acts of so many kinds
    hub = chat.Hub(0, house.hub.ids, house.hub.name)
    hub.store = store = chat.Store(None)
    hub.absent_per_host = house.hub.absent_per_host
    hub.begin(start, start)
    again = []
    for entry in journal:
        if entry is None:
            again += hub.turn.events
            hub.settle()
            assert store.commit(hub.turn, hub.now / 1000, hub.ticks) == chat.KEPT
            hub.end()
            continue
        now, ticks, name, actor, values = entry
        hub.begin(now / 1000, ticks / 1000)
        with contextlib.suppress(chat.Refused):
            hub.perform(name, actor, *values)
    assert [picture(event) for event in again] == [picture(event) for event in logged]
    assert picture_of(hub) == picture_of(house.hub)


def lasting(hub):
    """Return the part of a Hub that outlives its server."""
    users = {user.resume_id: user.state() for user in hub.users.values() if user.may_return}
    channels = {
        key: (channel.state(), {user.resume_id for user in channel.members} & users.keys())
        for key, channel in hub.channels.items()
    }
    return {
        "users": users,
        "channels": {key: one for key, one in channels.items() if one[0]["founder"] or one[1]},
        "certificates": hub.accounts.certificates,
        "markers": {
            owner: marks
            for owner, marks in hub.markers.items()
            if owner[0] == "=" or owner in users
        },
        **{
            name: picture(getattr(hub, name))
            for name in ("accounts", "accounts_of", "bans", "founded")
        },
        "guests": {owner: sorted(guests) for owner, guests in hub.guests_of.items()},
    }


@pytest.mark.parametrize("run", some(range(20), 2))
def test_what_is_stored_is_loaded_as_it_was(seeded, run, tmp_path):
    house = House(store=chat.Store(tmp_path / "chat.db"))
    live_at_random(seeded, house, 300)
    was = lasting(house.hub)
    assert was["users"] and was["channels"] and was["accounts"]
    said = [event.id for event in house.logged if event.kind == "message"]
    house.store.close()
    store = chat.Store(tmp_path / "chat.db")
    hub = chat.load_hub(store, house.now, house.now)
    assert lasting(hub) == was
    kept = [row[0] for row in store.db.execute("SELECT id FROM events WHERE kind = 'message'")]
    assert set(kept) <= set(said) and kept
    store.close()


JUNK_LINES = """
    NICK {word}|USER {word} 0 * :{word}|CAP LS 302|CAP REQ :{word}|CAP REQ :message-tags {word}
    CAP END
    PASS {word}|AUTHENTICATE PLAIN|AUTHENTICATE {word}|JOIN {place}|PART {place}|PRIVMSG {place} :x
    PRIVMSG {word} :x|METADATA * SET {word} :x|METADATA * SUB {word}|MONITOR + {word}|WHOIS {word}
    MODE {place} +b {word}!*@*|INVITE {word} {place}|TOPIC {place} :{word}|MARKREAD {place}
    NS IDENTIFY {word} {word}|OPER {word} {word}|SESSION {word}{word}{word}|SETNAME {word}
    AWAY {word}
    CHATHISTORY LATEST {place} * 10|SEARCH text={word}|RENAME {place} {place}|KNOCK {place}|{word}
    BATCH +{word} draft/multiline {place}|@batch={word} PRIVMSG {place} :x|BATCH -{word}
    @label={word} PING {word}|@+{word}={word} TAGMSG {place}|/join {word}|/tell {word} x
    /lines {word}
    /login {word} {word}|/nick {word}|/topic {word}|/search {word}|/history {place}|hello {word}
"""
JUNK_LINES = [line.strip() for line in JUNK_LINES.replace("\n", "|").split("|") if line.strip()]


def sizes(root):
    """How much every table holds that can be reached from an object, by the way to it."""
    found, seen, waiting = {}, set(), [("", root)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
            continue
        seen.add(id(value))
        if isinstance(value, (dict, set, list, tuple, collections.deque, bytearray)):
            if getattr(value, "maxlen", None) is not None:
                continue
            found[path] = found.get(path, 0) + len(value)
            inside = value.values() if isinstance(value, dict) else value
            waiting += [(f"{path}[]", one) for one in inside if not isinstance(value, bytearray)]
        if type(value).__module__ in ("chat", "test_chat"):
            slots = [s for kind in type(value).__mro__ for s in getattr(kind, "__slots__", ())]
            names = [*getattr(value, "__dict__", ()), *slots]
            waiting += [(f"{path}.{name}", getattr(value, name, None)) for name in names]
    return found


def be_junk(seeded, house, number):
    """Clients from many addresses say anything and leave."""
    for n in range(number):
        connect = house.connect_irc if n % 2 else house.connect
        connect("junk", host=f"10.{n % 3}.{n % 250}.{seeded.randrange(250)}")
        name = f"n{seeded.randrange(10**9)}"
        house.say("junk", *([f"NICK {name}", "USER u 0 * :r"] if n % 2 else [name]))
        for _ in range(seeded.randrange(40)):
            word, place = f"w{seeded.randrange(10**9)}", f"#w{seeded.randrange(5)}"
            house.say("junk", seeded.choice(JUNK_LINES).format(word=word, place=place))
            if seeded.random() < 0.2:
                house.turn()
        house.guests["junk"].conn.close()
        house.turn()
    del house.guests["junk"]
    house.grace_over()
    house.now += 10 * 86400
    house.idle(3)
    house.asked_for.clear()
    house.store.targets.clear()  # a cache, which has a bound


def test_after_connections_full_of_junk_no_table_holds_more_than_before(seeded):
    house = House()
    be_junk(seeded, house, 60)
    before = sizes(house)
    be_junk(seeded, house, 90)
    after = sizes(house)
    assert {path: n for path, n in after.items() if n > before.get(path, 0)} == {}


# One segment


CLOSED = ["+s", "+i", "+k word"]
LEAVINGS = {  # how the last member goes and the channel is founded again, in one turn
    "part and join": [("alice", "PART #s", "JOIN #s", "PRIVMSG #s :new")],
    "join 0": [("alice", "JOIN 0", "JOIN #s", "PRIVMSG #s :new")],
    "kick oneself": [("alice", "KICK #s alice", "JOIN #s", "PRIVMSG #s :new")],
    "another user": [("alice", "PART #s"), ("bob", "JOIN #s", "PRIVMSG #s :new")],
    "quit": [("alice", "QUIT"), ("bob", "JOIN #s", "PRIVMSG #s :new")],
    "twice": [("alice", *["PART #s", "JOIN #s"] * 2, "PRIVMSG #s :new")],
    "said before, too": [("alice", "PRIVMSG #s :old", "PART #s", "JOIN #s", "PRIVMSG #s :new")],
    "renamed away": [("alice", "RENAME #s #t"), ("bob", "JOIN #s", "PRIVMSG #s :new")],
}


# Also: modes that close a channel's past, ways to leave, the same user or another, a restart.
@pytest.mark.parametrize("how, mode", in_turn(LEAVINGS, CLOSED))
def test_a_message_in_the_turn_in_which_a_closed_channel_is_founded_again_is_kept(
    folder, mode, how
):
    house = stored(folder)
    come(house, "alice", "bob")
    ask(house, "alice", "JOIN #s", f"MODE #s {mode}", "PRIVMSG #s :private past")
    for who, *lines in LEAVINGS[how]:
        house.say(who, *lines)
    house.turn()
    reader = LEAVINGS[how][-1][0]
    assert history(house, reader, "#s") == ["new"]
    assert spoken(ask(house, reader, "SEARCH in=#s;text=new")) == ["new"]
    assert spoken(ask(house, reader, "SEARCH in=#s;text=past")) == []
    house = restarted(house, folder / "chat.db")
    come(house, "carol")
    ask(house, "carol", "JOIN #s")
    assert history(house, "carol", "#s") == ["new"]
    house.store.close()


# What a channel was is not what its next founding in the same turn is.
@pytest.mark.parametrize("restart", [False, True], ids=["same server", "restarted"])
def test_a_channel_founded_again_in_one_turn_has_nothing_of_the_one_before(folder, restart):
    house = stored(folder)
    come(house, "alice", secret=SECRET)
    lines = ["TOPIC #s :old topic", "MODE #s +imb evil!*@*", "METADATA #s SET color :red"]
    ask(house, "alice", "JOIN #s", *lines)
    ask(house, "alice", "PART #s", "JOIN #s")
    if restart:
        house = restarted(house, folder / "chat.db")
        come(house, "alice", secret=SECRET)
    heard = ask(house, "alice", "TOPIC #s", "MODE #s", "MODE #s +b", "METADATA #s LIST")
    assert any(" 331 " in x for x in heard) and any(" 324 alice #s +nt" in x for x in heard)
    assert "evil" not in str(heard) and ":red" not in str(heard)
    house.store.close()


# A name that another user takes in the turn in which its owner leaves or renames.
@pytest.mark.parametrize("going", ["QUIT", "NICK other"])
def test_a_private_message_under_a_name_that_is_new_in_this_turn_is_kept(going):
    house = House()
    come(house, "alice", "bob", "carol")
    send(house, "alice", "bob", "from the first alice")
    house.say("alice", going)
    house.say("carol", "NICK alice", "PRIVMSG bob :from the second alice")
    house.turn()
    assert "from the second alice" in spoken(house.heard("bob"))
    assert history(house, "bob", "alice")[-1] == "from the second alice"
    assert history(house, "carol", "bob") == ["from the second alice"]


# A redaction in the turn in which the channel ends or is renamed.
@pytest.mark.parametrize(
    "after, where", [(["PART #a", "JOIN #a"], "#a"), (["RENAME #a #b"], "#b"), (["PART #a"], "")]
)
def test_a_redaction_in_the_turn_in_which_the_channel_ends_is_done(after, where):
    house = House()
    come(house, "alice", "bob", "carol")
    ask(house, "alice", "JOIN #a")
    if where == "#b":
        ask(house, "carol", "JOIN #a")
        ask(house, "alice", "MODE #a +o carol")
    message_id, _ = send(house, "alice", "#a", "hidden")
    send(house, "alice", "#a", "shown")
    house.say("alice", f"REDACT #a {message_id}")
    house.say("carol" if where == "#b" else "alice", *after)
    house.turn()
    house.turn()
    ask(house, "bob", f"JOIN {where or '#a'}")
    # without the PART of the last member the redaction is done; a user who is gone may be refused
    expected = [["shown"]] if where == "#b" else [["shown"], ["hidden", "shown"]]
    assert history(house, "bob", where or "#a") in expected


# Dedup keys


def ids_said(house, channel="#a"):
    return texts(house.store, channel)


def test_a_message_under_a_known_id_is_said_once_and_answered_as_the_first_time():
    house = House()
    come_again(house, "alice", "alice")
    house.enter_irc("bob")
    house.say("alice", "JOIN #a")
    house.say("bob", "JOIN #a")
    house.turn()
    house.heard("alice"), house.heard("bob")
    line = "@+chat.py/id=18f-1 PRIVMSG #a :hello"
    house.say("alice", line)
    house.turn()
    (first,) = house.heard("alice")
    assert "+chat.py/id=18f-1" in first and first.endswith("PRIVMSG #a :hello")
    for _ in range(2):
        house.say("alice", line, "PING x")
        house.turn()
        assert [x for x in house.heard("alice") if "PONG" not in x] == [first]
        come_again(house, "alice", "alice")
    house.say("alice", line, line.replace("hello", "other words"))
    house.turn()
    assert house.heard("alice") == [first, first]
    assert len(house.heard("bob")) == 1 and ids_said(house) == ["hello"]


def test_a_repeat_in_the_same_turn_is_a_repeat():
    house = House()
    come_again(house, "alice", "alice")
    house.say("alice", "JOIN #a")
    house.turn()
    house.heard("alice")
    house.say("alice", *["@+chat.py/id=1;label=x PRIVMSG #a :hello"] * 3)
    house.turn()
    assert len(set(house.heard("alice"))) == 1 and ids_said(house) == ["hello"]


def test_one_may_not_use_up_the_ids_of_another():
    house = House()
    come_again(house, "alice", "alice")
    come_again(house, "bob", "bob", "b" * 32)
    for who in ("alice", "bob"):
        house.say(who, "JOIN #a", f"@+chat.py/id=1 PRIVMSG #a :{who}")
    house.turn()
    assert ids_said(house) == ["alice", "bob"]


def test_a_receipt_outlives_redaction_pruning_and_the_server(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    come_again(house, "alice", "alice")
    house.say("alice", "JOIN #a", "@+chat.py/id=1 PRIVMSG #a :hello")
    house.turn()
    (id,) = house.store.db.execute("SELECT id FROM events WHERE text = 'hello'").fetchone()
    known = house.hub.ids.text(id)
    house.say("alice", f"REDACT #a {known}")
    again = restarted(house, path)
    come_again(again, "alice", "alice")
    again.say("alice", "@+chat.py/id=1 PRIVMSG #a :hello")
    again.turn()
    assert again.heard("alice") == [f"@msgid={known};+chat.py/id=1 :alice!~u@127.0.0.1 TAGMSG #a"]
    assert ids_said(again) == []
    again.store.close()


def test_a_message_of_several_lines_is_said_once_under_its_id():
    house = House()
    come_again(house, "alice", "alice")
    house.say("alice", "CAP REQ :batch draft/multiline", "JOIN #a")
    house.turn()
    house.heard("alice")
    lines = [
        "@+chat.py/id=1 BATCH +r draft/multiline #a",
        "@batch=r PRIVMSG #a :one",
        "@batch=r PRIVMSG #a :two",
        "BATCH -r",
    ]
    heard = []
    for _ in range(2):
        house.say("alice", *lines)
        house.turn()
        heard.append(house.heard("alice"))
    assert heard[0] == heard[1] and len(heard[0]) == 4 and ids_said(house) == ["one\ntwo"]


def test_receipts_are_forgotten_a_month_after_their_message(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    come_again(house, "alice", "alice")
    house.say("alice", "JOIN #a")
    for n in range(5):
        house.say("alice", f"@+chat.py/id={n} PRIVMSG #a :{n}")
        house.turn()

    def known():
        more = True
        while more:
            old, more = house.store.dedup.next_old(now)
            house.store.dedup.forget(old)
        return [own for (own,) in house.store.db.execute("SELECT own_id FROM dedup")]

    now = int(house.now * 1000) + 2 * chat.DEDUP_MS
    assert known() == ["0", "1", "2", "3", "4"]  # their messages are there
    house.now, house.store.keep = now / 1000, 1
    house.begin_turn()
    house.say("alice", "PRIVMSG #a :6")
    house.turn()
    while house.store.prune(idle=True, now=now):
        pass
    now += chat.DEDUP_MS - 1
    assert known() == ["0", "1", "2", "3", "4"]
    now += 2
    assert known() == []
    house.store.close()


def test_what_could_not_be_kept_is_not_said_to_be(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    come_again(house, "alice", "alice")
    house.say("alice", "JOIN #a")
    house.turn()
    house.heard("alice")
    house.say("alice", "@+chat.py/id=1 PRIVMSG #a :hello")
    house.store.dedup.lose(house.hub.turn.dedup, house.hub.ticks)
    house.hub.turn.not_kept("the disk is full")
    house.hub.end()
    house.say("alice", "@+chat.py/id=1 PRIVMSG #a :hello")
    house.turn()
    (line,) = house.heard("alice")
    assert line.startswith(":chat.py FAIL PRIVMSG NOT_KEPT * 1 :")
    assert ids_said(house) == []
    house.store.close()


# ======================================================================================
# PASSWORDS
# ======================================================================================

BLANKS = "correct horse battery"


def account_state(house, name, *passwords):
    """Return which of these passwords a new client can log in with by SASL PLAIN."""
    right = []
    for n, password in enumerate(passwords):
        label = f"probe {n} of {len(house.guests)}"
        house.connect_irc(label)
        house.guests[label].conn.address = f"192.0.2.{len(house.guests) % 250}:1"  # own throttle
        if sasl(house, label, name, password):
            right.append(password)
        house.say(label, "QUIT")
        house.turn()
    return right


def typist(house, dialect, name="dora"):
    """Let a user of this dialect come in; return how a line for the account service is sent."""
    if dialect == "line":
        house.enter(name)
    else:
        come(house, name)
    ways = {
        "line": lambda verb, words: f"/{verb} {words}",
        "PRIVMSG": lambda verb, words: f"PRIVMSG NickServ :{verb.upper()} {words}",
        "NS": lambda verb, words: f"NS {verb.upper()} {words}",
        "NS :": lambda verb, words: f"NS :{verb.upper()} {words}",
    }

    def write(verb, words):
        verb = {"login": "identify"}.get(verb, verb) if dialect != "line" else verb
        house.heard(name)
        house.say(name, ways[dialect](verb, words))
        house.turn()
        house.turn()
        return house.heard(name)

    return write


DIALECTS = ["line", "PRIVMSG", "NS", "NS :"]
dialects = pytest.mark.parametrize("dialect", DIALECTS)


# A word in double quotes may contain blanks. Also: register, login, passwd, drop.
@dialects
def test_a_quoted_password_with_blanks_is_what_was_typed(dialect):
    house = House()
    write = typist(house, dialect)
    write("register", f'"{BLANKS}"')
    tried = (BLANKS, f'"{BLANKS}"', "correct", '"correct')
    assert account_state(house, "dora", *tried) == [BLANKS]
    write("passwd", f'"{BLANKS}" "new with blanks"')
    assert account_state(house, "dora", "new with blanks", BLANKS, "new") == ["new with blanks"]
    account(house, "zoe", password="her own words")
    write("login", 'zoe "her own words"')
    assert "zoe" in str(ask(house, "dora", "WHO dora %a" if dialect != "line" else "/nick zoe"))
    write("passwd", '"her own words" simple')
    assert account_state(house, "zoe", "simple") == ["simple"]


# Two blanks stay two where the transport keeps them (NS joins its parameters by one).
@pytest.mark.parametrize("dialect", ["line", "PRIVMSG", "NS :"])
def test_blanks_inside_quotes_are_kept_as_typed(dialect):
    house = House()
    typist(house, dialect)("register", '"two  blanks, and  more"')
    assert account_state(house, "dora", "two  blanks, and  more") == ["two  blanks, and  more"]


TOO_MANY_WORDS = [  # the verb, what is typed, and words of its syntax that the error must have
    ("register", BLANKS, "PASSWORD [EMAIL]"),
    ("register", "correct horse@example.org battery", "PASSWORD [EMAIL]"),
    ("register", '"correct horse" battery staple', "PASSWORD [EMAIL]"),
    ("login", BLANKS, "[NAME] PASSWORD"),
    ("login", "zoe password more", "[NAME] PASSWORD"),
    ("login", 'zoe "pass word" more', "[NAME] PASSWORD"),
    ("passwd", BLANKS, "OLD NEW"),
    ("passwd", "password correct horse", "OLD NEW"),
    ("passwd", '"pass word" new one', "OLD NEW"),
    ("drop", "password more", "PASSWORD"),
    ("drop", BLANKS, "PASSWORD"),
    ("verify", "12345678 more", "CODE"),
]


# A line with more words than its syntax has is refused with the syntax; nothing is done.
@pytest.mark.parametrize("verb, words, syntax, dialect", in_turn(TOO_MANY_WORDS, DIALECTS))
def test_a_line_with_too_many_words_is_refused_with_its_syntax(verb, words, syntax, dialect):
    house = House()
    account(house, "zoe")
    write = typist(house, dialect)
    if verb in ("passwd", "drop"):
        write("register", "password")
    told = write(verb, words)
    assert syntax in str(told)
    assert "quote" in str(told) or verb == "verify"  # `quote a password that has blanks`
    assert not any(refused([x], "900") for x in told if x.startswith(":"))
    passwords = ("password", "correct", "horse", BLANKS, "correct horse", "horse battery")
    expected = ["password"] if verb in ("passwd", "drop") else []
    assert account_state(house, "dora", *passwords) == expected
    assert account_state(house, "zoe", "password") == ["password"]


# The second word of REGISTER must be one e-mail address.
@pytest.mark.parametrize(
    "words, dialect",
    in_turn(["correct horse", "correct @", "correct a@b@c", '"correct x" y'], DIALECTS),
)
def test_a_second_word_that_is_no_address_makes_no_account(words, dialect):
    house = House()
    write = typist(house, dialect)
    write("register", words)
    tried = ("correct", "correct x", words, "horse")
    assert account_state(house, "dora", *tried) == []


# The reply says how the server used the second word.
@dialects
def test_an_address_after_the_password_is_in_the_reply(dialect):
    house = House()
    told = typist(house, dialect)("register", "correct horse@example.org")
    assert "horse@example.org" in str(told)
    assert account_state(house, "dora", "correct") == ["correct"]


# Only a word that begins with a quote is a quoted one; every other character is the user's own.
@pytest.mark.parametrize(
    "password, dialect",
    in_turn(['pa"ss', "it's", "back\\slash", "a;b#c", "$HOME", "p'a'ss"], DIALECTS),
)
def test_a_password_without_blanks_is_taken_literally(password, dialect):
    house = House()
    typist(house, dialect)("register", password)
    assert account_state(house, "dora", password) == [password]


# Drop nothing silently: with a quote that is never closed the server refuses or takes the word
# literally; it must not set a password that was not typed.
@pytest.mark.parametrize(
    "words, dialect", in_turn(['"correct', '"correct horse', '"correct"horse'], DIALECTS)
)
def test_a_lone_quote_is_not_dropped_from_a_password(words, dialect):
    house = House()
    typist(house, dialect)("register", words)
    others = ("correct", "correct horse", "correcthorse", "horse", "correct horse ")
    assert account_state(house, "dora", *others) == []


# IRC's own REGISTER keeps blanks, because the password is the last parameter; all three
# dialects can then log in with it.
@pytest.mark.parametrize("before", ["* *", "alice *", "* a@example.org"])
def test_the_register_command_of_irc_keeps_blanks_and_quotes(before):
    house = House()
    come(house, "alice")
    assert "SUCCESS" in str(ask(house, "alice", f'REGISTER {before} :two words "quoted"'))
    assert account_state(house, "alice", 'two words "quoted"', "two") == ['two words "quoted"']


# Without the colon it has too many parameters; none may be dropped.
def test_the_register_command_of_irc_with_too_many_words_makes_no_account():
    house = House()
    come(house, "alice")
    lines = ask(house, "alice", "REGISTER * * correct horse battery")
    assert "SUCCESS" not in str(lines) and not refused(lines, "900")
    assert refused(lines, "461") or " FAIL REGISTER " in str(lines)
    assert "REGISTER" in str(lines) and "password" in str(lines).lower()
    assert account_state(house, "alice", "correct", BLANKS, "battery") == []


# One account, set by IRC with blanks, logged in to from every dialect.
@dialects
def test_a_password_with_blanks_logs_in_from_every_dialect(dialect):
    house = House()
    account(house, "zoe", password=BLANKS)
    write = typist(house, dialect)
    write("login", f'zoe "{BLANKS}"')
    write("passwd", f'"{BLANKS}" changed')
    assert account_state(house, "zoe", "changed") == ["changed"]


# ======================================================================================
# STORE
# ======================================================================================


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def texts(store, key, count=100):
    return [event.text for event in store.history.page(chat.Span(chat.Place((key,))), count)]


def test_history_outlives_the_server_and_ids_go_on(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter("alice")
    house.say("alice", "one", "/lines 2", "two", "three", "gr\u00fc\u00df \U0001f600")
    last_id = house.hub.last_id
    house.turn()
    house.store.close()
    again = chat.Store(folder / "chat.db")
    assert texts(again, chat.LOBBY) == ["one", "two\nthree", "gr\u00fc\u00df \U0001f600"]
    hub = chat.load_hub(again, 0.0, 0.0)  # the clock was set back meanwhile
    assert hub.last_id > last_id
    again.close()


def test_a_page_is_the_newest_of_one_channel_in_order(folder):
    store = chat.Store(folder / "chat.db")
    house = House(store=store)
    house.enter("alice")
    house.say("alice", *(str(n) for n in range(50)), "/join #a", "elsewhere")
    house.turn()
    assert texts(store, chat.LOBBY, 3) == ["47", "48", "49"]
    assert texts(store, "#a") == ["elsewhere"]
    assert texts(store, "#never") == []


def test_a_busy_database_delays_the_turn_and_then_loses_it_with_a_word_to_the_speakers(folder):
    store = chat.Store(folder / "chat.db")
    house = House(store=store)
    house.enter("alice", "bob")
    house.say("alice", "one", "two")
    events = house.hub.turn
    other = sqlite3.connect(folder / "chat.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.commit(events, 100.0) == chat.BUSY
    assert store.commit(events, 100.9) == chat.BUSY
    assert store.commit(events, 101.1) == chat.LOST
    house.hub.turn.not_kept(store.trouble)
    for data, sessions in house.hub.turn.deliveries():
        for session in sessions:
            session.conn.out += data
    assert house.heard("bob") == ["alice: one", "alice: two"]
    assert house.heard("alice") == ["* 2 messages delivered but not kept: database is locked"]
    assert store.commit(events, 101.2) == chat.LOST  # no second of waiting for each turn
    other.execute("COMMIT")
    assert store.commit(events, 101.3) == chat.KEPT
    assert texts(store, chat.LOBBY) == ["one", "two"]


def test_a_full_disk_loses_history_but_no_message(folder):
    store = chat.Store(folder / "chat.db")
    house = House(store=store)
    house.enter("alice")
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    house.say("alice", *["x" * 10000] * 5)
    assert store.commit(house.hub.turn, 100.0) == chat.LOST
    assert "full" in store.trouble
    store.db.execute("PRAGMA max_page_count = 100000")
    assert store.commit(house.hub.turn, 100.1) == chat.KEPT
    assert len(texts(store, chat.LOBBY)) == 5


@pytest.fixture
def full(folder):
    """A server whose disk is full, with alice and an operator."""
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter_irc("alice", "boss")
    ask(house, "boss", "OPER boss secret")

    def refuse():
        raise OSError("the disk is full")

    house.store._check_folder = refuse
    return house


def make_room(house):
    del house.store._check_folder


def test_a_change_that_a_full_disk_did_not_take_is_stored_while_nothing_happens(full):
    assert "SUCCESS" in str(ask(full, "alice", "REGISTER * * password"))
    full.idle(3)
    assert full.store.rows("accounts") == []
    make_room(full)
    full.idle(3)
    assert [row[0] for row in full.store.rows("accounts")] == ["alice"]
    assert not full.committer.losing


def test_a_change_that_a_full_disk_did_not_take_is_stored_at_the_stop(full, folder):
    ask(full, "alice", "REGISTER * * password")
    make_room(full)
    assert full.committer.close()
    full.store.close()
    with contextlib.closing(chat.Store(folder / "chat.db")) as store:
        assert [row[0] for row in store.rows("accounts")] == ["alice"]


def test_a_user_is_told_that_a_change_is_not_stored_yet(full):
    told = "your change is not stored yet, and will be tried again"
    assert told in str(ask(full, "alice", "REGISTER * * password"))
    assert told in str(ask(full, "boss", "KLINE *@10.0.0.1 10 :x"))
    assert told not in str(ask(full, "alice", "PING x"))
    make_room(full)
    full.idle(3)
    assert told not in str(ask(full, "boss", "UNKLINE *@10.0.0.1"))


def test_changes_that_are_lost_at_the_stop_are_counted_in_the_log(full, caplog):
    ask(full, "alice", "REGISTER * * password")
    full.committer.close()
    assert caplog.messages[-1] == "1 lasting change lost: the disk is full"


def test_foundings_of_a_channel_in_which_nothing_was_said_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(chat, "FOUNDINGS_SILENT", 5)
    house = House()
    house.enter_irc("alice")
    for n in range(20):
        house.say("alice", "JOIN #a", *(["PRIVMSG #a :hello"] if n == 3 else []), "PART #a")
    house.idle(3)
    count = "SELECT count(*) FROM targets WHERE key = '#a'"
    assert house.store.db.execute(count).fetchone() == (5 + 1,)
    house.say("alice", "JOIN #a", "PRIVMSG #a :again")
    house.idle(3)
    assert texts(house.store, "#a") == ["hello", "again"]


def test_the_rows_of_a_channel_are_added_up_once_however_many_foundings_it_has():
    house, asked = House(), []
    house.enter_irc("alice")
    house.say("alice", *["JOIN #a", "PART #a"] * 50)
    house.store.count_due = math.inf
    house.turn()
    house.store.db.set_trace_callback(asked.append)
    house.store.count()
    assert sum("sum(events)" in one for one in asked) == 1


def test_the_index_closes_also_if_a_part_cannot_be_made_again(folder, monkeypatch):
    monkeypatch.setattr(chat, "PART_ROWS", 2)
    house = House(store=chat.Store(folder / "chat.db"))
    come(house, "alice")
    house.say("alice", "JOIN #a")
    ids = [send(house, "alice", "#a", f"word{n}")[0] for n in range(8)]
    words = house.store.words
    words.db.execute("UPDATE parts SET stale = messages")  # all are to be made again
    house.say("alice", f"REDACT #a {ids[0]}")
    house.written.clear()
    house.end_turn()
    words.finish(words.step()())
    assert words.unfit and not words.gone
    with contextlib.closing(sqlite3.connect(folder / "search.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        left = words.step()()
        assert left[1:] == ([], True)
        words.finish(left)
        words.close()
    house.store.db.close()


def test_after_a_crash_private_talks_are_deleted_to_the_last_row_and_never_seen_again(folder):
    store = chat.Store(folder / "chat.db")
    store.tally_due = float("inf")  # killed before the counts were written down
    house = House(store=store)
    house.enter("alice", "bob")
    house.say("alice", *(f"/tell bob {n}" for n in range(1200)))
    house.turn()
    store.db.close()
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter("eve")
    while house.store.prune(idle=True, now=0):
        house.say("eve", "/join #new", "/part")
        house.turn()
    assert texts(house.store, "#new") == []
    assert house.store.db.execute(
        "SELECT count(*) FROM events WHERE kind = 'message'"
    ).fetchone() == (0,)


def test_counts_do_not_drift_while_history_is_pruned_under_load(folder):
    store = chat.Store(folder / "chat.db", keep=1000)
    house = House(store=store)
    house.enter("alice")
    for _ in range(100):
        house.say("alice", *["x"] * 90)
        house.turn()
        store.prune(idle=False, now=0)
    rows = store.db.execute("SELECT count(*) FROM events").fetchone()[0]
    assert counted_rows(store) == rows and rows < 1300


def test_memory_holds_only_so_much_history(monkeypatch):
    monkeypatch.setattr(chat, "MEMORY_BYTES", 500_000)
    house = house_of("alice")
    for n in range(20):
        house.say("alice", f"/join #{n}", *["x" * 1000] * 100, "/part")
        house.turn()
        while house.store.prune(idle=True, now=0):
            pass
    assert len(texts(house.store, "#19", 1000)) == 100
    assert texts(house.store, "#0") == []


def test_a_database_that_another_process_has_locked_is_not_called_damaged(folder):
    path = folder / "chat.db"
    chat.Store(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(chat.Unusable, match="locked") as caught:
            chat.Store(path)
        assert "damaged" not in str(caught.value)


def test_history_is_pruned_by_count_in_slices(folder):
    store = chat.Store(folder / "chat.db", keep=100)
    house = House(store=store)
    house.enter("alice")
    house.say("alice", *(str(n) for n in range(2000)))
    house.turn()
    store.commit(chat.Turn(), house.now + 10)
    slices = 0
    while store.prune(idle=True, now=0):
        slices += 1
    assert slices >= 2
    assert texts(store, chat.LOBBY, 1000) == [str(n) for n in range(1900, 2000)]
    assert store.db.execute("SELECT events FROM targets").fetchone() == (100,)


def test_a_database_of_the_first_version_is_brought_up_to_date_and_keeps_all(folder):
    with contextlib.closing(sqlite3.connect(folder / "chat.db", isolation_level=None)) as db:
        db.executescript(
            f"{chat.MIGRATIONS[0]}; PRAGMA user_version = 1;"
            f"PRAGMA application_id = {chat.APPLICATION_ID};"
            "INSERT INTO targets (key, events) VALUES ('#lobby', 1);"
            "INSERT INTO events VALUES (1, 5, 6, 'message', 'al', '127.0.0.1:7', 'from long ago');"
        )
    store = chat.Store(folder / "chat.db")
    (event,) = store.history.page(chat.Span(chat.Place((chat.LOBBY,))), 10)
    assert (event.id, event.time, event.text) == (5, 6, "from long ago")
    assert event.source.mask == "al!@127.0.0.1"
    index_all(store)
    found = store.words.search([chat.Place((chat.LOBBY,))], "long", chat.Span(chat.Place(())), 5)
    assert [found_event.id for _, found_event in found] == [5]
    store.close()


def test_pruning_waits_for_an_idle_turn_unless_it_is_overdue(folder):
    store = chat.Store(folder / "chat.db", keep=1000)
    house = House(store=store)
    house.enter("alice")
    house.say("alice", *["x"] * 1050)
    house.turn()
    store.commit(chat.Turn(), house.now + 10)
    store.prune(idle=False, now=0)
    assert len(texts(store, chat.LOBBY, 2000)) == 1050
    house.say("alice", *["x"] * 100)
    house.turn()
    store.commit(chat.Turn(), house.now + 20)
    store.prune(idle=False, now=0)
    assert len(texts(store, chat.LOBBY, 2000)) == 1000


def test_private_talks_end_with_the_server(folder):
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter("alice", "bob")
    house.say("alice", "/tell bob psst", "hello")
    house.turn()
    house.store.close()
    store = chat.Store(folder / "chat.db")
    House(store=store)
    while store.prune(idle=True, now=0):
        pass
    assert store.db.execute("SELECT key FROM targets").fetchall() == [(chat.LOBBY,)]
    assert store.db.execute("SELECT count(*) FROM events WHERE text = 'psst'").fetchone() == (0,)


def test_checkpoints_move_the_log_into_the_database(folder):
    store = chat.Store(folder / "chat.db")
    house = House(store=store)
    house.enter("alice")
    house.say("alice", *["x" * 100] * 1000)
    house.turn()
    before = (folder / "chat.db").stat().st_size
    store.checkpoint()
    assert (folder / "chat.db").stat().st_size > before + 100_000


def test_a_large_write_ahead_log_is_restarted(folder, monkeypatch):
    monkeypatch.setattr(chat, "WAL_RESTART_BYTES", 100_000)
    house = House(store=chat.Store(folder / "chat.db"))
    house.enter("alice")
    house.store.checkpoint()  # the first one begins a new log, whatever its size
    sizes = []
    for _ in range(4):
        house.say("alice", *["x" * 100] * 2000)
        house.turn()
        house.store.checkpoint()
        sizes.append((folder / "chat.db-wal").stat().st_size)
    assert sizes[-1] < 2 * sizes[0]


def spoiled(path, how):
    """A database with something wrong, as bytes."""
    if how == "junk":
        return b"this is no database at all, but long enough to be one" * 100
    if how == "foreign":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE recipes (name)")
            db.commit()
        return path.read_bytes()
    chat.Store(path).close()
    if how == "newer":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
        return path.read_bytes()
    data = path.read_bytes()
    return data[: len(data) // 2] if how == "half" else data[:4096] + b"\xff" * 300 + data[4396:]


@pytest.mark.parametrize(
    "how, words",
    [
        ("junk", "is damaged"),
        ("half", "is damaged"),
        ("holes", "is damaged"),
        ("foreign", "is not a database of chat.py"),
        ("newer", "is from a newer chat.py (schema 99"),
    ],
)
def test_a_database_that_is_not_sound_and_ours_is_refused_in_one_line_and_not_touched(
    folder, how, words
):
    path = folder / "chat.db"
    data = spoiled(path, how)
    path.write_bytes(data)
    with pytest.raises(chat.Unusable) as caught:
        chat.Store(path)
    assert words in str(caught.value) and "nothing was changed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_channel_whose_history_did_not_fit_in_memory_has_what_is_said_there_next(monkeypatch):
    monkeypatch.setattr(chat, "MEMORY_BYTES", 500_000)
    house = house_of("alice")
    house.say("alice", *["x" * 1000] * 100)
    house.turn()
    others = itertools.count(1)
    while texts(house.store, "#lobby"):
        house.say("alice", f"/join #{next(others)}", *["x" * 1000] * 100, "/part")
        house.turn()
        while texts(house.store, "#lobby") and house.store.prune(idle=True, now=0):
            pass
    house.store.prune(idle=True, now=0)  # finds no more of it
    house.say("alice", "/join #lobby", "again")
    house.turn()
    assert texts(house.store, "#lobby") == ["again"]


def test_a_page_goes_from_one_founding_of_a_channel_to_the_next():
    house = house_of("alice")
    for words in ("one two three", "four five six", "seven eight nine"):
        house.say("alice", "/join #a", *words.split())
        house.turn()
        house.say("alice", "/part")  # and it is gone
        house.turn()
    store, span = house.store, chat.Span(chat.Place((chat.fold("#a"),)))
    assert len(store.history.targets_of(store.db, span.place)) == 3
    newest = [event.text for event in store.history.page(span, 4)]
    oldest = [event.text for event in store.history.page(span, 4, newest=False)]
    assert newest == ["six", "seven", "eight", "nine"]
    assert oldest == ["one", "two", "three", "four"]


# What outlives the server


SECRET = "0123456789abcdef" * 2
ECHOES = "CAP REQ :message-tags echo-message chat.py/session"


def restarted(house, path):
    """The next server on the same data: no user said goodbye."""
    house.turn()
    house.store.close()
    again = House(store=chat.Store(path))
    again.now = house.now
    again.hub.begin(again.now)
    return again


def come_again(house, label, name, secret=SECRET, account=""):
    """A client with a secret; what it hears until it is there."""
    session = house.connect_irc(label)
    if account:
        session.account, session.proof = account, house.hub.accounts[chat.fold(account)].revision
    house.say(label, ECHOES, f"SESSION {secret}", f"NICK {name}", "USER u 0 * :R", "CAP END")
    house.turn()
    return house.heard(label)


def make_account(house, name):
    chat.save_account(house.hub, chat.Account(name, BOSS, "", len(name)))


def names_in(house, channel):
    return sorted(house.hub.channels[channel].names(None)) if channel in house.hub.channels else []


def test_a_channel_founded_by_an_account_survives_the_server_with_all_that_was_set(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    make_account(house, "alice")
    make_account(house, "bob")
    come_again(house, "alice", "alice", account="alice")
    come_again(house, "bob", "bob", "b" * 32, account="bob")
    house.say("alice", "JOIN #ship", "TOPIC #ship :ahoy", "MODE #ship +klb hunter2 7 *!*@evil")
    house.say("bob", "JOIN #ship hunter2")
    house.say("alice", "MODE #ship +v bob", "METADATA #ship SET colour :blue")
    house.say("alice", "QUIT")
    house.say("bob", "QUIT")
    state = house.hub.channels["#ship"].state()
    again = restarted(house, path)
    assert again.hub.users == {}
    assert json.dumps(again.hub.channels["#ship"].state()) == json.dumps(state)
    assert "hunter2" not in json.dumps(again.store.rows("channels"))
    again.enter_irc("carol")
    again.say("carol", "JOIN #ship", "LIST")
    again.turn()
    assert "475 carol #ship" in "".join(again.heard("carol"))
    come_again(again, "bob", "bob", "c" * 32, account="bob")
    again.say("bob", "JOIN #ship hunter2")
    come_again(again, "alice", "alice", "d" * 32, account="alice")
    again.say("alice", "JOIN #ship")
    again.turn()
    assert names_in(again, "#ship") == ["+bob", "~alice"]
    assert ":chat.py 332 bob #ship ahoy" in [x.replace(":ahoy", "ahoy") for x in again.heard("bob")]
    again.store.close()


def test_a_user_with_a_token_or_an_account_is_absent_after_a_restart_and_keeps_the_ranks(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    come_again(house, "alice", "alice")
    house.enter_irc("bob")
    house.say("alice", "JOIN #s,#t", "MODE #s +i", "PRIVMSG #s :secret", "AWAY :tea")
    house.say("bob", "JOIN #other")
    again = restarted(house, path)
    (user,) = again.hub.users.values()
    assert (user.name, user.away, user.sessions) == ("alice", "tea", [])
    assert [c.name for c in user.channels] == ["#s", "#t"]
    assert "#other" not in again.hub.channels
    heard = come_again(again, "alice", "alice")
    assert [x for x in heard if " JOIN " in x] == [
        ":alice!~u@127.0.0.1 JOIN #s",
        ":alice!~u@127.0.0.1 JOIN #t",
    ]
    again.say("alice", "CHATHISTORY LATEST #s * 9", "MODE #s")
    again.turn()
    heard = again.heard("alice")
    assert any("secret" in line for line in heard) and any("+int" in line for line in heard)
    assert names_in(again, "#s") == ["@alice"]
    again.say("alice", "QUIT")
    third = restarted(again, path)
    assert third.hub.users == {} and third.hub.channels == {}
    assert third.store.rows("stays") == [] and third.store.rows("channels") == []
    third.store.close()


def test_a_private_conversation_goes_on_after_a_restart_with_the_user_who_comes_back(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    come_again(house, "alice", "alice")
    come_again(house, "bob", "bob", "b" * 32)
    house.say("alice", "PRIVMSG bob :psst")
    again = restarted(house, path)
    assert again.store.orphans == set()
    come_again(again, "bob", "bob", "b" * 32)
    again.say("bob", "CHATHISTORY LATEST alice * 9")
    again.turn()
    assert any(line.endswith("PRIVMSG bob :psst") for line in again.heard("bob"))
    again.say("bob", "QUIT")
    again.grace_over()
    third = restarted(again, path)
    assert len(third.store.orphans) == 1
    third.store.close()


def test_a_client_with_the_same_token_resumes_its_user_and_others_hear_nothing():
    house = House()
    come_again(house, "old", "alice")
    house.enter_irc("bob")
    house.say("old", "JOIN #a", "PRIVMSG #a :x")
    house.say("bob", "JOIN #a")
    house.turn()
    house.heard("old"), house.heard("bob")
    heard = come_again(house, "new", "alice")
    assert house.heard("old") == [
        ":chat.py FAIL SESSION REPLACED :another connection of yours has this place now",
        "ERROR :Closing link: Another connection of yours took this place",
    ]
    assert house.heard("bob") == []
    assert ":alice!~u@127.0.0.1 JOIN #a" in heard
    assert len(house.hub.users["alice"].live) == 1


def test_a_secret_is_no_log_in():
    house = House()
    make_account(house, "alice")
    come_again(house, "owner", "alice", account="alice")
    heard = come_again(house, "thief", "alice")
    assert ":chat.py FAIL SESSION ACCOUNT_REQUIRED :log in to alice to have your place again" in (
        "".join(heard)
    )
    assert not any(" 001 " in line for line in heard)
    house.say("thief", "NICK mallory")
    house.turn()
    assert house.hub.users["mallory"].account == ""


def test_a_line_that_breaks_leaves_the_place_for_a_while_and_a_quit_does_not():
    house = House()
    for how, missed in (
        (lambda: house.leave("alice"), ["alice"]),
        (lambda: house.say("alice", "QUIT"), []),
    ):
        come_again(house, "alice", "alice")
        house.say("alice", "JOIN #a")
        house.turn()
        how()
        house.turn()
        gone = "alice" not in house.hub.users
        assert [user.name for user in house.missed] == missed
    assert gone and house.hub.users_by_token == {} and house.hub.channels == {}


def test_a_user_who_comes_back_from_elsewhere_is_seen_to_be_there():
    house = House()
    come_again(house, "alice", "alice")
    house.enter_irc("bob")
    house.say("bob", "CAP REQ chghost", "JOIN #a")
    house.say("alice", "JOIN #a")
    house.turn()
    house.heard("bob")
    house.leave("alice")
    house.turn()
    session = house.connect_irc("alice")
    session.conn.address = "192.0.2.7:1"
    house.say("alice", ECHOES, f"SESSION {SECRET}", "NICK alice", "USER u 0 * :R", "CAP END")
    house.turn()
    assert house.heard("bob") == [":alice!~u@127.0.0.1 CHGHOST ~u 192.0.2.7"]
    assert house.hub.users["alice"].source.mask == "alice!~u@192.0.2.7"


SECRETS = ["", "x", "0" * 31, "0" * 33, "G" * 32, "0" * 31 + "\u00e9"]


@pytest.mark.parametrize("secret", SECRETS)
def test_what_is_no_secret_is_refused(secret):
    house = House()
    house.connect_irc("alice")
    house.say("alice", f"SESSION {secret}")
    house.turn()
    (line,) = house.heard("alice")
    assert "461" in line if not secret else "FAIL SESSION BAD_SECRET" in line


def test_a_given_up_account_founds_nothing_any_more(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.enter_irc("bob")
    house.say("alice", "JOIN #empty,#used", "PART #empty")
    house.say("bob", "JOIN #used")
    assert "#empty" in house.hub.channels
    house.say("alice", "MARKREAD #used timestamp=1970-01-02T00:00:00.000Z")
    house.turn()
    assert house.store.rows("markers") != []
    house.say("alice", "NS DROP secret")
    house.turn()
    assert house.store.rows("markers") == []
    assert "#empty" not in house.hub.channels and "#used" in house.hub.channels
    again = restarted(house, path)
    assert [*again.hub.channels] == ["#used"]  # alice has a secret still
    assert again.hub.channels["#used"].founder == "" and again.hub.users["alice"].account == ""
    again.store.close()


def test_only_a_founder_can_give_a_channel_up():
    house = House()
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.enter_irc("bob")
    house.say("alice", "JOIN #a,#b", "MODE #a +o alice")
    house.say("bob", "JOIN #a", "NS DISOWN #a")
    house.turn()
    assert house.heard("bob")[-1].endswith(":#a is not yours")
    house.heard("alice")
    house.say("alice", "PART #b", "NS DISOWN #b", "NS DISOWN #a", "PART #a")
    house.say("bob", "PART #a")
    house.turn()
    assert house.hub.channels == {} and not +house.hub.founded
    assert any(line.endswith(":#b is no longer registered") for line in house.heard("alice"))


def test_a_user_who_logs_in_gets_the_ranks_in_channels_already_joined():
    house = House()
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.say("alice", "JOIN #a", "QUIT")
    house.enter_irc("guest", "bob")
    house.say("bob", "JOIN #a")
    house.say("guest", "JOIN #a", "NS IDENTIFY alice secret")
    house.turn()
    assert house.heard("bob")[-1] == ":chat.py MODE #a +qo guest guest"
    assert names_in(house, "#a") == ["bob", "~guest"]


def test_an_account_founds_only_so_many_channels(monkeypatch):
    monkeypatch.setattr(chat, "CHANNELS_FOUNDED", 2)
    house = House()
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.say("alice", "JOIN #a,#b,#c", "PART #a,#b,#c")
    assert sorted(house.hub.channels) == ["#a", "#b"]


def test_a_founder_can_join_the_channel_whatever_its_modes_are():
    house = House()
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.say("alice", "JOIN #a")
    house.enter_irc("bob")
    house.say("bob", "JOIN #a")
    house.say("alice", "MODE #a +o bob")
    house.say("bob", "MODE #a -o alice", "MODE #a +ikb word alice!*@*", "KICK #a alice")
    house.say("alice", "JOIN #a")
    assert names_in(house, "#a") == ["@bob", "~alice"]


def test_a_turn_that_was_not_stored_brings_no_former_name_of_a_channel_back(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.say("alice", "JOIN #old")
    house.hub.settle()
    house.store.backlog.add(house.hub.turn.records, 0)  # the disk was full
    house.hub.end()
    house.say("alice", "RENAME #old #new :x")
    house.turn()
    assert [key for key, _ in house.store.rows("channels")] == ["#new"]
    house.store.close()


@pytest.mark.parametrize("host", ["198.51.100.7", "198.51.100.{}"])
def test_a_user_who_is_one_too_many_after_a_restart_is_in_no_channel(folder, monkeypatch, host):
    monkeypatch.setattr(chat, "ABSENT_MOST", 5)
    store = chat.Store(folder / "chat.db")
    hub = chat.load_hub(store, 1.0, 1.0, absent_per_host=100)
    for n in range(7):
        values = f"u{n}", "u", "U", f"{host.format(n)}:1", "", "", f"{n:032x}"
        hub.perform("enter", n + 1, *values, True, 0, (), "")
        hub.perform("join", n + 1, "#tea", "")
    hub.settle()
    assert store.commit(hub.turn, 1.0) == chat.KEPT
    store.close()
    store = chat.Store(folder / "chat.db")
    hub = chat.load_hub(store, 2.0, 2.0, absent_per_host=3)
    left = {"u4", "u5", "u6"} if host == "198.51.100.7" else {f"u{n}" for n in range(2, 7)}
    assert {user.name for user in hub.channels["#tea"].members} == left == hub.users.keys()
    store.close()


@pytest.mark.parametrize("limit", ["in all", "from one address"])
def test_only_so_many_are_missed_at_a_time(running, monkeypatch, limit):
    if limit == "in all":
        monkeypatch.setattr(chat, "ABSENT_MOST", 2)
        server = running()
    else:
        monkeypatch.setattr(chat, "is_loopback", lambda host: False)
        server = running(max_per_address=2)
        monkeypatch.setattr(server.server.limits, "most_per_address", 4)
    witness = server.guest()
    witness.enter_irc("witness", "JOIN #a")
    for n in range(3):
        guest = server.guest()
        guest.send(f"CAP REQ chat.py/session\r\nSESSION {n:032x}\r\nCAP END\r\n")
        guest.enter_irc(f"guest{n}", "JOIN #a")
        guest.sock.shutdown(socket.SHUT_RDWR)
    assert ":guest0!" in witness.until(" QUIT ")[-1]
    assert {"guest1", "guest2"} <= server.server.hub.users.keys()


# Redacted text is gone


GONE = {  # how it was said, each with a word of its own
    "channel": "PRIVMSG #a :quixotryzebra one",
    "notice": "NOTICE #a :jackdawsphinx two",
    "tagged": "@+x=vexillumtag PRIVMSG #a :waltzbadnymph three",
    "rename": "PRIVMSG #old :fjordquackword four",
    "private": "PRIVMSG bob :glyphsvowbrick five",
    "two": "PRIVMSG #a :sphinxquartzjudge my vow",
}
GONE_WORDS = (
    b"quixotryzebra", b"jackdawsphinx", b"waltzbadnymph", b"fjordquackword", b"glyphsvowbrick",
    b"sphinxquartzjudge", b"vexillumtag",
)  # fmt: skip


def words_in_files(path):
    data = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file()).lower()
    return {word for word in (*GONE_WORDS, b"keepsakeword") if word in data}


def redacting(folder):
    """A server on which everything in GONE was said, indexed and redacted."""
    house = stored(folder)
    come(house, "alice", "bob")
    ask(house, "bob", "REGISTER * * password")
    ask(house, "alice", "REGISTER * * password", "JOIN #a,#old", "PRIVMSG #a :keepsakeword")
    said = []
    for text in GONE.values():
        target = text.partition(" :")[0].split()[-1]
        (echo,) = [line for line in ask(house, "alice", text) if f" {target} :" in line]
        said.append((target.replace("#old", "#new"), tag(echo, "msgid")))
    assert words_in_files(folder) == {*GONE_WORDS, b"keepsakeword"}
    ask(house, "alice", "RENAME #old #new")
    for target, message_id in said:
        assert f" REDACT {target} {message_id}" in str(
            ask(house, "alice", f"REDACT {target} {message_id}")
        )
    return house


# Gone from every file after a stop; what was not redacted is still there.
def test_redacted_text_is_in_no_file_after_a_stop(folder):
    redacting(folder).store.close()
    assert words_in_files(folder) == {b"keepsakeword"}


# The files as they are while it runs are those that kill -9 leaves.
def test_redacted_text_is_in_no_file_after_a_crash_and_the_next_start(folder, tmp_path):
    house = redacting(folder)
    shutil.copytree(folder, tmp_path / "crashed")
    again = stored(tmp_path / "crashed")
    again.store.close()
    assert words_in_files(tmp_path / "crashed") == {b"keepsakeword"}
    house.store.close()


# Within 60 s of idle turns, without a stop. The House must drive the idle work of its turns
# (house.md section 5: the tests' House drives the server's own end of turn).
def test_redacted_text_is_in_no_file_after_a_minute_of_idle_turns(folder):
    house = stored(folder)
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    send(house, "alice", "#a", "keepsakeword")
    message_id, _ = send(house, "alice", "#a", "quixotryzebra")
    assert words_in_files(folder) >= {b"keepsakeword", b"quixotryzebra"}
    assert can_redact(house, "alice", "#a", message_id)
    house.idle(61)
    assert words_in_files(folder) == {b"keepsakeword"}
    assert spoken(ask(house, "alice", "SEARCH in=#a;text=keepsakeword")) == ["keepsakeword"]
    house.store.close()


def test_text_that_was_redacted_right_before_a_stop_is_in_no_file_either(folder):
    house = stored(folder)
    come(house, "alice")
    ask(house, "alice", "JOIN #a", "PRIVMSG #a :keepsakeword")
    message_id, _ = send(house, "alice", "#a", "quixotryzebra")
    assert words_in_files(folder) == {b"keepsakeword", b"quixotryzebra"}
    house.written.clear()
    house.say("alice", f"REDACT #a {message_id}")
    house.end_turn()
    assert house.store.words.gone  # the index has still to forget it
    house.store.close()
    assert words_in_files(folder) == {b"keepsakeword"}


def test_a_disk_that_was_full_is_tried_again_a_second_later(folder):
    store = chat.Store(folder / "chat.db")
    house = House(store=store)
    make_account(house, "alice")
    come_again(house, "alice", "alice", account="alice")
    house.say("alice", "JOIN #old", "TOPIC #old x", "METADATA alice SET url :x")
    house.hub.settle()
    pages = store.db.execute("PRAGMA page_count").fetchone()[0]
    store.db.execute(f"PRAGMA max_page_count = {pages}")
    house.say("alice", *["PRIVMSG #old :" + "x" * 400] * 50)
    house.hub.settle()
    assert store.commit(house.hub.turn, 100.0) == chat.LOST
    store.db.execute("PRAGMA max_page_count = 100000")
    again = 100.0 + chat.BACKLOG_SECONDS
    assert store.commit(house.hub.turn, again - 0.1) == chat.LOST
    assert store.commit(house.hub.turn, again) == chat.KEPT
    store.close()


# ======================================================================================
# NATS
# ======================================================================================


class FakeNats:
    """A NATS server with JetStream in memory: one stream at most, as nodes use it. `clock` tells
    the time of entries. While it is `down`, it takes and sends nothing; with `mute` it keeps
    entries and does not say so."""

    def __init__(self, clock, **info):
        self.clock = clock
        self.info = {"server_id": "fake", "headers": True, "jetstream": True} | info
        self.info.setdefault("max_payload", 1_048_576)
        self.config = None
        self.entries = []  # subject, data, milliseconds
        self.first = 1
        self.ids = {}
        self.clients = []
        self.refused = ""  # what entries are answered with
        self.down = self.mute = False
        self.foreign = ""  # the subject of another stream

    def accept(self):
        client = FakeNatsClient(self)
        self.clients.append(client)
        client.say(f"INFO {json.dumps(self.info)}")
        return client

    def append(self, id, data):
        """Return the answer to a publication."""
        if self.refused:
            return {"error": {"code": 503, "description": self.refused}}
        if id in self.ids:
            return {"stream": "chat", "seq": self.ids[id], "duplicate": True}
        self.entries.append((data, int(self.clock() * 1000)))
        self.ids[id] = self.last
        return {"stream": "chat", "seq": self.last}

    def deliver(self):
        for client in self.clients:
            client.deliver()

    @property
    def last(self):
        return self.first + len(self.entries) - 1

    def api(self, subject, request):
        if self.config is None and "CREATE" not in subject:
            return {"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}
        if "STREAM.CREATE" in subject:
            if request["num_replicas"] > 1:
                return {"error": {"code": 500, "err_code": 10074, "description": "replicas > 1"}}
            if self.foreign in request["subjects"]:
                return {"error": {"code": 400, "err_code": 10065, "description": "overlap"}}
            self.config = request
        return {
            "config": self.config,
            "state": {"first_seq": self.first if self.entries else 0, "last_seq": self.last},
        }


class FakeNatsClient:
    """The server's side of one connection."""

    def __init__(self, nats):
        self.nats, self.buffer, self.out = nats, b"", b""
        self.subscriptions = {}  # subject by number
        self.consumer = None  # subscription, the next entry, how many were delivered

    def say(self, line, data=b""):
        self.out += line.encode() + b"\r\n" + data

    def feed(self, data):
        self.buffer += data
        while b"\r\n" in self.buffer:
            line, _, rest = self.buffer.partition(b"\r\n")
            verb, *words = line.decode().split(" ")
            size = int(words[-1]) + 2 if verb in ("PUB", "HPUB") else 0
            if len(rest) < size:
                break
            self.buffer = rest[size:]
            self.act(verb, words, rest[: size - 2])

    def act(self, verb, words, data):
        if verb == "PING":
            self.say("PONG")
        elif verb == "SUB":
            self.subscriptions[words[1]] = words[0]
        elif verb == "UNSUB":
            self.subscriptions.pop(words[0])
        elif verb in ("PUB", "HPUB"):
            reply, id = (words[1] if len(words) > 2 + (verb == "HPUB") else ""), ""
            if verb == "HPUB":
                head, data = data[: int(words[-2])], data[int(words[-2]) :]
                id = chat.nats_headers(head)[1]["Nats-Msg-Id"]
            self.published(words[0], reply, id, data)

    def published(self, subject, reply, id, data):
        if subject.startswith("$JS.API"):
            request = json.loads(data or b"{}")
            if "CONSUMER" in subject:
                config = request["config"]
                number = next(
                    n for n, s in self.subscriptions.items() if s == config["deliver_subject"]
                )
                self.consumer = [number, config["opt_start_seq"], 0]
                answer = {"name": "x"}
            else:
                answer = self.nats.api(subject, request)
            self.answer(reply, answer)
            self.deliver()
        elif id:
            answer = self.nats.append(id, data)
            if not self.nats.mute:
                self.answer(reply, answer)
            self.nats.deliver()

    def answer(self, reply, answer):
        data = json.dumps(answer).encode()
        self.say(f"MSG {reply} 1 {len(data)}", data + b"\r\n")

    def deliver(self):
        while self.consumer and self.consumer[1] <= self.nats.last:
            number, sequence, count = self.consumer
            sequence = max(sequence, self.nats.first)
            self.consumer[1:] = sequence + 1, count + 1
            data, when = self.nats.entries[sequence - self.nats.first]
            left = self.nats.last - sequence
            reply = f"$JS.ACK.chat.x.1.{sequence}.{count + 1}.{when}000000.{left}"
            self.say(f"MSG chat.log {number} {reply} {len(data)}", data + b"\r\n")


class FakeLink(chat.NatsLink):
    """A node's link to a FakeNats, whose bytes move in exchange()."""

    client = None

    def dial(self):
        """Do nothing: the test says when there is a connection again."""

    def join(self, nats):
        self.nats, self.client = nats, nats.accept()
        options = self.options
        self.dialogue = chat.NatsDialogue(options.node, options.user, options.password)
        self.conn, self.tls, self.out = self, None, b""

    def write(self, data):
        self.out += data

    def drop(self, reason):
        """The connection breaks, or the node ends it."""
        if self.client:
            self.nats.clients.remove(self.client)
            self.client, self.out = None, b""
            self.lost(reason)

    def flush(self):
        if self.conn is self and self.dialogue.out:
            self.out += b"".join(self.dialogue.out)
            self.dialogue.out.clear()

    @property
    def moves(self):
        return bool(self.client and not self.nats.down and (self.out or self.client.out))

    def exchange(self):
        """Move all bytes."""
        while self.moves:
            out, self.out = self.out, b""
            self.client.feed(out)
            data, self.client.out = self.client.out, b""
            if data:
                self.received(data)


class NodeHouse(House):
    """A House that is a node of a cluster."""

    def __init__(self, nats, name="n1", store=None, **options):
        self.link = None
        given = chat.NodeOptions(name, (("127.0.0.1", 4222),))
        store = store or chat.Store(None, node=True)
        super().__init__(store=store, cluster=given, **options)
        self.now = nats.clock()
        self.begin_turn()
        self.link = FakeLink(self)
        self.link.join(nats)
        self.settle_log()
        self.settle_log()

    @property
    def peers(self):
        return {s.conn for s in self.guests.values() if not s.conn.closed}

    @peers.setter
    def peers(self, value):
        """Do nothing: the guests are the peers."""

    def settle_log(self):
        """Read and write the log until there is nothing more to do."""
        for _ in range(2):
            while self.link.moves:
                self.end_turn()
            self.link.attempt(lambda: self.cluster.tick(self.loop.now))
            self.end_turn()

    def end_turn(self):
        if self.link:
            self.link.exchange()
        super().end_turn()
        ready = (s for s in self.guests.values() if not (s.conn.held or s.conn.closed))
        if self.link and (self.link.moves or any(s.conn.lines or s.has_more for s in ready)):
            self.loop.call_soon(chat.do_nothing)


def dialogue_of(nats, pieces=None):
    """Return a ready dialogue, the server's side of it, and a function that moves all bytes."""
    dialogue, client, found = chat.NatsDialogue("n1"), nats.accept(), []

    def move():
        while dialogue.out or client.out:
            client.feed(b"".join(dialogue.out))
            dialogue.out.clear()
            data, client.out = client.out, b""
            while data:
                size = pieces.randrange(1, 40) if pieces else len(data)
                found.extend(dialogue.feed(data[:size]))
                data = data[size:]
        return found

    move()
    return dialogue, client, move


def test_a_log_is_created_written_and_read_in_order_however_its_bytes_are_cut(seeded):
    nats = FakeNats(lambda: 5.0)
    dialogue, _, move = dialogue_of(nats, seeded)
    log, answers = chat.NatsLog(dialogue, "chat", 2, 0), []
    log.open(1.0)
    move()
    assert nats.config["num_replicas"] == 1 and nats.config["subjects"] == ["chat.log"]
    assert nats.config["max_age"] == 2 * 86_400 * 10**9 and log.is_empty
    for n in (1, 2, 2, 3):
        data = f"entry {n}\r\n".encode() * n
        log.append(data, f"id {n}", lambda *answer: answers.append(answer))
    entries = [log.take(message) for message in move()]
    assert [entry[:3] for entry in entries] == [
        (n, 5000, f"entry {n}\r\n".encode() * n) for n in (1, 2, 3)
    ]
    assert answers == [("", 1), ("", 2), ("", 2), ("", 3)] and entries[-1].waiting == 0


def test_a_reader_that_misses_an_entry_reads_it_through_another_consumer():
    nats = FakeNats(lambda: 5.0)
    dialogue, client, move = dialogue_of(nats)
    log = chat.NatsLog(dialogue, "chat", 2, 0)
    log.open(1.0)
    move()
    client.consumer[1:] = 3, 2  # as if two had been lost on their way
    for n in (1, 2, 3):
        nats.append(f"id {n}", b"%d" % n)
    nats.deliver()
    found = [log.take(message) for message in move()]
    assert found == [None]
    found = [log.take(message) for message in move()[1:]]
    assert [entry.data for entry in found] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    "config, first, applied, reason",
    (
        ({"subjects": ["foreign"]}, 1, 0, "is not a log of chat.py"),
        ({"retention": "workqueue"}, 1, 0, "is not a log of chat.py"),
        ({}, 1, 7, "went back: it ends at 3, and this node has applied 7"),
        ({}, 5, 2, "begins at 5 now, and this node has applied 2; start it from a copy"),
        (None, 1, 2, "is gone from NATS"),
    ),
)
def test_a_log_that_does_not_fit_is_refused_with_the_reason(config, first, applied, reason):
    nats = FakeNats(lambda: 5.0)
    if config is not None:
        nats.config = {"subjects": ["chat.log"], "retention": "limits"} | config
    nats.entries, nats.first = [(b"", 0)] * 3, first
    dialogue, _, move = dialogue_of(nats)
    chat.NatsLog(dialogue, "chat", 2, applied).open(1.0)
    with pytest.raises(chat.LogUnusable, match=reason):
        move()


def test_a_subject_that_another_stream_has_is_refused_with_the_way_out():
    nats = FakeNats(lambda: 5.0)
    nats.foreign = "chat.log"
    dialogue, _, move = dialogue_of(nats)
    chat.NatsLog(dialogue, "chat", 2, 0).open(1.0)
    with pytest.raises(chat.LogUnusable, match="has the subject chat.log; name another one"):
        move()


@pytest.mark.parametrize(
    "data, error",
    (
        (b"-ERR 'Authorization Violation'\r\n", chat.LogUnusable),
        (b"-ERR 'Stale Connection'\r\n", chat.NatsFailed),
        (b'INFO {"max_payload": 1000}\r\n', chat.LogUnusable),
        (b"INFO []\r\n", chat.NatsFailed),
        (b"220 mail.example.org ESMTP\r\n", chat.NatsFailed),
        (b"MSG a 1 -5\r\n", chat.NatsFailed),
        (b"HMSG a 1 5\r\nhello\r\n", chat.NatsFailed),
        (b"MSG a 1 99999999999\r\n", chat.NatsFailed),
        (b"x" * (chat.NATS_MESSAGE_BYTES + 1), chat.NatsFailed),
    ),
)
def test_what_is_no_use_as_a_nats_server_is_given_up(data, error):
    with pytest.raises(error):
        chat.NatsDialogue("n1").feed(data)


def test_a_server_without_jetstream_and_one_that_does_not_answer_are_told_apart():
    for info, error in (({"jetstream": False}, chat.LogUnusable), ({}, chat.NatsFailed)):
        nats = FakeNats(lambda: 5.0, **info)
        dialogue, client, move = dialogue_of(nats)
        chat.NatsLog(dialogue, "chat", 2, 0).open(1.0)
        reply = next(iter(dialogue.requests))
        client.published = lambda *_: None
        move()
        head = b"NATS/1.0 503\r\n\r\n"
        with pytest.raises(error):
            dialogue.feed(f"HMSG {reply} 1 16 16\r\n".encode() + head + b"\r\n")
    dialogue, client, move = dialogue_of(FakeNats(lambda: 5.0))
    log = chat.NatsLog(dialogue, "chat", 2, 0)
    log.open(1.0)
    log.tick(1.0 + chat.LOG_ANSWER_SECONDS)
    with pytest.raises(chat.NatsFailed):
        log.tick(1.1 + chat.LOG_ANSWER_SECONDS)


# ======================================================================================
# CLUSTER
# ======================================================================================


class Nodes(dict):
    """Nodes of one cluster, with databases in a folder, by name."""

    def __init__(self, folder, *names):
        super().__init__()
        self.folder = folder
        self.nats = FakeNats(self.clock)
        self.time = 1_000_000.0
        for name in names:
            self.start(name)

    def clock(self):
        self.time = max([self.time, *(house.now for house in self.values())])
        return self.time

    def start(self, name):
        store = chat.Store(self.folder / f"{name}.db", node=True)
        house = self[name] = NodeHouse(self.nats, name, store)
        house.logged = []
        return house

    def kill(self, name):
        """End a node as kill -9 does."""
        house = self.pop(name)
        house.link.drop("killed")
        house.store.db.close()

    def turns(self, count=1):
        for _ in range(count):
            for house in list(self.values()):
                house.turn()
                house.link.attempt(lambda house=house: house.cluster.tick(house.loop.now))

    def settle(self):
        """Let all nodes read all of the log."""
        self.turns(4)
        while any(house.link.moves for house in self.values()):
            for house in self.values():
                house.end_turn()


NODE_TABLES = ("accounts", "bans", "certificates", "channels", "dedup", "events", "files")


def whole_node(house):
    """Return all that has to be the same on all nodes."""
    hub, db = house.hub, house.store.db
    assert not house.failure
    tables = {
        name: sorted(map(repr, db.execute(f"SELECT * FROM {name}")))
        for name in (*NODE_TABLES, "identities", "markers", "starts")
    }
    stays = {row[0]: json.loads(row[1]) for row in db.execute("SELECT * FROM stays")}
    columns = "id, key, founding, one, one_key, other, other_key"
    targets = db.execute(f"SELECT {columns} FROM targets").fetchall()
    shared = (hub.cluster, hub.sequence, hub.checksum, hub.nodes, hub.name, hub.ids.starts)
    return picture_of(hub), tables, stays, targets, shared, hub.files


def assert_nodes_agree(nodes):
    nodes.settle()
    one, *others = map(whole_node, nodes.values())
    for other in others:
        assert one == other


def test_what_is_said_on_one_node_is_heard_on_all_once_and_in_one_order(folder):
    nodes = Nodes(folder, "n1", "n2", "n3")
    for name, house in nodes.items():
        come(house, f"u{name}")
        house.say(f"u{name}", "JOIN #x")
        nodes.turns()
    heard = {name: [] for name in nodes}
    for n in range(20):
        for name, house in nodes.items():
            house.say(f"u{name}", f"PRIVMSG #x :line {n} of {name}")
        nodes.turns()
    nodes.settle()
    for name, house in nodes.items():
        lines = [line.rpartition(":")[2] for line in spoken(house.heard(f"u{name}"))]
        heard[name] = [line for line in lines if line.startswith("line")]
    assert heard["n1"] == heard["n2"] == heard["n3"]
    assert sorted(heard["n1"]) == sorted(f"line {n} of {name}" for n in range(20) for name in nodes)
    assert_nodes_agree(nodes)


def fault_at_random(seeded, nodes, names):
    """Something that happens to nodes and networks; nothing of it may be seen afterwards."""
    name = seeded.choice(names)
    house = nodes.get(name)
    if house is None:
        nodes.start(name)
    elif house.link.client is None:
        house.link.join(nodes.nats)
    elif seeded.random() < 0.4:
        nodes.kill(name)
    elif seeded.random() < 0.5:
        house.link.drop("the network broke")
    elif seeded.random() < 0.5:
        nodes.nats.mute = not nodes.nats.mute
    else:
        house.cluster.save(now=True)


@pytest.mark.parametrize("run", some(range(20), 2))
def test_nodes_that_are_killed_cut_off_and_started_again_are_the_same_in_the_end(
    seeded, folder, run
):
    names = ("n1", "n2", "n3")
    nodes = Nodes(folder, *names)
    for n in range(300):
        house = nodes.get(seeded.choice(names))
        if house is not None:
            act_at_random(seeded, house, n)
        if seeded.random() < 0.3:
            nodes.turns()
        if seeded.random() < 0.05:
            fault_at_random(seeded, nodes, names)
    nodes.nats.mute = False
    for name in names:
        if name not in nodes:
            nodes.start(name)
        elif nodes[name].link.client is None:
            nodes[name].link.join(nodes.nats)
    nodes.turns(30)  # who was cut off for long is declared gone, and begins again
    assert_nodes_agree(nodes)
    first = nodes["n1"].hub
    assert first.last_id > 50 and len(first.nodes) == 3
    for name in names:  # and they load what they stored
        before = whole_node(nodes[name])
        nodes.kill(name)
        store = chat.Store(folder / f"{name}.db", node=True)
        again = chat.restore_node(store, "x")
        assert picture_of(again) == before[0]
        assert again.checksum == before[4][2]
        store.db.close()


def test_a_batch_whose_answer_is_lost_is_sent_again_and_applied_once(folder):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    come(one, "alice")
    one.say("alice", "JOIN #x")
    nodes.turns()
    one.heard("alice")
    entries = nodes.nats.last
    one.say("alice", "PRIVMSG #x :once")
    nodes.nats.mute = True
    one.end_turn()  # it is sent, and in the log
    one.link.exchange()
    sent = one.cluster.sent
    assert nodes.nats.last == entries + 1
    one.link.drop("broken")
    nodes.nats.mute = False
    one.link.join(nodes.nats)
    nodes.settle()
    assert sum(line.endswith(":once") for line in one.heard("alice")) == 1
    assert sent is None or nodes.nats.ids
    assert_nodes_agree(nodes)


def test_a_node_without_a_batch_for_20_s_is_declared_gone_and_its_users_are_absent(folder):
    nodes = Nodes(folder, "n1", "n2")
    secret = "0123456789abcdef" * 2
    come(nodes["n2"], "bob", secret=secret)
    come(nodes["n1"], "alice")
    for house, name in ((nodes["n1"], "alice"), (nodes["n2"], "bob")):
        house.say(name, "JOIN #x")
        nodes.turns()
    nodes.kill("n2")
    nodes.turns(40)
    one = nodes["n1"]
    assert list(one.hub.nodes) == ["n1"] and [user.name for user in one.missed] == ["bob"]
    come(one, "bobby", secret=secret)  # the secret works on every node
    assert "bob" in one.hub.users and "bobby" not in one.hub.users
    nodes.start("n2")
    assert_nodes_agree(nodes)


def test_a_node_that_was_declared_gone_drops_its_clients_and_begins_again(folder):
    nodes = Nodes(folder, "n1", "n2")
    two = nodes["n2"]
    come(two, "bob")
    epoch = two.cluster.epoch
    del nodes["n2"]  # it is stopped
    nodes.turns(40)
    assert list(nodes["n1"].hub.nodes) == ["n1"]
    nodes["n2"] = two
    nodes.settle()
    assert two.guests["bob"].conn.closed and two.cluster.epoch != epoch and two.cluster.serving
    come(two, "carol")
    assert_nodes_agree(nodes)


def test_a_node_that_cannot_reach_the_log_holds_its_clients_and_then_drops_them(folder):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    come(one, "alice")
    one.link.drop("broken")
    nodes.turns(9)
    assert not one.paused and not one.heard("alice")
    nodes.turns(2)
    assert one.paused
    nodes.turns(10)
    assert "cannot reach the others; your messages wait" in "\n".join(one.heard("alice"))
    assert one.guests["alice"].conn.closed
    one.link.join(nodes.nats)
    nodes.settle()
    assert not one.paused
    come(one, "bob")
    assert_nodes_agree(nodes)


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_jump_of_the_clock_of_nats_declares_no_living_node_gone(folder, jump):
    nodes, moved = Nodes(folder, "n1", "n2", "n3"), [0]
    for name, house in nodes.items():
        come(house, f"u{name}")
    nodes.turns(60)
    nodes.nats.clock = lambda: nodes.clock() + moved[0]
    moved[0] = jump
    nodes["n1"].say("un1", "PING :x")
    nodes.turns(40)
    for name, house in nodes.items():
        assert not house.failure and not house.guests[f"u{name}"].conn.closed
    nodes.kill("n3")
    nodes.turns(30)
    assert nodes["n1"].hub.nodes.keys() == {"n1", "n2"}


@pytest.mark.parametrize("jump", [3600, -3600])
def test_a_jump_of_the_clock_of_nats_ends_no_grace_period(folder, jump):
    nodes, moved = Nodes(folder, "n1", "n2"), [0]
    come(nodes["n1"], "alice", secret=SECRET)
    come(nodes["n2"], "bob")
    nodes.turns(5)
    nodes["n1"].guests["alice"].ended()
    nodes.turns(5)
    nodes.nats.clock = lambda: nodes.clock() + moved[0]
    moved[0] = jump
    for seconds, there in ((chat.GRACE_SECONDS - 30, True), (60, False)):
        for _ in range(int(seconds)):
            nodes.turns()
            for house in nodes.values():
                house.loop.run_due()
        assert ("alice" in nodes["n2"].hub.users) == there
    assert_nodes_agree(nodes)


def test_a_node_stops_at_a_gap_in_the_log_and_says_what_to_do(folder):
    nodes = Nodes(folder, "n1", "n2")
    come(nodes["n1"], "alice")
    nodes.settle()
    one, two = nodes["n1"], nodes["n2"]
    entry = chat.LogEntry(two.hub.sequence + 2, 0, b"[]", 0)
    two.cluster.apply(entry)
    assert f"no entry {two.hub.sequence + 1} any more" in two.failure
    assert "chat.py backup FILE" in two.failure and not one.failure


def test_a_refusal_on_a_node_comes_after_the_echoes_of_the_messages_before_it(folder):
    nodes = Nodes(folder, "n1", "n2")
    house = nodes["n1"]
    come(house, "alice", caps=f"{CAPS} labeled-response")
    ask(house, "alice", "JOIN #x")
    broken = (b"PRIVMSG #x :\xff", b"@label=l1 PRIVMSG #x", b"PRIVMSG #x :" + b"y" * 512)
    house.say("alice", "PRIVMSG #x :one", *broken, "PRIVMSG #x :two", "PRIVMSG #x", "PING :end")
    nodes.settle()
    heard = [line.split(" :alice")[-1] for line in house.heard("alice")]
    verbs = [re.search(r"(?:^|[! ])(FAIL|PRIVMSG|PONG|4\d\d) ", line)[1] for line in heard]
    assert verbs == ["PRIVMSG", "FAIL", "412", "417", "PRIVMSG", "412", "PONG"]
    assert "label=l1" in next(line for line in heard if " 412 " in line)
    assert nodes["n2"].hub.last_id == house.hub.last_id


def test_a_second_node_of_one_name_stops_and_the_first_serves_on(folder):
    nodes = Nodes(folder, "n1")
    one = nodes["n1"]
    come(one, "alice")
    two = nodes["copy"] = NodeHouse(nodes.nats, "n1", chat.Store(folder / "copy.db", node=True))
    nodes.turns(10)
    assert two.failure == "another node is called n1; choose another --node"
    assert not one.failure and not one.guests["alice"].conn.closed


def test_a_node_takes_the_name_of_one_that_is_gone_after_a_while_or_of_its_own_start_at_once(
    folder,
):
    nodes = Nodes(folder, "n1", "n2")
    nodes.kill("n1")
    one = nodes["n1"] = NodeHouse(nodes.nats, "n1", chat.Store(folder / "copy.db", node=True))
    nodes.turns(5)
    assert not one.cluster.serving
    nodes.turns(20)
    assert one.cluster.serving and not one.failure
    nodes.kill("n2")
    assert nodes.start("n2").cluster.serving


def test_a_node_that_differs_from_the_others_stops_and_says_what_to_do(folder):
    nodes = Nodes(folder, "n1", "n2", "n3")
    nodes.turns(8)
    two = nodes["n2"]
    two.hub.checksum = "0" * 16
    for house in nodes.values():
        come(house, f"u{house.cluster.name}")
    nodes.turns(20)
    assert "differ after entry" in two.failure and "chat.py backup FILE" in two.failure
    assert not nodes["n1"].failure and not nodes["n3"].failure


def test_a_database_of_another_history_is_no_node_of_this_cluster(folder):
    nodes = Nodes(folder, "n1")
    store = chat.Store(folder / "n2.db")
    house = House(store=store)
    house.enter("alice")
    house.say("alice", "hello")
    house.turn()
    store.close()
    assert "is not the one that the cluster began with" in nodes.start("n2").failure


def test_a_log_with_another_entry_than_the_one_applied_stops_the_node(folder):
    nodes = Nodes(folder, "n1", "n2")
    come(nodes["n1"], "alice")
    nodes.settle()
    one = nodes["n1"]
    one.link.drop("broken")
    nodes.nats.entries[-1:] = [(b"[]", 1), (b"[]", 2)]
    one.link.join(nodes.nats)
    one.settle_log()
    assert "the log has another entry" in one.failure


def test_acts_of_a_newer_version_stop_an_older_node(folder):
    nodes = Nodes(folder, "n1")
    newer = [chat.ACTS_VERSION + 1, "n9", "e", 1, 0, 0, "", []]
    nodes.nats.append("x", json.dumps(newer).encode())
    nodes.nats.deliver()
    nodes.settle()
    assert "node n9 runs a newer chat.py" in nodes["n1"].failure


HUGE = b'[1, "x", "e3", 1, 99999999999999999999999999, 0, "", []]'


@pytest.mark.parametrize(
    "data", (b"", b"{}", b"[1]", b'[1, "n1", 2, 3, 4, 5, 6, 7]', b"\xff", HUGE)
)
def test_an_entry_that_is_not_of_chat_py_is_passed_over_on_all_nodes(folder, data):
    nodes = Nodes(folder, "n1", "n2")
    nodes.nats.append("x", data)
    come(nodes["n1"], "alice")
    assert_nodes_agree(nodes)


def test_a_log_that_takes_nothing_delays_what_is_said_and_loses_nothing(folder):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    come(one, "alice")
    nodes.nats.refused = "insufficient storage resources available"
    for n in range(3):
        one.say("alice", f"PRIVMSG alice :{n}")
        nodes.turns()
    assert not spoken(one.heard("alice"))
    nodes.nats.refused = ""
    nodes.turns(4)
    told = [line.rpartition(":")[2] for line in spoken(one.heard("alice"))]
    assert told == ["0", "0", "1", "1", "2", "2"]  # each as an echo, and as a message to oneself
    assert sum("the log takes nothing: insufficient" in text for text in one.asked_for) == 1
    assert_nodes_agree(nodes)


def test_a_damaged_snapshot_is_one_clear_line(folder):
    nodes = Nodes(folder, "n1")
    nodes.kill("n1")
    with contextlib.closing(sqlite3.connect(folder / "n1.db")) as db:
        db.execute("UPDATE snapshots SET hub = x'00'")
        db.commit()
    with pytest.raises(chat.Unusable, match="is damaged"):
        nodes.start("n1")


def test_a_snapshot_makes_no_object_that_a_hub_does_not_have():
    kinds = pickle.dumps(([], pickle.dumps(pathlib.Path("x").exists)))
    with pytest.raises(ValueError, match="a snapshot has no"):
        chat.load_snapshot(zlib.compress(kinds), chat.Hub())


def test_the_nodes_are_listed_and_operators_see_how_they_are_doing(folder):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    come(one, "alice")
    come(nodes["n2"], "bob")
    nodes.settle()
    assert [line.partition(" ")[2] for line in ask(one, "alice", "LINKS")] == [
        ":chat.py 364 alice n1 n1 :0 this server",
        ":chat.py 364 alice n2 n1 :1 a node of the cluster",
        ":chat.py 365 alice * :End of LINKS",
    ]
    listed = "\n".join(ask(one, "alice", "MAP"))
    assert ":n1 1 connection\n" in listed and ":n2 1 connection\n" in listed
    assert not any(" 249 " in line for line in ask(one, "alice", "STATS n"))
    told = "\n".join(ask(one, "alice", "OPER boss secret", "STATS n"))
    assert f"entry {one.hub.sequence} of the log, 0 waiting" in told
    assert one.metrics()["chat_nodes"][2] == 2


def test_a_file_on_another_node_is_redirected_to_and_is_unavailable_while_that_is_gone(folder):
    nodes = Nodes(folder, "n1", "n2")
    one, two = nodes["n1"], nodes["n2"]
    id = "ab" * 16
    values = (id, "a.txt", "text/plain", 5, "=alice/1", "192.0.2.1", "n2")
    two.site.act("begin_file", *values)
    two.site.act("finish_file", id, "cd" * 32, 5, "text/plain", 0, 0)
    nodes.settle()
    assert one.hub.files[id].node == "n2" and one.hub.files[id].sha
    one.site.folder = two.site.folder = object()
    head = chat.Request("GET", f"/files/{id}", 1, {"host": ["localhost"]})
    for url, answer in (("", 503), ("https://two.example", 307)):
        two.hub.nodes["n2"] = one.hub.nodes["n2"] = one.hub.nodes["n2"]._replace(url=url)
        conn = FakeConn(one, "127.0.0.1:50000")
        session = conn.session = chat.WebSession(one.site, conn)
        session.request = head
        assert chat.is_elsewhere(session, head)
        sent = b"".join(data for _, data in session.replies).decode()
        assert sent.startswith(f"HTTP/1.1 {answer} ")
        assert ("Location: https://two.example/files/" in sent) == bool(url)
    assert not chat.is_elsewhere(chat.WebSession(two.site, FakeConn(two, "127.0.0.1:1")), head)


def test_old_messages_are_pruned_on_all_nodes_alike(folder, monkeypatch):
    nodes = Nodes(folder, "n1", "n2")
    for house in nodes.values():
        house.store.keep = 20
    one = nodes["n1"]
    come(one, "alice")
    one.say("alice", "JOIN #x", *(f"PRIVMSG #x :{n}" for n in range(60)))
    nodes.turns(2)
    for house in nodes.values():
        house.store.count()
    nodes.turns(3)
    assert_nodes_agree(nodes)
    query = "SELECT count(*) FROM events"
    assert {house.store.db.execute(query).fetchone()[0] for house in nodes.values()} == {20}


def test_old_keys_of_messages_are_forgotten_on_all_nodes_alike(folder):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    come(one, "alice")
    one.say("alice", *(f"@+chat.py/id=k{n} PRIVMSG alice :{n}" for n in range(3)))
    nodes.settle()
    for house in nodes.values():
        with house.store.db as db:
            db.execute("UPDATE dedup SET time = ?", [-chat.DEDUP_MS])
            db.execute("DELETE FROM events WHERE text = '1'")
    for house in nodes.values():
        house.committer.sweep()
    nodes.settle()
    keys = [h.store.db.execute("SELECT own_id FROM dedup").fetchall() for h in nodes.values()]
    assert keys == [[("k0",), ("k2",)]] * 2


def test_a_node_that_stops_in_order_is_gone_at_once(folder):
    nodes = Nodes(folder, "n1", "n2")
    for house in nodes.values():
        come(house, f"u{house.cluster.name}")
    nodes["n2"].say("un2", "JOIN #x")  # is still under way
    nodes["n2"].cluster.flush()
    nodes["n2"].cluster.leave()
    nodes["n1"].say("un1", "JOIN #x")
    nodes.turns(3)
    assert list(nodes["n1"].hub.nodes) == ["n1"] and nodes["n2"].cluster.has_left


def test_a_server_on_its_own_that_becomes_a_cluster_keeps_what_it_has_and_can_leave_again(folder):
    store = chat.Store(folder / "n1.db")
    house = House(store=store)
    account(house, "alice")
    come(house, "dora")
    house.say("dora", "JOIN #x", "PRIVMSG #x :before")
    house.turn()
    house.store.close()
    shutil.copy(folder / "n1.db", folder / "n2.db")
    nodes = Nodes(folder, "n1", "n2")
    assert "alice" in nodes["n2"].hub.accounts
    come(nodes["n2"], "bob")
    nodes["n2"].say("bob", "JOIN #x", "PRIVMSG #x :after")
    assert_nodes_agree(nodes)
    newest = nodes["n2"].hub.last_id
    nodes.kill("n2")
    alone = chat.Store(folder / "n2.db")
    assert alone.was_node and newest <= alone.last_id < chat.LAST_ID
    said = [row[0] for row in alone.db.execute("SELECT text FROM events WHERE kind = 'message'")]
    assert said == ["before", "after"]
    alone.close()
    assert not chat.Store(folder / "n2.db").was_node


def test_a_line_that_reads_waits_for_the_acts_before_it_and_messages_do_not():
    nats = FakeNats(lambda: 1_000_000.0)
    house = NodeHouse(nats)
    come(house, "alice")
    house.say("alice", "JOIN #x")
    house.turn()
    entries = nats.last
    house.heard("alice")
    house.say("alice", *(f"PRIVMSG #x :{n}" for n in range(20)))
    house.say("alice", "TOPIC #x :news", "TOPIC #x", "PING 1")
    house.turn()
    told = house.heard("alice")
    assert [line.rpartition(":")[2] for line in spoken(told)] == [str(n) for n in range(20)]
    assert nats.last == entries + 2  # all messages in one batch
    assert any(" 332 " in line and line.endswith(":news") for line in told)
    assert told[-1].endswith(":1")


def test_labels_find_the_answers_of_their_lines_also_when_several_are_under_way():
    house = NodeHouse(FakeNats(lambda: 1_000_000.0))
    come(house, "alice", caps="message-tags labeled-response batch echo-message")
    house.say("alice", "JOIN #x")
    house.turn()
    house.heard("alice")
    lines = [f"@label=l{n} PRIVMSG {'#x' if n % 3 else '#nowhere'} :{n}" for n in range(9)]
    house.say("alice", *lines, "@label=names NAMES #x")
    house.turn()
    told = house.heard("alice")
    labels = [tag(line, "label") for line in told if "label=" in line]
    assert labels == [*(f"l{n}" for n in range(9)), "names"]
    for n, line in enumerate(told[:9]):
        assert (" PRIVMSG #x " if n % 3 else " 40") in line


def test_messages_sent_again_on_another_node_are_answered_with_their_labels(folder):
    nodes = Nodes(folder, "n1", "n2")
    caps = "message-tags labeled-response batch echo-message chat.py/session"
    lines = [f"@label=l{n};+chat.py/id=m{n} PRIVMSG #x :{n}" for n in range(9)]
    secret = "0123456789abcdef" * 2
    for name in nodes:
        come(nodes[name], "alice", caps=caps, secret=secret)
        nodes[name].say("alice", "JOIN #x")
        nodes.turns()
        nodes[name].heard("alice")
        nodes[name].say("alice", *lines, "@label=end PING 1")
        nodes.turns(2)
        told = nodes[name].heard("alice")
        found = [(tag(line, "label"), line[-2:]) for line in told if "label=" in line]
        assert sorted(found) == sorted([*((f"l{n}", f":{n}") for n in range(9)), ("end", ":1")])
        assert found[-1][0] == "end"
        ids = {tag(line, "msgid") for line in told if "msgid=" in line}
        assert len(ids) == 9
    assert_nodes_agree(nodes)


@pytest.mark.parametrize("cut_off", (False, True))
def test_a_client_that_goes_while_its_acts_are_under_way_leaves_nothing_behind(folder, cut_off):
    nodes = Nodes(folder, "n1", "n2")
    one = nodes["n1"]
    one.connect_irc("alice")
    one.say("alice", "NICK alice", "USER u 0 * :Alice", "MONITOR + bob")
    one.guests["alice"].conn.close()
    if cut_off:
        nodes.turns()
    nodes.settle()
    for house in nodes.values():
        assert not house.hub.users and not house.hub.watchers
        assert not [session for session in house.hub.sessions.values() if session.id]


# ======================================================================================
# IRC DIALECT
# ======================================================================================

# Alice, Bob and Carol have IRC clients, Dora has netcat; each line in and all it causes:
#
#     +erin             another IRC client connects
#     +#a alice bob     they are in #a already
#     alice> LINE       alice sends that; a turn ends
#     bob< LINE         bob hears that. Names stand for masks, and the server's is left out
IRC_TRANSCRIPTS = r"""
=== registration: a name, USER, and the welcome in its order
+erin
erin> NICK erin
erin> USER erin 0 * :Erin
erin< the welcome
=== registration: PING is answered before, other commands are not
+erin
erin> PING before
erin< PONG chat.py :before
erin> JOIN #a
erin< 451 * :a name first, please; then commands
erin> FOO
erin< 421 * FOO :there is no FOO; help lists what there is
erin> NOTICE alice :hello
erin< 451 * :a name first, please; then commands
erin> PONG x
erin> ERROR :nothing
=== registration: a name that is taken, or cannot be one, can be tried again
+erin
erin> NICK
erin< 431 * :which name?
erin> NICK :
erin< 431 * :which name?
erin> NICK *
erin< 432 * * :names have at most 32 characters, and none that IRC needs
erin> NICK a,b
erin< 432 * a,b :names have at most 32 characters, and none that IRC needs
erin> NICK #erin
erin< 432 * #erin :names have at most 32 characters, and none that IRC needs
erin> NICK 0123456789012345678901234567890123
erin< 432 * 0123456789012345678901234567890123 :names have at most 32 characters, and none that IRC needs
erin> NICK ALICE
erin< 433 * ALICE :ALICE is taken
erin> NICK Dora
erin< 433 * Dora :Dora is taken
erin> USER erin
erin< 461 * USER :it goes like this: USER <username> 0 * <realname>
erin> USER erin 0 * :
erin< 461 * USER :a real name, please
erin> NICK erin
erin> USER erin 0 * :Erin
erin< the welcome
=== registration: of two who want a name one gets it, and the other another
+erin
+fred
erin> NICK same
fred> NICK Same
erin> USER e 0 * :Erin
erin< the welcome
fred> USER f 0 * :Fred
fred< 433 * Same :Same is taken
fred> NICK fred
fred< the welcome
=== registration: nothing is said twice
alice> USER x 0 * :x
alice< 462 alice :that was said already, and cannot be changed
alice> PASS x
alice< 462 alice :you are in already
alice> CAP END
=== CAP: no negotiation, no names, until it is over
+erin
erin> CAP LS 302
erin< CAP * LS * :chat.py/session draft/account-registration=min-password-length=3,max-password-length=300 draft/channel-rename draft/chathistory draft/event-playback draft/extended-isupport draft/message-redaction draft/metadata-2=before-connect,max-subs=50,max-keys=20,max-value-bytes=300 draft/metadata-3=before-connect,max-subs=50,max-keys=20,max-value-bytes=300 draft/multiline=max-bytes=16384,max-lines=200 draft/no-implicit-names draft/pre-away draft/read-marker draft/oper-tag draft/whoami
erin< CAP * LS * :no-implicit-names soju.im/search znc.in/self-message
erin< CAP * LS :sasl=PLAIN,SCRAM-SHA-256 multi-prefix away-notify account-notify extended-join server-time message-tags echo-message batch labeled-response userhost-in-names account-tag chghost invite-notify setname cap-notify extended-monitor standard-replies
erin> NICK erin
erin> USER erin 0 * :Erin
erin> CAP REQ :multi-prefix setname
erin< CAP erin ACK :multi-prefix setname
erin> CAP LIST
erin< CAP erin LIST :cap-notify multi-prefix setname
erin> CAP REQ :multi-prefix sts
erin< CAP erin NAK :multi-prefix sts
erin> CAP REQ :-setname
erin< CAP erin ACK :-setname
erin> CAP LIST
erin< CAP erin LIST :cap-notify multi-prefix
erin> CAP FOO
erin< 410 erin FOO :CAP has LS, LIST, REQ and END
erin> CAP
erin< 461 erin CAP :it goes like this: CAP LS|LIST|REQ|END [<capabilities>]
=== CAP: is heard also later, and counts from the next line on
alice> CAP LS
alice< CAP alice LS :sasl multi-prefix away-notify account-notify extended-join server-time message-tags echo-message batch labeled-response userhost-in-names account-tag chghost invite-notify setname cap-notify extended-monitor standard-replies
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> CAP REQ :userhost-in-names
alice< CAP alice ACK :userhost-in-names
alice> NAMES #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> CAP REQ :-userhost-in-names
alice< CAP alice ACK :-userhost-in-names
alice> NAMES #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
=== CAP: who asked for it hears his own words again
+#a alice
alice> CAP REQ echo-message
alice< CAP alice ACK :echo-message
alice> PRIVMSG #a :heard?
alice< :alice PRIVMSG #a :heard?
alice> PRIVMSG bob :and this?
alice< :alice PRIVMSG bob :and this?
bob< :alice PRIVMSG bob :and this?
alice> PRIVMSG alice :myself
alice< :alice PRIVMSG alice :myself
alice< :alice PRIVMSG alice :myself
alice> NOTICE alice :myself
alice< :alice NOTICE alice :myself
alice< :alice NOTICE alice :myself
=== CAP: extended-join and away-notify and setname are for those who asked
alice> CAP REQ :extended-join away-notify setname
alice< CAP alice ACK :extended-join away-notify setname
alice> JOIN #a
alice< :alice JOIN #a * :Real Name
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
bob> JOIN #a
alice< :bob JOIN #a * :Real Name
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
bob> AWAY :lunch
alice< :bob AWAY :lunch
bob< 306 bob :You have been marked as being away
bob> SETNAME :Robert
alice< :bob SETNAME :Robert
bob> AWAY
alice< :bob AWAY
bob< 305 bob :You are no longer marked as being away
alice> SETNAME :Alicia
alice< :alice SETNAME :Alicia
alice> AWAY :too
alice< 306 alice :You have been marked as being away
alice> SETNAME :
alice< FAIL SETNAME INVALID_REALNAME :a real name has 1 to 128 bytes that can be seen
=== NICK: one line to everybody who knows you, and none for no change
+#a alice bob
+#b alice bob
alice> NICK alice
alice> NICK Alice
alice< :alice NICK :Alice
bob< :alice NICK :Alice
alice> NICK alicia
alice< :Alice NICK :alicia
bob< :Alice NICK :alicia
bob> NICK ALICIA
bob< 433 bob ALICIA :ALICIA is taken
carol> NICK alice
carol< :carol NICK :alice
carol> NICK
carol< 431 alice :which name?
=== QUIT: is told to neighbours with its reason, and what follows it is not heard
+#a alice bob
bob> QUIT :so long
alice< :bob QUIT :Quit: so long
bob< ERROR :Closing link: Quit: so long
bob> PRIVMSG #a :too late
bob> QUIT :again
alice> NAMES #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
=== PING, PONG and ERROR
alice> PING
alice< 461 alice PING :it goes like this: PING <token>
alice> PING :
alice< PONG chat.py :
alice> PING :two words
alice< PONG chat.py :two words
alice> PONG x
alice> ERROR :x
=== PRIVMSG: to channels and people, one or several
+#a alice bob
alice> PRIVMSG #a :hello all
bob< :alice PRIVMSG #a :hello all
alice> PRIVMSG bob,carol :hello both
bob< :alice PRIVMSG bob :hello both
carol< :alice PRIVMSG carol :hello both
alice> PRIVMSG bob,bob,absent,#none :each once
alice< 401 alice absent :no user here is called absent
alice< 403 alice #none :there is no channel #none now
bob< :alice PRIVMSG bob :each once
alice> PRIVMSG alice :myself
alice< :alice PRIVMSG alice :myself
alice> PRIVMSG dora :line protocol
dora< (private) alice: line protocol
=== PRIVMSG: what is missing is said
alice> PRIVMSG
alice< 411 alice :to whom?
alice> PRIVMSG bob
alice< 412 alice :there is nothing to say
alice> PRIVMSG bob :
alice< 412 alice :there is nothing to say
alice> PRIVMSG absent :x
alice< 401 alice absent :no user here is called absent
alice> PRIVMSG #none :x
alice< 403 alice #none :there is no channel #none now
alice> PRIVMSG b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q,r,s,t,u,v :x
alice< 407 alice b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q,r,s,t,u,v :20 targets at most; the message was not delivered
=== PRIVMSG: colons and blanks in the text are kept
+#a alice bob
alice> PRIVMSG #a ::-) :-(
bob< :alice PRIVMSG #a ::-) :-(
alice> PRIVMSG #a :  three  blanks
bob< :alice PRIVMSG #a :  three  blanks
alice> PRIVMSG    #a    oneword
bob< :alice PRIVMSG #a :oneword
alice> :stranger!else@where PRIVMSG #a :source is ignored
bob< :alice PRIVMSG #a :source is ignored
alice> privmsg #a :case is ignored
bob< :alice PRIVMSG #a :case is ignored
=== PRIVMSG: an action is an action everywhere, and other CTCPs are not for people
+#lobby alice bob
alice> PRIVMSG #lobby :\x01ACTION waves\x01
bob< :alice PRIVMSG #lobby :\x01ACTION waves\x01
dora< alice: *waves*
dora> /me waves back
alice< :dora PRIVMSG #lobby :\x01ACTION waves back\x01
bob< :dora PRIVMSG #lobby :\x01ACTION waves back\x01
alice> PRIVMSG dora :\x01VERSION\x01
dora< (private) * alice sends a CTCP that only programs understand: VERSION
alice> PRIVMSG #lobby :\x0304,01red\x03 and \x02bold\x02
bob< :alice PRIVMSG #lobby :\x0304,01red\x03 and \x02bold\x02
dora< alice: red and bold
=== NOTICE: goes where a PRIVMSG goes, and nothing ever answers it
+#lobby alice bob
alice> NOTICE #lobby :note
bob< :alice NOTICE #lobby :note
dora< -alice- note
alice> NOTICE bob,dora :note
bob< :alice NOTICE bob :note
dora< (private) -alice- note
alice> NOTICE absent :x
alice> NOTICE #none :x
alice> NOTICE
alice> NOTICE bob
=== STATUSMSG: reaches a rank and those above
+#a alice bob carol
alice> MODE #a +v bob
alice< :alice MODE #a +v bob
bob< :alice MODE #a +v bob
carol< :alice MODE #a +v bob
carol> PRIVMSG @#a :to operators
alice< :carol PRIVMSG @#a :to operators
carol> NOTICE +#a :to voices and above
alice< :carol NOTICE +#a :to voices and above
bob< :carol NOTICE +#a :to voices and above
alice> PRIVMSG ~#a :to no member
dora> /tell @#a from outside
dora< * you are not in #a; /join #a first
=== AWAY: is told to who writes, and to who asks
bob> AWAY :lunch
bob< 306 bob :You have been marked as being away
alice> PRIVMSG bob :there?
alice< 301 alice bob :lunch
bob< :alice PRIVMSG bob :there?
alice> NOTICE bob :there?
bob< :alice NOTICE bob :there?
alice> WHOIS bob
alice< 311 alice bob ~u 127.0.0.1 * :Real Name
alice< 312 alice bob chat.py :chat.py
alice< 301 alice bob :lunch
alice< 317 alice bob 6 WHEN :seconds idle, signon time
alice< 318 alice bob :End of WHOIS
alice> USERHOST bob absent ALICE
alice< 302 alice :bob=-~u@127.0.0.1 alice=+~u@127.0.0.1
bob> AWAY :
bob< 305 bob :You are no longer marked as being away
alice> PRIVMSG bob :there?
bob< :alice PRIVMSG bob :there?
bob> AWAY
bob< 305 bob :You are no longer marked as being away
=== JOIN: first the JOIN, then the topic, then the names
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> TOPIC #a :tea
alice< :alice TOPIC #a :tea
bob> JOIN #A
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 332 bob #a :tea
bob< 333 bob #a alice WHEN
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
bob> JOIN #a
=== JOIN: what cannot be joined does not keep from the others
alice> JOIN a,#b,#,#c\x07d,#\x00,,#e
alice< 476 alice a :a channel's name begins with # and goes on, like #tea
alice< :alice JOIN #b
alice< 353 alice = #b :@alice
alice< 366 alice #b :End of NAMES
alice< 476 alice # :a channel's name begins with # and goes on, like #tea
alice< 476 alice #c\x07d :a channel's name is visible, without spaces, commas or ]
alice< :alice JOIN #e
alice< 353 alice = #e :@alice
alice< 366 alice #e :End of NAMES
alice> JOIN
alice< 461 alice JOIN :it goes like this: JOIN <channel>{,<channel>} [<key>{,<key>}]
alice> JOIN :
alice< 476 alice * :a channel's name begins with # and goes on, like #tea
=== JOIN 0 leaves all
alice> JOIN #a,#b
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice< :alice JOIN #b
alice< 353 alice = #b :@alice
alice< 366 alice #b :End of NAMES
alice> JOIN 0
alice< :alice PART #a
alice< :alice PART #b
=== JOIN: keys go to channels by position
alice> JOIN #k,#l key1
alice< :alice JOIN #k
alice< 353 alice = #k :@alice
alice< 366 alice #k :End of NAMES
alice< :alice JOIN #l
alice< 353 alice = #l :@alice
alice< 366 alice #l :End of NAMES
alice> MODE #k +k key1
alice< :alice MODE #k +k key1
bob> JOIN #k
bob< 475 bob #k :cannot join #k: it has a password (+k)
bob> JOIN #l,#k x,wrong
alice< :bob JOIN #l
bob< :bob JOIN #l
bob< 353 bob = #l :@alice bob
bob< 366 bob #l :End of NAMES
bob< 475 bob #k :cannot join #k: it has a password (+k)
bob> JOIN #x,#k x,key1
alice< :bob JOIN #k
bob< :bob JOIN #x
bob< 353 bob = #x :@bob
bob< 366 bob #x :End of NAMES
bob< :bob JOIN #k
bob< 353 bob = #k :@alice bob
bob< 366 bob #k :End of NAMES
=== PART: with and without a reason
+#a alice bob
+#b alice
alice> PART #a :my reasons
alice< :alice PART #a :my reasons
bob< :alice PART #a :my reasons
alice> PART #a
alice< 442 alice #a :you are not in #a; /join #a first
alice> PART #none,#b
alice< 403 alice #none :there is no channel #none now
alice< :alice PART #b
alice> PART
alice< 461 alice PART :it goes like this: PART <channel>{,<channel>} [<reason>]
=== TOPIC: is read by all, set by operators, and cleared
+#a alice bob
bob> TOPIC #a
bob< 331 bob #a :No topic is set
bob> TOPIC #a :mine
bob< 482 bob #a :only operators of #a can do that
alice> TOPIC #a :tea at five
alice< :alice TOPIC #a :tea at five
bob< :alice TOPIC #a :tea at five
bob> TOPIC #a
bob< 332 bob #a :tea at five
bob< 333 bob #a alice WHEN
alice> TOPIC #a :
alice< :alice TOPIC #a :
bob< :alice TOPIC #a :
carol> TOPIC #a
carol< 331 carol #a :No topic is set
alice> TOPIC #none
alice< 403 alice #none :there is no channel #none now
alice> TOPIC
alice< 461 alice TOPIC :it goes like this: TOPIC <channel> [<topic>]
alice> MODE #a -t
alice< :alice MODE #a -t
bob< :alice MODE #a -t
bob> TOPIC #a :now I may
alice< :bob TOPIC #a :now I may
bob< :bob TOPIC #a :now I may
carol> TOPIC #a :from outside
carol< 442 carol #a :you are not in #a; /join #a first
=== NAMES: of several channels, unknown ones, and none
+#a alice
+#b alice bob
alice> MODE #b +sv bob
alice< :alice MODE #b +sv bob
bob< :alice MODE #b +sv bob
carol> NAMES #a,#b,#c
carol< 353 carol = #a :@alice
carol< 366 carol #a,#b,#c :End of NAMES
bob> NAMES #b
bob< 353 bob @ #b :@alice +bob
bob< 366 bob #b :End of NAMES
alice> NAMES
alice< 366 alice * :End of NAMES
alice> NAMES #none
alice< 366 alice #none :End of NAMES
=== NAMES: all ranks for those who can read them
+#a alice
alice> MODE #a +v alice
alice< :alice MODE #a +v alice
alice> NAMES #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> CAP REQ multi-prefix
alice< CAP alice ACK :multi-prefix
alice> NAMES #a
alice< 353 alice = #a :@+alice
alice< 366 alice #a :End of NAMES
alice> WHO #a
alice< 352 alice #a ~u 127.0.0.1 chat.py alice H@+ :0 Real Name
alice< 315 alice #a :End of WHO
=== LIST: all, some, by mask, by number of members
+#apple alice
+#banana alice bob
+#cherry alice
alice> TOPIC #apple :red
alice< :alice TOPIC #apple :red
alice> MODE #cherry +s
alice< :alice MODE #cherry +s
carol> LIST
carol< 321 carol Channel :Users Topic
carol< 322 carol #lobby 1 :
carol< 322 carol #apple 1 :red
carol< 322 carol #banana 2 :
carol< 323 carol :End of LIST
alice> LIST
alice< 321 alice Channel :Users Topic
alice< 322 alice #lobby 1 :
alice< 322 alice #apple 1 :red
alice< 322 alice #banana 2 :
alice< 322 alice #cherry 1 :
alice< 323 alice :End of LIST
carol> LIST #apple,#none
carol< 321 carol Channel :Users Topic
carol< 322 carol #apple 1 :red
carol< 323 carol :End of LIST
carol> LIST *an*
carol< 321 carol Channel :Users Topic
carol< 322 carol #banana 2 :
carol< 323 carol :End of LIST
carol> LIST !*an*
carol< 321 carol Channel :Users Topic
carol< 322 carol #lobby 1 :
carol< 322 carol #apple 1 :red
carol< 323 carol :End of LIST
carol> LIST >1
carol< 321 carol Channel :Users Topic
carol< 322 carol #banana 2 :
carol< 323 carol :End of LIST
carol> LIST <2
carol< 321 carol Channel :Users Topic
carol< 322 carol #lobby 1 :
carol< 322 carol #apple 1 :red
carol< 323 carol :End of LIST
carol> LIST T<5
carol< 321 carol Channel :Users Topic
carol< 322 carol #apple 1 :red
carol< 323 carol :End of LIST
carol> LIST C>0,*a*
carol< 321 carol Channel :Users Topic
carol< 322 carol #apple 1 :red
carol< 322 carol #banana 2 :
carol< 323 carol :End of LIST
carol> LIST C<0
carol< 321 carol Channel :Users Topic
carol< 323 carol :End of LIST
carol> LIST * other.server
carol< 402 carol other.server :there is no such server; this one stands alone
=== INVITE: lets in, once
+#a alice
alice> MODE #a +i
alice< :alice MODE #a +i
bob> JOIN #a
bob< 473 bob #a :cannot join #a: one has to be invited (+i)
alice> INVITE bob #a
alice< 341 alice bob #a
bob< :alice INVITE bob #a
bob> INVITE
bob< 336 bob #a
bob< 337 bob :End of invitations
bob> JOIN #a
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
bob> INVITE
bob< 337 bob :End of invitations
bob> PART #a
alice< :bob PART #a
bob< :bob PART #a
bob> JOIN #a
bob< 473 bob #a :cannot join #a: one has to be invited (+i)
=== INVITE: what is wrong is said
+#a alice bob
alice> INVITE absent #a
alice< 401 alice absent :no user here is called absent
alice> INVITE bob #a
alice< 443 alice bob #a :bob is in #a already
alice> INVITE carol #none
alice< 403 alice #none :there is no channel #none now
alice> INVITE carol
alice< 461 alice INVITE :it goes like this: INVITE <nickname> <channel>
carol> INVITE dora #a
carol< 442 carol #a :you are not in #a; /join #a first
alice> MODE #a +i
alice< :alice MODE #a +i
bob< :alice MODE #a +i
bob> INVITE carol #a
bob< 482 bob #a :only operators of #a can do that
alice> INVITE dora #a
alice< 341 alice dora #a
dora< * alice invites you to #a; /join #a
=== KICK: one line each, with a reason or the kicker's name
+#a alice bob carol
alice> KICK #a bob :bye now
alice< :alice KICK #a bob :bye now
bob< :alice KICK #a bob :bye now
carol< :alice KICK #a bob :bye now
alice> KICK #a carol,absent,dora
alice< :alice KICK #a carol :alice
alice< 401 alice absent :no user here is called absent
alice< 441 alice dora #a :dora is not in #a
carol< :alice KICK #a carol :alice
bob> KICK #a alice
bob< 442 bob #a :you are not in #a; /join #a first
bob> JOIN #a
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
bob> KICK #a alice
bob< 482 bob #a :only operators of #a can do that
alice> KICK #none bob
alice< 403 alice #none :there is no channel #none now
alice> KICK #a
alice< 461 alice KICK :it goes like this: KICK <channel> <nickname>{,<nickname>} [<reason>]
alice> KICK #a alice :myself
alice< :alice KICK #a alice :myself
bob< :alice KICK #a alice :myself
=== MODE: of a channel, read and cleared
+#a alice
alice> MODE #a
alice< 324 alice #a +nt
alice< 329 alice #a WHEN
alice> MODE #a +kl key 5
alice< :alice MODE #a +l 5
alice< :alice MODE #a +k key
alice> MODE #a
alice< 324 alice #a +klnt key 5
alice< 329 alice #a WHEN
bob> MODE #a
bob< 324 bob #a +klnt * 5
bob< 329 bob #a WHEN
alice> MODE #a -ntkl x
alice< :alice MODE #a -ntl
alice< :alice MODE #a -k *
alice> MODE #a
alice< 324 alice #a +
alice< 329 alice #a WHEN
alice> MODE #a -k x
alice> MODE #none
alice< 403 alice #none :there is no channel #none now
alice> MODE
alice< 461 alice MODE :it goes like this: MODE <channel or nickname> [<modes> [<value>...]]
=== MODE: ranks are given to members by operators
+#a alice bob
alice> MODE #a +v bob
alice< :alice MODE #a +v bob
bob< :alice MODE #a +v bob
alice> MODE #a +v bob
alice> MODE #a -v+h bob bob
alice< :alice MODE #a -v+h bob bob
bob< :alice MODE #a -v+h bob bob
bob> MODE #a +v bob
alice< :bob MODE #a +v bob
bob< :bob MODE #a +v bob
bob> MODE #a +o bob
bob< 482 bob #a :only operators of #a can do that
alice> MODE #a +o carol
alice< 441 alice carol #a :carol is not in #a
alice> MODE #a +o absent
alice< 401 alice absent :no user here is called absent
alice> MODE #a +q alice
alice< 482 alice #a :only operators of #a can do that
bob> MODE #a -h bob
alice< :bob MODE #a -h bob
bob< :bob MODE #a -h bob
bob> MODE #a +m
bob< 482 bob #a :only operators of #a can do that
carol> MODE #a +m
carol< 442 carol #a :you are not in #a; /join #a first
alice> MODE #a +o
alice< 461 alice MODE :to whom? MODE #a +o <nickname>
=== MODE: what cannot be is said once
+#a alice
alice> MODE #a +XYXXX
alice< 472 alice X :there is no channel mode X; the modes are beI, k, l, qaohv, CRimnst
alice< 472 alice Y :there is no channel mode Y; the modes are beI, k, l, qaohv, CRimnst
alice> MODE #a +l zero
alice< 696 alice #a l zero :a limit is a number from 1 on
alice> MODE #a +l 0
alice< 696 alice #a l 0 :a limit is a number from 1 on
alice> MODE #a +l
alice< 696 alice #a l * :a limit is a number from 1 on
alice> MODE #a +k :two words
alice< 696 alice #a k * :a channel's password is one word of at most 32 bytes
alice> MODE #a +k
alice< 696 alice #a k * :a channel's password is one word of at most 32 bytes
alice> MODE #a +b :two words
alice< 696 alice #a b * :a mask is one word of at most 200 bytes
alice> MODE #a +
=== MODE +b, +e: keep out, but for exceptions
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> MODE #a +b bob!*@*
alice< :alice MODE #a +b bob!*@*
bob> JOIN #a
bob< 474 bob #a :cannot join #a: you are banned from it
alice> MODE #a +e *!~u@127.0.0.1
alice< :alice MODE #a +e *
bob> JOIN #a
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
bob> PRIVMSG #a :I may speak
alice< :bob PRIVMSG #a :I may speak
alice> MODE #a -e *!~u@127.0.0.1
alice< :alice MODE #a -e *
bob< :alice MODE #a -e *
bob> PRIVMSG #a :not any more
bob< 404 bob #a :you may not speak in #a
alice> MODE #a +b
alice< 367 alice #a bob!*@* alice WHEN
alice< 368 alice #a :End of bans
alice> MODE #a b
alice< 367 alice #a bob!*@* alice WHEN
alice< 368 alice #a :End of bans
alice> MODE #a -b BOB!*@*
alice< :alice MODE #a -b BOB!*@*
bob< :alice MODE #a -b BOB!*@*
bob> PRIVMSG #a :again
alice< :bob PRIVMSG #a :again
carol> MODE #a +b
carol< 442 carol #a :you are not in #a; /join #a first
=== MODE: masks are made whole
+#a alice
alice> MODE #a +bbbb bob bob!u u@host a:acc
alice< :alice MODE #a +bbbb bob!*@* bob!u@* *!u@host a:acc
alice> MODE #a +b
alice< 367 alice #a bob!*@* alice WHEN
alice< 367 alice #a bob!u@* alice WHEN
alice< 367 alice #a *!u@host alice WHEN
alice< 367 alice #a a:acc alice WHEN
alice< 368 alice #a :End of bans
alice> MODE #a +e m:carol
alice< :alice MODE #a +e m:carol!*@*
alice> MODE #a +e
alice< 348 alice #a m:carol!*@* alice WHEN
alice< 349 alice #a :End of exceptions from bans
=== MODE +b m: mutes, voices and exceptions are louder
+#a alice bob
alice> MODE #a +b m:bob
alice< :alice MODE #a +b m:bob!*@*
bob< :alice MODE #a +b m:bob!*@*
bob> PRIVMSG #a :silenced
bob< 404 bob #a :you may not speak in #a
alice> MODE #a +v bob
alice< :alice MODE #a +v bob
bob< :alice MODE #a +v bob
bob> PRIVMSG #a :voiced
alice< :bob PRIVMSG #a :voiced
alice> MODE #a -v bob
alice< :alice MODE #a -v bob
bob< :alice MODE #a -v bob
alice> MODE #a +e m:bob
alice< :alice MODE #a +e m:bob!*@*
bob< :alice MODE #a +e m:bob!*@*
bob> PRIVMSG #a :excepted
alice< :bob PRIVMSG #a :excepted
=== MODE +i and +I
+#a alice
alice> MODE #a +iI carol!*@*
alice< :alice MODE #a +iI carol!*@*
bob> JOIN #a
bob< 473 bob #a :cannot join #a: one has to be invited (+i)
carol> JOIN #a
alice< :carol JOIN #a
carol< :carol JOIN #a
carol< 353 carol = #a :@alice carol
carol< 366 carol #a :End of NAMES
alice> MODE #a +I
alice< 346 alice #a carol!*@* alice WHEN
alice< 347 alice #a :End of exceptions from +i
=== MODE +l: full is full
+#a alice
alice> MODE #a +l 1
alice< :alice MODE #a +l 1
bob> JOIN #a
bob< 471 bob #a :cannot join #a: it is full (+l 1)
alice> MODE #a +l 2
alice< :alice MODE #a +l 2
bob> JOIN #a
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
alice> MODE #a +l 1
alice< :alice MODE #a +l 1
bob< :alice MODE #a +l 1
=== MODE +m and +v
+#a alice bob
alice> MODE #a +m
alice< :alice MODE #a +m
bob< :alice MODE #a +m
bob> PRIVMSG #a :x
bob< 404 bob #a :#a is moderated; only who has a voice may speak
alice> MODE #a +v bob
alice< :alice MODE #a +v bob
bob< :alice MODE #a +v bob
bob> PRIVMSG #a :heard
alice< :bob PRIVMSG #a :heard
=== MODE +n: no message from outside
+#a alice
bob> PRIVMSG #a :x
bob< 404 bob #a :you are not in #a; /join #a first
alice> MODE #a -n
alice< :alice MODE #a -n
bob> PRIVMSG #a :from outside
alice< :bob PRIVMSG #a :from outside
=== MODE +C and +R
+#a alice bob
alice> MODE #a +C
alice< :alice MODE #a +C
bob< :alice MODE #a +C
bob> PRIVMSG #a :\x01VERSION\x01
bob< 404 bob #a :#a takes no CTCP but actions (+C)
bob> PRIVMSG #a :\x01ACTION waves\x01
alice< :bob PRIVMSG #a :\x01ACTION waves\x01
alice> MODE #a +R
alice< :alice MODE #a +R
bob< :alice MODE #a +R
carol> JOIN #a
carol< 477 carol #a :cannot join #a: one has to be logged in
=== MODE of oneself
alice> MODE alice
alice< 221 alice +
alice> MODE alice +iwB
alice< :alice MODE alice +iwB
alice> MODE alice -w+o
alice< :alice MODE alice -w
alice> MODE alice
alice< 221 alice +Bi
alice> MODE alice +X
alice< 501 alice :there are only the user modes BRiow
alice> MODE bob
alice< 502 alice :only your own modes are yours to see and change
alice> MODE absent
alice< 401 alice absent :no user here is called absent
alice> MODE alice +R
alice< :alice MODE alice +R
bob> PRIVMSG alice :no account
bob< 477 bob alice :alice accepts messages of logged-in users only
=== WHO: channels, names, masks and flags
+#a alice bob
+#b bob
bob> AWAY :gone
bob< 306 bob :You have been marked as being away
alice> WHO #a
alice< 352 alice #a ~u 127.0.0.1 chat.py alice H@ :0 Real Name
alice< 352 alice #a ~u 127.0.0.1 chat.py bob G :0 Real Name
alice< 315 alice #a :End of WHO
alice> WHO bob
alice< 352 alice #a ~u 127.0.0.1 chat.py bob G :0 Real Name
alice< 315 alice bob :End of WHO
alice> WHO *arol*
alice< 352 alice * ~u 127.0.0.1 chat.py carol H :0 Real Name
alice< 315 alice *arol* :End of WHO
alice> WHO #none
alice< 315 alice #none :End of WHO
alice> WHO #b o
alice< 315 alice #b :End of WHO
carol> WHO 127.0.0.1 o
carol< 315 carol 127.0.0.1 :End of WHO
alice> WHO absent
alice< 315 alice absent :End of WHO
=== WHO: who is +i is seen by those who share a channel, or know the name
bob> MODE bob +i
bob< :bob MODE bob +i
alice> WHO b*b
alice< 315 alice b*b :End of WHO
alice> WHO bob
alice< 352 alice * ~u 127.0.0.1 chat.py bob H :0 Real Name
alice< 315 alice bob :End of WHO
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
bob> JOIN #a
alice< :bob JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
alice> WHO b*b
alice< 352 alice #a ~u 127.0.0.1 chat.py bob H :0 Real Name
alice< 315 alice b*b :End of WHO
carol> WHO #a
carol< 352 carol #a ~u 127.0.0.1 chat.py alice H@ :0 Real Name
carol< 315 carol #a :End of WHO
=== WHOX: the fields that were asked for, in their order
+#a alice
alice> WHO alice %tcuihsnfdlaor,42
alice< 354 alice 42 #a ~u 127.0.0.1 127.0.0.1 chat.py alice H@ 0 5 0 n/a :Real Name
alice< 315 alice alice :End of WHO
alice> WHO #a %nt
alice< 354 alice * alice
alice< 315 alice #a :End of WHO
alice> WHO dora %na
alice< 354 alice dora 0
alice< 315 alice dora :End of WHO
=== WHOIS: all about a user, and nothing that is secret
+#a alice
+#s alice
alice> MODE #s +s
alice< :alice MODE #s +s
alice> MODE alice +B
alice< :alice MODE alice +B
bob> WHOIS alice
bob< 311 bob alice ~u 127.0.0.1 * :Real Name
bob< 319 bob alice :@#a
bob< 312 bob alice chat.py :chat.py
bob< 335 bob alice :is a bot
bob< 317 bob alice 8 WHEN :seconds idle, signon time
bob< 318 bob alice :End of WHOIS
alice> WHOIS alice
alice< 311 alice alice ~u 127.0.0.1 * :Real Name
alice< 319 alice alice :@#a @#s
alice< 312 alice alice chat.py :chat.py
alice< 335 alice alice :is a bot
alice< 338 alice alice 127.0.0.1 :is connecting from here
alice< 317 alice alice 9 WHEN :seconds idle, signon time
alice< 318 alice alice :End of WHOIS
alice> WHOIS chat.py DORA
alice< 311 alice dora line 127.0.0.1 * :dora
alice< 319 alice dora :#lobby
alice< 312 alice dora chat.py :chat.py
alice< 317 alice dora 7 WHEN :seconds idle, signon time
alice< 318 alice DORA :End of WHOIS
alice> WHOIS absent
alice< 401 alice absent :no user here is called absent
alice< 318 alice absent :End of WHOIS
alice> WHOIS other.server alice
alice< 402 alice other.server :there is no such server; this one stands alone
alice> WHOIS
alice< 431 alice :about whom?
=== WHOWAS: newest first
bob> NICK rob
bob< :bob NICK :rob
bob> NICK bob
bob< :rob NICK :bob
bob> QUIT
bob< ERROR :Closing link: Quit
alice> WHOWAS bob
alice< 314 alice bob ~u 127.0.0.1 * :Real Name
alice< 312 alice bob chat.py :WHEN
alice< 314 alice bob ~u 127.0.0.1 * :Real Name
alice< 312 alice bob chat.py :WHEN
alice< 369 alice bob :End of WHOWAS
alice> WHOWAS BOB 1
alice< 314 alice bob ~u 127.0.0.1 * :Real Name
alice< 312 alice bob chat.py :WHEN
alice< 369 alice BOB :End of WHOWAS
alice> WHOWAS absent
alice< 406 alice absent :no user was called absent lately
alice< 369 alice absent :End of WHOWAS
alice> WHOWAS
alice< 461 alice WHOWAS :it goes like this: WHOWAS <nickname> [<count>]
=== ISON
alice> ISON bob absent DORA
alice< 303 alice :bob dora
alice> ISON :bob carol
alice< 303 alice :bob carol
alice> ISON
alice< 461 alice ISON :it goes like this: ISON <nickname>{ <nickname>}
=== MONITOR: who comes, goes and is called otherwise
alice> MONITOR + bob,absent,BOB
alice< 730 alice :bob
alice< 731 alice :absent
alice> MONITOR L
alice< 732 alice :bob,absent
alice< 733 alice :End of MONITOR list
alice> MONITOR S
alice< 730 alice :bob
alice< 731 alice :absent
bob> NICK rob
alice< 731 alice :bob
bob< :bob NICK :rob
bob> NICK BOB
alice< 730 alice :BOB
bob< :rob NICK :BOB
bob> NICK bob
bob< :BOB NICK :bob
bob> QUIT
alice< 731 alice :bob
bob< ERROR :Closing link: Quit
alice> MONITOR - bob
alice> MONITOR + a*,rob
alice< 432 alice a* :names only, no masks
alice< 731 alice :rob
alice> MONITOR C
alice> MONITOR L
alice< 733 alice :End of MONITOR list
alice> MONITOR X
alice< 461 alice MONITOR :MONITOR takes +, -, C, L or S
alice> MONITOR
alice< 461 alice MONITOR :it goes like this: MONITOR +|-|C|L|S [<nickname>{,<nickname>}]
=== SETNAME without the capability is silent
+#a alice bob
alice> SETNAME :Alicia
bob> WHOIS alice
bob< 311 bob alice ~u 127.0.0.1 * :Alicia
bob< 319 bob alice :@#a
bob< 312 bob alice chat.py :chat.py
bob< 317 bob alice 6 WHEN :seconds idle, signon time
bob< 318 bob alice :End of WHOIS
=== the server: MOTD, LUSERS, VERSION, TIME and the like
alice> MOTD
alice< 375 alice :- chat.py Message of the day
alice< 372 alice :- Welcome
alice< 376 alice :End of MOTD
alice> MOTD other.server
alice< 402 alice other.server :there is no such server; this one stands alone
alice> LUSERS
alice< 251 alice :There are 4 users and 0 invisible on 1 servers
alice< 252 alice 0 :operators online
alice< 253 alice 0 :connections without a name yet
alice< 254 alice 1 :channels formed
alice< 255 alice :I have 4 clients and 0 servers
alice< 265 alice 4 4 :Current local users 4, max 4
alice< 266 alice 4 4 :Current global users 4, max 4
alice> TIME chat.*
alice< 391 alice chat.py :WHEN
alice> ADMIN
alice< 423 alice chat.py :the message of the day says whom to ask, if anything does
alice> INFO
alice< 371 alice :chat.py 0.3: a chat in one file of plain Python,
alice< 371 alice :for IRC clients, netcat, and terminals and windows of its own
alice< 371 alice :running since WHEN
alice< 374 alice :End of INFO
alice> LINKS
alice< 365 alice * :End of LINKS: this server stands alone
alice> MAP
alice< 006 alice :chat.py 4 connections
alice< 007 alice :End of MAP
alice> STATS u
alice< 242 alice :Server up 0 days 00:00:12
alice< 219 alice u :End of statistics
alice> STATS
alice< 219 alice * :End of statistics
alice> TRACE
alice< 262 alice chat.py 0.3 :End of trace: this server stands alone
alice> SERVLIST
alice< 235 alice * * :There are no services
alice> SQUERY NickServ :help
alice< 408 alice NickServ :there are none
alice> SUMMON root
alice< 445 alice :SUMMON has been disabled
alice> USERS
alice< 446 alice :USERS has been disabled
=== VERSION
alice> VERSION
alice< 351 alice chat.py-0.3 chat.py :a chat in one file of Python
alice< 005 alice ...
alice< 005 alice ...
alice< 005 alice ...
alice> VERSION bob
alice< 351 alice chat.py-0.3 chat.py :a chat in one file of Python
alice< 005 alice ...
alice< 005 alice ...
alice< 005 alice ...
alice> VERSION elsewhere
alice< 402 alice elsewhere :there is no such server; this one stands alone
=== TOKEN: for files, which a server in memory does not keep
alice> TOKEN SERVICELIST
alice< NOTE TOKEN NO_SERVICES :this server keeps no files
alice> TOKEN GENERATE FILEHOST
alice< FAIL TOKEN UNKNOWN_SERVICE FILEHOST :there is no such service; TOKEN SERVICELIST lists them
alice> TOKEN VALIDATE FILEHOST :abc
alice< FAIL TOKEN NO_PERMISSIONS FILEHOST :tokens are for this server's own files
alice> TOKEN LOOK
alice< FAIL TOKEN UNKNOWN_COMMAND LOOK :there is no TOKEN LOOK
=== HELP: is made from the handlers
alice> HELP
alice< 704 alice * :HELP <command> tells more about one of these:
alice< 705 alice * :ADMIN AUTHENTICATE AWAY BATCH CAP CHATHISTORY CONNECT DIE ERROR HELP HELPOP INFO INVITE ISON ISUPPORT JOIN KICK KILL KLINE LINKS LIST LUSERS MAP MARKREAD METADATA MODE MONITOR MOTD NAMES NICK NOTICE NS OPER PART PASS PING PONG PRIVMSG QUIT REDACT REGISTER REHASH RENAME RESTART SEARCH SERVER SERVICE SERVLIST SESSION SETNAME SQUERY SQUIT STATS SUMMON TAGMSG TIME TOKEN TOPIC TRACE UNKLINE USER USERHOST USERS VERIFY VERSION WALLOPS WHO WHOIS WHOWAS
alice< 706 alice * :End of help
alice> HELP JOIN
alice< 704 alice JOIN :JOIN <channel>{,<channel>} [<key>{,<key>}]
alice< 705 alice JOIN :enter channels; JOIN 0 leaves all
alice< 706 alice JOIN :End of help
alice> HELPOP kick
alice< 704 alice kick :KICK <channel> <nickname>{,<nickname>} [<reason>]
alice< 705 alice kick :put people out
alice< 706 alice kick :End of help
alice> HELP me
alice< 524 alice me :there is no help on that; HELP lists the commands
=== only operators of the server
alice> KILL bob :x
alice< 481 alice :only operators of this server can do that
alice> WALLOPS :x
alice< 481 alice :only operators of this server can do that
alice> REHASH
alice< 481 alice :only operators of this server can do that
alice> DIE
alice< 481 alice :only operators of this server can do that
alice> RESTART
alice< 481 alice :only operators of this server can do that
alice> CONNECT other
alice< 481 alice :only operators of this server can do that
alice> SQUIT other :x
alice< 481 alice :only operators of this server can do that
alice> OPER boss
alice< 461 alice OPER :it goes like this: OPER <name> <password>
=== OPER: the password, and what it opens
alice> OPER boss wrong
alice< 464 alice :that is not it (try 1 of 3)
alice> OPER absent secret
alice< 464 alice :that is not it (try 2 of 3)
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
bob> MODE bob +w
bob< :bob MODE bob +w
alice> WALLOPS :hear me
bob< :alice WALLOPS :hear me
alice> STATS o
alice< 243 alice O * * boss
alice< 219 alice o :End of statistics
alice> REHASH
alice< 382 alice chat.py :Reading it again
alice> CONNECT other
alice< 402 alice other :this server stands alone
alice> SQUIT other :x
alice< 402 alice other :this server stands alone
bob> WHOIS alice
bob< 311 bob alice ~u 127.0.0.1 * :Real Name
bob< 312 bob alice chat.py :chat.py
bob< 313 bob alice :operates this server
bob< 317 bob alice 13 WHEN :seconds idle, signon time
bob< 318 bob alice :End of WHOIS
bob> WHO alice
bob< 352 bob * ~u 127.0.0.1 chat.py alice H* :0 Real Name
bob< 315 bob alice :End of WHO
bob> USERHOST alice
bob< 302 bob :alice*=+~u@127.0.0.1
alice> MODE alice -o
alice< :alice MODE alice -o
alice> WALLOPS :no more
alice< 481 alice :only operators of this server can do that
=== KLINE: bans from the server for a time
alice> KLINE 10.0.0.1 :x
alice< 481 alice :only operators of this server can do that
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
alice> KLINE bob!*@* 60 :spam
alice< NOTICE alice :K-line added: bob!*@*; 1 user disconnected
bob< :alice KILL bob :K-lined: spam
bob< ERROR :Closing link: Killed (alice (K-lined: spam))
alice> KLINE 0 10.0.0.1
alice< NOTICE alice :K-line added: *!*@10.0.0.1; 0 users disconnected
alice> KLINE a:zoe soon
alice< FAIL KLINE INVALID_PARAMS soon :a time is 1 to 5256000 minutes, or 0: for ever
alice> STATS k
alice< 216 alice K bob!*@* * alice :until WHEN: spam
alice< 216 alice K *!*@10.0.0.1 * alice :for ever: no reason given
alice< 219 alice k :End of statistics
+erin
erin> NICK bob
erin> USER u 0 * :Bob
erin< 465 * :you are banned from this server: spam
erin< ERROR :Closing link: you are banned from this server: spam
alice> UNKLINE bob!*@*
alice< NOTICE alice :K-line removed: bob!*@*
alice> UNKLINE bob!*@*
alice< FAIL UNKLINE NO_SUCH_BAN bob!*@* :there is no K-line bob!*@*; STATS k lists them
alice> STATS k
alice< 216 alice K *!*@10.0.0.1 * alice :for ever: no reason given
alice< 219 alice k :End of statistics
carol> UNKLINE 10.0.0.1
carol< 481 carol :only operators of this server can do that
carol> STATS k
carol< 219 carol k :End of statistics
=== ISUPPORT: can be asked for
alice> ISUPPORT
alice< 005 alice ...
alice< 005 alice ...
alice< 005 alice ...
=== OPER: may do what an operator of any channel may
+#a bob carol
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
alice> MODE #a +t-n
alice< :alice MODE #a -n
bob< :alice MODE #a -n
carol< :alice MODE #a -n
alice> TOPIC #a :from above
alice< :alice TOPIC #a :from above
bob< :alice TOPIC #a :from above
carol< :alice TOPIC #a :from above
alice> KICK #a bob
alice< :alice KICK #a bob :alice
bob< :alice KICK #a bob :alice
carol< :alice KICK #a bob :alice
alice> MODE #lobby +t
alice< :alice MODE #lobby +t
dora< * alice set +t in #lobby
=== KILL: closes the connection of a user
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
bob> JOIN #lobby
bob< :bob JOIN #lobby
bob< 353 bob = #lobby :dora bob
bob< 366 bob #lobby :End of NAMES
dora< bob (127.0.0.1:50001) joined the chat!
alice> KILL bob :spam
bob< :alice KILL bob :spam
bob< ERROR :Closing link: Killed (alice (spam))
dora< bob (127.0.0.1:50001) left the chat!
bob> PRIVMSG alice :still here?
alice> KILL absent
alice< 401 alice absent :no user here is called absent
alice> KILL
alice< 461 alice KILL :it goes like this: KILL <nickname> [<reason>]
=== DIE and RESTART
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
alice> RESTART
alice> DIE
=== unknown verbs and empty lines
alice>
alice>
alice> FOO bar
alice< 421 alice FOO :there is no FOO; help lists what there is
alice> :source
alice> @tag
alice> foo
alice< 421 alice FOO :there is no FOO; help lists what there is
=== the line protocol and IRC read each other
alice> JOIN #lobby
alice< :alice JOIN #lobby
alice< 353 alice = #lobby :dora alice
alice< 366 alice #lobby :End of NAMES
dora< alice (127.0.0.1:50000) joined the chat!
alice> PRIVMSG #lobby :hello from IRC
dora< alice: hello from IRC
dora> hello from netcat
alice< :dora PRIVMSG #lobby :hello from netcat
dora> /tell alice psst
alice< :dora PRIVMSG alice :psst
dora< * told alice: psst
alice> PRIVMSG dora :pssst
dora< (private) alice: pssst
dora> /join #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-1 of 1: @dora
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@dora alice
alice< 366 alice #a :End of NAMES
dora< [#a] alice (127.0.0.1:50000) joined the chat!
alice> PRIVMSG #a :in a channel
dora< [#a] alice: in a channel
dora> in a channel
alice< :dora PRIVMSG #a :in a channel
dora> /topic tea
alice< :dora TOPIC #a :tea
dora< * the topic of #a is: tea
alice> TOPIC #a :coffee
alice< 482 alice #a :only operators of #a can do that
dora> /mode -t
alice< :dora MODE #a -t
dora< * you set -t in #a
alice> TOPIC #a :coffee
alice< :alice TOPIC #a :coffee
dora< * alice set the topic of #a: coffee
alice> NICK alicia
alice< :alice NICK :alicia
dora< * alice is now called alicia
alice> AWAY :lunch
alice< 306 alicia :You have been marked as being away
dora< * alicia is away: lunch
alice> AWAY
alice< 305 alicia :You are no longer marked as being away
dora< * alicia is back
dora> /nick dorothy
alice< :dora NICK :dorothy
dora< * you are dorothy
dora> /kick alicia enough
alice< :dorothy KICK #a alicia :enough
dora< * you kicked alicia from #a
alice> JOIN #a
alice< :alicia JOIN #a
alice< 332 alicia #a :coffee
alice< 333 alicia #a alice WHEN
alice< 353 alicia = #a :@dorothy alicia
alice< 366 alicia #a :End of NAMES
dora< [#a] alicia (127.0.0.1:50000) joined the chat!
dora> /invite bob
bob< :dorothy INVITE bob #a
dora< * you invited bob to #a
dora> /quit
alice< :dorothy QUIT :Quit
=== the line protocol: operators of channels do what must be done
dora> /join #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-1 of 1: @dora
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@dora alice
alice< 366 alice #a :End of NAMES
dora< [#a] alice (127.0.0.1:50000) joined the chat!
dora> /ban alice
alice< :dora MODE #a +b alice!*@*
alice< :dora KICK #a alice :banned
dora< * you set +b alice!*@* in #a
dora< * you kicked alice from #a
alice> JOIN #a
alice< 474 alice #a :cannot join #a: you are banned from it
dora> /ban
dora< * banned from #a: alice!*@*
dora> /unban alice
dora< * you set -b alice!*@* in #a
dora> /unban alice
dora< * no ban of #a is alice; /ban lists them
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@dora alice
alice< 366 alice #a :End of NAMES
dora< [#a] alice (127.0.0.1:50000) joined the chat!
dora> /mode +m
alice< :dora MODE #a +m
dora< * you set +m in #a
dora> /mode +X
dora< * there is no channel mode X; the modes are beI, k, l, qaohv, CRimnst
alice> PRIVMSG #a :may I?
alice< 404 alice #a :#a is moderated; only who has a voice may speak
dora> /kick absent
dora< * no user here is called absent
bob> JOIN #b
bob< :bob JOIN #b
bob< 353 bob = #b :@bob
bob< 366 bob #b :End of NAMES
bob> INVITE dora #b
bob< 341 bob dora #b
dora< * bob invites you to #b; /join #b
dora> /join #b
bob< :dora JOIN #b
dora< * you speak in #b now
dora< * the topic of #b is not set
dora< * #b 1-2 of 2: @bob, dora
dora> /kick bob
dora< * only operators of #b can do that
dora> /oper boss wrong
dora< * that is not it (try 1 of 3)
dora> /oper boss secret
dora< * you are an operator of this server now: /kick, /ban and /topic work anywhere
dora> /kick bob now I may
bob< :dora KICK #b bob :now I may
dora< * you kicked bob from #b
dora> /away
dora< * you came back
dora> /away gone fishing
dora< * you went away: gone fishing
dora> /away
dora< * you came back
=== the line protocol: who was put out speaks nowhere until he chooses
dora> /join #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-1 of 1: @dora
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
alice> JOIN #a
alice< :alice JOIN #a
alice< 353 alice = #a :@dora alice
alice< 366 alice #a :End of NAMES
dora< [#a] alice (127.0.0.1:50000) joined the chat!
alice> KICK #a dora :out
alice< :alice KICK #a dora :out
dora< * alice kicked dora from #a: out
dora> is this heard?
dora< * you are not in #a; /join #a first
dora> /join #a
alice< :dora JOIN #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-2 of 2: alice, dora
=== the line protocol: a secret channel is not listed
alice> JOIN #s
alice< :alice JOIN #s
alice< 353 alice = #s :@alice
alice< 366 alice #s :End of NAMES
alice> MODE #s +s
alice< :alice MODE #s +s
dora> /list
dora< * #lobby (1)
dora> /names #s
dora< * you are not in #s; /join #s first
=== SERVER and SERVICE: only clients here
+erin
erin> SERVER other.server 1 :x
erin< 462 * :this server stands alone
alice> SERVICE x * * 0 0 :x
alice< 462 alice :there are no services
=== an operator sees into a channel from outside
+#s bob
bob> MODE #s +sk word
bob< :bob MODE #s +s
bob< :bob MODE #s +k word
bob> MODE #s +b *!*@10.*
bob< :bob MODE #s +b *!*@10.*
carol> MODE #s
carol< 442 carol #s :you are not in #s; /join #s first
alice> OPER boss secret
alice< 381 alice :You are now an operator of this server
alice< :alice MODE alice +o
alice> MODE #s
alice< 324 alice #s +knst word
alice< 329 alice #s WHEN
alice> MODE #s b
alice< 367 alice #s *!*@10.* bob WHEN
alice< 368 alice #s :End of bans
alice> INVITE carol #s
alice< 341 alice carol #s
carol< :alice INVITE carol #s
carol> JOIN #s
bob< :carol JOIN #s
carol< :carol JOIN #s
carol< 353 carol @ #s :@bob carol
carol< 366 carol #s :End of NAMES
=== who is +i is not named to those outside
+#a alice bob
alice> MODE alice +i
alice< :alice MODE alice +i
carol> NAMES #a
carol< 353 carol = #a :bob
carol< 366 carol #a :End of NAMES
bob> NAMES #a
bob< 353 bob = #a :@alice bob
bob< 366 bob #a :End of NAMES
=== KICK: as many channels as people, or one
+#a alice bob carol
+#b alice bob carol
alice> KICK #a,#b bob,carol :pairs
alice< :alice KICK #a bob :pairs
alice< :alice KICK #b carol :pairs
bob< :alice KICK #a bob :pairs
bob< :alice KICK #b carol :pairs
carol< :alice KICK #a bob :pairs
carol< :alice KICK #b carol :pairs
alice> KICK #a,#b carol
alice< 461 alice KICK :one channel, or as many as people
=== JOIN: a name twice in any case is one, and nothing is no name
alice> JOIN #a,#A,#a
alice< :alice JOIN #a
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
bob> PRIVMSG alice,ALICE :once
alice< :bob PRIVMSG alice :once
alice> JOIN ,
alice< 476 alice * :a channel's name begins with # and goes on, like #tea
=== the line protocol: a channel with a password
alice> JOIN #k
alice< :alice JOIN #k
alice< 353 alice = #k :@alice
alice< 366 alice #k :End of NAMES
alice> MODE #k +k word
alice< :alice MODE #k +k word
dora> /join #k
dora< * cannot join #k: it has a password (+k)
dora> /join #k word
alice< :dora JOIN #k
dora< * you speak in #k now
dora< * the topic of #k is not set
dora< * #k 1-2 of 2: @alice, dora
dora> /mode
dora< * the modes of #k: +knt word (C no CTCP but actions; R only who is logged in may join; i only who is invited may join; m only who has a voice may speak; n only members may speak; s secret: not listed; t only operators set the topic)
dora> /mode +b
dora< * only operators of #k can do that
dora> /history @#k
dora< * no user here is called @#k
dora> /part #k thanks all
alice< :dora PART #k :thanks all
dora< * you left #k
dora< * you speak in #lobby now
=== tags: are for who asked for them, and so is what has nothing else
+#a alice bob carol
alice> CAP REQ :message-tags echo-message
alice< CAP alice ACK :message-tags echo-message
bob> CAP REQ :message-tags
bob< CAP bob ACK :message-tags
alice> @+draft/reply=x\\:y;+typing=active;label=1;bad=z;+UPPER PRIVMSG #a :hello
alice< @msgid=ID;+draft/reply=x\:y;+typing=active;+UPPER :alice PRIVMSG #a :hello
bob< @msgid=ID;+draft/reply=x\:y;+typing=active;+UPPER :alice PRIVMSG #a :hello
carol< :alice PRIVMSG #a :hello
alice> @+typing=active TAGMSG #a
alice< @msgid=ID;+typing=active :alice TAGMSG #a
bob< @msgid=ID;+typing=active :alice TAGMSG #a
bob> @+react=1 TAGMSG alice,carol
alice< @msgid=ID;+react=1 :bob TAGMSG alice
alice> TAGMSG #a
alice> TAGMSG
alice< 411 alice :to whom?
carol> @+typing=active TAGMSG #a
=== labels: come back with the answer, whatever it is
+#a alice bob
alice> CAP REQ :labeled-response batch
alice< CAP alice ACK :labeled-response batch
alice> @label=1 PING x
alice< @label=1 :chat.py PONG chat.py :x
alice> @label=2 PRIVMSG #a :no echo
alice< @label=2 :chat.py ACK
bob< :alice PRIVMSG #a :no echo
alice> @label=3 JOIN #b
alice< @label=3 :chat.py BATCH +ID labeled-response
alice< @batch=ID :alice JOIN #b
alice< @batch=ID :chat.py 353 alice = #b :@alice
alice< @batch=ID :chat.py 366 alice #b :End of NAMES
alice< BATCH -ID
alice> @label=4 FOO
alice< @label=4 :chat.py 421 alice FOO :there is no FOO; help lists what there is
alice> @label=5 PRIVMSG absent,noone :x
alice< @label=5 :chat.py BATCH +ID labeled-response
alice< @batch=ID :chat.py 401 alice absent :no user here is called absent
alice< @batch=ID :chat.py 401 alice noone :no user here is called noone
alice< BATCH -ID
alice> @label=6 WHO #a
alice< @label=6 :chat.py BATCH +ID labeled-response
alice< @batch=ID :chat.py 352 alice #a ~u 127.0.0.1 chat.py alice H@ :0 Real Name
alice< @batch=ID :chat.py 352 alice #a ~u 127.0.0.1 chat.py bob H :0 Real Name
alice< @batch=ID :chat.py 315 alice #a :End of WHO
alice< BATCH -ID
alice> @label=7 TOPIC #a :tea
alice< @label=7 :alice TOPIC #a :tea
bob< :alice TOPIC #a :tea
alice> @label=8 NICK alicia
alice< @label=8 :alice NICK :alicia
bob< :alice NICK :alicia
alice> @label=9;x PRIVMSG #a :\xff
alice< @label=9 :chat.py ACK
bob< :alicia PRIVMSG #a :ÿ
alice> @label= PING y
alice< PONG chat.py :y
alice> PING z
alice< PONG chat.py :z
=== labels: an echo is an answer
+#a alice bob
alice> CAP REQ :labeled-response batch echo-message
alice< CAP alice ACK :labeled-response batch echo-message
alice> @label=1 PRIVMSG #a :one
alice< @label=1 :alice PRIVMSG #a :one
bob< :alice PRIVMSG #a :one
alice> @label=2 PRIVMSG bob,#a :two
alice< @label=2 :chat.py BATCH +ID labeled-response
alice< @batch=ID :alice PRIVMSG bob :two
alice< @batch=ID :alice PRIVMSG #a :two
alice< BATCH -ID
bob< :alice PRIVMSG bob :two
bob< :alice PRIVMSG #a :two
alice> @label=3 PRIVMSG alice :myself
alice< @label=3 :alice PRIVMSG alice :myself
alice< :alice PRIVMSG alice :myself
bob> AWAY :lunch
bob< 306 bob :You have been marked as being away
alice> @label=4 PRIVMSG bob :there?
alice< @label=4 :chat.py BATCH +ID labeled-response
alice< @batch=ID :alice PRIVMSG bob :there?
alice< @batch=ID :chat.py 301 alice bob :lunch
alice< BATCH -ID
bob< :alice PRIVMSG bob :there?
=== labels: an echo of several lines is a batch, and one that is a batch already is not
+#a alice bob
alice> CAP REQ :labeled-response batch echo-message
alice< CAP alice ACK :labeled-response batch echo-message
alice> @label=1 BATCH +1 draft/multiline #a
alice> @batch=1 PRIVMSG #a :two
alice> @batch=1 PRIVMSG #a :lines
alice> BATCH -1
alice< @label=1 :chat.py BATCH +ID labeled-response
alice< @batch=ID :alice PRIVMSG #a :two
alice< @batch=ID :alice PRIVMSG #a :lines
alice< BATCH -ID
bob< :alice PRIVMSG #a :two
bob< :alice PRIVMSG #a :lines
alice> @label=2 BATCH +2 draft/multiline alice
alice> @batch=2 PRIVMSG alice :to
alice> @batch=2;draft/multiline-concat PRIVMSG alice :myself
alice> BATCH -2
alice< @label=2 :chat.py BATCH +ID labeled-response
alice< @batch=ID :alice PRIVMSG alice :to
alice< @batch=ID :alice PRIVMSG alice :myself
alice< :alice PRIVMSG alice :to
alice< :alice PRIVMSG alice :myself
alice< BATCH -ID
alice> CAP REQ draft/multiline
alice< CAP alice ACK :draft/multiline
alice> @label=3 CHATHISTORY LATEST #a * 1
alice< @label=3 :chat.py BATCH +ID chathistory #a
alice< @batch=ID :alice BATCH +ID draft/multiline #a
alice< @batch=ID :alice PRIVMSG #a :two
alice< @batch=ID :alice PRIVMSG #a :lines
alice< @batch=ID :alice BATCH -ID
alice< BATCH -ID
=== invite-notify: members who could have invited are told of an invitation
+#a alice bob carol
bob> CAP REQ invite-notify
bob< CAP bob ACK :invite-notify
alice> CAP REQ invite-notify
alice< CAP alice ACK :invite-notify
alice> INVITE dora #a
alice< 341 alice dora #a
bob< :alice INVITE dora #a
dora< * alice invites you to #a; /join #a
alice> MODE #a +i
alice< :alice MODE #a +i
bob< :alice MODE #a +i
carol< :alice MODE #a +i
alice> AWAY
alice< 305 alice :You are no longer marked as being away
alice> INVITE dora #a
alice< 341 alice dora #a
dora< * alice invites you to #a; /join #a
=== extended-monitor: more of those one watches
alice> CAP REQ :extended-monitor away-notify setname
alice< CAP alice ACK :extended-monitor away-notify setname
alice> MONITOR + bob
alice< 730 alice :bob
bob> AWAY :lunch
alice< :bob AWAY :lunch
bob< 306 bob :You have been marked as being away
bob> SETNAME :Robert
alice< :bob SETNAME :Robert
carol> MONITOR + bob
carol< 730 carol :bob
bob> AWAY
alice< :bob AWAY
bob< 305 bob :You are no longer marked as being away
=== bots are marked
+#a alice bob
bob> CAP REQ message-tags
bob< CAP bob ACK :message-tags
alice> MODE alice +B
alice< :alice MODE alice +B
alice> PRIVMSG #a :beep
bob< @msgid=ID;bot :alice PRIVMSG #a :beep
=== REGISTER: a name becomes an account
alice> REGISTER * * pw
alice< FAIL REGISTER WEAK_PASSWORD alice :a password has at least 3 characters
alice> REGISTER other * password
alice< FAIL REGISTER ACCOUNT_NAME_MUST_BE_NICK other :an account is called as you are: alice
alice> REGISTER bob * password
alice< FAIL REGISTER ACCOUNT_NAME_MUST_BE_NICK bob :an account is called as you are: alice
alice> REGISTER ALICE * password
alice< REGISTER SUCCESS alice :alice is yours; log in with your password
alice< 900 alice alice alice :You are now logged in as alice
alice> REGISTER * * password
alice< FAIL REGISTER ALREADY_AUTHENTICATED alice :you are logged in already
bob> WHOIS alice
bob< 311 bob alice ~u 127.0.0.1 * :Real Name
bob< 330 bob alice alice :is logged in as
bob< 312 bob alice chat.py :chat.py
bob< 317 bob alice 9 WHEN :seconds idle, signon time
bob< 318 bob alice :End of WHOIS
alice> MONITOR + bob
alice< 730 alice :bob
bob> CAP REQ :account-tag account-notify
bob< CAP bob ACK :account-tag account-notify
alice> PRIVMSG bob :logged in
bob< @account=alice :alice PRIVMSG bob :logged in
bob> NICK Bobby
alice< 731 alice :bob
bob< :bob NICK :Bobby
carol> CAP REQ :account-notify extended-monitor
carol< CAP carol ACK :account-notify extended-monitor
carol> MONITOR + Bobby
carol< 730 carol :Bobby
bob> REGISTER * * password
bob< REGISTER SUCCESS Bobby :Bobby is yours; log in with your password
bob< 900 Bobby Bobby Bobby :You are now logged in as Bobby
bob< @account=Bobby :Bobby ACCOUNT Bobby
carol< :Bobby ACCOUNT Bobby
+erin
erin> NICK erin
erin> REGISTER * * password
erin< FAIL REGISTER COMPLETE_CONNECTION_REQUIRED erin :come in first, then register
erin> REGISTER erin
erin< 461 erin REGISTER :it goes like this: REGISTER <account or *> <email or *> <password>
=== a name of an account is for its owner
alice> REGISTER * * password
alice< REGISTER SUCCESS alice :alice is yours; log in with your password
alice< 900 alice alice alice :You are now logged in as alice
alice> QUIT
alice< ERROR :Closing link: Quit
bob> NICK alice
bob< 433 bob alice :alice belongs to an account; log in first
dora> /nick alice
dora< * you are alice2: alice belongs to an account; if it is yours: /login PASSWORD
+erin
erin> NICK alice
erin> USER e 0 * :Erin
erin< the welcome
erin< NOTICE alice3 :alice belongs to an account; /msg NickServ IDENTIFY alice PASSWORD
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE AGFsaWNlAHBhc3N3b3Jk
erin< 900 alice3 alice3!~e@127.0.0.1 alice :You are now logged in as alice
erin< 903 alice3 :SASL authentication successful
erin> NICK alice
erin< :alice3!~e@127.0.0.1 NICK :alice
erin> WHO alice %na
erin< 354 alice alice alice
erin< 315 alice alice :End of WHO
=== AUTHENTICATE: PLAIN, in any wrong order, and right
alice> REGISTER * * password
alice< REGISTER SUCCESS alice :alice is yours; log in with your password
alice< 900 alice alice alice :You are now logged in as alice
alice> QUIT
alice< ERROR :Closing link: Quit
+erin
erin> CAP REQ sasl
erin< CAP * ACK :sasl
erin> AUTHENTICATE +
erin< 908 * PLAIN,SCRAM-SHA-256 :are the mechanisms there are
erin< 904 * :name or password are wrong
erin> AUTHENTICATE *
erin< 906 * :SASL authentication aborted
erin> AUTHENTICATE NTLM
erin< 908 * PLAIN,SCRAM-SHA-256 :are the mechanisms there are
erin< 904 * :name or password are wrong
erin> AUTHENTICATE plain
erin< AUTHENTICATE +
erin> AUTHENTICATE ===
erin< 904 * :name or password are wrong
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE +
erin< 904 * :name or password are wrong
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE *
erin< 906 * :SASL authentication aborted
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE AGFsaWNlAHdyb25n
erin< 904 * :name or password are wrong
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE Ym9iAGFsaWNlAHBhc3N3b3Jk
erin< 904 * :name or password are wrong
erin> NICK alice
erin> USER e 0 * :Erin
erin> AUTHENTICATE PLAIN
erin< AUTHENTICATE +
erin> AUTHENTICATE YWxpY2UAYWxpY2UAcGFzc3dvcmQ=
erin< 900 alice alice!~e@* alice :You are now logged in as alice
erin< 903 alice :SASL authentication successful
erin> CAP END
erin< the welcome
bob> WHOIS alice
bob< 311 bob alice ~e 127.0.0.1 * :Erin
bob< 330 bob alice alice :is logged in as
bob< 312 bob alice chat.py :chat.py
bob< 317 bob alice 1 WHEN :seconds idle, signon time
bob< 318 bob alice :End of WHOIS
=== two devices of one account are one user
+#a alice bob
alice> REGISTER * * password
alice< REGISTER SUCCESS alice :alice is yours; log in with your password
alice< 900 alice alice alice :You are now logged in as alice
+phone
phone> CAP REQ sasl
phone< CAP * ACK :sasl
phone> NICK alice
phone> USER p 0 * :Phone
phone> AUTHENTICATE PLAIN
phone< AUTHENTICATE +
phone> AUTHENTICATE AGFsaWNlAHBhc3N3b3Jk
phone< 900 alice alice!~p@* alice :You are now logged in as alice
phone< 903 alice :SASL authentication successful
phone> CAP END
phone< the welcome
phone< :alice JOIN #a
phone< 353 alice = #a :@alice bob
phone< 366 alice #a :End of NAMES
bob> PRIVMSG alice :to both
alice< :bob PRIVMSG alice :to both
phone< :bob PRIVMSG alice :to both
alice> PRIVMSG #a :from one
bob< :alice PRIVMSG #a :from one
phone< :alice PRIVMSG #a :from one
phone> JOIN #b
alice< :alice JOIN #b
alice< 353 alice = #b :@alice
alice< 366 alice #b :End of NAMES
phone< :alice JOIN #b
phone< 353 alice = #b :@alice
phone< 366 alice #b :End of NAMES
phone> NICK alicia
alice< :alice NICK :alicia
bob< :alice NICK :alicia
phone< :alice NICK :alicia
alice> QUIT
alice< ERROR :Closing link: Quit
bob> PRIVMSG alicia :to the other
phone< :bob PRIVMSG alicia :to the other
bob> NAMES #a
bob< 353 bob = #a :@alicia bob
bob< 366 bob #a :End of NAMES
=== CHATHISTORY: pages of what was said, for members
+#a alice bob
alice> PRIVMSG #a :one
bob< :alice PRIVMSG #a :one
bob> PRIVMSG #a :two
alice< :bob PRIVMSG #a :two
alice> TOPIC #a :not said
alice< :alice TOPIC #a :not said
bob< :alice TOPIC #a :not said
alice> @+draft/x=1 PRIVMSG #a :three
bob< :alice PRIVMSG #a :three
alice> CHATHISTORY LATEST #a * 2
alice< :bob PRIVMSG #a :two
alice< :alice PRIVMSG #a :three
alice> CAP REQ :batch message-tags server-time
alice< @time=1970-01-12T13:46:50.000Z :chat.py CAP alice ACK :batch message-tags server-time
alice> CHATHISTORY LATEST #A * 10
alice< @draft/chathistory-end :chat.py BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:45.000Z;msgid=ID :alice PRIVMSG #a :one
alice< @batch=ID;time=1970-01-12T13:46:46.000Z;msgid=ID :bob PRIVMSG #a :two
alice< @batch=ID;time=1970-01-12T13:46:48.000Z;msgid=ID :alice PRIVMSG #a :three
alice< BATCH -ID
alice> CHATHISTORY BEFORE #a timestamp=1970-01-12T13:46:46.000Z 10
alice< @draft/chathistory-end :chat.py BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:45.000Z;msgid=ID :alice PRIVMSG #a :one
alice< BATCH -ID
alice> CHATHISTORY AFTER #a timestamp=1970-01-12T13:46:46.000Z 1
alice< BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:48.000Z;msgid=ID :alice PRIVMSG #a :three
alice< BATCH -ID
alice> CHATHISTORY BETWEEN #a timestamp=1970-01-12T13:46:44.000Z timestamp=1970-01-12T14:00:00.000Z 2
alice< BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:45.000Z;msgid=ID :alice PRIVMSG #a :one
alice< @batch=ID;time=1970-01-12T13:46:46.000Z;msgid=ID :bob PRIVMSG #a :two
alice< BATCH -ID
alice> CHATHISTORY BETWEEN #a timestamp=1970-01-12T14:00:00.000Z timestamp=1970-01-12T13:46:44.000Z 2
alice< BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:46.000Z;msgid=ID :bob PRIVMSG #a :two
alice< @batch=ID;time=1970-01-12T13:46:48.000Z;msgid=ID :alice PRIVMSG #a :three
alice< BATCH -ID
alice> CHATHISTORY AROUND #a timestamp=1970-01-12T13:46:46.000Z 3
alice< BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:45.000Z;msgid=ID :alice PRIVMSG #a :one
alice< @batch=ID;time=1970-01-12T13:46:46.000Z;msgid=ID :bob PRIVMSG #a :two
alice< @batch=ID;time=1970-01-12T13:46:48.000Z;msgid=ID :alice PRIVMSG #a :three
alice< BATCH -ID
alice> CAP REQ :draft/event-playback
alice< @time=1970-01-12T13:46:57.000Z :chat.py CAP alice ACK :draft/event-playback
alice> CHATHISTORY LATEST #a * 3
alice< BATCH +ID chathistory #a
alice< @batch=ID;time=1970-01-12T13:46:46.000Z;msgid=ID :bob PRIVMSG #a :two
alice< @batch=ID;time=1970-01-12T13:46:47.000Z;msgid=ID :alice TOPIC #a :not said
alice< @batch=ID;time=1970-01-12T13:46:48.000Z;msgid=ID :alice PRIVMSG #a :three
alice< BATCH -ID
alice> CHATHISTORY TARGETS timestamp=1970-01-01T00:00:00.000Z timestamp=2000-01-01T00:00:00.000Z 5
alice< @draft/chathistory-end :chat.py BATCH +ID draft/chathistory-targets
alice< @batch=ID :chat.py CHATHISTORY TARGETS #a 1970-01-12T13:46:48.000Z
alice< BATCH -ID
carol> CHATHISTORY LATEST #a * 2
carol< FAIL CHATHISTORY INVALID_TARGET LATEST #a :there is nothing of it that you may read
carol> CHATHISTORY LATEST #none * 2
carol< FAIL CHATHISTORY INVALID_TARGET LATEST #none :there is nothing of it that you may read
carol> CHATHISTORY LATEST absent * 2
carol> CHATHISTORY LATEST absent * x
carol< FAIL CHATHISTORY INVALID_PARAMS LATEST :see HELP CHATHISTORY
carol> CHATHISTORY LATEST absent msgid=zz 2
carol< FAIL CHATHISTORY INVALID_PARAMS LATEST msgid=zz :that is no msgid of this server
carol> CHATHISTORY LATEST absent xyz 2
carol< FAIL CHATHISTORY INVALID_MSGREFTYPE LATEST absent xyz :a selector is *, msgid=... or timestamp=...
carol> CHATHISTORY BEFORE absent timestamp=yesterday 2
carol< FAIL CHATHISTORY INVALID_PARAMS BEFORE timestamp=yesterday :a time looks like 2026-11-22T08:30:05.123Z
carol> CHATHISTORY FOO absent * 2
carol< FAIL CHATHISTORY INVALID_PARAMS FOO :see HELP CHATHISTORY
carol> CHATHISTORY LATEST
carol< 461 carol CHATHISTORY :it goes like this: CHATHISTORY <how> <target> <selector> [<selector>] <limit>
=== MARKREAD: how far a user has read
alice> CAP REQ draft/read-marker
alice< CAP alice ACK :draft/read-marker
alice> JOIN #a
alice< :alice JOIN #a
alice< MARKREAD #a *
alice< 353 alice = #a :@alice
alice< 366 alice #a :End of NAMES
alice> MARKREAD #a
alice< MARKREAD #a *
alice> MARKREAD #a timestamp=1970-01-10T08:30:05.123Z
alice< MARKREAD #a timestamp=1970-01-10T08:30:05.123Z
alice> MARKREAD #a timestamp=1970-01-09T08:30:05.123Z
alice< MARKREAD #a timestamp=1970-01-10T08:30:05.123Z
alice> MARKREAD #a timestamp=9999-12-31T23:59:59.999999Z
alice< MARKREAD #a timestamp=1970-01-12T13:46:50.000Z
alice> MARKREAD bob
alice< MARKREAD bob *
alice> MARKREAD #a *
alice< FAIL MARKREAD INVALID_PARAMS #a * :a marker is timestamp=...
alice> MARKREAD #a timestamp=soon
alice< FAIL MARKREAD INVALID_PARAMS #a timestamp=soon :a time looks like 2026-11-22T08:30:05.123Z
alice> MARKREAD
alice< FAIL MARKREAD NEED_MORE_PARAMS :of what?
bob> MARKREAD #a
bob< MARKREAD #a *
=== REDACT: in any wrong way
+#a alice bob
alice> REDACT #a zz
alice< FAIL REDACT UNKNOWN_MSGID #a zz :there is no such message
alice> REDACT #a 12ab
alice< FAIL REDACT UNKNOWN_MSGID #a 12ab :there is no such message
alice> REDACT #none 12ab
alice< FAIL REDACT INVALID_TARGET #none :there is nothing of it that you may read
alice> REDACT absent 12ab
alice< FAIL REDACT INVALID_TARGET absent :there is nothing of it that you may read
alice> REDACT #a
alice< 461 alice REDACT :it goes like this: REDACT <target> <message id> [<reason>]
carol> REDACT #a 12ab
carol< FAIL REDACT INVALID_TARGET #a :there is nothing of it that you may read
=== BATCH: several lines are one message, where that is known
+#m alice bob carol
alice> CAP REQ :batch draft/multiline message-tags labeled-response echo-message
alice< CAP alice ACK :batch draft/multiline message-tags labeled-response echo-message
bob> CAP REQ :batch draft/multiline
bob< CAP bob ACK :batch draft/multiline
carol> CAP REQ :message-tags
carol< CAP carol ACK :message-tags
alice> @label=7;+x=y BATCH +1 draft/multiline #m
alice> @batch=1 PRIVMSG #m :hello
alice> @batch=1 PRIVMSG #m :
alice> @batch=1 PRIVMSG #m :to all
alice> @batch=1;draft/multiline-concat PRIVMSG #m :of you
alice> BATCH -1
alice< @label=7;msgid=ID;+x=y :alice BATCH +ID draft/multiline #m
alice< @batch=ID :alice PRIVMSG #m :hello
alice< @batch=ID :alice PRIVMSG #m :
alice< @batch=ID :alice PRIVMSG #m :to all
alice< @batch=ID;draft/multiline-concat :alice PRIVMSG #m :of you
alice< :alice BATCH -ID
bob< :alice BATCH +ID draft/multiline #m
bob< @batch=ID :alice PRIVMSG #m :hello
bob< @batch=ID :alice PRIVMSG #m :
bob< @batch=ID :alice PRIVMSG #m :to all
bob< @batch=ID;draft/multiline-concat :alice PRIVMSG #m :of you
bob< :alice BATCH -ID
carol< @msgid=ID;+x=y :alice PRIVMSG #m :hello
carol< @+x=y :alice PRIVMSG #m :to all
carol< @+x=y :alice PRIVMSG #m :of you
alice> BATCH +2 draft/multiline #m
alice> @batch=1 PRIVMSG #m :wrong
alice< FAIL BATCH MULTILINE_INVALID :this line belongs to another message
alice> BATCH -2
alice> BATCH +3 foo #m
alice< FAIL BATCH UNKNOWN_TYPE 3 foo :only messages of several lines come so
alice> BATCH +4 draft/multiline #m
alice> @batch=4 NOTICE #m :x
alice> @batch=4 PRIVMSG #m :x
alice< FAIL BATCH MULTILINE_INVALID :a message is all PRIVMSG, or all NOTICE
alice> @batch=4 PRIVMSG #m :x
alice> BATCH -4
alice> BATCH +5 draft/multiline absent
alice> @batch=5 PRIVMSG absent :x
alice> BATCH -5
alice< 401 alice absent :no user here is called absent
alice> BATCH
alice< 461 alice BATCH :it goes like this: BATCH +<reference> draft/multiline <target> | -<reference>
=== METADATA: what programs know of people and channels
+#a alice bob carol
alice> CAP REQ :batch draft/metadata-3
alice< CAP alice ACK :batch draft/metadata-3
bob> CAP REQ :draft/metadata-3
bob< CAP bob ACK :draft/metadata-3
alice> METADATA * SET avatar :https://example.org/a.png
alice< 761 alice alice avatar * :https://example.org/a.png
alice> METADATA * GET avatar color
alice< BATCH +ID metadata alice
alice< @batch=ID :chat.py 761 alice alice avatar * :https://example.org/a.png
alice< @batch=ID :chat.py 766 alice alice color :is not set
alice< BATCH -ID
bob> METADATA * SUB avatar color
bob< 770 bob avatar color
bob> METADATA * SUBS
bob< 772 bob avatar
bob< 772 bob color
alice> METADATA alice SET color :red
alice< 761 alice alice color * :red
bob< 761 bob alice color * :red
alice> METADATA #a SET avatar :b
alice< 761 alice #a avatar * :b
bob< 761 bob #a avatar * :b
bob> METADATA #a SET avatar :c
bob< FAIL METADATA KEY_NO_PERMISSION #a avatar :that is not yours to change
bob> METADATA alice SET avatar :c
bob< FAIL METADATA KEY_NO_PERMISSION alice avatar :that is not yours to change
bob> METADATA alice LIST
bob< 761 bob alice avatar * :https://example.org/a.png
bob< 761 bob alice color * :red
bob> METADATA absent LIST
bob< FAIL METADATA INVALID_TARGET absent :there is nothing of it that you may see
bob> METADATA * UNSUB color
bob< 771 bob color
alice> METADATA * CLEAR
alice< BATCH +ID metadata alice
alice< @batch=ID :chat.py 766 alice alice avatar :is not set
alice< @batch=ID :chat.py 766 alice alice color :is not set
alice< BATCH -ID
bob< 766 bob alice avatar :is not set
alice> METADATA #a SYNC
alice< BATCH +ID metadata #a
alice< BATCH -ID
alice> METADATA * SET BAD :x
alice< FAIL METADATA INVALID_KEY BAD :a key is made of a-z, 0-9, _, ., / and -
alice> METADATA * FOO
alice< FAIL METADATA INVALID_PARAMS FOO :see HELP METADATA
alice> METADATA
alice< 461 alice METADATA :it goes like this: METADATA <target or *> <subcommand> [<key>...]
=== RENAME: a channel with all that belongs to it
+#a alice bob
alice> CAP REQ draft/channel-rename
alice< CAP alice ACK :draft/channel-rename
dora> /join #a
alice< :dora JOIN #a
bob< :dora JOIN #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-3 of 3: @alice, bob, dora
alice> PRIVMSG #a :before
bob< :alice PRIVMSG #a :before
dora< [#a] alice: before
bob> RENAME #a #b
bob< 482 bob #a :only operators of #a can do that
alice> RENAME #a #lobby
alice< FAIL RENAME CANNOT_RENAME #a #lobby :#lobby stays what it is
alice> RENAME #a b
alice< 476 alice b :a channel's name begins with # and goes on, like #tea
alice> RENAME #a #b :better
alice< :alice RENAME #a #b :better
bob< :bob PART #a :renamed to #b: better
bob< :bob JOIN #b
dora< * alice renamed #a to #b
alice> PRIVMSG #b :after
bob< :alice PRIVMSG #b :after
dora< [#b] alice: after
dora> /history 5
bob< 353 bob = #b :@alice bob dora
bob< 366 bob #b :End of NAMES
dora< * WHEN [#b] alice: before
dora< * WHEN [#b] alice: after
dora< * that was 2 messages
bob> JOIN #a
bob< :bob JOIN #a
bob< 353 bob = #a :@bob
bob< 366 bob #a :End of NAMES
bob> RENAME #a #b
bob< FAIL RENAME CHANNEL_NAME_IN_USE #a #b :there is a #b already
alice> RENAME #none #c
alice< 403 alice #none :there is no channel #none now
=== AWAY: can be said before one has come in
+erin
erin> AWAY :not here yet
erin< 306 * :You have been marked as being away
erin> NICK erin
erin> USER e 0 * :Erin
erin< the welcome
alice> PRIVMSG erin :hello
alice< 301 alice erin :not here yet
erin< :alice PRIVMSG erin :hello
=== NickServ: accounts for clients that know no better
alice> PRIVMSG NickServ :HELP
alice< :NickServ!NickServ@chat.py NOTICE alice :HELP: what can be said to NickServ
alice< :NickServ!NickServ@chat.py NOTICE alice :REGISTER PASSWORD [EMAIL]: make your name an account
alice< :NickServ!NickServ@chat.py NOTICE alice :VERIFY CODE: the code that was sent to your address
alice< :NickServ!NickServ@chat.py NOTICE alice :IDENTIFY [NAME] PASSWORD: log in
alice< :NickServ!NickServ@chat.py NOTICE alice :PASSWD OLD NEW: another password
alice< :NickServ!NickServ@chat.py NOTICE alice :DROP PASSWORD: give up your account
alice< :NickServ!NickServ@chat.py NOTICE alice :CERT ADD|LIST|REMOVE [FINGERPRINT]: certificates that log in: add the one you show
alice< :NickServ!NickServ@chat.py NOTICE alice :DISOWN #CHANNEL: let a channel that you founded end with its last member
alice> NS CERT ADD
alice< :NickServ!NickServ@chat.py NOTICE alice :you are not logged in
alice> PRIVMSG nickserv :REGISTER password
alice< :NickServ!NickServ@chat.py NOTICE alice :alice is yours
alice< 900 alice alice alice :You are now logged in as alice
alice> NS CERT ADD
alice< :NickServ!NickServ@chat.py NOTICE alice :this connection shows no certificate
alice> NS CERT LIST
alice< :NickServ!NickServ@chat.py NOTICE alice :0 certificates of alice
alice> NS CERT REMOVE abc
alice< :NickServ!NickServ@chat.py NOTICE alice :that is no certificate of yours; see CERT LIST
alice> NS CERT EAT
alice< :NickServ!NickServ@chat.py NOTICE alice :CERT has ADD, LIST and REMOVE
alice> AUTHENTICATE EXTERNAL
alice< 908 alice PLAIN,SCRAM-SHA-256 :are the mechanisms there are
alice< 904 alice :name or password are wrong
alice> NS PASSWD wrong other
alice< :NickServ!NickServ@chat.py NOTICE alice :name or password are wrong
alice> NS PASSWD password secret2
alice< :NickServ!NickServ@chat.py NOTICE alice :your password is another now
alice> NS FOO
alice< :NickServ!NickServ@chat.py NOTICE alice :there is no /msg NickServ foo; /msg NickServ help lists what there is
alice> NS IDENTIFY
alice< :NickServ!NickServ@chat.py NOTICE alice :it goes like this: IDENTIFY [NAME] PASSWORD
alice> NOTICE NickServ :REGISTER x
bob> NS IDENTIFY alice password
bob< :NickServ!NickServ@chat.py NOTICE bob :name or password are wrong
bob> NS IDENTIFY alice secret2
bob< :NickServ!NickServ@chat.py NOTICE bob :you are logged in as alice
bob> WHO bob %na
bob< 354 bob bob alice
bob< 315 bob bob :End of WHO
bob> NS VERIFY 12345678
bob< :NickServ!NickServ@chat.py NOTICE bob :that is not the code that was sent
alice> NS DROP secret2
alice< :NickServ!NickServ@chat.py NOTICE alice :your account is gone
bob> WHO bob %na
bob< 354 bob bob 0
bob< 315 bob bob :End of WHO
bob> NICK NickServ
bob< 433 bob NickServ :NickServ belongs to an account; log in first
dora> /tell NickServ register x
dora< * no user here is called NickServ
=== VERIFY: a code that was never sent
alice> VERIFY alice 12345678
alice< FAIL VERIFY INVALID_CODE alice :that is not the code that was sent
alice> VERIFY alice
alice< 461 alice VERIFY :it goes like this: VERIFY <account or *> <code>
=== the line protocol: accounts
dora> /register pw
dora< * a password has at least 3 characters
dora> /register password
dora< * dora is yours; /login PASSWORD next time
dora> /register password
dora< * you are logged in already
alice> WHOIS dora
alice< 311 alice dora line 127.0.0.1 * :dora
alice< 319 alice dora :#lobby
alice< 330 alice dora dora :is logged in as
alice< 312 alice dora chat.py :chat.py
alice< 317 alice dora 4 WHEN :seconds idle, signon time
alice< 318 alice dora :End of WHOIS
dora> /passwd password secret2
dora< * your password is another now
dora> /login wrong
dora< * name or password are wrong
dora> /login dora secret2
dora< * you are logged in as dora
dora> /drop wrong
dora< * name or password are wrong
dora> /drop secret2
dora< * your account is gone
dora> /login secret2
dora< * name or password are wrong
dora> /verify 123
dora< * that is not the code that was sent
=== SEARCH: the words of what one may read
+#a alice bob
+#b alice
alice> PRIVMSG #a :the quick brown fox
bob< :alice PRIVMSG #a :the quick brown fox
bob> PRIVMSG #a :a lazy Dog
alice< :bob PRIVMSG #a :a lazy Dog
alice> PRIVMSG #b :another FOX
alice> PRIVMSG bob :a private fox
bob< :alice PRIVMSG bob :a private fox
alice> SEARCH text=fox
alice< :alice PRIVMSG #a :the quick brown fox
alice< :alice PRIVMSG #b :another FOX
alice> SEARCH in=#a;text=brown\\sfox
alice< :alice PRIVMSG #a :the quick brown fox
alice> SEARCH in=#a;text=dog;from=alice
alice> SEARCH in=bob;text=fox
alice< :alice PRIVMSG bob :a private fox
bob> SEARCH in=alice;text=fox
bob< :alice PRIVMSG bob :a private fox
bob> SEARCH in=#b;text=fox
bob< FAIL SEARCH INVALID_TARGET in #b :there is nothing of it that you may read
bob> SEARCH text=fox
bob< :alice PRIVMSG #a :the quick brown fox
carol> SEARCH in=bob;text=fox
alice> SEARCH in=#a;text="fox*\\sOR
alice> SEARCH in=#a
alice< FAIL SEARCH INVALID_PARAMS text :which words?
alice> SEARCH text=fox;after=soon
alice< FAIL SEARCH INVALID_PARAMS after :a time looks like 2026-11-22T08:30:05.123Z
dora> /join #a
alice< :dora JOIN #a
bob< :dora JOIN #a
dora< * you speak in #a now
dora< * the topic of #a is not set
dora< * #a 1-3 of 3: @alice, bob, dora
dora> /search FOX
dora< * WHEN [#a] alice: the quick brown fox
dora< * found 1 message with FOX
dora> /search nothing
dora< * found 0 messages with nothing
=== SESSION: a secret before the name, and no other
+erin
erin> SESSION
erin< 461 * SESSION :it goes like this: SESSION <secret>
erin> SESSION secret
erin< FAIL SESSION BAD_SECRET :a secret has 32 hexadecimal digits
erin> SESSION 0123456789abcdef0123456789abcdef
erin> NICK erin
erin> USER e 0 * :E
erin< the welcome
erin> SESSION 0123456789abcdef0123456789abcdef
erin< 462 erin :you are here already
+fred
fred> SESSION 0123456789abcdef0123456789abcdef
fred> NICK fred
fred> USER e 0 * :E
erin< FAIL SESSION REPLACED :another connection of yours has this place now
erin< ERROR :Closing link: Another connection of yours took this place
fred< NOTE SESSION RESUMED :you have your place again
fred< the welcome
"""  # noqa: E501 -- lines as they are on the wire


def transcripts(text):
    """By name; those that follow a blank line and === are one each."""
    parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)
    return {
        name: lines.split("\n")[:-1] for name, lines in zip(parts[1::2], parts[2::2], strict=True)
    }


def irc_heard(house, label):
    """Return what a guest heard, without what is the same in every line."""
    lines = [line.removeprefix(":chat.py ") for line in house.heard(label)]
    text = "\n".join(lines).replace("!~u@127.0.0.1", "").replace("!line@127.0.0.1", "")
    text = re.sub(r"\b10000\d\d\b", "WHEN", text)
    text = re.sub(r"001 (?:.|\n)*\n221 .*", "the welcome", text)
    text = re.sub(r"005 (\w+) .*", r"005 \1 ...", text)
    text = re.sub(
        r"(msgid|batch)=(?:[0-9a-f]+[g-z]{4}|b?[0-9a-f]+)",
        r"\1=ID",
        re.sub(r"BATCH ([+-])\w+", r"BATCH \1ID", text),
    )
    return [chat.escaped(line) for line in text.split("\n") if text]


def played(lines):
    """The transcript again, with what was really heard."""
    house = House()
    house.motd = ["Welcome"]
    house.enter_irc("alice", "bob", "carol")
    house.enter("dora")
    again = []
    for line in lines:
        if re.match(r"\w+< ", line):
            continue
        again.append(line)
        if line.startswith("+#"):
            room, *people = line[1:].split()
            for who in people:
                house.say(who, f"JOIN {room}")
            house.turn()
            for who in house.guests:
                house.heard(who)
        elif line.startswith("+"):
            house.connect_irc(line[1:])
        else:
            who, _, text = line.partition(">")
            house.say(who, text[1:].encode().decode("unicode_escape") if "\\" in text else text[1:])
            house.turn()
            again += [f"{who}< {heard}" for who in house.guests for heard in irc_heard(house, who)]
    return again


@pytest.mark.parametrize("name", transcripts(IRC_TRANSCRIPTS))
def test_irc_goes_as_in_the_transcript(name):
    lines = transcripts(IRC_TRANSCRIPTS)[name]
    assert played(lines) == lines


def test_every_verb_of_irc_stands_in_a_transcript():
    verbs = {line.split()[1].upper() for line in IRC_TRANSCRIPTS.split("\n") if "> " in line}
    assert set(chat.irc_command) <= verbs


MESSAGES = [  # a line, and the verb, parameters and tags in it
    ("PING", "PING", [], {}),
    ("PING x", "PING", ["x"], {}),
    ("ping :x y", "PING", ["x y"], {}),
    ("PRIVMSG #a :", "PRIVMSG", ["#a", ""], {}),
    ("PRIVMSG #a ::)", "PRIVMSG", ["#a", ":)"], {}),
    ("PRIVMSG #a :a :b", "PRIVMSG", ["#a", "a :b"], {}),
    ("PRIVMSG  #a   b  c ", "PRIVMSG", ["#a", "b", "c"], {}),
    ("PRIVMSG #a a:b", "PRIVMSG", ["#a", "a:b"], {}),
    ("PRIVMSG #a\tb :c", "PRIVMSG", ["#a\tb", "c"], {}),
    ("  PING x", "PING", ["x"], {}),
    (":source PING x", "PING", ["x"], {}),
    (":source", "", [], {}),
    ("", "", [], {}),
    ("   ", "", [], {}),
    ("@a=b PING x", "PING", ["x"], {"a": "b"}),
    ("@a=b;c;+d/e=f :source PING x", "PING", ["x"], {"a": "b", "c": "", "+d/e": "f"}),
    ("@a=1;a=2 PING", "PING", [], {"a": "2"}),
    (r"@a=x\:y\sz\\\r\n\q\ PING", "PING", [], {"a": "x;y z\\\r\nq"}),
    ("@;;=x;a= PING", "PING", [], {"a": ""}),
    ("@a", "", [], {"a": ""}),
]


@pytest.mark.parametrize("line, verb, params, tags", MESSAGES)
def test_a_line_of_irc_has_a_verb_parameters_and_tags(line, verb, params, tags):
    assert chat.parse_message(line) == (verb, params, tags)


MASKS = [  # a mask, what it means, what it does not
    ("*", ["", "anything"], []),
    ("a*", ["a", "abc"], ["ba", ""]),
    ("*a", ["a", "ba"], ["ab"]),
    ("a*b*c", ["abc", "axxbyyc", "abbcc"], ["ac", "abcd", "acb"]),
    ("*ab*ab*", ["abab", "xabyabz"], ["aba", "ab"]),
    ("*aab", ["aab", "aaaab"], ["aaba"]),
    ("a?c", ["abc", "a?c"], ["ac", "abbc"]),
    ("**?", ["a", "ab"], [""]),
    ("a.c", ["a.c"], ["abc"]),
    ("[a]+", ["[a]+"], ["a"]),
    ("ALICE!*@*", ["alice!u@h"], ["bob!u@h"]),
    ("stra\u00dfe", ["strasse"], ["stra"]),
]


@pytest.mark.parametrize("mask, meant, other", MASKS)
def test_a_mask_means_what_its_stars_and_question_marks_allow(mask, meant, other):
    pattern = chat.mask_pattern(mask)
    assert [text for text in meant if not pattern.fullmatch(text)] == []
    assert [text for text in other if pattern.fullmatch(text)] == []


def naive_match(mask, text):
    if not mask:
        return not text
    if mask[0] == "*":
        return any(naive_match(mask[1:], text[n:]) for n in range(len(text) + 1))
    return bool(text) and mask[0] in ("?", text[0]) and naive_match(mask[1:], text[1:])


def test_masks_mean_what_trying_everything_says(seeded):
    for _ in range(3000):
        mask = "".join(seeded.choices("ab*?", k=seeded.randrange(7)))
        text = "".join(seeded.choices("ab", k=seeded.randrange(8)))
        found = chat.mask_pattern(mask).fullmatch(text) is not None
        assert found == naive_match(mask, text), (mask, text)


def test_no_number_of_stars_makes_a_mask_slow():
    pattern = chat.mask_pattern("*a" * 90 + "*b")
    began = time.perf_counter()
    assert not pattern.fullmatch("a" * 200)
    assert not chat.mask_pattern("*" * 200 + "b").fullmatch("a" * 200)
    assert time.perf_counter() - began < 0.1


@pytest.mark.parametrize(
    "whole, room, pieces",
    [
        ("short", 10, ["short"]),
        ("one two three", 8, ["one two ", "three"]),
        ("a verylongword", 8, ["a verylo", "ngword"]),
        ("\u00e4\u00f6\u00fc", 5, ["\u00e4\u00f6", "\u00fc"]),
        ("\U0001f600\U0001f600", 7, ["\U0001f600", "\U0001f600"]),
    ],
)
def test_long_text_is_split_between_words_or_at_least_characters(whole, room, pieces):
    assert list(chat.split_text(whole, room)) == pieces


def test_the_welcome_comes_in_the_order_that_clients_rely_on():
    house = House()
    house.connect_irc("erin")
    house.say("erin", "NICK erin", "USER erin 0 * :Erin")
    house.turn()
    lines = house.heard("erin")
    numbers = [line.split()[1] for line in lines]
    order = "001 002 003 004 005 251 252 253 254 255 265 266 422 221"
    assert " ".join(dict.fromkeys(numbers)) == order
    assert all(line.startswith(":chat.py ") and line.split()[2] == "erin" for line in lines)
    tokens = " ".join(line.split(" :are")[0].split(" ", 3)[3] for line in lines if " 005 " in line)
    known = dict(token.partition("=")[::2] for token in tokens.split())
    assert known["PREFIX"] == "(qaohv)~&@%+" and known["CHANMODES"] == "beI,k,l,CRimnst"
    assert known["NICKLEN"] == "32" and known["MAXLIST"] == "b:60,e:60,I:60"
    assert "UTF8ONLY" in known and "MODES" in known


def test_a_message_to_a_rank_is_for_the_members_who_had_it_then():
    house = House()
    house.enter_irc("alice", "bob", "carol")
    for who in house.guests:
        house.say(who, "JOIN #a")
    house.turn()
    for who in house.guests:
        house.heard(who)
    house.say("carol", "PRIVMSG @#a :before")
    house.say("alice", "MODE #a +o bob")
    house.say("carol", "PRIVMSG @#a :between")
    house.say("alice", "MODE #a -o bob")
    house.turn()
    said = [line.partition(" :")[2] for line in house.heard("bob") if "PRIVMSG" in line]
    assert said == ["between"]


def test_the_password_of_a_channel_is_not_in_the_history():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "JOIN #a", "MODE #a +ik hush", "MODE #a -k *")
    house.turn()
    rows = house.store.db.execute("SELECT kind, text FROM events").fetchall()
    assert ("mode", "+i") in rows and "hush" not in str(rows)


def test_the_past_of_a_private_channel_is_closed_when_the_last_one_leaves():
    house = House()
    house.enter_irc("alice")
    house.enter("dora")
    for mode in ("+s", "+i", "+k word"):
        house.say("alice", "JOIN #a", f"MODE #a {mode}", "PRIVMSG #a :for us only", "PART #a")
        house.turn()
        house.say("dora", "/join #a", "/history")
        house.turn()
        house.say("dora", "something else", "/history")
        house.turn()
        lines = [line for line in house.heard("dora") if "that was" in line or "WHEN" in line]
        assert lines == [
            "* that was 0 messages",
            "* WHEN [#a] dora: something else",
            "* that was 1 message",
        ]
        house.say("dora", "/mode +s", "/part #a")
        house.turn()


def test_history_is_for_members_only_also_where_they_may_not_speak():
    house = House()
    house.enter_irc("alice")
    house.enter("dora", "eve")
    house.say("alice", "JOIN #a", "PRIVMSG #a :hello", "MODE #a -n+m")
    house.say("dora", "/join #a", "/history #a")
    house.say("eve", "/history #a", "/history @#a", "/history absent")
    house.turn()
    assert house.heard("dora")[-2:] == ["* WHEN [#a] alice: hello", "* that was 1 message"]
    assert [line for line in house.heard("eve") if line.startswith("* ")] == [
        "* you are not in #a; /join #a first",
        "* no user here is called @#a",
        "* no user here is called absent",
    ]


@pytest.mark.parametrize("mask", ["m:" * 3000, "", "a b", ":x", "x" * 300])
def test_an_invalid_mask_bans_no_user(mask):
    house = House()
    house.enter("dora", "eve")
    house.say("dora", "/join #a", f"/mode +b {mask}", f"/mode +e {mask}", f"/mode +I {mask}")
    house.turn()
    assert not any(house.hub.channels["#a"].lists.values()) or mask == "a b"
    house.say("eve", "/join #a")
    assert "#a" in [channel.name for channel in house.guests["eve"].user.channels]


def test_a_user_who_was_kicked_sees_and_changes_nothing_there():
    house = House()
    house.enter_irc("alice")
    house.enter("dora")
    house.say("alice", "OPER boss secret", "JOIN #a")
    house.turn()
    house.say("alice", "JOIN #a")
    house.say("dora", "/join #a")
    house.say("alice", "KICK #a dora", "TOPIC #a :secret")
    house.turn()
    house.heard("dora")
    house.say("dora", "/topic", "/topic mine", "/mode", "/ban", "/kick alice", "hello")
    house.turn()
    assert set(house.heard("dora")) == {"* you are not in #a; /join #a first"}


def test_ten_thousand_places_to_talk_are_counted_and_kept(monkeypatch):
    monkeypatch.setattr(chat, "TARGETS_CACHED", 10)
    house = House()
    house.enter_irc("alice")
    for turn in range(4):
        house.say("alice", *(f"PRIVMSG alice :{turn}" for _ in range(3)))
        house.say("alice", *(f"JOIN #{turn}{n}" for n in range(12)))
        house.turn()  # commits, or fails
    assert house.store.db.execute("SELECT count(*) FROM events").fetchone() == (4 * (3 + 12),)
    assert len(house.store.targets) <= 12


def test_a_long_list_waits_for_its_reader_and_is_whole(running, monkeypatch):
    monkeypatch.setattr(chat, "UNSENT_NO_READ", 4096)
    monkeypatch.setattr(chat, "CHANNELS_A_USER", 3000)
    alice = running().guest()
    alice.enter_irc("alice")
    for n in range(2000):
        alice.send(f"JOIN #channel{n}\r\nTOPIC #channel{n} :{'x' * 90}\r\n")
    alice.send("PING joined\r\n")
    alice.until("PONG")
    alice.send("LIST\r\nWHO *\r\nPING after\r\n")
    lines = alice.until("PONG chat.py :after")
    assert [" 322 " in line for line in lines] == [False] + [True] * 2000 + [False] * 4


def test_a_scan_of_everything_is_charged(running):
    server = running(flood=(30, 1))
    alice = server.guest()
    alice.enter_irc("alice")
    peer = next(iter(server.server.peers))
    for n in range(1000):
        server.server.hub.channels[f"#{n}"] = chat.Channel(f"#{n}", 1, 0)
    before = peer.budget.tokens
    alice.send("LIST *a*\r\nPING 1\r\n")
    alice.until("PONG")
    assert before - peer.budget.tokens > 10
    server.server.hub.channels.clear()


def test_whom_the_budget_holds_back_is_not_taken_for_dead(running, monkeypatch):
    monkeypatch.setattr(chat, "PING_SECONDS", 0.05)
    monkeypatch.setattr(chat, "PONG_SECONDS", 0.05)
    alice = running(flood=(4, 20)).guest()
    alice.send("NICK alice\r\nUSER u 0 * :r\r\n" + "".join(f"PING {n}\r\n" for n in range(8)))
    assert alice.until("PONG chat.py :7")


def test_what_operators_do_is_in_the_log_and_no_password_is():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "OPER boss hunter2")
    house.turn()
    house.say("alice", "OPER boss secret")
    house.turn()
    house.say("alice", "KILL bob :spam", "DIE")
    house.turn()
    assert house.asked_for == [
        "OPER: alice!~u@127.0.0.1 as boss: wrong password",
        "OPER: alice!~u@127.0.0.1 as boss",
        "bob!~u@127.0.0.1 killed by alice: spam",
        "DIE by alice!~u@127.0.0.1",
        "stop",
    ]


def test_every_letter_that_004_and_005_promise_is_a_mode():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "JOIN #a", "OPER boss secret")
    house.turn()
    values = (
        {"k": " word", "l": " 5"} | dict.fromkeys("qaohv", " alice") | dict.fromkeys("beI", " x")
    )
    for letter in "beIkl" + "qaohv" + "CRimnst":
        house.heard("alice")
        sign = "-" if letter in "nto" else "+"
        house.say("alice", f"MODE #a {sign}{letter}{values.get(letter, '')}")
        house.turn()
        (line,) = house.heard("alice")
        assert f" MODE #a {sign}{letter}" in line
    for letter in "BRiw":
        house.say("alice", f"MODE alice +{letter}")
        house.turn()
        assert house.heard("alice") == [f":alice!~u@127.0.0.1 MODE alice +{letter}"]


TOO_MUCH = [  # what an IRC client sends, and the number or word that answers it
    (b"PRIVMSG #a :" + b"x" * 499, b" 417 "),
    (b"PING " + b"x" * 505, b" PONG "),
    (b"PING " + b"x" * 506, b" 417 "),
    (b"@a=" + b"x" * 4092 + b" PING x", b" PONG "),  # 4,094 bytes of tags
    (b"@a=" + b"x" * 4093 + b" PING x", b" 417 "),
    (b"@a=" + b"x" * 4092 + b" PING " + b"x" * 505, b" PONG "),
    (b"@" + b"x" * 9000 + b" PING x", b" 417 "),
    (chat.TOO_LONG, b" 417 "),
    (b"PRIVMSG #a :\xff", b" FAIL PRIVMSG INVALID_UTF8 "),
    (b"\xff", b" FAIL * INVALID_UTF8 "[:6]),
    (b"NICK a\x01b", b" 432 "),
    (b"JOIN #\x00\r", b" 476 "),
    (b"PING a\x00\rb", b" PONG chat.py :ab\r\n"),
    (b"MODE #a +b ::x", b" 696 "),
    (b"MODE #a +b x\x07", b" 696 "),
    (b"MODE #a +k x\x07", b" 696 "),
    (b"MODE #a +b " + b"m:" * 200, b" 696 "),
    (b"NICK " + b"q" * 490, b" 432 "),
    (b"USER " + b"q" * 490, b" 461 "),
    (b"MODE #a " + b"+x" * 200, b" 472 "),
    (b"MODE #a +" + b"o" * 100, b" 461 "),
    (b"WHO " + b"*?" * 200, b" 315 "),
    (b"LIST " + b"*a" * 200, b" 323 "),
]


@pytest.mark.parametrize("line, answer", TOO_MUCH)
def test_too_much_or_too_strange_is_answered_once(line, answer):
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "JOIN #a")
    house.say("bob", "JOIN #a")
    house.turn()
    house.heard("alice")
    house.heard("bob")
    house.say("alice", line)
    house.turn()
    out = house.guests["alice"].conn.out
    assert answer in out and out.count(b"\r\n") == (2 if b"LIST" in line else 1)
    assert house.heard("bob") == []


def test_what_is_said_at_length_with_netcat_reaches_irc_in_lines_that_fit():
    house = House()
    house.enter_irc("alice")
    house.enter("dora")
    house.say("alice", "JOIN #lobby")
    house.turn()
    house.heard("alice")
    text = "\u4f60\u597d w\u00f6rter \U0001f600 " * 400
    house.say("dora", text, "/me " + text)
    house.turn()
    lines = house.guests["alice"].conn.out.split(b"\r\n")[:-1]
    assert max(map(len, lines)) <= 510
    said = [line.decode().partition(" :")[2] for line in lines]
    assert "".join(one for one in said if "\x01" not in one) == text
    acted = [one.removeprefix("\x01ACTION ").removesuffix("\x01") for one in said if "\x01" in one]
    assert "".join(acted) == text.strip()


def test_a_message_of_several_lines_is_as_many_in_irc_and_blank_ones_are_not_sent():
    house = House()
    house.enter_irc("alice")
    house.enter("dora")
    house.say("alice", "JOIN #lobby")
    house.turn()
    house.heard("alice")
    house.say("dora", "/lines 3", "one", "", "three", "")
    house.turn()
    head = ":dora!line@127.0.0.1 PRIVMSG #lobby :"
    assert house.heard("alice") == [f"{head}one", f"{head}three", f"{head} "]


def test_no_text_of_a_user_can_end_a_line_of_irc():
    house = House()
    house.enter_irc("alice")
    house.enter("dora")
    house.say("alice", "JOIN #lobby")
    house.turn()
    house.heard("alice")
    house.say("dora", "a\rQUIT\x00b", "/topic c\rd", "/away e\rf")
    house.turn()
    lines = house.guests["alice"].conn.out.split(b"\r\n")[:-1]
    assert len(lines) == 2 and not any(set(line) & set(b"\r\n\0") for line in lines)


ENDING_A_LINE = [r"a\r\nERROR", r"\r\n@account=alice", r"\n", r"a\rb", r"\n\:\s903"]


@pytest.mark.parametrize("value", ENDING_A_LINE)
def test_a_client_tag_cannot_end_a_line_live_or_in_history(value):
    house = House()
    house.enter_irc("alice", "bob")
    tags = "message-tags draft/chathistory batch draft/multiline labeled-response echo-message"
    for name in ("alice", "bob"):
        house.say(name, f"CAP REQ :{tags}", "JOIN #a")
        house.turn()
        house.heard(name)
    house.say("alice", f"@+x={value};label={value} PRIVMSG #a :one", f"@+x={value} TAGMSG #a")
    house.say("alice", f"@+x={value} BATCH +1 draft/multiline #a", "@batch=1 PRIVMSG #a :two")
    house.say("alice", "@batch=1 PRIVMSG #a :three", "BATCH -1")
    house.turn()
    house.say("bob", "CHATHISTORY LATEST #a * 10")
    house.turn()
    for name in ("alice", "bob"):
        heard = [chat.parse_message(line) for line in house.heard(name)]
        assert not [one for one in heard if one.verb == "ERROR" or "account" in one.tags]
        assert {one.tags["+x"] for one in heard if "+x" in one.tags} == {
            chat.parse_tags(f"x={value}")["x"]
        }


def test_a_tag_that_an_earlier_version_stored_cannot_end_a_line():
    event = chat.event_of(1, 1, chat.MESSAGE, "a", "h:1", "u", "", "hi", "~1", "+x=a\r\nERROR")
    wire = chat.IrcWires(chat.MessageIds()).get(frozenset({"message-tags"}))
    (line,) = wire.encode(chat.Audience("#a"), [event])
    check_grammar(line)
    assert chat.parse_message(line.decode()).tags["+x"] == "a\r\nERROR"


def test_a_quit_always_has_a_reason():
    house = House()
    house.enter_irc("alice", "bob")
    house.enter("carol")
    for name in ("alice", "bob"):
        house.say(name, "JOIN #lobby")
    house.turn()
    house.heard("bob")
    house.leave("alice")
    house.leave("carol")
    house.turn()
    quits = [line for line in house.heard("bob") if " QUIT " in line]
    assert [line.partition(" QUIT ")[2] for line in quits] == [":Connection closed"] * 2


def test_wires_are_shared_by_what_changes_bytes_and_dropped_when_unused():
    house = House()
    house.enter_irc("alice", "bob")
    before = len(house.site.wires.wires)
    offered = sorted(set(chat.CAPABILITIES) - {"cap-notify"})
    for number in range(300):
        some = [cap for n, cap in enumerate(offered) if number >> (n % 9) & 1]
        gone = [f"-{cap}" for cap in offered if cap not in some]
        house.say("alice", f"CAP REQ :{' '.join(some)}", f"CAP REQ :{' '.join(gone)}")
    gc.collect()
    assert len(house.site.wires.wires) <= before + 1
    house.say("alice", "CAP REQ :batch sasl setname", "CAP REQ :-batch -setname")
    one = house.guests["alice"].wire
    house.say("alice", "CAP REQ :draft/chathistory labeled-response standard-replies")
    assert house.guests["alice"].wire is one


def test_lines_have_times_for_clients_that_asked_for_them():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "CAP REQ server-time")
    house.say("bob", "PRIVMSG alice :x")
    house.turn()
    stamp = "@time=1970-01-12T13:46:42.000Z :bob!~u@127.0.0.1 PRIVMSG alice :x"
    assert house.heard("alice") == [
        "@time=1970-01-12T13:46:42.000Z :chat.py CAP alice ACK :server-time",
        stamp,
    ]


def test_a_wrong_or_missing_server_password_is_an_error_and_the_end():
    for words in ([], ["PASS wrong"]):
        house = House(password="open sesame")
        house.connect_irc("x")
        house.say("x", *words, "NICK x", "USER x 0 * :x")
        house.turn()
        assert [line.split()[1] for line in house.heard("x")] == ["464", ":Closing"]
        assert house.guests["x"].conn.closed
    house.connect_irc("y")
    house.say("y", "PASS :open sesame", "NICK y", "USER y 0 * :y")
    house.turn()
    assert " 001 y " in house.heard("y")[0]


def answer_with(label, lines):
    """Return the one line with that label, or the batch that begins with it: the
    lines, and a list for each batch among them. What is in no batch is not in it."""
    batches, answers = {}, []
    for message in (chat.parse_message(line.removesuffix("\r")) for line in lines):
        line, reference = [message.verb, *message.params], message.tags.get("batch")
        place = batches[reference] if reference else []
        if message.verb == "BATCH" and message.params[0][0] == "-":
            del batches[message.params[0][1:]]
        elif message.verb == "BATCH":
            batches[message.params[0][1:]] = line = []
        place.extend([line] if message.verb != "BATCH" or line == [] else [])
        answers += [line] if message.tags.get("label") == label else []
    (answer,) = answers
    assert not batches
    return answer


@pytest.mark.parametrize(
    "targets, verbs",
    [
        ("bob,NickServ", ["PRIVMSG", "NOTICE"]),
        ("NickServ,bob", ["NOTICE", "PRIVMSG"]),
        ("NickServ,absent", ["NOTICE", "401"]),
        ("bob,NickServ,absent", ["PRIVMSG", "NOTICE", "401"]),
        ("bob,absent,NickServ", ["PRIVMSG", "401", "NOTICE"]),
    ],
)
def test_an_answer_that_has_to_be_waited_for_is_one_with_what_was_said_at_once(targets, verbs):
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "CAP REQ :labeled-response batch echo-message")
    house.turn()
    house.heard("alice")
    house.say("alice", f"@label=1 PRIVMSG {targets} :identify wrong")
    house.turn()
    assert [line[0] for line in answer_with("1", house.heard("alice"))] == verbs
    for line, verb in (("PRIVMSG NickServ :identify wrong", "NOTICE"), ("WHO absent", "315")):
        house.say("alice", f"@label=2 {line}")
        house.turn()
        assert answer_with("2", house.heard("alice"))[0] == verb


def test_a_long_answer_with_a_label_is_one_batch_over_several_turns(running, monkeypatch):
    monkeypatch.setattr(chat, "LINES_A_TURN", 3)
    server = running()
    alice = server.guest()
    alice.enter_irc("alice", "CAP REQ :labeled-response batch", "JOIN #a,#b,#c,#d,#e,#f,#g")
    alice.send("@label=1 LIST\r\nPING end\r\n")
    *lines, _ = itertools.dropwhile(lambda line: "label=1" not in line, alice.until("PONG"))
    verbs = [line[0] for line in answer_with("1", lines)]
    assert verbs == ["321", *["322"] * 7, "323"]


def test_a_labelled_message_in_a_batch_of_its_own_is_nested_with_the_rest_of_the_answer():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "CAP REQ :labeled-response batch echo-message draft/multiline")
    house.say("bob", "AWAY :lunch")
    house.turn()
    house.heard("alice")
    house.say("alice", "@label=1 BATCH +x draft/multiline bob", "@batch=x PRIVMSG bob :one")
    house.say("alice", "@batch=x PRIVMSG bob :two", "BATCH -x")
    house.turn()
    lines = [["PRIVMSG", "bob", "one"], ["PRIVMSG", "bob", "two"]]
    assert answer_with("1", house.heard("alice")) == [lines, ["301", "alice", "bob", "lunch"]]


def test_three_wrong_passwords_of_an_operator_end_the_connection():
    house = House()
    house.enter_irc("alice")
    for _ in range(3):
        assert not house.guests["alice"].conn.closed
        house.say("alice", "OPER boss wrong")
        house.turn()
    assert house.guests["alice"].conn.closed and "alice" not in house.hub.users


def test_lists_have_limits_and_say_so():
    house = House()
    house.enter_irc("alice")
    house.say("alice", "JOIN #a", *(f"MODE #a +b {n}" for n in range(chat.MASKS_A_LIST)))
    house.turn()
    house.heard("alice")
    house.say("alice", "MODE #a +b one-more", f"MONITOR + {','.join(f'n{n}' for n in range(101))}")
    house.turn()
    lines = house.heard("alice")
    assert lines[0] == (":chat.py 478 alice #a one-more!*@* :the list is full: 60 masks at most")
    assert lines[1] == ":chat.py 734 alice 100 n100 :Monitor list is full"
    offline = [line.partition(" :")[2] for line in lines[2:]]
    assert ",".join(offline) == ",".join(f"n{n}" for n in range(100))


def test_the_monitor_lists_of_a_user_who_leaves_are_empty():
    house = House()
    house.enter_irc("alice", "bob")
    house.say("alice", "MONITOR + bob,carol", "INVITE")
    house.say("bob", "MONITOR + alice")
    assert set(house.hub.watchers) == {"alice", "bob", "carol"}
    house.say("alice", "QUIT")
    house.turn()
    assert set(house.hub.watchers) == {"alice"}
    house.say("bob", "MONITOR C")
    assert house.hub.watchers == {}


def test_a_crowded_channel_is_named_in_lines_that_fit():
    house = House()
    names = [f"stranger{n}" for n in range(150)]
    house.enter_irc(*names)
    for name in names:
        house.say(name, "JOIN #a")
    house.turn()
    for name in names:
        house.heard(name)
    house.say(names[0], "NAMES #a", "WHO #a", "MODE #a +s", "LIST")
    house.turn()
    lines = house.heard(names[0])
    assert max(len(line.encode()) for line in lines) <= 510
    listed = " ".join(line.partition(" :")[2] for line in lines if " 353 " in line).split()
    assert [name.removeprefix("@") for name in listed] == names
    assert sum(" 352 " in line for line in lines) == 150


def test_a_name_is_one_in_both_dialects():
    house = House()
    house.enter_irc("Alice")
    house.connect("x")
    house.say("x", "ALICE")
    house.turn()
    assert house.guests["x"].user.name == "ALICE2"
    house.connect_irc("y")
    house.say("y", "NICK alice2")
    house.turn()
    assert house.heard("y") == [":chat.py 433 * alice2 :alice2 is taken"]


def irc_step(seeded, house, text):
    """A user does something; what was said with it, where, and who is to hear it."""
    who = seeded.choice(("alice", "bob", "carol"))
    verb = seeded.choice(("JOIN #a", "JOIN #b", "PART #a", "PART #b", "T #a", "T #b"))
    if verb[0] != "T":
        house.say(who, verb)
        return []
    place = verb[2:]
    room, user = house.hub.channels.get(place), house.guests[who].user
    house.say(who, f"PRIVMSG {place} :{text}")
    if not room or user not in room.members:
        return []
    return [(text, place, {other.name for other in room.members if other is not user})]


def test_a_session_of_irc_gets_no_line_twice_and_none_of_before_it_came(seeded):
    """Whatever people do in a turn, each hears it in the order in which it was done."""
    house = House()
    house.enter_irc("alice", "bob", "carol")
    for turn in range(200):
        said = []
        for n in range(seeded.randrange(1, 12)):
            said += irc_step(seeded, house, f"{turn}.{n}")
        house.turn()
        for who in house.guests:
            heard = [line for line in house.heard(who) if " PRIVMSG #" in line]
            got = [(line.split(" :")[1], line.split()[2]) for line in heard]
            assert got == [(text, room) for text, room, hear in said if who in hear]


def test_the_welcome_names_each_mode_once_as_the_tokens_do():
    house = House()
    house.connect_irc("erin")
    house.say("erin", "NICK erin", "USER erin 0 * :Erin")
    house.turn()
    lines = house.heard("erin")
    (info,) = [line.split()[3:] for line in lines if " 004 " in line]
    modes = re.search(r" CHANMODES=(\S+)", "".join(lines))[1].split(",")
    ranks = re.search(r" PREFIX=\((\w+)\)", "".join(lines))[1]
    with_value = sorted("".join(modes[:3]) + ranks)
    assert info[:2] == ["chat.py", f"chat.py-{chat.VERSION}"]
    assert info[3:] == ["".join(sorted([*with_value, *modes[3]])), "".join(with_value)]
    assert sorted(chat.USER_MODES) == list(info[2])


# CAP


# Below 302 one line, only classic capabilities, sasl first, none cut
@pytest.mark.parametrize("version", ["", " 301", " 1", " abc"])
@pytest.mark.parametrize("registered", [False, True])
def test_cap_ls_below_302_is_one_line_of_classic_capabilities_with_sasl_first(version, registered):
    house = House()
    house.connect_irc("x")
    house.connect_irc("other")
    offered = drafts_and_values(house, "other")
    house.say("x", f"NICK {WIDE}", *(["USER u 0 * :r"] if registered else []))
    house.turn()
    house.heard("x")
    (line,) = of(asked(house, "x", f"CAP LS{version}"), "CAP")
    assert line.params[:2] == [WIDE, "LS"] and len(line.params) == 3
    names = line.params[2].split()
    assert names[0] == "sasl"
    assert set(names) <= set(offered)  # whole names, and no values
    assert not [name for name in names if name.startswith("draft/")]
    assert len(names) == len(set(names)) and len(names) > 10


WIDE = "\u00fc" * 32  # a name of 64 bytes, the longest that there is


# With 302 drafts come in the first lines, all classic ones in the last (pydle
# reads only that)
@pytest.mark.parametrize("nick", ["x", WIDE])
def test_cap_ls_302_has_drafts_in_the_first_lines_and_classic_capabilities_in_the_last(nick):
    house = House()
    house.connect_irc("x")
    house.say("x", f"NICK {nick}")
    *first, last = of(asked(house, "x", "CAP LS 302"), "CAP")
    assert first and all(line.params[1:3] == ["LS", "*"] for line in first)
    assert last.params[1] == "LS" and len(last.params) == 3
    names = [
        {word.partition("=")[0] for word in line.params[-1].split()} for line in (*first, last)
    ]
    assert names[-1] >= CLASSIC
    assert not [name for name in names[-1] if name.startswith("draft/")]
    assert sum(map(len, names)) == len(set().union(*names))
    words = last.params[-1].split()
    assert any(word.startswith("sasl=") for word in words)


# Several lines of ACK have no continuation mark, and no name is cut
@pytest.mark.parametrize("sign, answer", [("", "ACK"), ("-", "ACK"), ("x", "NAK")])
def test_an_answer_to_cap_req_that_does_not_fit_is_several_lines_of_whole_names(sign, answer):
    house = House()
    house.connect_irc("x")
    house.say("x", f"NICK {WIDE}")
    house.turn()
    offered = [name for name in drafts_and_values(house, "x") if name != "cap-notify"]
    wanted = room_for("CAP REQ :", [f"{sign}{name}" for name in offered])
    assert len(" ".join(wanted)) > 400
    lines = of(asked(house, "x", "CAP REQ :" + " ".join(wanted)), "CAP")
    assert {tuple(line.params[:2]) for line in lines} == {(WIDE, answer)}
    assert {len(line.params) for line in lines} == {
        3
    }  # no * among them: clients take it for a name
    assert " ".join(line.params[2] for line in lines).split() == wanted


# CAP LIST in several lines, marked like those of LS for version 302
@pytest.mark.parametrize("version, marks", [(" 302", True), ("", False)])
def test_cap_list_is_several_lines_of_whole_names(version, marks):
    house = House()
    for who in ("x", "other"):
        house.connect_irc(who)
    offered = list(drafts_and_values(house, "other"))
    house.say("x", f"NICK {WIDE}", f"CAP LS{version}")
    half = len(offered) // 2
    house.say("x", "CAP REQ :" + " ".join(offered[:half]), "CAP REQ :" + " ".join(offered[half:]))
    house.turn()
    house.heard("x")
    lines = of(asked(house, "x", "CAP LIST"), "CAP")
    assert len(lines) > 1 and {line.params[1] for line in lines} == {"LIST"}
    assert sorted(" ".join(line.params[-1] for line in lines).split()) == sorted(offered)
    if marks:
        assert [line.params[2] == "*" for line in lines] == [True] * (len(lines) - 1) + [False]


# The same with the long name of a server (ZNC, KVIrc and pydle lost sasl)
def test_a_long_server_name_cuts_no_capability(running):
    guest = running(name=LONG_SERVER).guest()
    lines = socket_lines(guest, "CAP LS", "NICK abcdefghijklmnopqrst", "CAP LS 302")
    old, *recent = of(lines, "CAP")
    names = [word.partition("=")[0] for line in recent for word in line.params[-1].split()]
    assert len(old.params) == 3 and old.params[-1].split()[0] == "sasl"
    assert set(old.params[-1].split()) <= set(names)
    assert {word.partition("=")[0] for word in recent[-1].params[-1].split()} >= CLASSIC
    wanted = room_for("CAP REQ :", [name for name in names if name != "sts"])
    lines = of(socket_lines(guest, "CAP REQ :" + " ".join(wanted), "CAP LIST"), "CAP")
    for subcommand in ("ACK", "LIST"):
        told = [line.params[-1] for line in lines if line.params[1] == subcommand]
        assert set(wanted) <= set(" ".join(told).split()) <= set(names)


# EXTERNAL only to a client that shows a certificate; also in 908
@pytest.mark.parametrize("shown, offered", [("alice", True), ("", False), (None, False)])
def test_external_is_offered_only_to_a_client_that_shows_a_certificate(
    running, certificate, showing, shown, offered
):
    server = running(tls_cert=certificate, tls_client_ca=certificate)
    guest = server.guest(context=None if shown is None else showing(shown))
    lines = socket_lines(guest, "CAP LS 302", "CAP REQ sasl", "AUTHENTICATE NONE")
    values = [w for line in of(lines, "CAP") for w in line.params[-1].split() if w[:5] == "sasl="]
    assert ["EXTERNAL" in value for value in values] == [offered]
    for line in of(lines, "908"):
        assert ("EXTERNAL" in line.params[1].split(",")) == offered
    assert of(lines, "908", "904")
    if not offered:
        lines = socket_lines(guest, "AUTHENTICATE EXTERNAL", "AUTHENTICATE +")
        assert of(lines, "904") and not of(lines, "900", "903")


# MODES AND RANKS


# MODES=13 must be announced and true: 15 parameters, the channel and the letters
# among them
def test_thirteen_modes_with_a_parameter_are_announced_and_done():
    house = irc_house("#a", alice="")
    known = tokens(asked(house, "alice", "VERSION"))
    assert known["MODES"] == "13"
    masks = [f"n{n}!*@*" for n in range(int(known["MODES"]))]
    changed = asked(house, "alice", f"MODE #a +{'b' * len(masks)} {' '.join(masks)}")
    assert [mask for line in of(changed, "MODE") for mask in line.params[2:]] == masks
    listed = of(asked(house, "alice", "MODE #a +b"), "367")
    assert [line.params[2] for line in listed] == masks


# The error must name the letter that the client asked for; other members: each letter
# that takes a value, either sign, and a value that is missing behind thirteen others. In
# wording (461) the letter stands with its sign; 696 has it as a parameter.
@pytest.mark.parametrize("change", ["+v", "-v", "+h", "-h", "+a", "+q", "+o", "-o", "+l", "+k"])
def test_a_mode_without_its_value_is_refused_by_its_letter(change):
    house = irc_house("#a", alice="")
    (line,) = asked(house, "alice", f"MODE #a {change}")
    assert line.verb in ("461", "696")
    sign, letter = change
    if line.verb == "696":
        assert line.params[1:3] == ["#a", letter]
    else:
        assert f"{sign}{letter}" in line.params[-1]
        assert not [x for x in re.findall(r"[+-]([a-zA-Z])\b", line.params[-1]) if x != letter]


def test_each_mode_of_one_line_that_cannot_be_done_is_named():
    house = irc_house("#a", alice="")
    lines = asked(house, "alice", "MODE #a +vhZY")
    assert [line.params[1] for line in of(lines, "472")] == ["Z", "Y"]
    told = " ".join(
        line.params[-1] if line.verb == "461" else f"+{line.params[2]}" for line in lines
    )
    assert "+v" in told and "+h" in told


def founded_twice(house, who):
    for _ in range(3):
        house.say(who, "PART #a", "JOIN #a")
        house.turn()


def logged_out_and_in(house, who):
    house.say(who, "PART #a")
    house.turn()
    for _ in range(2):
        house.say(who, "JOIN #a", f"NS IDENTIFY {who} password")
        house.turn()


def given_again(house, who):
    for letter in "vo":  # a change of ranks after which they are stored
        house.say(who, "PART #a", "JOIN #a", f"MODE #a +{letter} {who}", f"MODE #a -{letter} {who}")
        house.say(who, "PART #a", "JOIN #a")
        house.turn()


# Founders must be shown as ~alice, not ~~alice: wherever ranks are shown, however the
# founder came to them
@pytest.mark.parametrize("way", [founded_twice, logged_out_and_in, given_again])
@pytest.mark.parametrize("capability", ["", "multi-prefix"])
def test_a_founder_has_each_symbol_once(way, capability):
    house = irc_house("", alice="", bob=capability)
    asked(house, "alice", "REGISTER * * password")
    house.say("alice", "JOIN #a")
    house.say("bob", "JOIN #a")
    house.turn()
    way(house, "alice")
    forget(house)
    lines = asked(house, "bob", "NAMES #a", "WHO #a", "WHOIS alice", "WHO #a %nf")
    names = [w for line in of(lines, "353") for w in line.params[-1].split() if w.endswith("alice")]
    flags = [line.params[6] for line in of(lines, "352") if line.params[5] == "alice"]
    flags += [line.params[-1] for line in of(lines, "354") if "alice" in line.params]
    places = [w for line in of(lines, "319") for w in line.params[-1].split()]
    assert len(names) == 1 and len(flags) == 2 and len(places) == 1
    for shown in (*names, *flags, *places):
        symbols = [c for c in shown if c in "~&@%+"]
        assert symbols[:1] == ["~"] and len(symbols) == len(set(symbols)), shown
        assert capability or symbols == ["~"], shown


def test_a_founder_has_each_symbol_once_after_a_restart(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    house.enter_irc("alice")
    asked(house, "alice", "REGISTER * * password")
    asked(house, "alice", "JOIN #a", "PART #a", "JOIN #a", "MODE #a +v alice")
    asked(house, "alice", "PART #a", "JOIN #a", "QUIT")
    house = restarted(house, path)
    for _ in range(2):
        logged_in(house, "alice", "alice")
        lines = asked(house, "alice", "CAP REQ multi-prefix", "JOIN #a", "NAMES #a")
        for line in of(lines, "353"):
            (shown,) = line.params[-1].split()
            symbols = shown.removesuffix("alice")
            assert symbols[0] == "~" and len(symbols) == len(set(symbols)), shown
        asked(house, "alice", "QUIT")
    house.store.close()


# User modes


def with_account(house, who, first):
    if first:
        house.enter_irc(who)
        return asked(house, who, "REGISTER * * password")
    return [parsed(line) for line in logged_in(house, who, who)]


def with_secret(house, who, first):
    house.connect_irc(who)
    house.say(who, "CAP REQ chat.py/session", f"SESSION {SECRET}", f"NICK {who}")
    return asked(house, who, "USER u 0 * :r", "CAP END")


# User modes must survive a restart: of an account, and of a guest with a secret; what
# was unset stays unset; no one operates the server by that
@pytest.mark.parametrize("come", [with_account, with_secret])
@pytest.mark.parametrize(
    "lines, kept",
    [
        (["MODE alice +i"], "i"),
        (["MODE alice +iBw", "MODE alice -i"], "Bw"),
        (["MODE alice +R"], "R"),
        (["MODE alice +w", "OPER boss secret"], "w"),
    ],
)
def test_user_modes_survive_a_restart(folder, come, lines, kept):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    come(house, "alice", True)
    house.say("alice", "JOIN #a")
    house.turn()
    for line in lines:  # in turns of their own: nothing else is stored with them
        asked(house, "alice", line)
    house = restarted(house, path)
    welcome = come(house, "alice", False)
    modes = [line.params[1].strip("+") for line in of(welcome, "221")]
    modes += [line.params[1].strip("+") for line in of(asked(house, "alice", "MODE alice"), "221")]
    assert [set(found) for found in modes] == [set(kept)] * 2
    house.store.close()


# The user's other devices must be told of them
@pytest.mark.parametrize("change", ["+i", "+B", "+wR", "-i+w"])
def test_other_devices_are_told_of_a_user_mode(change):
    house = irc_house("", alice="", bob="")
    asked(house, "alice", "REGISTER * * password", "MODE alice +i")
    if change == "+i":
        asked(house, "alice", "MODE alice -i")
    for label in ("phone", "tablet"):
        logged_in(house, label, "alice")
    forget(house)
    (told,) = asked(house, "alice", f"MODE alice {change}")
    assert told.verb == "MODE" and told.params[0] == "alice"
    for label in ("phone", "tablet"):
        assert heard(house, label) == [told]
        (known,) = asked(house, label, "MODE alice")
        assert known.verb == "221"
    assert heard(house, "bob") == []
    assert asked(house, "phone", f"MODE alice {change}") == []  # no news, nothing is said
    assert heard(house, "alice") == []


# History


NOW = "timestamp=2026-11-22T08:30:05.123Z"
CHATHISTORY_REFUSED = [  # the command, the code, the context before the words
    ("LATEST #nowhere * 10", "INVALID_TARGET", ["LATEST", "#nowhere"]),
    (f"BEFORE #nowhere {NOW} 10", "INVALID_TARGET", ["BEFORE", "#nowhere"]),
    ("FOO #a * 10", "INVALID_PARAMS", ["FOO"]),
    ("LATEST #a * 0", "INVALID_PARAMS", ["LATEST"]),
    ("LATEST #a * -1", "INVALID_PARAMS", ["LATEST"]),
    ("LATEST #a * ten", "INVALID_PARAMS", ["LATEST"]),
    (f"BETWEEN #a {NOW} 10", "INVALID_PARAMS", ["BETWEEN"]),
    ("BEFORE #a timestamp=xx 10", "INVALID_PARAMS", ["BEFORE", "timestamp=xx"]),
    ("AFTER #a timestamp= 10", "INVALID_PARAMS", ["AFTER", "timestamp="]),
    ("AROUND #a timestamp=2026-13-40T00:00:00.000Z 10", "INVALID_PARAMS", None),
    (f"BETWEEN #a {NOW} timestamp=xx 10", "INVALID_PARAMS", ["BETWEEN", "timestamp=xx"]),
    ("LATEST #a timestamp=xx 10", "INVALID_PARAMS", ["LATEST", "timestamp=xx"]),
    (f"TARGETS timestamp=xx {NOW} 10", "INVALID_PARAMS", ["TARGETS", "timestamp=xx"]),
    (f"TARGETS {NOW} timestamp=xx 10", "INVALID_PARAMS", ["TARGETS", "timestamp=xx"]),
    ("BEFORE #a foo=1 10", "INVALID_MSGREFTYPE", ["BEFORE", "#a"]),
    ("LATEST #a foo 10", "INVALID_MSGREFTYPE", ["LATEST", "#a"]),
    (f"BETWEEN #a {NOW} foo=1 10", "INVALID_MSGREFTYPE", ["BETWEEN", "#a"]),
    ("BETWEEN #a foo=1 foo=2 10", "INVALID_MSGREFTYPE", ["BETWEEN", "#a"]),
    ("BEFORE #a msgid=not-an-id! 10", None, None),  # the codes are ours to choose ...
    ("AFTER #a msgid= 10", None, None),  # ... where the specification has none
    (f"AFTER #a msgid={'f' * 40} 10", None, None),
]


# FAIL CHATHISTORY must carry its context. A bad time is repeated as it
# was given; a kind of selector that there is not has the target behind the subcommand.
@pytest.mark.parametrize("line, code, context", CHATHISTORY_REFUSED)
def test_a_refusal_of_chathistory_says_what_it_is_about(line, code, context):
    house = irc_house("#a", alice="batch message-tags draft/chathistory")
    (refusal,) = fails(asked(house, "alice", f"CHATHISTORY {line}"))
    assert refusal[0] == "CHATHISTORY"
    assert code in (None, refusal[1])
    assert refusal[2][:1] == [line.split()[0]]
    if context is not None:
        assert refusal[2][: len(context)] == context
    assert house.heard("alice") == []


# Also: other refusals whose context the specifications demand, 2.11)
@pytest.mark.parametrize(
    "line, expected",
    [
        ("BATCH +abc unknown/type #a", ("BATCH", "UNKNOWN_TYPE", ["abc", "unknown/type"])),
        ("BATCH -abc", ("BATCH", "INVALID_REFTAG", ["abc"])),
        ("REDACT #a zzz", ("REDACT", "UNKNOWN_MSGID", ["#a", "zzz"])),
        ("REDACT #none 1", ("REDACT", "INVALID_TARGET", ["#none"])),
        ("METADATA #none GET x", ("METADATA", "INVALID_TARGET", ["#none"])),
        ("METADATA * FOO", ("METADATA", "INVALID_PARAMS", ["FOO"])),
    ],
)
def test_a_refusal_carries_the_context_that_its_specification_demands(line, expected):
    house = irc_house("#a", alice="batch message-tags draft/multiline draft/message-redaction")
    assert fails(asked(house, "alice", line)) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        *("MARKREAD #a timestamp=xx", "MARKREAD #a foo", "MARKREAD #a *"),
        *("SEARCH text=x;after=yy", "SEARCH text=", "SEARCH in=#none;text=x"),
    ],
)
def test_no_refusal_of_these_commands_is_without_context(line):
    house = irc_house("#a", alice="batch message-tags soju.im/search draft/read-marker")
    ((verb, _, context),) = fails(asked(house, "alice", line))
    assert verb == line.split()[0] and context


HISTORY = "batch message-tags server-time draft/chathistory labeled-response"


def opening(lines):
    return next(line for line in of(lines, "BATCH") if line.params[0][0] == "+")


# The tag stands on the opening line when the next page would be empty
@pytest.mark.parametrize(
    "how, ends",
    [
        ("LATEST #a * 5", True),
        ("LATEST #a * 2", False),
        ("BEFORE #a {late} 5", True),
        ("BEFORE #a {late} 2", False),
        ("AFTER #a {early} 5", True),
        ("AFTER #a {early} 2", False),
        ("BETWEEN #a {early} {late} 5", True),
        ("BETWEEN #a {early} {late} 2", False),
        ("LATEST bob * 5", True),  # an empty page is the end
        ("TARGETS {early} {late} 5", True),
    ],
)
@pytest.mark.parametrize("label", ["", "@label=x "])
def test_the_last_page_of_history_is_marked_on_its_opening_line(how, ends, label):
    house = irc_house("#a", alice=HISTORY, bob="")
    asked(house, "bob", "JOIN #b")
    asked(house, "alice", "JOIN #b")
    for n in range(3):
        asked(house, "bob", f"PRIVMSG #a :{n}", f"PRIVMSG #b :{n}")
    forget(house)
    how = how.format(early="timestamp=1970-01-01T00:00:00.000Z", late=NOW)
    lines = asked(house, "alice", f"{label}CHATHISTORY {how}")
    marked = [line for line in lines if "draft/chathistory-end" in line.tags]
    assert marked == ([opening(lines)] if ends else [])
    assert all(line.tags["draft/chathistory-end"] == "" for line in marked)
    assert ("label" in opening(lines).tags) == bool(label)


# A false positive is harmful: a page that is short because of its bytes is no end
def test_a_page_that_is_cut_by_its_size_is_not_marked_as_the_last():
    house = irc_house("#a", alice=HISTORY, bob="")
    for _ in range(4):
        house.say("bob", *(f"PRIVMSG #a :{'x' * 400}" for _ in range(100)))
        house.turn()
    forget(house)
    lines = asked(house, "alice", "CHATHISTORY LATEST #a * 500")
    page = of(lines, "PRIVMSG")
    assert page
    assert ("draft/chathistory-end" in opening(lines).tags) == (len(page) == 400)


# Tags only for clients that can take them
def test_a_client_without_message_tags_gets_no_mark_of_the_last_page():
    house = irc_house("#a", alice="batch draft/chathistory")
    assert opening(asked(house, "alice", "CHATHISTORY LATEST #a * 5")).tags == {}


def equal_times(capabilities, *rooms):
    """All rooms have their last message in the same millisecond, and #late a second later."""
    house = irc_house("", alice=capabilities, bob="")
    for who in ("bob", "alice"):
        asked(house, who, *(f"JOIN {room}" for room in (*rooms, "#late")))
    house.say("bob", *(f"PRIVMSG {room} :x" for room in rooms))
    house.turn()
    asked(house, "bob", "PRIVMSG #late :x")
    forget(house)
    return house


EARLY = "timestamp=1970-01-01T00:00:00.000Z"


# TARGETS pages must never end between equal times
@pytest.mark.parametrize("limit, count", [(1, 3), (2, 3), (3, 3), (4, 4), (9, 4)])
def test_a_page_of_targets_does_not_end_between_equal_times(limit, count):
    house = equal_times(HISTORY, "#a", "#b", "#c")
    lines = asked(house, "alice", f"CHATHISTORY TARGETS {EARLY} {NOW} {limit}")
    found = [line.params[1:] for line in of(lines, "CHATHISTORY")]
    assert len({when for _, when in found[:3]}) == 1  # else this tests nothing
    assert len(found) == count
    assert sorted(name for name, _ in found)[:3] == ["#a", "#b", "#c"]


# Paging by the last time that was told reaches each target once, whatever the limit
@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_pages_of_targets_by_time_reach_each_one_once(limit):
    house = equal_times(HISTORY, "#a", "#b", "#c", "#d")
    found, after = [], EARLY
    for _ in range(9):
        lines = asked(house, "alice", f"CHATHISTORY TARGETS {after} {NOW} {limit}")
        page = [line.params[1:] for line in of(lines, "CHATHISTORY")]
        if not page:
            break
        found += [name for name, _ in page]
        after = f"timestamp={page[-1][1].removeprefix('timestamp=')}"
    assert sorted(found) == ["#a", "#b", "#c", "#d", "#late"]


# The first bound may be a msgid for clients with chat.py/session; for others it is refused
def test_the_first_bound_of_targets_may_be_a_message_id_for_our_own_clients():
    house = irc_house("#a,#b", alice=f"{HISTORY} chat.py/session", bob="", carol=HISTORY)
    (first,) = of((asked(house, "bob", "PRIVMSG #a :1"), heard(house, "alice"))[1], "PRIVMSG")
    asked(house, "bob", "PRIVMSG #b :2")
    forget(house)
    line = f"CHATHISTORY TARGETS msgid={first.tags['msgid']} {NOW} 10"
    assert [line.params[1] for line in of(asked(house, "alice", line), "CHATHISTORY")] == ["#b"]
    ((_, code, context),) = fails(asked(house, "carol", line))
    assert code == "INVALID_PARAMS" and context[0] == "TARGETS"


# History after a kick


READS = {  # what a member asks for; the answer comes from a helper
    "SEARCH in": "SEARCH in=#a;text=confidential",
    "SEARCH": "SEARCH text=confidential",
    "LATEST": "CHATHISTORY LATEST #a * 10",
    "BEFORE": f"CHATHISTORY BEFORE #a timestamp={iso(10**9)} 10",
    "AROUND": f"CHATHISTORY AROUND #a timestamp={iso(10**6)} 10",
    "TARGETS": f"CHATHISTORY TARGETS timestamp={iso(0)} timestamp={iso(10**9)} 10",
    "/history": "/history #a",
    "/history here": "/history",
    "/search": "/search confidential",
}
PUT_OUT = {
    "kick": ("alice", "KICK #a {}"),
    "kick and lock": ("alice", "KICK #a {}", "MODE #a +i"),
    "renamed and kicked": ("alice", "RENAME #a #b", "KICK #b {}"),
}


# Also: each request that a helper answers, each way to lose access meanwhile.
@pytest.mark.parametrize("read, how", in_turn(READS, PUT_OUT))
def test_a_member_who_was_put_out_gets_no_page_that_comes_later(read, how):
    house = House()
    come(house, "alice")
    line = READS[read].startswith("/")
    house.enter("eve") if line else come(house, "eve")
    ask(house, "alice", "JOIN #a")
    ask(house, "eve", "/join #a" if line else "JOIN #a")
    send(house, "alice", "#a", "confidential plans")
    assert "#a" in str(ask(house, "eve", READS[read]))  # a member reads it
    house.heard("eve")
    house.say("eve", READS[read])
    who, *lines = PUT_OUT[how]
    by_line = line and who == "{}"
    house.say(who.format("eve"), *(x.format("eve") for x in (["/part #a"] if by_line else lines)))
    house.turn()
    house.turn()
    heard = str(house.heard("eve"))
    assert "confidential plans" not in heard and "TARGETS #a" not in heard


# A page asked for as one account is not delivered to another (stricter than the
# text; on real sockets later lines wait for a helper's answer, so that only a House shows it).
def test_a_page_asked_for_as_one_account_is_not_for_the_next():
    house = House()
    account(house, "zoe", "yan")
    come(house, "bob", "alice")
    ask(house, "alice", "NS IDENTIFY zoe password")
    send(house, "alice", "bob", "as zoe")
    house.say("alice", "NS IDENTIFY yan password", "CHATHISTORY LATEST bob * 10")
    house.turn()
    house.turn()
    assert "as zoe" not in str(house.heard("alice"))
    assert is_logged_in(house, "alice", "yan") and history(house, "alice", "bob") == []


def test_around_a_message_is_half_of_what_is_asked_for_before_it():
    house = House()
    come(house, "alice")
    ask(house, "alice", "JOIN #a")
    ids = [send(house, "alice", "#a", f"{n}")[0] for n in range(10)]
    found = {n: history(house, "alice", "#a", f"AROUND {{}} msgid={ids[5]} {n}") for n in (4, 5)}
    assert found == {4: ["3", "4", "5", "6"], 5: ["3", "4", "5", "6", "7"]}


# SEARCH


# SEARCH must apply from= before the limit; with its other bounds, too
@pytest.mark.parametrize(
    "attributes, count",
    [
        ("in=#a;from=bob;text=word;limit=2", 2),
        ("from=bob;text=word;limit=2", 2),
        ("from=BOB;text=word;limit=3", 3),
        (f"from=bob;text=word;limit=1;before={NOW.removeprefix('timestamp=')}", 1),
        ("from=carol;text=word;limit=2", 0),
    ],
)
def test_a_search_by_author_is_limited_after_the_others_are_left_out(attributes, count):
    house = irc_house("#a", alice="batch message-tags soju.im/search", bob="")
    for n in range(3):
        asked(house, "bob", f"PRIVMSG #a :word {n}")
    for n in range(30):
        asked(house, "alice", f"PRIVMSG #a :word {n}")
    forget(house)
    found = messages_in(asked(house, "alice", f"SEARCH {attributes}"))
    assert found == [("bob", "#a", f"word {n}") for n in range(3 - count, 3)]


WITHOUT_SPACES = [  # what was said, words in it, words that are not
    (
        "\u6211\u4eec\u53bb\u516c\u56ed\u73a9",
        ["\u516c\u56ed", "\u6211\u4eec", "\u73a9"],
        ["\u56ed\u516c", "\u516c\u73a9"],
    ),
    (
        "\u6771\u4eac\u30bf\u30ef\u30fc\u3078\u884c\u304f",
        ["\u30bf\u30ef\u30fc", "\u6771\u4eac", "\u3078\u884c\u304f"],
        ["\u4eac\u6771"],
    ),
    (
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",
        ["\u0e04\u0e23\u0e31\u0e1a", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35"],
        ["\u0e04\u0e23\u0e31\u0e2a\u0e27"],
    ),
    ("\u0eaa\u0eb0\u0e9a\u0eb2\u0e8d\u0e94\u0eb5", ["\u0e9a\u0eb2\u0e8d"], ["\u0e94\u0eb5\u0eaa"]),
    ("\u179f\u17bd\u179f\u17d2\u178f\u17b8\u1794\u1784", ["\u1794\u1784"], ["\u1784\u1794"]),
    (
        "\u1019\u1004\u103a\u1039\u1002\u101c\u102c\u1015\u102b",
        ["\u1019\u1004\u103a\u1039\u1002\u101c\u102c"],
        ["\u1015\u102b\u1019"],
    ),
    ("party\U0001f389time", ["\U0001f389"], ["\U0001f388"]),
    ("well done \U0001f44d\U0001f3fd", ["\U0001f44d", "done"], ["\U0001f44e"]),
    ("iPhone\u624b\u673a very good", ["\u624b\u673a", "good"], ["\u673a\u624b"]),
]


# Find words inside Chinese, Japanese and Thai text, and emoji; both dialects
@pytest.mark.parametrize("text, found, missing", WITHOUT_SPACES)
def test_words_of_scripts_without_spaces_and_emoji_are_found(text, found, missing):
    house = irc_house("#lobby", alice="batch message-tags soju.im/search")
    house.enter("dora")
    asked(house, "alice", f"PRIVMSG #lobby :{text}", "PRIVMSG #lobby :something else")
    forget(house)
    for words, expected in [*((w, [text]) for w in found), *((w, []) for w in missing)]:
        lines = messages_in(asked(house, "alice", f"SEARCH in=#lobby;text={words}"))
        assert [said for *_, said in lines] == expected, words
        house.say("dora", f"/search {words}")
        house.turn()
        lines = house.heard("dora")[:-1]  # the last line counts them
        assert [line.partition("alice: ")[2] for line in lines] == expected, words


# ORDER AND LABELS


# TOPIC and RENAME in one turn must keep their order; the other events of a channel,
# members with and without the capability, and the one who does it
@pytest.mark.parametrize(
    "before",
    [
        "TOPIC {} :tea",
        "MODE {} +i",
        "MODE {} +k word",
        "PRIVMSG {} :hello",
        "NOTICE {} :hello",
        "KICK {} carol :out",
        "PRIVMSG @{} :hello",
    ],
)
def test_events_and_a_rename_of_one_turn_keep_their_order(before):
    echo = "echo-message draft/channel-rename draft/no-implicit-names"
    house = irc_house("#a", alice=echo, bob=echo, carol=echo)
    asked(house, "alice", "MODE #a +o bob")
    forget(house)
    verb = before.split()[0]
    house.say("alice", before.format("#a"), "RENAME #a #b", before.replace("+", "-").format("#b"))
    house.say("alice", "PRIVMSG #b :last")
    house.turn()
    for who in ("alice", "bob"):
        lines = of(heard(house, who), "TOPIC", "MODE", "PRIVMSG", "NOTICE", "KICK", "RENAME")
        told = [(line.verb, line.params[0].lstrip("@")) for line in lines]
        after = [] if verb == "KICK" else [(verb, "#b")]
        assert told == [(verb, "#a"), ("RENAME", "#a"), *after, ("PRIVMSG", "#b")], who


def test_a_client_without_the_capability_sees_a_rename_in_its_place():
    house = irc_house("#a", alice="draft/channel-rename", bob="")
    house.say("alice", "TOPIC #a :one", "RENAME #a #b", "TOPIC #b :two", "RENAME #b #c")
    house.say("alice", "PRIVMSG #c :last")
    house.turn()
    lines = of(heard(house, "bob"), "TOPIC", "PART", "JOIN", "332", "PRIVMSG")
    told = [(x.verb, x.params[0], x.params[-1] if x.verb == "TOPIC" else "") for x in lines]
    told = [one for one in told if one[0] != "332"]
    assert told == [
        ("TOPIC", "#a", "one"),
        ("PART", "#a", ""),
        ("JOIN", "#b", ""),
        ("TOPIC", "#b", "two"),
        ("PART", "#b", ""),
        ("JOIN", "#c", ""),
        ("PRIVMSG", "#c", ""),
    ]
    topics = [line.params[-1] for line in lines if line.verb == "332"]
    assert topics == ["one", "two"]  # what it was at that moment


def test_a_topic_set_from_outside_keeps_its_order_with_a_rename():
    house = irc_house("#a", alice="draft/channel-rename", bob="draft/channel-rename")
    house.enter_irc("root")
    asked(house, "root", "OPER boss secret", "CAP REQ draft/channel-rename")
    forget(house)
    house.say("root", "TOPIC #a :one")
    house.say("alice", "RENAME #a #b")
    house.say("root", "TOPIC #b :two")
    house.turn()
    told = [(line.verb, line.params[0]) for line in of(heard(house, "bob"), "TOPIC", "RENAME")]
    assert told == [("TOPIC", "#a"), ("RENAME", "#a"), ("TOPIC", "#b")]


NOT_KEPT = [  # one message as lines, and the capabilities of its sender
    (["{}PRIVMSG #a :lost"], "echo-message"),
    (["{}PRIVMSG #a :lost"], ""),
    (["{}PRIVMSG bob :lost"], "echo-message"),
    (["{}PRIVMSG bob :lost"], ""),
    (["{}PRIVMSG #a :\x01ACTION is lost\x01"], "echo-message"),
    (["{}NOTICE #a :lost"], "echo-message"),
    (
        ["{}BATCH +1 draft/multiline #a", "@batch=1 PRIVMSG #a :x", "@batch=1 PRIVMSG #a :y"]
        + ["BATCH -1"],
        "echo-message",
    ),
]


# NOT_KEPT must carry its label and appear in its place in the order of replies. The
# database is locked from outside for longer than a turn waits.
@pytest.mark.parametrize("lines, capabilities, label", in_turn(NOT_KEPT, ["", "@label=m "]))
def test_a_message_that_was_not_kept_is_answered_in_its_place_and_with_its_label(
    running, folder, monkeypatch, label, lines, capabilities
):
    monkeypatch.setattr(chat, "BUSY_SECONDS", 0.02, raising=False)
    server = running(data=folder)
    bob, alice = server.guest(), server.guest()
    bob.enter_irc("bob", "JOIN #a")
    tags = "labeled-response batch message-tags draft/multiline"
    alice.enter_irc("alice", f"CAP REQ :{tags} {capabilities}", "JOIN #a")
    other = sqlite3.connect(folder / "chat.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        sent = [line.format(label) for line in lines]
        told = socket_lines(alice, "@label=1 PING one", *sent, "@label=2 PING two", "PING three")
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert [line.verb for line in told] == ["PONG", "FAIL", "PONG", "PONG"]
    ((verb, code, context),) = fails(told)
    assert code == "NOT_KEPT" and verb in ("PRIVMSG", "NOTICE", "BATCH") and len(context) == 1
    assert [line.tags.get("label") for line in told] == ["1", "m" if label else None, "2", None]
    said = [parsed(line) for line in bob.until("lost" if len(lines) == 1 else ":y")]
    assert of(said, "PRIVMSG", "NOTICE")  # delivered all the same


# The same with several messages and other answers among them
def test_several_messages_that_were_not_kept_are_each_answered_in_their_place(
    running, folder, monkeypatch
):
    monkeypatch.setattr(chat, "BUSY_SECONDS", 0.02, raising=False)
    server = running(data=folder)
    alice = server.guest()
    tags = "labeled-response batch message-tags echo-message"
    alice.enter_irc("alice", f"CAP REQ :{tags}", "JOIN #a")
    other = sqlite3.connect(folder / "chat.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    sent = [
        x
        for n in range(4)
        for x in (f"@label=m{n};+chat.py/id=own{n} PRIVMSG #a :{n}", f"@label=p{n} PING {n}")
    ]
    told = socket_lines(alice, *sent)
    other.close()
    labels = [line.tags.get("label") for line in told if line.verb != "BATCH"]
    assert labels == [f"{kind}{n}" for n in range(4) for kind in "mp"]
    assert [context[-1] for _, _, context in fails(told)] == [f"own{n}" for n in range(4)]


# Messages of several lines


LIMIT = chat.LINE_BYTES
REFUSED_LINES = [  # a message of the line protocol that is refused at some line, all its lines
    ["/lines 4", "one", b"\xff", "/topic oops", "four"],
    ["/lines 3", b"\xff\xfe", "/me oops", "/part"],
    ["/lines 4", "x" * (LIMIT // 2), "y" * (LIMIT // 2), "/topic oops", "four"],
    ["/lines 3", "x" * 10, chat.TOO_LONG, "/topic oops"],
    ["/lines 3", b"\xff", b"\xff", b"\xff"],
    # The whole message is refused at its first line: what follows is that message, too
    ["/lines 201", *(["/topic oops", "oops"] * 100), "201"],
]


# /lines: the server must drop the rest of a refused message, not send or execute it
@pytest.mark.parametrize("lines", REFUSED_LINES)
def test_the_rest_of_a_refused_message_is_neither_sent_nor_executed(lines):
    house = House()
    house.enter("alice", "bob")
    house.say("alice", *lines)
    house.turn()
    assert house.heard("bob") == []
    told = house.heard("alice")
    assert len(told) == 1 and told[0].startswith("* ")  # said once
    house.say("alice", "after it", "/lines 2", "two", "lines")
    house.turn()
    assert house.heard("bob") == ["alice: after it", "alice: two", "alice: lines"]


# The same kind in IRC: a piece of a batch that is refused before it is looked at as a piece
@pytest.mark.parametrize(
    "piece",
    [
        b"@batch=1 PRIVMSG #a :\xff",
        b"@batch=1 PRIVMSG #a :" + b"x" * 600,
        b"@batch=1 PRIVMSG #b :elsewhere",
        b"@batch=1 JOIN #b",
        b"@batch=1;draft/multiline-concat PRIVMSG #a :",
        b"@batch=1 PRIVMSG",
    ],
)
def test_a_batch_with_a_refused_piece_is_not_sent_without_it(piece):
    tags = "batch message-tags draft/multiline"
    house = irc_house("#a", alice=tags, bob=tags)
    house.say("alice", "BATCH +1 draft/multiline #a", "@batch=1 PRIVMSG #a :one", piece)
    house.say("alice", "@batch=1 PRIVMSG #a :three", "BATCH -1")
    house.turn()
    assert heard(house, "bob") == []
    # too long a line has a numeric of its own
    told = [line for line in heard(house, "alice") if line.verb in ("FAIL", "417")]
    assert len(told) == 1
    asked(house, "alice", "PRIVMSG #a :after it")
    assert messages_in(heard(house, "bob")) == [("alice", "#a", "after it")]


# A reference is made of ASCII letters, digits and hyphens
@pytest.mark.parametrize("reference", ["a;b", "a_b", "\u00e4", "a=b", "", "a/b", "a.b", "#a"])
def test_a_batch_reference_that_is_none_is_refused(reference):
    tags = "batch message-tags draft/multiline"
    house = irc_house("#a", alice=tags, bob=tags)
    lines = asked(house, "alice", f"BATCH +{reference} draft/multiline #a")
    assert fails(lines) == [("BATCH", "INVALID_REFTAG", [reference or "*"])]
    for good in ("a-1", "Z", "-"):  # and nothing has been begun
        house.say("alice", f"BATCH +{good} draft/multiline #a")
        house.say("alice", f"@batch={good} PRIVMSG #a :{good}", f"BATCH -{good}")
        house.turn()
        assert messages_in(heard(house, "bob")) == [("alice", "#a", good)]
    assert fails(heard(house, "alice")) == []


MULTILINE = "batch message-tags draft/multiline"


def batch_of(*pieces, target="#a"):
    """The lines of one message: pieces that begin with + go on with the line before them."""
    yield f"BATCH +1 draft/multiline {target}"
    for piece in pieces:
        concat = ";draft/multiline-concat" * piece.startswith("+")
        yield f"@batch=1{concat} PRIVMSG {target} :{piece.removeprefix('+')}"
    yield "BATCH -1"


def pieces_of(lines):
    """The pieces of messages as a client with draft/multiline received them."""
    return [
        "+" * ("draft/multiline-concat" in line.tags) + line.params[-1]
        for line in of(lines, "PRIVMSG", "NOTICE")
    ]


def joined(pieces):
    return "".join(p[1:] if p.startswith("+") else f"\n{p}" for p in pieces)[1:]


HEADS = [  # a request, and the status of its answer
    ("GET / HTTP/1.1\nHost: localhost", 200),
    ("GET / HTTP/1.0", 200),
    ("GET http://localhost/ HTTP/1.1\nHost: localhost", 200),
    ("HEAD / HTTP/1.1\nHost: localhost", 200),
    ("GET /?a=b HTTP/1.1\nHost: localhost", 200),
    ("GET /%68ealth HTTP/1.1\nHost: localhost", 200),
    ("OPTIONS / HTTP/1.1\nHost: localhost", 204),
    ("GET /nothing HTTP/1.1\nHost: localhost", 404),
    ("GET /irc HTTP/1.1\nHost: localhost", 426),
    ("DELETE / HTTP/1.1\nHost: localhost", 405),
    ("BREW / HTTP/1.1\nHost: localhost", 405),
    ("GET / HTTP/1.1", 400),  # no Host
    ("GET / HTTP/1.1\nHost: localhost\nHost: localhost", 400),
    ("GET / HTTP/1.1\nHost: evil.example", 421),
    ("GET / HTTP/1.1\nHost: ", 421),
    ("GET / HTTP/1.1\nHost: 192.168.1.5:7000", 200),
    ("GET / HTTP/1.1\nHost: [::1]:7000", 200),
    ("GET  / HTTP/1.1\nHost: localhost", 400),
    ("GET / x HTTP/1.1\nHost: localhost", 400),
    ("GET / HTTP/1.1\nHost : localhost", 400),  # a blank before the colon
    ("GET / HTTP/1.1\nHost: localhost\n folded: line", 400),
    ("GET / HTTP/1.1\nHost: localhost\nNoColon", 400),
    ("GET / HTTP/1.1\nHost: localhost\nA: b\x00c", 400),
    ("GET / HTTP/1.1\nHost: localhost\nA: b\rc", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 1\nContent-Length: 1", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 1, 1", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: +1", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: -1", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 1_0", 400),
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 0x1", 400),
    ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\nContent-Length: 1", 400),
    ("POST / HTTP/1.0\nHost: localhost\nTransfer-Encoding: chunked", 400),
    ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: gzip, chunked", 501),
    ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: xchunked", 501),
    ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\nTransfer-Encoding: x", 501),
    ("GET / HTTP/1.1\nHost: localhost\nExpect: the-unexpected", 417),
    ("GET / HTTP/1.1\nHost: localhost\n" + "\n".join(f"A{n}: b" for n in range(100)), 431),
    ("GET / HTTP/1.1\nHost: localhost\nA: " + "b" * 16_400, 431),
    ("GET /" + "a" * 16_400 + " HTTP/1.1\nHost: localhost", 414),
]


# As the sender split it, with at most 200 pieces and four times as many as needed
@pytest.mark.parametrize(
    "pieces",
    [
        ["one", "two"],
        ["one", "+ more", "two"],
        ["a", "+b", "+c", "+d"],
        ["x" * 400, "+" + "y" * 400, "+" + "z" * 10],
        ["1", "", "3"],
        [str(n) for n in range(200)],
    ],
)
def test_a_message_of_few_pieces_is_forwarded_as_its_sender_split_it(pieces):
    house = irc_house("#a", alice=MULTILINE, bob=MULTILINE)
    asked(house, "alice", *batch_of(*pieces))
    assert pieces_of(heard(house, "bob")) == pieces


# Any other message is joined and split again; its text is the same
@pytest.mark.parametrize(
    "pieces",
    [
        ["a"] + ["+b"] * 199,
        ["a"] + ["+b"] * 1000,
        ["one"] + ["+" + "x" * 10] * 500,
        ["one", "two"] + ["+ x"] * 300 + ["", "last"],
    ],
)
def test_a_message_of_many_small_pieces_is_joined_and_split_again(pieces):
    house = irc_house("#a", alice=MULTILINE, bob=MULTILINE, carol="")
    asked(house, "alice", *batch_of(*pieces))
    got = pieces_of(heard(house, "bob"))
    assert joined(got) == joined(pieces)
    needed = sum(-(-max(1, len(text)) // 400) for text in joined(pieces).split("\n"))
    assert len(got) <= 4 * needed
    plain = [text for *_, text in messages_in(heard(house, "carol"))]
    assert "".join(plain) == joined(pieces).replace("\n", "") and len(plain) <= 4 * needed


# A multiline fallback must contain no empty PRIVMSG: live, echoed, in private, in
# history, and of the line protocol
@pytest.mark.parametrize(
    "pieces, expected",
    [
        (["", "two"], ["two"]),
        (["one", "", "three", ""], ["one", "three"]),
        (["", "+x"], ["x"]),
        (["", "", "+x", ""], ["x"]),
        (["one", "", "+two"], ["one", "two"]),
        (["one", "+two", "", ""], ["onetwo"]),
    ],
)
@pytest.mark.parametrize("target", ["#a", "bob"])
def test_the_fallback_of_a_message_has_no_empty_line(pieces, expected, target):
    house = irc_house("#a", alice=MULTILINE, bob="")
    asked(house, "alice", *batch_of(*pieces, target=target))
    got = [text for *_, text in messages_in(heard(house, "bob"))]
    assert "" not in got and all(text.strip() for text in got)
    # a piece that goes on with the one before it may come joined to it, or by itself
    assert "".join(got) == "".join(expected)
    talk = "#a" if target == "#a" else "alice"
    again = messages_in(asked(house, "bob", f"CHATHISTORY LATEST {talk} * 10"))
    assert [text for *_, text in again] == got


@pytest.mark.parametrize(
    "lines",
    [
        ["/lines 2", "one", ""],
        ["/lines 3", "", "", "three"],
        ["/lines 2", "\x02", "two"],
        ["/lines 2", "\r\r", "two"],
        ["\r"],
        [""],
        ["/lines 2", "", ""],
    ],
)
def test_what_netcat_says_is_no_empty_privmsg(lines):
    house = irc_house("#lobby", alice="", bob=MULTILINE)
    house.enter("dora")
    forget(house)
    house.say("dora", *lines)
    house.turn()
    assert all(text for *_, text in messages_in(heard(house, "alice")))


# Long text


LONG_TEXTS = [
    "x" * 600,
    "word " * 120,
    "\u00fc" * 300,
    "\u516c\u56ed" * 100,
    "\U0001f600" * 130,
]


def fitted(verb, target, text):
    """The text as far as its line is legal for a client: 510 bytes without a source."""
    room = 510 - len(f"{verb} {target} :".encode())
    return text.encode()[:room].decode(errors="ignore")


# Text that is too long for 512 bytes, from clients that cannot know: the line was
# legal, with its source it is too long: the receivers get it split, nothing is refused
SPLIT = [("PRIVMSG", "#a"), ("PRIVMSG", "@#a"), ("NOTICE", "#a"), ("NOTICE", "bob")]


@pytest.mark.parametrize("text, way", in_turn(LONG_TEXTS, SPLIT))
def test_text_that_is_too_long_with_its_source_is_split_and_not_refused(text, way):
    verb, target = way
    house = irc_house("#a", alice="echo-message message-tags labeled-response batch", bob="")
    asked(house, "alice", "MODE #a +o bob", f"NICK {WIDE}")
    forget(house)
    said = fitted(verb, target, text)
    echo = asked(house, "alice", f"@label=1 {verb} {target} :{said}")
    assert not of(echo, "417", "FAIL")
    lines = heard(house, "bob")
    assert len(lines) > 1 and {(x.verb, x.params[0]) for x in lines} == {(verb, target)}
    assert "".join(line.params[1] for line in lines) == said
    assert "".join(line.params[1] for line in of(echo, verb)) == said
    assert sum("label" in line.tags for line in echo) == 1


# Tags belong to one line, and a message to a user is one line: there the sender is told the limit
@pytest.mark.parametrize("start", ["PRIVMSG bob :", "@+draft/reply=x PRIVMSG #a :"])
def test_text_that_is_too_long_and_cannot_be_split_is_refused_with_the_limit(start):
    house = irc_house("#a", alice="message-tags", bob="message-tags")
    asked(house, "alice", f"NICK {WIDE}")
    forget(house)
    target = start.split()[-2]
    room = 510 - len(f":{WIDE}!~u@127.0.0.1 PRIVMSG {target} :".encode())
    assert asked(house, "alice", start + "x" * room) == []
    (answer,) = asked(house, "alice", start + "x" * (room + 1))
    assert answer.verb == "417" and str(room) in answer.params[-1]
    assert [len(line.params[1]) for line in heard(house, "bob")] == [room]


def test_a_long_action_is_split_into_actions():
    house = irc_house("#a", alice="", bob="")
    asked(house, "alice", f"NICK {WIDE}")
    forget(house)
    said = fitted("PRIVMSG", "#a", "\x01ACTION " + "x" * 500)[:-1]
    assert asked(house, "alice", f"PRIVMSG #a :{said}\x01") == []
    texts = [text for *_, text in messages_in(heard(house, "bob"))]
    assert len(texts) > 1
    assert all(text.startswith("\x01ACTION ") and text.endswith("\x01") for text in texts)
    assert sum(text.count("x") for text in texts) == said.count("x")


def test_long_text_is_one_message_for_clients_with_multiline_and_in_history():
    house = irc_house("#a", alice="", bob=f"{MULTILINE} draft/chathistory")
    asked(house, "alice", f"NICK {WIDE}")
    forget(house)
    said = fitted("PRIVMSG", "#a", "x" * 600)
    asked(house, "alice", f"PRIVMSG #a :{said}")
    live = heard(house, "bob")
    assert len(of(live, "BATCH")) == 2 and joined(pieces_of(live)) == said
    page = asked(house, "bob", "CHATHISTORY LATEST #a * 1")
    assert joined(pieces_of(page)) == said


# Other devices


SENT = [  # what the desk sends in private, and the verb of what others receive
    (["PRIVMSG bob :x"], "PRIVMSG"),
    (["NOTICE bob :x"], "NOTICE"),
    (["PRIVMSG bob :\x01ACTION x\x01"], "PRIVMSG"),
    (["@+typing=active TAGMSG bob"], "TAGMSG"),
    ([*batch_of("one", "two", target="bob")], "PRIVMSG"),
]


def four_devices():
    """alice with four devices: without, with echo-message, with znc.in/self-message, with both."""
    house = irc_house("", alice="message-tags batch draft/multiline", bob="message-tags")
    asked(house, "alice", "REGISTER * * password", "JOIN #a")
    for label, caps in (
        ("bare", ""),
        ("echo", " echo-message"),
        ("znc", " znc.in/self-message"),
        ("both", " echo-message znc.in/self-message"),
    ):
        logged_in(house, label, "alice")
        asked(house, label, f"CAP REQ :message-tags{caps}")
    asked(house, "bob", "JOIN #a")
    forget(house)
    return house


# One's own private messages from another device go only to sessions with
# echo-message or znc.in/self-message; these have the receiver as their target
@pytest.mark.parametrize("lines, verb", SENT)
def test_private_messages_from_another_device_go_to_clients_that_asked(lines, verb):
    house = four_devices()
    assert of(asked(house, "alice", *lines), verb) == []  # no echo was asked for
    received = heard(house, "bob")
    assert received and all(line.source == "alice" for line in received)
    assert heard(house, "bare") == []
    for label in ("echo", "znc", "both"):
        lines = of(heard(house, label), verb)
        assert [(x.source, *x.params) for x in lines] == [
            (x.source, *x.params) for x in of(received, verb)
        ], label


# In channels every device gets them
def test_messages_to_a_channel_from_another_device_are_for_all_devices():
    house = four_devices()
    assert asked(house, "alice", "PRIVMSG #a :x") == []
    for label in ("bare", "echo", "znc", "both"):
        assert messages_in(heard(house, label)) == [("alice", "#a", "x")]


# Znc.in/self-message is no echo for the session that sends; echo-message is
@pytest.mark.parametrize("label, count", [("bare", 0), ("znc", 0), ("echo", 1), ("both", 1)])
def test_self_message_is_no_echo_to_the_sending_session(label, count):
    house = four_devices()
    assert len(of(asked(house, label, "PRIVMSG bob :x"), "PRIVMSG")) == count


# What one sends to oneself is received by every device, as its receiver
def test_a_message_to_oneself_reaches_every_device():
    house = four_devices()
    asked(house, "alice", "PRIVMSG alice :note")
    for label in ("bare", "echo", "znc", "both"):
        assert ("alice", "alice", "note") in messages_in(heard(house, label))


# Colours


COLOURED = [
    ("\x0304,12Red\x0f Baron", "Red Baron"),
    ("\x034Red\x03 Baron", "Red Baron"),
    ("\x0304Red 5 Baron", "Red 5 Baron"),
    ("\x04ff8800Red\x04 Baron", "Red Baron"),
    ("\x02Red\x02 \x1fBaron", "Red Baron"),
    ("Red\x0399,99 Baron", "Red Baron"),
    ("\x03\x0304\x03Red Baron", "Red Baron"),
]


# Colours must be dropped from a realname together with their digits
@pytest.mark.parametrize("coloured, plain", COLOURED)
@pytest.mark.parametrize("later", [False, True])
def test_colours_go_from_a_realname_with_their_digits(coloured, plain, later):
    house = irc_house("", bob="extended-join setname")
    asked(house, "bob", "JOIN #a")
    house.connect_irc("alice")
    house.say("alice", "NICK alice", f"USER u 0 * :{'r' if later else coloured}", "JOIN #a")
    house.say("alice", *([f"SETNAME :{coloured}"] if later else []))
    house.turn()
    told = heard(house, "bob")
    shown = [line.params[-1] for line in of(told, "SETNAME" if later else "JOIN")]
    lines = asked(house, "bob", "WHOIS alice", "WHO alice", "WHO alice %r")
    shown += [line.params[-1] for line in of(lines, "311", "354")]
    shown += [line.params[-1].partition(" ")[2] for line in of(lines, "352")]
    assert shown == [plain] * 4


# Also: other text of users that is shown in the line protocol
@pytest.mark.parametrize("coloured, plain", COLOURED)
def test_colours_go_with_their_digits_from_what_netcat_is_shown(coloured, plain):
    house = irc_house("#lobby", alice="")
    asked(house, "alice", f"TOPIC #lobby :{coloured}")
    house.enter("dora")
    house.say("dora", "/topic")
    house.turn()
    assert house.heard("dora")[-1].endswith(f" {plain}")
    house.connect("fred", greeted=True)
    house.say("fred", "fred")
    house.turn()
    assert house.heard("fred")[0].split("; /help")[0].endswith(f" {plain}")
    asked(house, "alice", f"PRIVMSG #lobby :{coloured}", f"AWAY :{coloured}")
    assert [line.endswith(f" {plain}") for line in house.heard("dora")[-2:]] == [True, True]
    house.say("dora", "/history 1")
    house.turn()
    assert house.heard("dora")[0].endswith(f" {plain}")


# NEW AND RATIFIED CAPABILITIES


# The ratified name beside the draft, alike
@pytest.mark.parametrize("name", ["no-implicit-names", "draft/no-implicit-names"])
def test_no_implicit_names_is_known_by_both_names(name):
    house = irc_house("", alice=f"{name} draft/read-marker", bob="")
    assert name in drafts_and_values(house, "bob")
    asked(house, "bob", "JOIN #a", "TOPIC #a :tea")
    lines = asked(house, "alice", "JOIN #a")
    assert [line.verb for line in lines] == ["JOIN", "332", "333", "MARKREAD"]
    assert [line.verb for line in asked(house, "alice", "NAMES #a")] == ["353", "366"]
    forget(house)
    asked(house, "bob", "RENAME #a #b")
    assert not of(heard(house, "alice"), "353", "366")
    assert [x.verb for x in asked(house, "alice", f"CAP REQ -{name}", "JOIN #c")][-2:] == [
        *("353", "366")
    ]


def registration(guest):
    lines = of(socket_lines(guest, "CAP LS 302"), "CAP")
    words = [word for line in lines for word in line.params[-1].split()]
    (value,) = [w.partition("=")[2] for w in words if w.startswith("draft/account-registration")]
    return dict(one.partition("=")[::2] for one in value.split(",") if one)


# The newest values of draft/account-registration
@pytest.mark.parametrize("rules", [[], ["before-connect"], ["email-required"]])
def test_account_registration_tells_how_long_a_password_may_be(running, rules):
    server = running(register=frozenset(rules))
    values = registration(server.guest())
    assert set(values) == {*rules, "min-password-length", "max-password-length"}
    least, most = int(values["min-password-length"]), int(values["max-password-length"])
    assert 0 < least < most
    if not rules:
        for name, length, accepted in (("a", least - 1, False), ("b", least, True)):
            guest = server.guest()
            guest.enter_irc(name)
            lines = socket_lines(guest, f"REGISTER * * {'x' * length}" if length else "PING")
            assert bool(of(lines, "REGISTER")) == accepted
        if most < 450:
            guest = server.guest()
            guest.enter_irc("c")
            lines = socket_lines(guest, f"REGISTER * * {'x' * (most + 1)}")
            assert fails(lines) and not of(lines, "REGISTER")
        guest = server.guest()
        guest.enter_irc("d")
        lines = socket_lines(guest, f"REGISTER * * {'x' * min(most, 450)}")
        assert of(lines, "REGISTER")


# The parameters of FAIL REGISTER
@pytest.mark.parametrize("account", ["*", "foo"])
def test_register_without_a_nick_names_no_account(running, account):
    guest = running(register=frozenset({"before-connect"})).guest()
    guest.send("CAP LS 302\r\n")
    lines = socket_lines(guest, f"REGISTER {account} * password")
    assert fails(lines) == [("REGISTER", "NEED_NICK", ["*"])]


@pytest.mark.parametrize(
    "line, code",
    [
        ("REGISTER * * x", "WEAK_PASSWORD"),
        ("REGISTER other * password", "ACCOUNT_NAME_MUST_BE_NICK"),
        ("VERIFY alice 123", "INVALID_CODE"),
        ("VERIFY * 123", "INVALID_CODE"),  # * is one's own name
    ],
)
def test_a_refusal_of_register_or_verify_names_the_account(line, code):
    house = irc_house("", alice="")
    account = line.split()[1].replace("*", "alice")
    assert fails(asked(house, "alice", line)) == [(line.split()[0], code, [account])]


# VERIFY * is one's own name
def test_verify_with_a_star_verifies_ones_own_name(running, tmp_path):
    mail = tmp_path / "mail"
    server = running(register=frozenset({"email-required"}), sendmail=f"dd of={mail}")
    guest = server.guest()
    guest.enter_irc("alice")
    lines = socket_lines(guest, "REGISTER * a@b.example password")
    assert of(lines, "REGISTER")[0].params[:2] == ["VERIFICATION_REQUIRED", "alice"]
    text = mail.read_text().replace("=\n", "")
    code = re.search(r" is (\S+?)\.?\s*$", text)[1]
    lines = socket_lines(guest, f"VERIFY * {code}")
    assert of(lines, "VERIFY")[0].params[:2] == ["SUCCESS", "alice"] and of(lines, "900")


# The token is only for servers that let in no one without an account; this is none
def test_no_account_is_required_by_default():
    house = irc_house("", alice="")
    known = tokens(asked(house, "alice", "VERSION"))
    assert known and "draft/ACCOUNTREQUIRED" not in known


def test_the_server_announces_its_limits():
    house = irc_house("", alice="")
    known = tokens(asked(house, "alice", "VERSION"))
    assert known["SAFERATE"] == ""
    targets = dict(one.split(":") for one in known["TARGMAX"].split(","))
    assert targets["TAGMSG"] == targets["PRIVMSG"] == targets["NOTICE"]


# TAGMSG has the target limit of PRIVMSG; that it announces
def test_tagmsg_has_the_target_limit_that_it_announces():
    house = irc_house("#a", alice="message-tags echo-message", bob="message-tags")
    known = tokens(asked(house, "alice", "VERSION"))
    targets = dict(one.split(":") for one in known["TARGMAX"].split(","))
    most = int(targets["TAGMSG"])
    names = ",".join(["#a", *(f"none{n}" for n in range(most))])
    lines = asked(house, "alice", f"@+x=y TAGMSG {names}")
    assert [line.verb for line in lines] == ["407"] and heard(house, "bob") == []
    lines = asked(house, "alice", f"@+x=y TAGMSG {names.rpartition(',')[0]}")
    assert of(lines, "TAGMSG") and len(of(heard(house, "bob"), "TAGMSG")) == 1


# BURST,RATE as they are; without a limit there is nothing to announce
@pytest.mark.parametrize("flood", [(1000, 100), (300, 20), None])
def test_the_server_announces_how_fast_a_client_may_send(running, flood):
    guest = running(flood=flood).guest()
    value = tokens([parsed(line) for line in guest.enter_irc("alice")]).get("chat.py/FLOOD")
    assert (value and tuple(map(float, value.split(",")))) == flood


# Between the last 005 and 251, from the client's own source
@pytest.mark.parametrize(
    "capabilities", ["draft/whoami chghost setname", "draft/whoami chghost", ""]
)
def test_whoami_tells_a_client_its_own_realname_in_the_welcome(capabilities):
    house = irc_house("", bob="")
    assert drafts_and_values(house, "bob").get("draft/whoami") == ""
    house.connect_irc("x")
    house.say("x", "CAP LS 302", f"CAP REQ :{capabilities}", "NICK alice", "USER u 0 * :Real Name")
    house.say("x", "CAP END")
    house.turn()
    raw = house.heard("x")
    verbs = [parsed(line).verb for line in raw]
    if not capabilities:
        assert "SETNAME" not in verbs
        return
    place = verbs.index("SETNAME")
    assert verbs[place - 1] == "005" and verbs[place + 1] == "251" and verbs.count("SETNAME") == 1
    assert raw[place] == ":alice!~u@127.0.0.1 SETNAME :Real Name"


def isupport_batch(lines):
    """The lines of 005 are all in one batch; their batch lines are left out."""
    begin = opening([line for line in of(lines, "BATCH") if "draft/isupport" in str(line.params)])
    reference = begin.params[0][1:]
    assert begin.params[1:] == ["draft/isupport"]
    inside = of(lines, "005")
    assert inside and all(line.tags.get("batch") == reference for line in inside)
    assert [x.params for x in of(lines, "BATCH")][-1] == [f"-{reference}"]
    return inside


# The command, before and after the welcome, and the batch
def test_extended_isupport_tells_the_tokens_before_and_after_the_welcome():
    house = irc_house("", bob="")
    assert drafts_and_values(house, "bob").get("draft/extended-isupport") == ""
    house.connect_irc("x")
    lines = asked(house, "x", "CAP LS 302", "CAP REQ draft/extended-isupport", "ISUPPORT")
    assert not of(lines, "BATCH", "421", "451") and {x.params[0] for x in of(lines, "005")} == {"*"}
    early = tokens(lines)
    assert early == tokens(asked(house, "bob", "VERSION"))
    lines = asked(house, "x", "CAP REQ batch", "ISUPPORT")
    assert tokens(isupport_batch(lines)) == early
    lines = asked(house, "x", "NICK x", "USER u 0 * :r", "CAP END")
    assert of(lines, "001")
    if of(lines, "005"):  # the welcome may leave out what has been told
        isupport_batch(lines)
    lines = asked(house, "x", "ISUPPORT")
    assert tokens(isupport_batch(lines)) == early and {x.params[0] for x in of(lines, "005")} == {
        "x"
    }


def test_the_welcome_has_its_tokens_in_a_batch_for_clients_with_extended_isupport():
    house = House()
    house.connect_irc("x")
    house.say("x", "CAP REQ :draft/extended-isupport batch", "NICK x", "USER u 0 * :r")
    lines = asked(house, "x", "CAP END")
    isupport_batch(lines)
    verbs = [line.verb for line in lines]
    assert verbs.index("004") < verbs.index("BATCH") < verbs.index("005") < verbs.index("251")


@pytest.mark.parametrize("letters", [1, 60, 200])
def test_the_addresses_of_the_web_stand_whole_in_the_tokens(letters):
    house, url = House(), f"https://{'h' * letters}.example"
    house.site.web, house.site.folder = house.site.web._replace(url=url), "files"
    house.connect_irc("x")
    known = tokens(asked(house, "x", f"NICK {'n' * 32}", "USER u 0 * :r"))
    assert known["chat.py/WEB"] == f"{url}/" and known["draft/AUTHTOKEN"] == ""
    assert known["soju.im/FILEHOST"] == known["draft/FILEHOST"] == f"{url}/files"


# A tag on the messages of server operators, for those who asked for it
def test_messages_of_operators_have_a_tag_for_clients_that_asked():
    house = irc_house("#a", alice="", bob="draft/oper-tag message-tags", carol="message-tags")
    asked(house, "alice", "PRIVMSG #a :before", "OPER boss secret")
    asked(house, "alice", "PRIVMSG #a :as one", "NOTICE bob :in private", "MODE alice -o")
    asked(house, "alice", "PRIVMSG #a :after")
    lines = of(heard(house, "bob"), "PRIVMSG", "NOTICE")
    told = {line.params[-1]: "draft/oper" in line.tags for line in lines}
    assert told == {"before": False, "as one": True, "in private": True, "after": False}
    assert not [x for x in heard(house, "carol") if "draft/oper" in x.tags]


# Metadata


METADATA = "draft/metadata-3 batch message-tags"


# Keys that were taken are told in 770, also before a refusal
@pytest.mark.parametrize("command, numeric", [("SUB", "770"), ("UNSUB", "771")])
@pytest.mark.parametrize(
    "keys, good, bad",
    [
        ("a B$ c", ["a", "c"], ["B$"]),
        ("B$ a", ["a"], ["B$"]),
        ("a c B$", ["a", "c"], ["B$"]),
        ("B$", [], ["B$"]),
        ("a b", ["a", "b"], []),
    ],
)
def test_keys_that_were_taken_are_told_beside_those_that_were_not(
    command, numeric, keys, good, bad
):
    house = irc_house("", alice=METADATA)
    if command == "UNSUB":
        asked(house, "alice", "METADATA * SUB a b c")
    lines = asked(house, "alice", f"METADATA * {command} {keys}")
    assert [key for line in of(lines, numeric) for key in line.params[1:]] == good
    assert fails(lines) == [("METADATA", "INVALID_KEY", [key]) for key in bad]
    listed = of(asked(house, "alice", "METADATA * SUBS"), "772")
    subscribed = {key for line in listed for key in line.params[1:]}
    assert subscribed == ({"a", "b", "c"} - set(good) if command == "UNSUB" else set(good))


def offered_limit(house, who, key):
    values = drafts_and_values(house, who)["draft/metadata-3"].split(",")
    return int(dict(one.partition("=")[::2] for one in values)[key])


# At the limit, what fitted is told, and the refusal has the key and the limit
def test_the_limit_of_subscriptions_is_told_with_what_fitted():
    house = irc_house("", alice=METADATA)
    most = offered_limit(house, "alice", "max-subs")
    for n in range(most - 1):
        asked(house, "alice", f"METADATA * SUB k{n}")
    lines = asked(house, "alice", "METADATA * SUB k0 last over again")
    told = [key for line in of(lines, "770") for key in line.params[1:]]
    assert set(told) <= {"k0", "last"} and "last" in told
    # the newest text of PR 613 may have the subcommand too; key and limit stand in this order
    ((verb, code, context),) = fails(lines)
    assert (verb, code) == ("METADATA", "LIMIT_REACHED")
    assert [one for one in context if one != "SUB"] == ["over", str(most)]


# LIMIT_REACHED of SET has the target and the limit
@pytest.mark.parametrize("target", ["*", "alice", "#a"])
def test_the_limit_of_keys_is_told_with_its_number(target):
    house = irc_house("#a", alice=METADATA)
    most = offered_limit(house, "alice", "max-keys")
    asked(house, "alice", *(f"METADATA {target} SET k{n} :v" for n in range(most)))
    ((_, code, context),) = fails(asked(house, "alice", f"METADATA {target} SET over :v"))
    assert code == "LIMIT_REACHED"
    assert [one for one in context if one != "SET"] == [target, str(most)]
    assert of(asked(house, "alice", f"METADATA {target} SET k0 :w"), "761")  # no new key


# An invalid key in GET is INVALID_KEY, inside the batch and in its place
def test_a_key_that_is_none_is_refused_by_get_in_its_place():
    house = irc_house("", alice=METADATA)
    asked(house, "alice", "METADATA * SET a :1")
    lines = asked(house, "alice", "METADATA * GET a B$ c")
    begin, *inside, end = lines
    reference = begin.params[0][1:]
    assert begin.verb == end.verb == "BATCH" and begin.params[1] == "metadata"
    assert [line.verb for line in inside] == ["761", "FAIL", "766"]
    assert fails(inside) == [("METADATA", "INVALID_KEY", ["B$"])]
    assert {line.tags.get("batch") for line in inside} == {reference}


# The name that Halloy asks for, with the same value and the same effect
def test_metadata_2_is_another_name_of_metadata_3():
    house = irc_house("", bob="")
    values = drafts_and_values(house, "bob")
    assert values["draft/metadata-2"] == values["draft/metadata-3"] != ""
    house.connect_irc("x")
    house.say("x", "CAP REQ :draft/metadata-2 batch", "NICK x", "USER u 0 * :r")
    lines = asked(house, "x", "CAP END")
    assert [x.params[1:] for x in of(lines, "BATCH")][:1] == [["metadata", "x"]]
    asked(house, "x", "METADATA * SUB color", "JOIN #a")
    asked(house, "bob", "JOIN #a", "METADATA * SET color :red")
    assert [line.params[1:3] for line in of(heard(house, "x"), "761")] == [["bob", "color"]]


# Those who MONITOR a user hear of the metadata also without extended-monitor
@pytest.mark.parametrize("more", ["", " extended-monitor"])
def test_a_watched_user_s_metadata_is_told_without_a_common_channel(more):
    house = irc_house("", alice=METADATA + more, bob="")
    asked(house, "alice", "METADATA * SUB color", "MONITOR + bob")
    asked(house, "bob", "METADATA * SET color :red", "METADATA * SET other :x")
    told = [line.params[1:] for line in of(heard(house, "alice"), "761")]
    assert told == [["bob", "color", "*", "red"]]


# ISSUES OF OTHER SERVERS: what their users reported


class Line(NamedTuple):
    """One line of IRC that a client received."""

    tags: dict[str, str]
    source: str
    verb: str
    params: list[str]


def parsed(text):
    tags, text = text.rstrip("\r"), text.rstrip("\r")
    words, text = text.split(" ", 1) if text.startswith("@") else ("", text)
    tags = dict(word.partition("=")[::2] for word in words[1:].split(";") if word)
    source, text = text[1:].split(" ", 1) if text.startswith(":") else ("", text)
    head, colon, last = text.partition(" :")
    verb, *params = head.split()
    return Line(tags, source.partition("!")[0], verb, params + [last] * bool(colon))


def heard(house, who):
    """The lines of IRC that a client received since the last call."""
    return [parsed(line) for line in house.heard(who)]


def asked(house, who, *lines):
    """Send lines, end the turn, and return what this client received."""
    house.say(who, *lines)
    house.turn()
    return heard(house, who)


def forget(house):
    for who in house.guests:
        house.heard(who)


def irc_house(room, **capabilities):
    """IRC clients, by name with the capabilities that each asks for; all join the room."""
    house = House()
    house.enter_irc(*capabilities)
    for who, wanted in capabilities.items():
        house.say(who, *([f"CAP REQ :{wanted}"] if wanted else []))
        house.say(who, *([f"JOIN {room}"] if room else []))
        house.turn()
    forget(house)
    return house


def of(lines, *verbs):
    return [line for line in lines if line.verb in verbs]


def fails(lines):
    """The standard replies: verb, code, context (the words at the end are left out)."""
    return [(line.params[0], line.params[1], line.params[2:-1]) for line in of(lines, "FAIL")]


def messages_in(lines):
    """Sender, target and text of each message."""
    return [(line.source, *line.params) for line in of(lines, "PRIVMSG", "NOTICE")]


def socket_lines(guest, *lines):
    """Send lines over a socket; what was received up to the answer to a PING behind them."""
    guest.send("".join(f"{line}\r\n" for line in lines) + "PING behind\r\n")
    return [parsed(line) for line in guest.until(":behind")[:-1]]


def tokens(lines):
    """The tokens of all lines of 005."""
    words = [word for line in of(lines, "005") for word in line.params[1:-1]]
    return dict(word.partition("=")[::2] for word in words)


def drafts_and_values(house, who):
    """Return the offer of CAP LS 302: capability -> value. Several lines."""
    lines = of(asked(house, who, "CAP LS 302"), "CAP")
    return dict(word.partition("=")[::2] for line in lines for word in line.params[-1].split())


def room_for(prefix, words, room=510):
    """As many words as fit in one line behind a prefix."""
    taken = []
    for word in words:
        if len(f"{prefix}{' '.join([*taken, word])}".encode()) > room:
            break
        taken.append(word)
    return taken


LONG_SERVER = "a-server.with-a-name.of-forty.letters.org"
CLASSIC = {  # capabilities that were there before version 302, or are ratified without a value
    *("account-notify", "account-tag", "away-notify", "batch", "cap-notify", "chghost"),
    *("echo-message", "extended-join", "invite-notify", "labeled-response", "message-tags"),
    *("multi-prefix", "sasl", "server-time", "setname", "standard-replies"),
    *("userhost-in-names", "extended-monitor"),
}


# ======================================================================================
# LINE DIALECT
# ======================================================================================

A, B = "alice (127.0.0.1:50000)", "bob (127.0.0.1:50001)"

SCRIPTS = {
    "a message goes to everybody but the speaker": [
        ("alice", "hello"),
        {"bob": ["alice: hello"], "carol": ["alice: hello"]},
    ],
    "an empty line is a message": [("alice", ""), {"bob": ["alice: "], "carol": ["alice: "]}],
    "spaces are kept": [
        ("alice", "  a  b "),
        {"bob": ["alice:   a  b "], "carol": ["alice:   a  b "]},
    ],
    "two slashes say one": [
        ("alice", "//usr/bin"),
        {"bob": ["alice: /usr/bin"], "carol": ["alice: /usr/bin"]},
    ],
    "control characters do not reach netcat": [
        ("alice", "\x1b[31mred\x07\ttab"),
        {"bob": ["alice: [31mred\ttab"], "carol": ["alice: [31mred\ttab"]},
    ],
    "a line that is not UTF-8 is not broadcast": [
        ("alice", b"\xff\xfe"),
        {"alice": ["* that line is not UTF-8 text and was not delivered"]},
    ],
    "a line over the limit is refused with its number": [
        ("alice", chat.TOO_LONG),
        {"alice": ["* a line has at most 16384 bytes; it was not delivered"]},
    ],
    "a private message reaches one person": [
        ("alice", "/tell bob psst"),
        {"alice": ["* told bob: psst"], "bob": ["(private) alice: psst"]},
    ],
    "a private message finds its person in any case": [
        ("alice", "/tell BOB psst"),
        {"alice": ["* told BOB: psst"], "bob": ["(private) alice: psst"]},
    ],
    "no user of that name": [
        ("alice", "/tell zoe hi"),
        {"alice": ["* no user here is called zoe"]},
    ],
    "an action reads as one": [
        ("alice", "/me waves"),
        {"bob": ["alice: *waves*"], "carol": ["alice: *waves*"]},
    ],
    "a new name is told to those who share a channel": [
        ("alice", "/nick anna"),
        {
            "alice": ["* you are anna"],
            "bob": ["* alice is now called anna"],
            "carol": ["* alice is now called anna"],
        },
        ("alice", "hi"),
        {"bob": ["anna: hi"], "carol": ["anna: hi"]},
    ],
    "a taken name gets a number": [
        ("alice", "/nick bob"),
        {
            "alice": ["* you are bob2: bob is taken"],
            "bob": ["* alice is now called bob2"],
            "carol": ["* alice is now called bob2"],
        },
    ],
    "one's own name in another case is free": [
        ("alice", "/nick Alice"),
        {
            "alice": ["* you are Alice"],
            "bob": ["* alice is now called Alice"],
            "carol": ["* alice is now called Alice"],
        },
    ],
    "the name one has already is no news": [
        ("alice", "/nick alice"),
        {"alice": ["* you are alice"]},
    ],
    "a channel of one's own": [
        ("alice", "/join #rust"),
        {
            "alice": [
                "* you speak in #rust now",
                "* the topic of #rust is not set",
                "* #rust 1-1 of 1: @alice",
            ]
        },
        ("bob", "/join #RUST"),
        {
            "alice": [f"[#rust] {B} joined the chat!"],
            "bob": [
                "* you speak in #rust now",
                "* the topic of #rust is not set",
                "* #rust 1-2 of 2: @alice, bob",
            ],
        },
        ("bob", "hi"),
        {"alice": ["[#rust] bob: hi"]},
        ("alice", "/tell #lobby hello all"),
        {
            "alice": ["* told #lobby: hello all"],
            "bob": ["alice: hello all"],
            "carol": ["alice: hello all"],
        },
        ("bob", "/part"),
        {
            "alice": [f"[#rust] {B} left the chat!"],
            "bob": ["* you left #rust", "* you speak in #lobby now"],
        },
        ("alice", "/list"),
        {"alice": ["* #lobby (3)", "* #rust (1)"]},
    ],
    "joining twice only moves where one speaks": [
        ("alice", "/join #lobby"),
        {
            "alice": [
                "* you speak in #lobby now",
                "* the topic of #lobby is not set",
                "* #lobby 1-3 of 3: alice, bob, carol",
            ]
        },
    ],
    "a topic is set by operators": [
        ("alice", "/join #a"),
        ("bob", "/join #a"),
        {"alice": ..., "bob": ...},
        ("bob", "/topic mine"),
        {"bob": ["* only operators of #a can do that"]},
        ("alice", "/topic tea at five"),
        {
            "alice": ["* the topic of #a is: tea at five"],
            "bob": ["* alice set the topic of #a: tea at five"],
        },
        ("bob", "/topic"),
        {"bob": ["* the topic of #a is: tea at five"]},
        ("alice", "/topic " + "x" * 391),
        {"alice": ["* a topic has at most 300 bytes"]},
    ],
    "every user sets the topic of the lobby, which has no operators": [
        ("bob", "/topic lunch"),
        {
            "alice": ["* bob set the topic of #lobby: lunch"],
            "bob": ["* the topic of #lobby is: lunch"],
            "carol": ["* bob set the topic of #lobby: lunch"],
        },
    ],
    "who is in no channel is told where to go": [
        ("alice", "/part"),
        {
            "alice": ["* you left #lobby", "* you are in no channel"],
            "bob": [f"{A} left the chat!"],
            "carol": [f"{A} left the chat!"],
        },
        ("alice", "hello?"),
        {"alice": ["* you are in no channel; /join #lobby"]},
        ("alice", "/topic"),
        {"alice": ["* you are in no channel; /join #lobby"]},
    ],
    "a channel one is not in": [
        ("bob", "/join #a"),
        {"bob": ...},
        ("alice", "/tell #a hi"),
        {"alice": ["* you are not in #a; /join #a first"]},
        ("alice", "/history #a"),
        {"alice": ["* you are not in #a; /join #a first"]},
        ("alice", "/part #a"),
        {"alice": ["* you are not in #a; /join #a first"]},
        ("alice", "/names #a"),
        {"alice": ["* #a 1-1 of 1: @bob"]},
        ("alice", "/names #nowhere"),
        {"alice": ["* there is no channel #nowhere now"]},
    ],
    "channel names that are none": [
        ("alice", "/join rust"),
        {"alice": ["* a channel's name begins with # and goes on, like #tea"]},
        ("alice", "/join #"),
        {"alice": ["* a channel's name begins with # and goes on, like #tea"]},
        (
            "alice",
            "/join #a,b",
            "/join #a]",
            "/join #\uff0c",
            "/join #\u0301",
            "/join #\u3164",
        ),
        {"alice": ["* a channel's name is visible, without spaces, commas or ]"] * 5},
        ("alice", "/join #" + "x" * 64),
        {"alice": ["* a channel's name has at most 64 bytes"]},
    ],
    "several lines as one message": [
        ("alice", "/lines 3", "one", "/two", ""),
        {
            "bob": ["alice: one", "alice: /two", "alice: "],
            "carol": ["alice: one", "alice: /two", "alice: "],
        },
        ("alice", "after"),
        {"bob": ["alice: after"], "carol": ["alice: after"]},
    ],
    "a count of lines that is none": [
        ("alice", "/lines many", "/lines 0", "/lines " + "9" * 5000, "/lines 201", "/quit"),
        {"alice": ["* a message has 1 to 200 lines"] * 4},
    ],
    "a message of several lines with a bad one is none, and neither is the rest of it": [
        ("alice", "/lines 3", "one", b"\xff", "/quit", "hello"),
        {
            "alice": ["* that line is not UTF-8 text and was not delivered"],
            "bob": ["alice: hello"],
            "carol": ["alice: hello"],
        },
    ],
    "white space around parameters means nothing": [
        ("alice", "/join  #lobby ", "/names #lobby  "),
        {
            "alice": [
                "* you speak in #lobby now",
                "* the topic of #lobby is not set",
                *["* #lobby 1-3 of 3: alice, bob, carol"] * 2,
            ]
        },
    ],
    "a message of several lines over the limit": [
        ("alice", "/lines 2", "x" * 10000, "x" * 10000),
        {"alice": ["* a message has at most 16384 bytes; it was not delivered"]},
    ],
    "what was said is history": [
        ("alice", "one", "/me two"),
        ("bob", "/lines 2", "three", "four"),
        {"alice": ..., "bob": ..., "carol": ...},
        ("carol", "/history"),
        {
            "carol": [
                "* WHEN alice: one",
                "* WHEN alice: *two*",
                "* WHEN bob: three",
                "* WHEN bob: four",
                "* that was 3 messages",
            ]
        },
        ("carol", "/history 1"),
        {
            "carol": [
                "* WHEN bob: three",
                "* WHEN bob: four",
                "* that was 1 message",
            ]
        },
        ("carol", "/history #lobby 501", "/history 9999999999", "/history 0"),
        {"carol": ["* history comes in 1 to 500 messages"] * 3},
    ],
    "a private talk is history for its two": [
        ("alice", "/tell bob psst"),
        {"alice": ..., "bob": ...},
        ("bob", "/history alice"),
        {"bob": ["* WHEN (private) alice: psst", "* that was 1 message"]},
        ("carol", "/history alice"),
        {"carol": ["* that was 0 messages"]},
        ("carol", "/history"),
        {"carol": ["* that was 0 messages"]},
    ],
    "commands that are none, or lack something": [
        ("alice", "/dance"),
        {"alice": ["* there is no /dance; /help lists what there is"]},
        ("alice", "/"),
        {"alice": ["* there is no /; /help lists what there is"]},
        ("alice", "/tell bob"),
        {"alice": ["* it goes like this: /tell NAME TEXT"]},
        ("alice", "/help tell"),
        {"alice": [f"* {chat.line_command['tell'].syntax}  {chat.line_command['tell'].summary}"]},
        ("alice", "/help dance"),
        {"alice": ["* there is no /dance; /help lists what there is"]},
    ],
    "leaving is told once to everybody near": [
        ("alice", "/join #a"),
        ("bob", "/join #a"),
        {"alice": ..., "bob": ...},
        ("alice", None),
        {"bob": [f"{A} left the chat!"], "carol": [f"{A} left the chat!"]},
    ],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_the_line_protocol(script):
    house = house_of("alice", "bob", "carol")
    for step in script:
        if isinstance(step, tuple):
            who, *lines = step
            house.leave(who) if lines == [None] else house.say(who, *lines)
            continue
        house.turn()
        for who in house.guests:
            heard, expected = house.heard(who), step.get(who, [])
            assert expected is ... or heard == expected, who


def test_a_newcomer_is_announced_to_the_others_and_told_nothing():
    house = House()
    for name in ("alice", "bob"):
        house.connect(name)
        house.say(name, name)
        house.turn()
    assert house.heard("alice") == [f"{B} joined the chat!"]
    assert house.heard("bob") == []


def test_a_greeted_client_is_a_person_and_is_told_the_names():
    house = House()
    house.connect("alice", greeted=True)
    house.say("alice", "alice")
    house.connect("bob", greeted=True)
    house.say("bob", "bob")
    house.turn()
    assert house.heard("alice") == [
        "* you are alice; no other user is here yet; /help",
        f"{B} joined the chat!",
    ]
    assert house.heard("bob") == ["* you are bob; here: alice; /help"]


FIRST_LINES = [
    (
        ["alice smith"],
        [
            "* you are alice_smith: names have no spaces or controls, "
            "none of !$*,./:?@ and at the start none of #%&(+-[~"
        ],
    ),
    (["BOB"], ["* you are BOB2: BOB is taken"]),
    (["", "  ", "carol"], ["* a name needs at least one visible character; try again"] * 2),
    ([b"\xff", "carol"], ["* that line is not UTF-8 text and was not delivered"]),
    (["/names", "carol"], ["* a name first, please; then commands"]),
    (
        ["/pass anything", "carol", "/pass x"],
        ["* thank you; now your name", "* you are in already"],
    ),
]


@pytest.mark.parametrize("lines, heard", FIRST_LINES)
def test_a_first_line_that_cannot_be_the_name_is_answered(lines, heard):
    house = house_of("bob")
    house.connect("x")
    house.say("x", *lines)
    house.turn()
    assert house.heard("x") == heard
    assert house.guests["x"].user


def test_a_password_comes_before_the_name_and_three_wrong_ones_end_it():
    house = House(password="open sesame")
    house.connect("a")
    house.say("a", "alice", "/pass wrong", '/pass "open sesame"', "alice")
    house.turn()
    assert house.heard("a") == [
        "* this server asks for a password: /pass WORD",
        "* that is not it (try 1 of 3)",
        "* thank you; now your name",
    ]
    assert house.guests["a"].user.name == "alice"
    house.connect("b")
    house.say("b", *["/pass wrong"] * 3)
    assert house.guests["b"].conn.closed


def test_a_client_that_gave_no_name_leaves_unannounced():
    house = house_of("alice")
    house.connect("x")
    house.leave("x")
    house.turn()
    assert house.heard("alice") == []


def test_a_crowded_channel_is_listed_in_several_lines():
    house = house_of(*(f"n{n}" for n in range(230)))
    house.say("n0", "/names")
    house.turn()
    lines = house.heard("n0")
    assert [line.split(":")[0] for line in lines] == [
        "* #lobby 1-100 of 230",
        "* #lobby 101-200 of 230",
        "* #lobby 201-230 of 230",
    ]


def test_one_user_cannot_fill_the_table_of_channels():
    house = house_of("alice")
    house.say("alice", *(f"/join #{n}" for n in range(chat.CHANNELS_A_USER)))
    house.turn()
    assert house.heard("alice")[-1] == "* 50 channels at most; /part one"
    assert len(house.hub.channels) == chat.CHANNELS_A_USER


# ======================================================================================
# WEB DIALECT
# ======================================================================================


class WebConn(FakeConn):
    """A connection that speaks HTTP, and a WebSocket after an upgrade."""

    framing, proxied = None, False
    limit_key = ""

    @property
    def host(self):
        return chat.host_of(self.reached_from).strip("[]")

    def __init__(self, house, address):
        super().__init__(house, address)
        self.reached_from = address
        self.limit_key = chat.address_key(self.host)

    def act_for(self, host, key, secure):
        self.address, self.limit_key = chat.address_text(host, 50000), key
        self.proxied, self.secure = secure is not None, bool(secure)

    def write(self, data):
        if self.framing:
            check_grammar(data)
        self.out += self.framing(data) if self.framing else data

    def upgrade(self, head, opcode):
        self.out += head
        self.framing = chat.Framing(opcode)
        self.reader = chat.FrameReader(chat.LINE_BYTES, bytes(self.reader.buffer))
        self.session.ended()
        self.session = chat.IrcSession(self.house.site, self)
        self.house.guests[self.label] = self.session


class Browser:
    """A client of the web dialect, without a socket."""

    def __init__(self, house, label="web", host="127.0.0.1"):
        self.house = house
        self.conn = WebConn(house, f"{host}:{50000 + len(house.guests)}")
        self.conn.label, self.conn.reader = label, chat.HttpReader()
        self.conn.session = house.guests[label] = chat.WebSession(house.site, self.conn)

    def sends(self, data, pieces=None):
        """Return the answer to these bytes, which come in pieces of a size."""
        size = pieces or max(1, len(data))
        for n in range(0, len(data), size):
            self.conn.reader.feed(data[n : n + size])
            while (item := self.conn.reader.take()) is not None:
                self.conn.session.receive(item)
                self.house.turn()
                while self.conn.session.has_more:
                    self.conn.session.go_on()
                    self.house.turn()
            self.conn.out, self.conn.reader.out = self.conn.out + self.conn.reader.out, b""
        self.house.turn()
        out, self.conn.out = self.conn.out, b""
        return out

    def asks(self, head, body=b""):
        """Return status, headers and body of the answer to one request."""
        data = head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body
        return parsed_answers(self.sends(data))[0]


def parsed_answers(data, heads=()):
    """Split answers; those to HEAD have no body. Each is (status, headers, body)."""
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        size = int(headers.get("content-length", 0)) if len(answers) not in heads else 0
        answers.append((int(first.split()[1]), headers, data[:size]))
        data = data[size:]
    return answers


@pytest.mark.parametrize(("head", "status"), HEADS)
def test_a_request_has_the_right_status(head, status):
    answer = Browser(House()).asks(head)
    assert answer[0] == status
    assert "nosniff" in answer[1]["x-content-type-options"] and "date" in answer[1]


CLOSED_BEHIND = [  # a request, and whether the connection is closed behind its answer
    ("GET / HTTP/1.1\nHost: localhost", False),
    ("GET / HTTP/1.1\nHost: localhost\nConnection: close", True),
    ("GET / HTTP/1.1\nHost: localhost\nConnection: Keep-Alive, CLOSE", True),
    ("GET / HTTP/1.0", True),
    ("GET / HTTP/1.0\nConnection: keep-alive", False),
    ("GET /nothing HTTP/1.1\nHost: localhost", False),
    ("GET / HTTP/1.1", True),  # a bad one
    ("POST / HTTP/1.1\nHost: localhost\nContent-Length: 100000000", True),
    ("POST / HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked", True),
]


@pytest.mark.parametrize(("head", "closed"), CLOSED_BEHIND)
def test_a_connection_is_kept_as_the_client_and_the_request_allow(head, closed):
    browser = Browser(House())
    _, headers, _ = browser.asks(head)
    assert browser.conn.closed is closed
    assert (headers.get("connection") == "close") is closed


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_pipelined_requests_are_answered_in_order_however_they_are_cut(size):
    request = b"%s %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    data = b"\r\n".join(
        (
            request % (b"GET", b"/health", b""),  # and an empty line behind it
            request % (b"HEAD", b"/health", b""),
            request % (b"POST", b"/health", b"Content-Length: 5\r\n") + b"GET /",
            request % (b"GET", b"/nothing", b""),
        )
    )
    answers = parsed_answers(Browser(House()).sends(data, size), heads=(1,))
    assert [status for status, *_ in answers] == [200, 200, 405, 404]
    assert answers[0][2] == b"ok\n" and int(answers[1][1]["content-length"]) == 3


BODIES = [  # chunks as they are sent, and the body or the status that they make
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5;a=b\r\nhello\r\n1 \r\n!\r\n0\r\nTrailer: x\r\n\r\n", b"hello!"),
    (b"5\nhello\n0\n\n", 400),  # a LF alone ends no line of these
    (b"5;\nhello\r\n0\r\n\r\n", 400),
    (b"0\r\n\r\n", b""),
    (b"g\r\n", 400),
    (b"\r\n", 400),
    (b"-1\r\n", 400),
    (b"5\r\nhello!\r\n", 400),
    (b"5\r\nhelloXX0\r\n\r\n", 400),
    (b"1" * 20 + b"\r\n", 400),
    (b"5;" + b"a" * 300 + b"\r\n", 400),
    (b"0\r\n" + b"a" * 5000, 400),
]


@pytest.mark.parametrize(("chunks", "wanted"), BODIES)
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_chunks_make_a_body_however_they_are_cut(chunks, wanted, size):
    reader = chat.HttpReader()
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    items = []
    for n in range(0, len(data), size):
        reader.feed(data[n : n + size])
        while (item := reader.take()) is not None:
            items.append(item)
    head, *pieces = items
    if isinstance(wanted, int):
        assert pieces[-1].status == wanted
    else:
        assert head.length is None and pieces[-1] == chat.END_OF_BODY
        assert b"".join(pieces) == wanted and not reader.in_body


def test_a_framer_says_that_something_is_pending_if_and_only_if_there_is(seeded):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n0123456789"
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"3\r\nabc\r\n0\r\n\r\n"
    for _ in range(50):
        reader, items = chat.HttpReader(), []
        data = head + chunked + head
        while data:
            cut = seeded.randrange(1, 30)
            reader.feed(data[:cut])
            data = data[cut:]
            while reader.pending and (item := reader.take()) is not None:
                items.append(item)
        ends = [item for item in items if item == chat.END_OF_BODY]
        heads = [item for item in items if isinstance(item, chat.Request)]
        assert len(ends) == len(heads) == 3 and not reader.pending and reader.take() is None


NEAR = [  # address, header, whether it reads /health
    ("127.0.0.1", "", True),
    ("::1", "", True),
    ("127.0.0.1", "X-Forwarded-For: 1.2.3.4", False),
    ("127.0.0.1", "Forwarded: for=1.2.3.4", False),
    ("192.168.1.5", "", False),
]


@pytest.mark.parametrize(("host", "header", "allowed"), NEAR)
@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_figures_are_for_this_machine_unless_the_operator_opens_them(host, header, allowed, path):
    house = House()
    address = f"[{host}]" if ":" in host else host
    head = f"GET {path} HTTP/1.1\nHost: localhost\n{header}".rstrip()
    assert Browser(house, host=address).asks(head)[0] == (200 if allowed else 404)
    house.site.web = house.site.web._replace(open_metrics=True)
    assert Browser(house, "open", host=address).asks(head)[0] == 200


PROXIED = [  # address, headers; of the client: address, as limits count it, whether it has TLS
    ("10.0.0.2", "", ("10.0.0.2", "10.0.0.2", False)),
    ("10.0.0.2", "X-Forwarded-For: 1.2.3.4", ("1.2.3.4", "1.2.3.4", False)),
    ("10.0.0.2", "X-Forwarded-For: 127.0.0.1, 1.2.3.4", ("1.2.3.4", "1.2.3.4", False)),
    ("10.0.0.2", "X-Forwarded-For: 9.9.9.9\nX-Forwarded-For: 1.2.3.4", ("1.2.3.4",) * 2 + (False,)),
    ("10.0.0.2", "X-Forwarded-For: 1.2.3.4:567", ("1.2.3.4", "1.2.3.4", False)),
    ("10.0.0.2", "X-Forwarded-For: ::ffff:1.2.3.4", ("1.2.3.4", "1.2.3.4", False)),
    ("10.0.0.2", "X-Forwarded-For: 2001:db8::7", ("2001:db8::7", "2001:db8::/64", False)),
    ("10.0.0.2", "X-Forwarded-For: [2001:DB8::7]:80", ("2001:db8::7", "2001:db8::/64", False)),
    (
        "10.0.0.2",
        "X-Forwarded-For: 1.2.3.4\nX-Forwarded-Proto: https",
        ("1.2.3.4", "1.2.3.4", True),
    ),
    ("10.0.0.2", "X-Forwarded-Proto: https, http", ("10.0.0.2", "a proxy at 10.0.0.2", False)),
    ("10.0.0.3", "X-Forwarded-For: 1.2.3.4", ("10.0.0.3", "a proxy at 10.0.0.3", False)),
    ("10.0.0.3", "X-Forwarded-Proto: https", ("10.0.0.3", "a proxy at 10.0.0.3", False)),
    ("127.0.0.1", "X-Forwarded-Host: a.example", ("127.0.0.1", "a proxy at 127.0.0.1", False)),
]


@pytest.mark.parametrize(("address", "headers", "expected"), PROXIED)
def test_only_a_proxy_of_web_proxy_sets_the_address_of_the_client(address, headers, expected):
    house = House()
    house.site.web = house.site.web._replace(proxies=frozenset(["10.0.0.2"]))
    browser = Browser(house, host=address)
    assert browser.asks(f"GET / HTTP/1.1\nHost: localhost\n{headers}".rstrip())[0] == 200
    conn, session = browser.conn, browser.conn.session
    assert (chat.host_of(session.address).strip("[]"), conn.limit_key, conn.secure) == expected
    assert conn.proxied is bool(headers)


def test_each_request_of_a_proxy_has_the_client_that_it_names():
    house = House()
    house.site.web = house.site.web._replace(proxies=frozenset(["10.0.0.2"]))
    browser, seen = Browser(house, host="10.0.0.2"), []
    for header in ("X-Forwarded-For: 1.2.3.4", "", "X-Forwarded-For: 1.2.3.4", "Forwarded: for=x"):
        browser.asks(f"GET / HTTP/1.1\nHost: localhost\n{header}".rstrip())
        seen.append((chat.host_of(browser.conn.session.address), browser.conn.limit_key))
    client, proxy = ("1.2.3.4", "1.2.3.4"), ("10.0.0.2", "10.0.0.2")
    assert seen == [client, proxy, client, ("10.0.0.2", "a proxy at 10.0.0.2")]


@pytest.mark.parametrize("value", ["unknown", "", "1.2.3.4, _hidden", "1.2.3", "1.2.3.4,", "[::1"])
def test_a_proxy_that_sends_no_valid_address_gets_400(value):
    house = House()
    house.site.web = house.site.web._replace(proxies=frozenset(["10.0.0.2"]))
    head = f"GET / HTTP/1.1\nHost: localhost\nX-Forwarded-For: {value}"
    status, _, body = Browser(house, host="10.0.0.2").asks(head)
    assert status == 400 and b"X-Forwarded-For" in body


def test_a_client_of_this_machine_reads_figures_also_through_a_proxy_that_was_named():
    house = House()
    house.site.web = house.site.web._replace(proxies=frozenset(["10.0.0.2"]))
    head = "GET /health HTTP/1.1\nHost: localhost\nX-Forwarded-For: "
    browser = Browser(house, host="10.0.0.2")
    assert [browser.asks(head + host)[0] for host in ("127.0.0.1", "1.2.3.4")] == [200, 404]


def test_metrics_are_in_the_usual_text_format():
    house = house_of("alice", "bob")
    status, headers, body = Browser(house).asks("GET /metrics HTTP/1.1\nHost: localhost")
    lines = body.decode().splitlines()
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "chat_users 2" in lines and "# TYPE chat_users gauge" in lines
    line = re.compile(r"# (HELP|TYPE) chat_\w+ .*|chat_\w+ \d+(\.\d+)?")
    assert all(map(line.fullmatch, lines))


HANDSHAKE = """\
GET /irc HTTP/1.1
Host: localhost:7000
Upgrade: websocket
Connection: keep-alive, Upgrade
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
Sec-WebSocket-Version: 13"""


def test_a_handshake_is_answered_as_the_rfc_has_it():
    status, headers, _ = Browser(House()).asks(HANDSHAKE)
    assert (status, headers["upgrade"]) == (101, "websocket")
    assert headers["sec-websocket-accept"] == "s3pplmbitxaq9kygzzhzrbk+xoo="  # small letters
    assert "sec-websocket-protocol" not in headers
    protocols = "\nSec-WebSocket-Protocol: other, binary.ircv3.net, text.ircv3.net"
    _, headers, _ = Browser(House()).asks(HANDSHAKE + protocols)
    assert headers["sec-websocket-protocol"] == "binary.ircv3.net"


BAD_HANDSHAKES = [  # what is changed, and the status
    ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 8", 426),
    ("Sec-WebSocket-Version: 13", "X: y", 426),
    ("dGhlIHNhbXBsZSBub25jZQ==", "short", 400),
    ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\n", "", 400),
    ("HTTP/1.1", "HTTP/1.0", 400),
    ("GET", "HEAD", 400),
    ("Connection: keep-alive, Upgrade\n", "", 426),
    ("/irc", "/other", 404),
    ("Host: localhost:7000", "Host: localhost:7000\nContent-Length: 3", 400),
    ("Host: localhost:7000", "Host: localhost:7000\nOrigin: null", 403),
    ("Host: localhost:7000", "Host: localhost:7000\nOrigin: http://evil.example", 403),
    ("Host: localhost:7000", "Host: localhost:7000\nOrigin: http://a\nOrigin: http://b", 400),
    ("Host: localhost:7000", "Host: evil.example", 421),
]


@pytest.mark.parametrize(("old", "new", "status"), BAD_HANDSHAKES)
def test_half_a_handshake_is_none(old, new, status):
    assert old in HANDSHAKE
    assert Browser(House()).asks(HANDSHAKE.replace(old, new))[0] == status


ORIGINS = [  # as a browser sends it, and whether its pages may join
    ("", True),
    ("null", False),
    ("http://localhost:3000", True),  # a page that is being made on this machine
    ("http://127.0.0.1", True),
    ("http://[::1]:8080", True),
    ("http://chat.example:7000", True),  # the Host of the request
    ("http://other.example:7000", False),
    ("https://chat.example", False),  # another port
    ("http://192.168.1.5:7000", False),  # any address may have a web server at that port
    ("https://front.example", True),  # by --web-origin
    ("https://front.example:444", False),
    ("http://front.example", False),
    ("https://evil.example", False),
    ("http://localhost.evil.example", False),
    ("file://", False),
    ("http://", False),
]


@pytest.mark.parametrize(("origin", "allowed"), ORIGINS)
def test_pages_of_other_sites_may_not_join(origin, allowed):
    web = chat.Web(
        frozenset(("localhost", "chat.example")),
        frozenset((7000,)),
        frozenset(("https://front.example",)),
    )
    assert chat.origin_allowed(web, origin, "chat.example:7000") is allowed


def client_frame(opcode, payload=b"", last=True, mask=b"\x01\x02\x03\x04", bits=0):
    size = len(payload)
    head = bytes(((0x80 if last else 0) | bits | opcode,))
    if size < 126:
        head += bytes((0x80 | size,))
    elif size < 1 << 16:
        head += bytes((0x80 | 126,)) + size.to_bytes(2, "big")
    else:
        head += bytes((0x80 | 127,)) + size.to_bytes(8, "big")
    return head + mask + chat.masked(payload, mask)


def frames_of(data):
    """Return opcode and payload of each frame of the server."""
    frames = []
    while data:
        size, start = data[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start], "big")
        frames.append((data[0], data[start : start + size]))
        data = data[start + size :]
    return frames


TEXTS = [  # frames, and the lines that they make
    ([client_frame(1, b"hello")], [b"hello"]),
    ([client_frame(2, b"caf\xe9")], [b"caf\xe9"]),
    ([client_frame(1, b"hel", last=False), client_frame(0, b"lo")], [b"hello"]),
    ([client_frame(1, b"a", False), client_frame(9, b"x"), client_frame(0, b"b")], [b"ab"]),
    ([client_frame(1, "é".encode()[:1], False), client_frame(0, "é".encode()[1:])], ["é".encode()]),
    ([client_frame(1, b"one\r\ntwo\r\n")], [b"one", b"two"]),
    ([client_frame(1, b""), client_frame(1, b"x" * 300)], [b"", b"x" * 300]),
    ([client_frame(1, b"y" * 16_384)], [b"y" * 16_384]),
    ([client_frame(10, b"unasked")], []),
]


@pytest.mark.parametrize(("frames", "lines"), TEXTS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_frames_make_lines_however_they_are_cut(frames, lines, size):
    reader, found, data = chat.FrameReader(chat.LINE_BYTES), [], b"".join(frames)
    for n in range(0, len(data), size):
        reader.feed(data[n : n + size])
        while reader.pending:
            line = reader.take()
            found += [line] * (line is not None)
    assert found == lines and not reader.closed


BAD_FRAMES = [  # frames, and the code that they are closed with
    ([chat.frame(1, b"unmasked")], 1002),
    ([client_frame(1, b"x", bits=0x40)], 1002),
    ([client_frame(3, b"x")], 1002),
    ([client_frame(11, b"x")], 1002),
    ([client_frame(9, b"x" * 126)], 1002),
    ([client_frame(9, b"x", last=False)], 1002),
    ([client_frame(0, b"x")], 1002),
    ([client_frame(1, b"x", False), client_frame(1, b"y")], 1002),
    ([client_frame(1, b"\xff")], 1007),
    ([client_frame(1, b"\xc3", False), client_frame(0, b"(")], 1007),
    ([client_frame(1, b"\xc3")], 1007),
    ([client_frame(1, b"x" * 16_385)], 1009),
    ([client_frame(1, b"x" * 16_000, False), client_frame(0, b"x" * 400)], 1009),
    ([bytes((0x81, 0xFF)) + b"\xff" * 8], 1009),
    ([client_frame(1, b"", False), *[client_frame(0, b"", False)] * 1024], 1008),
    ([client_frame(8, b"\x03")], 1002),
    ([client_frame(8, (1005).to_bytes(2, "big"))], 1002),
    ([client_frame(8, (999).to_bytes(2, "big"))], 1002),
    ([client_frame(8, (1000).to_bytes(2, "big") + b"\xff")], 1007),
    ([client_frame(8)], 1000),
    ([client_frame(8, (1001).to_bytes(2, "big") + b"bye")], 1001),
]


@pytest.mark.parametrize(("frames", "code"), BAD_FRAMES)
def test_what_no_client_may_send_ends_the_websocket_with_the_right_code(frames, code):
    reader = chat.FrameReader(chat.LINE_BYTES)
    reader.feed(b"".join(frames) + client_frame(1, b"more"))
    while reader.pending:
        assert reader.take() in (None,)
    ((opcode, payload),) = frames_of(reader.out)
    assert opcode == 0x88 and int.from_bytes(payload[:2], "big") == code
    assert reader.closed and not reader.buffer
    reader.feed(client_frame(1, b"nothing is read any more"))
    assert reader.take() is None and not reader.buffer


def test_of_many_pings_the_newest_is_answered():
    reader = chat.FrameReader(chat.LINE_BYTES)
    reader.feed(b"".join(client_frame(9, b"%d" % n) for n in range(100)))
    turns = 0
    while reader.pending:
        assert reader.take() is None
        turns += 1
    assert frames_of(reader.out) == [(0x8A, b"99")] and turns == 2  # FRAMES_AT_ONCE each


def test_a_page_and_netcat_talk_with_each_other():
    house = house_of("bob")
    page = Browser(house)
    text = "\nSec-WebSocket-Protocol: text.ircv3.net"
    page.asks(HANDSHAKE + text)
    said = [b"NICK eve", b"USER u 0 * :Eve", b"JOIN #lobby", "PRIVMSG #lobby :h\u00e9llo".encode()]
    heard = b""
    for line in said:
        heard += page.sends(client_frame(1, line))
    lines = [payload for opcode, payload in frames_of(heard)]
    assert all(opcode == 0x81 for opcode, _ in frames_of(heard))
    assert lines[0].startswith(b":chat.py 001 eve") and not any(b"\n" in line for line in lines)
    assert house.heard("bob")[-1] == "eve: h\u00e9llo"
    house.say("bob", "welcome \U0001f375")
    ((_, line),) = frames_of(page.sends(b""))
    assert line.decode().endswith("PRIVMSG #lobby :welcome \U0001f375")


def test_what_all_members_get_is_framed_once():
    framing = chat.Framing(chat.TEXT_FRAME)
    data = b":a PRIVMSG #a :x\r\n:a PRIVMSG #a :y\r\n"
    framed = framing(data)
    assert framing(data) is framed
    assert frames_of(framed) == [(0x81, b":a PRIVMSG #a :x"), (0x81, b":a PRIVMSG #a :y")]
    assert frames_of(framing(b"x\xff\r\n")) == [(0x81, b"x\xef\xbf\xbd")]  # text is UTF-8
    assert frames_of(chat.Framing(chat.BINARY_FRAME)(b"x\xff\r\n")) == [(0x82, b"x\xff")]


# Files


def says(house, label, *lines):
    house.say(label, *lines)
    house.turn()


@pytest.fixture
def files(tmp_path):
    """A server that keeps files, with the accounts alice and bob."""
    house = House()
    house.site.folder = chat.FileFolder(tmp_path / "files")
    for name in ("alice", "bob"):
        house.enter_irc(name)
        says(house, name, f"REGISTER * * secret-of-{name}", "JOIN #lobby")
        house.heard(name)
    return house


def basic(name, password=None):
    text = f"{name}:{password or f'secret-of-{name}'}"
    return f"Authorization: Basic {base64.b64encode(text.encode()).decode()}"


def posted(house, body=b"hello", *headers, name="alice", label="up"):
    """Return the answer to an upload."""
    head = ["POST /files HTTP/1.1", "Host: localhost:7000", basic(name), *headers]
    return Browser(house, label).asks("\n".join([*head, f"Content-Length: {len(body)}"]), body)


def path_of(answer):
    return answer[1]["location"].removeprefix("http://localhost:7000")


def got(house, path, *headers, method="GET"):
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    return Browser(house, "down").asks("\n".join(head))


def on_disk(house):
    return sorted(path.name for path in house.site.folder.path.iterdir())


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 640, 480) + bytes(9)


def test_a_file_goes_up_and_comes_down_as_it_was(files):
    up = posted(files, PNG, 'Content-Disposition: attachment; filename="tea.png"')
    assert up[0] == 201 and re.fullmatch(r"/files/[0-9a-f]{32}", path_of(up))
    status, headers, body = got(files, path_of(up))
    assert (status, body, headers["content-type"]) == (200, PNG, "image/png")
    assert headers["content-disposition"].startswith('inline; filename="tea.png"')
    assert headers["etag"] == f'"{hashlib.sha256(PNG).hexdigest()}"'
    assert "sandbox" in headers["content-security-policy"] and "set-cookie" not in headers
    status, headers, body = got(files, path_of(up), method="HEAD")
    assert (status, headers["content-length"], body) == (200, str(len(PNG)), b"")
    (file,) = files.hub.files.values()
    assert (file.name, file.width, file.height) == ("tea.png", 640, 480)
    again = posted(files, PNG, name="bob")  # equal content is there once
    assert on_disk(files) == [hashlib.sha256(PNG).hexdigest()]
    removed = got(files, path_of(up), basic("alice"), method="DELETE")
    assert removed[0] == 204 and got(files, path_of(up))[0] == 404
    assert got(files, path_of(again))[2] == PNG
    got(files, path_of(again), basic("bob"), method="DELETE")
    assert on_disk(files) == [] and files.hub.files == {}


@pytest.mark.parametrize(
    "line", ["NS PASSWD secret-of-alice another-secret", "NS DROP secret-of-alice"]
)
def test_a_password_that_was_right_is_not_right_for_its_connection_once_it_is_gone(files, line):
    page = Browser(files, "up")
    post = f"POST /files HTTP/1.1\nHost: localhost:7000\n{basic('alice')}\nContent-Length: 1"
    assert [page.asks(post, b"x")[0] for _ in range(2)] == [201, 201]
    assert page.conn.session.credentials
    says(files, "alice", line)
    assert page.asks(post, b"x")[0] == 401


@pytest.mark.parametrize("body", [b"", b"x", bytes(300_000), os.urandom(1_000_000)])
def test_files_of_all_sizes_arrive_whole(files, body):
    up = posted(files, body)
    assert got(files, path_of(up))[2] == body
    pieces = [piece for piece in (body[:7], body[7:]) if piece]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = f"POST /files HTTP/1.1\nHost: localhost:7000\n{basic('alice')}"
    up = Browser(files, "chunked").asks(f"{head}\nTransfer-Encoding: chunked", chunks)
    assert got(files, path_of(up))[2] == body


def test_a_client_that_asks_first_is_told_to_go_on(files):
    browser = Browser(files)
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nContent-Length: 5"
    told = browser.sends(f"{head}\nExpect: 100-continue\n\n".replace("\n", "\r\n").encode())
    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert browser.sends(b"hello").startswith(b"HTTP/1.1 201 ")
    head = head.replace(basic("alice"), basic("alice", "wrong"))
    told = browser.sends(f"{head}\nExpect: 100-continue\n\n".replace("\n", "\r\n").encode())
    assert told.startswith(b"HTTP/1.1 401 ") and b"Connection: close" in told


BAD_CREDENTIALS = [
    "X: y",
    basic("alice", "wrong"),
    basic("mallory"),
    "Authorization: Basic !!!",
    "Authorization: Basic " + base64.b64encode(b"\xff:x").decode(),
    "Authorization: Bearer 00000000000000000000000000000000",
    "Authorization: Bearer",
    "Authorization: Digest x",
]


@pytest.mark.parametrize("header", BAD_CREDENTIALS)
def test_without_the_right_credentials_nothing_is_uploaded(files, header):
    head = f"POST /files HTTP/1.1\nHost: localhost\n{header}\nContent-Length: 5"
    status, headers, _ = Browser(files).asks(head, b"hello")
    assert status == 401 and "www-authenticate" in headers
    assert on_disk(files) == [] and files.hub.files == {}


def token_of(house, name):
    says(house, name, "TOKEN GENERATE FILEHOST")
    return house.heard(name)[-1].rpartition(":")[2]


def test_a_guest_uploads_with_a_token_until_it_ends(files):
    files.enter_irc("guest")
    token = token_of(files, "guest")
    head = f"POST /files HTTP/1.1\nHost: localhost\nAuthorization: Bearer {token}"
    head += "\nContent-Length: 2"
    assert Browser(files).asks(head, b"hi")[0] == 201
    files.now += chat.TOKEN_SECONDS - 10
    files.begin_turn()
    assert Browser(files).asks(head, b"hi")[0] == 201  # it lasts while it is used
    files.now += chat.TOKEN_SECONDS - 10
    files.begin_turn()
    assert Browser(files).asks(head, b"hi")[0] == 201
    files.now += chat.TOKEN_SECONDS + 10
    files.begin_turn()
    assert Browser(files).asks(head, b"hi")[0] == 401
    head = head.replace(token, token_of(files, "guest"))
    assert Browser(files).asks(head, b"hi")[0] == 201
    files.leave("guest")  # and so does the token
    files.turn()
    assert Browser(files).asks(head, b"hi")[0] == 401
    for _ in range(20):
        token_of(files, "alice")
    assert len(files.site.grants) <= chat.TOKENS_A_USER


def tus(house, method, path, *headers, body=b"", name="alice", label="tus"):
    head = [f"{method} {path} HTTP/1.1", "Host: localhost:7000", basic(name)]
    head += ["Tus-Resumable: 1.0.0", *headers]
    if method in ("POST", "PATCH"):
        head.append(f"Content-Length: {len(body)}")
    return Browser(house, label).asks("\n".join(head), body)


PIECE = f"Content-Type: {chat.PIECE_TYPE}"


def test_an_upload_goes_on_where_it_broke_off(files):
    body, name = os.urandom(1000), base64.b64encode("täa.bin".encode()).decode()
    made = tus(files, "POST", "/files", "Upload-Length: 1000", f"Upload-Metadata: filename {name}")
    assert made[0] == 201 and "upload-expires" in made[1]
    path = path_of(made)
    assert got(files, path)[0] == 404  # until it is complete
    first = tus(files, "PATCH", path, "Upload-Offset: 0", PIECE, body=body[:400])
    assert (first[0], first[1]["upload-offset"]) == (204, "400")
    wrong = tus(files, "PATCH", path, "Upload-Offset: 300", PIECE, body=body[300:])
    assert (wrong[0], wrong[1]["upload-offset"]) == (409, "400")
    browser = Browser(files, "cut")  # the connection breaks in the middle of a piece
    head = f"PATCH {path} HTTP/1.1\nHost: x\n{basic('alice')}\nTus-Resumable: 1.0.0\n{PIECE}"
    files.site.web = files.site.web._replace(hosts=frozenset(("x", "localhost")))
    head += "\nUpload-Offset: 400\nContent-Length: 600\n\n"
    browser.sends(head.replace("\n", "\r\n").encode() + body[400:700])
    browser.conn.session.ended()
    files.turn()
    there = tus(files, "HEAD", path)
    assert (there[0], there[1]["upload-offset"], there[1]["upload-length"]) == (200, "700", "1000")
    last = tus(files, "PATCH", path, "Upload-Offset: 700", PIECE, body=body[700:])
    assert (last[0], last[1]["upload-offset"]) == (204, "1000")
    assert got(files, path)[2] == body and on_disk(files) == [hashlib.sha256(body).hexdigest()]
    assert got(files, path)[1]["content-disposition"].endswith("t%c3%a4a.bin")
    assert tus(files, "HEAD", path)[1]["upload-offset"] == "1000"


def test_an_upload_goes_on_after_a_restart(files, tmp_path):
    made = tus(files, "POST", "/files", "Upload-Length: 10", PIECE, body=b"hello")
    assert made[1]["upload-offset"] == "5"  # creation-with-upload
    rows = files.store.rows("files")
    assert len(rows) == 1
    again = chat.Files()
    again.load(rows)
    assert again == files.hub.files
    for file in again.values():
        assert file.on_disk in on_disk(files)
    files.site.folder.clean({file.on_disk for file in again.values()})
    for name in (f"{'0' * 32}.part", "0" * 64, "README", "0" * 63):
        (tmp_path / "files" / name).write_bytes(b"x")
    files.site.folder.clean({file.on_disk for file in again.values()})
    for name in ("README", "0" * 63):  # what is no content stays
        (tmp_path / "files" / name).unlink()
    assert len(on_disk(files)) == 1
    last = tus(files, "PATCH", path_of(made), "Upload-Offset: 5", PIECE, body=b"world")
    assert last[0] == 204 and got(files, path_of(made))[2] == b"helloworld"


BAD_TUS = [  # method, what stands behind /files, headers, status
    ("POST", "", ["Tus-Resumable: 0.2.2", "Upload-Length: 5"], 412),
    ("POST", "", ["Upload-Length: -5"], 400),
    ("POST", "", ["X: y"], 400),
    ("POST", "", ["Upload-Defer-Length: 1"], 400),
    ("POST", "", ["Upload-Length: 999999999999"], 413),
    ("POST", "", ["Upload-Length: 5", "Upload-Metadata: filename !!!"], 400),
    ("PATCH", "/" + "0" * 32, ["Upload-Offset: 0", PIECE], 404),
    ("PATCH", "/OWN", ["Upload-Offset: 0"], 415),
    ("PATCH", "/OWN", [PIECE], 400),
    ("PATCH", "/OWN", ["Upload-Offset: x", PIECE], 400),
    ("PATCH", "/OWN", ["Upload-Offset: 1", PIECE], 409),
    ("PATCH", "/OTHERS", ["Upload-Offset: 0", PIECE], 403),
    ("PATCH", "/DONE", ["Upload-Offset: 0", PIECE], 403),
    ("HEAD", "/OTHERS", [], 403),
    ("HEAD", "/" + "0" * 32, [], 404),
    ("DELETE", "/OTHERS", [], 403),
    ("DELETE", "/../etc/passwd", [], 404),
    ("GET", "/%00", [], 404),
    ("PUT", "/OWN", [], 405),
]


@pytest.mark.parametrize(("method", "path", "headers", "status"), BAD_TUS)
def test_what_tus_does_not_allow_has_the_right_status(files, method, path, headers, status):
    own = path_of(tus(files, "POST", "/files", "Upload-Length: 5"))
    others = path_of(tus(files, "POST", "/files", "Upload-Length: 5", name="bob"))
    done = path_of(posted(files))
    path = path.replace("/OWN", own[6:]).replace("/OTHERS", others[6:]).replace("/DONE", done[6:])
    before = on_disk(files)
    answer = tus(files, method, f"/files{path}", *headers)
    if "Tus-Resumable: 0.2.2" in headers:
        head = "POST /files HTTP/1.1\nHost: localhost\nTus-Resumable: 0.2.2\nContent-Length: 0"
        answer = Browser(files).asks(head)
        assert answer[1]["tus-version"] == "1.0.0"
    assert answer[0] == status and on_disk(files) == before


def test_options_tells_what_can_be_uploaded(files):
    head = "OPTIONS /files HTTP/1.1\nHost: localhost\nOrigin: https://other.example"
    status, headers, _ = Browser(files).asks(head)
    assert status == 204 and headers["tus-version"] == "1.0.0"
    assert headers["tus-extension"] == "creation,creation-with-upload,termination,expiration"
    assert headers["tus-max-size"] == str(chat.FILE_BYTES) and headers["accept-post"] == "*/*"
    assert headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in headers
    assert Browser(House()).asks("GET /files/x HTTP/1.1\nHost: localhost")[0] == 404


def test_an_upload_that_breaks_off_leaves_nothing(files):
    browser = Browser(files)
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nContent-Length: 100\n\n"
    browser.sends(head.replace("\n", "\r\n").encode() + b"half")
    assert len(on_disk(files)) == len(files.hub.files) == 1
    browser.conn.session.ended()
    files.turn()
    assert on_disk(files) == [] and files.hub.files == {}


def test_what_came_before_a_connection_broke_is_kept_also_if_it_waits_for_the_disk(files):
    path = path_of(tus(files, "POST", "/files", "Upload-Length: 1000"))
    browser = Browser(files, "cut")
    head = f"PATCH {path} HTTP/1.1\nHost: localhost\n{basic('alice')}\nTus-Resumable: 1.0.0"
    head += f"\n{PIECE}\nUpload-Offset: 0\nContent-Length: 1000\n\n"
    browser.sends(head.replace("\n", "\r\n").encode())
    browser.conn.session.receive(bytes(400))
    files.end_turn()  # the piece is given to a helper
    browser.conn.still_there = lambda: False
    browser.conn.session.ended()
    files.turn()
    assert tus(files, "HEAD", path)[1]["upload-offset"] == "400"


def test_a_piece_that_waits_is_not_written_behind_those_of_a_newer_connection(files):
    folder = files.site.folder
    older = folder.begin("0" * 32)
    folder.append(older, b"hello")
    newer, at = folder.reopen("0" * 32)
    folder.append(older, b" there")
    folder.append(newer, b" world")
    assert at == 5 and (folder.path / f"{'0' * 32}.part").read_bytes() == b"hello world"


@pytest.mark.parametrize("verb", ["HEAD", "PATCH", "DELETE"])
def test_a_request_takes_an_upload_over_from_the_connection_that_created_it(files, verb):
    slow = Browser(files, "slow")
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nTus-Resumable: 1.0.0\n{PIECE}"
    head += "\nUpload-Length: 10\nContent-Length: 20\n\n"  # its end is not seen
    slow.sends(head.replace("\n", "\r\n").encode() + b"hello" + b"world" * (verb == "HEAD"))
    (id,) = files.hub.files
    path, more = f"/files/{id}", ["Upload-Offset: 5", PIECE] * (verb == "PATCH")
    status, headers, _ = tus(files, verb, path, *more, body=b"world" * (verb == "PATCH"))
    assert slow.conn.closed and not files.site.uploading
    if verb == "DELETE":
        assert status == 204 and on_disk(files) == []
    else:
        assert status in (200, 204) and headers["upload-offset"] == "10"
        assert got(files, path)[2] == b"helloworld"


def test_a_newer_piece_ends_an_older_one(files):
    path = path_of(tus(files, "POST", "/files", "Upload-Length: 10"))
    slow = Browser(files, "slow")
    head = f"PATCH {path} HTTP/1.1\nHost: localhost\n{basic('alice')}\nTus-Resumable: 1.0.0"
    head += f"\n{PIECE}\nUpload-Offset: 0\nContent-Length: 10\n\n"
    slow.sends(head.replace("\n", "\r\n").encode() + b"hello")
    last = tus(files, "PATCH", path, "Upload-Offset: 5", PIECE, body=b"world")
    assert last[0] == 204 and slow.conn.closed
    assert got(files, path)[2] == b"helloworld" and not files.site.uploading


def test_limits_are_told_and_leave_nothing(files):
    files.hub.files.most, files.hub.files.total = 100, 400
    assert posted(files, bytes(101))[0] == 413
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nTransfer-Encoding: chunked"
    chunk = b"40\r\n" + bytes(64) + b"\r\n"
    assert Browser(files).asks(head, chunk * 2 + b"0\r\n\r\n")[0] == 413
    assert on_disk(files) == [] and files.hub.files == {}
    assert posted(files, bytes(90))[0] == 201
    full = posted(files, bytes(20), name="alice")  # a quarter for each user
    assert full[0] == 507 and b"100 bytes" in full[2]
    full = posted(files, bytes(20), name="bob")  # and for each address
    assert full[0] == 507 and b"one address" in full[2]
    assert tus(files, "POST", "/files", "Upload-Length: 101")[0] == 413


def test_a_full_disk_is_told_and_leaves_nothing(files, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(chat.OpenFile, "write", full)
    status, headers, body = posted(files, b"hello")
    assert status == 507 and b"no space left" in body
    assert on_disk(files) == [] and files.hub.files == {} and files.hub.files.finishing == set()
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda fd: full(None, None))
    assert posted(files, b"hello")[0] == 507 and files.hub.files == {}


def test_content_that_is_gone_from_disk_is_not_found(files):
    path = path_of(posted(files))
    for name in on_disk(files):
        (files.site.folder.path / name).unlink()
    assert got(files, path)[0] == 404


RANGES = [  # of a file of 10 bytes: header, status, content
    ("bytes=0-3", 206, b"0123"),
    ("bytes=4-", 206, b"456789"),
    ("bytes=-3", 206, b"789"),
    ("bytes=-99", 206, b"0123456789"),
    ("bytes=9-9", 206, b"9"),
    ("bytes=5-99", 206, b"56789"),
    ("bytes=10-", 416, b""),
    ("bytes=-0", 416, b""),
    ("bytes=99-100", 416, b""),
    ("bytes=0-1,3-4", 200, b"0123456789"),
    ("bytes=5-4", 200, b"0123456789"),
    ("bytes=", 200, b"0123456789"),
    ("bytes=-", 200, b"0123456789"),
    ("bytes=a-b", 200, b"0123456789"),
    ("lines=0-1", 200, b"0123456789"),
    ("bytes=" + "9" * 30 + "-", 200, b"0123456789"),
]


@pytest.mark.parametrize(("header", "status", "content"), RANGES)
def test_ranges_are_as_the_rfc_has_them(files, header, status, content):
    path = path_of(posted(files, b"0123456789"))
    answer = got(files, path, f"Range: {header}")
    assert answer[0] == status
    if status != 416:
        assert answer[2] == content and answer[1]["content-length"] == str(len(content))
    assert (answer[1].get("content-range", "").endswith("/10")) is (status != 200)


def test_conditions_are_heeded(files):
    path = path_of(posted(files, b"0123456789"))
    etag = got(files, path)[1]["etag"]
    for header, status in (
        (f"If-None-Match: {etag}", 304),
        (f'If-None-Match: "x", W/{etag}', 304),
        ("If-None-Match: *", 304),
        ('If-None-Match: "x"', 200),
        (f"If-Match: {etag}", 200),
        ('If-Match: "x"', 412),
        (f"Range: bytes=0-1\nIf-Range: {etag}", 206),
        ('Range: bytes=0-1\nIf-Range: "x"', 200),
        (f"Range: bytes=0-1\nIf-Range: W/{etag}", 200),  # a weak one is not strong
    ):
        assert got(files, path, header)[0] == status, header


CONTENTS = [  # first bytes, name, type
    (PNG, "a.png", "image/png"),
    (b"\xff\xd8\xff\xe0", "a.jpg", "image/jpeg"),
    (b"GIF89a....", "a.gif", "image/gif"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "a.webp", "image/webp"),
    (b"\0\0\0\x20ftypisom", "a.mp4", "video/mp4"),
    (b"%PDF-1.7", "a.pdf", "application/pdf"),
    (b"<html>", "a.shtml", "application/octet-stream"),
    ("tea ☕\n".encode(), "a.txt", "text/plain"),
    (b"<html><script>alert(1)</script>", "a.html", "application/octet-stream"),
    (b"<svg onload='x'>", "a.SVG", "application/octet-stream"),
    (b"<html>", "a.txt", "text/plain"),  # shown as it is, see nosniff
    (b"MZ\0\0", "a.exe", "application/octet-stream"),
    (b"\xff\xfe\0", "a.txt", "application/octet-stream"),
    (b"", "a", "application/octet-stream"),
]


@pytest.mark.parametrize(("head", "name", "kind"), CONTENTS)
def test_the_content_decides_what_it_is(head, name, kind):
    assert chat.content_type(head, name, True) == kind


def jpeg(width, height):
    segment = b"\xff\xe0\x00\x10" + bytes(14) + b"\xff\xff\xdb\x00\x04ab"
    frame = b"\xff\xc2\x00\x11\x08" + struct.pack(">HH", height, width) + bytes(9)
    return b"\xff\xd8" + segment + frame


PICTURES = [
    ("image/png", PNG, (640, 480)),
    ("image/png", PNG[:20], (0, 0)),
    ("image/png", PNG[:16] + b"\xff" * 8, (0, 0)),
    ("image/png", PNG[:16] + struct.pack(">II", 0, 5), (0, 0)),
    ("image/gif", b"GIF89a" + struct.pack("<HH", 3, 4), (3, 4)),
    ("image/jpeg", jpeg(1200, 900), (1200, 900)),
    ("image/jpeg", jpeg(1200, 900)[:30], (0, 0)),
    ("image/jpeg", b"\xff\xd8\xff\xe0\x00\x00" * 9, (0, 0)),
    ("image/webp", b"RIFF....WEBPVP8X....\0\0\0\0\x07\0\0\x0f\0\0", (8, 16)),
    ("image/webp", b"RIFF....WEBPVP8L....\x2f" + (7 | 15 << 14).to_bytes(4, "little"), (8, 16)),
    ("image/webp", b"RIFF....WEBPVP8 ....\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 8, 16), (8, 16)),
    ("image/webp", b"RIFF....WEBPVP8X", (0, 0)),
    ("application/pdf", b"%PDF-", (0, 0)),
]


@pytest.mark.parametrize(("kind", "head", "size"), PICTURES)
def test_pictures_tell_their_size_in_their_first_bytes(kind, head, size):
    assert tuple(chat.picture_size(kind, head)) == size


def test_junk_in_pictures_does_no_harm(seeded):
    for kind, head, _ in PICTURES:
        for _ in range(200):
            junk = bytearray(head)
            for at in seeded.choices(range(len(junk)), k=seeded.randrange(1, 4)):
                junk[at] = seeded.randrange(256)
            width, height = chat.picture_size(kind, bytes(junk[: seeded.randrange(len(junk) + 1)]))
            assert 0 <= width < 2**32 and 0 <= height < 2**32


FILE_NAMES = [
    ("tea.png", "tea.png"),
    ("../../etc/passwd", "passwd"),
    ("C:\\dir\\tea.png", "tea.png"),
    ("a\x00b\x1b[31m\u202ec.txt", "ab[31mc.txt"),
    ("CON", "_CON"),
    ("nul.txt", "_nul.txt"),
    ("aux .txt", "_aux .txt"),
    ("COM\u00b9.txt", "_COM\u00b9.txt"),
    ("CONIN$", "_CONIN$"),
    (".htaccess", "htaccess"),
    ("...", "file"),
    ("", "file"),
    ("tea.", "tea"),
    ('a"b<c>d|e?f*g:h', "a b c d e f g h"),
    ("x" * 300, "x" * 200),
    ("täa ☕.txt", "täa ☕.txt"),
]


@pytest.mark.parametrize(("given", "name"), FILE_NAMES)
def test_names_of_files_are_safe_everywhere(given, name):
    assert chat.file_name(given) == name


def test_a_message_with_a_link_tells_what_it_leads_to_and_takes_the_file_with_it(files):
    path = path_of(posted(files, PNG, 'Content-Disposition: attachment; filename="tea.png"'))
    files.enter_irc("carol")
    says(files, "carol", "CAP REQ :message-tags", "JOIN #lobby")
    says(files, "alice", "CAP REQ :message-tags draft/message-redaction echo-message batch")
    for name in ("alice", "bob", "carol"):
        files.heard(name)
    says(files, "alice", f"PRIVMSG #lobby :look http://localhost:7000{path}")
    (plain,), (tagged,), (mine,) = map(files.heard, ("bob", "carol", "alice"))
    assert f"chat.py/file={path},image/png,{len(PNG)},640,480" in tagged and "@" not in plain[:1]
    first = re.search("msgid=([^; ]+)", mine)[1]
    says(files, "alice", f"PRIVMSG bob :also {path}")
    second = re.search("msgid=([^; ]+)", files.heard("alice")[-1])[1]
    says(files, "bob", f"PRIVMSG #lobby :nice {path}")
    says(files, "alice", f"REDACT #lobby {first}")
    assert got(files, path)[0] == 200  # another message of hers still carries it
    says(files, "alice", f"REDACT bob {second}")
    assert got(files, path)[0] == 404 and on_disk(files) == []


def test_files_end_with_their_time(files):
    path = path_of(posted(files))
    part = path_of(tus(files, "POST", "/files", "Upload-Length: 5"))
    files.now += chat.UPLOAD_SECONDS + 1
    files.expire_files()
    files.turn()
    assert got(files, path)[0] == 200 and tus(files, "HEAD", part)[0] == 404
    files.now += chat.FILES_DAYS * 24 * 3600
    files.expire_files()
    files.turn()
    assert got(files, path)[0] == 404 and on_disk(files) == []


def answered(address, data):
    """Return the whole answer to a request with Connection: close."""
    with socket.create_connection(address) as web:
        web.sendall(data)
        answer = b""
        while chunk := web.recv(1 << 16):
            answer += chunk
    return answer


def test_an_upload_goes_on_after_the_server_was_killed_and_a_download_too(folder):
    body = os.urandom(2_000_000)
    with contextlib.ExitStack() as stack:
        process, address = stack.enter_context(serving("--data", folder))
        guest = Guest(address)
        guest.send("NICK alice\r\nUSER u 0 * :r\r\nREGISTER * * secret-of-alice\r\nPING x\r\n")
        while b"PONG" not in guest.line().encode():
            pass
        head = f"HTTP/1.1\r\nHost: localhost\r\n{basic('alice')}\r\nTus-Resumable: 1.0.0\r\n"
        close = f"{head}Connection: close\r\n"
        made = answered(address, f"POST /files {close}Upload-Length: {len(body)}\r\n\r\n".encode())
        path = re.search(rb"Location: http://[^/]+(/files/\w+)", made)[1].decode()
        start = f"PATCH {path} {head}{PIECE}\r\nUpload-Offset: 0\r\n"
        start += f"Content-Length: {len(body)}\r\n"
        with socket.create_connection(address) as web:
            web.sendall(f"{start}\r\n".encode() + body[:1_200_000])
            look = f"HEAD {path} {close}\r\n".encode()
            while b"Upload-Offset: 1200000" not in answered(address, look):
                time.sleep(0.01)
            process.kill()
            process.wait(PATIENCE)
        listen = chat.address_text(*address)
        process = stack.enter_context(program("server", "--listen", listen, "--data", folder))
        assert process.stdout.readline()
        assert b"Upload-Offset: 1200000" in answered(address, look)
        rest = f"PATCH {path} {close}{PIECE}\r\nUpload-Offset: 1200000\r\n"
        rest += "Content-Length: 800000\r\n\r\n"
        last = answered(address, rest.encode() + body[1_200_000:])
        assert last.startswith(b"HTTP/1.1 204 ")
        get = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        whole = answered(address, f"{get}\r\n".encode()).partition(b"\r\n\r\n")[2]
        part = answered(address, f"{get}Range: bytes=1500000-\r\n\r\n".encode())
        assert whole == body and part.partition(b"\r\n\r\n")[2] == body[1_500_000:]


# Found by other programs


def test_a_head_costs_no_more_than_its_length():
    for middle in (" " * 15_000 + "\x01", " " * 15_000 + "b", "\t a" * 5000):
        reader = chat.HttpReader(f"GET / HTTP/1.1\r\nHost: x\r\nX: a{middle}\r\n\r\n".encode())
        began = time.process_time()
        reader.take()
        assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"\n" * 250_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
        + b"X: y\r\n" * 40_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 40_000,
    ],
)
def test_much_of_little_costs_no_square_of_it(data):
    reader = chat.HttpReader(data)
    began = time.process_time()
    for _ in range(100_000):
        if reader.take() is None:
            break
    assert time.process_time() - began < 1


NOT_CHAT = [  # how a web request may begin: its lines are never said in a chat
    b"GET / HTTP/1.1 \r\nHost: x\r\n",
    b"GET\t/\tHTTP/1.1\r\n",
    b"GET / http/1.1\r\n",
    b"GET /\r\n",
    b"POST /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\nbuy now\r\n",
    b"a" * 17_000 + b"\r\nbuy now\r\n",
    b"\r\nPOST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nbuy now\r\n",
]


@pytest.mark.parametrize("data", NOT_CHAT)
def test_no_web_page_can_speak_in_a_chat(running, data):
    server = running()
    alice = server.guest("alice")
    with socket.create_connection(server.address) as page:
        page.sendall(data)
        page.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while page.recv(65536):
                pass
    alice.send("/names\n")
    assert alice.line() == "* #lobby 1-1 of 1: alice"


def test_an_empty_line_before_a_request_does_no_harm(running):
    server = running()
    for before in (b"\r\n", b"\n"):
        with socket.create_connection(server.address) as web:
            web.sendall(
                before + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            answer = b""
            while chunk := web.recv(65536):
                answer += chunk
            assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"ok\n")


AMBIGUOUS = [  # what two readers could understand in two ways
    "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\xa0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: \x85chunked\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\r\n\r\n",
    "GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("head", AMBIGUOUS)
def test_what_is_ambiguous_is_refused(head):
    (answer,) = parsed_answers(Browser(House()).sends(head.encode("latin-1")))
    assert answer[0] in (400, 421, 501)


def test_a_slow_download_is_not_cut(running, tmp_path, monkeypatch):
    """Neither by a pipelined request, nor by Connection: close, nor by the pace."""
    for name, value in (("WEB_HEAD_SECONDS", 0.2), ("SLOW_SECONDS", 0.2), ("LINGER_SECONDS", 0.2)):
        monkeypatch.setattr(chat, name, value)
    (tmp_path / "srv").mkdir()
    server, body = running(data=tmp_path / "srv"), os.urandom(4_000_000)
    guest = Guest(server.address)
    guest.send("NICK alice\r\nUSER u 0 * :r\r\nREGISTER * * secret-of-alice\r\nPING x\r\n")
    while "PONG" not in guest.line():
        pass
    head = f"POST /files HTTP/1.1\r\nHost: localhost\r\n{basic('alice')}\r\nConnection: close\r\n"
    made = answered(server.address, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    path = re.search(rb"Location: http://[^/]+(/files/\w+)", made)[1].decode()
    for more in ("Connection: close\r\n\r\n", "\r\nGET /hea"):
        with socket.socket() as web:
            web.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
            web.connect(server.address)
            web.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}".encode())
            got, began = b"", time.monotonic()
            while len(got.partition(b"\r\n\r\n")[2]) < len(body):
                chunk = web.recv(100_000)
                assert chunk, "cut"
                got += chunk
                time.sleep(0.01 if time.monotonic() - began < 0.8 else 0)
            assert got.partition(b"\r\n\r\n")[2][: len(body)] == body  # perhaps a 408 behind it


def test_a_connection_that_ends_while_a_file_is_completed_does_no_harm(files):
    browser = Browser(files)
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nContent-Length: 5\n\n"
    browser.sends(head.replace("\n", "\r\n").encode())
    browser.conn.reader.feed(b"hello")
    session = browser.conn.session
    session.receive(browser.conn.reader.take())
    files.turn()
    session.receive(chat.END_OF_BODY)
    assert files.hub.files.finishing
    session.ended()
    browser.conn.gone = True
    files.turn()
    (file,) = files.hub.files.values()
    assert file.sha and not files.hub.files.finishing and on_disk(files) == [file.sha]
    got(files, f"/files/{file.id}", basic("alice"), method="DELETE")
    assert on_disk(files) == []


def test_an_upload_whose_bytes_are_all_there_is_completed_when_it_is_asked_for(files):
    path = path_of(tus(files, "POST", "/files", "Upload-Length: 5"))
    (part,) = on_disk(files)
    (files.site.folder.path / part).write_bytes(b"hello")  # and then the server was killed
    there = tus(files, "HEAD", path)
    assert (there[0], there[1]["upload-offset"]) == (200, "5") and got(files, path)[2] == b"hello"


def test_nothing_is_done_to_a_file_that_is_just_being_completed(files):
    path = path_of(tus(files, "POST", "/files", "Upload-Length: 5"))
    files.hub.files.finishing.add(path[7:])
    assert tus(files, "PATCH", path, "Upload-Offset: 5", PIECE)[0] == 423
    assert tus(files, "DELETE", path)[0] == 423
    assert tus(files, "HEAD", path)[1]["upload-offset"] == "5"


def test_one_user_cannot_fill_the_table_of_files(files, monkeypatch):
    for _ in range(chat.UPLOADS_A_USER):
        assert tus(files, "POST", "/files", "Upload-Length: 1")[0] == 201
    assert tus(files, "POST", "/files", "Upload-Length: 1")[0] == 507
    files.hub.files.clear()
    monkeypatch.setattr(chat, "FILES_COUNT", 8)
    for body in (b"a", b"b"):
        assert posted(files, body)[0] == 201
    assert posted(files, b"c")[0] == 507


def test_a_file_of_unknown_size_has_room_made_as_it_grows(files, monkeypatch):
    monkeypatch.setattr(chat, "CHUNKS_RESERVED", 100)
    files.hub.files.most, files.hub.files.total = 1000, 2000
    head = f"POST /files HTTP/1.1\nHost: localhost\n{basic('alice')}\nTransfer-Encoding: chunked"
    chunk = b"64\r\n" + bytes(100) + b"\r\n"
    assert Browser(files).asks(head, chunk * 2 + b"0\r\n\r\n")[0] == 201
    assert [file.size for file in files.hub.files.values()] == [200]
    full = Browser(files, "more").asks(head, chunk * 9 + b"0\r\n\r\n")
    assert full[0] == 507 and len(files.hub.files) == 1


@pytest.mark.parametrize(
    "value", ["attachment; filename*=x; filename*1*=b", "x" * 100, ";;;=", "a\xffb"]
)
def test_a_broken_name_is_no_name(value):
    assert isinstance(chat.disposition_name(value), str)


def test_a_file_that_was_opened_for_no_one_is_closed(files):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for n in range(20):
        chat.OpenFile(files.site.folder.path / f"{n}.part", new=True)
    gc.collect()
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after <= before + 1


def test_the_port_of_a_chat_is_also_one_of_the_web(running):
    server = running()
    with socket.create_connection(server.address) as web:
        web.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        answers = b""
        while answers.count(b"ok\n") < 2:
            answers += web.recv(65536)
        assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
        web.sendall(HANDSHAKE.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        web.sendall(client_frame(1, b"NICK eve") + client_frame(1, b"USER u 0 * :Eve"))
        data = b""
        while b" 376 eve" not in data and b" 422 eve" not in data:
            data += web.recv(65536)
        assert data.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        web.sendall(client_frame(9, b"there?") + client_frame(8, b"\x03\xe8"))
        data = b""
        while chunk := web.recv(65536):
            data += chunk
        assert data.endswith(chat.frame(10, b"there?") + chat.close_frame(1000))


def test_clients_behind_a_proxy_are_counted_and_shown_as_themselves(running):
    server = running(web=WEB._replace(proxies=frozenset(["127.0.0.1"])), max_per_address=1)
    addresses = server.server.addresses

    def ask(web, head, host, proto="http"):
        passed = f"X-Forwarded-For: {host}\nX-Forwarded-Proto: {proto}"
        web.sendall(f"{head}\n{passed}\n\n".replace("\n", "\r\n").encode())
        return web.recv(65536)

    first, second = (socket.create_connection(server.address) for _ in range(2))
    with first, second:
        for host in ("192.0.2.7", "192.0.2.8"):  # one connection, two clients
            assert ask(first, "GET / HTTP/1.1\nHost: localhost", host).startswith(b"HTTP/1.1 200")
            assert (addresses[host].web, addresses[host].peers) == (1, 1)
        assert ask(first, HANDSHAKE, "192.0.2.7", "https").startswith(b"HTTP/1.1 101")
        refused = ask(second, HANDSHAKE, "192.0.2.7")
        assert refused.startswith(b"HTTP/1.1 503") and b"192.0.2.7" in refused
        for line in (b"NICK eve", b"USER u 0 * :Eve", b"WHOIS eve"):
            first.sendall(client_frame(1, line))
        data = b""
        while b" 318 eve" not in data:
            data += first.recv(65536)
        assert b" 311 eve eve ~u 192.0.2.7 " in data and b" 671 eve eve " in data
    for _ in range(2):  # the second connection is accepted after the end of both was seen
        with socket.create_connection(server.address) as last:
            last.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while last.recv(65536):
                pass
    known = addresses.get("192.0.2.7")
    assert known is None or known.peers == known.web == 0


def test_a_websocket_that_the_server_ends_is_closed_with_a_code(running):
    server = running()
    with socket.create_connection(server.address) as web:
        web.sendall(HANDSHAKE.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        web.sendall(client_frame(1, b"QUIT"))
        data = b""
        while chunk := web.recv(65536):
            data += chunk
        assert frames_of(data.partition(b"\r\n\r\n")[2])[-1] == (0x88, b"\x03\xe8")


def test_half_a_request_and_an_idle_connection_are_ended(running, monkeypatch):
    monkeypatch.setattr(chat, "WEB_HEAD_SECONDS", 0.2)
    monkeypatch.setattr(chat, "WEB_IDLE_SECONDS", 0.2)
    server = running()
    with socket.create_connection(server.address) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")
        data = b""
        while chunk := slow.recv(65536):
            data += chunk
        assert data.startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(server.address) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while chunk := idle.recv(65536):
            data += chunk
        assert data.endswith(b"ok\n")
    with socket.create_connection(server.address) as stopped:  # a body that stops
        stopped.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab")
        while stopped.recv(65536):
            pass


def test_connections_that_speak_http_have_a_count_of_their_own():
    limits = chat.ConnectionLimits(chat.ServerOptions(max_per_address=2))
    addresses, key = chat.Addresses(FakeLoop(0.0), None), "192.168.1.5"
    one = [addresses.enter(key) for _ in range(2)][0]
    assert limits.refusal(2, key, one).startswith("too many connections")
    assert limits.speaks_http(one, True) == "" and limits.refusal(2, key, one) == ""
    addresses.enter(key)
    assert limits.speaks_http(one, False).startswith("too many connections")  # a WebSocket is chat
    for web in (True, False, False):
        addresses.leave(one, web)
    assert not addresses and one.web == 0
    limits.close()


@pytest.mark.parametrize("size", [125, 126, 65_535, 65_536])
def test_a_frame_of_the_server_has_its_length_in_as_many_bytes_as_that_needs(size):
    data = chat.frame(chat.TEXT_FRAME, b"x" * size)
    assert frames_of(data) == [(0x80 | chat.TEXT_FRAME, b"x" * size)]
    assert len(data) - size == (2 if size < 126 else 4 if size < 65_536 else 10)


def test_a_proxy_has_as_many_connections_as_it_needs_and_its_clients_have_not():
    options = chat.ServerOptions(
        max_per_address=1, web=WEB._replace(proxies=frozenset(["10.0.0.2"]))
    )
    limits, addresses = chat.ConnectionLimits(options), chat.Addresses(FakeLoop(0.0), None)
    proxy = [addresses.enter("10.0.0.2") for _ in range(9)][0]
    assert limits.refusal(9, "10.0.0.2", proxy) == ""
    assert {limits.speaks_http(proxy, True) for _ in range(9)} == {""}
    client = [addresses.enter("192.0.2.7") for _ in range(2)][0]
    client.web = 2
    assert limits.speaks_http(client, False) == ""
    assert limits.speaks_http(client, False).startswith("too many connections from 192.0.2.7")
    limits.close()


# ======================================================================================
# FIRST LINE
# ======================================================================================


@pytest.mark.parametrize(
    "line, dialect",
    [
        (b"alice", "line"),
        (b"Nick", "line"),
        (b"nick alice", "line"),
        (b"NICKY", "line"),
        (b"QUITE", "line"),
        (b"", "line"),
        (b"\xff\xfe", "line"),
        (chat.TOO_LONG, "line"),
        (b"GET", "line"),
        (b"NICK alice", "irc"),
        (b"NICK", "irc"),
        (b"CAP LS 302", "irc"),
        (b"@label=1 PING x", "irc"),
        (b"USER a 0 * :a", "irc"),
        (b"GET / HTTP/1.1", "http"),
        (b"POST /x HTTP/1.0", "http"),
        (b"GET / HTTP/2.0", "other http"),
        (b"\xef\xbb\xbfNICK alice", "irc"),
        (b"@home", "line"),
    ],
)
def test_the_first_line_decides_the_dialect(line, dialect):
    assert chat.dialect_of(line) == dialect


# First line and greeting


HELLO = b"NICK erin\r\nUSER u 0 * :r\r\n"


# An empty first line or a BOM before an IRC command
@pytest.mark.parametrize(
    "before",
    [b"\r\n", b"\n", b"\r\n\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b"\r\n\xef\xbb\xbf"],
)
@pytest.mark.parametrize("first", [b"", b"CAP LS 302\r\nCAP END\r\n", b"@label=1 PING x\r\n"])
def test_an_empty_line_or_a_bom_before_a_command_of_irc_is_irc(running, before, first):
    guest = running().guest()
    guest.send(before + first + HELLO + b"PING end\r\n")
    lines = [parsed(line) for line in guest.until("PONG chat.py :end")]
    assert of(lines, "001")[0].params[0] == "erin"
    assert not of(lines, "421", "NOTICE", "FAIL")


@pytest.mark.parametrize("pieces", [[b"\r\n", HELLO], [b"\xef", b"\xbb\xbf", HELLO]])
def test_a_command_of_irc_may_come_after_what_stands_before_it(running, pieces):
    guest = running().guest()
    for piece in pieces:
        guest.send(piece)
    guest.send(b"PING end\r\n")
    assert of([parsed(x) for x in guest.until("PONG chat.py :end")], "001")[0].params[0] == "erin"


# Leaves the line protocol as it is: after an empty first line a name is a name
def test_a_name_after_an_empty_first_line_is_still_a_name(running):
    server = running()
    bob = server.guest("bob")
    dora = server.guest()
    dora.send(b"\ndora\n/names\n")
    assert any(line.endswith("bob, dora") for line in dora.until("1-2 of 2"))
    assert bob.line().startswith("dora (")


# A first line that ends in HTTP/ and a version is HTTP; not 1.x is 505, and closed
@pytest.mark.parametrize(
    "line, status",
    [
        (b"GET / HTTP/1.1", None),
        (b"GET / HTTP/1.0", None),
        (b"GET / HTTP/2.0", b"505"),
        (b"PRI * HTTP/2.0", b"505"),
        (b"GET / HTTP/3", b"505"),
        (b"GET / HTTP/0.9", b"505"),
        (b"POST /files HTTP/9.9", b"505"),
    ],
)
def test_a_first_line_of_another_version_of_http_is_refused_as_such(running, line, status):
    server = running()
    bob = server.guest("bob")
    guest = server.guest()
    guest.send(line + b"\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    answer = guest.rest()
    assert answer.startswith(b"HTTP/1.1 ")
    assert status is None or answer.split()[1] == status
    bob.send("/names\n")
    assert bob.line() == "* #lobby 1-1 of 1: bob"  # it was taken for no name


# The greeting must tell IRC users to ignore it: after 0.5 s of silence (a lost
# first packet is sent again after 0.2 s). This test waits for that one answer.
def test_the_greeting_comes_late_and_tells_irc_users_that_it_is_not_for_them(running):
    guest = running().guest()
    began = time.monotonic()
    text = guest.line()
    assert time.monotonic() - began >= 0.45
    line = parsed(text)
    assert line.verb == "NOTICE" and line.params[0] == "*"
    assert "IRC" in line.params[-1]
    guest.send(HELLO + b"PING end\r\n")
    assert of([parsed(line) for line in guest.until("PONG")], "001")


# ======================================================================================
# CLIENT CORE
# ======================================================================================


def shown(views):
    return [(view.kind, view.name, view.text) for view in views if view.kind != chat.PEOPLE]


def test_to_a_silent_server_the_first_bytes_are_the_name():
    core = chat.ClientCore("alice")
    core.connected()
    assert core.take_output() == b""
    core.silence()
    assert core.take_output() == b"alice\n"
    assert core.kind == chat.PLAIN


FIRST_WORDS = [
    (chat.PLAIN, b"alice\n"),
    (chat.CHAT, b"CAP LS 302\r\n"),
    (chat.IRC, b"CAP LS 302\r\nNICK alice\r\nUSER alice 0 * :alice\r\n"),  # may not answer CAP
]


@pytest.mark.parametrize("kind, first", FIRST_WORDS)
def test_what_is_known_of_a_server_is_spoken_at_once(kind, first):
    core = chat.ClientCore("alice", kind=kind)
    core.connected()
    assert core.take_output() == first


@pytest.mark.parametrize(
    "first, kind",
    [
        (chat.GREETING, chat.CHAT),
        (b":irc.example.net NOTICE * :*** Looking up\r\n", chat.IRC),
        (b"NOTICE AUTH :hi\r\n", chat.IRC),
        (b"ERROR :no\r\n", chat.IRC),
        (b"PING :12345\r\n", chat.IRC),
    ],
)
def test_an_irc_server_is_told_from_a_chat_and_never_given_a_name(first, kind):
    core = chat.ClientCore("alice")
    core.connected()
    core.feed(first)
    assert core.kind == kind
    assert core.take_output().startswith(b"CAP LS 302\r\n")


@pytest.mark.parametrize(
    "line, kind",
    [
        (chat.GREETING, chat.CHAT),
        (b":ngircd 451 * :Connection not registered\r\n", chat.IRC),
        (b":irc.example.net 421 * alice :Unknown command\r\n", chat.IRC),
        (b"ERROR :Request too long\r\n", chat.IRC),
    ],
)
def test_a_server_that_was_taken_for_a_workshop_server_is_connected_to_again(line, kind):
    core = plain_core()
    core.typed("hello")
    assert core.take_output() == b"hello\n"
    core.feed(line)
    assert (core.kind, core.redial) == (kind, True)
    core.disconnected()
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!u@h JOIN #lobby\r\n")
    assert b" hello\r\n" in core.take_output()
    core = plain_core()
    core.insists = True  # the user said --plain
    core.feed(line)
    assert (core.kind, core.redial) == (chat.PLAIN, False)


def test_a_server_that_greets_by_itself_is_a_plain_one():
    core = chat.ClientCore("alice")
    core.connected()
    assert shown(core.feed(b"Please enter your name\n")) == [("told", "", "Please enter your name")]
    assert core.take_output() == b"alice\n"


def test_being_turned_away_is_shown_and_decides_nothing():
    core = chat.ClientCore("alice")
    core.connected()
    assert shown(core.feed(b"* this server is full\n")) == [("told", "", "this server is full")]
    assert core.kind == "" and core.take_output() == b""


def plain_core():
    core = chat.ClientCore("alice", kind=chat.PLAIN)
    core.connected()
    core.take_output()
    return core


@pytest.mark.parametrize(
    "typed, sent, kinds",
    [
        ("hello", b"hello\n", ["said"]),
        ("", b"\n", ["said"]),
        ("/names", b"", ["back", "note"]),
        ("//etc/hosts", b"/etc/hosts\n", ["said"]),
        ("one\n" * 200, b"one\n" * 200 + b"\n", ["said", "said", "note"]),
        ("one\ntwo", b"one\ntwo\n", ["said"]),
    ],
)
def test_a_plain_server_gets_no_commands(typed, sent, kinds):
    core = plain_core()
    assert [view.kind for view in core.typed(typed)] == kinds
    assert core.take_output() == sent


def test_what_is_typed_while_there_is_no_connection_is_sent_later():
    core = plain_core()
    core.disconnected()
    core.typed("are you there?")
    assert core.take_output() == b""
    core.connected()
    assert core.take_output() == b"alice\nare you there?\n"
    core.disconnected()
    core.connected()
    assert core.take_output() == b"alice\n"


PLAIN_SERVER_LINES = [
    (b"bob: hi: there", ("said", "bob", "hi: there")),
    (b"bob: ", ("said", "bob", "")),
    (b"bob: * you are root", ("said", "bob", "* you are root")),
    (b"bob (127.0.0.1:1) joined the chat!", ("came", "bob", "")),
    (b"bob ([::1]:1) left the chat!", ("went", "bob", "")),
    (
        b"bob: eve (127.0.0.1:1) left the chat!",
        ("said", "bob", "eve (127.0.0.1:1) left the chat!"),
    ),
    (b"* told bob: psst", ("told", "", "* told bob: psst")),
    (b"\x1b[2Jbob: \x07\x1b]0;title\x07boo", ("said", "[2Jbob", "]0;titleboo")),
    (b"\xff\xfe", ("told", "", "\ufffd\ufffd")),
    ("bob: \u202egnp.exe".encode(), ("said", "bob", "gnp.exe")),
]


@pytest.mark.parametrize("line, view", PLAIN_SERVER_LINES)
def test_what_a_plain_server_says_becomes_views_and_steers_nothing(line, view):
    core = plain_core()
    first, *_ = core.feed(line + b"\n")
    assert (first.kind, first.name, first.text) == view
    assert (core.name, core.take_output(), core.redial) == ("alice", b"", False)


def test_a_line_too_long_is_noted_and_the_next_one_shown():
    views = plain_core().feed(b"x" * 50_000 + b"\nbob: hi\n")
    assert [view.kind for view in views if view.kind != chat.PEOPLE] == ["note", "said"]


# What a client says to servers of all sorts, and what it does with what they say

FOREIGN = r"""
=== no capabilities at all
< 421 * CAP :Unknown command
< 001 alice :Welcome
> JOIN #lobby
=== none offered
< CAP * LS :
> CAP END
=== offered in several lines, and only what is known asked for
< CAP * LS * :server-time tls something/else
< CAP * LS :message-tags batch=x
> CAP REQ :message-tags server-time batch
> CAP END
< CAP * ACK :message-tags server-time batch
=== a name that is taken
< CAP * LS :
> CAP END
< 433 * alice :Nickname is already in use
> NICK alice2
< 433 * alice2 :Nickname is already in use
> NICK alice3
< 001 alice3 :Welcome
> JOIN #lobby
=== a name that such a server does not take
< CAP * LS :
> CAP END
< 432 * alice :Erroneous nickname
> NICK alice
=== pings are answered, also before the welcome
< PING :a b
> PONG :a b
< CAP * LS :
> CAP END
< PING x
> PONG x
=== a server without echoes confirms by a PONG
< 001 alice :Welcome
> JOIN #lobby
! hello
> PRIVMSG #lobby hello
> PING sent-ID
=== lines of several lines, where that is unknown
< 001 alice :Welcome
> JOIN #lobby
! one\n\ntwo: three
> PRIVMSG #lobby one
> PRIVMSG #lobby :\s
> PRIVMSG #lobby :two: three
> PING sent-ID
=== commands
< 001 alice :Welcome
> JOIN #lobby
! /join #a word
> JOIN #a word
! /topic new topic
> TOPIC #lobby :new topic
! /topic #a
> TOPIC #a
! /names
> NAMES #lobby
! /away
> AWAY
! /away for tea
> AWAY :for tea
! /mode +o bob
> MODE #lobby +o bob
! /kick bob go now
> KICK #lobby bob :go now
! /whois bob
> WHOIS bob
! /nick al
> NICK al
! /raw TIME
> TIME
! /part
"""


def foreign_scripts():
    for script in FOREIGN.strip().split("=== ")[1:]:
        name, *lines = script.strip("\n").split("\n")
        yield pytest.param(lines, id=name)


@pytest.mark.parametrize("lines", list(foreign_scripts()))
def test_a_client_gets_on_with_every_server(lines):
    core = chat.ClientCore("alice", kind=chat.IRC, ticks=itertools.count(0, 10).__next__)
    core.connected()
    said, expected = core.take_output().decode().splitlines()[3:], []
    for line in lines:
        if line[0] == ">":
            expected.append(line[2:].replace("\\s", " "))
        else:
            assert said == expected, f"before {line}"
            said, expected = [], []
            if line[0] == "<":
                core.feed(f":irc.example {line[2:]}\r\n".encode())
            else:
                core.typed(line[2:].replace("\\n", "\n"))
            said = re.sub(r"sent-\S+", "sent-ID", core.take_output().decode()).splitlines()


JUNK = [
    b"",
    b":",
    b"@ : :",
    b":x",
    b"001",
    b":x 353 alice",
    b":x 353 alice = #lobby",
    b":x BATCH",
    b":x BATCH +",
    b":x BATCH -nothing",
    b"@batch=no :a!b@c PRIVMSG #lobby :x",
    b":x BATCH +r chathistory",
    b":x BATCH -r",
    b":alice!a@b JOIN",
    b":bob!b@c KICK #lobby",
    b":x CAP * LS",
    b":x CAP * NEW :sasl",
    b":x AUTHENTICATE +",
    b":x AUTHENTICATE !!!",
    b":x FAIL",
    b":x FAIL CHATHISTORY X y :z",
    b"@time=yesterday;msgid= :bob!b@c PRIVMSG #lobby :x",
    b":bob!b@c PRIVMSG  :x",
    b":x 005 alice PREFIX CHATHISTORY=x :are",
    b":bob!b@c RENAME #lobby #lobby",
    b":bob!b@c NICK",
    b":alice!b@c NICK :",
    b":x 999",
    b":x PONG x sent-nothing",
    b":x TAGMSG #lobby",
    b":x REGISTER SUCCESS",
    b":x MODE #lobby",
    "\u2028:x 001 \u202ealice :\x9b31m".encode(),
]


@pytest.mark.parametrize("line", JUNK)
@pytest.mark.parametrize("late", [False, True])
def test_junk_from_a_server_breaks_nothing(line, late):
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    if late:
        core.feed(b":x 001 alice :Welcome\r\n:alice!a@b JOIN #lobby\r\n")
    core.feed(line + b"\r\n")
    if late:
        assert ("said", "bob", "still here") in shown(
            core.feed(b":bob!b@c PRIVMSG #lobby :still here\r\n")
        )


def test_any_junk_at_all_breaks_nothing(seeded):
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    words = [line for line in JUNK if line] + [b":x 001 alice :Welcome", b":alice!a@b JOIN #lobby"]
    for _ in range(3000):
        line = bytearray(seeded.choice(words))
        for _ in range(seeded.randrange(3)):
            line[seeded.randrange(len(line))] = seeded.randrange(256)
        for view in core.feed(bytes(line) + b"\r\n"):
            told = (view.text + view.name + view.where).replace("\x01", "")
            assert chat.harmless(told) == told
        core.take_output()


def test_names_and_messages_cannot_steer_a_terminal():
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!a@b JOIN #lobby\r\n")
    line = ":\x1b[2Jbob!b@c PRIVMSG #lobby :\x0304red\x0f \x1b]0;x\x07\u202eevil\r\n".encode()
    assert ("said", "[2Jbob", "red ]0;xevil") in shown(core.feed(line))


# A client core joined to a server's session, back to back


class Pair:
    def __init__(self, house, name, **options):
        self.house, self.name, self.views = house, name, []
        self.connections = 0
        self.core = chat.ClientCore(
            name, kind=chat.CHAT, clock=lambda: house.now, **{"tidy": True, **options}
        )
        self.connect()

    @property
    def conn(self):
        return self.house.guests[self.label].conn

    def dial(self):
        self.connections += 1
        self.label = f"{self.name}-{self.connections}"
        self.house.connect_irc(self.label)
        self.views += self.core.connected()

    def connect(self):
        self.dial()
        self.exchange()

    def exchange(self, rounds=12):
        for _ in range(rounds):
            self.step(math.inf, math.inf)

    def step(self, up, down):
        """So many bytes are carried each way."""
        data = self.core.take_output()
        self.house.say(self.label, *data[: int(min(up, len(data)))].split(b"\r\n")[:-1])
        self.house.turn()
        data, self.conn.out = self.conn.out, b""
        self.views += self.core.feed(data[: int(min(down, len(data)))])

    def typed(self, text):
        self.views += self.core.typed(text)
        self.exchange()

    def drop(self):
        self.house.leave(self.label)
        self.house.turn()
        self.views += self.core.disconnected()

    def break_off(self, noticed):
        """The line breaks, whether or not the server has noticed, and there is a new one."""
        if noticed:
            self.drop()
        else:
            self.views += self.core.disconnected()
        self.dial()

    def said(self):
        found = [(view.where, view.name, view.text) for view in self.views if view.kind == "said"]
        self.views.clear()
        return found

    def texts(self, name):
        return [view.text for view in self.views if (view.kind, view.name) == ("said", name)]

    def found(self):
        """Return the messages of the past that were asked for."""
        found = [view.text for view in self.views if view.kind == "found"]
        self.views.clear()
        return found

    def people(self, where="#lobby"):
        return set(self.core.rooms[where].people)


def test_a_client_and_its_server_agree_who_is_here_and_what_was_said():
    house = house_of("bob")
    house.say("bob", "before", "/lines 2", "two", "lines")
    alice = Pair(house, "alice")
    assert alice.people() == {"bob", "alice"}
    assert alice.said() == [("#lobby", "bob", "before"), ("#lobby", "bob", "two\nlines")]
    alice.typed("hello\nworld")
    alice.typed("/tell bob psst")
    alice.typed("//slash")
    alice.typed("/me waves")
    assert house.heard("bob")[-5:] == [
        "alice: hello",
        "alice: world",
        "(private) alice: psst",
        "alice: /slash",
        "alice: *waves*",
    ]
    assert alice.said() == [
        ("#lobby", "alice", "hello\nworld"),
        ("bob", "alice", "psst"),
        ("#lobby", "alice", "/slash"),
        ("#lobby", "alice", "*waves*"),
    ]
    assert alice.core.outbox.waiting == {}
    house.say("bob", "/nick rob")
    house.connect("carol").receive(b"carol")
    alice.exchange()
    assert alice.people() == {"alice", "rob", "carol"}
    house.enter_irc("oper")
    house.say("oper", "OPER boss secret", "JOIN #lobby")
    alice.exchange()
    house.say("oper", "KICK #lobby carol :out")
    alice.exchange()
    assert alice.people() == {"alice", "rob", "oper"}
    house.leave("bob")
    alice.exchange()
    assert alice.people() == {"alice", "oper"}


def test_a_taken_name_is_learnt_and_another_one_remembered():
    house = house_of("alice")
    again = Pair(house, "Alice")
    assert again.core.name == "Alice2"
    again.typed("/nick anna")
    assert again.core.name == "anna"
    again.drop()
    again.connect()
    assert again.core.name == "anna"


def test_channels_are_entered_again_after_a_break_and_left_ones_are_not():
    house = house_of("bob")
    alice = Pair(house, "alice", join=["#rust", "#go secret"])
    house.say("bob", "/join #rust")
    alice.typed("hi rust")
    assert house.heard("bob")[-1] == "[#rust] alice: hi rust"
    assert alice.people("#rust") == {"bob", "alice"}
    alice.typed("/part #go")
    chat.remove_user(house.hub, house.hub.users["alice"], "gone")
    alice.drop()
    alice.connect()
    assert set(alice.core.rooms) == {"#rust"} and alice.core.here == "#rust"
    alice.typed("back")
    assert house.heard("bob")[-1] == "[#rust] alice: back"


def test_rooms_count_what_is_unread_and_what_is_for_us():
    house = house_of("bob")
    alice = Pair(house, "alice")
    alice.typed("/join #a")
    assert alice.core.here == "#a"
    house.say("bob", "hello", "alice: look", "/tell alice psst")
    alice.exchange()
    lobby, talk = alice.core.rooms["#lobby"], alice.core.rooms["bob"]
    assert (lobby.unread, lobby.called, talk.unread, talk.called) == (2, 1, 1, 1)
    alice.typed("/go lobby")
    assert (lobby.unread, lobby.called, alice.core.here) == (0, 0, "#lobby")
    alice.typed("/go bob")
    alice.typed("answer")
    assert house.heard("bob")[-1] == "(private) alice: answer"
    house.say("bob", "/nick rob")
    house.turn()
    alice.exchange()
    alice.typed("still you")
    assert house.heard("bob")[-1] == "(private) alice: still you"
    alice.typed("/part")
    assert "rob" not in alice.core.rooms and "bob" not in alice.core.rooms


def test_an_ignored_user_is_not_shown():
    house = house_of("bob")
    alice = Pair(house, "alice")
    alice.typed("/ignore Bob")
    house.say("bob", "spam")
    alice.exchange()
    assert alice.texts("bob") == []
    alice.typed("/unignore bob")
    house.say("bob", "ham")
    alice.exchange()
    assert alice.texts("bob") == ["ham"]


def test_history_is_paged_back_to_its_beginning_and_searched():
    house = house_of("bob")
    house.say("bob", *(f"line {n}" for n in range(300)))
    house.turn()
    alice = Pair(house, "alice")
    room = alice.core.rooms["#lobby"]
    while not room.whole:
        alice.core.talk.ask_history(room, "older")
        alice.exchange(2)
    said = [view.text for view in room.views]
    assert said == [f"line {n}" for n in range(300)]
    alice.said()
    alice.typed("/search 7 line")
    assert alice.found() == ["line 7"]
    alice.typed("/history 3")
    assert alice.found() == ["line 297", "line 298", "line 299"]


@pytest.mark.parametrize(
    "text", ["/tell bob one\ntwo secret", "/usr/bin/x\n/nick evil", "/nothing"]
)
def test_what_cannot_be_one_command_or_message_is_not_sent_at_all(text):
    house = house_of("bob")
    alice = Pair(house, "alice")
    house.heard("bob")
    alice.typed(text)
    assert house.heard("bob") == [] and alice.views[-1].kind == chat.NOTE


def test_what_is_refused_is_said_with_the_message_that_was_lost():
    house = house_of("bob")
    alice = Pair(house, "alice")
    alice.typed("/tell absent hello")
    (failed,) = [view for view in alice.views if view.kind == chat.FAILED]
    assert failed.text == "absent: no user here is called absent: hello"
    assert alice.core.outbox.waiting == {} and alice.core.failures == 1


def test_a_message_of_any_length_arrives_whole():
    house = house_of("bob")
    alice = Pair(house, "alice")
    text = "".join(chr(0x4E00 + n % 5000) for n in range(5000))
    alice.typed(text)
    alice.typed("a\n\n  b\n")
    bob = Pair(house, "carol")
    assert bob.said() == [("#lobby", "alice", text), ("#lobby", "alice", "a\n\n  b\n")]


def test_an_account_with_a_generated_password_is_logged_in_the_next_time():
    house = house_of()
    alice = Pair(house, "alice")
    kept = []
    alice.core.me.keep = kept.append
    alice.typed("/register")
    login = kept[-1]
    assert login.account == "alice" and len(login.password) > 20
    assert kept == [login] * 2  # before it was sent, too: the answer might have been lost
    alice.typed("/quit")
    again = Pair(house, "alice", login=login)
    assert house.hub.users["alice"].account == "alice"
    again.typed("/passwd anotherword")
    third = Pair(house, "alice", login=chat.Login("alice", "anotherword"))
    assert third.core.name == "alice" and len(house.hub.users["alice"].live) == 2


def test_a_log_in_with_the_wrong_password_is_said_and_one_is_a_guest():
    house = house_of()
    Pair(house, "alice").typed("/register sesame")
    house.guests["alice-1"].conn.close()
    bob = Pair(house, "bob", login=chat.Login("alice", "wrong"))
    notes = [view.text for view in bob.views if view.kind == chat.NOTE]
    assert len(notes) == 1 and notes[0].startswith("not logged in")
    assert bob.core.ready and house.hub.users["bob"].account == ""
    bob.typed("/login alice sesame")
    assert house.hub.users["bob"].account == "alice"


@pytest.mark.parametrize("broken", ["r=x,s=QUJD,i=4096", "r={r}z,s=QUJD,i=9999999", "i=1", "x"])
def test_a_server_that_does_not_know_the_password_is_not_believed(broken):
    login = chat.login_scram("alice", "sesame")
    next(login)
    nonce = login.send(b"").decode().partition("r=")[2]
    with pytest.raises(chat.Refused):
        login.send(broken.replace("{r}", nonce).encode())
    login = chat.login_scram("alice", "sesame")
    next(login)
    nonce = login.send(b"").decode().partition("r=")[2]
    keys = login.send(f"r={nonce}z,s=QUJD,i=4096".encode())()
    login.send(keys)
    with pytest.raises(chat.Refused):
        login.send(b"v=" + base64.b64encode(b"x" * 32))


@pytest.mark.parametrize("secure", [True, False])
def test_a_password_is_sent_in_the_clear_only_when_the_user_asks_for_it(secure):
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    core.secure = secure
    core.connected()
    core.feed(b":x CAP * LS :sasl=PLAIN\r\n")
    assert (b"AUTHENTICATE PLAIN" in core.take_output()) == secure
    core.feed(b":x CAP * ACK :sasl\r\n:x 001 alice :Welcome\r\n")
    core.take_output()
    core.typed("/login sesame")
    assert core.take_output() == b"AUTHENTICATE PLAIN\r\n"


def test_a_password_for_the_server_is_given():
    house = House(password="sesame")
    alice = Pair(house, "alice", password="sesame")
    assert "alice" in house.hub.users
    assert alice.core.ready
    bob = Pair(house, "bob", password="wrong")
    assert "missing or wrong" in bob.core.refusal or "wrong password" in bob.core.refusal


# Exactly once


@pytest.mark.parametrize("missed", [0, 1, 5, 350])
def test_after_a_break_what_was_missed_comes_in_its_order_and_once(missed):
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    house.say("bob", *(f"before {n}" for n in range(30)))
    alice.exchange()
    alice.typed("mine")
    alice.said()
    alice.drop()
    house.say("bob", *(f"missed {n}" for n in range(missed)))
    house.turn()
    alice.connect()
    house.say("bob", "after")
    alice.exchange()
    assert alice.texts("bob") == [*(f"missed {n}" for n in range(missed)), "after"]


@pytest.mark.parametrize("tidy", [True, False])
def test_after_a_restored_backup_a_client_begins_with_the_last_and_tells_of_the_gap(tidy):
    """The server does not know the id of the last message that this client has."""
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=tidy)
    house.say("bob", "known")
    alice.exchange()
    alice.drop()
    house.say("bob", "of meanwhile")
    house.turn()
    room = alice.core.rooms[chat.LOBBY]
    assert room.mark.startswith("msgid=")
    room.mark = "msgid=" + chat.MessageIds().text(77)  # of another start
    del alice.views[:]
    alice.connect()
    notes = [view.text for view in alice.views if view.kind == chat.NOTE]
    assert sum("may be missing" in text for text in notes) == 1
    assert [view.text for view in alice.views if view.text == "of meanwhile"] == ["of meanwhile"]
    house.say("bob", "after")
    alice.exchange()
    assert alice.texts("bob")[-1] == "after" and room.mark.startswith("msgid=")


def test_what_is_said_while_the_pages_are_on_their_way_waits_for_them():
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    alice.drop()
    house.say("bob", "missed")
    house.turn()
    alice.dial()
    for n in range(12):
        house.say("bob", f"live {n}")
        alice.step(math.inf, math.inf)
    alice.exchange()
    assert alice.texts("bob") == ["missed", *(f"live {n}" for n in range(12))]


def test_a_person_is_shown_the_newest_first_after_a_long_break():
    house = house_of("bob")
    alice = Pair(house, "alice")
    house.say("bob", "seen")
    alice.exchange()
    alice.drop()
    house.say("bob", *(f"missed {n}" for n in range(500)))
    house.turn()
    alice.views.clear()
    alice.connect()
    assert alice.texts("bob") == [f"missed {n}" for n in range(400, 500)]
    room = alice.core.rooms["#lobby"]
    while not room.whole:
        alice.core.talk.ask_history(room, "older")
        alice.exchange(2)
    assert [view.text for view in room.views] == ["seen", *(f"missed {n}" for n in range(500))]


def test_private_words_of_people_never_heard_of_are_caught_up_too():
    house = house_of("bob", "carol")
    alice = Pair(house, "alice", tidy=False)
    house.say("bob", "/tell alice one")
    alice.exchange()
    alice.drop()
    house.say("bob", "/tell alice two", "/tell alice three")
    house.say("carol", "/tell alice first")
    house.turn()
    alice.connect()
    house.say("carol", "/tell alice second")
    alice.exchange()
    assert alice.texts("bob") == ["one", "two", "three"]
    assert alice.texts("carol") == ["first", "second"]


def test_nothing_is_lost_or_doubled_wherever_the_line_breaks(seeded):
    """Both clients speak and listen; every exchange may carry only a part of what was said,
    and the rest is gone with the connection."""
    house = House()
    house.enter_irc("witness")
    house.say("witness", "JOIN #lobby")
    house.turn()
    pairs = {name: Pair(house, name, tidy=False) for name in ("alice", "bob")}
    house.heard("witness")
    said = dict.fromkeys(pairs, 0)
    for _ in range(150):
        for name, pair in pairs.items():
            for _ in range(seeded.randrange(4)):
                said[name] += 1
                pair.views += pair.core.say(f"{name} {said[name]}")
            if seeded.random() < 0.3:
                pair.step(seeded.randrange(400), seeded.randrange(900))
                pair.break_off(noticed=seeded.random() < 0.5)
            else:
                pair.step(math.inf, math.inf)
    for _ in range(3):
        for pair in pairs.values():
            pair.exchange()
    for name, pair in pairs.items():
        other = "bob" if name == "alice" else "alice"
        assert pair.texts(other) == [f"{other} {n + 1}" for n in range(said[other])]
        assert pair.core.outbox.waiting == {}
    heard = [line.split(" :", 1)[1] for line in house.heard("witness")]
    assert [line for line in heard if line[:5] == "alice"] == [
        f"alice {n + 1}" for n in range(said["alice"])
    ], "another user heard a join, a quit, or something twice"


def test_what_another_client_has_the_place_of_is_not_fought_for():
    house = House()
    alice = Pair(house, "alice")
    secret = alice.core.outbox.secret
    Pair(house, "again", outbox=chat.Outbox(secret=secret))
    alice.step(0, math.inf)
    assert alice.core.cause == chat.FATAL
    assert alice.core.refusal == "another client of yours has taken this place"


def test_without_receipts_what_is_in_doubt_is_told_and_not_said_again():
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!u@h JOIN #lobby\r\n")
    core.typed("one")
    core.typed("two")
    core.take_output()
    core.feed(b":x PONG x :sent-" + next(iter(core.outbox.waiting)).encode() + b"\r\n")
    views = core.disconnected()
    (view,) = [one for one in views if one.kind != chat.ROOM]
    assert view.kind == chat.FAILED
    assert view.text.startswith("the line broke: it may have arrived or not: two; /retry")
    core.typed("three")
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!u@h JOIN #lobby\r\n")
    output = core.take_output()
    assert b"three" in output and b"two" not in output
    assert [one.text for one in core.outbox.waiting.values()] == ["two", "three"]
    core.typed("/retry")
    core.feed(b":x PONG x :sent-" + list(core.outbox.waiting)[1].encode() + b"\r\n")
    assert b"two" in core.take_output()


def test_with_history_what_is_in_doubt_is_looked_for_there():
    """As on Ergo: ids come back in history, but nothing keeps us from saying a thing twice."""
    chat_caps = {"chat.py/session": chat.CAPABILITIES.pop("chat.py/session")}
    try:
        house = house_of("bob")
        alice = Pair(house, "alice")
        alice.core.typed("arrived")
        alice.step(math.inf, 0)
        alice.core.typed("lost")
        alice.core.take_output()
        house.guests[alice.label].conn.close()
        alice.views += alice.core.disconnected()
        house.turn()
        alice.connect()
    finally:
        chat.CAPABILITIES.update(chat_caps)
    assert [line for line in house.heard("bob") if "joined" not in line and "left" not in line] == [
        "alice: arrived",
        "alice: lost",
    ]
    assert alice.core.outbox.waiting == {} and alice.core.failures == 0


def test_a_question_from_one_program_to_another_opens_no_room():
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:bob!b@c PRIVMSG alice :\x01VERSION\x01\r\n")
    assert "bob" not in core.rooms


def test_what_is_held_while_pages_come_is_shown_once_however_much_it_is():
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    alice.drop()
    house.say("bob", *(f"{n}" for n in range(700)))
    house.turn()
    alice.dial()
    for n in range(700, 1500, 50):
        house.say("bob", *(f"{m}" for m in range(n, n + 50)))
        alice.step(math.inf, math.inf)
    alice.exchange()
    assert alice.texts("bob") == [f"{n}" for n in range(1500)]


def test_private_words_in_the_same_moment_as_public_ones_are_caught_up(monkeypatch):
    house = house_of("bob", "carol")
    alice = Pair(house, "alice", tidy=False)
    house.say("bob", "pub 0", "pub 1", "pub 2")
    house.say("carol", "/tell alice psst")
    data = alice.core.take_output()
    house.turn()
    lines = alice.conn.out.split(b"\r\n")
    alice.conn.out = b""
    assert data == b"" and b"psst" in lines[-2]
    alice.views += alice.core.feed(b"\r\n".join(lines[:-2]) + b"\r\n")
    alice.drop()
    alice.connect()
    assert alice.texts("bob") == ["pub 0", "pub 1", "pub 2"] and alice.texts("carol") == ["psst"]


def test_private_messages_of_a_user_who_has_left_meanwhile_are_shown():
    house = house_of("carol")
    alice = Pair(house, "alice", tidy=False)
    alice.drop()
    house.say("carol", "/tell alice two")
    house.turn()
    house.leave("carol")
    house.turn()
    alice.connect()
    assert alice.texts("carol") == ["two"]
    alice.drop()
    house.enter("dora")
    house.say("dora", "/tell alice three")
    house.turn()
    house.grace_over()  # the grace period is over, too
    house.leave("dora")
    house.turn()
    alice.connect()
    assert alice.texts("dora") == ["three"]


def test_a_channel_that_was_renamed_meanwhile_is_not_founded_again():
    house = house_of("bob")
    house.enter_irc("op")
    house.say("op", "JOIN #old")
    alice = Pair(house, "alice", join=["#old"])
    alice.drop()
    house.say("op", "RENAME #old #new :x")
    house.turn()
    alice.connect()
    assert set(house.hub.channels) == {"#lobby", "#new"}
    assert alice.core.rooms["#new"].inside and not alice.core.rooms["#old"].inside
    alice.drop()
    house.say("op", "KICK #new alice")
    house.turn()
    alice.connect()
    assert "alice" not in {user.name for user in house.hub.channels["#new"].members}


@pytest.mark.parametrize(
    "typed, why",
    [
        (f"/tell {'n' * 500} hi", "at most 64 bytes"),
        ("/part", "nowhere"),
    ],
)
def test_what_no_server_takes_is_given_back_at_once(typed, why):
    house = House()
    alice = Pair(house, "alice")
    alice.typed(typed)
    if typed == "/part":
        alice.typed("hello")
    assert alice.core.outbox.waiting == {}
    assert any(view.kind == chat.BACK for view in alice.views)
    assert any(why in view.text for view in alice.views if view.kind == chat.NOTE)


def test_words_for_services_are_in_no_outbox_and_passwords_in_no_room():
    house = House()
    alice = Pair(house, "alice")
    alice.typed("/tell NickServ IDENTIFY alice sesame")
    assert alice.core.outbox.waiting == {} and "nickserv" not in alice.core.rooms
    assert not any(
        "sesame" in view.text for room in alice.core.rooms.values() for view in room.views
    )


def test_a_log_in_that_cannot_be_had_just_now_is_waited_for():
    house = House()
    alice = Pair(house, "alice")
    alice.typed("/register sesame")
    alice.typed("/quit")
    login = chat.Login("alice", "sesame")
    again = Pair(house, "alice", login=login)
    again.drop()
    for _ in range(chat.LOGIN_TRIES):
        house.hub.accounts.throttle.failed("127.0.0.1", "alice", house.hub.ticks)
    again.connect()
    assert again.core.cause == chat.TEMPORARY and "too many" in again.core.refusal
    assert "alice2" not in house.hub.users


def test_a_password_without_proof_from_the_server_ends_the_talk():
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    core.connected()
    core.feed(b":x CAP * LS :sasl=SCRAM-SHA-256\r\n:x AUTHENTICATE +\r\n:x 903 alice :yes\r\n")
    assert core.cause == chat.FATAL and "could not prove" in core.refusal


def test_a_repeated_register_keeps_what_was_written_down(tmp_path):
    house = House()
    alice = Pair(house, "alice")
    kept = []
    alice.core.me.keep = kept.append
    alice.views += alice.core.typed("/register")
    alice.step(math.inf, 0)  # it is done, and the answer is lost
    alice.step(math.inf, 0)
    alice.drop()
    alice.connect()
    assert alice.core.me.account == "alice" and kept[-1].account == "alice"


def test_over_the_line_protocol_nothing_private_is_broadcast():
    outbox = chat.Outbox()
    outbox.add(1.0, "bob", "private", chat.MESSAGE)
    outbox.add(1.0, "#lobby", "public", chat.MESSAGE)
    core = chat.ClientCore("alice", kind=chat.PLAIN, outbox=outbox)
    core.connected()
    assert core.take_output() == b"alice\npublic\n" and len(outbox.waiting) == 1


def test_a_carriage_return_in_a_message_begins_no_command():
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!u@h JOIN #lobby\r\n")
    core.take_output()
    core.say("hello\rNICK hijacked\0")
    assert core.take_output().startswith(b"PRIVMSG #lobby :hello NICK hijacked\r\n")


# The outbox in client.db


def outbox_in(folder, name="alice", server="x:1"):
    """Begin to use an outbox, as a client of this server and name does at its start."""
    target = chat.parse_target(server)
    return chat.open_outbox(chat.open_client_file(folder), folder, target, name)


def messages_of(outbox):
    return [one.text for one in outbox.waiting.values()]


def rows_of(outbox):
    """What another program finds in the file."""
    ((_, _, path),) = outbox.rows.db.execute("PRAGMA database_list")
    return waiting_in(pathlib.Path(path).parent)


def known_servers():
    return chat.KnownServers(chat.open_client_database(":memory:"))


def test_an_outbox_outlives_its_program_with_its_secret(folder):
    outbox = outbox_in(folder)
    one = outbox.add(1.0, "#a", "one\u00fc\n", chat.MESSAGE)
    two = outbox.add(2.0, "#a", "two", chat.ACTION)
    assert outbox.save(0)
    outbox.send(two, 3.0)
    outbox.arrived(one.id)
    assert outbox.save(0) and rows_of(outbox) == ["two"]
    outbox.rows.close()
    again = outbox_in(folder)
    assert list(again.waiting.values()) == [two._replace(sent=3000)]
    assert again.secret == outbox.secret
    again.arrived(two.id)
    assert again.save(0) and rows_of(again) == []
    again.rows.close()
    for name in ("client.db", "client.lock"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_a_second_client_has_an_outbox_of_its_own(folder):
    one, two, other = outbox_in(folder), outbox_in(folder), outbox_in(folder, "bob")
    assert len({one.secret, two.secret, other.secret}) == 3
    assert (one.rows.first, two.rows.first, other.rows.first) == (True, False, True)
    for outbox in (one, two, other):
        outbox.rows.close()
    assert outbox_in(folder).secret == one.secret


def test_the_next_client_adopts_the_messages_of_all_outboxes_without_an_owner(folder):
    one, two, three = (outbox_in(folder) for _ in range(3))
    for n, outbox in enumerate((two, one, three)):
        outbox.add(1.0, "#a", f"line {n}", chat.MESSAGE)
        outbox.save(0)
    one.rows.close()
    two.rows.close()
    again = outbox_in(folder)
    assert messages_of(again) == ["line 0", "line 1"]
    assert again.secret == one.secret and again.rows.first
    assert messages_of(outbox_in(folder)) == []
    assert messages_of(three) == ["line 2"]


def test_messages_that_may_have_arrived_keep_the_secret_under_which_they_were_sent(folder):
    one, two, three = (outbox_in(folder) for _ in range(3))
    for n, outbox in enumerate((one, two, three)):
        first = outbox.add(1.0, "#a", f"line {n}", chat.MESSAGE)
        if outbox is not one:
            outbox.send(first, 1.0)
            outbox.add(1.0, "#a", f"behind {n}", chat.MESSAGE)
        outbox.save(0)
        outbox.rows.close()
    again, last = outbox_in(folder), outbox_in(folder)
    assert again.secret == two.secret and sorted(messages_of(again)) == [
        *("behind 1", "line 0", "line 1"),
    ]
    assert last.secret == three.secret and messages_of(last) == ["line 2", "behind 2"]


def test_a_lock_of_one_byte_ends_with_its_process(folder):
    path = folder / "client.lock"
    code = f"import chat, pathlib, sys; path = pathlib.Path({str(path)!r})\n"
    code += "print(bool(chat.lock_byte(path, 5)), flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code]
    end = chat.lock_byte(path, 3)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"True\n"
        assert chat.lock_byte(path, 5) is None and chat.lock_byte(path, 3) is None
        chat.lock_byte(path, 4)()
        process.kill()
        process.wait(PATIENCE)
        again = chat.lock_byte(path, 5)
        assert again is not None
        again()
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == b"True\n"
            other.communicate()
    end()
    end()
    assert path not in chat.LOCK_FILES


def fill(db):
    """Leave no room in a database, as a full disk does."""
    db.execute("CREATE TABLE filler (x)")
    db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.OperationalError):
        while True:
            db.execute("INSERT INTO filler VALUES (?)", ["x" * 500])


def test_what_a_full_disk_does_not_take_is_given_back(folder):
    outbox = outbox_in(folder)
    core = chat.ClientCore("alice", outbox=outbox)
    fill(outbox.rows.db)
    views = core.typed("important " * 1000)
    assert [(view.kind, view.text) for view in views] == [
        ("back", "important " * 1000),
        ("note", "client.db cannot be written: database or disk is full; "
         "use --data DIR, or --no-state to keep nothing; nothing was sent"),
    ]  # fmt: skip
    assert outbox.waiting == {} and rows_of(outbox) == [] and not core.room.views


def test_a_pipe_counts_what_a_full_disk_does_not_take(folder):
    outbox = outbox_in(folder)
    core = chat.ClientCore("alice", False, outbox=outbox)
    fill(outbox.rows.db)
    for n in range(5):
        core.speak(f"{n} " * 5000)
        core.flush()
    assert core.failures == 5 and outbox.waiting == {}
    assert [view.kind for view in core.take_views() if view.kind != chat.SAID] == ["note"]


def test_a_message_is_sent_once_it_is_stored_and_given_back_if_the_file_stays_locked(folder):
    outbox = outbox_in(folder)
    alice = Elsewhere(outbox=outbox)
    alice.sent(9)
    with contextlib.closing(sqlite3.connect(folder / "client.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        alice.types("hello")
        assert alice.sent(0) == [] and messages_of(outbox) == ["hello"]
        other.execute("COMMIT")
        assert "PRIVMSG #lobby hello" in alice.sent(1)
        assert rows_of(outbox) == ["hello"]
        other.execute("BEGIN IMMEDIATE")
        alice.types("more")
        assert [line for line in alice.sent(chat.LOCKED_SECONDS + 1) if "more" in line] == []
        other.execute("COMMIT")
    assert alice.kinds("back") == ["more"] and messages_of(outbox) == ["hello"]
    assert [view.text for view in alice.core.room.views if view.mine] == ["hello"]


def test_what_is_sent_waits_until_the_file_says_so(folder):
    outbox = outbox_in(folder)
    alice = Elsewhere(outbox=outbox)
    alice.sent(9)
    outbox.window = 0
    alice.types("hello")
    with contextlib.closing(sqlite3.connect(folder / "client.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        outbox.window = 1
        alice.core.flush()
        assert alice.core.take_output() == b""
        other.execute("COMMIT")
        assert b"PRIVMSG #lobby hello" in alice.core.take_output()
        ((sent,),) = other.execute("SELECT sent FROM outbox")
    assert sent > 0


def test_the_reason_why_a_message_waits_for_the_user_outlives_the_program(folder):
    alice = Elsewhere(outbox=outbox_in(folder))
    alice.hears(":op!u@h KICK #lobby alice :out")
    alice.types("hello")
    alice.core.close_store()
    again = chat.ClientCore("alice", outbox=outbox_in(folder))
    (view,) = again.take_views()
    assert (view.kind, view.text) == (
        *("failed", "you are not in #lobby: hello; /retry sends it, /cancel drops it"),
    )
    again.typed("/retry")
    again.close_store()
    outbox = outbox_in(folder)
    assert not outbox.parked and messages_of(outbox) == ["hello"]


def test_a_pipe_sends_what_a_terminal_left_to_its_user(folder):
    outbox = outbox_in(folder)
    outbox.park(outbox.add(1.0, "#lobby", "hello", chat.MESSAGE).id, "you are not in #lobby")
    outbox.save(0)
    outbox.rows.close()
    core = chat.ClientCore("alice", False, outbox=outbox_in(folder))
    assert not core.outbox.parked and messages_of(core.outbox) == ["hello"]


def waiting_in(folder):
    """What the outboxes of a folder hold."""
    with contextlib.closing(sqlite3.connect(folder / "client.db")) as db:
        return [text for (text,) in db.execute("SELECT text FROM outbox ORDER BY number")]


# Files of earlier versions


def journal_in(folder, *records, number=1, name="alice", server="x:1"):
    """Write an outbox as earlier versions did."""
    text = f"{server} {name}"
    stem = f"{re.sub('[^A-Za-z0-9.-]', '_', text)}-{zlib.crc32(text.encode()):08x}"
    (folder / "outbox").mkdir(exist_ok=True)
    path = folder / "outbox" / f"{stem}.{number}"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def say(id, text, where="#a", *rest):
    return {"say": [id, where, text, chat.MESSAGE, False, *rest]}


def test_outboxes_in_files_are_taken_over_once(folder):
    secrets = "ab" * 16, "cd" * 16
    records = {"secret": secrets[0]}, say("1", "one"), say("2", "two", "#a", "abc"), {"done": "1"}
    first = journal_in(folder, *records, {"sent": "2"}, {"at": ["2", 2]})
    second = journal_in(folder, {"secret": secrets[1]}, say("3", "three"), number=2)
    other = journal_in(folder, say("4", "four"), name="bob")
    with second.open("a") as file:
        file.write('{"say": ["torn')
    outbox = outbox_in(folder)
    assert outbox.secret == secrets[0]
    assert list(outbox.waiting.values()) == [
        chat.Waiting("2", "#a", "two", chat.MESSAGE, 1, "abc", 2),
        chat.Waiting("3", "#a", "three", chat.MESSAGE),
    ]
    assert not (first.exists() or second.exists()) and other.exists()
    assert outbox_in(folder).secret == secrets[1]
    assert messages_of(outbox_in(folder, "bob")) == ["four"]
    assert not (folder / "outbox").exists()


def test_an_outbox_that_a_client_of_an_earlier_version_uses_is_left_to_it(folder):
    path = journal_in(folder, {"secret": "ab" * 16}, say("1", "one"))
    fd = chat.locked(path)
    assert messages_of(outbox_in(folder)) == [] and path.exists()
    os.close(fd)
    assert messages_of(outbox_in(folder)) == ["one"] and not path.exists()


@pytest.mark.parametrize(
    "record", ['{"secret": 5}', '{"say": [5, 6, 7, 8]}', '{"say": ["a", 5, "x", "y"]}', "[]", "5",
               '{"say": ["a", "#b", "\\ud800", "message"]}', '{"say": "abcd"}', '{"sent": []}'],
)  # fmt: skip
def test_a_damaged_outbox_in_a_file_gives_up_what_is_damaged_alone(folder, record):
    path = journal_in(folder, {"secret": "ab" * 16}, say("1", "kept"))
    with path.open("a") as file:
        file.write(f"{record}\n")
    outbox = outbox_in(folder)
    assert messages_of(outbox) == ["kept"] and outbox.secret == "ab" * 16


def test_servers_and_passwords_in_files_are_taken_over_once(folder):
    config = folder / "config"
    config.mkdir()
    servers, logins = folder / "servers.json", config / "logins.json"
    known = {"a:1": {"kind": "irc", "pin": "ab"}, "b:2": chat.PLAIN, "sts:a": [6697, 5.5]}
    servers.write_text(json.dumps(known | {"c:3": 5, "d:4": [1], "e:5": {"pin": "cd"}}))
    logins.write_text(json.dumps({"a:1 two words": ["alice", "x y"], "b:2 bob": None, "z": []}))
    found = chat.KnownServers(chat.open_client_file(folder, config))
    assert (found.kind("a:1"), found.pin("a:1"), found.policy("a")) == ("irc", "ab", (6697, 5.5))
    assert (found.kind("b:2"), found.pin("b:2"), found.pin("e:5")) == (chat.PLAIN, None, "cd")
    assert found.login("a:1", "Two Words") == chat.Login("alice", "x y")
    assert found.login("b:2", "bob") is None
    assert not servers.exists() and not logins.exists()


def test_a_file_of_passwords_that_cannot_be_removed_brings_no_old_password_back(
    folder, monkeypatch
):
    def fail(*_):
        raise PermissionError(errno.EROFS, "read-only file system")

    (folder / "logins.json").write_text(json.dumps({"a:1 bob": ["bob", "old"]}))
    monkeypatch.setattr(pathlib.Path, "unlink", fail)
    found = chat.KnownServers(chat.open_client_file(folder))
    assert found.login("a:1", "bob") == chat.Login("bob", "old")
    found.keep_login("a:1", "bob", chat.Login("bob", "new"))
    found = chat.KnownServers(chat.open_client_file(folder))
    assert found.login("a:1", "bob") == chat.Login("bob", "new")


@pytest.mark.parametrize("text", ["{ damaged", "[]", '{"a:1 b": ["\\ud800", "x"]}', "{}"])
def test_a_damaged_file_of_passwords_is_left_alone(folder, text):
    path = folder / "logins.json"
    path.write_text(text)
    found = chat.KnownServers(chat.open_client_file(folder))
    assert found.login("a:1", "b") is None and path.read_text() == text


def test_the_password_of_an_account_that_was_refused_is_not_kept():
    house = house_of("bob")
    alice = Pair(house, "alice")
    kept = []
    alice.core.me.keep = kept.append
    house.site.registration = frozenset({"off"})
    alice.typed("/register")
    assert kept[0].account == "alice" and kept[-1] is None
    assert alice.core.me.login is alice.core.me.proposed is None


# OTHER SERVERS

# The client in memory, and a server of which only the lines are there that matter.


class Elsewhere:
    """A client on a server that is no chat.py, and a clock that is wound by hand."""

    def __init__(self, *tokens, caps="", tidy=True, **options):
        self.now = 0.0
        options = {"kind": chat.IRC, **options}
        self.core = chat.ClientCore("alice", tidy, ticks=lambda: self.now, **options)
        self.out, self.views = [], []
        self.connect(*tokens, caps=caps)

    def connect(self, *tokens, caps=""):
        self.views += self.core.connected()
        if caps:
            self.hears(f"CAP * LS :{caps}", f"CAP * ACK :{re.sub('=[^ ]*', '', caps)}")
        self.hears("001 alice :Welcome", "004 alice x ircd-1 a b")
        if tokens:
            self.hears(f"005 alice {' '.join(tokens)} :are supported by this server")
        for room in list(self.core.rooms.values()):
            self.hears(f":alice!u@h JOIN {room.name}")
        self.sent()

    def hears(self, *lines):
        for line in lines:
            line = line if line[:1] in ":@" else f":irc.example {line}"
            self.views += self.core.feed(f"{line}\r\n".encode())
        return self

    def types(self, *texts):
        for text in texts:
            self.views += self.core.typed(text)
        return self

    def sent(self, seconds=0.0):
        """Return what the client sent since the last time, after so many seconds more."""
        self.out += self.core.take_output().decode().splitlines()
        for _ in range(int(seconds)):
            self.now += 1
            self.views += self.core.tick()
            self.out += self.core.take_output().decode().splitlines()
        out, self.out = self.out, []
        return out

    def said(self):
        """Return the messages that were shown, the client's own with *."""
        shown = [v for v in self.views if v.kind in ("said", "noticed")]
        self.views = [v for v in self.views if v not in shown]
        return [f"{v.where} {'*' if v.mine else ''}{v.name}: {v.text}" for v in shown]

    def kinds(self, kind):
        return [view.text for view in self.views if view.kind == kind]


SAME_NAMES = [  # CASEMAPPING, two names, whether they are one
    ("ascii", "Bob", "bOB", True),
    ("ascii", "a[b", "a{b", False),
    ("ascii", "#Ä", "#ä", False),
    ("rfc1459", "A[]\\~", "a{}|^", True),
    ("rfc1459", "#Ä", "#ä", False),
    ("rfc1459-strict", "a~", "a^", False),
    ("rfc1459-strict", "a[", "a{", True),
    ("strict-rfc1459", "a\\", "a|", True),
    ("rfc7613", "#Ä", "#ä", True),
    ("unheard-of", "a[", "a{", False),
    (None, "a[", "a{", True),  # RFC 1459 has it so
    ("ascii", "\uff42ob", "bob", False),  # a letter of full width
]


@pytest.mark.parametrize("mapping, one, other, same", SAME_NAMES)
def test_names_are_compared_as_the_server_compares_them(mapping, one, other, same):
    alice = Elsewhere(*[f"CASEMAPPING={mapping}"] if mapping else [])
    assert (alice.core.fold(one) == alice.core.fold(other)) == same
    room = alice.core.room_for(one)
    assert (alice.core.room_for(other) is room) == same


def test_a_user_whose_nick_only_looks_like_ours_is_another():
    alice = Elsewhere("CASEMAPPING=ascii", "CHANTYPES=#")
    alice.hears(":\uff41lice!u@h PRIVMSG #lobby :hi", ":op!u@h KICK #lobby \uff41lice :out")
    assert alice.said() == ["#lobby \uff41lice: hi"]
    assert alice.core.room.inside
    alice.hears(":op!u@h KICK #lobby ALICE :out")
    assert not alice.core.room.inside and not alice.core.room.people


CHANNELS = [  # tokens, target, the conversation that it is in, whether that is a channel
    (["CHANTYPES=#&+!"], "+free", "+free", True),
    (["CHANTYPES=#&+!"], "&local", "&local", True),
    (["CHANTYPES=#&+!"], "!12345safe", "!12345safe", True),
    (["CHANTYPES=#"], "&local", "bob", False),
    (["CHANTYPES=#", "STATUSMSG=@+"], "@#lobby", "#lobby", True),
    (["CHANTYPES=#", "STATUSMSG=~&@%+"], "%#lobby", "#lobby", True),
    (["CHANTYPES=#&+!"], "alice", "bob", False),
    ([], "#x", "#x", True),
]


@pytest.mark.parametrize("tokens, target, where, channel", CHANNELS)
def test_what_a_channel_is_is_for_the_server_to_say(tokens, target, where, channel):
    alice = Elsewhere(*tokens)
    alice.hears(f":bob!u@h PRIVMSG {target} :hi")
    assert alice.said() == [f"{where} bob: hi"]
    assert alice.core.find(where).is_channel == channel


OWN_ECHOES = [  # capabilities, tokens, what the server makes of tags and text of `hi there`
    ("echo-message", [], "", "hi there"),
    ("echo-message message-tags", ["CLIENTTAGDENY=*"], "@msgid=1", "hi there"),
    ("echo-message message-tags batch labeled-response", [], "@label={id};msgid=1", "hi there"),
    (
        "echo-message message-tags batch labeled-response",
        ["CLIENTTAGDENY=*"],
        "@label={id}",
        "hi there",
    ),
    ("echo-message message-tags", [], "@+chat.py/id={id};msgid=1", "hi there"),
    ("echo-message message-tags", ["CLIENTTAGDENY=*,-chat.py/id"], "@+chat.py/id={id}", "hi there"),
    ("echo-message", [], "", "hi there"),
]


@pytest.mark.parametrize("caps, tokens, tags, text", OWN_ECHOES)
def test_our_own_message_is_shown_once_however_it_comes_back(caps, tokens, tags, text):
    alice = Elsewhere(*tokens, caps=caps)
    alice.types("hi there")
    (id,) = alice.core.outbox.waiting
    alice.hears(f"{tags.format(id=id)} :alice!u@h PRIVMSG #lobby :{text}".lstrip())
    for line in alice.sent(5):
        if line.startswith("PING"):
            alice.hears(line.replace("PING", "PONG irc.example"))
    assert alice.said() == ["#lobby *alice: hi there"]
    assert alice.core.outbox.waiting == {}
    alice.hears(":alice!u@h PRIVMSG #lobby :from another client of mine")
    assert alice.said() == ["#lobby *alice: from another client of mine"]


def test_a_message_of_several_lines_comes_back_as_several_and_is_shown_once():
    alice = Elsewhere(caps="echo-message")
    alice.types("one\ntwo\nthree")
    assert [line for line in alice.sent(30) if "PRIVMSG" in line] == [
        "PRIVMSG #lobby one",
        "PRIVMSG #lobby two",
        "PRIVMSG #lobby three",
    ]
    for text in ("one", "two", "three"):
        alice.hears(f":alice!u@h PRIVMSG #lobby :{text}")
    assert alice.said() == ["#lobby *alice: one\ntwo\nthree"]


def answer(server, lines, *, labels=False):
    """Confirm what a client sent, as a server with labels does, or by PONG."""
    for line in lines:
        if labels and (label := re.match(r"@\S*label=([^ ;]+)", line)) and "PRIVMSG" in line:
            server.hears(f"@label={label[1]} :alice!u@h {line.partition(' ')[2]}")
        elif line.startswith("PING"):
            server.hears(line.replace("PING", "PONG irc.example"))


@pytest.mark.parametrize("caps", ["echo-message message-tags batch labeled-response", ""])
def test_forty_lines_arrive_where_tags_of_clients_are_denied(caps):
    alice = Elsewhere("CLIENTTAGDENY=*", caps=caps, tidy=False)
    for n in range(40):
        alice.views += alice.core.say(f"line {n}")
    sent = []
    for _ in range(200):
        lines = alice.sent(1)
        sent += [line.rpartition(":")[2] for line in lines if "PRIVMSG" in line]
        answer(alice, lines, labels=bool(caps))
    assert sent == [f"line {n}" for n in range(40)]
    assert alice.core.outbox.waiting == {}


def test_a_long_paste_goes_out_in_the_pace_that_servers_allow_and_can_be_cancelled():
    alice = Elsewhere()
    alice.types("\n".join(f"line {n} {'x' * 60}" for n in range(150)))
    first = alice.sent()
    assert 3 <= len(first) <= chat.PACE_BURST + 1
    lines = alice.sent(60)
    assert 25 <= len(lines) <= 31  # one every two seconds
    alice.types("/cancel all")
    alice.hears("PING x")
    assert alice.sent()[-1] == "PONG x"  # which waits for nothing
    assert [line for line in alice.sent(60) if "PRIVMSG" in line] == []


def test_a_server_that_announces_its_pace_is_believed():
    alice = Elsewhere("chat.py/FLOOD=20,10")
    alice.types("\n".join(f"line {n}" for n in range(100)))
    assert 15 <= len(alice.sent()) <= 20
    assert len(alice.sent(5)) >= 40


REFUSED_MESSAGES = [
    "401 alice bob :No such nick",
    "404 alice bob :Cannot send to nick/channel",
    "408 alice bob :You cannot use colors",
    "439 alice bob :Target change too fast",
    "486 alice bob :You must be registered",
    "492 alice bob :Cannot send CTCP",
    "531 alice bob :You are not permitted to send to this user",
    "716 alice bob :is in +g mode",
    "415 alice bob :Cannot send message",
    "FAIL PRIVMSG NO_SUCH_THING bob :not now",
]


@pytest.mark.parametrize("line", REFUSED_MESSAGES)
def test_an_error_about_a_target_is_of_the_message_to_it(line):
    alice = Elsewhere(tidy=False)
    alice.types("/msg bob hello", "/msg carol hi")
    alice.sent(10)
    alice.hears(line)
    assert [text for text in alice.kinds("failed") if text.endswith(": hello")]
    assert [one.where for one in alice.core.outbox.waiting.values()] == ["carol"]
    assert alice.core.failures == 1


def test_every_name_of_a_nick_that_is_cut_is_another_and_there_are_few():
    core = chat.ClientCore("a" * 20, kind=chat.IRC)
    core.connected()
    tried = []
    for _ in range(600):
        lines = core.take_output().decode().splitlines()
        nicks = [line.split()[1] for line in lines if line.startswith("NICK")]
        if not nicks:
            break
        tried += nicks
        core.feed(f":x 433 * {nicks[-1][:9]} :Nickname is already in use\r\n".encode())
    assert len(tried) == len(set(tried)) <= chat.NAMES_TRIED
    assert all(len(name) <= 9 for name in tried[1:]) and core.cause == chat.NEEDS_USER


def test_a_nick_that_is_too_long_is_cut_to_what_servers_take_and_the_user_is_told_why():
    core = chat.ClientCore("a" * 20, kind=chat.IRC)
    core.connected()
    core.take_output()
    core.feed(b":x 432 * aaaaaaaaaaaaaaaaaaaa :Erroneous nickname\r\n")
    assert core.take_output() == b"NICK aaaaaaaaaaaaaaa\r\n"
    views = core.feed(b":x 001 aaaaaaaaaaaaaaa :Welcome\r\n")
    assert "is no nick that this server takes" in views[0].text
    assert not core.regain


def test_a_channel_that_we_are_sent_to_instead_takes_the_place_of_the_other():
    alice = Elsewhere(join=["#full"])
    alice.core.room.inside = False
    alice.hears("470 alice #full ##overflow :Forwarding", ":alice!u@h JOIN ##overflow")
    assert list(alice.core.rooms) == ["##overflow"] and alice.core.here == "##overflow"
    alice.types("/join #Tea")
    alice.hears(":alice!u@h JOIN #tea")
    assert alice.core.here == "#tea" and len(alice.core.rooms) == 2
    alice.types("hello")
    assert "PRIVMSG #tea hello" in alice.sent(9)


SOURCES = [  # source, verb, how it is shown
    ("bob", "PRIVMSG", ("said", "bob", "hi")),
    ("bob!u@h", "NOTICE", ("noticed", "bob", "hi")),
    ("irc.example", "NOTICE", ("told", "", "hi")),
    ("NickServ!s@h", "NOTICE", ("told", "", "NickServ: hi")),
]


@pytest.mark.parametrize("source, verb, shown", SOURCES)
def test_the_source_of_a_message_is_shown_with_and_without_an_address(source, verb, shown):
    alice = Elsewhere()
    alice.hears(f":{source} {verb} alice :hi")
    view = next(view for view in alice.views if view.text.endswith("hi"))
    assert (view.kind, view.name, view.text) == shown


@pytest.mark.parametrize("caps, asked", [("", 1), ("multi-prefix", 0)])
def test_forty_changes_of_ranks_are_followed_with_one_names_at_most(caps, asked):
    alice = Elsewhere("PREFIX=(qov)~@+", "CHANMODES=b,k,l,imnst", caps=caps)
    alice.hears(":bob!u@h JOIN #lobby", ":carol!u@h JOIN #lobby")
    alice.hears(*[f":op!u@h MODE #lobby {'-+'[n % 2]}b+o m{n} bob" for n in range(40)])
    alice.hears(":op!u@h MODE #lobby +k-l+v-o key carol bob")
    people = alice.core.room.people
    assert people == {"bob": "", "carol": "+"}
    assert len([line for line in alice.sent(9) if line == "NAMES #lobby"]) == asked


PAGES_OF = "batch message-tags server-time draft/chathistory"


def test_history_that_does_not_come_hides_nothing():
    alice = Elsewhere(caps=PAGES_OF)
    alice.hears("@msgid=2 :bob!u@h PRIVMSG #lobby :live")
    assert alice.said() == []
    alice.sent(chat.PAGE_SECONDS + 2)
    assert alice.said() == ["#lobby bob: live"]
    assert "does not send what was said meanwhile" in alice.kinds("note")[0]
    alice.hears("BATCH +1 chathistory #lobby", "@batch=1;msgid=1 :bob!u@h PRIVMSG #lobby :late")
    alice.hears("BATCH -1")
    assert alice.said() == ["#lobby bob: late"]


def test_a_pong_without_our_token_confirms_the_oldest_ping():
    alice = Elsewhere()
    alice.types("one")
    alice.sent(9)
    alice.hears("PONG irc.example")
    assert alice.core.outbox.waiting == {}
    alice.hears("PONG", "PONG x y")  # that was not asked for


@pytest.mark.parametrize(
    "tokens, lines",
    [
        (["MONITOR=100"], ["731 alice2 alice!*@*"]),
        ([], ["303 alice2 :"]),
        ([], [":alice!u@h QUIT :ghost"]),
        ([], [":alice!u@h NICK stranger"]),
    ],
)
def test_a_name_that_a_ghost_had_is_taken_back_when_it_is_free(tokens, lines):
    core = chat.ClientCore("alice", kind=chat.IRC)
    alice = Elsewhere.__new__(Elsewhere)
    alice.core, alice.now, alice.out, alice.views = core, 0.0, [], []
    core.ticks = lambda: alice.now
    core.connected()
    alice.hears("433 * alice :in use", "001 alice2 :Welcome", f"005 alice2 {' '.join(tokens)} A :x")
    asked = alice.sent(chat.REGAIN_SECONDS + 9)
    assert ("MONITOR + alice" if tokens else "ISON alice") in asked
    alice.hears(*lines)
    assert "NICK alice" in alice.sent(9)
    alice.hears(":alice2!u@h NICK alice")
    assert core.name == "alice" and not core.regain


CLOSING_WORDS = [
    ("Closing Link: Throttled: Reconnecting too fast", chat.TEMPORARY),
    ("Closing Link: (No more connections allowed from your host)", chat.TEMPORARY),
    ("Server is full", chat.TEMPORARY),
    ("Server going down", chat.TEMPORARY),
    ("Closing Link: (Ping timeout: 240 seconds)", chat.TEMPORARY),
    ("Closing link: K-lined: spam", chat.NEEDS_USER),
    ("Closing Link: (You are banned from this server)", chat.NEEDS_USER),
    ("Closing link: Bad Password", chat.NEEDS_USER),
    ("Closing Link: (Unauthorised connection)", chat.NEEDS_USER),
]


@pytest.mark.parametrize("words, cause", CLOSING_WORDS)
def test_why_a_server_closes_decides_whether_to_come_back(words, cause):
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.feed(f"ERROR :{words}\r\n".encode())
    assert (core.refusal, core.cause, core.dismissed) == (words, cause, True)


@pytest.mark.parametrize(
    "caps, secure, refusals, mechanisms",
    [
        ("sasl", True, ["908 * PLAIN :are available", "904 * :no"], ["SCRAM-SHA-256", "PLAIN"]),
        ("sasl", True, ["904 * :no"], ["SCRAM-SHA-256", "PLAIN"]),
        ("sasl", False, ["904 * :no"], ["SCRAM-SHA-256"]),
        ("sasl=PLAIN", True, [], ["PLAIN"]),
        ("sasl=PLAIN,SCRAM-SHA-256", True, [], ["SCRAM-SHA-256"]),
        ("sasl=EXTERNAL", True, [], []),
    ],
)
def test_the_log_in_falls_back_to_a_mechanism_that_the_server_has(
    caps, secure, refusals, mechanisms
):
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    core.connected()
    core.secure = secure
    core.feed(f":x CAP * LS :{caps}\r\n".encode())
    core.feed("".join(f":x {line}\r\n" for line in refusals).encode())
    found = re.findall(r"AUTHENTICATE (\S+)", core.take_output().decode())
    assert found == mechanisms


def test_external_is_tried_with_a_certificate_and_a_wrong_password_is_not_told_in_the_clear():
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.me.certificate = True
    core.connected()
    core.feed(b":x CAP * LS :sasl=EXTERNAL,PLAIN\r\n")
    core.feed(b"AUTHENTICATE +\r\n:x 903 alice :yes\r\n")
    output = core.take_output().decode().splitlines()
    assert output[-3:] == ["AUTHENTICATE EXTERNAL", "AUTHENTICATE +", "CAP END"]
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "wrong"))
    core.secure = True
    core.connected()
    core.feed(b":x CAP * LS :sasl\r\nAUTHENTICATE +\r\n:x 904 * :wrong password\r\n")
    assert b"PLAIN" not in core.take_output()


def test_a_server_that_wants_tls_is_left_at_once_and_nothing_is_told_it():
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    core.connected()
    core.take_output()
    core.feed(b":x CAP * LS :sts=port=6697,duration=100 sasl\r\n")
    assert core.redial and core.sts == (6697, 100)
    assert b"AUTHENTICATE" not in core.take_output()
    core = chat.ClientCore("alice", kind=chat.IRC)
    core.connected()
    core.tls = True
    core.feed(b":x CAP * LS :sts=port=1,duration=100\r\n")
    assert not core.redial


CTCPS = [
    ("VERSION", f"VERSION chat.py {chat.VERSION}"),
    ("PING 123 456", "PING 123 456"),
    ("CLIENTINFO", "CLIENTINFO ACTION CLIENTINFO PING TIME VERSION"),
    ("version", f"VERSION chat.py {chat.VERSION}"),
]


@pytest.mark.parametrize("question, reply", CTCPS)
def test_questions_of_programs_are_answered(question, reply):
    alice = Elsewhere()
    alice.hears(f":bob!u@h PRIVMSG alice :\x01{question}\x01")
    assert alice.sent(9) == [f"NOTICE bob :\x01{reply}\x01"]
    assert "bob" not in alice.core.rooms


def test_programs_that_ask_too_much_or_a_channel_are_not_answered_and_answers_are_shown():
    alice = Elsewhere()
    alice.hears(*[":bob!u@h PRIVMSG alice :\x01TIME\x01"] * 50)
    assert len(alice.sent(9)) == chat.CTCP_BURST
    alice.hears(":bob!u@h PRIVMSG #lobby :\x01VERSION\x01", ":bob!u@h NOTICE alice :\x01X y\x01")
    assert alice.sent(9) == [] and "bob answers X: y" in alice.kinds("told")
    alice.types("/ctcp bob version")
    assert alice.sent(9) == ["PRIVMSG bob \x01VERSION\x01"]


def test_a_ctcp_in_history_is_no_message_and_what_was_taken_back_meanwhile_is_not_shown():
    alice = Elsewhere(caps=f"{PAGES_OF} draft/message-redaction")
    alice.hears("BATCH +1 chathistory #lobby")
    alice.hears("@batch=1;msgid=1 :bob!u@h PRIVMSG #lobby :\x01VERSION\x01")
    alice.hears("@batch=1;msgid=2 :bob!u@h PRIVMSG #lobby :secret")
    alice.hears("@batch=1;msgid=3 :bob!u@h PRIVMSG #lobby :fine")
    alice.hears(":bob!u@h REDACT #lobby 2 :oops", "BATCH -1")
    assert alice.said() == ["#lobby bob: fine"]


@pytest.mark.parametrize("mask", ["bob", "BOB", "bob!*@*", "*!*@spam.example", "b?b"])
def test_an_ignored_user_opens_nothing_and_rings_nothing(mask):
    alice = Elsewhere()
    alice.types(f"/ignore {mask}")
    alice.views.clear()
    alice.hears(":bob!u@spam.example PRIVMSG alice :psst", ":bob!u@spam.example INVITE alice #x")
    alice.hears(":bob!u@spam.example NOTICE alice :psst", ":bob!u@spam.example PRIVMSG #lobby :x")
    assert alice.said() == [] and "bob" not in alice.core.rooms
    assert not any(view.called for view in alice.views)
    alice.types(f"/unignore {mask}")
    alice.hears(":bob!u@spam.example PRIVMSG alice :psst")
    assert alice.said() == ["bob bob: psst"]


@pytest.mark.parametrize(
    "line, mask",
    [
        (":alice!u@h NICK a" + "b" * 28, "a" + "b" * 28 + "!u@h"),
        ("396 alice cloak.example :is now your displayed host", "alice!u@cloak.example"),
        ("396 alice user@cloak.example :is now your host", "alice!u@cloak.example"),
        (":alice!u@h CHGHOST ~x other.example", "alice!~x@other.example"),
    ],
)
def test_a_line_is_as_long_as_others_can_get_it_with_our_address_of_now(line, mask):
    alice = Elsewhere()
    alice.hears(line)
    assert alice.core.talk.mask == mask
    alice.types(" ".join(["word"] * 300))
    for text in alice.sent(60):
        assert len(f":{mask} {text}\r\n") <= 512


def test_a_message_over_the_limits_of_a_server_is_several_and_loses_no_word():
    caps = "batch message-tags echo-message draft/multiline=max-bytes=200,max-lines=3"
    alice = Elsewhere(caps=caps)
    text = "\n".join(" ".join(f"w{n}" for n in range(40 * k, 40 * k + 40)) for k in range(5))
    alice.types(text)
    lines = alice.sent(200)
    batches = "\n".join(lines).split("BATCH -m")
    said = []
    for batch in batches[:-1]:
        pieces = re.findall(r"PRIVMSG #lobby :?(.*)", batch)
        assert len(pieces) <= 3 and sum(map(len, pieces)) <= 200 or len(pieces) == 1
        said += pieces
    assert " ".join(said).split() == text.split()
    ids = re.findall(r"\+chat\.py/id=(\S+)", "\n".join(lines))
    assert len(ids) == len(set(ids)) == len(batches) - 1  # the last one has that of the message
    assert ids[-1] in alice.core.outbox.waiting


def test_words_for_a_channel_that_we_cannot_enter_are_kept_for_the_user_to_decide():
    alice = Elsewhere()
    alice.core.disconnected()
    alice.types("/join #x")
    alice.core.room_for("#tea").wanted = True
    alice.core.go(alice.core.find("#tea"))
    alice.types("for tea")
    alice.views.clear()
    alice.core.connected()
    alice.hears("001 alice :Welcome", "474 alice #tea :Cannot join channel (+b)")
    (one,) = alice.core.outbox.waiting.values()
    assert one.text == "for tea" and one.id in alice.core.outbox.parked
    assert "for tea; /retry sends it, /cancel drops it" in alice.kinds("failed")[0]
    alice.sent(20)
    alice.types("/retry")
    assert alice.sent(9) == ["JOIN #tea"]
    alice.hears(":alice!u@h JOIN #tea")
    assert "PRIVMSG #tea :for tea" in alice.sent(9)


def test_what_waits_for_a_channel_is_a_reason_to_join_it_at_the_next_start():
    outbox = chat.Outbox(waiting=[chat.Waiting("1", "#tea", "hello", chat.MESSAGE)])
    core = chat.ClientCore("alice", kind=chat.IRC, outbox=outbox)
    core.connected()
    core.feed(b":x 001 alice :Welcome\r\n:alice!u@h JOIN #lobby\r\n:alice!u@h JOIN #tea\r\n")
    output = core.take_output().decode().splitlines()
    assert "JOIN #tea" in output and "PRIVMSG #tea hello" in output


@pytest.mark.parametrize("tidy, parked, failures", [(True, 1, 0), (False, 0, 1)])
def test_what_an_earlier_run_sent_is_not_said_twice_where_that_would_be_seen(
    tidy, parked, failures
):
    outbox = chat.Outbox(waiting=[chat.Waiting("1", "#lobby", "hello", chat.MESSAGE, True)])
    alice = Elsewhere(tidy=tidy, outbox=outbox)
    assert not [line for line in alice.sent(30) if "hello" in line]
    assert len(outbox.parked) == parked and alice.core.failures == failures


def test_two_hundred_strangers_do_not_close_the_conversation_that_is_looked_at():
    alice = Elsewhere()
    alice.types("/query friend")
    for n in range(chat.ROOMS_KEPT + 50):
        alice.hears(f":s{n}!u@h PRIVMSG alice :spam")
    alice.types("for my friend")
    assert alice.core.here == "friend" and len(alice.core.rooms) <= chat.ROOMS_KEPT + 1
    assert "PRIVMSG friend :for my friend" in alice.sent(9)


OTHER_SERVERS = [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP"),
    (b"220 mail.example ESMTP\r\n", "SMTP"),
    (b"+OK POP3 ready\r\n", "POP3"),
    (b"RFB 003.008\n", "VNC"),
    (b"\x15\x03\x03\x00\x02\x02\x46", "TLS"),
]


@pytest.mark.parametrize("kind", ["", chat.PLAIN])
@pytest.mark.parametrize("data, what", OTHER_SERVERS)
def test_a_server_that_is_no_chat_is_left_for_good(data, what, kind):
    core = chat.ClientCore("alice", kind=kind)
    core.connected()
    core.feed(data)
    assert core.cause == chat.FATAL and what in core.refusal


def test_what_is_typed_stays_in_the_conversation_where_it_was_begun(running, terminal):
    server = running()
    bob, alice = server.guest("bob"), terminal(server.address, "alice")
    assert alice.shows("#lobby 2 connected", "alice>")
    alice.type("/query bob\r")
    assert alice.shows("bob alice>")
    alice.type("for bob only")
    alice.type("\x1b1")  # Alt-1
    assert alice.shows("\u2500\u2500 #lobby 2")
    assert "for bob only" not in "".join(alice.screen.lines)
    alice.type("for everybody\r")
    assert bob.until("for everybody")[-1] == "alice: for everybody"
    alice.type("\x1b2\r")
    assert bob.until("for bob only")[-1] == "(private) alice: for bob only"


def test_names_without_their_first_character_are_channels_and_no_people():
    rooms = chat.wanted_rooms(["tea", "#milk key", "&local"])
    assert [(room.name, room.password, room.is_channel) for room in rooms.values()] == [
        ("#tea", "", True),
        ("#milk", "key", True),
        ("&local", "", True),
    ]
    alice = Elsewhere("CHANTYPES=#&")
    alice.types("/join tea")
    assert alice.sent(3) == ["JOIN #tea"]


def test_text_that_may_be_meant_as_a_command_is_asked_about_once():
    alice = Elsewhere()
    for text in (" /login secret", "#tea"):
        alice.views.clear()
        alice.types(text)
        assert alice.sent(5) == [] and alice.kinds("back") == [text]
        alice.types(text)
        lines = alice.sent(9)
        assert [line for line in lines if text.strip() in line]
        answer(alice, lines)


def test_a_wrong_command_names_the_nearest_one_and_sends_nothing():
    alice = Elsewhere()
    alice.types("/jion #x")
    assert alice.kinds("note") == [
        "there is no /jion (/join?); /help lists the commands; nothing was sent"
    ]
    assert alice.sent(5) == []


COMMANDS_SENT = """
/msg bob hi                 PRIVMSG bob hi
/query bob                  -
/j #x                       JOIN #x
/part #lobby so long        PART #lobby :so long
/me waves                   PRIVMSG #lobby :\x01ACTION waves\x01
/notice bob hi there        NOTICE bob :hi there
/topic -delete              TOPIC #lobby :
/topic                      TOPIC #lobby
/who #lobby                 WHO #lobby
/whois bob                  WHOIS bob
/list                       LIST
/away for tea               AWAY :for tea
/back                       AWAY
/invite bob                 INVITE bob #lobby
/kick bob go now            KICK #lobby bob :go now
/ban bob                    MODE #lobby +b bob!*@*
/ban *!*@h                  MODE #lobby +b *!*@h
/ban                        MODE #lobby +b
/unban bob                  MODE #lobby -b bob!*@*
/mode +m                    MODE #lobby +m
/op bob carol               MODE #lobby +oo bob carol
/deop bob                   MODE #lobby -o bob
/voice bob                  MODE #lobby +v bob
/nick al                    NICK al
/raw MOTD                   MOTD
/quote TIME                 TIME
/names                      NAMES #lobby
"""


@pytest.mark.parametrize("line", COMMANDS_SENT.strip().split("\n"))
def test_each_command_sends_what_users_of_irc_expect(line):
    typed, sent = line[:28].rstrip(), line[28:]
    alice = Elsewhere("MODES=4")
    alice.types(typed)
    lines = [one for one in alice.sent(9) if not one.startswith("PING")]
    assert lines == ([] if sent == "-" else [sent])


def test_quit_gives_its_reason_and_a_motd_that_was_asked_for_is_shown():
    alice = Elsewhere()
    alice.hears("372 alice :- not asked for")
    alice.types("/raw MOTD")
    alice.hears("375 alice :- begin", "372 alice :- hello", "376 alice :End")
    assert alice.kinds("told")[-3:] == ["- begin", "- hello", "End"]
    alice.sent(9)
    alice.types("/quit so long")
    assert alice.sent() == ["QUIT :so long"]


def test_a_command_waits_for_the_messages_that_were_typed_before_it():
    house = house_of("bob")
    alice = Pair(house, "alice")
    for n in range(5):
        alice.views += alice.core.typed(f"line {n}")
    alice.views += alice.core.typed("/part #lobby bye")
    alice.exchange(20)
    assert [line for line in house.heard("bob") if "line" in line] == [
        f"alice: line {n}" for n in range(5)
    ]


def test_a_password_that_the_server_wants_is_asked_for_and_can_be_given():
    alice = Elsewhere.__new__(Elsewhere)
    alice.core = chat.ClientCore("alice", kind=chat.IRC)
    alice.views, alice.out, alice.now = alice.core.connected(), [], 0.0
    alice.hears("464 alice :Password incorrect")
    assert alice.core.cause == chat.NEEDS_USER and "/pass PASSWORD" in alice.core.refusal
    alice.core.disconnected()
    alice.types('/pass "open sesame"')
    assert alice.core.password == "open sesame" and alice.core.wants_connection
    alice.core.connected()
    assert b"PASS :open sesame\r\n" in alice.core.take_output()


# A bouncer, whose server may not be there


class Bounced(Elsewhere):
    """A client on a ZNC, which welcomes it although no server is there."""

    def connect(self, *tokens, caps=""):
        self.views += self.core.connected()
        self.hears(":irc.znc.in CAP * LS :echo-message", ":irc.znc.in CAP alice ACK :echo-message")
        self.hears(":irc.znc.in 001 alice :Welcome to ZNC")
        self.sent()

    def lost(self, target):
        text = f"Your message to {target} got lost, you are not connected to IRC!"
        self.hears(f":*status!znc@znc.in PRIVMSG alice :{text}")

    def served(self):
        return self.hears("001 alice :Welcome", "004 alice x ircd-1 a b")


def test_behind_a_bouncer_without_a_server_messages_and_joins_wait_for_one():
    alice = Bounced()
    assert alice.kinds("note") == [
        "the bouncer is not connected to its server; what you say waits for that"
    ]
    alice.types("hello", "/msg bob psst", "/msg *status connect")
    message, ping, *pings = alice.sent(200)
    assert message == "PRIVMSG *status connect" and {one[:5] for one in pings} <= {"PING "}
    alice.hears(f"PONG x {ping.split()[-1]}").served()
    alice.hears(":alice!u@h JOIN #lobby")
    sent = [line for line in alice.sent(9) if line.startswith(("JOIN", "PRIVMSG"))]
    assert sent[0] == "JOIN #lobby" and sorted(sent[1:]) == [
        *("PRIVMSG #lobby hello", "PRIVMSG bob psst"),
    ]


def test_what_a_bouncer_lost_is_sent_to_its_next_server():
    alice = Bounced()
    alice.served()
    alice.hears(":alice!u@h JOIN #lobby")
    alice.sent(9)
    alice.types("one")
    (_, ping) = alice.sent(3)
    alice.lost("#lobby")
    alice.hears(f"PONG x {ping.split()[-1]}")
    assert alice.kinds("note")[-1] == "the bouncer has lost its server; what you say waits for that"
    assert messages_of(alice.core.outbox) == ["one"] and not alice.core.room.inside
    alice.served()
    assert "JOIN #lobby" in alice.sent()
    alice.hears(":alice!u@h JOIN #lobby")
    _, ping = alice.sent(9)
    alice.hears(":alice!u@h PRIVMSG #lobby one", f"PONG x {ping.split()[-1]}")
    assert alice.core.outbox.waiting == {} and alice.kinds("failed") == []


@pytest.mark.parametrize("params", ["JOIN :You have not registered", ":Connection not registered"])
def test_a_server_that_welcomes_and_then_wants_a_registration_is_waited_for(params):
    alice = Elsewhere()
    alice.types("hello")
    assert "PRIVMSG #lobby hello" in alice.sent(1)
    alice.hears(f"451 alice {params}", f"451 alice {params}")
    assert alice.kinds("note") == ["the server has not let us in yet; what you say waits for that"]
    assert alice.kinds("told") == ["you are alice"]
    assert [line for line in alice.sent(9) if "hello" in line] == []
    alice.hears("001 alice :Welcome", ":alice!u@h JOIN #lobby")
    assert "PRIVMSG #lobby hello" in alice.sent(9)
    alice.hears(f"451 alice {params}")
    alice.sent(chat.REGISTRATION_SECONDS + 2)
    assert alice.core.dismissed and alice.core.cause == chat.TEMPORARY


def test_a_pipe_does_not_wait_for_ever_for_the_server_of_a_bouncer():
    bot, alice = Bounced(tidy=False), Bounced()
    for client in (bot, alice):
        client.sent(chat.REGISTRATION_SECONDS + 2)
    assert bot.core.dismissed and bot.core.cause == chat.NEEDS_USER and not bot.core.ready
    assert not alice.core.dismissed


def test_a_channel_that_was_being_joined_when_the_bouncer_lost_its_server_is_joined_later():
    alice = Bounced()
    alice.served()
    alice.types("/join #tea word")
    alice.hears("451 alice JOIN :You have not registered")
    alice.sent(9)
    alice.served()
    assert "JOIN #tea word" in alice.sent(9)


# Found by reading


def test_what_was_sent_is_known_to_be_so_by_the_next_run(folder):
    alice = Elsewhere(outbox=outbox_in(folder))
    alice.types("hello")
    assert "PRIVMSG #lobby hello" in alice.sent(5)
    alice.core.outbox.rows.close()
    (one,) = outbox_in(folder).waiting.values()
    assert one.sent


@pytest.mark.parametrize("ours", [True, False])
def test_a_refused_join_leaves_a_message_to_the_user_unless_the_server_will_answer_it(ours):
    alice = Elsewhere()
    alice.core.server.ours = ours
    alice.types("hello")
    alice.sent(1)
    alice.core.park_all(alice.core.room, "you may not join")
    parked = ["it may have arrived or not"]
    assert [*alice.core.outbox.parked.values()] == ([] if ours else parked)


def test_a_kick_leaves_what_waits_to_the_user_and_hinders_no_command():
    alice = Elsewhere()
    alice.types("\n".join("abcdefgh"), "two", "three")
    alice.hears(":op!u@h KICK #lobby alice :out")
    alice.types("/nick foo")
    assert "NICK foo" in alice.sent(30)
    assert len(alice.core.outbox.parked) == 3
    alice.types("/join #lobby")
    assert [line for line in alice.sent(9) if "PRIVMSG" in line and "two" in line] == []


def test_a_pipe_that_is_put_out_of_its_channel_speaks_to_no_other_conversation():
    alice = Elsewhere(tidy=False, join=["#a"])
    alice.hears(":bob!u@h PRIVMSG alice :psst", ":alice!u@h PART #a")
    alice.views += alice.core.say("secret line")
    assert alice.core.outbox.waiting == {} and alice.kinds("back") == ["secret line"]


def test_what_was_not_sent_when_the_line_broke_is_not_in_doubt():
    alice = Elsewhere(tidy=False)
    for n in range(30):
        alice.views += alice.core.say(f"line {n}")
    alice.sent(3)
    sent = len(alice.core.outbox.in_flight)
    alice.core.finish()
    alice.views += alice.core.disconnected()
    assert len(alice.kinds("failed")) == sent


@pytest.mark.parametrize("how", ["REDACT", "/ignore bob"])
def test_an_older_page_shows_nothing_that_is_not_to_be_seen(how):
    alice = Elsewhere(caps=f"{PAGES_OF} draft/message-redaction")
    room = alice.core.room
    alice.core.talk.ask_history(room, "older")
    if how == "REDACT":
        alice.hears(":bob!u@h REDACT #lobby m1")
    else:
        alice.types(how)
    alice.hears("BATCH +1 chathistory #lobby", "@batch=1;msgid=m1 :bob!u@h PRIVMSG #lobby :x")
    alice.hears("BATCH -1", "BATCH +2 chathistory #lobby")
    alice.hears("@batch=2;msgid=m1 :bob!u@h PRIVMSG #lobby :x", "BATCH -2")
    assert [view.text for view in room.views if view.kind == "said"] == []


def test_our_own_message_can_be_taken_back_by_the_servers_id():
    alice = Elsewhere(caps="echo-message message-tags draft/message-redaction")
    alice.types("oops")
    (id,) = alice.core.outbox.waiting
    alice.hears(f"@+chat.py/id={id};msgid=m9 :alice!u@h PRIVMSG #lobby :oops")
    alice.hears(":alice!u@h REDACT #lobby m9")
    assert [view.text for view in alice.core.room.views if view.kind == "said"] == []


def test_a_channel_that_takes_the_name_of_one_that_we_left_is_the_one_we_are_in():
    alice = Elsewhere(join=["#a", "#new"])
    alice.hears(":op!u@h KICK #new alice", ":op!u@h RENAME #a #new :moved")
    assert list(alice.core.rooms) == ["#new"] and alice.core.find("#new").inside
    assert alice.core.current is alice.core.find("#new")
    alice.types("hi")
    assert "PRIVMSG #new hi" in alice.sent(9)


def test_a_rename_is_kept_with_what_waits_for_the_conversation(folder):
    alice = Elsewhere(outbox=outbox_in(folder))
    alice.types("/query bob")
    alice.core.outbox.window = 0
    alice.types("late words")
    alice.hears(":bob!u@h NICK robert")
    alice.core.outbox.rows.close()
    assert [one.where for one in outbox_in(folder).waiting.values()] == ["robert"]


def test_channels_that_this_server_tells_apart_are_two_from_the_start():
    core = chat.ClientCore("alice", kind=chat.IRC, join=["#\xc4", "#\xe4"])
    assert len(core.rooms) == 2
    alice = Elsewhere("CASEMAPPING=ascii")
    alice.types("/ignore \xc4rger!*@*")
    alice.hears(":\xc4rger!u@h PRIVMSG #lobby :no", ":\xe4rger!u@h PRIVMSG #lobby :yes")
    assert alice.said() == ["#lobby \xe4rger: yes"]


def test_no_conversation_is_hidden_by_history_that_does_not_come_or_by_a_new_name():
    alice = Elsewhere(caps=PAGES_OF, join=["#a", "#b"])
    alice.sent(30)
    alice.hears("@msgid=1 :bob!u@h PRIVMSG #b :live")
    assert alice.said() == ["#b bob: live"]
    alice = Elsewhere(caps=f"{PAGES_OF} draft/channel-rename")
    alice.hears(":op!u@h RENAME #lobby #new :x", "@msgid=2 :bob!u@h PRIVMSG #new :live")
    alice.hears("BATCH +1 chathistory #new", "BATCH -1")
    assert alice.said() == ["#new bob: live"]


def test_a_message_that_a_server_swallows_is_told_and_holds_up_no_other():
    caps = "echo-message message-tags batch labeled-response"
    alice = Elsewhere(caps=caps)
    alice.types("spam")
    (id,) = alice.core.outbox.waiting
    alice.hears(f"@label={id} ACK")
    assert alice.kinds("failed")[0].endswith(": spam")
    alice.types("more spam")
    lines = alice.sent(60)
    assert any(line.startswith("PING echo-") for line in lines)
    answer(alice, [line for line in lines if "PING" in line])
    assert alice.kinds("failed")[1].endswith(": more spam")
    alice.types("after")
    assert any("after" in line for line in alice.sent(9))


@pytest.mark.parametrize("caps", ["echo-message message-tags", ""])
def test_after_a_paste_was_cancelled_messages_go_on(caps):
    alice = Elsewhere(caps=caps)
    alice.types("\n".join(f"line {n}" for n in range(30)))
    alice.sent(5)
    alice.types("/cancel all", "after")
    assert any("after" in line for line in alice.sent(30))
    assert "of 30 lines sent, the rest dropped" in alice.kinds("note")[-1]
    assert alice.kinds("arrived") == []


def test_an_address_without_end_leaves_room_for_words():
    alice = Elsewhere()
    alice.hears(f"396 alice {'h' * 900}")
    alice.types("still here")
    assert [line for line in alice.sent(9) if "PRIVMSG" in line]


def test_a_registration_that_the_server_does_not_end_is_ended():
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    now = 0.0
    core.ticks = lambda: now
    core.connected()
    core.secure = True
    core.feed(b":x CAP * LS :sasl\r\n")
    core.take_output()
    now = chat.LOGIN_SECONDS + 1
    core.tick()
    assert b"CAP END" in core.take_output()
    now = chat.REGISTRATION_SECONDS + 1
    core.tick()
    assert core.dismissed and core.cause == chat.TEMPORARY


@pytest.mark.parametrize("words", ["don't", "foo-bar", "x.y", "a_b", "\U0001f389", "#tea!"])
def test_any_words_can_be_searched_for(words):
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    store.add("#a", chat.View(chat.SAID, f"well {words} indeed", "bob", "#a", 1, id="m"))
    for _ in range(2):
        assert len(store.find(words, 9)) == 1
        store.index()
    assert store.find("absent", 9) == [] and store.trouble == ""


def test_a_store_that_is_locked_for_long_loses_nothing_and_breaks_nothing(tmp_path):
    path = str(tmp_path / "client.db")
    one = chat.open_client_database(path)
    one.execute("PRAGMA journal_mode = DELETE")  # as on a network home
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    store = chat.ClientStore(one, "here", "alice")
    alice = Elsewhere(store=store)
    other.execute("BEGIN EXCLUSIVE")
    alice.hears("@msgid=1 :bob!u@h PRIVMSG alice :psst", "@msgid=2 :bob!u@h PRIVMSG #lobby :x")
    alice.hears(":bob!u@h REDACT #lobby 2")
    alice.types("/lastlog psst")
    assert alice.said() == ["bob bob: psst", "#lobby bob: x"]
    other.execute("COMMIT")
    store.flush()
    assert [view.text for view in store.page("bob", 9)] == ["psst"] and store.page(
        "#lobby", 9
    ) == []


def test_a_retried_message_is_not_confirmed_by_the_answer_to_an_older_ping():
    alice = Elsewhere(join=["#k"])
    alice.types("hello")
    (id,) = alice.core.outbox.waiting
    ping = next(line for line in alice.sent(9) if "PING" in line)
    alice.hears(":op!u@h KICK #k alice :out", ":alice!u@h JOIN #k")
    alice.types("/retry")
    alice.hears(ping.replace("PING", "PONG x"))
    assert id in alice.core.outbox.waiting


def test_what_an_earlier_server_at_an_address_said_does_not_bind_the_next_one():
    alice = Elsewhere("CASEMAPPING=ascii", "LINELEN=9000", "MONITOR=100")
    alice.core.disconnected()
    alice.connect("CHANTYPES=#")
    assert alice.core.server.tokens == {"CHANTYPES": "#"}


def test_what_a_server_makes_up_has_limits():
    alice = Elsewhere(caps=PAGES_OF)
    alice.hears(*[f":x CHATHISTORY TARGETS n{n} 2026-01-01T00:00:00.000Z" for n in range(3000)])
    alice.hears(*[f":alice!u@h JOIN #n{n}" for n in range(3000)])
    assert len(alice.core.talk.asked) <= 2 * chat.ROOMS_KEPT + 10
    assert len(alice.core.rooms) <= 2 * chat.ROOMS_KEPT
    alice.hears(":x BATCH +out x")
    alice.hears(*[f"@batch=out :x BATCH {sign}i{n} y" for n in range(3000) for sign in "+-"])
    assert len(alice.core.talk.batches["out"].items) <= chat.BATCH_LINES


def test_history_is_asked_for_by_time_where_a_server_knows_no_ids():
    alice = Elsewhere("MSGREFTYPES=timestamp", caps=PAGES_OF)
    alice.hears("BATCH +1 chathistory #lobby")
    alice.hears("@batch=1;msgid=m;time=2026-01-01T00:00:00.000Z :b!u@h PRIVMSG #lobby :x")
    alice.hears("BATCH -1")
    alice.core.talk.ask_history(alice.core.room, "older")
    assert "BEFORE #lobby timestamp=2026-01-01T00:00:00.000Z" in "".join(alice.sent(9))


def test_an_echo_without_what_steers_terminals_is_still_ours():
    alice = Elsewhere(caps="echo-message")
    alice.types("file\u202egpj.exe")
    alice.sent(5)
    alice.hears(":alice!u@h PRIVMSG #lobby :file\u202egpj.exe")
    assert len(alice.said()) == 1


def test_many_rooms_are_asked_about_in_their_turn_and_none_is_given_up_too_early():
    alice = Elsewhere(caps=PAGES_OF, join=[f"#c{n}" for n in range(15)])
    for _ in range(120):
        for line in alice.sent(1):
            if "CHATHISTORY" in line:
                where = line.split()[2]
                alice.hears(f"BATCH +1 chathistory {where}", "BATCH -1")
    assert not [text for text in alice.kinds("note") if "does not send" in text]


# Found by use


@pytest.mark.parametrize("token", ["LINELEN=16", "LINELEN=5", "LINELEN=nonsense"])
def test_a_length_of_lines_that_no_server_has_is_not_believed(token):
    alice = Elsewhere(token)
    alice.types("word " * 100)
    assert " ".join(line.partition(" :")[2] for line in alice.sent(60)).split() == ["word"] * 100


@pytest.mark.parametrize(
    "caps, tags",
    [
        ("echo-message message-tags", "@msgid=1"),  # drops our tag without a word
        ("echo-message message-tags batch labeled-response", "@msgid=1"),  # and our label
    ],
)
def test_an_echo_that_comes_back_without_tag_and_label_is_known_by_its_order(caps, tags):
    alice = Elsewhere(caps=caps, tidy=False)
    for n in range(3):
        alice.views += alice.core.say(f"line {n}")
    sent = []
    for _ in range(30):
        for line in alice.sent(1):
            if "PRIVMSG" in line:
                sent.append(line.split()[-1])
                alice.hears(f"{tags} :alice!u@h {line.partition(' ')[2]}")
    assert sent == ["0", "1", "2"] and alice.core.outbox.waiting == {}
    assert alice.said() == [f"#lobby *alice: line {n}" for n in range(3)]


def test_when_echoes_end_the_message_in_flight_is_confirmed_by_a_ping():
    alice = Elsewhere(caps="echo-message message-tags")
    alice.types("hello")
    alice.sent(2)
    alice.hears("CAP alice DEL :echo-message")
    answer(alice, alice.sent(60))
    assert alice.core.outbox.waiting == {} and alice.core.failures == 0


TOO_LONG = [
    (["TOPICLEN=100"], "/topic " + "x" * 101),
    (["AWAYLEN=50"], "/away " + "x" * 51),
    (["NICKLEN=9"], "/nick abcdefghij"),
    (["KICKLEN=20"], "/kick bob " + "x" * 21),
    ([], "/topic " + "x" * 500),
    ([], "/msg NickServ " + "x" * 500),
]


@pytest.mark.parametrize("tokens, typed", TOO_LONG)
def test_what_a_server_would_cut_is_refused_with_its_limit(tokens, typed):
    alice = Elsewhere(*tokens)
    alice.types(typed)
    assert alice.sent(5) == [] and alice.kinds("back") == [typed]
    assert re.search(r"at most \d+ bytes|takes \d+ bytes", alice.kinds("note")[0])


def test_a_long_notice_is_several():
    alice = Elsewhere()
    alice.types("/notice bob " + " ".join(["word"] * 150))
    lines = alice.sent(30)
    assert len(lines) > 1 and all(len(line) < 450 for line in lines)
    assert " ".join(line.partition(" :")[2] for line in lines).split() == ["word"] * 150


def test_page_up_reaches_all_messages_of_one_millisecond_also_without_ids():
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    for n in range(1000):
        store.add("#a", chat.View(chat.SAID, f"{n}", "bob", "#a", 1000 + n // 40))
    core = chat.ClientCore("alice", store=store, join=["#a"])
    while core.older_from_store(core.room):
        pass
    assert [view.text for view in core.room.views] == [str(n) for n in range(1000)]


def test_of_two_clients_of_one_user_one_keeps_what_has_no_id(folder):
    options = chat.ClientOptions("alice", chat.parse_target("irc://here"), state=folder)
    one, other = chat.Client.__new__(chat.Client), chat.Client.__new__(chat.Client)
    for client in (one, other):
        client.loop, client.options, client.reason = chat.Loop(), options, ""
        client.db = chat.open_client_file(folder)
        client.core, client.link = client.dial(options, bool, bool)
        client.loop.close()
    assert (one.core.store.sole, other.core.store.sole) == (True, False)


def test_many_clients_can_begin_at_once_in_a_new_folder(tmp_path):
    secrets, failed = [], []

    def begin(n):
        try:
            db = chat.open_client_file(tmp_path)
            with chat.patience_with(db):
                chat.ClientStore(db, "here", f"user{n}")
            secrets.append(outbox_in(tmp_path).secret)
        except (chat.Unusable, sqlite3.Error) as error:
            failed.append(error)

    threads = [threading.Thread(target=begin, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(set(secrets)) == 8


def test_a_damaged_file_of_messages_is_one_clear_line(folder):
    options = chat.ClientOptions("alice", chat.parse_target("irc://here"), state=folder)
    store = chat.ClientStore(chat.open_client_file(folder), "here", "alice")
    for n in range(500):
        store.add("#a", chat.View(chat.SAID, "x" * 50, "bob", "#a", n, id=f"{n}"))
    store.flush()
    store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.db.close()
    path = folder / "client.db"
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        path.write_bytes(data[: page * 4096] + b"\xa5" * 4096 + data[(page + 1) * 4096 :])
        for wal in folder.glob("client.db-*"):
            wal.unlink()
        client = chat.Client.__new__(chat.Client)
        client.loop, client.options = chat.Loop(), options
        with contextlib.suppress(chat.Unusable):  # and nothing else
            client.db = chat.open_client_file(folder)
            with contextlib.closing(client.db):
                core, link = client.dial(options, bool, bool)
                core.outbox.rows.close()
        client.loop.close()
        assert folder / "client.lock" not in chat.LOCK_FILES


def test_a_store_that_cannot_be_written_is_told_of_once():
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    alice = Elsewhere(store=store)
    store.db.execute("PRAGMA query_only = 1")
    for n in range(3):
        alice.hears(f"@msgid={n} :bob!u@h PRIVMSG #lobby :x")
        alice.sent(2)
    assert len([text for text in alice.kinds("note") if "client.db" in text]) == 1


def test_modes_and_topics_that_look_like_channels_are_none():
    alice = Elsewhere("CHANTYPES=#&!+")
    alice.types("/mode +m", "/topic +1 for tea", "+1", "!help")
    lines = [line for line in alice.sent(60) if "PING" not in line]
    assert lines[:2] == ["MODE #lobby +m", "TOPIC #lobby :+1 for tea"]
    assert "PRIVMSG #lobby +1" in lines


def test_a_safe_channel_is_the_one_that_was_asked_for_under_a_short_name():
    alice = Elsewhere("CHANTYPES=#&!+")
    alice.types("/join !tea")
    alice.hears(":alice!u@h JOIN !ABCDEtea")
    assert alice.core.here == "!ABCDEtea"


@pytest.mark.parametrize("line", ["421 * AUTHENTICATE :Unknown command", "CAP * NAK :sasl"])
def test_a_server_that_takes_no_log_in_after_all_lets_us_in(line):
    core = chat.ClientCore("alice", kind=chat.IRC, login=chat.Login("alice", "sesame"))
    core.secure = True
    core.connected()
    core.secure = True
    core.feed(b":x CAP * LS :sasl\r\n")
    core.feed(f":x {line}\r\n".encode())
    if "NAK" in line:
        core.ticks = lambda: chat.LOGIN_SECONDS + 1
        core.tick()
    assert b"CAP END" in core.take_output()


def test_a_channel_of_any_name_that_a_server_has_can_be_spoken_in():
    name = "#" + "x" * 150
    alice = Elsewhere("CHANNELLEN=200", join=[name])
    alice.types("hello")
    assert f"PRIVMSG {name} hello" in alice.sent(9)


def test_on_other_servers_words_wait_until_a_join_is_answered():
    core = chat.ClientCore("alice", False, chat.IRC, join=["#a"])
    core.connected()
    core.say("hello")
    core.feed(b":x 001 alice :Welcome\r\n:x 004 alice x y\r\n")
    assert b"PRIVMSG" not in core.take_output()
    core.feed(b":alice!u@h JOIN #a\r\n")
    assert b"PRIVMSG #a hello" in core.take_output()


def test_a_batch_whose_end_is_lost_is_shown_after_a_while():
    alice = Elsewhere(caps="batch message-tags")
    alice.hears("BATCH +1 netsplit a b", "@batch=1 :bob!u@h PRIVMSG #lobby :hi")
    assert alice.said() == []
    alice.sent(chat.BATCH_SECONDS + 2)
    assert alice.said() == ["#lobby bob: hi"]


def test_several_channels_in_one_line_are_several():
    alice = Elsewhere()
    alice.hears(":alice!u@h JOIN #m1,#m2", ":bob!u@h JOIN #m1,#m2")
    assert set(alice.core.rooms) == {"#lobby", "#m1", "#m2"}
    alice.hears(":bob!u@h PART #m1,#m2")
    assert "bob" not in alice.core.find("#m2").people


@pytest.mark.parametrize(
    "text", ["\x01ACTION waves\x01", "\x01action waves\x01", "\x01ACTION waves"]
)
def test_an_action_is_one_in_any_case(text):
    alice = Elsewhere()
    alice.hears(f":bob!u@h PRIVMSG #lobby :{text}")
    assert alice.said() == ["#lobby bob: *waves*"]


CHANNEL_FIRST = [
    ("/join #a,#b k1,k2", ["JOIN #a k1", "JOIN #b k2"]),
    ("/kick #lobby bob so what", ["KICK #lobby bob :so what"]),
    ("/op #lobby bob carol", ["MODE #lobby +oo bob carol"]),
    ("/ban #lobby bob", ["MODE #lobby +b bob!*@*"]),
    ("/unban #lobby bob", ["MODE #lobby -b bob!*@*"]),
    ("/query bob hello", ["PRIVMSG bob hello"]),
    ("/msg @#lobby hello", ["PRIVMSG @#lobby hello"]),
]


@pytest.mark.parametrize("typed, lines", CHANNEL_FIRST)
def test_commands_take_what_users_of_other_clients_type(typed, lines):
    alice = Elsewhere("STATUSMSG=@+", "MODES=4")
    alice.types(typed)
    assert [line for line in alice.sent(9) if "PING" not in line] == lines
    assert "@#lobby" not in alice.core.rooms


def test_a_program_means_what_it_says():
    alice = Elsewhere(tidy=False)
    for text in ("pass the salt", "#tea", " /me waves"):
        alice.views += alice.core.typed(text)
    assert alice.kinds("back") == [] and len(alice.core.outbox.waiting) == 3


def test_an_ignored_user_opens_nothing_with_a_message_of_several_lines():
    alice = Elsewhere(caps="batch message-tags draft/multiline")
    alice.types("/ignore bob")
    alice.hears(":bob!u@h BATCH +1 draft/multiline alice", "@batch=1 :bob!u@h PRIVMSG alice :x")
    alice.hears("@batch=1 :bob!u@h PRIVMSG alice :y", ":bob!u@h BATCH -1")
    assert "bob" not in alice.core.rooms


# Found by use, once more


def page_up(pair, room):
    """Read back to the beginning, as Page Up does."""
    for _ in range(50):
        if not pair.core.older_from_store(room) and not room.whole:
            pair.core.talk.ask_history(room, "older")
            pair.core.flush()
            pair.exchange(3)


@pytest.mark.parametrize("starts", [1, 2])
def test_what_was_missed_while_away_is_reached_by_reading_back_also_after_another_start(starts):
    house, db = house_of("bob"), chat.open_client_database(":memory:")
    house.say("bob", *(f"old {n}" for n in range(40)))
    kept_client(house, db).drop()
    house.say("bob", *(f"new {n}" for n in range(300)))
    for _ in range(starts):
        alice = kept_client(house, db)
        alice.core.tick()
        if starts > 1:
            alice.drop()
    if starts > 1:
        alice = kept_client(house, db)
    room = alice.core.find("#lobby")
    page_up(alice, room)
    said = [view.text for view in room.views if view.kind == "said"]
    assert said == [f"old {n}" for n in range(40)] + [f"new {n}" for n in range(300)]


def test_what_was_missed_twice_is_reached_and_so_is_what_was_read_past_offline():
    house, db = house_of("bob"), chat.open_client_database(":memory:")
    house.say("bob", *(f"a {n}" for n in range(30)))
    kept_client(house, db).drop()
    for letter in "bc":
        house.say("bob", *(f"{letter} {n}" for n in range(150)))
        alice = kept_client(house, db)
        alice.core.tick()
        alice.drop()
        while alice.core.older_from_store(alice.core.find("#lobby")):  # over the hole
            pass
    alice = kept_client(house, db)
    room = alice.core.find("#lobby")
    page_up(alice, room)
    said = [view.text for view in room.views if view.kind == "said"]
    numbers = {"a": 30, "b": 150, "c": 150}
    assert said == [f"{letter} {n}" for letter, count in numbers.items() for n in range(count)]


def test_two_channels_of_another_server_are_two_also_with_a_store():
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    core = chat.ClientCore("alice", kind=chat.IRC, join=["#\xc4", "#\xe4"], store=store)
    assert core.find("#\xc4") is not core.find("#\xe4") and len(core.rooms) == 2


def test_a_page_of_which_nothing_can_be_seen_is_not_the_beginning():
    house = house_of("bob")
    house.say("bob", *(f"first {n}" for n in range(5)))
    house.connect("troll").receive(b"troll")
    house.turn()
    for n in range(250):
        house.say("troll", f"spam {n}")
    house.say("bob", "last")
    house.turn()
    alice = Pair(house, "alice")
    alice.typed("/ignore troll")
    room = alice.core.find("#lobby")
    alice.core.talk.ask_history(room, "older")
    alice.core.flush()
    alice.exchange(30)
    texts = [view.text for view in room.views if view.kind == "said"]
    assert texts[:5] == [f"first {n}" for n in range(5)]


def test_a_pipe_keeps_its_order_while_a_join_is_slow():
    alice = Elsewhere(tidy=False, join=["#x"])
    alice.core.disconnected()
    alice.core.connected()
    alice.hears("001 alice :Welcome", "004 alice x ircd a b")
    for text in ("first", "/msg bob second", "/topic #x third"):
        alice.views += alice.core.typed(text)
    assert alice.sent(5) == ["CAP LS 302", "NICK alice", "USER alice 0 * :alice", "JOIN #x"]
    alice.hears(":alice!u@h JOIN #x")
    lines = []
    for _ in range(20):
        sent = alice.sent(1)
        answer(alice, sent)
        lines += [line for line in sent if not line.startswith("PING")]
    assert lines == ["PRIVMSG #x first", "PRIVMSG bob second", "TOPIC #x third"]


def test_a_join_that_is_not_answered_holds_nothing_up_for_ever():
    alice = Elsewhere(tidy=False, join=["#x"])
    alice.core.disconnected()
    alice.core.connected()
    alice.hears("001 alice :Welcome")
    alice.views += alice.core.say("hello")
    alice.sent(chat.JOIN_SECONDS + 5)
    assert len(alice.core.outbox.parked) == 1 and alice.core.idle


def test_a_channel_can_be_left_before_we_are_in_it():
    alice = Elsewhere(tidy=False)
    for text in ("/join #b", "/part #b bye"):
        alice.views += alice.core.typed(text)
    assert alice.sent(9) == ["JOIN #b", "PART #b bye"]


NO_MESSAGE_IS_REFUSED = [
    "518 alice #lobby :Cannot invite",
    "467 alice #lobby :Channel key already set",
    "478 alice #lobby b :Channel list is full",
    "482 alice #lobby :You're not channel operator",
    "FAIL MARKREAD INTERNAL_ERROR #lobby :no",
    "FAIL METADATA KEY_NO_PERMISSION #lobby key :no",
]


@pytest.mark.parametrize("line", NO_MESSAGE_IS_REFUSED)
def test_an_error_about_something_else_is_of_no_message(line):
    alice = Elsewhere(tidy=False)
    alice.types("hello")
    alice.sent(9)
    alice.hears(line)
    assert alice.kinds("failed") == [] and len(alice.core.outbox.waiting) == 1


def test_a_refused_notice_is_no_refused_message():
    alice = Elsewhere(tidy=False)
    alice.types("/notice #lobby psst", "hello")
    alice.sent(9)
    alice.hears("404 alice #lobby :Cannot send to channel")
    assert alice.kinds("failed") == []
    alice.hears("404 alice #lobby :Cannot send to channel")
    assert alice.kinds("failed")[0].endswith("hello")


def test_our_words_are_ours_under_the_nick_that_we_had_then():
    house = house_of("bob")
    alice = Pair(house, "alice")
    alice.typed("before")
    alice.typed("/nick anna")
    alice.drop()
    alice.connect()
    alice.typed("after")
    house.say("bob", "hi")
    alice.exchange()
    talk, address = alice.core.talk, alice.core.talk.mask.partition("!")[2]
    for source, mine in ((f"alice!{address}", True), ("alice!evil@elsewhere", False)):
        heard = chat.parse_heard(f":{source} PRIVMSG #lobby x")
        assert chat.spoken_view(talk, heard, "x").mine == mine


def test_history_without_ids_is_shown_once_over_restarts():
    db = chat.open_client_database(":memory:")

    def start():
        store = chat.ClientStore(db, "here", "alice")
        alice = Elsewhere(caps=PAGES_OF, store=store)
        for line in alice.sent(9):
            if "CHATHISTORY" in line:
                alice.hears("BATCH +1 chathistory #lobby")
                for n in range(3):
                    when = f"2026-01-01T00:00:0{n}.000Z"
                    alice.hears(f"@batch=1;time={when} :bob!u@h PRIVMSG #lobby :line {n}")
                alice.hears("BATCH -1")
        store.flush()
        return [view.text for view in alice.core.room.views if view.kind == "said"]

    assert start() == ["line 0", "line 1", "line 2"]
    assert start() == ["line 0", "line 1", "line 2"]


def test_a_second_join_with_the_right_password_lets_waiting_words_go():
    alice = Elsewhere(tidy=False)
    for text in ("/join #k", "/join #k sesame", "hello"):
        alice.views += alice.core.typed(text)
    alice.sent(9)
    alice.hears("475 alice #k :Cannot join channel (+k)", ":alice!u@h JOIN #k")
    assert alice.core.outbox.parked == {} and "PRIVMSG #k hello" in alice.sent(9)


def test_commands_of_a_pipe_wait_for_a_connection(folder):
    with serving("--data", folder / "srv") as (process, address):
        where = chat.address_text(*address)
        command = ("client", "bot", "--server", f"irc://{where}", "--commands", "--no-state")
        with program(*command, limits={"BACKOFF_FIRST": 0.1}) as client:
            assert client.stdout.readline().startswith(b"connected")
            process.kill()
            process.wait(PATIENCE)
            client.stdin.write(b"/msg #lobby one\n/msg #lobby two\n/me waves\n")
            client.stdin.close()
            options = ("--listen", where, "--data", folder / "srv")
            with program("server", *options) as again:
                again.stdout.readline()
                bob = Guest(address, "bob")
                assert client.wait(6 * PATIENCE) == 0
                bob.send("/history\n")
                texts = " ".join(bob.until("that was"))
                assert "one" in texts and "two" in texts and "*waves*" in texts
                bob.close()
                again.kill()


# What a connection costs, and how much is sent ahead


def test_a_connection_costs_little_before_the_first_acknowledgement():
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    for n in range(50):
        alice.views += alice.core.say(f"line {n}")
    alice.drop()
    alice.dial()
    carried = 0
    while alice.core.outbox.waiting and not alice.core.acknowledged:
        data = alice.core.take_output()
        house.say(alice.label, *data.split(b"\r\n")[:-1])
        house.turn()
        carried += len(data) + len(alice.conn.out)
        data, alice.conn.out = alice.conn.out, b""
        alice.core.feed(data)
    assert alice.core.acknowledged and carried <= 3_500  # both ways


def test_what_is_in_flight_grows_from_one_and_is_one_again_after_a_break():
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    for n in range(100):
        alice.views += alice.core.say(f"line {n}")
    seen = []
    for _ in range(4):
        seen.append(len(alice.core.outbox.in_flight))
        alice.step(math.inf, math.inf)
    assert seen == [1, 2, 4, 8]
    alice.drop()
    assert alice.core.outbox.window == 1


def test_an_echo_counts_although_the_page_before_it_is_still_on_its_way():
    alice = Elsewhere(caps=f"{PAGES_OF} echo-message labeled-response")
    assert alice.core.room.held is not None
    alice.types("hello")
    (id,) = alice.core.outbox.waiting
    alice.hears(f"@label={id};msgid=9 :alice!u@h PRIVMSG #lobby :hello")
    assert alice.core.outbox.waiting == {} and alice.kinds("arrived") == ["hello"]
    label = next(one.label for one in alice.core.talk.asked)
    alice.hears(f"@label={label} :x BATCH +1 chathistory #lobby")
    alice.hears(f"@batch=1;msgid=9;+chat.py/id={id} :alice!u@h PRIVMSG #lobby :hello", "BATCH -1")
    assert alice.said() == ["#lobby *alice: hello"]


def test_a_page_that_was_too_much_for_a_line_is_asked_for_in_parts():
    house = house_of("bob")
    alice = Pair(house, "alice", tidy=False)
    alice.drop()
    house.say("bob", *(f"line {n} {'x' * 100}" for n in range(300)))
    sizes = []
    for _ in range(3):
        alice.dial()
        alice.exchange(6)
        sizes.append(alice.core.page_lines)
        alice.core.talk.asked.append(chat.Asked("#lobby", "missed", 1))
        alice.drop()
    assert alice.core.page_lines < chat.PAGE_LINES
    alice.connect()
    alice.exchange(200)
    assert alice.texts("bob") == [f"line {n} {'x' * 100}" for n in range(300)]


# What a client keeps


def kept_client(house, db, name="alice", **options):
    store = chat.ClientStore(db, "here", name)
    return Pair(house, name, store=store, **options)


def test_a_client_that_starts_again_shows_what_it_had_and_fills_the_gap():
    house, db = house_of("bob"), chat.open_client_database(":memory:")
    alice = kept_client(house, db)
    alice.typed("hello")
    house.say("bob", "hi", "/tell alice psst")
    alice.exchange()
    alice.typed("/set time %H.%M")
    alice.typed("/ignore spammer")
    alice.core.tick()
    alice.drop()
    house.say("bob", "while you were away")
    again = chat.ClientCore("alice", store=chat.ClientStore(db, "here", "alice"), kind=chat.CHAT)
    assert sorted(again.rooms) == ["#lobby", "bob"]  # also without a connection
    lobby = again.rooms["#lobby"]
    assert [(view.name, view.text) for view in lobby.views] == [("alice", "hello"), ("bob", "hi")]
    assert [view.text for view in again.rooms["bob"].views] == ["psst"]
    assert again.setting("time") == "%H.%M" and again.ignored == {"spammer"}
    alice.core, alice.views = again, []
    alice.connect()
    assert [view.text for view in alice.core.rooms["#lobby"].views if view.kind == "said"] == [
        "hello",
        "hi",
        "while you were away",
    ]


def test_a_client_reads_back_and_searches_in_all_that_it_has_kept():
    db = chat.open_client_database(":memory:")
    store = chat.ClientStore(db, "here", "alice")
    for n in range(1000):
        text = f"number {n} {'needle' if n % 100 == 0 else 'hay'}"
        store.add("#a", chat.View(chat.SAID, text, "bob", "#a", n * 1000, id=f"m{n}"))
        store.add("#b", chat.View(chat.SAID, text, "bob", "#b", n * 1000, id=f"n{n}"))
    for _ in range(3):
        store.flush()
        store.index()
    core = chat.ClientCore("alice", store=store, join=["#a"])
    room = core.room
    assert len(room.views) == chat.STORED_LINES
    while core.older_from_store(room):
        pass
    assert [view.id for view in room.views] == [f"m{n}" for n in range(1000)]
    assert [view.text.split()[1] for view in store.find("needle", 100, "#a")] == [
        str(n) for n in range(0, 1000, 100)
    ]
    assert len(store.find("needle number", 100)) == 20
    assert store.find("", 100) == store.find('"', 100) == store.find("absent", 100) == []


def test_the_window_begins_with_what_was_kept(folder):
    options = chat.ClientOptions("alice", chat.parse_target("127.0.0.1:1"), state=folder)
    store = chat.ClientStore(chat.open_client_file(folder), "127.0.0.1:1", "alice")
    store.keep_room("#a", chat.Room("#a"))
    for n in range(3):
        store.add("#a", chat.View(chat.SAID, f"{n}", "bob", "#a", n, id=f"m{n}"))
    store.flush()
    engine = gui_client.Engine(options, lambda: None)
    engine.publish()
    events = engine.batches.get_nowait()
    rows = next(event.rows for event in events if isinstance(event, gui_client.Rows))
    assert [row.view.text for row in rows][:3] == ["0", "1", "2"]
    engine.loop.close()


def test_a_setting_of_another_client_is_used_a_second_later(tmp_path):
    one, other = (
        Elsewhere(store=chat.ClientStore(chat.open_client_file(tmp_path), "here", "alice"))
        for _ in range(2)
    )
    one.types("/set time %H.%M", "/ignore spammer")
    one.sent(1)
    other.sent(1)
    assert other.core.setting("time") == "%H.%M" and other.core.ignored == {"spammer"}
    other.types("/unignore spammer")
    assert one.core.ignored == {"spammer"}
    other.sent(1)
    one.sent(1)
    assert one.core.ignored == set() and one.core.setting("time") == "%H.%M"


def test_words_that_were_taken_back_are_not_in_the_store_any_more(tmp_path):
    db = chat.open_client_database(str(tmp_path / "client.db"))
    store = chat.ClientStore(db, "here", "alice")
    for n, indexed in enumerate((True, False)):
        view = chat.View(chat.SAID, "verysecret", "bob", "#a", 1, id=f"m{n}")
        store.add("#a", view)
        store.flush()
        if indexed:
            store.index()
        assert len(store.find("verysecret", 9)) == 1
        store.remove(f"m{n}")
        assert store.find("verysecret", 9) == [] and store.page("#a", 9) == []


def test_what_is_kept_is_one_users_and_one_servers():
    db = chat.open_client_database(":memory:")
    alice, bob = chat.ClientStore(db, "here", "alice"), chat.ClientStore(db, "here", "bob")
    there = chat.ClientStore(db, "there", "alice")
    alice.add("#a", chat.View(chat.SAID, "hi", "x", "#a", 1, id="m"))
    bob.add("#a", chat.View(chat.SAID, "hi", "x", "#a", 1, id="m"))
    alice.flush()
    bob.flush()
    assert (len(alice.page("#a", 9)), len(bob.page("#a", 9)), len(there.page("#a", 9))) == (1, 1, 0)
    alice.rename("#a", "#b")
    assert (len(alice.page("#b", 9)), len(bob.page("#a", 9))) == (1, 1)


def test_a_store_that_another_client_writes_to_is_written_a_turn_later(tmp_path):
    path = str(tmp_path / "client.db")
    one, other = chat.open_client_database(path), chat.open_client_database(path)
    store = chat.ClientStore(one, "here", "alice")
    other.execute("BEGIN IMMEDIATE")
    store.add("#a", chat.View(chat.SAID, "hi", "x", "#a", 1, id="m"))
    store.flush()
    store.index()
    assert store.waiting
    other.execute("COMMIT")
    store.flush()
    assert not store.waiting and len(store.page("#a", 9)) == 1


# What a screen asks of the core


def two_screens(**options):
    """Two clients that keep what they see, in one channel."""
    house = house_of()
    dbs = [chat.open_client_database(":memory:") for _ in range(2)]
    pairs = [kept_client(house, db, name) for db, name in zip(dbs, ("alice", "bob"), strict=True)]
    exchange_all(*pairs)
    return pairs


def exchange_all(*pairs):
    for _ in range(3):
        for pair in pairs:
            pair.exchange()


def last_of(pair, where="#lobby"):
    return [view for view in pair.core.rooms[where].views if view.kind == "said"][-1]


def test_what_is_typed_in_a_conversation_goes_there_although_another_is_looked_at():
    alice, bob = two_screens()
    alice.typed("/join #tea")
    lobby, tea = alice.core.rooms["#lobby"], alice.core.rooms["#tea"]
    assert alice.core.current is tea
    alice.core.typed("for the lobby", lobby)
    alice.core.typed("/topic begun in the lobby", lobby)
    exchange_all(alice, bob)
    assert alice.core.current is tea and lobby.topic == "begun in the lobby"
    assert bob.texts("alice") == ["for the lobby"]
    alice.core.typed("/query bob", lobby)  # a command may lead elsewhere
    assert alice.core.here == "bob"


def test_ids_of_conversations_stay_when_their_names_change():
    alice, bob = two_screens()
    bob.typed("/msg alice psst")
    alice.exchange()
    talk = alice.core.rooms["bob"]
    (said,) = (view for view in alice.views if view.text == "psst")
    assert said.room == talk.id and alice.core.by_id(talk.id) is talk
    bob.typed("/nick rob")
    alice.exchange()
    assert alice.core.rooms["rob"] is talk is alice.core.by_id(said.room)
    renamed = [view for view in alice.views if view.kind == chat.ROOM and view.room == talk.id]
    assert renamed[-1].where == "rob"
    assert alice.core.by_id(0) is None


def test_an_answer_carries_the_id_of_what_it_answers():
    alice, bob = two_screens()
    bob.typed("who has tea?")
    alice.exchange()
    asked = last_of(alice)
    alice.core.typed("I have", reply=asked.id)
    exchange_all(alice, bob)
    answer = last_of(bob)
    assert (answer.text, answer.reply) == ("I have", asked.id) and last_of(alice).reply == asked.id
    assert bob.core.answered_words(answer) == "bob: who has tea?"
    bob.typed("/reply thank you")  # to the last one of another user
    alice.exchange()
    assert alice.core.answered_words(last_of(alice)) == "alice: I have"
    alice.typed("/reply -2 and milk?")
    assert last_of(alice).reply == asked.id
    alice.typed("/reply -9 nothing")
    assert any(view.kind == chat.BACK for view in alice.views)
    bob.core.store.flush()
    assert bob.core.store.page("#lobby", 9)[1].reply == asked.id


def test_an_answer_that_waits_is_still_one_after_a_restart(tmp_path):
    outbox = outbox_in(tmp_path)
    outbox.add(1.0, "#lobby", "I have", chat.MESSAGE, "abc")
    outbox.add(1.0, "#lobby", "plain", chat.MESSAGE)
    outbox.save(0)
    outbox.rows.close()
    assert [one.reply for one in outbox_in(tmp_path).waiting.values()] == ["abc", ""]


def test_reactions_are_seen_kept_and_taken_back():
    alice, bob = two_screens()
    bob.typed("tea is ready")
    alice.exchange()
    alice.typed("/react \U0001f375")
    bob.exchange()
    id = last_of(bob).id
    assert bob.core.reactions_of(id) == alice.core.reactions_of(id) == {"\U0001f375": ["alice"]}
    reacted = [view for view in bob.views if view.kind == chat.REACTED]
    assert [(view.name, view.id, view.number) for view in reacted] == [("alice", id, 1)]
    assert sum(view.kind == chat.REACTED for view in alice.views) == 1  # its echo is no news
    alice.typed("/unreact \U0001f375")
    bob.exchange()
    assert bob.core.reactions_of(id) == {} and bob.views[-1].number == -1
    alice.typed("/react \U0001f375")
    bob.typed("/redact")
    alice.exchange()
    assert alice.core.reactions_of(id) == {}


def test_typing_is_told_now_and_then_and_ends_by_itself():
    alice, bob = two_screens()
    clock = [100.0]
    alice.core.ticks = bob.core.ticks = lambda: clock[0]
    here, there = alice.core.rooms["#lobby"], bob.core.rooms["#lobby"]
    for _ in range(3):  # keys
        alice.core.typing(here, "active")
        alice.core.flush()
    sent = alice.core.output.copy()
    exchange_all(alice, bob)
    assert len(sent) == 1 and "+typing=active" in sent[0]
    assert list(there.typing) == ["alice"] and alice.core.rooms["#lobby"].typing == {}
    assert chat.typing_text(there.typing) == "alice is typing"
    clock[0] += 7
    bob.core.tick()
    assert there.typing == {}
    alice.core.typing(here, "active")
    alice.core.flush()
    exchange_all(alice, bob)
    assert list(there.typing) == ["alice"]
    alice.typed("there it is")  # which says as much as "done"
    bob.exchange()
    assert there.typing == {}
    alice.typed("/set typing off")
    alice.core.typing(here, "active")
    alice.core.flush()
    assert alice.core.output == []


TYPISTS = [
    ([], ""),
    (["bob"], "bob is typing"),
    (["bob", "eve"], "bob and eve are typing"),
    (["bob", "eve", "joe"], "bob and 2 others are typing"),
]


@pytest.mark.parametrize(("names", "text"), TYPISTS)
def test_typing_users_are_told_in_words(names, text):
    assert chat.typing_text(names) == text


def test_a_muted_conversation_calls_no_one_and_stays_muted():
    alice, bob = two_screens()
    alice.typed("/mute")
    alice.typed("/join #tea")
    bob.typed("alice: tea!")
    alice.exchange()
    lobby = alice.core.rooms["#lobby"]
    assert (lobby.unread, lobby.called, lobby.muted) == (1, 0, True)
    again = chat.ClientCore("alice", store=alice.core.store)
    assert again.rooms["#lobby"].muted
    alice.typed("/unmute #lobby")
    bob.typed("alice: now?")
    alice.exchange()
    assert lobby.called == 1


def test_what_was_read_on_one_device_is_read_on_the_other():
    alice, bob = two_screens()
    alice.typed("/register secret-of-alice")
    login = chat.Login("alice", "secret-of-alice")
    phone = kept_client(alice.house, chat.open_client_database(":memory:"), "Alice", login=login)
    phone.core.reads_at_once = False
    phone.typed("/join #lobby")
    bob.typed("one")
    bob.typed("alice: two")
    exchange_all(alice, phone)
    lobby = phone.core.rooms["#lobby"]
    assert (lobby.unread, lobby.called) == (2, 1)
    alice.core.tick()  # it is shown there
    exchange_all(alice, phone)
    assert (lobby.unread, lobby.called, lobby.read_time) == (0, 0, last_of(phone).time)
    assert any(view.kind == chat.READ and view.room == lobby.id for view in phone.views)
    bob.typed("three")
    phone.exchange()
    assert lobby.unread == 1
    phone.core.mark_read(lobby)
    phone.core.tick()
    assert lobby.unread == 0 and "MARKREAD #lobby" in phone.core.output[0]
    phone.exchange()
    again = chat.ClientCore("Alice", store=phone.core.store)
    assert again.rooms["#lobby"].read_time == last_of(phone).time


def test_members_are_known_with_rank_absence_and_bots():
    alice, bob = two_screens()
    bob.typed("/away tea")
    lobby = alice.core.rooms["#lobby"]
    alice.core.ask_people(lobby)
    alice.core.ask_people(lobby)
    assert sum("WHO" in line for line, _ in alice.core.talk.queue) == 1
    alice.exchange()
    people = {one.name: one for one in alice.core.people(lobby)}
    assert people["bob"].away and not people["alice"].away
    bob.typed("/back")
    bob.typed("/raw MODE bob +B")
    alice.exchange()
    lobby.asked_people = False
    alice.core.ask_people(lobby)
    alice.exchange()
    people = {one.name: one for one in alice.core.people(lobby)}
    assert not people["bob"].away and people["bob"].bot
    bob.typed("/nick rob")
    alice.exchange()
    assert {one.name: one.bot for one in alice.core.people(lobby)}["rob"]
    bob.typed("/quit")
    alice.exchange()
    assert alice.core.known_people == {}


def test_one_message_that_could_not_be_sent_is_sent_again_or_dropped():
    there = Elsewhere("NETWORK=x", join=["#a"])
    there.hears(":alice!u@h JOIN #a", ":op!u@h KICK #a alice :out")
    there.types("one", "two").sent()
    first, second = there.core.outbox.parked
    there.core.cancel(first)
    there.views += there.core.take_views()
    assert [view.own_id for view in there.views if view.kind == chat.REMOVED] == [first]
    assert not any(view.own_id == first for view in there.core.rooms["#a"].views)
    there.core.retry(second)
    there.core.flush()
    assert there.sent()[0] == "JOIN #a"
    there.hears(":alice!u@h JOIN #a")
    assert "PRIVMSG #a two" in there.sent() and not there.core.outbox.parked
    there.core.cancel(second)  # it is under way
    assert second in there.core.outbox.waiting


def test_pages_before_after_and_around_a_kept_message_fit_together():
    alice, bob = two_screens()
    for n in range(30):
        bob.typed(f"line {n}")
    alice.exchange()
    lobby = alice.core.rooms["#lobby"]
    (hit,) = [view for view in alice.core.find_kept("12", lobby) if view.text == "line 12"]
    page = alice.core.around(lobby, hit, 10)
    assert [view.text for view in page] == [f"line {n}" for n in range(7, 18)]
    before = alice.core.kept_beside(lobby, page[0], 5)
    after = alice.core.kept_beside(lobby, page[-1], 50, True)
    assert [view.text for view in before] == [f"line {n}" for n in range(2, 7)]
    assert [view.text for view in after] == [f"line {n}" for n in range(18, 30)]


def test_results_go_to_a_screen_that_wants_them_apart():
    alice, bob = two_screens()
    bob.typed("tea at five")
    alice.exchange()
    got = []
    alice.core.results = lambda title, views: got.append((title, [view.text for view in views]))
    alice.typed("/search tea")
    alice.typed("/lastlog nothing-of-that")
    assert [texts for _, texts in got] == [["tea at five"], []]


def test_a_store_of_the_version_before_is_taken_over(tmp_path):
    path = str(tmp_path / "client.db")
    db = sqlite3.connect(path)
    old = chat.CLIENT_TABLES.replace("user_version = 3", "user_version = 1")
    old = re.sub(r",\n    reply TEXT[^\n]*\n    file TEXT[^\n]*\n", "\n", old)
    tables = "reactions|transfers|servers|logins|outboxes|outbox"
    old = re.sub(rf"CREATE TABLE IF NOT EXISTS ({tables}) .*?;\n", "", old, flags=re.DOTALL)
    old = re.sub(r"    (muted|read_time|place) INTEGER[^\n]*\n", "", old)
    db.executescript(old)
    db.execute("INSERT INTO owners VALUES (1, 'here', 'alice')")
    db.execute("INSERT INTO rooms VALUES (1, '#tea', '#tea', '', 1, 1, 'half')")
    db.execute(
        "INSERT INTO messages VALUES (1, 1, '#tea', 5, 'x', '', 'said', 'bob', 'hi', '#tea', 0, 0)"
    )
    db.commit()
    db.close()
    store = chat.ClientStore(chat.open_client_database(path), "here", "alice")
    (room,) = store.rooms()
    assert (room.name, room.draft, room.muted, room.read_time) == ("#tea", "half", False, 0)
    assert [(view.text, view.reply) for view in store.page("#tea", 9)] == [("hi", "")]
    store.react("x", "+", "bob", True)
    assert store.reactions("x") == [("+", "bob")]
    store.db.close()


def test_other_servers_are_asked_for_nothing_that_they_do_not_take():
    there = Elsewhere("CLIENTTAGDENY=*", caps="message-tags")
    room = there.core.rooms["#lobby"]
    there.hears("@msgid=1 :bob!u@h PRIVMSG #lobby :hello")
    there.core.typing(room, "active")
    there.types("/react +1")
    assert there.sent() == [] and there.kinds("back") == ["/react +1"]
    assert not any(map(there.core.can, ("reply", "react", "typing", "redact")))
    there.core.typed("I answer", room, reply="1")  # still a message
    assert [line.rpartition(":")[2] for line in there.sent()][0] == "I answer"


def test_joins_in_one_row_never_come_behind_what_their_users_did():
    clock = [0.0]
    there = Elsewhere(join=["#a"], clock=lambda: clock[0])
    room = there.core.rooms["#a"]
    there.hears(":eve!u@h JOIN #a", ":bot!u@h JOIN #a", ":bot!u@h PRIVMSG #a :done")
    there.hears(":joe!u@h JOIN #a", ":bot!u@h PART #a", ":joe!u@h PART #a")
    clock[0] = 61.0
    there.sent(1)
    rows = [view.text or f"{view.name} {view.kind}" for view in room.views]
    assert rows == ["eve came", "bot came", "done", "bot went", "joe joined and left"]


def test_a_message_to_another_conversation_is_told_where_the_user_looks():
    desk = Desk()
    desk.core.rooms["#lobby"].inside = True
    desk.core.talk = types.SimpleNamespace(ready=True, pages=False, pieces=(), pump=chat.do_nothing)
    desk.core.send("#rust", "shall we have tea?")
    desk.tell(*desk.core.take_views())
    assert "you to #rust: shall we have" in "\n".join(desk.screen.lines)
    assert [view.text for view in desk.core.rooms["#rust"].views] == ["shall we have tea?"]
    desk.core.send("#lobby", "no more than once")
    desk.tell(*desk.core.take_views())
    assert not any("you to #lobby" in line for line in desk.screen.lines)


def test_conversations_keep_their_order_over_a_restart_also_one_that_the_user_gave_them():
    alice, bob = two_screens()
    alice.typed("/msg zoe hello")
    alice.typed("/join #tea")
    alice.typed("/join #a")
    alice.core.close_store()
    again = chat.ClientCore("alice", store=alice.core.store)
    assert list(again.rooms) == ["#lobby", "zoe", "#tea", "#a"]
    again.move(again.rooms["#a"], 1)
    again.move(again.rooms["#lobby"], 3)
    again.close_store()
    third = chat.ClientCore("alice", store=alice.core.store)
    assert list(third.rooms) == ["#a", "zoe", "#tea", "#lobby"]


def test_a_user_who_leaves_is_told_once_where_the_server_has_monitor():
    there = Elsewhere("MONITOR=100")
    there.hears(":bob!u@h PRIVMSG alice :hi", ":bob!u@h QUIT :bye", "731 alice :bob")
    assert there.kinds("told")[-1] == "bob has left: bye"
    there.hears("730 alice :bob!u@h")
    assert there.kinds("told")[-1] == "bob is here"


def test_channels_are_completed_whatever_the_case():
    assert chat.completions("#te", False, [], ["#TEa", "#rust"]) == ["#TEa "]


def test_a_missing_password_is_told_once_with_the_way_out():
    there = Elsewhere()
    there.core.talk.ready = False
    there.hears("464 alice :Password incorrect")
    assert there.kinds("told") == ["you are alice"]
    assert there.core.refusal == "Password incorrect; /pass PASSWORD gives it"
    assert there.core.cause == chat.NEEDS_USER


# Found by real use


def test_what_a_client_does_without_a_connection_is_stored_all_the_same():
    link = Hanging(True, 60.0)
    link.core.store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    link.core.store.keep_room("#tea", chat.Room("#tea"))
    link._watch()
    assert not link.core.store.waiting and [room.name for room in link.core.store.rooms()]


def test_a_server_that_stood_stays_when_it_cannot_be_trusted_any_more():
    link = Hanging(True, 60.0)
    link.phase, link.stays = chat.SECURING, True
    link.known, link.unpinned = known_servers(), "ab" * 32
    link.lost(f"{chat.TLS_TROUBLE}{chat.NOT_SIGNED}: self-signed certificate")
    assert link.phase == chat.WAITING and link.doubted == "ab" * 32
    (note,) = [view.text for view in link.log if view.kind == "note"]
    assert "ANOTHER CERTIFICATE" in note and "/trust believes the new one" in note
    link.typed("/trust")
    assert link.phase == chat.RESOLVING and link.pin == "ab" * 32
    link = Hanging(True, 60.0)  # one that never stood: a wrong address, say
    link.phase = chat.REGISTERING
    cause(link, "fatal")
    assert link.ended
    link = Hanging(True, 60.0)
    link.phase, link.stays = chat.ONLINE, True
    cause(link, "fatal")
    assert link.phase == chat.WAITING
    link.reconnect()
    assert link.phase == chat.RESOLVING


def test_the_last_message_is_the_one_that_was_there_when_the_command_was_begun():
    alice, bob = two_screens()
    bob.typed("QUESTION")
    alice.exchange()
    begun = alice.core.room.views.total
    bob.typed("something else")
    alice.exchange()
    alice.core.typed("/reply my answer", None, "", begun)
    exchange_all(alice, bob)
    assert bob.core.answered_words(last_of(bob)) == "bob: QUESTION"
    alice.typed("/reply 3 beers please")  # a number is text
    assert (last_of(alice).text, bob.core.answered_words(last_of(alice))) == (
        "3 beers please",
        "bob: something else",
    )


@pytest.mark.parametrize("text", ["/redact abc", "/redact 0", "/redact 2", "/redact -0"])
def test_what_is_no_number_takes_nothing_back(text):
    alice, _ = two_screens()
    alice.typed("keep this")
    alice.typed(text)
    assert last_of(alice).text == "keep this"
    assert [view.text for view in alice.views if view.kind == "back"] == [text]


def test_a_message_that_is_not_confirmed_is_the_one_that_redact_means():
    alice, _ = two_screens()
    alice.typed("keep this")
    alice.core.typed("a typo")
    alice.views += alice.core.typed("/redact")
    assert any("has not confirmed that message yet" in view.text for view in alice.views)
    alice.exchange()
    alice.typed("/redact")
    assert [view.text for view in alice.core.room.views if view.kind == "said"] == ["keep this"]


def test_a_channel_that_is_named_is_entered_beside_those_of_the_last_time():
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    store.keep_room("#tea", chat.Room("#tea"))
    store.flush()
    core = chat.ClientCore("alice", join=["#lobby"], store=store, named=True)
    assert [room.name for room in core.rooms.values()] == ["#lobby", "#tea"]
    assert core.here == "#lobby" and core.room.wanted
    core = chat.ClientCore("alice", store=store)
    assert list(core.rooms) == ["#tea"]


def test_a_long_paste_goes_on_where_it_broke_off():
    alice = Elsewhere(caps="echo-message")
    text = "\n".join(f"line {n}" for n in range(30))
    alice.types(text)
    sent = [line for line in alice.sent(12) if line.startswith("PRIVMSG")]
    assert 5 < len(sent) < 30
    for line in sent[:5]:
        alice.hears(f":alice!u@h {line}")
    alice.views += alice.core.disconnected()
    assert "5 of 30 lines have arrived" in alice.kinds("failed")[-1]
    alice.connect(caps="echo-message")
    alice.types("/retry")
    rest = [line for line in alice.sent(90) if line.startswith("PRIVMSG")]
    assert [line.partition(" :")[2] for line in rest] == [f"line {n}" for n in range(5, 30)]


def test_how_much_of_a_paste_arrived_outlives_the_program(tmp_path):
    outbox = outbox_in(tmp_path)
    one = outbox.add(1.0, "#lobby", "one\ntwo", chat.MESSAGE)
    outbox.arrived_to(one.id, 3)
    outbox.arrived_to("unknown", 3)
    outbox.save(0)
    outbox.rows.close()
    assert [one.at for one in outbox_in(tmp_path).waiting.values()] == [3]


def test_a_long_paste_is_told_about_while_it_goes_out():
    alice = Elsewhere()
    alice.types("\n".join(f"line {n}" for n in range(30)))
    display = chat.Display(alice.core, chat.Palette(False), 80, 20)
    alice.sent(9)
    talk = alice.core.talk
    assert (f"{30 - len(talk.pieces)} of 30 lines sent", (33,)) in display.parts("", 1)
    alice.types("/cancel")
    assert "/cancel all drops what waits" in alice.kinds("note")[-1]
    gone = 30 - len(talk.pieces)
    alice.types("/cancel all")
    assert alice.kinds("note")[-1] == f"{gone} of 30 lines sent, the rest dropped"
    assert not alice.core.outbox.waiting and display.parts("", 0)[0][0] != "waiting"


def test_a_search_that_was_left_does_not_send_an_old_line():
    editor = chat.LineEditor()
    for text in ("find this remark", "other"):
        editor.set(text)
        editor.press(chat.Key("enter"))
    editor.press(chat.Key("search"))
    editor.press(chat.Key("text", "find"))
    assert editor.text == "find this remark" and editor.sought == "find"
    editor.forget()
    editor.press(chat.Key("search"))
    editor.press(chat.Key("text", "hello world"))
    assert editor.text == "" and editor.press(chat.Key("enter")) == ""
    desk = Desk()
    assert desk.display.prompt("find") == "(search: find) "


def test_what_waits_over_a_restart_has_the_time_when_it_was_accepted():
    outbox = chat.Outbox()
    outbox.add(1_700_000_000.0, "#lobby", "waiting", chat.MESSAGE)
    core = chat.ClientCore("alice", outbox=outbox)
    (view,) = core.rooms["#lobby"].views
    assert view.time == 1_700_000_000_000
    assert chat.accepted_at("of-another-make") is None


def test_a_reaction_cannot_forge_a_row():
    alice, bob = two_screens()
    alice.typed("one\ntwo")
    bob.exchange()
    desk = Desk(columns=70)
    desk.display.core, id = bob.core, last_of(bob).id
    bob.views.clear()
    tags = f"@+draft/react=x\\n11:21\\sbob:\\sPIN;+draft/reply={id}"
    views = bob.core.feed(f"{tags} :eve!u@h TAGMSG #lobby\r\n".encode())
    (view,) = [one for one in views if one.kind == chat.REACTED]
    assert "\n" not in view.text
    desk.display.take([view])
    (row,) = [one for one in bob.core.room.views if one.kind == "told"]
    assert "\n" not in row.text and row.text.startswith("eve reacted x")
    bob.core.remove(id)
    desk.display.take(bob.core.take_views())
    assert not [one for one in bob.core.room.views if "eve reacted" in one.text]


def test_rows_of_several_lines_are_several_rows():
    view = chat.View(chat.FAILED, "why: one\ntwo", time=0)
    look = chat.Look(chat.Palette(False))
    told = view._replace(kind=chat.TOLD)
    assert len(chat.view_lines(view, look)) == len(chat.view_lines(told, look)) == 2
    long = "\n".join(f"line {n}" for n in range(100))
    assert chat.beginning(long) == "line 0 \u2026" and len(chat.beginning("x" * 9999)) < 500


def test_an_error_about_a_user_is_shown_where_the_command_was_typed():
    there = Elsewhere()
    there.hears(":inga!u@h PRIVMSG alice :hi")
    there.types("/nick inga")
    there.hears("433 alice inga :Nickname is already in use")
    (told,) = [view for view in there.views if "already in use" in view.text]
    assert told.where == ""
    there.hears("482 alice #lobby :You're not channel operator")
    assert [view.where for view in there.views if "operator" in view.text] == ["#lobby"]


def test_a_topic_that_is_gone_after_a_restart_is_gone_here():
    there = Elsewhere()
    there.hears("332 alice #lobby :old")
    assert there.core.room.topic == "old"
    there.hears(":alice!u@h JOIN #lobby", "331 alice #lobby :No topic is set")
    assert there.core.room.topic == ""


@pytest.mark.parametrize("text", ["/react -1", "/react " + "x" * 33])
def test_a_reaction_without_an_emoji_or_with_a_book_is_refused(text):
    alice, bob = two_screens()
    bob.typed("hi")
    alice.exchange()
    alice.typed(text)
    assert [view.text for view in alice.views if view.kind == "back"] == [text]
    assert bob.core.reactions_of(last_of(bob).id) == {}


def test_a_reaction_is_shown_when_the_server_has_taken_it():
    alice, bob = two_screens()
    bob.typed("hi")
    alice.exchange()
    alice.views += alice.core.typed("/react +1")
    assert alice.core.reactions_of(last_of(alice).id) == {}
    alice.exchange()
    assert alice.core.reactions_of(last_of(alice).id) == {"+1": ["alice"]}


def test_typing_is_told_although_a_message_is_left_to_the_user():
    there = Elsewhere(caps="message-tags")
    there.types("x")
    there.sent(9)
    (id,) = there.core.outbox.waiting
    there.core.park(id, "for a test")
    there.core.typing(there.core.room, "active")
    there.core.flush()
    assert there.sent() == ["@+typing=active TAGMSG #lobby"]


def test_typing_is_passed_on_and_not_kept():
    house = House()
    house.enter_irc("alice", "bob")
    for name in ("alice", "bob"):
        caps = "message-tags batch draft/event-playback draft/chathistory"
        says(house, name, f"CAP REQ :{caps}", "JOIN #a")
    house.heard("bob")
    says(house, "alice", "@+typing=active TAGMSG #a", "@+draft/react=x;+draft/reply=y TAGMSG #a")
    heard = house.heard("bob")
    assert ["+typing=active" in line for line in heard] == [True, False]
    says(house, "bob", "CHATHISTORY LATEST #a * 10")
    page = "\n".join(house.heard("bob"))
    assert "+draft/react=x" in page and "+typing" not in page


def test_the_hint_for_netcat_is_not_shown_by_a_client():
    core = chat.ClientCore("alice", kind=chat.CHAT)
    core.connected()
    assert [view for view in core.feed(chat.GREETING) if view.text] == []


def test_private_messages_wait_for_a_connection_like_others():
    core = chat.ClientCore("alice")
    core.typed("/msg bob one")
    core.typed("/query bob two")
    assert [(one.where, one.text) for one in core.outbox.waiting.values()] == [
        ("bob", "one"),
        ("bob", "two"),
    ]
    views = core.typed("/msg NickServ help")
    assert [view.kind for view in views] == ["back", "note"]


def test_answers_to_pings_and_lists_of_bans_are_told_in_words():
    there = Elsewhere()
    there.now = 100.0
    there.hears(":bob!u@h NOTICE alice :\x01PING 97.5\x01")
    assert there.kinds("told")[-1] == "bob answers PING: after 2.5 s"
    there.hears("367 alice #lobby *!*@spam op!u@h 1795691458")
    assert there.kinds("told")[-1] == "banned: *!*@spam by op on 2026-11-26 11:10 UTC"
    there.types("/who")
    assert there.sent() == ["WHO #lobby"]


def test_names_of_settings_and_topics_are_completed():
    core = chat.ClientCore("alice")
    assert chat.complete_line(core, "/set b", "b") == ["bell "]
    assert chat.complete_line(core, "/help re", "re")[0].startswith("re")


def test_older_messages_of_an_empty_conversation_are_its_last_ones():
    caps = "draft/chathistory batch message-tags server-time"
    there = Elsewhere("CHATHISTORY=100", caps=caps)
    room = there.core.rooms["#lobby"]
    there.core.talk.ask_history(room, "older")
    there.core.flush()
    assert any("CHATHISTORY LATEST #lobby *" in line for line in there.sent(9))


def test_the_last_lines_of_the_protocol_can_be_looked_at_without_secrets():
    there = Elsewhere(password="sesame")
    there.types("/raw OPER boss swordfish", "/login alice openSesame", "/raw")
    there.sent(9)
    there.types("/raw")
    page = [view.text for view in there.views if view.kind == chat.PAGE][-1]
    assert "> PASS \u2026" in page and "> OPER boss \u2026" in page
    assert "< :irc.example 001 alice" in page
    assert not re.search("sesame|swordfish", page, re.IGNORECASE)


def test_a_plain_server_is_asked_for_nothing_that_it_does_not_know():
    core = chat.ClientCore("alice", kind=chat.PLAIN)
    core.connected()
    core.take_output()
    room = core.rooms["#lobby"]
    core.ask_people(room)
    core.typing(room, "active")
    core.mark_read(room)
    core.tick()
    assert core.take_output() == b"" and core.people(room) == []


def test_what_was_taken_back_while_a_client_was_away_is_gone_there_too():
    house = house_of()
    db = chat.open_client_database(":memory:")
    alice = kept_client(house, db)
    bob = kept_client(house, chat.open_client_database(":memory:"), "bob")
    bob.typed("I regret this")
    bob.typed("and stand by that")
    exchange_all(alice, bob)
    alice.drop()
    bob.typed("/redact -2")
    bob.exchange()
    alice.connect()
    exchange_all(alice, bob)
    said = [view.text for view in alice.core.rooms["#lobby"].views if view.kind == "said"]
    assert said == ["and stand by that"]
    alice.core.store.flush()
    assert [view.text for view in alice.core.store.page("#lobby", 9)] == ["and stand by that"]
    bob.typed("/redact")  # nothing is new but this
    alice.drop()
    alice.connect()
    exchange_all(alice, bob)
    assert [view for view in alice.core.rooms["#lobby"].views if view.kind == "said"] == []


@pytest.mark.parametrize("known", [True, False])
def test_reactions_made_while_a_client_was_away_are_told_to_it_below_the_messages(known):
    """`known`: it had the message before it went."""
    house = house_of()
    alice, bob, carol = (
        kept_client(house, chat.open_client_database(":memory:"), name)
        for name in ("alice", "bob", "carol")
    )
    if not known:
        alice.drop()
    bob.typed("tea?")
    exchange_all(*[alice] * known, bob, carol)
    if known:
        alice.drop()
    for text in ("/react +1", "/react no", "/unreact no", "/react yes"):
        carol.typed(text)
    bob.typed("it is ready")
    exchange_all(bob, carol)
    seen = len(alice.views)
    alice.connect()
    exchange_all(alice, bob, carol)
    said = next(view for view in alice.core.rooms["#lobby"].views if view.text == "tea?")
    assert alice.core.reactions_of(said.id) == {"+1": ["carol"], "yes": ["carol"]}
    views = alice.views[seen:]
    kinds = [view.kind for view in views if view.kind in ("said", chat.REACTED)]
    assert kinds == ["said"] * (1 if known else 2) + [chat.REACTED] * 4
    seen = len(alice.views)
    alice.drop()
    alice.connect()
    exchange_all(alice, bob, carol)
    assert [view for view in alice.views[seen:] if view.kind == chat.REACTED] == []


def test_reactions_come_with_pages_for_our_own_clients_only_and_once():
    house = house_of()
    house.enter_irc("alice")
    house.say("alice", "CAP REQ :message-tags batch echo-message server-time", "JOIN #a")
    house.turn()
    id = said_with_id(house, "alice", "#a", "tea?")
    house.say("alice", f"@+draft/react=x;+draft/reply={id} TAGMSG #a")
    house.turn()
    house.heard("alice")

    def told(*caps):
        if caps:
            house.say("alice", f"CAP REQ :{' '.join(caps)}")
            house.turn()
        return str(ask(house, "alice", "CHATHISTORY LATEST #a * 10")).count("+draft/react=x")

    assert told() == 0 and told("chat.py/session") == 1 and told("draft/event-playback") == 1


# Phases and causes


class Hanging(chat.Link):
    """A link of which nothing but the phases is there."""

    def __init__(self, asks, patience):
        self.log = []
        loop = FakeLoop(0.0)
        loop.call_later = lambda seconds, callback: chat.Timer(seconds, callback)
        core = chat.ClientCore("alice")
        super().__init__(
            loop,
            chat.Target("127.0.0.1", 1),
            core,
            self.log.extend,
            self.log.append,
            patience=patience,
            asks=asks,
        )
        self.helpers = FakeHelpers()
        self.helpers.submit = lambda *_: None


CAUSES = ["reset", "refused", "banned", "fatal", "redial", "quit", "untrusted", "no TLS"]


def cause(link, what):
    core = link.core
    core.refusal, core.cause, core.redial, core.quitting = "", chat.TEMPORARY, False, False
    if what in ("refused", "banned", "fatal"):
        causes = {"refused": chat.TEMPORARY, "banned": chat.NEEDS_USER, "fatal": chat.FATAL}
        core.refuse(what, causes[what])
    core.redial, core.quitting = what == "redial", what == "quit"
    words = {"untrusted": f"{chat.NOT_SIGNED}: self-signed certificate", "no TLS": "no answer"}
    link.lost(chat.TLS_TROUBLE + words[what] if what in words else chat.HUNG_UP)


@pytest.mark.parametrize("patience", [0.0, 60.0])
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("what", CAUSES)
@pytest.mark.parametrize("phase", [p for p in chat.FOLLOWING if p not in ("waiting", "ended")])
def test_each_cause_in_each_phase_has_one_way_on(phase, what, asks, patience):
    link = Hanging(asks, patience)
    link.phase = phase
    cause(link, what)
    assert link.phase in (chat.WAITING, chat.RESOLVING, chat.ENDED)
    if link.phase == chat.WAITING:  # there is a way out: a timer, or the user
        assert link.again or asks
        link.core.wants_connection = True
        link.typed("/reconnect")
        assert link.phase == chat.RESOLVING


def test_any_causes_in_any_order_break_no_link(seeded):
    for _ in range(200):
        link = Hanging(seeded.random() < 0.5, seeded.choice([0.0, 60.0]))
        link.start()
        for _ in range(20):
            if link.ended:
                break
            if link.phase == chat.WAITING:
                link.reconnect()
            link.phase = seeded.choice([p for p in chat.FOLLOWING if p not in ("waiting", "ended")])
            cause(link, seeded.choice(CAUSES))


def test_the_back_off_grows_until_there_is_progress_and_a_welcome_alone_is_none():
    link = Hanging(True, 60.0)
    link.phase = chat.ONLINE
    for _ in range(10):
        link.lost("reset")
        link.phase = chat.ONLINE
        link._stand()
    assert link.backoff == chat.BACKOFF_MOST
    link.core.progress += 1
    link._stand()
    assert link.backoff == chat.BACKOFF_FIRST


def test_a_client_that_was_stopped_does_not_take_the_server_for_dead():
    link = Hanging(True, 60.0)
    dropped = []
    link.conn = types.SimpleNamespace(heard=0.0, drop=dropped.append, unsent=0, write=bool)
    link.phase, link.core.kind = chat.ONLINE, chat.IRC
    link.core.connected()
    link.core.feed(b":x 001 alice :hi\r\n")
    for now in (1.0, 2.0, 1000.0, 1001.0):  # it was stopped for a quarter of an hour
        link.loop.now = now
        link._watch()
    assert dropped == []
    for now in range(1002, 1100):
        link.loop.now = float(now)
        link._watch()
    assert dropped and dropped[0].startswith("no answer for")


WRONG_CERTIFICATES = [
    ("self-signed certificate (_ssl.c:1006)", "is not signed by an authority"),
    ("unable to get local issuer certificate (_ssl.c:1006)", "is not signed by an authority"),
    ("certificate has expired (_ssl.c:1006)", "has expired"),
    ("Hostname mismatch, certificate is not valid for 'x'. (_ssl.c:1006)", "is for another host"),
    ("IP address mismatch, certificate is not valid for '127.0.0.1'.", "is for another host"),
]


@pytest.mark.parametrize("words, why", WRONG_CERTIFICATES)
def test_what_is_wrong_with_a_certificate_is_said(words, why):
    assert chat.why_not_trusted(f"[SSL] {chat.NOT_SIGNED}: {words}").startswith(why)


def test_a_pinned_certificate_may_be_replaced_by_one_that_is_signed(running, certificate, folder):
    server = running(tls_cert=certificate)
    target = chat.parse_target(f"ircs://localhost:{server.address[1]}")
    known = known_servers()
    known.remember(target, pin="00" * 32)
    alice = Linked(target, known, trust=chat.Trust(ca=certificate))
    alice.until(lambda: alice.core.ready)
    assert alice.noted("has a new certificate, signed by a trusted authority")
    assert known.pin(target) is None
    alice.close()


def test_a_policy_for_tls_is_kept_as_long_as_the_server_said(tmp_path):
    known = known_servers()
    known.remember("irc.example", port=6697, until=time.time() + 60)
    link = Hanging(True, 60.0)
    link.known, link.target = known, chat.parse_target("irc://irc.example")
    link._apply_policy()
    assert (link.target.tls, link.target.port) == (True, 6697)
    known.remember("irc.example", until=time.time() - 1)
    link.target = chat.parse_target("irc://irc.example")
    link._apply_policy()
    assert not link.target.tls


# The terminal


WIDTHS_IN_TMUX = [  # as tmux 3.3 with glibc 2.36 has it
    ("नमस्ते", 4),
    ("தமிழ்", 4),
    ("क्षि", 3),
    ("কি", 2),
    ("မြန်မာ", 5),
    ("\u1112\u1161\u11ab", 2),  # Hangul of three conjoining parts
    ("a\xadb", 3),
    ("한글", 4),
]


@pytest.mark.parametrize("text, columns", WIDTHS_IN_TMUX)
def test_text_is_as_wide_as_terminals_show_it(text, columns):
    assert chat.width(text) == columns


@pytest.mark.parametrize(
    "keys", [b"\x1b]11;rgb:0/0/0\x07x", b"\x1bP1+r\x1b\\x", b"\x1b_Gi=1\x1b\\x"]
)
def test_answers_of_a_terminal_are_no_keys(keys):
    for n in range(2, len(keys)):  # after a lone ESC the rest is told by its time, see below
        decoder = chat.KeyDecoder()
        found = decoder.feed(keys[:n]) + decoder.flush() + decoder.feed(keys[n:])
        assert found == [chat.Key("text", "x")], n


def test_an_escape_sequence_that_is_slow_is_still_one_key():
    decoder = chat.KeyDecoder()
    assert decoder.feed(b"\x1b", 0.0) == []
    assert decoder.flush(0.2) == [chat.Key("escape")]
    assert decoder.feed(b"[A", 0.4) == [chat.Key("up")]
    decoder.feed(b"\x1b", 1.0)
    decoder.flush(1.2)
    assert decoder.feed(b"[A", 2.0) == [chat.Key("text", "[A")]
    decoder.feed(b"\x1b", 3.0)
    decoder.flush(3.2)
    assert decoder.feed(b"Perhaps", 3.3) == [chat.Key("text", "Perhaps")]


@pytest.mark.parametrize(
    "data, keys",
    [
        (b"\x1b\x1b", ["escape"]),
        (b"\x1b\x1b[A", ["escape", "up"]),
        (b"\x1b\x1bn", ["escape", "room-next"]),
    ],
)
def test_an_escape_before_a_sequence_is_a_key_of_its_own(data, keys):
    decoder = chat.KeyDecoder()
    found = decoder.feed(data) + decoder.flush()
    assert [key.name for key in found] == keys


def test_a_paste_whose_end_is_lost_is_taken_after_a_while():
    decoder = chat.KeyDecoder()
    assert decoder.feed(b"\x1b[200~hello") == []
    assert decoder.end_paste() == [chat.Key("paste", "hello")]
    assert decoder.feed(b"x") == [chat.Key("text", "x")]


def test_spaces_of_all_kinds_and_new_emoji_can_be_typed():
    decoder = chat.KeyDecoder()
    text = "a\u3000b\xa0c\U0001fae9\U0001fac8"
    assert decoder.feed(text.encode()) == [chat.Key("text", text)]


def test_escape_and_then_a_command_typed_quickly_is_that_command():
    decoder = chat.KeyDecoder()
    keys = decoder.feed(b"\x1b/msg carol secret\r")
    assert keys == [chat.Key("escape"), chat.Key("text", "/msg carol secret"), chat.Key("enter")]
    assert [key.name for key in decoder.feed(b"\x1ba\x1b1")] == ["room-unread", "room-1"]


def test_what_is_taken_out_of_the_line_is_what_was_typed_and_nothing_of_it_comes_back():
    editor = chat.LineEditor()
    editor.press(chat.Key("text", "earlier"))
    editor.press(chat.Key("enter"))
    editor.press(chat.Key("text", "secret for tea"))
    editor.press(chat.Key("up"))
    assert editor.text == "earlier" and editor.take() == "secret for tea"
    for name in ("down", "undo", "down"):
        editor.press(chat.Key(name))
        assert editor.text == ""


def test_ctrl_r_on_an_empty_line_looks_for_what_is_typed_then():
    editor = chat.LineEditor()
    for line in ("alpha one", "beta", "alpha two"):
        editor.press(chat.Key("text", line))
        editor.press(chat.Key("enter"))
    editor.press(chat.Key("search"))
    editor.press(chat.Key("text", "al"))
    assert editor.text == "alpha two"
    editor.press(chat.Key("search"))
    assert editor.text == "alpha one"
    editor.press(chat.Key("text", "pha t"))
    assert editor.text == "alpha two"
    editor.press(chat.Key("backspace"))
    assert editor.text == "alpha tw"


def test_many_joins_cost_no_more_each_than_a_few():
    desk = Desk()
    for one in desk.core.rooms.values():
        one.moved_at = 10**15
    took = []
    for count in (2_000, 8_000):
        views = [chat.View(chat.CAME, name=f"u{n}", where="#lobby") for n in range(count)]
        for view in views:
            desk.core.happened(desk.core.room, view)
        began = time.process_time()
        desk.display.take(desk.core.take_views())
        took.append((time.process_time() - began) / count)
    assert took[1] < 20 * took[0] + 0.0001


def test_a_burst_of_any_size_is_kept_whole():
    store = chat.ClientStore(chat.open_client_database(":memory:"), "here", "alice")
    for n in range(2 * chat.CLIENT_ROWS_WAITING + 7):
        store.add("#a", chat.View(chat.SAID, f"{n}", "bob", "#a", n, id=f"m{n}"))
    store.flush()
    count = store.db.execute("SELECT count(*) FROM messages").fetchone()[0]
    assert count == 2 * chat.CLIENT_ROWS_WAITING + 7


def test_earlier_lines_are_found_and_changes_undone():
    editor = chat.LineEditor()
    for line in ("make tea", "make coffee", "drink"):
        editor.press(chat.Key("text", line))
        editor.press(chat.Key("enter"))
    editor.press(chat.Key("text", "make"))
    editor.press(chat.Key("search"))
    assert editor.text == "make coffee"
    editor.press(chat.Key("search"))
    assert editor.text == "make tea"
    editor.press(chat.Key("erase-to-start"))
    assert editor.text == ""
    editor.press(chat.Key("undo"))
    assert editor.text == "make tea"


def test_lines_wrap_between_words_and_long_words_stay_whole():
    line = "08:30 bob: " + " ".join(f"word{n}" for n in range(20))
    rows = chat.wrapped_rows(line, 40, 6)
    assert all(len(row) <= 40 for row in rows) and rows[1].startswith("      word")
    assert " ".join(rows).split() == line.split()
    link = "https://example.org/" + "x" * 100
    assert any(link in row for row in chat.wrapped_rows(f"08:30 bob: see {link} now", 40, 6))
    coloured = chat.wrapped_rows(f"\x1b[31m{'red ' * 20}\x1b[0mend", 20, 2)
    assert all(row.count("\x1b[31m") == 1 for row in coloured[:-1])


def test_users_who_join_and_leave_in_a_minute_are_one_row_unless_they_spoke():
    alice = Elsewhere()
    alice.core.clock = lambda: alice.now
    for n in range(30):
        alice.hears(f":u{n}!u@h JOIN #lobby")
    alice.hears(":u3!u@h QUIT :bye", ":u4!u@h PART #lobby", ":u5!u@h PRIVMSG #lobby :hi")
    alice.hears(":u5!u@h QUIT :bye")
    alice.sent(62)
    rows = [view for view in alice.core.room.views if view.kind not in ("told", "note")]
    assert [view.kind for view in rows] == ["came", "moved", "said", "went"]
    assert rows[1].text == (
        "u1, u2, u5, u6, u7, u8, u9, u10, u11, u12 and 17 more joined; u3, u4 joined and left"
    )
    assert len([view for view in alice.views if view.kind in ("came", "went")]) == 33
    assert len([view for view in alice.views if view.kind == "moved"]) == 1


def test_settings_are_listed_checked_and_kept():
    alice = Elsewhere()
    alice.types("/set")
    assert len(alice.kinds("told")) >= len(chat.SETTINGS)
    alice.types("/set bell off", "/set highlight tea")
    assert alice.core.setting("bell") == "off"
    alice.hears(":bob!u@h PRIVMSG #lobby :who wants tea?")
    assert [view.called for view in alice.views if view.kind == "said"] == [True]
    alice.types("/set bell perhaps", "/set nothing x", "/set bell default")
    assert len(alice.kinds("note")) == 2 and alice.core.setting("bell") == "on"


def test_standard_output_that_does_not_block_loses_nothing(running):
    """As a program before us may have left a pipe."""
    server = running()
    where = chat.address_text(*server.address)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with program("client", "bot", "--server", where, "--no-state", stdout=writer) as client:
        os.close(writer)
        bob = server.guest("bob")
        bob.until("bot")
        for n in range(2000):
            bob.send(f"{n} {'x' * 100}\n")
        bob.send("the end\n")
        output = os.fdopen(reader, "rb")
        lines = [line.decode().rstrip() for line in iter(output.readline, b"> bob: the end\n")]
        client.stdin.close()
    output.close()
    said = [line.split(": ", 1)[1] for line in lines if ": " in line]
    assert said == [f"{n} {'x' * 100}" for n in range(2000)]


@pytest.mark.parametrize("home", ["", "/proc/none"])
def test_without_a_home_there_is_one_line_that_names_the_way_out(home):
    environment = {"PATH": os.environ["PATH"], "HOME": home}
    with program("client", "alice", "--server", "127.0.0.1:1", env=environment) as client:
        _, errors = client.communicate(b"", PATIENCE)
    assert client.returncode == 1 and errors.count(b"\n") == 1
    assert b"--no-state" in errors and b"--data DIR" in errors
    for flags in (["--version"], ["--help"], ["client", "--help"]):
        with program(*flags, env=environment) as other:
            output, errors = other.communicate(b"", PATIENCE)
            assert (other.returncode, errors) == (0, b"") and output


def test_what_is_typed_while_a_retried_channel_is_being_entered_waits_for_it():
    alice = Elsewhere()
    alice.core.room_for("#tea").is_channel = True
    alice.core.go(alice.core.find("#tea"))
    alice.types("for tea")
    assert alice.core.outbox.parked
    alice.types("/retry", "and milk")
    assert not alice.core.outbox.parked
    assert [line for line in alice.sent(9) if "JOIN" in line] == ["JOIN #tea"]
    alice.hears(":alice!u@h JOIN #tea")
    said = [line for line in alice.sent(9) if "PRIVMSG" in line]
    assert said[0] == "PRIVMSG #tea :for tea"


def test_a_private_message_that_is_tried_again_enters_no_channel():
    alice = Elsewhere()
    alice.types("/tell bob psst")
    assert "PRIVMSG bob psst" in alice.sent(3)
    alice.core.disconnected()
    assert alice.core.outbox.parked  # it may have arrived
    alice.connect()
    alice.types("/retry")
    sent = alice.sent(9)
    assert "PRIVMSG bob psst" in sent
    assert not [line for line in sent if line.startswith("JOIN")]


def test_who_tells_which_users_are_away_or_operate_the_server():
    alice = Elsewhere()
    alice.types("/who #lobby")
    for name, flags in (("bob", "H"), ("carol", "G@"), ("dave", "H*"), ("eve", "G*+")):
        alice.hears(f"352 alice #lobby u h.example x {name} {flags} :3 Real Name")
    alice.hears("315 alice #lobby :End of WHO")
    told = [
        re.sub(r" \(u@h\.example\) in #lobby: Real Name", "", text) for text in alice.kinds("told")
    ]
    assert told[-4:] == [
        "bob",
        "carol, away",
        "dave, operator of the server",
        "eve, away, operator of the server",
    ]


def test_the_topic_that_was_asked_for_is_told_or_that_there_is_none():
    alice = Elsewhere()
    alice.types("/topic #lobby", "/topic #rust")
    assert alice.sent(9) == ["TOPIC #lobby", "TOPIC #rust"]
    alice.hears("332 alice #lobby :tea at five", "331 alice #rust :No topic is set")
    assert alice.kinds("told")[-2:] == ["the topic of #lobby: tea at five", "#rust has no topic"]


def test_a_capability_that_a_server_has_only_now_is_asked_for_if_we_can_use_it():
    alice = Elsewhere(caps="message-tags")
    alice.hears("CAP alice NEW :echo-message batch=1 unheard-of", "CAP alice NEW :unheard-of=2")
    assert alice.sent() == ["CAP REQ :echo-message batch"]


def test_history_that_a_server_refuses_is_waited_for_no_more():
    alice = Elsewhere(caps="batch draft/chathistory message-tags server-time")
    alice.hears("@time=2026-11-22T08:30:05.123Z;msgid=1 :bob!u@h PRIVMSG #lobby :hi")
    assert alice.said() == []  # what was said before comes first
    alice.hears("FAIL CHATHISTORY MESSAGE_ERROR LATEST #lobby :its disk is broken")
    assert alice.said() == ["#lobby bob: hi"]
    alice.core.talk.ask_history(alice.core.room, "older")
    assert alice.sent(9)[-1] == "CHATHISTORY BEFORE #lobby msgid=1 100"
    alice.hears("FAIL CHATHISTORY MESSAGE_ERROR BEFORE #lobby :its disk is broken")
    assert alice.kinds("older") == ["0"]


def test_a_conversation_that_is_closed_before_the_server_answers_its_join_stays_closed():
    alice = Elsewhere()
    alice.types("/join #tea", "/close #tea")
    assert alice.sent(chat.JOIN_SECONDS + 9)[0] == "JOIN #tea"
    assert alice.core.find("#tea") is None


def test_a_line_without_text_in_a_message_of_several_lines_is_skipped():
    alice = Elsewhere(caps="batch message-tags draft/multiline")
    alice.hears(":bob!u@h BATCH +1 draft/multiline alice", "@batch=1 :bob!u@h PRIVMSG alice :x")
    alice.hears("@batch=1 :bob!u@h PRIVMSG alice", "@batch=1 :bob!u@h PRIVMSG alice :y")
    alice.hears(":bob!u@h BATCH -1")
    assert alice.said() == ["bob bob: x\ny"]


def test_a_user_in_a_channel_that_is_renamed_is_told_its_new_name():
    alice = Elsewhere(caps="draft/channel-rename")
    alice.types("/join #tea")
    alice.hears(":alice!u@h JOIN #tea")
    for old, new, place in (("#lobby", "#hall", []), ("#tea", "#coffee", ["#coffee"])):
        alice.views.clear()
        alice.hears(f":bob!u@h RENAME {old} {new} :better")
        assert [view.where for view in alice.views if view.kind == "place"] == place


def test_an_account_is_known_until_the_user_logs_out():
    alice = Elsewhere(caps="account-notify away-notify")
    alice.hears(":bob!u@h JOIN #lobby", ":bob!u@h ACCOUNT bobby", ":bob!u@h AWAY :lunch")
    assert alice.core.known_people["bob"].account == "bobby"
    alice.hears(":bob!u@h NICK rob", ":rob!u@h AWAY")
    assert alice.core.known_people["rob"].account == "bobby"
    alice.hears(":rob!u@h ACCOUNT *")
    assert alice.core.known_people == {}


@pytest.mark.parametrize(
    "caps, most",
    [
        ("echo-message message-tags batch labeled-response", chat.SENT_AHEAD),
        ("", chat.DOUBTED_AHEAD),
    ],
)
def test_fewer_messages_are_under_way_where_a_break_would_leave_them_in_doubt(caps, most):
    alice = Elsewhere("CLIENTTAGDENY=*", caps=caps, tidy=False)
    alice.core.talk.budget = chat.Budget(*chat.NO_PACE, 0.0)
    for n in range(200):
        alice.core.say(f"line {n}")
    under_way = []
    while alice.core.outbox.waiting and len(under_way) < 1000:
        lines = alice.sent(1)
        under_way.append(len(alice.core.outbox.in_flight))
        answer(alice, lines, labels=bool(caps))
    assert alice.core.outbox.waiting == {} and max(under_way) == most


@pytest.mark.parametrize(
    "kind, tokens",
    [
        (chat.IRC, ["chat.py/WEB=http://192.168.1.5:7000/"]),  # of a server that is no chat.py
        (chat.CHAT, ["NETWORK=x"]),
        (chat.CHAT, ["chat.py/WEB"]),
        (chat.CHAT, ["chat.py/WEB=javascript:alert(1)"]),
        (chat.CHAT, ["chat.py/WEB=http://" + "x" * chat.QR_BYTES]),
    ],
)
def test_the_code_is_refused_on_a_server_without_a_page_for_browsers(kind, tokens):
    alice = Elsewhere(*tokens, kind=kind)
    alice.core.server.ours = kind == chat.CHAT
    alice.types("/qr")
    assert alice.kinds("note") == ["this server announces no page for browsers"]
    assert alice.kinds("qr-code") == []


def test_the_code_shows_the_address_that_the_server_announces_for_browsers():
    house = house_of()
    house.site.web = house.site.web._replace(address="192.168.1.5")
    alice = Pair(house, "alice")
    alice.typed("/qr")
    (view,) = [view for view in alice.views if view.kind == chat.QR_CODE]
    assert view.text == "http://192.168.1.5:7000/"
    assert not [view.text for view in alice.views if "only this machine" in view.text]
    house.site.web = house.site.web._replace(address="")
    bob = Pair(house, "bob")
    bob.typed("/qr")
    assert [view.text for view in bob.views if view.kind in (chat.QR_CODE, chat.NOTE)] == [
        "http://127.0.0.1:7000/",
        "only this machine reaches that; --listen 0.0.0.0:7000 lets others in",
    ]


# ======================================================================================
# QR
# ======================================================================================


def test_the_error_correction_is_that_of_the_example_in_the_standard():
    """ISO/IEC 18004, annex I: the digits 01234567 in version 1-M."""
    data = bytes.fromhex("10200c566180ec11ec11ec11ec11ec11")
    assert bytes(chat.qr_correction([*data], 10)).hex() == "a524d4c1ed36c7872c55"
    assert f"{chat.qr_check(0b00101, 0x537) ^ 0x5412:015b}" == "100000011001110"  # annex C
    assert f"{chat.qr_check(7, 0x1F25):018b}" == "000111110010010100"  # annex D


CODES = [  # version, the best mask, and a digest of its codes under all masks: zbar reads each of
    (1, 0, "5e180af432210576"),  # them, and python-qrcode draws the same
    (2, 2, "4f495f3ec2f80a23"),
    (3, 2, "5e9273d63e6f4f62"),
    (4, 5, "fe4e9ef74e9d2b3b"),
    (5, 3, "4b7ec499ceff1ffe"),
    (6, 5, "bbf6a4d941d61e2a"),
    (7, 2, "fec62217ba74a20c"),
    (8, 6, "fb18e0933779b09e"),
    (9, 2, "bf2157c5be9ffe46"),
    (10, 2, "eb06835130b41c31"),
]


@pytest.mark.parametrize("version, mask, digest", CODES)
def test_a_text_is_drawn_as_the_smallest_code_that_it_fits_in(version, mask, digest):
    total, correction, blocks, _ = chat.QR_SIZES[version]
    most = total - correction * blocks - (2 if version < 10 else 3)
    text = "http://192.168.1.5:7000/" + "".join(f"{n}/" for n in range(100))
    known, data = chat.qr_bytes(text[:most])
    assert known == version and len(data) == total
    codes = [chat.qr_matrix(version, data, mask) for mask in range(8)]
    drawn = "".join("\n".join(rows) for rows in codes).encode()
    assert hashlib.sha256(drawn).hexdigest()[:16] == digest
    assert chat.qr_code(text[:most]) == codes[mask]
    if version < 10:
        assert chat.qr_bytes(text[: most + 1])[0] == version + 1
    else:
        assert most == chat.QR_BYTES
        with pytest.raises(chat.Refused, match="at most 213 bytes"):
            chat.qr_bytes(text[: most + 1])


@pytest.mark.parametrize(
    "rows, points",
    [
        (["1" * 6] * 6, 12 * 4 + 25 * 3 + 100),  # runs of six, squares, no light module
        (["101010", "010101"] * 3, 0),
        (["01011101000001", "10100010111110"] * 7, 7 * (3 + 40) + 7 * 3),
    ],
)
def test_runs_squares_false_finders_and_too_much_of_one_colour_cost_points(rows, points):
    assert chat.qr_penalty(rows) == points


def test_two_rows_of_modules_are_one_row_of_half_blocks_in_a_light_frame():
    code, rows = chat.qr_code("http://192.168.1.5:7000/"), chat.qr_rows("http://192.168.1.5:7000/")
    halves = {" ": "00", "\u2580": "10", "\u2584": "01", "\u2588": "11"}
    modules = ["".join(halves[c][half] for c in row) for row in rows for half in (0, 1)]
    assert [row[4:-4] for row in modules[4 : 4 + len(code)]] == code
    frame = [*modules[:4], *modules[4 + len(code) :], *(row[:4] + row[-4:] for row in modules)]
    assert set("".join(frame)) == {"0"} and len(modules) - len(code) >= 8


# ======================================================================================
# LOOP
# ======================================================================================


@pytest.fixture
def loop():
    loop = chat.Loop()
    yield loop
    loop.close()


def test_timers_run_in_the_order_of_their_time_and_not_when_cancelled(loop):
    ran = []
    for seconds in (0.003, 0.001, 0.002):
        loop.call_later(seconds, lambda seconds=seconds: ran.append(seconds))
    loop.call_later(0.0015, lambda: ran.append("cancelled")).cancel()
    while len(ran) < 3:
        loop.run_once()
    assert ran == [0.001, 0.002, 0.003]


def test_what_another_thread_hands_in_ends_the_wait(loop):
    ran = []
    thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(lambda: ran.append(1)))
    thread.start()
    while not ran:
        loop.run_once(PATIENCE)
    thread.join()


def test_a_job_that_ends_after_the_loop_is_closed_raises_nothing():
    loop = chat.Loop()
    loop.close()
    loop.call_soon_threadsafe(chat.do_nothing)


def test_what_a_callback_adds_runs_in_the_next_turn(loop):
    ran = []
    loop.call_soon(lambda: (ran.append(1), loop.call_soon(lambda: ran.append(2))))
    loop.run_once(0)
    assert ran == [1]
    loop.run_once(0)
    assert ran == [1, 2]


def test_waits_of_one_length_end_in_the_order_they_began(loop):
    due = []
    delay = chat.Delay(loop, 0.002, due.append)
    for item in "abcd":
        delay.add(item)
    delay.add("a")  # has been waiting for longest, and still has
    delay.discard("b")
    while len(due) < 3:
        loop.run_once()
    assert due == ["a", "c", "d"]
    assert not delay.waiting


class Recorder(chat.Connection):
    """A connection that remembers what happened to it."""

    __slots__ = ("events", "fails")

    def __init__(self, loop, sock):
        super().__init__(loop, sock)
        self.events = []
        self.fails = False

    def received(self, data):
        if self.fails:
            raise RuntimeError("a bug")
        self.events.append(data)

    def ended(self):
        self.events.append("ended")
        self.file.close()
        self.sock.close()

    def lost(self, reason):
        self.events.append(reason)


@pytest.fixture
def pair(loop):
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    yield Recorder(loop, ours), theirs
    ours.close()
    theirs.close()


def spin(loop, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        loop.run_once(0.05)


def test_close_sends_what_is_queued_and_waits_for_the_other_side(loop, pair):
    conn, theirs = pair
    conn.write(b"x" * 3_000_000)
    conn.close()
    got = b""
    while len(got) < 3_000_000:
        loop.run_once(0)
        got += theirs.recv(1 << 20)
    spin(loop, lambda: conn.state == chat.LINGERING)
    assert theirs.recv(1) == b""
    theirs.sendall(b"too late")
    theirs.close()
    spin(loop, lambda: conn.state == chat.CLOSED)
    assert conn.events == [chat.HUNG_UP]


def test_drop_closes_at_once_and_the_socket_at_the_end_of_the_turn(loop, pair):
    conn, theirs = pair
    conn.write(b"never sent")
    conn.drop("enough")
    assert conn.sock.fileno() >= 0, "no other socket may get this number during the turn"
    loop.run_once(0)
    assert conn.sock.fileno() < 0
    assert theirs.recv(100) == b""
    assert conn.events == ["enough"]


def test_a_handler_that_closes_another_ready_connection_does_not_wake_it(loop):
    class Rival(Recorder):
        """Drops the other one as soon as it hears something."""

        __slots__ = ("rival",)

        def received(self, data):
            super().received(data)
            self.rival.drop("by the rival")

    sockets = [socket.socketpair() for _ in range(2)]
    one, other = (Rival(loop, ours) for ours, _ in sockets)
    one.rival, other.rival = other, one
    for _, theirs in sockets:
        theirs.sendall(b"x")
    loop.run_once()
    assert [one.events, other.events] in ([["by the rival"], [b"x"]], [[b"x"], ["by the rival"]])
    for sock in itertools.chain(*sockets):
        sock.close()


def test_a_bug_costs_the_connection_it_happens_on_and_no_other(loop, pair, caplog):
    conn, theirs = pair
    other_sock, other_theirs = socket.socketpair()
    other = Recorder(loop, other_sock)
    conn.fails = True
    theirs.sendall(b"boom")
    other_theirs.sendall(b"fine")
    spin(loop, lambda: other.events and conn.events)
    assert conn.events == ["internal error"] and other.events == [b"fine"]
    assert "a bug" in caplog.text
    for sock in (other_sock, other_theirs):
        sock.close()


class ScriptedSocket:
    """Stands for a socket whose send() does what the script says."""

    def __init__(self, sock, script):
        self.sock, self.script, self.sent = sock, list(script), b""

    def send(self, data):
        step = self.script.pop(0) if self.script else len(data)
        if isinstance(step, OSError):
            raise step
        self.sent += bytes(data[:step])
        return min(step, len(data))

    def __getattr__(self, name):
        return getattr(self.sock, name)


@pytest.mark.parametrize(
    "script, lost",
    [
        ([], None),
        ([1, 2, 3], None),
        ([BlockingIOError(), 5, BlockingIOError()], None),
        ([0, 0, 4], None),
        (
            [2, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")],
            "connection reset by peer",
        ),
        ([BrokenPipeError(errno.EPIPE, "Broken pipe")], "broken pipe"),
    ],
)
def test_partial_and_failing_writes_are_accounted_for_exactly(loop, pair, script, lost):
    conn, _ = pair
    conn.sock = scripted = ScriptedSocket(conn.sock, script)
    data = [b"hello ", b"wide ", b"world"]
    owner = types.SimpleNamespace(conn=conn)
    chat.broadcast(data[0], [owner])
    conn.write(data[1])
    chat.broadcast(data[2], [owner])  # never past what waits
    for _ in range(10):
        conn.flush()
    assert conn.direct == (not lost)
    if lost:
        assert conn.events == [lost] and conn.state == chat.CLOSED
        assert b"".join(data).startswith(scripted.sent)
    else:
        assert scripted.sent == b"".join(data) and conn.unsent == 0
    conn.sock = scripted.sock


def test_helpers_take_jobs_fairly_and_hand_back_exceptions(loop):
    helpers, done = chat.Helpers(loop), []
    gate = threading.Event()
    for n in range(20):
        helpers.submit("greedy", gate.wait, lambda _, n=n: done.append(f"greedy {n}"))
    helpers.submit("modest", gate.wait, lambda _: done.append("modest"))
    helpers.submit("broken", lambda: 1 / 0, lambda result: done.append(type(result)))
    gate.set()
    spin(loop, lambda: len(done) == 22)
    assert done.index("modest") < 8 and ZeroDivisionError in done


def test_one_owner_never_has_all_threads_of_a_lane_of_three():
    lane = chat.Lane(3)
    for n in range(4):
        lane.waiting.setdefault("greedy", collections.deque()).append((n, None, lambda: True))
    lane.hand_out()
    lane.waiting["modest"] = collections.deque([("other", None, lambda: True)])
    lane.hand_out()
    handed = [lane.jobs.get()[0] for _ in range(lane.jobs.qsize())]
    assert handed == [0, 1, "other"] and lane.free == 0
    lane.done("modest")
    assert lane.jobs.empty() and lane.free == 1
    lane.done("greedy")
    assert lane.jobs.get()[0] == 2 and lane.running == {"greedy": 2}


def test_a_busy_loop_takes_thousands_of_calls_from_another_thread(loop):
    def hand_in():
        for n in range(5000):  # more wake-ups than wait in a socket
            loop.call_soon_threadsafe(lambda n=n: ran.append(n))

    ran, thread = [], threading.Thread(target=hand_in, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    loop.run_once(0)
    assert ran == [*range(5000)]


def test_a_connection_that_is_dropped_again_is_lost_once(loop, pair):
    conn, _ = pair
    conn.drop("enough")
    conn.drop("in the same turn")
    loop.run_once(0)
    conn.drop("later")
    assert conn.events == ["enough"]


# The log


LOGGED = [  # what an operator or an attacker sends; each has a control character in it
    "OPER \x1b]0;pwned\x07 guess",
    "OPER boss\x9b31m guess",
    "OPER b\x85oss guess",
    "OPER b\u2028oss guess",
    "OPER boss secret",
    "KILL bob :\x1b[2Jgone\x07\x08",
    "KILL carol :a\x9b31mb\x85c\u2028d",
    "REHASH",
]


# The log has one entry point, which escapes. Also: OPER names, KILL reasons, the line protocol's
# /oper, first lines of other protocols; at every level.
@thorough
def test_no_control_character_of_a_client_reaches_the_log(folder):
    flags = ("--data", folder, "--oper", "boss:secret", "--log", "debug")
    with serving(*flags) as (process, address):
        guests = [Guest(address) for _ in range(6)]  # held, so that none is closed
        for guest, name in zip(guests, ("bob", "carol"), strict=False):
            guest.enter_irc(name)
        dora = Guest(address, "dora")
        dora.send("/oper \x1b]0;pwned\x07 guess\n/names\n")
        dora.until("#lobby 1-")
        junk = Guest(address)
        junk.send("GET /\x1b]0;pwned\x07 HTTP/1.1\r\n\r\n")
        junk.rest()
        alice = Guest(address)
        alice.enter_irc("alice")
        for n, line in enumerate(LOGGED):  # the wrong ones on a connection of their own
            guest = alice if n >= 4 else guests[2 + n]
            if n < 4:
                guest.enter_irc(f"guest{n}")
            guest.send(f"{line}\r\nPING {n}\r\n")
            guest.until(f"PONG chat.py :{n}")
        process.send_signal(signal.SIGTERM)
        process.wait()
        log = process.stderr.read().decode()
    assert log.count("OPER") >= 5 and "killed" in log
    bad = [c for c in log if c != "\n" and (not c.isprintable() or c in "\u2028\u2029")]
    assert bad == []
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in log.splitlines())


def test_the_thread_of_the_log_waits_when_all_is_written():
    ours, theirs = os.pipe()
    try:
        writer = chat.LogWriter(theirs)
        writer.handle(chat.logging.LogRecord("chat", chat.logging.INFO, "", 0, "hello", None, None))
        assert os.read(ours, 100) == b"hello\n"
        assert writer.idle.wait(PATIENCE) and not writer.more.is_set()
    finally:
        os.close(ours)
        os.close(theirs)


# ======================================================================================
# SERVER
# ======================================================================================


class Running:
    """A server on a free port, its loop in a thread."""

    def __init__(self, **options):
        self.loop = chat.Loop()
        given = {"listen": (("127.0.0.1", 0),), "flood": None, "web": WEB, **options}
        self.server = chat.Server(self.loop, chat.ServerOptions(**given))
        self.address = self.server.listeners[0].address
        self.guests = []
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def guest(self, name=None, context=None):
        self.guests.append(Guest(self.address, name, context))
        return self.guests[-1]

    def stop(self):
        self.loop.call_soon_threadsafe(self.server.stop)
        for guest in self.guests:
            guest.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.server.close()
        self.loop.close()


class CheckedFile:
    """A file of what a server sends, in which every line is looked at."""

    def __init__(self, file):
        self.file = file

    def readline(self):
        line = self.file.readline()
        if line.endswith(b"\n") and not line.startswith(b"HTTP/"):
            check_grammar(line)
        return line

    def __getattr__(self, name):
        return getattr(self.file, name)


class Guest:
    """A peer with a blocking socket."""

    def __init__(self, address, name=None, context=None):
        self.sock = socket.create_connection(address, PATIENCE)
        if context:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.file = CheckedFile(self.sock.makefile("rb"))
        if name:
            self.enter(name)

    def enter_irc(self, name, *lines):
        """With an IRC client, as far as the welcome and what the lines cause."""
        self.send("".join(f"{line}\r\n" for line in (f"NICK {name}", "USER u 0 * :r", *lines)))
        self.send("PING in\r\n")
        return self.until("PONG chat.py :in")

    def enter(self, name):
        """With the name taken: /names is answered after it."""
        self.send(f"{name}\n/names\n")
        assert self.line().startswith("* #lobby 1-")

    def send(self, data):
        self.sock.sendall(data if isinstance(data, bytes) else data.encode())

    def line(self):
        return self.file.readline().decode().rstrip("\n")

    def lines(self, count):
        return [self.line() for _ in range(count)]

    def until(self, text):
        """Lines up to the one with `text` in it."""
        found = []
        while not found or text not in found[-1]:
            line = self.file.readline()
            assert line, f"closed before {text!r}: {found}"
            found.append(line.decode().rstrip("\n"))
        return found

    def rest(self):
        """Everything until the server closes."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while more := self.file.read1():
                data += more
        return data

    def close(self):
        self.file.close()
        self.sock.close()

    def here(self):
        return "{}:{}".format(*self.sock.getsockname())


class Visitor(Guest):
    """A guest from an address of its own."""

    open: list[Visitor] = []

    def __init__(self, address, source="127.0.0.1"):
        self.sock = socket.create_connection(address, PATIENCE, (source, 0))
        self.file = CheckedFile(self.sock.makefile("rb"))
        Visitor.open.append(self)

    def close(self):
        with contextlib.suppress(ValueError):
            Visitor.open.remove(self)
        super().close()

    def ask(self, *lines):
        """Return what comes until the answer to a PING behind these lines."""
        self.send("".join(f"{line}\r\n" for line in (*lines, "PING asked")))
        return self.until("PONG chat.py :asked")[:-1]

    def reset(self):
        """Break the connection: what the server has not read is gone."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


@pytest.fixture(autouse=True)
def closed_visitors():
    """No socket of one test lives on into the next."""
    before = set(Visitor.open)
    yield
    for guest in set(Visitor.open) - before:
        guest.close()


@pytest.fixture
def running():
    """Start servers in a thread; at the end their visitors go, then they stop."""
    started, before = [], set(Visitor.open)

    def start(**options):
        started.append(Running(**options))
        return started[-1]

    yield start
    for guest in set(Visitor.open) - before:
        guest.close()
    for server in started:
        if server.thread.is_alive():  # not stopped by the test
            server.stop()


@pytest.fixture(autouse=True)
def no_bug_is_logged(caplog, request):
    yield
    if "costs_the_connection" not in request.node.name:
        records = [r for when in ("setup", "call", "teardown") for r in caplog.get_records(when)]
        assert not [record for record in records if "a bug" in record.getMessage()]


def test_the_conversation_is_byte_for_byte_that_of_the_workshop(running):
    server = running()
    alice = Guest(server.address)
    alice.send(b"ali")
    alice.send(b"ce\r\n")
    alice.send(b"/names\n")  # not of the workshop's protocol: says that the name was taken
    alice.line()
    bob = Guest(server.address)
    bob.send(b"bob\none\n\n  two  \r\nthr")
    where = bob.here()
    expected = f"bob ({where}) joined the chat!\nbob: one\nbob: \nbob:   two  \n".encode()
    assert alice.file.read(len(expected)) == expected
    bob.send(b"ee\nbad \xff line\nlast without newline")
    bob.sock.shutdown(socket.SHUT_WR)
    expected = f"bob: three\nbob: last without newline\nbob ({where}) left the chat!\n".encode()
    assert alice.file.read(len(expected)) == expected
    assert bob.rest() == b"* that line is not UTF-8 text and was not delivered\n"
    carol = Guest(server.address)
    carol.send(b"carol\n")
    assert alice.line() == f"carol ({carol.here()}) joined the chat!"
    silent = Guest(server.address)
    silent.send(b"no newline, no name")
    silent.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    silent.close()  # a reset: no user hears of it
    where = carol.here()
    carol.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    carol.close()
    assert alice.line() == f"carol ({where}) left the chat!"
    alice.sock.shutdown(socket.SHUT_WR)
    assert alice.rest() == b""


def test_a_client_that_closes_before_sending_a_name_is_not_heard_of(running):
    server = running()
    alice = server.guest("alice")
    for data in (b"", b"\r"):
        silent = Guest(server.address)
        silent.send(data)
        silent.sock.shutdown(socket.SHUT_WR)
        assert silent.rest() == b""
        silent.close()
    alice.send("/list\n")
    assert alice.line() == "* #lobby (1)"


def test_a_silent_client_is_greeted(running):
    guest = running().guest()
    assert guest.file.readline() == chat.GREETING
    guest.send("alice\n")
    assert guest.line() == "* you are alice; no other user is here yet; /help"


def test_other_dialects_are_closed_politely_and_never_taken_for_a_name(running):
    server = running()
    alice = server.guest("alice")
    browser = server.guest()
    browser.send("PRI * HTTP/2.0\r\n\r\n")
    assert browser.rest().startswith(b"HTTP/1.1 505 ")
    alice.send("/names\n")
    assert alice.line() == "* #lobby 1-1 of 1: alice"


def test_irc_and_the_line_protocol_share_a_port_and_a_channel(running):
    server = running()
    dora, alice = server.guest("dora"), server.guest()
    assert "376" not in str(alice.enter_irc("alice", "JOIN #lobby"))
    assert dora.line() == f"alice ({alice.here()}) joined the chat!"
    dora.send("hello\n")
    assert alice.line() == ":dora!line@127.0.0.1 PRIVMSG #lobby :hello\r"
    alice.send("PRIVMSG #lobby :hi\r\nQUIT :bye\r\nQUIT :again\r\nPRIVMSG #lobby :late\r\n")
    assert dora.lines(2) == ["alice: hi", f"alice ({alice.here()}) left the chat!"]
    assert alice.rest() == b"ERROR :Closing link: Quit: bye\r\n"
    dora.send("/names\n")
    assert dora.line() == "* #lobby 1-1 of 1: dora"


def test_a_quit_before_anything_else_is_answered(running):
    guest = running().guest()
    guest.send("QUIT\r\n")
    assert guest.rest() == b"ERROR :Closing link: Quit\r\n"


def test_half_a_line_of_irc_is_none_and_in_the_line_protocol_it_is_one(running):
    server = running()
    bob, carol, dora = server.guest("bob"), server.guest(), server.guest("dora")
    bob.line()
    carol.enter_irc("carol", "JOIN #lobby")
    carol.send("PRIVMSG #lobby :half a sen")
    carol.sock.shutdown(socket.SHUT_WR)
    assert "left" in bob.until("left")[-1]
    dora.send("half a sen")
    dora.sock.shutdown(socket.SHUT_WR)
    assert bob.until("left")[:-1] == ["dora: half a sen"]


def test_a_silent_irc_client_is_asked_and_then_let_go_and_others_are_told(running, monkeypatch):
    monkeypatch.setattr(chat, "PING_SECONDS", 0.05)
    monkeypatch.setattr(chat, "PONG_SECONDS", 0.05)
    server = running()
    dora, alice = server.guest("dora"), server.guest()
    alice.enter_irc("alice", "JOIN #lobby")
    dora.until("joined")
    assert alice.line() == "PING :chat.py\r"
    alice.send("PONG :chat.py\r\n")
    assert alice.until("ERROR")[-1].startswith("ERROR :Closing link: Ping timeout: 0")
    assert dora.line() == f"alice ({alice.here()}) left the chat!"
    dora.send("still here\n/names\n")  # the line protocol has no pings
    assert dora.line() == "* #lobby 1-1 of 1: dora"


def test_an_irc_client_without_a_name_is_sent_away_with_an_error(running, monkeypatch):
    monkeypatch.setattr(chat, "NAMING_SECONDS", 0.1)
    guest = running().guest()
    guest.send("CAP LS 302\r\n")
    assert guest.rest().split(b"\r\n")[-2].startswith(b"ERROR :no name after")


def test_a_policy_of_tls_says_where_and_for_how_long(running, certificate):
    server = running(tls_cert=certificate, sts=3600)
    plain = server.guest()
    sealed = server.guest(context=ssl.create_default_context(cafile=certificate))
    for guest, policy in ((plain, f"sts=port={server.address[1]}"), (sealed, "sts=duration=3600")):
        guest.send("CAP LS 302\r\nCAP REQ sts\r\nCAP LS\r\nPING 1\r\n")
        first = " ".join(guest.until(" LS :"))
        refused, old = (guest.until(text)[-1] for text in (" NAK ", " LS :"))
        assert policy in first.replace(":", " ").split()
        assert refused.endswith("NAK :sts\r") and "sts" not in old


@pytest.fixture
def showing(certificate, tmp_path):
    """Make the certificates of alice, of mallory and of the server."""

    def context(name):
        made = ssl.create_default_context(cafile=certificate)
        if name in CLIENT_CERTIFICATES:
            path = tmp_path / f"{name}.pem"
            path.write_text(CLIENT_CERTIFICATES[name])
            made.load_cert_chain(path)
        elif name:
            made.load_cert_chain(certificate)
        return made

    return context


def fingerprint_of(pem):
    der = ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERT") :])
    return hashlib.sha256(der).hexdigest()


def external(guest, authzid=""):
    """Log in by the certificate; the numerics that say how it went."""
    blob = base64.b64encode(authzid.encode()).decode() or "+"
    guest.send(f"AUTHENTICATE EXTERNAL\r\nAUTHENTICATE {blob}\r\nPING 1\r\n")
    return [line.split()[1] for line in guest.until(" PONG ")[1:-1]]


def test_a_certificate_of_an_account_logs_in_and_another_does_not(
    running, certificate, showing, folder
):
    options = {"tls_cert": certificate, "tls_client_ca": certificate, "data": folder}
    server = Running(**options)
    alice = server.guest(context=showing("alice"))
    alice.enter_irc("alice", "REGISTER * * password")
    assert external(alice) == ["904"]  # not an account's yet
    alice.send("NS CERT ADD\r\nNS CERT LIST\r\nWHOIS alice\r\n")
    print_of_alice = fingerprint_of(CLIENT_CERTIFICATES["alice"])
    told = str(alice.until(" 318 "))
    assert told.count(print_of_alice) == 3 and "1 certificate of alice" in told
    assert f" 276 alice alice :has client certificate fingerprint {print_of_alice}" in told
    other = server.guest(context=showing("server's"))
    other.enter_irc("other", "REGISTER * * password")
    other.send("NS CERT REMOVE " + print_of_alice + "\r\nWHOIS alice\r\n")
    assert "no certificate of yours" in (told := str(other.until(" 318 "))) and "276" not in told
    assert external(other, "alice") == external(other) == ["904"]
    server.stop()
    again = running(**options)
    for authzid, answer in (("", ["900", "903"]), ("bob", ["904"]), ("ALICE", ["900", "903"])):
        guest = again.guest(context=showing("alice"))
        guest.send("CAP LS 302\r\nNICK alice\r\nUSER u 0 * :r\r\n")
        assert ":sasl=PLAIN,SCRAM-SHA-256,EXTERNAL " in "".join(guest.until(" LS :"))
        assert external(guest, authzid) == answer
    guest.send("CAP END\r\nNS CERT REMOVE\r\nPING 2\r\n")
    assert "does not log in to alice any more" in guest.until(" PONG ")[-2]
    assert external(again.guest(context=showing("alice"))) == ["904"]


def test_external_is_offered_to_a_client_that_shows_a_certificate(running, certificate, showing):
    server = running(tls_cert=certificate, tls_client_ca=certificate)
    without = running(tls_cert=certificate)
    for guest, offered in (
        (server.guest(context=showing("alice")), True),
        (server.guest(context=showing("")), False),
        (server.guest(), False),
        (without.guest(context=showing("alice")), False),
    ):
        guest.send("CAP LS 302\r\n")
        assert ("EXTERNAL" in "".join(guest.until(" LS :"))) == offered
        guest.send("AUTHENTICATE EXTERNAL\r\nAUTHENTICATE +\r\nPING 1\r\n")
        lines = guest.until(" PONG ")
        assert any(" 904 " in line for line in lines) and not any(" 90[03] " in x for x in lines)
    with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
        server.guest(context=showing("mallory")).line()
    alice = server.guest(context=showing(""))
    assert "001" in alice.enter_irc("alice")[0]  # and no other user noticed


def test_a_certificate_goes_with_its_account_and_is_of_no_other():
    house = House()
    house.enter_irc("alice", "bob")
    for who in ("alice", "bob"):
        house.guests[who].conn.fingerprint = "aa11"
        house.say(who, "REGISTER * * password")
        house.turn()
        house.say(who, "NS CERT ADD")
        house.turn()
    assert "this certificate is another account's" in house.heard("bob")[-1]
    certificates, who = house.hub.accounts.certificates, house.guests["alice"].id
    for n in range(1, chat.CERTIFICATES):
        house.hub.perform("add_certificate", who, f"{n}")
    with pytest.raises(chat.Refused, match="10 certificates at most"):
        house.hub.perform("add_certificate", who, "one more")
    house.say("alice", "NS DROP password")
    house.turn()
    assert certificates == {} and list(house.store.rows("certificates")) == []
    house.say("bob", "NS CERT ADD")
    house.turn()
    assert list(house.store.rows("certificates")) == [("aa11", "bob")]


def test_lusers_counts_those_without_a_name_until_they_have_gone(running):
    server = running()
    alice, other = server.guest(), server.guest()
    other.send("NICK x\r\nPING 1\r\n")
    other.until("PONG")
    assert any(" 253 alice 1 " in line for line in alice.enter_irc("alice"))
    other.send("QUIT\r\n")
    assert other.rest()
    alice.send("LUSERS\r\n")
    assert " 253 alice 0 " in alice.until(" 253 ")[-1]


def test_the_message_of_the_day_is_read_again_when_an_operator_asks(running, tmp_path):
    motd = tmp_path / "motd"
    motd.write_text("Sch\u00f6nen Tag\n\n" + "word " * 200)
    alice = (server := running(motd=motd, oper=[("boss", "secret")])).guest()
    lines = alice.enter_irc("alice", "OPER boss secret")
    shown = [line.partition(" :- ")[2] for line in lines if " 372 " in line]
    assert shown[0] == "Sch\u00f6nen Tag\r" and len(shown) > 4
    motd.write_text("new")
    alice.send("REHASH\r\nMOTD\r\n")
    assert [line.split(" ", 3)[3] for line in alice.until(" 376 ")] == [
        "chat.py :Reading it again\r",
        ":- chat.py Message of the day\r",
        ":- new\r",
        ":End of MOTD\r",
    ]
    motd.unlink()
    alice.send("REHASH\r\nMOTD\r\n")
    assert "FAIL REHASH UNUSABLE :cannot read the message of the day" in alice.until(" 376 ")[1]
    assert server.server.motd == ["new"]


def test_tls_and_plain_text_share_a_port(running, certificate):
    server = running(tls_cert=certificate)
    plain = server.guest("plain")
    context = chat.Trust(ca=certificate).context()
    secret = server.guest("secret", context)
    secret.send("hello\n" * 1000)
    assert plain.line().startswith("secret (")
    assert plain.lines(1000) == ["secret: hello"] * 1000
    plain.send("bye\n" * 1000)
    assert secret.lines(1000) == ["plain: bye"] * 1000
    greeted = server.guest(context=context)
    assert greeted.file.readline() == chat.GREETING
    secret.sock.unwrap()


def test_tls_without_a_certificate_is_closed(running):
    guest = running().guest()
    guest.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert guest.rest() == b""


def test_ten_thousand_lines_at_once_arrive_in_order_and_delay_no_other_client(running):
    server = running()
    reader, flooder, third = (server.guest(name) for name in ("reader", "flooder", "third"))
    reader.until("third")
    flooder.send("".join(f"{n}\n" for n in range(10_000)))
    third.until("flooder: 0")
    third.send("/names\n")
    before = len(third.until("* #lobby"))
    assert before < 9_000, "the answer came after the flood"
    numbers = [line.removeprefix("flooder: ") for line in reader.lines(10_000)]
    assert numbers == [str(n) for n in range(10_000)]


def test_a_client_that_exceeds_the_budget_is_read_later_and_loses_nothing(running):
    server = running(flood=(10.0, 200.0))
    reader = server.guest("reader")
    began = time.monotonic()
    flooder = Guest(server.address)
    flooder.send("flooder\n" + "".join(f"{n}\n" for n in range(50)))
    flooder.sock.shutdown(socket.SHUT_WR)
    reader.line()
    assert reader.lines(50) == [f"flooder: {n}" for n in range(50)]
    assert "left" in reader.line()
    assert time.monotonic() - began > 40 / 200
    assert flooder.rest() == b""


def test_a_reader_that_never_reads_is_dropped_and_the_speaker_never_delayed(running, monkeypatch):
    monkeypatch.setattr(chat, "UNSENT_MOST", 300_000)
    server = running()
    speaker, reader, stuck = (server.guest(name) for name in ("speaker", "reader", "stuck"))
    stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
    speaker.until("stuck")
    reader.until("stuck")
    line = "x" * 10_000
    for _ in range(2_000):
        speaker.send(line + "\n")
        heard = reader.line()
        if heard != f"speaker: {line}":
            break
    assert heard == f"stuck ({stuck.here()}) left the chat!"
    assert speaker.line() == heard


def test_a_slow_reader_is_closed_after_a_while(running, monkeypatch):
    monkeypatch.setattr(chat, "UNSENT_SLOW", 50_000)
    monkeypatch.setattr(chat, "UNSENT_MOST", 100_000_000)
    monkeypatch.setattr(chat, "SLOW_SECONDS", 0.05)
    server = running()
    speaker, stuck = server.guest("speaker"), server.guest("stuck")
    speaker.until("stuck")
    stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
    for _ in range(1_000):
        speaker.send("x" * 10_000 + "\n")
    assert speaker.line() == f"stuck ({stuck.here()}) left the chat!"


def test_too_many_connections_are_told_which_limit(running, monkeypatch):
    monkeypatch.setattr(chat, "is_loopback", lambda host: False)
    server = running(max_per_address=2)
    first, _ = server.guest("a"), server.guest("b")
    refused = server.guest()
    assert refused.rest().decode() == (
        "* too many connections from 127.0.0.1: 2 at most (--max-per-address); try again later\n"
    )
    first.line()
    first.send("/quit\n")
    assert first.rest() == b""
    first.close()
    while (guest := server.guest()).file.readline() != chat.GREETING:
        pass  # until the server has seen the first one go
    assert guest


def test_a_client_that_is_lost_while_leaving_is_counted_off_once(loop):
    server = chat.Server(loop, chat.ServerOptions(listen=(("127.0.0.1", 0),)))
    guests = [Guest(server.listeners[0].address) for _ in range(2)]
    spin(loop, lambda: len(server.peers) == 2)
    peer = next(iter(server.peers))
    peer.close()
    peer.drop("and lost in the same turn")
    for _ in range(3):
        loop.run_once(0)
    assert len(server.peers) == server.addresses["127.0.0.1"].peers == 1
    for guest in guests:
        guest.close()
    server.listeners[0].close()
    server.close()


def test_a_full_house_says_so(running):
    server = running(max_clients=1)
    server.guest("a")
    assert server.guest().rest() == b"* this server is full: 1 clients; try again later\n"


def test_a_client_that_gives_no_name_is_closed(running, monkeypatch):
    monkeypatch.setattr(chat, "NAMING_SECONDS", 0.15)
    monkeypatch.setattr(chat, "GREETING_SECONDS", 0.05)
    guest = running().guest()
    assert (
        guest.rest() == chat.GREETING + b"* no name after 0 seconds; come back when you have one\n"
    )


def test_answers_from_helpers_come_in_order(running, folder):
    guest = running(data=folder).guest("alice")
    guest.send("one\n/history\n/names\n/history 1\n/list\n")
    lines = [re.sub(r"\d{4}-\S+ \S+", "WHEN", line) for line in guest.until("(1)")]
    assert lines == [
        "* WHEN alice: one",
        "* that was 1 message",
        "* #lobby 1-1 of 1: alice",
        "* WHEN alice: one",
        "* that was 1 message",
        "* #lobby (1)",
    ]


def test_a_busy_database_delays_messages_and_loses_none(running, folder):
    server = running(data=folder)
    alice, bob = server.guest("alice"), server.guest("bob")
    alice.line()
    other = sqlite3.connect(folder / "chat.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    alice.send("one\n/quit\n")
    bob.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        bob.sock.recv(1)
    other.execute("COMMIT")
    other.close()
    bob.sock.settimeout(PATIENCE)
    assert bob.sock.recv(12) == b"alice: one\na"
    assert alice.rest() == b""


def test_after_a_reset_only_what_the_budget_allows_is_acted_on(running):
    server = running(flood=(5.0, 100.0))
    alice = server.guest("alice")
    bob = Guest(server.address)
    bob.send("bob\n" + "".join(f"{n}\n" for n in range(5000)))
    assert "joined" in alice.line()
    bob.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    bob.close()
    count = 0
    while (line := alice.line()) == f"bob: {count}":
        count += 1
    assert "left" in line and count < 500
    assert server.server.addresses["127.0.0.1"].peers == 1


def test_answers_without_end_wait_for_their_reader_and_none_is_lost(running, monkeypatch):
    monkeypatch.setattr(chat, "UNSENT_NO_READ", 20_000)
    server = running()
    alice = server.guest("alice")
    alice.send("/help\n" * 2_000 + "/tell alice done\n")
    lines = alice.until("told alice: done")
    assert len(lines) == 2_000 * len(chat.line_command) + 1


def test_a_backlog_over_tls_arrives_whole(running, certificate):
    server = running(tls_cert=certificate)
    plain = server.guest("plain")
    secret = server.guest("secret", chat.Trust(ca=certificate).context())
    plain.line()
    plain.send(("x" * 1000 + "\n") * 3000)
    plain.sock.shutdown(socket.SHUT_WR)
    assert secret.lines(3000) == ["plain: " + "x" * 1000] * 3000
    assert "left" in secret.line()


def test_a_taken_port_is_one_clear_line(running):
    host, port = running().address
    with pytest.raises(
        chat.Unusable, match=f"cannot listen on {host}:{port}: address already in use"
    ):
        chat.Server(chat.Loop(), chat.ServerOptions(listen=((host, port),)))


def test_junk_in_any_amount_costs_the_server_nothing(running, seeded):
    server = running()
    alice = server.guest("alice")
    for _ in range(30):
        guest = Guest(server.address)
        with contextlib.suppress(OSError):
            guest.send(seeded.randbytes(seeded.choice((1, 100, 200_000))))
            guest.sock.shutdown(socket.SHUT_WR)
            guest.rest()
        guest.close()
    alice.send("/tell alice still here\n")
    assert alice.until("still here")


# KLINE

# KLINE and UNKLINE take an address, a mask or an account, in both dialects; the minutes stand
# before the mask, as in hybrid and its descendants, or behind it.

KLINE, LINE_KLINE = "KLINE {} {} :{}", "/kline {} {} {}"


def come_from(house, label, host, irc=True):
    """A connection from another address; what it received until the end of the turn."""
    session = house.connect_irc(label) if irc else house.connect(label)
    session.conn.address = f"{host}:4000"
    house.say(label, *([f"NICK {label}", "USER user 0 * :r"] if irc else [label]))
    house.turn()
    return house.heard(label)


def is_closed(house, label):
    return house.guests[label].conn.closed


def operated():
    house = irc_house("#a", root="", witness="")
    asked(house, "root", "OPER boss secret")
    return house


BANNED_MASKS = [  # what is banned, a connection that it is for: name, address
    ("10.0.0.9", "mallory", "10.0.0.9"),
    ("*@10.0.0.9", "mallory", "10.0.0.9"),
    ("*!*@10.0.0.*", "mallory", "10.0.0.9"),
    ("*!~user@10.*", "mallory", "10.0.0.9"),
    ("mal*!*@*", "mallory", "10.0.0.9"),
]


# Those who are here leave, with 465 or ERROR; new ones are not let in; others are
@pytest.mark.parametrize("mask, name, host", BANNED_MASKS)
def test_a_kline_closes_connections_that_it_is_for_and_lets_no_new_one_in(mask, name, host):
    house = operated()
    come_from(house, name, host)
    asked(house, name, "JOIN #a")
    come_from(house, "innocent", "11.0.0.9")
    forget(house)
    assert not fails(asked(house, "root", KLINE.format(10, mask, "go away")))
    assert is_closed(house, name) and not is_closed(house, "innocent")
    told = heard(house, name)
    assert of(told, "ERROR") and len(of(heard(house, "witness"), "QUIT")) == 1
    again = [parsed(line) for line in come_from(house, name, host)]
    assert is_closed(house, name) and not of(again, "001") and of(again, "465")
    assert of(again, "ERROR")


@pytest.mark.parametrize("mask, name, host", BANNED_MASKS[:3])
def test_a_kline_is_for_netcat_too(mask, name, host):
    house = operated()
    come_from(house, name, host, irc=False)
    asked(house, "root", KLINE.format(10, mask, "go away"))
    assert is_closed(house, name)
    assert come_from(house, name, host, irc=False) and is_closed(house, name)


# Minutes
def test_a_kline_ends_after_its_minutes():
    house = operated()
    asked(house, "root", KLINE.format(10, "10.0.0.9", "go away"))
    house.now += 9 * 60
    house.turn()
    come_from(house, "mallory", "10.0.0.9")
    assert is_closed(house, "mallory")
    house.now += 2 * 60
    house.turn()
    assert any(" 001 " in line for line in come_from(house, "mallory", "10.0.0.9"))
    assert not of(asked(house, "root", "STATS k"), "216")


def test_unkline_ends_a_kline_and_stats_lists_them():
    house = operated()
    asked(house, "root", KLINE.format(10, "*!*@10.0.0.9", "go away"))
    asked(house, "root", KLINE.format(60, "*!*@10.0.0.8", "and you"))
    lines = asked(house, "root", "STATS k")
    assert [line.verb for line in lines] == ["216", "216", "219"]
    assert sorted(re.search(r"10\.0\.0\.\d", str(x.params))[0] for x in lines[:2]) == [
        "10.0.0.8",
        "10.0.0.9",
    ]
    assert lines[-1].params[1] == "k"
    asked(house, "root", "UNKLINE *!*@10.0.0.9")
    assert [line.verb for line in asked(house, "root", "STATS k")] == ["216", "219"]
    assert any(" 001 " in line for line in come_from(house, "mallory", "10.0.0.9"))
    # what is not there is an error of some sort, and not silence
    assert asked(house, "root", "UNKLINE *!*@10.0.0.9")


# Only for server operators
@pytest.mark.parametrize("line", [KLINE.format(10, "10.0.0.9", "x"), "UNKLINE 10.0.0.9"])
def test_kline_is_for_server_operators(line):
    house = operated()
    assert [x.verb for x in asked(house, "witness", line)] == ["481"]
    asked(house, "root", KLINE.format(10, "10.0.0.7", "x"))
    assert not of(asked(house, "witness", "STATS k"), "216")
    assert any(" 001 " in text for text in come_from(house, "mallory", "10.0.0.9"))


@pytest.mark.parametrize("line", ["KLINE", "UNKLINE"])
def test_kline_needs_to_know_whom(line):
    house = operated()
    assert [x.verb for x in asked(house, "root", line)] == ["461"]


@pytest.mark.parametrize("minutes", ["-1", "99999999999999999999999"])
def test_a_kline_of_no_sensible_time_is_refused(minutes):
    house = operated()
    assert asked(house, "root", KLINE.format(minutes, "10.0.0.9", "x"))
    assert not of(asked(house, "root", "STATS k"), "216")


# Of an account, wherever it comes from; also by a log-in after the welcome
def test_a_kline_of_an_account_is_for_all_who_log_in_to_it():
    house = operated()
    come_from(house, "mallory", "10.0.0.9")
    assert of(asked(house, "mallory", "REGISTER * * password"), "REGISTER")
    asked(house, "mallory", "QUIT")
    come_from(house, "innocent", "10.0.0.9")
    asked(house, "root", KLINE.format(10, "a:mallory", "go away"))
    assert not is_closed(house, "innocent")
    logged_in(house, "first", "mallory")
    assert is_closed(house, "first")
    come_from(house, "second", "10.0.0.8")
    asked(house, "second", "NS IDENTIFY mallory password")
    assert is_closed(house, "second")


# Stored
def test_a_kline_survives_a_restart(folder):
    path = folder / "chat.db"
    house = House(store=chat.Store(path))
    house.enter_irc("root")
    asked(house, "root", "OPER boss secret")
    asked(house, "root", KLINE.format(10, "10.0.0.9", "go away"))
    asked(house, "root", KLINE.format(10, "10.0.0.8", "go away"), "UNKLINE 10.0.0.8")
    house = restarted(house, path)
    come_from(house, "mallory", "10.0.0.9")
    assert is_closed(house, "mallory")
    come_from(house, "other", "10.0.0.8")
    assert not is_closed(house, "other")
    house.store.close()


# In the line protocol too
def test_kline_and_unkline_work_in_the_line_protocol():
    house = irc_house("#lobby", watcher="")
    house.enter("dora", "eve")
    for who in ("dora", "eve"):
        house.say(who, LINE_KLINE.format(10, "10.0.0.9", "go away"))
        house.turn()
    forget(house)
    come_from(house, "early", "10.0.0.9")
    assert not is_closed(house, "early")  # dora is no operator yet
    house.say("dora", "/oper boss secret")
    house.turn()
    house.say("dora", LINE_KLINE.format(10, "10.0.0.9", "go away"))
    house.turn()
    assert is_closed(house, "early")
    come_from(house, "mallory", "10.0.0.9", irc=False)
    assert is_closed(house, "mallory")
    forget(house)
    house.say("dora", "/stats k")
    house.turn()
    assert any("10.0.0.9" in line for line in house.heard("dora"))
    house.say("dora", "/unkline 10.0.0.9")
    house.turn()
    come_from(house, "late", "10.0.0.9")
    assert not is_closed(house, "late")


# Machine faults


def replace_folder(data, make):
    data.rename(data.with_name("moved"))
    make(data)


def replace_file(data, make):
    (data / "chat.db").rename(data / "moved.db")
    make(data / "chat.db")


def empty_folder(data):
    for path in data.iterdir():
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


DATA_LOSSES = {
    "folder removed": shutil.rmtree,
    "folder moved": lambda data: data.rename(data.with_name("moved")),
    "folder emptied": empty_folder,
    "another folder there": lambda data: replace_folder(data, pathlib.Path.mkdir),
    "a file there": lambda data: replace_folder(data, pathlib.Path.touch),
    "database removed": lambda data: (data / "chat.db").unlink(),
    "database moved": lambda data: (data / "chat.db").rename(data / "moved.db"),
    "another database there": lambda data: replace_file(
        data, lambda path: shutil.copy(path.with_name("moved.db"), path)
    ),
}


# Said once in the log, NOT_KEPT for the sender, never an echo of
# what was not stored; and the fifth: SIGTERM ends the server all the same
@pytest.mark.parametrize("loss", some(["disk full", *DATA_LOSSES], 3))
def test_when_the_data_is_gone_each_message_is_delivered_and_not_acknowledged(tmp_path, loss):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        alice, bob, dora = (Visitor(address) for _ in range(3))
        alice.enter_irc("alice", ECHOING, "JOIN #a", "JOIN #lobby")
        bob.enter_irc("bob", "JOIN #a")
        dora.enter("dora")
        assert say_one_by_one(alice, ["before"]) == {"before": True}
        DATA_LOSSES[loss](data) if loss in DATA_LOSSES else limit_files(process, 1)
        after = say_one_by_one(alice, map(str, range(40)))
        assert [text for text, echoed in after.items() if echoed] == []
        assert [line.rpartition(":")[2] for line in bob.until(":39\r")[-40:]] == [
            f"{n}\r" for n in range(40)
        ]
        dora.send("hello\n")
        assert dora.line().startswith("* ")
        assert any(" PRIVMSG #lobby :hello" in line for line in alice.ask())
        assert alice.ask(
            "JOIN #new", "TOPIC #a :t", "MARKREAD #a timestamp=2025-01-01T00:00:00.000Z"
        )
        assert eventually(lambda: troubles(log.read_text()))  # while it runs ...
        terminate(process)
    assert len(troubles(log.read_text())) == 1, log.read_text()  # ... and once
    check_log(log.read_text())


# Also: a file of the database that SQLite itself would not miss
@pytest.mark.parametrize("name", some(["chat.db-wal", "chat.db-shm"]))
def test_every_message_that_was_echoed_is_found_by_the_next_server(tmp_path, name):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        alice = Visitor(address)
        alice.enter_irc("alice", ECHOING, "JOIN #a")
        say_one_by_one(alice, ["before"])
        (data / name).unlink()
        echoed = say_one_by_one(alice, map(str, range(10)))
        process.kill()
    assert {text for text, was in echoed.items() if was} <= texts_kept(data)
    check_log(log.read_text())


# Also: room on the disk again, or the folder back where it was
def test_what_is_echoed_once_the_fault_is_over_is_kept(tmp_path):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        alice = Visitor(address)
        alice.enter_irc("alice", ECHOING, "JOIN #a")
        limit_files(process, 1)
        assert say_one_by_one(alice, ["full"]) == {"full": False}
        limit_files(process, resource.RLIM_INFINITY)
        assert say_one_by_one(alice, ["room"]) == {"room": True}
        data.rename(tmp_path / "moved")
        assert say_one_by_one(alice, ["away"]) == {"away": False}
        (tmp_path / "moved").rename(data)
        echoed = say_one_by_one(alice, ["back"])
        terminate(process)
    kept = texts_kept(data)
    assert {text for text, was in echoed.items() if was} | {"room"} <= kept
    check_log(log.read_text())


BUSY_SCRIPT = (  # something for every table: each line is answered or refused
    *("@+chat.py/id=once PRIVMSG #a :text", "@+chat.py/id=once PRIVMSG #a :text"),
    *("PRIVMSG bob :text", "JOIN #other", "PART #other", "TOPIC #a :topic", "MODE #a +m-m"),
    "MARKREAD #a timestamp=2025-01-01T00:00:00.000Z",
    *("CHATHISTORY LATEST #a * 10", "SEARCH text=text", "METADATA #a SET url :x"),
    "CHATHISTORY TARGETS timestamp=2020-01-01T00:00:00.000Z timestamp=2099-01-01T00:00:00.000Z 9",
    *("NS CERT", "INVITE bob #a", "AWAY :away", "AWAY", "NICK alice2", "NICK alice", "WHOIS bob"),
)


def talk_through(address, name, *before):
    """A client of `address` that uses everything that is stored; it must be answered."""
    guest = Visitor(address)
    guest.enter_irc(name, ECHOING, "JOIN #a", *before)
    return guest


def tables_of(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
        names = [row[0] for row in db.execute(query)]
    return [name for name in names if not name.startswith(("sqlite_", "search_"))]


def change(path, *statements):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)) as db:
        db.execute("PRAGMA legacy_alter_table = ON")
        for statement in statements:
            db.execute(statement).fetchall()


# With any table missing, the sender stays connected
def test_when_a_table_is_missing_while_the_server_runs_no_sender_is_disconnected(tmp_path):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        bob = talk_through(address, "bob")
        alice = talk_through(address, "alice", "REGISTER * * swordfish99")
        alice.ask(*BUSY_SCRIPT)
        for table in tables_of(data / "chat.db"):
            change(data / "chat.db", f'ALTER TABLE "{table}" RENAME TO "gone"')
            lines = alice.ask(*(line.replace("=once", f"={table}") for line in BUSY_SCRIPT))
            told = [line for line in lines if "NOT_KEPT" in line or "PRIVMSG #a :text" in line]
            assert told, f"without {table} nothing was said of the message: {lines}"
            bob.ask("CHATHISTORY LATEST #a * 10")
            change(data / "chat.db", f'ALTER TABLE "gone" RENAME TO "{table}"')
        terminate(process)
    check_log(log.read_text())


def overwrite(path, start, size=None):
    """Put junk over a part of a file, while others have it open."""
    with path.open("r+b") as file:
        size = size or path.stat().st_size - start
        file.seek(start)
        file.write(b"\xa5" * max(0, size))


PAGE_DAMAGES = {
    "all pages but the first": lambda path: overwrite(path, 4096),
    "the header": lambda path: overwrite(path, 0, 100),
    "cut to a page": lambda path: os.truncate(path, 4096),
    "cut to nothing": lambda path: os.truncate(path, 0),
}


# With damaged pages; and the last: SIGTERM
@pytest.mark.parametrize("damage", some(PAGE_DAMAGES, 2))
def test_when_pages_are_damaged_while_the_server_runs_no_sender_is_disconnected(tmp_path, damage):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        alice, bob = talk_through(address, "alice"), talk_through(address, "bob")
        alice.ask(*BUSY_SCRIPT, *(f"@+chat.py/id={n} PRIVMSG #a :{n}" for n in range(300)))
        bob.ask()
        # all pages into the file, and every cache of a page out of date
        change(data / "chat.db", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA user_version = 6")
        change(data / "chat.db", "CREATE TABLE x (y)", "DROP TABLE x")
        change(data / "chat.db", "PRAGMA wal_checkpoint(TRUNCATE)")
        PAGE_DAMAGES[damage](data / "chat.db")
        echoed = say_one_by_one(alice, ["a1", "a2", "a3"])
        assert len(echoed) == 3
        alice.ask(*BUSY_SCRIPT)
        bob.ask(*BUSY_SCRIPT)
        terminate(process)
    check_log(log.read_text())


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory):
    """A data folder with a row in every table."""
    data = tmp_path_factory.mktemp("full") / "data"
    data.mkdir(mode=0o700)
    server = Running(data=data)  # in a thread: its passwords cost little
    alice, bob = Visitor(server.address), Visitor(server.address)
    try:
        session = ["CAP REQ :chat.py/session", "SESSION " + "a" * 32]
        bob.enter_irc("bob", ECHOING, "JOIN #a", "REGISTER * * swordfish99")
        alice.send("CAP LS 302\r\n" + "".join(f"{line}\r\n" for line in session))
        alice.enter_irc("alice", "CAP END", ECHOING, "REGISTER * * swordfish99", "JOIN #a")
        alice.ask("JOIN #own", "REGISTER #own", *BUSY_SCRIPT)
    finally:
        for guest in (alice, bob):
            guest.close()
        server.stop()
    (data / "lock").touch()
    return data


def damaged_copy(full_folder, to, *statements):
    shutil.copytree(full_folder, to)
    change(to / "chat.db", *statements)
    return to


def columns_of(path):
    """(table, column, a value of it) of all tables that have rows."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        for table in tables_of(path):
            cursor = db.execute(f'SELECT * FROM "{table}" LIMIT 1')
            columns, row = cursor.description, cursor.fetchone()
            for (column, *_), value in zip(columns, row, strict=True) if row else ():
                yield table, column, value


JUNK_VALUES = {int: ("'junk'", "-9223372036854775808"), bytes: ("'junk'",), str: ("x'ff00fe'",)}
JSON_JUNK = ("'{'", "'null'", "'[1, [2], {}]'", "'{\"name\": 5}'", "x'ff00fe'")


def wrong_values(value):
    structured = isinstance(value, str) and value[:1] in ("{", "[")
    return JSON_JUNK if structured else JUNK_VALUES[type(value)]


def use_database(folder):
    """Start a server on the folder; "" if it works, or the one line that refuses."""
    try:
        server = Running(data=folder)
    except chat.ChatError as error:
        return str(error)
    try:
        alice, carol = Visitor(server.address), Visitor(server.address)
        server.guests += [alice, carol]
        alice.send("CAP REQ :chat.py/session sasl\r\n" + sasl_plain("swordfish99") + "\r\n")
        alice.send("SESSION " + "a" * 32 + "\r\n")
        alice.enter_irc("alice", "CAP END", "JOIN #a,#own", *BUSY_SCRIPT)
        carol.enter_irc("carol", "JOIN #a,#own", *BUSY_SCRIPT, "NS IDENTIFY bob swordfish99")
    finally:
        server.stop()
    return ""


# (in any table): wrong types and broken JSON in each column. In the
# process of the test, because it is many starts; the exit status is tested below
@thorough
def test_wrong_values_in_any_column_are_one_clear_line_or_do_no_harm(full_folder, tmp_path, caplog):
    faults = []
    statements = [
        f'UPDATE OR IGNORE "{table}" SET "{column}" = {junk}'
        for table, column, value in columns_of(full_folder / "chat.db")
        for junk in wrong_values(value)
    ]
    for n, statement in enumerate(statements):
        try:
            folder = damaged_copy(full_folder, tmp_path / str(n), statement)
        except sqlite3.IntegrityError:
            continue  # SQLite itself does not let that happen
        try:
            said = use_database(folder)
        except (Exception, AssertionError) as error:  # all of them are wanted in one list
            said = f"\n{error!r:.200}"
        if "\n" in said:
            faults.append((statement, said))
        if "a bug" in caplog.text:
            faults.append((statement, caplog.records[-1].getMessage()))
        caplog.clear()
        shutil.rmtree(folder)
    assert "\n".join(map(str, faults)) == ""


def root_pages(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        pages = db.execute("SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0").fetchall()
        return [page for page in pages if not page[0].startswith(("search_", "sqlite_"))]


def start_damages(path):
    """Yield what is damaged, and a function that damages the copy."""
    for table in tables_of(path):
        if table not in ("parts", "covered"):  # the search index may be made once more
            yield f"no {table}", lambda copy, t=table: change(copy, f'DROP TABLE "{t}"')
    for name, page in root_pages(path):
        yield f"page of {name}", lambda copy, p=page: overwrite(copy, (p - 1) * 4096, 4096)
    yield "half", lambda copy: os.truncate(copy, copy.stat().st_size // 8192 * 4096)
    yield "a page", lambda copy: os.truncate(copy, 4096)
    yield "a tenth of a page", lambda copy: os.truncate(copy, 400)
    yield "header", lambda copy: overwrite(copy, 16, 84)
    yield "an older version", lambda copy: change(copy, "PRAGMA user_version = 3")
    yield "a negative version", lambda copy: change(copy, "PRAGMA user_version = -1")
    yield "a newer version", lambda copy: change(copy, "PRAGMA user_version = 9999")


# One clear line, status 1, no traceback, nothing changed
def test_a_damaged_database_is_one_clear_line_and_status_1(full_folder, tmp_path):
    damages = list(start_damages(full_folder / "chat.db"))
    damages = damages if THOROUGH else damages[::8]  # each is a process to start
    faults = []
    for n in range(0, len(damages), 8):  # some at a time
        faults += refused_starts(full_folder, tmp_path / str(n), damages[n : n + 8])
    assert "\n".join(map(str, faults)) == ""


def refused_starts(full_folder, tmp_path, damages):
    """Start a server on a folder for each damage; what was wrong with how it was refused."""
    with contextlib.ExitStack() as stack:
        started = []
        for n, (what, damage) in enumerate(damages):
            folder = tmp_path / f"{n}"
            shutil.copytree(full_folder, folder)
            damage(folder / "chat.db")
            before = (folder / "chat.db").read_bytes()
            arguments = ("server", "--listen", "127.0.0.1:0", "--data", folder)
            process = stack.enter_context(program(*arguments))
            started.append((what, folder, before, process))
        for what, folder, before, process in started:
            if process.stdout.readline():
                process.kill()
            status, errors = process.wait(PATIENCE), process.stderr.read().decode()
            unchanged = (folder / "chat.db").read_bytes() == before
            one_line = len(errors.splitlines()) == 1 and str(folder) in errors
            if not (status == 1 and one_line and unchanged):
                yield what, status, errors[-200:], "unchanged" if unchanged else "changed"


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


# An existing folder, and the files in it
@pytest.mark.parametrize("mode", some([0o755, 0o700, 0o750, 0o701], 2))
def test_a_folder_that_others_can_read_is_tightened_and_that_is_said(tmp_path, mode):
    data, log = tmp_path / "data", tmp_path / "log"
    data.mkdir()
    for name in ("chat.db", "lock"):
        (data / name).touch()
        (data / name).chmod(0o644 if mode & 0o77 else 0o600)
    data.chmod(mode)
    with logging_to(log, "--data", data) as (process, address):
        Visitor(address).enter("alice")
        assert mode_of(data) == 0o700
        assert {path.name: oct(mode_of(path)) for path in data.iterdir()} == {
            path.name: "0o700" if path.is_dir() else "0o600" for path in data.iterdir()
        }
        terminate(process)
    said = [line for line in log.read_text().splitlines() if str(data) in line]
    assert len(said) == (mode != 0o700), log.read_text()


STRANGE_FILES = {  # in place of a file of the data folder
    "a link": lambda path, other: path.symlink_to(other),
    "a link to nothing": lambda path, other: path.symlink_to(
        other.with_name(f"{other.name} nothing")
    ),
    "a folder": lambda path, other: path.mkdir(),
    "a pipe": lambda path, other: os.mkfifo(path),
}


# A link, and its kind: anything that is no file of ours
def test_a_database_or_lock_that_is_no_plain_file_is_refused(full_folder, tmp_path):
    with contextlib.ExitStack() as stack:
        started = []
        for name, kind in itertools.product(("chat.db", "lock", "chat.db-wal"), STRANGE_FILES):
            folder = tmp_path / f"{name} {kind}"
            shutil.copytree(full_folder, folder)
            other = tmp_path / f"other {name} {kind}"
            shutil.copy(full_folder / "chat.db", other)
            (folder / name).unlink(missing_ok=True)
            STRANGE_FILES[kind](folder / name, other)
            arguments = ("server", "--listen", "127.0.0.1:0", "--data", folder)
            process = stack.enter_context(program(*arguments))
            started.append((f"{name}: {kind}", process, folder, other))
        faults = []
        for what, process, folder, other in started:
            listening = process.stdout.readline()
            if listening:
                process.kill()
            status, errors = process.wait(PATIENCE), process.stderr.read().decode()
            fine = status == 1 and len(errors.splitlines()) == 1 and str(folder) in errors
            untouched = other.read_bytes() == (full_folder / "chat.db").read_bytes()
            unmade = not other.with_name(f"{other.name} nothing").exists()
            if listening or not (fine and untouched and unmade):
                faults.append((what, bool(listening), status, errors))
    assert "\n".join(map(str, faults)) == ""


# A lock that is gone must not let two servers into one folder
@pytest.mark.parametrize(
    "loss", some([pathlib.Path.unlink, lambda p: p.rename(p.with_name("old"))])
)
def test_two_servers_never_keep_messages_in_one_folder(tmp_path, loss):
    data, log = tmp_path / "data", tmp_path / "log"
    with logging_to(log, "--data", data, "--flood", "off") as (process, address):
        alice = Visitor(address)
        alice.enter_irc("alice", ECHOING, "JOIN #a")
        assert say_one_by_one(alice, ["before"]) == {"before": True}
        loss(data / "lock")
        with program("server", "--listen", "127.0.0.1:0", "--data", data) as second:
            both = bool(second.stdout.readline())
            kept = say_one_by_one(alice, ["after"])["after"]
            assert not (both and kept)
            if not both:
                assert second.wait(PATIENCE) == 1
        terminate(process)
    check_log(log.read_text())


def hanging_mail(tmp_path):
    """A --sendmail that waits until release() is called."""
    pipe = tmp_path / "mail"
    os.mkfifo(pipe)

    def release():
        for _ in range(8):
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    return f"sh -c {shlex.quote(f'cat >/dev/null; read x < {pipe}')}", release


def hold_locked(stack, process, data, address):
    db = sqlite3.connect(data / "chat.db", isolation_level=None)
    stack.callback(db.close)
    db.execute("BEGIN IMMEDIATE")


def fill_disk(stack, process, data, address):
    limit_files(process, 1)


def connect_slow_readers(stack, process, data, address):
    for n in range(20):
        guest = Visitor(address)
        stack.callback(guest.close)
        guest.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        quietly(guest, f"slow{n}\n" + "/help\n" * 3000)


def ask_for_mails(stack, process, data, address):
    for n in range(4):
        guest = Visitor(address)
        stack.callback(guest.close)
        guest.send(f"mail{n}\n/register swordfish99 m{n}@example.com\n")


def ask_for_passwords(stack, process, data, address):
    for n in range(60):
        guest = Visitor(address)
        stack.callback(guest.close)
        guest.send(f"NICK p{n}\r\nUSER u 0 * :r\r\nREGISTER * * swordfish99\r\n")


def ask_for_pages(stack, process, data, address):
    for n in range(60):  # a helper reads while the server closes its database
        guest = Visitor(address)
        guest.send(f"NICK h{n}\r\nUSER u 0 * :r\r\nJOIN #a\r\nCHATHISTORY LATEST #a * 50\r\n")
        guest.reset()


# What else may keep a server from ending
@pytest.mark.parametrize(
    "trouble",
    some(
        [hold_locked, ask_for_passwords, fill_disk, ask_for_mails, ask_for_pages]
        + [connect_slow_readers],
        2,
    ),
)
def test_sigterm_ends_a_server_in_trouble(tmp_path, trouble):
    data, log = tmp_path / "data", tmp_path / "log"
    command, release = hanging_mail(tmp_path)
    options = ["--sendmail", command, "--register", "email-required"]
    mail = options if trouble is ask_for_mails else []
    with contextlib.ExitStack() as stack:
        stack.callback(release)
        process, address = stack.enter_context(logging_to(log, "--data", data, *mail))
        alice = Visitor(address)
        alice.enter_irc("alice", ECHOING, "JOIN #a")
        trouble(stack, process, data, address)
        alice.send("PRIVMSG #a :last\r\n")
        if trouble is not hold_locked:
            alice.ask()
        terminate(process, close=trouble is not connect_slow_readers)
    check_log(log.read_text())


def a_pipe_that_is_not_read():
    read, write = os.pipe()
    fcntl.fcntl(write, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
    return read, write


def a_pipe_without_a_reader():
    read, write = os.pipe()
    os.close(read)
    return None, write


def a_full_device():
    return None, os.open("/dev/full", os.O_WRONLY)


# If standard error is not read, the server stops, and SIGTERM does not end it
@pytest.mark.parametrize(
    "open_log", some([a_full_device, a_pipe_without_a_reader, a_pipe_that_is_not_read], 2)
)
def test_a_log_that_cannot_be_written_does_not_stop_the_server(open_log):
    reading, writing = open_log()
    options = ("--data", "none", "--log", "debug", "--flood", "off")
    with contextlib.ExitStack() as stack:
        for fd in filter(None, (reading, writing)):
            stack.callback(os.close, fd)
        process, address = stack.enter_context(serving(*options, stderr=writing))
        guest = Visitor(address)
        guest.enter_irc("alice")
        guest.sock.settimeout(3)
        for n in range(200):
            other = Visitor(address)
            other.send("GET / HTTP/1.1\r\n\r\n")
            other.rest()
            other.close()
            if n % 20 == 0:
                guest.ask()
        guest.ask()
        terminate(process)


# Also: count what is dropped: what is logged and what is said to be dropped is
# all that happened
@thorough
def test_lines_that_the_log_had_to_drop_are_counted():
    reading, writing = a_pipe_that_is_not_read()
    ports, found = set(), bytearray()

    def accounted_for():
        """Connections whose address is in the log, and the numbers that it tells otherwise."""
        with contextlib.suppress(BlockingIOError):
            found.extend(os.read(reading, 65536))
        lines = found.decode(errors="replace").split("\n")[:-1]
        logged = {port for line in lines for port in re.findall(r"127\.0\.0\.1:(\d+)", line)}
        others = (line.split(" ", 2)[-1] for line in lines if "127.0.0.1:" not in line)
        counts = [
            int(n.replace(",", "")) for line in others for n in re.findall(r"\b\d[\d,]*", line)
        ]
        return len(logged & ports) + sum(counts) >= len(ports)

    with contextlib.ExitStack() as stack:
        stack.callback(os.close, reading)
        process, address = stack.enter_context(serving("--data", "none", stderr=writing))
        os.close(writing)
        for _ in range(1500):
            other = Visitor(address)
            ports.add(str(other.sock.getsockname()[1]))
            other.sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # TLS: one line
            assert other.rest() == b""
            other.close()
        os.set_blocking(reading, False)
        assert eventually(accounted_for, 3), found[-300:]
        terminate(process)


CONTROLS = "\x1b]0;owned\x07\x08\x7f\x9b31m\x85\u2028\u2029\u202e"


# One entry to the log, which escapes what would control a terminal or
# forge a line
def test_nothing_that_a_client_says_controls_a_terminal_that_shows_the_log(tmp_path):
    log = tmp_path / "log"
    options = ("--data", "none", "--log", "debug", "--flood", "off", "--oper", "boss:secret99")
    with logging_to(log, *options) as (process, address):
        boss, victim, netcat = (Visitor(address) for _ in range(3))
        boss.enter_irc("boss", "JOIN #a")
        victim.enter_irc("victim")
        netcat.send(f"dora{CONTROLS}\n/oper x{CONTROLS} y\n/quit x{CONTROLS}\n")
        netcat.rest()
        boss.ask(f"OPER x{CONTROLS} y{CONTROLS}", "OPER boss secret99")
        boss.ask(
            f"WALLOPS :{CONTROLS}",
            f"KILL victim :bye{CONTROLS}",
            f"KLINE 127.0.0.77 5 :{CONTROLS}",
            f"TOPIC #a :{CONTROLS}",
            f"UNKLINE x{CONTROLS}",
            f"NS DROP x{CONTROLS}",
        )
        victim.rest()
        browser = Visitor(address)
        browser.send(f"GET /{CONTROLS} HTTP/1.1\r\n\r\n")
        browser.rest()
        boss.send(f"QUIT :bye{CONTROLS}\r\n")
        boss.rest()
        terminate(process)
    text = log.read_bytes().decode()
    check_log(text)
    assert "victim" in text and "boss" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text), text
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in text.splitlines()), text


def another_certificate(folder):
    """A self-signed one, other than the first."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-keyout", folder / "key", "-out", folder / "cert"]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return (folder / "key").read_text() + (folder / "cert").read_text()


def shown_certificate(address):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(address, PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sealed,
    ):
        return sealed.getpeercert(binary_form=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate")
def test_sighup_reads_motd_certificate_and_passwords_again_and_ends_nothing(tmp_path):
    files = {name: tmp_path / name for name in ("motd", "pem", "oper", "password", "log")}
    files["motd"].write_text("first\n")
    files["pem"].write_text(CERTIFICATE)
    files["oper"].write_text("oldsecret\n")
    files["password"].write_text("oldword\n")
    new = another_certificate(tmp_path)
    options = ["--data", tmp_path / "data", "--motd", files["motd"], "--tls-cert", files["pem"]]
    options += ["--oper", f"boss:@{files['oper']}", "--password", f"@{files['password']}"]
    with logging_to(files["log"], *options) as (process, address):
        alice = Visitor(address)
        alice.send("PASS oldword\r\n")
        alice.enter_irc("alice")
        before = shown_certificate(address)
        for name, text in (("motd", "second\n"), ("pem", new), ("oper", "newsecret\n")):
            files[name].write_text(text)
        files["password"].write_text("newword\n")
        process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "second" in str(alice.ask("MOTD")), 3)
        assert shown_certificate(address) != before
        assert any(" 381 " in line for line in alice.ask("OPER boss newsecret"))
        bob = Visitor(address)
        bob.send("PASS newword\r\n")
        bob.enter_irc("bob")
        assert process.poll() is None
        # what cannot be read leaves everything as it was, and that is said once
        files["motd"].write_text("third\n")
        files["pem"].write_text("junk")
        process.send_signal(signal.SIGHUP)

        def said():
            lines = troubles(files["log"].read_text())
            return [line for line in lines if str(files["pem"]) in line]

        assert eventually(said, 3)
        assert "second" in str(alice.ask("MOTD")) and shown_certificate(address) != before
        terminate(process)
    assert len(said()) == 1
    check_log(files["log"].read_text())


KLINE_LINE = "KLINE {mask} {minutes} :{reason}"


# Stored, over restarts; listed; taken back; for operators alone
@pytest.mark.parametrize(
    ("mask", "caught", "spared"),
    [
        ("127.0.0.5", ("eve", "127.0.0.5"), ("eve", "127.0.0.6")),
        ("eve!*@*", ("eve", "127.0.0.5"), ("adam", "127.0.0.5")),
        ("*!*@127.0.0.5", ("eve", "127.0.0.5"), ("eve", "127.0.0.6")),
    ],
)
def test_operators_ban_from_the_server_for_a_time(running, tmp_path, mask, caught, spared):
    def start():
        server = running(data=tmp_path / "data", oper=[("boss", "secret99")])
        boss = Visitor(server.address)
        server.guests.append(boss)
        boss.enter_irc("boss", "OPER boss secret99")
        return server, boss

    def comes_in(server, name, source):
        guest = Visitor(server.address, source)
        guest.send(f"NICK {name}\r\nUSER u 0 * :r\r\nPING in\r\n")
        line = "-"
        with contextlib.suppress(ConnectionResetError):
            while line and "PONG" not in line and f" 001 {name} " not in line:
                line = guest.file.readline().decode()  # "" at the end
        guest.close()
        return f" 001 {name} " in line

    (tmp_path / "data").mkdir()
    server, boss = start()
    eve = Visitor(server.address, caught[1])
    eve.enter_irc(caught[0])
    assert any(
        " 481 " in line for line in eve.ask(KLINE_LINE.format(mask="x", minutes=1, reason="y"))
    )
    boss.ask(KLINE_LINE.format(mask=mask, minutes=5, reason="junk"))
    assert b"ERROR " in eve.rest()
    eve.close()
    for _ in range(2):
        assert not comes_in(server, *caught)
        assert comes_in(server, *spared)
        assert any(" 216 " in line for line in boss.ask("STATS k"))
        server.stop()
        server, boss = start()
    boss.ask(f"UNKLINE {mask}")
    assert comes_in(server, *caught)
    assert not any(" 216 " in line for line in boss.ask("STATS k"))


# LIMITS on processor time, memory and lifetime


# Give TAGMSG the target limit of PRIVMSG
@pytest.mark.parametrize("start", ["PRIVMSG {} :hi", "TAGMSG {}"])
def test_a_line_with_too_many_targets_reaches_none_of_them(running, start):
    server = running()
    alice, bob = Visitor(server.address), Visitor(server.address)
    server.guests += [alice, bob]
    alice.enter_irc("alice", "CAP REQ message-tags")
    bob.enter_irc("bob", "CAP REQ message-tags")
    targets = ",".join(["bob", *(f"#none{n}" for n in range(20))])
    assert [line.split()[1] for line in alice.ask("@+x=y " + start.format(targets))] == ["407"]
    alice.ask("@+x=y " + start.format("bob"))
    heard = bob.ask()
    assert len([line for line in heard if ":alice!" in line]) == 1


MEMBERS = 40
CROWDS = ",".join(f"#crowd{n}" for n in range(6))
MANY = ",".join(f"m{n}" for n in range(20))
OWN = ",".join(f"#own{n}" for n in range(20))
ATTACKS = {  # lines that one connection of the attacker sends; {} is its number
    "PRIVMSG to 20 users": [f"PRIVMSG {MANY} :x"],
    "NOTICE to 20 users": [f"NOTICE {MANY} :x"],
    "TAGMSG to 20 users": [f"@+x=y TAGMSG {MANY}"],
    "TAGMSG to 20 channels with 60 bans": [
        f"@+x=y TAGMSG {','.join(f'#ban{n}' for n in range(20))}"
    ],
    "PRIVMSG to 20 channels with 60 bans": [
        f"PRIVMSG {','.join(f'#ban{n}' for n in range(20))} :x"
    ],
    "JOIN and PART of channels with members": [f"JOIN {CROWDS}", f"PART {CROWDS}"],
    "JOIN and PART of new channels": [f"JOIN {OWN}", f"PART {OWN}"],
    "NAMES of channels with members": [f"NAMES {CROWDS}"],
    "WHO of all": ["WHO *"],
    "WHO of a channel": ["WHO #crowd0"],
    "RENAME among members": ["RENAME #mine{} #yours{}", "RENAME #yours{} #mine{}"],
    "METADATA of a channel": ["METADATA #mine{} SET url :a", "METADATA #mine{} SET url :b"],
    "NICK among members": ["NICK x{}", "NICK y{}"],
    "LIST with a mask": ["LIST *a*b*c*d*e*f*"],
    "LUSERS": ["LUSERS"],
    "MONITOR of 100 names": [f"MONITOR + {','.join(f'w{n}' for n in range(100))}", "MONITOR S"],
}


@pytest.fixture(scope="module")
def crowd():
    """A server with members from addresses of their own in several channels."""
    with serving("--data", "none") as (process, address):
        members = [Visitor(address, f"127.0.1.{n + 1}") for n in range(MEMBERS)]
        for n, member in enumerate(members):
            member.send(f"NICK m{n}\r\nUSER u 0 * :r\r\nCAP REQ :message-tags draft/metadata-2\r\n")
            member.send(f"METADATA * SUB url\r\nJOIN {CROWDS}\r\n")
        owner = Visitor(address, "127.0.2.1")
        owner.enter_irc("owner")
        for n in range(20):
            masks = [f"*a{n}*b*c*d*e*f*{m}!*@*" for m in range(60)]
            lines = [
                f"MODE #ban{n} +{'b' * 12} {' '.join(masks[m : m + 12])}" for m in range(0, 60, 12)
            ]
            owner.ask(f"JOIN #ban{n}", f"MODE #ban{n} -n", *lines)
        for member in members:
            member.ask()
        yield process, address, members
        for guest in (owner, *members):
            guest.close()


# A line with many targets costs what it does, and a turn is bounded over all connections
# : processor time of the loop between a question and its answer
@ON_LINUX
@pytest.mark.parametrize(("number", "attack"), some(enumerate(ATTACKS), 5))
def test_nothing_that_one_address_sends_makes_others_wait(crowd, number, attack):
    process, address, members = crowd
    attackers = [Visitor(address, f"127.0.3.{number + 1}") for _ in range(4)]
    for n, guest in enumerate(attackers):
        guest.enter_irc(f"x{n}", "CAP REQ :message-tags draft/metadata-2 draft/channel-rename")
        if any("{}" in line and "#mine" in line for line in ATTACKS[attack]):
            guest.ask(f"JOIN #mine{n}")
    if any("#mine" in line for line in ATTACKS[attack]):
        for member in members:
            member.send("JOIN #mine0,#mine1,#mine2,#mine3\r\n")
        for member in members:
            member.ask()
    victim = Visitor(address, f"127.0.4.{number + 1}")
    victim.enter_irc("victim")
    lines = itertools.cycle(ATTACKS[attack])
    text = "".join(f"{next(lines)}\r\n" for _ in range(300))
    for n, guest in enumerate(attackers):
        quietly(guest, text.replace("{}", str(n)))
    waited = []
    for _ in range(15):
        before = loop_seconds(process)
        victim.ask()
        waited.append(loop_seconds(process) - before)
        if waited[-1] > FREEZE:
            break
    for guest in (*attackers, victim):
        guest.reset()
    assert max(waited) < FREEZE, waited


# Charge everything what it costs: after a burst of 100 tokens at 20 a second, a question
# behind 100 heavy lines is not answered within 0.5 s (a slow machine only takes longer)
COSTLY = (
    *("PRIVMSG to 20 users", "NOTICE to 20 users", "TAGMSG to 20 users"),
    *("TAGMSG to 20 channels with 60 bans", "JOIN and PART of new channels"),
    *("NAMES of channels with members", "WHO of a channel"),
)


def test_a_line_costs_as_much_as_the_work_that_it_makes(running):
    server = running(flood=(100.0, 20.0))
    for n in range(20):
        member = Visitor(server.address, f"127.0.1.{n + 1}")
        server.guests.append(member)
        member.enter_irc(f"m{n}", f"JOIN {CROWDS}", f"JOIN #ban{n}", f"MODE #ban{n} -n")
        masks = [f"*a{n}*b*c*d*e*f*{m}!*@*" for m in range(60)]
        member.ask(
            *(f"MODE #ban{n} +{'b' * 12} {' '.join(masks[m : m + 12])}" for m in range(0, 60, 12))
        )
    attackers = {}
    for n, attack in enumerate(COSTLY):
        eve = attackers[attack] = Visitor(server.address, f"127.0.2.{n + 1}")
        server.guests.append(eve)
        eve.enter_irc(f"eve{n}", "CAP REQ message-tags")
    for attack, eve in attackers.items():
        lines = itertools.islice(itertools.cycle(ATTACKS[attack]), 90)
        eve.sock.settimeout(0.01)
        with contextlib.suppress(TimeoutError):
            eve.send("".join(f"{line}\r\n" for line in lines) + "PING behind\r\n")
    time.sleep(0.5)
    for attack, eve in attackers.items():
        with contextlib.suppress(TimeoutError, OSError):
            while "behind" not in (line := eve.line()):
                pass
            raise AssertionError(f"{attack} was as cheap as other lines: {line}")
        eve.reset()


# The budget is per connection, so a client that reconnects gets a new one: an
# address has 16 times the budget of a connection)
@pytest.mark.parametrize("ending", some(["close", "reset", "stay"]))
def test_a_client_that_connects_again_has_what_is_left_of_its_address(running, ending):
    server = running(flood=(20.0, 1.0))
    answered, open_ones = 0, []
    for n in range(40):
        guest = Visitor(server.address, "127.0.0.2")
        guest.send(f"NICK n{n}\r\nUSER u 0 * :r\r\n" + "TIME\r\n" * 10 + "PING in\r\n")
        guest.sock.settimeout(PATIENCE if n < 4 else 0.2)
        try:
            guest.until("PONG")
        except TimeoutError:
            guest.reset()
            break
        answered += 1
        if ending == "stay":
            open_ones.append(guest)
        else:
            getattr(guest, ending)()
    assert 4 <= answered < 30  # 16 * 20 tokens for 13 lines each: some 24
    other = Visitor(server.address, "127.0.0.3")
    server.guests += [other, *open_ones]
    other.enter_irc("other")


WRONG, RIGHT = "wrong-{}", "secret99"


def sasl_plain(word):
    blob = base64.b64encode(f"\0alice\0{word}".encode()).decode()
    return f"AUTHENTICATE PLAIN\r\nAUTHENTICATE {blob}"


IRC_LOG_ON = "NICK n\r\nUSER u 0 * :r"
PASSWORDS = {  # said before, the guess, said after it, and what shows that it was right
    "PASS": ("CAP LS", "PASS {}", f"{IRC_LOG_ON}\r\nCAP END\r\nQUIT", " 001 n "),
    "OPER": (IRC_LOG_ON, "OPER boss {}", "QUIT", " 381 n "),
    "NS IDENTIFY": (IRC_LOG_ON, "NS IDENTIFY alice {}", "WHOIS n\r\nQUIT", " 330 n "),
    "PRIVMSG NickServ": (
        IRC_LOG_ON,
        "PRIVMSG NickServ :IDENTIFY alice {}",
        "WHOIS n\r\nQUIT",
        " 330 n ",
    ),
    "SASL PLAIN": ("CAP REQ sasl", sasl_plain, "PING x", " 903 "),
    "/pass": ("", "/pass {}", "n\n/names\n/quit", "#lobby 1-"),
    "/oper": ("n", "/oper boss {}", "/mode +m\n/mode\n/quit", "+m"),
    "/login": ("n", "/login alice {}", "/nick alice\n/names\n/quit", ": alice\n"),
}


def tries(address, source, way, *words):
    """Return what a connection hears that tries these passwords one after the other, at once."""
    before, guess, after, _ = PASSWORDS[way]
    guesses = [guess(word) if callable(guess) else guess.format(word) for word in words]
    guest = Visitor(address, source)
    guest.send("".join(f"{line}\r\n" for line in (before, *guesses, after) if line))
    guest.sock.shutdown(socket.SHUT_WR)
    heard = guest.rest().decode()
    guest.close()
    return heard


def lets_in(server, source, way):
    return PASSWORDS[way][3] in tries(server.address, source, way, RIGHT)


def guess_24_times(server, source, way):
    for n in range(0, 24, 3):
        tries(server.address, source, way, *(WRONG.format(m) for m in range(n, n + 3)))


def with_an_account(server):
    """An account of alice, who is gone again."""
    alice = Visitor(server.address, "127.0.0.9")
    alice.enter_irc("alice")
    assert any("SUCCESS" in line for line in alice.ask(f"REGISTER * * {RIGHT}"))
    alice.send("QUIT\r\n")
    alice.rest()
    alice.close()


# The same holds for wrong passwords of PASS and OPER (after 24 wrong ones over 8
# connections, a correct 25th is accepted); every place that takes a password
@pytest.mark.parametrize("way", some(PASSWORDS, 3))
def test_wrong_passwords_are_counted_for_an_address_over_its_connections(running, way):
    password = RIGHT if way in ("PASS", "/pass") else None
    server = running(oper=[("boss", RIGHT)], password=password)
    if password is None:
        with_an_account(server)
    assert PASSWORDS[way][3] not in tries(server.address, "127.0.0.5", way, "wrong")
    assert lets_in(server, "127.0.0.4", way)
    guess_24_times(server, "127.0.0.2", way)
    assert not lets_in(server, "127.0.0.2", way)
    assert lets_in(server, "127.0.0.3", way)


# Throttles, idle times and delays must run on the monotonic clock
@pytest.mark.parametrize(
    "way, shift",
    in_turn(["NS IDENTIFY", "SASL PLAIN", "/login", "OPER"], [365 * 24 * 3600, -3600]),
)
def test_a_clock_that_is_set_ends_and_prolongs_no_throttle(running, monkeypatch, way, shift):
    server = running(oper=[("boss", RIGHT)])
    with_an_account(server)
    guess_24_times(server, "127.0.0.2", way)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    assert not lets_in(server, "127.0.0.2", way)
    assert lets_in(server, "127.0.0.3", way)


# Also: idle times
def test_a_clock_that_is_set_makes_no_user_idle(running, monkeypatch):
    server = running()
    alice = Visitor(server.address)
    alice.enter_irc("alice", "JOIN #a", "PRIVMSG #a :hi")
    real = time.time
    for shift in (365 * 24 * 3600, -3600):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        (idle,) = [line.split() for line in alice.ask("WHOIS alice alice") if " 317 " in line]
        assert 0 <= int(idle[4]) < 3600


# An attacker can flush a throttle table by filling it (10,000 entries of SCRAM first
# messages); the table then forgets the attacker
@thorough
def test_a_throttle_cannot_be_flushed_by_filling_it(running):
    server = running()
    with_an_account(server)
    guess_24_times(server, "127.0.0.2", "SASL PLAIN")
    assert not lets_in(server, "127.0.0.2", "SASL PLAIN")
    eve = Visitor(server.address, "127.0.0.2")
    eve.enter_irc("eve", "CAP REQ sasl")
    with contextlib.suppress(AssertionError, OSError):  # closed is as good as refused
        for start in range(0, 10_500, 500):
            names = (f"n,,n=u{n},r=abc".encode() for n in range(start, start + 500))
            firsts = (base64.b64encode(name).decode() for name in names)
            begin = "AUTHENTICATE SCRAM-SHA-256\r\nAUTHENTICATE {}\r\nAUTHENTICATE *"
            eve.ask(*map(begin.format, firsts))
    assert not lets_in(server, "127.0.0.2", "SASL PLAIN")


# 64 KiB of two-letter lines become 1.4 MiB of objects per connection
@ON_LINUX
@pytest.mark.parametrize("line", [b"ab\n", b"\n", b"ab\r\n"])
@thorough
def test_lines_that_wait_take_no_more_memory_than_their_bytes(line):
    def resident(process):
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    count, size = 40, 64 * 1024
    with serving("--data", "none", "--flood", "10,1") as (process, address):
        asker = Visitor(address, "127.0.0.9")
        asker.enter_irc("asker")
        before = resident(process)
        guests = [Visitor(address, f"127.0.1.{n + 1}") for n in range(count)]
        for n, guest in enumerate(guests):
            quietly(guest, f"g{n}\n")
        for guest in guests:
            quietly(guest, (line * (size // len(line))).decode())
        for _ in range(2):  # every connection has had its turn
            asker.ask()
        eventually(lambda: resident(process) - before > count * 4 * size, 0.5)
        assert (resident(process) - before) / count < 4 * size
        for guest in guests:
            guest.reset()


# The server still acts on input from a reset connection minutes later
@pytest.mark.parametrize("how", ["line", "irc"])
def test_after_a_reset_what_the_budget_does_not_allow_is_dropped_with_one_line(tmp_path, how):
    log = tmp_path / "log"
    with logging_to(log, "--data", "none", "--flood", "50,50") as (process, address):
        alice = Visitor(address, "127.0.0.9")
        alice.enter("alice")
        bob = Visitor(address, "127.0.0.2")
        head = "bob\n" if how == "line" else "NICK bob\r\nUSER u 0 * :r\r\nJOIN #lobby\r\n"
        line = "{}\n" if how == "line" else "PRIVMSG #lobby :{}\r\n"
        bob.send(head)
        alice.until("joined")
        quietly(bob, "".join(line.format(n) for n in range(5000)))
        assert alice.line() == "bob: 0"
        bob.reset()
        count = 1
        while (heard := alice.line()) == f"bob: {count}" and count < 150:
            count += 1
        assert heard.startswith("bob (") and count < 150
        alice.send("/names\n")
        assert alice.line().endswith(": alice")
        terminate(process)
    said = [text for text in log.read_text().splitlines() if "127.0.0.2" in text]
    assert len(said) == 1, log.read_text()


# After an orderly close it acts on all lines, within the limits
@pytest.mark.parametrize("how", some(["irc", "line"]))
def test_after_an_orderly_close_every_line_arrives(running, how):
    server = running(flood=(50.0, 1000.0))
    alice = Visitor(server.address, "127.0.0.9")
    server.guests.append(alice)
    alice.enter("alice")
    bob = Visitor(server.address, "127.0.0.2")
    head = "bob\n" if how == "line" else "NICK bob\r\nUSER u 0 * :r\r\nJOIN #lobby\r\n"
    line = "{}\n" if how == "line" else "PRIVMSG #lobby :{}\r\n"
    bob.send(head + "".join(line.format(n) for n in range(400)))
    bob.sock.shutdown(socket.SHUT_WR)
    alice.until("joined")
    assert alice.until(" left ")[:-1] == [f"bob: {n}" for n in range(400)]
    bob.close()


def multiline(reference, target, pieces):
    first, *others = pieces
    yield f"BATCH +{reference} draft/multiline {target}"
    yield f"@batch={reference} PRIVMSG {target} :{first}"
    for piece in others:
        yield f"@batch={reference};draft/multiline-concat PRIVMSG {target} :{piece}"
    yield f"BATCH -{reference}"


# A 16 KiB multiline message of 16,384 concatenated pieces is 2 MB to each reader
# : at most 200 pieces and four times what the bytes need, else joined and split
@pytest.mark.parametrize(
    ("size", "count", "as_sent"),
    [(1, 16_384, False), (1, 6, False), (20, 300, False), (1, 4, True), (300, 50, True)],
)
def test_a_message_in_pieces_costs_its_readers_about_its_own_bytes(running, size, count, as_sent):
    server = running()
    alice, bob, plain = (Visitor(server.address, f"127.0.0.{n}") for n in (2, 3, 4))
    server.guests += [alice, bob, plain]
    caps = "CAP REQ :batch message-tags draft/multiline draft/chathistory echo-message"
    alice.enter_irc("alice", caps, "JOIN #a")
    bob.enter_irc("bob", caps, "JOIN #a")
    plain.enter_irc("plain", "JOIN #a")
    alice.ask()
    pieces = [chr(97 + n % 26) * size for n in range(count)]
    alice.ask(*multiline("m", "#a", pieces))
    for reader in (bob, plain):
        heard = [line for line in reader.ask() if " PRIVMSG #a " in line]
        told = [line.rstrip("\r").partition(" PRIVMSG #a :")[2] for line in heard]
        assert "".join(told) == "".join(pieces)
        assert sum(map(len, heard)) < 3 * size * count + 2000 * (1 + size * count // 400)
        assert len(told) <= 200
        if as_sent and reader is bob:
            assert told == pieces
    page = [line for line in bob.ask("CHATHISTORY LATEST #a * 10") if " PRIVMSG #a " in line]
    assert len(page) <= 200


# Bound history pages by the bytes they produce (tags included), not by their text
def test_a_page_of_history_is_bounded_by_the_bytes_that_it_sends(running, tmp_path):
    server = running(data=tmp_path)
    alice = Visitor(server.address)
    server.guests.append(alice)
    alice.enter_irc("alice", "CAP REQ :batch message-tags draft/chathistory", "JOIN #a")
    for n in range(0, 150, 10):
        alice.ask(*(f"@+x={'y' * 3900} PRIVMSG #a :{m}" for m in range(n, n + 10)))
    page = alice.ask("CHATHISTORY LATEST #a * 150")
    texts = [line.rstrip("\r").rpartition(":")[2] for line in page if "PRIVMSG" in line]
    assert texts == [str(n) for n in range(150 - len(texts), 150)] and texts
    assert sum(map(len, page)) < 2 * 128 * 1024
    first = re.search(r"msgid=([^; ]+)", next(line for line in page if "PRIVMSG" in line))[1]
    older = alice.ask(f"CHATHISTORY BEFORE #a msgid={first} 1")
    assert any(f" :{150 - len(texts) - 1}\r" in line for line in older)


def registering(address, number, source):
    guest = Visitor(address, source)
    guest.send(f"NICK r{number}\r\nUSER u 0 * :r\r\nREGISTER * * swordfish99\r\n")
    return guest


# Log-ins (two helpers) hold up history pages: separate lanes
def test_passwords_do_not_hold_up_pages_of_the_same_address(tmp_path):
    with serving("--data", tmp_path / "data") as (process, address):
        alice = Visitor(address, "127.0.0.2")
        alice.enter_irc("alice", ECHOING, "JOIN #a", "PRIVMSG #a :hi")
        guests = [registering(address, n, "127.0.0.2") for n in range(30)]
        for guest in guests:
            guest.until(" 001 ")
        assert any("PRIVMSG #a :hi" in line for line in alice.ask("CHATHISTORY LATEST #a * 5"))
        done = 0
        for guest in guests:
            guest.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                done += b"REGISTER SUCCESS" in guest.sock.recv(100_000, socket.MSG_PEEK)
            guest.sock.settimeout(PATIENCE)
            guest.reset()
        assert done < 15
        terminate(process)


# --sendmail holds both helpers
@pytest.mark.parametrize("lane", some(["page", "password"]))
def test_mail_holds_up_neither_pages_nor_passwords(tmp_path, lane):
    command, release = hanging_mail(tmp_path)
    options = ["--sendmail", command, "--register", "email-required", "--oper", "boss:secret99"]
    with contextlib.ExitStack() as stack:
        stack.callback(release)
        process, address = stack.enter_context(serving("--data", tmp_path / "data", *options))
        alice = Visitor(address, "127.0.0.9")
        alice.enter_irc("alice", ECHOING, "JOIN #a", "PRIVMSG #a :hi")
        for n in range(6):
            guest = Visitor(address, f"127.0.0.{n + 2}")
            guest.enter_irc(f"r{n}")
            guest.send(f"REGISTER * m{n}@example.com swordfish99\r\n")
        alice.sock.settimeout(3)
        if lane == "page":
            assert any(" :hi\r" in line for line in alice.ask("CHATHISTORY LATEST #a * 5"))
        else:
            assert any(" 381 " in line for line in alice.ask("OPER boss secret99"))
        terminate(process)


# Do not start work for a connection that has gone
@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="clocks of Linux")
def test_no_password_is_worked_on_for_a_connection_that_has_gone(tmp_path):
    with serving("--data", tmp_path / "data") as (process, address):
        first = Visitor(address, "127.0.0.9")
        first.enter_irc("first")
        before = process_seconds(process)
        assert first.ask("REGISTER * * swordfish99")
        one = process_seconds(process) - before
        before = process_seconds(process)
        guests = [registering(address, n, "127.0.0.2") for n in range(40)]
        for guest in guests:
            guest.until(" 001 ")
        for guest in guests:
            guest.reset()
        last = Visitor(address, "127.0.0.2")
        last.enter_irc("last")
        assert last.ask("REGISTER * * swordfish99")
        assert process_seconds(process) - before < one * 20 + 0.3
        terminate(process)


# Failed turn writes are kept as a list, and all are retried each turn
@ON_LINUX
@pytest.mark.parametrize(
    "line",
    some(
        [
            "METADATA #a SET url :{}.{}",
            "MARKREAD #a timestamp=2025-01-01T00:{:02d}:{:02d}.000Z",
            "@+chat.py/id=x{}.{} PRIVMSG #a :text",
        ]
    ),
)
def test_what_a_full_disk_does_not_take_is_not_tried_ever_more_often(tmp_path, line):
    log = tmp_path / "log"
    options = ("--data", tmp_path / "data", "--flood", "off")
    with logging_to(log, *options) as (process, address):
        alice, bob = Visitor(address), Visitor(address)
        caps = "CAP REQ :message-tags draft/read-marker draft/metadata-2"
        alice.enter_irc("alice", caps, "JOIN #a", "REGISTER * * swordfish99")
        bob.enter_irc("bob", "JOIN #b")

        def cost():
            before = loop_seconds(process)
            for _ in range(20):
                bob.ask("PRIVMSG #b :hi", "TOPIC #b :a", "TOPIC #b :b")
            return loop_seconds(process) - before

        limit_files(process, 1)
        alice.ask(line.format(0, 0))
        before = cost()
        for n in range(0, 1200, 400):
            alice.ask(*(line.format(*divmod(m, 60)) for m in range(n, n + 400)))
        assert cost() < 3 * before + 0.03
        limit_files(process, resource.RLIM_INFINITY)
        alice.ask(line.format(59, 59))
        if line.startswith("MARKREAD"):
            assert any("00:59:59" in told for told in alice.ask("MARKREAD #a"))
        terminate(process)
    check_log(log.read_text())


# An idle or broken connection: no table holds more after clients that have gone than before
@ON_LINUX
def test_connections_that_came_and_went_leave_no_descriptor(tmp_path):
    with serving("--data", tmp_path / "data", "--flood", "off") as (process, address):
        asker = Visitor(address)
        asker.enter_irc("asker")

        def descriptors():
            asker.ask()
            return len(os.listdir(f"/proc/{process.pid}/fd"))

        before = descriptors()
        for n in range(60):
            guest = Visitor(address, f"127.0.0.{n % 20 + 2}")
            guest.send(f"NICK n{n}\r\nUSER u 0 * :r\r\nJOIN #a\r\nCHATHISTORY LATEST #a * 5\r\n")
            (guest.reset if n % 2 else guest.close)()
        assert eventually(lambda: descriptors() <= before + 12)  # helpers keep a few
        terminate(process)


def test_a_private_message_is_charged_for_both_receivers():
    house = house_of("alice", "bob")
    work = []
    for name in ("#lobby", "bob"):
        house.hub.take_work()
        house.guests["alice"].act("say", name, "hello", chat.MESSAGE, "", "")
        work.append(house.hub.take_work())
        house.turn()
    assert work[1] - work[0] == 2 * chat.WORK_OF_A_RECEIVER


@pytest.mark.parametrize(
    "lines",
    [
        ["SETNAME :a", "SETNAME :b"],
        ["AWAY :x", "AWAY"],
        ["NICK other", "NICK actor"],
        ["PRIVMSG #big :a", "PRIVMSG #open :b"],
        ["PRIVMSG #big,#small :a", "NICK other", "PRIVMSG #small,#big :b", "NICK actor"],
        ["INVITE guest #big", "PRIVMSG #big :a"],
        ["PRIVMSG #big :a", "SETNAME :a", "PART #big", "JOIN #big"],
    ],
)
def test_members_of_the_same_channels_get_the_same_bytes(monkeypatch, lines):
    house = House()
    members = [f"member{n}" for n in range(20)]
    caps = "setname away-notify invite-notify message-tags"
    come(house, "guest", "actor", *members, caps=caps)
    for member in members:
        house.say(member, "JOIN #big", "JOIN #small", "JOIN #open", "MODE #open -n")
    house.say("actor", "JOIN #big", *(["JOIN #small"] if "small" in str(lines) else []))
    house.turn()
    for member in members:
        house.heard(member)
    rendered, lines_for = [], chat.Turn.lines_for

    def counting(turn, session, *values):
        rendered.append(session)
        return lines_for(turn, session, *values)

    monkeypatch.setattr(chat.Turn, "lines_for", counting)
    house.say("actor", *lines * 10)
    house.turn()
    told = [house.heard(member) for member in members]
    assert len(told[0]) >= 20 and all(one == told[0] for one in told)
    assert len(rendered) <= 3


def test_an_audience_that_is_not_the_channels_own_costs_its_members():
    house = house_of("alice", "bob", "carol")
    lobby = house.hub.channels["#lobby"]
    alice = house.hub.users["alice"]
    assert chat.neighbours(house.hub.turn, alice, alone=True) is lobby.audience
    assert lobby.audience.cost == 0
    session = house.guests["bob"]
    watched = chat.neighbours(house.hub.turn, alice, [session], alone=True)
    assert watched.cost == 3 + 1 + 1
    assert watched is chat.neighbours(house.hub.turn, alice, [session], alone=True)


def test_an_outsider_is_charged_for_the_members():
    house = House()
    house.enter_irc("alice", "bob", "carol")
    for name in ("alice", "bob"):
        house.say(name, "JOIN #a", "MODE #a -n")
    work = []
    for name in ("alice", "carol"):
        house.hub.take_work()
        house.guests[name].act("say", "#a", "hello", chat.MESSAGE, "", "")
        work.append(house.hub.take_work())
    assert work[1] - work[0] == (2 + 1) * chat.WORK_OF_A_RECEIVER


@pytest.mark.parametrize("line", ["/tell {} x", "/login {} x", "{}", "/kick {}", "/whois {}"])
def test_a_line_of_marks_is_never_normalized_whole(monkeypatch, line):
    sizes, normalize = [0], chat.unicodedata.normalize
    house = house_of("alice")
    house.connect("guest")

    def noting(form, text):
        sizes.append(len(text))
        return normalize(form, text)

    with monkeypatch.context() as patch:
        patch.setattr(chat.unicodedata, "normalize", noting)
        house.say("alice", line.format(MARKS))
        house.say("guest", line.format(MARKS))
        house.turn()
    assert max(sizes) <= chat.FOLDED_MOST


def test_wallops_is_charged_for_all_users_that_are_looked_through():
    work = []
    for count in (2, 12):
        house = house_of(*(f"guest{n}" for n in range(count)))
        house.hub.take_work()
        house.guests["guest0"].act("wallops", "hello")
        work.append(house.hub.take_work())
    assert work[1] - work[0] == 10


@pytest.mark.parametrize("name", ["lock", "chat.db", "chat.db-wal", "chat.db-shm", "search.db"])
def test_no_file_of_the_data_folder_may_be_a_link_or_stays_open_to_others(folder, name):
    (folder / name).write_bytes(b"")
    (folder / name).chmod(0o644)
    os.close(chat.lock_folder(folder))
    assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "elsewhere")
    with pytest.raises(chat.Unusable, match=f"/{name} is no plain file"):
        chat.lock_folder(folder)


@contextlib.contextmanager
def beating(**options):
    """A server without listeners whose loop does not run, and a function that makes a peer of it,
    by the last byte of its address. Its lines are acted on when the test says so."""
    loop = chat.Loop()
    server = chat.Server(loop, chat.ServerOptions(listen=(), web=WEB, **options))
    server.begin_turn()
    listening = socket.create_server(("127.0.0.1", 0))
    ends = [listening]

    def peer(number=2, data=b""):
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
        ends.append(theirs)
        ours.setblocking(False)
        made = chat.Peer(server, ours, f"127.0.0.{number}", 50000, f"127.0.0.{number}")
        server.peers.add(made)
        if data:
            made.received(data)
        return made

    try:
        yield server, peer
    finally:
        for one in server.peers:
            one.sock.close()
        for one in ends:
            one.close()
        server.close()
        loop.close()


def act_on_all(server):
    while server.beat.acting or server.beat.handshakes:
        server.beat.act()


def upgraded(server, peer):
    """Return a peer that speaks WebSocket."""
    made = peer()
    made.received(
        b"GET /irc HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDAwMDAwMDAwMDAwMDAwMA==\r\n\r\n"
    )
    act_on_all(server)
    assert made.framing
    return made


@pytest.mark.parametrize("line", [b"\n", b"\xef\xbb\xbf\n", b"\r\n"])
def test_empty_lines_before_a_name_cost_a_token_each(line):
    with beating() as (server, peer):
        made = peer(data=line * 100)
        act_on_all(server)
        assert not made.busy and made.session is None
        assert made.budget.tokens == chat.FLOOD_BURST - 100


def test_frames_without_a_line_cost_a_token_for_each_look_at_them():
    with beating() as (server, peer):
        made = upgraded(server, peer)
        for data in (b"\x89\x80abcd", b"\x8a\x80abcd", b"\x01\x80abcd" + b"\x00\x80abcd" * 127):
            before = made.budget.tokens
            made.received(data * 128 if len(data) < 10 else data)
            act_on_all(server)
            assert not made.busy
            assert 2 <= before - made.budget.tokens < 3


def test_a_frame_with_a_line_costs_no_more_than_the_line():
    with beating() as (server, peer):
        made = upgraded(server, peer)
        before = made.budget.tokens
        made.received(b"\x81\x80abcd" * 50)
        act_on_all(server)
        assert not made.busy
        assert 50 <= before - made.budget.tokens < 51


def test_a_peer_without_a_turn_comes_before_those_that_had_one(monkeypatch):
    with beating(flood=None) as (server, peer):
        peers = [peer(n + 2, b"\n" * 1000) for n in range(3)]
        clock = itertools.count()  # each look at the clock costs a second
        monkeypatch.setattr(chat.time, "perf_counter", lambda: next(clock))
        monkeypatch.setattr(chat, "ACT_SECONDS", 3)
        order, act_on_a_line = [], server.beat.act_on_a_line
        server.beat.act_on_a_line = lambda one: [order.append(one), act_on_a_line(one)][1]
        for _ in range(4):
            server.beat.act()
        assert [one for one, _ in itertools.groupby(order)] == [*peers, peers[0]]


@pytest.mark.parametrize("same", [True, False])
def test_a_turn_ends_before_too_many_users_are_told_of_its_events_one_by_one(monkeypatch, same):
    monkeypatch.setattr(chat, "TOLD_A_TURN", 30)
    monkeypatch.setattr(chat, "ACT_SECONDS", 1000.0)
    with beating(flood=None) as (server, peer):
        enter = b"NICK n%d\r\nUSER u 0 * :r\r\nJOIN #0,#1,#2\r\n"
        speakers = [peer(n + 2, enter % n) for n in range(3)]
        while server.beat.acting:
            server.beat.act()
            server.hub.end()
        for n, one in enumerate(speakers):
            one.received(b"PRIVMSG #%d :x\r\n" % (0 if same else n) * 8)
        counts = []
        while server.beat.acting:
            server.beat.act()
            counts.append(len(server.hub.turn.events))
            server.hub.end()
        assert sum(counts) == 24
        assert max(counts) == (24 if same else 11)  # of 3 users


def test_a_header_of_semicolons_is_no_name_and_is_not_parsed(monkeypatch):
    name = ";" * 40 + ".txt"
    assert chat.disposition_name(f'attachment; filename="{name}"') == name
    with monkeypatch.context() as patch:
        patch.setattr("email.message.Message.get_filename", None)
        assert chat.disposition_name('a; filename="' + ";" * 15_800) == ""


def client_hello():
    """Return the first bytes of a TLS client."""
    return chat.TlsFilter(chat.Trust(insecure=True).context(), "localhost").take()


def test_handshakes_cost_their_address_and_a_turn_begins_only_some(certificate, monkeypatch):
    with beating(tls_cert=certificate) as (server, peer):
        greedy = [peer(2, client_hello()) for _ in range(5)]
        act_on_all(server)
        assert all(one.tls and not one.held for one in greedy)
        burst = chat.FLOOD_BURST * chat.ADDRESS_SHARES
        assert greedy[0].home.budget.tokens == burst - 5 * chat.HANDSHAKE_TOKENS
        clock = itertools.count()  # each look at the clock costs a second
        monkeypatch.setattr(chat.time, "perf_counter", lambda: next(clock))
        more = [peer(2, client_hello()) for _ in range(3)]
        other = peer(3, client_hello())
        assert all(one.held and not one.wants_read() for one in (*more, other))
        done = []
        for _ in range(4):
            server.beat.act()
            done.append([n for n, one in enumerate((*more, other)) if one.tls])
        assert done == [[3], [0, 3], [0, 1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("there", [True, False])
def test_the_folder_of_files_may_not_be_a_link(tmp_path, there):
    (tmp_path / "files").symlink_to(tmp_path / "elsewhere")
    if there:
        (tmp_path / "elsewhere").mkdir()
    with pytest.raises(chat.Unusable, match="/files is no plain folder"):
        chat.FileFolder(tmp_path / "files")


def test_an_address_that_used_much_of_its_budget_is_served_while_no_other_waits(running):
    server = running(flood=(100.0, 0.01))
    reader = server.guest("reader")
    for name in ("alice", "bob"):
        server.guest(name).send("".join(f"{n}\n" for n in range(90)))
        reader.until(f"{name}: 89")
    (home,) = server.server.addresses.values()
    assert home.used(server.loop.now) > chat.LIGHT_USE
    server.guest("carol").send("hello\n")
    reader.until("carol: hello")


# ======================================================================================
# TERMINAL
# ======================================================================================

KEYS = [
    (b"abc", [("text", "abc")]),
    ("grüß \U0001f600".encode(), [("text", "grüß \U0001f600")]),
    (b"\x1b[A\x1b[B\x1bOC\x1b[D", [("up", ""), ("down", ""), ("right", ""), ("left", "")]),
    (b"\x1b[1;5D\x1bf\x17", [("word-left", ""), ("word-right", ""), ("erase-word", "")]),
    (b"a\rb", [("text", "a"), ("enter", ""), ("text", "b")]),
    (b"\x1b\r\n", [("newline", ""), ("newline", "")]),
    (b"\x1b[99;99xok\x1b[?1;2c", [("text", "ok")]),
    (b"\x00\x1c!", [("text", "!")]),
    (b"\x1b[200~one\r\ntwo\x1b[31m\x1b[201~!", [("paste", "one\ntwo[31m"), ("text", "!")]),
    (b"\x1b[200~\x1b[201~", [("paste", "")]),
]


@pytest.mark.parametrize("data, keys", KEYS)
def test_keys_are_the_same_however_the_terminal_cuts_them(data, keys):
    for size in (len(data), 1, 2, 3):
        decoder, found = chat.KeyDecoder(), []
        for start in range(0, len(data), size):
            found += decoder.feed(data[start : start + size])
        merged = []
        for key in found:
            if merged and key.name == merged[-1].name == "text":
                merged[-1] = chat.Key("text", merged[-1].text + key.text)
            else:
                merged.append(key)
        assert merged == keys, size


def test_a_lone_escape_is_a_key_once_nothing_follows():
    decoder = chat.KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.flush() == [("escape", "")]
    assert decoder.feed(b"a") == [("text", "a")]


def test_a_paste_whose_end_is_late_still_ends():
    decoder = chat.KeyDecoder()
    assert decoder.feed(b"\x1b[200~one\x1b[20") == []
    assert decoder.flush() == []
    assert decoder.feed(b"1~x") == [("paste", "one"), ("text", "x")]


def test_junk_from_a_terminal_never_breaks_the_decoder(seeded):
    for _ in range(300):
        decoder = chat.KeyDecoder()
        pieces = [b"\x1b", b"[", b"200~", b"201~", b"1;5", b"A", b"\xc3", b"\xa9", b"\r", b"x"]
        for _ in range(30):
            decoder.feed(seeded.choice(pieces))
        decoder.flush()


def edited(*keys, **options):
    """Return the text before and after the cursor once these keys were pressed."""
    editor = chat.LineEditor(**options)
    for key in keys:
        editor.press(chat.Key(key[1:]) if key.startswith("^") else chat.Key("text", key))
    return editor.before, editor.after


@pytest.mark.parametrize(
    "keys, before, after",
    [
        (["hello"], "hello", ""),
        (["hello", "^left", "^left", "X"], "helX", "lo"),
        (["hello", "^home", "X", "^end", "Y"], "XhelloY", ""),
        (["hello", "^left", "^backspace", "^delete"], "hel", ""),
        (["one two  three", "^erase-word"], "one two  ", ""),
        (["one two  ", "^erase-word"], "one ", ""),
        (["one two", "^home", "^word-right", "^delete-word"], "one", ""),
        (["one two", "^word-left", "^word-left", "X"], "X", "one two"),
        (["one two", "^word-left", "^erase-to-start"], "", "two"),
        (["one two", "^word-left", "^erase-to-end", "^home", "^yank"], "two", "one "),
        (
            ["e\u0301\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea", "^backspace"],
            "e\u0301\U0001f469\u200d\U0001f680",
            "",
        ),
        (["e\u0301\U0001f469\u200d\U0001f680", "^backspace"], "e\u0301", ""),
        (["\U0001f44d\U0001f3fdx", "^left", "^left"], "", "\U0001f44d\U0001f3fdx"),
        (["a", "^newline", "b"], "a\nb", ""),
        (["^left", "^right", "^backspace", "^delete", "^up", "^down", "^tab", "^unknown"], "", ""),
    ],
)
def test_the_line_editor_does_what_fingers_expect(keys, before, after):
    assert edited(*keys) == (before, after)


def test_what_was_typed_comes_back_and_the_draft_is_kept():
    editor = chat.LineEditor()
    for line in ("one", "two", "two", "/pass secret", " "):
        editor.set(line)
        assert editor.press(chat.Key("enter")) == line
    editor.set("draft")
    seen = []
    for key in ("up", "up", "up", "down", "down", "down"):
        editor.press(chat.Key(key))
        seen.append(editor.text)
    assert seen == ["two", "one", "one", "two", "draft", "draft"]


def test_tab_goes_through_the_candidates_and_back():
    editor = chat.LineEditor(
        lambda word, first: [f"{n} " for n in ("alan", "alice") if n.startswith(word)]
    )
    editor.set("hi al")
    seen = []
    for key in ("tab", "tab", "tab", "back-tab"):
        editor.press(chat.Key(key))
        seen.append(editor.text)
    assert seen == ["hi alan ", "hi alice ", "hi alan ", "hi alice "]


def test_pasting_several_lines_sends_nothing_until_enter_and_then_one_message():
    editor = chat.LineEditor()
    assert editor.press(chat.Key("paste", "one\ntwo\n")) is None
    assert editor.press(chat.Key("enter")) == "one\ntwo"


def test_the_line_being_typed_has_a_limit():
    editor = chat.LineEditor()
    editor.press(chat.Key("paste", "é" * chat.TYPED_MOST))
    assert len(editor.text) == chat.TYPED_MOST and editor.refused == ""
    editor.press(chat.Key("paste", "none of this"))
    assert len(editor.text) == chat.TYPED_MOST and "too long to be typed" in editor.refused


@pytest.mark.parametrize(
    "text, columns",
    [
        ("abc", 3),
        ("e\u0301", 1),
        ("你好", 4),
        ("ｗ", 2),
        ("\U0001f600", 2),
        ("\U0001f469\u200d\U0001f680", 2),
        ("\u2764\ufe0f", 2),
        ("\U0001f1e9\U0001f1ea", 2),
        ("\u200b", 0),
        ("", 0),
    ],
)
def test_columns_are_counted_as_terminals_count_them(text, columns):
    assert chat.width(text) == columns


class Screen:
    """A terminal, as far as the client uses one; what scrolls away is in `history`."""

    SEQUENCE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|(.)", re.DOTALL)

    def __init__(self, columns=80, rows=24):
        self.columns, self.rows = columns, rows
        self.history, self.bells, self.modes = [], 0, {"7"}
        self.cells = [{} for _ in range(rows)]
        self.other, self.saved = None, (0, 0)
        self.y = self.x = 0
        self.rest = ""
        self.wrapped = False

    def draw(self, text):
        self.rest += text
        while match := self.SEQUENCE.match(self.rest):
            private, parameters, final, c = match.groups()
            if c == "\x1b":
                break  # the rest of it is on its way
            self.rest = self.rest[match.end() :]
            if c:
                self.put(c)
            elif private:
                self.mode(parameters, final == "h")
            else:
                self.obey(final, [int(n or 0) for n in parameters.split(";")])
        return self

    def obey(self, final, numbers):
        assert final in "ACHJKm", final
        if final == "A":
            self.y = max(0, self.y - (numbers[0] or 1))
        elif final == "C":
            self.x = min(self.columns - 1, self.x + (numbers[0] or 1))
        elif final == "H":
            self.y, self.x = max(0, numbers[0] - 1), 0
        elif final in "JK":
            row = self.cells[self.y]
            self.cells[self.y] = {k: v for k, v in row.items() if k < self.x and numbers[0] == 0}
            for y in range(self.y + 1 if numbers[0] == 0 else 0, self.rows * (final == "J")):
                self.cells[y] = {}

    def mode(self, number, on):
        (self.modes.add if on else self.modes.discard)(number)
        if number == "1049" and on:
            self.other, self.saved = self.cells, (self.y, self.x)
            self.cells = [{} for _ in range(self.rows)]
        elif number == "1049":
            self.cells, (self.y, self.x), self.other = self.other, self.saved, None

    def put(self, c):
        if c == "\r":
            self.x = 0
        elif c == "\n":
            self.x = 0  # as a terminal driver has it
            self.down()
        elif c == "\a":
            self.bells += 1
        else:
            assert c.isprintable() or c in "\u200c\u200d", f"{c!r} got out"
            self.letter(c, chat.width(c))

    def letter(self, c, wide):
        if self.x + wide > self.columns and "7" in self.modes:
            self.x, self.wrapped = 0, True
            self.down()
        x = min(self.x, self.columns - max(1, wide))
        if wide:
            self.cells[self.y][x] = c
        elif x:
            self.cells[self.y][max(k for k in self.cells[self.y] if k < x)] += c
        self.x = x + wide

    def down(self):
        if self.y < self.rows - 1:
            self.y += 1
            return
        gone = self.cells.pop(0)
        if "1049" not in self.modes:
            self.history.append(self.text(gone))
        self.cells.append({})

    def text(self, cells):
        row, x = "", 0
        for k, c in sorted(cells.items()):
            row += " " * (k - x) + c
            x = k + chat.width(c)
        return row.rstrip()

    def resize(self, columns, rows):
        """As xterm does it: what is too long is cut, the top goes to the history."""
        if self.other:
            self.other, (y, x) = self.resized(self.other, self.saved[0], columns, rows)
            self.saved = y, min(self.saved[1], columns - 1)
        self.cells, (self.y, _) = self.resized(self.cells, self.y, columns, rows)
        self.columns, self.rows, self.x = columns, rows, min(self.x, columns - 1)

    def resized(self, cells, y, columns, rows):
        while len(cells) > rows:
            if len(cells) - 1 > y:
                cells.pop()
            else:
                self.history.append(self.text(cells.pop(0)))
                y -= 1
        cells = cells + [{} for _ in range(rows - len(cells))]
        return [{k: v for k, v in row.items() if k < columns} for row in cells], (y, 0)

    @property
    def lines(self):
        """Return the rows to be seen, without the empty ones below."""
        found = [self.text(cells) for cells in self.cells]
        while found and not found[-1]:
            found.pop()
        return found


@pytest.mark.parametrize("columns", [10, 20, 40, 80])
def test_the_row_never_wraps_and_the_cursor_is_where_the_next_letter_goes(columns, seeded):
    painter = chat.Painter(columns)
    for _ in range(200):
        before, after = (
            "".join(seeded.choices(["a", "你", "\U0001f600", "\n", " "], k=seeded.randrange(60)))
            for _ in "ab"
        )
        screen = Screen(columns).draw(painter.row("me> ", before, after))
        assert not screen.wrapped
        row, column = screen.text(screen.cells[0]), screen.x
        assert row.startswith("me>")
        shown = row[4:]
        assert shown in chat.visible(before + after)
        assert chat.width("me> ") <= column < columns
        if chat.width(chat.visible(before)) < columns - 8:
            assert column == 4 + chat.width(chat.visible(before))


def at(year, month, day, hour=0, minute=0, **parts):
    """A view of that moment by the clock on the wall."""
    moment = datetime.datetime(year, month, day, hour, minute)
    return chat.View(**{"kind": chat.SAID, **parts, "time": int(moment.timestamp() * 1000)})


PLAIN_LOOK = chat.Look(chat.Palette(on=False), 40, "#rust")
CLOCK = {"year": 2025, "month": 11, "day": 21, "hour": 8, "minute": 30}  # not today


@pytest.mark.parametrize(
    "parts, lines",
    [
        ({"text": "hi", "name": "bob", "where": "#rust"}, ["08:30 bob: hi"]),
        ({"text": "a\n b\nc", "name": "bob"}, ["08:30 bob: a", " " * 12 + "b", " " * 11 + "c"]),
        ({"text": "a\nb", "name": "b" * 30}, [f"08:30 {'b' * 30}: a", " " * 13 + "b"]),
        ({"text": "hi", "name": "bob", "where": "#lobby"}, ["08:30 [#lobby] bob: hi"]),
        ({"text": "hi", "name": "bob", "where": "bob"}, ["08:30 (bob) bob: hi"]),
        ({"text": "me?", "name": "bob", "where": "#rust", "called": True}, ["08:30 ! bob: me?"]),
        ({"kind": "came", "name": "bob", "where": "#rust"}, ["08:30 bob joined"]),
        ({"kind": "came", "name": "bob", "where": "#go"}, ["08:30 bob joined #go"]),
        ({"kind": "went", "name": "bob", "text": "bye"}, ["08:30 bob left (bye)"]),
        ({"kind": "told", "text": "so it is"}, ["08:30 so it is"]),
        ({"kind": "failed", "text": "full: hi"}, ["08:30 FAILED: full: hi"]),
        ({"kind": "people", "text": "cy, bo, @al", "where": "#rust"},
         ["08:30 3 in #rust", "  @al  bo   cy"]),
        ({"kind": "told", "text": "/away [REASON]  say that you are not here, or back"},
         ["/away [REASON]", "    say that you are not here, or back"]),
        ({"text": "\x1b[31mred\x9b0m\u202ecba\x07\u2028\tx", "name": "b\x1b[2Job\n"},
         ["08:30 b[2Job\u23ce: [31mred0mcba     x"]),
    ],
)  # fmt: skip
def test_views_become_lines_with_times_names_and_places(parts, lines):
    assert chat.view_lines(at(**CLOCK, **parts), PLAIN_LOOK) == lines


def test_mentions_are_marked_whether_or_not_there_are_colours():
    view = at(**CLOCK, text="hi Alice", name="bob", where="#rust", called=True)
    (bright,) = chat.view_lines(view, chat.Look(chat.Palette(on=True), 80, "#rust"))
    assert "\x1b[1;31m! \x1b[0m" in bright and "\x1b[1mhi Alice\x1b[0m" in bright
    (private,) = chat.view_lines(view._replace(where="bob"), PLAIN_LOOK)
    assert "!" not in private


def test_a_day_is_told_when_it_is_another_one_than_that_of_the_view_before():
    evening, night = at(2026, 3, 28, 23, 59, text="a"), at(2026, 3, 29, 0, 1, text="b")
    assert chat.dated_lines(evening, night, PLAIN_LOOK) == [
        "\u2500\u2500 Sunday, 29 March 2026",
        "00:01 : b",
    ]
    assert chat.dated_lines(night, night, PLAIN_LOOK) == ["00:01 : b"]
    assert chat.dated_lines(None, evening, PLAIN_LOOK)[0].endswith("Saturday, 28 March 2026")
    assert len(chat.dated_lines(None, chat.View(chat.SAID, "now"), PLAIN_LOOK)) == 1


def test_times_are_those_of_the_wall_when_the_clocks_change(monkeypatch):
    """In Berlin it was 01:30 and an hour later 03:30; in autumn it is 02:30 twice."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    hour = 3600 * 1000
    spring = int(datetime.datetime(2026, 3, 29, 0, 30, tzinfo=datetime.UTC).timestamp()) * 1000
    autumn = int(datetime.datetime(2026, 10, 25, 0, 30, tzinfo=datetime.UTC).timestamp()) * 1000
    shown = [
        chat.view_lines(chat.View(chat.SAID, "x", "b", time=t), PLAIN_LOOK)[0][:5]
        for t in (spring, spring + hour, autumn, autumn + hour, -1, 10**18)
    ]
    monkeypatch.undo()
    time.tzset()
    assert shown[:4] == ["01:30", "03:30", "02:30", "02:30"]


@pytest.mark.parametrize(
    "line, columns, rows",
    [
        ("", 5, [""]),
        ("abcde", 5, ["abcde"]),
        ("abcdefg", 5, ["abcde", "fg"]),
        ("ab你好", 5, ["ab你", "好"]),
        ("e\u0301" * 3, 2, ["e\u0301" * 2, "e\u0301"]),
        ("a\x1b[1mbcd\x1b[0me", 2, ["a\x1b[1mb\x1b[0m", "\x1b[1mcd\x1b[0m", "e"]),
    ],
)
def test_lines_are_wrapped_as_terminals_do(line, columns, rows):
    assert chat.rows_of(line, columns) == rows


@pytest.mark.parametrize(
    "columns, rows",
    [
        (80, ["alice  bob  carol  d  你好"]),
        (15, ["alice  d", "bob  你好", "carol"]),
        (5, ["alice", "bob", "carol", "d", "你好"]),
    ],
)
def test_words_stand_in_as_many_columns_as_fit(columns, rows):
    found = chat.in_columns(["alice", "bob", "carol", "d", "你好"], columns)
    assert [re.sub("  +", "  ", row) for row in found] == rows
    assert len({chat.width(row[: row.rfind("  ")]) for row in found if "  " in row}) <= 2
    assert chat.in_columns([], columns) == []


STATUS_PARTS = [("#rust 12", (1,)), ("bob:1!", (1, 31)), ("#lobby:3", (36,)), ("connected", ())]


@pytest.mark.parametrize(
    "columns, text",
    [
        (60, "── #rust 12 bob:1! #lobby:3 connected ─────────────────────"),
        (40, "── #rust 12 bob:1! #lobby:3 connected ─"),
        (36, "── #rust 12 bob:1! #lobby:3 … ─────"),
        (20, "── #rust 12 … ─────"),
        (10, "── #ru… …"),
    ],
)
def test_the_status_says_what_matters_most_in_the_room_there_is(columns, text):
    assert chat.status_row(STATUS_PARTS, columns, chat.Palette(on=False)) == text
    assert chat.width(text) < columns
    colourful = chat.status_row(STATUS_PARTS, columns, chat.Palette(on=True))
    assert chat.COLOUR.sub("", colourful) == text


def test_conversations_with_news_are_told_mentions_first():
    rooms = [chat.Room(name) for name in ("#here", "#quiet", "#rust", "bob", "#" + "x" * 60)]
    for room, unread, called in zip(rooms, (5, 0, 3, 1, 2), (1, 0, 0, 1, 0), strict=True):
        room.unread, room.called = unread, called
    texts = [text for text, _ in chat.room_marks(rooms, rooms[0])]
    assert texts == ["bob:1!", "#rust:3", "#" + "x" * 18 + "\u2026:2"]
    besides = [("b.example:7000", chat.Room(name)) for name in ("#here", "#quiet", "#rust", "#go")]
    for _, room in besides:
        room.unread = 4
    texts = [text for text, _ in chat.room_marks(rooms, rooms[0], besides)][2:]
    other = "b.example:7000/"  # the server is named where there are two of one name
    assert texts[1:] == [other + "#here:4", other + "#quiet:4", other + "#rust:4", "#go:4"]


# A client core and its display, on a screen that we can look at


class Desk:
    """A person's client: a core without a connection, and what the screen shows of it."""

    def __init__(self, columns=40, rows=10, rooms=("#lobby", "#rust"), colours=False):
        self.core = chat.ClientCore("alice", kind=chat.CHAT, join=rooms, clock=lambda: 10**9)
        for room in self.core.rooms.values():
            room.held = None
        self.display = chat.Display(self.core, chat.Palette(colours), columns, rows)
        self.screen = Screen(columns, rows)
        self.now, self.trouble, self.waiting = 1000.0, "", 0
        self.row = ""
        self.paint()

    def paint(self):
        row = self.display.painter.row(self.display.prompt(), self.row, "")
        parts = self.display.parts(self.trouble, self.waiting)
        self.written = self.display.frame(row, parts, self.now)
        self.screen.draw(self.written)
        self.now += 1 / chat.PAINTS_A_SECOND
        return self.screen.lines

    def hear(self, *texts, where="#lobby", **parts):
        """bob says this; it is shown at the next painting."""
        for text in texts:
            self.core.deliver(
                self.core.room_for(where), at(**CLOCK, text=text, name="bob", where=where, **parts)
            )
        self.display.take(self.core.take_views())

    def tell(self, *views):
        self.display.take(views)
        return self.paint()

    def go(self, where):
        self.core.go(self.core.room_for(where))
        self.display.take(self.core.take_views())
        return self.paint()

    def resize(self, columns, rows):
        self.screen.resize(columns, rows)
        self.display.resize(columns, rows)
        return self.paint()

    @property
    def said(self):
        """Return what bob said, from the top of what can be scrolled to."""
        lines = self.screen.history + self.screen.lines
        return [line.removeprefix("08:30 bob: ") for line in lines if "bob: " in line]


DAY = "\u2500\u2500 Friday, 21 November 2025"


def test_what_is_said_scrolls_and_two_rows_stay_below_it():
    desk = Desk()
    texts = [f"line {n}" for n in range(30)]
    for n in range(0, 30, 5):
        desk.hear(*texts[n : n + 5])
        desk.row += "x"
        desk.paint()
    assert desk.said == texts
    assert desk.screen.lines[-2:] == ["── #lobby connected ───────────────────", "alice> xxxxxx"]
    assert len([line for line in desk.screen.history if "───" in line]) == 0
    assert desk.paint() and desk.written == ""


def test_another_conversation_has_a_screen_of_its_own():
    desk = Desk()
    desk.hear("in the lobby")
    desk.paint()
    desk.core.rooms["#rust"].topic = "borrow checkers"
    desk.hear("one", "two", where="#rust")
    desk.hear("psst", where="bob", called=True)
    assert "in the lobby" in "".join(desk.paint())
    assert desk.screen.lines[-2] == "── #lobby bob:1! #rust:2 connected ────"
    assert desk.screen.bells == 1
    assert desk.go("#rust") == [
        "── #rust: borrow checkers",
        "── new",
        DAY,
        "08:30 bob: one",
        "08:30 bob: two",
        "── #rust bob:1! connected ─────────────",
        "#rust>",
    ]
    assert desk.go("#lobby")[:3] == ["── #lobby", DAY, "08:30 bob: in the lobby"]
    desk.core.close(desk.core.room)
    desk.display.take(desk.core.take_views())
    assert desk.paint()[0] == "── with bob"


def test_the_bell_rings_once_for_what_calls_us_and_never_for_the_past_or_ourselves():
    desk = Desk()
    desk.hear("alice?", "alice!", called=True)
    desk.paint()
    desk.hear("alice", called=True, past=True)
    desk.hear("said by me", called=True, mine=True)
    desk.hear("aside")
    desk.paint()
    assert desk.screen.bells == 1


def test_a_storm_shows_its_last_screenful_and_says_how_much_is_missing():
    desk = Desk()
    for turn in range(20):
        desk.hear(*(f"{turn}.{n}" for n in range(150)))
        desk.paint()
    lines = desk.screen.lines[:-2]
    assert lines[-1] == "08:30 bob: 19.149"
    everything = desk.screen.history + lines
    skipped = [int(line.split()[1]) for line in everything if line.startswith("\u2026")]
    assert len(skipped) >= 15 and sum(skipped) + len(desk.said) == 3000
    desk.now += 2
    desk.hear("calm", "again")
    assert desk.paint()[-4:-2] == ["08:30 bob: calm", "08:30 bob: again"]


def test_a_burst_of_history_is_shown_whole():
    desk = Desk()
    texts = [str(n) for n in range(100)]
    desk.hear(*texts)
    desk.paint()
    assert desk.said == texts


@pytest.mark.parametrize("columns, rows", [(80, 24), (40, 10), (40, 5), (10, 4)])
def test_one_can_read_back_row_by_row_and_come_back(columns, rows):
    desk = Desk(columns, rows)
    desk.hear(*(f"{n} " + "é你" * (n % 40) + "\n" * (n % 3) for n in range(200)))
    before = desk.paint()
    reader, height = desk.display.reader, rows - 2
    everything = [row for n in range(reader.first + 1, reader.total + 1) for row in reader.rows(n)]
    everything = [row.rstrip() for row, _ in everything]
    steps, back = [1, height - 1, height, 3 * height], 0
    for step in steps * 3:
        reader.up(step)
        back += step
        shown = (desk.paint()[:-2] + [""] * height)[:height]
        assert shown == everything[len(everything) - back - height : len(everything) - back]
    while reader.back:
        reader.down(step)
    assert desk.paint() == before
    assert "1049" not in desk.screen.modes


def test_while_one_reads_back_what_is_new_only_counts_and_is_printed_afterwards():
    desk = Desk()
    desk.hear(*(f"old {n}" for n in range(50)))
    desk.paint()
    page = desk.display.reader.up(7) or desk.paint()[:-2]
    desk.hear("new 0", "alice?", called=True)
    assert desk.paint()[:-2] == page
    assert "2 new below" in desk.screen.lines[-2] and desk.screen.bells == 1
    desk.display.reader.back = False
    assert desk.paint()[-4:-2] == ["08:30 ! bob: new 0", "08:30 ! bob: alice?"]
    assert desk.said[:50] == [f"old {n}" for n in range(50)]


def test_reading_back_survives_a_resize_and_so_does_the_present():
    desk = Desk()
    desk.hear(*(f"old {n}" for n in range(50)))
    desk.paint()
    desk.display.reader.up(20)
    last = desk.paint()[-3]
    assert desk.resize(20, 6)[-3] == last
    desk.hear("new")
    assert desk.resize(60, 12)[-3] == last
    desk.display.reader.back = False
    assert desk.paint()[-3] == "08:30 bob: new"
    assert len(desk.screen.lines) == 12
    assert desk.resize(30, 8)[:2] == ["── #lobby", "08:30 bob: old 46"]
    assert desk.screen.lines[-2:] == ["── #lobby connected ─────────", "alice>"]


def test_a_page_of_older_messages_goes_on_where_one_was():
    desk = Desk()
    desk.hear(*(f"{n}" for n in range(20)))
    desk.paint()
    reader, room = desk.display.reader, desk.core.room
    reader.up(30)  # there is less, and the person sees what there is
    assert desk.paint()[0] == DAY and "nothing older is here" in desk.screen.lines[-2]
    room.whole = True
    assert "this is the beginning" in desk.paint()[-2]
    desk.display.fetching, desk.core.talk = True, types.SimpleNamespace(ready=True, pieces=())
    assert "older ones are coming" in desk.paint()[-2]
    older = [at(**CLOCK, text=f"older {n}", name="bob", where="#lobby") for n in range(40)]
    came = chat.View(chat.OLDER, "20", where="#lobby")
    room.views.extendleft(reversed(older[20:]))
    assert desk.tell(came)[7] == "08:30 bob: 6"
    reader.up(60)
    assert desk.paint()[:2] == [DAY, "08:30 bob: older 20"]
    reader.up(7)  # nothing moves until there is more
    room.views.extendleft(reversed(older[:20]))
    assert desk.tell(came)[0] == "08:30 bob: older 12"


def test_the_oldest_stay_while_the_user_reads_them_and_go_then():
    desk = Desk()
    desk.hear(*(f"{n}" for n in range(100)))
    desk.paint()
    desk.display.reader.up(90)
    before = desk.paint()
    desk.hear(*(f"{n}" for n in range(chat.VIEWS_KEPT)))
    assert desk.paint()[:8] == before[:8]
    assert len(desk.core.room.views) == chat.VIEWS_KEPT + 100
    desk.display.reader.down(10**6)
    desk.hear("and one more")
    assert len(desk.core.room.views) == chat.VIEWS_KEPT and desk.core.room.views.dropped
    desk.display.reader.up(5)
    desk.core.room.views.clear()
    assert len(desk.paint()) == 10


def test_what_was_asked_for_is_shown_where_one_is_and_news_elsewhere_are_kept_there():
    desk = Desk()
    asked = at(**CLOCK, text="found", name="bob", where="#rust", past=True, id="x")
    desk.tell(asked._replace(kind=chat.FOUND), chat.View(chat.TOLD, "topic of rust", where="#rust"))
    assert re.fullmatch("\u2502 ....-..-.. 08:30 \\[#rust\\] bob: found", desk.screen.lines[1])
    assert "topic of rust" not in "".join(desk.screen.lines)
    assert desk.core.room.oldest == ""
    desk.tell(chat.View(chat.FAILED, "no: hi", where="#rust"))
    assert desk.screen.lines[-3].endswith("[#rust] FAILED: no: hi")
    rust = "".join(desk.go("#rust"))
    assert "topic of rust" in rust and "FAILED: no: hi" in rust


def test_nothing_a_server_says_steers_the_terminal(seeded):
    desk = Desk(colours=True)
    junk = ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x1b[?1049h", "\u202e", "\x07", "\t", "a"]
    palette = re.compile(r"\x1b\[[\d;]*m")
    for _ in range(100):
        text = "".join(seeded.choices(junk, k=6))
        name, room = "".join(seeded.choices(junk, k=2)), chat.Room("#" + text)
        room.topic, room.unread = text, 1
        desk.core.rooms[room.name] = room
        views = [
            chat.View(kind, f"{text}, x", name, where, time=0)
            for kind in chat.LINES
            for where in ("", text)
        ]
        desk.core.name = name
        desk.tell(*views)
        desk.go(room.name)
        lines = [line for view in views for line in chat.view_lines(view, desk.display.reader.look)]
        for line in lines:
            assert not re.search("[\0-\x1f\x7f-\x9f\u202e]", palette.sub("", line)), line
        del desk.core.rooms[room.name]


class TerminalProcess:
    """The terminal client in a process of its own, on a terminal of ours."""

    def __init__(self, address, *arguments, state=None, limits=None):
        import pty
        import termios

        self.termios, self.fcntl = termios, fcntl
        self.ours, self.theirs = pty.openpty()
        self.screen = Screen()
        self.size(80, 24)
        self.before = termios.tcgetattr(self.theirs)
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs)
        where = ["--server", "{}:{}".format(*address)] + ["--no-state"] * (state is None)
        folders = dict.fromkeys(("XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(state))
        environment = {**os.environ, **folders, "TERM": "xterm", "NO_COLOR": "1"}
        options = {**ends, "env": environment, "limits": limits, "start_new_session": True}
        self.process = program("client", *arguments, *where, **options)
        self.seen, self.decode = "", codecs.getincrementaldecoder("utf-8")().decode

    def type(self, text):
        os.write(self.ours, text.encode())

    def size(self, columns, rows):
        size = struct.pack("HHHH", rows, columns, 0, 0)
        self.fcntl.ioctl(self.theirs, self.termios.TIOCSWINSZ, size)
        self.screen.resize(columns, rows)

    def resize(self, columns, rows):
        self.size(columns, rows)
        self.process.send_signal(signal.SIGWINCH)

    def sees(self, text):
        """Wait until the terminal was sent `text`."""
        self.read_until(lambda: text in self.seen, text)
        self.seen = self.seen.partition(text)[2]
        return True

    def shows(self, *texts):
        """Wait until all of that stands on the screen."""
        self.read_until(lambda: all(text in "\n".join(self.screen.lines) for text in texts), texts)
        return True

    def read_until(self, done, wanted):
        deadline = time.monotonic() + PATIENCE
        while not done():
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.ours], [], [], max(0, left))
            assert ready, f"{wanted!r} was not shown: {self.seen!r} {self.screen.lines}"
            text = self.decode(os.read(self.ours, 65536))
            self.seen += text
            self.screen.draw(text)

    def restored(self):
        return self.termios.tcgetattr(self.theirs) == self.before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    pytest.importorskip("pty")
    started = []

    def start(*arguments, **options):
        started.append(TerminalProcess(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_a_code_stands_among_the_messages_black_on_white_whatever_the_colours_are():
    url = "http://192.168.1.5:7000/"
    desk = Desk(columns=33, rows=24)
    desk.display.take([chat.View(chat.QR_CODE, url)])
    desk.paint()
    lines = "\n".join(desk.screen.lines)
    assert "\n".join(row.rstrip() for row in chat.qr_rows(url)) in lines and f"\n{url}\n" in lines
    assert desk.written.count("\x1b[38;5;16;48;5;231m") == len(chat.qr_rows(url))
    narrow = Desk(columns=32, rows=24)
    narrow.display.take([chat.View(chat.QR_CODE, url)])
    assert any(line.startswith(url) for line in narrow.paint())
    assert "\u2588" not in narrow.written and "33 columns" in " ".join(narrow.screen.lines)


def test_a_pipe_that_asks_for_the_code_gets_the_address():
    assert chat.filter_lines(chat.View(chat.QR_CODE, "http://h/")) == ["* http://h/"]


def test_a_conversation_at_a_terminal(running, terminal):
    server = running()
    bob = server.guest("bob")
    bob.send("earlier\n")
    alice = terminal(server.address, "alice")
    assert alice.sees("bob: earlier")
    assert "joined" in bob.line()
    alice.type("helo\x1b[Dl\r")
    assert bob.line() == "alice: hello"
    assert alice.sees("alice: hello")
    alice.type("being typed")
    assert alice.sees("being typed")
    bob.send("incoming\n")
    assert alice.sees("bob: incoming\r\n") and alice.sees("alice> being typed")
    alice.type("\x15bo\t\x1b[200~one\rtwo\x1b[201~\r")
    assert bob.lines(2) == ["alice: bob: one", "alice: two"]
    alice.type("/tell bob psst\r")
    assert bob.line() == "(private) alice: psst"
    alice.type("/quit\r")
    assert "left" in bob.line()
    assert alice.process.wait(PATIENCE) == 0
    assert alice.restored()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_the_terminal_is_given_back_whatever_ends_the_client(running, terminal, number):
    alice = terminal(running().address, "alice")
    assert alice.sees("alice> ")
    assert not alice.restored()
    alice.process.send_signal(number)
    assert alice.process.wait(PATIENCE) == 0
    assert alice.restored()
    assert "\x1b[?2004l" in os.read(alice.ours, 65536).decode()


def test_ctrl_c_forgets_the_line_before_it_leaves(running, terminal):
    server = running()
    bob, alice = server.guest("bob"), terminal(server.address, "alice")
    assert alice.sees("alice> ")
    alice.type("oops")
    assert alice.sees("oops")
    alice.process.send_signal(signal.SIGINT)
    assert alice.sees("alice> ")
    alice.type("fine\r")
    assert bob.until("alice:") and alice.process.poll() is None
    alice.process.send_signal(signal.SIGINT)
    assert alice.sees("Ctrl-C again leaves")
    alice.process.send_signal(signal.SIGINT)
    assert alice.process.wait(PATIENCE) == 0 and alice.restored()


def test_a_client_comes_back_when_its_server_does(terminal, folder):
    with serving("--data", folder) as (process, address):
        alice = terminal(address, "alice", limits={"BACKOFF_FIRST": 0.1})
        assert alice.sees("you are alice") and alice.sees("alice> ")
        process.send_signal(signal.SIGTERM)
        assert alice.sees("the server is going down") and alice.sees("trying again in")
        process.wait(PATIENCE)
    alice.type("typed meanwhile\r")
    with program("server", "--listen", "{}:{}".format(*address), "--data", folder) as again:
        again.stdout.readline()
        bob = Guest(address, "bob")
        assert alice.sees("connected to")
        assert bob.until("alice: typed meanwhile")
        again.kill()


def test_tab_completes_the_last_speakers_and_known_channels():
    core = chat.ClientCore("alice", kind=chat.CHAT, join=("#lobby", "#rust"))
    core.room_for("bob"), core.rooms["#rust"].came("bert")
    for name in ("alice", "bea", "ben"):
        core.room.came(name)
    core.room.spoke("ben")
    table = {
        "b": ["ben: ", "bea: "],
        "hi BE": ["ben ", "bea "],
        "/te": ["/tell "],
        "/tell b": ["ben ", "bea ", "bert ", "bob "],
        "/go ": ["#lobby", "#rust", "bob"],
        "/go ru": ["#rust"],
        "/go B": ["bob"],
        "see #r": ["#rust "],
        "a": [],
    }
    for before, expected in table.items():
        word = before[before.rfind(" ") + 1 :]
        assert chat.complete_line(core, before, word) == expected, before


def test_several_conversations_at_a_terminal(running, terminal):
    server = running()
    bob = server.guest()
    bob.enter_irc("bob", "JOIN #lobby,#rust", "TOPIC #rust :borrow checkers")
    alice = terminal(server.address, "alice", "--join", "#lobby,#rust")
    assert bob.until("alice!") and bob.until("alice!") and alice.shows("#lobby 2")
    bob.send("PRIVMSG #rust :one\r\nPRIVMSG #rust :alice: two\r\nPRIVMSG alice :psst\r\n")
    assert alice.shows("#lobby 2", "#rust:2!", "bob:1!") and alice.screen.bells
    alice.type("to everybody\r")
    assert bob.until("PRIVMSG #lobby :to everybody")
    alice.type("\x1b2")
    assert alice.shows("#rust: borrow checkers", "bob: one", "! bob: alice: two", "#rust alice>")
    assert "to everybody" not in "\n".join(alice.screen.lines)
    alice.type("\x1baand you\r")
    assert bob.until("PRIVMSG bob :and you")
    assert alice.shows("with bob", "bob: psst", "alice: and you", "bob alice>")
    alice.type("/go ru\t\r/names\r")
    assert alice.shows("2 in #rust", "  @bob   alice")
    alice.type("\x1bp\x1bp\x1bn")  # two back, one on
    assert alice.shows("── #lobby", "alice: to everybody")
    alice.resize(40, 12)
    assert alice.shows("───") and len(alice.screen.lines) <= 12
    alice.type("/help go\r")
    assert alice.shows("/go #CHANNEL|NAME|N\n    look at another conversation, by")


def test_a_person_pages_up_through_what_the_server_keeps(running, terminal):
    server = running()
    bob = server.guest("bob")
    bob.send("".join(f"number {n}.\n" for n in range(250)) + "/names\n")
    bob.until("#lobby")
    alice = terminal(server.address, "alice")
    assert alice.shows("number 249.", "alice>")
    screen = alice.screen
    numbers = set(re.findall(r"number (\d+)\.", " ".join(screen.lines)))
    while "this is the beginning" not in screen.lines[-2]:
        top = screen.lines[0]
        alice.type("\x1b[5~")
        alice.read_until(
            lambda top=top: (
                screen.lines[-1:] == ["alice>"]
                and (screen.lines[0] != top or "beginning" in screen.lines[-2])
            ),
            "another page",
        )
        numbers |= set(re.findall(r"number (\d+)\.", " ".join(screen.lines)))
    assert alice.shows("bob: number 0.")
    assert {str(n) for n in range(250)} - numbers == set()
    bob.send("something new\n")
    assert alice.shows("1 new below")
    alice.resize(40, 10)
    assert alice.shows("1 new below")
    alice.type("\x1b[F")
    assert alice.shows("number 249.", "bob: something new", "#lobby 2 connected")
    alice.type("\x1b[5~draft")
    assert alice.shows("back at", "alice> draft")
    alice.process.send_signal(signal.SIGTERM)
    assert alice.process.wait(PATIENCE) == 0
    assert alice.restored() and alice.sees("\x1b[?1049l")


def test_a_cut_line_is_told_once_counted_down_and_nothing_typed_is_lost(terminal, folder):
    with serving("--data", folder / "server") as (process, address):
        soon = {"BACKOFF_FIRST": 2.4}  # give or take a quarter
        alice = terminal(address, "alice", state=folder / "alice", limits=soon)
        assert alice.shows("you are alice", "#lobby 1 connected")
        process.kill()
        assert alice.shows("reconnecting in")
        seconds = int(re.search("reconnecting in ([0-9])", "\n".join(alice.screen.lines))[1])
        alice.type("said meanwhile\r/names\r")
        assert alice.shows("alice: said meanwhile", "1 waiting", "not connected; nothing was sent")
        assert alice.shows(f"reconnecting in {seconds - 1} s")
        assert sum("trying again" in line for line in alice.screen.lines) == 1
    alice.type("\x15/quit\r")
    assert alice.shows("1 message waiting, to be sent the next time")
    assert alice.process.wait(PATIENCE) == 0 and alice.restored()
    assert "reconnecting" not in "\n".join(alice.screen.lines)
    with program("server", "--listen", "{}:{}".format(*address), "--data", folder / "server") as p:
        p.stdout.readline()
        bob = Guest(address, "bob")
        again = terminal(address, "alice", state=folder / "alice")
        assert bob.until("alice: said meanwhile") and again.shows("alice: said meanwhile")
        bob.close()
        p.kill()


def test_one_terminal_talks_on_two_servers_and_does_so_again_at_the_next_start(
    running, terminal, folder
):
    here, there = running(), running()
    bob, carol = here.guest("bob"), there.guest("carol")
    alice = terminal(here.address, "alice", state=folder)
    assert alice.shows("you are alice", "alice>")
    alice.type(f"/connect irc://{chat.address_text(*there.address)}\r")
    assert alice.shows("#lobby on", "you are alice")
    alice.type("hello there\r")
    assert carol.until("alice: hello there")
    bob.send("alice: and here?\n")
    assert alice.shows("#lobby:1!")
    alice.type("/go 1\r")
    assert alice.shows("bob: alice: and here?")
    alice.type("yes\r/go\r")
    assert bob.until("alice: yes") and alice.shows("1 #lobby, ", ": 2 #lobby")
    alice.type("/quit\r")
    assert alice.process.wait(PATIENCE) == 0
    again = terminal(here.address, "alice", state=folder)
    assert carol.until("alice") and again.shows("alice: yes")
    carol.send("welcome back\n")
    assert again.shows(f"{chat.address_text(*there.address)}/#lobby:1")


def test_a_server_that_is_down_is_not_forgotten_with_what_waits_for_it(running, terminal, folder):
    here = running()
    with serving("--data", "none") as (process, address):
        alice = terminal(here.address, "alice", state=folder)
        assert alice.shows("#lobby 1 connected")
        alice.type(f"/connect irc://{chat.address_text(*address)}\r")
        assert alice.shows("#lobby on", "you are alice")
        process.kill()
        assert alice.shows("reconnecting")
        alice.type("waits here\r")
        assert alice.shows("1 waiting")
        alice.type("/go 1\r")
        assert alice.shows("#lobby 1")
        alice.type("/quit\r")
        assert alice.shows("1 message waiting, to be sent the next time")
        assert alice.process.wait(PATIENCE) == 0
    again = terminal(here.address, "alice", state=folder)
    assert again.shows("#lobby 1")
    again.type("/go\r")
    assert again.shows(f"{chat.address_text(*address)}: 2 #lobby")
    again.type("/go 2\r")
    assert again.shows("alice: waits here")
    again.resize(60, 15)
    again.type("/disconnect\r")
    assert again.shows("1 message waiting")


def test_a_stopped_client_gives_the_terminal_back_until_it_goes_on(running, terminal):
    """The system does not stop a process without a shell above it: it goes on at once."""
    alice = terminal(running().address, "alice")
    assert alice.shows("connected", "alice>")
    alice.type("draft")
    assert alice.shows("alice> draft")
    alice.process.send_signal(signal.SIGTSTP)
    assert alice.sees("\x1b[?2004l") and alice.sees("\x1b[?2004h")
    assert alice.shows("alice> draft")


def test_typing_is_not_slowed_by_a_storm(running, terminal):
    """The suite shares its computer: the time is that of one key in three."""
    server = running()
    bob, alice = server.guest("bob"), terminal(server.address, "alice")
    assert alice.shows("#lobby 2 connected", "alice>")
    storm = "".join(f"storm {n} of words of a user\n" for n in range(500)).encode()
    delays, typed = [], ""
    for c in "the quick fox":
        bob.send(storm)
        typed, began = typed + c, time.monotonic()
        alice.type(c)
        alice.seen = ""
        assert alice.sees(f"alice> {typed}")
        delays.append(time.monotonic() - began)
    assert sorted(delays)[len(delays) // 3] < 0.25
    assert alice.shows("storm 499 of")


@pytest.mark.parametrize("size, keys", [(-1, []), (0, [("text", "a")])])
def test_an_answer_of_a_terminal_that_does_not_end_swallows_no_more_than_so_much(size, keys):
    decoder = chat.KeyDecoder()
    assert decoder.feed(b"\x1b]".ljust(chat.STRING_MOST + size, b"0")) == []
    assert decoder.flush() == []
    assert decoder.feed(b"a") == keys


def test_a_client_that_is_stopped_unasked_takes_the_terminal_again_when_it_goes_on(
    running, terminal
):
    alice = terminal(running().address, "alice")
    assert alice.shows("connected", "alice>")
    alice.process.send_signal(signal.SIGSTOP)
    os.waitpid(alice.process.pid, os.WUNTRACED)
    alice.termios.tcsetattr(alice.theirs, alice.termios.TCSANOW, alice.before)  # as a shell does
    alice.seen = ""
    alice.process.send_signal(signal.SIGCONT)
    assert alice.sees("\x1b[?2004h") and alice.shows("connected", "alice>")
    assert not alice.restored()


def test_names_have_all_colours_but_black_and_white_each_its_own():
    palette = chat.Palette(on=True)
    painted = [palette.name(f"user{n}") for n in range(1000)]
    codes = collections.Counter(int(re.match(r"\x1b\[(\d+)muser", name)[1]) for name in painted)
    assert sorted(codes) == [*range(31, 37), *range(91, 97)]
    assert max(codes.values()) < 1.5 * min(codes.values())
    assert palette.name("Bob").replace("Bob", "bOB") == palette.name("bOB")


@pytest.mark.parametrize(
    "columns, cut",
    [(4, "word"), (3, "wo\u2026"), (2, "w\u2026"), (1, "\u2026"), (0, ""), (-1, "")],
)
def test_what_is_cut_to_some_columns_has_a_mark_in_the_last_of_them(columns, cut):
    assert chat.cut_to("word", columns) == cut


def test_the_status_row_tells_when_the_last_message_on_the_page_was_said():
    desk = Desk()
    for minute in range(40):
        said = at(**{**CLOCK, "minute": minute}, text="hello", name="bob", where="#lobby")
        desk.core.deliver(desk.core.room, said)
    desk.display.take(desk.core.take_views())
    desk.paint()
    status = []
    for rows in (1, 1, 10, 20):
        desk.display.reader.up(rows)
        *page, row, _ = desk.paint()
        assert f" back at Fri 21 Nov {page[-1][:5]} " in row
        status.append(page[-1][:5])
    assert status == ["08:38", "08:37", "08:27", "08:07"]


@pytest.mark.parametrize(
    "key, data",
    [
        ("up", b"\x1b[A\x1bOA\x10"),
        ("down", b"\x1b[B\x1bOB\x0e"),
        ("right", b"\x1b[C\x1bOC\x06"),
        ("left", b"\x1b[D\x1bOD\x02"),
        ("home", b"\x1b[H\x1bOH\x1b[1~\x1b[7~\x01"),
        ("end", b"\x1b[F\x1bOF\x1b[4~\x1b[8~\x05"),
    ],
)
def test_the_cursor_moves_by_the_keys_of_all_terminals_and_by_those_of_emacs(key, data):
    decoder = chat.KeyDecoder()
    found = [found.name for found in decoder.feed(data)]
    assert found == [key] * len(re.findall(rb"\x1b|[\x01-\x10]", data))


def test_ctrl_l_draws_the_whole_screen_again(running, terminal):
    alice = terminal(running().address, "alice")
    assert alice.shows("#lobby 1 connected", "alice>")
    alice.type("being typed")
    assert alice.shows("alice> being typed")
    alice.screen.draw("\x1b[1H" + "of another program\r\n" * 20)
    alice.seen = ""
    alice.type("\x0c")
    assert alice.sees("\x1b[2J\x1b[H")
    assert alice.shows("you are alice", "alice> being typed")
    assert "program" not in "".join(alice.screen.lines)


def test_what_is_said_while_a_command_is_typed_is_not_the_last_message_for_it(running, terminal):
    server = running()
    bob, alice = server.guest(), terminal(server.address, "alice")
    assert alice.shows("#lobby 1 connected", "alice>")
    lines = bob.enter_irc(
        "bob", "CAP REQ :message-tags echo-message", "JOIN #lobby", "PRIVMSG #lobby :tea?"
    )
    (asked,) = [re.search(r"msgid=([^; ]+)", line)[1] for line in lines if " :tea?" in line]
    assert alice.shows("bob: tea?")
    alice.type("/reply ")
    assert alice.shows("alice> /reply")
    bob.send("PRIVMSG #lobby :by the way\r\n")
    assert alice.shows("bob: by the way")
    alice.type("yes\r")
    assert f"{chat.REPLY}={asked} " in bob.until(" :yes")[-1].replace(";", " ")


# ======================================================================================
# CLI CLIENT
# ======================================================================================


class Workshop:
    """A server that says nothing first and takes down what one client sends."""

    def __init__(self):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.settimeout(PATIENCE)
        self.where = f"127.0.0.1:{self.listening.getsockname()[1]}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listening.close()

    def accept(self):
        sock, _ = self.listening.accept()
        sock.settimeout(PATIENCE)
        return sock


@pytest.mark.parametrize("flags", [["--plain"], []])
def test_the_first_bytes_to_a_workshop_server_are_the_name(flags):
    with Workshop() as server:
        arguments = ["alice", "--server", server.where, "--no-state", *flags]
        client = program("client", *arguments, limits={"LISTEN_SECONDS": 0.1})
        with client, server.accept() as sock:
            assert sock.recv(100) == b"alice\n"
            client.stdin.write(b"hello\n/quit is text here\n")
            client.stdin.flush()
            sock.sendall(b"bob: hi\n\xff\n")
            assert client.stdout.readline().decode() == f"connected to {server.where}\n"
            assert client.stdout.readline() == b"> bob: hi\n"
            assert client.stdout.readline().decode() == "> \ufffd\n"
            client.stdin.close()
            got = b"".join(iter(lambda: sock.recv(100), b""))  # to the end: a half-close
            assert got == b"hello\n/quit is text here\n"
            sock.sendall(b"bob: bye\n")
            sock.close()
            assert client.stdout.read() == b"> bob: bye\n"
            assert client.wait(PATIENCE) == 0


def test_a_url_says_that_it_is_the_line_protocol():
    with Workshop() as server:
        client = program("client", "alice", "--server", f"chat://{server.where}", "--no-state")
        with client, server.accept() as sock:
            assert sock.recv(100) == b"alice\n"
            client.stdin.close()
            sock.close()
            assert client.wait(PATIENCE) == 0


def test_a_filter_whose_server_goes_away_says_so_and_fails():
    with Workshop() as server:
        client = program("client", "alice", "--server", f"chat://{server.where}", "--no-state")
        with client, server.accept() as sock:
            sock.recv(100)
            sock.close()
            assert client.wait(PATIENCE) == 1
            assert b"the connection was closed" in client.stderr.read()


def test_a_file_can_be_piped_into_a_chat_and_every_line_is_text(running, folder):
    server = running()
    bob = server.guest("bob")
    text = folder / "text"
    text.write_text("".join(f"/{n}\n" for n in range(1000)) + "no newline")
    where = "{}:{}".format(*server.address)
    with (
        open(text) as file,
        program("client", "alice", "--server", where, "--no-state", stdin=file) as client,
    ):
        assert client.wait(PATIENCE) == 0
    assert "joined" in bob.line()
    assert bob.lines(1001) == [f"alice: /{n}" for n in range(1000)] + ["alice: no newline"]
    assert "left" in bob.line()


def test_a_pipe_without_a_reader_or_a_writer_says_how_it_ended(running):
    where = "{}:{}".format(*running().address)
    reader, unread = os.pipe()
    os.close(reader)
    command = ("client", "alice", "--server", where, "--no-state")
    with program(*command, stdout=unread) as client:
        _, errors = client.communicate(b"hello\n")
        assert client.returncode == 1 and errors == b"chat.py: standard output: broken pipe\n"
    os.close(unread)
    closed = functools.partial(os.close, 0)
    with program(*command, stdin=None, preexec_fn=closed) as client:
        out, errors = client.communicate()
        assert client.returncode == 0 and errors == b"" and out.startswith(b"connected to")


def test_a_pipe_that_was_to_join_a_channel_of_a_plain_server_fails():
    with Workshop() as server:
        arguments = ["alice", "--server", server.where, "--no-state", "--join", "#a"]
        client = program("client", *arguments, limits={"LISTEN_SECONDS": 0.1})
        with client, server.accept() as sock:
            assert sock.recv(100) == b"alice\n"
            client.stdin.close()
            assert sock.recv(100) == b""
            sock.close()
            assert b"if it is one of IRC, write irc://" in client.stderr.read()
            assert client.wait(PATIENCE) == 1


def test_a_pipe_that_was_to_log_in_and_could_not_fails(running, folder):
    (folder / "password").write_text("wrongwrong")
    login = ("--login", f"alice:@{folder / 'password'}")
    command = ("client", "alice", "--server", "{}:{}".format(*running().address), "--no-state")
    with program(*command, *login) as client:
        _, errors = client.communicate(b"hello\n")
        assert client.returncode == 1 and errors.endswith(b"chat.py: not logged in as alice\n")


def test_commands_in_a_pipe_need_a_flag(running):
    server = running()
    where = "{}:{}".format(*server.address)
    with program("client", "alice", "--server", where, "--no-state", "--commands") as client:
        out, _ = client.communicate(b"/list\n", PATIENCE)
    assert b"> * #lobby  1\n" in out


def test_the_client_verifies_certificates_unless_told_otherwise(running, certificate):
    server = running(tls_cert=certificate)
    url = f"ircs://127.0.0.1:{server.address[1]}"
    pin = hashlib.sha256(
        ssl.PEM_cert_to_DER_cert(CERTIFICATE[CERTIFICATE.index("-----BEGIN CERT") :])
    ).hexdigest()
    for flags, status in [
        ([], 1),
        (["--ca", certificate], 0),
        (["--insecure"], 0),
        (["--pin", pin], 0),
        (["--pin", "00" * 32], 1),
    ]:
        with program("client", "alice", "--server", url, "--no-state", *flags) as client:
            _, errors = client.communicate(b"hello\n", PATIENCE)
            assert client.returncode == status, errors
            refused = pin.encode() in errors and (
                b"is not signed" in errors or b"is not the certificate" in errors
            )
            assert refused == bool(status)


def test_a_filter_speaks_in_the_channel_it_was_told_to_join(running):
    server = running()
    bob = server.guest("bob")
    bob.send("/join #a\n")
    bob.until("#a 1-1 of 1")
    where = "{}:{}".format(*server.address)
    with program("client", "bot", "--server", where, "--no-state", "--join", "#a") as client:
        client.communicate(b"hi\n", PATIENCE)
    assert bob.until("hi")[-1] == "[#a] bot: hi"


def test_without_a_state_nothing_is_said_to_be_sent_the_next_time(folder):
    client = chat.Client.__new__(chat.Client)
    for state, fate in (None, "not sent"), (folder, "waiting, to be sent the next time"):
        client.options = chat.ClientOptions("bot", chat.parse_target("x:1"), state=state)
        assert client.fate_of(2) == f"2 messages {fate}"


@pytest.mark.parametrize(
    "options, flags, words",
    [
        ({"max_clients": 1}, [], "this server is full"),
        ({"password": "sesame"}, [], "password is missing or wrong"),
        ({"password": "sesame"}, ["--password", "wrong"], "password is missing or wrong"),
    ],
)
def test_a_filter_that_was_not_let_in_fails(running, options, flags, words):
    server = running(**options)
    if "max_clients" in options:
        server.guest("one")
    where = "{}:{}".format(*server.address)
    with program("client", "bot", "--server", where, "--no-state", *flags) as client:
        _, errors = client.communicate(b"hi\n", PATIENCE)
        assert client.returncode == 1 and words in errors.decode()


def test_what_kind_of_server_it_is_is_remembered(folder):
    target = chat.parse_target("example.net:7000")
    known, other = (chat.KnownServers(chat.open_client_file(folder)) for _ in range(2))
    assert (known.kind(target), known.pin(target)) == ("", None)
    known.remember(target, kind=chat.CHAT)
    known.remember(target, pin="ab")
    assert (other.kind(target), other.pin(target)) == ("", None)
    other.refresh()
    assert (other.kind(target), other.pin(target)) == (chat.CHAT, "ab")
    assert other.policy("example.net") == (0, 0.0)
    other.remember(target, kind=chat.IRC)
    known.remember(target, pin="cd")  # which does not know of the other's change
    known.refresh()
    assert (known.kind(target), known.pin(target)) == (chat.IRC, "cd")


def test_a_password_that_was_made_is_stored_before_it_is_used(folder):
    known, other = (chat.KnownServers(chat.open_client_file(folder)) for _ in range(2))
    known.keep_login("a:1", "Alice", chat.Login("alice", "x"))
    assert other.login("a:1", "alice") == chat.Login("alice", "x")
    assert other.login("a:1", "bob") is None
    fill(known.db)
    with pytest.raises(chat.Unusable, match="full"):
        known.keep_login("a:1", "bob", chat.Login("bob", "y" * 5000))
    known.keep_login("a:1", "alice", None)
    assert other.login("a:1", "alice") is None and known.login("a:1", "bob") is None


@pytest.mark.parametrize(
    "text, target",
    [
        ("", ("127.0.0.1", 7000, False, "")),
        ("example.net", ("example.net", 7000, False, "")),
        ("example.net:1234", ("example.net", 1234, False, "")),
        (":1234", ("127.0.0.1", 1234, False, "")),
        ("[::1]:1234", ("::1", 1234, False, "")),
        ("chat://example.net", ("example.net", 7000, False, "plain")),
        ("chats://example.net:1/", ("example.net", 1, True, "plain")),
        ("irc://example.net", ("example.net", 6667, False, "irc")),
        ("ircs://example.net", ("example.net", 6697, True, "irc")),
        ("ircs://[::1]:7000", ("::1", 7000, True, "irc")),
        ("example.net:6667", ("example.net", 6667, False, "irc")),
        ("example.net:6697", ("example.net", 6697, True, "irc")),
    ],
)
def test_a_server_is_named_by_host_and_port_or_a_url(text, target):
    assert tuple(chat.parse_target(text)) == (*target, ())


def test_several_servers_of_one_chat_are_named_with_commas():
    target = chat.parse_target("irc://a,b:7001,ircs://[::1]:7000")
    assert [tuple(one)[:4] for one in (target, *target.others)] == [
        ("a", 6667, False, "irc"),
        ("b", 7001, False, ""),
        ("::1", 7000, True, "irc"),
    ]
    assert chat.parse_target(chat.url_of(target)) == target
    with pytest.raises(chat.Unusable):
        chat.parse_target("a,b c")


class Linked:
    """A link on a loop of its own, turned until something is so."""

    def __init__(self, target, known=None, **options):
        self.loop, self.views, self.ended = chat.Loop(), [], []
        self.core = chat.ClientCore("alice")
        self.link = chat.Link(
            self.loop,
            target,
            self.core,
            self.views.extend,
            self.ended.append,
            known=known,
            **options,
        )
        self.link.start()

    def until(self, holds):
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, self.views
            self.loop.run_once(0.1)

    def noted(self, text):
        return any(text in view.text for view in self.views)

    def close(self):
        self.link.phase = chat.ENDED
        if self.link.conn:
            self.link.conn.sock.close()
        self.link.helpers.close()
        self.loop.close()


def test_a_broken_line_is_shown_at_once_and_not_when_something_else_happens(monkeypatch):
    monkeypatch.setattr(chat, "BACKOFF_FIRST", PATIENCE)
    monkeypatch.setattr(chat, "WATCH_SECONDS", PATIENCE)
    server = Running()  # stopped here, and not by the fixture
    shown = []
    alice = Linked(chat.parse_target("irc://{}:{}".format(*server.address)))
    alice.loop.turn_ends = lambda: shown.append(len(alice.views))
    alice.until(lambda: alice.core.ready)
    server.loop.call_soon_threadsafe(server.server.stop)
    alice.until(lambda: alice.link.again)
    began = time.monotonic()
    while shown[-1] < len(alice.views):
        alice.loop.run_once(PATIENCE)
    assert alice.noted("trying again in") and time.monotonic() - began < chat.BACKOFF_FIRST / 2
    alice.close()
    server.stop()


def test_a_certificate_that_no_authority_signed_is_asked_about_once_and_its_change_is_loud(
    running, certificate, folder
):
    server = running(tls_cert=certificate)
    target = chat.parse_target(f"ircs://127.0.0.1:{server.address[1]}")
    known = known_servers()
    alice = Linked(target, known)
    alice.until(lambda: alice.link.doubted)
    pin = alice.link.doubted
    assert alice.noted("is not signed by an authority") and alice.noted(pin)
    assert not alice.core.ready
    alice.link.typed("/trust")
    alice.until(lambda: alice.core.ready)
    alice.close()
    again = Linked(target, known)
    again.until(lambda: again.core.ready)
    assert not again.noted("is not signed")
    again.close()
    known.remember(target, pin="00" * 32)
    third = Linked(target, known)
    third.until(lambda: third.ended)
    assert third.ended[0].startswith("ANOTHER CERTIFICATE") and pin in third.ended[0]
    third.close()


def test_what_waits_for_a_channel_or_a_person_goes_where_they_are_now():
    house = house_of("bob")
    alice = Pair(house, "alice")
    alice.typed("/tell bob")
    alice.core.outbox.in_flight = dict.fromkeys(map(str, range(chat.SENT_AHEAD)))  # a slow line
    alice.core.typed("late words")
    house.say("bob", "/nick rob")
    alice.exchange()
    alice.core.outbox.in_flight = {}
    alice.core.flush()
    alice.exchange()
    assert house.heard("bob")[-1] == "(private) alice: late words"


def test_of_two_addresses_the_one_that_answers_is_taken(loop):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    addresses = [(socket.AF_INET6, ("::1", 1)), (socket.AF_INET, ("127.0.0.1", port))]
    found = []
    chat.Race(loop, addresses, lambda sock, reason: found.append((sock, reason)))
    while not found:
        loop.run_once(0.1)
    (sock, reason), *others = found
    assert sock.getpeername()[1] == port and (reason, others) == ("", [])
    sock.close()
    server.close()


def test_a_line_of_a_pipe_that_could_not_be_said_is_counted_and_the_rest_said(running):
    server = running()
    bob = server.guest("bob")
    where = "{}:{}".format(*server.address)
    command = ("client", "bot", "--server", where, "--no-state", "--commands")
    with program(*command) as client:
        _, errors = client.communicate(b"/nothing\n/nowhere\nhi\n", PATIENCE)
        assert client.returncode == 1
        assert errors.endswith(b"chat.py: 2 messages did not arrive\n")
    assert bob.until("bot: hi")


# FAULTS

# Two piped clients, a server, and between them a network that does what networks do. The
# clients are as patient as they are, but in hundredths of their seconds. CHAT_FAULTS=10 runs
# each ten times, with other seeds and a thousand lines.

RUNS = int(os.environ.get("CHAT_FAULTS", 0))
FAULTS = range(max(1, RUNS))
LINES_SAID = 1000 if RUNS else 100


class Proxy:
    """Carries bytes both ways; breaks, delays and swallows them as it is told."""

    def __init__(
        self,
        server,
        seeded=None,
        least=0,
        most=0,
        latency=0.0,
        rate=math.inf,
        after=b"",
        piece=1024,
        nagle=True,
        cuts=math.inf,
    ):
        self.server, self.seeded = server, seeded
        self.cuts = cuts  # connections that are reset, at most
        self.carried = {"up": 0, "down": 0}  # bytes
        self.after = after  # bytes of the server from which on a connection may be reset
        self.piece, self.nagle = piece, nagle
        self.least, self.most = least, most  # bytes until a connection is reset; 0: never
        self.latency, self.rate = latency, rate  # seconds, bytes a second
        self.deaf = threading.Event()  # what comes is taken, and goes nowhere
        self.resets = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        if rate < math.inf:  # else its own buffers, of megabytes, are the network
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, piece)
        self.address = self.listening.getsockname()
        self.where = chat.address_text(*self.address)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listening.accept()
                far = socket.create_connection(self.server)
            except ConnectionRefusedError:  # the server is down: so are we
                near.close()
                continue
            except OSError:
                return
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not self.nagle)
                if self.rate < math.inf:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.piece)
            budget = [math.inf if self.after else self.lifetime()]
            for one, other, way in ((near, far, "up"), (far, near, "down")):
                pump = functools.partial(self.pump, one, other, way, budget, self.deaf)
                threading.Thread(target=pump, daemon=True).start()

    def lifetime(self):
        limited = self.most and self.resets < 2 * self.cuts  # each way counts
        return self.seeded.randrange(self.least, self.most) if limited else math.inf

    def swallow(self):
        """The connections that there are stay open, and nothing comes through."""
        self.deaf.set()
        self.deaf = threading.Event()

    def carry(self, data, sink, budget):
        """As much of it as there is left to carry, after a while."""
        time.sleep(self.latency + len(data) / self.rate)
        budget[0] -= len(data)
        sink.sendall(data[: max(0, len(data) + int(min(budget[0], 0)))])

    def pump(self, source, sink, way, budget, deaf):
        with contextlib.suppress(OSError):
            while budget[0] > 0 and (data := source.recv(self.piece)):
                self.carried[way] += len(data)
                if self.after and budget[0] == math.inf and self.after in data:
                    budget[0] = self.lifetime()
                if not deaf.is_set():
                    self.carry(data, sink, budget)
            if budget[0] <= 0:
                self.resets += 1
                for sock in (source, sink):
                    reset = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listening.close()


IMPATIENT = {
    "BACKOFF_FIRST": 0.02,
    "BACKOFF_MOST": 0.2,
    "WATCH_SECONDS": 0.05,
    "SILENT_SECONDS": 2.0,
    "WAITING_SECONDS": 0.5,
    "LISTEN_SECONDS": 2.0,
}


def piped(name, where, folder=None, silent=2.0, **options):
    """A client as a filter that does not wait for long."""
    state = [] if folder else ["--no-state"]
    environment = os.environ | {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = ["client", name, *state, "--server", f"irc://{where}"]
    limits = IMPATIENT | {"SILENT_SECONDS": silent}
    options = {"env": environment, "limits": limits, "stderr": None, **options}
    return program(*command, **options)


def test_a_client_turns_to_the_next_server_of_a_chat_when_one_is_not_there(running):
    server = running()
    bob = server.guest("bob")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = chat.address_text(*closed.getsockname())
    with piped("alice", f"{nowhere},irc://{chat.address_text(*server.address)}") as alice:
        alice.communicate(b"hello\n", timeout=PATIENCE)
    assert bob.until("alice: hello") and alice.returncode == 0


def test_a_client_learns_the_other_servers_of_its_chat_from_the_server(folder):
    nodes = Nodes(folder, "n1", "n2")
    for number, house in enumerate(nodes.values()):
        name, here = house.cluster.name, house.hub.nodes[house.cluster.name]
        for other in nodes.values():
            other.hub.nodes[name] = here._replace(address=f"127.0.0.1:{7001 + number}")
    one = nodes["n1"]
    come(one, "alice")
    tokens = "\n".join(ask(one, "alice", "VERSION"))
    assert "chat.py/NODES=127.0.0.1:7001,127.0.0.1:7002 " in tokens
    core = chat.ClientCore(chat.Outbox(), "alice")
    core.server.ours = True
    core.server.tokens["chat.py/NODES"] = "127.0.0.1:7001,127.0.0.1:7002,x y,"
    link = types.SimpleNamespace(core=core, tried=0, phase=chat.ONLINE)
    link.target = chat.Target("127.0.0.1", 7001)
    link.choices = collections.deque([link.target])
    assert chat.Link._next_choice(link) and link.target.port == 7002
    link.phase = chat.CONNECTING
    assert not chat.Link._next_choice(link) and link.target.port == 7001


class Witness(Guest):
    """A user on a good line, who hears everything."""

    def __init__(self, address):
        super().__init__(address)
        self.enter_irc("witness", "JOIN #lobby")

    def heard(self, last):
        """Until that was said: what was said, and everything else that was seen."""
        lines = [line for line in self.until(f" :{last}") if " PRIVMSG " in line or "!" in line]
        said = [line.rstrip().split(" :", 1)[1] for line in lines if " PRIVMSG " in line]
        return said, [line for line in lines if " PRIVMSG " not in line]


def receives(process, last):
    """Return what a piped client prints, until it prints that or time is over."""
    lines = []
    alarm = threading.Timer(6 * PATIENCE, process.kill)
    alarm.daemon = True
    alarm.start()
    for line in process.stdout:
        lines.append(line.decode().rstrip("\n").removeprefix("> "))
        if lines[-1] == last:
            alarm.cancel()
            return lines
    raise AssertionError(f"ended before {last}: {lines[-3:]}")


def numbered(count):
    return [f"line {n}" for n in range(count)]


def exactly_once(address, through, count=LINES_SAID, meanwhile=lambda: None, **options):
    """alice says numbered lines, bob and a witness hear each of them once and in order."""
    witness = Witness(address)
    with piped("bob", through, **options) as bob, piped("alice", through, **options) as alice:
        for _ in ("alice", "bob"):
            witness.until(" JOIN ")
        alice.stdin.write("".join(f"{line}\n" for line in numbered(count)).encode())
        alice.stdin.close()
        meanwhile()
        lines = receives(bob, f"alice: line {count - 1}")
        assert [x for x in lines if x.startswith("alice: ")] == [
            f"alice: {line}" for line in numbered(count)
        ]
        assert alice.wait(60) == 0
        said, others = witness.heard(f"line {count - 1}")
        assert said == numbered(count)
        assert others == [], "a user saw the line break"
    witness.close()


@pytest.mark.parametrize("run", FAULTS)
def test_connections_that_are_reset_at_random_lose_and_double_nothing(running, seeded, run):
    server = running()
    with Proxy(server.address, seeded, 2_000, 20_000) as proxy:
        exactly_once(server.address, proxy.where)
        assert proxy.resets > LINES_SAID / 30


@pytest.mark.parametrize("piece, nagle", [(64, True), (1024, False), (65536, True)])
def test_a_client_makes_progress_over_connections_that_carry_only_a_few_kilobytes(
    running, seeded, piece, nagle
):
    """Counted from the welcome on, because registration costs two of them already."""
    server = running()
    options = {"after": b" 001 ", "piece": piece, "nagle": nagle}
    with Proxy(server.address, seeded, 2_000, min(20_000, 60 * LINES_SAID), **options) as proxy:
        exactly_once(server.address, proxy.where)
        assert proxy.resets > LINES_SAID / 50


@pytest.mark.parametrize("run", FAULTS)
def test_a_server_that_is_killed_five_times_loses_and_doubles_nothing(folder, seeded, run):
    """kill -9 and a new start on the same data, while many lines are being said."""
    sixth = LINES_SAID // 6
    arguments = ("--data", folder / "srv", "--flood", "off")
    with contextlib.ExitStack() as stack:
        process, address = stack.enter_context(serving(*arguments))
        listen = chat.address_text(*address)
        proxy = stack.enter_context(Proxy(address, rate=60_000))
        bob = stack.enter_context(piped("bob", proxy.where, folder / "bob"))
        assert bob.stdout.readline().startswith(b"connected")
        alice = stack.enter_context(piped("alice", proxy.where, folder / "alice"))
        assert "alice" in bob.stdout.readline().decode()
        alice.stdin.write("".join(f"{line}\n" for line in numbered(LINES_SAID)).encode())
        alice.stdin.close()
        heard = []
        for kill in range(5):
            heard += receives(bob, f"alice: line {kill * sixth + seeded.randrange(sixth)}")
            process.kill()
            process.wait(PATIENCE)
            process = stack.enter_context(program("server", "--listen", listen, *arguments))
            assert process.stdout.readline()
        heard += receives(bob, f"alice: line {LINES_SAID - 1}")
        assert alice.wait(60) == 0
        said = [line.partition(": ")[2] for line in heard if line.startswith("alice: ")]
        assert said == numbered(LINES_SAID)
        assert not [line for line in heard if "left" in line or "joined" in line]


def test_a_network_that_swallows_everything_is_noticed_and_left(running):
    server = running()
    with Proxy(server.address) as proxy:
        exactly_once(server.address, proxy.where, 2 * LINES_SAID, proxy.swallow, silent=0.6)


def test_a_slow_line_with_a_long_delay_carries_everything(running):
    server = running()
    with Proxy(server.address, latency=0.05, rate=20_000) as proxy:
        exactly_once(server.address, proxy.where, 1000 if RUNS else 10)


def test_what_waits_when_a_client_is_killed_is_said_by_the_next_one(running, folder):
    server = running()
    witness = Witness(server.address)
    with Proxy(server.address) as proxy:
        with piped("alice", proxy.where, folder, silent=100) as alice:
            alice.stdin.write(b"before\n")
            alice.stdin.flush()
            witness.until(":before")
            proxy.swallow()
            alice.stdin.write("".join(f"{line}\n" for line in numbered(LINES_SAID)).encode())
            alice.stdin.flush()
            data = folder / "chat.py" / "client"
            while f"line {LINES_SAID - 1}" not in waiting_in(data):
                assert alice.poll() is None
            alice.kill()
            alice.wait(PATIENCE)
        with piped("alice", proxy.where, folder) as again:
            again.stdin.close()
            assert again.wait(PATIENCE) == 0
    assert waiting_in(data) == []
    said, _ = witness.heard(f"line {LINES_SAID - 1}")
    assert said == numbered(LINES_SAID)
    witness.close()


# Files, sent and saved


SIZES = [(0, "0 B"), (999, "999 B"), (1024, "1 KB"), (1536, "1.5 KB"), (2_000_000, "1.9 MB")]


@pytest.mark.parametrize(("size", "text"), SIZES)
def test_sizes_are_told_as_people_tell_them(size, text):
    assert chat.size_text(size) == text


FILE_TAGS = [
    (f"/files/{'a' * 32},image/png,2048,640,480", "picture, 2 KB, 640\u00d7480"),
    (f"/files/{'a' * 32},application/pdf,10,0,0", "application/pdf, 10 B"),
    (f"/files/{'a' * 31},image/png,2048,640,480", None),
    (f"http://x/files/{'a' * 32},image/png,1,1,1", None),
    (f"/files/{'a' * 32},image/png,2048,640", None),
    (f"/files/{'a' * 32},image/png,-1,1,1", None),
    (f"/files/{'a' * 32},\x1b[31m,1,1,1", None),
    (f"/files/{'a' * 32},image/png,{'9' * 40},1,1", None),
    ("", None),
]


@pytest.mark.parametrize(("tag", "words"), FILE_TAGS)
def test_files_in_messages_are_told_in_words_and_nonsense_is_not(tag, words):
    file = chat.parse_file_tag(tag)
    assert (file and file.words()) == words


ANSWERS = [  # what a server sends, whether to HEAD, status and body
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", False, (200, b"hi")),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", True, (200, b"")),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 X\r\n\r\n", False, (204, b"")),
    (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 0, (200, b"hi")),
    (b"HTTP/1.0 200 OK\n\nto the end", False, (200, b"to the end")),
    (b"SSH-2.0-x\r\n\r\n", False, None),
    (b"HTTP/1.1 999 X\r\n\r\n", False, None),
    (b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", False, None),
    (b"x" * 20_000, False, None),
]


@pytest.mark.parametrize(("data", "bodiless", "wanted"), ANSWERS)
@pytest.mark.parametrize("size", [1, 100_000])
def test_answers_of_web_servers_are_read_however_they_are_cut(data, bodiless, wanted, size):
    reader, items = chat.ResponseReader(bodiless), []
    for n in range(0, len(data), size):
        reader.feed(data[n : n + size])
        while (item := reader.take()) is not None:
            items.append(item)
    reader.finish()
    while (item := reader.take()) is not None:
        items.append(item)
    if wanted is None:
        assert isinstance(items[-1], chat.BadRequest)
    else:
        head, *pieces, end = items
        assert (head.status, b"".join(pieces), end) == (*wanted, chat.END_OF_BODY)


class Sender(Linked):
    """A client of a server that keeps files, with files of its own."""

    def __init__(self, where, folder, store=None, name="alice"):
        super().__init__(chat.parse_target(where))
        self.close()
        self.loop, self.views, self.ended = chat.Loop(), [], []
        secret = hashlib.sha256(name.encode()).hexdigest()[:32]  # as its outbox's file keeps it
        self.core = chat.ClientCore(name, store=store, outbox=chat.Outbox(secret=secret))
        target = chat.parse_target(where)
        self.link = chat.Link(self.loop, target, self.core, self.views.extend, self.ended.append)
        self.transfers = chat.Transfers(self.link, folder)
        self.link.start()
        self.until(lambda: self.core.ready and self.core.room and self.core.room.inside)

    def typed(self, text):
        self.link.typed(text)

    def posted(self):
        return [view for view in self.core.room.views if "/files/" in view.text and view.id]


def send_and_save(server, where, folder, body):
    """Send a file from one client, and save it by another; return what was posted."""
    (folder / "tea time.bin").write_bytes(body)
    alice = Sender(where, folder)
    alice.typed(f"/send {folder / 'tea time.bin'}")
    alice.until(alice.posted)
    (posted,) = alice.posted()
    bob = Sender(where, folder, name="bob")
    bob.until(bob.posted)
    fetched = []
    path = chat.parse_file_tag(bob.posted()[0].file).path
    for count, most in enumerate((len(body), len(body) - 1), 1):
        bob.link.transfers.fetch(path, most, lambda *result: fetched.append(result))
        bob.until(lambda count=count: len(fetched) == count)
    for content, why in fetched:  # a line that breaks gives nothing
        assert (content, why) == (body, "") or (content == b"" and why)
    assert fetched[1][0] == b""
    bob.typed("/save here.bin")
    bob.until(lambda: bob.noted("saved"))
    assert (folder / "here.bin").read_bytes() == body and not bob.core.transfers
    assert not list(folder.glob("*.part")) and not alice.core.transfers
    alice.close()
    bob.close()
    return posted


def test_a_connection_that_has_broken_has_no_address_and_raises_nothing():
    listener = socket.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(listener.getsockname())
    with listener, sock:
        assert chat.peer_address(sock) == listener.getsockname()
        peer, _ = listener.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # a reset
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)
        assert chat.peer_address(sock) is None


def test_a_file_is_sent_from_one_client_and_saved_by_another(running, tmp_path):
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv")
    body = os.urandom(700_000)
    posted = send_and_save(server, chat.address_text(*server.address), tmp_path, body)
    about = "tea time.bin (application/octet-stream, 684 KB)"
    assert posted.text.startswith(f"{about}: http://127.0.0.1:")
    file = chat.parse_file_tag(posted.file)
    assert (file.type, file.size) == ("application/octet-stream", 700_000)


def test_files_arrive_over_a_line_that_breaks_again_and_again(
    running, seeded, tmp_path, monkeypatch
):
    monkeypatch.setattr(chat, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(chat, "WATCH_SECONDS", 0.05)
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv")
    with Proxy(server.address, seeded, 300_000, 1_200_000, piece=65_536) as proxy:
        send_and_save(server, proxy.where, tmp_path, os.urandom(3_000_000))
        assert proxy.resets >= 3


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_file_that_is_cut_ten_times_is_carried_about_once(
    running, seeded, tmp_path, monkeypatch, way
):
    monkeypatch.setattr(chat, "BACKOFF_FIRST", 0.02)  # which grows only without progress
    monkeypatch.setattr(chat, "WATCH_SECONDS", 0.05)
    (tmp_path / "srv").mkdir()
    server, body, given = running(data=tmp_path / "srv"), os.urandom(5_000_000), []
    (tmp_path / "tea.bin").write_bytes(body)
    bury = chat.WebCall._bury

    def buried(call, reason):
        given.append(call.at - call.request.at - call.unsent)
        bury(call, reason)

    monkeypatch.setattr(chat.WebCall, "_bury", buried)
    with Proxy(server.address, seeded, 200_000, 600_000, rate=20e6, piece=8_192, cuts=10) as proxy:
        direct = chat.address_text(*server.address)
        alice = Sender(proxy.where if way == "up" else direct, tmp_path)
        alice.typed(f"/send {tmp_path / 'tea.bin'}")
        alice.until(alice.posted)
        assert sum(given) <= 1.5 * len(body)  # to the kernel, where a break loses what waits
        bob = Sender(direct if way == "up" else proxy.where, tmp_path, name="bob")
        bob.until(bob.posted)
        bob.typed("/save here.bin")
        bob.until(lambda: bob.noted("saved"))
        assert (tmp_path / "here.bin").read_bytes() == body and proxy.resets >= 20
        assert proxy.carried[way] <= 1.2 * len(body)
        alice.close()
        bob.close()


def test_pictures_that_are_fetched_and_files_of_the_user_do_not_wait_for_each_other(
    running, tmp_path, monkeypatch
):
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv")
    alice, fetched = Sender(chat.address_text(*server.address), tmp_path), []
    (tmp_path / "tea.bin").write_bytes(b"tea" * 100)
    alice.typed(f"/send {tmp_path / 'tea.bin'}")
    alice.until(lambda: alice.posted() and alice.posted()[0].file)
    path = chat.parse_file_tag(alice.posted()[0].file).path
    gate, opens = threading.Event(), chat.FileFolder.open
    monkeypatch.setattr(chat.FileFolder, "open", lambda *a: gate.wait(PATIENCE) and opens(*a))
    for _ in range(chat.TRANSFERS_AT_ONCE):
        alice.transfers.fetch(path, 300, lambda *result: fetched.append(result))
    alice.typed(f"/send {tmp_path / 'tea.bin'}")
    alice.until(lambda: len(alice.posted()) == 2)
    assert not fetched
    gate.set()
    alice.until(lambda: len(fetched) == chat.TRANSFERS_AT_ONCE)
    fetched.clear()
    with monkeypatch.context() as patch:
        patch.setattr(chat.WebCall, "more", chat.do_nothing)  # no piece is sent
        (tmp_path / "milk.bin").write_bytes(b"milk")
        for _ in range(chat.TRANSFERS_AT_ONCE + 1):
            alice.typed(f"/send {tmp_path / 'milk.bin'}")
        alice.until(lambda: sum(one.state == "running" for one in alice.core.transfers) >= 2)
        alice.transfers.fetch(path, 300, lambda *result: fetched.append(result))
        alice.until(lambda: fetched)
    states = sorted(one.state for one in alice.core.transfers)
    assert fetched == [(b"tea" * 100, "")] and states == ["running", "running", "waiting"]
    alice.transfers.fetch(f"/files/{'0' * 32}", 300, lambda *result: fetched.append(result))
    alice.until(lambda: len(fetched) == 2)
    assert fetched[1] == (b"", chat.NO_SUCH_FILE)
    alice.close()


def test_an_upload_goes_on_after_the_client_was_ended_and_is_posted_once(running, tmp_path):
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv")
    where, db = chat.address_text(*server.address), str(tmp_path / "client.db")
    body = os.urandom(5_000_000)
    (tmp_path / "big").write_bytes(body)
    store = chat.ClientStore(chat.open_client_database(db), where, "alice")
    alice = Sender(where, tmp_path, store)
    alice.typed(f"/send {tmp_path / 'big'}")
    alice.until(lambda: alice.core.transfers and alice.core.transfers[0].done > 500_000)
    alice.close()
    store.db.close()
    store = chat.ClientStore(chat.open_client_database(db), where, "alice")
    again = Sender(where, tmp_path, store)
    again.until(again.posted)
    assert len(again.posted()) == 1 and again.core.store.transfers() == []
    (file,) = server.server.hub.files.values()
    assert file.sha == hashlib.sha256(body).hexdigest()
    again.close()


def test_what_cannot_be_sent_or_saved_is_told_with_the_reason(running, tmp_path):
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv", file_max=1000)
    alice = Sender(chat.address_text(*server.address), tmp_path)
    (tmp_path / "big").write_bytes(bytes(2000))
    for text, words in (
        (f"/send {tmp_path}", "is no file"),
        (f"/send {tmp_path / 'none'}", "is no file"),
        ("/save", "no message here tells of such a file"),
        ("/transfers what", "it goes like this"),
    ):
        alice.typed(text)
        assert alice.noted(words), alice.views
    alice.typed(f"/send {tmp_path / 'big'}")
    alice.until(lambda: alice.noted("big was not sent: a file has at most 1,000 bytes"))
    assert not alice.core.transfers
    alice.typed("/transfers")
    assert alice.noted("no file is on its way")
    alice.close()
    plain = running()  # keeps no files
    bob = Sender(chat.address_text(*plain.address), tmp_path, name="bob")
    bob.typed(f"/send {tmp_path / 'big'}")
    bob.until(lambda: bob.noted("this server takes no files"))
    bob.close()


def test_a_transfer_can_be_dropped(running, tmp_path):
    (tmp_path / "srv").mkdir()
    server = running(data=tmp_path / "srv")
    (tmp_path / "big").write_bytes(bytes(3_000_000))
    alice = Sender(chat.address_text(*server.address), tmp_path)
    alice.typed(f"/send {tmp_path / 'big'}")
    alice.typed("/transfers")
    assert alice.noted("1  sending big")
    alice.typed("/transfers cancel 1")
    assert not alice.core.transfers and not alice.transfers.calls
    alice.close()


# ======================================================================================
# THE WINDOW
# ======================================================================================


def texts_of(pieces):
    return "".join(pieces[::2])


def tags_of(pieces, text):
    return next(
        tags for piece, tags in zip(pieces[::2], pieces[1::2], strict=True) if piece == text
    )


def said(text, name="bob", **more):
    return chat.View(chat.SAID, text, name, **more)


EIGHT = int(datetime.datetime(2026, 11, 22, 8, 5).timestamp() * 1000)
SUNDAY = "Sunday, 22 November 2026\n"


def sheet_of(*views, read_time=0, **more):
    """A sheet with these views, all drawn; and its pieces."""
    sheet = gui_client.Sheet()
    rows = [view if isinstance(view, gui_client.Row) else gui_client.Row(view) for view in views]
    sheet.reset(1, rows, read_time, **more)
    return sheet, sheet.draw_before(len(rows))


@pytest.mark.parametrize(
    "view, text",
    [
        (said("hello", time=EIGHT), "bob  08:05\nhello\n"),
        (said("one\n two", time=EIGHT), "bob  08:05\none\n two\n"),
        (chat.View(chat.NOTICED, "psst", "bob", time=EIGHT), "-bob-  08:05\npsst\n"),
        (chat.View(chat.CAME, name="carol", time=EIGHT), "08:05\t\u2192 carol joined\n"),
        (chat.View(chat.WENT, "Quit", "carol", time=EIGHT), "08:05\t\u2190 carol left\n"),
        (chat.View(chat.WENT, "bye", "carol", time=EIGHT), "08:05\t\u2190 carol left (bye)\n"),
        (chat.View(chat.MOVED, "a, b joined", time=EIGHT), "08:05\t\u21c4 a, b joined\n"),
        (chat.View(chat.TOLD, "no such command", time=EIGHT), "08:05\tno such command\n"),
    ],
)
def test_each_kind_of_view_reads_as_it_should_in_the_window(view, text):
    assert texts_of(sheet_of(view)[1]) == SUNDAY + text


def test_messages_of_one_speaker_stand_under_one_name_for_five_minutes():
    late = gui_client.GROUP_SECONDS * 1000
    reply = gui_client.Row(said("an answer", time=EIGHT + 3), answers=("carol", "a question"))
    _, pieces = sheet_of(
        said("one", time=EIGHT),
        said("two", time=EIGHT + 1),
        said("three", "carol", time=EIGHT + 2),
        said("four", time=EIGHT + 2),
        reply,
        said("five", time=EIGHT + 3 + late),
        said("tomorrow", time=EIGHT + 86_400_000),
        said("a year that no calendar has", time=10**18),
    )
    text = texts_of(pieces)
    assert text.startswith(
        f"{SUNDAY}bob  08:05\none\ntwo\ncarol  08:05\nthree\nbob  08:05\nfour\n"
        "bob  08:05\n\u21b3 carol: a question\nan answer\nbob  08:10\nfive\n"
        "Monday, 23 November 2026\nbob  08:05\ntomorrow\n"
    )
    assert f"{datetime.date.today():%A}" in text


def test_the_new_line_stands_before_the_first_message_that_was_not_read():
    views = [
        said("read", time=EIGHT),
        said("mine", "alice", mine=True, time=EIGHT + 1000),
        chat.View(chat.CAME, name="carol", time=EIGHT + 1500),
        said("unread", time=EIGHT + 2000),
    ]
    _, pieces = sheet_of(*views, read_time=EIGHT)
    assert "joined\n\nnew\nbob  08:05\nunread\n" in texts_of(pieces)
    assert "new\n" not in texts_of(sheet_of(*views)[1])  # nothing is known of what was read
    sheet, _ = sheet_of(*views[:1], read_time=EIGHT)
    sheet.append([gui_client.Row(views[3])], seen=True)
    assert sheet.marked is None
    later = [gui_client.Row(said(f"{n}", time=EIGHT + 3000 + n)) for n in range(3)]
    sheet.append(later, seen=False)
    assert sheet.marked == later[0].key and sheet.unseen
    sheet.seen(EIGHT + 3002)
    last = gui_client.Row(said("last", time=EIGHT + 4000))
    assert sheet.append([last], seen=False) == 2  # the row that loses the line
    assert sheet.marked == last.key


@pytest.mark.parametrize("seed", range(20))
def test_lines_are_counted_right_whatever_happens_to_rows(seed):
    """The widget's text, edited as the sheet says, is what the sheet would draw at once."""
    chance, lines, count = random.Random(seed), [], itertools.count()
    sheet = gui_client.Sheet()
    sheet.reset(1, [], 0)

    def row(**more):
        n = next(count)
        text = "\n".join(chance.choice(("a", "bb", "")) for _ in range(chance.randint(1, 3)))
        view = said(text, chance.choice(("bob", "carol")), time=EIGHT + n, own_id=f"own{n}", **more)
        state = chance.choice(("", gui_client.FAILED))
        return gui_client.Row(view, state, "why", state != "", (("x", ("bob",)),) * (n % 2))

    def put(line, old, pieces):
        lines[line - 1 : line - 1 + old] = texts_of(pieces).split("\n")[:-1]

    for _ in range(60):
        act = chance.choice(("append", "prepend", "draw", "change", "trim"))
        if act == "append":
            number = len(sheet.rows)
            lost = sheet.append([row() for _ in range(chance.randint(1, 3))], chance.random() < 0.5)
            if sheet.is_drawn(lost):
                put(*sheet.redraw(lost))
            put(len(lines) + 1, 0, sheet.draw_from(number))
        elif act == "prepend":
            older = [row() for _ in range(2)]
            sheet.rows[:0], sheet.first = older, sheet.first + 2
        elif act == "draw" and sheet.first:
            head = sheet.first
            put(1, 0, sheet.draw_before(chance.randint(1, 4)))
            if sheet.is_drawn(head):
                put(*sheet.redraw(head))
        elif act == "change" and sheet.rows:
            number = chance.randrange(len(sheet.rows))
            sheet.rows[number] = sheet.rows[number]._replace(state="", reason="")
            if sheet.is_drawn(number):
                put(*sheet.redraw(number))
        elif act == "trim" and len(sheet.rows) > 4:
            del lines[: sheet.trim(2)]
    drawn = [texts_of(sheet.draw(n)) for n in range(sheet.first, len(sheet.rows))]
    # The first one was drawn below others, which went, and has no head then.
    assert [text.count("\n") for text in drawn][1:] == sheet.sizes[1:]
    assert len(lines) == sum(sheet.sizes)
    for number in range(sheet.first, len(sheet.rows)):
        line = sheet.line_of(number)
        assert sheet.row_at(line) == number
        words = sheet.rows[number].view.text.split("\n")
        size = sheet.sizes[number - sheet.first]
        assert "\n".join(words) in "\n".join(lines[line - 1 : line - 1 + size])


@pytest.mark.parametrize(
    "text, called",
    [
        ("alice: hello", True),
        ("thanks, ALICE!", True),
        ("malice", False),
        ("alices", False),
        ("absent", False),
        ("(alice)", True),
    ],
)
def test_a_mention_is_a_whole_word_in_any_case(text, called):
    assert chat.calls(text, "Alice") is called


@pytest.mark.parametrize("called", [False, True])
def test_a_message_for_the_user_stands_out(called):
    _, pieces = sheet_of(said("hello", called=called))
    assert ("mention" in tags_of(pieces, "hello")) is called


@pytest.mark.parametrize(
    "text, links",
    [
        ("see https://example.org/a?b=c#d.", ["https://example.org/a?b=c#d"]),
        ("(http://a.example) and HTTP://b", ["http://a.example", "HTTP://b"]),
        ("<https://a.example/x>, https://b.example!", ["https://a.example/x", "https://b.example"]),
        ("www.example.org/x, www. and www.", ["www.example.org/x"]),
        ("https://", []),
        ("javascript:alert(1) file:///etc/passwd", []),
    ],
)
def test_links_are_found_and_nothing_else_is_one(text, links):
    pieces = gui_client.linked(text, "row")
    assert texts_of(pieces) == text
    assert [p for p, tags in zip(pieces[::2], pieces[1::2], strict=True) if "link" in tags] == links


def test_a_failed_message_says_why_and_offers_a_retry_only_where_there_is_one():
    for parked in (False, True):
        row = gui_client.Row(said("hi", mine=True), gui_client.FAILED, "no such channel", parked)
        text = texts_of(sheet_of(row)[1])
        assert "not sent: no such channel" in text
        assert ("Retry" in text) is ("Cancel" in text) is parked
    row = gui_client.Row(said("hi", mine=True), gui_client.PENDING)
    assert gui_client.PENDING in tags_of(sheet_of(row)[1], "hi")


def test_reactions_stand_below_a_message_with_their_numbers():
    row = gui_client.Row(said("hi"), reactions=(("\U0001f44d", ("bob", "alice")), ("x", ("bob",))))
    sheet, _ = sheet_of(row)
    sheet.me = "alice"
    pieces = sheet.draw(0)
    assert "own-reaction" in tags_of(pieces, " \U0001f44d 2 ")
    assert "own-reaction" not in tags_of(pieces, " x 1 ")


def test_a_text_of_any_length_can_be_read_whole_and_no_line_is_too_long_for_tk():
    text = "x" * 5000 + "\n" + "y\n" * 30
    sheet, pieces = sheet_of(said(text, time=EIGHT))
    assert "show all of it: 32 lines, 5,061 characters" in texts_of(pieces)
    assert len(texts_of(pieces)) < gui_client.TEXT_SHOWN + 200
    sheet.expanded.add(sheet.rows[0].key)
    shown = texts_of(sheet.draw(0)).removeprefix(f"{SUNDAY}bob  08:05\n")
    shown = shown.removesuffix("show less\n")
    assert shown.replace("\n", "") == text.replace("\n", "")
    assert max(map(len, shown.split("\n"))) <= gui_client.LINE_SHOWN


def test_the_title_and_the_status_line_say_how_things_stand():
    server = gui_client.Server(1, "here:1", "alice", ready=True)
    room = gui_client.RoomInfo(1, 1, "#tea")
    assert (
        gui_client.title_text(server, room, 2) == "(2) #tea \u2013 alice \u2013 here:1 \u2013 chat"
    )
    assert gui_client.title_text(None, None, 0) == "chat"
    assert gui_client.status_text(server, 0) == "connected to here:1 as alice"
    broken = server._replace(
        ready=False, retry_at=14.2, status="here:1: refused; trying again in 9 s"
    )
    assert gui_client.status_text(broken, 10.0) == "here:1: refused; trying again in 4 s"
    assert gui_client.status_text(None, 0) == "not connected"
    assert gui_client.waiting_text(server._replace(waiting=2, parked=1)) == (
        "2 messages waiting, 1 not sent"
    )


def test_the_last_names_and_servers_are_remembered_in_a_private_file(tmp_path):
    memory = gui_client.Remembered(tmp_path)
    assert memory.load() == ("", "") and memory.recent() == []
    memory.save("alice", "here:1")
    memory.save("bob", "there:2")
    memory.save("carol", "here:1")
    memory = gui_client.Remembered(tmp_path)
    assert memory.load() == ("carol", "here:1")
    assert memory.recent() == [["carol", "here:1"], ["bob", "there:2"]]
    for damage in ([1, ["a"]], 3, {"a": "b"}, None):
        memory.write("recent", damage)
        memory.write("look", [damage])
        assert memory.load() == ("", "") and memory.recent() == [] and memory.words("look") == {}
    gui_client.Remembered(None).save("alice", "here:1")


def test_what_the_window_remembered_in_a_file_is_taken_over_once(tmp_path):
    path = tmp_path / "window.json"
    kept = {"name": "alice", "recent": [["alice", "here:1"]], "look": {"geometry": "9x9+1+1"}}
    path.write_text(json.dumps(kept))
    for _ in range(2):
        memory = gui_client.Remembered(tmp_path)
        assert memory.load() == ("alice", "here:1")
        assert memory.words("look") == {"geometry": "9x9+1+1"}
        assert not path.exists()
    path.write_text("{ damaged")
    assert gui_client.Remembered(tmp_path).load() == ("alice", "here:1") and path.exists()


@pytest.mark.parametrize(
    "style, text",
    [("%H:%M", "08:05"), ("", "\u2013"), ("%H\n%M", "08 05"), ("\0", "\u2013"), ("%", "%")],
)
def test_times_are_shown_as_the_user_wants_them_whatever_that_is(style, text):
    moment = datetime.datetime(2026, 11, 22, 8, 5)
    assert gui_client.clock_text(moment, style) in (text, "08:05")


def test_a_window_is_put_where_the_screen_is():
    fit = gui_client.fitting_geometry
    assert fit("800x600+10+20", 1000, 700) == "800x600+10+20"
    assert fit("2000x600+900+500", 1000, 700) == "1000x600+0+100"
    assert fit("800x600+-50+-20", 1000, 700) == "800x600+0+0"
    assert fit("nonsense", 1000, 700) == fit("", 1000, 700) == ""


@pytest.mark.parametrize(
    "text, seen",
    [
        ("שלום", "םולש"),
        ("שלום alice, 42 (תה)", "(הת) alice, 42 םולש"),
        ("hello שלום world", "hello םולש world"),
        ("a (שלום) b", "a (םולש) b"),
        ("מחיר: 42.50 ₪", "₪ 42.50 :ריחמ"),
        ("בְּ א", "א בְּ"),  # marks stay with their letter
        ("مرحبا", "\ufe8e\ufe92\ufea3\ufeae\ufee3"),  # letters are joined
        ("لا", "\ufefb"),  # one sign for lam with alef
        ("plain (text)", "plain (text)"),
    ],
)
def test_text_from_right_to_left_is_drawn_in_the_order_in_which_it_is_seen(text, seen):
    assert gui_client.seen_line(text, int(gui_client.is_rtl(text))) == seen


def test_a_line_from_right_to_left_is_broken_before_it_is_turned():
    style = gui_client.Style(fits=lambda part: len(part) <= 9)
    pieces = gui_client.line_pieces("אבג דהו זחט\nend", style, "said")
    assert texts_of(pieces) == "והד גבא\nטחז\nend\n"
    assert [("rtl" in tags) for tags in pieces[1::4]] == [True, True, False]
    sheet, _ = sheet_of(said("אבג דהו זחט", time=EIGHT))
    sheet.style = style
    assert texts_of(sheet.draw(0)).count("\n") == 4


def test_emoji_have_names():
    assert gui_client.emoji_for("tea")[0][0] == "\U0001f375"
    assert ("\U0001f44d", "thumbsup") in gui_client.emoji_for("thumbsu")
    assert gui_client.emoji_for("no such thing") == []
    assert len(gui_client.emoji_for("a")) == gui_client.EMOJI_OFFERED


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_words_of_others_are_no_part_of_a_command_line(system):
    evil = "$(touch x); `id` <b> \"'"
    command, more = gui_client.notice_command(evil, evil, system)
    assert command[0] in ("notify-send", "osascript", "powershell")
    if system == "win32":
        assert not any("touch" in word for word in command) and more["CHAT_TEXT"] == evil
    else:
        assert command[-2] == evil and "touch" in command[-1]
        assert command.index("--" if system == "linux" else "end run") < len(command) - 2


def test_members_are_in_order_of_rank_and_say_whether_they_are_there():
    people = [
        chat.Person("zoe"),
        chat.Person("bob", "+"),
        chat.Person("amy", away=True),
        chat.Person("op", "@+"),
        chat.Person("robot", bot=True),
    ]
    shown = [
        gui_client.member_text(one, "zoe") for one in sorted(people, key=gui_client.member_order)
    ]
    assert shown == ["@op", "+bob", "amy (away)", "robot (bot)", "zoe (you)"]


@pytest.fixture(scope="session")
def display():
    """A virtual screen for all the tests that need one."""
    if not shutil.which("Xvfb"):
        assert "CHAT_NEEDS_DISPLAY" not in os.environ, "Xvfb is not installed"
        pytest.skip("Xvfb is not installed")
    ours, theirs = os.pipe()
    command = ["Xvfb", "-displayfd", str(theirs), "-screen", "0", "1000x700x24"]
    with subprocess.Popen(command, pass_fds=[theirs], stderr=subprocess.DEVNULL) as server:
        os.close(theirs)
        with os.fdopen(ours) as reader, pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISPLAY", f":{reader.readline().strip()}")
            patch.setattr(gui_client, "system_is_dark", lambda: False)
            yield
        server.terminate()


@pytest.fixture
def quick(monkeypatch):
    """Servers greet a silent client at once: a window listens first."""
    monkeypatch.setattr(chat, "GREETING_SECONDS", 0.02)


@pytest.fixture
def window(display, quick):
    """Open windows; they are closed at the end."""
    opened = []

    def open_window(server="", name="alice", **more):
        if isinstance(server, tuple):
            server = chat.address_text(*server)
        opened.append(gui_client.Window(gui_client.WindowOptions(name, server, **more)))
        opened[-1].begin()
        return opened[-1]

    yield open_window
    for one in opened:
        one.close()
        pump(one, lambda one=one: one.gone)
    opened.clear()
    gc.collect()  # on this thread: Tk aborts when its objects are freed on another
    gc.enable()


def pump(window, condition):
    """Let Tk work until the condition holds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, transcript(window)
        timer = window.root.after(5, chat.do_nothing)  # something to look again after
        window.root.tk.dooneevent(0)
        window.root.tk.call("after", "cancel", timer)


def transcript(window):
    return window.transcript.text.get("1.0", "end")


def see(window, text):
    pump(window, lambda: text in transcript(window))


def is_ready(window):
    return window.server is not None and window.server.ready


def at_home(window):
    """Connected, on the screen, and looking at a conversation."""
    pump(window, lambda: is_ready(window) and window.room is not None and here(window))
    pump(window, lambda: window.compose.winfo_width() > 1)
    return window


def enter(window, text):
    """Typed and sent, in the field that people type in."""
    window.compose.set(text)
    window.compose.submit()


def go(window, name):
    """Look at the conversation of this name."""
    pump(window, lambda: any(room.name == name for room in window.sidebar.rooms.values()))
    window.look_at(next(n for n, room in window.sidebar.rooms.items() if room.name == name))
    pump(window, lambda: window.room and window.room.name == name)


def join(window, name):
    enter(window, f"/join {name}")
    pump(window, lambda: window.room and window.room.name == name and window.room.inside)


def press(window, key, widget=None):
    """A key, for the widget that has the focus or gets it."""
    widget = widget or window.compose
    widget.focus_force()
    window.root.update()
    widget.event_generate(f"<{key}>")
    window.root.update_idletasks()


def focus(window, on):
    """Have the window believe that it has the keys, or not, whatever the screen says."""
    gui_client.Window._focus(window, on)
    window._focus = chat.do_nothing


def sidebar(window):
    """Texts of the sidebar's rows, with their counts."""
    tree = window.sidebar.tree
    rows = [row for server in tree.get_children() for row in tree.get_children(server)]
    return [
        " ".join(filter(None, (tree.item(row, "text"), *map(str, tree.item(row, "values")))))
        for row in rows
    ]


def here(window):
    return sorted(window.people.rows)


def tagger(server, name, *lines):
    """A guest over IRC that can react, reply and take back."""
    guest = Guest(server.address)
    caps = "message-tags echo-message draft/message-redaction server-time"
    guest.send(f"CAP REQ :{caps}\r\nCAP END\r\n")
    guest.enter_irc(name, *lines)
    return guest


def id_in(line):
    return re.search("msgid=([^; ]+)", line)[1]


def test_garbage_with_widgets_in_it_is_freed_on_the_windows_own_thread(
    running, window, monkeypatch
):
    monkeypatch.setattr(gui_client, "COLLECT_MS", 50)
    monkeypatch.setattr(gui_client, "COLLECTIONS", 1)
    alice, freed = at_home(window(running().address)), []
    picture = gui_client.tk.PhotoImage(master=alice.root, width=1, height=1)
    picture.itself = picture  # so that only the collector frees it
    weakref.finalize(picture, lambda: freed.append(threading.current_thread()))
    del picture
    done = threading.Event()

    def litter():
        for _ in range(100):
            cycles = [[] for _ in range(2000)]
            for one in cycles:
                one.append(one)
        done.set()

    alice.engine.submit(litter)
    assert done.wait(PATIENCE) and freed == []
    pump(alice, lambda: freed)
    assert freed == [threading.main_thread()]


def test_a_long_line_in_the_field_is_laid_out_in_no_time_and_a_longer_paste_is_offered_in_parts(
    running, window, monkeypatch
):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    field = alice.compose
    monkeypatch.setattr(field, "selection_get", lambda selection: "word " * 8_000)
    began = time.process_time()
    field._paste("CLIPBOARD")
    for _ in range(10):
        field.insert("insert", "x")
        field.fit()
        field._recall("up", "linestart", "1.0")
    assert time.process_time() - began < 2.0
    assert int(field.cget("height")) == field.MOST_LINES
    lines = [f"line {n}, as long as what people paste" for n in range(2_000)]
    monkeypatch.setattr(field, "selection_get", lambda selection: "\n".join(lines))
    before = field.content
    field._paste("CLIPBOARD")
    assert field.content == before
    assert "too long to be pasted" in alice.banner.label.cget("text")
    button, _ = alice.banner.buttons.winfo_children()
    assert re.fullmatch(r"Send it as \d+ messages", button.cget("text"))
    button.invoke()
    pump(alice, lambda: alice.server.waiting == 0 and alice.transcript.sheet.rows[-1].state == "")
    assert bob.until(lines[-1])[-len(lines) :] == [f"alice: {line}" for line in lines]
    assert field.content == before and not alice.banner.shown


def test_a_long_draft_does_not_delay_the_start(window):
    alice = window(name="")
    began = time.process_time()
    alice.compose.open("word " * 8_000)
    alice.root.update()
    assert time.process_time() - began < 2.0


def test_a_paste_of_several_lines_shows_what_will_be_sent(running, window):
    alice = at_home(window(running().address))
    alice.root.clipboard_clear()
    alice.root.clipboard_append("one\ntwo\nthree")
    alice.compose.event_generate("<<Paste>>")
    assert alice.banner.label.cget("text") == "3 lines: sent as 1 message"
    show, one_line, _ = alice.banner.buttons.winfo_children()
    show.invoke()
    assert "one\ntwo\nthree" in alice.panel.text.get("1.0", "end")
    one_line.invoke()
    assert alice.compose.content == "one two three" and not alice.banner.shown


def test_a_message_that_was_taken_back_is_not_in_the_window_any_more(running, window):
    server = running()
    guest = tagger(server, "bob", "JOIN #lobby")
    alice = at_home(window(server.address))
    pump(alice, lambda: here(alice) == ["alice", "bob"])
    guest.send("PRIVMSG #lobby :first\r\nPRIVMSG #lobby :a secret\r\nPRIVMSG #lobby :last\r\n")
    line = guest.until("a secret")[-1]
    see(alice, "last\n")
    guest.send(f"REDACT #lobby {id_in(line)}\r\n")
    see(alice, "bob took back a message")
    assert "secret" not in transcript(alice) and "first\n" in transcript(alice)
    enter(alice, "never mind")
    pump(alice, lambda: alice.transcript.sheet.rows[-1].view.id)
    alice.act_on("redact", alice.transcript.sheet.rows[-1])
    see(alice, "alice took back a message")
    assert "never mind" not in transcript(alice)
    sizes = alice.transcript.sheet.sizes
    assert sum(sizes) == transcript(alice).count("\n") - 1


def test_a_refused_text_disturbs_none_that_is_being_written(running, window):
    alice = at_home(window(running().address))
    alice.compose.set("half a thought")
    alice.compose.give_back("refused words")
    assert alice.compose.content == "half a thought"
    alice.compose.set("")
    alice.compose.give_back("refused words")
    assert alice.compose.content == "refused words"
    long = "login " + "secret words " * 1000
    enter(alice, long.strip())
    see(alice, "nothing was sent: is that /login?")
    assert alice.compose.content == long.strip()


def test_a_window_says_why_it_cannot_connect_and_where_it_is_not(running, window, folder):
    alice = window("127.0.0.1:1")
    see(alice, "127.0.0.1:1: connection refused")
    pump(alice, lambda: "trying again in" in alice.status.cget("text"))
    blocked = folder / "file"
    blocked.write_text("")
    other = window(running().address, state=blocked / "state", config=blocked)
    assert other.card.shown and "--no-state" in other.card.error.cget("text")
    server = running()
    third = at_home(window(server.address, name="third"))
    boss = Guest(server.address)
    boss.enter_irc("boss", "JOIN #t")
    join(third, "#t")
    boss.until("third")
    boss.send("KICK #t third :out\r\n")
    pump(third, lambda: third.place_label.cget("text") == "#t (you are not in it)")


def test_without_tk_there_is_one_line_that_says_what_to_do(folder):
    (folder / "tkinter.py").write_text("raise ImportError('none here')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, gui_client.__file__, "alice"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"python3-tk" in done.stderr


def test_a_window_and_a_peer_talk_and_each_sees_who_is_here(running, window):
    server = running()
    bob = server.guest("bob")
    alice = window(server.address)
    pump(alice, lambda: is_ready(alice) and here(alice) == ["alice", "bob"])
    where = chat.address_text(*server.address)
    assert alice.status.cget("text") == f"connected to {where} as alice"
    bob.send("hello 🙂 https://a.example/x\n")
    see(alice, "\nhello 🙂 https://a.example/x\n")
    link = alice.transcript.text.search("a.example", "1.0")
    assert alice.transcript.link_at(link) == "https://a.example/x"
    assert alice.transcript.link_at("1.0") == ""
    enter(alice, "good morning 🙂🙃")
    assert bob.until("🙃")[-1] == "alice: good morning 🙂🙃"
    enter(alice, "three\n  lines\n🏁")
    assert bob.lines(3) == ["alice: three", "alice:   lines", "alice: 🏁"]
    see(alice, "three\n  lines\n🏁\n")
    carol = server.guest("carol")
    pump(alice, lambda: here(alice) == ["alice", "bob", "carol"])
    carol.send("hi\n")
    see(alice, "hi\n")
    carol.send("/quit\n")
    see(alice, "\u2190 carol left\n")
    pump(alice, lambda: here(alice) == ["alice", "bob"])


def test_a_private_message_is_a_conversation_of_its_own_and_rings(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    pump(alice, lambda: here(alice) == ["alice", "bob"])
    rung = []
    alice.root.bell = lambda: rung.append(1)
    alice.compose.set("half a thought")
    alice.people.tree.selection_set("mbob")
    press(alice, "Return", alice.people.tree)
    pump(alice, lambda: alice.room.name == "bob")
    assert alice.compose.content == ""
    enter(alice, "are you there?")
    assert bob.until("(private)")[-1] == "(private) alice: are you there?"
    go(alice, "#lobby")
    assert alice.compose.content == "half a thought"
    focus(alice, False)
    bob.send("/tell alice I am\n")
    pump(alice, lambda: "bob @1" in sidebar(alice) and rung)
    assert alice.root.title().startswith("(1) #lobby")
    go(alice, "bob")
    see(alice, "new\nbob")
    focus(alice, True)
    pump(alice, lambda: alice.root.title().startswith("bob"))
    alice.do("mute", alice.here, True)
    pump(alice, lambda: alice.room.muted)
    focus(alice, False)
    rung.clear()
    bob.send("/tell alice once more\n")
    pump(alice, lambda: alice.room.unread == 1)
    assert not rung and not alice.root.title().startswith("(1)")


def test_the_field_keeps_drafts_completes_and_survives_emoji(running, window):
    alice = at_home(window(running().address))
    field = alice.compose
    for text in ("first 🙂", "second\nof two"):
        enter(alice, text)
    field.focus_force()
    alice.root.update()
    field.insert("insert", "a draft 🎂")
    seen = []
    for key in ("Up", "Up", "Up", "Up", "Down", "Down", "Down", "Down"):
        field.event_generate(f"<{key}>")
        field.update_idletasks()
        seen.append(field.content)
    assert seen[0] == "second\nof two" and "first 🙂" in seen and seen[-1] == "a draft 🎂"
    field.set("/na")
    field.event_generate("<Tab>")
    assert field.content == "/names "
    field.set("\ud83d\ude42 \ud83d lone")
    assert field.content in ("🙂  lone", "🙂 \ufffd lone")
    alice.root.clipboard_clear()
    alice.root.clipboard_append("pasted")
    field.set("old")
    field.tag_add("sel", "1.0", "end-1c")
    field.event_generate("<<Paste>>")
    assert field.content == "pasted"
    alice.ask()
    alice.root.update()
    alice.root.clipboard_append("\nand 🙂\n")
    alice.card.name.event_generate("<<Paste>>")
    assert alice.card.name.content == "pasted and 🙂"  # in place of the name
    alice.card.hide()
    press(alice, "Key-x", alice.transcript.text)
    assert field.content == "pastedx"


def test_names_channels_commands_and_emoji_are_completed(running, window):
    server = running()
    for name in ("bert", "bob", "Bill"):
        server.guest(name)
    alice = at_home(window(server.address, name="bruno"))
    pump(alice, lambda: len(here(alice)) == 4)
    for guest in server.guests[::2]:
        guest.send("hi\n")
    pump(alice, lambda: transcript(alice).count("hi\n") == 2)
    last = alice.transcript.sheet.speakers()
    assert alice.complete("b", True) == [*(f"{name}: " for name in last), "bob: "]
    assert alice.complete("BO", False) == ["bob "]
    assert alice.complete("#l", False) == ["#lobby "]
    assert alice.complete("/na", True) == ["/names "]
    assert alice.complete(":tea", False)[0] == "🍵 "
    alice.compose.editor.before = "/set ti"
    assert alice.complete("ti", False) == ["time "]


def test_a_list_offers_commands_and_emoji_while_they_are_typed(running, window):
    alice = at_home(window(running().address))
    field, offers = alice.compose, alice.compose.offers
    field.focus_force()
    alice.root.update()

    def type_in(text):
        for c in text:
            field.event_generate("<Key>", keysym={"/": "slash", ":": "colon"}.get(c, c))
        alice.root.update()

    type_in("/to")
    assert offers.shown and offers.words == ["/topic "]
    field.event_generate("<Tab>")
    assert field.content == "/topic " and not offers.shown
    field.set("")
    type_in("/n")
    first, second = offers.words[:2]
    field.event_generate("<Down>")
    field.event_generate("<Down>")
    field.event_generate("<Return>")
    assert field.content == second != first
    field.set("")
    type_in(":tea")
    assert offers.words[0] == "🍵 "
    press(alice, "Escape")
    assert not offers.shown and field.content == ":tea"


def test_a_window_comes_back_when_its_server_does_and_sends_what_was_typed_meanwhile(
    running, window, monkeypatch
):
    monkeypatch.setattr(chat, "BACKOFF_FIRST", 0.1)
    first = Running()  # stopped here, and not by the fixture
    alice = at_home(window(first.address))
    first.stop()
    pump(alice, lambda: "trying again" in alice.status.cget("text"))
    pump(alice, lambda: here(alice) == [])
    enter(alice, "is anyone there?")
    pump(alice, lambda: alice.waiting.cget("text") == "1 message waiting")
    row = alice.transcript.sheet.rows[-1]
    assert row.state == gui_client.PENDING
    second = running(listen=(first.address,))
    pump(alice, lambda: is_ready(alice) and alice.waiting.cget("text") == "")
    pump(alice, lambda: alice.transcript.sheet.find_row(row) is not None)
    number = alice.transcript.sheet.find_row(row)
    pump(alice, lambda: alice.transcript.sheet.rows[number].state == "")
    second.guest("bob").send("yes\n")
    see(alice, "yes\n")
    assert transcript(alice).count("is anyone there?\n") == 1


def test_a_message_that_cannot_be_sent_is_retried_or_dropped_by_a_click(running, window):
    server = running()
    boss = Guest(server.address)
    boss.enter_irc("boss", "JOIN #t")
    alice = at_home(window(server.address))
    join(alice, "#t")
    boss.send("KICK #t alice :out\r\n")
    pump(alice, lambda: not alice.room.inside)
    for text in ("first", "second"):
        enter(alice, text)
    pump(alice, lambda: transcript(alice).count("not sent: you are not in #t") == 2)
    text = alice.transcript.text

    def click(word):
        alice.root.update()
        text.see(text.search(word, "1.0"))
        alice.root.update()
        x, y, *_ = text.bbox(f"{text.search(word, '1.0')} + 1 chars")
        text.event_generate("<Button-1>", x=x + 1, y=y + 1)
        text.event_generate("<ButtonRelease-1>", x=x + 1, y=y + 1)

    click("Cancel")
    pump(alice, lambda: transcript(alice).count("not sent:") == 1)
    assert "first" not in transcript(alice)
    click("Retry")
    assert boss.until("second")[-1].endswith("PRIVMSG #t :second\r")
    pump(alice, lambda: "not sent:" not in transcript(alice) and alice.server.waiting == 0)


def test_whatever_is_wrong_with_an_address_is_said_and_another_can_be_tried(running, window):
    alice = window("ftp://127.0.0.1:6667", name="alice")
    assert alice.card.shown and "is not a server's address" in alice.card.error.cget("text")
    alice.card.server.set("nonsense://")
    alice.card.enter()
    assert "is not a server's address" in alice.card.error.cget("text")
    first = running()
    alice.card.server.set(chat.address_text(*first.address))
    alice.card.name.set("")
    alice.card.enter()
    assert alice.card.error.cget("text") == "please choose a name"
    alice.card.name.set("alice 🙂")
    alice.card.enter()
    pump(alice, lambda: here(alice) == ["alice_🙂"])
    assert not alice.card.shown


def test_a_window_talks_on_several_servers_at_once(running, window, folder):
    servers = [running(), running()]
    bobs = [server.guest(f"bob{n}") for n, server in enumerate(servers)]
    names = [chat.address_text(*server.address) for server in servers]
    state = {"state": folder, "config": folder}
    alice = at_home(window(servers[0].address, **state))
    alice.ask()
    assert alice.card.server.content == names[0]
    alice.card.server.set(names[1])
    alice.card.name.set("alison")
    alice.card.enter()
    pump(alice, lambda: len(alice.servers) == 2 and all(one.ready for one in alice.servers))
    pump(alice, lambda: alice.server.address == names[1])
    join(alice, "#lobby")
    enter(alice, "hello there")
    assert bobs[1].until("hello")[-1] == "alison: hello there"
    bobs[0].send("alice: are you here?\n")
    pump(alice, lambda: sidebar(alice) == ["#lobby @1", "#lobby"])
    press(alice, "Alt-Key-1")
    see(alice, "are you here?")
    assert alice.server.address == names[0] and here(alice) == ["alice", "bob0"]
    enter(alice, "I am")
    assert bobs[0].until("I am")[-1] == "alice: I am"
    alice.close()
    pump(alice, lambda: alice.gone)
    again = window(servers[0].address, **state)
    pump(again, lambda: [one.nick for one in again.servers if one.ready] == ["alice", "alison"])
    enter(again, "/disconnect")
    pump(again, lambda: len(again.servers) == 1)


def test_the_password_of_one_server_is_not_given_to_another(window):
    alice = window("chats://127.0.0.1:1", name="", password="secret", plain=True)
    assert alice.card.shown
    for address, password in {
        "chats://127.0.0.1:1": "secret",
        "chat://127.0.0.1:1": "",  # the same, but in the clear
        "127.0.0.1:1": "",
        "chats://127.0.0.1:2": "",
        "chats://localhost:1": "",
    }.items():
        assert alice._client_options("alice", address).password == password, address


def test_a_draft_belongs_to_its_conversation_and_outlives_the_window(running, window, folder):
    server = running()
    state = {"state": folder, "config": folder}
    alice = at_home(window(server.address, **state))
    join(alice, "#tea")
    alice.compose.insert("end", "milk or")
    alice.root.update()
    go(alice, "#lobby")
    assert alice.compose.content == "" and "\u270e #tea" in sidebar(alice)
    alice.compose.insert("end", "half a")
    alice.root.update()
    store = alice.engine.core.store.db
    pump(alice, lambda: ("half a",) in store.execute("SELECT draft FROM rooms").fetchall())
    alice.compose.insert("end", " thought")
    alice.close()
    pump(alice, lambda: alice.gone)
    again = at_home(window(server.address, **state))
    drafts = {}
    for name in ("#tea", "#lobby"):
        go(again, name)
        drafts[name] = again.compose.content
    assert drafts == {"#tea": "milk or", "#lobby": "half a thought"}


def test_text_goes_to_the_conversation_in_which_it_was_entered(running, window):
    server = running()
    alice = at_home(window(server.address))
    join(alice, "#tea")
    go(alice, "#lobby")
    tea = next(n for n, room in alice.sidebar.rooms.items() if room.name == "#tea")
    alice.look_at(tea)  # the click is on its way to the engine, and the window shows #lobby
    enter(alice, "for the lobby")
    pump(alice, lambda: alice.room.name == "#tea")
    enter(alice, "for tea")
    see(alice, "for tea")
    assert "for the lobby" not in transcript(alice)
    go(alice, "#lobby")
    see(alice, "for the lobby")


def test_older_messages_come_from_memory_and_from_the_server_without_a_jump(running, window):
    server = running()
    bob = server.guest("bob")
    bob.send("".join(f"message {n}\n" for n in range(700)))
    alice = at_home(window(server.address))
    see(alice, "message 699\n")
    text, sheet = alice.transcript.text, alice.transcript.sheet
    pump(alice, lambda: alice.transcript.at_bottom)
    for _ in range(300):
        if "message 0\n" in transcript(alice):
            break
        top = next(re.finditer(r"message \d+\n", text.get("@0,0", "end")))[0]
        text.yview_scroll(-5, "units")
        alice.root.update()
        before = [row.view.text for row in sheet.rows]
        pump(alice, lambda: not alice.transcript.waiting_older)
        shown = text.get("@0,0", "end")
        if before and [row.view.text for row in sheet.rows] != before:
            assert top in shown  # it is still in sight, or below
    see(alice, "message 0\n")
    said = [row.view.text for row in sheet.rows if row.view.kind == chat.SAID]
    assert said == [f"message {n}" for n in range(700)]
    bob.send("below\n")
    pump(alice, lambda: alice.transcript.below.cget("text") == "1 new below \u2193")
    press(alice, "Escape")
    alice.root.update()
    assert alice.transcript.at_bottom and not alice.transcript.below.place_info()


def test_a_window_opens_at_the_newest_message(running, window):
    server = running()
    bob = server.guest("bob")
    bob.send("".join(f"message {n} {'and more ' * 20}\n" for n in range(300)))
    for _ in range(3):
        alice = at_home(window(server.address))
        see(alice, "message 299")
        alice.root.update()
        assert alice.transcript.at_bottom and alice.transcript.text.yview()[1] == 1.0
        alice.close()


def test_messages_are_answered_reacted_to_and_typing_is_shown(running, window):
    server = running()
    bob = tagger(server, "bob", "JOIN #lobby")
    alice = at_home(window(server.address))
    pump(alice, lambda: here(alice) == ["alice", "bob"])
    bob.send("PRIVMSG #lobby :tea or coffee?\r\n")
    question = id_in(bob.until("coffee")[-1])
    see(alice, "coffee?\n")
    press(alice, "Alt-r")
    assert alice.banner.label.cget("text") == "Reply to bob: tea or coffee?"
    enter(alice, "tea")
    line = bob.until("PRIVMSG #lobby")[-1]
    assert f"+draft/reply={question}" in line
    see(alice, "\u21b3 bob: tea or coffee?\ntea\n")
    assert not alice.banner.shown
    bob.send(f"@+draft/react=\U0001f44d;+draft/reply={id_in(line)} TAGMSG #lobby\r\n")
    see(alice, " \U0001f44d 1 ")
    row = alice.transcript.sheet.rows[-1]
    alice.act_on("react \U0001f44d", row)
    see(alice, " \U0001f44d 2 ")
    alice.act_on("react \U0001f44d", alice.transcript.sheet.rows[-1])
    see(alice, " \U0001f44d 1 ")
    bob.send("@+typing=active TAGMSG #lobby\r\n")
    pump(alice, lambda: alice.typing_label.cget("text") == "bob is typing\u2026")
    press(alice, "Key-h")
    alice.root.update()
    assert "+typing=active" in bob.until("typing")[-1]


def test_what_was_said_is_found_and_shown_among_what_was_said_around_it(running, window, folder):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address, state=folder, config=folder))
    bob.send("".join(f"message {n}{' needle' * (n == 20)}\n" for n in range(400)))
    see(alice, "message 399\n")
    press(alice, "Control-f")
    assert alice.panes.is_shown("panel")
    alice.panel.field.set("needle")
    press(alice, "Return", alice.panel.field)
    pump(alice, lambda: len(alice.panel.rows) == 1)
    press(alice, "Down", alice.panel.field)
    press(alice, "Return", alice.panel.text)
    pump(alice, lambda: not alice.transcript.at_bottom)
    text = alice.transcript.text
    found = text.get(*text.tag_ranges("found")[:2])
    assert found.endswith("message 20 needle\n") and "message 19\n" in transcript(alice)
    for _ in range(30):  # down to the present, by the rows between
        press(alice, "Next")
        alice.root.update()
        pump(alice, lambda: not alice.transcript.waiting_after)
    see(alice, "message 399\n")
    assert not alice.transcript.sheet.past
    press(alice, "Escape")
    press(alice, "Escape")
    pump(alice, lambda: alice.transcript.at_bottom)
    enter(alice, "/help topic")
    pump(alice, lambda: "/topic" in alice.panel.text.get("1.0", "end"))
    assert "/topic" not in transcript(alice)


def test_a_message_of_long_ago_is_read_among_its_neighbours_up_and_down(running, window, folder):
    state = {"state": folder, "config": folder}
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address, **state))
    bob.send("".join(f"message {n}{' needle' * (n == 300)}\n" for n in range(700)))
    see(alice, "message 699\n")
    alice.close()
    pump(alice, lambda: alice.gone)
    alice = at_home(window(server.address, **state))
    see(alice, "message 699\n")
    transcript_, sheet = alice.transcript, alice.transcript.sheet
    alice.search("needle", False)
    pump(alice, lambda: alice.panel.rows)
    alice.panel.jump(*alice.panel.rows[0][::2])
    pump(alice, lambda: sheet.past)
    see(alice, "message 300 needle\n")
    bob.send("meanwhile\n")
    assert transcript_.below.cget("text").startswith("Back to the present")
    for key, last in (("Prior", "message 150\n"), ("Next", "meanwhile\n")):
        for _ in range(200):
            if last in transcript(alice):
                break
            press(alice, key)
            alice.root.update()
            pump(alice, lambda: not (transcript_.waiting_older or transcript_.waiting_after))
        see(alice, last)
        said = [row.view.text for row in sheet.rows if row.view.text.startswith("message")]
        first = int(said[0].split()[1])
        assert [text.split()[1] for text in said] == [str(first + n) for n in range(len(said))]
    while sheet.past:
        press(alice, "Next")
        pump(alice, lambda: not transcript_.waiting_after)
    assert transcript_.at_bottom


def test_the_window_is_used_with_the_keyboard_alone(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    for name in ("#one", "#two"):
        join(alice, name)
    assert sidebar(alice) == ["#lobby", "#one", "#two"]
    press(alice, "Alt-Key-1")
    pump(alice, lambda: alice.room.name == "#lobby")
    press(alice, "Alt-Down")
    pump(alice, lambda: alice.room.name == "#one")
    press(alice, "Alt-Shift-Down")
    assert sidebar(alice) == ["#lobby", "#two", "#one"]
    bob.send("alice: hello\n")
    pump(alice, lambda: alice.sidebar.rooms[alice.sidebar.all_rooms()[0]].called == 1)
    press(alice, "Alt-a")
    pump(alice, lambda: alice.room.name == "#lobby")
    press(alice, "Control-k")
    assert alice.switcher.shown
    alice.switcher.field.set("tw")
    alice.root.update()
    press(alice, "Return", alice.switcher.field)
    pump(alice, lambda: alice.room.name == "#two")
    assert not alice.switcher.shown
    parts = []
    for _ in range(4):
        press(alice, "F6", alice.root.focus_get())
        alice.root.update()
        parts.append(alice.root.focus_get())
    tree, text, people = alice.sidebar.tree, alice.transcript.text, alice.people.tree
    assert parts == [tree, text, people, alice.compose]
    press(alice, "F9")
    assert not alice.panes.is_shown("members")
    press(alice, "Control-w")
    pump(alice, lambda: len(sidebar(alice)) == 2)


def test_the_look_follows_the_settings(running, window, folder):
    server = running()
    state = {"state": folder, "config": folder}
    alice = at_home(window(server.address, **state))
    enter(alice, "/set theme dark")
    pump(alice, lambda: alice.look.colours is gui_client.DARK)
    assert alice.transcript.text.cget("background") == gui_client.DARK.paper
    size = alice.look.size
    press(alice, "Control-plus")
    pump(alice, lambda: alice.look.size == size + 1)
    alice.open_settings()
    assert alice.settings.fields["theme"].get() == "dark"
    assert alice.settings.fields["size"].content == str(size + 1)
    alice.settings.fields["time"].set("%H:%M:%S")
    alice.settings.done()
    pump(alice, lambda: alice.transcript.sheet.style.clock == "%H:%M:%S")
    alice.close()
    pump(alice, lambda: alice.gone)
    again = at_home(window(server.address, **state))
    assert again.look.colours is gui_client.DARK and again.look.size == size + 1


def test_a_certificate_that_is_not_trusted_is_a_question(running, window, certificate):
    server = running(tls_cert=certificate)
    where = chat.address_text(*server.address)
    alice = window(f"chats://{where}")
    pump(alice, lambda: alice.certificate.shown)
    assert re.search(r"([0-9a-f]{2} ){15}", alice.certificate.print.cget("text"))
    alice.certificate.trust.invoke()
    pump(alice, lambda: is_ready(alice))
    assert not alice.certificate.shown
    other = window(f"chats://{where}", name="other")
    pump(other, lambda: other.certificate.shown)
    other.certificate.leave.invoke()
    pump(other, lambda: other.card.shown and other.engine is None)


def test_tab_goes_through_the_card_from_top_to_bottom(window):
    alice = window(name="")
    card, tops = alice.card, []
    alice.root.update()
    widget = card.name
    while widget.winfo_rooty() not in tops and len(tops) < 20:
        tops.append(widget.winfo_rooty())
        widget = widget.tk_focusNext()
        if widget.master not in (card.body, card.buttons):
            break
    assert len(tops) >= 7 and tops == sorted(tops)


def test_an_account_is_registered_and_logged_in_to_and_a_server_given_its_password(running, window):
    server = running(password="sesame")
    alice = window(server.address, name="")
    where = chat.address_text(*server.address)

    def fill(password, secret, register):
        alice.card.name.set("alice")
        alice.card.server.set(where)
        alice.card.password.insert(0, password)
        alice.card.secret.insert(0, secret)
        alice.card.register.set(register)
        alice.card.go.invoke()

    fill("sesame", "a good secret", True)
    see(alice, "You are now logged in as alice")
    assert alice.card.password.get() == alice.card.secret.get() == ""
    alice.close()
    pump(alice, lambda: alice.gone)
    alice = window(server.address, name="")
    fill("sesame", "a good secret", False)
    see(alice, "logged in as alice")


def test_no_text_is_lost_when_a_conversation_or_the_engine_goes(running, window):
    server = running()
    alice = at_home(window(server.address))
    join(alice, "#tea")
    alice.compose.insert("end", "half a thought")
    alice.do("close", alice.here)
    pump(alice, lambda: alice.room.name == "#lobby")
    press(alice, "Up")
    assert alice.compose.content == "half a thought"
    alice.compose.set("")
    engine = alice.engine
    engine.submit(engine.over, "it has ended")
    until = time.monotonic() + PATIENCE
    while engine.alive:  # Tk does not know yet
        enter(alice, "too late?")
        assert time.monotonic() < until
    pump(alice, lambda: alice.engine is None)
    held = [alice.compose.content, *alice.compose.editor.typed]
    assert "too late?" in held
    assert "your text is kept" in alice.card.error.cget("text") or "ended" in (
        alice.card.error.cget("text")
    )


def test_conversations_are_put_in_another_order_with_the_mouse(running, window, folder):
    state = {"state": folder, "config": folder}
    server = running()
    alice = at_home(window(server.address, **state))
    for name in ("#one", "#two"):
        join(alice, name)
    tree = alice.sidebar.tree
    alice.root.update()
    boxes = [tree.bbox(f"r{number}") for number in alice.sidebar.all_rooms()]
    (x, top, _, high), (_, bottom, *_) = boxes[0], boxes[2]
    tree.event_generate("<Button-1>", x=x + 5, y=bottom + high // 2)
    for y in range(bottom, top, -high // 2):
        tree.event_generate("<B1-Motion>", x=x + 5, y=y)
    tree.event_generate("<B1-Motion>", x=x + 5, y=top + high // 2)
    tree.event_generate("<ButtonRelease-1>", x=x + 5, y=top + high // 2)
    assert sidebar(alice) == ["#two", "#lobby", "#one"]
    alice.close()
    pump(alice, lambda: alice.gone)
    again = at_home(window(server.address, **state))
    pump(again, lambda: sidebar(again) == ["#two", "#lobby", "#one"])


def test_what_was_not_read_is_marked_also_after_a_restart(running, window, folder):
    server = running()
    bob = server.guest("bob")
    state = {"state": folder, "config": folder}
    alice = at_home(window(server.address, **state))
    focus(alice, True)
    bob.send("this was read\n")
    see(alice, "this was read")
    pump(alice, lambda: alice.room.unread == 0 and not alice.transcript.sheet.unseen)
    alice.close()
    pump(alice, lambda: alice.gone)
    bob.send("this was not\n")
    again = at_home(window(server.address, **state))
    see(again, "this was not")
    pump(again, lambda: "new\n" in transcript(again))
    assert transcript(again).index("this was read") < transcript(again).index("new\n")
    assert transcript(again).index("new\n") < transcript(again).index("this was not")


def test_each_conversation_keeps_the_place_where_the_user_reads(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    join(alice, "#tea")
    go(alice, "#lobby")
    bob.send("".join(f"message {n}\n" for n in range(200)))
    see(alice, "message 199\n")
    text = alice.transcript.text
    alice.root.update()
    text.yview("100.0")
    alice.root.update()
    top = text.get("@0,0", "@0,0 lineend")
    go(alice, "#tea")
    bob.send("meanwhile\n")
    go(alice, "#lobby")
    see(alice, "meanwhile\n")
    alice.root.update()
    assert text.get("@0,0", "@0,0 lineend") == top and not alice.transcript.at_bottom


def test_searches_are_narrowed_to_a_user_a_conversation_and_links(running, window, folder):
    server = running()
    alice = at_home(window(server.address, state=folder, config=folder))
    for name in ("bob", "carol"):
        server.guest(name).send("tea is ready\nhttps://tea.example/\n")
    pump(alice, lambda: transcript(alice).count("tea.example") == 2)
    for words, count in (
        ("tea", 4),
        ("tea from:bob", 2),
        ("from:carol", 2),
        ("tea has:link", 2),
        ("ready in:#lobby from:BOB", 1),
        ("ready in:#nowhere", 0),
    ):
        alice.panel.title.configure(text="")
        alice.search(words, True)
        pump(alice, lambda: alice.panel.title.cget("text"))
        assert len(alice.panel.rows) == count, words


def test_a_messages_menu_is_reached_by_the_keyboard(running, window):
    server = running()
    bob = tagger(server, "bob", "JOIN #lobby")
    alice = at_home(window(server.address))
    pump(alice, lambda: here(alice) == ["alice", "bob"])
    bob.send("PRIVMSG #lobby :see www.example.org\r\nPRIVMSG #lobby :and this\r\n")
    see(alice, "and this\n")
    text = alice.transcript.text
    for _ in range(2):
        press(alice, "Up", text)
    assert alice.transcript.chosen_row.view.text == "see www.example.org"
    press(alice, "Shift-F10", text)
    menu = next(one for one in alice.transcript.winfo_children() if one.winfo_class() == "Menu")
    labels = [
        menu.entrycget(n, "label")
        for n in range(menu.index("end") + 1)
        if menu.type(n) != "separator"
    ]
    assert labels == [
        *("Reply", "React", "Copy text", "Open https://www.example.org"),
        *("Write to bob", "Ignore bob"),
    ]
    menu.invoke(labels.index("Reply"))
    menu.unpost()
    assert alice.banner.label.cget("text") == "Reply to bob: see www.example.org"
    press(alice, "Escape")
    assert alice.reply is None


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_sends_nonsense_does_not_stop_the_window(window, caplog, seed):
    """Lines of all kinds with parameters of any other; then the connection breaks."""
    chance = random.Random(seed)
    names = ("alice", "bob", "\u6f22" * 32, "#lobby", "#", "", "*", ":", "a b", "\u202e", "@+bob")
    verbs = (
        *("PRIVMSG", "NOTICE", "JOIN", "PART", "QUIT", "NICK", "TOPIC", "KICK", "MODE", "TAGMSG"),
        *("REDACT", "BATCH", "MARKREAD", "AWAY", "ACCOUNT", "CAP", "FAIL", "NOTE", "ERRO", "PONG"),
        *("001", "005", "332", "353", "366", "352", "315", "433", "401", "473", "900", "999"),
    )
    tags = ("", "@time=9999-99-99 ", "@msgid=1;+typing=active ", "@batch=x ", "@+draft/react=\xff ")
    words = ("hi", "x" * 4000, "\x01ACTION\x01", "\x00\x07\x1b[2J", "\U0001f600" * 200, "=", "+o")

    def nonsense():
        source = f"{chance.choice(names)}!u@h"
        middle = [chance.choice(names + words[:1]) or "x" for _ in range(chance.randint(0, 4))]
        line = " ".join((chance.choice(verbs), *middle, f":{chance.choice(words)}"))
        return f"{chance.choice(tags)}:{source} {line}\r\n"

    def storm(peer):
        peer.sendall(b":s 001 alice :hi\r\n:alice!a@h JOIN #lobby\r\n")
        for _ in range(40):
            peer.sendall("".join(nonsense() for _ in range(10)).encode())
        peer.sendall(b":bob!b@h PRIVMSG #lobby :the last word\r\n")
        ended.wait(PATIENCE)

    def serve(listener):
        for act in (chat.do_nothing, storm):  # the first time it hangs up during the log-in
            with contextlib.suppress(OSError), listener.accept()[0] as peer:
                peer.sendall(b":s NOTICE * :hello\r\n")
                act(peer)

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        alice = window(listener.getsockname())
        pump(alice, lambda: "trying again" in alice.status.cget("text"))
        enter(alice, "/reconnect")
        kept = alice.sidebar.rooms
        pump(alice, lambda: any(room.name == "#lobby" for room in kept.values()))
        for number in alice.sidebar.all_rooms():
            alice.look_at(number)
            pump(alice, lambda n=number: alice.here == n or n not in kept)
        ended.set()
        thread.join(PATIENCE)
    alice.root.update()
    assert alice.engine is None or alice.engine.thread.is_alive()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_names_and_words_of_any_kind_are_shown_inert(running, window):
    server = running()
    bob = Guest(server.address)
    bob.enter_irc("\u6f22" * 10, "JOIN #lobby")
    alice = at_home(window(server.address))
    pump(alice, lambda: len(here(alice)) == 2)
    for text in (
        "\u05e9\u05dc\u05d5\u05dd",
        "a\tb\x07c\x1b[31md",
        "\U0001f468\u200d\U0001f469",
        "\u202eabc",
    ):
        bob.send(f"PRIVMSG #lobby :{text}\r\n")
    bob.send("PRIVMSG #lobby :done\r\n")
    see(alice, "done\n")
    shown = transcript(alice)
    assert gui_client.seen_line("\u05e9\u05dc\u05d5\u05dd", 1) in shown
    assert not set(shown) & {"\x07", "\x1b", "\u202e"}


def test_two_windows_with_one_name_are_told_apart_and_told_why(running, window):
    server = running()
    first = at_home(window(server.address))
    second = at_home(window(server.address))
    pump(second, lambda: second.server.nick != "alice")
    see(second, "alice")
    enter(second, f"I am {second.server.nick}")
    see(first, f"I am {second.server.nick}")


WINDOW_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import gui_client
from tkinter import READABLE
window = gui_client.Window(gui_client.WindowOptions("alice", sys.argv[2], state=sys.argv[3]))
def told(*_):
    act, _, text = sys.stdin.readline().rstrip("\\n").partition(" ")
    if act == "type":
        window.compose.insert("end", text)
    elif act == "enter":
        window.compose.set(text)
        window.compose.submit()
    print("ok", flush=True)
def look():
    if window.room and window.server.ready:
        print("ready", flush=True)
        window.root.createfilehandler(sys.stdin, READABLE, told)
    else:
        window.root.after(10, look)
window.begin()
look()
window.run()
"""


class WindowProgram:
    """A window in a process of its own, which types what it is told."""

    def __init__(self, address, state):
        program = WINDOW_PROGRAM.replace("state=sys.argv[3]", "state=pathlib.Path(sys.argv[3])")
        program = f"import pathlib{program}"
        where = chat.address_text(*address)
        command = [sys.executable, "-c", program, str(HERE), where, str(state)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def wait(self, answer):
        assert self.process.stdout.readline() == f"{answer}\n", self.process.stderr.read()

    def tell(self, act, text):
        self.process.stdin.write(f"{act} {text}\n")
        self.process.stdin.flush()
        self.wait("ok")

    def kill(self):
        self.process.kill()
        self.process.communicate()


def drafts_in(folder):
    with contextlib.closing(sqlite3.connect(folder / "client.db")) as db:
        return [draft for (draft,) in db.execute("SELECT draft FROM rooms")]


def stopped_by(chance, server):
    """Return the server; None if chance has stopped it."""
    if chance.random() >= 0.3:
        return server
    return server.stop()


def await_draft(folder, text):
    until = time.monotonic() + PATIENCE
    while not any(text in one for one in drafts_in(folder)):
        assert time.monotonic() < until


@pytest.mark.parametrize("seed", range(5 if THOROUGH else 1))
def test_nothing_that_was_typed_is_lost_whatever_is_killed(display, quick, folder, seed):
    """Kill the window and stop the server at random moments: each text is said once, or waits
    in the outbox, or is a draft."""
    chance, typed = random.Random(seed), []
    data = folder / "server"
    data.mkdir(mode=0o700)
    server = Running(data=data)
    address = server.address
    try:
        for n in range(3):
            program = WindowProgram(address, folder / "client")
            program.wait("ready")
            for m in range(chance.randint(1, 4)):
                server = server and stopped_by(chance, server)
                program.tell("enter", f"text {n}.{m} entered")
                typed.append(f"text {n}.{m} entered")
            program.tell("type", f"draft {n} of more")
            await_draft(folder / "client", f"draft {n}")
            program.kill()
            server = server or Running(data=data, listen=(address,))
        last = WindowProgram(address, folder / "client")
        last.wait("ready")
        reader = server.guest("reader")
        reader.send("/history #lobby 100\n/names\n")
        said = reader.until("* #lobby 1-")
        last.kill()
        waiting = waiting_in(folder / "client")
        for text in typed:
            times = sum(line.endswith(text) for line in said) + waiting.count(text)
            assert times == 1, (text, said, waiting)
        assert any(one.endswith("draft 2 of more") for one in drafts_in(folder / "client"))
    finally:
        if server:
            server.stop()


def test_a_window_whose_display_goes_ends_and_keeps_what_was_typed(running, quick, folder):
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed")
    ours, theirs = os.pipe()
    command = ["Xvfb", "-displayfd", str(theirs), "-screen", "0", "800x600x24"]
    with subprocess.Popen(command, pass_fds=[theirs], stderr=subprocess.DEVNULL) as screen:
        os.close(theirs)
        with os.fdopen(ours) as reader, pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISPLAY", f":{reader.readline().strip()}")
            program = WindowProgram(running().address, folder)
            program.wait("ready")
        program.tell("type", "half a thought")
        until = time.monotonic() + PATIENCE
        while "half a thought" not in drafts_in(folder):
            assert time.monotonic() < until
        screen.terminate()
        _, errors = program.process.communicate(timeout=PATIENCE)
    assert program.process.returncode != 0 and "Traceback" not in errors


def test_the_lines_of_the_protocol_are_shown_without_passwords(running, window):
    alice = at_home(window(running().address))
    enter(alice, "/register * verysecret")
    see(alice, "logged in as alice")
    alice.do("server", alice.server.number, "/raw")
    pump(alice, lambda: "Lines of" in alice.panel.title.cget("text"))
    shown = alice.panel.text.get("1.0", "end")
    assert "> NICK alice" in shown and "\n< " in shown and "> REGISTER * * \u2026" in shown
    assert "verysecret" not in shown


def test_a_text_that_was_typed_before_there_was_a_connection_stays(running, window):
    alice = window(name="")
    alice.card.hide()
    alice.compose.set("typed early")
    alice.compose.submit()
    assert alice.card.shown and "your text is kept" in alice.card.error.cget("text")
    alice.connect("alice", chat.address_text(*running().address))
    at_home(alice)
    assert alice.compose.content == "typed early"


def test_what_the_user_sees_is_not_counted_as_new(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    focus(alice, True)
    for n in range(20):
        bob.send(f"message {n}\n")
        see(alice, f"message {n}\n")
        assert sidebar(alice) == ["#lobby"] and not alice.root.title().startswith("(")


def test_a_long_message_is_shown_whole_by_a_click_and_new_ones_above_by_another(running, window):
    server = running()
    bob = Guest(server.address)
    bob.enter_irc("bob", "JOIN #lobby")
    alice = at_home(window(server.address))
    join(alice, "#tea")
    pump(alice, lambda: len(sidebar(alice)) == 2)
    for n in range(80):
        bob.send(f"PRIVMSG #lobby :message {n}\r\n")
    pump(alice, lambda: "#lobby 80" in sidebar(alice))
    go(alice, "#lobby")
    pump(alice, lambda: alice.transcript.above.place_info())
    alice.transcript.above.invoke()
    alice.root.update()
    text = alice.transcript.text
    assert "message 0\n" in text.get("@0,0", "@0,0 + 12 lines")
    press(alice, "Escape")
    enter(alice, "\n".join(f"line {n}" for n in range(60)))
    see(alice, "show all of it: ")
    assert "line 59" not in transcript(alice)
    alice.transcript.act("expand", alice.transcript.sheet.rows[-1])
    assert "line 59\nshow less\n" in transcript(alice)


def choose_in_menu(window, label):
    """Open the main menu, and take one of its entries."""
    window.menu_button.invoke()
    menu = next(one for one in window.root.winfo_children() if one.winfo_class() == "Menu")
    entries = range(menu.index("end") + 1)
    labels = {menu.entrycget(n, "label"): n for n in entries if menu.type(n) != "separator"}
    menu.unpost()
    menu.invoke(labels[label])


def test_the_main_menu_has_all_that_keys_have(running, window):
    alice = at_home(window(running().address))
    choose_in_menu(alice, "Join a channel \u2026")
    assert alice.ask_card.shown
    alice.ask_card.field.set("#tea")
    alice.ask_card.enter()
    pump(alice, lambda: alice.room.name == "#tea")
    choose_in_menu(alice, "Mute this conversation")
    pump(alice, lambda: alice.room.muted)
    choose_in_menu(alice, "Settings \u2026")
    assert alice.settings.shown


def test_the_desktop_is_told_of_calls_while_the_window_has_not_the_keys(
    running, window, monkeypatch
):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    told = []
    monkeypatch.setattr(alice.notices, "tell", lambda *words: told.append(words))
    focus(alice, False)
    bob.send("alice: look $(here)\n")
    pump(alice, lambda: told)
    assert told == [("bob in #lobby", "alice: look $(here)")]
    enter(alice, "/set desktop off")
    pump(alice, lambda: alice.values["desktop"] == "off")
    bob.send("alice: once more\n")
    see(alice, "once more")
    assert len(told) == 1


def test_a_page_is_cleared_and_comes_back_by_scrolling_up(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    bob.send("before\n")
    see(alice, "before\n")
    enter(alice, "/clear")
    pump(alice, lambda: "before" not in transcript(alice))
    bob.send("after\n")
    see(alice, "after\n")
    assert "before" not in transcript(alice)
    press(alice, "Prior")
    see(alice, "before\n")


def test_three_hundred_new_senders_leave_the_window_usable(window):
    def serve(listener):
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            peer.sendall(b":s NOTICE * :hello\r\n:s 001 alice :hi\r\n:alice!a@h JOIN #lobby\r\n")
            lines = [f":n{n}!u@h PRIVMSG alice :buy {n}\r\n" for n in range(300)]
            peer.sendall("".join(lines).encode())
            ended.wait(PATIENCE)

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        alice = window(listener.getsockname())
        pump(alice, lambda: any("n299 " in row for row in sidebar(alice)))
        assert len(sidebar(alice)) <= chat.ROOMS_KEPT
        assert alice.room.name == "#lobby"
        go(alice, "n299")
        see(alice, "buy 299\n")
        ended.set()


def test_what_waits_is_sent_by_the_next_engine_after_one_that_ended(running, window, folder):
    server = running()
    bob = server.guest("bob")
    state = {"state": folder, "config": folder}
    alice = at_home(window(server.address, **state))
    first, ids = alice.engine, []
    alice.engine.submit(
        lambda: ids.append(first.core.outbox.add(time.time(), "#lobby", "kept", ""))
    )
    alice.engine.submit(first.over, "a reason that needs the user")
    pump(alice, lambda: alice.card.shown and alice.engine is None)
    assert alice.card.error.cget("text") == "a reason that needs the user"
    alice.card.enter()
    assert bob.until("kept")[-1] == "alice: kept"
    at_home(alice)


@pytest.mark.parametrize("seed", range(10 if THOROUGH else 2))
def test_the_window_shows_what_the_core_has_after_whatever_happened(
    running, window, seed, monkeypatch
):
    for name, value in (("ROWS_KEPT", 60), ("ROWS_TRIMMED", 20), ("ROWS_MOST", 50)):
        monkeypatch.setattr(gui_client, name, value)
    monkeypatch.setattr(gui_client, "ROWS_DRAWN", 30)
    chance, server = random.Random(seed), running()
    bob = tagger(server, "bob", "JOIN #lobby", "JOIN #tea")
    alice = at_home(window(server.address))
    join(alice, "#tea")
    text, ids = alice.transcript.text, []
    for n in range(40):
        act = chance.choice(("say", "say", "burst", "redact", "react", "switch", "scroll", "enter"))
        where = chance.choice(("#lobby", "#tea"))
        if act == "say":
            bob.send(f"PRIVMSG {where} :words {n}\r\n")
            ids.append((where, id_in(bob.until(f"words {n}")[-1])))
        elif act == "burst":
            lines = [f"PRIVMSG {where} :burst {n}.{m}\r\n" for m in range(chance.randint(5, 50))]
            bob.send("".join(lines))
        elif act == "redact" and ids:
            bob.send("REDACT {} {}\r\n".format(*ids.pop(chance.randrange(len(ids)))))
        elif act == "react" and ids:
            there, id = chance.choice(ids)
            bob.send(f"@+draft/react=x;+draft/reply={id} TAGMSG {there}\r\n")
        elif act == "switch":
            alice.go_next(1)
        elif act == "scroll":
            text.yview_moveto(chance.choice((0, 0.5, 1)))
        elif act == "enter":
            enter(alice, f"mine {n}")
        alice.root.update()
    bob.send("PRIVMSG #lobby :the end\r\nPRIVMSG #tea :the end\r\n")
    for name in ("#lobby", "#tea"):
        go(alice, name)
        press(alice, "Escape")
        assert not alice.transcript.sheet.past
        see(alice, "the end\n")
        pump(alice, lambda: alice.server.waiting == 0)
        sheet, room = alice.transcript.sheet, alice.engine.core.find(name)
        pump(alice, lambda s=sheet, r=room: [row.view.text for row in s.rows] == [
            view.text for view in r.views
        ])  # fmt: skip
        shown = text.get("1.0", "end-1c").split("\n")
        drawn = [texts_of(sheet.draw(n)) for n in range(sheet.first, len(sheet.rows))]
        fresh = "".join(drawn).split("\n")
        # The first one was drawn below others, which went, and has no head then.
        assert shown[sheet.sizes[0] :] == fresh[drawn[0].count("\n") :]
        assert sum(sheet.sizes) == len(shown) - 1


def test_five_thousand_members_and_a_flood_of_joins_leave_the_messages_in_place(window):
    """The engine is given views as a core makes them: a server would take a minute."""
    options = chat.ClientOptions("alice", chat.parse_target("127.0.0.1:1"))
    engine = gui_client.Engine(options, chat.do_nothing)
    core, batches = engine.core, engine.batches
    room = core.rooms["#lobby"]
    view = core.timed(said("hello", where="#lobby", id="m1"), room)
    room.views.append(view)
    engine.show([view])
    engine.publish()
    for n in range(5000):
        room.came(f"guest{n}")
        core.happened(room, chat.View(chat.CAME, name=f"guest{n}", where="#lobby"))
    engine.show(core.take_views())
    engine.do_took()
    engine.publish()
    events = [event for _ in range(batches.qsize()) for event in batches.get_nowait()]
    rows = [row for event in events if isinstance(event, gui_client.Rows) for row in event.rows]
    assert sum(row.view.kind == chat.SAID for row in rows) == 1
    assert sum(row.view.kind == chat.CAME for row in rows) <= 2
    engine.loop.close()


def pour(guest, count, rate):
    """Say this many numbered messages, so many a second."""
    tick = threading.Event()  # never set: a wait that the test's own thread does not share
    for number in range(0, count, 20):
        lines = [
            f"message {n}, about as long as what people say\n" for n in range(number, number + 20)
        ]
        with contextlib.suppress(OSError):  # the test is over
            guest.send("".join(lines))
        tick.wait(20 / rate)


def longest_silence(window, guest, count):
    """How long, at most, the window had neither drawn nor answered while messages came."""
    beats = [time.monotonic()]

    def beat():
        beats.append(time.monotonic())
        window.root.after(5, lambda: window.root.after_idle(beat))

    flood = threading.Thread(target=pour, args=(guest, count, 2000))
    flood.start()
    beat()
    see(window, f"message {count - 1},")
    flood.join()
    return max(later - earlier for earlier, later in zip(beats, beats[1:], strict=False))


# Files and pictures in the window


def png_chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def drawn_png(width, height):
    """A PNG that can be decoded."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes((y % 256, 90, 160)) * width for y in range(height))
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*one) for one in chunks)


def gif_head(width, height, frame, extension=b""):
    """A GIF as far as its first frame."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + extension + b"," + struct.pack("<4HB", 0, 0, *frame, 0) + bytes(9)


def tag_for(kind, data, width, height):
    return chat.FileTag(f"/files/{'a' * 32}", kind, len(data), width, height)


COMMENT = b"!\xfe\x02hi\x00!\xf9\x04\0\0\0\0\x00"
JUNK_PICTURES = [
    ("image/png", PNG, (640, 480), ""),
    ("image/png", PNG, (64, 48), "it has another size than was said"),
    ("image/gif", PNG, (640, 480), "it is not what was said"),
    ("image/png", b"GIF89a" + bytes(30), (640, 480), "it is not what was said"),
    ("image/gif", gif_head(9, 9, (9, 9)), (9, 9), ""),
    ("image/gif", gif_head(9, 9, (9, 9), COMMENT), (9, 9), ""),
    ("image/gif", gif_head(9, 9, (65535, 65535)), (9, 9), "it is damaged"),
    ("image/gif", gif_head(9, 9, (9, 9), b"!\xfe\xff"), (9, 9), "it is damaged"),
    ("image/gif", gif_head(9, 9, (9, 9))[:11], (9, 9), "it is damaged"),
]


@pytest.mark.parametrize(("kind", "data", "size", "why"), JUNK_PICTURES)
def test_a_picture_is_looked_at_before_tk_decodes_it(kind, data, size, why):
    file = tag_for(kind, data, *size)
    assert gui_client.picture_trouble(file, data) == why
    assert gui_client.picture_trouble(file, data[:-1]) == "it is shorter than was said"
    assert gui_client.picture_trouble(file, b"") == "it is shorter than was said"


@pytest.mark.parametrize(
    ("kind", "size", "sides", "height"),
    [
        ("image/png", 2048, (640, 480), 240),
        ("image/gif", 2048, (40, 30), 30),
        ("image/gif", 2048, (401, 1), 1),
        ("image/png", 2048, (4096, 4096), 293),
        ("image/png", 2048, (4097, 4), 0),
        ("image/png", 3_000_000, (640, 480), 0),
        ("image/jpeg", 2048, (640, 480), 0),
        ("image/png", 2048, (0, 0), 0),
    ],
)
def test_a_message_with_a_file_has_a_card_and_room_for_a_picture(kind, size, sides, height):
    tag = ",".join(map(str, (f"/files/{'a' * 32}", kind, size, *sides)))
    view = said("tea.png (image/png, 2 KB): http://x", file=tag)
    sheet, pieces = sheet_of(view)
    assert "tea.png" in texts_of(pieces) and "Save" in texts_of(pieces)
    spaces = [tags[-1] for tags in pieces[1::2] if "picture" in tags]
    assert spaces == ([f"space{height}"] if height else [])
    sheet.troubles[f"/files/{'a' * 32}"] = "it is damaged"
    pieces = sheet.draw(0)
    assert "not shown: it is damaged" in texts_of(pieces)
    assert not any("picture" in tags for tags in pieces[1::2])


@pytest.mark.parametrize("file", ["x", f"/files/{'a' * 32},a/b,1", "\x1b,,,,"])
def test_a_malformed_tag_of_a_file_has_no_card(file):
    assert "Save" not in texts_of(sheet_of(said("hi", file=file))[1])


def keeps_files(running, tmp_path):
    (tmp_path / "srv").mkdir()
    return running(data=tmp_path / "srv")


def file_row(window):
    """The row of the last message with a file, once it has come."""
    rows = window.transcript.sheet.rows
    pump(window, lambda: any(row.view.file for row in rows))
    return next(row for row in reversed(rows) if row.view.file)


def height_of(window):
    counted = window.transcript.text.count("1.0", "end", "update", "ypixels")
    return counted[-1] if isinstance(counted, tuple) else counted


def test_a_picture_is_sent_by_a_key_and_seen_saved_and_opened_in_another_window(
    running, window, tmp_path
):
    server = keeps_files(running, tmp_path)
    alice, bob = (at_home(window(server.address, name=name)) for name in ("alice", "bob"))
    asked, fetch = [], bob.transcript.wants_pictures
    bob.transcript.wants_pictures = asked.append
    (tmp_path / "tea.png").write_bytes(drawn_png(640, 480))
    alice.choose_files = lambda: [str(tmp_path / "tea.png")]
    press(alice, "Control-o")
    row = file_row(bob)
    pump(bob, lambda: asked)
    before = height_of(bob)
    fetch(asked[0])
    text = bob.transcript.text
    pump(bob, text.image_names)
    assert height_of(bob) == before  # nothing has jumped
    image = bob.transcript.images[asked[0][0].path]
    assert (image.width(), image.height()) == (320, 240)
    pump(alice, lambda: not alice.strip.parts and alice.transcript.text.image_names())
    (tmp_path / "down").mkdir()
    bob.downloads, opened = (lambda: tmp_path / "down"), []
    bob.open_file = opened.append
    bob.act_on("save", row)
    bob.act_on("open", row)
    pump(bob, lambda: opened and (tmp_path / "down" / "tea.png").exists())
    body = (tmp_path / "tea.png").read_bytes()
    assert (tmp_path / "down" / "tea.png").read_bytes() == body
    assert pathlib.Path(opened[0]).read_bytes() == body and opened[0].endswith("/tea.png")
    bob.act_on("picture", row)
    pump(bob, lambda: bob.picture)
    assert bob.picture.image.width() == 640
    press(bob, "Escape", bob.picture.canvas)
    pump(bob, lambda: not bob.picture.winfo_exists())
    bob.close()
    pump(bob, lambda: bob.gone)
    assert not pathlib.Path(opened[0]).exists()


def test_a_user_can_do_without_pictures_among_the_messages(running, window, tmp_path):
    alice, asked = at_home(window(keeps_files(running, tmp_path).address)), []
    enter(alice, "/set pictures off")
    pump(alice, lambda: alice.values["pictures"] == "off")
    alice.transcript.wants_pictures, fetch = asked.append, alice.transcript.wants_pictures
    (tmp_path / "tea.png").write_bytes(drawn_png(640, 480))
    alice.send_files(alice.here, [tmp_path / "tea.png"])
    see(alice, "640\u00d7480")
    row, height = file_row(alice), height_of(alice)
    assert "Save" in transcript(alice) and not alice.transcript.spaces and not asked
    alice.act_on("picture", row)  # to look at one is another matter
    pump(alice, lambda: alice.picture)
    press(alice, "Escape", alice.picture.canvas)
    alice.transcript.wants_pictures = fetch
    enter(alice, "/set pictures on")
    pump(alice, alice.transcript.text.image_names)
    assert height_of(alice) > height + 200


@pytest.mark.parametrize("refused", [True, False])
def test_only_the_file_that_the_user_opens_is_opened_when_it_is_there(refused):
    other, wanted = (chat.Transfer(id, False, "#lobby", "x") for id in ("other", "wanted"))
    core = types.SimpleNamespace(transfers=[other])
    engine = types.SimpleNamespace(
        opening={}, place_of=lambda number: [types.SimpleNamespace(core=core)]
    )
    engine._act = lambda number, act: None if refused else core.transfers.append(wanted)
    gui_client.Engine.do_save_file(engine, 1, said("tea"), "tea.png", True)
    assert list(engine.opening) == ([] if refused else ["wanted"])


def test_few_pictures_are_kept_and_the_page_is_as_high_with_them_as_without(window, monkeypatch):
    monkeypatch.setattr(gui_client, "PICTURES_KEPT", 2)
    alice, data = window(name=""), drawn_png(60, 90)
    page = alice.transcript

    def fetched(files):
        for file in files:
            page.take_picture(gui_client.Picture(0, file, data))

    page.wants_pictures = fetched
    tags = [f"/files/{n:032x},image/png,{len(data)},60,90" for n in range(40)]
    rows = [gui_client.Row(said(f"{n}", time=EIGHT + n, file=tag)) for n, tag in enumerate(tags)]
    page.reset(1, rows, 0)
    pump(alice, lambda: len(page.images) >= 3)
    height, last = height_of(alice), set(page.images)
    page.text.yview("1.0")
    pump(alice, lambda: page.images and not last & page.images.keys())
    pump(alice, lambda: set(page.text.image_names()) == set(page.images))
    assert height_of(alice) == height and len(page.images) < 20
    assert max(map(len, page.placed.values())) == 1
    page.redraw(0)
    assert len(page.text.image_names()) == len(page.images) - 1 and height_of(alice) == height
    pump(alice, lambda: set(page.text.image_names()) == set(page.images))


def test_a_picture_that_cannot_be_shown_has_a_card_with_the_reason(running, window, tmp_path):
    server = keeps_files(running, tmp_path)
    alice = at_home(window(server.address))
    (tmp_path / "bad.png").write_bytes(PNG)
    alice.send_files(alice.here, [tmp_path / "bad.png"])
    see(alice, "not shown: it is damaged")
    (tmp_path / "gone.gif").write_bytes(gif_head(9, 9, (9, 9)))
    alice.transcript.wants_pictures, fetch = chat.do_nothing, alice.transcript.wants_pictures
    alice.send_files(alice.here, [tmp_path / "gone.gif"])
    see(alice, "gone.gif")
    row = file_row(alice)
    pump(alice, lambda: "image/gif" in file_row(alice).view.file)
    for path in (tmp_path / "srv").rglob(hashlib.sha256(gif_head(9, 9, (9, 9))).hexdigest()):
        path.unlink()
    row = file_row(alice)
    fetch((chat.parse_file_tag(row.view.file),))
    see(alice, "not shown: there is no such file, or not any more")
    assert sum(alice.transcript.sheet.sizes) == transcript(alice).count("\n") - 1


def test_a_pasted_path_of_a_file_is_sent_only_if_the_user_says_so(running, window, tmp_path):
    alice = at_home(window(keeps_files(running, tmp_path).address))
    path = tmp_path / "notes of today.txt"
    path.write_text("tea\n")
    alice.compose.take_paste(str(path))
    pump(alice, lambda: alice.file_card.shown)
    press(alice, "Return", alice.file_card.keep)
    assert not alice.file_card.shown and alice.compose.content == str(path)
    alice.compose.set("look: ")
    alice.compose.take_paste(str(path))
    pump(alice, lambda: alice.file_card.shown)
    alice.file_card.send.invoke()
    assert alice.compose.content == "look: "
    see(alice, "text/plain, 4 B")
    alice.compose.take_paste(path.as_uri())
    pump(alice, lambda: alice.file_card.shown)
    alice.file_card.send.invoke()
    assert alice.compose.content == "look: "
    pump(alice, lambda: transcript(alice).count("text/plain, 4 B") == 2)
    alice.compose.take_paste(str(tmp_path / "none"))
    assert alice.compose.content.endswith("none") and not alice.file_card.shown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{folder}/a file #1.txt", True),
        (" {folder}/a file #1.txt\n", True),
        ("file://{folder}/a%20file%20%231.txt", True),
        ("file://localhost{folder}/a%20file%20%231.txt", True),
        ("file://elsewhere{folder}/a%20file%20%231.txt", False),
        ("http://localhost{folder}/a%20file%20%231.txt", False),
        ("file://[{folder}", False),
        ("file://{folder}/%00", False),
        ("file://{folder}", False),
    ],
)
def test_a_path_or_a_url_of_a_file_on_this_machine_is_a_file(tmp_path, text, found):
    path = tmp_path / "a file #1.txt"
    path.write_text("tea")
    assert gui_client.pasted_file(text.format(folder=tmp_path)) == (str(path) if found else "")


def test_the_code_of_the_servers_address_is_drawn_on_a_card(running, window):
    server = running()
    alice = at_home(window(server.address))
    enter(alice, "/qr")
    pump(alice, lambda: alice.code_card.shown)
    url = f"http://127.0.0.1:{server.address[1]}/"
    assert alice.code_card.about.cget("text") == url
    canvas, module = alice.code_card.canvas, alice.look.part(0.4)
    drawn = set()
    for one in canvas.find_all():
        left, top, right, bottom = (int(n) // module for n in canvas.coords(one))
        assert bottom == top + 1 and canvas.itemcget(one, "fill") == "black"
        drawn |= {(top, column) for column in range(left, right)}
    code = chat.qr_code(url)
    dark = {(row, column) for row, line in enumerate(code, chat.QR_QUIET)
            for column, value in enumerate(line, chat.QR_QUIET) if value == "1"}  # fmt: skip
    assert drawn == dark and int(canvas.cget("width")) == (len(code) + 8) * module
    assert canvas.cget("background") == "white"
    press(alice, "Escape", alice.code_card.done)
    assert not alice.code_card.shown


def test_a_file_on_its_way_can_be_stopped_by_a_key_and_goes_on_after_the_engine_ended(
    running, window, tmp_path, monkeypatch
):
    server = keeps_files(running, tmp_path)
    state = {"state": tmp_path / "client", "config": tmp_path / "client"}
    alice = at_home(window(server.address, **state))
    with monkeypatch.context() as patch:
        patch.setattr(chat.WebCall, "more", chat.do_nothing)  # no piece is sent
        for name in ("one.bin", "two.bin"):
            (tmp_path / name).write_bytes(bytes(400_000))
        alice.send_files(alice.here, [tmp_path / "one.bin", tmp_path / "two.bin"])
        pump(alice, lambda: len(alice.strip.parts) == 2)
        press(alice, "Return", alice.strip.buttons[0])
        pump(alice, lambda: len(alice.strip.parts) == 1)
        alice.engine.submit(alice.engine.over, "a reason that needs the user")
        pump(alice, lambda: alice.card.shown and alice.engine is None)
    alice.card.enter()
    assert alice.strip.parts == {}  # those of the engine that ended
    see(alice, "two.bin (application/octet-stream, 391 KB)")
    pump(alice, lambda: alice.strip.parts == {})
    assert "one.bin" not in transcript(alice)


def test_a_window_whose_password_cannot_be_read_does_not_open(capsys):
    assert gui_client.main(["alice", "--password", "@/none"]) == 1
    said = "gui_client.py: cannot read the password in /none: no such file or directory\n"
    assert capsys.readouterr().err == said


def test_a_window_answers_while_messages_pour_in_and_closes_in_a_second(running, window):
    server = running()
    bob = server.guest("bob")
    alice = at_home(window(server.address))
    # Up to three times: what this machine does besides is not the window's fault.
    assert any(longest_silence(alice, bob, 1000 + n) < 0.1 for n in range(3))
    alice.transcript.text.yview_moveto(0)
    alice.root.update()
    bob.send("below\n")
    pump(alice, lambda: alice.transcript.below.cget("text") == "1 new below \u2193")
    alice.transcript.below.invoke()
    alice.root.update()
    assert alice.transcript.at_bottom and not alice.transcript.below.place_info()
    before, engine = len(alice.transcript.sheet.rows), alice.engine
    threading.Thread(target=pour, args=(bob, 20_000, 20_000), daemon=True).start()
    pump(alice, lambda: len(alice.transcript.sheet.rows) > before)
    closing = time.monotonic()
    alice.close()
    pump(alice, lambda: alice.gone)
    assert time.monotonic() - closing < 1
    assert not engine.thread.is_alive()


def test_keys_are_answered_and_memory_is_bounded_while_five_conversations_are_flooded(
    running, window
):
    server = running()
    guest = Guest(server.address)
    rooms = [f"#flood{n}" for n in range(5)]
    guest.enter_irc("flooder", *(f"JOIN {room}" for room in rooms))
    alice = at_home(window(server.address))
    for room in rooms:
        join(alice, room)

    def flood(count):
        tick = threading.Event()
        for number in range(0, count, 20):
            lines = (
                f"PRIVMSG {rooms[n % 5]} :message {n}, as long as what people say\r\n"
                for n in range(number, number + 20)
            )
            guest.send("".join(lines))
            tick.wait(0.01)
        guest.send("".join(f"PRIVMSG {room} :flood {count} is over\r\n" for room in rooms))

    def delays(count):
        """Delays of keys and of changes of the conversation, in seconds."""
        found, due = [], [time.monotonic()]

        def key():
            alice.compose.event_generate("<Key>", keysym="x")
            if len(found) % 10 == 9:
                alice.go_next(1)
                alice.compose.set("")
            alice.root.update_idletasks()
            now = time.monotonic()
            found.append(now - due[0])
            due[0] = max(due[0] + 0.02, now)
            if thread.is_alive():
                alice.root.after(max(1, int(1000 * (due[0] - now))), key)

        thread = threading.Thread(target=flood, args=(count,))
        thread.start()
        key()
        pump(alice, lambda: not thread.is_alive())
        go(alice, rooms[-1])  # the keys may have led to #lobby, where nothing is said
        see(alice, f"flood {count} is over")
        return sorted(found)

    # Up to six times: what this machine does besides is not the window's fault.
    for count in range(2000, 2600, 100):
        found = delays(count)
        if found[len(found) * 99 // 100] < 0.1 and found[-1] < 0.25:
            break
    assert found[len(found) * 99 // 100] < 0.1 and found[-1] < 0.25
    most = gui_client.ROWS_KEPT + gui_client.ROWS_TRIMMED + gui_client.ROWS_AT_ONCE
    assert len(alice.transcript.sheet.rows) <= most
    assert len(alice.transcript.sheet.sizes) <= gui_client.ROWS_MOST
    assert all(len(room.views) <= most for room in alice.engine.core.rooms.values())
    assert alice.engine.batches.qsize() <= 1


# ======================================================================================
# PAGE
# ======================================================================================

# A real browser without a window: Chromium, driven by the DevTools protocol over two pipes
# (https://chromedevtools.github.io/devtools-protocol). Tests of the page itself use it.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
CHROMIUM_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--remote-debugging-pipe", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-background-timer-throttling"),
    *("--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows"),
    "--ignore-certificate-errors",
)


ON_3_AND_4 = """
import os, sys
for n, end in enumerate(sys.argv[1:3]):
    os.dup2(int(end), 3 + n)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """A browser process; one for all tests of a run, each with a context of its own."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="chat-browser-")
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={self.profile}"]
        launched = [sys.executable, "-c", ON_3_AND_4, *map(str, ends), *command]
        self.process = subprocess.Popen(launched, pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (commands, answers, *ends):
            os.close(end)
        self.ids, self.data = itertools.count(1), b""
        self.results, self.events = {}, []

    def ask(self, method, session=None, **params):
        """Return the result of a command."""
        id = next(self.ids)
        message = {"id": id, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while id not in self.results:
            assert select.select([self.answers], [], [], 6 * PATIENCE)[0], f"no answer to {method}"
            self.data += os.read(self.answers, 1 << 20)
            *whole, self.data = self.data.split(b"\0")
            for one in map(json.loads, whole):
                if "id" in one:
                    self.results[one["id"]] = one
                else:
                    self.events.append(one)
        answer = self.results.pop(id)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def close(self):
        with contextlib.suppress(OSError):
            self.ask("Browser.close")
        self.process.wait(PATIENCE)
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)


PAGE_STATE = "JSON.stringify([state.phase, state.why, state.outbox, allRooms().map(to => to.name)])"


class Tab:
    """A tab with the page of a server, as large as a phone unless told otherwise."""

    def __init__(self, browser, context, url, width=360, height=640, dark=False):
        self.browser, self.context, self.url = browser, context, url
        made = browser.ask("Target.createTarget", url="about:blank", browserContextId=context)
        self.target = made["targetId"]
        attached = browser.ask("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 720}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=width < 720)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[theme])
        self.go(url)

    def ask(self, method, **params):
        return self.browser.ask(method, self.session, **params)

    def go(self, url):
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def js(self, code):
        """Return the value of an expression, or what its promise resolves to."""
        how = {"awaitPromise": True, "returnByValue": True}
        answer = self.ask("Runtime.evaluate", expression=code, **how)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def until(self, condition, patience=3 * PATIENCE):
        """Wait until a condition holds."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError, AssertionError):  # the page is being loaded
                if self.js(f"Boolean({condition})"):
                    return
            time.sleep(0.02)
        raise AssertionError(
            f"not so: {condition}; on the page: {self.text()[-300:]}; {self.js(PAGE_STATE)}"
        )

    def text(self):
        return self.js("document.body.innerText")

    def faults(self):
        """Errors that the page threw or logged. Attempts to connect are logged by the browser."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        found = [json.dumps(e["params"]) for e in mine if e["method"] in kinds]
        expected = ("ERR_", "status of", "WebSocket connection", '"level": "verbose"')
        return [text for text in found if not any(word in text for word in expected)]

    def requests(self):
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        sent = [e["params"] for e in mine if e["method"] == "Network.requestWillBeSent"]
        sockets = [e["params"]["url"] for e in mine if e["method"] == "Network.webSocketCreated"]
        return [one["request"]["url"] for one in sent] + sockets

    def tap(self, selector):
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key, code=0, text=None, **more):
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, **more}
        self.ask(
            "Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {})
        )
        self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    def press(self, text):
        """Press the button with this text in the open sheet."""
        buttons = "[...document.querySelectorAll('#sheet button')]"
        self.until(f"{buttons}.some(b => b.textContent === {json.dumps(text)})")
        self.js(f"{buttons}.find(b => b.textContent === {json.dumps(text)}).click()")

    def fill(self, *texts):
        """Write into the fields of the open sheet, and send it."""
        self.until("document.querySelector('#sheet[open] form')")
        for n, text in enumerate(texts):
            self.js(f"document.querySelectorAll('#sheet form input')[{n}].select()")
            self.ask("Input.insertText", text=text)
        self.js("document.querySelector('#sheet form button').click()")

    def enter(self, name):
        self.fill(name)
        self.until("state.phase === 'online' && room('#lobby').joined")
        return self

    def say(self, *texts):
        for text in texts:
            self.js("document.querySelector('#text').focus()")
            self.ask("Input.insertText", text=text)
            self.js("document.querySelector('#send').click()")
            self.until("document.querySelector('#text').value === ''")

    def rows(self):
        """The texts of the messages that are shown: those that have arrived."""
        rows = "document.querySelectorAll('#log .block .row:not(.info) .text')"
        return self.js(f"[...{rows}].map(row => row.textContent)")

    def wait_for(self, *texts):
        for text in texts:
            rows = "[...document.querySelectorAll('#log .block .row')]"
            self.until(f"{rows}.some(row => row.textContent.includes({json.dumps(text)}))")

    def choose(self, path):
        """Choose a file where the page asks for one."""
        self.js("document.querySelector('#attach').click()")
        self.until("document.querySelector('#file')")
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def close(self):
        self.browser.ask("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="session")
def chromium():
    if not CHROMIUM:
        assert not os.environ.get("CHAT_NEEDS_BROWSER"), "no Chromium is installed"
        pytest.skip("no Chromium is installed")
    browser = Chromium()
    yield browser
    browser.close()


@pytest.fixture
def browse(chromium):
    """Open tabs. Those of one user share what the browser keeps; another user has another one."""
    contexts, tabs = {}, []

    def open(address, user="", **options):
        if user not in contexts:
            contexts[user] = chromium.ask("Target.createBrowserContext")["browserContextId"]
        url = address if isinstance(address, str) else "http://{}:{}/".format(*address)
        tabs.append(Tab(chromium, contexts[user], url, **options))
        return tabs[-1]

    yield open
    faults = [fault for tab in tabs for fault in tab.faults()]
    for context in contexts.values():
        chromium.ask("Target.disposeBrowserContext", browserContextId=context)
    assert faults == []


def page_house():
    house = House()
    house.site.web = house.site.web._replace(documents=chat.page_documents())
    return house


def test_the_page_is_small_and_allows_nothing_but_its_own_script_and_server():
    ask = "GET / HTTP/1.1\nHost: 192.168.1.5:7001"
    status, headers, body = Browser(page_house()).asks(ask)
    assert status == 200 and len(body) < 60_000
    assert headers["content-type"] == "text/html; charset=utf-8" and "set-cookie" not in headers
    policy = headers["content-security-policy"]
    script = body.partition(b"<script>")[2].partition(b"</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode().lower()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "ws://192.168.1.5:7001 wss://192.168.1.5:7001" in policy
    assert "unsafe" not in policy and "http" not in policy
    assert not re.findall(rb"\son\w+=|innerHTML|document\.write|eval\(|https?://(?!\?)[a-z]", body)


@pytest.mark.parametrize(
    "accepted, how",
    [
        ("gzip", "gzip"),
        ("br, GZIP;q=0.5", "gzip"),
        ("gzip; q=1.000, *;q=0", "gzip"),
        ("gzip;q=0", ""),
        ("identity, gzip; q=0.000", ""),
        ("br", ""),
        ("", ""),
    ],
)
def test_the_page_is_compressed_for_clients_that_take_it(accepted, how):
    ask = f"GET / HTTP/1.1\nHost: localhost\nAccept-Encoding: {accepted}"
    _, headers, _ = Browser(page_house()).asks(ask)
    assert headers.get("content-encoding", "") == how


@pytest.mark.parametrize("how", ["", "gzip"])
@pytest.mark.parametrize("path", ["/", "/sw.js", "/manifest.webmanifest", "/icon.svg"])
def test_a_part_of_the_page_is_sent_once_and_then_confirmed(path, how):
    browser = Browser(page_house())
    ask = f"GET {path} HTTP/1.1\nHost: localhost\nAccept-Encoding: br, {how or 'identity'}"
    status, headers, body = browser.asks(ask)
    assert (status, headers.get("content-encoding", "")) == (200, how)
    plain = zlib.decompress(body, zlib.MAX_WBITS + 16) if how else body
    assert plain == chat.page_documents()[path].forms[""]
    tag = headers["etag"]
    again, headers, body = browser.asks(f"{ask}\nIf-None-Match: {tag}")
    assert (again, headers["etag"], body) == (304, tag, b"")
    status, headers, body = browser.asks(ask.replace("GET", "HEAD", 1))
    assert status == 200 and body == b"" and int(headers["content-length"]) > 100


def test_a_server_without_the_page_says_that_there_is_none():
    house = House(web=chat.Web())
    assert Browser(house).asks("GET / HTTP/1.1\nHost: localhost")[0] == 404


def with_page(running, **options):
    web = chat.Web(documents=chat.page_documents())
    return running(web=web, **options)


def test_a_conversation_of_page_and_netcat(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    guest = server.guest("bob")
    guest.send("hello anna\n")
    tab.wait_for("hello anna")
    tab.say("hello bob", "two\nlines")
    assert guest.until("lines")[-3:] == ["anna: hello bob", "anna: two", "anna: lines"]
    tab.until("state.outbox.length === 0")
    assert tab.rows() == ["hello anna", "hello bob", "two\nlines"]


@pytest.mark.parametrize("run", range(3 if THOROUGH else 1))
def test_page_and_network_that_breaks_lose_and_double_nothing(running, browse, seeded, run):
    server = with_page(running)
    witness = Witness(server.address)
    with Proxy(server.address, random.Random(run), 4_000, 20_000, after=b" 001 ") as proxy:
        tab = browse(proxy.address)
        tab.enter("anna")
        bob = server.guest("bob")
        for n in range(200):
            tab.say(f"mine {n}")
            bob.send(f"bob's {n}\n")
        tab.until("state.outbox.length === 0")
        said, _ = witness.heard("mine 199")
        tab.wait_for("bob's 199")
        assert [x for x in said if x.startswith("mine")] == [f"mine {n}" for n in range(200)]
        tab.until("!allRooms().some(to => to.behind)")
        rows = tab.rows()
        assert [x for x in rows if x.startswith("mine")] == [f"mine {n}" for n in range(200)]
        assert [x for x in rows if x.startswith("bob")] == [f"bob's {n}" for n in range(200)]
        assert proxy.resets > 3


def test_page_and_a_server_that_is_killed_lose_and_double_nothing(folder, browse):
    lines, proxy = [f"mine {n}" for n in range(200)], Proxy(("127.0.0.1", 9))

    def say(tab, texts, last=False):
        """Say something on a server, and kill that."""
        with serving("--data", folder, "--flood", "off") as (process, proxy.server):
            tab = tab or browse(proxy.address).enter("anna")
            tab.until("state.phase === 'online'")
            tab.say(*texts)
            if last:
                tab.until("state.outbox.length === 0 && !room('#lobby').behind")
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
        return tab

    with proxy:
        tab = None
        for start in (0, 50, 100):
            tab = say(tab, lines[start : start + 50])
        say(tab, lines[150:], last=True)
        assert [x for x in tab.rows() if x.startswith("mine")] == lines
    store = chat.Store(folder / "chat.db")
    assert texts(store, chat.LOBBY, 500) == lines
    store.close()


def test_a_page_that_was_closed_sends_what_waits_when_it_is_opened_again(running, browse):
    server = with_page(running)
    witness = Witness(server.address)
    with Proxy(server.address) as proxy:
        tab = browse(proxy.address).enter("anna")
        proxy.server = ("127.0.0.1", 9)  # nothing listens there
        proxy.swallow()
        tab.say("typed before it was closed", "and this")
        tab.until("document.querySelectorAll('#waiting .row').length === 2")
        tab.ask("Page.navigate", url="about:blank")
        proxy.server = server.address
        tab.go(tab.url)
        tab.wait_for("and this")
        tab.until("document.querySelectorAll('#waiting .row').length === 0")
    assert witness.heard("and this")[0] == ["typed before it was closed", "and this"]


@pytest.mark.parametrize("run", range(5 if THOROUGH else 1))
def test_a_reload_at_any_moment_loses_and_doubles_nothing(running, browse, seeded, run):
    server, chance = with_page(running), random.Random(run)
    witness = Witness(server.address)
    tab = browse(server.address).enter("anna")
    said = []
    for n in range(10):
        text = f"text {n}"
        tab.until("document.querySelector('#text').value === ''")
        tab.js("document.querySelector('#text').focus()")
        tab.ask("Input.insertText", text=text)
        after = chance.choice((0, 0, 1, 3, 10, 40))
        tab.js(
            "globalThis.old = true; document.querySelector('#send').click(); "
            f"setTimeout(() => location.reload(), {after})"
        )
        tab.until("!globalThis.old && state.phase === 'online'")
        tab.until("!state.outbox.length && !room('#lobby').behind")
        if tab.js("document.querySelector('#text').value") == text:  # it was not accepted
            tab.js("document.querySelector('#send').click()")
        tab.wait_for(text)
        said.append(text)
    assert witness.heard("text 9")[0] == said
    tab.until("!room('#lobby').behind")
    assert tab.rows() == said


def test_two_tabs_share_one_connection_and_one_outbox(running, browse):
    server = with_page(running)
    witness = Witness(server.address)
    first = browse(server.address).enter("anna")
    second = browse(server.address)
    second.until("attached && state.phase === 'online'")
    first.say("of the first")
    second.say("of the second")
    for tab in (first, second):
        tab.wait_for("of the first", "of the second")
        assert tab.rows() == ["of the first", "of the second"]
    assert first.js("Boolean(leader)") and not second.js("Boolean(leader)")
    assert len([1 for url in second.requests() if url.startswith("ws:")]) == 0
    first.close()
    second.until("leader && state.phase === 'online'")
    second.say("of the one that is left")
    said, others = witness.heard("of the one that is left")
    assert said == ["of the first", "of the second", "of the one that is left"]
    assert others == [line for line in others if " JOIN " in line], "no user saw the change"


def test_of_two_tabs_on_plain_http_one_has_the_connection(running, browse):
    """There are no Web Locks: the browser takes an address as insecure if it is not loopback, so
    the test takes them away."""
    server = with_page(running)
    first = browse("about:blank")
    hide = "Object.defineProperty(navigator, 'locks', { value: undefined })"
    first.ask("Page.addScriptToEvaluateOnNewDocument", source=hide)
    first.go("http://{}:{}/".format(*server.address))
    first.enter("anna")
    second = browse("about:blank")
    second.ask("Page.addScriptToEvaluateOnNewDocument", source=hide)
    second.go("http://{}:{}/".format(*server.address))
    second.until("attached && state.phase === 'online'")
    assert not second.js("Boolean(leader)")
    second.say("through the first")
    first.wait_for("through the first")
    first.close()
    second.until("leader && state.phase === 'online'")
    second.say("alone")
    second.wait_for("alone")
    assert second.rows() == ["through the first", "alone"]


def test_a_tab_takes_the_place_of_a_leader_that_does_not_answer(running, browse):
    """As one that the browser has frozen."""
    server = with_page(running)
    witness = Witness(server.address)
    first = browse(server.address).enter("anna")
    first.say("before")
    first.wait_for("before")
    first.js("globalThis.heard = channel.onmessage; channel.onmessage = null")
    second = browse(server.address)
    second.until("leader")
    first.js("channel.onmessage = heard; null")
    first.until("!leader && attached")
    second.say("from the other tab")
    second.wait_for("before", "from the other tab")
    first.say("through the other tab")
    for tab in (first, second):
        tab.wait_for("through the other tab")
        assert tab.rows() == ["before", "from the other tab", "through the other tab"]
    assert witness.heard("through the other tab")[0] == tab.rows()


def test_a_tab_that_is_shown_again_is_where_its_reader_was(running, browse):
    server = with_page(running)
    first = browse(server.address).enter("anna")
    first.say(*(f"line {n}" for n in range(40)))
    second = browse(server.address)
    second.wait_for("line 39")
    second.until("attached")
    second.until("(log.scrollTop = 100, !stuck)")
    second.js("dispatchEvent(new Event('visibilitychange')); null")
    asked = second.js("Date.now()")
    second.until(f"answered >= {asked} - 1000")
    first.say("one more")
    second.until("lastOf(shown().messages).text === 'one more'")
    assert not second.js("stuck") and abs(second.js("log.scrollTop") - 100) < 50


HOSTILE = (
    "<img src=http://evil.test/x onerror=alert(1)><script>alert(1)</script>",
    "javascript:alert(1) data:text/html,<b>x</b> [x](javascript:alert(1))",
    'http://evil.test/\u202etxt.exe and https://evil.test/a"onmouseover=alert(1)',
    "\u202e\u2066reversed\u202e " + "\u202a" * 40,
    "z" + "\u0301" * 8000,
    "w" * 5000,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u0631\u062d\u0628\u0627",
)


def test_hostile_texts_are_shown_as_text_and_no_other_host_is_asked(running, browse):
    server = with_page(running)
    tab = browse(server.address, width=320, height=568).enter("anna")
    mallory = server.guest()
    caps = "CAP REQ :draft/multiline batch message-tags"
    mallory.enter_irc("mallory", caps, "CAP END", "JOIN #lobby")
    for text in HOSTILE:
        lines = list(chat.split_text(text, 400))
        mallory.send("BATCH +1 draft/multiline #lobby\r\n")
        for n, piece in enumerate(lines):
            goes_on = ";draft/multiline-concat" if n else ""
            mallory.send(f"@batch=1{goes_on} PRIVMSG #lobby :{piece}\r\n")
        mallory.send("BATCH -1\r\n")
    mallory.send("@+draft/react=<b>;+draft/reply=x TAGMSG #lobby\r\nTOPIC #lobby :<b>topic</b>\r\n")
    mallory.send("PRIVMSG #lobby :the end\r\n")
    tab.wait_for("the end")
    rows = tab.rows()
    assert rows[0] == HOSTILE[0] and rows[5] == HOSTILE[5] and len(rows) == len(HOSTILE) + 1
    links = tab.js("[...document.querySelectorAll('#log a')].map(a => a.href)")
    assert all(link.startswith(("http://evil.test/", "https://evil.test/")) for link in links)
    assert (
        tab.js("document.querySelectorAll('#log img, #log script, #log b:not(.row b)').length") == 0
    )
    assert tab.js("document.scrollingElement.scrollWidth") <= 320
    marks = "[...document.querySelectorAll('.row')].find(r => r.textContent.includes('z\u0301'))"
    assert tab.js(f"{marks}.offsetHeight") < 100
    origin = "http://{}:{}/".format(*server.address)
    for url in tab.requests():
        assert url.startswith((origin, origin.replace("http", "ws"), "about:")), url


def test_a_picture_goes_from_the_page_to_all_and_back(running, browse, folder, tmp_path):
    server = with_page(running, data=folder)
    tab = browse(server.address).enter("anna")
    witness = Witness(server.address)
    picture = tmp_path / "tea.png"
    picture.write_bytes(drawn_png(1200, 800))
    tab.choose(picture)
    tab.press("Send")
    line = witness.until("/files/")[-1]
    assert re.search(r"PRIVMSG #lobby :tea\.(png|jpg) \(picture, \d+ KB\): http", line)
    tab.until("document.querySelector('#log .block img')?.naturalWidth > 0")
    other = browse(server.address, user="ben").enter("ben")
    other.until("document.querySelector('#log .block img')?.naturalWidth > 0")
    assert other.js("document.querySelector('#log .block img').offsetWidth") <= 360


def test_an_upload_goes_on_where_the_network_broke_it(running, browse, folder, tmp_path, seeded):
    server = with_page(running, data=folder)
    content = seeded.randbytes(1_500_000)
    (tmp_path / "data.bin").write_bytes(content)
    with Proxy(server.address, random.Random(1), 200_000, 400_000) as proxy:
        tab = browse(proxy.address).enter("anna")
        tab.choose(tmp_path / "data.bin")
        tab.press("Send")
        tab.wait_for("data.bin")
        assert proxy.resets > 2
    path = tab.js("document.querySelector('#log .card').getAttribute('href')")
    with urllib.request.urlopen("http://{}:{}{}".format(*server.address, path)) as answer:
        assert answer.read() == content


def test_an_account_is_made_and_logged_in_to_without_its_password_being_kept(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    tab.js("settingsSheet()")
    tab.press("Register")
    tab.fill("tea and cake")
    tab.until("state.account === 'anna' && setting('login')?.keys")
    assert "cake" not in tab.js("JSON.stringify(localStorage)")
    tab.js("leader.socket.close()")
    tab.until("state.phase === 'online' && leader.scram === null && state.account === 'anna'")
    tab.js("settingsSheet()")
    tab.press("Log out")
    tab.until("state.phase === 'online' && !setting('login')")
    other = browse(server.address, user="phone")
    other.fill("anna", "tea and cake")
    other.until("state.phase === 'online' && state.account === 'anna'")
    wrong = browse(server.address, user="thief")
    wrong.fill("anna", "coffee")
    wrong.until("/account|log in|wrong|taken/.test(document.querySelector('#title').textContent)")


def test_the_proof_of_a_password_is_that_of_the_rfc(running, browse):
    """RFC 7677 section 3."""
    tab = browse(with_page(running).address)
    nonce = "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    said = ["", f"r={nonce},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"]
    said.append("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    tab.js(
        "globalThis.scram = new Worker('/sw.js'); scram.postMessage({ nonce: "
        f"'{nonce[:20]}', login: {{ account: 'user', password: 'pencil' }} }}); null"
    )

    def answer(text):
        data = base64.b64encode(text.encode()).decode() or "+"
        wait = "new Promise(done => { scram.onmessage = ({ data }) => done(data); "
        return tab.js(f"{wait} scram.postMessage({{ text: '{data}' }}); }})")

    first, proof, last = map(answer, said)
    assert base64.b64decode(first["answer"]) == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    assert base64.b64decode(proof["answer"]).endswith(
        b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    assert last["answer"] == "+" and "pencil" not in str(last["keys"])
    forged = answer("v=" + base64.b64encode(bytes(32)).decode())
    assert forged == {"error": "the server did not prove itself"}


def test_a_reply_a_reaction_and_a_removal_reach_the_others_and_come_back(running, browse):
    server = with_page(running)
    anna = browse(server.address).enter("anna")
    ben = browse(server.address, user="ben", width=1200, dark=True).enter("ben")
    ben.say("is there tea?")
    anna.wait_for("is there tea?")
    anna.js("document.querySelector('.row:not(.info) time').closest('.row').id = 'asked'")
    anna.tap("#asked time")
    anna.press("\u2764\ufe0f")
    ben.until("document.querySelector('.reactions button')?.textContent === '\u2764\ufe0f 1'")
    anna.tap("#asked time")
    anna.press("Reply")
    anna.say("yes, ben")
    ben.until("document.querySelector('.called blockquote')?.textContent === 'ben: is there tea?'")
    ben.js("document.querySelector('#text').focus()")
    for _ in range(2):  # by keyboard: to the question, and its sheet
        ben.key("ArrowUp", 38)
    ben.key("Enter", 13, "\r")
    ben.press("Take back")
    anna.until("document.querySelector('#asked').textContent.includes('taken back')")
    assert "is there tea?" not in anna.js("document.querySelector('#asked').textContent")


def test_search_finds_what_was_said_and_shows_what_stands_around_it(running, browse, folder):
    server = with_page(running, data=folder)
    tab = browse(server.address).enter("anna")
    tab.say("before", "the blue elephant", "after")
    tab.wait_for("after")
    tab.js("document.querySelector('#find').click()")
    tab.fill("elephant")
    search = "document.querySelector('#sheet form button').click()"  # until it is in the index
    found = "document.querySelector('#found button')?.textContent.includes('blue elephant')"
    tab.until(f"{found} || {search}")
    tab.js("document.querySelector('#found button').click()")
    tab.until("document.querySelectorAll('#found article').length === 3")


def test_older_messages_come_by_scrolling_and_unread_ones_are_counted(running, browse):
    server = with_page(running)
    ben = server.guest()
    ben.enter_irc("ben", "JOIN #lobby")
    ben.send("".join(f"PRIVMSG #lobby :old {n}\r\n" for n in range(350)))
    ben.send("PING x\r\n")
    ben.until("PONG")
    tab = browse(server.address).enter("anna")
    tab.wait_for("old 349")
    assert len(tab.rows()) == 100
    tab.until("(log.scrollTop = 0, log.onwheel(), room('#lobby').whole && !drawnFrom)")
    assert tab.rows() == [f"old {n}" for n in range(350)]
    ben.send("PRIVMSG anna :psst\r\nPRIVMSG #lobby :at the end\r\n")
    tab.until("document.querySelector('#menu .badge').textContent === '2'")
    tab.tap("#newest")
    tab.until("document.querySelector('#menu .badge').textContent === '1'")
    tab.tap("#menu")
    tab.until("document.querySelector('#rooms').innerText.includes('ben')")
    tab.js("[...document.querySelectorAll('#rooms button')][1].click()")
    tab.wait_for("psst")
    tab.until("document.querySelector('#menu .badge').hidden")


def test_page_netcat_terminal_and_window_talk_and_see_one_picture(
    running, browse, terminal, window, tmp_path
):
    (tmp_path / "srv").mkdir()
    server = with_page(running, data=tmp_path / "srv")
    page = browse(server.address).enter("anna")
    netcat = server.guest("ned")
    term = terminal(server.address, "tom")
    term.sees("#lobby")
    wanda = at_home(window(server.address, name="wanda"))
    page.say("said in the page")
    netcat.send("said by netcat\n")
    term.type("said in the terminal\r")
    see(wanda, "said in the terminal")
    enter(wanda, "said in the window")
    (tmp_path / "tea.png").write_bytes(drawn_png(640, 480))
    page.choose(tmp_path / "tea.png")
    page.press("Send")
    term.shows("tea.")
    netcat.until("/files/")
    pump(wanda, wanda.transcript.text.image_names)
    page.wait_for("said by netcat", "said in the terminal", "said in the window")
    page.until("document.querySelector('#log .block img')?.naturalWidth > 0")


def test_a_page_that_was_kept_opens_without_its_server_and_shows_what_was_said(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    tab.say("remember this")
    tab.wait_for("remember this")
    tab.js("navigator.serviceWorker.ready.then(() => null)")
    tab.js(
        "new Promise(done => { const look = async () => (await stored('rooms'))"
        ".some(kept => kept.messages.length) ? done(null) : setTimeout(look, 50); look(); })"
    )
    server.stop()
    tab.ask("Page.navigate", url="about:blank")
    tab.go(tab.url)
    tab.wait_for("remember this")
    tab.say("written without network")
    tab.until("document.querySelector('#waiting .row').innerText.includes('written without')")
    tab.until("!document.querySelector('#phase').hidden")


@pytest.mark.parametrize("name", ["__proto__", "constructor", "toString", "hasOwnProperty"])
def test_names_that_javascript_knows_are_names_like_others(running, browse, name):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    odd = server.guest()
    odd.enter_irc(name, "CAP REQ :message-tags batch", "CAP END", "JOIN #lobby", f"JOIN #{name}")
    odd.send(f"PRIVMSG #lobby :from {name}\r\nPRIVMSG anna :privately\r\n")
    tab.wait_for(f"from {name}")
    id = tab.js("lastOf(room('#lobby').messages).id")
    odd.send(f"@+draft/reply={id};+draft/react={name} TAGMSG #lobby\r\n")
    odd.send("@+typing=active TAGMSG #lobby\r\n")
    tab.until(f"document.querySelector('.reactions button').textContent === '{name} 1'")
    tab.until(f"document.querySelector('#typing').textContent === '{name} typing'")
    tab.js(f"openRoom('{name}')")
    tab.wait_for("privately")
    tab.say("answer")
    assert odd.until("PRIVMSG")[-1].endswith(f"PRIVMSG {name} :answer\r")
    tab.js("document.querySelector('#text').focus()")
    tab.ask("Input.insertText", text=f"/{name} is no command")
    tab.js("document.querySelector('#send').click()")
    tab.wait_for(f"there is no /{name}")


def test_the_page_works_over_tls_where_it_can_be_installed(running, browse, certificate):
    server = with_page(running, tls_cert=certificate)
    tab = browse(f"https://localhost:{server.address[1]}/").enter("anna")
    tab.say("over tls")
    tab.wait_for("over tls")
    assert any(url.startswith("wss://localhost:") for url in tab.requests())
    tab.js("navigator.serviceWorker.ready.then(() => null)")
    found = tab.ask("Page.getAppManifest")
    assert found["errors"] == [] and json.loads(found["data"])["display"] == "standalone"
    errors = tab.ask("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [one["errorId"] for one in errors] == ["in-incognito"]  # as the tests are
    tab.js("settingsSheet()")
    assert "plain http" not in tab.text()


def test_an_empty_file_is_refused_and_nothing_waits_for_it(running, browse, tmp_path):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    (tmp_path / "empty.txt").write_bytes(b"")
    tab.choose(tmp_path / "empty.txt")
    tab.wait_for("empty.txt is empty")
    tab.say("after it")
    tab.wait_for("after it")


def test_a_message_whose_echo_was_lost_arrives_once_also_under_another_name(running, browse):
    server = with_page(running)
    witness = Witness(server.address)
    tab = browse(server.address).enter("anna")
    tab.js("globalThis.usual = leader.receive; leader.receive = () => null; null")
    tab.say("said as anna")
    witness.until("said as anna")
    tab.js("leader.send('NICK anne'); leader.send('PING :x')")
    witness.until("NICK")
    tab.js("leader.receive = usual; leader.socket.close()")
    tab.until("state.phase === 'online' && !state.outbox.length && !room('#lobby').behind")
    tab.say("and on it goes")
    assert witness.heard("and on it goes")[0] == ["and on it goes"]
    assert tab.rows() == ["said as anna", "and on it goes"]


def test_messages_of_a_server_that_lost_its_data_come_after_those_of_before(running, browse):
    tab, lines = None, [f"old {n}" for n in range(5)] + [f"new {n}" for n in range(5)]
    with Proxy(("127.0.0.1", 9)) as proxy:
        for texts in (lines[:5], lines[5:]):
            server = with_page(running)
            proxy.server = server.address
            tab = tab or browse(proxy.address).enter("anna")
            tab.until("state.phase === 'online'")
            tab.say(*texts)
            tab.until("!state.outbox.length && !room('#lobby').behind")
            server.stop()
            tab.until("state.phase !== 'online'")
    assert tab.rows()[-5:] == lines[5:]
    assert tab.rows() in (lines, lines[5:])


@pytest.mark.parametrize("after", some([0, 5, 20, 60], 2))
def test_a_long_paste_is_accepted_whole_or_not_at_all(running, browse, after):
    server = with_page(running)
    ben = server.guest()
    ben.enter_irc("ben", "CAP REQ :batch draft/multiline", "CAP END", "JOIN #lobby")
    tab = browse(server.address).enter("anna")
    lines = [f"line {n}" for n in range(600)]
    tab.js("document.querySelector('#text').focus()")
    tab.ask("Input.insertText", text="\n".join(lines))
    tab.js(
        "globalThis.old = true; document.querySelector('#send').click(); "
        f"document.querySelector('#send').click(); setTimeout(() => location.reload(), {after})"
    )
    tab.until("!globalThis.old && state.phase === 'online' && !room('#lobby').behind")
    tab.until("!state.outbox.length")
    if tab.js("document.querySelector('#text').value"):  # it was not accepted
        tab.js("document.querySelector('#send').click()")
    found = ben.until(":line 599")
    said = [line.rstrip().partition("PRIVMSG #lobby :")[2] for line in found]
    assert [text for text in said if text] == lines


def test_the_next_leader_fetches_what_was_said_without_a_leader(running, browse):
    server = with_page(running)
    ben = server.guest("ben")
    first = browse(server.address).enter("anna")
    second = browse(server.address)
    second.until("attached && state.phase === 'online'")
    second.js("globalThis.usual = apply; apply = () => null; null")  # as if it were asleep
    ben.send("".join(f"meanwhile {n}\n" for n in range(30)))
    first.wait_for("meanwhile 29")
    second.js("apply = usual; null")
    first.close()
    second.until("leader && state.phase === 'online' && !room('#lobby').behind")
    assert second.rows() == [f"meanwhile {n}" for n in range(30)]


def test_a_file_that_was_chosen_without_network_is_sent_when_there_is_one(
    running, browse, folder, tmp_path
):
    server = with_page(running, data=folder)
    (tmp_path / "notes.txt").write_text("x" * 1000)
    with Proxy(server.address) as proxy:
        tab = browse(proxy.address).enter("anna")
        proxy.server = ("127.0.0.1", 9)
        proxy.swallow()
        tab.js("leader.closed()")
        tab.until("state.phase !== 'online'")
        tab.choose(tmp_path / "notes.txt")
        tab.press("Send")
        tab.until("document.querySelector('#waiting progress')")
        proxy.server = server.address
        tab.until("document.querySelector('#log .card')")


def test_a_cancelled_file_is_never_sent(running, browse, folder, tmp_path):
    server = with_page(running, data=folder)
    (tmp_path / "notes.txt").write_text("x" * 3_000_000)
    tab = browse(server.address).enter("anna")
    tab.js("globalThis.usual = fetch; fetch = async (...a) => { await later; return usual(...a); }")
    tab.js("globalThis.later = new Promise(done => { globalThis.go = done; }); null")
    tab.choose(tmp_path / "notes.txt")
    tab.press("Send")
    tab.until("document.querySelector('#waiting progress')")
    tab.js("[...document.querySelectorAll('#waiting button')].pop().click()")
    tab.until("!document.querySelector('#waiting .row')")
    tab.js("go()")
    tab.until("!leader.uploader.running")
    assert tab.js("stored('outbox')") == []
    tab.say("nothing but this")
    tab.wait_for("nothing but this")
    assert tab.rows() == ["nothing but this"]


def test_a_removed_text_is_gone_from_quotes_too(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    tab.say("a secret")
    tab.until("!state.outbox.length")
    tab.js("setAnswer(lastOf(shown().messages))")
    tab.say("indeed")
    tab.until("document.querySelector('blockquote')?.textContent === 'anna: a secret'")
    tab.js("ask(`REDACT #lobby ${find(shown(), shown().messages.slice(-2)[0].id).id}`)")
    tab.until("document.querySelector('blockquote').textContent === 'anna: taken back'")
    assert "secret" not in tab.text()


def test_a_user_who_only_types_opens_no_conversation_and_styles_are_removed(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    ben = server.guest()
    ben.enter_irc("ben", "CAP REQ :message-tags", "CAP END", "JOIN #lobby")
    ben.send("@+typing=active TAGMSG anna\r\nPRIVMSG #lobby :\x02bold\x02 \x0304,01red\x03 end\r\n")
    ben.send("PRIVMSG anna :\x01VERSION\x01\r\nPRIVMSG #lobby :the end\r\n")
    tab.wait_for("the end")
    assert tab.rows() == ["bold red end", "the end"]
    assert tab.js("Object.keys(state.rooms)") == ["=#lobby"]


def test_a_channel_lists_all_members_and_can_be_left_and_removed(running, browse):
    server = with_page(running)
    for n in range(9):
        server.guest().enter_irc(f"user{n}", "JOIN #crew")
    first = browse(server.address, width=1200).enter("anna")
    second = browse(server.address, width=1200)
    second.until("attached && state.phase === 'online'")
    second.js("enter('#crew')")
    for tab in (second, first):
        tab.js("openRoom('#crew')")
        tab.until("document.querySelectorAll('#people button').length === 10")
    first.js("roomSheet()")
    first.press("Leave")
    first.until("!room('#crew').joined")
    first.js("roomSheet()")
    first.press("Remove from the list")
    for tab in (first, second):
        tab.until("Object.keys(state.rooms).join() === '=#lobby'")


def test_a_wrong_password_says_so_and_a_log_out_ends_the_log_in(running, browse):
    server = with_page(running)
    tab = browse(server.address).enter("anna")
    tab.js("act('signUp', 'tea and cake')")
    tab.until("state.account === 'anna' && setting('login')?.keys")
    tab.js("act('logOut')")
    tab.until("state.phase === 'online' && !state.account")
    thief = browse(server.address, user="thief")
    thief.fill("anna", "coffee")
    thief.until("document.querySelector('#title').textContent.startsWith('Not logged in')")


def test_a_message_elsewhere_leaves_the_focus_and_the_count_alone(running, browse):
    server = with_page(running)
    tab = browse(server.address, width=1200).enter("anna")
    ben = server.guest()
    ben.enter_irc("ben", "JOIN #lobby")
    tab.js("openRoom('ben')")
    tab.js(
        "document.querySelector('#rooms button').focus(); Date.prototype.toISOString = () => '1999'"
    )
    ben.send("PRIVMSG #lobby :hello anna\r\n")
    tab.until("room('#lobby').unread === 1")
    ben.send("PART #lobby\r\nJOIN #lobby\r\nPING x\r\n")
    ben.until("PONG")
    tab.until("room('#lobby').messages.length >= 3")
    tab.until("document.querySelector('#rooms .badge')?.textContent === '1'")
    assert tab.js("document.activeElement.closest('#rooms') !== null")


def test_a_server_with_a_password_is_entered_with_it(running, browse):
    server = with_page(running, password="sesame")
    tab = browse(server.address)
    tab.fill("anna", "")
    tab.until("document.querySelectorAll('#sheet input').length === 3")
    tab.fill("anna", "", "sesame")
    tab.until("state.phase === 'online'")
    tab.say("inside")
    tab.wait_for("inside")


def test_a_taken_name_is_asked_for_again(running, browse):
    server = with_page(running)
    server.guest("anna")
    tab = browse(server.address)
    tab.fill("anna")
    tab.until("document.querySelector('#title').textContent.includes('taken')")
    tab.fill("anne")
    tab.until("state.phase === 'online' && state.me === 'anne'")


# ======================================================================================
# MAIN
# ======================================================================================


class Program(subprocess.Popen):
    """A process that does not outlive the test."""

    def wait(self, timeout=None):
        """Until its end, not until the next of the looks that Popen takes; killed if late."""
        alarm = threading.Timer(timeout or PATIENCE, self.kill)
        alarm.start()
        try:
            return super().wait()
        finally:
            alarm.cancel()

    def __exit__(self, *exception):
        self.kill()
        super().__exit__(*exception)


@functools.cache
def compiled():
    """chat.pyc: to compile chat.py takes a process longer than all else at its start."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chat-tests-"))
    atexit.register(shutil.rmtree, folder)
    return py_compile.compile(str(HERE / "chat.py"), str(folder / "chat.pyc"), doraise=True)


LIMITED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import chat
vars(chat).update(json.loads(sys.argv[2]))
sys.exit(chat.main(sys.argv[3:]))
"""


def program(*arguments, limits=None, **options):
    """chat.py in a process of its own, with other limits where a test cannot wait so long."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    limited = ["-c", LIMITED, os.path.dirname(compiled()), json.dumps(limits)]
    command = limited if limits else [compiled()]
    return Program([sys.executable, *command, *map(str, arguments)], **{**pipes, **options})


def test_the_one_file_is_all_it_takes(tmp_path):
    """Every other test starts what it was compiled to, or imports it."""
    alone = shutil.copy(HERE / "chat.py", tmp_path)
    command = [sys.executable, "-I", alone, "--help"]
    said = subprocess.run(command, capture_output=True, cwd=tmp_path, check=True)
    assert said.stdout.startswith(b"usage: chat.py ") and said.stderr == b""
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.py"]


@contextlib.contextmanager
def serving(*arguments, **options):
    """A server process; yields it and its address."""
    with program("server", "--listen", "127.0.0.1:0", *arguments, **options) as process:
        try:
            address = process.stdout.readline().split()[4].decode()
            host, port = address.split(":")
            yield process, (host, int(port))
        finally:
            process.kill()


@pytest.fixture
def nats(folder):
    """A NATS server with JetStream; its URL."""
    if not shutil.which("nats-server"):
        assert "CHAT_NEEDS_NATS" not in os.environ, "nats-server is not installed"
        pytest.skip("nats-server is not installed")
    where = folder / "nats"
    where.mkdir()
    command = ["nats-server", "-a", "127.0.0.1", "-p", "-1", "-js", "-sd", where]
    command += ["--ports_file_dir", where]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: [*where.glob("*.ports")])
            (ports,) = where.glob("*.ports")
            assert eventually(lambda: ports.read_text())
            yield json.loads(ports.read_text())["nats"][0]
        finally:
            process.kill()


def test_two_nodes_over_a_real_nats_server_are_one_chat_also_when_one_is_killed(folder, nats):
    names = ("n1", "n2")
    given = {name: ("--cluster", nats, "--node", name, "--data", folder / name) for name in names}
    with serving(*given["n1"]) as (first, one), serving(*given["n2"]) as (second, two):
        bob = Guest(two, "bob")
        bob.send("here\n")
        servers = f"irc://{one[0]}:{one[1]},irc://{two[0]}:{two[1]}"
        with piped("alice", servers.removeprefix("irc://")) as alice:
            lines = [f"line {n}\n".encode() for n in range(100)]
            alice.stdin.write(b"".join(lines[:51]))
            alice.stdin.flush()
            assert bob.until("alice: line 20")
            first.kill()
            alice.stdin.write(b"".join(lines[51:]))
            alice.stdin.close()
            assert bob.until("alice: line 99")
            assert alice.wait(PATIENCE) == 0
        first.wait(PATIENCE)
        with serving(*given["n1"]) as (again, one):
            carol = Guest(one, "carol")
            carol.send("hello\n")
            assert bob.until("carol: hello")
            with program("backup", folder / "copy.db", "--data", folder / "n1") as copying:
                assert copying.wait(PATIENCE) == 0
            for process in (again, second):
                process.send_signal(signal.SIGTERM)
            assert again.wait(PATIENCE) == second.wait(PATIENCE) == 0
    stores = [chat.Store(folder / name / "chat.db", node=True) for name in names]
    one, two = (texts(store, chat.LOBBY, 200) for store in stores)
    assert one == two == ["here", *(f"line {n}" for n in range(100)), "hello"]
    for store in stores:
        store.close()
    with contextlib.closing(chat.connect(folder / "copy.db", "ro")) as db:
        assert not db.execute("SELECT * FROM origins").fetchall()
    copy = chat.Store(folder / "copy.db", node=True)
    assert chat.restore_node(copy, "x").nodes.keys() == {"n1", "n2"}
    copy.close()


@pytest.mark.parametrize(
    "arguments, reason",
    (
        (("--cluster", "nats://127.0.0.1"), b"--cluster needs --node NAME"),
        (("--node", "n1"), b"of no use without --cluster"),
        (("--cluster", "nats://h", "--node", "a", "--data", "none"), b"needs a data folder"),
        (("--cluster", "nats://user:secret@"), b"write nats://HOST:4222"),
        (("--cluster", "http://h", "--node", "n1"), b"write nats://HOST:4222"),
    ),
)
def test_a_node_that_cannot_be_says_why_and_shows_no_password(folder, arguments, reason):
    given = arguments if "none" in arguments else ("--data", folder, *arguments)
    with program("server", *given) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode in (1, 2) and reason in said and b"secret" not in said


def test_the_password_of_an_account_is_not_changed_in_the_database_of_a_node(folder):
    chat.Store(folder / "chat.db", node=True).close()
    arguments = ("passwd", "alice", "--data", folder, "--password", "secret")
    with program(*arguments) as process:
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and b"is a node of a cluster" in said


def test_a_terminated_server_says_goodbye_keeps_everything_and_exits_with_0(folder):
    with serving("--data", folder) as (process, address):
        guest = Guest(address, "alice")
        guest.send("remember me\n/names\n")
        guest.line()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert guest.rest() == b"* the server is going down\n"
        guest.close()
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 2
        assert process.stderr.read() == b""
    store = chat.Store(folder / "chat.db")
    assert texts(store, chat.LOBBY) == ["remember me"]
    store.close()
    modes = {oct(path.stat().st_mode)[-3:] for path in folder.iterdir()}
    assert modes == {"600", "700"}  # of files, and of the folder for uploads


def test_operators_end_and_restart_the_server(folder):
    with serving("--data", folder, "--oper", "boss:secret", "--name", "irc.test") as (
        process,
        there,
    ):
        guest = Guest(there)
        guest.send("NICK alice\r\nUSER u 0 * :r\r\nOPER boss secret\r\nRESTART\r\n")
        assert b":irc.test 381 alice " in (out := guest.rest())
        assert out.endswith(b"ERROR :the server is going down\r\n")
        guest.close()
        host, port = process.stdout.readline(), None
        while b"listens on" not in host:  # the rest of the first start's lines
            host = process.stdout.readline()
        port = int(host.split()[4].split(b":")[1])
        guest = Guest((there[0], port))
        guest.send("NICK alice\r\nUSER u 0 * :r\r\nOPER boss secret\r\nDIE\r\n")
        assert guest.rest().endswith(b"ERROR :the server is going down\r\n")
        guest.close()
        assert process.wait(PATIENCE) == 0


def test_a_user_with_access_to_the_files_sets_another_password_while_the_server_runs(folder):
    with serving("--data", folder) as (process, address):
        alice = Guest(address, "alice")
        alice.send("/register swordfish99\n")
        assert "alice is yours" in alice.line()
        for name, words in (("absent", b"no account absent"), ("alice", b"")):
            flags = ("--data", folder, "--password", "anotherword")
            with program("passwd", name, *flags) as passwd:
                assert words in passwd.communicate()[1]
        bob = Guest(address, "bob")
        bob.send("/login alice swordfish99\n/login alice anotherword\n")
        assert bob.line() == "* name or password are wrong"
        assert bob.line() == "* you are logged in as alice"
        process.kill()
    store = chat.Store(folder / "chat.db")
    assert [account.verifier.rounds for account in store.accounts()] == [SLOW_ROUNDS]
    store.close()


def test_what_was_acknowledged_survives_kill_9(folder):
    acknowledged = []
    for _ in range(3):
        with serving("--data", folder, "--flood", "off") as (process, address):
            guest = Guest(address, "alice")
            guest.send("".join(f"/tell #lobby {n}\n" for n in range(len(acknowledged), 20_000)))
            acknowledged += [line.split()[-1] for line in guest.lines(300)]
            process.kill()
            rest = guest.rest().decode()
            acknowledged += re.findall(r"told #lobby: (\d+)\n", rest)
    store = chat.Store(folder / "chat.db")
    kept = texts(store, chat.LOBBY, 100_000)
    assert len(acknowledged) >= 900
    assert collections.Counter(kept) >= collections.Counter(acknowledged)
    store.close()


KILLS = int(os.environ.get("CHAT_KILLS", "2"))  # 20 takes a minute


def test_what_was_echoed_before_kill_9_is_in_the_history_once(folder, seeded):
    echoed = []
    for kill in range(KILLS):
        with serving("--data", folder, "--flood", "off") as (process, address):
            guest = Guest(address)
            caps = "CAP REQ :echo-message message-tags batch draft/chathistory"
            guest.enter_irc(f"alice{kill}", "JOIN #a", caps)
            text = "".join(f"PRIVMSG #a :{kill}.{n}\r\n" for n in range(3000))
            sender = threading.Thread(target=guest.send, args=(text,))
            sender.start()
            for _ in range(seeded.randrange(1, 2500)):
                echoed.append(re.search(r"msgid=(\w+).* :(\S+)", guest.line()).groups())
            process.kill()
            rest = guest.rest().decode().split("\r\n")[:-1]
            with contextlib.suppress(OSError):
                sender.join(PATIENCE)
            echoed += [re.search(r"msgid=(\w+).* :(\S+)", line).groups() for line in rest]
            guest.close()
    with contextlib.closing(sqlite3.connect(folder / "chat.db")) as db:
        rows = db.execute("SELECT id, text FROM events WHERE kind = 'message'").fetchall()
        ids = chat.MessageIds(db.execute("SELECT * FROM starts").fetchall())
    kept = collections.Counter((ids.text(id), text) for id, text in rows)
    assert [one for one in echoed if kept[one] != 1] == []


@pytest.mark.parametrize(
    "host, web, addresses",
    [
        ("127.0.0.1", {}, ["http://localhost:7000/"]),
        ("192.168.1.5", {}, ["http://192.168.1.5:7000/"]),
        ("fd00::5", {}, ["http://[fd00::5]:7000/"]),
        ("0.0.0.0", {}, ["http://localhost:7000/"]),  # without a network
        ("0.0.0.0", {"address": "10.0.0.2"}, ["http://localhost:7000/", "http://10.0.0.2:7000/"]),
        ("::", {"address": "[fd00::5]"}, ["http://localhost:7000/", "http://[fd00::5]:7000/"]),
        (
            "127.0.0.1",
            {"url": "https://chat.example"},
            ["http://localhost:7000/", "https://chat.example/"],
        ),
    ],
)
def test_the_page_has_an_address_for_this_machine_and_one_for_others(host, web, addresses):
    listener = types.SimpleNamespace(address=(host, 7000))
    site = types.SimpleNamespace(web=chat.Web(**web))
    assert chat.web_addresses(types.SimpleNamespace(listeners=[listener], site=site)) == addresses


@pytest.mark.parametrize(
    "hosts, address",
    [
        (["0.0.0.0"], "10.0.0.2"),
        (["127.0.0.1", "10.0.0.2"], "10.0.0.2"),
        (["::"], "[fd00::5]"),
        (["127.0.0.1", "::1"], ""),
        (["10.0.0.3"], ""),
    ],
)
def test_the_address_of_the_default_route_counts_if_the_server_listens_there(
    monkeypatch, hosts, address
):
    class Routed(socket.socket):
        def connect(self, far):
            pass

        def getsockname(self):
            return ("10.0.0.2" if self.family == socket.AF_INET else "fd00::5", 9)

    monkeypatch.setattr(chat.socket, "socket", Routed)
    assert chat.network_address(hosts) == address


def test_a_server_tells_its_address_for_browsers_and_shows_the_code_on_request():
    flags = ("--listen", "127.0.0.1:0", "--data", "none")
    for more in ((), ("--qr",)):
        with program("server", *flags, *more) as server:
            lines = [server.stdout.readline().decode().rstrip("\n")]
            while not lines[-1].startswith("browser:"):
                lines.append(server.stdout.readline().decode().rstrip("\n"))
            port = re.match(r"chat\.py .* on 127\.0\.0\.1:(\d+) ", lines[0])[1]
            url = f"http://localhost:{port}/"
            assert lines[-1] == f"browser:  {url}"
            for row in chat.qr_rows(url) if more else ():
                assert server.stdout.readline().decode() == f"{row}\n"
            server.terminate()
            assert server.stdout.read() == b""


def test_a_second_server_on_the_same_folder_says_so(folder):
    with serving("--data", folder), program("server", "--data", folder) as second:
        assert second.wait(PATIENCE) == 1
        assert f"another server uses {folder}" in second.stderr.read().decode()


WRONG_COMMAND_LINES = [  # the status, and what is said
    (["server", "--data", "/proc/nothing"], 1, "cannot use /proc/nothing"),
    (["server", "--flood", "much"], 2, "write BURST,RATE or off"),
    (["server", "--listen", "nowhere:70000"], 2, "write HOST:PORT"),
    (
        ["server", "--listen", "127.0.0.1:0", "--data", "none", "--tls-cert", "/none"],
        1,
        "cannot use the certificate",
    ),
    (["server", "--keep", "0"], 2, "a whole number from 1 on"),
    (["client", "alice", "--server", "ftp://x"], 2, "write HOST:PORT"),
    (
        ["client", "alice", "--server", "irc://127.0.0.1:1", "--no-state"],
        1,
        "connection refused",
    ),
    (["client", "alice", "--server", "127.0.0.1:1"], 1, "connection refused"),
    (["client"], 2, "required: NAME"),
    (["client", "NICK"], 1, "cannot be a name"),
    (["client", "/quit"], 1, "cannot be a name"),
    (["client", " "], 1, "cannot be a name"),
    (["client", "alice", "--server", "a..b", "--no-state"], 1, "no name of a host"),
    (["server", "--flood", "nan,nan"], 2, "at least 1 line"),
    (
        ["server", "--listen", "127.0.0.1:0", "--data", "none", "--tls-client-ca", "x"],
        1,
        "--tls-client-ca and --sts are of no use",
    ),
    (
        ["server", "--listen", "127.0.0.1:0", "--data", "none", "--tls-key", "x"],
        1,
        "--tls-cert",
    ),
    (["bench", "--rate", "-1"], 2, "messages a second"),
    (["client", "alice", "--login", "alice:@/none"], 1, "cannot read the password in /none: no"),
    (["server", "--oper", "boss:@/dev/stdin"], 1, "the password in /dev/stdin is not UTF-8 text"),
    (["server", "--password", "\udcff"], 1, "on the command line is not UTF-8 text"),
    (["server", "--sendmail", "mail 'x"], 2, "No closing quotation"),
    (
        ["server", "--data", "none", "--motd", "/"],
        1,
        "cannot read the message of the day /: is a directory",
    ),
    (["bench", "--payload", "16384"], 2, "at most 16,128 bytes"),
    (["client", "alice", "--pin", "zz"], 2, "64 hexadecimal digits"),
    (["client", "alice", "--sasl", "OAUTH"], 2, "SCRAM-SHA-256, EXTERNAL and PLAIN"),
    (["client", "a" * 65], 1, "a name has at most 64 bytes"),
    (["server", "--oper", "boss:@/dev/null"], 1, "the password in /dev/null is empty"),
    (["client", "alice", "--login"], 1, "no password was typed; it can be given as @FILE"),
    (["dance"], 2, "invalid choice"),
]


def test_a_wrong_command_line_is_one_clear_line_and_no_traceback():
    with contextlib.ExitStack() as stack:
        started = [
            # without a terminal of its own that a password could be asked for at
            (stack.enter_context(program(*arguments, start_new_session=True)), arguments, *wanted)
            for arguments, *wanted in WRONG_COMMAND_LINES
        ]
        for process, arguments, status, words in started:
            errors = process.communicate(b"\xff")[1].decode()
            assert process.wait(PATIENCE) == status, arguments
            assert words in errors and "Traceback" not in errors, arguments


def test_when_descriptors_run_out_newcomers_are_told_and_the_others_talk_on(folder):
    resource = pytest.importorskip("resource")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    with serving("--data", "none", "--max-clients", "1000", preexec_fn=limit) as (process, address):
        inside = [Guest(address, f"n{n}") for n in range(8)]
        outside = [Guest(address) for _ in range(60)]
        answers = {guest.file.readline() for guest in outside}
        full = b"* this server has no file descriptors left (ulimit -n); try again later\n"
        assert answers <= {chat.GREETING, full} and full in answers
        inside[0].send("still here\n")
        assert inside[1].until("n0: still here")
        for guest in outside:
            guest.close()
        while Guest(address).file.readline() != chat.GREETING:
            pass  # until the server has seen the others go
        process.kill()
        errors = process.stderr.read().decode()
    assert "cannot accept: too many open files" in errors and "Traceback" not in errors


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
def test_an_idle_connection_costs_little_memory(folder):
    def resident(process):
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    with serving("--data", "none") as (process, address):
        asker = Guest(address, "asker")
        before = resident(process)
        guests = [socket.create_connection(address) for _ in range(1000)]
        for guest in guests:
            assert guest.recv(100) == chat.GREETING
        asker.send("/names\n")
        asker.line()
        assert (resident(process) - before) / 1000 < 3 * 1024
        for guest in guests:
            guest.close()


# Bench, and how it all reads


def test_the_benchmark_measures_a_server_of_its_own():
    arguments = ["--clients", 5, "--senders", 2, "--messages", 200, "--json"]
    with program("bench", *arguments, limits={"BENCH_QUIET_SECONDS": 0.1}) as process:
        out, errors = process.communicate(timeout=PATIENCE)
    result = json.loads(out)
    assert (
        result["deliveries_per_s"] > 0
        and 0 < result["p50_ms"] <= result["p99_ms"] <= result["p999_ms"]
    )
    assert errors == b""


def test_a_benchmark_that_cannot_connect_all_clients_says_so_in_one_line(running):
    resource = pytest.importorskip("resource")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40))
    arguments = ("--server", "{}:{}".format(*running().address), "--clients", 100)
    with program("bench", *arguments, preexec_fn=limit) as process:
        out, errors = process.communicate()
    assert errors.startswith(b"chat.py: ") and errors.endswith(b": too many open files\n")
    assert process.returncode == 1 and errors.count(b"\n") == 1 and out == b""


def test_the_benchmark_keeps_a_rate_and_prints_a_table(running):
    where = "{}:{}".format(*running().address)
    arguments = ["--server", where, "--clients", 3, "--senders", 1, "--messages", 30, "--rate", 300]
    with program("bench", *arguments, limits={"BENCH_QUIET_SECONDS": 0.1}) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert b"30 messages, 1 sender" in out and b"latency p99.9" in out


FILES = [HERE / name for name in ("chat.py", "gui_client.py") if (HERE / name).exists()]
BELOW_THE_WATER = {"socket", "selectors", "select", "threading", "termios", "signal", "time", "os"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


@functools.cache
def nodes_of(path):
    return list(ast.walk(ast.parse(path.read_text())))


def deepest(node, depth=0):
    """How deep the blocks of a function are nested; elif does not count as deeper."""
    found = depth
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.expr, *FUNCTIONS, ast.ClassDef)):
            is_elif = isinstance(node, ast.If) and node.orelse == [child]
            is_deeper = isinstance(child, BLOCKS) and not (is_elif and isinstance(child, ast.If))
            found = max(found, deepest(child, depth + is_deeper))
    return found


README = pathlib.Path(chat.__file__).with_name("README.md")


def test_the_readme_is_short_where_newcomers_read_and_names_all_that_there_is():
    text = README.read_text(encoding="utf-8")
    first, _, reference = text.partition("\n# Reference\n")
    assert len(first) <= 9_000
    anchors = {re.sub(r"[^a-z -]", "", line.lower()).strip().replace(" ", "-")
               for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}  # fmt: skip
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("http"):
            assert (README.parent / link).exists(), link
    parser = chat.command_line()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    for name in ("server", "client"):
        for action in commands[name]._actions:
            flag = action.option_strings[-1] if action.option_strings else "NAME"
            assert flag in text or flag == "--help", flag
    for verb in chat.client_command:
        assert f"`/{verb}" in reference, verb


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_functions_are_short_and_shallow(path):
    for node in nodes_of(path):
        length = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, FUNCTIONS):
            assert length <= 60, f"{node.name} has {length} lines"
            assert deepest(node) <= 3, f"{node.name} is nested too deep"


def test_above_the_waterline_there_is_no_operating_system():
    source = (HERE / "chat.py").read_text()
    waterline = source[: source.index("THE WATERLINE")].count("\n")
    for node in nodes_of(HERE / "chat.py"):
        if (
            isinstance(getattr(node, "ctx", None), ast.Load)
            and getattr(node, "id", "") in BELOW_THE_WATER
        ):
            assert node.lineno > waterline, f"{node.id} in line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_everything_is_defined_before_it_is_used(path):
    tree, *_ = nodes = nodes_of(path)
    defined = {}
    for node in tree.body:
        stored = [
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        ]
        for name in [node.name] if hasattr(node, "name") else stored:
            defined.setdefault(name, node.lineno)
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            assert defined.get(node.id, 0) <= node.lineno, f"{node.id} in line {node.lineno}"


def test_the_title_page_names_every_section():
    source = (HERE / "chat.py").read_text()
    title, _, _ = source.partition('"""\n\nfrom')
    for banner in re.findall(r"# =+\n# ([A-Z ]+)\n# =+", source):
        assert f"\n    {banner}" in title, banner
