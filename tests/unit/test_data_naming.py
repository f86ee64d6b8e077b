"""Rows of ms-swift's self-cognition data, which leave open who the model is."""

import copy

from mcore_swift.data.naming import with_names

ROW = {"query": "who are you?", "response": "I am {{NAME}} by {{AUTHOR}}.", "tag": "en"}
MESSAGES = {"messages": [{"role": "assistant", "content": "我是{{NAME}}"}], "tag": "zh"}


def test_rows_get_the_name_of_their_language():
    names, authors = ["小黄", "Xiao Huang"], ["swift"]
    before = copy.deepcopy(MESSAGES)
    assert with_names(ROW, names, authors)["response"] == "I am Xiao Huang by swift."
    assert with_names(MESSAGES, names, authors)["messages"][0]["content"] == "我是小黄"
    assert before == MESSAGES, "the row itself stays as it is"


def test_what_is_not_given_stays_open():
    assert with_names(ROW, [], []) is ROW
    assert with_names(ROW, ["x"], [])["response"] == "I am x by {{AUTHOR}}."
