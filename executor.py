"""A sandbox for Python programs written by language models: one file, standard library only.

    with Executor(timeout=5.0) as executor:
        executor.run([("def f(x): return x + 1", "41")])        # one Execution: ok, output '42'

Each worker is a *zygote*: a lean interpreter with every allowed module loaded. It forks a fresh process for
each run, waits for its end, and kills what it left behind. The job goes from the caller straight to the run,
and the report straight back, through files in memory. The zygote never sees a program, an input or a result,
so nothing of one job is in the process of another. The caller never evaluates, compiles or unpickles what a
model wrote. It reads canonical literals, compares them itself, and refuses a report of any other form. The
worst that a program can do by forging its report is to "return" a value, and a `call`, of its choice.

What happens to each kind of attack, and which wall stops it:

  loops, powers, sleeping    'timeout': killed from outside after `timeout` seconds, waiting for a core aside
  memory                     'memory': RLIMIT_AS; shared memory and files in memory: seccomp
  threads, forks, daemons    seccomp, RLIMIT_NPROC; runs die with their worker, and workers with the caller
  output: floods, huge,      the report is bounded by RLIMIT_FSIZE; a value over the limit, over 80 levels or
  deep, lying __repr__       of another class is 'unrepresentable', never cut
  crashes, os._exit, kills   'killed'; SystemExit and KeyboardInterrupt are 'error'
  bombs for the parser       programs, inputs and literals are parsed in runs, under their limits
  files, running programs    seccomp: a run cannot open anything; modules are loaded before the fork
  network, shared memory,    seccomp; network and ipc namespaces
  signals, limits, ptrace    seccomp; user and pid namespaces
  of other processes
  clock, pid, entropy        seccomp, and the data by which the vDSO tells the time are hidden
  hash order, id(), repr()   'nondeterministic': validate runs each program under three hash seeds, in
  of objects, randomness     processes with other addresses
  forbidden modules, open()  'unsafe': by syntax tree, a guarded __import__ and audit events. Guards make
                             refusals readable; they are Python, and no wall
  answers that are code      evaluated in a process that holds nothing but the answer
  telling judging from       run and validate take the same path; run uses the first of validate's seeds
  validation

Not covered: bugs of the kernel, side channels of the hardware, machine code that reads what fork leaves in
memory (the thread's id), and programs whose nondeterminism shows rarely or agrees by chance under all three
seeds. The caller needs 512 KiB of stack. A process that it forks keeps the workers alive as long as it lives.
The start warns, once, of each promise that the system does not let us keep (no seccomp, no namespaces, not
Linux). Not for several threads at once; not for Windows.
"""

import ast
import builtins
import collections
import ctypes
import gc
import importlib
import json
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import time
import types
import warnings
from dataclasses import dataclass

# Modules that a program may import. They compute and do nothing else: no files, network, processes, threads,
# clocks or handles on the interpreter. To change the list, change it here.
ALLOWED = frozenset("""
    __future__ abc array base64 binascii bisect cmath collections contextlib copy dataclasses decimal difflib
    enum fractions functools graphlib heapq html itertools json keyword math numbers operator pprint re
    reprlib statistics string struct textwrap types typing unicodedata""".split())
# What these load only when it is needed, which a run cannot.
_PRELOADED = """_pylong collections.abc html.entities html.parser json.decoder encodings.ascii
    encodings.base64_codec encodings.cp1252 encodings.cp437 encodings.hex_codec encodings.idna
    encodings.latin_1 encodings.punycode encodings.raw_unicode_escape encodings.rot_13
    encodings.unicode_escape encodings.utf_7 encodings.utf_8_sig encodings.utf_16 encodings.utf_16_be
    encodings.utf_16_le encodings.utf_32 encodings.utf_32_be encodings.utf_32_le encodings.cp1251
    encodings.koi8_r encodings.iso8859_2 encodings.iso8859_15 encodings.shift_jis encodings.euc_jp
    encodings.gbk encodings.big5""".split()

MAX_TEXT = 100_000     # characters in a program, an input, or an output
MAX_DEPTH = 80         # brackets within brackets in a literal
MAX_BITS = 14_284      # of an int: 4300 digits, CPython's own limit for int(str)
MAX_TIMEOUT = 1e6      # seconds


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
    error: str         # one printable line of at most 300 characters; '' if ok
    seconds: float     # wall-clock time of the run, without the time in the queue
    call: str = ""     # the values bound to f's parameters: equal texts are equal calls; '' unless ok

    @property
    def ok(self):
        return self.status == "ok"


# ---------------------------------------------------------------------------------------------
# Values and their texts.

_CONTAINERS = (list, tuple, set, dict, collections.Counter, collections.defaultdict, collections.OrderedDict)


def parse_literal(text, limit=None):
    """The value of a literal: None, bool, int, float, complex, str, bytes, and tuples, lists, dicts and sets
    of these. Infinity is 1e309, the empty set is set().

    For text that literal() wrote, or that you trust. Text of a model belongs into Executor.read. Raises
    ValueError, with one line, for everything else.
    """
    limit = MAX_TEXT if limit is None else limit
    if type(text) is not str or len(text) > limit:
        raise ValueError(f"not a text of at most {limit} characters")
    try:
        value = ast.literal_eval(text)
        _write(value, 0, [100 * limit], False)       # no ellipsis, not too deep
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a literal: {_describe(error)}") from None
    return value


def literal(value, limit=None):
    """The canonical literal of a value: parse_literal(literal(v)) equals v, and each value has one text.
    Dicts keep their order, sets are sorted; Counter, OrderedDict and defaultdict are written as the dict that
    they equal. Raises ValueError, with one line, for a value that does not come back equal (nan, any other
    class), is over `limit` characters or over MAX_DEPTH deep.
    """
    limit = MAX_TEXT if limit is None else limit
    text = _write(value, 0, [limit], True)
    if len(text) > limit:
        raise ValueError("longer than the limit")
    return text


def same(a, b):
    """Whether two values are the same literal value: equal, and of equal types all the way down. True is not
    1, 1 is not 1.0, (1,) is not [1]; nan is nothing; order in dicts and sets does not count. Never calls code
    of the values' classes: values of other types are not the same.
    """
    try:
        return _write(a, 0, [100 * MAX_TEXT], False) == _write(b, 0, [100 * MAX_TEXT], False)
    except (ValueError, RecursionError):
        return False


def _write(value, depth, room, ordered):
    """The text of `value`. `room` holds the characters left, which also stops what contains itself. Not
    ordered: dicts sorted and -0.0 as 0.0, so that equal values have equal texts."""
    kind = type(value)
    if value is None or kind is bool or kind is int and value.bit_length() <= MAX_BITS:
        text = repr(value)
    elif (kind is float or kind is complex) and value == value:
        text = repr(value + 0 if kind is complex or not ordered else value).replace("inf", "1e309")
    elif kind is str or kind is bytes:
        text = repr(value) if len(value) <= room[0] else value
    elif not any(kind is each for each in _CONTAINERS):               # `in` would ask a metaclass
        what = "nan or too large" if kind in (int, float, complex) else f"of type {_name(kind)}"
        raise ValueError(f"a value {what} has no literal")
    elif depth >= MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels deep, or contains itself")
    else:
        def write(item):
            return _write(item, depth + 1, room, ordered)
        room[0] -= (2 if kind in (list, tuple, set) else 4) * (len(value) or 1)
        if room[0] < 0:
            raise ValueError("longer than the limit")
        if kind in (list, tuple, set):
            parts = [*map(write, value)]
        else:
            parts = [f"{write(key)}: {write(item)}" for key, item in value.items()]
            parts = parts if ordered else sorted(parts)
        if kind is set:                               # numbers first and by size, then by text
            ranks = [(0, item) if type(item) in (bool, int, float) else (1, 0) for item in value]
            parts = [part for _, part in sorted(zip(ranks, parts))]
        if kind is tuple:
            return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
        if kind is set and not parts:
            return "set()"
        return ("[%s]" if kind is list else "{%s}") % ", ".join(parts)
    room[0] -= len(text)
    if room[0] < 0:
        raise ValueError("longer than the limit")
    return text


def _name(kind):
    """A class's name for a message, without asking its metaclass."""
    return type.__dict__["__name__"].__get__(kind)[:80]


def _describe(error):
    """One line on an exception, without calling code of its class."""
    arguments = BaseException.args.__get__(error)
    text = arguments[0][:200] if arguments and type(arguments[0]) is str else ""
    return f"{_name(type(error))}: {text}" if text else _name(type(error))


# ---------------------------------------------------------------------------------------------
# The caller's side.

# Hash seeds. `run` uses the first, so that what was validated is what is judged. They are chosen so that
# (from Python 3.11 on) no letter or digit has a hash of the same parity under all three, and of the sets of
# two letters 5% keep their order under all three, where chance alone would give 25%.
_SEEDS = (24, 267, 331)
_LAYERS = ("namespaces", "seccomp", "guards")
_OUT_OF_MEMORY = 77            # exit status of a run that has no memory left to say so
_LITERAL, _CALL, _PROGRAM = range(3)                  # what a run is for
_ORDER = struct.Struct("=dBII16s")     # seconds, purpose, sizes of program and input, a mark for the report
_END = struct.Struct("=i?d")   # exit status of a run, whether it was late, seconds
_STATUSES = "ok syntax error memory unsafe unrepresentable expression".split()
_HERE = os.path.abspath(__file__)
_BOOT = ("import sys, importlib.util as util; spec = util.spec_from_file_location('sandbox', sys.argv[1]); "
         "module = util.module_from_spec(spec); spec.loader.exec_module(module); module._work(sys.argv[2])")
_CANONICAL = re.compile(r"""(?:[({\[]|,[ ]|:[ ]|(?:,?[)}\]]|set\(\)|None|True|False
    |-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?(?:[-+][0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)?j?
    |b?'[^'\\]*(?:\\.[^'\\]*)*'|b?"[^"\\]*(?:\\.[^"\\]*)*")(?=[,:)}\]]|$))*""", re.VERBOSE)


class Executor:
    """Runs programs in sandboxed processes, `workers` at once (None: one a core).

    timeout    seconds of one run, counted from its own start. At its limit a run goes on while it
               has had less than that of a core's time and still gets some, so that a busy machine
               gives the same verdicts as an idle one
    memory_mb  memory of one run, on top of the interpreter's
    allow      modules that programs may import beside ALLOWED; only the walls of the system hold
               back what these can do, and time or datetime open the clock
    max_text   characters in a program, an input, or an output

    Use it as a context manager, or call close(). Not for several threads at once. Warns once, at the start,
    if this system denies the sandbox a wall.
    """

    def __init__(self, workers=None, timeout=10.0, memory_mb=1024, *, allow=(),
                 max_text=MAX_TEXT, _layers=_LAYERS):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        self._size = cores if workers is None else workers
        if not (self._size >= 1 and 0 < timeout <= MAX_TIMEOUT and memory_mb >= 1):
            raise ValueError("workers and memory_mb must be at least 1, and timeout above 0 and "
                             f"at most {MAX_TIMEOUT:g} seconds")
        self._timeout, self._max_text = timeout, max_text
        self._config = [memory_mb, _layers, sorted(ALLOWED.union(allow)), max_text]
        self._idle = {seed: [] for seed in _SEEDS}
        self._closed = False
        self._idle[_SEEDS[0]] += [_Worker([*self._config, _SEEDS[0]]) for _ in range(self._size)]
        weak = set()
        for worker in self._idle[_SEEDS[0]]:
            weak.update(worker.weak())
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
        for workers in self._idle.values():
            while workers:
                workers.pop().kill()

    def run(self, jobs):
        """The value of f(<input>) for each (program, input), as Executions in the same order.

        program  the text of a Python program that defines f
        input    what stands between the parentheses of the call: positional and keyword
                 arguments. Expressions are evaluated once, in a process of their own that knows
                 the builtins and not the program, to literal values. Only values reach the
                 program, which cannot see their text.

        Both may come from anywhere; the status says what they do wrong. Raises TypeError if they are not str,
        RuntimeError if the Executor is closed.
        """
        return self._run(_PROGRAM, jobs, _SEEDS[0])

    def validate(self, jobs):
        """Like run, but ok only for a valid task: f(<input>) returns something other than None, and the same
        value in fresh processes under each of three hash seeds, with other addresses."""
        jobs = list(jobs)
        results = [Execution("error", "", "f returned None", result.seconds) if result.output == "None"
                   else result for result in self.run(jobs)]
        for seed in _SEEDS[1:]:
            again = [i for i, result in enumerate(results) if result.ok]
            for i, second in zip(again, self._run(_PROGRAM, [jobs[i] for i in again], seed)):
                if second.status in ("timeout", "memory", "unsafe", "killed"):
                    results[i] = second
                elif not second.ok or second.call != results[i].call or not same(
                        *(parse_literal(each.output, self._max_text) for each in (results[i], second))):
                    results[i] = Execution("nondeterministic", "", "two runs of it differ", second.seconds)
        return results

    def read(self, texts):
        """The canonical literal of each text, as the output of an Execution, for text of a model: it is
        parsed in a run, and never evaluated. 'syntax' for what is no literal."""
        return self._run(_LITERAL, [("", text) for text in texts], _SEEDS[0])

    def _worker(self, seed):
        """A worker with this hash seed, alive and idle."""
        while self._idle[seed]:
            worker = self._idle[seed].pop()
            if worker.process.poll() is None:
                return worker
            worker.kill()
        return _Worker([*self._config, seed])

    def _run(self, purpose, jobs, seed):
        if self._closed:
            raise RuntimeError("this Executor is closed")
        jobs = [(program, text) for program, text in jobs]
        if not all(isinstance(text, str) for job in jobs for text in job):
            raise TypeError("a job is a pair of str: program, input")
        results = [None] * len(jobs)
        queue = collections.deque()                   # (job, purpose, program, input, seconds spent)
        for i, job in enumerate(jobs):
            if max(map(len, job)) > self._max_text:
                results[i] = Execution("syntax", "", f"over {self._max_text} characters", 0.0)
            else:
                queue.append((i, purpose, *job, 0.0))
        busy, died, poller = {}, set(), select.poll()
        try:
            while queue or busy:
                while queue and len(busy) < self._size:
                    worker = self._worker(seed)
                    busy[worker.ends] = worker, *queue[0]
                    poller.register(worker.ends, select.POLLIN)
                    worker.start(*queue[0][1:4], self._timeout - queue.popleft()[4])
                for fd, _ in poller.poll():
                    worker, i, purpose, _, text, spent = run = busy[fd]
                    end = os.read(fd, _END.size)
                    poller.unregister(fd)
                    del busy[fd]
                    if not end:                       # the worker died; its job gets a second chance
                        worker.kill()
                        results[i] = Execution("killed", "", "its worker died, twice", 0.0)
                        queue.extend([run[1:]] if i not in died else [])
                        died.add(i)
                        continue
                    self._idle[seed].append(worker)
                    result = self._result(worker.report(20 * self._max_text), spent, *_END.unpack(end))
                    if result.status == "expression" and not spent:   # the input has to be evaluated first
                        queue.appendleft((i, _CALL, "", text, result.seconds))
                    elif result.ok and purpose == _CALL:
                        call = parse_literal(result.output, self._max_text)
                        good = type(call) is tuple and [*map(type, call)] == [tuple, dict]
                        text = "*0"                    # forged: an error
                        if good:
                            text = "*{}, **{}".format(*(literal(each, self._max_text) for each in call))
                        queue.appendleft((i, _PROGRAM, jobs[i][0], text, result.seconds))
                    else:
                        results[i] = result
        finally:                                      # Ctrl-C: no run goes on
            for worker, *_ in busy.values():
                worker.kill()
        return results

    def _result(self, report, spent, code, late, seconds):
        """The Execution that a run's report and its end amount to; believes nothing that it can check."""
        status, error = "killed", f"its process ended without a result (exit status {code})"
        if late:
            status, error = "timeout", f"no value within {self._timeout:g} s"
        elif report:
            try:
                status, error, call, output = report.decode().split("\0")
                good = status in _STATUSES and (status != "expression" or not spent)
                if status == "ok":
                    good = (len(call) <= 2 * self._max_text and call.isprintable()
                            and len(output) <= self._max_text and _CANONICAL.fullmatch(output)
                            and literal(parse_literal(output, self._max_text), self._max_text) == output)
            except (ValueError, RecursionError):
                good = False
            if not good:
                status, error = "unsafe", "forged its result, or wrote into the file of its result"
        elif code == _OUT_OF_MEMORY:
            status, error = "memory", "out of memory"
        elif code < 0:
            error = f"its process died of signal {-code}"
        if status == "ok":
            return Execution(status, output, "", seconds + spent, call)
        line = "".join(filter(str.isprintable, " ".join(error[:1000].split())))[:300]
        return Execution(status, "", line or status, seconds + spent)


class _Worker:
    """The caller's handle on a worker. Orders go to it and ends come from it by pipes; programs, inputs and
    reports stand in two files in memory, so that no run can make the caller wait."""

    def __init__(self, config):
        import subprocess                             # not in the workers: it makes forks slower
        import tempfile
        make = getattr(os, "memfd_create", lambda name: os.dup(tempfile.TemporaryFile().fileno()))
        self.job, self.file = make("job"), make("report")
        # A lean start: not the caller's environment, directory, descriptors, terminal or memory, and no
        # site-packages.
        environment = {"PYTHONHASHSEED": str(config[-1]), "PYTHONSAFEPATH": "1",  # some need this to start:
                       "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        self.process = subprocess.Popen([sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT, _HERE,
             json.dumps([*config, self.job, self.file])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, pass_fds=(self.job, self.file), cwd="/", env=environment, start_new_session=True)
        self.ends = self.process.stdout.fileno()
        self.promises = None

    def weak(self):
        """What its walls do not keep, once it has started."""
        if self.promises is None:
            self.promises = self.process.stdout.readline()
        if not self.promises:
            raise RuntimeError("a sandbox worker did not start")
        return json.loads(self.promises)

    def start(self, purpose, program, text, seconds):
        """Has a run forked for a job."""
        program, text = (each.encode("utf-8", "surrogatepass") for each in (program, text))
        for file in (self.job, self.file):
            os.ftruncate(file, 0)
        os.pwrite(self.job, program + text, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        self.mark = os.urandom(16)
        try:
            self.weak()
            self.process.stdin.write(_ORDER.pack(seconds, purpose, len(program), len(text), self.mark))
        except (BrokenPipeError, RuntimeError):       # it died: the end of its pipe will say so
            pass

    def report(self, size):
        """What the run wrote, without its mark; b"?" if that is missing."""
        data = os.pread(self.file, size, 0)
        return data[16:] if data.startswith(self.mark) else data and b"?"

    def kill(self):
        """Ends the worker, and with it its runs."""
        self.process.kill()
        self.process.communicate()                    # also waits for the end of the zygote
        os.close(self.job)
        os.close(self.file)


# ---------------------------------------------------------------------------------------------
# The zygote: puts up the walls, forks the runs, watches the clock, and kills.

_NOBODY = 65534
_CLOCKS = {"time", "datetime"}                        # modules whose users may have the clock
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# System calls open to a run, on x86-64 and arm64. It can compute, get memory, read its job and write its
# report; everything else fails with EPERM.
_SYSCALLS = """
    write 1 64         close 3 57          mmap 9 222           mprotect 10 226     munmap 11 215
    brk 12 214         rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 mremap 25 216
    sched_yield 24 124 madvise 28 233      exit 60 93           futex 202 98        exit_group 231 94
    pread64 17 67"""


class _Zygote:

    def __init__(self, layers):
        self.layers, self.libc = layers, ctypes.CDLL(None, use_errno=True)
        self.alone = False                            # in a pid namespace
        self.filter = None                            # the seccomp filter of runs, as prctl takes it

    def attempt(self, step, *arguments):
        """Whether a step that a system may refuse was done."""
        try:
            step(*arguments)
        except (OSError, ValueError, OverflowError, AttributeError):
            return False
        return True

    def call(self, name, *arguments):
        """Whether a C function that a system may lack or refuse did what it is asked for."""
        arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        return getattr(self.libc, name, lambda *arguments: -1)(*arguments) != -1

    def separate(self):
        """Goes on as process 1 of namespaces of its own, where the system grants them: when it ends, the
        kernel kills all that is left in them. Who it was waits for that end."""
        new, user = 0x68000000, 0x10000000            # CLONE_NEWIPC, _NEWPID, _NEWNET; CLONE_NEWUSER
        if "namespaces" in self.layers:
            self.alone = self.call("unshare", new) or self.call("unshare", new | user)
        if os.fork():
            os.closerange(0, 2)
            os.wait()
            os._exit(0)

    def prepare(self, memory):
        """Takes on the limits, tries out the walls of the runs, and tells what they do not keep."""
        self.pid = os.getpid()
        spans = []
        self.attempt(lambda: spans.extend(self.mapped()))
        memory += sum(size for _, size, _ in spans)   # the limit comes on top of what is in use
        clock = []
        if not _CLOCKS & ALLOWED:
            # The vDSO, the kernel's code in this process, tells the time without a system call from data in
            # vvar. Without them (zeros; private, fixed, anonymous) it makes the call, which runs may not.
            clock = [self.call("mmap", start, size, 1, 0x32, -1, 0)
                     for start, size, name in spans if "[vvar" in name]
            self.call("prctl", 26, 2)                 # PR_SET_TSC: the processor's own clock (x86)
        if os.geteuid() == 0:
            for step, value in ((os.setgroups, []), (os.setgid, _NOBODY), (os.setuid, _NOBODY)):
                self.attempt(step, value)
        self.call("prctl", 38, 1, 0, 0, 0)            # PR_SET_NO_NEW_PRIVS
        self.call("prctl", 4, 0)                      # PR_SET_DUMPABLE: no ptrace
        self.call("prctl", 1, signal.SIGKILL)         # PR_SET_PDEATHSIG: not without the parent
        if "seccomp" in self.layers:
            self.make_filter()
            self.filter = self.filter if self.survives() else None
        for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 20 * MAX_TEXT),
                            (resource.RLIMIT_STACK, 8 << 20), (resource.RLIMIT_AS, memory)):
            bounded = self.attempt(resource.setrlimit, what, (value, value))
        gc.collect()
        gc.freeze()
        self.call("malloc_trim", 0)     # each page in use makes each fork slower
        promises = [(self.alone or self.filter,
                     "reach the network, signal processes of this user, leave some behind"),
                    (bounded and self.filter,
                     "use more memory than their limit, read and change files of this user"),
                    (self.filter and (_CLOCKS & ALLOWED or clock and all(clock)),
                     "tell the time, and return other values later")]
        print(json.dumps([what for kept, what in promises if not kept]), flush=True)

    def mapped(self):
        """(address, size, name) of the parts of this process's memory."""
        with open("/proc/self/maps") as file:
            for start, end, name in re.findall(r"(\w+)-(\w+) (.*)", file.read()):
                yield int(start, 16), int(end, 16) - int(start, 16), name

    def survives(self):
        """Whether a process behind the walls of a run can live."""
        pid = os.fork()
        if pid == 0:
            os._exit(0 if self.attempt(self.enter) and [*map(str, range(99))] else 1)
        return os.waitpid(pid, 0)[1] == 0

    def make_filter(self):
        machine = os.uname().machine
        numbers = [*map(int, _SYSCALLS.split()[2 if machine == "aarch64" else 1::3])]
        code = [(0x20, 0, 0, 4), (0x15, 0, len(numbers) + 1, _AUDIT_ARCH.get(machine, 0)), (0x20, 0, 0, 0),
                *[(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)],
                (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]          # EPERM, allow
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
        self.filter = ctypes.create_string_buffer(
            struct.pack("HxxxxxxQ", len(code), ctypes.addressof(self.code)))

    def serve(self):
        """Forks a run for each order. Returns in the runs alone, with their order."""
        while True:
            order = os.read(0, _ORDER.size)
            if not order:
                os._exit(0)                           # the caller is gone
            alive, held = os.pipe()                   # the run holds it open
            start = time.monotonic()
            pid = os.fork()
            if pid == 0:
                os.close(alive)
                self.enter()
                return _ORDER.unpack(order)
            os.close(held)
            late = self.watch(pid, alive, _ORDER.unpack(order)[0])
            os.close(alive)
            code = self.sweep(pid)
            os.write(1, _END.pack(code, late, time.monotonic() - start))

    def watch(self, pid, alive, seconds):
        """Waits for the end of a run, or for its limit. True if it is late.

        At its limit a run gets more time if it has not had it for want of a core: if it used less than
        `seconds` of a core's time, but some of it, so that it does not sleep, and at most 25 times its limit.
        """
        poller = select.poll()
        for fd in (alive, 0):
            poller.register(fd, 0)                    # only their end is of interest
        used, wait, end = 0.0, seconds, time.monotonic() + 25 * seconds
        while True:
            ready = dict(poller.poll(max(wait, 0) * 1000))
            if 0 in ready:                            # the caller is gone
                self.sweep(pid)
                os._exit(0)
            if ready:
                return False
            before = used
            try:
                used = time.clock_gettime((~pid << 3) | 2)                # of this process, on Linux
            except OSError:                           # it ends just now, or this is another system
                return True
            if used >= seconds or used - before < wait / 100 or time.monotonic() > end:
                return True
            wait = max(seconds - used, 0.01)

    def sweep(self, pid):
        """Kills the run and all that it started. → its exit status"""
        os.kill(pid, signal.SIGKILL)
        if not self.filter:                           # else it could start nothing
            self.attempt(os.kill, -1 if self.alone else -pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        while self.attempt(os.waitpid, -1, 0):
            pass
        return os.waitstatus_to_exitcode(code)

    def enter(self):
        """Puts up the walls of a run, which can only read its job and write its report from here on."""
        null = os.open(os.devnull, os.O_RDWR)         # its own: the next run would see flags set on it
        for fd in range(3):
            os.dup2(null, fd)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        if not self.alone:                            # else the end of the zygote is its end
            os.setsid()
            self.call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != self.pid:              # too late for that
                os._exit(1)
        if self.filter and not self.call("prctl", 22, 2, self.filter):            # PR_SET_SECCOMP
            os._exit(1)


# ---------------------------------------------------------------------------------------------
# The run: what happens in the forked process.

# Attributes by which programs walk out of their namespace, and functions that hand out modules.
_WALKS = frozenset("""__import__ __subclasses__ __globals__ __builtins__ __loader__ __spec__
    __code__ __closure__ f_globals f_builtins f_locals f_back tb_frame gi_frame cr_frame
    ag_frame""".split())
# An ASCII text needs no walk over its tree without one of these names, and with plain allowed imports alone.
_NEEDS_WALK = re.compile(r"[^\x00-\x7f]|%s|^(?!\s*(?:import (?:%s)|from (?:%s) import [A-Z]\w*)\s*$).*import"
                         % ("|".join(_WALKS), *["|".join(ALLOWED)] * 2), re.MULTILINE)
# What the interpreter's audit events say of a program that no task may do; a prefix each.
_EVENTS = tuple("""os. open subprocess. socket. ctypes. shutil. signal. pty. fcntl. resource. mmap.
    syslog. gc. sys.settrace sys.setprofile sys._current sys.addaudithook builtins.input
    builtins.breakpoint time.sleep tempfile. glob. pathlib. sqlite3. urllib. webbrowser.""".split())
_LIBRARY = os.path.dirname(os.path.realpath(os.__file__))


# The first id and the step to the next, under each hash seed.
_NUMBERINGS = ((140_000_000_000_000, 48), (141_000_000_000_001, -80), (142_000_000_000_005, 112))


class _Run:
    """Made in the zygote, since that is cheaper than in each run; each run has its own copy."""

    def __init__(self, seed, guarded):
        for name in [*sorted(ALLOWED), *_PRELOADED]:
            try:
                importlib.import_module(name)
            except ImportError:                       # not in this version of Python
                pass
        warnings.simplefilter("ignore")
        # What is random is a function of the hash seed: addresses and free lists differ between the seeds,
        # also where the system does not randomize them.
        self.seed = seed
        random.seed(seed)
        moved = 256 if seed == _SEEDS[2] else 1
        self.ballast = [(object(), bytes(size)) for size in range(1, 487, 16)
                        for _ in range(random.randrange(moved))]
        self.numbers, self.numbering = {}, _NUMBERINGS[_SEEDS.index(seed)]
        self.builtins = dict(vars(builtins), id=self.number)
        self.guarded, self.armed, self.about = guarded, False, ""
        if guarded:
            self.builtins["__import__"] = self.load
            sys.addaudithook(self.audit)

    def live(self, job, file, purpose, program, text, mark):
        """The life of a run: reads its job (`program` and `text` are sizes), does it, reports, and ends."""
        self.file, self.mark = file, mark
        random.seed(self.seed)                        # a fork seeds it anew
        self.taken = [*map(float, range(128))]        # freed ones tell how many runs there were
        try:
            texts = [os.pread(job, program, 0), os.pread(job, text, program)]
            os.close(job)
            texts = [each.decode("utf-8", "surrogatepass") for each in texts]
            (self.read, self.evaluate, self.execute)[purpose](texts)
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        finally:
            os._exit(1)

    def report(self, status, error="", output="", call="", write=os.write, leave=os._exit):
        """Tells the caller how the run ended, and ends it."""
        text = "\0".join([status, self.about + error.replace("\0", " ")[:1000], call, output])
        write(self.file, self.mark + text.encode("utf-8", "backslashreplace"))
        leave(0)

    def number(self, thing, /):
        """What programs get for id(): objects are numbered as they are asked for, upwards or downwards."""
        first, step = self.numbering
        return self.numbers.setdefault(id(thing), (first + step * len(self.numbers), thing))[0]

    def load(self, name, scope=None, local=None, fromlist=(), level=0):
        """The program's own import statement; modules that it loads use another."""
        if level or not _allowed(name):
            self.report("unsafe", f"imports {name}")
        return builtins.__import__(name, scope, local, fromlist, level)

    def audit(self, event, arguments):
        # A syntax error opens "<string>", and an import that fails lists the library.
        innocent = (event in ("open", "os.listdir", "os.scandir")
                    and str(arguments[0]).startswith(("<", _LIBRARY)))
        if self.armed and event.startswith(_EVENTS) and not innocent:
            self.report("unsafe", f"attempted {event}")

    def attempt(self, unsafe, action):
        """Does what hostile code says, and reports every way in which it can fail."""
        if self.guarded:
            if unsafe:
                self.report("unsafe", unsafe)
            self.armed = True
        try:
            return action()
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except BaseException as error:     # SystemExit and KeyboardInterrupt are no way out either
            self.report("error", _describe(error))

    def parsed(self, parse, text):
        try:
            return parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.report("syntax", _describe(error))

    def written(self, value):
        try:
            return literal(value)
        except ValueError as error:
            self.report("unrepresentable", str(error))

    def read(self, texts):
        """Reports the value of a literal."""
        self.report("ok", "", self.written(self.parsed(parse_literal, texts.pop())))

    def evaluate(self, texts):
        """Reports the literal of (args, kwargs), for an input."""
        self.about = "input: "
        code, unsafe = self.parsed(_compiled, self.parsed(_call, texts.pop()))
        scope = {"__builtins__": self.builtins, "<call>": lambda *args, **kwargs: (args, kwargs)}
        self.report("ok", "", self.written(self.attempt(unsafe, lambda: eval(code, scope))))

    def execute(self, texts):
        """Reports the value of f, for a program and an input of literals. An input that has to be evaluated
        must not meet the program: that it is one is reported."""
        self.about = "input: "
        arguments = _arguments(self.parsed(_call, texts.pop()).body)
        if not arguments:
            self.report("expression")
        self.written(arguments)
        args, kwargs = arguments
        self.about = ""
        code, unsafe = self.parsed(_compiled, texts.pop())
        module = sys.modules["program"] = types.ModuleType("program")     # classes look their module up
        scope = vars(module)
        scope["__builtins__"] = self.builtins

        def action():
            exec(code, scope)
            if "f" not in scope:
                raise NameError("the program defines no f")
            return _bound(scope["f"], args, kwargs), scope["f"](*args, **kwargs)

        call, value = self.attempt(unsafe, action)
        self.report("ok", "", self.written(value), call)


def _allowed(name):
    return name.partition(".")[0] in ALLOWED


def _compiled(source):
    """(code, what makes it unsafe) of a program's text, or of a call's tree."""
    if type(source) is str:
        if not _NEEDS_WALK.search(source):
            return compile(source, "<program>", "exec"), ""
        source = ast.parse(source, "<program>")
    modules, names = [], []
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("." if node.level else node.module)
            modules += [alias.name for alias in node.names if alias.name in sys.stdlib_module_names]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            names.append(node.id if isinstance(node, ast.Name) else node.attr)
    unsafe = [f"imports {name}" for name in modules if not _allowed(name)]
    unsafe += [f"uses {name}" for name in names if name in _WALKS]
    mode = "exec" if isinstance(source, ast.Module) else "eval"
    return compile(source, "<program>", mode), (unsafe or [""])[0]


def _call(text):
    """The tree of f(…), where the text cannot leave the parentheses."""
    tree = ast.parse(f"f(\n{text}\n)", "<input>", "eval")
    function = getattr(tree.body, "func", None)
    if not (isinstance(function, ast.Name) and function.lineno == 1):
        raise SyntaxError("not the arguments of one call")
    function.id = "<call>"                            # a name that the text cannot use
    return tree


def _arguments(call):
    """(args, kwargs) of a call of literals; None of one that has to be evaluated."""
    args, words = [], []
    try:
        for node in call.args:
            starred = isinstance(node, ast.Starred)
            args += ast.literal_eval(node.value) if starred else [ast.literal_eval(node)]
        for word in call.keywords:
            value = ast.literal_eval(word.value)
            words += [(word.arg, value)] if word.arg else value.items()
    except (ValueError, TypeError, AttributeError):
        return None
    return (args, dict(words)) if len(dict(words)) == len(words) else None


def _bound(f, args, kwargs):
    """The values of f's parameters, in a text that is equal for equal calls. Where f takes any number
    of them, or is no plain function, names do not count: no program can make one call look like two."""
    places, defaults, plain = (), {}, type(f) is types.FunctionType
    if plain:
        places = f.__code__.co_varnames[:f.__code__.co_argcount]
        defaults = dict(zip(places[::-1], (f.__defaults__ or ())[::-1])) | (f.__kwdefaults__ or {})
        plain = not f.__code__.co_flags & 12          # *args or **kwargs
    parts = []
    for name, value in (defaults | dict(zip([*places, *range(len(args))], args)) | kwargs).items():
        try:
            text = _write(value, 0, [2 * MAX_TEXT], False)
        except ValueError:                            # a default that has no literal
            text = "?"
        parts.append(f"{name}={text}" if plain else text)
    return ", ".join(sorted(parts))[:2 * MAX_TEXT]


def _work(config):
    """The life of a worker's process, of its zygote, and of the runs that it forks."""
    global ALLOWED, MAX_TEXT                          # of this process: its Executor's own
    memory_mb, layers, allowed, MAX_TEXT, seed, job, file = json.loads(config)
    ALLOWED = frozenset(allowed)
    del sys.argv[1:], sys.orig_argv[1:]
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run, zygote = _Run(seed, "guards" in layers), _Zygote(layers)
    zygote.separate()                                 # goes on in a new process
    zygote.prepare(memory_mb << 20)
    _, purpose, program, text, mark = zygote.serve()  # goes on in the runs
    run.live(job, file, purpose, program, text, mark)
