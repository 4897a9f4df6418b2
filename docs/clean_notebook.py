"""Takes out of an executed notebook what a page cannot show: progress bars, colours, streams in pieces.

    python docs/clean_notebook.py docs/first-hour.ipynb

`make notebook` runs it after executing. Figures and text stay as they were printed.
"""

import json
import re
import sys
from pathlib import Path

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BAR = re.compile(r"\d+%\|.*\d+/\d+ \[")  # tqdm's, one a line
_TIP = re.compile(r"^(?:💡 Tip|GPU available|TPU available)")  # Lightning's, not of this run


def cleaned(text: str) -> str:
    """Printed text without colours, progress bars, and lines of blanks."""
    lines = _COLOUR.sub("", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    kept = [line.rstrip() for line in lines if not _BAR.search(line) and not _TIP.match(line)]
    found = re.sub(r"\n{2,}", "\n\n", "\n".join(kept)).strip("\n")
    return found + "\n" if found else ""


def clean(notebook: dict) -> dict:
    """The notebook with one stream for each stretch of output, and no trace of where it ran."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        streams: list[dict] = []
        for output in cell.get("outputs", []):
            if output["output_type"] != "stream":
                output["metadata"] = {}
                streams.append(output)
                continue
            text = cleaned("".join(output["text"]))
            if streams and streams[-1]["output_type"] == "stream" and text:
                streams[-1]["text"] = [*streams[-1]["text"], *text.splitlines(keepends=True)]
            elif text:
                streams.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
        if cell["cell_type"] == "code":
            cell["outputs"] = streams
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    path = Path(sys.argv[1])
    found = clean(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
