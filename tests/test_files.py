"""Files appear in one piece or not at all, and outputs that cannot be written are refused by name."""

from pathlib import Path

import pytest

from agrl_jax.hints import did_you_mean, nearest
from agrl_jax.runtime.files import OutputError, check_writable, in_one_piece, read_json, write_json, write_text


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with in_one_piece(path) as half:
        half.write_text("n")
        assert path.read_text() == "old"
        half.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"größe": 1})
    before = path.read_bytes()
    assert before == '{\n  "größe": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), in_one_piece(path) as half:
        half.write_text("{")
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"größe": [1]})
    assert read_json(path, OutputError) == {"größe": [1]}
    contents = {b"{": "not valid JSON: Expecting", b"\xff{}": "not valid JSON: .utf-8", b"[1]": "should be a JSON"}
    for content, said in contents.items():
        path.write_bytes(content)
        with pytest.raises(OutputError, match=f"a.json: {said}.*; move it away$"):
            read_json(path, OutputError, "; move it away")
    with pytest.raises(OutputError, match="b.json: cannot be read: No such file"):
        read_json(tmp_path / "b.json", OutputError)


def test_an_output_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    check_writable(tmp_path / "out.json", "--out")
    with pytest.raises(OutputError, match=r"--out=.*out.json: figures are written beside it as .json"):
        check_writable(tmp_path / "out.json", "--out", beside=".json")
    check_writable("gs://bucket/no/such/out.json", "--out")
    with pytest.raises(OutputError, match=rf"--out={tmp_path}/no/out.json: there is no folder {tmp_path}/no"):
        check_writable(tmp_path / "no" / "out.json", "--out")
    with pytest.raises(OutputError, match="--out=.*: is a folder"):
        check_writable(tmp_path, "--out")


def test_what_was_meant_is_found_case_aside_and_by_the_last_part_of_a_dotted_name() -> None:
    assert did_you_mean("GPRO", ["grpo", "dapo"]) == "; did you mean 'grpo'?"
    assert did_you_mean("zzz", ["grpo", "dapo"]) == ""
    assert nearest("stepz", ["rl.steps", "sft.steps", "seed"], 2) == ["rl.steps", "sft.steps"]
