"""Docstrings in Keras's form, as mkdocstrings reads them: Google's sections."""

import re
import textwrap

import griffe

# Sections that Keras has and Google has not, and those whose text is not indented.
_SECTION = re.compile(
    r"^(Call arguments|Input shape|Output shape|Weights|Signatures|Examples?"
    r"|References?):\n((?:(?: {4}.*)?\n)*)",
    re.M,
)
_ITEM = re.compile(r"^(`[^`]+`|\w+): ", re.M)
_DOCTEST = re.compile(r"^>>> .*\n(?:.+\n)*", re.M)


class KerasDocstrings(griffe.Extension):
    """Writes such sections as bold titles and lists, and doctests as code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = _as_markdown(obj.docstring.value)


def _as_markdown(text):
    def section(match):
        content = _ITEM.sub(r"- \1: ", textwrap.dedent(match[2]))
        return f"**{match[1]}**\n\n{content}"

    text = _SECTION.sub(section, f"{text}\n")
    return _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}```\n", text)
