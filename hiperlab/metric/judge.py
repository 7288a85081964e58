"""Any judge of one's own: a program or a Python function that gives a number for a text and its pictures.

A program is started once for all pictures. It reads one JSON line for each from its standard input and writes one for
each, in the same order, to its standard output:

    {"prompt": "a photo of a cat on the beach", "pictures": ["/…/samples/cats/01_0.png", "/…/0.png", "/…/1.png"]}
    0.83

The first picture is the drawn one, the others are real ones of the concept. An answer is a number of which more is
better, or null where the judge finds nothing. A function is called as `function(prompt, pictures)` with RGB PIL
pictures and returns the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from hiperlab import files
from hiperlab.errors import UserError
from hiperlab.hub import first_line
from hiperlab.metric.contract import CLEANINGS, EmbeddedPictures, Measurement, Score, cleaned
from hiperlab.metric.encoder import EncoderConfig
from hiperlab.metric.extractor import Encoder
from hiperlab.metric.picture import open_picture
from hiperlab.metric.rows import PICTURE
from hiperlab.metric.weights import MissingWeightsError

LONGEST = 160  # characters of what a judge said, in messages


class Question(NamedTuple):
    """What a judge is asked of one picture.

    Attributes:
        prompt: its text.
        picture: the drawn one.
        references: real pictures of the concept.
    """

    prompt: str
    picture: Path
    references: Sequence[Path]


class JudgeEncoder(Encoder):
    """A judge at work; it embeds nothing.

    Args:
        ask: questions -> answers, in their order, NaN where nothing was found.
        weights: see `Judge`.
    """

    def __init__(self, ask: Callable[[Sequence[Question]], list[float]], weights: str) -> None:
        super().__init__()
        self.ask, self.weights = ask, weights


@dataclass(frozen=True, kw_only=True)  # a config's `_args_` must not bring a program past `cli.targets.commands`
class Judge(EncoderConfig):
    """A program or a function that judges; exactly one of `command` and `call` is given.

    Attributes:
        command: the program and its arguments, not through a shell; what it says on standard error is shown when it
            fails.
        call: the function.
        version: what its numbers depend on, in words of one's own ("gpt-4o-2024-05-13, prompt 3"): part of the
            protocol's hash, and with the content of files that `command` names of the rows' `weights`.
        timeout: seconds that the program has for all pictures together.
    """

    command: Sequence[str] | None
    call: Callable[..., Any] | None
    version: str | None
    timeout: float

    def __post_init__(self) -> None:
        if self.command is not None:
            words = [self.command] if isinstance(self.command, str) else self.command
            object.__setattr__(self, "command", tuple(map(str, words)))

    def fetch(self, key: str) -> None:
        """Check that a judge is named, and its version.

        Raises:
            MissingWeightsError: none is.
            UserError: two are, one without a version, or one that cannot run.
        """
        if not self.command and self.call is None:
            raise MissingWeightsError(
                f"{key}.command is not set: name the judge's program, e.g. '{key}.command=[python,judge.py]', or give "
                f"{key}.call a function."
            )
        if self.command and self.call is not None:
            raise UserError(f"{key}.command and {key}.call exclude each other: name one judge.")
        if not self.version or not str(self.version).strip():
            raise UserError(f"{key}.version is not set: say what the judge's numbers depend on, e.g. {key}.version=1.")
        if not self.timeout > 0:
            raise UserError(f"{key}.timeout={self.timeout} is no time: give seconds above 0.")

    def load(self, key: str) -> Encoder:
        """The judge, which is started when it is asked."""
        self.fetch(key)
        digest = hashlib.sha256(f"{self.version} {self._called()}".encode())
        for word in self.command or ():
            if (path := Path(word)).is_file():
                digest.update(files.sha256(path).encode())
        ask = partial(called, self.call) if self.call else partial(answered, self.command or (), self.timeout)
        return JudgeEncoder(ask, digest.hexdigest()[:12])

    def settings(self) -> dict[str, Any]:
        """The version, and which function; where a program lies on this machine moves no number."""
        return {"kind": type(self).__name__, "version": self.version, "call": self._called()}

    def _called(self) -> str | None:
        """The function's dotted name."""
        function = self.call.func if isinstance(self.call, partial) else self.call
        return f"{function.__module__}.{getattr(function, '__qualname__', function)}" if function else None


def answered(command: Sequence[str], timeout: float, questions: Sequence[Question]) -> list[float]:
    """A program's answers, NaN for null.

    Args:
        command: the program and its arguments.
        timeout: seconds for all.
        questions: what it is asked.

    Raises:
        UserError: it cannot be started, takes too long, fails, or does not give one finite number or null for each.
    """
    name = " ".join(command)
    asked = [
        {"prompt": each.prompt, "pictures": [str(path) for path in (each.picture, *each.references)]}
        for each in questions
    ]
    lines = "".join(json.dumps(each) + "\n" for each in asked)
    try:
        done = subprocess.run(
            list(command), input=lines, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the judge `{name}` took more than {timeout:g} s: give it more by timeout.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the judge `{name}` cannot be run ({first_line(error)}).") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:LONGEST]
        raise UserError(f"the judge `{name}` ended with code {done.returncode}: {said}")
    answers = [line for line in done.stdout.splitlines() if line.strip()]
    if len(answers) != len(questions):
        raise UserError(f"the judge `{name}` gave {len(answers)} answers for {len(questions)} pictures: one line each.")
    return [_number(_parsed(line), f"`{name}`", each) for line, each in zip(answers, questions, strict=True)]


def called(function: Callable[..., Any], questions: Sequence[Question]) -> list[float]:
    """A function's answers, NaN for None.

    Raises:
        UserError: it raises, or does not return a finite number or None.
    """
    found = []
    for each in questions:
        pictures = [open_picture(path) for path in (each.picture, *each.references)]
        try:
            answer = function(each.prompt, pictures)
        except Exception as error:  # anybody's code
            raise UserError(f"the judge failed on {each.picture.name} ({first_line(error)}).") from error
        found.append(_number(answer, "function", each))
    return found


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line  # no number, and named as what it is


def _number(answer: Any, name: str, question: Question) -> float:
    if answer is None:
        return math.nan
    try:
        value = math.nan if isinstance(answer, str | bool) else float(answer)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        said = str(answer)[:LONGEST]
        raise UserError(f"the judge {name} answered {said!r} for {question.picture.name}: expected a number or null.")
    return value


@dataclass(frozen=True)
class JudgeScore(Score):
    """A judge's number for each picture.

    Attributes:
        encoder: key of a `Judge`.
        cleaning: "remove", "noun" or "keep", see `hiperlab.metric.contract.clean`.
        references: so many of the concept's real pictures are shown beside the drawn one, 0 for none.
    """

    cleaning: str
    references: int
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"cleaning": CLEANINGS}

    def check(self, key: str) -> None:
        """Refuse a negative number."""
        super().check(key)
        if self.references < 0:
            raise UserError(f"{key}.references={self.references}: use 0 for none, or 1 or more.")

    def measurements(self, pictures: EmbeddedPictures) -> Iterator[Measurement]:
        """One number per picture."""
        judge = pictures.encoder
        if not isinstance(judge, JudgeEncoder):
            raise UserError(f"{type(judge).__name__} is no judge: give the score an encoder that is one.")
        with tempfile.TemporaryDirectory(prefix="hiperlab-judge-") as folder:
            shown = {
                concept: _written(pictures.real(concept)[: self.references], Path(folder) / str(number))
                for number, concept in enumerate(pictures.concepts)
            }
            questions = [
                Question(cleaned(record, self.cleaning), pictures.path(record), shown[record["concept"]])
                for record in pictures.records
            ]
            answers = judge.ask(questions)
        for record, value in zip(pictures.records, answers, strict=True):
            yield Measurement(PICTURE, value, record["concept"], record)


def _written(pictures: Sequence[Image.Image], folder: Path) -> list[Path]:
    """Pictures as files."""
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths
