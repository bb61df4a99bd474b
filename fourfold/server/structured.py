"""What a request says about the shape of its answer.

Contract: vLLM's `structured_outputs` beside OpenAI's `response_format` (text/grammar.py). Failures are
`RequestError`s that name the field. It does not know what a grammar does.
"""

from __future__ import annotations

from fourfold.core.errors import RequestError
from fourfold.core.request import Grammar
from fourfold.text.checks import checked_object, checked_text, to_json
from fourfold.text.grammar import check_source, choice_source, response_grammar


def read_response_format(value: object, after_token: int | None) -> Grammar | None:
    """The grammar of a `response_format`, None for text; within bounds."""
    return _bounded(response_grammar(value, after_token))


def read_structured_outputs(value: object, after_token: int | None) -> Grammar | None:
    """The grammar of `structured_outputs`: one of json, json_object, regex, choice, grammar (Lark)."""
    if value is None:
        return None
    where = "structured_outputs"
    given = {k: v for k, v in checked_object(value, where).items() if v is not None}
    if len(given) != 1:
        raise RequestError(f"{where} must hold one of json, json_object, regex, choice, grammar")
    ((name, inner),) = given.items()
    place = f"{where}.{name}"
    match name:
        case "json":
            schema = inner if isinstance(inner, str) else to_json(inner, place)
            return _bounded(Grammar("json_schema", checked_text(schema, place), after_token))
        case "json_object":
            return Grammar("json_object", "", after_token) if inner is True else None
        case "regex":
            return _bounded(Grammar("regex", checked_text(inner, place), after_token))
        case "grammar":
            return _bounded(Grammar("lark", checked_text(inner, place), after_token))
        case "choice":
            return _bounded(Grammar("choice", choice_source(inner), after_token))
    raise RequestError(f"{where} has no {name[:80]!r}")


def _bounded(grammar: Grammar | None) -> Grammar | None:
    if grammar is not None:
        check_source(grammar)
    return grammar
