"""Gathers benchmarks/results/*.json into the README's table: python benchmarks/report.py

A result file with a list `readme` of [what, figure] and a dict `machine` gives a row each; no figure is typed by hand."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- measured: made by benchmarks/report.py -->", "<!-- /measured -->"


def table():
    rows = ["| what | figure | machine, date, commit | file |", "|---|---|---|---|"]
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        result = json.loads(path.read_text())
        for what, figure in result.get("readme", ()):
            facts = result["machine"]
            rows.append(f"| {what} | {figure} | {facts['device']}, {facts['date']}, {facts['commit'][:9]} | `{path.name}` |")
    return "\n".join(rows)


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
