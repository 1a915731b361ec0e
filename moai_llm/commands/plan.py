"""What a run will need, before it is started: parameters, operations, memory by part, micro-batch, days, cost.

moai plan moai-3b --hardware 8xA100-80GB --tokens 60e9 --price 2.0
moai plan moai-mamba-2b --hardware RTX-4090 data.seq_len=1024
moai plan moai-3b-tiny --calibrate
moai plan --scenario basic

Everything but --calibrate is arithmetic on the recipe. --calibrate runs 20 real steps on this machine and plans with
the speed and the memory it saw.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.planning.adapters import BITS, count
from moai_llm.planning.hardware import GIB, Hardware, parse_hardware
from moai_llm.planning.plan import MFU, RESERVE, Options, Plan, make_plan
from moai_llm.planning.scenarios import SCENARIOS, Scenario
from moai_llm.planning.step import PARTS
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from rich.console import Console

    from moai_llm.recipe import Recipe

DAY = 86400.0


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", nargs="?", help="a preset or a recipe file; with --scenario its own when left out")
    add("overrides", nargs="*", metavar="a.b=c", help="change keys of the recipe")
    add("--hardware", metavar="NxDEVICE", help="such as 8xA100-80GB; without it there are no days")
    add("--peak-tflops", type=_positive, metavar="T", help="of a device not known here: dense, half precision")
    add("--memory", type=_positive, metavar="GIB", help="of a device not known here")
    add("--tokens", type=_positive, help="of the whole run (default: the recipe's length)")
    add("--mfu", type=_positive, default=MFU, help=f"share of the peak that is reached (default {MFU})")
    add("--price", type=_positive, metavar="DOLLARS", help="of one device for an hour")
    add("--reserve", type=_share, default=RESERVE, help=f"share of the memory left free (default {RESERVE})")
    add("--micro-batch", type=int, metavar="ROWS", help="look at this micro-batch instead of the largest that fits")
    add("--document-tokens", type=_positive, metavar="N", help="mean length of documents (default: a row each)")
    add("--context", type=int, metavar="N", help="tokens of a sequence when generating (default: a row)")
    add("--scenario", choices=[*SCENARIOS, "all"], help="a training recipe of the older documents, and its promises")
    add("--calibrate", action="store_true", help="measure speed and memory here, in a few real steps")
    add("--steps", type=int, default=20, help="steps of --calibrate (default 20)")
    add("--json", action="store_true", help="print numbers for programs: bytes, seconds, operations")


def run(arguments: argparse.Namespace) -> None:
    console = make_console()
    if arguments.scenario == "all":
        _refuse(arguments, "recipe", "hardware", "tokens", "calibrate", with_what="--scenario all")
        _show_scenarios(console, arguments)
        return
    scenario = SCENARIOS.get(arguments.scenario or "")
    if arguments.recipe and "=" in arguments.recipe:
        arguments.overrides, arguments.recipe = [arguments.recipe, *arguments.overrides], None
    if arguments.recipe is None and scenario is None:
        raise MoaiError("which recipe? A preset (`moai recipes`), a YAML file, or --scenario")
    name = arguments.recipe or (scenario.recipe if scenario else "")
    recipe = recipes.load(name, arguments.overrides)
    hardware = _hardware(arguments, scenario)
    options = _options(arguments, scenario)
    if arguments.calibrate:
        plan = _calibrated(recipe, hardware, options, arguments, console)
    else:
        plan = make_plan(recipe, hardware, options)
    if arguments.json:
        print(json.dumps(plan.to_tree()))
        return
    _show(console, name, plan)
    if scenario and not arguments.recipe:
        _show_promise(console, scenario, plan)


def _hardware(arguments: argparse.Namespace, scenario: Scenario | None) -> Hardware | None:
    text = arguments.hardware
    if text is None and scenario is not None:
        text = f"{scenario.devices[1]}x{scenario.device}"
    if text is None and arguments.memory is not None:
        text = "a device"
    if text is None and arguments.peak_tflops is not None:
        raise MoaiError("--peak-tflops without --memory: say how many GiB the device has, or name it by --hardware")
    return None if text is None else parse_hardware(text, arguments.peak_tflops, arguments.memory)


def _options(arguments: argparse.Namespace, scenario: Scenario | None) -> Options:
    for name in ("micro_batch", "context", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise MoaiError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.mfu > 1:
        raise MoaiError(f"--mfu is a share of the peak, at most 1, got {arguments.mfu:g}")
    return Options(
        tokens=arguments.tokens or (scenario.tokens[1] if scenario else None), mfu=arguments.mfu,
        reserve=arguments.reserve, price=arguments.price, document_tokens=arguments.document_tokens,
        context=arguments.context, micro_batch=arguments.micro_batch,
    )  # fmt: skip


def _calibrated(
    recipe: Recipe, hardware: Hardware | None, options: Options, arguments: argparse.Namespace, console: Console
) -> Plan:
    from moai_llm.training.calibrate import calibrate, corrected

    found = calibrate(recipe, hardware, options, steps=arguments.steps, quiet=arguments.json)
    if not arguments.json:
        console.print(found.summary(), markup=False)
    return make_plan(found.recipe, hardware or found.hardware, corrected(found, options))


# ---------------------------------------------------------------- what is shown


def _show(console: Console, name: str, plan: Plan) -> None:
    model, counts = plan.recipe.model, plan.parameters
    where = f" on {plan.hardware}" if plan.hardware else ""
    console.print(f"[bold]{name}[/bold]{where}, rows of {plan.recipe.data.seq_len:,} tokens")
    active = "" if counts["active"] == counts["total"] else f", {counts['active']:,} active"
    console.print(f"parameters   {counts['total']:,}{active}")
    ratio = plan.flops_per_token / (6 * counts["active"])
    console.print(f"operations   {_big(plan.flops_per_token)} a token in training, {ratio:.2f} times the 6N rule")
    total, parts = plan.flops["total"], ("token_mixers", "attention", "scan", "channel_mixers", "head")
    shares = [f"{part.replace('_', ' ')} {plan.flops[part] / total:.0%}" for part in parts if plan.flops[part]]
    console.print(f"             {', '.join(shares)}")
    if plan.recipe.lora.rank:
        console.print(f"LoRA         {_adapters(plan.recipe)}")
    if plan.recomputed:
        console.print(f"             and {_big(plan.recomputed)} to recompute activations")
    console.print()
    _show_layouts(console, plan)
    _show_choice(console, plan)
    _show_time(console, plan)
    bf16 = 2 * counts["total"]
    context = plan.options.context or plan.recipe.data.seq_len
    kind = "state" if set(model.layer_types or ()) == {"linear_attention"} else "cache"
    console.print(
        f"generating   {_gib(bf16)} of weights in bf16, {_gib(plan.cache)} of {kind} a sequence of {context:,} tokens"
    )
    for note in plan.notes:
        console.print(f"[dim]{note}[/dim]")


def _adapters(recipe: Recipe) -> str:
    trained, form = count(recipe.lora, recipe.model), recipe.lora.quantize
    below = f"the matrices below in {BITS[recipe.lora.double_quant]:.2f} bits ({form})" if form else "fp32 below"
    return f"{trained:,} parameters in adapters of rank {recipe.lora.rank} are trained, {below}"


def _show_layouts(console: Console, plan: Plan) -> None:
    from rich.table import Table

    unit, size = ("GiB", GIB) if max(fit.memory.total for fit in plan.fits) >= GIB / 10 else ("MiB", 2**20)
    table = Table(f"{unit} a device", box=None, pad_edge=False)
    for title in ("weights", "grads", "optim", "activ", "loss", "peak", "rows x acc", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for fit in plan.fits:
        parts = [f"{getattr(fit.memory, part) / size:.2f}" for part in PARTS]
        verdict = "" if plan.hardware is None else "fits" if fit.fits else "too big"
        rows = f"{fit.micro_batch} x {fit.accumulation}"
        table.add_row(fit.layout.name, *parts, f"{fit.memory.total / size:.2f}", rows, verdict)
    console.print(table)


def _show_choice(console: Console, plan: Plan) -> None:
    best = plan.best
    if plan.hardware is None:
        console.print("micro-batch  the recipe's; --hardware finds the largest that fits")
    elif best is not None:
        here = "" if best.layout.runs_here else ", once there is a launcher"
        console.print(
            f"take         {best.layout.name}, train.micro_batch_size={best.micro_batch}, "
            f"{best.accumulation} of them a step{here}"
        )
    else:
        console.print(f"nothing fits {plan.hardware} with {plan.options.reserve:.0%} left free. Change, in this order:")
        for advice in plan.advice:
            verdict = "fits" if advice.fits else "still too big"
            console.print(f"  {advice.layout}, {_gib(advice.total)}, {verdict}: {' '.join(advice.overrides)}")


def _show_time(console: Console, plan: Plan) -> None:
    if plan.hardware is None:
        return
    if plan.tokens is None:
        console.print("time         how many tokens? Give --tokens, or set train.tokens")
        return
    if plan.seconds is None:
        console.print("time         no peak is known for this device: give --peak-tflops, or measure by --calibrate")
        return
    hours = plan.seconds / 3600 * plan.hardware.count
    if plan.options.tokens_per_second is not None:
        basis = f"at {plan.options.tokens_per_second:,.0f} measured tokens/s a device"
    else:
        basis = f"at {plan.options.mfu:.0%} of the peak"
        busy = plan.options.mfu * (1 + plan.recomputed / plan.flops_per_token)
        if plan.recomputed:
            basis += f" ({busy:.0%} with what is recomputed)"
    cost = "" if plan.cost is None else f", ${plan.cost:,.0f}"
    console.print(
        f"time         {_days(plan.seconds)} for {_tokens(plan.tokens)} tokens {basis}: {hours:,.0f} device-hours{cost}"
    )


def _show_promise(console: Console, scenario: Scenario, plan: Plan) -> None:
    console.print(f"\nThe documents' recipe [bold]{scenario.title}[/bold]:")
    console.print(_scenario_table({"": scenario}, plan.recipe, plan.options))


def _show_scenarios(console: Console, arguments: argparse.Namespace) -> None:
    options = _options(arguments, None)
    recipe = recipes.load(next(iter(SCENARIOS.values())).recipe)
    if arguments.json:
        print(json.dumps([_scenario_tree(name, scenario, recipe, options) for name, scenario in SCENARIOS.items()]))
        return
    console.print(_scenario_table(SCENARIOS, recipe, options))
    console.print(
        f"[dim]{recipe.model.parameters()['total']:,} parameters, days at {options.mfu:.0%} of the peak. Needs MFU: "
        "the share of the peak at which the documents' days come true; above 100% they cannot.[/dim]"
    )


def _scenario_table(scenarios: dict[str, Scenario], recipe: Recipe, options: Options) -> Any:
    from rich.table import Table

    columns = ("tokens on", "days", "theirs", "needs MFU", "cost", "theirs")
    table = Table(*("recipe",) * (len(scenarios) > 1), *columns, box=None, pad_edge=False)
    for name, scenario in scenarios.items():
        for i, end in enumerate(_scenario_tree(name, scenario, recipe, options)["ends"]):
            cost = "-" if end["cost"] is None else f"${end['cost']:,.0f}"
            cells = (
                f"{_tokens(end['tokens'])} on {end['hardware']}", f"{end['days']:.1f}", f"{scenario.days[i]:g}",
                f"{end['needed_mfu']:.0%}", cost, f"${scenario.cost[i]:,.0f}",
            )  # fmt: skip
            table.add_row(*cells if len(scenarios) == 1 else ("" if i else name, *cells))
    return table


def _scenario_tree(name: str, scenario: Scenario, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Both ends of the published ranges: fewest tokens on most devices in the fewest days, and the other way round."""
    ends = []
    for i in (0, 1):
        hardware = parse_hardware(f"{scenario.devices[1 - i]}x{scenario.device}")
        plan = make_plan(recipe, hardware, Options(scenario.tokens[i], options.mfu, options.reserve, options.price))
        assert plan.seconds is not None
        ends.append({
            "tokens": plan.tokens, "hardware": str(hardware), "days": plan.seconds / DAY, "cost": plan.cost,
            "published_days": scenario.days[i], "published_cost": scenario.cost[i],
            "needed_mfu": plan.needed_mfu(scenario.days[i]),
        })  # fmt: skip
    return {"scenario": name, "title": scenario.title, "ends": ends}


def _refuse(arguments: argparse.Namespace, *names: str, with_what: str) -> None:
    for name in names:
        if getattr(arguments, name):
            flag = name.upper() if name == "recipe" else f"--{name}"
            raise MoaiError(f"{with_what} plans the documents' recipes as they stand: leave out {flag}")


def _big(operations: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if operations >= size:
            return f"{operations / size:.2f} {unit}"
    return f"{operations:.0f} FLOP"


def _tokens(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _days(seconds: float) -> str:
    for unit, size in (("days", DAY), ("hours", 3600.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return value
