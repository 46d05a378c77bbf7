"""Pretraining in stages: one run per stage, each continuing from the one before it.

The folder of a staged run holds `stage-1`, `stage-2`, ..., which are run folders, and the results
of all stages: the encoder of the latest stage, `forgetting.json`, `.md` and `.png`.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from rich.console import Console

from clsa.evaluate.features.split import MIN_LABELLED, Split, split, without_held_out_labels
from clsa.learning.clustering import require_faiss
from clsa.learning.models import build_encoder
from clsa.methods import METHODS
from clsa.methods.wrappers.continual import Continual
from clsa.methods.wrappers.wrapper import innermost, key_network_of
from clsa.options.run import RunOptions
from clsa.pictures import opening
from clsa.pictures.sources import Source, joined
from clsa.runs import checkpoint, saved_encoder
from clsa.runs.folder import RunFolder
from clsa.runs.state import State
from clsa.system import dist, files, ranks
from clsa.system.errors import ClsaError, Exit
from clsa.training import forgetting, start
from clsa.training.exemplars import choose_exemplars
from clsa.training.forgetting import Forgetting
from clsa.training.setup import Setting, set_out
from clsa.views import rng

STAGE_BITS = 40  # above the seeds that people choose, so no stage has the same draws as another run


def pretrain(options: RunOptions) -> Path:
    """Start or resume the run in `options`, in stages if it has any; returns the folder.

    Raises:
        ClsaError: as `start.pretrain`.
    """
    if not options.stages:
        return start.pretrain(options)
    with set_out(options, open_stages) as (sources, setting):
        run_stages(options, sources, setting)
    return options.out


def open_stages(options: RunOptions) -> list[Source]:
    """The pictures of each stage, once the options are known to suit a run in stages.

    Raises:
        ClsaError: as `stage_sources`; for a method or an option that stages do not allow.
    """
    if METHODS[options.method.name].holds_pictures:
        why = f"{options.method.name} keeps a row for each picture of one set"
        raise ClsaError("stages", why, "choose another recipe, such as continual-small")
    if options.accept_data_change:
        why = "what a stage has learned cannot be separated from its earlier pictures"
        raise ClsaError("--accept-data-change", why, "restore the pictures, or start a new run")
    if options.continual.keep != "nothing":
        require_faiss()
    return stage_sources(options)


def run_stages(options: RunOptions, sources: list[Source], setting: Setting) -> None:
    """Train the stages that are not finished, one after the other, and evaluate each."""
    if dist.rank() == 0:
        RunFolder(options.out).claim(options, setting.computing)
    parts = labelled_parts(sources, options)
    stages = [Stage(options, number + 1, len(sources)) for number in range(len(sources))]
    if dist.rank() == 0 and all(stage.is_finished() for stage in stages):
        print("nothing was to be done: all stages are finished", file=sys.stderr)
    for stage in stages:
        finished = stage.run(sources, setting)
        if not finished:
            break
        with ranks.first_alone():
            if dist.rank() == 0:
                stage.judge(parts, setting.device)
    if dist.rank() == 0 and (options.out / "forgetting.json").exists():
        Console().print(forgetting.printed(read_forgetting(options.out)))


def stage_seed(seed: int, number: int) -> int:
    """Seed of a stage; the first stage has the seed of the run."""
    return (seed + ((number - 1) << STAGE_BITS)) % (1 << 62)


def stage_sources(options: RunOptions) -> list[Source]:
    """The pictures of each stage; all with the same classes.

    `classes:N` splits the classes of --data, in an order drawn from the seed, into N groups whose
    sizes differ by at most one; pictures without a label are in no group.

    Raises:
        ClsaError: for a stage that cannot be opened, or more groups than classes.
    """
    form = re.fullmatch(r"classes:(\d+)", options.stages[0])
    if form is None or len(options.stages) > 1:
        return _sets(options)
    source, count = opening.open_source(options.data.data, "train", options.data), int(form[1])
    present = np.unique(source.labels[source.labels >= 0])
    if not 1 <= count <= len(present):
        why = f"the pictures have {len(present)} classes"
        raise ClsaError(f"stages classes:{count}", why, "use at most one stage per class")
    order = rng.permutation(options.seed, 0, len(present), rng.STAGES)
    groups = np.array_split(present[order], count)
    left_out = int((source.labels < 0).sum())
    if left_out and dist.rank() == 0:
        print(f"{left_out} pictures without a label are in no stage", file=sys.stderr)
    return [source.subset(np.flatnonzero(np.isin(source.labels, group))) for group in groups]


def _sets(options: RunOptions) -> list[Source]:
    wrong = [spec for spec in options.stages if spec.startswith("classes:")]
    if wrong:
        hint = "give classes:N alone, with N a number, or several sets"
        raise ClsaError(f"stages {wrong[0]}", "not a valid way to split one set", hint)
    sources = [
        opening.open_source(spec, "train", options.data.model_copy(update={"data": spec}))
        for spec in options.stages
    ]
    classes = sorted({name for source in sources for name in source.classes})
    return [source.with_classes(classes) if classes else source for source in sources]


def labelled_parts(sources: list[Source], options: RunOptions) -> list[Split] | None:
    """The pictures to evaluate each stage on; None, with a note, if a stage has too few labels.

    If there are evaluation pictures (`--val`, or the set's own), the queries are those of the
    stage's classes; else the fifth of its labelled pictures that `split` holds out.
    """
    has_val = opening.val_of(options.data)
    val = opening.open_val(options.data, sources[0].classes) if has_val else None
    parts = []
    for source in sources:
        own = np.unique(source.labels[source.labels >= 0])
        shown = None if val is None else val.subset(np.flatnonzero(np.isin(val.labels, own)))
        too_few = (source.labels >= 0).sum() < MIN_LABELLED or (
            shown is not None and not len(shown)
        )
        if too_few:
            if dist.rank() == 0:
                print("no forgetting matrix: a stage has too few labels", file=sys.stderr)
            return None
        parts.append(split(source, shown, seed=0))
    return parts


def _wait(device: torch.device) -> None:
    """Wait until every process is here: then all may read what one has written."""
    dist.all_max(torch.zeros(1, device=device))


def read_forgetting(out: Path) -> Forgetting:
    """Read `forgetting.json` of a staged run; empty if there is no readable one."""
    try:
        facts = json.loads((out / "forgetting.json").read_text("utf-8"))
        return Forgetting(*(facts[name] for name in Forgetting._fields))
    except (OSError, ValueError, LookupError, TypeError):
        return Forgetting([], [], [], [])


class Stage:
    """One stage of a run.

    Args:
        options: of the whole run.
        number: of this stage, from 1.
        count: number of stages.
    """

    def __init__(self, options: RunOptions, number: int, count: int):
        self.whole, self.number, self.count = options, number, count
        self.keeps = options.continual.keep != "nothing"
        out = options.out / f"stage-{number}"
        self.options = options.model_copy(
            update={"out": out, "seed": stage_seed(options.seed, number)}
        )
        self.folder = RunFolder(out)

    def before(self) -> "Stage":
        """The stage before this one."""
        return Stage(self.whole, self.number - 1, self.count)

    @property
    def exemplars_file(self) -> Path:
        """File with the numbers of the kept pictures."""
        return self.options.out / "exemplars.json"

    def is_trained(self) -> bool:
        """Whether its training is finished."""
        try:
            return json.loads(self.folder.status_file.read_text("utf-8"))["reason"] == "finished"
        except (OSError, ValueError, LookupError):
            return False

    def is_finished(self) -> bool:
        """Whether its training is finished and, if needed, its exemplars are chosen."""
        chosen = self.exemplars_file.exists() or not self.keeps or self.number == self.count
        return self.is_trained() and chosen

    def run(self, sources: list[Source], setting: Setting) -> bool:
        """Train or resume the stage, and choose exemplars; returns whether training finished."""
        source, shown = sources[self.number - 1], sources
        if not opening.val_of(self.options.data):  # evaluation holds out some of each stage
            shown = [without_held_out_labels(each) for each in sources]
        kept = [
            shown[place].subset(Stage(self.whole, place + 1, self.count).read_exemplars())
            for place in range(self.number - 1 if self.keeps else 0)
        ]
        num_exemplars = sum(map(len, kept))
        name = f"stage {self.number} of {self.count}"
        if self.is_finished():
            self._say(f"{name}: already done")
            self._publish()
            return True
        extra = f", {num_exemplars} exemplars" if num_exemplars else ""
        self._say(f"{name}: {len(source)} pictures{extra}")
        self.folder.check(self.options)
        pictures = joined([shown[self.number - 1], *kept])
        state = start.train(self.options, pictures, setting, self.begin, num_exemplars)
        _wait(setting.device)  # for the status that rank 0 writes at the end
        done = self.is_trained()
        if done and self.keeps and self.number < self.count:
            self._keep(state, source, setting.device)
        self._publish()
        return done

    def _publish(self) -> None:
        """Update the whole run: this stage's encoder, metrics of all stages, the status."""
        later = [Stage(self.whole, n, self.count) for n in range(self.number + 1, self.count + 1)]
        if dist.rank() or any(stage.is_trained() for stage in later):
            return
        encoder, facts = saved_encoder.load_encoder_facts(self.options.out)
        whole = RunFolder(self.whole.out)
        begun = {"seed": self.whole.seed}  # of the random encoder it is compared with
        saved_encoder.save_encoder(whole.encoder, encoder, facts.model_copy(update=begun))
        lines, steps = [], 0
        for number in range(1, self.number + 1):
            folder = Stage(self.whole, number, self.count).folder
            for line in folder.metrics.read_text("utf-8").splitlines():
                values = json.loads(line)
                lines.append(
                    json.dumps({**values, "step": values["step"] + steps, "stage": number})
                )
            steps += json.loads(folder.status_file.read_text("utf-8"))["step"]
        files.write_text(whole.metrics, "".join(line + "\n" for line in lines))
        ended = self.number == self.count and self.is_trained()
        reason = "finished" if ended else f"stage {self.number} of {self.count} ended"
        whole.write_status(Exit.OK, reason, steps, not ended)

    def _say(self, text: str) -> None:
        if dist.rank() == 0:
            print(text, file=sys.stderr, flush=True)

    def read_exemplars(self) -> Int64[np.ndarray, " m"]:
        """Numbers of the kept pictures, counted in the set of this stage."""
        facts = json.loads(self.exemplars_file.read_text("utf-8"))
        return np.array(facts["numbers"], np.int64)

    def _keep(self, state: State, source: Source, device: torch.device) -> None:
        known = len(np.unique(source.labels[source.labels >= 0]))
        clusters = self.options.continual.clusters or known or 10
        with ranks.first_alone():
            if dist.rank() == 0:
                network = state.method.network
                numbers = choose_exemplars(network, source, self.options, clusters, device)
                names = [source.ids[i] for i in numbers.tolist()]
                facts = {"numbers": numbers.tolist(), "names": names}
                files.write_text(self.exemplars_file, json.dumps(facts) + "\n")
        _wait(device)  # for the file

    def begin(self, state: State) -> None:
        """Load weights, banks and optimiser from the end of the stage before; not the step."""
        if self.number == 1:
            return
        saved = checkpoint.load_newest(self.before().folder.checkpoints)
        if saved is None:
            what = str(self.before().options.out)
            raise ClsaError(what, "holds no checkpoint", "start a new run", Exit.NO_INPUT)
        state.method.load_state_dict(saved.state["method"])
        state.optimizer.load_state_dict(saved.state["optimizer"])
        method = state.method
        base, key_network = innermost(method), key_network_of(method)
        if key_network is not None:
            key_network.load_state_dict(base.network.state_dict())
        for module in method.modules():
            if isinstance(module, Continual):
                main = getattr(base, "queue", None) if self.number == 2 else None
                module.begin((main or module.extra).rows)

    def judge(self, parts: list[Split] | None, device: torch.device) -> None:
        """Measure accuracy on every stage so far, unless it is known, and write the matrix."""
        out = self.whole.out
        found = read_forgetting(out)
        if parts is None or len(found.accuracy) >= self.number:
            return
        views, seen = self.options.views, parts[: self.number]
        encoder = saved_encoder.load_encoder(self.options.out).to(device)
        single, whole = forgetting.judge(encoder, seen, views, device)
        random = found.random
        if not random:
            fresh = build_encoder(self.whole.model, self.whole.seed).to(device)
            random, _ = forgetting.judge(fresh, parts, views, device)
        names = [str(number) for number in range(1, self.count + 1)]
        found = Forgetting(names, [*found.accuracy, single], random, [*found.everything, whole])
        forgetting.write(out, found)
        self._say(f"after stage {self.number}: {forgetting.describe(found)}")
