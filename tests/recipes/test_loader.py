"""Recipes: strict, overridable, and the shipped ones sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieval_kd.errors import RecipeError
from retrieval_kd.losses.registry import LOSSES, bind
from retrieval_kd.recipes.loader import load_recipe, shipped_recipes, to_yaml
from retrieval_kd.recipes.schema import CollectionSpec

SHIPPED = {"demo", "leaf", "listwise_kl", "margin_mse", "ranknet"}


def test_the_shipped_recipes_are_all_here() -> None:
    """Without the count, a recipe lost from the package would leave the other tests green (as torchtune's did)."""
    assert set(shipped_recipes()) >= SHIPPED
    assert len(shipped_recipes()) == len(set(shipped_recipes()))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_say_what_they_are_and_bind(name: str) -> None:
    """Without it a misspelt option would be found after the teacher has scored for an hour."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")
    assert recipe.source
    for loss in recipe.losses:
        assert loss.name in LOSSES
        bind(loss.name, loss.options)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_saved_recipe_is_the_recipe(name: str, tmp_path: Path) -> None:
    """Without it the recipe.yaml beside a result would not reproduce it."""
    losses = "stages.0.losses" if load_recipe(name).stages else "losses"
    recipe = load_recipe(name, ["student.mode=symmetric", f"{losses}.0.weight=0.25"])
    path = tmp_path / "r.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe
    assert recipe.training[0].losses[0].weight == 0.25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnet.mode=symmetric", "studnet: unknown key, did you mean 'student'?"),
        ("student.layrs=[1]", "student.layrs: unknown key, did you mean 'layers'?"),
        ("student.mode=asymetric", "student.mode: 'asymetric', did you mean 'asymmetric'?"),
        ("student.layers=[2,1]", "must be increasing"),
        ("student.layers=three", "student.layers: 'three' is not a list"),
        ("student.layers=[0,two]", "student.layers.1: 'two' is str, it takes int"),
        ("schedule.epochs=0", "schedule.epochs: 0 must be at least 1"),
        ("schedule.epochs=1.5", "schedule.epochs: 1.5 is float, it takes int"),
        ("schedule.epochs=true", "schedule.epochs: True is bool, it takes int"),
        ("schedule.learning_rate=fast", "schedule.learning_rate: 'fast' is not a number"),
        ("candidates.window=[5,2]", "candidates.window: [5, 2] must lie in 1..depth"),
        ("candidates.window=[1,2,3]", "candidates.window: 3 values, it takes 2"),
        ("candidates.sources=[bm52]", "candidates.sources.0.kind: 'bm52', did you mean 'bm25'?"),
        ("losses.7.weight=1", "'7' is not a position in a list of"),
        ("losses.0.weight=0", "it must be above 0"),
        ("losses.0.weight=.inf", "losses.0.weight: inf is not a finite number"),
        ("losses=[]", "losses is empty"),
        ("evaluation.depth=50", "evaluation.rerank_depth: 100 must lie in 1..depth (50)"),
        ("evaluation.measures=[R@1000]", "evaluation.measures: R@1000 needs a depth of at least 1000"),
        ("evaluation.measures=[]", "evaluation.measures: empty"),
        ("seed=-1", "seed: -1 is not in 0..9223372036854775807"),
        ("seed=99999999999999999999", "seed: 99999999999999999999 is not in 0.."),
        (f"schedule.clip={'9' * 400}", "schedule.clip: inf is not a finite number"),
        ("schedule={epochs: 1, epochs: 2}", "--set schedule: the value is not YAML (key 'epochs' stands in line 1"),
        ("schedule=&s {epochs: *s}", "--set schedule: the value is not YAML (alias 's' stands within"),
        ("name=a\0", "--set name: the value is not YAML (character 0x00 is not allowed)"),
        ("seed", "write KEY.PATH=VALUE"),
        ("teacher.normalise=none", "none averages raw scores, and bi_encoder has a scale of its own; use zscore"),
        ("teacher={model: x, fine_tune: {epochs: 1}}", "give either model or fine_tune, not both"),
        ("index.kind=lsh", "index.kind: 'lsh'"),
        ("teacher={members: [{kind: bi_encoder}], model: x}", "either members or the short form (model), not both"),
        ("teacher={members: [{kind: cross_encodre}]}", "did you mean 'cross_encoder'?"),
        ("teacher={members: [{kind: run, path: x, template: y}]}", "template is not read; it takes ['path']"),
        ("teacher={members: [{kind: run}]}", "name the path of its scores"),
        ("teacher={members: [{kind: late_interaction}]}", "name its model"),
        ("teacher={members: [{kind: bi_encoder, weight: 0}]}", "weight 0.0 must be above 0"),
        ("teacher={members: [{kind: cross_encoder, template: '{query}'}]}", "must hold each of {query}, {document}"),
        ("teacher={members: [{kind: scores, path: x, activation: logit_difference}]}", "a file has one score"),
        (
            "teacher={members: [{kind: run, path: x}, {kind: late_interaction, model: m}], normalise: none}",
            "and late_interaction has a scale of its own",
        ),
        ("teacher.compress.layers=[2,1]", "teacher.compress.layers: [2, 1] must be increasing"),
        ("teacher.compress.stages=[]", "teacher.compress.stages: empty"),
    ],
)
def test_wrong_keys_and_values_name_the_key(override: str, message: str) -> None:
    """Without it a typo would train for an hour with the default, or end in a trace."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("margin_mse", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


HEAD = "name: x\nabout: y.\nsource: z\nlosses: [{name: margin_mse}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: {epochs: 5}\nschedule: {warmup: 0.1}\n", ":6: not YAML (key 'schedule' stands in line 5 already)"),
        ("student:\n  layers: [0]\n  layers: [1]\n", ":7: not YAML (key 'layers' stands in line 6 already)"),
        ("candidates: &c {filter: *c}\n", ":5: not YAML (alias 'c' stands within what it repeats)"),
        (f"candidates: {'[' * 9000}", ":5: not YAML (nested more than 50 deep)"),
        ("\nseed: 1\0\n", ":6: not YAML (character 0x00 is not allowed)"),
        (f"seed: {'9' * 5000}\n", ":5: not YAML ('999999999999...9999999999999' is no int)"),
        ("seed: !!bool x\n", ":5: not YAML ('x' is no bool)"),
        ("encoder: &e {}\nstudent: &e {}\n", ":6: not YAML (found duplicate anchor 'e'; first occurrence, second"),
    ],
)
def test_what_yaml_would_lose_or_fall_over_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    """Without it half of a section written twice would be lost in silence, and a slip would end in a trace."""
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(path) + message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_merges_and_dates_are_read(tmp_path: Path) -> None:
    """Without it a merged key that is overridden would count as written twice, and a date be no name."""
    path = tmp_path / "r.yaml"
    shared = "schedule: &s {epochs: 5, warmup: 0.1}\n"
    stages = "stages:\n- {name: a, schedule: *s}\n- {name: b, schedule: {<<: *s, epochs: 6}}\npublished: 2024-13-45\n"
    path.write_text(HEAD + shared + stages)
    recipe = load_recipe(str(path), ["follows=2024-05-01"])
    assert [(stage.schedule.epochs, stage.schedule.warmup) for stage in recipe.stages] == [(5, 0.1), (6, 0.1)]
    assert (recipe.published, recipe.follows) == ("2024-13-45", "2024-05-01")
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("override", ["collection=", "collection= ", "collection.distractors=", "collection=#2"])
def test_an_override_without_a_value_is_refused(override: str) -> None:
    """Without it an unset shell variable would train an hour on the built-in collection."""
    key = override.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"^--set {key}: no value after the =; give one"):
        load_recipe("margin_mse", [override])
    assert load_recipe("margin_mse", ["encoder.query_prefix=''"]).encoder.query_prefix == ""
    assert load_recipe("margin_mse", ["candidates.filter=null"]).candidates.filter is None


def test_overrides_reach_every_depth_and_short_forms() -> None:
    """Without it --set collection=DIR, which the README uses, would be an error."""
    recipe = load_recipe(
        "margin_mse", ["collection=/data/x", "collection.distractors=[/data/y]", "schedule.learning_rate=1e-4"]
    )
    assert recipe.collection == CollectionSpec("/data/x", ("/data/y",))
    assert recipe.schedule.learning_rate == 1e-4
    assert load_recipe("margin_mse", ["teacher.model=/models/ce"]).teacher.fine_tune is None


def test_members_come_back_from_the_resolved_recipe(tmp_path: Path) -> None:
    """Without it the recipe saved beside a run could not be run again."""
    members = "[{kind: cross_encoder}, {kind: pairwise, model: m, comparisons: 4}, {kind: run, path: r, weight: 2}]"
    recipe = load_recipe("margin_mse", [f"teacher={{normalise: rank, members: {members}}}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe
    assert [member.kind for member in recipe.teacher.ensemble] == ["cross_encoder", "pairwise", "run"]


def test_unknown_recipes_and_broken_files(tmp_path: Path) -> None:
    """Without it a misspelt recipe or a tab in a YAML file would end in a trace."""
    with pytest.raises(RecipeError, match="no recipe 'margin_mes', did you mean 'margin_mse'"):
        load_recipe("margin_mes")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: x\nlosses: [\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml:\d+: not YAML"):
        load_recipe(str(broken))
    broken.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml: not UTF-8"):
        load_recipe(str(broken))
    broken.write_text("- just a list\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        load_recipe(str(broken))
    broken.write_text("name: x\nabout: y\n")
    with pytest.raises(RecipeError, match="source: missing"):
        load_recipe(str(broken))


@pytest.mark.parametrize(("name", "loss"), [("pair", "passage_centric"), ("arm_distributed", "adaptive_margin")])
def test_documents_are_compared_by_the_queries_own_encoder_alone(name: str, loss: str) -> None:
    """Without it two encoders that drift apart would set similarities of two spaces against each other."""
    towers = ["student.mode=symmetric", "student.towers=separate"]
    with pytest.raises(RecipeError, match=rf"student\.towers: {loss} compares documents .* set it to shared"):
        load_recipe(name, towers)
    assert load_recipe("arm_static", towers).student.towers == "separate"
    assert load_recipe(name, towers[:1]).student.towers == "shared"
