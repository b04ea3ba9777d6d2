"""A teacher of a recipe: its members, made or found, and its scores of any lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_kd.artifacts import fingerprint
from retrieval_kd.errors import RecipeError
from retrieval_kd.recipes.schema import TeacherSpec
from retrieval_kd.runs import Scores, Shortlist
from retrieval_kd.scores.normalise import ensemble
from retrieval_kd.stages.members import Member, PairwiseMember, open_member

if TYPE_CHECKING:
    from retrieval_kd.scores.preferences import Preferences
    from retrieval_kd.stages.workspace import Workspace
    from retrieval_kd.teachers.late_interaction import LateInteraction


class Teaching:
    """A teacher in a workspace, whose models and scores stages share."""

    def __init__(self, workspace: Workspace, spec: TeacherSpec) -> None:
        """Prepare a teacher; nothing is read yet."""
        self.spec = spec
        self._workspace = workspace

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Return the rankers whose mean the teacher is; nothing of them is read yet."""
        return tuple(open_member(self._workspace, spec) for spec in self.spec.ensemble)

    @property
    def titles(self) -> tuple[str, ...]:
        """Return what tables call each member: its kind, its name where several are of that kind, and its place."""
        kinds = [spec.kind.replace("_", "-") for spec in self.spec.ensemble]
        names = [
            kind if kinds.count(kind) == 1 else f"{kind} {member.name}"
            for kind, member in zip(kinds, self.members, strict=True)
        ]
        # Every run's teacher lies in a folder of the same name.
        return tuple(
            name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)
        )

    @property
    def folder(self) -> Path:
        """Return the folder of the first member, which is made first if the recipe says so."""
        return self.members[0].folder

    @cached_property
    def fingerprint(self) -> str:
        """Return the identity of the scores."""
        members = [[member.fingerprint, member.spec.weight] for member in self.members]
        return fingerprint({"members": members, "normalise": self.spec.normalise})

    def scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> list[Scores]:
        """Combine the members' scores as the recipe says: one float32 array a list.

        Args:
            lists: Any shortlists.
            queries: The texts of their queries, and of others whose vectors may be wanted later.
        """
        return self.combined(self.member_scores(lists, queries))

    def member_scores(self, lists: Sequence[Shortlist], queries: Mapping[str, str]) -> dict[str, list[Scores]]:
        """Return each member's own scores, by its title; the arguments are those of :meth:`scores`."""
        return {title: member.scores(lists, queries) for title, member in zip(self.titles, self.members, strict=True)}

    def combined(self, members: Mapping[str, Sequence[Scores]]) -> list[Scores]:
        """Combine what :meth:`member_scores` returned as the recipe says."""
        return ensemble(members, [member.spec.weight for member in self.members], self.spec.normalise)

    def preferences(self, lists: Sequence[Shortlist]) -> list[Preferences]:
        """Return the pairwise member's preferences: for each list float32 ``[documents, documents]``.

        Entry (i, j) is the probability that document i is more relevant than j, whichever was read first; NaN where
        they were not compared and on the diagonal.

        Raises:
            RecipeError: no member compares documents.
        """
        for member in self.members:
            if isinstance(member, PairwiseMember):
                return member.preferences(lists)
        raise RecipeError("teacher: no member compares documents; name one of kind pairwise")

    @property
    def late_interaction(self) -> LateInteraction:
        """Return the late-interaction member's model, which can score any batch as it comes.

        Raises:
            RecipeError: no member is one.
        """
        from retrieval_kd.teachers.late_interaction import LateInteraction

        for member in self.members:
            if member.spec.kind == "late_interaction":
                model = member.reranker
                assert isinstance(model, LateInteraction)
                return model
        raise RecipeError("teacher: no member is a late-interaction model; name one of kind late_interaction")
