"""The paper's figures: complete, consistent, and the ones that the shipped configs hold."""

import pytest

from iomm.engine.config import CONFIGS, load_config
from iomm.engine.evaluation.graded import READERS, TARGETS, load_targets
from iomm.engine.evaluation.layouts import LAYOUTS

MODELS = ("iomm-b", "iomm-l", "iomm-xl")
TARGET = load_targets()
TRAINING = TARGET["training"]


def stage_1(name):
    return load_config(f"{name}-512")


def stages_2():
    for path in sorted(CONFIGS.glob("iomm-*-finetune.yaml")):
        name, size_px, _ = path.stem.rsplit("-", 2)
        yield name, int(size_px), load_config(path.stem)


def readings(figure):
    return figure["readings"] if isinstance(figure, dict) and "readings" in figure else [figure]


def test_the_file_is_in_the_package():
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
def test_the_main_results(model, scores):
    assert tuple(TARGET["models"][model][bench] for bench in ("geneval", "dpg", "wise")) == scores


def test_the_same_figure_in_two_places_is_the_same():
    best, ablations = TARGET["models"]["iomm-xl-512"], TARGET["ablations"]
    assert ablations["mask_ratio"][0.45] == {key: best[key] for key in ("geneval", "dpg")}
    assert ablations["adapter"]["geneval"]["rqa and masking"] == best["geneval"]
    assert TARGET["recipes"]["image"]["mix"] == TARGET["models"]["iomm-b-512"]["geneval"]
    for name in ("iomm-b", "iomm-l"):
        for found in readings(TRAINING[name]["stage_1"]):
            assert found["images"] == found["epochs"] * TRAINING["stage_1_images"]
    stage_2 = TRAINING["stage_2"]
    samples = stage_2["epochs"] * stage_2["pairs"]
    assert (
        round(samples / TRAINING["iomm-b"]["stage_2"]["global_batch"][512])
        == (stage_2["steps"][512])
    )


def test_every_figure_has_a_source():
    def sourced(node):
        return isinstance(node, dict) and ("source" in node or any(map(sourced, node.values())))

    for name in ("imgedit", "recipes", "other_models", "training"):
        assert TARGET[name]["source"]
    assert all(sourced(model) for model in TARGET["models"].values())
    assert all(sourced(part) for key, part in TARGET["ablations"].items() if key != "model")


@pytest.mark.parametrize("name", MODELS)
def test_stage_1_configs_hold_the_papers_settings(name):
    config, paper = stage_1(name), TRAINING[name]
    assert config.train.global_batch == paper["stage_1"]["global_batch"]
    assert config.mask.ratio == paper["mask_ratio"]
    assert config.optim.kind == paper["optimizer"]
    assert (config.optim.lr, config.optim.clip) == (paper["lr"], paper["clip"])


@pytest.mark.parametrize(
    "name, size_px, config",
    [pytest.param(*found, id=f"{found[0]}-{found[1]}") for found in stages_2()],
)
def test_stage_2_configs_hold_the_papers_settings(name, size_px, config):
    paper = TRAINING[name]
    assert config.data.size_px == size_px
    assert config.train.global_batch == paper["stage_2"]["global_batch"][size_px]
    assert config.data.mix == TRAINING["stage_2"]["lambda"]
    assert config.mask.ratio == paper["mask_ratio"]
    assert config.optim.kind == paper["optimizer"]
    assert (config.optim.lr, config.optim.clip) == (paper["lr"], paper["clip"])
    # Also at 1024 px.
    assert config.run.init == f"runs/{name}-512"


@pytest.mark.parametrize("name", MODELS)
def test_the_ema_of_a_config_is_one_of_the_papers_readings(name):
    configs = [stage_1(name), *(config for other, _, config in stages_2() if other == name)]
    decays = [
        found["decay"] if isinstance(found, dict) else found
        for found in readings(TRAINING[name]["ema"])
    ]
    assert all(config.ema.decay in decays for config in configs)
    assert name != "iomm-b" or decays == [0.999]


def test_stage_1_of_b_has_one_of_the_papers_lengths():
    config = stage_1("iomm-b")
    images = config.train.steps * config.train.global_batch
    lengths = [found["images"] for found in readings(TRAINING["iomm-b"]["stage_1"])]
    assert any(abs(images - length) < config.train.global_batch for length in lengths)
