"""A sandbox for Python programs written by language models: one file, standard library only."""

import ast
import base64
import builtins
import collections
import ctypes
import gc
import importlib
import json
import math
import os
import re
import select
import signal
import struct
import subprocess
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
    numbers operator pprint re reprlib statistics string struct textwrap types typing unicodedata
    zlib""".split())

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
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} brackets deep")
        kind, text = self.take()
        if kind == "string":
            return self.string(text)
        if kind in ("number", "sign"):
            return self.number(kind, text)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
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


def parse_literal(text, limit=MAX_TEXT):
    """The value of a Python literal: None, bool, int, float, complex, str, bytes, and tuples,
    lists, dicts and sets of these. Infinity is 1e309, the empty set set(). A bare `1, 2` is a
    tuple. Safe on hostile text, in any process. Raises ValueError, with one line, for all else.
    """
    reader = _Reader(text, limit)
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


# Of these three, a dict is told: they are equal to it, and programs return them all the time.
_DICTS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)


def literal(value, limit=MAX_TEXT):
    """The canonical literal of a value: parse_literal(literal(v)) equals v, and each value has
    one text. Dicts keep their order, sets are sorted. Counter, OrderedDict and defaultdict count
    as dicts. Raises ValueError, with one line, for a value that does not come back equal (nan,
    any other class), and for a text over `limit` characters or more than MAX_DEPTH deep.
    """
    return _write(value, 0, [limit], True)


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
    elif kind in _DICTS:
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


class Executor:
    """Runs programs in sandboxed processes, `workers` at once (None: one a core).

    timeout    seconds of one run, counted from its own start; time spent waiting for a core is
               not counted
    memory_mb  memory of one run, on top of the interpreter's

    Use it as a context manager, or call close(). Not for use by several threads at once.
    """

    def __init__(self, workers=None, timeout=10.0, memory_mb=1024, *, _layers=None):
        if not hasattr(os, "fork"):
            raise OSError("the sandbox needs os.fork, which this system lacks")
        self._size = workers or len(os.sched_getaffinity(0)
                                    if hasattr(os, "sched_getaffinity") else "x" * os.cpu_count())
        if self._size < 1 or timeout <= 0 or memory_mb < 1:
            raise ValueError("workers, timeout and memory_mb must be positive")
        self.timeout, self.memory_mb, self._layers = timeout, memory_mb, _layers
        self._pools = {seed: [] for seed in _SEEDS}
        self._closed = False
        pool = self._pool(_SEEDS[0], self._size)
        weak = sorted({promise for worker in pool for promise in worker.weak()})
        if weak:
            warnings.warn("this system denies the sandbox some of its walls; weaker: "
                          + "; ".join(weak), RuntimeWarning, stacklevel=2)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Ends the workers and all they run. May be called twice."""
        self._closed = True
        for pool in self._pools.values():
            for worker in pool:
                worker.kill()
            pool.clear()

    def run(self, jobs):
        """The value of f(<input>) for each (program, input), as Executions in the same order.

        program  the text of a Python program that defines f
        input    what stands between the parentheses of the call: positional and keyword
                 arguments, literals or expressions. Expressions are evaluated once, in a process
                 of their own that knows the builtins but not the program, to literal values; only
                 those reach the program, which cannot see the text.
        """
        return [execution for execution, _ in self._run(jobs, _SEEDS[0])]

    def validate(self, jobs):
        """Like run, but ok only if f(<input>) returns the same value in fresh processes with
        other hash seeds, addresses, clocks and random states: two of them, or four if the
        program uses what can show the order of a hash table."""
        jobs = list(jobs)
        results = self._run(jobs, _SEEDS[0])
        for seed in _SEEDS[1:]:
            again = [i for i, (execution, suspect) in enumerate(results)
                     if execution.ok and (suspect or seed == _SEEDS[1])]
            for i, (second, _) in zip(again, self._run([jobs[i] for i in again], seed)):
                first, suspect = results[i]
                if first.output != second.output and not (
                        second.ok and same(parse_literal(first.output),
                                           parse_literal(second.output))):
                    if second.status in ("ok", "error", "unrepresentable"):
                        second = Execution("nondeterministic", "", "two runs of it differ",
                                           second.seconds)
                    results[i] = second, suspect
        return [execution for execution, _ in results]

    def _pool(self, seed, size):
        """The pool of workers with this hash seed, of at least `size`, all alive and ready."""
        if self._closed:
            raise RuntimeError("this Executor is closed")
        pool = self._pools[seed]
        pool[:] = [worker for worker in pool if worker.process.poll() is None]
        while len(pool) < size:
            pool.append(_Worker(seed, self.timeout, self.memory_mb, self._layers))
        return pool

    def _run(self, jobs, seed):
        jobs = list(jobs)
        results = [None] * len(jobs)
        queue = collections.deque()
        for i, (program, text) in enumerate(jobs):
            if not (isinstance(program, str) and isinstance(text, str)):
                raise TypeError("a job is a (program, input) pair of str")
            if len(program) > MAX_TEXT or len(text) > MAX_TEXT:
                results[i] = Execution("syntax", "", f"over {MAX_TEXT} characters", 0.0), False
            else:
                queue.append(i)
        tried = set()
        busy = {}                                          # worker: (job, when it is given up)
        try:
            while queue or busy:
                idle = [worker for worker in self._pool(seed, min(self._size, len(queue)))
                        if worker not in busy] if queue else []
                for worker in idle[:self._size - len(busy)]:
                    if queue:
                        i = queue.popleft()
                        busy[worker] = i, time.monotonic() + _PATIENCE * self.timeout + 60
                        worker.send(jobs[i])
                ready = select.select([worker.replies for worker in busy], [], [], 5)[0]
                for worker in [w for w in busy if w.replies in ready or w.gone(busy[w][1])]:
                    i = busy[worker][0]
                    reply = worker.receive() if worker.replies in ready else None
                    del busy[worker]
                    if reply:
                        status, output, error, seconds, suspect = reply
                        results[i] = Execution(status, output, error, seconds), suspect
                        continue
                    self._pools[seed].remove(worker)
                    worker.kill()
                    if i in tried:
                        results[i] = Execution("killed", "", "its worker died, twice", 0.0), False
                    else:
                        queue.append(i)
                    tried.add(i)
        finally:                                           # Ctrl-C: nothing stale may stay
            for worker in busy:
                worker.kill()
                if worker in self._pools[seed]:
                    self._pools[seed].remove(worker)
        return results


class _Worker:
    """The caller's handle on a worker process."""

    def __init__(self, seed, timeout, memory_mb, layers):
        # Only the interpreter, this file, and what a lean start needs: not the caller's
        # environment, directory, descriptors, terminal, site-packages, or memory.
        config = json.dumps([timeout, memory_mb, layers, seed])
        environment = {"PYTHONHASHSEED": str(seed)}
        if "LD_LIBRARY_PATH" in os.environ:                # some interpreters need it to start
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT, _HERE, config],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd="/",
            env=environment, start_new_session=True)
        self.replies = self.process.stdout.fileno()
        self._weak = None

    def weak(self):
        """The promises that the worker could not secure; waits until it is ready."""
        if self._weak is None:
            self._weak = _receive(self.replies)
            if self._weak is None:
                raise RuntimeError("a sandbox worker did not start")
        return self._weak

    def send(self, job):
        self.weak()
        try:
            _send(self.process.stdin.fileno(), job)
        except BrokenPipeError:
            pass                                           # it is dead: receive will say so

    def receive(self):
        """The reply, or None if the worker is dead."""
        return _receive(self.replies)

    def gone(self, deadline):
        return time.monotonic() > deadline

    def kill(self):
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _send(fd, message):
    data = json.dumps(message).encode()
    data = struct.pack(">I", len(data)) + data
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
# The worker: a lean interpreter that forks one fresh process for each run, and judges its end.

_HERE = os.path.abspath(__file__)
_BOOT = ("import sys; sys.path[:] = [p for p in sys.path if p]; "
         "source = open(sys.argv[1], encoding='utf-8').read(); "
         "scope = {'__name__': 'sandbox', '__file__': sys.argv[1]}; "
         "exec(compile(source, 'sandbox', 'exec'), scope); scope['_work'](sys.argv[2])")
_STDLIB = os.path.dirname(os.path.realpath(os.__file__))
_OUT_OF_MEMORY = 77            # exit status of a run that has no memory left to say so


def _work(config):
    """The whole life of a worker process."""
    timeout, memory_mb, layers, seed = json.loads(config)
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.environ.clear()
    _Sandbox(requests, replies, timeout, memory_mb, seed, layers).serve()


class _Sandbox:

    def __init__(self, requests, replies, timeout, memory_mb, seed, layers):
        self.requests, self.replies = requests, replies
        self.timeout, self.memory, self.seed = timeout, memory_mb << 20, seed
        for name in sorted(ALLOWED - {"__future__"}):
            importlib.import_module(name)
        warnings.simplefilter("ignore")
        gc.collect()
        gc.freeze()
        _send(replies, [])

    def serve(self):
        while True:
            job = _receive(self.requests)
            if job is None:
                os._exit(0)
            _send(self.replies, self.job(*job))

    def job(self, program, text):
        try:
            call = _parse_call(text)
        except ValueError:
            status, output, error, seconds, _ = self.supervise(_evaluate, (text, self.seed))
            if status != "ok":
                return status, "", "input: " + error, seconds, False
            call = parse_literal(output)
        del text
        return self.supervise(_execute, (program, call, self.seed))

    def supervise(self, what, arguments):
        nonce = os.urandom(16)
        source, sink = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self.child(what, arguments, sink, nonce)
        os.close(sink)
        data, late = self.collect(source, start)
        os.close(source)
        seconds = time.monotonic() - start
        os.kill(pid, signal.SIGKILL)
        _, code, usage = os.wait4(pid, 0)
        if late:
            return "timeout", "", f"no value within {self.timeout:g} s", seconds, False
        if data.startswith(nonce):
            status, suspect, error, output = data[16:].decode().split("\0", 3)
            if status == "ok":
                assert literal(parse_literal(output)) == output
            return status, output, error, seconds, bool(suspect)
        if os.waitstatus_to_exitcode(code) == _OUT_OF_MEMORY:
            return "memory", "", "out of memory", seconds, False
        return "killed", "", "its process ended without a result", seconds, False

    def collect(self, source, start):
        data = b""
        poller = select.poll()
        poller.register(source, select.POLLIN)
        poller.register(self.requests, 0)
        while True:
            left = start + self.timeout - time.monotonic()
            events = dict(poller.poll(max(left, 0) * 1000))
            if self.requests in events:
                os._exit(0)
            if not events:
                return data, True
            more = os.read(source, 1 << 16)
            data += more
            if not more or len(data) > 10 * MAX_TEXT:
                return data, False

    def child(self, what, arguments, sink, nonce):
        try:
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (self.memory, self.memory))
            status, suspect, error, output = what(*arguments)
            error = " ".join(error.split())[:300].encode("utf-8", "replace").decode()
            message = "\0".join([status, suspect, error.replace("\0", ""), output])
            os.write(sink, nonce + message.encode())
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        finally:
            os._exit(0)


# ---------------------------------------------------------------------------------------------
# The run: what happens in the forked process.

def _evaluate(text, seed):
    """Evaluates an input to the literal of (args, kwargs)."""
    tree = ast.parse(f"f(\n{text}\n)", mode="eval")
    name = tree.body.func = ast.Name(id="<call>", ctx=ast.Load(), lineno=1, col_offset=0,
                                     end_lineno=1, end_col_offset=1)
    call = eval(compile(tree, "<input>", "eval"),
                {"__builtins__": dict(vars(builtins)), "<call>": lambda *a, **k: (a, k)})
    return "ok", "", "", literal(call)


def _execute(program, call, seed):
    args, kwargs = call
    try:
        tree = ast.parse(program)
        code = compile(tree, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "syntax", "", str(error), ""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    module.__dict__["__builtins__"] = dict(vars(builtins))
    try:
        exec(code, module.__dict__)
        value = module.__dict__["f"](*args, **kwargs)
    except MemoryError:
        return "memory", "", "out of memory", ""
    except BaseException as error:
        return "error", "", f"{type(error).__name__}: {error}", ""
    try:
        return "ok", "", "", literal(value)
    except ValueError as error:
        return "unrepresentable", "", str(error), ""
