"""HTML pages without a script and without a request to anywhere: pictures and style are inside.

The reader's screen decides between light and dark, and between one column and two. Templates escape
whatever they are given, unless it is ``Markup``.
"""

import base64
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from blip3o_fast.report.style import DARK, LIGHT


def render(template: str, **values: Any) -> str:
    """The page that a file of ``templates`` makes of the values."""
    return _environment().get_template(template).render(values) + "\n"


def data_url(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def breakable(name: str) -> Markup:
    """A name that may wrap after its separators on a narrow screen."""
    return escape(name).replace("/", Markup("/<wbr>")).replace("_", Markup("_<wbr>"))


def value_text(value: object) -> str:
    """A number with six digits, a list with commas, None as a word."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else str(value)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("blip3o_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(light=LIGHT, dark=DARK)
    environment.filters.update(
        data_url=data_url,
        breakable=breakable,
        value_text=value_text,
        label=lambda name: escape(name).replace("R2", Markup("R<sup>2</sup>")),
    )
    return environment
