"""One run of `prosparse sparsify`, from the model and text to the folder that is written."""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from prosparse import __version__
from prosparse.formats import adapter, open_model
from prosparse.formats.files import written_whole
from prosparse.formats.hf import write_folder
from prosparse.model.activation import Activation
from prosparse.model.adapter import ATTENTION, FFN, ROUNDING, Adapter, apply, change, kind_of, parse_ranks
from prosparse.model.fold import unfold_thresholds
from prosparse.model.model import Model
from prosparse.sparsify import budget, coded, hf_model, lora, progress, report, selfdata, settings, tokens
from prosparse.sparsify.batches import Mixture
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.corpus import Source
from prosparse.sparsify.distributed import World
from prosparse.sparsify.hf_model import Trunk
from prosparse.sparsify.loggers import open_loggers
from prosparse.sparsify.presets import Preset
from prosparse.sparsify.settings import Reading
from prosparse.sparsify.tokens import TokenStore
from prosparse.sparsify.trainer import Feed, Trainer

_SAMPLED_AT_ONCE = 1024  # rows of self-generated text, on a GPU


class Session:
    """Everything that can be wrong is said when it is made; `run` takes the hours."""

    def __init__(
        self,
        args: argparse.Namespace,
        preset: Preset | None,
        reads: Sequence[Reading],
        world: World,
        device: torch.device,
    ) -> None:
        self.args, self.preset, self.world, self.device = args, preset, world, device
        self.folder: Path = args.out
        self.original = open_model(args.model)
        self.grid = None if args.codes is None else adapter.read(args.codes)
        self.start, self.start_thresholds = self._start()
        self.ranks = None if args.lora is None else parse_ranks(args.lora)
        self.levels = None if args.levels is None else coded.parse_levels(args.levels)
        if self.levels and world.sharded:
            raise ValueError("changes of --levels cannot be spread over processes: leave --shard out")
        if self.grid and (world.sharded or args.start or args.control):
            raise ValueError("--codes does not go with --shard, --from (they are a start) or --control")
        if args.size is not None and self.grid is None:
            raise ValueError("--size is of the adapter that --codes trains: give one, or leave it out")
        self.limit = budget.limit(self.grid, args.size) if self.grid else 0
        size = self.original.config
        if preset:
            preset.check_model(size.hidden_size, size.num_hidden_layers)
        self.config = settings.train_config(
            args,
            preset,
            reads,
            bfloat16=device.type == "cuda",
            processes=world.size,
            thresholds=bool(self.start_thresholds),
        )
        self.settings = self._described()
        settings.check_same(self.folder / "training.json", self.settings)
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        world.wait()
        self._check_space()
        self.loggers = open_loggers(args.log, self.folder, self.settings) if world.is_main else []
        self.encoder = tokens.Encoder(self.original.tokenizer, size.bos_token_id, size.eos_token_ids)
        self.teacher: Trunk | None = None
        self.feeds = self._feeds(reads)

    def run(self) -> dict[str, Any]:
        """Trains and writes `model/`, `training.json`, `metrics.jsonl`, `report.json` and their curves."""
        args, bfloat16 = self.args, self.config.bfloat16
        student = self._student()
        if self.config.mix.taught and self.teacher is None:
            self.teacher = self._load_teacher()
        kept = None
        if self.grid is not None:
            kept = budget.Budget(student, self.grid, self.limit, self.world)
        trainer = Trainer(student, self.teacher, self.feeds, self.config, self.folder, self.world, kept)
        if self.world.is_main:
            with written_whole(self.folder / "training.json") as file:
                file.write(json.dumps(self.settings, indent=1).encode() + b"\n")
        last = progress.train(trainer, self.original.config, self.loggers, lora=args.lora is not None)
        held = report.held_out([feed.mixture for feed in self.feeds])
        micro = self.config.micro_sequences
        sparse = report.measured(student, held, micro, bfloat16)
        thresholds = [float(mlp.threshold) for mlp in student.mlps]
        activation, made = self._export(student, self.folder)
        del trainer, student
        if self.teacher is None:
            self.teacher = self._load_teacher()
        original = report.measured(self.teacher, held, micro, bfloat16)
        control, control_is = self._control(held)
        result = report.make(original, control, sparse, control_is, thresholds)
        if self.world.is_main:
            if made is not None:
                made = replace(made, measured={**result.summary(), "tokens": last["tokens"]})
                adapter.write(self.folder / "adapter.gguf", made)
                self._say(f"{self.folder / 'adapter.gguf'}: {made.size_bytes / 1e6:.2f} MB")
            self._show(result, activation, last)
        return {
            "model": str(self.folder / "model"),
            "hidden_act": activation.name,
            "hidden_act_param": activation.param,
            **{key: last[key] for key in ("step", "tokens", "loss", "next_token", "kl", "sparsity")},
            "report": result.to_json(),
        }

    def _described(self) -> dict[str, Any]:
        args = self.args
        cuda = self.device.type == "cuda"
        return {
            "prosparse": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else str(self.device),
            "processes": self.world.size,
            "model": str(args.model),
            "start": args.start and str(args.start),
            "data": args.data,
            "decay_data": args.decay_data,
            "sft_data": args.sft_data,
            "self_data": args.self_data,
            "self_prompts": args.self_prompts,
            "preset": args.preset,
            "seed": args.seed,
            "context": args.context,
            "batch_tokens": args.batch_tokens,
            "held_out": args.held_out,
            "lora": args.lora,
            "levels": args.levels,
            "codes": args.codes and str(args.codes),
            "size": args.size,
            "keep_embeddings": args.keep_embeddings,
            "config": asdict(self.config),
        }

    def _check_space(self) -> None:
        parameters = sum(math.prod(tensor.shape) for tensor in self.original.tensors.values())
        # adapters and their state are small beside the model that is written
        trained = 0 if self.args.lora is not None else parameters
        settings.check_space(shutil.disk_usage(self.folder).free, trained, parameters)

    def _start(self) -> tuple[Model, list[float]]:
        """The model whose weights training starts with, that of --from or the original, and its thresholds if
        it has any."""
        source = self.args.start if self.grid is None else self.args.codes
        if source is None:
            return self.original, []
        start = open_model(source) if self.grid is None else apply(self.original, self.grid)
        before = start.config.activation
        alike = replace(start.config, activation=self.original.config.activation)
        if alike != self.original.config:
            raise ValueError(f"{source} has another shape than {self.args.model}: it was not made of it")
        if before.name not in ("fatrelu", "relu", self.original.config.activation.name):
            raise ValueError(f"{source} is a {before.name} model: training takes fatrelu and relu")
        if before.name != "fatrelu":
            return start, []
        if self.preset or self.args.l1:
            raise ValueError(f"{source} has thresholds, which only --target goes on with")
        if self.grid is None:
            return unfold_thresholds(start, self.original)
        gates = (f"model.layers.{i}.mlp.gate_proj.weight" for i in range(start.config.num_hidden_layers))
        return start, [before.param / self.grid.matrices[gate].scale for gate in gates]

    def _student(self) -> Trunk:
        if self.config.control:
            student = self._trainable(self.start, Activation("fatrelu", 0.0))
            for mlp, threshold in zip(student.mlps, self.start_thresholds, strict=False):
                mlp.threshold.fill_(threshold)
            return student
        shift = self.preset.shift if self.preset else None
        return self._trainable(self.start, Activation("shiftrelu", shift) if shift else Activation("relu"))

    def _trainable(self, start: Model, activation: Activation) -> Trunk:
        """A model that trains from the weights of `start`: itself, or adapters of the original."""
        whole = self.ranks is None and self.levels is None and self.grid is None
        base = start if whole else self.original
        changed = replace(base, config=replace(base.config, activation=activation))
        trunk = hf_model.load(changed, device=self.device)
        if self.args.keep_embeddings:
            trunk.freeze_embeddings()
        if self.levels is not None:
            self._tell_what_is_lost(start, {*FFN, *ATTENTION} - self.levels.keys())
            coded.add(trunk, self.levels, start)
        if self.grid is not None:
            coded.add_grid(trunk, self.grid, self.original.config)
        if self.ranks is not None:
            torch.manual_seed(self.args.seed)
            lora.add(trunk, self.ranks)
            if start is not self.original:
                self._tell_what_is_lost(start)
                lora.start_at(trunk, start)
        return trunk

    def _tell_what_is_lost(self, start: Model, kinds: Collection[str] = ()) -> None:
        """Of `start`, where embeddings, and matrices of `kinds`, stay the original's."""
        if start is self.original:
            return
        losses = {"adapters leave embeddings alone": change(self.original, start)}
        names = [name for name in start.tensors if kind_of(name) in kinds]
        losses[f"{', '.join(sorted(kinds))} have 0 levels"] = change(self.original, start, names)
        for why, lost in losses.items():
            if lost > ROUNDING:
                self._say(f"{self.args.start}: {why}, a change of {lost:.1%} is lost")

    def _load_teacher(self) -> Trunk:
        dtype = torch.bfloat16 if self.config.bfloat16 else torch.float32
        return hf_model.load(self.original, device=self.device, dtype=dtype)

    def _feeds(self, reads: Sequence[Reading]) -> list[Feed]:
        stores: dict[str, TokenStore] = {}
        extra = self._self_source()
        feeds = []
        for read in reads:
            # instructions alone are an SFT stage; what the original writes is text
            is_sft = self.preset is not None and read is reads[-1] and len(reads) > 1
            sources = read.sources if is_sft or extra is None else (*read.sources, extra)
            for source in read.sources:
                if source.path not in stores:
                    stores[source.path] = self._store(source)
            if extra in sources and extra.path not in stores:
                given = [(stores[source.path], source.weight) for source in read.sources]
                stores[extra.path] = self._self_store(extra, given)
            mixture = Mixture(
                [stores[source.path] for source in sources],
                [source.weight for source in sources],
                context=self.args.context,
                seed=self.args.seed,
                vocab_size=self.original.config.vocab_size,
                held_out=self.args.held_out,
                noise=self.config.noise,
            )
            feeds.append(Feed(mixture, read.sequences, read.until))
        return feeds

    def _store(self, source: Source) -> TokenStore:
        """Tokenised by the main process; the others wait, then map what it wrote."""

        def show(rows: int, count: int) -> None:
            if sys.stderr.isatty():
                print(f"\r{source.path}: {rows} rows, {count / 1e6:.1f} M tokens", end="", file=sys.stderr)

        def build() -> TokenStore:
            cache = self.folder / "tokens"
            return tokens.build(source.path, self.encoder, cache, workers=self.args.workers, progress=show)

        store = self._first_here(build)
        self._say(f"{source.path}: {len(store.offsets) - 1} rows, {len(store.tokens) / 1e6:.1f} M tokens")
        return store

    def _self_source(self) -> Source | None:
        if not self.args.self_data:
            return None
        count, _, weight = self.args.self_data.partition(":")
        try:
            return Source(f"self:{int(float(count))}", float(weight or 1))
        except ValueError:
            raise ValueError(f"--self-data is N or N:WEIGHT, not {self.args.self_data!r}") from None

    def _self_store(self, source: Source, given: Sequence[tuple[TokenStore, float]]) -> TokenStore:
        """Text of the original, a share of which goes on from that of the stores that are `given`."""
        count, share = int(source.path.removeprefix("self:")), self.args.self_prompts
        prompts = None
        if share:
            prompts = selfdata.Prompts([store for store, _ in given], [weight for _, weight in given], share)

        def show(done: int, of_all: int) -> None:
            self._say(f"self-generated text: {done / 1e6:.1f} of {of_all / 1e6:.1f} M tokens")

        def build() -> TokenStore:
            if self.teacher is None:
                self.teacher = self._load_teacher()
            return selfdata.build(
                self.teacher,
                self.encoder,
                count,
                self.folder / "tokens",
                # one more than a sequence, whose last target it is
                context=self.args.context + 1,
                batch=_SAMPLED_AT_ONCE if self.device.type == "cuda" else 64,
                seed=self.args.seed,
                prompts=prompts,
                key=f"{Path(str(self.args.model)).name} {_fingerprint(self.original)}",
                progress=show,
            )

        return self._first_here(build)

    def _first_here(self, build: Any) -> TokenStore:
        """`build` by the main process, then by the others, which find what it wrote."""
        if self.world.is_main:
            store = build()
            self.world.wait()
        else:
            self.world.wait()
            store = build()
        return store

    def _export(self, student: Trunk, folder: Path) -> tuple[Activation, Adapter | None]:
        """The trained weights as a Hugging Face folder, and the adapter of codes that trained, named as what
        they began with. Gathering weights takes all processes."""
        kind = self.args.type.upper()
        model = hf_model.to_model(student, self.original, kind)
        made = None
        if self.world.is_main:
            write_folder(folder / "model", model, kind)
            if self.grid is not None:
                made = hf_model.to_adapter(student, self.original, model)
                made = replace(made, name=self.grid.name, license=self.grid.license)
        self.world.wait()
        return model.config.activation, made

    def _control(self, held: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The un-sparsified twin on the same tokens, measured; and what it is."""
        if not self.config.mix.next_token:
            return None, "the original: it is all that pure distillation could arrive at"
        if not self.args.control:
            return None, "missing: --control trains it"
        self._say("control: the un-sparsified twin, on the same tokens")
        twin = self._trainable(self.original, self.original.config.activation)
        config: TrainConfig = replace(self.config, schedule=None, control=None)
        trainer = Trainer(twin, self.teacher, self.feeds, config, self.folder / "control", self.world)
        progress.train(trainer, self.original.config, [], lora=self.args.lora is not None)
        self._export(twin, trainer.folder)
        return (
            report.measured(twin, held, config.micro_sequences, config.bfloat16),
            "the original, trained on the same tokens with the same losses",
        )

    def _show(self, result: report.Report, activation: Activation, last: dict[str, Any]) -> None:
        report.write(result, self.folder)
        progress.plot(self.folder)
        act = f"{activation.name} {activation.param:g}"
        trained = f"sparsity {last['sparsity']:.1%} after {last['tokens'] / 1e6:.1f} M tokens"
        print(f"{self.folder / 'model'}: {act}, {trained}")
        if result.rows:
            print(result.table())
        else:
            print("no report: the data is too small to spare held-out text")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def _fingerprint(model: Model) -> str:
    """Changes with the weights: of every tensor, some bytes from all over it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.tensors.items()):
        flat = tensor.data.reshape(-1)
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 4096)].tobytes())
    return digest.hexdigest()[:8]
