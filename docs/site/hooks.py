"""What MkDocs does not do: optional pages, links into the repository, formulas."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert


def on_config(config):
    """Leaves out the pages of the navigation that are not there (yet)."""

    def is_there(entry):
        (page,) = entry.values()
        return isinstance(page, list) or (Path(config.docs_dir) / page).exists()

    config.nav = [entry for entry in config.nav if is_there(entry)]
    return config


def on_page_markdown(markdown, page, config, files):
    """Links to what is not on the site lead to the repository, where it has a URL."""

    up = "../" * (page.file.src_uri.count("/") + 1)

    def link(match):
        text, target = match.groups()
        target = target.removeprefix(up) if target.startswith(up) else f"docs/{target}"
        return f"[{text}]({config.repo_url}{target})" if config.repo_url else text

    elsewhere = rf"{re.escape(up)}[^)]+|results(?:/[^)]*)?"
    return re.sub(rf"(?<!!)\[([^\]]+)\]\(({elsewhere})\)", link, markdown)


def on_page_content(content, page, config, files):
    """Formulas become MathML, which browsers draw without a script."""

    def mathml(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    pattern = r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>'
    return re.sub(pattern, mathml, content, flags=re.S)
