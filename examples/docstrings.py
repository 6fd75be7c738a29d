"""Real text without a download: docstrings of Python's standard library, split in two halves each.

A sentence encoder should find the second half of a docstring from its first half.
"""

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

MODULES = (
    "argparse ast asyncio base64 bisect calendar cgi codecs collections concurrent.futures "
    "configparser contextlib copy csv ctypes dataclasses datetime decimal difflib dis email enum "
    "fileinput fnmatch fractions ftplib functools getpass gettext glob gzip hashlib heapq html "
    "http.client http.cookiejar http.server imaplib importlib inspect io ipaddress itertools json "
    "linecache locale logging lzma mailbox mimetypes multiprocessing numbers operator os pathlib "
    "pdb pickle pickletools platform plistlib poplib pprint profile queue random re sched secrets "
    "selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl statistics "
    "string struct subprocess symtable sysconfig tarfile tempfile textwrap threading timeit token "
    "tokenize trace traceback types typing unicodedata unittest unittest.mock urllib.parse "
    "urllib.request urllib.robotparser uuid warnings weakref webbrowser xml.dom.minidom "
    "xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zoneinfo"
).split()
WORDS = 24
"""Shortest docstring that is kept, in words."""


def halves(limit: int | None = None) -> list[tuple[str, str]]:
    """(first half, second half) of distinct docstrings, in a fixed order.

    Args:
        limit: At most this many, spread evenly over the modules; None: all.
    """
    seen: dict[str, tuple[str, str]] = {}
    for text in _docstrings():
        words = re.sub(r"\s+", " ", text).strip().split(" ")
        if len(words) >= WORDS:
            middle = len(words) // 2
            first, second = " ".join(words[:middle]), " ".join(words[middle:])
            seen.setdefault(first, (first, second))
    found = list(seen.values())
    if limit is None or len(found) <= limit:
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def _docstrings() -> Iterator[str]:
    for name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # removed from, or not built into, this Python
                continue
            yield from list(_members(module))


def _members(module: ModuleType) -> Iterator[str]:
    for owner in (module, *(c for _, c in inspect.getmembers(module, inspect.isclass))):
        if owner is not module and getattr(owner, "__module__", None) != module.__name__:
            continue
        for _, member in sorted(vars(owner).items()):
            doc = getattr(member, "__doc__", None)
            if callable(member) and isinstance(doc, str):
                yield doc


if __name__ == "__main__":
    pairs = halves()
    print(len(pairs), "docstrings from", sys.version.split()[0])
