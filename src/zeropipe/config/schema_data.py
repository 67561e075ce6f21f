"""The sections of the configuration that change, from step to step, what a model is given and how much of it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from zeropipe.config.fields import Count, Lowercase, Real, Section, key, with_keys_without_effect

ScheduleType = Annotated[
    Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"],
    Lowercase,
]


class Curriculum(Section):
    """Easy samples first: the model's forward is told the length of sequences, as ``curriculum_seqlen``."""

    enabled: bool = key(False, "Turn it on.")
    curriculum_type: str = key("seqlen", "What is difficult; of another word forward is told nothing.")
    min_difficulty: Count = key(1, "The first difficulty.", ge=1)
    max_difficulty: Count = key(1, "The last difficulty.", ge=1)
    schedule_type: ScheduleType = key("fixed_linear", "How it grows.")
    schedule_config: dict[str, Any] = key(
        {},
        "fixed_linear: total_curriculum_step, difficulty_step; fixed_root: root_degree too; "
        "fixed_discrete: difficulty, max_step.",
    )


class CurriculumSampling(Section):
    """Which samples are drawn: those whose metrics are not above what a schedule allows."""

    enabled: bool = key(False, "Turn it on.")
    curriculum_metrics: dict[str, dict[str, Any]] = key(
        {},
        "By name: index_to_sample_path and index_to_metric_path (made by DataAnalyzer), difficulty_type "
        "(value or percentile), clustering_type (schedule_based, or single_cluster: nothing is left out), "
        "and the schedule as in curriculum_learning.",
    )
    data_cluster_path: str | None = key(None, "Accepted: nothing is written while sampling.")


@with_keys_without_effect("data_efficiency.data_sampling")
class DataSampling(Section):
    """How training data is sampled."""

    enabled: bool = key(False, "Turn it on.")
    num_epochs: Count = key(1000, "Passes over the data.", ge=1)
    num_workers: Count = key(0, "Processes that load samples.", ge=0)
    pin_memory: bool = key(False, "Load into pinned memory.")
    curriculum_learning: CurriculumSampling = key(CurriculumSampling(), "Easy samples first.")


@with_keys_without_effect("data_efficiency")
class DataEfficiency(Section):
    """Sampling of the training data that ``initialize`` is given."""

    enabled: bool = key(False, "Turn it on.")
    seed: Count = key(1234, "Of the order of samples.")
    data_sampling: DataSampling = key(DataSampling(), "How training data is sampled.")

    @property
    def chooses_samples(self) -> bool:
        """Whether all three switches are on."""
        sampling = self.data_sampling
        return self.enabled and sampling.enabled and sampling.curriculum_learning.enabled


class ProgressiveLayerDrop(Section):
    """The model's forward is told, as ``pld_theta``, how many of its layers to keep in a step."""

    enabled: bool = key(False, "Turn it on.")
    theta: Real = key(1.0, "The share of layers that are kept in the end.", gt=0, le=1)
    gamma: Real = key(0.001, "How fast the share falls from 1 to theta.", ge=0, allow_inf_nan=False)
