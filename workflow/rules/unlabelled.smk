"""Where the experiment says so, a fold's generator learns from unlabelled training images first."""


def first_generator(wildcards):
    """Input function: what finetuning starts from, if it is a generator of this study."""
    if STUDY.unlabelled is not None:
        return f"fold{wildcards.fold}/unlabelled/generator"
    return PRETRAINED or []


def model_of(generator):
    """The weights in a generator's folder; None without one."""
    return RUN / generator / "model.pt" if generator else None


rule prepare_unlabelled:
    input:
        "store",
    output:
        directory("fold{fold}/unlabelled/store"),
    params:
        command=lambda wildcards: bundle_run(
            [CONFIGS["unlabelled.prepare"]],
            {
                "store_dir": RUN / "store",
                "unlabelled_dir": RUN / f"fold{wildcards.fold}/unlabelled/store",
                "fold": int(wildcards.fold),
                "num_cases": STUDY.num_cases,
                "inner_fraction": STUDY.finetune.get("inner_fraction"),
                "edge_weights": STUDY.prepare.get("edge_weights"),
            },
            {},
        ),
        start=START,
    log:
        "logs/prepare_unlabelled.fold{fold}.log",
    benchmark:
        "benchmarks/prepare_unlabelled.fold{fold}.tsv"
    threads: FOLD_CORES
    priority: 2  # finetuning waits for it
    message:
        "prepare the unlabelled images of fold {wildcards.fold}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule train_on_unlabelled:
    input:
        "fold{fold}/unlabelled/store",
        PRETRAINED or [],
    output:
        directory("fold{fold}/unlabelled/generator"),
    params:
        command=lambda wildcards: run(
            scaled("unlabelled"),
            {
                "store_dir": RUN / f"fold{wildcards.fold}/unlabelled/store",
                "output_dir": RUN / f"fold{wildcards.fold}/unlabelled/generator",
                "backbone": STUDY.backbone,
                "weights": model_of(PRETRAINED),
                "image_size": STUDY.image_size,
                "fold": int(wildcards.fold),
            },
            plans.unlabelled_knobs(STUDY),
            "multi_gpu_train",
        ),
        start=START,
    log:
        "logs/train_on_unlabelled.fold{fold}.log",
    benchmark:
        "benchmarks/train_on_unlabelled.fold{fold}.tsv"
    threads: FOLD_CORES
    priority: 2  # finetuning waits for it
    message:
        "train the generator on the unlabelled images of fold {wildcards.fold}"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"
