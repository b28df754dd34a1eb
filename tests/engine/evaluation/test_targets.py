"""The paper's figures are complete and consistent, and the shipped configs have its settings."""

from typing import Any

import pytest

from iomm.engine.config import CONFIGS, load_config
from iomm.engine.evaluation.graded import READERS, TARGETS, load_targets
from iomm.engine.evaluation.layouts import LAYOUTS

TARGET = load_targets()
TRAINING = TARGET["training"]
NAMES = sorted(path.stem for path in CONFIGS.glob("iomm-*.yaml"))
# Steps by config, written out: test_stage_lengths_are_consistent computes the same from the paper's
# epochs, images and batches. The paper gives no lengths for IOMM-XL.
STEPS = {
    "iomm-b-512": 107_422,
    "iomm-l-512": 107_422,
    "iomm-b-512-finetune": 8_203,
    "iomm-l-512-finetune": 8_203,
    "iomm-xl-512-finetune": 8_203,
    "iomm-b-1024-finetune": 21_875,
    "iomm-l-1024-finetune": 21_875,
}


def first_reading(figure: Any) -> Any:
    """Return the reading that the configs follow, where the paper contradicts itself."""
    return figure["readings"][0] if isinstance(figure, dict) and "readings" in figure else figure


def papers_ema(model: str) -> float:
    """Return the paper's decay, or IOMM-B's where the paper reports EMA results without a decay."""
    reading = first_reading(TRAINING[model]["ema"])
    if not isinstance(reading, dict):
        return reading
    assert reading["decay"] is None
    return TRAINING["iomm-b"]["ema"]


def papers_samples(model: str, stage: str) -> int | None:
    """Return the samples that a stage trains on, or None if the paper gives no length."""
    if stage == "stage_2":
        return TRAINING["stage_2"]["epochs"] * TRAINING["stage_2"]["samples"]
    epochs = first_reading(TRAINING[model]["stage_1"]).get("epochs")
    return epochs and epochs * TRAINING["stage_1_images"]


def papers_batch(model: str, stage: str, size_px: int) -> int:
    """Return the global batch of a stage at a resolution."""
    batch = TRAINING[model][stage]["global_batch"]
    return batch[size_px] if stage == "stage_2" else batch


def split_name(name: str) -> tuple[str, str, int]:
    """Return (model, stage, side of an image in pixels) of a config's name."""
    model, size_px = name.removesuffix("-finetune").rsplit("-", 1)
    return model, "stage_2" if name.endswith("-finetune") else "stage_1", int(size_px)


def test_targets_are_in_the_package():
    assert TARGETS.parent.name == "evaluation"
    assert (TARGETS.parent / "__init__.py").is_file()
    assert '"*.yaml"' in (TARGETS.parents[2] / "setup.py").read_text()


def test_every_benchmark_has_a_reader_and_a_protocol():
    assert set(READERS) == set(LAYOUTS) == set(TARGET["protocols"])


@pytest.mark.parametrize(
    "model, scores",
    [
        ("iomm-b-512", (0.89, 82.95, 0.55)),
        ("iomm-b-1024", (0.87, 80.71, 0.50)),
        ("iomm-l-512", (0.87, 76.09, 0.53)),
        ("iomm-l-1024", (0.85, 72.26, 0.48)),
    ],
)
def test_main_results(model, scores):
    assert tuple(TARGET["models"][model][bench] for bench in ("geneval", "dpg", "wise")) == scores


def test_figures_that_occur_twice_are_equal():
    best, ablations = TARGET["models"]["iomm-xl-512"], TARGET["ablations"]
    assert ablations["mask_ratio"][0.45] == {key: best[key] for key in ("geneval", "dpg")}
    assert ablations["adapter"]["geneval"]["rqa and masking"] == best["geneval"]
    assert TARGET["recipes"]["image"]["mix"] == TARGET["models"]["iomm-b-512"]["geneval"]


def test_stage_lengths_are_consistent():
    for model in ("iomm-b", "iomm-l"):
        stage_1 = TRAINING[model]["stage_1"]
        for reading in stage_1.get("readings", [stage_1]):
            assert reading["images"] == reading["epochs"] * TRAINING["stage_1_images"]
        assert first_reading(stage_1)["epochs"] == {"iomm-b": 10, "iomm-l": 5}[model]
        for size_px, steps in TRAINING["stage_2"]["steps"].items():
            batch = papers_batch(model, "stage_2", size_px)
            assert round(papers_samples(model, "stage_2") / batch) == steps
    for name, steps in STEPS.items():
        model, stage, size_px = split_name(name)
        batch = papers_batch(model, stage, size_px)
        assert round(papers_samples(model, stage) / batch) == steps


def test_every_figure_has_a_source():
    def sourced(node: Any) -> bool:
        return isinstance(node, dict) and ("source" in node or any(map(sourced, node.values())))

    for name in ("imgedit", "recipes", "other_models", "training"):
        assert TARGET[name]["source"]
    assert all(sourced(model) for model in TARGET["models"].values())
    assert all(sourced(part) for key, part in TARGET["ablations"].items() if key != "model")


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_papers_settings(name):
    model, stage, size_px = split_name(name)
    config, paper = load_config(name), TRAINING[model]
    assert config.model.preset == model
    assert config.data.size_px == size_px
    assert config.train.global_batch == papers_batch(model, stage, size_px)
    assert config.mask.ratio == paper["mask_ratio"]
    assert config.optim.kind == paper["optimizer"]
    assert config.optim.lr == paper["lr"]
    assert config.optim.clip == paper["clip"]
    assert config.optim.betas == tuple(paper["betas"])
    if paper["weight_decay"] is not None:
        assert config.optim.weight_decay == paper["weight_decay"]
    assert config.ema.decay == papers_ema(model) == 0.999


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-finetune")])
def test_stage_2_config_is_mixed_and_starts_from_512_px(name):
    config = load_config(name)
    assert config.train.data == "mix"
    assert config.data.mix == TRAINING["stage_2"]["lambda"]
    assert config.run.init == f"runs/{config.model.preset}-512"


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_papers_length(name):
    model, stage, _ = split_name(name)
    if papers_samples(model, stage) is None:
        assert name == "iomm-xl-512"
        assert "our choice" in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        assert load_config(name).train.steps == STEPS[name]
