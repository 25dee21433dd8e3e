"""A sandbox for Python programs written by language models: one file, standard library only.

    with Executor(timeout=5.0) as executor:
        executor.run([("def f(x): return x + 1", "41")])        # one Execution: ok, output '42'

A worker is a lean interpreter inside the walls. It forks a fresh process for each run, kills all
that the run left behind, and answers with the literal text of a value. The caller's process never
evaluates, compiles or unpickles anything that a program wrote, and no expected answer enters the
sandbox: the caller compares values, with same(). So the worst that a program can do to a verdict
by forging its result is to "return" a value of its choice.

What becomes of each kind of attack (L: what a Linux with all walls does)

  loops, powers, regular     'timeout': killed from outside, after `timeout` seconds of its own
  expressions, sleeping      time; waiting for a core is not counted (/proc/<pid>/schedstat)
  memory                     'memory', a limit on address space; a program may catch MemoryError
  threads, forks, daemons    fail (a limit of no processes, seccomp); what is left dies with its
                             run, runs die with their worker, and workers with the caller
  output: flood, huge, deep, printed text goes nowhere; values over 100,000 characters or 80 levels,
  endless or lying repr      or of classes that are not plain data: 'unrepresentable', never cut
  os._exit, crashes, kills   'killed'; SystemExit and KeyboardInterrupt are 'error'
  bombs for the parser       parsed in the run only: 'syntax' or 'killed'; values are read by an own
                             parser, linear and bounded
  files                      L: a root with nothing but the library in it, read-only; and Landlock
  network, signals, ptrace   L: own namespaces without any device; and seccomp
  forbidden modules, open()  'unsafe': by syntax tree, by a guarded __import__, by audit events
  results through the pipe   L: a nonce, exactly one report, and a canonical value, or 'unsafe'
  answers that are code      an input is evaluated apart from the program, to literals or not at all
  the next run               never sees the process of the last one
  hash order, id(), clocks,  'nondeterministic': validate runs in processes with other hash seeds,
  randomness                 addresses, random states

What is not promised: protection from bugs of the kernel, or from side channels of the hardware.
Nondeterminism that shows rarely (once in a hundred runs, once a day) is not found. Where a system
denies namespaces, Landlock or seccomp (containers, other systems), the start warns of the promises
that are weaker; elsewhere than on Linux that is all but limits and guards, and guards, being
Python, can be walked around. The caller's machine can still be kept busy, for as long as the limits
allow. Not for several threads at once; not for Windows, which has no fork.
"""

import ast
import builtins
import collections
import ctypes
import functools
import gc
import importlib
import json
import marshal
import os
import re
import select
import signal
import struct
import sys
import time
import types
import warnings
from dataclasses import dataclass

__all__ = ["Executor", "Execution", "parse_literal", "literal", "same", "ALLOWED"]

# Modules a program may import; all others are refused. They compute and do nothing else: no
# files, network, processes, threads, clocks, randomness, hashes that cannot be guessed, or
# handles on the interpreter. To change the list, change it here: workers import all of it at
# their start, and nothing else depends on it.
ALLOWED = frozenset("""
    __future__ abc array base64 binascii bisect cmath collections contextlib copy dataclasses
    decimal difflib enum fractions functools graphlib heapq html itertools json keyword math
    numbers operator pprint re reprlib statistics string struct textwrap types typing
    unicodedata""".split())

MAX_TEXT = 100_000     # characters in a program, an input, or an output
MAX_DEPTH = 80         # brackets within brackets in a literal
MAX_DIGITS = 4300      # digits of an integer, CPython's own limit for int(str)


@dataclass(frozen=True)
class Execution:
    """What became of one run. `status` is 'ok', or why there is no value:

    'syntax'           the program or the input does not parse
    'error'            it raised an exception, or has no function f
    'timeout'          it used more than its time
    'memory'           it used more than its memory
    'unsafe'           it tried something that no task may do
    'unrepresentable'  the value has no literal, or one that is too long or too deep
    'nondeterministic' two runs differ (validate only)
    'killed'           its process ended without a result: a crash, or a kill from outside
    """
    status: str
    output: str        # canonical Python literal of the returned value; '' unless ok
    error: str         # one line for a person; '' if ok
    seconds: float     # wall-clock time of the run, without the time in the queue

    @property
    def ok(self):
        return self.status == "ok"


# ---------------------------------------------------------------------------------------------
# Values and their texts. Safe in the caller's process: no eval, no compile, no ast.parse of
# text that others wrote (CPython's parser can be made to crash, or to eat memory and time).

_STRING = r"""(?:[bB][rR]?|[rR][bB]?|[uU])?(?:
      '''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''
    | \"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"""
    | '[^'\\\n]*(?:\\.[^'\\\n]*)*'
    | "[^"\\\n]*(?:\\.[^"\\\n]*)*" )"""
_TOKEN = re.compile(r"(?:[ \t\r\n\f]|\#[^\n]*)*(?:"
                    r"(?P<string>" + _STRING + r")"
                    r"|(?P<number>\.?[0-9](?:[eE][+-](?=[0-9])|[0-9a-zA-Z_.])*)"
                    r"|(?P<name>[^\W\d]\w*)"
                    r"|(?P<sign>[-+])|(?P<mark>[\[\](){},:=])|(?P<end>\Z))", re.X | re.S)
_CONSTANTS = {"None": None, "True": True, "False": False}


class _Reader:
    """Reads literals from text: linear in its length, and no deeper than MAX_DEPTH."""

    def __init__(self, text, limit):
        if type(text) is not str or len(text) > limit:
            raise ValueError(f"not a text of at most {limit} characters")
        self.tokens, at, kind = [], 0, None
        while kind != "end":
            match = _TOKEN.match(text, at)
            if not match:
                raise ValueError(f"not a literal, from character {at}")
            kind, at = match.lastgroup, match.end()
            self.tokens.append((kind, match[kind]))
        self.tokens.reverse()

    def peek(self):
        return self.tokens[-1][1]

    def take(self, wanted=None):
        kind, text = self.tokens.pop()
        if kind == "end" and wanted != "" or wanted not in (None, text):
            raise ValueError(f"not a literal: {wanted or 'more'} expected before "
                             f"{text[:20] or 'the end'!r}")
        return kind, text

    def items(self, close, depth):
        """Values between commas up to `close`; also says whether there was a comma."""
        values, comma = [], False
        while self.peek() != close:
            values.append(self.value(depth))
            if self.peek() != close:
                self.take(",")
                comma = True
        self.take(close)
        return values, comma

    def value(self, depth):
        kind, text = self.take()
        if kind == "string":
            return self.string(text)
        if kind in ("number", "sign"):
            return self.number(kind, text)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if depth >= MAX_DEPTH and text in ("[", "(", "{"):
            raise ValueError(f"more than {MAX_DEPTH} levels deep")
        if text == "[":
            return self.items("]", depth + 1)[0]
        if text == "(":
            values, comma = self.items(")", depth + 1)
            return tuple(values) if comma or not values else values[0]
        if text == "{":
            return self.braces(depth + 1)
        if text == "set":
            self.take("(")
            self.take(")")
            return set()
        raise ValueError(f"not a literal: {text[:20]!r}")

    def braces(self, depth):
        try:
            if self.peek() == "}":
                self.take()
                return {}
            first = self.value(depth)
            if self.peek() != ":":
                if self.peek() != "}":
                    self.take(",")
                return {first, *self.items("}", depth)[0]}
            self.take(":")
            table = {first: self.value(depth)}
            while self.peek() != "}":
                self.take(",")
                if self.peek() != "}":
                    key = self.value(depth)
                    self.take(":")
                    table[key] = self.value(depth)
            self.take("}")
            return table
        except TypeError:
            raise ValueError("not a literal: a list, set or dict as key or set member") from None

    def string(self, text):
        value = _unquote(text)
        while self.tokens[-1][0] == "string":            # 'a' 'b' is 'ab'
            more = _unquote(self.take()[1])
            if type(more) is not type(value):
                raise ValueError("not a literal: str beside bytes")
            value += more
        return value

    def number(self, kind, text):
        negative = False
        while kind == "sign":
            negative ^= text == "-"
            kind, text = self.take()
        if kind != "number":
            raise ValueError(f"not a literal: {text[:20]!r} after a sign")
        value = -_number(text) if negative else _number(text)
        if type(value) is not complex and self.tokens[-1][0] == "sign":     # 1+2j
            sign = self.take()[1]
            kind, text = self.take()
            imaginary = _number(text) if kind == "number" else None
            if type(imaginary) is not complex:
                raise ValueError("not a literal: a sum")
            value = value + imaginary if sign == "+" else value - imaginary
        return value


def _unquote(token):
    if token[0] in "'\"" and token[:3] not in ("'''", '\"\"\"') and "\\" not in token:
        return token[1:-1]
    with warnings.catch_warnings():              # '\d' is a str that the compiler warns about
        warnings.simplefilter("ignore")
        try:
            return ast.literal_eval(token)       # of one string token: nothing nests in it
        except (SyntaxError, ValueError):
            raise ValueError(f"not a literal: {token[:20]!r}") from None


def _number(token):
    if len(token) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    try:
        if token[-1] in "jJ":
            return complex(token)
        if token[:2].lower() in ("0x", "0o", "0b") or not re.search("[.eE]", token):
            return int(token, 0)
        return float(token)
    except ValueError:
        raise ValueError(f"not a number: {token[:20]!r}") from None


def parse_literal(text, limit=None):
    """The value of a Python literal: None, bool, int, float, complex, str, bytes, and tuples,
    lists, dicts and sets of these. Infinity is 1e309, the empty set set(). A bare `1, 2` is a
    tuple. Safe on hostile text, in any process. Raises ValueError, with one line, for all else.
    """
    reader = _Reader(text, MAX_TEXT if limit is None else limit)
    values, comma = reader.items("", 0)
    if not values:
        raise ValueError("empty, not a literal")
    return tuple(values) if comma else values[0]


def _parse_call(text):
    """(args, kwargs) of an input made of literals only; ValueError if it is not."""
    reader = _Reader(text, MAX_TEXT)
    args, kwargs = [], {}
    while reader.peek() != "":
        if reader.tokens[-1][0] == "name" and reader.tokens[-2][1] == "=":
            name = reader.take()[1]
            reader.take("=")
            if name in kwargs:
                raise ValueError("keyword argument repeated")
            kwargs[name] = reader.value(0)
        elif kwargs:
            raise ValueError("positional argument after a keyword argument")
        else:
            args.append(reader.value(0))
        if reader.peek() != "":
            reader.take(",")
    return tuple(args), kwargs


def literal(value, limit=None):
    """The canonical literal of a value: parse_literal(literal(v)) equals v, and each value has
    one text. Dicts keep their order, sets are sorted. Counter, OrderedDict and defaultdict, which
    programs return all the time, are told as the dict that they are equal to. Raises ValueError,
    with one line, for a value that does not come back equal (nan, any other class), and for a
    text over `limit` characters or more than MAX_DEPTH deep.
    """
    return _write(value, 0, [MAX_TEXT if limit is None else limit], True)


def same(a, b):
    """Whether two values are the same literal value: equal, and of equal types all the way down.
    True is not 1, 1 is not 1.0, (1,) is not [1]; nan is nothing; order in dicts and sets does
    not count. Never calls code of the values' classes: values of other types are not the same.
    """
    try:
        return (_write(a, 0, [100 * MAX_TEXT], False) == _write(b, 0, [100 * MAX_TEXT], False))
    except ValueError:
        return False


def _write(value, depth, room, ordered):
    """Text of `value`; `room` holds the characters left, which also ends what refers to itself.
    Not ordered: dicts sorted and -0.0 as 0.0, so that equal values have equal texts."""
    kind = type(value)
    if kind is bool or value is None:
        text = repr(value)
    elif kind is int:
        if value.bit_length() > 14284:                   # 4300 digits
            raise ValueError(f"an int of more than {MAX_DIGITS} digits has no literal")
        text = repr(value)
    elif kind is float or kind is complex:
        if value != value:
            raise ValueError("nan is equal to nothing, not even itself")
        text = repr(value + 0 if kind is complex or not ordered else value)
        text = text.replace("inf", "1e309")
    elif kind is str or kind is bytes:
        text = repr(value) if len(value) <= room[0] else value
    elif depth >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep, or contains itself")
    elif kind is list or kind is tuple or kind is set:
        parts = []
        for item in value:
            room[0] -= 2
            parts.append(_write(item, depth + 1, room, ordered))
        room[0] -= 2
        if kind is set:
            parts = [part for _, part in sorted(zip(map(_rank, value), parts))]
        if kind is list:
            return "[" + ", ".join(parts) + "]"
        if kind is set:
            return "{" + ", ".join(parts) + "}" if parts else "set()"
        return "(" + ", ".join(parts) + (",)" if len(parts) == 1 else ")")
    elif (kind is dict or kind is collections.Counter or kind is collections.defaultdict
          or kind is collections.OrderedDict):           # `in` would ask a metaclass
        parts = []
        for key, item in value.items():
            room[0] -= 4
            parts.append(_write(key, depth + 1, room, ordered) + ": "
                         + _write(item, depth + 1, room, ordered))
        room[0] -= 2
        return "{" + ", ".join(parts if ordered else sorted(parts)) + "}"
    else:
        raise ValueError(f"a value of type {_name(kind)} has no literal")
    room[0] -= len(text)
    if room[0] < 0:
        raise ValueError("longer than the limit")
    return text


def _rank(item):
    """Where a member stands in its set's text: numbers first and by size."""
    return (0, item) if type(item) in (bool, int, float) else (1, 0)


def _name(kind):
    """A class's name for a message, without asking its metaclass."""
    return type.__dict__["__name__"].__get__(kind)[:80]


# ---------------------------------------------------------------------------------------------
# The caller's side.

_SEEDS = (1, 2, 3, 4)          # hash seeds; run uses the first, so its results can be repeated
_PATIENCE = 100                # a worker silent for this many timeouts, and a minute, is dead
_HERE = os.path.abspath(__file__)
_BOOT = ("import sys, marshal; sys.path[:] = [p for p in sys.path if p]; "
         "scope = {'__name__': 'sandbox', '__file__': sys.argv[1]}; "
         "exec(marshal.loads(sys.stdin.buffer.read(int(sys.argv[2]))), scope); "
         "scope['_work'](sys.argv[3])")


@functools.lru_cache(None)
def _code():
    """This file, compiled: workers that compile it start later, and grow, and fork more slowly."""
    with open(_HERE, encoding="utf-8") as file:
        return marshal.dumps(compile(file.read(), "sandbox", "exec", optimize=2))


class Executor:
    """Runs programs in sandboxed processes, `workers` at once (None: one a core).

    timeout    seconds of one run, counted from its own start; time that it spends waiting for a
               core does not count, so that a busy machine gives the same verdicts as an idle one
    memory_mb  memory of one run, on top of the interpreter's
    allow      modules that programs may import beside ALLOWED; what they can do, the walls of the
               system must hold back alone
    max_text   characters in a program, an input, or an output

    Use it as a context manager, or call close(). Not for several threads at once. Warns once, at
    the start, if this system denies the sandbox a wall; raises OSError where there is no fork.
    """

    def __init__(self, workers=None, timeout=10.0, memory_mb=1024, *, allow=(),
                 max_text=MAX_TEXT, _layers=None):
        if not hasattr(os, "fork"):
            raise OSError("the sandbox needs os.fork, which this system lacks")
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self._size = cores if workers is None else workers
        if self._size < 1 or timeout <= 0 or memory_mb < 1:
            raise ValueError("workers, timeout and memory_mb must be positive")
        self._timeout = timeout
        self._max_text = max_text
        self._config = [timeout, memory_mb, _LAYERS if _layers is None else _layers,
                        sorted(ALLOWED.union(allow)), max_text]
        self._pools = {seed: [] for seed in _SEEDS}
        self._closed = False
        weak = set()
        for worker in self._pool(_SEEDS[0], self._size):
            if not worker.ready():
                self.close()
                raise RuntimeError("a sandbox worker did not start")
            weak.update(worker.weak)
        if weak:
            warnings.warn("this system denies the sandbox some of its walls; programs could: "
                          + "; ".join(sorted(weak)), RuntimeWarning, stacklevel=2)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Ends the workers and all that they run. May be called again; nothing else may."""
        self._closed = True
        for pool in self._pools.values():
            while pool:
                pool.pop().kill()

    def run(self, jobs):
        """The value of f(<input>) for each (program, input), as Executions in the same order.

        program  the text of a Python program that defines f
        input    what stands between the parentheses of the call: positional and keyword
                 arguments, literals or expressions. Expressions are evaluated once, in a process
                 of their own that knows the builtins and not the program, to literal values; only
                 those reach the program, which cannot see the text.

        Both are text from anywhere; what they do wrong is told by the status. Raises TypeError
        if they are not str, RuntimeError if the Executor is closed.
        """
        return [execution for execution, _ in self._run(jobs, _SEEDS[0])]

    def validate(self, jobs):
        """Like run, but ok only if f(<input>) returns the same value in fresh processes with
        other hash seeds, addresses, clocks and random states: two of them, or four if the
        program uses what can show the order of a hash table or an address."""
        jobs = list(jobs)
        results = self._run(jobs, _SEEDS[0])
        for seed in _SEEDS[1:]:
            again = [i for i, (execution, suspect) in enumerate(results)
                     if execution.ok and (suspect or seed == _SEEDS[1])]
            for i, (second, _) in zip(again, self._run([jobs[i] for i in again], seed)):
                first, suspect = results[i]
                if second.status in ("ok", "error", "unrepresentable"):
                    if second.output == first.output or second.ok and same(
                            parse_literal(first.output, self._max_text),
                            parse_literal(second.output, self._max_text)):
                        continue
                    second = Execution("nondeterministic", "", "two runs of it differ",
                                       second.seconds)
                results[i] = second, suspect
        return [execution for execution, _ in results]

    def _pool(self, seed, size):
        """The workers with this hash seed: all alive, and at least `size`."""
        if self._closed:
            raise RuntimeError("this Executor is closed")
        pool = self._pools[seed]
        for worker in [worker for worker in pool if worker.process.poll() is not None]:
            self._discard(worker, seed)
        while len(pool) < size:
            pool.append(_Worker(self._config + [seed]))
        return pool

    def _discard(self, worker, seed):
        self._pools[seed].remove(worker)
        worker.kill()

    def _run(self, jobs, seed):
        """[(Execution, whether it is suspect of showing an order or an address)]"""
        jobs = list(jobs)
        results = [None] * len(jobs)
        queue = collections.deque()
        for i, (program, text) in enumerate(jobs):
            if not (isinstance(program, str) and isinstance(text, str)):
                raise TypeError("a job is a pair of str: program, input")
            if max(len(program), len(text)) > self._max_text:
                results[i] = Execution(
                    "syntax", "", f"over {self._max_text} characters", 0.0), False
            else:
                queue.append(i)
        idle = list(self._pool(seed, min(self._size, len(queue))))
        busy = {}                                     # fd: (worker, job, when to give it up)
        tried = set()
        try:
            while queue or busy:
                while queue and len(busy) < self._size:
                    worker = idle.pop() if idle else self._pool(seed, len(busy) + 1)[-1]
                    i = queue.popleft()
                    limit = time.monotonic() + _PATIENCE * self._timeout + 60
                    busy[worker.replies] = worker, i, limit
                    worker.send(jobs[i])
                heard = _poll(busy, 10)
                for fd in heard or [fd for fd in busy if time.monotonic() > busy[fd][2]]:
                    worker, i, _ = busy[fd]
                    reply = _receive(fd) if heard else None
                    if reply:
                        results[i] = Execution(*reply[:4]), reply[4]
                        idle.append(worker)
                    else:                             # it died; its job gets a second chance
                        self._discard(worker, seed)
                        if i in tried:
                            results[i] = Execution("killed", "", "its worker died, twice", 0), False
                        else:
                            tried.add(i)
                            queue.append(i)
                    del busy[fd]
        finally:                                      # Ctrl-C: no stale reply may stay behind
            for worker, *_ in busy.values():
                if worker in self._pools[seed]:
                    self._discard(worker, seed)
        return results


class _Worker:
    """The caller's handle on a worker process."""

    def __init__(self, config):
        import subprocess                             # not in the workers: it makes forks slower
        # A lean start: not the caller's environment, directory, descriptors, terminal or
        # memory, and no site-packages.
        environment = {"PYTHONHASHSEED": str(config[-1])}
        if "LD_LIBRARY_PATH" in os.environ:           # some interpreters do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT, _HERE,
             str(len(_code())), json.dumps(config)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0, cwd="/", env=environment, start_new_session=True)
        self.replies = self.process.stdout.fileno()
        self.weak = None
        try:
            _write_all(self.process.stdin.fileno(), _code())
        except BrokenPipeError:
            pass                                      # it died: ready will say so

    def ready(self):
        """Waits for the end of its start; False if it died or does not come to life."""
        if self.weak is None and _poll([self.replies], 60):
            self.weak = _receive(self.replies)
        return self.weak is not None

    def send(self, job):
        try:
            if self.ready():
                _send(self.process.stdin.fileno(), job)
            else:
                self.process.kill()
        except BrokenPipeError:
            pass                                      # it died: its end of the pipe will say so

    def kill(self):
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _poll(fds, seconds):
    """Those of the descriptors that have something to read, or an end."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(seconds * 1000)]


def _send(fd, message):
    data = json.dumps(message).encode()
    _write_all(fd, struct.pack(">I", len(data)) + data)


def _write_all(fd, data):
    while data:
        data = data[os.write(fd, data):]


def _receive(fd):
    """The next message, or None at the end of the stream."""
    size = _read(fd, 4)
    data = size and _read(fd, struct.unpack(">I", size)[0])
    return json.loads(data) if data else None


def _read(fd, size):
    data = b""
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            return None
        data += more
    return data


# ---------------------------------------------------------------------------------------------
# The worker: a lean interpreter inside the walls, which forks a fresh process for each run.

_LAYERS = ("namespaces", "landlock", "seccomp", "guards")
_NOBODY = 65534
_REPORTS = ("ok", "syntax", "error", "memory", "unsafe", "unrepresentable")
_OUT_OF_MEMORY = 77            # exit status of a run that has no memory left to say so
# Seldom used, and each loaded module makes each fork slower: imported by the runs that do.
_LAZY = {"statistics", "array", "cmath", "difflib", "graphlib", "html", "pprint", "textwrap",
         "unicodedata", "__future__"}
_LIBRARY = os.path.dirname(os.path.realpath(os.__file__))
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# System calls open to a run, x86-64 and arm64 (None: does not exist there). It can compute, get
# memory, read the library, and write its result; all the rest fails with EPERM.
_SYSCALLS = dict(
    read=(0, 63), write=(1, 64), close=(3, 57), stat=(4, None), fstat=(5, 80), lstat=(6, None),
    lseek=(8, 62), mmap=(9, 222), mprotect=(10, 226), munmap=(11, 215), brk=(12, 214),
    rt_sigaction=(13, 134), rt_sigprocmask=(14, 135), rt_sigreturn=(15, 139), pread64=(17, 67),
    access=(21, None), sched_yield=(24, 124), mremap=(25, 216), madvise=(28, 233),
    getpid=(39, 172), exit=(60, 93), getcwd=(79, 17), gettimeofday=(96, 169),
    getrusage=(98, 165), getuid=(102, 174), getgid=(104, 176), geteuid=(107, 175),
    getegid=(108, 177), sigaltstack=(131, 132), gettid=(186, 178), time=(201, None),
    futex=(202, 98), getdents64=(217, 61), clock_gettime=(228, 113), clock_getres=(229, 114),
    exit_group=(231, 94), openat=(257, 56), newfstatat=(262, 79), readlinkat=(267, 78),
    faccessat=(269, 48), getrandom=(318, 278), statx=(332, 291), rseq=(334, 293))
# Those that a worker needs too. A run inherits them where the worker is behind the filter, which
# is only where it is alone in a pid namespace: it may not have processes, and can signal nobody.
_WORKER_SYSCALLS = dict(
    dup2=(33, None), dup3=(292, 24), pipe2=(293, 59), poll=(7, None), ppoll=(271, 73),
    clone=(56, 220), fork=(57, None), wait4=(61, 260), kill=(62, 129), prlimit64=(302, 261),
    close_range=(436, 436), set_robust_list=(273, 99), fcntl=(72, 25), ioctl=(16, 29))


def _work(config):
    """The whole life of a worker process."""
    global ALLOWED, MAX_TEXT                          # of this process: its Executor's own
    *walls, allowed, MAX_TEXT, seed = json.loads(config)
    ALLOWED = frozenset(allowed)
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.environ.clear()
    _Sandbox(requests, replies, *walls, seed).serve()


class _Sandbox:

    def __init__(self, requests, replies, timeout, memory_mb, layers, seed):
        import resource                               # of Unix only
        self.requests, self.replies, self.layers = requests, replies, layers
        self.timeout, self.memory, self.seed = timeout, memory_mb << 20, seed
        self.setrlimit, self.cpu = resource.setrlimit, resource.RLIMIT_CPU
        self.processes = resource.RLIMIT_NPROC
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.linux = sys.platform == "linux"
        self.proc = os.open("/proc", os.O_RDONLY) if os.path.isdir("/proc/self") else None
        self.alone = self.mounted = False             # in a pid namespace; in a root of our own
        root = os.geteuid() == 0
        if self.linux and "namespaces" in layers:
            self.enter_namespaces()
        self.warm_up()
        if self.alone:
            self.mounted = self.attempt(self.enter_root)
        self.ruleset, self.scoped = self.landlock() if "landlock" in layers else (None, False)
        self.filter = self.seccomp() if "seccomp" in layers else None
        self.guards = _Guards(seed, "guards" in layers)
        limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0),
                  (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_STACK, 8 << 20),
                  (resource.RLIMIT_AS, self.memory + self.mapped())]
        bounded = [self.attempt(self.limit, *each) for each in limits][-1]
        self.drop_privileges(root)
        self.known = {}
        if self.mounted:
            self.enter_walls()
        if self.job("def f():\n    return 1", "")[0] != "ok":
            self.filter = self.ruleset = None         # runs do not live with what this kernel has
            if self.mounted:
                os._exit(1)
        gc.collect()
        gc.freeze()
        self.attempt(self.call, "malloc_trim", 0)     # each page in use makes each fork slower
        quiet = self.alone or self.filter
        _send(replies, [promise for promise, kept in [
            ("reach the network", quiet), ("use more memory than its limit", bounded),
            ("read files of this user", self.mounted or self.ruleset is not None),
            ("change files of this user", self.mounted or self.ruleset is not None),
            ("signal processes of this user", quiet or self.scoped),
            ("leave processes behind", quiet or self.linux)] if not kept])

    # -- walls ------------------------------------------------------------------------------

    def attempt(self, step, *arguments):
        """Whether a step that a system may refuse was done."""
        try:
            step(*arguments)
        except (OSError, ValueError, AttributeError):
            return False
        return True

    def call(self, name, *arguments):
        """A C function that answers -1, with errno, when it is refused."""
        arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result = getattr(self.libc, name)(*arguments)
        if result == -1:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(self, option, value):
        self.call("prctl", option, value, 0, 0, 0)

    def limit(self, what, value):
        import resource
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        self.setrlimit(what, (value, value))

    def mapped(self):
        """Address space in use before a run, which its limit comes on top of."""
        if self.proc is None:
            return 0
        with open(os.open("self/statm", os.O_RDONLY, dir_fd=self.proc)) as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")

    def enter_namespaces(self):
        """Own process ids, network, mounts and ipc. Goes on in a child, which is process 1 of
        the new pid namespace: when it ends, the kernel kills all that is left in there."""
        everything = 0x20000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
        uid, gid = os.geteuid(), os.getegid()
        if not self.attempt(self.call, "unshare", everything):
            if not self.attempt(self.call, "unshare", everything | 0x10000000):
                return
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                               ("gid_map", f"{gid} {gid} 1")):
                self.attempt(self.write_own, name, text)
        self.attempt(self.prctl, 1, signal.SIGKILL)   # PR_SET_PDEATHSIG: not without the caller
        pid = os.fork()
        if pid:
            os.closerange(3, 64)                      # its ends of the pipes tell of the child
            os.waitpid(pid, 0)
            os._exit(0)
        self.alone = True

    def write_own(self, name, text):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def enter_root(self):
        """A root directory with nothing in it but the library, read-only."""
        keep = 2 | 4 | (os.statvfs(_LIBRARY).f_flag & (8 | 1024 | 2048 | 4096))

        def mount(source, target, *rest):
            self.call("mount", source and source.encode(), target.encode(), *rest)

        mount(None, "/", None, 0x4000 | 0x40000, None)                    # private, all of it
        mount("none", "/proc", b"tmpfs", 2 | 4 | 8, b"size=256k,mode=755")
        os.makedirs("/proc" + _LIBRARY)
        mount(_LIBRARY, "/proc" + _LIBRARY, None, 0x1000 | 0x4000, None)     # bind
        mount(None, "/proc" + _LIBRARY, None, 0x1000 | 0x20 | 1 | keep, None)
        mount(None, "/proc", None, 0x1000 | 0x20 | 1 | 2 | 4 | 8, None)
        os.chdir("/proc")
        self.call("pivot_root", b".", b".")
        self.call("umount2", b".", 2)                                        # detach
        os.chdir("/")

    def landlock(self):
        """(ruleset, whether it also holds signals back); each run restricts itself with it."""
        try:
            abi = self.call("syscall", 444, None, 0, 1)
            files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
            attributes = struct.pack("QQQ", files, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
            ruleset = self.call("syscall", 444, attributes, len(attributes), 0)
            library = os.open(_LIBRARY, os.O_RDONLY)
            beneath = struct.pack("=Qi", 4 | 8, library)                     # read file, dir
            self.call("syscall", 445, ruleset, 1, beneath, 0)
            os.close(library)
            if self.mounted:                          # for the worker; no run has a way there
                beneath = struct.pack("=Qi", 4 | 8, self.proc)
                self.call("syscall", 445, ruleset, 1, beneath, 0)
        except OSError:
            return None, False
        return ruleset, abi >= 6

    def seccomp(self):
        """The filter of system calls, for each run to enter; None if the system has none."""
        machine = os.uname().machine
        if not self.linux or machine not in _AUDIT_ARCH or sys.maxsize < 1 << 32:
            return None
        table = {**_SYSCALLS, **(_WORKER_SYSCALLS if self.mounted else {})}
        numbers = [pair[machine == "aarch64"] for pair in table.values()]
        numbers = [number for number in numbers if number is not None]
        code = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, _AUDIT_ARCH[machine]),
                (0x20, 0, 0, 0)]
        code += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
        code += [(0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]         # EPERM, allow
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
        return ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", len(code), ctypes.addressof(self.code)))

    def enter_walls(self):
        """Landlock and seccomp: once in the worker where it is alone, else in each run."""
        if self.ruleset is not None:
            self.call("syscall", 446, self.ruleset, 0)
        if self.filter:
            self.call("prctl", 22, 2, self.filter, 0, 0)

    def drop_privileges(self, root):
        if root:
            for step, value in ((os.setgroups, []), (os.setgid, _NOBODY), (os.setuid, _NOBODY)):
                self.attempt(step, value)
        if self.linux:
            self.attempt(self.call, "capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
            self.attempt(self.prctl, 38, 1)           # PR_SET_NO_NEW_PRIVS
            self.attempt(self.prctl, 4, 0)            # PR_SET_DUMPABLE: no ptrace
            self.attempt(self.prctl, 36, 1)           # PR_SET_CHILD_SUBREAPER: no orphans
            self.attempt(self.prctl, 1, signal.SIGKILL)   # PR_SET_PDEATHSIG

    def warm_up(self):
        """Imports and first uses, once and not in each run."""
        for name in sorted(ALLOWED - _LAZY):
            importlib.import_module(name)
        warnings.simplefilter("ignore")
        # Different addresses and free lists in each worker, also where addresses are not random.
        self.ballast = []
        for make in (object, lambda: 2.0 * len(self.ballast), *[lambda n=n: bytes(n)
                                                                for n in range(1, 487, 16)]):
            self.ballast += [make() for _ in range(os.urandom(1)[0])]
        call = _parse_call("'a', b=[1, {2: 3.5}]")
        _parse(f"import re\ndef f(a, b):\n    return {{a}}, {literal(call)}", "exec")

    # -- runs -------------------------------------------------------------------------------

    def serve(self):
        while True:
            job = _receive(self.requests)
            if job is None:
                os._exit(0)
            _send(self.replies, self.job(*job))

    def job(self, program, text):
        """(status, output, error, seconds, suspect)"""
        spent = 0.0
        try:
            call = _parse_call(text)
        except ValueError:                            # not literals: an expression
            status, output, error, spent, _ = self.supervise(_evaluate, text, 0.0)
            if status != "ok":
                return status, "", "input: " + error, spent, False
            call = parse_literal(output)
            if not (type(call) is tuple and list(map(type, call)) == [tuple, dict]
                    and set(map(type, call[1])) <= {str}):
                return "unsafe", "", "input: forged its value", spent, False
        del text
        # Hostile text is parsed in runs only. But a text that did no harm to a run that parsed it
        # does none to the worker, and the next runs of the program need not parse it again.
        if program in self.known and not self.known[program]:
            self.known[program] = _parse(program, "exec")
        result = self.supervise(_execute, (program, self.known.get(program), call), spent)
        if result[0] == "ok" and len(program) < MAX_TEXT // 10 and program not in self.known:
            if len(self.known) >= 256:
                self.known.clear()
            self.known[program] = None
        return result

    def supervise(self, what, argument, spent):
        """Forks a run of `what`, waits for its end, and judges it."""
        nonce = os.urandom(16)
        source, sink = os.pipe()
        start = time.monotonic() - spent
        pid = os.fork()
        if pid == 0:
            self.child(what, argument, sink, nonce)
        os.close(sink)
        data = self.collect(source, start)
        os.close(source)
        seconds = time.monotonic() - start
        code, cpu = self.sweep(pid)
        status, output, error, suspect = "killed", "", "", False
        if data is None or code == -signal.SIGKILL and cpu >= self.timeout:
            status, error = "timeout", f"no value within {self.timeout:g} s"
        elif data.startswith(nonce):
            status, output, error, suspect = self.open(data[16:])
        elif data:
            status, error = "unsafe", "wrote on the pipe of its result"
        elif code == _OUT_OF_MEMORY:
            status, error = "memory", "out of memory"
        elif code < 0:
            error = f"its process died of {signal.Signals(-code).name}"
        else:
            error = f"its process ended without a result (exit status {code})"
        return status, output, error, seconds, suspect

    def open(self, data):
        """Reads a run's report, believing nothing that it can check."""
        try:
            status, suspect, error, output = data.decode().split("\0", 3)
            if status not in _REPORTS or status == "ok" and literal(
                    parse_literal(output)) != output:
                raise ValueError("not a report")
        except ValueError:
            return "unsafe", "", "forged its result", False
        return status, output, error, bool(suspect)

    def collect(self, source, start):
        """What a run reports until it closes its pipe; None if its time is over before."""
        data, waited = b"", 0.0
        poller = select.poll()
        poller.register(source, select.POLLIN)
        poller.register(self.requests, 0)             # only its end is of interest
        while len(data) <= 10 * MAX_TEXT:
            left = start + self.timeout + waited - time.monotonic()
            ready = dict(poller.poll(max(left, 0) * 1000))
            if self.requests in ready:                # the caller is gone
                self.kill_children()
                os._exit(0)
            if ready:
                more = os.read(source, 1 << 16)
                if not more:
                    return data
                data += more
            elif left <= 0:
                before, waited = waited, self.waited()
                if waited < before + 0.01:
                    return None
        return data

    def children(self):
        """Process ids of the children, as /proc knows them (which may be another namespace)."""
        own = os.readlink("self", dir_fd=self.proc)
        for name in os.listdir(self.proc):
            if name.isdigit():
                try:
                    with open(os.open(name + "/stat", os.O_RDONLY, dir_fd=self.proc)) as file:
                        if file.read().rpartition(")")[2].split()[1] == own:
                            yield name
                except OSError:                       # it ended meanwhile
                    pass

    def waited(self):
        """Seconds that the run was ready to run and had to wait for a core."""
        waited = 0.0
        for name in self.children() if self.proc is not None else ():
            try:
                with open(os.open(name + "/schedstat", os.O_RDONLY, dir_fd=self.proc)) as file:
                    waited += int(file.read().split()[1]) / 1e9
            except OSError:                           # a kernel that does not tell
                pass
        return waited

    def kill_children(self):
        if self.alone:
            self.attempt(os.kill, -1, signal.SIGKILL)
        elif self.proc is not None:
            for name in self.children():
                self.attempt(os.kill, int(name), signal.SIGKILL)

    def sweep(self, pid):
        """Kills the run and all that it started; (exit code, cpu seconds) of the run."""
        os.kill(pid, signal.SIGKILL)
        if not self.alone:
            self.attempt(os.killpg, pid, signal.SIGKILL)
        _, code, usage = os.wait4(pid, 0)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    self.kill_children()
            except ChildProcessError:
                return os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime

    def child(self, what, argument, sink, nonce):
        """The whole life of a run."""
        try:
            os.dup2(sink, 3)
            self.setrlimit(self.processes, (0, 0))
            if not self.alone:                        # else the end of the worker is its end
                os.setsid()
                seconds = int(self.timeout) + 2
                self.setrlimit(self.cpu, (seconds, seconds))
                self.attempt(self.prctl, 1, signal.SIGKILL)               # PR_SET_PDEATHSIG
            if not self.mounted:
                self.enter_walls()
            os.closerange(4, 64)
            what(argument, _Report(nonce), self.guards)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        finally:
            os._exit(1)


# ---------------------------------------------------------------------------------------------
# The run: what happens in the forked process.


class _Report:
    """Tells the worker how the run ended, and ends it."""

    def __init__(self, nonce):
        self.nonce = nonce

    def __call__(self, status, error="", output="", suspect="", write=_write_all, leave=os._exit):
        error = " ".join(error.replace("\0", " ").split())[:300]
        text = "\0".join([status, suspect, error, output])
        write(3, self.nonce + text.encode("utf-8", "backslashreplace"))
        leave(0)


# Attributes by which programs walk out of their namespace, and functions that hand out modules.
_WALKS = frozenset("""__import__ __subclasses__ __globals__ __builtins__ __loader__ __spec__
    __code__ __closure__ f_globals f_builtins f_locals f_back tb_frame gi_frame cr_frame
    ag_frame""".split())
# Names that make the order of a hash table, or an address, visible.
_ORDERS = frozenset("set frozenset hash id keys items object repr vars dir".split())
# A text of ASCII without any of this has nothing that the walk over its tree would find.
_NEEDS_WALK = re.compile(r"import|__|frame|\bf_|\{|[^\x00-\x7f]|\b(?:%s)\b" % "|".join(_ORDERS))
# What the interpreter's audit events say of a program that no task may do; a prefix each.
_EVENTS = ("os.", "open", "subprocess.", "socket.", "ctypes.", "shutil.", "signal.", "pty.",
           "fcntl.", "resource.", "mmap.", "syslog.", "gc.", "sys.settrace", "sys.setprofile",
           "sys._current", "sys.addaudithook", "builtins.input", "builtins.breakpoint",
           "time.sleep", "tempfile.", "glob.", "pathlib.", "sqlite3.", "urllib.", "webbrowser.")


def _allowed(name):
    return name.partition(".")[0] in ALLOWED


def _parse(text, mode):
    """(code, what makes it unsafe or None, whether it is suspect), from one walk of its tree."""
    if mode == "exec" and not _NEEDS_WALK.search(text):
        return compile(text, "<program>", mode), None, False
    tree = ast.parse(text, "<program>", mode)
    if mode == "eval":                                # f(…) alone: the text cannot leave the call
        function = getattr(tree.body, "func", None)
        if not (isinstance(function, ast.Name) and function.lineno == 1):
            raise SyntaxError("not the arguments of one call")
        function.id = "<call>"                        # a name that the text cannot use
    unsafe, suspect = None, False
    for node in ast.walk(tree):
        kind, modules = type(node), ()
        if kind is ast.Import:
            modules = [alias.name for alias in node.names]
        elif kind is ast.ImportFrom:
            modules = ["." if node.level else node.module]
            modules += [alias.name for alias in node.names
                        if alias.name in sys.stdlib_module_names]
        elif kind is ast.Name or kind is ast.Attribute:
            name = node.id if kind is ast.Name else node.attr
            if name in _WALKS:
                unsafe = unsafe or f"uses {name}"
            suspect = suspect or name in _ORDERS
        elif kind is ast.Set or kind is ast.SetComp:
            suspect = True
        for name in modules:
            if not _allowed(name):
                unsafe = unsafe or f"imports {name}"
    return compile(tree, "<program>", mode), unsafe, suspect


def _has_set(value):
    kind = type(value)
    return kind is set or kind in (list, tuple, dict) and any(
        map(_has_set, value.values() if kind is dict else value))


def _describe(error):
    """One line on an exception, without calling code of its class."""
    arguments = BaseException.args.__get__(error)
    text = arguments[0] if arguments else ""
    if type(text) is not str:
        try:
            text = literal(text, 200)
        except ValueError:
            text = ""
    return _name(type(error)) + (": " + text[:200] if text else "")


class _Guards:
    """Made in the worker, since it is cheaper than in each run; each run arms its own copy."""

    def __init__(self, seed, guards):
        # id() differs between seeds even where addresses do not.
        mask = (seed % 2) * ((1 << 47) - 1)
        self.builtins = dict(vars(builtins), id=lambda thing, /: id(thing) ^ mask)
        self.report = None
        self.on = guards
        if guards:
            self.builtins["__import__"] = self.load
            sys.addaudithook(self.watch)

    def load(self, name, globals=None, locals=None, fromlist=(), level=0):
        """The program's own import statement; modules that it loads use another."""
        if level or not _allowed(name):
            self.report("unsafe", f"imports {name}")
        return builtins.__import__(name, globals, locals, fromlist, level)

    def watch(self, event, arguments):
        if self.report and event.startswith(_EVENTS):
            if event in ("open", "os.listdir", "os.scandir"):
                path = arguments[0]                   # of a lazy import, or "<string>" of a
                if type(path) is str and path.startswith((_LIBRARY, "<")) and ".." not in path:
                    return                            # syntax error
            self.report("unsafe", f"attempted {event}")

    def attempt(self, report, unsafe, action):
        """Does what hostile code says, and reports every way in which it can fail."""
        if self.on:
            self.report = report
            if unsafe:
                report("unsafe", unsafe)
        try:
            return action()
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except BaseException as error:     # SystemExit and KeyboardInterrupt are no way out either
            report("error", _describe(error))


def _compiled(report, text, mode):
    try:
        return _parse(text, mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        report("syntax", _describe(error))


def _returned(report, value, suspect):
    try:
        report("ok", "", literal(value), suspect and "suspect")
    except ValueError as error:
        report("unrepresentable", str(error))


def _evaluate(text, report, guards):
    """Reports the literal of (args, kwargs), for an input."""
    code, unsafe, _ = _compiled(report, f"f(\n{text}\n)", "eval")
    scope = {"__builtins__": guards.builtins, "<call>": lambda *a, **k: (a, k)}
    _returned(report, guards.attempt(report, unsafe, lambda: eval(code, scope)), "")


def _execute(job, report, guards):
    """Reports the value of f, for a program and (args, kwargs)."""
    program, known, (args, kwargs) = job
    code, unsafe, suspect = known or _compiled(report, program, "exec")
    module = types.ModuleType("program")              # classes look their module up
    sys.modules["program"] = module
    scope = vars(module)
    scope["__builtins__"] = guards.builtins

    def action():
        exec(code, scope)
        if "f" not in scope:
            raise NameError("the program defines no f")
        return scope["f"](*args, **kwargs)

    suspect = "suspect" if suspect or _has_set((args, tuple(kwargs.values()))) else ""
    _returned(report, guards.attempt(report, unsafe, action), suspect)
