"""From scans to metrics: the stages of every study."""


def segmentation_settings(wildcards):
    """What the study decides of a segmenter, for its training and its evaluation alike."""
    pretrained = wildcards.arm == plans.SYNTHETIC_THEN_REAL
    return {
        "store_dir": RUN / "store",
        "output_dir": RUN / RESULT.format(**wildcards),
        "fold": int(wildcards.fold),
        "arm": "baseline" if pretrained else wildcards.arm,
        "seed": int(wildcards.seed),
        "image_size": STUDY.image_size,
        "num_classes": NUM_CLASSES,
        "num_cases": STUDY.num_cases,
    }


def synthetic_store(wildcards):
    """The synthetic store that a segmenter's setting reads."""
    return plans.synthetic_dir(SETTINGS[wildcards.setting], wildcards.fold)


def segmentation_run(wildcards, section="segmentation", on_synthetic=False):
    """The command that trains a segmenter (or only its first half, on variants), or evaluates it."""
    setting = SETTINGS[wildcards.setting]
    settings = segmentation_settings(wildcards)
    pretrained = wildcards.arm == plans.SYNTHETIC_THEN_REAL
    knobs = plans.segmentation_knobs(STUDY, setting, settings["arm"])
    if pretrained:
        epochs = plans.segmentation_knobs(STUDY, setting, wildcards.arm).get("epochs", EPOCHS)
        first = RUN / RESULT.format(**wildcards) / "on_synthetic"
        if on_synthetic:
            settings |= {"arm": "synthetic", "output_dir": first}
            knobs = plans.segmentation_knobs(STUDY, setting, "synthetic") | {"epochs": epochs // 2}
        else:
            settings["weights"] = first / "model.pt"
            knobs["epochs"] = epochs - epochs // 2
    if plans.uses_variants(settings["arm"]):
        settings["synthetic_dir"] = RUN / synthetic_store(wildcards)
    files = [CONFIGS["segmentation"]]
    files += plans.network_overlay(files[0], plans.segmentation_network(STUDY, setting))
    if section == "evaluate":
        return run([*files, CONFIGS[section]], settings, knobs | STUDY.evaluate, "multi_gpu_evaluate")
    return run(files, settings, knobs, "multi_gpu_train")


def segmentation_inputs(wildcards):
    """The store, and what the arm needs besides: variants, or the weights learned from them."""
    if wildcards.arm == plans.SYNTHETIC_THEN_REAL:
        return ["store", RESULT.format(**wildcards) + "/on_synthetic/model.pt"]
    return ["store"] + [synthetic_store(wildcards)] * plans.uses_variants(wildcards.arm)


def filter_settings(wildcards):
    """What synthesis needs besides where variants are filtered: the baseline segmenter."""
    if not plans.synthesis_knobs(STUDY, SETTINGS[wildcards.setting]).get("quality_filter"):
        return {}
    segmenter = plans.Segmenter(plans.BASE, int(wildcards.fold), "baseline", STUDY.seeds[0])
    config = CONFIGS["segmentation"]
    files = [config, *plans.network_overlay(config, STUDY.networks[0])]
    folder = str(RUN / segmenter.folder)
    return {"segmenter_dir": folder, "segmenter_configs": [str(f) for f in files]}


def filter_inputs(wildcards):
    """The model of that segmenter, where one is needed."""
    folder = filter_settings(wildcards).get("segmenter_dir")
    return [str(Path(folder).relative_to(RUN) / "model.pt")] if folder else []


def synthesis_run(wildcards):
    """The command that makes a synthetic store, of the ratio that is ordered or of its own choice."""
    settings = {
        "store_dir": RUN / "store",
        "generator_dir": RUN / f"fold{wildcards.fold}/generator",
        "output_dir": RUN / f"{wildcards.setting}fold{wildcards.fold}/synthetic_store",
        "backbone": STUDY.backbone,
        "image_size": STUDY.image_size,
        "fold": int(wildcards.fold),
        "num_cases": STUDY.num_cases,
    }
    knobs = plans.synthesis_knobs(STUDY, SETTINGS[wildcards.setting])
    if "edge_weights" in STUDY.prepare:
        knobs["edge_weights"] = STUDY.prepare["edge_weights"]
    filtered = filter_settings(wildcards)
    if not is_auto(STUDY):
        return run(scaled("synthesis"), settings | filtered, knobs, "multi_gpu_inference")
    arm = probe_arm(STUDY)
    segmenter = CONFIGS["segmentation"]
    files = [segmenter, *plans.network_overlay(segmenter, STUDY.networks[0])]
    settings |= {
        "synthesis_configs": with_overlay(scaled("synthesis"), "multi_gpu_inference"),
        "synthesis_knobs": fixed_knobs(knobs) | filtered,
        "segmenter_configs": with_overlay(files, "multi_gpu_train"),
        "segmenter_knobs": plans.segmentation_knobs(STUDY, plans.BASE, arm),
        "segmenter_arm": arm,
        "num_classes": NUM_CLASSES,
        "processes": STUDY.processes,
    }
    return bundle_run([CONFIGS["auto_ratio"]], settings, STUDY.auto_ratio)


rule prepare:
    output:
        directory("store"),
    params:
        command=bundle_run(
            [CONFIGS["prepare"]],
            {
                "dataset_dir": DATASET,
                "store_dir": RUN / "store",
                "task": TASK,
                "image_size": STUDY.image_size,
                "edges": STUDY.edges,
                "hed_size_px": STUDY.hed_size_px,
                "num_folds": STUDY.num_folds,
            },
            STUDY.prepare,
        ),
        start=START,
    log:
        "logs/prepare.log",
    benchmark:
        "benchmarks/prepare.tsv"
    threads: ALL_CORES
    message:
        "prepare the slice store"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule finetune:
    input:
        "store",
        first_generator,
    output:
        directory("fold{fold}/generator"),
    params:
        command=lambda wildcards: run(
            scaled("finetune"),
            {
                "store_dir": RUN / "store",
                "output_dir": RUN / f"fold{wildcards.fold}/generator",
                "backbone": STUDY.backbone,
                "weights": model_of(first_generator(wildcards)),
                "image_size": STUDY.image_size,
                "fold": int(wildcards.fold),
                "num_cases": STUDY.num_cases,
            },
            plans.finetune_knobs(STUDY),
            "multi_gpu_train",
        ),
        start=START,
    log:
        "logs/finetune.fold{fold}.log",
    benchmark:
        "benchmarks/finetune.fold{fold}.tsv"
    threads: FOLD_CORES
    priority: 1  # most trainings wait for it; at the end, one long one would be left alone
    message:
        "finetune the generator on fold {wildcards.fold}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule synthesize:
    input:
        "store",
        "fold{fold}/generator",
        filter_inputs,
    output:
        directory("{setting}fold{fold}/synthetic_store"),
    params:
        command=synthesis_run,
        start=START,
    log:
        "logs/{setting}synthesize.fold{fold}.log",
    benchmark:
        "benchmarks/{setting}synthesize.fold{fold}.tsv"
    threads: FOLD_CORES
    priority: 1  # most trainings wait for it; at the end, one long one would be left alone
    message:
        "synthesize variants for {wildcards.setting}fold {wildcards.fold}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule train_on_synthetic:
    input:
        "store",
        synthetic_store,
    output:
        RESULT + "/on_synthetic/model.pt",
        RESULT + "/on_synthetic/training_log.csv",
        RESULT + "/on_synthetic/run.json",  # goes with the model when that is made anew
    params:
        command=lambda wildcards: segmentation_run(wildcards, on_synthetic=True),
        start=START,
    log:
        "logs/{setting}train_on_synthetic.fold{fold}.{arm}.seed{seed}.log",
    benchmark:
        "benchmarks/{setting}train_on_synthetic.fold{fold}.{arm}.seed{seed}.tsv"
    threads: STUDY.processes
    message:
        "train on variants alone: {wildcards.setting}fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule train_segmentation:
    input:
        segmentation_inputs,
    output:
        RESULT + "/model.pt",
        RESULT + "/training_log.csv",
        RESULT + "/run.json",
    params:
        command=segmentation_run,
        start=START,
    log:
        "logs/{setting}train_segmentation.fold{fold}.{arm}.seed{seed}.log",
    benchmark:
        "benchmarks/{setting}train_segmentation.fold{fold}.{arm}.seed{seed}.tsv"
    threads: STUDY.processes
    message:
        "train a segmenter: {wildcards.setting}fold {wildcards.fold}, {wildcards.arm}, "
        "seed {wildcards.seed}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule evaluate:
    input:
        "store",
        RESULT + "/model.pt",
    output:
        RESULT + "/metrics.csv",
        directory(RESULT + "/predictions"),
    params:
        command=lambda wildcards: segmentation_run(wildcards, "evaluate"),
        start=START,
    log:
        "logs/{setting}evaluate.fold{fold}.{arm}.seed{seed}.log",
    benchmark:
        "benchmarks/{setting}evaluate.fold{fold}.{arm}.seed{seed}.tsv"
    threads: STUDY.processes
    message:
        "evaluate it: {wildcards.setting}fold {wildcards.fold}, {wildcards.arm}, "
        "seed {wildcards.seed}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"
