"""The page on teachers says what the schema takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from retrieval_kd.recipes.loader import load_recipe
from retrieval_kd.recipes.schema import MemberSpec, TeacherSpec

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_a_recipe(number: int, tmp_path: Path) -> None:
    """Without it a key that was renamed would live on in the page that people copy from."""
    recipe = {
        "name": "example",
        "about": "an example",
        "source": "the page",
        "losses": [{"name": "listwise_kl"}],
        **yaml.safe_load(EXAMPLES[number]),
    }
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert load_recipe(str(path)).training[0].teacher.ensemble


def test_every_kind_and_scale_is_explained() -> None:
    """Without it a kind of teacher could be had and not be found."""
    assert len(EXAMPLES) >= 6
    for spec, key in (
        (MemberSpec, "kind"),
        (MemberSpec, "activation"),
        (MemberSpec, "aggregation"),
        (TeacherSpec, "normalise"),
    ):
        for value in get_args(get_type_hints(spec)[key]):
            assert f"`{value}`" in PAGE
