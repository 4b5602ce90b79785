"""Renders the templates. Everything that comes from a record is text in them, never markup."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from bnlab.errors import MissingPackage
from bnlab.report.html import causes as _causes
from bnlab.report.html import escaping as _text

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["page"]

_PACKAGE = "bnlab.report.html"


def page(template: str, **values: object) -> str:
    """Return a template filled with values.

    Every text that is not `Markup` is escaped, stripped of control characters and shortened if it is very long.

    Args:
        template: Name of a file in `templates` or `assets`.
        values: The variables of the template; a missing variable is an error.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401 - checked at every call, because the environment below is cached
    except ImportError:
        raise MissingPackage("html: jinja2 must be installed. Install it: pip install 'bnlab[report]'.") from None
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(_PACKAGE, folder) for folder in ("templates", "assets")],
        ),
        finalize=_presentable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = _asset
    environment.filters.update(
        layer_name=_text.layer_name,
        number=_text.number,
        counted=_text.counted,
        lines=_lines,
        colour=_causes.colour,
        script_json=_script_json,
    )
    return environment


def _presentable(value: object) -> object:
    """Return the value as the page shows it: text that is not markup becomes presentable."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _text.presentable(value)
    return value


def _lines(text: str) -> str:
    """Return text that keeps its line breaks; each line is made presentable."""
    from markupsafe import Markup

    return Markup("\n").join(map(_text.presentable, text.split("\n")))


def _script_json(value: object) -> str:
    """Return JSON for a script element, in which HTML escapes do not work."""
    from markupsafe import Markup

    return Markup(_text.json_for_script(value))  # it contains no markup characters


@cache
def _asset(name: str) -> str:
    """Return a style sheet or script of this package unchanged; it is not a template, so its braces stay."""
    from markupsafe import Markup

    return Markup(resources.files(_PACKAGE).joinpath("assets", name).read_text(encoding="utf-8"))
