"""
Rollouts in a folder: which model, decoding and problems they belong to, what is reused when a run is started again, and how
several processes share the work.

`settings.json` says what the rollouts are of. `rollouts.jsonl` has one line per rollout, and `rollouts-k.jsonl` those of process
k. A folder is made with its first rollout, so a run that fails before leaves nothing behind.
"""

import errno
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Set
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


logger = logging.getLogger(__name__)

ROLLOUTS, SETTINGS, SUMMARY = "rollouts.jsonl", "settings.json", "summary.json"
MAY_CHANGE = {"batch_size", "num_problems", "data", "versions"}
"""Settings that need not agree when a run is started again: the problems of the rollouts are compared one by one."""


def processes() -> PartialState:
    """
    The processes that `accelerate launch` started, also without an accelerator. They wait for each other as long as the slowest
    needs: the launcher ends all of them if one fails, so no timeout is needed.
    """
    patient = InitProcessGroupKwargs(timeout=timedelta(days=365)).to_kwargs()
    return PartialState(cpu=not torch.accelerator.is_available(), **patient)


def check_folder(folder: str | Path) -> None:
    """
    Whether results can be written to a folder, which need not exist yet.

    Raises:
        `OSError`: If they cannot, with the folder that is to blame.
        `ValueError`: If the name is empty, which would be the current folder.
    """
    if not str(folder):
        raise ValueError("`output_dir` is empty. Give the name of a folder, or '.' for the current one.")
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"`output_dir={str(folder)!r}` is no folder: '{existing}' is a file. Give another one."
        )
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".trl-score-", dir=existing))
    except OSError as error:
        raise PermissionError(
            f"`output_dir={str(folder)!r}` cannot be written: '{existing}' does not allow it ({error.strerror}). Give another folder."
        ) from error


def disconnect() -> None:
    """For the end of a script: no process goes before all are done, nor while its connections still have work."""
    state = processes()
    state.wait_for_everyone()
    if state.use_distributed:
        time.sleep(0.1)  # gloo's thread frees the tensors of the last call, and aborts if Python is gone by then
    state.destroy_process_group()


class Store:
    """
    The rollouts of a job, in a folder or in memory. In a folder, the processes of `accelerate launch` share the work: each
    writes a file of its own, and reads all.

    Args:
        output_dir (`str`, *optional*):
            The folder. It is not made before the first rollout is there.
        settings (`dict`):
            What the rollouts are of.
        problems (`list[str]`):
            A fingerprint of each problem. It is kept with the rollouts, so that those of other problems are not reused.

    Raises:
        `ValueError`: If the folder holds rollouts of something else.
    """

    def __init__(self, output_dir: str | Path | None, settings: dict, problems: list[str]):
        self.folder = None if output_dir is None else Path(output_dir)
        self.settings = json.loads(strict_json(settings))
        self.problems = problems
        self.rollouts: list[dict] = []
        self.handle = None  # of the file that this process writes, from its first rollout on
        self.size = 0  # of the file, when the folder was read
        self.state = processes()
        if self.folder is not None:
            with self.state.main_process_first():
                self._open()
            self.state.wait_for_everyone()  # nobody writes while another still reads
        elif self.state.num_processes > 1:
            raise ValueError("Processes share their rollouts through a folder, but `output_dir` is None. Set it.")
        self.done = set(map(position, self.rollouts))
        if self.done and self.state.is_main_process:
            number = len(problems) * self.settings.get("num_samples", 1)
            logger.warning(f"{len(self.done)} of {number} rollouts are reused from an earlier run in '{self.folder}'.")

    def _open(self) -> None:
        file = self.folder / SETTINGS
        if not file.exists():
            for what, pattern in (("rollouts", "rollouts*.jsonl"), (f"a {SUMMARY}", SUMMARY)):
                if any(file.stat().st_size for file in self.folder.glob(pattern)):  # perhaps another program's
                    self._refuse(f"{what}, but no {SETTINGS} that says of what")
            return
        # The first process looks for all of them: each look locks the file for a moment.
        if self.state.is_main_process and any(map(is_being_written, self.folder.glob("rollouts*.jsonl"))):
            self._refuse_two()
        before = read_json(file)
        if "weights" not in before:
            self._refuse(
                "results of an earlier version of trl-score, which did not record the weights, the decoding and the problems"
            )
        # Folders of earlier versions do not say what graded.
        may_change = MAY_CHANGE | ({"grader"} - before.keys())
        same = ("data", "grader", "split")
        if "data" in before and all(before.get(name) == self.settings.get(name) for name in same):
            may_change |= {"task"}  # d.jsonl is ./d.jsonl
        changes = differences(before, self.settings, may_change)
        if changes:
            self._refuse(f"another evaluation: {changes}")
        rollouts = [row for row in read_rollouts(self.folder, repair=True) if row["index"] < len(self.problems)]
        for row in rollouts:
            if row["problem"] != self.problems[row["index"]]:
                self._refuse(f"rollouts of other problems: number {row['index']} has changed since")
        self.rollouts, self.settings = rollouts, before | self.settings
        self.size = self.file.stat().st_size if self.file.exists() else 0

    def _refuse_two(self) -> None:
        raise ValueError(
            f"Another command writes to `output_dir={str(self.folder)!r}` at the same time. Wait until it is done, or take another "
            "folder."
        )

    def _refuse(self, what: str) -> None:
        raise ValueError(f"`output_dir={str(self.folder)!r}` holds {what}. Take another folder.")

    @property
    def file(self) -> Path:
        """Where this process writes."""
        number = self.state.process_index
        return self.folder / (f"rollouts-{number}.jsonl" if number else ROLLOUTS)

    def add(self, records: list[dict]) -> None:
        records = [record | {"problem": self.problems[record["index"]]} for record in records]
        self.rollouts += records
        self.done |= set(map(position, records))
        if self.folder is not None:
            self._claim()
            lines = b"".join(strict_json(record, indent=None).encode() + b"\n" for record in records)
            self.handle.write(lines)
            self.handle.flush()

    def _claim(self) -> None:
        """Any process may be the first; all write the same settings. No other command may write the same file."""
        if self.handle is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = self.file.open("ab")
        if not lock(handle) or handle.tell() != self.size:
            handle.close()
            self._refuse_two()
        (self.folder / SUMMARY).unlink(missing_ok=True)  # of fewer rollouts
        self._write_settings()
        self.handle = handle

    def _write_settings(self) -> None:
        whole = self.folder / f"{SETTINGS}.{self.state.process_index}"
        whole.write_text(strict_json({"versions": versions()} | self.settings), "utf-8")
        whole.replace(self.folder / SETTINGS)

    def all_rollouts(self) -> list[dict]:
        """
        Those of all processes, by problem and sample. To be called once, by all of them, when they are done.

        Raises:
            `OSError`: If this process cannot see the rollouts of the others.
        """
        if self.handle is not None:
            self.handle.close()
        if self.state.num_processes > 1:
            self.state.wait_for_everyone()
            self.rollouts = [row for row in read_rollouts(self.folder) if row["index"] < len(self.problems)]
            number = len(self.problems) * self.settings.get("num_samples", 1)
            if len(self.rollouts) < number:
                raise FileNotFoundError(
                    f"'{self.folder}' has {len(self.rollouts)} of {number} rollouts, as process {self.state.process_index} sees it: the "
                    "processes write to different folders. Set `output_dir` to one that all of them share."
                )
        self.rollouts.sort(key=position)
        if self.folder is not None and self.folder.exists() and self.state.is_main_process:
            self._write_settings()
        return self.rollouts

    def write(self, name: str, content: dict) -> None:
        """A file beside the rollouts, by the main process."""
        if self.folder is not None and self.state.is_main_process:
            write_json(self.folder / name, content)


def lock(handle: BinaryIO) -> bool:
    """
    Lock a file for this process, until the process closes the file or ends; False if another process has locked it. True where files
    cannot be locked, as on some network file systems.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def is_being_written(file: Path) -> bool:
    """Whether another process has locked the file."""
    try:
        with file.open("r+b") as handle:
            return not lock(handle)
    except OSError:
        return False


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file, then move it to `path`, so that no reader sees a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path: Path, content) -> None:
    """Write a file of [`strict_json`], as a whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(strict_json(content), "utf-8"))


def position(row: dict) -> tuple[int, int]:
    return row["index"], row["sample"]


def differences(before: dict, now: dict, ignored: set[str] = frozenset()) -> str:
    """Settings that differ, in words; nothing if none does. The same weights may have another name, unless it is that of an endpoint."""
    before, now = _flat(before), _flat(now)
    if now.get("weights") is not None and now["weights"] == before.get("weights") and now.get("backend") != "endpoint":
        ignored = ignored | {"model"}
    return ", ".join(
        f"{name} {before.get(name)!r} instead of {value!r}"
        for name, value in now.items()
        if before.get(name) != value and name not in ignored
    )


def _flat(settings: dict) -> dict:
    flat = {}
    for name, value in settings.items():
        if name == "tokenizer" and isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def strict_json(content, indent: int | None = 2) -> str:
    """JSON that any reader takes: `null` where a number has no value."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=indent is None, allow_nan=False)


def _finite(content):
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def parse_json(text: bytes, where: str, remedy: str, needed: Set[str] = frozenset()) -> dict:
    """
    JSON that a command wrote: an object with the fields that are needed.

    Raises:
        `ValueError`: If it is none, as after a power failure.
    """
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not needed <= content.keys():
            raise ValueError(f"it has no {', '.join(sorted(needed)) or 'fields'}")
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}. {remedy}") from error
    return content


def read_json(file: Path) -> dict:
    """[`parse_json`] of a file."""
    return parse_json(file.read_bytes(), f"'{file}'", "Restore it, or run the command that wrote it again.")


def read_rollouts(folder: Path, repair: bool = False) -> list[dict]:
    """
    What a folder has, by problem and sample. A line that was being written when a process stopped does not count; with `repair`
    it is removed from its file, which no process may be writing then.
    """
    rollouts = {}
    for file in sorted(folder.glob("rollouts*.jsonl")):
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if repair and len(whole) < len(data):
            with file.open("r+b") as handle:
                handle.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            remedy = "Remove the line; its rollout is then sampled again."
            row = parse_json(line, f"'{file}', line {number},", remedy, {"index", "sample"})
            rollouts[position(row)] = row
    return sorted(rollouts.values(), key=position)


def load_rollouts(folder: str | Path) -> tuple[dict, list[dict]]:
    """
    Settings and rollouts of an evaluation or a collection, by problem and sample.

    Raises:
        `FileNotFoundError`: If the folder holds none.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"'{folder}' holds no evaluation: it has no {SETTINGS}.")
    settings = read_json(folder / SETTINGS)
    number = settings.get("num_problems", math.inf)  # a later run may have been of fewer
    return settings, [row for row in read_rollouts(folder) if row["index"] < number]


def versions() -> dict[str, str]:
    names = ("trl-score", "trl", "transformers", "torch")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
