"""Where pages are made: templates in which whatever comes from a record is text, never markup."""

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

    Every text is escaped, stripped of control characters and cut where nobody reads on, unless it is `Markup`.

    Args:
        template: Name of a file in `templates` or `assets`.
        values: What the template names; a name it uses and that is not given is an error.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401 - asked for at every call: the environment below outlives the answer
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
    """Return what is written for a value: text that is not markup becomes presentable."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _text.presentable(value)
    return value


def _lines(text: str) -> str:
    """Return text whose line breaks stay: each line is presentable by itself."""
    from markupsafe import Markup

    return Markup("\n").join(map(_text.presentable, text.split("\n")))


def _script_json(value: object) -> str:
    """Return JSON for a script element, which has no other way of escaping."""
    from markupsafe import Markup

    return Markup(_text.json_for_script(value))  # no character of it is markup


@cache
def _asset(name: str) -> str:
    """Return a style sheet or script of ours as it is: it is no template, so braces mean nothing in it."""
    from markupsafe import Markup

    return Markup(resources.files(_PACKAGE).joinpath("assets", name).read_text(encoding="utf-8"))
