"""The text that the benchmarks learn from and measure on."""

from benchmarks.places import data_folder


def texts() -> tuple[str, str]:
    """Return the text to learn from or to calibrate on, and another to measure on."""
    folder = data_folder() / "wikitext2"
    if folder.exists():
        return (folder / "valid.txt").read_text(), (folder / "test.txt").read_text()
    from pydoc_data.topics import topics

    half = len(topics) // 2
    found = list(topics.values())
    return "\n".join(found[:half]), "\n".join(found[half:])


def text_source() -> str:
    """Return where the text comes from, for the results."""
    return "WikiText-2" if (data_folder() / "wikitext2").exists() else "pydoc_data.topics"
