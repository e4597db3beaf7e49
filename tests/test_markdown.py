"""Tables in Markdown, by hand."""

from agrl_jax.runtime.markdown import table


def test_a_table_by_hand() -> None:
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    assert table(["a", "b", "c"], [], figures=True).splitlines()[1] == "| :-- | --: | --: |"
