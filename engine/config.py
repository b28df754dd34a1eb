"""RunConfig: one YAML file and dotted overrides, every key typed, checked once, named in every error.

The keys and what each means stand here; engine/config_parser.py reads them.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import yaml

from iomm.config import PRESETS, AdapterConfig, AlignConfig, InputError, MaskConfig, choice
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


def positive(key, value, least=1):
    if value < least:
        raise InputError(f"{key} must be >= {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    # Folder that the run writes; indexes and rendered data go to `shared/` beside it.
    dir: str = "runs/demo"
    # Seed of weights, data order, masks, times, noise, flips and dropped captions.
    seed: int = 0
    # Run folder to start from: loads its newest weights; all else is fresh.
    init: str | None = None
    # ema | raw: which weights of that run
    init_weights: str = "ema"

    def __post_init__(self):
        if not 0 <= self.seed < 2**64:
            raise InputError(f"run.seed must be >= 0 and below 2^64, got {self.seed}")
        choice("run.init_weights", self.init_weights, ("ema", "raw"))


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    # Shape of the generator: a name in PRESETS of iomm/config.py.
    preset: str = "iomm-b"
    # Folder or hub id of an InternVL; "shapes": the tiny one that ships with the package;
    # "random:internvl3-2b": random weights, for measuring speed.
    mllm: str = "shapes"
    # Commit of the hub checkpoint.
    mllm_revision: str | None = None
    # Folder or hub id of an AutoencoderKL; "shapes": the tiny one that ships with the package;
    # "pixel:<patch>": no VAE, one token is <patch> x <patch> pixels; "random:flux": random weights,
    # for measuring speed.
    vae: str = "pixel:4"
    # Side of the square of VAE latents that becomes one token of the generator.
    patch: int = 2
    # Sample latents from the VAE's posterior instead of taking its mean.
    vae_sample: bool = False

    def __post_init__(self):
        choice("model.preset", self.preset, tuple(PRESETS))
        positive("model.patch", self.patch)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    # images: tars, globs or folders, comma-separated; "shapes": the rendered dataset
    shards: str = "shapes"
    # text-image pairs, named like shards
    pairs: str | None = None
    # Share of images without text in every global batch of images and pairs.
    mix: float = 0.5
    # Folder written by `iomm cache`: read VAE latents instead of pixels. "memory": compute latents
    # and image tokens of every sample once at the start and keep them in memory.
    latents: str | None = None
    # Side of the square that is trained on; with buckets its area.
    size_px: int = 512
    # center | random: place of the square in the image
    crop: str = "center"
    # Crop near the image's own aspect ratio, at equal area, not to a square.
    buckets: bool = False
    # Mirror half of the images; never one with a caption.
    flip: bool = False
    # fp32 | bf16: pixels as they leave the decoder
    precision: str = "fp32"
    # torch | dali: who resizes on a CPU; torch is faster. On a GPU it is always DALI
    resize: str = "torch"
    # Images of the shapes dataset to render.
    num_images: int = 4096
    # Pairs of the shapes dataset to render; other pictures than those images.
    num_pairs: int = 500
    # Decoding threads per rank.
    threads: int = 2
    # Share of baseline JPEGs decoded by the GPU's JPEG engine.
    hw_decoder_load: float = 0.65
    # Images with a shorter edge below this are rejected.
    min_size_px: int = 32
    # Images with longer edge / shorter edge above this are rejected.
    max_aspect: float = 10.0
    # Images with more pixels are rejected; at the default one takes 256 MB to decode.
    max_pixels: int = 1 << 26
    # Share of samples that may turn out unreadable before the run stops.
    max_bad_fraction: float = 1e-4
    # Number of shards with such samples before the run stops.
    max_bad_shards: int = 5
    # images, and as many pairs, kept from training for evaluate.every_steps
    heldout: int = 0

    def __post_init__(self):
        positive("data.size_px", self.size_px, 16)
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
                "data.latents are those of centre crops as they are: set data.flip=false, data.crop=center and "
                "data.buckets=false, or leave data.latents out"
            )
        if self.latents not in (None, "memory") and self.pairs:
            raise InputError(
                "data.latents of `iomm cache` are of one set of images: set data.latents=memory, no data.pairs, or "
                "leave data.latents out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    # image | pair | mix: what a global batch holds; see data.mix
    data: str = "image"
    # Share of captions replaced by the empty prompt, for classifier-free guidance.
    caption_drop: float = 0.1
    # Times and noises drawn for each sample in a step: the generator runs on all of them, the
    # frozen encoders, the adapter and the MLLM run once. Above 1 goes beyond the paper.
    noise_draws: int = 1
    # Optimizer steps of the whole run.
    steps: int = 1000
    # Samples per optimizer step, over all ranks.
    global_batch: int = 1024
    # Samples per rank and forward pass; null: global_batch / ranks.
    micro_batch: int | None = None
    # torch CPU threads per rank; null: cores / ranks of this machine
    threads: int | None = None
    # Ranks of a run that is started as one rank on a machine without a GPU, lowered to a divisor of
    # global_batch; 0: one per core, with at least 4 images each.
    cpu_ranks: int = 1
    # A collective that takes longer ends the run.
    timeout_s: float = 1800.0
    # torch.compile every block; null: on a GPU only
    compile: bool | None = None
    # Encode the next micro-batch on a second CUDA stream while the generator works. Needs memory
    # for both; off until a GPU measurement shows that it pays.
    overlap: bool = False
    # Number of leading blocks that recompute activations in the backward pass.
    recompute: int = 0

    def __post_init__(self):
        choice("train.data", self.data, ("image", "pair", "mix"))
        if not 0 <= self.caption_drop <= 1:
            raise InputError(f"train.caption_drop must be between 0 and 1, got {self.caption_drop}")
        positive("train.noise_draws", self.noise_draws)
        positive("train.steps", self.steps)
        positive("train.global_batch", self.global_batch)
        positive("train.micro_batch", self.micro_batch if self.micro_batch is not None else 1)
        positive("train.threads", self.threads if self.threads is not None else 1)
        positive("train.cpu_ranks", self.cpu_ranks, 0)
        positive("train.timeout_s", self.timeout_s)
        positive("train.recompute", self.recompute, 0)

    def compiled(self, device):
        """Whether blocks are compiled on this device."""
        return device.type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True)
class TimeSection:
    # uniform | logit_normal: distribution of times between image (0) and noise (1)
    kind: str = "uniform"
    # Mean of the logit-normal distribution.
    mean: float = 0.0
    # Standard deviation of the logit-normal distribution.
    std: float = 1.0
    # Resolution shift; above 1 moves times towards noise.
    shift: float = 1.0

    def __post_init__(self):
        choice("time.kind", self.kind, TIME_KINDS)
        if not (self.std > 0 and self.shift > 0):
            raise InputError(
                f"time.std and time.shift must be > 0, got {self.std} and {self.shift}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    # adamw | muon: Muon for the matrices of layers, AdamW for everything else
    kind: str = "adamw"
    # torch | apex: implementation of AdamW's update: torch's fused kernel or NVIDIA apex's FusedAdam. They agree to
    # float32 rounding. The rows `adamw` of `python benchmarks/ops.py --gpu` compare their speed.
    adamw: str = "torch"
    # Peak learning rate
    lr: float = 1e-4
    # AdamW's betas
    betas: tuple[float, float] = (0.9, 0.95)
    # AdamW's epsilon
    eps: float = 1e-8
    # Decoupled weight decay, of AdamW and Muon.
    weight_decay: float = 0.0
    # Largest global gradient norm; 0 turns clipping off.
    clip: float = 1.0
    # Steps in which the learning rate rises linearly.
    warmup_steps: int = 1000
    # constant | cosine: after the warm-up; cosine reaches 0 at train.steps
    schedule: str = "constant"
    # Muon's Nesterov momentum
    momentum: float = 0.95
    # of Muon's orthogonalisation; 3 cost 40 % less and leave small singular values smaller
    newton_schulz_steps: int = 5

    def __post_init__(self):
        choice("optim.kind", self.kind, ("adamw", "muon"))
        # Checkpoints of earlier versions may hold it; torch's update is the same to float32 rounding.
        if self.adamw == "deepspeed":
            object.__setattr__(self, "adamw", "torch")
        choice("optim.adamw", self.adamw, ("torch", "apex"))
        choice("optim.schedule", self.schedule, ("constant", "cosine"))
        if not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            raise InputError(
                f"optim.betas and optim.momentum must be in [0, 1), got {self.betas} and {self.momentum}"
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
    # Decay of the moving average of the weights; 0 turns the average off.
    decay: float = 0.999

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class ZeroSection:
    """What is split over the ranks and how it travels. Sizes are numbers of values, not bytes.

    DeepSpeed's quantised weights and gradients (ZeRO++) have no key: they need kernels compiled at the start and change
    what is computed.
    """

    # 0 splits nothing; 1 splits masters and moments; 2 also gradients; 3 also weights
    stage: int = 3
    # bf16 | fp32: type in which gradients are summed over ranks. bf16 sends half the bytes; take fp32 with hundreds of
    # ranks, where sums get long. Accumulation over micro-batches is fp32 in any case.
    reduce_precision: str = "bf16"
    # stages 2 and 3: send gradients during the backward pass; null: on a GPU only
    overlap_comm: bool | None = None
    # Stages 1 to 3: size of a gradient message. IOMM-XL's largest block has 181 M, so blocks leave one by one; at 0.4
    # GB a message still runs at link speed, and the last one, which nothing hides, is 1/34 of all. DeepSpeed's default
    # of 500 M would hold 8 blocks of IOMM-B.
    reduce_bucket_size: int = 200_000_000
    # stages 1 and 2: weights gathered at once after a step; DeepSpeed's default
    allgather_bucket_size: int = 500_000_000
    # stage 3: weights prefetched; room for IOMM-XL's next block of 181 M
    prefetch_bucket_size: int = 200_000_000
    # Stage 3: parameters up to this size stay gathered, each with a message of its own after every step. 0, since
    # blocks are gathered whole, norms and biases included. At 50,000 IOMM-B would send 280 such messages: over 5 % of a
    # step from 64 GPUs on (computed by benchmarks/budget.py).
    param_persistence_threshold: int = 0
    # Stage 3: weights gathered at a time, 2 GB in bf16. As many of the last blocks are kept from the forward to the
    # backward pass instead of being gathered twice: 1 G of IOMM-B's 1.6 G. Lower it when memory runs out.
    max_live_parameters: int = 1_000_000_000
    # Stage 3: number of ranks that together hold a second copy of the weights for the backward pass. Set it to the GPUs
    # of one machine (8) to keep backward gathers off the network; costs 2 / 8 bytes per weight and GPU. 1: no second
    # copy.
    hpz_partition_size: int = 1

    def __post_init__(self):
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
                f"zero.hpz_partition_size is for zero.stage 3 alone, got stage {self.stage}: leave it out"
            )

    def check_ranks(self, ranks):
        """Raises InputError if the weights' second copies cannot be shared out to so many ranks."""
        if ranks % self.hpz_partition_size:
            raise InputError(
                f"zero.hpz_partition_size must divide the number of ranks, got {self.hpz_partition_size} and "
                f"{ranks}: give the number of GPUs of one machine, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    # Steps between checkpoints; the last step always has one.
    every_steps: int = 1000
    # Newest checkpoints to keep; at least 2, in case one goes bad on the disk.
    keep: int = 3
    # Also keep every checkpoint at a multiple of this for good; 0: none.
    keep_every_steps: int = 0
    # Training waits only for the copy to memory; false: until it is on the disk.
    background: bool = True
    # mean GPU-hours between faults, used for the interval that a run recommends at its end
    mtbf_gpu_hours: float = 20_000.0

    def __post_init__(self):
        positive("checkpoint.every_steps", self.every_steps)
        positive("checkpoint.keep", self.keep, 2)
        positive("checkpoint.keep_every_steps", self.keep_every_steps, 0)
        positive("checkpoint.mtbf_gpu_hours", self.mtbf_gpu_hours)


@dataclass(frozen=True, kw_only=True)
class LogSection:
    # Steps between lines on the terminal; log.jsonl has every step.
    every_steps: int = 10
    # Images in the grid sampled at the end; on the shapes dataset samples are scored too; 0:
    # neither.
    sample_images: int = 16
    # Euler steps of that grid.
    sample_steps: int = 20
    # Log to Weights & Biases too; project and name are the last two folders of run.dir.
    wandb: bool = False

    def __post_init__(self):
        positive("log.every_steps", self.every_steps)
        positive("log.sample_images", self.sample_images, 0)
        positive("log.sample_steps", self.sample_steps)


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    # Steps between evaluations (held-out loss and a grid); the last step has one too; 0: never.
    every_steps: int = 0
    # held-out samples, or sampled images, per rank and pass
    micro_batch: int = 16
    # Images in the grid; 0: none.
    num_images: int = 16
    # Euler steps of each image.
    steps: int = 20
    # For images from prompts; above 1 needs a run that dropped captions.
    guidance: float = 1.0
    # Separated by "|", used in turn; null: held-out captions, or masked images without pairs.
    prompts: str | None = None

    def __post_init__(self):
        positive("evaluate.every_steps", self.every_steps, 0)
        positive("evaluate.micro_batch", self.micro_batch)
        positive("evaluate.num_images", self.num_images, 0)
        positive("evaluate.steps", self.steps)
        positive("evaluate.guidance", self.guidance, 0)


@dataclass(frozen=True, kw_only=True)
class GuardSection:
    # Consecutive skipped steps after which the run stops.
    max_skips: int = 5
    # Robust standard deviations above the median from which a loss counts as a spike.
    spike_sigmas: float = 6.0
    # Skip the update of such a step; costs a wait for the GPU in every step.
    skip_spikes: bool = False
    # A step that takes longer is a hang and ends the run; 0: no limit.
    hang_s: float = 600.0

    def __post_init__(self):
        positive("guard.max_skips", self.max_skips, 0)
        positive("guard.spike_sigmas", self.spike_sigmas)
        positive("guard.hang_s", self.hang_s, 0)


@dataclass(frozen=True, kw_only=True)
class ProfileSection:
    # First step that --profile traces, counted from the start of this process.
    start_step: int = 20
    # Steps in the trace.
    num_steps: int = 3

    def __post_init__(self):
        positive("profile.start_step", self.start_step)
        positive("profile.num_steps", self.num_steps)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is made of. A run is a pure function of this and of its data."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    mask: MaskConfig = field(default_factory=MaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    time: TimeSection = field(default_factory=TimeSection)
    optim: OptimSection = field(default_factory=OptimSection)
    ema: EmaSection = field(default_factory=EmaSection)
    # bf16 | fp32 | fp8 | auto: arithmetic; masters are always fp32. fp8: bf16, but the matrix
    # products of the generator's blocks in fp8; its loss has not been compared with bf16 on a GPU
    # yet. auto: bf16 where this machine multiplies it faster than fp32, else fp32
    precision: str = "bf16"
    zero: ZeroSection = field(default_factory=ZeroSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    guard: GuardSection = field(default_factory=GuardSection)
    profile: ProfileSection = field(default_factory=ProfileSection)

    def __post_init__(self):
        choice("precision", self.precision, ("auto", "bf16", "fp32", "fp8"))
        if self.data.latents and self.model.vae_sample:
            raise InputError(
                "data.latents hold the VAE's mean: set model.vae_sample=false, or leave data.latents out"
            )
        if self.data.latents not in (None, "memory") and self.train.data != "image":
            raise InputError(
                f"data.latents are of images, train.data is {self.train.data}: set train.data=image or "
                "data.latents=memory, or leave data.latents out"
            )
        if self.align.weight:
            self.align.block_in(PRESETS[self.model.preset].depth)
            if not self.align_share:
                raise InputError(
                    f"align.weight is {self.align.weight:g}, but no sample of this run is conditioned on "
                    "its image: set align.pairs=true to align pairs, or align.weight=0"
                )
            if self.data.latents == "memory" and (self.align.target == "vit" or self.align.pairs):
                raise InputError(
                    "data.latents=memory keeps the image tokens of images alone: set align.target=projector and "
                    "align.pairs=false, or leave data.latents out"
                )

    @property
    def image_share(self) -> float:
        """Share of a global batch's samples that are conditioned on their image, as engine/data/mixture.py fills it."""
        batch = self.train.global_batch
        return {"image": 1.0, "pair": 0.0, "mix": round(self.data.mix * batch) / batch}[
            self.train.data
        ]

    @property
    def align_share(self) -> float:
        """Share of a global batch's samples that are aligned, where align.weight is not 0."""
        return 1.0 if self.align.pairs else self.image_share

    @property
    def dtype(self):
        """Of working weights and of what lies between products."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def to_yaml(self):
        return yaml.safe_dump(as_plain(asdict(self)), sort_keys=False)


# A resumed run may change these: none of them changes what is computed in a step, rounding apart.
FREE_KEYS = (
    "run.dir",
    "optim.adamw",
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
    "profile.start_step",
    "profile.num_steps",
)


def load_config(name, overrides=()):
    """Config file (path, or name of one in engine/configs) and "a.b=value" overrides -> RunConfig."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise InputError(
            f"--config {name}: no such file; give a path ending in .yaml or one of: {known}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from None
    return parse(text, str(path), overrides)


def parse(text, source="config", overrides=()):
    """YAML text and overrides -> RunConfig. Raises InputError with file, line and key."""
    config = read(RunConfig, text, source, overrides)
    if config.precision != "auto":
        return config
    return replace(
        config, precision="bf16" if torch.cuda.is_available() or cpu_has_bf16() else "fp32"
    )


def as_plain(value):
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def flat(config):
    """RunConfig -> {dotted key: value}."""
    rows = {}

    def walk(value, prefix):
        for key, item in value.items():
            walk(item, f"{prefix}{key}.") if isinstance(item, dict) else rows.update(
                {prefix + key: item}
            )

    walk(asdict(config), "")
    return rows


def differences(config, other):
    """Dotted keys, FREE_KEYS excepted, in which two configs differ: ["optim.lr: 0.0001 became 0.001"]."""
    mine, theirs = flat(config), flat(other)
    # There the last step shapes every step.
    bound = {"train.steps"} if config.optim.schedule == "cosine" else set()
    return [
        f"{key}: {theirs[key]} became {mine[key]}"
        for key in mine
        if mine[key] != theirs[key] and (key not in FREE_KEYS or key in bound)
    ]
