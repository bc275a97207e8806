"""Rows of a measurement as a Markdown table."""

from typing import Any


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return a table of the keys in `columns`, under their headings; what is absent is a dash."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)
