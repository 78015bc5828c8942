"""docs/templates.md: its examples run, its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luthier.core.registry import _plugins, names, use_plugins
from luthier.core.types import Call, Message
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "templates.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def plugins(tmp_path):
    """The examples of the page in a folder that is used as plugins."""
    for name, code in BLOCKS.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    use_plugins(tmp_path)
    yield
    _plugins.clear()


def test_the_examples_work_together(plugins, tok):
    tok.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|m|>"]})
    config = TemplateConfig(template="plain_talk", tool_format="calls_in_json")
    renderer = make_renderer(config, tok)
    call = Message("function", 'I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [(source, said)] = renderer.pairs((Message("user", "U"), Message("user", "V"), call), tools='[{"name": "add"}]')
    assert tok.decode(source) == '\n\nTools: [{"name": "add"}]<|u|>U<|u|>V<|m|>'
    assert tok.decode(said) == 'I add.\nCALL [{"name": "add", "arguments": {"a": 1}}]</s>'
    reply = renderer.reply(tok.decode(said[:-1]))
    assert (reply.content, reply.calls) == ("I add.", (Call("add", {"a": 1}),))
    asked = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [{"role": "user", "content": "U"}, {"role": "user", "content": "V"}]
    talk += [{"role": "assistant", "content": "I add.", "tool_calls": [asked]}]
    assert tok.apply_chat_template(talk, tools=[{"name": "add"}], tokenize=False) == tok.decode(source + said)


def test_every_dialect_is_on_the_page():
    table = PAGE.partition("| name | calls look like |")[2].partition("\n\n")[0]
    assert {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(
        names("tool_formats")
    )
