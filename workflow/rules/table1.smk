"""Table 1: the generator of pretraining and Pix2Pix draw held-out images from their edges."""

PRETRAIN = STUDY.pretrain or {}
# Without a tree of their own, both are trained on the task's slices, the test cases of fold 0 apart.
PRETRAIN_STORE = "pretrain/store" if PRETRAIN.get("dataset_dir") else "store"
PRETRAIN_SIZE = PRETRAIN.get("image_size") or STUDY.image_size
# What was pretrained on a tree is what every fold is finetuned from, unless the file names weights.
OWN_WEIGHTS = "weights" in STUDY.finetune or not PRETRAIN.get("dataset_dir")
PRETRAINED = None if OWN_WEIGHTS else "pretrain/generator"


rule prepare_tree:
    output:
        directory("pretrain/store"),
    params:
        command=lambda wildcards: run(
            [CONFIGS["pretrain.prepare"]],
            {
                "dataset_dir": PRETRAIN["dataset_dir"],
                "store_dir": RUN / "pretrain/store",
                "image_size": PRETRAIN_SIZE,
                "edges": STUDY.edges,
                "hed_size_px": STUDY.hed_size_px,
            },
            PRETRAIN.get("prepare", {}),
            "multi_gpu_prepare",
        ),
        start=START,
    log:
        "logs/prepare_tree.log",
    benchmark:
        "benchmarks/prepare_tree.tsv"
    threads: ALL_CORES
    message:
        "prepare the tree of pretraining"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule pretrain:
    input:
        PRETRAIN_STORE,
    output:
        directory("pretrain/generator"),
    params:
        command=lambda wildcards: run(
            scaled("pretrain.train"),
            {
                "store_dir": RUN / PRETRAIN_STORE,
                "output_dir": RUN / "pretrain/generator",
                "backbone": STUDY.backbone,
                "image_size": PRETRAIN_SIZE,
            },
            PRETRAIN.get("train", {}),
            "multi_gpu_train",
        ),
        start=START,
    log:
        "logs/pretrain.log",
    benchmark:
        "benchmarks/pretrain.tsv"
    threads: ALL_CORES
    message:
        "pretrain the generator"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule train_pix2pix:
    input:
        PRETRAIN_STORE,
    output:
        directory("pretrain/pix2pix"),
    params:
        command=lambda wildcards: run(
            [CONFIGS["pretrain.pix2pix"]],
            {
                "store_dir": RUN / PRETRAIN_STORE,
                "output_dir": RUN / "pretrain/pix2pix",
                "image_size": PRETRAIN_SIZE,
            },
            PRETRAIN.get("pix2pix", {}),
            "multi_gpu_train_pix2pix",
        ),
        start=START,
    log:
        "logs/train_pix2pix.log",
    benchmark:
        "benchmarks/train_pix2pix.tsv"
    threads: ALL_CORES
    message:
        "train Pix2Pix"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"


rule evaluate_images:
    input:
        PRETRAIN_STORE,
        "pretrain/generator",
        "pretrain/pix2pix",
    output:
        directory("pretrain/evaluation"),
    params:
        command=lambda wildcards: run(
            [CONFIGS["pretrain.evaluate"]],
            {
                "store_dir": RUN / PRETRAIN_STORE,
                "generator_dir": RUN / "pretrain/generator",
                "pix2pix_dir": RUN / "pretrain/pix2pix",
                "output_dir": RUN / "pretrain/evaluation",
                "backbone": STUDY.backbone,
                "image_size": PRETRAIN_SIZE,
            },
            PRETRAIN.get("evaluate", {}),
            "multi_gpu_evaluate",
        ),
        start=START,
    log:
        "logs/evaluate_images.log",
    benchmark:
        "benchmarks/evaluate_images.tsv"
    threads: ALL_CORES
    message:
        "compare the generator with Pix2Pix"
    shell:
        "(cd {params.start:q} && {params.command}) &> {log}"
