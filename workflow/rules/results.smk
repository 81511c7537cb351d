"""Tables, figures and the report: `diffboost report` on what the stages left in the study's folder."""

KNOBS = [knob for knob in plans.ablated_knobs(STUDY) if knob != "network"]
TARGETS = [targets.TARGETS[target][0] for target in targets.ordered_targets(STUDY)]


localrules:
    report,
    record,
    table1,
    table2,
    figure4,
    figure6,
    figure7,


def ordered(target, inputs):
    """Input function that says so where the experiment does not order a target."""

    def inputs_or_error(wildcards):
        targets.check_target(STUDY, target)
        return inputs

    return inputs_or_error


rule report:
    default_target: True
    input:
        "experiment.yaml",
        TARGETS,
    output:
        "report/index.html",
        "metrics.csv",
        "summary.json",
    log:
        "logs/report.log",
    message:
        "write the report"
    shell:
        "diffboost report . &> {log}"


rule record:
    output:
        "experiment.yaml",
    params:
        text=yaml.safe_dump(
            dataclasses.asdict(STUDY) | {"dataset_dir": DATASET, "task": TASK}, sort_keys=False
        ),
    message:
        "record what is run in {output}"
    shell:
        "printf '%s' {params.text:q} > {output}"


rule table1:
    input:
        found=ordered("table1", "pretrain/evaluation"),
    output:
        "tables/table1.csv",
        "tables/table1.md",
    message:
        "copy table 1 from the evaluation of pretraining"
    shell:
        "cp {input.found:q}/table1.csv {input.found:q}/table1.md tables"


rule table2:
    input:
        "experiment.yaml",
        metrics_of(plans.segmenters(STUDY)),
    output:
        "tables/table2.csv",
        "tables/table2.md",
    log:
        "logs/table2.log",
    message:
        "write table 2"
    shell:
        "diffboost report . --only table2 &> {log}"


rule figure4:
    input:
        "experiment.yaml",
        "store",
        found=ordered(
            "figure4", plans.synthetic_dir(plans.BASE, STUDY.folds[0])
        ),
    output:
        "figures/figure4.png",
    log:
        "logs/figure4.log",
    message:
        "draw figure 4"
    shell:
        "diffboost report . --only figure4 &> {log}"


rule figure6:
    input:
        "experiment.yaml",
        found=ordered("figure6", ablation_metrics(KNOBS)),
    output:
        "figures/figure6.svg",
    log:
        "logs/figure6.log",
    message:
        "draw figure 6"
    shell:
        "diffboost report . --only figure6 &> {log}"


rule figure7:
    input:
        "experiment.yaml",
        found=ordered(
            "figure7",
            ablation_metrics(["network"] if len(STUDY.networks) > 1 else []),
        ),
    output:
        "figures/figure7.svg",
    log:
        "logs/figure7.log",
    message:
        "draw figure 7"
    shell:
        "diffboost report . --only figure7 &> {log}"
