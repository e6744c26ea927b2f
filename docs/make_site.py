"""Makes the site of these documents: `make docs`, then open site/index.html. Nothing is fetched.

The pages are those of docs/ with the README in front, the changes and the findings; where they link
to a folder or another file of the repository, the site holds a list of it or its text, so that the
site needs no network and no host. A link that leads nowhere, also to a heading, ends the build.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from posixpath import normpath, relpath
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "findings/README.md": "findings.md",
}
API = {
    "The predictor": "concat_cli.core.infer.predictor.Predictor",
    "What it finds": "concat_cli.core.infer.prediction.Prediction",
    "A segment": "concat_cli.core.infer.postprocess.Segment",
    "Classes": "concat_cli.core.vocabulary.Vocabulary",
    "Files": "concat_cli.core.infer.files.predict_paths",
    "Videos": "concat_cli.core.infer.video.Video",
    "Scores": "concat_cli.core.evaluate.weights.evaluate_weights",
    "Mistakes": "concat_cli.core.errors.UserError",
}
LINK = re.compile(r"(\]\(|^\[[^\]]+\]: |<img [^>]*src=\")([^)\s\"]+)", re.MULTILINE)


class Pages:
    """Writes pages, and whatever they link to, into a folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.named = PAGES | {f"docs/{p.name}": p.name for p in (ROOT / "docs").glob("*.md")}
        self.named |= {f"docs/{p.name}": f"{p.stem}.md" for p in (ROOT / "docs").glob("*.ipynb")}

    def write(self) -> None:
        """Every page."""
        for source, target in self.named.items():
            path = ROOT / source
            text = path.read_text("utf-8")
            text = of_notebook(text) if path.suffix == ".ipynb" else text
            self._put(target, LINK.sub(lambda link, at=source: self._link(link, at), text))
        parts = [f"## {what}\n\n::: {name}\n" for what, name in API.items()]
        self._put("api.md", "\n".join(["# The Python interface\n", *parts]))

    def _link(self, link: re.Match[str], source: str) -> str:
        """A link as the site has it; outside of the repository it stays as it is."""
        before, target = link.groups()
        place, mark, anchor = unquote(target).partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return link.group()
        found = normpath(f"{Path(source).parent.as_posix()}/{place}")
        if not (ROOT / found).exists():
            sys.exit(f"{source} links to {place}, which is not there.")
        start = Path(self.named[source]).parent.as_posix()
        return f"{before}{relpath(self._target(found), start)}{mark}{anchor}"

    def _target(self, found: str) -> str:
        """Where the site has a file or folder of the repository, which is brought there."""
        path = ROOT / found
        if found in self.named:
            return self.named[found]
        if path.is_dir():
            target = f"files/{found}.md"
            if not (self.out / target).exists():
                files = sorted(p.name for p in path.iterdir() if p.is_file())
                start = Path(target).parent.as_posix()
                links = ((one, relpath(self._target(f"{found}/{one}"), start)) for one in files)
                rows = "".join(f"- [{name}]({link})\n" for name, link in links)
                self._put(target, f"# {found}\n\n{rows}")
            return target
        is_picture = path.suffix in (".png", ".webp", ".svg")
        target = f"files/{found}" + ("" if is_picture else ".txt")  # .txt is shown, not downloaded
        (self.out / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self.out / target)
        return target

    def _put(self, target: str, text: str) -> None:
        path = self.out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def of_notebook(text: str) -> str:
    """A notebook's cells as one page, without what they print."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return "\n\n".join(
        body if kind == "markdown" else f"```python\n{body}\n```" for kind, body in cells
    )


def main() -> None:
    """Writes the pages to build/docs and has the site made of them."""
    pages = Pages(ROOT / "build" / "docs")
    shutil.rmtree(pages.out, ignore_errors=True)
    pages.write()
    tool = Path(sys.executable).with_name("zensical")
    code = subprocess.call(
        [tool, "build", "--strict", "--clean"],
        cwd=ROOT,
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
