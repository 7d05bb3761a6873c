"""Weights that come with Sightline itself: `builtin:NAME`, a model directory in `weights`."""

from pathlib import Path

from sightline.errors import UserError, printable, suggest

PREFIX = "builtin:"
_FOLDER = Path(__file__).with_name("weights")


def shipped() -> dict[str, Path]:
    """The model directories that come with Sightline, by name."""
    return {path.name: path for path in sorted(_FOLDER.iterdir()) if (path / "config.json").is_file()}


def shipped_folder(source: str) -> Path:
    """The model directory of `builtin:NAME`. Raises UserError for an unknown name."""
    name, known = source.removeprefix(PREFIX), shipped()
    if name not in known:
        what = f"there are no weights '{printable(source)}' in Sightline.{suggest(name, known)}"
        raise UserError(f"{what} There are {', '.join(PREFIX + one for one in known)}.")
    return known[name]
