#!/usr/bin/env python3
"""A chat in one file: a server for everyone in the room, and a client for it.

    python3 chat.py server          python3 chat.py client alice          nc 127.0.0.1 7000

Sections, in reading order; each opens with a banner and uses only what stands above it:

    LIMITS          every tunable, with its unit and its reason
    VOCABULARY      events, message ids, and the errors that are raised on purpose
    FRAMING         bytes to lines, names, cutting text where it may be cut
    BUFFERS         queues of bytes to be sent, TLS as a filter, input budgets
    COMMANDS        the record of a command, and the one gate before it runs
    ACCOUNTS        verifiers of passwords, SASL, limits on attempts
    DOMAIN          users, sessions, channels, audiences, the Hub, and the log of a turn
    ACTS            every change of shared state, by name
    PASSWORDS       how a session proves that it may do something, in both dialects
    STORE           accounts, states, history and its index in SQLite
    IRC DIALECT     every command of RFC 1459 and 2812, and IRCv3
    LINE DIALECT    the workshop's protocol and its slash commands
    WEB DIALECT     HTTP and WebSocket: framers, answers, the handshake
    FIRST LINE      which dialect a connection speaks
    CLIENT CORE     a conversation as lines in and views out
    CLIENT STORE    the messages that a client has seen, in SQLite
    --- waterline   below: sockets, clocks, threads, terminals
    LOOP            selector, timers, connections, helper threads, the log
    SERVER          listeners, the five beats of the tick, limits, shutdown
    LINK            a client's connection: find the server, come back to it
    TRANSFERS       files that a client sends and saves
    TERMINAL        keys, line editor, the rows of a screen
    CLI CLIENT      the terminal and the connection on one loop
    BENCH           a load generator on the same loop
    PAGE            the page that a browser shows at the server's address
    MAIN            arguments and subcommands

A dialect parses a line into an act; an act checks, changes the Hub and emits events; the turn
logs events; the store keeps them; wires render them. Once a turn:

    poll    wait for sockets, timers and wake-ups
    read    take the bytes of every ready connection
    act     turn lines into acts; events pile up in the turn's log, nothing is sent
    commit  write the turn's events and records to SQLite in one transaction
    write   turn the log into bytes, one write per connection

Glossary:

    line      the bytes between two newlines on the wire
    act       one change of shared state, by name and with plain data (ACTS)
    event     a change that other sessions can see: a message, a join, a topic ... (class Event)
    record    a change of stored state that is no event: an account, a marker (class Record)
    turn      one round of the loop, and the log of what happened in it (class Turn)
    conn      connection: a socket with its buffers; knows nothing of chat
    peer      a connection as the server sees it: with its lines, a budget, a session
    session   one connection's side of the chat, in one dialect
    user      a person or program present under a nick; has one or more sessions
    identity  the owner of messages and markers: an account, else one stay of a user
    token     the hash of a session's secret: it resumes a user after a break
    channel   a named place where users talk; each founding of it has an id
    audience  the receivers of an event: channels, users or sessions
    wire      one way to turn events into bytes; sessions of one wire share those bytes
    work      the cost of a line for the server; a budget is counted in tokens of work
    view      one thing that a client shows; the stream of them is all that a screen gets
    key       a name folded for comparison; two names with one key are the same name
    dedup key the sender's own id of a message: under one id there is one message
    room      a channel or private conversation as a client knows it
    talk      a client's dialogue over one connection: in IRC, or the workshop's protocol
    outbox    messages that a client accepted and no server acknowledged; its file is a journal
    parked    a message in it that waits for the user: /retry or /cancel
    profile   the features of a server, and how it compares names (CAP, 004, 005)
    link      a client core and its connection, kept up; the connection has one phase
    seat      a server of a client with a screen: core, link and what its screen keeps
    framer    takes lines, requests or frames out of the bytes of a connection
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
import ipaddress
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
import select
import selectors
import shlex
import signal
import socket
import sqlite3
import stat
import string
import struct
import subprocess
import sys
import textwrap
import threading
import time
import typing
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

# ======================================================================================
# LIMITS
# ======================================================================================
# Every number that you may want to change, with its unit and the reason for it.
# A refusal always names the limit it enforces and says what to do.

VERSION = "0.3"
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
REASON_BYTES = 200  # ... and this, why a user is away, kicked or gone, beside two names more
USERNAME_BYTES = 20
REALNAME_BYTES = 128
CHANNEL_PASSWORD_BYTES = 32
CHANNELS_A_USER = 50  # bounds the table of channels by the number of users ...
CHANNELS_FOUNDED = 50  # ... and of those that last, by the number of accounts
RANKS_STORED = 100  # accounts with a rank in a channel, for while they are absent
TOKENS_A_USER = 10  # devices that may resume a user
SECRET_DIGITS = 32  # hexadecimal: 128 bits
OWN_ID_BYTES = 64  # of the id that a client gives its message
DEDUP_MS = 30 * 24 * 3600 * 1000  # how long such an id is known after its message is gone ...
DEDUP_IN_MEMORY_MS = 24 * 3600 * 1000  # ... and with --data none, where there is room ...
DEDUP_IN_MEMORY = 100_000  # ... for so many: 20 MB
NOT_STORED_MS = 3600 * 1000  # how long the id of a message that could not be stored is known
DEDUP_SWEPT = 500  # old ids looked through at a time ...
SWEEP_SECONDS = 3600.0  # ... and the time between two sweeps
MASKS_A_LIST = 60  # bans of one channel: each is looked at when a user joins or speaks
MASK_BYTES = 200
MODES_BYTES = 300  # of one change of modes: as for topics
MODES_AT_ONCE = 100  # signs and letters of one command; the rest is not looked at ...
USER_MODES_AT_ONCE = 20  # ... of a command for the user's own modes, which are five
MODES_WITH_VALUE = 13  # of one command: an IRC line has 15 parameters (005 MODES)
INVITATIONS = 50  # of one user, not yet used
WATCHED = 100  # names that one session monitors
FORMER_USERS = 1000  # remembered for WHOWAS
FITS_ALWAYS = 300  # bytes that fit in a line of IRC behind the longest mask and channel
LABEL_BYTES = 64  # of a label (IRCv3 labeled-response)
METADATA_KEYS = 20  # that a user or a channel may have
METADATA_SUBS = 50  # that one session may want to hear of
METADATA_BYTES = 300  # of a value
METADATA_AT_ONCE = 100  # values told to a user who joins a channel; the client asks for more
METADATA_KEY_BYTES = 64
MARKERS = 1000  # of one user: how far each channel and talk has been read
TARGETS = 20  # of one PRIVMSG
LIST_TARGETS = 10  # names, masks and conditions of one LIST
WORK_PER_TOKEN = 100  # a mask matched or a member listed is 1: about half a microsecond
WORK_OF_AN_ACT = 50  # for each act, besides the items that it looks through
WORK_OF_A_RECEIVER = 5  # for each receiver that has to be told one by one
WORK_OF_A_LINE = 8  # of an answer, and as much again ...
WORK_OF_A_BYTE = 0.02  # ... for 400 bytes of it
LOOKED_AT_ONCE = 100  # users or channels looked at before other sessions have their turn
PIECE_BYTES = 300  # of a message of several pieces: what one line carries at least ...
MULTILINE_SLACK = 4  # ... and a sender may use so many times as many
LINES_DROPPED = 10_000  # that may follow a /lines with too large a number
BAN_MINUTES = 5_256_000  # ten years
RENAME_WORK = 20  # for each member: some are told by PART and JOIN
SERVER_BANS = 1000  # each is looked at when a user comes
ROSTER_BYTES = 300  # names of a NAMES reply: they fit behind the longest server, nick and channel
HOST_BYTES = 46  # an IPv6 address and a zero before it
PARAM_BYTES = 100  # of a client's parameter quoted in a reply: it needs room for the text
TOKENS_A_LINE = 13  # of 005: a line has 15 parameters, the name and the last words included
PASSWORD_TRIES = 3  # before a connection is closed
PASSWORD_MOST = 300  # characters: it has to fit in a line of IRC
OPERATOR_ROUNDS = 50_000  # of PBKDF2 for --oper: 20 ms a guess, and at every start
ACCOUNT_ROUNDS = 210_000  # for what is kept on disk (OWASP, Password Storage, for SHA-512)
PASSWORD_LEAST = 3  # characters; more is better, but it is their account
SASL_CHUNK = 400  # bytes of base64 in a line (IRCv3 sasl-3.1)
SASL_BYTES = 4 * SASL_CHUNK  # in all
LOGIN_TRIES = 5  # failures from one address at one account ...
LOGIN_TRIES_SERVER = 10  # ... at the passwords of the server and of operators ...
LOGIN_TRIES_AN_ADDRESS = 50  # ... and at all of them ...
LOGIN_WAIT_SECONDS = 60  # ... before it has to wait
LOGIN_FAILURES_KEPT = 10_000
CERTIFICATES = 10  # of one account
ACCOUNTS_MADE = 5  # from one address (loopback exempt) ...
ACCOUNTS_MADE_SECONDS = 3600  # ... with no more than this between one and the next
PENDING_ACCOUNTS = 1000  # that wait for a code sent by mail
MAIL_SECONDS = 30  # for --sendmail to take one
GRACE_SECONDS = 60.0  # how long a user who can come back stays after a lost connection ...
ABSENT_MOST = 1000  # ... but no more users (PER_ADDRESS for one address): the first goes

LINES_SPLIT = 2048  # bytes made into lines at a time: well below any limit of a line
READ_BYTES = 64 * 1024  # taken from one connection in one turn
LINES_A_TURN = 256  # acted on for one connection in one turn, so that no user waits for a flood
BACKLOG = 1024  # connections the kernel keeps for us meanwhile
ACCEPTS_A_TURN = 128  # connections taken in one turn, likewise
SEND_BYTES = 64 * 1024  # small chunks are joined up to this for one send
UNSENT_NO_READ = 256 * 1024  # bytes: a client that does not read is not read from either
UNSENT_SLOW = 512 * 1024  # bytes: more than this for SLOW_SECONDS closes the receiver ...
SLOW_SECONDS = 20.0
UNSENT_MOST = 4 * 1024 * 1024  # ... and more than this at once

FLOOD_BURST = 1000  # lines at once: a pasted file
FLOOD_RATE = 100.0  # lines a second after that
ADDRESS_SHARES = 16  # an address has the budget of so many connections
ADDRESSES_KEPT = 10_000  # with a budget that is not full, or failures
LIGHT_USE = 0.1  # of an address's budget: with less use it is served first
ACT_SECONDS = 0.020  # that a turn acts at most ...
ACT_SECONDS_LIGHT = 0.005  # ... while an address with light use waits
GREETING_SECONDS = 0.5  # a client that knows the protocol has spoken by then: a lost packet
# is sent again after 0.2 s, and browsers open connections ahead of use
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

ID_BLOCK = 1_000_000  # ids are reserved so many at a time, before the first is used
LAST_MOMENT = 253_402_300_799_000  # milliseconds: no calendar has the year 10,000
TIMES_AHEAD = 1000  # milliseconds that an event's time may be ahead of the clock, to be unique
KEEP_EVENTS = 1_000_000  # history of a channel
KEEP_EVENTS_IN_MEMORY = 10_000  # the same with --data none: about 5 MB a busy channel ...
MEMORY_BYTES = 256 * 1024 * 1024  # ... and this much for all channels, those of the past too
PRUNE_ROWS = 500  # rows deleted at a time: 1 to 3 ms, measured
INDEX_IDS = 500  # events made searchable at a time, on a helper: 5 ms ...
INDEX_PAUSE = 0.02  # seconds between two of these ...
INDEX_IDS_BUSY = 200  # ... and under load: Python runs but one thread at a time
PART_ROWS = 50_000  # messages of one part of the index: it is made again in a second
INDEX_SECONDS = 1.0  # until what was said can be searched
COUNT_SECONDS = 1.0  # between adding up how much history there is
BACKLOG_RECORDS = 10_000  # accounts, names, markers ... that wait for a database that is full ...
BACKLOG_SECONDS = 1.0  # ... and the time between two attempts to store them
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
PAGE_SECONDS = 15.0  # that a page may take before messages that wait for it are shown
DOUBTED_AHEAD = 8  # messages under way if the server echoes none: a break leaves them in doubt
SENT_AHEAD = 32  # messages under way if it does: at most so many are sent again after a break
STORED_LINES = 200  # of a conversation, that a client shows at its start
CLIENT_ROWS_WAITING = 10_000  # to be written to a store that is locked
CLIENT_ROWS_AT_ONCE = 500  # that are written in one transaction, at least once a second
CLIENT_INDEX_SLICE = 300  # messages indexed a second, while nothing else is to be done
CLIENT_HITS_MOST = 2000  # that one search looks at
MOVES_MS = 60_000  # joins and quits within this time after the first share one row
TOPIC_MARGIN = 50  # columns of the status row that are not for the topic
HANGING = 6  # columns that the later rows of a line are indented: the width of the time
MOVES_NAMED = 10  # users named in one
PACE_BURST, PACE_RATE = 5, 0.5  # lines to other servers at once, and a second: RFC 1459 section
PACE_BYTES = 200  # 8.10, which InspIRCd, ngIRCd and ircd 2.11 allow; more bytes cost more, there
CAP_SECONDS = 10.0  # without an answer to CAP: then the server knows none
REGAIN_SECONDS = 60.0  # between two looks whether the wanted name is free
CTCP_BURST, CTCP_RATE = 3, 0.1  # answers to CTCP at once, and a second
ECHOES_KEPT = 500  # lines of ours that a server is to send back, to know them again
TYPED_MOST = 256 * 1024  # characters that the line editor takes: a long paste
LASTLOG_MOST = 100  # messages that /lastlog shows
VIEWS_KEPT = 2000  # of a conversation, by our clients; more is in the server's history
IDS_KEPT = 10_000  # of messages, to tell a repeat
ROOMS_KEPT = 200  # conversations; a private one that is not looked at gives way to the next
TOKENS_KEPT = 500  # capabilities, and tokens of 005, that a server may have
BATCH_LINES = 2000  # of what a server says at once ...
BATCHES = 20  # ... and so many that it has not ended
TARGETS_ASKED = 500  # places with something new, after a break
SHORT_NAME = 9  # letters that every server takes (RFC 2812 section 1.2.1) ...
NAMES_TRIED = 4  # ... and names, before we give up
SCRAM_ROUNDS = range(4096, 2_000_001)  # that a server may ask of us (RFC 7677 section 4)
PAGE_BYTES = 128 * 1024  # of history at once: well below what closes a slow reader
PEOPLE_LISTED = 10_000  # of a channel, by our clients
PEOPLE_ASKED = 500  # members of a channel about whom our clients ask who is away
CHANGES_A_PAGE = 100  # the newest redactions, and reactions, that come with the newest messages
REACTIONS_SHOWN = 200  # to one message
REACTED_BYTES = 60  # that are shown of the message
TRAFFIC_LINES = 500  # of the protocol, that a user can look at
TRANSFERS_AT_ONCE = 2  # of one client with one server; others wait
ANSWER_BYTES = 4096  # of an answer that is no file
QUOTED_BYTES = 400  # that are shown of a message that could not be sent
PROGRESS_LINES = 5  # from so many lines on, a message's progress is shown
REACTION_CHARACTERS = 32  # a family of joined emoji has up to 11
TYPING_SECONDS = 3.0  # between two notices of ours that we type (IRCv3 typing)
TYPING_LASTS = {"active": 6.0, "paused": 30.0}  # seconds that others' notices last (IRCv3 typing)
TYPING_SPARE = 3  # lines of budget that must be left to send a typing notice
TYPING_MOST = 20  # users who type in one conversation
NAMES_GREETED = 20  # who is here, told to a newcomer in one line
NAMES_A_LINE = 100  # at 64 bytes each still well below LINE_BYTES

HEAD_BYTES = 16 * 1024  # of a request of HTTP
HEADERS_MOST = 100
CHUNK_LINE_BYTES = 256  # the size of a chunk, and extensions that nothing is done with
TRAILER_BYTES = 4 * 1024
DISCARDED_BYTES = 64 * 1024  # of a body that is not wanted: else the connection is closed
WORK_OF_A_PIECE = 20  # of a body: chunks of a byte are work, too
WEB_SEND_BUFFER = 512 * 1024  # of the kernel, for a connection that speaks HTTP
STALLED_LOOKS = 4  # times WEB_IDLE_SECONDS without progress end a download
WEB_HEAD_SECONDS = 10.0  # from the first byte of a request to the end of its head
WEB_IDLE_SECONDS = 15.0  # between requests, between pieces of a body, and without progress
WEB_PER_ADDRESS = 256  # connections from one address that speak HTTP
FRAMES_AT_ONCE = 64  # of a WebSocket that are looked at for one line
FRAGMENTS_MOST = 1024  # frames of one message
HELPER_THREADS = {  # of each lane; only one writes files, so that pieces stay in order
    "pages": 2,
    "passwords": 2,
    "mail": 1,
    "disk": 1,
    "files": 1,
    "reads": 2,
    "finishes": 2,
}
FILE_BYTES = 256 * 1024 * 1024  # of one file that a user uploads
FILES_BYTES = 4 * 1024**3  # of all; a user, or an address, has a quarter
FILES_COUNT = 10_000  # all of them are kept in memory
FILES_DAYS = 90  # until a file is removed
UPLOAD_SECONDS = 24 * 3600  # until an unfinished upload is removed
UPLOADS_A_USER = 64  # that are not complete
CHUNKS_RESERVED = 8 * 1024 * 1024  # bytes, for a file whose size is not announced; then double
FILE_NAME_BYTES = 200
FILE_MESSAGES = 50  # of the owner, that carry the link of one file
FILE_PIECE_BYTES = 256 * 1024  # read from disk, or from the network, at once ...
FILE_PIECE_MOST = 2 * 1024 * 1024  # ... and sent, while each piece leaves ...
FAST_PIECE_MS = 50  # ... in less than this
PICTURE_HEAD_BYTES = 256 * 1024  # in which the size of a picture is looked for
TEXT_HEAD_BYTES = 4096  # in which there is nothing but text, if it is a text
TOKEN_SECONDS = 600  # until an unused upload token ends
TOKENS_A_USER = 8
FILES_SWEEP_SECONDS = 600.0
LOG_LINES = 1000  # that wait for standard error to be read ...
LOG_FLUSH_SECONDS = 0.5  # ... and how long the end of the program waits for that
CLOCK_JUMP_SECONDS = 2.0  # a clock that moves by more beside the monotonic one was set
ADDRESS_SECONDS = 15.0  # after its last connection an address has its budget again

LISTEN_SECONDS = 1.0  # how long our client waits for a server to speak first ...
LISTEN_CONNECT_TIMES = 4  # ... or this many times what connecting took, the longer
CONNECT_SECONDS = 10.0  # to one address, and as much again for the TLS handshake
BACKOFF_FIRST = 0.5  # seconds before the first attempt to reconnect
BACKOFF_MOST = 30.0
DISMISSED_SECONDS = 2.0  # for a server to hang up after it said ERROR
ONLINE_SECONDS = 30.0  # a connection that lasts so long resets the back-off
NEXT_ADDRESS_SECONDS = 0.25  # until the next address is tried, too (RFC 8305 section 5)
RETRY_SECONDS = 60.0  # that a filter looks for a server it has lost
WATCH_SECONDS = 1.0  # between two looks whether the server is still there ...
SILENT_SECONDS = 25.0  # ... which is given up after so long: half of it, then a PING ...
WAITING_SECONDS = 10.0  # ... and sooner while a message waits to be acknowledged
JOIN_SECONDS = 60.0  # that a JOIN may take
BATCH_SECONDS = 60.0  # that a batch of lines may take
ECHO_SECONDS = 20.0  # that other servers may take to echo a message before we ask
LOGIN_SECONDS = 30.0  # that a log-in may take ...
REGISTRATION_SECONDS = 90.0  # ... and a whole registration
LINE_ROOM = 100  # bytes of text in a line, at least, however long our address is
OTHER_SECONDS = 60.0  # the same for other servers, which answer a busy client late
OUTBOX_FULL = 256  # messages waiting: with so many, a pipe is not read
UNDERSTOOD_KEPT = 10_000  # said to a server that may turn out to speak IRC, to be said again

PAINTS_A_SECOND = 30  # of the terminal: more cannot be seen
LINES_AT_ONCE = 200  # new in a conversation that a terminal shows: a page of history
LINES_A_SECOND = 600  # ... and after that: more is left for those who read back
BESIDE_COLUMNS = 60  # with fewer, a term and its explanation stand one below the other
MARK_COLUMNS = 20  # of a conversation's name in the status row
LEAST_COLUMNS, LEAST_ROWS = 10, 4  # of a terminal that we draw on
BENCH_PAYLOAD = LINE_BYTES - 256  # beside the time, and the name of who said it
BENCH_QUIET_SECONDS = 0.3  # without new lines: all clients have joined
ESCAPE_SECONDS = 0.15  # a lone ESC is a key, not the beginning of one, after this ...
ESCAPE_LATE_SECONDS = 0.5  # ... unless what makes it one comes by then, over a slow line
PASTE_SECONDS = 3.0  # without more of a paste: its end was lost
LEAVE_SECONDS = 5.0  # in which a second Ctrl-C leaves; within CLEAR_SECONDS it only clears
CLEAR_SECONDS = 1.0
TYPED_KEPT = 500  # lines of what was typed, for the arrow keys

# ======================================================================================
# VOCABULARY
# ======================================================================================
# An Event is one record of something that other users can see. It names its audience and
# never its receivers, which are worked out once, when the turn is written.

LOBBY = "#lobby"  # the channel of all users who do not choose another
SERVICE = "NickServ"  # the service for accounts, for clients without commands for them
SERVICE_KEY = SERVICE.lower()
SERVICES = (SERVICE_KEY, "chanserv", "histserv")  # other servers have these, too
PASSWORD_CHANGED = "your password is another now"  # as NickServ says it, and ...
ACCOUNT_GONE = "your account is gone"  # ... this
UNCONFIRMED = "sent-"  # before a message's id, in a PING that is sent behind it

MESSAGE, ACTION, NOTICE = "message", "action", "notice"
JOIN, PART, QUIT, NICK, TOPIC = "join", "part", "quit", "nick", "topic"
KICK, MODE, PASSWORD = "kick", "mode", "password"  # PASSWORD: the mode k
RENAME = "rename"  # of a channel: about is the name it had
INVITE, INVITED, AWAY, WALLOPS = "invite", "invited", "away", "wallops"
REALNAME, ACCOUNT = "realname", "account"
HOST = "host"  # a user is connected from elsewhere: about is the username
TAGS = "tags"  # a message that has nothing but tags: a user likes another, or unlikes it
HINT = "hint"  # a message that is soon out of date: a user is typing
REDACT = "redact"  # a message is taken back: the text is its msgid, and " :reason"
USER_MODE, METADATA = "user mode", "metadata"  # METADATA: about is the key
ENTERED = "entered"  # another session of the user joined a channel
RENAMED = "renamed"  # a channel has another name, and about is the old one
READ_ON = "read"  # another session of the user read on
ONLINE, OFFLINE = "online", "offline"  # of a user whom the session monitors
KILLED, REPLACED = "killed", "replaced"  # the session ends with that
SOFT_BREAK = "\0"  # in a text: a client sent its line in two pieces here; it cannot be typed
SPOKEN = (MESSAGE, ACTION, NOTICE)  # the kinds that a person said
# Kinds that each session renders for itself, see Session.hear()
PERSONAL = frozenset((ENTERED, RENAMED, READ_ON, ONLINE, OFFLINE, METADATA, KILLED, REPLACED))
EPHEMERAL = PERSONAL | frozenset(  # kinds that history does not keep
    (INVITE, INVITED, AWAY, WALLOPS, REALNAME, ACCOUNT, HOST, PASSWORD, RENAME, USER_MODE, HINT)
)
REPLAYABLE = (*SPOKEN, TAGS, JOIN, PART, QUIT, KICK, NICK, MODE, TOPIC)  # and those it keeps


class Source(NamedTuple):
    """A user or server that did something, with its name of that moment."""

    name: str
    address: str  # HOST:PORT; an IPv6 host in brackets
    username: str = ""  # as the client gave it, unverified ...
    host: str = ""  # ... and the address, as IRC writes it
    mask: str = ""  # nick!user@host (RFC 2812 section 2.3.1), of which hostmasks are patterns
    account: str = ""  # that the user is logged in to
    bot: bool = False
    identity: str = ""  # the owner of private conversations, see User.identity
    operator: bool = False  # the session operated the server at that moment


def host_of(address: str) -> str:
    return address.rpartition(":")[0]


def source_of(
    name: str, address: str, username: str, account: str = "", bot: bool = False
) -> Source:
    """Return a Source with its mask, which is needed for every message."""
    host = host_of(address).strip("[]")
    if host.startswith(":"):  # a word of IRC cannot begin with one
        host = f"0{host}"
    return Source(name, address, username, host, f"{name}!{username}@{host}", account, bot)


class Event(NamedTuple):
    """One thing that others can see. A tuple, because a storm makes 50,000 events a second."""

    id: int  # grows with every event, over restarts too; the order of everything
    time: int  # milliseconds since 1970; falls when the clock is set back
    kind: str
    source: Source
    audience: Any  # an Audience, see DOMAIN; None when read back from the store
    text: str = ""
    about: str = ""  # the one kicked, or the one that a private message is for
    origin: Any = None  # the Session that did it; None when read back from the store
    tags: str = ""  # client-only tags, as on the wire: +a=b;+c


class MessageIds:
    """Event ids as clients see them: hexadecimal digits, and then four letters for the start of the
    server that made the id. The letters keep a restored backup from repeating an id."""

    PATTERN = re.compile("([0-9a-f]{1,15})([g-z]{4})?")  # SQLite's integers have a bit more

    def __init__(self, starts: Iterable[tuple[int, int, str]] = ()):
        # The first id of each start, the last one that was stored or reserved, its letters
        self.starts = sorted(starts)
        self.first, _, self.letters = self.starts[-1] if self.starts else (0, 0, "")

    def _start(self, id: int) -> tuple[int, int, str]:
        before = bisect.bisect_right(self.starts, id, key=lambda start: start[0]) - 1
        return self.starts[before] if before >= 0 else (0, id, "")

    def text(self, id: int) -> str:
        letters = self.letters if id >= self.first else self._start(id)[2]
        return f"{id:x}{letters}"

    def parse(self, text: str) -> int:
        """Return the id. Raises ValueError if this server has no event of that id."""
        match = self.PATTERN.fullmatch(text)
        id = int(match[1], 16) if match else 0
        known = id >= self.first or id <= self._start(id)[1]
        if not match or not known or self.text(id) != text:
            raise ValueError(text)
        return id


class ChatError(Exception):
    """Base of the errors that this program raises on purpose; the text is a sentence for users."""


class Refused(ChatError):
    """A request of a peer that cannot be granted. The gate tells that peer and no other."""

    def __init__(self, code: str, text: str, *about: str):
        super().__init__(text)
        self.code = code  # a word for programs, the same in every dialect
        self.about = about  # what programs want to know besides: which channel, which name


class Unusable(ChatError):
    """The lack of a thing that this program needs. The program says so in one line and ends."""


class TlsFailed(ChatError):
    """A failure of TLS: the other side speaks none that we accept, or shows a wrong certificate."""


def do_nothing(*_: Any) -> None:
    """Do nothing: for unused hooks, and for timers whose only purpose is another turn."""


# ======================================================================================
# FRAMING
# ======================================================================================
# Bytes are split at LF first and decoded line by line after, so that a character cut in
# two by the network is whole again before anything looks at it.

TOO_LONG = b"\n"  # stands for a line over the limit; no real line holds a newline


class LineBuffer:
    """Bytes in, lines out, as tokio's LinesCodec frames them: split at LF, less one CR before it.

    Bytes stay as they came until they are about to be taken, LINES_SPLIT lines at a time: a list of
    all short lines would be twenty times as large. A line longer than `limit` bytes comes out as
    TOO_LONG once and is skipped."""

    __slots__ = ("buffer", "ended", "first", "limit", "lines", "searched", "skipping", "start")
    out, closed, in_body = b"", False, False  # what other framers have

    def __init__(self, limit: int):
        self.limit = limit
        self.clear()
        self.ended = False
        self.first = True  # nothing was taken: what follows may be no lines

    def clear(self) -> None:
        """Drop all bytes that were fed and not taken."""
        self.buffer = b""
        self.start = 0  # of what is not split
        self.searched = 0  # up to here there is no LF behind start
        self.lines: list[bytes] = []  # split, the oldest last
        self.skipping = False  # the rest of a line that was too long

    def feed(self, data: bytes) -> None:
        self.buffer = self.buffer[self.start :] + data if self.start < len(self.buffer) else data
        self.searched = max(0, self.searched - self.start)
        self.start = 0
        if self.skipping:
            end = self.buffer.find(b"\n") + 1
            self.start = self.searched = end or len(self.buffer)
            self.skipping = not end
        elif len(self.buffer) > self.limit + 2 and self.buffer.find(b"\n", self.searched) < 0:
            self.buffer = self.buffer[: self.limit + 2]  # too long, whatever comes

    def take(self) -> bytes | None:
        """Return the oldest complete line; None when there is none."""
        if self.lines:
            return self.lines.pop()
        if self.first:
            line = self._take_long()
            self.first = not line
            return line
        end = self.buffer.rfind(b"\n", self.start, self.start + min(self.limit, LINES_SPLIT))
        if end < 0:
            return self._take_long()
        self.lines = self.buffer[self.start : end].split(b"\n")
        self.start = self.searched = end + 1
        if b"\r" in self.buffer:
            self.lines = [line.removesuffix(b"\r") for line in self.lines]
        self.lines.reverse()
        return self.lines.pop()

    def _take_long(self) -> bytes | None:
        """Return a line that is not split off yet: a long one, or the last one after finish()."""
        end = self.buffer.find(b"\n", self.searched)
        if end >= 0:
            line = self.buffer[self.start : end].removesuffix(b"\r")
            self.start = self.searched = end + 1
            return line if len(line) <= self.limit else TOO_LONG
        rest = len(self.buffer) - self.start
        self.searched = len(self.buffer)
        if rest > self.limit + 1:  # one more: a CR that may yet be dropped
            self.clear()
            self.skipping = not self.ended
            return TOO_LONG
        if not self.ended or not rest:
            return None
        line = self.buffer[self.start :].removesuffix(b"\r")
        self.clear()
        return line or None

    @property
    def pending(self) -> bool:
        """True if take() would return a line."""
        rest = len(self.buffer) - self.start
        if self.lines or (rest and self.buffer.find(b"\n", self.searched) >= 0):
            return True
        last = self.ended and self.buffer[self.start :] not in (b"", b"\r")
        return rest > self.limit + 1 or last

    def rest(self) -> bytes:
        """Return the bytes after the first line."""
        return self.buffer[self.start :]

    def finish(self) -> None:
        """Note the end of input: bytes after the last newline count as a line, too."""
        self.ended = True


def fold(name: str) -> str:
    """Return the key of a name: NFKC and full case folding, so that forms of one name agree."""
    if name.isascii():  # nothing to normalize, and asked for with every message
        return name.lower()
    folded = unicodedata.normalize("NFKC", name).casefold()
    return unicodedata.normalize("NFKC", folded)


def cut(text: str, limit: int) -> str:
    """Return as much of `text` as fits in `limit` bytes of UTF-8, without splitting a character."""
    return text.encode()[:limit].decode(errors="ignore")


NOT_IN_NAMES = frozenset(",:!@*?.$/")  # they mean something in masks, URLs or IRC lines
NOT_FIRST_IN_NAMES = frozenset("#&~%+-([")  # channel types, ranks, and our own prefixes


# Unicode's Default_Ignorable_Code_Point property (DerivedCoreProperties.txt of Unicode
# 17.0), with its reserved code points: shown as nothing by whatever does not support them.
DEFAULT_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

# Characters that show nothing although they are not Default_Ignorable: BRAILLE PATTERN BLANK (So),
# OBJECT REPLACEMENT CHARACTER (So, the place of an image: nothing in most fonts), KHITAN SMALL
# SCRIPT FILLER (Mn, only changes the layout of a cluster), EGYPTIAN HIEROGLYPH FULL BLANK and HALF
# BLANK (Lo since Unicode 15; unassigned for Python 3.11), MUSICAL SYMBOL NULL NOTEHEAD (So).
BLANKS = frozenset("\u2800\ufffc\U00016fe4\U00013441\U00013442\U0001d159")


def is_solid(c: str) -> bool:
    """Return whether a character shows ink: it is no control, separator or blank."""
    if c.isascii():
        return "!" <= c <= "~"
    return (
        unicodedata.category(c)[0] not in "CZ"
        and c not in BLANKS
        and not DEFAULT_IGNORABLE.match(c)
    )


# Characters that look like an ASCII one, each over the lower case of what it looks like, after
# Unicode's confusables.txt (TS 39). Added to that: what differs from a capital only in size, as
# names do not differ by case (small capitals, and Cyrillic like them), and shapes as near as
# Greek kappa, tau, chi. Left out: thorn and Cyrillic sha, plain to see, and common in names.
# Capitals have entries of their own: Greek capital nu looks like N, small nu like v. ASCII maps
# to itself, unlike in TS 39: I and l, O and 0, m and rn stay apart.
LOOKALIKES = (
    str.maketrans(  # Latin small capitals
        "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢ",
        "abcdefghijklmnopqrstuvwyz",
    )
    | str.maketrans(  # Latin
        "ıĸƄƅƒƖƦƧƷƼƽƿǀȜȢȣɑɡɣɩɯʋᴑᶃᶌẝỿⱭꝚꝪꝮꞘꞙꞟꞫꞬꞮꞲꞳꞴꬲꬵꬽꭇꭈꭎꭒꭚ",
        "ikbbflr235spl388agyiwuogyfya239ffu3gijxbeforruuy",
    )
    | str.maketrans(  # Greek
        "ͿΑΒΕΖΗΙΚΜΝΟΡΤΥΧαγηικνορστυχωϜϳϺᴦ",
        "jabezhikmnoptyxaynikvopotuxwfjmr",
    )
    | str.maketrans(  # Cyrillic
        "ЅІЈАВЕЗКМНОРСТУХЬабвгезкмнорстухьѕіјѡѴѵҮүҺһҽӀӏӠӡԁԌԍԚԛԜԝᲀᲂᲃᲄᲅꙄꙇ",
        "sijabe3kmhopctyxba6bre3kmhopctyxbsijwvvyyhhell33dggqqwwboctt2i",
    )
)


def skeleton(name: str) -> str:
    """Return what `name` looks like: names with one skeleton can be taken for each other. Compare
    names as shown, not folded ones. Marks count (bob is not bób), except that a dot above i or j
    adds nothing to see. Distinct ASCII names differ here unless only in case."""
    if name.isascii():
        return name.lower()
    # Decomposed, so that accented letters of any script become a lookalike and the same mark.
    shown = DEFAULT_IGNORABLE.sub("", unicodedata.normalize("NFKD", name))
    shown = shown.translate(LOOKALIKES).casefold()
    shown = shown.replace("i\u0307", "i").replace("j\u0307", "j")
    return unicodedata.normalize("NFKC", shown)


def is_visible(text: str) -> bool:
    """Return whether a text shows more than combining marks without a letter."""
    return any(is_solid(c) and unicodedata.category(c)[0] != "M" for c in text)


def is_word(text: str, limit: int) -> bool:
    """Return whether `text` is one word of an IRC line, of at most `limit` bytes."""
    solid = text and text[0] != ":" and all(map(is_solid, text))
    return bool(solid) and len(text.encode()) <= limit


def clean_name(wanted: str) -> str:
    """Return the nearest name that every dialect can carry, in NFKC; "" if nothing is left.
    Invisible characters (Unicode C*, Z*, Default_Ignorable_Code_Point) and those of NOT_IN_NAMES
    become "_", and so does one of NOT_FIRST_IN_NAMES at the start."""
    name = wanted.strip()[: 4 * NAME_CHARACTERS]
    # NFKC would drop or replace some of those: then they would be in the name unseen
    name = "".join(c if is_solid(c) else "_" for c in name)
    name = unicodedata.normalize("NFKC", name)
    name = "".join(c if is_solid(c) and c not in NOT_IN_NAMES else "_" for c in name)
    if name[:1] in NOT_FIRST_IN_NAMES:
        name = "_" + name[1:]
    return cut(name[:NAME_CHARACTERS], NAME_BYTES) if is_visible(name) else ""


def numbered_name(name: str, number: int) -> str:
    """Return a name with a number: alice, 2 -> alice2. The name is shortened to make room."""
    suffix = str(number)
    stem = name[: NAME_CHARACTERS - len(suffix)]
    return cut(stem, NAME_BYTES - len(suffix)) + suffix


def check_channel_name(name: str) -> None:
    """Raise Refused unless `name` can name a channel (RFC 2812 section 1.3, in Unicode)."""
    if not name.startswith("#") or len(name) < 2:
        raise Refused("BAD_CHANNEL", "a channel's name begins with # and goes on, like #tea", name)
    if len(name.encode()) > CHANNEL_BYTES:
        raise Refused("BAD_CHANNEL", f"a channel's name has at most {CHANNEL_BYTES} bytes", name)
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
    """Parse IRCv3 message tags: a=b;c -> {"a": "b", "c": ""}. Nothing in them is an error."""
    pairs = (tag.partition("=") for tag in text.split(";"))
    return {key: unescaped_tag(value) for key, _, value in pairs if key}


def parse_message(line: str) -> Message:
    """Parse a line of IRC. Spaces in a row count as one, a source is ignored, any case is right."""
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
    """Yield pieces of at most `room` bytes, cut between words if possible, else characters."""
    while len(text.encode()) > room:
        piece = cut(text, room)
        space = piece.rfind(" ") + 1
        if space > len(piece) // 2:
            piece = piece[:space]
        yield piece
        text = text[len(piece) :]
    yield text


def wrapped(words: Iterable[str], room: int, between: str = " ") -> Iterator[str]:
    """Yield the words in lines of at most `room` bytes."""
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


@functools.lru_cache(1000)
def pattern_of(mask: str) -> re.Pattern:
    """Return the compiled pattern of a folded mask: * matches any text, ? any one character.

    An atomic group, (?>...), never gives back what it matched. So each piece between two stars is
    found once, at its first occurrence, and no number of stars makes a match slow: the time is at
    most the product of both lengths, where nested .* would double it with every star."""
    first, *others = (re.escape(piece).replace(r"\?", ".") for piece in re.split(r"\*+", mask))
    if others:
        *middle, last = others
        first += "".join(f"(?>.*?{piece})" for piece in middle) + f".*{last}"
    return re.compile(first, re.DOTALL)


def mask_pattern(mask: str) -> re.Pattern:
    """Return the compiled pattern of `mask` for folded texts: see pattern_of()."""
    return pattern_of(fold(mask))


CONTROLS = {n: None for n in (*range(0x20), *range(0x7F, 0xA0)) if chr(n) not in "\t\n"}
# The colours of IRC (mIRC's, and hexadecimal ones); its other styles are control characters.
COLOURS = re.compile("\x03(?:\\d{1,2}(?:,\\d{1,2})?)?|\x04(?:[0-9a-fA-F]{6})?")
CONTROLS |= {0x2028: " ", 0x2029: " "}  # some programs end a line there


def harmless(text: str) -> str:
    """Return `text` without control characters but TAB and newline, harmless on a terminal."""
    return text if text.isprintable() else text.translate(CONTROLS)


# Embeddings, overrides and isolates (UAX 9): they move what stands around a message, too.
BIDI_CONTROLS = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def escaped(text: str) -> str:
    """Return `text` with control characters made visible, for the log and error messages."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def plain_text(text: str) -> str:
    """Return an IRC text without control characters and without colour codes and their digits."""
    return harmless(COLOURS.sub("", text))


def split_words(text: str) -> list[str] | None:
    """Split a text at blanks; a word in double quotes may contain blanks. A quote inside a word is
    part of the word. Return None if a quoted word does not end."""
    words = re.findall(r'"[^"]*"(?=\s|$)|\S+', text)
    if any(len(word) > 1 and word[0] == '"' != word[-1] for word in words):
        return None
    return [word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word for word in words]


def positive_number(text: str) -> float:
    """Return a decimal number; 0 if `text` is not a number, or is not positive."""
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else 0.0


def whole_number(text: str) -> int | None:
    """Return the whole number in `text`; None if it is none, or has 10 digits or more."""
    return int(text) if text.isdecimal() and len(text) < 10 else None


def time_text(milliseconds: int) -> str:
    """Return a time as 2026-11-22 08:30:05Z. UTC: a server knows no user's time zone."""
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1, "message" -> "1 message"; 2 -> "2 messages"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# ======================================================================================
# BUFFERS
# ======================================================================================
# Bytes between the dialects and the socket. What a channel said is one bytes object in
# the queues of all its members, so a backlog costs a reference a receiver, not a copy.


class SendQueue:
    """The bytes that wait to be sent to one receiver, in order."""

    __slots__ = ("chunks", "offset", "size")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.offset = 0  # how much of the first chunk is gone
        self.size = 0  # bytes waiting in all

    def append(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)

    def head(self) -> bytes | memoryview:
        """Return what the next send may take: one large chunk, or small ones joined."""
        first = self.chunks[0]
        if self.offset:
            return memoryview(first)[self.offset :]
        if len(self.chunks) == 1 or len(first) >= SEND_BYTES:
            return first
        sizes = itertools.accumulate(map(len, self.chunks))
        count = sum(1 for _ in itertools.takewhile(lambda size: size <= SEND_BYTES, sizes))
        return b"".join(self.chunks[: max(count, 1)])

    def advance(self, sent: int) -> None:
        """Drop `sent` bytes from the head, after a send."""
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
    """TLS between two buffers of bytes. The filter has no socket and never waits.

    feed() takes bytes from the network and returns the plaintext in them. seal() takes plaintext.
    take() returns the bytes to be sent, including those of the handshake. Raises TlsFailed."""

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
        """Send close_notify once, after the handshake; return whether it was sent now."""
        if self.finished or not self.ready:
            return False
        self.finished = True
        with contextlib.suppress(self.ssl.SSLError):
            self.session.unwrap()
        return True

    def fingerprint(self) -> str:
        """The SHA-256 of the peer's certificate, in hex; "" if the peer shows none."""
        certificate = self.session.getpeercert(binary_form=True)
        return hashlib.sha256(certificate).hexdigest() if certificate else ""


class Budget:
    """A token bucket for the lines of a peer: `burst` at once, then `rate` a second."""

    __slots__ = ("burst", "rate", "stamp", "tokens")

    def __init__(self, burst: float, rate: float, now: float):
        self.burst, self.rate = burst, rate
        self.tokens, self.stamp = burst, now

    def refill(self, now: float) -> None:
        self.tokens = min(self.burst, self.tokens + (now - self.stamp) * self.rate)
        self.stamp = now

    def wait(self) -> float:
        """Return the seconds until there is a whole token to spend again."""
        return max(0.0, (1.0 - self.tokens) / self.rate)


# ======================================================================================
# COMMANDS
# ======================================================================================
# A command is a function with a record on it. To add one, write the function and put
# @table("verb", ...) above it; its docstring is "SYNTAX -- what it does", and the help
# text is made from that. What every command needs is checked in one place, run(). A
# handler with a long answer is a generator: wherever it yields, it can be left for later. One
# that waits for acts and jobs is a generator of these, under @in_steps.

LongAnswer = Iterator[None] | None  # the rest of it, if there is one


class Command(NamedTuple):
    """A command, and the requirements that the gate checks before it runs."""

    verb: str
    handler: Callable
    syntax: str
    summary: str
    least: int  # parameters it needs
    most: int  # parameters it takes; the rest is left alone, or belongs to the last one
    nameless: bool = False  # may be used before there is a name
    privileged: bool = False  # only for operators of the server
    exact: bool = False  # more parameters than `most` are refused: one of them is a password


class Commands(dict[str, Command]):
    """The commands of one dialect by verb, and the gate in front of them."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark  # what stands before a verb on the wire

    def __call__(self, verb: str, least: int = 0, most: int | None = None, doc: str = "", **needs):
        """Decorator: register the command `verb`. Dialects share a handler, each with its `doc`."""

        def register(handler: Callable) -> Callable:
            if verb in self:
                raise ValueError(f"two handlers for {verb}")
            syntax, summary = " ".join((doc or handler.__doc__).split()).split(" -- ")
            takes = least if most is None else most
            self[verb] = Command(verb, handler, syntax, summary, least, takes, **needs)
            return handler

        return register

    def run(self, session: "LocalSession", verb: str, given: list[str] | str) -> "LongAnswer":
        """Check a command's needs and run it: the one gate. `given` are the parameters, or the text
        to split into them. Return the rest of a long answer, if there is one. Raises Refused."""
        command = self.get(verb)
        if command is None:
            text = f"there is no {self.mark}{verb}; {self.mark}help lists what there is"
            raise Refused("UNKNOWN_COMMAND", text, verb)
        if session.user is None and not command.nameless:
            raise Refused("NOT_NAMED", "a name first, please; then commands")
        if command.exact:  # a password is never cut, joined or guessed
            params = split_words(given) if isinstance(given, str) else given
            if params is None or len(params) > command.most:
                text = f"it goes like this: {command.syntax}; quote a password that has blanks"
                raise Refused("NEED_MORE_PARAMS", text, command.verb)
        elif isinstance(given, str):
            params = given.split(None, command.most - 1) if command.most else []
        else:
            params = given[: command.most]
        if len(params) < command.least:
            raise Refused("NEED_MORE_PARAMS", f"it goes like this: {command.syntax}", verb)
        if command.privileged and not session.operator:
            raise Refused("NOT_SERVER_OPERATOR", "only operators of this server can do that")
        return command.handler(session, *params)


# ======================================================================================
# ACCOUNTS
# ======================================================================================
# Secrets, and how a client proves to know one (SASL, RFC 4422). A mechanism is a generator:
# it yields the server's messages, and the client's answers are sent into it. Slow work is
# yielded as a function to be called off the loop. At the end the mechanism returns the
# account's name, or raises Refused.


def sha256_hmac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")


def client_keys(password: str, salt: bytes, rounds: int) -> tuple[bytes, bytes]:
    """Return ClientKey and ServerKey (RFC 5802 section 3)."""
    prepared = unicodedata.normalize("NFKC", password).encode()
    salted = hashlib.pbkdf2_hmac("sha256", prepared, salt, rounds)
    return sha256_hmac(salted, b"Client Key"), sha256_hmac(salted, b"Server Key")


def scram_keys(password: str, salt: bytes, rounds: int) -> tuple[bytes, bytes]:
    """Return StoredKey and ServerKey (RFC 5802 section 3)."""
    client_key, server_key = client_keys(password, salt, rounds)
    return hashlib.sha256(client_key).digest(), server_key


class Verifier(NamedTuple):
    """A stored password (RFC 5802 section 3) that can be checked but not read back."""

    salt: bytes
    rounds: int
    stored_key: bytes
    server_key: bytes

    def fits(self, password: str) -> bool:
        """Return whether a password is the stored one. The rounds take time: off the loop."""
        stored_key, _ = scram_keys(password, self.salt, self.rounds)
        return hmac.compare_digest(self.stored_key, stored_key)


def make_verifier(password: str, rounds: int = ACCOUNT_ROUNDS) -> Verifier:
    """Make a verifier for a new password, with a new salt. The rounds take time: off the loop."""
    salt = secrets.token_bytes(16)
    return Verifier(salt, rounds, *scram_keys(password, salt, rounds))


def operators_of(known: Iterable[tuple[str, str]]) -> dict[str, Verifier]:
    return {name: make_verifier(word, OPERATOR_ROUNDS) for name, word in known}


DECOY_KEY = secrets.token_bytes(16)


def decoy_verifier(name: str, rounds: int | None = None) -> Verifier:
    """Return a verifier for a name that does not exist: no password fits, and one name always gets
    the same salt. So an answer does not reveal whether the account exists."""
    salt = sha256_hmac(DECOY_KEY, fold(name).encode())[:16]
    return Verifier(salt, rounds or ACCOUNT_ROUNDS, b"", b"")


Lookup = Callable[[str], tuple[str, Verifier]]  # name -> as it is registered, its verifier
Mechanism = Iterator  # of bytes to the client, or functions for off the loop


def wrong_login() -> Refused:
    """Return a new refusal each time: an exception keeps the frames that it passed through, and
    these keep the password."""
    return Refused("SASL_FAILED", "name or password are wrong")


def sasl_plain(find: Lookup) -> Mechanism:
    """PLAIN, from the server's side (RFC 4616)."""
    try:
        authzid, authcid, password = (yield b"").decode().split("\0")
    except ValueError:  # not three parts; UnicodeDecodeError is a ValueError
        raise wrong_login() from None
    if not authcid or not password or fold(authzid or authcid) != fold(authcid):
        raise wrong_login()
    name, verifier = find(authcid)
    if not (yield functools.partial(verifier.fits, password)):
        raise wrong_login()
    return name


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def scram_fields(message: str) -> dict[str, str]:
    """Parse the fields of a SCRAM message: n=alice,r=abc -> {"n": "alice", "r": "abc"}"""
    return dict(field.partition("=")[::2] for field in message.split(","))


def sasl_scram(find: Lookup) -> Mechanism:
    """SCRAM-SHA-256 without channel binding, as the server (RFC 5802 section 3, RFC 7677)."""
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
    """EXTERNAL, from the server's side (RFC 4422 appendix A). TLS has taken the proof before;
    find() knows which account the certificate belongs to."""
    try:
        authzid = (yield b"").decode()
    except UnicodeDecodeError:
        raise wrong_login() from None
    return find(authzid)[0]


MECHANISMS = {"PLAIN": sasl_plain, "SCRAM-SHA-256": sasl_scram, "EXTERNAL": sasl_external}


def login_plain(account: str, password: str) -> Mechanism:
    """PLAIN, from the client's side: takes the server's messages and yields the answers."""
    yield b""
    yield f"{account}\0{account}\0{password}".encode()


def login_scram(account: str, password: str) -> Mechanism:
    """SCRAM-SHA-256, from the client's side. The server has to prove the password, too."""
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


def login_external() -> Mechanism:
    """EXTERNAL, from the client's side: TLS has shown the certificate."""
    yield b""
    yield b""


LOGINS = {"SCRAM-SHA-256": login_scram, "PLAIN": login_plain}  # the best one first


class Exchange:
    """One log-in by SASL: base64 lines in and out (IRCv3 sasl-3.1)."""

    def __init__(self, mechanism: Mechanism):
        self.mechanism = mechanism
        self.verifier: Verifier | None = None  # of the account that is claimed
        self.received = ""

    def feed(self, chunk: str) -> bytes | None:
        """Return the client's message once it is complete; a chunk of 400 bytes is not the last
        one."""
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
        """Return a message of the server as lines of base64, at most SASL_CHUNK bytes each."""
        text = base64.b64encode(data).decode()
        pieces = [text[n : n + SASL_CHUNK] for n in range(0, len(text), SASL_CHUNK)]
        return pieces if len(text) % SASL_CHUNK else [*pieces, "+"]


def is_loopback(host: str) -> bool:
    return host.startswith("127.") or host.strip("[]") == "::1"


def address_key(host: str, own: str = "") -> str:
    """Return an address as limits count it: an IPv6 address as its /64, since one user has a whole
    /64. A LAN shares a /64: addresses in the /64 of `own` (our address) count as themselves, and so
    do link-local ones."""
    host = host.strip("[]").partition("%")[0]
    if ":" not in host:
        return host
    network = ipaddress.ip_network((host, 64), strict=False)
    local = own.strip("[]").partition("%")[0]
    if (
        network.is_link_local
        or host == "::1"
        or (":" in local and network == ipaddress.ip_network((local, 64), strict=False))
    ):
        return host
    return str(network)


class Throttle:
    """A limit on failed attempts, by (address, subject) and by address alone. So a user at another
    address cannot lock the owner of an account out. Times are of the monotonic clock."""

    def __init__(
        self,
        most: int = LOGIN_TRIES,
        seconds: int = LOGIN_WAIT_SECONDS,
        most_an_address: int = LOGIN_TRIES_AN_ADDRESS,
    ):
        self.most, self.most_an_address = most, most_an_address
        self.milliseconds = seconds * 1000
        self.failures: dict[tuple[str, str | None], tuple[int, int]] = {}  # how many, until when

    def count(self, host: str, subject: str | None, now: int) -> int:
        count, until = self.failures.get((host, subject and fold(subject)), (0, 0))
        return count if now < until else 0

    def wait(self, host: str, subject: str, now: int) -> int:
        """Return the seconds until the next allowed attempt; 0 if none is needed. `now` is in
        ms."""
        own = LOGIN_TRIES_SERVER if subject[:1] == "*" else self.most
        for one, most in ((subject, own), (None, self.most_an_address)):
            if self.count(host, one, now) >= most:
                _, until = self.failures[host, one and fold(one)]
                return (until - now) // 1000 + 1
        return 0

    def check(self, host: str, subject: str, now: int) -> None:
        """Raise Refused if there were too many failures lately."""
        if seconds := self.wait(host, subject, now):
            raise Refused("TRY_LATER", f"too many failures; try again in {seconds} s")

    def failed(self, host: str, subject: str, now: int) -> None:
        for one in (subject, None):
            count = self.count(host, one, now) + 1
            self.failures[host, one and fold(one)] = count, now + self.milliseconds
        if len(self.failures) > LOGIN_FAILURES_KEPT:
            self.sweep(now)
        if len(self.failures) > LOGIN_FAILURES_KEPT:  # all of it still counts: forget a tenth, the
            # fewest failures first, so that a client that fills the table is not forgotten by that
            ranked = sorted(self.failures, key=lambda key: (self.failures[key], key[0]))
            for key in ranked[: LOGIN_FAILURES_KEPT // 10]:
                del self.failures[key]

    def sweep(self, now: int) -> None:
        """Forget the failures that do not count any more."""
        self.failures = {key: one for key, one in self.failures.items() if now < one[1]}

    def succeeded(self, host: str, subject: str) -> None:
        """Forget the failures for a subject, and one failure of the address: every attempt counts
        as a failure until it succeeds."""
        self.failures.pop((host, fold(subject)), None)
        count, until = self.failures.pop((host, None), (0, 0))
        if count > 1:
            self.failures[host, None] = count - 1, until


# ======================================================================================
# DOMAIN
# ======================================================================================
# The chat itself: users, sessions, channels, and the Hub that holds them. It sends nothing
# and stores nothing. The ACTS below change it; every act emits events, and every event
# names its Audience. At the end of a turn the log of events becomes bytes (Turn.deliveries)
# and rows of the store (Turn.events, Turn.records).


class Connected(typing.Protocol):
    """The part of a connection that its session may use."""

    host: str  # the address of the other end: of a proxy, if there is one
    address: str  # HOST:PORT of the client
    limit_key: str  # its address as limits count it, see address_key()
    encrypted: bool  # TLS
    secure: bool  # the same as far as the client: a proxy may be in between
    local: str  # HOST:PORT on our side
    fingerprint: str  # SHA-256 of the client's certificate, "" without one
    gone: bool  # nothing can be sent any more

    def named(self) -> None: ...  # registration is complete
    def charge(self, items: float) -> None: ...  # so much work, see WORK_PER_TOKEN
    def act_for(self, host: str, key: str, secure: bool | None) -> None: ...
    def upgrade(self, head: bytes, opcode: int) -> None: ...  # to a WebSocket, see WEB DIALECT
    def close(self) -> None: ...  # after what is queued


class Wire(typing.Protocol):
    """One way to turn events into bytes. Sessions with the same wire share them."""

    format: "Format"  # for SPOKEN events; several wires may have the same one

    def line(self, audience: "Audience", event: "Event") -> bytes: ...  # any other event
    def own(self, event: "Event", line: bytes) -> bytes: ...  # what its origin gets instead


class Format(typing.Protocol):
    def encode(self, audience: "Audience", events: "list[Event]") -> list[bytes]: ...


class Dedup(typing.Protocol):
    """The lookup of a message by the id that its sender gave it."""

    def find(self, owners: Iterable[str], own_id: str) -> int | None: ...
    def lost(self, owners: Iterable[str], own_id: str, ticks: int) -> bool: ...


class ActStore(typing.Protocol):
    """The three questions that an act may ask of the store: dedup keys, authors, history."""

    dedup: Dedup

    def author_of(self, key: str, id: int) -> "tuple[int, str] | None": ...
    def foundings(self, key: str) -> set[int]: ...


class ServerCalls(typing.Protocol):
    """The part of the server that its sessions may use."""

    motd: list[str]
    tls_port: int

    def nameless(self) -> int: ...  # connections without a name
    def refresh(self) -> None: ...  # read accounts again if another process changed them
    def note(self, text: str) -> None: ...  # to the log
    def read_files(self) -> tuple: ...  # again, off the loop
    def use_files(self, files: tuple) -> None: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...
    def mail(self, address: str, name: str, code: str) -> None: ...  # off the loop
    def background(self, lane: str, job: Callable[[], Any]) -> None: ...  # off the loop
    def settle(
        self, session: "LocalSession", lane: str, job: Callable[[], Any], then: Callable
    ) -> None: ...  # off the loop, whatever becomes of the session: then(result, it is there)
    def trouble(self) -> str: ...  # what is wrong, "" if nothing is
    def metrics(self) -> dict[str, tuple[str, str, float]]: ...  # kind, text and value by name
    # Run job() off the loop, then then(its result) on it; a job of PAGE_LANE reads the store
    def later(self, session: "LocalSession", lane: str, job: Callable, then: Callable) -> None: ...


# Files


FILE_TAG = "chat.py/file"  # path, type, bytes, width and height


TAG_CHARACTERS = {"\\": "\\\\", ";": "\\:", " ": "\\s", "\r": "\\r", "\n": "\\n", "\0": ""}


TAG_TRANSLATION = str.maketrans(TAG_CHARACTERS)


def escaped_tag(value: str) -> str:
    """Return a tag value as it is written on the wire; unescaped_tag() is the inverse."""
    return value.translate(TAG_TRANSLATION)


class StoredFile(NamedTuple):
    """A file that a user has uploaded, or has begun to upload."""

    id: str  # 128 random bits in hex: the end of its link
    name: str
    type: str  # of the content, as in Content-Type
    size: int  # bytes; as announced while it is not complete
    owner: str  # an identity, see User.identity
    address: str  # that it came from, as limits count it
    made: int  # milliseconds since 1970
    sha: str = ""  # SHA-256 of the content in hex; "" while it is not complete
    width: int = 0  # of a picture, in pixels
    height: int = 0
    messages: tuple[int, ...] = ()  # ids of the owner's messages that carry the link

    @property
    def on_disk(self) -> str:
        """The name of the file's content in the folder of files. Equal content is stored once."""
        return self.sha or f"{self.id}.part"

    @property
    def tag(self) -> str:
        """The message tag that tells clients about a linked file: path, type and sizes."""
        value = f"/files/{self.id},{self.type},{self.size},{self.width},{self.height}"
        return f"{FILE_TAG}={escaped_tag(value)}"

    def state(self) -> str:
        return json.dumps(self)


FILE_LINK = re.compile(r"/files/([0-9a-f]{32})(?![0-9a-f])")


class Files(dict[str, StoredFile]):
    """All files by id, and the names on disk that may be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.most = FILE_BYTES  # of one file
        self.total = FILES_BYTES  # of all; one owner, or one address, may have a quarter
        self.by_message: dict[int, str] = {}
        self.unwanted: list[str] = []  # names on disk that no link needs any more
        self.finishing: set[str] = set()  # ids of uploads whose content gets its name on disk

    def load(self, rows: Iterable[tuple[str, str]]) -> None:
        for id, state in rows:
            *values, messages = json.loads(state)
            self[id] = StoredFile(*values, tuple(messages))
            self.by_message.update(dict.fromkeys(messages, id))

    def linked(self, text: str) -> StoredFile | None:
        """Return the complete file whose link is in a text; of several links, the first."""
        found = (self.get(match[1]) for match in FILE_LINK.finditer(text))
        return next((file for file in found if file and file.sha), None)

    def check_room(self, size: int, owner: str, address: str) -> None:
        """Raise Refused if there is no room for a file of this size."""
        if size > self.most:
            raise Refused("FILE_TOO_LARGE", f"a file has at most {self.most:,} bytes")
        if len(self) >= FILES_COUNT:
            raise Refused("NO_ROOM", f"this server keeps at most {FILES_COUNT:,} files")
        all_files = list(self.values())
        own = [one for one in all_files if one.owner == owner or one.address == address]
        if len(own) >= FILES_COUNT // 4:
            raise Refused("NO_ROOM", f"one user has at most {FILES_COUNT // 4:,} files")
        if sum(not one.sha for one in own) >= UPLOADS_A_USER:
            raise Refused("NO_ROOM", f"one user has at most {UPLOADS_A_USER} uploads at once")
        for limit, mine, what in (
            (self.total, all_files, "all files together have"),
            (self.total // 4, [one for one in all_files if one.owner == owner], "your files have"),
            (self.total // 4, [f for f in all_files if f.address == address], "one address has"),
        ):
            if size + sum(file.size for file in mine) > limit:
                raise Refused("NO_ROOM", f"{what} at most {limit:,} bytes")


def hashed_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Grant(NamedTuple):
    """The right to upload, held by the user who asked for a token."""

    user: "User"
    until: int  # Hub.ticks


class Grants(dict[str, Grant]):
    """Upload tokens, by their hash. A token ends with its time, or with its user's last session."""

    def make(self, user: "User", ticks: int) -> str:
        """Return a new token. If the user has too many tokens, the oldest ends."""
        for digest in [d for d, one in self.items() if one.until < ticks or not one.user.sessions]:
            del self[digest]
        mine = [digest for digest, one in self.items() if one.user is user]
        for digest in mine[: max(0, len(mine) - TOKENS_A_USER + 1)]:
            del self[digest]
        token = secrets.token_hex(16)
        self[hashed_token(token)] = Grant(user, ticks + TOKEN_SECONDS * 1000)
        return token

    def owner(self, token: str, ticks: int) -> str:
        """Return the identity of the user with this token; "" if there is none. Every use extends
        the token's time."""
        digest = hashed_token(token)
        one = self.get(digest)
        if one is None or one.until < ticks or not one.user.sessions:
            self.pop(digest, None)
            return ""
        self[digest] = one._replace(until=ticks + TOKEN_SECONDS * 1000)
        return one.user.identity


class Site:
    """The objects and settings that all sessions of one server share."""

    def __init__(
        self, hub: "Hub", store: Any, server: ServerCalls, wires: Any, options: "ServerOptions"
    ):
        self.hub, self.store, self.server = hub, store, server
        self.web = options.web  # settings of the web dialect
        self.folder: Any = None  # of files: jobs that read and write their content
        self.grants = Grants()  # upload tokens
        self.uploading: dict[str, Any] = {}  # by id of a file: the session that goes on with it
        self.wires = wires  # of IRC, by capabilities
        self.password = options.password
        self.name, self.network = options.name, options.network  # of this server, as a host
        self.operators = operators_of(options.oper)  # verifiers by name
        self.registration, self.sts, self.flood = options.register, options.sts, options.flood
        self.ids = itertools.count(1)  # of sessions
        self.references = itertools.count(1)  # of batches

    def reference(self) -> str:
        return f"b{next(self.references):x}"

    def act(self, name: str, *values: Any, then: Callable = do_nothing) -> None:
        """Do an act of the server itself, which cannot be refused; call then(its result)."""
        then(self.hub.perform(name, 0, *values))


PAGE_LANE, PASSWORD_LANE, MAIL_LANE = "pages", "passwords", "mail"  # lanes of helpers
DISK_LANE, FILE_LANE, READ_LANE, FINISH_LANE = "disk", "files", "reads", "finishes"


def base_url(site: Site, secure: bool, authority: str) -> str:
    """Return how the URLs of this server begin: the value of --web-url, or else the address that
    other machines reach, or else the one that the client used (HOST:PORT)."""
    web = site.web
    if web.url:
        return web.url
    port = authority.rpartition(":")[2] if not authority.endswith("]") else ""
    reached = f"{web.address}:{port}" if web.address and port.isdecimal() else authority
    return f"{'https' if secure else 'http'}://{reached}"


def next_time(last: int, now: int) -> int:
    """Return the time of the event after one at `last`, in milliseconds: the wall clock's, but
    unique while the clock runs forward, and at most TIMES_AHEAD ahead of it. A `last` that is
    further ahead means that the clock was set back."""
    if now > last or last > now + TIMES_AHEAD:
        return now
    return min(last + 1, now + TIMES_AHEAD)


def sessions_by_wire(sessions: "Iterable[Session]") -> "dict[Any, set[Session]]":
    found: "dict[Any, set[Session]]" = {}
    for session in sessions:
        found.setdefault(session.wire, set()).add(session)
    return found


SOURCE_FIELDS = ("name", "address", "username", "account", "bot")  # what source_of() takes


class Session:
    """One connection of a user, as the acts know it. A bare one is not of this process."""

    __slots__ = ("address", "client", "follows", "id", "operator", "token", "user")
    wire: Any = None
    extended_monitor = False  # whether changes of monitored users are told, too

    def __init__(self, id: int):
        self.id = id
        self.address = ""  # HOST:PORT
        self.user: "User | None" = None
        self.token = ""  # the hash of a secret that only this client knows: it resumes a user
        self.client = ""  # the same, also if the token resumes nothing: owner of dedup keys
        self.operator = False  # OPER is for one session, not for all of its user
        self.follows: dict[tuple[str, str], None] = {}  # registry and key, see follow()

    def hear(self, event: Event) -> None:
        """Render one of the PERSONAL events, whose bytes depend on the session."""


class User:
    """A user who is present, or absent within the grace period. Users are compared by identity."""

    __slots__ = (
        *("account_key", "away", "channels", "invitations", "key", "last_time", "login"),
        *("mask_key", "metadata", "modes", "realname", "resume_id", "sessions", "since"),
        *("source", "spoke", "stored", "tokens", "traces"),
    )

    def __init__(self, source: Source, realname: str, resume_id: str, now: int):
        self.resume_id = resume_id  # of this stay, from the first session to the last
        self.stored = False  # the store has a row of this user
        self.traces = False  # something in the history has this user's identity
        self.tokens: dict[str, None] = {}  # resume tokens, the oldest first
        self.login = ""  # Account.identity
        self.realname = realname
        self.modes: set[str] = set()
        self.away = ""  # the reason; "" is present
        self.sessions: list[Session] = []
        self.channels: "dict[Channel, None]" = {}  # in the order of joining
        self.invitations: "dict[Channel, bool]" = {}  # whether an operator gave it
        self.metadata: dict[str, str] = {}
        self.since = now  # milliseconds since 1970
        self.spoke = 0  # Hub.ticks
        self.last_time = 0
        self.set_source(source)

    @property
    def identity(self) -> str:
        """The owner of messages, markers and private conversations: the account's identity, or else
        that of this stay. No channel's key begins like one."""
        return self.login or self.resume_id

    def set_source(self, source: Source) -> None:
        self.source = source._replace(identity=self.identity)
        self.key = fold(source.name)
        self.mask_key = fold(source.mask)
        self.account_key = fold(source.account)

    @property
    def live(self) -> list[Session]:
        """The sessions that have not ended in this turn."""
        return [session for session in self.sessions if session.user is self]

    def change_source(self, **known: Any) -> None:
        """Change the user's name, address, account or bot flag."""
        fields = {name: getattr(self.source, name) for name in SOURCE_FIELDS} | known
        self.set_source(source_of(**fields))

    def set_login(self, account: str, identity: str) -> None:
        self.login = identity
        self.change_source(account=account)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def account(self) -> str:
        return self.source.account

    @property
    def is_operator(self) -> bool:
        """True if a session of this user operates the server."""
        return any(session.operator for session in self.live)

    @property
    def may_return(self) -> bool:
        """True if this user can prove to be the same after a break."""
        return bool(self.login or self.tokens)

    def state(self) -> dict[str, Any]:
        """Return the part of the user that outlives the server, for JSON. OPER does not."""
        return {
            "source": {name: getattr(self.source, name) for name in SOURCE_FIELDS},
            "login": self.login,
            "secrets": [*self.tokens],
            "realname": self.realname,
            "modes": sorted(self.modes),
            "away": self.away,
            "since": self.since,
            "metadata": self.metadata,
            "channels": {c.key: c.members[self].ranks for c in self.channels},
        }

    @classmethod
    def revived(cls, resume_id: str, state: dict[str, Any], ticks: int) -> "User":
        """Return a user made of a state(), without the channels."""
        user = cls(source_of(**state["source"]), state["realname"], resume_id, state["since"])
        user.login, user.away = state["login"], state["away"]
        user.stored = user.traces = True
        user.tokens = dict.fromkeys(state["secrets"])
        user.modes, user.metadata, user.spoke = set(state["modes"]), state["metadata"], ticks
        user.set_source(user.source)
        return user


class FormerUser(NamedTuple):
    """A user who has left, for WHOWAS."""

    source: Source
    realname: str
    time: int


RANKS = "qaohv"  # of members, the highest first: owner, admin, operator, half-operator, voice
SYMBOLS = dict(zip(RANKS, "~&@%+", strict=True))  # what stands before their names
RANK_NEEDED = dict(zip(RANKS, "qqooh", strict=True))  # to give or take each of them

# Other channel modes (Modern IRC, channel modes)
MASK_LISTS = "beI"  # banned; excepted from bans; exempt from +i
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
    """One change of a mode, like +o alice or -t."""

    on: bool
    letter: str
    value: str = ""


def format_modes(changes: Iterable[ModeChange]) -> str:
    """Return changes as one text, like +ov-t alice bob."""
    letters, values, sign = "", [], ""
    for change in changes:
        wanted = "+" if change.on else "-"
        letters += change.letter if wanted == sign else wanted + change.letter
        sign = wanted
        if change.value:
            values.append(change.value)
    return " ".join([letters, *values])


def mode_lines(changes: Iterable[ModeChange]) -> Iterator[str]:
    """Yield changes as texts like those of format_modes(), each short enough for a line of IRC."""
    some: list[ModeChange] = []
    for change in changes:
        if some and len(format_modes([*some, change]).encode()) > MODES_BYTES:
            yield format_modes(some)
            some = []
        some.append(change)
    if some:
        yield format_modes(some)


class Membership:
    """One user's membership of one channel."""

    __slots__ = ("ranks", "since")

    def __init__(self, since: int, ranks: str):
        self.since = since  # id of the JOIN: the member is not shown earlier events
        self.ranks = ranks  # letters of RANKS, in that order

    @property
    def level(self) -> int:
        """The index of the highest rank in RANKS; smaller is higher."""
        return RANKS.index(self.ranks[0]) if self.ranks else len(RANKS)

    @property
    def symbols(self) -> str:
        return "".join(SYMBOLS[rank] for rank in self.ranks)

    def set_rank(self, rank: str, on: bool) -> bool:
        """Give or take a rank; return whether that changed anything."""
        before = self.ranks
        self.ranks = "".join(r for r in RANKS if (on if r == rank else r in before))
        return self.ranks != before


class Mask:
    """An entry of a channel's list, or a ban from the server: nick!user@host with * and ?, or an
    extended mask. a:ACCOUNT means the users logged in to that account; m:MASK means users who may
    be in the channel but not speak."""

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
        return bool(user.account_key) and self.pattern.fullmatch(user.account_key) is not None


def full_mask(text: str) -> str:
    """Return a mask in full: bob -> bob!*@*, b@c -> *!b@c; an extended mask keeps its letter."""
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


def server_mask(text: str) -> str:
    """Return a mask of KLINE in full: 192.0.2.1 -> *!*@192.0.2.1; a bare word is an address."""
    return text if text.startswith("a:") or set("!@") & set(text) else f"*!*@{text}"


class ServerBan(NamedTuple):
    """A K-line: users who match it cannot register."""

    mask: str
    setter: str
    until: int  # milliseconds since 1970; 0: for ever
    reason: str


class ChannelPassword(NamedTuple):
    """The password of a channel, which IRC calls the key. The store has a salted hash of it with
    one round only: all members know such a word and tell each other, and it protects no account."""

    salt: str
    digest: str
    text: str = "*"  # as the members are told, until the server is restarted

    def fits(self, word: str) -> bool:
        digest = hashlib.sha256(f"{self.salt} {word}".encode()).hexdigest()
        return hmac.compare_digest(digest, self.digest)


def channel_password(word: str, salt: str) -> ChannelPassword:
    return ChannelPassword(salt, hashlib.sha256(f"{salt} {word}".encode()).hexdigest(), word)


class Audience:
    """The receivers of an event: channels, users or sessions, resolved when the turn is written.
    Audiences are compared by identity: the events of one are encoded and joined together."""

    __slots__ = ("channels", "name", "parties", "sessions", "targets", "users")

    def __init__(
        self,
        name: str = "",
        channels: "tuple[Channel, ...]" = (),
        users: Iterable[User] = (),
        sessions: Iterable[Session] = (),
        targets: tuple[tuple[str, int], ...] = (),
        parties: tuple[str, str, str, str] = ("", "", "", ""),
    ):
        self.name = name  # on the wire; "" for users
        self.channels = channels  # their members, each while being a member
        self.users = frozenset(users)  # and these, whatever they are members of
        self.sessions = frozenset(sessions)  # and these sessions, not their users' other ones
        self.targets = targets  # where the store keeps the event: key and founding
        self.parties = parties  # of a private conversation: identity, key, identity, key

    def stamp(self, now: int) -> int:
        """Advance the channels' or users' clocks to the next event's time, in ms; return it."""
        clocks = self.channels or self.users
        if len(self.channels) == 1:  # nearly always
            (channel,) = clocks
            last = channel.last_time
            channel.last_time = newest = now if now > last else next_time(last, now)
            return newest
        newest = next_time(max((clock.last_time for clock in clocks), default=0), now)
        for clock in clocks:
            clock.last_time = newest
        return newest

    def all_sessions(self) -> Iterable[Session]:
        users = itertools.chain(*(channel.listeners() for channel in self.channels), self.users)
        sessions = itertools.chain(*(user.sessions for user in dict.fromkeys(users)))
        return dict.fromkeys(itertools.chain(sessions, self.sessions))

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        if len(self.channels) == 1 and not self.users and not self.sessions:
            return self.channels[0].sessions_by_wire()
        return sessions_by_wire(self.all_sessions())

    def membership_spans(self, session: Session, user: User) -> list[tuple[int, float]]:
        """Return the spans in which this session belonged to the audience: first and last id."""
        if user in self.users or session in self.sessions:
            return [(0, math.inf)]
        return list(itertools.chain(*(c.membership_spans(user) for c in self.channels)))

    @property
    def cost(self) -> int:
        """The number of receivers to be told one by one, for the budget of the cause."""
        shared = len(self.channels) == 1
        members = 0 if shared else sum(len(channel.members) for channel in self.channels)
        return members + len(self.users) + len(self.sessions)


class Channel:
    """A channel. Unless an account founded it, it ends with its last member; its history stays."""

    __slots__ = (
        *("audience", "by_wire", "created", "flags", "former", "founder", "founding", "invited"),
        *("key", "last_time", "limit", "lists", "members", "metadata", "name", "password"),
        *("private", "rosters", "stored_ranks", "topic", "topic_setter", "topic_time"),
        "former_key",
    )
    STATE = (  # what the store keeps as it is
        *("name", "founder", "founding", "stored_ranks", "topic", "topic_setter"),
        *("topic_time", "created", "limit", "private", "metadata", "former_key"),
    )

    def __init__(self, name: str, founding: int, now: int):
        self.founding = founding  # an event id: what is said from here on is of this founding
        self.set_name(name)
        self.former_key = ""  # before it was renamed: it may have that name back
        self.members: dict[User, Membership] = {}
        self.invited: set[User] = set()
        self.former: dict[User, list[tuple[int, int]]] = {}  # left in this turn: from id, to id
        self.by_wire: "dict[Any, set[Session]] | None" = None  # of its listeners; None: to be made
        self.rosters: dict[tuple[bool, bool], list[str]] = {}  # see roster()
        self.topic = ""
        self.topic_setter, self.topic_time = "", 0
        self.created = now
        # +n keeps strangers out; the lobby has no operators who could set a topic
        self.flags = set("n") if self.key == LOBBY else set("nt")
        self.limit: int | None = None
        self.password: ChannelPassword | None = None
        self.founder = ""  # Account.identity; "" if no account founded it
        self.stored_ranks: dict[str, str] = {}  # of accounts, by identity, if it has a founder
        self.private = False  # it was +i, +k or +s at some time
        self.metadata: dict[str, str] = {}
        self.lists: dict[str, dict[str, Mask]] = {letter: {} for letter in MASK_LISTS}
        self.last_time = 0

    def set_name(self, name: str) -> None:
        """Set the name. Events that are logged already keep their audience, under the old name."""
        self.name, self.key = name, fold(name)
        self.audience = Audience(name, (self,), targets=((self.key, self.founding),))

    # What outlives the server

    def state(self) -> dict[str, Any]:
        """Return the part of the channel that outlives the server, for JSON."""
        lists = {
            letter: [(m.text, m.setter, m.when) for m in masks.values()]
            for letter, masks in self.lists.items()
        }
        password = self.password and self.password._replace(text="*")
        known = {name: getattr(self, name) for name in self.STATE}
        return {**known, "flags": sorted(self.flags), "password": password, "lists": lists}

    @classmethod
    def revived(cls, state: dict[str, Any]) -> "Channel":
        """Return a channel made of a state(), without members."""
        state = {"founding": 0, "stored_ranks": state.get("standing", {}), "former_key": ""} | state
        channel = cls(state["name"], state["founding"], 0)
        for name in cls.STATE[1:]:
            setattr(channel, name, state[name])
        channel.flags = set(state["flags"]) & set(FLAGS)
        channel.password = state["password"] and ChannelPassword(*state["password"])
        for letter, masks in state["lists"].items():
            channel.lists[letter] = {fold(text): Mask(text, *rest) for text, *rest in masks}
        return channel

    def ranks_by_account(self, user: User) -> str:
        """Return the stored ranks of a user's account; the founder always is an owner."""
        known = self.stored_ranks.get(user.login, "") if user.login else ""
        if not self.founded_by(user):
            return known
        return "q" + (known or "o").replace("q", "")

    def store_ranks(self, user: User) -> None:
        """Store a member's ranks for the next join, if the channel has a founder."""
        if self.founder and user.login:
            self.stored_ranks.pop(user.login, None)
            if (ranks := self.members[user].ranks) and len(self.stored_ranks) < RANKS_STORED:
                self.stored_ranks[user.login] = ranks

    def founded_by(self, user: User) -> bool:
        return bool(user.login) and user.login == self.founder

    # Permissions. They raise Refused

    def member(self, user: User) -> Membership:
        member = self.members.get(user)
        if member is None:
            text = f"you are not in {self.name}; /join {self.name} first"
            raise Refused("NOT_IN_CHANNEL", text, self.name)
        return member

    def require_inside(self, who: Session) -> None:
        """Raise Refused unless the user is a member, or operates the server."""
        if not who.operator:
            self.member(who.user)

    def require(self, who: Session, rank: str = "h") -> None:
        """Raise Refused unless the user has this rank or a higher one, or operates the server."""
        if not who.operator and self.member(who.user).level > RANKS.index(rank):
            raise Refused("NOT_OPERATOR", f"only operators of {self.name} can do that", self.name)

    def check_can_send(self, user: User, text: str) -> None:
        if "C" in self.flags and "\n\x01" in f"\n{text}":
            raise Refused("CANNOT_SEND", f"{self.name} takes no CTCP but actions (+C)", self.name)
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
        """Return whether a user may not join; with `speaking`, also whether a mute applies."""

        def listed(letter: str) -> bool:
            masks = self.lists[letter].values()
            return any(m.matches(user) for m in masks if speaking or not m.mutes)

        return listed("b") and not listed("e")

    def obstacles(self, user: User, password: str) -> Iterator[tuple[str, str]]:
        """Yield a code and a text for each reason why a user may not join."""
        if self.banned(user):
            yield "BANNED", "you are banned from it"
        if "R" in self.flags and not user.account:
            yield "NEED_ACCOUNT", "one has to be logged in"
        if self.password is not None and not self.password.fits(password):
            yield "BAD_PASSWORD", "it has a password (+k)"
        if "i" in self.flags and not any(m.matches(user) for m in self.lists["I"].values()):
            yield "INVITE_ONLY", "one has to be invited (+i)"
        if self.limit is not None and len(self.members) >= self.limit:
            yield "CHANNEL_FULL", f"it is full (+l {self.limit})"

    def check_entry(self, user: User, password: str) -> None:
        if user.invitations.get(self) or self.founded_by(user):
            return
        for code, why in self.obstacles(user, password):
            raise Refused(code, f"cannot join {self.name}: {why}", self.name)

    @property
    def masks(self) -> int:
        return sum(map(len, self.lists.values()))

    def visible_to(self, user: User) -> bool:
        """Return whether LIST shows this channel to a user; never if it has no members."""
        return bool(self.members) and "s" not in self.flags or user in self.members

    def uninvite(self, user: User) -> None:
        user.invitations.pop(self, None)
        self.invited.discard(user)

    # NAMES

    def named(self, user: User, multi: bool = False, masks: bool = False) -> str:
        """Return a member's name after the symbol of the highest rank, or of all ranks."""
        symbols = self.members[user].symbols
        return (symbols if multi else symbols[:1]) + (user.source.mask if masks else user.name)

    def names(self, viewer: User, multi: bool = False, masks: bool = False) -> list[str]:
        """Return the names of the members that the viewer may see."""
        inside = viewer in self.members
        return [self.named(u, multi, masks) for u in self.members if inside or "i" not in u.modes]

    def roster(self, multi: bool, masks: bool) -> list[str]:
        """Return names() for a member, in pieces: all users who join get the same strings."""
        if (roster := self.rosters.get((multi, masks))) is None:
            words = (self.named(user, multi, masks) for user in self.members)
            roster = self.rosters[multi, masks] = list(wrapped(words, ROSTER_BYTES))
        return roster

    def enrol(self, user: User) -> None:
        """Add a new member to the cached rosters."""
        for (multi, masks), roster in self.rosters.items():
            word = self.named(user, multi, masks)
            if roster and len(roster[-1].encode()) + len(word.encode()) < ROSTER_BYTES:
                roster[-1] += f" {word}"
            else:
                roster.append(word)

    def modes_text(self, who: Session) -> str:
        """Return the modes, like +klnt WORD 12. Only members and operators see the password."""
        letters = set(self.flags)
        values = []
        if self.password:
            letters.add("k")
            values.append(self.password.text if who.user in self.members or who.operator else "*")
        if self.limit is not None:
            letters.add("l")
            values.append(str(self.limit))
        return " ".join(["+" + "".join(sorted(letters)), *values])

    # Changing its modes: each returns what really changed, or None

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

    def set_password(self, change: ModeChange, salt: str) -> ModeChange | None:
        word = change.value
        if not change.on:
            had, self.password = self.password, None
            return ModeChange(False, "k", "*") if had else None
        if not is_word(word, CHANNEL_PASSWORD_BYTES) or "," in word:
            text = f"a channel's password is one word of at most {CHANNEL_PASSWORD_BYTES} bytes"
            raise self._bad_value(change._replace(value="*"), text)
        if self.password and self.password.fits(word):
            return None
        self.password, self.private = channel_password(word, salt), True
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

    def listeners(self) -> Iterable[User]:
        return dict.fromkeys([*self.members, *self.former]) if self.former else self.members

    def sessions_by_wire(self) -> "dict[Any, set[Session]]":
        """Return the members' sessions by wire. The cache lasts: only Turn.move() clears it."""
        if self.by_wire is None:
            sessions = (user.sessions for user in self.listeners())
            self.by_wire = sessions_by_wire(itertools.chain(*sessions))
        return self.by_wire

    def membership_spans(self, user: User) -> list[tuple[int, float]]:
        spans = self.former.get(user, [])
        member = self.members.get(user)
        return [*spans, (member.since, math.inf)] if member else spans


def in_ranks(channel: Channel, symbol: str, speaker: User) -> Audience:
    """Return the audience of members with this rank symbol or a higher one, as they are now, and
    the speaker, who may want an echo. Not kept: history cannot know who may read such events."""
    level = list(SYMBOLS.values()).index(symbol)
    users = {user for user, member in channel.members.items() if member.level <= level}
    return Audience(symbol + channel.name, users=users | {speaker})


def with_outsider(channel: Channel, user: User) -> Audience:
    """Return the audience of a channel, and of a user who acts on it from outside."""
    if user in channel.members:
        return channel.audience
    return Audience(channel.name, (channel,), {user}, targets=channel.audience.targets)


def neighbours(user: User, sessions: Iterable[Session] = (), alone: bool = False) -> Audience:
    """Return the audience of all who share a channel with a user, of some sessions, and (with
    `alone`) of the user. One channel's own audience is taken where possible, and so stays one
    object."""
    channels = tuple(user.channels)
    sessions = frozenset(sessions)
    if len(channels) == 1 and not sessions and not alone:
        return channels[0].audience
    targets = tuple(target for channel in channels for target in channel.audience.targets)
    return Audience("", channels, {user} if alone else (), sessions, targets)


class Conversation(Audience):
    """The audience of a private conversation: two users."""

    __slots__ = ("one", "other")

    def __init__(self, one: User, other: User):
        self.one, self.other = one, other
        key = " ".join(sorted((one.identity, other.identity)))
        parties = one.identity, one.key, other.identity, other.key
        super().__init__(users={one, other}, targets=((key, 0),), parties=parties)

    def partner(self, user: User) -> User:
        return self.one if user is self.other else self.other

    def check_can_send(self, user: User) -> None:
        """Raise Refused if the other user has set +R and this one has no account."""
        partner = self.partner(user)
        if "R" in partner.modes and not user.account:
            text = f"{partner.name} only hears who is logged in"
            raise Refused("NEED_ACCOUNT", text, partner.name)


class LocalSession(Session):
    """A session with a connection to this process. Each dialect is a subclass with its own wire."""

    __slots__ = (
        *("conn", "deferred", "parting", "postponed", "quit_intended", "replied", "replies"),
        *("site", "tries", "unfinished"),
    )
    accepts_partial_last_line = False  # of IRC, half a line is none
    takes_lines = True  # and not requests
    probed = False  # whether the server pings a silent client: probe()

    def __init__(self, site: Site, conn: Connected):
        super().__init__(next(site.ids))
        self.site, self.conn = site, conn
        self.address = conn.address
        site.hub.sessions[self.id] = self
        self.parting = ""  # the reason of the end, for the other users
        self.tries = 0  # wrong passwords of the server or an operator
        self.quit_intended = False  # else the connection broke
        self.unfinished: Iterator | None = None  # a long answer that has been begun
        self.postponed: list[Iterator] = []  # long answers that no command of its own asked for
        self.deferred = False  # an answer waits for a job
        self.replies: list[tuple[int, bytes]] = []  # of this turn: id of the event before, bytes
        self.replied = 0  # bytes of them

    # What a dialect provides

    def receive(self, line: bytes) -> None:
        """Act on one complete line, or TOO_LONG, from the peer."""
        raise NotImplementedError

    def not_kept(self, events: list[Event], reason: str) -> None:
        """Tell the client that these messages of its own were delivered but not stored."""
        raise NotImplementedError

    def notice(self, text: str) -> None:
        """Send a text from the server."""
        raise NotImplementedError

    def refuse(self, refusal: Refused) -> None:
        raise NotImplementedError

    def answer(self, text: str) -> None:
        """Tell the result of a command, if no numeric or event does."""
        self.notice(text)

    def farewell(self, text: str) -> None:
        """Send the last text: the connection is about to be closed."""
        self.notice(text)

    # Acts, and what they need from off the loop

    def act(
        self,
        name: str,
        *values: Any,
        then: Callable[[Any], None] | None = None,
        otherwise: Callable[[Refused], None] | None = None,
    ) -> None:
        """Do an act as this session; call then(its result), or otherwise(the refusal): refuse()."""
        try:
            result = self.site.hub.perform(name, self.id, *values)
        except Refused as refusal:
            return (otherwise or self.refuse)(refusal)
        if then:
            then(result)

    def later(self, lane: str, job: Callable, then: Callable) -> None:
        """Run job() off the loop, then then(its result). The session's next line waits for that."""
        self.deferred = True
        self.site.server.later(self, lane, job, then)

    def read(self, job: Callable, then: Callable) -> None:
        """Run a job that reads the store, then then(its result). The next line waits for that."""
        self.later(PAGE_LANE, job, then)

    def take_result(self, then: Callable, result: Any) -> None:
        """Handle the result of a job: a value, or the ChatError that it raised."""
        self.deferred = False
        self.resume_answer()
        try:
            if isinstance(result, Refused):
                raise result
            if isinstance(result, Exception):
                raise Refused("UNUSABLE", str(result))
            then(result)
        except Refused as refusal:
            self.refuse(refusal)
        self.mark_answer(whole=not self.deferred and self.unfinished is None)

    # Long answers: generators that are resumed for as long as the client reads them

    @property
    def has_more(self) -> bool:
        return self.unfinished is not None or bool(self.postponed)

    def go_on(self) -> None:
        """Send the next piece of a long answer. The next line waits for the whole answer."""
        if self.unfinished is None:
            if next(self.postponed[0], self) is self:
                del self.postponed[0]
            return
        self.resume_answer()
        try:
            next(self.unfinished)
        except StopIteration:
            self.unfinished = None
        except Refused as refusal:
            self.unfinished = None
            self.refuse(refusal)
        self.mark_answer(whole=not self.deferred and self.unfinished is None)

    def resume_answer(self) -> None:
        """Prepare to send more of an answer in a later turn. For labels."""

    def mark_answer(self, whole: bool) -> None:
        """Mark what has been sent of an answer; `whole` if that is all. For labels."""

    # Sending

    def send(self, data: bytes) -> None:
        """Queue bytes for this session only, in their place among the events of the turn."""
        hub = self.site.hub
        self.replies.append((hub.last_id, data))
        self.replied += len(data)
        hub.work += WORK_OF_A_LINE
        hub.turn.individually_addressed.add(self)

    def own(self, event: Event, line: bytes) -> bytes:
        """Return what this session, the event's origin, gets instead of `line`."""
        return self.wire.own(event, line)

    def turn_over(self) -> None:
        """Forget the replies of this turn, which have been sent."""
        self.replies, self.replied = [], 0

    # The end

    def end(self, reason: str, intended: bool = True) -> None:
        """Close the connection; tell the reason to the client and to users in common channels."""
        self.parting, self.quit_intended = reason, intended
        self.farewell(f"Closing link: {reason}")
        self.conn.close()

    def ended(self) -> None:
        """Handle the end of the connection, or of the input. May be called twice."""
        if self.user or self.follows:
            self.act("leave", self.parting, self.quit_intended)
        self.site.hub.sessions.pop(self.id, None)

    def abandon(self) -> None:
        """Detach the user without telling others: the server is going down."""
        self.user = None


do = functools.partial  # a step: what is called with then= as its last argument
Steps = Iterator[functools.partial]


def in_steps(function: Callable[..., Steps]) -> Callable[..., None]:
    """Decorator: do each step that this generator yields, and send its result in."""

    def go_on(steps: Steps, result: Any = None) -> None:
        try:
            step = steps.send(result)
        except StopIteration:
            return
        step(then=functools.partial(go_on, steps))

    return functools.wraps(function)(lambda *values: go_on(function(*values)))


def attempt_line(encode: Callable[[], bytes], report: Callable) -> bytes:
    """Return encode(), or b"" if it raises: a bug in one event loses that event only."""
    try:
        return encode()
    except Exception:
        report()
        return b""


class Group:
    """The events of one audience in a turn: encoded once for each wire, and joined once."""

    def __init__(self, audience: Audience):
        self.audience = audience
        self.by_wire = audience.sessions_by_wire()
        self.events: list[Event] = []
        self.special: list[int] = []  # indices of what is not SPOKEN: each wire has its own line
        self.origins: dict[Session | None, list[int]] = {}  # indices of their events
        self.encoded: dict[Any, list[bytes]] = {}  # a line each, by wire or format
        self.joins: dict[Any, tuple[bytes, list[int]]] = {}  # all lines, and where each begins

    def add(self, event: Event) -> None:
        index, origin, events = len(self.events), event.origin, self.events
        if origin is not None:
            mine = self.origins.get(origin)
            if mine is None:
                self.origins[origin] = [index]
            else:
                mine.append(index)
        if event.kind is not MESSAGE and event.kind not in SPOKEN:
            self.special.append(index)
        events.append(event)

    @functools.cached_property
    def ids(self) -> list[int]:
        return [event.id for event in self.events]

    def key(self, wire: Wire) -> Any:
        """Return the cache key: wires with one format share a group that has only messages."""
        return wire if self.special else wire.format

    def lines(self, wire: Wire, report: Callable) -> list[bytes]:
        key = self.key(wire)
        if (lines := self.encoded.get(key)) is not None:
            return lines
        if (lines := self.encoded.get(wire.format)) is None:
            lines = self.encoded[wire.format] = self._spoken(wire, report)
        if self.special:
            lines = self.encoded[key] = lines.copy()
            for n in self.special:
                lines[n] = attempt_line(
                    lambda n=n: wire.line(self.audience, self.events[n]), report
                )
        return lines

    def _spoken(self, wire: Wire, report: Callable) -> list[bytes]:
        """Encode the messages. A bug in one message loses only that message."""
        if not self.special:
            with contextlib.suppress(Exception):  # one by one then, see below
                return wire.format.encode(self.audience, self.events)
        lines = [b""] * len(self.events)
        wanted = [n for n, event in enumerate(self.events) if event.kind in SPOKEN]
        try:
            encoded = wire.format.encode(self.audience, [self.events[n] for n in wanted])
        except Exception:
            encode = functools.partial(wire.format.encode, self.audience)
            some = ([self.events[n]] for n in wanted)
            encoded = [attempt_line(lambda e=e: b"".join(encode(e)), report) for e in some]
        for n, line in zip(wanted, encoded, strict=True):
            lines[n] = line
        return lines

    def joined(self, wire: Wire, report: Callable) -> tuple[bytes, list[int]]:
        """Return all lines as one bytes object, and the offsets where they begin and end."""
        key = self.key(wire)
        if (found := self.joins.get(key)) is None:
            lines = self.lines(wire, report)
            starts = list(itertools.accumulate(map(len, lines), initial=0))
            found = self.joins[key] = b"".join(lines), starts
        return found

    def seen(self, spans: Iterable[tuple[int, float]]) -> list[tuple[int, int]]:
        """Return the index ranges of the events in these spans of ids, which may overlap."""
        ranges: list[tuple[int, int]] = []
        for first, last in sorted(spans):
            start, end = bisect.bisect_left(self.ids, first), bisect.bisect_right(self.ids, last)
            start = max(start, ranges[-1][1]) if ranges else start
            if start < end:
                ranges.append((start, end))
        return ranges

    def own_lines(
        self, session: LocalSession, copies: Iterable[int], report: Callable
    ) -> list[tuple[int, bytes]]:
        """Return the lines that a session gets for its own user's events: index and bytes."""
        lines = self.lines(session.wire, report)
        mine = self.origins.get(session, [])
        if copies:
            places = ((bisect.bisect_left(self.ids, id), id) for id in copies)
            mine = mine + [n for n, id in places if self.ids[n : n + 1] == [id]]
        try:
            return [(n, session.own(self.events[n], lines[n])) for n in mine]
        except Exception:
            one = lambda n: attempt_line(lambda: session.own(self.events[n], lines[n]), report)  # noqa: E731
            return [(n, one(n)) for n in mine]

    def joined_for(
        self,
        session: LocalSession,
        ranges: list[tuple[int, int]],
        copies: Iterable[int],
        report: Callable,
    ) -> bytes:
        """Return the bytes of a session that no other group concerns. The lines between its replies
        and its own events are slices of the shared bytes: a thousand users who join in one turn
        cost a thousand slices, and not a million lines."""
        count, mine = len(self.ids), self.origins.get(session, ())
        if ranges == [(0, count)] and 50 * len(mine) > count and not (copies or session.replies):
            with contextlib.suppress(Exception):  # one of a few who speak
                lines = self.lines(session.wire, report).copy()
                for n in mine:
                    lines[n] = session.own(self.events[n], lines[n])
                return b"".join(lines)
        own = self.own_lines(session, copies, report)
        blob, starts = self.joined(session.wire, report)
        breaks = [
            (bisect.bisect_right(self.ids, after), 0, data) for after, data in session.replies
        ]
        breaks += [(n, 1, data) for n, data in own]
        breaks.sort(key=lambda one: one[:2])
        pieces, position = [], 0
        for index, taken, data in [*breaks, (count, 0, b"")]:
            for first, last in ranges:
                start, end = max(first, position), min(last, index)
                if start < end:
                    pieces.append(blob[starts[start] : starts[end]])
            if not taken or any(first <= index < last for first, last in ranges):
                pieces.append(data)
            position = index + taken
        return b"".join(pieces)


class Record(NamedTuple):
    """A change of stored state that is not an event. The names are those of STATEMENTS."""

    name: str
    values: tuple
    place: int  # behind so many events of the turn


class Turn:
    """The log of one turn: events, replies (in the sessions), and records for the store. Most
    sessions belong to one audience and get its joined bytes, the same object for all. Sessions that
    are individually addressed (they spoke, came, went, or were answered) or belong to several
    audiences get the same lines, cut for them, in the log's order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.records: list[Record] = []
        self.dedup: dict[tuple[str, str], Event] = {}  # by owner, and the sender's id
        self.changed: set[User | Channel] = set()  # have another state() to be stored
        self.conversations: dict[tuple[User, User], Conversation] = {}
        # For the write beat
        self.individually_addressed: set[Session] = set()
        self.since: dict[Session, int] = {}  # connected in this turn, behind event id
        # Ids of private messages that another session of the same user sent
        self.copies: dict[Session, list[int]] = {}
        self.moved: set[User] = set()  # joined or left a channel in this turn
        self.moved_channels: set[Channel] = set()  # where they did
        self.left: dict[Session, User] = {}  # ended; still get what came before that

    def move(self, user: User, channel: Channel) -> None:
        self.moved.add(user)
        self.moved_channels.add(channel)
        self.changed |= {user, channel}
        channel.by_wire = None
        self.individually_addressed.update(user.sessions)

    def record(self, name: str, *values: Any) -> None:
        self.records.append(Record(name, values, len(self.events)))

    @property
    def to_store(self) -> bool:
        return bool(self.events or self.records)

    @property
    def happened(self) -> bool:
        return bool(self.individually_addressed) or self.to_store

    @property
    def lone_target(self) -> tuple[str, int] | None:
        """The target of the turn's only event, if that is all to store; else None."""
        if len(self.events) != 1 or self.records or self.dedup:
            return None
        event = self.events[0]
        targets = () if event.kind in EPHEMERAL else event.audience.targets
        return targets[0] if len(targets) == 1 else None

    def deliveries(self, report: Callable = lambda: None) -> Iterator[tuple[bytes, Any]]:
        """Yield bytes and their receivers, none twice: the write beat. Bugs go to report()."""
        groups: dict[Audience, Group] = {}
        for event in self.events:
            group = groups.get(event.audience)
            if group is not None:
                group.add(event)
            elif event.kind not in PERSONAL:  # they were rendered before, see Session.hear()
                group = groups[event.audience] = Group(event.audience)
                group.add(event)
        several = self._in_several(groups.values())
        heard: dict[Session, list[Group]] = {
            session: [] for session in self.individually_addressed | several
        }
        for group in groups.values():
            for wire, sessions in group.by_wire.items():
                if wire is not None and (data := group.joined(wire, report)[0]):
                    yield data, sessions - heard.keys()
                for session in heard.keys() & sessions:
                    heard[session].append(group)
        for session, told in heard.items():
            if isinstance(session, LocalSession) and not session.conn.gone:
                data = attempt_line(lambda s=session, t=told: self.lines_for(s, t, report), report)
                if data:
                    yield data, (session,)

    def _in_several(self, groups: Collection[Group]) -> set[Session]:
        """Return the sessions that belong to more than one of these audiences."""
        if len(groups) < 2:
            return set()
        lists = itertools.chain(*(group.by_wire.values() for group in groups))
        times = collections.Counter(itertools.chain(*lists))
        return {session for session, count in times.items() if count > 1}

    def lines_for(self, session: LocalSession, groups: list[Group], report: Callable) -> bytes:
        """Return one session's lines of the log, in the log's order."""
        session.replies.sort(key=lambda one: one[0])
        if not groups:
            return b"".join([data for _, data in session.replies])
        copies = self.copies.get(session, ())
        user, since = session.user or self.left.get(session), self.since.get(session, -1) + 1
        ranges = {}
        for group in groups:
            spans: list[tuple[int, float]] = [(0, math.inf)]
            if user in self.moved:
                spans = group.audience.membership_spans(session, user)
            ranges[group] = group.seen((max(a, since), b) for a, b in spans)
        if len(groups) == 1:
            return groups[0].joined_for(session, ranges[groups[0]], copies, report)
        numbered = list(session.replies)
        for group in groups:
            lines = group.lines(session.wire, report)
            own = dict(group.own_lines(session, copies, report))
            for n in itertools.chain(*(range(*one) for one in ranges[group])):
                numbered.append((group.ids[n], own.get(n, lines[n])))
        # A reply stands behind the event that it follows. The sort is stable
        replies, rest = numbered[: len(session.replies)], numbered[len(session.replies) :]
        return b"".join([data for _, data in sorted(rest + replies, key=lambda one: one[0])])

    def not_kept(self, reason: str) -> None:
        """Tell the senders of this turn's messages that the store could not take them."""
        lost: dict[Session, list[Event]] = {}
        for event in self.events:
            if event.kind in SPOKEN and isinstance(event.origin, LocalSession):
                lost.setdefault(event.origin, []).append(event)
        for session, events in lost.items():
            session.not_kept(events, reason)

    def close(self) -> None:
        for session in self.individually_addressed:
            if isinstance(session, LocalSession):
                session.turn_over()
        for channel in self.moved_channels:
            channel.former.clear()
            channel.by_wire = None
        for session, user in self.left.items():
            user.sessions.remove(session)
            for channel in user.channels:  # where other sessions of the same user still are
                channel.by_wire = None


# Tables of the Hub


class Registry(dict[str, "set[Session]"]):
    """Sessions by the key of a name or of metadata that they want to be told of."""

    def add(self, session: Session, key: str) -> None:
        self.setdefault(key, set()).add(session)

    def remove(self, session: Session, key: str) -> None:
        sessions = self.get(key, set())
        sessions.discard(session)
        if not sessions:
            self.pop(key, None)


class Account(NamedTuple):
    """A registered name, and the verifier of its password."""

    name: str
    verifier: Verifier
    email: str = ""
    number: int = 0  # that no other account ever has, not even the next one of this name

    @property
    def identity(self) -> str:
        """The owner of the account's conversations, markers and channels. Names have no slash."""
        return f"={self.name}/{self.number:x}"

    @property
    def revision(self) -> str:
        """The id of the present password. A proof is valid for one revision only."""
        return self.verifier.salt.hex()


class Accounts(dict[str, Account]):
    """All accounts by key, their certificates, and the limits on attempts to log in."""

    def __init__(self) -> None:
        super().__init__()
        self.certificates: dict[str, str] = {}  # the account's key by fingerprint
        self.skeletons: dict[str, str] = {}  # an account's key by what its name looks like
        self.throttle = Throttle()
        self.made = Throttle(ACCOUNTS_MADE, ACCOUNTS_MADE_SECONDS, ACCOUNTS_MADE)
        # Registered, and waiting for the code that was sent by mail; by key
        self.pending: collections.OrderedDict[str, tuple[Account, str]] = collections.OrderedDict()

    def load(self, known: Iterable[Account]) -> None:
        self.clear()
        self.skeletons.clear()
        for account in known:
            self.put(account)

    def put(self, account: Account) -> None:
        self[fold(account.name)] = account
        self.skeletons[skeleton(account.name)] = fold(account.name)

    def remove(self, name: str) -> None:
        del self[fold(name)]
        self.skeletons.pop(skeleton(name), None)

    def certificates_of(self, name: str) -> list[str]:
        return [mark for mark, key in self.certificates.items() if key == fold(name)]

    def is_foreign(self, name: str, account: str) -> bool:
        """Return whether a name belongs to, or looks like, another account or a service."""
        key = fold(name)
        if key in SERVICES or (key in self and key != fold(account)):
            return True
        return self.looks_like(name) not in ("", fold(account))

    def looks_like(self, name: str) -> str:
        """Return the account or service that looks like this name but is spelled otherwise; "" if
        none does. Names in ASCII never look like each other."""
        if name.isascii():
            return ""
        shape = skeleton(name)
        known = shape if shape in SERVICES else self.skeletons.get(shape, "")
        return known if known != fold(name) else ""

    def find(self, name: str) -> tuple[str, Verifier]:
        """Return an account's registered name and verifier; a decoy if there is no such account."""
        account = self.get(fold(name))
        return (account.name, account.verifier) if account else (name, decoy_verifier(name))

    def identity(self, name: str) -> str:
        """Return the identity of an account; "" if there is none."""
        account = self.get(fold(name))
        return account.identity if account else ""

    def is_proof(self, name: str, proof: str) -> bool:
        """Return whether a proof is still valid: the password's revision, or a certificate."""
        account = self.get(fold(name))
        if account is None:
            return False
        return proof == account.revision or self.certificates.get(proof) == fold(name)

    def await_code(self, account: Account) -> str:
        """Return a new code to be sent to the account's address; verified() checks it."""
        code = f"{secrets.randbelow(10**8):08}"
        self.pending[fold(account.name)] = account, code
        while len(self.pending) > PENDING_ACCOUNTS:
            self.pending.popitem(last=False)
        return code

    def verified(self, name: str, code: str, host: str, ticks: int) -> Account:
        """Return the account that this code was sent for. Raises Refused."""
        self.throttle.check(host, f"code {name}", ticks)
        self.throttle.failed(host, f"code {name}", ticks)
        account, expected = self.pending.get(fold(name), (None, ""))
        fits = hmac.compare_digest(code.encode(), expected.encode())
        if account is None or not fits or fold(name) in self:
            raise Refused("INVALID_CODE", "that is not the code that was sent", name)
        self.throttle.succeeded(host, f"code {name}")
        del self.pending[fold(name)]
        return account


class Marker(NamedTuple):
    """A read marker: everything up to the message with this time and id (0: unknown) was read."""

    time: int
    id: int = 0


class Markers(dict[str, dict[str, Marker]]):
    """Read markers, by identity and then by the key of a channel or nick."""

    def of(self, user: User, target: str) -> Marker | None:
        return self.get(user.identity, {}).get(target)

    def advance(self, owner: str, target: str, mark: Marker) -> bool:
        """Move a marker forward, never back; return whether it moved. Of two messages the one
        with the higher id is the later one, also if the clock was set back between them."""
        marks = self.setdefault(owner, {})
        known = marks.get(target)
        if known is None:
            fits = len(marks) < MARKERS
        elif mark.id and known.id:
            fits = mark.id > known.id
        else:
            fits = mark.time > known.time
        if fits:
            marks[target] = mark
        elif not marks:
            del self[owner]
        return fits


ACTS: dict[str, Callable] = {}


class Hub:
    """All users, channels and accounts. Acts change them; emit() tells what others can see."""

    def __init__(self, last_id: int = 0, ids: MessageIds | None = None, name: str = SERVER_NAME):
        self.ids = ids or MessageIds()
        self.name = name  # of the server
        self.store: ActStore | None = None
        self.absent_per_host = PER_ADDRESS
        self.accounts = Accounts()
        self.markers = Markers()
        self.files = Files()
        self.sessions: dict[int, Session] = {}  # by id; also those without a name
        self.users: dict[str, User] = {}  # by key
        self.users_by_id: dict[str, User] = {}  # by resume_id
        self.users_by_token: dict[str, User] = {}  # by the hash of a secret
        self.absent: dict[User, int] = {}  # without a session, since when; the first one first
        self.absent_by_host: dict[str, dict[User, None]] = {}
        self.channels: dict[str, Channel] = {}  # by key
        self.founded: collections.Counter[str] = collections.Counter()  # by Account.identity
        self.accounts_of: dict[str, str] = {}  # the identity of a guest -> of the first account
        self.guests_of: dict[str, list[str]] = {}  # the reverse of that
        self.bans: dict[str, ServerBan] = {}  # by folded mask
        self.former: collections.deque[FormerUser] = collections.deque(maxlen=FORMER_USERS)
        self.invisible = 0  # users with +i
        self.operators: set[Session] = set()  # sessions that proved it by OPER
        self.watchers = Registry()  # by the key of a name (MONITOR)
        self.subscribers = Registry()  # by the key of metadata
        self.most_users = 0  # at once, so far
        self.last_id = last_id
        self.now = self.ticks = 0  # milliseconds: of the wall clock, of the monotonic one
        self.started, self.started_ticks = 0, 0
        self.work = 0.0  # of the line that is acted on, see WORK_PER_TOKEN
        self.turn = Turn()
        self.journal: list[tuple] | None = None  # of all acts, for those who want to replay them

    # Turns

    def begin(self, now: float, ticks: float | None = None) -> None:
        """Begin a turn at wall time `now`, and `ticks` on the monotonic clock, in seconds."""
        self.now = int(now * 1000)
        self.ticks = self.now if ticks is None else int(ticks * 1000)
        if not self.started:
            self.started, self.started_ticks = self.now, self.ticks

    def end(self) -> None:
        """Replace the log of the turn, which has been written."""
        old, self.turn = self.turn, Turn()
        old.close()

    def settle(self) -> None:
        """Make records of the users and channels whose state changed in this turn."""
        for one in self.turn.changed:
            if isinstance(one, Channel):
                if self.channels.get(one.key) is one:
                    self.turn.record("channel", one.key, json.dumps(one.state()))
                elif one.key not in self.channels:
                    self.turn.record("channel_gone", one.key)
                continue
            was, one.stored = one.stored, one.may_return and self.users.get(one.key) is one
            if one.stored:
                self.turn.record("user", one.resume_id, json.dumps(one.state()))
            elif was:
                self.turn.record("user_gone", one.resume_id)
        self.turn.changed.clear()

    # The one door in, and the one door out

    def perform(self, name: str, actor: int, *values: Any) -> Any:
        """Do an act as session `actor` (0: the server). After Refused, nothing has changed."""
        if self.journal is not None:
            self.journal.append((self.now, self.ticks, name, actor, values))
        self.work += WORK_OF_AN_ACT
        who = self.sessions.get(actor)
        if who is None:
            who = self.sessions[actor] = Session(actor)
        return ACTS[name](self, who, *values)

    def emit(
        self,
        kind: str,
        source: Source,
        audience: Audience,
        text: str = "",
        about: str = "",
        origin: Session | None = None,
        tags: str = "",
    ) -> Event:
        """Log one event: `source` did something that `audience` can see."""
        self.last_id += 1
        when = audience.stamp(self.now)
        event = Event(self.last_id, when, kind, source, audience, text, about, origin, tags)
        self.turn.events.append(event)
        if origin is not None:
            self.turn.individually_addressed.add(origin)
        if kind in PERSONAL:
            for session in audience.all_sessions():
                if session.user or session in audience.sessions:  # else it ended in this turn
                    self.work += WORK_OF_A_RECEIVER
                    session.hear(event)
        return event

    def next_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def forget_markers(self, owner: str) -> dict[str, Marker]:
        """Remove the read markers of an identity and return them, by target."""
        if marks := self.markers.pop(owner, {}):
            self.turn.record("markers_gone", owner)
        return marks

    def charge(self, items: float) -> None:
        """Add work to the line that is being acted on, for its sender's budget."""
        self.work += items

    def take_work(self) -> float:
        work, self.work = self.work, 0.0
        return work

    # Looking up. Raises Refused

    def find_user(self, name: str) -> User:
        user = self.users.get(fold(name))
        if user is None:
            raise Refused("NO_SUCH_NAME", f"no user here is called {harmless(name)}", name)
        return user

    def find_channel(self, name: str) -> Channel:
        channel = self.channels.get(fold(name))
        if channel is None:
            raise Refused("NO_SUCH_CHANNEL", f"there is no channel {harmless(name)} now", name)
        return channel

    def conversation(self, one: User, other: User) -> Conversation:
        """Return the audience of two users. Within a turn it is one object, in either order."""
        pair = (one, other) if one.resume_id <= other.resume_id else (other, one)
        talk = self.turn.conversations.get(pair)
        if talk is None or talk.targets[0][0] != " ".join(sorted((one.identity, other.identity))):
            talk = self.turn.conversations[pair] = Conversation(*pair)
        return talk

    def find_audience(self, user: User, name: str) -> "Audience | Channel":
        """Return the audience of a name: a channel, its members from a rank up, or two users."""
        if name.startswith("#"):
            return self.find_channel(name)
        if name[1:2] == "#" and name[0] in SYMBOLS.values():
            channel = self.find_channel(name[1:])
            self.charge(len(channel.members))
            return in_ranks(channel, name[0], user)
        return self.conversation(user, self.find_user(name))

    def present_bans(self) -> list[ServerBan]:
        return [ban for ban in self.bans.values() if not ban.until or ban.until > self.now]

    # Identities: what a guest said belongs to the first account that the guest logs in to

    def identities(self, identity: str) -> tuple[str, ...]:
        return (identity, *self.guests_of.get(identity, ()))

    def same_person(self, one: str, other: str) -> bool:
        return self.accounts_of.get(one, one) == self.accounts_of.get(other, other)

    def link(self, guest: str, account: str) -> None:
        self.accounts_of[guest] = account
        self.guests_of.setdefault(account, []).append(guest)

    # What the store and this turn's log know together

    def find_repeat(self, who: Session, own_id: str) -> int | None:
        """Return the id of the event that has this message id of this sender; None if none has."""
        owners = self.dedup_owners(who)
        for owner in owners:
            if first := self.turn.dedup.get((owner, own_id)):
                return first.id
        return self.store.dedup.find(owners, own_id)

    def dedup_owners(self, who: Session) -> dict[str, None]:
        """Return the owners of this session's message ids; the first is the one of new ids."""
        return dict.fromkeys(filter(None, (who.client, who.user.identity, who.user.resume_id)))

    def author_of(self, targets: Iterable[str], id: int) -> tuple[int, str] | None:
        """Return the founding and the author's identity of a message under one of these keys."""
        keys = list(targets)
        if any(one.name == "redact" and one.values[-1] == id for one in self.turn.records):
            return None
        recent = (e for e in self.turn.events if e.id == id and e.kind in (*SPOKEN, TAGS))
        for event in recent:
            foundings = [founding for key, founding in event.audience.targets if key in keys]
            if foundings:
                return foundings[0], event.source.identity
        return next(filter(None, (self.store.author_of(key, id) for key in keys)), None)

    def has_history(self, key: str) -> bool:
        """Return whether a channel's key has readable history once this turn is stored."""
        foundings, records = self.store.foundings(key), iter(self.turn.records)
        record = next(records, None)
        for n, event in enumerate([*self.turn.events, None]):
            while record and record.place <= n:
                if record.name == "seal" and record.values[0] == key:
                    foundings.discard(record.values[1])
                elif record.name == "rename" and record.values[0] == key:
                    foundings.discard(record.values[2])
                elif record.name == "rename" and record.values[1] == key:
                    foundings.add(record.values[2])
                record = next(records, None)
            if event and event.kind not in EPHEMERAL:
                foundings.update(f for known, f in event.audience.targets if known == key)
        return bool(foundings)


# ======================================================================================
# ACTS
# ======================================================================================
# Every change of shared state. An act is a function act(hub, who, ...): `who` is the session
# that asks for it, the other parameters are plain data. It makes all its checks first and
# raises Refused before it changes anything. Time is Hub.now and Hub.ticks, and whatever is
# random is a parameter, so that the same acts in the same order make the same Hub.


def act(function: Callable) -> Callable:
    """Decorator: register the function as an act that Hub.perform() knows by its name."""
    ACTS[function.__name__] = function
    return function


# Names


def free_name(
    hub: Hub, wanted: str, owner: User | None = None, account: str = "", dice: int = 0
) -> str:
    """Return `wanted` as a valid name, with a number if it is not free. Raises Refused."""
    name = clean_name(wanted)
    if not name:
        raise Refused("NO_NAME", "a name needs at least one visible character; try again")
    # Counting past a thousand guests would take too long: after some, any number will do
    many = random.Random(dice)
    numbers = itertools.chain(range(2, NAMES_COUNTED), iter(lambda: many.randrange(10**6), None))
    candidates = itertools.chain([name], (numbered_name(name, n) for n in numbers))
    account = owner.account if owner else account
    return next(
        c
        for c in candidates
        if hub.users.get(fold(c)) in (None, owner) and not hub.accounts.is_foreign(c, account)
    )


def check_name(hub: Hub, wanted: str, owner: User | None = None, account: str = "") -> None:
    """Raise Refused unless a user may have exactly this name."""
    if clean_name(wanted) != wanted or not wanted:
        text = f"names have at most {NAME_CHARACTERS} characters, and none that IRC needs"
        raise Refused("BAD_NAME", text, wanted)
    holder = hub.users.get(fold(wanted))
    if holder not in (None, owner) and not (account and holder.account == account):
        raise Refused("NAME_TAKEN", f"{wanted} is taken", wanted)
    if known := hub.accounts.looks_like(wanted):
        text = f"{wanted} looks like {known} in other letters; choose another name"
        raise Refused("NAME_TAKEN", text, wanted)
    if owner and hub.accounts.is_foreign(wanted, owner.account):
        raise Refused("NAME_TAKEN", f"{wanted} belongs to an account; log in first", wanted)


def server_ban(hub: Hub, user: User) -> ServerBan | None:
    """Return the K-line that keeps this user out, if there is one."""
    hub.charge(len(hub.bans))
    return next((ban for ban in hub.present_bans() if Mask(ban.mask).matches(user)), None)


def check_not_bound(hub: Hub, user: User) -> None:
    """Raise Refused if another name would escape a ban or mute of the present one."""
    for channel in user.channels:
        hub.charge(channel.masks)
        if not channel.members[user].ranks and channel.banned(user, speaking=True):
            text = f"you cannot change your name while you are banned or muted in {channel.name}"
            raise Refused("NAME_BOUND", text, channel.name)


@act
def follow(hub: Hub, who: Session, registry: str, keys: tuple[str, ...], on: bool) -> None:
    """Begin or end to tell a session of names ("watchers") or metadata keys ("subscribers")."""
    known: Registry = getattr(hub, registry)
    for key in keys:
        (known.add if on else known.remove)(who, key)
    about = dict.fromkeys((registry, key) for key in keys)
    who.follows = {one: None for one in (who.follows | about) if on or one not in about}


def unfollow(hub: Hub, session: Session) -> None:
    """End to tell a session of anything: it ends."""
    for registry, key in session.follows:
        getattr(hub, registry).remove(session, key)
    session.follows.clear()


def tell_watchers(hub: Hub, key: str, kind: str, source: Source) -> None:
    if watching := hub.watchers.get(key):
        hub.emit(kind, source, Audience(sessions=watching))


def take_name(hub: Hub, user: User, name: str, origin: Session | None = None) -> None:
    """Give a user a free name, and tell the change."""
    if name == user.name:
        return
    hub.emit(NICK, user.source, neighbours(user, alone=True), name, origin=origin)
    was, before = user.key, user.source
    del hub.users[user.key]
    user.change_source(name=name)
    hub.turn.changed.add(user)
    hub.users[user.key] = user
    for channel in user.channels:
        channel.rosters.clear()
    if user.key != was:
        hub.former.append(FormerUser(before, user.realname, hub.now))
        tell_watchers(hub, was, OFFLINE, before)
        tell_watchers(hub, user.key, ONLINE, user.source)


@act
def rename_user(hub: Hub, who: Session, wanted: str, exact: bool, dice: int) -> str:
    """Rename the session's user: exactly so, or to the nearest free name. Return the new name."""
    user = who.user
    if exact:
        check_name(hub, wanted, user)
    name = wanted if exact else free_name(hub, wanted, user, dice=dice)
    if fold(name) != user.key:
        check_not_bound(hub, user)
    take_name(hub, user, name, who)
    return name


# Coming and going


def user_of_token(hub: Hub, token: str, account: str) -> tuple[User | None, str]:
    """Return the user whom a token resumes; or None, and the account to be logged in to first."""
    user = hub.users_by_token.get(token)
    if user is None:
        return None, ""
    others = any(one.token != token for one in user.live)
    if user.account != account and (user.account or others):
        return None, user.account or account
    return user, ""


def forget_absent(hub: Hub, user: User) -> None:
    host = host_of(user.source.address)
    if near := hub.absent_by_host.get(host):
        near.pop(user, None)
        if not near:
            del hub.absent_by_host[host]


def detach(hub: Hub, session: Session) -> None:
    """Take a session, which ends with this turn, from its user. The user stays for now."""
    hub.turn.left[session] = session.user
    hub.turn.individually_addressed.add(session)
    session.user, session.operator = None, False
    unfollow(hub, session)
    hub.operators.discard(session)
    hub.sessions.pop(session.id, None)


def forget_token(hub: Hub, user: User, token: str) -> None:
    if user.tokens.pop(token, user) is None:
        del hub.users_by_token[token]


def emit_to_witnesses(
    hub: Hub, kind: str, source: Source, user: User, *texts: str, origin: Session | None = None
) -> None:
    """Tell the user's act to the user, to common channels, and to watchers with
    extended-monitor."""
    watching = (s for s in hub.watchers.get(user.key, ()) if s.extended_monitor)
    audience = neighbours(user, watching, alone=True)
    hub.charge(WORK_OF_A_RECEIVER * audience.cost)
    hub.emit(kind, source, audience, *texts, origin=origin)


def attach(hub: Hub, who: Session, user: User, address: str) -> None:
    """Add a session to a user. It replaces an older one with the same token."""
    replaced = [s for s in user.live if s.token and s.token == who.token]
    hub.absent.pop(user, None)
    forget_absent(hub, user)
    user.sessions.append(who)
    who.user, who.address = user, address
    hub.turn.individually_addressed.add(who)
    hub.turn.since[who] = hub.last_id
    hub.turn.changed.add(user)
    for channel in user.channels:
        channel.by_wire = None
    for other in replaced:
        detach(hub, other)
    if replaced:
        hub.emit(REPLACED, user.source, Audience(sessions=replaced), about=user.name)
    if who.token:
        user.tokens[who.token], hub.users_by_token[who.token] = None, user
    for token in list(user.tokens)[:-TOKENS_A_USER]:
        forget_token(hub, user, token)
    if host_of(user.source.address) not in {host_of(s.address) for s in user.live}:
        before = user.source
        user.change_source(address=address)  # bans match the present address
        for channel in user.channels:
            channel.rosters.clear()
        emit_to_witnesses(hub, HOST, before, user, user.source.host, before.username)


def inherit(hub: Hub, user: User, identity: str) -> None:
    guest = user.resume_id
    if user.login or guest in hub.accounts_of:
        return
    if user.traces:
        hub.link(guest, identity)
        hub.turn.record("identity", guest, identity)
    for target, mark in hub.forget_markers(guest).items():
        if hub.markers.advance(identity, target, mark):
            hub.turn.record("marker", identity, target, *mark)


def change_login(hub: Hub, who: Session, account: str) -> None:
    """Log a user in to an account. A guest's first account inherits what the guest has."""
    user, identity = who.user, hub.accounts.identity(account)
    inherit(hub, user, identity)
    user.set_login(account, identity)
    hub.turn.changed.add(user)
    emit_to_witnesses(hub, ACCOUNT, user.source, user, "", account, origin=who)
    server = Source(hub.name, "", mask=hub.name)
    for channel in user.channels:
        member, ranks = channel.members[user], channel.ranks_by_account(user)
        given = [ModeChange(True, r, user.name) for r in ranks if member.set_rank(r, True)]
        if given:
            channel.rosters.clear()
            hub.emit(MODE, server, channel.audience, format_modes(given))


def new_resume_id(hub: Hub, token: str) -> str:
    """Return the identity of a guest's stay. A guest who comes back with the token gets the same
    one, with the private conversations. If an account has used the token since then, it is a new
    one."""
    known = f"~{token[:SECRET_DIGITS]}"
    if token and known not in hub.accounts_of and known not in hub.users_by_id:
        return known
    return f"~{hub.next_id()}"


def add_user(hub: Hub, user: User) -> None:
    hub.users[user.key] = hub.users_by_id[user.resume_id] = user
    hub.most_users = max(hub.most_users, len(hub.users))
    hub.users_by_token.update(dict.fromkeys(user.tokens, user))
    hub.invisible += "i" in user.modes


@act
def enter(
    hub: Hub,
    who: Session,
    wanted: str,
    username: str,
    realname: str,
    address: str,
    account: str,
    proof: str,
    token: str,
    exact: bool,
    dice: int,
    metadata: tuple[tuple[str, str], ...],
    away: str,
) -> tuple[bool, bool]:
    """Make a session a new user, or one more session of a present user: the one whose token it has,
    or (with `exact`) the one of the same account under that name. Return whether it joined a
    present user, and whether by the token. A token is no log-in: it gives a session no more rights
    than those of the account that the session proved."""
    account = account if hub.accounts.is_proof(account, proof) else ""
    user, required = user_of_token(hub, token, account)
    holder, owns = hub.users.get(fold(wanted)), bool(account) and fold(wanted) == fold(account)
    if user is None and exact:
        if not (owns and clean_name(wanted) == wanted):
            check_name(hub, wanted, account=account)
        user = holder if holder and account and holder.account == account else None
    name = user.name if user else wanted if owns else free_name(hub, wanted, None, account, dice)
    source = source_of(name, address, username, account)
    if ban := server_ban(hub, User(source, "", "", 0)):
        raise Refused("BANNED_FROM_SERVER", f"you are banned from this server: {ban.reason}")
    who.client, who.token = token, "" if required else token
    if user:
        resumed = who.token in user.tokens
        attach(hub, who, user, address)
        if account and user.account != account:
            change_login(hub, who, account)
        return True, resumed
    if owns and holder:
        take_name(hub, holder, free_name(hub, wanted, dice=dice))
    user = User(source, realname or name, new_resume_id(hub, who.token), hub.now)
    user.set_login(account, hub.accounts.identity(account))
    user.metadata, user.away, user.spoke = dict(metadata), away, hub.ticks
    add_user(hub, user)
    attach(hub, who, user, address)
    tell_watchers(hub, user.key, ONLINE, user.source)
    return False, False


def close_channel(hub: Hub, channel: Channel) -> None:
    """End a channel. If it was ever private, its history is sealed from the next founder."""
    del hub.channels[channel.key]
    for user in list(channel.invited):
        channel.uninvite(user)
    if channel.private:
        hub.turn.record("seal", channel.key, channel.founding)


def put_out(hub: Hub, user: User, channel: Channel) -> None:
    """End a membership, after the event that tells it."""
    hub.turn.move(user, channel)
    member = channel.members.pop(user)
    channel.rosters.clear()
    channel.former.setdefault(user, []).append((member.since, hub.last_id))
    del user.channels[channel]
    if not channel.members and not channel.founder:
        close_channel(hub, channel)


def remove_user(hub: Hub, user: User, reason: str, origin: Session | None = None) -> None:
    """Remove a user, and tell the QUIT. A QUIT always has a reason: some clients need one."""
    hub.charge(WORK_OF_A_RECEIVER * neighbours(user).cost)
    hub.emit(QUIT, user.source, neighbours(user), reason or "Connection closed", origin=origin)
    for channel in list(user.channels):
        put_out(hub, user, channel)
    for channel in list(user.invitations):
        channel.uninvite(user)
    del hub.users[user.key], hub.users_by_id[user.resume_id]
    for token in user.tokens:
        del hub.users_by_token[token]
    hub.absent.pop(user, None)
    forget_absent(hub, user)
    hub.invisible -= "i" in user.modes
    hub.turn.changed.add(user)
    hub.forget_markers(user.resume_id)
    hub.former.append(FormerUser(user.source, user.realname, hub.now))
    tell_watchers(hub, user.key, OFFLINE, user.source)


def start_grace_period(hub: Hub, user: User) -> None:
    """Keep a user without a session. If there are too many such users, the first of them goes."""
    hub.absent[user] = hub.ticks
    host = host_of(user.source.address)
    near = hub.absent_by_host.setdefault(host, {})
    near[user] = None
    crowded = near if len(near) > hub.absent_per_host and not is_loopback(host) else ()
    crowded = hub.absent if len(hub.absent) > ABSENT_MOST else crowded
    if crowded:
        remove_user(hub, next(iter(crowded)), "Connection lost")


@act
def leave(hub: Hub, who: Session, reason: str, intended: bool) -> None:
    """End a session. With the last session the user goes too; but if the connection broke and the
    user can prove to be the same later, the user stays for the grace period."""
    user, token = who.user, who.token
    if user is None:  # it never had one, or was disconnected
        unfollow(hub, who)
        hub.sessions.pop(who.id, None)
        return
    detach(hub, who)
    if user.live:
        if intended and all(other.token != token for other in user.live):
            forget_token(hub, user, token)
            hub.turn.changed.add(user)
    elif intended or not user.may_return:
        remove_user(hub, user, reason, who)
    else:
        start_grace_period(hub, user)


@act
def grace_period_over(hub: Hub, who: Session, resume_id: str) -> None:
    """Remove a user who did not come back within the grace period."""
    user = hub.users_by_id.get(resume_id)
    if user and not user.live:
        remove_user(hub, user, "Connection lost")


# Accounts


def killed_text(by: Source, reason: str) -> str:
    return f"Killed ({by.name} ({reason}))"


def disconnect(hub: Hub, by: Source, user: User, reason: str) -> None:
    """Close all sessions of a user. The user has no grace period."""
    live = user.live
    for session in live:
        detach(hub, session)
    hub.emit(KILLED, by, Audience(sessions=live), reason, user.name)
    remove_user(hub, user, killed_text(by, reason), live[0] if live else None)


@act
def log_in(hub: Hub, who: Session, account: str, proof: str, takes_name: bool) -> None:
    """Log a user in to an account whose owner the session proved to be. With `takes_name` the user
    also gets the account's name, or the session moves to the account's user of that name."""
    if not hub.accounts.is_proof(account, proof):
        raise wrong_login()  # the account was dropped, or its password changed
    user, holder = who.user, hub.users.get(fold(account))
    source = source_of(user.name, user.source.address, user.source.username, account)
    if ban := server_ban(hub, User(source, "", "", 0)):
        return disconnect(hub, Source(hub.name, "", mask=hub.name), user, ban.reason)
    if takes_name and holder and holder is not user and holder.account != account:
        take_name(hub, holder, free_name(hub, account))
        holder = None
    if not takes_name or holder in (None, user):
        change_login(hub, who, account)
        if takes_name and holder is None:
            take_name(hub, user, account, who)
        return
    inherit(hub, user, holder.login)
    user.sessions.remove(who)
    for channel in user.channels:
        channel.by_wire = None
    if not user.live:
        remove_user(hub, user, f"Logged in as {account}", who)
    who.user = None
    attach(hub, who, holder, who.address)
    hub.turn.since.pop(who, None)  # this session gets all of the turn's events, too


def check_new_account(hub: Hub, user: User | None, nick: str, wanted: str) -> str:
    """Return the account name to register, which must be the user's own. Raises Refused."""
    name = nick if fold(wanted) in ("*", fold(nick)) else wanted
    if user and user.account:
        raise Refused("ALREADY_AUTHENTICATED", "you are logged in already", name)
    if not nick:
        raise Refused("NEED_NICK", "take a name first", "*")
    if name != nick:
        raise Refused("ACCOUNT_NAME_MUST_BE_NICK", f"an account is called as you are: {nick}", name)
    if hub.accounts.is_foreign(name, "") or hub.users.get(fold(name)) not in (None, user):
        raise Refused("ACCOUNT_EXISTS", f"{name} is registered already", name)
    return name


def save_account(hub: Hub, account: Account) -> Account:
    hub.accounts.put(account)
    hub.turn.record(
        *("account", fold(account.name), account.name, *account.verifier),
        *(account.email, account.number),
    )
    return account


@act
def register_account(
    hub: Hub, who: Session, nick: str, wanted: str, verifier: tuple, email: str
) -> Account:
    """Register an account. The session is not logged in by that."""
    name = check_new_account(hub, who.user, nick, wanted)
    return save_account(hub, Account(name, Verifier(*verifier), email, hub.next_id()))


@act
def verify_account(hub: Hub, who: Session, name: str, verifier: tuple, email: str) -> Account:
    """Register an account whose mail address was verified."""
    if fold(name) in hub.accounts:
        raise Refused("INVALID_CODE", f"{name} is registered already", name)
    return save_account(hub, Account(name, Verifier(*verifier), email, hub.next_id()))


@act
def change_password(hub: Hub, who: Session, account: str, proof: str, verifier: tuple) -> Account:
    """Change an account's password; `proof` is of the old one."""
    known = hub.accounts.get(fold(account))
    if known is None or proof != known.revision:
        raise wrong_login()
    return save_account(hub, known._replace(verifier=Verifier(*verifier)))


def drop_certificate(hub: Hub, fingerprint: str) -> None:
    del hub.accounts.certificates[fingerprint]
    hub.turn.record("certificate_gone", fingerprint)


def give_up_channel(hub: Hub, channel: Channel) -> None:
    """Make a channel that an account founded end with its last member, like any other."""
    hub.founded -= collections.Counter([channel.founder])
    channel.founder = ""
    channel.stored_ranks.clear()
    hub.turn.changed.add(channel)
    if not channel.members:
        close_channel(hub, channel)


@act
def drop_account(hub: Hub, who: Session, name: str, proof: str) -> None:
    """Delete an account. Its users stay as guests; its channels end with their last member."""
    account = hub.accounts.get(fold(name))
    if account is None or proof != account.revision:
        raise wrong_login()
    identity = account.identity
    for fingerprint in hub.accounts.certificates_of(name):
        drop_certificate(hub, fingerprint)
    hub.accounts.remove(name)
    hub.turn.record("account_gone", fold(name))
    hub.forget_markers(identity)
    for guest in hub.guests_of.pop(identity, ()):
        del hub.accounts_of[guest]
    hub.turn.record("identities_gone", identity)
    hub.charge(len(hub.users) + len(hub.channels))
    for user in [user for user in hub.users.values() if user.login == identity]:
        user.set_login("", "")
        hub.turn.changed.add(user)
        emit_to_witnesses(hub, ACCOUNT, user.source, user)
    for channel in [c for c in hub.channels.values() if c.founder == identity]:
        give_up_channel(hub, channel)


def own_account(user: User) -> str:
    """Return the account that a user is logged in to. Raises Refused."""
    if not user.account:
        raise Refused("NOT_LOGGED_IN", "you are not logged in")
    return user.account


@act
def add_certificate(hub: Hub, who: Session, fingerprint: str) -> str:
    accounts, account = hub.accounts, own_account(who.user)
    if not fingerprint:
        raise Refused("NO_CERTIFICATE", "this connection shows no certificate")
    if accounts.certificates.get(fingerprint, fold(account)) != fold(account):
        raise Refused("CERTIFICATE_TAKEN", "this certificate is another account's")
    known = accounts.certificates_of(account)
    if fingerprint not in known and len(known) >= CERTIFICATES:
        raise Refused("LIMIT_REACHED", f"{CERTIFICATES} certificates at most; remove one")
    accounts.certificates[fingerprint] = fold(account)
    hub.turn.record("certificate", fingerprint, fold(account))
    return account


@act
def remove_certificate(hub: Hub, who: Session, fingerprint: str) -> str:
    account = own_account(who.user)
    if hub.accounts.certificates.get(fingerprint) != fold(account):
        raise Refused("NO_CERTIFICATE", "that is no certificate of yours; see CERT LIST")
    drop_certificate(hub, fingerprint)
    return account


# Channels


def tell_metadata_of_newcomer(hub: Hub, who: Session, channel: Channel) -> None:
    """Tell a channel's members the metadata of a user who joined, if they subscribed to it."""
    user = who.user
    for key, value in user.metadata.items():
        subscribed = hub.subscribers.get(key, ())
        hub.charge(len(subscribed))
        told = [s for s in subscribed if s.user in channel.members and s is not who]
        if told:
            hub.emit(METADATA, user.source, Audience(user.name, sessions=told), value, key)


@act
def join(hub: Hub, who: Session, name: str, password: str) -> Channel | None:
    """Join a channel, or found it and operate it. Return None if the user is a member already."""
    check_channel_name(name)
    user, key = who.user, fold(name)
    channel = hub.channels.get(key)
    if channel and channel in user.channels:
        return None
    if len(user.channels) >= CHANNELS_A_USER:
        raise Refused("TOO_MANY_CHANNELS", f"{CHANNELS_A_USER} channels at most; /part one", name)
    if channel:
        hub.charge(channel.masks)
        channel.check_entry(user, password)
        ranks = channel.ranks_by_account(user)
    else:
        channel = hub.channels[key] = Channel(name, hub.last_id + 1, hub.now)
        ranks = "" if key == LOBBY else "o"
        if ranks and user.login and hub.founded[user.login] < CHANNELS_FOUNDED:
            channel.founder = user.login  # the channel lasts
            hub.founded[user.login] += 1
    channel.uninvite(user)
    channel.members[user] = Membership(hub.last_id + 1, ranks)
    user.channels[channel] = None
    channel.enrol(user)
    hub.turn.move(user, channel)
    hub.emit(JOIN, user.source, channel.audience, user.realname, user.account, who)
    if user.away:
        hub.emit(AWAY, user.source, channel.audience, user.away, origin=who)
    if others := [session for session in user.live if session is not who]:
        hub.emit(ENTERED, user.source, Audience(channel.name, sessions=others))
    tell_metadata_of_newcomer(hub, who, channel)
    return channel


@act
def part(hub: Hub, who: Session, name: str, reason: str) -> Channel:
    channel = hub.find_channel(name)
    channel.member(who.user)
    hub.emit(PART, who.user.source, channel.audience, cut(reason, REASON_BYTES), origin=who)
    put_out(hub, who.user, channel)
    return channel


@act
def disown(hub: Hub, who: Session, name: str) -> str:
    """Give up a channel that the user's account founded; return the channel's name."""
    channel = hub.find_channel(name)
    if not channel.founded_by(who.user):
        raise Refused("NOT_OPERATOR", f"{channel.name} is not yours", channel.name)
    give_up_channel(hub, channel)
    return channel.name


@act
def set_topic(hub: Hub, who: Session, name: str, topic: str) -> Channel:
    user, channel = who.user, hub.find_channel(name)
    channel.require_inside(who)
    if "t" in channel.flags:
        channel.require(who)
    if len(topic.encode()) > TOPIC_BYTES:
        raise Refused("TOO_LONG", f"a topic has at most {TOPIC_BYTES} bytes")
    channel.topic = topic
    channel.topic_setter, channel.topic_time = user.source.mask, hub.now
    hub.turn.changed.add(channel)
    hub.emit(TOPIC, user.source, with_outsider(channel, user), topic, origin=who)
    return channel


@act
def kick(hub: Hub, who: Session, where: str, name: str, reason: str) -> None:
    """Kick a member, but not one of a higher rank. Half-operators cannot kick each other."""
    user, channel = who.user, hub.find_channel(where)
    channel.require(who)  # before a refusal tells who is here
    victim = hub.find_user(name)
    if victim not in channel.members:
        text = f"{victim.name} is not in {channel.name}"
        raise Refused("USER_NOT_IN_CHANNEL", text, victim.name, channel.name)
    if not who.operator:
        mine, theirs = channel.members[user].level, channel.members[victim].level
        if theirs < mine or theirs == mine == RANKS.index("h"):
            text = f"{victim.name} has too high a rank in {channel.name}"
            raise Refused("NOT_OPERATOR", text, channel.name)
    reason = cut(reason or user.name, REASON_BYTES)
    hub.emit(KICK, user.source, with_outsider(channel, user), reason, victim.name, who)
    put_out(hub, victim, channel)


@act
def invite(hub: Hub, who: Session, name: str, where: str) -> tuple[User, Channel]:
    """Invite a user. If something would keep the user out, only an operator may invite, and then
    the user may join. An invitation by any other member is only a message."""
    user, channel = hub.find_user(name), hub.find_channel(where)
    channel.require_inside(who)
    if user in channel.members:
        text = f"{user.name} is in {channel.name} already"
        raise Refused("ALREADY_IN_CHANNEL", text, user.name, channel.name)
    hub.charge(channel.masks + len(channel.members))
    if "i" in channel.flags or next(channel.obstacles(user, ""), None):
        channel.require(who)
    member = channel.members.get(who.user)
    by_operator = who.operator or bool(member and member.level <= RANKS.index("h"))
    if len(user.invitations) >= INVITATIONS:  # the oldest is the least likely to be used
        next(iter(user.invitations)).uninvite(user)
    user.invitations[channel] = by_operator or user.invitations.get(channel, False)
    channel.invited.add(user)
    source = who.user.source
    hub.emit(INVITE, source, Audience(users={user}), channel.name, user.name, who)
    level = RANKS.index("h") if "i" in channel.flags else len(RANKS)
    able = {other for other, member in channel.members.items() if member.level <= level}
    hub.emit(INVITED, source, Audience(users=able - {who.user}), channel.name, user.name, who)
    return user, channel


def change_rank(hub: Hub, who: Session, channel: Channel, change: ModeChange) -> ModeChange | None:
    """Change a member's rank. Every member may step down; other changes need a rank."""
    if not change.value:
        sign = "+" if change.on else "-"
        text = f"to whom? MODE {channel.name} {sign}{change.letter} <nickname>"
        raise Refused("NEED_MORE_PARAMS", text, "MODE")
    steps_down = not change.on and fold(change.value) == who.user.key
    channel.require(who, "v" if steps_down else RANK_NEEDED[change.letter])
    other = hub.find_user(change.value)
    member = channel.members.get(other)
    if member is None:
        text = f"{other.name} is not in {channel.name}"
        raise Refused("USER_NOT_IN_CHANNEL", text, other.name, channel.name)
    if not member.set_rank(change.letter, change.on):
        return None
    channel.rosters.clear()
    channel.store_ranks(other)
    hub.turn.changed.add(other)
    return change._replace(value=other.name)


def change_mode(
    hub: Hub, who: Session, channel: Channel, change: ModeChange, salt: str
) -> ModeChange | None:
    """Make one change; return the change that was really made, or None. Raises Refused."""
    letter = change.letter
    if letter in RANKS:
        return change_rank(hub, who, channel, change)
    channel.require(who)
    if letter in FLAGS:
        return channel.set_flag(change)
    if letter in MASK_LISTS:
        return channel.set_mask(change, who.user.source.mask, hub.now)
    if letter == "k":
        return channel.set_password(change, salt)
    if letter == "l":
        return channel.set_limit(change)
    text = f"there is no channel mode {letter}; the modes are {MASK_LISTS}, k, l, {RANKS}, "
    raise Refused("UNKNOWN_MODE", text + "".join(FLAGS), letter)


def end_invitations(hub: Hub, channel: Channel, done: Iterable[ModeChange]) -> None:
    """End the invitations of users whom a new ban or +i keeps out."""
    for change in done:
        if change.on and change.letter in "bi" and channel.invited:
            hub.charge(len(channel.invited))
            mask = Mask(change.value) if change.letter == "b" else None
            for user in [u for u in channel.invited if mask is None or mask.matches(u)]:
                channel.uninvite(user)


Changes = tuple[tuple[bool, str, str], ...]  # the fields of a ModeChange each


@act
def set_modes(hub: Hub, who: Session, name: str, changes: Changes, salt: str) -> list[Refused]:
    """Change a channel's modes where that is possible; return the refusals of the rest."""
    user, channel = who.user, hub.find_channel(name)
    done: list[ModeChange] = []
    refusals: dict[Any, Refused] = {}  # one of a kind: a hundred letters are no flood
    for change in itertools.starmap(ModeChange, changes):
        try:
            changed = change_mode(hub, who, channel, change, salt)
            done += [changed] if changed else []
        except Refused as refusal:
            refusals.setdefault((refusal.code, str(refusal)), refusal)
    if not done:
        return list(refusals.values())
    hub.turn.changed.add(channel)
    end_invitations(hub, channel, done)
    audience = with_outsider(channel, user)
    for text in mode_lines(change for change in done if change.letter != "k"):
        hub.emit(MODE, user.source, audience, text, origin=who)
    for text in mode_lines(change for change in done if change.letter == "k"):
        hub.emit(PASSWORD, user.source, audience, text, origin=who)
    return list(refusals.values())


def move_markers(hub: Hub, old: str, new: str) -> None:
    """Move the read markers of a renamed channel; those under the new name are out of date."""
    for owner, marks in list(hub.markers.items()):
        for key in marks.keys() & {old, new}:
            hub.turn.record("marker_gone", owner, key)
        mark, _ = marks.pop(old, None), marks.pop(new, None)
        if mark:
            marks[new] = mark
            hub.turn.record("marker", owner, new, *mark)
        elif not marks:
            del hub.markers[owner]


@act
def rename_channel(hub: Hub, who: Session, where: str, name: str, reason: str) -> None:
    """Rename a channel with the history of its founding. The old name is free at once."""
    user, channel = who.user, hub.find_channel(where)
    channel.require(who, "o")
    check_channel_name(name)
    other, old, key = hub.channels.get(fold(name)), channel.name, fold(name)
    if LOBBY in (channel.key, key):
        raise Refused("CANNOT_RENAME", f"{LOBBY} stays what it is", old, name)
    if other not in (None, channel):
        raise Refused("CHANNEL_NAME_IN_USE", f"there is a {other.name} already", old, name)
    if key not in (channel.key, channel.former_key) and hub.has_history(key):
        text = f"there is history of a channel called {name}, for those who may come back to it"
        raise Refused("CHANNEL_NAME_IN_USE", text, old, name)
    hub.charge(RENAME_WORK * len(channel.members))
    del hub.channels[channel.key]
    if key != channel.key:
        hub.turn.record("rename", channel.key, key, channel.founding)
        hub.turn.record("channel_gone", channel.key)
        move_markers(hub, channel.key, key)
        channel.former_key = channel.key
    channel.set_name(name)
    hub.channels[key] = channel
    hub.turn.changed |= {channel, *channel.members}
    hub.emit(RENAME, user.source, with_outsider(channel, user), reason, old, who)
    hub.emit(RENAMED, user.source, Audience(name, users=channel.members), reason, old)


# Messages


class Sent(NamedTuple):
    """The result of sending a message."""

    repeat: int | None = None  # the id of the event that the same message was before
    away: User | None = None  # its receiver, who is away


SENT = Sent()


# Files


def keep_file(hub: Hub, file: StoredFile) -> None:
    hub.files[file.id] = file
    hub.turn.record("file", file.id, file.state())


@act
def begin_file(
    hub: Hub, who: Session, id: str, name: str, type: str, size: int, owner: str, address: str
) -> None:
    """Register a new file whose upload begins now. Raises Refused if there is no room."""
    hub.files.check_room(size, owner, address)
    keep_file(hub, StoredFile(id, name, type, size, owner, address, hub.now))


EMOJI_STYLE = "\ufe0f"  # the character before it is to be shown as an emoji


ZWNJ, ZWJ = "\u200c", "\u200d"  # zero width (non-)joiners: Persian; one emoji of several


def is_regional(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"  # two of them are a flag


SOFT_HYPHEN = "\xad"


def is_inner_jamo(c: str) -> bool:
    """Return whether `c` is a vowel or final of conjoining Hangul, which joins its initial."""
    return "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7fb"


def is_emoji(c: str) -> bool:
    """Return whether `c` is an emoji newer than Python's tables, which have it unassigned."""
    return "\U0001f300" <= c <= "\U0001faff" and unicodedata.category(c) == "Cn"


def cluster_width(cluster: str) -> int:
    first = cluster[0]
    if EMOJI_STYLE in cluster or ZWJ in cluster[1:-1] or is_regional(first):
        return 2
    if first == SOFT_HYPHEN:
        return 1
    marks = sum(unicodedata.category(c) == "Mc" for c in cluster[1:])  # Hindi, Tamil: each has one
    if unicodedata.category(first) in ("Mn", "Me", "Cf", "Cc") or is_inner_jamo(first):
        return marks
    return marks + (2 if unicodedata.east_asian_width(first) in "WF" or is_emoji(first) else 1)


def joins(cluster: str, c: str) -> bool:
    """Return whether `c` continues the cluster before it."""
    if is_inner_jamo(c):
        return "\u1100" <= cluster[0] <= "\u11ff"
    if cluster[-1] == ZWJ or c == ZWJ or unicodedata.category(c) in ("Mn", "Me", "Mc"):
        return cluster != "\n"
    if is_regional(c):
        return len(cluster) == 1 and is_regional(cluster)
    return "\U0001f3fb" <= c <= "\U0001f3ff"  # skin tones (UTS 51)


def clusters(text: str) -> list[str]:
    """Split `text` into what a reader calls characters: letters with their accents, emoji
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


def width(text: str) -> int:
    """Return the columns of `text` on a terminal: none for marks, two for wide characters (UAX 11)
    and emoji. Terminals disagree about the newest emoji, so nothing may depend on the result."""
    if text.isascii() and text.isprintable():
        return len(text)
    return sum(map(cluster_width, clusters(text)))


@act
def resize_file(hub: Hub, who: Session, id: str, size: int) -> None:
    """Make room for more of a file whose size was not announced. Raises Refused."""
    if file := hub.files.pop(id, None):
        try:
            hub.files.check_room(size, file.owner, file.address)
        finally:
            hub.files[id] = file
        keep_file(hub, file._replace(size=size))


@act
def finish_file(
    hub: Hub, who: Session, id: str, sha: str, size: int, type: str, width: int, height: int
) -> None:
    """Complete a file, so that its link works from now on."""
    if file := hub.files.get(id):
        known = {"sha": sha, "size": size, "type": type, "width": width, "height": height}
        keep_file(hub, file._replace(**known))


@act
def remove_file(hub: Hub, who: Session, id: str) -> None:
    """Remove a file, complete or not. Content that no other file shares goes, too."""
    file = hub.files.pop(id, None)
    if file is None:
        return
    for message in file.messages:
        hub.files.by_message.pop(message, None)
    hub.turn.record("file_gone", id)
    if not any(file.on_disk == other.on_disk for other in hub.files.values()):
        hub.files.unwanted.append(file.on_disk)


def carry_file(hub: Hub, file: StoredFile, event: Event) -> None:
    """Note a message of the owner with the file's link. The file goes with the last of these."""
    if hub.same_person(file.owner, event.source.identity) and len(file.messages) < FILE_MESSAGES:
        hub.files.by_message[event.id] = file.id
        keep_file(hub, file._replace(messages=(*file.messages, event.id)))


def redact_file(hub: Hub, who: Session, message: int) -> None:
    """Forget a redacted message. A file whose last message that was goes, too."""
    file = hub.files.get(hub.files.by_message.pop(message, ""))
    if file is None:
        return
    left = tuple(one for one in file.messages if one != message)
    if left:
        keep_file(hub, file._replace(messages=left))
    else:
        remove_file(hub, who, file.id)


@act
def say(hub: Hub, who: Session, name: str, text: str, kind: str, tags: str, own_id: str) -> Sent:
    """Send a message to a channel or user, once only for each `own_id` of the sender."""
    user = who.user
    if own_id and (repeat := hub.find_repeat(who, own_id)) is not None:
        return Sent(repeat)
    about, partner = "", None
    audience = hub.channels.get(name) or hub.find_audience(user, name)  # often it is the key
    if audience.__class__ is Channel:
        channel = audience
        channel.check_can_send(user, text)
        if masks := channel.lists["b"]:
            hub.work += len(masks)
        audience = channel.audience if user in channel.members else with_outsider(channel, user)
    elif isinstance(audience, Conversation):
        audience.check_can_send(user)
        partner = audience.partner(user)
        about, partner.traces = partner.name, True
        hub.work += 2 * WORK_OF_A_RECEIVER
    else:
        hub.find_channel(name[1:]).check_can_send(user, text)
        hub.work += WORK_OF_A_RECEIVER * len(audience.users)
    user.traces = True
    if text and not text.startswith("\x01"):  # tags and answers of programs are no activity
        user.spoke = hub.ticks
    source = user.source._replace(operator=True) if who.operator else user.source
    file = hub.files.linked(text) if "/files/" in text else None
    if file:
        tags = ";".join(filter(None, (tags, file.tag)))
    event = hub.emit(kind, source, audience, text, about, who, tags)
    if file:
        carry_file(hub, file, event)
    if partner is not None and partner is not user:
        for other in user.sessions:
            if other is not who:
                hub.turn.copies.setdefault(other, []).append(event.id)
                hub.turn.individually_addressed.add(other)
    if own_id:
        hub.turn.dedup[next(iter(hub.dedup_owners(who))), own_id] = event
    return Sent(None, partner) if partner and partner.away and kind is MESSAGE else SENT


def conversation_keys(hub: Hub, one: str, other: str) -> list[str]:
    """Return the keys of a private conversation. An account also has those of its former guests."""
    pairs = itertools.product(hub.identities(one), hub.identities(other))
    return list(dict.fromkeys(" ".join(sorted(pair)) for pair in pairs))


def check_may_redact(
    who: Session, channel: Channel | None, founding: int, name: str, message_id: str
) -> None:
    """Raise Refused unless the session may redact another user's message."""
    text = "these are not your words"
    if channel:
        text = "these are words from before this channel was founded again"
        member = channel.members[who.user]
        if who.operator or (founding == channel.founding and member.level <= RANKS.index("h")):
            return
        if founding == channel.founding:
            text = f"only operators of {channel.name} can do that"
    raise Refused("REDACT_FORBIDDEN", text, name, message_id)


@act
def redact(hub: Hub, who: Session, name: str, message_id: str, reason: str) -> None:
    """Redact a message. The author may, and in a channel so may its operators, for messages of this
    founding. In a private conversation only the author may."""
    user = who.user
    channel = hub.channels.get(fold(name)) if name.startswith("#") else None
    other = None if name.startswith("#") else hub.users.get(fold(name))
    if not (other or (channel and user in channel.members)):
        raise Refused("INVALID_TARGET", "there is nothing of it that you may read", name)
    audience = channel.audience if channel else hub.conversation(user, other)
    keys = [channel.key] if channel else conversation_keys(hub, user.identity, other.identity)
    try:
        id = hub.ids.parse(message_id)
    except ValueError:
        id = 0
    known = hub.author_of(keys, id)
    if known is None:
        raise Refused("UNKNOWN_MSGID", "there is no such message", name, message_id)
    founding, author = known
    if not hub.same_person(author, user.identity):
        check_may_redact(who, channel, founding, name, message_id)
    for key in keys:
        hub.turn.record("redact", key, hub.now, id)
    redact_file(hub, who, id)
    text = hub.ids.text(id) + (f" :{reason}" if reason else "")
    hub.emit(REDACT, user.source, audience, text, other.name if other else "", who)


@act
def wallops(hub: Hub, who: Session, text: str) -> None:
    """Send a text to all users with mode w."""
    hub.charge(len(hub.users))
    listening = [user for user in hub.users.values() if "w" in user.modes]
    hub.emit(WALLOPS, who.user.source, Audience(users=listening), text, origin=who)


# A user's own state


@act
def set_away(hub: Hub, who: Session, reason: str) -> None:
    """Mark the user as away for a reason; without a reason, as back."""
    user, reason = who.user, cut(reason, REASON_BYTES)
    if reason != user.away:
        user.away = reason
        hub.turn.changed.add(user)
        emit_to_witnesses(hub, AWAY, user.source, user, reason, origin=who)


@act
def set_realname(hub: Hub, who: Session, realname: str) -> None:
    user = who.user
    user.realname = realname
    hub.turn.changed.add(user)
    emit_to_witnesses(hub, REALNAME, user.source, user, realname, origin=who)


@act
def set_user_modes(hub: Hub, who: Session, changes: tuple[tuple[bool, str, str], ...]) -> None:
    """Change the user's own modes, on all devices. Mode o is one session's; only OPER sets it."""
    user, done = who.user, []
    for change in itertools.starmap(ModeChange, changes):
        if change.letter == "o":
            if who.operator and not change.on:
                done.append(change)
                who.operator = False
                hub.operators.discard(who)
        elif change.on != (change.letter in user.modes):
            user.modes ^= {change.letter}
            hub.invisible += {True: 1, False: -1}[change.on] if change.letter == "i" else 0
            done.append(change)
    if not done:
        return
    user.change_source(bot="B" in user.modes)
    hub.turn.changed.add(user)
    shared = [change for change in done if change.letter != "o"]
    if others := [s for s in user.live if s is not who] if shared else []:
        audience = Audience(user.name, sessions=others)
        hub.emit(USER_MODE, user.source, audience, format_modes(shared), user.name)
    mine = Audience(user.name, sessions={who})
    hub.emit(USER_MODE, user.source, mine, format_modes(done), user.name, who)


def check_metadata_writable(who: Session, owner: User | Channel, target: str, key: str) -> None:
    """Raise Refused unless the session may change the metadata of a user or channel."""
    if isinstance(owner, Channel):
        member = owner.members.get(who.user)
        allowed = who.operator or (member and member.level <= RANKS.index("o"))
    else:
        allowed = owner is who.user or who.operator
    if not allowed:
        raise Refused("KEY_NO_PERMISSION", "that is not yours to change", target, key)


@act
def set_metadata(hub: Hub, who: Session, target: str, key: str, value: str) -> None:
    """Set a metadata value of a user or channel; "" removes it. Subscribers of the key are told."""
    owner = hub.find_channel(target) if target.startswith("#") else hub.find_user(target)
    check_metadata_writable(who, owner, target, key)
    if value and key not in owner.metadata and len(owner.metadata) >= METADATA_KEYS:
        raise Refused("LIMIT_REACHED", f"{METADATA_KEYS} keys at most", target, str(METADATA_KEYS))
    if value:
        owner.metadata[key] = value
    else:
        owner.metadata.pop(key, None)
    hub.turn.changed.add(owner)
    subscribed = hub.subscribers.get(key, set()) - {who}
    if not subscribed:
        return
    if isinstance(owner, Channel):
        audience, source = owner.audience, Source(owner.name, "")
    else:
        watching = hub.watchers.get(owner.key, ())
        audience, source = neighbours(owner, watching, alone=True), owner.source
    hub.charge(len(subscribed))
    channels = set(audience.channels)
    told = [
        s
        for s in subscribed
        if s.user
        and (
            s in audience.sessions
            or s.user in audience.users
            or not channels.isdisjoint(s.user.channels)
        )
    ]
    if told:
        hub.emit(METADATA, source, Audience(owner.name, sessions=told), value, key)


@act
def mark_read(hub: Hub, who: Session, target: str, when: int, id: int) -> None:
    """Move a read marker forward, and tell the user's other sessions. Without a message's id, its
    time cannot lie in the future, where nothing has been read."""
    user, key = who.user, fold(target)
    mark = Marker(when if id else min(when, hub.now + TIMES_AHEAD), id)
    if not hub.markers.advance(user.identity, key, mark):
        return
    hub.turn.record("marker", user.identity, key, *mark)
    if others := [session for session in user.live if session is not who]:
        hub.emit(READ_ON, user.source, Audience(target, sessions=others))


# Operators of the server


@act
def become_operator(hub: Hub, who: Session, name: str) -> None:
    """Make this session operate the server, but not the user's others: it proved a password."""
    who.operator = True
    hub.operators.add(who)
    user = who.user
    hub.emit(USER_MODE, user.source, Audience(user.name, sessions={who}), "+o", user.name, who)


def require_operator(who: Session) -> None:
    if not who.operator:
        raise Refused("NOT_SERVER_OPERATOR", "only operators of this server can do that")


@act
def kill(hub: Hub, who: Session, name: str, reason: str) -> str:
    """Close all sessions of a user; return the user's mask."""
    require_operator(who)
    victim = hub.find_user(name)
    disconnect(hub, who.user.source, victim, cut(reason, REASON_BYTES) or "no reason given")
    return victim.source.mask


@act
def ban_from_server(hub: Hub, who: Session, mask: str, minutes: int, reason: str) -> int:
    """Add a K-line, and disconnect the users who match it; return their number."""
    require_operator(who)
    mask = server_mask(mask)
    if not is_word(mask, MASK_BYTES):
        raise Refused("BAD_MASK", f"a mask is one word of at most {MASK_BYTES} bytes", mask)
    for key in [key for key, ban in hub.bans.items() if ban.until and ban.until <= hub.now]:
        del hub.bans[key]
        hub.turn.record("ban_gone", key)
    if fold(mask) not in hub.bans and len(hub.bans) >= SERVER_BANS:
        raise Refused("LIST_FULL", f"the list is full: {SERVER_BANS} bans at most", "*", mask)
    until = hub.now + minutes * 60_000 if minutes else 0
    reason = cut(reason, REASON_BYTES) or "no reason given"
    ban = ServerBan(mask, who.user.source.mask, until, reason)
    hub.bans[fold(mask)] = ban
    hub.turn.record("ban", fold(mask), *ban)
    hub.charge(len(hub.users))
    pattern, me = Mask(mask), who.user
    meant = [user for user in hub.users.values() if user is not me and pattern.matches(user)]
    for user in meant:
        disconnect(hub, who.user.source, user, f"K-lined: {reason}")
    return len(meant)


@act
def unban_from_server(hub: Hub, who: Session, mask: str) -> str:
    """Remove a K-line; return its mask."""
    require_operator(who)
    ban = hub.bans.pop(fold(server_mask(mask)), None)
    if ban is None:
        raise Refused("NO_SUCH_BAN", f"there is no K-line {mask}; STATS k lists them", mask)
    hub.turn.record("ban_gone", fold(ban.mask))
    return ban.mask


# The start of a server


def revive(hub: Hub, channels: Iterable[tuple[str, str]], users: Iterable[tuple[str, str]]) -> None:
    """Load the users and channels that Hub.settle() recorded. A channel is restored if an account
    founded it, or if one of its members may come back; else it ends as without its last member."""
    wanted: dict[User, dict[str, str]] = {}
    for resume_id, text in users:
        state = json.loads(text)
        user = User.revived(resume_id, state, hub.ticks)
        if user.login and hub.accounts.identity(user.account) != user.login:  # it was dropped
            user.set_login("", "")
        if user.key in hub.users or not user.may_return:
            hub.turn.record("user_gone", resume_id)
            continue
        add_user(hub, user)
        start_grace_period(hub, user)
        wanted[user] = state["channels"]
    identities = {account.identity for account in hub.accounts.values()}
    for key, text in channels:
        hub.channels[key] = channel = Channel.revived(json.loads(text))
        for user in (user for user, places in wanted.items() if key in places):
            ranks = "".join(rank for rank in RANKS if rank in wanted[user][key])
            channel.members[user] = Membership(0, ranks)
        if channel.founder:
            hub.founded[channel.founder] += 1
        if channel.founder not in identities:
            give_up_channel(hub, channel)
    for user, places in wanted.items():
        user.channels = {hub.channels[key]: None for key in places if key in hub.channels}


# ======================================================================================
# PASSWORDS
# ======================================================================================
# How a session proves that it may do something, in both dialects. The slow part runs off the loop
# before the act. The act gets a proof: the revision of the password that was checked.


def wrong_password(session: LocalSession) -> None:
    """Refuse a wrong password of the server or an operator; close the connection after a few."""
    session.tries += 1
    text = f"that is not it (try {session.tries} of {PASSWORD_TRIES})"
    session.refuse(Refused("WRONG_PASSWORD", text))
    if session.tries >= PASSWORD_TRIES:
        session.end("Too many wrong passwords")


SERVER_PASSWORD, OPERATOR_PASSWORD = "*pass", "*oper"  # subjects of the throttle


def check_server_password(session: LocalSession, given: str) -> bool:
    """Return whether the password is right, or none is needed. Raises Refused after many."""
    site = session.site
    if site.password is None:
        return True
    throttle, host = site.hub.accounts.throttle, session.conn.limit_key
    if seconds := throttle.wait(host, SERVER_PASSWORD, site.hub.ticks):
        raise Refused("WRONG_PASSWORD", f"too many failures; try again in {seconds} s")
    throttle.failed(host, SERVER_PASSWORD, site.hub.ticks)
    if not hmac.compare_digest(given.encode(), site.password.encode()):
        return False
    throttle.succeeded(host, SERVER_PASSWORD)
    return True


def claimed_account(session: LocalSession, name: str) -> tuple[str, Verifier]:
    """Return a claimed account and its verifier. A failure until proven. Raises Refused."""
    session.site.server.refresh()
    hub, host = session.site.hub, session.conn.limit_key
    hub.accounts.throttle.check(host, name, hub.ticks)
    hub.accounts.throttle.failed(host, name, hub.ticks)
    return hub.accounts.find(name)


def certified_account(session: LocalSession, name: str) -> tuple[str, Verifier]:
    """Return the account (`name`, if given) of the connection's certificate. Raises Refused."""
    session.site.server.refresh()
    accounts, fingerprint = session.site.hub.accounts, session.conn.fingerprint
    if not fingerprint:
        raise Refused("SASL_FAILED", "this connection shows no certificate")
    key = accounts.certificates.get(fingerprint)
    if key not in accounts or fold(name or key) != key:
        text = f"not with this certificate; log in and /msg {SERVICE} CERT ADD"
        raise Refused("SASL_FAILED", text)
    return accounts.find(key)


def revision_of(session: LocalSession, name: str, verifier: Verifier) -> str:
    """Return the proof of a right password. Raises Refused if the password changed meanwhile."""
    accounts = session.site.hub.accounts
    if accounts.find(name)[1] != verifier:
        raise wrong_login()
    accounts.throttle.succeeded(session.conn.limit_key, name)
    return verifier.salt.hex()


def prove(session: LocalSession, name: str, password: str) -> Steps:
    """Check an account's password; return the registered name and the proof. Raises Refused."""
    account, verifier = claimed_account(session, name)
    if not (yield do(session.later, PASSWORD_LANE, functools.partial(verifier.fits, password))):
        raise wrong_login()
    return account, revision_of(session, account, verifier)


def identify(session: LocalSession, name: str, password: str, takes_name: bool) -> Steps:
    """Log the session's user in to an account if the password is right. Raises Refused."""
    account, proof = yield from prove(session, name, password)
    yield do(session.act, "log_in", account, proof, takes_name)
    session.answer(f"you are logged in as {account}")


def check_password(password: str, name: str) -> None:
    """Raise Refused unless a password is long enough, and not too long, for an account."""
    if len(password) < PASSWORD_LEAST:
        raise Refused("WEAK_PASSWORD", f"a password has at least {PASSWORD_LEAST} characters", name)
    if len(password) > PASSWORD_MOST:
        text = f"a password has at most {PASSWORD_MOST} characters"
        raise Refused("UNACCEPTABLE_PASSWORD", text, name)


@in_steps
def change_own_password(session: LocalSession, old: str, new: str) -> Steps:
    """Change the password of the account that the user is logged in to."""
    name = own_account(session.user)
    check_password(new, name)
    account, proof = yield from prove(session, name, old)
    verifier = yield do(session.later, PASSWORD_LANE, functools.partial(make_verifier, new))
    yield do(session.act, "change_password", account, proof, tuple(verifier))
    session.answer(PASSWORD_CHANGED)


@in_steps
def drop_own_account(session: LocalSession, password: str) -> Steps:
    account, proof = yield from prove(session, own_account(session.user), password)
    yield do(session.act, "drop_account", account, proof)
    session.answer(ACCOUNT_GONE)


EMAIL = re.compile(r"[^@\s]+@[^@\s]+")


def check_registration(session: LocalSession, nick: str, wanted: str, email: str) -> str:
    """Return the account name that a session may register. Raises Refused."""
    rules = session.site.registration
    name = nick if fold(wanted) in ("*", fold(nick)) else wanted
    if "off" in rules:
        raise Refused("TEMPORARILY_UNAVAILABLE", "this server makes no accounts", name)
    if session.user is None and "before-connect" not in rules:
        raise Refused("COMPLETE_CONNECTION_REQUIRED", "come in first, then register", name)
    name = check_new_account(session.site.hub, session.user, nick, wanted)
    if ("email-required" in rules or email not in ("", "*")) and not EMAIL.fullmatch(email):
        raise Refused("INVALID_EMAIL", "write one address, like alice@example.org", name)
    return name


def register_nick(
    session: LocalSession, nick: str, wanted: str, email: str, password: str
) -> Steps:
    """Register a nick as an account; with email-required first send a code to the address. Return
    the account's name and proof; the proof is "" while the code is awaited. Raises Refused."""
    name, site = check_registration(session, nick, wanted, email), session.site
    check_password(password, name)
    accounts, host, ticks = site.hub.accounts, session.conn.limit_key, site.hub.ticks
    by_mail = "email-required" in site.registration
    if by_mail:  # so that no client can fill a stranger's mailbox
        accounts.throttle.check(host, "*mail", ticks)
        accounts.throttle.failed(host, "*mail", ticks)
    if seconds := accounts.made.wait(host, "", ticks):
        text = f"{ACCOUNTS_MADE} accounts from one address at most; try again in {seconds} s"
        raise Refused("TEMPORARILY_UNAVAILABLE", text, name)
    if not is_loopback(host):
        accounts.made.failed(host, "", ticks)
    verifier = yield do(session.later, PASSWORD_LANE, functools.partial(make_verifier, password))
    check_registration(session, nick, wanted, email)  # another user may have been quicker
    if by_mail:
        code = accounts.await_code(Account(name, verifier, email))
        yield do(session.later, MAIL_LANE, functools.partial(site.server.mail, email, name, code))
        return name, ""
    account = yield do(session.act, "register_account", nick, wanted, tuple(verifier), "")
    return account.name, account.revision


def verify(session: LocalSession, name: str, code: str) -> Steps:
    """Take the code that was sent for a new account. Return the account's name and proof."""
    hub = session.site.hub
    known = hub.accounts.verified(name, code, session.conn.limit_key, hub.ticks)
    values = known.name, tuple(known.verifier), known.email
    account = yield do(session.act, "verify_account", *values)
    return account.name, account.revision


def email_used(session: LocalSession, email: str) -> str:
    """Return a note for the user if the address of a registration was not needed; else ""."""
    if email in ("", "*") or "email-required" in session.site.registration:
        return ""
    return f"; {email} was not needed and is not kept"


@in_steps
def oper(session: LocalSession, name: str, password: str, done: Callable[[], None]) -> Steps:
    """Make the session an operator if the password is right. Unknown names take the same time."""
    hub, host = session.site.hub, session.conn.limit_key
    hub.accounts.throttle.check(host, OPERATOR_PASSWORD, hub.ticks)
    hub.accounts.throttle.failed(host, OPERATOR_PASSWORD, hub.ticks)
    verifier = session.site.operators.get(name) or decoy_verifier(name, OPERATOR_ROUNDS)
    fits = yield do(session.later, PASSWORD_LANE, functools.partial(verifier.fits, password))
    who = f"{session.user.source.mask} as {name}"
    session.site.server.note(f"OPER: {who}{'' if fits else ': wrong password'}")
    if not fits:
        return wrong_password(session)
    hub.accounts.throttle.succeeded(host, OPERATOR_PASSWORD)
    done()
    session.act("become_operator", name)


# ======================================================================================
# STORE
# ======================================================================================
# Accounts, history and states in SQLite, and all SQL. The loop's connection alone writes
# chat.db, one transaction a turn, and never waits: a busy database is tried again next turn.
# Helpers read through connections of their own. The search index is a file of its own. To
# change the schema, append a step to MIGRATIONS; steps are never edited.

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
    CREATE TABLE markers (          -- how far a user has read
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
    """
    CREATE TABLE places (           -- what events were said to: channels, private conversations
        id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice
        key TEXT NOT NULL,          -- a channel's key, or the identities of two users
        founding INTEGER NOT NULL DEFAULT 0,    -- of the channel: an id, see Channel.founding
        events INTEGER NOT NULL DEFAULT 0,      -- rows, for pruning; after a crash too few
        one TEXT NOT NULL DEFAULT '',           -- of a private conversation: identities, and
        one_key TEXT NOT NULL DEFAULT '',       -- keys of the names when it began
        other TEXT NOT NULL DEFAULT '',
        other_key TEXT NOT NULL DEFAULT '',
        UNIQUE (key, founding)
    );
    INSERT INTO places SELECT id, key, 0, events, one, one_key, other, other_key FROM targets;
    DROP TABLE targets;
    ALTER TABLE places RENAME TO targets;
    CREATE INDEX targets_one ON targets (one);
    CREATE INDEX targets_other ON targets (other);
    CREATE INDEX events_time ON events (target, time);
    ALTER TABLE markers ADD COLUMN id INTEGER NOT NULL DEFAULT 0;   -- of the message, or 0
    ALTER TABLE receipts RENAME TO dedup;
    CREATE TABLE identities (       -- of guests, who logged in to an account
        guest TEXT PRIMARY KEY,
        account TEXT NOT NULL       -- Account.identity
    ) WITHOUT ROWID;
    CREATE TABLE starts (           -- of the server: which ids were made, and their letters
        first INTEGER PRIMARY KEY,
        reserved INTEGER NOT NULL,  -- no id of this start is above it
        letters TEXT NOT NULL
    );
    CREATE TABLE erased (           -- redacted messages whose words the index may still have
        id INTEGER PRIMARY KEY
    );
    CREATE TABLE bans (             -- K-lines
        key TEXT PRIMARY KEY,       -- the mask, folded
        mask TEXT NOT NULL,
        setter TEXT NOT NULL,
        until INTEGER NOT NULL,     -- milliseconds since 1970, or 0
        reason TEXT NOT NULL
    ) WITHOUT ROWID;
    DROP TABLE IF EXISTS parts;     -- an earlier index
    DROP TABLE IF EXISTS covered;
    DROP TABLE IF EXISTS search;
    DROP TABLE IF EXISTS indexed;
    """,
    """
    CREATE TABLE files (            -- that users have uploaded
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL         -- JSON, see StoredFile.state()
    ) WITHOUT ROWID;
    """,
)

KEPT, BUSY, LOST = "kept", "busy", "lost"  # what became of a turn's events
COLUMNS = "id, time, kind, name, address, username, about, events.text, author, tags"  # event_of()
INSERT_EVENT = f"INSERT INTO events VALUES ({', '.join('?' * 11)})"

# Turn.record(name, ...) -> its table, how many of the values are the key, and the statement.
# A later record of the same table and key makes an earlier one superfluous.
STATEMENTS = {
    "account": ("accounts", 1, f"REPLACE INTO accounts VALUES ({', '.join('?' * 8)})"),
    "account_gone": ("accounts", 1, "DELETE FROM accounts WHERE key = ?"),
    "ban": ("bans", 1, "REPLACE INTO bans VALUES (?, ?, ?, ?, ?)"),
    "ban_gone": ("bans", 1, "DELETE FROM bans WHERE key = ?"),
    "certificate": ("certificates", 1, "REPLACE INTO certificates VALUES (?, ?)"),
    "certificate_gone": ("certificates", 1, "DELETE FROM certificates WHERE fingerprint = ?"),
    "channel": ("channels", 1, "REPLACE INTO channels VALUES (?, ?)"),
    "channel_gone": ("channels", 1, "DELETE FROM channels WHERE key = ?"),
    "file": ("files", 1, "REPLACE INTO files VALUES (?, ?)"),
    "file_gone": ("files", 1, "DELETE FROM files WHERE id = ?"),
    "identity": ("identities", 1, "INSERT OR IGNORE INTO identities VALUES (?, ?)"),
    "identities_gone": ("identities of", 1, "DELETE FROM identities WHERE account = ?"),
    "marker": ("markers", 2, "REPLACE INTO markers VALUES (?, ?, ?, ?)"),
    "marker_gone": ("markers", 2, "DELETE FROM markers WHERE owner = ? AND target = ?"),
    "markers_gone": ("markers of", 1, "DELETE FROM markers WHERE owner = ?"),
    "start": ("starts", 1, "REPLACE INTO starts VALUES (?, ?, ?)"),
    "user": ("stays", 1, "REPLACE INTO stays VALUES (?, ?)"),
    "user_gone": ("stays", 1, "DELETE FROM stays WHERE stay = ?"),
}


TABLES: dict[str, tuple[type, ...]] = {  # those that are read at the start, and their types
    "accounts": (str, str, bytes, int, bytes, bytes, str, int),
    "bans": (str, str, str, int, str),
    "certificates": (str, str),
    "channels": (str, str),
    "files": (str, str),
    "identities": (str, str),
    "markers": (str, str, int, int),
    "starts": (int, int, str),
    "stays": (str, str),
}


def connect(path: pathlib.Path | None, mode: str) -> sqlite3.Connection:
    """Return a connection that never waits and begins no transaction by itself."""
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
            if version == len(MIGRATIONS) and application == APPLICATION_ID:
                query = "SELECT name FROM sqlite_master WHERE type = 'table'"
                wanted = {*TABLES, "dedup", "erased", "events", "targets"}
                missing = wanted - {row[0] for row in db.execute(query)}
                verdict = f"no table {min(missing)}" if missing and verdict == "ok" else verdict
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
    """Run the migrations that this database has not seen, all in one transaction."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if steps := MIGRATIONS[version:]:
        db.executescript(
            f"BEGIN; {';'.join(steps)}; PRAGMA user_version = {len(MIGRATIONS)};"
            f"PRAGMA application_id = {APPLICATION_ID}; COMMIT;"
        )
    old = db.execute("SELECT name FROM sqlite_master WHERE name GLOB 'search_[0-9]*'").fetchall()
    for (name,) in old if steps else ():  # the index of version 0.2 was in this file
        if re.fullmatch(r"search_\d+", name):
            with contextlib.suppress(sqlite3.OperationalError):  # this Python has no FTS5
                db.execute(f"DROP TABLE {name}")


def open_database(path: pathlib.Path | None) -> sqlite3.Connection:
    """Open or create a database, and bring its schema up to date. Raises Unusable."""
    if path and path.is_symlink():
        raise Unusable(f"{path} is a symbolic link; put the database itself there")
    try:
        if path and path.exists() and path.stat().st_size:
            inspect_database(path)
        db = connect(path, "rwc")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last seconds
        db.execute("PRAGMA secure_delete = ON")  # what is redacted is overwritten
        db.execute("PRAGMA wal_autocheckpoint = 0")  # helpers do it: it waits for the disk
        migrate(db)
    except (sqlite3.Error, OSError) as error:
        raise Unusable(f"cannot open the database {path}: {error}") from error
    return db


def event_of(*row: Any) -> Event:
    """Return an event made of a row of the store, its COLUMNS."""
    id, time_ms, kind, name, address, username, about, text, author, tags = row
    account = author[1:].rpartition("/")[0]
    source = source_of(name, address, username, account)._replace(identity=author)
    # Version 0.2 stored client tags with CR and LF in their values
    tags = tags.translate({13: "\\r", 10: "\\n", 0: None})
    return Event(id, time_ms, kind, source, None, text, about, None, tags)


def is_sound(row: tuple) -> bool:
    """Return whether a row has the types that event_of() takes: SQLite would store anything."""
    return list(map(type, row)) == [int, int, *[str] * 8]


class Mark(NamedTuple):
    """A point in history: an id, or else a time in milliseconds."""

    id: int | None = None
    time: int = 0


class Place(NamedTuple):
    """The scope of a read: a channel's key, or the keys of a private conversation. The owner of an
    account also reads what was said to guests who had the other user's name."""

    keys: tuple[str, ...]
    owner: str = ""
    other_key: str = ""


def place_of(hub: Hub, user: User, audience: Audience) -> Place:
    """Return the Place that a user may read of an audience: a channel or a conversation."""
    if not isinstance(audience, Conversation):
        return Place((audience.targets[0][0],))
    partner = audience.partner(user)
    keys = conversation_keys(hub, user.identity, partner.identity)
    return Place(tuple(keys), user.identity, partner.key)


class Span(NamedTuple):
    """A part of the history of a Place: some kinds, strictly between two marks."""

    place: Place
    kinds: tuple[str, ...] = SPOKEN
    after: Mark | None = None
    before: Mark | None = None

    @property
    def by_time(self) -> bool:
        """True if a mark is a time: then the nearest messages are those nearest in time."""
        return any(mark and mark.id is None for mark in (self.after, self.before))

    def where(self) -> tuple[str, list]:
        """Return the span as an SQL condition, and the condition's values."""
        texts, values = [f"kind IN ({', '.join('?' * len(self.kinds))})"], [*self.kinds]
        for sign, mark in ((">", self.after), ("<", self.before)):
            if mark is not None:
                column, value = ("time", mark.time) if mark.id is None else ("id", mark.id)
                texts.append(f"{column} {sign} ?")
                values.append(value)
        return " AND ".join(texts), values


# Scripts without spaces between words, and emoji: each character is a word of the index.
# Han, kana, Thai, Lao, Burmese, Khmer (Unicode, Blocks.txt)
ONE_BY_ONE = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001f000-\U0001faff\U00020000-\U0003ffff])"
)


def words_of(text: str) -> str:
    """Return a text for the index: a blank on each side of characters that are words."""
    return text if text.isascii() else ONE_BY_ONE.sub(r" \1 ", text)


class Readers:
    """Read-only connections, each for one job at a time; in memory, the store's only connection.
    Opening one takes longer than reading most pages does: so it is kept for the next job."""

    def __init__(self, path: pathlib.Path | None, only: sqlite3.Connection):
        self.path, self.only = path, only
        self.idle: list[sqlite3.Connection] = []  # pop() and append(), on any thread

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
        while self.idle:
            self.idle.pop().close()


class SearchIndex:
    """The words of all messages, in a database file of its own: SQLite's FTS5, without the text.
    One helper at a time runs a step, which reads chat.db and goes on after the last indexed id,
    also after a crash. Every hit is read again from chat.db.

    The index consists of parts, each for a number of messages. A redaction makes a part again
    without the redacted message; FTS5 alone would keep the words until it merges them. Not every
    Python has FTS5; without it nothing is found."""

    TOKENIZER = "unicode61 categories 'L* N* Co So'"

    def __init__(self, store: "Store"):
        self.store = store
        path = store.path.with_name("search.db") if store.path else None
        self.db = self._open(path)
        # For the loop: what the next step has to do
        self.behind: set[int] = set()  # targets with messages that are not indexed
        self.gone: list[tuple[int, int, int]] = []  # first id, last id, how many of those
        self.taken: list[tuple[int, int, int]] = []  # of these, by a job that has not ended
        self.known = 0  # the newest id that was stored
        # For the helper
        self.indexed = 0
        self.unfit = False  # a part has to be made again
        if self.db:
            self.reading = Readers(path, self.db)
            query = "SELECT ifnull(max(last), 0), ifnull(max(stale * 2 >= messages AND stale), 0)"
            self.indexed, self.unfit = self.db.execute(f"{query} FROM parts").fetchone()
            newest = "(SELECT max(id) FROM events WHERE target = targets.id)"
            query = f"SELECT id FROM targets WHERE {newest} > ?"
            self.behind = {row[0] for row in store.db.execute(query, [self.indexed])}
            self.known = store.last_id
            self.redacted(row[0] for row in store.db.execute("SELECT id FROM erased"))

    def _open(self, path: pathlib.Path | None) -> sqlite3.Connection | None:
        """Open the index. A damaged one is deleted and made again from chat.db."""
        for attempts_left in (1, 0):
            try:
                return self._open_once(path)
            except sqlite3.DatabaseError as error:
                if path is None or not attempts_left or "no such module" in str(error):
                    break
                for suffix in ("", "-wal", "-shm"):
                    path.with_name(path.name + suffix).unlink(missing_ok=True)
        return None

    def _open_once(self, path: pathlib.Path | None) -> sqlite3.Connection:
        db = connect(path, "rwc")
        db.executescript(f"""
            PRAGMA journal_mode = WAL; PRAGMA synchronous = OFF; PRAGMA secure_delete = ON;
            CREATE VIRTUAL TABLE temp.probe USING fts5(
                text, content='', tokenize="{self.TOKENIZER}");
            DROP TABLE temp.probe;
            CREATE TABLE IF NOT EXISTS parts (      -- search_1, search_2 ...
                part INTEGER PRIMARY KEY,
                first INTEGER NOT NULL,     -- ids of events, both included
                last INTEGER NOT NULL,
                messages INTEGER NOT NULL,
                stale INTEGER NOT NULL      -- so many of them are not there any more
            );""")
        db.execute("SELECT max(part) FROM parts").fetchone()
        return db

    @property
    def has_work(self) -> bool:
        return self.db is not None and bool(self.behind or self.gone or self.unfit)

    def stored(self, targets: Iterable[int], id: int) -> None:
        """Note that messages up to this id were committed, for these targets."""
        self.behind.update(targets)
        self.known = id

    def redacted(self, ids: Iterable[int]) -> None:
        """Note that these messages were redacted, so that their words are removed."""
        self.gone += [(id, id, PART_ROWS) for id in ids]

    def step(self, most: int | None = None) -> Callable[[], tuple]:
        """Return the next job, for a helper or (in memory) the loop; finish() takes its result."""
        behind, self.behind = self.behind, set()
        gone = self.taken = self.gone
        self.gone = []
        return functools.partial(self._step, behind, gone, self.known, most or INDEX_IDS)

    def finish(self, left: tuple[set[int], list]) -> None:
        """Take the result of a job: what it left for the next job."""
        behind, gone = left
        self.behind |= behind
        self.gone, self.taken = gone + self.gone, []
        if not (self.gone or self.unfit):
            with contextlib.suppress(sqlite3.Error):  # then they are looked for once more
                self.store.db.execute("DELETE FROM erased")

    def _step(self, behind: set[int], gone: list, known: int, most: int) -> tuple[set[int], list]:
        try:
            self.db.execute("BEGIN IMMEDIATE")
            update = "UPDATE parts SET stale = stale + ? WHERE first <= ? AND last >= ?"
            self.db.executemany(update, [(count, last, first) for first, last, count in gone])
            indexed = self._add(behind, known, most) if behind else self.indexed
            query = "SELECT part FROM parts WHERE stale * 2 >= messages AND stale"
            unfit = self.db.execute(query).fetchall()
            if unfit:
                self._rebuild(*unfit[0])
            self.db.execute("COMMIT")
            self.indexed, self.unfit = indexed, len(unfit) > 1
            if unfit:
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            return behind, gone
        return (behind if indexed < known else set()), []

    def _add(self, targets: set[int], known: int, most: int) -> int:
        """Index the messages of the next `most` ids; return the last of these ids."""
        query = "SELECT min(id) FROM events WHERE target = ? AND id > ?"
        with self.store.reading() as db:
            oldest = (db.execute(query, [t, self.indexed]).fetchone()[0] or known for t in targets)
            last = min(known, min(oldest) + most)
            rows = self._rows(db, targets, self.indexed + 1, last)
        query = "SELECT part, messages FROM parts ORDER BY part DESC LIMIT 1"
        part, messages = self.db.execute(query).fetchone() or (0, PART_ROWS + 1)
        if messages + len(rows) > PART_ROWS:
            part, messages = part + 1, 0
            values = [part, self.indexed + 1, last, 0, 0]
            self.db.execute("INSERT INTO parts VALUES (?, ?, ?, ?, ?)", values)
            self._create(part)
        self._insert(part, rows)
        update = "UPDATE parts SET last = ?, messages = ? WHERE part = ?"
        self.db.execute(update, [last, messages + len(rows), part])
        return last

    def _rows(
        self, db: sqlite3.Connection, targets: Iterable[int], first: int, last: int
    ) -> list[tuple]:
        kinds = ", ".join(f"'{kind}'" for kind in SPOKEN)
        query = f"""
            SELECT id, name, text FROM events
            WHERE target = ? AND id BETWEEN ? AND ? AND kind IN ({kinds})"""
        return [
            (id, f"t{target} n{fold(name).encode().hex()}", words_of(text))
            for target in targets
            for id, name, text in db.execute(query, [target, first, last])
        ]

    def _create(self, part: int) -> None:
        options = f"""content='', columnsize=0, tokenize="{self.TOKENIZER}\""""
        self.db.execute(f"CREATE VIRTUAL TABLE search_{part} USING fts5(place, text, {options})")

    def _insert(self, part: int, rows: list[tuple]) -> None:
        insert = f"INSERT INTO search_{part} (rowid, place, text) VALUES (?, ?, ?)"
        self.db.executemany(insert, sorted(rows))

    def _rebuild(self, part: int) -> None:
        """Make a part again from the messages that are left. An old part without any is deleted."""
        query = "SELECT first, last FROM parts WHERE part = ?"
        first, last = self.db.execute(query, [part]).fetchone()
        newest = self.db.execute("SELECT max(part) FROM parts").fetchone()[0]
        with self.store.reading() as db:
            targets = [row[0] for row in db.execute("SELECT id FROM targets")]
            rows = self._rows(db, targets, first, last)
        self.db.execute(f"DROP TABLE search_{part}")
        if not rows and part != newest:
            self.db.execute("DELETE FROM parts WHERE part = ?", [part])
            return
        self._create(part)
        self._insert(part, rows)
        update = "UPDATE parts SET messages = ?, stale = 0 WHERE part = ?"
        self.db.execute(update, [len(rows), part])

    def search(
        self, places: Iterable[Place], words: str, span: Span, count: int, author: str = ""
    ) -> list[tuple[Place, Event]]:
        """Return the newest messages with these words (of the author's nick), the oldest first."""
        texts = " ".join('"' + words_of(word).replace('"', '""') + '"' for word in words.split())
        name = f" AND place: n{author.encode().hex()}" if author else ""
        found: list[tuple[Place, Event]] = []
        if self.db is None:
            return found
        where, values = span.where()
        query = f"SELECT {COLUMNS} FROM events WHERE target = ? AND id = ? AND {where}"
        with self.store.reading() as db, self.reading() as index:
            for place in places:
                for target, _ in self.store.targets_of(db, place):
                    ids = self._ids(index, f"place: t{target}{name} AND text: ({texts})")
                    rows = (db.execute(query, [target, id, *values]).fetchone() for id in ids)
                    some = itertools.islice((row for row in rows if row and is_sound(row)), count)
                    found += [(place, event_of(*row)) for row in some]
        return sorted(found, key=lambda one: one[1].id)[-count:]

    def _ids(self, index: sqlite3.Connection, match: str) -> Iterator[int]:
        """Yield the ids of matching messages, the newest first."""
        for (part,) in index.execute("SELECT part FROM parts ORDER BY part DESC").fetchall():
            name = f"search_{part}"
            query = f"SELECT rowid FROM {name} WHERE {name} MATCH ? ORDER BY rowid DESC"
            for row in index.execute(query, [match]):
                yield row[0]

    def close(self) -> None:
        """Remove the words of redacted messages, also those of a job that was given up; then
        close."""
        if self.db is None:
            return
        if self.store.path:
            self.gone = self.taken + self.gone
            while self.gone or self.unfit:
                left = self.step()()
                self.finish(left)
                if left[1]:
                    break  # it cannot be done now; the next start does it
        self.reading.close()
        self.db.close()


class DedupKeys:
    """The event of each message id that a sender gave, so that no message is said twice. Keys
    outlive their messages: a client that was away for weeks may not know that a message arrived."""

    def __init__(self, store: "Store"):
        self.store = store
        # Delivered and not stored, until when they are known; in ticks
        self.not_stored: collections.OrderedDict[tuple[str, str], int] = collections.OrderedDict()
        self.swept = ("", "")  # how far
        self.now = 0

    def write(self, keys: dict[tuple[str, str], Event]) -> None:
        """Store keys, within the transaction that stores their events."""
        insert = """
            INSERT OR IGNORE INTO dedup
            SELECT ?, ?, ?, ifnull((SELECT id FROM targets WHERE key = ? AND founding = ?), 0), ?"""
        values = (
            (*key, event.id, *next(iter(event.audience.targets), ("", 0)), event.time)
            for key, event in keys.items()
        )
        self.store.db.executemany(insert, values)

    def lose(self, keys: Iterable[tuple[str, str]], ticks: int) -> None:
        """Remember the keys of messages that were delivered but could not be stored."""
        self.not_stored.update(dict.fromkeys(keys, ticks + NOT_STORED_MS))
        while len(self.not_stored) > TARGETS_CACHED:
            self.not_stored.popitem(last=False)

    def lost(self, owners: Iterable[str], own_id: str, ticks: int) -> bool:
        return any(self.not_stored.get((owner, own_id), 0) > ticks for owner in owners)

    def _look_up(
        self, db: sqlite3.Connection, owners: Iterable[str], own_id: str
    ) -> tuple[int, int] | None:
        names = list(owners)
        marks = ", ".join("?" * len(names))
        query = f"SELECT event, target FROM dedup WHERE own_id = ? AND owner IN ({marks})"
        return db.execute(query, [own_id, *names]).fetchone()

    def find(self, owners: Iterable[str], own_id: str) -> int | None:
        """Return the id of the event with this message id. A damaged database finds none: then the
        message is delivered, and its sender is told that it was not kept."""
        try:
            found = self._look_up(self.store.db, owners, own_id)
        except sqlite3.Error:
            return None
        return found and found[0]

    def event(self, owners: Iterable[str], own_id: str) -> tuple[int, Event | None] | None:
        """Return the event's id, and the event if it is still stored. Works on any thread."""
        with self.store.reading() as db:
            found = self._look_up(db, owners, own_id)
            if found is None:
                return None
            id, target = found
            query = f"SELECT {COLUMNS} FROM events WHERE target = ? AND id = ?"
            row = db.execute(query, [target, id]).fetchone()
        return id, event_of(*row) if row and is_sound(row) else None

    def sweep(self, now: int) -> bool:
        """Forget one slice of old keys; return whether there is more to look through."""
        db = self.store.db
        query = f"""
            SELECT owner, own_id, time < ? AND NOT EXISTS (SELECT 1 FROM events
                WHERE events.target = dedup.target AND events.id = dedup.event)
            FROM dedup WHERE (owner, own_id) > (?, ?) ORDER BY owner, own_id
            LIMIT {DEDUP_SWEPT}"""
        age = DEDUP_MS if self.store.path else DEDUP_IN_MEMORY_MS
        rows = db.execute(query, [now - age, *self.swept]).fetchall()
        old = [row[:2] for row in rows if row[2]]
        if old:
            db.executemany("DELETE FROM dedup WHERE owner = ? AND own_id = ?", old)
        self.swept = rows[-1][:2] if len(rows) == DEDUP_SWEPT else ("", "")
        return self.swept != ("", "")


class Backlog:
    """Records of turns that could not be stored, for a later attempt: the last one for each table
    and key. Events are not among them; their senders were told."""

    def __init__(self) -> None:
        self.records: dict[tuple, Record] = {}
        self.retry_at = 0.0

    def add(self, records: Iterable[Record], now: float) -> None:
        self.retry_at = now + BACKLOG_SECONDS
        for record in records:
            table, keys, _ = STATEMENTS.get(record.name, (record.name, len(record.values), ""))
            key = (table, *record.values[:keys])
            self.records.pop(key, None)
            self.records[key] = record._replace(place=0)
        while len(self.records) > BACKLOG_RECORDS:  # a read marker does the least harm
            markers = (key for key in self.records if key[0] == "markers")
            del self.records[next(markers, next(iter(self.records)))]


class Store:
    """Events on disk, or in memory for `path` None. Raises Unusable if that cannot be opened."""

    def __init__(self, path: pathlib.Path | None, keep: int | None = None):
        self.path = path
        wal = path and path.with_name(f"{path.name}-wal")
        # The write-ahead log still has what was redacted, also from before a crash
        self.erased = bool(wal) and wal.exists() and wal.stat().st_size > 0
        self.keep = keep or (KEEP_EVENTS if path else KEEP_EVENTS_IN_MEMORY)
        self.db = open_database(path)
        self.guarded: dict[pathlib.Path, int] = {}  # files, and which ones they have to be
        self.reading = Readers(path, self.db)
        self.version = 0  # of the data, as seen last
        self.targets: dict[tuple[str, int], int] = {}  # ids by key and founding, lately written to
        self.unsure: list[tuple[str, int]] = []  # made in a transaction not yet committed
        self.fresh: collections.Counter[int] = collections.Counter()  # rows by target, uncounted
        self.count_due = 0.0
        self.excess: set[str] = set()  # keys with more rows than they may have
        self.orphans: set[int] = set()  # targets that no user can read
        self.backlog = Backlog()
        self.busy_since: float | None = None
        self.trouble = ""  # why events are being lost just now
        try:
            self.changed_elsewhere()
            self.reserve_ids()
            self.words, self.dedup = SearchIndex(self), DedupKeys(self)
            for name in (path, path.with_name(f"{path.name}-wal")) if path else ():
                self.guard(name)
        except sqlite3.OperationalError as error:  # busy or full: that is no damage
            raise Unusable(f"cannot use the database {path}: {error}") from error
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise Unusable(f"the database {path} is damaged ({error}); move it away") from error

    def guard(self, path: pathlib.Path) -> None:
        """Watch a file: once it is moved or removed, nothing is stored any more."""
        with contextlib.suppress(OSError):
            self.guarded[path] = path.stat().st_ino

    # Ids: each start has blocks of its own, so that no id is ever used twice

    def reserve_ids(self) -> None:
        """Begin a block of ids for this start. Ids that earlier starts reserved and did not store
        are not valid in requests."""
        newest = "(SELECT max(id) FROM events WHERE target = targets.id)"
        query = f"SELECT ifnull(max({newest}), 0) FROM targets"
        last = self.db.execute(query).fetchone()[0]
        reserved = self.db.execute("SELECT ifnull(max(reserved), 0) FROM starts").fetchone()[0]
        self.last_id = self.reserved = max(last, reserved)
        self.first_id = self.last_id + 1
        # For the message ids of this start: letters that no hexadecimal number has
        self.letters = "".join(secrets.choice("ghijklmnopqrstuvwxyz") for _ in range(4))
        self.db.execute("UPDATE starts SET reserved = min(reserved, max(first - 1, ?))", [last])
        self.db.execute(*self._reservation())
        # A start of which no event is left needs no letters
        oldest = "SELECT min(id) FROM events WHERE target = targets.id"
        query = f"SELECT ifnull(min(({oldest})), 0) FROM targets"
        self.db.execute(f"DELETE FROM starts WHERE reserved < ({query})")
        self.starts = self.rows("starts")

    def _reservation(self) -> tuple[str, list]:
        self.reserved += ID_BLOCK
        return STATEMENTS["start"][2], [self.first_id, self.reserved, self.letters]

    def abandon(self, alive: Collection[str]) -> None:
        """Mark what no user can read any more: sealed history, and private conversations between
        guests whose stays have ended. `alive` are the identities that go on."""
        rows = self.db.execute("SELECT id, key FROM targets WHERE key > '~'").fetchall()
        talks = {id: key.split() for id, key in rows}
        self.orphans = {id for id, who in talks.items() if not who[1:] or not alive & set(who)}

    # The commit beat

    def commit(self, turn: Turn, now: float, ticks: int = 0) -> str:
        """Store a turn's events and records in one transaction; `now` is monotonic, in seconds.
        Return KEPT, BUSY (try again) or LOST."""
        if self.backlog.records and now < self.backlog.retry_at:
            return self._lose(turn, self.backlog.retry_at - BACKLOG_SECONDS, ticks)
        try:
            self._check_folder()
            self._write(turn, now)
        except (sqlite3.Error, OSError) as error:
            self._roll_back()
            code = getattr(error, "sqlite_errorcode", None) or 0
            if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self.busy_since = now if self.busy_since is None else self.busy_since
                if now - self.busy_since < BUSY_SECONDS:
                    return BUSY
            self.trouble = str(error)
            return self._lose(turn, now, ticks)
        self.busy_since = None
        self.trouble = ""
        return KEPT

    def _lose(self, turn: Turn, now: float, ticks: int) -> str:
        self.dedup.lose(turn.dedup, ticks)
        self.backlog.add(turn.records, now)
        return LOST

    def _check_folder(self) -> None:
        """Raise OSError if a watched file has been moved, removed or replaced."""
        for path, number in self.guarded.items():
            try:
                same = path.stat().st_ino == number
            except OSError:
                same = False
            if not same:
                raise OSError(f"{path} was moved or removed while the server runs")

    def _write(self, turn: Turn, now: float) -> None:
        backlog = list(self.backlog.records.values())
        low = turn.events and turn.events[-1].id > self.reserved - ID_BLOCK // 10
        alone = not (backlog or low) and turn.lone_target in self.targets
        if not alone:  # one statement commits itself, in two thirds of the time
            self.db.execute("BEGIN IMMEDIATE")
        if low:  # before an id is used that is not reserved
            self.db.execute(*self._reservation())
        redacted: list[int] = []
        rows: list[tuple] = []
        place = 0
        for record in (*backlog, *turn.records):
            if record.place > place:
                rows += self._insert(turn.events[place : record.place])
                place = record.place
            redacted += self._apply(record)
        rows += self._insert(turn.events[place:])
        if turn.dedup:
            self.dedup.write(turn.dedup)
        if not alone:
            self.db.execute("COMMIT")
        self.unsure.clear()
        self.backlog.records.clear()
        if rows:
            targets = collections.Counter([row[0] for row in rows])
            self.fresh.update(targets)
            self.words.stored(targets, rows[-1][1])
        if redacted:
            self.words.redacted(redacted)
            self.erased = True
        if now >= self.count_due:
            self.count_due = now + COUNT_SECONDS
            self.count()

    def _insert(self, events: Iterable[Event]) -> list[tuple]:
        rows = [
            (
                *(self.targets.get(target) or self._target(target, audience), id, when, kind),
                *(who.name, who.address, text, who.username, about, who.identity, tags),
            )
            for id, when, kind, who, audience, text, about, _, tags in events
            if kind not in EPHEMERAL
            for target in audience.targets
        ]
        self.db.executemany(INSERT_EVENT, rows)
        return rows

    def _apply(self, record: Record) -> list[int]:
        """Apply a record to the database; return the ids of the messages that it erased."""
        if record.name in STATEMENTS:
            self.db.execute(STATEMENTS[record.name][2], record.values)
            return []
        special = {"rename": self._rename, "seal": self._seal, "redact": self._redact}
        return special[record.name](*record.values)

    def _rename(self, old: str, new: str, founding: int) -> list[int]:
        """Move the history of a founding to the channel's new name."""
        update = "UPDATE OR REPLACE targets SET key = ? WHERE key = ? AND founding = ?"
        self.db.execute(update, [new, old, founding])
        if (target := self.targets.pop((old, founding), None)) is not None:
            self.targets[new, founding] = target
        return []

    def _seal(self, key: str, founding: int) -> list[int]:
        """Close the history of a founding: the next start deletes it."""
        update = "UPDATE targets SET key = '~' || id WHERE key = ? AND founding = ?"
        self.db.execute(update, [key, founding])
        self.targets.pop((key, founding), None)
        return []

    def _redact(self, key: str, now: int, id: int) -> list[int]:
        query = """
            SELECT target FROM events WHERE id = ?
            AND target IN (SELECT id FROM targets WHERE key = ?)"""
        row = self.db.execute(query, [id, key]).fetchone()
        if row is None:
            return []
        self.db.execute("DELETE FROM events WHERE target = ? AND id = ?", [*row, id])
        self.db.execute("INSERT OR IGNORE INTO erased VALUES (?)", [id])
        self.fresh[row[0]] -= 1
        self.db.execute("UPDATE dedup SET time = ? WHERE event = ?", [now, id])
        return [id]

    def _target(self, target: tuple[str, int], audience: Audience) -> int:
        """Return the row id of a target that is not cached; add the row if there is none."""
        query = "SELECT id FROM targets WHERE key = ? AND founding = ?"
        row = self.db.execute(query, target).fetchone()
        if row is None:
            columns = "key, founding, one, one_key, other, other_key"
            insert = f"INSERT INTO targets ({columns}) VALUES (?, ?, ?, ?, ?, ?)"
            row = (self.db.execute(insert, [*target, *audience.parties]).lastrowid,)
            self.unsure.append(target)
        self.targets[target] = row[0]
        return row[0]

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
        for target in self.unsure:  # never written after all
            self.targets.pop(target, None)
        self.unsure.clear()

    # What acts ask

    def author_of(self, key: str, id: int) -> tuple[int, str] | None:
        """Return the founding and author of a message under this key; None if it is not there."""
        query = f"""
            SELECT t.founding, e.author FROM targets t JOIN events e ON e.target = t.id
            WHERE t.key = ? AND e.id = ? AND e.kind IN ({", ".join("?" * 4)})"""
        try:
            return self.db.execute(query, [key, id, *SPOKEN, TAGS]).fetchone()
        except sqlite3.Error:
            return None

    def foundings(self, key: str) -> set[int]:
        """Return the foundings with history under this key; if the database fails, some
        founding."""
        query = """
            SELECT founding FROM targets WHERE key = ?
            AND EXISTS (SELECT 1 FROM events WHERE target = targets.id)"""
        try:
            return {row[0] for row in self.db.execute(query, [key])}
        except sqlite3.Error:
            return {0}

    # Reading at the start

    def changed_elsewhere(self) -> bool:
        """Return whether another process has written to the database since the last call."""
        version = self.db.execute("PRAGMA data_version").fetchone()[0]
        before, self.version = self.version, version
        return version != before

    def accounts(self) -> Iterator[Account]:
        for _, name, *verifier, email, number in self.rows("accounts"):
            yield Account(name, Verifier(*verifier), email, number)

    def rows(self, table: str) -> list[tuple]:
        """Return a table that is kept in memory. Raises ValueError if values have wrong types."""
        rows, types = self.db.execute(f"SELECT * FROM {table}").fetchall(), TABLES[table]
        for row in rows:
            if tuple(map(type, row)) != types:
                raise ValueError(f"a row of {table} has wrong values")
        return rows

    # Reading, on any thread

    def targets_of(self, db: sqlite3.Connection, place: Place) -> list[tuple[int, int]]:
        """Return the targets of a place and their foundings, the newest first."""
        marks = ", ".join("?" * len(place.keys))
        query = f"SELECT id, founding FROM targets WHERE key IN ({marks})"
        found = dict(db.execute(query, place.keys).fetchall())
        if place.owner:
            query = """
                SELECT id, 0 FROM targets WHERE one = ? AND other_key = ? AND other LIKE '~%'
                UNION SELECT id, 0 FROM targets
                WHERE other = ? AND one_key = ? AND one LIKE '~%'"""
            found |= dict(db.execute(query, [place.owner, place.other_key] * 2).fetchall())
        return sorted(found.items(), key=lambda one: (one[1], one[0]), reverse=True)

    def page(self, span: Span, count: int, newest: bool = True) -> list[Event]:
        """Return at most `count` events of a span, the newest or the oldest of them, in the order
        of their ids. There are fewer if they exceed PAGE_BYTES."""
        where, values = span.where()
        order = "time {0}, id {0}" if span.by_time else "id {0}"
        order = order.format("DESC" if newest else "ASC")
        query = (
            f"SELECT {COLUMNS} FROM events WHERE target = ? AND {where} ORDER BY {order} LIMIT ?"
        )
        rows: list[tuple] = []
        with self.reading() as db:
            targets = self.targets_of(db, span.place)
            # The foundings of one channel follow each other; conversations overlap
            in_turn = len(span.place.keys) == 1 and not span.by_time and not span.place.owner
            for target, _ in targets if newest else reversed(targets):
                rows += self._some(db.execute(query, [target, *values, count]))
                if in_turn and len(rows) >= count:
                    break
        nearest = (lambda row: (row[1], row[0])) if span.by_time else (lambda row: row[0])
        rows.sort(key=nearest, reverse=newest)
        return [event_of(*row) for row in sorted(self._some(rows[:count]), key=lambda row: row[0])]

    @staticmethod
    def _some(rows: Iterable[tuple]) -> list[tuple]:
        """Return the first rows that are valid events, as far as they fit in PAGE_BYTES."""
        some, size = [], 0
        for row in filter(is_sound, rows):
            size += len(row[7].encode()) + len(row[9].encode())
            if some and size > PAGE_BYTES:
                break
            some.append(row)
        return some

    def around(self, span: Span, centre: Mark, count: int) -> list[Event]:
        """Return the events before a mark, and about as many from the mark on."""
        older = self.page(span._replace(before=centre), count // 2)
        inclusive = Mark(centre.id - 1) if centre.id is not None else Mark(time=centre.time - 1)
        return older + self.page(span._replace(after=inclusive), count - len(older), newest=False)

    def between(self, span: Span, one: Mark, other: Mark, count: int) -> list[Event]:
        """Return the events between two marks, beginning at the first one, which may be the
        later."""
        if one.id and other.id:  # the id alone defines the order
            backwards = one.id > other.id
        else:
            backwards = self._moment(span, one) > self._moment(span, other)
        after, before = (other, one) if backwards else (one, other)
        return self.page(span._replace(after=after, before=before), count, backwards)

    def _moment(self, span: Span, mark: Mark) -> tuple[int, int]:
        """Return a mark's time and id, to compare marks of both kinds."""
        if mark.id is None:
            return mark.time, 0
        found = self.page(Span(span.place, REPLAYABLE, Mark(mark.id - 1)), 1, newest=False)
        return (found[0].time if found else LAST_MOMENT), mark.id

    def newest(self, keys: Iterable[str], identities: Iterable[str]) -> list[tuple[str, Event]]:
        """Return the last message of each key and of each private conversation of these identities.
        The text with each is its key, or "" for a conversation."""
        query = f"""
            SELECT {COLUMNS} FROM events WHERE target = ? AND kind IN (?, ?, ?)
            ORDER BY id DESC LIMIT 1"""
        found: dict[Any, tuple[str, Event]] = {}
        with self.reading() as db:
            wanted = [
                (key, key, id) for key in keys for id, _ in self.targets_of(db, Place((key,)))
            ]
            for identity in identities:
                which = "SELECT id, one, other FROM targets WHERE one = ? OR other = ?"
                for id, one, other in db.execute(which, [identity] * 2).fetchall():
                    wanted.append((other if one == identity else one, "", id))
            for name, key, target in wanted:
                row = db.execute(query, [target, *SPOKEN]).fetchone()
                if not row or not is_sound(row):
                    continue
                if name not in found or found[name][1].id < row[0]:
                    found[name] = key, event_of(*row)
        return list(found.values())

    # Housekeeping

    def count(self) -> None:
        """Add the rows stored lately to the counts, and note which channels have too many."""
        fresh, self.fresh = self.fresh, collections.Counter()
        update = "UPDATE targets SET events = events + ? WHERE id = ?"
        query = """
            SELECT key, sum(events) FROM targets
            WHERE key IN (SELECT key FROM targets WHERE id = ?) GROUP BY key"""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany(update, [(count, target) for target, count in fresh.items()])
            for target in fresh:
                found = self.db.execute(query, [target]).fetchall()
                self.excess.update(key for key, events in found if events > self.keep)
            self.db.execute("COMMIT")
        except sqlite3.Error:
            self._roll_back()  # busy or full: counted later
            self.fresh.update(fresh)
        if len(self.targets) > TARGETS_CACHED:
            self.targets.clear()
        if self.path is None:
            self._bound_memory()

    def _bound_memory(self) -> None:
        """In memory, give up the history of the channels that have been silent longest."""
        pragmas = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self.db.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas)
        used = (pages - free) * size
        if used > MEMORY_BYTES and not self.orphans:
            newest = "(SELECT max(id) FROM events WHERE target = targets.id)"
            query = f"SELECT id, events FROM targets WHERE {newest} ORDER BY {newest}"
            rows = self.db.execute(query).fetchall()
            excess = (1 - MEMORY_BYTES / used) * sum(events for _, events in rows)
            sizes = itertools.accumulate((events for _, events in rows), initial=0)
            too_old = zip(rows[:-1], sizes, strict=False)  # not the one that is talked in
            self.orphans.update(row[0] for row, before in too_old if before < excess)
        oldest = "SELECT owner, own_id FROM dedup ORDER BY event LIMIT ?"
        query = f"DELETE FROM dedup WHERE (owner, own_id) IN ({oldest})"
        known = self.db.execute("SELECT count(*) FROM dedup").fetchone()[0]
        if known > DEDUP_IN_MEMORY:
            self.db.execute(query, [known - DEDUP_IN_MEMORY])

    def prune(self, idle: bool, now: int) -> bool:
        """Delete one slice of what exceeds the limits; return whether there is more to delete."""
        try:
            if self.orphans and idle:
                self._delete_orphan(next(iter(self.orphans)), now)
            elif self.excess:
                self._delete_oldest(next(iter(self.excess)), idle, now)
        except sqlite3.Error:
            self._roll_back()  # busy or full: the next idle turn tries again
            return False
        return bool(self.orphans or self.excess)

    def _delete_orphan(self, target: int, now: int) -> None:
        """Delete rows of a target, and the target itself after its last row."""
        if not self._delete(target, PRUNE_ROWS, now):
            self.db.execute("DELETE FROM targets WHERE id = ?", [target])
            self.targets = {key: known for key, known in self.targets.items() if known != target}
            self.orphans.discard(target)

    def _delete_oldest(self, key: str, idle: bool, now: int) -> None:
        """Delete one slice of the rows that a key has beyond `keep`."""
        query = "SELECT id, events FROM targets WHERE key = ? ORDER BY founding"
        targets = self.db.execute(query, [key]).fetchall()
        excess = sum(events for _, events in targets) - self.keep
        if not idle and excess < self.keep * (PRUNE_OVERDUE - 1):
            return
        oldest, events = next(((t, n) for t, n in targets if n > 0), (0, 0))
        if excess <= 0 or not oldest:
            self.excess.discard(key)
            return
        if not self._delete(oldest, min(PRUNE_ROWS, excess), now) and events:  # the count was wrong
            self.db.execute("UPDATE targets SET events = 0 WHERE id = ?", [oldest])

    def _delete(self, target: int, count: int, now: int) -> int:
        oldest = "SELECT id FROM events WHERE target = ? ORDER BY id LIMIT ?"
        self.db.execute("BEGIN IMMEDIATE")
        ids = [row[0] for row in self.db.execute(oldest, [target, count])]
        last = ids[-1] if ids else 0
        values = [target, last]
        gone = "UPDATE dedup SET time = ? WHERE target = ? AND event <= ? AND time > 0"
        self.db.execute(f"{gone} AND event >= ?", [now, *values, ids[0] if ids else 0])
        self.db.execute("DELETE FROM events WHERE target = ? AND id <= ?", values)
        update = "UPDATE targets SET events = max(0, events - ?) WHERE id = ?"
        self.db.execute(update, [len(ids), target])
        self.db.execute("COMMIT")
        if ids:  # a part of the index that has lost half of what was in it is made again
            self.words.gone.append((0, last, len(ids)))
        return len(ids)

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database. On a helper: this waits for the disk."""
        erased, self.erased = self.erased, False
        with contextlib.closing(connect(self.path, "rw")) as db:
            _, frames, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            page_size = db.execute("PRAGMA page_size").fetchone()[0]
            if erased:  # the log still has the words
                busy = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                self.erased = self.erased or bool(busy)
            elif frames * page_size > WAL_RESTART_BYTES:
                db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def close(self) -> None:
        self.count()
        self.words.close()
        self.reading.close()
        self.db.close()


def load_hub(store: Store, now: float, ticks: float, name: str = SERVER_NAME) -> Hub:
    """Return the Hub as the last server left it. Raises Unusable."""
    try:
        hub = Hub(store.last_id, MessageIds(store.starts), name)
        hub.store = store
        hub.begin(now, ticks)
        hub.accounts.load(store.accounts())
        hub.accounts.certificates.update(store.rows("certificates"))
        for owner, target, *mark in store.rows("markers"):
            hub.markers.setdefault(owner, {})[target] = Marker(*mark)
        for guest, account in store.rows("identities"):
            hub.link(guest, account)
        hub.bans = {key: ServerBan(*ban) for key, *ban in store.rows("bans")}
        hub.files.load(store.rows("files"))
        revive(hub, store.rows("channels"), store.rows("stays"))
        for owner in [one for one in hub.markers if one[0] == "~" and one not in hub.users_by_id]:
            hub.forget_markers(owner)  # a guest who has not come back, or never could
    except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"the database {store.path} is damaged ({error!r}); move it away") from error
    store.abandon({*hub.users_by_id, *hub.accounts_of})
    return hub


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
RPL_STATSKLINE = "216 K {} * {} :{}"
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
RPL_INVITELIST = "336 {}"  # the invitations that a user has; 346 is a channel's +I
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
    "BANNED_FROM_SERVER": "465",
    "NAME_BOUND": "437",
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
    HINT: "TAGMSG {where}",
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
    USER_MODE: "MODE {about} {text}",
    AWAY: "AWAY{tail}",
    REALNAME: "SETNAME :{text}",
    WALLOPS: "WALLOPS :{text}",
}
IRC_EXTENDED_JOIN = "JOIN {where} {about}{tail}"
NOT_OWN = (INVITE, INVITED, AWAY, QUIT)  # the origin is told by other means
ECHOED = (*SPOKEN, TAGS, HINT)  # or by an echo, if the session has asked for that
CLASSIC_CAPABILITIES = (  # for clients that know only one line of CAP LS, the best first
    *("sasl", "multi-prefix", "away-notify", "account-notify", "extended-join", "server-time"),
    *("message-tags", "echo-message", "batch", "labeled-response", "userhost-in-names"),
    *("account-tag", "chghost", "invite-notify", "setname", "cap-notify"),
    *("extended-monitor", "standard-replies"),
)
METADATA_LIMITS = f"max-subs={METADATA_SUBS},max-keys={METADATA_KEYS}"
METADATA_VALUE = f"before-connect,{METADATA_LIMITS},max-value-bytes={METADATA_BYTES}"
DRAFT_CAPABILITIES = (
    *("chat.py/session", "draft/account-registration", "draft/channel-rename"),
    *("draft/chathistory", "draft/event-playback", "draft/extended-isupport"),
    *("draft/message-redaction", "draft/metadata-2", "draft/metadata-3", "draft/multiline"),
    *("draft/no-implicit-names", "draft/pre-away", "draft/read-marker", "draft/oper-tag"),
    *("draft/whoami", "no-implicit-names", "soju.im/search", "znc.in/self-message"),
)
CAPABILITIES = dict.fromkeys((*DRAFT_CAPABILITIES, *CLASSIC_CAPABILITIES), "") | {
    # what CAP offers (ircv3.net/specs), with its value
    "draft/metadata-2": METADATA_VALUE,
    "draft/metadata-3": METADATA_VALUE,
    "draft/multiline": f"max-bytes={LINE_BYTES},max-lines={MESSAGE_LINES}",
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
    HINT: "message-tags",
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
    """Return one line as bytes, cut between characters if it is too long (RFC 2812 section 2.3)."""
    if not text.isprintable():
        text = text.translate(NOT_IN_IRC)
    data = text.encode()
    if len(data) > IRC_BYTES - 2:
        data = cut(text, IRC_BYTES - 2).encode()
    return data + b"\r\n"


def as_param(text: str) -> str:
    """Return `text` as a parameter that others may follow."""
    return "*" if not text or " " in text or text[0] == ":" else cut(text, PARAM_BYTES)


@functools.lru_cache(100)  # seconds; one is asked for with every message of it
def second_text(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%S}"


def tag_time(milliseconds: int) -> str:
    """Return a time as 2026-11-22T08:30:05.123Z (IRCv3 server-time)."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{second_text(seconds)}.{rest:03}Z"


def add_tag(line: bytes, tag: str) -> bytes:
    """Add a tag to a line; to the first of several."""
    if line[:1] == b"@":
        return f"@{tag};".encode() + line[1:]
    return f"@{tag} ".encode() + line


IN_BATCH = re.compile(rb"@(?:[^ ]*;)?batch=")  # a line of one
ENDS_BATCH = re.compile(rb"(?:@[^ ]* )?:[^ ]* BATCH -")


def add_tag_to_all(lines: bytes, tag: str) -> bytes:
    """Tag all lines but those inside a batch: its two BATCH lines stand for them (IRCv3 batch)."""
    parts = lines.splitlines(keepends=True)
    return b"".join(part if IN_BATCH.match(part) else add_tag(part, tag) for part in parts)


def count_answers(lines: bytes) -> int:
    """Return the number of lines, with each batch counted as one."""
    return sum(not (IN_BATCH.match(part) or ENDS_BATCH.match(part)) for part in lines.splitlines())


MESSAGE_ID = re.compile(r"msgid=[^; ]*;|;msgid=[^; ]*|@msgid=[^; ]* ")  # among tags


def spoken_lines(event: Event, where: str, blank: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a message, which may have several or be too long for one; and whether each
    continues the one before it. Blank lines only with `blank`."""
    verb, before, behind = IRC_SPOKEN[event.kind]
    head = f":{event.source.mask} {verb} {where or event.about} :{before}"
    room = IRC_BYTES - 2 - len(f"{head}{behind}".encode())
    texts = event.text.replace("\r", "").split("\n")
    if not blank:
        texts = [text for text in texts if text.strip(SOFT_BREAK)] or [" "]  # some ignore ""
    for text in texts:
        pieces = itertools.chain(*(split_text(part, room) for part in text.split(SOFT_BREAK)))
        for n, piece in enumerate(pieces):
            if piece or blank:
                yield head + piece + behind, n > 0


class IrcFormat:
    """Messages as lines of IRC. The bytes depend on five capabilities only."""

    def __init__(self, ids: MessageIds, *capabilities: bool):
        self.ids = ids
        self.timed, self.tagged, self.accounts, self.multiline, self.operators = capabilities

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """Return one bytes object for each message; a long message is several lines in it."""
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
        """Yield the lines of one message; only the first line has the message's id."""
        lines = [line for line, _ in spoken_lines(event, where)]
        if self.multiline and len(lines) > 1:
            yield from self.multiline_batch(event, where, tags)
            return
        for line in lines:
            yield tags.encode() + irc_bytes(line)
            tags = re.sub(MESSAGE_ID, "", tags, count=1)

    def multiline_batch(self, event: Event, where: str, tags: str) -> Iterator[bytes]:
        """Yield a message of several lines as one batch (draft/multiline)."""
        source, name = f":{event.source.mask}", f"{event.id:x}"
        yield f"{tags}{source} BATCH +{name} draft/multiline {where or event.about}\r\n".encode()
        for line, goes_on in spoken_lines(event, where, blank=True):
            concat = ";draft/multiline-concat" if goes_on else ""
            yield f"@batch={name}{concat} ".encode() + irc_bytes(line)
        yield f"{source} BATCH -{name}\r\n".encode()

    def tags(self, event: Event) -> str:
        """Return the tags of an event with the space after them; "" if there are none."""
        tags = f";time={tag_time(event.time)}" if self.timed else ""
        if self.tagged:
            tags += f";msgid={self.ids.text(event.id)}"
            if event.source.bot:
                tags += ";bot"
            if event.tags:
                tags += f";{event.tags}"
        if self.accounts and event.source.account:
            tags += f";account={escaped_tag(event.source.account)}"
        if self.operators and event.source.operator:
            tags += ";draft/oper"
        return f"@{tags[1:]} " if tags else ""


class IrcWire:
    """Events as lines of IRC. Sessions whose capabilities give the same bytes share a wire."""

    def __init__(self, capabilities: frozenset[str], format: IrcFormat):
        self.format = format
        self.echo = "echo-message" in capabilities
        self.copies = self.echo or "znc.in/self-message" in capabilities
        self.extended_join = "extended-join" in capabilities
        self.without = {k for k, cap in NEEDS_CAPABILITY.items() if cap not in capabilities}

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """Return one bytes object for each event, for a page of history."""
        return [
            self.format.encode(audience, [event])[0]
            if event.kind in SPOKEN
            else self.line(audience, event)
            for event in events
        ]

    def line(self, audience: Any, event: Event) -> bytes:
        """Return the line of an event that is no message."""
        if event.kind in self.without:
            return b""
        text, where = event.text, audience.name or event.about
        extended = event.kind == JOIN and self.extended_join
        shape = IRC_EXTENDED_JOIN if extended else IRC_EVENTS[event.kind]
        known = {"where": where, "about": event.about or "*", "text": text}
        line = shape.format(**known, tail=f" :{text}" if text else "")
        return self.format.tags(event).encode() + irc_bytes(f":{event.source.mask} {line}")

    def own(self, event: Event, line: bytes) -> bytes:
        """Return the line for the event's origin: messages only as an echo, or to itself."""
        if event.kind in ECHOED:
            to_self = event.about == event.source.name
            return line * (self.echo + to_self)
        return b"" if event.kind in NOT_OWN else line


# The capabilities that change the bytes of a message, and of any event. Sessions that differ
# only in others share a wire.
FORMAT_CAPABILITIES = (
    *("server-time", "message-tags", "account-tag", "draft/multiline", "draft/oper-tag"),
)
WIRE_CAPABILITIES = frozenset((*FORMAT_CAPABILITIES, *NEEDS_CAPABILITY.values())) | {
    *("echo-message", "extended-join", "znc.in/self-message"),
}


class IrcWires:
    """The wires in use, by capabilities. A wire is dropped with the last of its sessions."""

    def __init__(self, ids: MessageIds):
        self.ids = ids
        self.formats: dict[tuple[bool, ...], IrcFormat] = {}  # at most 32
        self.wires: Any = weakref.WeakValueDictionary()  # each IrcWire by its capabilities

    def get(self, capabilities: frozenset[str]) -> IrcWire:
        key = capabilities & WIRE_CAPABILITIES
        if "batch" not in capabilities:
            key -= {"draft/multiline"}
        wire = self.wires.get(key)
        if wire is None:
            bits = tuple(capability in key for capability in FORMAT_CAPABILITIES)
            format = self.formats.setdefault(bits, IrcFormat(self.ids, *bits))
            wire = self.wires[key] = IrcWire(key, format)
        return wire


irc_command = Commands("")


class Labelled(NamedTuple):
    """A label, and the positions where its answer began in this turn."""

    label: str  # escaped
    replies: int  # so many of the session's before it
    events: int  # and so many of the turn's, the last of which ...
    last_id: int  # ... is this one


CONCAT = "draft/multiline-concat"
OWN_ID = "+chat.py/id"  # a client's id of its message: one id is one message


def client_id(session: "IrcSession", target: str) -> str:
    """Return the id that the client gave its message; "" if there are several targets for it."""
    own = session.message.tags.get(OWN_ID, "")
    usable = own and session.wire.format.tagged and is_word(own, OWN_ID_BYTES)
    return own if usable and "," not in target else ""


class Collected:
    """A message of several lines whose batch is open (draft/multiline)."""

    def __init__(self, reference: str, target: str, label: str, tags: str, own_id: str):
        self.reference, self.target, self.label, self.tags = reference, target, label, tags
        self.own_id = own_id
        self.verb = ""
        self.pieces: list[str] = []  # each with what stands before it: "\n" or SOFT_BREAK
        self.size = 0  # bytes, of what the sender counts
        self.lines = 0
        self.failed = False

    def add(self, message: Message) -> None:
        """Add a line. Raises Refused."""
        verb, (target, *texts), tags = message
        text, goes_on = "".join(texts[:1]), CONCAT in tags
        if tags["batch"] != self.reference or fold(target) != fold(self.target):
            raise Refused("MULTILINE_INVALID", "this line belongs to another message")
        if verb not in ("PRIVMSG", "NOTICE") or self.verb not in ("", verb):
            raise Refused("MULTILINE_INVALID", "a message is all PRIVMSG, or all NOTICE")
        if goes_on and not text:
            raise Refused("MULTILINE_INVALID", "a concatenated line must not be empty")
        between = "" if not self.pieces else SOFT_BREAK if goes_on else "\n"
        self.verb = verb
        self.pieces.append(between + text)
        self.lines += not goes_on
        self.size += len(text.encode()) + (between == "\n")
        if self.size > LINE_BYTES:
            text = "the message is too long and was not delivered"
            raise Refused("MULTILINE_MAX_BYTES", text, str(LINE_BYTES))
        if self.lines > MESSAGE_LINES:
            text = "the message has too many lines and was not delivered"
            raise Refused("MULTILINE_MAX_LINES", text, str(MESSAGE_LINES))

    @property
    def text(self) -> str:
        """The text, split as the sender split it. If the pieces are much smaller than they have to
        be, they are joined: each piece costs every receiver a line."""
        text, needed = "".join(self.pieces), self.size // PIECE_BYTES + self.lines
        if len(self.pieces) > min(MESSAGE_LINES, MULTILINE_SLACK * needed):
            text = text.replace(SOFT_BREAK, "")
        return text


def fail_collected(session: "IrcSession") -> None:
    """Drop a message with a bad line. The refusal, sent once, gets the batch's label."""
    collected = session.collected
    if not collected.failed and "labeled-response" in session.capabilities:
        session.begin_answer(collected.label)
    collected.failed = True  # said once; the rest of it is not looked at
    collected.pieces.clear()


def collect(session: "IrcSession", message: Message) -> None:
    """Take a line of the client's open batch. A bad line ends the whole message. Raises Refused."""
    session.message = message._replace(verb="BATCH")  # what a refusal is about
    collected = session.collected
    if collected is None:
        raise Refused("MULTILINE_INVALID", "there is no such batch")
    try:
        if not collected.failed:
            collected.add(message if message.params else message._replace(params=[""]))
    except Refused:
        fail_collected(session)
        raise


def tell_topic_irc(session: "IrcSession", channel: Channel) -> None:
    session.reply(RPL_TOPIC, channel.name, channel.topic)
    session.reply(RPL_TOPICWHOTIME, channel.name, channel.topic_setter, channel.topic_time // 1000)


def tell_names_irc(session: "IrcSession", channel: Channel) -> None:
    capabilities, me = session.capabilities, session.user
    multi, masks = "multi-prefix" in capabilities, "userhost-in-names" in capabilities
    kind = "@" if "s" in channel.flags else "="
    if me in channel.members:
        head = session.shaped_line(RPL_NAMREPLY, kind, channel.name, "")[:-2]
        roster = channel.roster(multi, masks)
        session.site.hub.charge(len(roster))
        lines = b"".join([head + names.encode() + b"\r\n" for names in roster])
        return session.send(session.timed(lines))
    session.site.hub.charge(len(channel.members))
    session.reply_list(RPL_NAMREPLY, channel.names(me, multi, masks), kind, channel.name)


def owner_name(owner: "User | Channel | IrcSession") -> str:
    """Return the name of a user or channel; * for a session before registration."""
    return owner.name if isinstance(owner, (User, Channel)) else "*"


def subscribed_metadata(session: "IrcSession", owners: Iterable) -> Iterator[tuple[str, str, str]]:
    """Yield owner's name, key and value of all metadata that this session subscribed to."""
    for owner in owners:
        for key, value in list(owner.metadata.items()):
            if key in session.subscribed:
                yield owner_name(owner), key, value


def tell_metadata_of_channel(session: "IrcSession", channel: Channel) -> None:
    """Tell the values; if they are many, that the client may ask (draft/metadata, postponed
    sync)."""
    others = (channel, *(user for user in channel.members if user is not session.user))
    session.site.hub.charge(len(others))
    some = list(itertools.islice(subscribed_metadata(session, others), METADATA_AT_ONCE + 1))
    if len(some) > METADATA_AT_ONCE:
        return session.reply(ERR_METADATASYNCLATER, channel.name)
    for one in some:
        session.tell_value(*one)


def tell_about_channel(session: "IrcSession", channel: Channel) -> None:
    if channel.topic:
        tell_topic_irc(session, channel)
    if "draft/read-marker" in session.capabilities:
        session.tell_marker(channel.name)
    if session.subscribed:
        tell_metadata_of_channel(session, channel)


def tell_implicit_names(session: "IrcSession", channel: Channel) -> None:
    if session.capabilities.isdisjoint(("draft/no-implicit-names", "no-implicit-names")):
        tell_names_irc(session, channel)
        session.reply(RPL_ENDOFNAMES, channel.name)


def tell_names_later(session: "IrcSession", channel: Channel) -> Iterator[None]:
    if session.user in channel.members:
        tell_implicit_names(session, channel)
        yield


def tell_channel(session: "IrcSession", channel: Channel) -> None:
    """Tell a client the facts about a channel that it joined."""
    tell_about_channel(session, channel)
    tell_implicit_names(session, channel)


class IrcSession(LocalSession):
    """A session that speaks IRC."""

    __slots__ = (
        *("account", "acks", "asked", "away", "batch", "capabilities", "collected", "exchange"),
        *("from_service", "labelled", "message", "metadata", "negotiating", "own_tags"),
        *("passed", "proof", "raw", "realname", "subscribed", "username", "wanted"),
        *("watched", "wire", "withheld"),
    )
    probed = True

    def __init__(self, site: Site, conn: Any):
        super().__init__(site, conn)
        self.wanted = self.asked = ""  # the nick, until there is a user; also one refused
        self.username = self.realname = ""
        self.passed = site.password is None  # the server's password was right
        self.negotiating = False  # capabilities; registration waits for CAP END
        self.watched: dict[str, str] = {}  # nicks by key, see MONITOR
        self.raw = b""  # the line that is being acted on ...
        self.message = Message("", [], {})  # ... and its parts
        self.labelled: Labelled | None = None  # where its answer began, if it has a label
        self.batch = ""  # that this answer is in, if it is more than a line
        self.subscribed: dict[str, None] = {}  # keys of metadata
        self.account = self.proof = self.away = ""  # logged in to, and away, before registration
        self.from_service = False  # the answer that is waited for is NickServ's
        self.metadata: dict[str, str] = {}  # set before registration
        self.exchange: Exchange | None = None  # of SASL, going on
        self.collected: Collected | None = None  # a message of several lines, as it comes
        self.withheld: dict[int, bytes] = {}  # lines in place of the echo of an event
        self.acks: dict[int, tuple[int, bytes]] = {}  # the reply that acknowledges an event
        # Of what this session did in this turn, by id: add_tag or add_tag_to_all, and the tag
        self.own_tags: dict[int, tuple[Callable, str]] = {}
        self.capabilities: frozenset[str] = frozenset()  # enabled by CAP REQ
        self.wire = site.wires.get(self.capabilities)

    @property
    def nick(self) -> str:
        return self.user.name if self.user else self.wanted or "*"

    @property
    def extended_monitor(self) -> bool:
        return "extended-monitor" in self.capabilities

    # Sending

    def line(self, text: str) -> None:
        """Send a line of the server, given without its source."""
        self.say(f":{self.site.name} {text}")

    def say(self, text: str) -> None:
        """Send a line, given with its source."""
        self.send(self.timed(irc_bytes(text)))

    def timed(self, lines: bytes) -> bytes:
        """Add the time to the server's own lines, for clients with server-time."""
        if not self.wire.format.timed:
            return lines
        return add_tag_to_all(lines, f"time={tag_time(self.site.hub.now)}")

    def shaped(self, shape: str, *values: Any) -> str:
        """Return a numeric made of a shape and values, without its source."""
        number, rest = shape.split(" ", 1)
        return f"{number} {self.nick} {rest.format(*values)}"

    def reply(self, shape: str, *values: Any) -> None:
        self.line(self.shaped(shape, *values))

    def shaped_line(self, shape: str, *values: Any) -> bytes:
        """Return the whole line of a numeric as bytes, without sending it."""
        return irc_bytes(f":{self.site.name} {self.shaped(shape, *values)}")

    def reply_list(
        self, shape: str, words: Iterable[str], *values: Any, between: str = " "
    ) -> None:
        """Send all the words after the values, in as many replies as that takes."""
        head = f":{self.site.name} {shape} {self.nick} {' '.join(map(str, values))}"
        for line in wrapped(words, IRC_BYTES - 2 - len(head.encode()), between):
            self.reply(shape, *values, line)

    def notice(self, text: str) -> None:
        self.line(f"NOTICE {self.nick} :{text}")

    def fail_line(self, verb: str, code: str, text: str, *about: str) -> str:
        """Return a standard reply (IRCv3) without its source, for cases without a numeric."""
        params = "".join(f"{as_param(one)} " for one in about)
        return f"FAIL {verb} {code} {params}:{text}"

    def fail(self, verb: str, code: str, text: str, *about: str) -> None:
        self.line(self.fail_line(verb, code, text, *about))

    def not_kept(self, events: list[Event], reason: str) -> None:
        """Send FAIL NOT_KEPT in place of an echo, which would mean "stored", with its label."""
        for event in events:
            own_id = parse_tags(event.tags).get(OWN_ID, "")
            ids = [self.site.hub.ids.text(event.id), *([own_id] if own_id else [])]
            line = self.fail_line("PRIVMSG", "NOT_KEPT", f"delivered but not kept: {reason}", *ids)
            data = self.timed(irc_bytes(f":{self.site.name} {line}"))
            if ack := self.acks.get(event.id):  # the label is on that
                place = next(n for n, reply in enumerate(self.replies) if reply is ack)
                label = ack[1].partition(b" ")[0][1:].decode()
                self.replies[place] = ack[0], add_tag(data, label)
                data = b""
            self.withheld[event.id] = data

    def tell_not_kept(self, own_id: str, reason: str) -> None:
        """Answer the repeat of a message that was delivered and is not stored."""
        self.fail("PRIVMSG", "NOT_KEPT", f"delivered but not kept: {reason}", "*", own_id)

    def farewell(self, text: str) -> None:
        self.send(irc_bytes(f"ERROR :{text}"))

    def probe(self) -> None:
        self.send(irc_bytes(f"PING :{self.site.name}"))

    def service_says(self, text: str) -> None:
        self.say(f":{SERVICE}!{SERVICE}@{self.site.name} NOTICE {self.nick} :{text}")

    def answer(self, text: str) -> None:
        (self.service_says if self.from_service else self.notice)(text)

    def refuse(self, refusal: Refused) -> None:
        number, text = REFUSALS.get(refusal.code), harmless(str(refusal))
        if self.from_service and not self.deferred:
            return self.service_says(text)
        if number is None:
            return self.fail(self.message.verb or "*", refusal.code, text, *refusal.about)
        about = "".join(f"{as_param(one)} " for one in refusal.about)
        self.line(f"{number} {self.nick} {about}:{text}")

    # Events that each session renders for itself

    def hear(self, event: Event) -> None:
        name, source, capabilities = event.audience.name, event.source, self.capabilities
        if event.kind == KILLED:
            self.say(f":{source.mask} KILL {event.about} :{event.text}")
            self.end(killed_text(source, event.text))
        elif event.kind == REPLACED:
            self.fail("SESSION", "REPLACED", "another connection of yours has this place now")
            self.end("Another connection of yours took this place")
        elif event.kind == ENTERED:
            tell_channel(self, self.site.hub.channels[fold(name)])
        elif event.kind == RENAMED and "draft/channel-rename" not in capabilities:
            self.tell_renamed(event.about, name, event.text)
        elif event.kind == READ_ON and "draft/read-marker" in capabilities:
            self.tell_marker(name)
        elif event.kind == METADATA:
            self.tell_value(name, event.about, event.text)
        elif event.kind == ONLINE:
            self.reply(RPL_MONONLINE, source.mask)
        elif event.kind == OFFLINE:
            self.reply(RPL_MONOFFLINE, source.name)

    def tell_renamed(self, old: str, name: str, reason: str) -> None:
        """Tell a client without draft/channel-rename a PART and a JOIN. Names follow when the
        session has its turn: a renaming of a crowded channel must not stop the others."""
        mask, channel = self.user.source.mask, self.site.hub.channels[fold(name)]
        self.say(f":{mask} PART {old} :renamed to {name}{f': {reason}' if reason else ''}")
        self.say(f":{mask} JOIN {name}")
        tell_about_channel(self, channel)
        self.postponed.append(tell_names_later(self, channel))
        self.conn.resume_soon()

    def tell_value(self, name: str, key: str, value: str) -> None:
        if value:
            self.reply(RPL_KEYVALUE, name, key, value)
        else:
            self.reply(RPL_KEYNOTSET, name, key)

    def tell_marker(self, name: str) -> None:
        mark = self.site.hub.markers.of(self.user, fold(name))
        self.line(f"MARKREAD {name} {f'timestamp={tag_time(mark.time)}' if mark else '*'}")

    # Receiving

    def receive(self, line: bytes) -> None:
        self.from_service = False
        self.raw = line
        try:
            self.message = message = self.parse(line)
            if "batch" in message.tags:
                collect(self, message)
            elif message.verb:
                if message.tags and "labeled-response" in self.capabilities:
                    self.begin_answer(message.tags.get("label", ""))
                self.unfinished = irc_command.run(self, message.verb, message.params)
        except Refused as refusal:
            if self.collected and refusal.code in ("LINE_TOO_LONG", "INVALID_UTF8"):
                fail_collected(self)
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
            if "labeled-response" in self.capabilities and "batch" not in broken.tags:
                self.begin_answer(broken.tags.get("label", ""))
            text = "that line is not UTF-8 text and was not delivered"
            raise Refused("INVALID_UTF8", text) from None

    # What was asked with a label is answered with it (IRCv3 labeled-response)

    def begin_answer(self, label: str) -> None:
        if label:
            turn = self.site.hub.turn
            label = cut(label, LABEL_BYTES)
            events, last_id = len(turn.events), self.site.hub.last_id
            self.labelled = Labelled(escaped_tag(label), len(self.replies), events, last_id)

    def resume_answer(self) -> None:
        """Start counting the answer's replies again: in a new turn, or after other lines."""
        if self.labelled:
            self.begin_answer(unescaped_tag(self.labelled.label))

    def take_result(self, then: Callable, result: Any) -> None:
        super().take_result(then, result)
        self.from_service = self.from_service and self.deferred

    def mark_answer(self, whole: bool) -> None:
        """Label the replies since the answer was begun or resumed. Replies of several lines, or
        with more to come, go into a labelled batch."""
        if self.labelled is None:
            return
        turn, (label, replies, events, _) = self.site.hub.turn, self.labelled
        heard = {e.id: count for e in turn.events[events:] if (count := self.hears(e))}
        count = sum(heard.values()) + sum(count_answers(data) for _, data in self.replies[replies:])
        if self.batch or count > 1 or (count and not whole):
            self.put_in_batch(heard)
        elif whole:
            if not count:
                self.send(irc_bytes(f":{self.site.name} ACK"))
            self.tag_answer(heard, add_tag, f"label={label}", replies + 1)
            if not count:
                own = (e.id for e in turn.events[events:] if e.origin is self)
                self.acks.update(dict.fromkeys(own, self.replies[replies]))
        if whole and self.batch:
            self.send(self.batch_line(f"-{self.batch}"))
        if whole:
            self.labelled, self.batch = None, ""

    def put_in_batch(self, heard: Iterable[int]) -> None:
        """Put the replies so far into the answer's batch; open the batch if need be."""
        begun = self.batch
        self.batch = begun or self.site.reference()
        self.tag_answer(heard, add_tag_to_all, f"batch={self.batch}")
        if not begun:
            label, replies, _, last_id = self.labelled
            line = self.batch_line(f"+{self.batch} labeled-response")
            self.replies.insert(replies, (last_id, add_tag(line, f"label={label}")))

    def tag_answer(
        self, heard: Iterable[int], mark: Callable, tag: str, last: int | None = None
    ) -> None:
        """Tag the answer's replies, and, once they are encoded, the events with these ids."""
        which = slice(self.labelled.replies, last)
        self.replies[which] = [(n, mark(data, tag)) for n, data in self.replies[which]]
        self.own_tags.update(dict.fromkeys(heard, (mark, tag)))

    def batch_line(self, text: str) -> bytes:
        return irc_bytes(f":{self.site.name} BATCH {text}")

    def hears(self, event: Event) -> int:
        """Return the number of lines or batches that this session gets of an event of its own."""
        if event.origin is not self or event.kind in PERSONAL:
            return 0
        (line,) = self.wire.encode(event.audience, [event])
        return count_answers(line) if self.wire.own(event, line) else 0

    def own(self, event: Event, line: bytes) -> bytes:
        if event.origin is not self:  # a private message from another session of the user
            return line if self.wire.copies else b""
        if event.id in self.withheld:
            line = data = self.withheld[event.id]
        else:
            data = self.wire.own(event, line)
        marked = self.own_tags.get(event.id)
        if not data or not marked:
            return data
        mark, tag = marked
        return mark(line, tag) + data[len(line) :]  # a message to oneself comes twice

    def turn_over(self) -> None:
        super().turn_over()
        self.own_tags.clear()
        self.withheld.clear()
        self.acks.clear()


def isupport(site: Site) -> list[str]:
    """Return the tokens of 005 (modern.ircdocs.horse, RPL_ISUPPORT parameters)."""
    flags, symbols = "".join(sorted(FLAGS)), "".join(SYMBOLS.values())
    targets = f"JOIN:,KICK:,LIST:{LIST_TARGETS},MONITOR:{WATCHED},NAMES:,PART:,WHOIS:1"
    spoken = ",".join(f"{verb}:{TARGETS}" for verb in ("PRIVMSG", "NOTICE", "TAGMSG"))
    lists = ",".join(f"{letter}:{MASKS_A_LIST}" for letter in MASK_LISTS)
    flood = f"chat.py/FLOOD={site.flood[0]:g},{site.flood[1]:g}" if site.flood else ""
    return f"""
        AWAYLEN={REASON_BYTES} BOT=B CHATHISTORY={HISTORY_LINES_MOST} MSGREFTYPES=msgid,timestamp
        CASEMAPPING=ascii CHANLIMIT=#:{CHANNELS_A_USER} CHANMODES={MASK_LISTS},k,l,{flags}
        CHANNELLEN={CHANNEL_BYTES} CHANTYPES=# ELIST=CMNTU EXCEPTS=e EXTBAN=,am ACCOUNTEXTBAN=a
        HOSTLEN={HOST_BYTES} INVEX=I KEYLEN={CHANNEL_PASSWORD_BYTES} KICKLEN={REASON_BYTES}
        MAXLIST={lists} MODES={MODES_WITH_VALUE} MONITOR={WATCHED} NAMELEN={REALNAME_BYTES}
        NETWORK={site.network} NICKLEN={NAME_CHARACTERS} PREFIX=({RANKS}){symbols} SAFELIST
        SAFERATE STATUSMSG={symbols} TARGMAX={targets},{spoken} TOPICLEN={TOPIC_BYTES}
        USERLEN={USERNAME_BYTES} UTF8ONLY WHOX {flood}""".split()


def file_tokens(session: IrcSession) -> list[str]:
    """Return the tokens of 005 with the address for uploads (draft/FILEHOST, and soju's name for
    it), and the one that says that upload tokens can be asked for (draft/authtoken)."""
    if session.site.folder is None:
        return []
    url = f"{base_url(session.site, session.conn.secure, session.conn.local)}/files"
    return [f"soju.im/FILEHOST={url}", f"draft/FILEHOST={url}", "draft/AUTHTOKEN"]


def isupport_lines(session: IrcSession) -> Iterator[bytes]:
    tokens = [*isupport(session.site), *file_tokens(session)]
    for start in range(0, len(tokens), TOKENS_A_LINE):
        yield session.shaped_line(RPL_ISUPPORT, " ".join(tokens[start : start + TOKENS_A_LINE]))


def batch_in_pieces(
    session: IrcSession, kind: str, lines: Iterable[bytes], tags: str = ""
) -> Iterator[None]:
    """Send lines, in a batch for clients that know batches. After each line, the rest can wait."""
    batched, reference = "batch" in session.capabilities, session.site.reference()
    if batched:
        opening = session.batch_line(f"+{reference} {kind}")
        session.send(add_tag(opening, tags) if tags else opening)
    for line in lines:
        session.send(add_tag_to_all(line, f"batch={reference}") if batched else line)
        yield
    if batched:
        session.send(session.batch_line(f"-{reference}"))


def in_batch(session: IrcSession, kind: str, lines: Iterable[bytes], tags: str = "") -> None:
    """Send lines at once, as a batch if the client knows batches."""
    for _ in batch_in_pieces(session, kind, lines, tags):
        pass


def tell_isupport(session: IrcSession) -> None:
    if "draft/extended-isupport" in session.capabilities:
        return in_batch(session, "draft/isupport", isupport_lines(session))
    for line in isupport_lines(session):
        session.send(session.timed(line))


def tell_lusers(session: IrcSession) -> None:
    hub, server = session.site.hub, session.site.server
    count, operators = len(hub.users), len({one.user for one in hub.operators})
    session.reply(RPL_LUSERCLIENT, count - hub.invisible, hub.invisible)
    session.reply(RPL_LUSEROP, operators)
    session.reply(RPL_LUSERUNKNOWN, server.nameless())
    session.reply(RPL_LUSERCHANNELS, len(hub.channels))
    session.reply(RPL_LUSERME, count)
    session.reply(RPL_LOCALUSERS, count, hub.most_users)
    session.reply(RPL_GLOBALUSERS, count, hub.most_users)


def tell_motd(session: IrcSession) -> None:
    lines = session.site.server.motd
    if not lines:
        return session.refuse(Refused("NO_MOTD", "there is no message of the day"))
    session.reply(RPL_MOTDSTART, session.site.name)
    room = IRC_BYTES - 2 - len(f":{session.site.name} {RPL_MOTD} {session.nick}".encode())
    for line in lines:
        for piece in split_text(line, room):
            session.reply(RPL_MOTD, piece)
    session.reply(RPL_ENDOFMOTD)


def user_modes_text(session: IrcSession) -> str:
    return "".join(sorted(session.user.modes | ({"o"} if session.operator else set())))


def welcome(session: IrcSession) -> None:
    """Tell a client the server's facts after registration, in the order that clients rely on."""
    site = session.site
    session.reply(RPL_WELCOME, site.network, session.user.source.mask)
    session.reply(RPL_YOURHOST, site.name, VERSION)
    session.reply(RPL_CREATED, time_text(site.hub.started))
    with_value = "".join(sorted(MASK_LISTS + RANKS + "kl"))
    modes = "".join(sorted(with_value + "".join(FLAGS)))
    user_modes = "".join(sorted(USER_MODES))
    session.reply(RPL_MYINFO, site.name, f"chat.py-{VERSION}", user_modes, modes, with_value)
    tell_isupport(session)
    if "draft/whoami" in session.capabilities:
        session.say(f":{session.user.source.mask} SETNAME :{session.user.realname}")
    if not session.client:  # with a SESSION it may be on a bad line: bytes count
        tell_lusers(session)
    tell_motd(session)
    session.reply(RPL_UMODEIS, user_modes_text(session))


def abort_sasl(session: IrcSession) -> None:
    session.exchange = None
    session.reply(ERR_SASLABORTED)


METADATA_KEY = re.compile(rf"[a-z0-9_./-]{{1,{METADATA_KEY_BYTES}}}")


NO_KEY = "a key is made of a-z, 0-9, _, ., / and -"


def tell_metadata(session: IrcSession, owner: Any, keys: Iterable[str]) -> None:
    """Tell the values of keys in a batch, and which keys are not set or not valid."""
    name = owner_name(owner)

    def line(key: str) -> bytes:
        if key in owner.metadata:
            return session.shaped_line(RPL_KEYVALUE, name, key, owner.metadata[key])
        if METADATA_KEY.fullmatch(key):
            return session.shaped_line(RPL_KEYNOTSET, name, as_param(key))
        fail = session.fail_line("METADATA", "INVALID_KEY", NO_KEY, key)
        return irc_bytes(f":{session.site.name} {fail}")

    in_batch(session, f"metadata {name}", map(line, keys))


def greet_user(session: IrcSession, wanted: str, channels: Iterable[Channel]) -> None:
    """Tell all that a client is told after registration; its user is in those channels already."""
    welcome(session)
    if not session.capabilities.isdisjoint(("draft/metadata-2", "draft/metadata-3")):
        tell_metadata(session, session.user, session.user.metadata)
    if session.site.hub.accounts.is_foreign(wanted, session.user.account):
        session.notice(f"{wanted} belongs to an account; /msg {SERVICE} IDENTIFY {wanted} PASSWORD")
    for channel in channels:
        session.say(f":{session.user.source.mask} JOIN {channel.name}")
        tell_channel(session, channel)


def complete_registration(session: IrcSession) -> None:
    """Register the user, once the client has sent NICK and USER and ended the negotiation."""
    if session.user or session.negotiating or not (session.wanted and session.username):
        return
    if not session.passed:
        session.refuse(Refused("WRONG_PASSWORD", "the server's password is missing or wrong"))
        return session.end("wrong password")
    if session.exchange:  # CAP END in the middle of it gives it up
        abort_sasl(session)
    wanted, session.wanted = session.wanted, ""  # another user may have taken it meanwhile
    _, account = user_of_token(session.site.hub, session.token, session.account)
    if account:
        session.fail("SESSION", "ACCOUNT_REQUIRED", f"log in to {account} to have your place again")
        session.token = ""  # or it would be that of two users

    def entered(result: tuple[bool, bool]) -> None:
        attached, resumed = result
        if resumed:
            session.line("NOTE SESSION RESUMED :you have your place again")
        session.conn.named()
        greet_user(session, wanted, session.user.channels if attached else ())

    def kept_out(refusal: Refused) -> None:
        session.refuse(refusal)
        if refusal.code == "BANNED_FROM_SERVER":
            session.end(str(refusal), intended=False)

    session.act(
        *("enter", wanted, session.username, session.realname, session.conn.address),
        *(session.account, session.proof, session.token, True, secrets.randbits(32)),
        *(tuple(session.metadata.items()), session.away),
        then=entered,
        otherwise=kept_out,
    )


def check_server(session: IrcSession, name: str) -> None:
    """Raise Refused if a query names another server than this one, the only one."""
    site, key = session.site, fold(name)
    if not name or key == fold(site.name) or key in site.hub.users:
        return
    session.site.hub.charge(len(name))
    if not mask_pattern(name).fullmatch(fold(site.name)):
        raise Refused("NO_SUCH_SERVER", "there is no such server; this one stands alone", name)


def each_in_pieces(session: IrcSession, names: str, act: Callable[[str], None]) -> Iterator[None]:
    """Call act() once for every name of a list; a refusal for one name does not stop the others."""
    for name in {fold(name): name for name in names.split(",") if name}.values() or [""]:
        try:
            act(name)
        except Refused as refusal:
            session.refuse(refusal)
        yield


# Registration


@irc_command("PASS", 1, 1, nameless=True, exact=True)
def irc_pass(session: IrcSession, password: str) -> None:
    """PASS <password> -- the server's password, before the name"""
    if session.user:
        raise Refused("ALREADY_NAMED", "you are in already")
    session.passed = check_server_password(session, password)


@irc_command("NICK", most=1, nameless=True)
def irc_nick(session: IrcSession, wanted: str = "") -> None:
    """NICK <nickname> -- take a name, or another one"""
    if not wanted:
        raise Refused("NO_NAME", "which name?")
    if session.user:
        return session.act("rename_user", wanted, True, 0)
    hub, fits = session.site.hub, clean_name(wanted) == wanted
    if fits:
        session.asked = wanted
    if not (session.negotiating and fits):  # else it may be the user's own; proof is to come
        check_name(hub, wanted, None, session.account)
    session.wanted = wanted
    complete_registration(session)


def plain_realname(text: str) -> str:
    """Return a realname that fits in a line of IRC."""
    return plain_text(text).replace("\n", " ").replace("\t", " ")


@irc_command("USER", 4, nameless=True)
def irc_user(session: IrcSession, username: str, mode: str, unused: str, realname: str) -> None:
    """USER <username> 0 * <realname> -- say who you are, when you come in"""
    if session.user or session.username:
        raise Refused("ALREADY_NAMED", "that was said already, and cannot be changed")
    if not realname:
        raise Refused("NEED_MORE_PARAMS", "a real name, please", "USER")
    plain = "".join(c for c in username if is_solid(c) and c not in "!@*?~:,")
    # ~ as elsewhere: it is not verified (there is no ident)
    session.username = "~" + (cut(plain, USERNAME_BYTES - 1) or "user")
    realname = plain_realname(realname)
    session.realname = cut(realname, REALNAME_BYTES) if is_visible(realname) else plain
    complete_registration(session)


def set_capabilities(session: IrcSession, capabilities: Iterable[str]) -> None:
    """Enable capabilities. The session may get another wire by that."""
    session.capabilities = frozenset(capabilities)
    session.wire = session.site.wires.get(session.capabilities)
    for channel in session.user.channels if session.user else ():
        channel.by_wire = None


def mechanisms(session: IrcSession) -> list[str]:
    """Return the SASL mechanisms that this session may use."""
    return [name for name in MECHANISMS if name != "EXTERNAL" or session.conn.fingerprint]


def capability_values(session: IrcSession) -> dict[str, str]:
    site, secure = session.site, session.conn.secure
    rules = [*sorted(site.registration)]
    rules += [f"min-password-length={PASSWORD_LEAST}", f"max-password-length={PASSWORD_MOST}"]
    values = {"draft/account-registration": ",".join(rules), "sasl": ",".join(mechanisms(session))}
    if site.sts:  # a policy, not to be asked for (IRCv3 sts)
        values = {
            "sts": f"duration={site.sts}" if secure else f"port={site.server.tls_port}"
        } | values
    return CAPABILITIES | values


def tell_capabilities(
    session: IrcSession, head: str, words: list[str], last: int = 0, more: str = ""
) -> None:
    """Send words in lines, the `last` words together; all lines but the last one contain `more`."""
    room = IRC_BYTES - 2 - len(f":{session.site.name} {head} * :".encode())
    split = len(words) - last
    lines = [*wrapped(words[:split], room), *wrapped(words[split:], room)] or [""]
    for n, line in enumerate(lines):
        session.line(f"{head}{more if n < len(lines) - 1 else ''} :{line}")


def cap_ls(session: IrcSession, version: str) -> None:
    """Answer CAP LS: values in several lines for version 302, else one line of classic names."""
    session.negotiating = session.user is None
    head = f"CAP {session.nick} LS"
    if (whole_number(version) or 0) < 302:
        room = IRC_BYTES - 2 - len(f":{session.site.name} {head} :".encode())
        return session.line(f"{head} :{next(wrapped(CLASSIC_CAPABILITIES, room))}")
    set_capabilities(session, {"cap-notify"} | session.capabilities)
    known = capability_values(session)
    drafts = [cap for cap in known if cap not in CLASSIC_CAPABILITIES]
    names = [*drafts, *CLASSIC_CAPABILITIES]
    offers = [f"{cap}={known[cap]}" if known[cap] else cap for cap in names]
    tell_capabilities(session, head, offers, len(CLASSIC_CAPABILITIES), " *")


def cap_req(session: IrcSession, text: str) -> None:
    """Answer CAP REQ: all or none. A long ACK is several lines, without the star: ACK has none."""
    session.negotiating = session.user is None
    wanted = text.split()
    fits = all(cap.removeprefix("-") in CAPABILITIES for cap in wanted)
    head = f"CAP {session.nick} {'ACK' if fits else 'NAK'}"
    if fits:
        capabilities = set(session.capabilities)
        for cap in wanted:
            (capabilities.discard if cap[0] == "-" else capabilities.add)(cap.lstrip("-"))
        set_capabilities(session, capabilities)
    if len(f":{session.site.name} {head} :{text}".encode()) <= IRC_BYTES - 2:
        return session.line(f"{head} :{text}")
    tell_capabilities(session, head, wanted)


@irc_command("CAP", 1, 2, nameless=True)
def irc_cap(session: IrcSession, subcommand: str, text: str = "") -> None:
    """CAP LS|LIST|REQ|END [<capabilities>] -- agree on extensions of the protocol"""
    match subcommand.upper():
        case "LS":
            cap_ls(session, text)
        case "LIST":
            more, head = "cap-notify" in session.capabilities, f"CAP {session.nick} LIST"
            tell_capabilities(session, head, sorted(session.capabilities), 0, " *" if more else "")
        case "REQ":
            cap_req(session, text)
        case "END":
            session.negotiating = False
            complete_registration(session)
        case _:
            about = f"{session.nick} {as_param(subcommand)}"
            session.line(f"410 {about} :CAP has LS, LIST, REQ and END")


def fail_sasl(session: IrcSession, refusal: Refused) -> None:
    session.exchange = None
    session.reply(ERR_SASLFAIL, str(refusal))


def tell_logged_in(
    session: IrcSession, account: str, proof: str, then: Callable = do_nothing
) -> None:
    """Tell the client that it is logged in, log its user in if there is one, and call then()."""
    user, session.account, session.proof = session.user, account, proof
    source = user.source if user else source_of(session.nick, "*:0", session.username or "*")
    session.reply(RPL_LOGGEDIN, source.mask, account, account)
    if user:
        session.act("log_in", account, proof, False, then=then)
    else:
        then()


def end_sasl(session: IrcSession, account: str) -> None:
    exchange, session.exchange = session.exchange, None
    try:
        proof = revision_of(session, account, exchange.verifier)
    except Refused as refusal:
        return fail_sasl(session, refusal)
    tell_logged_in(session, account, proof, lambda *_: session.reply(RPL_SASLSUCCESS))


def go_on_sasl(session: IrcSession, step: Callable, *values: Any) -> None:
    """Run the next step of a SASL mechanism: bytes for the client, or a job for off the loop."""
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
        then = functools.partial(go_on_sasl, session, exchange.mechanism.send)
        session.later(PASSWORD_LANE, said, then)


def begin_sasl(session: IrcSession, name: str) -> None:
    if session.user and len(session.user.live) > 1:
        return session.reply(ERR_SASLALREADY, "your other devices are logged in, too")
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


@irc_command("REGISTER", 3, 3, nameless=True, exact=True)
@in_steps
def irc_register(session: IrcSession, account: str, email: str, password: str) -> Steps:
    """REGISTER <account or *> <email or *> <password> -- make your name an account"""
    nick = session.user.name if session.user else session.asked
    name, proof = yield from register_nick(session, nick, account, email, password)
    if not proof:
        text = f"a code was sent to {email}: VERIFY with it"
        return session.line(f"REGISTER VERIFICATION_REQUIRED {name} :{text}")
    text = f"{name} is yours; log in with your password{email_used(session, email)}"
    session.line(f"REGISTER SUCCESS {name} :{text}")
    tell_logged_in(session, name, proof)


@irc_command("VERIFY", 2, 2, nameless=True, exact=True)
@in_steps
def irc_verify(session: IrcSession, name: str, code: str) -> Steps:
    """VERIFY <account or *> <code> -- the code that was sent to the address of a new account"""
    nick = session.user.name if session.user else session.asked
    account, proof = yield from verify(session, nick if name == "*" else name, code)
    session.line(f"VERIFY SUCCESS {account} :{account} is yours")
    tell_logged_in(session, account, proof)


@irc_command("SESSION", 1, nameless=True)
def irc_session(session: IrcSession, secret: str) -> None:
    """SESSION <secret> -- before NICK: 32 hexadecimal digits that no other client knows. A
    client that comes back with them within a while resumes its user"""
    if session.user:
        raise Refused("ALREADY_NAMED", "you are here already")
    if not re.fullmatch(rf"[0-9a-f]{{{SECRET_DIGITS}}}", secret):
        raise Refused("BAD_SECRET", f"a secret has {SECRET_DIGITS} hexadecimal digits")
    session.token = session.client = hashlib.sha256(secret.encode()).hexdigest()


@irc_command("PING", 1, nameless=True)
def irc_ping(session: IrcSession, token: str) -> None:
    """PING <token> -- is anybody there?"""
    session.line(f"PONG {session.site.name} :{token}")


for pong_or_error in (
    "PONG <token> -- yes; any line says that",
    "ERROR <text> -- what servers say to each other; nothing happens",
):
    irc_command(pong_or_error.split()[0], doc=pong_or_error, nameless=True)(lambda session: None)


@irc_command("QUIT", most=1, nameless=True)
def irc_quit(session: IrcSession, reason: str = "") -> None:
    """QUIT [<reason>] -- leave"""
    session.end("Quit" + (f": {cut(reason, REASON_BYTES)}" if reason else ""))


# NickServ, for clients without commands for accounts

service_command = Commands(f"/msg {SERVICE} ")


@service_command("help", most=1)
def service_help(session: IrcSession, verb: str = "") -> None:
    """HELP -- what can be said to NickServ"""
    for command in service_command.values():
        session.service_says(f"{command.syntax}: {command.summary}")


@service_command("register", 1, 2, exact=True)
@in_steps
def service_register(session: IrcSession, password: str, email: str = "") -> Steps:
    """REGISTER PASSWORD [EMAIL] -- make your name an account"""
    name, proof = yield from register_nick(session, session.nick, "*", email, password)
    if not proof:
        return session.service_says(f"a code was sent to {email}: VERIFY CODE")
    session.service_says(f"{name} is yours{email_used(session, email)}")
    tell_logged_in(session, name, proof)


@service_command("verify", 1, exact=True)
def service_verify(session: IrcSession, code: str) -> None:
    """VERIFY CODE -- the code that was sent to your address"""
    irc_verify(session, session.nick, code)


@service_command("identify", 1, 2, exact=True)
@in_steps
def service_identify(session: IrcSession, *words: str) -> Steps:
    """IDENTIFY [NAME] PASSWORD -- log in"""
    name, password = words if len(words) == 2 else (session.nick, *words)
    return identify(session, name, password, False)


service_command("passwd", 2, exact=True, doc="PASSWD OLD NEW -- another password")(
    change_own_password
)
service_command("drop", 1, exact=True, doc="DROP PASSWORD -- give up your account")(
    drop_own_account
)


@service_command("cert", 1, 2)
@in_steps
def service_cert(session: IrcSession, how: str, fingerprint: str = "") -> Steps:
    """CERT ADD|LIST|REMOVE [FINGERPRINT] -- certificates that log in: add the one you show"""
    mark = session.conn.fingerprint
    if how.upper() == "ADD":
        account = yield do(session.act, "add_certificate", mark)
        session.service_says(f"{mark} logs in to {account} now (SASL EXTERNAL)")
    elif how.upper() == "LIST":
        account = own_account(session.user)
        known = session.site.hub.accounts.certificates_of(account)
        for one in (*known, f"{counted(len(known), 'certificate')} of {account}"):
            session.service_says(one)
    elif how.upper() == "REMOVE":
        mark = fingerprint.lower() or mark
        account = yield do(session.act, "remove_certificate", mark)
        session.service_says(f"{mark} does not log in to {account} any more")
    else:
        raise Refused("INVALID_PARAMS", "CERT has ADD, LIST and REMOVE")


@service_command("disown", 1)
@in_steps
def disown_channel(session: LocalSession, name: str) -> Steps:
    """DISOWN #CHANNEL -- let a channel that you founded end with its last member"""
    name = yield do(session.act, "disown", name)
    session.answer(f"{name} is no longer registered")


def ask_service(session: IrcSession, text: str) -> None:
    """Run a command for NickServ. The text reaches no user, no history and no log."""
    verb, _, rest = text.partition(" ")
    session.from_service = True
    try:
        service_command.run(session, verb.lower(), rest)
    except Refused as refusal:
        session.service_says(str(refusal))
    session.from_service = session.deferred


@irc_command("NS", 1, 15)
def irc_ns(session: IrcSession, *words: str) -> None:
    """NS <command> -- the same as PRIVMSG NickServ"""
    text = session.raw.decode(errors="replace")  # as it was typed: blanks in a password count
    body = text.partition(" ")[2].lstrip(" ") if text[:1] == "@" else text
    body = body.partition(" ")[2].lstrip(" ") if body[:1] == ":" else body
    ask_service(session, body.partition(" ")[2].lstrip(" ").removeprefix(":"))


# Talking


def client_tags(session: IrcSession) -> str:
    """Return the client-only tags of the message that is answered (IRCv3 message-tags)."""
    if not session.message.tags or not session.wire.format.tagged:
        return ""
    tags = ((k, v) for k, v in session.message.tags.items() if re.fullmatch(r"\+[\w./-]+", k))
    return ";".join(f"{key}={escaped_tag(value)}" if value else key for key, value in tags)


@in_steps
def tell_repeat(session: IrcSession, name: str, own: str) -> Steps:
    """Answer a message that was sent before, when the connection broke before the client knew. The
    client gets the first echo again; if the message is gone, its id."""
    hub = session.site.hub
    owners = hub.dedup_owners(session)
    known = [event for owner in owners if (event := hub.turn.dedup.get((owner, own)))]
    if hub.store.dedup.lost(owners, own, hub.ticks):
        return session.tell_not_kept(own, "it was said before, and could not be kept")
    if known and session.site.store.path is None:  # in memory a read comes too soon
        found = known[0].id, known[0]
    else:
        found = yield do(session.read, functools.partial(hub.store.dedup.event, owners, own))
    if found is None:  # the turn in which it was said could not be stored
        return session.tell_not_kept(own, "it could not be stored")
    id, event = found
    if event is None:
        tags = f"@msgid={hub.ids.text(id)};{OWN_ID}={escaped_tag(own)}"
        return session.send(irc_bytes(f"{tags} :{session.user.source.mask} TAGMSG {name}"))
    past = Audience(name if name.startswith("#") else "")
    for line in session.wire.encode(past, [event]) if session.wire.echo else ():
        session.send(line)


def send_message(session: IrcSession, name: str, text: str, kind: str, tags: str, own: str) -> None:
    """Send a message, and tell if it is a repeat, or if the receiver is away. Raises Refused."""
    hub = session.site.hub
    if own and hub.store.dedup.lost(hub.dedup_owners(session), own, hub.ticks):
        return tell_repeat(session, name, own)

    def sent(result: Sent) -> None:
        if result.repeat is not None:
            tell_repeat(session, name, own)
        elif result.away:
            session.reply(RPL_AWAY, result.away.name, result.away.away)

    return session.act("say", name, text, kind, tags, own, then=sent)


def check_length(session: IrcSession, name: str, text: str, tags: str) -> None:
    """Raise Refused if a line with its source is too long and must not be split. A channel gets
    such a line in pieces, as some clients cannot know their source. Lines with tags are not split;
    nor are those to a user, who gets one line or none, as the conformance suite expects."""
    if len(text) <= FITS_ALWAYS // 4 or "#" in name[:2] and not tags:
        return
    room = IRC_BYTES - 2 - len(f":{session.user.source.mask} PRIVMSG {name} :".encode())
    if len(text.encode()) > room:
        raise Refused("LINE_TOO_LONG", f"a message to {name} has at most {room} bytes")


def to_each_target(session: IrcSession, targets: str, send: Callable[[str], None]) -> LongAnswer:
    """Call send() for one target at once, or for each of several in pieces. Raises Refused."""
    if not targets:
        raise Refused("NO_RECIPIENT", "to whom?")
    if "," not in targets:
        return send(targets)
    if targets.count(",") >= TARGETS:
        text = f"{TARGETS} targets at most; the message was not delivered"
        raise Refused("TOO_MANY_TARGETS", text, targets)
    return each_in_pieces(session, targets, send)


@irc_command("PRIVMSG", most=2)
def irc_privmsg(session: IrcSession, targets: str = "", text: str = "") -> LongAnswer:
    """PRIVMSG <target>{,<target>} <text> -- say something to people and channels"""
    if not text and targets:
        raise Refused("NO_TEXT", "there is nothing to say")
    own, tags = client_id(session, targets), client_tags(session)

    def send(name: str) -> None:
        check_length(session, name, text, tags)
        if text.startswith("\x01ACTION "):
            action = text[8:].removesuffix("\x01")
            send_message(session, name, action, ACTION, tags, own)
        elif fold(name) == SERVICE_KEY:
            ask_service(session, text)
        else:
            send_message(session, name, text, MESSAGE, tags, own)

    return to_each_target(session, targets, send)


@irc_command("NOTICE", most=2)
def irc_notice(session: IrcSession, targets: str = "", text: str = "") -> LongAnswer:
    """NOTICE <target>{,<target>} <text> -- the same, but nothing answers it"""
    if not (targets and text) or targets.count(",") >= TARGETS:
        return None
    own, tags = client_id(session, targets), client_tags(session)

    def send(name: str) -> None:  # a refusal is no answer to a notice (RFC 2812 section 3.3.2)
        def sent(result: Sent) -> None:
            if result.repeat is not None:
                tell_repeat(session, name, own)

        session.act("say", name, text, NOTICE, tags, own, then=sent, otherwise=do_nothing)

    return to_each_target(session, targets, send)


@irc_command("TAGMSG", most=1)
def irc_tagmsg(session: IrcSession, targets: str = "") -> LongAnswer:
    """TAGMSG <target>{,<target>} -- send nothing but the tags before it"""
    tags = client_tags(session)
    kind = HINT if tags.partition("=")[0] == "+typing" and ";" not in tags else TAGS

    def send(name: str) -> None:
        if tags:
            session.act("say", name, "", kind, tags, "")

    return to_each_target(session, targets, send)


@irc_command("BATCH", 1, 3)
def irc_batch(session: IrcSession, reference: str, kind: str = "", target: str = "") -> None:
    """BATCH +<reference> draft/multiline <target> | -<reference> -- say several lines as one"""
    sign, reference = reference[:1], reference[1:]
    if sign == "+":
        if not re.fullmatch("[A-Za-z0-9-]+", reference):
            raise Refused("INVALID_REFTAG", "a reference is made of letters and digits", reference)
        if kind != "draft/multiline" or not target:
            raise Refused("UNKNOWN_TYPE", "only messages of several lines come so", reference, kind)
        label = session.message.tags.get("label", "")
        if session.collected:
            raise Refused("MULTILINE_INVALID", "there is one already; end that first", reference)
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
    kind = MESSAGE if done.verb == "PRIVMSG" else NOTICE
    send_message(session, done.target, done.text, kind, done.tags, done.own_id)


@irc_command("AWAY", most=1, nameless=True)
def irc_away(session: IrcSession, reason: str = "") -> None:
    """AWAY [<reason>] -- say that you are not here, or without a reason that you are back"""

    def told(_: None) -> None:
        session.reply(RPL_NOWAWAY if reason else RPL_UNAWAY)

    if session.user:
        return session.act("set_away", reason, then=told)
    session.away = cut(reason, REASON_BYTES)
    return told(None)


@irc_command("SETNAME", 1)
def irc_setname(session: IrcSession, realname: str) -> None:
    """SETNAME <realname> -- change your real name"""
    realname = plain_realname(realname)
    if not is_visible(realname) or len(realname.encode()) > REALNAME_BYTES:
        text = f"a real name has 1 to {REALNAME_BYTES} bytes that can be seen"
        return session.fail("SETNAME", "INVALID_REALNAME", text)
    session.act("set_realname", realname)


# Channels


@irc_command("JOIN", 1, 2)
def irc_join(session: IrcSession, names: str, keys: str = "") -> Iterator[None]:
    """JOIN <channel>{,<channel>} [<key>{,<key>}] -- enter channels; JOIN 0 leaves all"""
    if names == "0":
        for channel in list(session.user.channels):
            session.act("part", channel.name, "")
            yield
        return
    passwords = dict(zip(names.split(","), keys.split(","), strict=False))

    def entered(channel: Channel | None) -> None:
        if channel:
            tell_channel(session, channel)

    def enter(name: str) -> None:
        session.act("join", name, passwords.get(name, ""), then=entered)

    yield from each_in_pieces(session, names, enter)


@irc_command("PART", 1, 2)
def irc_part(session: IrcSession, names: str, reason: str = "") -> Iterator[None]:
    """PART <channel>{,<channel>} [<reason>] -- leave channels"""
    return each_in_pieces(session, names, lambda name: session.act("part", name, reason))


@irc_command("TOPIC", 1, 2)
def irc_topic(session: IrcSession, name: str, topic: str | None = None) -> None:
    """TOPIC <channel> [<topic>] -- read or set what a channel is about"""
    if topic is not None:
        return session.act("set_topic", name, cut(topic, TOPIC_BYTES))
    channel = session.site.hub.find_channel(name)
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
            tell_names_irc(session, channel)
            yield
    session.reply(RPL_ENDOFNAMES, as_param(names))


LIST_BOUND = re.compile(r"([CT]?)([<>])(\d{1,9})")


def within(channel: Channel, what: str, sign: str, number: str, now: int) -> bool:
    """Return whether a channel is in a bound: users, or minutes since created (C) or topic (T)."""
    if not what:
        value = float(len(channel.members))
    elif what == "T" and not channel.topic:
        return False
    else:
        value = (now - (channel.created if what == "C" else channel.topic_time)) / 60_000
    return value < int(number) if sign == "<" else value > int(number)


def list_filter(conditions: str, now: int) -> Callable[[Channel], bool]:
    """Return a filter for LIST (ELIST): all conditions have to hold, and any one of the masks."""
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


def in_slices(items: Iterable[Any]) -> Iterator[Any]:
    """Yield all items, and None now and then: there a search through many items pauses."""
    for n, item in enumerate(items):
        if n % LOOKED_AT_ONCE == LOOKED_AT_ONCE - 1:
            yield None
        yield item


@irc_command("LIST", most=2)
def irc_list(session: IrcSession, conditions: str = "", server: str = "") -> Iterator[None]:
    """LIST [<channel or condition>{,...}] -- the channels: >9, <9, C<5, T>5, *mask*, !*mask*"""
    check_server(session, server)
    hub, user = session.site.hub, session.user
    if conditions.count(",") >= LIST_TARGETS:
        raise Refused("TOO_MANY_TARGETS", f"{LIST_TARGETS} conditions at most", conditions)
    wanted = list_filter(conditions, hub.now)
    session.reply(RPL_LISTSTART)
    for channel in in_slices(list(hub.channels.values())):
        if channel is None:
            yield
            continue
        hub.charge(1 + conditions.count(","))
        if channel.members and wanted(channel) and channel.visible_to(user):
            session.reply(RPL_LIST, channel.name, len(channel.members), channel.topic)
            yield
    session.reply(RPL_LISTEND)


@irc_command("INVITE", most=2)
@in_steps
def irc_invite(session: IrcSession, name: str = "", where: str = "") -> Steps:
    """INVITE [<nickname> <channel>] -- invite a user; alone, who invited you"""
    if not name:
        for channel in session.user.invitations:
            session.reply(RPL_INVITELIST, channel.name)
        return session.reply(RPL_ENDOFINVITELIST)
    if not where:
        text = "it goes like this: INVITE <nickname> <channel>"
        raise Refused("NEED_MORE_PARAMS", text, "INVITE")
    user, channel = yield do(session.act, "invite", name, where)
    session.reply(RPL_INVITING, user.name, channel.name)
    if user.away:
        session.reply(RPL_AWAY, user.name, user.away)


@irc_command("KICK", 2, 3)
def irc_kick(session: IrcSession, names: str, victims: str, reason: str = "") -> Iterator[None]:
    """KICK <channel> <nickname>{,<nickname>} [<reason>] -- put people out"""
    channels, people = names.split(","), victims.split(",")
    if len(channels) == 1:
        channels *= len(people)
    if len(channels) != len(people):
        raise Refused("NEED_MORE_PARAMS", "one channel, or as many as people", "KICK")
    for where, name in zip(channels, people, strict=True):
        session.act("kick", where, name, reason)
        yield


def parse_modes(letters: str, values: Iterable[str]) -> list[ModeChange]:
    """Parse "+o-l", ["bob"] into changes. A mode without its value gets an empty one."""
    on, changes, left = True, [], iter(list(values)[:MODES_WITH_VALUE])
    for letter in letters[:MODES_AT_ONCE]:
        if letter in "+-":
            on = letter == "+"
            continue
        takes_value = letter in RANKS + MASK_LISTS + "k" or (letter == "l" and on)
        changes.append(ModeChange(on, letter, next(left, "") if takes_value else ""))
    return changes


def user_mode(session: IrcSession, name: str, letters: str) -> None:
    """Read or change the user's own modes; those of others are not shown."""
    if session.site.hub.find_user(name) is not session.user:
        raise Refused("NOT_YOURSELF", "only your own modes are yours to see and change")
    if not letters:
        return session.reply(RPL_UMODEIS, user_modes_text(session))
    changes = parse_modes(letters[:USER_MODES_AT_ONCE], ())
    known = tuple(tuple(change) for change in changes if change.letter in USER_MODES)

    def changed(_: None) -> None:
        if len(known) < len(changes):
            text = f"there are only the user modes {''.join(USER_MODES)}"
            session.refuse(Refused("UNKNOWN_USER_MODE", text))

    return session.act("set_user_modes", known, then=changed) if known else changed(None)


@in_steps
def change_modes(session: LocalSession, channel: Channel, changes: Iterable[ModeChange]) -> Steps:
    """Change the modes that can be changed, and tell the refusals of the others."""
    if plain := tuple(map(tuple, changes)):
        values = channel.name, plain, secrets.token_hex(16)
        for refusal in (yield do(session.act, "set_modes", *values)):
            session.refuse(refusal)


@irc_command("MODE", 1, 15)
def irc_mode(session: IrcSession, name: str, letters: str = "", *values: str) -> None:
    """MODE <channel or nickname> [<modes> [<value>...]] -- read or change modes"""
    if not name.startswith("#"):
        return user_mode(session, name, letters)
    channel = session.site.hub.find_channel(name)
    if not channel.visible_to(session.user):
        channel.require_inside(session)
    if not letters:
        session.reply(RPL_CHANNELMODEIS, channel.name, channel.modes_text(session))
        return session.reply(RPL_CREATIONTIME, channel.name, channel.created // 1000)
    changes = parse_modes(letters, values)
    for letter in {c.letter: None for c in changes if c.letter in MASK_LISTS and not c.value}:
        channel.require_inside(session)
        line, end = LIST_REPLIES[letter]
        for mask in channel.lists[letter].values():
            session.reply(line, channel.name, mask.text, mask.setter, mask.when // 1000)
        session.reply(end, channel.name)
    change_modes(session, channel, [c for c in changes if c.value or c.letter not in MASK_LISTS])


@irc_command("RENAME", 2, 3)
def irc_rename(session: IrcSession, name: str, wanted: str, reason: str = "") -> None:
    """RENAME <channel> <new name> [<reason>] -- give a channel another name"""
    session.act("rename_channel", name, wanted, cut(reason, REASON_BYTES))


# Metadata (draft/metadata-3)


def metadata_owner(session: IrcSession, target: str) -> Any:
    """Return a user, channel or session by name. Raises Refused if its metadata may not be seen."""
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
    if owner is not session:
        check_metadata_writable(session, owner, target, key)
    return owner


def metadata_sync(session: IrcSession, target: str) -> Iterator[None]:
    """Tell the values of a user, of a channel with its members, or of all (*ALL)."""
    if target == "*ALL" and session.user:
        people = (session.site.hub.users.get(key) for key in session.watched)
        channels = list(session.user.channels)
        members = itertools.chain(*(channel.members for channel in channels))
        owners = dict.fromkeys([session.user, *channels, *members, *filter(None, people)])
    else:
        owner = metadata_owner(session, target)
        owners = [owner, *owner.members] if isinstance(owner, Channel) else [owner]
        target = owner_name(owner)
    session.site.hub.charge(len(owners))
    known = subscribed_metadata(session, owners)
    lines = (session.shaped_line(RPL_KEYVALUE, *one) for one in known)
    yield from batch_in_pieces(session, f"metadata {target}", lines)


@in_steps
def metadata_set(session: IrcSession, target: str, key: str, value: str = "") -> Steps:
    if not METADATA_KEY.fullmatch(key):
        raise Refused("INVALID_KEY", NO_KEY, key)
    owner = metadata_writable(session, target, key)
    if len(value.encode()) > METADATA_BYTES:
        raise Refused("INVALID_VALUE", f"a value has at most {METADATA_BYTES} bytes", key)
    if value and key not in owner.metadata and len(owner.metadata) >= METADATA_KEYS:
        raise Refused("LIMIT_REACHED", f"{METADATA_KEYS} keys at most", target, str(METADATA_KEYS))
    name = target if owner is session else owner.name
    if owner is not session:
        yield do(session.act, "set_metadata", name, key, value)
    else:
        session.metadata.update({key: value})
        session.metadata = {known: text for known, text in session.metadata.items() if text}
    session.tell_value(name, key, value)


def metadata_clear(session: IrcSession, target: str) -> Iterator[None]:
    owner = metadata_writable(session, target, "*")
    keys = list(owner.metadata)
    for key in keys:
        if owner is session:
            del owner.metadata[key]
        else:
            session.act("set_metadata", owner.name, key, "")
        yield
    tell_metadata(session, owner, keys)


def change_subscriptions(session: IrcSession, keys: Iterable[str], on: bool) -> None:
    """Add or remove keys; the first one past the limit is refused, and the rest ignored."""
    done: list[str] = []
    for key in keys:
        known = key in session.subscribed
        if not METADATA_KEY.fullmatch(key):
            session.refuse(Refused("INVALID_KEY", NO_KEY, key))
        elif on and not known and len(session.subscribed) >= METADATA_SUBS:
            text = f"{METADATA_SUBS} keys at most"
            session.refuse(Refused("LIMIT_REACHED", text, key, str(METADATA_SUBS)))
            break
        else:
            if on:
                session.subscribed[key] = None
            else:
                session.subscribed.pop(key, None)
            done.append(key)
    if done:
        shape = RPL_METADATASUBOK if on else RPL_METADATAUNSUBOK
        told = lambda _: session.reply(shape, " ".join(done))  # noqa: E731
        session.act("follow", "subscribers", tuple(done), on, then=told)


@irc_command("METADATA", 2, 15, nameless=True)
def irc_metadata(session: IrcSession, target: str, how: str, *params: str) -> LongAnswer:
    """METADATA <target or *> <subcommand> [<key>...] -- what programs know of people and channels:
    GET, LIST, SET, CLEAR, SUB, UNSUB, SUBS, SYNC"""
    match how.upper():
        case "CLEAR":
            return metadata_clear(session, target)
        case "GET" if params:
            tell_metadata(session, metadata_owner(session, target), params)
        case "LIST":
            owner = metadata_owner(session, target)
            tell_metadata(session, owner, list(owner.metadata))
        case "SET" if params:
            metadata_set(session, target, *params[:2])
        case "SUB" | "UNSUB" as verb if params:
            change_subscriptions(session, params, verb == "SUB")
        case "SUBS":
            lines = [session.shaped_line(RPL_METADATASUBS, key) for key in session.subscribed]
            in_batch(session, "metadata-subs", lines)
        case "SYNC":
            return metadata_sync(session, target)
        case _:
            raise Refused("INVALID_PARAMS", "see HELP METADATA", how)
    return None


# History


def invalid_target(subcommand: str, name: str) -> Refused:
    return Refused("INVALID_TARGET", "there is nothing of it that you may read", subcommand, name)


def readable(session: IrcSession, name: str, about: str) -> Place:
    """Return the place of a channel, user, account or nick, if it may be read. Raises Refused."""
    hub, user = session.site.hub, session.user
    if name.startswith("#"):
        channel = hub.channels.get(fold(name))
        if channel is None or user not in channel.members:
            raise invalid_target(about, name)
        return place_of(hub, user, channel.audience)
    if other := hub.users.get(fold(name)):
        return place_of(hub, user, hub.conversation(user, other))
    keys = conversation_keys(hub, user.identity, hub.accounts.identity(name))
    return Place(tuple(keys), user.identity, fold(name))


def parse_time(text: str, *about: str) -> int:
    """Return a time in milliseconds since 1970. Raises Refused, with `about`."""
    try:
        moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")
        return min(int(moment.replace(tzinfo=datetime.UTC).timestamp() * 1000 + 0.5), LAST_MOMENT)
    except (ValueError, OverflowError):
        example = "a time looks like 2026-11-22T08:30:05.123Z"
        raise Refused("INVALID_PARAMS", example, *about) from None


def parse_mark(hub: Hub, text: str, how: str, name: str) -> Mark:
    """Parse timestamp=2026-11-22T08:30:05.123Z, or msgid=ID. Raises Refused."""
    kind, _, value = text.partition("=")
    if kind == "timestamp":
        return Mark(time=parse_time(value, how, text))
    if kind != "msgid":
        why = "a selector is *, msgid=... or timestamp=..."
        raise Refused("INVALID_MSGREFTYPE", why, how, name, text)
    try:
        return Mark(hub.ids.parse(value))
    except ValueError:
        raise Refused("INVALID_PARAMS", "that is no msgid of this server", how, text) from None


def last_page_tag(session: IrcSession, ended: bool) -> str:
    """Return the tag of a page that has none after it (draft/chathistory-end)."""
    return "draft/chathistory-end" if ended and session.wire.format.tagged else ""


def tell_targets(session: IrcSession, bounds: list[Mark], count: int) -> Steps:
    """Tell the targets whose last message is between two marks, the oldest of these first. A page
    does not end between two messages of the same time: the next page begins after that time."""
    hub, user = session.site.hub, session.user
    first, last = sorted(bounds, key=lambda mark: (mark.id is None, mark.time))
    if first.id is None:
        first, last = sorted(bounds, key=lambda mark: mark.time)
    keys = [channel.key for channel in user.channels]
    newest = functools.partial(session.site.store.newest, keys, hub.identities(user.identity))
    found = yield do(session.read, newest)
    names = {channel.key: channel.name for channel in user.channels}
    there = []
    for key, event in found:
        behind = event.id > first.id if first.id is not None else event.time > first.time
        if behind and event.time < last.time and (not key or key in names):
            mine = hub.same_person(event.source.identity, user.identity)
            partner = event.about if mine else event.source.name
            there.append((event.time, names.get(key) or partner))
    there.sort()
    page = there[:count]
    page += itertools.takewhile(lambda one: one[0] == page[-1][0], there[count:])
    lines = (
        irc_bytes(f":{session.site.name} CHATHISTORY TARGETS {name} {tag_time(when)}")
        for when, name in page
    )
    ends = last_page_tag(session, len(page) == len(there))
    in_batch(session, "draft/chathistory-targets", lines, ends)


def play(session: IrcSession, name: str, events: list[Event], newest: bool, whole: bool) -> None:
    """Send events of the past, in a batch for clients that know batches, up to PAGE_BYTES as
    encoded. `whole`: no other event follows."""
    past = Audience(name if name.startswith("#") else "")
    lines, size = [], 0
    for event in reversed(events) if newest else events:
        (line,) = session.wire.encode(past, [event])
        size += len(line)
        if lines and size > PAGE_BYTES:
            whole = False
            break
        lines.append(line)
    lines = [line for line in (reversed(lines) if newest else lines) if line]
    in_batch(session, f"chathistory {name}", lines, last_page_tag(session, whole))


def history_job(session: IrcSession, how: str, span: Span, name: str, marks: list[str], count: int):
    """Return the job that reads a page, and whether it reads the span's newest. Raises Refused."""
    hub, store = session.site.hub, session.site.store
    points = [parse_mark(hub, mark, how, name) for mark in marks if (how, mark) != ("LATEST", "*")]
    if how == "AROUND":
        return functools.partial(store.around, span, points[0], count), False
    if how == "BETWEEN":
        return functools.partial(store.between, span, *points, count), False
    bound = points[0] if points else None
    span = span._replace(before=bound) if how == "BEFORE" else span._replace(after=bound)
    newest = how != "AFTER"
    return functools.partial(store.page, span, count, newest), newest


CHATHISTORY_MARKS = {"BEFORE": 1, "AFTER": 1, "LATEST": 1, "AROUND": 1, "BETWEEN": 2, "TARGETS": 1}


def changes_told(session: IrcSession) -> list[str]:
    """Return the kinds of changes to messages that a chat.py client gets with a page of the newest
    messages: redactions and reactions from the time when it was away."""
    if "chat.py/session" not in session.capabilities:
        return []
    kinds = [REDACT] * ("draft/message-redaction" in session.capabilities)
    replayed = "draft/event-playback" in session.capabilities
    return kinds + [TAGS] * ("message-tags" in session.capabilities and not replayed)


def target_bound(session: IrcSession, text: str) -> Mark:
    """Return a bound of TARGETS: a time; our own clients may also give an id."""
    if "chat.py/session" in session.capabilities and text.startswith("msgid="):
        return parse_mark(session.site.hub, text, "TARGETS", "*")
    if not text.startswith("timestamp="):
        raise Refused("INVALID_PARAMS", "a bound is timestamp=...", "TARGETS", text)
    return parse_mark(session.site.hub, text, "TARGETS", "*")


@irc_command("CHATHISTORY", 4, 5)
@in_steps
def irc_chathistory(session: IrcSession, how: str, name: str, *params: str) -> Steps:
    """CHATHISTORY <how> <target> <selector> [<selector>] <limit> -- what was said: BEFORE,
    AFTER, LATEST, AROUND, BETWEEN or TARGETS; selectors are *, timestamp=... and msgid=..."""
    how = how.upper()
    *marks, limit = params
    asked = whole_number(limit)
    needed = CHATHISTORY_MARKS.get(how)
    if needed is None or len(marks) != needed or not asked:
        raise Refused("INVALID_PARAMS", "see HELP CHATHISTORY", how)
    count = min(asked, HISTORY_LINES_MOST)
    if how == "TARGETS":
        bounds = [target_bound(session, text) for text in (name, marks[0])]
        return (yield from tell_targets(session, bounds, count))
    place = readable(session, name, how)
    kinds = REPLAYABLE if "draft/event-playback" in session.capabilities else SPOKEN
    job, newest = history_job(session, how, Span(place, kinds), name, marks, count)
    events = yield do(session.read, job)
    changes = []
    if how in ("AFTER", "LATEST") and (events or marks[0] != "*"):
        since = Mark(id=events[0].id) if events else None
        if marks[0] != "*":
            since = parse_mark(session.site.hub, marks[0], how, name)
        for kind in changes_told(session):
            span = Span(place, (kind,), after=since)
            page = functools.partial(session.site.store.page, span, CHANGES_A_PAGE, True)
            changes += yield do(session.read, page)
    if readable(session, name, how) != place:  # the user was put out, or is another, meanwhile
        raise invalid_target(how, name)
    channel = session.site.hub.channels.get(fold(name))
    # A page of the store ends early where it is large, see Store.page()
    size = sum(len(e.text.encode()) + len(e.tags.encode()) for e in events)
    whole = len(events) < count and how != "AROUND" and size <= PAGE_BYTES // 2
    events = sorted([*events, *changes], key=lambda event: event.id)
    play(session, channel.name if channel else name, events, newest, whole)


@irc_command("SEARCH", 1)
@in_steps
def irc_search(session: IrcSession, attributes: str) -> Steps:
    """SEARCH <attributes> -- what was said with some words: in=<target>;text=<words>;
    from=<nick>;after=<time>;before=<time>;limit=<n>"""
    wanted, user = parse_tags(attributes), session.user
    count = min(whole_number(wanted.get("limit", "")) or HISTORY_LINES, HISTORY_LINES_MOST)
    bounds = {
        name: Mark(time=parse_time(wanted[name], name))
        for name in ("after", "before")
        if name in wanted
    }
    if not wanted.get("text", "").strip():
        raise Refused("INVALID_PARAMS", "which words?", "text")
    name = wanted.get("in", "")
    if name:
        places = [readable(session, name, "in")]
    else:
        places = [Place((channel.key,)) for channel in user.channels]
    span, author = Span(Place(()), SPOKEN, **bounds), fold(wanted.get("from", ""))
    words = session.site.store.words
    search = functools.partial(words.search, places, wanted["text"], span, count, author)
    found = yield do(session.read, search)
    if name:
        readable(session, name, "in")
    names = {channel.key: channel.name for channel in user.channels}  # now, not when asked
    lines = []
    for place, event in found:
        where = names.get(place.keys[0]) if place.keys[0][:1] == "#" else ""
        if where is not None:
            lines += session.wire.encode(Audience(where), [event])
    in_batch(session, "soju.im/search", lines)


@irc_command("MARKREAD", most=2)
@in_steps
def irc_markread(session: IrcSession, name: str = "", when: str = "") -> Steps:
    """MARKREAD <target> [timestamp=<time>] -- how far you have read it, on any device"""
    if not is_word(name, NAME_BYTES):
        return session.fail("MARKREAD", "NEED_MORE_PARAMS", "of what?")
    if not when:
        return session.tell_marker(name)
    if not when.startswith("timestamp="):
        raise Refused("INVALID_PARAMS", "a marker is timestamp=...", name, when)
    stamp = parse_time(when.removeprefix("timestamp="), name, when)
    try:
        place = readable(session, name, name)
    except Refused:
        id = 0
    else:
        span = Span(place, SPOKEN, Mark(time=stamp - 1), Mark(time=stamp + 1))
        found = yield do(session.read, functools.partial(session.site.store.page, span, 1))
        id = found[0].id if found else 0
    yield do(session.act, "mark_read", name, stamp, id)
    session.tell_marker(name)


@irc_command("TOKEN", 1, 3)
def irc_token(session: IrcSession, subcommand: str, service: str = "", scope: str = "") -> None:
    """TOKEN SERVICELIST | GENERATE <service> -- a token with which you upload (draft/authtoken)"""
    verb, known = subcommand.upper(), session.site.folder is not None
    if verb == "SERVICELIST":
        if not known:
            return session.line("NOTE TOKEN NO_SERVICES :this server keeps no files")
        url = f"{base_url(session.site, session.conn.secure, session.conn.local)}/files"
        line = f":{session.site.name} TOKEN SERVICE FILEHOST {url} :files for the chat"
        return in_batch(session, "draft/authtoken *", [irc_bytes(line)])
    if verb == "VALIDATE":
        text = "tokens are for this server's own files"
        return session.fail("TOKEN", "NO_PERMISSIONS", text, service or "*")
    if verb != "GENERATE":
        text = f"there is no TOKEN {subcommand}"
        return session.fail("TOKEN", "UNKNOWN_COMMAND", text, subcommand)
    if service.upper() != "FILEHOST" or not known:
        text = "there is no such service; TOKEN SERVICELIST lists them"
        return session.fail("TOKEN", "UNKNOWN_SERVICE", text, service or "*")
    token = session.site.grants.make(session.user, session.site.hub.ticks)
    return session.line(f"TOKEN GENERATE FILEHOST :{token}")


@irc_command("REDACT", 2, 3)
def irc_redact(session: IrcSession, name: str, message_id: str, reason: str = "") -> None:
    """REDACT <target> <message id> [<reason>] -- take back what was said"""
    session.act("redact", name, message_id, cut(reason, REASON_BYTES))


# Looking around


def can_see(user: User, other: User) -> bool:
    """Return whether lists show a user to another: a user with +i only in a common channel."""
    return (
        user is other
        or "i" not in other.modes
        or not user.channels.keys().isdisjoint(other.channels)
    )


def who_flags(user: User, member: Membership | None, multi: bool) -> str:
    """Return H or G (here or gone), * for operators, the ranks, and B for bots."""
    symbols = member.symbols if member else ""
    here = "G" if user.away else "H"
    star = "*" if user.is_operator else ""
    return here + star + (symbols if multi else symbols[:1]) + ("B" if "B" in user.modes else "")


def who_fits(pattern: re.Pattern, user: User) -> bool:
    source = user.source
    texts = (source.mask, source.name, source.username, source.host, user.realname)
    return any(pattern.fullmatch(fold(text)) for text in texts)


def who_matches(session: IrcSession, mask: str) -> Iterator[tuple[User, Channel | None] | None]:
    """Yield users with a channel that both are in, and None now and then: see in_slices()."""
    hub, me = session.site.hub, session.user
    channel, exact = hub.channels.get(fold(mask)), hub.users.get(fold(mask))
    pattern = mask_pattern("*" if mask == "0" else mask)
    if mask.startswith("#"):
        known = channel.members if channel and channel.visible_to(me) else ()
    else:
        known = [exact] if exact else hub.users.values()
    for user in in_slices(list(known)):
        hub.charge(2 if channel else 4)
        if user is None:
            yield None
        elif channel:
            if user in channel.members and can_see(me, user):
                yield user, channel
        elif user is exact or (can_see(me, user) and who_fits(pattern, user)):
            yield user, next((c for c in user.channels if c in me.channels), None)


def who_values(
    session: IrcSession, user: User, channel: Channel | None, flags: str, token: str
) -> dict[str, str]:
    """Return a user's fields for WHO, by letters of WHOX, in the order of its answers."""
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
        "l": str((hub.ticks - user.spoke) // 1000),
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
    for match in who_matches(session, mask):
        if match is None or ("o" in flags and not match[0].is_operator):
            yield
            continue
        user, channel = match
        member = channel.members.get(user) if channel else None
        values = who_values(session, user, channel, who_flags(user, member, multi), token)
        wanted = [text for field, text in values.items() if extended and field in fields]
        if wanted:
            session.reply(RPL_WHOSPCRPL, " ".join(wanted))
        else:
            session.reply(RPL_WHOREPLY, *(values[field] for field in "cuhsnf"), user.realname)
        yield
    session.reply(RPL_ENDOFWHO, as_param(mask))


def whois_lines(session: IrcSession, user: User) -> Iterator[tuple]:
    """Yield the shapes of a WHOIS answer, each with the values after the name."""
    me, source, hub = session.user, user.source, session.site.hub
    yield RPL_WHOISUSER, source.username, source.host, user.realname
    hub.charge(len(user.channels))
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
    conns = [one.conn for one in user.sessions if isinstance(one, LocalSession)]
    if conns and all(conn.secure for conn in conns):
        yield (RPL_WHOISSECURE,)
    if user is me or session.operator:
        yield RPL_WHOISACTUALLY, source.host
        for fingerprint in filter(None, dict.fromkeys(conn.fingerprint for conn in conns)):
            yield RPL_WHOISCERTFP, fingerprint
    yield RPL_WHOISIDLE, (hub.ticks - user.spoke) // 1000, user.since // 1000


@irc_command("WHOIS", most=2)
def irc_whois(session: IrcSession, server: str = "", name: str = "") -> None:
    """WHOIS [<server>] <nickname> -- all about a user"""
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
        session.refuse(Refused("WAS_NO_SUCH_NAME", f"no user was called {name} lately", name))
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
    session.site.hub.charge(2 * len(names))
    online = [users[fold(name)].source.mask for name in names if fold(name) in users]
    offline = [name for name in names if fold(name) not in users]
    session.reply_list(RPL_MONONLINE, online, between=",")
    session.reply_list(RPL_MONOFFLINE, offline, between=",")


def monitor_add(session: IrcSession, names: list[str]) -> None:
    added = []
    for number, name in enumerate(names):
        key = fold(name)
        if len(session.watched) >= WATCHED and key not in session.watched:
            session.reply(ERR_MONLISTFULL, WATCHED, as_param(",".join(names[number:])))
            break
        if clean_name(name) != name:  # a mask, or what no user can be called
            session.refuse(Refused("BAD_NAME", "names only, no masks", name))
        elif key not in session.watched:
            session.watched[key] = name
            added.append(name)
    if added:
        told = lambda _: tell_monitored(session, added)  # noqa: E731
        session.act("follow", "watchers", tuple(map(fold, added)), True, then=told)


def monitor_remove(session: IrcSession, names: list[str]) -> None:
    keys = tuple(key for key in map(fold, names) if session.watched.pop(key, None))
    session.act("follow", "watchers", keys, False)


@irc_command("MONITOR", 1, 2)
def irc_monitor(session: IrcSession, sign: str, names: str = "") -> None:
    """MONITOR +|-|C|L|S [<nickname>{,<nickname>}] -- be told when people come and go"""
    given = [name for name in dict.fromkeys(names.split(",")) if name]
    match sign.upper():
        case "+":
            monitor_add(session, given)
        case "-":
            monitor_remove(session, given)
        case "C":
            monitor_remove(session, list(session.watched))
        case "L":
            session.reply_list(RPL_MONLIST, session.watched.values(), between=",")
            session.reply(RPL_ENDOFMONLIST)
        case "S":
            tell_monitored(session, list(session.watched.values()))
        case _:
            raise Refused("NEED_MORE_PARAMS", "MONITOR takes +, -, C, L or S", "MONITOR")


# The server


def server_query(doc: str, answer: Callable, server: int = 1, **needs: bool) -> None:
    """Make a command with a fixed answer. `server`: which parameter may name the server, or 0."""

    @irc_command(doc.split()[0], most=server, doc=doc, **needs)
    def handler(session: IrcSession, *params: str) -> None:
        check_server(session, params[-1] if params and len(params) == server else "")
        answer(session)


server_query("MOTD [<server>] -- the message of the day", tell_motd)
server_query("LUSERS -- how many people and channels there are", tell_lusers, server=2)
server_query(
    "LINKS -- which servers there are: this one", lambda s: s.reply(RPL_ENDOFLINKS, "*"), 0
)
server_query("SERVLIST -- which services there are: none", lambda s: s.reply(RPL_SERVLISTEND), 0)
server_query(
    "ISUPPORT -- the limits and features of this server, also before you come in",
    *(tell_isupport, 0),
    nameless=True,
)
server_query(
    "TIME [<server>] -- what time it is here",
    lambda s: s.reply(RPL_TIME, s.site.name, time_text(s.site.hub.now)),
)
server_query(
    "TRACE [<server>] -- the way to a server: there is but this one",
    lambda s: s.reply(RPL_TRACEEND, s.site.name, VERSION),
)


@irc_command("VERSION", most=1)
def irc_version(session: IrcSession, server: str = "") -> None:
    """VERSION [<server>] -- what this server is and can do"""
    check_server(session, server)
    session.reply(RPL_VERSION, VERSION, session.site.name, "a chat in one file of Python")
    tell_isupport(session)


def ban_text(ban: ServerBan) -> str:
    """Return the end and reason of a ban: until 2026-11-22 08:30:05Z: spam"""
    return f"{f'until {time_text(ban.until)}' if ban.until else 'for ever'}: {ban.reason}"


@irc_command("STATS", most=2)
def irc_stats(session: IrcSession, letter: str = "", server: str = "") -> None:
    """STATS u|o|k [<server>] -- time since the start; who may be an operator; who is banned"""
    check_server(session, server)
    site = session.site
    if letter == "u":
        minutes, seconds = divmod((site.hub.ticks - site.hub.started_ticks) // 1000, 60)
        hours, minutes = divmod(minutes, 60)
        session.reply(RPL_STATSUPTIME, *divmod(hours, 24), minutes, seconds)
    elif letter == "o" and session.operator:
        for name in site.operators:
            session.reply(RPL_STATSOLINE, as_param(name))
    elif letter in ("k", "K") and session.operator:
        for ban in site.hub.present_bans():
            session.reply(RPL_STATSKLINE, ban.mask, ban.setter, ban_text(ban))
    session.reply(RPL_ENDOFSTATS, as_param(letter[:1]))


@irc_command("ADMIN", most=1)
def irc_admin(session: IrcSession, server: str = "") -> None:
    """ADMIN [<server>] -- whom to ask: see the message of the day"""
    check_server(session, server)
    text = "the message of the day says whom to ask, if anything does"
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


irc_command("HELPOP", most=1, doc="HELPOP [<command>] -- the same as HELP")(irc_help)


def refusing(syntax: str, does: str, code: str, text: str, least: int = 0, **needs: bool) -> None:
    """Make a command of the RFCs that this server always refuses."""
    verb = syntax.split()[0]

    @irc_command(verb, least, 3, doc=f"{syntax} -- {does}", **needs)
    def handler(session: IrcSession, *params: str) -> None:
        raise Refused(code, text, *params[:least])


ALONE = "this server stands alone"
refusing("SQUERY <service> <text>", "ask a service", "NO_SUCH_SERVICE", "there are none", 1)
refusing("SUMMON <user>", "call a user of this machine", "NO_SUMMON", "SUMMON has been disabled")
refusing("USERS", "the users of this machine", "NO_USERS", "USERS has been disabled")
refusing("SERVER <name>", "be another server", "ALREADY_NAMED", ALONE, nameless=True)
refusing("SERVICE <name>", "be a service", "ALREADY_NAMED", "there are no services", nameless=True)
refusing("CONNECT <server>", "link servers", "NO_SUCH_SERVER", ALONE, 1, privileged=True)
refusing("SQUIT <server>", "unlink a server", "NO_SUCH_SERVER", ALONE, 1, privileged=True)


# For operators of the server


@irc_command("OPER", 2, 2, exact=True)
def irc_oper(session: IrcSession, name: str, password: str) -> None:
    """OPER <name> <password> -- become an operator of this server"""
    oper(session, name, password, lambda: session.reply(RPL_YOUREOPER))


@irc_command("KILL", 1, 2, privileged=True)
@in_steps
def irc_kill(session: IrcSession, name: str, reason: str = "") -> Steps:
    """KILL <nickname> [<reason>] -- close all connections of a user"""
    killer = session.user.name
    mask = yield do(session.act, "kill", name, reason)
    session.site.server.note(f"{mask} killed by {killer}: {reason or 'no reason given'}")


@irc_command("KLINE", 1, 3, privileged=True)
@in_steps
def ban_from(session: LocalSession, mask: str, minutes: str = "0", reason: str = "") -> Steps:
    """KLINE <address, mask or a:account> [<minutes>] [<reason>] -- ban from this server, for ever
    without minutes (which may come first), and close the connections of those it is for"""
    # On other servers the minutes come first
    if mask.isdecimal() and not minutes.isdecimal():
        mask, minutes = minutes, mask
    elif not reason and not minutes.isdecimal() and " " in minutes:
        minutes, reason = "0", minutes
    number = whole_number(minutes)
    if number is None or number > BAN_MINUTES:
        text = f"a time is 1 to {BAN_MINUTES} minutes, or 0: for ever"
        raise Refused("INVALID_PARAMS", text, minutes)
    by, full = session.user.source.mask, server_mask(mask)
    count = yield do(session.act, "ban_from_server", mask, number, reason)
    span = f"for {counted(number, 'minute')}" if number else "for ever"
    session.site.server.note(f"KLINE by {by}: {full} {span}: {reason}")
    session.notice(f"K-line added: {full}; {counted(count, 'user')} disconnected")


@irc_command("UNKLINE", 1, privileged=True)
@in_steps
def unban_from(session: LocalSession, mask: str) -> Steps:
    """UNKLINE <address, mask or a:account> -- end a ban from this server"""
    by = session.user.source.mask
    full = yield do(session.act, "unban_from_server", mask)
    session.site.server.note(f"UNKLINE by {by}: {full}")
    session.notice(f"K-line removed: {full}")


@irc_command("WALLOPS", 1, privileged=True)
def irc_wallops(session: IrcSession, text: str) -> None:
    """WALLOPS <text> -- tell everybody who wants to hear operators (user mode w)"""
    if not text:
        raise Refused("NO_TEXT", "there is nothing to say")
    session.act("wallops", text)


@irc_command("REHASH", privileged=True)
@in_steps
def irc_rehash(session: IrcSession) -> Steps:
    """REHASH -- read the message of the day, the certificate and password files again"""
    server = session.site.server
    session.reply(RPL_REHASHING, "chat.py")
    server.note(f"REHASH by {session.user.source.mask}")
    server.use_files((yield do(session.later, MAIL_LANE, server.read_files)))


@irc_command("DIE", privileged=True)
def irc_die(session: IrcSession) -> None:
    """DIE -- end the server"""
    session.site.server.note(f"DIE by {session.user.source.mask}")
    session.site.server.stop()


@irc_command("RESTART", privileged=True)
@in_steps
def irc_restart(session: IrcSession) -> Steps:
    """RESTART -- end the server and start it again"""
    server = session.site.server
    server.note(f"RESTART by {session.user.source.mask}")
    # Restart the server, if all its files can be read
    server.use_files((yield do(session.later, MAIL_LANE, server.read_files)))
    server.restart()


# ======================================================================================
# LINE DIALECT
# ======================================================================================
# The workshop's protocol: the first line is the name, every other line is said to the
# others. A line that begins with "/" is a command. A line from the server to one user
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


def line_prefix(audience: Any) -> str:
    """Return the text before a line: the channel if it is not the lobby, or (private)."""
    if isinstance(audience, Conversation):
        return "(private) "
    return f"[{audience.name}] " if audience.name not in ("", LOBBY) else ""


def line_texts(event: Event, prefix: str, where: str = "") -> list[str]:
    """Return the lines of one event, without line ends; an event of several lines gives several."""
    if event.kind not in LINE_SHAPES:  # an event that this dialect does not show
        return []
    prefixed, shape = LINE_SHAPES[event.kind]
    if event.kind in SPOKEN and event.text.startswith("\x01"):
        prefixed, shape = LINE_CTCP
    elif event.kind == AWAY and not event.text:
        prefixed, shape = LINE_BACK
    known = {**event.source._asdict(), "where": where, "about": event.about}
    return [
        (prefix if prefixed else "") + shape.format(**known, text=text)
        for text in plain_text(event.text).split("\n")
    ]


class LineWire:
    """Events as lines of the workshop's protocol."""

    def __init__(self) -> None:
        self.format = self

    def encode(self, audience: Any, events: list[Event]) -> list[bytes]:
        """Return one bytes object for each event; all events have this audience."""
        prefix = line_prefix(audience)
        return [
            f"{prefix}{e.source.name}: {e.text}\n".encode()
            if e.kind is MESSAGE and e.text.isprintable()  # all that a storm is made of
            else self.line(audience, e)
            for e in events
        ]

    def line(self, audience: Any, event: Event) -> bytes:
        texts = line_texts(event, line_prefix(audience), audience.name)
        return "".join(f"{line}\n" for line in texts).encode()

    def own(self, event: Event, line: bytes) -> bytes:
        """Return what the origin gets: no echo, as netcat shows the typed line already."""
        if event.kind not in (MODE, PASSWORD):
            return b""
        return f"* you set {harmless(event.text)} in {event.audience.name}\n".encode()


line_command = Commands("/")


def why_renamed(hub: Hub, wanted: str, name: str) -> str:
    cleaned = clean_name(wanted)
    if name != cleaned and hub.accounts.is_foreign(cleaned, ""):
        return f"{cleaned} belongs to an account; if it is yours: /login PASSWORD"
    if name != cleaned:
        return f"{cleaned} is taken"
    never, not_first = "".join(sorted(NOT_IN_NAMES)), "".join(sorted(NOT_FIRST_IN_NAMES))
    return f"names have no spaces or controls, none of {never} and at the start none of {not_first}"


class LineSession(LocalSession):
    """A session that speaks the line protocol, with netcat or a workshop client."""

    __slots__ = (
        *("collected", "dropping", "greeted", "here", "passed", "wanted_lines", "wanted_name"),
    )
    wire = LineWire()
    accepts_partial_last_line = True

    def __init__(self, site: Site, conn: Any, greeted: bool = False):
        super().__init__(site, conn)
        self.greeted = greeted  # by the server: then a person is at the keyboard
        self.here: Channel | None = None  # where plain lines go
        self.passed = site.password is None
        self.wanted_name = ""  # which may belong to an account, perhaps the user's own
        self.wanted_lines = 0  # of a message begun with /lines
        self.collected: list[str] = []
        self.dropping = 0  # lines that still belong to a message that was refused

    def tell(self, text: str) -> None:
        """Send a line of the server to this session only."""
        self.send(f"* {harmless(text)}\n".replace("\n", " ")[:-1].encode() + b"\n")

    notice = tell

    def not_kept(self, events: list[Event], reason: str) -> None:
        text = f"* {counted(len(events), 'message')} delivered but not kept: {harmless(reason)}\n"
        self.replies.append((events[-1].id, text.encode()))

    def receive(self, line: bytes) -> None:
        if self.dropping:
            self.dropping -= 1
            return
        try:
            text = self.decode(line)
            if self.wanted_lines:
                self.collect(text)
            elif text[:1] == "/" and text[:2] != "//":
                verb, _, rest = text[1:].strip().partition(" ")
                self.unfinished = line_command.run(self, verb.lower(), rest)
            elif self.user is None:
                self.take_name(text)
            else:
                self.say(text[1:] if text[:2] == "//" else text)
        except Refused as refusal:
            self.refuse(refusal)

    def refuse(self, refusal: Refused) -> None:
        if self.wanted_lines:  # a message with a bad line is none: the rest of it goes, too
            self.dropping = self.wanted_lines - len(self.collected) - 1
            self.wanted_lines, self.collected = 0, []
        self.tell(str(refusal))

    def decode(self, line: bytes) -> str:
        if line == TOO_LONG:
            text = f"a line has at most {LINE_BYTES} bytes; it was not delivered"
            raise Refused("TOO_LONG", text)
        try:
            return line.decode().replace(SOFT_BREAK, "")
        except UnicodeDecodeError:
            raise Refused("NOT_UTF8", "that line is not UTF-8 text and was not delivered") from None

    def own(self, event: Event, line: bytes) -> bytes:
        return self.wire.own(event, line) if event.origin is self else b""

    def hear(self, event: Event) -> None:
        if event.kind == KILLED:
            self.end(killed_text(event.source, event.text))
        elif event.kind == REPLACED:
            self.end("Another connection of yours took this place")

    def say(self, text: str, kind: str = MESSAGE) -> None:
        self.act("say", self.place().name, text, kind, "", "")

    def place(self) -> Channel:
        """Return the channel where plain lines go. Raises Refused if the user is out of it."""
        if self.here is None:
            raise Refused("NOT_IN_CHANNEL", f"you are in no channel; /join {LOBBY}")
        if self.here not in self.user.channels:
            self.here.member(self.user)
        return self.here

    def take_name(self, wanted: str) -> None:
        """Take a line as the user's name: the first one, or one after a refusal."""
        if not self.passed:
            raise Refused("PASSWORD_NEEDED", "this server asks for a password: /pass WORD")
        self.wanted_name = clean_name(wanted)
        self.act(
            *("enter", wanted, "line", "", self.conn.address, "", "", "", False),
            *(secrets.randbits(32), (), ""),
            then=lambda _: self.entered(wanted),
            otherwise=self.kept_out,
        )

    def kept_out(self, refusal: Refused) -> None:
        if refusal.code == "BANNED_FROM_SERVER":
            self.end(str(refusal), intended=False)
        else:
            self.refuse(refusal)

    def entered(self, wanted: str) -> None:
        self.conn.named()
        name = self.user.name
        if name != wanted:
            self.tell(f"you are {name}: {why_renamed(self.site.hub, wanted, name)}")
        elif self.greeted:
            self.tell(f"you are {name}{self.who_is_here()}; /help")
        self.act("join", LOBBY, "", then=functools.partial(setattr, self, "here"))

    def move(self) -> None:
        """If the user left the channel spoken in, speak in the lobby, else in another channel."""
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
            return "; no other user is here yet"
        topic = f"; the topic is: {plain_text(lobby.topic)}" if lobby.topic else ""
        return f"; here: {', '.join(some)}{more}{topic}"

    def collect(self, text: str) -> None:
        """Add a line to a message begun with /lines."""
        message = "\n".join([*self.collected, text])
        if len(message.encode()) > LINE_BYTES:
            text = f"a message has at most {LINE_BYTES} bytes; it was not delivered"
            raise Refused("TOO_LONG", text)
        self.collected.append(text)
        if len(self.collected) == self.wanted_lines:
            self.wanted_lines, self.collected = 0, []
            self.say(message)


@in_steps
def change_modes_aloud(
    session: LineSession, channel: Channel, changes: list, done: Callable = lambda: None
) -> Steps:
    """Change modes, and call done(); or tell the first refusal."""
    values = channel.name, tuple(map(tuple, changes)), secrets.token_hex(16)
    if refusals := (yield do(session.act, "set_modes", *values)):
        session.refuse(refusals[0])
    else:
        done()


def named_channel(session: LineSession, name: str) -> Channel:
    """Return the channel of that name; without a name the one the session speaks in."""
    return session.site.hub.find_channel(name) if name else session.place()


def ban_mask(user: User) -> str:
    """Return the mask that bans a user: the address, unless all users here may share it."""
    host = user.source.host
    return f"{user.name}!*@*" if host.startswith("127.") or host == "0::1" else f"*!*@{host}"


def kick_aloud(session: LineSession, channel: Channel, name: str, reason: str) -> None:
    user = session.site.hub.users.get(fold(name))
    told = f"you kicked {user.name if user else name} from {channel.name}"
    session.act("kick", channel.name, name, reason, then=lambda _: session.tell(told))


def kick_banned(session: LineSession, channel: Channel, mask: Mask) -> Iterator[None]:
    """Kick the members whom a ban matches, except the user who sets it."""
    for member in in_slices([] if mask.mutes else list(channel.members)):
        session.site.hub.charge(1)
        if member is None:
            yield
        elif member is not session.user and member in channel.members and mask.matches(member):
            kick_aloud(session, channel, member.name, "banned")
            yield


def tell_topic(session: LineSession, channel: Channel) -> None:
    topic = f"is: {plain_text(channel.topic)}" if channel.topic else "is not set"
    session.tell(f"the topic of {channel.name} {topic}")


def tell_names(session: LineSession, channel: Channel) -> None:
    """Tell the members: `* #rust 1-3 of 3: @bob, carol, dave`; many take several lines."""
    session.site.hub.charge(len(channel.members))
    names = channel.names(session.user)
    for start in range(0, len(names), NAMES_A_LINE):
        some = names[start : start + NAMES_A_LINE]
        span = f"{start + 1}-{start + len(some)} of {len(names)}"
        session.tell(f"{channel.name} {span}: {', '.join(some)}")


@line_command("pass", 1, nameless=True, exact=True)
def line_pass(session: LineSession, word: str) -> None:
    """/pass WORD -- the server's password, before the name"""
    if session.user:
        return session.tell("you are in already")
    if check_server_password(session, word):
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
@in_steps
def line_tell(session: LineSession, name: str, text: str) -> Steps:
    """/tell NAME TEXT -- to one person only, or into a #channel you are in"""
    sent = yield do(session.act, "say", name, text, MESSAGE, "", "")
    session.tell(f"told {name}: {text}")
    if sent.away:
        session.tell(f"{sent.away.name} is away: {sent.away.away}")


@line_command("join", 1, 2)
@in_steps
def line_join(session: LineSession, name: str, password: str = "") -> Steps:
    """/join #CHANNEL [PASSWORD] -- enter it, and speak there from now on"""
    channel = yield do(session.act, "join", name, password)
    session.here = channel or session.site.hub.find_channel(name)
    session.tell(f"you speak in {session.here.name} now")
    tell_topic(session, session.here)
    tell_names(session, session.here)


@line_command("part", most=2)
@in_steps
def line_part(session: LineSession, name: str = "", reason: str = "") -> Steps:
    """/part [#CHANNEL [REASON]] -- leave it, or the one you speak in"""
    channel = yield do(session.act, "part", named_channel(session, name).name, reason)
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
    for channel in in_slices(list(session.site.hub.channels.values())):
        if channel is None:
            yield
            continue
        session.site.hub.charge(1)
        topic = f": {plain_text(channel.topic)}" if channel.topic else ""
        if channel.members and channel.visible_to(session.user):
            session.tell(f"{channel.name} ({len(channel.members)}){topic}")
            yield


@line_command("topic", most=1)
def line_topic(session: LineSession, text: str = "") -> None:
    """/topic [TEXT] -- read or set the topic of the channel you speak in"""
    channel = session.place()
    if text:
        session.act("set_topic", channel.name, text, then=functools.partial(tell_topic, session))
    else:
        tell_topic(session, channel)


@line_command("me", 1)
def line_me(session: LineSession, text: str) -> None:
    """/me TEXT -- say what you do: /me waves"""
    session.say(text, ACTION)


@line_command("nick", 1)
@in_steps
def line_nick(session: LineSession, wanted: str) -> Steps:
    """/nick NAME -- take another name"""
    name = yield do(session.act, "rename_user", wanted, False, secrets.randbits(32))
    why = "" if name == wanted else f": {why_renamed(session.site.hub, wanted, name)}"
    session.tell(f"you are {name}{why}")


@line_command("away", most=1)
def line_away(session: LineSession, reason: str = "") -> None:
    """/away [REASON] -- say that you are not here, or without a reason that you are back"""

    def told(_: None) -> None:
        session.tell(f"you went away: {session.user.away}" if reason else "you came back")

    session.act("set_away", reason, then=told)


@line_command("invite", 1, 2)
@in_steps
def line_invite(session: LineSession, name: str, where: str = "") -> Steps:
    """/invite NAME [#CHANNEL] -- invite a user; an operator may do so past any limit or ban"""
    user, channel = yield do(session.act, "invite", name, named_channel(session, where).name)
    session.tell(f"you invited {user.name} to {channel.name}")


@line_command("kick", 1, 2)
def line_kick(session: LineSession, name: str, reason: str = "") -> None:
    """/kick NAME [REASON] -- put a user out of the channel you speak in"""
    kick_aloud(session, session.place(), name, reason)


@line_command("mode", most=1)
def line_mode(session: LineSession, text: str = "") -> None:
    """/mode [MODES] -- see or change the channel you speak in: /mode +m-t, /mode +o NAME"""
    channel = session.place()
    if not text:
        known = "; ".join(f"{letter} {meaning}" for letter, meaning in FLAGS.items())
        session.tell(f"the modes of {channel.name}: {channel.modes_text(session)} ({known})")
        return
    letters, *values = text.split()
    change_modes_aloud(session, channel, parse_modes(letters, values), lambda: None)


@line_command("ban", most=1)
def line_ban(session: LineSession, whom: str = "") -> None:
    """/ban [NAME|MASK] -- keep a user out of the channel you speak in, and put them out"""
    channel, user = session.place(), session.site.hub.users.get(fold(whom))
    if not whom:
        masks = ", ".join(mask.text for mask in channel.lists["b"].values())
        return session.tell(f"banned from {channel.name}: {masks or 'no user'}")
    mask = ban_mask(user) if user else full_mask(whom)

    def banned() -> None:
        session.postponed.append(kick_banned(session, channel, Mask(mask)))

    return change_modes_aloud(session, channel, [ModeChange(True, "b", mask)], banned)


@line_command("unban", 1)
def line_unban(session: LineSession, whom: str) -> None:
    """/unban NAME|MASK -- let them in again"""
    channel, user = session.place(), session.site.hub.users.get(fold(whom))
    keys = {fold(whom), fold(full_mask(whom)), fold(ban_mask(user)) if user else ""}
    found = [channel.lists["b"][key].text for key in keys & channel.lists["b"].keys()]
    if not found:
        raise Refused("NOT_BANNED", f"no ban of {channel.name} is {whom}; /ban lists them")
    change_modes_aloud(session, channel, [ModeChange(False, "b", mask) for mask in found])


def logged_in_line(session: LineSession, account: str, proof: str) -> Steps:
    """Log the session in to the account that it registered, and tell that."""
    yield do(session.act, "log_in", account, proof, False)
    session.tell(f"{account} is yours; /login PASSWORD next time")


@line_command("register", 1, 2, exact=True)
@in_steps
def line_register(session: LineSession, password: str, email: str = "") -> Steps:
    """/register PASSWORD [EMAIL] -- make your name an account, which no other user can have"""
    name, proof = yield from register_nick(session, session.user.name, "*", email, password)
    if not proof:
        return session.tell(f"a code was sent to {email}: /verify CODE")
    yield from logged_in_line(session, name, proof)
    if used := email_used(session, email):
        session.tell(used.removeprefix("; "))


@line_command("verify", 1, exact=True)
@in_steps
def line_verify(session: LineSession, code: str) -> Steps:
    """/verify CODE -- the code that was sent to your address"""
    account, proof = yield from verify(session, session.user.name, code)
    yield from logged_in_line(session, account, proof)


@line_command("login", 1, 2, exact=True)
@in_steps
def line_login(session: LineSession, *words: str) -> Steps:
    """/login [NAME] PASSWORD -- log in to an account; it gives you its name, or whom it is"""
    name, password = words if len(words) == 2 else (session.wanted_name, *words)
    before, name_before = session.user, session.user.name
    yield from identify(session, name, password, True)
    if session.user.name != name_before:
        session.tell(f"you are {session.user.name}")
    if session.user is not before:
        session.move()


line_command("passwd", 2, doc="/passwd OLD NEW -- another password for your account", exact=True)(
    change_own_password
)
line_command("drop", 1, doc="/drop PASSWORD -- give up your account", exact=True)(drop_own_account)
line_command(
    *("disown", 1),
    doc="/disown #CHANNEL -- let a channel that you founded end with its last member",
)(disown_channel)


@line_command("oper", 2, exact=True)
def line_oper(session: LineSession, name: str, password: str) -> None:
    """/oper NAME PASSWORD -- become an operator of this server"""
    text = "you are an operator of this server now: /kick, /ban and /topic work anywhere"
    oper(session, name, password, lambda: session.tell(text))


line_command(
    *("kline", 1, 3),
    doc="/kline ADDRESS|MASK|a:ACCOUNT [MINUTES [REASON]] -- ban from this server (operators only)",
    privileged=True,
)(ban_from)
line_command(
    *("unkline", 1),
    doc="/unkline ADDRESS|MASK|a:ACCOUNT -- end a ban from this server (operators only)",
    privileged=True,
)(unban_from)


@line_command("stats", 1, privileged=True)
def line_stats(session: LineSession, letter: str) -> None:
    """/stats k -- who is banned from this server"""
    bans = session.site.hub.present_bans() if letter in ("k", "K") else []
    for ban in bans:
        session.tell(f"{ban.mask} {ban_text(ban)}")
    session.tell(counted(len(bans), "K-line"))


def tell_past(session: LineSession, events: Iterable[Event], prefix: str) -> None:
    for event in events:
        for text in line_texts(event, prefix):
            session.tell(f"{time_text(event.time)} {text}")


@line_command("history", most=2)
@in_steps
def line_history(session: LineSession, *params: str) -> Steps:
    """/history [#CHANNEL|NAME] [N] -- the last N messages said there"""
    numbers = [whole_number(p) for p in params if p.isdecimal()]
    names = [p for p in params if not p.isdecimal()]
    count = numbers[0] if numbers else HISTORY_LINES
    if not count or count > HISTORY_LINES_MOST:
        raise Refused("BAD_COUNT", f"history comes in 1 to {HISTORY_LINES_MOST} messages")
    hub, channel = session.site.hub, None
    if names and not names[0].startswith("#"):
        audience: Audience = hub.conversation(session.user, hub.find_user(names[0]))
    else:
        channel = named_channel(session, names[0] if names else "")
        channel.member(session.user)
        audience = channel.audience
    span = Span(place_of(hub, session.user, audience))
    events = yield do(session.read, functools.partial(session.site.store.page, span, count))
    if channel:
        channel.member(session.user)  # or not any more
    tell_past(session, events, line_prefix(audience))
    session.tell(f"that was {counted(len(events), 'message')}")


@line_command("search", 1)
@in_steps
def line_search(session: LineSession, words: str) -> Steps:
    """/search WORDS -- what was said with them in the channel you speak in"""
    channel = session.place()
    place = place_of(session.site.hub, session.user, channel.audience)
    search = functools.partial(session.site.store.words.search, [place], words, Span(place))
    found = yield do(session.read, functools.partial(search, HISTORY_LINES))
    channel.member(session.user)  # or not any more
    tell_past(session, [event for _, event in found], line_prefix(channel))
    session.tell(f"found {counted(len(found), 'message')} with {words}")


@line_command("lines", 1)
def line_lines(session: LineSession, count: str) -> None:
    """/lines N -- the next N lines are one message"""
    lines = whole_number(count)
    if not lines or lines > MESSAGE_LINES:
        session.dropping = min(lines or 0, LINES_DROPPED)  # they are no messages
        raise Refused("BAD_COUNT", f"a message has 1 to {MESSAGE_LINES} lines")
    session.wanted_lines = lines


@line_command("quit", most=1, nameless=True)
def line_quit(session: LineSession, reason: str = "") -> None:
    """/quit [REASON] -- leave"""
    session.parting = "Quit" + (f": {cut(reason, REASON_BYTES)}" if reason else "")
    session.quit_intended = True
    session.conn.close()


# ======================================================================================
# WEB DIALECT
# ======================================================================================
# HTTP/1.1 (RFC 9110 and 9112) and WebSocket (RFC 6455), on the port of all others. A framer
# makes requests, or frames, of bytes; a WebSession answers requests in their order. One that
# asks for a WebSocket becomes a session of IRC with another framer: see Peer.upgrade().

TOKEN_CHARACTERS = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rf"({TOKEN_CHARACTERS}) ([!-~]+) HTTP/1\.(\d)")
HEADER_NAME = re.compile(TOKEN_CHARACTERS)
NOT_IN_HEADERS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")


class Request(NamedTuple):
    """The request line and headers of an HTTP request."""

    method: str
    target: str  # as it was sent
    minor: int  # of the version: HTTP/1.minor
    headers: dict[str, list[str]]  # by name in small letters
    length: int | None = 0  # bytes of the body; None: it comes in chunks

    def header(self, name: str) -> str:
        """Return all values of a header joined to one (RFC 9110 section 5.3)."""
        return ", ".join(self.headers.get(name, ()))

    def tokens(self, name: str) -> list[str]:
        """Return the words of a header with a list of words, in small letters."""
        words = (word.strip(" \t").lower() for word in self.header(name).split(","))
        return [word for word in words if word]

    @property
    def path(self) -> str:
        """The decoded path; "" if the target has none. Proxies may be sent a whole URL."""
        import urllib.parse

        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(self.target)
            if self.target.startswith("/") or parts.scheme in ("http", "https"):
                path = self.target.partition("?")[0] if self.target[0] == "/" else parts.path
                return urllib.parse.unquote(path or "/", errors="replace")
        return ""

    @property
    def host(self) -> str:
        """The host and port that the client asks: those of a whole URL stand above Host."""
        match = re.match(r"[a-z]+://([^/?#]*)", self.target, re.IGNORECASE)
        return match[1] if match else self.header("host")

    @property
    def keeps_alive(self) -> bool:
        options = self.tokens("connection")
        return "close" not in options and (self.minor >= 1 or "keep-alive" in options)


class BadRequest(Exception):
    """A request that cannot be framed, so that everything after it is unreadable."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


END_OF_BODY = b""


def body_length(request: Request) -> int | None:
    """Return the length of the body; None if it comes in chunks. Raises BadRequest."""
    lengths, codings = (
        request.headers.get("content-length", []),
        request.tokens("transfer-encoding"),
    )
    if "transfer-encoding" in request.headers:
        if lengths or request.minor == 0:
            raise BadRequest(400, "Transfer-Encoding stands alone, and not in HTTP/1.0")
        if codings != ["chunked"]:
            raise BadRequest(501, "the only transfer coding is chunked")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
        raise BadRequest(400, "a request has one Content-Length, in digits")
    return int(lengths[0])


def parse_head(lines: list[bytes]) -> Request:
    """Return a request made of its first line and its headers. Raises BadRequest, also if two
    readers could understand the head in two ways (RFC 9112 section 11.2, request smuggling)."""
    texts = [line.decode("latin-1") for line in lines]
    match = REQUEST_LINE.fullmatch(texts[0])
    if match is None:
        raise BadRequest(400, "the first line is no request")
    headers: dict[str, list[str]] = {}
    for text in texts[1:]:  # no pattern for all of it: blanks on both sides cost their cube
        name, colon, value = text.partition(":")
        if not (colon and HEADER_NAME.fullmatch(name)) or NOT_IN_HEADERS.search(value):
            raise BadRequest(400, "a line of the head is no header")
        headers.setdefault(name.lower(), []).append(value.strip(" \t"))
    request = Request(match[1], match[2], int(match[3]), headers)
    if len(headers.get("host", ())) > 1 or (request.minor and "host" not in headers):
        raise BadRequest(400, "a request has one Host")
    return request._replace(length=body_length(request))


class HttpReader:
    """Bytes in, requests out: take() returns a Request, then the pieces of its body if there is
    one, then END_OF_BODY. After a BadRequest it returns nothing more."""

    out, closed = b"", False  # of framers that have something to answer

    def __init__(self, data: bytes = b""):
        self.limit = HEAD_BYTES
        self.data, self.start = data, 0  # what has come, and where the rest of it begins
        self.left = 0  # bytes of the body, or of the chunk, that are still to come
        self.chunked = False
        self.trailers = TRAILER_BYTES  # that may still come
        self.failed = False
        self.step: Callable[[], Any] = self._head
        self.ended = False

    @property
    def buffer(self) -> bytes:
        """The bytes that have come and were not taken."""
        return self.data[self.start :]

    @property
    def in_body(self) -> bool:
        return self.step != self._head

    @property
    def pending(self) -> bool:
        """True if take() may have something to return."""
        rest = len(self.data) - self.start
        if self.step in (self._body, self._end):
            return rest > 0 or self.step == self._end
        if self.step == self._head:
            blank = self.data.startswith((b"\r", b"\n"), self.start)
            ends = (self.data.find(end, self.start) >= 0 for end in (b"\n\r\n", b"\n\n"))
            return blank or rest > self.limit or any(ends)
        return self.data.find(b"\n", self.start) >= 0 or rest > TRAILER_BYTES

    def feed(self, data: bytes) -> None:
        if self.failed:
            return
        self.data = self.buffer + data if self.start < len(self.data) else data
        self.start = 0

    def clear(self) -> None:
        self.data, self.start = b"", 0

    def finish(self) -> None:
        """Note the end of input: an incomplete request is dropped."""
        self.ended = True

    def take(self) -> Request | BadRequest | bytes | None:
        try:
            return self.step()
        except BadRequest as error:
            self.failed = True  # what follows cannot be understood
            self.clear()
            return error

    def _line(self, most: int) -> bytes | None:
        """Take a line of at most `most` bytes, which ends with CRLF; None if it is incomplete.
        Raises BadRequest."""
        end = self.data.find(b"\n", self.start, self.start + most + 2)
        if end < 0:
            if len(self.data) - self.start > most + 1:
                raise BadRequest(400, f"a line has at most {most:,} bytes")
            return None
        line, self.start = self.data[self.start : end], end + 1
        if line.find(b"\r") != len(line) - 1:
            raise BadRequest(400, "a line of a body in chunks ends with CR and LF")
        return line[:-1]

    def _head(self) -> Request | None:
        for end in (b"\r\n", b"\n"):  # RFC 9112 section 2.2: some clients add one
            if self.data.startswith(end, self.start):
                self.start += len(end)
                break
        ends = (self.data.find(end, self.start) for end in (b"\n\r\n", b"\n\n"))
        end = min((end for end in ends if end >= 0), default=-1)
        if end < 0 or end - self.start > self.limit:
            if len(self.data) - self.start > self.limit:
                first = self.data.find(b"\n", self.start, self.start + self.limit) < 0
                raise BadRequest(414 if first else 431, f"a head has at most {self.limit:,} bytes")
            return None
        head = self.data[self.start : end]
        self.start = end + (3 if self.data.startswith(b"\n\r", end) else 2)
        request = self._parse([line.removesuffix(b"\r") for line in head.split(b"\n")])
        if request.length is None:
            self.chunked, self.step = True, self._size
        elif request.length:
            self.left, self.step = request.length, self._body
        return request

    def _parse(self, lines: list[bytes]) -> Request:
        if len(lines) > HEADERS_MOST:
            raise BadRequest(431, f"a request has at most {HEADERS_MOST} headers")
        return parse_head(lines)

    def _body(self) -> bytes | None:
        """Take bytes of the body, or of its present chunk."""
        piece = self.data[self.start : self.start + self.left]
        if not piece:
            return None
        self.start += len(piece)
        self.left -= len(piece)
        if not self.left:
            self.step = self._end_of_chunk if self.chunked else self._end
        return piece

    def _end(self) -> bytes:
        self.step, self.chunked, self.trailers = self._head, False, TRAILER_BYTES
        return END_OF_BODY

    def _size(self) -> bytes | None:
        line = self._line(CHUNK_LINE_BYTES)
        if line is None:
            return None
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(400, "this is no size of a chunk")
        self.left = int(match[1], 16)
        self.step = self._body if self.left else self._trailers
        return self.step()

    def _end_of_chunk(self) -> bytes | None:
        line = self._line(2)
        if line is None:
            return None
        if line:
            raise BadRequest(400, "a chunk is longer than its size")
        self.step = self._size
        return self._size()

    def _trailers(self) -> bytes | None:
        """Skip the trailers of a chunked body."""
        while (line := self._line(self.trailers)) is not None:
            if not line:
                return self._end()
            self.trailers = max(0, self.trailers - len(line) - 2)
        return None


# Answers

STATUS_TEXTS = {
    100: "Continue",
    101: "Switching Protocols",
    200: "OK",
    201: "Created",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    412: "Precondition Failed",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    417: "Expectation Failed",
    421: "Misdirected Request",
    423: "Locked",
    426: "Upgrade Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(when: float) -> str:
    """Return a time (seconds since 1970) as in HTTP headers, in any locale (RFC 9110 5.6.7)."""
    day = datetime.datetime.fromtimestamp(when, datetime.UTC)
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    return f"{weekday}, {day:%d} {month} {day:%Y %H:%M:%S} GMT"


SAFE_HEADERS = (  # of all answers
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cross-Origin-Resource-Policy: cross-origin",
)
NOTHING_ALLOWED = "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'"
STYLE_ALLOWED = (
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
)
TEXT_TYPE = "Content-Type: text/plain; charset=utf-8"


# WebSocket

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
CONTINUATION, TEXT_FRAME, BINARY_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 0, 1, 2, 8, 9, 10
CLOSE_CODES = frozenset((*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)))
SUBPROTOCOLS = {"text.ircv3.net": TEXT_FRAME, "binary.ircv3.net": BINARY_FRAME}


def websocket_accept(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 section 4.2.2)."""
    digest = hashlib.sha1(f"{key}{WEBSOCKET_GUID}".encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame from the server, which is not masked."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def close_frame(code: int, why: str = "") -> bytes:
    return frame(CLOSE_FRAME, code.to_bytes(2, "big") + why.encode())


def masked(data: bytes, mask: bytes) -> bytes:
    """Return bytes with a mask of four bytes put on, or taken off (RFC 6455 section 5.3)."""
    key = (mask * (len(data) // 4 + 1))[: len(data)]
    number = int.from_bytes(data, "little") ^ int.from_bytes(key, "little")
    return number.to_bytes(len(data), "little")


class BadFrame(Exception):
    """A frame that no client may send, with the status code of the close that answers it."""

    def __init__(self, code: int, why: str):
        super().__init__(why)
        self.code = code


class Frame(NamedTuple):
    """A frame from a client."""

    last: bool  # of its message
    opcode: int
    payload: bytes
    size: int  # with its head


class FrameReader:
    """WebSocket frames in, lines out: each message is one line. `out` holds the frames to answer
    with; `closed` is set by a close, or by a frame that no client may send."""

    in_body = False

    def __init__(self, limit: int, data: bytes = b""):
        self.limit = limit
        self.buffer = bytearray(data)
        self.lines: collections.deque[bytes] = collections.deque()  # of one message
        self.parts: list[bytes] = []  # of a message that has not ended ...
        self.opcode = 0  # ... and its kind; 0 if there is none
        self.decoder: Any = None  # of its text
        self.out = b""
        self.closed = self.ended = False

    @property
    def pending(self) -> bool:
        """True if take() may have a line to return, or a frame to answer."""
        return bool(self.lines) or (not self.closed and self._complete())

    def feed(self, data: bytes) -> None:
        if not self.closed:
            self.buffer += data

    def clear(self) -> None:
        self.buffer.clear()
        self.lines.clear()

    def finish(self) -> None:
        self.ended = True

    def take(self) -> bytes | None:
        """Return the next line; None if there is none yet. One call looks at a few frames only, so
        that endless empty frames hold up no other client."""
        for _ in range(FRAMES_AT_ONCE):
            if self.lines:
                return self.lines.popleft()
            try:
                one = None if self.closed else self._frame()
                if one is None:
                    return None
                del self.buffer[: one.size]
                self._take(one)
            except BadFrame as error:
                self._close(error.code, str(error))
        return None

    def _complete(self) -> bool:
        try:
            return self._frame(look=True) is not None
        except BadFrame:
            return True

    def _frame(self, look: bool = False) -> Frame | None:
        """Return the first frame, if it is complete; `look` leaves out the payload. Raises
        BadFrame."""
        if len(self.buffer) < 2:
            return None
        first, second = self.buffer[:2]
        opcode, size, start = first & 0x0F, second & 0x7F, 2
        if first & 0x70 or opcode not in (0, 1, 2, 8, 9, 10):
            raise BadFrame(1002, "reserved bits or an unknown opcode")
        if not second & 0x80:
            raise BadFrame(1002, "frames of a client are masked")
        if opcode >= CLOSE_FRAME and (size > 125 or not first & 0x80):
            raise BadFrame(1002, "a control frame is short and whole")
        if size >= 126:
            start += 2 if size == 126 else 8
            if len(self.buffer) < start:
                return None
            size = int.from_bytes(self.buffer[2:start], "big")
        if opcode < CLOSE_FRAME and size + sum(map(len, self.parts)) > self.limit:
            raise BadFrame(1009, f"a message has at most {self.limit:,} bytes")
        end = start + 4 + size
        if len(self.buffer) < end:
            return None
        if look:
            return Frame(True, opcode, b"", end)
        payload = masked(bytes(self.buffer[start + 4 : end]), bytes(self.buffer[start : start + 4]))
        return Frame(bool(first & 0x80), opcode, payload, end)

    def _take(self, one: Frame) -> None:
        if one.opcode == PING_FRAME:
            self.out = frame(PONG_FRAME, one.payload)  # the newest of several is enough
        elif one.opcode == CLOSE_FRAME:
            self._closed_by_client(one.payload)
        elif one.opcode != PONG_FRAME:
            self._take_part(one)

    def _take_part(self, one: Frame) -> None:
        """Take a frame of a message: all of it, or a part."""
        if (one.opcode == CONTINUATION) != bool(self.opcode):
            raise BadFrame(1002, "a message begins before the last one has ended, or in its middle")
        if one.opcode:
            self.opcode, self.decoder = one.opcode, codecs.getincrementaldecoder("utf-8")()
        if self.opcode == TEXT_FRAME:
            try:
                self.decoder.decode(one.payload, one.last)
            except UnicodeDecodeError:
                raise BadFrame(1007, "text is UTF-8") from None
        self.parts.append(one.payload)
        if len(self.parts) > FRAGMENTS_MOST:
            raise BadFrame(1008, f"a message has at most {FRAGMENTS_MOST} frames")
        if one.last:
            message, self.parts, self.opcode = b"".join(self.parts), [], 0
            lines = message.removesuffix(b"\n").removesuffix(b"\r").split(b"\n")
            self.lines.extend(line.removesuffix(b"\r") for line in lines)

    def _closed_by_client(self, payload: bytes) -> None:
        code = int.from_bytes(payload[:2], "big") if payload else 1000
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            raise BadFrame(1007, "text is UTF-8") from None
        if len(payload) == 1 or code not in CLOSE_CODES:
            raise BadFrame(1002, "this is no code of a close")
        self._close(code if payload else 1000)

    def _close(self, code: int, why: str = "") -> None:
        self.out += close_frame(code, why)
        self.closed = True
        self.buffer.clear()


class Framing:
    """Lines of IRC as frames, one frame for each line. Bytes for all members of a channel are
    framed once."""

    def __init__(self, opcode: int):
        self.opcode = opcode
        self.last = self.framed = b""

    def __call__(self, data: bytes) -> bytes:
        if data is not self.last:
            self.last, lines = data, data.removesuffix(b"\r\n").split(b"\r\n")
            self.framed = b"".join(frame(self.opcode, self._payload(line)) for line in lines)
        return self.framed

    def _payload(self, line: bytes) -> bytes:
        if self.opcode == BINARY_FRAME or line.isascii():
            return line
        return line.decode(errors="replace").encode()


# Answering requests


class Web(NamedTuple):
    """The settings of the web dialect."""

    hosts: frozenset[str] = frozenset(("localhost",))  # names that Host may have; IPs always may
    ports: frozenset[int] = frozenset()  # of this server
    origins: frozenset[str] = frozenset()  # whose pages may open a WebSocket, besides our own
    proxies: frozenset[str] = frozenset()  # addresses whose X-Forwarded headers are believed
    open_metrics: bool = False  # to all, and not to this machine only
    url: str = ""  # how links begin, where a proxy is in between
    address: str = ""  # of this machine in the network, if the server listens there
    page: Callable[["Request", Site, bool], str] = lambda request, site, secure: site.name


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def split_host(text: str) -> tuple[str, int | None]:
    """Split HOST, HOST:PORT or [IPV6]:PORT. The port is None if there is none; the host is "" if it
    is not valid."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", text)
    if match is None:
        return "", None
    return (match[1] or match[2]).lower().rstrip("."), int(match[3]) if match[3] else None


def forwarded_host(text: str) -> str:
    """Return the address in a value of X-Forwarded-For, which may have a port; "" if it is none."""
    host = (
        text if re.fullmatch(r"[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*:[^\]]*", text) else split_host(text)[0]
    )
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        return str(getattr(address, "ipv4_mapped", None) or address)
    return ""


def is_ip(host: str) -> bool:
    return ":" in host or bool(re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host))


def host_allowed(web: Web, host: str) -> bool:
    """Return whether a request for this host is for this server. Without this check, a page of
    another site could read ours through a name that leads here (DNS rebinding)."""
    return bool(host) and (is_ip(host) or host in web.hosts)


def origin_allowed(web: Web, origin: str, own: str = "") -> bool:
    """Return whether a page of this origin may open a WebSocket: one of this server, under the
    Host `own` of the request, one of this machine, or one of --web-origin. No origin ("") means
    that the client is no browser."""
    if not origin or origin in web.origins:
        return True
    scheme, _, authority = origin.partition("://")
    host, port = split_host(authority)
    if scheme not in ("http", "https") or not host:
        return False
    usual = 443 if scheme == "https" else 80
    own_host, own_port = split_host(own)
    return host in LOOPBACK_NAMES or (host, port or usual) == (own_host, own_port or usual)


WEB_ROUTES: dict[str, dict[str, Callable]] = {}  # path -> method -> handler


def on_request(method: str, *paths: str) -> Callable:
    """Decorator: register the function for requests with a method for these paths."""

    def register(handler: Callable) -> Callable:
        for path in paths:
            WEB_ROUTES.setdefault(path, {})[method] = handler
        return handler

    return register


CORS = (
    "Access-Control-Allow-Origin: *",
    "Access-Control-Expose-Headers: Location, ETag, Content-Range, Content-Disposition, "
    "Upload-Offset, Upload-Length, Upload-Expires, Tus-Resumable, Tus-Version, Tus-Extension, "
    "Tus-Max-Size",
)
CHALLENGE = ('WWW-Authenticate: Basic realm="chat", charset="UTF-8"', "WWW-Authenticate: Bearer")
REFUSAL_STATUSES = {  # Refused.code -> status
    "SASL_FAILED": 401,
    "TRY_LATER": 429,
    "BAD_HEADER": 400,
    "NO_FILE": 404,
    "FILE_TOO_LARGE": 413,
    "NO_ROOM": 507,
}


class WebSession(LocalSession):
    """A session that answers the requests of one connection in their order."""

    __slots__ = (
        *("at_end", "body_left", "client", "closing", "credentials", "near", "owner", "reading"),
        *("request", "take_body", "upload"),
    )
    takes_lines = False

    def __init__(self, site: Site, conn: Connected):
        super().__init__(site, conn)
        self.request: Request | None = None  # that is being answered
        self.client: tuple[str, bool, bool | None] = (conn.host, False, None)  # see _find_client()
        self.near = is_loopback(conn.host)  # the client is on this machine
        self.closing = False  # behind the answer
        self.take_body: Callable[[bytes], None] = do_nothing  # takes pieces of its body
        self.body_left = False  # there is more of it to come
        self.credentials = self.owner = ""  # that were right, and whose they are
        self.upload: Any = None  # that is under way
        self.reading: Any = None  # a file that is being sent
        self.at_end: Callable[[], None] = do_nothing  # before the end, or a refusal

    def receive(self, item: Request | BadRequest | bytes) -> None:
        if isinstance(item, Request):
            self._begin(item)
        elif isinstance(item, BadRequest):
            self.request, self.closing = None, True
            self.answer(item.status, str(item))
        else:
            self.body_left = item != END_OF_BODY
            self.take_body(item)

    def _begin(self, request: Request) -> None:
        self.request, self.take_body = request, do_nothing
        self.body_left = request.length != 0
        self.closing = not request.keeps_alive
        host = split_host(request.host)[0]
        expected = request.header("expect").lower()
        if not self._find_client(request):
            return self.answer(400, "X-Forwarded-For ends with the address of the client")
        if request.minor and not host_allowed(self.site.web, host):
            return self.answer(421, "this server has another name; --web-origin adds one")
        if expected not in ("", "100-continue"):
            return self.answer(417, "Expect is 100-continue, or nothing")
        methods = self._methods(request.path)
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler:
            return handler(self, request)
        if not methods:
            return self.answer(404, "there is no such page")
        allowed = "Allow: " + ", ".join(sorted({*methods, "OPTIONS", "HEAD"}))
        if request.method == "OPTIONS":
            return self.answer(204, "", allowed)
        return self.answer(405, f"{request.method} is not for this page", allowed)

    def _find_client(self, request: Request) -> bool:
        """Set the client of a request: the other end of the connection, or, for a proxy of
        --web-proxy, the address that the proxy names. Return False if that address is not valid.
        Headers of other senders are ignored, except that the request is not from this machine."""
        conn, headers = self.conn, request.headers
        host, trusted = conn.host, conn.host in self.site.web.proxies
        passed_on = any(name.startswith(("x-forwarded", "forwarded")) for name in headers)
        secure = conn.encrypted if passed_on else None
        if trusted and "x-forwarded-for" in headers:
            host = forwarded_host(request.header("x-forwarded-for").rpartition(",")[2].strip())
            passed_on = False
        if trusted and "x-forwarded-proto" in headers:
            secure = request.tokens("x-forwarded-proto")[-1:] == ["https"]
        if not host:
            return False
        client = (host, passed_on, secure)
        if client != self.client:  # of the request before: most connections have one client
            self.client, self.near = client, is_loopback(host) and not passed_on
            key = address_key(host, host_of(conn.local))
            conn.act_for(host, f"a proxy at {key}" if passed_on else key, secure)
            self.address = conn.address
        return True

    @staticmethod
    def _methods(path: str) -> dict[str, Callable]:
        return WEB_ROUTES.get("/files/*" if path.startswith("/files/") else path, {})

    def answer(self, status: int, body: str | bytes = "", *headers: str) -> None:
        """Send a whole answer. Close the connection if a long body is still to come unread."""
        request = self.request
        if request and self.body_left and self.take_body is do_nothing:
            unsent = "expect" in request.headers or request.length is None
            self.closing = self.closing or unsent or request.length > DISCARDED_BYTES
        data = body.encode() if isinstance(body, str) else body
        if data and not any(header.startswith("Content-Type") for header in headers):
            headers = (*headers, TEXT_TYPE, NOTHING_ALLOWED)
            data = data.removesuffix(b"\n") + b"\n"
        if status != 204:
            headers = (*headers, f"Content-Length: {len(data)}")
        self.send_head(status, *headers)
        if data and not (request and request.method == "HEAD"):
            self.send(data)
        self.end_answer()

    def send_head(self, status: int, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} {STATUS_TEXTS[status]}", *headers, *SAFE_HEADERS]
        lines.append(f"Date: {http_date(self.site.hub.now / 1000)}")
        if self.closing:
            lines.append("Connection: close")
        elif self.request and self.request.minor == 0:
            lines.append("Connection: keep-alive")
        self.send("\r\n".join([*lines, "", ""]).encode())

    def cors(self) -> tuple[str, ...]:
        """Return headers that let the pages of other sites read an answer about a file."""
        return CORS if self.request and "origin" in self.request.headers else ()

    def end_answer(self) -> None:
        """Close the connection after a complete answer, if that was decided."""
        if self.closing:
            self.conn.close()

    def for_operators(self) -> bool:
        """Return whether the request comes from this machine itself, through no proxy."""
        return self.site.web.open_metrics or self.near

    # What chat wants of a session

    def notice(self, text: str) -> None:
        """Send nothing: a web client gets only answers."""

    def refuse(self, refusal: Refused) -> None:
        """Answer with the status of a refusal, and end the upload or download that was going on."""
        end, self.at_end = self.at_end, do_nothing
        end()
        status = REFUSAL_STATUSES.get(refusal.code, 503)
        self.answer(status, str(refusal), *(CHALLENGE if status == 401 else ()), *self.cors())

    def not_kept(self, events: list[Event], reason: str) -> None:
        """Do nothing: a web client sends no messages."""

    def ended(self) -> None:
        end, self.at_end = self.at_end, do_nothing
        end()
        super().ended()


def wants_websocket(request: Request) -> bool:
    return "websocket" in request.tokens("upgrade") and "upgrade" in request.tokens("connection")


def open_websocket(session: WebSession, request: Request) -> None:
    """Answer a WebSocket handshake (RFC 6455 section 4.2). An IRC session takes over then."""
    key = request.header("sec-websocket-key")
    if request.header("sec-websocket-version") != "13":
        return session.answer(426, "the version is 13", "Sec-WebSocket-Version: 13")
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key) or request.method != "GET":
        return session.answer(400, "a handshake is a GET with a key of 16 bytes")
    if not request.minor or request.length != 0:
        return session.answer(400, "a handshake is one of HTTP/1.1, without a body")
    if len(request.headers.get("origin", ())) > 1:
        return session.answer(400, "a request has one Origin")
    if not origin_allowed(session.site.web, request.header("origin"), request.header("host")):
        return session.answer(403, "pages of that origin may not join; --web-origin allows them")
    offered = [word for word in request.tokens("sec-websocket-protocol") if word in SUBPROTOCOLS]
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    lines.append(f"Sec-WebSocket-Accept: {websocket_accept(key)}")
    lines += [f"Sec-WebSocket-Protocol: {name}" for name in offered[:1]]
    opcode = SUBPROTOCOLS[offered[0]] if offered else TEXT_FRAME
    return session.conn.upgrade("\r\n".join([*lines, "", ""]).encode(), opcode)


@on_request("GET", "/", "/irc")
def web_root(session: WebSession, request: Request) -> None:
    """GET / -- how to join; or a WebSocket that speaks IRC, also at /irc"""
    if wants_websocket(request):
        return open_websocket(session, request)
    if request.path == "/irc":
        return session.answer(426, "this is a WebSocket that speaks IRC", "Upgrade: websocket")
    page = session.site.web.page(request, session.site, session.conn.secure)
    return session.answer(200, page, "Content-Type: text/html; charset=utf-8", STYLE_ALLOWED)


@on_request("GET", "/health")
def web_health(session: WebSession, request: Request) -> None:
    """GET /health -- for monitors on this machine: 200, or 503 while history is not kept"""
    if not session.for_operators():
        return session.answer(404, "there is no such page")
    trouble = session.site.server.trouble()
    return session.answer(503 if trouble else 200, trouble or "ok")


@on_request("GET", "/metrics")
def web_metrics(session: WebSession, request: Request) -> None:
    """GET /metrics -- figures in Prometheus' text format, for this machine"""
    if not session.for_operators():
        return session.answer(404, "there is no such page")
    lines = []
    for name, (kind, text, value) in session.site.server.metrics().items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    kind = "Content-Type: text/plain; version=0.0.4; charset=utf-8"
    return session.answer(200, "\n".join([*lines, ""]), kind)


# Files: what they are


PICTURE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
SIGNATURES = (  # how content begins, and its type: what is not here is sent as an attachment
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"....ftyp(?:isom|iso[2-6]|mp4[12]|avc1|M4V )", re.DOTALL), "video/mp4"),
    (re.compile(rb"%PDF-"), "application/pdf"),
)
UNKNOWN_TYPE = "application/octet-stream"
RUN_BY_BROWSERS = re.compile(
    r"\.(?:[xs]?html?|xht|mht(?:ml)?|svgz?|xml|xslt?|m?js|css)$", re.IGNORECASE
)
NOT_IN_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def content_type(head: bytes, name: str, whole: bool) -> str:
    """Return the type of content by its first bytes, whatever the uploader says. `whole`: these are
    all its bytes. Text is text/plain, unless a browser would run it."""
    for pattern, kind in SIGNATURES:
        if pattern.match(head):
            return kind
    if NOT_IN_TEXT.search(head) or RUN_BY_BROWSERS.search(name) or not head:
        return UNKNOWN_TYPE
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, whole)
    except UnicodeDecodeError:
        return UNKNOWN_TYPE
    return "text/plain"


JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that have a size


def jpeg_size(head: bytes) -> tuple[int, int]:
    """Return width and height from the frame header of a JPEG (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        if marker == 0xFF:  # one that fills
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            at += 2
        else:
            at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return 0, 0


def webp_size(head: bytes) -> tuple[int, int]:
    """Return width and height of a WebP (RFC 9649)."""
    kind, data = head[12:16], head[20:]
    if kind == b"VP8X" and len(data) >= 10:
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 10:
        width, height = struct.unpack_from("<HH", data, 6)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def picture_size(kind: str, head: bytes) -> tuple[int, int]:
    """Return width and height of a picture, by its first bytes; 0 and 0 if they do not tell, or
    tell what no program could show."""
    width = height = 0
    if kind == "image/png" and head[12:16] == b"IHDR" and len(head) >= 24:
        width, height = struct.unpack_from(">II", head, 16)
    elif kind == "image/gif" and len(head) >= 10:
        width, height = struct.unpack_from("<HH", head, 6)
    elif kind == "image/jpeg":
        width, height = jpeg_size(head)
    elif kind == "image/webp":
        width, height = webp_size(head)
    return (width, height) if 0 < width <= 65535 and 0 < height <= 65535 else (0, 0)


NO_FILE_NAMES = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[\d\u00b9\u00b2\u00b3])\s*(?:\..*)?",
    re.IGNORECASE,
)


def file_name(text: str) -> str:
    """Return a name under which any system can save a file: the last part only, without control and
    format characters, and not a name of a device on Windows."""
    last = re.split(r"[/\\]", text)[-1]
    clean = "".join(" " if c in '<>:"|?*' else c for c in last if is_solid(c) or c == " ")
    clean = cut(" ".join(clean.split()).lstrip(".").rstrip(". "), FILE_NAME_BYTES)
    return f"_{clean}" if NO_FILE_NAMES.fullmatch(clean) else clean or "file"


def disposition_name(header: str) -> str:
    """Return the file name in a Content-Disposition (RFC 6266); "" if there is none."""
    import email.message

    message = email.message.Message()
    message["Content-Disposition"] = header
    with contextlib.suppress(ValueError, LookupError, TypeError):  # of headers that are broken
        name = message.get_filename() or ""
        with contextlib.suppress(UnicodeError):  # UTF-8 as it is, which curl sends
            name = name.encode("latin-1").decode()
        return name
    return ""


def disposition(file: StoredFile) -> str:
    """Return the Content-Disposition of a file, with its name in ASCII and in UTF-8."""
    import urllib.parse

    outside = file.type in (UNKNOWN_TYPE, "application/pdf")  # no sandbox shows a PDF
    kind = "attachment" if outside else "inline"
    ascii_name = re.sub(r'[^ -~]|["\\%]', "_", file.name)
    encoded = urllib.parse.quote(file.name, safe="")
    return f"Content-Disposition: {kind}; filename=\"{ascii_name}\"; filename*=UTF-8''{encoded}"


# Files: who may upload


@in_steps
def prove_owner(session: WebSession, name: str, password: str, then: Callable) -> Steps:
    """Call then(identity) with the account's identity if the password is right. Raises Refused."""
    account, _ = yield from prove(session, name, password)
    then(session.site.hub.accounts[fold(account)].identity)


def authorize(session: WebSession, then: Callable[[str], None]) -> None:
    """Call then(identity) for the credentials of a request: an account's password (Basic) or a
    token (Bearer). A right password is remembered for the connection. Raises Refused."""
    given = session.request.header("authorization")
    if given and given == session.credentials:
        return then(session.owner)
    scheme, _, value = given.partition(" ")

    def proved(owner: str) -> None:
        session.credentials, session.owner = given, owner
        then(owner)

    if scheme.lower() == "bearer":
        hub = session.site.hub
        if owner := session.site.grants.owner(value.strip(), hub.ticks):
            return then(owner)
    elif scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
            return prove_owner(session, name, password, proved)
    text = "log in with your account, or with a token of TOKEN GENERATE FILEHOST"
    raise Refused("SASL_FAILED", text)


# Files: up (https://tus.io/protocols/resumable-upload, 1.0.0)

TUS = "Tus-Resumable: 1.0.0"
CORS_ASKED = (
    "Access-Control-Allow-Methods: GET, HEAD, POST, PATCH, DELETE, OPTIONS",
    "Access-Control-Allow-Headers: Authorization, Content-Type, Content-Disposition, "
    "Content-Length, Range, If-Range, Tus-Resumable, Upload-Length, Upload-Offset, Upload-Metadata",
    "Access-Control-Max-Age: 86400",
)
PIECE_TYPE = "application/offset+octet-stream"
NO_SUCH_FILE = "there is no such file, or not any more"


def is_tus(request: Request) -> bool:
    return "tus-resumable" in request.headers


def answer_file(session: WebSession, status: int, body: str = "", *headers: str) -> None:
    """Answer a request about a file, with the headers for other sites' pages and for tus."""
    tus = (TUS,) if is_tus(session.request) else ()
    session.answer(status, body, *headers, *session.cors(), *tus)


def on_files(method: str, path: str) -> Callable:
    """Decorator: like on_request(); answers 404 if this server keeps no files."""

    def register(handler: Callable) -> Callable:
        @functools.wraps(handler)
        def guarded(session: WebSession, request: Request) -> None:
            if session.site.folder is None:
                return session.answer(404, "this server keeps no files")
            if request.headers.get("tus-resumable", ["1.0.0"]) != ["1.0.0"]:
                return answer_file(session, 412, "this is tus 1.0.0", "Tus-Version: 1.0.0")
            try:
                return handler(session, request)
            except Refused as refusal:
                return session.refuse(refusal)

        return on_request(method, path)(guarded)

    return register


@on_files("OPTIONS", "/files")
@on_files("OPTIONS", "/files/*")
def ask_files(session: WebSession, request: Request) -> None:
    """OPTIONS /files -- what can be uploaded"""
    extensions = "creation,creation-with-upload,termination,expiration"
    tus = ("Tus-Version: 1.0.0", f"Tus-Extension: {extensions}")
    most = f"Tus-Max-Size: {session.site.hub.files.most}"
    allowed = "Allow: GET, HEAD, POST, PATCH, DELETE, OPTIONS"
    answer_file(session, 204, "", allowed, "Accept-Post: */*", *tus, most, *CORS_ASKED)


class Upload:
    """A file that one connection is uploading."""

    def __init__(self, id: str, total: int | None, resumable: bool):
        self.id, self.total = id, total  # bytes; None: until the body ends
        self.resumable = resumable  # what has come stays when the connection breaks
        self.at = 0  # bytes that are on disk
        self.handle: Any = None  # of the folder


def tus_metadata(header: str) -> dict[str, str]:
    """Return the values of Upload-Metadata, by name. Raises Refused."""
    found = {}
    for pair in header.split(",") if header else ():
        name, _, value = pair.strip().partition(" ")
        try:
            found[name] = base64.b64decode(value, validate=True).decode()
        except ValueError:
            raise Refused("BAD_HEADER", "Upload-Metadata has values in base64 of UTF-8") from None
    return found


def drop_upload(session: WebSession, keep: bool) -> None:
    """End an upload before its file is complete; `keep` what has come of it."""
    upload, session.upload, session.take_body = session.upload, None, do_nothing
    session.at_end = do_nothing
    if upload.handle is not None:
        session.site.server.background(FILE_LANE, upload.handle.close)
    session.site.uploading.pop(upload.id, None)
    if not keep:
        session.site.act("remove_file", upload.id)


def link_of(session: WebSession, id: str) -> str:
    """Return the link of a file, with the address that others reach if that is known, else with the
    one that the uploader used."""
    authority = session.request.host or session.conn.local
    base = base_url(session.site, session.conn.secure, authority)
    return f"{base}/files/{id}"


def tell_progress(session: WebSession, id: str, at: int) -> None:
    """Answer with the number of bytes that have come of a file, and its link."""
    file = session.site.hub.files.get(id)
    if file is None:
        return answer_file(session, 404, NO_SUCH_FILE)
    headers = [f"Upload-Offset: {at}"] if is_tus(session.request) else []
    if not file.sha:
        headers.append(f"Upload-Expires: {http_date(file.made / 1000 + UPLOAD_SECONDS)}")
    if session.request.method == "PATCH":
        return answer_file(session, 204, "", *headers)
    if session.request.method == "HEAD":
        known = (f"Upload-Length: {file.size}", "Cache-Control: no-store")
        return answer_file(session, 200, "", *headers, *known)
    return answer_file(session, 201, "", f"Location: {link_of(session, id)}", *headers)


def finish_upload(session: WebSession, upload: Upload) -> None:
    """Complete a file whose bytes are all on disk: also if the connection ends meanwhile."""
    site, files, id = session.site, session.site.hub.files, upload.id
    name = files[id].name if id in files else ""
    session.upload, session.at_end = None, do_nothing
    site.uploading.pop(id, None)
    files.finishing.add(id)

    def completed(_: None) -> None:
        tell_progress(session, id, upload.at)

    def finished(result: Any, is_there: bool) -> None:
        files.finishing.discard(id)
        if not isinstance(result, Exception):
            return site.act("finish_file", id, *result, then=completed if is_there else do_nothing)
        if not upload.resumable:
            site.act("remove_file", id)
        if is_there:
            session.refuse(
                result if isinstance(result, Refused) else Refused("NO_ROOM", str(result))
            )
        return None

    site.server.settle(
        session, FINISH_LANE, functools.partial(site.folder.finish, upload.handle, name), finished
    )


def end_pieces(session: WebSession) -> None:
    """Handle the end of a request's body: complete the file, or answer how much there is."""
    upload = session.upload
    if upload.total is not None and upload.at < upload.total:
        id, at = upload.id, upload.at
        drop_upload(session, keep=upload.resumable)
        if not upload.resumable:
            return answer_file(session, 400, "the body ended too early")
        return tell_progress(session, id, at)
    finish_upload(session, upload)
    return None


def take_piece(session: WebSession, piece: bytes) -> None:
    """Write a piece of the body to disk. The next piece waits for that."""
    upload, folder = session.upload, session.site.folder
    if piece == END_OF_BODY:
        session.take_body = do_nothing
        return end_pieces(session)
    most = session.site.hub.files.most if upload.total is None else upload.total
    if upload.at + len(piece) > most:
        drop_upload(session, keep=False)
        session.closing = True
        return answer_file(session, 413, f"the file has at most {most:,} bytes")
    upload.at += len(piece)
    file = session.site.hub.files.get(upload.id)
    write = do(session.later, FILE_LANE, do(folder.append, upload.handle, piece), do_nothing)
    if upload.total is None and file and upload.at > file.size:
        size = min(most, 2 * upload.at)
        return session.act("resize_file", upload.id, size, then=lambda _: write())
    return write()


def take_pieces(session: WebSession) -> None:
    """Take the body of a request as the next bytes of an upload."""
    session.take_body = functools.partial(take_piece, session)
    request = session.request
    if request.minor and "expect" in request.headers:
        session.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def open_upload(session: WebSession, request: Request, id: str, size: int, _: None) -> None:
    """Take the body of the request that began a file."""
    tus = is_tus(request)
    total = size if tus or request.length is not None else None
    upload = session.upload = Upload(id, total, resumable=tus)
    session.at_end = functools.partial(drop_upload, session, keep=tus)
    has_body = request.length != 0
    piece_type = request.header("content-type").partition(";")[0].strip().lower()
    if tus and has_body and piece_type != PIECE_TYPE:
        drop_upload(session, keep=False)
        return answer_file(session, 415, f"the Content-Type of a piece is {PIECE_TYPE}")

    def opened(handle: Any) -> None:
        upload.handle = handle
        if has_body:
            return take_pieces(session)
        return end_pieces(session)

    session.later(FILE_LANE, functools.partial(session.site.folder.begin, id), opened)
    return None


def begin_upload(session: WebSession, request: Request, size: int, owner: str) -> None:
    """Register a new file for an authorized client, and take the body."""
    id, name = secrets.token_hex(16), disposition_name(request.header("content-disposition"))
    if is_tus(request):
        known = tus_metadata(request.header("upload-metadata"))
        name = known.get("filename", "") or known.get("name", "")
    values = (file_name(name), UNKNOWN_TYPE, size, owner, session.conn.limit_key)
    then = functools.partial(open_upload, session, request, id, size)
    session.act("begin_file", id, *values, then=then)


@on_files("POST", "/files")
def create_file(session: WebSession, request: Request) -> None:
    """POST /files -- upload a file, or with Tus-Resumable begin to: 201 with its Location"""
    length = request.header("upload-length") if is_tus(request) else str(request.length or "")
    if is_tus(request) and not re.fullmatch(r"[0-9]{1,18}", length):
        return answer_file(session, 400, "Upload-Length is the number of bytes")
    most = session.site.hub.files.most
    unknown = min(most, CHUNKS_RESERVED)
    size = int(length) if length else (0 if request.length == 0 else unknown)
    if size > most:
        return answer_file(session, 413, f"a file has at most {most:,} bytes")
    authorize(session, functools.partial(begin_upload, session, request, size))
    return None


def own_file(session: WebSession, request: Request, then: Callable[[StoredFile], None]) -> None:
    """Call then(file) if the file of a request belongs to the user who asks. Raises Refused."""

    def check(owner: str) -> None:
        file = session.site.hub.files.get(request.path.removeprefix("/files/"))
        if file is None:
            return answer_file(session, 404, NO_SUCH_FILE)
        if not session.site.hub.same_person(file.owner, owner):
            return answer_file(session, 403, "this is another user's file")
        return then(file)

    authorize(session, check)


@on_files("PATCH", "/files/*")
def continue_file(session: WebSession, request: Request) -> None:
    """PATCH /files/ID -- the next bytes of an upload, from Upload-Offset on (tus)"""
    if request.header("content-type").partition(";")[0].strip().lower() != PIECE_TYPE:
        return answer_file(session, 415, f"the Content-Type of a piece is {PIECE_TYPE}")
    if not re.fullmatch(r"[0-9]{1,18}", request.header("upload-offset")):
        return answer_file(session, 400, "Upload-Offset is where the piece begins")
    offset = int(request.header("upload-offset"))

    def begin(file: StoredFile) -> None:
        site = session.site
        if file.sha:
            return answer_file(session, 403, "this file is complete")
        if file.id in site.hub.files.finishing:
            return answer_file(session, 423, "this file is just being completed")
        if (other := site.uploading.get(file.id)) and other is not session:
            other.conn.close()  # a connection that broke, and whose end was not noticed
        upload = session.upload = Upload(file.id, file.size, resumable=True)
        session.at_end = functools.partial(drop_upload, session, keep=True)
        site.uploading[file.id] = session
        job = functools.partial(site.folder.reopen, file.id)
        return session.later(FILE_LANE, job, functools.partial(opened, upload))

    def opened(upload: Upload, found: tuple[Any, int]) -> None:
        upload.handle, upload.at = found
        if upload.at != offset:
            at = upload.at
            drop_upload(session, keep=True)
            return answer_file(session, 409, f"the next byte is {at}", f"Upload-Offset: {at}")
        if request.length == 0:
            return end_pieces(session)
        return take_pieces(session)

    return own_file(session, request, begin)


@on_files("DELETE", "/files/*")
def delete_file(session: WebSession, request: Request) -> None:
    """DELETE /files/ID -- remove a file of your own, complete or not"""

    def remove(file: StoredFile) -> None:
        if file.id in session.site.hub.files.finishing:
            return answer_file(session, 423, "this file is just being completed")
        if other := session.site.uploading.get(file.id):
            other.conn.close()
        session.act("remove_file", file.id, then=lambda _: answer_file(session, 204))

    own_file(session, request, remove)


def tell_offset(session: WebSession, request: Request) -> None:
    """Answer HEAD with Tus-Resumable: how many bytes of an upload there are."""

    def look(file: StoredFile) -> None:
        if file.sha or file.id in session.site.hub.files.finishing:
            return tell_progress(session, file.id, file.size)
        job = functools.partial(session.site.folder.size, file.id)
        return session.later(FILE_LANE, job, functools.partial(tell, file))

    def tell(file: StoredFile, at: int) -> None:
        if at < file.size:
            return tell_progress(session, file.id, at)
        upload = Upload(file.id, file.size, resumable=True)  # the server ended before it was
        job = functools.partial(session.site.folder.reopen, file.id)
        return session.later(FILE_LANE, job, functools.partial(complete, upload))

    def complete(upload: Upload, found: tuple[Any, int]) -> None:
        upload.handle, upload.at = found
        finish_upload(session, upload)

    own_file(session, request, look)


# Files: down


def wanted_range(header: str, size: int) -> tuple[int, int] | None:
    """Return first byte and end of a Range (RFC 9110 section 14). None means all of the file, as
    for several ranges and for invalid ones. Raises Refused if the range is outside the file."""
    match = re.fullmatch(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", header)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        first, end = max(0, size - int(match[2])), size
    else:
        first, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < first:
            return None
    if first >= end:
        raise Refused("NO_RANGE", f"the file has {size:,} bytes")
    return first, end


def etags(header: str) -> list[str]:
    return re.findall(r'(?:W/)?"[^"]*"|\*', header)


def not_needed(request: Request, etag: str) -> int:
    """Return the status if the request's conditions ask for an answer without content; else 0."""
    matches, unless = etags(request.header("if-match")), etags(request.header("if-none-match"))
    if matches and not {etag, "*"} & set(matches):
        return 412
    return 304 if {etag, f"W/{etag}", "*"} & set(unless) else 0


def stop_sending(session: WebSession) -> None:
    handle, session.reading, session.at_end = session.reading, None, do_nothing
    session.site.server.background(READ_LANE, handle.close)
    session.end_answer()


def send_piece(session: WebSession, piece: bytes) -> None:
    """Send a piece of a file; an empty one ends the connection: the length was promised."""
    if piece:
        session.send(piece)
    else:
        session.unfinished = None
        session.closing = True
        stop_sending(session)


def pieces_of_file(session: WebSession, at: int, end: int) -> Iterator[None]:
    """Send a file in pieces, each when the one before it is nearly sent."""
    hub, most = session.site.hub, FILE_PIECE_BYTES
    while at < end:
        size, asked = min(most, end - at), hub.ticks
        read = functools.partial(session.site.folder.read, session.reading, at, size)
        session.later(READ_LANE, read, functools.partial(send_piece, session))
        yield
        at += size
        fast = hub.ticks - asked < FAST_PIECE_MS
        most = min(most * 2, FILE_PIECE_MOST) if fast else FILE_PIECE_BYTES
    stop_sending(session)


def begin_sending(
    session: WebSession, status: int, headers: list[str], first: int, end: int, handle: Any
) -> None:
    if handle is None:
        return answer_file(session, 404, NO_SUCH_FILE)
    session.send_head(status, *headers)
    session.reading = handle
    session.at_end = functools.partial(session.site.server.background, READ_LANE, handle.close)
    if session.request.method == "HEAD" or first == end:
        return stop_sending(session)
    session.unfinished = pieces_of_file(session, first, end)
    return None


@on_files("GET", "/files/*")
def send_file(session: WebSession, request: Request) -> None:
    """GET /files/ID -- a file, or a range of it"""
    if request.method == "HEAD" and is_tus(request):
        return tell_offset(session, request)
    file = session.site.hub.files.get(request.path.removeprefix("/files/"))
    if file is None or not file.sha:
        return answer_file(session, 404, NO_SUCH_FILE)
    etag = f'"{file.sha}"'
    headers = [f"ETag: {etag}", "Cache-Control: private, no-cache"]
    if status := not_needed(request, etag):
        return answer_file(session, status, "", *headers)
    asked = request.header("range")
    if request.header("if-range") not in ("", etag) or request.method == "HEAD":
        asked = ""
    try:
        part = wanted_range(asked, file.size)
    except Refused as refusal:
        return answer_file(session, 416, str(refusal), f"Content-Range: bytes */{file.size}")
    first, end = part or (0, file.size)
    if part:
        headers.append(f"Content-Range: bytes {first}-{end - 1}/{file.size}")
    charset = "; charset=utf-8" if file.type == "text/plain" else ""
    headers += [f"Content-Type: {file.type}{charset}", disposition(file), "Accept-Ranges: bytes"]
    allowed = "; media-src 'self'; style-src 'unsafe-inline'" * file.type.startswith("video/")
    policy = f"Content-Security-Policy: default-src 'none'{allowed}; sandbox"
    headers += [policy, *session.cors()]
    headers += [f"Content-Length: {end - first}"]
    job = functools.partial(session.site.folder.open, file.sha)
    opened = functools.partial(begin_sending, session, 206 if part else 200, headers, first, end)
    return session.later(READ_LANE, job, opened)


# ======================================================================================
# FIRST LINE
# ======================================================================================
# One port for every dialect: the first line decides. A client that knows a protocol speaks
# first; to a silent one the server says a line that every IRC client ignores and
# every person understands.

GREETING = (
    f":chat.py/{VERSION} NOTICE * :type a name and press return (IRC clients: ignore this)\r\n"
).encode()
IRC_FIRST = re.compile(rb"(?:@\S* +)?(?:CAP|NICK|USER|PASS|AUTHENTICATE|PING|QUIT|WEBIRC)(?: |$)")
HTTP_FIRST = re.compile(  # also of requests that are none: no web page may speak in a chat
    rb"(?:GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE|CONNECT)[ \t].*|.* HTTP/[\d.]+[ \t]*",
    re.IGNORECASE,
)
HTTP_VERSION = re.compile(rb" HTTP/([\d.]+)[ \t]*$", re.IGNORECASE)
BOM = b"\xef\xbb\xbf"

NOT_HTTP_1 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nContent-Type: text/plain\r\n"
    b"Connection: close\r\n\r\nThis server speaks HTTP/1.1.\n"
)


def dialect_of(first_line: bytes) -> str:
    """Return the dialect of a first line: "irc" (a BOM does no harm), "line", "http" or another."""
    if IRC_FIRST.match(first_line.removeprefix(BOM)):
        return "irc"
    if HTTP_FIRST.fullmatch(first_line):
        version = HTTP_VERSION.search(first_line)
        return "http" if version is None or version[1][:2] == b"1." else "other http"
    return "line"


# ======================================================================================
# CLIENT CORE
# ======================================================================================
# A client's conversation without a screen or a socket: bytes and typed text in, views and bytes
# out. The terminal and the window drive the same object. The core first finds out the kind of the
# server. Then a talk (IrcTalk, PlainTalk) handles the protocol until the connection ends. Rooms and
# outbox belong to the core, because they outlast a connection.
#
# No message is lost or doubled. A message stays in the outbox until the server has acknowledged it,
# and is sent again under the same id. A room knows the last message up to which it holds
# everything. After a break the room asks for the messages after that one, and live messages wait
# until those have come.

CHAT, IRC, PLAIN = "chat.py", "irc", "plain"  # the kinds of server this client can talk to

SAID, CAME, WENT, TOLD = "said", "came", "went", "told"
NOTE, STATUS, UP, PEOPLE, NOTICED = "note", "status", "up", "people", "noticed"
ARRIVED, FAILED, BACK, OLDER, PLACE = "arrived", "failed", "back", "older", "place"
REMOVED, CLEARED, FOUND, MOVED, PAGE = "removed", "cleared", "found", "moved", "page"
REACTED, TYPING, ROOM, READ, RESET = "reacted", "typing", "room", "read", "reset"
TRANSFER = "transfer"


# Causes: why a connection ended, or why the server refused it; see Link
TEMPORARY, NEEDS_USER, FATAL = "temporary", "needs the user", "fatal"


class View(NamedTuple):
    """A thing for a screen to show: a message, a notice or a change of state."""

    # SAID: a message; NOTICED: a NOTICE of IRC; CAME, WENT: a user joined or left; TOLD: a text of
    # the server; NOTE: a text of this client; STATUS of the connection, UP when it stands; PEOPLE:
    # the members changed, with a text if the user asked for them; ARRIVED, FAILED: the outcome of a
    # message of the user; BACK: a text that was not accepted, to be edited; OLDER: so many views
    # were put before the others of a room; PLACE: the user goes to another room, which has so many
    # new messages; REMOVED: the message with this id was redacted; CLEARED: begin with an empty
    # page; FOUND: an old message that was asked for; MOVED: several joins and quits in one row;
    # PAGE: a text with a name, to be read apart from the messages; REACTED: a user reacted to the
    # message with this id, or removed the reaction (number -1); TYPING: a user is typing, paused or
    # done; ROOM: another property of a conversation changed; READ: the user read it elsewhere;
    # RESET: its rows begin with the next view; TRANSFER: a file transfer began, moved on or ended
    kind: str
    text: str = ""
    name: str = ""
    where: str = ""  # a channel, or the user in a private conversation; "" for neither
    time: int | None = None  # milliseconds since 1970; None is now
    mine: bool = False
    called: bool = False  # meant for the user: the nick is in it, or no other user hears it
    past: bool = False  # from history, so no news
    id: str = ""  # the server's id of a message
    own_id: str = ""  # this client's id of its own message
    address: str = ""  # of the user who joined or left
    line: str = ""  # as a server of the line protocol wrote it
    number: int = 0  # of the row in the client store, if the view comes from there
    room: int = 0  # id of the conversation; 0 for none
    reply: str = ""  # the server's id of the message that this one answers
    file: str = ""  # about the file linked in it, as the server tells: see parse_file_tag()


class Heard(NamedTuple):
    """A parsed line of IRC from a server, with its source."""

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
    """Return a server's line as text that cannot steer a terminal. The CTCP mark (0x01) stays."""
    parts = raw.decode(errors="replace").split("\x01")
    return "\x01".join(harmless(COLOURS.sub("", part)) for part in parts).translate(BIDI_CONTROLS)


def parse_heard(line: str) -> Heard:
    body = line.partition(" ")[2].lstrip(" ") if line.startswith("@") else line
    source = body[1:].partition(" ")[0] if body.startswith(":") else ""
    return Heard(source, *parse_message(line))


client_command = Commands("/")
CLIENT_ALIASES = {
    "j": "join",
    "n": "names",
    "w": "whois",
    "tell": "msg",
    "leave": "part",
    "quote": "raw",
    "exit": "quit",
    "bye": "quit",
    "hop": "reconnect",
}


def completions(word: str, first: bool, names: Iterable[str], rooms: Iterable[str]) -> list[str]:
    """Return the completions of a word: commands, channels or names. At the start of a line
    (`first`), commands are completed, and a colon follows a name. Names keep the order given."""
    if word[:1] == "/" and first:
        verbs = (*client_command, *CLIENT_ALIASES)
        return sorted(f"/{verb} " for verb in verbs if len(verb) > 1 and verb.startswith(word[1:]))
    if word[:1] == "#":
        return [f"{room} " for room in rooms if fold(room).startswith(fold(word))]
    end = ": " if first else " "
    return [name + end for name in names if fold(name).startswith(fold(word))]


def calls(text: str, name: str) -> bool:
    """Return whether `text` contains this name as a separate word, in any case."""
    key, folded = fold(name), fold(text)
    return key in folded and bool(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", folded))


def beginning(text: str) -> str:
    """Return a text to quote in a notice: all of it, or the cut first line of a long one."""
    first, newline, _ = text.partition("\n")
    return f"{cut(first, QUOTED_BYTES)} \u2026" if newline or len(first) > QUOTED_BYTES else first


def is_quit(text: str) -> bool:
    """Return whether a text is the command /quit, after which the client does not reconnect."""
    return text.lower().split()[:1] == ["/quit"]


def is_channel(name: str) -> bool:
    """Return whether a name looks like a channel's, for code that has no server to ask."""
    return name[:1] in ("#", "&", "+", "!")


CASE_MAPPINGS = {  # names of 005's CASEMAPPING -> capitals and their small letters
    "ascii": str.maketrans(string.ascii_uppercase, string.ascii_lowercase),
    "rfc1459": str.maketrans(string.ascii_uppercase + "[]\\~", string.ascii_lowercase + "{}|^"),
    "rfc1459-strict": str.maketrans(
        string.ascii_uppercase + "[]\\", string.ascii_lowercase + "{}|"
    ),
}
CASE_MAPPINGS["strict-rfc1459"] = CASE_MAPPINGS["rfc1459-strict"]
UNICODE_MAPPINGS = ("rfc7613", "rfc8265", "precis")  # of servers that allow all of Unicode
PARAMETER_MODES = "beIqaohvkl"  # modes with a parameter, where 005 has no CHANMODES


class ServerProfile:
    """The abilities of a server and its rule for names, from CAP, 004 and 005. RFC 1459 applies
    where the server says nothing. `before` is the profile of an earlier connection."""

    def __init__(self, ours: bool = True, before: "ServerProfile | None" = None):
        self.ours = ours  # the server is a chat.py
        self.offered: dict[str, str] = {}  # capabilities and their values
        self.enabled: set[str] = set()
        self.told = False  # 004 has come, and 005 if there is one
        kept = ("CASEMAPPING", "CHANTYPES") if before else ()
        self.tokens = {
            name: before.tokens[name] for name in kept if name in before.tokens
        }  # of 005

    # Names

    def fold(self, name: str) -> str:
        """Return the key of a name. Names with the same key are the same name to this server."""
        if self.ours:
            return fold(name)
        mapping = self.tokens.get("CASEMAPPING", "rfc1459" if self.told else "ascii").lower()
        if mapping in UNICODE_MAPPINGS:
            return fold(name)
        return name.translate(CASE_MAPPINGS.get(mapping, CASE_MAPPINGS["ascii"]))

    @property
    def channel_types(self) -> str:
        return self.tokens.get("CHANTYPES", "#" if self.ours else "#&")

    def is_channel(self, name: str) -> bool:
        return bool(name) and name[0] in self.channel_types

    def as_channel(self, name: str) -> str:
        """Return the full name of a channel, which a user may type without its first character."""
        known = self.is_channel(name) or name[:1] in "#&!+"
        return name if known else f"{self.channel_types[:1] or '#'}{name}"

    def without_status(self, target: str) -> str:
        """Return the channel of a target like @#channel (STATUSMSG); other targets unchanged."""
        bare = target[1:]
        return bare if target[:1] in self.status and self.is_channel(bare) else target

    @property
    def status(self) -> str:
        return self.tokens.get("STATUSMSG", "")

    @property
    def ranks(self) -> tuple[str, str]:
        """The letters of the modes that are ranks, and the symbols of these ranks before names."""
        letters, _, symbols = self.tokens.get("PREFIX", "(ov)@+").removeprefix("(").partition(")")
        return letters, symbols

    def takes_parameter(self, letter: str, sign: str) -> bool:
        """Return whether a parameter follows a channel mode (Modern IRC, CHANMODES)."""
        if letter in self.ranks[0]:
            return True
        lists, always, on_set, *_ = (*self.tokens.get("CHANMODES", "").split(","), "", "", "")
        if "CHANMODES" not in self.tokens:
            return letter in PARAMETER_MODES and (letter != "l" or sign == "+")
        return letter in lists + always or (letter in on_set and sign == "+")

    def mode_changes(self, letters: str, values: list[str]) -> Iterator[tuple[str, str, str]]:
        """Yield the changes of a MODE: sign, letter and parameter ("" if there is none)."""
        left, sign = iter(values), "+"
        for letter in letters:
            if letter in "+-":
                sign = letter
            else:
                value = next(left, "") if self.takes_parameter(letter, sign) else ""
                yield sign, letter, value

    # Limits

    def limit(self, name: str, usual: int) -> int:
        """Return the number of a token of 005, or `usual` if the server has announced none."""
        return whole_number(self.tokens.get(name, "")) or usual

    @property
    def page_size(self) -> int:
        return min(self.limit("CHATHISTORY", PAGE_LINES), PAGE_LINES)

    @property
    def multiline_limits(self) -> tuple[int, int]:
        """The most bytes and lines of one message (draft/multiline)."""
        value = parse_tags(self.offered.get("draft/multiline", "").replace(",", ";"))
        size, lines = (whole_number(value.get(f"max-{one}", "")) for one in ("bytes", "lines"))
        return size or LINE_BYTES, lines or MESSAGE_LINES

    # Echoes and message tags

    def takes(self, tag: str) -> bool:
        """Return whether the server passes on a client-only tag, also back to this client."""
        denied = self.tokens.get("CLIENTTAGDENY", "").split(",")
        name = tag.removeprefix("+")
        allowed = f"-{name}" in denied or not ({"*", name} & set(denied))
        return "message-tags" in self.enabled and allowed

    @property
    def keeps_own_tags(self) -> bool:
        return self.takes(OWN_ID)

    @property
    def labels(self) -> bool:
        return {"labeled-response", "batch"} <= self.enabled

    @property
    def echoes(self) -> bool:
        """True if messages come back recognizably, which tells the client that they arrived."""
        return "echo-message" in self.enabled and (self.labels or self.keeps_own_tags)

    @property
    def repeatable(self) -> bool:
        """True if a message that is sent twice with the same id is delivered only once."""
        return self.echoes and "chat.py/session" in self.enabled

    @property
    def pages(self) -> bool:
        """True if the server has CHATHISTORY and message ids."""
        return {"draft/chathistory", "batch", "message-tags", "server-time"} <= self.enabled

    @property
    def multiline(self) -> bool:
        return {"draft/multiline", "batch"} <= self.enabled


def size_text(size: int) -> str:
    """Return a number of bytes as readable text: 512 B, 1.5 KB, 20 MB."""
    number = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1024
    shown = f"{number:.1f}".removesuffix(".0") if number < 10 else f"{number:.0f}"
    return f"{shown} {unit}"


class FileTag(NamedTuple):
    """A file whose link is in a message, as the server describes it (chat.py/file)."""

    path: str
    type: str
    size: int
    width: int = 0
    height: int = 0

    def words(self) -> str:
        """Return a readable description: picture, 120 KB, 640x480."""
        kind = "picture" if self.type in PICTURE_TYPES else self.type
        pixels = f", {self.width:,}\u00d7{self.height:,}" * bool(self.width)
        return f"{kind}, {size_text(self.size)}{pixels}"


def linked_name(view: "View") -> str:
    """Return the name of the file that a message links to; "" if it does not tell."""
    named = re.match(r"(.+) \([^()]*\): \S+$", view.text)
    return file_name(named[1]) if named else ""


def parse_file_tag(value: str) -> FileTag | None:
    """Return the file that a message's tag describes; None if the tag is empty or malformed."""
    path, *rest = value.split(",")
    if not FILE_LINK.fullmatch(path) or len(rest) != 4:
        return None
    kind, *numbers = rest
    if not re.fullmatch(rf"{TOKEN_CHARACTERS}/{TOKEN_CHARACTERS}", kind):
        return None
    if not all(re.fullmatch(r"[0-9]{1,15}", number) for number in numbers):
        return None
    return FileTag(path, kind, *map(int, numbers))


class Transfer:
    """A file being uploaded or downloaded, as the client store keeps it."""

    KEPT = ("id", "up", "room", "path", "name", "size", "url", "type", "etag")

    def __init__(self, id: str, up: bool, room: str, path: str, **known: Any):
        self.id, self.up = id, up
        self.room = room  # conversation for the link
        self.path = path  # on this computer
        self.name, self.size, self.type, self.etag = "", 0, "", ""
        self.url = ""  # on the server; "" while unknown
        for name, value in known.items():
            setattr(self, name, value)
        self.done = 0  # bytes that have arrived
        self.state = "waiting"  # or "running", "failed"; complete transfers are removed
        self.why = ""  # the reason for waiting or for the failure

    def kept(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.KEPT}

    def words(self) -> str:
        """Return the progress of the transfer as readable text."""
        verb = "sending" if self.up else "saving"
        share = f" {100 * self.done // self.size} %" if self.size else ""
        why = f" ({self.why})" if self.why and self.state != "running" else ""
        return f"{verb} {self.name}{share}{why}"


# Messages that have not arrived


class Setting(NamedTuple):
    """A setting that the user may change."""

    usual: str
    values: tuple[str, ...]  # allowed values; () is any
    summary: str


SETTINGS = {
    "bell": Setting("on", ("on", "off"), "ring when you are called"),
    "desktop": Setting("on", ("on", "off"), "tell the desktop when you are called: the window"),
    "fold": Setting("on", ("on", "off"), "show the joins and quits of many in one row"),
    "font": Setting("", (), "the font's family: the window"),
    "highlight": Setting("", (), "words besides your nick that call you"),
    "typing": Setting("on", ("on", "off"), "tell others that you are typing"),
    "notify": Setting("off", ("off", "9", "777"), "tell the terminal when you are called, by OSC"),
    "size": Setting("", (), "the font's size in points: the window"),
    "theme": Setting("auto", ("auto", "light", "dark"), "colours: the window"),
    "time": Setting("%H:%M", (), "how times are shown, as strftime has it"),
}


def is_news(view: View) -> bool:
    """Return whether a view is a message of another user."""
    return view.kind in (SAID, NOTICED) and not view.mine


def identity_of(view: View) -> Any:
    """Return a value that distinguishes a message: its id, or else its time, name and text."""
    return view.id or (view.time, view.name, view.text)


class Waiting(NamedTuple):
    """A message that is not known to have arrived."""

    id: str
    where: str
    text: str
    kind: str  # MESSAGE or ACTION
    sent: bool = False  # at least once, perhaps by an earlier run
    reply: str = ""  # the server's id of the message that it answers
    at: int = 0  # characters of the text that have arrived; the rest is still to be sent


def accepted_at(own_id: str) -> int | None:
    """Return the time in milliseconds at which a message was accepted, from the id that the client
    gave it; None for an id of another form."""
    head = own_id.partition("-")[0]
    return int(head, 16) if re.fullmatch(r"[0-9a-f]{1,12}", head) else None


class Outbox:
    """The accepted messages that are not known to have arrived, in order. A `journal` outlives the
    program: append(record) raises Unusable on failure, and clear() empties the journal."""

    def __init__(self, journal: Any = None, secret: str = "", waiting: Iterable[Waiting] = ()):
        self.journal = journal
        self.secret = secret or secrets.token_hex(SECRET_DIGITS // 2)
        self.waiting = {one.id: one for one in waiting}
        self.in_flight: dict[str, None] = {}  # sent over this connection
        self.window = 1  # how many may be in flight: doubled each round trip, 1 after a break ...
        self.most = SENT_AHEAD  # ... and at most so many
        self.unconfirmed: set[str] = set()  # sent over a lost connection; history will tell
        self.parked: dict[str, str] = {}  # left to the user (/retry, /cancel), and why

    def add(self, now: float, where: str, text: str, kind: str, reply: str = "") -> Waiting:
        """Accept a message at wall time `now` (s). Raises Unusable if it cannot be stored."""
        id = f"{int(now * 1000):x}-{secrets.token_hex(8)}"
        one = Waiting(id, where, text, kind, reply=reply)
        if self.journal:
            self.journal.append({"say": one})
        self.waiting[one.id] = one
        return one

    def next(
        self, carries: Callable[[Waiting], bool], waits: Callable[[Waiting], bool] | None = None
    ) -> Waiting | None:
        """Return the message to send now, or None. carries(message) tells if the talk can send it
        yet, else waits(message) tells if later messages wait for it. No message overtakes an
        earlier one, except if both are false, or if the earlier one was left to the user."""
        if len(self.in_flight) >= self.window:
            return None
        later = self.in_flight.keys() | self.parked.keys()
        there = (one for id, one in self.waiting.items() if id not in later)
        one = next((one for one in there if carries(one) or (waits and waits(one))), None)
        if one is None or one.id in self.unconfirmed or not carries(one):
            return None
        return one

    def send(self, one: Waiting) -> None:
        """Note that a message is being sent."""
        self.in_flight[one.id] = None
        if not one.sent:
            self.waiting[one.id] = one._replace(sent=True)
            self._note({"sent": one.id})

    def arrived_to(self, id: str, at: int) -> None:
        """Note that a message has arrived up to character `at`: some are sent as many lines."""
        one = self.waiting.get(id)
        if one and at > one.at:
            self.waiting[id] = one._replace(at=at)
            self._note({"at": [id, at]})

    def arrived(self, id: str) -> Waiting | None:
        """Remove and return a message that arrived, or that must not be sent again."""
        if id in self.in_flight:
            del self.in_flight[id]
            self.window = min(self.most, self.window + 1)
        self.unconfirmed.discard(id)
        self.parked.pop(id, None)
        one = self.waiting.pop(id, None)
        if one:
            self._note({"done": id})
        return one

    def _note(self, record: dict[str, Any]) -> None:
        if self.journal:
            with contextlib.suppress(Unusable):  # then the message is sent again, known as a repeat
                self.journal.append(record)
                if not self.waiting:
                    self.journal.clear()

    def park(self, id: str, why: str) -> None:
        """Keep a message from being sent until the user decides about it; `why` is the reason."""
        self.in_flight.pop(id, None)
        self.unconfirmed.discard(id)
        self.parked[id] = why

    def retry(self, id: str) -> None:
        """Let a message that was left to the user be sent again."""
        self.parked.pop(id, None)

    def readdress(self, is_old: Callable[[str], bool], new: str) -> None:
        """Send the remaining messages of a renamed conversation to `new`; is_old(name) tells
        which."""
        for id, one in self.waiting.items():
            if is_old(one.where) and id not in self.in_flight:
                self.waiting[id] = one._replace(where=new)
                self._note({"say": self.waiting[id]})
                self._note({"sent": id} if one.sent else {})

    def take_back(self, sent: Iterable[Waiting]) -> None:
        """Put back messages that have not arrived. Raises Unusable if they cannot be stored."""
        self.waiting = {one.id: one for one in sent} | self.waiting
        for one in sent if self.journal else ():
            self.journal.append({"say": one})

    def connection_lost(self) -> list[Waiting]:
        """Return the messages in flight, and note that no message is in flight any more."""
        flown, self.in_flight = [self.waiting[id] for id in self.in_flight], {}
        self.window = 1
        return flown


class Transcript(collections.deque):
    """The views of a room, the oldest first, and the number of views ever appended. The oldest ones
    go when there are too many, but not while the user scrolls back."""

    total = 0
    reading = False
    dropped = False  # older views were dropped: there is more before the first one

    def append(self, view: View) -> None:
        self.total += 1
        super().append(view)
        if len(self) > VIEWS_KEPT and not self.reading:
            self.trim()

    def trim(self) -> None:
        while len(self) > VIEWS_KEPT:
            self.popleft()
            self.dropped = True


def moved_text(moves: Iterable[View]) -> str:
    """Return one line about the users who joined and left; name a user who did both once."""
    last: dict[str, list[str]] = {}
    for view in moves:
        last.setdefault(view.name, []).append(view.kind)
    groups: dict[str, list[str]] = {}
    for name, kinds in last.items():
        both = f"{'joined' if kinds[0] == CAME else 'left'} and " if kinds[0] != kinds[-1] else ""
        if both:
            what = both + ("left" if kinds[-1] == WENT else "came back")
        else:
            what = "joined" if kinds[-1] == CAME else "left"
        groups.setdefault(what, []).append(name)
    told = []
    for what, names in groups.items():
        more = f" and {len(names) - MOVES_NAMED:,} more" if len(names) > MOVES_NAMED else ""
        told.append(f"{', '.join(names[:MOVES_NAMED])}{more} {what}")
    return "; ".join(told)


def remember(ids: dict[str, None], id: str) -> None:
    """Add an id to the known ids, and forget the oldest one if there are too many."""
    ids[id] = None
    if len(ids) > IDS_KEPT:
        del ids[next(iter(ids))]


ROOM_IDS = itertools.count(1)


class Room:
    """A channel, or a private conversation, as this client knows it."""

    def __init__(self, name: str, password: str = "", channel: bool | None = None):
        self.id = next(ROOM_IDS)  # stays when the name changes
        self.name, self.password = name, password
        self.is_channel = is_channel(name) if channel is None else channel
        self.people: dict[str, str] = {}  # ranks by name; the last speaker is last
        self.topic = ""
        self.inside = False
        self.wanted = False  # to be joined again after a break ...
        self.entered = False  # ... unless the session is resumed, which includes it
        self.mark = ""  # everything up to here (msgid=... or timestamp=...) is held ...
        self.mark_time: int | None = None  # ... and the time of that message
        self.holes: list[str] = []  # ids of messages before which others are missing, newest last
        self.paged: View | None = None  # the oldest of a page without visible messages
        self.held: list[View] | None = None  # views that wait for earlier pages ...
        self.spilled = False  # ... and were too many to be held: pages will bring them

        self.draft = ""  # text typed here and not sent yet
        self.gone: bool | None = None  # the user of a private conversation has left, if known
        self.views = Transcript()
        self.whole = False  # the server has nothing older than the first of these
        self.spoken: dict[str, None] = {}  # names of users who wrote a message here
        self.moves: list[View] = []  # joins and quits collected for one row ...
        self.moved_at = -MOVES_MS  # ... and when the last such row was shown
        self.unread = self.called = 0
        self.muted = False  # messages here do not call the user
        self.read_time = 0  # ms; messages up to then were read, on some device ...
        self.told_time = 0  # ... and the time that the server knows
        self.typing: dict[str, float] = {}  # names of typing users, and until when (ticks)
        self.asked_people = False  # over this connection: who is away

    @property
    def hole(self) -> str:
        """The id of the newest message before which others are missing; "" if there is none."""
        return self.holes[-1] if self.holes else ""

    @property
    def oldest(self) -> str:
        """The id of the first message in this room; "" if there is none."""
        return next((view.id for view in self.views if view.id and view.kind != FOUND), "")

    def hold(self, view: View) -> None:
        """Hold a view until older messages have come. Too many are dropped: pages bring them."""
        self.held.append(view)
        if len(self.held) > VIEWS_KEPT:
            self.held, self.spilled = [], True

    def came(self, name: str, ranks: str = "") -> None:
        """Add a member, up to a limit: a server may invent any number."""
        if len(self.people) < PEOPLE_LISTED and len(name.encode()) <= NAME_BYTES:
            self.people[name] = ranks

    def spoke(self, name: str) -> None:
        remember(self.spoken, name)
        if name in self.people:
            self.people[name] = self.people.pop(name)

    def renamed(self, name: str, new: str) -> bool:
        if name not in self.people:
            return False
        self.people[new] = self.people.pop(name)
        return True

    def name_view(self, own_id: str, id: str, file: str = "") -> None:
        """Add the server's id and file to the view of a message that this client sent."""
        for n in range(len(self.views) - 1, -1, -1):
            if self.views[n].own_id == own_id:
                self.views[n] = self.views[n]._replace(id=id, file=file)
                return

    def drop(self, unwanted: Callable[[View], bool]) -> bool:
        """Remove the unwanted views; return whether there were any."""
        kept = [view for view in self.views if not unwanted(view)]
        dropped = len(kept) < len(self.views)
        if dropped:
            self.views.clear()
            self.views.extend(kept)
        return dropped

    def show_moves(self) -> View:
        """Append the collected joins and quits as one row; return the row."""
        moves, self.moves = self.moves, []
        row = View(MOVED, moved_text(moves), where=self.name, time=moves[-1].time)
        self.views.append(moves[0] if len(moves) == 1 else row)
        self.moved_at = row.time or 0
        return row

    def read(self, when: int) -> bool:
        """Note that messages up to a time (ms) have been read; return whether that is new."""
        if when <= self.read_time:
            return False
        self.read_time = when
        later = [view for view in self.views if is_news(view) and (view.time or 0) > when]
        self.unread = len(later)
        self.called = 0 if self.muted else sum(view.called for view in later)
        return True

    def rank(self, name: str, symbol: str, on: bool, symbols: str) -> None:
        """Give a rank to a member, or remove it. `symbols` are all ranks, the highest first."""
        if name in self.people:
            before = self.people[name]
            self.people[name] = "".join(
                one for one in symbols if (on if one == symbol else one in before)
            )


# The workshop's protocol

PLAIN_LINES = {
    CAME: re.compile(r"([^:]*) \((\S+)\) joined the chat!"),
    WENT: re.compile(r"([^:]*) \((\S+)\) left the chat!"),
    SAID: re.compile(r"([^:*][^:]*): (.*)"),
}
IRC_SPEAKS = re.compile(r":|NOTICE |ERROR |PING ")  # beginning of a line of an IRC server
# A server that answers a nick with such a line is no workshop server
WANTS_IRC = re.compile(r":chat\.py/|:\S+ (?:421|451) |ERROR :")
TLS_RECORDS = (b"\x15\x03", b"\x16\x03")  # beginning of an alert, or of a handshake
OTHER_PROTOCOLS = (  # beginning of the first line of a server that is not for chat
    ("SSH", re.compile(r"SSH-\d")),
    ("HTTP", re.compile(r"HTTP/\d|<!DOCTYPE |<html", re.IGNORECASE)),
    ("SMTP or FTP", re.compile(r"220[ -]")),
    ("POP3", re.compile(r"\+OK\b")),
    ("IMAP", re.compile(r"\* OK\b")),
    ("VNC", re.compile(r"RFB \d")),
)


def other_protocol(line: str) -> str:
    """Return the known protocol, other than chat, of a server's first line; "" for none."""
    return next((name for name, pattern in OTHER_PROTOCOLS if pattern.match(line)), "")


class PlainTalk:
    """The client's side of the workshop's protocol: a name, then lines, all unacknowledged."""

    ready = True
    doubts = pages = batching = False
    wait = None  # no rate limit
    asked = queue = pieces = ()  # no history and no queue
    lines_of_message = 0
    going: dict[str, str] = {}  # no channels
    sending = ""

    def __init__(self, core: "ClientCore"):
        self.core = core
        self.sent: collections.deque[Waiting] = collections.deque(maxlen=UNDERSTOOD_KEPT)
        core.output.append(core.wanted_name)
        room = core.rooms.setdefault(core.fold(LOBBY), Room(LOBBY))
        room.inside, core.current = True, room

    def take(self, line: str) -> None:
        core, room = self.core, self.core.rooms[self.core.fold(LOBBY)]
        if not core.sure and (other := other_protocol(line)):
            return core.give_up(f"this is no chat server: it speaks {other}")
        if WANTS_IRC.match(line) and not core.insists:
            core.outbox.take_back(self.sent)  # the server has understood none of these
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
            room.came(name)  # such a server does not list its members
        if kind == SAID:
            called = calls(rest, core.name)
            core.deliver(room, View(SAID, rest, name, LOBBY, called=called, line=line))
            room.spoke(name)
        else:
            core.show(View(kind, name=name, where=LOBBY, address=rest, line=line))
        core.show(View(PEOPLE, where=LOBBY))

    def carries(self, one: Waiting) -> bool:
        """Return whether a message is for the lobby, the only conversation of this protocol."""
        return self.core.fold(one.where) == self.core.fold(LOBBY)

    def pump(self) -> None:
        """Send the messages that may be sent."""
        outbox = self.core.outbox
        while one := outbox.next(self.carries):
            text = f"*{one.text}*" if one.kind == ACTION else one.text
            self.core.output += text.split("\n")
            if not self.core.sure:
                self.sent.append(one)
            self.core.shown.discard(one.id)
            outbox.arrived(one.id)  # or never will: such a server does not acknowledge

    def do_without(self, *values: Any) -> None:
        """Do nothing, in place of a method for which the line protocol has no command."""

    tick = bye = ping = forget = acknowledged = renamed = watch = send = do_without


# IRC

WANTED = (  # capabilities that this client can use
    *("message-tags", "server-time", "batch", "echo-message", "labeled-response"),
    *("draft/multiline", "draft/chathistory", "draft/channel-rename", "multi-prefix"),
    *("draft/message-redaction", "standard-replies", "soju.im/search", "chat.py/session", "sasl"),
    *("chghost", "no-implicit-names", "cap-notify"),
)
WANTED_BY_SCREENS = ("away-notify", "account-notify", "draft/read-marker")  # but not by pipes


COMMAND_LIMITS = {  # command -> token of 005 for its last parameter, and the usual limit
    "TOPIC": ("TOPICLEN", IRC_BYTES),
    "AWAY": ("AWAYLEN", IRC_BYTES),
    "NICK": ("NICKLEN", NAME_BYTES),
    "KICK": ("KICKLEN", IRC_BYTES),
}
NO_PACE = (1e9, 1e9)  # lines at once, and lines a second


class Batch:
    """Lines that belong together, collected until the batch ends (IRCv3 batch)."""

    def __init__(self, heard: Heard, outer: str):
        self.kind = heard.params[1]
        self.opening, self.outer = heard, outer
        self.items: "list[Heard | Batch]" = []
        self.at = 0.0  # when the batch began

    @property
    def target(self) -> str:
        return self.opening.params[2] if len(self.opening.params) > 2 else ""


UNSENT, GIVEN_UP = -1.0, -2.0  # in place of the time of a request for history


class Asked(NamedTuple):
    """A request for history that is not answered yet."""

    where: str
    # "last": the messages before the client joined. "missed": those after the mark, page by page.
    # "gap": the newest of these, for a screen. "older": before the first row. "asked": by a command
    how: str
    limit: int
    label: str = ""
    at: float = UNSENT  # monotonic, in seconds


class Echoed(NamedTuple):
    """A sent line that the server will echo without saying which line it is."""

    target: str  # folded
    text: str
    id: str  # of the message that this line ends; "" if more lines follow
    of: str = ""  # the message that this line belongs to, and ...
    end: int = 0  # ... the number of its characters up to the end of this line


IRC_HEARD: dict[str, tuple[Callable, int]] = {}  # verb -> handler, and number of parameters needed


def from_server(*verbs: str, least: int = 0) -> Callable:
    """Decorate the handler of these verbs and numerics; lines need at least `least` parameters."""

    def register(handler: Callable) -> Callable:
        IRC_HEARD.update(dict.fromkeys(verbs, (handler, least)))
        return handler

    return register


def sendable_lines(text: str, room: int) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a message, in pieces of at most `room` bytes, and whether each piece
    continues the one before."""
    for line in text.split("\n"):
        for n, piece in enumerate(split_text(line, room)):
            yield piece, n > 0


def in_batches(
    lines: list[tuple[str, bool]], size: int, count: int
) -> Iterator[list[tuple[str, bool]]]:
    """Yield groups of lines, each of which fits in a message of `size` bytes and `count` lines."""
    group, used = [], 0
    for text, goes_on in lines:
        length = len(text.encode()) + (0 if goes_on or not group else 1)
        if group and (used + length > size or len(group) == count):
            yield group
            group, used, goes_on = [], 0, False
        group.append((text, goes_on))
        used += length
    yield group


def same_words(sent: str, heard: str) -> bool:
    """Return whether a server made `heard` from a sent line: some cut it or remove colours."""
    plain = shown_line(sent.encode(errors="replace"))
    return heard in (sent, plain) or (len(heard) > 100 and (sent + plain).startswith(heard))


PIECE = "piece"  # in place of an id: a line within a message of this client, not shown alone


def echo_id(talk: "IrcTalk", heard: Heard, target: str, text: str) -> str:
    """Return the own id of a message that the server echoes; "" if unknown, PIECE for a part of
    one. The id is found by label, by tag, or by order among the lines echoed without either."""
    waiting = talk.core.outbox.waiting
    for name in (heard.tags.get("label", ""), heard.tags.get(OWN_ID, "")):
        stem, dot, _ = name.partition(".")
        if dot and (stem in waiting or stem in talk.core.known_own):
            return PIECE
        if name in waiting or (name and name == heard.tags.get(OWN_ID)):
            talk.echoed = [one for one in talk.echoed if one.id != name]
            return name
    key = talk.core.fold(target)
    for n, sent in enumerate(talk.echoed):
        if sent.target == key and same_words(sent.text, text):
            del talk.echoed[: n + 1]
            talk.core.outbox.arrived_to(sent.of, sent.end)
            return sent.id or PIECE
    return ""


def is_person(heard: Heard) -> bool:
    """Return whether a line comes from a user, and not from a server or one of its services."""
    if fold(heard.name) in SERVICES:
        return False
    return "!" in heard.source or bool(heard.source and "." not in heard.source)


# Client-only tags (ircv3.net/specs/client-tags)
REPLY, REACT, UNREACT, TYPES = "+draft/reply", "+draft/react", "+draft/unreact", "+typing"


def spoken_view(talk: "IrcTalk", heard: Heard, text: str) -> View:
    """Return the view of a PRIVMSG or NOTICE."""
    core, server = talk.core, talk.server
    target = server.without_status(heard.params[0])
    mine = core.is_me(heard.name) or talk.was_me(heard.source)
    where = target if mine or server.is_channel(target) else heard.name
    own_id = echo_id(talk, heard, heard.params[0], text) if mine else ""
    if re.match("\x01ACTION[ \x01]", text, re.IGNORECASE):
        text = f"*{text[8:].removesuffix(chr(1))}*"
    text = text.replace("\x01", "")
    called = not mine and (not server.is_channel(where) or core.is_called(text))
    person = mine or is_person(heard)
    kind = (NOTICED if heard.verb == "NOTICE" else SAID) if person else TOLD
    return View(
        *(kind, text, heard.name, where, heard.time, mine, called),
        id=heard.tags.get("msgid", ""),
        own_id=own_id,
        address=heard.source.partition("!")[2],
        reply=heard.tags.get(REPLY, "") or heard.tags.get("+reply", ""),
        file=heard.tags.get(FILE_TAG, ""),
    )


def not_shown(room: Room, views: list[View]) -> list[View]:
    """Return the messages of a page, without those that have no id and are shown already."""
    shown = {identity_of(view) for view in room.views if not view.id}
    return [view for view in views if view.id or identity_of(view) not in shown]


def page_last(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """Handle the page of messages from before the client joined."""
    for view in not_shown(room, views):
        talk.core.deliver(room, view._replace(past=True))
    room.whole = not views  # a short page may consist of long messages
    talk.core.release(room)


def page_missed(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """Handle a page of missed messages, and ask for more until one page brings nothing new: a page
    may be short because of its size."""
    new = any(view.id and view.id not in talk.core.seen for view in views)
    for view in not_shown(room, views):
        talk.core.deliver(room, view)
    if new or room.spilled:
        talk.core.made_progress()
        talk.core.page_lines = min(talk.server.page_size, 2 * talk.core.page_lines)
        room.spilled = False
        talk.ask_history(room, "missed")
    else:
        talk.core.release(room)


def page_gap(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """Handle the newest page of missed messages. If more were missed, the rows begin here."""
    size = sum(len(view.text.encode()) for view in views)
    if len(views) >= limit or size > PAGE_BYTES // 2:
        room.views.clear()
        talk.core.show(View(RESET, where=room.name))
        room.whole = False
        talk.core.note_holes(room, *room.holes, views[0].id)
        text = "more was said meanwhile; page up, or /history, shows it"
        talk.core.show(View(NOTE, text, where=room.name))
    for view in not_shown(room, views):
        talk.core.deliver(room, view)
    if views:
        talk.core.made_progress()
        talk.core.page_lines = min(talk.server.page_size, 2 * talk.core.page_lines)
    if room.spilled:
        room.spilled = False
        talk.ask_history(room, "gap")
    else:
        talk.core.release(room)


def page_older(talk: "IrcTalk", room: Room, views: list[View], limit: int) -> None:
    """Put a page of older messages before the first row. If none is visible, ask for another."""
    core, shown = talk.core, {identity_of(view) for view in room.views}
    before = room.paged.id if room.paged else room.oldest
    room.whole = not views or (bool(views[0].id) and views[0].id == before)
    known = any(view.id and core.store and core.store.has(view.id) for view in views)
    if room.hole and (known or room.whole):
        core.note_holes(room, *room.holes[:-1])
    elif room.hole:
        core.note_holes(room, *room.holes[:-1], views[0].id)
    seen = []
    for view in views:
        if identity_of(view) not in shown and not core.hides(view):
            shown.add(identity_of(view))
            seen.append(view._replace(past=True))
            core.keep(view)
    room.paged = views[0] if views and not seen else None
    room.views.extendleft(reversed(seen))
    if room.paged and not room.whole:
        talk.ask_history(room, "older")
    core.show(View(OLDER, str(len(seen)), where=room.name))


PAGES = {"last": page_last, "missed": page_missed, "gap": page_gap, "older": page_older}


def ask_targets(talk: "IrcTalk") -> None:
    """Ask which private conversations have missed messages. A chat.py is asked by the last id.
    Other servers are asked by time, a day earlier, because their clock may have been set."""
    core = talk.core
    if "chat.py/session" in talk.server.enabled and core.newest_id:
        since = f"msgid={core.newest_id}"
    else:
        since = f"timestamp={tag_time(max(0, talk.since - 24 * 3600 * 1000))}"
    now = f"timestamp={tag_time(LAST_MOMENT)}"
    talk.ask(Asked("", "targets", 0), "TARGETS", since, now, str(TARGETS_ASKED))


SAYING_FAILED = ("401", "716")  # these are about a message, if one is in flight


class Login(NamedTuple):
    """The name and password of an account."""

    account: str
    password: str


def is_ctcp(text: str) -> bool:
    """Return whether a message is a CTCP for a program, that is, other than ACTION."""
    return text.startswith("\x01") and not re.match("\x01ACTION[ \x01]", text, re.IGNORECASE)


class IrcTalk:
    """IRC from the client's side, for one connection. The functions decorated by from_server()
    handle the server's lines. A line with too few parameters is ignored."""

    def __init__(self, core: "ClientCore"):
        self.core = core
        ours = core.kind == CHAT or (core.sure and core.server.ours)
        self.server = core.server = ServerProfile(ours, core.server)
        self.ready = False
        self.batches: dict[str, Batch] = {}
        self.asked: collections.deque[Asked] = collections.deque()  # in the order of answers
        self.labels = itertools.count(1)  # of requests for history, and PING tokens
        self.names: dict[str, dict[str, str]] = {}  # members by key of a channel, until 366 comes
        self.shown_names: set[str] = set()  # keys of channels whose members the user asked for
        self.stale_names: set[str] = set()  # channels for NAMES, since ranks may have changed
        self.going: dict[str, str] = {}  # channels to look at once they are joined: their passwords
        self.behind: dict[str, str] = {}  # conversations whose history is to be requested: how
        self.named = self.introduced = self.negotiating = False
        self.resumed = False  # the session was resumed: the server says where the client is
        self.tries = 1  # attempts to get a nick
        self.nick_bytes = 0  # the server's limit for a nick, as its replies showed
        self.login: Iterator | None = None  # the client's side of a SASL exchange ...
        self.exchange: Exchange | None = None  # ... and its incoming messages
        self.mechanism_used = ""
        self.taken_up = False  # the server supports that mechanism
        self.mechanisms_left: list[str] = []  # to be tried if the server refuses that one
        self.proven = False  # the server has proved that it knows the password, too
        self.mask = ""  # of this client, as others see it
        self.pings: collections.deque[str] = collections.deque()  # unanswered tokens
        self.began = core.ticks()
        # Output
        self.budget = Budget(PACE_BURST, PACE_RATE, core.ticks())
        # Commands, each to be sent after the message with that id
        self.queue: collections.deque[tuple[str, str]] = collections.deque()
        self.pieces: collections.deque[str] = collections.deque()  # unsent lines of one message
        self.sending = ""  # the message of these lines ...
        self.lines_of_message = 0  # ... and the number of all its lines
        self.echoed: list[Echoed] = []  # lines that the server echoes without an id
        # Keys of channels with unanswered JOINs: how many, and since when
        self.entering: dict[str, tuple[int, float]] = {}
        # Targets of sent messages and notices, with own ids ("" for a notice), to match errors
        self.said: collections.deque[tuple[str, str]] = collections.deque(maxlen=ECHOES_KEPT)
        self.unconfirmed: list[str] = []  # own ids not covered by a PING yet
        self.doubted: dict[str, list[str]] = {}  # own ids by the token of a PING sent after them
        self.acks: dict[str, list[str]] = {}  # by PING token: own ids that the PONG confirms
        self.last_ack = core.ticks()  # time of the last confirmation by the server
        # Later messages may have been missed: times are unique within one target
        self.since = max(0, core.newest - 2 * TIMES_AHEAD)
        core.output.append("CAP LS 302")
        if core.kind != CHAT:  # servers from before 2004 never answer CAP
            self.give_names()

    @property
    def order(self) -> Callable[[Waiting], bool] | None:
        """A function that tells which messages hold up later ones, or None. A pipe keeps its order
        even if a JOIN is slow; on a screen, messages do not wait."""
        return None if self.core.tidy else self.waits

    @property
    def pages(self) -> bool:
        return self.server.pages

    @property
    def doubts(self) -> bool:
        """True if a message that is sent twice may also be delivered twice."""
        return not self.server.repeatable

    # Output

    @staticmethod
    def line(verb: str, *params: str) -> str:
        """Return a line of IRC. The last parameter may be empty, have blanks or begin with a
        colon."""
        middle = [verb, *params[:-1]]
        last = params[-1:]
        if last and (not last[0] or " " in last[0] or last[0].startswith(":")):
            last = (f":{last[0]}",)
        return " ".join([*middle, *last])

    def send(self, verb: str, *params: str) -> None:
        """Send a line: at once before registration, in its turn after that."""
        if self.ready:
            self.queue.append((self.line(verb, *params), ""))
        else:
            self.core.output.append(self.line(verb, *params))

    def send_at_once(self, verb: str, *params: str) -> None:
        """Send a line before all waiting ones, as an answer that the server waits for."""
        self.core.output.append(self.line(verb, *params))

    def command(self, verb: str, *params: str) -> None:
        """Send a user's command after the messages accepted before it. Raises Refused if the server
        would cut the line."""
        token, usual = COMMAND_LIMITS.get(verb, ("", IRC_BYTES))
        most, text = self.server.limit(token, usual), params[-1] if params else ""
        size = len(text) if self.server.ours else len(text.encode())
        if size > most:
            raise Refused("TOO_LONG", f"this server takes {most} bytes there, and not {size}")
        line = self.line(verb, *params)
        source = f":{self.mask or self.longest_mask()} "
        if len(f"{source}{line}\r\n".encode()) > IRC_BYTES and not self.server.ours:
            raise Refused("TOO_LONG", f"a line has at most {IRC_BYTES} bytes with your address")
        self.raw(line)

    def raw(self, line: str) -> None:
        outbox = self.core.outbox
        there = outbox.waiting.keys() - outbox.in_flight.keys() - outbox.parked.keys()
        last = next((id for id in reversed(outbox.waiting) if id in there), "")
        self.queue.append((line, last))

    def pump(self) -> None:
        """Send the waiting lines and messages at the pace that this server allows."""
        self.budget.refill(self.core.ticks())
        while self.ready and self.budget.tokens >= 1 and self._send_next():
            pass
        if self.ready and self.behind and self._may_catch_up():
            behind, self.behind = self.behind, {}
            for name, how in behind.items():
                if how == "targets":
                    ask_targets(self)
                elif room := self.core.find(name):
                    self.ask_history(room, how) or self.core.release(room)

    def _send_next(self) -> bool:
        """Send one line or message; return False if none can be sent."""
        outbox = self.core.outbox
        if self.pieces:
            line = self.pieces.popleft()
        elif self.queue and not self._is_behind(self.queue[0][1]):
            line = self.queue.popleft()[0]
        elif one := outbox.next(self.carries, self.order):
            if one.sent and one.id not in self.core.sent_before and self.doubts:
                self.core.leave_to_user(one.id)  # sent by an earlier run of this program
                return True
            outbox.send(one)
            self.transmit(one)
            return True
        elif self.stale_names:  # one NAMES for many mode changes
            line = self.line("NAMES", self.stale_names.pop())
        elif self.unconfirmed:
            line = self.ping_line(f"{UNCONFIRMED}{self.unconfirmed[-1]}-{next(self.labels)}")
            self.acks[self.pings[-1]], self.unconfirmed = self.unconfirmed, []
        else:
            return False
        self._date(line)
        if line.startswith("NOTICE "):
            self.said.append((self.core.fold(line.split(" ")[1]), ""))
        self.budget.tokens -= max(1.0, 0.5 + len(line) / PACE_BYTES)
        self.core.output.append(line)
        return True

    def _is_behind(self, id: str) -> bool:
        """Return whether the message with this id, which a queued line follows, can still be
        sent."""
        outbox = self.core.outbox
        one = outbox.waiting.get(id)
        done = one is None or id in outbox.in_flight or id in outbox.parked
        return not done and (self.carries(one) or self.waits(one))

    def _may_catch_up(self) -> bool:
        """Return whether pages may be requested. Waiting messages go first, because one page can
        use all that a bad connection carries."""
        outbox = self.core.outbox
        return self.core.acknowledged or not (
            outbox.in_flight or outbox.next(self.carries, self.order)
        )

    @property
    def wait(self) -> float | None:
        """The seconds until more may be sent; None if nothing waits."""
        more = self.queue or self.pieces or self.unconfirmed or self.stale_names
        if not self.ready or not (more or self.core.outbox.next(self.carries, self.order)):
            return None
        self.budget.refill(self.core.ticks())
        return self.budget.wait()

    def bye(self, reason: str) -> None:
        self.send_at_once("QUIT", reason)

    def ping_line(self, token: str) -> str:
        self.pings.append(token)
        return self.line("PING", token)

    def ping(self) -> None:
        """Send a PING, to learn whether the server is still there."""
        self.core.output.append(self.ping_line(f"{next(self.labels)}"))

    def tick(self) -> None:
        """Stop waiting for overdue answers; called every second."""
        now = self.core.ticks()
        if not self.introduced and now - self.began > CAP_SECONDS:
            self.introduce()
        for asked in [one for one in self.asked if 0 <= one.at < now - PAGE_SECONDS]:
            self.page_missing(asked)
        for key, (_, since) in list(self.entering.items()):
            if now - since > JOIN_SECONDS:
                self.entering[key] = 1, since
                self.cannot_enter(key, "the server does not answer to JOIN")
        for reference, batch in list(self.batches.items()):
            if now - batch.at > BATCH_SECONDS:  # the end of the batch was lost
                self.end_batch(self.batches.pop(reference))
        if self.ready:
            self.regain_name(now)
            self.doubt_echoes(now)
        else:
            self.hurry(now)

    def hurry(self, now: float) -> None:
        """End a log-in or a registration that the server does not complete in time."""
        if self.login is not None and now - self.began > LOGIN_SECONDS:
            self.core.show(View(NOTE, "not logged in: the server does not answer"))
            self.end_log_in()
        if now - self.began > REGISTRATION_SECONDS:
            self.core.refuse("the server does not let us in", TEMPORARY)
            self.core.dismissed = True

    def doubt_echoes(self, now: float) -> None:
        """Send a PING after messages whose echo is overdue: some servers drop messages silently."""
        late = now - self.last_ack > ECHO_SECONDS and not self.server.ours
        asked = {*self.unconfirmed, *itertools.chain(*self.acks.values())}
        alone = [id for id in self.core.outbox.in_flight if id not in asked]
        if late and alone and not self.pieces and not self.doubted:
            self.core.output.append(self.ping_line(f"echo-{next(self.labels)}"))
            self.doubted[self.pings[-1]] = alone

    def page_missing(self, asked: Asked) -> None:
        """Stop waiting for a page, and show the views held for it. A late page is still used."""
        self.asked[self.asked.index(asked)] = asked._replace(at=GIVEN_UP)
        room = self.core.find(asked.where)
        if asked.how == "targets":
            self.answered(asked.label, "")
            self.release_talks()
        elif room is not None and room.held is not None:
            text = "the server does not send what was said meanwhile"
            self.core.show(View(NOTE, text, where=room.name))
            self.core.release(room)

    def _date(self, line: str) -> None:
        """Note the time at which a request for history was sent: requests wait for their turn."""
        if "CHATHISTORY " not in line:
            return
        for n, asked in enumerate(self.asked):
            if asked.at == UNSENT:
                self.asked[n] = asked._replace(at=self.core.ticks())
                return

    def was_me(self, source: str) -> bool:
        """Return whether a source is this client under an earlier nick."""
        name, _, address = source.partition("!")
        former = self.core.fold(name) in self.core.former_names
        return former and bool(address) and address == self.mask.partition("!")[2]

    def acknowledged(self, own_id: str) -> None:
        """Note that the server has a message, and has refused none of the earlier ones."""
        self.last_ack = self.core.ticks()
        if any(id == own_id for _, id in self.said):
            while self.said.popleft()[1] != own_id:
                pass

    def forget(self, own_id: str) -> None:
        """Stop confirming a message, because the user decides about it."""
        for ids in (self.unconfirmed, *self.acks.values(), *self.doubted.values()):
            if own_id in ids:
                ids.remove(own_id)

    def renamed(self, old: str, new: str) -> None:
        """Use the new name of a conversation in the pending requests for history."""
        for n, asked in enumerate(self.asked):
            if self.core.fold(asked.where) == self.core.fold(old):
                self.asked[n] = asked._replace(where=new)
        for name in [name for name in self.behind if self.core.fold(name) == self.core.fold(old)]:
            self.behind[new] = self.behind.pop(name)

    # Registration and joining

    def give_names(self) -> None:
        """Send PASS, NICK and USER."""
        core, self.named = self.core, True
        if core.password:
            self.send("PASS", core.password)
        core.name = clean_name(core.wanted_name)
        self.send("NICK", core.name)
        username = re.sub("[^a-z]", "", fold(core.name))[:SHORT_NAME] or "chat"
        core.output.append(f"USER {username} 0 * :{core.name}")

    def introduce(self) -> None:
        """Send CAP REQ, secret, names and log-in together: each round trip of a slow line costs
        time. A server grants the capabilities it offers, so the lines after CAP REQ rely on
        them."""
        if self.introduced:
            return
        self.introduced = True
        offered = self.server.offered
        wanted = [name for name in self.core.capabilities if name in offered]
        if wanted:
            self.send("CAP", "REQ", " ".join(wanted))
        if "chat.py/session" in wanted:
            self.send("SESSION", self.core.outbox.secret)
            if self.named:  # with the secret, the nick of the user to resume is not taken
                self.send("NICK", self.core.name)
        if not self.named:
            self.give_names()
        mechanism = self.mechanism() if "sasl" in wanted else ""
        if mechanism:
            self.begin_log_in(mechanism)
        elif self.negotiating:
            self.send("CAP", "END")

    def mechanism(self, asked: bool = False) -> str:
        """Return the best SASL mechanism that both sides know; "" if none is needed or possible. A
        password is sent in the clear only if the user asked for that."""
        core = self.core
        offered = self.server.offered.get("sasl", "")
        known = [*filter(None, offered.split(","))] or [*LOGINS]
        self.mechanisms_left = [name for name in core.me.mechanisms if name in known]
        return self.next_mechanism(asked)

    def next_mechanism(self, asked: bool = False) -> str:
        core = self.core
        while self.mechanisms_left:
            name = self.mechanisms_left.pop(0)
            if name == "EXTERNAL" and core.me.certificate:
                return name
            if name == "EXTERNAL" or not core.me.login:
                continue
            if name != "PLAIN" or core.secure or asked or core.me.plain_allowed:
                return name
            text = "not logged in: this server wants to be told the password in the clear"
            core.show(View(NOTE, f"{text}; /login does so, ircs:// is better"))
        return ""

    def begin_log_in(self, mechanism: str) -> None:
        self.mechanism_used, self.proven, self.taken_up = mechanism, False, False
        known = self.core.me.login or Login("", "")
        self.login = login_external() if mechanism == "EXTERNAL" else LOGINS[mechanism](*known)
        next(self.login)  # the server speaks first, even if it says nothing
        self.exchange = Exchange(self.login)
        self.send("AUTHENTICATE", mechanism)

    def end_log_in(self) -> None:
        self.login = self.exchange = None
        if not self.ready:
            self.send("CAP", "END")

    def regain_name(self, now: float) -> None:
        """Ask whether the wanted nick is free: once by MONITOR, or now and then by ISON."""
        core = self.core
        wanted = clean_name(core.wanted_name)
        if core.is_me(wanted) or not core.regain or now < core.regain_at:
            return
        core.regain_at = now + REGAIN_SECONDS
        if "MONITOR" in self.server.tokens:
            self.send("MONITOR", "+", wanted)
            core.regain_at = math.inf
        else:
            self.send("ISON", wanted)

    def watch(self, names: Iterable[str]) -> None:
        """Monitor the users of private conversations, for a screen, if the server has MONITOR."""
        names = [name for name in names if name and " " not in name and "," not in name]
        if self.core.tidy and "MONITOR" in self.server.tokens and names:
            self.send("MONITOR", "+", ",".join(names[:WATCHED]))

    def name_is_free(self, name: str) -> None:
        """Take a nick that is free, if it is the wanted one."""
        core = self.core
        wanted = clean_name(core.wanted_name)
        if core.regain and core.fold(name) == core.fold(wanted) and not core.is_me(name):
            self.send("NICK", wanted)

    def note_join(self, name: str) -> None:
        """Note that a JOIN was sent."""
        count, _ = self.entering.get(self.core.fold(name), (0, 0.0))
        self.entering[self.core.fold(name)] = count + 1, self.core.ticks()

    def join_failed(self, name: str) -> bool:
        """Note that a JOIN of a channel failed; return whether no other one is unanswered."""
        count, since = self.entering.pop(self.core.fold(name), (0, 0.0))
        if count > 1:
            self.entering[self.core.fold(name)] = count - 1, since
        return count <= 1

    def cannot_enter(self, name: str, why: str) -> None:
        """Let the user decide about the messages for a channel that the client cannot join."""
        room = self.core.find(name)
        if room is None or room.inside:
            return
        if not self.join_failed(name):  # a JOIN with another password may be on its way
            return
        room.wanted = False
        self.going.pop(self.core.fold(name), None)
        self.core.park_all(room, why)

    def waits(self, one: Waiting) -> bool:
        """Return whether a message waits for the answer to a JOIN. The later messages of a pipe,
        and commands, wait with it."""
        room, key = self.core.find(one.where), self.core.fold(one.where)
        return room is not None and room.is_channel and not room.inside and key in self.entering

    def where_of(self, heard: Heard) -> str:
        """Return the open conversation that a numeric is about; "" for none. A numeric that names a
        user is mostly the answer to a command, and is shown in the current conversation."""
        rooms = (self.core.find(param) for param in heard.params[1:-1])
        about_talks = heard.verb in SAYING_FAILED
        return next((room.name for room in rooms if room and (room.is_channel or about_talks)), "")

    def enter(self, room: Room) -> None:
        self.note_join(room.name)
        self.send("JOIN", room.name, *[room.password] * bool(room.password))

    # Messages

    def transmit(self, one: Waiting) -> None:
        """Make a message the next lines to be sent, with its own id on the last line or on all."""
        rest = one.text[one.at :].removeprefix("\n") if one.at else one.text
        if one.kind == ACTION:
            lines = [(f"\x01ACTION {one.text}\x01", False)]
        else:
            head = f":{self.mask or self.longest_mask()} PRIVMSG {one.where} :"
            most = min(max(IRC_BYTES, self.server.limit("LINELEN", 0)), LINE_BYTES)
            lines = list(sendable_lines(rest, max(LINE_ROOM, most - 2 - len(head.encode()))))
        server, head = self.server, self.own_tags(one.id, one.reply)
        if len(lines) > 1 and server.multiline:
            *first, last = in_batches(lines, *server.multiline_limits)
            for n, group in enumerate(first):
                self.add_batch(one, group, self.own_tags(f"{one.id}.{n}", one.reply))
            self.add_batch(one, last, head)
        else:
            at = len(one.text) - len(rest)
            for text, _ in lines[:-1]:
                at = one.text.find(text, at) + len(text)
                self.add_line(one, text, "", "", at)
            self.add_line(one, lines[-1][0], head, one.id)
        self.lines_of_message = len(self.pieces)
        self.last_ack = max(self.last_ack, self.core.ticks() - ECHO_SECONDS / 2)
        self.sending = one.id
        self.said.append((self.core.fold(self.server.without_status(one.where)), one.id))
        if not server.echoes:
            self.unconfirmed.append(one.id)

    @property
    def batching(self) -> bool:
        """True if a BATCH has been begun that has to be ended."""
        return "BATCH -m" in self.pieces

    def own_tags(self, id: str, reply: str) -> str:
        """Return the tags before a message: its own id, to know the echo, and the id it answers."""
        tags = [f"{OWN_ID}={id}"] * self.server.keeps_own_tags
        tags += [f"{REPLY}={escaped_tag(reply)}"] * bool(reply and self.server.takes(REPLY))
        tags += [f"label={id}"] * self.server.labels
        return f"@{';'.join(tags)} " if tags else ""

    def add_line(self, one: Waiting, text: str, head: str, id: str, end: int = 0) -> None:
        text = text or " "
        if "echo-message" in self.server.enabled:
            self.echoed.append(Echoed(self.core.fold(one.where), text, id, one.id, end))
            del self.echoed[:-ECHOES_KEPT]
        self.pieces.append(head + self.line("PRIVMSG", one.where, text))

    def add_batch(self, one: Waiting, lines: list[tuple[str, bool]], head: str) -> None:
        self.pieces.append(head + self.line("BATCH", "+m", "draft/multiline", one.where))
        for text, goes_on in lines:
            tags = f"@batch=m{f';{CONCAT}' * goes_on} "
            self.pieces.append(tags + self.line("PRIVMSG", one.where, text))
        self.pieces.append("BATCH -m")

    def carries(self, one: Waiting) -> bool:
        """Return whether a message can be sent; one for a channel waits until the client is in
        it."""
        room = self.core.find(one.where)
        if room is None or not room.is_channel:
            return not self.server.is_channel(one.where)
        entering = self.server.ours and self.core.fold(one.where) in self.entering
        return room.inside or entering  # other servers may join the client later

    def longest_mask(self) -> str:
        return f"{self.core.name}!{'u' * USERNAME_BYTES}@{'h' * HOST_BYTES}"

    # History

    def ask_history(self, room: Room, how: str) -> bool:
        """Ask for a page of a room's history; return whether a page will come."""
        if not self.server.pages:
            return False
        limit = {"last": HISTORY_LINES, "older": self.server.page_size}.get(
            how, min(self.core.page_lines, self.server.page_size)
        )
        spoken = (view for view in room.views if view.kind in (SAID, NOTICED) and view.time)
        oldest = room.paged or next(spoken, None)
        words = {
            "last": ("LATEST", "*"),
            "gap": ("LATEST", self.selector(room.mark, room.mark_time)),
            "missed": ("AFTER", self.selector(room.mark, room.mark_time)),
            "older": ("BEFORE" if oldest else "LATEST", self.selector_of(oldest)),
        }
        subcommand, selector = words[how]
        self.ask(Asked(room.name, how, limit), subcommand, room.name, selector, str(limit))
        return True

    def selector_of(self, view: View | None) -> str:
        if view is None:
            return "*"
        return self.selector(f"msgid={view.id}" if view.id else "", view.time)

    def selector(self, mark: str, when: int | None) -> str:
        """Return a position in history as this server takes it: by id, or by time (MSGREFTYPES)."""
        takes_ids = "msgid" in self.server.tokens.get("MSGREFTYPES", "msgid").split(",")
        by_id = mark and (takes_ids or not when)
        return mark if by_id else f"timestamp={tag_time(when)}" if when else "*"

    def ask(self, asked: Asked, *params: str) -> None:
        """Send a CHATHISTORY. The answer is recognized by its label, else by its target."""
        label = f"h{next(self.labels)}" if self.server.labels else ""
        self.asked.append(asked._replace(label=label))
        head = [f"@label={label}"] if label else []
        self.send(*head, "CHATHISTORY", *params)

    def answered(self, label: str, target: str) -> Asked | None:
        """Remove and return the request that an answer belongs to; None if there is no request."""
        key = self.core.fold(target)
        by_label = (one for one in self.asked if label and one.label == label)
        by_target = (one for one in self.asked if self.core.fold(one.where) == key)
        one = next(by_label, None) or next(by_target, None) or next(iter(self.asked), None)
        if one is not None:
            self.asked.remove(one)
        return one

    def catch_up(self, room: Room) -> None:
        """Fetch the messages after the last one of this room. A new room begins with the latest
        messages on a screen, and with live messages in a pipe."""
        room.held = []
        how = "last" if not room.mark else "gap" if self.core.tidy else "missed"
        if (room.mark or self.core.tidy) and self.server.pages:
            self.behind[room.name] = how
        else:
            self.core.release(room)

    # Input

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
            batch = self.batches[reference[1:]] = Batch(heard, heard.tags.get("batch", ""))
            batch.at = self.core.ticks()
        batch = self.batches.pop(reference[1:], None) if reference[:1] == "-" else None
        if batch is None:
            return
        if outer := self.batches.get(batch.outer):
            outer.items += [batch] * (len(outer.items) < BATCH_LINES)
        else:
            self.end_batch(batch)

    def end_batch(self, batch: Batch, label: str = "") -> None:
        label = batch.opening.tags.get("label", label)
        if batch.kind == "chathistory":
            for item in batch.items:  # messages redacted in the client's absence
                if isinstance(item, Heard) and item.verb == "REDACT" and len(item.params) > 1:
                    self.core.remove(item.params[1])
            self.take_page(label, batch.target, self.views_of(batch))
            for item in batch.items:  # reactions, to these or to earlier ones
                if isinstance(item, Heard) and item.verb == "TAGMSG":
                    self.act(item)
        elif batch.kind == "draft/multiline":
            if view := self.view_of(batch):
                self.core.said(view, batch.opening)
        elif batch.kind == "soju.im/search":
            self.show_past(self.views_of(batch), "search")
        else:  # its lines mean the same as without the batch
            for item in batch.items:
                if isinstance(item, Batch):
                    self.end_batch(item, label)
                else:
                    self.act(item._replace(tags={"label": label} | item.tags))
        if batch.kind == "draft/chathistory-targets" and self.answered(label, ""):
            self.release_talks()

    def views_of(self, batch: Batch) -> list[View]:
        return [view for item in batch.items if (view := self.view_of(item))]

    def view_of(self, item: "Heard | Batch") -> View | None:
        """Return the message of a line, or of a batch of several lines; None for anything else."""
        if isinstance(item, Heard):
            spoken = item.verb in ("PRIVMSG", "NOTICE") and len(item.params) > 1
            if not spoken or is_ctcp(item.params[1]):
                return None
            return spoken_view(self, item, item.params[1])
        lines = [line for line in item.items if isinstance(line, Heard) and len(line.params) > 1]
        if item.kind != "draft/multiline" or not lines:
            return None
        text = "".join(("" if CONCAT in line.tags else "\n") + line.params[1] for line in lines)
        source, tags = item.opening.source or lines[0].source, item.opening.tags
        first = lines[0]._replace(source=source, tags=tags)
        return spoken_view(self, first, text.removeprefix("\n"))

    def take_page(self, label: str, target: str, views: list[View]) -> None:
        """Handle a page of history that was requested."""
        asked = self.answered(label, target) or Asked("", "asked", 0)
        room = self.core.find(asked.where)
        if room is None or asked.how not in PAGES:
            return self.show_past(views, f"history of {asked.where or target}")
        PAGES[asked.how](self, room, views, asked.limit)

    def show_past(self, views: list[View], title: str) -> None:
        """Show requested messages in the current conversation, apart from live messages."""
        self.core.show_results(title, [view for view in views if view.kind in (SAID, NOTICED)])

    def release_talks(self) -> None:
        """Show the held messages of private conversations for which no page was requested."""
        busy = {self.core.fold(asked.where) for asked in self.asked}
        for key, room in list(self.core.rooms.items()):
            if not room.is_channel and room.held is not None and key not in busy:
                self.core.release(room)


# Lines of a server: registration, log-in, and lines without a handler of their own


NICK_LENGTHS = (30, 15, 9)  # of InspIRCd, ircd 2.11, and RFC 2812


NOT_JOINED = (
    *("403", "405", "437", "448", "471", "473", "474", "475", "476", "477", "479", "489", "520"),
)


def refused(talk: IrcTalk, heard: Heard, text: str) -> None:
    """Show an error of the server; with the label of a message, report that message as lost."""
    label = heard.tags.get("label", "")
    if label in talk.core.outbox.waiting:
        talk.core.lost(label, text)
    else:
        talk.core.show(View(TOLD, text, where=talk.where_of(heard)))


NO_FAILURE = (  # numerics that refuse other commands, not messages
    *("401", "405", "406", "423", "424", "431", "432", "433", "436", "437", "438", "441", "443"),
    *("451", "461", "462", "464", "467", "468", "471", "472", "473", "474", "475", "476", "478"),
    *("479", "480", "481", "482", "483", "484", "485", "491", "495", "501", "502", "510", "515"),
    *("518", "520", "524", "525"),
)


def message_refused(talk: IrcTalk, heard: Heard) -> str:
    """Return the id of the oldest message in flight to the target of an error without a label; ""
    if the error is about a notice, or about no message."""
    number, core = heard.verb, talk.core
    error = number.isdecimal() and (number[0] in "45" or number in SAYING_FAILED)
    if not error or len(heard.params) < 2 or "label" in heard.tags:
        return ""
    if number in NO_FAILURE and number not in SAYING_FAILED:
        return ""
    targets = {core.fold(talk.server.without_status(param)) for param in heard.params[1:-1]}
    for n, (target, id) in enumerate(talk.said):
        if target in targets and (not id or id in core.outbox.in_flight):
            del talk.said[n]  # the oldest notice or message sent to that target
            return id
    return ""


@from_server("", least=1)
def tell_rest(talk: IrcTalk, heard: Heard) -> None:
    """Show a line without a handler of its own; note the channel or message that is refused."""
    *about, text = heard.params[1:] or heard.params
    between = ": " if heard.verb[:1] in ("4", "5") else " "
    text = between.join([" ".join(about), text] if about else [text])
    room = talk.core.find(heard.params[1]) if len(heard.params) > 1 else None
    if heard.verb in NOT_JOINED and room and room.is_channel and not room.inside:
        talk.cannot_enter(heard.params[1], text)
    lost = message_refused(talk, heard)
    refused(talk, heard._replace(tags={"label": lost} | heard.tags), text)


@from_server("CAP", least=3)
def capabilities_told(talk: IrcTalk, heard: Heard) -> None:
    subcommand, words, server = heard.params[1].upper(), heard.params[-1].split(), talk.server
    if subcommand in ("LS", "NEW"):
        if len(server.offered) < TOKENS_KEPT:
            server.offered.update(word.partition("=")[::2] for word in words)
        talk.core.told_sts(server.offered.get("sts", ""))
    if talk.core.redial:  # over TLS: nothing more is sent over this connection
        return
    if subcommand == "LS":
        talk.negotiating = True
        if heard.params[2] != "*":  # else more lines follow
            talk.introduce()
    elif subcommand == "NEW":
        names = (word.partition("=")[0] for word in words)
        wanted = [name for name in names if name in talk.core.capabilities]
        if wanted and talk.ready:
            talk.send("CAP", "REQ", " ".join(wanted))
    elif subcommand == "ACK":
        for word in words:
            (server.enabled.discard if word[0] == "-" else server.enabled.add)(word.lstrip("-"))
    elif subcommand == "NAK" and len(words) > 1:  # the server refuses one of these: find out which
        for word in words:
            talk.send_at_once("CAP", "REQ", word)
    elif subcommand == "DEL":
        server.enabled.difference_update(words)
        for word in words:
            server.offered.pop(word, None)


@from_server("421", "451", least=2)
def no_capabilities(talk: IrcTalk, heard: Heard) -> None:
    """Go on with a server that knows no CAP, or no AUTHENTICATE."""
    if heard.params[1] == "AUTHENTICATE" and talk.login is not None:
        talk.core.show(View(NOTE, "not logged in: this server knows no SASL"))
        return talk.end_log_in()
    if talk.introduced or talk.ready:
        return tell_rest(talk, heard)
    return talk.introduce()


def keep_login(core: "ClientCore") -> None:
    if core.me.keep:
        try:
            core.me.keep(core.me.login)
        except Unusable as error:
            core.show(View(NOTE, f"{error}; the next start cannot log in by itself"))


def renew_login(core: "ClientCore") -> None:
    """Use the proposed password from now on, because the server accepted it."""
    if core.me.proposed:
        core.me.login, core.me.proposed = core.me.proposed, None
        core.me.account = core.me.login.account
        if core.me.generated:
            keep_login(core)


def forget_login(core: "ClientCore") -> None:
    """Drop the log-in: the account does not exist, or has another password."""
    core.me.proposed, core.me.login = None, None
    if core.me.generated:
        core.me.generated = False
        keep_login(core)


def answer_log_in(talk: IrcTalk, said: Any) -> None:
    """Answer a SASL message of the server, or go on with the result of a job of the exchange."""
    if talk is not talk.core.talk or talk.login is None:
        return
    try:
        answer = talk.login.send(said)
    except StopIteration:
        return
    except Refused:
        return talk.send_at_once("AUTHENTICATE", "*")
    if callable(answer):
        talk.exchange = None  # the server must not send anything meanwhile
        return talk.core.later(answer, functools.partial(answer_log_in, talk))
    talk.exchange = Exchange(talk.login)
    talk.proven = talk.mechanism_used in ("PLAIN", "EXTERNAL") or answer == b""
    for chunk in Exchange.chunks(answer):
        talk.send_at_once("AUTHENTICATE", chunk)


@from_server("AUTHENTICATE", least=1)
def asked_to_log_in(talk: IrcTalk, heard: Heard) -> None:
    talk.taken_up = True
    try:
        said = talk.exchange.feed(heard.params[0]) if talk.exchange else None
    except Refused:
        return talk.send_at_once("AUTHENTICATE", "*")
    if said is not None:
        answer_log_in(talk, said)


@from_server("900", least=1)
def told_to_be_logged_in(talk: IrcTalk, heard: Heard) -> None:
    talk.core.show(View(TOLD, heard.params[-1]))


@from_server("903", least=1)
def logged_in(talk: IrcTalk, heard: Heard) -> None:
    core = talk.core
    if talk.login is None:  # no log-in is running: this is not about one
        return tell_rest(talk, heard)
    if not talk.proven:
        core.give_up("the server said that we are logged in, and could not prove that it is right")
        return talk.bye("")
    core.me.account = core.me.login.account if core.me.login else ""
    renew_login(core)
    talk.end_log_in()


def come_another_time(talk: IrcTalk, why: str) -> None:
    """Disconnect and try again later: as another user the client would send all messages again."""
    talk.core.refuse(why, TEMPORARY)
    talk.bye("")


@from_server("908", least=2)
def mechanisms_told(talk: IrcTalk, heard: Heard) -> None:
    """Keep only the mechanisms that the server lists after it refused one."""
    known = heard.params[1].split(",")
    talk.mechanisms_left = [name for name in talk.mechanisms_left if name in known]


@from_server("902", "904", "905", "906", "907", least=1)
def not_logged_in(talk: IrcTalk, heard: Heard) -> None:
    core, why = talk.core, f"not logged in: {heard.params[-1]}"
    if talk.login is None:
        return tell_rest(talk, heard)
    if heard.verb == "904" and not talk.taken_up and (name := talk.next_mechanism()):
        return talk.begin_log_in(name)  # the mechanism was refused, not the password
    core.show(View(NOTE, why))
    if core.me.proposed and not talk.ready:  # the /register before the break was lost
        core.me.login = None
        forget_login(core)
    elif core.me.account and not talk.ready:
        return come_another_time(talk, why)
    talk.end_log_in()


def try_name(talk: IrcTalk, heard: Heard, most: int, candidate: Callable[[int], str]) -> None:
    """Try another nick until the server takes one; give up after `most` attempts."""
    if talk.ready:
        return tell_rest(talk, heard)
    if "chat.py/session" in talk.server.offered and not talk.server.enabled:
        return  # about the nick sent before the secret, which decides
    talk.tries += 1
    if talk.tries > most:
        talk.core.refuse(heard.params[-1], NEEDS_USER)
        return talk.bye("")
    talk.core.name = candidate(talk.tries)
    talk.core.regain = heard.verb != "432"
    talk.send("NICK", talk.core.name)


@from_server("433", "436", "437", least=2)
def name_is_taken(talk: IrcTalk, heard: Heard) -> None:
    """Try NAME2, NAME3 and so on. A nick that the server cut shows how long one may be."""
    name, shown = clean_name(talk.core.wanted_name), heard.params[1]
    if len(shown) < len(talk.core.name) and talk.core.name.startswith(shown):
        talk.nick_bytes = len(shown)

    def candidate(number: int) -> str:
        full = numbered_name(name, number)
        if not talk.nick_bytes or len(full) <= talk.nick_bytes:
            return full
        return numbered_name(name[: talk.nick_bytes - len(str(number))], number)

    try_name(talk, heard, NAMES_COUNTED if talk.server.ours else NAMES_TRIED, candidate)


@from_server("432", least=1)
def name_is_no_name(talk: IrcTalk, heard: Heard) -> None:
    """Try the nick with only letters and digits, then shorter ones, then a guest nick: other
    servers allow fewer characters than a chat.py."""
    name, guest = clean_name(talk.core.wanted_name), f"guest{random.randrange(1000)}"
    plain = re.sub(r"[^A-Za-z0-9_-]", "", name).lstrip("0123456789-")
    letters = re.sub(r"[^A-Za-z]", "", name)
    shorter = [plain[:length] for length in NICK_LENGTHS if plain[:length] != talk.core.name]
    candidates = [*dict.fromkeys(filter(None, shorter)), letters[: SHORT_NAME - 2], guest]
    tried = itertools.islice(filter(None, candidates), talk.tries - 1, None)
    try_name(talk, heard, NAMES_TRIED, lambda _: next(tried, guest))


@from_server("001", least=1)
def welcomed(talk: IrcTalk, heard: Heard) -> None:
    core, talk.ready = talk.core, True
    core.sure, core.name = True, heard.params[0]
    core.outbox.most = SENT_AHEAD if talk.server.echoes else DOUBTED_AHEAD
    pace = NO_PACE if talk.server.ours else (PACE_BURST, PACE_RATE)
    talk.budget = Budget(*pace, core.ticks())
    core.regain_at = core.ticks() + REGAIN_SECONDS
    core.began = core.began or heard.time or 0
    if core.tidy or core.name != core.wanted_name:
        why = "is taken" if core.regain else "is no nick that this server takes"
        why = f" ({core.wanted_name} {why})" if core.name != core.wanted_name else ""
        core.show(View(TOLD, f"you are {core.name}{why}"))
    if core.away:
        talk.send("AWAY", core.away)
    for id in [*core.outbox.unconfirmed]:  # without a room there is no history to tell
        if core.find(core.outbox.waiting[id].where) is None:
            core.leave_to_user(id)
    for one in core.outbox.waiting.values():  # accepted messages need the channel
        if talk.server.is_channel(one.where) and one.id not in core.outbox.parked:
            core.room_for(one.where).wanted = True
    for room in core.rooms.values():
        if room.is_channel and room.wanted and not (talk.resumed and room.entered):
            talk.enter(room)
    if talk.pages and talk.since:
        talk.behind[""] = "targets"
    else:
        talk.release_talks()
    core.show(View(PEOPLE))


@from_server("004", least=3)
def version_told(talk: IrcTalk, heard: Heard) -> None:
    talk.server.ours, talk.server.told = heard.params[2].startswith("chat.py"), True
    talk.server.tokens.clear()  # of an earlier connection
    if not talk.server.ours:
        talk.budget = Budget(PACE_BURST, PACE_RATE, talk.core.ticks())
    talk.core.rekey()
    talk.core.keep_facts()
    if talk.server.ours and not talk.core.rooms:  # join the channel of all users
        room = talk.core.room_for(LOBBY)
        room.wanted = True
        talk.enter(room)
        talk.core.go(room)


@from_server("005", least=2)
def support_told(talk: IrcTalk, heard: Heard) -> None:
    tokens = talk.server.tokens
    for word in heard.params[1:-1]:
        name, _, value = word.partition("=")
        if name[:1] == "-":
            tokens.pop(name[1:], None)
        elif len(tokens) < TOKENS_KEPT:
            tokens[name] = value.replace("\\x20", " ")
    talk.core.rekey()
    talk.core.keep_facts()
    if "MONITOR" in {word.partition("=")[0] for word in heard.params[1:-1]}:
        talk.watch(room.name for room in talk.core.rooms.values() if not room.is_channel)
    pace = [positive_number(one) for one in tokens.get("chat.py/FLOOD", "").split(",")]
    if len(pace) == 2 and all(pace):
        talk.budget = Budget(*pace, talk.core.ticks())
    elif talk.server.ours:  # and announces no rate limit
        talk.budget = Budget(*NO_PACE, talk.core.ticks())


@from_server("396", least=2)
def own_host_told(talk: IrcTalk, heard: Heard) -> None:
    """Note the client's host as others see it, which counts in the length of a line."""
    before = talk.mask.partition("@")[0] or talk.longest_mask().partition("@")[0]
    host = heard.params[1]
    talk.mask = host if "@" in host and "!" in host else f"{before}@{host.rpartition('@')[2]}"


@from_server("CHGHOST", least=2)
def host_changed(talk: IrcTalk, heard: Heard) -> None:
    if talk.core.is_me(heard.name):
        talk.mask = f"{heard.name}!{heard.params[0]}@{heard.params[1]}"


NEEDS_USER_WORDS = re.compile(
    r"\bbann|\b[kgdzq][- :]?lined?\b|password|not (?:allowed|authori[sz]ed|permitted)|unauthori"
    r"|access denied|certificate",
    re.IGNORECASE,
)


@from_server("ERROR", least=1)
def error_told(talk: IrcTalk, heard: Heard) -> None:
    """Note why the server closes. Throttled, full or going down are temporary reasons."""
    talk.core.dismissed = True
    if not talk.core.quitting and not talk.core.refusal:
        needs_user = bool(NEEDS_USER_WORDS.search(heard.params[0]))
        talk.core.refuse(heard.params[0], NEEDS_USER if needs_user else TEMPORARY)


@from_server("464", "465", "466", least=1)
def not_let_in(talk: IrcTalk, heard: Heard) -> None:
    if talk.ready:
        tell_rest(talk, heard)
    else:
        talk.core.dismissed = True  # some servers leave hanging up to the client
        advice = "; /pass PASSWORD gives it" if heard.verb == "464" and talk.core.tidy else ""
        talk.core.refuse(heard.params[-1] + advice, NEEDS_USER)


@from_server("470", least=3)
def sent_elsewhere(talk: IrcTalk, heard: Heard) -> None:
    """Follow the server, which redirects a JOIN to another channel."""
    core, (_, old, new, *_) = talk.core, heard.params
    tell_rest(talk, heard)
    if (room := core.find(old)) and not room.inside:
        if core.find(new):
            room.wanted = False
        else:
            core.rename(room, new)
    if (password := talk.going.pop(core.fold(old), None)) is not None:
        talk.going[core.fold(new)] = password


# Lines of a server: pings, confirmations, history and presence


@from_server("PING", least=1)
def pinged(talk: IrcTalk, heard: Heard) -> None:
    talk.send_at_once("PONG", *heard.params)


def confirm(talk: IrcTalk, own_id: str) -> None:
    talk.core.acknowledge(View(ARRIVED, own_id=own_id))


@from_server("PONG")
def ponged(talk: IrcTalk, heard: Heard) -> None:
    """Confirm the messages sent before a PING. Some servers do not repeat the token, but PONGs come
    in the order of the PINGs."""
    token = heard.params[-1] if heard.params else ""
    if token not in talk.pings:
        token = talk.pings[0] if talk.pings else ""
    while talk.pings:
        answered = talk.pings.popleft()
        for own_id in talk.acks.pop(answered, ()):
            if own_id in talk.core.outbox.in_flight:  # else the message was refused meanwhile
                confirm(talk, own_id)
        for own_id in talk.doubted.pop(answered, ()):
            if "echo-message" not in talk.server.enabled:  # disabled since
                confirm(talk, own_id)
            elif own_id in talk.core.outbox.in_flight:
                talk.core.lost(own_id, "the server took it and did not send it back")
        if answered == token:
            break


@from_server("ACK")
def labelled_answer_ended(talk: IrcTalk, heard: Heard) -> None:
    """Note that a labelled message was accepted, or, if the server echoes messages, dropped."""
    label = heard.tags.get("label", "")
    if "echo-message" not in talk.server.enabled:
        confirm(talk, label)
    else:
        talk.core.lost(label, "the server took it and did not send it back")


# Includes the separators of lines and paragraphs, which some terminals obey.
INERT = CONTROLS | BIDI_CONTROLS | {0x09: "    ", 0x2028: " ", 0x2029: " "}


def inert(text: str) -> str:
    """Return a text without characters that control a terminal; newlines stay."""
    return text if text.isprintable() else text.translate(INERT)


def visible(text: str) -> str:
    """Return a text as one row: newlines become symbols, tabs become blanks."""
    return inert(text.replace("\n", "\u23ce").replace("\t", " "))


@from_server("TAGMSG", least=1)
def tags_told(talk: IrcTalk, heard: Heard) -> None:
    """Handle reactions and typing. A TAGMSG with an own id confirms a message that was sent again
    and has been removed since."""
    core, tags = talk.core, heard.tags
    mine = core.is_me(heard.name)
    if mine:
        confirm(talk, tags.get(OWN_ID, ""))
    where = talk.server.without_status(heard.params[0])
    room = core.find(where if mine or talk.server.is_channel(where) else heard.name)
    if room is None or core.is_ignored(heard):
        return
    if TYPES in tags and not mine:
        core.types(room, heard.name, tags[TYPES])
    for tag, on in ((REACT, True), (UNREACT, False)):
        emoji = visible(tags.get(tag, ""))[:REACTION_CHARACTERS]
        if emoji.strip() and REPLY in tags:
            core.reacted(room, tags[REPLY], emoji, heard.name, on)


@from_server("TOKEN", least=3)
def token_told(talk: IrcTalk, heard: Heard) -> None:
    """TOKEN GENERATE <service> :<token> (draft/authtoken)"""
    if heard.params[0] == "GENERATE":
        talk.core.took_token(heard.params[-1])


@from_server("MARKREAD", least=2)
def marker_told(talk: IrcTalk, heard: Heard) -> None:
    """MARKREAD <target> timestamp=<time> -- read so far, on another device perhaps"""
    room, value = talk.core.find(heard.params[0]), heard.params[1].removeprefix("timestamp=")
    if room and value != "*":
        with contextlib.suppress(Refused):
            talk.core.told_read(room, parse_time(value))


UNKNOWN_MARK = ("INVALID_PARAMS", "INVALID_MSGREFTYPE", "UNKNOWN_MSGID")  # as servers write it


def no_page(talk: IrcTalk, code: str, label: str, about: list[str]) -> None:
    """Handle a refused request for history. If the server does not know the last message of the
    room (a backup was restored), ask for the newest messages."""
    named = next((one for one in about if talk.core.find(one)), "")
    asked = talk.answered(label, named)
    if asked is None:
        return
    if asked.how == "targets":
        return talk.release_talks()
    room = talk.core.find(asked.where)
    if room is None or asked.how not in PAGES:
        return talk.show_past([], f"history of {asked.where}")
    unknown = asked.how in ("gap", "missed") and code in UNKNOWN_MARK
    if not (unknown and room.mark.startswith("msgid=")):
        return PAGES[asked.how](talk, room, [], asked.limit)
    room.mark = ""
    text = "the server does not have the last message from here: something may be missing"
    talk.core.show(View(NOTE, text, where=room.name))
    talk.ask_history(room, "last")


def tell_nothing(talk: IrcTalk, heard: Heard) -> None:
    """Ignore a line that only programs need, or that the client tells in other words."""


for quiet in (
    *("002", "003", "020", "042", "221", "250", "251", "252", "253", "254", "255", "265", "266"),
    *("318", "321", "323", "329", "333", "369", "705", "706", "SETNAME"),
):
    IRC_HEARD[quiet] = (tell_nothing, 0)


@from_server("375", "372", "376", "422", least=2)
def motd_told(talk: IrcTalk, heard: Heard) -> None:
    """Show the message of the day, if the user asked for it."""
    if talk.core.wants_motd:
        talk.core.show(View(TOLD, heard.params[-1]))
        talk.core.wants_motd = heard.verb not in ("376", "422")


@from_server("303", least=2)
def present_told(talk: IrcTalk, heard: Heard) -> None:
    """Take the wanted nick if the answer to ISON does not list it."""
    wanted = clean_name(talk.core.wanted_name)
    if talk.core.fold(wanted) not in map(talk.core.fold, heard.params[1].split()):
        talk.name_is_free(wanted)


@from_server("730", "731", least=2)
def presence_told(talk: IrcTalk, heard: Heard) -> None:
    """Note which monitored users are online."""
    core, gone = talk.core, heard.verb == "731"
    for name in (one.partition("!")[0] for one in heard.params[1].split(",")):
        if gone:
            talk.name_is_free(name)
        room = core.find(name)
        if room and not room.is_channel and room.gone != gone:
            text = f"{name} {'is not here' if gone else 'is here'}"
            if gone or room.gone is not None:  # at first, being online is no news
                core.happened(room, View(TOLD, text, where=room.name))
            room.gone = gone
            core.changed(room)


@from_server("FAIL", least=3)
def failed(talk: IrcTalk, heard: Heard) -> None:
    verb, code, *about, text = heard.params
    label = heard.tags.get("label", "")
    if (verb, code) == ("SESSION", "REPLACED"):
        talk.core.give_up("another client of yours has taken this place")
    elif (verb, code) == ("SESSION", "ACCOUNT_REQUIRED"):
        come_another_time(talk, text)
    elif verb == "CHATHISTORY":
        no_page(talk, code, label, about)
    elif verb == "TOKEN":
        talk.core.took_token("")
    elif verb == "REGISTER":
        forget_login(talk.core)
        refused(talk, heard, text)
    elif code == "NOT_KEPT" and len(about) > 1:
        talk.core.lost(about[1], text)
    else:
        about_it = verb in ("PRIVMSG", "NOTICE", "TAGMSG", "BATCH", "MULTILINE", "*")
        lost = message_refused(talk, heard._replace(verb="400")) if about_it else ""
        refused(talk, heard._replace(tags={"label": lost} | heard.tags), text)


# Lines of a server: users, channels and messages


@from_server("NOTE", "WARN", least=3)
def noted(talk: IrcTalk, heard: Heard) -> None:
    if heard.params[:2] == ["SESSION", "RESUMED"]:
        talk.resumed = True
    else:
        talk.core.show(View(TOLD, heard.params[-1]))


def answer_ctcp(talk: IrcTalk, heard: Heard) -> None:
    """Answer the CTCP requests of other clients, a few a minute; show the answers of others."""
    core = talk.core
    verb, _, rest = heard.params[1].strip("\x01").partition(" ")
    verb = verb.upper()
    if core.is_me(heard.name) or core.is_ignored(heard):
        return
    if heard.verb == "NOTICE":
        if verb == "PING" and (sent := positive_number(rest)) and sent <= core.ticks():
            rest = f"after {core.ticks() - sent:.1f} s"
        return core.show(View(TOLD, f"{heard.name} answers {verb}: {rest}"))
    answers = {
        "VERSION": f"chat.py {VERSION}",
        "PING": rest,
        "TIME": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "CLIENTINFO": "ACTION CLIENTINFO PING TIME VERSION",
    }
    core.ctcp_budget.refill(core.ticks())
    to_me = core.is_me(heard.params[0])
    if verb in answers and to_me and core.ctcp_budget.tokens >= 1:
        core.ctcp_budget.tokens -= 1
        talk.send("NOTICE", heard.name, f"\x01{verb} {answers[verb]}\x01")


@from_server("PRIVMSG", "NOTICE", least=2)
def message_came(talk: IrcTalk, heard: Heard) -> None:
    text = heard.params[1]
    if not talk.ready and heard.source.startswith("chat.py/"):
        return None  # for users of netcat, after a silence that a slow line causes too
    if is_ctcp(text):
        return answer_ctcp(talk, heard)
    view = spoken_view(talk, heard, text)
    if view.kind in (SAID, NOTICED):
        if view.kind == NOTICED and not (view.mine or talk.core.find(view.where)):
            talk.core.keep(talk.core.timed(view))
            view = view._replace(where="")  # a notice opens no conversation
        return talk.core.said(view, heard)
    if fold(view.name) == SERVICE_KEY and text == PASSWORD_CHANGED:
        renew_login(talk.core)
    elif fold(view.name) == SERVICE_KEY and text == ACCOUNT_GONE:
        forget_login(talk.core)
    who = f"{view.name}: " if "!" in heard.source else ""
    where = view.where if talk.core.find(view.where) and talk.server.is_channel(view.where) else ""
    talk.core.show(View(TOLD, who + view.text, time=view.time, where=where))


@from_server("CHATHISTORY", least=3)
def missed_in_a_talk(talk: IrcTalk, heard: Heard) -> None:
    """Ask for the missed messages of a private conversation that TARGETS names."""
    name = heard.params[1]
    asked = any(one.how == "targets" for one in talk.asked)
    if talk.server.is_channel(name) or not asked or len(talk.asked) > TARGETS_ASKED:
        return
    room = talk.core.room_for(name)
    room.held = room.held or []
    room.mark = room.mark or f"timestamp={tag_time(talk.since)}"
    talk.ask_history(room, "gap" if talk.core.tidy else "missed")


def we_joined(talk: IrcTalk, heard: Heard) -> None:
    core, talk.mask = talk.core, heard.source
    if core.find(heard.params[0]) is None and len(core.rooms) >= 2 * ROOMS_KEPT:
        return  # no user has so many channels
    for key in [key for key in talk.going if key[:1] == "!"]:  # the server added five characters
        if core.fold(heard.params[0])[6:] == key[1:]:
            talk.going[core.fold(heard.params[0])] = talk.going.pop(key)
            if there := core.find(key):
                core.rename(there, heard.params[0])
    room = core.room_for(heard.params[0])
    room.name, room.inside, room.is_channel = heard.params[0], True, True
    room.wanted = room.entered = True
    room.topic = ""  # else 332 follows
    talk.entering.pop(core.fold(room.name), None)
    room.password = talk.going.get(core.fold(room.name), room.password) or ""
    core.keep_room(room)
    core.changed(room)
    if not core.tidy and not room.mark:  # a pipe takes messages from now on
        if "msgid" in heard.tags:
            room.mark = f"msgid={heard.tags['msgid']}"
        elif core.began:  # joined earlier, before the connection broke
            room.mark = f"timestamp={tag_time(max(core.began, talk.since))}"
    core.newest = max(core.newest, heard.time or 0)
    if talk.going.pop(core.fold(room.name), None) is not None:
        core.go(room)
    if "no-implicit-names" in talk.server.enabled:
        talk.send("NAMES", room.name)
    talk.catch_up(room)
    waiting = (core.outbox.waiting[id].where for id in core.outbox.parked)
    if count := sum(core.fold(where) == core.fold(room.name) for where in waiting):
        text = f"{counted(count, 'message')} could not be sent before; /retry sends, /cancel drops"
        core.show(View(NOTE, text, where=room.name))


def one_by_one(handler: Callable) -> Callable:
    """Decorate a handler to be called for each channel: old servers name several in one line."""

    @functools.wraps(handler)
    def for_each(talk: IrcTalk, heard: Heard) -> None:
        for name in heard.params[0].split(","):
            handler(talk, heard._replace(params=[name, *heard.params[1:]]))

    return for_each


@from_server("JOIN", least=1)
@one_by_one
def user_joined(talk: IrcTalk, heard: Heard) -> None:
    core, name = talk.core, heard.params[0]
    if core.is_me(heard.name):
        return we_joined(talk, heard)
    if room := core.find(name):
        room.came(heard.name)
        address = heard.source.partition("@")[2]
        core.happened(room, View(CAME, name=heard.name, where=room.name, address=address))
        core.show(View(PEOPLE, where=room.name))


def user_went(talk: IrcTalk, room: Room, heard: Heard, name: str, why: str = "") -> None:
    """Remove a user, or this client, from one conversation."""
    core = talk.core
    room.people.pop(name, None)
    if core.is_me(name):
        room.inside = room.wanted = False
        return core.changed(room)
    address = heard.source.partition("@")[2]
    core.happened(room, View(WENT, why, name, room.name, address=address))
    core.show(View(PEOPLE, where=room.name))


@from_server("PART", least=1)
@one_by_one
def user_parted(talk: IrcTalk, heard: Heard) -> None:
    core = talk.core
    room = core.find(heard.params[0])
    if room is None:
        return
    user_went(talk, room, heard, heard.name, *heard.params[1:2])
    if core.is_me(heard.name):
        core.keep_room(room)
        core.close(room)


@from_server("QUIT")
def user_quit(talk: IrcTalk, heard: Heard) -> None:
    core = talk.core
    for room in list(core.rooms.values()):
        if heard.name in room.people:
            user_went(talk, room, heard, heard.name, *heard.params[:1])
    if (room := core.find(heard.name)) and not room.is_channel:
        why = f": {heard.params[0]}" if heard.params and heard.params[0] else ""
        core.happened(room, View(TOLD, f"{heard.name} has left{why}", where=room.name))
        room.gone = True  # as MONITOR tells, too
    core.forget_person(heard.name)
    talk.name_is_free(heard.name)


@from_server("KICK", least=2)
def user_kicked(talk: IrcTalk, heard: Heard) -> None:
    core, (where, name, *why) = talk.core, heard.params
    if room := core.find(where):
        reason = f": {why[0]}" if why else ""
        text = f"{heard.name} kicked {name} from {where}{reason}"
        core.happened(room, View(TOLD, text, where=room.name, called=core.is_me(name)))
        room.people.pop(name, None)
        if core.is_me(name):
            room.inside = room.wanted = False
            room.people.clear()
            talk.entering.pop(core.fold(where), None)
            core.park_all(room, f"you were kicked from {where}")
            core.keep_room(room)
            core.changed(room)
        core.show(View(PEOPLE, where=room.name))


@from_server("NICK", least=1)
def user_renamed(talk: IrcTalk, heard: Heard) -> None:
    core, old, new = talk.core, heard.name, heard.params[0]
    mine = core.is_me(old)
    if mine:
        if core.fold(new) == core.fold(clean_name(core.wanted_name)) or not core.regain:
            core.wanted_name, core.regain = new, False
        remember(core.former_names, core.fold(old))
        core.former_names.pop(core.fold(new), None)
        core.name = new
        talk.mask = f"{new}!{talk.mask.partition('!')[2]}" if "!" in talk.mask else ""
        core.show(View(TOLD, f"you are {new}"))
    for room in list(core.rooms.values()):
        if room.renamed(old, new) and not mine:
            core.happened(room, View(TOLD, f"{old} is now called {new}", where=room.name))
    core.forget_person(old, new)
    if core.find(old) and not core.find(new) and not mine:  # continue the private conversation
        core.rename(core.find(old), new)
    core.show(View(PEOPLE))
    if not mine:
        talk.name_is_free(old)


@from_server("RENAME", least=2)
def channel_renamed(talk: IrcTalk, heard: Heard) -> None:
    core, (old, new, *_) = talk.core, heard.params
    if room := core.find(old):
        core.rename(room, new)
        core.happened(room, View(TOLD, f"{heard.name} renamed {old} to {new}", where=new))


@from_server("TOPIC", least=2)
def topic_set(talk: IrcTalk, heard: Heard) -> None:
    if room := talk.core.find(heard.params[0]):
        room.topic = heard.params[1]
        text = f"{heard.name} set the topic of {room.name}: {room.topic}"
        if not room.topic:
            text = f"{heard.name} removed the topic of {room.name}"
        talk.core.changed(room)
        talk.core.happened(room, View(TOLD, text, where=room.name, time=heard.time))


WHOIS = {  # numeric -> text; {2} is the second parameter after the nick
    "301": "{1} is away: {last}",
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
    room = talk.core.find(heard.params[1])
    talk.core.show(View(TOLD, text, where=room.name if room and heard.verb == "301" else ""))


@from_server("367", "348", "346", least=3)
def mask_listed(talk: IrcTalk, heard: Heard) -> None:
    """<channel> <mask> [<setter> <seconds>]: a ban, an exception, an invitation"""
    _, where, mask, *more = heard.params
    setter = f" by {more[0].partition('!')[0]}" if more else ""
    seconds = int(more[1]) if len(more) > 1 and re.fullmatch(r"\d{9,11}", more[1]) else 0
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    when = f" on {date:%Y-%m-%d %H:%M} UTC" if seconds else ""
    kind = {"367": "banned", "348": "excepted", "346": "invited"}[heard.verb]
    room = talk.core.find(where)
    talk.core.show(View(TOLD, f"{kind}: {mask}{setter}{when}", where=room.name if room else ""))


@from_server("352", least=8)
def who_told(talk: IrcTalk, heard: Heard) -> None:
    """<channel> <user> <host> <server> <nick> <flags> :<hops> <real name>"""
    core = talk.core
    _, where, user, host, _, name, flags, last = heard.params[:8]
    bot = talk.server.tokens.get("BOT", "") or " "
    core.note_person(name, away=flags[:1] == "G", bot=bot in flags[1:])
    if core.fold(where) in core.quiet_who or not core.wants_who:  # ZNC sends WHO, too
        return
    away = ", away" if flags[:1] == "G" else ""
    operator = ", operator of the server" if "*" in flags else ""
    real = last.partition(" ")[2]
    talk.core.show(View(TOLD, f"{name} ({user}@{host}) in {where}: {real}{away}{operator}"))


@from_server("315")
def who_ended(talk: IrcTalk, heard: Heard) -> None:
    core, where = talk.core, heard.params[1] if len(heard.params) > 1 else ""
    if core.fold(where) in core.quiet_who:
        core.quiet_who.discard(core.fold(where))
        core.show(View(PEOPLE, where=where))
    else:
        core.wants_who = False


@from_server("AWAY")
def away_changed(talk: IrcTalk, heard: Heard) -> None:
    """Note that a user in a conversation with this client went away or is back."""
    talk.core.note_person(heard.name, away=bool(heard.params and heard.params[0]))
    talk.core.show(View(PEOPLE))
    if (room := talk.core.find(heard.name)) and not room.is_channel:
        state = f"is away: {heard.params[0]}" if heard.params and heard.params[0] else "is back"
        talk.core.happened(room, View(TOLD, f"{heard.name} {state}", where=room.name))


@from_server("ACCOUNT", least=1)
def account_changed(talk: IrcTalk, heard: Heard) -> None:
    talk.core.note_person(heard.name, account=heard.params[0].replace("*", ""))


@from_server("305", "306", least=2)
def own_away_told(talk: IrcTalk, heard: Heard) -> None:
    if heard.verb == "305":
        talk.core.away = ""
    talk.core.show(View(TOLD, heard.params[-1]))


@from_server("332", "331", least=3)
def topic_told(talk: IrcTalk, heard: Heard) -> None:
    _, where, topic = heard.params[:3]
    room = talk.core.find(where)
    if room:
        room.topic = topic if heard.verb == "332" else ""
        talk.core.changed(room)
    text = f"the topic of {where}: {topic}" if heard.verb == "332" else f"{where} has no topic"
    talk.core.show(View(TOLD, text, where=room.name if room else ""))


@from_server("MODE", least=2)
def modes_set(talk: IrcTalk, heard: Heard) -> None:
    """Follow the ranks of members. A removed rank may have hidden another: one NAMES tells."""
    where, letters, *values = heard.params
    room, server = talk.core.find(where), talk.server
    if room is None:
        return
    text = f"{heard.name} set {' '.join(heard.params[1:])} in {room.name}"
    talk.core.happened(room, View(TOLD, text, where=room.name))
    ranks = dict(zip(*server.ranks, strict=False))
    for sign, letter, value in server.mode_changes(letters, values):
        if letter in ranks:
            room.rank(value, ranks[letter], sign == "+", server.ranks[1])
            if sign == "-" and "multi-prefix" not in server.enabled:
                talk.stale_names.add(room.name)
    talk.core.show(View(PEOPLE, where=room.name))


@from_server("INVITE", least=2)
def invited(talk: IrcTalk, heard: Heard) -> None:
    where = heard.params[1]
    if talk.core.is_ignored(heard):
        return
    text = f"{heard.name} invites you to {where}; /join {where}"
    talk.core.show(View(TOLD, text, called=True))


@from_server("REDACT", least=2)
def taken_back(talk: IrcTalk, heard: Heard) -> None:
    """Remove a redacted message, also one that is still to come in a page."""
    core, (where, id) = talk.core, heard.params[:2]
    core.remove(id)
    name = where if talk.server.is_channel(where) or core.is_me(heard.name) else heard.name
    if room := core.find(name):
        text = f"{heard.name} took back a message"
        core.happened(room, View(TOLD, text, where=room.name))


@from_server("353", least=4)
def names_told(talk: IrcTalk, heard: Heard) -> None:
    key = talk.core.fold(heard.params[2])
    if key not in talk.core.rooms and key not in talk.shown_names:
        return
    coming = talk.names.setdefault(key, {})
    for word in heard.params[3].split()[: PEOPLE_LISTED - len(coming)]:
        name = word.lstrip(talk.server.ranks[1])
        coming[name.partition("!")[0]] = word.removesuffix(name)


@from_server("366", least=2)
def names_ended(talk: IrcTalk, heard: Heard) -> None:
    key = talk.core.fold(heard.params[1])
    people, room = talk.names.pop(key, {}), talk.core.rooms.get(key)
    text = ", ".join(ranks + name for name, ranks in people.items()) or "there is no user"
    if room:
        known = {name: people.pop(name) for name in room.people if name in people}
        room.people = people | known  # the last speaker is last
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
    """Show the result of a registration; after a success, log in to the account from now on."""
    core = talk.core
    core.show(View(TOLD, heard.params[-1]))
    if heard.params[0] == "SUCCESS":
        renew_login(core)


# The core


def check_message(where: str, text: str, kind: str, name_bytes: int) -> None:
    """Raise Refused if no server would take this message."""
    if text.count("\n") >= MESSAGE_LINES or len(text.encode()) > LINE_BYTES:
        limit = f"a message has at most {MESSAGE_LINES} lines and {LINE_BYTES:,} bytes"
        raise Refused("TOO_LONG", limit)
    if kind == ACTION and len(text.encode()) > FITS_ALWAYS:
        raise Refused("TOO_LONG", f"what one does has at most {FITS_ALWAYS} bytes")
    if len(where.encode()) > name_bytes:
        raise Refused("BAD_NAME", f"a name has at most {name_bytes} bytes")


class Rooms(dict[str, Room]):
    """The conversations of a client, by key, in the order in which they were opened."""

    def rekey(self, fold: Callable[[str], str]) -> None:
        """Apply a server's rule for names to all keys. Keep the first of two rooms with one key."""
        rooms = list(self.values())
        self.clear()
        for room in rooms:
            self.setdefault(fold(room.name), room)

    def least(self, besides: Collection[Room]) -> Room | None:
        """Return the oldest private conversation that is not in `besides`; None for none."""
        private = (room for room in self.values() if not room.is_channel and room not in besides)
        return next(private, None)


def wanted_rooms(join: Iterable[str], fold: Callable[[str], str] = fold) -> Rooms:
    """Return the conversations that --join names: "#a", or "#a PASSWORD"; the # may be left out."""
    names = [words.split() for words in join if words.split()]
    rooms = Rooms()
    for name, *password in names:
        name = name if is_channel(name) else f"#{name}"
        room = rooms[fold(name)] = Room(name, *password[:1], channel=True)
        room.wanted = True
    return rooms


class Credentials:
    """The account of a client, and the means to prove that the client owns it."""

    def __init__(self, login: Login | None):
        self.login = login
        self.proposed: Login | None = None  # by a /register or /passwd that is not confirmed yet
        self.account = ""  # that the client was logged in to
        self.generated = False  # the client made the password, and stores it on disk with ...
        self.keep: Callable[[Login | None], None] | None = None  # ... this; raises Unusable
        self.mechanisms: tuple[str, ...] = ("SCRAM-SHA-256", "EXTERNAL", "PLAIN")  # best first
        self.plain_allowed = False  # even without TLS, since the user named it
        self.certificate = False  # the client has a certificate for TLS


def first_words(core: "ClientCore", line: str) -> bool:
    """Detect the kind of a server by the line that it sends first. Return True if that line needs
    no other handling."""
    if line.startswith("* "):  # the server refuses the client, with a reason
        core.refuse(line.removeprefix("* "), TEMPORARY)
        core.show(View(TOLD, core.refusal))
        return True
    if other := other_protocol(line):
        core.listening = False
        core.give_up(f"this is no chat server: it speaks {other}")
        return True
    if line.startswith(":chat.py/"):
        core.kind = CHAT
    else:
        core.kind = IRC if IRC_SPEAKS.match(line) else PLAIN
    core.introduce()
    return core.kind == CHAT


SECRET_LINE = re.compile(  # the text after these words must not be logged
    r"(?i)^(PASS|AUTHENTICATE|OPER \S+|SESSION|REGISTER \S+ \S+|PRIVMSG NickServ :?\w+|NS \w+) .*"
)
PASSWORD_WORDS = ("login", "identify", "register", "passwd", "oper", "pass", "password")


def nearest_command(verb: str) -> str:
    """Return a question that names the command that the user may have meant; "" for none."""
    import difflib

    known = [*client_command, *CLIENT_ALIASES]
    near = difflib.get_close_matches(verb, known, 1, 0.6)
    return f" (/{near[0]}?)" if near else ""


def message_pieces(text: str) -> Iterator[str]:
    """Yield a text as messages that a server takes, divided between lines if possible."""
    lines: list[str] = []
    size = 0
    for line in text.split("\n"):
        for piece in split_text(line, LINE_BYTES):
            length = len(piece.encode()) + 1
            if lines and (size + length > LINE_BYTES or len(lines) == MESSAGE_LINES):
                yield "\n".join(lines)
                lines, size = [], 0
            lines.append(piece)
            size += length
    yield "\n".join(lines)


class Person(NamedTuple):
    """A member of a channel."""

    name: str
    rank: str = ""  # symbols as in NAMES, the highest first
    away: bool = False
    account: str = ""
    bot: bool = False


def optional(*words: str) -> list[str]:
    return [word for word in words if word]


class ForScreens:
    """The methods of a client core for screens, besides typed(), which takes the user's text."""

    server: ServerProfile
    outbox: Outbox
    rooms: Rooms
    talk: Any
    store: Any
    fold: Callable[[str], str]
    find: Callable[[str], Room | None]
    show: Callable[..., None]
    name = ""
    start_transfer: Callable[[Transfer], None] | None = None  # both set by Transfers
    end_transfer: Callable[[Transfer], None] | None = None

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []  # uploads and downloads
        self.upload_token, self.token_at = "", -math.inf
        self.wait_for_token: list[Callable[[str], None]] = []
        self.typed_at: dict[int, tuple[float, str]] = {}  # when the user's typing was told, and how
        self.away_keys: set[str] = set()  # keys of users who are away ...
        self.bots: set[str] = set()  # ... and of bots
        self.accounts: dict[str, str] = {}  # by key of their nicks
        self.quiet_who: set[str] = set()  # keys of channels with a WHO of a screen
        # The last lines of the protocol: time (ms), True if sent, and the line
        self.traffic: collections.deque[tuple[int, bool, str]]
        self.traffic = collections.deque(maxlen=TRAFFIC_LINES)

    # Messages that were not sent

    def retry(self, own_id: str) -> None:
        """Send a message that was left to the user; join its channel first if needed."""
        if own_id not in self.outbox.parked:
            return
        self.outbox.retry(own_id)
        self.sent_before.add(own_id)
        room = self.room_for(self.outbox.waiting[own_id].where)
        if room.is_channel and not room.inside and self.ready:
            room.wanted = True
            self.talk.enter(room)

    def cancel(self, own_id: str) -> None:
        """Drop a message that is not in flight."""
        if own_id in self.outbox.in_flight or own_id not in self.outbox.waiting:
            return
        where = self.outbox.waiting[own_id].where
        self.outbox.arrived(own_id)
        self.shown.discard(own_id)
        if room := self.find(where):
            room.drop(lambda view: view.own_id == own_id)
            self.show(View(REMOVED, where=where, own_id=own_id))

    # Files

    @property
    def file_host(self) -> str:
        """The URL for uploads. Raises Refused if the server announces none."""
        tokens, names = self.server.tokens, ("soju.im/FILEHOST", "draft/FILEHOST")
        urls = [word for name in names for word in tokens.get(name, "").split()]
        if not urls:
            raise Refused("NO_FILEHOST", "this server takes no files")
        return urls[0]

    def with_token(self, then: Callable[[str], None]) -> None:
        """Call then(token) with a token for uploads; "" if this server gives none."""
        if "draft/AUTHTOKEN" not in self.server.tokens:
            return then("")
        if self.upload_token and self.ticks() - self.token_at < TOKEN_SECONDS / 2:
            self.token_at = self.ticks()
            return then(self.upload_token)
        self.wait_for_token.append(then)
        return self.talk.send_at_once("TOKEN", "GENERATE", "FILEHOST")

    def took_token(self, token: str) -> None:
        """Give a token of the server to the uploads that wait for one; "" if there will be none."""
        self.upload_token, self.token_at = token, self.ticks()
        waiting, self.wait_for_token = self.wait_for_token, []
        for then in waiting:
            then(token)

    def keep_transfer(self, one: Transfer) -> None:
        if one not in self.transfers:
            self.transfers.append(one)
        if self.store:
            self.store.keep_transfer(one)
        self.show(View(TRANSFER, where=one.room, own_id=one.id))

    def forget_transfer(self, one: Transfer) -> None:
        if one in self.transfers:
            self.transfers.remove(one)
        if self.store:
            self.store.forget_transfer(one)
        self.show(View(TRANSFER, where=one.room, own_id=one.id))

    def drop_transfer(self, one: Transfer) -> None:
        """Stop the transfer of a file, and forget it."""
        self.forget_transfer(one)
        if self.end_transfer:
            self.end_transfer(one)

    def post_file(self, one: Transfer) -> None:
        """Send the link of an uploaded file to its conversation."""
        import mimetypes

        kind = mimetypes.guess_type(one.name)[0]
        about = ", ".join(optional(kind or "", size_text(one.size)))
        self.send(one.room, f"{one.name} ({about}): {one.url}")

    def save_file(self, room: Room, view: View, path: str) -> None:
        """Begin to save the file that a message links to. Raises Refused."""
        file = parse_file_tag(view.file)
        ending = file.type.rpartition("/")[2].replace("plain", "txt").replace("jpeg", "jpg")
        name = linked_name(view) or f"{file.path[-8:]}.{ending}"
        known = {"name": name, "url": file.path, "size": file.size, "type": file.type}
        self.start_transfer(Transfer(secrets.token_hex(8), False, room.name, path, **known))

    # Changes of messages: replies, reactions, redactions

    def can(self, what: str) -> bool:
        """Return whether this server allows a "reply", "react", "redact" or "typing"."""
        if what == "redact":
            return self.ready and "draft/message-redaction" in self.server.enabled
        tag = {"reply": REPLY, "react": REACT, "typing": TYPES}[what]
        return self.ready and self.server.takes(tag)

    def need(self, what: str) -> None:
        """Raise Refused if this server does not allow a "reply", "react", "redact" or "typing"."""
        if not self.can(what):
            raise Refused("CANNOT", f"this server takes no {what}")

    def redact(self, room: Room, id: str) -> None:
        """Redact a message of the user, or as an operator one of another user. Raises Refused."""
        self.need("redact")
        self.talk.command("REDACT", room.name, id)

    def react(self, room: Room, id: str, emoji: str, on: bool = True) -> None:
        """React to a message, or remove the reaction. Raises Refused."""
        self.need("react")
        if not emoji.strip() or len(emoji) > REACTION_CHARACTERS:
            limit = f"a reaction has 1 to {REACTION_CHARACTERS} characters"
            raise Refused("BAD_REACTION", limit)
        tags = f"{REACT if on else UNREACT}={escaped_tag(emoji)};{REPLY}={escaped_tag(id)}"
        self.talk.raw(f"@{tags} TAGMSG {room.name}")
        if "echo-message" not in self.server.enabled:  # else the echo shows it
            self.reacted(room, id, emoji, self.name, on)

    def reacted(self, room: Room, id: str, emoji: str, name: str, on: bool) -> None:
        """Store and show the reaction of a user, or the end of it."""
        known = name in self.reactions_of(id).get(emoji, ())
        if self.store and known != on:
            self.store.react(id, emoji, name, on)
            view = View(REACTED, emoji, name, room.name, id=id, number=1 if on else -1)
            self.show(view._replace(mine=self.is_me(name)))

    def answered_words(self, view: View) -> str:
        """Return the author and the text of the message that a view answers; "" for no answer."""
        room = self.find(view.where)
        if not view.reply or room is None:
            return ""
        known = next((one for one in reversed(room.views) if one.id == view.reply), None)
        known = known or self.kept(view.reply)
        return f"{known.name}: {known.text}" if known else "an earlier message"

    def reactions_of(self, id: str) -> dict[str, list[str]]:
        """Return the reactions to a message: lists of nicks, by emoji."""
        found: dict[str, list[str]] = {}
        for emoji, name in self.store.reactions(id) if self.store and id else ():
            found.setdefault(emoji, []).append(name)
        return found

    # Typing

    def typing(self, room: Room, state: str) -> None:
        """Tell the others in a conversation that the user is typing: "active" is repeated, "paused"
        is for a break, "done" for a text that is not sent after all."""
        now = self.ticks()
        ready = self.can("typing") and self.setting("typing") == "on"
        idle = self.outbox.waiting.keys() <= self.outbox.parked.keys()
        ready = ready and (room.inside or not room.is_channel) and idle
        ready = ready and self.talk.budget.tokens > TYPING_SPARE
        since, told = self.typed_at.get(room.id, (-math.inf, "done"))
        due = state != told or (state == "active" and now - since > TYPING_SECONDS)
        if ready and due and not (told == "done" and state == "paused"):
            self.typed_at[room.id] = now, state
            self.talk.send(f"@{TYPES}={state}", "TAGMSG", room.name)

    def types(self, room: Room, name: str, state: str) -> None:
        """Note that another user is typing, or has paused or stopped."""
        room.typing.pop(name, None)
        if state in ("active", "paused") and len(room.typing) < TYPING_MOST:
            seconds = TYPING_LASTS[state]
            room.typing[name] = self.ticks() + seconds
        self.show(View(TYPING, state, name, room.name))

    def end_typing(self) -> None:
        """Forget the users who have not continued to type."""
        for room in self.rooms.values():
            for name in [one for one, until in room.typing.items() if until < self.ticks()]:
                self.types(room, name, "done")

    # Read markers

    def mark_read(self, room: Room) -> None:
        """Note that the user has read everything in a conversation."""
        newest = max((view.time or 0 for view in room.views if is_news(view)), default=0)
        if room.unread or room.called:
            self.changed(room)
        room.unread = room.called = 0
        if newest > room.read_time:
            room.read_time = newest
            self.keep_room(room)

    def tell_read(self) -> None:
        """Send read markers to the server, for the user's other devices."""
        if not self.ready or "draft/read-marker" not in self.server.enabled:
            return
        for room in self.rooms.values():
            if room.read_time > room.told_time and (room.inside or not room.is_channel):
                room.told_time = room.read_time
                self.talk.send("MARKREAD", room.name, f"timestamp={tag_time(room.read_time)}")

    def told_read(self, room: Room, when: int) -> None:
        """Note up to which time (ms) the user has read a conversation on another device."""
        room.told_time = max(room.told_time, when)
        if room.read(when):
            self.keep_room(room)
            self.show(View(READ, where=room.name))

    def mute(self, room: Room, on: bool) -> None:
        """Mute a conversation, so that its messages do not call the user, or unmute it."""
        room.muted, room.called = on, 0
        self.keep_room(room)
        self.changed(room)

    def move(self, room: Room, place: int) -> None:
        """Move a conversation to another place in the list, counted from 0."""
        rooms = [one for one in self.rooms.values() if one is not room]
        rooms.insert(place, room)
        self.rooms.clear()
        self.rooms.update((self.fold(one.name), one) for one in rooms)
        for one in rooms:
            self.keep_room(one)
        self.changed(room)

    # Members

    def people(self, room: Room) -> list[Person]:
        """Return the members of a channel; the last speaker is last."""
        people = []
        for name, rank in room.people.items():
            key = self.fold(name)
            about = (key in self.away_keys, self.accounts.get(key, ""), key in self.bots)
            people.append(Person(name, rank, *about))
        return people

    def ask_people(self, room: Room) -> None:
        """Ask once in a connection which members of a channel are away."""
        asks = self.ready and room.inside and not room.asked_people
        if asks and len(room.people) <= PEOPLE_ASKED:
            room.asked_people = True
            self.quiet_who.add(self.fold(room.name))
            self.talk.send("WHO", room.name)

    def note_person(self, name: str, away: bool | None = None, **about: Any) -> None:
        """Note facts about a user that the server tells: away, account, bot."""
        key = self.fold(name)
        for keys, on in ((self.away_keys, away), (self.bots, about.get("bot"))):
            if on and len(keys) < PEOPLE_LISTED:
                keys.add(key)
            elif on is not None:
                keys.discard(key)
        account = about.get("account")
        if account and len(self.accounts) < PEOPLE_LISTED:
            self.accounts[key] = account
        elif account is not None:
            self.accounts.pop(key, None)

    def forget_person(self, name: str, new: str = "") -> None:
        """Forget the facts about a user who left, or move them to the new nick."""
        key = self.fold(name)
        about = (key in self.away_keys, self.accounts.get(key, ""), key in self.bots)
        self.note_person(name, away=False, account="", bot=False)
        if new:
            self.note_person(new, away=about[0], account=about[1], bot=about[2])

    # Stored messages

    def find_kept(self, words: str, room: Room | None = None, count: int = 200) -> list[View]:
        """Return the last stored messages that contain these words, in order."""
        if not self.store:
            return []
        found = self.store.find(words, count, self.fold(room.name) if room else None)
        return [self._in_room(view) for view in found if not self.hides(view)]

    def kept(self, id: str) -> View | None:
        """Return the stored message with this id; None if there is none."""
        return self.store.message(id) if self.store and id else None

    def kept_before(self, room: Room, view: View, count: int) -> list[View]:
        """Return the stored messages before one, in order."""
        found = self.store.page(self.fold(room.name), count, view) if self.store else []
        return [one for one in found if not self.hides(one)]

    def kept_after(self, room: Room, view: View, count: int) -> list[View]:
        """Return the stored messages after one, in order."""
        found = self.store.page_after(self.fold(room.name), count, view) if self.store else []
        return [one for one in found if not self.hides(one)]

    def around(self, room: Room, view: View, count: int) -> list[View]:
        """Return a message and the stored messages around it, in order."""
        half = count // 2
        before, after = self.kept_before(room, view, half), self.kept_after(room, view, half)
        return [*before, view, *after]


class ClientCore(ForScreens):
    """The client's side of a conversation with one server.

    Call connected() for each new connection, feed() with the bytes received, silence() if the
    server sends nothing, and disconnected() at the end. Send the bytes that take_output() returns.
    typed() takes the user's text; without a connection the text waits. `tidy` is for a screen: the
    core then asks for the latest messages. `later` runs a job off the loop. `clock` is wall time
    and `ticks` monotonic time, in seconds."""

    told_trouble = ""  # the last reported trouble of the store
    doubted = ""  # text that is sent if the user enters it again
    replying = ""  # the id of the message that the typed text answers
    wants_motd = wants_who = False  # on the user's request
    views_seen: float = math.inf  # number of views in the conversation when the text was begun
    looked_at = True  # False: the user looks at another server
    reads_at_once = True  # the current conversation; if False, mark_read() tells what was read
    results: Callable[[str, list[View]], None] | None = None  # takes the result of a search

    def __init__(
        self,
        name: str,
        tidy: bool = True,
        kind: str = "",
        password: str = "",
        join: Iterable[str] = (LOBBY,),
        login: Login | None = None,
        outbox: Outbox | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        later: Callable[[Callable, Callable], None] = lambda job, then: then(job()),
        ticks: Callable[[], float] = lambda: 0.0,
        store: Any = None,
        named: bool | None = None,
    ):
        super().__init__()
        self.store = store  # a ClientStore, or None
        self.wanted_name = self.name = name
        self.tidy, self.kind, self.password = tidy, kind, password
        self.me = Credentials(login)
        self.outbox = outbox or Outbox()
        self.clock, self.later, self.ticks = clock, later, ticks
        self.server = ServerProfile(kind in (CHAT, PLAIN))
        self.talk: Any = None  # while connected, once the protocol is known
        self.tls = self.secure = False  # encrypted; `secure` also without TLS on this machine
        self.listening = False  # waiting to see if the server speaks first
        self.refusal = ""  # the reason for which the server refuses the client ...
        self.cause = TEMPORARY  # ... and what that means for a new attempt
        self.dismissed = False  # the server sent ERROR, and will hang up
        self.redial = False  # connect again at once, with another protocol or TLS ...
        self.insists = False  # ... but not if the user set the protocol
        self.sure = False  # a line has proved the kind of the server
        self.sts: tuple[int, int] | None = None  # port and seconds of required TLS (IRCv3 sts)
        self.quitting = False
        self.regain = False  # the wanted nick was taken: get it once it is free ...
        self.regain_at = 0.0  # ... and ask for it at this time
        self.away, self.former_names = "", {}  # keys of this client's earlier nicks
        self.ctcp_budget = Budget(CTCP_BURST, CTCP_RATE, ticks())
        self.ignored: set[str] = store.ignored() if store else set()  # masks
        self.settings: dict[str, str] = store.settings() if store else {}  # changed ones
        self.seen: dict[str, None] = {}  # ids of known messages
        self.removed: dict[str, None] = {}  # ids of redacted messages
        self.shown: set[str] = set()  # own ids of messages shown as waiting
        self.sent_before: set[str] = set()  # own ids of messages that the user sends again
        self.known_own: dict[str, None] = {}  # own ids of messages that were shown and have arrived
        self.failures = 0  # messages that did not arrive, or that were not kept
        self.progress = 0  # number of acknowledged messages and of missing pages that came
        self.acknowledged = False  # some message was, over this connection
        self.page_lines = PAGE_LINES  # of missed messages in one page; fewer after a break
        self.newest, self.newest_id = 0, ""  # time (ms) and id of the newest known message
        self.began = 0  # time of the first welcome
        self.rooms = wanted_rooms(join, self.fold)
        if store:
            self._load([*join] not in ([], [LOBBY]) if named is None else named)
        self.current: Room | None = next(iter(self.rooms.values()), None)  # looked at
        self.inbox = LineBuffer(IRC_BYTES + 2 * TAGS_BYTES + LINE_BYTES)
        self.views: list[View] = []
        self.output: list[str] = []
        self._show_waiting()
        self.wants_connection = False  # connect now, at the user's request

    # State that outlives the program

    def _load(self, named: bool) -> None:
        """Load the open conversations and their last messages from the store."""
        self.server.ours = self.server.ours or self.store.fact("ours") == "yes"
        if mapping := self.store.fact("CASEMAPPING"):
            self.server.tokens["CASEMAPPING"] = mapping
        self.rooms.rekey(self.fold)
        stored = self.store.rooms()
        if stored and not named:
            self.rooms.clear()
        for room in (*self.rooms.values(), *stored):
            room = self.rooms.setdefault(self.fold(room.name), room)
            if not room.views:
                self._load_room(room)
        self.transfers = self.store.transfers()
        if newest := self.store.newest():
            self.newest, self.newest_id = newest.time or 0, newest.id

    def _load_room(self, room: Room) -> None:
        room.holes = self.store.fact(f"holes {self.fold(room.name)}").split()
        for view in self.behind_hole(room, self.store.page(self.fold(room.name), STORED_LINES)):
            room.views.append(view)
            if view.id:
                remember(self.seen, view.id)
                room.mark, room.mark_time = f"msgid={view.id}", view.time
            elif view.time:
                room.mark, room.mark_time = f"timestamp={tag_time(view.time)}", view.time
        room.views.dropped = len(room.views) == STORED_LINES
        later = [view for view in room.views if is_news(view) and (view.time or 0) > room.read_time]
        room.unread = len(later) if room.read_time else 0

    def _show_waiting(self) -> None:
        """Show the messages that an earlier run accepted and no server has acknowledged."""
        for one in self.outbox.waiting.values() if self.tidy else ():
            self._show_own(one, one.text)
        self.views.clear()  # each is in its conversation already

    def keep(self, view: View) -> None:
        """Store a message."""
        if self.store:
            self.store.add(self.fold(view.where), view)

    def keep_room(self, room: Room) -> None:
        """Store that a conversation is open, and whether to join it again; delete a closed one."""
        if self.store and self.fold(room.name) in self.rooms:
            place = list(self.rooms).index(self.fold(room.name))
            self.store.keep_room(self.fold(room.name), room, place)
        elif self.store:
            self.store.forget_room(self.fold(room.name))

    def note_holes(self, room: Room, *ids: str) -> None:
        """Store the ids of the messages of a room before which others are missing."""
        if self.store and (ids or room.holes):
            room.holes = list(ids)
            self.store.keep_fact(f"holes {self.fold(room.name)}", " ".join(ids))

    @staticmethod
    def behind_hole(room: Room, views: list[View]) -> list[View]:
        """Return the messages after the newest gap of a room; all of them if they have no gap."""
        ids = [view.id for view in views]
        return views[ids.index(room.hole) :] if room.hole and room.hole in ids else views

    def older_from_store(self, room: Room) -> bool:
        """Put stored messages before the first one of a room; return whether there are any.
        Messages before a gap are shown only if the server cannot be asked to fill that gap."""
        if not self.store:
            return False
        at_hole = bool(room.hole) and room.hole == room.oldest
        if at_hole and self.ready and self.talk.pages:
            return False
        first = next((view for view in room.views if view.kind in (SAID, NOTICED)), None)
        views = self.store.page(self.fold(room.name), PAGE_LINES, first)
        shown = {identity_of(view) for view in room.views}
        views = [view for view in views if identity_of(view) not in shown]
        if at_hole and views:
            views.append(View(NOTE, "messages are missing here", where=room.name))
            room.holes = room.holes[:-1]  # in this run only: the next run may fill the gap
        else:
            views = self.behind_hole(room, views)
        room.views.extendleft(reversed(views))
        room.views.dropped = len(views) == PAGE_LINES
        if views:
            self.show(View(OLDER, str(len(views)), where=room.name))
        return bool(views)

    def keep_facts(self) -> None:
        """Store how the server compares names, since the keys of conversations depend on that."""
        if self.store:
            self.store.keep_fact("ours", "yes" if self.server.ours else "no")
            self.store.keep_fact("CASEMAPPING", self.server.tokens.get("CASEMAPPING", ""))

    def close_store(self) -> None:
        """Store the open conversations and their drafts, at the end of the program."""
        if self.store:
            for room in self.rooms.values():
                self.keep_room(room)
            self.store.flush()

    def tell_trouble(self) -> None:
        """Tell the user once that the store cannot be used."""
        trouble, self.store.trouble = self.store.trouble, ""
        if trouble and trouble != self.told_trouble:
            text = f"client.db: {trouble}; what is said is not kept, or cannot be read"
            self.show(View(NOTE, text))
        self.told_trouble = trouble or self.told_trouble

    def keep_ignored(self) -> None:
        if self.store:
            self.store.keep_ignored(self.ignored)

    def setting(self, name: str) -> str:
        return self.settings.get(name, SETTINGS[name].usual)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities of IRCv3 that this client can use."""
        return (*WANTED, *WANTED_BY_SCREENS) if self.tidy else WANTED

    @property
    def ready(self) -> bool:
        """True if the server has welcomed the client."""
        return self.talk is not None and self.talk.ready

    def online(self) -> Any:
        """Return the present talk. Raises Refused without a connection."""
        if not self.ready:
            raise Refused("OFFLINE", "not connected; nothing was sent")
        return self.talk

    @property
    def user(self) -> "ClientCore":
        """The named user that the check before a command asks for: the core itself."""
        return self

    @property
    def here(self) -> str:
        """The name of the current conversation; "" if there is none."""
        return self.current.name if self.current else ""

    @property
    def room(self) -> Room | None:
        return self.current

    @property
    def idle(self) -> bool:
        """True if nothing is left to be sent, except messages that the user must decide about."""
        talk, outbox = self.talk, self.outbox
        waits = talk and (talk.queue or talk.pieces)
        return not waits and outbox.waiting.keys() <= outbox.parked.keys()

    # Names, by this server's rule

    def fold(self, name: str) -> str:
        return self.server.fold(name)

    def is_me(self, name: str) -> bool:
        return self.fold(name) == self.fold(self.name)

    def find(self, name: str) -> Room | None:
        return self.rooms.get(self.fold(name))

    def by_id(self, id: int) -> Room | None:
        return next((room for room in self.rooms.values() if room.id == id), None)

    def rekey(self) -> None:
        """Apply the rules of the server for comparing names and for the names of channels."""
        self.rooms.rekey(self.fold)
        for room in self.rooms.values():
            room.is_channel = room.is_channel or self.server.is_channel(room.name)

    def is_ignored(self, heard: Heard) -> bool:
        """Return whether the user ignores the source of a line, by nick or by mask."""
        return any(self.ignores(mask, heard.source) for mask in self.ignored)

    def ignores(self, mask: str, source: str) -> bool:
        name = source.partition("!")[0]
        if set(mask) & set("!@*?"):
            full = mask if "!" in mask else f"*!{mask}" if "@" in mask else f"{mask}!*@*"
            return bool(pattern_of(self.fold(full)).fullmatch(self.fold(source)))
        return self.fold(mask) == self.fold(name)

    def is_called(self, text: str) -> bool:
        """Return whether a text contains the user's nick or a word of the setting highlight."""
        words = [self.name, *self.setting("highlight").split()]
        return any(calls(text, word) for word in words)

    # The connection

    def connected(self) -> list[View]:
        self.inbox = LineBuffer(self.inbox.limit)
        self.output.clear()
        self.refusal, self.cause, self.redial, self.talk = "", TEMPORARY, False, None
        self.acknowledged = self.dismissed = False
        self.listening = not self.kind
        if not self.listening:
            self.introduce()
        return self.take_views()

    def disconnected(self) -> list[View]:
        """Handle the end of a connection. Messages in flight are sent again if the server cannot
        deliver them twice."""
        talk, self.talk, self.listening = self.talk, None, False
        flown = self.outbox.connection_lost()
        for one in flown if talk and talk.doubts else ():
            if talk.pages and talk.server.keeps_own_tags:
                self.outbox.unconfirmed.add(one.id)
            else:
                self.leave_to_user(one.id)
        if talk and any(asked.how in ("missed", "gap") for asked in talk.asked):
            self.page_lines = max(1, self.page_lines // 4)  # the page was too large for that line
        for key, password in talk.going.items() if talk else ():  # the answer to JOIN is lost
            room = self.room_for(key)
            room.wanted, room.password = True, password
        for room in self.rooms.values():
            room.held, room.inside, room.asked_people = [], False, False
            room.typing.clear()
            self.changed(room)
        self.quiet_who.clear()
        self.took_token("")
        return self.take_views()

    def silence(self) -> list[View]:
        """Handle a server that sends nothing at first: a workshop server waits for the name."""
        if self.listening:
            self.kind = PLAIN
            self.introduce()
        return self.take_views()

    def feed(self, data: bytes) -> list[View]:
        if not self.sure and data.startswith(TLS_RECORDS):
            self.give_up("this port wants TLS: write ircs://HOST:PORT")
            return self.take_views()
        self.inbox.feed(data)
        self._take_lines()
        self.flush()
        return self.take_views()

    def _take_lines(self) -> None:
        while self.cause != FATAL and (raw := self.inbox.take()) is not None:
            if raw == TOO_LONG:
                self.show(View(NOTE, "the server sent a line too long to be shown"))
                continue
            line = shown_line(raw)
            self.traffic.append((int(self.clock() * 1000), False, line))
            if self.listening and first_words(self, line):
                continue
            if self.talk:
                self.talk.take(line)

    def finish(self) -> list[View]:
        """Handle the end of the server's output. An unfinished last line counts, but not in IRC,
        where it may be half of one."""
        if self.kind == PLAIN:
            self.inbox.finish()
        self._take_lines()
        return self.take_views()

    def take_output(self) -> bytes:
        end = "\n" if self.kind == PLAIN else "\r\n"
        ends = {} if self.kind == PLAIN else NOT_IN_IRC
        lines = [line.translate(ends) for line in self.output]
        when = int(self.clock() * 1000)
        self.traffic.extend((when, True, SECRET_LINE.sub("\\1 \u2026", line)) for line in lines)
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
        """Connect again, with another protocol."""
        self.kind, self.redial = kind, True

    def refuse(self, why: str, cause: str) -> None:
        """Note why the server refuses this client, and what the cause means for a new attempt."""
        self.refusal, self.cause = why, cause

    def give_up(self, why: str) -> None:
        """Note why connecting again cannot help."""
        self.refuse(why, FATAL)
        self.redial = False

    def told_sts(self, value: str) -> None:
        """Note the port and the duration for which the server demands TLS (IRCv3 sts)."""
        tokens = parse_tags(value.replace(",", ";"))
        port, seconds = (whole_number(tokens.get(one, "")) for one in ("port", "duration"))
        if value:
            self.sts = port or 0, seconds or 0
            if port and not self.tls and self.cause != FATAL:
                self.redial = True

    def tick(self) -> list[View]:
        """Do the work of every second: overdue answers, joins in one row, read markers, store."""
        if self.talk:
            self.talk.tick()
        for room in self.rooms.values():
            if room.moves and self.clock() * 1000 - room.moved_at > MOVES_MS:
                self.show(self._in_room(room.show_moves()))
        here = self.current if self.reads_at_once and self.looked_at else None
        if here and not here.views.reading:
            self.mark_read(here)
        self.tell_read()
        self.end_typing()
        if self.store:
            self.store.flush()
            self.store.index()
            self.tell_trouble()
        self.flush()
        return self.take_views()

    def leave(self, reason: str = "") -> None:
        self.quitting = True
        if self.talk:
            self.talk.bye(reason)

    # Typed text

    def typed(
        self, text: str, room: Room | None = None, reply: str = "", seen: float = math.inf
    ) -> list[View]:
        """Take a command, or a message of one or several lines. `room` is the conversation of the
        text, perhaps not the current one. `reply` is the id of the message that the text answers.
        `seen` views were there when the text was begun: "the last message" is one of these."""
        looked_at, self.replying, self.views_seen = self.current, reply, seen
        self.current = room or looked_at
        self._typed(text)
        if self.current is room and looked_at and self.find(looked_at.name) is looked_at:
            self.current = looked_at
        self.replying, self.views_seen = "", math.inf
        self.flush()
        return self.take_views()

    def _typed(self, text: str) -> None:
        if text[:1] == "/" and text[:2] != "//":
            self._command(text)
        elif (doubt := self._doubtful(text)) and self.doubted != text:
            self.doubted = text
            self.show(View(BACK, text), View(NOTE, doubt))
        else:
            self._speak(text[1:] if text[:2] == "//" else text)

    def _doubtful(self, text: str) -> str:
        """Return why a text may not be meant as a message to all; "" if there is no doubt."""
        if not self.tidy:  # a program knows what it sends
            return ""
        first = text.split()[:1]
        if text[:1] == " " and first and first[0][:1] == "/" and first[0][1:] in client_command:
            return f"nothing was sent: is {first[0]} a command? Enter again sends it as text"
        words = text.lower().split()
        if len(words) > 1 and words[0] in PASSWORD_WORDS:
            return f"nothing was sent: is that /{words[0]}? Enter again sends it as text"
        if len(words) == 1 and text[:1] in ("#", "&") and self.server.is_channel(text):
            return f"nothing was sent: /join {text} opens it; Enter again sends that as text"
        return ""

    def say(self, text: str) -> list[View]:
        """Send a text from a pipe as a message, whatever its first character is."""
        self._speak(text)
        self.flush()
        return self.take_views()

    def _command(self, text: str) -> None:
        verb, _, rest = text[1:].partition(" ")
        verb = CLIENT_ALIASES.get(verb.lower(), verb.lower())
        known = client_command.get(verb)
        local = known and known.nameless
        near = "" if known else nearest_command(verb)
        why = (
            f"there is no /{verb}{near}; /help lists the commands" * (known is None)
            or "this server knows no commands" * (self.kind == PLAIN and not local)
            or "a command is one line" * ("\n" in text)
            or "not connected" * (not (self.ready or local))
        )
        if why:
            return self.show(View(BACK, text), View(NOTE, f"{why}; nothing was sent"))
        try:
            client_command.run(self, verb, rest)
        except ChatError as refusal:
            self.show(View(BACK, text), View(NOTE, str(refusal)))

    def _speak(self, text: str) -> None:
        self.doubted = ""
        if self.current is None:
            return self.show(View(BACK, text), View(NOTE, "nowhere to say that; /join #CHANNEL"))
        self.send(self.here, text)

    def send(self, where: str, text: str, kind: str = MESSAGE) -> None:
        """Accept a message: show it at once, and send it when possible. A text that is too long for
        one message becomes several."""
        split = message_pieces(text) if kind == MESSAGE else split_text(text, FITS_ALWAYS)
        pieces = list(split)
        for n, piece in enumerate(pieces):
            try:
                lengths = (self.server.limit(f"{one}LEN", 0) for one in ("CHANNEL", "NICK"))
                check_message(where, piece, kind, max(NAME_BYTES, *lengths))
                kept = piece if piece.strip("\n") else ""
                one = self.outbox.add(self.clock(), where, kept, kind, self.replying)
            except ChatError as error:
                rest = "\n".join(pieces[n:])
                return self.show(View(BACK, rest), View(NOTE, f"{error}; nothing was sent"))
            self._accepted(one, piece)
        if len(pieces) > 1:
            self.show(View(NOTE, f"too long for one message: sent as {len(pieces)}"))

    def _show_own(self, one: Waiting, text: str) -> Room:
        """Show a message of this client in its conversation; return the conversation."""
        self.shown.add(one.id)
        shown = f"*{text}*" if one.kind == ACTION else text
        room = self.room_for(one.where)
        view = View(SAID, shown, self.name, one.where, mine=True, own_id=one.id, reply=one.reply)
        view = self.timed(view._replace(time=accepted_at(one.id)), room)
        room.views.append(view)
        self.show(view)
        return room

    def _accepted(self, one: Waiting, text: str) -> None:
        room = self._show_own(one, text)
        self.typed_at.pop(room.id, None)  # a message implies that typing is done
        if room.is_channel and self.ready and not (room.inside or room.wanted):
            self.park(one.id, f"you are not in {room.name}")

    def flush(self) -> None:
        """Send the messages and lines that may be sent now."""
        if self.talk and self.talk.ready and not self.redial and self.cause != FATAL:
            self.talk.pump()

    # Views, conversations and the outcome of messages

    def show(self, *views: View) -> None:
        self.views += map(self._in_room, views)

    def _in_room(self, view: View) -> View:
        """Return a view with the id of its conversation."""
        room = self.find(view.where) if view.where and not view.room else None
        return view._replace(room=room.id) if room else view

    def show_results(self, title: str, views: list[View]) -> None:
        """Show the messages that a search or a request for history found, between two notes."""
        views = [view for view in views if not self.hides(view)]
        if self.results:
            return self.results(title, views)
        if not views:
            return self.show(View(NOTE, f"{title}: nothing found"))
        found = (view._replace(kind=FOUND, past=True) for view in views)
        self.show(View(NOTE, f"{title}: {counted(len(views), 'message')}"), *found)
        self.show(View(NOTE, f"end of {title}"))

    def room_for(self, name: str) -> Room:
        """Return a conversation; open it if needed. If there are too many, the oldest private one
        is closed, unless it is the current one or has waiting messages."""
        if self.find(name) is None and len(self.rooms) >= ROOMS_KEPT:
            needed = {self.find(one.where) for one in self.outbox.waiting.values()}
            if least := self.rooms.least({self.current, *needed}):
                self.close(least)
        key = self.fold(name)
        if key not in self.rooms:
            room = self.rooms[key] = Room(name, channel=self.server.is_channel(name))
            if self.ready and not room.is_channel:
                self.talk.watch([name])
            if self.store:
                self._load_room(room)
                self.keep_room(room)
            self.changed(room)
        return self.rooms[key]

    def go(self, room: Room) -> None:
        """Make a conversation the current one."""
        self.show(View(PLACE, str(room.unread or ""), where=room.name))
        self.current = room
        if self.reads_at_once:
            room.unread = room.called = 0
            self.mark_read(room)

    def rename(self, room: Room, name: str) -> None:
        """Rename a conversation. Another one with the new name has ended, and is dropped."""
        old, other = self.fold(room.name), self.find(name)
        if other is not None and other is not room:  # a conversation that has ended
            self.rooms.pop(self.fold(name))
            self.current = room if self.current is other else self.current
        if self.talk:
            self.talk.renamed(room.name, name)
        self.outbox.readdress(lambda where: self.fold(where) == old, name)
        if self.store:
            self.store.rename(old, self.fold(name))
        room.name = name
        self.rooms.rekey(self.fold)
        self.keep_room(room)
        self.changed(room)
        if self.current is room:
            self.go(room)

    def close(self, room: Room) -> None:
        """Close a conversation, and on a screen go to the last one that is open."""
        self.rooms.pop(self.fold(room.name), None)
        self.keep_room(room)
        self.changed(room)
        for one in [*self.outbox.unconfirmed]:
            if self.fold(self.outbox.waiting[one].where) == self.fold(room.name):
                self.leave_to_user(one)
        if self.current is room:
            self.current = None
            for other in list(self.rooms.values())[-1:] if self.tidy else ():
                self.go(other)

    def said(self, view: View, heard: Heard | None = None) -> None:
        """Handle a live message, which waits behind requested pages. An echo is acknowledged at
        once."""
        if heard is not None and not view.mine and self.is_ignored(heard):
            return
        if view.own_id:
            self.acknowledge(view)
        if view.own_id == PIECE:
            return
        if not view.where:
            return self.show(self.timed(view))
        room = self.room_for(view.where)
        if room.held is None:
            self.deliver(room, view)
        else:
            room.hold(view)

    def acknowledge(self, view: View) -> None:
        """Note that the server has a message of this client; store it and show its arrival."""
        one = self.outbox.arrived(view.own_id)
        if one is not None:
            self.made_progress()
            self.acknowledged = True
            if self.talk:
                self.talk.acknowledged(one.id)
            text = f"*{one.text}*" if one.kind == ACTION else one.text
            said = View(SAID, text, self.name, one.where, view.time, mine=True, id=view.id)
            known = {"own_id": one.id, "reply": one.reply, "file": view.file}
            self.keep(self.timed(said._replace(**known)))
        if view.own_id in self.shown:
            self.shown.discard(view.own_id)
            remember(self.known_own, view.own_id)
            where = one.where if one else view.where
            if (room := self.find(where)) and view.id:
                room.name_view(view.own_id, view.id, view.file)
            self.show(view._replace(kind=ARRIVED, where=where))

    def made_progress(self) -> None:
        self.progress += 1

    def timed(self, view: View, room: Room | None = None) -> View:
        """Return a view with its time and the id of its conversation."""
        when = int(self.clock() * 1000) if view.time is None else view.time
        return view._replace(time=when, room=room.id if room else view.room)

    def changed(self, room: Room) -> None:
        """Tell the screens to draw the state of a conversation again."""
        self.show(View(ROOM, where=room.name, room=room.id))

    def happened(self, room: Room, view: View) -> None:
        """Show an event that is no message, like a join or a topic, or hold it behind pages."""
        view = self.timed(view, room)
        if room.held is not None:
            return room.hold(view)
        known = view.name in room.spoken or self.setting("fold") == "off"
        moved, when = view.kind in (CAME, WENT) and not known, view.time or 0
        if not moved:
            self.unfold(room, view.name)
        if moved and when - room.moved_at < MOVES_MS:
            room.moves.append(view)
        else:
            room.views.append(view)
            room.moved_at = when if moved else room.moved_at
        self.show(view)

    def unfold(self, room: Room, name: str) -> None:
        """Show the collected joins if this user is among them: else their row would follow the
        user's message or quit."""
        if any(move.name == name for move in room.moves):
            self.show(self._in_room(room.show_moves()))

    def knows(self, id: str) -> bool:
        """Return whether the message with this id has come before; note that it has come now."""
        known = id in self.seen
        if id:
            remember(self.seen, id)
        return known

    def deliver(self, room: Room, view: View) -> None:
        """Store and show the next message of a room."""
        self.newest = max(self.newest, view.time or 0)
        known = self.knows(view.id)
        if view.id and not known:
            room.mark, room.mark_time = f"msgid={view.id}", view.time
            self.newest_id = view.id
        if view.own_id:
            arrived = view.own_id in self.outbox.waiting
            seen_waiting = view.own_id in self.shown
            self.acknowledge(view)
            if seen_waiting or view.own_id in self.known_own:
                return
            known = known and not arrived
        if known or self.hides(view):
            return
        room.spoke(view.name)
        room.typing.pop(view.name, None)
        self.unfold(room, view.name)
        view = self.timed(view, room)
        self.keep(view)
        room.views.append(view)
        elsewhere = room is not self.current or not self.looked_at or not self.reads_at_once
        if elsewhere and not (view.mine or view.past) and view.time > room.read_time:
            room.unread += 1
            room.called += view.called and not room.muted
        self.show(view)

    def hides(self, view: View) -> bool:
        """Return whether a view is not to be shown: no message, redacted, or of an ignored user."""
        if view.kind not in (SAID, NOTICED) or view.id in self.removed:
            return True
        source = f"{view.name}!{view.address}"
        return not view.mine and any(self.ignores(mask, source) for mask in self.ignored)

    def remove(self, id: str) -> None:
        """Remove a redacted message, also one that is still to come."""
        remember(self.removed, id)
        if self.store:
            self.store.remove(id)
        for room in self.rooms.values():
            if room.drop(lambda view: view.id == id):
                self.show(View(REMOVED, where=room.name, id=id))

    def release(self, room: Room) -> None:
        """Show the views that were held while older messages were fetched."""
        held, room.held = room.held or [], None
        for view in held:  # messages known from pages, too: one may be an echo
            (self.deliver if view.kind in (SAID, NOTICED) else self.happened)(room, view)
        self.outbox.unconfirmed -= {
            one.id
            for one in self.outbox.waiting.values()
            if self.fold(one.where) == self.fold(room.name)
        }

    def lost(self, own_id: str, reason: str) -> None:
        """Report that a message has not arrived, and do not send it again."""
        one = self.outbox.arrived(own_id)
        if one is not None:
            self.shown.discard(own_id)
            self.failures += 1
            text = f"{reason}: {beginning(one.text)}"
            self.show(View(FAILED, text, where=one.where, own_id=own_id))

    def park_all(self, room: Room, why: str) -> None:
        """Let the user decide about all messages for a channel that the client is not in."""
        for one in list(self.outbox.waiting.values()):
            if self.fold(one.where) == self.fold(room.name) and one.id not in self.outbox.parked:
                self.park(one.id, "it may have arrived or not" if one.sent else why)

    def leave_to_user(self, own_id: str) -> None:
        """Give up a message that may have arrived, or, with a screen, let the user decide."""
        reason = "the line broke: it may have arrived or not"
        if self.tidy:
            self.park(own_id, reason)
        else:
            self.lost(own_id, reason)

    def park(self, own_id: str, reason: str) -> None:
        """Report that a message cannot be sent now, and let the user decide about it."""
        self.outbox.park(own_id, reason)
        if self.talk:
            self.talk.forget(own_id)
        one = self.outbox.waiting[own_id]
        if one.at:
            share = f"{one.text.count(chr(10), 0, one.at) + 1} of {one.text.count(chr(10)) + 1}"
            reason, what = f"{reason}; {share} lines have arrived", "the rest"
        else:
            what = "it"
        advice = f"; /retry sends {what}, /cancel drops it" if self.tidy else ""
        text = f"{reason}: {beginning(one.text)}{advice}"
        self.show(View(FAILED, text, where=one.where, own_id=own_id))


# The commands of a user, over IRC


def asked_room(core: ClientCore, name: str = "") -> Room:
    """Return the conversation with this name; without a name the current one. Raises Refused."""
    room = core.find(name) if name else core.room
    if room is None:
        raise Refused("NO_ROOM", f"{name or 'nothing'} is not open; /join #CHANNEL opens one")
    return room


def asked_channel(core: ClientCore) -> str:
    """Return the name of the current channel. Raises Refused if no channel is the current room."""
    room = asked_room(core)
    if not room.is_channel:
        raise Refused("NO_CHANNEL", f"{room.name} is no channel")
    return room.name


def channel_and(core: ClientCore, words: Iterable[str]) -> tuple[str, list[str]]:
    """Return a channel, which the first word names or which is the current one, and other words."""
    first, *rest = [*words, ""]
    if core.find(first) and core.find(first).is_channel:
        return first, optional(*rest)
    return asked_channel(core), optional(first, *rest)


def channel_first(core: ClientCore, words: str) -> tuple[str, str]:
    """Return the conversation that the first word names, or else the current one; and the rest."""
    first, _, rest = words.partition(" ")
    if core.find(first) or (core.server.is_channel(first) and first[:1] in "#&"):
        return first, rest.strip()
    return asked_room(core).name, words


HELP_TOPICS = {
    "files": ("send", "save", "transfers"),
    "talk": (
        *("msg", "query", "me", "notice", "ctcp", "reply", "react", "unreact", "redact"),
        *("go", "close", "clear", "mute", "unmute", "retry", "cancel"),
    ),
    "channels": ("join", "part", "topic", "names", "who", "list", "invite", "kick", "ban", "unban"),
    "ranks": ("mode", "op", "deop", "voice", "devoice"),
    "history": ("history", "search", "lastlog"),
    "people": ("whois", "away", "back", "ignore", "unignore"),
    "account": ("nick", "register", "verify", "login", "passwd", "drop", "disown", "oper", "pass"),
    "connection": ("connect", "disconnect", "reconnect", "raw", "quit", "help", "set"),
}


@client_command("help", most=1, nameless=True)
def do_help(core: ClientCore, verb: str = "") -> None:
    """/help [COMMAND|TOPIC] -- what can be typed here"""
    word = verb.lstrip("/").lower()
    wanted = client_command.get(CLIENT_ALIASES.get(word, word))
    verbs = HELP_TOPICS.get(word, client_command if not word else ())
    shown = [wanted] if wanted else [client_command[one] for one in verbs]
    if not shown:
        topics = ", ".join(HELP_TOPICS)
        near = nearest_command(word)
        raise Refused("NO_HELP", f"no help about {verb}{near}; commands: /help; topics: {topics}")
    column = max(len(one.syntax) for one in shown)
    lines = [f"{one.syntax:{column}}  {one.summary}" for one in shown]
    lines += [f"topics:  {', '.join(HELP_TOPICS)} (/help TOPIC)"] * (not word)
    core.show(View(PAGE, "\n".join(lines), f"help {word}".rstrip()))


@client_command("join", 1, 2)
def do_join(core: ClientCore, name: str, password: str = "") -> None:
    """/join #CHANNEL [PASSWORD] -- enter a channel, or look at it again"""
    names, keys = name.split(","), password.split(",")
    for one, password in itertools.zip_longest(names, keys[: len(names)], fillvalue=""):
        one = core.server.as_channel(one)
        room = core.find(one)
        if room and room.inside:
            core.go(room)
            continue
        core.talk.going[core.fold(one)] = password
        core.talk.command("JOIN", one, *optional(password))
        core.talk.note_join(one)
        if room:
            room.wanted = True
        if not core.tidy:  # the next text of a pipe is meant for this channel
            there = core.room_for(one)
            there.wanted, there.is_channel = True, True
            core.go(there)


@client_command("part", most=2)
def do_part(core: ClientCore, *words: str) -> None:
    """/part [#CHANNEL] [REASON] -- leave a channel, or close a private conversation"""
    named = bool(words) and (core.find(words[0]) is not None or core.server.is_channel(words[0]))
    room = asked_room(core, words[0] if named else "")
    reason = " ".join(words[named:])
    if room.inside or core.fold(room.name) in core.talk.entering:
        core.talk.command("PART", room.name, *optional(reason))
    else:
        room.wanted = False
        core.keep_room(room)
        core.close(room)


@client_command("close", most=1, nameless=True)
def do_close(core: ClientCore, name: str = "") -> None:
    """/close [#CHANNEL|NAME] -- the same, also without a connection"""
    room = asked_room(core, name)
    if room.inside and core.ready:
        return do_part(core, room.name)
    room.wanted = False
    core.keep_room(room)
    core.close(room)


@client_command("go", 1, nameless=True)
def do_go(core: ClientCore, name: str) -> None:
    """/go #CHANNEL|NAME|N -- look at another conversation, by its name or number"""
    number = whole_number(name)
    if number and number <= len(core.rooms):
        return core.go(list(core.rooms.values())[number - 1])
    found = core.find(name) or core.find(f"#{name}")
    core.go(found or asked_room(core, name))


@client_command("msg", 1, 2, nameless=True)
def do_msg(core: ClientCore, name: str, text: str = "") -> None:
    """/msg NAME [TEXT] -- say something to one person only, or open a private conversation"""
    for one in name.split(",") if text else ():
        group = core.server.without_status(one) != one  # some members of a channel
        if group or fold(one) in SERVICES:  # these store nothing, and must not get it twice
            core.online().command("PRIVMSG", one, text)
        else:
            core.send(one, text)
    if not text or core.server.is_channel(name):
        core.go(core.room_for(name))


@client_command("query", 1, 2, nameless=True)
def do_query(core: ClientCore, name: str, text: str = "") -> None:
    """/query NAME [TEXT] -- open a private conversation, and say something there"""
    core.go(core.room_for(name))
    if text:
        core.send(name, text)


@client_command("me", 1, nameless=True)
def do_me(core: ClientCore, text: str) -> None:
    """/me TEXT -- say what you do"""
    core.send(asked_room(core).name, text, ACTION)


@client_command("notice", 2)
def do_notice(core: ClientCore, name: str, text: str) -> None:
    """/notice NAME|#CHANNEL TEXT -- send a notice, which no program answers"""
    for line, _ in sendable_lines(text, FITS_ALWAYS):
        core.talk.command("NOTICE", name, line)
    if "echo-message" not in core.server.enabled:
        core.show(View(NOTICED, text, core.name, name, mine=True))


@client_command("ctcp", 2)
def do_ctcp(core: ClientCore, name: str, request: str) -> None:
    """/ctcp NAME VERSION|PING|TIME -- ask the program of a user something"""
    verb, _, rest = request.partition(" ")
    rest = rest or (f"{core.ticks():.3f}" if verb.upper() == "PING" else "")
    core.talk.command("PRIVMSG", name, f"\x01{' '.join(optional(verb.upper(), rest))}\x01")


@client_command("names", most=1)
def do_names(core: ClientCore, name: str = "") -> None:
    """/names [#CHANNEL] -- who is here"""
    where = name or asked_channel(core)
    core.talk.shown_names.add(core.fold(where))
    core.talk.command("NAMES", where)


@client_command("topic", most=1)
def do_topic(core: ClientCore, words: str = "") -> None:
    """/topic [#CHANNEL] [TEXT|-delete] -- read, set or remove what a channel is about"""
    where, text = channel_first(core, words)
    if text == "-delete":
        return core.talk.command("TOPIC", where, "")
    core.talk.command("TOPIC", where, *optional(text))


@client_command("nick", 1, 1)
def do_nick(core: ClientCore, name: str) -> None:
    """/nick NAME -- be called otherwise"""
    core.regain = False
    core.talk.command("NICK", name)


@client_command("history", most=2)
def do_history(core: ClientCore, *words: str) -> None:
    """/history [#CHANNEL|NAME] [N] -- what was said last"""
    count = whole_number(words[-1]) if words else None
    name = words[0] if words and (len(words) > 1 or not count) else asked_room(core).name
    if not core.talk.pages:
        raise Refused("NO_HISTORY", "this server keeps no history; /lastlog looks in your own")
    limit = min(count or HISTORY_LINES, HISTORY_LINES_MOST)
    core.talk.ask(Asked(name, "asked", 0), "LATEST", name, "*", str(limit))


@client_command("lastlog", 1, nameless=True)
def do_lastlog(core: ClientCore, words: str) -> None:
    """/lastlog WORDS -- what was said here with these words in it, as this client has kept it"""
    room = asked_room(core)
    if core.store:
        found = core.store.find(words, LASTLOG_MOST, core.fold(room.name))
    else:
        wanted = fold(words)
        spoken = (one for one in room.views if one.kind in (SAID, NOTICED))
        found = [one for one in spoken if wanted in fold(one.text)][-LASTLOG_MOST:]
    core.show_results(f"lastlog of {core.here}", found)


@client_command("search", 1, nameless=True)
def do_search(core: ClientCore, words: str) -> None:
    """/search WORDS -- what was said with these words in it, here; by the server if it can"""
    if not core.ready or "soju.im/search" not in core.server.enabled:
        return do_lastlog(core, words)
    where, text = channel_first(core, words)
    core.talk.command("SEARCH", f"in={escaped_tag(where)};text={escaped_tag(text)}")


@client_command("away", most=1)
def do_away(core: ClientCore, reason: str = "") -> None:
    """/away [REASON] -- say that you are not here, or that you are back"""
    core.away = reason
    core.talk.command("AWAY", *optional(reason))


@client_command("back")
def do_back(core: ClientCore) -> None:
    """/back -- say that you are here again"""
    do_away(core)


@client_command("ignore", most=1, nameless=True)
def do_ignore(core: ClientCore, mask: str = "") -> None:
    """/ignore [NAME|MASK] -- do not show what a user says; who is ignored"""
    if mask:
        core.ignored.add(mask)
        core.keep_ignored()
    text = ", ".join(sorted(core.ignored)) or "no user"
    core.show(View(NOTE, f"ignored: {text}"))


@client_command("unignore", 1, nameless=True)
def do_unignore(core: ClientCore, mask: str) -> None:
    """/unignore NAME|MASK -- show again what a user says"""
    known = {core.fold(one): one for one in core.ignored}
    if core.fold(mask) not in known:
        raise Refused("NOT_IGNORED", f"{mask} is not ignored; /ignore lists who is")
    core.ignored.discard(known[core.fold(mask)])
    core.keep_ignored()
    do_ignore(core)


@client_command("invite", 1, 2)
def do_invite(core: ClientCore, name: str, where: str = "") -> None:
    """/invite NAME [#CHANNEL] -- ask a user to come in"""
    core.talk.command("INVITE", name, where or asked_channel(core))


@client_command("kick", 1, 3)
def do_kick(core: ClientCore, *words: str) -> None:
    """/kick [#CHANNEL] NAME [REASON] -- put a user out of this channel"""
    where, (name, *reason) = channel_and(core, words)
    core.talk.command("KICK", where, name, *optional(" ".join(reason)))


def ban_of(name: str) -> str:
    """Return the mask for a ban; a nick becomes the mask of the user who has it."""
    return name if set(name) & set("!@*:$") else f"{name}!*@*"


@client_command("ban", most=2)
def do_ban(core: ClientCore, *words: str) -> None:
    """/ban [#CHANNEL] [NAME|MASK] -- keep a user out of this channel; which bans there are"""
    where, masks = channel_and(core, words)
    core.talk.command("MODE", where, "+b", *map(ban_of, masks[:1]))


@client_command("unban", 1, 2)
def do_unban(core: ClientCore, *words: str) -> None:
    """/unban [#CHANNEL] NAME|MASK -- end a ban"""
    where, masks = channel_and(core, words)
    core.talk.command("MODE", where, "-b", *map(ban_of, masks[:1]))


@client_command("mode", most=1)
def do_mode(core: ClientCore, words: str = "") -> None:
    """/mode [#CHANNEL|NAME] [+-LETTERS] [VALUE ...] -- read or set what a channel is like"""
    where, rest = channel_first(core, words)
    if words and core.is_me(words.split()[0]):
        where, _, rest = words.partition(" ")
    core.talk.command("MODE", where, *rest.split())


def command_for_ranks(verb: str, mode: str, summary: str) -> None:
    """Define a command that gives a rank to several users, or removes it."""

    def change(core: ClientCore, names: str) -> None:
        most = core.server.limit("MODES", 3)
        where, words = channel_and(core, names.split())
        for n in range(0, len(words), most):
            some = words[n : n + most]
            letters = mode[0] + mode[1] * len(some)
            core.talk.command("MODE", where, letters, *some)

    change.__doc__ = f"/{verb} [#CHANNEL] NAME ... -- {summary}"
    client_command(verb, 1)(change)


command_for_ranks("op", "+o", "make users operators of this channel")
command_for_ranks("deop", "-o", "make them operators no longer")
command_for_ranks("voice", "+v", "let users speak in a moderated channel")
command_for_ranks("devoice", "-v", "let them no longer")


def command_that_is_sent(verb: str, syntax: str, summary: str, least: int, secret: bool) -> None:
    """Define a command that passes its words to the server's command of the same name."""

    def pass_on(core: ClientCore, *words: str) -> None:
        core.talk.command(verb.upper(), *words)

    pass_on.__doc__ = f"/{verb} {syntax} -- {summary}"
    client_command(verb, least, least or 1, exact=secret)(pass_on)


for sent_on in (
    ("list", "[MASK]", "which channels there are", 0, False),
    ("whois", "NAME", "what is known of a user", 1, False),
    ("oper", "NAME PASSWORD", "operate the server", 2, True),
):
    command_that_is_sent(*sent_on)


@client_command("who", most=1)
def do_who(core: ClientCore, mask: str = "") -> None:
    """/who [#CHANNEL|MASK] -- who is there, with addresses"""
    core.wants_who = True
    core.talk.command("WHO", mask or asked_channel(core))


@client_command("register", most=2, exact=True)
def do_register(core: ClientCore, *words: str) -> None:
    """/register [EMAIL] [PASSWORD] -- make your name yours; without a password this computer
    makes one, keeps it, and logs in with it from then on"""
    by_mail = "email-required" in core.server.offered.get("draft/account-registration", "")
    email = words[0] if len(words) > 1 or (words and by_mail) else "*"
    password = words[-1] if words and words[-1] != email else ""
    if not password and core.me.keep is None:
        raise Refused("NO_STATE", "nothing is kept on disk; /register with a password of yours")
    core.me.generated = not password
    core.me.proposed = Login(core.name, password or secrets.token_urlsafe(SECRET_DIGITS))
    if core.me.generated:  # before the server confirms: its answer may be lost
        core.me.login = core.me.proposed
        core.me.keep(core.me.login)
    core.talk.command("REGISTER", "*", email, core.me.proposed.password)


@client_command("verify", 1)
def do_verify(core: ClientCore, code: str) -> None:
    """/verify CODE -- the one that came by mail, to end a /register"""
    core.talk.command("VERIFY", core.name, code)


def service_words(words: Iterable[str]) -> str:
    """Return words for a service, with quotes around those that contain blanks."""
    return " ".join(f'"{word}"' if " " in word else word for word in words)


@client_command("login", 1, 2, exact=True)
def do_login(core: ClientCore, *words: str) -> None:
    """/login [ACCOUNT] PASSWORD -- be who you are; also after a reconnection"""
    core.me.login = Login(words[0] if len(words) > 1 else core.name, words[-1])
    enabled = "sasl" in core.server.enabled
    mechanism = core.talk.mechanism(asked=True) if enabled else ""
    if not mechanism:
        return core.talk.command("PRIVMSG", SERVICE, f"IDENTIFY {service_words(core.me.login)}")
    core.talk.begin_log_in(mechanism)


@client_command("passwd", 1, 2, exact=True)
def do_passwd(core: ClientCore, *words: str) -> None:
    """/passwd [OLD] NEW -- another password for your account"""
    if len(words) == 1 and core.me.login is None:
        raise Refused("NOT_LOGGED_IN", "which one is the old one? /passwd OLD NEW")
    old = words[0] if len(words) > 1 else core.me.login.password
    core.me.proposed = Login(core.me.login.account if core.me.login else core.name, words[-1])
    core.talk.command("PRIVMSG", SERVICE, f"PASSWD {service_words((old, words[-1]))}")


@client_command("drop", 1, 1, exact=True)
def do_drop(core: ClientCore, password: str) -> None:
    """/drop PASSWORD -- give up your account"""
    core.talk.command("PRIVMSG", SERVICE, f"DROP {service_words([password])}")


@client_command("disown", 1)
def do_disown(core: ClientCore, name: str) -> None:
    """/disown #CHANNEL -- let a channel that you founded end with its last member"""
    core.talk.command("PRIVMSG", SERVICE, f"DISOWN {name}")


@client_command("pass", 1, 1, nameless=True, exact=True)
def do_pass(core: ClientCore, password: str) -> None:
    """/pass PASSWORD -- the server's password, for the next attempt to connect"""
    core.password, core.wants_connection = password, True


@client_command("connect", most=1, nameless=True)
def do_connect(core: ClientCore, url: str = "") -> None:
    """/connect [URL] -- talk on another server, too; on which this client does"""
    raise Refused("ONE_SERVER", "only the terminal client talks to several servers")


@client_command("disconnect", nameless=True)
def do_disconnect(core: ClientCore) -> None:
    """/disconnect -- leave this server, and stay on the others"""
    raise Refused("ONE_SERVER", "only the terminal client talks to several servers; /quit leaves")


@client_command("reconnect", nameless=True)
def do_reconnect(core: ClientCore) -> None:
    """/reconnect -- connect again, now"""
    core.wants_connection = True


@client_command("retry", nameless=True)
def do_retry(core: ClientCore) -> None:
    """/retry -- send again what could not be sent"""
    if not core.outbox.parked:
        raise Refused("NOTHING_WAITS", "there is nothing that could not be sent")
    for id in list(core.outbox.parked):
        core.retry(id)


@client_command("cancel", most=1, nameless=True)
def do_cancel(core: ClientCore, which: str = "") -> None:
    """/cancel [all] -- drop what could not be sent; all: also what still waits to be sent"""
    outbox, talk = core.outbox, core.talk
    ids = [*outbox.parked] if which != "all" else [*outbox.waiting.keys() - outbox.in_flight]
    if not ids and which != "all" and outbox.waiting:
        count = counted(len(outbox.waiting), "message")
        raise Refused("NOTHING_PARKED", f"{count} still to be sent; /cancel all drops what waits")
    for id in ids:
        core.cancel(id)
    told = [f"{counted(len(ids), 'message')} dropped"] * bool(ids)
    if which == "all" and talk and talk.pieces and not talk.batching:
        total = talk.lines_of_message
        told.append(f"{total - len(talk.pieces)} of {total} lines sent, the rest dropped")
        talk.pieces.clear()
        outbox.arrived(talk.sending)
        core.shown.discard(talk.sending)
    core.show(View(NOTE, "; ".join(told) or "there is nothing to drop"))


NTH = re.compile(r"-([1-9]\d{0,3})")


def numbered_view(core: ClientCore, words: Iterable[str], mine: bool) -> tuple[Room, View, str]:
    """Return the current conversation, the chosen message in it, and the other words. The first
    word may be -N: -1 is the last message (of the user, or of others) that was there when the
    command was begun. Raises Refused."""
    first, *rest = [*words, ""]
    match, room = NTH.fullmatch(first), asked_room(core)
    number = int(match[1]) if match else 1
    seen = [*room.views][: len(room.views) - max(0, room.views.total - core.views_seen)]
    spoken = [one for one in seen if one.kind in (SAID, NOTICED) and one.mine == mine]
    if len(spoken) < number:
        raise Refused("NO_MESSAGE", "there is no such message here")
    if not spoken[-number].id:
        raise Refused("NO_ID", "the server has not confirmed that message yet; try again")
    return room, spoken[-number], " ".join(optional(*rest) if match else words)


@client_command("reply", 1)
def do_reply(core: ClientCore, words: str) -> None:
    """/reply [-N] TEXT -- answer the last message of another user, or the Nth from the end"""
    core.need("reply")
    room, view, text = numbered_view(core, words.split(" "), mine=False)
    if not text:
        raise Refused("NO_TEXT", "what is the answer? /reply [-N] TEXT")
    core.replying = view.id
    core.send(room.name, text)


@client_command("react", 1, 2)
def do_react(core: ClientCore, *words: str) -> None:
    """/react [-N] EMOJI -- react to the last message of another user, or the Nth from the end"""
    core.need("react")
    room, view, emoji = numbered_view(core, words, mine=False)
    core.react(room, view.id, emoji)


@client_command("unreact", 1, 2)
def do_unreact(core: ClientCore, *words: str) -> None:
    """/unreact [-N] EMOJI -- take that back"""
    core.need("react")
    room, view, emoji = numbered_view(core, words, mine=False)
    core.react(room, view.id, emoji, on=False)


@client_command("redact", most=1)
def do_redact(core: ClientCore, number: str = "") -> None:
    """/redact [-N] -- take back the last message of yours here, or the Nth from the end"""
    if number and not NTH.fullmatch(number):
        raise Refused("NO_NUMBER", "it goes like this: /redact, or /redact -2 for the one before")
    core.need("redact")
    room, view, _ = numbered_view(core, optional(number), mine=True)
    core.redact(room, view.id)


@client_command("mute", most=1, nameless=True)
def do_mute(core: ClientCore, name: str = "") -> None:
    """/mute [#CHANNEL|NAME] -- be called no more from a conversation"""
    room = asked_room(core, name)
    core.mute(room, True)
    core.show(View(NOTE, f"{room.name} is muted; /unmute ends that"))


@client_command("unmute", most=1, nameless=True)
def do_unmute(core: ClientCore, name: str = "") -> None:
    """/unmute [#CHANNEL|NAME] -- be called from it again"""
    room = asked_room(core, name)
    core.mute(room, False)
    core.show(View(NOTE, f"{room.name} is not muted"))


@client_command("send", 1, nameless=True)
def do_send(core: ClientCore, path: str) -> None:
    """/send FILE -- upload a file, and post its link here when it is there"""
    room = asked_room(core)
    if core.start_transfer is None:
        raise Refused("NO_TRANSFERS", "only clients with a screen send files")
    core.start_transfer(Transfer(secrets.token_hex(8), True, room.name, path))


@client_command("save", most=2, nameless=True)
def do_save(core: ClientCore, *words: str) -> None:
    """/save [-N] [PATH] -- store the last file that a message here tells of, or the Nth"""
    room, numbered = asked_room(core), bool(words) and NTH.fullmatch(words[0])
    number = int(numbered[1]) if numbered else 1
    told = [(one, parse_file_tag(one.file)) for one in room.views if one.file]
    if len(told) < number or told[-number][1] is None:
        raise Refused("NO_FILE", "no message here tells of such a file")
    if core.start_transfer is None:
        raise Refused("NO_TRANSFERS", "only clients with a screen save files")
    path = " ".join(words[bool(numbered) :])
    core.save_file(room, told[-number][0], path)


@client_command("transfers", most=2, nameless=True)
def do_transfers(core: ClientCore, what: str = "", which: str = "") -> None:
    """/transfers [cancel N] -- files on their way; to drop one"""
    number = whole_number(which) or 0
    if what == "cancel" and 0 < number <= len(core.transfers):
        one = core.transfers[number - 1]
        core.drop_transfer(one)
        return core.show(View(NOTE, f"{one.name or one.path} is dropped"))
    if what:
        raise Refused("NO_TRANSFER", "it goes like this: /transfers cancel 1")
    rows = [f"{n}  {one.words()}" for n, one in enumerate(core.transfers, 1)]
    return core.show(View(NOTE, "; ".join(rows) or "no file is on its way"))


@client_command("clear", nameless=True)
def do_clear(core: ClientCore) -> None:
    """/clear -- begin with an empty page; Page Up still shows what was there"""
    core.show(View(CLEARED))


@client_command("raw", most=1, nameless=True)
def do_raw(core: ClientCore, line: str = "") -> None:
    """/raw [LINE] -- send a line of IRC to the server; the last lines that went each way"""
    if not line:
        rows = (f"{'>' if ours else '<'} {text}" for _, ours, text in core.traffic)
        return core.show(View(PAGE, "\n".join(rows), "lines of the protocol"))
    core.wants_motd = core.wants_motd or line.upper().startswith("MOTD")
    core.online().raw(line)


def change_setting(core: ClientCore, name: str, value: str) -> None:
    """Change a setting and keep it; "default" is as it was delivered. Raises Refused."""
    allowed = SETTINGS[name].values
    if value == "default":
        core.settings.pop(name, None)
    elif allowed and value not in allowed:
        raise Refused("BAD_SETTING", f"{name} is one of: {', '.join(allowed)}")
    else:
        core.settings[name] = value
    if core.store:
        core.store.set(name, core.settings.get(name))


@client_command("set", most=2, nameless=True)
def do_set(core: ClientCore, name: str = "", value: str = "") -> None:
    """/set [NAME [VALUE|default]] -- settings: what they are, and to change one"""
    if name and name not in SETTINGS:
        raise Refused("NO_SETTING", f"there is no setting {name}; /set lists them")
    if value:
        change_setting(core, name, value)
    for one in [name] if name else SETTINGS:
        setting = SETTINGS[one]
        now = core.setting(one) or "nothing"
        default = setting.usual or "nothing"
        usual = "" if now == default else f" (usually {default})"
        core.show(View(TOLD, f"{one}:  {now}{usual}; {setting.summary}"))


@client_command("quit", most=1, nameless=True)
def do_quit(core: ClientCore, reason: str = "") -> None:
    """/quit [REASON] -- leave"""
    core.leave(reason)


# ======================================================================================
# CLIENT STORE
# ======================================================================================
# What a client stores in one SQLite file, client.db: the messages it has seen, the open
# conversations, the ignored users, and settings. Two clients may share the file: a transaction
# takes milliseconds, and no statement waits for a lock. A write that finds the file locked is done
# a turn later. Words are indexed in slices, while the client has nothing else to do.

CLIENT_TABLES = """
CREATE TABLE owners (               -- whose rows they are: a user as a server knows one
    owner INTEGER PRIMARY KEY,
    server TEXT NOT NULL,           -- as it was given
    name TEXT NOT NULL,             -- an account, or a nick, folded
    UNIQUE (server, name)
);
CREATE TABLE messages (
    number INTEGER PRIMARY KEY AUTOINCREMENT,   -- as they came; never used twice
    owner INTEGER NOT NULL,
    room TEXT NOT NULL,             -- key of the conversation
    time INTEGER NOT NULL,          -- milliseconds since 1970
    id TEXT NOT NULL,               -- the server's, or ''
    own_id TEXT NOT NULL,           -- ours, of a message of ours
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    text TEXT NOT NULL,
    place TEXT NOT NULL,            -- name of the conversation then
    mine INTEGER NOT NULL,
    called INTEGER NOT NULL,
    reply TEXT NOT NULL DEFAULT '', -- the server's id of the message that it answers
    file TEXT NOT NULL DEFAULT ''   -- of the link in it: path, type, bytes, width, height
);
CREATE INDEX messages_time ON messages (owner, room, time, number);
CREATE UNIQUE INDEX messages_id ON messages (owner, id) WHERE id <> '';
CREATE TABLE rooms (
    owner INTEGER NOT NULL,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    password TEXT NOT NULL,
    channel INTEGER NOT NULL,
    wanted INTEGER NOT NULL,        -- to be joined at the next start
    draft TEXT NOT NULL,
    muted INTEGER NOT NULL DEFAULT 0,
    read_time INTEGER NOT NULL DEFAULT 0,       -- milliseconds: what is older has been read
    place INTEGER NOT NULL DEFAULT 0,           -- among the conversations, from 0
    PRIMARY KEY (owner, key)
) WITHOUT ROWID;
CREATE TABLE reactions (
    owner INTEGER NOT NULL,
    id TEXT NOT NULL,               -- of the message
    emoji TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (owner, id, emoji, name)
) WITHOUT ROWID;
CREATE TABLE transfers (            -- files on their way
    owner INTEGER NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,            -- JSON, see Transfer.kept()
    PRIMARY KEY (owner, id)
) WITHOUT ROWID;
CREATE TABLE ignored (owner INTEGER NOT NULL, mask TEXT NOT NULL, PRIMARY KEY (owner, mask));
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE facts (                -- that a server has told
    owner INTEGER NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (owner, name)
) WITHOUT ROWID;
CREATE TABLE indexed (number INTEGER NOT NULL);     -- the last message that is
INSERT INTO indexed VALUES (0);
PRAGMA user_version = 2;
"""
CLIENT_UPGRADE = """
ALTER TABLE messages ADD COLUMN reply TEXT NOT NULL DEFAULT '';
ALTER TABLE messages ADD COLUMN file TEXT NOT NULL DEFAULT '';
CREATE TABLE transfers (owner INTEGER NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY (owner, id)) WITHOUT ROWID;
ALTER TABLE rooms ADD COLUMN muted INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rooms ADD COLUMN read_time INTEGER NOT NULL DEFAULT 0;
ALTER TABLE rooms ADD COLUMN place INTEGER NOT NULL DEFAULT 0;
CREATE TABLE reactions (owner INTEGER NOT NULL, id TEXT NOT NULL, emoji TEXT NOT NULL,
    name TEXT NOT NULL, PRIMARY KEY (owner, id, emoji, name)) WITHOUT ROWID;
PRAGMA user_version = 2;
"""
CLIENT_WORDS = """
CREATE VIRTUAL TABLE IF NOT EXISTS words
USING fts5 (text, content='messages', content_rowid='number', detail=none,
    tokenize="unicode61 categories 'L* N* Co So'");
CREATE TRIGGER IF NOT EXISTS words_gone AFTER DELETE ON messages
WHEN old.number <= (SELECT number FROM indexed)
BEGIN INSERT INTO words (words, rowid, text) VALUES ('delete', old.number, words_of(old.text)); END;
"""
BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)  # another client is writing
LAST_NUMBER = 2**62  # above the number of every row
MESSAGE_COLUMNS = "number, kind, text, name, place, time, mine, called, id, own_id, reply, file"


def index_words(text: str) -> list[str]:
    """Return the words of a text in the form of the search index."""
    kinds = ("L", "N", "Co", "So")
    solid = (c if unicodedata.category(c).startswith(kinds) else " " for c in words_of(text))
    return "".join(solid).split()


def or_nothing(read: Callable) -> Callable:
    """Decorate a read to return an empty list while the database is locked or damaged."""

    @functools.wraps(read)
    def attempt_to(self: "ClientStore", *values: Any, **more: Any) -> Any:
        try:
            return read(self, *values, **more)
        except sqlite3.Error as error:
            self.trouble = str(error)
            return []

    return attempt_to


def open_client_database(path: str) -> sqlite3.Connection:
    """Open client.db, or a database in memory, and create its tables. Raises sqlite3.Error."""
    db = sqlite3.connect(path, timeout=2, isolation_level=None, check_same_thread=False)
    db.create_function("words_of", 1, words_of, deterministic=True)
    with contextlib.suppress(sqlite3.Error):  # a network home may refuse WAL: then a journal
        db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    scripts = {0: CLIENT_TABLES, 1: CLIENT_UPGRADE}
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version in scripts:
        try:
            db.executescript(f"BEGIN IMMEDIATE; {scripts[version]} COMMIT;")
        except sqlite3.OperationalError:  # another client created them at the same time
            if db.in_transaction:
                db.execute("ROLLBACK")
            if db.execute("PRAGMA user_version").fetchone()[0] == version:
                raise
    with contextlib.suppress(sqlite3.Error):  # without FTS5 in this Python, search is slower
        db.executescript(CLIENT_WORDS)
    return db


class ClientStore:
    """The stored state of one client, as one user of one server."""

    def __init__(self, db: sqlite3.Connection, server: str = "", name: str = "", sole: bool = True):
        self.db = db
        self.sole = sole  # the first client of this user stores messages without an id
        self.waiting: list[tuple[str, tuple]] = []  # statements that are not executed yet
        self.trouble = ""  # why the file could not be read or written
        db.execute("INSERT OR IGNORE INTO owners (server, name) VALUES (?, ?)", [server, name])
        query = "SELECT owner FROM owners WHERE server = ? AND name = ?"
        self.owner = db.execute(query, [server, name]).fetchone()[0]
        query = "SELECT count(*) FROM sqlite_schema WHERE name = 'words'"
        self.has_words = bool(db.execute(query).fetchone()[0])
        db.execute("PRAGMA busy_timeout = 0")  # from here on no statement waits for a lock

    # Writing

    def write(self, statement: str, *values: Any) -> None:
        """Queue a statement; flush() executes it soon."""
        self.waiting.append((statement, values))
        if len(self.waiting) % CLIENT_ROWS_AT_ONCE == 0:
            self.flush()
        if len(self.waiting) > CLIENT_ROWS_WAITING:
            self.trouble = "another program has it locked for too long"
            del self.waiting[: len(self.waiting) - CLIENT_ROWS_WAITING]

    def flush(self) -> None:
        """Execute the queued statements, if the file is not locked."""
        if not self.waiting:
            return
        try:
            self.db.execute("BEGIN IMMEDIATE")
            for statement, values in self.waiting:
                self.db.execute(statement, values)
            self.db.execute("COMMIT")
        except sqlite3.Error as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF not in BUSY_CODES:
                self.trouble = str(error)
            return
        self.waiting.clear()

    def add(self, key: str, view: View) -> None:
        """Store a message once. Only the first client of a user stores messages without an id."""
        if not (view.id or self.sole):
            return
        values = (self.owner, key, view.time or 0, view.id, view.own_id, view.kind, view.name)
        values += (view.text, view.where, view.mine, view.called, view.reply, view.file)
        columns = "owner, room, time, id, own_id, kind, name, text, place, mine, called"
        columns += ", reply, file"
        marks = ", ".join("?" * len(values))
        self.write(f"INSERT OR IGNORE INTO messages ({columns}) VALUES ({marks})", *values)

    def remove(self, id: str) -> None:
        """Delete a message and its reactions; a trigger removes the words from the index."""
        self.write("DELETE FROM messages WHERE owner = ? AND id = ?", self.owner, id)
        self.write("DELETE FROM reactions WHERE owner = ? AND id = ?", self.owner, id)

    def react(self, id: str, emoji: str, name: str, on: bool) -> None:
        """Store, or delete, the reaction of a user to a message."""
        verb = "INSERT OR IGNORE INTO reactions VALUES (?, ?, ?, ?)"
        if not on:
            verb = "DELETE FROM reactions WHERE owner = ? AND id = ? AND emoji = ? AND name = ?"
        self.write(verb, self.owner, id, emoji, name)

    @or_nothing
    def reactions(self, id: str) -> list[tuple[str, str]]:
        """Return the emoji and the nick of each reaction to a message."""
        self.flush()
        query = "SELECT emoji, name FROM reactions WHERE owner = ? AND id = ? LIMIT ?"
        return self.db.execute(query, [self.owner, id, REACTIONS_SHOWN]).fetchall()

    def rename(self, old: str, new: str) -> None:
        change = "UPDATE OR REPLACE {} SET {} = ? WHERE owner = ? AND {} = ?"
        self.write(change.format("messages", "room", "room"), new, self.owner, old)
        self.write(change.format("rooms", "key", "key"), new, self.owner, old)

    def index(self) -> None:
        """Index a slice of the messages that are not indexed yet."""
        if not self.has_words:
            return
        query = "SELECT number, text FROM messages WHERE number > ? ORDER BY number LIMIT ?"
        with contextlib.suppress(sqlite3.Error):  # locked: the next call tries again
            done = self.db.execute("SELECT number FROM indexed").fetchone()[0]
            rows = self.db.execute(query, [done, CLIENT_INDEX_SLICE]).fetchall()
            if rows:
                rows = [(number, words_of(text)) for number, text in rows]
                self.db.execute("BEGIN IMMEDIATE")
                self.db.executemany("INSERT INTO words (rowid, text) VALUES (?, ?)", rows)
                self.db.execute("UPDATE indexed SET number = ?", [rows[-1][0]])
                self.db.execute("COMMIT")
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    # Reading

    @staticmethod
    def _view(row: tuple) -> View:
        number, kind, text, name, place, when, mine, called, id, own_id, *rest = row
        return View(
            *(kind, text, name, place, when, bool(mine), bool(called)),
            past=True,
            id=id,
            own_id=own_id,
            number=number,
            reply=rest[0],
            file=rest[1],
        )

    def _position(self, view: View) -> tuple[int, int]:
        """Return the time and the number of a message, which determine its place in the order."""
        query = "SELECT max(number) FROM messages WHERE owner = ? AND id = ? AND id <> ''"
        known = self.db.execute(query, [self.owner, view.id]).fetchone()[0]
        return view.time or 0, view.number or known or LAST_NUMBER

    @or_nothing
    def page(self, key: str, count: int, before: View | None = None) -> list[View]:
        """Return the last messages of a conversation, or those before a view, in order."""
        self.flush()
        when, number = self._position(before) if before else (LAST_MOMENT, 0)
        query = f"""
            SELECT {MESSAGE_COLUMNS} FROM messages WHERE owner = ? AND room = ?
            AND (time < ? OR (time = ? AND number < ?)) ORDER BY time DESC, number DESC LIMIT ?"""
        rows = self.db.execute(query, [self.owner, key, when, when, number, count]).fetchall()
        return [self._view(row) for row in reversed(rows)]

    @or_nothing
    def page_after(self, key: str, count: int, after: View) -> list[View]:
        """Return the messages of a conversation after a view, in order."""
        self.flush()
        when, number = self._position(after)
        query = f"""
            SELECT {MESSAGE_COLUMNS} FROM messages WHERE owner = ? AND room = ?
            AND (time > ? OR (time = ? AND number > ?)) ORDER BY time, number LIMIT ?"""
        rows = self.db.execute(query, [self.owner, key, when, when, number, count]).fetchall()
        return [self._view(row) for row in rows]

    @or_nothing
    def find(self, words: str, count: int, key: str | None = None) -> list[View]:
        """Return the last messages that contain all words, of one conversation or of all."""
        self.flush()
        quoted = " ".join(f'"{word}"' for word in index_words(words))
        if not quoted:
            return []
        place, values = ("AND room = ?", [key]) if key is not None else ("", [])
        # Without CROSS JOIN the planner would read all messages of the room
        indexed = f"""
            SELECT {MESSAGE_COLUMNS} FROM
            (SELECT rowid AS hit FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?)
            CROSS JOIN messages WHERE number = hit AND owner = ? {place}"""
        recent = f"""
            SELECT {MESSAGE_COLUMNS} FROM messages NOT INDEXED
            WHERE number > (SELECT number FROM indexed) AND owner = ? {place}"""
        rows: list[tuple] = []
        if self.has_words:
            found = [quoted, CLIENT_HITS_MOST, self.owner, *values]
            rows = self.db.execute(indexed, found).fetchall()
        wanted = fold(words).split()
        for row in self.db.execute(recent, [self.owner, *values]):
            if all(word in fold(row[2]) for word in wanted):
                rows.append(row)
        rows.sort(key=lambda row: (row[5], row[0]))
        return [self._view(row) for row in rows[-count:]]

    def message(self, id: str) -> View | None:
        """Return the stored message with this id; None if there is none or the file is locked."""
        query = f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE owner = ? AND id = ?"
        try:
            row = self.db.execute(query, [self.owner, id]).fetchone()
        except sqlite3.OperationalError:  # locked
            row = None
        return self._view(row) if row else None

    @or_nothing
    def has(self, id: str) -> bool:
        """Return whether the message with this id is stored."""
        self.flush()
        query = "SELECT 1 FROM messages WHERE owner = ? AND id = ?"
        return self.db.execute(query, [self.owner, id]).fetchone() is not None

    def newest(self) -> View | None:
        """Return the message with an id that was stored last; None if there is none."""
        query = f"""
            SELECT {MESSAGE_COLUMNS} FROM messages NOT INDEXED WHERE owner = ? AND id <> ''
            ORDER BY number DESC LIMIT 1"""
        row = self.db.execute(query, [self.owner]).fetchone()
        return self._view(row) if row else None

    # Transfers, conversations, ignored users, facts, settings

    def keep_transfer(self, one: Transfer) -> None:
        state = json.dumps(one.kept())
        self.write("REPLACE INTO transfers VALUES (?, ?, ?)", self.owner, one.id, state)
        self.flush()

    def forget_transfer(self, one: Transfer) -> None:
        self.write("DELETE FROM transfers WHERE owner = ? AND id = ?", self.owner, one.id)
        self.flush()

    def transfers(self) -> list[Transfer]:
        query = "SELECT state FROM transfers WHERE owner = ?"
        rows = self.db.execute(query, [self.owner]).fetchall()
        return [Transfer(**json.loads(state)) for (state,) in rows]

    def keep_room(self, key: str, room: Room, place: int = 0) -> None:
        values = (key, room.name, room.password, room.is_channel, room.wanted, room.draft)
        values += (room.muted, room.read_time, place)
        marks = ", ".join("?" * (len(values) + 1))
        self.write(f"REPLACE INTO rooms VALUES ({marks})", self.owner, *values)

    def forget_room(self, key: str) -> None:
        self.write("DELETE FROM rooms WHERE owner = ? AND key = ?", self.owner, key)

    def rooms(self) -> list[Room]:
        """Return the conversations that were open at the end of the last run, in order."""
        columns = "name, password, channel, wanted, draft, muted, read_time"
        query = f"SELECT {columns} FROM rooms WHERE owner = ? ORDER BY place"
        rooms = []
        for name, password, channel, *rest in self.db.execute(query, [self.owner]):
            room = Room(name, password, bool(channel))
            room.wanted, room.draft, room.muted, room.read_time = rest
            room.wanted, room.muted = bool(room.wanted), bool(room.muted)
            rooms.append(room)
        return rooms

    def keep_ignored(self, masks: Iterable[str]) -> None:
        self.write("DELETE FROM ignored WHERE owner = ?", self.owner)
        for mask in masks:
            self.write("INSERT INTO ignored VALUES (?, ?)", self.owner, mask)

    def ignored(self) -> set[str]:
        query = "SELECT mask FROM ignored WHERE owner = ?"
        return {row[0] for row in self.db.execute(query, [self.owner])}

    def keep_fact(self, name: str, value: str) -> None:
        self.write("REPLACE INTO facts VALUES (?, ?, ?)", self.owner, name, value)

    def fact(self, name: str) -> str:
        query = "SELECT value FROM facts WHERE owner = ? AND name = ?"
        try:
            row = self.db.execute(query, [self.owner, name]).fetchone()
        except sqlite3.OperationalError:  # locked
            row = None
        return row[0] if row else ""

    def set(self, name: str, value: str | None) -> None:
        """Store a setting; None restores the default."""
        if value is None:
            self.write("DELETE FROM settings WHERE name = ?", name)
        else:
            self.write("REPLACE INTO settings VALUES (?, ?)", name, value)

    def settings(self) -> dict[str, str]:
        return dict(self.db.execute("SELECT name, value FROM settings").fetchall())


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
TLS_TROUBLE = "TLS: "  # begins a reason that is the fault of TLS, not of the network
HUNG_UP = "the connection was closed"  # in good order, by both sides


class Timer:
    """A callback at a later time, unless cancel() comes first."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], Any]):
        self.when, self.callback = when, callback

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        self.callback = None


class Delay:
    """Many waits of one length. They end in the order they began, so an item costs a dict entry and
    not a timer. `due` is called with each item whose wait is over."""

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
    """Return the text of an error as the operating system has it, without its numbers."""
    if error.errno == errno.ENOTCONN:  # how a reset shows when we hang up
        return "connection reset by peer"
    return (error.strerror or str(error)).lower()


class Connection:
    """A socket and its buffers, without any knowledge of chat. A subclass defines

        received(data)    handle plaintext
        ended()           handle the end of input (called once)
        lost(reason)      handle the end of the connection, by either side (called once)
        secured()         handle the end of the TLS handshake
        wants_read()      return whether to read from the other side just now
        lagging()         note that written bytes could not be sent, or now have been

    close() sends what is queued first, drop() does not. write() sends at the end of the turn, in
    one piece; broadcast() sends at once."""

    __slots__ = (
        *("direct", "eof", "loop", "mask", "queue", "sealed", "shared", "sock", "state", "tls"),
    )
    hears_out = False  # after close(): read on until the other side ends
    appetite = READ_BYTES  # bytes that are taken at once
    patient = False  # after close(): lets a slow reader have all, else a moment is enough

    def __init__(self, loop: "Loop", sock: socket.socket):
        sock.setblocking(False)
        self.loop, self.sock = loop, sock
        self.queue = SendQueue()
        self.tls: TlsFilter | None = None
        self.sealed = b""  # encrypted, not yet sent
        self.shared = True  # bytes go out as they are: no TLS, no frames
        self.direct = True  # the same, nothing queued, open: broadcast() may use the socket
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
            data = self.sock.recv(self.appetite)
        except BlockingIOError:
            return
        except OSError as error:
            return self._bury(reason_of(error))
        if not data:
            self._end()
        elif self.state == OPEN or self.hears_out:
            self.arrived(data)

    def arrived(self, data: bytes) -> None:
        """Take bytes from the network, encrypted or not."""
        if self.tls is None:
            return self.received(data)
        try:
            was_ready = self.tls.ready
            plain = self.tls.feed(data)
        except TlsFailed as failure:
            with contextlib.suppress(OSError):
                self.sock.send(self.tls.take())  # an alert, which says what was wrong
            return self.drop(f"{TLS_TROUBLE}{failure}")
        self.loop.dirty.add(self)  # the handshake may have bytes to send
        if self.tls.ready and not was_ready:
            self.flush()  # send our half of the handshake, also if we refuse the certificate
            self.secured()
        if self.state == CLOSED:  # secured() has refused the certificate
            return
        if plain:
            self.received(plain)
        if self.tls.ended:
            self._end()

    def _end(self) -> None:
        """Handle end of file from the other side."""
        if self.state == LINGERING:
            self._bury(HUNG_UP)
        elif not self.eof:
            self.eof = True
            if self.state == OPEN:
                self.ended()
            self.update()

    # Writing

    def write(self, data: bytes) -> None:
        """Queue bytes to be sent at the end of this turn."""
        if self.state <= CLOSING:
            self.direct = False
            self.queue.append(data)
            self.loop.dirty.add(self)

    def cut_short(self, data: bytes, sent: int, error: OSError | None) -> None:
        """Queue the rest of bytes that the socket took in part; after an error, close it."""
        if error and not isinstance(error, BlockingIOError):
            return self._bury(reason_of(error))
        self.write(data)
        self.queue.advance(sent)

    def flush(self) -> None:
        """Send as much of the queue as the network takes; then finish a close()."""
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
        self.direct = self.shared and not self.queue.size and self.state == OPEN
        if self.unsent or self.mask != READ or self.state != OPEN:
            self._flushed()

    def _flushed(self) -> None:
        """Handle the less common cases: bytes are left or were left, or a close() goes on."""
        self.lagging()
        if self.state == CLOSING and not self.unsent:
            self._hang_up()
        self.update()

    def encrypt(self, tls: TlsFilter) -> None:
        """Start TLS: from here on all bytes go through this filter, the handshake first."""
        self.tls = tls
        self.shared = self.direct = False
        self.loop.dirty.add(self)

    def _flush_tls(self) -> None:
        """Encrypt only the bytes that are about to be sent: the backlog stays shared plaintext."""
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
        """Set the events that the selector watches; no other place decides that."""
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
        """Send what is queued, send the end, and wait for the other side's end."""
        if self.state == OPEN:
            self.state = CLOSING
            self.loop.dirty.add(self)
            if not (self.hears_out or self.patient):
                self.loop.linger.add(self)

    def _hang_up(self) -> None:
        """Send our end, and linger. If the socket were closed at once, later bytes of the other
        side would be answered with a reset, which would destroy our last words on their way."""
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
        if self.patient:
            self.loop.linger.add(self)

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
    """Send the same bytes to the conn of each owner, now. This is the inner loop of the server: a
    call of a method for each would cost 4 % of all it does, measured."""
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
    """A selector, timers, and the callbacks from other threads."""

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
        """Run one turn; wait at most `longest` seconds for an event."""
        ready = self.selector.select(self._timeout(longest))
        self.now = time.monotonic()
        self.turn_begins()
        for key, mask in ready:
            self.guarded(key.data.ready, mask)
        self._run_due()
        self.guarded(self.turn_ends)
        dirty, self.dirty = self.dirty, set()
        for conn in dirty:
            self.guarded(conn.flush)
        while self.graves:
            self.graves.pop().close()

    def guarded(self, callback: Callable, *args: Any) -> None:
        """Call back, in the one catch: a bug is logged, and costs only its connection."""
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
                self.guarded(timer.callback)
        for _ in range(len(self.soon)):  # what they add is for the next turn
            self.guarded(self.soon.popleft())

    def call_later(self, seconds: float, callback: Callable[[], Any]) -> Timer:
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self.timers, timer)
        return timer

    def call_soon(self, callback: Callable[[], Any]) -> None:
        self.soon.append(callback)

    def call_soon_threadsafe(self, callback: Callable[[], Any]) -> None:
        """Call back soon, from another thread or a signal handler: wakes the selector."""
        self.soon.append(callback)
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already: it will wake
            self.waker.send(b"\0")

    def ready(self, mask: int) -> None:
        """Empty the wake-up socket: the callbacks run anyway."""
        with contextlib.suppress(BlockingIOError):
            self.woken.recv(READ_BYTES)

    def close(self) -> None:
        self.selector.close()
        self.woken.close()
        self.waker.close()


def attempt(job: Callable[[], Any]) -> Any:
    """Return the result of job(), or the exception that it raised."""
    try:
        return job()
    except Exception as error:
        return error


class Lane:
    """Jobs of one kind, and the threads that do them. A free thread takes the next owner's oldest
    job, so the owner with the most jobs waits most."""

    def __init__(self, threads: int):
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.waiting: dict[Any, collections.deque] = {}  # jobs by owner, next owner first
        self.free = self.size = threads
        self.threads: list[threading.Thread] = []

    def hand_out(self) -> None:
        while self.free and self.waiting:
            owner = next(iter(self.waiting))
            jobs = self.waiting.pop(owner)
            job, then, wanted = jobs.popleft()
            if jobs:
                self.waiting[owner] = jobs  # behind the others
            if wanted():
                self.free -= 1
                self.jobs.put((job, then))


class Helpers:
    """A few threads for jobs that would make the loop wait. Pages, passwords and mail have lanes of
    their own: no lane holds up another."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.lanes: dict[str, Lane] = {}

    def submit(
        self,
        owner: Any,
        job: Callable[[], Any],
        then: Callable[[Any], None],
        lane: str = DISK_LANE,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Run job() on a thread, then then(result) on the loop; an exception is a result, too. A
        job that is not `wanted` any more when its turn comes is skipped."""
        if lane not in self.lanes:
            self.lanes[lane] = Lane(HELPER_THREADS[lane])
            for _ in range(HELPER_THREADS[lane]):
                thread = threading.Thread(target=self._work, args=(self.lanes[lane],), daemon=True)
                self.lanes[lane].threads.append(thread)
                thread.start()
        self.lanes[lane].waiting.setdefault(owner, collections.deque()).append((job, then, wanted))
        self.lanes[lane].hand_out()

    def close(self) -> bool:
        """End the threads; return whether all threads that read the store have ended."""
        for lane in self.lanes.values():
            for _ in lane.threads:
                lane.jobs.put(None)
        for name in (PAGE_LANE, DISK_LANE):
            for thread in self.lanes[name].threads if name in self.lanes else ():
                thread.join(STOP_SECONDS)
        lanes = (self.lanes[name] for name in (PAGE_LANE, DISK_LANE) if name in self.lanes)
        return not any(thread.is_alive() for lane in lanes for thread in lane.threads)

    def _work(self, lane: Lane) -> None:
        while work := lane.jobs.get():
            job, then = work
            done = functools.partial(self._done, lane, then, attempt(job))
            self.loop.call_soon_threadsafe(done)

    def _done(self, lane: Lane, then: Callable[[Any], None], result: Any) -> None:
        lane.free += 1
        lane.hand_out()
        then(result)


class LogWriter(logging.Handler):
    """A handler that writes the log from its own thread: standard error may be a pipe that is not
    read. Lines that do not fit in the queue are dropped and counted."""

    def __init__(self, fd: int):
        super().__init__()
        self.fd = fd
        self.lines: collections.deque[bytes] = collections.deque()
        self.dropped = 0
        self.more = threading.Event()
        self.idle = threading.Event()
        self.idle.set()
        threading.Thread(target=self._work, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.lines) >= LOG_LINES:
            self.dropped += 1
            return
        self.lines.append((self.format(record) + "\n").encode(errors="backslashreplace"))
        self.idle.clear()
        self.more.set()

    def _work(self) -> None:
        while True:
            self.more.wait()
            self.more.clear()
            while self.lines:
                self._write(self.lines.popleft())
                if self.dropped and not self.lines:
                    dropped, self.dropped = self.dropped, 0
                    text = f"{counted(dropped, 'line')} of the log were dropped"
                    record = logging.LogRecord("chat", logging.WARNING, "", 0, text, None, None)
                    self._write(f"{self.format(record)}\n".encode())
            self.idle.set()

    def _write(self, line: bytes) -> None:
        """Write with os.write: another thread's lock on sys.stderr would hang the program's end."""
        try:
            while line:
                line = line[os.write(self.fd, line) :]
        except OSError:  # it is not read any more, or the disk is full
            self.dropped += 1

    def flush(self) -> None:
        self.idle.wait(LOG_FLUSH_SECONDS)


class LogFormat(logging.Formatter):
    """The one place where log text is made, without control characters that steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, error: Any) -> str:
        return "\n".join(map(escaped, super().formatException(error).split("\n")))


def report_bug() -> None:
    log.exception("a bug, please report it (while a turn was written)")


# ======================================================================================
# SERVER
# ======================================================================================
# Listeners, peers, and the five beats: the loop polls and reads, act() turns lines into
# Hub calls, end_turn() commits and writes. Whatever a peer does wrong is answered or
# logged here in one line, and no other peer notices.


TLS_FIRST_BYTES = b"\x16\x03"  # a handshake record, and a version (RFC 8446 section 5.1)


class ServerOptions(NamedTuple):
    """The options of the command line, with their defaults."""

    listen: tuple[tuple[str, int], ...] = ((DEFAULT_HOST, DEFAULT_PORT),)
    data: pathlib.Path | None = None  # None: in memory
    keep: int | None = None
    password: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None  # whose client certificates are looked at
    flood: tuple[float, float] | None = (FLOOD_BURST, FLOOD_RATE)  # of a connection's budget
    max_clients: int | None = None  # None: what the descriptor limit allows
    max_per_address: int = PER_ADDRESS
    name: str = SERVER_NAME
    network: str = SERVER_NAME
    oper: tuple[tuple[str, str], ...] = ()  # names and passwords
    register: frozenset[str] = frozenset()  # "before-connect", "email-required", or "off"
    sts: int | None = None  # seconds for which clients have to use TLS (IRCv3 sts)
    sendmail: str | None = None  # a command that takes a message, like sendmail -t
    web: Web = Web()
    files: bool = True
    file_max: int = FILE_BYTES
    files_max: int = FILES_BYTES
    files_keep: float = FILES_DAYS
    motd: pathlib.Path | None = None


def address_text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Address:
    """A client address: its remaining budget, and its connections."""

    __slots__ = ("budget", "key", "peers")

    def __init__(self, key: str, budget: Budget | None):
        self.key, self.budget = key, budget
        self.peers = 0

    def used(self, now: float) -> float:
        """Return the used part of the budget: 0 to 1, and more than 1 in debt."""
        if self.budget is None:
            return 0.0
        self.budget.refill(now)
        return 1 - self.budget.tokens / self.budget.burst


class Addresses(dict[str, Address]):
    """Budgets that outlive connections. A full one is forgotten: a new one is the same."""

    def __init__(self, flood: tuple[float, float] | None):
        super().__init__()
        self.flood = flood

    def enter(self, key: str, now: float) -> Address:
        address = self.get(key)
        if address is None:
            budget = None
            if self.flood:
                burst, rate = self.flood
                budget = Budget(burst * ADDRESS_SHARES, rate * ADDRESS_SHARES, now)
            address = self[key] = Address(key, budget)
        address.peers += 1
        if len(self) > ADDRESSES_KEPT:
            self.sweep(now)
        return address

    def leave(self, address: Address, now: float) -> None:
        address.peers -= 1
        self.forget_if_full(address, now)

    def forget_if_full(self, address: Address, now: float) -> bool:
        gone = not address.peers and address.used(now) <= 0
        if gone:
            self.pop(address.key, None)
        return gone

    def sweep(self, now: float) -> None:
        """Forget the full budgets; if that is not enough, the fullest ones without a connection."""
        for address in list(self.values()):
            self.forget_if_full(address, now)
        idle = sorted(
            (one for one in self.values() if not one.peers), key=lambda one: one.used(now)
        )
        for address in idle[: max(0, len(self) - ADDRESSES_KEPT)]:
            del self[address.key]


class Peer(Connection):
    """A connection as the server sees it; its session knows it as `conn`."""

    __slots__ = (
        *("address", "asked", "budget", "framing", "greeted", "heard", "held", "home", "host"),
        *("inbox", "leaving", "limit_key", "looks", "proxied_tls", "server", "session"),
        *("waits_for_budget", "web"),
    )

    def __init__(self, server: "Server", sock: socket.socket, host: str, port: int, key: str):
        super().__init__(server.loop, sock)
        self.server = server
        self.host = host
        self.address = address_text(host, port)
        self.limit_key = key
        self.home = server.addresses.enter(self.limit_key, server.loop.now)
        self.inbox: Any = None  # a framer, once something comes: many never speak
        self.framing: Framing | None = None  # makes frames of lines, for a WebSocket
        self.web = False  # it speaks HTTP
        self.proxied_tls: bool | None = None  # the client speaks TLS to its proxy, if it has one
        self.looks = 0  # how often nothing had been sent since the look before
        self.session: LocalSession | None = None
        self.budget: Budget | None = None
        self.heard = server.loop.now  # when, last ...
        self.asked = 0.0  # ... and when it was asked whether it is still there
        self.greeted = False
        self.held = False  # its lines wait for an answer ...
        self.waits_for_budget = False  # ... or for the next token
        self.leaving = False  # its lines are not taken any more

    # What a session may do with its conn

    def named(self) -> None:
        """Stop the time limit for registration: it is complete."""
        self.server.unnamed.discard(self)
        if self.session.probed:
            self.server.probed.add(self)

    def charge(self, items: float) -> None:
        """Take this much work from the budgets of the connection and of its address."""
        if self.budget:
            tokens = items / WORK_PER_TOKEN
            self.budget.tokens -= tokens
            self.home.budget.tokens -= tokens

    def wait(self) -> float:
        """Return the seconds until there is a token for the next line."""
        if self.budget is None:
            return 0.0
        self.budget.refill(self.loop.now)
        self.home.budget.refill(self.loop.now)
        return max(self.budget.wait(), self.home.budget.wait())

    @property
    def appetite(self) -> int:
        return FILE_PIECE_BYTES if self.web else READ_BYTES

    @property
    def encrypted(self) -> bool:
        return self.tls is not None

    @property
    def secure(self) -> bool:
        return self.encrypted if self.proxied_tls is None else self.proxied_tls

    @property
    def local(self) -> str:
        try:
            return address_text(*self.sock.getsockname()[:2])
        except OSError:  # it is gone
            return ""

    @property
    def fingerprint(self) -> str:
        direct = self.proxied_tls is None  # else it would be the certificate of the proxy
        if self.tls is None or self.server.options.tls_client_ca is None or not direct:
            return ""
        return self.tls.fingerprint()

    @property
    def gone(self) -> bool:
        return self.state == CLOSED

    def close(self) -> None:
        """End the session. The connection is closed after the last bytes of this turn."""
        if not self.leaving:
            self.leaving = True
            self.server.unnamed.discard(self)
            if self.inbox:
                self.inbox.clear()
            if self.session:
                self.session.ended()
            self.server.leaving.append(self)

    # HTTP and WebSocket

    def speak_http(self, first_line: bytes) -> None:
        """Read HTTP requests from here on; `first_line` is the first line of the first one."""
        server = self.server
        if refusal := server.limits.speaks_http(self.limit_key, True):
            log.info("%s turned away: %s", self.address, refusal)
            return self.close()
        self.web = True
        self.inbox = HttpReader(first_line + b"\r\n" + self.inbox.rest())
        self.session = WebSession(server.site, self)
        server.unnamed.discard(self)
        server.silent.discard(self)
        server.web_heads.add(self)
        with contextlib.suppress(OSError):  # what was sent and is not acknowledged is known then
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WEB_SEND_BUFFER)
        return None

    def act_for(self, host: str, key: str, secure: bool | None) -> None:
        """Treat what comes next as that of a client at `host`, which limits count as `key`.
        `secure` is None without a proxy. A proxy may send the next request for another client."""
        self.proxied_tls = secure
        if host != host_of(self.address).strip("[]"):
            self.address = address_text(host, int(self.address.rpartition(":")[2]))
        if key != self.limit_key:
            self.server.limits.move(self.limit_key, key)
            self.server.leave_address(self)
            self.limit_key = key
            self.home = self.server.addresses.enter(key, self.loop.now)

    def upgrade(self, head: bytes, opcode: int) -> None:
        """Answer a WebSocket handshake; from here on read frames with lines of IRC."""
        server = self.server
        if refusal := server.limits.speaks_http(self.limit_key, False):
            return self.session.answer(503, refusal)
        self.session.ended()
        super().write(head)
        self.web, self.framing, self.shared = False, server.framings[opcode], False
        self.inbox = FrameReader(LINE_BYTES, self.inbox.buffer)
        self.session = IrcSession(server.site, self)
        server.web_heads.discard(self)
        server.web_idle.discard(self)
        server.unnamed.add(self)
        return None

    def write(self, data: bytes) -> None:
        super().write(self.framing(data) if self.framing else data)

    def end_frames(self) -> None:
        """Send a close frame on a WebSocket that is still open."""
        if self.framing and not self.inbox.closed:
            super().write(close_frame(1000))

    def answer_frames(self) -> None:
        out, self.inbox.out = self.inbox.out, b""
        super().write(out)
        self.eof = self.eof or self.inbox.closed

    def heard_request(self) -> None:
        """Restart the time limits of requests, after input."""
        self.server.web_idle.discard(self)
        if self.inbox.in_body or self.answers:
            self.server.web_idle.add(self)
        else:
            self.server.web_heads.add(self)

    @property
    def answers(self) -> bool:
        """True while an answer is under way: the next request waits for that."""
        return self.held or self.session.has_more or self.unsent > 0

    def was_stalled(self) -> bool:
        """Return whether nothing is under way, or nothing was sent in the last few looks."""
        if self.held:
            return False
        self.looks = self.looks + 1 if self.unsent == self.asked else 0
        self.asked = float(self.unsent)
        return not self.unsent or self.looks >= STALLED_LOOKS

    @property
    def patient(self) -> bool:
        return self.web

    # What the network does to it

    @property
    def busy(self) -> bool:
        """True if there is input to act on."""
        more = self.session is not None and self.session.has_more
        return more or bool(self.inbox and self.inbox.pending)

    def wants_read(self) -> bool:
        waits = self.held or self.leaving or self.waits_for_budget
        return not waits and self.unsent <= UNSENT_NO_READ and not self.busy

    def ready(self, mask: int) -> None:
        # Lines that wait will have their turn: enough to do. Telling the selector so would
        # cost two system calls a turn in every storm.
        super().ready(mask if self.wants_read() or self.state != OPEN else mask & ~READ)

    def received(self, data: bytes) -> None:
        self.heard = self.loop.now
        if self.inbox is None:
            self.server.silent.discard(self)
            if self.tls is None and TLS_FIRST_BYTES.startswith(data[:2]):
                if self.server.tls_context is None:
                    log.info(
                        "%s speaks TLS, and there is no certificate (--tls-cert)", self.address
                    )
                    return self.drop("no TLS here")
                self.encrypt(TlsFilter(self.server.tls_context))
                return self.arrived(data)
            self.inbox = LineBuffer(LINE_BYTES)
            if flood := self.server.options.flood:
                self.budget = Budget(*flood, self.loop.now)
                self.budget.tokens = min(flood[0], self.home.budget.tokens)
        self.inbox.feed(data)
        if self.web:
            self.heard_request()
        self.server.acting[self] = None

    def secured(self) -> None:
        self.server.silent.add(self)

    def ended(self) -> None:
        if self.inbox is None:
            return self.close()
        if self.session is None or self.session.accepts_partial_last_line:
            self.inbox.finish()
        self.server.acting[self] = None

    def resume_soon(self) -> None:
        """Act on the rest of the input in the next turn."""
        if self not in self.server.acting:
            self.server.acting[self] = None
            self.loop.call_soon(do_nothing)

    def still_there(self) -> bool:
        """Return whether the connection is open; notice a reset also while nothing is read.
        Otherwise its input would be acted on for as long as the budget makes it last."""
        if self.state != CLOSED and (
            number := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        ):
            self._bury(reason_of(OSError(number, os.strerror(number))))
        return self.state != CLOSED

    def resume_with_budget(self) -> None:
        self.waits_for_budget = False
        if self.still_there():
            self.server.acting[self] = None
            self.update()

    def lagging(self) -> None:
        if self.unsent > UNSENT_MOST:
            self.server.drop_slow(self)
        elif self.unsent > UNSENT_SLOW and not self.web:  # which was_stalled() looks after
            self.server.slow.add(self)
        else:
            self.server.slow.discard(self)
            if self.inbox and self.unsent <= UNSENT_NO_READ:
                self.resume_soon()

    def drop(self, reason: str) -> None:
        if self.inbox:
            self.inbox.clear()  # the server's decision: the unread lines are dropped
        super().drop(reason)

    def lost(self, reason: str) -> None:
        # Happens while the turn is being written, too: what it causes comes next turn.
        self.loop.call_soon(functools.partial(self.server.lost, self, reason))


class Listener:
    """A socket that accepts connections."""

    def __init__(self, server: "Server", host: str, port: int):
        self.server = server
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # so that [::] and 0.0.0.0 can have the same port
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit these
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
        try:
            self.sock.bind((host, port))
        except OSError as error:
            self.sock.close()
            text = f"cannot listen on {address_text(host, port)}: {reason_of(error)}"
            raise Unusable(f"{text}; try --listen HOST:0") from error
        self.sock.listen(BACKLOG)
        self.sock.setblocking(False)
        self.address = self.sock.getsockname()[:2]
        server.loop.selector.register(self.sock, READ, self)

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
        """Handle a lack of descriptors or memory. Tell waiting clients, on the descriptor kept
        spare for that; if even this is not possible, wait, because trying again at once would
        spin."""
        log.warning("cannot accept: %s; raise the limit (ulimit -n)", reason_of(error))
        if self.server.limits.turn_away_all(self.sock):
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
    """Return a descriptor to close when there are none left, so that one client can be told."""
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None


def descriptor_limit() -> int:
    """Return the number of files and sockets we may open, after raising it as far as allowed."""
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
    """Return the lines of the message of the day, safe to show. Raises Unusable."""
    try:
        return harmless(path.read_text("utf-8-sig")).expandtabs().splitlines() if path else []
    except UnicodeDecodeError:
        raise Unusable(f"the message of the day {path} is not UTF-8 text") from None
    except OSError as error:
        raise Unusable(f"cannot read the message of the day {path}: {reason_of(error)}") from error


class Secret(str):
    """A password, and the path of the file it was read from, if any."""

    path: pathlib.Path | None = None


def read_secret(path: pathlib.Path) -> Secret:
    """Return the password in a file, without the blanks around it. Raises Unusable."""
    what = f"the password in {path}"
    try:
        secret = Secret(path.read_text("utf-8-sig").strip())
    except UnicodeError:
        raise Unusable(f"{what} is not UTF-8 text") from None
    except OSError as error:
        raise Unusable(f"cannot read {what}: {reason_of(error)}") from None
    if not secret:  # an empty password would let all in
        raise Unusable(f"{what} is empty")
    secret.path = path
    return secret


def reread_secret(secret: str) -> str:
    path = getattr(secret, "path", None)
    return read_secret(path) if path else secret


def server_tls_context(options: ServerOptions) -> Any:
    if not options.tls_cert:
        if options.tls_key or options.sts or options.tls_client_ca:
            raise Unusable("--tls-key, --tls-client-ca and --sts are of no use without --tls-cert")
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key is refused: there may be no user to ask.
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
            raise Unusable(f"cannot use the authorities {options.tls_client_ca}: {why}") from error
        context.verify_mode = ssl.CERT_OPTIONAL  # clients without one are accepted, too
    return context


class ConnectionLimits:
    """Limits on connections, in all and from one address. Clients that are turned away are told."""

    def __init__(self, options: ServerOptions):
        room = max(descriptor_limit() - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)
        self.most = options.max_clients or room
        self.most_per_address = options.max_per_address
        self.proxies = {address_key(host) for host in options.web.proxies}  # have many clients
        self.inside = 0
        self.per_address: collections.Counter[str] = collections.Counter()
        self.web: collections.Counter[str] = collections.Counter()  # those that speak HTTP
        self.spare = spare_descriptor()

    def enter(self, key: str) -> str:
        """Count a new connection and return ""; or return why it is not allowed."""
        if self.inside >= self.most:
            return f"this server is full: {self.most} clients"
        if self.per_address[key] >= self.most_per_address and not self._exempt(key):
            text = f"too many connections from {key}: {self.most_per_address} at most"
            return f"{text} (--max-per-address)"
        self.inside += 1
        self.per_address[key] += 1
        return ""

    def leave(self, key: str, web: bool = False) -> None:
        self.inside -= 1
        self._less(self.web if web else self.per_address, key)

    def speaks_http(self, key: str, on: bool) -> str:
        """Count a connection as HTTP, or (not `on`) as IRC again for a WebSocket; return "", or why
        that is not allowed."""
        before, after = (self.per_address, self.web) if on else (self.web, self.per_address)
        most = WEB_PER_ADDRESS if on else self.most_per_address
        if after[key] >= most and not self._exempt(key):
            return f"too many connections from {key}: {most} at most"
        after[key] += 1
        self._less(before, key)
        return ""

    def move(self, key: str, to: str) -> None:
        """Count an HTTP connection for another address."""
        self.web[to] += 1
        self._less(self.web, key)

    def _exempt(self, key: str) -> bool:
        return is_loopback(key) or key in self.proxies

    @staticmethod
    def _less(counter: collections.Counter[str], key: str) -> None:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]

    def turn_away(self, sock: socket.socket, host: str, text: str) -> None:
        log.warning("%s turned away: %s", host, text)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(f"* {text}; try again later\n".encode())
        sock.close()

    def turn_away_all(self, listening: socket.socket) -> bool:
        """Turn away the whole backlog, on the spare descriptor; return whether that worked."""
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
    """Mail the code of a new account. To be called off the loop. Raises Unusable."""
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


class Committer:
    """The commit beat and the upkeep of the store: checkpoints, index and pruning."""

    def __init__(self, loop: Loop, hub: Hub, store: Store, helpers: Helpers):
        self.loop, self.hub, self.store, self.helpers = loop, hub, store, helpers
        self.losing = False  # the store is; it has been logged
        self.checkpoint_due = False
        self.index_due = False
        self.committed = 0.0  # when, last
        self.sweep()

    def commit(self, hub: Hub) -> bool:
        """Store the turn's events, or tell their senders that they are lost. False: try later."""
        turn = hub.turn
        if turn.changed:
            hub.settle()
        if not (turn.to_store or turn.dedup):
            return True
        self.committed = self.loop.now
        outcome = self.store.commit(turn, self.loop.now, hub.ticks)
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
        self.look_after_store()
        return True

    def look_after_store(self) -> None:
        if self.store.path and not self.checkpoint_due:
            self.checkpoint_due = True
            self.loop.call_later(CHECKPOINT_SECONDS, self.checkpoint)
        if self.store.words.has_work and not self.index_due:
            self.index_due = True
            self.loop.call_later(INDEX_SECONDS, self.index)

    def index(self) -> None:
        """Index new messages in slices: on a helper, or, in memory, on the loop."""
        job = self.store.words.step(INDEX_IDS_BUSY if self.busy else None)
        if self.store.path:
            self.helpers.submit(self, job, self.indexed)
        else:
            self.indexed(job())

    def indexed(self, left: Any) -> None:
        failed = isinstance(left, Exception) or bool(left[1])
        if not isinstance(left, Exception):
            self.store.words.finish(left)
        self.index_due = self.store.words.has_work
        if self.index_due:
            self.loop.call_later(INDEX_SECONDS if failed or self.busy else INDEX_PAUSE, self.index)

    @property
    def busy(self) -> bool:
        return self.loop.now - self.committed < INDEX_SECONDS / 10

    def sweep(self) -> None:
        for throttle in (self.hub.accounts.throttle, self.hub.accounts.made):
            throttle.sweep(self.hub.ticks)
        more = False
        with contextlib.suppress(sqlite3.Error):  # busy or full: another time
            more = self.store.dedup.sweep(self.hub.now)
        self.loop.call_later(0 if more else SWEEP_SECONDS, self.sweep)

    def checkpoint(self) -> None:
        def done(error: Exception | None) -> None:
            self.checkpoint_due = False
            if error and not self.losing:
                log.error("checkpoint: %s", error)
            if self.store.erased:
                self.look_after_store()

        self.helpers.submit(self, self.store.checkpoint, done)


class OpenFile:
    """A file that is being read or written. The hash of a new file is computed as it is written."""

    def __init__(self, path: pathlib.Path, new: bool | None = None):
        """Open a file: `new` is True to create it, False to append to it, None to read it."""
        self.path, self.fd = path, -1
        self.lock = threading.Lock()  # a connection may end while a job reads or writes
        flags = os.O_RDONLY if new is None else os.O_RDWR | os.O_APPEND
        flags |= (os.O_CREAT | os.O_EXCL) * bool(new)
        self.fd = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
        self.hash = hashlib.sha256() if new else None

    def write(self, data: bytes) -> None:
        with self.lock:
            while data:
                written = os.write(self.fd, data)
                if self.hash:
                    self.hash.update(data[:written])
                data = data[written:]

    def __del__(self) -> None:
        """Close a file that was opened for a connection that had ended."""
        self.close()

    def digest(self) -> str:
        """Return the SHA-256 of all content; read it again if the upload had a break."""
        if self.hash:
            return self.hash.hexdigest()
        with open(self.fd, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, at: int, size: int) -> bytes:
        with self.lock:
            return os.pread(self.fd, size, at)

    def close(self) -> None:
        with self.lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


class FileFolder:
    """The content of files on disk. Its methods are jobs for helpers: a disk may be slow. Equal
    content is stored once, under its SHA-256; incomplete content is ID.part."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.mkdir(mode=0o700, exist_ok=True)

    def begin(self, id: str) -> OpenFile:
        """Return a new file for the content of an upload. Raises Refused."""
        try:
            return OpenFile(self._part(id), new=True)
        except OSError as error:
            log.error("a file cannot be written: %s", reason_of(error))
            raise Refused("NO_ROOM", f"the file cannot be written: {reason_of(error)}") from None

    def reopen(self, id: str) -> tuple[OpenFile, int]:
        """Return the file of an upload that goes on, and its size in bytes. Raises Refused."""
        file = self._guarded(lambda: OpenFile(self._part(id), new=False))
        return file, os.fstat(file.fd).st_size

    def size(self, id: str) -> int:
        return self._guarded(lambda: self._part(id).stat().st_size)

    def append(self, file: OpenFile, piece: bytes) -> None:
        """Write a piece at the end of a file. Raises Refused."""
        self._guarded(lambda: file.write(piece))

    def finish(self, file: OpenFile, name: str) -> tuple[str, int, str, int, int]:
        """Name content by its hash, once it is safely on disk. Return SHA-256, size, type, width
        and height. Raises Refused."""
        return self._guarded(lambda: self._finish(file, name))

    def _finish(self, file: OpenFile, name: str) -> tuple[str, int, str, int, int]:
        with contextlib.closing(file):
            os.fsync(file.fd)
            size, sha = os.fstat(file.fd).st_size, file.digest()
            head = os.pread(file.fd, PICTURE_HEAD_BYTES, 0)
            kind = content_type(head[:TEXT_HEAD_BYTES], name, size <= TEXT_HEAD_BYTES)
            file.path.replace(self.path / sha)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return sha, size, kind, *picture_size(kind, head)

    def open(self, sha: str) -> OpenFile | None:
        """Return the content with this hash, opened; None if there is none."""
        try:
            return OpenFile(self.path / sha)
        except OSError as error:
            log.error("the file %s cannot be read: %s", sha, reason_of(error))
            return None

    def read(self, file: OpenFile, at: int, size: int) -> bytes:
        """Return `size` bytes; b"" if not all of them can be read."""
        try:
            data = file.read(at, size)
        except OSError as error:
            log.error("the file %s cannot be read: %s", file.path.name, reason_of(error))
            data = b""
        return data if len(data) == size else b""

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def clean(self, wanted: Collection[str]) -> None:
        """Remove all content that no link needs: a crash may leave some."""
        with contextlib.suppress(FileNotFoundError):  # the folder is gone: the store says so
            self.remove({path.name for path in self.path.iterdir()} - set(wanted))

    def _part(self, id: str) -> pathlib.Path:
        return self.path / f"{id}.part"

    @staticmethod
    def _guarded(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except FileNotFoundError:
            raise Refused("NO_FILE", NO_SUCH_FILE) from None
        except OSError as error:
            log.error("a file cannot be written: %s", reason_of(error))
            raise Refused("NO_ROOM", f"the file cannot be written: {reason_of(error)}") from None


def network_address() -> str:
    """Return this machine's address on its default route; "" if there is none. Connecting a UDP
    socket sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        return sock.getsockname()[0]
    return ""


def web_of(options: ServerOptions, ports: Iterable[int]) -> Web:
    """Return the settings of the web dialect, with the names and ports of this machine."""
    own = socket.gethostname().lower()
    everywhere = any(host in ("0.0.0.0", "::") for host, _ in options.listen)
    reached = network_address() if everywhere else ""
    names = {*options.web.hosts, "localhost", options.name.lower(), own, f"{own}.local"}
    ports = frozenset(ports) | options.web.ports
    return options.web._replace(hosts=frozenset(names), ports=ports, address=reached)


class Server:
    """One running server with all its parts."""

    def __init__(
        self,
        loop: Loop,
        options: ServerOptions,
        store: Store | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.loop, self.options = loop, options
        self.clock = clock or (lambda: time.time())  # looked up each time, so it can be faked
        self.tls_context = server_tls_context(options)
        path = options.data / "chat.db" if options.data else None
        self.store = store or Store(path, options.keep)
        self.hub = load_hub(self.store, self.clock(), loop.now, options.name)
        self.hub.absent_per_host = options.max_per_address
        self.site = Site(self.hub, self.store, self, IrcWires(self.hub.ids), options)
        self.motd = read_motd(options.motd)
        self.mail = functools.partial(mail_code, options)
        self.note = functools.partial(log.warning, "%s")  # what operators do goes to the log
        self.helpers = Helpers(loop)
        self.peers: set[Peer] = set()
        self.addresses = Addresses(options.flood)
        self.limits = ConnectionLimits(options)
        self.silent = Delay(loop, GREETING_SECONDS, self.greet)
        self.unnamed = Delay(loop, NAMING_SECONDS, self.evict)
        self.slow = Delay(loop, SLOW_SECONDS, self.drop_slow)
        self.probed = Delay(loop, PONG_SECONDS, self.probe)
        self.web_heads = Delay(loop, WEB_HEAD_SECONDS, self.end_request)
        self.web_idle = Delay(loop, WEB_IDLE_SECONDS, self.end_idle)
        self.framings = {opcode: Framing(opcode) for opcode in SUBPROTOCOLS.values()}
        self.idle_addresses = Delay(loop, ADDRESS_SECONDS, self.forget_address)
        self.grace_timer: Timer | None = None
        self.acting: dict[Peer, None] = {}  # have something to act on
        self.leaving: list[Peer] = []  # to be closed once this turn is written
        self.jobs: list[tuple] = []  # for helpers, after the commit
        self.committer = Committer(loop, self.hub, self.store, self.helpers)
        self.stopping = self.restarting = False
        self.began = loop.now
        self.listeners = [Listener(self, *address) for address in options.listen]
        self.tls_port = self.listeners[0].address[1] if self.listeners else 0  # as for plain text
        self.site.web = web_of(options, [listener.address[1] for listener in self.listeners])
        if options.files and options.data:
            self._open_files(options)
        self.clock_offset = self.clock() - loop.now
        loop.turn_begins = self.begin_turn
        loop.turn_ends = self.end_turn

    def _open_files(self, options: ServerOptions) -> None:
        files = self.hub.files
        files.most, files.total = options.file_max, options.files_max
        self.site.folder = FileFolder(options.data / "files")
        names = {file.on_disk for file in files.values()}
        self.background(FILE_LANE, functools.partial(self.site.folder.clean, names))
        self.expire_files()

    def expire_files(self) -> None:
        """Remove old files, and uploads that do not go on."""
        now = self.clock() * 1000
        for file in list(self.hub.files.values()):
            days = self.options.files_keep
            seconds = days * 24 * 3600 if file.sha else UPLOAD_SECONDS
            if now - file.made > seconds * 1000 and file.id not in self.site.uploading:
                self.site.act("remove_file", file.id)
        self.loop.call_later(FILES_SWEEP_SECONDS, self.expire_files)

    def remove_content(self) -> None:
        """Remove content from disk that no link needs any more. Wait while an upload is finishing,
        since its content may be the same."""
        files = self.hub.files
        if self.site.folder is None or files.finishing:
            return
        used = {file.on_disk for file in files.values()}
        names, files.unwanted = set(files.unwanted) - used, []
        self.background(FILE_LANE, functools.partial(self.site.folder.remove, names))

    def settle(
        self, session: LocalSession, lane: str, job: Callable[[], Any], then: Callable
    ) -> None:
        """Run job() off the loop, then then(its result, whether the session is there), also if
        it is not. The session's next request waits."""
        conn = session.conn
        conn.held = True
        conn.update()

        def done(result: Any) -> None:
            conn.held = False
            conn.resume_soon()
            then(result, not (conn.gone or conn.leaving))

        self.helpers.submit(self, job, done, lane)

    def background(self, lane: str, job: Callable[[], Any]) -> None:
        """Run a job off the loop. Its result is not awaited; errors are logged."""

        def done(result: Any) -> None:
            if isinstance(result, Exception):
                log.error("a job failed: %s", result)

        self.helpers.submit(self, job, done, lane)

    # Coming

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Make a peer of an accepted connection, or refuse it."""
        key = address_key(host, sock.getsockname()[0] if ":" in host else "")
        if refusal := self.limits.enter(key):
            return self.limits.turn_away(sock, host, refusal)
        peer = Peer(self, sock, host, port, key)
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

    def end_request(self, peer: Peer) -> None:
        """End a request whose head does not come. An answer that is under way is not ended."""
        if peer.state != OPEN or peer.leaving:
            return
        if peer.answers or peer.inbox.pending:
            self.web_idle.add(peer)
        else:
            peer.session.receive(BadRequest(408, "the request does not come"))

    def end_idle(self, peer: Peer) -> None:
        """Close an HTTP connection that is not used, or whose client does not read."""
        if peer.was_stalled():
            peer.drop("idle")
        else:
            self.web_idle.add(peer)

    def probe(self, peer: Peer) -> None:
        """Close a silent peer, or ask it for a sign of life: TCP reports only orderly ends."""
        if peer.busy or peer.held:  # the server has not read from it
            peer.heard = self.loop.now
        silent = self.loop.now - peer.heard
        if silent >= PING_SECONDS and peer.asked > peer.heard:
            return peer.session.end(f"Ping timeout: {silent:.0f} seconds", intended=False)
        if silent >= PING_SECONDS:
            peer.asked = self.loop.now
            peer.session.probe()
        self.probed.add(peer)

    def forget_address(self, address: Address) -> None:
        if not (address.peers or self.addresses.forget_if_full(address, self.loop.now)):
            self.idle_addresses.add(address)

    # What sessions may ask for

    def nameless(self) -> int:
        return len(self.unnamed.waiting)

    def trouble(self) -> str:
        return f"history is not being kept: {self.store.trouble}" if self.committer.losing else ""

    def metrics(self) -> dict[str, tuple[str, str, float]]:
        """Return the figures by name: kind, text and value of each."""
        hub, losing = self.hub, bool(self.trouble())
        return {
            "chat_connections": ("gauge", "connections of all dialects", len(self.peers)),
            "chat_users": ("gauge", "users, absent ones included", len(hub.users)),
            "chat_absent": ("gauge", "users within the grace period", len(hub.absent)),
            "chat_channels": ("gauge", "channels", len(hub.channels)),
            "chat_accounts": ("gauge", "accounts", len(hub.accounts)),
            "chat_files": ("gauge", "files, and uploads that go on", len(hub.files)),
            "chat_last_event": ("counter", "id of the newest event", hub.last_id),
            "chat_unsent_bytes": ("gauge", "bytes that wait", sum(p.unsent for p in self.peers)),
            "chat_history_lost": ("gauge", "1 while history is not kept", int(losing)),
            "chat_seconds": ("counter", "seconds of running", self.loop.now - self.began),
        }

    def refresh(self) -> None:
        """Load the accounts again if another process (`chat.py passwd`) changed the database."""
        with contextlib.suppress(sqlite3.Error, ValueError):  # then they stay as they are
            if not self.hub.turn.records and self.store.changed_elsewhere():
                self.hub.accounts.load(list(self.store.accounts()))

    def reload(self) -> None:
        """Read the files again after SIGHUP, as REHASH does."""

        def done(result: Any) -> None:
            if isinstance(result, Exception):
                log.error("SIGHUP: nothing was changed: %s", result)
            else:
                self.use_files(result)
                log.warning("SIGHUP: read the message of the day, certificate and passwords again")

        self.helpers.submit(self, self.read_files, done)

    def read_files(self) -> tuple:
        """Return the contents of the files that may have changed. Off the loop. Raises Unusable."""
        options = self.options
        password = options.password and reread_secret(options.password)
        operators = operators_of((name, reread_secret(word)) for name, word in options.oper)
        return server_tls_context(options), read_motd(options.motd), password, operators

    def use_files(self, files: tuple) -> None:
        self.tls_context, self.motd, self.site.password, self.site.operators = files

    def restart(self) -> None:
        self.restarting = True
        self.stop()

    # The act beat

    def act(self) -> None:
        """Turn lines into acts: first of addresses with light use; the rest waits a turn."""
        acting, self.acting = self.acting, {}
        if not acting:
            return
        begun = time.perf_counter()
        if self.options.flood is None:  # all are equal: each in turn
            light, heavy, limit = list(acting), [], ACT_SECONDS
        else:
            used = {peer: peer.home.used(self.loop.now) for peer in acting}
            order = sorted(acting, key=used.__getitem__)
            first = sum(use <= LIGHT_USE for use in used.values())
            light, heavy, limit = order[:first], order[first:], ACT_SECONDS_LIGHT
        if self._act_on(light, begun + limit):
            self._act_on(heavy, begun + ACT_SECONDS)
        else:
            self.acting.update(dict.fromkeys(heavy))
        if self.acting:
            self.loop.call_soon(do_nothing)

    def _act_on(self, peers: list[Peer], end: float) -> bool:
        """Act on the lines of these peers until `end`; return whether all had their turn."""
        for n, peer in enumerate(peers):
            if time.perf_counter() > end:
                self.acting.update(dict.fromkeys(peers[n:]))
                return False
            self.loop.guarded(self._act_on_peer, peer, end)
        return True

    def _act_on_peer(self, peer: Peer, end: float) -> None:
        try:
            self._take_lines(peer, end)
        except Exception:
            log.exception("a bug, please report it (%s)", peer.address)
            return peer.drop("internal error")
        if peer.held or peer.leaving or peer.waits_for_budget:
            return
        if peer.eof and not peer.busy:
            return peer.close()
        if peer.queue.size <= UNSENT_NO_READ and peer.busy:  # else lagging() resumes it
            self.acting[peer] = None
        peer.update()

    def _take_lines(self, peer: Peer, end: float) -> None:
        self.hub.take_work()  # drop the work done meanwhile: it is for no peer's line
        for n in range(LINES_A_TURN):
            session = peer.session
            replied = session.replied if session else 0
            if peer.held or peer.leaving or peer.queue.size + replied > UNSENT_NO_READ:
                return  # more was answered than is likely to be read: the next lines can wait
            if n % 8 == 0 and time.perf_counter() > end:
                return
            if session and (session.unfinished is not None or session.postponed):
                session.go_on()
                self._charge(peer, replied)
            elif not self.act_on_a_line(peer):
                return

    def act_on_a_line(self, peer: Peer) -> bool:
        """Act on one line of a peer; return whether there was one, and budget for it."""
        if peer.inbox is None:
            return False
        free = peer.inbox.in_body
        spent = peer.budget and (not free or peer.budget.tokens < 0)
        if spent and peer.inbox.pending and (seconds := peer.wait()):
            if peer.gone:  # after a reset: what the budget does not allow is not waited for
                log.info("%s was reset with lines beyond its budget: dropped", peer.address)
                peer.inbox.clear()
                return False
            peer.waits_for_budget = True
            self.loop.call_later(seconds, peer.resume_with_budget)
            peer.update()
            return False
        costs = WORK_OF_A_PIECE if free else WORK_PER_TOKEN
        line = peer.inbox.take()
        if peer.inbox.out:
            peer.answer_frames()
        if line is None:
            if peer.web:
                self._watch_web(peer)
            return False
        session = peer.session
        if session is None or (session.user is None and session.takes_lines):
            line = line.removeprefix(BOM)
            session = session or self.open_session(peer, line)
        if session is not None:
            replied = session.replied
            session.receive(line)
            if peer.budget:
                self._charge(peer, replied, costs)
        if peer.web:
            self._watch_web(peer)
        return True

    def _watch_web(self, peer: Peer) -> None:
        """After a request, or a piece of a body, begin to wait for what comes next."""
        self.web_heads.discard(peer)
        begun = peer.inbox.start < len(peer.inbox.data) and not peer.inbox.in_body
        (self.web_heads if begun and not peer.answers else self.web_idle).add(peer)

    def _charge(self, peer: Peer, replied: int, least: float = 0) -> None:
        """Take the work done for a peer from its budgets: a line costs at least one token."""
        bytes_sent = peer.session.replied - replied
        peer.charge(max(self.hub.take_work() + bytes_sent * WORK_OF_A_BYTE, least))

    def open_session(self, peer: Peer, first_line: bytes) -> LocalSession | None:
        """Return the session that a first line begins; None if it begins none."""
        if first_line == TOO_LONG:  # no name, and perhaps the target of a request
            peer.close()
            return None
        if not first_line:  # it says nothing yet, in any dialect
            self.silent.add(peer)
            return None
        dialect = dialect_of(first_line)
        if dialect == "http":
            peer.speak_http(first_line)
            return None
        if dialect == "other http":
            peer.write(NOT_HTTP_1)
            peer.close()
        elif dialect == "irc":
            peer.session = IrcSession(self.site, peer)
        else:
            peer.session = LineSession(self.site, peer, peer.greeted)
        return peer.session

    def later(self, session: LocalSession, lane: str, job: Callable, then: Callable) -> None:
        """Run job() on a helper once this turn is committed, then then(its result) on the loop.
        Until then this session's next lines wait, so that answers come in order. A store in memory
        has only one connection, which no helper may use, and nothing to wait for."""
        session.conn.held = True
        session.conn.update()
        done = functools.partial(self.answer, session, then)
        if lane == PAGE_LANE and self.store.path is None:
            self.loop.call_soon(lambda: done(attempt(job)))
        else:
            self.jobs.append((session.conn, lane, job, done))

    def answer(self, session: LocalSession, then: Callable, result: Any) -> None:
        peer = session.conn
        peer.held = False
        peer.resume_soon()
        if peer.gone or peer.leaving:
            return
        if isinstance(result, Exception) and not isinstance(result, ChatError):
            level = logging.DEBUG if self.committer.losing else logging.ERROR  # it was said once
            log.log(level, "a job for %s failed: %s", peer.address, result)
            result = Refused("TRY_AGAIN", "that cannot be answered just now; try again later")
        session.take_result(then, result)

    # The commit and the write beat

    def begin_turn(self) -> None:
        now = self.clock()
        offset = now - self.loop.now
        if abs(offset - self.clock_offset) > CLOCK_JUMP_SECONDS:
            log.warning("the clock was set by %+.1f s", offset - self.clock_offset)
        self.clock_offset = offset
        self.hub.begin(now, self.loop.now)

    def end_turn(self) -> None:
        self.act()
        self.hub.take_work()
        if not self.committer.commit(self.hub):
            return
        turn = self.hub.turn
        if turn.happened:
            try:
                self.deliver(turn)
            finally:
                self.hub.end()
        if self.leaving or self.jobs:
            self._after_writing()
        if self.store.excess or self.store.orphans:
            idle = not turn.events
            if self.store.prune(idle, self.hub.now) and idle:
                self.loop.call_soon(do_nothing)  # and another slice in the next turn
        if self.hub.absent and self.grace_timer is None:  # for the first user whose period ends
            first = next(iter(self.hub.absent.values())) / 1000 + GRACE_SECONDS
            self.grace_timer = self.loop.call_later(first - self.loop.now, self._end_grace)
        if self.hub.files.unwanted:
            self.remove_content()

    def deliver(self, turn: Turn) -> None:
        for data, sessions in turn.deliveries(report_bug):
            broadcast(data, sessions)

    def _after_writing(self) -> None:
        leaving, self.leaving = self.leaving, []
        for peer in leaving:
            if peer.gone:
                self.forget(peer)
            else:
                peer.end_frames()
                Connection.close(peer)
                if peer.web:
                    self.web_idle.add(peer)
        jobs, self.jobs = self.jobs, []
        for peer, lane, job, done in jobs:
            self.helpers.submit(peer.limit_key, job, done, lane, peer.still_there)

    def _end_grace(self) -> None:
        self.grace_timer = None
        over = self.hub.ticks - GRACE_SECONDS * 1000
        for user, since in list(self.hub.absent.items()):
            if since > over:
                break
            self.site.act("grace_period_over", user.resume_id)

    # Going

    def lost(self, peer: Peer, reason: str) -> None:
        """Act on the input of a lost connection as far as its budget allows; drop the rest."""
        level = logging.INFO if reason.startswith(TLS_TROUBLE) else logging.DEBUG
        log.log(level, "%s: %s", peer.address, reason)
        for delay in (self.silent, self.unnamed, self.slow, self.probed):
            delay.discard(peer)
        self.web_heads.discard(peer)
        self.web_idle.discard(peer)
        if peer.session and not peer.session.parting:
            peer.session.parting = reason
        peer.eof, peer.waits_for_budget = True, False
        if peer.inbox and not peer.leaving:
            self._act_on_the_last(peer)
        self.forget(peer)

    def _act_on_the_last(self, peer: Peer) -> None:
        """Act on the last lines of a lost connection, in this turn."""
        peer.held = False
        if peer.session:
            peer.session.unfinished = None
            peer.session.postponed.clear()
        for _ in range(LINES_A_TURN):
            if peer.held or peer.leaving or not self.act_on_a_line(peer):
                break
        if peer.inbox.pending:
            log.info("%s was reset with more lines than a turn takes: dropped", peer.address)
            peer.inbox.clear()

    def leave_address(self, peer: Peer) -> None:
        """Take a peer from the address that it counts for."""
        self.addresses.leave(peer.home, self.loop.now)
        if self.addresses.get(peer.limit_key) is peer.home and not peer.home.peers:
            self.idle_addresses.add(peer.home)

    def forget(self, peer: Peer) -> None:
        """Remove a peer. One that is lost while it leaves is removed twice."""
        if peer not in self.peers:
            return
        self.peers.discard(peer)
        self.acting.pop(peer, None)
        self.limits.leave(peer.limit_key, peer.web)
        self.leave_address(peer)
        if peer.session:
            peer.session.ended()
        if self.stopping and not self.peers:
            self.loop.stop()

    def drop_slow(self, peer: Peer) -> None:
        log.warning("%s reads too slowly: %d bytes unsent", peer.address, peer.unsent)
        peer.drop("reads too slowly")

    def stop(self) -> None:
        """Tell all clients, give them time to read the rest, and end."""
        if self.stopping:
            return
        self.stopping = True
        for listener in self.listeners:
            listener.close()
        for peer in list(self.peers):
            if peer.session:
                peer.session.farewell("the server is going down")
                peer.session.abandon()
            peer.close()
        self.loop.call_later(STOP_SECONDS, self.loop.stop)
        if not self.peers:
            self.loop.stop()

    def close(self) -> None:
        """Store what is left, after the loop has ended."""
        self.committer.commit(self.hub)
        if self.helpers.close():  # else a helper still reads: the operating system closes it
            self.store.close()
        self.limits.close()


# ======================================================================================
# LINK
# ======================================================================================
# A client's connection, kept up: look the server up, try its addresses, find out what it
# speaks, log in, and when the connection breaks do it all again, at growing intervals.
# The files here hold what a client keeps between two runs.


class Target(NamedTuple):
    """The server that a client wants to reach."""

    host: str
    port: int
    tls: bool = False
    kind: str = ""  # CHAT, IRC or PLAIN if the user says so: then there is nothing to find out

    def __str__(self) -> str:
        return address_text(self.host, self.port)


TARGET = re.compile(r"(?:(\w+)://)?(\[[^\]\s]+\]|[^:/\[\]\s]+)?(?::(\d+))?/?")
SCHEMES = {  # kind of server, TLS, port
    None: ("", False, DEFAULT_PORT),
    "chat": (PLAIN, False, DEFAULT_PORT),
    "chats": (PLAIN, True, DEFAULT_PORT),
    "irc": (IRC, False, 6667),
    "ircs": (IRC, True, 6697),
}
PORTS = {6667: "irc", 6697: "ircs"}  # without a scheme these mean one


def url_of(target: Target) -> str:
    """Return the URL of a target, which parse_target() turns into the same target."""
    schemes = {(kind, tls): name for name, (kind, tls, _) in SCHEMES.items() if name}
    name = schemes.get((target.kind, target.tls))
    return f"{name}://{target}" if name else str(target)


def parse_target(text: str) -> Target:
    """Parse HOST, HOST:PORT, [IPV6]:PORT or a URL: chat://, irc://; with TLS chats://, ircs://."""
    match = TARGET.fullmatch(text.strip())
    scheme, host, port = match.groups() if match else ("?", "", "")
    scheme = scheme or PORTS.get(int(port or 0))
    if scheme not in SCHEMES or int(port or 0) > 65535:
        raise Unusable(f"{text} is not a server's address; write HOST:PORT or irc://HOST:PORT")
    kind, tls, usual = SCHEMES[scheme]
    return Target((host or DEFAULT_HOST).strip("[]"), int(port or usual), tls, kind)


class Trust(NamedTuple):
    """The certificates that a client trusts, and its own one."""

    ca: str | None = None  # a file of certificates, instead of the system's
    pin: str | None = None  # SHA-256 of the one certificate to believe, in hex
    insecure: bool = False
    own: str | None = None  # a file with a certificate of ours and its key

    def context(self) -> Any:
        import ssl

        context = ssl.create_default_context(cafile=self.ca)
        if self.own:
            context.load_cert_chain(self.own)
        if self.insecure or self.pin:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def accepts(self, fingerprint: str) -> bool:
        return not self.pin or self.pin == fingerprint


BELIEVE_THE_SYSTEM = Trust()
NOT_SIGNED = "certificate verify failed"  # as OpenSSL says it


class Memory:
    """A private file of JSON; without a path nothing is stored."""

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
        with contextlib.suppress(OSError):  # keep() is for values that must not be lost
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = self.path.with_suffix(".new")
            fd = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(known | news, file, indent=1)
            written.replace(self.path)

    def keep(self, name: str, value: Any) -> None:
        """Write a value that must not be lost, and check it; None removes it. Raises Unusable."""
        if self.path.exists() and not self.read():
            raise Unusable(f"{self.path} is damaged; move it away")
        self.write(**{name: value})
        if self.read().get(name) != json.loads(json.dumps(value)):
            raise Unusable(f"{self.path} cannot be written")


class KnownServers(Memory):
    """The kind of each known server, by address, and the certificate it must have."""

    def _known(self, target: Target) -> dict[str, str]:
        known = self.read().get(str(target), {})
        return known if isinstance(known, dict) else {"kind": known}  # as version 0.1 wrote it

    def kind(self, target: Target) -> str:
        return self._known(target).get("kind", "")

    def pin(self, target: Target) -> str | None:
        return self._known(target).get("pin") or None

    def remember(self, target: Target, **what: str) -> None:
        self.write(**{str(target): self._known(target) | what})

    def policy(self, host: str) -> tuple[int, float]:
        """Return the port for TLS that a host demands, and the end of that policy (IRCv3 sts)."""
        known = self.read().get(f"sts:{host}")
        try:
            return int(known[0]), float(known[1])
        except (TypeError, ValueError, IndexError):
            return 0, 0.0

    def remember_policy(self, host: str, port: int, until: float) -> None:
        self.write(**{f"sts:{host}": [port, until]})


def locked(path: pathlib.Path) -> int:
    """Return a file opened for this process alone. Raises BlockingIOError if another has it."""
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
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(str(error)) from error
        raise  # this file system cannot lock
    return fd


class Journal:
    """The file of an outbox: its secret, then accepted messages and arrivals, one line of JSON
    each. A line that was half written when the program was killed was not accepted."""

    def __init__(self, path: pathlib.Path):
        self.fd = locked(path)
        self.first = path.suffix == ".1"  # of the clients of this user
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
        if isinstance(secret := record.get("secret"), str):
            self.secret = secret
        if isinstance(record.get("say"), list):
            reply = "".join(map(str, record["say"][5:6]))
            one = Waiting(*record["say"][:4], reply=reply if reply.isprintable() else "")
            if not all(isinstance(value, str) and value.isprintable() for value in one[:2]):
                return
            one.text.encode()  # raises ValueError for half a character
            self.waiting[one.id] = one
        if record.get("sent") in self.waiting:
            self.waiting[record["sent"]] = self.waiting[record["sent"]]._replace(sent=True)
        match record.get("at"):
            case [str(id), int(at)] if id in self.waiting:
                self.waiting[id] = self.waiting[id]._replace(at=at)
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
        """Forget all messages, which have arrived; keep the secret."""
        os.ftruncate(self.fd, self.head)

    def close(self) -> None:
        os.close(self.fd)


def outbox_stem(target: Target, name: str) -> str:
    """Return a readable file name for an outbox, with a checksum for names that look alike."""
    text = f"{target} {fold(name)}"
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', text)}-{zlib.crc32(text.encode()):08x}"


def free_journal(folder: pathlib.Path, stem: str) -> Journal:
    """Return a journal that no other client uses; preferably one in which messages wait. Raises
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
        advice = "; use --data DIR, or --no-state to keep nothing"
        text = f"cannot keep an outbox in {folder}: {reason_of(error)}"
        raise Unusable(f"{text}{advice}") from error
    chosen = next((journal for journal in free if journal.waiting), free[0])
    for journal in free:
        if journal is not chosen:
            journal.close()
    return chosen


def open_outbox(folder: pathlib.Path | None, target: Target, name: str) -> Outbox:
    """Return the outbox as the last client of this name left it; without a folder, a new one."""
    if folder is None:
        return Outbox()
    journal = free_journal(folder, outbox_stem(target, name))
    if not re.fullmatch(r"[0-9a-f]{32}", journal.secret):
        journal.begin(Outbox().secret)
    return Outbox(journal, journal.secret, journal.waiting.values())


UNDER_WAY = (0, errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", 0))


class Connecting:
    """A socket that is being connected; then(self, "") or then(self, reason) tells the outcome."""

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
        """Finish the attempt: connected, or failed for `reason`."""
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


def peer_address(sock: socket.socket) -> tuple[str, int] | None:
    """Return address and port of the other end; None if the connection has broken already."""
    try:
        return sock.getpeername()[:2]
    except OSError:
        return None


class Race:
    """A connection attempt to all addresses of a server: IPv6 and IPv4 in turn, each a moment after
    the one before (RFC 8305). Calls then(sock, "") with the first socket, or then(None, reason)."""

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
    """The connection of a Link. It reads up to the server's end even after close()."""

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


# The phases of a connection. One field holds the present one.
RESOLVING, CONNECTING, SECURING = "resolving", "connecting", "TLS"
DETECTING, REGISTERING, LOGGING_IN = "detecting", "registering", "logging in"
SYNCING, ONLINE, WAITING, ENDED = "syncing", "online", "waiting", "ended"
TALKING = (DETECTING, REGISTERING, LOGGING_IN, SYNCING, ONLINE)

# What may follow on each phase; a connection may be lost in all but the last two.
FOLLOWING = {
    RESOLVING: (CONNECTING, WAITING, ENDED),
    CONNECTING: (SECURING, *TALKING, WAITING, ENDED, RESOLVING),
    SECURING: (*TALKING, WAITING, ENDED, RESOLVING),
    **dict.fromkeys(TALKING, (*TALKING, WAITING, ENDED, RESOLVING)),
    WAITING: (RESOLVING, ENDED),
    ENDED: (),
}
WANTED_END, AGAIN = "wanted", "again"  # causes besides TEMPORARY, NEEDS_USER and FATAL


def why_not_trusted(reason: str) -> str:
    """Return a plain reason why a certificate is not trusted, for one of OpenSSL."""
    text = reason.partition(f"{NOT_SIGNED}: ")[2].partition(" (_ssl")[0]
    if "expired" in text:
        return "has expired"
    if "mismatch" in text or "not valid for" in text:
        return "is for another host"
    return f"is not signed by an authority that this computer trusts ({text or reason})"


class Link:
    """A client core and its connection to a server, kept up for as long as possible.

    `show(views)` gets the views to show. `over(reason)` is called once at the end: with "" after
    leave(), else with the reason why the link cannot go on. The link gives up after `patience`
    seconds without a server. `asks`: a user can answer questions that no program can. A caller may
    replace `drained()` to learn that has_room() has become true."""

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
        self.phase = WAITING
        self.conn: ServerConnection | None = None
        self.race: Race | None = None
        self.backoff = BACKOFF_FIRST
        self.progress = 0  # of the core, when the back-off was reset last
        self.began = loop.now  # when connecting did, then when it was done
        self.stood = loop.now  # when we were where we want to be last, or began to want it
        self.pin: str | None = None  # the certificate that the server is to have
        self.timer: Timer | None = None  # the one wait that is going on ...
        self.again: Timer | None = None  # ... if that is for the next attempt to connect
        self.pace: Timer | None = None  # until more may be sent
        self.dismissal: Timer | None = None  # until a server that said ERROR has to be gone
        self.doubted = ""  # the fingerprint of a certificate that the user has to judge ...
        self.doubt = ""  # ... and why it is not trusted
        self.transfers: Any = None  # files on their way: Transfers, in clients that have them
        self.distrust = ""  # why it is not trusted, and is only looked at
        # Another certificate than the remembered one: try whether it is signed
        self.unpinned = ""
        self.leaving, self.reason = False, ""
        self.stays = False  # whatever happens, until the user leaves: it stood once, say
        self.watched = loop.now  # when the connection was last looked at ...
        self.pinged = -math.inf  # ... and when the server was asked whether it is there
        self.drained: Callable = do_nothing
        core.later, core.clock, core.ticks = self.later, time.time, lambda: self.loop.now
        core.me.certificate = bool(trust.own)
        self.known_kind = self.known.kind(target)
        core.kind, core.insists = target.kind or self.known_kind, bool(target.kind)
        self._watch()

    @property
    def ended(self) -> bool:
        return self.phase == ENDED

    def _enter(self, phase: str) -> None:
        if phase != self.phase:
            if phase not in FOLLOWING[self.phase]:
                raise ValueError(f"{phase} cannot follow {self.phase}")
            self.phase = phase

    def start(self) -> None:
        self._enter(RESOLVING)
        self._apply_policy()
        self.status(f"connecting to {self.target}")
        self.core.redial, self.again = False, None
        self.pin = self.trust.pin or (None if self.unpinned else self.known.pin(self.target))
        looking = self.trust.insecure or bool(self.distrust)
        trust = self.trust._replace(pin=self.pin, insecure=looking)

        def look_up() -> tuple[Any, list]:
            """Look up the addresses, and load certificates for TLS: both may take a while."""
            host, port = self.target.host, self.target.port
            context = trust.context() if self.target.tls else None
            return context, socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

        self.helpers.submit(self, look_up, self._found)

    def _apply_policy(self) -> None:
        """Use TLS if the server demanded it, until its policy ends (IRCv3 sts)."""
        if self.target.tls:
            return
        port, until = self.known.policy(self.target.host)
        if self.core.sts and self.core.sts[0]:
            port, until = self.core.sts[0], math.inf
        if port and until > time.time():
            self.target = self.target._replace(port=port, tls=True)

    def status(self, text: str) -> None:
        self.show([View(STATUS, text)])

    def later(self, job: Callable, then: Callable) -> None:
        """Run a job of the core off the loop, then then(result) on the loop."""

        def done(result: Any) -> None:
            if not isinstance(result, Exception):
                then(result)
                self._carry_on([])

        self.helpers.submit(self, job, done)

    def typed(self, text: str, *more: Any) -> None:
        """Take a line that the user entered: see ClientCore.typed()."""
        if self.doubted and text.strip() == "/trust":
            return self._trust()
        self._carry_on(self.core.typed(text, *more))
        if self.core.wants_connection:
            self.core.wants_connection = False
            self.reconnect()

    def typing(self, room: Room | None, text: str) -> None:
        """Tell the others in a conversation that the user is typing, or stopped. Commands do not
        count."""
        if room is not None:
            tells = text.strip() and not text.startswith("/")
            self.core.typing(room, "active" if tells else "done")
            self.poke()

    def poke(self) -> None:
        """Send the output of the core, after a screen has called the core."""
        self.core.flush()
        self._carry_on([])

    def reconnect(self) -> None:
        """Connect now, without any more waiting."""
        self.backoff = BACKOFF_FIRST
        if self.conn is not None:
            self.core.redial = True
            self.conn.drop("connecting again")
        elif self.phase == WAITING:
            if self.timer:
                self.timer.cancel()
            self.doubted = ""
            self.start()

    def say(self, line: str) -> None:
        """Take a line from a pipe, which is always text."""
        self._carry_on(self.core.say(line))

    def ask_older(self, room: Room) -> bool:
        """Fetch messages before the first view of a room; return whether they are on their way."""
        talk = self.core.talk
        if self.core.older_from_store(room):
            self.show(self.core.take_views())
            return False
        if room.whole or not (self.core.ready and talk.pages):
            return False
        under_way = any((one.where, one.how) == (room.name, "older") for one in talk.asked)
        if not under_way:
            talk.ask_history(room, "older")
            self.core.flush()
            self._carry_on([])
        return True

    def leave(self, at_once: bool = False, reason: str = "") -> None:
        """End once all messages are sent and acknowledged, or `at_once`: then they stay for another
        time. The server tells others the reason."""
        self.leaving, self.reason = True, reason
        if at_once and not self.core.ready:
            self._end("")
        elif at_once and self.core.ready:
            self._say_goodbye()
        else:
            self._carry_on([])

    def has_room(self) -> bool:
        """Return whether messages go out soon; if not, drained() is called when they do again."""
        sent = self.conn is not None and self.core.ready and self.conn.unsent <= UNSENT_NO_READ
        outbox = self.core.outbox
        return sent and len(outbox.waiting) - len(outbox.parked) < OUTBOX_FULL

    def make_room(self) -> None:
        if self.has_room():
            self.drained()

    # Connecting

    def _found(self, result: Any) -> None:
        if self.ended:
            return None
        if isinstance(result, OSError):
            reason = reason_of(result)
            if not isinstance(result, socket.gaierror) and self.target.tls:
                return self._end(f"cannot use the certificates {self._files()}: {reason}")
            return self.lost(reason)
        if isinstance(result, Exception):  # UnicodeError: no name of a host looks like that
            return self.lost("no name of a host")
        context, found = result
        self.began = self.loop.now
        self._enter(CONNECTING)
        addresses = [(family, address) for family, *_, address in found]
        self.race = Race(self.loop, addresses, functools.partial(self._tried, context))
        return None

    def _files(self) -> str:
        return " or ".join(filter(None, (self.trust.ca, self.trust.own)))

    def _tried(self, context: Any, sock: socket.socket | None, reason: str) -> None:
        self.race = None
        if sock is None:
            return self.lost(reason)
        self.conn = ServerConnection(self, sock)
        if context is None:
            return self._connected()
        self._enter(SECURING)
        self.conn.encrypt(TlsFilter(context, self.target.host))
        self.timer = self.loop.call_later(CONNECT_SECONDS, self._no_handshake)

    def _no_handshake(self) -> None:
        self.conn.drop("no answer in TLS")

    def secured(self) -> None:
        self.timer.cancel()
        fingerprint = self.conn.tls.fingerprint()
        if self.distrust:
            return self._doubt(fingerprint)
        if not Trust(pin=self.pin).accepts(fingerprint):
            return self._other_certificate(fingerprint)
        if self.unpinned:  # it is signed: the one that the user trusted is not needed any more
            self.unpinned = ""
            self.known.remember(self.target, pin="")
            text = f"{self.target} has a new certificate, signed by a trusted authority"
            self.show([View(NOTE, text)])
        self._connected()

    def _other_certificate(self, fingerprint: str) -> None:
        """Handle another certificate than the pinned one. Fail for --pin; else a signed one will
        do."""
        if self.trust.pin:
            text = f"--pin {self.pin} is not the certificate of {self.target}: it shows "
            return self._fail(f"{text}{fingerprint}")
        self.unpinned = fingerprint
        self.conn.drop("another certificate")

    def _other_certificate_text(self, why: str) -> str:
        return (
            f"ANOTHER CERTIFICATE: {self.target} does not have the one that it had, and the new "
            f"one {why}. Another machine may be between you and the server. It was known by "
            f"{self.known.pin(self.target)}; if you know that the new one is right, --pin "
            f"{self.unpinned}"
        )

    def _connected(self) -> None:
        took = self.loop.now - self.began
        self.began = self.loop.now
        self.show([View(UP, f"connected to {self.target}")])
        self.core.tls = self.target.tls
        host, _ = peer_address(self.conn.sock) or ("", 0)
        self.core.secure = self.target.tls or is_loopback(host)
        self._enter(DETECTING)
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
        """Show, send and decide what is next, after anything that may have changed the core."""
        self.show(views + self.core.take_views())
        if self.conn is None or self.phase not in TALKING:
            return
        self._enter(self._phase_of_talk())
        if data := self.core.take_output():
            self.conn.write(data)
        if self.conn.unsent > UNSENT_MOST:
            return self.conn.drop("it asks, and does not hear our answers")
        if self.core.kind in (CHAT, IRC):  # such a server is worth looking for when it is lost
            self.patience = max(self.patience, RETRY_SECONDS)
        if self.core.cause == FATAL and not self.core.quitting:
            return self.conn.drop(self.core.refusal)
        self._keep_policy()
        if self.core.redial:
            return self.conn.drop("it speaks something else")
        if self.core.dismissed and self.dismissal is None:  # the server should hang up itself
            drop = functools.partial(self.conn.drop, self.core.refusal)
            self.dismissal = self.loop.call_later(DISMISSED_SECONDS, drop)
        if self.core.ready:
            self._stand()
        self._keep_pace()

    def _keep_policy(self) -> None:
        """Remember how long this server demands TLS, if it says so over TLS (IRCv3 sts)."""
        if self.core.sts and self.target.tls:  # no seconds end a policy
            until = time.time() + self.core.sts[1]
            self.known.remember_policy(self.target.host, self.target.port, until)
            self.core.sts = None

    def _phase_of_talk(self) -> str:
        core = self.core
        if core.talk is None:
            return DETECTING
        if not core.ready:
            return LOGGING_IN if core.talk.login else REGISTERING
        syncing = any(room.held is not None and room.inside for room in core.rooms.values())
        return SYNCING if syncing else ONLINE

    def _keep_pace(self) -> None:
        """Send more once the server's rate limit allows it."""
        wait = self.core.talk.wait if self.core.talk else None
        if wait is not None and self.pace is None:
            self.pace = self.loop.call_later(max(wait, 0.01), self._send_more)

    def _send_more(self) -> None:
        self.pace = None
        self.core.flush()
        self._carry_on([])

    def _stand(self) -> None:
        """Handle a step of an established session: reset the back-off on progress, remember the
        kind of server, send waiting messages, and leave if the user wants to."""
        self.stays = True
        if self.core.progress != self.progress:
            self.progress, self.backoff = self.core.progress, BACKOFF_FIRST
        if self.core.sure and self.core.kind != self.known_kind and not self.target.kind:
            self.known_kind = self.core.kind
            self.known.remember(self.target, kind=self.core.kind)
        self.make_room()
        if self.leaving and self.core.idle:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        if not self.core.quitting:
            self.core.leave(self.reason)
        if self.conn and self.conn.state == OPEN:
            self.conn.write(self.core.take_output())
            self.conn.close()

    # A certificate that is not trusted

    def _doubt(self, fingerprint: str) -> None:
        """Ask the user about a certificate that is not trusted. Without a user, fail."""
        why, self.distrust, self.doubted = self.distrust, "", fingerprint
        self.doubt = text = f"the certificate of {self.target} {why}"
        if not self.asks:
            advice = f"--pin {fingerprint} if you know that it is the right one"
            return self._fail(f"{text}; {advice}")
        self.show(
            [
                View(NOTE, f"{text}. Its SHA-256 is"),
                View(NOTE, fingerprint),
                View(NOTE, "/trust if the operator of the server tells you the same; else /quit"),
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
        """Check every second whether the server is there; TCP alone would take a quarter of an
        hour. Time in which this program did not run (stopped, suspended) does not count."""
        if self.ended:
            return
        gap = self.loop.now - self.watched
        self.watched = self.loop.now
        self.loop.call_later(WATCH_SECONDS, self._watch)
        if self.phase not in TALKING or self.conn is None:
            return
        if gap > 3 * WATCH_SECONDS:
            self.conn.heard = min(self.loop.now, self.conn.heard + gap)
        self._carry_on(self.core.tick())
        if self.conn is None or self.core.kind == PLAIN or self.core.listening:
            return
        silent = self.loop.now - self.conn.heard
        patience = WAITING_SECONDS if self.core.outbox.in_flight else SILENT_SECONDS
        if not (self.core.ready and self.core.server.ours):
            patience = OTHER_SECONDS
        if silent > patience:
            self.conn.drop(f"no answer for {silent:.0f} s")
        elif silent > patience / 2 and self.core.ready and self.pinged < self.conn.heard:
            self.pinged = self.loop.now
            self.core.talk.ping()
            self._carry_on([])
        if self.phase == ONLINE and self.loop.now - self.began > ONLINE_SECONDS:
            self.backoff = BACKOFF_FIRST

    def lost(self, reason: str) -> None:
        """Handle a connection that broke, or that could not be made, depending on the cause."""
        self.conn = None
        stood = self.phase in (SYNCING, ONLINE)
        for timer in filter(None, (self.timer, self.pace, self.dismissal)):
            timer.cancel()
        self.pace = self.dismissal = None
        if self.core.talk or self.core.listening:
            self.show(self.core.finish())
        cause = self._cause(reason)
        self.show(self.core.disconnected())
        if stood:
            self.stood = self.loop.now
        if self.ended:
            return
        if self.doubted:
            return self._enter(WAITING)
        self.REACTIONS[cause](self, reason)

    def _cause(self, reason: str) -> str:
        core = self.core
        refused = self.phase == SECURING and reason.startswith(TLS_TROUBLE)
        if self.unpinned and refused:
            return FATAL
        if refused or (self.unpinned and self.phase == SECURING):
            untrusted = NOT_SIGNED in reason and not (core.sts or self.trust.pin)
            return AGAIN if self.unpinned or untrusted else FATAL
        if core.cause == FATAL:
            return FATAL
        if core.redial:
            return AGAIN
        if core.quitting and not core.refusal:
            return WANTED_END if reason == HUNG_UP or core.kind != PLAIN else TEMPORARY
        return core.cause if core.refusal and not core.ready else TEMPORARY

    def _dial_again(self, reason: str) -> None:
        if reason.startswith(TLS_TROUBLE):
            self.distrust = why_not_trusted(reason)
        self.core.quitting = False
        self._enter(WAITING)
        self.start()

    def _give_up(self, reason: str) -> None:
        """End the link. But if the server stood once, or is one of several, let the user decide:
        text typed meanwhile must not go elsewhere."""
        text = self._why_given_up(reason)
        if not (self.asks and self.stays):
            return self._end(text)
        advice = "/reconnect tries again, /quit leaves"
        if self.unpinned and not self.trust.pin:
            self.doubted, self.doubt = self.unpinned, text
            advice = "/trust believes the new one from now on, /quit leaves"
        self.unpinned, self.core.quitting = "", False
        self._enter(WAITING)
        self.show([View(NOTE, f"{text}; {advice}")])
        return self.status(text)

    def _why_given_up(self, reason: str) -> str:
        if self.unpinned:
            return self._other_certificate_text(why_not_trusted(reason))
        if reason.startswith(TLS_TROUBLE):
            what = f"the certificate {why_not_trusted(reason)}" if NOT_SIGNED in reason else reason
            advice = "--ca, --pin or --insecure if you know better"
            return f"{self.target} is not to be trusted: {what}; {advice}"
        return self.core.refusal or reason

    def _ask_user(self, reason: str) -> None:
        """Stop trying, and tell the user the choices; without a user, end."""
        why = f"{self.target}: {self.core.refusal or reason}"
        if not self.asks:
            return self._end(why)
        self.core.quitting = False
        self._enter(WAITING)
        self.show([View(NOTE, f"{why}; /reconnect tries again, /quit leaves")])
        self.status(why)

    def _come_back(self, reason: str) -> None:
        why = self.core.refusal or reason
        waited = self.loop.now - self.stood > self.patience
        if self.patience == 0 or waited:
            return self._end(f"{self.target}: {why}")
        wait = self.backoff * random.uniform(0.75, 1.25)  # so that not all come back at once
        self.backoff = min(BACKOFF_MOST, self.backoff * 2)
        self.core.quitting = False
        self._enter(WAITING)
        self.timer = self.again = self.loop.call_later(wait, self.start)
        self.status(f"{self.target}: {why}; trying again in {wait:.1f} s")

    REACTIONS = {
        WANTED_END: lambda self, reason: self._end(""),
        FATAL: _give_up,
        AGAIN: _dial_again,
        NEEDS_USER: _ask_user,
        TEMPORARY: _come_back,
    }

    def _fail(self, reason: str) -> None:
        """End the link for good."""
        self._end(reason)
        if self.conn:
            self.conn.drop(reason)

    def _end(self, reason: str) -> None:
        if not self.ended:
            self.phase = ENDED
            for timer in filter(None, (self.timer, self.again, self.pace, self.dismissal)):
                timer.cancel()
            if self.race:
                self.race.cancel()
            self.over(reason)


# ======================================================================================
# TRANSFERS
# ======================================================================================
# Files that a client sends and saves, beside the chat: each has connections of its own, and
# goes on from where a connection broke. Up by tus 1.0, down by ranges.


class Response(NamedTuple):
    """The status and headers of an answer to an HTTP request."""

    status: int
    headers: dict[str, list[str]]

    def header(self, name: str) -> str:
        return ", ".join(self.headers.get(name, ()))


class ResponseReader(HttpReader):
    """Bytes in, one HTTP answer out: a Response, pieces of its body, END_OF_BODY."""

    def __init__(self, bodiless: bool):
        super().__init__()
        self.bodiless = bodiless  # the answer to HEAD
        self.to_the_end = False  # of the connection

    def _head(self) -> Response | None:
        match = re.search(rb"\r?\n\r?\n", self.buffer[: self.limit + 4])
        if match is None:
            if len(self.buffer) > self.limit:
                raise BadRequest(431, "the answer has no end")
            return None
        head, self.start = self.buffer[: match.start()], self.start + match.end()
        first, *lines = [line.decode("latin-1").removesuffix("\r") for line in head.split(b"\n")]
        status = re.fullmatch(r"HTTP/1\.\d ([1-5]\d\d)(?: .*)?", first)
        headers: dict[str, list[str]] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise BadRequest(400, "this is no HTTP")
            headers.setdefault(name.strip().lower(), []).append(value.strip())
        if status is None:
            raise BadRequest(400, "this is no HTTP")
        if status[1] == "100":
            return self._head()
        self._expect_body(int(status[1]), headers)
        return Response(int(status[1]), headers)

    def _expect_body(self, status: int, headers: dict[str, list[str]]) -> None:
        length = headers.get("content-length", [""])[0]
        if self.bodiless or status in (204, 304) or length == "0":
            self.step = self._end
        elif "chunked" in headers.get("transfer-encoding", [""])[0].lower():
            self.chunked, self.step = True, self._size
        else:
            self.left = int(length) if re.fullmatch(r"\d{1,18}", length) else sys.maxsize
            self.to_the_end = self.left == sys.maxsize
            self.step = self._body

    def finish(self) -> None:
        if self.to_the_end:
            self.step = self._end
        super().finish()


class WebCall(Connection):
    """One HTTP request of a client, and its answer.

    `source(at)` returns the next piece of the request's body from a byte on, b"" at the end; it
    runs off the loop. `piece(data)` takes pieces of the answer's body; without it the body is
    collected. The end is done(response, body), or done(None, reason)."""

    hears_out = True

    def __init__(
        self, helpers: Helpers, sock: socket.socket, tls: Any, request: "CallRequest", trust: Trust
    ):
        super().__init__(helpers.loop, sock)
        self.helpers, self.request, self.trust = helpers, request, trust
        self.reader = ResponseReader(request.method == "HEAD")
        self.response: Response | None = None
        self.body = b""
        self.at = request.at  # of the body, to be read next
        self.reading = self.ended_well = self.holds = False
        self.heard = self.loop.now
        if tls:
            self.encrypt(tls)
        self.write(request.head())
        self.more()

    def secured(self) -> None:
        if not self.trust.accepts(self.tls.fingerprint()):
            self.drop("another certificate than that of the chat")

    def more(self) -> None:
        """Send the next piece of the body, when the one before it is nearly sent."""
        request = self.request
        if request.source is None or self.reading or self.unsent > FILE_PIECE_BYTES:
            return
        self.reading = True
        self.helpers.submit(self, functools.partial(request.source, self.at), self._read)

    def _read(self, piece: Any) -> None:
        self.reading = False
        if self.state != OPEN:
            return
        if isinstance(piece, Exception):
            return self.drop(str(piece))
        self.heard = self.loop.now
        if piece:
            self.at += len(piece)
            self.request.sent(self.at - self.unsent)
            self.write(piece)
            self.more()
        else:
            self.request = self.request._replace(source=None)

    def lagging(self) -> None:
        self.heard = self.loop.now
        if self.state == OPEN:
            self.more()

    def wants_read(self) -> bool:
        return not self.holds

    def received(self, data: bytes) -> None:
        self.heard = self.loop.now
        self.reader.feed(data)
        self._take()

    def _take(self) -> None:
        while not self.ended_well and (item := self.reader.take()) is not None:
            if isinstance(item, BadRequest):
                return self.drop(str(item))
            if isinstance(item, Response):
                self.response = item
                self.request.began(item)
            elif item == END_OF_BODY:
                self.ended_well = True
                self.drop("")
            elif self.request.piece and self.response.status in (200, 206):
                self.request.piece(item)
            else:
                self.body = (self.body + item)[:ANSWER_BYTES]

    def ended(self) -> None:
        self.reader.finish()
        self._take()
        if self.state == OPEN:
            self.drop("the server closed the connection")

    def lost(self, reason: str) -> None:
        if self.ended_well:
            return self.request.done(self.response, self.body.decode(errors="replace"))
        return self.request.done(None, reason)


class CallRequest(NamedTuple):
    """An HTTP request, and callbacks for its answer: see WebCall."""

    method: str
    url: "Url"
    headers: dict[str, str]
    done: Callable[[Response | None, str], None]
    source: Callable[[int], bytes] | None = None
    at: int = 0
    piece: Callable[[bytes], None] | None = None
    began: Callable[[Response], None] = do_nothing
    sent: Callable[[int], None] = do_nothing

    def head(self) -> bytes:
        lines = [f"{self.method} {self.url.path} HTTP/1.1", f"Host: {self.url.authority}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


class Url(NamedTuple):
    """The parts of an http or https URL."""

    tls: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        return address_text(self.host, self.port)


def parse_url(text: str, base: Url) -> Url:
    """Return the parts of a URL, or of a path on the server of `base`. Raises Unusable."""
    if text.startswith("/"):
        return base._replace(path=text)
    scheme, _, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    host, port = split_host(authority)
    if scheme.lower() not in ("http", "https") or not host or not re.fullmatch(r"[!-~]*", path):
        raise Unusable(f"{text} is no address of a file")
    tls = scheme.lower() == "https"
    return Url(tls, host, port or (443 if tls else 80), f"{slash or '/'}{path}")


def free_path(path: pathlib.Path) -> pathlib.Path:
    """Return this path, or one with a number, where no file is yet."""
    for number in itertools.count(2):
        if not path.exists() and not path.with_name(f"{path.name}.part").exists():
            return path
        stem = re.sub(r" \(\d+\)$", "", path.stem)
        path = path.with_name(f"{stem} ({number}){path.suffix}")
    raise Unusable("no name is free")  # never: the numbers have no end


def whole_bytes(text: str) -> int:
    """Return the number of bytes in a text; 0 if there is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0


class Transfers:
    """The files that one link sends and saves; a few at once, while the others wait."""

    def __init__(self, link: Link, folder: pathlib.Path):
        self.link, self.core, self.loop, self.folder = link, link.core, link.loop, folder
        self.calls: dict[str, WebCall | None] = {}  # by id of a transfer; None: not yet connected
        self.again: dict[str, float] = {}  # when to try again, and ...
        self.failures: collections.Counter[str] = collections.Counter()  # ... how often it failed
        self.core.start_transfer, self.core.end_transfer = self.start, self.end
        link.transfers = self
        self.watch()

    # Beginning and end

    def start(self, one: Transfer) -> None:
        """Add a transfer, which begins soon. Raises Refused if its file cannot be read."""
        if one.up:
            path = pathlib.Path(one.path).expanduser()
            try:
                if not path.is_file():
                    raise Refused("NO_FILE", f"{path} is no file")
                one.size = path.stat().st_size
                os.close(os.open(path, os.O_RDONLY))
            except OSError as error:
                raise Refused("NO_FILE", f"cannot read {path}: {reason_of(error)}") from None
            one.path, one.name = str(path.absolute()), one.name or file_name(path.name)
        else:
            path = pathlib.Path(one.path or one.name).expanduser()
            path = self.folder / path
            one.path = str(free_path(path / one.name if path.is_dir() else path))
            one.name = pathlib.Path(one.path).name
        self.core.keep_transfer(one)
        self.wake()

    def end(self, one: Transfer) -> None:
        """Stop a transfer, and drop what has come of it."""
        call = self.calls.pop(one.id, None)
        if call:
            call.drop("dropped")
        if not one.up:
            pathlib.Path(f"{one.path}.part").unlink(missing_ok=True)
        self.wake()

    def watch(self) -> None:
        """Check every second: begin waiting transfers, and drop connections without progress."""
        for call in [one for one in self.calls.values() if one]:
            if self.loop.now - call.heard > WAITING_SECONDS and call.state != CLOSED:
                call.drop("no answer")
        self.wake()
        self.loop.call_later(WATCH_SECONDS, self.watch)

    def wake(self) -> None:
        if not self.core.ready:
            return
        for one in self.core.transfers:
            due = self.loop.now >= self.again.get(one.id, 0.0) and one.state == "waiting"
            if due and one.id not in self.calls and len(self.calls) < TRANSFERS_AT_ONCE:
                self.calls[one.id] = None
                one.state, one.why = "running", ""
                self.core.with_token(functools.partial(self._run, one))

    def _run(self, one: Transfer, token: str) -> None:
        """Go on with a transfer; `token` is for uploads, or ""."""
        if one.id not in self.calls:
            return
        try:
            if not one.up:
                self._download(one)
            elif one.url:
                self._look(one, token)
            else:
                self._create(one, token)
        except (ChatError, OSError) as error:
            self._failed(one, str(error))

    # Talking to the server

    @property
    def base(self) -> Url:
        target = self.link.target
        return Url(target.tls, target.host, target.port, "/")

    def _call(self, one: Transfer, request: CallRequest) -> None:
        """Connect to the server of a request, and send the request."""
        url, link = request.url, self.link
        here = (url.host, url.port) == (link.target.host, link.target.port) and link.conn
        peer = peer_address(link.conn.sock) if here and link.conn.state == OPEN else None
        trust = link.trust._replace(pin=link.pin)

        def look_up() -> tuple[Any, list]:
            context = trust.context() if url.tls else None
            where = peer or (url.host, url.port)
            return context, socket.getaddrinfo(*where, type=socket.SOCK_STREAM)

        def found(result: Any) -> None:
            if isinstance(result, Exception):
                return request.done(None, str(result))
            context, addresses = result
            addresses = [(family, address) for family, *_, address in addresses]
            tried = functools.partial(connected, context)
            Race(self.loop, addresses, tried)
            return None

        def connected(context: Any, sock: socket.socket | None, reason: str) -> None:
            if sock is None:
                return request.done(None, reason)
            if one.id not in self.calls:
                return sock.close()
            tls = TlsFilter(context, url.host) if context else None
            self.calls[one.id] = WebCall(link.helpers, sock, tls, request, trust)
            return None

        link.helpers.submit(self, look_up, found)

    def _headers(self, token: str, **more: Any) -> dict[str, str]:
        headers = {name.replace("_", "-"): str(value) for name, value in more.items()}
        login = self.core.me.login
        if token:
            headers["Authorization"] = f"Bearer {token}"
        elif login:
            words = f"{login.account}:{login.password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(words).decode()}"
        return headers

    # Up

    def _create(self, one: Transfer, token: str) -> None:
        name = base64.b64encode(one.name.encode()).decode()
        known = {"Upload_Length": one.size, "Upload_Metadata": f"filename {name}"}
        headers = self._headers(token, Tus_Resumable="1.0.0", Content_Length=0, **known)
        url = parse_url(self.core.file_host, self.base)

        def created(response: Response | None, text: str) -> None:
            if response is None or response.status >= 500:
                return self._broke(one, text)
            if response.status != 201:
                return self._refused(one, response, text)
            one.url = response.header("location")
            self.core.keep_transfer(one)
            return self._send_from(one, token, 0) if one.size else self._sent(one)

        self._call(one, CallRequest("POST", url, headers, created))

    def _look(self, one: Transfer, token: str) -> None:
        """Ask the server how many bytes of an upload it has."""
        headers = self._headers(token, Tus_Resumable="1.0.0")

        def told(response: Response | None, text: str) -> None:
            if response is None or response.status >= 500:
                return self._broke(one, text)
            if response.status in (403, 404):  # the upload expired, or is another guest's
                one.url = ""
                return self._create(one, token)
            if response.status != 200:
                return self._refused(one, response, text)
            return self._send_from(one, token, whole_bytes(response.header("upload-offset")))

        url = self._own_url(one)
        self._call(one, CallRequest("HEAD", url, headers, told))

    def _own_url(self, one: Transfer) -> Url:
        """Return the URL of a file: on this server, under the address that the client uses."""
        url = parse_url(one.url, self.base)
        ours = self.core.server.ours and FILE_LINK.fullmatch(url.path)
        return self.base._replace(path=url.path) if ours else url

    def _send_from(self, one: Transfer, token: str, at: int) -> None:
        if at >= one.size:
            return self._sent(one)
        piece = {"Content_Type": PIECE_TYPE, "Content_Length": one.size - at}
        headers = self._headers(token, Tus_Resumable="1.0.0", Upload_Offset=at, **piece)

        def read(where: int) -> bytes:
            with open(one.path, "rb") as file:
                file.seek(where)
                data = file.read(FILE_PIECE_BYTES)
            if len(data) < min(FILE_PIECE_BYTES, one.size - where):
                raise OSError(f"{one.path} is shorter than it was")
            return data[: one.size - where]

        def sent(done: int) -> None:
            one.done = max(at, done)

        def answered(response: Response | None, text: str) -> None:
            if response is None or response.status >= 500 and response.status != 507:
                return self._broke(one, text)
            if response.status in (204, 409):
                self.failures.pop(one.id, None)
                return self._send_from(one, token, whole_bytes(response.header("upload-offset")))
            return self._refused(one, response, text)

        one.done = at
        request = CallRequest("PATCH", self._own_url(one), headers, answered, read, at, sent=sent)
        self._call(one, request)
        return None

    def _sent(self, one: Transfer) -> None:
        """Post the link of a complete upload."""
        self.core.post_file(one)
        self._over(one)

    # Down

    def _download(self, one: Transfer) -> None:
        part = pathlib.Path(f"{one.path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        at = part.stat().st_size if part.exists() else 0
        one.done = at
        headers = {"Range": f"bytes={at}-", "If-Range": one.etag} if at and one.etag else {}
        pieces: collections.deque[bytes] = collections.deque()
        file = open(part, "ab")  # noqa: SIM115 -- closed by close()

        def write() -> None:
            while pieces:
                file.write(pieces.popleft())

        def began(response: Response) -> None:
            if response.status == 200:  # all of it, from the beginning
                file.truncate(0)
                one.done = 0
            whole = response.header("content-range").rpartition("/")[2]
            one.size = whole_bytes(whole or response.header("content-length"))
            one.etag = response.header("etag")
            self.core.keep_transfer(one)

        def piece(data: bytes) -> None:
            pieces.append(data)
            one.done += len(data)
            call = self.calls.get(one.id)
            if call:
                call.holds = True
                call.update()
                self.link.helpers.submit(self, write, functools.partial(written, call))

        def written(call: WebCall, result: Any) -> None:
            call.holds = False
            call.update()
            if isinstance(result, Exception):
                call.drop(str(result))
                self._failed(one, str(result))

        def done(response: Response | None, text: str) -> None:
            self.link.helpers.submit(self, close, functools.partial(closed, response, text))

        def close() -> None:
            write()
            file.close()

        def closed(response: Response | None, text: str, result: Any) -> None:
            if isinstance(result, Exception):
                return self._failed(one, str(result))
            if response and response.status == 416 and one.size == one.done:
                return self._saved(one, part)
            if response and response.status not in (200, 206):
                return self._refused(one, response, text)
            if response is None or one.done < one.size:
                return self._broke(one, text or "the connection broke")
            return self._saved(one, part)

        url = self._own_url(one)
        self._call(one, CallRequest("GET", url, headers, done, piece=piece, began=began))

    def _saved(self, one: Transfer, part: pathlib.Path) -> None:
        part.replace(one.path)
        self._over(one)
        self.link.show([View(NOTE, f"saved {one.path} ({size_text(one.size)})", where=one.room)])

    def fetch(self, path: str, most: int, then: Callable[[bytes], None]) -> None:
        """Call then(content) of a file of this server with at most so many bytes; then(b"") if that
        fails."""
        one, pieces = Transfer(f"fetched {secrets.token_hex(8)}", False, "", ""), []

        def piece(data: bytes) -> None:
            pieces.append(data)
            if sum(map(len, pieces)) > most:
                self.calls[one.id].drop("it is longer than was said")

        def done(response: Response | None, text: str) -> None:
            self.calls.pop(one.id, None)
            fine = response is not None and response.status == 200
            then(b"".join(pieces) if fine else b"")

        self.calls[one.id] = None
        url = self.base._replace(path=path)
        self._call(one, CallRequest("GET", url, {}, done, piece=piece))

    # Results

    def _over(self, one: Transfer) -> None:
        self.calls.pop(one.id, None)
        self.failures.pop(one.id, None)
        self.core.forget_transfer(one)
        self.link.poke()
        self.wake()

    def _broke(self, one: Transfer, why: str) -> None:
        """Wait before the next attempt, longer each time."""
        if self.calls.pop(one.id, self) is self:
            return
        self.failures[one.id] += 1
        wait = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** self.failures[one.id])
        self.again[one.id] = self.loop.now + wait
        one.state, one.why = "waiting", why
        self.link.show([View(TRANSFER, where=one.room, own_id=one.id)])

    def _refused(self, one: Transfer, response: Response, text: str) -> None:
        if response.status == 401 and self.failures[one.id] < 2:  # the token has ended
            self.core.upload_token = ""
            return self._broke(one, text.strip())
        return self._failed(one, text.strip() or f"the server says {response.status}")

    def _failed(self, one: Transfer, why: str) -> None:
        if self.calls.pop(one.id, self) is self:
            return
        one.state, one.why = "failed", why
        self.core.forget_transfer(one)
        verb = "sent" if one.up else "saved"
        self.link.show([View(NOTE, f"{one.name} was not {verb}: {why}", where=one.room)])
        self.wake()


# ======================================================================================
# TERMINAL
# ======================================================================================
# Keys in, a line out, and a picture of it between. All of it is pure but RawTerminal at
# the end. To add a key, give its bytes a name in KEY_NAMES and the name a method in
# LineEditor.KEYS. The sequences are those of xterm, which every terminal imitates.
#
# On the screen is one conversation, which scrolls as terminals do, and below it are two
# rows: the status, and the line being typed. New text is written over them, and they
# are drawn again below it, in one write. Lines are left whole, for the terminal to wrap, so
# that they can be copied.


class Key(NamedTuple):
    """A pressed key. "text" and "paste" carry text; other keys have only a name."""

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
    "\x12": "search",
    "\x1f": "undo",
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
    r"|\x1b[\]P_^X][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC, DCS, APC ...: answers of a terminal
    r"|\x1b[^\[O\]P_^X\x1b]"  # Alt and a key
    r"|\x1b(?=\x1b.)"  # ESC, and then a sequence of its own
)
STRING_BEGINS = ("\x1b]", "\x1bP", "\x1b_", "\x1b^", "\x1bX")  # of such answers
STRING_MOST = 4096  # characters of one: what is longer is none
LATE_SEQUENCE = (
    r"\[[0-9;]*[A-Za-z~]|O[A-Z]\Z|\][0-9]|P[0-9>+$]|_G"  # what an ESC may still belong to
)
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"


def is_typed(c: str) -> bool:
    """Return whether a character is text, and not a key."""
    new_emoji = "\U0001f000" <= c <= "\U0001faff"  # perhaps newer than Python's tables
    return c.isprintable() or c in (ZWNJ, ZWJ) or new_emoji or unicodedata.category(c) == "Zs"


class KeyDecoder:
    """Bytes from a terminal in, keys out. An incomplete sequence waits for more bytes."""

    def __init__(self) -> None:
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.rest = ""
        self.pasted: str | None = None  # what of a paste has come so far
        self.escaped = -math.inf  # when a lone ESC was taken for a key

    def feed(self, data: bytes, now: float = 0.0) -> list[Key]:
        """Return the keys in these bytes, which came at time `now`, in seconds."""
        text = self.decode(data)
        late = now - self.escaped < ESCAPE_LATE_SECONDS and re.match(LATE_SEQUENCE, text)
        self.escaped = -math.inf
        self.rest += f"\x1b{text}" if late else text
        keys = []
        while self.rest and (key := self._next()):
            keys.append(key)
        return [key for key in keys if key.name]

    def flush(self, now: float = 0.0) -> list[Key]:
        """Return the keys that are left when no more bytes come: the rest was no sequence."""
        if self.pasted is not None:
            return []  # slow, but its end is still to come
        if self.rest.startswith(STRING_BEGINS) and len(self.rest) < STRING_MOST:
            return []  # the answer of a terminal, likewise
        text, self.rest = self.rest, ""
        if text and not text.strip("\x1b"):  # ESC, or ESC ESC
            text, self.escaped = "\x1b", now
        return [Key(KEY_NAMES.get(text, ""))] if text in KEY_NAMES else []

    def end_paste(self) -> list[Key]:
        """Return a paste whose end was lost. The rest of a terminal's answer is dropped."""
        if self.pasted is None:
            self.rest = ""
            return []
        self.rest = PASTE_ENDS
        return [key for key in [self._paste()] if key]

    def _next(self) -> Key | None:
        """Take one key off `rest`, with an empty name if it has no meaning; None if incomplete."""
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
        if len(sequence) == 2 and sequence not in KEY_NAMES and is_typed(sequence[1]):
            sequence = "\x1b"  # ESC, and then a character, typed quickly
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


CLUSTER_CHARACTERS = 64  # none is longer, or it does not matter how it is cut


def first_cluster(text: str) -> str:
    return "".join(clusters(text[:CLUSTER_CHARACTERS])[:1])


def last_cluster(text: str) -> str:
    return "".join(clusters(text[-CLUSTER_CHARACTERS:])[-1:])


WORD = re.compile(r"\W*\w*")
SECRETS = (
    "/pass ",
    "/oper ",
    "/register ",
    "/login ",
    "/passwd ",
    "/drop ",
)  # commands whose parameters are secret


def first_word(text: str) -> str:
    """Return the first word, with the blanks before it."""
    return WORD.match(text).group()


def last_word(text: str) -> str:
    """Return the last word, with the blanks after it."""
    return first_word(text[::-1])[::-1]


def is_secret(text: str) -> bool:
    return text.lower().startswith(SECRETS)


class LineEditor:
    """The line being typed: the text before the cursor and the text after it.

    press(key) changes the line; it returns the line if the key entered it. `complete` offers
    completions: complete(word, at the start of the line) -> candidates."""

    def __init__(self, complete: Callable[[str, bool], list[str]] = lambda word, first: []):
        self.before = self.after = ""
        self.complete = complete
        self.killed = ""  # for yank
        self.undone: collections.deque[tuple[str, str]] = collections.deque(maxlen=TYPED_KEPT)
        self.sought: str | None = None  # what Ctrl-R looks for in earlier lines
        self.typed: collections.deque[str] = collections.deque(maxlen=TYPED_KEPT)
        self.recalled = 0  # how many lines back we are; 0 is the line being typed
        self.draft = ""  # which is kept here meanwhile
        self.offers: list[str] = []  # of a completion under way, the next one first
        self.left = False  # end of input was pressed on an empty line
        self.refused = ""  # why something was not taken, until it is told

    @property
    def text(self) -> str:
        return self.before + self.after

    def set(self, text: str) -> None:
        self.before, self.after = text, ""

    def insert(self, text: str) -> None:
        """Insert a text, or none of it if that would be too long: see `refused`."""
        if len(text) + len(self.text) > TYPED_MOST:
            self.refused = f"that is too long to be typed: more than {TYPED_MOST:,} characters"
            return
        self.before += text

    def press(self, key: Key) -> str | None:
        if key.name not in ("tab", "back-tab"):
            self.offers = []
        if key.name == "text" and self.sought is not None and not self.draft:
            self.sought += key.text  # Ctrl-R on an empty line: what is typed now is looked for
            self.recalled = 0
            return self._search()
        if key.name != "search":
            self.sought = None
        if key.name not in ("undo", "enter", "left", "right", "home", "end"):
            self.undone.append((self.before, self.after))
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
        self.undone.clear()  # it may have been a password
        return text

    def take(self) -> str:
        """Empty the line and return what was being typed, not a line recalled over it."""
        text = self.draft if self.recalled else self.text
        self.recalled, self.draft, self.sought, self.offers = 0, "", None, []
        self.undone.clear()
        self.set("")
        return text

    def forget(self) -> None:
        """Empty the line; Up brings the text back."""
        if not is_secret(self.text):
            self.remember(self.text)
        self.recalled, self.sought, self.draft = 0, None, ""
        self.set("")

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

    def _search(self) -> None:
        """Recall the last earlier line that contains the typed text; again: the one before that."""
        if self.sought is None:
            self.sought, self.draft, self.recalled = self.text, self.text, 0
            if not self.text:
                return None
        for back in range(self.recalled + 1, len(self.typed) + 1):
            if fold(self.sought) in fold(self.typed[-back]):
                self.recalled = back
                return self.set(self.typed[-back])
        if not self.recalled and not self.draft:
            self.set("")  # Return must not send the match of a shorter text
        return None

    def _undo(self) -> None:
        while self.undone:
            before, after = self.undone.pop()
            if before + after != self.text:
                self.before, self.after = before, after
                return

    # Completion

    def _tab(self) -> None:
        self._offer(1)

    def _back_tab(self) -> None:
        self._offer(-1)

    def _offer(self, step: int) -> None:
        """Replace the word, or the candidate in its place, by the next candidate."""
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
        "search": _search,
        "undo": _undo,
        "tab": _tab,
        "back-tab": _back_tab,
    }


# Text on its way to a screen

RESET = "\x1b[0m"
COLOUR = re.compile(r"(\x1b\[[\d;]*m)")  # the only escape sequences in a line of ours


def fitting(parts: Iterable[str], room: int) -> tuple[list[str], int]:
    """Return as many of these clusters as fit, and the columns they take."""
    chosen, used = [], 0
    for part in parts:
        if used + cluster_width(part) > room:
            break
        chosen.append(part)
        used += cluster_width(part)
    return chosen, used


def cut_to(text: str, columns: int) -> str:
    """Return a text cut to so many columns, with a mark at the end if it was cut."""
    if width(text) <= columns or columns <= 0:
        return text * (columns > 0)
    return "".join(fitting(clusters(text), columns - 1)[0]) + "\u2026"


def coloured(line: str) -> Iterator[tuple[str, str, str]]:
    """Yield the pieces of a line: the escape sequence before each, the text, and its colour."""
    colour = escape = ""
    for n, part in enumerate(COLOUR.split(line)):
        if n % 2:
            escape, colour = part, "" if part == RESET else colour + part
        else:
            yield escape, part, colour


def rows_of(line: str, columns: int) -> list[str]:
    """Return a line as a terminal wraps it. A row that begins inside a colour starts with it."""
    rows, row, used = [], "", 0
    for escape, text, colour in coloured(line):
        row += escape
        for cluster in clusters(text):
            if used + cluster_width(cluster) > columns:
                rows.append(row + RESET * bool(colour))
                row, used = colour, 0
            row += cluster
            used += cluster_width(cluster)
    return [*rows, row]


def wrapped_rows(line: str, columns: int, hang: int) -> list[str]:
    """Return a line as rows that end between words, the later ones indented. A word that is longer
    than a row (a link) is left whole for the terminal to wrap, so that it can be copied."""
    if width(COLOUR.sub("", line)) <= columns:
        return [line]
    rows, row, used = [], "", 0
    for escape, text, colour in coloured(line):
        row += escape
        for word in re.findall(r"\s*\S+|\s+", text):
            size = width(word)
            if used + size > columns and used > hang and word[:1].isspace():
                rows.append(row + RESET * bool(colour))
                word = word.lstrip()
                row, used, size = " " * hang + colour, hang, width(word)
            row += word
            used += size
    return [*rows, row]


def in_columns(words: list[str], columns: int) -> list[str]:
    """Return words as rows of columns, to be read downwards, in as few rows as fit."""
    across = max(map(width, words), default=0) + 2
    count = max(1, (columns + 2) // across)
    height = math.ceil(len(words) / count)
    rows = (words[n::height] for n in range(height))
    return ["".join(word + " " * (across - width(word)) for word in row).rstrip() for row in rows]


def beside(left: str, right: str, columns: int) -> list[str]:
    """Return a term and its explanation, side by side or one below the other."""
    wide = columns >= BESIDE_COLUMNS
    indent = " " * (columns // 3 if wide else 4)
    rows = textwrap.wrap(right, columns - 1, initial_indent=indent, subsequent_indent=indent)
    if wide and width(left) + 2 <= len(indent):
        rows[0] = left + rows[0][width(left) :]
        return rows
    return [left, *rows]


class Palette:
    """Colours as escape sequences; without colours, empty ones."""

    NAMES = (31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96)  # legible on dark and on light

    def __init__(self, on: bool):
        self.on = on

    def paint(self, text: str, *codes: int) -> str:
        if not (self.on and text and codes):
            return text
        return f"\x1b[{';'.join(map(str, codes))}m{text}{RESET}"

    def name(self, name: str) -> str:
        """Return a person's name in that person's colour, which is the same on every screen."""
        return self.paint(name, self.NAMES[zlib.crc32(fold(name).encode()) % len(self.NAMES)])

    def dim(self, text: str) -> str:
        return self.paint(text, 2)

    def loud(self, text: str) -> str:
        return self.paint(text, 1, 31)


# Views as lines


class Look(NamedTuple):
    """The settings that decide how a line looks."""

    palette: Palette
    columns: int = 80
    here: str = ""  # the conversation that it is shown in
    clock: str = "%H:%M"  # how times are shown
    answered: Callable[[View], str] = lambda view: ""  # what a message answers, in words


def moment_of(view: View) -> datetime.datetime:
    """Return the local time of a view; now, if the view's time is in no calendar."""
    try:
        return datetime.datetime.fromtimestamp(view.time / 1000)
    except (TypeError, ValueError, OverflowError, OSError):  # no calendar has such a time
        return datetime.datetime.now()


def clock_of(view: View, look: Look) -> str:
    return inert(moment_of(view).strftime(look.clock))


def where_of(view: View, look: Look) -> str:
    """Return the view's conversation as a prefix; "" if it is the one that is looked at."""
    if fold(view.where) in ("", fold(look.here)):
        return ""
    return f"[{view.where}] " if is_channel(view.where) else f"({view.where}) "


def said_lines(view: View, look: Look) -> list[str]:
    """Return the lines of a message. Lines after the first are indented below its text."""
    palette, clock, where = look.palette, f"{clock_of(view, look)} ", where_of(view, look)
    loud = view.called and is_channel(view.where)  # in a private talk everything is for us
    mark = "! " * loud
    first, *others = (palette.paint(line, *[1] * loud) for line in view.text.split("\n"))
    head = palette.dim(clock + where) + palette.loud(mark) + palette.name(view.name)
    indent = " " * min(width(f"{clock}{where}{mark}{view.name}: "), look.columns // 3)
    lines = [f"{head}: {first}", *(indent + line for line in others)]
    if view.reply and (words := visible(look.answered(view))):
        told = cut_to(f"answers {words}", look.columns - width(clock) - 1)
        lines.insert(0, palette.dim(" " * width(clock) + told))
    if file := parse_file_tag(view.file):
        lines.append(palette.dim(f"{indent}[{file.words()}; /save stores it]"))
    return lines


def noticed_lines(view: View, look: Look) -> list[str]:
    """Return the lines of a NOTICE: those of a message, with - around the name."""
    head = look.palette.dim(f"{clock_of(view, look)} {where_of(view, look)}")
    first, *others = view.text.split("\n")
    return [f"{head}-{look.palette.name(view.name)}- {first}", *(f"    {line}" for line in others)]


def found_lines(view: View, look: Look) -> list[str]:
    """Return the lines of a message of the past that the user asked for; it does not look live."""
    when = f"{moment_of(view):%Y-%m-%d %H:%M}"
    first, *others = (look.palette.dim(line) for line in view.text.split("\n"))
    head = look.palette.dim(f"\u2502 {when} {where_of(view, look)}") + look.palette.name(view.name)
    return [f"{head}{look.palette.dim(':')} {first}", *(f"\u2502   {line}" for line in others)]


def moved_lines(view: View, look: Look) -> list[str]:
    verb = "joined" if view.kind == CAME else "left"
    why = "" if view.text in ("", "Quit") else f" ({view.text})"
    where = "" if fold(view.where) in ("", fold(look.here)) else f" {view.where}"
    return [look.palette.dim(f"{clock_of(view, look)} {view.name} {verb}{where}{why}")]


def several_moved_lines(view: View, look: Look) -> list[str]:
    where = "" if fold(view.where) in ("", fold(look.here)) else f"{view.where}: "
    return [look.palette.dim(f"{clock_of(view, look)} {where}{view.text}")]


EXPLAINED = re.compile(r"(/\S.*?|\S.*?:) {2,}(\S.*)")  # a command or a key, and what it does


def told_lines(view: View, look: Look) -> list[str]:
    if match := EXPLAINED.fullmatch(view.text):
        return beside(*match.groups(), look.columns)
    first, *others = view.text.split("\n")
    head = look.palette.dim(f"{clock_of(view, look)} {where_of(view, look)}{first}")
    return [head, *(look.palette.dim(f"  {line}") for line in others)]


def page_lines(view: View, look: Look) -> list[str]:
    match = EXPLAINED.fullmatch(view.text)
    return beside(*match.groups(), look.columns) if match else [view.text]


def failed_lines(view: View, look: Look) -> list[str]:
    clock = look.palette.dim(f"{clock_of(view, look)} {where_of(view, look)}")
    first, *others = view.text.split("\n")
    return [clock + look.palette.loud(f"FAILED: {first}"), *(f"  {line}" for line in others)]


def people_lines(view: View, look: Look) -> list[str]:
    """Return the list of a channel's members, those with a rank first."""
    names = view.text.split(", ")
    names.sort(key=lambda name: (name[:1] not in SYMBOLS.values(), fold(name)))
    head = look.palette.dim(f"{clock_of(view, look)} {len(names):,} in {view.where}")
    return [head, *(f"  {row}" for row in in_columns(names, look.columns - 3))]


LINES = {  # how each kind of view looks
    SAID: said_lines,
    NOTICED: noticed_lines,
    FOUND: found_lines,
    CAME: moved_lines,
    WENT: moved_lines,
    MOVED: several_moved_lines,
    TOLD: told_lines,
    NOTE: told_lines,
    FAILED: failed_lines,
    PEOPLE: people_lines,
    PAGE: page_lines,
}


def view_lines(view: View, look: Look) -> list[str]:
    """Return a view as lines for a terminal. Text from elsewhere is made inert here once more: the
    only escape sequences in a line are those of our palette."""
    text, name, where = inert(view.text), visible(view.name), visible(view.where)
    view = view._replace(text=text, name=name, where=where)
    return LINES[view.kind](view, look)


def dated_lines(before: View | None, view: View, look: Look) -> list[str]:
    """Return a view as lines, below the day if the view before is of another day."""
    lines, day = view_lines(view, look), moment_of(view)
    known = moment_of(before) if before else datetime.datetime.now()
    if day.date() != known.date():
        lines.insert(0, look.palette.dim(f"\u2500\u2500 {day:%A}, {day.day} {day:%B %Y}"))
    return lines


def place_lines(room: Room, look: Look, server: str = "") -> list[str]:
    """Return the title of a conversation, for the top of a redrawn screen."""
    topic = visible(f": {room.topic}" if room.topic else "")
    title = visible(room.name) if room.is_channel else f"with {visible(room.name)}"
    title += f" on {visible(server)}" if server else ""
    return [look.palette.paint(f"\u2500\u2500 {title}", 1) + topic] if room.name else []


def room_marks(
    rooms: Iterable[Room], here: Room, besides: Iterable[tuple[str, Room]] = ()
) -> list[tuple[str, tuple[int, ...]]]:
    """Return marks of the other conversations with new messages, those for the user first.
    `besides` are those of other servers, which are named if two conversations have one name."""
    placed = [*(("", room) for room in rooms), *besides]
    names = collections.Counter(room.name for _, room in placed)
    new = [(server, room) for server, room in placed if room.unread and room is not here]
    new.sort(key=lambda place: not place[1].called)
    marks = []
    for server, room in new:
        name = cut_to(visible(room.name), MARK_COLUMNS)
        if server and names[room.name] > 1:
            name = f"{cut_to(server, MARK_COLUMNS)}/{name}"
        colours = (1, 31) if room.called else (36,)
        marks.append((f"{name}:{room.unread}{'!' * bool(room.called)}", colours))
    return marks


def status_row(parts: list[tuple[str, tuple[int, ...]]], columns: int, palette: Palette) -> str:
    """Return the row between messages and input: as many of the parts as fit, the most important
    ones first, and a line to the margin."""
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
    """Draws the two rows at the bottom: the status, and as much of the typed line as fits. They are
    erased before new text. Everything is text to be written at once. The rows are cleared singly,
    as some terminals move into their history what one sequence (ED) clears below the cursor."""

    def __init__(self, columns: int, rows: int = 24):
        self.columns, self.rows = columns, rows
        self.drawn = False  # the two rows are there

    def row(self, prompt: str, before: str, after: str) -> str:
        """Return the row of the typed line, from the left margin on; the cursor ends in its place.
        The cursor's column is set by number and not by counting back, so that a terminal which
        disagrees about a width spoils the look and nothing else."""
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
        """Return the text that clears the two rows at the bottom, from the typed line upwards."""
        up, self.drawn = "\x1b[A\r\x1b[K" if self.drawn else "", False
        return f"\r\x1b[K{up}"

    def bottom(self, status: str, row: str) -> str:
        """Return the two rows, with wrapping off: a terminal may think them wider than we do."""
        self.drawn = True
        return f"\x1b[?7l{status}\r\n{row}\x1b[?7h"

    def clear(self) -> str:
        """Return the text for an empty screen with the cursor at the top."""
        self.drawn = False
        return "\x1b[H" + "\x1b[K\n" * (self.rows - 1) + "\x1b[K\x1b[H"

    def page(self, rows: list[tuple[str, bool]]) -> str:
        """Return a screen of rows, each given with whether it continues the one above. The terminal
        wraps such rows itself, and so copies them as one line."""
        shown = (
            row if goes_on and n else f"\x1b[{n + 1}H{row}" for n, (row, goes_on) in enumerate(rows)
        )
        return f"\x1b[H\x1b[J{''.join(shown)}\x1b[{self.rows - 1}H"


class Reader:
    """The part of a conversation that is on the screen.

    Views are numbered from 1 in order of arrival. Live, all up to number `shown` have been printed.
    A user who reads back sees a page instead: the last view on the page is number `end`, and `cut`
    rows of that view are below the page."""

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
        """The number before that of the oldest view kept."""
        return self.total - len(self.room.views)

    @property
    def below(self) -> int:
        """The number of views that came while a page is read."""
        return self.total - self.shown

    def lines(self, number: int) -> list[str]:
        place = number - self.first - 1
        before = self.room.views[place - 1] if place else None
        lines = dated_lines(before, self.room.views[place], self.look)
        new = [self.look.palette.paint("\u2500\u2500 new", 36)] if number == self.mark else []
        columns = self.look.columns
        hang = min(HANGING, columns // 3)
        return new + [row for line in lines for row in wrapped_rows(line, columns, hang)]

    def mark_unread(self, count: int) -> None:
        """Mark the last `count` messages as new to the user."""
        for number in range(self.total, self.first if count else self.total, -1):
            view = self.room.views[number - self.first - 1]
            count -= view.kind == SAID and not (view.mine or view.past)
            if not count:
                self.mark = number
                return

    def moment(self) -> datetime.datetime:
        """Return the time of the last view on the page."""
        views = self.room.views
        return moment_of(views[self.end - self.first - 1] if views else View(NOTE))

    def rows(self, number: int) -> list[tuple[str, bool]]:
        """Return the rows of a view as wrapped, each with whether it continues the one above."""
        return [
            (row, n > 0)
            for line in self.lines(number)
            for n, row in enumerate(rows_of(line, self.look.columns))
        ]

    # Live

    def screenful(self, since: int = 0, taken: int = 1) -> tuple[list[str], int]:
        """Return the last lines of the views after number `since`, and the number of the first such
        view. They are as many as fit below `taken` rows, but at least one."""
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
        """Return the lines since the last call. If there are too many to show, return the number of
        missing ones and the last screenful."""
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
        """Scroll towards the past; at the top the rest is owed until older messages come."""
        if not self.back:
            self.back, self.end, self.cut = True, self.total, 0
            self.room.views.reading = True
        before = self.end, self.cut
        self.cut += rows
        while self.end > self.first + 1 and self.cut >= (tall := len(self.rows(self.end))):
            self.end, self.cut = self.end - 1, self.cut - tall
        missing = max(0, self.height - self._above())
        self._down(missing)
        self.at_top = missing > 0
        self.owed = rows if (self.end, self.cut) == before else 0

    def down(self, rows: int) -> None:
        """Scroll towards the present, where reading back ends."""
        self.at_top, self.owed = False, 0
        self._down(rows)
        self.back = self.end < self.total or self.cut > 0
        self.room.views.reading = self.back

    def came_older(self) -> None:
        self.at_top = False
        if self.back and self.owed:
            self.up(self.owed)

    def page(self) -> list[tuple[str, bool]]:
        """Return the rows of the page, as rows() has them."""
        self.end = max(self.end, min(self.total, self.first + 1))  # the oldest may be gone
        rows: list[tuple[str, bool]] = []
        for number in range(self.end, self.first, -1):
            rows = self.rows(number) + rows
            if len(rows) - self.cut >= self.height:
                break
        return rows[: len(rows) - self.cut][-self.height :]

    def _above(self) -> int:
        """Return the number of rows from the page's bottom upwards, at most a page and a view."""
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


TOPICS_COMPLETED = {
    "/set": sorted(SETTINGS),
    "/help": [*HELP_TOPICS, *sorted(client_command)],
}
GO_COMMANDS = ("/go", "/part", "/names", "/history")  # are followed by a conversation


def complete_line(core: ClientCore, before: str, word: str) -> list[str]:
    """Return completions of the last word of a line. The users who spoke last come first; after a
    command, users of other conversations follow."""
    rooms = [room.name for room in core.rooms.values()]
    command, first = before.split(" ")[0].lower(), word == before
    if command in GO_COMMANDS and not first:
        key = fold(word).lstrip("#")
        return [name for name in rooms if fold(name).lstrip("#").startswith(key)]
    if command in TOPICS_COMPLETED and not first:
        return [f"{one} " for one in TOPICS_COMPLETED[command] if one.startswith(word)]
    near = [core.room] if core.room else []
    near += core.rooms.values() if command[:1] == "/" else []
    names = dict.fromkeys(n for room in near for n in (*reversed(room.people), room.name))
    names.pop(core.name, None)
    return completions(word, first, (name for name in names if not is_channel(name)), rooms)


def typing_text(names: Iterable[str]) -> str:
    """Return a sentence with the users who are typing; "" if no other user is."""
    first, *rest = [*names, ""]
    others = optional(*rest)
    if not first:
        return ""
    if not others:
        return f"{first} is typing"
    return f"{first} and {others[0] if len(others) == 1 else f'{len(others)} others'} are typing"


def notification(how: str, view: View) -> str:
    """Return the escape sequence of a desktop notification: OSC 9 (iTerm2), or 777 (urxvt)."""
    text = visible(cut(f"{view.name}: {view.text}", FITS_ALWAYS)).replace(";", ",")
    return {"9": f"\x1b]9;{text}\a", "777": f"\x1b]777;notify;chat.py;{text}\a"}.get(how, "")


class Display:
    """The screen of a client core, as text to be written.

    Live, a conversation scrolls on the terminal's own screen, above two rows. Pages for reading
    back are on the terminal's other buffer, so that the terminal's own scrollback stays a plain
    log."""

    def __init__(self, core: ClientCore, palette: Palette, columns: int = 80, rows: int = 24):
        self.core, self.palette = core, palette
        self.painter = Painter(columns, rows)
        self.nowhere = Room("")  # what is told while no conversation is looked at
        self.reader = self._read()
        self.whole = False  # the screen has to be redrawn ...
        self.cleared = False  # ... or emptied: what was said is above
        self.bell = False
        self.notice = ""  # for the desktop, as an escape sequence
        self.server = ""  # which it is, if there are several
        self.elsewhere: Callable[[], Iterable[tuple[str, Room]]] = list  # on the other servers
        self.fetching = False  # what is older than all that is here
        self.paged = False  # the other buffer is shown ...
        self.was_drawn = False  # ... and whether the two rows are there on the first
        self.seen: Any = None  # what was written last, and need not be again

    @property
    def room(self) -> Room:
        return self.core.room or self.nowhere

    def _read(self) -> Reader:
        look = Look(self.palette, self.painter.columns, clock=self.core.setting("time"))
        look = look._replace(answered=self.core.answered_words)
        return Reader(self.room, look, self.painter.rows - 2)

    # What there is to show

    def take(self, views: Iterable[View]) -> None:
        for view in views:
            if view.called and not (view.past or view.mine or self._is_muted(view)):
                self.bell |= self.core.setting("bell") == "on"
                self.notice = notification(self.core.setting("notify"), view)
            if handler := self.TAKEN.get(view.kind):
                handler(self, view)

    def _is_muted(self, view: View) -> bool:
        room = self.core.find(view.where)
        return room is not None and room.muted

    def keep(self, view: View, room: Room | None = None) -> None:
        """Add a view to its conversation, unless the core has added it."""
        room = room or self.core.find(view.where) or self.room
        if view.kind in (CAME, WENT) and any(one is view for one in reversed(room.moves)):
            return  # they will be one row
        if not view.where or not any(one is view for one in reversed(room.views)):
            room.views.append(self.core.timed(view))

    def _take_said(self, view: View) -> None:
        """Show here a message without a conversation, and tell here what the user says elsewhere.
        The core keeps all other messages."""
        room = self.core.find(view.where)
        if not view.where:
            self.keep(view, self.room)
        elif view.mine and view.own_id and not view.id and room is not self.room:
            self.keep(View(TOLD, f"you to {view.where}: {view.text}"), self.room)

    def _take_found(self, view: View) -> None:
        self.keep(view, self.room)

    def _take_removed(self, view: View) -> None:
        """Redraw without the message, and without lines that quote it."""
        room = self.core.find(view.where)
        if room and view.id:
            room.drop(lambda one: one.kind == TOLD and one.reply == view.id)
        self.whole |= self.reader.room is room

    def _take_cleared(self, view: View) -> None:
        self.reader.shown = self.reader.total
        self.cleared = True

    def _take_reacted(self, view: View) -> None:
        """Show a reaction in words."""
        known = visible(self.core.answered_words(view._replace(reply=view.id)))
        verb = "reacted" if view.number > 0 else "takes back"
        text = f"{view.name} {verb} {view.text} to {cut(known, REACTED_BYTES)}"
        self.keep(View(TOLD, text, where=view.where, reply=view.id))

    def _take_failed(self, view: View) -> None:
        """Show a failure in its conversation, and in the one that is looked at."""
        self.keep(view)
        if self.core.find(view.where) not in (None, self.room):
            self.keep(view, self.room)

    def _take_people(self, view: View) -> None:
        if view.text:
            rows = "\n".join(people_lines(view, Look(Palette(False), self.painter.columns)))
            self._take_page(View(PAGE, rows, f"{view.where} members"))

    def _take_page(self, view: View) -> None:
        """Show a text on the other buffer, from its beginning."""
        room = Room(view.name, channel=False)
        for line in view.text.split("\n"):
            room.views.append(View(PAGE, line, time=view.time))
        look = Look(self.palette, self.painter.columns)
        self.reader = Reader(room, look, self.painter.rows - 2)
        self.reader.shown = self.reader.total
        self.reader.up(len(room.views) * self.painter.rows)

    def _take_older(self, view: View) -> None:
        if self.core.find(view.where) is self.reader.room:
            self.fetching = False
            if whole_number(view.text):
                self.reader.came_older()

    def _take_place(self, view: View) -> None:
        self.reader.room.views.reading = False
        self.reader.room.views.trim()
        self.reader, self.whole = self._read(), True
        self.reader.mark_unread(whole_number(view.text) or 0)

    TAKEN = {
        SAID: _take_said,
        NOTICED: _take_said,
        FOUND: _take_found,
        REMOVED: _take_removed,
        REACTED: _take_reacted,
        CLEARED: _take_cleared,
        CAME: keep,
        WENT: keep,
        TOLD: keep,
        NOTE: keep,
        FAILED: _take_failed,
        PEOPLE: _take_people,
        PAGE: _take_page,
        OLDER: _take_older,
        PLACE: _take_place,
    }

    # What it looks like

    def resize(self, columns: int, rows: int) -> None:
        """Redraw all: terminals differ in what they do to rows that have become too long."""
        if (columns, rows) != (self.painter.columns, self.painter.rows):
            self.painter.columns, self.painter.rows = columns, rows
            self.reader.look = self.reader.look._replace(columns=columns)
            self.reader.height = rows - 2
            if self.reader.back:
                self.reader.up(0)  # as many rows as fit now
            self.whole, self.seen = True, None

    def prompt(self, sought: str | None = None) -> str:
        """Return the text before the typed line: the conversation, or the text Ctrl-R looks for."""
        if sought:
            return f"(search: {sought}) "
        where = "" if self.core.here == LOBBY else f"{self.core.here} ".lstrip()
        name = self.core.name if self.painter.columns >= BESIDE_COLUMNS or not where else ""
        return f"{where}{name}".rstrip() + "> "

    def parts(self, trouble: str, waiting: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return the parts of the status row, the most important one first."""
        room, core = self.room, self.core
        people = f" {len(room.people):,}" if room.is_channel and room.people else ""
        rank = room.people.get(core.name, "")
        parts = [
            (trouble, (1, 33)),
            ("away" * bool(core.away), (33,)),
            (self._progress(), (33,)),
            ("; ".join(one.words() for one in core.transfers[:2]), (33,)),
            (f"{waiting:,} waiting" if waiting else "", (33,)),
            *self._reading(),
            (typing_text(map(visible, room.typing)), (36,)),
            (visible(room.name) + people + f" ({rank})" * bool(rank), (1,)),
            *room_marks(self.core.rooms.values(), room, self.elsewhere()),
            (self.server, (2,)),
            ("connected" if not trouble else "", (2,)),
            (cut_to(visible(room.topic), max(0, self.painter.columns - TOPIC_MARGIN)), (2,)),
        ]
        return [(text, colours) for text, colours in parts if text]

    def _progress(self) -> str:
        """Return how many lines of a long message have been sent, while it is sent."""
        talk = self.core.talk
        if talk is None or not talk.pieces or talk.lines_of_message < PROGRESS_LINES:
            return ""
        total = talk.lines_of_message
        return f"{total - len(talk.pieces):,} of {total:,} lines sent"

    def _reading(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the status parts for reading back; none when live."""
        reader = self.reader
        if not reader.back:
            return []
        return [(f"{reader.below:,} new below" * bool(reader.below), (1, 36)), (self._at(), (36,))]

    def _at(self) -> str:
        reader, views = self.reader, self.reader.room.views
        if reader.room is not self.room:
            return f"{visible(reader.room.name)}: Page Down goes on, Escape leads back"
        if not reader.at_top:
            return f"back at {reader.moment():%a %d %b %H:%M}"
        if self.fetching and self.core.ready:
            return "older ones are coming"
        whole = reader.room.whole and not views.dropped
        return "this is the beginning" if whole else "nothing older is here"

    def frame(self, row: str, parts: list, now: float, due: bool = True) -> str:
        """Return the text that brings the screen up to date; new messages only if `due`."""
        if self.reader.room is not self.room and not self.reader.back:
            self._take_place(View(PLACE))
        if self.reader.look.clock != self.core.setting("time"):
            self.reader.look = self.reader.look._replace(clock=self.core.setting("time"))
            self.whole = True
        bottom = status_row(parts, self.painter.columns, self.palette), row
        bell, self.bell, self.notice = "\a" * self.bell + self.notice, False, ""
        draw = self._page if self.reader.back else self._live
        return bell + draw(bottom, now, due)

    def _live(self, bottom: tuple[str, str], now: float, due: bool) -> str:
        painter, back, self.paged = self.painter, "\x1b[?1049l" * self.paged, False
        if back:
            painter.drawn = self.was_drawn
        if self.cleared:
            self.whole = self.cleared = False
            lines, text = [], painter.clear()
        elif self.whole:
            self.whole = False
            lines = place_lines(self.room, self.reader.look, self.server)
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
        """Return the text that leaves the messages on the screen and nothing else."""
        self.reader.back = self.whole = False
        return self._live(("", ""), 0.0, True) + self.painter.erase()


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, also if another program left the file non-blocking."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])


class RawTerminal:
    """The terminal in raw mode: keys come one by one, and the end restores everything."""

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
        """Switch to raw mode. Signals stay on, so Ctrl-C and Ctrl-Z keep their meaning. DRAIN, not
        FLUSH: text that was typed ahead is not lost."""
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
        write_all(self.screen, text.encode(errors="replace"))

    def size(self) -> tuple[int, int]:
        """Return columns and rows; not fewer than we can draw on."""
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
    """Standard input on the loop, of any kind: epoll refuses regular files, so these are read a
    piece a turn. It is never set non-blocking, since the screen and the shell share its
    terminal."""

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
        except BlockingIOError:  # another program left it so
            return
        except OSError:  # a terminal that has gone
            data = b""
        if not data:
            self.ended = True
            self.pause()
        self.take(data)
        if data and not self.watched:
            self.loop.call_soon(self._read)


class ClientOptions(NamedTuple):
    """The options of a client."""

    name: str
    target: Target
    trust: Trust = BELIEVE_THE_SYSTEM
    state: pathlib.Path | None = None  # folder for what is remembered; None: nowhere
    password: str = ""
    join: tuple[str, ...] = ()
    commands: bool = False  # piped lines may be commands
    login: Login | None = None
    config: pathlib.Path | None = None  # folder for the passwords that we made
    mechanisms: tuple[str, ...] = ()  # of SASL, the best one first; () as usual
    lobby: bool = True  # enter it, if there is nothing else to enter


def open_client_store(options: ClientOptions) -> ClientStore:
    """Open client.db in the folder of the client's state, or one in memory. Raises Unusable."""
    path = options.state / "client.db" if options.state else None
    whose = options.login.account if options.login else options.name
    try:
        if path:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        db = open_client_database(str(path) if path else ":memory:")
        return ClientStore(db, str(options.target), fold(whose))
    except OSError as error:
        advice = "use --data DIR, or --no-state to keep nothing"
        raise Unusable(f"cannot write {path}: {reason_of(error)}; {advice}") from error
    except sqlite3.OperationalError as error:
        raise Unusable(f"cannot use {path}: {error}; --no-state does without") from error
    except sqlite3.DatabaseError as error:
        raise Unusable(f"{path} is damaged ({error}); move it away") from error


class Client:
    """The base of all clients: a loop, a link, and an end with a reason."""

    patience = math.inf
    tidy = asks = True

    def __init__(self, options: ClientOptions):
        self.loop, self.options, self.reason = Loop(), options, ""
        self.core, self.link = self.dial(options, self.show, self.over)

    def dial(self, options: ClientOptions, show: Callable, over: Callable) -> tuple:
        """Return the core and the link for one server. The link is not started yet."""
        state, target = options.state, options.target
        known = KnownServers(state / "servers.json" if state else None)
        logins = Memory(options.config / "logins.json" if options.config else None)
        whose = f"{target} {fold(options.name)}"
        made = logins.read().get(whose)
        made = Login(*made) if isinstance(made, list) and len(made) == 2 else None
        outbox = open_outbox(state / "outbox" if state else None, target, options.name)
        store = self.open_store(options)
        if store and outbox.journal:
            store.sole = outbox.journal.first
        try:
            core = ClientCore(
                options.name,
                self.tidy,
                target.kind or known.kind(target),
                store=store,
                password=options.password,
                join=options.join or ((LOBBY,) if options.lobby else ()),
                login=options.login or made,
                outbox=outbox,
                named=bool(options.join),
            )
        except sqlite3.Error as error:
            text = f"the file client.db in {state} is damaged ({error}); move it away"
            raise Unusable(text) from error
        if options.mechanisms:
            core.me.mechanisms = options.mechanisms
            core.me.plain_allowed = "PLAIN" in options.mechanisms
        core.me.generated = bool(made) and options.login is None
        core.me.keep = functools.partial(logins.keep, whose) if options.config else None
        trust, patience = options.trust, self.patience
        link = Link(self.loop, target, core, show, over, trust, known, patience, self.asks)
        if self.asks:
            Transfers(link, pathlib.Path.cwd())
        return core, link

    def open_store(self, options: ClientOptions) -> ClientStore | None:
        """Return the store for messages; None for a pipe, which shows each message once."""
        return open_client_store(options) if self.tidy else None

    def show(self, views: list[View]) -> None:
        raise NotImplementedError

    def over(self, reason: str) -> None:
        """End the client with its link."""
        self.reason = self.reason or reason
        self.loop.stop()

    def ending(self) -> None:
        """Prepare a subclass for the end."""

    def run(self) -> str:
        """Run until the end; return the reason of a failure, or ""."""
        self.link.start()
        self.loop.run()
        self.ending()
        self.core.close_store()
        return self.reason


class Seat:
    """One server of a client that talks to several: its core, its link, and its screen."""

    core: ClientCore
    link: Link
    screen: Any = None


class ManyServers(Client):
    """The base of the clients with a screen. The user looks at one server: `seat`. Its core and
    link are also those of this client."""

    def __init__(self, options: ClientOptions):
        super().__init__(options)
        self.store = self.core.store  # has the list of the other servers
        self.seats: list[Seat] = []
        self.cores: list[ClientCore] = []  # of all servers that there were
        self.quitting = False  # all of them
        self.seat = Seat()
        self.seat.core, self.seat.link = self.core, self.link
        self._take_seat(self.seat)
        self.link.show = functools.partial(self.show_of, self.seat)
        self.link.over = functools.partial(self.seat_over, self.seat)

    # For the subclass

    def screen_for(self, seat: Seat) -> Any:
        """Return the data that this client keeps for the screen of a server."""

    def show_of(self, seat: Seat, views: list[View]) -> None:
        """Show the views of a server, even of one that is not looked at."""
        raise NotImplementedError

    def seats_changed(self) -> None:
        """React to a server that was added, removed, or is looked at now."""

    # Servers

    def _take_seat(self, seat: Seat) -> None:
        self.seats.append(seat)
        self.cores.append(seat.core)
        seat.core.settings = self.core.settings  # one set for all servers
        seat.screen = self.screen_for(seat)
        self.seats_changed()

    def open_others(self) -> None:
        """Connect to the other servers that were open last time."""
        first = self.seat
        for url in json.loads(self.store.fact("servers") or "[]"):
            self.connect(url)
        self.look_at(first)

    def connect(self, words: str, **more: Any) -> None:
        """Handle /connect [URL [NICK]]: add a server beside the others, or list them. `more` are
        options of ClientOptions."""
        url, _, name = words.strip().partition(" ")
        if not url:
            targets = ", ".join(str(seat.link.target) for seat in self.seats)
            return self.show([View(NOTE, f"connected to: {targets}; /connect URL adds one")])
        try:
            target = parse_target(url)
            known = (seat for seat in self.seats if str(seat.link.target) == str(target))
            if (seat := next(known, None)) is not None:
                return self.look_at(seat)
            # The secrets of the first server are not for this one
            usual = {"join": (), "password": "", "login": None, "lobby": False}
            usual |= {"trust": Trust(self.options.trust.ca)}
            usual |= {"name": name.strip() or self.options.name}
            return self.look_at(self.add(self.options._replace(target=target, **usual | more)))
        except ChatError as error:
            return self.show([View(NOTE, str(error))])

    def add(self, options: ClientOptions) -> Seat:
        """Connect to one more server, and stay if that fails. Raises Unusable."""
        seat = Seat()
        show, over = (functools.partial(act, seat) for act in (self.show_of, self.seat_over))
        seat.core, seat.link = self.dial(options, show, over)
        seat.link.stays = True
        self._take_seat(seat)
        seat.link.start()
        self.keep_servers()
        return seat

    def disconnect(self) -> None:
        """Handle /disconnect: leave the server that is looked at."""
        if len(self.seats) == 1:
            return self.show([View(NOTE, "this is the only server; /quit leaves")])
        return self.seat.link.leave(at_once=True)

    def keep_servers(self) -> None:
        """Remember the servers to connect to at the next start, each with its nick."""
        others = (seat for seat in self.seats if seat.core.store is not self.store)
        urls = [f"{url_of(seat.link.target)} {seat.core.wanted_name}" for seat in others]
        self.store.keep_fact("servers", json.dumps(urls))
        self.store.flush()

    def look_at(self, seat: Seat) -> None:
        """Show the conversations on another server."""
        if seat is self.seat:
            return
        self.core.looked_at = False
        self.seat, self.core, self.link = seat, seat.core, seat.link
        self.core.looked_at = True
        if self.core.current and self.core.reads_at_once:
            self.core.mark_read(self.core.current)
        self.seats_changed()

    def seat_over(self, seat: Seat, reason: str) -> None:
        """Remove a server whose link has ended; with the last one, end the client."""
        if len(self.seats) == 1:
            return self.over(reason)
        seat.core.close_store()
        if seat.core.outbox.journal:
            seat.core.outbox.journal.close()
        if seat is self.seat:
            self.look_at(next(one for one in self.seats if one is not seat))
        self.seats.remove(seat)
        if self.quitting:
            return None
        self.keep_servers()
        self.seats_changed()
        if waiting := len(seat.core.outbox.waiting):
            reason += f"; {counted(waiting, 'message')} waiting, to be sent the next time"
        return self.show([View(NOTE, f"{seat.link.target}: {reason.removeprefix('; ') or 'left'}")])

    def leave(self, reason: str = "") -> None:
        """Leave all servers; give them STOP_SECONDS to take the rest."""
        self.loop.call_later(STOP_SECONDS, lambda: self.over(""))
        self.quitting = True
        for seat in list(self.seats):
            seat.link.leave(at_once=True, reason=reason)

    def ending(self) -> None:
        for seat in self.seats:
            seat.core.close_store()


def filter_lines(view: View) -> list[str]:
    """Return the lines that the workshop's client prints; none for the user's own messages."""
    if view.line:
        return [view.line]
    where = "" if view.where == LOBBY else f"[{view.where}] "
    if view.kind == NOTICED and not view.mine:
        where = where if view.where else ""
        return [f"{where}-{view.name}- {line}" for line in view.text.split("\n")]
    if view.kind == FOUND or (view.kind == SAID and (view.past or not view.mine)):
        before = where if is_channel(view.where) else "(private) "
        return [f"{before}{view.name}: {line}" for line in view.text.split("\n")]
    if view.kind in (CAME, WENT):
        verb = "joined" if view.kind == CAME else "left"
        return [f"{where}{view.name} ({view.address}) {verb} the chat!"]
    if view.kind in (TOLD, PAGE) or (view.kind == PEOPLE and view.text):
        return [f"* {line}" for line in view.text.split("\n")]
    return []


def output_trouble(error: OSError) -> str:
    """Return why standard output failed, and close it: Python would flush it again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return f"standard output: {reason_of(error)}"


class Filter(Client):
    """Lines in, lines out, for pipes. It ends after its input, once the server has all of it."""

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
        self.speak = self.link.typed if options.commands else self.link.say
        self.input = Input(self.loop, 0, self.take)
        self.input.pause()  # until there is a server to tell it to
        self.link.drained = self.go_on
        self.over_with = self.saying = False  # the input has ended; its lines are being said

    def take(self, data: bytes) -> None:
        if data:
            self.lines.feed(data)
        else:
            self.lines.finish()
            self.over_with = True
        self.go_on()

    def go_on(self) -> None:
        """Say the lines that have come; commands wait for a connection. Then read on, or leave."""
        if self.saying:  # which may make room, and call this
            return
        self.saying = True
        while (self.core.ready or not self.commands) and not self.link.leaving:
            if (line := self.lines.take()) is None:
                break
            self._say(line)
        self.saying = False
        if self.link.leaving:
            return
        if self.over_with and not self.lines.pending:
            self.link.drained = do_nothing
            self.input.pause()
            self.link.leave(reason=self.link.reason)
        elif self.link.has_room() and not self.over_with:
            self.input.resume()
        else:
            self.input.pause()

    def _say(self, line: bytes) -> None:
        if line == TOO_LONG:
            self.failure = f"a line has at most {LINE_BYTES:,} bytes: it was not sent"
        elif self.commands and is_quit(line.decode(errors="replace")):
            self.link.reason = line.decode(errors="replace")[len("/quit") :].strip()
            self.over_with = True  # and the client leaves once the lines before are acknowledged
            self.lines.clear()
        else:
            self.speak(line.decode(errors="replace"))

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
            write_all(1, "".join(lines).encode(sys.stdout.encoding or "utf-8", "replace"))
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
    """Call back on the loop after a signal. Systems without that signal are left alone, and so is a
    signal that was ignored when we were started (nohup)."""
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
    "Ctrl-R:  the last line that you typed with these words; again: one before that",
    "Ctrl-_:  undo",
    "Ctrl-L:  draw the screen again",
    "Ctrl-C:  forget the line; without one, twice: leave",
)


def with_keys(view: View) -> View:
    """Add the keys' meanings to the page of general help."""
    if (view.kind, view.name) != (PAGE, "help"):
        return view
    return view._replace(text="\n".join([view.text, "", *CLIENT_KEYS]))


class TerminalClient(ManyServers):
    """A terminal and links: keys go to the links, views to the terminal. The screen of each server
    is a Display; `display` is that of the server that is looked at."""

    def __init__(self, options: ClientOptions):
        self.terminal = RawTerminal()
        self.palette = Palette(not os.environ.get("NO_COLOR"))
        super().__init__(options)
        self.display: Display = self.seat.screen
        self.decoder = KeyDecoder()
        self.editor = LineEditor(self.complete)
        self.pressed = self.news = True  # there is something to paint: at once, or soon
        self.painted = 0.0
        self.painting: Timer | None = None  # what came too early for that
        self.was_ready = self.told_why = False
        self.late: set[str] = set()  # own ids of what has been waiting for a while
        self.begun: float = math.inf  # views that there were when a command was begun
        self.cleared = self.asked = -math.inf  # when Ctrl-C cleared the line, or asked
        self.writing_in: Room | None = self.core.current  # whom the line is for
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
            ("SIGCONT", self.resume),
            ("SIGQUIT", functools.partial(self.over, "")),
        ):
            on_signal(self.loop, number, handler)
        atexit.register(self.give_back)
        self.terminal.enter()
        self.tick()
        self.open_others()
        self.editor.set(self.writing_in.draft if self.writing_in else "")
        try:
            reason = super().run()
        finally:
            self.give_back()
        if waiting := sum(len(core.outbox.waiting) for core in self.cores):
            kept = self.core.outbox.journal  # else there was nowhere to keep them
            fate = "waiting, to be sent the next time" if kept else "not sent"
            print(f"{counted(waiting, 'message')} {fate}")
        return reason

    def ending(self) -> None:
        if self.writing_in and not is_secret(self.editor.text):
            self.writing_in.draft = self.editor.text
        super().ending()

    # Servers

    def screen_for(self, seat: Seat) -> Display:
        return Display(seat.core, self.palette, *self.terminal.size())

    def seats_changed(self) -> None:
        several = len(self.seats) > 1
        for seat in self.seats:
            seat.screen.server = str(seat.link.target) if several else ""
            seat.screen.elsewhere = functools.partial(self.rooms_besides, seat)

    def rooms_besides(self, here: Seat) -> list[tuple[str, Room]]:
        """Return the conversations on all other servers, each with its server."""
        others = [seat for seat in self.seats if seat is not here]
        return [
            (str(seat.link.target), room) for seat in others for room in seat.core.rooms.values()
        ]

    def look_at(self, seat: Seat) -> None:
        before = self.display
        super().look_at(seat)
        if seat.screen is before:
            return
        self.display = seat.screen
        self.display.whole, self.display.seen, self.display.paged = True, None, before.paged
        self.display.painter.drawn = before.painter.drawn
        self.display.resize(*self.terminal.size())
        self.was_ready, self.told_why = self.core.ready, False
        self.change_drafts()
        self.pressed = self.news = True

    def show_of(self, seat: Seat, views: list[View]) -> None:
        if seat is self.seat:
            return self.show(views)
        seat.screen.take(views)
        self.display.bell |= seat.screen.bell
        self.display.notice += seat.screen.notice
        seat.screen.bell, seat.screen.notice = False, ""
        self.news = True

    def tick(self) -> None:
        """Update the status once a second: its numbers may have changed."""
        self.late = set(self.core.outbox.waiting)  # of the server that is looked at
        self.news = True
        self.loop.call_later(1.0, self.tick)

    # What is typed

    def take(self, data: bytes) -> None:
        if not data:
            return self.over("")
        if self.escape:
            self.escape.cancel()
        self.press(self.decoder.feed(data, self.loop.now))
        if self.decoder.pasted is not None or self.decoder.rest.startswith(STRING_BEGINS):
            self.escape = self.loop.call_later(PASTE_SECONDS, self.end_paste)
        elif self.decoder.rest.startswith("\x1b"):
            self.escape = self.loop.call_later(ESCAPE_SECONDS, self.flush_escape)

    def flush_escape(self) -> None:
        self.press(self.decoder.flush(self.loop.now))

    def end_paste(self) -> None:
        self.press(self.decoder.end_paste())

    def press(self, keys: list[Key]) -> None:
        self.cleared = -math.inf
        for key in keys:
            reading = self.READING.get(key.name) if self.display.reader.back else None
            if act := reading or self.KEYS.get(key.name):
                act(self)
            elif (text := self.editor.press(key)) is not None:
                self.enter(text)
            if self.editor.refused:
                self.show([View(NOTE, self.editor.refused)])
                self.editor.refused = ""
        if self.editor.left:
            self.leave()
        self.note_typing()
        self.pressed = True

    def note_typing(self) -> None:
        """After each key, tell others about typing, and note which messages a command can mean."""
        text = self.editor.text
        self.link.typing(self.core.current, text)
        if text[:1] != "/":
            self.begun = math.inf
        elif self.begun == math.inf and self.core.current:
            self.begun = self.core.current.views.total

    def enter(self, text: str) -> None:
        """Handle an entered line. An empty one is no message, although it is one from netcat."""
        self.present()
        command = text.rstrip().lower() if text[:1] == "/" else ""
        if is_quit(text):
            self.leave(text[len("/quit") :].strip())
        elif command == "/go":
            self.list_rooms()
        elif command == "/disconnect":
            self.disconnect()
        elif command.split(None, 1)[:1] == ["/connect"]:
            self.connect(text[len("/connect") :].strip())
        elif command[:4] == "/go " and (place := self.place_of(text[4:].strip())):
            self.go(place)
        elif text:
            self.link.typed(text.rstrip() if command else text, None, "", self.begun)
            self.begun = math.inf

    def places(self) -> list[tuple[Seat, Room]]:
        """Return all conversations, server by server; their numbers are those of Alt and /go. A
        server without conversations has one place, too."""
        return [
            (seat, room)
            for seat in self.seats
            for room in seat.core.rooms.values() or [seat.screen.nowhere]
        ]

    def list_rooms(self) -> None:
        """Show all conversations with their numbers."""
        server, listed = None, []
        for n, (seat, room) in enumerate(self.places(), 1):
            new = f" ({room.unread} new)" * bool(room.unread)
            head = f"{seat.link.target}: " if len(self.seats) > 1 and seat is not server else ""
            server = seat
            listed.append(f"{head}{n} {room.name or '(no conversation)'}{new}")
        self.show([View(NOTE, ", ".join(listed) or "there is none; /join #CHANNEL")])

    def interrupt(self) -> None:
        """Handle Ctrl-C: empty the line, which Up brings back; on an empty line ask, and the next
        time leave. A second Ctrl-C that follows quickly counts for the line, too."""
        now = self.loop.now
        if self.editor.text:
            self.editor.forget()
            self.note_typing()
            self.cleared = now
        elif now - self.asked < LEAVE_SECONDS:
            return self.leave()
        elif now - self.cleared > CLEAR_SECONDS:
            self.asked = now
            self.show([View(NOTE, "Ctrl-C again leaves; so does /quit")])
        self.pressed = True
        return None

    def complete(self, word: str, first: bool) -> list[str]:
        return complete_line(self.core, self.editor.before, word)

    # The conversation that is looked at

    def go(self, place: tuple[Seat, Room]) -> None:
        seat, room = place
        self.look_at(seat)
        if room.name:
            self.core.go(room)
        self.show(self.core.take_views())

    def place_of(self, name: str) -> tuple[Seat, Room] | None:
        """Return the conversation with this number or name, preferably on the server that is looked
        at; None if there is none."""
        places = self.places()
        if (number := whole_number(name)) and number <= len(places):
            return places[number - 1]
        here = [place for place in places if place[0].core is self.core]
        for seat, room in [*here, *places]:
            keys = map(seat.core.fold, (name, f"#{name}", str(seat.link.target)))
            if seat.core.fold(room.name or str(seat.link.target)) in keys:
                return seat, room
        return None

    def go_number(self, number: int) -> None:
        for place in self.places()[number - 1 : number]:
            self.go(place)

    def go_next(self, step: int = 1) -> None:
        places = self.places()
        rooms = [room for _, room in places]
        if places:
            room = self.core.room or self.display.nowhere
            here = rooms.index(room) if room in rooms else -1
            self.go(places[(here + step) % len(places)])

    def go_unread(self) -> None:
        """Go to a conversation where the user is called; else to one with new messages."""
        places = sorted(self.places(), key=lambda place: not place[1].called)
        for place in [place for place in places if place[1].unread][:1]:
            self.go(place)

    # Reading back

    def page_up(self) -> None:
        self.up(self.display.reader.height - 1)

    def page_down(self) -> None:
        self.display.reader.down(self.display.reader.height - 1)

    def up(self, rows: int) -> None:
        """Scroll up, and ask for older messages before the user reaches the oldest ones here."""
        reader = self.display.reader
        reader.up(rows)
        known = reader.room in self.core.rooms.values()  # else it is a page of its own
        if known and reader.end - reader.first < 2 * reader.height:
            self.display.fetching = self.link.ask_older(reader.room)

    def present(self) -> None:
        reader = self.display.reader
        reader.back = reader.room.views.reading = False
        reader.room.views.trim()

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
    READING = {  # the keys while the user reads back; a mouse wheel sends the arrows
        "up": lambda self: self.up(1),
        "down": lambda self: self.display.reader.down(1),
        "home": lambda self: self.up(10 * VIEWS_KEPT),
        "end": present,
        "escape": present,
    }

    # What is shown

    def show(self, views: list[View]) -> None:
        if self.core.ready and not self.was_ready:
            self.told_why = False
            self.display.keep(View(NOTE, f"connected to {self.link.target}"))
        self.was_ready = self.core.ready
        self.display.take(map(with_keys, views))
        if self.writing_in is not self.core.current:
            self.change_drafts()
        for view in views:
            if view.kind == BACK:
                self.give_text_back(view.text)
            elif view.kind == STATUS and self.link.again and not self.told_why:
                self.told_why = True
                self.display.keep(View(NOTE, view.text))
        self.news = True

    def change_drafts(self) -> None:
        """After a change of conversation, keep what was typed with the old one; restore the
        new's."""
        before, self.writing_in = self.writing_in, self.core.current
        text = self.editor.take()
        text = "" if is_secret(text) else text
        if before and any(before is room for _, room in self.places()):
            before.draft = text
        elif text:
            self.editor.remember(text)
            self.display.keep(View(NOTE, "what you typed there is kept: Up brings it back"))
        after = self.writing_in
        self.editor.set(after.draft if after else "")
        if after:
            after.draft = ""

    def give_text_back(self, text: str) -> None:
        """Put text that was not accepted back on the line; if it is a command, or the line is not
        empty, let Up recall it."""
        if not (self.editor.text or text[:1] == "/"):
            self.editor.set(text)
        elif not is_secret(text):
            self.editor.remember(text)

    def trouble(self) -> str:
        """Return what is wrong with the connection; "" if nothing is."""
        link = self.link
        if link.doubted:
            return f"/trust or {'/disconnect' if self.seats[1:] else '/quit'}"
        if link.again:
            return f"reconnecting in {max(0, math.ceil(link.again.when - self.loop.now))} s"
        if link.phase == WAITING:
            return f"not connected: /reconnect or {'/disconnect' if self.seats[1:] else '/quit'}"
        return "" if self.core.ready else "connecting"

    def paint(self, last: bool = False) -> None:
        """Write all that is new at once: immediately after a key, else at most PAINTS_A_SECOND
        times a second."""
        wait = self.painted + 1 / PAINTS_A_SECOND - self.loop.now
        if self.news and wait > 0 and not self.painting:
            self.painting = self.loop.call_later(wait, do_nothing)
        due = self.news and wait <= 0
        if not (self.pressed or due) or not self.terminal.raw:
            return
        waiting = self.core.outbox.waiting
        count = len(self.late & waiting.keys() if self.core.ready else waiting)
        display, editor = self.display, self.editor
        prompt = display.prompt(editor.sought)
        row = display.painter.row(prompt, editor.before, editor.after)
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
        """Restore the terminal, with the messages left on its screen."""
        if self.terminal.raw:
            self.write(self.display.leave())
            self.terminal.leave()

    def suspend(self) -> None:
        """Handle Ctrl-Z: give the terminal back, stop, and take it again when continued."""
        self.give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        on_signal(self.loop, "SIGTSTP", self.suspend)
        self.resume()

    def resume(self) -> None:
        """Take the terminal again after a stop, perhaps by SIGSTOP: the shell had it meanwhile."""
        self.terminal.enter()
        self.display.resize(*self.terminal.size())
        self.redraw()
        self.pressed = self.news = True


# ======================================================================================
# BENCH
# ======================================================================================
# A load generator for any server of the line protocol. Receivers count newlines; one of
# them (all, when messages come at a rate) also reads the time that each message carries.


class BenchOptions(NamedTuple):
    """The options of a run of the benchmark."""

    target: Target
    clients: int = 100  # that only listen
    senders: int = 10
    messages: int = 20000
    payload: int = 60  # bytes beside the time
    window: int = 512  # messages under way, as the slowest receiver sees it
    rate: float = 0.0  # messages a second instead of a window


BENCH_DEFAULTS = BenchOptions._field_defaults


class BenchConnection(Connection):
    """One client of the load. It counts messages, and may measure their latency."""

    def __init__(self, loop: Loop, sock: socket.socket):
        super().__init__(loop, sock)
        self.failure = ""
        self.counted = False  # whether lines are counted now
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
    """One run: connect all clients, wait until it is quiet, send, and count."""

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
        """Wait until all clients have joined: messages came, and then none for a while."""
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
        """Close all connections: a server that is told to end waits for its clients."""
        for conn in (*self.receivers, *self.senders):
            conn.sock.close()
        self.loop.close()

    def _send(self, done: int, elapsed: float) -> None:
        """Send the messages that may go now: those due by the clock, or those inside the window."""
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
            """Return the latency in milliseconds that this share of the messages stayed below."""
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
    """Run a server of our own on a free port, with its history in a temporary folder."""
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
# PAGE
# ======================================================================================
# The page for a user who typed the server's address into a browser. It needs nothing else:
# no script, no picture, no other host.

WEB_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Chat on {host}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ max-width: 40rem; margin: 3rem auto; padding: 0 1rem; }}
  body {{ font: 1rem/1.5 system-ui, sans-serif; }}
  pre {{ overflow: auto; padding: .6rem .8rem; border-radius: .4rem; background: #8882; }}
  dt {{ margin-top: 1rem; font-weight: 600; }} dd {{ margin: 0; }}
</style>
<h1>Chat on {host}</h1>
<p>This is a chat server, <b>{network}</b>. {users} here now. All of these meet in one room:</p>
<dl>
  <dt>A phone, or any IRC program</dt>
  <dd>server <b>{host}</b>, port <b>{port}</b>, {tls}channel <b>#lobby</b></dd>
  <dt>A terminal with Python</dt><dd><pre>python3 chat.py client NAME --server {url}</pre></dd>
  <dt>A window</dt><dd><pre>python3 gui_client.py NAME --server {url}</pre></dd>
  <dt>Netcat</dt><dd><pre>{netcat}</pre></dd>
  <dt>A program in a browser</dt>
  <dd>a WebSocket at <b>{socket}</b> that speaks IRC (text.ircv3.net)</dd>
</dl>
"""


def web_page(request: Request, site: Site, secure: bool) -> str:
    """Return the page, with the address at which the browser reached this server."""
    import html

    host, port = split_host(request.header("host"))
    host, port = host or site.name, port or (443 if secure else 80)
    where = address_text(host, port)
    words = {
        "host": host,
        "port": port,
        "network": site.network,
        "users": counted(len(site.hub.users), "user"),
        "tls": "with TLS, " * secure,
        "url": f"ircs://{where}" if secure else where,
        "netcat": f"openssl s_client -quiet -connect {where}" if secure else f"nc {host} {port}",
        "socket": f"{'wss' if secure else 'ws'}://{where}/irc",
    }
    return WEB_PAGE.format(**{name: html.escape(str(word)) for name, word in words.items()})


# ======================================================================================
# MAIN
# ======================================================================================
# The command line. Everything works without any flag; whatever goes wrong is one line on
# standard error and an exit status: 1 for what did not work, 2 for a wrong command line.


def home_folder() -> pathlib.Path:
    """Return the user's home folder. Raises Unusable if there is none."""
    try:
        home = pathlib.Path.home() if os.environ.get("HOME") != "" else pathlib.Path()
    except RuntimeError:
        home = pathlib.Path()
    if home == pathlib.Path():
        raise Unusable("there is no home folder (HOME); use --data DIR, or a client's --no-state")
    return home


def data_folder() -> pathlib.Path:
    """Return the folder where this user's programs keep their data, as the system has it."""
    if os.name == "nt":
        return pathlib.Path(os.environ.get("APPDATA") or home_folder()) / "chat.py"
    if sys.platform == "darwin":
        return home_folder() / "Library" / "Application Support" / "chat.py"
    folder = os.environ.get("XDG_DATA_HOME") or home_folder() / ".local" / "share"
    return pathlib.Path(folder) / "chat.py"


def config_folder() -> pathlib.Path:
    """Return the folder for this program's settings and passwords, as the system has it."""
    if os.name == "nt" or sys.platform == "darwin":
        return data_folder()
    return pathlib.Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config") / "chat.py"


def checked_option(parse: Callable, fits: Callable, advice: str) -> Callable[[str], Any]:
    """Return a type for argparse: it takes parse(text), if fits() accepts that value."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError, Unusable):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text}: {advice}")

    return convert


SASL_HELP = "of SCRAM-SHA-256, EXTERNAL and PLAIN, the best one first"

listen_address = checked_option(lambda text: parse_target(text)[:2], bool, "write HOST:PORT")
positive = checked_option(whole_number, bool, "a whole number from 1 on")
message_rate = checked_option(
    float, lambda rate: 0 <= rate < math.inf, "messages a second, or 0 for a window"
)
payload_bytes = checked_option(
    positive, BENCH_PAYLOAD.__ge__, f"a message has at most {BENCH_PAYLOAD:,} bytes"
)
sasl_option = checked_option(
    lambda text: tuple(filter(None, text.upper().split(","))),
    lambda names: names and {*LOGINS, "EXTERNAL"}.issuperset(names),
    f"write one or more {SASL_HELP}",
)
certificate_pin = checked_option(
    lambda text: text.replace(":", "").lower(),
    re.compile("[0-9a-f]{64}").fullmatch,
    "write the SHA-256 as 64 hexadecimal digits",
)
registration_rules = checked_option(  # "" allows it after registration with a nick
    lambda text: frozenset(filter(None, text.split(","))),
    {"off", "before-connect", "email-required"}.issuperset,
    "write off, or before-connect,email-required",
)
host_name = checked_option(  # one word that can stand in a line of IRC
    str,
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}").fullmatch,
    "letters, digits, dots and hyphens, please",
)


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


def data_option(text: str) -> pathlib.Path | None:
    return None if text == "none" else pathlib.Path(text) if text else data_folder()


def mail_command(text: str) -> str:
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def ask_for_password() -> str:
    """Ask at the terminal, whatever standard input is: the first line of a pipe is no password."""
    import getpass
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass("password: ")
        except (getpass.GetPassWarning, EOFError):
            raise Unusable("no password was typed; it can be given as @FILE") from None


def secret_option(text: str) -> str:
    """Return a password: the text itself, or from @FILE, or asked for if "". Raises Unusable."""
    if text.startswith("@"):
        return read_secret(pathlib.Path(text[1:]))
    try:
        secret = text or ask_for_password()
    except UnicodeError:
        raise Unusable("the password is not UTF-8 text") from None
    except OSError as error:
        raise Unusable(f"cannot read the password: {reason_of(error)}") from None
    if not secret:  # an empty password would let all in
        raise Unusable("the password is empty")
    return Secret(secret)


def operator_option(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not name or not colon or " " in name:
        raise argparse.ArgumentTypeError("write NAME:PASSWORD, NAME:@FILE, or NAME: to be asked")
    return name, secret_option(password)


def lock_folder(folder: pathlib.Path) -> int:
    """Make the data folder if need be, and lock it for this process. Raises Unusable."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            folder.chmod(0o700)
            log.warning("%s could be used by others (mode %o): it is yours alone now", folder, mode)
        for name in ("lock", "chat.db", "chat.db-wal", "chat.db-shm", "search.db"):
            path = folder / name
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise Unusable(f"{path} is no plain file; remove it, or choose another --data")
            if os.name == "posix" and path.exists():
                path.chmod(0o600)
        return locked(folder / "lock")
    except BlockingIOError:
        raise Unusable(f"another server uses {folder}; stop it, or choose another --data") from None
    except OSError as error:
        advice = "choose another --data, or --data none to keep nothing"
        raise Unusable(f"cannot use {folder}: {reason_of(error)}; {advice}") from error


def how_to_join(server: Server) -> str:
    """Return the start-up lines: the addresses, who can connect, and how."""
    lines = []
    for listener in server.listeners:
        host, port = listener.address
        where = address_text(host, port)
        near = f"this machine only; --listen 0.0.0.0:{port} for the network"
        who = near if is_loopback(host) else "everybody who can reach this machine"
        lines.append(f"chat.py {VERSION} listens on {where} ({who})")
    host, port = server.listeners[0].address
    default = (host, port) == (DEFAULT_HOST, DEFAULT_PORT)
    elsewhere = "HOST" if host in ("0.0.0.0", "::") else host
    option = "" if default else f" --server {address_text(elsewhere, port)}"
    kept = server.store.path.parent if server.store.path else "memory only: gone when it ends"
    if server.options.password:
        lines.append("a password is needed: --password of the clients, /pass from netcat")
    lines += [
        f"history: {kept}",
        f"terminal: python3 chat.py client NAME{option}",
        f"window:   python3 gui_client.py NAME{option}",
        f"netcat:   nc {elsewhere} {port}",
        f"IRC:      any client, {elsewhere} port {port}; irssi -c {elsewhere} -p {port}",
    ]
    return "\n".join(lines)


def announce(text: str) -> None:
    """Print a line on standard output. Raises Unusable."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise Unusable(output_trouble(error)) from error


def run_server(args: argparse.Namespace) -> int:
    writer = LogWriter(2)
    writer.setFormatter(LogFormat("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=args.log.upper(), handlers=[writer])
    os.umask(0o077)
    lock = lock_folder(args.data) if args.data else None
    names = set(ServerOptions._fields) - {"listen", "web", "files"}
    listen = tuple(args.listen or ServerOptions().listen)
    named = [*args.web_origin, *filter(None, [args.web_url])]
    web = Web(
        origins=frozenset(args.web_origin),
        hosts=frozenset(split_host(url.partition("://")[2])[0] for url in named),
        proxies=frozenset(args.web_proxy),
        open_metrics=args.metrics == "open",
        url=args.web_url or "",
        page=web_page,
    )
    loop = Loop()
    given = {name: getattr(args, name) for name in names}
    server = Server(loop, ServerOptions(listen, web=web, files=args.files == "on", **given))
    if args.data:
        server.store.guard(args.data / "lock")
    for name in ("SIGINT", "SIGTERM"):
        on_signal(loop, name, server.stop)
    on_signal(loop, "SIGHUP", server.reload)
    announce(how_to_join(server))
    loop.run()
    server.close()
    writer.flush()
    if lock is not None:
        os.close(lock)
    if server.restarting:
        os.execv(sys.executable, sys.orig_argv)
    return 0


def run_passwd(args: argparse.Namespace) -> int:
    """Set the password of an account, for any user who may write its files. The server may run."""
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


def run_client(args: argparse.Namespace) -> int:
    if not clean_name(args.name) or args.name[0] == "/" or dialect_of(args.name.encode()) != "line":
        raise Unusable(f"{args.name!r} cannot be a name")
    if len(args.name.encode()) > NAME_BYTES:
        raise Unusable(f"a name has at most {NAME_BYTES} bytes")
    login = None
    if args.login is not None:  # the password is asked for, unless it came by ACCOUNT:@FILE
        account, _, password = args.login.partition(":")
        login = Login(account or args.name, secret_option(password))
    options = ClientOptions(
        " ".join(args.name.split()),
        args.server._replace(kind=PLAIN if args.plain else args.server.kind),
        Trust(args.ca, args.pin, args.insecure, args.client_cert),
        None if args.no_state else args.data or data_folder() / "client",
        args.password or "",
        tuple(filter(None, args.join.split(","))),
        args.commands,
        login,
        None if args.no_state else args.data or config_folder(),
        args.sasl,
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    reason = (TerminalClient if terminal else Filter)(options).run()
    if reason:
        raise Unusable(reason)
    return 0


def show_progress(text: str) -> None:
    """Write a status line over the one before; the next one goes over it."""
    print(f"\r{text}\x1b[K\r", end="", file=sys.stderr)


def run_bench(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: a server may be ours
    own = contextlib.nullcontext(args.server) if args.server else server_for_bench()
    with own as target:
        options = BenchOptions(target, **{n: getattr(args, n) for n in BENCH_DEFAULTS})
        progress = show_progress if sys.stderr.isatty() else do_nothing
        with contextlib.closing(Bench(options, progress)) as bench:
            result = bench.run()
    announce(json.dumps(result) if args.json else bench_table(result))
    return 0


FIRST_HELP = """\
chat.py: a chat in one file. What you can do:

  python3 chat.py server                            start a server, for this machine
  python3 chat.py server --listen 0.0.0.0:7000      for everyone on the network
  python3 chat.py client NAME                       talk, in this terminal
  python3 chat.py client NAME --server HOST:7000    on the server of another machine
  python3 gui_client.py NAME                        talk, in a window
  printf 'hi\\n' | python3 chat.py client NAME      send lines from a program
  python3 chat.py passwd NAME | bench               set a password, measure a server
  python3 chat.py COMMAND --help                    all options of a command
"""

SERVER_EPILOG = """\
examples:
  chat.py server                                    this machine only
  chat.py server --listen 0.0.0.0:7000 --tls-cert chain.pem --tls-key key.pem
  chat.py server --data /srv/chat --oper boss:@boss.txt --motd welcome.txt

exit status: 0 after SIGTERM or Ctrl-C, 1 with a reason, 2 for a wrong command line
signals: SIGTERM ends the server; SIGHUP reads certificate, passwords and MOTD again
environment: HOME or XDG_DATA_HOME say where the data folder is, unless --data does
"""


def byte_count(text: str) -> int:
    """Return a size like 500K, 20M or 4G in bytes."""
    match = re.fullmatch(r"([0-9]{1,12})([KMGkmg]?)", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no size; write 500K, 20M or 4G")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]


def positive_number_option(text: str) -> float:
    if not (number := positive_number(text)):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def web_origin(text: str) -> str:
    """Return a valid origin, as browsers send it: https://HOST or http://HOST:PORT."""
    scheme, _, authority = text.lower().rstrip("/").partition("://")
    if scheme not in ("http", "https") or not split_host(authority)[0]:
        raise argparse.ArgumentTypeError(f"{text} is no origin; write https://HOST")
    return f"{scheme}://{authority}"


def proxy_address(text: str) -> str:
    """Return the valid address of a proxy, as its connections show it."""
    host = forwarded_host(text)
    if not host:
        raise argparse.ArgumentTypeError(f"{text} is no IP address")
    return host


def parser_of(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    """Add a subcommand, whose help ends with `epilog` as it is, and return its parser."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"chat.py {VERSION}")
    return parser


def add_server(commands: Any) -> None:
    server = parser_of(commands, "server", "let others talk", SERVER_EPILOG)
    add = server.add_argument
    listen = "may be repeated; default 127.0.0.1:7000"
    add("--listen", type=listen_address, action="append", metavar="HOST:PORT", help=listen)
    add("--tls-cert", metavar="PEM", help="certificate chain: TLS on the same port")
    add("--tls-key", metavar="PEM", help="its key, unless it is in the same file")
    add("--tls-client-ca", metavar="PEM", help="whose client certificates can log in")
    add("--data", type=data_option, default="", metavar="DIR", help="or none")
    keep = f"events kept of each channel; default {KEEP_EVENTS:,}"
    add("--keep", type=positive, metavar="N", help=keep)
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    flood = f"lines at once, and a second; default {FLOOD_BURST}, {FLOOD_RATE:g}"
    add("--flood", type=flood_limits, metavar="BURST,RATE|off", help=flood)
    add("--name", type=host_name, default=SERVER_NAME, metavar="HOST", help="of this server")
    add("--network", type=host_name, default=SERVER_NAME, metavar="NAME", help="as IRC shows it")
    oper = "who may operate the server; may be repeated; NAME:@FILE"
    add("--oper", type=operator_option, action="append", default=[], metavar="NAME:PW", help=oper)
    add("--motd", type=pathlib.Path, metavar="FILE", help="message of the day, for IRC")
    rules = "off, or before-connect,email-required"
    add("--register", type=registration_rules, metavar="RULES", help=rules)
    add("--sts", type=positive, metavar="SECONDS", help="IRC clients come back by TLS only")
    mail = "takes a message, like: sendmail -t"
    add("--sendmail", type=mail_command, metavar="COMMAND", help=mail)
    origin = "whose pages may open a WebSocket here, or under whose name it is reached"
    usual = {"type": web_origin, "action": "append", "default": []}
    add("--web-origin", metavar="URL", help=origin, **usual)
    add("--web-url", type=web_origin, metavar="URL", help="how links to files begin")
    proxy = "address of an HTTP proxy that sets X-Forwarded-For and -Proto; may be repeated"
    usual = {"type": proxy_address, "action": "append", "default": []}
    add("--web-proxy", metavar="ADDRESS", help=proxy, **usual)
    kept = f"of one file; default {FILE_BYTES >> 20}M; of all: {FILES_BYTES >> 30}G"
    add("--files", choices=("on", "off"), default="on", help="users can send each other files")
    add("--file-max", type=byte_count, default=FILE_BYTES, metavar="SIZE", help=kept)
    add("--files-max", type=byte_count, default=FILES_BYTES, metavar="SIZE", help="of all files")
    days = f"until a file is removed; default {FILES_DAYS}"
    add("--files-keep", type=positive_number_option, default=FILES_DAYS, metavar="DAYS", help=days)
    figures = "who may read /health and /metrics; default: this machine"
    add("--metrics", choices=("local", "open"), default="local", help=figures)
    clients = "connections in all; default: what the system allows"
    add("--max-clients", type=positive, metavar="N", help=clients)
    address = f"connections of one address; default {PER_ADDRESS}"
    add("--max-per-address", type=positive, default=PER_ADDRESS, metavar="N", help=address)
    add("--log", default="info", choices=("debug", "info", "warning", "error"))
    server.set_defaults(run=run_server, flood=(FLOOD_BURST, FLOOD_RATE), register=frozenset())


CLIENT_EPILOG = """\
examples:
  chat.py client alice --server 192.168.1.5:7000
  chat.py client alice --server ircs://irc.libera.chat --join '#python'
  chat.py client alice --login alice:@password.txt
  printf 'hello\\n' | chat.py client bot --join '#builds'

exit status:
  0  you left, or all lines of the pipe have arrived
  1  there is a reason, on the last line
  2  the command line is wrong

environment: NO_COLOR (not empty) for no colours; TERM=dumb for a client without a screen;
HOME, XDG_DATA_HOME and XDG_CONFIG_HOME say where the client keeps its state, unless --data does.
"""


def add_client_options(add: Callable) -> None:
    """Add the options that the terminal client and the window have in common."""
    add("--plain", action="store_true", help="a workshop server: the line protocol, no commands")
    login = "asks for the password, or reads it from FILE"
    add("--login", nargs="?", const="", metavar="ACCOUNT[:@FILE]", help=login)
    add("--sasl", type=sasl_option, default=(), metavar="MECHANISM,...", help=SASL_HELP)
    add("--client-cert", metavar="PEM", help="your certificate and its key, for SASL EXTERNAL")
    add("--data", type=data_option, metavar="DIR", help="where the client keeps its state")
    add("--no-state", action="store_true", help="remember nothing")
    add("--password", type=secret_option, nargs="?", const="", metavar="PW", help="or @FILE")
    add("--ca", metavar="PEM", help="believe these certificates instead of the system's")
    add("--pin", type=certificate_pin, metavar="SHA256", help="believe this one certificate")
    add("--insecure", action="store_true", help="believe any certificate")


def add_client(commands: Any) -> None:
    client = parser_of(commands, "client", "talk: on a terminal, or in a pipe", CLIENT_EPILOG)
    add = client.add_argument
    add("name", metavar="NAME", help="your nick")
    address = "irc://HOST, ircs://HOST (TLS), chat://HOST:PORT or HOST:PORT"
    usual = server_target("")
    add("--server", type=server_target, default=usual, metavar="HOST:PORT|URL", help=address)
    add("--join", default="", metavar="#A,#B", help="channels to enter at once")
    add("--commands", action="store_true", help="lines of a pipe may be commands")
    add_client_options(add)
    client.set_defaults(run=run_client)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chat.py", description="A chat in one file.")
    parser.add_argument("--version", action="version", version=f"chat.py {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_server(commands)
    add_client(commands)
    epilog = """\
example: chat.py passwd alice --password @new.txt
exit status: 0 when it is set, 1 with a reason, 2 for a wrong command line. The server may run.
"""
    passwd = parser_of(commands, "passwd", "set the password of an account", epilog)
    add = passwd.add_argument
    add("name", metavar="NAME")
    add("--data", type=data_option, default="", metavar="DIR")
    add("--password", type=secret_option, metavar="PW", help="or @FILE; asked for without it")
    passwd.set_defaults(run=run_passwd)

    epilog = """\
examples: chat.py bench        chat.py bench --server 127.0.0.1:7000 --rate 200 --json
exit status: 0 with the figures, 1 with a reason, 2 for a wrong command line
"""
    measure = "measure a server; one of its own without --server"
    bench = parser_of(commands, "bench", measure, epilog)
    add = bench.add_argument
    add("--server", type=server_target, metavar="HOST:PORT")
    for name, value in BENCH_DEFAULTS.items():
        kind = {"rate": message_rate, "payload": payload_bytes}.get(name, positive)
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
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)  # Python found them closed
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        for text in given:  # names and passwords go into UTF-8; these bytes can be anything
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Unusable(f"{text!r} on the command line is not UTF-8 text")
        if not given:
            print(FIRST_HELP, end="")
            return 0
        args = command_line().parse_args(given)
        return args.run(args)
    except ChatError as error:
        print(f"chat.py: {escaped(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
