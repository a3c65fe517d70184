#!/usr/bin/env python3
"""The chat's window: the client core of chat.py, shown with Tkinter.

    python3 gui_client.py              asks for a name and a server
    python3 gui_client.py alice        connects at once

Sections, in reading order; each uses only what stands above it:

    WHAT IS SHOWN   views as coloured text, and what is counted: no widgets here
    ENGINE          the core, its connection and its loop, in a thread of their own
    REMEMBERED      the last name and server, in a small private file
    LOOK            fonts and colours
    FIELDS          where text is typed
    PARTS           the transcript, the people, the card that asks whom to connect to
    WINDOW          everything together, opening and closing
    MAIN            the command line

Two threads, and what goes between them:

    Tk -> engine    Engine.submit(): a call that the loop makes in its next turn
    engine -> Tk    a queue of views, the newest Snapshot, and one byte that wakes Tk

The engine's thread never touches Tk, and Tk never reads what belongs to the engine.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import gc
import itertools
import logging
import os
import pathlib
import queue
import re
import signal
import socket
import sys
import threading
import time
import unicodedata
import webbrowser
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

try:
    import tkinter as tk
    from tkinter import font as tkfont
    from tkinter import ttk
except ImportError:  # Debian and others have it in a package of its own
    sys.exit("gui_client.py: this Python has no Tkinter; on Debian, apt install python3-tk")

import chat

log = logging.getLogger("chat.window")

# ======================================================================================
# WHAT IS SHOWN
# ======================================================================================
# Views come in, pieces go out: text and its tags in turn, as a Text widget takes them in
# one call. Everything is counted here, in lines and messages, never in widget indices:
# those count an emoji as two.

LINES_KEPT = 5000  # of the transcript; older ones are in the server's history
TRIM_LINES = 500  # dropped at a time: one deletion costs the same for one line
LINE_SHOWN = 1000  # characters of one line: a line of 100 kB takes Tk half a second to lay out
NAME_SHOWN = 80  # characters of a name
SPEAKERS_KEPT = 50  # offered first when a name is completed
NAME_TAGS = 12

LINK = re.compile(r"https?://[^\s<>\"]*[^\s<>\".,;:!?)\]}']")


class Snapshot(NamedTuple):
    """How things stand, copied in the engine's thread: Tk sees nothing else of the core."""

    name: str = ""
    here: str = chat.LOBBY
    people: tuple[str, ...] = ()  # here
    rooms: tuple[str, ...] = (chat.LOBBY,)
    inside: bool = True  # of the channel that is looked at
    ready: bool = False  # the server has our name
    status: str = "not connected"
    reason: str | None = None  # why it is over; "" because we left; None while it is not


NOT_CONNECTED = Snapshot()


def whole(text: str) -> str:
    """`text` with surrogate pairs joined and lone ones dropped: no encoder takes those."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")


key_of = functools.lru_cache(maxsize=16 * 1024)(chat.fold)  # names come again and again


def name_tag(name: str) -> str:
    """The tag with a person's colour: the same person has the same one everywhere."""
    return f"name{zlib.crc32(key_of(name).encode()) % NAME_TAGS}"


def is_private(view: chat.View) -> bool:
    return bool(view.where) and not chat.is_channel(view.where)


def linked(text: str, *tags: str) -> list:
    """`text` as pieces, with the links in it tagged."""
    pieces, end = [], 0
    for match in LINK.finditer(text):
        pieces += [text[end : match.start()], tags, match.group(), (*tags, "link")]
        end = match.end()
    return [*pieces, text[end:], tags]


def place_of(view: chat.View, here: str) -> str:
    """Return the conversation of a view; "" if it is the one that is looked at."""
    return "" if key_of(view.where) in ("", key_of(here)) else view.where


def id_tags(view: chat.View) -> tuple[str, ...]:
    """Return the tags by which a message is found again, to be removed."""
    ids = (f"id-{view.id}" * bool(view.id), f"own-{view.own_id}" * bool(view.own_id))
    return tuple(filter(None, ids))


def said_row(view: chat.View, clock: str, here: str = chat.LOBBY) -> list:
    """Return a message: the time, name and place, the text; more lines stand below it."""
    private = is_private(view)
    over = ("private",) if private else ("mention",) if view.called else ()
    over += id_tags(view)
    elsewhere = f"(to {view.where}) " if view.mine else "(private) "
    place = place_of(view, here)
    where = elsewhere if private else f"[{place}] " if place else ""
    speaker = "" if private and view.mine else f"{view.name}: "
    first, *others = view.text.split("\n")
    return [
        *(f"{clock}\t", ("row", "dim", *over)),
        *(where, ("row", "where", *over)),
        *(speaker, ("row", *over, name_tag(view.name), "name")),
        *linked(first, "row", *over),
        *itertools.chain(*(linked(f"\n{line}", "row", "more", *over) for line in others)),
        *("\n", ("row", *over)),
    ]


def told_row(view: chat.View, clock: str, here: str = chat.LOBBY) -> list:
    """Return a row that is no message: joins, quits, texts of the server and of the client."""
    where = f" {place_of(view, here)}".rstrip()
    if view.kind == chat.CAME:
        text = f"\u2192 {view.name} joined{where}"
    elif view.kind == chat.WENT:
        text = f"\u2190 {view.name} left{where}"
    elif view.kind == chat.NOTICED:
        text = f"-{view.name}- {view.text}"
    elif view.kind == chat.FOUND:
        text = f"{view.name}: {view.text}"
    else:
        text = f"in {view.where}: {view.text}" if view.kind == chat.PEOPLE else view.text
    tags = ("row", "dim", "table") if "  " in text else ("row", "dim")
    return [f"{clock}\t", ("row", "dim"), *linked(text, *tags), "\n", ("row",)]


def moment_of(view: chat.View) -> datetime.datetime:
    """When it was, by the clock on this person's wall."""
    try:
        return datetime.datetime.fromtimestamp(
            time.time() if view.time is None else view.time / 1000
        )
    except (ValueError, OverflowError, OSError):  # no calendar has this: the server made it up
        return datetime.datetime.now()


def broken(text: str) -> str:
    """Return `text` with its longest lines broken: Tk lays out lines, one at a time."""
    if len(text) <= LINE_SHOWN:
        return text
    parts = (
        line[n : n + LINE_SHOWN]
        for line in text.split("\n")
        for n in range(0, max(1, len(line)), LINE_SHOWN)
    )
    return "\n".join(parts)


def shorter(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\u2026"


def shortened(view: chat.View) -> chat.View:
    """Names no longer than a window shows: a plain server's can be as long as its lines. A
    text is whole, and one that is given back is as it was."""
    name, where = shorter(view.name, NAME_SHOWN), shorter(view.where, NAME_SHOWN)
    text = view.text if view.kind == chat.BACK else broken(view.text)
    return view._replace(text=text, name=name, where=where, line="")


class Conversation:
    """Forms what is shown and counts it."""

    def __init__(self) -> None:
        self.lines = 0  # in the transcript
        self.below = 0  # messages that came below the part being read
        self.unread = 0  # messages that came while the window was not looked at
        self.alert = False  # one of them was for us; the window takes this back
        self.day = datetime.date.today()
        self.speakers: collections.deque[str] = collections.deque(maxlen=SPEAKERS_KEPT)
        self.here = chat.LOBBY  # the conversation that is looked at
        self.own: dict[str, str] = {}  # our ids of our messages, by the server's

    def add(self, view: chat.View, focused: bool, at_bottom: bool) -> list:
        """The pieces that show a view."""
        moment = moment_of(view)
        pieces = self._new_day(moment.date())
        clock = f"{moment:%H:%M}"
        if view.kind == chat.SAID:
            self._count(view, focused, at_bottom)
            pieces += said_row(view, clock, self.here)
        else:
            pieces += told_row(view, clock, self.here)
        self.lines += sum(text.count("\n") for text in pieces[::2])
        return pieces

    def _new_day(self, day: datetime.date) -> list:
        if day == self.day:
            return []
        self.day = day
        return [f"{day:%A}, {day.day} {day:%B %Y}\n", ("row", "day")]

    def _count(self, view: chat.View, focused: bool, at_bottom: bool) -> None:
        if view.mine or view.past:  # our own words, and history, are not news
            return
        if not self.speakers or self.speakers[-1] != view.name:
            self.speakers.append(view.name)
        self.below += not at_bottom
        self.unread += not focused
        self.alert |= not focused and view.called

    def tags_of(self, id: str) -> tuple[str, ...]:
        """Return the tags of a message that was taken back."""
        own = self.own.pop(id, "")
        return (f"id-{id}", *([f"own-{own}"] if own else []))

    def excess(self, at_bottom: bool = True) -> int:
        """How many of the oldest lines are to go now; they count as gone. While the user reads
        back, more are kept."""
        kept = LINES_KEPT if at_bottom else 4 * LINES_KEPT
        if self.lines < kept + TRIM_LINES:
            return 0
        excess, self.lines = self.lines - LINES_KEPT, LINES_KEPT
        return excess

    def candidates(self, snapshot: Snapshot, word: str, first: bool) -> list[str]:
        """Return completions of a word: the users who spoke last come first."""
        recent = [name for name in reversed(self.speakers) if name in snapshot.people]
        names = dict.fromkeys((*recent, *snapshot.people))
        names.pop(snapshot.name, None)
        return chat.completions(word, first, names, snapshot.rooms)


def title_text(snapshot: Snapshot, server: str, unread: int) -> str:
    """(3) alice - 127.0.0.1:7000: what a task bar has room for comes first."""
    parts = [part for part in (snapshot.name, server) if part]
    return (f"({unread}) " if unread else "") + " \u2013 ".join([*parts, "chat"])


def status_text(snapshot: Snapshot, server: str) -> str:
    if snapshot.reason is not None:
        return snapshot.reason or "not connected"
    return f"connected to {server} as {snapshot.name}" if snapshot.ready else snapshot.status


def placeholder_text(snapshot: Snapshot) -> str:
    return f"Message {snapshot.here}" if snapshot.ready else "Message, sent once we are connected"


# ======================================================================================
# ENGINE
# ======================================================================================
# The same client that runs in a terminal, in a thread of its own. What it has to show
# waits in a queue that holds no more than the window would keep anyway; how things stand
# is one immutable tuple, replaced as a whole: only the newest ever matters.

MOVES_EACH = 10  # joins and quits of a minute that have rows of their own
LEAVE_SECONDS = 0.8  # to hear the server out; the window is gone within a second


class Engine(chat.Client):
    """A client whose screen is a queue. `wake` is called when there is something new."""

    def __init__(self, options: chat.ClientOptions, wake: Callable[[], None]):
        super().__init__(options)
        self.wake = wake
        self.views: queue.SimpleQueue[chat.View] = queue.SimpleQueue()
        self.status = f"connecting to {options.target}"
        self.snapshot = Snapshot(options.name, status=self.status)
        self.ended: str | None = None
        self.was_up = False  # when we last said how the connection is
        self.told_why = False  # there is no connection
        self.crowded: dict[str, bool] = {}  # conversations where joins and quits are one row
        self.asked = False  # who is here: otherwise the list beside the transcript tells
        self.news = False
        self.moved = False  # users came or went
        self.lock = threading.Lock()  # guards `alive`: nothing is handed to a closed loop
        self.alive = True
        self.loop.turn_ends = self.publish
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # Called by Tk

    def start(self) -> None:
        self.thread.start()

    def submit(self, callback: Callable[[], Any]) -> None:
        """Have the engine's thread call back, if it is still there."""
        with self.lock:
            if self.alive:
                self.loop.call_soon_threadsafe(callback)

    def say(self, text: str) -> None:
        self.submit(functools.partial(self._typed, text))

    def leave(self, reason: str = "") -> None:
        self.submit(functools.partial(self._leave, reason))

    # In the engine's own thread

    def show_kept(self) -> None:
        """Show what the store has of earlier runs: one transcript for all conversations."""
        kept = [view for room in self.core.rooms.values() for view in room.views]
        self.show(sorted(kept, key=lambda view: view.time or 0))

    def _work(self) -> None:
        try:
            self.show_kept()
            self.run()
        except Exception as error:
            log.exception("a bug, please report it")
            self.ended = f"internal error: {error}"
        finally:
            with self.lock:
                self.alive = False
            self.publish()
            if self.link.conn:
                self.link.conn.sock.close()
            self.loop.close()

    def _typed(self, text: str) -> None:
        self.asked = text.startswith("/names")
        self.link.typed(text)

    def _leave(self, reason: str) -> None:
        self.loop.call_later(LEAVE_SECONDS, lambda: self.over(""))
        self.link.leave(at_once=True, reason=reason)

    def over(self, reason: str) -> None:
        self.ended = reason
        super().over(reason)

    def show(self, views: list[chat.View]) -> None:
        for view in views:
            if self._worth_showing(view):
                self.views.put(shortened(view))
                self.news = True

    def _worth_showing(self, view: chat.View) -> bool:
        if view.kind in (chat.OLDER, chat.PLACE, chat.CLEARED):
            return False
        if view.kind in (chat.CAME, chat.WENT):  # many of them will be one row
            room = self.core.find(view.where)
            folded = room is not None and any(one is view for one in reversed(room.moves))
            self.crowded[view.where] = folded and len(room.moves) > MOVES_EACH
            return not self.crowded[view.where]
        if view.kind == chat.MOVED:
            return self.crowded.pop(view.where, False)
        if view.kind in (chat.STATUS, chat.UP):
            # The status line has it all; the transcript tells when we came and were cut off.
            self.status = view.text
            was_up, self.was_up = self.was_up, self.link.conn is not None
            first = not self.told_why and self.link.again is not None
            self.told_why = self.told_why or first
            return self.was_up != was_up or first
        if view.kind == chat.PEOPLE:
            self.moved = True
            asked, self.asked = self.asked and bool(view.text), self.asked and not view.text
            return asked
        return True

    def publish(self) -> None:
        """At the end of a turn: let Tk know, once, whatever the turn brought."""
        core = self.core
        state = (core.name, core.here, core.ready, self.status, self.ended)
        last = self.snapshot
        if self.moved or state != (last.name, last.here, last.ready, last.status, last.reason):
            self.snapshot = self._snapshot()
            self.moved, self.news = False, True
        with contextlib.suppress(queue.Empty):  # Tk was faster, and took it
            while self.views.qsize() > LINES_KEPT:
                self.views.get_nowait()
        if self.news:
            self.news = False
            self.wake()

    def _snapshot(self) -> Snapshot:
        core = self.core
        people = tuple(dict.fromkeys((core.name, *(core.room.people if core.room else ()))))
        return Snapshot(
            core.name,
            core.here,
            people if core.ready else (),
            tuple(room.name for room in core.rooms.values()),
            not core.room or not core.room.is_channel or core.room.inside,
            core.ready,
            self.status,
            self.ended,
        )


# ======================================================================================
# REMEMBERED
# ======================================================================================
# A person who comes back finds the fields filled in. Written as a whole or not at all, and
# readable by that person alone.


class Remembered(chat.Memory):
    """The name and the server of the last time, in a private file."""

    def load(self) -> tuple[str, str]:
        """Name and server, "" each if not known."""
        kept = self.read()
        return str(kept.get("name", "")), str(kept.get("server", ""))

    def save(self, name: str, server: str) -> None:
        self.write(name=name, server=server)


# ======================================================================================
# LOOK
# ======================================================================================
# ttk's styles do not reach Text widgets, so both are given their colours from here.


class Colours(NamedTuple):
    """One theme. Text on its ground has a contrast of at least 4.5 to 1."""

    ground: str = "#f3f4f7"
    paper: str = "#ffffff"
    ink: str = "#1f2430"
    dim: str = "#6b7280"
    edge: str = "#dde1e8"
    thumb: str = "#c3c9d4"
    accent: str = "#2563d9"
    accent_over: str = "#1d4fb0"
    selected: str = "#cfe0fb"
    good: str = "#2e9e5b"
    waiting: str = "#d98e04"
    bad: str = "#c5303a"
    private: str = "#6d28a8"
    private_ground: str = "#f5effb"
    mention_ground: str = "#fff3cd"
    names: tuple[str, ...] = (
        *("#c0392b", "#a84c08", "#806600", "#47740e", "#157a3b", "#0f766e"),
        *("#0b6e8a", "#1d4ed8", "#4f46e5", "#7e22ce", "#a21caf", "#be185d"),
    )


SAFE_XFT = 20305  # libXft 2.3.5 draws coloured glyphs; before, one ended the whole program


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
    """`text` with the names of emoji in place of their pictures."""
    return "".join(
        f"[{unicodedata.name(c, 'a sign').lower()}]"
        if ord(c) > 0xFFFF or unicodedata.category(c) == "So"
        else c
        for c in text
    )


class Look:
    """The fonts and colours of one window."""

    def __init__(self, root: tk.Tk):
        self.colours = Colours()
        self.drawable: Callable[[str], str] = str if draws_emoji(root) else spelled
        self.font = tkfont.nametofont("TkDefaultFont", root)
        self.bold = self.font.copy()
        self.bold.configure(weight="bold")
        self.large = self.bold.copy()
        self.large.configure(size=round(self.font.actual("size") * 1.3))
        self.small = self.font.copy()
        self.small.configure(size=max(8, self.font.actual("size") - 1))
        self.fixed = tkfont.nametofont("TkFixedFont", root).copy()
        self.fixed.configure(size=self.small.actual("size"))
        root.configure(background=self.colours.ground)
        self.style = ttk.Style(root)
        self.style.theme_use("clam")
        self._style_all()
        self._style_menus(root)

    def _style_menus(self, root: tk.Tk) -> None:
        c = self.colours
        for option, value in (
            ("background", c.paper),
            ("foreground", c.ink),
            ("activeBackground", c.selected),
            ("activeForeground", c.ink),
            ("activeBorderWidth", 4),
            ("borderWidth", 1),
            ("relief", "solid"),
            ("font", self.font),
        ):
            root.option_add(f"*Menu.{option}", value)

    def _style_all(self) -> None:
        c, style = self.colours, self.style
        style.configure(".", background=c.ground, foreground=c.ink, font=self.font)
        style.configure("Card.TFrame", background=c.paper)
        edge = {"bordercolor": c.thumb, "lightcolor": c.paper, "darkcolor": c.paper}
        style.configure("Raised.Card.TFrame", relief="raised", borderwidth=2, **edge)
        style.configure("Card.TLabel", background=c.paper)
        style.configure("Bad.Card.TLabel", foreground=c.bad)
        style.configure("Large.TLabel", font=self.large)
        style.configure("Large.Card.TLabel", font=self.large)
        style.configure("Dim.TLabel", foreground=c.dim, font=self.small)
        self._style_buttons()
        self._style_list()

    def _style_buttons(self) -> None:
        c, style = self.colours, self.style
        flat = {"relief": "flat", "borderwidth": 1, "padding": (12, 6), "focuscolor": c.accent}
        for name, ground, ink, over in (
            ("TButton", c.paper, c.ink, c.selected),
            ("Accent.TButton", c.accent, c.paper, c.accent_over),
        ):
            edge = c.edge if name == "TButton" else ground
            style.configure(name, background=ground, foreground=ink, **flat)
            style.configure(name, bordercolor=edge, lightcolor=ground, darkcolor=ground)
            changed = [("pressed", over), ("active", over)]
            style.map(name, background=changed, lightcolor=changed, darkcolor=changed)
        style.configure("Accent.TButton", focuscolor=c.paper)

    def _style_list(self) -> None:
        c, style = self.colours, self.style
        height = self.font.metrics("linespace") + 8
        plain = {"background": c.ground, "fieldbackground": c.ground, "borderwidth": 0}
        style.configure("People.Treeview", rowheight=height, **plain)
        style.map("People.Treeview", background=[("selected", c.selected)], foreground=[])
        style.layout("People.Treeview", [("Treeview.treearea", {"sticky": "nswe"})])
        thumb = ("Vertical.Scrollbar.thumb", {"expand": True, "sticky": "nswe"})
        trough = ("Vertical.Scrollbar.trough", {"sticky": "ns", "children": [thumb]})
        for name, ground in (
            ("Vertical.TScrollbar", c.paper),
            ("People.Vertical.TScrollbar", c.ground),
        ):
            style.layout(name, [trough])
            style.configure(name, troughcolor=ground, bordercolor=ground, arrowsize=10, gripcount=0)
            for option in ("background", "lightcolor", "darkcolor"):
                style.configure(name, **{option: c.thumb})
                style.map(name, **{option: [("disabled", ground), ("active", c.dim)]})

    def text_options(self) -> dict[str, Any]:
        """Return the options that every Text widget is made with."""
        c = self.colours
        return {
            "font": self.font,
            "background": c.paper,
            "foreground": c.ink,
            "insertbackground": c.ink,
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


def offer_menu(widget: tk.Text, *actions: str) -> None:
    """Cut, Copy, Paste where people look for them when they do not know the keys."""
    menu = tk.Menu(widget, tearoff=False)
    for action in actions:
        menu.add_command(label=action, command=lambda a=action: widget.event_generate(f"<<{a}>>"))
    for button in ("<Button-3>", "<Control-Button-1>"):
        if widget.tk.call("tk", "windowingsystem") == "aqua" or button == "<Button-3>":
            widget.bind(button, lambda event: menu.tk_popup(event.x_root, event.y_root))


PASTED_MOST = 64 * 1024  # characters: four of the longest messages


class Field(tk.Text):
    """One line of text. Return enters, Tab goes on to the next field."""

    def __init__(self, parent: tk.Misc, look: Look, enter: Callable[[], None], **options: Any):
        self.enter = enter
        self.refused: Callable[[str], None] = chat.do_nothing  # told why a paste is not taken
        self.drawable = look.drawable
        one_line = {"height": 1, "width": 34, "undo": True, "highlightthickness": 1}
        super().__init__(
            parent, **look.text_options() | one_line | {"padx": 8, "pady": 6} | options
        )
        for sequence, handler in (
            ("<Return>", self._return),
            ("<KP_Enter>", self._return),
            ("<Tab>", lambda _: self._move(self.tk_focusNext())),
            ("<<PrevWindow>>", lambda _: self._move(self.tk_focusPrev())),
            ("<<Paste>>", lambda _: self._paste("CLIPBOARD")),
            ("<<PasteSelection>>", self._paste_here),
            ("<Control-a>", self._select_all),
        ):
            self.bind(sequence, handler)
        offer_menu(self, "Cut", "Copy", "Paste")

    @property
    def content(self) -> str:
        return whole(self.get("1.0", "end-1c"))

    def set(self, text: str) -> None:
        self.delete("1.0", "end")
        self.insert("1.0", self.drawable(whole(text)))

    def _return(self, event: Any) -> str:
        self.enter()
        return "break"

    def _select_all(self, event: Any) -> str:
        self.tag_add("sel", "1.0", "end-1c")
        return "break"

    def _move(self, widget: tk.Misc | None) -> str:
        if widget:
            widget.focus_set()
        return "break"

    def _paste_here(self, event: Any) -> str:
        self.mark_set("insert", f"@{event.x},{event.y}")
        return self._paste("PRIMARY")

    def _paste(self, selection: str) -> str:
        """Text keeps what was selected when something is pasted on X11; a field replaces it."""
        try:
            text = self.selection_get(selection=selection)
        except tk.TclError:  # nothing there
            return "break"
        if len(text) + len(self.content) > PASTED_MOST:
            self.refused(f"that is too long to be pasted: more than {PASTED_MOST:,} characters")
            return "break"
        if self.tag_ranges("sel") and selection == "CLIPBOARD":
            self.delete("sel.first", "sel.last")
        self.insert("insert", self.pasted(whole(text)))
        self.see("insert")
        return "break"

    def pasted(self, text: str) -> str:
        return self.drawable(chat.harmless(" ".join(text.split("\n")).strip()))


class Compose(Field):
    """Where messages are written: grows with its text, remembers what was sent.

    The line editor of the terminal keeps the history, the draft and the completion; here
    it only gets keys that a Text has no idea of.
    """

    MOST_LINES = 6
    LEAVES_OFFERS = ("Tab", "ISO_Left_Tab", "Shift_L", "Shift_R")

    def __init__(
        self,
        parent: tk.Misc,
        look: Look,
        send: Callable[[str], bool],
        complete: Callable[[str, bool], list[str]],
    ):
        super().__init__(parent, look, self.submit, padx=10, pady=9, width=20, maxundo=500)
        self.send = send  # whether it could be: otherwise the text stays
        self.editor = chat.LineEditor(complete)
        self.hint = tk.Label(self, font=look.font, padx=0, pady=0, cursor="xterm")
        self.hint.configure(background=look.colours.paper, foreground=look.colours.dim)
        self.hint.bind("<Button-1>", lambda _: self.focus_set())
        for sequence, handler in (
            ("<Shift-Return>", self._newline),
            ("<Tab>", lambda _: self._complete("tab")),
            ("<<PrevWindow>>", lambda _: self._complete("back-tab")),
            ("<Up>", lambda _: self._recall("up", "linestart", "1.0")),
            ("<Down>", lambda _: self._recall("down", "lineend", "end-1c")),
            ("<Key>", self._forget_offers),
            ("<<Modified>>", self._modified),
            ("<Configure>", lambda _: self.fit()),
        ):
            self.bind(sequence, handler)
        self._modified()

    def pasted(self, text: str) -> str:
        return self.drawable(chat.harmless(text.replace("\r\n", "\n")))

    def set(self, text: str) -> None:
        super().set(text)
        self.mark_set("insert", "end-1c")
        self.see("insert")

    def give_back(self, text: str) -> None:
        """Take back a text that was not accepted; Up brings it while another is being written."""
        if self.content.strip() or text[:1] == "/":
            self.editor.remember(text)
        else:
            self.set(text)

    def begin(self, text: str) -> None:
        """Put this before whatever is being written."""
        self.set(text + self.content)
        self.focus_set()

    def submit(self) -> None:
        text = self.content.rstrip("\n")
        if not text.strip() or not self.send(text):
            return
        self.editor.set(text)
        self.editor.press(chat.Key("enter"))
        self.set("")
        self.edit_reset()

    def _newline(self, event: Any) -> str:
        self.insert("insert", "\n")
        self.see("insert")
        return "break"

    def _rows(self) -> int:
        """Return the rows of the text, up to the most that are shown. Tk's own count of all of
        them takes a second for a line of 20 kB."""
        at, rows = "1.0", 1
        while rows < self.MOST_LINES:
            below = self.index(f"{at} + 1 display lines")
            if self.compare(f"{below} display linestart", "<=", at):
                break
            at, rows = self.index(f"{below} display linestart"), rows + 1
        return rows

    def _recall(self, key: str, edge: str, end: str) -> str | None:
        """Beyond the first or the last row, the arrows go through what was sent."""
        if self.compare(f"insert display {edge}", "!=", end):
            return None
        self.editor.set(self.content)
        self.editor.press(chat.Key(key))
        if self.editor.text != self.content:
            self.set(self.editor.text)
        return "break"

    def _complete(self, key: str) -> str:
        before = whole(self.get("insert linestart", "insert"))
        self.editor.before, self.editor.after = before, ""
        self.editor.press(chat.Key(key))
        if self.editor.before != before:
            self.delete("insert linestart", "insert")
            self.insert("insert", self.editor.before)
        return "break"

    def _forget_offers(self, event: Any) -> None:
        if event.keysym not in self.LEAVES_OFFERS:
            self.editor.offers = []

    def _modified(self, event: Any = None) -> None:
        if self.edit_modified() or event is None:
            self.edit_modified(False)
            self.fit()

    def fit(self) -> None:
        """As high as its text, within reason; the hint shows while there is none."""
        if self.get("1.0", "2.0") == "\n" and self.index("end-1c") == "1.0":
            self.hint.place(x=1, y=0)  # from where text begins: a Text's padding counts
        else:
            self.hint.place_forget()
        if self.winfo_width() > 1:
            self.configure(height=self._rows())


# ======================================================================================
# PARTS
# ======================================================================================
# What the window is put together from. Each part knows its widgets and what it is told,
# and tells others by calling what it was given.


COMMAND_KEYS = 0x4 | (0x20000 if os.name == "nt" else 0x8)  # Control, Alt: no letters


def open_link(url: str) -> None:
    """In a thread: some browsers let their starter wait."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


class Transcript(ttk.Frame):
    """The transcript. It stays at the end while the end is in sight, else it tells what is new."""

    def __init__(self, parent: tk.Misc, look: Look, typed: Callable[[str], None]):
        super().__init__(parent, style="Card.TFrame")
        self.drawable = look.drawable
        self.typed = typed  # gets what is typed here by mistake
        self.at_bottom = True
        self.height = 1  # of the text, in pixels, when it was looked at last
        self.reached_bottom: Callable[[], None] = chat.do_nothing
        options = {"state": "disabled", "cursor": "arrow", "highlightthickness": 0}
        options |= {"padx": 14, "pady": 8, "width": 20, "height": 5, "spacing3": 3}
        self.text = tk.Text(self, **look.text_options() | options)
        self.bar = ttk.Scrollbar(self, command=self.text.yview)
        self.text.configure(yscrollcommand=self._scrolled)
        self.bar.pack(side="right", fill="y")
        self.text.pack(side="left", fill="both", expand=True)
        self.below = ttk.Button(self, style="Accent.TButton", command=self.to_bottom)
        self._make_tags(look)
        self._bind_all()

    def _make_tags(self, look: Look) -> None:
        c, tag = look.colours, self.text.tag_configure
        column = look.font.measure("00:00") + 14
        tag("row", tabs=(column,), lmargin2=column)
        tag("more", lmargin1=column)
        tag("mention", background=c.mention_ground, lmargincolor=c.mention_ground)
        tag("private", background=c.private_ground, lmargincolor=c.private_ground)
        tag("private", foreground=c.private)
        tag("dim", foreground=c.dim)
        tag("where", foreground=c.dim)
        tag("table", font=look.fixed)  # the server aligns what it lists with spaces
        tag("name", font=look.bold)
        for number, colour in enumerate(c.names):
            tag(f"name{number}", foreground=colour)
        tag("link", foreground=c.accent, underline=True)
        tag("day", foreground=c.dim, justify="center", font=look.small, spacing1=8, spacing3=8)
        self.text.tag_raise("sel")

    def _bind_all(self) -> None:
        text = self.text
        text.bind("<Button-1>", lambda _: text.focus_set(), add=True)  # so that Copy works
        text.bind("<Key>", self._key)
        text.bind("<<Paste>>", self._paste)
        text.bind("<Configure>", lambda _: self.at_bottom and text.see("end"))
        offer_menu(text, "Copy")
        text.tag_bind("link", "<ButtonRelease-1>", self._click)
        text.tag_bind("link", "<Enter>", lambda _: text.configure(cursor="hand2"))
        text.tag_bind("link", "<Leave>", lambda _: text.configure(cursor="arrow"))

    def show(self, pieces: list, excess: int) -> None:
        """Add these pieces in one go, and let the oldest lines go."""
        at_bottom = self.at_bottom  # from before: afterwards it never is
        pieces[::2] = map(self.drawable, pieces[::2])
        self.text.configure(state="normal")
        self.text.insert("end", *pieces)
        if excess:
            self.text.delete("1.0", f"{excess + 1}.0")
        self.text.configure(state="disabled")
        if at_bottom:
            self.text.see("end")

    def remove(self, tags: Iterable[str]) -> int:
        """Remove the rows with these tags; return how many lines they had."""
        lines = 0
        self.text.configure(state="normal")
        for tag in tags:
            if ranges := self.text.tag_ranges(tag):
                first, last = self.text.index(f"{ranges[0]} linestart"), ranges[-1]
                lines += self.text.get(first, last).count("\n")
                self.text.delete(first, last)
            self.text.tag_delete(tag)
        self.text.configure(state="disabled")
        return lines

    def to_bottom(self) -> None:
        self.at_bottom = True
        self.text.see("end")
        self.reached_bottom()

    def tell_below(self, count: int) -> None:
        if count:
            self.below.configure(text=f"{count:,} new below \u2193")
            self.below.place(relx=0.5, rely=1.0, y=-12, anchor="s")
        else:
            self.below.place_forget()

    def _scrolled(self, first: str, last: str) -> None:
        self.bar.set(first, last)
        height = self.text.winfo_height()
        if height != self.height:  # Tk's layout, and no scrolling of the user
            self.height = height
            if self.at_bottom:
                self.text.after_idle(self.text.see, "end")
            return
        was, self.at_bottom = self.at_bottom, float(last) > 0.99999
        if self.at_bottom and not was:
            self.reached_bottom()

    def _key(self, event: Any) -> str | None:
        """Send what is typed here to the field below."""
        text = whole(event.char)
        if event.state & COMMAND_KEYS or not text or not text.isprintable():
            return None
        self.typed(text)
        return "break"

    def _paste(self, event: Any) -> str:
        with contextlib.suppress(tk.TclError):  # nothing to paste
            self.typed(whole(self.selection_get(selection="CLIPBOARD")))
        return "break"

    def _click(self, event: Any) -> None:
        if url := self.link_at(f"@{event.x},{event.y}"):
            open_link(url)

    def link_at(self, index: str) -> str:
        """The link there, or "". One tag serves all of them: what was clicked tells which."""
        if self.text.tag_ranges("sel"):  # the end of a selection, not a click
            return ""
        found = self.text.tag_prevrange("link", f"{index} + 1 indices")
        if not found or self.text.compare(found[1], "<=", index):
            return ""
        match = LINK.match(self.text.get(*found))
        return match.group() if match else ""


class People(ttk.Frame):
    """The list of members, by name. Only what changed is drawn."""

    def __init__(self, parent: tk.Misc, look: Look, chosen: Callable[[str], None]):
        super().__init__(parent)
        self.chosen = chosen
        self.drawable = look.drawable
        self.rows: dict[str, str] = {}  # name to row
        self.mine = ""
        self.count = ttk.Label(self, style="Dim.TLabel", padding=(10, 10, 0, 6))
        self.tree = ttk.Treeview(self, show="tree", style="People.Treeview", selectmode="browse")
        self.bar = ttk.Scrollbar(self, command=self.tree.yview, style="People.Vertical.TScrollbar")
        self.tree.configure(yscrollcommand=self.bar.set)
        self.tree.column("#0", width=160, minwidth=80)
        for number, colour in enumerate(look.colours.names):
            self.tree.tag_configure(f"name{number}", foreground=colour)
        self.count.pack(fill="x")
        self.bar.pack(side="right", fill="y")
        self.tree.pack(side="left", fill="both", expand=True)
        self.tree.bind("<Double-Button-1>", self._choose)
        self.tree.bind("<Return>", self._choose)
        self.show((), "")

    def show(self, people: tuple[str, ...], mine: str) -> None:
        order = sorted(people, key=lambda name: (key_of(name), name))
        if mine != self.mine:  # the row of who we were, and of who we are, read differently
            self._remove({self.mine, mine})
        self.mine = mine
        self._remove(self.rows.keys() - set(order))
        for position, name in enumerate(order):
            if name not in self.rows:
                text = self.drawable(shorter(name, NAME_SHOWN) + " (you)" * (name == mine))
                where = position if position < len(self.rows) else "end"  # which needs no search
                self.rows[name] = self.tree.insert("", where, text=text, tags=name_tag(name))
        self.count.configure(text=f"PEOPLE HERE \u2013 {len(order):,}")

    def _remove(self, names: Iterable[str]) -> None:
        rows = [self.rows.pop(name) for name in names if name in self.rows]
        if rows:
            self.tree.delete(*rows)

    def _choose(self, event: Any) -> str:
        selected = self.tree.selection()
        names = [name for name, row in self.rows.items() if row in selected]
        if names and names[0] != self.mine:
            self.chosen(names[0])
        return "break"


ACCOUNT_LABEL = "Password of your account, if you have one"
PASSWORD_LABEL = "Password of the server, if it asks for one"


def secret_field(parent: tk.Misc, enter: Callable[[], None]) -> ttk.Entry:
    """Return a field that shows dots. It takes no emoji: they corrupt the memory of an Entry."""
    small = (parent.register(lambda text: all(ord(c) <= 0xFFFF for c in text)), "%P")
    field = ttk.Entry(parent, show="\u2022", validate="key", validatecommand=small)
    field.bind("<Return>", lambda _: enter())
    return field


class ConnectCard(ttk.Frame):
    """Asks for a name and a server, on top of the conversation."""

    def __init__(self, parent: tk.Misc, look: Look, connect: Callable[..., None]):
        super().__init__(parent, style="Raised.Card.TFrame", padding=28)
        self.connect = connect
        self.closed: Callable[[], None] = chat.do_nothing
        self.name = Field(self, look, self.enter)
        self.server = Field(self, look, self.enter)
        self.password, self.secret = secret_field(self, self.enter), secret_field(self, self.enter)
        self.error = ttk.Label(self, style="Bad.Card.TLabel", wraplength=320)
        self.cancel = ttk.Button(self, text="Cancel", command=self.hide)
        self.go = ttk.Button(self, text="Connect", style="Accent.TButton", command=self.enter)
        rows = (
            ttk.Label(self, text="Join the conversation", style="Large.Card.TLabel"),
            *(ttk.Label(self, text="Your name", style="Card.TLabel"), self.name),
            *(ttk.Label(self, text="Server", style="Card.TLabel"), self.server),
            *(ttk.Label(self, text=ACCOUNT_LABEL, style="Card.TLabel"), self.secret),
            *(ttk.Label(self, text=PASSWORD_LABEL, style="Card.TLabel"), self.password),
            self.error,
        )
        gaps = (12, *(4, 14) * 4, 0)
        for row, (widget, gap) in enumerate(zip(rows, gaps, strict=True)):
            widget.grid(row=row, column=0, columnspan=2, sticky="we", pady=(0, gap))
        self.cancel.grid(row=len(rows), column=0, sticky="e", padx=(0, 8), pady=(10, 0))
        self.go.grid(row=len(rows), column=1, sticky="e", pady=(10, 0))
        self.columnconfigure(0, weight=1)
        for field in (self.name, self.server, self.password, self.secret):
            field.bind("<Escape>", lambda _: self.hide())

    @property
    def shown(self) -> bool:
        return bool(self.place_info())

    def show(self, name: str, server: str, error: str = "") -> None:
        self.name.set(name)
        self.server.set(server)
        self.error.configure(text=error)
        self.place(relx=0.5, rely=0.45, anchor="center")
        self.lift()
        self.name.tag_add("sel", "1.0", "end-1c")
        self.name.focus_set()

    def hide(self) -> None:
        self.place_forget()
        self.closed()

    def enter(self) -> None:
        secrets = self.password.get(), self.secret.get()
        for field in (self.password, self.secret):
            field.delete(0, "end")
        self.connect(self.name.content.strip(), self.server.content.strip(), *secrets)


# ======================================================================================
# WINDOW
# ======================================================================================
# Everything happens in short steps that Tk calls: a key, a wake-up, a timer. None of them
# waits for anything, and none of them runs Tk's loop inside itself.

DEFAULT_SERVER = chat.address_text(chat.DEFAULT_HOST, chat.DEFAULT_PORT)
DRAIN_SECONDS = 0.008  # of forming text before Tk gets to look after the person again
REST_MS = 8  # which it then has: as much again, or nothing of this would be drawn
FRAME_SECONDS = 0.016  # between two looks at the queue: more is not seen
POLL_MS = 30  # where Tk cannot watch a socket, between two looks for a wake-up
CLOSE_SECONDS = 0.9  # from hidden to gone, whatever the server does
CLOSE_POLL_MS = 10


class Bell:
    """How another thread, or a signal, gets Tk's attention: one byte on a pair of sockets."""

    def __init__(self, root: tk.Tk, answer: Callable[[], None]):
        self.root, self.answer = root, answer
        self.timer = ""
        self.for_signals = False
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)
        self.watched = hasattr(root.tk, "createfilehandler")
        if self.watched:
            root.tk.createfilehandler(self.reader, tk.READABLE, self._rung)
        else:
            self._poll()

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: it is gone
            self.writer.send(b"\0")

    def _rung(self, *_: Any) -> None:
        """Catches everything: an exception in a file handler would end the main loop."""
        try:
            if self._heard():
                self.answer()
        except Exception:
            log.exception("a bug, please report it")

    def _heard(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return bool(self.reader.recv(4096))
        return False

    def _poll(self) -> None:
        self._rung()
        self.timer = self.root.after(POLL_MS, self._poll)

    def heed_signals(self) -> None:
        """Tk waits in C, where Python's signal handlers do not run: the byte that a signal
        writes gets it out of there."""
        self.for_signals = True
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """A closed socket that Tk still watched would spin for ever, so first things first."""
        if self.watched:
            self.root.tk.deletefilehandler(self.reader)
        elif self.timer:
            self.root.after_cancel(self.timer)
        if self.for_signals:
            signal.set_wakeup_fd(-1)
        self.reader.close()
        self.writer.close()


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
    config: pathlib.Path | None = None  # likewise, for the passwords that we made


class Window:
    """The window, and the server that it is connected to."""

    def __init__(self, options: WindowOptions):
        self.options = options
        self.remembered = Remembered(options.state / "window.json" if options.state else None)
        self.model = Conversation()
        self.engine: Engine | None = None
        self.snapshot = NOT_CONNECTED
        self.address = ""  # of the server, as it was typed
        self.server = ""  # the same in short
        self.focused = False
        self.closing = self.interrupted = self.gone = False
        self.timer = ""  # of the next look at the queue ...
        self.collecting = ""  # ... and of the next collection of garbage
        self.collections = 0
        self.looked = 0.0
        gc.disable()  # see _collect()
        self.root = tk.Tk(className="chat")
        self.root.report_callback_exception = self._log_bug
        self.look = Look(self.root)
        self._build()
        self.bell = Bell(self.root, self.rung)
        self._collect()
        self._bind_all()
        self.refresh_labels()

    def _build(self) -> None:
        root, look = self.root, self.look
        root.geometry("900x600")
        root.minsize(460, 320)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(1, weight=1)
        self._build_header().grid(row=0, column=0, columnspan=2, sticky="we")
        self.transcript = Transcript(root, look, self.type_on)
        self.transcript.reached_bottom = self.read_below
        self.transcript.grid(row=1, column=0, sticky="nswe")
        self.people = People(root, look, lambda name: self.compose.begin(f"/tell {name} "))
        self.people.grid(row=1, column=1, sticky="ns", padx=(6, 0))
        foot = ttk.Frame(root, padding=(10, 10, 10, 0))
        self.compose = Compose(foot, look, self.send, self.complete)
        send = ttk.Button(foot, text="Send", style="Accent.TButton", command=self.compose.submit)
        send.configure(takefocus=False)
        send.pack(side="right", anchor="s", padx=(8, 0), ipady=2)
        self.compose.pack(side="left", fill="x", expand=True)
        foot.grid(row=2, column=0, columnspan=2, sticky="we")
        self._build_status().grid(row=3, column=0, columnspan=2, sticky="we")
        self.compose.refused = self.tell
        self.card = ConnectCard(root, look, self.connect)
        self.card.closed = self.compose.focus_set

    def _build_header(self) -> ttk.Frame:
        header = ttk.Frame(self.root, padding=(14, 10, 10, 10))
        self.place_label = ttk.Label(header, style="Large.TLabel")
        self.place_label.pack(side="left")
        button = ttk.Button(header, text="Connect\u2026", command=self.ask, takefocus=False)
        button.pack(side="right")
        return header

    def _build_status(self) -> ttk.Frame:
        line = ttk.Frame(self.root, padding=(12, 6, 12, 8))
        self.dot = ttk.Label(line, text="\u25cf", style="Dim.TLabel")
        self.dot.pack(side="left")
        self.status = ttk.Label(line, style="Dim.TLabel")
        self.status.pack(side="left", padx=(6, 0))
        hint = "Return sends \u00b7 Shift+Return: new line \u00b7 Tab completes \u00b7 /help"
        ttk.Label(line, text=hint, style="Dim.TLabel").pack(side="right")
        return line

    def _bind_all(self) -> None:
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.root.bind("<FocusIn>", lambda _: self._focus(True))
        self.root.bind("<FocusOut>", lambda _: self._focus(False))
        for sequence in ("<Prior>", "<Next>"):
            page = -1 if sequence == "<Prior>" else 1
            self.compose.bind(sequence, functools.partial(self._page, page))

    def _page(self, page: int, event: Any) -> str:
        """Page Up and Page Down read back without leaving the field."""
        self.transcript.text.yview_scroll(page, "pages")
        return "break"

    def _log_bug(self, *error: Any) -> None:
        log.error("a bug, please report it", exc_info=error)

    def run(self) -> None:
        self.root.mainloop()

    # Connecting

    def begin(self) -> None:
        """Connect as the command line says, or ask what it does not say."""
        if self.options.name:
            self.connect(self.options.name, self.options.server)
        else:
            self.ask()

    def ask(self, error: str = "") -> None:
        name, server = self.remembered.load()
        name = self.snapshot.name or self.options.name or name
        server = self.address or self.options.server or server
        self.card.show(name, server or DEFAULT_SERVER, error)

    def connect(self, name: str, server: str, password: str = "", secret: str = "") -> None:
        """Leave where we are and go there, or say why that cannot be. `password` is the
        server's, `secret` that of the account with this name."""
        try:
            options = self._client_options(name, server)
            if password:
                options = options._replace(password=password)
            if secret:
                options = options._replace(login=chat.Login(name, secret))
            engine = Engine(options, self.bell.ring)
        except chat.ChatError as error:
            return self.card.show(name, server or DEFAULT_SERVER, str(error))
        self.remembered.save(name, server)
        if self.engine:
            self.engine.leave()
        self.address, self.server, self.engine = server, str(options.target), engine
        self.take_snapshot(self.engine.snapshot)
        self.engine.start()
        self.card.hide()

    def _client_options(self, name: str, server: str) -> chat.ClientOptions:
        if not chat.clean_name(name):
            raise chat.Unusable("please choose a name")
        # What the command line says of its server is not said of another: a password
        # least of all.
        target = chat.parse_target(server)
        given = self.options if self._is_given(target) else WindowOptions()
        target = target._replace(kind=chat.PLAIN if given.plain else target.kind)
        return chat.ClientOptions(
            name,
            target,
            given.trust,
            self.options.state,
            given.password,
            config=self.options.config,
        )

    def _is_given(self, target: chat.Target) -> bool:
        """Return whether it is the server of the command line, and no less secure."""
        with contextlib.suppress(chat.Unusable):
            given = chat.parse_target(self.options.server)
            return (given.host, given.port, given.tls) == (target.host, target.port, target.tls)
        return False

    # What the engine has to tell

    def rung(self) -> None:
        if self.interrupted:
            return self.close()
        if not self.timer and not self.gone:
            wait = self.looked + FRAME_SECONDS - time.monotonic()
            self.timer = self.root.after(max(0, int(wait * 1000)), self.drain)

    def drain(self) -> None:
        """Show what waits, for as long as that is not noticed; the rest a moment later."""
        self.timer = ""
        engine = self.engine
        if engine is None or self.closing:
            return
        snapshot = engine.snapshot
        pieces = self._take_views(engine)
        if pieces:
            self.transcript.show(pieces, self.model.excess(self.transcript.at_bottom))
            self.transcript.tell_below(self.model.below)
        if snapshot != self.snapshot:
            self.take_snapshot(snapshot)
        elif pieces:
            self.refresh_title()
        if self.model.alert:
            self.model.alert = False
            self.root.bell()
        self.looked = time.monotonic()
        if not engine.views.empty():
            self.timer = self.root.after(REST_MS, self.drain)
        elif snapshot.reason is not None:
            self.ended(snapshot.reason)

    def _take_views(self, engine: Engine) -> list:
        until = time.perf_counter() + DRAIN_SECONDS
        pieces: list = []
        with contextlib.suppress(queue.Empty):
            while time.perf_counter() < until:
                view = engine.views.get_nowait()
                pieces = self._take_view(view, pieces)
        return pieces

    def _take_view(self, view: chat.View, pieces: list) -> list:
        """Return the pieces to be shown, after one view more."""
        if view.kind == chat.BACK:
            self.compose.give_back(view.text)
        elif view.kind == chat.ARRIVED:
            self.model.own[view.id] = view.own_id
        elif view.kind == chat.REMOVED:
            if pieces:  # it may be among them
                self.transcript.show(pieces, 0)
            self.model.lines -= self.transcript.remove(self.model.tags_of(view.id))
            return []
        else:
            pieces += self.model.add(view, self.focused, self.transcript.at_bottom)
        return pieces

    def take_snapshot(self, snapshot: Snapshot) -> None:
        last, self.snapshot = self.snapshot, snapshot
        self.model.here = snapshot.here
        if (snapshot.people, snapshot.name) != (last.people, last.name):
            self.people.show(snapshot.people, snapshot.name)
        self.refresh_labels()

    def ended(self, reason: str) -> None:
        """The engine has stopped for good; the person can connect again, or elsewhere."""
        self.engine = None
        if reason:
            self.ask(reason)

    def refresh_labels(self) -> None:
        snapshot, colours = self.snapshot, self.look.colours
        over = snapshot.reason is not None
        colour = colours.good if snapshot.ready else colours.bad if over else colours.waiting
        self.dot.configure(foreground=colour if self.server else colours.dim)
        drawable = self.look.drawable
        self.status.configure(text=drawable(status_text(snapshot, self.server)))
        outside = " (you are not in it)" if snapshot.ready and not snapshot.inside else ""
        place = (snapshot.here or "nowhere") + outside
        self.place_label.configure(text=drawable(place if self.server else "Chat"))
        self.compose.hint.configure(text=drawable(placeholder_text(snapshot)))
        self.refresh_title()

    def refresh_title(self) -> None:
        self.root.title(title_text(self.snapshot, self.server, self.model.unread))

    def read_below(self) -> None:
        self.model.below = 0
        self.transcript.tell_below(0)

    def tell(self, text: str) -> None:
        """Show a text of the window's own."""
        at_bottom = self.transcript.at_bottom
        pieces = self.model.add(chat.View(chat.NOTE, text), self.focused, at_bottom)
        self.transcript.show(pieces, self.model.excess(at_bottom))

    # What the person does

    def send(self, text: str) -> bool:
        """Return whether it is on its way. While the line is broken it waits in the core."""
        if chat.is_quit(text):
            self.close(text[len("/quit") :].strip())
        elif self.engine is None:
            self.ask("not connected: connect first, your text is kept")
            return False
        else:
            self.transcript.to_bottom()
            self.engine.say(text)
        return True

    def complete(self, word: str, first: bool) -> list[str]:
        return self.model.candidates(self.snapshot, word, first)

    def type_on(self, text: str) -> None:
        self.compose.focus_set()
        self.compose.insert("insert", self.compose.pasted(text))

    def _focus(self, focused: bool) -> None:
        self.focused = focused
        if focused and self.model.unread:
            self.model.unread = 0
            self.refresh_title()

    # Closing

    def interrupt(self, *_: Any) -> None:
        """For signals, which come at any moment: closing is left to the bell."""
        self.interrupted = True
        self.bell.ring()

    def close(self, reason: str = "") -> None:
        """Hidden at once; then the server is told, but not waited for for long."""
        if self.closing:
            return
        self.closing = True
        self.root.withdraw()
        if self.engine:
            self.engine.leave(reason)
        self._wait_for_engine(time.monotonic() + CLOSE_SECONDS)

    def _wait_for_engine(self, until: float) -> None:
        working = self.engine and self.engine.thread.is_alive()
        if working and time.monotonic() < until:
            self.root.after(CLOSE_POLL_MS, self._wait_for_engine, until)
        else:
            self.destroy()

    def _collect(self) -> None:
        """Collect garbage on Tk's thread, and on no other: Tk aborts the program when one of
        its objects is freed elsewhere, and the loop's thread makes garbage, too."""
        self.collections += 1
        gc.collect(2 if self.collections % COLLECTIONS == 0 else 1)
        self.collecting = self.root.after(COLLECT_MS, self._collect)

    def destroy(self) -> None:
        self.gone = True
        self.root.after_cancel(self.collecting)
        if self.timer:
            self.root.after_cancel(self.timer)
        self.bell.close()
        self.root.destroy()


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
    chat.add_client_options(add)
    return parser


def heed_signals(window: Window) -> None:
    """Ctrl-C in the terminal that started us closes the window."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, window.interrupt)
    window.bell.heed_signals()


def sharpen() -> None:
    """On Windows a program has to say that it copes with fine screens, or is blurred."""
    if os.name == "nt":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.OleDLL("shcore").SetProcessDpiAwareness(1)


def main(arguments: list[str] | None = None) -> int:
    try:
        args = command_line().parse_args(arguments)
    except chat.ChatError as error:
        print(f"gui_client.py: {error}", file=sys.stderr)
        return 1
    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
    sharpen()
    trust = chat.Trust(args.ca, args.pin, args.insecure, args.client_cert)
    try:
        state = None if args.no_state else args.data or chat.data_folder() / "client"
        config = None if args.no_state else args.data or chat.config_folder()
    except chat.ChatError as error:
        print(f"gui_client.py: {error}", file=sys.stderr)
        return 1
    options = WindowOptions(
        whole(args.name),
        whole(args.server),
        args.plain,
        args.password or "",
        trust,
        state,
        config,
    )
    try:
        window = Window(options)
    except tk.TclError as error:
        print(f"gui_client.py: cannot open a window: {error}", file=sys.stderr)
        return 1
    heed_signals(window)
    window.begin()
    window.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
