"""The site of the documentation: `make docs` writes it to build/docs, from the pages as they lie in the repository."""

import re
from pathlib import Path

NAVIGATION = {
    "The library": [
        "docs/install",
        "docs/first-steps",
        "docs/method",
        "docs/blocks",
        "docs/api",
        "docs/gallery",
    ],
    "Use": [
        "docs/integrations",
        "docs/deploy",
        "docs/distributed",
        "docs/explore",
        "examples/segmentation/README",
    ],
    "Speed and evidence": [
        "docs/speed",
        "docs/scaling",
        "docs/gpu",
        "docs/evidence",
    ],
    "The project": [
        "docs/contributing",
        "CHANGELOG",
    ],
    "Measurements": [
        "bench/results/*",
        "examples/results/*",
        "examples/segmentation/results/*/*",
    ],
}

project = "asa_ops"
root_doc = "README"
include_patterns = ["README.md", *(f"{page}.md" for pages in NAVIGATION.values() for page in pages)]
exclude_patterns = [".*", "build", "tests"]  # folders that are not searched
extensions = ["myst_parser"]
myst_heading_anchors = 4  # links lead to headings as on GitHub
nitpicky = True  # a link that leads nowhere is a warning, and warnings are errors

html_theme = "furo"  # light and dark, and nothing from a network
html_title = "asa_ops"
html_copy_source = False


def complete(app, name, source):
    """Append to the first page what stands beside every page, and name a page after its file if it has no heading."""
    if not re.search("^# ", source[0], re.MULTILINE):
        source[0] = f"# {name}\n\n{source[0]}"
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def add_index(app, error):
    """Lead from the folder to the first page."""
    if not error:
        Path(app.outdir, "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n')


def setup(app):
    app.connect("source-read", complete)
    app.connect("build-finished", add_index)
