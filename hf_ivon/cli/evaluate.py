"""`hf-ivon evaluate`: how good a checkpoint is at its mean, and averaged over its posterior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ivon.cli.outputs import FAILURES, check_outputs, writing


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory of a model or an adapter with its posterior and tokenizer.")],
    data: Annotated[Path, typer.Option(help="Labelled examples: json, jsonl, csv or txt, also .gz.")],
    num_samples: Annotated[int, typer.Option(min=1, help="Weight samples.")] = 64,
    tolerance: Annotated[
        float, typer.Option(help="Stop when a sample moves the average by less than this; 0 takes all.")
    ] = 0.0,
    ess_scale: Annotated[
        float, typer.Option(help="Factor on the posterior's precision; below 1 it is wider than it was saved.")
    ] = 1.0,
    ess_scale_data: Annotated[
        Path | None, typer.Option(help="Other labelled examples, held out of training too, to fit --ess-scale on.")
    ] = None,
    ess_scale_loss: Annotated[
        str | None,
        typer.Option(
            help="With training examples for that: the loss that weight samples may have on them, nats; auto is half "
            "of what trainer_state.json has for the second half of the first epoch."
        ),
    ] = None,
    ood_data: Annotated[Path | None, typer.Option(help="Examples of another domain, to be told apart.")] = None,
    text_columns: Annotated[
        list[str] | None, typer.Option(help="Columns that hold text, one or two; all that do by default.")
    ] = None,
    ood_text_columns: Annotated[
        list[str] | None, typer.Option(help="The same for --ood-data; by default as --text-columns.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens at which a text is cut.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 32,
    plots: Annotated[
        Path | None,
        typer.Option(help="Directory for a classifier's figures: reliability, samples, entropies with --ood-data."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the numbers as JSON into this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the weight samples.")] = 0,
) -> None:
    """Print metrics at the mean and averaged over the posterior, side by side. Exits with 2 on errors."""
    try:
        if ood_text_columns and ood_data is None:
            raise ValueError("`ood_text_columns` must come with `ood_data`. Add --ood-data.")
        if ess_scale_data is not None and ess_scale != 1.0:
            raise ValueError("`ess_scale` must be left out where it is fitted to `ess_scale_data`. Give one of them.")
        if ess_scale_loss is not None and ess_scale_data is None:
            raise ValueError("`ess_scale_loss` must come with `ess_scale_data`. Add --ess-scale-data.")
        check_outputs(output, plots)
        columns = {"text_columns": text_columns or [], "max_length": max_length, "batch_size": batch_size}
        ood_columns = {**columns, "text_columns": ood_text_columns or columns["text_columns"]}
        sampling = {"num_samples": num_samples, "seed": seed, "ess_scale": ess_scale}
        results, draw = run(
            *(model, data, sampling, tolerance, ess_scale_data, ess_scale_loss),
            *(ood_data, columns, ood_columns, plots is not None),
        )
    except FAILURES as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(2) from None
    if ess_scale_data is not None:
        typer.echo(f"ess_scale {results['ess_scale']:.4g}, fitted to {ess_scale_data}")
    width = max(len(name) for name in results["mean"])
    typer.echo(f"{'':<{width}}  {'mean':>10}  {'averaged':>10}   {results['num_samples']} weight samples")
    for name, value in results["mean"].items():
        typer.echo(f"{name:<{width}}  {value:>10.4f}  {results['averaged'][name]:>10.4f}")
    with writing():
        if output is not None:
            from hf_ivon.json_files import write_json

            write_json(output, results)
        if plots is not None:
            draw(plots)


def run(
    model_name: str,
    file: Path,
    sampling: dict[str, Any],
    tolerance: float,
    ess_scale_file: Path | None,
    ess_scale_loss: str | None,
    ood_file: Path | None,
    columns: dict[str, Any],
    ood_columns: dict[str, Any],
    plots: bool,
) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """Return `data`, the file's name, `mean` and `averaged`, metrics, `num_samples`, `ess_scale`; and what draws."""
    from hf_ivon.calibration import fit_ess_scale
    from hf_ivon.data import best_device, is_language_model, load_batches, load_checkpoint, metrics_of
    from hf_ivon.metrics import out_of_domain_detection
    from hf_ivon.posterior import Posterior
    from hf_ivon.predict import Prediction, posterior_perplexity, posterior_predict

    loss = _loss(ess_scale_loss, model_name)
    model, tokenizer = load_checkpoint(model_name)
    posterior = Posterior.from_pretrained(model_name, model, check_values=True)
    batches = load_batches(file, model, tokenizer, **columns)
    fitted_on = None if ess_scale_file is None else load_batches(ess_scale_file, model, tokenizer, **columns)
    if is_language_model(model):
        unused = {"ood_data": ood_file, "plots": plots or None, "tolerance": tolerance or None}
        _only_for_classifiers("a language model", **unused)
    outside = None
    if ood_file is not None:
        outside = load_batches(ood_file, model, tokenizer, **ood_columns, with_labels=False)
    model.to(best_device())
    if fitted_on is not None:
        settings = {name: sampling[name] for name in ("num_samples", "seed")}
        sampling = {**sampling, "ess_scale": fit_ess_scale(model, posterior, fitted_on, loss=loss, **settings)}
    if is_language_model(model):
        passes = {"mean": {"num_samples": 0}, "averaged": sampling}
        found = {k: posterior_perplexity(model, posterior, batches, **v) for k, v in passes.items()}
        metrics = {k: {"perplexity": v["perplexity"]} for k, v in found.items()}
        settings_used = {name: sampling[name] for name in ("num_samples", "ess_scale")}
        return {"data": file.name, **metrics, **settings_used}, lambda directory: None
    results: dict[str, Any] = {"data": file.name, "ess_scale": sampling["ess_scale"]}
    entropies, reliability, by_samples = {}, {}, {}

    def follow(prediction: Prediction) -> None:
        taken = prediction.num_samples
        if prediction.probabilities is not None and taken.bit_count() == 1:  # 1, 2, 4, ...
            by_samples[taken] = metrics_of(prediction)["nll"]

    for name, options in (("mean", {"num_samples": 0}), ("averaged", {**sampling, "tolerance": tolerance})):
        found_here = posterior_predict(model, posterior, batches, **options, on_sample=follow if plots else None)
        if found_here.probabilities is None:
            _only_for_classifiers("a regression", ood_data=ood_file, plots=plots or None)
        results[name] = metrics_of(found_here)
        results["num_samples"] = found_here.num_samples
        if outside is not None:
            others = posterior_predict(model, posterior, outside, **options)
            results[name] |= out_of_domain_detection(-found_here.entropy, -others.entropy)
            entropies |= {f"in domain, {name}": found_here.entropy, f"out of domain, {name}": others.entropy}
        if found_here.probabilities is not None:
            reliability[name] = (found_here.probabilities, found_here.labels)

    def draw(directory: Path) -> None:
        from hf_ivon.plots import entropy_histograms, metric_by_samples, reliability_diagram

        reliability_diagram(reliability, directory / "reliability.png")
        by_samples[results["num_samples"]] = results["averaged"]["nll"]
        references = {"at the mean": results["mean"]["nll"]}
        target = directory / "samples.png"
        metric_by_samples({"averaged": by_samples}, target, ylabel="NLL (nats)", references=references)
        if entropies:
            entropy_histograms(entropies, directory / "entropy.png")

    return results, draw


def _loss(text: str | None, directory: str) -> float | None:
    """Return what `--ess-scale-loss` stands for."""
    from hf_ivon.calibration import first_sight_loss

    if text is None or text == "auto":
        return None if text is None else first_sight_loss(directory) / 2
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`ess_scale_loss` must be a number or auto, got {text!r}. 0.3 is a number.") from None


def _only_for_classifiers(kind: str, **options: Any) -> None:
    """Refuse options that would have no effect; None is one that was not given."""
    if given := [f"`{name}`" for name, value in options.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)} must be left out for {kind}, which has none of that yet.")
