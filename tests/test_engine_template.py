"""Chat templates: what they get, how they fail, and that hostile ones end."""

from __future__ import annotations

import resource

import pytest

from inferpool.engine.model import Model
from inferpool.engine.template import ChatTemplate
from inferpool.errors import InvalidRequest, ModelError, ModelLoadError

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos="<s>", eos="</s>")


def test_template_gets_what_templates_are_written_for() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}{{ strftime_now('%Y') | length }}{% endif %}"
    )
    messages = [{"role": "tool", "content": "q"}, {"role": "user", "content": "a<b & 'é'"}]
    assert template(source).render(messages) == "<s>\"a<b & 'é'\"4"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' ~ 1 ~ ['b', none] }}", "a1['b', None]"),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{{ loop.last }}{% endfor %}", "x1True"),
        ("{% for m in messages recursive %}{{ m.role }}{% endfor %}", "user"),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ loop.index }}{{ x }}{% endfor %}", "1123"),
        ("{% set a = namespace(n=0) %}{% set a.n = a.n + 2 %}{{ a.n }}", "2"),
        ("{{ '{}-{}'.format(1, 'b') }}", "1-b"),
        ("{% macro m(x, y='b') %}{{ x }}{{ y }}{% endmacro %}{{ m('a') }}", "ab"),
        ("{% set a, b = (1, 2) %}{{ a * 2 + b ** 3 % 5 }}", "5"),
        ("{% set x %}in{{ 1 }}{% endset %}{{ x | upper }}", "IN1"),
        ("{{ ' a-b '.strip().split('-') | join('+') }}", "a+b"),
        ("{{ 'aXbX'.replace('X', 'yy') | replace('y', '', 1) }}", "aybyy"),
        ("{{ ','.join(['a', 'b']) }}", "a,b"),
        ("{{ {'b': [1], 'a': 'é'} | tojson(indent=1) }}", '{\n "b": [\n  1\n ],\n "a": "é"\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 'a\nb\n\nc' | indent(2, true) }}", "  a\n  b\n\n  c"),
        ("{{ 'a\n\nb\n' | indent(2, blank=true) }}", "a\n  \n  b\n  "),
        ("{{ 'a\n' | indent(2, first=true) }}{{ '' | indent }}b", "  a\nb"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='role') | join('|') }}", "user"),
        ("{{ messages | map(attribute='role') | tojson }}", '["user"]'),
        ("{{ [1, 2] | reverse | tojson }}{{ [1, 2] | select | length }}", "[2, 1]2"),
        ("{{ 'a'|safe + {'b': '<'} | tojson }}", 'a{"b": "<"}'),
        ("{{ tools is defined and tools is not none }}", "False"),
        ("{{ 'x' * 3 }}{{ [0] * 2 }}{{ 2 * 'y' }}", "xxx[0, 0]yy"),
    ],
)  # fmt: skip
def test_bounds_change_nothing_for_what_stays_within_them(source: str, expected: str) -> None:
    assert template(source).render(USER) == expected


def test_a_template_says_whether_it_takes_tools() -> None:
    assert not template("{{ messages }}").takes_tools
    taking = template("{% if tools %}{{ tools | tojson }}{% endif %}")
    assert taking.takes_tools
    assert taking.render(USER, TOOLS).startswith('[{"type": "function"')


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ 'a' | center(1000000000) }}",
        "{{ lipsum(}}",
        "(" * 300_000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in b %}" * 60 + "{% endfor %}" * 60,
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    ],
    ids=lambda source: source[:24],
)
def test_broken_template_is_a_load_error(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template is broken"):
        template(source)


def test_template_that_refuses_the_messages_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ strftime_now('%Y' * 100000) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'other' %}",
        "{{ lipsum(1000000) }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_failing_template_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template failed"):
        template(source).render(USER)


DOUBLING = "".join("{% set s = s ~ s %}" for _ in range(60))
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "loops with output": "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "recursive loop": "{% for a in range(9999) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "macros": "{% macro m(n) %}{% for i in range(999) %}{{ m(n - 1) if n }}{% endfor %}"
    "{% endmacro %}{{ m(9) }}",
    "width": "{{ '{:1000000000d}'.format(1) }}",
    "map of formats": "{{ '{a:1000000000d}'.format_map({'a': 1}) }}",
    "format": "{{ ('{0}' * 1000000).format('x' * 1000000) }}",
    "text times": "{{ 'x' * 1000000000 }}",
    "times text": "{{ 1000000000 * 'x' }}",
    "list times": "{{ [0] * 1000000000 }}",
    "loop over a list": "{% for a in [0] * 1000000000 %}{% endfor %}",
    "power": "{{ 10 ** 100000000 }}",
    "product": "{% set a = namespace(x=3) %}{% for i in range(99) %}{% set a.x = a.x * a.x %}"
    "{% endfor %}",
    "doubling": "{% set s = 'x' %}" + DOUBLING,
    "doubling by plus": "{% set s = 'x' %}" + DOUBLING.replace("~", "+"),
    "doubling by a list": "{% set s = 'x' %}" + DOUBLING.replace("s ~ s", "[s, s]") + "{{ s }}",
    "doubling by a map": "{% set s = 'x' %}" + DOUBLING.replace("s ~ s", "{'a': s, 'b': s}"),
    "doubling by a tuple": "{% set s = 'x' %}" + DOUBLING.replace("s ~ s", "(s, s)"),
    "doubling by join": "{% set s = 'x' %}" + DOUBLING.replace("s ~ s", "[s, s] | join"),
    "doubling by replace": "{% set s = 'xx' %}" + DOUBLING.replace("s ~ s", "s.replace('x', s)"),
    "doubling by a filter": "{% set s = 'xx' %}" + DOUBLING.replace("s ~ s", "s | replace('x', s)"),
    "doubling by a block": "{% set s = 'x' %}"
    + DOUBLING.replace("{% set s = s ~ s %}", "{% set s %}{{ s }}{{ s }}{% endset %}"),
    "join": "{% set s = 'x' * 1000000 %}{{ s.join(range(99999)) }}",
    "join filter": "{% set s = 'x' * 1000000 %}{{ range(99999) | join(s) }}",
    "indent": "{% set s = '\n' * 1000000 %}{{ s | indent('y' * 1000000) }}",
    "block": "{% set x %}{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}{% endset %}",
    "strip": "{% set s = 'a' * 3000000 %}{{ s.strip('b' * 1000000 ~ 'a') }}",
    "strip filter": "{% set s = 'a' * 3000000 %}{{ s | trim('b' * 1000000 ~ 'a') }}",
    "json": "{% set a = namespace(x=[]) %}{% for i in range(150) %}{% set a.x = [a.x] %}"
    "{% endfor %}{{ ([a.x] * 10000) | tojson(indent=16) }}",
}  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_in_bounded_time_and_memory(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ModelError, match=r"chat template was stopped|recursion"):
        template(source).render(USER)
    after = resource.getrusage(resource.RUSAGE_SELF)
    # CPU time, not the clock: this is the promise itself.
    assert after.ru_utime - before.ru_utime < 10
    assert after.ru_maxrss - before.ru_maxrss < 600 << 10  # KiB


def test_a_long_conversation_is_no_attack() -> None:
    source = (
        "{% for m in messages[1:] %}<|{{ m['role'] }}|>{{ m['content'] | trim ~ eos_token }}"
        "{{ m['content'].split('.') | length }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "A few words. " * 4000}] * 200  # 10 million characters
    assert len(template(source).render(messages)) > 10_000_000


@pytest.mark.parametrize("other", ["{{ line['text'] }}", "{{ raise_exception('no part') }}"])
def test_a_template_that_only_reads_parts_gets_the_text_in_one(other: str) -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{% for line in m['content'] %}"
        "{% if line['type'] == 'text' %}{{ line['text'] }}{% else %}OTHER{% endif %}"
        "{% endfor %}{% endfor %}"
    ).replace("OTHER", other)
    messages = [{"role": "system", "content": "Be kind."}, *USER, {"role": "x", "content": ""}]
    parts = template(source)
    assert parts.render(messages) == "<system>Be kind.<user>hi<x>"
    assert parts.takes_system
    either = "{% for m in messages %}{{ m.content if m.content is string else 'text' }}{% endfor %}"
    assert template(either).render(USER) == "hi"
    # One that writes neither gets what it would get of others.
    assert template("{{ messages[0].content | length }} text").render(USER) == "2 text"


@pytest.mark.parametrize("instead", ["{{ raise_exception('no system') }}", "{% continue %}"])
def test_a_system_message_goes_to_the_user_s_turn_where_a_template_takes_none(instead: str) -> None:
    plain = "{% for m in messages %}OTHER<{{ m.role }}>{{ m.content }}{% endfor %}"
    source = plain.replace("OTHER", "{% if m.role == 'system' %}" + instead + "{% endif %}")
    be = [{"role": "system", "content": f"Be {what}."} for what in ("kind", "brief", "calm")]
    answer = {"role": "assistant", "content": "Hello."}
    messages = [*be[:2], *USER, answer, be[2]]
    expected = "<user>Be kind.\n\nBe brief.\n\nhi<assistant>Hello.<user>Be calm."
    assert template(source).render(messages) == expected
    # One that fails without tools says nothing of what it takes.
    wants_tools = template("{{ tools | length }}" + plain.replace("OTHER", ""))
    assert wants_tools.render([*be[:1], *USER], [{}]) == "1<system>Be kind.<user>hi"


def test_the_template_of_the_default_model_renders(model: Model) -> None:
    rendered = template(model.chat_template or "").render(USER)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
