"""The command `sightline` as the tests run it, and what they run it on."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from sightline.cli.main import main
from sightline.datasets.digits import digits
from sightline.datasets.folder import write_images

TINY = ("--tokenizer", "patch", "--embed-dim", 16, "--depth", 2, "--num-heads", 2, "--workers", 0)


class Said(NamedTuple):
    """What came of one command."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def cli(*words: object) -> Said:
    """Runs a command in this process."""
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        main([str(word) for word in words])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return Said(int(left.value.code or 0), out.getvalue(), err.getvalue())


def started(*words: object, **settings) -> subprocess.Popen:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "sightline", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **settings})


def ended(process: subprocess.Popen) -> Said:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return Said(process.returncode, out, err)


def refusal(*words: object) -> str:
    """The message of a command whose request is at fault."""
    said = cli(*words)
    assert said.status == 2, said
    assert said.out == ""
    assert said.err.startswith("sightline: ")
    return said.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Said]:
    """A small model of the digits, and what its training said."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, cli("train", "builtin:digits", "--epochs", 1, *TINY, "--out", folder, "--json")


@pytest.fixture(scope="module")
def model(trained) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """120 digits as image files in class folders."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_images(digits().select(np.arange(120)), folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three images and four files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, seed in (("2.png", 2), ("10.png", 10), ("ünï côdé.jpg", 3)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (23, 31, 3), dtype=np.uint8)).save(folder / name)
    whole = (folder / "2.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no image")
    return folder
