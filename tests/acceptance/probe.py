"""What clients do to one release, in one process: shapes, exports, properties, `load`.

    python probe.py RELEASE STORE WORK     (called by zoo.py, with the release on PYTHONPATH alone)

STORE is a slice store for the train configs. Prints `LINE <tab> number <tab> 0|1 <tab> text`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, load, verify_net_in_out

FAULTS = (
    ValueError, RuntimeError, LookupError, TypeError, AttributeError, OSError, AssertionError,
    ImportError, SystemExit,
)  # fmt: skip


def tell(line: str, check: Callable[[], str]) -> None:
    """Runs a check and prints what came of it; what a client would raise is a finding."""
    try:
        passed, text = 1, check()
    except FAULTS as error:
        passed, text = 0, f"{type(error).__name__}: {error}"
    print("LINE", line, passed, " ".join(str(text).split())[:200], sep="\t", flush=True)


def main(release: Path, store: Path, work: Path) -> None:
    configs, model = release / "configs", release / "models" / "model.pt"
    inference, meta = str(configs / "inference.json"), str(configs / "metadata.json")
    root = {"bundle_root": str(release)}
    is_segmenter = "diffboost" not in str(ConfigParser.load_config_file(inference)["network_def"])
    work.mkdir(parents=True, exist_ok=True)

    def network() -> torch.nn.Module:
        parser = ConfigParser(ConfigParser.load_config_file(inference) | root)
        return parser.get_parsed_content("network_def")

    def shapes() -> str:
        verify_net_in_out("network_def", meta, inference, p=1, n=1, any=1, **root)
        return "p = n = any = 1"

    def export(trace: bool) -> str:
        target = work / ("traced.ts" if trace else "scripted.ts")
        ckpt_export(
            "network_def", str(target), str(model), meta, inference, use_trace=trace, **root
        )
        size = ConfigParser.load_config_file(meta)["network_data_format"]["inputs"]["image"]
        image = torch.rand(1, size["num_channels"], *size["spatial_shape"])
        wanted = network().eval()
        wanted.load_state_dict(torch.load(model, weights_only=True))
        difference = (torch.jit.load(target).eval()(image) - wanted(image)).abs().max().item()
        assert difference < 1e-4, difference
        return f"{target.name}, largest difference {difference:.1e}"

    def strict() -> str:
        state = torch.load(model, weights_only=True)
        assert all(torch.is_tensor(value) for value in state.values())
        network().load_state_dict(state, strict=True)
        return f"{len(state)} tensors, {sum(v.numel() for v in state.values())} numbers"

    def loaded(kind: str) -> str:
        place = {"generator_dir": str(release / "models")}
        from_folder = (
            kind == "inference"
            and "generator_dir" in (ConfigParser.load_config_file(inference)["network_def"])
        )
        found = load(
            release.name, bundle_dir=release.parent, workflow_type=kind, source="github",
            net_override=place if from_folder else None,
        )  # fmt: skip
        assert hasattr(found, "forward")
        return f"load {kind}: {type(found).__name__}" + (" with net_override" * from_folder)

    def properties(kind: str, *names: str) -> str:
        files = [str(configs / f"{name}.json") for name in names]
        paths = {"output_dir": str(work / names[-1])}
        if kind == "train":
            paths |= {"store_dir": str(store)}
        workflow = ConfigWorkflow(
            files, meta, logging_file=False, workflow_type=kind, **(root | paths)
        )
        workflow.initialize()
        missing = workflow.check_properties()
        assert not any(missing or []), missing
        return "+".join(names)

    tell("6", shapes)
    tell("16", strict)
    tell("19", lambda: export(trace=True))
    if is_segmenter:
        tell("8", lambda: export(trace=False))
    tell("14", lambda: loaded("inference"))
    tell("12", lambda: properties("infer", "inference"))
    if (configs / "train.json").is_file():
        tell("14", lambda: loaded("train"))
        tell("12", lambda: properties("train", "train"))
    if (configs / "train.json").is_file() and is_segmenter:
        tell("12", lambda: properties("train", "train", "evaluate"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
