"""C-STORE as a sender sees it: the node and everybody else take turns with instances that nobody has seen before.

A turn is one or several processes of DCMTK's ``dcmsend`` with a folder of files each. What it takes until the first instance is there
(start of the program, reading the dictionary and the list of files, association) is measured with one instance, and taken off.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.data_sets import PER_STUDY, Pattern
from bench.receivers import DEFAULTS, PROMPT, Receiver, orthanc, program, script, storescp
from bench.services import in_memory, load, s3_service
from tests.system.running_node import running_node

COUNTS = {"tiny": 1200, "small": 240, "jpeg": 120, "raw": 8}
"""Instances of a turn, of all associations together."""
EVERYBODY = ("node", "Orthanc", "storescp", "pynetdicom", "floor")


@dataclass(frozen=True)
class Setting:
    """One way to measure."""

    title: str
    memory: bool = True
    """On the RAM disk (what a program costs), or on the disk (what a user gets)."""
    associations: int = 1
    environ: Mapping[str, str] = field(default_factory=lambda: PROMPT)
    """Of sender and receiver."""
    contenders: tuple[str, ...] = EVERYBODY
    kinds: tuple[str, ...] = tuple(COUNTS)
    per_study: int = PER_STUDY
    share: float = 1.0
    """Of the usual number of instances, where a turn would take minutes."""
    base: str = "Orthanc"
    """Whom the others are compared with."""


SETTINGS = (
    Setting("RAM disk, 1 association"),
    Setting("disk, 4 associations", memory=False, associations=4),
    Setting(
        "disk, 1 association, sender and receiver at their defaults",
        memory=False,
        environ=DEFAULTS,
        contenders=("node", "Orthanc", "storescp"),
        kinds=("small", "jpeg"),
        share=0.15,
    ),
    Setting("RAM disk, 1 association, every instance a study", contenders=("node", "Orthanc"), kinds=("tiny", "small"), per_study=1),
    Setting("RAM disk, 1 association, by storescu", contenders=("node", "node, TLS"), base="node"),
    Setting("RAM disk, 4 associations", associations=4),
    Setting("disk, 1 association", memory=False),
    Setting(
        "RAM disk, 8 associations, what lies behind",
        associations=8,
        contenders=("node", "node, S3 land", "node, S3 archive"),
        kinds=("tiny", "small", "jpeg"),
        base="node",
    ),
)
SHORT = (Setting("RAM disk, 1 association", kinds=("tiny", "jpeg"), share=0.1),)


@contextmanager
def node(folder: Path, *, tls: bool = False, environ: Mapping[str, str] = MappingProxyType({})) -> Iterator[Receiver]:
    """Run the node with all its processes but those that analyse."""
    environ = {"DICOM_NODE_INFERENCE__ENABLED": "false", **environ}
    if tls:
        environ |= {
            "DICOM_NODE_TLS__ENABLED": "true",
            "DICOM_NODE_TLS__CERTIFICATE": str(folder / "tls.pem"),
            "DICOM_NODE_TLS__KEY": str(folder / "tls.key"),
            "DICOM_NODE_TLS__CLIENT": "none",
        }
        folder.mkdir(parents=True)
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.pem")]
        subprocess.run(command, check=True, capture_output=True)
        (folder / "tls.key").chmod(0o600)
    with running_node(folder, environ=environ) as running:
        assert running.process is not None
        yield Receiver("node", "DERM_NODE", running.dimse_port, running.process.pid)


@contextmanager
def node_before_s3(folder: Path, *, policy: str) -> Iterator[Receiver]:
    """Run the node with an S3 service behind it, on this machine."""
    (folder / "s3" / "dicom").mkdir(parents=True)
    with s3_service(folder / "s3") as endpoint:
        environ = {
            "DICOM_NODE_ARCHIVE__STORE": "s3",
            "DICOM_NODE_ARCHIVE__ACKNOWLEDGE": policy,
            "DICOM_NODE_ARCHIVE__BUCKET": "dicom",
            "DICOM_NODE_ARCHIVE__ENDPOINT_URL": endpoint,
            "DICOM_NODE_ARCHIVE__REGION": "us-east-1",
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        }
        with node(folder / "node", environ=environ) as receiver:
            yield receiver


def contenders(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, Callable[[Path], AbstractContextManager[Receiver]]]:
    """Return how to start those that are here; who is missing is named."""
    known: dict[str, Callable[[Path], AbstractContextManager[Receiver]]] = {
        "node": node,
        "node, TLS": partial(node, tls=True),
        "node, S3 land": partial(node_before_s3, policy="land"),
        "node, S3 archive": partial(node_before_s3, policy="archive"),
        "Orthanc": partial(orthanc, environ=environ),
        "storescp": partial(storescp, environ=environ),
        "pynetdicom": partial(script, "pynetdicom"),
        "floor": partial(script, "floor"),
    }
    for name in names:
        if name in ("Orthanc", "storescp") and program(name) is None:
            print(f"C-STORE: {name} is not installed (make peers); measured without it")
    return {name: known[name] for name in names if name not in ("Orthanc", "storescp") or program(name) is not None}


def send(folders: Sequence[Path], receiver: Receiver, environ: Mapping[str, str], *, scu: str, jpeg: bool, tls: bool) -> float:
    """Send each folder in an association of its own, all at once; seconds."""
    command = [scu, "--max-pdu", "131072", "-aec", receiver.ae_title, *(["+tla", "-ic"] if tls else [])]
    command += ["--propose-jpeg8"] if jpeg and scu == "storescu" else []  # dcmsend looks into the files
    command += ["127.0.0.1", str(receiver.port), "+sd"]
    began = time.perf_counter()
    senders = [
        subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environ})
        for folder in folders
    ]
    answers = [(sender.communicate()[0], sender.returncode) for sender in senders]
    took = time.perf_counter() - began
    for words, code in answers:
        if code:
            raise RuntimeError(f"{scu} to {receiver.name} ended with {code}: {words.decode(errors='replace')[-800:]}")
    return took


def processor_s(process_id: int) -> float:
    """Return the seconds of processor that a process and its children, ended ones included, have used so far."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            used[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found, left = 0.0, [process_id]
    while left:
        one = left.pop()
        found += used.get(one, 0.0)
        left += children.get(one, [])
    return found


@dataclass
class _Turns:
    """What one contender did."""

    first_s: list[float] = field(default_factory=list)
    """With one instance."""
    took_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def rates(self, count: int) -> list[float]:
        first = min(self.first_s)
        return [(count - 1) / max(took - first, 1e-3) for took in self.took_s]


def measured(setting: Setting, rounds: int, folder: Path) -> dict[str, Any]:
    """Let the contenders of a setting take turns, each round beginning with another; medians and ratios by kind."""
    results: dict[str, Any] = {}
    scu = "storescu" if "node, TLS" in setting.contenders else "dcmsend"
    with ExitStack() as stack:
        files = stack.enter_context(in_memory(wanted=True))
        receivers = {
            name: stack.enter_context(begin(folder / name.replace(", ", "-").replace(" ", "-")))
            for name, begin in contenders(setting.contenders, setting.environ).items()
        }

        def turn(name: str, pattern: Pattern, count: int, associations: int) -> tuple[float, float]:
            folders = [files / f"{number}" for number in range(associations)]
            for part in folders:
                part.mkdir()
                pattern.write_files(part, count // associations, per_study=setting.per_study)
            before = processor_s(receivers[name].process_id)
            took = send(folders, receivers[name], setting.environ, scu=scu, jpeg=pattern.kind == "jpeg", tls=name.endswith("TLS"))
            used = processor_s(receivers[name].process_id) - before
            for part in folders:
                shutil.rmtree(part)
            return took, used * 1000 / count

        for kind in setting.kinds:
            pattern = Pattern.drawn(kind)
            count = max(int(COUNTS[kind] * setting.share), setting.associations)
            turns = {name: _Turns() for name in receivers}
            for name in receivers:  # connections, caches, the first folders
                turn(name, pattern, 2, 1)
            for number in range(rounds):
                order = list(receivers)
                order = order[number % len(order) :] + order[: number % len(order)]
                for name in order:
                    turns[name].first_s.append(turn(name, pattern, 1, 1)[0])
                    took, cpu_ms = turn(name, pattern, count, setting.associations)
                    turns[name].took_s.append(took)
                    turns[name].cpu_ms.append(cpu_ms)
            results[kind] = line = _summary(turns, count, setting.base)
            print(f"  {kind:<6}" + "  ".join(_words(name, found) for name, found in line.items()), flush=True)
    return results


def run(rounds: int, *, short: bool = False, share: float = 1.0) -> dict[str, Any]:
    """Measure all settings, each turn with a `share` of the usual instances; or in `short` a small one that shows that everything works."""
    results: dict[str, Any] = {}
    if program("dcmsend") is None:
        print("C-STORE: dcmsend is not installed (make peers); not measured")
        return results
    for setting in SHORT if short else SETTINGS:
        print(f"C-STORE, {setting.title}; load {load():.1f}", flush=True)
        with in_memory(wanted=setting.memory) as folder:
            before = load()
            scaled = replace(setting, share=setting.share * share)
            results[setting.title] = {**measured(scaled, rounds, folder), "load": [round(before, 1), round(load(), 1)]}
    return results


def _summary(turns: Mapping[str, _Turns], count: int, base: str) -> dict[str, Any]:
    rates = {name: one.rates(count) for name, one in turns.items()}
    found: dict[str, Any] = {}
    for name, values in rates.items():
        found[name] = {"per second": round(statistics.median(values), 1), "rates": [round(value, 1) for value in values]}
        if any(turns[name].cpu_ms):
            found[name]["cpu ms"] = round(statistics.median(turns[name].cpu_ms), 2)
        if base in rates and name != base:
            ratios = [mine / theirs for mine, theirs in zip(values, rates[base], strict=True)]
            found[name]["ratio"] = round(statistics.median(ratios), 2)
    return found


def _words(name: str, found: Mapping[str, Any]) -> str:
    ratio = f" = {found['ratio']:.2f}" if "ratio" in found else ""
    return f"{name} {found['per second']:.1f}/s{ratio} ({found.get('cpu ms', 0):.1f} ms CPU)"
