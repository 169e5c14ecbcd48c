"""`spinfast` as a real process."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Spinfast:
    """A real process; `wait(pattern)` until its stderr, or what a terminal shows, has it."""

    def __init__(self, *words, environment=(), **streams):
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | dict(environment)
        command = [sys.executable, "-m", "spinfast.run", *map(str, words)]
        streams = {"stderr": subprocess.PIPE} | streams
        self.process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, **streams)
        self.seen, self._news = "", threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.seen += line
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def text(self):
        """What is searched for a pattern."""
        return self.seen

    def wait(self, pattern, seconds=60):
        with self._news:
            self._news.wait_for(lambda: re.search(pattern, self.text) or self.process.poll() is not None, seconds)
        found = re.search(pattern, self.text)
        assert found, self.seen
        return found

    def end(self, number=signal.SIGTERM, seconds=60):
        self.process.send_signal(number)
        return self.process.wait(seconds)


class Screen(Spinfast):
    """`spinfast` in a terminal of its own. `type(text)` ends the line; `seen` is all that was written to it."""

    def __init__(self, *words, columns=80, encoding="utf-8", **environment):
        self.encoding = encoding
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        terminal = {"TERM": "xterm-256color", "COLUMNS": ""} | environment
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        streams |= {"start_new_session": True, "preexec_fn": _own_terminal}
        super().__init__(*words, environment=terminal, **streams)
        os.close(slave)

    def _read(self):
        with suppress(OSError):  # the other side is gone
            while data := os.read(self.master, 4096):
                with self._news:
                    self.seen += data.decode(self.encoding, "replace").replace("\r\n", "\n")
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def text(self):
        """Without colours, and with a blank for every line end: a line may be broken anywhere."""
        return " ".join(re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self.seen).split())

    def type(self, text):
        os.write(self.master, (text + "\n").encode(self.encoding))

    def press(self, key, pattern):
        """A control key, once the prompt waits for one, and a pattern behind it."""
        with self._news:
            self.seen = ""
        time.sleep(1.0)
        os.write(self.master, key)
        self.wait(pattern)

    def ask(self, text, pattern, seconds=60):
        """At the prompt, type a line and wait for a pattern behind it."""
        self.wait(r"(>>>|\.\.\.)$")
        with self._news:
            self.seen = ""
        self.type(text)
        return self.wait(pattern, seconds)


def _own_terminal():
    """A new session is also a group of its own to the scheduler, which was seen to starve one for minutes where other
    work filled both cores: it goes first, where that is allowed."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    with suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write("-10")
