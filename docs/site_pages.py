"""A hook of mkdocs: brings pages of the repository that lie outside docs/ into the site, and fits links to that.

Pages are written for a reader of the repository. In the site, README.md is the first page, files of docs/ lie at the
root, other pages keep their path, and a link to a file that the site doesn't have becomes its text.
"""

import json
import re
from pathlib import Path
from posixpath import join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/tiny_vl/README.md", "benchmarks/results/*.md")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/, and notebooks as pages."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for notebook in sorted(ROOT.glob("examples/*.ipynb")):
        place = notebook.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(notebook)))
        files.append(File.generated(config, f"{place.removesuffix('.ipynb')}.md", content=_as_page(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = _repository_path(page.file.src_uri)

    def fitted(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups(default="")
        place = _site_path(normpath(join(here, "..", target)))
        if files.get_file_from_path(place) is None:
            return link[0] if place.endswith(".md") else text  # mkdocs reports a page that is missing
        return f"{mark}[{text}]({relpath(place, join(page.file.src_uri, '..'))}{anchor})"

    return _LINK.sub(fitted, markdown)


def _repository_path(place: str) -> str:
    if place == "index.md":
        return "README.md"
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place


def _site_path(path: str) -> str:
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _as_page(notebook: Path) -> str:
    """The cells of a notebook as markdown, with their text outputs."""
    parts = [f"[This page as a notebook]({notebook.name})"]
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        outputs = ["".join(output["text"]) for output in cell.get("outputs", ()) if output["output_type"] == "stream"]
        parts += [f"```text\n{output.rstrip()}\n```" for output in outputs]
    title, *rest = parts[1:]
    return "\n\n".join([title, parts[0], *rest])
