"""A sandbox for Python programs written by language models: one file, standard library only.

    with Executor(timeout=5.0) as executor:
        executor.run([("def f(x): return x + 1", "41")])        # one Execution: ok, output '42'

Each worker is a small interpreter with every allowed module loaded. It forks a fresh process for each run,
and another process watches the clock. The caller never evaluates, compiles or unpickles text from a model. It
reads canonical literals, compares them itself, and refuses any other report. By forging its report, a program
can at worst "return" a value, and a `call`, of its choice.

Covered:
  other runs      a fresh process for each run and each input that is code, so that none can see or affect
                  another
  loops, sleep    'timeout', by a clock outside the run. Waiting for a core does not count
  memory, forks   rlimits: 'memory'. They also bound the size of the report
  the system      seccomp leaves a run its own memory, its job and its report. No files, programs, network,
                  threads, signals, ptrace, shared memory, clock, process ids, entropy of the system.
                  Namespaces close network, processes and shared memory once more, if the system grants them
  chance          a valid task returns the same value under three hash seeds, at other addresses
  bad names       imports and names that no task needs are 'unsafe'. These guards are Python, so they give a
                  clear message but no security
Not covered:
  bugs of the kernel, and side channels of the hardware
  machine code, which can read random bits and its core from the processor, and its thread's id from memory
  programs that rarely differ, or agree by chance under three seeds, because each worker has other addresses
docs/sandbox.md describes each kind of attack. The caller needs 512 KiB of stack. Linux and one thread only.
"""

import ast
import builtins
import ctypes
import gc
import inspect
import json
import marshal
import os
import re
import resource
import struct
import sys
import time
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, compress, repeat, starmap
from keyword import iskeyword
from select import POLLIN, poll
from signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGINT, SIGKILL, signal
from types import FunctionType, ModuleType

# Modules that a program may import. They compute, and have no files, network, processes, threads or clocks.
ALLOWED = frozenset("""
    __future__ abc array base64 binascii bisect cmath collections contextlib copy dataclasses decimal difflib
    enum fractions functools graphlib heapq html itertools json keyword math numbers operator pprint re
    reprlib statistics string struct textwrap types typing unicodedata""".split())
# Modules that these load lazily. A run cannot load any, because it cannot open files.
_PRELOADED = "annotationlib collections.abc html.entities html.parser json.decoder tokenize".split() + [
    f"encodings.{name}" for name in """ascii base64_codec big5 cp437 cp1251 cp1252 euc_jp gbk hex_codec idna
    iso8859_2 iso8859_15 koi8_r latin_1 punycode raw_unicode_escape rot_13 shift_jis unicode_escape utf_7
    utf_8_sig utf_16 utf_16_be utf_16_le utf_32 utf_32_be utf_32_le""".split()]
MAX_TEXT = 100_000     # characters in a program, an input, or an output
MAX_DEPTH = 80         # brackets within brackets in a literal


@dataclass(frozen=True)
class Execution:
    """Outcome of one run. `status` is 'ok', or the reason why there is no value:

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
    output: str        # canonical Python literal of the returned value ('' unless ok)
    error: str         # one printable line of at most 300 characters ('' if ok)
    seconds: float     # wall-clock time of the run, without the time in the queue
    call: str = ""     # the values bound to f's parameters. Equal calls have equal texts ('' unless ok)

    @property
    def ok(self):
        return self.status == "ok"


# -- Values and their texts -------------------------------------------------------------------------

_CONTAINERS = (list, tuple, set, dict, Counter, defaultdict, OrderedDict)
_name = type.__dict__["__name__"].__get__              # of a class, without asking its metaclass


def parse_literal(text, limit=MAX_TEXT):
    """The value of a literal: None, bool, int, float, complex, str, bytes, and tuples, lists, dicts and sets
    of these. Infinity is 1e309, the empty set is set(). Raises ValueError, with one line, for anything else.
    Only for text that literal() wrote, or that you trust. For text from a model, use Executor.read."""
    if type(text) is not str or len(text) > limit:
        raise ValueError(f"not a text of at most {limit} characters")
    try:
        value = ast.literal_eval(text)
        _write(value, 0, [100 * limit], False)       # no ellipsis, not too deep
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a literal: {_describe(error)}") from None
    return value


def literal(value, limit=MAX_TEXT):
    """The canonical literal of a value: parse_literal(literal(v)) equals v, and each value has one text.
    Dicts keep their order, and sets are sorted. Counter, OrderedDict and defaultdict are written as the dict
    that they equal. Raises ValueError, with one line, for a value that does not come back equal (nan, any
    other class), is over `limit` characters or over MAX_DEPTH deep."""
    text = _write(value, 0, [limit], True)
    if len(text) > limit:
        raise ValueError("longer than the limit")
    return text


def same(a, b):
    """Whether two values are the same literal value: equal, and of equal types all the way down. For example,
    True is not 1, 1 is not 1.0, (1,) is not [1], and nan is not even nan. Order in dicts and sets does not
    count. Never calls code of the values' classes, so values of other types are not the same."""
    return _key(a) == _key(b) is not None


def _key(value, limit=100 * MAX_TEXT):
    """A text that is the same for values that are the same, or None for a value that has no literal."""
    try:                                              # a program may have changed contextlib
        return _write(value, 0, [limit], False)
    except (ValueError, RecursionError):
        return None


def _write(value, depth, room, ordered):
    """The text of `value`. `room` holds the characters left, which also stops a value that contains itself.
    If not ordered, dicts are sorted and -0.0 becomes 0.0, so that equal values have equal texts."""
    if room[0] < 0:
        raise ValueError("longer than the limit")
    kind = type(value)
    if value is None or kind is bool or kind is int:
        text = repr(value)
    elif (kind is float or kind is complex) and value == value:
        value += 0j if kind is complex else -0.0 if ordered else 0.0      # -0.0 adds nothing
        text = repr(value).replace("inf", "1e309")
    elif kind is str or kind is bytes:
        text = repr(value) if len(value) <= room[0] else value
    elif not any(kind is each for each in _CONTAINERS):               # `in` would ask a metaclass
        raise ValueError(f"this value of type {_name(kind)[:80]} has no literal")
    elif depth >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep, or contains itself")
    else:
        write = partial(_write, depth=depth + 1, room=room, ordered=ordered)
        flat = kind in (list, tuple, set)
        room[0] -= (2 if flat else 4) * (len(value) or 1)
        parts = [*map(write, value)] if flat else [
            f"{write(key)}: {write(item)}" for key, item in kind.items(value)]
        if kind is set:                               # numbers first and by size, then by text
            ranks = [(0, item) if type(item) in (bool, int, float) else (1, 0) for item in value]
            parts = [part for _, part in sorted(zip(ranks, parts))]
        elif not (flat or ordered):
            parts.sort()
        if kind is tuple:
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        if kind is set and not parts:
            return "set()"
        return ("[%s]" if kind is list else "{%s}") % ", ".join(parts)
    room[0] -= len(text)
    return text


def _describe(error):
    """One line on an exception, without calling code of its class."""
    arguments = BaseException.args.__get__(error)
    text = arguments[0][:200] if arguments and type(arguments[0]) is str else ""
    return f"{_name(type(error))[:80]}: {text}".removesuffix(": ")


# -- The caller's side ------------------------------------------------------------------------------

# Hash seeds. `run` uses the first. From Python 3.11 on no letter or digit has a hash of the same parity under
# all three, and 5% of the sets of two letters keep their order, whereas chance alone would give 25%.
_SEEDS = (24, 267, 331)
_OUT_OF_MEMORY = 77            # exit status of a run that has no memory left to report it
_LITERAL, _INPUT, _PROGRAM = range(3)  # purpose of a run: a literal, an input that is code, a program
_EVALUATE = "call = (lambda *args, **kwargs: (args, kwargs))(\n%s\n)\ndef f(): return call"
_END = struct.Struct("=i?Q")           # exit status of a run, whether it was late, nanoseconds
_NEWS = struct.Struct("=ii")           # process id of a run, and 0 at its start or its wait status at its end
_STATUSES = "ok syntax error unsafe unrepresentable expression".split()
_HERE = os.path.abspath(__file__)
# This module's builtins are a copy, out of reach of programs that change `print.__self__`.
_BOOT = ("import sys, importlib.util as util; spec = util.spec_from_file_location('sandbox', sys.argv[1]); "
         "module = util.module_from_spec(spec); module.__builtins__ = dict(vars(__builtins__)); "
         "spec.loader.exec_module(module); module._work(sys.argv[2])")
# Close to the canonical form: no names, no comments, no calls but set(). A text matches in at most one way,
# so none takes long.
_LITERALS = re.compile(r"""\s*(?:(?:[({\[]|[,:]|(?:[)}\]]|set\(\)|None|True|False
    |-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?(?:[-+][0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)?j?
    |b?'[^'\\]*(?:\\.[^'\\]*)*'|b?"[^"\\]*(?:\\.[^"\\]*)*")(?=\s*(?:[,:)}\]]|$)))\s*)*""", re.VERBOSE)


class Executor(AbstractContextManager):
    """Runs programs in sandboxed processes, `workers` at once (None: one per core). Use it in a with
    statement, or call close(). Warns at the start if a layer of the sandbox is not available on this system.

    timeout    seconds of one run, also of one that evaluates an input, from its own start. Time spent waiting
               for a core does not count, so that a busy machine gives the same verdicts
    memory_mb  memory of one run, on top of the interpreter's
    allow      modules that programs may import in addition to ALLOWED. Only seccomp and namespaces limit what
               these can do. For example, time and datetime give access to the clock
    max_text   characters in a program, an input, or an output
    """

    def __init__(self, workers=None, timeout=10.0, memory_mb=1024, *, allow=(), max_text=MAX_TEXT,
                 _layers=("namespaces", "seccomp", "guards")):
        self._size = len(os.sched_getaffinity(0)) if workers is None else workers
        if not (min(self._size, memory_mb, max_text) >= 1 and memory_mb <= 1e9 and 0 < timeout <= 1e6):
            raise ValueError("workers, max_text: at least 1; memory_mb: 1 to 1e9; timeout: above 0, to 1e6")
        self._timeout, self._max_text = timeout, max_text
        self._config = [memory_mb, _layers, sorted(ALLOWED.union(allow)), max_text, timeout]
        self._idle = defaultdict(list)                # workers, by seed
        with ExitStack() as failure:
            failure.enter_context(self)               # closed if anything fails
            first = self._idle[_SEEDS[0]]
            for _ in range(self._size):
                first.append(_Worker(self._config, _SEEDS[0]))
            if not all([worker.promises for worker in first]):
                raise RuntimeError("a sandbox worker did not start")
            if weak := json.loads(first[0].promises):
                warnings.warn("some sandbox layers are not available on this system; untrusted code could: "
                              + "; ".join(weak), RuntimeWarning, stacklevel=2)
            failure.pop_all()

    def close(self, *exception):
        """End the workers and their runs. Afterwards, only close() may be called again."""
        while self._idle:
            for worker in self._idle.popitem()[1]:
                worker.kill()

    __exit__ = close

    def run(self, jobs):
        """The value of f(<input>) for each (program, input), as Executions in the same order.
        An input is the text between the parentheses of a call: positional and keyword arguments. If it is
        more than literals, it is evaluated once, in a separate process that does not know the program, so
        that the program gets only values, not their text. Both texts may come from anywhere, because the
        status says what is wrong with them.
        Raises TypeError if not str, RuntimeError if closed, OSError if the system refuses a worker."""
        return self._run(_PROGRAM, jobs)

    def validate(self, jobs):
        """Like run, but ok only for a valid task: f(<input>) returns something other than None, and the same
        value in fresh processes under each of three hash seeds, with other addresses."""
        jobs = list(jobs)
        results = [Execution("error", "", "f returned None", result.seconds) if result.output == "None"
                   else result for result in self.run(jobs)]
        for seed in _SEEDS[1:]:
            again = [i for i, result in enumerate(results) if result.ok]
            for i, second in zip(again, self._run(_PROGRAM, [jobs[i] for i in again], seed)):
                first = results[i]
                if second.status in ("timeout", "memory", "unsafe", "killed"):
                    results[i] = second
                elif not second.ok or second.call != first.call or not same(
                        *(parse_literal(each.output, self._max_text) for each in (first, second))):
                    results[i] = Execution("nondeterministic", "", "two runs of it differ", second.seconds)
        return results

    def read(self, texts):
        """The canonical literal of each text, as the output of an Execution. For text from a model, because
        it is parsed in a run, and never evaluated. The status is 'syntax' if a text is not a literal."""
        return self._run(_LITERAL, [("", text) for text in texts])

    def _run(self, purpose, jobs, seed=_SEEDS[0]):
        if not self._idle:
            raise RuntimeError("this Executor is closed")
        jobs = [(program, text) for program, text in jobs]
        if not all(type(program) is type(text) is str for program, text in jobs):
            raise TypeError("a job is a pair of str: program, input")
        too_long = Execution("syntax", "", f"over {self._max_text} characters", 0.0)
        results = [too_long if max(map(len, job)) > self._max_text else None for job in jobs]
        queue = deque((i, purpose, *job, 0.0) for i, job in enumerate(jobs) if not results[i])
        busy, poller, idle = {}, poll(), self._idle[seed]
        try:
            while queue or busy:
                while queue and len(busy) < self._size:
                    while idle and idle[-1].process.poll() is not None:    # dead, or of a fork's parent
                        idle.pop().kill()
                    worker = idle.pop() if idle else _Worker(self._config, seed)
                    job = queue.popleft()
                    poller.register(worker.line, POLLIN)
                    busy[worker.line.fileno()] = worker, job
                    worker.start(*job[1:4])
                for fd, _ in poller.poll():
                    worker, job = busy.pop(fd)
                    i, purpose, _, text, spent = job
                    poller.unregister(fd)
                    end = worker.receive()
                    idle.append(worker)
                    if not end:                               # it died, and others may have, too
                        while idle:
                            idle.pop().kill()
                        if not results[i]:                    # the job gets a second chance
                            queue.append(job)
                        results[i] = Execution("killed", "", "its worker died, twice", 0.0)
                        continue
                    result = self._result(worker, purpose, spent, *_END.unpack(end))
                    if result.status == "expression":         # the input has to be evaluated first
                        queue.appendleft((i, _INPUT, _EVALUATE % text, "", result.seconds))
                    elif result.ok and purpose == _INPUT:     # now its values are the input
                        queue.appendleft((i, _PROGRAM, jobs[i][0], result.output, result.seconds))
                    else:
                        results[i] = result
        finally:                                      # after Ctrl-C, no run continues
            for worker, _ in busy.values():
                worker.kill()
        return results

    def _result(self, worker, purpose, spent, code, late, nanoseconds):
        """The Execution that follows from a run's report and its end."""
        worker.report.seek(0)
        report = b"" if late else worker.report.read()
        seconds = spent + nanoseconds / 1e9
        if late:
            status, error = "timeout", f"no value within {self._timeout:g} s"
        elif report:
            try:
                return self._reported(report, purpose, spent, seconds, self._max_text)
            except (ValueError, TypeError, RecursionError):
                status, error = "unsafe", "forged its result, or wrote into the file of its result"
        elif code == _OUT_OF_MEMORY:
            status, error = "memory", "out of memory"
        else:
            end = f"died of signal {-code}" if code < 0 else f"ended without a result (exit status {code})"
            status, error = "killed", f"its process {end}"
        return Execution(status, "", error, seconds)

    def _reported(self, report, purpose, spent, seconds, limit):
        """The Execution of a report. Raises ValueError or TypeError for one that no honest run writes."""
        mark, status, error, call, output = report.decode().split("\0")
        if mark != _Run.mark or status not in _STATUSES:
            raise ValueError                          # not a report
        if status == "expression" and spent:
            raise ValueError                          # an input is evaluated once, not for ever
        if status != "ok":
            line = "".join(filter(str.isprintable, " ".join(error[:1000].split())))
            line = re.sub("0x[0-9a-f]{8,}", "0x...", line)[:300]    # addresses differ by process
            return Execution(status, "", line or status, seconds)
        if len(call) > 2 * limit or not call.isprintable():
            raise ValueError                          # because the caller gets it as it is
        if len(output) > limit or not _LITERALS.fullmatch(output):
            raise ValueError                          # perhaps no literal, or slow to parse
        value = parse_literal(output, limit)
        if literal(value, limit) != output:
            raise ValueError                          # equal outputs must have equal texts
        if purpose == _INPUT:                         # the input that gives these values as literals
            args, kwargs = value
            named = [f"{name}={literal(value, limit)}" for name, value in dict.items(kwargs)]
            if not all(str.isidentifier(each) and each.isascii() and not iskeyword(each) for each in kwargs):
                named = [f"**{literal(kwargs, limit)}"]
            output = ", ".join([literal(value, limit) for value in args] + named)
        return Execution(status, output, "", seconds, call)


class _Worker:
    """The caller's handle on a worker. Orders and the ends of runs pass through a socket. Programs, inputs
    and reports are in two files in memory, so that no run can make the caller wait."""

    def __init__(self, config, seed):
        import socket                                 # not in the workers, because they slow forks down
        import subprocess
        self.job, self.report = [open(os.memfd_create(name), "r+b", 0) for name in ("job", "report")]
        self.line, line = socket.socketpair()
        argv = [sys.executable, *"-s -S -B -X utf8 -c".split(), _BOOT, _HERE, json.dumps([*config, seed])]
        environment = {"PYTHONHASHSEED": str(seed), "PYTHONSAFEPATH": "1",
                       "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}  # some interpreters need it
        with line:
            self.process = subprocess.Popen(argv, stdin=self.job, stdout=line, stderr=self.report, cwd="/",
                                            env=environment, start_new_session=True)

    def receive(self):
        """The next message of the worker, or b"" if it died."""
        with suppress(ConnectionError):
            return self.line.recv(4096)
        return b""

    promises = cached_property(receive)               # the first: promises that it cannot keep here

    def start(self, *job):
        """Tell the worker to fork a run for a job."""
        if not self.promises:                         # it died, which the end of its line will show
            return
        for file, data in (self.job, marshal.dumps(job)), (self.report, b""):
            file.seek(0)
            file.truncate()                           # no run reads what another wrote
            file.write(data)
        with suppress(ConnectionError):
            self.line.send(b"1")

    def kill(self):
        """End the worker, and with it its runs."""
        if self.process.poll() is None:               # alive. A fork of the caller only closes its files
            with suppress(OSError):                   # SHUT_WR: ends processes that outlive their parent
                self.line.shutdown(1)
            self.process.kill()
            self.process.wait()
            [*iter(self.receive, b"")]                # until all its processes have ended
        for each in (self.line, self.job, self.report):
            each.close()


# -- The worker's side: a watcher, a process that sets up the sandbox and forks, and the runs ----------

_LIBC = ctypes.CDLL(None)
_JOB, _LINE, _REPORT = 3, 4, 5         # descriptors, the same in each worker, so that no run can tell it
_MACHINES = {"x86_64": (1, 0xC000003E, 202), "aarch64": (2, 0xC00000B7, 98)}  # column, AUDIT_ARCH, futex
# System calls that a run may make, on x86-64 and arm64. All others fail with EPERM, or end it.
_SYSCALLS = """
    write 1 64  close 3 57  mmap 9 222  mprotect 10 226  munmap 11 215  brk 12 214  rt_sigaction 13 134
    rt_sigprocmask 14 135  rt_sigreturn 15 139  pread64 17 67  sched_yield 24 124  mremap 25 216
    madvise 28 233  exit 60 93  exit_group 231 94"""
# For the kernel's BPF: operation, what to skip if equal, and if not, operand. It checks the machine, the
# call, the operation of futex, and both halves of its timeout. WAKE, WAIT and WAIT_BITSET are allowed, but
# only if private, because others reach all processes that map the same file, and only without a timeout,
# because that is a clock. Other operations write ids.
_FILTER = """0x20 0 0 4  0x15 1 0 {}  6 0 0 0x50001  0x20 0 0 0  {}  0x15 0 10 {}
    0x20 0 0 24  0x54 0 0 0xFFFFFEFF  0x15 6 0 129  0x15 1 0 128  0x15 0 5 137
    0x20 0 0 40  0x15 0 3 0  0x20 0 0 44  0x15 0 1 0  6 0 0 0x7FFF0000  6 0 0 0x50001"""


def _call(name, *arguments):
    """Call a C function that a system may lack or refuse. → whether it succeeded"""
    return getattr(_LIBC, name, lambda *rest: -1)(*map(ctypes.c_long, arguments)) != -1


def _prepare(layers, memory):
    """Continue as process 1 of new namespaces, at whose end the kernel kills all processes in them, while the
    calling process waits. Set limits, and try out the layers. → these, and the promises that they break"""
    alone = "namespaces" in layers and (              # CLONE_NEWIPC, _NEWPID, _NEWNET, then also _NEWUSER
        _call("unshare", 0x68000000) or _call("unshare", 0x78000000))
    if os.fork():
        os.close(_LINE)
        os.wait()
        os._exit(0)
    hide, hidden = ALLOWED.isdisjoint(("time", "datetime")), []           # these modules may read the clock
    with suppress(OSError), open("/proc/self/maps") as file:
        for start, end, name in re.findall(r"(\w+)-(\w+) (.*)", file.read()):
            size = int(end, 16) - int(start, 16)
            memory += size                            # the limit comes on top of what is in use
            if hide and "[vvar" in name:
                # From this data the vDSO, the kernel's code in this process, tells the time without a system
                # call. With zeros instead (MAP_PRIVATE, _FIXED, _ANONYMOUS) it needs the call, which fails.
                hidden.append(_call("mmap", int(start, 16), size, 1, 0x32, -1, 0))
    # Root becomes nobody (others may not). PR_SET_NO_NEW_PRIVS, _DUMPABLE (no ptrace, no core), _PDEATHSIG
    for step in (("setgroups", 0, 0), ("setgid", 65534), ("setuid", 65534),
                 ("prctl", 38, 1, 0, 0, 0), ("prctl", 4, 0), ("prctl", 1, SIGKILL)):
        _call(*step)
    if timeless := hidden != [] and all(hidden):      # otherwise this would crash the vDSO
        _call("prctl", 26, 2)                         # PR_SET_TSC: the processor's own clock, on x86
    seccomp = _filter() if "seccomp" in layers else None
    for what, value in ((resource.RLIMIT_FSIZE, min(20 * MAX_TEXT, 1 << 28)),
                        (resource.RLIMIT_STACK, 8 << 20), (resource.RLIMIT_AS, memory)):
        with suppress(OSError, ValueError):           # the system's own limit is lower
            resource.setrlimit(what, (value, value))
    gc.collect()
    gc.freeze()                                       # collections in runs leave these pages alone
    kept = {"reach the network, signal processes of this user, leave some behind": alone or seccomp,
            "tell the time, and return other values later": seccomp and (timeless or not hide),
            "use more memory than their limit, read and change files of this user": seccomp}
    return alone, seccomp, [promise for promise in kept if not kept[promise]]


def _filter():
    """A function that leaves its process only the calls of _SYSCALLS, or None if no process survives it."""
    column, machine, futex = _MACHINES.get(os.uname().machine, (1, 0, 0))
    calls = "  ".join(f"0x15 0 1 {number}  6 0 0 0x7FFF0000" for number in _SYSCALLS.split()[column::3])
    words = [int(word, 0) for word in _FILTER.format(machine, calls, futex).split()]
    code = ctypes.create_string_buffer(struct.pack("HBBI" * (len(words) // 4), *words))
    head = struct.pack("HxxxxxxQ", len(words) // 4, ctypes.addressof(code))
    enter = partial(_LIBC.prctl, 22, ctypes.c_long(2), head, code)        # PR_SET_SECCOMP (keeps code alive)
    if not (pid := os.fork()):
        os._exit(enter())
    return enter if os.waitpid(pid, 0)[1] == 0 else None


def _serve(alone, seccomp, broken, limit):
    """Fork the process that forks a run for each order, and watch. Returns only in the runs, with the size of
    their job. Their memory does not depend on earlier runs, because the loop is made of C functions, which
    count nothing, and free in order what they allocate."""
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        _watch(told, alone or seccomp, broken, limit)
    os.close(told)
    _call("prctl", 1, SIGKILL)
    parent = os.getpid()
    list(range(10 ** 6, 10 ** 6 + 9))                 # leaves room for large process ids. Small need none
    orders = iter(partial(os.readv, _LINE, [bytearray(1)]), 0)            # until the caller is gone
    ordered = compress(repeat(tell), chain([1, 1], orders))               # two to warm up, without a job
    births = map(_NEWS.pack, iter(os.fork, 0), repeat(0))                 # until this process is the run
    born = compress(ordered, map(os.write, repeat(tell), births))
    ends = starmap(_NEWS.pack, starmap(os.wait, repeat(())))
    if alone and not seccomp:                         # kills orphans of a run: all but this and process 1
        ends = compress(ends, zip(starmap(_LIBC.kill, repeat((-1, SIGKILL)))))
    deque(map(os.write, born, ends), 0)
    if os.getpid() == parent or not (size := os.fstat(_JOB).st_size):
        os._exit(0)
    os.close(_LINE)
    os.close(tell)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if not alone:                                     # otherwise it ends with process 1
        os.setsid()
        _call("prctl", 1, SIGKILL)                    # PR_SET_PDEATHSIG
    if os.getppid() != parent or seccomp and seccomp() == -1:             # too late, or no seccomp
        os._exit(1)
    return size


def _watch(told, bound, broken, limit):
    """Tell the caller how each run ended, and kill those that are late. All times are milliseconds. At its
    limit, a run that has used less processor time than that, but some, is waiting for a core, and gets more
    time, up to 25 times its limit. One that has used none is asleep, and therefore late."""
    signal(SIGCHLD, SIG_IGN)                          # orphans of a run leave no zombies
    poller = poll()
    poller.register(told, POLLIN)
    poller.register(_LINE, 0)                         # only to see its end
    for _ in range(4):                                # starts and ends, to warm up
        os.read(told, _NEWS.size)
    os.write(_LINE, json.dumps(broken).encode())
    while news := os.read(told, _NEWS.size):          # until the caller is gone, or the process that forks
        start, (pid, _) = time.monotonic_ns(), _NEWS.unpack(news)
        late, used, waited, wait = False, 0, 0, limit
        while not (late or (ready := poller.poll(wait))):
            waited, before = waited + wait, used
            with suppress(OSError):                   # it ends just now
                used = time.clock_gettime_ns((~pid << 3) | 2) // 10 ** 6  # of that process
            late = used >= limit or used - before < wait / 100 or waited > 25 * limit
            wait = max(limit - used, 10)
        if late:
            _call("kill", pid, SIGKILL)
            ready = poller.poll(10_000)               # without seccomp, a run can stop the process that forks
        if not ready or _LINE in dict(ready):
            break
        _, status = _NEWS.unpack(os.read(told, _NEWS.size))
        if not bound:                                 # otherwise its children would live on
            _call("kill", -pid, SIGKILL)
        os.write(_LINE, _END.pack(os.waitstatus_to_exitcode(status), late, time.monotonic_ns() - start))
    os._exit(0)


# Names by which programs leave their namespace.
_WALKS = frozenset("""__import__ __subclasses__ __globals__ __builtins__ __loader__ __spec__ __code__
    __closure__ f_globals f_builtins f_locals f_back tb_frame gi_frame cr_frame ag_frame""".split())
# Prefixes of the interpreter's audit events that no task may cause.
_EVENTS = tuple("""os. open subprocess. socket. ctypes. signal. fcntl. resource. mmap. syslog. gc. time.sleep
    sys.settrace sys.setprofile sys._current sys.addaudithook builtins.input builtins.breakpoint""".split())
_LAZILY = {"annotation_format": 3} if sys.version_info >= (3, 14) else {}   # they may name what is missing
_LIBRARY = os.path.dirname(os.path.realpath(os.__file__))
_INNOCENT = ("('<", f"('{_LIBRARY}")   # a syntax error opens "<string>", and failing imports list the library


class _Run:
    """The forked process of a run. Made before the fork, because that is cheaper, so each run has a copy."""
    file, mark = _REPORT, "report"                    # the same for all, so that no run can tell its worker

    def __init__(self, seed, guarded):
        os.register_at_fork = lambda **hooks: None    # `random` must not be reseeded in each run
        # Modules that the interpreter's own C code imports later, through the program's import statement.
        self.lazy = {"_pylong", *(() if ALLOWED.isdisjoint(("time", "datetime")) else ("_strptime", "time"))}
        for name in [*sorted(ALLOWED), *_PRELOADED, *self.lazy]:
            with suppress(ImportError):               # not in this version of Python
                __import__(name)
        warnings.simplefilter("ignore")
        # The seed decides `random` (for statistics), addresses (even if the system does not randomize them),
        # and ids: the first one, and the step to the next, which is negative under one of the seeds.
        sys.modules["random"].seed(seed)
        self.ballast = [(object(), bytes(size)) for size in [*range(480)] * (seed % 24)]
        self.numbers, self.first, self.step = {}, seed * (10 ** 12 + 1), 16 * (seed - 250)
        self.builtins = dict(vars(builtins), id=self.number)
        self.guarded, self.failure, self.about = guarded, "syntax", ""    # failure: status for exceptions now
        self.builtins |= {"__import__": self.load} if guarded else {}

    def live(self, size):
        """Read the job, do it, report the result or the failure, and end."""
        if self.guarded:                              # not earlier, because it would count the forks
            sys.addaudithook(self.audit)
        try:
            purpose, *texts = marshal.loads(os.pread(_JOB, size, 0))      # which the caller wrote
            os.close(_JOB)
            try:
                if purpose == _LITERAL:
                    value, call = parse_literal(texts.pop(), MAX_TEXT), ""
                else:                                 # popped, so that no program finds the text of its input
                    value, call = self.execute(*self.arguments(texts.pop(), purpose), texts.pop())
                self.failure = "unrepresentable"
                self.report("ok", "", literal(value, MAX_TEXT), call)
            except BaseException as error:            # SystemExit and KeyboardInterrupt are no way out either
                if isinstance(error, MemoryError) and self.failure != "syntax":
                    raise                             # the parser raises it for text that is too deep
                self.report(self.failure, _describe(error))
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        finally:
            os._exit(1)

    def report(self, status, error="", output="", call=""):
        """Tell the caller how the run ended, and end it."""
        text = "\0".join([self.mark, status, self.about + error.replace("\0", " "), call, output])
        os.write(self.file, text.encode("utf-8", "backslashreplace"))
        os._exit(0)

    def number(self, thing, /):
        """id() for programs: objects are numbered in the order of the calls, upwards or downwards."""
        return self.numbers.setdefault(id(thing), (self.first + self.step * len(self.numbers), thing))[0]

    def load(self, name, *rest, **options):
        """The program's own import statement. Modules that it loads use another."""
        if type(name) is not str or name.partition(".")[0] not in ALLOWED and name not in self.lazy:
            self.report("unsafe", f"imports {name}")
        return builtins.__import__(name, *rest, **options)

    def audit(self, event, arguments):
        if self.failure == "error" and event.startswith(_EVENTS) and not str(arguments).startswith(_INNOCENT):
            self.report("unsafe", f"attempted {event}")

    def arguments(self, text, purpose):
        """(args, kwargs) of an input of literals. Any other input has to be evaluated apart from the program,
        and is only reported here."""
        self.about = "input: "
        call = ast.parse(f"f(\n{text}\n)", "<input>", "eval").body
        if not isinstance(getattr(call, "func", None), ast.Name):         # it closes the call, as 1)(2 does
            raise SyntaxError("not the arguments of one call")
        self.failure = "error"                        # for example of {[]}
        try:
            args = [*map(ast.literal_eval, call.args)]
            kwargs = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
            if len(kwargs) < len(call.keywords):      # x=1, x=2
                raise ValueError
            if None in kwargs:                        # **{}
                kwargs, = kwargs.values()
        except ValueError:
            self.report("expression")
        self.failure = "unrepresentable"
        literal((args, kwargs), MAX_TEXT)
        self.failure, self.about = "syntax", "input: " if purpose == _INPUT else ""
        return args, kwargs

    def execute(self, args, kwargs, text):
        """The value of a program's f, and the text of the call."""
        code = compile(text, "<program>", "exec")
        if self.guarded and (unsafe := _unsafe(ast.parse(text))):
            self.report("unsafe", unsafe)
        module = sys.modules["program"] = ModuleType("program")     # classes look up their module
        scope = vars(module)
        scope["__builtins__"] = self.builtins
        self.failure = "error"
        exec(code, scope)
        if "f" not in scope:
            raise NameError("the program defines no f")
        f = scope["f"]                                # read once: a key that is no plain str could give two
        call = _bound(f, args, kwargs)
        return f(*args, **kwargs), call


def _unsafe(tree):
    """The first thing that a program uses and no task may, or ''."""
    for node in ast.walk(tree):
        modules = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):          # what it imports may be a module, too
            modules = ["." if node.level else node.module, *sys.stdlib_module_names.intersection(modules)]
        for name in modules:
            if name.partition(".")[0] not in ALLOWED:
                return f"imports {name}"
        name = getattr(node, "id", getattr(node, "attr", ""))             # of a Name, or of an Attribute
        if name in _WALKS:
            return f"uses {name}"
    return ""


def _bound(f, args, kwargs):
    """The values of f's parameters, as a text that is equal for equal calls. If f takes any number of them,
    or has no signature, names do not count. Otherwise no honest report gives one call two texts."""
    places, values, named = (), {}, False
    if type(f) is FunctionType and not (f.__code__.co_flags & 12 and hasattr(f, "__wrapped__")):
        # These may be of the program's own classes, whose code has to run before the code of f is read.
        defaults, options = tuple(f.__defaults__ or ()), dict(f.__kwdefaults__ or {})
        options = {name: options[name] for name in options if type(name) is str}
        f.__defaults__, f.__kwdefaults__ = defaults, options
        places = f.__code__.co_varnames[:f.__code__.co_argcount]
        values = dict(zip(places[::-1], defaults[::-1])) | options
        named = not f.__code__.co_flags & 12          # *args or **kwargs
    else:                                             # decorated, a class, partial, an object: ask inspect
        with suppress(TypeError, ValueError):
            bound = inspect.signature(f, **_LAZILY).bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs, named = (), bound.arguments, True
    values |= dict(zip([*places, *range(len(args))], args)) | kwargs
    return ", ".join(sorted((f"{name}=" if named else "") + (_key(value, 2 * MAX_TEXT) or "?")
                            for name, value in values.items()))[:2 * MAX_TEXT]       # "?": a default


def _work(config):
    """The main function of a worker's processes: one waits, one watches, one forks, and the rest are runs."""
    global ALLOWED, MAX_TEXT                          # in this process, those of its Executor
    memory_mb, layers, allowed, MAX_TEXT, timeout, seed = json.loads(config)
    ALLOWED = frozenset(allowed)
    del sys.argv[1:], sys.orig_argv[1:]
    os.environ.clear()
    signal(SIGINT, SIG_IGN)
    signal(SIGCHLD, SIG_DFL)     # if the caller ignores it, no wait would work
    for place in range(3):                            # the standard streams become _JOB, _LINE, _REPORT
        os.dup2(place, _JOB + place)
        os.dup2(os.open(os.devnull, os.O_RDWR), place)
    os.closerange(_REPORT + 1, 100)                   # and files that libraries keep open, such as libffi's
    run = _Run(seed, "guards" in layers)
    walls = _prepare(layers, int(memory_mb * 2 ** 20))                    # continues in a new process
    run.live(_serve(*walls, 1 + int(1000 * timeout)))                     # continues in the runs
