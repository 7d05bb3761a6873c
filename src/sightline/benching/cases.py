"""What is measured: a network alone, updates of its weights, folders of files, and what larger images cost.

A case is a row of `CASES`: from a `Plan` and the machine to `Table`s.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial

from sightline.benching.apart import Processes
from sightline.benching.ceilings import Machine, timer_of
from sightline.benching.contenders import Programs, computable, model_of, noise, others, ours, seconds_of, shared
from sightline.benching.folders import predict
from sightline.benching.learning import mae, training
from sightline.benching.memory import Memory
from sightline.benching.rounds import Contender, growth, take_turns
from sightline.benching.tables import OURS, Plan, Point, Table, rows_of
from sightline.device import keep_for_next, out_of_memory
from sightline.network import count_macs


def forward(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Prepared pixels to logits, as `predict` computes long jobs, beside the same network of others."""
    computable(plan)
    architecture = plan.architecture()
    flops = 2 * count_macs(architecture)
    with closing(Programs(model_of(architecture.build()), plan)) as programs:
        for precision in plan.precisions:
            peers, notes = others(plan, precision)
            written, remarks = programs.sides(precision)
            with Processes() as processes:
                found, absent = processes.present([ours(plan, precision), *peers, *written])
                sides, sizes = zip(*found, strict=True)
                for batch in plan.batch_sizes:
                    timed = processes.in_turns(sides, plan.rounds, seconds_of, plan.device, batch)
                    title = f"forward, {plan.model}, batches of {batch}, {precision}"
                    rows = rows_of(timed, sizes, batch, flops=flops, peak=machine.products[precision])
                    yield Table("forward", title, batch, precision, rows, notes=[*absent, *notes, *remarks])


def resolution(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Time and memory of one image, from small to large, in the first of the precisions that others have, too."""
    precision = (shared(plan) or ["fp32"])[0]
    keep_for_next()
    points: list[Point] = []
    notes: list[str] = []
    for side in (*plan.sides[:1], *plan.sides):  # what all have in common is made for the first, which does not count
        network = plan.architecture(side).build().to(plan.device).eval()
        predictor = model_of(network).predictor(device=str(plan.device), precision=precision)
        work = partial(predictor.compute, noise(predictor, 1), features=False)
        memory = Memory(plan.device)
        try:
            timed = take_turns([Contender(OURS, work)], plan.rounds, timer_of(plan.device))
        except (RuntimeError, MemoryError) as fault:
            if not out_of_memory(fault):
                raise
            notes.append(f"memory does not suffice for {side}×{side}")
            break
        rows, columns = network.backbone.grid_of((side, side))
        points.append(Point(side, rows * columns, timed[0].median, memory.most()))
        del network, predictor
        gc.collect()
    points = points[1:]
    exponents = {}
    if len(points) > 1:
        sides = [point.side for point in points]
        exponents["seconds"] = growth(sides, [point.seconds for point in points])
        megabytes = [point.megabytes or 0.0 for point in points]
        if min(megabytes) > 0:
            exponents["megabytes"] = growth(sides, megabytes)
    yield Table(
        "resolution", f"resolution, {plan.model}, one image, {precision}", 1, precision, (), points, exponents, notes
    )


CASES: Mapping[str, Callable[[Plan, Machine], Iterator[Table]]] = {
    "forward": forward,
    "training": training,
    "mae": mae,
    "predict": predict,
    "resolution": resolution,
}
USUAL = ("forward", "training", "resolution")
"""The cases that are measured where nobody names any."""
