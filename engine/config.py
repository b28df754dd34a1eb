"""All config keys: a tree of frozen dataclasses, read from one YAML file and dotted overrides.

Every key is typed and checked once, and every error names its key. The comment above a key is its
entry in the table of engine/README.md. engine/config_parser.py reads the files.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from iomm.config import (
    PRESETS,
    AdapterConfig,
    AlignConfig,
    GeneratorConfig,
    InputError,
    LoraConfig,
    MaskConfig,
    PromptConfig,
    RouteConfig,
    choice,
)
from iomm.engine.config_parser import all_keys, read
from iomm.flow import TIME_KINDS
from iomm.kernels.dispatch import cpu_has_bf16

__all__ = [
    "CONFIGS",
    "FREE_KEYS",
    "RunConfig",
    "all_keys",
    "differences",
    "flat",
    "load_config",
    "parse",
]

CONFIGS = Path(__file__).parent / "configs"


def positive(key: str, value: float, least: float = 1) -> None:
    """Raise InputError if the value of a key is below `least`."""
    if value < least:
        raise InputError(f"{key} must be >= {least}, got {value}")


# The preset that takes the generator's shape from run.init.
FROM_INIT = "from-init"


@dataclass(frozen=True, kw_only=True)
class RunSection:
    # Folder of the run.
    dir: str = "runs/demo"
    # Seed for weights, data order, masks, times, noise, flips and dropped captions.
    seed: int = 0
    # Run folder whose newest weights this run starts from, or a folder with the transformer of a
    # diffusers model (FLUX.1, Qwen-Image, Z-Image or an export), whose weights are taken where they
    # fit. Everything else starts fresh. With lora.rank it is the frozen base, which must be
    # complete.
    init: str | None = None
    # ema | raw: which weights of a run to load.
    init_weights: str = "ema"

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise InputError(f"run.seed must be >= 0 and below 2^64, got {self.seed}")
        choice("run.init_weights", self.init_weights, ("ema", "raw"))


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    # Shape of the generator: a name in PRESETS of iomm/config.py, or "from-init": that of run.init.
    preset: str = "iomm-b"
    # The shape that "from-init" found, as JSON. Set by the first start of a run.
    shape: str | None = None
    # Folder or hub id of an InternVL or a Qwen2.5-VL, or folder of a diffusers pipeline with one as
    # text encoder. "shapes": the tiny InternVL that ships with the package. "random:internvl3-2b":
    # random weights, to measure speed.
    mllm: str = "shapes"
    # Commit of the hub checkpoint; null: the newest.
    mllm_revision: str | None = None
    # Side in pixels of the square that the ViT of a Qwen2.5-VL sees, a multiple of 28; null: 448,
    # which gives 256 image tokens. The ViT of an InternVL has a fixed input.
    vit_px: int | None = None
    # auto: the run's precision | fp8: the products of the frozen ViT's and decoder's layers in fp8,
    # with weights rounded once. Beyond the paper; not measured on a GPU yet.
    mllm_precision: str = "auto"
    # Folder or hub id of an AutoencoderKL or AutoencoderKLQwenImage. "shapes": the tiny one that
    # ships with the package. "pixel:<patch>": no VAE, a token is <patch> x <patch> pixels.
    # "random:flux": random weights, to measure speed.
    vae: str = "pixel:4"
    # Side of the square of VAE latents that forms one token of the generator.
    patch: int = 2
    # Sample latents from the VAE's posterior instead of using its mean.
    vae_sample: bool = False

    def __post_init__(self) -> None:
        choice("model.preset", self.preset, (*PRESETS, FROM_INIT))
        choice("model.mllm_precision", self.mllm_precision, ("auto", "fp8"))
        positive("model.patch", self.patch)
        positive("model.vit_px", self.vit_px if self.vit_px is not None else 1)
        if self.preset != FROM_INIT and self.shape is not None:
            raise InputError(
                f"model.shape is set, but model.preset is {self.preset}: omit model.shape"
            )

    @property
    def generator(self) -> GeneratorConfig:
        """The generator's shape, before it is adapted to VAE and MLLM.

        Raises:
            InputError: the preset is "from-init" and no shape was found yet.
        """
        if self.preset != FROM_INIT:
            return PRESETS[self.preset]
        if self.shape is None:
            raise InputError(
                "model.preset=from-init takes the generator's shape from run.init. Set run.init to "
                "a run or to a folder with the transformer of a diffusers model"
            )
        try:
            return GeneratorConfig(**json.loads(self.shape))
        except (TypeError, ValueError) as error:
            raise InputError(f"model.shape is not the shape of a generator: {error}") from None


@dataclass(frozen=True, kw_only=True)
class DataSection:
    # Images: tars, globs or folders, separated by commas or as a YAML list. "shapes": the rendered
    # dataset.
    shards: str | tuple[str, ...] = "shapes"
    # Text-image pairs, in the same form as data.shards.
    pairs: str | tuple[str, ...] | None = None
    # With train.data=mix: share of images without text in every global batch.
    mix: float = 0.5
    # Folder written by `iomm cache`: read VAE latents instead of pixels. "memory": compute the
    # latents and image tokens of all samples once at the start and keep them in memory.
    latents: str | None = None
    # Side of the square crops. With data.buckets their area is size_px squared.
    size_px: int = 512
    # allow | warn | refuse: whether the run may upscale images that are smaller than its crops. The
    # share is logged when it starts. refuse: it does not start.
    upscale: str = "warn"
    # center | random: position of the crop in the image.
    crop: str = "center"
    # Crop close to the image's own aspect ratio, at the same area, instead of to a square.
    buckets: bool = False
    # Mirror half of the images, but none with a caption.
    flip: bool = False
    # fp32 | bf16: type of the decoded pixels. Latents are always fp32. On a GPU an autoencoder in
    # bf16 gets bf16 in any case, which gives the same latents.
    precision: str = "fp32"
    # torch | dali: library that resizes on a CPU; torch is faster. A GPU always uses DALI.
    resize: str = "torch"
    # Number of images of the shapes dataset to render.
    num_images: int = 4096
    # Number of pairs of the shapes dataset to render, none of them among the images.
    num_pairs: int = 500
    # Decoding threads per rank.
    threads: int = 2
    # Share of baseline JPEGs that the GPU's JPEG engine decodes.
    hw_decoder_load: float = 0.65
    # Reject images whose shorter edge is below this.
    min_size_px: int = 32
    # Reject images whose longer edge / shorter edge is above this.
    max_aspect: float = 10.0
    # Reject images with more pixels. Decoding one of the default size takes 256 MB.
    max_pixels: int = 1 << 26
    # The run stops when more than this share of its samples was unreadable.
    max_bad_fraction: float = 1e-4
    # The run stops when more than this number of shards had unreadable samples.
    max_bad_shards: int = 5
    # Number of images, and of pairs, kept out of training for the held-out loss.
    heldout: int = 0

    def __post_init__(self) -> None:
        for key in ("shards", "pairs"):
            value = getattr(self, key)
            if isinstance(value, tuple):
                if not value or not all(value):
                    raise InputError(
                        f"data.{key} must be a list of texts, none empty, got {list(value)}"
                    )
                # One form for a single pattern, so that "shapes" and an index are recognised.
                object.__setattr__(self, key, value[0] if len(value) == 1 else value)
            elif value is not None and "," in value and not os.path.exists(value):
                parts = re.sub(r"\{[^{}]*\}", "braces", value).split(",")
                if not all(part.strip() for part in parts):
                    raise InputError(
                        f"data.{key} has an empty name between its commas, got {value!r}. Remove "
                        "the comma; a shell variable may be unset"
                    )
        positive("data.size_px", self.size_px, 16)
        choice("data.upscale", self.upscale, ("allow", "warn", "refuse"))
        choice("data.crop", self.crop, ("center", "random"))
        choice("data.precision", self.precision, ("fp32", "bf16"))
        choice("data.resize", self.resize, ("dali", "torch"))
        for name in ("num_images", "num_pairs", "threads", "min_size_px", "max_pixels"):
            positive(f"data.{name}", getattr(self, name))
        positive("data.max_aspect", self.max_aspect, 1)
        positive("data.max_bad_shards", self.max_bad_shards, 0)
        positive("data.heldout", self.heldout, 0)
        for name in ("mix", "hw_decoder_load", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"data.{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.latents and (self.flip or self.crop != "center" or self.buckets):
            raise InputError(
                "data.latents holds latents of unflipped centre crops: set data.flip=false, "
                "data.crop=center and data.buckets=false, or leave data.latents out"
            )
        if self.latents not in (None, "memory") and self.pairs:
            raise InputError(
                "a folder of `iomm cache` in data.latents holds images only: leave data.pairs out, "
                "set data.latents=memory, or leave data.latents out"
            )


@dataclass(frozen=True, kw_only=True)
class CacheSection:
    # Folder for rendered data and for the indexes of data.shards and data.pairs; null: `shared/`
    # next to run.dir, and where that cannot be written, run.dir or the user's cache folder.
    dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    # image | pair | mix: content of a global batch; see data.mix.
    data: str = "image"
    # Share of captions replaced by the empty prompt, for classifier-free guidance.
    caption_drop: float = 0.1
    # Number of (time, noise) pairs drawn for each sample in a step. The generator runs on all of
    # them; the frozen encoders, the adapter and the MLLM run once. The paper uses 1.
    noise_draws: int = 1
    # Optimizer steps of the whole run.
    steps: int = 1000
    # Samples per optimizer step over all ranks.
    global_batch: int = 1024
    # Samples per rank and forward pass; null: global_batch / ranks. auto: the largest divisor of
    # that number for which the counted memory fills at most 92 % of the GPU (`--dry-run` lists it
    # for several GPUs); on a CPU as null.
    micro_batch: int | str | None = None
    # CPU threads of torch per rank; null: cores / ranks of this machine.
    threads: int | None = None
    # Number of ranks if a run is started as one rank on a machine without a GPU, lowered to a
    # divisor of global_batch. 0: one per core, with at least 4 images each.
    cpu_ranks: int = 1
    # Time limit of a collective in seconds. A slower one ends the run.
    timeout_s: float = 1800.0
    # Compile every block with torch.compile; null: only on a GPU.
    compile: bool | None = None
    # Encode the next micro-batch on a second CUDA stream while the generator runs. Needs memory for
    # both. Off until a GPU measurement shows a gain.
    overlap: bool = False
    # Number of blocks, counted from the first, that recompute activations in the backward pass.
    recompute: int = 0

    def __post_init__(self) -> None:
        choice("train.data", self.data, ("image", "pair", "mix"))
        if not 0 <= self.caption_drop <= 1:
            raise InputError(f"train.caption_drop must be between 0 and 1, got {self.caption_drop}")
        positive("train.noise_draws", self.noise_draws)
        positive("train.steps", self.steps)
        positive("train.global_batch", self.global_batch)
        if isinstance(self.micro_batch, str) and self.micro_batch != "auto":
            raise InputError(
                f"train.micro_batch must be a number, auto or null, got {self.micro_batch!r}"
            )
        positive("train.micro_batch", self.micro_batch if self.number_given else 1)
        positive("train.threads", self.threads if self.threads is not None else 1)
        positive("train.cpu_ranks", self.cpu_ranks, 0)
        positive("train.timeout_s", self.timeout_s)
        positive("train.recompute", self.recompute, 0)

    @property
    def number_given(self) -> bool:
        """Whether micro_batch is a number."""
        return self.micro_batch not in (None, "auto")

    def compiled(self, device: torch.device) -> bool:
        """Return whether blocks are compiled on this device."""
        return device.type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True)
class TimeSection:
    # uniform | logit_normal: distribution of times between image (0) and noise (1).
    kind: str = "uniform"
    # Mean of the logit-normal distribution.
    mean: float = 0.0
    # Standard deviation of the logit-normal distribution.
    std: float = 1.0
    # Resolution shift. Values above 1 move times towards noise.
    shift: float = 1.0

    def __post_init__(self) -> None:
        choice("time.kind", self.kind, TIME_KINDS)
        if not (self.std > 0 and self.shift > 0):
            raise InputError(
                f"time.std and time.shift must be > 0, got {self.std} and {self.shift}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    # adamw | muon: muon uses Muon for the matrices of layers and AdamW for everything else.
    kind: str = "adamw"
    # torch | apex: AdamW by torch's fused kernel or by NVIDIA apex's FusedAdam. They agree to
    # float32 rounding. The rows `adamw` of `python benchmarks/ops.py --gpu` compare their speed.
    adamw: str = "torch"
    # Peak learning rate.
    lr: float = 1e-4
    # AdamW's betas.
    betas: tuple[float, float] = (0.9, 0.95)
    # AdamW's epsilon.
    eps: float = 1e-8
    # Decoupled weight decay of AdamW and Muon.
    weight_decay: float = 0.0
    # Global gradient norm above which gradients are clipped; 0: no clipping.
    clip: float = 1.0
    # Number of steps over which the learning rate rises linearly.
    warmup_steps: int = 1000
    # constant | cosine: learning rate after the warm-up. cosine reaches 0 at train.steps.
    schedule: str = "constant"
    # Muon's Nesterov momentum.
    momentum: float = 0.95
    # Newton-Schulz iterations of Muon's orthogonalisation. 3 cost 40 % less than 5 and leave small
    # singular values smaller.
    newton_schulz_steps: int = 5

    def __post_init__(self) -> None:
        choice("optim.kind", self.kind, ("adamw", "muon"))
        # Checkpoints of earlier versions may contain "deepspeed". torch's update is the same to
        # float32 rounding.
        if self.adamw == "deepspeed":
            object.__setattr__(self, "adamw", "torch")
        choice("optim.adamw", self.adamw, ("torch", "apex"))
        choice("optim.schedule", self.schedule, ("constant", "cosine"))
        if not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            raise InputError(
                f"optim.betas and optim.momentum must be in [0, 1), got {self.betas} and "
                f"{self.momentum}"
            )
        positive("optim.newton_schulz_steps", self.newton_schulz_steps)
        positive("optim.warmup_steps", self.warmup_steps, 0)
        positive("optim.clip", self.clip, 0)
        positive("optim.weight_decay", self.weight_decay, 0)
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"optim.{name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EmaSection:
    # Decay of the moving average of the weights; 0: no average.
    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class ZeroSection:
    """What ZeRO partitions over the ranks and how it is sent. Sizes are in values, not bytes.

    DeepSpeed's quantised weights and gradients (ZeRO++) have no key: they need kernels that are
    compiled at the start, and they change what is computed.
    """

    # 0 splits nothing; 1 splits masters and moments over the ranks; 2 also gradients; 3 also
    # weights.
    stage: int = 3
    # bf16 | fp32: type in which gradients are summed over ranks. bf16 sends half the bytes; use
    # fp32 with hundreds of ranks, where sums have many terms. Accumulation over micro-batches is
    # in fp32 either way.
    reduce_precision: str = "bf16"
    # Stages 2 and 3: send gradients during the backward pass; null: only on a GPU.
    overlap_comm: bool | None = None
    # Stages 1 to 3: size of a gradient message. IOMM-XL's largest block has 181 M values, so each
    # block is sent separately. Messages of 0.4 GB run at link speed, and the last one, which no
    # computation hides, is 1/34 of all. DeepSpeed's default of 500 M would hold 8 blocks of IOMM-B.
    reduce_bucket_size: int = 200_000_000
    # Stages 1 and 2: number of weights gathered at once after a step; DeepSpeed's default.
    allgather_bucket_size: int = 500_000_000
    # Stage 3: number of weights gathered in advance; enough for IOMM-XL's next block of 181 M.
    prefetch_bucket_size: int = 200_000_000
    # Stage 3: parameters up to this size stay gathered, which costs each a separate message after
    # every step. 0, because blocks are gathered whole, norms and biases included. At 50,000 IOMM-B
    # would send 280 of these messages: over 5 % of a step with 64 GPUs or more (computed by
    # benchmarks/budget.py).
    param_persistence_threshold: int = 0
    # Stage 3: largest number of gathered weights, 2 GB in bf16. Last blocks up to this size are
    # kept from the forward to the backward pass instead of being gathered twice: 1 G of IOMM-B's
    # 1.6 G weights. Lower it when memory runs out.
    max_live_parameters: int = 1_000_000_000
    # Stage 3: number of ranks that together hold a second copy of the weights for the backward
    # pass. The number of GPUs of one machine (8) keeps the backward gathers off the network and
    # costs 2 / 8 bytes per weight and GPU. 1: no second copy.
    hpz_partition_size: int = 1

    def __post_init__(self) -> None:
        choice("zero.stage", self.stage, (0, 1, 2, 3))
        choice("zero.reduce_precision", self.reduce_precision, ("bf16", "fp32"))
        positive("zero.reduce_bucket_size", self.reduce_bucket_size)
        positive("zero.allgather_bucket_size", self.allgather_bucket_size, 2)
        for name in ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters"):
            positive(f"zero.{name}", getattr(self, name), 0)
        positive("zero.hpz_partition_size", self.hpz_partition_size)
        if self.allgather_bucket_size % 2:
            raise InputError(
                f"zero.allgather_bucket_size must be even, got {self.allgather_bucket_size}"
            )
        if self.hpz_partition_size > 1 and self.stage != 3:
            raise InputError(
                f"zero.hpz_partition_size needs zero.stage 3, got stage {self.stage}: leave it out"
            )

    def check_ranks(self, ranks: int) -> None:
        """Raise InputError if the second copy of the weights cannot be split over the ranks."""
        if ranks % self.hpz_partition_size:
            raise InputError(
                "zero.hpz_partition_size must divide the number of ranks, got "
                f"{self.hpz_partition_size} and {ranks}: give the number of GPUs of one machine, "
                "or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    # Steps between checkpoints. The last step always has one.
    every_steps: int = 1000
    # Number of newest checkpoints to keep; at least 2, in case one gets damaged on the disk.
    keep: int = 3
    # Checkpoints at multiples of this are never removed; 0: none.
    keep_every_steps: int = 0
    # Training waits only for the copy to memory; false: until the checkpoint is on the disk.
    background: bool = True
    # Mean GPU-hours between faults, from which a finished run recommends checkpoint.every_steps.
    mtbf_gpu_hours: float = 20_000.0

    def __post_init__(self) -> None:
        positive("checkpoint.every_steps", self.every_steps)
        positive("checkpoint.keep", self.keep, 2)
        positive("checkpoint.keep_every_steps", self.keep_every_steps, 0)
        positive("checkpoint.mtbf_gpu_hours", self.mtbf_gpu_hours)


@dataclass(frozen=True, kw_only=True)
class LogSection:
    # Steps between lines on the terminal. log.jsonl has every step.
    every_steps: int = 10
    # Images in the grid sampled at the end. On the shapes dataset samples are scored as well. 0:
    # neither.
    sample_images: int = 16
    # Euler steps for that grid.
    sample_steps: int = 20
    # Log to Weights & Biases as well. Project and name are the last two folders of run.dir.
    wandb: bool = False

    def __post_init__(self) -> None:
        positive("log.every_steps", self.every_steps)
        positive("log.sample_images", self.sample_images, 0)
        positive("log.sample_steps", self.sample_steps)


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    # Steps between evaluations (held-out loss and a grid). The last step has one too. 0: never.
    every_steps: int = 0
    # Held-out samples, or sampled images, per rank and pass.
    micro_batch: int = 16
    # Images in the grid; 0: none.
    num_images: int = 16
    # Euler steps of each image.
    steps: int = 20
    # Scale of classifier-free guidance for prompts. Above 1 needs a run with train.caption_drop.
    guidance: float = 1.0
    # Prompts separated by "|", used in turn; null: held-out captions, or masked images in a run
    # without pairs.
    prompts: str | None = None

    def __post_init__(self) -> None:
        positive("evaluate.every_steps", self.every_steps, 0)
        positive("evaluate.micro_batch", self.micro_batch)
        positive("evaluate.num_images", self.num_images, 0)
        positive("evaluate.steps", self.steps)
        positive("evaluate.guidance", self.guidance, 0)


@dataclass(frozen=True, kw_only=True)
class GuardSection:
    # The run stops after more than this number of consecutive skipped steps.
    max_skips: int = 5
    # A loss is a spike if it is more than this number of robust standard deviations above the
    # median.
    spike_sigmas: float = 6.0
    # Skip the update of a step with a spike. Makes every step wait for the GPU.
    skip_spikes: bool = False
    # A step that takes longer, in seconds, counts as a hang and ends the run; 0: no limit.
    hang_s: float = 600.0
    # Another host from which no heartbeat comes for this long, in seconds, while no collective
    # completes, counts as lost and ends the run; 0: no limit. A link that is back in time costs
    # nothing.
    lost_s: float = 30.0

    def __post_init__(self) -> None:
        positive("guard.max_skips", self.max_skips, 0)
        positive("guard.spike_sigmas", self.spike_sigmas)
        positive("guard.hang_s", self.hang_s, 0)
        positive("guard.lost_s", self.lost_s, 0)


@dataclass(frozen=True, kw_only=True)
class ProfileSection:
    # First step that --profile traces, counted from the start of this process.
    start_step: int = 20
    # Number of steps in the trace.
    num_steps: int = 3

    def __post_init__(self) -> None:
        positive("profile.start_step", self.start_step)
        positive("profile.num_steps", self.num_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run. A run is a pure function of its config and its data."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    route: RouteConfig = field(default_factory=RouteConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataSection = field(default_factory=DataSection)
    cache: CacheSection = field(default_factory=CacheSection)
    train: TrainSection = field(default_factory=TrainSection)
    time: TimeSection = field(default_factory=TimeSection)
    optim: OptimSection = field(default_factory=OptimSection)
    ema: EmaSection = field(default_factory=EmaSection)
    # bf16 | fp32 | fp8 | auto: arithmetic; masters are always fp32. fp8 is bf16 with the matrix
    # products of the generator's blocks in fp8; its loss has not been compared with bf16's on a GPU
    # yet. auto is bf16 if this machine multiplies it faster than fp32, else fp32.
    precision: str = "bf16"
    zero: ZeroSection = field(default_factory=ZeroSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    guard: GuardSection = field(default_factory=GuardSection)
    profile: ProfileSection = field(default_factory=ProfileSection)

    def __post_init__(self) -> None:
        choice("precision", self.precision, ("auto", "bf16", "fp32", "fp8"))
        if self.data.latents and self.model.vae_sample:
            raise InputError(
                "data.latents holds the mean of the VAE's posterior: set model.vae_sample=false, "
                "or leave data.latents out"
            )
        if self.data.latents not in (None, "memory") and self.train.data != "image":
            raise InputError(
                f"a folder in data.latents holds images only, but train.data is {self.train.data}: "
                "set train.data=image or data.latents=memory, or leave data.latents out"
            )
        if self.route.ratio and (self.model.preset != FROM_INIT or self.model.shape is not None):
            self.route.blocks_in(self.model.generator)
        if self.lora.rank and self.run.init is None:
            raise InputError(
                f"lora.rank is {self.lora.rank}, but run.init does not name the base to fine-tune: "
                "set it to a run, an export or the folder of a diffusers model"
            )
        if self.lora.rank and self.align.weight:
            raise InputError(
                "align.weight trains an alignment head, but LoRA trains nothing else than its "
                "matrices: set align.weight=0"
            )
        if self.align.weight:
            if self.model.preset != FROM_INIT or self.model.shape is not None:
                self.align.block_in(self.model.generator.depth)
            if not self.align_share:
                raise InputError(
                    f"align.weight is {self.align.weight:g}, but no sample of this run is "
                    "conditioned on its image: set align.pairs=true to align pairs, or "
                    "align.weight=0"
                )
            if self.data.latents == "memory" and (self.align.target == "vit" or self.align.pairs):
                raise InputError(
                    "data.latents=memory keeps only the projected tokens of images: set "
                    "align.target=projector and align.pairs=false, or leave data.latents out"
                )

    @property
    def image_share(self) -> float:
        """Share of a global batch that is conditioned on its image (see data/mixture.py)."""
        batch = self.train.global_batch
        return {"image": 1.0, "pair": 0.0, "mix": round(self.data.mix * batch) / batch}[
            self.train.data
        ]

    @property
    def align_share(self) -> float:
        """Share of a global batch that is aligned if align.weight is not 0."""
        return 1.0 if self.align.pairs else self.image_share

    @property
    def dtype(self) -> torch.dtype:
        """Type of working weights and activations."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def to_yaml(self) -> str:
        """Return all keys as YAML, which parse() reads back."""
        return yaml.safe_dump(as_plain(asdict(self)), sort_keys=False)


# Keys that a resumed run may change: they do not change what a step computes, except for rounding.
# Shards are compared by their content, which a checkpoint records (builders.data_facts).
FREE_KEYS = (
    "run.dir",
    "data.shards",
    "data.pairs",
    "cache.dir",
    "optim.adamw",
    "lora.shard_base",
    "zero.stage",
    "zero.reduce_precision",
    "zero.overlap_comm",
    "zero.reduce_bucket_size",
    "zero.allgather_bucket_size",
    "zero.prefetch_bucket_size",
    "zero.param_persistence_threshold",
    "zero.max_live_parameters",
    "zero.hpz_partition_size",
    "train.steps",
    "train.micro_batch",
    "train.overlap",
    "train.threads",
    "train.cpu_ranks",
    "train.compile",
    "train.recompute",
    "train.timeout_s",
    "data.upscale",
    "data.threads",
    "data.hw_decoder_load",
    "data.max_bad_fraction",
    "data.max_bad_shards",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "checkpoint.background",
    "checkpoint.mtbf_gpu_hours",
    "log.every_steps",
    "log.sample_images",
    "log.sample_steps",
    "log.wandb",
    "evaluate.every_steps",
    "evaluate.micro_batch",
    "evaluate.num_images",
    "evaluate.steps",
    "evaluate.guidance",
    "evaluate.prompts",
    "guard.max_skips",
    "guard.hang_s",
    "guard.lost_s",
    "profile.start_step",
    "profile.num_steps",
)


def load_config(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config of a file with "section.key=value" overrides.

    name: a path ending in .yaml, or the name of a file in engine/configs.

    Raises:
        InputError: the file is missing or wrong, in one line with file, line and key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise InputError(
            f"--config {name}: no such file. Give a path ending in .yaml or one of: {known}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from None
    return parse(text, str(path), overrides)


def parse(text: str, source: str = "config", overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config of a YAML text with overrides. Raises InputError, see load_config."""
    config = read(RunConfig, text, source, overrides)
    if config.precision != "auto":
        return config
    return replace(
        config, precision="bf16" if torch.cuda.is_available() or cpu_has_bf16() else "fp32"
    )


def as_plain(value: Any) -> Any:
    """Return nested dicts with lists in place of tuples."""
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def flat(config: RunConfig) -> dict[str, Any]:
    """Return {dotted key: value}."""
    rows = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for key, item in section.items():
            if isinstance(item, dict):
                walk(item, f"{prefix}{key}.")
            else:
                rows[prefix + key] = item

    walk(asdict(config), "")
    return rows


def differences(config: RunConfig, other: RunConfig) -> list[str]:
    """Return how `config` differs from `other`, as ["optim.lr: 0.0001 became 0.001"].

    FREE_KEYS are ignored.
    """
    mine, theirs = flat(config), flat(other)
    # A cosine schedule depends on the number of steps from the first step on.
    bound = {"train.steps"} if config.optim.schedule == "cosine" else set()
    return [
        f"{key}: {theirs[key]} became {mine[key]}"
        for key in mine
        if not same(mine[key], theirs[key]) and (key not in FREE_KEYS or key in bound)
    ]


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, or are spellings of one existing file or folder.

    `other` may be the place where a file or folder of the same name was, and is no longer. A
    relative name counts as the end of an absolute one, because a config.yaml of earlier versions
    has names relative to the folder in which the run was started.
    """
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    if os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other):
        return True
    names = [Path(os.path.normpath(name)) for name in (one, other)]
    if all(name.is_absolute() for name in names):
        # A folder that was moved since, with the run.
        return names[0].name == names[1].name and names[0].exists() > names[1].exists()
    absolute = [name for name in names if name.is_absolute()]
    relative = [name for name in names if not name.is_absolute() and ".." not in name.parts]
    return bool(
        absolute
        and relative
        and absolute[0].exists()
        and absolute[0].parts[-len(relative[0].parts) :] == relative[0].parts
    )
