"""One stage of training: its candidates, its teacher's scores, and the student it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd import processes
from retrieval_kd.artifacts import Artifact, Spec, build, fingerprint, opened
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.errors import DataError, RecipeError
from retrieval_kd.mining.candidates import LISTS, CandidateList, write_candidates
from retrieval_kd.mining.selection import SelectionReport, in_disagreement
from retrieval_kd.recipes.loader import resolved
from retrieval_kd.recipes.schema import JointSpec, StageSpec, TeacherSpec
from retrieval_kd.runs import Scores
from retrieval_kd.stages.members import identity
from retrieval_kd.stages.teaching import Teaching

if TYPE_CHECKING:
    import torch

    from retrieval_kd.encoders.torch_encoder import TorchEncoder
    from retrieval_kd.stages.workspace import Workspace
    from retrieval_kd.training.batches import ExtraTexts, TrainingSet
    from retrieval_kd.training.dev import DevSet
    from retrieval_kd.training.towers import DocumentTower, JointReranker, LayerTeacher

DOCUMENTS = "documents"
"""Where the document encoder that trained beside the student lies in the student's folder."""
RERANKER = "reranker"
"""Where a cross-encoder that learnt along with the student lies in the student's folder."""


class TrainingStage:
    """A stage in a workspace; it starts from the best weights of the one before it."""

    def __init__(self, workspace: Workspace, spec: StageSpec, earlier: Sequence[TrainingStage]) -> None:
        """Prepare a stage; nothing runs yet.

        Args:
            workspace: Where it runs.
            spec: What it does.
            earlier: The stages before it, in order.
        """
        self.spec = spec
        self._workspace = workspace
        self._earlier = {stage.spec.name: stage for stage in earlier}
        self._previous = earlier[-1] if earlier else None

    @cached_property
    def teacher(self) -> Teaching:
        """Return the stage's teacher."""
        return self._workspace.teacher(self.spec.teacher)

    @cached_property
    def needs_teacher(self) -> bool:
        """Return whether training, rather than mining, reads the teacher's scores."""
        from retrieval_kd.losses.registry import LOSSES

        infos = [LOSSES[loss.name] for loss in self.spec.losses if loss.teacher == "scores"]
        reads = any(info.kind in ("scores", "in_batch") and "teacher" in info.needs for info in infos)
        return reads or self._compares or self._scores_batches or self.spec.selection.kind == "disagreement"

    @cached_property
    def _compares(self) -> bool:
        """Return whether a loss reads the teacher's preferences."""
        from retrieval_kd.losses.registry import LOSSES

        return any(LOSSES[loss.name].kind == "pairs" for loss in self.spec.losses)

    @property
    def _scores_batches(self) -> bool:
        """Return whether a loss reads a late-interaction teacher's scores of whole batches."""
        return any(loss.teacher == "late_interaction" for loss in self.spec.losses)

    def _maxsim(self) -> Callable[[Sequence[str], Sequence[str]], torch.Tensor]:
        """Return what scores the queries of a batch against its documents."""
        ranker = self.teacher.late_interaction
        queries, collection = self._workspace.training_queries, self._workspace.collection

        def score(query_ids: Sequence[str], doc_ids: Sequence[str]) -> torch.Tensor:
            texts = collection.contents(doc_ids)
            return ranker.matrix([queries[query_id] for query_id in query_ids], [texts[doc_id] for doc_id in doc_ids])

        return score

    @cached_property
    def mined(self) -> Artifact:
        """Mine each training query's candidate list; the report is the manifest's summary."""
        teacher = self.teacher if self.spec.candidates.needs_scores else None
        return self._workspace.mine(self.spec.candidates, self._student, f"candidates{self._of_stage}", teacher)

    def _student(self, stage: str) -> OnnxEncoder:
        """Return the student as an earlier stage left it, or as this stage finds it."""
        return self._earlier[stage].encoder if stage else self.start_encoder

    @cached_property
    def candidates(self) -> list[CandidateList]:
        """Return the mined lists."""
        return self._workspace.read_lists(self.mined)

    @cached_property
    def start_encoder(self) -> OnnxEncoder:
        """Open the student that the stage starts from, exported."""
        return self._previous.encoder if self._previous else self._workspace.undistilled

    @cached_property
    def selected(self) -> Artifact | None:
        """Select the lists that the stage trains on; None where it trains on all of them."""
        selection = self.spec.selection
        if selection.kind == "all":
            return None
        workspace = self._workspace
        spec = Spec(
            "select",
            config=dataclasses.asdict(selection),
            inputs={
                "candidates": identity(self.candidates),
                "teacher": self.teacher.fingerprint,
                "student": self.start_encoder.card.fingerprint,
            },
        )
        folder = workspace.folder(spec, f"select lists{self._of_stage}")

        def work(target: Path) -> Mapping[str, Any]:
            report = SelectionReport()
            student = workspace.encoder_scores(self.candidates, self.start_encoder, workspace.training_queries)
            teacher = self.teacher.scores(self.candidates, workspace.training_queries)
            kept = list(in_disagreement(self.candidates, teacher, student, selection, report))
            if not kept:
                raise DataError(
                    f"stage {self.spec.name!r}: selection keeps none of {len(self.candidates)} lists "
                    f"({report.left_out}); widen selection.student_ranks or mine more negatives"
                )
            write_candidates(target / LISTS, kept)
            return report.to_json()

        return build(folder, spec, work)

    @cached_property
    def lists(self) -> list[CandidateList]:
        """Return the lists that the stage trains on."""
        return self.candidates if self.selected is None else self._workspace.read_lists(self.selected)

    @cached_property
    def extra_texts(self) -> dict[str, str]:
        """Return the texts that embedding losses read beside the queries, by id."""
        return self._workspace.extra_texts(self.spec.extra_texts, self.spec.schedule.steps(len(self.lists)))

    @cached_property
    def teacher_scores(self) -> list[Scores]:
        """Return the teacher's scores of the lists that the stage trains on: one float32 array a list."""
        return self.teacher.scores(self.lists, self._workspace.training_queries)

    def _member_scores(self) -> Mapping[str, Sequence[Scores]]:
        return self.teacher.member_scores(self.lists, self._workspace.training_queries)

    @cached_property
    def folder(self) -> Path:
        """Train the student and return its folder: a sentence-transformers model with its card and metrics.

        Under ``torchrun`` the first process makes what the stage needs, then all of them train.
        """
        if processes.count() > 1:
            return self._trained_together()
        folder, spec = self._plan()
        build(folder, spec, self._train)
        return folder

    def _trained_together(self) -> Path:
        from retrieval_kd.training.machine import Machine

        machine = Machine()
        # The first process alone says whether there is anything to train: one that trained while another did not
        # would wait for it for ever.
        if machine.main:
            folder, spec = self._plan()
            finished = opened(folder, spec) is not None
            if not finished:
                _ = self._parts
            machine.agree(finished)
            build(folder, spec, self._train)
        else:
            finished = machine.agree(False)
            folder, _ = self._plan()
            if not finished:
                self._train(folder)
        machine.wait()
        return folder

    def _plan(self) -> tuple[Path, Spec]:
        """Return where the stage's result lies, and its identity."""
        workspace = self._workspace
        recipe, stage = workspace.recipe, self.spec
        config: dict[str, Any] = {
            "student": recipe.student.shape,
            "losses": [dataclasses.asdict(loss) for loss in stage.losses],
            "schedule": dataclasses.asdict(stage.schedule),
            "joint": stage.joint and dataclasses.asdict(stage.joint),
        }
        if stage.extra_texts.batch:
            config["extra_texts"] = {"batch": stage.extra_texts.batch}
        if stage.frozen_documents:
            config["frozen_documents"] = True
        inputs = {
            "collection": workspace.collection.fingerprint,
            "encoder": workspace.encoder.card.fingerprint,
            "extra_texts": fingerprint(self.extra_texts) if self.extra_texts else "",
            "lists": identity(self.lists),
            "teacher": self.teacher.fingerprint if self.needs_teacher else "",
            "start": EncoderCard.load(self._previous.folder).fingerprint if self._previous else "",
        }
        if recipe.student.start is not None:
            inputs["student_start"] = workspace.student_start.card.fingerprint
        spec = Spec("train", config, inputs, recipe.seed, self._asked)
        return workspace.folder(spec, f"train the {recipe.student.mode} student{self._of_stage}"), spec

    @property
    def _asked(self) -> Mapping[str, Any]:
        """Return the recipe's keys that decide what the stage makes."""
        recipe = resolved(self._workspace.recipe)
        keys = {key: recipe[key] for key in ("collection", "encoder", "student", "seed")}
        return {"recipe": recipe["name"], **keys, **resolved(self.spec)}

    def _start(self) -> tuple[TorchEncoder, TorchEncoder]:
        """Return what the stage's query and document encoder start from, one encoder twice where both are one."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        separate = self._workspace.recipe.student.towers == "separate"
        if self._previous is None:
            student = self._workspace.untrained_student()
            return student, self._workspace.untrained_student() if separate else student
        student = TorchEncoder.open(self._previous.folder)
        return student, TorchEncoder.open(self._previous.folder / DOCUMENTS) if separate else student

    @cached_property
    def _parts(self) -> tuple[TrainingSet, DevSet, LayerTeacher]:
        """Make what training reads, and what it starts from."""
        from retrieval_kd.training.batches import TrainingSet
        from retrieval_kd.training.towers import LayerTeacher

        workspace, stage = self._workspace, self.spec
        if self._previous is None:
            _ = workspace.cut
        rows = [workspace.query_vectors.row_of[item.query_id] for item in self.lists]
        stored = self.needs_teacher and stage.joint is None
        data = TrainingSet(
            lists=self.lists,
            texts=workspace.training_queries,
            teacher=self.teacher_scores if stored else None,
            members=self._member_scores if stored and len(self.teacher.members) > 1 else None,
            qrels=workspace.collection.qrels("train"),
            query_targets=workspace.query_vectors.vectors[rows],
            preferences=self.teacher.preferences(self.lists) if self._compares else None,
            maxsim=self._maxsim() if self._scores_batches else None,
            extra=self._extra(),
        )
        layers, queries = workspace.recipe.student.layers, workspace.training_queries
        return data, workspace.dev_set, LayerTeacher(workspace.start, layers, queries, workspace.collection)

    def _train(self, folder: Path) -> Mapping[str, Any]:
        from retrieval_kd.teachers.cross_encoder import save_classifier
        from retrieval_kd.training.loop import train
        from retrieval_kd.training.towers import FrozenDocuments, LiveDocuments

        workspace, stage = self._workspace, self.spec
        student, live = self._start()
        data, dev, layer_teacher = self._parts

        def documents(device: torch.device) -> DocumentTower:
            if stage.frozen_documents or workspace.recipe.student.mode == "asymmetric":
                return FrozenDocuments(workspace.corpus, device)
            return LiveDocuments(live, workspace.collection, workspace.corpus, device)

        joint = None if stage.joint is None else self._joint(stage.joint)
        summary = train(
            student,
            documents,
            data,
            dev,
            stage.losses,
            stage.schedule,
            workspace.recipe.seed,
            folder,
            layer_teacher=layer_teacher,
            joint=joint,
        )
        if live is not student:
            card = dataclasses.replace(live.refresh_card(), space="")
            live.move_to_space_of(card, "document")
            student.move_to_space_of(card, "query")
        if processes.index() == 0:
            if joint is not None:
                save_classifier(joint.module, self.teacher.folder, folder / RERANKER)
            if live is not student:
                live.save(folder / DOCUMENTS)
            student.save(folder)
        return {"stage": stage.name, **summary}

    def _joint(self, spec: JointSpec) -> JointReranker:
        """Open the teacher's cross-encoder for training."""
        from retrieval_kd.encoders.base import load_tokenizer
        from retrieval_kd.teachers.cross_encoder import load_classifier
        from retrieval_kd.teachers.pairs import PairTokenizer
        from retrieval_kd.training.towers import JointReranker

        (member,) = self.teacher.members
        module = load_classifier(member.folder)
        max_length, template = member.spec.max_length, member.spec.template
        tokenizer = PairTokenizer(load_tokenizer(member.folder), module, max_length, template)
        workspace = self._workspace
        queries = workspace.training_queries
        return JointReranker(module, tokenizer, queries, workspace.collection, spec.learning_rate)

    @cached_property
    def reranker(self) -> Teaching | None:
        """Return the cross-encoder that learnt along with the student, as a teacher; None where none did."""
        if self.spec.joint is None:
            return None
        (member,) = self.spec.teacher.ensemble
        trained = dataclasses.replace(member, model=str(self.folder / RERANKER), fine_tune=None, compress=None)
        return self._workspace.teacher(TeacherSpec(normalise="none", members=(trained,)))

    @cached_property
    def reranker_export(self) -> Path | None:
        """Export the cross-encoder that learnt along, or else the teacher's first; None where there is none."""
        if not self.needs_teacher:
            return None
        members = (self.reranker or self.teacher).members
        reading = next((member for member in members if member.spec.kind == "cross_encoder"), None)
        return self._workspace.export_reranker(reading) if reading else None

    def _extra(self) -> ExtraTexts | None:
        from retrieval_kd.training.batches import ExtraTexts

        if not self.extra_texts:
            return None
        encoded = self._workspace.encoded_queries(self.extra_texts, self._workspace.encoder)
        texts = {text_id: self.extra_texts[text_id] for text_id in encoded.ids}
        return ExtraTexts(texts, encoded.vectors, self.spec.extra_texts.batch)

    @cached_property
    def export(self) -> Path:
        """Export the trained student at fp32 through the parity gate and return the ONNX encoder's folder."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        return self._workspace.export(TorchEncoder.open(self.folder))

    @cached_property
    def document_encoder(self) -> OnnxEncoder:
        """Open the encoder of the documents that the student searches."""
        return OnnxEncoder.load(self.document_export)

    @cached_property
    def document_export(self) -> Path:
        """Return the exported encoder of the documents that the student searches."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        student = self._workspace.recipe.student
        if student.mode == "asymmetric":
            return self._workspace.encoder_export
        if student.towers == "shared":
            return self.export
        return self._workspace.export(TorchEncoder.open(self.folder / DOCUMENTS))

    def save_pair(self, folder: Path) -> None:
        """Write the student and the encoder of its documents as one sentence-transformers model.

        Raises:
            RecipeError: they are one encoder.
        """
        from retrieval_kd.encoders.pair import save_pair
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        student = self._workspace.recipe.student
        if student.mode == "asymmetric":
            documents = self._workspace.start
        elif student.towers == "separate":
            documents = TorchEncoder.open(self.folder / DOCUMENTS)
        else:
            raise RecipeError(f"one encoder has both sides; {self.folder} is a sentence-transformers model as it is")
        save_pair(TorchEncoder.open(self.folder), documents, folder)

    @cached_property
    def encoder(self) -> OnnxEncoder:
        """Open the student exported at fp32, which mines, selects and encodes documents."""
        return OnnxEncoder.load(self.export)

    @cached_property
    def served_export(self) -> Path:
        """Export the trained student at the recipe's precision and return the folder that a server opens."""
        from retrieval_kd.encoders.torch_encoder import TorchEncoder

        if self._workspace.recipe.export.precision == "fp32":
            return self.export
        return self._workspace.export_lowered(TorchEncoder.open(self.folder), self.encoder)

    @cached_property
    def served(self) -> OnnxEncoder:
        """Open the student that answers queries."""
        return OnnxEncoder.load(self.served_export)

    @property
    def _of_stage(self) -> str:
        return f" of stage {self.spec.name}" if self._workspace.recipe.stages else ""
